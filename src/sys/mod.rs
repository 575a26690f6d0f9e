//! Every `unsafe` of this program: one function a system call, nothing above it.
//!
//! Each function returns the errno as [`io::Error`], read right after the call. What a kept crate
//! wraps safely is not here.
#![expect(
    unsafe_code,
    reason = "system calls that no kept crate wraps, each block argued"
)]

use std::ffi::CStr;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;

/// The errno of an error of a system call; EIO for an error without one.
pub fn errno_of(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

/// The text of an errno, as an error of a system call has it.
pub fn os_error(errno: &Errno) -> io::Error {
    match errno {
        // nix keeps no number for it, and would call it a success.
        Errno::UnknownErrno => io::Error::other("unknown error"),
        errno => (*errno).into(),
    }
}

/// The number of a descriptor in *another* process's table; useless as a descriptor of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RemoteFd(pub i32);

/// Opens a descriptor that refers to process `pid` and to no later process of the same number.
///
/// # Errors
/// ESRCH: no such process. ENOSYS: kernel older than 5.3. Source: kernel/pid.c, pidfd_open(2).
pub fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: both arguments are integers; the kernel accesses no memory of ours in this call.
    let ret = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0u32) };
    owned_fd(ret)
}

/// Duplicates descriptor `target` of the process behind `pidfd` into this process, close-on-exec.
///
/// # Errors
/// EPERM: needs ptrace attach rights over the process (its uid, or CAP_SYS_PTRACE). EBADF: it has no
/// such descriptor. ESRCH: it has exited. ENOSYS: kernel older than 5.6. Source: kernel/pid.c,
/// pidfd_getfd(2).
pub fn pidfd_getfd(pidfd: BorrowedFd<'_>, target: RemoteFd) -> io::Result<OwnedFd> {
    // SAFETY: every argument is an integer; the kernel accesses no memory of ours in this call.
    let ret = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_raw_fd(), target.0, 0u32) };
    owned_fd(ret)
}

/// The kernel's identity of a socket, the same number that sock_diag reports as its cookie.
///
/// # Errors
/// ENOTSOCK: the descriptor is no socket. Source: net/core/sock.c, SO_COOKIE in sk_getsockopt.
pub fn socket_cookie(socket: BorrowedFd<'_>) -> io::Result<u64> {
    let mut cookie = 0u64;
    let mut len = libc::socklen_t::try_from(mem::size_of_val(&cookie)).expect("8 fits");
    // SAFETY: `cookie` and `len` are live, writable and 8 and 4 bytes wide as SO_COOKIE demands, and
    // `len` holds the size of `cookie`, so the kernel writes within it.
    let ret = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut len,
        )
    };
    if ret != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(cookie)
}

/// An integer option of a socket.
///
/// # Errors
/// ENOPROTOOPT: this kernel or this socket does not have it. EPERM: needs a capability.
pub fn socket_option(socket: BorrowedFd<'_>, level: i32, name: i32) -> io::Result<i32> {
    let mut value: libc::c_int = 0;
    let mut len = INT_LEN;
    // SAFETY: `value` and `len` are live and writable, and `len` holds the size of `value`, so the
    // kernel writes within it whatever the option is.
    let ret = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw mut value).cast(),
            &raw mut len,
        )
    };
    match ret {
        0 => Ok(value),
        _ => Err(io::Error::last_os_error()),
    }
}

