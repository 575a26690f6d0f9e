//! The result of the finder.

use std::collections::{BTreeMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::model::{Coverage, HistoryUpdate, Owner, Target};
use crate::proc::netns::Netns;
use crate::proc::{Process, ProcessId, RemoteFd};
use crate::sock_diag::DiagId;

/// The matched sockets, with their listeners and namespaces.
#[derive(Clone, Debug, Default)]
pub struct Scan {
    /// The matched sockets, oldest first.
    pub targets: Vec<Target>,
    /// The listeners of the sockets that were never accepted.
    pub listeners: Vec<Listener>,
    /// The network namespaces that were scanned.
    pub namespaces: Vec<Arc<Netns>>,
    /// The indices in `namespaces` of those whose sockets could not be listed, or not all of them. The coverage counts them as unreachable.
    pub unlisted: Vec<usize>,
    /// The number of sockets that match, except that they are younger than `--min-age`, or that their age is unknown. They are not
    /// among the targets.
    pub younger: usize,
    /// The number of sockets that match, except that they are in use (`--min-idle`). They are not among the targets.
    pub in_use: usize,
    pub coverage: Coverage,
    /// The time since boot when the sockets had been listed.
    pub listed_at: Duration,
    /// Whether cwkill searched for the owners.
    pub owners_known: bool,
    /// What this scan adds to the history; empty if the run has no history.
    pub for_history: HistoryUpdate,
    /// The epoll sets of the owners.
    pub epolls: Vec<(Arc<Process>, RemoteFd)>,
    /// The threads of the owners that sleep in select(2).
    pub in_select: HashSet<i32>,
}

/// The listener of connections that were never accepted.
#[derive(Clone, Debug)]
pub struct Listener {
    pub local: SocketAddr,
    /// The listening sockets at which the connections may wait. There are several only with SO_REUSEPORT, if the kernel does not
    /// tell in whose backlog they are.
    pub sockets: Vec<ListeningSocket>,
    /// The number of listening sockets at this address; more than one only with SO_REUSEPORT.
    pub group_size: usize,
    /// The user of its sockets.
    pub uid: u32,
    /// Its owners, one entry per descriptor.
    pub owners: Vec<Owner>,
}

/// One listening socket. Each has a backlog of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListeningSocket {
    pub id: DiagId,
    pub inode: u32,
    /// Connections that wait for accept(2), at the last lookup.
    pub waiting: u32,
    /// The limit of the backlog.
    pub backlog: u32,
    /// The cgroup v2 in which it was made, and with it the connections that wait at it.
    pub cgroup: Option<u64>,
}

impl Listener {
    /// The inodes of its listening sockets.
    pub fn inodes(&self) -> impl Iterator<Item = u32> + '_ {
        self.sockets.iter().map(|socket| socket.inode)
    }

    /// Connections that wait for accept(2), summed over its listening sockets.
    pub fn waiting(&self) -> u32 {
        let waiting = self.sockets.iter().map(|socket| socket.waiting);
        waiting.fold(0, u32::saturating_add)
    }

    /// The limit of the backlog, summed over its listening sockets.
    pub fn backlog(&self) -> u32 {
        let backlog = self.sockets.iter().map(|socket| socket.backlog);
        backlog.fold(0, u32::saturating_add)
    }
}

impl ListeningSocket {
    /// Whether the kernel drops new connections to it. It queues one connection more than the limit (include/net/sock.h,
    /// sk_acceptq_is_full).
    pub fn is_full(&self) -> bool {
        self.waiting > self.backlog
    }
}

impl Scan {
    /// The network namespace of a target.
    pub fn netns(&self, target: &Target) -> &Netns {
        &self.namespaces[target.socket.netns]
    }

    /// The listener that would accept a target; `None` if the target was accepted, or the listener is unknown.
    pub fn listener(&self, target: &Target) -> Option<&Listener> {
        target.listener.map(|index| &self.listeners[index])
    }

    /// The owners that are responsible for a target: those of its listener if it was never accepted, otherwise its own.
    pub fn responsible<'s>(&'s self, target: &'s Target) -> &'s [Owner] {
        match self.listener(target) {
            Some(listener) => &listener.owners,
            None => &target.owners,
        }
    }

    /// The process that is responsible for a target: the first of [`Scan::responsible`].
    pub fn culprit<'s>(&'s self, target: &'s Target) -> Option<&'s Arc<Process>> {
        self.responsible(target).first().map(|owner| &owner.process)
    }

    /// Every process that is responsible for a target, by identity.
    pub fn processes(&self) -> BTreeMap<ProcessId, &Arc<Process>> {
        let targets = self.targets.iter().flat_map(|target| &target.owners);
        let listeners = self.listeners.iter().flat_map(|listener| &listener.owners);
        targets
            .chain(listeners)
            .map(|owner| (owner.process.id, &owner.process))
            .collect()
    }

    /// The number of targets with a descriptor and no known owner; 0 if cwkill did not search for owners.
    pub fn without_known_owner(&self) -> usize {
        let unknown = |target: &&Target| target.is_without_known_owner();
        match self.owners_known {
            true => self.targets.iter().filter(unknown).count(),
            false => 0,
        }
    }
}
