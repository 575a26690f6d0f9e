//! `shutdown`: shutdown(2) on a duplicate of an owner's descriptor. The kernel sends FIN after all queued data, so nothing is
//! lost, and the peer sees an orderly close.
//!
//! cwkill never sets SO_LINGER: the option would stay set, and the owner's own close(2) would then abort the connection.

use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::sys::socket::{Shutdown as How, shutdown};

use super::Executor;
use super::duplicate::Duplicator;
use super::engine::Batch;
use crate::model::{Method, MethodError, Target};
use crate::proc::ProcFs;

/// Shuts sockets down through their owners' descriptors.
pub struct Shutdown {
    duplicator: Duplicator,
}

impl Shutdown {
    /// `proc` is used to identify owners by their start time.
    pub fn new(proc: ProcFs) -> Self {
        Shutdown {
            duplicator: Duplicator::new(proc),
        }
    }

    fn shut_down(&mut self, target: &Target) -> Result<(), MethodError> {
        let socket = self.duplicator.socket(target)?;
        match shutdown(socket.as_raw_fd(), How::Both) {
            Ok(()) => Ok(()),
            // The socket is no longer connected.
            Err(Errno::ENOTCONN) => Err(MethodError::Gone),
            Err(errno) => Err(MethodError::SystemCall("shutdown", errno)),
        }
    }
}

impl Executor for Shutdown {
    fn method(&self) -> Method {
        Method::Shutdown
    }

    fn act(&mut self, targets: Vec<&mut Target>, _: &mut Batch<'_>) {
        for target in targets {
            let result = self.shut_down(target);
            target.record(Method::Shutdown, result);
        }
    }
}
