//! The system call in which a thread sleeps, and the lists of poll(2) in its memory.

use std::io::IoSliceMut;

use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;

/// A system call of a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Syscall {
    pub number: i64,
    /// If the call has fewer arguments, the others are the remaining values of their registers.
    pub arguments: [u64; 6],
}

impl Syscall {
    /// Parses /proc/PID/task/TID/syscall: `running`, or `-1 SP PC`, or the number, six arguments, SP and PC. `None`
    /// if the thread is not in a system call. Source: fs/proc/base.c, proc_pid_syscall.
    pub fn parse(line: &str) -> Option<Self> {
        let mut words = line.split_whitespace();
        let number: i64 = words.next()?.parse().ok().filter(|number| *number >= 0)?;
        let mut arguments = [0; 6];
        for argument in &mut arguments {
            *argument = u64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok()?;
        }
        Some(Syscall { number, arguments })
    }

    /// Whether [`Syscall::pollfds`] may have a list.
    pub fn may_be_poll(&self) -> bool {
        match self.number {
            #[cfg(target_arch = "x86_64")]
            libc::SYS_poll => true,
            libc::SYS_ppoll | libc::SYS_restart_syscall => true,
            _ => false,
        }
    }

    /// Whether it is a select(2) or pselect(2).
    pub fn is_select(&self) -> bool {
        match self.number {
            #[cfg(target_arch = "x86_64")]
            libc::SYS_select => true,
            libc::SYS_pselect6 => true,
            _ => false,
        }
    }

    /// The list of a poll(2) or ppoll(2); empty for another call. A call that the kernel restarted after a stop counts as a
    /// poll(2) if its arguments are those of one. `None` if the list cannot be read. The process has a descriptor table with
    /// `table_size` slots.
    pub fn pollfds(&self, read_memory: ReadMemory<'_>, table_size: u32) -> Option<Vec<PollFd>> {
        let list = || read_pollfds(self.arguments[0], self.arguments[1], read_memory);
        match self.number {
            #[cfg(target_arch = "x86_64")]
            libc::SYS_poll => list(),
            libc::SYS_ppoll => list(),
            // The first arguments of a futex wait with a timeout are an address and an operation. As a length, the operation means
            // 137 or 393 entries. If the memory cannot be read, there is no list.
            libc::SYS_restart_syscall => {
                let mut list = list().unwrap_or_default();
                if !list.iter().all(|entry| entry.could_be_polled(table_size)) {
                    list.clear();
                }
                Some(list)
            }
            _ => Some(Vec::new()),
        }
    }
}

/// Reads memory of a process, given an address and a length.
pub type ReadMemory<'a> = &'a dyn Fn(u64, usize) -> Option<Vec<u8>>;

/// Reads `length` bytes of the memory of the process of `tid`. This can wait for the memory, for example for a page on a file system
/// that hangs.
pub fn read_memory(tid: i32, address: u64, length: usize) -> Option<Vec<u8>> {
    let mut bytes = vec![0; length];
    let remote = RemoteIoVec {
        base: usize::try_from(address).ok()?,
        len: length,
    };
    let read = process_vm_readv(
        Pid::from_raw(tid),
        &mut [IoSliceMut::new(&mut bytes)],
        &[remote],
    );
    (read == Ok(length)).then_some(bytes)
}

/// The longest list, in bytes, that cwkill reads from a process.
pub const MAX_LIST_BYTES: u64 = 1 << 20;

/// `struct pollfd` (poll(2)), without the field that the kernel fills in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PollFd {
    pub fd: i32,
    pub events: u16,
}

impl PollFd {
    /// Whether poll(2) can wait with this entry in its list. A number that is not open ends the call at once, and a negative
    /// number is skipped; programs write -1, or the complement of the number. Source: fs/select.c, do_pollfd.
    fn could_be_polled(self, table_size: u32) -> bool {
        /// include/uapi/asm-generic/poll.h gives every bit but this one a meaning.
        const NO_EVENT: u16 = 0x0800;
        let number = if self.fd < 0 { !self.fd } else { self.fd };
        u32::try_from(number).is_ok_and(|number| number < table_size) && self.events & NO_EVENT == 0
    }
}

/// Reads an array of `struct pollfd`.
fn read_pollfds(address: u64, count: u64, read_memory: ReadMemory<'_>) -> Option<Vec<PollFd>> {
    if address == 0 || count == 0 {
        return Some(Vec::new());
    }
    let bytes = count
        .checked_mul(8)
        .filter(|bytes| *bytes <= MAX_LIST_BYTES)?;
    let list = read_memory(address, usize::try_from(bytes).ok()?)?;
    let entry = |entry: &[u8]| PollFd {
        fd: i32::from_ne_bytes([entry[0], entry[1], entry[2], entry[3]]),
        events: u16::from_ne_bytes([entry[4], entry[5]]),
    };
    Some(list.chunks_exact(8).map(entry).collect())
}
