//! `rst`: sends RSTs through a raw socket, first to the local stack with the peer's address, then to the peer with the local
//! address.
//!
//! This works without an owner and without SOCK_DESTROY. The sequence numbers come from [`repair`] if cwkill can duplicate a
//! descriptor, otherwise from [`elicited_ack`]. Right before the RST the socket is rechecked by its cookie. If a new
//! connection takes over the addresses even after that, the RST has no effect: the kernel accepts it only at exactly rcv_nxt
//! (RFC 5961 §3.2), and during the handshake it also checks the acknowledgment number (net/ipv4/tcp_minisocks.c,
//! tcp_check_req). A listener drops an RST without an answer.
//!
//! In repair mode the socket sends nothing. Where connection tracking may have forgotten the connection, a keepalive probe goes first
//! (`revive`), so that the RST reaches the peer. An elicited ACK has the same effect.
//!
//! The local socket comes first. Once it is gone, the peer gets its RST, so that a half-closed peer is released too. If the
//! local socket is not gone, cwkill sends the peer nothing.

pub mod elicited_ack;
pub mod repair;

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use nix::errno::Errno;

use super::Executor;
use super::duplicate::Duplicator;
use super::engine::{Lookup, MethodRun};
use super::revive::{Revived, Reviver};
use crate::control::Backoff;
use crate::model::{Method, MethodError, Privilege, Target};
use crate::packet::capture::{self, Capture};
use crate::packet::raw::{Outgoing, RawSockets, SendError};
use crate::privileges;
use crate::proc::ProcFs;
use crate::sock_diag::{DiagId, LookupError};
use crate::sys::errno_of;
use crate::tcp::{Segment, Seq, TcpFlags, Tuple};

use elicited_ack::{Answer, Answers};

/// Sockets that are rechecked together, right before their RSTs.
const RSTS_AT_ONCE: usize = 64;
const FIRST_PAUSE: Duration = Duration::from_micros(500);
const LONGEST_PAUSE: Duration = Duration::from_millis(20);

/// The sequence numbers that an exact RST needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Numbers {
    /// The next sequence number expected from the peer.
    pub rcv_nxt: Seq,
    /// The next sequence number to be sent to the peer.
    pub snd_nxt: Seq,
}

/// Resets connections with spoofed segments.
pub struct Rst {
    /// The kernel has not refused repair mode yet; it needs CAP_NET_ADMIN.
    may_repair: bool,
    duplicator: Duplicator,
    reviver: Reviver,
    wire: Wire,
}

/// Sends and captures single segments. Its sockets are opened at first use and kept for all batches.
#[derive(Default)]
pub(super) struct Wire {
    raw: RawSockets,
    capture: Option<Capture>,
}

/// A target whose sequence numbers are known.
struct Resolved<'t> {
    target: &'t mut Target,
    numbers: Numbers,
    /// A segment was sent before, for the sake of the numbers or of NAT; the peer may have answered it with RST.
    after_segment: bool,
}

impl AsMut<Target> for Resolved<'_> {
    fn as_mut(&mut self) -> &mut Target {
        self.target
    }
}

impl Rst {
    /// `proc` is used to identify owners by their start time.
    pub fn new(proc: ProcFs) -> Self {
        Rst {
            may_repair: true,
            duplicator: Duplicator::new(proc),
            reviver: Reviver::new(),
            wire: Wire::default(),
        }
    }

