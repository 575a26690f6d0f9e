//! Whether the owner still uses a descriptor, decided from evidence. Pure.

use std::collections::HashSet;
use std::time::Duration;

use super::syscalls::SyscallFds;
use crate::model::InUse;
use crate::proc::epoll::EpollSet;

/// The evidence from one process.
#[derive(Clone, Debug, Default)]
pub struct Evidence {
    /// The system calls of its threads, with the descriptors that they use.
    pub syscalls: Vec<SyscallFds>,
    pub epolls: Vec<EpollSet>,
    pub io_urings: Vec<IoUring>,
    /// The name of a kernel thread that works for an io_uring. Its process may have closed every descriptor of that io_uring
    /// already; only this thread shows that it exists.
    pub io_uring_worker: Option<String>,
    /// The name of a thread that runs finalizers.
    pub finalizer: Option<String>,
    /// A thread that waits in the middle of a transfer: its tid and the number of its system call.
    pub transfer: Option<(i32, i64)>,
}

impl Evidence {
    /// The evidence against closing descriptor `fd`, a socket with `inode`. Its age is not considered.
    pub fn against(&self, fd: i32, inode: u32) -> Option<InUse> {
        let inode = u64::from(inode);
        for SyscallFds { tid, number, fds } in &self.syscalls {
            let (tid, number) = (*tid, *number);
            match fds {
                None => return Some(InUse::MaybeInSyscall { tid, number }),
                Some(fds) if fds.contains(&fd) => return Some(InUse::InSyscall { tid, number }),
                Some(_) => {}
            }
        }
        for epoll in &self.epolls {
            if epoll.interest_in(fd, inode).is_some() {
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
        // Of the requests in flight the kernel lists only the polls. Timeouts, linked requests and requests of workers are
        // missing.
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

/// The reason against closing a socket that has been quiet for `age`, if that is less than `min_age` or unknown.
pub fn too_young(age: Option<Duration>, min_age: Duration) -> Option<InUse> {
    match age {
        _ if min_age.is_zero() => None,
        None => Some(InUse::AgeUnknown),
        Some(age) if age < min_age => Some(InUse::TooYoung(age)),
        Some(_) => None,
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
    /// Parses /proc/PID/fdinfo of an io_uring. Each registered socket is a line `    0: socket:[42]` below `UserFiles:`, and
    /// each request in flight is a line below `PollList:`. Source: io_uring/fdinfo.c, __io_uring_show_fdinfo.
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

/// Whether a thread with this name belongs to a runtime whose garbage collector closes descriptors: HotSpot, OpenJ9, Mono or
/// .NET. The kernel keeps only 15 bytes of a name. Go has no thread of this kind, but it has an epoll set.
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
