//! Inspecting an owner from outside: its descriptors, threads and system calls, and which processes share its descriptor table.
//!
//! In `/proc/PID` this module reads `auxv`, `comm`, `fd`, `fdinfo`, `stat` and `status`, and of each thread `stat`, `status` and
//! `syscall`. The kernel answers these without the memory of the process. Two reads need that memory and may wait for it:
//!
//! - `cmdline`. cwkill reads it only if it is not permitted to compare (kcmp(2)) a process that could share the descriptor
//!   table.
//! - the lists of descriptors of poll(2) and select(2) (process_vm_readv(2)), if a thread waits in such a call.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::thread;

use nix::errno::Errno;
use nix::sys::stat::makedev;
use rustix::fs::readlinkat_raw;
use rustix::path::DecInt;

use super::error::OwnerError;
use super::in_use::{Evidence, IoUring, runs_finalizers, works_for_io_uring};
use super::obstacle;
use super::ptrace::{StoppedProcess, Thread};
use super::syscalls::SyscallFds;
use super::{RETRY_INTERVAL, ReclaimRules, ReclaimTarget, read_text};
use crate::finder::dead::{self, DeadSocket, SuspectVerdict};
use crate::model::{InUse, Privilege, ReclaimReason};
use crate::privileges;
use crate::proc::epoll::EpollSet;
use crate::proc::status::thread_state;
use crate::proc::syscall::{Syscall, read_memory};
use crate::proc::{ProcFs, Process, fds, is_missing, status_field};
use crate::sys::{self, RemoteFd, errno_of};

/// Attempts to inspect an owner while its /proc entries are incomplete.
const MAX_ATTEMPTS: u32 = 5;

/// An owner as cwkill saw it before stopping it.
pub struct Inspection<'p> {
    pub process: InspectedProcess<'p>,
    /// All processes that existed, by pid.
    processes: HashSet<i32>,
    /// The threads of the owner.
    threads: HashSet<i32>,
    /// The numbers of the owner's descriptors.
    fds: HashSet<i32>,
    special_fds: Vec<SpecialFd>,
    evidence: Evidence,
}

impl<'p> Inspection<'p> {
    /// Inspects the owner. With `rules.force` no evidence of use is collected.
    pub fn of(
        proc: &'p ProcFs,
        process: &Process,
        rules: &ReclaimRules,
    ) -> Result<Self, OwnerError> {
        retry_during_exec(proc, process, || Self::once(proc, process, rules))
    }

    /// Collects only the evidence from the system calls of the owner's threads.
    pub fn syscalls_only(proc: &ProcFs, process: &Process) -> Result<Evidence, OwnerError> {
        retry_during_exec(proc, process, || {
            let process = InspectedProcess::open(proc, process)?;
            Ok(Evidence {
                syscalls: process.fds_used_by(&process.syscalls()?),
                ..Evidence::default()
            })
        })
    }

    /// Collects the evidence that the kernel gives without the memory of the owner, which may be blocked. A call of poll(2) or
    /// select(2) may then use any descriptor.
    pub fn without_memory(proc: &ProcFs, process: &Process) -> Result<Evidence, OwnerError> {
        let process = InspectedProcess::open(proc, process)?;
        process.ensure_leader()?;
        let special_fds = process.special_fds(&process.fd_numbers()?)?;
        let table_size = process.table_size();
        let calls = process.syscalls()?;
        let call =
            |(tid, call): &(i32, Syscall)| SyscallFds::of(*tid, call, &|_, _| None, table_size);
        let (epolls, io_urings) = process.epolls_and_io_urings(&special_fds)?;
        Ok(Evidence {
            syscalls: calls.iter().map(call).collect(),
            epolls,
            io_urings,
            io_uring_worker: process.io_uring_worker()?,
            ..Evidence::default()
        })
    }

