//! `cwkill diagnose`: who leaks, why, how fast, and what to look at next. Never acts.
//!
//! Two looks at what matches, with a pause between them, give the growth; descriptor tables and the
//! state of each process are read once more beside them. [`group`] counts, [`verdict`] says what it
//! means, [`runtime`] what to run next: all pure. [`text`] and [`json`] write a finished [`Diagnosis`].

pub mod bars;
pub mod group;
pub mod json;
pub mod runtime;
pub mod text;
pub mod verdict;

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::thread;
use std::time::{Duration, Instant};

use crate::config::Scope;
use crate::filter::selectors::Selectors;
use crate::finder::dead::{self, DeadScan, Table, Verdict};
use crate::finder::listeners::{self, Listener};
use crate::finder::{Found, Socket};
use crate::pipeline;
use crate::proc::netns::Netns;
use crate::proc::status::ProcessStatus;
use crate::proc::{ProcFs, Process};
use crate::report::{ExitStatus, notes};
use group::{Around, Group};
use runtime::{Next, Runtime, Subject};
use verdict::Condition;

/// The time between two looks, if nothing else is asked for.
pub const SAMPLE: Duration = Duration::from_secs(5);

/// Processes, and listeners, that are shown and looked at closely: one screen.
pub const SHOWN: usize = 10;

/// So many descriptors that were never connected are worth a word of their own process.
const MANY: usize = 100;

/// What was found out.
#[derive(Debug)]
pub struct Diagnosis {
    /// The second look.
    pub found: Found,
    /// The time between the looks.
    pub elapsed: Duration,
    /// All sockets together.
    pub total: Group,
    /// The processes that hold some of them, or a listener with some of them, or dead descriptors; worst
    /// first.
    pub processes: Vec<Patient>,
    /// The listeners that leave connections waiting, worst first.
    pub listeners: Vec<Waiting>,
    /// Sockets without a known owner.
    pub ownerless: Option<Group>,
    /// Processes that were asked for and whose descriptors may not be read.
    pub unreadable: usize,
    /// Descriptors that may be dead, of processes with nothing else to report.
    pub unknown: usize,
    /// /proc does not show the processes of others (hidepid).
    pub hidden: bool,
    /// Whether certain processes were asked for.
    pub selects_owners: bool,
    /// Why descriptors are missing, or may be counted as unknown.
    pub failures: Vec<String>,
    /// Whether a process number of /proc means the same process to a command.
    pub same_pids: bool,
}

impl Diagnosis {
    /// What could not be seen, one a line.
    pub fn notes(&self) -> Vec<String> {
        let mut notes = notes::unseen(&self.found);
        if self.unreadable > 0 {
            notes.push(format!(
                "the descriptors of {} may not be read: dead ones among them are not counted",
                crate::text::counted(self.unreadable, "process")
            ));
        }
        if self.unknown > 0 {
            notes.push(format!(
                "{} of TCP sockets in no table may be dead: their state may not be read",
                crate::text::counted(self.unknown, "descriptor")
            ));
        }
        if self.hidden && self.ownerless.is_none() {
            notes.push(
                "/proc does not show the processes of others (hidepid): their descriptors are not counted"
                    .to_owned(),
            );
        }
        notes.extend(self.failures.iter().cloned());
        if !self.same_pids && !self.processes.is_empty() {
            notes.push(
                "/proc is of another pid namespace, where a number means another process: no commands are shown"
                    .to_owned(),
            );
        }
        notes
    }

    /// Whether something stuck could not be told for lack of a privilege.
    pub fn is_partly_blind(&self) -> bool {
        let found = &self.found;
        let hidden = found.unreadable_processes > 0 || found.hidden_processes;
        let unknown = |patient: &Patient| patient.suspects()[2] > 0;
        found.undecided > 0
            || (hidden && self.ownerless.is_some())
            || self.processes.iter().any(unknown)
            || self.are_descriptors_unseen()
    }

    /// Whether there may be dead descriptors of what was asked for, of which nothing is shown. That those of somebody
    /// may not be read is as usual for who is not root, so that it counts for processes asked for only.
    fn are_descriptors_unseen(&self) -> bool {
        self.unknown > 0
            || (self.selects_owners
                && (self.unreadable > 0 || self.hidden || !self.failures.is_empty()))
    }

