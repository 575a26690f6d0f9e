//! The sweep: destroys sockets while the kernel is still listing them.
//!
//! Where nobody asks for owners, where only SOCK_DESTROY may be used and on all that match, a row of the kernel's list is
//! all that is to be known of a socket, and if it is young enough it is the look right before the act as well. Among very many
//! sockets any other look is what takes the time (docs/decisions/sweep.md).
//!
//! What does not fit is left to be found, planned for and acted on as always, after the sweep; so is what the sweep missed.

use std::collections::HashSet;
use std::io;
use std::iter::zip;
use std::mem;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::config::{Action, Config};
use crate::filter::selectors::Selectors;
use crate::filter::{self, bytecode};
use crate::finder::sockets::{self, Sample};
use crate::finder::{Found, Socket};
use crate::injector::destroy::Destroy;
use crate::injector::engine::{self, Control, Outcome, Verdict};
use crate::injector::plan::{self, Plan, Policy};
use crate::injector::{ActError, MethodName, Target};
use crate::parallel;
use crate::privileges::Privileges;
use crate::proc::netns::Netns;
use crate::sock_diag::{Cookie, DumpError, DumpRequest, SockDiag};
use crate::tcp::TcpState;

/// A socket is left for a second look if it has not been stuck for so long: it may only pass through its state.
const SETTLED: Duration = Duration::from_secs(1);
/// The oldest that a row of the list may be when it is acted on. It is less where the list has little else than what is
/// looked for; where the kernel walks through many others, it is more.
const FRESH: Duration = Duration::from_millis(2);

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
    fn append(&mut self, mut other: Swept) {
        if self.sockets.is_empty() {
            *self = other;
            return;
        }
        self.sockets.append(&mut other.sockets);
        self.plans.append(&mut other.plans);
        self.outcomes.append(&mut other.outcomes);
    }

    /// Leaves out those of `others` that are still there.
    pub fn leave_out(&mut self, others: &[Socket]) {
        let others: HashSet<Cookie> = others.iter().map(Socket::cookie).collect();
        let keep = |(socket, outcome): (&Socket, &Outcome)| {
            matches!(outcome.verdict, Verdict::Closed(_) | Verdict::Gone)
                || !others.contains(&socket.cookie())
        };
        let kept: Vec<bool> = zip(&self.sockets, &self.outcomes).map(keep).collect();
        if kept.iter().all(|kept| *kept) {
            return;
        }
        fn retain<T>(items: &mut Vec<T>, kept: &[bool]) {
            let mut kept = kept.iter();
            items.retain(|_| kept.next() == Some(&true));
        }
        retain(&mut self.sockets, &kept);
        retain(&mut self.plans, &kept);
        retain(&mut self.outcomes, &kept);
    }
}

/// Whether `config` leaves nothing to decide for which more than one socket has to be known.
pub fn fits(config: &Config) -> bool {
    let Policy {
        methods, max_kills, ..
    } = &config.policy;
    config.action == Action::Act
        && !config.owners
        && config.selectors.states().contains(TcpState::CloseWait)
        && methods[..] == [MethodName::Destroy]
        && max_kills.is_none()
        && config.reclaim.is_none()
}

/// Sweeps a namespace if very many match in it; `config` must be one that [`fits`].
///
/// What goes wrong with the whole is not told: what is looked at afterwards fails of the same, and says so.
pub fn sweep(
    config: &Config,
    netns: &Netns,
    privileges: &Privileges,
    control: &dyn Control,
) -> Swept {
    // What is done is told, also if something ends in a bug of ours.
    let halves = [Mutex::default(), Mutex::default()];
    let broom = Broom {
        config,
        privileges,
        control,
    };
    let _ = netns.within(|| catch_unwind(AssertUnwindSafe(|| broom.work(&halves))));
    let verify = |half: &Mutex<Ordered>| broom.verified(half);
    let verified = || parallel::side_by_side(&halves, halves.len(), verify);
    let told = netns.within(verified);
    let mut swept = Swept::default();
    let mut told = told.unwrap_or_default().into_iter();
    for half in halves {
        let ordered = half.into_inner().unwrap_or_else(PoisonError::into_inner);
        let unknown = |step, errno| {
            let outcome = |plan| Outcome::unknown(plan, step, errno);
            ordered.plans.iter().map(outcome).collect()
        };
        let outcomes = match told.next() {
            Some(Ok(Ok(outcomes))) => outcomes,
            Some(Ok(Err(error))) => unknown("verifying", error.raw_os_error()),
            Some(Err(_)) => unknown(Outcome::BUG, None),
            None => unknown("verifying", None),
        };
        let half = Swept {
            sockets: ordered.found.sockets,
            plans: ordered.plans,
            outcomes,
        };
        swept.append(half);
    }
    swept
}

