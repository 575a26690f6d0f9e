//! A thread of the owner that makes system calls for us.
//!
//! It is brought to the beginning of a call of its own: the one it was interrupted in, which the kernel
//! makes again, or the next one it makes by itself. There our call takes the place of its own; at the end
//! of ours the thread is set back and will make its own. docs/decisions/reclaim.md says what the kernel
//! does if we die at each of these points.

use std::io::{self, IoSliceMut};
use std::time::Instant;

use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;

use super::arch::Registers;
use super::evidence;
use super::facts::Inside;
use super::seccomp;
use super::stop::{Place, StopError, Stopped, read_registers};
use crate::sys::{self, Waiting};

/// Where the thread stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    /// At the beginning of its own call.
    Beginning,
    /// Ours stands in the place of its own, not begun.
    Exchanged,
    /// In ours.
    Calling,
    /// At the end of ours, set back.
    SetBack,
    /// It can do no more for us: it has a signal to take, or is gone.
    Over,
}

/// A stopped process, one thread of which makes calls for us. When this is dropped the thread is set back, and
/// then all threads go on.
#[derive(Debug)]
pub struct Worker {
    stopped: Stopped,
    at: usize,
    tid: i32,
    /// Its registers and its call at the beginning of it.
    entered: Registers,
    number: i64,
    /// What it is let go with.
    let_go: Registers,
    /// The seccomp filters of the thread.
    filters: Vec<Vec<u64>>,
    standing: At,
}

/// Why there is no thread to work with.
#[derive(Debug)]
pub enum NoWorker {
    /// None made a system call within the limit, or all had a signal to take. Both may pass.
    NoCall,
    /// None serves well now. That may pass, too.
    NoneServesWell,
    /// The program is of another width than we.
    Foreign,
    /// This thread makes system calls of another width, whose numbers mean something else.
    ForeignCall(i32),
    /// Seccomp lets no thread close anything.
    Forbidden,
    /// Nor may its filter be read.
    FilterUnread(io::Error),
    /// No thread of those has the table of descriptors that was looked at (unshare(2), CLONE_FILES).
    OtherTable,
    /// Nor does the kernel say which table one has.
    TableUnread(io::Error),
    /// Something failed.
    Stop(StopError),
}

/// Why a call was not made, or its end not seen.
#[derive(Debug)]
pub enum CallError {
    /// The thread has a signal to take first; nothing was done.
    Signal,
    /// The process is gone.
    Gone,
    /// The call did not come to its end; it may yet.
    Hangs,
    /// Something failed.
    Stop(StopError),
}

/// How long a call of ours that does not return is waited for: the thread cannot be set back before.
const LAST_WAIT: std::time::Duration = std::time::Duration::from_secs(10);

/// And how often it is looked at then.
const BETWEEN_LOOKS: std::time::Duration = std::time::Duration::from_millis(1);

/// Whether a call has done its work.
type Done<'d> = &'d dyn Fn() -> bool;

/// A call that does nothing (EBADF), and that is let through wherever close(2) is.
const NO_CALL: (i64, &[u64]) = (libc::SYS_close, &[u64::MAX]);

