//! `cwkill trace`: the line of code that leaks.
//!
//! A program of the kernel notes who reads the end of a stream and who opened it (`crate::bpf::tracer`). A process of its own reads the symbols of
//! each traced process ([`worker`], asked by [`symbols`]). At the end the ordinary scan finds the stuck sockets, and [`places`] joins them with
//! the records and stacks by their cookies.

pub mod origin;
pub mod places;
pub mod problem;
mod protocol;
pub mod stack;
pub mod symbols;
pub mod worker;

use std::collections::HashSet;
use std::time::{Duration, Instant};

use crate::bpf::tracer::{Counts, Life, Tracer};
use crate::bpf::{BpfError, NotSeen};
use crate::control::Control;
use crate::model::Scan;
use crate::sys::monotonic;
use symbols::Symbols;

/// How often the slots are emptied.
const TICK: Duration = Duration::from_millis(100);
/// A socket that is closed within this time after its end was read is no leak, and its stack is not unwound.
const SETTLE: Duration = Duration::from_millis(300);
/// With more events than these in a tick, only a part is sampled. A connection that the peer closes is sampled at its FIN, or not at all.
const CLOSED_PER_TICK: u64 = 500;
/// They are fewer, since each of these samples is unwound; one of a closed connection only if its socket stays open.
const OPENED_PER_TICK: u64 = 25;
/// Of so many events at least one is sampled.
const MAX_OF: u32 = 1 << 12;

/// A trace that runs.
#[derive(Debug)]
pub struct Watch {
    tracer: Tracer,
    symbols: Symbols,
    /// The cookies of the sockets that were stuck when it began.
    before: HashSet<u64>,
    begun: Duration,
    ended: Duration,
}

/// What a trace has seen.
#[derive(Debug)]
pub struct Trace {
    pub symbols: Symbols,
    /// The cookies of the sockets that were stuck when it began.
    pub before: HashSet<u64>,
    /// The sockets in CLOSE-WAIT at its end that it knows something of.
    pub lives: Vec<Life>,
    /// Whether that is not all: a process kept the lock of a socket too long.
    pub is_held_up: bool,
    pub counts: Counts,
    /// CLOCK_MONOTONIC. What became stuck later does not count.
    pub ended: Duration,
    pub lasted: Duration,
    pub not_seen: NotSeen,
}

impl Watch {
    /// `before`: the sockets that are stuck, listed after the programs were attached.
    pub fn new(tracer: Tracer, before: &Scan) -> Self {
        Watch {
            tracer,
            symbols: Symbols::default(),
            before: before
                .targets
                .iter()
                .map(|it| it.socket.cookie().0)
                .collect(),
            begun: monotonic(),
            ended: Duration::MAX,
        }
    }

    /// Goes on until `until`, or until the operator stops it, and a moment longer: what closes in this moment was not stuck.
    pub fn go_on(&mut self, until: Option<Instant>, control: &dyn Control) {
        let mut seen = Counts::default();
        let mut before = monotonic();
        while !control.interrupted() {
            let left = until.map(|until| until.saturating_duration_since(control.now()));
            if left.is_some_and(|left| left.is_zero()) {
                break;
            }
            control.sleep(left.map_or(TICK, |left| left.min(TICK)));
            self.take(SETTLE, false);
            let (counts, now) = (self.tracer.counts(), monotonic());
            let lasted = now.saturating_sub(before);
            self.tracer.sample_one_of(
                one_of(
                    counts.closed_by_peer - seen.closed_by_peer,
                    CLOSED_PER_TICK,
                    lasted,
                ),
                one_of(counts.opened - seen.opened, OPENED_PER_TICK, lasted),
            );
            (seen, before) = (counts, now);
        }
        self.ended = monotonic();
        control.sleep(SETTLE);
    }

    fn take(&mut self, age: Duration, is_last: bool) {
        let symbols = &mut self.symbols;
        self.tracer
            .take(age, |sample| symbols.read(sample, is_last));
        symbols.collect();
    }

    /// Detaches the programs, and waits for the last symbols. `after`: the sockets, listed when it was over. What is in this list and became
    /// stuck during the trace is known here then.
    ///
    /// # Errors
    /// What the programs have kept cannot be read, or a namespace cannot be entered any more.
    pub fn finish(mut self, after: &Scan) -> Result<Trace, BpfError> {
        self.take(Duration::ZERO, true);
        // Before the walk: it may take seconds.
        let not_seen = self.tracer.detach();
        let (tracer, mut lives, mut is_held_up) = (&mut self.tracer, Vec::new(), false);
        for netns in &after.namespaces {
            let is_whole = netns
                .within(|| tracer.lives(&mut lives))
                .map_err(BpfError::Read)?;
            is_held_up |= !is_whole?;
        }
        let counts = self.tracer.counts();
        let lasted = self.ended.saturating_sub(self.begun);
        self.symbols.finish();
        Ok(Trace {
            symbols: self.symbols,
            before: self.before,
            lives,
            is_held_up,
            counts,
            ended: self.ended,
            lasted,
            not_seen,
        })
    }
}

/// Of how many events one is sampled, so that of `count` in this time about `wanted` in a tick are, or all. A power of two.
fn one_of(count: u64, wanted: u64, lasted: Duration) -> u32 {
    let ticks = (lasted.as_millis() / TICK.as_millis()).max(1);
    let wanted = wanted.saturating_mul(u64::try_from(ticks).unwrap_or(u64::MAX));
    let of = u32::try_from(count.div_ceil(wanted)).unwrap_or(MAX_OF);
    of.clamp(1, MAX_OF).next_power_of_two()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quiet_host_is_sampled_as_a_whole() {
        let of = |count| one_of(count, 100, TICK);
        assert_eq!(of(0), 1);
        assert_eq!(of(100), 1);
        assert_eq!(of(101), 2);
        assert_eq!(of(10_000), 128);
        assert_eq!(of(u64::MAX), MAX_OF);
        // A tick that took longer.
        assert_eq!(one_of(1000, 100, 10 * TICK), 1);
    }
}
