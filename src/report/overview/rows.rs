//! The rows of the overview: one for each process and listener, and one for many processes of the same kind.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use super::reasons::{self, Reason};
use crate::model::{Cause, Listener, Outcome, Scan, Target};
use crate::proc::{FdState, Process, ProcessId, ProcessKind};
use crate::report::Run;

/// So many processes of one kind have one row: a screen of equal rows hides the others.
const FOLDED_FROM: usize = 10;

/// The sockets of one process or listener, or of many processes of the same kind.
#[derive(Debug)]
pub struct Row<'r> {
    /// Of many processes, the one with the most sockets.
    pub subject: Subject<'r>,
    /// The processes of a row of processes, those with the most sockets first.
    pub processes: Vec<ProcessId>,
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
        let processes = match subject {
            Subject::Process(process) => vec![process.id],
            Subject::Listener(_) | Subject::Unknown | Subject::Kernel => Vec::new(),
        };
        Row {
            subject,
            processes,
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

    /// Whether it is about many processes of the same kind.
    pub fn is_folded(&self) -> bool {
        self.processes.len() > 1
    }

    /// Adds the row of another process of the same kind. Who else has its sockets is set later.
    fn merge(&mut self, other: Row<'r>) {
        self.processes.extend(other.processes);
        self.sockets += other.sockets;
        self.oldest = self.oldest.max(other.oldest);
        add_counts(&mut self.causes, other.causes);
        add_counts(&mut self.states, other.states);
        for (ports, others) in [
            (&mut self.local_ports, other.local_ports),
            (&mut self.peer_ports, other.peer_ports),
        ] {
            for (port, count) in others {
                *ports.entry(port).or_default() += count;
            }
        }
        self.namespaces.extend(other.namespaces);
        self.counts.merge(other.counts);
        self.reasons.extend(other.reasons);
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

fn add_counts<T: Ord>(counts: &mut BTreeMap<T, usize>, others: BTreeMap<T, usize>) {
    for (key, count) in others {
        *counts.entry(key).or_default() += count;
    }
}

impl Counts {
    fn merge(&mut self, other: Counts) {
        self.closed += other.closed;
        self.closing += other.closing;
        self.gone += other.gone;
        self.kept += other.kept;
        self.failed += other.failed;
        self.planned += other.planned;
        self.open += other.open;
    }

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

/// The kind of the processes of a row.
fn kind<'r>(row: &Row<'r>) -> Option<ProcessKind<'r>> {
    match row.subject {
        Subject::Process(process) => Some(process.kind()),
        Subject::Listener(_) | Subject::Unknown | Subject::Kernel => None,
    }
}

/// The rows, with one for all processes of a kind that has many. `others`: for each row by its index, the other processes that have
/// descriptors of its sockets.
fn folded(rows: Vec<Row<'_>>, mut others: HashMap<usize, HashSet<ProcessId>>) -> Vec<Row<'_>> {
    let mut by_kind: HashMap<ProcessKind<'_>, usize> = HashMap::new();
    for row in rows.iter().filter_map(kind) {
        *by_kind.entry(row).or_default() += 1;
    }
    let mut places: HashMap<ProcessKind<'_>, usize> = HashMap::new();
    let mut indexed: Vec<(usize, Row<'_>)> = rows.into_iter().enumerate().collect();
    // The process with the most sockets gives its row to the others of its kind.
    indexed.sort_by_cached_key(|(_, row)| (Reverse(row.sockets), row.processes.first().copied()));
    let mut folded: Vec<(Row<'_>, HashSet<ProcessId>)> = Vec::with_capacity(indexed.len());
    for (index, row) in indexed {
        let others = others.remove(&index).unwrap_or_default();
        let many = kind(&row).filter(|kind| by_kind[kind] >= FOLDED_FROM);
        match many.and_then(|kind| places.get(&kind).copied()) {
            Some(place) => {
                let (first, first_others) = &mut folded[place];
                first.merge(row);
                first_others.extend(others);
            }
            None => {
                if let Some(kind) = many {
                    places.insert(kind, folded.len());
                }
                folded.push((row, others));
            }
        }
    }
    let mut rows = Vec::with_capacity(folded.len());
    for (mut row, mut others) in folded {
        if row.is_folded() {
            for process in &row.processes {
                others.remove(process);
            }
        }
        row.others = others.len();
        rows.push(row);
    }
    rows
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
    let mut rows = folded(rows, others);
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
