//! A descriptor of ours for a socket that another process owns.
//!
//! It is compared with the socket by SO_COOKIE, so a descriptor number that was closed and used again never hits another socket.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};

use nix::errno::Errno;
use rustix::net::sockopt;

use crate::model::{MethodError, Owner, Privilege, Target};
use crate::proc::{ProcFs, ProcessId};
use crate::sys::{self, errno_of};

/// How many processes are kept open at once; the limit of descriptors is 1024 on many hosts.
const MOST_PIDFDS: usize = 128;

/// Makes duplicates; keeps pidfds of the processes it has reached into.
pub struct Duplicator {
    proc: ProcFs,
    /// Whether process numbers of `proc` mean the same to system calls.
    same_pids: bool,
    pidfds: HashMap<ProcessId, OwnedFd>,
}

impl Duplicator {
    /// Recognises the owners by their start times in `proc`.
    pub fn new(proc: ProcFs) -> Self {
        Duplicator {
            same_pids: proc.is_of_our_pid_namespace(),
            proc,
            pidfds: HashMap::new(),
        }
    }

    /// A descriptor of exactly the socket of `target`, from the first owner that still has one.
    pub fn socket(&mut self, target: &Target) -> Result<OwnedFd, MethodError> {
        let mut failure = MethodError::DescriptorsGone;
        for owner in &target.owners {
            let socket = match self.duplicate(owner) {
                Ok(socket) => socket,
                // This owner closed it or is gone; another may still have it.
                Err(MethodError::DescriptorsGone) => continue,
                Err(error) => {
                    failure = error;
                    continue;
                }
            };
            match sockopt::socket_cookie(&socket) {
                Ok(cookie) if cookie == target.socket.cookie().0 => return Ok(socket),
                // The number now belongs to another socket, or to none.
                Ok(_) | Err(rustix::io::Errno::NOTSOCK) => {}
                Err(errno) => {
                    let errno = Errno::from_raw(errno.raw_os_error());
                    return Err(MethodError::SystemCall("getsockopt SO_COOKIE", errno));
                }
            }
        }
        Err(failure)
    }

    /// A descriptor of ours for what the owner's descriptor refers to now.
    fn duplicate(&mut self, owner: &Owner) -> Result<OwnedFd, MethodError> {
        let pidfd = self.pidfd(owner.process.id)?;
        sys::pidfd_getfd(pidfd.as_fd(), owner.fd).map_err(|error| match errno_of(&error) {
            Errno::EBADF | Errno::ESRCH => MethodError::DescriptorsGone,
            Errno::EPERM => MethodError::NotPermitted(Privilege::Ptrace, Errno::EPERM),
            Errno::ENOSYS => {
                MethodError::NotSupported("pidfd_getfd needs Linux 5.6 or later", Errno::ENOSYS)
            }
            errno => MethodError::SystemCall("pidfd_getfd", errno),
        })
    }

    /// A pidfd of exactly the process that was seen.
    fn pidfd(&mut self, id: ProcessId) -> Result<&OwnedFd, MethodError> {
        if !self.same_pids {
            return Err(MethodError::OtherPidNamespace);
        }
        if !self.pidfds.contains_key(&id) {
            let pidfd = self.open_pidfd(id)?;
            if self.pidfds.len() >= MOST_PIDFDS {
                self.pidfds.clear();
            }
            self.pidfds.insert(id, pidfd);
        }
        Ok(&self.pidfds[&id])
    }

    fn open_pidfd(&self, id: ProcessId) -> Result<OwnedFd, MethodError> {
        let pidfd = sys::pidfd_open(id.pid).map_err(|error| match errno_of(&error) {
            Errno::ESRCH => MethodError::DescriptorsGone,
            Errno::ENOSYS => {
                MethodError::NotSupported("pidfd_open needs Linux 5.3 or later", Errno::ENOSYS)
            }
            errno => MethodError::SystemCall("pidfd_open", errno),
        })?;
        // Read after the pidfd was opened: the process that was seen still has its number, so the pidfd is of it.
        match self.proc.is_alive(id) {
            true => Ok(pidfd),
            false => Err(MethodError::DescriptorsGone),
        }
    }
}
