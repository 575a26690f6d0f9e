//! The notes beside the results: the limits of closing a socket, the limits of the scan, and the missing privileges.

use std::collections::{BTreeMap, BTreeSet};
use std::iter::Sum;
use std::net::IpAddr;

use super::Run;
use super::advice::wait_text;
use super::table::{self, names};
use crate::config::DEFAULT_RECLAIM_AGE;
use crate::model::{
    Cause, DrainReason, Exclusion, MethodError, Outcome, Owner, Privilege, Scan, SkipReason,
    Spinning, Target,
};
use crate::proc::{FdState, Process, ProcessId, ProcessKind};
use crate::text::{counted, escape};

/// Notes on more processes of one kind become one note that names so many of them.
const MAX_NAMED: usize = 3;

/// The notes, one per line.
pub fn notes(run: &Run) -> Vec<String> {
    let scan = &run.scan;
    let mut notes = match run.acted {
        false => not_accepting(scan),
        true => descriptors(run),
    };
    if run.acted {
        notes.extend(spinning(run));
        notes.extend(backlogs(run));
    }
    notes.extend(addresses_gone(scan));
    notes.extend(scan.coverage.notes(scan.without_known_owner()));
    if let Some(why) = &run.dead_descriptors_failure {
        notes.push(format!(
            "dead descriptors could not be looked for, so there may be some: {why}"
        ));
    }
    notes
}

/// The listeners with connections that were not accepted.
fn not_accepting(scan: &Scan) -> Vec<String> {
    let waiting = |target: &&Target| target.socket.cause == Cause::NotAccepted;
    let waiting = scan.targets.iter().filter(waiting);
    let listeners: BTreeSet<usize> = waiting.filter_map(|target| target.listener).collect();
    let note = |index: usize| {
        let listener = &scan.listeners[index];
        let (owner, _) = names(scan, &listener.owners, false);
        let backlogs = table::backlogs(listener, "/");
        match (listener.sockets.len(), listener.group_size) {
            (1, 1) => format!(
                "{owner} does not accept connections to {}: backlog {backlogs}",
                listener.local
            ),
            (1, group) => format!(
                "{owner} does not accept connections to {}: backlog {backlogs}, one of {group} listening sockets with SO_REUSEPORT",
                listener.local
            ),
            _ => format!(
                "{owner} do not accept connections to {}: backlogs {backlogs}; the kernel does not tell in whose backlog each waits \
                 (SO_REUSEPORT)",
                listener.local
            ),
        }
    };
    listeners.into_iter().map(note).collect()
}

/// Descriptors of closed sockets that are still open.
#[derive(Clone, Copy, Default)]
struct StillOpen {
    descriptors: usize,
    /// Those whose sockets have unread bytes. `cwkill reclaim` keeps them.
    unread: usize,
}

impl Sum for StillOpen {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(Self::default(), |sum, one| StillOpen {
            descriptors: sum.descriptors + one.descriptors,
            unread: sum.unread + one.unread,
        })
    }
}

impl StillOpen {
    /// Who can close them, and when.
    fn advice(self, command: &str) -> String {
        let wait = wait_text(DEFAULT_RECLAIM_AGE);
        // Force is not advised here: in some runtimes it needs more. `cwkill reclaim` knows the runtime.
        let kept = match self.unread {
            0 => String::new(),
            unread => format!(" (keeps {unread} with unread bytes, and says how to free them)"),
        };
        format!(", only the process can, or you, after {wait}: `{command}`{kept}")
    }
}

