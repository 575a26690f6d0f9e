//! The descriptor table of a process, from `/proc/PID/fd`.

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::stat::fstat;
use nix::sys::statfs::{PROC_SUPER_MAGIC, fstatfs};
use nix::unistd::{Whence, lseek64};
use rayon::prelude::*;
use rustix::fs::{RawDir, readlinkat_raw};
use rustix::path::DecInt;

use super::{ProcFs, ProcessId, is_denied, is_missing};
use crate::sys::RemoteFd;

/// Descriptors per unit of parallel work: enough that the start of a unit costs little beside it.
pub(crate) const FDS_PER_TASK: usize = 512;
/// A table with at least this many descriptors is read by number, without listing it first.
const LARGE_TABLE_FROM: i32 = 4096;

/// The sockets and epoll sets of a descriptor table, or of a part of it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct SocketFds {
    /// The sockets, by inode.
    pub sockets: Vec<(u32, RemoteFd)>,
    pub epolls: Vec<RemoteFd>,
    /// cwkill is not permitted to read some of the descriptors.
    pub denied: bool,
}

impl SocketFds {
    fn add(&mut self, part: SocketFds) {
        self.sockets.extend(part.sockets);
        self.epolls.extend(part.epolls);
        self.denied |= part.denied;
    }
}

/// Reads the table in `dir`, until `done` is set.
///
/// For a large table of N descriptors it tries the numbers from 0 to N and lists only those beyond. The kernel gives out the
/// lowest free number, so few lie beyond. Listing all of them would cost a fifth more.
pub(crate) fn read_table(dir: BorrowedFd<'_>, done: &AtomicBool) -> io::Result<SocketFds> {
    let tried = count(dir)?.unwrap_or(0);
    let mut parts = read_numbers(dir, tried, done)?;
    let beyond = match tried {
        0 => list_fds(dir)?,
        _ => list_from(dir, tried)?,
    };
    let listed = beyond
        .par_chunks(FDS_PER_TASK)
        .filter(|_| !done.load(Ordering::Relaxed))
        .map(|fds| read_sockets(dir, fds.iter().copied()));
    parts.extend(listed.collect::<io::Result<Vec<SocketFds>>>()?);
    Ok(gather(parts))
}

fn gather(parts: Vec<SocketFds>) -> SocketFds {
    let mut table = SocketFds::default();
    for part in parts {
        table.add(part);
    }
    table
}

/// The number of open descriptors of a large table; `None` for a small one, and before Linux 6.2, which does not report it
/// (fs/proc/fd.c, proc_fd_getattr).
fn count(dir: BorrowedFd<'_>) -> io::Result<Option<i32>> {
    let size = reported_count(dir)?.and_then(|count| i32::try_from(count).ok());
    Ok(size.filter(|size| *size >= LARGE_TABLE_FROM))
}

/// The number of taken descriptor numbers. These are the open descriptors, and those that the kernel has reserved for a system call
/// that has not ended, for example an accept(2) that waits: the limit RLIMIT_NOFILE counts them too, and the directory does not list
/// them. Before Linux 6.2 the descriptors are listed.
pub(crate) fn count_used(dir: BorrowedFd<'_>) -> io::Result<usize> {
    match reported_count(dir)? {
        Some(count) => Ok(count),
        None => Ok(list_fds(dir)?.len()),
    }
}

/// The same, if the directory has been listed already: `listed` descriptors.
pub(crate) fn count_used_beside(dir: BorrowedFd<'_>, listed: usize) -> io::Result<usize> {
    Ok(reported_count(dir)?.unwrap_or(listed))
}

/// The count that the kernel reports since Linux 6.2.
fn reported_count(dir: BorrowedFd<'_>) -> io::Result<Option<usize>> {
    let size = usize::try_from(fstat(dir)?.st_size).unwrap_or(0);
    // On other file systems the size of a directory means something else.
    Ok((size > 0 && fstatfs(dir)?.filesystem_type() == PROC_SUPER_MAGIC).then_some(size))
}

/// Reads the open descriptors below `end`.
fn read_numbers(dir: BorrowedFd<'_>, end: i32, done: &AtomicBool) -> io::Result<Vec<SocketFds>> {
    let length = i32::try_from(FDS_PER_TASK).expect("a small constant");
    let starts: Vec<i32> = (0..end).step_by(FDS_PER_TASK).collect();
    starts
        .into_par_iter()
        .filter(|_| !done.load(Ordering::Relaxed))
        .map(|start| read_sockets(dir, start..end.min(start + length)))
        .collect()
}

/// The descriptor numbers from `first` on in a `/proc/PID/fd` directory.
///
/// The position in the directory is the number plus two, for `.` and `..` (fs/proc/fd.c, proc_readfd_common).
fn list_from(dir: BorrowedFd<'_>, first: i32) -> io::Result<Vec<i32>> {
    lseek64(dir, i64::from(first) + 2, Whence::SeekSet)?;
    list_fds(dir)
}

