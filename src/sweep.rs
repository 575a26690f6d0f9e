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
use crate::injector::ladder::{self, Outcome, Surroundings};
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
        let parts = match view::halves(&selectors).filter(|_| !self.several) {
            Some(halves) => halves.to_vec(),
            None => vec![selectors],
        };
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
                self.is_for_us(&socket, selectors).then_some(socket)
            };
            let act = |sockets: Vec<Socket>| {
                if self.surroundings.interrupted() {
                    return ControlFlow::Break(());
                }
                let targets: Vec<Target> = sockets.iter().map(Target::without_owner).collect();
                let results = destroy.order(&targets);
                self.surroundings.acted(MethodName::Destroy, results.len());
                let mut ordered = ordered.lock().unwrap_or_else(PoisonError::into_inner);
                for (socket, result) in sockets.into_iter().zip(results) {
                    // The ladder will get the same answer to the others, and tell it.
                    if let Ok(()) | Err(ActError::Gone | ActError::Unanswered(_)) = result {
                        ordered.sockets.push(socket);
                        ordered.results.push(result);
                    }
                }
                ControlFlow::Continue(())
            };
            diag.stream(&request, keep, act)?;
        }
        Ok(())
    }

    /// Whether the kernel's word on it is enough: it is stuck, selected, was accepted, and nothing stands against
    /// destroying it.
    fn is_for_us(&self, socket: &Socket, selectors: &Selectors) -> bool {
        socket.state == TcpState::CloseWait
            && !socket.cause.is_with_listener()
            && selectors.match_socket(socket)
            && selectors.match_user(socket.uid)
            && !self.plan(socket).methods.is_empty()
    }

    fn plan(&self, socket: &Socket) -> Plan {
        plan::one(socket, false, &self.config.policy, self.privileges)
    }

    /// Verifies what was done.
    fn confirmed(&self, ordered: Ordered) -> Swept {
        let plans: Vec<Plan> = ordered.sockets.iter().map(|s| self.plan(s)).collect();
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