    fn once(proc: &'p ProcFs, process: &Process, rules: &ReclaimRules) -> Result<Self, OwnerError> {
        let process = InspectedProcess::open(proc, process)?;
        process.ensure_leader()?;
        process.ensure_stoppable()?;
        if process.is_32bit()? {
            return Err(ReclaimReason::Is32bit.into());
        }
        let processes: HashSet<i32> = proc.pids()?.into_iter().collect();
        process.ensure_not_shared(&processes, &|| false, rules)?;
        let fds = process.fd_numbers()?;
        let special_fds = process.special_fds(&fds)?;
        let threads = proc.tids(process.pid)?.into_iter().collect();
        let mut evidence = Evidence::default();
        if !rules.force {
            let calls = process.syscalls()?;
            if let Some((tid, _)) = calls.iter().find(|(_, call)| call.is_exec()) {
                return Err(ReclaimReason::InExec(*tid).into());
            }
            let waits = |(tid, call): &&(i32, Syscall)| {
                call.waits_for_vfork() && obstacle::is_uninterruptible(proc, process.pid, *tid)
            };
            if let Some((tid, _)) = calls.iter().find(waits) {
                return Err(ReclaimReason::InVfork(*tid).into());
            }
            evidence.syscalls = process.fds_used_by(&calls);
            evidence.transfer = process.transfer(&calls);
            (evidence.epolls, evidence.io_urings) = process.epolls_and_io_urings(&special_fds)?;
            evidence.io_uring_worker = process.io_uring_worker()?;
            evidence.finalizer = process.finalizer()?;
        } else if let Ok(calls) = process.syscalls() {
            evidence.transfer = process.transfer(&calls);
        }
        Ok(Inspection {
            process,
            processes,
            threads,
            fds: fds.into_iter().collect(),
            special_fds,
            evidence,
        })
    }

    /// The evidence that the owner uses `target`.
    pub fn in_use(&self, target: &ReclaimTarget, rules: &ReclaimRules) -> Option<InUse> {
        target.in_use(&self.evidence, target.unread, rules)
    }

    /// The descriptors whose path in the owner is /dev/null.
    pub fn null_fds(&self) -> impl Iterator<Item = RemoteFd> {
        self.special_fds.iter().filter_map(|fd| match fd {
            SpecialFd::DevNull(fd) => Some(RemoteFd(*fd)),
            SpecialFd::Epoll(_) | SpecialFd::IoUring(_) => None,
        })
    }

    /// Whether a stop would end a transfer of the owner early.
    pub fn has_transfer(&self) -> bool {
        self.evidence.transfer.is_some()
    }

    /// Collects the evidence again while the owner is stopped. Inspects only those parts again that can have changed.
    pub fn repeat(
        &self,
        stopped: &StoppedProcess,
        rules: &ReclaimRules,
    ) -> Result<Evidence, OwnerError> {
        let process = &self.process;
        // If the first thread has exited, the descriptor table appears to be empty.
        process.ensure_leader()?;
        // Only the owner's threads could create another process that shares its table, and they are stopped now.
        let processes: HashSet<i32> = process.proc.pids()?.into_iter().collect();
        let is_over = || stopped.elapsed() >= rules.stop_limit;
        let new = processes.difference(&self.processes);
        process.ensure_not_shared(new, &is_over, rules)?;
        // The finalizers do not change. If a transfer began after the inspection, the stop has already ended it.
        let mut evidence = Evidence::default();
        if !rules.force {
            let mut fds = process.fd_numbers()?;
            fds.retain(|fd| !self.fds.contains(fd));
            let mut special_fds = process.special_fds(&fds)?;
            special_fds.extend(&self.special_fds);
            (evidence.epolls, evidence.io_urings) = process.epolls_and_io_urings(&special_fds)?;
            let tids = stopped.threads().iter().map(|thread| thread.tid);
            let new = tids.filter(|tid| !self.threads.contains(tid));
            evidence.io_uring_worker = process.io_uring_worker_among(new);
            evidence.syscalls = fds_used_by_stopped(stopped.threads(), process.table_size());
        }
        Ok(evidence)
    }
}

/// The descriptors that the system calls of stopped threads use, from their registers.
fn fds_used_by_stopped(threads: &[Thread], table_size: u32) -> Vec<SyscallFds> {
    let one = |thread: &Thread| {
        let memory = |address, length| read_memory(thread.tid, address, length);
        let call = thread.syscall()?;
        Some(SyscallFds::of(thread.tid, &call, &memory, table_size))
    };
    threads.iter().filter_map(one).collect()
}

