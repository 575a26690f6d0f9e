//! System calls that cwkill makes in a thread of the owner.
//!
//! cwkill lets the thread run to the entry of a system call of its own: the call in which it was interrupted, which the kernel
//! restarts, or its next call. There cwkill replaces the call with another. At the exit of that call cwkill restores the
//! thread, which then makes its own call. docs/decisions/reclaim.md says what happens if cwkill dies at any of these points.

use std::io;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::arch::Registers;
use super::stop::{StoppedProcess, Thread, ThreadState};
use super::{is_syscall_instruction, read_registers, write_memory, write_registers};
use crate::model::ReclaimReason;
use crate::proc::{ProcFs, status_field};
use crate::reclaim::error::OwnerError;
use crate::reclaim::seccomp::{self, SeccompData};
use crate::reclaim::syscalls::FalseReturnRisk;
use crate::reclaim::{obstacle, read_text};
use crate::sys::ptrace::{self, TraceEvent};
use crate::sys::{self, errno_of};

/// The time for which cwkill waits for its call if the call does not return. Before the return it cannot restore the thread.
const MAX_WAIT_FOR_RETURN: Duration = Duration::from_secs(10);
/// Time between two checks of that call.
const CHECK_INTERVAL: Duration = Duration::from_millis(1);

/// The time that a thread that computes gets to stop again. On an idle machine it takes some microseconds.
const MAX_TIME_TO_STOP: Duration = Duration::from_millis(10);

/// The maximum number of threads among which the time until the stop limit is divided. Shorter shares would be too short for a
/// thread on a busy machine.
const MAX_THREADS_WITH_A_SHARE: u32 = 3;

/// Attempts to bring a thread to a system call. Other stops can come first.
const MAX_RESUMES: u32 = 3;

/// A call that does nothing (EBADF). A seccomp filter that permits close(2) permits it.
const NO_OP: (i64, &[u64]) = (libc::SYS_close, &[u64::MAX]);

/// Whether a call has had its effect, even if it has not returned yet.
type IsDone<'d> = &'d dyn Fn() -> bool;

/// The position of the thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// At the entry of its own call.
    AtOwnCall,
    /// At the entry of cwkill's call, which has replaced its own.
    Replaced,
    /// In cwkill's call.
    InRemoteCall,
    /// At the exit of cwkill's call, restored.
    Restored,
    /// It can make no more calls for cwkill: a signal is pending for it, or it is gone.
    Finished,
}

/// A thread of a stopped process that makes system calls for cwkill.
///
/// It owns the stopped process. When it is dropped, cwkill restores the thread and releases all threads.
#[derive(Debug)]
pub struct RemoteThread {
    stopped: StoppedProcess,
    thread: ThreadAtCall,
    phase: Phase,
}

/// A stopped thread that was brought to the entry of a system call of its own.
#[derive(Debug)]
struct ThreadAtCall {
    /// Its index in the [`StoppedProcess`].
    index: usize,
    tid: i32,
    /// Its registers at the entry of its own call.
    entry: Registers,
    /// The number of its own call.
    own_number: i64,
    /// The registers that it is released with.
    restored: Registers,
    /// Its seccomp filters.
    filters: Vec<Vec<u64>>,
}

impl RemoteThread {
    /// Brings a thread of `stopped` to the entry of a system call of its own. `low_risk_only`: use only a thread whose risk is
    /// at most [`FalseReturnRisk::Low`].
    ///
    /// # Errors
    /// No thread can be used. All threads have been released then; the second value is the longest time for which one of them
    /// had stood still.
    pub fn prepare(
        mut stopped: StoppedProcess,
        proc: &ProcFs,
        low_risk_only: bool,
    ) -> Result<Self, (OwnerError, Duration)> {
        match Self::choose(&mut stopped, proc, low_risk_only) {
            Ok(thread) => Ok(RemoteThread {
                stopped,
                thread,
                phase: Phase::AtOwnCall,
            }),
            Err(error) => Err((error, stopped.longest_standstill())),
        }
    }

