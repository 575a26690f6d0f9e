//! Whether a descriptor may be taken from its process, decided from facts. Pure.

use std::collections::HashSet;
use std::fmt;
use std::time::Duration;

use super::arch::Call;

/// What speaks against taking a descriptor. `--reclaim-force` overrides it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Doubt {
    /// This thread is inside a system call on it: the number of the call.
    InCall {
        /// The thread.
        tid: i32,
        /// The call.
        number: i64,
    },
    /// This thread is inside a system call that may be on it: on what cannot be told.
    InSomeCall {
        /// The thread.
        tid: i32,
        /// The call.
        number: i64,
    },
    /// It is in the epoll set behind this descriptor of the owner.
    InEpoll(i32),
    /// It is registered with the io_uring behind this descriptor of the owner.
    InRing(i32),
    /// Requests are in flight in the io_uring behind this descriptor, and which descriptors they are on
    /// cannot be seen.
    RingInFlight(i32),
    /// The owner has an io_uring behind this descriptor, and which descriptors its requests are on cannot be
    /// seen.
    Ring(i32),
    /// This thread of the owner, of the kernel's making, works for an io_uring.
    RingWorker(String),
    /// This thread of the owner closes objects that nothing refers to any more, by their numbers.
    Finalizer(String),
    /// This thread of the owner is in the middle of a system call that a stop would end short: its number.
    Transfer {
        /// The thread.
        tid: i32,
        /// The call.
        number: i64,
    },
    /// It has so many bytes that its program has not read and still can.
    Unread(u32),
    /// It has not been stuck for long enough: how long it was.
    TooYoung(Duration),
    /// The kernel does not say for how long it has been stuck.
    NoAge,
}

impl fmt::Display for Doubt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Doubt::InCall { tid, number } => {
                write!(
                    f,
                    "thread {tid} is inside a system call on it (number {number})"
                )
            }
            Doubt::InSomeCall { tid, number } => write!(
                f,
                "thread {tid} is inside a system call that may be on it (number {number}): the list of its descriptors \
                 could not be read"
            ),
            Doubt::InEpoll(epoll) => write!(f, "in the epoll set of descriptor {epoll}"),
            Doubt::InRing(ring) => write!(f, "registered with the io_uring of descriptor {ring}"),
            Doubt::RingInFlight(ring) => write!(
                f,
                "the io_uring of descriptor {ring} has requests in flight, which may be on it"
            ),
            Doubt::Ring(ring) => write!(
                f,
                "the io_uring of descriptor {ring} may have requests on it, which cannot be seen"
            ),
            Doubt::RingWorker(name) => write!(
                f,
                "its thread {} works for an io_uring, which may have requests on it",
                crate::text::escape(name)
            ),
            Doubt::Finalizer(name) => write!(
                f,
                "its thread {} closes forgotten objects by their numbers, whatever has those by then; have it \
                 collect them first (Java: jcmd PID GC.run), then --reclaim-force",
                crate::text::escape(name)
            ),
            Doubt::Transfer { tid, number } => write!(
                f,
                "thread {tid} of its process waits to send or receive more (system call number {number}), and would be told of a \
                 part when it is stopped; try later, or --reclaim-force if its program goes on with the rest"
            ),
            Doubt::Unread(bytes) => write!(
                f,
                "its process can still read {}, which --reclaim-force loses",
                crate::text::counted(usize::try_from(*bytes).unwrap_or(usize::MAX), "byte")
            ),
            Doubt::TooYoung(age) => write!(
                f,
                "quiet for only {} (--reclaim-age)",
                humantime::format_duration(Duration::from_millis(
                    u64::try_from(age.as_millis()).unwrap_or(u64::MAX)
                ))
            ),
            Doubt::NoAge => f.write_str("the kernel does not say for how long it has been quiet"),
        }
    }
}

/// The descriptors that a thread's system call may be on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Uses {
    /// The thread.
    pub tid: i32,
    /// The number of its call.
    pub number: i64,
    /// The descriptors.
    pub fds: HashSet<i32>,
    /// It may be on any.
    pub any: bool,
}