/// The descriptor numbers in a `/proc/PID/fd` directory.
pub(crate) fn list_fds(dir: BorrowedFd<'_>) -> io::Result<Vec<i32>> {
    let mut fds = Vec::new();
    let mut buffer = vec![MaybeUninit::uninit(); 32 * 1024];
    let mut entries = RawDir::new(dir, &mut buffer);
    while let Some(entry) = entries.next() {
        // `.` and `..` are not numbers.
        let number: Option<i32> = entry?
            .file_name()
            .to_str()
            .ok()
            .and_then(|n| n.parse().ok());
        fds.extend(number);
    }
    Ok(fds)
}

/// Finds the sockets and epoll sets among the descriptors `fds` of `dir`.
fn read_sockets(dir: BorrowedFd<'_>, fds: impl Iterator<Item = i32>) -> io::Result<SocketFds> {
    let mut table = SocketFds::default();
    for fd in fds {
        let file = match read_link(dir, fd) {
            // The number is free, or it was closed after the listing.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => continue,
            // The kernel checks the right per process, so the other descriptors would fail too.
            Err(error) if is_denied(&error) => {
                table.denied = true;
                return Ok(table);
            }
            other => other?,
        };
        match file {
            FileKind::Socket(inode) => table.sockets.push((inode, RemoteFd(fd))),
            FileKind::Epoll => table.epolls.push(RemoteFd(fd)),
            FileKind::Other => {}
        }
    }
    Ok(table)
}

/// What a descriptor refers to.
enum FileKind {
    /// A socket with this inode.
    Socket(u32),
    Epoll,
    Other,
}

fn read_link(dir: BorrowedFd<'_>, fd: i32) -> io::Result<FileKind> {
    // A longer target is a path. Its first bytes suffice to see that it is not a socket.
    let mut target = [0; 32];
    let length = readlinkat_raw(dir, DecInt::new(fd).as_c_str(), &mut target[..])?;
    let target = &target[..length];
    Ok(match parse_socket_link(target) {
        Some(inode) => FileKind::Socket(inode),
        None if target == b"anon_inode:[eventpoll]" => FileKind::Epoll,
        None => FileKind::Other,
    })
}

/// The inode of the socket that descriptor `fd` in `dir` refers to; `None` if it is not a socket.
pub(crate) fn read_socket_link(dir: BorrowedFd<'_>, fd: i32) -> io::Result<Option<u32>> {
    Ok(match read_link(dir, fd)? {
        FileKind::Socket(inode) => Some(inode),
        FileKind::Epoll | FileKind::Other => None,
    })
}

/// The inode in `socket:[4711]`.
fn parse_socket_link(target: &[u8]) -> Option<u32> {
    let digits = target.strip_prefix(b"socket:[")?.strip_suffix(b"]")?;
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// Whether a descriptor still refers to a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FdState {
    /// It refers to the socket.
    Open,
    /// It was closed, or refers to something else, or its process is gone.
    Closed,
    /// cwkill is not permitted to read it, or the process executes a program meanwhile.
    Unknown,
}

/// The descriptor table of one process, for a check of descriptors that were found earlier.
pub(crate) struct FdTable {
    /// The directory; or, if it could not be opened, the state of every descriptor.
    dir: Result<File, FdState>,
}

impl FdTable {
    /// Opens the table of process `id`, or of its thread `tid`. A later process with the same pid is not opened.
    pub fn open(proc: &ProcFs, id: ProcessId, tid: Option<i32>) -> Self {
        let of_process = || File::open(proc.path(&format!("{}/fd", id.pid)));
        let dir = match tid {
            Some(tid) => match File::open(proc.path(&format!("{}/task/{tid}/fd", id.pid))) {
                // A thread that has executed a program has the place of the first thread now.
                Err(error) if is_missing(&error) => of_process(),
                opened => opened,
            },
            None => of_process(),
        };
        let dir = match dir {
            Ok(dir) if proc.is_alive(id) => Ok(dir),
            Ok(_) => Err(FdState::Closed),
            Err(error) => Err(unreadable_state(&error)),
        };
        FdTable { dir }
    }

    /// Whether `fd` refers to the socket with `inode`.
    pub fn state(&self, fd: RemoteFd, inode: u32) -> FdState {
        match &self.dir {
            Ok(dir) => fd_state(read_socket_link(dir.as_fd(), fd.0), inode),
            Err(state) => *state,
        }
    }
}

/// Compares the present link of a descriptor with the `inode` of the socket that it referred to.
pub(crate) fn fd_state(link: io::Result<Option<u32>>, inode: u32) -> FdState {
    match link {
        Ok(present) if present == Some(inode) => FdState::Open,
        Ok(_) => FdState::Closed,
        Err(error) => unreadable_state(&error),
    }
}

