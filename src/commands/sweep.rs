//! The sweep: destroys sockets while the kernel still lists them.
//!
//! Where owners are not asked for, and SOCK_DESTROY alone may be used on everything that matches, a row of the kernel's list is
//! all that must be known of a socket; a row that is young enough also serves as the recheck. Among very many sockets any
//! other lookup is what takes the time (docs/decisions/sweep.md).
//!
//! Sockets that the sweep leaves are found, planned and closed as always, after it.

use std::collections::HashSet;
use std::io;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::config::{Action, Config, Format};
use crate::control::Control;
use crate::filter::selectors::Selectors;
use crate::filter::{self, bytecode};
use crate::finder;
use crate::finder::sockets::{self, Sample};
use crate::injector::destroy::Destroy;
use crate::injector::engine;
use crate::injector::plan::{self, Policy};
use crate::model::{Method, MethodError, Outcome, Scan, Socket, Target};
use crate::parallel;
use crate::privileges::Privileges;
use crate::proc::netns::Netns;
use crate::sock_diag::{Cookie, DumpError, DumpRequest, SockDiag};
use crate::sys::errno_of;
use crate::tcp::TcpState;

/// A socket that has been stuck for less is left for the ordinary way: it may only pass through its state.
const SETTLED: Duration = Duration::from_secs(1);
/// The oldest that a row of the list may be when it is acted on. It is less where the list has little else than what is
/// looked for; where the kernel walks through many others, it is more.
const FRESH: Duration = Duration::from_millis(2);

/// Whether `config` leaves nothing to decide for which more than one socket must be known.
pub fn fits(config: &Config) -> bool {
    let Policy {
        methods, max_kills, ..
    } = &config.policy;
    config.action == Action::Act
        && !config.owners
        && config.selectors.states().contains(TcpState::CloseWait)
        && methods[..] == [Method::Destroy]
        && max_kills.is_none()
        && config.reclaim.is_none()
}

/// Adds to `scan` the sockets that were `swept` before it.
pub fn take_in(scan: &mut Scan, mut swept: Vec<Target>, config: &Config) {
    if swept.is_empty() {
        return;
    }
    drop_listed(&mut swept, &scan.targets);
    scan.targets.append(&mut swept);
    // Nobody reads the order of a quiet run.
    if config.format != Format::Quiet {
        finder::sort(&mut scan.targets);
    }
}

/// Drops from `swept` the sockets that are still there: they are in `listed`, and are tried again.
fn drop_listed(swept: &mut Vec<Target>, listed: &[Target]) {
    let listed: HashSet<Cookie> = listed.iter().map(|target| target.socket.cookie()).collect();
    swept.retain(|target| {
        matches!(target.outcome, Some(Outcome::Closed(_) | Outcome::Gone))
            || !listed.contains(&target.socket.cookie())
    });
}

/// Sweeps a namespace if very many sockets match in it; `config` must be one that [`fits`]. Returns the sockets that were
/// destroyed, or had gone when they were to be, each with its outcome.
///
/// Errors are not returned here: the ordinary scan that follows hits the same error and reports it.
pub fn sweep(
    config: &Config,
    netns: &Netns,
    privileges: &Privileges,
    control: &dyn Control,
) -> Vec<Target> {
    // What was done is reported, even if something ends in a bug of ours.
    let halves = [Mutex::default(), Mutex::default()];
    let sweeper = Sweeper {
        config,
        privileges,
        control,
    };
    let _ = netns.within(|| catch_unwind(AssertUnwindSafe(|| sweeper.sweep(&halves))));
    let verified = netns.within(|| {
        let verify = |half: &Mutex<Vec<Target>>| sweeper.verify(half);
        parallel::side_by_side(halves.iter().collect(), halves.len(), verify)
    });
    let error = match verified {
        Err(error) => Some(error),
        // A half that ended in a panic has no error.
        Ok(halves) => halves.into_iter().flatten().find_map(Result::err),
    };
    let failure = match error {
        Some(error) => MethodError::SystemCall("verifying", errno_of(&error)),
        None => MethodError::Bug,
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
    privileges: &'a Privileges,
    control: &'a dyn Control,
}

impl Sweeper<'_> {
    /// Sweeps the namespace of the calling thread, each half for itself.
    fn sweep(&self, swept: &[Mutex<Vec<Target>>; 2]) {
        let here = filter::ThisNamespace {
            one_of_several: false,
        };
        let Ok(selectors) = self.config.selectors.resolved(&here) else {
            return;
        };
        if let Sample::Halves(halves) = sockets::sample(&selectors) {
            self.control.begin();
            let halves: Vec<_> = halves.iter().zip(swept).collect();
            parallel::side_by_side(halves, 2, |(selectors, swept)| {
                self.sweep_half(selectors, swept)
            });
        }
    }

    /// Destroys what matches, datagram by datagram.
    fn sweep_half(
        &self,
        selectors: &Selectors,
        swept: &Mutex<Vec<Target>>,
    ) -> Result<(), DumpError> {
        let mut destroy = Destroy::open()?;
        let bytecode = bytecode::bytecode(&selectors.as_expression(), selectors.states());
        for request in sockets::requests(selectors, &bytecode) {
            let request = DumpRequest {
                states: TcpState::CloseWait.into(),
                ..request
            };
            let keep = |message| self.target(Socket::from_message(&message), selectors);
            let act = |part: Vec<Target>, since: Instant| {
                if self.control.interrupted() {
                    return ControlFlow::Break(());
                }
                match since.elapsed() < FRESH {
                    true => self.act(&mut destroy, part, swept),
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
        mut part: Vec<Target>,
        swept: &Mutex<Vec<Target>>,
    ) -> ControlFlow<()> {
        destroy.destroy_together(part.iter_mut().collect());
        let done = part.len();
        // The ordinary way will get the same answer, and report it.
        part.retain(|target| {
            !matches!(
                target.attempts.last().and_then(|last| last.error.as_ref()),
                Some(MethodError::NotPermitted(..) | MethodError::NotSupported(..))
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

    /// Verifies the sockets that were to be destroyed, in the namespace of the calling thread.
    fn verify(&self, swept: &Mutex<Vec<Target>>) -> io::Result<()> {
        let mut swept = swept.lock().unwrap_or_else(PoisonError::into_inner);
        if swept.is_empty() {
            return Ok(());
        }
        let mut targets: Vec<&mut Target> = swept.iter_mut().collect();
        let rules = self.config.rules(self.privileges);
        engine::verify_destroyed(&mut targets, &mut SockDiag::open()?, rules, self.control);
        Ok(())
    }

    /// The target with its plan, if the kernel's row is enough to destroy it: the socket is stuck and selected, does not just pass
    /// through its state, was accepted, and nothing speaks against destroying it.
    fn target(&self, socket: Socket, selectors: &Selectors) -> Option<Target> {
        let is_eligible = socket.state == TcpState::CloseWait
            && socket.age.is_some_and(|age| age >= SETTLED)
            && !socket.cause.is_with_listener()
            && selectors.match_socket(&socket)
            && selectors.match_user(socket.uid);
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
