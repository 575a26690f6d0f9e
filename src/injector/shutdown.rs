//! `shutdown`: shutdown(2) on a duplicate of an owner's descriptor. The kernel sends FIN after all queued data, so nothing is
//! lost, and the peer sees an orderly close.
//!
//! cwkill never sets SO_LINGER: the option would stay set, and the owner's own close(2) would then abort the connection.
//!
//! # Behind NAT
//! Connection tracking forgets a connection in CLOSE-WAIT after a minute. It does not take a FIN for the start of a connection, so
//! the FIN then passes without NAT: it is lost, or a wrong host answers it with RST. The local socket closes, and the peer never
//! hears of it; behind a proxy on the same host it stays in FIN-WAIT-2. But a bare ACK from the side that opened the connection makes
//! a new entry, with the same NAT (nf_conntrack_tcp_loose; net/netfilter/nf_conntrack_proto_tcp.c, tcp_new). So where connection
//! tracking is loaded and the peer has been quiet for long enough, cwkill first makes the kernel send a keepalive probe, as
//! [`super::probe`] does. See docs/decisions/keepalive-before-fin.md.

use std::os::fd::AsRawFd;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{Shutdown as How, shutdown};

use super::Executor;
use super::duplicate::Duplicator;
use super::engine::Batch;
use super::probe::{self, KEEP_IDLE, Keepalive};
use crate::conntrack;
use crate::control::{Backoff, deadline};
use crate::model::{Method, MethodError, Target};
use crate::proc::ProcFs;
use crate::sock_diag::Protocol;
use crate::sys::Duplicate;

/// Sockets per batch without and with keepalive probes. All probes of a batch are sent in one wait.
const SOCKETS_PER_BATCH: usize = 64;
const SOCKETS_PER_PROBED_BATCH: usize = 1024;
/// A peer that has been quiet for less is not forgotten, whatever other namespaces and hosts on the way have set. The default of
/// nf_conntrack_tcp_timeout_close_wait is 60 s.
const SHORTEST_ENTRY: Duration = Duration::from_secs(10);
/// The kernel sends a probe at its next tick: 10 ms at 100 Hz. This allows for a busy machine.
const PROBE_SENT: Duration = Duration::from_millis(50);
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(4);

/// Shuts sockets down through their owners' descriptors.
pub struct Shutdown {
    duplicator: Duplicator,
    /// Connection tracking may have forgotten a connection whose peer has been quiet for this long. `None`: it is not loaded.
    forgotten_after: Option<Duration>,
    batch_size: usize,
}

/// A target whose peer is sent a keepalive probe.
struct Probed<'t> {
    target: &'t mut Target,
    keepalive: Keepalive,
}

impl AsMut<Target> for Probed<'_> {
    fn as_mut(&mut self) -> &mut Target {
        self.target
    }
}

impl Shutdown {
    /// `proc` is used to identify owners by their start time. Reads the settings of the namespace of the calling thread.
    pub fn new(proc: ProcFs) -> Self {
        let timeout = conntrack::close_wait_timeout();
        Shutdown {
            duplicator: Duplicator::new(proc),
            forgotten_after: timeout.map(|timeout| timeout.min(SHORTEST_ENTRY).max(KEEP_IDLE)),
            batch_size: match timeout {
                None => SOCKETS_PER_BATCH,
                Some(_) => probe::batch_size().min(SOCKETS_PER_PROBED_BATCH),
            },
        }
    }

    /// Whether a host on the way may have forgotten the connection of this socket.
    fn may_be_forgotten(&self, target: &Target, socket: &Duplicate) -> bool {
        // With unacknowledged data the kernel sends no probe, and its retransmissions have the same effect.
        let can_be_asked = target.socket.send_q == 0
            && !target.socket.address_gone
            && target.socket.protocol() == Protocol::Tcp;
        let is_old = |after| probe::idle(socket).is_ok_and(|idle| idle >= after);
        can_be_asked && self.forgotten_after.is_some_and(is_old)
    }

    /// Shuts the socket down, or returns the keepalive probe that must be sent before.
    fn begin(&mut self, target: &Target) -> Result<Option<Keepalive>, MethodError> {
        let socket = self.duplicator.socket(target)?;
        if self.may_be_forgotten(target, &socket) {
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
        self.batch_size
    }

    fn act(&mut self, mut targets: Vec<&mut Target>, batch: &mut Batch<'_>) {
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
            targets = batch.recheck(rest, false);
        }
        if probed.is_empty() {
            return;
        }
        wait_until_sent(&probed, batch);
        for Probed { target, keepalive } in batch.recheck(probed, true) {
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

/// Waits until the kernel has sent the probes. It sends them in the order of their start, all within a tick.
fn wait_until_sent(probed: &[Probed<'_>], batch: &Batch<'_>) {
    let control = batch.control();
    let until = deadline(control.now(), PROBE_SENT);
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    let first_and_last = [probed.first(), probed.last()].into_iter().flatten();
    for probe in first_and_last {
        while !probe.keepalive.is_over() && control.now() < until {
            backoff.sleep(control, until);
        }
    }
}
