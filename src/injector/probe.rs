//! `probe`: asks the peer whether it still has the connection. If it has not, it answers RST, and the kernel closes the local
//! socket. If it has, it answers ACK, and the socket is left alone.
//!
//! If the socket has an owner, cwkill turns keepalive on through a duplicate of the descriptor, until the kernel has sent one
//! probe: some milliseconds, or up to a second for a socket that has just received something. Then it restores the socket
//! options and closes the duplicate, and waits for the answer without them. If the socket has no owner, cwkill makes the local
//! stack send an ACK to the peer. If that does not close the socket, cwkill sends a keepalive probe with the socket's addresses.
//!
//! A peer that does not answer may still exist. So keepalive must never close the socket itself: cwkill restores the options
//! long before the kernel would send a second probe. Only an RST from the peer closes a socket here.
//!
//! If cwkill gets SIGKILL within these milliseconds, keepalive stays on, with values that do little: a peer that lives is asked
//! again each time it has been quiet for as long as it was now, and one that is silent every nine hours, 127 times.

use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::Executor;
use super::duplicate::Duplicator;
use super::engine::{Lookup, MethodRun, lookup_failed};
use super::keepalive::{self, KEEP_IDLE, Keepalive};
use super::rst::{self, Numbers, Wire};
use crate::control::{Backoff, deadline};
use crate::model::{Method, MethodError, Target};
use crate::packet::capture;
use crate::packet::raw::Outgoing;
use crate::proc::ProcFs;
use crate::sock_diag::{DiagId, LookupError, SocketMessage};
use crate::sys::errno_of;
use crate::tcp::{Segment, TcpFlags};

/// The error of the kernel's times in milliseconds: two jiffies at 100 Hz.
const CLOCK_SLACK: Duration = Duration::from_millis(20);
/// How long lookups are repeated that do not show whether the peer has answered.
const MAX_TIME_IN_DOUBT: Duration = Duration::from_secs(1);
const FIRST_PAUSE: Duration = Duration::from_millis(1);
/// Short, because an interrupted run restores the socket options only after the pause.
const LONGEST_PAUSE: Duration = Duration::from_millis(10);

/// Asks peers whether they still have the connection.
pub struct Probe {
    duplicator: Duplicator,
    wire: Wire,
    batch_size: usize,
}

/// A target that waits for its peer.
struct Asked<'t> {
    target: &'t mut Target,
    /// Keepalive of an owned socket until its probe is sent; the options are restored when this is dropped.
    keepalive: Option<Keepalive>,
    /// The socket before the probe.
    before: SocketMessage,
    since: Instant,
    /// The time until which the peer may answer.
    until: Instant,
}

impl Asked<'_> {
    /// Restores the options of the socket if the kernel has sent the probe.
    fn restore_if_sent(&mut self) {
        self.keepalive.take_if(|keepalive| keepalive.is_sent());
    }

    /// The result of the probe, if `after` shows one. The kernel answered that lookup at an unknown time between `before_lookup`
    /// and `after_lookup`.
    fn verdict(
        &self,
        after: &Lookup,
        before_lookup: Instant,
        after_lookup: Instant,
    ) -> Option<Result<(), MethodError>> {
        let is_over = before_lookup >= self.until;
        match after {
            Err(LookupError::NotFound) => Some(Ok(())),
            Err(LookupError::Errno(errno)) => is_over.then_some(Err(lookup_failed(*errno))),
            // With the earlier time, a segment from before the probe cannot pass for an answer.
            Ok(after) if has_answered(&self.before, after, before_lookup - self.since) => {
                Some(Err(MethodError::PeerAlive))
            }
            Ok(_) if !is_over => None,
            // With the later time, no answer can pass for silence.
            Ok(after) if !has_answered(&self.before, after, after_lookup - self.since) => {
                Some(Err(MethodError::PeerSilent))
            }
            // The lookup took too long to decide. After silence the next method may close the socket, so doubt counts as an answer.
            Ok(_) => (before_lookup >= self.until + MAX_TIME_IN_DOUBT)
                .then_some(Err(MethodError::PeerAlive)),
        }
    }
}

impl AsMut<Target> for Asked<'_> {
    fn as_mut(&mut self) -> &mut Target {
        self.target
    }
}

impl Probe {
    /// `proc` is used to identify owners by their start time.
    pub fn new(proc: ProcFs) -> Self {
        Probe {
            duplicator: Duplicator::new(proc),
            wire: Wire::default(),
            batch_size: keepalive::batch_size(),
        }
    }

    /// Turns keepalive on, through a duplicate of a descriptor of `target`.
    fn ask_by_keepalive(&mut self, target: &Target) -> Result<Keepalive, MethodError> {
        let socket = self.duplicator.socket(target)?;
        Keepalive::start(socket).map_err(|error| keepalive_error(errno_of(&error)))
    }

