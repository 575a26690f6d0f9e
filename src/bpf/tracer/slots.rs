//! The slots: a fixed amount of memory for registers and the top of stacks, which the programs fill and cwkill empties.
//!
//! The first number of a slot tells whose it is and how far it is: 0 if it is free. A program takes a free slot at one instant, fills it, and then
//! says that it is ready. cwkill copies it and frees it at one instant, if it is still the same. So what cwkill gets was whole and of one socket.

use std::sync::atomic::{AtomicU64, Ordering, fence};
use std::time::Duration;

use crate::sys::bpf::Shared;

/// Slots for reads of the end, a power of two.
pub(super) const READS: usize = 1 << 10;
/// Slots for connections that are opened, behind the others; a power of two.
pub(super) const OPENED: usize = 1 << 8;

/// The bytes of the stack that a sample has at most. A program that reads into a buffer on its stack has the return addresses behind that
/// buffer.
pub const STACK: usize = 16 << 10;
/// The program copies a stack in parts that end at multiples of this: the smallest page.
pub(super) const PART: usize = 1 << 12;

/// The size of a slot in numbers of 64 bits.
pub(super) const SLOT: usize = HEAD + STACK / 8;
/// What stands before the stack.
pub(super) const HEAD: usize = 10;
// The places in a slot.
pub(super) const OWNER: usize = 0;
pub(super) const AT: usize = 1;
pub(super) const BY: usize = 2;
pub(super) const IP: usize = 3;
pub(super) const SP: usize = 4;
pub(super) const FP: usize = 5;
/// The link register, on processors that have one.
pub(super) const LR: usize = 6;
pub(super) const LEN: usize = 7;
pub(super) const STARTED: usize = 8;
/// The number of the system call.
pub(super) const CALL: usize = 9;

// The first number of a slot: the cookie, and in its lowest bits what the slot is for and whether it is ready.
pub(super) const COOKIE_SHIFT: i32 = 4;
pub(super) const READY: i32 = 1;
pub(super) const FOR_READ: i32 = 2;
pub(super) const FOR_OPENED: i32 = 4;

/// The system calls that read, accept and connect.
const CALLS: &[u64] = {
    const fn number(call: libc::c_long) -> u64 {
        call.unsigned_abs()
    }
    &[
        number(libc::SYS_read),
        number(libc::SYS_readv),
        number(libc::SYS_preadv2),
        number(libc::SYS_recvfrom),
        number(libc::SYS_recvmsg),
        number(libc::SYS_recvmmsg),
        number(libc::SYS_splice),
        number(libc::SYS_accept),
        number(libc::SYS_accept4),
        number(libc::SYS_connect),
        // With TCP Fast Open.
        number(libc::SYS_sendto),
        number(libc::SYS_sendmsg),
    ]
};

/// A traced process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Traced {
    /// In the first pid namespace.
    pub pid: i32,
    /// Its start time in nanoseconds since boot. A later process with the same pid has another one.
    pub started: u64,
}

/// A thread that opens a connection or reads its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    pub cookie: u64,
    /// Whether it opens the connection. Otherwise it reads the end.
    pub opens: bool,
    pub process: Traced,
    pub thread: Thread,
}

/// Registers and stack of a thread in a system call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Thread {
    /// Whether the thread is in a system call that reads or opens sockets. With io_uring it may be in any other, whose stack has nothing to do
    /// with the socket.
    pub is_own_call: bool,
    pub ip: u64,
    pub sp: u64,
    pub fp: u64,
    /// 0 on processors without a link register.
    pub lr: u64,
    /// What stands in memory from `sp` on.
    pub stack: Vec<u8>,
}

#[derive(Debug)]
pub(super) struct Slots(Shared);

impl Slots {
    pub fn new(memory: Shared) -> Self {
        Slots(memory)
    }

