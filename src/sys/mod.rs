//! Thin functions over single system calls. Every `unsafe` of this program is here, in [`bpf`], in [`interrupter`], in [`link`] and in [`ptrace`], for the calls
//! that nix, rustix and socket2 do not wrap.
//!
//! Each function that makes a system call returns its errno as [`io::Error`].
#![expect(
    unsafe_code,
    reason = "system calls that nix, rustix and socket2 do not wrap, each block argued"
)]

#[cfg_attr(
    not(feature = "trace"),
    expect(dead_code, unused_imports, reason = "a part of it is only for `trace`")
)]
pub mod bpf;
pub mod caller;
mod duplicate;
pub mod interrupter;
pub mod link;
mod pidfds;
pub mod ptrace;

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::errno::Errno;
use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags};

pub use duplicate::Duplicate;
pub use pidfds::Pidfds;

/// The errno of an error of a system call; EIO for an error without one.
pub fn errno_of(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

/// The errno as an error of a system call, for its text.
pub fn os_error(errno: &Errno) -> io::Error {
    match errno {
        // nix has no number for it, and its text would be that of success.
        Errno::UnknownErrno => io::Error::other("unknown error"),
        errno => (*errno).into(),
    }
}

/// CLOCK_MONOTONIC.
#[cfg(feature = "trace")]
pub fn monotonic() -> std::time::Duration {
    use nix::time::{ClockId, clock_gettime};
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or_else(|_| std::time::Duration::ZERO, Into::into)
}

/// The number of a descriptor in the table of *another* process. It is not a descriptor of cwkill.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RemoteFd(pub i32);

impl RemoteFd {
    /// Whether it is standard input, output or error.
    pub fn is_standard(self) -> bool {
        (libc::STDIN_FILENO..=libc::STDERR_FILENO).contains(&self.0)
    }
}

/// Opens a descriptor that refers to process `pid`, and never to a later process with the same pid.
///
/// # Errors
/// ESRCH: no such process. ENOSYS: kernel older than 5.3. Source: kernel/pid.c, pidfd_open(2).
pub fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    let pid = Pid::from_raw(pid).ok_or(rustix::io::Errno::SRCH)?;
    Ok(rustix::process::pidfd_open(pid, PidfdFlags::empty())?)
}

/// Opens a descriptor that refers to thread `tid`. [`pidfd_getfd`] takes it too.
///
/// # Errors
/// ESRCH: no such thread. EINVAL: kernel older than 6.9. Source: kernel/pid.c, pidfd_open(2), PIDFD_THREAD.
pub fn pidfd_open_thread(tid: i32) -> io::Result<OwnedFd> {
    // linux/pidfd.h; rustix has no name for it.
    const PIDFD_THREAD: u32 = 0o200;
    let tid = Pid::from_raw(tid).ok_or(rustix::io::Errno::SRCH)?;
    let flags = PidfdFlags::from_bits_retain(PIDFD_THREAD);
    Ok(rustix::process::pidfd_open(tid, flags)?)
}

/// Duplicates descriptor `target` of the process that `pidfd` refers to into this process, close-on-exec.
///
/// # Errors
/// EPERM: needs the right to attach to the process with ptrace(2): the same uid, or CAP_SYS_PTRACE. EBADF: the process has no such
/// descriptor. ESRCH: it has exited. ENOSYS: kernel older than 5.6. Source: kernel/pid.c, pidfd_getfd(2).
pub fn pidfd_getfd(pidfd: BorrowedFd<'_>, target: RemoteFd) -> io::Result<Duplicate> {
    let flags = PidfdGetfdFlags::empty();
    Ok(rustix::process::pidfd_getfd(pidfd, target.0, flags)?.into())
}

/// Reads an integer option of a socket.
///
/// # Errors
/// ENOPROTOOPT: the kernel or the socket does not have the option. EPERM: needs a capability.
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

