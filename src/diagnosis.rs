//! Why a socket is stuck and for how long, from what the kernel already knows. Pure.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::finder::sock_diag::SocketMessage;
use crate::tcp::TcpState;

/// Why a socket is stuck.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Cause {
    /// In the accept queue of a listener: no descriptor exists, the listener's owner is the culprit.
    NotAccepted,
    /// Bytes are still queued to the peer.
    Sending,
    /// The application has not read to the end: an idle pool or a blocked worker.
    Unread,
    /// The application has read everything and still holds the descriptor: the classic leak.
    Drained,
    /// Closed by its owner; only the kernel still has it. Never in CLOSE-WAIT.
    Orphan,
}

const NAMES: [(Cause, &str); 5] = [
    (Cause::NotAccepted, "not-accepted"),
    (Cause::Sending, "sending"),
    (Cause::Unread, "unread"),
    (Cause::Drained, "drained"),
    (Cause::Orphan, "orphan"),
];

impl Cause {
    /// The name in JSON, in `--cause` and in the table.
    pub fn name(self) -> &'static str {
        NAMES
            .iter()
            .find(|row| row.0 == self)
            .expect("every cause is in NAMES")
            .1
    }
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Cause {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        NAMES
            .iter()
            .find(|row| row.1 == text)
            .map(|row| row.0)
            .ok_or(())
    }
}

/// Tells the cause. A socket that is both unread and sending is `sending`: that is what limits what
/// may be done to it.
pub fn cause(message: &SocketMessage) -> Cause {
    match (message.inode, message.state) {
        // A connection gets its inode with its descriptor, in accept(); before that it can only be
        // opened, being opened, or closed by the peer. In any other state the owner had one and
        // closed it.
        (0, TcpState::Established | TcpState::SynRecv | TcpState::CloseWait) => Cause::NotAccepted,
        (0, _) => Cause::Orphan,
        _ if message.send_q > 0 => Cause::Sending,
        _ if message.recv_q > 0 => Cause::Unread,
        _ => Cause::Drained,
    }
}

/// A lower bound on the time a socket has been stuck; `None` when the kernel gives no TCP_INFO.
///
/// In CLOSE-WAIT it is the time since the last acceptable segment: every segment that can follow the
/// FIN only makes it smaller. In a state in which data can still flow it is the time since anything
/// moved in either direction.
pub fn age(message: &SocketMessage) -> Option<Duration> {
    let quiet = message.quiet?;
    Some(match message.state {
        TcpState::CloseWait => quiet.last_ack_recv,
        _ => quiet
            .last_ack_recv
            .min(quiet.last_data_recv)
            .min(quiet.last_data_sent),
    })
}

/// Bytes of the application that an abort would lose: `send_q` without our own FIN, which the kernel
/// counts once it is sent (RFC 9293 §3.4: SYN and FIN occupy sequence numbers).
pub fn unsent(state: TcpState, send_q: u32) -> u32 {
    match state {
        TcpState::LastAck | TcpState::FinWait1 | TcpState::Closing => send_q.saturating_sub(1),
        _ => send_q,
    }
}
