//! System calls of the owner's threads: the descriptors that a system call uses, and the effect of a stop or a remote syscall on
//! the call. Pure.

use std::collections::HashSet;

use crate::proc::syscall::{MAX_LIST_BYTES, ReadMemory, Syscall};

impl Syscall {
    /// Whether the call executes a program. Its thread may hold the lock that PTRACE_SEIZE waits for, and Ctrl-C does not end
    /// that wait (kernel/ptrace.c, ptrace_attach: cred_guard_mutex).
    pub fn is_exec(&self) -> bool {
        matches!(self.number, libc::SYS_execve | libc::SYS_execveat)
    }

    /// Whether a thread that sleeps in this call, where nothing interrupts it, waits for the child of a vfork(2) or
    /// posix_spawn(3). Source: kernel/fork.c, wait_for_vfork_done. The flags of clone3(2) are in memory; nothing else makes it sleep
    /// for long.
    pub fn waits_for_vfork(&self) -> bool {
        let flag = u64::from(libc::CLONE_VFORK.cast_unsigned());
        match self.number {
            libc::SYS_clone => self.arguments[0] & flag != 0,
            libc::SYS_clone3 => true,
            #[cfg(target_arch = "x86_64")]
            libc::SYS_vfork => true,
            _ => false,
        }
    }

    /// Whether a thread that sleeps in this call may have transferred a part already. A stop makes the call return that part: the
    /// kernel restarts a call only if it has transferred nothing. Few programs expect a partial result from a blocking
    /// descriptor. Source: signal(7), send(2), recv(2); net/core/stream.c, sk_stream_wait_memory; fs/pipe.c, pipe_write.
    pub fn can_end_short(&self) -> bool {
        /// include/linux/socket.h: recvmmsg(2) waits only for the first message.
        const MSG_WAITFORONE: u64 = 0x10000;
        let arguments = &self.arguments;
        let waits_for_all = |flags: u64| flags & u64::from(libc::MSG_WAITALL.cast_unsigned()) != 0;
        // One byte cannot be split.
        match self.number {
            libc::SYS_write | libc::SYS_pwrite64 | libc::SYS_sendto | libc::SYS_tee => {
                arguments[2] > 1
            }
            libc::SYS_sendfile => arguments[3] > 1,
            libc::SYS_splice => arguments[4] > 1,
            libc::SYS_writev
            | libc::SYS_pwritev
            | libc::SYS_pwritev2
            | libc::SYS_sendmsg
            | libc::SYS_sendmmsg
            | libc::SYS_vmsplice => true,
            libc::SYS_recvfrom => arguments[2] > 1 && waits_for_all(arguments[3]),
            libc::SYS_recvmsg => waits_for_all(arguments[2]),
            libc::SYS_recvmmsg => {
                waits_for_all(arguments[3])
                    || arguments[2] > 1 && arguments[3] & MSG_WAITFORONE == 0
            }
            _ => false,
        }
    }

    /// The harm if this call, in which a thread waits, seems to return the result of cwkill's call because cwkill was killed.
    pub fn false_return_risk(&self) -> FalseReturnRisk {
        /// include/uapi/linux/futex.h: the operation without its flags.
        const FUTEX_COMMAND: u64 = 0x7f;
        const FUTEX_WAIT: u64 = 0;
        const FUTEX_WAIT_BITSET: u64 = 9;
        /// No process has more descriptors (fs.nr_open, kernel/sysctl.c, sysctl_nr_open_max), and no address is lower.
        const MAX_DESCRIPTORS: u64 = 1 << 31;
        match self.number {
            libc::SYS_futex => match self.arguments[1] & FUTEX_COMMAND {
                FUTEX_WAIT | FUTEX_WAIT_BITSET => FalseReturnRisk::ZeroOnly,
                _ => FalseReturnRisk::High,
            },
            libc::SYS_nanosleep | libc::SYS_clock_nanosleep => FalseReturnRisk::AnyResult,
            // It continues a sleep, a futex wait with a timeout, or poll(2), with the arguments of that call. The second
            // argument of a sleep is an address or 0. The second argument of poll is the number of descriptors.
            libc::SYS_restart_syscall => match self.arguments[1] {
                0 | MAX_DESCRIPTORS.. => FalseReturnRisk::AnyResult,
                _ => FalseReturnRisk::Low,
            },
            libc::SYS_epoll_pwait
            | libc::SYS_epoll_pwait2
            | libc::SYS_ppoll
            | libc::SYS_pselect6 => FalseReturnRisk::Low,
            #[cfg(target_arch = "x86_64")]
            libc::SYS_epoll_wait | libc::SYS_poll | libc::SYS_select => FalseReturnRisk::Low,
            _ => FalseReturnRisk::High,
        }
    }
}