    /// Finds the sequence numbers of each target. A target without them gets an attempt with the reason. `is_probed`: their peers
    /// were sent a keepalive probe.
    fn resolve<'t>(
        &mut self,
        targets: Vec<&'t mut Target>,
        is_probed: bool,
        run: &MethodRun<'_>,
    ) -> Vec<Resolved<'t>> {
        let mut resolved = Vec::with_capacity(targets.len());
        let mut unresolved = Vec::new();
        for target in targets {
            if run.control().interrupted() {
                continue;
            }
            match self.repair(target) {
                Some(Ok(numbers)) => resolved.push(Resolved {
                    target,
                    numbers,
                    after_segment: is_probed,
                }),
                // Another process checkpoints the socket, and may restore it elsewhere.
                Some(Err(error)) if error.errno() == Some(Errno::EBUSY) => {
                    target.record(Method::Rst, Err(error));
                }
                Some(Err(error)) => unresolved.push((target, Some(Box::new(error)))),
                None => unresolved.push((target, None)),
            }
        }
        let ids: Vec<DiagId> = unresolved
            .iter()
            .map(|(target, _)| target.socket.id)
            .collect();
        let answers = self.wire.elicit(&ids, run);
        for (target, repair_error) in unresolved {
            match numbers(&answers, &target.socket.id) {
                Ok(Some(numbers)) => resolved.push(Resolved {
                    target,
                    numbers,
                    after_segment: true,
                }),
                Ok(None) if run.control().interrupted() => {}
                Ok(None) => target.record(Method::Rst, Err(MethodError::NoAck(repair_error))),
                Err(error) => target.record(Method::Rst, Err(error)),
            }
        }
        resolved
    }

    /// The numbers from repair mode; `None` if there is no descriptor, or if the kernel has refused the mode before.
    fn repair(&mut self, target: &Target) -> Option<Result<Numbers, MethodError>> {
        if !self.may_repair || target.owners.is_empty() {
            return None;
        }
        let socket = self.duplicator.socket(target);
        let numbers = socket.and_then(|socket| repair::numbers(socket.as_fd()));
        if matches!(
            numbers,
            Err(MethodError::NotPermitted(Privilege::NetAdmin, _)
                | MethodError::RefusedDespitePrivilege(Privilege::NetAdmin, _))
        ) {
            self.may_repair = false;
        }
        Some(numbers)
    }

    /// Sends each target its RST after a last recheck, and returns those that were sent one.
    fn send_resets<'t>(
        &mut self,
        resolved: Vec<Resolved<'t>>,
        run: &mut MethodRun<'_>,
    ) -> Vec<Resolved<'t>> {
        let (elicited, repaired) = resolved.into_iter().partition(|item| item.after_segment);
        let mut eligible = run.recheck(repaired, false);
        eligible.extend(run.recheck(elicited, true));
        let packets = eligible
            .into_iter()
            .map(|item| {
                let reset = item.reset_to_local();
                (item, reset)
            })
            .collect();
        let mut sent = Vec::new();
        for (item, result) in self.wire.raw.send(packets) {
            match result {
                Ok(()) => sent.push(item),
                Err(error) => item.target.record(Method::Rst, Err(send_error(error))),
            }
        }
        sent
    }
}

impl Executor for Rst {
    fn method(&self) -> Method {
        Method::Rst
    }

    /// The capacity of one capture filter: cwkill waits for all answers together.
    fn batch_size(&self) -> usize {
        let most = capture::MAX_PORTS;
        self.reviver.batch_size(most).min(most)
    }

    fn act(&mut self, targets: Vec<&mut Target>, run: &mut MethodRun<'_>) {
        let targets = run.refuse_lost_addresses(targets);
        let Revived { others, probed } = self.reviver.revive(&mut self.duplicator, targets, run);
        let mut resolved = self.resolve(others, false, run);
        resolved.extend(self.resolve(probed, true, run));
        let mut pending = Vec::with_capacity(resolved.len());
        while !resolved.is_empty() && !run.control().interrupted() {
            let rest = resolved.split_off(resolved.len().min(RSTS_AT_ONCE));
            pending.extend(self.send_resets(resolved, run));
            resolved = rest;
        }
        let closed = wait_until_closed(pending, run);
        // Errors do not matter here: from now on the kernel answers every segment of the peer with RST.
        self.wire
            .send(closed.iter().map(Resolved::reset_to_peer).collect());
    }
}

