//! Which descriptors of closed sockets are still open.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsFd;
use std::sync::atomic::AtomicBool;

use rayon::prelude::*;

use super::descriptor_scan::{DescriptorScan, ProcessScan};
use super::iterated;
use crate::model::{Outcome, Owner, Target};
use crate::proc::fds::{FDS_PER_TASK, FdTable};
use crate::proc::{
    ExecMarker, FdState, ProcFs, ProcessId, TableId, exec_marker, read_between_execs,
};
use crate::tcp::StateSet;

/// To look at one descriptor in /proc takes as long as to walk over this many with the iterator.
const FILES_PER_DESCRIPTOR: u64 = 4;

/// The descriptors to look for in one table, each with the inode of its socket.
type Wanted<'t> = Vec<(&'t mut Owner, u32)>;

/// Checks which descriptors of closed or closing sockets are still open. Writes the result to [`Owner::after`].
pub fn check_still_open(proc: &ProcFs, targets: &mut [Target]) {
    let mut by_table: BTreeMap<TableId, Wanted<'_>> = BTreeMap::new();
    for target in targets {
        let over = target.outcome.is_some_and(Outcome::is_closed_or_closing);
        if let Some(inode) = target.socket.inode.filter(|_| over) {
            for owner in &mut target.owners {
                let owners = by_table.entry((owner.process.id, owner.tid)).or_default();
                owners.push((owner, inode));
            }
        }
    }
    if let Some(scan) = scan_if_it_pays(proc, by_table.values().map(Vec::len).sum()) {
        mark_open(&scan, &mut by_table);
    }
    by_table
        .into_par_iter()
        .filter(|(_, owners)| !owners.is_empty())
        .for_each(|((id, tid), mut owners)| {
            check_table(proc, (id, tid), &mut owners);
        });
}

/// The descriptors of all processes by the iterator, if that takes less time than to look at `wanted` descriptors in /proc.
fn scan_if_it_pays(proc: &ProcFs, wanted: usize) -> Option<DescriptorScan> {
    let iterator = proc.iterator()?;
    let (open_files, _) = proc.open_files()?;
    let wanted = u64::try_from(wanted).unwrap_or(u64::MAX);
    if wanted.saturating_mul(FILES_PER_DESCRIPTOR) < open_files {
        return None;
    }
    // An error: /proc says the same.
    iterated::scan(iterator, proc, StateSet::ALL, &AtomicBool::new(false)).ok()
}

/// Marks the descriptors that are surely open, and removes them from `by_table`. A descriptor that `scan` does not have may be closed, or
/// its process may just execute a program: /proc tells.
fn mark_open(scan: &DescriptorScan, by_table: &mut BTreeMap<TableId, Wanted<'_>>) {
    for process in &scan.processes {
        let ProcessScan {
            table: Some((pid, table)),
            started: Some(started),
            ..
        } = process
        else {
            continue;
        };
        let id = ProcessId {
            pid: *pid,
            start_time: *started,
        };
        let Some(owners) = by_table.get_mut(&(id, None)) else {
            continue;
        };
        owners.retain_mut(|(owner, inode)| {
            // They are in the order of their numbers.
            let found = table.sockets.binary_search_by_key(&owner.fd, |(_, fd)| *fd);
            let is_open = found.is_ok_and(|index| table.sockets[index].0 == *inode);
            if is_open {
                owner.after = Some(FdState::Open);
            }
            !is_open
        });
    }
}

/// Checks which of these descriptors of one table are still open, and writes the result to [`Owner::after`].
pub(super) fn check_table(proc: &ProcFs, (id, tid): TableId, owners: &mut [(&mut Owner, u32)]) {
    // Returns whether one of them seems to be closed.
    let mut read = || {
        let table = FdTable::open(proc, id, tid);
        owners
            .par_iter_mut()
            .with_min_len(FDS_PER_TASK)
            .for_each(|(owner, inode)| owner.after = Some(table.state(owner.fd, *inode)));
        let is_closed = |(owner, _): &(&mut Owner, u32)| owner.after == Some(FdState::Closed);
        owners.iter().any(is_closed)
    };
    let process = File::open(proc.path(&id.pid.to_string()));
    let marker = || exec_marker(process.as_ref().ok()?.as_fd()).ok();
    let before = marker();
    // A thread that executes a program takes the place of the first one. A table of a thread that is still there is as it was read.
    let is_there = |tid| proc.path(&format!("{}/task/{tid}", id.pid)).exists();
    if !read() || tid.is_some_and(is_there) {
        return;
    }
    let after = marker();
    if let (Ok(process), true) = (
        &process,
        before != after || before == Some(ExecMarker::LeaderExited),
    ) {
        // An error: the process is gone.
        if let Ok(None) = read_between_execs(process.as_fd(), || Ok(read())) {
            let closed = owners
                .iter_mut()
                .filter(|(owner, _)| owner.after == Some(FdState::Closed));
            closed.for_each(|(owner, _)| owner.after = Some(FdState::Unknown));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::finder::descriptor_scan::ThreadScan;
    use crate::proc::RemoteFd;
    use crate::proc::fds::SocketFds;
    use crate::proc::testdata::process;

    #[test]
    fn only_what_the_iterator_has_seen_is_surely_open() {
        let app = process(7, "app");
        let id = app.id;
        let owner = |fd| Owner::new(Arc::clone(&app), RemoteFd(fd));
        let mut same = owner(3);
        let mut reused = owner(4);
        let mut closed = owner(5);
        let mut of_thread = Owner {
            tid: Some(8),
            ..owner(3)
        };
        let scan = |start_time| DescriptorScan {
            processes: vec![ProcessScan {
                table: Some((
                    7,
                    SocketFds {
                        sockets: vec![(42, RemoteFd(3)), (99, RemoteFd(4))],
                        ..SocketFds::default()
                    },
                )),
                started: Some(start_time),
                unreadable: None,
            }],
            threads: Some(Vec::<ThreadScan>::new()),
            hidden: false,
        };
        let mut wanted: BTreeMap<TableId, Wanted<'_>> = BTreeMap::new();
        wanted.insert(
            (id, None),
            vec![(&mut same, 42), (&mut reused, 43), (&mut closed, 44)],
        );
        wanted.insert((id, Some(8)), vec![(&mut of_thread, 42)]);
        // The process that had this pid before.
        mark_open(&scan(id.start_time + 1), &mut wanted);
        assert_eq!(wanted[&(id, None)].len(), 3);
        mark_open(&scan(id.start_time), &mut wanted);
        assert_eq!(wanted[&(id, None)].len(), 2);
        assert_eq!(wanted[&(id, Some(8))].len(), 1);
        assert_eq!(
            [same.after, reused.after, closed.after, of_thread.after],
            [Some(FdState::Open), None, None, None]
        );
    }
}
