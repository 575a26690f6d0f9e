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
/// How often the verification of a connection may be spoilt by losses before it is given up: a host that cannot read all that arrives must
/// not get ever more answers.
const MAX_LOSSES: u8 = 3;

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
    connections: Vec<Connection>,
}

/// What is known of a connection besides its ends.
#[derive(Clone, Copy, Debug, Default)]
struct Connection {
    standing: Standing,
    /// Segments were lost at any time since it was looked up, also after the last answer. The entry with its id may be that of a new one.
    has_lost: bool,
}

/// Whether answers are of the connection itself, and why it is not asked any more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Standing {
    /// They are, because no SYN has passed.
    #[default]
    Sure,
    /// Segments were lost after it was reset: an answer may be of a new connection, so nothing is reset any more.
    OnlyVerified { losses: u8 },
    /// Segments were lost, so nobody can tell what became of it.
    Lost,
    /// The operator wanted to stop before it was reset.
    Cancelled,
    /// A new connection has the addresses.
    Reopened,
    /// Its entry had vanished before the first RST.
    Vanished,
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
            connections: vec![Connection::default(); views.len()],
        }
    }

    /// Whether the connection with this index has ended by itself: a new one has its addresses, or its entry has vanished.
    pub fn has_ended(&self, connection: usize) -> bool {
        let standing = self.connections[connection].standing;
        matches!(standing, Standing::Reopened | Standing::Vanished)
    }

    /// Whether the connection with this index was left because the operator wanted to stop.
    pub fn is_cancelled(&self, connection: usize) -> bool {
        self.connections[connection].standing == Standing::Cancelled
    }

    /// Whether nobody can tell what became of the connection with this index, because segments were lost.
    pub fn is_lost(&self, connection: usize) -> bool {
        self.connections[connection].standing == Standing::Lost
    }

    /// Whether an answer is sure to be of the old connection.
    pub fn may_reset(&self, connection: usize) -> bool {
        self.connections[connection].standing == Standing::Sure
    }

    /// Whether an entry with the id of this connection is sure to be its own, or what its ends have made of it.
    pub fn may_delete(&self, connection: usize) -> bool {
        !self.connections[connection].has_lost
    }

    /// An RST has left to the end.
    pub fn reset_sent(&mut self, index: usize) {
        self.ends[index].report.resets += 1;
    }

    /// Asks no more about the connections that were not reset. Those that were are verified.
    pub fn cancel(&mut self) {
        for connection in 0..self.connections.len() {
            if !self.is_reset(connection) && self.is_due(connection) {
                self.leave(connection, Standing::Cancelled);
            }
        }
    }

    /// Segments were lost. A SYN of a new connection may have been among them, so no answer counts for an RST any more. What was reset is
    /// asked again, because the answer may have been lost; but not at once, and not for ever.
    pub fn note_loss(&mut self, now: Instant) {
        for connection in 0..self.connections.len() {
            self.connections[connection].has_lost = true;
            // What is known already stays known.
            if !self.is_due(connection) {
                continue;
            }
            if !self.is_reset(connection) {
                self.leave(connection, Standing::Lost);
                continue;
            }
            let mut is_spoilt = false;
            for end in &mut self.ends[connection * 2..][..2] {
                // Without an open question no answer can be lost.
                if end.due.is_some() && end.silences > 0 {
                    end.silences = 0;
                    end.due = Some(now + self.retry);
                    is_spoilt = true;
                }
            }
            let losses = match self.connections[connection].standing {
                Standing::OnlyVerified { losses } => losses,
                _ => 0,
            } + u8::from(is_spoilt);
            match losses < MAX_LOSSES {
                true => {
                    self.connections[connection].standing = Standing::OnlyVerified { losses };
                }
                false => self.leave(connection, Standing::Lost),
            }
        }
    }

    /// Nothing can be captured any more.
    pub fn give_up(&mut self) {
        for connection in 0..self.connections.len() {
            self.connections[connection].has_lost = true;
            if self.is_due(connection) {
                self.leave(connection, Standing::Lost);
            }
        }
    }

    fn is_reset(&self, connection: usize) -> bool {
        let mut ends = self.ends[connection * 2..][..2].iter();
        ends.any(|end| end.report.resets > 0)
    }

    fn is_due(&self, connection: usize) -> bool {
        let mut ends = self.ends[connection * 2..][..2].iter();
        ends.any(|end| end.due.is_some())
    }

    /// Asks neither end of a connection again, for this reason.
    fn leave(&mut self, connection: usize, standing: Standing) {
        self.connections[connection].standing = standing;
        self.ask_no_more(connection);
    }

    fn ask_no_more(&mut self, connection: usize) {
        for end in &mut self.ends[connection * 2..][..2] {
            end.due = None;
        }
    }

    /// The reports of both ends of the connection with this index.
    pub fn reports(&self, connection: usize) -> [EndReport; 2] {
        [0, 1].map(|side| self.ends[connection * 2 + side].report)
    }

    /// The entry of the connection with this index has vanished, so no RST was sent: nothing more is asked.
    pub fn note_vanished(&mut self, connection: usize) {
        self.leave(connection, Standing::Vanished);
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

    /// The next question to an end that is due, with random numbers; `None` if its silence says enough, or it is not due any more.
    pub fn ask(&mut self, index: usize, seq: Seq, nonce: Seq, now: Instant) -> Option<Segment> {
        let retry = self.retry;
        let end = &mut self.ends[index];
        // It was due, but an answer has come meanwhile.
        end.due.filter(|due| *due <= now)?;
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

    /// A segment could not be sent: the end is not asked again. If nothing was reset, the other end is left alone too.
    pub fn not_sent(&mut self, index: usize) {
        self.ends[index].due = None;
        if !self.is_reset(index / 2) {
            self.ask_no_more(index / 2);
        }
    }

    /// A SYN has passed this host.
    pub fn note_syn(&mut self, segment: &Segment) {
        let view = Tuple {
            local: segment.from,
            peer: segment.to,
        };
        if let Some(&index) = self.by_view.get(&view) {
            self.leave(index / 2, Standing::Reopened);
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
        let is_sure = self.connections[index / 2].standing == Standing::Sure;
        if self.act == ForwardedAct::Probe || !is_sure || end.report.resets >= MAX_RESETS {
            end.due = None;
            self.settle(index, now);
            return Vec::new();
        }
        // The RST and the next question take the same way. If the RST ends the connection, the question is answered with RST.
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
        if self.has_ended(index / 2) {
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
