//! A socket, from the kernel's tables.

use std::collections::HashSet;
use std::time::Duration;

use strum::IntoStaticStr;

use crate::model::Cause;
use crate::routes::Place;
use crate::sock_diag::{ByteCounters, Cookie, DiagId, Protocol, SocketMessage};
use crate::tcp::{TcpState, Tuple};

/// A matched socket, at the time when the kernel listed it.
#[derive(Clone, Debug)]
pub struct Socket {
    /// Its address pair, interface and cookie. cwkill sends them back to the kernel unchanged.
    pub id: DiagId,
    /// Index of its network namespace in [`crate::model::Scan::namespaces`].
    pub netns: usize,
    pub state: TcpState,
    /// If it is a subflow of an MPTCP socket: the token of that socket. See [`SocketMessage::subflow_of`].
    pub subflow_of: Option<u32>,
    /// Unread bytes. A FIN counts as one byte. See [`SocketMessage::recv_q`] and [`SocketMessage::mptcp`].
    pub recv_q: u32,
    /// `recv_q` in the kernel's table, to compare with a later lookup. Of an MPTCP socket it is the memory that the bytes take.
    pub listed_recv_q: u32,
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
    /// How `age` is known.
    pub age_source: TimeSource,
    /// A lower bound of the time for which no data has moved in either direction. See [`idle`].
    pub idle: Option<Duration>,
    /// How `idle` is known.
    pub idle_source: TimeSource,
    /// Its byte counters. See [`SocketMessage::counters`].
    pub counters: Option<ByteCounters>,
    /// For how long it has had its [`Snapshot`], at least, by the history; zero if the history does not have it.
    pub unchanged_for: Duration,
    /// A lower bound of the age of the connection. See [`connected_for`].
    pub connected_for: Option<Duration>,
    pub cause: Cause,
    /// Whether it may have a local address that is not of this host (IP_TRANSPARENT); `None` if the kernel does not report it.
    pub transparent: Option<bool>,
    /// Its local address is not an address of this host any more. The finder sets it; `false` also means unknown.
    pub address_gone: bool,
}

/// How a lower bound of a time is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, IntoStaticStr)]
#[strum(serialize_all = "kebab-case")]
pub enum TimeSource {
    /// From the clocks in `struct tcp_info`.
    Kernel,
    /// From the history: an earlier run saw the socket with the same byte counters.
    History,
}

/// A network namespace, for as long as the host runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NetnsKey {
    /// Its inode in nsfs. The kernel gives the inode of a namespace that is gone to a later one.
    pub inode: u64,
    /// The number that the kernel gives to a namespace and to no later one; 0 before Linux 5.14.
    pub cookie: u64,
}

/// A socket, for as long as the host runs. Before Linux 5.12 the cookie is unique only in its namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SocketKey {
    pub netns: NetnsKey,
    pub cookie: Cookie,
}

/// The facts about a socket that stay the same as long as no data moves in it and its state does not change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Snapshot {
    pub state: TcpState,
    pub recv_q: u32,
    pub counters: ByteCounters,
}

/// A socket of a scan, for its entry in the history. The times are since boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewEntry {
    pub key: SocketKey,
    pub snapshot: Snapshot,
    /// It has been stuck since then, or longer.
    pub stuck_since: Duration,
    /// No data has moved since then, or longer.
    pub idle_since: Duration,
}

/// What a scan adds to the history.
#[derive(Clone, Debug, Default)]
pub struct HistoryUpdate {
    /// The namespaces whose sockets were listed.
    pub namespaces: Vec<NetnsKey>,
    /// One for every listed socket, also if it does not match because of its age, its cause or its owner.
    pub entries: Vec<NewEntry>,
}

impl NewEntry {
    /// `None` if the kernel reports too little. `before` and `after`: from before and after the kernel listed the socket.
    pub fn of(socket: &Socket, netns: NetnsKey, before: Duration, after: Duration) -> Option<Self> {
        let cookie = socket.cookie();
        let since = |time: Duration, source| match source {
            // The time in the history stays: otherwise it would drift from run to run.
            TimeSource::History if !time.is_zero() => before.saturating_sub(time),
            // The kernel counted until it listed the socket, at the latest until `after`.
            _ => after.saturating_sub(time),
        };
        Some(NewEntry {
            key: SocketKey { netns, cookie },
            snapshot: socket.snapshot()?,
            stuck_since: since(socket.age?, socket.age_source),
            idle_since: since(socket.idle?, socket.idle_source),
        })
    }
}

