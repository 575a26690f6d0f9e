//! The proc file system: the list of processes, and the facts about each of them.
//!
//! `fds` reads the descriptor table; `epoll` parses epoll sets; `syscall` parses the call of a thread; `threads` reads how much
//! threads run; [`status`] reads state, limit, executable and threads; [`cgroup`] parses units and containers, of which `containers`
//! reads the names; [`netns`] finds
//! network namespaces; `protocols` counts the sockets in one; `mounts` reads the mount table; `absent` says which selected owners do
//! not exist. `reclaim` and `doctor` read further files themselves.
//!
//! The modules here read no file that can hang on a sick host: never `cmdline` or `maps`, and of `exe` only the link. The exception
//! is `syscall::read_memory`; its callers first check that no thread is in state D.
//!
//! Races: ENOENT and ESRCH mean that the process is gone (`is_missing`). EACCES and EPERM mean that cwkill is not permitted to
//! read the file (`is_denied`). Any other errno is an error.

mod absent;
pub mod cgroup;
mod containers;
pub(crate) mod epoll;
pub(crate) mod fds;
mod freezer;
pub(crate) mod mounts;
pub mod netns;
mod protocols;
pub mod status;
pub(crate) mod syscall;
#[cfg(test)]
pub(crate) mod testdata;
pub(crate) mod threads;

use std::ffi::CStr;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use nix::time::{ClockId, clock_gettime};
use procfs::FromRead;
use procfs::process::Stat;

use crate::bpf::descriptors::Descriptors;
use crate::sys::{self, errno_of};
use crate::text::escape;
use cgroup::Cgroup;
use containers::Names;

pub use crate::sys::RemoteFd;
pub use absent::{AbsentOwner, OWNER_OPTIONS, OwnerKind};
pub use containers::NameDirectory;
pub use containers::Unnamed;
pub use fds::FdState;

/// Inodes of sockets. A run asks for each of up to a million descriptors whether its inode is one of them.
pub type Inodes = foldhash::HashSet<u32>;

/// A mounted proc file system. The root is a parameter, so a test can build a small one.
#[derive(Clone, Debug)]
pub struct ProcFs {
    root: PathBuf,
    /// The quicker way to all descriptors, if it is to be used.
    iterator: Option<Arc<Descriptors>>,
    /// Without the iterator, the descriptors are not read at all.
    needs_iterator: bool,
    /// The names of containers, if they are to be read.
    names: Option<Arc<Names>>,
}

/// The identity of a process. A later process with the same pid has another start time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProcessId {
    /// The pid, in the pid namespace of the proc file system.
    pub pid: i32,
    /// The start time, in clock ticks since boot.
    pub start_time: u64,
}

/// Whether a process exists, as far as cwkill can see.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Presence {
    Shown,
    /// It exists, and /proc does not show it.
    Hidden,
    /// The number is that of a thread of this process.
    ThreadOf(i32),
    Absent,
}

/// The identity of a descriptor table: its process, and a thread if /proc does not show the table for the process.
pub type TableId = (ProcessId, Option<i32>);

/// A process that holds a descriptor.
///
/// It is printed as `comm/pid`, with the name escaped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    pub id: ProcessId,
    /// The name that the kernel keeps. The process can choose it, so escape it before printing.
    pub comm: String,
    /// Its unit and its container.
    pub cgroup: Cgroup,
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", escape(&self.comm), self.id.pid)
    }
}

/// A process that may hold selected sockets although cwkill cannot read its descriptors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unreadable {
    pub pid: i32,
    /// The name, if cwkill can read it.
    pub comm: Option<String>,
}

impl Unreadable {
    /// The names of `all`, if they are few; otherwise none.
    pub(crate) fn names(all: &[Unreadable]) -> Vec<String> {
        /// With more than these, their number says more than their names.
        const MAX_NAMED: usize = 3;
        match all.len() {
            0..=MAX_NAMED => all.iter().map(ToString::to_string).collect(),
            _ => Vec::new(),
        }
    }
}

