//! Every `unsafe` of this program: one function for each system call that no kept crate wraps, nothing above it.
//!
//! Each function returns the errno as [`io::Error`], read right after the call.
#![expect(
    unsafe_code,
    reason = "system calls that no kept crate wraps, each block argued"
)]

pub mod ptrace;

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags};

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
    let pid = Pid::from_raw(pid).ok_or(rustix::io::Errno::SRCH)?;
    Ok(rustix::process::pidfd_open(pid, PidfdFlags::empty())?)
}

/// Duplicates descriptor `target` of the process behind `pidfd` into this process, close-on-exec.
///
/// # Errors
/// EPERM: needs ptrace attach rights over the process (its uid, or CAP_SYS_PTRACE). EBADF: it has no
/// such descriptor. ESRCH: it has exited. ENOSYS: kernel older than 5.6. Source: kernel/pid.c,
/// pidfd_getfd(2).
pub fn pidfd_getfd(pidfd: BorrowedFd<'_>, target: RemoteFd) -> io::Result<OwnedFd> {
    let flags = PidfdGetfdFlags::empty();
    Ok(rustix::process::pidfd_getfd(pidfd, target.0, flags)?)
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

/// linux/sockios.h; the libc crate has it for some targets only.
const SIOCOUTQNSD: libc::Ioctl = 0x894b;

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
