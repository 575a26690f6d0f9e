//! A socket, from the kernel's tables.

use std::cmp::Ordering;
use std::collections::HashSet;
use std::time::Duration;

use crate::model::Cause;
use crate::routes::Place;
use crate::sock_diag::{Cookie, DiagId, SocketMessage};
use crate::tcp::{TcpState, Tuple};

/// A matched socket, at the time when the kernel listed it.
#[derive(Clone, Debug)]
pub struct Socket {
    /// Its address pair, interface and cookie. cwkill sends them back to the kernel unchanged.
    pub id: DiagId,
    /// Index of its network namespace in [`crate::model::Scan::namespaces`].
    pub netns: usize,
    pub state: TcpState,
    /// Unread bytes. A FIN counts as one byte. See [`SocketMessage::recv_q`].
    pub recv_q: u32,
    /// Written bytes that the peer has not acknowledged. See [`SocketMessage::send_q`].
    pub send_q: u32,
    /// The user of the socket's inode. For a socket that was never accepted: the user of its listener's inode.
    pub uid: u32,
    /// The cgroup v2 in which the socket was made. See [`SocketMessage::cgroup`].
    pub cgroup_id: Option<u64>,
    /// The inode; `None` if no descriptor exists.
    pub inode: Option<u32>,
    /// A lower bound of the time for which it has been stuck. See [`age`].
    pub age: Option<Duration>,
    pub cause: Cause,
    /// Whether it may have a local address that is not of this host (IP_TRANSPARENT); `None` if the kernel does not report it.
    pub transparent: Option<bool>,
    /// Its local address is not an address of this host any more. The finder sets it; `false` also means unknown.
    pub address_gone: bool,
}

impl Socket {
    /// The socket that `message` describes, in the first namespace. The finder sets the namespace later.
    pub fn from_message(message: &SocketMessage) -> Socket {
        Socket {
            id: message.id,
            netns: 0,
            state: message.state,
            recv_q: message.recv_q,
            send_q: message.send_q,
            uid: message.uid,
            cgroup_id: message.cgroup,
            inode: (message.inode != 0).then_some(message.inode),
            age: age(message),
            cause: Cause::of(message),
            transparent: message.transparent,
            address_gone: false,
        }
    }

    /// The order that puts the oldest socket first.
    pub fn oldest_first(&self, other: &Socket) -> Ordering {
        let by_age = other.age.cmp(&self.age);
        by_age
            .then_with(|| self.netns.cmp(&other.netns))
            .then_with(|| self.tuple().cmp(&other.tuple()))
    }

    pub fn tuple(&self) -> Tuple {
        self.id.tuple()
    }

    pub fn cookie(&self) -> Cookie {
        self.id.cookie()
    }

    /// Its local address, as a question for the kernel's routes.
    pub fn place(&self) -> Place {
        Place {
            address: self.tuple().local.ip(),
            interface: self.id.interface(),
        }
    }

    /// Whether its local address has gone, if the places in `not_local` are not of this host. A transparent proxy uses addresses
    /// of others on purpose, and a rule brings it their packets.
    pub fn is_gone_with(&self, not_local: &HashSet<Place>) -> bool {
        self.transparent == Some(false) && not_local.contains(&self.place())
    }

    /// Whether the connection uses IPv4, on a socket of either family.
    pub fn is_ipv4(&self) -> bool {
        self.tuple().local.is_ipv4()
    }
}

/// A lower bound of the time for which a socket has been stuck. `None` if the kernel sends no TCP_INFO, or if no segment of a peer
/// has arrived yet: then the kernel counts from boot.
///
/// In CLOSE-WAIT it is the time since the last acceptable segment. That is at most the time since the FIN, because a segment after
/// the FIN only makes it shorter. In a state in which data can still flow, it is the time since the last data or ACK in either
/// direction.
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

/// Whether a socket in `state` with this inode is an orphan (SOCK_DEAD) for which the kernel still sends.
pub fn is_sending_orphan(state: TcpState, inode: u32) -> bool {
    let sending = [TcpState::FinWait1, TcpState::LastAck, TcpState::Closing];
    inode == 0 && sending.contains(&state)
}

/// The bytes of the application that an abort would lose: `send_q` without the socket's own SYN or FIN, which the kernel counts once
/// it is sent (RFC 9293 §3.4: SYN and FIN occupy sequence numbers).
pub fn unsent(state: TcpState, send_q: u32) -> u32 {
    match state {
        TcpState::LastAck | TcpState::FinWait1 | TcpState::Closing | TcpState::SynSent => {
            send_q.saturating_sub(1)
        }
        // For a listener, `send_q` is the limit of the backlog.
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
    fn the_own_fin_is_not_data() {
        assert_eq!(unsent(TcpState::LastAck, 1), 0);
        assert_eq!(unsent(TcpState::LastAck, 11), 10);
        assert_eq!(unsent(TcpState::CloseWait, 1), 1);
    }
}
