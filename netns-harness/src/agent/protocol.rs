//! The protocol of an agent: one JSON request per line on its stdin, one JSON answer per line on its stdout.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::lab::Conn;

/// A descriptor number in an agent, not in this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Fd(pub i32);

impl fmt::Display for Fd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A connected or connecting socket of an agent. IPv4-mapped addresses are given as IPv4.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// The descriptor in the agent.
    pub fd: Fd,
    /// The local address.
    pub local: SocketAddr,
    /// The peer's address.
    pub peer: SocketAddr,
}

impl Endpoint {
    /// The connection of a peer's socket, from the side of an application without a descriptor of it.
    pub(crate) fn without_app(&self) -> Conn {
        Conn {
            local: self.peer,
            peer: self.local,
            app_fd: None,
            peer_fd: Some(self.fd),
            sent: 0,
        }
    }
}

/// Options of [`crate::Agent::connect`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dial {
    /// Source address and port of the first connection. The following connections use the following ports. `None` leaves
    /// both to the kernel; port 0 leaves the port to the kernel.
    pub from: Option<SocketAddr>,
    /// SO_RCVBUF in bytes, set before the handshake, so that the window never grows larger.
    pub recv_buffer: Option<usize>,
    /// Drop every incoming segment of the socket, even the answer to its SYN. Implies `detached`.
    pub drop_incoming: bool,
    /// Do not wait for the handshake.
    pub detached: bool,
    /// Make sockets of IPPROTO_MPTCP.
    pub mptcp: bool,
}

/// The direction to shut down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum How {
    /// Reading.
    Read,
    /// Writing: the kernel sends FIN.
    Write,
    /// Both directions.
    Both,
}

/// A socket option that an agent can set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SocketOption {
    /// SO_RCVBUF, bytes.
    RecvBuffer(usize),
    /// SO_SNDBUF, bytes.
    SendBuffer(usize),
    /// SO_KEEPALIVE with TCP_KEEPIDLE, TCP_KEEPINTVL (seconds) and TCP_KEEPCNT.
    KeepAlive {
        /// Idle seconds before the first probe.
        idle_s: u64,
        /// Seconds between probes.
        interval_s: u64,
        /// Unanswered probes before the kernel drops the connection.
        probes: u32,
    },
    /// SO_LINGER in seconds. `None` turns it off.
    Linger(Option<u64>),
    /// Drop every incoming segment of this socket before TCP sees it, with a socket filter. `false` removes the filter.
    DropIncoming(bool),
    /// O_NONBLOCK.
    NonBlocking(bool),
    /// TCP_REPAIR.
    Repair(bool),
    /// IP_TRANSPARENT: a listener accepts connections to addresses of other hosts.
    Transparent(bool),
    /// TCP_ULP "tls", and TLS_TX and TLS_RX with the same key: TLS 1.2 with AES-128-GCM.
    KernelTls,
}

/// The result of one read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Recv {
    /// These bytes arrived.
    Data(Vec<u8>),
    /// The peer has finished.
    Eof,
    /// The kernel's errno.
    Failed(i32),
    /// Nothing arrived in time.
    Nothing,
}

/// The result of reading to the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drained {
    /// The socket.
    pub fd: Fd,
    /// Bytes read by this request.
    pub bytes: u64,
    /// Whether the bytes equal [`pattern`] from its beginning.
    pub intact: bool,
    /// Why reading ended.
    pub end: End,
}

/// Why reading ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum End {
    /// The peer has finished.
    Eof,
    /// The kernel's errno.
    Failed(i32),
    /// The deadline passed.
    Deadline,
}

/// The epoll events of a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Readiness {
    /// EPOLLIN.
    pub readable: bool,
    /// EPOLLOUT.
    pub writable: bool,
    /// EPOLLRDHUP: the peer has finished.
    pub read_hangup: bool,
    /// EPOLLHUP.
    pub hangup: bool,
    /// EPOLLERR.
    pub error: bool,
}

/// The byte at `offset` of everything that [`crate::Agent::fill`] sends.
#[must_use]
pub fn pattern(offset: u64) -> u8 {
    // The period is a prime, so that an offset wrong by a power of two is detected.
    u8::try_from(offset % 251).expect("less than 251")
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Request {
    /// → `Fd`
    Listen {
        address: SocketAddr,
        v6_only: bool,
        /// SO_REUSEPORT.
        reuse_port: bool,
        backlog: i32,
        mptcp: bool,
    },
    /// Change the limit of the backlog.
    SetBacklog {
        listener: Fd,
        backlog: i32,
    },
    /// → `Vec<Endpoint>`
    Connect {
        to: SocketAddr,
        count: usize,
        dial: Dial,
        within_ms: u64,
    },
    /// → `Vec<Endpoint>`
    Accept {
        listener: Fd,
        count: usize,
        within_ms: u64,
    },
    /// Send all of `data` on each socket.
    Send {
        fds: Vec<Fd>,
        data: Vec<u8>,
    },
    /// Send the pattern from `offset`, until `len` bytes are sent or the buffer is full. → bytes sent per socket
    Fill {
        fds: Vec<Fd>,
        offset: u64,
        len: u64,
    },
    /// → `Recv`
    Recv {
        fd: Fd,
        max: usize,
        within_ms: u64,
    },
    /// → `Vec<Drained>`
    Drain {
        fds: Vec<Fd>,
        within_ms: u64,
    },
    /// → `Readiness`
    Poll {
        fd: Fd,
        writable: bool,
        within_ms: u64,
    },
    Shutdown {
        fds: Vec<Fd>,
        how: How,
    },
    Close {
        fds: Vec<Fd>,
    },
    SetOption {
        fds: Vec<Fd>,
        option: SocketOption,
    },
    /// → `Vec<Fd>`
    ReplaceByListener {
        fds: Vec<Fd>,
    },
    /// → errno of SO_ERROR, 0 if none
    TakeError {
        fd: Fd,
    },
    /// Start processes that inherit the descriptors. → pids
    Share {
        fds: Vec<Fd>,
        children: usize,
    },
    /// Send the descriptors over a Unix socket that no process reads, and close them.
    PutInFlight {
        fds: Vec<Fd>,
    },
    /// Start an idle thread with a descriptor table of its own, which keeps the descriptors, and close them in the others.
    LeaveToThread {
        fds: Vec<Fd>,
    },
    /// Start idle threads.
    Threads {
        count: usize,
    },
    /// Open descriptors that are not sockets.
    OpenFiles {
        count: usize,
    },
    /// Open TCP sockets that are in no table of the kernel: never bound, never connected.
    OpenSockets {
        count: usize,
    },
    /// Close the descriptors of `OpenFiles` and `OpenSockets`.
    CloseFiles,
    /// Enter the network namespace at this path. Open sockets stay in theirs.
    Enter {
        netns: PathBuf,
    },
    /// Start to send the pattern on each socket, a few bytes every `interval_ms`.
    StartSending {
        fds: Vec<Fd>,
        interval_ms: u64,
    },
    /// End `StartSending`. → bytes sent per socket
    StopSending,
}

/// Why a request failed.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Failure {
    pub errno: Option<i32>,
    pub message: String,
}

pub(crate) type Answer = Result<serde_json::Value, Failure>;
