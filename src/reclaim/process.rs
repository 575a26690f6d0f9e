//! Closing descriptors in one owner: stop it, check the evidence again, close them, release it.

use std::collections::VecDeque;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::error::OwnerError;
use super::inspect::{InspectedProcess, Inspection};
use super::ptrace::{RemoteThread, SeizedThreads, StoppedProcess};
use super::replace::{DevNull, MayGoOn};
use super::{RETRY_INTERVAL, ReclaimRules, ReclaimTarget, decide, pending};
use crate::model::{ReclaimOutcome, ReclaimReason};
use crate::proc::{ProcFs, Process, RemoteFd};
use crate::sys::errno_of;

/// The maximum number of stops of one owner. Another stop is needed only if a signal or an execve(2) of the owner interfered,
/// or if no thread with a low [`FalseReturnRisk`](super::syscalls::FalseReturnRisk) was found.
const MAX_STOPS: u32 = 5;
/// In these first stops cwkill uses only a thread with a low risk. Later stops use any thread: a busy owner may never have a
/// thread with a low risk.
const LOW_RISK_STOPS: u32 = 3;

/// Time between two searches for ended threads of the owner, while another thread of cwkill stops it.
const REAP_INTERVAL: Duration = Duration::from_millis(5);

/// Closes the pending `targets` in their owner, `process`, as far as the evidence allows. Returns the longest time for
/// which it was stopped. Targets stay pending if `interrupted` says that the operator wants to stop.
pub fn close_in(
    process: &Process,
    targets: &mut [&mut ReclaimTarget],
    rules: &ReclaimRules,
    proc: &ProcFs,
    interrupted: &(dyn Fn() -> bool + Sync),
) -> Duration {
    let mut longest = Duration::ZERO;
    for stop in 1..=MAX_STOPS {
        match Inspection::of(proc, process, rules) {
            Err(error) => decide(targets, &error),
            Ok(inspection) => {
                for target in pending(targets) {
                    let in_use = inspection.in_use(target, rules);
                    target.owner.reclaim =
                        in_use.map(|in_use| ReclaimOutcome::Skipped(ReclaimReason::InUse(in_use)));
                }
                // Every stop ends a transfer early. Only a forced run stops an owner with a transfer. cwkill then uses any
                // thread, so that it does not stop the owner again to find a better one.
                let low_risk_only = stop <= LOW_RISK_STOPS && !inspection.has_transfer();
                let stop_time = stop_once(&inspection, targets, rules, interrupted, low_risk_only);
                longest = longest.max(stop_time);
            }
        }
        if pending(targets).next().is_none() || interrupted() {
            break;
        }
        match stop < MAX_STOPS {
            true => thread::sleep(RETRY_INTERVAL),
            false => decide(targets, &ReclaimReason::OwnerBusy.into()),
        }
    }
    longest
}

/// Stops the owner once, in a thread of cwkill that ends afterwards. The end of that thread detaches it from all threads of the
/// owner. Returns the time for which the owner was stopped. Targets that another stop may close stay pending.
fn stop_once(
    inspection: &Inspection<'_>,
    targets: &mut [&mut ReclaimTarget],
    rules: &ReclaimRules,
    interrupted: &(dyn Fn() -> bool + Sync),
    low_risk_only: bool,
) -> Duration {
    if pending(targets).next().is_none() {
        return Duration::ZERO;
    }
    let seized = SeizedThreads::default();
    let done = in_tracer_thread(&seized, || {
        stop_and_close(
            inspection,
            targets,
            rules,
            interrupted,
            low_risk_only,
            &seized,
        )
    });
    let (stop_time, result) = done.unwrap_or_else(|reason| (Duration::ZERO, Err(reason.into())));
    if let Err(error) = result {
        decide(targets, &error);
    }
    stop_time
}

/// Does `work` in a thread of cwkill that ends afterwards, which detaches it from all threads that it traces. Meanwhile the
/// `seized` threads that have ended are reaped.
///
/// # Errors
/// The thread cannot be started, or has panicked.
pub fn in_tracer_thread<T: Send>(
    seized: &SeizedThreads,
    work: impl FnOnce() -> T + Send,
) -> Result<T, ReclaimReason> {
    thread::scope(|scope| {
        let (ended, end) = mpsc::channel::<()>();
        let work = move || {
            // Dropped at the end, also by a panic.
            let _ended = ended;
            work()
        };
        match thread::Builder::new().spawn_scoped(scope, work) {
            Ok(worker) => {
                while end.recv_timeout(REAP_INTERVAL) == Err(mpsc::RecvTimeoutError::Timeout) {
                    seized.reap_ended();
                }
                worker.join().map_err(|_| ReclaimReason::Bug)
            }
            // For example at the limit of tasks.
            Err(error) => Err(ReclaimReason::SystemCall(
                "starting a thread",
                errno_of(&error),
            )),
        }
    })
}

