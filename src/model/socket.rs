//! A socket, as the kernel's tables describe it.

use std::cmp::Reverse;
use std::time::Duration;

use crate::model::Cause;
use crate::sock_diag::{Cookie, DiagId, SocketMessage};
use crate::tcp::{TcpState, Tuple};

/// A socket that matches, as it was when the kernel listed it.
#[derive(Clone, Debug)]
pub struct Socket {
    /// Its address pair, interface and cookie, to be sent back to the kernel unchanged.
    pub id: DiagId,
    /// Index of its network namespace in [`crate::model::Scan::namespaces`].
    pub netns: usize,
    /// Its endpoints, IPv4-mapped addresses written as IPv4.
    pub tuple: Tuple,
    /// Its state.
    pub state: TcpState,
    /// Unread bytes, the FIN counted as one. See [`SocketMessage::recv_q`].
    pub recv_q: u32,
    /// Bytes written and not acknowledged. See [`SocketMessage::send_q`].
    pub send_q: u32,
    /// User of the socket's inode; of the listener's, for one that was never accepted.
    pub uid: u32,
    /// The cgroup v2 it was made in. See [`SocketMessage::cgroup`].
    pub cgroup_id: Option<u64>,
    /// Its inode; `None` when no descriptor exists.
    pub inode: Option<u32>,
    /// Lower bound of the time it has been stuck. See [`age`].
    pub age: Option<Duration>,
    /// Why it is stuck.
    pub cause: Cause,
}

impl Socket {
    /// The socket that `message` describes, in the first namespace until the finder says otherwise.
    pub fn from_message(message: &SocketMessage) -> Socket {
        Socket {
            id: message.id,
            netns: 0,
            tuple: message.id.tuple(),
            state: message.state,
            recv_q: message.recv_q,
            send_q: message.send_q,
            uid: message.uid,
            cgroup_id: message.cgroup,
            inode: (message.inode != 0).then_some(message.inode),
            age: age(message),
            cause: Cause::of(message),
        }
    }

    /// The sort key that puts the oldest first.
    pub fn oldest_first(&self) -> impl Ord + use<> {
        (Reverse(self.age), self.netns, self.tuple)
    }

    /// The kernel's identity of the socket.
    pub fn cookie(&self) -> Cookie {
        self.id.cookie()
    }

    /// Whether the connection runs over IPv4, on a socket of either family.
    pub fn is_ipv4(&self) -> bool {
        self.tuple.local.is_ipv4()
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

    #[test]
    fn in_close_wait_only_the_last_segment_counts() {
        let mut message = stuck("10.0.0.1:80", "10.0.0.2:5", 1);
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
