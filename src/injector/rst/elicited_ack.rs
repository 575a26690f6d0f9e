//! Sequence numbers from the local stack's answer to an unacceptable segment.
//!
//! cwkill sends a bare ACK with a random sequence number to the local stack, with the peer's address as its source. An
//! existing connection answers with an ACK of `seq = snd_nxt, ack = rcv_nxt` (RFC 9293 §3.10.7.4, "first";
//! net/ipv4/tcp_input.c, tcp_validate_incoming → tcp_send_dupack). cwkill captures this answer on its way out.
//!
//! A SYN would elicit a challenge ACK as well (RFC 5961 §4), but it does harm if the connection is gone by then. A listener
//! would create a request for it, use a slot of its queue and retransmit SYN-ACKs to the peer for a minute. In TIME-WAIT or
//! FIN-WAIT-2 a SYN can end the old connection. A listener answers a bare ACK with an RST that the peer does not accept, and
//! keeps no state. An ACK that is acceptable by chance (one window in 2^32) carries no data and changes nothing, even in a new
//! connection with the same addresses. It does not count for net.ipv4.tcp_challenge_ack_limit either. Measured;
//! docs/decisions/rst-elicits-an-ack.md.
//!
//! A socket answers once per net.ipv4.tcp_invalid_ratelimit. cwkill asks all sockets that have not answered again after that
//! time, until the grace is over.

use std::collections::HashMap;
use std::fs;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::time::Duration;

use super::Numbers;
use crate::control::Backoff;
use crate::injector::engine::MethodRun;
use crate::packet::capture::{Capture, Seen};
use crate::packet::raw::{Outgoing, RawSockets, SendError};
use crate::sock_diag::DiagId;
use crate::tcp::{Segment, Seq, TcpFlags, Tuple};

/// Segments sent before the capture is read. Their answers, each up to 1.3 KiB of kernel memory, fit into the default receive
/// queue (net.core.rmem_default), even if a device delivers each twice.
const SEGMENTS_PER_BURST: usize = 32;
/// Added to net.ipv4.tcp_invalid_ratelimit, because the kernel measures it in jiffies.
const RATELIMIT_MARGIN: Duration = Duration::from_millis(20);
const SHORTEST_RETRY: Duration = Duration::from_millis(100);
const FIRST_PAUSE: Duration = Duration::from_micros(500);
const LONGEST_PAUSE: Duration = Duration::from_millis(10);

/// The answer of one socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    Numbers(Numbers),
    /// No ACK was captured within the grace.
    None,
    /// The segment could not be sent.
    NotSent(SendError),
    /// Another socket with the same addresses was asked, on another interface. The capture cannot distinguish their answers.
    NotAsked,
}

/// Sends a segment to each socket of `ids` and waits for the answers, at most for the grace of `run`.
///
/// # Errors
/// The capture fails.
pub fn elicit(
    ids: &[DiagId],
    raw: &mut RawSockets,
    capture: &Capture,
    run: &MethodRun<'_>,
) -> io::Result<Answers> {
    let tuples: Vec<Tuple> = ids.iter().map(DiagId::tuple).collect();
    capture.filter_for(Seen::Leaving, &tuples)?;
    let mut answers = Answers::new(ids);
    let control = run.control();
    let over = run.deadline();
    let retry = retry_after();
    // Random, so that they cannot be predicted. The acknowledgment number becomes the sequence number of a listener's RST.
    let random = RandomState::new();
    let mut seq = Seq(half(random.hash_one(0)));
    let ack = Seq(half(random.hash_one(1)));
    loop {
        for burst in answers.open().chunks(SEGMENTS_PER_BURST) {
            let segment = |&(tuple, interface)| (tuple, bare_ack(tuple, interface, seq, ack));
            for (tuple, result) in raw.send(burst.iter().map(segment).collect()) {
                answers.sent(tuple, result);
            }
            capture.drain(|segment| answers.note(&segment))?;
        }
        let round_over = over.min(control.now() + retry);
        let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
        while answers.waits() && control.now() < round_over && !control.interrupted() {
            backoff.sleep(control, round_over);
            capture.drain(|segment| answers.note(&segment))?;
        }
        if !answers.waits() || control.now() >= over || control.interrupted() {
            return Ok(answers);
        }
        // The number may have been in the window by chance. Then the opposite one is not.
        seq = seq.opposite();
    }
}

fn bare_ack(tuple: Tuple, interface: u32, seq: Seq, ack: Seq) -> Outgoing {
    Outgoing {
        segment: Segment {
            from: tuple.peer,
            to: tuple.local,
            seq,
            ack,
            flags: TcpFlags::ACK,
            payload_len: 0,
        },
        interface,
    }
}

/// The time after which a socket may answer again.
fn retry_after() -> Duration {
    const DEFAULT_MS: u64 = 500;
    let ratelimit = fs::read_to_string("/proc/sys/net/ipv4/tcp_invalid_ratelimit")
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(DEFAULT_MS);
    (Duration::from_millis(ratelimit) + RATELIMIT_MARGIN).max(SHORTEST_RETRY)
}

#[expect(clippy::cast_possible_truncation, reason = "32 random bits are enough")]
fn half(random: u64) -> u32 {
    random as u32
}

/// The answers so far, by address pair. Pure, so that tests can feed it with any traffic.
#[derive(Default)]
pub struct Answers(HashMap<Tuple, Question>);