    fn choose(
        stopped: &mut StoppedProcess,
        proc: &ProcFs,
        low_risk_only: bool,
    ) -> Result<ThreadAtCall, OwnerError> {
        let candidates = candidates(stopped)?;
        let lowest = candidates.first().map(|candidate| candidate.risk);
        if low_risk_only && lowest.is_none_or(|risk| risk > FalseReturnRisk::Low) {
            return Err(OwnerError::TryAgain);
        }
        let mut reason = None;
        // A running thread gets only a share of the time to make a call.
        let mut shares = u32::try_from(candidates.len())
            .unwrap_or(u32::MAX)
            .min(MAX_THREADS_WITH_A_SHARE);
        for Candidate {
            thread,
            tid,
            registers,
            ..
        } in candidates
        {
            let now = Instant::now();
            let Some(time) = stopped.deadline().checked_duration_since(now) else {
                break;
            };
            let until = now + time / shares.max(1);
            // Checked before the thread enters a call, because restoring it needs a remote call as well.
            let filters = match permitting_filters(proc, stopped.pid(), tid, &registers) {
                Ok(filters) => filters,
                Err(error) => {
                    reason = Some(error);
                    continue;
                }
            };
            shares = shares.saturating_sub(1);
            if let Some((entry, own_number)) = enter_own_call(stopped, thread, until)? {
                return Ok(ThreadAtCall {
                    index: thread,
                    tid,
                    restored: Registers::restored(&registers, &entry, own_number),
                    entry,
                    own_number,
                    filters,
                });
            }
        }
        let no_syscall = || obstacle::no_syscall(proc, stopped.pid(), stopped.limit());
        Err(reason.unwrap_or_else(no_syscall).into())
    }

    pub fn stopped(&self) -> &StoppedProcess {
        &self.stopped
    }

    /// Whether the seccomp filters of the thread permit a call.
    pub fn permits(&self, number: i64, arguments: &[u64]) -> bool {
        permits(&self.thread.filters, &self.thread.entry, number, arguments)
    }

    /// Writes into memory of the owner. cwkill does so only where it has mapped a page for it. Returns whether all was written.
    pub fn write(&self, address: u64, bytes: &[u8]) -> bool {
        write_memory(self.thread.tid, address, bytes)
    }

    /// Makes a system call in the owner and returns its result. `is_done` says whether the call has had its effect.
    ///
    /// # Errors
    /// The call was not made, or has not returned. No more calls can be made then. [`OwnerError::TryAgain`]: a signal is
    /// pending for the thread, and nothing was done. [`ReclaimReason::CloseHangs`]: the call may still have its effect.
    pub fn call(
        &mut self,
        number: i64,
        arguments: &[u64],
        is_done: IsDone<'_>,
    ) -> Result<i64, OwnerError> {
        if self.phase == Phase::Restored {
            self.return_to_own_call()?;
        }
        if self.phase != Phase::AtOwnCall {
            return Err(OwnerError::TryAgain);
        }
        self.replace_syscall(number, arguments, is_done)
    }

    fn thread(&mut self) -> &mut Thread {
        self.stopped.thread_mut(self.thread.index)
    }

    /// Moves the thread from the exit of cwkill's call to the entry of its own.
    fn return_to_own_call(&mut self) -> Result<(), OwnerError> {
        write_registers(
            self.thread.tid,
            &self.thread.entry.before_syscall(self.thread.own_number),
        )?;
        let deadline = self.stopped.deadline();
        for _ in 0..MAX_RESUMES {
            self.thread().resume()?;
            match self.thread().wait(deadline) {
                Ok(ThreadState::AtSyscall) => {
                    self.phase = Phase::AtOwnCall;
                    return Ok(());
                }
                Ok(ThreadState::Stopped) => {}
                Ok(ThreadState::Ended) => {
                    self.phase = Phase::Finished;
                    return Err(OwnerError::Exited);
                }
                Ok(ThreadState::Running) => {
                    self.phase = Phase::Finished;
                    // It has not reached the instruction yet. It will reach it, and is restored there. The other threads need
                    // not wait for it.
                    self.stopped.release_others(self.thread.index);
                    let state = self.thread().wait(Instant::now() + MAX_WAIT_FOR_RETURN);
                    if matches!(state, Ok(ThreadState::AtSyscall)) {
                        self.phase = Phase::AtOwnCall;
                    }
                    return Err(
                        ReclaimReason::NotStopped(self.thread.tid, self.stopped.limit()).into(),
                    );
                }
                Ok(ThreadState::AtSignal(_) | ThreadState::Seized) => {
                    // With its former registers the thread behaves as if the signal had come before the stop.
                    self.phase = Phase::Finished;
                    let tid = self.thread.tid;
                    let current = read_registers(tid).ok_or(OwnerError::Exited)?;
                    write_registers(tid, &self.thread.restored.at_signal(&current))?;
                    return Err(OwnerError::TryAgain);
                }
                Err(error) => {
                    self.phase = Phase::Finished;
                    return Err(error);
                }
            }
        }
        self.phase = Phase::Finished;
        Err(OwnerError::TryAgain)
    }

