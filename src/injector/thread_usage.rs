//! How much the threads of owners run, and whether one has begun to spin.
//!
//! A thread spins if it has not slept for a second since the close, although it slept before. A thread that was idle before also
//! spins if it has needed a processor for half of that second. Time in which it waits for a processor counts too, so the load of the
//! machine does not matter. A thread that has not slept before the close either cannot be judged, and does not count. If a process
//! has more threads than cwkill reads, the processor time of all of them counts as well, as if they were one that was idle before. On a
//! busy machine that can miss a spin.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rayon::prelude::*;

use crate::control::Control;
use crate::proc::threads::ThreadUsage;
use crate::proc::{ProcFs, Process, ProcessId};

/// A thread that needed a processor for less than this share of the time was idle before the close. Well below [`BUSY_FROM`], so that a
/// small change is not taken for a spin.
const IDLE_BELOW: f64 = 0.25;
/// A thread that needs a processor for this share of the time is busy: a thread that spins needs all of it, less what it sleeps in
/// the calls that it makes for each wake-up.
const BUSY_FROM: f64 = 0.5;

/// How much all threads of some processes had run and slept at one moment.
#[derive(Debug, Default)]
pub(super) struct Usage {
    pub at: Option<Instant>,
    threads: HashMap<ProcessId, Vec<ThreadUsage>>,
}

impl Usage {
    pub fn of(
        owners: &BTreeMap<ProcessId, Arc<Process>>,
        proc: &ProcFs,
        control: &dyn Control,
    ) -> Self {
        let ids: Vec<ProcessId> = owners.keys().copied().collect();
        let threads = ids
            .into_par_iter()
            .map(|id| (id, proc.thread_usages(id)))
            .collect();
        Usage {
            at: Some(control.now()),
            threads,
        }
    }

    /// Whether process `id` has more threads than cwkill reads.
    pub fn is_partial(&self, id: ProcessId) -> bool {
        let threads = self.threads.get(&id).map_or(&[][..], |it| it);
        threads.iter().any(|thread| thread.tid == ThreadUsage::ALL)
    }

    fn time_to(&self, later: &Usage) -> Duration {
        match (self.at, later.at) {
            (Some(at), Some(later)) => later.saturating_duration_since(at),
            _ => Duration::ZERO,
        }
    }

    /// The threads of a process that were there in both readings.
    pub fn pairs<'s>(
        &'s self,
        later: &'s Usage,
        id: ProcessId,
    ) -> impl Iterator<Item = (&'s ThreadUsage, &'s ThreadUsage)> {
        let threads = |usage: &'s Usage| usage.threads.get(&id).map_or(&[][..], |it| it);
        let first: HashMap<i32, &ThreadUsage> = threads(self)
            .iter()
            .map(|thread| (thread.tid, thread))
            .collect();
        let pair = move |thread: &'s ThreadUsage| Some((*first.get(&thread.tid)?, thread));
        threads(later).iter().filter_map(pair)
    }

    /// The share of the time between the readings in which a thread needed a processor.
    pub fn share(&self, later: &Usage, id: ProcessId, tid: i32) -> f64 {
        let time = self.time_to(later);
        let mut pairs = self.pairs(later, id);
        pairs
            .find(|(_, thread)| thread.tid == tid)
            .map_or(0.0, |(from, to)| needed(from, to, time))
    }

    /// Whether a thread has not slept between the readings, or needed a processor for half of the time.
    pub fn is_awake(&self, later: &Usage, id: ProcessId, tid: i32) -> bool {
        let mut pairs = self.pairs(later, id);
        let pair = pairs.find(|(_, thread)| thread.tid == tid);
        pair.is_some_and(|(from, to)| {
            !to.has_slept(from) || needed(from, to, self.time_to(later)) >= BUSY_FROM
        })
    }
}

/// The share of `time` between two readings in which a thread ran or waited for a processor.
fn needed(from: &ThreadUsage, to: &ThreadUsage, time: Duration) -> f64 {
    let total = |thread: &ThreadUsage| thread.ran + thread.waited;
    let needed = total(to).saturating_sub(total(from));
    needed.as_secs_f64() / time.as_secs_f64().max(f64::MIN_POSITIVE)
}