impl fmt::Display for Unreadable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.comm {
            Some(comm) => write!(f, "{}/{}", escape(comm), self.pid),
            None => write!(f, "process {}", self.pid),
        }
    }
}

impl Process {
    /// The command and the place where it runs. Processes that are equal in both do the same work.
    pub(crate) fn kind(&self) -> ProcessKind<'_> {
        let container = self.cgroup.container.as_ref();
        ProcessKind {
            comm: &self.comm,
            unit: self.cgroup.unit.as_deref(),
            container: container.and_then(|c| c.id.as_deref().or(c.name.as_deref())),
        }
    }
}

/// The command of a process, and its unit and container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct ProcessKind<'a> {
    pub comm: &'a str,
    unit: Option<&'a str>,
    container: Option<&'a str>,
}

impl Default for ProcFs {
    fn default() -> Self {
        ProcFs::at("/proc")
    }
}

impl ProcFs {
    /// The proc file system mounted at `root`.
    pub fn at(root: impl AsRef<Path>) -> Self {
        ProcFs {
            root: root.as_ref().to_owned(),
            iterator: None,
            needs_iterator: false,
            names: None,
        }
    }

    /// The directories with the names of containers that exist on the host; none if names are not to be read.
    ///
    /// # Errors
    /// The root directory of the host cannot be opened, or a file system does not answer.
    pub(crate) fn name_directories(&self) -> Result<Vec<NameDirectory>, String> {
        match &self.names {
            Some(names) => names.directories(),
            None => Ok(Vec::new()),
        }
    }

    /// The same file system, with the names of the containers of the host whose root directory is `host_root`. `of_all`: whether
    /// processes are selected by these names, so that they are read of every process; otherwise only of those that are shown.
    pub(crate) fn with_names(&self, host_root: &Path, of_all: bool) -> Self {
        ProcFs {
            names: Some(Arc::new(Names::of(host_root, &self.root, of_all))),
            ..self.clone()
        }
    }

    /// The same file system, which reads the names of containers anew: they may have changed.
    pub(crate) fn with_names_renewed(&self) -> Self {
        let renewed = self.names.as_ref().and_then(|names| names.renewed());
        ProcFs {
            names: renewed.map(Arc::new).or_else(|| self.names.clone()),
            ..self.clone()
        }
    }

    /// `process` with the name of its container, to be shown.
    pub(crate) fn to_show(&self, mut process: Process) -> Process {
        if let Some(names) = &self.names {
            names.complete(&mut process.cgroup);
        }
        process
    }

    /// The same file system, with another way to the descriptors of all processes. The iterator must be of the pid namespace of this file
    /// system. `is_needed`: whether the descriptors must not be read from the file system if the iterator fails.
    pub(crate) fn with_iterator(&self, iterator: Descriptors, is_needed: bool) -> Self {
        ProcFs {
            iterator: Some(Arc::new(iterator)),
            needs_iterator: is_needed,
            ..self.clone()
        }
    }

    pub(crate) fn needs_iterator(&self) -> bool {
        self.needs_iterator
    }

    /// The quicker way to all descriptors; `None`: they are read from this file system.
    pub(crate) fn iterator(&self) -> Option<&Descriptors> {
        self.iterator.as_deref()
    }

    /// Whether the process still exists. A later process with the same pid does not count.
    pub fn is_alive(&self, id: ProcessId) -> bool {
        self.start_time(id.pid) == Some(id.start_time)
    }

    /// Opens a descriptor that refers to exactly this process.
    ///
    /// # Errors
    /// ESRCH: the process has exited. Otherwise as [`sys::pidfd_open`].
    pub(crate) fn open_pidfd(&self, id: ProcessId) -> Result<OwnedFd, Errno> {
        let pidfd = sys::pidfd_open(id.pid).map_err(|error| errno_of(&error))?;
        // The start time is read after the pidfd was opened. If it is the expected one, the pidfd refers to this process.
        match self.is_alive(id) {
            true => Ok(pidfd),
            false => Err(Errno::ESRCH),
        }
    }

