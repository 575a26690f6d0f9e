//! The state of a process, its limit of open files, its signal handlers and its executable.
//!
//! Nothing here waits for the process, or takes a lock that a hung process can hold. cwkill reads only the link of `exe` and only
//! `stat` of a thread, never `stack` or `maps`.

use std::fs;
use std::time::Duration;

use procfs::FromRead;
use procfs::process::{LimitValue, Limits, Stat, Status};

use super::{ProcFs, Process, ProcessId, leader_exited};

/// cwkill reads at most this many threads of a process, where it looks often.
const MAX_THREADS_PER_LOOK: usize = 512;
/// The same where it looks a few times. Two files of each thread take 50 microseconds on a busy machine.
pub const MAX_THREADS: usize = 32_768;

/// Facts about a process from /proc, apart from its descriptors.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProcessStatus {
    /// The state of the first thread, a letter of proc_pid_stat(5), or of another one if the first has exited and others run;
    /// `None` if the process is gone.
    pub state: Option<char>,
    /// The soft limit RLIMIT_NOFILE: every descriptor number is below it.
    pub limit: Option<u64>,
    /// The hard limit.
    pub hard_limit: Option<u64>,
    /// The pid of its parent.
    pub parent: Option<i32>,
    /// The path of the executable; `None` if cwkill is not permitted to read it. The kernel gives it as a text. cwkill does not open
    /// the file, which may be on a file system that hangs.
    pub program: Option<String>,
    /// The name of the executable without its directory.
    pub executable: Option<String>,
    /// The signals for which it has a handler: bit N - 1 for signal N (SigCgt in proc_pid_status(5)); `None` if cwkill cannot
    /// read them.
    pub caught: Option<u64>,
    /// Its numbers in the pid namespaces that it is in, that of /proc first and its own last (NSpid in proc_pid_status(5)). Empty if
    /// cwkill cannot read them.
    pub pids: Vec<i32>,
}

impl ProcFs {
    /// Reads the status of `process`; all fields are `None` if it is gone.
    pub fn status(&self, process: &Process) -> ProcessStatus {
        let directory = self.path(&process.id.pid.to_string());
        let limits = self.open_file_limits(process.id.pid);
        let status = Status::from_file(directory.join("status")).ok();
        let program = fs::read_link(directory.join("exe")).ok().map(|path| {
            let path = path.to_string_lossy().into_owned();
            // The kernel marks an executable that was replaced on disk (fs/d_path.c).
            path.strip_suffix(" (deleted)").unwrap_or(&path).to_owned()
        });
        // Read last: if the start time still matches, the other files were about the same process.
        match Stat::from_file(directory.join("stat")) {
            Ok(stat) if stat.starttime == process.id.start_time => ProcessStatus {
                state: Some(match leader_exited(&stat) {
                    true => self.state_of_another(process.id.pid).unwrap_or(stat.state),
                    false => stat.state,
                }),
                parent: Some(stat.ppid),
                caught: status.as_ref().map(|status| status.sigcgt),
                pids: status.and_then(|status| status.nspid).unwrap_or_default(),
                limit: limits.map(|(soft, _)| soft),
                hard_limit: limits.map(|(_, hard)| hard),
                executable: program.as_ref().map(|path| {
                    let name = path.rsplit('/').next().unwrap_or(path);
                    name.to_owned()
                }),
                program,
            },
            _ => ProcessStatus::default(),
        }
    }

    /// The soft and the hard limit RLIMIT_NOFILE of process `pid`.
    pub(crate) fn open_file_limits(&self, pid: i32) -> Option<(u64, u64)> {
        let number = |limit| match limit {
            LimitValue::Value(files) => files,
            LimitValue::Unlimited => u64::MAX,
        };
        let limits = Limits::from_file(self.path(&format!("{pid}/limits"))).ok()?;
        let files = limits.max_open_files;
        Some((number(files.soft_limit), number(files.hard_limit)))
    }

    /// Whether cwkill itself has a seccomp filter, which may refuse what its capabilities permit.
    pub fn filters_own_calls(&self) -> bool {
        fs::read_to_string(self.path("self/status")).is_ok_and(|status| has_seccomp_filter(&status))
    }

    /// The kernel's id of this boot; `None` if /proc does not show it.
    pub fn boot_id(&self) -> Option<String> {
        let id = fs::read_to_string(self.path("sys/kernel/random/boot_id")).ok()?;
        Some(id.trim().to_owned())
    }

    /// The state of a thread of process `pid` that has not exited.
    fn state_of_another(&self, pid: i32) -> Option<char> {
        let tids = self.tids(pid).ok()?;
        let state = |tid| {
            let stat = fs::read(self.path(&format!("{pid}/task/{tid}/stat"))).ok()?;
            thread_state(&stat)
                .filter(|state| *state != b'Z')
                .map(char::from)
        };
        tids.into_iter().take(MAX_THREADS_PER_LOOK).find_map(state)
    }

    /// The threads of `process` in uninterruptible sleep (D), among its first 32,768; empty if it is gone.
    pub fn uninterruptible(&self, process: &Process) -> Vec<i32> {
        let directory = self.path(&process.id.pid.to_string());
        let Ok(threads) = fs::read_dir(directory.join("task")) else {
            return Vec::new();
        };
        let sleeping = |entry: fs::DirEntry| {
            let thread = entry.file_name().to_str()?.parse().ok()?;
            let stat = fs::read(entry.path().join("stat")).ok()?;
            (thread_state(&stat)? == b'D').then_some(thread)
        };
        let threads = threads.take(MAX_THREADS).filter_map(Result::ok);
        let asleep = threads.filter_map(sleeping).collect();
        // Checked last, as above.
        match self.is_alive(process.id) {
            true => asleep,
            false => Vec::new(),
        }
    }
}

