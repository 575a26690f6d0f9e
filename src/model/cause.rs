//! Why a socket is stuck and for how long, from what the kernel already knows. Pure.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use crate::sock_diag::SocketMessage;
use crate::tcp::TcpState;

/// Why a socket is stuck.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Cause {
    /// In the accept queue of a listener: no descriptor exists, the listener's owner is the culprit.
    NotAccepted,
    /// The peer has not finished the handshake; there is no connection to accept yet. Only in SYN-RECV.
    Handshake,
    /// Bytes are still queued to the peer.
    Sending,
    /// The application has not read to the end: an idle pool or a blocked worker.
    Unread,
    /// The application has read everything and still holds the descriptor: the classic leak.
    Drained,
    /// A listener, which is not stuck at all.
    Listening,
    /// Closed by its owner; only the kernel still has it. Never in CLOSE-WAIT.
    Orphan,
}

const NAMES: [(Cause, &str); 7] = [
    (Cause::Listening, "listening"),
    (Cause::NotAccepted, "not-accepted"),
    (Cause::Handshake, "handshake"),
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

    /// Whether the socket is still with its listener, which then stands for its owner.
    pub fn is_with_listener(self) -> bool {
        matches!(self, Cause::NotAccepted | Cause::Handshake)
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
        (_, TcpState::Listen) => Cause::Listening,
        // A connection gets its inode with its descriptor, in accept(); before that it can only be
        // opened, or closed by the peer. In any other state the owner had one and closed it.
        (0, TcpState::SynRecv) => Cause::Handshake,
        (0, TcpState::Established | TcpState::CloseWait) => Cause::NotAccepted,
        (0, _) => Cause::Orphan,
        _ if unsent(message.state, message.send_q) > 0 => Cause::Sending,
        _ if message.recv_q > 0 => Cause::Unread,
        _ => Cause::Drained,
    }
}

/// A lower bound on the time a socket has been stuck; `None` when the kernel gives no TCP_INFO, or the socket has never
/// heard of a peer: then the kernel counts from its own start.
///
/// In CLOSE-WAIT it is the time since the last acceptable segment: every segment that can follow the
/// FIN only makes it smaller. In a state in which data can still flow it is the time since anything
/// moved in either direction.
pub fn age(message: &SocketMessage) -> Option<Duration> {
    let quiet = message.quiet?;
    Some(match message.state {
        TcpState::Listen | TcpState::SynSent => return None,
        TcpState::CloseWait => quiet.last_ack_recv,
        _ => quiet
            .last_ack_recv
            .min(quiet.last_data_recv)
            .min(quiet.last_data_sent),
    })
}

/// Whether the owner has closed the socket while the kernel still sends for it (SOCK_DEAD).
pub fn is_orphan(message: &SocketMessage) -> bool {
    let sending = [TcpState::FinWait1, TcpState::LastAck, TcpState::Closing];
    message.inode == 0 && sending.contains(&message.state)
}

/// Bytes of the application that an abort would lose: `send_q` without our own FIN, which the kernel
/// counts once it is sent (RFC 9293 §3.4: SYN and FIN occupy sequence numbers).
pub fn unsent(state: TcpState, send_q: u32) -> u32 {
    match state {
        TcpState::LastAck | TcpState::FinWait1 | TcpState::Closing | TcpState::SynSent => {
            send_q.saturating_sub(1)
        }
        // There it is the limit of the backlog.
        TcpState::Listen => 0,
        _ => send_q,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sock_diag::testdata::stuck;

    fn message(state: TcpState, inode: u32, recv_q: u32, send_q: u32) -> SocketMessage {
        SocketMessage {
            state,
            inode,
            recv_q,
            send_q,
            ..stuck("10.0.0.1:80", "10.0.0.2:5", 1)
        }
    }

    #[test]
    fn causes() {
        use TcpState::{CloseWait, Established, LastAck};
        let cases = [
            (message(CloseWait, 0, 1, 0), Cause::NotAccepted),
            (message(CloseWait, 0, 1, 9), Cause::NotAccepted),
            (message(Established, 0, 1, 0), Cause::NotAccepted),
            (message(TcpState::SynRecv, 0, 0, 0), Cause::Handshake),
            (message(LastAck, 0, 0, 1), Cause::Orphan),
            (message(CloseWait, 7, 1, 9), Cause::Sending),
            (message(CloseWait, 7, 1, 0), Cause::Unread),
            (message(CloseWait, 7, 0, 0), Cause::Drained),
            (message(LastAck, 7, 0, 1), Cause::Drained),
            (message(LastAck, 7, 0, 2), Cause::Sending),
        ];
        for (message, expected) in cases {
            assert_eq!(cause(&message), expected, "{message:?}");
        }
    }

    #[test]
    fn names_round_trip() {
        for (cause, name) in NAMES {
            assert_eq!(name.parse(), Ok(cause));
        }
    }

    #[test]
    fn in_close_wait_only_the_last_segment_counts() {
        let mut message = message(TcpState::CloseWait, 7, 1, 0);
        let quiet = message.quiet.as_mut().unwrap();
        quiet.last_ack_recv = Duration::from_secs(5);
        quiet.last_data_recv = Duration::from_millis(1);
        assert_eq!(age(&message), Some(Duration::from_secs(5)));
        message.state = TcpState::Established;
        assert_eq!(age(&message), Some(Duration::from_millis(1)));
        message.quiet = None;
        assert_eq!(age(&message), None);
    }

    #[test]
    fn our_own_fin_is_no_data() {
        assert_eq!(unsent(TcpState::LastAck, 1), 0);
        assert_eq!(unsent(TcpState::LastAck, 11), 10);
        assert_eq!(unsent(TcpState::CloseWait, 1), 1);
    }
}
