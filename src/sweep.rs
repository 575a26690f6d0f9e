//! The sweep: destroys sockets while the kernel is still listing them.
//!
//! Where nobody asks for owners, where only SOCK_DESTROY may be used and on all that match, a row of the kernel's list is
//! all that is to be known of a socket, and the list is itself the look right before the act: the sockets of a datagram are
//! destroyed before the next but one is put together. Any other look would only cost time (docs/decisions/sweep.md).
//!
//! What does not fit is left to be found, planned for and acted on as always, after the sweep; so is what the sweep missed.

use std::ops::ControlFlow;
use std::sync::{Mutex, PoisonError};

use crate::config::{Action, Config};
use crate::finder::netns::Netns;
use crate::finder::sock_diag::{DumpError, SockDiag};
use crate::finder::{Found, Socket, filter, view};
use crate::injector::destroy::Destroy;
use crate::injector::ladder::{self, Outcome, Surroundings, Verdict};
use crate::injector::{ActError, MethodName, Target};
use crate::plan::{self, Plan, Policy};
use crate::privileges::Privileges;
use crate::selectors::Selectors;
use crate::tcp::TcpState;
use crate::threads;

/// Namespaces that are swept at the same time.
const NAMESPACES_AT_ONCE: usize = 8;

/// What was swept: sockets that were destroyed, or had gone when they were to be.
#[derive(Debug, Default)]
pub struct Swept {
    /// The sockets, as they were listed.
    pub sockets: Vec<Socket>,
    /// What was planned for each, which is the same for all.
    pub plans: Vec<Plan>,
    /// What became of each.
    pub outcomes: Vec<Outcome>,
}

impl Swept {
    /// Keeps the sockets that `keep` keeps, if one of them is still there.
    pub fn retain(&mut self, keep: impl Fn(&Socket) -> bool) {
        let withstood = |outcome: &Outcome| matches!(outcome.verdict, Verdict::Failed);
        if !self.outcomes.iter().any(withstood) {
            return;
        }
        let kept: Vec<bool> = self.sockets.iter().map(keep).collect();
        let mut each = kept.iter();
        self.sockets.retain(|_| each.next() == Some(&true));
        let mut each = kept.iter();
        self.plans.retain(|_| each.next() == Some(&true));
        let mut each = kept.iter();
        self.outcomes.retain(|_| each.next() == Some(&true));
    }
}

/// Whether `config` leaves nothing to decide for which more than one socket has to be known.
pub fn fits(config: &Config) -> bool {
    let Policy {
        methods, max_kills, ..
    } = &config.policy;
    config.action == Action::Act
        && !config.owners
        && methods[..] == [MethodName::Destroy]
        && max_kills.is_none()
        && config.reclaim.is_none()
}

/// Sweeps `namespaces`; `config` must be one that [`fits`].
///
/// What goes wrong with the whole is not told: what is looked at afterwards fails of the same, and says so.
pub fn sweep(
    config: &Config,
    namespaces: &[Netns],
    privileges: &Privileges,
    surroundings: &dyn Surroundings,
) -> Swept {
    let several = namespaces.len() > 1;
    let indexed: Vec<(usize, &Netns)> = namespaces.iter().enumerate().collect();
    surroundings.begin();
    let one = |(at, netns): &(usize, &Netns)| {
        let broom = Broom {
            config,
            privileges,
            surroundings,
            netns: *at,
            several,
        };
        netns.within(|| broom.namespace()).unwrap_or_default()
    };
    let mut all = Swept::default();
    for mut swept in threads::side_by_side(&indexed, NAMESPACES_AT_ONCE, one)
        .into_iter()
        .flatten()
    {
        all.sockets.append(&mut swept.sockets);
        all.plans.append(&mut swept.plans);
        all.outcomes.append(&mut swept.outcomes);
    }
    all
}

/// What sweeps one namespace.
struct Broom<'a> {
    config: &'a Config,
    privileges: &'a Privileges,
    surroundings: &'a dyn Surroundings,
    /// Its index.
    netns: usize,
    /// Others are swept beside it.
    several: bool,
}

/// Sockets whose order the kernel took, or that had gone; the results tell which.
#[derive(Default)]
struct Ordered {
    sockets: Vec<Socket>,
    plans: Vec<Plan>,
    results: Vec<Result<(), ActError>>,
}