    /// 0 if there is anything to report, 1 if there is nothing, 4 if there is nothing that could be seen.
    pub fn exit_status(&self) -> ExitStatus {
        let found = &self.found;
        let unseen = found.unreachable_namespaces + found.untold_namespaces + found.undecided;
        match (self.total.stuck, self.processes.len()) {
            (0, 0) if unseen > 0 || self.are_descriptors_unseen() => ExitStatus::NotAllClosed,
            (0, 0) => ExitStatus::NothingMatched,
            _ => ExitStatus::Done,
        }
    }
}

/// A process and how it fares.
#[derive(Debug)]
pub struct Patient {
    /// Which.
    pub process: Process,
    /// The sockets of which it holds a descriptor; those of its listeners are not among them.
    pub held: Group,
    /// How many of them others hold too.
    pub shared: usize,
    /// Connections that it leaves waiting at its listeners.
    pub waiting: usize,
    /// Its state, its limits.
    pub status: ProcessStatus,
    /// What its state at both looks says.
    pub condition: Condition,
    /// What it holds and what waits at its listeners, as one number that tells it from other sets.
    pub sockets: u64,
    /// Threads in uninterruptible sleep at both looks, beside the first; of the first [`SHOWN`] processes only.
    pub asleep: Vec<i32>,
    /// Its descriptor table; `None` if it may not be read.
    pub table: Option<Table>,
    /// What it runs on, if that can be told.
    pub runtime: Option<Runtime>,
    /// What to run next.
    pub next: Option<Next>,
}

impl Patient {
    /// How many of its descriptors are of which kind: dead, never connected, not to be told.
    pub fn suspects(&self) -> [usize; 3] {
        let mut counts = [0; 3];
        for suspect in self.table.iter().flat_map(|table| &table.suspects) {
            let kind = match suspect.verdict {
                Verdict::Dead(_) => 0,
                Verdict::NeverConnected => 1,
                Verdict::Unknown(_) => 2,
            };
            counts[kind] += 1;
        }
        counts
    }

    /// All that it keeps open for nothing. What waits at its listeners is told of them.
    pub fn burden(&self) -> usize {
        let [dead, never, _] = self.suspects();
        self.held.stuck + dead + if never < MANY { 0 } else { never }
    }

    /// Whether there is nothing to say of `other` that is not said of this one: workers that share their sockets.
    pub fn is_like(&self, other: &Patient) -> bool {
        self.process.comm == other.process.comm
            && self.sockets == other.sockets
            && self.held.stuck + self.waiting > 0
            && self.shared == self.held.stuck
            && self.condition == other.condition
            && self.suspects() == other.suspects()
    }
}

/// A listener and the connections in its queue.
#[derive(Debug)]
pub struct Waiting {
    /// Its index in [`Found::listeners`].
    pub listener: usize,
    /// Its connections that match.
    pub group: Group,
}

