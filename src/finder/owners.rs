//! Who owns a socket: maps socket inodes to processes and their descriptors, from /proc or by an iterator of the kernel (`iterated`).
//!
//! A socket can have many owners (fork(2), SCM_RIGHTS). The kernel does not report how many, so cwkill reads the descriptors
//! of every process. If a socket has no owner then, it searches the tables of single threads (`threads`). It reads only
//! `/proc/PID/fd`, of owners also `stat` and `cgroup`, and of a process whose descriptors it may not read also `stat`. It never
//! reads `maps` or follows `exe`, which can block on a sick host. Processes are read in parallel, large descriptor tables in
//! chunks.
//!
//! While a process executes a program, its table can seem to be empty (`ExecMarker`). So `stat` is read as well, and the table
//! again, where an owner is missed: at the second scan, and where a descriptor seems to be closed.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::fcntl::OFlag;
use rayon::prelude::*;

use super::descriptor_scan::{DescriptorScan, ProcessScan, ThreadScan};
use super::{iterated, threads};
use crate::filter::containers::Match;
use crate::filter::selectors::Selectors;
use crate::model::Owner;
use crate::proc::fds::{FDS_PER_TASK, SocketFds, fd_state, read_socket_link, read_table};
use crate::proc::{
    FdState, Inodes, ProcFs, Process, RemoteFd, Unreadable, identity, is_denied, is_missing,
    open_in, read_between_execs, read_identity,
};
use crate::tcp::StateSet;

/// The owners of a set of sockets.
#[derive(Debug, Default)]
pub struct OwnerScan {
    /// The descriptor tables that have one of the sockets, by pid.
    tables: Vec<Table>,
    /// Their descriptors of the sockets, by inode, then by process.
    descriptors: Vec<Descriptor>,
    /// Their epoll sets.
    pub epolls: Vec<(Arc<Process>, RemoteFd)>,
    /// Processes whose descriptors cwkill could not read, or not all of them.
    pub unreadable: Vec<Unreadable>,
    /// /proc does not list the processes of other users: it is mounted with hidepid.
    pub hidden: bool,
    /// The tables of single threads were read.
    has_thread_tables: bool,
}

#[derive(Debug)]
struct Table {
    process: Arc<Process>,
    /// As [`Owner::tid`].
    tid: Option<i32>,
}

/// A descriptor of the socket with this inode. It has only 16 bytes, since a host can have very many.
#[derive(Clone, Copy, Debug)]
struct Descriptor {
    inode: u32,
    /// Index in [`OwnerScan::tables`].
    table: usize,
    fd: RemoteFd,
}

/// A process with its sockets and epoll sets.
type Owned = (Process, SocketFds);

/// How a table is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Care {
    /// Once. During an execve(2) it may seem to be empty.
    Quick,
    /// Again, if the process executes a program meanwhile. That costs two more files for each process.
    Repeated,
}

/// How far to trust a scan of /proc that began before the sockets were listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trust {
    /// One descriptor of each process is read again, to see that the pid is still the same process. If that descriptor has
    /// changed, all are read again.
    TheScan,
    /// Each descriptor is read again, because the owners decide which sockets cwkill acts on.
    Nothing,
}

