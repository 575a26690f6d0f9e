//! The sockets that each process has a descriptor of, whichever way they were read.

use crate::proc::fds::SocketFds;
use crate::proc::{Inodes, RemoteFd, Unreadable};

/// All sockets that each process owns.
#[derive(Default)]
pub struct DescriptorScan {
    pub(super) processes: Vec<ProcessScan>,
    /// The tables of single threads; `None` if they were not read.
    pub(super) threads: Option<Vec<ThreadScan>>,
    pub hidden: bool,
}

/// The sockets of one process.
#[derive(Default)]
pub(super) struct ProcessScan {
    /// Its pid, and its sockets and epoll sets, if it has sockets.
    pub table: Option<(i32, SocketFds)>,
    /// Its start time in clock ticks, if it was read together with the table.
    pub started: Option<u64>,
    pub unreadable: Option<Unreadable>,
}

/// The sockets of a thread with a table of its own.
pub(super) struct ThreadScan {
    pub pid: i32,
    /// The start time of its process, in clock ticks.
    pub started: u64,
    pub tid: i32,
    pub sockets: Vec<(u32, RemoteFd)>,
}

/// The descriptors of the sockets that were not looked for. Some may be of dead sockets: see [`super::dead_among_others`].
#[derive(Default)]
pub struct OtherDescriptors {
    pub(super) tables: Vec<OtherTable>,
    /// Whether the iterator has read them: with the tables of single threads, and without the TCP sockets in states in which none is dead.
    pub(super) by_iterator: bool,
    /// The number of processes whose descriptors cwkill could not read, or not all of them.
    pub(super) unreadable: usize,
}

/// Those of one table.
pub(super) struct OtherTable {
    pub pid: i32,
    /// The thread with the table; `None` for that of the process.
    pub tid: Option<i32>,
    /// The start time of the process in clock ticks, if it was read together with the table.
    pub started: Option<u64>,
    pub sockets: Vec<(u32, RemoteFd)>,
}

impl DescriptorScan {
    /// The descriptors of sockets that are not among `inodes`.
    pub(super) fn others(&self, inodes: &Inodes) -> OtherDescriptors {
        let is_other = |socket: &&(u32, RemoteFd)| !inodes.contains(&socket.0);
        let of_processes = self.processes.iter().filter_map(|process| {
            let (pid, table) = process.table.as_ref()?;
            Some(OtherTable {
                pid: *pid,
                tid: None,
                started: process.started,
                sockets: table.sockets.iter().filter(is_other).copied().collect(),
            })
        });
        let threads = self.threads.iter().flatten();
        let of_threads = threads.map(|thread| OtherTable {
            pid: thread.pid,
            tid: Some(thread.tid),
            started: Some(thread.started),
            sockets: thread.sockets.iter().filter(is_other).copied().collect(),
        });
        let mut tables: Vec<OtherTable> = of_processes.chain(of_threads).collect();
        tables.retain(|table| !table.sockets.is_empty());
        let unreadable = self.processes.iter();
        OtherDescriptors {
            tables,
            by_iterator: self.threads.is_some(),
            unreadable: unreadable.filter(|it| it.unreadable.is_some()).count(),
        }
    }

    /// Each process with the inodes and descriptors of its sockets.
    pub fn sockets(&self) -> impl Iterator<Item = (i32, &[(u32, RemoteFd)])> {
        let tables = self
            .processes
            .iter()
            .filter_map(|process| process.table.as_ref());
        tables.map(|(pid, table)| (*pid, &table.sockets[..]))
    }
}
