//! `cwkill diagnose`: which process leaks, why, how fast, and which command to run next. It closes nothing.
//!
//! Two scans with a pause between them show the growth. After the second scan cwkill reads the descriptor
//! tables and the state of each process. [`origin`] finds where their sockets come from, `ends` who is at their other ends.
//! Five pure modules evaluate the data: [`counts`] counts sockets, [`pairing`] finds other ends and other legs, [`nat`] other ends of which
//! NAT has changed the address, [`verdict`] explains causes and process states, [`suggest`] chooses the next command.

pub mod counts;
mod ends;
pub mod inside;
pub mod limit;
mod nat;
pub mod origin;
pub mod pairing;
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
use crate::finder;
use crate::finder::dead::{self, DeadScan, DescriptorTable, SuspectVerdict};
use crate::finder::listeners::{self, ListedListener};
use crate::history::History;
use crate::model::{Listener, ListeningSocket, Scan, Socket};
use crate::proc::netns::Netns;
use crate::proc::status::ProcessStatus;
use crate::proc::{Inodes, ProcFs, Process, ProcessId, Unreadable, since_boot};
use crate::sock_diag::Cookie;
use crate::text::{counted, named_or_counted};
use counts::{CountContext, SocketCounts};
use ends::{Ends, Sending};
use inside::Inside;
use limit::ReachedLimit;
use origin::{ListeningPort, Single};
use pairing::OtherLeg;
use suggest::{LanguageRuntime, Suggestion, SuggestionInput};
use verdict::{Circumstance, Condition, Verdict};

/// The default time between the two scans.
pub const DEFAULT_SAMPLE: Duration = Duration::from_secs(5);

/// The maximum number of processes, and of listeners, in the report for people: one screen. Only the threads of
/// these processes are examined.
pub const MAX_SHOWN: usize = 10;

/// A process with at least this many descriptors of sockets that were never connected is reported for them alone.
const NEVER_CONNECTED_FROM: usize = 100;

#[derive(Debug)]
pub struct Diagnosis {
    /// The second scan.
    pub scan: Scan,
    /// The time between the two scans.
    pub elapsed: Duration,
    /// What was left out although it may match, each with a reason.
    pub left_out: Vec<String>,
    /// All sockets together.
    pub total: SocketCounts,
    /// The processes that hold stuck sockets or dead descriptors, or own a listener with stuck connections, and those that the operator
    /// names by their pids. The process with the most leaked descriptors comes first.
    pub processes: Vec<ProcessDiagnosis>,
    /// The listeners with connections that were not accepted, the listener with the most first.
    pub listeners: Vec<ListenerDiagnosis>,
    /// Sockets without a known owner.
    pub ownerless: Option<SocketCounts>,
    /// Number of selected processes whose descriptors cwkill may not read.
    pub unreadable_processes: usize,
    /// Their names, if they are few.
    pub unreadable_names: Vec<String>,
    /// Number of possibly dead descriptors in processes that are not in `processes`.
    pub unknown_descriptors: usize,
    /// /proc does not show the processes of other users (hidepid).
    pub hidden_processes: bool,
    /// Whether a selector names processes.
    pub selects_owners: bool,
    /// Why descriptors are missing, or may be counted as unknown.
    pub failures: Vec<String>,
    /// The host is at its limit of open files (fs.file-max).
    pub is_host_at_limit: bool,
    /// Whether /proc shows the pid namespace of cwkill. Only then a suggested command reaches the right process.
    pub is_own_pid_namespace: bool,
}

