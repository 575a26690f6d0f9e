//! The descriptor table of a process, as `/proc/PID/fd` shows it.

use std::ffi::CStr;
use std::io;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::sys::stat::fstat;
use nix::sys::statfs::{PROC_SUPER_MAGIC, fstatfs};
use rayon::prelude::*;

use super::is_denied;
use crate::sys::{self, TargetFd};

/// Descriptors in one unit of parallel work.
pub(in crate::finder) const CHUNK: usize = 512;
/// Descriptors from which a table is worth a look without a listing.
const LARGE: usize = 8 * CHUNK;

/// What a descriptor table has, or a part of it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Table {
    /// The sockets, by inode.
    pub sockets: Vec<(u32, TargetFd)>,
    /// Descriptors of any kind.
    descriptors: usize,
    /// Some may not be read.
    pub denied: bool,
}

impl Table {
    fn add(&mut self, part: Table) {
        self.sockets.extend(part.sockets);
        self.descriptors += part.descriptors;
        self.denied |= part.denied;
    }
}

/// Reads the table in `dir`, until `needless` is set.
pub(super) fn read_table(dir: BorrowedFd<'_>, needless: &AtomicBool) -> io::Result<Table> {
    if let Some(open) = count(dir)?
        && open >= LARGE
        && let Some(table) = read_gapless(dir, open, needless)?
    {
        return Ok(table);
    }
    let fds = list_fds(dir)?;
    let parts: Vec<Table> = fds
        .par_chunks(CHUNK)
        .filter(|_| !needless.load(Ordering::Relaxed))
        .map(|fds| read_sockets(dir, fds.iter().copied()))
        .collect::<io::Result<_>>()?;
    Ok(gather(parts))
}

fn gather(parts: Vec<Table>) -> Table {
    let mut table = Table::default();
    for part in parts {
        table.add(part);
    }
    table
}

/// How many descriptors are open, if the kernel says (Linux 6.2: fs/proc/fd.c, proc_fd_getattr).
fn count(dir: BorrowedFd<'_>) -> io::Result<Option<usize>> {
    let size = usize::try_from(fstat(dir)?.st_size).unwrap_or(0);
    // Other file systems mean something else by the size of a directory.
    Ok((size >= LARGE && fstatfs(dir)?.filesystem_type() == PROC_SUPER_MAGIC).then_some(size))
}

/// Reads a table of about `open` descriptors by counting their numbers up, since listing them first costs
/// a fifth more. `None` if there are gaps, and the listing is the shorter way.
///
/// Descriptors have the lowest free number, so a large table has few gaps. It goes on past `open`
/// descriptors until a whole chunk of numbers has none.
fn read_gapless(
    dir: BorrowedFd<'_>,
    open: usize,
    needless: &AtomicBool,
) -> io::Result<Option<Table>> {
    let parts: Vec<Table> = (0..open.div_ceil(CHUNK))
        .into_par_iter()
        .filter(|_| !needless.load(Ordering::Relaxed))
        .map(|chunk| read_sockets(dir, numbers(chunk)))
        .collect::<io::Result<_>>()?;
    let mut table = gather(parts);
    for chunk in open.div_ceil(CHUNK).. {
        if table.denied || needless.load(Ordering::Relaxed) {
            break;
        }
        if chunk * CHUNK > open + open / 8 + CHUNK {
            return Ok(None);
        }
        let part = read_sockets(dir, numbers(chunk))?;
        let end = part.descriptors == 0 && table.descriptors >= open;
        table.add(part);
        if end {
            break;
        }
    }
    Ok(Some(table))
}

/// The descriptor numbers of a chunk; empty past the largest number.
fn numbers(chunk: usize) -> Range<i32> {
    let start = i32::try_from(chunk * CHUNK).unwrap_or(i32::MAX);
    let length = i32::try_from(CHUNK).expect("a small constant");
    start..start.saturating_add(length)
}

/// The numbers in a `/proc/PID/fd` directory.
pub(in crate::finder) fn list_fds(dir: BorrowedFd<'_>) -> io::Result<Vec<i32>> {
    let mut fds = Vec::new();
    let mut buffer = vec![0; 32 * 1024];
    loop {
        let entries = sys::getdents64(dir, &mut buffer)?;
        if entries.is_empty() {
            return Ok(fds);
        }
        fds.extend(dirent_numbers(entries));
    }
}

/// The names in a sequence of `struct linux_dirent64` that are numbers.
///
/// Source: include/linux/dirent.h: inode 8 bytes, offset 8, record length 2, type 1, then the name
/// with its NUL.
fn dirent_numbers(mut entries: &[u8]) -> impl Iterator<Item = i32> + '_ {
    std::iter::from_fn(move || {
        loop {
            let length = entries.get(16..18)?;
            let length = usize::from(u16::from_ne_bytes([length[0], length[1]]));
            let (entry, rest) = entries.split_at_checked(length)?;
            entries = rest;
            let name = CStr::from_bytes_until_nul(entry.get(19..)?).ok()?;
            if let Some(number) = name.to_str().ok().and_then(|name| name.parse().ok()) {
                return Some(number);
            }
        }
    })
}

