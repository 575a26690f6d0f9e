//! `rst`: RSTs by raw socket, to the local stack as the peer and to the peer as ourselves.
//!
//! Works with no owner and no SOCK_DESTROY. The numbers come from [`repair`] where a descriptor can be
//! had, else from [`elicited_ack`]. Between them and the RST the socket is looked at once more by its
//! cookie; should its addresses be taken by a new connection after even that, the RST misses: it is
//! accepted at exactly rcv_nxt only (RFC 5961 §3.2), and a connection that is still being opened
//! checks the acknowledgment number as well (net/ipv4/tcp_minisocks.c, tcp_check_req). A listener
//! drops an RST without an answer.
//!
//! The local socket goes first. Only when it is gone is the peer told, so that a half-closed peer is
//! released too; nobody is told of an RST that did not work.

pub mod elicited_ack;
pub mod repair;

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use super::duplicate::Duplicator;
use super::{ActError, Method, MethodName, Scene, Target, same_errno};
use crate::privileges::Privilege;
use crate::proc::ProcFs;
use crate::sock_diag::LookupError;
use crate::tcp::{Segment, Seq, TcpFlags, Tuple};

use crate::packet::capture::{self, Capture};
use crate::packet::raw::{Outgoing, RawSockets, SendError};
use elicited_ack::{Answer, Question};

/// Sockets between the last look and their RSTs.
const SALVO: usize = 64;
const FIRST_PAUSE: Duration = Duration::from_micros(500);
const LONGEST_PAUSE: Duration = Duration::from_millis(20);

/// What an exact RST needs to know of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Numbers {
    /// The next sequence number expected from the peer.
    pub rcv_nxt: Seq,
    /// The next sequence number to be sent to the peer.
    pub snd_nxt: Seq,
}

/// The method.
pub struct Rst {
    /// Repair mode has not been refused yet; it needs CAP_NET_ADMIN.
    may_repair: bool,
    duplicator: Duplicator,
    wire: Wire,
}

/// What sends and sees single segments; opened at first use, kept for all batches.
#[derive(Default)]
pub(super) struct Wire {
    raw: RawSockets,
    capture: Option<Capture>,
}

/// A target on its way.
struct Aimed {
    target: usize,
    numbers: Numbers,
    /// A segment was sent to find the numbers, which may have made the peer answer RST.
    provoked: bool,
}

impl Rst {
    /// The method, with the proc file system that tells one process from the next of its number.
    pub fn new(proc: ProcFs) -> Self {
        Rst {
            may_repair: true,
            duplicator: Duplicator::new(proc),
            wire: Wire::default(),
        }
    }

    /// The numbers of each target, or why there are none.
    fn aim(
        &mut self,
        targets: &[Target],
        scene: &dyn Scene,
        results: &mut [Result<(), ActError>],
    ) -> Vec<Aimed> {
        let mut aimed = Vec::with_capacity(targets.len());
        let mut unowned = Vec::new();
        for (at, target) in targets.iter().enumerate() {
            if scene.control().interrupted() {
                results[at] = Err(ActError::Interrupted);
                continue;
            }
            match self.repair(target) {
                Some(Ok(numbers)) => aimed.push(Aimed {
                    target: at,
                    numbers,
                    provoked: false,
                }),
                // Being checkpointed: it may be alive elsewhere in a moment.
                Some(Err(error)) if error.errno() == Some(libc::EBUSY) => {
                    results[at] = Err(error);
                }
                Some(Err(error)) => unowned.push((at, Some(Box::new(error)))),
                None => unowned.push((at, None)),
            }
        }
        let questions: Vec<Target> = unowned.iter().map(|&(at, _)| targets[at].clone()).collect();
        for ((at, repair), answer) in unowned.into_iter().zip(self.wire.draw(&questions, scene)) {
            match answer {
                Ok(Some(numbers)) => aimed.push(Aimed {
                    target: at,
                    numbers,
                    provoked: true,
                }),
                Ok(None) if scene.control().interrupted() => {
                    results[at] = Err(ActError::Interrupted);
                }
                Ok(None) => results[at] = Err(ActError::NoAck(repair)),
                Err(error) => results[at] = Err(error),
            }
        }
        aimed
    }

    /// The numbers by repair mode; `None` where there is no descriptor or no right to.
    fn repair(&mut self, target: &Target) -> Option<Result<Numbers, ActError>> {
        if !self.may_repair || target.descriptors.is_empty() {
            return None;
        }
        let socket = self.duplicator.socket(target);
        let numbers = socket.and_then(|socket| repair::numbers(socket.as_fd()));
        if matches!(numbers, Err(ActError::Denied(Privilege::NetAdmin, _))) {
            self.may_repair = false;
        }
        Some(numbers)
    }

    /// Sends the RSTs of one salvo, each after a last look, and returns what is left to look at.
    fn fire(
        &mut self,
        salvo: &[Aimed],
        targets: &[Target],
        scene: &mut dyn Scene,
        results: &mut [Result<(), ActError>],
    ) -> Vec<usize> {
        let mut fit = vec![false; salvo.len()];
        for provoked in [false, true] {
            let places: Vec<usize> = (0..salvo.len())
                .filter(|&place| salvo[place].provoked == provoked)
                .collect();
            let asked: Vec<usize> = places.iter().map(|&place| salvo[place].target).collect();
            for (place, still) in places.into_iter().zip(scene.still_fit(&asked, provoked)) {
                fit[place] = still;
            }
        }
        let fit: Vec<&Aimed> = salvo
            .iter()
            .zip(fit)
            .filter_map(|(aimed, fit)| fit.then_some(aimed))
            .collect();
        let as_peer: Vec<Outgoing> = fit
            .iter()
            .map(|aimed| aimed.reset(&targets[aimed.target]).0)
            .collect();
        let mut fired = Vec::with_capacity(fit.len());
        for (aimed, sent) in fit.iter().zip(self.wire.raw.send(&as_peer)) {
            match sent {
                Ok(()) => fired.push(aimed.target),
                Err(error) => results[aimed.target] = Err(send_error(error)),
            }
        }
        fired
    }
}

