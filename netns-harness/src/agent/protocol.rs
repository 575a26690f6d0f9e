//! What an agent can be asked: one JSON request a line on its stdin, one JSON answer a line on its stdout.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::lab::Conn;

/// A descriptor number in an agent (not in this process).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Fd(pub i32);

impl fmt::Display for Fd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A connected (or connecting) socket of an agent. IPv4-mapped addresses are written as IPv4.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// Its descriptor in the agent.
    pub fd: Fd,
    /// Its own address.
    pub local: SocketAddr,
    /// The other side's.
    pub peer: SocketAddr,
}

impl Endpoint {
    /// The connection seen from the application, which has no descriptor of it.
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

/// How an agent opens connections.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dial {
    /// The first client address and port; further connections take the next ports. `None` leaves it to the kernel; port 0
    /// fixes the address alone.
    pub from: Option<SocketAddr>,
    /// SO_RCVBUF in bytes, set before the handshake so that the window never opens further.
    pub recv_buffer: Option<usize>,
    /// The socket never sees an incoming segment, not even the answer to its SYN. Implies `detached`.
    pub drop_incoming: bool,
    /// Do not wait for the handshake.
    pub detached: bool,
}

/// Which direction to shut down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum How {
    /// No more reading.
    Read,
    /// Send a FIN.
    Write,
    /// Both.
    Both,
}

/// A socket option an agent can set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SocketOption {
    /// SO_RCVBUF, bytes.
    RecvBuffer(usize),
    /// SO_SNDBUF, bytes.
    SendBuffer(usize),
    /// SO_KEEPALIVE with TCP_KEEPIDLE, TCP_KEEPINTVL (seconds) and TCP_KEEPCNT.
    KeepAlive {
        /// Seconds of silence before the first probe.
        idle_s: u64,
        /// Seconds between probes.
        interval_s: u64,
        /// Probes before the connection is given up.
        probes: u32,
    },
    /// SO_LINGER in seconds; `None` turns it off.
    Linger(Option<u64>),
    /// Drop every incoming segment of this socket before TCP sees it (a socket filter); `false` hears again.
    DropIncoming(bool),
    /// TCP_REPAIR.
    Repair(bool),
}

/// What came of reading.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Recv {
    /// These bytes.
    Data(Vec<u8>),
    /// The other side has finished.
    Eof,
    /// The kernel's errno.
    Failed(i32),
    /// Nothing arrived in time.
    Nothing,
}

/// What came of reading to the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drained {
    /// The socket.
    pub fd: Fd,
    /// Bytes read by this request.
    pub bytes: u64,
    /// Were they what [`pattern`] says, from its beginning?
    pub intact: bool,
    /// How it ended.
    pub end: End,
}

/// Why reading ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum End {
    /// The other side has finished.
    Eof,
    /// The kernel's errno.
    Failed(i32),
    /// The deadline.
    Deadline,
}

/// What epoll says of a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Readiness {
    /// EPOLLIN.
    pub readable: bool,
    /// EPOLLOUT.
    pub writable: bool,
    /// EPOLLRDHUP: the other side has finished.
    pub read_hangup: bool,
    /// EPOLLHUP.
    pub hangup: bool,
    /// EPOLLERR.
    pub error: bool,
}

/// The byte at `offset` of everything that [`crate::Agent::fill`] sends.
#[must_use]
pub fn pattern(offset: u64) -> u8 {
    // A prime, so that no power-of-two slip goes unnoticed.
    u8::try_from(offset % 251).expect("less than 251")
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Request {
    /// → `Fd`
    Listen {
        address: SocketAddr,
        v6_only: bool,
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
    /// → bytes sent, the same to each
    Send {
        fds: Vec<Fd>,
        data: Vec<u8>,
    },
    /// → for each, bytes sent of the pattern starting at `offset` until `len` or until its buffer is full
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
    /// Send the descriptors over a Unix socket nobody reads, and close them here.
    PutInFlight {
        fds: Vec<Fd>,
    },
    /// Start threads that do nothing.
    Threads {
        count: usize,
    },
    /// Open descriptors that are no sockets.
    OpenFiles {
        count: usize,
    },
    /// Close those again.
    CloseFiles,
    /// Enter the network namespace at this path; the sockets stay where they are.
    Enter {
        netns: PathBuf,
    },
    /// Start sending the pattern on each of them, a few bytes every `interval_ms`.
    StartSending {
        fds: Vec<Fd>,
        interval_ms: u64,
    },
    /// Stop that. → bytes sent on each
    StopSending,
}

/// Why an agent could not do it.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Failure {
    pub errno: Option<i32>,
    pub message: String,
}

pub(crate) type Answer = Result<serde_json::Value, Failure>;
