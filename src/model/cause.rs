//! Why a socket is stuck, from the data of the kernel. Pure.

use strum::{Display, EnumString, IntoStaticStr, VariantArray};

use crate::model::socket::unsent;
use crate::sock_diag::SocketMessage;
use crate::tcp::TcpState;

/// Why a socket is stuck.
///
/// Its name in JSON, in `--cause` and in the table is the variant in kebab case.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Display,
    EnumString,
    IntoStaticStr,
    VariantArray,
)]
#[strum(serialize_all = "kebab-case")]
pub enum Cause {
    /// It waits in the accept queue of a listener. No descriptor exists; the owner of the listener must accept it.
    NotAccepted,
    /// The peer has not finished the handshake, so there is no connection to accept yet. Only in SYN-RECV.
    Handshake,
    /// Bytes are still queued to the peer.
    Sending,
    /// The application has not read to the end: an idle pool or a blocked worker.
    Unread,
    /// The application has read everything and still holds the descriptor: the usual leak.
    Drained,
    /// A listener, which is not stuck.
    Listening,
    /// Its owner has closed it; only the kernel still has it. Never in CLOSE-WAIT.
    Orphan,
}

impl Cause {
    /// The causes that `--cause` accepts: cwkill never lists a listener as stuck.
    pub const SELECTABLE: [Cause; 6] = [
        Cause::NotAccepted,
        Cause::Unread,
        Cause::Drained,
        Cause::Sending,
        Cause::Handshake,
        Cause::Orphan,
    ];

    /// The name in JSON, in `--cause` and in the table.
    pub fn name(self) -> &'static str {
        self.into()
    }

    /// Whether no process has accepted the connection. Then the owner of its listener is responsible for it.
    pub fn is_with_listener(self) -> bool {
        matches!(self, Cause::NotAccepted | Cause::Handshake)
    }

    /// The cause for this description by the kernel. A socket that is both unread and sending is `sending`, because that limits
    /// the methods for it.
    pub fn of(message: &SocketMessage) -> Cause {
        match (message.inode, message.state) {
            (_, TcpState::Listen) => Cause::Listening,
            // A connection gets its inode and its descriptor in accept(2). Before accept(2), only the peer can change its state, so
            // in any other state the owner has closed the descriptor.
            (0, TcpState::SynRecv) => Cause::Handshake,
            (0, TcpState::Established | TcpState::CloseWait) => Cause::NotAccepted,
            (0, _) => Cause::Orphan,
            _ if unsent(message.state, message.send_q) > 0 => Cause::Sending,
            _ if message.recv_q > 0 => Cause::Unread,
            _ => Cause::Drained,
        }
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
            assert_eq!(Cause::of(&message), expected, "{message:?}");
        }
    }

    #[test]
    fn names_round_trip() {
        for &cause in Cause::VARIANTS {
            assert_eq!(cause.name().parse(), Ok(cause));
        }
        assert_eq!(Cause::NotAccepted.to_string(), "not-accepted");
    }
}