/// An epoll set of the owner.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Epoll {
    /// Its descriptor.
    pub fd: i32,
    /// The inodes of the files in it. What was added by a number that is closed by now is in it all the same.
    pub inodes: HashSet<u64>,
    /// The numbers by which files were added, where the kernel does not say the inode (before 5.2).
    pub fds: HashSet<i32>,
}

/// An io_uring of the owner.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ring {
    /// Its descriptor.
    pub fd: i32,
    /// The inodes of the sockets that are registered with it.
    pub sockets: HashSet<u64>,
    /// Requests wait in it.
    pub in_flight: bool,
}

/// What is known of a process.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// What the calls are on that its threads are in.
    pub uses: Vec<Uses>,
    /// Its epoll sets.
    pub epolls: Vec<Epoll>,
    /// Its io_urings.
    pub rings: Vec<Ring>,
    /// A thread of it that works for an io_uring, which need not be behind a descriptor of it any more.
    pub ring_worker: Option<String>,
    /// A thread of it that runs finalizers.
    pub finalizer: Option<String>,
    /// A thread of it that waits in the middle of a transfer, and the number of its call.
    pub transfer: Option<(i32, i64)>,
}

/// Whether a thread of this name belongs to a runtime whose collector closes descriptors: HotSpot, OpenJ9, Mono,
/// .NET. The kernel keeps 15 bytes. Go has no such thread, but an epoll set.
pub fn runs_finalizers(name: &str) -> bool {
    const NAMES: [&str; 3] = ["VM Thread", "Common-Cleaner", "Reference Handl"];
    NAMES.contains(&name) || name.contains("Finalizer") || name.starts_with(".NET ")
}

/// Whether a thread of this name is one that the kernel makes for io_uring: `iou-wrk-TID`, `iou-sqp-TID`.
/// Source: io_uring/io-wq.c, io_wq_worker; io_uring/sqpoll.c, io_sq_thread.
pub fn works_for_a_ring(name: &str) -> bool {
    name.starts_with("iou-")
}

/// Reads memory of the owner: address and length.
pub type Memory<'a> = &'a dyn Fn(u64, usize) -> Option<Vec<u8>>;

/// What speaks against taking descriptor `fd`, a socket with `inode` that has been quiet for `age`.
pub fn doubt(
    facts: &Facts,
    fd: i32,
    inode: u32,
    age: Option<Duration>,
    wanted_age: Duration,
) -> Option<Doubt> {
    let inode = u64::from(inode);
    for uses in &facts.uses {
        let Uses { tid, number, .. } = *uses;
        if uses.any {
            return Some(Doubt::InSomeCall { tid, number });
        }
        if uses.fds.contains(&fd) {
            return Some(Doubt::InCall { tid, number });
        }
    }
    for epoll in &facts.epolls {
        if epoll.inodes.contains(&inode) || epoll.fds.contains(&fd) {
            return Some(Doubt::InEpoll(epoll.fd));
        }
    }
    for ring in &facts.rings {
        if ring.sockets.contains(&inode) {
            return Some(Doubt::InRing(ring.fd));
        }
    }
    if let Some(ring) = facts.rings.iter().find(|ring| ring.in_flight) {
        return Some(Doubt::RingInFlight(ring.fd));
    }
    // Of what is in flight only polls are listed: no timeouts, no links, nothing that a worker has.
    if let Some(ring) = facts.rings.first() {
        return Some(Doubt::Ring(ring.fd));
    }
    if let Some(name) = &facts.ring_worker {
        return Some(Doubt::RingWorker(name.clone()));
    }
    if let Some(name) = &facts.finalizer {
        return Some(Doubt::Finalizer(name.clone()));
    }
    if let Some((tid, number)) = facts.transfer {
        return Some(Doubt::Transfer { tid, number });
    }
    match age {
        _ if wanted_age.is_zero() => None,
        None => Some(Doubt::NoAge),
        Some(age) if age < wanted_age => Some(Doubt::TooYoung(age)),
        Some(_) => None,
    }
}