/// What the threads of a process are doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Activity {
    /// A thread runs, or waits for a processor.
    pub runnable: bool,
    /// The processor time of its runnable threads; zero if the kernel does not report it (CONFIG_SCHED_INFO).
    pub cpu: Duration,
}

impl ProcFs {
    /// The activity of the first 512 threads of process `id`; none if it is gone. Needs no privilege.
    pub(crate) fn activity(&self, id: ProcessId) -> Activity {
        let mut activity = Activity::default();
        let Ok(threads) = fs::read_dir(self.path(&format!("{}/task", id.pid))) else {
            return activity;
        };
        for thread in threads.take(MAX_THREADS_PER_LOOK).filter_map(Result::ok) {
            let stat = fs::read(thread.path().join("stat")).ok();
            if stat.and_then(|stat| thread_state(&stat)) == Some(b'R') {
                activity.runnable = true;
                let schedule = fs::read_to_string(thread.path().join("schedstat"));
                activity.cpu += schedule.map_or(Duration::ZERO, |text| time_on_cpu(&text));
            }
        }
        // Checked last, as above.
        match self.is_alive(id) {
            true => activity,
            false => Activity::default(),
        }
    }
}

/// The first field of a `schedstat` file: the nanoseconds that the thread has run (Documentation/scheduler/sched-stats.rst).
fn time_on_cpu(schedstat: &str) -> Duration {
    let first = schedstat.split_whitespace().next();
    let nanoseconds = first.and_then(|first| first.parse().ok());
    Duration::from_nanos(nanoseconds.unwrap_or(0))
}

/// Whether the process of this /proc/PID/status has a seccomp filter (fs/proc/array.c, task_seccomp).
pub(crate) fn has_seccomp_filter(status: &str) -> bool {
    seccomp_mode(status) == Some(2)
}

/// The mode of seccomp(2) in the text of /proc/PID/status: 0 without, 1 strict, 2 with a filter; `None` if the kernel has no seccomp.
pub(crate) fn seccomp_mode(status: &str) -> Option<u8> {
    let mut lines = status.lines();
    let mode = lines.find_map(|line| line.strip_prefix("Seccomp:"))?;
    mode.trim().parse().ok()
}

/// The state in a `stat` file: it follows the name, which may contain any bytes.
///
/// procfs parses this file too, but panics if it ends after the name.
pub(crate) fn thread_state(stat: &[u8]) -> Option<u8> {
    let end = stat.iter().rposition(|byte| *byte == b')')?;
    stat.get(end + 2).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_is_read_from_the_status() {
        assert!(has_seccomp_filter(
            "Name:\tx\nSeccomp:\t2\nSeccomp_filters:\t1\n"
        ));
        assert!(!has_seccomp_filter("Name:\tSeccomp: 2\nSeccomp:\t0\n"));
        assert!(!has_seccomp_filter(""));
    }

    #[test]
    fn the_state_follows_any_name() {
        assert_eq!(thread_state(b"7 (a) S (b)) D 1 7"), Some(b'D'));
        assert_eq!(thread_state(b"7 (\xff) R 1 7"), Some(b'R'));
        for broken in [&b"7 (a)"[..], b"7 (a) ", b""] {
            assert_eq!(thread_state(broken), None);
        }
    }

    #[test]
    fn the_status_of_this_process() {
        let proc = ProcFs::default();
        let pid = i32::try_from(std::process::id()).unwrap();
        let mut process = Process {
            id: ProcessId {
                pid,
                start_time: proc.start_time(pid).unwrap(),
            },
            comm: String::new(),
            cgroup: Default::default(),
        };
        let status = proc.status(&process);
        let (soft, _) =
            nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE).unwrap();
        assert_eq!(status.limit, Some(soft));
        let exe = std::env::current_exe().unwrap();
        assert_eq!(status.program.as_deref(), exe.to_str());
        let parent = nix::unistd::getppid().as_raw();
        assert_eq!(status.parent, Some(parent));
        assert_eq!(
            status.executable.as_deref(),
            exe.file_name().unwrap().to_str()
        );
        assert!(status.state.is_some());
        // Rust's own handler of stack overflows; SIGKILL cannot be caught.
        let caught = status.caught.unwrap();
        let catches = |signal: i32| caught >> (signal - 1) & 1 == 1;
        assert!(catches(libc::SIGSEGV) && !catches(libc::SIGKILL));
        process.id.start_time += 1;
        assert_eq!(
            proc.status(&process),
            ProcessStatus::default(),
            "another process"
        );
    }

    #[test]
    fn only_runnable_threads_count_as_activity() {
        let root = tempfile::tempdir().unwrap();
        let zeros = "0 ".repeat(17);
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let stat = |state: char| format!("7 (app) R) {state} 1 {zeros}50 {zeros}{zeros}{zeros}\n");
        write("7/stat", &stat('S'));
        write("7/task/7/stat", &stat('S'));
        write("7/task/7/schedstat", "900 0 1\n");
        let proc = ProcFs::at(root.path());
        let id = |start_time| ProcessId { pid: 7, start_time };
        assert_eq!(proc.activity(id(50)), Activity::default());
        write("7/task/8/stat", &stat('R'));
        write("7/task/9/stat", &stat('R'));
        write("7/task/9/schedstat", "3000 20 1\n");
        let busy = Activity {
            runnable: true,
            cpu: Duration::from_micros(3),
        };
        assert_eq!(proc.activity(id(50)), busy);
        assert_eq!(
            proc.activity(id(51)),
            Activity::default(),
            "another process"
        );
    }
}
