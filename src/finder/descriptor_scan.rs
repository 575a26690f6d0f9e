//! The sockets that each process has a descriptor of, whichever way they were read.

use crate::proc::fds::SocketFds;
use crate::proc::{RemoteFd, Unreadable};

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

impl DescriptorScan {
    /// Each process with the inodes and descriptors of its sockets.
    pub fn sockets(&self) -> impl Iterator<Item = (i32, &[(u32, RemoteFd)])> {
        let tables = self
            .processes
            .iter()
            .filter_map(|process| process.table.as_ref());
        tables.map(|(pid, table)| (*pid, &table.sockets[..]))
    }
}
