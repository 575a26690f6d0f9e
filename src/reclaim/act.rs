//! The act on one owner: stop it, ask for the evidence again, close, let it go.

use std::collections::VecDeque;
use std::io;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use super::evidence::{Facts, Uses, uses};
use super::facts::{self, Identity};
use super::fate::{Fate, Reason};
use super::remote::{self, CallError, NoWorker, Worker};
use super::stop::{self, Seized, StopError, Stopped};
use super::{Prepared, Refusal, Round, Rules, Wanted, not_shared, why_not};
use crate::proc::ProcFs;

/// Time between two looks for threads of the owner that have ended while it is worked on.
const TAKE_ENDS: Duration = Duration::from_millis(5);

/// Stops the owner once, on a thread of its own: with it ends whatever it traces.
pub fn visit_once(
    prepared: &Prepared<'_>,
    wanted: &[Wanted],
    rules: &Rules,
    proc: &ProcFs,
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
    proc: &ProcFs,
    interrupted: &(dyn Fn() -> bool + Sync),
    choosy: bool,
    seized: &Seized,
) -> Round {
    let candidates = &prepared.candidates;
    // A sleep of microseconds is to be one.
    let _ = nix::sys::prctl::set_timerslack(1);
    let refused = |refusal: &Refusal, stopped| Round {
        stopped,
        ..Round::all(candidates, refusal)
    };
    let because = |error: StopError| stop_refusal(error, rules.stop_limit);
    // Its threads are gone and it is not: one of them has executed a program.
    let again = |error: &StopError| matches!(error, StopError::Gone) && prepared.inside.is_there();
    let tried_again = |stopped| Round {
        left: candidates.clone(),
        stopped,
        ..Round::default()
    };
    let stopped = match Stopped::stop(proc, prepared.inside.pid, rules.stop_limit, seized) {
        Ok(stopped) => stopped,
        Err((error, stopped)) if again(&error) => return tried_again(stopped),
        Err((error, stopped)) => return refused(&because(error), stopped),
    };
    let since = stopped.since();
    let mut worker = match Worker::borrow(stopped, &prepared.inside, choosy) {
        Ok(worker) => worker,
        Err(NoWorker::NoneServesWell) => return tried_again(since.elapsed()),
        Err(NoWorker::Stop(error)) => return refused(&because(error), since.elapsed()),
        Err(why) => {
            let reason = match why {
                NoWorker::Foreign => Reason::Foreign,
                NoWorker::ForeignCall(tid) => Reason::ForeignCall(tid),
                NoWorker::Forbidden => Reason::FilterForbids,
                NoWorker::FilterUnread(error) => Reason::FilterUnread(error),
                NoWorker::OtherTable => Reason::OtherTable,
                NoWorker::TableUnread(error) => Reason::TableUnread(error),
                NoWorker::NoCall | NoWorker::NoneServesWell | NoWorker::Stop(_) => Reason::NoCall,
            };
            return refused(&Refusal::Because(reason), since.elapsed());
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
    // Its table would seem to be empty.
    if inside.leader_has_ended()? {
        return Err(Refusal::Because(Reason::LeaderEnded));
    }
    // Only its own threads could make another process with its table, and they are stopped now.
    let processes = facts::pids(inside.proc())?;
    let over = || worker.stopped().elapsed() >= rules.stop_limit;
    not_shared(
        inside,
        processes.difference(&prepared.processes),
        &over,
        rules,
    )?;
    // Whether it has finalizers does not change.
    let mut facts = Facts::default();
    if !rules.force {
        // Of a big table only what is new is looked at, and what was an epoll set or an io_uring before.
        let mut new = inside.numbers()?;
        new.retain(|number| !prepared.numbers.contains(number));
        let mut specials = inside.specials(&new)?;
        specials.extend(&prepared.specials);
        (facts.epolls, facts.rings) = inside.tables(&specials)?;
        let threads = worker.stopped().threads().iter().map(|thread| thread.tid);
        let new = threads.filter(|tid| !prepared.threads.contains(tid));
        facts.ring_worker = inside.ring_worker_among(new);
        facts.uses = uses_of(worker.stopped(), inside.room());
    }
    let (mut allowed, mut fates) = (Vec::new(), Vec::new());
    for &at in &prepared.candidates {
        if over() {
            fates.push((at, Fate::Failed(Reason::TimeOver(rules.stop_limit))));
            continue;
        }
        let wanted = &wanted[at];
        let fate = match inside.identity(wanted.fd, wanted.inode, wanted.cookie) {
            Identity::Other => Fate::Gone,
            Identity::Unknown(errno) => Fate::Failed(Reason::Denied(errno.into())),
            Identity::Same { unread } => match why_not(&facts, wanted, unread, rules) {
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
fn uses_of(stopped: &Stopped, room: u32) -> Vec<Uses> {
    let uses = |(at, thread): (usize, &stop::Thread)| {
        let registers = stopped.registers(at)?;
        let is_instruction = |address| remote::is_instruction(thread.tid, address);
        let call = registers.call(&is_instruction)?;
        let memory = |address, len| remote::read_memory(thread.tid, address, len);
        Some(uses(thread.tid, &call, &memory, room))
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
    let mut left: VecDeque<Vec<usize>> = runs(wanted, allowed).into();
    while let Some(mut run) = left.pop_front() {
        let rest = |run: Vec<usize>, left: VecDeque<Vec<usize>>| -> Vec<usize> {
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