    /// Opens a descriptor that refers to thread `tid` of exactly this process.
    ///
    /// # Errors
    /// ESRCH: the thread has ended. Otherwise as [`sys::pidfd_open_thread`].
    pub(crate) fn open_pidfd_of_thread(&self, id: ProcessId, tid: i32) -> Result<OwnedFd, Errno> {
        let pidfd = sys::pidfd_open_thread(tid).map_err(|error| errno_of(&error))?;
        let is_of_process = self.path(&format!("{}/task/{tid}", id.pid)).exists();
        match is_of_process && self.is_alive(id) {
            true => Ok(pidfd),
            false => Err(Errno::ESRCH),
        }
    }

    /// The start time of process `pid`, in clock ticks since boot; `None` if there is no such process.
    pub fn start_time(&self, pid: i32) -> Option<u64> {
        Some(self.stat(pid).ok()?.starttime)
    }

    /// The process with this pid; `None` if there is none, or cwkill is not permitted to read it.
    pub(crate) fn process(&self, pid: i32) -> Option<Process> {
        let dir = File::open(self.path(&pid.to_string())).ok()?;
        let process = identity(self, dir.as_fd(), pid).ok()?;
        Some(self.to_show(process))
    }

    /// The number of open files of the whole host, and its limit (fs.file-max). At the limit, only a process with CAP_SYS_ADMIN can
    /// open more; others get ENFILE. Source: fs/file_table.c, alloc_empty_file.
    pub fn open_files(&self) -> Option<(u64, u64)> {
        let text = fs::read_to_string(self.path("sys/fs/file-nr")).ok()?;
        let mut numbers = text.split_whitespace().map(str::parse);
        let (used, _free, limit) = (numbers.next()?, numbers.next()?, numbers.next()?);
        Some((used.ok()?, limit.ok()?))
    }

    /// Whether users without privileges may not use bpf(2).
    pub(crate) fn forbids_bpf_to_users(&self) -> bool {
        let value = fs::read_to_string(self.path("sys/kernel/unprivileged_bpf_disabled"));
        value.is_ok_and(|value| value.trim() != "0")
    }