struct Question {
    /// The interface to which the socket is bound.
    interface: u32,
    answer: Answer,
}

impl Answers {
    fn new(ids: &[DiagId]) -> Self {
        let question = |id: &DiagId| {
            let question = Question {
                interface: id.interface(),
                answer: Answer::None,
            };
            (id.tuple(), question)
        };
        Answers(ids.iter().map(question).collect())
    }

    /// The answer of a socket.
    pub fn of(&self, id: &DiagId) -> Answer {
        let question = self.0.get(&id.tuple());
        let asked = question.filter(|question| question.interface == id.interface());
        asked.map_or(Answer::NotAsked, |question| question.answer)
    }

    /// The questions without an answer, with the interface of each.
    fn open(&self) -> Vec<(Tuple, u32)> {
        let open =
            |(_, question): &(&Tuple, &Question)| !matches!(question.answer, Answer::Numbers(_));
        let open = self.0.iter().filter(open);
        open.map(|(tuple, question)| (*tuple, question.interface))
            .collect()
    }

    /// Whether an answer can still arrive.
    fn waits(&self) -> bool {
        self.0
            .values()
            .any(|question| question.answer == Answer::None)
    }

    fn sent(&mut self, tuple: Tuple, result: Result<(), SendError>) {
        let Some(question) = self.0.get_mut(&tuple) else {
            return;
        };
        question.answer = match (question.answer, result) {
            (numbers @ Answer::Numbers(_), _) => numbers,
            (_, Ok(())) => Answer::None,
            (_, Err(error)) => Answer::NotSent(error),
        };
    }

    fn note(&mut self, segment: &Segment) {
        let tuple = Tuple {
            local: segment.from,
            peer: segment.to,
        };
        let control = TcpFlags::SYN | TcpFlags::RST | TcpFlags::FIN | TcpFlags::ACK;
        if segment.flags & control != TcpFlags::ACK {
            return;
        }
        let Some(question) = self.0.get_mut(&tuple) else {
            return;
        };
        let seen = Numbers {
            rcv_nxt: segment.ack,
            snd_nxt: segment.end_seq(),
        };
        question.answer = Answer::Numbers(match question.answer {
            // A keepalive or window probe of the socket itself has an older number (tcp_xmit_probe_skb), so the latest number
            // is the right one.
            Answer::Numbers(known) => Numbers {
                rcv_nxt: known.rcv_nxt.later(seen.rcv_nxt),
                snd_nxt: known.snd_nxt.later(seen.snd_nxt),
            },
            _ => seen,
        });
    }
}

#[cfg(test)]
mod tests {
    use nix::errno::Errno;

    use super::*;
    use crate::sock_diag::{Cookie, Family};

    fn id(tuple: Tuple) -> DiagId {
        let family = match tuple.local.is_ipv4() {
            true => Family::V4,
            false => Family::V6,
        };
        DiagId::example(family, tuple, Cookie(1))
    }

    fn tuple(local: &str, peer: &str) -> Tuple {
        Tuple {
            local: local.parse().unwrap(),
            peer: peer.parse().unwrap(),
        }
    }

    fn segment(tuple: Tuple, seq: u32, ack: u32, flags: u8) -> Segment {
        Segment {
            from: tuple.local,
            to: tuple.peer,
            seq: Seq(seq),
            ack: Seq(ack),
            flags,
            payload_len: 0,
        }
    }

    #[test]
    fn only_the_tuple_in_its_direction_is_an_answer() {
        let connection = tuple("10.0.0.1:80", "10.0.0.2:5");
        let mut answers = Answers::new(&[id(connection)]);
        answers.note(&segment(connection.reversed(), 1, 2, TcpFlags::ACK));
        answers.note(&segment(
            tuple("10.0.0.1:80", "10.0.0.2:6"),
            1,
            2,
            TcpFlags::ACK,
        ));
        for flags in [
            TcpFlags::RST,
            TcpFlags::RST | TcpFlags::ACK,
            TcpFlags::SYN | TcpFlags::ACK,
            TcpFlags::FIN | TcpFlags::ACK,
            0,
        ] {
            answers.note(&segment(connection, 1, 2, flags));
        }
        assert!(answers.waits());
        answers.note(&segment(connection, 7, 9, TcpFlags::ACK));
        assert!(!answers.waits());
    }

    #[test]
    fn the_latest_numbers_win() {
        let connection = tuple("[fe80::1]:80", "[fe80::2]:5");
        let id = id(connection);
        let mut answers = Answers::new(&[id]);
        answers.note(&segment(connection, u32::MAX, 9, TcpFlags::ACK));
        answers.note(&segment(connection, 0, 9, TcpFlags::ACK));
        answers.note(&segment(connection, u32::MAX, 9, TcpFlags::ACK));
        let Answer::Numbers(numbers) = answers.of(&id) else {
            panic!("no answer");
        };
        assert_eq!((numbers.rcv_nxt, numbers.snd_nxt), (Seq(9), Seq(0)));
    }

    #[test]
    fn a_question_that_was_not_sent_waits_for_nothing() {
        let connection = tuple("10.0.0.1:80", "10.0.0.2:5");
        let mut answers = Answers::new(&[id(connection)]);
        answers.sent(connection, Err(SendError::Send(Errno::ENETUNREACH)));
        assert!(!answers.waits());
        assert_eq!(answers.open(), [(connection, 0)]);
        answers.sent(connection, Ok(()));
        assert!(answers.waits());
    }
}
