//! Stopping several processes at the same time, for work outside of them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::RETRY_INTERVAL;
use super::error::OwnerError;
use super::inspect::InspectedProcess;
use super::process::in_tracer_thread;
use super::ptrace::{SeizedThreads, StoppedProcess};
use crate::model::{InUse, ReclaimReason};
use crate::proc::{ProcFs, Process};

/// Attempts to stop a process that executes a program meanwhile.
const MAX_ATTEMPTS: u32 = 3;

/// Why the processes were not stopped together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotHeld {
    pub process: Arc<Process>,
    pub reason: ReclaimReason,
}

/// The processes while they are stopped.
pub struct Held {
    since: Instant,
    limit: Duration,
}

impl Held {
    /// Whether the processes have been stopped for as long as they may.
    pub fn is_over(&self) -> bool {
        self.since.elapsed() >= self.limit
    }
}

/// Stops all threads of all `processes`, does `work`, and releases them. A process that has exited is left out. Also returns the
/// time for which they were stopped.
///
/// The kernel releases them if cwkill dies. `work` must end soon after [`Held::is_over`].
///
/// # Errors
/// One of them was not stopped within `limit`; `work` was not done. All have been released.
pub fn while_stopped<T: Send>(
    processes: &[Arc<Process>],
    limit: Duration,
    proc: &ProcFs,
    work: impl FnOnce(&Held) -> T + Send,
) -> (Duration, Result<T, NotHeld>) {
    let seized = SeizedThreads::default();
    let outcome = in_tracer_thread(&seized, || {
        let _ = nix::sys::prctl::set_timerslack(1);
        let since = Instant::now();
        let mut stopped = Vec::new();
        for process in processes {
            let left = limit.saturating_sub(since.elapsed());
            match stop(process, left, proc, &seized) {
                Ok(one) => stopped.extend(one),
                Err(reason) => {
                    let process = Arc::clone(process);
                    return (since.elapsed(), Err(NotHeld { process, reason }));
                }
            }
        }
        let done = work(&Held { since, limit });
        // They run again before the time is taken.
        drop(stopped);
        (since.elapsed(), Ok(done))
    });
    outcome.unwrap_or_else(|reason| {
        let process = Arc::clone(&processes[0]);
        (Duration::ZERO, Err(NotHeld { process, reason }))
    })
}

/// Stops a process; `None` if it has exited.
fn stop(
    process: &Process,
    limit: Duration,
    proc: &ProcFs,
    seized: &SeizedThreads,
) -> Result<Option<StoppedProcess>, ReclaimReason> {
    for _ in 0..MAX_ATTEMPTS {
        let stopped = check(process, proc).and_then(|()| {
            let stopped = StoppedProcess::stop(proc, process.id.pid, limit, seized);
            stopped.map_err(|(error, _)| error)
        });
        match stopped {
            // The number may belong to another process by now.
            Ok(stopped) if proc.start_time(process.id.pid) == Some(process.id.start_time) => {
                return Ok(Some(stopped));
            }
            Ok(_) | Err(OwnerError::Exited | OwnerError::TryAgain) => {}
            Err(OwnerError::Reason(reason)) => return Err(reason),
        }
        if proc.start_time(process.id.pid) != Some(process.id.start_time) {
            return Ok(None);
        }
        std::thread::sleep(RETRY_INTERVAL);
    }
    Err(ReclaimReason::OwnerBusy)
}

/// Finds the reasons not to stop a process.
fn check(process: &Process, proc: &ProcFs) -> Result<(), OwnerError> {
    let inspected = InspectedProcess::open(proc, process)?;
    inspected.ensure_stoppable()?;
    // These threads work for the process, and cannot be stopped.
    if let Some(name) = inspected.io_uring_worker()? {
        return Err(ReclaimReason::InUse(InUse::IoUringWorker(name)).into());
    }
    match inspected.current_transfer()? {
        Some((tid, number)) => Err(ReclaimReason::InUse(InUse::Transfer { tid, number }).into()),
        None => Ok(()),
    }
}
