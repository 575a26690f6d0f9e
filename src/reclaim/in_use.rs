//! Whether the owner still uses a descriptor, decided from evidence. Pure.

use std::collections::HashSet;
use std::time::Duration;

use humantime::format_duration;

use super::syscalls::SyscallUse;
use crate::report::escape::escape;
use crate::report::notes::counted;

/// Evidence that a descriptor is in use. `--reclaim-force` overrides it.
///
/// [`Reason::code`](super::Reason::code) takes its codes from here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, strum::IntoStaticStr)]
#[cfg_attr(test, derive(strum::VariantNames))]
#[strum(serialize_all = "kebab-case")]
pub enum InUse {
    /// A thread is inside a system call on it.
    #[error("thread {tid} is inside a system call on it (number {number})")]
    InSyscall {
        /// The thread.
        tid: i32,
        /// The number of the call.
        number: i64,
    },
    /// A thread is inside a system call that may be on it: cwkill could not read which descriptors the call is on.
    #[error(
        "thread {tid} is inside a system call that may be on it (number {number}): the list of its descriptors could not \
         be read"
    )]
    MaybeInSyscall {
        /// The thread.
        tid: i32,
        /// The number of the call.
        number: i64,
    },
    /// It is in the epoll set behind this descriptor of the owner.
    #[error("in the epoll set of descriptor {0}")]
    InEpoll(i32),
    /// It is registered with the io_uring behind this descriptor of the owner.
    #[error("registered with the io_uring of descriptor {0}")]
    InIoUring(i32),
    /// The io_uring behind this descriptor has requests in flight, and the kernel does not show their descriptors.
    #[error("the io_uring of descriptor {0} has requests in flight, which may be on it")]
    IoUringInFlight(i32),
    /// The owner has an io_uring behind this descriptor, and the kernel does not show all of its requests.
    #[error("the io_uring of descriptor {0} may have requests on it, which cannot be seen")]
    IoUringOpen(i32),
    /// A kernel thread with this name works for an io_uring of the owner.
    #[error(
        "its thread {} works for an io_uring, which may have requests on it",
        escape(.0)
    )]
    IoUringWorker(String),
    /// A thread with this name closes the descriptors of objects that the owner no longer refers to.
    #[error(
        "its thread {} closes forgotten objects by their numbers, whatever has those by then; have it collect them first \
         (Java: jcmd PID GC.run), then --reclaim-force",
        escape(.0)
    )]
    Finalizer(String),
    /// A thread of the owner is in the middle of a transfer, and a stop would end its system call early.
    #[error(
        "thread {tid} of its process waits to send or receive more (system call number {number}), and would be told of a \
         part when it is stopped; try later, or --reclaim-force if its program goes on with the rest"
    )]
    Transfer {
        /// The thread.
        tid: i32,
        /// The number of the call.
        number: i64,
    },
    /// It holds this many bytes that its program can still read.
    #[error("its process can still read {}, which --reclaim-force loses", bytes(*.0))]
    Unread(u32),
    /// It has been quiet only for this long.
    #[error("quiet for only {} (--reclaim-age)", format_duration(whole_millis(*.0)))]
    TooYoung(Duration),
    /// The kernel does not report how long it has been quiet.
    #[error("the kernel does not say for how long it has been quiet")]
    AgeUnknown,
}

fn bytes(count: u32) -> String {
    counted(usize::try_from(count).unwrap_or(usize::MAX), "byte")
}

fn whole_millis(age: Duration) -> Duration {
    Duration::from_millis(u64::try_from(age.as_millis()).unwrap_or(u64::MAX))
}

/// The evidence from one process.
#[derive(Clone, Debug, Default)]
pub struct Evidence {
    /// The descriptors that the system calls of its threads are on.
    pub syscalls: Vec<SyscallUse>,
    pub epolls: Vec<Epoll>,
    pub io_urings: Vec<IoUring>,
    /// The name of a kernel thread that works for an io_uring, which may have lost its last descriptor.
    pub io_uring_worker: Option<String>,
    /// The name of a thread that runs finalizers.
    pub finalizer: Option<String>,
    /// A thread that waits in the middle of a transfer, and the number of its system call.
    pub transfer: Option<(i32, i64)>,
}

