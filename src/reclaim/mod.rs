//! The step after a socket is closed: closing its descriptors inside the processes that leak them.
//!
//! [`reclaim`] takes descriptors of dead sockets, asks for the [`evidence`] that nobody needs them, and for
//! each owner stops all threads (`stop`), asks again, has one of its threads close them (`remote`), and
//! lets it go. Whatever happens to us, the owner goes on; docs/decisions/reclaim.md follows that through.
//!
//! - [`evidence`]: whether a descriptor may be taken, from facts (pure); `facts`: those, from /proc
//! - `stop`: all threads of a process; `remote`: a system call made by one of them
//! - `fate`: what became of a descriptor, and why
//! - [`command`]: the job `cwkill reclaim`
//! - [`arch`]: registers (pure); `seccomp`: what a filter lets through (pure)

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
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use nix::errno::Errno;

use crate::finder::owners::{Proc, Process};
use crate::finder::sock_diag::Cookie;
use crate::sys::{self, TargetFd};

use evidence::{Doubt, Facts, Uses, doubt, uses};
use facts::{Identity, Inside, Special};
pub use fate::{Fate, Reason};
use remote::{CallError, NoWorker, Worker};
use stop::{Seized, StopError, Stopped};

/// Stops of one owner at most: another is only needed when a signal has come between, or no thread
/// serves well.
const MOST_STOPS: u32 = 5;
/// How many of them look for a thread that serves well, and the time between them.
const CHOOSY_STOPS: u32 = 3;
const BETWEEN_STOPS: Duration = Duration::from_millis(2);
/// Time between two looks for threads of the owner that have ended while it is worked on.
const TAKE_ENDS: Duration = Duration::from_millis(5);
/// Descriptors of one stop: the last look at each takes some microseconds.
const MOST_AT_ONCE: usize = 1000;

/// A descriptor to close in its owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Index of the owner in the list that goes with it.
    pub owner: usize,
    /// The number there.
    pub fd: TargetFd,
    /// The inode of the socket.
    pub inode: u32,
    /// Its cookie.
    pub cookie: Cookie,
    /// How long it has been quiet, if that is known.
    pub age: Option<Duration>,
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
    proc: &Proc,
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

/// Closes the descriptors `wanted` in their `owners`, one owner after the other, as far as the evidence
/// allows. `interrupted` says whether the operator wants to stop.
pub fn reclaim(
    owners: &[Process],
    wanted: &[Wanted],
    rules: &Rules,
    proc: &Proc,
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
                        let choosy = stop <= CHOOSY_STOPS;
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
                        .for_each(|&at| fates[at] = Fate::Failed(Reason::Signals)),
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
    numbers: HashSet<i32>,
    specials: Vec<Special>,
    /// What may be taken as far as can be seen without stopping it.
    candidates: Vec<usize>,
    /// What may not.
    doubts: Vec<(usize, Reason)>,
}

fn prepare<'p>(
    proc: &'p Proc,
    owners: &[Process],
    owner: usize,
    members: &[usize],
    wanted: &[Wanted],
    rules: &Rules,
) -> Result<Prepared<'p>, Refusal> {
    let process = &owners[owner];
    let inside = Inside::open(proc, process)?;
    if inside.leader_has_ended()? {
        return Err(Refusal::Because(Reason::LeaderEnded));
    }
    if let Some(tracer) = inside.tracer() {
        let comm = facts::comm(proc, tracer);
        return Err(Refusal::Because(Reason::Traced(tracer, comm)));
    }
    let processes = facts::pids(proc)?;
    not_shared(&inside, &processes)?;
    let numbers = inside.numbers()?;
    let specials = inside.specials(&numbers)?;
    let mut facts = Facts::default();
    if !rules.force {
        let memory = |address, len| remote::read_memory(process.pid, address, len);
        let calls = inside.calls()?;
        facts.uses = calls
            .iter()
            .map(|(tid, call)| uses(*tid, call, &memory))
            .collect();
        (facts.epolls, facts.rings) = inside.tables(&specials)?;
        facts.ring_worker = inside.ring_worker();
        facts.finalizer = inside.finalizer();
    }
    let (mut candidates, mut doubts) = (Vec::new(), Vec::new());
    for &at in members {
        match why_not(&facts, &wanted[at], rules) {
            Some(doubt) => doubts.push((at, Reason::Doubt(doubt))),
            None => candidates.push(at),
        }
    }
    Ok(Prepared {
        inside,
        processes,
        numbers: numbers.into_iter().collect(),
        specials,
        candidates,
        doubts,
    })
}

