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
const WORKERS_AT_ONCE: usize = 16;

/// Runs the plan of every target that has no outcome yet, and gives it an outcome.
pub fn close(
    scan: &mut Scan,
    methods: &[Method],
    rules: Rules<'_>,
    proc: &ProcFs,
    control: &dyn Control,
) {
    let namespaces = &scan.namespaces;
    let work = |(netns, mut targets): (usize, Vec<&mut Target>)| {
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
                target.fail_unfinished(MethodError::SystemCall("preparing", errno_of(&error)));
            }
            HashMap::new()
        })
    };
    let shares = shares(&mut scan.targets);
    let waiting: Vec<HashMap<u32, u32>> = parallel::side_by_side(shares, WORKERS_AT_ONCE, work)
        .into_iter()
        // If a worker panics, the results of the others are still reported.
        .filter_map(thread::Result::ok)
        .collect();
    for target in &mut scan.targets {
        target.fail_unfinished(MethodError::Bug);
    }
    for waiting in waiting {
        for listener in &mut scan.listeners {
            let counts = || {
                listener
                    .inodes
                    .iter()
                    .filter_map(|inode| waiting.get(inode))
            };
            if counts().next().is_some() {
                listener.waiting = counts().sum();
            }
        }
    }
}

/// The targets of each worker, with the index of their namespace. A large namespace is split into one share per processor.
fn shares(targets: &mut [Target]) -> Vec<(usize, Vec<&mut Target>)> {
    let mut by_netns: HashMap<usize, Vec<&mut Target>> = HashMap::new();
    // Targets from the sweep already have an outcome.
    for target in targets.iter_mut().filter(|it| it.outcome.is_none()) {
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
    use crate::model::{Outcome, Socket};
    use crate::sock_diag::testdata::stuck;

    #[test]
    fn a_target_with_an_outcome_is_not_tried_again() {
        let target = |cookie| {
            let message = stuck("10.0.0.1:80", "10.0.0.2:5", cookie);
            Target::new(Socket::from_message(&message))
        };
        let mut targets = [1, 2, 3].map(target);
        targets[1].outcome = Some(Outcome::Closed(Method::Destroy));
        let shares = shares(&mut targets);
        let shared: Vec<u64> = shares
            .iter()
            .flat_map(|(_, targets)| targets)
            .map(|target| target.socket.cookie().0)
            .collect();
        assert_eq!(shared, [1, 3]);
    }
}
