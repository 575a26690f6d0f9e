//! Closes the targets of a scan in parallel: each network namespace has a worker, and a large one has several.

use std::collections::HashMap;
use std::io;
use std::thread;

use super::engine::{self, Rules};
use crate::control::Control;
use crate::finder::listeners::Listeners;
use crate::model::{Method, MethodError, Scan, Target};
use crate::parallel;
use crate::proc::ProcFs;
use crate::proc::netns::Netns;
use crate::sock_diag::SockDiag;
use crate::sys::errno_of;

/// A namespace with more sockets than this gets a second worker.
const SOCKETS_PER_WORKER: usize = 2048;
/// Workers at the same time. Most of them only wait, so there may be more than processors.
pub(super) const WORKERS_AT_ONCE: usize = 16;
/// The step of a worker that can fail before it acts.
const PREPARATION: &str = "entering the network namespace or opening a netlink socket";

/// Runs the plan of every target that has no outcome yet, and gives it an outcome.
pub fn close(
    scan: &mut Scan,
    methods: &[Method],
    rules: Rules<'_>,
    proc: &ProcFs,
    control: &dyn Control,
) {
    let namespaces = &scan.namespaces;
    let work = |netns: usize, mut targets: Vec<&mut Target>| {
        let netns: &Netns = &namespaces[netns];
        let mut close = || -> io::Result<HashMap<u32, u32>> {
            let mut diag = SockDiag::open()?;
            let mut executors = super::executors(methods, proc)?;
            engine::run(&mut targets, &mut executors, &mut diag, rules, control);
            Ok(waiting_by_inode(&targets, &mut diag))
        };
        let closed = netns.within(&mut close).and_then(|closed| closed);
        closed.unwrap_or_else(|error| {
            for target in targets {
                target.fail_unfinished(MethodError::SystemCall(PREPARATION, errno_of(&error)));
            }
            HashMap::new()
        })
    };
    for waiting in share_out(&mut scan.targets, work) {
        let listeners = scan.listeners.iter_mut();
        for socket in listeners.flat_map(|listener| &mut listener.sockets) {
            if let Some(&waiting) = waiting.get(&socket.inode) {
                socket.waiting = waiting;
            }
        }
    }
}

/// Uses the methods of the `chosen` targets up to the first one that acts on each, and does not wait for them to close. [`close`] does the
/// rest. The indices are in ascending order.
pub fn begin(
    scan: &mut Scan,
    chosen: &[usize],
    methods: &[Method],
    rules: Rules<'_>,
    proc: &ProcFs,
    control: &dyn Control,
) {
    let namespaces = &scan.namespaces;
    let mut chosen = chosen.iter().copied().peekable();
    let mut by_netns: HashMap<usize, Vec<&mut Target>> = HashMap::new();
    for (index, target) in scan.targets.iter_mut().enumerate() {
        if chosen.next_if_eq(&index).is_some() {
            by_netns
                .entry(target.socket.netns)
                .or_default()
                .push(target);
        }
    }
    let work = |(netns, mut targets): (usize, Vec<&mut Target>)| {
        let mut begin = || -> io::Result<()> {
            let mut diag = SockDiag::open()?;
            let mut executors = super::executors(methods, proc)?;
            engine::begin(&mut targets, &mut executors, &mut diag, rules, control);
            Ok(())
        };
        let begun = namespaces[netns].within(&mut begin).and_then(|begun| begun);
        if let Err(error) = begun {
            for target in targets {
                target.fail_unfinished(MethodError::SystemCall(PREPARATION, errno_of(&error)));
            }
        }
    };
    let shares = by_netns.into_iter().collect();
    parallel::side_by_side(shares, WORKERS_AT_ONCE, work);
}

/// Runs `work` on each share of `targets`, [`WORKERS_AT_ONCE`] at the same time, and returns the results. If a worker panics, its
/// targets fail, and its result is missing. The other workers go on.
fn share_out<T: Send>(
    targets: &mut [Target],
    work: impl Fn(usize, Vec<&mut Target>) -> T + Sync,
) -> Vec<T> {
    let work = |(netns, targets)| work(netns, targets);
    let results = parallel::side_by_side(shares(targets), WORKERS_AT_ONCE, work)
        .into_iter()
        .filter_map(thread::Result::ok)
        .collect();
    for target in targets {
        target.fail_unfinished(MethodError::Bug);
    }
    results
}