impl Diagnosis {
    /// Notes on the limits of the diagnosis, one per line.
    pub fn notes(&self) -> Vec<String> {
        let scan = &self.scan;
        let mut notes = scan.coverage.notes(scan.without_known_owner());
        if self.unreadable_processes > 0 {
            notes.push(format!(
                "the descriptors of {} could not be read: dead ones among them are not counted",
                named_or_counted(self.unreadable_processes, &self.unreadable_names)
            ));
        }
        if self.unknown_descriptors > 0 {
            notes.push(format!(
                "{} of TCP sockets in no table may be dead: their state could not be read",
                counted(self.unknown_descriptors, "descriptor")
            ));
        }
        if self.hidden_processes && self.ownerless.is_none() {
            notes.push(
                "/proc does not show the processes of others (hidepid): their descriptors are not counted"
                    .to_owned(),
            );
        }
        if self.is_host_at_limit {
            notes.push(
                "the host is at its limit of open files (fs.file-max): without CAP_SYS_ADMIN, accept(2) and open(2) fail with ENFILE"
                    .to_owned(),
            );
        }
        notes.extend(self.failures.iter().cloned());
        if !self.is_own_pid_namespace && !self.processes.is_empty() {
            notes.push(
                "/proc is of another pid namespace, where a number means another process: no commands are shown"
                    .to_owned(),
            );
        }
        notes
    }

    /// The fact about the owners of a listener that explains the connections that wait at it.
    pub fn circumstance(&self, listener: &Listener) -> Circumstance<'_> {
        let owns = |process: &&ProcessDiagnosis| {
            let mut owners = listener.owners.iter();
            owners.any(|owner| owner.process.id == process.process.id)
        };
        let owners = || self.processes.iter().filter(owns);
        let is_halted =
            |process: &ProcessDiagnosis| matches!(process.circumstance(), Circumstance::Halted(_));
        match owners().next() {
            Some(first) if owners().all(is_halted) => first.circumstance(),
            _ if owners().any(ProcessDiagnosis::is_at_limit) => Circumstance::AtLimit,
            _ if self.is_host_at_limit => Circumstance::HostAtLimit,
            _ => Circumstance::None,
        }
    }

    /// Whether a missing privilege hid stuck sockets, owners or dead descriptors.
    pub fn lacks_privileges(&self) -> bool {
        let coverage = &self.scan.coverage;
        let unknown = |process: &ProcessDiagnosis| process.suspect_counts().unknown > 0;
        let has_no_owner =
            |one: &ListenerDiagnosis| self.scan.listeners[one.listener].owners.is_empty();
        (coverage.has_hidden_owners()
            && (coverage.undecided_by_owner() > 0
                || self.ownerless.is_some()
                || self.listeners.iter().any(has_no_owner)))
            || self.processes.iter().any(unknown)
            || self.are_descriptors_unseen()
    }

    /// Whether selected processes may have dead descriptors that this diagnosis does not show. Without root some
    /// processes are always unreadable, so unreadable processes count only if a selector names processes.
    pub fn are_descriptors_unseen(&self) -> bool {
        self.unknown_descriptors > 0
            || (self.selects_owners
                && (self.unreadable_processes > 0
                    || self.scan.coverage.unnamed.containers > 0
                    || self.hidden_processes
                    || !self.failures.is_empty()))
    }
}

#[derive(Debug)]
pub struct ProcessDiagnosis {
    pub process: Arc<Process>,
    /// The sockets that the process holds a descriptor of. Connections in the queues of its listeners are not among them.
    pub held: SocketCounts,
    /// The number of `held` sockets that other processes hold too.
    pub shared: usize,
    /// The number of connections that wait at its listeners.
    pub waiting: usize,
    pub status: ProcessStatus,
    pub condition: Condition,
    /// A hash of the held sockets and of the listeners with waiting connections. Equal for workers that share them.
    pub sockets_signature: u64,
    /// Threads, except the main thread, that were in uninterruptible sleep at both scans. Filled in only for the
    /// first [`MAX_SHOWN`] processes.
    pub uninterruptible_threads: Vec<i32>,
    /// The descriptor table; `None` if cwkill may not read it.
    pub table: Option<DescriptorTable>,
    /// `None` if the names of the process do not show it.
    pub runtime: Option<LanguageRuntime>,
    /// The process from which it has inherited its sockets, if it does not use them.
    pub inherited_from: Option<Arc<Process>>,
    /// Its connection, if it has only one.
    pub single_connection: Option<Single>,
    /// It is one of many processes with one connection each.
    pub per_connection: bool,
    /// If it seems to be a proxy: the connections for which it keeps the stuck ones. See [`pairing::other_legs`].
    pub other_legs: Option<Vec<OtherLeg>>,
    /// Its listening sockets, if it leaks nothing: it is reported because the operator names it by its pid.
    pub accepting: Vec<ListeningPort>,
    /// The commands to run, the first one first.
    pub suggestions: Vec<Suggestion>,
    /// The command that names the line of code that leaks.
    pub trace: Option<Suggestion>,
}

