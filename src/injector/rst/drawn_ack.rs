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
use super::capture::Capture;
use super::raw::{Outgoing, RawSockets, SendError};
use crate::injector::Scene;
use crate::tcp::{Segment, Seq, TcpFlags, Tuple};

/// Segments between two looks at the capture: the answers, each up to 1.3 KiB of kernel memory, fit the
/// default receive queue (net.core.rmem_default) even when a device shows each twice.
const BURST: usize = 32;
/// Beyond net.ipv4.tcp_invalid_ratelimit: the kernel measures it in jiffies.
const RATELIMIT_MARGIN: Duration = Duration::from_millis(20);
const SHORTEST_RETRY: Duration = Duration::from_millis(100);
const FIRST_PAUSE: Duration = Duration::from_micros(500);
const LONGEST_PAUSE: Duration = Duration::from_millis(10);

/// A connection to be asked.
#[derive(Clone, Copy, Debug)]
pub struct Question {
    /// Its endpoints.
    pub tuple: Tuple,
    /// The interface it is bound to.
    pub interface: u32,
}

/// What came of a question.
#[derive(Debug)]
pub enum Answer {
    /// The numbers.
    Numbers(Numbers),
    /// Nothing was seen within the grace.
    None,
    /// The question could not be sent.
    NotSent(SendError),
}

/// Asks all `questions` and waits for the answers, at most for the grace of `scene`.
///
/// # Errors
/// The capture fails.
pub fn draw(
    questions: &[Question],
    raw: &mut RawSockets,
    capture: &Capture,
    scene: &dyn Scene,
) -> io::Result<Vec<Answer>> {
    let tuples: Vec<Tuple> = questions.iter().map(|question| question.tuple).collect();
    capture.watch(&tuples)?;
    let mut answers = Answers::new(&tuples);
    let surroundings = scene.surroundings();
    let began = surroundings.now();
    let over = began + scene.grace();
    let retry = retry_after();
    // Random, so that nobody can prepare for them; the acknowledgment number comes back as the
    // sequence number of a listener's RST.
    let random = RandomState::new();
    let mut seq = Seq(half(random.hash_one(0)));
    let ack = Seq(half(random.hash_one(1)));
    loop {
        for burst in answers.open().chunks(BURST) {
            let packets: Vec<Outgoing> = burst
                .iter()
                .map(|&at| bare_ack(&questions[at], seq, ack))
                .collect();
            for (&at, result) in burst.iter().zip(raw.send(&packets)) {
                answers.sent(at, result);
            }
            capture.drain(|segment| answers.see(&segment))?;
        }
        let round_over = over.min(surroundings.now() + retry);
        let mut pause = FIRST_PAUSE;
        while answers.waits() {
            let now = surroundings.now();
            if now >= round_over || surroundings.interrupted() {
                break;
            }
            surroundings.pause(pause.min(round_over - now));
            pause = (pause * 2).min(LONGEST_PAUSE);
            capture.drain(|segment| answers.see(&segment))?;
        }
        if !answers.waits() || surroundings.now() >= over || surroundings.interrupted() {
            return Ok(answers.given);
        }
        // By chance the number was in the window; this one is not then.
        seq = seq.opposite();
    }
}

fn bare_ack(question: &Question, seq: Seq, ack: Seq) -> Outgoing {
    let Tuple { local, peer } = question.tuple;
    Outgoing {
        segment: Segment {
            from: peer,
            to: local,
            seq,
            ack,
            flags: TcpFlags::ACK,
            payload_len: 0,
        },
        interface: question.interface,
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

/// Pairs segments with questions by both addresses and ports in the direction from local to peer.
/// Pure, so that foreign traffic can be played to it.
struct Answers {
    by_tuple: HashMap<Tuple, usize>,
    given: Vec<Answer>,
}

impl Answers {
    fn new(tuples: &[Tuple]) -> Self {
        let place = |(at, tuple): (usize, &Tuple)| (*tuple, at);
        Answers {
            by_tuple: tuples.iter().enumerate().map(place).collect(),
            given: tuples.iter().map(|_| Answer::None).collect(),
        }
    }

    /// The questions without an answer.
    fn open(&self) -> Vec<usize> {
        let open = |&at: &usize| !matches!(self.given[at], Answer::Numbers(_));
        (0..self.given.len()).filter(open).collect()
    }

    /// Whether an answer can still come.
    fn waits(&self) -> bool {
        self.given
            .iter()
            .any(|answer| matches!(answer, Answer::None))
    }

    fn sent(&mut self, at: usize, result: Result<(), SendError>) {
        match (&self.given[at], result) {
            (Answer::Numbers(_), _) => {}
            (_, Ok(())) => self.given[at] = Answer::None,
            (_, Err(error)) => self.given[at] = Answer::NotSent(error),
        }
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
        let Some(&at) = self.by_tuple.get(&tuple) else {
            return;
        };
        let seen = Numbers {
            rcv_nxt: segment.ack,
            snd_nxt: segment.end_seq(),
        };
        self.given[at] = Answer::Numbers(match self.given[at] {
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
    use super::*;

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
        let mut answers = Answers::new(&[mine]);
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
        let mut answers = Answers::new(&[mine]);
        answers.see(&segment(mine, u32::MAX, 9, TcpFlags::ACK));
        answers.see(&segment(mine, 0, 9, TcpFlags::ACK));
        answers.see(&segment(mine, u32::MAX, 9, TcpFlags::ACK));
        let Answer::Numbers(numbers) = answers.given[0] else {
            panic!("no answer");
        };
        assert_eq!((numbers.rcv_nxt, numbers.snd_nxt), (Seq(9), Seq(0)));
    }

    #[test]
    fn a_question_that_was_not_sent_waits_for_nothing() {
        let mut answers = Answers::new(&[tuple("10.0.0.1:80", "10.0.0.2:5")]);
        let unreachable = io::Error::from_raw_os_error(libc::ENETUNREACH);
        answers.sent(0, Err(SendError::Send(unreachable)));
        assert!(!answers.waits());
        assert_eq!(answers.open(), [0]);
        answers.sent(0, Ok(()));
        assert!(answers.waits());
    }
}