impl TimeSource {
    /// The stable name for programs.
    pub fn name(self) -> &'static str {
        self.into()
    }
}

impl Socket {
    /// The socket that `message` describes, in the first namespace. The finder sets the namespace later.
    pub fn from_message(message: &SocketMessage) -> Socket {
        Socket {
            id: message.id,
            netns: 0,
            state: message.state,
            subflow_of: message.subflow_of,
            recv_q: message.recv_q,
            listed_recv_q: message.recv_q,
            send_q: message.send_q,
            uid: message.uid,
            cgroup_id: message.cgroup,
            inode: (message.inode != 0).then_some(message.inode),
            age: age(message),
            age_source: TimeSource::Kernel,
            idle: idle(message),
            idle_source: TimeSource::Kernel,
            counters: message.counters,
            unchanged_for: Duration::ZERO,
            connected_for: connected_for(message),
            cause: Cause::of(message),
            transparent: message.transparent,
            address_gone: false,
        }
    }

    /// The same socket at a later lookup, which `message` describes. As long as no data has moved since, what was known of its
    /// times stays known: an answer to a keepalive or to a probe of cwkill makes the clocks of the kernel start again, and changes
    /// no counter.
    pub fn later(&self, message: &SocketMessage) -> Socket {
        let mut later = Socket {
            netns: self.netns,
            address_gone: self.address_gone,
            ..Socket::from_message(message)
        };
        match later.is_unchanged_since(self) {
            Some(true) => {
                if self.age > later.age {
                    (later.age, later.age_source) = (self.age, self.age_source);
                }
                if self.idle > later.idle {
                    (later.idle, later.idle_source) = (self.idle, self.idle_source);
                }
            }
            // The clocks of the kernel do not count what the application reads.
            Some(false) => later.idle = later.idle.map(|_| Duration::ZERO),
            None => {}
        }
        later
    }

    /// Whether neither data has moved nor the state has changed since an earlier lookup; `None` if the kernel does not have the
    /// counters.
    pub fn is_unchanged_since(&self, earlier: &Socket) -> Option<bool> {
        Some(self.snapshot()? == earlier.snapshot()?)
    }

    /// `None` if the kernel does not have the counters.
    pub fn snapshot(&self) -> Option<Snapshot> {
        Some(Snapshot {
            state: self.state,
            recv_q: self.listed_recv_q,
            counters: self.counters?,
        })
    }

    /// Whether data has moved within the last `limit`. If that is unknown, yes in a state in which the application uses the
    /// connection.
    pub fn is_in_use(&self, limit: Duration) -> bool {
        let is_used = matches!(self.state, TcpState::Established | TcpState::CloseWait);
        !limit.is_zero() && self.idle.map_or(is_used, |idle| idle < limit)
    }

    /// Whether there are bytes that the application may still read. A FIN is none of them.
    pub fn has_unread_data(&self) -> bool {
        let fin = match self.state {
            TcpState::CloseWait | TcpState::LastAck | TcpState::Closing => 1,
            _ => 0,
        };
        self.inode.is_some() && self.listed_recv_q > fin
    }

    pub fn tuple(&self) -> Tuple {
        self.id.tuple()
    }

