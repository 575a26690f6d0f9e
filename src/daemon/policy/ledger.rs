//! How many acts there were in the last hour.

use std::collections::VecDeque;
use std::time::Duration;

use serde::{Deserialize, Serialize};

const HOUR: Duration = Duration::from_secs(60 * 60);

/// The acts of the last hour. An act counts for a full hour after it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Ledger(VecDeque<Entry>);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    /// Milliseconds since boot, rounded up: an act must not count for less than an hour.
    at_ms: u64,
    count: u32,
    /// Whether the acts are over. Until then their hour has not begun.
    over: bool,
}

/// Milliseconds since boot, rounded up.
pub(super) fn ms_up(time: Duration) -> u64 {
    u64::try_from(time.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX)
}

impl Ledger {
    /// The number of acts within the hour before `now`.
    pub fn used(&self, now: Duration) -> u32 {
        let counts = self.0.iter().filter(|entry| entry.counts_at(now));
        counts.fold(0, |sum, entry| sum.saturating_add(entry.count))
    }

    /// Adds acts that are about to happen, and forgets those that no longer count.
    pub fn reserve(&mut self, now: Duration, count: u32) {
        self.0.retain(|entry| entry.counts_at(now));
        self.0.push_back(Entry {
            at_ms: ms_up(now),
            count,
            over: false,
        });
    }

    /// The acts that were reserved last are over by `now`; `refund` of them did not happen.
    pub fn settle(&mut self, now: Duration, refund: u32) {
        let Some(last) = self.0.pop_back_if(|last| !last.over) else {
            return;
        };
        let count = last.count.saturating_sub(refund);
        if count > 0 {
            self.0.push_back(Entry {
                at_ms: last.at_ms.max(ms_up(now)),
                count,
                over: true,
            });
        }
    }

    /// Acts whose daemon was killed before they were over may have happened until `now`.
    pub fn settle_all(&mut self, now: Duration) {
        for entry in &mut self.0 {
            if !std::mem::replace(&mut entry.over, true) {
                entry.at_ms = ms_up(now);
            }
        }
    }

    /// Acts after `now` were before it: the clock has started again. They count for an hour from now.
    pub fn clamp(&mut self, now: Duration) {
        let now = ms_up(now);
        for entry in &mut self.0 {
            entry.at_ms = entry.at_ms.min(now);
        }
    }

    /// After another boot, nobody knows how long ago an act was. It counts for an hour from now.
    pub fn rebase(&mut self, now: Duration) {
        for entry in &mut self.0 {
            (entry.at_ms, entry.over) = (ms_up(now), true);
        }
    }
}

impl Entry {
    fn counts_at(&self, now: Duration) -> bool {
        !self.over || now < Duration::from_millis(self.at_ms).saturating_add(HOUR)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn acted(ledger: &mut Ledger, seconds: u64, count: u32) {
        ledger.reserve(at(seconds), count);
        ledger.settle(at(seconds), 0);
    }

    #[test]
    fn an_act_counts_for_an_hour() {
        let mut ledger = Ledger::default();
        acted(&mut ledger, 100, 7);
        acted(&mut ledger, 200, 5);
        assert_eq!(ledger.used(at(200)), 12);
        assert_eq!(ledger.used(at(3699)), 12);
        assert_eq!(ledger.used(at(3700)), 5);
        assert_eq!(ledger.used(at(3800)), 0);
        acted(&mut ledger, 3800, 0);
        assert_eq!(ledger, Ledger::default(), "nothing is kept for ever");
    }

    #[test]
    fn the_hour_begins_when_the_acts_are_over() {
        let mut ledger = Ledger::default();
        ledger.reserve(at(100), 7);
        assert_eq!(ledger.used(at(9000)), 7, "they may still happen");
        ledger.settle(at(200), 3);
        assert_eq!(ledger.used(at(3799)), 4);
        assert_eq!(ledger.used(at(3800)), 0);
        ledger.settle(at(200), 3);
        assert_eq!(
            ledger.used(at(3799)),
            4,
            "a refund is of acts that are not over"
        );
        ledger.reserve(at(300), 7);
        ledger.settle(at(300), 30);
        assert_eq!(ledger.used(at(300)), 4);
    }

    #[test]
    fn acts_of_a_killed_daemon_count_from_its_next_start() {
        let mut ledger = Ledger::default();
        acted(&mut ledger, 100, 1);
        ledger.reserve(at(100), 7);
        ledger.settle_all(at(5000));
        assert_eq!(ledger.used(at(8599)), 7);
        assert_eq!(ledger.used(at(8600)), 0);
    }

    #[test]
    fn a_clock_that_starts_again_frees_nothing() {
        let mut ledger = Ledger::default();
        acted(&mut ledger, 5000, 7);
        ledger.clamp(at(10));
        assert_eq!(ledger.used(at(10)), 7);
        assert_eq!(ledger.used(at(3609)), 7);
        assert_eq!(ledger.used(at(3610)), 0);
        acted(&mut ledger, 20, 1);
        ledger.rebase(at(30));
        assert_eq!(ledger.used(at(3629)), 8);
    }
}