/// Whether a thread that sleeps in this call may have done a part of it, and be told of that part as if it were all when it is
/// stopped: the kernel makes a call again only if it has done nothing. Few programs expect it of a blocking descriptor.
/// Source: signal(7), send(2), recv(2); net/core/stream.c, sk_stream_wait_memory; fs/pipe.c, pipe_write.
pub fn can_end_short(call: &Call) -> bool {
    /// include/linux/socket.h: recvmmsg(2) waits for no more than the first.
    const MSG_WAITFORONE: u64 = 0x10000;
    let Call { number, arguments } = call;
    let waits_for_all = |flags: u64| flags & u64::from(libc::MSG_WAITALL.cast_unsigned()) != 0;
    // One byte is all or nothing.
    match *number {
        libc::SYS_write | libc::SYS_pwrite64 | libc::SYS_sendto | libc::SYS_tee => arguments[2] > 1,
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
            waits_for_all(arguments[3]) || arguments[2] > 1 && arguments[3] & MSG_WAITFORONE == 0
        }
        _ => false,
    }
}

/// Which arguments of a system call are descriptors.
enum Descriptors {
    /// Those at these places.
    At(&'static [usize]),
    /// An array of `struct pollfd`: its address and its length are the first two.
    Poll,
    /// Three sets of bits behind the second to fourth, as long as the first says.
    Select,
    /// A call that goes on where it was interrupted; of `poll` or of one without descriptors.
    Continued,
}

/// Source: the manual pages, section 2. A call that is not here may have one in any of the first three.
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
        libc::SYS_restart_syscall => Descriptors::Continued,
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

/// arch/x86/include/uapi/asm/unistd.h, __X32_SYSCALL_BIT: with it a number means the call of another kind of program.
#[cfg(target_arch = "x86_64")]
const OTHER_KIND: i64 = 0x4000_0000;
#[cfg(not(target_arch = "x86_64"))]
const OTHER_KIND: i64 = 0;

/// The longest list in the owner that is read; a call with a longer one may be on any descriptor.
const LONGEST_LIST: u64 = 1 << 20;

/// What the call of thread `tid` may be on. Where it cannot be told, on any. The table of the owner has room for
/// descriptors below `room`.
pub fn uses(tid: i32, call: &Call, memory: Memory<'_>, room: u32) -> Uses {
    let arguments = &call.arguments;
    let fds = match descriptors(call.number) {
        _ if call.number & OTHER_KIND != 0 => None,
        Descriptors::At(places) => Some(places.iter().map(|&at| fd(arguments[at])).collect()),
        Descriptors::Poll => polled(arguments[0], arguments[1], memory)
            .map(|list| list.into_iter().map(|entry| entry.fd).collect()),
        // Of a wait for a lock with a limit the arguments are an address and an operation, which as a length is that of a list of
        // 137 or 393; and what cannot be read was no list.
        Descriptors::Continued => {
            let list = polled(arguments[0], arguments[1], memory).unwrap_or_default();
            let is_list = list.iter().all(|entry| entry.could_be_polled(room));
            Some(match is_list {
                true => list.into_iter().map(|entry| entry.fd).collect(),
                false => HashSet::new(),
            })
        }
        Descriptors::Select => selected(arguments, memory, room),
    };
    Uses {
        tid,
        number: call.number,
        any: fds.is_none(),
        fds: fds.unwrap_or_default(),
    }
}

/// An argument that is a descriptor: a call takes the lower half.
fn fd(argument: u64) -> i32 {
    let [a, b, c, d, ..] = argument.to_le_bytes();
    i32::from_le_bytes([a, b, c, d])
}

/// `struct pollfd` (poll(2)), without what the kernel answers.
struct PollFd {
    fd: i32,
    events: u16,
}

impl PollFd {
    /// Whether poll(2) can be waiting with such an entry in its list. A number that is not open ends it at once, a negative one is
    /// skipped; programs write -1, or the complement of the number. Source: fs/select.c, do_pollfd.
    fn could_be_polled(&self, room: u32) -> bool {
        /// include/uapi/asm-generic/poll.h has a meaning for all bits but this.
        const NO_EVENT: u16 = 0x0800;
        let number = if self.fd < 0 { !self.fd } else { self.fd };
        u32::try_from(number).is_ok_and(|number| number < room) && self.events & NO_EVENT == 0
    }
}

/// An array of `struct pollfd`.
fn polled(address: u64, count: u64, memory: Memory<'_>) -> Option<Vec<PollFd>> {
    if address == 0 || count == 0 {
        return Some(Vec::new());
    }
    let bytes = count
        .checked_mul(8)
        .filter(|bytes| *bytes <= LONGEST_LIST)?;
    let list = memory(address, usize::try_from(bytes).ok()?)?;
    let entry = |entry: &[u8]| PollFd {
        fd: i32::from_ne_bytes([entry[0], entry[1], entry[2], entry[3]]),
        events: u16::from_ne_bytes([entry[4], entry[5]]),
    };
    Some(list.chunks_exact(8).map(entry).collect())
}

/// The descriptors in the three sets of select(2), as long as the first argument says, and no longer than the table
/// (fs/select.c, core_sys_select): programs write the highest number there is.
fn selected(arguments: &[u64; 6], memory: Memory<'_>, room: u32) -> Option<HashSet<i32>> {
    let count = u64::try_from(fd(arguments[0])).ok()?.min(room.into());
    let bytes = Some(count.div_ceil(8)).filter(|bytes| *bytes <= LONGEST_LIST)?;
    let bytes = usize::try_from(bytes).ok()?;
    let mut fds = HashSet::new();
    for &set in arguments[1..4].iter().filter(|set| **set != 0) {
        let bits = memory(set, bytes)?;
        let is_set = |bit: &u64| {
            let byte = usize::try_from(bit / 8).ok().and_then(|at| bits.get(at));
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

/// How much harm it does if a call that a thread waits in seems to give 0: 0 none, since it may do so at any
/// time (a wake-up, a time that has passed); 1 little, since nothing has happened; 2 it may be taken for a
/// result.
pub fn harm_of_zero(call: &Call) -> u8 {
    /// include/uapi/linux/futex.h: without the flags.
    const FUTEX_COMMAND: u64 = 0x7f;
    const FUTEX_WAIT: u64 = 0;
    const FUTEX_WAIT_BITSET: u64 = 9;
    /// No process has more (fs.nr_open, kernel/sysctl.c, sysctl_nr_open_max), and no address is lower.
    const MOST_DESCRIPTORS: u64 = 1 << 31;
    match call.number {
        libc::SYS_futex => match call.arguments[1] & FUTEX_COMMAND {
            FUTEX_WAIT | FUTEX_WAIT_BITSET => 0,
            _ => 2,
        },
        libc::SYS_nanosleep | libc::SYS_clock_nanosleep => 0,
        // Of a sleep, a wait for a lock with a limit, or poll(2), by the arguments of the call that it goes on with: the second
        // of a sleep is an address or nothing, that of poll the number of its descriptors.
        libc::SYS_restart_syscall => match call.arguments[1] {
            0 | MOST_DESCRIPTORS.. => 0,
            _ => 1,
        },
        libc::SYS_epoll_pwait | libc::SYS_epoll_pwait2 | libc::SYS_ppoll | libc::SYS_pselect6 => 1,
        #[cfg(target_arch = "x86_64")]
        libc::SYS_epoll_wait | libc::SYS_poll | libc::SYS_select => 1,
        _ => 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(number: i64, arguments: &[u64]) -> Call {
        let mut all = [u64::MAX; 6];
        all[..arguments.len()].copy_from_slice(arguments);
        Call {
            number,
            arguments: all,
        }
    }

    /// In the table of the owner.
    const ROOM: u32 = 64;

    fn on(uses: &Uses, fd: i32) -> bool {
        uses.any || uses.fds.contains(&fd)
    }

    fn nothing(_: u64, _: usize) -> Option<Vec<u8>> {
        None
    }

    #[test]
    fn a_call_on_the_descriptor_is_seen() {
        let on =
            |number, arguments: &[u64]| on(&uses(1, &call(number, arguments), &nothing, ROOM), 7);
        assert!(on(libc::SYS_recvfrom, &[7]));
        assert!(!on(libc::SYS_recvfrom, &[8, 7]));
        // The kernel takes the lower half.
        assert!(on(libc::SYS_read, &[0xffff_0000_0000_0007]));
        assert!(on(libc::SYS_sendfile, &[3, 7]));
        assert!(on(libc::SYS_splice, &[3, 0, 7]));
        assert!(on(libc::SYS_epoll_ctl, &[3, 1, 7]));
        // The number of events is no descriptor.
        assert!(!on(libc::SYS_epoll_pwait, &[3, 0x1000, 7]));
        assert!(on(libc::SYS_epoll_pwait, &[7, 0x1000, 7]));
        assert!(!on(libc::SYS_futex, &[7, 7, 7]));
        // A call that nobody has heard of.
        for at in 0..3 {
            let mut arguments = [0; 3];
            arguments[at] = 7;
            assert!(on(9999, &arguments));
        }
        assert!(!on(9999, &[0, 0, 0, 7]));
        #[cfg(target_arch = "x86_64")]
        assert!(on(OTHER_KIND | libc::SYS_poll, &[0x1000, 1]));
    }

    #[test]
    fn lists_of_descriptors_are_read_from_memory() {
        let pollfds: Vec<u8> = [5i32, 7]
            .iter()
            .flat_map(|fd| [fd.to_ne_bytes(), [1, 0, 0, 0]].concat())
            .collect();
        let memory = |address: u64, len: usize| {
            let from = usize::try_from(address.checked_sub(0x1000)?).ok()?;
            pollfds.get(from..from + len).map(<[u8]>::to_vec)
        };
        let on = |number, fd, arguments: &[u64]| {
            on(&uses(1, &call(number, arguments), &memory, ROOM), fd)
        };
        for number in [libc::SYS_ppoll, libc::SYS_restart_syscall] {
            assert!(on(number, 7, &[0x1000, 2]), "{number}");
            assert!(!on(number, 7, &[0x1000, 1]), "{number}");
            assert!(!on(number, 9, &[0x1000, 2]), "{number}");
        }
        // What cannot be read may have it; of a call that may not even be a poll, that would be all of them.
        assert!(on(libc::SYS_ppoll, 9, &[0x1000, 3]));
        assert!(on(libc::SYS_ppoll, 9, &[0x1000, u64::MAX]));
        assert!(!on(libc::SYS_ppoll, 9, &[0, 0]));
        assert!(!on(
            libc::SYS_restart_syscall,
            9,
            &[0x1000, 0x7fff_1234_5678]
        ));

        let sets = |address: u64, len: usize| match (address, len) {
            (0x2000, 1) => Some(vec![0b1000_0000]),
            (0x2000, 2) => Some(vec![0b1000_0000, 0]),
            _ => None,
        };
        let on_with = |room, fd, arguments: &[u64]| {
            super::tests::on(
                &uses(1, &call(libc::SYS_pselect6, arguments), &sets, room),
                fd,
            )
        };
        let on = |fd, arguments: &[u64]| on_with(u32::MAX, fd, arguments);
        assert!(on(7, &[8, 0x2000, 0, 0]));
        assert!(on(7, &[8, 0, 0, 0x2000]));
        assert!(!on(7, &[7, 0x2000, 0, 0]));
        assert!(!on(6, &[8, 0x2000, 0, 0]));
        assert!(!on(8, &[9, 0x2000, 0, 0]));
        assert!(on(8, &[9, 0x3000, 0, 0]), "cannot be read");
        assert!(!on(7, &[0, 0, 0, 0]));
        assert!(on(9, &[0x7fff_ffff, 0, 0, 0]), "too long to be read");
        // With a table of 8 or 16 only as much is looked at.
        assert!(on_with(8, 7, &[0x7fff_ffff, 0x2000, 0, 0]));
        assert!(!on_with(16, 9, &[0x7fff_ffff, 0x2000, 0, 0]));
    }

    #[test]
    fn a_wait_for_a_lock_is_no_list() {
        const FUTEX_WAIT_BITSET_PRIVATE: u64 = 137;
        let on = |entries: &[(i32, u16)], count| {
            let list: Vec<u8> = entries
                .iter()
                .flat_map(|(fd, events)| {
                    [&fd.to_ne_bytes()[..], &events.to_ne_bytes(), &[0; 2]].concat()
                })
                .collect();
            let memory = |_, len: usize| list.get(..len).map(<[u8]>::to_vec);
            let call = call(libc::SYS_restart_syscall, &[0x1000, count]);
            super::tests::on(&uses(1, &call, &memory, ROOM), 7)
        };
        assert!(on(&[(7, 0)], 1));
        // What programs write for no descriptor.
        assert!(on(&[(-1, 0), (!7, 1), (7, 0x2001)], 3));
        // Memory behind a futex that has a 7 in the right place.
        let mut memory = vec![(0, 0); 200];
        memory[3].0 = 7;
        assert!(on(&memory, FUTEX_WAIT_BITSET_PRIVATE), "cannot be told");
        memory[100] = (0x7f12, 0x3456);
        assert!(!on(&memory, FUTEX_WAIT_BITSET_PRIVATE), "an address");
        memory[100] = (i32::MIN, 0);
        assert!(!on(&memory, FUTEX_WAIT_BITSET_PRIVATE), "no number");
        memory[100] = (1, 0x0800);
        assert!(!on(&memory, FUTEX_WAIT_BITSET_PRIVATE), "no event");
    }

    #[test]
    fn each_doubt_is_enough() {
        let hour = Duration::from_secs(3600);
        let minute = Duration::from_secs(60);
        let judge = |facts: &Facts, age| doubt(facts, 7, 42, age, minute);
        let none = Facts::default();
        assert_eq!(judge(&none, Some(hour)), None);
        assert_eq!(judge(&none, Some(minute)), None);
        let second = Duration::from_secs(1);
        assert_eq!(judge(&none, Some(second)), Some(Doubt::TooYoung(second)));
        assert_eq!(judge(&none, None), Some(Doubt::NoAge));
        assert_eq!(doubt(&none, 7, 42, None, Duration::ZERO), None);

        let in_call = Facts {
            uses: vec![uses(3, &call(libc::SYS_recvfrom, &[7]), &nothing, ROOM)],
            ..Facts::default()
        };
        let unread = Facts {
            uses: vec![uses(
                3,
                &call(libc::SYS_ppoll, &[0x1000, 2]),
                &nothing,
                ROOM,
            )],
            ..Facts::default()
        };
        let number = libc::SYS_ppoll;
        assert_eq!(
            judge(&unread, Some(hour)),
            Some(Doubt::InSomeCall { tid: 3, number })
        );
        let number = libc::SYS_recvfrom;
        assert_eq!(
            judge(&in_call, Some(hour)),
            Some(Doubt::InCall { tid: 3, number })
        );

        let epoll = |inodes: &[u64], fds: &[i32]| Facts {
            epolls: vec![Epoll {
                fd: 4,
                inodes: inodes.iter().copied().collect(),
                fds: fds.iter().copied().collect(),
            }],
            ..Facts::default()
        };
        let doubt = Some(Doubt::InEpoll(4));
        assert_eq!(judge(&epoll(&[42], &[]), Some(hour)), doubt);
        assert_eq!(judge(&epoll(&[], &[7]), Some(hour)), doubt);
        assert_eq!(judge(&epoll(&[41], &[9]), Some(hour)), None, "other files");

        let ring = |sockets: Vec<u64>, in_flight| Facts {
            rings: vec![Ring {
                fd: 5,
                sockets: sockets.into_iter().collect(),
                in_flight,
            }],
            ..Facts::default()
        };
        assert_eq!(
            judge(&ring(vec![42], false), Some(hour)),
            Some(Doubt::InRing(5))
        );
        assert_eq!(
            judge(&ring(vec![], true), Some(hour)),
            Some(Doubt::RingInFlight(5))
        );
        assert_eq!(
            judge(&ring(vec![41], false), Some(hour)),
            Some(Doubt::Ring(5))
        );
        let worker = Facts {
            ring_worker: Some("iou-wrk-9".into()),
            ..Facts::default()
        };
        let doubt_of_worker = Doubt::RingWorker("iou-wrk-9".into());
        assert_eq!(judge(&worker, Some(hour)), Some(doubt_of_worker));

        let sends = Facts {
            transfer: Some((3, libc::SYS_sendto)),
            ..Facts::default()
        };
        let number = libc::SYS_sendto;
        assert_eq!(
            judge(&sends, Some(hour)),
            Some(Doubt::Transfer { tid: 3, number })
        );

        let java = Facts {
            finalizer: Some("Common-Cleaner".into()),
            ..Facts::default()
        };
        let doubt = Doubt::Finalizer("Common-Cleaner".into());
        assert_eq!(judge(&java, Some(hour)), Some(doubt));
    }

    #[test]
    fn what_a_stop_would_end_short() {
        let all = u64::from(libc::MSG_WAITALL.cast_unsigned());
        let short = |number, arguments: &[u64]| can_end_short(&call(number, arguments));
        assert!(short(libc::SYS_write, &[3, 0x1000, 200_000]));
        assert!(!short(libc::SYS_write, &[3, 0x1000, 1]));
        assert!(short(libc::SYS_sendto, &[3, 0x1000, 2, 0]));
        assert!(short(libc::SYS_sendmsg, &[3, 0x1000, 0]));
        assert!(short(libc::SYS_sendfile, &[3, 4, 0, 4096]));
        assert!(short(libc::SYS_splice, &[3, 0, 4, 0, 4096]));
        assert!(!short(libc::SYS_splice, &[3, 0, 4, 0, 1]));
        assert!(short(libc::SYS_recvfrom, &[3, 0x1000, 1000, all]));
        assert!(!short(libc::SYS_recvfrom, &[3, 0x1000, 1000, 0]));
        assert!(short(libc::SYS_recvmsg, &[3, 0x1000, all]));
        assert!(short(libc::SYS_recvmmsg, &[3, 0x1000, 8, 0]));
        assert!(!short(libc::SYS_recvmmsg, &[3, 0x1000, 8, 0x10000]));
        assert!(!short(libc::SYS_read, &[3, 0x1000, 1000]));
        assert!(!short(libc::SYS_epoll_pwait, &[3]));
    }

    #[test]
    fn runtimes_with_finalizers_are_known_by_their_threads() {
        for name in [
            "VM Thread",
            "Common-Cleaner",
            "Finalizer",
            "Finalizer threa",
            ".NET Finalizer",
        ] {
            assert!(runs_finalizers(name), "{name}");
        }
        assert!(works_for_a_ring("iou-wrk-4711") && works_for_a_ring("iou-sqp-4711"));
        assert!(!works_for_a_ring("worker"));
        for name in ["java", "nginx", "python3", "node", "MainThread", ""] {
            assert!(!runs_finalizers(name), "{name}");
        }
    }

    #[test]
    fn a_thread_that_expects_wake_ups_serves_best() {
        assert_eq!(harm_of_zero(&call(libc::SYS_futex, &[0x1000, 0x80])), 0);
        assert_eq!(harm_of_zero(&call(libc::SYS_futex, &[0x1000, 0x189])), 0);
        // FUTEX_LOCK_PI: 0 means that it has the lock.
        assert_eq!(harm_of_zero(&call(libc::SYS_futex, &[0x1000, 0x86])), 2);
        assert_eq!(harm_of_zero(&call(libc::SYS_epoll_pwait, &[3])), 1);
        let restarted = |second| {
            harm_of_zero(&call(
                libc::SYS_restart_syscall,
                &[0x7f12_3456_7000, second],
            ))
        };
        assert_eq!(restarted(0x7f12_3456_7010), 0, "nanosleep with a rest");
        assert_eq!(restarted(0), 0, "nanosleep without");
        assert_eq!(restarted(2), 1, "poll of two");
        assert_eq!(harm_of_zero(&call(libc::SYS_accept4, &[3])), 2);
    }
}