    pub fn protocol(&self) -> Protocol {
        self.id.protocol()
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
    pub fn has_lost_address(&self, not_local: &HashSet<Place>) -> bool {
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
/// In CLOSE-WAIT it is the time since the last acceptable ACK. That is at most the time since the FIN, because an ACK after the FIN
/// only makes it shorter. In a state in which data can still flow, it is the time since the last data or ACK in either direction.
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

/// A lower bound of the time for which no data has moved between the two kernels. `None` if the kernel sends no TCP_INFO, or if
/// there is no connection.
///
/// A FIN, a keepalive and a window probe move no data. A retransmission counts as data, although it moves none, so the true time
/// can be longer. Data that the application reads from the receive queue is not seen.
pub fn idle(message: &SocketMessage) -> Option<Duration> {
    let quiet = message.quiet?;
    match message.state {
        TcpState::Listen | TcpState::SynSent => None,
        _ => Some(quiet.last_data_recv.min(quiet.last_data_sent)),
    }
}

/// A lower bound of the time since the connection was made: the longest time since a last event. The kernel sets the times of the
/// last data to that of the handshake (net/ipv4/tcp_minisocks.c, tcp_create_openreq_child; net/ipv4/tcp_input.c,
/// tcp_finish_connect), so without data the bound is exact.
pub fn connected_for(message: &SocketMessage) -> Option<Duration> {
    let quiet = message.quiet?;
    match message.state {
        TcpState::Listen | TcpState::SynSent | TcpState::SynRecv => None,
        _ => Some(
            quiet
                .last_ack_recv
                .max(quiet.last_data_recv)
                .max(quiet.last_data_sent),
        ),
    }
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
    fn only_data_ends_the_idle_time() {
        let mut message = stuck("10.0.0.1:80", "10.0.0.2:5", 1);
        let quiet = message.quiet.as_mut().unwrap();
        quiet.last_ack_recv = Duration::ZERO;
        assert_eq!(idle(&message), Some(Duration::from_secs(3600)));
        let quiet = message.quiet.as_mut().unwrap();
        quiet.last_data_sent = Duration::from_secs(4);
        assert_eq!(idle(&message), Some(Duration::from_secs(4)));
        let socket = Socket::from_message(&message);
        assert!(socket.is_in_use(Duration::from_secs(5)));
        assert!(!socket.is_in_use(Duration::from_secs(4)));
        assert!(!socket.is_in_use(Duration::ZERO));
        message.state = TcpState::SynSent;
        assert_eq!(idle(&message), None);
    }

    #[test]
    fn a_fin_is_not_unread_data() {
        let mut message = stuck("10.0.0.1:80", "10.0.0.2:5", 1);
        let mut has_unread = |state, inode, recv_q| {
            (message.state, message.inode, message.recv_q) = (state, inode, recv_q);
            Socket::from_message(&message).has_unread_data()
        };
        assert!(!has_unread(TcpState::CloseWait, 7, 0));
        assert!(!has_unread(TcpState::CloseWait, 7, 1));
        assert!(has_unread(TcpState::CloseWait, 7, 2));
        assert!(has_unread(TcpState::Established, 7, 1));
        // Nobody can read it.
        assert!(!has_unread(TcpState::CloseWait, 0, 2));
    }

    #[test]
    fn an_unknown_idle_time_is_use_where_the_application_may_use_it() {
        let mut message = stuck("10.0.0.1:80", "10.0.0.2:5", 1);
        message.quiet = None;
        let limit = Duration::from_secs(5);
        assert!(Socket::from_message(&message).is_in_use(limit));
        message.state = TcpState::TimeWait;
        assert!(!Socket::from_message(&message).is_in_use(limit));
    }

    #[test]
    fn an_answered_probe_makes_nothing_young() {
        let mut message = stuck("10.0.0.1:80", "10.0.0.2:5", 1);
        let hour = Some(Duration::from_secs(3600));
        let before = Socket::from_message(&message);
        message.quiet.as_mut().unwrap().last_ack_recv = Duration::ZERO;
        let probed = before.later(&message);
        assert_eq!((probed.age, probed.idle), (hour, hour));

        let mut read = message.clone();
        read.recv_q = 0;
        let read = before.later(&read);
        let zero = Some(Duration::ZERO);
        assert_eq!((read.age, read.idle), (zero, zero));

        message.counters.as_mut().unwrap().written += 1;
        let sent = before.later(&message);
        assert_eq!((sent.age, sent.idle), (zero, zero));

        message.counters = None;
        let unknown = before.later(&message);
        assert_eq!((unknown.age, unknown.idle), (zero, hour));
    }

    #[test]
    fn the_own_fin_is_not_data() {
        assert_eq!(unsent(TcpState::LastAck, 1), 0);
        assert_eq!(unsent(TcpState::LastAck, 11), 10);
        assert_eq!(unsent(TcpState::CloseWait, 1), 1);
    }
}
