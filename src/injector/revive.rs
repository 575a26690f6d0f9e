//! A keepalive probe before an act, so that the FIN or RST of the act passes NAT.
//!
//! Connection tracking forgets a connection in CLOSE-WAIT after a minute. It does not take a FIN or an RST for the start of a
//! connection, so the segment then passes without NAT: it is lost, or a wrong host answers it with RST. The local socket closes, and
//! the peer never hears of it; behind a proxy on the same host it stays in FIN-WAIT-2. But a bare ACK from the side that opened the
//! connection makes a new entry, with the same NAT (nf_conntrack_tcp_loose; net/netfilter/nf_conntrack_proto_tcp.c, tcp_new). So where
//! connection tracking is loaded and the peer has been quiet for long enough, cwkill first makes the kernel send a keepalive probe, as
//! [`super::probe`] does. That needs a duplicate of a descriptor. See docs/decisions/keepalive-before-fin.md.

use std::time::Duration;

use super::duplicate::Duplicator;
use super::engine::MethodRun;
use super::keepalive::{self, KEEP_IDLE, Keepalive};
use crate::conntrack;
use crate::control::{Backoff, deadline};
use crate::model::Target;
use crate::sock_diag::Protocol;
use crate::sys::Duplicate;

/// Sockets per batch with keepalive probes. All probes of a batch are sent in one wait.
const SOCKETS_PER_PROBED_BATCH: usize = 1024;
/// A peer that has been quiet for less is not forgotten, whatever other namespaces and hosts on the way have set. The default of
/// nf_conntrack_tcp_timeout_close_wait is 60 s.
const SHORTEST_ENTRY: Duration = Duration::from_secs(10);
/// The kernel sends a probe at its next tick: 10 ms at 100 Hz. This allows for a busy machine.
const PROBE_SENT: Duration = Duration::from_millis(50);
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(4);

/// Makes connection tracking know the connections again.
pub(super) struct Reviver {
    /// Connection tracking may have forgotten a connection whose peer has been quiet for this long. `None`: it is not loaded.
    forgotten_after: Option<Duration>,
    batch_size: Option<usize>,
}

/// A target whose peer is sent a keepalive probe.
pub(super) struct Probed<'t> {
    pub target: &'t mut Target,
    pub keepalive: Keepalive,
}

impl AsMut<Target> for Probed<'_> {
    fn as_mut(&mut self) -> &mut Target {
        self.target
    }
}

/// The targets of a method that needs no descriptor itself.
pub(super) struct Revived<'t> {
    /// They were sent nothing.
    pub others: Vec<&'t mut Target>,
    /// Their peers were sent a probe, and may have answered it with RST.
    pub probed: Vec<&'t mut Target>,
}

impl<'t> Revived<'t> {
    pub fn without_probes(others: Vec<&'t mut Target>) -> Self {
        Revived {
            others,
            probed: Vec::new(),
        }
    }
}

impl Reviver {
    /// Reads the settings of the namespace of the calling thread.
    pub fn new() -> Self {
        let timeout = conntrack::close_wait_timeout();
        Reviver {
            forgotten_after: timeout.map(|timeout| timeout.min(SHORTEST_ENTRY).max(KEEP_IDLE)),
            batch_size: timeout.map(|_| keepalive::batch_size().min(SOCKETS_PER_PROBED_BATCH)),
        }
    }

    /// The number of sockets per batch, of a method that takes `usual` ones without probes.
    pub fn batch_size(&self, usual: usize) -> usize {
        self.batch_size.unwrap_or(usual)
    }

    /// Whether a host on the way may have forgotten the connection of this socket.
    pub fn may_be_forgotten(&self, target: &Target, socket: &Duplicate) -> bool {
        // With unacknowledged data the kernel sends no probe, and its retransmissions have the same effect.
        let can_be_asked = target.socket.send_q == 0
            && !target.socket.address_gone
            && target.socket.protocol() == Protocol::Tcp;
        let is_old = |after| keepalive::idle(socket).is_ok_and(|idle| idle >= after);
        can_be_asked && self.forgotten_after.is_some_and(is_old)
    }

    /// As [`Reviver::revive_unchecked`]. If a probe was sent, all targets are rechecked.
    pub fn revive<'t>(
        &self,
        duplicator: &mut Duplicator,
        targets: Vec<&'t mut Target>,
        run: &mut MethodRun<'_>,
    ) -> Revived<'t> {
        let Revived { others, probed } = self.revive_unchecked(duplicator, targets, run);
        if probed.is_empty() {
            return Revived { others, probed };
        }
        Revived {
            others: run.recheck(others, false),
            probed: run.recheck(probed, true),
        }
    }

    /// Makes the kernel send a probe to the peer of each target that may be forgotten, as far as a descriptor can be duplicated. Then
    /// it restores the options and closes the duplicates. If a probe was sent, time has passed: the caller must recheck all targets
    /// before it acts.
    pub fn revive_unchecked<'t>(
        &self,
        duplicator: &mut Duplicator,
        targets: Vec<&'t mut Target>,
        run: &MethodRun<'_>,
    ) -> Revived<'t> {
        let (mut others, mut probed) = (Vec::with_capacity(targets.len()), Vec::new());
        for target in targets {
            match self.start(duplicator, target) {
                Some(keepalive) => probed.push(Probed { target, keepalive }),
                None => others.push(target),
            }
        }
        if !probed.is_empty() {
            wait_until_sent(&probed, run);
        }
        let probed = probed.into_iter().map(|item| item.target).collect();
        Revived { others, probed }
    }

    /// Rechecks `targets`, and then does as [`Reviver::revive`], `size` of them at a time. If connection tracking is not loaded, it does
    /// neither.
    pub fn revive_all<'t>(
        &self,
        duplicator: &mut Duplicator,
        mut targets: Vec<&'t mut Target>,
        size: usize,
        run: &mut MethodRun<'_>,
    ) -> Revived<'t> {
        if self.forgotten_after.is_none() {
            return Revived::without_probes(targets);
        }
        let mut all = Revived::without_probes(Vec::with_capacity(targets.len()));
        while !targets.is_empty() && !run.control().interrupted() {
            let rest = targets.split_off(targets.len().min(size));
            // A probe must not go out on a socket that is in use again.
            let part = run.recheck(targets, false);
            let Revived { others, probed } = self.revive(duplicator, part, run);
            all.others.extend(others);
            all.probed.extend(probed);
            targets = rest;
        }
        all
    }

    fn start(&self, duplicator: &mut Duplicator, target: &Target) -> Option<Keepalive> {
        if self.forgotten_after.is_none() || target.owners.is_empty() {
            return None;
        }
        let socket = duplicator.socket(target).ok()?;
        match self.may_be_forgotten(target, &socket) {
            true => Keepalive::start(socket).ok(),
            false => None,
        }
    }
}

/// Waits until the kernel has sent the probes. It sends them in the order of their start, all within a tick.
pub(super) fn wait_until_sent(probed: &[Probed<'_>], run: &MethodRun<'_>) {
    let control = run.control();
    let until = deadline(control.now(), PROBE_SENT);
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    let first_and_last = [probed.first(), probed.last()].into_iter().flatten();
    for probe in first_and_last {
        while !probe.keepalive.is_over() && control.now() < until {
            backoff.sleep(control, until);
        }
    }
}
