//! The step after a socket is closed: closing its descriptors inside the processes that leak them.
//!
//! [`reclaim`] takes descriptors of dead sockets, asks for the [`evidence`] that nobody needs them, and for
//! each owner stops all threads (`stop`), asks again, has one of its threads close them (`remote`), and
//! lets it go. Whatever happens to us, the owner goes on; docs/decisions/reclaim.md follows that through.
//!
//! - [`evidence`]: whether a descriptor may be taken, from facts (pure); `facts`: those, from /proc
//! - `act`: what is done to one owner; `stop`: all threads of a process; `remote`: a system call made by one of them
//! - `fate`: what became of a descriptor, and why
//! - [`command`]: the job `cwkill reclaim`
//! - [`arch`]: registers (pure); `seccomp`: what a filter lets through (pure)

mod act;
pub mod arch;
pub mod command;
pub mod evidence;
mod facts;
mod fate;
mod remote;
mod seccomp;
mod stop;

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::thread;
use std::time::Duration;

use caps::{CapSet, Capability};
use nix::errno::Errno;

use crate::finder::dead::{DeadSocket, Suspect};
use crate::injector::engine::Control;
use crate::proc::{ProcFs, Process};
use crate::sock_diag::Cookie;
use crate::sys::{self, RemoteFd};

use act::visit_once;
use arch::Call;
use evidence::{Doubt, Facts, Uses, doubt, uses};
use facts::{Inside, Special};
pub use fate::{Fate, Reason};

/// Stops of one owner at most: another is only needed when a signal has come between, or no thread
/// serves well.
const MOST_STOPS: u32 = 5;
/// How many of them look for a thread that serves well, and the time between them.
const CHOOSY_STOPS: u32 = 3;
const BETWEEN_STOPS: Duration = Duration::from_millis(2);
/// Looks into an owner that is there and does not show what every process has.
const LOOKS: u32 = 5;
/// Between the end of a socket, or the first look at a dead one, and the act: for how long it has been dead the kernel does not
/// say, and a program that reacts to the end of its connection closes it within that time.
const SECOND_LOOK: Duration = Duration::from_secs(1);
/// Descriptors of one stop: the last look at each takes some microseconds.
const MOST_AT_ONCE: usize = 1000;

/// A descriptor to close in its owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Index of the owner in the list that goes with it.
    pub owner: usize,
    /// The number there.
    pub fd: RemoteFd,
    /// The inode of the socket.
    pub inode: u32,
    /// Its cookie.
    pub cookie: Cookie,
    /// How long it has been quiet, if that is known.
    pub age: Option<Duration>,
    /// Bytes in it that its program has not read; 0 while it is not dead, since more may come.
    pub unread: u32,
    /// As many of them may be lost: the operator has seen them, and had the socket closed.
    pub agreed: u32,
}

impl Wanted {
    /// The descriptor of a socket that was `dead` when it was found, in the owner with this index.
    pub fn dead(owner: usize, suspect: &Suspect, dead: &DeadSocket) -> Self {
        Wanted {
            owner,
            fd: suspect.fd,
            inode: suspect.inode,
            cookie: dead.cookie,
            age: Some(dead.quiet),
            unread: dead.unread,
            agreed: 0,
        }
    }
}

/// What the operator allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rules {
    /// How long a socket must have been quiet.
    pub age: Duration,
    /// Take a descriptor whatever the evidence says, as long as it is the one.
    pub force: bool,
    /// How long an owner may be stopped.
    pub stop_limit: Duration,
}

/// What was done to one owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Visit {
    /// Index of the owner.
    pub owner: usize,
    /// How many of its descriptors were closed.
    pub freed: usize,
    /// For how long it was stopped, the longest time if it was several times.
    pub stopped: Duration,
}

/// What [`reclaim`] did.
#[derive(Debug, Default)]
pub struct Reclaimed {
    /// What became of each descriptor, in the order they were given.
    pub fates: Vec<Fate>,
    /// The owners that were stopped.
    pub visits: Vec<Visit>,
}