impl Broom<'_> {
    /// Sweeps the namespace of the calling thread.
    fn namespace(&self) -> Swept {
        let here = filter::ThisNamespace {
            one_of_several: self.several,
        };
        let Ok(selectors) = self.config.selectors.resolved(&here) else {
            return Swept::default();
        };
        let parts = match self.several {
            false => view::halves(&selectors),
            true => None,
        };
        let parts = parts.map_or_else(|| vec![selectors], |halves| halves.to_vec());
        // Not in the threads: what is done is told, also if one of them ends in a bug of ours.
        let ordered = Mutex::new(Ordered::default());
        threads::side_by_side(&parts, parts.len(), |part| self.part(part, &ordered));
        let ordered = ordered.into_inner();
        self.confirmed(ordered.unwrap_or_else(PoisonError::into_inner))
    }

    /// Destroys what matches, datagram by datagram.
    fn part(&self, selectors: &Selectors, ordered: &Mutex<Ordered>) -> Result<(), DumpError> {
        let mut diag = SockDiag::open()?;
        let mut destroy = Destroy::open()?;
        let bytecode = filter::bytecode(&selectors.as_expression(), selectors.states());
        for request in view::requests(selectors, &bytecode) {
            let keep = |message| {
                let mut socket = Socket::from_message(&message);
                socket.netns = self.netns;
                let plan = self.plan(&socket, selectors)?;
                Some((socket, plan))
            };
            let act = |part: Vec<(Socket, Plan)>| {
                if self.surroundings.interrupted() {
                    return ControlFlow::Break(());
                }
                let target = |(socket, _): &(Socket, Plan)| Target::without_owner(socket);
                let targets: Vec<Target> = part.iter().map(target).collect();
                let results = destroy.order(&targets);
                self.surroundings.acted(MethodName::Destroy, results.len());
                let mut ordered = ordered.lock().unwrap_or_else(PoisonError::into_inner);
                for ((socket, plan), result) in part.into_iter().zip(results) {
                    // The ladder will get the same answer to the others, and tell it.
                    if let Ok(()) | Err(ActError::Gone | ActError::Unanswered(_)) = result {
                        ordered.sockets.push(socket);
                        ordered.plans.push(plan);
                        ordered.results.push(result);
                    }
                }
                ControlFlow::Continue(())
            };
            diag.stream(&request, keep, act)?;
        }
        Ok(())
    }

    /// The plan for it, if the kernel's word on it is enough: it is stuck, selected, was accepted, and nothing stands against
    /// destroying it.
    fn plan(&self, socket: &Socket, selectors: &Selectors) -> Option<Plan> {
        let is_for_us = socket.state == TcpState::CloseWait
            && !socket.cause.is_with_listener()
            && selectors.match_socket(socket)
            && selectors.match_user(socket.uid);
        let plan = || plan::one(socket, false, &self.config.policy, self.privileges);
        is_for_us.then(plan).filter(|plan| !plan.methods.is_empty())
    }

    /// Verifies what was done.
    fn confirmed(&self, ordered: Ordered) -> Swept {
        let plans = ordered.plans;
        let found = Found {
            sockets: ordered.sockets,
            ..Found::default()
        };
        let rules = self.config.rules(self.privileges);
        let outcomes = match SockDiag::open() {
            _ if plans.is_empty() => Vec::new(),
            Ok(mut diag) => {
                let acts = ordered.results;
                ladder::verify_destroyed(&found, &plans, acts, &mut diag, rules, self.surroundings)
            }
            Err(error) => {
                let errno = error.raw_os_error().unwrap_or(libc::EIO);
                let unknown = |plan| Outcome::unknown(plan, "verifying", errno);
                plans.iter().map(unknown).collect()
            }
        };
        Swept {
            sockets: found.sockets,
            plans,
            outcomes,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::Cli;

    #[test]
    fn it_is_for_those_who_ask_for_nothing_else() {
        let fits = |line: &str| {
            let words = ["cwkill"].into_iter().chain(line.split(' '));
            fits(&Config::from_args(Cli::parse_from(words).args).unwrap())
        };
        assert!(fits("--all --no-owners --method destroy"));
        assert!(fits(
            "--port 80 --no-owners --method destroy --min-age 5m --json"
        ));
        for line in [
            "--all --method destroy",
            "--all --no-owners",
            "--all --no-owners --method destroy,rst",
            "--all --no-owners --method destroy --max-kills 5",
            "--all --no-owners --method destroy --dry-run",
        ] {
            assert!(!fits(line), "{line}");
        }
    }
}
