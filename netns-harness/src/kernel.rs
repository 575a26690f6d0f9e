//! The kernel's tables of TCP sockets in /proc.
//!
//! Read from `/proc/thread-self/net`, because `/proc/net` belongs to the namespace of the main thread. `netns-harness run`
//! thus works without `ss`. The output of `ss` (see [`crate::ss`]) is a second, independent source.

use std::fmt;
use std::fs::File;
use std::net::SocketAddr;

use anyhow::{Context as _, Result};
use procfs::FromReadSI as _;
use procfs::net::{TcpNetEntries, TcpState as ProcState};

/// A TCP state, printed as by `ss`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the words of RFC 9293")]
pub enum TcpState {
    Established,
    SynSent,
    SynRecv,
    FinWait1,
    FinWait2,
    TimeWait,
    /// A socket without a connection (`UNCONN` in `ss`).
    Close,
    CloseWait,
    LastAck,
    Listen,
    Closing,
}

const STATE_NAMES: [(TcpState, &str); 11] = [
    (TcpState::Established, "ESTAB"),
    (TcpState::SynSent, "SYN-SENT"),
    (TcpState::SynRecv, "SYN-RECV"),
    (TcpState::FinWait1, "FIN-WAIT-1"),
    (TcpState::FinWait2, "FIN-WAIT-2"),
    (TcpState::TimeWait, "TIME-WAIT"),
    (TcpState::Close, "UNCONN"),
    (TcpState::CloseWait, "CLOSE-WAIT"),
    (TcpState::LastAck, "LAST-ACK"),
    (TcpState::Listen, "LISTEN"),
    (TcpState::Closing, "CLOSING"),
];

impl TcpState {
    /// The state with this name in `ss`.
    #[must_use]
    pub fn from_ss(name: &str) -> Option<Self> {
        STATE_NAMES
            .iter()
            .find(|(_, ss)| *ss == name)
            .map(|&(state, _)| state)
    }
}

impl fmt::Display for TcpState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = STATE_NAMES
            .iter()
            .find(|(state, _)| state == self)
            .map_or("?", |&(_, name)| name);
        f.pad(name)
    }
}

impl From<ProcState> for TcpState {
    fn from(state: ProcState) -> Self {
        match state {
            ProcState::Established => Self::Established,
            ProcState::SynSent => Self::SynSent,
            ProcState::SynRecv | ProcState::NewSynRecv => Self::SynRecv,
            ProcState::FinWait1 => Self::FinWait1,
            ProcState::FinWait2 => Self::FinWait2,
            ProcState::TimeWait => Self::TimeWait,
            ProcState::Close => Self::Close,
            ProcState::CloseWait => Self::CloseWait,
            ProcState::LastAck => Self::LastAck,
            ProcState::Listen => Self::Listen,
            ProcState::Closing => Self::Closing,
        }
    }
}

/// One TCP socket. IPv4-mapped addresses are written as IPv4.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelSocket {
    /// Its state.
    pub state: TcpState,
    /// The local endpoint.
    pub local: SocketAddr,
    /// The peer's endpoint.
    pub peer: SocketAddr,
    /// Unread bytes, where an unread FIN counts as one; for a listener, the length of its accept queue.
    pub recv_q: u32,
    /// Bytes that the peer has not acknowledged.
    pub send_q: u32,
    /// 0 if the socket never had a descriptor, or its last one is closed.
    pub inode: u64,
    /// The user who opened the socket.
    pub uid: u32,
}

/// All TCP sockets of the calling thread's network namespace.
pub(crate) fn sockets() -> Result<Vec<KernelSocket>> {
    let mut sockets = Vec::new();
    for file in ["tcp", "tcp6"] {
        let path = format!("/proc/thread-self/net/{file}");
        let table = match File::open(&path) {
            // A kernel without IPv6 has no tcp6.
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
            opened => opened.with_context(|| format!("open {path}"))?,
        };
        let entries = TcpNetEntries::from_read(table, procfs::current_system_info())
            .with_context(|| format!("read {path}"))?;
        sockets.extend(entries.0.into_iter().map(|entry| KernelSocket {
            state: entry.state.into(),
            local: canonical(entry.local_address),
            peer: canonical(entry.remote_address),
            recv_q: entry.rx_queue,
            send_q: entry.tx_queue,
            inode: entry.inode,
            uid: entry.uid,
        }));
    }
    Ok(sockets)
}

/// The address as in packets: an IPv4-mapped IPv6 address becomes IPv4.
#[must_use]
pub fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