/// What sweeps.
struct Broom<'a> {
    config: &'a Config,
    privileges: &'a Privileges,
    control: &'a dyn Control,
}

/// Sockets for which an order was given, and the answers.
#[derive(Default)]
struct Ordered {
    found: Found,
    plans: Vec<Plan>,
    results: Vec<Result<(), ActError>>,
}

impl Broom<'_> {
    /// Sweeps the namespace of the calling thread, each half for itself.
    fn work(&self, ordered: &[Mutex<Ordered>; 2]) {
        let here = filter::ThisNamespace {
            one_of_several: false,
        };
        let Ok(selectors) = self.config.selectors.resolved(&here) else {
            return;
        };
        if let Sample::Halves(halves) = sockets::sample(&selectors) {
            self.control.begin();
            let halves: Vec<_> = halves.iter().zip(ordered).collect();
            parallel::side_by_side(&halves, halves.len(), |(half, ordered)| {
                self.half(half, ordered)
            });
        }
    }

    /// Destroys what matches, datagram by datagram.
    fn half(&self, selectors: &Selectors, ordered: &Mutex<Ordered>) -> Result<(), DumpError> {
        let mut destroy = Destroy::open()?;
        let bytecode = bytecode::bytecode(&selectors.as_expression(), selectors.states());
        for request in sockets::requests(selectors, &bytecode) {
            let request = DumpRequest {
                states: TcpState::CloseWait.into(),
                ..request
            };
            let keep = |message| {
                let socket = Socket::from_message(&message);
                let plan = self.plan(&socket, selectors)?;
                Some((socket, plan))
            };
            let act = |part: Vec<(Socket, Plan)>, since: Instant| {
                if self.control.interrupted() {
                    return ControlFlow::Break(());
                }
                match since.elapsed() < FRESH {
                    true => self.act(&mut destroy, part, ordered),
                    false => ControlFlow::Continue(()),
                }
            };
            if !SockDiag::open()?.stream(&request, keep, act)? {
                break;
            }
        }
        Ok(())
    }

    fn act(
        &self,
        destroy: &mut Destroy,
        part: Vec<(Socket, Plan)>,
        ordered: &Mutex<Ordered>,
    ) -> ControlFlow<()> {
        let target = |(socket, _): &(Socket, Plan)| Target::without_owner(socket);
        let targets: Vec<Target> = part.iter().map(target).collect();
        let results = destroy.order_together(&targets);
        let done = results.len();
        let mut refused = false;
        let mut ordered = ordered.lock().unwrap_or_else(PoisonError::into_inner);
        for ((socket, plan), result) in part.into_iter().zip(results) {
            // The ladder will get the same answer, and tell it.
            if let Err(ActError::Denied(..) | ActError::NotSupported(..)) = result {
                refused = true;
                continue;
            }
            ordered.found.sockets.push(socket);
            ordered.plans.push(plan);
            ordered.results.push(result);
        }
        drop(ordered);
        self.control.progress(MethodName::Destroy, done);
        match refused {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }

    /// Verifies what was ordered, in the namespace of the calling thread.
    fn verified(&self, ordered: &Mutex<Ordered>) -> io::Result<Vec<Outcome>> {
        let mut ordered = ordered.lock().unwrap_or_else(PoisonError::into_inner);
        if ordered.plans.is_empty() {
            return Ok(Vec::new());
        }
        let mut diag = SockDiag::open()?;
        let results = mem::take(&mut ordered.results);
        let rules = self.config.rules(self.privileges);
        let Ordered { found, plans, .. } = &*ordered;
        let kernel = &mut diag;
        Ok(engine::verify_destroyed(
            found,
            plans,
            results,
            kernel,
            rules,
            self.control,
        ))
    }

    /// The plan for it, if the kernel's word on it is enough: it is stuck and selected, does not just pass through its state,
    /// was accepted, and nothing stands against destroying it.
    fn plan(&self, socket: &Socket, selectors: &Selectors) -> Option<Plan> {
        let is_for_us = socket.state == TcpState::CloseWait
            && socket.age.is_some_and(|age| age >= SETTLED)
            && !socket.cause.is_with_listener()
            && selectors.match_socket(socket)
            && selectors.match_user(socket.uid);
        let plan = || plan::one(socket, false, &self.config.policy, self.privileges);
        is_for_us.then(plan).filter(|plan| !plan.methods.is_empty())
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
            "--all --no-owners --method destroy --state last-ack",
        ] {
            assert!(!fits(line), "{line}");
        }
    }
}