impl OwnerScan {
    /// The owners of the socket with this inode.
    pub fn of(&self, inode: u32) -> impl ExactSizeIterator<Item = Owner> + '_ {
        let first = self
            .descriptors
            .partition_point(|descriptor| descriptor.inode < inode);
        let rest = &self.descriptors[first..];
        let of_inode = |descriptor: &&Descriptor| descriptor.inode == inode;
        let count = rest.iter().take_while(of_inode).count();
        // With a known length, `collect` allocates no more memory than needed.
        rest[..count].iter().map(|descriptor| {
            let table = &self.tables[descriptor.table];
            Owner {
                tid: table.tid,
                ..Owner::new(Arc::clone(&table.process), descriptor.fd)
            }
        })
    }

    /// Searches the tables of single threads for those of `inodes` that have no owner yet.
    ///
    /// # Errors
    /// /proc cannot be listed.
    pub fn add_thread_tables(&mut self, proc: &ProcFs, inodes: &Inodes) -> io::Result<()> {
        if self.has_thread_tables {
            return Ok(());
        }
        let without_owner = inodes.iter().copied().filter(|inode| !self.has(*inode));
        let found = threads::find(proc, &without_owner.collect())?;
        for table in found {
            self.add(table.process, Some(table.tid), table.sockets);
        }
        self.sort();
        self.has_thread_tables = true;
        Ok(())
    }

    /// Adds the tables in `threads` that have one of `inodes`, also where another process has a descriptor of it, too.
    fn add_read_thread_tables(
        &mut self,
        proc: &ProcFs,
        threads: Vec<ThreadScan>,
        inodes: &Inodes,
    ) -> io::Result<()> {
        for mut thread in threads {
            thread.sockets.retain(|(inode, _)| inodes.contains(inode));
            if thread.sockets.is_empty() {
                continue;
            }
            match identify(proc, thread.pid, thread.started) {
                Ok(Some(process)) => self.add(Arc::new(process), Some(thread.tid), thread.sockets),
                Ok(None) => {}
                Err(error) if is_missing(&error) => {}
                Err(error) if is_denied(&error) => {
                    self.unreadable.extend(proc.unreadable(thread.pid));
                }
                Err(error) => return Err(error),
            }
        }
        self.has_thread_tables = true;
        Ok(())
    }

    /// Adds the tables that single threads of the owners have: a copy there keeps a socket open, too. Those of other processes are not
    /// searched, see [`OwnerScan::add_thread_tables`].
    fn add_tables_of_threads(&mut self, proc: &ProcFs, inodes: &Inodes) -> io::Result<()> {
        let pids: Vec<i32> = self.tables.iter().map(|it| it.process.id.pid).collect();
        for table in threads::find_in(proc, pids, inodes)? {
            self.add(table.process, Some(table.tid), table.sockets);
        }
        Ok(())
    }

    fn add(&mut self, process: Arc<Process>, tid: Option<i32>, sockets: Vec<(u32, RemoteFd)>) {
        let table = self.tables.len();
        self.tables.push(Table { process, tid });
        let descriptor = |(inode, fd)| Descriptor { inode, table, fd };
        self.descriptors.extend(sockets.into_iter().map(descriptor));
    }

    /// Brings the descriptors into the order in which [`OwnerScan::of`] finds them. Those of one process are adjacent.
    fn sort(&mut self) {
        let tables = &self.tables;
        self.descriptors.par_sort_by_key(|descriptor| {
            let table = &tables[descriptor.table];
            (descriptor.inode, table.process.id, table.tid)
        });
    }

    /// Whether the socket with this inode has a known owner.
    pub fn has(&self, inode: u32) -> bool {
        self.descriptors
            .binary_search_by_key(&inode, |descriptor| descriptor.inode)
            .is_ok()
    }
}

/// Reads the descriptors of all processes, at least those of TCP sockets in one of `states`. It stops early if `cancelled` becomes
/// true; the result is then incomplete.
///
/// If the iterator of `proc` fails, /proc is read.
///
/// # Errors
/// The iterator has failed, and `proc` needs it. /proc cannot be listed, or a file of a process cannot be read for another reason than
/// its end or a missing right.
pub fn scan(proc: &ProcFs, states: StateSet, cancelled: &AtomicBool) -> io::Result<DescriptorScan> {
    scan_with(proc, states, cancelled, Care::Quick)
}

/// As [`scan`], to the end, and also of a process that executes a program meanwhile.
pub(super) fn scan_to_end(proc: &ProcFs, states: StateSet) -> io::Result<DescriptorScan> {
    scan_with(proc, states, &AtomicBool::new(false), Care::Repeated)
}