impl Method for Rst {
    fn name(&self) -> MethodName {
        MethodName::Rst
    }

    /// As many as one filter can watch: the answers of all are waited for together.
    fn batch(&self) -> usize {
        capture::MAX_PORTS
    }

    fn act(&mut self, targets: &[Target], scene: &mut dyn Scene) -> Vec<Result<(), ActError>> {
        let mut results: Vec<Result<(), ActError>> = targets.iter().map(|_| Ok(())).collect();
        let aimed = self.aim(targets, scene, &mut results);
        let mut pending = Vec::with_capacity(aimed.len());
        for salvo in aimed.chunks(SALVO) {
            if scene.control().interrupted() {
                for aimed in salvo {
                    results[aimed.target] = Err(ActError::Interrupted);
                }
                continue;
            }
            pending.extend(self.fire(salvo, targets, scene, &mut results));
        }
        let mut reset = vec![None; targets.len()];
        for aimed in &aimed {
            reset[aimed.target] = Some(aimed.reset(&targets[aimed.target]).1);
        }
        let gone = wait_until_gone(&mut pending, scene);
        for &at in &pending {
            results[at] = Err(ActError::RstIgnored);
        }
        // That the peer cannot be told changes nothing here: whatever it sends from now on is
        // answered with RST.
        let to_peers: Vec<Outgoing> = gone.iter().filter_map(|&at| reset[at]).collect();
        let _ = self.wire.raw.send(&to_peers);
        results
    }
}

impl Aimed {
    /// The RST to the local stack as the peer, and the one to the peer as ourselves.
    ///
    /// Both carry an ACK, as tcp_send_active_reset does: the kernel does not look at it in a
    /// connection, and a connection on its way up refuses a wrong one.
    fn reset(&self, target: &Target) -> (Outgoing, Outgoing) {
        let Numbers { rcv_nxt, snd_nxt } = self.numbers;
        let Tuple { local, peer } = target.id.tuple();
        let reset = |from, to, seq, ack| Outgoing {
            segment: Segment {
                from,
                to,
                seq,
                ack,
                flags: TcpFlags::RST | TcpFlags::ACK,
                payload_len: 0,
            },
            interface: target.id.interface(),
        };
        (
            reset(peer, local, rcv_nxt, snd_nxt),
            reset(local, peer, snd_nxt, rcv_nxt),
        )
    }
}

impl Wire {
    /// Draws an ACK from each of `targets`; its numbers, or `None` where nothing was seen.
    pub(super) fn draw(
        &mut self,
        targets: &[Target],
        scene: &dyn Scene,
    ) -> Vec<Result<Option<Numbers>, ActError>> {
        if targets.is_empty() {
            return Vec::new();
        }
        let questions: Vec<Question> = targets
            .iter()
            .map(|target| Question {
                tuple: target.id.tuple(),
                interface: target.id.interface(),
            })
            .collect();
        let answers = self.open_capture().and_then(|()| {
            let capture = self.capture.as_ref().expect("it was just opened");
            elicited_ack::draw(&questions, &mut self.raw, capture, scene)
        });
        match answers {
            Ok(answers) => answers
                .into_iter()
                .map(|answer| match answer {
                    Answer::Numbers(numbers) => Ok(Some(numbers)),
                    Answer::None => Ok(None),
                    Answer::NotSent(error) => Err(send_error(error)),
                })
                .collect(),
            Err(error) => {
                let failure = || open_error("packet socket", same_errno(&error));
                targets.iter().map(|_| Err(failure())).collect()
            }
        }
    }

    /// Sends segments; what cannot be sent is left out.
    pub(super) fn send(&mut self, packets: &[Outgoing]) {
        let _ = self.raw.send(packets);
    }

    fn open_capture(&mut self) -> io::Result<()> {
        if self.capture.is_none() {
            self.capture = Some(Capture::open()?);
        }
        Ok(())
    }
}

/// Waits until the sockets in `pending` are gone, at most for the grace; takes those that are out of
/// it and returns them. The local stack handles a packet on `lo` before send returns, unless it is busy.
fn wait_until_gone(pending: &mut Vec<usize>, scene: &mut dyn Scene) -> Vec<usize> {
    let over = scene.control().now() + scene.grace();
    let mut gone = Vec::with_capacity(pending.len());
    let mut pause = FIRST_PAUSE;
    loop {
        let looks = scene.look(pending);
        let mut left = Vec::new();
        for (&at, look) in pending.iter().zip(looks) {
            match look {
                Err(LookupError::Gone) => gone.push(at),
                Ok(_) | Err(LookupError::Io(_)) => left.push(at),
            }
        }
        *pending = left;
        let now = scene.control().now();
        if pending.is_empty() || now >= over || scene.control().interrupted() {
            return gone;
        }
        scene.control().sleep(pause.min(over - now));
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

fn send_error(error: SendError) -> ActError {
    match error {
        SendError::Open(error) => open_error("raw socket", error),
        SendError::Send(error) if error.raw_os_error() == Some(libc::EPERM) => {
            ActError::Os("raw socket: dropped in nftables' output hook", error)
        }
        SendError::Send(error) => ActError::Os("raw socket", error),
    }
}

fn open_error(what: &'static str, error: io::Error) -> ActError {
    match error.raw_os_error() {
        Some(libc::EPERM) => ActError::Denied(Privilege::NetRaw, error),
        _ => ActError::Os(what, error),
    }
}
