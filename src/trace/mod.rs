//! `cwkill trace`: the line of code that leaks.
//!
//! A program of the kernel notes who reads the end of a stream and who opened it (`crate::bpf::tracer`). A process of its own reads the symbols of
//! each traced process ([`worker`], started by [`readers`]; [`symbols`] has the answers). At the end the ordinary scan finds the stuck sockets, and [`places`] joins them with
//! the records and stacks by their cookies.

pub mod origin;
pub mod places;
pub mod problem;
mod protocol;
pub mod readers;
pub mod stack;
pub mod symbols;
pub mod worker;

use std::collections::HashSet;
use std::time::{Duration, Instant};

use crate::bpf::NotSeen;
use crate::bpf::tracer::{Counts, Life, Tracer};
use crate::control::Control;
use crate::model::Scan;
use crate::sys::monotonic;
use symbols::Symbols;

/// How often the slots are emptied.
const TICK: Duration = Duration::from_millis(100);
/// A socket that is closed within this time after its end was read is no leak, and its stack is not unwound.
const SETTLE: Duration = Duration::from_millis(300);
/// FINs in a tick that are all sampled; of more, one in N. Only a connection whose FIN is sampled can have a sample of its read.
const CLOSED_PER_TICK: u64 = 500;
/// Opened connections in a tick that are all sampled. Fewer, since each of these samples is unwound, and one of a read only if the socket stays
/// open.
const OPENED_PER_TICK: u64 = 25;
/// The largest N.
const MAX_N: u32 = 1 << 12;
/// How long the walks over the sockets of all namespaces may take.
const WALKS: Duration = Duration::from_secs(20);
/// While very much is kept, the sockets are listed so often to forget what belongs to others.
const TIDY: Duration = Duration::from_secs(60);

/// A trace that runs.
#[derive(Debug)]
pub struct Watch {
    tracer: Tracer,
    symbols: Symbols,
    before: HashSet<u64>,
    at_end: Option<HashSet<u64>>,
    is_sampled: bool,
    begun: Duration,
    ended: Duration,
    not_seen: NotSeen,
}

/// What a trace has seen.
#[derive(Debug)]
pub struct Trace {
    pub symbols: Symbols,
    /// The cookies of the sockets that were stuck when it began.
    pub before: HashSet<u64>,
    /// The cookies of the sockets that were stuck when it ended, if not each FIN was sampled.
    pub at_end: Option<HashSet<u64>>,
    /// Whether not each FIN was sampled.
    pub is_sampled: bool,
    /// The sockets in CLOSE-WAIT at its end that it knows something of.
    pub lives: Vec<Life>,
    /// Why `lives` is not complete.
    pub incomplete: Option<String>,
    pub counts: Counts,
    /// CLOCK_MONOTONIC. What became stuck later does not count.
    pub ended: Duration,
    pub lasted: Duration,
    pub not_seen: NotSeen,
}

impl Watch {
    /// `before`: the cookies of the sockets that are stuck, listed after the programs were attached.
    pub fn new(tracer: Tracer, before: HashSet<u64>) -> Self {
        Watch {
            tracer,
            symbols: Symbols::default(),
            before,
            at_end: None,
            is_sampled: false,
            begun: monotonic(),
            ended: Duration::MAX,
            not_seen: NotSeen::default(),
        }
    }

    /// Goes on until `until`, or until the operator stops it, and a moment longer: what closes in this moment was not stuck. Then it detaches the
    /// programs. `list`: the cookies of the sockets that are stuck now.
    pub fn go_on(
        &mut self,
        until: Option<Instant>,
        control: &dyn Control,
        list: impl Fn() -> Option<HashSet<u64>>,
    ) {
        let mut seen = Counts::default();
        let mut last_tick = monotonic();
        let mut tidied = control.now();
        while !control.interrupted() {
            let left = until.map(|until| until.saturating_duration_since(control.now()));
            if left.is_some_and(|left| left.is_zero()) {
                break;
            }
            control.sleep(left.map_or(TICK, |left| left.min(TICK)));
            self.take(SETTLE);
            let (counts, now) = (self.tracer.counts(), monotonic());
            let lasted = now.saturating_sub(last_tick);
            let closed = counts.closed_by_peer - seen.closed_by_peer;
            let closed = one_of(closed, CLOSED_PER_TICK, lasted);
            let opened = one_of(counts.opened - seen.opened, OPENED_PER_TICK, lasted);
            self.tracer.sample_one_of(closed, opened);
            self.is_sampled |= closed > 1;
            (seen, last_tick) = (counts, now);
            if self.symbols.is_nearly_full() && control.now() - tidied > TIDY {
                tidied = control.now();
                if let Some(cookies) = list() {
                    self.symbols.forget_all_but(&cookies);
                }
            }
        }
        self.ended = monotonic();
        self.at_end = self.is_sampled.then(list).flatten();
        control.sleep(SETTLE);
        self.take(Duration::ZERO);
        self.not_seen = self.tracer.detach();
    }

    /// Takes the samples that are so old out of the kernel.
    fn take(&mut self, age: Duration) {
        let symbols = &mut self.symbols;
        // First: who has answered is not late.
        symbols.collect();
        symbols.ask_again();
        self.tracer.take(age, |sample| symbols.ask(sample));
    }

    /// Reads what is known of the sockets, and waits for the last symbols. `after`: the sockets, listed when it was over. What is in this list and
    /// became stuck during the trace is known here then.
    pub fn finish(mut self, after: &Scan) -> Trace {
        self.symbols.ask_last();
        let until = Instant::now() + WALKS;
        let (tracer, mut lives, mut incomplete) = (&mut self.tracer, Vec::new(), None);
        for netns in &after.namespaces {
            let why = match netns.within(|| tracer.lives(&mut lives, until)) {
                Ok(Ok(true)) => continue,
                Ok(Ok(false)) => "a process keeps the lock of a socket".to_owned(),
                Ok(Err(error)) => format!("{:#}", anyhow::Error::new(error)),
                Err(error) => error.to_string(),
            };
            incomplete.get_or_insert(why);
        }
        let counts = self.tracer.counts();
        let lasted = self.ended.saturating_sub(self.begun);
        self.symbols.finish();
        Trace {
            symbols: self.symbols,
            before: self.before,
            at_end: self.at_end,
            is_sampled: self.is_sampled,
            lives,
            incomplete,
            counts,
            ended: self.ended,
            lasted,
            not_seen: self.not_seen,
        }
    }
}

/// Of how many events one is sampled, so that of `count` in this time about `wanted` in a tick are, or all. A power of two.
fn one_of(count: u64, wanted: u64, lasted: Duration) -> u32 {
    let ticks = (lasted.as_millis() / TICK.as_millis()).max(1);
    let wanted = wanted.saturating_mul(u64::try_from(ticks).unwrap_or(u64::MAX));
    let of = u32::try_from(count.div_ceil(wanted)).unwrap_or(MAX_N);
    of.clamp(1, MAX_N).next_power_of_two()
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
        assert_eq!(of(u64::MAX), MAX_N);
        // A tick that took longer.
        assert_eq!(one_of(1000, 100, 10 * TICK), 1);
    }
}
