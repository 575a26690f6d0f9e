//! Sequence numbers from the local stack's own answer to a segment that is not acceptable.
//!
//! A spoofed bare ACK with a random sequence number arrives as if from the peer. An existing
//! connection answers it with an ACK of `seq = snd_nxt, ack = rcv_nxt` (RFC 9293 §3.10.7.4, "first";
//! net/ipv4/tcp_input.c, tcp_validate_incoming → tcp_send_dupack), which is seen on its way out.
//!
//! Why an ACK and no SYN, which draws a challenge ACK (RFC 5961 §4): where the connection has gone
//! meanwhile, a listener answers a bare ACK with an RST that nobody accepts and keeps nothing; a SYN
//! would open a request there, take a slot of its queue and retransmit SYN-ACKs to the peer for a
//! minute, and in TIME-WAIT or FIN-WAIT-2 it can end the old connection. An ACK that is acceptable by
//! chance (one window in 2^32) carries no byte and changes nothing, on a stranger's connection of the
//! same addresses as well. It is not counted by net.ipv4.tcp_challenge_ack_limit either.
//! Measured; docs/decisions/rst-elicits-an-ack.md.
//!
//! A socket answers once per net.ipv4.tcp_invalid_ratelimit, so those that have not answered are
//! asked again after that time, all together, until the grace is over.

use std::collections::HashMap;
use std::fs;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::time::Duration;

use super::Numbers;
use crate::control::Backoff;
use crate::injector::engine::Batch;
use crate::packet::capture::Capture;
use crate::packet::raw::{Outgoing, RawSockets, SendError};
use crate::sock_diag::DiagId;
use crate::tcp::{Segment, Seq, TcpFlags, Tuple};

/// Segments between two looks at the capture: the answers, each up to 1.3 KiB of kernel memory, fit the
/// default receive queue (net.core.rmem_default) even when a device shows each twice.
const BURST: usize = 32;
/// Beyond net.ipv4.tcp_invalid_ratelimit: the kernel measures it in jiffies.
const RATELIMIT_MARGIN: Duration = Duration::from_millis(20);
const SHORTEST_RETRY: Duration = Duration::from_millis(100);
const FIRST_PAUSE: Duration = Duration::from_micros(500);
const LONGEST_PAUSE: Duration = Duration::from_millis(10);

/// What came of a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The numbers.
    Numbers(Numbers),
    /// Nothing was seen within the grace.
    None,
    /// The question could not be sent.
    NotSent(SendError),
}

/// Asks the sockets of all `ids` and waits for their answers, at most for the grace of `batch`.
///
/// # Errors
/// The capture fails.
pub fn elicit(
    ids: &[DiagId],
    raw: &mut RawSockets,
    capture: &Capture,
    batch: &Batch<'_>,
) -> io::Result<Answers> {
    let tuples: Vec<Tuple> = ids.iter().map(DiagId::tuple).collect();
    capture.watch(&tuples)?;
    let mut answers = Answers::new(ids);
    let control = batch.control();
    let over = control.now() + batch.grace();
    let retry = retry_after();
    // Random, so that nobody can prepare for them; the acknowledgment number comes back as the
    // sequence number of a listener's RST.
    let random = RandomState::new();
    let mut seq = Seq(half(random.hash_one(0)));
    let ack = Seq(half(random.hash_one(1)));
    loop {
        for burst in answers.open().chunks(BURST) {
            let ask = |&(tuple, interface)| (tuple, bare_ack(tuple, interface, seq, ack));
            for (tuple, result) in raw.send(burst.iter().map(ask).collect()) {
                answers.sent(tuple, result);
            }
            capture.drain(|segment| answers.see(&segment))?;
        }
        let round_over = over.min(control.now() + retry);
        let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
        while answers.waits() && control.now() < round_over && !control.interrupted() {
            backoff.sleep(control, round_over);
            capture.drain(|segment| answers.see(&segment))?;
        }
        if !answers.waits() || control.now() >= over || control.interrupted() {
            return Ok(answers);
        }
        // By chance the number was in the window; this one is not then.
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

/// How long to wait before a socket may answer again.
fn retry_after() -> Duration {
    const DEFAULT_MS: u64 = 500;
    let ratelimit = fs::read_to_string("/proc/sys/net/ipv4/tcp_invalid_ratelimit")
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(DEFAULT_MS);
    (Duration::from_millis(ratelimit) + RATELIMIT_MARGIN).max(SHORTEST_RETRY)
}

#[expect(clippy::cast_possible_truncation, reason = "half of it is wanted")]
fn half(random: u64) -> u32 {
    random as u32
}

/// The answers so far, by both addresses and ports in the direction from local to peer. Pure, so that foreign traffic can be
/// played to it.
#[derive(Default)]
pub struct Answers(HashMap<Tuple, Question>);

struct Question {
    /// The interface its socket is bound to.
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

    /// The answer of the connection with these addresses.
    pub fn of(&self, tuple: &Tuple) -> Answer {
        let question = self.0.get(tuple);
        question.map_or(Answer::None, |question| question.answer)
    }

    /// The questions without an answer, with the interface of each.
    fn open(&self) -> Vec<(Tuple, u32)> {
        let open =
            |(_, question): &(&Tuple, &Question)| !matches!(question.answer, Answer::Numbers(_));
        let open = self.0.iter().filter(open);
        open.map(|(tuple, question)| (*tuple, question.interface))
            .collect()
    }

    /// Whether an answer can still come.
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

    fn see(&mut self, segment: &Segment) {
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
            // A keepalive or window probe of its own has an older number (tcp_xmit_probe_skb); the
            // latest is the true one.
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
        let mine = tuple("10.0.0.1:80", "10.0.0.2:5");
        let mut answers = Answers::new(&[id(mine)]);
        answers.see(&segment(mine.reversed(), 1, 2, TcpFlags::ACK));
        answers.see(&segment(
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
            answers.see(&segment(mine, 1, 2, flags));
        }
        assert!(answers.waits());
        answers.see(&segment(mine, 7, 9, TcpFlags::ACK));
        assert!(!answers.waits());
    }

    #[test]
    fn the_latest_numbers_win() {
        let mine = tuple("[fe80::1]:80", "[fe80::2]:5");
        let mut answers = Answers::new(&[id(mine)]);
        answers.see(&segment(mine, u32::MAX, 9, TcpFlags::ACK));
        answers.see(&segment(mine, 0, 9, TcpFlags::ACK));
        answers.see(&segment(mine, u32::MAX, 9, TcpFlags::ACK));
        let Answer::Numbers(numbers) = answers.of(&mine) else {
            panic!("no answer");
        };
        assert_eq!((numbers.rcv_nxt, numbers.snd_nxt), (Seq(9), Seq(0)));
    }

    #[test]
    fn a_question_that_was_not_sent_waits_for_nothing() {
        let mine = tuple("10.0.0.1:80", "10.0.0.2:5");
        let mut answers = Answers::new(&[id(mine)]);
        answers.sent(mine, Err(SendError::Send(Errno::ENETUNREACH)));
        assert!(!answers.waits());
        assert_eq!(answers.open(), [(mine, 0)]);
        answers.sent(mine, Ok(()));
        assert!(answers.waits());
    }
}
