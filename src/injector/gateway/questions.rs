//! The questions to the ends of a batch of connections, and what follows from the answers. Pure: the caller sends what is due, and feeds the
//! segments that it captures.
//!
//! A question is a bare ACK with random numbers. An end that has the connection answers with an ACK that carries its exact numbers (RFC 9293
//! §3.10.7.4), once per net.ipv4.tcp_invalid_ratelimit. One that does not have it answers RST, whose sequence number is the random
//! acknowledgment number of the question, each time. An RST at the number that the end expects ends its connection (RFC 5961 §3.2); the
//! next question shows whether it did.
//!
//! A SYN that passes opens a new connection with the same addresses. From then on an answer could be of the new one, so nothing more is asked
//! and nothing is sent. The SYN is captured before any answer of the new connection, because both arrive at this host. The id of the
//! entry does not tell the two apart: it is made of the addresses and of the place in memory, which the kernel gives to the next entry
//! (measured on Linux 6.18).

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::model::{EndReport, EndState, ForwardedAct};
use crate::tcp::{Segment, Seq, TcpFlags, Tuple};

/// The RSTs that an end gets at most: data in flight moves the numbers.
const MAX_RESETS: u8 = 3;
/// The questions to which an end may be silent, one after the other.
const MAX_SILENCES: u8 = 2;

/// One end of a connection.
#[derive(Debug)]
struct End {
    /// What the end sees; `local` is the end.
    view: Tuple,
    report: EndReport,
    /// The acknowledgment number of each question that was sent: an RST must have one of them.
    nonces: Vec<Seq>,
    /// Whether it is asked once more because the other end has forgotten the connection.
    is_asked_again: bool,
    /// When it is asked again; `None`: no more.
    due: Option<Instant>,
    /// From when on an ACK counts as an answer to the last question: one that was on its way before an RST says nothing.
    deaf_until: Option<Instant>,
    silences: u8,
}

/// The ends of a batch: two for each connection.
#[derive(Debug)]
pub(super) struct Questions {
    act: ForwardedAct,
    /// The time after which an end answers again.
    retry: Duration,
    ends: Vec<End>,
    by_view: HashMap<Tuple, usize>,
    /// Whether a new connection has the addresses, for each connection.
    reopened: Vec<bool>,
}

impl Questions {
    /// Each of `views` has the two views of one connection. All are due at once.
    pub fn new(act: ForwardedAct, views: &[[Tuple; 2]], retry: Duration, now: Instant) -> Self {
        let end = |view: &Tuple| End {
            view: *view,
            report: EndReport::default(),
            nonces: Vec::new(),
            is_asked_again: false,
            due: Some(now),
            deaf_until: None,
            silences: 0,
        };
        let ends: Vec<End> = views.iter().flatten().map(end).collect();
        let by_view = ends.iter().enumerate();
        let by_view = by_view.map(|(index, end)| (end.view, index)).collect();
        Questions {
            act,
            retry,
            ends,
            by_view,
            reopened: vec![false; views.len()],
        }
    }

    /// Whether a new connection has the addresses of the connection with this index, or its entry has vanished.
    pub fn is_reopened(&self, connection: usize) -> bool {
        self.reopened[connection]
    }

    /// The reports of both ends of the connection with this index.
    pub fn reports(&self, connection: usize) -> [EndReport; 2] {
        [0, 1].map(|side| self.ends[connection * 2 + side].report)
    }

    /// The entry of the connection of this end has vanished, so no RST was sent: nothing more is asked.
    pub fn stop(&mut self, index: usize) {
        self.reopened[index / 2] = true;
        let end = &mut self.ends[index];
        end.report.resets = end.report.resets.saturating_sub(1);
        end.due = None;
        self.ends[index ^ 1].due = None;
    }

    /// When the next question is due; `None` if nothing more is to be asked.
    pub fn next_due(&self) -> Option<Instant> {
        self.ends.iter().filter_map(|end| end.due).min()
    }

    /// The ends that are due, by index.
    pub fn due(&self, now: Instant) -> Vec<usize> {
        let is_due = |(_, end): &(usize, &End)| end.due.is_some_and(|due| due <= now);
        let ends = self.ends.iter().enumerate();
        ends.filter(is_due).map(|(index, _)| index).collect()
    }

    /// The next question to an end that is due, with random numbers; `None` if its silence says enough.
    pub fn ask(&mut self, index: usize, seq: Seq, nonce: Seq, now: Instant) -> Option<Segment> {
        let retry = self.retry;
        let end = &mut self.ends[index];
        if end.silences >= MAX_SILENCES {
            end.due = None;
            end.report.now = match end.report.first {
                EndState::Alive => EndState::Quiet,
                _ => EndState::Silent,
            };
            if end.report.first == EndState::NotAsked {
                end.report.first = EndState::Silent;
            }
            self.settle(index, now);
            return None;
        }
        end.silences += 1;
        end.nonces.push(nonce);
        end.due = Some(now + retry);
        Some(question(end.view, seq, nonce))
    }

