//! ptrace(2) for one thread, and the stops that waitid(2) reports.
//!
//! nix makes the requests without a signal, and rustix the waits. nix knows no real-time signals and no register set of every
//! target, so the other requests are made here.

use std::io;
use std::mem;

use nix::sys::ptrace::{self, Options};
use nix::unistd::Pid;
use rustix::process::{self, WaitId, WaitIdOptions};

/// The event of a traced thread that its tracer has not read yet. See [`peek_stop`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TraceEvent {
    /// None: the thread runs, or has not reached its stop yet.
    Nothing,
    /// It has stopped with this code: a signal number, and a ptrace event from bit 8 on.
    Stop(i32),
    /// It has exited.
    End,
}

/// Becomes the tracer of thread `tid` without stopping it. The stops at system calls are marked as such (PTRACE_O_TRACESYSGOOD). The
/// thread outlives its tracer (no PTRACE_O_EXITKILL).
///
/// Only the calling thread may make the later calls for `tid`.
///
/// # Errors
/// EPERM: no right to attach, or another process traces it. ESRCH: it is gone. Source: kernel/ptrace.c, ptrace_attach.
pub fn seize(tid: i32) -> io::Result<()> {
    Ok(ptrace::seize(
        Pid::from_raw(tid),
        Options::PTRACE_O_TRACESYSGOOD,
    )?)
}

/// Asks a seized thread to stop.
///
/// # Errors
/// ESRCH: it is gone.
pub fn interrupt(tid: i32) -> io::Result<()> {
    Ok(ptrace::interrupt(Pid::from_raw(tid))?)
}

/// Lets a stopped thread run to the next entry to, or exit from, a system call. `signal` is the signal that it stopped for, which
/// the kernel then delivers (0: none).
///
/// # Errors
/// ESRCH: it is gone or not stopped.
pub fn syscall(tid: i32, signal: i32) -> io::Result<()> {
    let signal = libc::c_long::from(signal);
    // SAFETY: PTRACE_SYSCALL takes a signal number in `data` and no pointer.
    let ret = unsafe { libc::syscall(libc::SYS_ptrace, PTRACE_SYSCALL, tid, 0usize, signal) };
    nothing(ret)
}

/// Detaches from a stopped thread, which then runs on. `signal` is as in [`syscall`].
///
/// # Errors
/// ESRCH: it is gone or not stopped.
pub fn detach(tid: i32, signal: i32) -> io::Result<()> {
    let signal = libc::c_long::from(signal);
    // SAFETY: PTRACE_DETACH takes a signal number in `data` and no pointer.
    let ret = unsafe { libc::syscall(libc::SYS_ptrace, PTRACE_DETACH, tid, 0usize, signal) };
    nothing(ret)
}

/// Reads the general registers of a stopped thread (NT_PRSTATUS) and returns their size in bytes, which is smaller for a 32-bit
/// thread.
///
/// # Errors
/// ESRCH: it is gone or not stopped.
pub fn registers(tid: i32, registers: &mut [u64]) -> io::Result<usize> {
    let mut vector = libc::iovec {
        iov_base: registers.as_mut_ptr().cast(),
        iov_len: mem::size_of_val(registers),
    };
    // SAFETY: `vector` describes `registers`, which is writable, and is itself live and writable: the
    // kernel writes at most `iov_len` bytes there and the length back into it.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_ptrace,
            PTRACE_GETREGSET,
            tid,
            NT_PRSTATUS,
            &raw mut vector,
        )
    };
    nothing(ret).map(|()| vector.iov_len)
}

/// Sets the general registers of a stopped thread.
///
/// # Errors
/// ESRCH: it is gone or not stopped.
pub fn set_registers(tid: i32, registers: &[u64]) -> io::Result<()> {
    let bytes: Vec<u8> = registers.iter().flat_map(|r| r.to_ne_bytes()).collect();
    set_register_set(tid, NT_PRSTATUS, &bytes)
}

/// Sets the number of the system call at whose entry a thread has stopped.
///
/// # Errors
/// ESRCH: it is gone or not stopped. Source: arch/arm64/kernel/ptrace.c, system_call_set.
#[cfg(target_arch = "aarch64")]
pub fn set_call_number(tid: i32, number: i32) -> io::Result<()> {
    const NT_ARM_SYSTEM_CALL: libc::c_int = 0x404;
    set_register_set(tid, NT_ARM_SYSTEM_CALL, &number.to_ne_bytes())
}

