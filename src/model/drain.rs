//! A backlog in which dead connections wait, and what became of it.

use std::net::SocketAddr;
use std::time::Duration;

use nix::errno::Errno;
use strum::IntoStaticStr;

use crate::model::{ListeningSocket, MethodError, Owner, Privilege, ReclaimReason};
use crate::sys::os_error;
use crate::text::counted;

/// The backlog of a listening socket.
#[derive(Clone, Debug)]
pub struct Backlog {
    /// Index of the network namespace in [`crate::model::Scan::namespaces`].
    pub netns: usize,
    pub local: SocketAddr,
    /// The listening socket. Its numbers are those of the last lookup.
    pub socket: ListeningSocket,
    /// The number of listening sockets at this address; more than one only with SO_REUSEPORT.
    pub group_size: usize,
    /// Its owners, one entry per descriptor.
    pub owners: Vec<Owner>,
    /// The connections that waited when cwkill found it.
    pub waiting_before: u32,
    /// Those of them that are dead, or will be when the planned sockets are closed.
    pub dead: u32,
    /// The result; `None` until it is known, and in a dry run that expects to drain it.
    pub result: Option<DrainResult>,
}

impl Backlog {
    /// Whether dead connections are left in it.
    pub fn is_left(&self) -> bool {
        let result = self.result.as_ref();
        result.is_none_or(|result| result.reason.is_some())
    }
}

/// The result of draining a backlog.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DrainResult {
    /// The number of dead connections that cwkill accepted and closed.
    pub drained: u32,
    /// Why it stopped before all dead ones were out; `None` if it did not.
    pub reason: Option<DrainReason>,
    /// One dead connection was left for the owner: it does not use O_NONBLOCK, so accept(2) would wait if nothing were left.
    pub left_one: bool,
    /// The time for which the owners were stopped.
    pub stop_time: Duration,
}

/// Why dead connections are left in a backlog.
///
/// Its code in JSON and in the log is the variant in kebab case, and stable.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, IntoStaticStr)]
#[cfg_attr(test, derive(strum::VariantNames))]
#[strum(serialize_all = "kebab-case")]
pub enum DrainReason {
    /// This number of connections that are not dead wait in it, or may wait in it.
    #[error(
        "{} may wait among the dead ones, and an accepted connection cannot be put back",
        counted(usize::try_from(*.0).unwrap_or(usize::MAX), "live connection")
    )]
    LiveConnection(u32),
    /// No visible process holds a descriptor of the listening socket.
    #[error("no known owner")]
    NoOwner,
    /// cwkill got no duplicate of the listening socket.
    #[error("no duplicate of the listening socket: {0}")]
    NoDuplicate(MethodError),
    /// The descriptor of the owner is not a TCP listener, for example one of MPTCP.
    #[error("its descriptor is not a TCP listener")]
    NotTcp,
    /// An owner was not stopped, so it might have accepted at the same time: its name, and the reason.
    #[error("{0} was not stopped: {1}")]
    OwnerNotStopped(String, ReclaimReason),
    /// While the owners were stopped, another process got a descriptor of the listening socket.
    #[error("another process got the listening socket meanwhile")]
    NewOwner,
    /// Fewer connections wait than cwkill had counted, so another process accepts.
    #[error("another process accepts from it")]
    AcceptedElsewhere,
    /// The owners had been stopped for as long as they may.
    #[error("the limit of the stop was reached (--stop-limit)")]
    StopLimitReached,
    /// cwkill accepted a connection that was not dead. It has closed it, and accepted no more.
    #[error("A LIVE CONNECTION WAS ACCEPTED AND IS LOST: {0}")]
    LostLiveConnection(String),
    /// The operator interrupted the run.
    #[error("interrupted")]
    Interrupted,
    /// Another system call failed: its name or purpose, and its errno.
    #[error("{0}: {error}", error = os_error(.1))]
    SystemCall(&'static str, Errno),
}

impl DrainReason {
    /// The stable name.
    pub fn code(&self) -> &'static str {
        self.into()
    }

    /// The privilege that is missing, or that the kernel did not accept.
    pub fn privilege(&self) -> Option<Privilege> {
        match self {
            DrainReason::NoDuplicate(
                MethodError::NotPermitted(privilege, _)
                | MethodError::RefusedDespitePrivilege(privilege, _),
            ) => Some(*privilege),
            DrainReason::OwnerNotStopped(_, reason) => reason.privilege(),
            _ => None,
        }
    }
}