    /// What this file system adds to the start times of processes: the kernel's own time since boot differs in a time namespace
    /// (fs/proc/array.c, do_task_stat).
    pub(crate) fn boot_time_offset(&self) -> i128 {
        // Without time namespaces there is no such file.
        let text = fs::read_to_string(self.path("self/timens_offsets")).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("boottime"));
        let mut numbers = line.unwrap_or_default().split_whitespace();
        let mut number = || numbers.next()?.parse::<i128>().ok();
        match (number(), number()) {
            (Some(seconds), Some(nanoseconds)) => seconds * 1_000_000_000 + nanoseconds,
            _ => 0,
        }
    }

    /// Whether this file system shows the pid namespace of cwkill, so that system calls take its pids.
    pub fn shows_own_pid_namespace(&self) -> bool {
        let own = std::process::id().to_string();
        fs::read_link(self.path("self")).is_ok_and(|target| target.as_os_str() == own.as_str())
    }

    /// Whether this file system shows all processes of the host, apart from hidepid: it is of the initial pid namespace.
    pub fn shows_every_process(&self) -> bool {
        // include/linux/proc_ns.h, PROC_PID_INIT_INO.
        const INITIAL: &str = "pid:[4026531836]";
        self.shows_own_pid_namespace()
            && fs::read_link(self.path("self/ns/pid")).is_ok_and(|link| link.as_os_str() == INITIAL)
    }

    /// Whether there is a process `pid` with a descriptor table. Not if its first thread has exited while others still run:
    /// then its table appears to be empty.
    pub(crate) fn shows_descriptors(&self, pid: i32) -> bool {
        self.stat(pid).is_ok_and(|stat| stat.state != 'Z')
    }

    /// Whether the first thread of process `pid` has exited while others run, as for a moment during an execve(2).
    pub(crate) fn has_exited_leader(&self, pid: i32) -> bool {
        self.stat(pid).is_ok_and(|stat| leader_exited(&stat))
    }

    /// The path of `name` in this file system.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// All pids, in ascending order.
    pub(crate) fn pids(&self) -> io::Result<Vec<i32>> {
        let mut pids = Vec::new();
        for entry in fs::read_dir(&self.root)? {
            pids.extend(
                entry?
                    .file_name()
                    .to_str()
                    .and_then(|n| n.parse::<i32>().ok()),
            );
        }
        pids.sort_unstable();
        Ok(pids)
    }

    /// Whether there is a process `pid`; a thread is none. It is found also if hidepid hides it.
    pub(crate) fn presence(&self, pid: i32) -> Presence {
        let status = fs::read(self.path(&format!("{pid}/status")));
        match status {
            Ok(status) => match status_field(&String::from_utf8_lossy(&status), "Tgid:") {
                Some(leader) if leader != pid => Presence::ThreadOf(leader),
                _ => Presence::Shown,
            },
            Err(error) if is_denied(&error) => Presence::Hidden,
            // With hidepid the directory seems not to exist.
            Err(_) if self.shows_own_pid_namespace() => match sys::pidfd_open(pid) {
                Err(error) if errno_of(&error) == Errno::ESRCH => Presence::Absent,
                _ => Presence::Hidden,
            },
            Err(_) => Presence::Absent,
        }
    }

    /// The threads of process `pid`, the first one first.
    pub(crate) fn tids(&self, pid: i32) -> io::Result<Vec<i32>> {
        let mut tids = Vec::new();
        for entry in fs::read_dir(self.path(&format!("{pid}/task")))? {
            let tid: Option<i32> = entry?.file_name().to_str().and_then(|n| n.parse().ok());
            tids.extend(tid);
        }
        Ok(tids)
    }

    /// The number of slots in the descriptor table of process `pid`. It only grows. [`u32::MAX`] if cwkill cannot read it.
    pub(crate) fn table_size(&self, pid: i32) -> u32 {
        let status = fs::read(self.path(&format!("{pid}/status"))).unwrap_or_default();
        let size = status_field(&String::from_utf8_lossy(&status), "FDSize:");
        size.filter(|size| *size > 0).unwrap_or(u32::MAX)
    }

    /// The processes that can hold descriptors. The name is `None` if cwkill cannot read it.
    pub(crate) fn with_descriptors(&self) -> io::Result<Vec<(i32, Option<String>)>> {
        let holder = |pid| {
            let stat = self.stat(pid);
            (!has_no_descriptors(&stat)).then(|| (pid, stat.ok().map(|stat| stat.comm)))
        };
        Ok(self.pids()?.into_iter().filter_map(holder).collect())
    }

    /// Describes process `pid`, whose descriptors cwkill is not permitted to read; `None` if it cannot hold any.
    pub(crate) fn unreadable(&self, pid: i32) -> Option<Unreadable> {
        let stat = self.stat(pid);
        let comm = || stat.as_ref().ok().map(|stat| stat.comm.clone());
        (!has_no_descriptors(&stat)).then(|| Unreadable { pid, comm: comm() })
    }

    fn stat(&self, pid: i32) -> procfs::ProcResult<Stat> {
        Stat::from_file(self.path(&format!("{pid}/stat")))
    }
}

/// The time since boot. Unlike the clock of Rust it also counts while the host is suspended, as the start times of processes do.
pub fn since_boot() -> Duration {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from)
}

/// The value in a line `NAME value` of /proc/PID/status.
pub(crate) fn status_field<T: FromStr>(status: &str, name: &str) -> Option<T> {
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().parse().ok()
}