/// Descriptors of TCP sockets that are in no table of the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SuspectCounts {
    pub dead: usize,
    pub never_connected: usize,
    /// cwkill may not read their state.
    pub unknown: usize,
}

impl ProcessDiagnosis {
    pub fn suspect_counts(&self) -> SuspectCounts {
        let mut counts = SuspectCounts::default();
        for suspect in self.table.iter().flat_map(|table| &table.suspects) {
            *match suspect.verdict {
                SuspectVerdict::Dead(_) => &mut counts.dead,
                SuspectVerdict::NeverConnected => &mut counts.never_connected,
                SuspectVerdict::Unknown(_) => &mut counts.unknown,
            } += 1;
        }
        counts
    }

    /// The number of leaked descriptors. Connections at its listeners are not counted: [`ListenerDiagnosis`] has them.
    pub fn leaked(&self) -> usize {
        let counts = self.suspect_counts();
        let never_connected = match counts.never_connected {
            0..NEVER_CONNECTED_FROM => 0,
            many => many,
        };
        self.held.stuck + counts.dead + never_connected
    }

    /// Whether it leaks nothing, and no stuck connection waits at its listeners.
    pub fn is_healthy(&self) -> bool {
        self.leaked() + self.waiting == 0
    }

    /// Whether it has almost no free descriptor.
    pub fn is_at_limit(&self) -> bool {
        limit::is_reached(self.used(), self.status.limit)
    }

    /// The number of its open descriptors.
    fn used(&self) -> Option<u64> {
        self.table.as_ref().map(|table| table.used as u64)
    }

    /// The fact about the process that explains its sockets.
    pub fn circumstance(&self) -> Circumstance<'_> {
        match (self.condition, &self.inherited_from) {
            (halted @ (Condition::Stopped | Condition::Frozen | Condition::Traced), _) => {
                Circumstance::Halted(halted)
            }
            (_, Some(from)) => Circumstance::Inherited(from),
            (_, None) if self.per_connection => Circumstance::PerConnection,
            (_, None) => Circumstance::None,
        }
    }

    /// Whether it has read sockets to their end and has not closed them, for no other reason than its own code.
    fn leaks_itself(&self) -> bool {
        let mut causes = self.held.causes.iter();
        self.other_legs.is_none()
            && causes.any(|(&cause, sockets)| {
                Verdict::of(cause, sockets, self.circumstance()) == Verdict::Leak
            })
    }

    /// Whether the report of `other` can be merged with the report of this process: both are one of many with one connection each.
    pub fn is_sibling(&self, other: &ProcessDiagnosis) -> bool {
        let port = |process: &ProcessDiagnosis| process.single_connection.map(|single| single.port);
        self.per_connection
            && other.per_connection
            && self.process.kind() == other.process.kind()
            && self.status.parent == other.status.parent
            && self.condition == other.condition
            && self.waiting + other.waiting == 0
            && port(self) == port(other)
    }

    /// Whether a report of `other` would repeat the report of this process: both are workers that share all their
    /// sockets.
    pub fn is_like(&self, other: &ProcessDiagnosis) -> bool {
        self.process.comm == other.process.comm
            && self.sockets_signature == other.sockets_signature
            && self.held.stuck + self.waiting > 0
            && self.shared == self.held.stuck
            && self.condition == other.condition
            && self.suspect_counts() == other.suspect_counts()
    }
}

