//! The facts about an owner that the evidence is judged by, from /proc.
//!
//! Of `/proc/PID` only `auxv`, `fd`, `fdinfo`, `status` and `task` are read, none of which waits for the owner's memory;
//! `cmdline`, which may, only of those that could share a table and may not be compared.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;

use super::arch::Call;
use super::evidence::{self, Epoll, Ring};
use crate::finder::dead::{self, Verdict};
use crate::proc::{ProcFs, Process, fds, is_gone};
use crate::sock_diag::Cookie;
use crate::sys::{self, RemoteFd};

/// An owner that can be looked into.
#[derive(Debug)]
pub struct Inside<'p> {
    proc: &'p ProcFs,
    /// Its number.
    pub pid: i32,
    start_time: u64,
    pidfd: OwnedFd,
    fds: File,
}

/// A descriptor of a kind of file that the evidence asks about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Special {
    /// An epoll set.
    Epoll(i32),
    /// An io_uring.
    Ring(i32),
}

/// What a number in the owner's table is now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Identity {
    /// The dead socket that was found, and how many bytes its program has not read.
    Same {
        /// The bytes.
        unread: u32,
    },
    /// Something else, or nothing.
    Other,
    /// It may not be looked at.
    Unknown(Errno),
}

impl<'p> Inside<'p> {
    /// The process that was seen, or ESRCH.
    pub fn open(proc: &'p ProcFs, process: &Process) -> Result<Self, Errno> {
        Ok(Inside {
            pidfd: dead::open_pidfd(proc, process)?,
            fds: File::open(proc.path(&format!("{}/fd", process.pid))).map_err(dead::errno)?,
            proc,
            pid: process.pid,
            start_time: process.start_time,
        })
    }