/// Refuses if one of `processes` has the owner's table of descriptors without being the same process (clone
/// with CLONE_FILES and without CLONE_THREAD), or may have: it would not be stopped.
fn not_shared<'a>(
    inside: &Inside<'_>,
    processes: impl IntoIterator<Item = &'a i32>,
) -> Result<(), Refusal> {
    for &other in processes.into_iter().filter(|pid| **pid != inside.pid) {
        let reason = match sys::share_descriptors(inside.pid, other) {
            Ok(false) => continue,
            Ok(true) => Reason::SharedTable(other),
            Err(error) => match error.raw_os_error() {
                // That one is gone, or the owner, which will be seen.
                Some(libc::ESRCH) => continue,
                Some(libc::EPERM) if !inside.could_share(other) => continue,
                _ => Reason::SharedUnknown(other, error),
            },
        };
        return Err(Refusal::Because(reason));
    }
    Ok(())
}

fn why_not(facts: &Facts, wanted: &Wanted, rules: &Rules) -> Option<Doubt> {
    match rules.force {
        true => None,
        false => doubt(facts, wanted.fd.0, wanted.inode, wanted.age, rules.age),
    }
}

/// Stops the owner once, on a thread of its own: with it ends whatever it traces.
fn visit_once(
    prepared: &Prepared<'_>,
    wanted: &[Wanted],
    rules: &Rules,
    proc: &Proc,
    interrupted: &(dyn Fn() -> bool + Sync),
    choosy: bool,
) -> Round {
    let mut round = Round::default();
    if !prepared.candidates.is_empty() {
        let seized = Seized::default();
        round = thread::scope(|scope| {
            let (ended, end) = mpsc::channel::<()>();
            let seized = &seized;
            let act = move || {
                // Dropped at the end, also if that is a panic.
                let _ended = ended;
                act(prepared, wanted, rules, proc, interrupted, choosy, seized)
            };
            match thread::Builder::new().spawn_scoped(scope, act) {
                Ok(act) => {
                    while end.recv_timeout(TAKE_ENDS) == Err(mpsc::RecvTimeoutError::Timeout) {
                        seized.take_ended();
                    }
                    act.join().unwrap_or_else(|_| {
                        Round::all(&prepared.candidates, &Refusal::Because(Reason::Bug))
                    })
                }
                // At a limit of tasks, for one.
                Err(error) => {
                    let reason = Reason::Os("starting a thread", error);
                    Round::all(&prepared.candidates, &Refusal::Because(reason))
                }
            }
        });
    }
    let doubts = prepared.doubts.iter();
    round
        .fates
        .extend(doubts.map(|(at, reason)| (*at, Fate::Skipped(reason.same()))));
    round
}

/// Stops the owner, asks for the evidence again, closes, lets it go.
fn act(
    prepared: &Prepared<'_>,
    wanted: &[Wanted],
    rules: &Rules,
    proc: &Proc,
    interrupted: &(dyn Fn() -> bool + Sync),
    choosy: bool,
    seized: &Seized,
) -> Round {
    let candidates = &prepared.candidates;
    // A sleep of microseconds is to be one.
    let _ = nix::sys::prctl::set_timerslack(1);
    let began = std::time::Instant::now();
    let refused = |refusal: &Refusal| Round {
        stopped: began.elapsed(),
        ..Round::all(candidates, refusal)
    };
    let because = |error: StopError| stop_refusal(error, rules.stop_limit);
    let stopped = match Stopped::stop(proc, prepared.inside.pid, rules.stop_limit, seized) {
        Ok(stopped) => stopped,
        // Nobody was stopped.
        Err(error @ (StopError::Gone | StopError::Denied(_))) => {
            return Round::all(candidates, &because(error));
        }
        Err(error) => return refused(&because(error)),
    };
    let mut worker = match Worker::borrow(stopped, &prepared.inside, choosy) {
        Ok(worker) => worker,
        Err(NoWorker::NoneServesWell) => {
            return Round {
                left: candidates.clone(),
                stopped: began.elapsed(),
                ..Round::default()
            };
        }
        Err(NoWorker::Stop(error)) => return refused(&because(error)),
        Err(why) => {
            return refused(&Refusal::Because(match why {
                NoWorker::Foreign => Reason::Foreign,
                NoWorker::Forbidden => Reason::FilterForbids,
                NoWorker::FilterUnread(error) => Reason::FilterUnread(error),
                NoWorker::OtherTable => Reason::OtherTable,
                NoWorker::TableUnread(error) => Reason::TableUnread(error),
                NoWorker::NoCall | NoWorker::NoneServesWell | NoWorker::Stop(_) => Reason::NoCall,
            }));
        }
    };
    let mut round = Round::default();
    match still_allowed(prepared, &worker, wanted, rules) {
        Err(refusal) => round = Round::all(candidates, &refusal),
        Ok((allowed, fates)) => {
            round.fates = fates;
            if !allowed.is_empty() {
                close_all(
                    prepared,
                    &mut worker,
                    wanted,
                    &allowed,
                    &mut round,
                    interrupted,
                    rules,
                );
            }
        }
    }
    let since = worker.stopped().since();
    drop(worker);
    round.stopped = since.elapsed();
    round
}

