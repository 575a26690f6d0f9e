//! The proc file system: which processes there are, and what the kernel says of each.
//!
//! One reader for each file: `fds` the descriptor table, [`status`] limits, executable and threads, [`cgroup`] units and
//! containers, [`netns`] network namespaces, `mounts` what is mounted. Only what cannot hang on a sick host is read: never `maps`, and of `exe` only the link.
//!
//! Races: a file that vanishes (ENOENT, ESRCH) means that its process is gone ([`is_gone`]); EACCES and EPERM mean that we may not
//! read it ([`is_denied`]); anything else is an error.

pub mod cgroup;
pub(crate) mod fds;
pub(crate) mod mounts;
pub mod netns;
pub mod status;
#[cfg(test)]
pub(crate) mod testdata;

use std::ffi::CStr;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;
use procfs::FromRead;
use procfs::process::Stat;

use crate::text::escape;
use cgroup::Cgroup;

pub use crate::sys::RemoteFd;
pub use fds::FdState;

/// A mounted proc file system. Its root is a parameter so that tests can build one of their own.
#[derive(Clone, Debug)]
pub struct ProcFs {
    root: PathBuf,
}

/// A process for as long as it lives: another process of its number has another start time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProcessId {
    /// Its number, in the pid namespace of the proc file system.
    pub pid: i32,
    /// When it started, in clock ticks since boot.
    pub start_time: u64,
}

/// A process that holds a descriptor.
///
/// Shown as `comm/pid`, with the name escaped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Process {
    /// Its identity.
    pub id: ProcessId,
    /// Its name as the kernel keeps it. Chosen by the process: escape it before it is shown.
    pub comm: String,
    /// Where it belongs: its unit, its container.
    pub cgroup: Cgroup,
}

impl fmt::Display for Process {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", escape(&self.comm), self.id.pid)
    }
}

/// A process that may hold wanted sockets without our seeing it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unreadable {
    /// Its number.
    pub pid: i32,
    /// Its name, if that can be read.
    pub comm: Option<String>,
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
        }
    }

    /// Whether the process is still there, and no other has its number.
    pub fn is_alive(&self, id: ProcessId) -> bool {
        self.start_time(id.pid) == Some(id.start_time)
    }

    /// When process `pid` started, in clock ticks since boot; `None` when there is none.
    pub fn start_time(&self, pid: i32) -> Option<u64> {
        Some(self.stat(pid).ok()?.starttime)
    }

    /// Whether the process numbers of this file system are those that system calls take.
    pub fn is_of_our_pid_namespace(&self) -> bool {
        let own = std::process::id().to_string();
        fs::read_link(self.path("self")).is_ok_and(|target| target.as_os_str() == own.as_str())
    }

    /// The path of `name` in this file system.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// The processes, by number.
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

    /// The processes that can hold descriptors, with their names where those can be read.
    pub(crate) fn with_descriptors(&self) -> io::Result<Vec<(i32, Option<String>)>> {
        let holds = |pid| {
            let stat = self.stat(pid);
            (!has_no_descriptors(&stat)).then(|| (pid, stat.ok().map(|stat| stat.comm)))
        };
        Ok(self.pids()?.into_iter().filter_map(holds).collect())
    }

    /// Process `pid`, which may not be read, if it can hold anything.
    pub(crate) fn unreadable(&self, pid: i32) -> Option<Unreadable> {
        let stat = self.stat(pid);
        let comm = || stat.as_ref().ok().map(|stat| stat.comm.clone());
        (!has_no_descriptors(&stat)).then(|| Unreadable { pid, comm: comm() })
    }

    fn stat(&self, pid: i32) -> procfs::ProcResult<Stat> {
        Stat::from_file(self.path(&format!("{pid}/stat")))
    }
}

/// The process behind `process`, the directory of number `pid`.
pub(crate) fn identity(process: BorrowedFd<'_>, pid: i32) -> io::Result<Process> {
    let stat = File::from(open_in(process, c"stat", OFlag::empty())?);
    let stat = Stat::from_read(stat).map_err(stat_error)?;
    Ok(Process {
        id: ProcessId {
            pid,
            start_time: stat.starttime,
        },
        comm: stat.comm,
        cgroup: read_cgroup(process)?,
    })
}

/// Whether a process holds nothing although it may not be read: a zombie, a kernel thread, or one that
/// has just gone.
fn has_no_descriptors(stat: &procfs::ProcResult<Stat>) -> bool {
    // include/linux/sched.h, PF_KTHREAD.
    const KERNEL_THREAD: u32 = 0x0020_0000;
    match stat {
        Ok(stat) if stat.state == 'Z' => stat.num_threads <= 1,
        Ok(stat) => stat.state == 'X' || stat.flags & KERNEL_THREAD != 0,
        Err(error) => matches!(error, procfs::ProcError::NotFound(_)),
    }
}

/// What a process executes, or `None` if its first thread has ended and others have not. Its descriptors are not to be
/// seen by its number then: the kernel looks at the first thread's table (fs/proc/fd.c), which it has given up.
///
/// It is told by the place of its stack, which is another after each exec (kernel.randomize_va_space).
pub(crate) fn image(process: BorrowedFd<'_>) -> io::Result<Option<u64>> {
    let stat = File::from(open_in(process, c"stat", OFlag::empty())?);
    let stat = Stat::from_read(stat).map_err(stat_error)?;
    let lost_its_leader = stat.state == 'Z' && stat.num_threads > 1;
    Ok((!lost_its_leader).then_some(stat.startstack))
}

pub(crate) fn open_in(dir: BorrowedFd<'_>, name: &CStr, flags: OFlag) -> io::Result<OwnedFd> {
    let flags = flags | OFlag::O_RDONLY | OFlag::O_CLOEXEC;
    Ok(openat(dir, name, flags, Mode::empty())?)
}

/// The cgroups of the process behind `process`; none on a kernel without cgroups (ENOENT).
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

/// Reading a stat file can fail with the process's end, which keeps its errno.
fn stat_error(error: procfs::ProcError) -> io::Error {
    match error {
        procfs::ProcError::Io(error, _) => error,
        procfs::ProcError::NotFound(_) => io::Error::from_raw_os_error(libc::ESRCH),
        procfs::ProcError::PermissionDenied(_) => io::Error::from_raw_os_error(libc::EACCES),
        other => io::Error::other(other),
    }
}

/// The process or the descriptor is gone.
pub(crate) fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH))
}

/// We may not look.
pub(crate) fn is_denied(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EACCES | libc::EPERM))
}
