//! How full the descriptor tables of some processes are, and how many dead descriptors they have, for the overview.

use std::collections::HashMap;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::sync::Arc;

use rayon::prelude::*;

use super::dead::{self, SuspectVerdict};
use crate::proc::netns::Netns;
use crate::proc::{Inodes, ProcFs, ProcessId, fds};

/// Dead descriptors are counted only if the tables have at most this many descriptors together: each costs some microseconds.
const MAX_DESCRIPTORS: usize = 16_384;
/// Nor are they counted if the namespaces have more sockets than this, which would all have to be listed.
const MAX_SOCKETS: u64 = 65_536;
/// Nor if so many namespaces were scanned: each would have to be entered again.
const MAX_NAMESPACES: usize = 16;

/// The descriptor table of a process, in numbers. Each is `None` if it is unknown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TableUse {
    /// Its taken descriptor numbers: see `fds::count_used`.
    pub used: Option<usize>,
    /// The soft limit RLIMIT_NOFILE.
    pub limit: Option<u64>,
    /// Its dead descriptors. Also unknown if it would take long to count them.
    pub dead: Option<usize>,
}

/// Reads the use of the descriptor tables of these processes. `namespaces`: those that were scanned.
pub fn read(
    proc: &ProcFs,
    processes: &[ProcessId],
    namespaces: &[Arc<Netns>],
) -> HashMap<ProcessId, TableUse> {
    let use_of = |id: &ProcessId| Some((*id, of(proc, *id)?));
    let mut tables: HashMap<ProcessId, TableUse> =
        processes.par_iter().filter_map(use_of).collect();
    let used: usize = tables.values().filter_map(|table| table.used).sum();
    if used > MAX_DESCRIPTORS || used == 0 {
        return tables;
    }
    let Some(listed) = listed_inodes(proc, namespaces) else {
        return tables;
    };
    let alive: Vec<ProcessId> = tables.keys().copied().collect();
    for found in dead::tables(proc, &alive, &listed) {
        let count = |wanted: fn(&SuspectVerdict) -> bool| {
            let suspects = found.suspects.iter();
            suspects.filter(|suspect| wanted(&suspect.verdict)).count()
        };
        let dead = count(|verdict| matches!(verdict, SuspectVerdict::Dead(_)));
        let unknown = count(|verdict| matches!(verdict, SuspectVerdict::Unknown(_)));
        if let Some(table) = tables.get_mut(&found.process.id) {
            table.dead = (unknown == 0).then_some(dead);
        }
    }
    tables
}

/// The use of the descriptor table of one process, without its dead descriptors; `None` if it has ended.
pub fn of(proc: &ProcFs, id: ProcessId) -> Option<TableUse> {
    let table = TableUse {
        used: count_used(proc, id.pid),
        limit: proc.open_file_limits(id.pid).map(|(soft, _)| soft),
        dead: None,
    };
    // Checked last: by now another process may have the pid.
    proc.is_alive(id).then_some(table)
}

/// The number of taken descriptor numbers of process `pid`; `None` if cwkill cannot read it.
pub(crate) fn count_used(proc: &ProcFs, pid: i32) -> Option<usize> {
    let directory = File::open(proc.path(&format!("{pid}/fd"))).ok()?;
    fds::count_used(directory.as_fd()).ok()
}

/// The inodes of all TCP sockets in these namespaces; `None` if there are too many, or they cannot be listed.
fn listed_inodes(proc: &ProcFs, namespaces: &[Arc<Netns>]) -> Option<Inodes> {
    if namespaces.len() > MAX_NAMESPACES {
        return None;
    }
    let mut sockets = 0;
    for netns in namespaces {
        sockets += netns.within(|| sockets_of_this_namespace(proc)).ok()??;
    }
    match sockets <= MAX_SOCKETS {
        true => dead::listed_inodes(namespaces).ok(),
        false => None,
    }
}

/// The number of sockets of every kind in the network namespace of this thread.
fn sockets_of_this_namespace(proc: &ProcFs) -> Option<u64> {
    let text = fs::read_to_string(proc.path("thread-self/net/sockstat")).ok()?;
    let used = text
        .lines()
        .find_map(|line| line.strip_prefix("sockets: used "))?;
    used.trim().parse().ok()
}