    /// Makes the local stack send ACKs to the peers of `unowned`, and sends keepalive probes. Returns the targets that wait for
    /// an answer.
    fn ask_by_segments<'t>(
        &mut self,
        unowned: Vec<Asked<'t>>,
        run: &MethodRun<'_>,
    ) -> Vec<Asked<'t>> {
        let ids: Vec<DiagId> = unowned.iter().map(|asked| asked.target.socket.id).collect();
        let answers = self.wire.elicit(&ids, run);
        let mut probes = Vec::new();
        let mut waiting = Vec::with_capacity(unowned.len());
        for asked in unowned {
            let id = asked.target.socket.id;
            match rst::numbers(&answers, &id) {
                Ok(numbers) => {
                    // Without numbers no ACK was captured, but the stack may have sent one. The peer's answer will show it.
                    let probe = |numbers| keepalive_probe(&id, numbers, asked.before.send_q);
                    probes.extend(numbers.map(probe));
                    waiting.push(asked);
                }
                Err(error) => asked.target.record(Method::Probe, Err(error)),
            }
        }
        self.wire.send(probes);
        let until = run.deadline();
        for asked in &mut waiting {
            asked.until = until;
        }
        waiting
    }
}

impl Executor for Probe {
    fn method(&self) -> Method {
        Method::Probe
    }

    fn batch_size(&self) -> usize {
        self.batch_size
    }

    fn act(&mut self, targets: Vec<&mut Target>, run: &mut MethodRun<'_>) {
        let targets = run.refuse_lost_addresses(targets);
        let mut asked = Vec::with_capacity(targets.len());
        let mut unowned = Vec::new();
        for (target, before) in run.lookup(targets) {
            let before = match before {
                Ok(before) => before,
                Err(LookupError::NotFound) => {
                    target.record(Method::Probe, Err(MethodError::Gone));
                    continue;
                }
                Err(LookupError::Errno(errno)) => {
                    target.record(Method::Probe, Err(lookup_failed(errno)));
                    continue;
                }
            };
            if run.control().interrupted() {
                continue;
            }
            let since = run.control().now();
            if target.owners.is_empty() {
                unowned.push(Asked {
                    target,
                    keepalive: None,
                    before,
                    since,
                    until: since,
                });
                continue;
            }
            // For a socket with unacknowledged data the kernel sends no probe (net/ipv4/tcp_timer.c, tcp_keepalive_timer). Its
            // retransmissions have the same effect.
            let keepalive = match before.send_q {
                0 => self.ask_by_keepalive(target).map(Some),
                _ => Ok(None),
            };
            match keepalive {
                Ok(keepalive) => {
                    let idle = before.quiet.map_or(Duration::ZERO, |quiet| {
                        quiet.last_ack_recv.min(quiet.last_data_recv)
                    });
                    asked.push(Asked {
                        target,
                        keepalive,
                        before,
                        since,
                        until: deadline(since + KEEP_IDLE.saturating_sub(idle), run.grace()),
                    });
                }
                Err(error) => target.record(Method::Probe, Err(error)),
            }
        }
        while !unowned.is_empty() {
            let rest = unowned.split_off(unowned.len().min(capture::MAX_PORTS));
            asked.extend(self.ask_by_segments(unowned, run));
            unowned = rest;
        }
        await_answers(asked, run);
    }
}

/// Waits for each of `asked` until the socket is gone, the peer has answered, or the time is over. Records the attempts.
fn await_answers(mut asked: Vec<Asked<'_>>, run: &mut MethodRun<'_>) {
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    loop {
        // On a busy machine much time can pass between these two and the kernel's answer to the lookup.
        let before_lookup = run.control().now();
        let answers = run.lookup(asked);
        let after_lookup = run.control().now();
        let interrupted = run.control().interrupted();
        asked = Vec::new();
        for (mut item, after) in answers {
            match item.verdict(&after, before_lookup, after_lookup) {
                Some(result) => item.target.record(Method::Probe, result),
                None if interrupted => {}
                None => {
                    item.restore_if_sent();
                    asked.push(item);
                }
            }
        }
        if asked.is_empty() {
            return;
        }
        backoff.sleep(run.control(), after_lookup + LONGEST_PAUSE);
    }
}

/// Whether an acceptable segment of the peer has arrived since the probe, if `passed` is the time from the probe to the lookup
/// of `after`. `before` is the socket before the probe.
///
/// Only a segment that passes tcp_ack resets the time (net/ipv4/tcp_input.c, `rcv_tstamp`). The segment that cwkill spoofs to
/// elicit an ACK does not pass it.
fn has_answered(before: &SocketMessage, after: &SocketMessage, passed: Duration) -> bool {
    let (Some(before), Some(after)) = (before.quiet, after.quiet) else {
        return false;
    };
    after.last_ack_recv <= passed
        || after.last_ack_recv + CLOCK_SLACK < before.last_ack_recv + passed
}

