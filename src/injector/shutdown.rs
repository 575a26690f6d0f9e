//! `shutdown`: shutdown(2) on a duplicate of an owner's descriptor. The kernel sends FIN after all queued data, so nothing is
//! lost, and the peer sees an orderly close.
//!
//! cwkill never sets SO_LINGER: the option would stay set, and the owner's own close(2) would then abort the connection.
//!
//! Where connection tracking may have forgotten the connection, cwkill first makes the kernel send a keepalive probe (`revive`).

use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::sys::socket::{Shutdown as How, shutdown};

use super::Executor;
use super::duplicate::Duplicator;
use super::engine::MethodRun;
use super::keepalive::Keepalive;
use super::revive::{Probed, Reviver, wait_until_sent};
use crate::model::{Method, MethodError, Target};
use crate::proc::ProcFs;
use crate::sys::Duplicate;

/// Sockets per batch without keepalive probes.
const SOCKETS_PER_BATCH: usize = 64;

/// Shuts sockets down through their owners' descriptors.
pub struct Shutdown {
    duplicator: Duplicator,
    reviver: Reviver,
}

impl Shutdown {
    /// `proc` is used to identify owners by their start time. Reads the settings of the namespace of the calling thread.
    pub fn new(proc: ProcFs) -> Self {
        Shutdown {
            duplicator: Duplicator::new(proc),
            reviver: Reviver::new(),
        }
    }

    /// Shuts the socket down, or returns the keepalive probe that must be sent before.
    fn begin(&mut self, target: &Target) -> Result<Option<Keepalive>, MethodError> {
        let socket = self.duplicator.socket(target)?;
        if self.reviver.may_be_forgotten(target, &socket) {
            if let Ok(keepalive) = Keepalive::start(socket) {
                return Ok(Some(keepalive));
            }
            return self.shut_down(target).map(|()| None);
        }
        shut_down(&socket).map(|()| None)
    }

    fn shut_down(&mut self, target: &Target) -> Result<(), MethodError> {
        shut_down(&self.duplicator.socket(target)?)
    }
}

impl Executor for Shutdown {
    fn method(&self) -> Method {
        Method::Shutdown
    }

    fn batch_size(&self) -> usize {
        self.reviver.batch_size(SOCKETS_PER_BATCH)
    }

    fn act(&mut self, mut targets: Vec<&mut Target>, run: &mut MethodRun<'_>) {
        let mut probed = Vec::new();
        loop {
            let rest = targets.split_off(targets.len().min(SOCKETS_PER_BATCH));
            for target in targets {
                match self.begin(target) {
                    Ok(Some(keepalive)) => probed.push(Probed { target, keepalive }),
                    Ok(None) => target.record(Method::Shutdown, Ok(())),
                    Err(error) => target.record(Method::Shutdown, Err(error)),
                }
            }
            if rest.is_empty() {
                break;
            }
            // A large batch was rechecked too long ago.
            targets = run.recheck(rest, false);
        }
        if probed.is_empty() {
            return;
        }
        wait_until_sent(&probed, run);
        for Probed { target, keepalive } in run.recheck(probed, true) {
            let result = match shut_down(keepalive.socket()) {
                // The peer has answered the probe with RST.
                Err(MethodError::Gone) => Ok(()),
                other => other,
            };
            target.record(Method::Shutdown, result);
        }
    }
}

fn shut_down(socket: &Duplicate) -> Result<(), MethodError> {
    match shutdown(socket.as_raw_fd(), How::Both) {
        Ok(()) => Ok(()),
        // The socket is no longer connected.
        Err(Errno::ENOTCONN) => Err(MethodError::Gone),
        Err(errno) => Err(MethodError::SystemCall("shutdown", errno)),
    }
}
