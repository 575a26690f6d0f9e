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
/// The samples of connections that are opened for a tick. Their stacks are looked at for connections that are not stuck, too.
const OPENED_PER_TICK: std::ops::Range<usize> = 20..100;
/// Of so many connections at least one is sampled.
const MAX_OPENED_OF: u32 = 1 << 16;

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
    let mut opened_of = 1_u32;
    let is_over = || control.interrupted() || until.is_some_and(|until| control.now() >= until);
    loop {
        let is_last = is_over();
        let mut opened = 0;
        let age = if is_last { Duration::ZERO } else { SETTLE };
        tracer.take(age, |sample| {
            opened += usize::from(sample.opens);
            symbols.read(sample);
        });
        symbols.collect();
        if opened > OPENED_PER_TICK.end && opened_of < MAX_OPENED_OF {
            opened_of *= 2;
            tracer.sample_opened(opened_of);
        } else if opened < OPENED_PER_TICK.start && opened_of > 1 {
            opened_of /= 2;
            tracer.sample_opened(opened_of);
        }
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