/// A listener and the stuck connections in its queue.
#[derive(Debug)]
pub struct ListenerDiagnosis {
    /// The index in [`Scan::listeners`].
    pub listener: usize,
    /// Connections waited at both scans, and no connection was accepted in between.
    pub is_stalled: bool,
    pub connections: SocketCounts,
}

/// Scans twice and evaluates the difference. Adds to `history` what the scans have seen.
///
/// # Errors
/// The same as for a listing.
pub fn run(
    scope: &Scope,
    sample: Duration,
    proc: &ProcFs,
    history: &mut History,
) -> anyhow::Result<Diagnosis> {
    let namespaces = finder::open_namespaces(&scope.netns, &scope.selectors, proc)?;
    let selectors = &scope.selectors;
    // Each scan first lists the sockets and then looks up the owners, so the time between two listings is from the
    // beginning of one scan to the beginning of the next.
    let begin = Instant::now();
    let first = finder::find(&namespaces, proc, selectors, history)?;
    history.add(&first, selectors);
    let states: HashMap<ProcessId, Option<char>> = first
        .processes()
        .into_iter()
        .map(|(id, process)| (id, proc.status(process).state))
        .collect();
    let uninterruptible: HashMap<ProcessId, Vec<i32>> = most_affected(&first)
        .map(|process| (process.id, proc.uninterruptible(process)))
        .collect();
    let sending = Sending::look(&namespaces.open, &first);
    thread::sleep(sample);
    let elapsed = begin.elapsed();
    let scan = finder::find(&namespaces, proc, selectors, history)?;
    history.add(&scan, selectors);
    let (tables, mut failures) = read_tables(&scan, selectors, proc);
    let tables_read = since_boot();
    let (unreadable_processes, hidden_processes) = (tables.unreadable.len(), tables.hidden);
    let unreadable_names = Unreadable::names(&tables.unreadable);
    let listening = listening_ports(&scan.namespaces);
    let context = CountContext {
        listening_ports: listening.iter().map(|l| (l.netns, l.port)).collect(),
        elapsed,
    };
    let scans = (&first, &scan);
    let (mut processes, unknown_descriptors) =
        diagnose_processes(scans, &context, tables, selectors, |process| {
            let status = proc.status(process);
            let before = states.get(&process.id).copied().flatten();
            let condition = Condition::of(before, status.state);
            (
                status,
                condition.with_frozen(proc.is_frozen(process.id.pid)),
            )
        });
    for diagnosis in processes.iter_mut().filter(|one| one.is_healthy()) {
        let inodes = diagnosis.table.iter().flat_map(|table| &table.connections);
        let inodes: Inodes = inodes.copied().collect();
        let own = listening.iter().filter(|one| inodes.contains(&one.inode));
        diagnosis.accepting = own.copied().collect();
    }
    let netns_of = |process: &Process| netns_of(process, &scan, proc);
    origin::find(
        &mut processes,
        &scan,
        &listening,
        &netns_of,
        tables_read,
        proc,
    );
    let mut of_ownerless = SocketCounts::new(ownerless(&first), ownerless(&scan), &context);
    let mut total = SocketCounts::new(sockets(&first), sockets(&scan), &context);
    let mut listeners = diagnose_listeners(scans, &context);
    let mut ends = Ends::find(&scan, sending, &namespaces.open, &listening, proc);
    failures.extend(ends.failure.take());
    ends.attach(
        &scan,
        &mut total,
        &mut of_ownerless,
        &mut processes,
        &mut listeners,
    );
    let is_own_pid_namespace = proc.shows_own_pid_namespace();
    // It tells processes by their pids in the first pid namespace.
    let can_trace = cfg!(feature = "trace") && proc.shows_every_process();
    for diagnosis in processes.iter_mut().take(MAX_SHOWN) {
        let process = &diagnosis.process;
        let before = uninterruptible.get(&process.id);
        let before: HashSet<&i32> = before.into_iter().flatten().collect();
        if !before.is_empty() {
            let mut both = proc.uninterruptible(process);
            both.retain(|thread| before.contains(thread) && *thread != process.id.pid);
            diagnosis.condition = diagnosis.condition.with_threads(&both);
            diagnosis.uninterruptible_threads = both;
        }
    }
    // In another pid namespace the number names another process, so a command would act on the wrong one.
    for diagnosis in processes.iter_mut().filter(|_| is_own_pid_namespace) {
        // Nothing is to be done about it, unless it can open nothing or does not run.
        if diagnosis.is_healthy()
            && !diagnosis.is_at_limit()
            && diagnosis.condition == Condition::Normal
        {
            continue;
        }
        let status = &diagnosis.status;
        let inside = Inside::of(&diagnosis.process.cgroup, &status.pids);
        let input = SuggestionInput {
            inside: inside.as_ref(),
            pid: diagnosis.process.id.pid,
            runtime: diagnosis.runtime,
            condition: diagnosis.condition,
            caught: status.caught,
            held: diagnosis.held.stuck,
            dead: diagnosis.suspect_counts().dead,
            reached: ReachedLimit::of(diagnosis.used(), status),
            inherited_from: diagnosis.inherited_from.as_deref(),
            per_connection: diagnosis.per_connection,
            leaks: diagnosis.leaks_itself(),
        };
        let trace = suggest::trace(input).filter(|_| can_trace);
        (diagnosis.suggestions, diagnosis.trace) = (suggest::suggest(input), trace);
    }
    Ok(Diagnosis {
        is_own_pid_namespace,
        left_out: scan.left_out_with_used(selectors.min_age, selectors.min_idle),
        ownerless: (of_ownerless.stuck > 0).then_some(of_ownerless),
        scan,
        elapsed,
        total,
        processes,
        listeners,
        unreadable_processes,
        unreadable_names,
        unknown_descriptors,
        hidden_processes,
        selects_owners: selectors.selects_owners(),
        failures,
        is_host_at_limit: proc.open_files().is_some_and(|(used, limit)| used >= limit),
    })
}

