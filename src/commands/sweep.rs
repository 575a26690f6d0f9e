//! The sweep: destroys sockets while the kernel still lists them.
//!
//! If the operator needs no owners, and permits SOCK_DESTROY as the only method, a row of the kernel's list is enough to act on
//! a socket. A recent row also serves as the recheck. With very many sockets the other lookups would take most of the time
//! (docs/decisions/sweep.md).
//!
//! After the sweep, the sockets that it has left are found, planned and closed as usual.

use std::collections::HashSet;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::config::{Action, Config, Format};
use crate::control::Control;
use crate::filter::selectors::Selectors;
use crate::filter::{self, bytecode};
use crate::finder;
use crate::finder::sockets::{self, DumpSplit};
use crate::history::{self, History};
use crate::injector::destroy::Destroy;
use crate::injector::engine;
use crate::injector::plan::{self, Policy};
use crate::model::{Method, MethodError, Outcome, Scan, Socket, Target};
use crate::parallel;
use crate::privileges::Privileges;
use crate::proc::netns::Netns;
use crate::sock_diag::{Cookie, DumpError, DumpRequest, SockDiag, SocketMessage};
use crate::sys::errno_of;
use crate::tcp::TcpState;

/// A socket that has been stuck for less than this is left to the ordinary run: it may only pass through its state.
const SWEPT_MIN_AGE: Duration = Duration::from_secs(1);
/// The maximum age of a row when cwkill acts on it. Rows are younger if most sockets match, and older if the kernel must skip
/// many others.
const MAX_ROW_AGE: Duration = Duration::from_millis(2);

/// Whether cwkill can decide about each socket without its owners and without the other sockets.
pub fn is_possible(config: &Config) -> bool {
    let Policy {
        methods, max_kills, ..
    } = &config.policy;
    config.action == Action::Act
        && !config.owners
        && config.selectors.states.contains(TcpState::CloseWait)
        && !config.selectors.address_gone
        && methods[..] == [Method::Destroy]
        && max_kills.is_none()
        && config.reclaim.is_none()
}

/// Adds the sockets that were `swept` before the scan to `scan`.
pub fn merge(scan: &mut Scan, mut swept: Vec<Target>, config: &Config) {
    if swept.is_empty() {
        return;
    }
    drop_listed(&mut swept, &scan.targets);
    scan.targets.append(&mut swept);
    // A quiet run prints no sockets, so their order does not matter.
    if config.format != Format::Quiet {
        finder::sort(&mut scan.targets);
    }
}

/// Removes the sockets from `swept` that still exist. They are in `listed`, and the ordinary run tries them again.
fn drop_listed(swept: &mut Vec<Target>, listed: &[Target]) {
    let listed: HashSet<Cookie> = listed.iter().map(|target| target.socket.cookie()).collect();
    swept.retain(|target| {
        matches!(target.outcome, Some(Outcome::Closed(_) | Outcome::Gone))
            || !listed.contains(&target.socket.cookie())
    });
}

/// Sweeps a namespace if very many sockets match in it. The sweep [`is_possible`] with `config`. Returns the sockets that were
/// destroyed, or that had vanished before, each with its outcome.
///
/// Errors are not returned here: the ordinary scan that follows hits the same error and reports it.
pub fn sweep(
    config: &Config,
    netns: &Netns,
    history: &History,
    privileges: &Privileges,
    control: &dyn Control,
) -> Vec<Target> {
    // Shared with this function, so that the acts are reported even if a thread panics.
    let halves = [Mutex::default(), Mutex::default()];
    let sweeper = Sweeper {
        config,
        netns,
        history,
        privileges,
        control,
    };
    let _ = netns.within(|| catch_unwind(AssertUnwindSafe(|| sweeper.sweep(&halves))));
    let verified = netns.within(|| {
        let verify = |half: &Mutex<Vec<Target>>| sweeper.verify(half);
        parallel::side_by_side(halves.iter().collect(), halves.len(), verify)
    });
    let failure = match verified {
        Err(error) => MethodError::SystemCall("lookup after SOCK_DESTROY", errno_of(&error)),
        // Only a panic leaves targets without an outcome.
        Ok(_) => MethodError::Bug,
    };
    let mut swept = Vec::new();
    for half in halves {
        swept.append(&mut half.into_inner().unwrap_or_else(PoisonError::into_inner));
    }
    for target in &mut swept {
        target.fail_unfinished(failure.clone());
    }
    swept
}

struct Sweeper<'a> {
    config: &'a Config,
    netns: &'a Netns,
    history: &'a History,
    privileges: &'a Privileges,
    control: &'a dyn Control,
}

