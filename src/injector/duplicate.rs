//! Duplicates a descriptor that another process has of a socket.
//!
//! cwkill compares SO_COOKIE of the duplicate with the cookie of the target. So it never acts on another socket that has got
//! the same descriptor number meanwhile.
//!
//! While an owner executes a program, the kernel can say that it has no descriptors (`ProcFs::has_exited_leader`). cwkill then
//! asks again, a few times for all sockets together.
//!
//! A duplicate keeps the socket open, and in the epoll sets of the owner, even if the owner closes its own descriptor meanwhile. So
//! each is dropped as soon as its method is done with it.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use rustix::net::sockopt;

use crate::model::{MethodError, Owner, Privilege, Target};
use crate::privileges;
use crate::proc::{ProcFs, ProcessId, TableId};
use crate::sock_diag::Cookie;
use crate::sys::{self, Duplicate, Pidfds, errno_of};

/// Makes duplicates, and keeps the pidfds of the owners for reuse.
pub struct Duplicator {
    proc: ProcFs,
    /// Whether the pids in `proc` are those that system calls use.
    same_pids: bool,
    /// By process, and by thread for a table that only a thread has.
    pidfds: Pidfds<TableId>,
    /// How many times more it may wait for an owner that executes a program.
    waits: u32,
}

/// The waits for owners that execute programs, of all sockets together: an owner whose first thread has exited for good looks the
/// same.
const MAX_WAITS: u32 = 20;
const WAIT: Duration = Duration::from_millis(1);

impl Duplicator {
    /// `proc` is used to identify owners by their start time.
    pub fn new(proc: ProcFs) -> Self {
        Duplicator {
            same_pids: proc.shows_own_pid_namespace(),
            proc,
            pidfds: Pidfds::new(),
            waits: MAX_WAITS,
        }
    }

    /// A duplicate for the socket of `target`, from the first owner whose descriptor is still open.
    pub fn socket(&mut self, target: &Target) -> Result<Duplicate, MethodError> {
        self.of_owners(&target.owners, target.socket.cookie())
    }

    /// A duplicate for the socket with this cookie, from the first of `owners` whose descriptor is still open.
    pub fn of_owners(
        &mut self,
        owners: &[Owner],
        expected: Cookie,
    ) -> Result<Duplicate, MethodError> {
        loop {
            let result = self.of_owners_now(owners, expected);
            let executes = || {
                let mut pids = owners.iter().map(|owner| owner.process.id.pid);
                pids.any(|pid| self.proc.has_exited_leader(pid))
            };
            let is_missed = matches!(result, Err(MethodError::DescriptorsGone)) && self.waits > 0;
            if !is_missed || !executes() {
                return result;
            }
            self.waits -= 1;
            thread::sleep(WAIT);
        }
    }

    fn of_owners_now(
        &mut self,
        owners: &[Owner],
        expected: Cookie,
    ) -> Result<Duplicate, MethodError> {
        let mut failure = MethodError::DescriptorsGone;
        for owner in owners {
            let socket = match self.duplicate(owner) {
                Ok(socket) => socket,
                // This owner has closed it or exited; another may still have it.
                Err(MethodError::DescriptorsGone) => continue,
                Err(error) => {
                    failure = error;
                    continue;
                }
            };
            match sockopt::socket_cookie(&socket) {
                Ok(cookie) if cookie == expected.0 => return Ok(socket),
                // The descriptor is of another socket by now, or of none.
                Ok(_) | Err(rustix::io::Errno::NOTSOCK) => {}
                Err(errno) => {
                    let errno = Errno::from_raw(errno.raw_os_error());
                    return Err(MethodError::SystemCall("getsockopt SO_COOKIE", errno));
                }
            }
        }
        Err(failure)
    }

    /// A duplicate of the file that the owner's descriptor refers to now.
    fn duplicate(&mut self, owner: &Owner) -> Result<Duplicate, MethodError> {
        let id = owner.process.id;
        let tid = match owner.tid {
            // A thread that has executed a program has the place of the first thread now.
            Some(tid) if self.pidfd(id, Some(tid)).err() == Some(MethodError::DescriptorsGone) => {
                None
            }
            tid => tid,
        };
        let pidfd = self.pidfd(id, tid)?;
        sys::pidfd_getfd(pidfd, owner.fd).map_err(|error| match errno_of(&error) {
            Errno::EBADF | Errno::ESRCH => MethodError::DescriptorsGone,
            Errno::EPERM => privileges::not_permitted(Privilege::Ptrace, Errno::EPERM),
            Errno::ENOSYS => {
                MethodError::NotSupported("pidfd_getfd needs Linux 5.6 or later", Errno::ENOSYS)
            }
            errno => MethodError::SystemCall("pidfd_getfd", errno),
        })
    }

    /// A pidfd of the process with this pid and start time, or of one of its threads.
    fn pidfd(&mut self, id: ProcessId, tid: Option<i32>) -> Result<BorrowedFd<'_>, MethodError> {
        if !self.same_pids {
            return Err(MethodError::OtherPidNamespace);
        }
        let proc = &self.proc;
        self.pidfds.get((id, tid), || match tid {
            Some(tid) => open_pidfd_of_thread(proc, id, tid),
            None => open_pidfd(proc, id),
        })
    }
}

fn open_pidfd_of_thread(proc: &ProcFs, id: ProcessId, tid: i32) -> Result<OwnedFd, MethodError> {
    proc.open_pidfd_of_thread(id, tid)
        .map_err(|errno| match errno {
            Errno::ESRCH => MethodError::DescriptorsGone,
            // The flag for a thread is unknown, or the whole call is.
            Errno::EINVAL | Errno::ENOSYS => MethodError::NotSupported(
                "a descriptor that only one thread has needs Linux 6.9 or later",
                errno,
            ),
            errno => MethodError::SystemCall("pidfd_open", errno),
        })
}

fn open_pidfd(proc: &ProcFs, id: ProcessId) -> Result<OwnedFd, MethodError> {
    proc.open_pidfd(id).map_err(|errno| match errno {
        Errno::ESRCH => MethodError::DescriptorsGone,
        Errno::ENOSYS => {
            MethodError::NotSupported("pidfd_open needs Linux 5.3 or later", Errno::ENOSYS)
        }
        errno => MethodError::SystemCall("pidfd_open", errno),
    })
}
