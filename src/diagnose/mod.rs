//! `cwkill diagnose`: who leaks, why, how fast, and what to look at next. Never acts.
//!
//! Two looks at what matches, with a pause between them, give the growth; descriptor tables and the
//! state of each process are read once more beside them. [`group`] counts, [`verdict`] says what it
//! means, [`suggest`] what to run next: all pure.

pub mod group;
pub mod suggest;
pub mod verdict;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crate::filter::Scope;
use crate::filter::selectors::Selectors;
use crate::finder::dead::{self, DeadScan, Table, Verdict};
use crate::finder::{self, listeners};
use crate::model::{Listener, Scan, Socket};
use crate::proc::netns::Netns;
use crate::proc::status::ProcessStatus;
use crate::proc::{ProcFs, Process, ProcessId};
use crate::text::counted;
use group::{Around, Group};
use suggest::{Next, Runtime, Subject};
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
    /// The second scan.
    pub scan: Scan,
    /// The time between the looks.
    pub elapsed: Duration,
    /// All sockets together.
    pub total: Group,
    /// The processes that hold some of them, or a listener with some of them, or dead descriptors; worst
    /// first.
    pub processes: Vec<ProcessDiagnosis>,
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
        let scan = &self.scan;
        let mut notes = scan.coverage.notes(scan.without_known_owner());
        if self.unreadable > 0 {
            notes.push(format!(
                "the descriptors of {} may not be read: dead ones among them are not counted",
                counted(self.unreadable, "process")
            ));
        }
        if self.unknown > 0 {
            notes.push(format!(
                "{} of TCP sockets in no table may be dead: their state may not be read",
                counted(self.unknown, "descriptor")
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
        let coverage = &self.scan.coverage;
        let unknown = |process: &ProcessDiagnosis| process.suspects()[2] > 0;
        coverage.undecided > 0
            || (coverage.has_hidden_owners() && self.ownerless.is_some())
            || self.processes.iter().any(unknown)
            || self.are_descriptors_unseen()
    }

    /// Whether there may be dead descriptors of what was asked for, of which nothing is shown. That those of somebody
    /// may not be read is as usual for who is not root, so that it counts for processes asked for only.
    pub fn are_descriptors_unseen(&self) -> bool {
        self.unknown > 0
            || (self.selects_owners
                && (self.unreadable > 0 || self.hidden || !self.failures.is_empty()))
    }
}

/// A process and how it fares.
#[derive(Debug)]
pub struct ProcessDiagnosis {
    /// Which.
    pub process: Arc<Process>,
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

impl ProcessDiagnosis {
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
    pub fn leaked(&self) -> usize {
        let [dead, never, _] = self.suspects();
        self.held.stuck + dead + if never < MANY { 0 } else { never }
    }

    /// Whether there is nothing to say of `other` that is not said of this one: workers that share their sockets.
    pub fn is_like(&self, other: &ProcessDiagnosis) -> bool {
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
    /// Its index in [`Scan::listeners`].
    pub listener: usize,
    /// Its connections that match.
    pub group: Group,
}

/// Scans twice.
///
/// # Errors
/// As those of a listing.
pub fn run(scope: &Scope, sample: Duration, proc: &ProcFs) -> anyhow::Result<Diagnosis> {
    let namespaces = finder::open(&scope.netns, proc)?;
    let selectors = &scope.selectors;
    // The kernel is asked at the beginning of each scan; owners are looked up after that.
    let begin = Instant::now();
    let first = finder::find(&namespaces, proc, selectors)?;
    let states: HashMap<ProcessId, Option<char>> = first
        .processes()
        .into_iter()
        .map(|(id, process)| (id, proc.status(process).state))
        .collect();
    let asleep: HashMap<ProcessId, Vec<i32>> = worst(&first)
        .map(|process| (process.id, proc.uninterruptible(process)))
        .collect();
    thread::sleep(sample);
    let elapsed = begin.elapsed();
    let scan = finder::find(&namespaces, proc, selectors)?;
    let (tables, failures) = tables(&scan, selectors, proc);
    let (unreadable, hidden) = (tables.unreadable.len(), tables.hidden);
    let around = Around {
        listening: listening(&scan.namespaces),
        elapsed,
    };
    let scans = (&first, &scan);
    let (mut processes, unknown) =
        diagnose_processes(scans, &around, tables, selectors, |process| {
            let status = proc.status(process);
            let before = states.get(&process.id).copied().flatten();
            let condition = Condition::of(before, status.state);
            (status, condition)
        });
    let ownerless = Group::new(ownerless(&first), ownerless(&scan), &around);
    let total = Group::new(sockets(&first), sockets(&scan), &around);
    let listeners = waiting(scans, &around);
    let same_pids = proc.is_of_our_pid_namespace();
    for diagnosis in processes.iter_mut().take(SHOWN) {
        let process = &diagnosis.process;
        let before: HashSet<&i32> = asleep.get(&process.id).into_iter().flatten().collect();
        if !before.is_empty() {
            let mut both = proc.uninterruptible(process);
            both.retain(|thread| before.contains(thread) && *thread != process.id.pid);
            diagnosis.condition = diagnosis.condition.with_threads(&both);
            diagnosis.asleep = both;
        }
    }
    // A number of another pid namespace means another process to whoever runs the command.
    for diagnosis in processes.iter_mut().filter(|_| same_pids) {
        diagnosis.next = suggest::next(Subject {
            pid: diagnosis.process.id.pid,
            runtime: diagnosis.runtime,
            condition: diagnosis.condition,
            caught: diagnosis.status.caught,
        });
    }
    Ok(Diagnosis {
        same_pids,
        ownerless: (ownerless.stuck > 0).then_some(ownerless),
        scan,
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

/// The descriptor tables of the owners, and of every other process that is selected and is in one of the namespaces: it may have
/// nothing but dead descriptors.
pub(crate) fn tables(scan: &Scan, selectors: &Selectors, proc: &ProcFs) -> (DeadScan, Vec<String>) {
    let (mut in_tables, mut failures) = (HashSet::new(), Vec::new());
    for netns in &scan.namespaces {
        match dead::inodes_in_tables(std::slice::from_ref(netns)) {
            Ok(inodes) => in_tables.extend(inodes),
            Err(error) => failures.push(format!(
                "the sockets of a network namespace could not be listed ({:#}): its descriptors may be \
                 counted as unknown",
                anyhow::Error::from(error)
            )),
        }
    }
    let owners: HashSet<ProcessId> = scan.processes().into_keys().collect();
    let inodes: HashSet<u64> = scan.namespaces.iter().map(|netns| netns.inode()).collect();
    // The sockets of a process elsewhere are in tables that were not read.
    let is_here = |process: &Process| {
        match fs::metadata(proc.path(&format!("{}/ns/net", process.id.pid))) {
            Ok(namespace) => inodes.contains(&namespace.ino()),
            // Neither may its descriptors be read then, which is counted.
            Err(error) => error.kind() == io::ErrorKind::PermissionDenied,
        }
    };
    let wanted = |process: &Process| {
        owners.contains(&process.id) || (selectors.match_owner(process) && is_here(process))
    };
    // What is known of sockets stands without it.
    let dead = dead::find(proc, &wanted, &in_tables).unwrap_or_else(|error| {
        failures.push(format!("descriptor tables could not be read: {error}"));
        DeadScan::default()
    });
    if let Some((pid, error)) = dead.failed.first() {
        failures.push(format!(
            "the descriptors of {} could not be read (the first is {pid}: {error})",
            counted(dead.failed.len(), "process")
        ));
    }
    (dead, failures)
}

/// The processes with the most sockets, held or waiting.
fn worst(scan: &Scan) -> impl Iterator<Item = &Process> {
    let by_process = group::by_process(scan);
    let count = |id: &ProcessId| {
        let sockets = by_process.get(id);
        sockets.map_or(0, |sockets| sockets.held.len() + sockets.waiting)
    };
    let processes = scan.processes().into_iter();
    let mut worst: Vec<(usize, &Process)> = processes.map(|(id, p)| (count(&id), &**p)).collect();
    worst.sort_by_key(|(sockets, _)| std::cmp::Reverse(*sockets));
    worst.into_iter().take(SHOWN).map(|(_, process)| process)
}

fn sockets(scan: &Scan) -> impl Iterator<Item = &Socket> {
    scan.targets.iter().map(|target| &target.socket)
}

/// The sockets without a known owner.
fn ownerless(scan: &Scan) -> impl Iterator<Item = &Socket> {
    let targets = scan.targets.iter();
    let ownerless = targets.filter(|target| scan.responsible(target).is_empty());
    ownerless.map(|target| &target.socket)
}

/// The listeners with connections that match, worst first.
fn waiting((first, second): (&Scan, &Scan), around: &Around) -> Vec<Waiting> {
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

/// The ports at which somebody listens, each with the index of its network namespace. A namespace without an answer only costs a
/// better verdict.
fn listening(namespaces: &[Arc<Netns>]) -> HashSet<(usize, u16)> {
    let ports = |netns: &Arc<Netns>| netns.within(listeners::ports).ok()?.ok();
    let ports = namespaces.iter().map(ports).enumerate();
    ports
        .flat_map(|(netns, ports)| ports.into_iter().flatten().map(move |port| (netns, port)))
        .collect()
}

/// The processes to report, worst first, and how many descriptors of others may be dead.
fn diagnose_processes(
    (first, second): (&Scan, &Scan),
    around: &Around,
    scan: DeadScan,
    selectors: &Selectors,
    status_of: impl Fn(&Process) -> (ProcessStatus, Condition),
) -> (Vec<ProcessDiagnosis>, usize) {
    let mut tables: HashMap<ProcessId, Table> = scan
        .tables
        .into_iter()
        .map(|table| (table.process.id, table))
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
    let mut processes: BTreeMap<ProcessId, Arc<Process>> = second
        .processes()
        .into_iter()
        .map(|(id, process)| (id, Arc::clone(process)))
        .collect();
    for table in tables.values().filter(|table| means(table)) {
        processes
            .entry(table.process.id)
            .or_insert_with(|| Arc::new(table.process.clone()));
    }
    let mut before = group::by_process(first);
    let mut now = group::by_process(second);
    let diagnose = |(id, process): (ProcessId, Arc<Process>)| {
        let before = before.remove(&id).unwrap_or_default();
        let now = now.remove(&id).unwrap_or_default();
        let (status, condition) = status_of(&process);
        ProcessDiagnosis {
            runtime: Runtime::of(status.executable.as_deref(), &process.comm),
            next: None,
            sockets: now.signature(),
            asleep: Vec::new(),
            process,
            shared: now.shared,
            waiting: now.waiting,
            held: Group::new(before.held.into_iter(), now.held.into_iter(), around),
            status,
            condition,
            table: tables.remove(&id),
        }
    };
    let mut processes: Vec<ProcessDiagnosis> = processes.into_iter().map(diagnose).collect();
    // An owner by a listener in another place than the selected sockets has nothing to do with them.
    processes.retain(|process| process.leaked() + process.waiting > 0);
    processes.sort_by_key(|process| std::cmp::Reverse((process.leaked(), process.waiting)));
    let suspects = tables.values().flat_map(|table| &table.suspects);
    let unknown = suspects.filter(|suspect| matches!(suspect.verdict, Verdict::Unknown(_)));
    let unknown = match selectors.could_match_some_dead() {
        true => unknown.count(),
        false => 0,
    };
    (processes, unknown)
}