/// Says of each descriptor what speaks against taking it, and stops nobody. The socket may still be alive.
pub fn judge(
    owners: &[Process],
    wanted: &[Wanted],
    rules: &Rules,
    proc: &ProcFs,
) -> Vec<Option<Reason>> {
    let mut doubts: Vec<Option<Reason>> = wanted.iter().map(|_| None).collect();
    if !proc.is_of_our_pid_namespace() {
        doubts.fill_with(|| Some(Reason::ForeignProc));
        return doubts;
    }
    for (owner, members) in by_owner(wanted) {
        match prepare(proc, owners, owner, &members, wanted, rules) {
            Ok(prepared) => {
                for (at, reason) in prepared.doubts {
                    doubts[at] = Some(reason);
                }
            }
            Err(Refusal::Gone) => {}
            Err(Refusal::Because(reason)) => {
                for at in members {
                    doubts[at] = Some(reason.same());
                }
            }
        }
    }
    doubts
}

/// Of each descriptor of a socket that is about to be closed, what becomes of it if a system call is on it. The close will end
/// that call, so it cannot be asked about afterwards, and its thread is then on its way to deal with it.
pub fn in_calls(
    owners: &[Process],
    wanted: &[Wanted],
    rules: &Rules,
    proc: &ProcFs,
) -> Vec<Option<Fate>> {
    let mut fates: Vec<Option<Fate>> = wanted.iter().map(|_| None).collect();
    if rules.force || !proc.is_of_our_pid_namespace() {
        return fates;
    }
    for (owner, members) in by_owner(wanted) {
        let look = || {
            let inside = Inside::open(proc, &owners[owner])?;
            Ok(uses_of(&inside, &inside.calls()?))
        };
        let facts = match steadily(proc, &owners[owner], look) {
            Ok(uses) => Facts {
                uses,
                ..Facts::default()
            },
            Err(Refusal::Gone) => continue,
            Err(refusal) => {
                for (at, fate) in Round::all(&members, &refusal).fates {
                    fates[at] = Some(fate);
                }
                continue;
            }
        };
        for at in members {
            let Wanted { fd, inode, .. } = wanted[at];
            let doubt = doubt(&facts, fd.0, inode, None, Duration::ZERO);
            fates[at] = doubt.map(|doubt| Fate::Skipped(Reason::Doubt(doubt)));
        }
    }
    fates
}

/// Lets the owners react to the end of their connections: a program that does closes the descriptor within milliseconds, and
/// what it has not closed after this time it has forgotten. Not longer than until Ctrl-C.
pub fn let_owners_react(rules: &Rules, control: &dyn Control) {
    let until = control.now() + SECOND_LOOK.min(rules.age);
    while !control.interrupted() {
        match until.checked_duration_since(control.now()) {
            None | Some(Duration::ZERO) => return,
            Some(left) => control.sleep(left.min(Duration::from_millis(50))),
        }
    }
}

/// Closes the descriptors `wanted` in their `owners`, one owner after the other, as far as the evidence
/// allows. `interrupted` says whether the operator wants to stop.
pub fn reclaim(
    owners: &[Process],
    wanted: &[Wanted],
    rules: &Rules,
    proc: &ProcFs,
    interrupted: &(dyn Fn() -> bool + Sync),
) -> Reclaimed {
    let mut fates: Vec<Fate> = wanted
        .iter()
        .map(|_| Fate::Skipped(Reason::Interrupted))
        .collect();
    let mut visits = Vec::new();
    if !proc.is_of_our_pid_namespace() {
        fates.fill_with(|| Fate::Skipped(Reason::ForeignProc));
        return Reclaimed { fates, visits };
    }
    for (owner, members) in by_owner(wanted) {
        if interrupted() {
            break;
        }
        let mut visit = Visit {
            owner,
            freed: 0,
            stopped: Duration::ZERO,
        };
        for some in members.chunks(MOST_AT_ONCE) {
            if interrupted() {
                break;
            }
            let mut left = some.to_vec();
            for stop in 1..=MOST_STOPS {
                let round = match prepare(proc, owners, owner, &left, wanted, rules) {
                    Err(refusal) => Round::all(&left, &refusal),
                    Ok(prepared) => {
                        let choosy = stop <= CHOOSY_STOPS && !prepared.transfers;
                        visit_once(&prepared, wanted, rules, proc, interrupted, choosy)
                    }
                };
                visit.stopped = visit.stopped.max(round.stopped);
                let freed = |(_, fate): &&(usize, Fate)| matches!(fate, Fate::Freed);
                visit.freed += round.fates.iter().filter(freed).count();
                for (at, fate) in round.fates {
                    fates[at] = fate;
                }
                left = round.left;
                if left.is_empty() || interrupted() {
                    break;
                }
                match stop < MOST_STOPS {
                    true => thread::sleep(BETWEEN_STOPS),
                    false => left
                        .iter()
                        .for_each(|&at| fates[at] = Fate::Failed(Reason::Unsteady)),
                }
            }
        }
        if !visit.stopped.is_zero() {
            visits.push(visit);
        }
    }
    Reclaimed { fates, visits }
}

