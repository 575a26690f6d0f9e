//! The rows of the overview: one for each process and listener.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use super::reasons::{self, Reason};
use crate::model::{Cause, Listener, Outcome, Scan, Target};
use crate::proc::{FdState, Process, ProcessId};
use crate::report::Run;

/// The sockets of one process or listener.
#[derive(Debug)]
pub struct Row<'r> {
    pub subject: Subject<'r>,
    /// The number of other processes that have descriptors of the same sockets.
    pub others: usize,
    /// The number of sockets.
    pub sockets: usize,
    /// The age of the oldest.
    pub oldest: Option<Duration>,
    pub causes: BTreeMap<Cause, usize>,
    pub states: BTreeMap<&'static str, usize>,
    pub local_ports: HashMap<u16, usize>,
    pub peer_ports: HashMap<u16, usize>,
    /// Indices in [`Scan::namespaces`].
    pub namespaces: BTreeSet<usize>,
    pub counts: Counts,
    /// Why some of them are not closed. Empty in a listing.
    pub reasons: BTreeSet<Reason>,
}

/// Who is responsible for the sockets of a row.
#[derive(Clone, Copy, Debug)]
pub enum Subject<'r> {
    Process(&'r Arc<Process>),
    Listener(&'r Listener),
    /// The owner is unknown.
    Unknown,
    /// The sockets have no owner any more.
    Kernel,
}

/// What became of the sockets of a row, or in a dry run would.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub closed: usize,
    pub closing: usize,
    pub gone: usize,
    /// Left alone.
    pub kept: usize,
    pub failed: usize,
    /// Dry run: cwkill would try to close them.
    pub planned: usize,
    /// The descriptors of closed sockets that are still open.
    pub open: usize,
}

#[derive(PartialEq, Eq, Hash)]
enum Key {
    Process(ProcessId),
    Listener(usize),
    Unknown,
    Kernel,
}

impl<'r> Row<'r> {
    fn new(subject: Subject<'r>) -> Self {
        Row {
            subject,
            others: 0,
            sockets: 0,
            oldest: None,
            causes: BTreeMap::new(),
            states: BTreeMap::new(),
            local_ports: HashMap::new(),
            peer_ports: HashMap::new(),
            namespaces: BTreeSet::new(),
            counts: Counts::default(),
            reasons: BTreeSet::new(),
        }
    }

    /// The process of the row; of a listener, its first owner.
    pub fn process(&self) -> Option<&'r Arc<Process>> {
        match self.subject {
            Subject::Process(process) => Some(process),
            Subject::Listener(listener) => listener.owners.first().map(|owner| &owner.process),
            Subject::Unknown | Subject::Kernel => None,
        }
    }

    fn add(&mut self, target: &Target, with_reasons: bool) {
        let socket = &target.socket;
        let tuple = socket.tuple();
        self.sockets += 1;
        self.oldest = self.oldest.max(socket.age);
        *self.causes.entry(socket.cause).or_default() += 1;
        *self.states.entry(socket.state.name()).or_default() += 1;
        *self.local_ports.entry(tuple.local.port()).or_default() += 1;
        *self.peer_ports.entry(tuple.peer.port()).or_default() += 1;
        self.namespaces.insert(socket.netns);
        self.counts.add(target);
        if with_reasons {
            self.reasons
                .extend(reasons::of_target(target).map(|(reason, _)| reason));
        }
    }
}

impl Counts {
    fn add(&mut self, target: &Target) {
        *match target.outcome {
            Some(Outcome::Closed(_)) => &mut self.closed,
            Some(Outcome::Closing(..)) => &mut self.closing,
            Some(Outcome::Gone) => &mut self.gone,
            Some(Outcome::Skipped(_)) => &mut self.kept,
            Some(Outcome::Failed) => &mut self.failed,
            None if target.plan.skip.is_some() => &mut self.kept,
            None => &mut self.planned,
        } += 1;
        let open = target.owners.iter();
        let open = open.filter(|owner| owner.after == Some(FdState::Open));
        self.open += open.count();
    }
}

fn place<'r>(scan: &'r Scan, target: &'r Target) -> (Key, Subject<'r>) {
    if target.socket.cause == Cause::Orphan {
        return (Key::Kernel, Subject::Kernel);
    }
    if let Some(index) = target.listener {
        return (
            Key::Listener(index),
            Subject::Listener(&scan.listeners[index]),
        );
    }
    match target.owners.first() {
        Some(owner) => (
            Key::Process(owner.process.id),
            Subject::Process(&owner.process),
        ),
        None => (Key::Unknown, Subject::Unknown),
    }
}

/// The rows, that with the most sockets first. Rows with as many keep the order of their process numbers, so that a later run shows
/// them in the same order.
pub fn rows(run: &Run, with_reasons: bool) -> Vec<Row<'_>> {
    let scan = &run.scan;
    let mut places: HashMap<Key, usize> = HashMap::new();
    let mut rows: Vec<Row<'_>> = Vec::new();
    let mut others: HashMap<usize, HashSet<ProcessId>> = HashMap::new();
    for target in &scan.targets {
        let (key, subject) = place(scan, target);
        let index = *places.entry(key).or_insert_with(|| {
            rows.push(Row::new(subject));
            rows.len() - 1
        });
        let row = &mut rows[index];
        row.add(target, with_reasons);
        if let Subject::Process(process) = row.subject {
            let ids = target.owners.iter().map(|owner| owner.process.id);
            let mut ids = ids.filter(|id| *id != process.id).peekable();
            if ids.peek().is_some() {
                others.entry(index).or_default().extend(ids);
            }
        }
    }
    for (index, others) in others {
        rows[index].others = others.len();
    }
    for row in &mut rows {
        if let Subject::Listener(listener) = row.subject {
            let ids: BTreeSet<ProcessId> = listener
                .owners
                .iter()
                .map(|owner| owner.process.id)
                .collect();
            row.others = ids.len().saturating_sub(1);
        }
    }
    rows.sort_by_cached_key(|row| {
        let rank = match row.subject {
            Subject::Process(_) => 0,
            Subject::Listener(_) => 1,
            Subject::Unknown => 2,
            Subject::Kernel => 3,
        };
        let address = match row.subject {
            Subject::Listener(listener) => Some(listener.local),
            _ => None,
        };
        let namespace = row.namespaces.first().copied();
        let process = row.process().map(|process| process.id);
        (Reverse(row.sockets), rank, process, address, namespace)
    });
    rows
}