/// The harm if a thread's own call seems to return another result because cwkill was killed while its call replaced the thread's own.
/// The calls that close descriptors return 0; those that replace a standard descriptor also return descriptors and an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum FalseReturnRisk {
    /// A sleep: any result that is no error is its end.
    AnyResult,
    /// The call may return 0 at any time: a spurious wake-up. glibc ends the program after another result of a futex wait
    /// (sysdeps/nptl/futex-internal.h, futex_fatal_error).
    ZeroOnly,
    /// 0 means that no event has occurred.
    Low,
    /// The program may take 0 for a result.
    High,
    /// The thread is not waiting in a call, so its next call is unknown.
    Unknown,
}

/// The descriptors that a thread's system call uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SyscallFds {
    pub tid: i32,
    /// The number of the call.
    pub number: i64,
    /// The descriptors; `None` if the call may use any.
    pub fds: Option<HashSet<i32>>,
}

impl SyscallFds {
    /// The descriptors that `call` of thread `tid` may use. The owner's descriptor table has `table_size` slots.
    pub fn of(tid: i32, call: &Syscall, read_memory: ReadMemory<'_>, table_size: u32) -> Self {
        let arguments = &call.arguments;
        let fds = match descriptors(call.number) {
            _ if call.number & OTHER_ABI != 0 => None,
            Descriptors::At(positions) => Some(
                positions
                    .iter()
                    .map(|&position| fd(arguments[position]))
                    .collect(),
            ),
            Descriptors::Poll => {
                let list = call.pollfds(read_memory, table_size);
                list.map(|list| list.into_iter().map(|entry| entry.fd).collect())
            }
            Descriptors::Select => read_fd_sets(arguments, read_memory, table_size),
        };
        SyscallFds {
            tid,
            number: call.number,
            fds,
        }
    }
}