fn unreadable_state(error: &io::Error) -> FdState {
    match is_missing(error) {
        true => FdState::Closed,
        false => FdState::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::fcntl::{FcntlArg, fcntl};
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    use std::io::{Read, Write};
    use std::os::fd::OwnedFd;

    /// Opens many descriptors with gaps, and some sockets, which stay open. Returns the former, and the numbers of the sockets.
    fn open_many() -> (Vec<OwnedFd>, Vec<i32>) {
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        let limit = hard.min(20_000);
        setrlimit(Resource::RLIMIT_NOFILE, soft.max(limit), hard).unwrap();
        let null = File::open("/dev/null").unwrap();
        let mut descriptors: Vec<OwnedFd> = (0..2 * LARGE_TABLE_FROM)
            .map(|_| null.try_clone().unwrap().into())
            .collect();
        let mut index = 0;
        descriptors.retain(|_| {
            index += 1;
            index % 7 != 0
        });
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let highest = i32::try_from(limit).unwrap() - 10;
        let copies = [0, LARGE_TABLE_FROM, 2 * LARGE_TABLE_FROM, highest]
            .map(|least| fcntl(&socket, FcntlArg::F_DUPFD_CLOEXEC(least)).unwrap());
        (descriptors, copies.to_vec())
    }

    #[test]
    fn a_large_table_is_read_whole() {
        let (_descriptors, numbers) = open_many();
        let dir = File::open("/proc/self/fd").unwrap();
        let tried = count(dir.as_fd()).unwrap().expect("Linux 6.2");
        assert!(tried >= LARGE_TABLE_FROM);
        let done = AtomicBool::new(false);
        // Other tests open and close sockets at the same time.
        let of_this_test = |table: SocketFds| -> Vec<(u32, RemoteFd)> {
            let mut sockets = table.sockets;
            sockets.retain(|(_, fd)| numbers.contains(&fd.0));
            sockets.sort_unstable();
            sockets
        };
        let listed = list_fds(dir.as_fd()).unwrap().into_iter();
        let listed = of_this_test(read_sockets(dir.as_fd(), listed).unwrap());
        assert_eq!(listed.len(), 4);
        let read = read_table(dir.as_fd(), &done).unwrap();
        assert_eq!(of_this_test(read), listed);
        // The result does not depend on the count: all descriptors beyond it are listed.
        for tried in [1, LARGE_TABLE_FROM, tried] {
            let mut parts = read_numbers(dir.as_fd(), tried, &done).unwrap();
            let beyond = list_from(dir.as_fd(), tried).unwrap();
            assert!(beyond.iter().all(|fd| *fd >= tried), "{tried}");
            parts.push(read_sockets(dir.as_fd(), beyond.into_iter()).unwrap());
            assert_eq!(of_this_test(gather(parts)), listed, "{tried}");
        }
    }

    #[test]
    fn open_descriptors_are_counted() {
        let directory = tempfile::tempdir().unwrap();
        for name in ["0", "1", "17"] {
            File::create(directory.path().join(name)).unwrap();
        }
        // Not of /proc, so its size means something else.
        let elsewhere = File::open(directory.path()).unwrap();
        assert_eq!(count_used(elsewhere.as_fd()).unwrap(), 3);
        // Another process, so that no other test opens and closes descriptors of it: it waits for its input.
        let mut child = std::process::Command::new("cat")
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut echo = [0];
        child.stdin.as_mut().unwrap().write_all(b"x").unwrap();
        child
            .stdout
            .as_mut()
            .unwrap()
            .read_exact(&mut echo)
            .unwrap();
        let table = File::open(format!("/proc/{}/fd", child.id())).unwrap();
        let listed = list_fds(table.as_fd()).unwrap().len();
        assert_eq!(count_used(table.as_fd()).unwrap(), listed);
        // The size, not a list, wherever the kernel reports it.
        assert_eq!(count_used_beside(table.as_fd(), 1000).unwrap(), listed);
        assert_eq!(count_used_beside(elsewhere.as_fd(), 1000).unwrap(), 1000);
        drop(child.stdin.take());
        child.wait().unwrap();
    }

    /// An accept(2) that waits has a number already (net/socket.c, __sys_accept4), and the limit counts it.
    #[test]
    fn a_number_that_accept_waits_with_is_counted() {
        let script = "import socket; s = socket.create_server(('127.0.0.1', 0)); s.accept()";
        let mut child = std::process::Command::new("python3")
            .args(["-c", script])
            .spawn()
            .unwrap();
        let counts = || {
            let table = File::open(format!("/proc/{}/fd", child.id())).unwrap();
            let listed = list_fds(table.as_fd()).unwrap().len();
            (count_used(table.as_fd()).unwrap(), listed)
        };
        let start = std::time::Instant::now();
        while counts().0 != counts().1 + 1 {
            assert!(start.elapsed().as_secs() < 30, "{:?}", counts());
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn socket_links() {
        assert_eq!(parse_socket_link(b"socket:[4711]"), Some(4711));
        for other in [
            &b"socket:[]"[..],
            b"socket:[-1]",
            b"pipe:[1]",
            b"socket:[1",
            b"",
        ] {
            assert_eq!(parse_socket_link(other), None);
        }
    }
}
