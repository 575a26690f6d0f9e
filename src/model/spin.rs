//! The risk that an owner spins, and owners that spin.

use std::fmt;
use std::sync::Arc;

use crate::model::SkipReason;
use crate::proc::{Process, RemoteFd};

/// Whether an owner would spin if its socket were closed: by the way in which the owners wait for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SpinRisk {
    /// No owner was seen to wait for it.
    #[default]
    Unknown,
    /// No owner was seen that would spin, but the waits of an owner could not all be read.
    Unreadable,
    /// Its owners have been told of its end, or are told only once of each change. They do not spin if it is closed.
    Harmless,
    /// The process with this pid waits for it without asking for input. It would spin if the socket were closed.
    Paused { pid: i32, by: Poller },
}

impl SpinRisk {
    /// Why a socket is left alone if its owners wait for it like this.
    pub fn would_spin(self) -> Option<SkipReason> {
        match self {
            SpinRisk::Paused { pid, by } => Some(SkipReason::WouldSpin { pid, by }),
            SpinRisk::Unknown | SpinRisk::Unreadable | SpinRisk::Harmless => None,
        }
    }

    /// Whether only a close shows if the owners of a socket spin.
    pub fn is_uncertain(self) -> bool {
        matches!(self, SpinRisk::Unknown | SpinRisk::Unreadable)
    }
}

/// The means by which a process waits for a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Poller {
    /// The epoll set of this descriptor.
    Epoll(RemoteFd),
    /// This thread, in poll(2).
    Poll(i32),
}

impl fmt::Display for Poller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Poller::Epoll(fd) => write!(f, "its epoll set (descriptor {})", fd.0),
            Poller::Poll(tid) => write!(f, "its thread {tid} in poll()"),
        }
    }
}

/// An owner that spins since cwkill closed one of its sockets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spinning {
    pub process: Arc<Process>,
    /// The descriptor of the socket that cwkill closed; `None` if it closed several at once, and it is not known which one it is.
    pub fd: Option<RemoteFd>,
    /// The thread that wakes without end; `None` if the process has too many threads to tell.
    pub tid: Option<i32>,
    /// The share of a processor that the thread used before the close, in percent.
    pub before: u32,
    /// The same after the close.
    pub after: u32,
    /// The epoll set that has the socket.
    pub epoll: Option<RemoteFd>,
    /// The thread was seen in select(2) before.
    pub in_select: bool,
    /// It no longer spins, because its descriptor was closed too.
    pub ended: bool,
}

impl Spinning {
    /// The command that ends it; `None` if none but a restart of the process is known.
    pub fn stop_command(&self) -> Option<String> {
        let only = self.fd.map(|fd| format!(" --fd {}", fd.0));
        let replaces = match self.epoll {
            // A descriptor that is closed leaves every epoll set.
            Some(_) => "",
            // /dev/null is always ready, and select(2) returns for it as well.
            None if self.in_select => return None,
            // poll(2) returns at once for a closed descriptor, too. /dev/null reports nothing that was not asked for.
            None => " --replace",
        };
        Some(format!(
            "cwkill reclaim --pid {}{} --reclaim-force{replaces}",
            self.process.id.pid,
            only.unwrap_or_default()
        ))
    }
}