/// The arguments of a system call that are descriptors.
enum Descriptors {
    /// The arguments at these positions.
    At(&'static [usize]),
    /// The list of `poll`, also of a restarted one; see [`Syscall::pollfds`].
    Poll,
    /// Three bit sets, at the addresses in arguments 2 to 4; the first argument is their length in bits.
    Select,
}

/// Source: the manual pages, section 2. For a call that is not listed, each of the first three arguments may be a descriptor.
fn descriptors(number: i64) -> Descriptors {
    match number {
        libc::SYS_futex
        | libc::SYS_futex_waitv
        | libc::SYS_nanosleep
        | libc::SYS_clock_nanosleep
        | libc::SYS_wait4
        | libc::SYS_waitid
        | libc::SYS_rt_sigtimedwait
        | libc::SYS_rt_sigsuspend
        | libc::SYS_rt_sigreturn
        | libc::SYS_sched_yield
        | libc::SYS_gettid
        | libc::SYS_getpid
        | libc::SYS_tgkill
        | libc::SYS_madvise
        | libc::SYS_munmap
        | libc::SYS_mprotect
        | libc::SYS_brk
        | libc::SYS_exit
        | libc::SYS_exit_group
        | libc::SYS_msgrcv
        | libc::SYS_msgsnd
        | libc::SYS_semop
        | libc::SYS_semtimedop
        | libc::SYS_io_uring_setup
        | libc::SYS_io_getevents => Descriptors::At(&[]),
        libc::SYS_read
        | libc::SYS_write
        | libc::SYS_readv
        | libc::SYS_writev
        | libc::SYS_pread64
        | libc::SYS_pwrite64
        | libc::SYS_recvfrom
        | libc::SYS_recvmsg
        | libc::SYS_recvmmsg
        | libc::SYS_sendto
        | libc::SYS_sendmsg
        | libc::SYS_sendmmsg
        | libc::SYS_accept
        | libc::SYS_accept4
        | libc::SYS_connect
        | libc::SYS_shutdown
        | libc::SYS_close
        | libc::SYS_getsockopt
        | libc::SYS_setsockopt
        | libc::SYS_fcntl
        | libc::SYS_ioctl
        | libc::SYS_epoll_pwait
        | libc::SYS_epoll_pwait2
        | libc::SYS_io_uring_enter
        | libc::SYS_io_uring_register
        | libc::SYS_flock
        | libc::SYS_fsync
        | libc::SYS_fdatasync => Descriptors::At(&[0]),
        libc::SYS_sendfile | libc::SYS_dup3 | libc::SYS_tee => Descriptors::At(&[0, 1]),
        libc::SYS_splice | libc::SYS_copy_file_range | libc::SYS_epoll_ctl => {
            Descriptors::At(&[0, 2])
        }
        libc::SYS_ppoll => Descriptors::Poll,
        libc::SYS_pselect6 => Descriptors::Select,
        libc::SYS_restart_syscall => Descriptors::Poll,
        #[cfg(target_arch = "x86_64")]
        libc::SYS_pause | libc::SYS_arch_prctl => Descriptors::At(&[]),
        #[cfg(target_arch = "x86_64")]
        libc::SYS_epoll_wait => Descriptors::At(&[0]),
        #[cfg(target_arch = "x86_64")]
        libc::SYS_dup2 => Descriptors::At(&[0, 1]),
        #[cfg(target_arch = "x86_64")]
        libc::SYS_poll => Descriptors::Poll,
        #[cfg(target_arch = "x86_64")]
        libc::SYS_select => Descriptors::Select,
        _ => Descriptors::At(&[0, 1, 2]),
    }
}

/// arch/x86/include/uapi/asm/unistd.h, __X32_SYSCALL_BIT: with this bit the number is one of the x32 ABI.
#[cfg(target_arch = "x86_64")]
const OTHER_ABI: i64 = 0x4000_0000;
#[cfg(not(target_arch = "x86_64"))]
const OTHER_ABI: i64 = 0;

/// An argument that is a descriptor. The kernel takes its lower half.
fn fd(argument: u64) -> i32 {
    let [a, b, c, d, ..] = argument.to_le_bytes();
    i32::from_le_bytes([a, b, c, d])
}

/// The descriptors in the three sets of select(2). Programs often pass the highest possible number as the length, so the
/// kernel reads no further than the descriptor table reaches (fs/select.c, core_sys_select).
fn read_fd_sets(
    arguments: &[u64; 6],
    read_memory: ReadMemory<'_>,
    table_size: u32,
) -> Option<HashSet<i32>> {
    let count = u64::try_from(fd(arguments[0])).ok()?.min(table_size.into());
    let bytes = Some(count.div_ceil(8)).filter(|bytes| *bytes <= MAX_LIST_BYTES)?;
    let bytes = usize::try_from(bytes).ok()?;
    let mut fds = HashSet::new();
    for &set in arguments[1..4].iter().filter(|set| **set != 0) {
        let bits = read_memory(set, bytes)?;
        let is_set = |bit: &u64| {
            let byte = usize::try_from(bit / 8)
                .ok()
                .and_then(|index| bits.get(index));
            byte.is_some_and(|byte| byte >> (bit % 8) & 1 == 1)
        };
        fds.extend(
            (0..count)
                .filter(is_set)
                .filter_map(|bit| i32::try_from(bit).ok()),
        );
    }
    Some(fds)
}

#[cfg(test)]
#[path = "syscalls_tests.rs"]
mod tests;