/// The descriptors of closed sockets that are still open, by process.
fn descriptors(run: &Run) -> Vec<String> {
    let closed = || run.scan.targets.iter().filter(|target| target.is_closed());
    if !run.scan.owners_known {
        let left = closed().any(|target| target.socket.inode.is_some());
        let note = "owners were not searched for: a descriptor of a closed socket stays open until its process \
                    closes it, and a process that waits for it without reading may spin";
        return left.then(|| note.to_owned()).into_iter().collect();
    }
    let mut open: BTreeMap<ProcessId, (&Process, StillOpen)> = BTreeMap::new();
    let mut unknown = 0;
    for target in closed() {
        let is_unknown = |owner: &Owner| owner.after == Some(FdState::Unknown);
        let cannot_tell = target.is_without_known_owner() || target.owners.iter().any(is_unknown);
        unknown += usize::from(cannot_tell);
        for owner in &target.owners {
            match owner.after {
                Some(FdState::Open) => {
                    let (_, still) = open
                        .entry(owner.process.id)
                        .or_insert_with(|| (&owner.process, StillOpen::default()));
                    still.descriptors += 1;
                    still.unread += usize::from(target.socket.has_unread_data());
                }
                Some(FdState::Unknown | FdState::Closed) | None => {}
            }
        }
    }
    let mut by_kind: BTreeMap<ProcessKind<'_>, Vec<(&Process, StillOpen)>> = BTreeMap::new();
    for (process, still) in open.into_values() {
        by_kind
            .entry(process.kind())
            .or_default()
            .push((process, still));
    }
    let note = |who: String, still: StillOpen, command: &str| {
        let advice = match run.reclaim_requested {
            false => still.advice(command),
            true => String::new(),
        };
        format!(
            "{who} {} of closed sockets open: closing a socket does not free the descriptor{advice}",
            counted(still.descriptors, "descriptor"),
        )
    };
    let mut notes: Vec<String> = Vec::new();
    for (kind, processes) in by_kind {
        if processes.len() > MAX_NAMED {
            let named = processes.iter().take(MAX_NAMED);
            let pids: Vec<String> = named.map(|(p, _)| p.id.pid.to_string()).collect();
            let who = format!(
                "{} processes {} ({} and {} more) still have",
                processes.len(),
                escape(kind.comm),
                pids.join(", "),
                processes.len() - MAX_NAMED,
            );
            let all = processes.iter().map(|(_, still)| *still).sum();
            notes.push(note(who, all, "cwkill reclaim --pid PID"));
        } else {
            let one = |(process, still): (&Process, StillOpen)| {
                let command = format!("cwkill reclaim --pid {}", process.id.pid);
                note(format!("{process} still has"), still, &command)
            };
            notes.extend(processes.into_iter().map(one));
        }
    }
    if unknown > 0 {
        notes.push(format!(
            "whether the descriptors of {} are still open could not be seen",
            counted(unknown, "closed socket")
        ));
    }
    notes
}

/// The owners that spin.
fn spinning(run: &Run) -> impl Iterator<Item = String> + '_ {
    run.spinning.iter().map(|one| {
        let Spinning {
            process,
            fd,
            tid,
            before,
            after,
            ended,
            ..
        } = one;
        let what = match fd {
            Some(fd) => format!("since the socket of descriptor {} was closed", fd.0),
            None => "since several of its sockets were closed".to_owned(),
        };
        if *ended {
            return format!("{process} spun {what}, until the descriptor was closed too");
        }
        let who = match tid {
            Some(tid) => format!("its thread {tid} needs"),
            None => "its threads need".to_owned(),
        };
        let reason = SkipReason::OwnerSpins {
            pid: process.id.pid,
            fd: *fd,
        };
        let targets = run.scan.targets.iter();
        let skipped = Some(Outcome::Skipped(reason));
        let left = match targets.filter(|target| target.outcome == skipped).count() {
            0 => String::new(),
            left => format!("; {} left alone", counted(left, "other socket")),
        };
        format!(
            "{process} spins {what}: {who} {after} % of a processor, {before} % before{left}. To end it: {}",
            one.stop_command()
                .unwrap_or_else(|| "restart the process".to_owned())
        )
    })
}