/// Stops the owner, checks the evidence again, closes the pending targets, and releases the owner. Returns the time for
/// which it was stopped, and the error that holds for all targets that are still pending.
fn stop_and_close(
    inspection: &Inspection<'_>,
    targets: &mut [&mut ReclaimTarget],
    rules: &ReclaimRules,
    interrupted: &(dyn Fn() -> bool + Sync),
    low_risk_only: bool,
    seized: &SeizedThreads,
) -> (Duration, Result<(), OwnerError>) {
    let process = &inspection.process;
    // Otherwise the kernel may extend sleeps of microseconds.
    let _ = nix::sys::prctl::set_timerslack(1);
    let stopped = match StoppedProcess::stop(process.proc(), process.pid, rules.stop_limit, seized)
    {
        Ok(stopped) => stopped,
        // Its threads are gone, but the process still runs: one of them has called execve(2).
        Err((OwnerError::Exited, stop_time)) if process.is_running() => {
            return (stop_time, Err(OwnerError::TryAgain));
        }
        Err((error, stop_time)) => return (stop_time, Err(error)),
    };
    let mut remote = match RemoteThread::prepare(stopped, process.proc(), low_risk_only) {
        Ok(remote) => remote,
        Err((error, stop_time)) => return (stop_time, Err(error)),
    };
    let result = skip_in_use(inspection, &remote, targets, rules)
        .and_then(|()| close_all(&mut remote, inspection, targets, rules, interrupted));
    let stop_time = remote.stopped().longest_standstill();
    let since = Instant::now();
    // The owner runs again.
    drop(remote);
    (stop_time + since.elapsed(), result)
}

/// Checks the evidence again while the owner is stopped. The targets that may be closed stay pending.
fn skip_in_use(
    inspection: &Inspection<'_>,
    remote: &RemoteThread,
    targets: &mut [&mut ReclaimTarget],
    rules: &ReclaimRules,
) -> Result<(), OwnerError> {
    let stopped = remote.stopped();
    let evidence = inspection.repeat(stopped, rules)?;
    for target in pending(targets) {
        if stopped.elapsed() >= rules.stop_limit {
            let reason = ReclaimReason::StopLimitReached(rules.stop_limit);
            target.owner.reclaim = Some(reason.into_outcome());
            continue;
        }
        target.owner.reclaim = match inspection.process.dead_socket(target) {
            Ok(None) => Some(ReclaimOutcome::Gone),
            Err(errno) => Some(match OwnerError::from(errno) {
                OwnerError::Reason(reason) => reason.into_outcome(),
                OwnerError::Exited | OwnerError::TryAgain => ReclaimOutcome::Gone,
            }),
            Ok(Some(dead)) => {
                target.kernel_tls = dead.kernel_tls;
                target
                    .in_use(&evidence, dead.unread, rules)
                    .map(|in_use| ReclaimOutcome::Skipped(ReclaimReason::InUse(in_use)))
            }
        };
    }
    Ok(())
}

/// Closes the pending targets, and puts /dev/null in the place of those that are standard descriptors, or of all if the rules say so.
/// These come last: at its limit of descriptors the owner can open /dev/null only after others are closed.
///
/// # Errors
/// The error applies to all targets that are still pending.
fn close_all(
    remote: &mut RemoteThread,
    inspection: &Inspection<'_>,
    targets: &mut [&mut ReclaimTarget],
    rules: &ReclaimRules,
    interrupted: &(dyn Fn() -> bool + Sync),
) -> Result<(), OwnerError> {
    let may_go_on = |remote: &RemoteThread| -> Result<(), OwnerError> {
        if interrupted() {
            return Err(ReclaimReason::Interrupted.into());
        }
        if remote.stopped().elapsed() >= rules.stop_limit {
            return Err(ReclaimReason::StopLimitReached(rules.stop_limit).into());
        }
        Ok(())
    };
    let process = &inspection.process;
    let (replaced, others): (Vec<_>, Vec<_>) =
        pending(targets).partition(|target| rules.replaces(target.owner.fd));
    close_numbers(remote, process, others, rules, &may_go_on)?;
    if replaced.is_empty() {
        return Ok(());
    }
    may_go_on(remote)?;
    let null = DevNull::find_or_open(remote, inspection)?;
    let result = null.replace_all(remote, process, replaced, &may_go_on);
    null.release(remote);
    result
}