/// Looks twice.
///
/// # Errors
/// As those of a listing.
pub fn run(scope: &Scope, sample: Duration, proc: &ProcFs) -> anyhow::Result<Diagnosis> {
    let namespaces = pipeline::open(&scope.netns, proc)?;
    let selectors = &scope.selectors;
    // The kernel is asked at the beginning of each look; owners are looked up after that.
    let begin = Instant::now();
    let first = pipeline::find(&namespaces, proc, selectors, true)?;
    let states: HashMap<Id, Option<char>> = first
        .processes
        .iter()
        .map(|process| (id(process), proc.status(process).state))
        .collect();
    let asleep: HashMap<Id, Vec<i32>> = worst(&first)
        .map(|process| (id(process), proc.uninterruptible(process)))
        .collect();
    thread::sleep(sample);
    let elapsed = begin.elapsed();
    let found = pipeline::find(&namespaces, proc, selectors, true)?;
    let (tables, failures) = tables(&namespaces.open, &found, selectors, proc);
    let (unreadable, hidden) = (tables.unreadable.len(), tables.hidden);
    let around = Around {
        listening: listening(&namespaces.open),
        elapsed,
    };
    let looks = (&first, &found);
    let (mut processes, unknown) = patients(looks, &around, tables, selectors, |process| {
        let status = proc.status(process);
        let condition = Condition::of(states.get(&id(process)).copied().flatten(), status.state);
        (status, condition)
    });
    let ownerless = Group::new(ownerless(&first), ownerless(&found), &around);
    let total = Group::new(first.sockets.iter(), found.sockets.iter(), &around);
    let listeners = waiting(looks, &around);
    let same_pids = proc.is_of_our_pid_namespace();
    for patient in processes.iter_mut().take(SHOWN) {
        let before = asleep.get(&id(&patient.process)).into_iter().flatten();
        let before: HashSet<&i32> = before.collect();
        if !before.is_empty() {
            let mut both = proc.uninterruptible(&patient.process);
            both.retain(|thread| before.contains(thread) && *thread != patient.process.pid);
            patient.condition = patient.condition.with_threads(&both);
            patient.asleep = both;
        }
    }
    // A number of another pid namespace means another process to whoever runs the command.
    for patient in processes.iter_mut().filter(|_| same_pids) {
        patient.next = runtime::next(Subject {
            pid: patient.process.pid,
            runtime: patient.runtime,
            condition: patient.condition,
            caught: patient.status.caught,
        });
    }
    Ok(Diagnosis {
        same_pids,
        ownerless: (ownerless.stuck > 0).then_some(ownerless),
        found,
        elapsed,
        total,
        processes,
        listeners,
        unreadable,
        unknown,
        hidden,
        selects_owners: selectors.selects_owners(),
        failures,
    })
}

/// The identity of a process.
type Id = (i32, u64);

fn id(process: &Process) -> Id {
    (process.pid, process.start_time)
}

/// The descriptor tables of the owners, and of every other process that is asked for and is in one of the
/// namespaces: it may have nothing but dead descriptors.
pub(crate) fn tables(
    namespaces: &[Netns],
    found: &Found,
    selectors: &Selectors,
    proc: &ProcFs,
) -> (DeadScan, Vec<String>) {
    let (mut in_tables, mut failures) = (HashSet::new(), Vec::new());
    for netns in namespaces {
        match dead::inodes_in_tables(std::slice::from_ref(netns)) {
            Ok(inodes) => in_tables.extend(inodes),
            Err(error) => failures.push(format!(
                "the sockets of a network namespace could not be listed ({:#}): its descriptors may be \
                 counted as unknown",
                anyhow::Error::from(error)
            )),
        }
    }
    let owners: HashSet<Id> = found.processes.iter().map(id).collect();
    let inodes: HashSet<u64> = namespaces.iter().map(Netns::inode).collect();
    // The sockets of a process elsewhere are in tables that were not read.
    let is_here = |process: &Process| {
        match fs::metadata(proc.path(&format!("{}/ns/net", process.pid))) {
            Ok(namespace) => inodes.contains(&namespace.ino()),
            // Neither may its descriptors be read then, which is counted.
            Err(error) => error.kind() == io::ErrorKind::PermissionDenied,
        }
    };
    let wanted = |process: &Process| {
        owners.contains(&id(process)) || (selectors.match_owner(process) && is_here(process))
    };
    // What is known of sockets stands without it.
    let scan = dead::find(proc, &wanted, &in_tables).unwrap_or_else(|error| {
        failures.push(format!("descriptor tables could not be read: {error}"));
        DeadScan::default()
    });
    if let Some((pid, error)) = scan.failed.first() {
        failures.push(format!(
            "the descriptors of {} could not be read (the first is {pid}: {error})",
            crate::text::counted(scan.failed.len(), "process")
        ));
    }
    (scan, failures)
}

/// The processes with the most sockets, held or waiting.
fn worst(found: &Found) -> impl Iterator<Item = &Process> {
    let shares = group::by_process(found);
    let of = |process: &Process| {
        let share = shares.get(&id(process));
        share.map_or(0, |share| share.held.len() + share.waiting)
    };
    let mut worst: Vec<(usize, &Process)> = found.processes.iter().map(|p| (of(p), p)).collect();
    worst.sort_by_key(|(sockets, _)| std::cmp::Reverse(*sockets));
    worst.into_iter().take(SHOWN).map(|(_, process)| process)
}