fn scan_with(
    proc: &ProcFs,
    states: StateSet,
    cancelled: &AtomicBool,
    care: Care,
) -> io::Result<DescriptorScan> {
    if let Some(iterator) = proc.iterator() {
        match iterated::scan(iterator, proc, states, cancelled) {
            Ok(scan) => return Ok(scan),
            Err(error) if proc.needs_iterator() => return Err(io::Error::other(error)),
            Err(_) => {}
        }
    }
    let pids = proc.pids()?;
    Ok(DescriptorScan {
        // Process 1 lives as long as its pid namespace, so only hidepid can hide it.
        hidden: pids.first() != Some(&1),
        threads: None,
        processes: pids
            .into_par_iter()
            .map(|pid| match cancelled.load(Ordering::Relaxed) {
                true => Ok(ProcessScan::default()),
                false => scan_process(proc, pid, cancelled, care),
            })
            .collect::<io::Result<_>>()?,
    })
}

/// As [`scan`], but only of the processes that `selectors` select.
///
/// # Errors
/// As [`scan`].
pub(super) fn scan_selected(proc: &ProcFs, selectors: &Selectors) -> io::Result<DescriptorScan> {
    let is_selected = |pid: &i32| {
        let process = read_identity(proc, *pid);
        process.is_ok_and(|process| selectors.of_owner(&process) != Match::No)
    };
    let selected: Vec<i32> = proc.pids()?.into_iter().filter(is_selected).collect();
    let never = AtomicBool::new(false);
    Ok(DescriptorScan {
        hidden: false,
        threads: None,
        processes: selected
            .into_par_iter()
            .map(|pid| scan_process(proc, pid, &never, Care::Repeated))
            .collect::<io::Result<_>>()?,
    })
}

/// Whether process `pid` has a descriptor of the socket with this inode. False if cwkill may not read its descriptors.
pub fn owns(proc: &ProcFs, pid: i32, inode: u32) -> io::Result<bool> {
    let scan = scan_process(proc, pid, &AtomicBool::new(false), Care::Repeated)?;
    let mut sockets = scan.table.iter().flat_map(|(_, table)| &table.sockets);
    Ok(sockets.any(|(other, _)| *other == inode))
}

/// Finds every process that owns a socket with one of `inodes`, also one that executes a program meanwhile.
///
/// # Errors
/// As [`scan`].
pub fn find(proc: &ProcFs, inodes: &Inodes) -> io::Result<OwnerScan> {
    if inodes.is_empty() {
        return Ok(OwnerScan::default());
    }
    let scan = scan_to_end(proc, StateSet::ALL)?;
    select(proc, scan, inodes, Trust::TheScan)
}

/// Selects from `scan` the processes that own a socket with one of `inodes`.
///
/// # Errors
/// As [`scan`].
pub fn select(
    proc: &ProcFs,
    scan: DescriptorScan,
    inodes: &Inodes,
    trust: Trust,
) -> io::Result<OwnerScan> {
    let select_one = |process: ProcessScan| -> io::Result<(Option<Owned>, Option<Unreadable>)> {
        let Some((pid, mut table)) = process.table else {
            return Ok((None, process.unreadable));
        };
        table.sockets.retain(|(inode, _)| inodes.contains(inode));
        if table.sockets.is_empty() {
            return Ok((None, process.unreadable));
        }
        let checked = match process.started {
            Some(started) => identify(proc, pid, started).map(|process| {
                let owned = process.map(|process| (process, table));
                (owned, false)
            }),
            None => recheck(proc, pid, table, inodes, trust),
        };
        match checked {
            Ok((owner, denied)) => {
                let unreadable = denied.then(|| proc.unreadable(pid)).flatten();
                Ok((owner, process.unreadable.or(unreadable)))
            }
            Err(error) if is_missing(&error) => Ok((None, process.unreadable)),
            Err(error) if is_denied(&error) => Ok((None, proc.unreadable(pid))),
            Err(error) => Err(error),
        }
    };
    let identified: Vec<_> = scan
        .processes
        .into_par_iter()
        .map(select_one)
        .collect::<io::Result<_>>()?;
    let mut owners = OwnerScan {
        hidden: scan.hidden,
        ..OwnerScan::default()
    };
    for (owner, unreadable) in identified {
        owners.unreadable.extend(unreadable);
        if let Some((process, table)) = owner {
            let process = Arc::new(process);
            let epolls = table.epolls.into_iter();
            let epolls = epolls.map(|fd| (Arc::clone(&process), fd));
            owners.epolls.extend(epolls);
            owners.add(process, None, table.sockets);
        }
    }
    match scan.threads {
        Some(threads) => owners.add_read_thread_tables(proc, threads, inodes)?,
        None => owners.add_tables_of_threads(proc, inodes)?,
    }
    owners.sort();
    Ok(owners)
}