    /// The /proc it was found in.
    pub fn proc(&self) -> &'p ProcFs {
        self.proc
    }

    /// Whether process `other`, which may not be compared with the owner, could have its table of
    /// descriptors: both have a table of one size with as many open descriptors, and were started with the same words. An
    /// exec gives a process a table of its own (execve(2)), so those that share one are of one program; not of one user,
    /// which setuid(2) changes. What cannot be read could.
    pub fn could_share(&self, other: i32) -> bool {
        let of_both = |name: &str| -> io::Result<(Vec<u8>, Vec<u8>)> {
            let file = |pid: i32| fs::read(self.proc.path(&format!("{pid}/{name}")));
            Ok((file(self.pid)?, file(other)?))
        };
        let could = || -> io::Result<bool> {
            let (owner, others) = of_both("status")?;
            let text = |status| String::from_utf8_lossy(status).into_owned();
            if !could_share(&text(&owner), &text(&others)) || self.has_other_count(other)? {
                return Ok(false);
            }
            // Last and of few, since it is read from the memory of the process, which may not answer.
            let (owner, others) = of_both("cmdline")?;
            Ok(owner == others)
        };
        match could() {
            Ok(could) => could,
            Err(error) => !is_gone(&error),
        }
    }

    /// Whether the process has another number of open descriptors than the owner, twice while the owner's does not change.
    /// Linux tells it since 6.2, whoever asks (fs/proc/fd.c, proc_fd_getattr).
    fn has_other_count(&self, other: i32) -> io::Result<bool> {
        let count = |pid: i32| {
            let fds = fs::metadata(self.proc.path(&format!("{pid}/fd")));
            fds.map(|fds| fds.len())
        };
        for _ in 0..2 {
            let (before, others, after) = (count(self.pid)?, count(other)?, count(self.pid)?);
            // The owner has some, so 0 is from a kernel that does not tell.
            if before == 0 || before != after || others == before {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Whether descriptor `fd` is the dead TCP socket with this inode and cookie.
    pub fn identity(&self, fd: RemoteFd, inode: u32, cookie: Cookie) -> Identity {
        match dead::examine(self.pidfd.as_fd(), fd, inode) {
            Some(Verdict::Dead(socket)) if socket.cookie == cookie => Identity::Same {
                unread: socket.unread,
            },
            Some(Verdict::Unknown(errno)) => Identity::Unknown(errno),
            _ => Identity::Other,
        }
    }

    /// Whether the number is free in the owner's table.
    pub fn is_free(&self, fd: RemoteFd) -> bool {
        let link = fds::read_socket_link(self.fds.as_fd(), fd.0);
        link.is_err_and(|error| is_gone(&error))
    }

    /// For descriptors below which number its table has room; it only grows. Where that cannot be read, for all.
    pub fn room(&self) -> u32 {
        let status = fs::read_to_string(self.proc.path(&format!("{}/status", self.pid)));
        let size = status.ok().and_then(|status| field(&status, "FDSize:"));
        size.and_then(|size| u32::try_from(size).ok().filter(|size| *size > 0))
            .unwrap_or(u32::MAX)
    }

    /// The numbers in use.
    pub fn numbers(&self) -> io::Result<Vec<i32>> {
        // A directory is read on from where it was left.
        let again = File::open(self.proc.path(&format!("{}/fd", self.pid)))?;
        fds::list_fds(again.as_fd())
    }

    /// Of `numbers`, the epoll sets and io_urings.
    pub fn specials(&self, numbers: &[i32]) -> io::Result<Vec<Special>> {
        let mut specials = Vec::new();
        for &fd in numbers {
            match kind(self.fds.as_fd(), fd) {
                Ok(special) => specials.extend(special),
                Err(error) if is_gone(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(specials)
    }

    /// What is in the epoll sets and io_urings.
    pub fn tables(&self, specials: &[Special]) -> io::Result<(Vec<Epoll>, Vec<Ring>)> {
        let (mut epolls, mut rings) = (Vec::new(), Vec::new());
        for special in specials {
            let (Special::Epoll(fd) | Special::Ring(fd)) = *special;
            let path = self.proc.path(&format!("{}/fdinfo/{fd}", self.pid));
            let text = match fs::read_to_string(path) {
                Ok(text) => text,
                Err(error) if is_gone(&error) => continue,
                Err(error) => return Err(error),
            };
            match special {
                Special::Epoll(_) => epolls.push(parse_epoll(fd, &text)),
                Special::Ring(_) => rings.push(parse_ring(fd, &text)),
            }
        }
        Ok((epolls, rings))
    }

    /// The threads of the owner that sleep in a system call, and their calls. A thread that runs is in none
    /// for long.
    pub fn calls(&self) -> io::Result<Vec<(i32, Call)>> {
        let mut calls = Vec::new();
        for entry in fs::read_dir(self.proc.path(&format!("{}/task", self.pid)))? {
            let entry = entry?;
            let Some(tid) = entry.file_name().to_str().and_then(|n| n.parse().ok()) else {
                continue;
            };
            match fs::read_to_string(entry.path().join("syscall")) {
                Ok(text) => calls.extend(parse_call(&text).map(|call| (tid, call))),
                Err(error) if is_gone(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(calls)
    }

    /// Of threads that sleep in these `calls`, the first that waits in the middle of a transfer, and the number of its call. Nothing
    /// stops one in a sleep that ends for no signal, as most for a disk are, before it is done.
    pub fn transfer(&self, calls: &[(i32, Call)]) -> Option<(i32, i64)> {
        let can_be_stopped = |tid: i32| {
            let stat = self.proc.path(&format!("{}/task/{tid}/stat", self.pid));
            let stat = fs::read_to_string(stat).unwrap_or_default();
            // The state is what follows the name, which may have anything in it.
            stat.rsplit_once(") ")
                .is_some_and(|(_, rest)| rest.starts_with('S'))
        };
        let mut calls = calls.iter();
        let found = calls.find(|(tid, call)| evidence::can_end_short(call) && can_be_stopped(*tid));
        found.map(|(tid, call)| (*tid, call.number))
    }

    /// The name of a thread of the owner that runs finalizers.
    pub fn finalizer(&self) -> Option<String> {
        self.named(&evidence::runs_finalizers)
    }

    /// The name of a thread of the owner that works for an io_uring.
    pub fn ring_worker(&self) -> Option<String> {
        self.named(&evidence::works_for_a_ring)
    }

    /// Of these threads of the owner, one that works for an io_uring. The kernel gives them their names before they are listed.
    pub fn ring_worker_among(&self, tids: impl IntoIterator<Item = i32>) -> Option<String> {
        let mut comms = tids.into_iter().filter_map(|tid| comm(self.proc, tid));
        comms.find(|name| evidence::works_for_a_ring(name))
    }

    /// Its threads.
    pub fn threads(&self) -> io::Result<HashSet<i32>> {
        numbers_in(&self.proc.path(&format!("{}/task", self.pid)))
    }

    fn named(&self, wanted: &dyn Fn(&str) -> bool) -> Option<String> {
        let tasks = fs::read_dir(self.proc.path(&format!("{}/task", self.pid))).ok()?;
        let name = |task: io::Result<fs::DirEntry>| {
            let tid = task.ok()?.file_name().to_str()?.parse().ok()?;
            comm(self.proc, tid).filter(|name| wanted(name))
        };
        tasks.into_iter().find_map(name)
    }

    /// Whether the process is there, whatever it executes.
    pub fn is_there(&self) -> bool {
        is_there(self.proc, self.pid, self.start_time)
    }

    /// Whether the first thread has ended and others have not: the table of the process is then not to be seen.
    pub fn leader_has_ended(&self) -> io::Result<bool> {
        let status = fs::read_to_string(self.proc.path(&format!("{}/status", self.pid)))?;
        Ok(leader_has_ended(&status))
    }

    /// Whether the program has 32 bits.
    pub fn is_narrow(&self) -> io::Result<bool> {
        Ok(is_narrow(&fs::read(
            self.proc.path(&format!("{}/auxv", self.pid)),
        )?))
    }

    /// Who traces a thread of the owner.
    pub fn tracer(&self) -> Option<i32> {
        let tasks = fs::read_dir(self.proc.path(&format!("{}/task", self.pid))).ok()?;
        let tracer = |task: io::Result<fs::DirEntry>| {
            let status = fs::read_to_string(task.ok()?.path().join("status")).ok()?;
            field(&status, "TracerPid:").filter(|tracer| *tracer != 0)
        };
        tasks.into_iter().find_map(tracer)
    }

    /// The mode of seccomp of a thread: 0 none, 1 strict, 2 filters.
    pub fn seccomp(&self, tid: i32) -> io::Result<i32> {
        let path = format!("{}/task/{tid}/status", self.pid);
        let status = fs::read_to_string(self.proc.path(&path))?;
        // A kernel without it does not say.
        Ok(field(&status, "Seccomp:").unwrap_or(0))
    }
}

/// Whether a process is there that has or may have descriptors.
pub fn is_there(proc: &ProcFs, pid: i32, start_time: u64) -> bool {
    let status = fs::read_to_string(proc.path(&format!("{pid}/status")));
    let ended = |status: String| {
        let state = status.lines().find_map(|line| line.strip_prefix("State:"));
        let dead = state.is_some_and(|state| state.trim_start().starts_with(['Z', 'X']));
        dead && !leader_has_ended(&status)
    };
    proc.start_time(pid) == Some(start_time) && status.is_ok_and(|status| !ended(status))
}

/// The numbers of all processes.
pub fn pids(proc: &ProcFs) -> io::Result<HashSet<i32>> {
    numbers_in(&proc.path(""))
}

/// The entries of a directory of /proc that are numbers.
fn numbers_in(path: &Path) -> io::Result<HashSet<i32>> {
    let mut numbers = HashSet::new();
    for entry in fs::read_dir(path)? {
        let number: Option<i32> = entry?.file_name().to_str().and_then(|n| n.parse().ok());
        numbers.extend(number);
    }
    Ok(numbers)
}

fn leader_has_ended(status: &str) -> bool {
    let state = status.lines().find_map(|line| line.strip_prefix("State:"));
    let ended = state.is_some_and(|state| state.trim_start().starts_with('Z'));
    ended && field(status, "Threads:").is_some_and(|threads| threads > 1)
}

/// Whether an auxiliary vector is that of a 32-bit program: pairs of words as wide as the program's, an identifier, which is
/// small, and a value, of which the first is an address or a set of bits. Source: fs/binfmt_elf.c, create_elf_tables;
/// arch/x86/include/asm/elf.h, ARCH_DLINFO.
fn is_narrow(auxv: &[u8]) -> bool {
    let identifier = |pair: &[u8]| pair.first_chunk().map(|word| u64::from_ne_bytes(*word));
    let mut identifiers = auxv.chunks(16).filter_map(identifier);
    identifiers.any(|identifier| identifier > u32::MAX.into())
}

/// Whether two processes with these status files could have one table of descriptors.
fn could_share(owner: &str, other: &str) -> bool {
    let same = |name: &str| {
        let value = |status: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            Some(line.split_whitespace().next()?.to_owned())
        };
        value(owner) == value(other)
    };
    // Only what has memory has a line about its size. Source: fs/proc/array.c, proc_pid_status.
    same("FDSize:") && other.contains("\nVmSize:")
}

/// The name of a process or thread that can be read.
pub fn comm(proc: &ProcFs, pid: i32) -> Option<String> {
    let comm = fs::read(proc.path(&format!("{pid}/comm"))).ok()?;
    Some(String::from_utf8_lossy(&comm).trim_end().to_owned())
}

fn kind(dir: BorrowedFd<'_>, fd: i32) -> io::Result<Option<Special>> {
    let mut target = [0; 32];
    let mut name = [0; 12];
    let target = sys::readlinkat(dir, fds::decimal(fd, &mut name), &mut target)?;
    Ok(match target {
        b"anon_inode:[eventpoll]" => Some(Special::Epoll(fd)),
        b"anon_inode:[io_uring]" => Some(Special::Ring(fd)),
        _ => None,
    })
}

/// The value of a line `NAME value` of a status file.
fn field(status: &str, name: &str) -> Option<i32> {
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    line.trim().parse().ok()
}

/// The members of an epoll set: lines `tfd: 7 events: 19 data: 7 pos:0 ino:2a sdev:9`, of which older
/// kernels end with the data. Source: fs/eventpoll.c, ep_show_fdinfo.
fn parse_epoll(fd: i32, fdinfo: &str) -> Epoll {
    let mut epoll = Epoll {
        fd,
        ..Epoll::default()
    };
    for line in fdinfo.lines().filter_map(|line| line.strip_prefix("tfd:")) {
        let mut words = line.split_whitespace();
        let number: Option<i32> = words.next().and_then(|number| number.parse().ok());
        let inode = words.find_map(|word| u64::from_str_radix(word.strip_prefix("ino:")?, 16).ok());
        match inode {
            Some(inode) => drop(epoll.inodes.insert(inode)),
            None => epoll.fds.extend(number),
        }
    }
    epoll
}

/// The registered sockets of an io_uring, lines `    0: socket:[42]` below `UserFiles:`, and whether
/// there is anything below `PollList:`. Source: io_uring/fdinfo.c, __io_uring_show_fdinfo.
fn parse_ring(fd: i32, fdinfo: &str) -> Ring {
    let mut ring = Ring {
        fd,
        ..Ring::default()
    };
    let mut section = "";
    for line in fdinfo.lines() {
        if !line.starts_with(' ') {
            section = line.split(':').next().unwrap_or_default();
            continue;
        }
        match section {
            "UserFiles" => {
                let link = line.split_once(": ").map(|(_, link)| link.trim());
                let inode: Option<u64> = link
                    .and_then(|link| link.strip_prefix("socket:[")?.strip_suffix(']'))
                    .and_then(|digits| digits.parse().ok());
                ring.sockets.extend(inode);
            }
            "PollList" => ring.in_flight = true,
            _ => {}
        }
    }
    ring
}

/// A line of /proc/PID/task/TID/syscall: `running`, `-1 SP PC`, or the number, six arguments, SP and PC.
/// Source: fs/proc/base.c, proc_pid_syscall.
fn parse_call(line: &str) -> Option<Call> {
    let mut words = line.split_whitespace();
    let number: i64 = words.next()?.parse().ok().filter(|number| *number >= 0)?;
    let mut arguments = [0; 6];
    for argument in &mut arguments {
        *argument = u64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok()?;
    }
    Some(Call { number, arguments })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn epoll_sets_of_old_and_new_kernels() {
        let text = "pos:\t0\nflags:\t02\nmnt_id:\t15\nino:\t1057\n\
            tfd:        7 events:       19 data:                7  pos:0 ino:2a sdev:9\n\
            tfd:       11 events: 80000019 data: 7f00\n";
        let wanted = Epoll {
            fd: 4,
            inodes: [42].into(),
            fds: [11].into(),
        };
        assert_eq!(parse_epoll(4, text), wanted);
    }

    #[test]
    fn io_urings() {
        let text = "pos:\t0\nSqMask:\t0x7\nSQEs:\t0\nCQEs:\t0\nSqThread:\t-1\n\
            UserFiles:\t3\n    0: socket:[42]\n    1: /dev/null\n    2: <none>\n\
            UserBufs:\t0\nPollList:\n  op=6, task_works=0\nCqOverflowList:\n";
        let ring = parse_ring(5, text);
        assert_eq!(ring.sockets, [42].into());
        assert!(ring.in_flight);
        let idle = parse_ring(
            5,
            "UserFiles:\t0\nUserBufs:\t0\nPollList:\nCqOverflowList:\n  user_data=1\n",
        );
        assert_eq!(
            idle,
            Ring {
                fd: 5,
                ..Ring::default()
            }
        );
    }

    #[test]
    fn calls_of_threads() {
        let line = "232 0x4 0x7ffd1000 0x80 0xffffffffffffffff 0x0 0x8 0x7ffd0f00 0x7f0012345678\n";
        let call = parse_call(line).unwrap();
        assert_eq!(
            (call.number, call.arguments[..3].to_vec()),
            (232, vec![4, 0x7ffd_1000, 0x80])
        );
        for none in ["running\n", "-1 0x7ffd0f00 0x7f0012345678\n", "", "232 0x4"] {
            assert_eq!(parse_call(none), None, "{none}");
        }
    }

    #[test]
    fn who_could_share_a_table() {
        let status =
            |uid, size, memory| format!("Name:\tx\nUid:\t{uid}\t{uid}\nFDSize:\t{size}\n{memory}");
        let owner = status(7, 64, "VmSize:\t9 kB\n");
        assert!(could_share(&owner, &owner));
        // It may have changed its user since.
        assert!(could_share(&owner, &status(8, 64, "VmSize:\t9 kB\n")));
        assert!(!could_share(&owner, &status(7, 128, "VmSize:\t9 kB\n")));
        assert!(!could_share(&owner, &status(7, 64, "Threads:\t1\n")));
    }

    #[test]
    fn a_first_thread_that_has_ended_is_seen() {
        let status = |state, threads| format!("Name:\tx\nState:\t{state}\nThreads:\t{threads}\n");
        assert!(leader_has_ended(&status("Z (zombie)", 2)));
        assert!(!leader_has_ended(&status("Z (zombie)", 1)), "all of it has");
        assert!(!leader_has_ended(&status("S (sleeping)", 2)));
    }

    #[test]
    fn a_process_is_there_until_it_has_ended() {
        let proc = ProcFs::default();
        let own = i32::try_from(std::process::id()).unwrap();
        let start_time = proc.start_time(own).unwrap();
        assert!(is_there(&proc, own, start_time));
        assert!(!is_there(&proc, own, start_time + 1), "another by now");
        let mut child = std::process::Command::new("cat")
            .stdin(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let start_time = proc.start_time(pid).unwrap();
        assert!(is_there(&proc, pid, start_time));
        drop(child.stdin.take());
        let until = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while is_there(&proc, pid, start_time) {
            assert!(std::time::Instant::now() < until);
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        // Ended, and still listed.
        assert_eq!(proc.start_time(pid), Some(start_time));
        child.wait().unwrap();
        assert!(!is_there(&proc, pid, start_time));
    }

    #[test]
    fn programs_of_32_bits_are_known_by_their_vector() {
        let wide = |words: &[u64]| {
            words
                .iter()
                .flat_map(|w| w.to_ne_bytes())
                .collect::<Vec<_>>()
        };
        let narrow = |words: &[u32]| {
            words
                .iter()
                .flat_map(|w| w.to_ne_bytes())
                .collect::<Vec<_>>()
        };
        // AT_SYSINFO_EHDR, AT_HWCAP, AT_PAGESZ, AT_NULL.
        let vector = [33, 0x7ffd_f7fc_1000, 16, 0xbfeb_fbff, 6, 4096, 0, 0];
        assert!(!is_narrow(&wide(&vector)));
        assert!(is_narrow(&narrow(&[
            32,
            0xf7f9_0550,
            33,
            0xf7f9_0000,
            6,
            4096,
            0,
            0
        ])));
        // Without vDSO.
        assert!(is_narrow(&narrow(&[16, 0xbfeb_fbff, 6, 4096, 0, 0])));
        assert!(!is_narrow(&[]));
    }

    #[test]
    fn fields_of_a_status() {
        let status = "Name:\tx\nTracerPid:\t31\nSeccomp:\t2\nSeccomp_filters:\t1\n";
        assert_eq!(field(status, "TracerPid:"), Some(31));
        assert_eq!(field(status, "Seccomp:"), Some(2));
        assert_eq!(field(status, "Speculation:"), None);
    }
}