    /// At the entry of the thread's own call: makes cwkill's call instead, and restores the thread.
    fn replace_syscall(
        &mut self,
        number: i64,
        arguments: &[u64],
        is_done: IsDone<'_>,
    ) -> Result<i64, OwnerError> {
        let replacement = self.thread.entry.with_syscall(number, arguments);
        // If cwkill is killed between here and the end of this function, the thread continues as if its own call had returned
        // the result of cwkill's call.
        self.phase = Phase::Replaced;
        write_registers(self.thread.tid, &replacement)?;
        #[cfg(target_arch = "aarch64")]
        ptrace::set_call_number(self.thread.tid, i32::try_from(number).unwrap_or(-1))
            .map_err(|error| ReclaimReason::SystemCall("PTRACE_SETREGSET", errno_of(&error)))?;
        self.thread().resume()?;
        self.phase = Phase::InRemoteCall;
        self.finish_call(is_done)
    }

    /// Waits for the exit of cwkill's call, and restores the thread.
    fn finish_call(&mut self, is_done: IsDone<'_>) -> Result<i64, OwnerError> {
        let deadline = self.stopped.deadline();
        let mut state = self.thread().wait(deadline);
        let is_late = matches!(state, Ok(ThreadState::Running));
        let last = Instant::now() + MAX_WAIT_FOR_RETURN;
        // On a busy machine the call may not have begun yet. Until it has had its effect, the other threads must stay stopped:
        // they could close the descriptor and open another file with the same number.
        while matches!(state, Ok(ThreadState::Running)) && Instant::now() < last {
            if is_done() {
                self.stopped.release_others(self.thread.index);
            }
            state = self.thread().wait(Instant::now() + CHECK_INTERVAL);
        }
        self.phase = Phase::Finished;
        match state? {
            ThreadState::AtSyscall => {}
            ThreadState::Running => return Err(ReclaimReason::CloseHangs.into()),
            _ => return Err(OwnerError::Exited),
        }
        let result = read_registers(self.thread.tid).map(|registers| registers.result());
        write_registers(self.thread.tid, &self.thread.restored)?;
        // At the stop limit cwkill makes no more calls. The other threads may run again, so its evidence is out of date.
        if !is_late {
            self.phase = Phase::Restored;
        }
        result.ok_or(OwnerError::Exited)
    }
}

impl Drop for RemoteThread {
    fn drop(&mut self) {
        // After an error cwkill can do no more for the thread: it is gone, a ptrace request failed, or its call has not returned
        // within `MAX_WAIT_FOR_RETURN`.
        let _ = match self.phase {
            // If the thread were released here, a wake-up by cwkill would still be pending during its own call, and some calls
            // then return EINTR. So the thread first makes a call that does nothing. After that it is restored.
            Phase::AtOwnCall | Phase::Replaced => {
                self.replace_syscall(NO_OP.0, NO_OP.1, &|| true).map(drop)
            }
            Phase::InRemoteCall => self.finish_call(&|| false).map(drop),
            Phase::Restored | Phase::Finished => Ok(()),
        };
    }
}

/// A stopped thread that may make calls for cwkill.
struct Candidate {
    /// Its index in the [`StoppedProcess`].
    thread: usize,
    tid: i32,
    registers: Registers,
    risk: FalseReturnRisk,
}