impl Worker {
    /// Brings a thread of `stopped` to the beginning of a system call of its own; with `choosy` only one to
    /// which little can happen should we be killed.
    ///
    /// # Errors
    /// There is none that can be used. All threads are going again.
    pub fn borrow(
        mut stopped: Stopped,
        inside: &Inside<'_>,
        choosy: bool,
    ) -> Result<Self, NoWorker> {
        let mut candidates = Vec::new();
        let mut why = NoWorker::NoCall;
        let mut unread = None;
        for (at, thread) in stopped.threads().iter().enumerate() {
            if matches!(thread.place, Place::Ended) {
                continue;
            }
            let Some(registers) = stopped.registers(at) else {
                match sys::peek_stop(thread.tid) {
                    // It is being killed.
                    Ok(Waiting::End) | Err(_) => continue,
                    Ok(_) => return Err(NoWorker::Foreign),
                }
            };
            if entry(thread.tid).is_some_and(|entry| entry.arch != Registers::AUDIT_ARCH) {
                return Err(NoWorker::ForeignCall(thread.tid));
            }
            if thread.place == Place::Stopped {
                // The descriptors were looked at in the table of the first thread; any thread can have got
                // one of its own, where the same number is another file.
                match sys::share_descriptors(inside.pid, thread.tid) {
                    Ok(true) => {}
                    Ok(false) => {
                        why = NoWorker::OtherTable;
                        continue;
                    }
                    Err(error) => {
                        unread.get_or_insert(error);
                        continue;
                    }
                }
                let rank = rank(thread.tid, &registers);
                candidates.push((rank, at, registers));
            }
        }
        if candidates.is_empty() {
            if let Some(error) = unread {
                return Err(NoWorker::TableUnread(error));
            }
            if matches!(why, NoWorker::OtherTable) {
                return Err(why);
            }
        }
        why = NoWorker::NoCall;
        candidates.sort_by_key(|(rank, at, _)| (*rank, *at));
        if choosy
            && candidates
                .first()
                .is_none_or(|(rank, ..)| *rank > SERVES_WELL)
        {
            return Err(NoWorker::NoneServesWell);
        }
        // Each thread that runs gets a share of the time to come to a call.
        let mut left = u32::try_from(candidates.len()).unwrap_or(u32::MAX).min(3);
        for (_, at, registers) in candidates {
            let now = Instant::now();
            let Some(time) = stopped.deadline().checked_duration_since(now) else {
                break;
            };
            let until = now + time / left.max(1);
            let tid = stopped.threads()[at].tid;
            // Before the thread is moved, since it is set back by a call as well.
            let filters = match filters(inside, tid) {
                // Where its next call will be is not known.
                Ok(filters)
                    if !registers.restarts(&|address| is_instruction(tid, address))
                        && seccomp::any_asks_for_the_place(&filters) =>
                {
                    why = NoWorker::Forbidden;
                    continue;
                }
                Ok(filters) if may_call(&filters, &registers, NO_CALL.0, NO_CALL.1) => filters,
                Ok(_) => {
                    why = NoWorker::Forbidden;
                    continue;
                }
                Err(error) => {
                    why = error;
                    continue;
                }
            };
            left = left.saturating_sub(1);
            match Self::enter(&mut stopped, at, until) {
                Ok(Some((entered, number))) => {
                    return Ok(Worker {
                        tid,
                        filters,
                        let_go: Registers::let_go(&registers, &entered, number),
                        stopped,
                        at,
                        entered,
                        number,
                        standing: At::Beginning,
                    });
                }
                Ok(None) => {}
                Err(error) => return Err(NoWorker::Stop(error)),
            }
        }
        Err(why)
    }

