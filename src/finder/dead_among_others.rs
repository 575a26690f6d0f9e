//! Dead descriptors among those that the search for owners has passed by.
//!
//! As [`super::dead`], without a second look at every descriptor: with 100,000 stuck sockets that look would take as long as the search
//! itself. A socket that is neither one of the stuck ones nor in another state of the kernel's table may be dead, and is examined. The iterator
//! reports the state of a socket by leaving it out, so it needs no list.

use std::collections::HashSet;
use std::fs;
use std::io;

use rayon::prelude::*;

use super::dead::{self, Suspect};
use super::descriptor_scan::{OtherDescriptors, OtherTable};
use super::threads;
use crate::model::Scan;
use crate::proc::{
    Inodes, ProcFs, Process, ProcessId, RemoteFd, is_denied, is_missing, read_identity,
};
use crate::tcp::StateSet;
use crate::text::counted;

/// The dead descriptors of all processes.
#[derive(Debug, Default)]
pub struct DeadDescriptors {
    /// The processes with suspects, by pid. One with several tables is there for each.
    pub processes: Vec<(Process, Vec<Suspect>)>,
    /// The number of processes whose descriptors could not be read, or not all of them.
    pub unreadable: usize,
    /// Why something could not be read that should be readable, one per line.
    pub failures: Vec<String>,
}

/// Examines `others`, which were read with `scan`. It has all sockets in one of `states` of its namespaces.
pub fn find(
    proc: &ProcFs,
    others: OtherDescriptors,
    scan: &Scan,
    states: StateSet,
) -> DeadDescriptors {
    let mut found = DeadDescriptors {
        unreadable: others.unreadable,
        ..DeadDescriptors::default()
    };
    let mut tables = others.tables;
    if !others.by_iterator {
        match threads::scan_all(proc) {
            Ok(more) => tables.extend(more),
            Err(error) => found
                .failures
                .push(format!("the processes cannot be listed: {error}")),
        }
    }
    if tables.is_empty() {
        return found;
    }
    let listed = match others.by_iterator {
        true => Inodes::default(),
        false => listed(scan, states, &mut found.failures),
    };
    let examiner = Examiner {
        proc,
        same_pids: proc.shows_own_pid_namespace(),
        namespaces: scan.namespaces.iter().map(|netns| netns.inode()).collect(),
        owners: scan.processes().into_keys().collect(),
        listed,
    };
    let examined: Vec<_> = tables
        .into_par_iter()
        .map(|table| (table.pid, examiner.examine(table)))
        .collect();
    let mut failed = Vec::new();
    for (pid, result) in examined {
        match result {
            Ok(Some(process)) => found.processes.push(process),
            Ok(None) => {}
            Err(error) if is_missing(&error) => {}
            Err(error) if is_denied(&error) => {
                found.unreadable += usize::from(proc.unreadable(pid).is_some());
            }
            Err(error) => failed.push((pid, error)),
        }
    }
    if let Some((pid, error)) = failed.first() {
        found.failures.push(format!(
            "the descriptors of {} could not be read (the first is {pid}: {error})",
            counted(failed.len(), "process")
        ));
    }
    found.processes.sort_by_key(|(process, _)| process.id.pid);
    found
}

/// The inodes of the sockets of `scan`, and of those in other states.
fn listed(scan: &Scan, states: StateSet, failures: &mut Vec<String>) -> Inodes {
    let targets = scan.targets.iter();
    let mut listed: Inodes = targets.filter_map(|target| target.socket.inode).collect();
    for (index, netns) in scan.namespaces.iter().enumerate() {
        let others = match scan.unlisted.contains(&index) {
            true => StateSet::ALL,
            false => StateSet::ALL.without(states),
        };
        match dead::listed_inodes_in(netns, others) {
            Ok(inodes) => listed.extend(inodes),
            Err(error) => failures.push(format!(
                "the sockets of a network namespace could not be listed ({:#}): its descriptors may be counted as unknown",
                anyhow::Error::from(error)
            )),
        }
    }
    listed
}

struct Examiner<'a> {
    proc: &'a ProcFs,
    /// Whether the pids of `proc` are those of system calls.
    same_pids: bool,
    /// The inodes of the scanned namespaces.
    namespaces: HashSet<u64>,
    owners: HashSet<ProcessId>,
    listed: Inodes,
}

impl Examiner<'_> {
    /// The process of `table` with its suspects; `None` if it has none, or is not in scope.
    ///
    /// # Errors
    /// A file of the process cannot be read, as after its end.
    fn examine(&self, table: OtherTable) -> io::Result<Option<(Process, Vec<Suspect>)>> {
        let sockets = table.sockets.into_iter();
        let unlisted = sockets.filter(|(inode, _)| !self.listed.contains(inode));
        let unlisted: Vec<(RemoteFd, u32)> = unlisted.map(|(inode, fd)| (fd, inode)).collect();
        if unlisted.is_empty() {
            return Ok(None);
        }
        let process = read_identity(self.proc, table.pid)?;
        let id = process.id;
        let is_same = table.started.is_none_or(|started| started == id.start_time);
        if !is_same || !(self.owners.contains(&id) || self.is_in_scope(id)?) {
            return Ok(None);
        }
        let (suspects, _) = dead::classify(self.proc, id, table.tid, self.same_pids, &unlisted)?;
        // The names of sockets were read through the pid, which another process may have by now.
        if suspects.is_empty() || !self.proc.is_alive(id) {
            return Ok(None);
        }
        Ok(Some((self.proc.to_show(process), suspects)))
    }

    /// Whether the process is in a namespace that was scanned. The tables of others were not read, so all sockets of a process there would
    /// seem dead.
    fn is_in_scope(&self, id: ProcessId) -> io::Result<bool> {
        use std::os::unix::fs::MetadataExt;

        let path = self.proc.path(&format!("{}/ns/net", id.pid));
        Ok(self.namespaces.contains(&fs::metadata(path)?.ino()))
    }
}
