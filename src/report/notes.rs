//! What the operator should know beside the results: what closing a socket does not do, what could not
//! be seen, and which privileges were missing.

use std::collections::{BTreeMap, BTreeSet};

use super::escape::escape;
use super::text::names;
use crate::diagnosis::Cause;
use crate::finder::Found;
use crate::finder::owners::Holding;
use crate::injector::ActError;
use crate::injector::ladder::Verdict;
use crate::pipeline::{Deed, Run};
use crate::plan::LeftOut;
use crate::privileges::Need;
use crate::reclaim::{Reason, ReclaimOutcome};

/// The notes, one a line.
pub fn notes(run: &Run) -> Vec<String> {
    let mut notes = match &run.deeds {
        None => not_accepting(run),
        Some(deeds) => {
            let mut notes = descriptors(run, deeds);
            notes.extend(backlogs(run, deeds));
            notes
        }
    };
    notes.extend(unseen(&run.found));
    let unlisted = |why| format!("what else matches could not be listed ({why})");
    notes.extend(run.unlisted.as_ref().map(unlisted));
    notes
}

/// What could not be seen, one a line.
pub fn unseen(found: &Found) -> Vec<String> {
    let mut notes: Vec<String> = unknown_owners(found).into_iter().collect();
    notes.extend(undecided(found));
    if found.unreachable_namespaces > 0 {
        let why = found
            .namespace_failure
            .as_deref()
            .unwrap_or("needs CAP_SYS_ADMIN");
        notes.push(format!(
            "{} could not be looked into ({why})",
            counted(found.unreachable_namespaces, "network namespace")
        ));
    }
    if found.untold_namespaces > 0 {
        notes.push(format!(
            "the network namespaces of {} could not be told (needs CAP_SYS_PTRACE)",
            counted(found.untold_namespaces, "process")
        ));
    }
    notes
}

/// Which listeners leave connections waiting.
fn not_accepting(run: &Run) -> Vec<String> {
    let waiting = run
        .found
        .sockets
        .iter()
        .filter(|socket| socket.cause == Cause::NotAccepted);
    let listeners: BTreeSet<usize> = waiting.filter_map(|socket| socket.listener).collect();
    let note = |at: usize| {
        let listener = &run.found.listeners[at];
        let (owner, _) = names(&run.found, &listener.owners, false);
        format!(
            "{owner} does not accept what comes to {}: backlog {}/{}",
            listener.local, listener.waiting, listener.backlog
        )
    };
    listeners.into_iter().map(note).collect()
}

/// Descriptors of dead sockets, by process.
fn descriptors(run: &Run, deeds: &[Deed]) -> Vec<String> {
    let mut open: BTreeMap<usize, usize> = BTreeMap::new();
    let mut unknown = 0;
    if !run.found.owners_sought {
        let mut pairs = run.found.sockets.iter().zip(deeds);
        let left = pairs.any(|(socket, deed)| {
            socket.inode.is_some() && matches!(deed.outcome.verdict, Verdict::Closed(_))
        });
        let note = "owners were not looked for: a descriptor of a closed socket stays open until its process \
                    closes it";
        return left.then(|| note.to_owned()).into_iter().collect();
    }
    for (socket, deed) in run.found.sockets.iter().zip(deeds) {
        let closed = matches!(deed.outcome.verdict, Verdict::Closed(_));
        unknown += usize::from(closed && deed.descriptors.is_none());
        for (held, holding) in socket.owners.iter().zip(deed.descriptors.iter().flatten()) {
            match holding {
                Holding::Open if closed => *open.entry(held.process).or_default() += 1,
                Holding::Unknown if closed => unknown += 1,
                _ => {}
            }
        }
    }
    let note = |(process, count): (usize, usize)| {
        let process = &run.found.processes[process];
        format!(
            "{}/{} still has {} of closed sockets open: closing a socket does not free the \
             descriptor{}",
            escape(&process.comm),
            process.pid,
            counted(count, "descriptor"),
            match run.reclaimed {
                None => ", only the process can, or --reclaim",
                Some(_) => "",
            },
        )
    };
    let mut notes: Vec<String> = open.into_iter().map(note).collect();
    if unknown > 0 {
        notes.push(format!(
            "whether the descriptors of {} are still open could not be seen",
            counted(unknown, "closed socket")
        ));
    }
    notes
}