    /// Lets the thread at `at` run to the beginning of a call; its registers there and the number of the
    /// call, or `None` if it cannot be used.
    fn enter(
        stopped: &mut Stopped,
        at: usize,
        until: Instant,
    ) -> Result<Option<(Registers, i64)>, StopError> {
        let tid = stopped.threads()[at].tid;
        // A stop that was still to come, for one because the process is told to go on, comes first.
        for _ in 0..3 {
            stopped.resume(at)?;
            match stopped.wait(at, until) {
                Ok(Place::AtCall) => return Ok(beginning(tid)),
                Ok(Place::Stopped) => {}
                Ok(_) => return Ok(None),
                Err(StopError::Limit(_)) => {
                    // It computes. Stopped again, it may be let go like any other; unless it has come to a call at last, at the
                    // beginning of which it must not be (docs/decisions/reclaim.md).
                    sys::ptrace_interrupt(tid).map_err(|e| StopError::Os("PTRACE_INTERRUPT", e))?;
                    let place = stopped.wait(at, stopped.deadline())?;
                    return Ok(beginning(tid).filter(|_| place == Place::AtCall));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// The stopped process.
    pub fn stopped(&self) -> &Stopped {
        &self.stopped
    }

    /// Whether the seccomp filters of the thread let a call through.
    pub fn may_call(&self, number: i64, arguments: &[u64]) -> bool {
        may_call(&self.filters, &self.entered, number, arguments)
    }

    /// Makes a system call in the owner; what it gave. `done` says whether it has done its work, even if it
    /// has not come back.
    ///
    /// # Errors
    /// It was not made, or did not come to its end. No more can be made then.
    pub fn call(
        &mut self,
        number: i64,
        arguments: &[u64],
        done: Done<'_>,
    ) -> Result<i64, CallError> {
        if self.standing == At::SetBack {
            self.begin_own()?;
        }
        if self.standing != At::Beginning {
            return Err(CallError::Signal);
        }
        self.exchange(number, arguments, done)
    }

    /// From the end of a call of ours to the beginning of the thread's own.
    fn begin_own(&mut self) -> Result<(), CallError> {
        set(self.tid, &self.entered.again(self.number)).map_err(CallError::Stop)?;
        for _ in 0..3 {
            self.stopped.resume(self.at).map_err(CallError::Stop)?;
            match self.stopped.wait(self.at, self.stopped.deadline()) {
                Ok(Place::AtCall) => {
                    self.standing = At::Beginning;
                    return Ok(());
                }
                Ok(Place::Stopped) => {}
                Ok(Place::Ended) => {
                    self.standing = At::Over;
                    return Err(CallError::Gone);
                }
                Ok(_) => {
                    // As if it had come before we did: the kernel now decides about the thread's call.
                    self.standing = At::Over;
                    set(self.tid, &self.let_go).map_err(CallError::Stop)?;
                    return Err(CallError::Signal);
                }
                Err(error) => {
                    self.standing = At::Over;
                    if matches!(error, StopError::Limit(_)) {
                        // On its way to the instruction: it gets there, and is set back from there. The others
                        // need not wait for it.
                        self.stopped.let_go_others(self.at);
                        let place = self.stopped.wait(self.at, Instant::now() + LAST_WAIT);
                        if matches!(place, Ok(Place::AtCall)) {
                            self.standing = At::Beginning;
                        }
                    }
                    return Err(CallError::Stop(error));
                }
            }
        }
        self.standing = At::Over;
        Err(CallError::Signal)
    }

    /// At the beginning of the thread's call, makes ours instead, and sets the thread back.
    fn exchange(
        &mut self,
        number: i64,
        arguments: &[u64],
        done: Done<'_>,
    ) -> Result<i64, CallError> {
        let ours = self.entered.instead(number, arguments);
        // From here to the end of this function the thread, should we be killed, goes on as if its own call
        // had given what ours gives.
        self.standing = At::Exchanged;
        set(self.tid, &ours).map_err(CallError::Stop)?;
        #[cfg(target_arch = "aarch64")]
        sys::ptrace_set_call_number(self.tid, i32::try_from(number).unwrap_or(-1))
            .map_err(|error| CallError::Stop(StopError::Os("PTRACE_SETREGSET", error)))?;
        self.stopped.resume(self.at).map_err(CallError::Stop)?;
        self.standing = At::Calling;
        self.finish(done)
    }

    /// Waits for the end of our call, and sets the thread back.
    fn finish(&mut self, done: Done<'_>) -> Result<i64, CallError> {
        let mut place = self.stopped.wait(self.at, self.stopped.deadline());
        let hung = matches!(place, Err(StopError::Limit(_)));
        let last = Instant::now() + LAST_WAIT;
        // While the call may still be to come, because the machine is busy, the others must not go on: they
        // could close the number and open another file there.
        while matches!(place, Err(StopError::Limit(_))) && Instant::now() < last {
            if done() {
                self.stopped.let_go_others(self.at);
            }
            place = self.stopped.wait(self.at, Instant::now() + BETWEEN_LOOKS);
        }
        self.standing = At::Over;
        match place {
            Ok(Place::AtCall) => {}
            Ok(_) => return Err(CallError::Gone),
            Err(StopError::Limit(_)) => return Err(CallError::Hangs),
            Err(error) => return Err(CallError::Stop(error)),
        }
        let result = read_registers(self.tid).map(|registers| registers.result());
        set(self.tid, &self.let_go).map_err(CallError::Stop)?;
        self.standing = if hung { At::Over } else { At::SetBack };
        result.ok_or(CallError::Gone)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Errors: the thread can only be gone.
        let _ = match self.standing {
            // Let go here it would make its call with a wake-up of ours still pending, which some calls
            // answer with EINTR. So it makes one that does nothing, and its own when it has been set back.
            At::Beginning | At::Exchanged => {
                self.exchange(NO_CALL.0, NO_CALL.1, &|| true).map(drop)
            }
            At::Calling => self.finish(&|| false).map(drop),
            At::SetBack | At::Over => Ok(()),
        };
    }
}

/// The seccomp filters of a stopped thread.
fn filters(inside: &Inside<'_>, tid: i32) -> Result<Vec<Vec<u64>>, NoWorker> {
    let mut filters = Vec::new();
    match inside.seccomp(tid).map_err(NoWorker::FilterUnread)? {
        0 => return Ok(filters),
        // Strict: it may read, write and exit.
        1 => return Err(NoWorker::Forbidden),
        _ => {}
    }
    loop {
        match sys::ptrace_seccomp_filter(tid, filters.len()) {
            Ok(filter) => filters.push(filter),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) && !filters.is_empty() => {
                return Ok(filters);
            }
            Err(error) => return Err(NoWorker::FilterUnread(error)),
        }
    }
}

/// Whether `filters` let a thread with these registers make a call.
fn may_call(filters: &[Vec<u64>], registers: &Registers, number: i64, first: &[u64]) -> bool {
    let mut arguments = registers
        .call(&|_| true)
        .map_or([0; 6], |call| call.arguments);
    arguments[..first.len()].copy_from_slice(first);
    let data = seccomp::Data {
        number: i32::try_from(number).unwrap_or(-1),
        arch: Registers::AUDIT_ARCH,
        instruction_pointer: registers.pc(),
        arguments,
    };
    seccomp::all_allow(filters, &data)
}

fn set(tid: i32, registers: &Registers) -> Result<(), StopError> {
    sys::ptrace_set_registers(tid, &registers.0).map_err(|error| match error.raw_os_error() {
        Some(libc::ESRCH) => StopError::Gone,
        _ => StopError::Os("PTRACE_SETREGSET", error),
    })
}

/// The highest rank of a thread to which nothing much can happen.
const SERVES_WELL: u8 = 1;

/// How well a thread serves: least first. If we are killed while a call of ours stands in the place of the
/// thread's own, its own seems to have given 0. For some calls that is a wake-up without cause, which
/// every caller has to expect.
fn rank(tid: i32, registers: &Registers) -> u8 {
    let at = |address| is_instruction(tid, address);
    match registers.call(&at) {
        Some(call) if registers.restarts(&at) => evidence::harm_of_zero(&call),
        _ => 3,
    }
}

/// Where a stopped thread stands towards the kernel.
struct Entry {
    /// At the beginning of a call.
    begins: bool,
    /// The kind of its call (include/uapi/linux/audit.h): a 64-bit program can make those of a 32-bit one.
    arch: u32,
    /// The number of the call it begins.
    number: i64,
}

fn entry(tid: i32) -> Option<Entry> {
    // struct ptrace_syscall_info: the kind of the stop, 3 bytes of padding, the architecture, the
    // instruction pointer and the stack pointer, then the number, if it is at the beginning or the end of a call.
    const ENTRY: u8 = 1;
    let mut info = [0; 88];
    let read = sys::ptrace_syscall_info(tid, &mut info).ok()?;
    let begins = info[0] == ENTRY && read >= 32;
    Some(Entry {
        begins,
        arch: u32::from_ne_bytes(info[4..8].try_into().expect("4 bytes")),
        number: i64::from_ne_bytes(info[24..32].try_into().expect("8 bytes")),
    })
}

/// The registers and the number of the call at whose beginning a thread has stopped, if it got there by
/// the instruction we know.
fn beginning(tid: i32) -> Option<(Registers, i64)> {
    let Entry { number, .. } =
        entry(tid).filter(|entry| entry.begins && entry.arch == Registers::AUDIT_ARCH)?;
    let registers = read_registers(tid)?;
    let length = u64::try_from(Registers::INSTRUCTION.len()).expect("it is short");
    let at = registers.pc().wrapping_sub(length);
    is_instruction(tid, at).then_some((registers, number))
}

/// Whether the instruction that enters the kernel is at `address` in the owner.
pub fn is_instruction(tid: i32, address: u64) -> bool {
    read_memory(tid, address, Registers::INSTRUCTION.len())
        .is_some_and(|code| code == Registers::INSTRUCTION)
}

/// Reads `len` bytes of the memory of the process of `tid`.
pub fn read_memory(tid: i32, address: u64, len: usize) -> Option<Vec<u8>> {
    let mut bytes = vec![0; len];
    let remote = RemoteIoVec {
        base: usize::try_from(address).ok()?,
        len,
    };
    let read = process_vm_readv(
        Pid::from_raw(tid),
        &mut [IoSliceMut::new(&mut bytes)],
        &[remote],
    );
    (read == Ok(len)).then_some(bytes)
}