/// Reads the identity, name and cgroups of process `pid`, as [`identity`].
pub(crate) fn read_identity(proc: &ProcFs, pid: i32) -> io::Result<Process> {
    let dir = File::open(proc.path(&pid.to_string()))?;
    identity(proc, dir.as_fd(), pid)
}

/// Reads the identity, name and cgroups of process `pid` from its directory `process` in `proc`. The name of its container is read if
/// processes are selected by it; see [`ProcFs::to_show`].
pub(crate) fn identity(proc: &ProcFs, process: BorrowedFd<'_>, pid: i32) -> io::Result<Process> {
    let mut cgroup = read_cgroup(process)?;
    if let Some(names) = proc.names.as_ref().filter(|names| names.of_all) {
        names.complete(&mut cgroup);
    }
    let stat = File::from(open_in(process, c"stat", OFlag::empty())?);
    let stat = Stat::from_read(stat).map_err(stat_error)?;
    Ok(Process {
        id: ProcessId {
            pid,
            start_time: stat.starttime,
        },
        comm: stat.comm,
        cgroup,
    })
}

/// Whether the process holds no descriptors, whatever the right to read them: it is a zombie or a kernel thread, or it has exited.
fn has_no_descriptors(stat: &procfs::ProcResult<Stat>) -> bool {
    // include/linux/sched.h, PF_KTHREAD.
    const KERNEL_THREAD: u32 = 0x0020_0000;
    match stat {
        Ok(stat) if stat.state == 'Z' => stat.num_threads <= 1,
        Ok(stat) => stat.state == 'X' || stat.flags & KERNEL_THREAD != 0,
        Err(error) => matches!(error, procfs::ProcError::NotFound(_)),
    }
}

/// Read twice, it shows whether the process has executed a program in between.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ExecMarker {
    /// The first thread exits or has exited, and others have not. Then /proc shows no descriptors for the pid: the kernel reads
    /// the table of the first thread (fs/proc/fd.c), which that thread has released.
    LeaderExited,
    Running {
        /// The start of the stack. The kernel chooses it at random at each execve(2), unless kernel.randomize_va_space is 0.
        /// Then it can be the same after an execve(2).
        stack: u64,
        /// The process has one thread. During an execve(2) the kernel ends all other threads before it makes the new stack.
        one_thread: bool,
    },
}

/// Whether the first thread exits or has exited, and others have not. A thread becomes a zombie a while after it has released
/// its table (kernel/exit.c, do_exit).
fn leader_exited(stat: &Stat) -> bool {
    // include/linux/sched.h
    const PF_EXITING: u32 = 4;
    (stat.state == 'Z' || stat.flags & PF_EXITING != 0) && stat.num_threads > 1
}

pub(crate) fn exec_marker(process: BorrowedFd<'_>) -> io::Result<ExecMarker> {
    let stat = File::from(open_in(process, c"stat", OFlag::empty())?);
    let stat = Stat::from_read(stat).map_err(stat_error)?;
    Ok(match leader_exited(&stat) {
        true => ExecMarker::LeaderExited,
        false => ExecMarker::Running {
            stack: stat.startstack,
            one_thread: stat.num_threads == 1,
        },
    })
}

/// Attempts to read a table while the process executes a program. If another thread than the first calls execve(2), the
/// kernel ends the first thread and gives its place to the other (fs/exec.c, de_thread). In between the table appears to
/// be empty.
const MAX_ATTEMPTS: u32 = 20;
const RETRY_INTERVAL: Duration = Duration::from_millis(1);