/// The threads that may make calls for cwkill, those with the lowest risk first.
fn candidates(stopped: &StoppedProcess) -> Result<Vec<Candidate>, ReclaimReason> {
    let mut candidates = Vec::new();
    let mut separate_table = false;
    let mut unknown_table = None;
    for (index, thread) in stopped.threads().iter().enumerate() {
        let tid = thread.tid;
        if thread.state == ThreadState::Ended {
            continue;
        }
        let Some(registers) = thread.registers() else {
            match ptrace::peek_stop(tid) {
                // It is being killed.
                Ok(TraceEvent::End) | Err(_) => continue,
                Ok(_) => return Err(ReclaimReason::Is32bit),
            }
        };
        if SyscallInfo::of(tid).is_some_and(|info| info.arch != Registers::AUDIT_ARCH) {
            return Err(ReclaimReason::Makes32bitSyscalls(tid));
        }
        if thread.state != ThreadState::Stopped {
            continue;
        }
        // The inspected descriptors are those of the first thread. A thread can have its own table (unshare(2), CLONE_FILES),
        // where the same number is another file.
        match sys::share_descriptors(stopped.pid(), tid) {
            Ok(true) => candidates.push(Candidate {
                thread: index,
                tid,
                risk: risk(thread, &registers),
                registers,
            }),
            Ok(false) => separate_table = true,
            Err(error) => {
                unknown_table.get_or_insert(errno_of(&error));
            }
        }
    }
    if candidates.is_empty() {
        if let Some(errno) = unknown_table {
            return Err(ReclaimReason::TableUnknown(errno));
        }
        if separate_table {
            return Err(ReclaimReason::SeparateTable);
        }
    }
    candidates.sort_by_key(|candidate| (candidate.risk, candidate.thread));
    Ok(candidates)
}

/// The harm if cwkill is killed while its call replaces the own call of `thread`.
fn risk(thread: &Thread, registers: &Registers) -> FalseReturnRisk {
    let is_instruction = |address| is_syscall_instruction(thread.tid, address);
    match registers.syscall(&is_instruction) {
        Some(call) if registers.restarts(&is_instruction) => call.false_return_risk(),
        _ => FalseReturnRisk::Unknown,
    }
}

/// Lets a thread run to the entry of a call. Returns its registers there and the number of the call, or `None` if the
/// thread cannot be used.
fn enter_own_call(
    stopped: &mut StoppedProcess,
    thread: usize,
    until: Instant,
) -> Result<Option<(Registers, i64)>, OwnerError> {
    // The thread cannot stop any more in no time, even if the limit is reached.
    let stops_until =
        |stopped: &StoppedProcess| stopped.deadline().max(Instant::now() + MAX_TIME_TO_STOP);
    let limit = stopped.limit();
    // A pending stop comes first, for example because of a SIGCONT.
    for _ in 0..MAX_RESUMES {
        let since = Instant::now();
        stopped.thread_mut(thread).resume()?;
        let state = stopped.thread_mut(thread).wait(until)?;
        stopped.note_run(thread, since.elapsed());
        let deadline = stops_until(stopped);
        let thread = stopped.thread_mut(thread);
        match state {
            ThreadState::AtSyscall => return Ok(own_call_entry(thread.tid)),
            ThreadState::Stopped => {}
            ThreadState::Running => {
                // It makes no system call. After another stop it can be released like the others. If it has entered a call
                // meanwhile, it must not be released at the entry (docs/decisions/reclaim.md).
                ptrace::interrupt(thread.tid).map_err(|error| {
                    ReclaimReason::SystemCall("PTRACE_INTERRUPT", errno_of(&error))
                })?;
                return match thread.wait(deadline)? {
                    ThreadState::AtSyscall => Ok(own_call_entry(thread.tid)),
                    // It has made no call in its time, and computes.
                    ThreadState::Running => Err(ReclaimReason::NoSyscall(limit).into()),
                    _ => Ok(None),
                };
            }
            _ => return Ok(None),
        }
    }
    Ok(None)
}