impl Evidence {
    /// The evidence against closing descriptor `fd`, a socket with `inode`. Its age is not considered.
    pub fn against(&self, fd: i32, inode: u32) -> Option<InUse> {
        let inode = u64::from(inode);
        for SyscallUse { tid, number, fds } in &self.syscalls {
            let (tid, number) = (*tid, *number);
            match fds {
                None => return Some(InUse::MaybeInSyscall { tid, number }),
                Some(fds) if fds.contains(&fd) => return Some(InUse::InSyscall { tid, number }),
                Some(_) => {}
            }
        }
        for epoll in &self.epolls {
            if epoll.inodes.contains(&inode) || epoll.fds.contains(&fd) {
                return Some(InUse::InEpoll(epoll.fd));
            }
        }
        let mut io_urings = self.io_urings.iter();
        if let Some(ring) = io_urings.find(|ring| ring.sockets.contains(&inode)) {
            return Some(InUse::InIoUring(ring.fd));
        }
        if let Some(ring) = self.io_urings.iter().find(|ring| ring.in_flight) {
            return Some(InUse::IoUringInFlight(ring.fd));
        }
        // The kernel lists only the polls among the requests in flight: no timeouts, no links, nothing that a worker has.
        if let Some(ring) = self.io_urings.first() {
            return Some(InUse::IoUringOpen(ring.fd));
        }
        if let Some(name) = &self.io_uring_worker {
            return Some(InUse::IoUringWorker(name.clone()));
        }
        if let Some(name) = &self.finalizer {
            return Some(InUse::Finalizer(name.clone()));
        }
        let (tid, number) = self.transfer?;
        Some(InUse::Transfer { tid, number })
    }
}

/// Whether a socket with this age has not been quiet for `min_age`.
pub fn too_young(age: Option<Duration>, min_age: Duration) -> Option<InUse> {
    match age {
        _ if min_age.is_zero() => None,
        None => Some(InUse::AgeUnknown),
        Some(age) if age < min_age => Some(InUse::TooYoung(age)),
        Some(_) => None,
    }
}

/// An epoll set of the owner.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Epoll {
    /// Its descriptor.
    pub fd: i32,
    /// The inodes of its members. A member stays in the set even if the number it was added by has been closed.
    pub inodes: HashSet<u64>,
    /// The numbers by which members were added, if the kernel does not show their inodes (before 5.2).
    pub fds: HashSet<i32>,
}

impl Epoll {
    /// Parses /proc/PID/fdinfo of an epoll set. Its members are lines `tfd: 7 events: 19 data: 7 pos:0 ino:2a sdev:9`; on
    /// older kernels they end after the data. Source: fs/eventpoll.c, ep_show_fdinfo.
    pub fn parse(fd: i32, fdinfo: &str) -> Self {
        let mut epoll = Epoll {
            fd,
            ..Epoll::default()
        };
        for line in fdinfo.lines().filter_map(|line| line.strip_prefix("tfd:")) {
            let mut words = line.split_whitespace();
            let number: Option<i32> = words.next().and_then(|number| number.parse().ok());
            let inode =
                words.find_map(|word| u64::from_str_radix(word.strip_prefix("ino:")?, 16).ok());
            match inode {
                Some(inode) => drop(epoll.inodes.insert(inode)),
                None => epoll.fds.extend(number),
            }
        }
        epoll
    }
}

/// An io_uring of the owner.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IoUring {
    /// Its descriptor.
    pub fd: i32,
    /// The inodes of the sockets registered with it.
    pub sockets: HashSet<u64>,
    /// It has requests in flight.
    pub in_flight: bool,
}

impl IoUring {
    /// Parses /proc/PID/fdinfo of an io_uring: registered sockets are lines `    0: socket:[42]` below `UserFiles:`, and
    /// requests in flight are lines below `PollList:`. Source: io_uring/fdinfo.c, __io_uring_show_fdinfo.
    pub fn parse(fd: i32, fdinfo: &str) -> Self {
        let mut ring = IoUring {
            fd,
            ..IoUring::default()
        };
        let mut section = "";
        for line in fdinfo.lines() {
            if !line.starts_with(' ') {
                section = line.split(':').next().unwrap_or_default();
                continue;
            }
            match section {
                "UserFiles" => {
                    let link = line.split_once(": ").map(|(_, link)| link.trim());
                    let inode: Option<u64> = link
                        .and_then(|link| link.strip_prefix("socket:[")?.strip_suffix(']'))
                        .and_then(|digits| digits.parse().ok());
                    ring.sockets.extend(inode);
                }
                "PollList" => ring.in_flight = true,
                _ => {}
            }
        }
        ring
    }
}

/// Whether a thread with this name belongs to a runtime whose collector closes descriptors: HotSpot, OpenJ9, Mono or
/// .NET. The kernel keeps 15 bytes of a name. Go has no such thread, but it has an epoll set.
pub fn runs_finalizers(name: &str) -> bool {
    const NAMES: [&str; 3] = ["VM Thread", "Common-Cleaner", "Reference Handl"];
    NAMES.contains(&name) || name.contains("Finalizer") || name.starts_with(".NET ")
}

/// Whether a thread with this name is one that the kernel creates for io_uring: `iou-wrk-TID` or `iou-sqp-TID`.
/// Source: io_uring/io-wq.c, io_wq_worker; io_uring/sqpoll.c, io_sq_thread.
pub fn works_for_io_uring(name: &str) -> bool {
    name.starts_with("iou-")
}

#[cfg(test)]
#[path = "in_use_tests.rs"]
mod tests;