impl Resolved<'_> {
    /// The RST to the local stack, with the peer's address as its source.
    fn reset_to_local(&self) -> Outgoing {
        let Tuple { local, peer } = self.target.socket.id.tuple();
        self.reset(peer, local, self.numbers.rcv_nxt, self.numbers.snd_nxt)
    }

    /// The RST to the peer, with the local address as its source.
    fn reset_to_peer(&self) -> Outgoing {
        let Tuple { local, peer } = self.target.socket.id.tuple();
        self.reset(local, peer, self.numbers.snd_nxt, self.numbers.rcv_nxt)
    }

    /// An RST with ACK, like that of tcp_send_active_reset. The kernel ignores the acknowledgment number in an established
    /// connection, and refuses a wrong one during the handshake.
    fn reset(
        &self,
        from: std::net::SocketAddr,
        to: std::net::SocketAddr,
        seq: Seq,
        ack: Seq,
    ) -> Outgoing {
        Outgoing {
            segment: Segment {
                from,
                to,
                seq,
                ack,
                flags: TcpFlags::RST | TcpFlags::ACK,
                payload_len: 0,
            },
            interface: self.target.socket.id.interface(),
        }
    }
}

impl Wire {
    /// Makes each of the sockets `ids` send an ACK, and captures the ACKs.
    pub(super) fn elicit(
        &mut self,
        ids: &[DiagId],
        run: &MethodRun<'_>,
    ) -> Result<Answers, MethodError> {
        let failure = |error: io::Error| open_error("packet socket", errno_of(&error));
        if self.capture.is_none() && !ids.is_empty() {
            self.capture = Some(Capture::open().map_err(failure)?);
        }
        match &self.capture {
            None => Ok(Answers::default()),
            Some(capture) => {
                elicited_ack::elicit(ids, &mut self.raw, capture, run).map_err(failure)
            }
        }
    }

    /// Sends segments, and ignores errors.
    pub(super) fn send(&mut self, packets: Vec<Outgoing>) {
        let packets = packets.into_iter().map(|packet| ((), packet));
        self.raw.send(packets.collect());
    }
}

/// The numbers that the socket `id` answered with; `None` if no ACK was captured.
pub(super) fn numbers(
    answers: &Result<Answers, MethodError>,
    id: &DiagId,
) -> Result<Option<Numbers>, MethodError> {
    match answers.as_ref().map_err(MethodError::clone)?.of(id) {
        Answer::Numbers(numbers) => Ok(Some(numbers)),
        Answer::None => Ok(None),
        Answer::NotSent(error) => Err(send_error(error)),
        Answer::NotAsked => Err(MethodError::SystemCall(
            "instead of it, another socket with its addresses was asked",
            Errno::EADDRINUSE,
        )),
    }
}

/// Waits until the sockets of `pending` are gone, at most for the grace. Records the attempt of each, and returns those that
/// are gone. Unless the host is busy, the local stack handles a packet on `lo` before send(2) returns.
fn wait_until_closed<'t>(pending: Vec<Resolved<'t>>, run: &mut MethodRun<'_>) -> Vec<Resolved<'t>> {
    let note_closed = |target: &mut Target, now: &Lookup| {
        let is_closed = matches!(now, Err(LookupError::NotFound));
        if is_closed {
            target.record(Method::Rst, Ok(()));
        }
        is_closed
    };
    let backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    let (closed, left) = run.wait_until(pending, backoff, note_closed);
    for item in left {
        item.target
            .record(Method::Rst, Err(MethodError::RstIgnored));
    }
    closed
}

fn send_error(error: SendError) -> MethodError {
    match error {
        SendError::Open(errno) => open_error("raw socket", errno),
        SendError::Send(Errno::EPERM) => {
            MethodError::SystemCall("raw socket: dropped in nftables' output hook", Errno::EPERM)
        }
        SendError::Send(errno) => MethodError::SystemCall("raw socket", errno),
    }
}

fn open_error(what: &'static str, errno: Errno) -> MethodError {
    match errno {
        Errno::EPERM => privileges::not_permitted(Privilege::NetRaw, errno),
        _ => MethodError::SystemCall(what, errno),
    }
}
