//! How owners wait for their sockets, and owners that spin.

use std::fmt;
use std::sync::Arc;

use crate::model::SkipReason;
use crate::proc::{Process, RemoteFd};

/// How the owners of a socket wait for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Waiting {
    /// No owner was seen to wait for it.
    #[default]
    Unknown,
    /// Its owners have been told of its end, or are told only once of each change. They do not spin if it is closed.
    Told,
    /// The process with this pid waits for it without asking for input. It would spin if the socket were closed.
    Paused { pid: i32, by: Waiter },
}

impl Waiting {
    /// Why a socket is left alone if its owners wait for it like this.
    pub fn would_spin(self) -> Option<SkipReason> {
        match self {
            Waiting::Paused { pid, by } => Some(SkipReason::WouldSpin { pid, by }),
            Waiting::Unknown | Waiting::Told => None,
        }
    }
}

/// What waits for a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waiter {
    /// The epoll set of this descriptor.
    Epoll(RemoteFd),
    /// This thread, in poll(2).
    Poll(i32),
}

impl fmt::Display for Waiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Waiter::Epoll(fd) => write!(f, "its epoll set (descriptor {})", fd.0),
            Waiter::Poll(tid) => write!(f, "its thread {tid} in poll()"),
        }
    }
}

/// An owner that spins since cwkill closed one of its sockets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spinning {
    pub process: Arc<Process>,
    /// The descriptor of the socket that cwkill closed.
    pub fd: RemoteFd,
    /// The thread that wakes without end.
    pub tid: i32,
    /// The share of a processor that the thread used before the close, in percent.
    pub before: u32,
    /// The same after the close.
    pub after: u32,
    /// The epoll set that has the socket.
    pub epoll: Option<RemoteFd>,
    /// It no longer spins, because its descriptor was closed too.
    pub ended: bool,
}

impl Spinning {
    /// The command that ends it.
    pub fn next(&self) -> String {
        let pid = self.process.id.pid;
        match self.epoll {
            // A descriptor that is closed leaves every epoll set.
            Some(_) => format!("cwkill reclaim --pid {pid} --reclaim-force"),
            // poll(2) returns at once for a closed descriptor, too. /dev/null reports nothing that was not asked for.
            None => format!(
                "gdb -p {pid} -batch -ex 'call (int)dup2((int)open(\"/dev/null\", 2), {})'",
                self.fd.0
            ),
        }
    }
}