/// An option of a socket that is a struct: the bytes of it that the kernel wrote into `buf`.
///
/// # Errors
/// As [`socket_option`].
pub fn socket_option_bytes<'b>(
    socket: BorrowedFd<'_>,
    level: i32,
    name: i32,
    buf: &'b mut [u8],
) -> io::Result<&'b [u8]> {
    let mut len = libc::socklen_t::try_from(buf.len()).unwrap_or(libc::socklen_t::MAX);
    // SAFETY: `len` is live and writable and holds no more than the size of `buf`, which is writable for
    // the whole call, so the kernel writes within it.
    let ret = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            name,
            buf.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    match (ret, usize::try_from(len)) {
        (0, Ok(written)) if written <= buf.len() => Ok(&buf[..written]),
        (0, _) => Err(io::Error::from_raw_os_error(libc::EOVERFLOW)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Sets an integer option of a socket.
///
/// # Errors
/// As [`socket_option`], and EINVAL for a value it does not take.
pub fn set_socket_option(
    socket: BorrowedFd<'_>,
    level: i32,
    name: i32,
    value: i32,
) -> io::Result<()> {
    // SAFETY: the pointer and the length describe `value`, which the kernel only reads. An option that
    // takes a pointer inside a longer struct is refused for its length (EINVAL).
    let ret = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            INT_LEN,
        )
    };
    match ret {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[expect(clippy::cast_possible_truncation, reason = "4 fits")]
const INT_LEN: libc::socklen_t = mem::size_of::<libc::c_int>() as libc::socklen_t;

/// Bytes written to a TCP socket and not yet sent: `write_seq - snd_nxt`.
///
/// # Errors
/// EINVAL: the socket listens. Source: net/ipv4/tcp.c, tcp_ioctl, SIOCOUTQNSD.
pub fn unsent_bytes(socket: BorrowedFd<'_>) -> io::Result<u32> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: SIOCOUTQNSD writes one int, and the pointer is to a live and writable one.
    let ret = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCOUTQNSD, &raw mut bytes) };
    match ret {
        0 => Ok(u32::try_from(bytes).unwrap_or(0)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Bytes that were received and not yet read; also of a TCP socket in CLOSE, where they can still be read.
///
/// # Errors
/// EINVAL: the socket listens. Source: net/ipv4/tcp.c, tcp_ioctl, SIOCINQ; include/net/tcp.h, tcp_inq.
pub fn unread_bytes(socket: BorrowedFd<'_>) -> io::Result<u32> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int, and the pointer is to a live and writable one.
    let ret = unsafe { libc::ioctl(socket.as_raw_fd(), libc::FIONREAD, &raw mut bytes) };
    match ret {
        0 => Ok(u32::try_from(bytes).unwrap_or(0)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// linux/sockios.h; the libc crate has it for some targets only.
const SIOCOUTQNSD: libc::Ioctl = 0x894b;

/// Fills `buf` with directory entries and returns those written; none at the end of the directory.
///
/// The result is a sequence of `struct linux_dirent64`, which `finder::owners` reads.
///
/// # Errors
/// ENOENT, ESRCH: the directory's process is gone. Source: fs/readdir.c, getdents64(2).
pub fn getdents64<'b>(dir: BorrowedFd<'_>, buf: &'b mut [u8]) -> io::Result<&'b [u8]> {
    // SAFETY: the pointer and the length describe `buf`, which is writable for the whole call.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_getdents64,
            dir.as_raw_fd(),
            buf.as_mut_ptr(),
            buf.len(),
        )
    };
    match usize::try_from(ret) {
        Ok(written) => Ok(&buf[..written]),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

/// Reads the target of the symbolic link `name` in `dir`, cut to the length of `buf`.
///
/// Unlike the crates' wrappers it allocates nothing: it runs once for every descriptor of the host.
///
/// # Errors
/// ENOENT: closed meanwhile. ESRCH: the process is gone. EACCES: no right to look.
/// Source: fs/stat.c, do_readlinkat; fs/proc/base.c, proc_pid_readlink.
pub fn readlinkat<'b>(dir: BorrowedFd<'_>, name: &CStr, buf: &'b mut [u8]) -> io::Result<&'b [u8]> {
    // SAFETY: `name` is NUL-terminated; the pointer and the length describe `buf`, which is writable
    // for the whole call.
    let ret = unsafe {
        libc::readlinkat(
            dir.as_raw_fd(),
            name.as_ptr(),
            buf.as_mut_ptr().cast(),
            buf.len(),
        )
    };
    match usize::try_from(ret) {
        Ok(written) => Ok(&buf[..written]),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

/// Takes the datagrams that wait at `socket`, one into each `slot` bytes of `buf` as far as they go, without
/// waiting for more. The lengths are those of the datagrams, larger than `slot` if they did not fit.
///
/// # Errors
/// EAGAIN: none is there. ENOBUFS: netlink has lost some. Source: net/socket.c, do_recvmmsg.
pub fn recvmmsg(socket: BorrowedFd<'_>, buf: &mut [u8], slot: usize) -> io::Result<Vec<usize>> {
    let mut parts: Vec<libc::iovec> = buf
        .chunks_exact_mut(slot)
        .map(|slot| libc::iovec {
            iov_base: slot.as_mut_ptr().cast(),
            iov_len: slot.len(),
        })
        .collect();
    let mut headers: Vec<libc::mmsghdr> = parts
        .iter_mut()
        .map(|part| {
            // SAFETY: both structs are plain integers and pointers, for which zero is a value.
            let mut header: libc::mmsghdr = unsafe { mem::zeroed() };
            header.msg_hdr.msg_iov = part;
            header.msg_hdr.msg_iovlen = 1;
            header
        })
        .collect();
    let count = u32::try_from(headers.len()).unwrap_or(u32::MAX);
    // SAFETY: `headers` has `count` elements or more. Each points to one element of `parts`, and that to a slot of
    // `buf` of its own; all three live, and nothing else uses them, until the call returns.
    let ret = unsafe {
        // Not by the function, whose types differ from C library to C library.
        libc::syscall(
            libc::SYS_recvmmsg,
            socket.as_raw_fd(),
            headers.as_mut_ptr(),
            count,
            libc::MSG_DONTWAIT | libc::MSG_TRUNC,
            std::ptr::null_mut::<libc::timespec>(),
        )
    };
    let received = usize::try_from(ret).map_err(|_| io::Error::last_os_error())?;
    let length = |header: &libc::mmsghdr| usize::try_from(header.msg_len).unwrap_or(usize::MAX);
    Ok(headers[..received].iter().map(length).collect())
}

/// Reads the extended attribute `name` of the file that `path` leads to.
///
/// # Errors
/// EOPNOTSUPP, ENODATA: it has none such. ENOENT: the file is gone. EACCES: no right to look. ERANGE: `buf`
/// is too short. Source: fs/xattr.c, path_getxattrat; getxattr(2).
pub fn getxattr<'b>(path: &CStr, name: &CStr, buf: &'b mut [u8]) -> io::Result<&'b [u8]> {
    // SAFETY: `path` and `name` are NUL-terminated; the pointer and the length describe `buf`, which is
    // writable for the whole call.
    let ret = unsafe {
        libc::getxattr(
            path.as_ptr(),
            name.as_ptr(),
            buf.as_mut_ptr().cast(),
            buf.len(),
        )
    };
    match usize::try_from(ret) {
        // An empty buffer would be asked for the length instead.
        Ok(written) if written <= buf.len() => Ok(&buf[..written]),
        Ok(_) => Err(io::Error::from_raw_os_error(libc::ERANGE)),
        Err(_) => Err(io::Error::last_os_error()),
    }
}

/// Whether two processes have one table of descriptors.
///
/// # Errors
/// ENOSYS: the kernel has no kcmp(2). EPERM: no right to look into one of them. ESRCH: one is gone.
/// Source: kernel/kcmp.c, kcmp(2).
pub fn share_descriptors(one: i32, other: i32) -> io::Result<bool> {
    const KCMP_FILES: libc::c_int = 2;
    // SAFETY: every argument is an integer; the kernel accesses no memory of ours in this call.
    let ret = unsafe { libc::syscall(libc::SYS_kcmp, one, other, KCMP_FILES, 0, 0) };
    match ret {
        0 => Ok(true),
        ret if ret > 0 => Ok(false),
        _ => Err(io::Error::last_os_error()),
    }
}

/// What waits for a tracer at a thread. See [`peek_stop`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waiting {
    /// It runs, or has not come to its stop yet.
    Nothing,
    /// It has stopped; the code of the stop: a signal number, with a ptrace event from bit 8 on.
    Stop(i32),
    /// It is gone.
    End,
}

/// Becomes the tracer of thread `tid` without stopping it. System call stops will say that they are
/// (PTRACE_O_TRACESYSGOOD); the thread outlives its tracer (no PTRACE_O_EXITKILL).
///
/// All that follows must come from the same thread of ours.
///
/// # Errors
/// EPERM: no right to attach, or it is traced already. ESRCH: it is gone. Source: kernel/ptrace.c,
/// ptrace_attach.
pub fn ptrace_seize(tid: i32) -> io::Result<()> {
    let tracesysgood = libc::c_ulong::try_from(libc::PTRACE_O_TRACESYSGOOD).expect("1 fits");
    // SAFETY: PTRACE_SEIZE takes options in `data` and no pointer; the kernel accesses no memory of ours.
    let ret = unsafe { libc::syscall(libc::SYS_ptrace, PTRACE_SEIZE, tid, 0usize, tracesysgood) };
    nothing(ret)
}

/// Asks a seized thread to stop.
///
/// # Errors
/// ESRCH: it is gone.
pub fn ptrace_interrupt(tid: i32) -> io::Result<()> {
    // SAFETY: PTRACE_INTERRUPT takes no pointer; the kernel accesses no memory of ours.
    let ret = unsafe { libc::syscall(libc::SYS_ptrace, PTRACE_INTERRUPT, tid, 0usize, 0usize) };
    nothing(ret)
}

/// Lets a stopped thread run to the beginning or the end of a system call, with `signal` delivered
/// first if it stopped for one (0: none).
///
/// # Errors
/// ESRCH: it is gone or not stopped.
pub fn ptrace_syscall(tid: i32, signal: i32) -> io::Result<()> {
    let signal = libc::c_long::from(signal);
    // SAFETY: PTRACE_SYSCALL takes a signal number in `data` and no pointer.
    let ret = unsafe { libc::syscall(libc::SYS_ptrace, PTRACE_SYSCALL, tid, 0usize, signal) };
    nothing(ret)
}

/// Lets a stopped thread go, with `signal` delivered if it stopped for one (0: none).
///
/// # Errors
/// ESRCH: it is gone or not stopped.
pub fn ptrace_detach(tid: i32, signal: i32) -> io::Result<()> {
    let signal = libc::c_long::from(signal);
    // SAFETY: PTRACE_DETACH takes a signal number in `data` and no pointer.
    let ret = unsafe { libc::syscall(libc::SYS_ptrace, PTRACE_DETACH, tid, 0usize, signal) };
    nothing(ret)
}

/// Reads the general registers of a stopped thread (NT_PRSTATUS); how many bytes there are. A thread
/// of another width than ours has fewer.
///
/// # Errors
/// ESRCH: it is gone or not stopped.
pub fn ptrace_registers(tid: i32, registers: &mut [u64]) -> io::Result<usize> {
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
pub fn ptrace_set_registers(tid: i32, registers: &[u64]) -> io::Result<()> {
    let bytes: Vec<u8> = registers.iter().flat_map(|r| r.to_ne_bytes()).collect();
    set_register_set(tid, NT_PRSTATUS, &bytes)
}

/// Sets the number of the system call that a thread has stopped at the beginning of.
///
/// # Errors
/// ESRCH: it is gone or not stopped. Source: arch/arm64/kernel/ptrace.c, system_call_set.
#[cfg(target_arch = "aarch64")]
pub fn ptrace_set_call_number(tid: i32, number: i32) -> io::Result<()> {
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

/// Where a stopped thread stands towards a system call, as `struct ptrace_syscall_info`, written into
/// `info`; how many bytes there are.
///
/// # Errors
/// ESRCH: it is gone or not stopped. EIO: kernel older than 5.3. Source: kernel/ptrace.c,
/// ptrace_get_syscall_info.
pub fn ptrace_syscall_info(tid: i32, info: &mut [u8]) -> io::Result<usize> {
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

/// The `index`th seccomp filter of a stopped thread, the youngest first, each instruction as the 8 bytes
/// of a `struct sock_filter`.
///
/// # Errors
/// ENOENT: there are no more. EACCES: needs CAP_SYS_ADMIN, and no filter of our own. EINVAL: the thread
/// has none. EMEDIUMTYPE: it is no classic filter. Source: kernel/seccomp.c, seccomp_get_filter.
pub fn ptrace_seccomp_filter(tid: i32, index: usize) -> io::Result<Vec<u64>> {
    /// include/uapi/linux/bpf_common.h: no filter is longer.
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

/// What waits for us at a traced thread, left where it is.
///
/// It is not consumed, because the kernel forgets the signal of a consumed stop when its tracer dies
/// (kernel/exit.c, wait_task_stopped: `*p_code = 0`).
///
/// # Errors
/// ECHILD: it is not traced by this thread.
pub fn peek_stop(tid: i32) -> io::Result<Waiting> {
    wait_for_stop(tid, libc::WNOWAIT)
}

/// Takes what waits for us at a traced thread. A stop at a system call has no signal to lose.
///
/// # Errors
/// As [`peek_stop`].
pub fn take_stop(tid: i32) -> io::Result<Waiting> {
    wait_for_stop(tid, 0)
}

fn wait_for_stop(tid: i32, how: libc::c_int) -> io::Result<Waiting> {
    let options = libc::WSTOPPED | libc::WEXITED | libc::WNOHANG | libc::__WALL | how;
    let tid = libc::id_t::try_from(tid).map_err(|_| io::Error::from_raw_os_error(libc::ESRCH))?;
    // SAFETY: siginfo_t is plain data for which all zeroes is a value.
    let mut info: libc::siginfo_t = unsafe { mem::zeroed() };
    // SAFETY: `info` is live and writable, and of the type that waitid writes.
    let ret = unsafe { libc::waitid(libc::P_PID, tid, &raw mut info, options) };
    if ret != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `info` is zeroed or written by waitid, which sets the fields of a child.
    let (about, code) = unsafe { (info.si_pid(), info.si_code) };
    if about == 0 {
        return Ok(Waiting::Nothing);
    }
    if code != libc::CLD_TRAPPED && code != libc::CLD_STOPPED {
        return Ok(Waiting::End);
    }
    // SAFETY: as above.
    Ok(Waiting::Stop(unsafe { info.si_status() }))
}

// include/uapi/linux/ptrace.h and elf.h; the libc crate has them for some targets only.
const PTRACE_SYSCALL: libc::c_int = 24;
const PTRACE_DETACH: libc::c_int = 17;
const PTRACE_GETREGSET: libc::c_int = 0x4204;
const PTRACE_SETREGSET: libc::c_int = 0x4205;
const PTRACE_SEIZE: libc::c_int = 0x4206;
const PTRACE_INTERRUPT: libc::c_int = 0x4207;
const PTRACE_SECCOMP_GET_FILTER: libc::c_int = 0x420c;
const PTRACE_GET_SYSCALL_INFO: libc::c_int = 0x420e;
const NT_PRSTATUS: libc::c_int = 1;

/// Takes the result of a system call that only succeeds or fails.
fn nothing(ret: libc::c_long) -> io::Result<()> {
    match ret {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Takes the result of a system call that makes a descriptor.
fn owned_fd(ret: libc::c_long) -> io::Result<OwnedFd> {
    if ret < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = RawFd::try_from(ret).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))?;
    // SAFETY: a non-negative result is a fresh descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