/// The threads of owner `id` that are awake since the close and were not before, each with its share of a processor.
pub(super) fn begun_to_spin(
    before: &[Usage; 2],
    after: &Usage,
    now: &Usage,
    id: ProcessId,
) -> Vec<(i32, f64)> {
    let [first, second] = before;
    let earlier: HashMap<i32, (&ThreadUsage, &ThreadUsage)> = first
        .pairs(second, id)
        .map(|(from, to)| (to.tid, (from, to)))
        .collect();
    let begun = |(from, to): (&ThreadUsage, &ThreadUsage)| {
        let (first_of, second_of) = earlier.get(&to.tid)?;
        let was_idle = !first_of.runnable
            && !second_of.runnable
            && needed(first_of, second_of, first.time_to(second)) < IDLE_BELOW;
        let share = needed(from, to, after.time_to(now));
        let spins = match was_idle {
            true => !to.has_slept(from) || share >= BUSY_FROM,
            false => !to.has_slept(from) && second_of.has_slept(first_of),
        };
        spins.then_some((to.tid, share))
    };
    after.pairs(now, id).filter_map(begun).collect()
}

/// A share in whole percent.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "between 0 and some hundred"
)]
pub(super) fn percent(share: f64) -> u32 {
    (share * 100.0).round() as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proc::testdata::process;

    /// A thread that is there at 0, 50, 60 and 160 ms: before and after the close.
    fn begins(threads: [(bool, u64, u64); 4]) -> bool {
        let start = Instant::now();
        let id = process(7, "app").id;
        let mut times = [0, 50, 60, 160].into_iter();
        let [first, second, third, fourth] = threads.map(|(runnable, sleeps, ran)| {
            let thread = ThreadUsage {
                tid: 7,
                runnable,
                sleeps,
                ran: Duration::from_millis(ran / 2),
                waited: Duration::from_millis(ran - ran / 2),
            };
            Usage {
                at: times.next().map(|time| start + Duration::from_millis(time)),
                threads: HashMap::from([(id, vec![thread])]),
            }
        });
        !begun_to_spin(&[first, second], &third, &fourth, id).is_empty()
    }

    #[test]
    fn a_thread_that_has_not_slept_since_the_close_spins() {
        let (asleep, awake) = (false, true);
        let (idle, spins) = ((asleep, 5, 0), (awake, 5, 1));
        assert!(begins([idle, idle, spins, (awake, 5, 99)]));
        // The kernel has not added up its times yet.
        assert!(begins([idle, idle, spins, (awake, 5, 1)]));
        assert!(!begins([idle, idle, idle, idle]));
        assert!(!begins([idle, idle, spins, (asleep, 6, 2)]), "it reacted");
        assert!(!begins([idle, idle, spins, (awake, 7, 40)]), "it works");
        // It writes a line for every wake-up, and sleeps until the line is written.
        assert!(begins([idle, idle, (awake, 9, 1), (asleep, 999, 61)]));
    }

    #[test]
    fn a_thread_that_was_busy_before_must_cease_to_sleep() {
        let (asleep, awake) = (false, true);
        let computes = [
            (awake, 5, 0),
            (awake, 5, 50),
            (awake, 5, 60),
            (awake, 5, 160),
        ];
        assert!(!begins(computes));
        let (often, later) = ((asleep, 50, 30), (asleep, 60, 36));
        assert!(!begins([(asleep, 5, 0), often, later, (asleep, 160, 96)]));
        // The kernel had not added up its wait yet.
        let waits = (awake, 50, 2);
        assert!(!begins([(asleep, 5, 0), waits, later, (asleep, 160, 96)]));
        assert!(begins([(asleep, 5, 0), waits, later, (awake, 60, 96)]));
    }

    #[test]
    fn a_reading_with_a_sum_of_threads_is_partial() {
        let id = process(7, "app").id;
        let usage = |tid| Usage {
            at: None,
            threads: HashMap::from([(
                id,
                vec![ThreadUsage {
                    tid,
                    runnable: false,
                    sleeps: 0,
                    ran: Duration::ZERO,
                    waited: Duration::ZERO,
                }],
            )]),
        };
        assert!(!usage(7).is_partial(id));
        assert!(usage(ThreadUsage::ALL).is_partial(id));
        assert!(!Usage::default().is_partial(id));
    }
}
