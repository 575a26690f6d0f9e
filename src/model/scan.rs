//! What the finder found.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use crate::model::{Coverage, Owner, Target};
use crate::proc::netns::Netns;
use crate::proc::{Process, ProcessId};

/// The matched sockets, and what belongs to them.
#[derive(Clone, Debug, Default)]
pub struct Scan {
    /// The sockets that match, oldest first.
    pub targets: Vec<Target>,
    /// The listeners of never accepted sockets.
    pub listeners: Vec<Listener>,
    /// The network namespaces that were scanned.
    pub namespaces: Vec<Arc<Netns>>,
    /// What could not be seen.
    pub coverage: Coverage,
    /// Whether the owners were searched for.
    pub owners_known: bool,
}

/// The listeners at one address: one, or a group made with SO_REUSEPORT.
#[derive(Clone, Debug)]
pub struct Listener {
    /// Where it listens.
    pub local: SocketAddr,
    /// The inodes of its sockets.
    pub inodes: Vec<u32>,
    /// The user of its sockets.
    pub uid: u32,
    /// Connections that wait for accept(), over the whole group, when last looked up.
    pub waiting: u32,
    /// The limit of the backlog, over the whole group.
    pub backlog: u32,
    /// Its owners, one entry for each descriptor.
    pub owners: Vec<Owner>,
}

impl Scan {
    /// The network namespace of a target.
    pub fn netns(&self, target: &Target) -> &Netns {
        &self.namespaces[target.socket.netns]
    }

    /// The listener that would accept a target, if it was never accepted.
    pub fn listener(&self, target: &Target) -> Option<&Listener> {
        target.listener.map(|index| &self.listeners[index])
    }

    /// The owners that are responsible for a target: its own, or its listener's if it was never accepted.
    pub fn responsible<'s>(&'s self, target: &'s Target) -> &'s [Owner] {
        match self.listener(target) {
            Some(listener) => &listener.owners,
            None => &target.owners,
        }
    }

    /// The process to blame for a target: the first of [`Scan::responsible`].
    pub fn culprit<'s>(&'s self, target: &'s Target) -> Option<&'s Arc<Process>> {
        self.responsible(target).first().map(|owner| &owner.process)
    }

    /// Every process that is responsible for some target, by pid.
    pub fn processes(&self) -> BTreeMap<ProcessId, &Arc<Process>> {
        let targets = self.targets.iter().flat_map(|target| &target.owners);
        let listeners = self.listeners.iter().flat_map(|listener| &listener.owners);
        targets
            .chain(listeners)
            .map(|owner| (owner.process.id, &owner.process))
            .collect()
    }

    /// How many targets have a descriptor and no known owner, if owners were searched for.
    pub fn without_known_owner(&self) -> usize {
        let unknown = |target: &&Target| target.is_without_known_owner();
        match self.owners_known {
            true => self.targets.iter().filter(unknown).count(),
            false => 0,
        }
    }
}
