//! The descriptors of all processes, by the kernel's iterator ([`crate::bpf::descriptors`]).
//!
//! The result is the same as from /proc, with two differences: it has only TCP sockets in the states that were asked for, and it has the
//! tables of single threads too.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};

use super::descriptor_scan::{DescriptorScan, ProcessScan, ThreadScan};
use crate::bpf::descriptors::{Descriptor, Descriptors, DescriptorsError};
use crate::proc::ProcFs;
use crate::proc::fds::SocketFds;
use crate::tcp::StateSet;

/// As [`super::owners::scan`].
pub(super) fn scan(
    iterator: &Descriptors,
    proc: &ProcFs,
    states: StateSet,
    cancelled: &AtomicBool,
) -> Result<DescriptorScan, DescriptorsError> {
    let mut tables = Tables {
        boot_time_offset: proc.boot_time_offset(),
        tables: Vec::new(),
    };
    iterator.read(states, |descriptor| {
        tables.add(descriptor);
        !cancelled.load(Ordering::Relaxed)
    })?;
    Ok(tables.finish())
}

/// The descriptor tables, in the order of the iterator.
struct Tables {
    /// As [`ProcFs::boot_time_offset`].
    boot_time_offset: i128,
    tables: Vec<Table>,
}

struct Table {
    /// Its first descriptor.
    first: Descriptor,
    fds: SocketFds,
}

impl Tables {
    fn add(&mut self, descriptor: Descriptor) {
        let is_of = |table: &&mut Table| {
            (table.first.pid, table.first.tid) == (descriptor.pid, descriptor.tid)
        };
        if self.tables.last_mut().filter(is_of).is_none() {
            self.tables.push(Table {
                first: descriptor,
                fds: SocketFds::default(),
            });
        }
        let table = self.tables.last_mut().expect("one was just added");
        match descriptor.inode {
            Some(inode) => table.fds.sockets.push((inode, descriptor.fd)),
            None => table.fds.epolls.push(descriptor.fd),
        }
    }

    fn finish(mut self) -> DescriptorScan {
        self.tables.retain(|table| !table.fds.sockets.is_empty());
        // After the exit of the first thread, the iterator shows the table of the others once for each. A thread can also have got the
        // table of the process back meanwhile.
        let of_process = |table: &Table| table.first.tid == table.first.pid;
        let tables = self.tables.iter().filter(|table| of_process(table));
        let mut seen: HashSet<(i32, u64)> = tables
            .map(|table| (table.first.pid, table.first.table))
            .collect();
        let (mut processes, mut threads) = (Vec::new(), Vec::new());
        for table in self.tables {
            let Descriptor { pid, tid, .. } = table.first;
            let started = start_time(table.first.started, self.boot_time_offset);
            if of_process(&table) {
                processes.push(ProcessScan {
                    table: Some((pid, table.fds)),
                    started: Some(started),
                    unreadable: None,
                });
            } else if seen.insert((pid, table.first.table)) {
                threads.push(ThreadScan {
                    pid,
                    started,
                    tid,
                    sockets: table.fds.sockets,
                });
            }
        }
        DescriptorScan {
            processes,
            threads: Some(threads),
            hidden: false,
        }
    }
}

/// A start time in nanoseconds since boot in clock ticks, as /proc/PID/stat has it.
fn start_time(nanoseconds: u64, offset: i128) -> u64 {
    let tick = 1_000_000_000 / i128::from(procfs::ticks_per_second());
    u64::try_from((i128::from(nanoseconds) + offset) / tick).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proc::RemoteFd;

    fn descriptor(pid: i32, tid: i32, table: u64, fd: i32, inode: Option<u32>) -> Descriptor {
        Descriptor {
            pid,
            tid,
            fd: RemoteFd(fd),
            inode,
            started: 7_019_999_999,
            table,
        }
    }

    fn scanned(descriptors: &[Descriptor], boot_time_offset: i128) -> DescriptorScan {
        let mut tables = Tables {
            boot_time_offset,
            tables: Vec::new(),
        };
        for descriptor in descriptors {
            tables.add(*descriptor);
        }
        tables.finish()
    }

    #[test]
    fn descriptors_are_sorted_by_process() {
        let scan = scanned(
            &[
                descriptor(7, 7, 1, 3, Some(42)),
                descriptor(7, 7, 1, 4, None),
                descriptor(7, 7, 1, 5, Some(43)),
                descriptor(8, 8, 2, 3, None),
                descriptor(9, 9, 3, 3, Some(42)),
            ],
            0,
        );
        let tables: Vec<_> = scan
            .processes
            .iter()
            .map(|process| process.table.as_ref().unwrap())
            .collect();
        // Process 8 has no socket.
        assert_eq!(tables.len(), 2);
        assert_eq!(
            *tables[0],
            (
                7,
                SocketFds {
                    sockets: vec![(42, RemoteFd(3)), (43, RemoteFd(5))],
                    epolls: vec![RemoteFd(4)],
                    denied: false
                }
            )
        );
        assert_eq!(tables[1].0, 9);
        assert!(scan.processes.iter().all(|it| it.started == Some(701)));
    }

    #[test]
    fn a_table_of_several_threads_counts_once() {
        let scan = scanned(
            &[
                // A thread with a lower number than its process.
                descriptor(7, 5, 1, 3, Some(42)),
                descriptor(7, 6, 2, 3, Some(44)),
                descriptor(7, 7, 1, 3, Some(42)),
                descriptor(7, 8, 2, 3, Some(44)),
                // The first thread of process 9 has exited.
                descriptor(9, 10, 3, 3, Some(45)),
                descriptor(9, 11, 3, 3, Some(45)),
            ],
            0,
        );
        let threads: Vec<_> = scan.threads.unwrap();
        let threads = threads.iter().map(|it| (it.pid, it.tid, &it.sockets[..]));
        let expected = [
            (7, 6, &[(44, RemoteFd(3))][..]),
            (9, 10, &[(45, RemoteFd(3))][..]),
        ];
        assert!(threads.eq(expected));
        assert_eq!(scan.processes.len(), 1);
    }

    #[test]
    fn the_descriptors_of_other_sockets_are_those_that_were_not_looked_for() {
        let scan = scanned(
            &[
                descriptor(7, 7, 1, 3, Some(42)),
                descriptor(7, 7, 1, 4, Some(43)),
                descriptor(7, 8, 2, 5, Some(44)),
                descriptor(9, 9, 3, 3, Some(42)),
            ],
            0,
        );
        let others = scan.others(&[42].into_iter().collect());
        assert!(others.by_iterator);
        let tables = others.tables.iter();
        let tables: Vec<_> = tables.map(|it| (it.pid, it.tid, &it.sockets[..])).collect();
        let expected = [
            (7, None, &[(43, RemoteFd(4))][..]),
            (7, Some(8), &[(44, RemoteFd(5))][..]),
        ];
        assert_eq!(tables, expected);
        assert!(others.tables.iter().all(|it| it.started == Some(701)));
    }

    #[test]
    fn start_times_are_those_of_proc() {
        assert_eq!(start_time(7_019_999_999, 0), 701);
        assert_eq!(start_time(7_019_999_999, 2_000_000_001), 902);
        assert_eq!(start_time(7_000_000_000, -9_000_000_000), 0);
    }
}
