//! `shutdown`: shutdown(2) on a duplicate of an owner's descriptor. FIN goes out after all queued data, the peer ends cleanly,
//! nothing is lost.
//!
//! SO_LINGER is never touched: it would outlive us and turn the owner's own close() into an abort.

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
    /// Recognises the owners by their start times in `proc`.
    pub fn new(proc: ProcFs) -> Self {
        Shutdown {
            duplicator: Duplicator::new(proc),
        }
    }

    fn shut_down(&mut self, target: &Target) -> Result<(), MethodError> {
        let socket = self.duplicator.socket(target)?;
        match shutdown(socket.as_raw_fd(), How::Both) {
            Ok(()) => Ok(()),
            // It left the connected states since it was checked.
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