    pub fn take(&self, age: Duration, mut each: impl FnMut(Sample)) {
        let now = crate::sys::monotonic();
        for slot in self.0.numbers().chunks_exact(SLOT) {
            let is_old = |at: Duration| now.saturating_sub(at) >= age;
            if let Some(sample) = take(slot, is_old) {
                each(sample);
            }
        }
    }
}

/// The sample in this slot, if there is one and it is old enough. The slot is free then.
fn take(slot: &[AtomicU64], is_old: impl Fn(Duration) -> bool) -> Option<Sample> {
    let owner = slot[OWNER].load(Ordering::Acquire);
    let has = |bit: i32| owner & u64::from(bit.unsigned_abs()) != 0;
    let number = |place: usize| slot[place].load(Ordering::Relaxed);
    let at = Duration::from_nanos(number(AT));
    if !has(READY) || !(has(FOR_OPENED) || is_old(at)) {
        return None;
    }
    let len = usize::try_from(number(LEN)).map_or(0, |len| len.min(STACK));
    // Hundreds of them are copied in a tick.
    let mut stack = Vec::with_capacity(len);
    for word in &slot[HEAD..HEAD + len / 8] {
        stack.extend_from_slice(&word.load(Ordering::Relaxed).to_ne_bytes());
    }
    // bpf_get_current_pid_tgid: the thread is in the lower half.
    let pid = i32::try_from(number(BY) >> 32).ok()?;
    let sample = Sample {
        cookie: owner >> COOKIE_SHIFT,
        opens: has(FOR_OPENED),
        process: Traced {
            pid,
            started: number(STARTED),
        },
        thread: Thread {
            is_own_call: CALLS.contains(&number(CALL)),
            ip: number(IP),
            sp: number(SP),
            fp: number(FP),
            lr: number(LR),
            stack,
        },
    };
    fence(Ordering::SeqCst);
    let freed = slot[OWNER].compare_exchange(owner, 0, Ordering::SeqCst, Ordering::Relaxed);
    // The socket has left CLOSE-WAIT meanwhile.
    freed.ok().map(|_| sample)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slot(owner: u64) -> Vec<AtomicU64> {
        let slot: Vec<AtomicU64> = (0..SLOT).map(|_| AtomicU64::new(0)).collect();
        for (place, number) in [
            (OWNER, owner),
            (AT, 2_000_000_000),
            (BY, 10 << 32 | 11),
            (IP, 0x1000),
            (SP, 0x7000),
            (LEN, 16),
            (HEAD, u64::from_ne_bytes(*b"abcdefgh")),
            (HEAD + 1, u64::from_ne_bytes(*b"ijklmnop")),
        ] {
            slot[place].store(number, Ordering::Relaxed);
        }
        slot
    }

    #[test]
    fn a_slot_that_is_ready_is_taken_once() {
        let slot = slot(77 << COOKIE_SHIFT | 3);
        assert_eq!(take(&slot, |_| false), None);
        let sample = take(&slot, |at| at == Duration::from_secs(2)).unwrap();
        assert_eq!((sample.cookie, sample.opens), (77, false));
        assert_eq!(sample.process.pid, 10);
        assert_eq!(sample.thread.stack, b"abcdefghijklmnop");
        assert_eq!(slot[OWNER].load(Ordering::Relaxed), 0);
        assert_eq!(take(&slot, |_| true), None);
    }

    #[test]
    fn a_slot_that_is_being_filled_is_left_alone() {
        let slot = slot(77 << COOKIE_SHIFT | 2);
        assert_eq!(take(&slot, |_| true), None);
        assert_ne!(slot[OWNER].load(Ordering::Relaxed), 0);
    }

    /// It need not wait: it is of use whatever becomes of the socket.
    #[test]
    fn a_connection_that_was_opened_is_taken_at_once() {
        let slot = slot(77 << COOKIE_SHIFT | 5);
        assert!(take(&slot, |_| false).is_some_and(|sample| sample.opens));
    }
}