/// The process with this pid, if it started then.
fn identify(proc: &ProcFs, pid: i32, started: u64) -> io::Result<Option<Process>> {
    let process = read_identity(proc, pid)?;
    Ok((process.id.start_time == started).then(|| proc.to_show(process)))
}

fn scan_process(
    proc: &ProcFs,
    pid: i32,
    cancelled: &AtomicBool,
    care: Care,
) -> io::Result<ProcessScan> {
    let read = || -> io::Result<ProcessScan> {
        // This directory keeps referring to the same process. If another process gets the pid, every read below fails with
        // ESRCH.
        let process = File::open(proc.path(&pid.to_string()))?;
        let read = || {
            let dir = open_in(process.as_fd(), c"fd", OFlag::O_DIRECTORY)?;
            read_table(dir.as_fd(), cancelled)
        };
        let table = match care {
            Care::Quick => read()?,
            Care::Repeated => match read_between_execs(process.as_fd(), read)? {
                Some(table) => table,
                // The first thread has exited, and others run: see `threads`.
                None => read()?,
            },
        };
        Ok(ProcessScan {
            unreadable: table.denied.then(|| proc.unreadable(pid)).flatten(),
            table: (!table.sockets.is_empty()).then_some((pid, table)),
            started: None,
        })
    };
    match read() {
        Err(error) if is_missing(&error) => Ok(ProcessScan::default()),
        Err(error) if is_denied(&error) => Ok(ProcessScan {
            unreadable: proc.unreadable(pid),
            ..ProcessScan::default()
        }),
        other => other,
    }
}

/// The process with this pid and its sockets; `None` if it owns none of them any more. As far as `trust` requires it, the
/// sockets are read again. The second value says whether a part of its table has become unreadable.
fn recheck(
    proc: &ProcFs,
    pid: i32,
    mut table: SocketFds,
    inodes: &Inodes,
    trust: Trust,
) -> io::Result<(Option<Owned>, bool)> {
    let process = File::open(proc.path(&pid.to_string()))?;
    let dir = open_in(process.as_fd(), c"fd", OFlag::O_DIRECTORY)?;
    let still_open = |&(inode, fd): &(u32, RemoteFd)| {
        fd_state(read_socket_link(dir.as_fd(), fd.0), inode) == FdState::Open
    };
    let checked = match trust {
        // One socket is enough to detect that another process has the pid by now.
        Trust::TheScan => &table.sockets[..1],
        Trust::Nothing => &table.sockets[..],
    };
    let mut denied = false;
    if !checked
        .par_iter()
        .with_min_len(FDS_PER_TASK)
        .all(still_open)
    {
        let read = || read_table(dir.as_fd(), &AtomicBool::new(false));
        table = match read_between_execs(process.as_fd(), read)? {
            Some(table) => table,
            None => read()?,
        };
        denied = table.denied;
        table.sockets.retain(|(inode, _)| inodes.contains(inode));
        if table.sockets.is_empty() {
            return Ok((None, denied));
        }
    }
    let process = identity(proc, process.as_fd(), pid)?;
    Ok((Some((proc.to_show(process), table)), denied))
}

#[cfg(test)]
#[path = "owners_tests.rs"]
mod tests;
