//! One connection: it reads a request, sends the answer, and waits for the other end to close. Nothing blocks.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::io::Errno;
use rustix::net::{SendFlags, Shutdown};

use super::message::{Answer, MAX_HEAD, Request, Status, parse};

/// A client that has not sent its request and read the answer within this time is cut off.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// How long to read on after the answer: closing with unread bytes would make the kernel reset the connection, and the client would lose
/// the answer (RFC 9112, 9.6).
const LINGER: Duration = Duration::from_secs(1);

#[derive(Debug)]
enum Phase {
    Reading(Vec<u8>),
    Sending { answer: Answer, sent: usize },
    Lingering,
}

#[derive(Debug)]
pub struct Connection {
    socket: OwnedFd,
    pub began: Instant,
    deadline: Instant,
    phase: Phase,
}

/// The connection is over.
#[derive(Debug, PartialEq, Eq)]
pub struct Over;

impl Connection {
    pub fn new(socket: OwnedFd, now: Instant) -> Self {
        Connection {
            socket,
            began: now,
            deadline: now + PATIENCE,
            phase: Phase::Reading(Vec::new()),
        }
    }

    pub fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Whether it can be closed at once for a new one: its request is not complete, or the kernel has taken all of its answer.
    pub fn may_give_way(&self) -> bool {
        !matches!(self.phase, Phase::Sending { .. })
    }

    /// For what it waits.
    pub fn interest(&self) -> PollFlags {
        match self.phase {
            Phase::Reading(_) | Phase::Lingering => PollFlags::IN,
            Phase::Sending { .. } => PollFlags::OUT,
        }
    }

    /// Goes on as far as it can without waiting.
    ///
    /// # Errors
    /// It is over, and the socket must be closed.
    pub fn proceed(
        &mut self,
        now: Instant,
        answer: &dyn Fn(&Request) -> Answer,
    ) -> Result<(), Over> {
        if let Phase::Reading(head) = &mut self.phase {
            let mut bytes = [0; 2048];
            let mut has_ended = false;
            while head.len() < MAX_HEAD {
                match rustix::io::read(&self.socket, &mut bytes) {
                    Ok(0) => {
                        has_ended = true;
                        break;
                    }
                    Ok(count) => head.extend_from_slice(&bytes[..count]),
                    Err(Errno::INTR) => continue,
                    Err(Errno::AGAIN) => break,
                    Err(_) => return Err(Over),
                }
            }
            self.phase = match parse(head) {
                // The other end will send no request any more.
                Ok(None) if has_ended => return Err(Over),
                Ok(None) => return Ok(()),
                Ok(Some(request)) => Phase::Sending {
                    answer: answer(&request),
                    sent: 0,
                },
                Err(status) => Phase::Sending {
                    answer: Answer::line(status, refusal(status), false),
                    sent: 0,
                },
            };
        }
        if let Phase::Sending { answer, sent } = &mut self.phase {
            loop {
                let rest = answer.rest(*sent);
                if rest.is_empty() {
                    break;
                }
                match rustix::net::send(&self.socket, rest, SendFlags::NOSIGNAL) {
                    Ok(count) => *sent += count,
                    Err(Errno::INTR) => {}
                    Err(Errno::AGAIN) => return Ok(()),
                    Err(_) => return Err(Over),
                }
            }
            rustix::net::shutdown(&self.socket, Shutdown::Write).map_err(|_| Over)?;
            self.deadline = self.deadline.min(now + LINGER);
            self.phase = Phase::Lingering;
        }
        let mut bytes = [0; 2048];
        // A client that sends without end gives way at the deadline.
        match rustix::io::read(&self.socket, &mut bytes) {
            Ok(0) => Err(Over),
            Ok(_) | Err(Errno::AGAIN | Errno::INTR) => Ok(()),
            Err(_) => Err(Over),
        }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn refusal(status: Status) -> &'static str {
    match status {
        Status::MethodNotAllowed => "only GET and HEAD: nothing can be changed over HTTP",
        Status::HeadTooLarge => "the head of the request is too large",
        _ => "this is not a request of HTTP/1.1",
    }
}
