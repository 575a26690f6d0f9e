//! bpf(2): iterators, programs that the kernel runs for each of its objects of a kind, and programs that it runs at its tracepoints.
//!
//! cwkill writes its few programs itself ([`Asm`]), with the offsets of the running kernel ([`Btf`]). So it needs no compiler, no object file
//! and no library of C. `crate::bpf` has the programs.

mod asm;
mod btf;
mod maps;
mod program;
mod storage;
mod tracepoint;
mod walker;

use std::fs::File;
use std::io::{self, Read};
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;

use super::errno_of;
pub use asm::{Asm, Helper, Insn, Label, Register};
pub use btf::{Btf, BtfError, Field, Name, Size};
pub use maps::{Shared, Table, Variable};
pub use storage::SocketStorage;
pub use tracepoint::{Hook, Tracepoint};
pub use walker::Walker;

/// Why a program cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BpfError {
    #[error(transparent)]
    Types(#[from] BtfError),
    /// EPERM: needs CAP_BPF and CAP_PERFMON, or CAP_SYS_ADMIN, of the first user namespace; or a seccomp filter refuses bpf(2). ENOSYS:
    /// the kernel has no bpf(2).
    #[error("bpf(2) refuses {0}")]
    Refused(&'static str, #[source] io::Error),
    /// The kernel's verifier does not accept the program. This is what it says.
    #[error("the kernel's verifier refuses the program: {}", program::reason(log))]
    Verifier {
        log: String,
        #[source]
        error: io::Error,
    },
    #[error("the kernel runs no program at a function while kernel.ftrace_enabled is 0")]
    FunctionsNotTraced,
    #[error("cannot read the iterator")]
    Read(#[source] io::Error),
    #[error("cannot start the process that reads the iterator")]
    Walker(#[source] io::Error),
}

impl BpfError {
    /// The errno of the system call, or that of a kernel that lacks something.
    pub fn errno(&self) -> Errno {
        match self {
            BpfError::Types(_) | BpfError::FunctionsNotTraced => Errno::EOPNOTSUPP,
            BpfError::Refused(_, error)
            | BpfError::Verifier { error, .. }
            | BpfError::Read(error)
            | BpfError::Walker(error) => errno_of(error),
        }
    }
}

// enum bpf_cmd
const MAP_CREATE: i32 = 0;
const MAP_UPDATE_ELEM: i32 = 2;
const PROG_LOAD: i32 = 5;
const RAW_TRACEPOINT_OPEN: i32 = 17;
const BTF_LOAD: i32 = 18;
const MAP_UPDATE_BATCH: i32 = 26;
const MAP_DELETE_BATCH: i32 = 27;
const LINK_CREATE: i32 = 28;
const ITER_CREATE: i32 = 33;

/// A prefix of `union bpf_attr`, as in the other files here. None has padding, so the kernel sees zeros behind it.
#[repr(C)]
#[derive(Default)]
struct LinkAttr {
    prog_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct IteratorAttr {
    link_fd: u32,
    flags: u32,
}

/// Calls bpf(2).
///
/// Every pointer in `attr` must refer to memory that lives during the call and is as long as `attr` says, writable for `log_buf`. The
/// callers are all in this folder.
fn bpf<A>(command: i32, attr: &mut A) -> io::Result<i32> {
    // SAFETY: `attr` is live and writable, and the size is its own. It is one of the structs above, prefixes of `union bpf_attr` for
    // `command` with the pointers that the callers have put in; those live on the callers' stacks or heaps during the call.
    let ret = unsafe { libc::syscall(libc::SYS_bpf, command, &raw mut *attr, mem::size_of::<A>()) };
    match i32::try_from(ret) {
        Ok(ret @ 0..) => Ok(ret),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Calls a command of bpf(2) that makes a descriptor.
fn bpf_fd<A>(command: i32, attr: &mut A) -> io::Result<OwnedFd> {
    let fd = bpf(command, attr)?;
    // SAFETY: the kernel has just made this descriptor for the call, so nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn number(fd: RawFd) -> u32 {
    u32::try_from(fd).expect("a descriptor is not negative")
}

fn length(bytes: usize) -> u32 {
    u32::try_from(bytes).expect("a short buffer")
}

fn address<T: ?Sized>(of: *const T) -> u64 {
    of.cast::<u8>().addr() as u64
}

/// A loaded iterator program, linked to its kind of objects.
#[derive(Debug)]
pub struct Iterator {
    link: OwnedFd,
}

impl Iterator {
    /// Loads a program that the kernel runs for each object of an iterator. `name` has at most 15 letters. `target`: the number of the
    /// function that stands for the iterator, `bpf_iter_NAME`.
    ///
    /// # Errors
    /// [`BpfError::Refused`], or [`BpfError::Verifier`] with what the verifier says.
    pub fn load(name: &str, program: &[Insn], target: u32) -> Result<Self, BpfError> {
        let loaded = program::load(name, program, program::Kind::ITERATOR, target)?;
        let mut attr = LinkAttr {
            prog_fd: number(loaded.as_raw_fd()),
            attach_type: program::Kind::ITERATOR.attach_type,
            ..LinkAttr::default()
        };
        let link = bpf_fd(LINK_CREATE, &mut attr);
        // The link keeps the program.
        link.map(|link| Iterator { link })
            .map_err(|error| BpfError::Refused("to link an iterator", error))
    }

    /// Runs the program for all objects, from the first. `each` gets the records of `N` bytes that the program has written, as they come,
    /// until it returns false. It also gets none of them now and then, so that it can stop.
    ///
    /// The pid namespace or the network namespace that the kernel iterates over is the one of the calling thread.
    ///
    /// # Errors
    /// [`BpfError::Refused`], [`BpfError::Read`].
    pub fn run<const N: usize>(
        &self,
        mut each: impl FnMut(&[[u8; N]]) -> bool,
    ) -> Result<(), BpfError> {
        let iterator = self.begin()?;
        read_records(&mut File::from(iterator), &mut each).map_err(BpfError::Read)
    }

    /// A descriptor that runs the program for all objects, from the first, while it is read. As [`Iterator::run`], it is for the namespace of
    /// the thread that begins it, whoever reads it.
    ///
    /// # Errors
    /// [`BpfError::Refused`].
    pub fn begin(&self) -> Result<OwnedFd, BpfError> {
        let mut attr = IteratorAttr {
            link_fd: number(self.link.as_raw_fd()),
            flags: 0,
        };
        bpf_fd(ITER_CREATE, &mut attr)
            .map_err(|error| BpfError::Refused("to begin an iterator", error))
    }
}

/// The kernel answers EAGAIN after a million objects for which the program has written nothing (kernel/bpf/bpf_iter.c,
/// MAX_ITER_OBJECTS). More such answers than this are not believed: no host has that many descriptors.
const MAX_PAUSES: u32 = 100_000;
/// Records per read(2).
const RECORDS: usize = 4096;

/// Reads records of `N` bytes to the end. A read(2) with room for whole records gets whole records.
fn read_records<const N: usize>(
    source: &mut impl Read,
    each: &mut impl FnMut(&[[u8; N]]) -> bool,
) -> io::Result<()> {
    let mut buffer = vec![0; N * RECORDS];
    let mut pauses = 0;
    loop {
        let read = match source.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && pauses < MAX_PAUSES => {
                pauses += 1;
                0
            }
            Err(error) => return Err(error),
        };
        let (records, rest) = buffer[..read].as_chunks::<N>();
        if !rest.is_empty() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "the kernel returned a part of a record",
            ));
        }
        if !each(records) {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers each read with the next part.
    struct Parts(std::vec::IntoIter<io::Result<Vec<u8>>>);

    impl Read for Parts {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let Some(part) = self.0.next() else {
                return Ok(0);
            };
            let part = part?;
            buffer[..part.len()].copy_from_slice(&part);
            Ok(part.len())
        }
    }

    fn read(parts: Vec<io::Result<Vec<u8>>>, most: usize) -> (Vec<[u8; 2]>, io::Result<()>) {
        let mut records = Vec::new();
        let result = read_records(&mut Parts(parts.into_iter()), &mut |part: &[[u8; 2]]| {
            records.extend(part);
            records.len() < most
        });
        (records, result)
    }

    #[test]
    fn a_pause_or_a_signal_is_not_the_end() {
        let parts = vec![
            Ok(vec![1, 2]),
            Err(io::ErrorKind::WouldBlock.into()),
            Err(io::ErrorKind::Interrupted.into()),
            Ok(vec![3, 4, 5, 6]),
        ];
        let (records, result) = read(parts, 9);
        result.unwrap();
        assert_eq!(records, [[1, 2], [3, 4], [5, 6]]);
    }

    #[test]
    fn an_error_and_half_a_record_are_reported() {
        let (records, result) = read(
            vec![
                Ok(vec![1, 2]),
                Err(io::Error::from_raw_os_error(libc::EFAULT)),
            ],
            9,
        );
        assert_eq!(records, [[1, 2]]);
        assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::EFAULT));
        let (_, result) = read(vec![Ok(vec![1, 2, 3])], 9);
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn endless_pauses_end() {
        let pauses = (0..=MAX_PAUSES).map(|_| Err(io::ErrorKind::WouldBlock.into()));
        let (_, result) = read(pauses.collect(), 9);
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn the_reader_can_stop() {
        let parts = vec![Ok(vec![1, 2, 3, 4]), Ok(vec![5, 6])];
        let (records, result) = read(parts, 1);
        result.unwrap();
        // What has been read has happened, so it is all reported.
        assert_eq!(records, [[1, 2], [3, 4]]);
    }
}
