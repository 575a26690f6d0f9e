//! Descriptor tables that /proc/PID/fd does not show.
//!
//! /proc/PID/fd is the table of the first thread. Another thread can have a table of its own (unshare(2) or clone(2) without
//! CLONE_FILES). After the exit of the first thread, the table of all others is not shown either. This module reads both kinds
//! through `/proc/PID/task/TID/fd`. That costs one kcmp(2) for each thread, so [`find`] reads all processes only for sockets that
//! have no other owner. For the others, [`find_in`] reads the processes that are known to own one.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use rayon::prelude::*;

use super::descriptor_scan::OtherTable;
use crate::proc::fds::read_table;
use crate::proc::{Inodes, ProcFs, Process, RemoteFd, identity, is_denied, is_missing};
use crate::sys;

/// The tables of one process that are compared with each other. A program with more of them has the others searched too late
/// to be of use: comparing each thread with each table would take too long.
const MAX_TABLES: usize = 16;

/// Sockets by inode.
type Sockets = Vec<(u32, RemoteFd)>;

/// The sockets in the table of one thread.
#[derive(Debug)]
pub(super) struct ThreadTable {
    pub process: Arc<Process>,
    /// A thread that uses the table.
    pub tid: i32,
    /// The sockets that were searched for, by inode.
    pub sockets: Vec<(u32, RemoteFd)>,
}

/// Finds the tables that /proc/PID/fd does not show and that have a socket with one of `inodes`.
///
/// A process that ends meanwhile, or that cwkill is not permitted to read, is left out.
///
/// # Errors
/// /proc cannot be listed.
pub(super) fn find(proc: &ProcFs, inodes: &Inodes) -> io::Result<Vec<ThreadTable>> {
    match inodes.is_empty() {
        true => Ok(Vec::new()),
        false => find_in(proc, proc.pids()?, inodes),
    }
}

/// As [`find`], but only of the processes `pids`.
pub(super) fn find_in(
    proc: &ProcFs,
    pids: Vec<i32>,
    inodes: &Inodes,
) -> io::Result<Vec<ThreadTable>> {
    // The pids of another pid namespace are not those of kcmp(2).
    if !proc.shows_own_pid_namespace() {
        return Ok(Vec::new());
    }
    let of_process = |pid: i32| match scan_process(proc, pid, inodes) {
        Err(error) if is_missing(&error) || is_denied(&error) => Ok(Vec::new()),
        other => other,
    };
    let tables: Vec<Vec<ThreadTable>> = pids
        .into_par_iter()
        .map(of_process)
        .collect::<io::Result<_>>()?;
    Ok(tables.into_iter().flatten().collect())
}

/// All sockets in the tables that /proc/PID/fd does not show, of all processes. Processes are left out as by [`find`].
///
/// # Errors
/// As [`find`].
pub(super) fn scan_all(proc: &ProcFs) -> io::Result<Vec<OtherTable>> {
    if !proc.shows_own_pid_namespace() {
        return Ok(Vec::new());
    }
    let of_process = |pid: i32| match tables(proc, pid) {
        Err(error) if is_missing(&error) || is_denied(&error) => Ok(Vec::new()),
        Err(error) => Err(error),
        Ok(tables) => {
            let table = |(tid, sockets)| OtherTable {
                pid,
                tid: Some(tid),
                started: None,
                sockets,
            };
            Ok(tables.into_iter().map(table).collect())
        }
    };
    let tables: Vec<Vec<_>> = proc
        .pids()?
        .into_par_iter()
        .map(of_process)
        .collect::<io::Result<_>>()?;
    Ok(tables.into_iter().flatten().collect())
}

/// The sockets in the tables that only single threads of process `pid` have, by thread.
fn tables(proc: &ProcFs, pid: i32) -> io::Result<Vec<(i32, Sockets)>> {
    let mut tables = Vec::new();
    for tid in own_tables(pid, &proc.tids(pid)?) {
        let path = proc.path(&format!("{pid}/task/{tid}/fd"));
        let read = || read_table(File::open(path)?.as_fd(), &AtomicBool::new(false));
        match read() {
            // The thread has ended.
            Err(error) if is_missing(&error) => {}
            other => tables.push((tid, other?.sockets)),
        }
    }
    Ok(tables)
}

fn scan_process(proc: &ProcFs, pid: i32, inodes: &Inodes) -> io::Result<Vec<ThreadTable>> {
    // This directory keeps referring to the same process, even if another process gets the pid.
    let dir = File::open(proc.path(&pid.to_string()))?;
    let mut tables = tables(proc, pid)?;
    for (_, sockets) in &mut tables {
        sockets.retain(|(inode, _)| inodes.contains(inode));
    }
    tables.retain(|(_, sockets)| !sockets.is_empty());
    if tables.is_empty() {
        return Ok(Vec::new());
    }
    let process = Arc::new(proc.to_show(identity(proc, dir.as_fd(), pid)?));
    let table = |(tid, sockets)| ThreadTable {
        process: Arc::clone(&process),
        tid,
        sockets,
    };
    Ok(tables.into_iter().map(table).collect())
}

/// One of `tids` for each descriptor table that is not the one of the first thread.
///
/// A thread that cannot be compared (it has ended, or the kernel has no kcmp(2)) is left out.
pub(super) fn own_tables(pid: i32, tids: &[i32]) -> Vec<i32> {
    let mut tables: Vec<i32> = Vec::new();
    for &tid in tids.iter().filter(|tid| **tid != pid) {
        // After its exit the first thread has no table, which is different from any other.
        if !matches!(sys::share_descriptors(pid, tid), Ok(false)) {
            continue;
        }
        let is_other = |known: &i32| matches!(sys::share_descriptors(*known, tid), Ok(false));
        if tables.iter().all(is_other) {
            tables.push(tid);
        }
        if tables.len() == MAX_TABLES {
            break;
        }
    }
    tables
}