/// Reads the descriptor tables of the selected owners, and of every other selected process in the scanned namespaces, because a process
/// may have only dead descriptors. Also returns a message for each failure.
pub(crate) fn read_tables(
    scan: &Scan,
    selectors: &Selectors,
    proc: &ProcFs,
) -> (DeadScan, Vec<String>) {
    let (mut listed, mut failures) = (Inodes::default(), Vec::new());
    for netns in &scan.namespaces {
        match dead::listed_inodes(std::slice::from_ref(netns)) {
            Ok(inodes) => listed.extend(inodes),
            Err(error) => failures.push(format!(
                "the sockets of a network namespace could not be listed ({:#}): its descriptors may be \
                 counted as unknown",
                anyhow::Error::from(error)
            )),
        }
    }
    let owners: HashSet<ProcessId> = scan.processes().into_keys().collect();
    let inodes: HashSet<u64> = scan.namespaces.iter().map(|netns| netns.inode()).collect();
    // The socket tables of other namespaces were not read, so the sockets of a process there would all seem dead.
    let is_in_scope = |process: &Process| {
        match fs::metadata(proc.path(&format!("{}/ns/net", process.id.pid))) {
            Ok(namespace) => inodes.contains(&namespace.ino()),
            // Then its descriptors are unreadable too, and `dead::find` counts the process as unreadable.
            Err(error) => error.kind() == io::ErrorKind::PermissionDenied,
        }
    };
    let selected = |process: &Process| {
        selectors.match_owner(process) && (owners.contains(&process.id) || is_in_scope(process))
    };
    // The diagnosis of the sockets is valid without the descriptor tables.
    let dead = dead::find(proc, &selected, &listed).unwrap_or_else(|error| {
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

/// The [`MAX_SHOWN`] processes with the most sockets, held or waiting at a listener.
fn most_affected(scan: &Scan) -> impl Iterator<Item = &Process> {
    let by_process = counts::by_process(scan);
    let count = |id: &ProcessId| {
        let sockets = by_process.get(id);
        sockets.map_or(0, |sockets| sockets.held.len() + sockets.waiting)
    };
    let processes = scan.processes().into_iter();
    let mut counts: Vec<(usize, &Process)> = processes.map(|(id, p)| (count(&id), &**p)).collect();
    counts.sort_by_key(|(sockets, _)| std::cmp::Reverse(*sockets));
    counts
        .into_iter()
        .take(MAX_SHOWN)
        .map(|(_, process)| process)
}

fn sockets(scan: &Scan) -> impl Iterator<Item = &Socket> {
    scan.targets.iter().map(|target| &target.socket)
}

/// The sockets without a known owner. Those that wait at a listener count there, also if its owner is unknown.
fn ownerless(scan: &Scan) -> impl Iterator<Item = &Socket> {
    let targets = scan.targets.iter();
    let ownerless = targets.filter(|target| target.owners.is_empty() && target.listener.is_none());
    ownerless.map(|target| &target.socket)
}

/// The listeners with stuck connections, the listener with the most first.
fn diagnose_listeners(
    (first, second): (&Scan, &Scan),
    context: &CountContext,
) -> Vec<ListenerDiagnosis> {
    let now = counts::by_listener(second);
    let listed: HashSet<Cookie> = sockets(second).map(Socket::cookie).collect();
    let diagnose = |(index, listener): (usize, &Listener)| {
        let now = now.get(&index)?;
        let before = counts::before_at(first, listener, now, &listed);
        let has_shrunk = |socket: &ListeningSocket| {
            waiting_before(first, socket.inode).is_some_and(|before| socket.waiting < before)
        };
        let connections = SocketCounts::new(before.iter().copied(), now.iter().copied(), context);
        Some(ListenerDiagnosis {
            listener: index,
            is_stalled: !before.is_empty()
                && connections.gone == 0
                && !listener.sockets.iter().any(has_shrunk),
            connections,
        })
    };
    let listeners = second.listeners.iter().enumerate();
    let mut listeners: Vec<ListenerDiagnosis> = listeners.filter_map(diagnose).collect();
    listeners.sort_by_key(|listener| std::cmp::Reverse(listener.connections.stuck));
    listeners
}

/// The number of connections that waited at a listening socket in the first scan.
fn waiting_before(first: &Scan, inode: u32) -> Option<u32> {
    let mut sockets = first
        .listeners
        .iter()
        .flat_map(|listener| &listener.sockets);
    let socket = sockets.find(|socket| socket.inode == inode)?;
    Some(socket.waiting)
}

/// The ports with a listener. Errors are ignored: without the ports of a namespace
/// the service of a socket is guessed from the ports of the connections.
fn listening_ports(namespaces: &[Arc<Netns>]) -> Vec<ListeningPort> {
    let listed = |netns: &Arc<Netns>| netns.within(listeners::list).ok()?.ok();
    let listening = |(netns, listed): (usize, Option<Vec<ListedListener>>)| {
        let listed = listed.into_iter().flatten();
        listed.map(move |listener| ListeningPort {
            netns,
            port: listener.port,
            inode: listener.inode,
            waiting: listener.waiting,
        })
    };
    let listed = namespaces.iter().map(listed).enumerate();
    listed.flat_map(listening).collect()
}

/// The index of the network namespace of a process, among those that were scanned.
fn netns_of(process: &Process, scan: &Scan, proc: &ProcFs) -> Option<usize> {
    let path = proc.path(&format!("{}/ns/net", process.id.pid));
    let inode = fs::metadata(path).ok()?.ino();
    let mut namespaces = scan.namespaces.iter();
    namespaces.position(|netns| netns.inode() == inode)
}

/// The processes to report, the one with the most leaked descriptors first, and the number of possibly dead descriptors in
/// all other processes.
fn diagnose_processes(
    (first, second): (&Scan, &Scan),
    context: &CountContext,
    scan: DeadScan,
    selectors: &Selectors,
    status_of: impl Fn(&Process) -> (ProcessStatus, Condition),
) -> (Vec<ProcessDiagnosis>, usize) {
    let mut tables: HashMap<ProcessId, DescriptorTable> = scan
        .tables
        .into_iter()
        .map(|table| (table.process.id, table))
        .collect();
    let has_selected_descriptors = |table: &DescriptorTable| {
        let mut never_connected = 0;
        table.suspects.iter().any(|suspect| match suspect.verdict {
            SuspectVerdict::Dead(socket) => socket
                .local
                .is_some_and(|local: SocketAddr| selectors.could_match_dead(local)),
            SuspectVerdict::NeverConnected => {
                never_connected += 1;
                never_connected >= NEVER_CONNECTED_FROM && selectors.could_match_unbound()
            }
            SuspectVerdict::Unknown(_) => false,
        })
    };
    let mut processes: BTreeMap<ProcessId, Arc<Process>> = second
        .processes()
        .into_iter()
        // A socket of a selected process may have other owners too.
        .filter(|(_, process)| selectors.match_owner(process))
        .map(|(id, process)| (id, Arc::clone(process)))
        .collect();
    // The operator who has cured a process wants to see how it is.
    let is_named = |process: &Process| selectors.pids.contains(&process.id.pid);
    let of_interest = tables
        .values()
        .filter(|table| has_selected_descriptors(table) || is_named(&table.process));
    for table in of_interest {
        processes
            .entry(table.process.id)
            .or_insert_with(|| Arc::new(table.process.clone()));
    }
    let mut before = counts::by_process(first);
    let mut now = counts::by_process(second);
    let diagnose = |(id, process): (ProcessId, Arc<Process>)| {
        let before = before.remove(&id).unwrap_or_default();
        let now = now.remove(&id).unwrap_or_default();
        let (status, condition) = status_of(&process);
        ProcessDiagnosis {
            runtime: LanguageRuntime::of(status.executable.as_deref(), &process.comm),
            accepting: Vec::new(),
            suggestions: Vec::new(),
            trace: None,
            inherited_from: None,
            single_connection: None,
            per_connection: false,
            other_legs: None,
            sockets_signature: now.signature(),
            uninterruptible_threads: Vec::new(),
            process,
            shared: now.shared,
            waiting: now.waiting,
            held: SocketCounts::new(before.held.into_iter(), now.held.into_iter(), context),
            status,
            condition,
            table: tables.remove(&id),
        }
    };
    let mut processes: Vec<ProcessDiagnosis> = processes.into_iter().map(diagnose).collect();
    // A process without leaked descriptors and without waiting connections has no part in the leak. It is reported only if it is named.
    processes.retain(|one| !one.is_healthy() || (is_named(&one.process) && one.table.is_some()));
    processes.sort_by_key(|process| std::cmp::Reverse((process.leaked(), process.waiting)));
    let suspects = tables.values().flat_map(|table| &table.suspects);
    let unknown = suspects.filter(|suspect| matches!(suspect.verdict, SuspectVerdict::Unknown(_)));
    let unknown = match selectors.could_match_some_dead() {
        true => unknown.count(),
        false => 0,
    };
    (processes, unknown)
}