/// The result of `read`, which reads files in the directory `process`, from a moment when the process did not execute a program.
/// `None`: the first thread has exited and others run, or the process executes one program after the other.
///
/// # Errors
/// As `read`, and as for reading `stat`.
pub(crate) fn read_between_execs<T>(
    process: BorrowedFd<'_>,
    mut read: impl FnMut() -> io::Result<T>,
) -> io::Result<Option<T>> {
    for _ in 0..MAX_ATTEMPTS {
        let before = exec_marker(process)?;
        if before == ExecMarker::LeaderExited {
            thread::sleep(RETRY_INTERVAL);
            continue;
        }
        let result = match read() {
            // A thread that ends during an execve(2) takes its files in /proc along.
            Err(error) if is_missing(&error) && exec_marker(process).is_ok() => {
                thread::sleep(RETRY_INTERVAL);
                continue;
            }
            result => result?,
        };
        if exec_marker(process)? == before {
            return Ok(Some(result));
        }
    }
    Ok(None)
}

pub(crate) fn open_in(dir: BorrowedFd<'_>, name: &CStr, flags: OFlag) -> io::Result<OwnedFd> {
    let flags = flags | OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    Ok(openat(dir, name, flags, Mode::empty())?)
}

/// Reads the cgroups of a process from its directory `process`; none on a kernel without cgroups (ENOENT).
fn read_cgroup(process: BorrowedFd<'_>) -> io::Result<Cgroup> {
    let read = || -> io::Result<String> {
        let mut text = Vec::new();
        File::from(open_in(process, c"cgroup", OFlag::empty())?).read_to_end(&mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    };
    match read() {
        Ok(text) => Ok(Cgroup::parse(&text)),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(Cgroup::default()),
        Err(error) => Err(error),
    }
}

/// Keeps the errno of a failed read of `stat`: ESRCH if the process has exited.
fn stat_error(error: procfs::ProcError) -> io::Error {
    match error {
        procfs::ProcError::Io(error, _) => error,
        procfs::ProcError::NotFound(_) => io::Error::from_raw_os_error(libc::ESRCH),
        procfs::ProcError::PermissionDenied(_) => io::Error::from_raw_os_error(libc::EACCES),
        other => io::Error::other(other),
    }
}

/// Whether the error means that the process or the descriptor is gone.
pub(crate) fn is_missing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH))
}

/// Whether the error means that cwkill lacks the right.
pub(crate) fn is_denied(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EACCES | libc::EPERM))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Process 2 of the initial pid namespace is the kernel thread that makes the others.
    #[test]
    fn only_the_initial_pid_namespace_has_kernel_threads() {
        let proc = ProcFs::default();
        let second = proc.stat(2).map(|stat| stat.comm).unwrap_or_default();
        assert_eq!(proc.shows_every_process(), second == "kthreadd");
    }

    #[test]
    fn a_time_namespace_changes_the_start_times() {
        assert_eq!(ProcFs::default().boot_time_offset(), 0);
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("self")).unwrap();
        let offsets = "monotonic           0         0\nboottime          -86400   1000000\n";
        fs::write(root.path().join("self/timens_offsets"), offsets).unwrap();
        let offset = ProcFs::at(root.path()).boot_time_offset();
        assert_eq!(offset, -86_400_000_000_000 + 1_000_000);
    }

    #[test]
    fn a_thread_is_not_a_process() {
        let proc = ProcFs::default();
        let own = i32::try_from(std::process::id()).unwrap();
        assert_eq!(proc.presence(own), Presence::Shown);
        // PID_MAX_LIMIT of the kernel (include/linux/threads.h).
        assert_eq!(proc.presence(4_194_304), Presence::Absent);
        // A test runs in a thread of its own.
        let tid = nix::unistd::gettid().as_raw();
        assert_ne!(tid, own);
        assert_eq!(proc.presence(tid), Presence::ThreadOf(own));
    }

    #[test]
    fn open_files_of_the_host_are_below_their_limit() {
        let (used, limit) = ProcFs::default().open_files().unwrap();
        assert!(0 < used && used < limit, "{used} of {limit}");
        let full = tempfile::tempdir().unwrap();
        fs::create_dir_all(full.path().join("sys/fs")).unwrap();
        fs::write(full.path().join("sys/fs/file-nr"), "100\t0\t100\n").unwrap();
        assert_eq!(ProcFs::at(full.path()).open_files(), Some((100, 100)));
    }
}