fn by_owner(wanted: &[Wanted]) -> BTreeMap<usize, Vec<usize>> {
    let mut by_owner: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for (at, wanted) in wanted.iter().enumerate() {
        by_owner.entry(wanted.owner).or_default().push(at);
    }
    by_owner
}

/// Why nothing is done to an owner.
enum Refusal {
    Gone,
    Because(Reason),
}

impl From<Errno> for Refusal {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::ESRCH | Errno::ENOENT => Refusal::Gone,
            Errno::EPERM | Errno::EACCES => Refusal::Because(Reason::Denied(errno.into())),
            errno => Refusal::Because(Reason::Os("looking into the process", errno.into())),
        }
    }
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO)).into()
    }
}

/// What one stop brought.
#[derive(Default)]
struct Round {
    fates: Vec<(usize, Fate)>,
    /// To be tried again.
    left: Vec<usize>,
    stopped: Duration,
}

impl Round {
    fn all(members: &[usize], refusal: &Refusal) -> Self {
        let fate = || match refusal {
            Refusal::Gone => Fate::Gone,
            Refusal::Because(reason) if reason.is_refusal() => Fate::Skipped(reason.same()),
            Refusal::Because(reason) => Fate::Failed(reason.same()),
        };
        Round {
            fates: members.iter().map(|at| (*at, fate())).collect(),
            ..Round::default()
        }
    }
}

/// An owner as it was seen before it is stopped.
struct Prepared<'p> {
    inside: Inside<'p>,
    /// The processes that there were.
    processes: HashSet<i32>,
    /// And the threads of the owner.
    threads: HashSet<i32>,
    numbers: HashSet<i32>,
    specials: Vec<Special>,
    /// Each stop would end a transfer of it short.
    transfers: bool,
    /// What may be taken as far as can be seen without stopping it.
    candidates: Vec<usize>,
    /// What may not.
    doubts: Vec<(usize, Reason)>,
}

/// Looks into an owner. What another thread's exec takes away for a moment (the table and the memory of the first
/// thread) is looked for again.
fn steadily<T>(
    proc: &ProcFs,
    process: &Process,
    look: impl Fn() -> Result<T, Refusal>,
) -> Result<T, Refusal> {
    let is_there = || facts::is_there(proc, process.pid, process.start_time);
    for _ in 1..LOOKS {
        match look() {
            Err(Refusal::Gone) if !is_there() => return Err(Refusal::Gone),
            Err(Refusal::Gone | Refusal::Because(Reason::LeaderEnded | Reason::Executing(_))) => {
                thread::sleep(BETWEEN_STOPS);
            }
            other => return other,
        }
    }
    match look() {
        Err(Refusal::Gone) if is_there() => Err(Refusal::Because(Reason::Unsteady)),
        other => other,
    }
}

fn prepare<'p>(
    proc: &'p ProcFs,
    owners: &[Process],
    owner: usize,
    members: &[usize],
    wanted: &[Wanted],
    rules: &Rules,
) -> Result<Prepared<'p>, Refusal> {
    let process = &owners[owner];
    steadily(proc, process, || {
        prepare_once(proc, process, members, wanted, rules)
    })
}

