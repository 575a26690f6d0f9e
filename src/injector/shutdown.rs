//! `shutdown`: shutdown(2) on a duplicate of an owner's descriptor. FIN goes out after all queued
//! data, the peer ends cleanly, nothing is lost.
//!
//! SO_LINGER is never touched: it would outlive us and turn the owner's own close() into an abort.

use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::sys::socket::{Shutdown as How, shutdown};

use super::duplicate::Duplicator;
use super::{ActError, Method, MethodName, Scene, Target};
use crate::proc::ProcFs;

/// The method.
pub struct Shutdown {
    duplicator: Duplicator,
}

impl Shutdown {
    /// The method, with the proc file system that tells one process from the next of its number.
    pub fn new(proc: ProcFs) -> Self {
        Shutdown {
            duplicator: Duplicator::new(proc),
        }
    }

    fn act_on(&mut self, target: &Target) -> Result<(), ActError> {
        let socket = self.duplicator.socket(target)?;
        match shutdown(socket.as_raw_fd(), How::Both) {
            Ok(()) => Ok(()),
            // It left the connected states since it was checked.
            Err(Errno::ENOTCONN) => Err(ActError::Gone),
            Err(errno) => Err(ActError::Os("shutdown", errno.into())),
        }
    }
}

impl Method for Shutdown {
    fn name(&self) -> MethodName {
        MethodName::Shutdown
    }

    fn act(&mut self, targets: &[Target], _: &mut dyn Scene) -> Vec<Result<(), ActError>> {
        targets.iter().map(|target| self.act_on(target)).collect()
    }
}
