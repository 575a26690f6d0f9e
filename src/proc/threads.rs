//! How much the threads of a process run and sleep.

use std::fs;
use std::time::Duration;

use super::status::MAX_THREADS;
use super::{ProcFs, ProcessId, status_field};

/// How much a thread had run and slept at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThreadUsage {
    pub tid: i32,
    /// It runs, or waits for a processor.
    pub runnable: bool,
    /// How many times it has gone to sleep.
    pub sleeps: u64,
    /// How long it has run since its start; zero if the kernel does not say.
    pub ran: Duration,
    /// How long it has waited for a processor since its start. The kernel adds a wait when it is over.
    pub waited: Duration,
}

impl ThreadUsage {
    /// In place of a thread: all threads of the process.
    pub const ALL: i32 = 0;

    /// Whether the thread has slept since an `earlier` reading of it, or sleeps now.
    pub fn has_slept(&self, earlier: &ThreadUsage) -> bool {
        !self.runnable || self.sleeps != earlier.sleeps
    }
}

impl ProcFs {
    /// The first 32,768 threads of process `id`, and if there are more, all threads as one; empty if it is gone.
    pub(crate) fn thread_usages(&self, id: ProcessId) -> Vec<ThreadUsage> {
        let tids = self.tids(id.pid).unwrap_or_default();
        let all = (tids.len() > MAX_THREADS).then(|| self.all_threads(id.pid));
        let usages = tids.into_iter().take(MAX_THREADS).filter_map(|tid| {
            let file = |name: &str| fs::read(self.path(&format!("{}/task/{tid}/{name}", id.pid)));
            let status = file("status").ok()?;
            let schedstat = file("schedstat").unwrap_or_default();
            parse(
                tid,
                &String::from_utf8_lossy(&status),
                &String::from_utf8_lossy(&schedstat),
            )
        });
        let usages = usages.chain(all.flatten()).collect();
        // Checked last: the files may be of a later process with the same pid.
        match self.is_alive(id) {
            true => usages,
            false => Vec::new(),
        }
    }
}

impl ProcFs {
    /// The threads of process `pid` as one, of which only the processor time is known.
    fn all_threads(&self, pid: i32) -> Option<ThreadUsage> {
        let stat = self.stat(pid).ok()?;
        let ticks = stat.utime.saturating_add(stat.stime);
        let milliseconds = ticks.saturating_mul(1000) / procfs::ticks_per_second().max(1);
        Some(ThreadUsage {
            tid: ThreadUsage::ALL,
            runnable: false,
            sleeps: 0,
            ran: Duration::from_millis(milliseconds),
            waited: Duration::ZERO,
        })
    }
}

/// Parses /proc/PID/task/TID/status and schedstat. Source: fs/proc/array.c, proc_pid_status; fs/proc/base.c,
/// proc_pid_schedstat: the time on a processor and the time of waiting for one, in nanoseconds, and the number of time slices.
fn parse(tid: i32, status: &str, schedstat: &str) -> Option<ThreadUsage> {
    let state = status
        .lines()
        .find_map(|line| line.strip_prefix("State:"))?;
    let mut times = schedstat
        .split_whitespace()
        .map(|word| word.parse().map(Duration::from_nanos).unwrap_or_default());
    Some(ThreadUsage {
        tid,
        runnable: state.trim_start().starts_with('R'),
        sleeps: status_field(status, "voluntary_ctxt_switches:")?,
        ran: times.next().unwrap_or_default(),
        waited: times.next().unwrap_or_default(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_parsed() {
        let status = "Name:\ta\nState:\tR (running)\nvoluntary_ctxt_switches:\t150\n\
            nonvoluntary_ctxt_switches:\t7\n";
        let expected = ThreadUsage {
            tid: 4,
            runnable: true,
            sleeps: 150,
            ran: Duration::from_nanos(5),
            waited: Duration::from_nanos(6),
        };
        assert_eq!(parse(4, status, "5 6 7\n"), Some(expected));
        let without = parse(4, &status.replace('R', "S"), "").unwrap();
        assert_eq!((without.runnable, without.ran), (false, Duration::ZERO));
        assert_eq!(parse(4, "Name:\ta\n", "5 6 7\n"), None);
    }

    #[test]
    fn the_threads_of_this_process() {
        let proc = ProcFs::default();
        let pid = i32::try_from(std::process::id()).unwrap();
        let id = ProcessId {
            pid,
            start_time: proc.start_time(pid).unwrap(),
        };
        let tid = nix::unistd::gettid().as_raw();
        let usages = proc.thread_usages(id);
        let own = usages.iter().find(|usage| usage.tid == tid).unwrap();
        assert!(own.runnable, "it reads this file");
        let later = ProcessId {
            start_time: id.start_time + 1,
            ..id
        };
        assert!(proc.thread_usages(later).is_empty(), "another process");
        let until = std::time::Instant::now() + Duration::from_secs(30);
        let earlier = proc.all_threads(pid).unwrap();
        while proc.all_threads(pid).unwrap().ran == earlier.ran {
            assert!(std::time::Instant::now() < until, "this thread runs");
        }
        assert_eq!(earlier.tid, ThreadUsage::ALL);
    }
}