fn set_register_set(tid: i32, set: libc::c_int, bytes: &[u8]) -> io::Result<()> {
    let vector = libc::iovec {
        iov_base: bytes.as_ptr().cast_mut().cast(),
        iov_len: bytes.len(),
    };
    // SAFETY: `vector` describes `bytes`, which are live for the whole call; the kernel only reads them.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_ptrace,
            PTRACE_SETREGSET,
            tid,
            set,
            &raw const vector,
        )
    };
    nothing(ret)
}

/// Writes the `struct ptrace_syscall_info` of a stopped thread into `info` and returns its size in bytes. It says whether the thread
/// is at the entry to a system call, at its exit, or elsewhere.
///
/// # Errors
/// ESRCH: it is gone or not stopped. EIO: kernel older than 5.3. Source: kernel/ptrace.c,
/// ptrace_get_syscall_info.
pub fn syscall_info(tid: i32, info: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the length and the pointer describe `info`, which is writable for the whole call.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_ptrace,
            PTRACE_GET_SYSCALL_INFO,
            tid,
            info.len(),
            info.as_mut_ptr(),
        )
    };
    match usize::try_from(ret) {
        Ok(len) => Ok(len.min(info.len())),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

/// The seccomp filter number `index` of a stopped thread, the youngest first. Each instruction is a `struct sock_filter` of 8 bytes.
///
/// # Errors
/// ENOENT: there are no more. EACCES: needs CAP_SYS_ADMIN, and cwkill must have no seccomp filter itself. EINVAL: the thread has no
/// filter. EMEDIUMTYPE: the filter is not classic BPF. Source: kernel/seccomp.c, seccomp_get_filter.
pub fn seccomp_filter(tid: i32, index: usize) -> io::Result<Vec<u64>> {
    /// The maximum length of a filter, in instructions (include/uapi/linux/bpf_common.h).
    const BPF_MAXINSNS: usize = 4096;
    let mut program = vec![0u64; BPF_MAXINSNS];
    // SAFETY: the kernel writes one filter, of at most BPF_MAXINSNS instructions of 8 bytes
    // (kernel/seccomp.c, seccomp_prepare_filter), which `program` has room for.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_ptrace,
            PTRACE_SECCOMP_GET_FILTER,
            tid,
            index,
            program.as_mut_ptr(),
        )
    };
    let count = usize::try_from(ret).map_err(|_| io::Error::last_os_error())?;
    program.truncate(count);
    Ok(program)
}

/// Reads the event of a traced thread without consuming it.
///
/// If the tracer consumes a stop and then dies, the kernel drops the signal of that stop (kernel/exit.c, wait_task_stopped:
/// `*p_code = 0`).
///
/// # Errors
/// ECHILD: the calling thread does not trace it.
pub fn peek_stop(tid: i32) -> io::Result<TraceEvent> {
    read_event(tid, WaitIdOptions::NOWAIT)
}

/// Reads the event of a traced thread and consumes it. A stop at a system call has no signal to lose.
///
/// # Errors
/// As [`peek_stop`].
pub fn take_stop(tid: i32) -> io::Result<TraceEvent> {
    read_event(tid, WaitIdOptions::empty())
}

fn read_event(tid: i32, flags: WaitIdOptions) -> io::Result<TraceEvent> {
    // A thread has no exit signal, and older kernels wait for it only with __WALL.
    let all = WaitIdOptions::from_bits_retain(libc::__WALL.cast_unsigned());
    let events = WaitIdOptions::STOPPED | WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
    let pid = process::Pid::from_raw(tid).ok_or(rustix::io::Errno::SRCH)?;
    let Some(status) = process::waitid(WaitId::Pid(pid), events | all | flags)? else {
        return Ok(TraceEvent::Nothing);
    };
    let code = status.trapping_signal().or(status.stopping_signal());
    Ok(code.map_or(TraceEvent::End, TraceEvent::Stop))
}

// include/uapi/linux/ptrace.h and elf.h; the libc crate does not have them for every target.
const PTRACE_SYSCALL: libc::c_int = 24;
const PTRACE_DETACH: libc::c_int = 17;
const PTRACE_GETREGSET: libc::c_int = 0x4204;
const PTRACE_SETREGSET: libc::c_int = 0x4205;
const PTRACE_SECCOMP_GET_FILTER: libc::c_int = 0x420c;
const PTRACE_GET_SYSCALL_INFO: libc::c_int = 0x420e;
const NT_PRSTATUS: libc::c_int = 1;

/// Converts the result of a system call that returns no value.
fn nothing(ret: libc::c_long) -> io::Result<()> {
    match ret {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
