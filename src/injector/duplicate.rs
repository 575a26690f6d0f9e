//! A descriptor of ours for a socket that another process owns.
//!
//! It is compared with the socket by SO_COOKIE, so a descriptor number that was closed and used again
//! never hits a stranger.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};

use super::{ActError, Descriptor, Target};
use crate::privileges::Privilege;
use crate::proc::ProcFs;
use crate::sys;

/// How many processes are kept open at once; the limit of descriptors is 1024 on many hosts.
const MOST_PIDFDS: usize = 128;

/// Makes duplicates; keeps pidfds of the processes it has reached into.
pub struct Duplicator {
    proc: ProcFs,
    /// Whether process numbers of `proc` mean the same to system calls.
    same_pids: bool,
    pidfds: HashMap<(i32, u64), OwnedFd>,
}

impl Duplicator {
    /// With the proc file system that tells one process from the next of its number.
    pub fn new(proc: ProcFs) -> Self {
        Duplicator {
            same_pids: proc.is_of_our_pid_namespace(),
            proc,
            pidfds: HashMap::new(),
        }
    }

    /// A descriptor of exactly the socket of `target`, from the first owner that still has one.
    pub fn socket(&mut self, target: &Target) -> Result<OwnedFd, ActError> {
        let mut verdict = ActError::DescriptorsGone;
        for descriptor in &target.descriptors {
            let socket = match self.duplicate(descriptor) {
                Ok(socket) => socket,
                // This owner closed it or is gone; another may still have it.
                Err(ActError::DescriptorsGone) => continue,
                Err(error) => {
                    verdict = error;
                    continue;
                }
            };
            match sys::socket_cookie(socket.as_fd()) {
                Ok(cookie) if cookie == target.id.cookie().0 => return Ok(socket),
                // The number now belongs to another socket, or to none.
                Ok(_) => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOTSOCK) => {}
                Err(error) => return Err(ActError::Os("getsockopt SO_COOKIE", error)),
            }
        }
        Err(verdict)
    }

    /// A descriptor of ours for what the owner's descriptor refers to now.
    fn duplicate(&mut self, descriptor: &Descriptor) -> Result<OwnedFd, ActError> {
        let pidfd = self.pidfd(descriptor)?;
        sys::pidfd_getfd(pidfd.as_fd(), descriptor.fd).map_err(|error| match error.raw_os_error() {
            Some(libc::EBADF | libc::ESRCH) => ActError::DescriptorsGone,
            Some(libc::EPERM) => ActError::Denied(Privilege::Ptrace, error),
            Some(libc::ENOSYS) => {
                ActError::NotSupported("pidfd_getfd needs Linux 5.6 or later", error)
            }
            _ => ActError::Os("pidfd_getfd", error),
        })
    }

    /// A pidfd of exactly the process that was seen.
    fn pidfd(&mut self, descriptor: &Descriptor) -> Result<&OwnedFd, ActError> {
        if !self.same_pids {
            return Err(ActError::ForeignProc);
        }
        let key = (descriptor.pid, descriptor.start_time);
        if !self.pidfds.contains_key(&key) {
            let pidfd = self.open_pidfd(descriptor)?;
            if self.pidfds.len() >= MOST_PIDFDS {
                self.pidfds.clear();
            }
            self.pidfds.insert(key, pidfd);
        }
        Ok(&self.pidfds[&key])
    }

    fn open_pidfd(&self, descriptor: &Descriptor) -> Result<OwnedFd, ActError> {
        let pidfd =
            sys::pidfd_open(descriptor.pid).map_err(|error| match error.raw_os_error() {
                Some(libc::ESRCH) => ActError::DescriptorsGone,
                Some(libc::ENOSYS) => {
                    ActError::NotSupported("pidfd_open needs Linux 5.3 or later", error)
                }
                _ => ActError::Os("pidfd_open", error),
            })?;
        // Read after the pidfd was opened: the process that was seen still has its number, so the
        // pidfd is of it.
        if self.proc.start_time(descriptor.pid) != Some(descriptor.start_time) {
            return Err(ActError::DescriptorsGone);
        }
        Ok(pidfd)
    }
}