    /// The question could not be sent: the end is not asked again.
    pub fn not_sent(&mut self, index: usize) {
        self.ends[index].due = None;
    }

    /// A SYN has passed this host.
    pub fn note_syn(&mut self, segment: &Segment) {
        let view = Tuple {
            local: segment.from,
            peer: segment.to,
        };
        if let Some(&index) = self.by_view.get(&view) {
            self.reopened[index / 2] = true;
            self.ends[index].due = None;
            self.ends[index ^ 1].due = None;
        }
    }

    /// What to send to the end after a segment that has passed this host; empty if nothing.
    pub fn note(
        &mut self,
        segment: &Segment,
        seq: Seq,
        nonce: Seq,
        now: Instant,
    ) -> Vec<(usize, Segment)> {
        let view = Tuple {
            local: segment.from,
            peer: segment.to,
        };
        let Some(&index) = self.by_view.get(&view) else {
            return Vec::new();
        };
        let control = TcpFlags::SYN | TcpFlags::RST | TcpFlags::FIN | TcpFlags::ACK;
        let end = &mut self.ends[index];
        if end.due.is_none() {
            return Vec::new();
        }
        match segment.flags & control {
            // Only the end itself knows the number. One with ACK would be of a connection.
            TcpFlags::RST if end.nonces.contains(&segment.seq) => {
                end.report.now = EndState::Gone;
                if end.report.first == EndState::NotAsked {
                    end.report.first = EndState::Gone;
                }
                end.due = None;
                self.settle(index, now);
                Vec::new()
            }
            TcpFlags::ACK if end.deaf_until.is_none_or(|until| until <= now) => {
                self.answered(index, segment, seq, nonce, now)
            }
            _ => Vec::new(),
        }
    }

    /// The end has the connection, and has told its numbers.
    fn answered(
        &mut self,
        index: usize,
        segment: &Segment,
        seq: Seq,
        nonce: Seq,
        now: Instant,
    ) -> Vec<(usize, Segment)> {
        let retry = self.retry;
        let end = &mut self.ends[index];
        end.report.now = EndState::Alive;
        if end.report.first == EndState::NotAsked {
            end.report.first = EndState::Alive;
        }
        end.silences = 0;
        if self.act == ForwardedAct::Probe || end.report.resets >= MAX_RESETS {
            end.due = None;
            self.settle(index, now);
            return Vec::new();
        }
        // The RST and the next question take the same way. If the RST ends the connection, the question is answered with RST.
        end.report.resets += 1;
        end.silences = 1;
        end.nonces.push(nonce);
        end.due = Some(now + retry);
        end.deaf_until = Some(now + retry);
        vec![
            (index, reset(end.view, segment.ack)),
            (index, question(end.view, seq, nonce)),
        ]
    }

    /// If one end has forgotten a connection that is only probed, the other is asked again: the RST of the first may have reached it. If it
    /// has not, the other is left alone. What answers RST in the place of an end (a firewall, a proxy, another host behind the same address)
    /// does not show that the end has forgotten it.
    fn settle(&mut self, index: usize, now: Instant) {
        if self.reopened[index / 2] {
            return;
        }
        let other = index ^ 1;
        let (one, two) = (self.ends[index].report, self.ends[other].report);
        if self.act != ForwardedAct::Probe
            || self.ends[index].due.is_some()
            || self.ends[other].due.is_some()
        {
            return;
        }
        let living = match (one.now, two.now) {
            (EndState::Alive, EndState::Gone) => index,
            (EndState::Gone, EndState::Alive) => other,
            _ => return,
        };
        let retry = self.retry;
        let end = &mut self.ends[living];
        if end.is_asked_again {
            return;
        }
        end.is_asked_again = true;
        end.silences = 0;
        // At once: one that is gone answers without a limit. Only an answer after the limit counts as life.
        end.due = Some(now);
        end.deaf_until = Some(now + retry);
    }
}

fn question(view: Tuple, seq: Seq, nonce: Seq) -> Segment {
    Segment {
        from: view.peer,
        to: view.local,
        seq,
        ack: nonce,
        flags: TcpFlags::ACK,
        payload_len: 0,
    }
}

/// An RST without ACK: an end that has just sent a SYN with the same addresses discards it (RFC 9293 §3.10.7.3).
fn reset(view: Tuple, seq: Seq) -> Segment {
    Segment {
        from: view.peer,
        to: view.local,
        seq,
        ack: Seq(0),
        flags: TcpFlags::RST,
        payload_len: 0,
    }
}

#[cfg(test)]
#[path = "questions_tests.rs"]
mod tests;