/// Inspects an owner. While another thread than the first executes a program, /proc shows neither a descriptor table nor
/// memory for a moment; then this inspects again. A vfork(2) is usually as short.
fn retry_during_exec<T>(
    proc: &ProcFs,
    process: &Process,
    inspect: impl Fn() -> Result<T, OwnerError>,
) -> Result<T, OwnerError> {
    let is_running = || is_running(proc, process.id.pid, process.id.start_time);
    for _ in 1..MAX_ATTEMPTS {
        match inspect() {
            Err(OwnerError::Exited) if !is_running() => return Err(OwnerError::Exited),
            Err(
                OwnerError::Exited
                | OwnerError::Reason(
                    ReclaimReason::LeaderExited
                    | ReclaimReason::InExec(_)
                    | ReclaimReason::InVfork(_),
                ),
            ) => thread::sleep(RETRY_INTERVAL),
            other => return other,
        }
    }
    match inspect() {
        Err(OwnerError::Exited) if is_running() => Err(ReclaimReason::OwnerBusy.into()),
        other => other,
    }
}

/// An owner that cwkill can inspect.
#[derive(Debug)]
pub struct InspectedProcess<'p> {
    proc: &'p ProcFs,
    pub pid: i32,
    start_time: u64,
    pidfd: OwnedFd,
    /// Its directory `fd`.
    fd_dir: File,
}

/// A descriptor through which the owner may use other descriptors, or of /dev/null.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpecialFd {
    Epoll(i32),
    IoUring(i32),
    /// Its path in the owner is /dev/null.
    DevNull(i32),
}

impl<'p> InspectedProcess<'p> {
    /// Opens `process`.
    ///
    /// # Errors
    /// ESRCH: another process has the pid by now.
    pub fn open(proc: &'p ProcFs, process: &Process) -> Result<Self, Errno> {
        let pidfd = proc.open_pidfd(process.id)?;
        let fd_dir = File::open(proc.path(&format!("{}/fd", process.id.pid)));
        Ok(InspectedProcess {
            pidfd,
            fd_dir: fd_dir.map_err(|error| errno_of(&error))?,
            proc,
            pid: process.id.pid,
            start_time: process.id.start_time,
        })
    }

