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

/// The number of a descriptor in *another* process's table; useless as a descriptor of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TargetFd(pub i32);

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
pub fn pidfd_getfd(pidfd: BorrowedFd<'_>, target: TargetFd) -> io::Result<OwnedFd> {
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

/// Takes the result of a system call that makes a descriptor.
fn owned_fd(ret: libc::c_long) -> io::Result<OwnedFd> {
    if ret < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = RawFd::try_from(ret).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))?;
    // SAFETY: a non-negative result is a fresh descriptor that nobody else owns.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