/// Reads an option of a socket that is a struct. Returns the part of `buf` that the kernel wrote.
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
/// As [`socket_option`], and EINVAL for a wrong value.
pub fn set_socket_option(
    socket: BorrowedFd<'_>,
    level: i32,
    name: i32,
    value: i32,
) -> io::Result<()> {
    // SAFETY: the pointer and the length describe `value`, which the kernel only reads. If the option is a struct with a pointer in
    // it, the length is too short for it, and the kernel refuses it (EINVAL).
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

/// linux/sockios.h; the libc crate does not have it for every target.
const SIOCOUTQNSD: libc::Ioctl = 0x894b;

/// The type of the namespace that a file of nsfs stands for, as in `CLONE_NEWNET`.
///
/// # Errors
/// ENOTTY: not a file of nsfs, or kernel older than 4.11. Source: fs/nsfs.c, ns_ioctl, NS_GET_NSTYPE.
pub fn namespace_type(file: BorrowedFd<'_>) -> io::Result<i32> {
    // SAFETY: NS_GET_NSTYPE takes no argument, and the kernel accesses no memory of this process.
    let ret = unsafe { libc::ioctl(file.as_raw_fd(), NS_GET_NSTYPE) };
    match ret {
        -1 => Err(io::Error::last_os_error()),
        kind => Ok(kind),
    }
}

/// include/uapi/linux/nsfs.h: `_IO(0xb7, 3)`.
const NS_GET_NSTYPE: libc::Ioctl = 0xb703;

/// Ignores `signal` from now on.
///
/// # Errors
/// EINVAL: there is no such signal, or it cannot be ignored.
pub fn ignore_signal(signal: i32) -> io::Result<()> {
    // SAFETY: SIG_IGN is not a function of this process, so no code of it runs when the signal arrives.
    let former = unsafe { libc::signal(signal, libc::SIG_IGN) };
    match former {
        libc::SIG_ERR => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Makes all threads allocate from one heap if the address space of this process is limited (RLIMIT_AS).
///
/// Otherwise glibc reserves 64 MiB of it for each thread that allocates. Failure changes nothing else.
pub fn share_heap_if_address_space_is_limited() {
    let is_limited = getrlimit(Resource::RLIMIT_AS).is_ok_and(|(soft, _)| soft != RLIM_INFINITY);
    #[cfg(target_env = "gnu")]
    if is_limited {
        // SAFETY: both arguments are integers, and glibc takes its own lock. The value applies to threads that start later.
        unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    }
    #[cfg(not(target_env = "gnu"))]
    let _ = is_limited;
}

/// The descriptors that the service manager has passed to this process (sd_listen_fds(3)); none if it has passed none, or at a second
/// call. Call it before this process opens anything.
///
/// # Errors
/// EBADF: one of them is not open.
pub fn passed_descriptors() -> io::Result<Vec<OwnedFd>> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    const FIRST: i32 = 3;
    let number = |name| std::env::var(name).ok()?.parse().ok();
    let count: i32 = match number("LISTEN_PID") == i32::try_from(std::process::id()).ok() {
        true => number("LISTEN_FDS").unwrap_or(0),
        false => 0,
    };
    if count <= 0 || TAKEN.swap(true, Ordering::Relaxed) {
        return Ok(Vec::new());
    }
    let passed = FIRST..FIRST.saturating_add(count);
    let take = |fd| {
        // SAFETY: every argument is an integer, so the kernel accesses no memory of this process.
        let set = unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
        match set {
            // SAFETY: it is open, and this process had it from its start. Nothing in it owns such a descriptor, and it is taken only once.
            0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
            _ => Err(io::Error::last_os_error()),
        }
    };
    passed.map(take).collect()
}

/// The network namespace of a socket, as a descriptor of its file in nsfs.
///
/// # Errors
/// EPERM: needs CAP_NET_ADMIN over the namespace. ENOTTY: kernel older than 4.10. Source: net/socket.c, sock_ioctl.
pub fn socket_netns(socket: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    // SAFETY: SIOCGSKNS has no argument, so the kernel accesses no memory of this process.
    let netns = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCGSKNS, 0) };
    match netns {
        // SAFETY: the kernel has just made this descriptor for the call, so nothing else owns it.
        0.. => Ok(unsafe { OwnedFd::from_raw_fd(netns) }),
        _ => Err(io::Error::last_os_error()),
    }
}

/// linux/sockios.h.
const SIOCGSKNS: libc::Ioctl = 0x894c;

/// Whether two processes share one descriptor table.
///
/// # Errors
/// ENOSYS: the kernel has no kcmp(2). EPERM: no right to inspect one of them. ESRCH: one of them is gone.
/// Source: kernel/kcmp.c, kcmp(2).
pub fn share_descriptors(one: i32, other: i32) -> io::Result<bool> {
    const KCMP_FILES: libc::c_int = 2;
    // SAFETY: every argument is an integer, so the kernel accesses no memory of this process.
    let ret = unsafe { libc::syscall(libc::SYS_kcmp, one, other, KCMP_FILES, 0, 0) };
    match ret {
        0 => Ok(true),
        ret if ret > 0 => Ok(false),
        _ => Err(io::Error::last_os_error()),
    }
}