/// The seccomp filters of a stopped thread, if they permit a call that does nothing.
fn permitting_filters(
    proc: &ProcFs,
    pid: i32,
    tid: i32,
    registers: &Registers,
) -> Result<Vec<Vec<u64>>, ReclaimReason> {
    let filters = read_filters(proc, pid, tid)?;
    // If the kernel does not restart its call, the address of its next call is unknown.
    let unknown_address = !registers.restarts(&|address| is_syscall_instruction(tid, address));
    let depends_on_address = unknown_address && seccomp::any_reads_instruction_pointer(&filters);
    match !depends_on_address && permits(&filters, registers, NO_OP.0, NO_OP.1) {
        true => Ok(filters),
        false => Err(ReclaimReason::SeccompForbidsClose),
    }
}

/// The seccomp filters of a stopped thread.
fn read_filters(proc: &ProcFs, pid: i32, tid: i32) -> Result<Vec<Vec<u64>>, ReclaimReason> {
    let mut filters = Vec::new();
    let mode = seccomp_mode(proc, pid, tid);
    match mode.map_err(|error| ReclaimReason::SeccompUnreadable(errno_of(&error)))? {
        0 => return Ok(filters),
        // Strict mode permits only read, write and exit.
        1 => return Err(ReclaimReason::SeccompForbidsClose),
        _ => {}
    }
    loop {
        match ptrace::seccomp_filter(tid, filters.len()) {
            Ok(filter) => filters.push(filter),
            Err(error) => match errno_of(&error) {
                Errno::ENOENT if !filters.is_empty() => return Ok(filters),
                errno => return Err(ReclaimReason::SeccompUnreadable(errno)),
            },
        }
    }
}

/// The seccomp mode of a thread: 0 none, 1 strict, 2 filters.
fn seccomp_mode(proc: &ProcFs, pid: i32, tid: i32) -> io::Result<i32> {
    let status = read_text(proc.path(&format!("{pid}/task/{tid}/status")))?;
    // A kernel without seccomp has no such line.
    Ok(status_field(&status, "Seccomp:").unwrap_or(0))
}

/// Whether `filters` permit a call with `first` as its first arguments, made by a thread with these registers.
fn permits(filters: &[Vec<u64>], registers: &Registers, number: i64, first: &[u64]) -> bool {
    let mut arguments = registers
        .syscall(&|_| true)
        .map_or([0; 6], |call| call.arguments);
    arguments[..first.len()].copy_from_slice(first);
    let data = SeccompData {
        number: i32::try_from(number).unwrap_or(-1),
        arch: Registers::AUDIT_ARCH,
        instruction_pointer: registers.pc(),
        arguments,
    };
    seccomp::all_permit(filters, &data)
}

/// The position of a stopped thread relative to a system call.
struct SyscallInfo {
    /// It is at the entry of a call.
    is_entry: bool,
    /// The ABI of its call (include/uapi/linux/audit.h): a 64-bit program can make 32-bit calls.
    arch: u32,
    /// The number of the call at whose entry it is.
    number: i64,
}

impl SyscallInfo {
    fn of(tid: i32) -> Option<Self> {
        // struct ptrace_syscall_info: the kind of the stop, 3 bytes of padding, the architecture, the instruction pointer and the
        // stack pointer; then the number, if the thread is at the entry or the exit of a call.
        const ENTRY: u8 = 1;
        let mut info = [0; 88];
        let read = ptrace::syscall_info(tid, &mut info).ok()?;
        Some(SyscallInfo {
            is_entry: info[0] == ENTRY && read >= 32,
            arch: u32::from_ne_bytes(info[4..8].try_into().expect("4 bytes")),
            number: i64::from_ne_bytes(info[24..32].try_into().expect("8 bytes")),
        })
    }
}

/// The registers and the call number of a thread that has stopped at the entry of a call. `None` if it entered the kernel by
/// another instruction than [`Registers::INSTRUCTION`].
fn own_call_entry(tid: i32) -> Option<(Registers, i64)> {
    let info = SyscallInfo::of(tid)?;
    if !info.is_entry || info.arch != Registers::AUDIT_ARCH {
        return None;
    }
    let registers = read_registers(tid)?;
    let length = u64::try_from(Registers::INSTRUCTION.len()).expect("it is short");
    let address = registers.pc().wrapping_sub(length);
    is_syscall_instruction(tid, address).then_some((registers, info.number))
}