/// Backlogs in which connections were closed that nobody had accepted.
fn backlogs(run: &Run, deeds: &[Deed]) -> Vec<String> {
    let mut closed: BTreeMap<usize, usize> = BTreeMap::new();
    for (socket, deed) in run.found.sockets.iter().zip(deeds) {
        if let (Verdict::Closed(_), Cause::NotAccepted, Some(listener)) =
            (&deed.outcome.verdict, socket.cause, socket.listener)
        {
            *closed.entry(listener).or_default() += 1;
        }
    }
    let note = |(at, count): (usize, usize)| {
        let listener = &run.found.listeners[at];
        let (owner, _) = names(&run.found, &listener.owners, false);
        // Those it has accepted meanwhile take no slot any more.
        let taken = count.min(usize::try_from(listener.waiting).unwrap_or(usize::MAX));
        (taken > 0).then(|| {
            format!(
                "{} still take{} a slot in the backlog of {} ({owner}, backlog {}/{}): only its \
                 accept() frees them",
                counted(taken, "closed connection"),
                if taken == 1 { "s" } else { "" },
                listener.local,
                listener.waiting,
                listener.backlog,
            )
        })
    };
    closed.into_iter().filter_map(note).collect()
}

/// Sockets whose owner could not be told.
fn unknown_owners(found: &Found) -> Option<String> {
    if !found.owners_sought {
        return None;
    }
    let unknown = found
        .sockets
        .iter()
        .filter(|socket| socket.inode.is_some() && socket.owners.is_empty());
    let unknown = unknown.count();
    let unreadable = found.unreadable_processes;
    let why = if found.hidden_processes {
        "/proc does not show the processes of others (hidepid)".to_owned()
    } else if unreadable > 0 {
        format!(
            "{} could not be looked into",
            counted(unreadable, "process")
        )
    } else {
        "in flight over a Unix socket, held by the kernel, or owned in another pid namespace"
            .to_owned()
    };
    (unknown > 0).then(|| {
        format!(
            "{} without a known owner: {why}",
            counted(unknown, "socket")
        )
    })
}

/// Sockets that may have matched.
fn undecided(found: &Found) -> Option<String> {
    (found.undecided > 0).then(|| {
        format!(
            "{} more may belong to the processes asked for, which could not be looked into; left alone",
            counted(found.undecided, "socket")
        )
    })
}

/// The privileges whose lack kept a socket open or its owner unknown, or would.
pub fn missing_privileges(run: &Run) -> BTreeSet<Need> {
    let mut needs = BTreeSet::new();
    let hidden = run.found.unreadable_processes > 0 || run.found.hidden_processes;
    if run.found.undecided > 0 {
        needs.insert(Need::Ptrace);
    }
    for (at, plan) in run.plans.iter().enumerate() {
        let socket = &run.found.sockets[at];
        // Also where a harsher method has done it: the operator may want the gentle one.
        if hidden && socket.inode.is_some() && socket.owners.is_empty() {
            needs.insert(Need::Ptrace);
        }
        let done = match &run.deeds {
            None => !plan.methods.is_empty(),
            Some(deeds) => matches!(
                deeds[at].outcome.verdict,
                Verdict::Closed(_) | Verdict::Gone
            ),
        };
        if done || plan.over_limit {
            continue;
        }
        needs.extend(plan.left_out.iter().filter_map(|(_, why)| match why {
            LeftOut::Needs(need) => Some(*need),
            _ => None,
        }));
        for attempt in run
            .deeds
            .iter()
            .flat_map(|deeds| &deeds[at].outcome.attempts)
        {
            if let Some(ActError::Denied(need, _)) = attempt.error {
                needs.insert(need);
            }
        }
    }
    if let Some(reclaimed) = &run.reclaimed {
        let outcomes = reclaimed.outcomes.iter().flatten().flatten();
        let done = outcomes.filter_map(ReclaimOutcome::reason);
        let planned = reclaimed.reasons.iter().flatten().flatten();
        needs.extend(done.chain(planned).filter_map(Reason::need));
    }
    needs
}

/// A number with its noun.
pub fn counted(count: usize, noun: &str) -> String {
    let ending = match (count, noun.ends_with('s')) {
        (1, _) => "",
        (_, true) => "es",
        (_, false) => "s",
    };
    format!("{count} {noun}{ending}")
}

#[cfg(test)]
mod tests {
    use super::counted;

    #[test]
    fn nouns_follow_their_number() {
        assert_eq!(counted(1, "process"), "1 process");
        assert_eq!(counted(2, "process"), "2 processes");
        assert_eq!(counted(0, "socket"), "0 sockets");
    }
}