/// The listeners with connections that cwkill closed before they were accepted. A line about a backlog to drain says more.
fn backlogs(run: &Run) -> Vec<String> {
    let scan = &run.scan;
    let mut closed: BTreeMap<usize, usize> = BTreeMap::new();
    for target in &scan.targets {
        if let (true, Some(listener)) = (target.was_closed_in_backlog(), target.listener) {
            *closed.entry(listener).or_default() += 1;
        }
    }
    let note = |(index, count): (usize, usize)| {
        let listener = &scan.listeners[index];
        let (owner, _) = names(scan, &listener.owners, false);
        let mut drained = run.backlogs.iter().flatten();
        if drained.any(|backlog| listener.inodes().eq([backlog.socket.inode])) {
            return None;
        }
        // Connections that the listener has accepted since then no longer take a slot.
        let taken = count.min(usize::try_from(listener.waiting()).unwrap_or(usize::MAX));
        (taken > 0).then(|| {
            let advice = match run.backlogs {
                None => format!(
                    ", or `cwkill --port {} --drain-backlog`",
                    listener.local.port()
                ),
                Some(_) => String::new(),
            };
            format!(
                "{} still take{} a slot in the backlog of {} ({owner}, backlog {}): only its accept() frees them{advice}",
                counted(taken, "closed connection"),
                if taken == 1 { "s" } else { "" },
                listener.local,
                table::backlogs(listener, "/"),
            )
        })
    };
    closed.into_iter().filter_map(note).collect()
}

/// The open sockets whose local address is not an address of this host any more.
fn addresses_gone(scan: &Scan) -> Option<String> {
    let open = |target: &&Target| {
        let over = matches!(target.outcome, Some(Outcome::Closed(_) | Outcome::Gone));
        target.socket.address_gone && !over
    };
    let targets: Vec<&Target> = scan.targets.iter().filter(open).collect();
    let addresses: BTreeSet<IpAddr> = targets
        .iter()
        .map(|target| target.socket.tuple().local.ip())
        .collect();
    let first = addresses.first()?;
    let addresses = match addresses.len() {
        1 => first.to_string(),
        count => format!("{first} and {} more", count - 1),
    };
    Some(format!(
        "the local address of {} is no longer on this host ({addresses}): no segment of the peer arrives; \
         --method destroy closes such a socket, and --all --address-gone selects it",
        counted(targets.len(), "socket")
    ))
}

/// The privileges that were missing, or that the kernel did not accept, so that a socket stayed open or its owner unknown, or that would
/// be missing in a run that acts.
pub fn missing_privileges(run: &Run) -> BTreeSet<Privilege> {
    let mut missing = BTreeSet::new();
    let coverage = &run.scan.coverage;
    if coverage.undecided_by_owner() > 0 && coverage.has_hidden_owners() {
        missing.insert(Privilege::Ptrace);
    }
    for backlog in run.backlogs.iter().flatten() {
        let reason = backlog
            .result
            .as_ref()
            .and_then(|result| result.reason.as_ref());
        missing.extend(reason.and_then(DrainReason::privilege));
    }
    for target in &run.scan.targets {
        // Also if a harsher method has closed the socket, because the operator may prefer the gentle one.
        if coverage.has_hidden_owners() && target.is_without_known_owner() {
            missing.insert(Privilege::Ptrace);
        }
        let outcomes = target
            .owners
            .iter()
            .filter_map(|owner| owner.reclaim.as_ref());
        missing.extend(outcomes.filter_map(|outcome| outcome.reason()?.privilege()));
        let done = match target.outcome {
            None => !target.plan.methods.is_empty(),
            Some(outcome) => matches!(outcome, Outcome::Closed(_) | Outcome::Gone),
        };
        if done || target.plan.skip == Some(SkipReason::OverMaxKills) {
            continue;
        }
        missing.extend(
            target
                .plan
                .excluded
                .iter()
                .filter_map(|(_, why)| match why {
                    Exclusion::NotPermitted(privilege) => Some(*privilege),
                    _ => None,
                }),
        );
        for attempt in &target.attempts {
            if let Some(
                MethodError::NotPermitted(privilege, _)
                | MethodError::RefusedDespitePrivilege(privilege, _),
            ) = attempt.error
            {
                missing.insert(privilege);
            }
        }
    }
    missing
}