fn stop_refusal(error: StopError, limit: Duration) -> Refusal {
    match error {
        StopError::Gone => Refusal::Gone,
        StopError::Denied(error) => Refusal::Because(Reason::Denied(error)),
        StopError::Limit(tid) => Refusal::Because(Reason::Limit(tid, limit)),
        StopError::Os(step, error) => Refusal::Because(Reason::Os(step, error)),
    }
}

/// The evidence once more, now that nothing moves: what may be closed, and what became of the rest.
#[expect(
    clippy::type_complexity,
    reason = "two lists, named by their one caller"
)]
fn still_allowed(
    prepared: &Prepared<'_>,
    worker: &Worker,
    wanted: &[Wanted],
    rules: &Rules,
) -> Result<(Vec<usize>, Vec<(usize, Fate)>), Refusal> {
    let Prepared { inside, .. } = prepared;
    // Only its own threads could make another process with its table, and they are stopped now.
    let processes = facts::pids(inside.proc())?;
    not_shared(inside, processes.difference(&prepared.processes))?;
    // Whether it has finalizers does not change.
    let mut facts = Facts::default();
    if !rules.force {
        // Of a big table only what is new is looked at, and what was an epoll set or an io_uring before.
        let mut new = inside.numbers()?;
        new.retain(|number| !prepared.numbers.contains(number));
        let mut specials = inside.specials(&new)?;
        specials.extend(&prepared.specials);
        (facts.epolls, facts.rings) = inside.tables(&specials)?;
        facts.uses = uses_of(worker.stopped());
    }
    let (mut allowed, mut fates) = (Vec::new(), Vec::new());
    for &at in &prepared.candidates {
        if worker.stopped().elapsed() >= rules.stop_limit {
            fates.push((at, Fate::Failed(Reason::TimeOver(rules.stop_limit))));
            continue;
        }
        let wanted = &wanted[at];
        let fate = match inside.identity(wanted.fd, wanted.inode, wanted.cookie) {
            Identity::Other => Fate::Gone,
            Identity::Unknown(errno) => Fate::Failed(Reason::Denied(errno.into())),
            Identity::Same => match why_not(&facts, wanted, rules) {
                Some(doubt) => Fate::Skipped(Reason::Doubt(doubt)),
                None => {
                    allowed.push(at);
                    continue;
                }
            },
        };
        fates.push((at, fate));
    }
    Ok((allowed, fates))
}

/// What the calls of stopped threads are on, by their registers.
fn uses_of(stopped: &Stopped) -> Vec<Uses> {
    let uses = |(at, thread): (usize, &stop::Thread)| {
        let registers = stopped.registers(at)?;
        let is_instruction = |address| remote::is_instruction(thread.tid, address);
        let call = registers.call(&is_instruction)?;
        let memory = |address, len| remote::read_memory(thread.tid, address, len);
        Some(uses(thread.tid, &call, &memory))
    };
    stopped
        .threads()
        .iter()
        .enumerate()
        .filter_map(uses)
        .collect()
}