/// Reads the descriptors `fds` in `dir`.
fn read_sockets(dir: BorrowedFd<'_>, fds: impl Iterator<Item = i32>) -> io::Result<Table> {
    let mut table = Table::default();
    for fd in fds {
        let inode = match read_socket_link(dir, fd) {
            // There is none, or it was closed since the directory was read.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => continue,
            // The right to look is one for all descriptors of a process.
            Err(error) if is_denied(&error) => {
                table.denied = true;
                return Ok(table);
            }
            other => other?,
        };
        table.descriptors += 1;
        table
            .sockets
            .extend(inode.map(|inode| (inode, TargetFd(fd))));
    }
    Ok(table)
}

/// The inode of the socket that descriptor `fd` in `dir` refers to; `None` if it is no socket.
pub(in crate::finder) fn read_socket_link(dir: BorrowedFd<'_>, fd: i32) -> io::Result<Option<u32>> {
    // Longer targets are paths, of which the first bytes already say that they are no socket.
    let mut target = [0; 32];
    let mut name = [0; 12];
    let target = sys::readlinkat(dir, decimal(fd, &mut name), &mut target)?;
    Ok(parse_socket_link(target))
}

/// Writes a descriptor number as a C string.
fn decimal(number: i32, buffer: &mut [u8; 12]) -> &CStr {
    use io::Write;
    let mut rest = &mut buffer[..];
    write!(rest, "{number}\0").expect("11 characters and a NUL fit");
    CStr::from_bytes_until_nul(buffer).expect("just terminated")
}

/// The inode in `socket:[4711]`.
fn parse_socket_link(target: &[u8]) -> Option<u32> {
    let digits = target.strip_prefix(b"socket:[")?.strip_suffix(b"]")?;
    std::str::from_utf8(digits).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    use std::fs::File;
    use std::os::fd::{AsFd, AsRawFd};
    use std::os::unix::fs::symlink;

    static GO_ON: AtomicBool = AtomicBool::new(false);

    /// A directory with a socket for each of `fds`.
    fn directory(fds: impl Iterator<Item = i32>) -> (tempfile::TempDir, File) {
        let dir = tempfile::tempdir().unwrap();
        for fd in fds {
            let target = format!("socket:[{}]", fd + 100_000);
            symlink(target, dir.path().join(fd.to_string())).unwrap();
        }
        let file = File::open(dir.path()).unwrap();
        (dir, file)
    }

    fn gapless(dir: &File, open: usize) -> Option<usize> {
        let table = read_gapless(dir.as_fd(), open, &GO_ON).unwrap();
        table.map(|table| table.sockets.len())
    }

    #[test]
    fn a_table_without_gaps_needs_no_listing() {
        let (_dir, fd) = directory(0..5000);
        assert_eq!(gapless(&fd, 5000), Some(5000));
        // The process has opened and closed some since they were counted.
        assert_eq!(gapless(&fd, 4800), Some(5000));
    }

    #[test]
    fn small_gaps_are_passed_over() {
        let (_dir, fd) = directory((0..5500).filter(|fd| fd % 11 != 0));
        assert_eq!(gapless(&fd, 5000), Some(5000));
    }

    #[test]
    fn what_lies_beyond_a_gap_takes_a_listing() {
        let (_dir, fd) = directory((0..4999).chain([1_000_000]));
        assert_eq!(gapless(&fd, 5000), None);
        let (_dir, fd) = directory((0..10_000).step_by(2));
        assert_eq!(gapless(&fd, 5000), None);
        let table = read_table(fd.as_fd(), &GO_ON).unwrap();
        assert_eq!(table.sockets.len(), 5000);
    }

    #[test]
    fn a_large_table_of_a_real_process_is_the_same_both_ways() {
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        let needed = u64::try_from(2 * LARGE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, soft.max(needed), hard).unwrap();
        let held: Vec<File> = (0..LARGE + 10)
            .map(|_| File::open("/dev/null").unwrap())
            .collect();
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let dir = File::open("/proc/self/fd").unwrap();
        // Kernels before 6.2 do not count them.
        let open = count(dir.as_fd()).unwrap().unwrap_or(LARGE + 10);
        assert!(open >= LARGE + 10);
        let link = std::fs::read_link(format!("/proc/self/fd/{}", socket.as_raw_fd()));
        let inode = parse_socket_link(link.unwrap().as_os_str().as_encoded_bytes());
        let wanted = (inode.unwrap(), TargetFd(socket.as_raw_fd()));
        let counted = read_gapless(dir.as_fd(), open, &GO_ON).unwrap().unwrap();
        assert!(counted.sockets.contains(&wanted));
        let listed = read_sockets(dir.as_fd(), list_fds(dir.as_fd()).unwrap().into_iter());
        assert!(listed.unwrap().sockets.contains(&wanted));
        drop(held);
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