/// The targets without an outcome, as one share per worker, with the index of their namespace. A large namespace is split into
/// shares of at least [`SOCKETS_PER_WORKER`] except for the last, at most one per processor.
fn shares(targets: &mut [Target]) -> Vec<(usize, Vec<&mut Target>)> {
    let mut by_netns: HashMap<usize, Vec<&mut Target>> = HashMap::new();
    for target in targets.iter_mut().filter(|target| target.outcome.is_none()) {
        let netns = target.socket.netns;
        by_netns.entry(netns).or_default().push(target);
    }
    let processors = thread::available_parallelism().map_or(1, usize::from);
    let mut shares = Vec::new();
    for (netns, mut targets) in by_netns {
        let size = targets.len().div_ceil(processors).max(SOCKETS_PER_WORKER);
        while !targets.is_empty() {
            let rest = targets.split_off(targets.len().min(size));
            shares.push((netns, targets));
            targets = rest;
        }
    }
    shares
}

/// The number of connections that wait for accept(2) at each listening socket, by inode. Empty if none of `targets` was
/// closed in a backlog.
fn waiting_by_inode(targets: &[&mut Target], diag: &mut SockDiag) -> HashMap<u32, u32> {
    match targets.iter().any(|target| target.was_closed_in_backlog()) {
        true => Listeners::read(diag).map_or_else(|_| HashMap::new(), |l| l.waiting_by_inode()),
        false => HashMap::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Attempt, Outcome, SkipReason, Socket};
    use crate::sock_diag::testdata::stuck;

    fn target(netns: usize) -> Target {
        let mut socket = Socket::from_message(&stuck("10.0.0.1:80", "10.0.0.2:5", 1));
        socket.netns = netns;
        let mut target = Target::new(socket);
        target.plan.methods = vec![Method::Shutdown, Method::Destroy];
        target
    }

    #[test]
    fn a_panic_of_one_worker_costs_no_outcome_of_another() {
        let closed = Some(Outcome::Closed(Method::Destroy));
        let mut targets: Vec<Target> = [0, 1, 2, 1, 1].map(target).into();
        let over = Some(SkipReason::OverMaxKills);
        targets[4].plan.skip = over;
        let results = share_out(&mut targets, |netns, targets| {
            for target in targets {
                target.record(Method::Destroy, Ok(()));
                target.outcome = closed;
                assert_ne!(netns, 1, "on purpose");
            }
            netns
        });
        let outcomes: Vec<Option<Outcome>> = targets.iter().map(|target| target.outcome).collect();
        let failed = Some(Outcome::Failed);
        let skipped = over.map(Outcome::Skipped);
        assert_eq!(outcomes, [closed, closed, closed, failed, skipped]);
        let bug = |method| Attempt {
            method,
            error: Some(MethodError::Bug),
            at_one_instant: false,
        };
        assert_eq!(
            targets[3].attempts,
            [bug(Method::Shutdown), bug(Method::Destroy)]
        );
        let mut namespaces = results;
        namespaces.sort_unstable();
        assert_eq!(namespaces, [0, 2]);
    }

    #[test]
    fn each_target_without_an_outcome_is_in_one_share_of_its_namespace() {
        let netns = |index| usize::from(index % 100 == 0);
        let mut targets: Vec<Target> = (0..5000).map(|index| target(netns(index))).collect();
        targets[1].outcome = Some(Outcome::Gone);
        let mut counts = [0; 2];
        for (netns, share) in shares(&mut targets) {
            assert!(!share.is_empty());
            assert!(share.iter().all(|target| target.socket.netns == netns));
            assert!(share.iter().all(|target| target.outcome.is_none()));
            counts[netns] += share.len();
        }
        assert_eq!(counts, [4949, 50]);
    }
}