/// Closes what is allowed, numbers that follow each other with one call.
fn close_all(
    prepared: &Prepared<'_>,
    worker: &mut Worker,
    wanted: &[Wanted],
    allowed: &[usize],
    round: &mut Round,
    interrupted: &(dyn Fn() -> bool + Sync),
    rules: &Rules,
) {
    let mut ranges = true;
    let mut left: std::collections::VecDeque<Vec<usize>> = runs(wanted, allowed).into();
    while let Some(mut run) = left.pop_front() {
        let rest = |run: Vec<usize>, left: std::collections::VecDeque<Vec<usize>>| -> Vec<usize> {
            run.into_iter().chain(left.into_iter().flatten()).collect()
        };
        if interrupted() {
            let rest = rest(run, left);
            round.fates.extend(
                rest.iter()
                    .map(|at| (*at, Fate::Skipped(Reason::Interrupted))),
            );
            return;
        }
        if worker.stopped().elapsed() >= rules.stop_limit {
            let refusal = Refusal::Because(Reason::TimeOver(rules.stop_limit));
            round
                .fates
                .extend(Round::all(&rest(run, left), &refusal).fates);
            return;
        }
        let number = |at: usize| u64::try_from(wanted[at].fd.0).unwrap_or(u64::MAX);
        let (first, last) = (number(run[0]), number(run[run.len() - 1]));
        let range = [first, last, 0];
        if run.len() > 1 && !(ranges && worker.may_call(libc::SYS_close_range, &range)) {
            left.push_front(run.split_off(1));
        }
        let (call, arguments) = match run.len() {
            1 => (libc::SYS_close, &range[..1]),
            _ => (libc::SYS_close_range, &range[..]),
        };
        if !worker.may_call(call, arguments) {
            let refusal = Refusal::Because(Reason::FilterForbids);
            round
                .fates
                .extend(Round::all(&rest(run, left), &refusal).fates);
            return;
        }
        let done = || run.iter().all(|&at| prepared.inside.is_free(wanted[at].fd));
        match worker.call(call, arguments, &done) {
            // Older than 5.9, or a filter that answers instead of the kernel.
            Ok(result) if result < 0 && run.len() > 1 => {
                ranges = false;
                left.push_front(run);
            }
            Ok(result) => {
                let fate = |at: usize| match i32::try_from(-result) {
                    // Somebody shares the table after all.
                    Ok(libc::EBADF) => Fate::Gone,
                    _ if prepared.inside.is_free(wanted[at].fd) => Fate::Freed,
                    Ok(errno) if errno > 0 => {
                        Fate::Failed(Reason::Os("close", io::Error::from_raw_os_error(errno)))
                    }
                    _ => Fate::Failed(Reason::StillTaken),
                };
                round.fates.extend(run.into_iter().map(|at| (at, fate(at))));
            }
            Err(CallError::Signal) => {
                round.left = rest(run, left);
                return;
            }
            Err(error) => {
                let time_over = || Refusal::Because(Reason::TimeOver(rules.stop_limit));
                let given = matches!(error, CallError::Hangs);
                let (tried, others) = match error {
                    CallError::Gone => (Refusal::Gone, Refusal::Gone),
                    CallError::Stop(StopError::Gone) => (Refusal::Gone, Refusal::Gone),
                    CallError::Stop(error) => (stop_refusal(error, rules.stop_limit), time_over()),
                    CallError::Signal | CallError::Hangs => {
                        (Refusal::Because(Reason::Hangs), time_over())
                    }
                };
                // Of what was tried the kernel may have closed some, or all.
                for (at, fate) in Round::all(&run, &tried).fates {
                    let freed = given && prepared.inside.is_free(wanted[at].fd);
                    round
                        .fates
                        .push((at, if freed { Fate::Freed } else { fate }));
                }
                let left: Vec<usize> = left.into_iter().flatten().collect();
                round.fates.extend(Round::all(&left, &others).fates);
                return;
            }
        }
    }
}

/// Descriptors whose numbers follow each other.
fn runs(wanted: &[Wanted], allowed: &[usize]) -> Vec<Vec<usize>> {
    let mut sorted = allowed.to_vec();
    sorted.sort_by_key(|&at| wanted[at].fd);
    let follow = |a: &usize, b: &usize| wanted[*a].fd.0 + 1 == wanted[*b].fd.0;
    sorted.chunk_by(follow).map(<[usize]>::to_vec).collect()
}
