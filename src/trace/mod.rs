//! `cwkill trace`: the line of code that leaks.
//!
//! A program of the kernel notes who reads the end of a stream and who opened it (`crate::bpf::tracer`). A process of its own reads the symbols of
//! each traced process ([`worker`], asked by [`symbols`]). What is stuck at the end is found as always, and put together with both by
//! its cookie ([`places`]).

pub mod places;
pub mod stack;
pub mod symbols;
pub mod worker;

use std::io;
use std::time::{Duration, Instant};

use crate::bpf::BpfError;
use crate::bpf::tracer::{Counts, Life, Tracer};
use crate::control::Control;
use crate::sys::monotonic;
use symbols::Symbols;

/// How often the samples are taken.
const TICK: Duration = Duration::from_millis(100);
/// A socket that is closed within this time after its end was read is no leak, and its stack is not looked at.
const SETTLE: Duration = Duration::from_millis(300);
/// With more events in a tick than these, not each is sampled. For reads, the connections count that the peer has closed. A sample of an opened connection is looked at whatever becomes of it, one of
/// a read only if the socket stays open.
const OPENED_PER_TICK: u64 = 25;
const READS_PER_TICK: u64 = 200;
/// Of so many events at least one is sampled.
const MAX_OF: u32 = 1 << 12;

/// What a trace has seen.
#[derive(Debug)]
pub struct Trace {
    pub symbols: Symbols,
    /// The sockets in CLOSE-WAIT at its end that it knows something of.
    pub lives: Vec<Life>,
    pub counts: Counts,
    /// When it began. CLOCK_MONOTONIC.
    pub begun: Duration,
    pub lasted: Duration,
    /// Why accepted connections were not seen.
    pub no_accepts: Option<BpfError>,
}

/// The first pid namespace, by the number of its file (include/linux/proc_ns.h, PROC_PID_INIT_INO).
const FIRST_PID_NAMESPACE: u64 = 0xeffffffc;

/// Whether cwkill is in the first pid namespace. The programs tell processes by their pids there.
///
/// # Errors
/// /proc cannot be read.
pub fn is_in_first_pid_namespace() -> io::Result<bool> {
    use std::os::unix::fs::MetadataExt;
    let namespace = std::fs::metadata("/proc/self/ns/pid")?;
    Ok(namespace.ino() == FIRST_PID_NAMESPACE)
}

/// Watches until `until`, or until the operator stops it.
///
/// # Errors
/// What was seen cannot be read.
pub fn watch(
    tracer: Tracer,
    until: Option<Instant>,
    control: &dyn Control,
) -> Result<Trace, BpfError> {
    let begun = monotonic();
    let mut symbols = Symbols::default();
    let mut seen = Counts::default();
    let is_over = || control.interrupted() || until.is_some_and(|until| control.now() >= until);
    loop {
        let is_last = is_over();
        let age = if is_last { Duration::ZERO } else { SETTLE };
        tracer.take(age, |sample| symbols.read(sample));
        symbols.collect();
        let counts = tracer.counts();
        tracer.sample_one_of(
            one_of(counts.closed_by_peer - seen.closed_by_peer, READS_PER_TICK),
            one_of(counts.opened - seen.opened, OPENED_PER_TICK),
        );
        seen = counts;
        if is_last {
            break;
        }
        let left = until.map(|until| until.saturating_duration_since(control.now()));
        control.sleep(left.map_or(TICK, |left| left.min(TICK)));
    }
    let lives = tracer.lives()?;
    let counts = tracer.counts();
    let lasted = monotonic().saturating_sub(begun);
    let no_accepts = tracer.detach();
    symbols.finish();
    Ok(Trace {
        symbols,
        lives,
        counts,
        begun,
        lasted,
        no_accepts,
    })
}

/// Of how many events one is sampled, so that of `count` about `wanted` are, or all. A power of two.
fn one_of(count: u64, wanted: u64) -> u32 {
    let of = u32::try_from(count.div_ceil(wanted)).unwrap_or(MAX_OF);
    of.clamp(1, MAX_OF).next_power_of_two()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quiet_host_is_sampled_as_a_whole() {
        assert_eq!(one_of(0, 100), 1);
        assert_eq!(one_of(100, 100), 1);
        assert_eq!(one_of(101, 100), 2);
        assert_eq!(one_of(10_000, 100), 128);
        assert_eq!(one_of(u64::MAX, 100), MAX_OF);
    }
}