fn ownerless(found: &Found) -> impl Iterator<Item = &Socket> {
    let sockets = found.sockets.iter();
    sockets.filter(|socket| socket.culprit(found).is_none())
}

/// The listeners with connections that match, worst first.
fn waiting((first, second): (&Found, &Found), around: &Around) -> Vec<Waiting> {
    let (before, now) = (group::by_listener(first), group::by_listener(second));
    let waiting = |(listener, of): (usize, &Listener)| {
        let now = now.get(&of.inodes[..])?.iter().copied();
        let before = before.get(&of.inodes[..]).into_iter().flatten().copied();
        Some(Waiting {
            listener,
            group: Group::new(before, now, around),
        })
    };
    let listeners = second.listeners.iter().enumerate();
    let mut listeners: Vec<Waiting> = listeners.filter_map(waiting).collect();
    listeners.sort_by_key(|waiting| std::cmp::Reverse(waiting.group.stuck));
    listeners
}

/// The ports at which somebody listens. A namespace that does not tell only costs a better verdict.
fn listening(namespaces: &[Netns]) -> HashSet<(usize, u16)> {
    let ports = |netns: &Netns| netns.within(listeners::ports).ok()?.ok();
    let ports = namespaces.iter().map(ports).enumerate();
    ports
        .flat_map(|(at, ports)| ports.into_iter().flatten().map(move |port| (at, port)))
        .collect()
}

/// The processes to report, worst first, and how many descriptors of others may be dead.
fn patients(
    (first, second): (&Found, &Found),
    around: &Around,
    scan: DeadScan,
    selectors: &Selectors,
    fares: impl Fn(&Process) -> (ProcessStatus, Condition),
) -> (Vec<Patient>, usize) {
    let mut tables: HashMap<Id, Table> = scan
        .tables
        .into_iter()
        .map(|table| (id(&table.process), table))
        .collect();
    let means = |table: &Table| {
        let mut never = 0;
        table.suspects.iter().any(|suspect| match suspect.verdict {
            Verdict::Dead(socket) => socket
                .local
                .is_some_and(|local: SocketAddr| selectors.could_match_dead(local)),
            Verdict::NeverConnected => {
                never += 1;
                never >= MANY && selectors.could_match_unbound()
            }
            Verdict::Unknown(_) => false,
        })
    };
    let owners: HashSet<Id> = second.processes.iter().map(id).collect();
    let mut others: Vec<Process> = tables
        .values()
        .filter(|table| !owners.contains(&id(&table.process)) && means(table))
        .map(|table| table.process.clone())
        .collect();
    others.sort_by_key(|process| process.pid);
    let mut by_process = (group::by_process(first), group::by_process(second));
    let patient = |process: &Process| {
        let key = id(process);
        let before = by_process.0.remove(&key).unwrap_or_default();
        let now = by_process.1.remove(&key).unwrap_or_default();
        let (status, condition) = fares(process);
        let runtime = Runtime::of(status.executable.as_deref(), &process.comm);
        Patient {
            runtime,
            next: None,
            sockets: now.signature(),
            asleep: Vec::new(),
            process: process.clone(),
            shared: now.shared,
            waiting: now.waiting,
            held: Group::new(before.held.into_iter(), now.held.into_iter(), around),
            status,
            condition,
            table: tables.remove(&key),
        }
    };
    let mut patients: Vec<Patient> = second
        .processes
        .iter()
        .chain(&others)
        .map(patient)
        .collect();
    // An owner by a listener in another place than the sockets asked for has nothing to do with them.
    patients.retain(|patient| patient.burden() + patient.waiting > 0);
    patients.sort_by_key(|patient| std::cmp::Reverse((patient.burden(), patient.waiting)));
    let suspects = tables.values().flat_map(|table| &table.suspects);
    let unknown = suspects.filter(|suspect| matches!(suspect.verdict, Verdict::Unknown(_)));
    let unknown = match selectors.could_match_some_dead() {
        true => unknown.count(),
        false => 0,
    };
    (patients, unknown)
}