impl Sweeper<'_> {
    /// Sweeps the namespace of the calling thread, with one thread per half.
    fn sweep(&self, swept: &[Mutex<Vec<Target>>; 2]) {
        let here = filter::ThisNamespace {
            one_of_several: false,
        };
        let Ok(selectors) = self.config.selectors.resolved(&here) else {
            return;
        };
        if let DumpSplit::Halves(halves) = sockets::split_dump(&selectors) {
            self.control.hold_signals();
            let halves: Vec<_> = halves.iter().zip(swept).collect();
            parallel::side_by_side(halves, 2, |(selectors, swept)| {
                self.sweep_half(selectors, swept)
            });
        }
    }

    /// Destroys the matching sockets of one half, one datagram of the dump at a time.
    fn sweep_half(
        &self,
        selectors: &Selectors,
        swept: &Mutex<Vec<Target>>,
    ) -> Result<(), DumpError> {
        let mut destroy = Destroy::without_descriptors()?;
        let bytecode = bytecode::bytecode(&selectors.as_expression(), selectors.states);
        for request in sockets::requests(selectors, &bytecode) {
            let request = DumpRequest {
                states: TcpState::CloseWait.into(),
                ..request
            };
            let mut diag = SockDiag::open()?;
            let (key, begun) = (sockets::netns_key(self.netns, &diag), history::now());
            let keep = |message: SocketMessage| {
                let mut socket = Socket::from_message(&message);
                self.history.apply_to(key, &mut socket, begun);
                self.target(socket, selectors)
            };
            let act = |part: Vec<Target>, since: Instant| {
                if self.control.interrupted() {
                    return ControlFlow::Break(());
                }
                match since.elapsed() < MAX_ROW_AGE {
                    true => self.act(&mut destroy, part, swept),
                    false => ControlFlow::Continue(()),
                }
            };
            if !diag.stream(&request, keep, act)? {
                break;
            }
        }
        Ok(())
    }

    fn act(
        &self,
        destroy: &mut Destroy,
        mut part: Vec<Target>,
        swept: &Mutex<Vec<Target>>,
    ) -> ControlFlow<()> {
        destroy.destroy_together(part.iter_mut().collect());
        let done = part.len();
        // The ordinary run will get the same answer, and report it.
        part.retain(|target| {
            !matches!(
                target.attempts.last().and_then(|last| last.error.as_ref()),
                Some(
                    MethodError::NotPermitted(..)
                        | MethodError::RefusedDespitePrivilege(..)
                        | MethodError::NotSupported(..)
                )
            )
        });
        let refused = part.len() < done;
        let mut swept = swept.lock().unwrap_or_else(PoisonError::into_inner);
        swept.append(&mut part);
        drop(swept);
        self.control.progress(Method::Destroy, done);
        match refused {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }

    /// Verifies the swept sockets, in the namespace of the calling thread.
    fn verify(&self, swept: &Mutex<Vec<Target>>) {
        let mut swept = swept.lock().unwrap_or_else(PoisonError::into_inner);
        if swept.is_empty() {
            return;
        }
        match SockDiag::open() {
            Ok(mut kernel) => {
                let mut targets: Vec<&mut Target> = swept.iter_mut().collect();
                let rules = self.config.rules(self.privileges);
                engine::verify_destroyed(&mut targets, &mut kernel, rules, self.control);
            }
            Err(error) => {
                for target in swept.iter_mut() {
                    let errno = errno_of(&error);
                    target.fail_unfinished(MethodError::SystemCall(
                        "lookup after SOCK_DESTROY",
                        errno,
                    ));
                }
            }
        }
    }

    /// The target with its plan, if the kernel's row is enough to destroy the socket: it is selected, has been stuck for
    /// [`SWEPT_MIN_AGE`], was accepted, is not a subflow, needs no second look, and the plan does not exclude `destroy`.
    fn target(&self, socket: Socket, selectors: &Selectors) -> Option<Target> {
        let is_eligible = socket.state == TcpState::CloseWait
            && socket.age.is_some_and(|age| age >= SWEPT_MIN_AGE)
            && !socket.cause.is_with_listener()
            // The connection of an MPTCP socket can live on after a subflow.
            && socket.subflow_of.is_none()
            && selectors.match_socket(&socket)
            && selectors.match_user(socket.uid)
            && selectors.second_look_after(&socket).is_zero();
        if !is_eligible {
            return None;
        }
        let mut target = Target::new(socket);
        target.plan = plan::plan_one(&target, false, &self.config.policy, self.privileges);
        target.plan.skip.is_none().then_some(target)
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::Cli;

    #[test]
    fn it_needs_destroy_alone_and_no_owners() {
        let is_possible = |line: &str| {
            let words = ["cwkill"].into_iter().chain(line.split(' '));
            is_possible(&Config::from_args(Cli::parse_from(words).args).unwrap())
        };
        assert!(is_possible("--all --no-owners --method destroy"));
        assert!(is_possible(
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
            assert!(!is_possible(line), "{line}");
        }
    }
}