fn prepare_once<'p>(
    proc: &'p ProcFs,
    process: &Process,
    members: &[usize],
    wanted: &[Wanted],
    rules: &Rules,
) -> Result<Prepared<'p>, Refusal> {
    if u32::try_from(process.pid) == Ok(std::process::id()) {
        return Err(Refusal::Because(Reason::Ourselves));
    }
    let inside = Inside::open(proc, process)?;
    if inside.leader_has_ended()? {
        return Err(Refusal::Because(Reason::LeaderEnded));
    }
    if inside.is_narrow()? {
        return Err(Refusal::Because(Reason::Foreign));
    }
    if let Some(tracer) = inside.tracer() {
        let comm = facts::comm(proc, tracer);
        return Err(Refusal::Because(Reason::Traced(tracer, comm)));
    }
    let processes = facts::pids(proc)?;
    not_shared(&inside, &processes, &|| false, rules)?;
    let numbers = inside.numbers()?;
    let specials = inside.specials(&numbers)?;
    let threads = inside.threads()?;
    let mut facts = Facts::default();
    if !rules.force {
        let calls = inside.calls()?;
        if let Some(tid) = executing(&calls) {
            return Err(Refusal::Because(Reason::Executing(tid)));
        }
        facts.uses = uses_of(&inside, &calls);
        facts.transfer = inside.transfer(&calls);
        (facts.epolls, facts.rings) = inside.tables(&specials)?;
        facts.ring_worker = inside.ring_worker();
        facts.finalizer = inside.finalizer();
    } else if let Ok(calls) = inside.calls() {
        facts.transfer = inside.transfer(&calls);
    }
    let (mut candidates, mut doubts) = (Vec::new(), Vec::new());
    for &at in members {
        match why_not(&facts, &wanted[at], wanted[at].unread, rules) {
            Some(doubt) => doubts.push((at, Reason::Doubt(doubt))),
            None => candidates.push(at),
        }
    }
    Ok(Prepared {
        inside,
        processes,
        threads,
        numbers: numbers.into_iter().collect(),
        specials,
        transfers: facts.transfer.is_some(),
        candidates,
        doubts,
    })
}

/// What the `calls` are on in which the owner's threads wait, as far as that is seen without stopping it.
fn uses_of(inside: &Inside<'_>, calls: &[(i32, Call)]) -> Vec<Uses> {
    let memory = |address, len| remote::read_memory(inside.pid, address, len);
    let room = inside.room();
    let uses = calls
        .iter()
        .map(|(tid, call)| uses(*tid, call, &memory, room));
    uses.collect()
}

/// A thread that sleeps while it executes a program. It may have the lock that PTRACE_SEIZE waits for, which Ctrl-C does not end
/// (kernel/ptrace.c, ptrace_attach: cred_guard_mutex).
fn executing(calls: &[(i32, Call)]) -> Option<i32> {
    let executes = |call: &Call| matches!(call.number, libc::SYS_execve | libc::SYS_execveat);
    let found = calls.iter().find(|(_, call)| executes(call));
    found.map(|(tid, _)| *tid)
}

/// Refuses if one of `processes` has the owner's table of descriptors without being the same process (clone
/// with CLONE_FILES and without CLONE_THREAD), or may have: it would not be stopped. `over` says whether there is no more time: an
/// answer can wait for an exec of the other (kernel/kcmp.c, exec_update_lock).
fn not_shared<'a>(
    inside: &Inside<'_>,
    processes: impl IntoIterator<Item = &'a i32>,
    over: &dyn Fn() -> bool,
    rules: &Rules,
) -> Result<(), Refusal> {
    for &other in processes.into_iter().filter(|pid| **pid != inside.pid) {
        if over() {
            return Err(Refusal::Because(Reason::TimeOver(rules.stop_limit)));
        }
        let reason = match sys::share_descriptors(inside.pid, other) {
            Ok(false) => continue,
            Ok(true) => Reason::SharedTable(other),
            Err(error) => match error.raw_os_error() {
                // That one is gone, or the owner, which will be seen.
                Some(libc::ESRCH) => continue,
                Some(libc::EPERM) if !inside.could_share(other) => continue,
                _ => {
                    let right = Capability::CAP_SYS_PTRACE;
                    let may = caps::has_cap(None, CapSet::Effective, right).unwrap_or(false);
                    Reason::not_compared(other, error, may)
                }
            },
        };
        return Err(Refusal::Because(reason));
    }
    Ok(())
}

/// What speaks against taking a descriptor with so many `unread` bytes.
fn why_not(facts: &Facts, wanted: &Wanted, unread: u32, rules: &Rules) -> Option<Doubt> {
    match rules.force {
        true => None,
        false if unread > wanted.agreed => Some(Doubt::Unread(unread)),
        false => doubt(facts, wanted.fd.0, wanted.inode, wanted.age, rules.age),
    }
}