    pub fn proc(&self) -> &'p ProcFs {
        self.proc
    }

    fn read_text(&self, name: &str) -> io::Result<String> {
        read_text(self.proc.path(&format!("{}/{name}", self.pid)))
    }

    /// The dead socket of `target`; `None` if its descriptor is something else by now.
    pub fn dead_socket(&self, target: &ReclaimTarget) -> Result<Option<DeadSocket>, Errno> {
        match dead::examine(self.pidfd.as_fd(), target.owner.fd, target.inode) {
            Some(SuspectVerdict::Dead(socket)) if socket.cookie == target.cookie => {
                Ok(Some(socket))
            }
            Some(SuspectVerdict::Unknown(errno)) => Err(errno),
            _ => Ok(None),
        }
    }

    /// Whether the number is free in the owner's descriptor table.
    pub fn is_free(&self, fd: RemoteFd) -> bool {
        let link = fds::read_socket_link(self.fd_dir.as_fd(), fd.0);
        link.is_err_and(|error| is_missing(&error))
    }

    /// Whether a descriptor of the owner is the device null, whatever its path.
    pub fn is_dev_null(&self, fd: RemoteFd) -> bool {
        let path = self.proc.path(&format!("{}/fd/{}", self.pid, fd.0));
        fs::metadata(path).is_ok_and(|file| {
            // Documentation/admin-guide/devices.txt.
            file.file_type().is_char_device() && file.rdev() == makedev(1, 3)
        })
    }

    /// Whether a descriptor of the owner can be read and written.
    pub fn is_for_both(&self, fd: RemoteFd) -> bool {
        self.flags(fd)
            .is_some_and(|flags| flags & libc::O_ACCMODE == libc::O_RDWR)
    }

    /// Whether execve(2) closes a descriptor of the owner; `None` if cwkill cannot see it.
    pub fn closes_on_exec(&self, fd: RemoteFd) -> Option<bool> {
        self.flags(fd).map(|flags| flags & libc::O_CLOEXEC != 0)
    }

    /// The flags of a descriptor and its file, as in open(2). Source: fs/proc/fd.c, seq_show.
    fn flags(&self, fd: RemoteFd) -> Option<i32> {
        let fdinfo = self.read_text(&format!("fdinfo/{}", fd.0)).ok()?;
        let flags = fdinfo
            .lines()
            .find_map(|line| line.strip_prefix("flags:"))?;
        i32::from_str_radix(flags.trim(), 8).ok()
    }

    fn table_size(&self) -> u32 {
        self.proc.table_size(self.pid)
    }

    /// The numbers of the owner's descriptors.
    fn fd_numbers(&self) -> io::Result<Vec<i32>> {
        // Opened again, because reading an open directory continues after the last entry that was read.
        let dir = File::open(self.proc.path(&format!("{}/fd", self.pid)))?;
        fds::list_fds(dir.as_fd())
    }

    /// The epoll sets and io_urings among the descriptors `fds`.
    fn special_fds(&self, fds: &[i32]) -> io::Result<Vec<SpecialFd>> {
        let mut special_fds = Vec::new();
        for &fd in fds {
            match special_fd(self.fd_dir.as_fd(), fd) {
                Ok(special_fd) => special_fds.extend(special_fd),
                Err(error) if is_missing(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(special_fds)
    }

    fn epolls_and_io_urings(
        &self,
        special_fds: &[SpecialFd],
    ) -> io::Result<(Vec<EpollSet>, Vec<IoUring>)> {
        let (mut epolls, mut io_urings) = (Vec::new(), Vec::new());
        for special_fd in special_fds {
            let (SpecialFd::Epoll(fd) | SpecialFd::IoUring(fd)) = *special_fd else {
                continue;
            };
            let fdinfo = match self.read_text(&format!("fdinfo/{fd}")) {
                Ok(fdinfo) => fdinfo,
                Err(error) if is_missing(&error) => continue,
                Err(error) => return Err(error),
            };
            match special_fd {
                SpecialFd::Epoll(_) => epolls.push(EpollSet::parse(fd, &fdinfo)),
                SpecialFd::IoUring(_) => io_urings.push(IoUring::parse(fd, &fdinfo)),
                SpecialFd::DevNull(_) => {}
            }
        }
        Ok((epolls, io_urings))
    }

    /// The system calls in which threads of the owner sleep, each with the tid. /proc does not show the call of a running
    /// thread, which lasts only a short time.
    fn syscalls(&self) -> io::Result<Vec<(i32, Syscall)>> {
        let mut calls = Vec::new();
        for tid in self.proc.tids(self.pid)? {
            let path = format!("{}/task/{tid}/syscall", self.pid);
            match read_text(self.proc.path(&path)) {
                Ok(line) => calls.extend(Syscall::parse(&line).map(|call| (tid, call))),
                Err(error) if is_missing(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(calls)
    }

    /// The descriptors that `calls` use, as far as cwkill can see without stopping the owner.
    fn fds_used_by(&self, calls: &[(i32, Syscall)]) -> Vec<SyscallFds> {
        let memory = |address, length| read_memory(self.pid, address, length);
        let table_size = self.table_size();
        let one = |(tid, call): &(i32, Syscall)| SyscallFds::of(*tid, call, &memory, table_size);
        calls.iter().map(one).collect()
    }

    /// The first thread that waits in the middle of a transfer: its tid and the number of its call. A sleep that signals do not
    /// interrupt, like most sleeps for a disk, does not count: a stop waits for its end.
    fn transfer(&self, calls: &[(i32, Syscall)]) -> Option<(i32, i64)> {
        let is_interruptible = |tid: i32| {
            let stat = self.proc.path(&format!("{}/task/{tid}/stat", self.pid));
            fs::read(stat).is_ok_and(|stat| thread_state(&stat) == Some(b'S'))
        };
        let mut calls = calls.iter();
        let found = calls.find(|(tid, call)| call.can_end_short() && is_interruptible(*tid));
        found.map(|(tid, call)| (*tid, call.number))
    }

    fn finalizer(&self) -> io::Result<Option<String>> {
        self.thread_name(&runs_finalizers)
    }

    /// Fails if cwkill is the process, it is frozen, or another process traces it.
    pub fn ensure_stoppable(&self) -> Result<(), OwnerError> {
        if u32::try_from(self.pid) == Ok(std::process::id()) {
            return Err(ReclaimReason::OwnProcess.into());
        }
        if self.proc.is_frozen(self.pid) {
            return Err(ReclaimReason::Frozen.into());
        }
        match self.tracer()? {
            Some(tracer) => Err(ReclaimReason::Traced(tracer, comm(self.proc, tracer)).into()),
            None => Ok(()),
        }
    }

    /// A thread that waits in the middle of a transfer, with the number of its system call.
    pub fn current_transfer(&self) -> io::Result<Option<(i32, i64)>> {
        Ok(self.transfer(&self.syscalls()?))
    }

    /// The name of a thread that works for an io_uring.
    pub fn io_uring_worker(&self) -> io::Result<Option<String>> {
        self.thread_name(&works_for_io_uring)
    }

    /// The name of one of these threads that works for an io_uring. The kernel names them before it lists them.
    fn io_uring_worker_among(&self, tids: impl IntoIterator<Item = i32>) -> Option<String> {
        let mut names = tids.into_iter().filter_map(|tid| comm(self.proc, tid));
        names.find(|name| works_for_io_uring(name))
    }

    /// The first name of a thread that `matches`.
    fn thread_name(&self, matches: &dyn Fn(&str) -> bool) -> io::Result<Option<String>> {
        self.first_in_threads("comm", |comm| {
            let name = comm.trim_end();
            matches(name).then(|| name.to_owned())
        })
    }

    /// What `find` finds in the first file `name` of a thread. A thread that ends meanwhile is left out.
    fn first_in_threads<T>(
        &self,
        name: &str,
        find: impl Fn(&str) -> Option<T>,
    ) -> io::Result<Option<T>> {
        for tid in self.proc.tids(self.pid)? {
            match self.read_text(&format!("task/{tid}/{name}")) {
                Ok(text) => {
                    if let Some(found) = find(&text) {
                        return Ok(Some(found));
                    }
                }
                Err(error) if is_missing(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// Whether the owner still runs; it may have executed another program.
    pub fn is_running(&self) -> bool {
        is_running(self.proc, self.pid, self.start_time)
    }

    /// Fails if the first thread has exited while others still run. /proc then does not show the descriptor table.
    fn ensure_leader(&self) -> Result<(), OwnerError> {
        match leader_exited(&self.read_text("status")?) {
            true => Err(ReclaimReason::LeaderExited.into()),
            false => Ok(()),
        }
    }

    fn is_32bit(&self) -> io::Result<bool> {
        let auxv = fs::read(self.proc.path(&format!("{}/auxv", self.pid)))?;
        Ok(is_32bit(&auxv))
    }

    /// The process that traces a thread of the owner.
    fn tracer(&self) -> io::Result<Option<i32>> {
        self.first_in_threads("status", |status| {
            status_field(status, "TracerPid:").filter(|tracer| *tracer != 0)
        })
    }

    /// Fails if another process among `processes` shares the owner's descriptor table or may share it (clone(2) with
    /// CLONE_FILES and without CLONE_THREAD), because cwkill would not stop that process. `is_over` says whether the stop limit
    /// is reached: kcmp(2) can wait for an exec of the other process (kernel/kcmp.c, exec_update_lock).
    fn ensure_not_shared<'a>(
        &self,
        processes: impl IntoIterator<Item = &'a i32>,
        is_over: &dyn Fn() -> bool,
        rules: &ReclaimRules,
    ) -> Result<(), OwnerError> {
        for &other in processes.into_iter().filter(|pid| **pid != self.pid) {
            if is_over() {
                return Err(ReclaimReason::StopLimitReached(rules.stop_limit).into());
            }
            let reason = match sys::share_descriptors(self.pid, other) {
                Ok(false) => continue,
                Ok(true) => ReclaimReason::SharedTable(other),
                Err(error) => match errno_of(&error) {
                    // The other process has exited, or the owner has; a later step detects that.
                    Errno::ESRCH => continue,
                    Errno::EPERM if !self.could_share(other) => continue,
                    errno => {
                        let has_ptrace = privileges::is_held(Privilege::Ptrace);
                        ReclaimReason::not_compared(other, errno, has_ptrace)
                    }
                },
            };
            return Err(reason.into());
        }
        Ok(())
    }

    /// Whether process `other` could share the owner's descriptor table, if cwkill is not permitted to compare it (kcmp(2)).
    /// If it does, both processes have the same table size, the same number of open descriptors and the same command line. execve(2) unshares
    /// the table, so processes that share one run the same program. Their users may differ, because setuid(2) keeps the
    /// table. A file that cwkill cannot read counts as equal.
    fn could_share(&self, other: i32) -> bool {
        let of_both = |name: &str| -> io::Result<(Vec<u8>, Vec<u8>)> {
            let file = |pid: i32| fs::read(self.proc.path(&format!("{pid}/{name}")));
            Ok((file(self.pid)?, file(other)?))
        };
        let could = || -> io::Result<bool> {
            let (owner, others) = of_both("status")?;
            let text = |status| String::from_utf8_lossy(status).into_owned();
            if !could_share(&text(&owner), &text(&others)) || self.has_other_fd_count(other)? {
                return Ok(false);
            }
            // Read last and for few processes only: the kernel reads it from the memory of the process, which may block.
            let (owner, others) = of_both("cmdline")?;
            Ok(owner == others)
        };
        match could() {
            Ok(could) => could,
            Err(error) => !is_missing(&error),
        }
    }

    /// Whether both processes have different numbers of open descriptors, in two checks during which the owner's number does not
    /// change. Since Linux 6.2 every process may read this number (fs/proc/fd.c, proc_fd_getattr).
    fn has_other_fd_count(&self, other: i32) -> io::Result<bool> {
        let count = |pid: i32| {
            let fds = fs::metadata(self.proc.path(&format!("{pid}/fd")));
            fds.map(|fds| fds.len())
        };
        for _ in 0..2 {
            let (before, others, after) = (count(self.pid)?, count(other)?, count(self.pid)?);
            // The owner has descriptors, so the number is 0 only on an older kernel.
            if before == 0 || before != after || others == before {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Whether the process still exists and may have descriptors.
fn is_running(proc: &ProcFs, pid: i32, start_time: u64) -> bool {
    let status = read_text(proc.path(&format!("{pid}/status")));
    let has_ended = |status: String| {
        let is_dead = matches!(state(&status), Some('Z' | 'X'));
        is_dead && !leader_exited(&status)
    };
    proc.start_time(pid) == Some(start_time) && status.is_ok_and(|status| !has_ended(status))
}

/// The state in /proc/PID/status, a letter of proc_pid_stat(5).
fn state(status: &str) -> Option<char> {
    let state = status
        .lines()
        .find_map(|line| line.strip_prefix("State:"))?;
    state.trim_start().chars().next()
}

fn leader_exited(status: &str) -> bool {
    let is_zombie = state(status) == Some('Z');
    is_zombie && status_field::<u32>(status, "Threads:").is_some_and(|threads| threads > 1)
}

/// Whether this is the auxiliary vector of a 32-bit program. The vector consists of pairs of words, each 32 or 64 bits wide
/// like the program: a small identifier and a value. Read as 64-bit words, a pair of 32-bit words is a large identifier,
/// because the first value is an address or a set of bits. Source: fs/binfmt_elf.c, create_elf_tables;
/// arch/x86/include/asm/elf.h, ARCH_DLINFO.
fn is_32bit(auxv: &[u8]) -> bool {
    let identifier = |pair: &[u8]| pair.first_chunk().map(|word| u64::from_ne_bytes(*word));
    let mut identifiers = auxv.chunks(16).filter_map(identifier);
    identifiers.any(|identifier| identifier > u32::MAX.into())
}

/// Whether two processes with these status files could share one descriptor table.
fn could_share(owner: &str, other: &str) -> bool {
    let same = |name: &str| {
        let value = |status: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            Some(line.split_whitespace().next()?.to_owned())
        };
        value(owner) == value(other)
    };
    // Only a process with memory has the line `VmSize`. Source: fs/proc/array.c, proc_pid_status.
    same("FDSize:") && other.contains("\nVmSize:")
}

/// The name of a process or thread; `None` if cwkill cannot read it.
fn comm(proc: &ProcFs, pid: i32) -> Option<String> {
    let comm = read_text(proc.path(&format!("{pid}/comm"))).ok()?;
    Some(comm.trim_end().to_owned())
}

fn special_fd(dir: BorrowedFd<'_>, fd: i32) -> io::Result<Option<SpecialFd>> {
    let mut target = [0; 32];
    let length = readlinkat_raw(dir, DecInt::new(fd).as_c_str(), &mut target[..])?;
    let target = &target[..length];
    Ok(match target {
        b"anon_inode:[eventpoll]" => Some(SpecialFd::Epoll(fd)),
        b"anon_inode:[io_uring]" => Some(SpecialFd::IoUring(fd)),
        b"/dev/null" => Some(SpecialFd::DevNull(fd)),
        _ => None,
    })
}

#[cfg(test)]
#[path = "inspect_tests.rs"]
mod tests;