/// A segment like the kernel's own keepalive probe. Its sequence number is one that the peer has already acknowledged, so the
/// peer must answer (RFC 9293 §3.8.4; net/ipv4/tcp_output.c, tcp_xmit_probe_skb).
fn keepalive_probe(id: &DiagId, numbers: Numbers, send_q: u32) -> Outgoing {
    let tuple = id.tuple();
    Outgoing {
        segment: Segment {
            from: tuple.local,
            to: tuple.peer,
            // At most snd_una - 1, regardless of the part of send_q that has been sent.
            seq: numbers.snd_nxt.minus(send_q).minus(1),
            ack: numbers.rcv_nxt,
            flags: TcpFlags::ACK,
            payload_len: 0,
        },
        interface: id.interface(),
    }
}

fn keepalive_error(errno: Errno) -> MethodError {
    match errno {
        Errno::ERANGE => MethodError::SystemCall(
            "keepalive values of the socket (from net.ipv4.tcp_keepalive_*?) that could not be restored",
            errno,
        ),
        _ => MethodError::SystemCall("keepalive", errno),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Socket;
    use crate::sock_diag::testdata::stuck;

    const PASSED: Duration = Duration::from_millis(300);

    fn last_ack(millis: u64) -> SocketMessage {
        let mut message = stuck("10.0.0.1:80", "10.0.0.2:5", 1);
        message.quiet.as_mut().unwrap().last_ack_recv = Duration::from_millis(millis);
        message
    }

    #[test]
    fn a_segment_after_the_probe_is_an_answer() {
        assert!(has_answered(&last_ack(60_000), &last_ack(250), PASSED));
        // The lookup came late: the answer is older than the time that had passed before the lookup.
        assert!(has_answered(&last_ack(60_000), &last_ack(5_000), PASSED));
    }

    #[test]
    fn a_segment_before_the_probe_is_no_answer() {
        assert!(!has_answered(&last_ack(60_000), &last_ack(60_300), PASSED));
        assert!(!has_answered(&last_ack(10), &last_ack(310), PASSED));
        // The lookup came late.
        assert!(!has_answered(&last_ack(10), &last_ack(5_010), PASSED));
    }

    /// The verdict on a silent or answering peer from a lookup that the kernel answered `late` after it was asked, at the deadline.
    fn verdict_at_the_deadline(before: u64, after: u64, late: Duration) -> Option<MethodError> {
        let mut target = Target::new(Socket::from_message(&last_ack(before)));
        let since = Instant::now();
        let asked = Asked {
            target: &mut target,
            keepalive: None,
            before: last_ack(before),
            since,
            until: since + PASSED,
        };
        let verdict = asked.verdict(&Ok(last_ack(after)), since + PASSED, since + PASSED + late);
        verdict.map(|result| result.unwrap_err())
    }

    #[test]
    fn a_lookup_that_takes_long_decides_nothing_that_it_does_not_show() {
        let late = Duration::from_secs(5);
        // The kernel answered at the start of the lookup, or at its end.
        for (before, after) in [(60_000, 60_300), (60_000, 65_300), (10, 5_310)] {
            let in_time = verdict_at_the_deadline(before, after, Duration::ZERO);
            assert_eq!(in_time, Some(MethodError::PeerSilent), "{before} {after}");
        }
        // An answer that is younger than the time before the lookup, and one that only the later time shows.
        let alive = Some(MethodError::PeerAlive);
        assert_eq!(verdict_at_the_deadline(60_000, 250, late), alive);
        assert_eq!(verdict_at_the_deadline(60_000, 5_200, late), alive);
        assert_eq!(verdict_at_the_deadline(10, 5_200, late), None);
        assert_eq!(verdict_at_the_deadline(60_000, 60_300, late), None);
    }

    #[test]
    fn a_lookup_that_fails_is_neither_answer_nor_silence() {
        let mut target = Target::new(Socket::from_message(&last_ack(10)));
        let since = Instant::now();
        let asked = Asked {
            target: &mut target,
            keepalive: None,
            before: last_ack(10),
            since,
            until: since + PASSED,
        };
        let failed = Err(LookupError::Errno(Errno::ENOBUFS));
        assert_eq!(asked.verdict(&failed, since, since), None);
        let error = lookup_failed(Errno::ENOBUFS);
        let over = since + PASSED;
        assert_eq!(asked.verdict(&failed, over, over), Some(Err(error)));
        let gone = Err(LookupError::NotFound);
        assert_eq!(asked.verdict(&gone, since, since), Some(Ok(())));
    }

    #[test]
    fn without_the_kernels_times_nothing_is_an_answer() {
        let mut unknown = last_ack(0);
        unknown.quiet = None;
        assert!(!has_answered(&last_ack(60_000), &unknown, PASSED));
        assert!(!has_answered(&unknown, &last_ack(0), PASSED));
    }
}