/// Closes `targets`. One call closes a run of adjacent numbers.
fn close_numbers(
    remote: &mut RemoteThread,
    process: &InspectedProcess<'_>,
    targets: Vec<&mut ReclaimTarget>,
    rules: &ReclaimRules,
    may_go_on: MayGoOn<'_>,
) -> Result<(), OwnerError> {
    let mut has_close_range = true;
    let mut runs = adjacent_runs(targets);
    while let Some(mut run) = runs.pop_front() {
        may_go_on(remote)?;
        let number = |target: &ReclaimTarget| u64::try_from(target.owner.fd.0).unwrap_or(u64::MAX);
        let range = [number(run[0]), number(run[run.len() - 1]), 0];
        if run.len() > 1 && !(has_close_range && remote.permits(libc::SYS_close_range, &range)) {
            runs.push_front(run.split_off(1));
        }
        let (call, arguments) = match run.len() {
            1 => (libc::SYS_close, &range[..1]),
            _ => (libc::SYS_close_range, &range[..]),
        };
        if !remote.permits(call, arguments) {
            return Err(ReclaimReason::SeccompForbidsClose.into());
        }
        let is_done = || run.iter().all(|target| process.is_free(target.owner.fd));
        match remote.call(call, arguments, &is_done) {
            // The kernel is older than 5.9, or a seccomp filter answers in its place.
            Ok(result) if result < 0 && run.len() > 1 => {
                has_close_range = false;
                runs.push_front(run);
            }
            Ok(result) => {
                for target in run {
                    target.owner.reclaim = Some(close_outcome(process, target.owner.fd, result));
                }
            }
            Err(OwnerError::Reason(reason)) => {
                for target in run {
                    // A call that hangs may have closed some or all of them.
                    let is_freed =
                        reason == ReclaimReason::CloseHangs && process.is_free(target.owner.fd);
                    target.owner.reclaim = Some(match is_freed {
                        true => ReclaimOutcome::Freed,
                        false => reason.clone().into_outcome(),
                    });
                }
                let stop_time = remote.stopped().elapsed();
                return Err(reason_for_the_rest(reason, stop_time, rules.stop_limit).into());
            }
            Err(error @ (OwnerError::Exited | OwnerError::TryAgain)) => return Err(error),
        }
    }
    Ok(())
}

/// The reason for the descriptors that are left after a call failed with `failed`: the thread can make no more calls.
fn reason_for_the_rest(
    failed: ReclaimReason,
    stop_time: Duration,
    stop_limit: Duration,
) -> ReclaimReason {
    match stop_time >= stop_limit {
        true => ReclaimReason::StopLimitReached(stop_limit),
        false => failed,
    }
}

/// The outcome for descriptor `fd` after a call that returned `result`.
fn close_outcome(process: &InspectedProcess<'_>, fd: RemoteFd, result: i64) -> ReclaimOutcome {
    match i32::try_from(-result) {
        // It was closed before this call, so another process shares the descriptor table after all.
        Ok(libc::EBADF) => ReclaimOutcome::Gone,
        _ if process.is_free(fd) => ReclaimOutcome::Freed,
        Ok(errno) if errno > 0 => {
            ReclaimReason::SystemCall("close", Errno::from_raw(errno)).into_outcome()
        }
        _ => ReclaimReason::StillOpen.into_outcome(),
    }
}

/// Splits targets into runs of adjacent numbers.
fn adjacent_runs<'t, 'a>(
    mut targets: Vec<&'t mut ReclaimTarget<'a>>,
) -> VecDeque<Vec<&'t mut ReclaimTarget<'a>>> {
    targets.sort_by_key(|target| target.owner.fd);
    let mut runs: VecDeque<Vec<&mut ReclaimTarget<'_>>> = VecDeque::new();
    for target in targets {
        let run = runs.back_mut().filter(|run| {
            let last = run.last().map(|last| last.owner.fd.0);
            last.is_some_and(|last| last + 1 == target.owner.fd.0)
        });
        match run {
            Some(run) => run.push(target),
            None => runs.push_back(vec![target]),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reclaim::tests::{owner, target};

    #[test]
    fn descriptors_after_a_failed_call_get_the_true_reason() {
        let limit = Duration::from_millis(100);
        let failed = ReclaimReason::SystemCall("PTRACE_SETREGSET", Errno::EIO);
        let rest =
            |millis| reason_for_the_rest(failed.clone(), Duration::from_millis(millis), limit);
        assert_eq!(rest(99), failed, "the limit is not reached");
        assert_eq!(rest(100), ReclaimReason::StopLimitReached(limit));
    }

    #[test]
    fn adjacent_numbers_make_a_run() {
        let mut owners = [5, 3, 9, 4, 8, 20].map(|fd| owner(7, fd));
        let mut targets: Vec<ReclaimTarget<'_>> = owners.iter_mut().map(target).collect();
        let runs = adjacent_runs(targets.iter_mut().collect());
        let runs: Vec<Vec<i32>> = runs
            .into_iter()
            .map(|run| run.into_iter().map(|target| target.owner.fd.0).collect())
            .collect();
        assert_eq!(runs, [vec![3, 4, 5], vec![8, 9], vec![20]]);
        assert!(adjacent_runs(Vec::new()).is_empty());
    }
}
