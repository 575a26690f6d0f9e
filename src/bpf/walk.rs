//! Walks over the TCP sockets of a network namespace, each by a child process ([`Walker`]), since the kernel can let it wait for the lock of a
//! socket whose owner hangs.

use std::time::{Duration, Instant};

use crate::sys::bpf::{BpfError, Walker};

/// How a walk ended.
#[derive(Debug)]
pub enum End {
    /// It has shown all sockets.
    Whole,
    /// The caller has stopped it, or an earlier one.
    Stopped,
    /// It waited too long for the lock of a socket, or took longer than any walk.
    HeldUp,
    Failed(BpfError),
}

/// How long a walk may show no further socket. An owner has the lock of its socket for microseconds, or while one page of its memory is read from
/// a disk. A busy machine may not run the walker for a while.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long a walk may take in all. One of ten million sockets takes 5 s.
const LONGEST_WALK: Duration = Duration::from_secs(60);
/// How often cwkill looks whether the walk goes on, in milliseconds.
const INTERVAL: u16 = 10;

/// Waits for the end of a walk that `walker` has begun. Leaves it if `go_on` returns false, or if it is held up. `shown`: the number of
/// sockets that it has shown so far.
pub(super) fn wait(walker: &mut Walker, shown: impl Fn() -> u64, go_on: impl Fn() -> bool) -> End {
    let begun = Instant::now();
    let mut last = (shown(), begun);
    loop {
        match walker.result(INTERVAL) {
            Some(Ok(())) => return End::Whole,
            Some(Err(error)) => return End::Failed(BpfError::Read(error)),
            None => {}
        }
        if !go_on() {
            return End::Stopped;
        }
        let (shown, now) = (shown(), Instant::now());
        if shown != last.0 {
            last = (shown, now);
        }
        if now - last.1 > PATIENCE || now - begun > LONGEST_WALK {
            return End::HeldUp;
        }
    }
}
