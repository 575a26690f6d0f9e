//! The circuit breaker of a policy. It opens if closing does not help, or hurts; then the policy only observes. Pure.

use std::collections::{HashSet, VecDeque};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use strum::{IntoStaticStr, VariantArray};

use super::ledger::ms_up;
use crate::daemon::config::{BreakerRules, HALF_OPEN};
use crate::proc::ProcessId;

/// The breaker compares with at most so many sweeps, and with those of the last hour.
const MAX_SAMPLES: usize = 240;
const SAMPLES_LAST: Duration = Duration::from_secs(60 * 60);
/// With fewer sweeps nobody knows what is usual.
const FEW_SAMPLES: usize = 10;
/// With fewer acts their failures say nothing.
const FEW_ACTS: u32 = 5;
/// A surge is at least so many sockets more than usual.
const SMALLEST_SURGE: usize = 100;

/// Why a breaker opens. Its code is the variant in kebab case, and stable.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    IntoStaticStr,
    VariantArray,
)]
#[strum(serialize_all = "kebab-case")]
#[serde(rename_all = "kebab-case")]
pub enum Trip {
    /// After each act, as many more than usual come back as were closed.
    Refill,
    /// Too many acts fail.
    Failures,
    /// Far more sockets match than in the last hour.
    Surge,
    /// An owner ended soon after an act on its sockets.
    OwnerEnded,
    /// An owner spins since an act on its sockets.
    OwnerSpins,
}

impl Trip {
    /// The stable name for programs.
    pub fn code(self) -> &'static str {
        self.into()
    }

    /// The same in words.
    pub fn sentence(self) -> &'static str {
        match self {
            Trip::Refill => "as many sockets come back as it closes, so closing does not help",
            Trip::Failures => "too many of its acts fail",
            Trip::Surge => "far more sockets match than in the last hour",
            Trip::OwnerEnded => "an owner ended soon after an act on its sockets",
            Trip::OwnerSpins => "an owner spins since an act on its sockets",
        }
    }
}

/// Whether a policy may act.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    /// It may.
    #[default]
    Closed,
    /// It only observes.
    Open { since_ms: u64, why: Trip },
    /// It may act on few sockets.
    HalfOpen {
        /// Acts in a row after which nothing spoke against closing.
        good: u32,
    },
}

impl Status {
    /// The stable name for programs.
    pub fn code(self) -> &'static str {
        match self {
            Status::Closed => "closed",
            Status::Open { .. } => "open",
            Status::HalfOpen { .. } => "half-open",
        }
    }
}

/// A change of a breaker, for the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// The status that it has now.
    pub to: Status,
}

impl Change {
    /// It in words.
    pub fn sentence(&self) -> String {
        match self.to {
            Status::Open { why, .. } => format!("its circuit breaker opens: {}", why.sentence()),
            Status::HalfOpen { .. } => {
                format!(
                    "its circuit breaker is half open: it acts on {HALF_OPEN} sockets in a sweep at most"
                )
            }
            Status::Closed => "its circuit breaker is closed again".to_owned(),
        }
    }
}

/// What a breaker knows.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Breaker {
    status: Status,
    /// In so many acts in a row, as many came back as were closed.
    refills: u32,
    /// How many the last act closed, if its effect is not judged yet.
    closed: Option<u32>,
    acts: VecDeque<Act>,
    samples: VecDeque<Sample>,
    watched: Vec<Watched>,
    /// How many of the watched owners have ended.
    ended: u32,
}

/// The acts of a sweep.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Act {
    tried: u32,
    failed: u32,
}

/// The sockets of a sweep.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Sample {
    at_ms: u64,
    selected: u32,
    /// Those that the sweep before did not have.
    new: u32,
}

/// An owner after an act on its sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Watched {
    pid: i32,
    start_time: u64,
    /// So many sweeps it is still watched.
    sweeps: u32,
}

impl Watched {
    fn id(&self) -> ProcessId {
        ProcessId {
            pid: self.pid,
            start_time: self.start_time,
        }
    }
}

/// What a sweep has seen of the sockets of a policy.
#[derive(Clone, Copy, Debug)]
pub struct Seen<'a> {
    pub selected: usize,
    /// How many of them the sweep before did not have; `None` if there was none.
    pub new: Option<usize>,
    /// Watched owners that have ended.
    pub ended: &'a HashSet<ProcessId>,
}

/// What the acts of a sweep have done.
#[derive(Clone, Debug, Default)]
pub struct Done {
    pub closed: u32,
    pub failed: u32,
    /// The owners of the sockets on which methods were tried.
    pub owners: Vec<ProcessId>,
    /// Whether one of them spins now.
    pub spins: bool,
}

impl Breaker {
    pub fn status(&self) -> Status {
        self.status
    }

    /// The owners of which it wants to know whether they have ended.
    pub fn watched(&self) -> impl Iterator<Item = ProcessId> + '_ {
        self.watched.iter().map(Watched::id)
    }

    /// Judges a sweep, before its acts.
    pub fn observe(
        &mut self,
        rules: &BreakerRules,
        now: Duration,
        seen: Seen<'_>,
    ) -> Option<Change> {
        let now_ms = ms_up(now);
        self.forget(now);
        let surges = self.surges(rules, seen.selected);
        let came_back = self.judge_last_act(seen.new);
        self.note_ended(seen.ended);
        if let Some(new) = seen.new
            && came_back != Some(true)
        {
            let count = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
            self.samples.push_back(Sample {
                at_ms: now_ms,
                selected: count(seen.selected),
                new: count(new),
            });
            if self.samples.len() > MAX_SAMPLES {
                self.samples.pop_front();
            }
        }
        match self.status {
            Status::Open { since_ms, .. } => {
                let until = Duration::from_millis(since_ms).saturating_add(rules.cooldown);
                (now >= until).then(|| self.change(Status::HalfOpen { good: 0 }))
            }
            Status::Closed | Status::HalfOpen { .. } => {
                let is_half_open = self.status != Status::Closed;
                let refills = if is_half_open { 1 } else { rules.sweeps };
                let why = if self.ended >= rules.restarts {
                    Some(Trip::OwnerEnded)
                } else if self.refills >= refills {
                    Some(Trip::Refill)
                } else if surges {
                    Some(Trip::Surge)
                } else {
                    None
                };
                match why {
                    Some(why) => Some(self.open(now, why)),
                    None if came_back == Some(false) => self.note_good(rules),
                    None => None,
                }
            }
        }
    }

    /// Takes in what the acts of this sweep have done.
    pub fn record(&mut self, rules: &BreakerRules, now: Duration, done: &Done) -> Option<Change> {
        let tried = done.closed.saturating_add(done.failed);
        if tried == 0 {
            return None;
        }
        self.closed = Some(done.closed);
        let failed = done.failed;
        self.acts.push_back(Act { tried, failed });
        let at_most = usize::try_from(rules.sweeps).unwrap_or(usize::MAX);
        while self.acts.len() > at_most {
            self.acts.pop_front();
        }
        for &ProcessId { pid, start_time } in &done.owners {
            self.watched
                .retain(|one| one.pid != pid || one.start_time != start_time);
            let sweeps = rules.sweeps;
            self.watched.push(Watched {
                pid,
                start_time,
                sweeps,
            });
        }
        if done.spins {
            return Some(self.open(now, Trip::OwnerSpins));
        }
        self.fails(rules).then(|| self.open(now, Trip::Failures))
    }

    /// Closes it, by the order of the operator.
    pub fn reset(&mut self) {
        let samples = std::mem::take(&mut self.samples);
        *self = Breaker {
            samples,
            ..Breaker::default()
        };
    }

    /// The clock has started again with another boot: what was open is open from now on, and no process is the same.
    pub fn rebase(&mut self, now: Duration) {
        if let Status::Open { since_ms, .. } = &mut self.status {
            *since_ms = ms_up(now);
        }
        self.samples.clear();
        self.watched.clear();
        self.ended = 0;
        self.closed = None;
    }

    /// Forgets what was usual: the policy selects other sockets now.
    pub fn forget_samples(&mut self) {
        self.samples.clear();
        self.closed = None;
    }

    fn change(&mut self, to: Status) -> Change {
        self.status = to;
        Change { to }
    }

    fn open(&mut self, now: Duration, why: Trip) -> Change {
        let samples = std::mem::take(&mut self.samples);
        *self = Breaker {
            samples,
            ..Breaker::default()
        };
        let since_ms = ms_up(now);
        self.change(Status::Open { since_ms, why })
    }

    /// One more act after which nothing spoke against closing.
    fn note_good(&mut self, rules: &BreakerRules) -> Option<Change> {
        let Status::HalfOpen { good } = &mut self.status else {
            return None;
        };
        *good += 1;
        (*good >= rules.sweeps).then(|| self.change(Status::Closed))
    }

    fn forget(&mut self, now: Duration) {
        let now_ms = ms_up(now);
        if let Status::Open { since_ms, .. } = &mut self.status {
            *since_ms = (*since_ms).min(now_ms);
        }
        let is_recent = |sample: &Sample| {
            now < Duration::from_millis(sample.at_ms).saturating_add(SAMPLES_LAST)
                && sample.at_ms <= now_ms
        };
        self.samples.retain(is_recent);
    }

    /// Whether as many more than usual came back as the last act closed; `None` if there was none. A sweep that does not know what is new
    /// leaves it to the next.
    fn judge_last_act(&mut self, new: Option<usize>) -> Option<bool> {
        let new = u32::try_from(new?).unwrap_or(u32::MAX);
        let closed = self.closed.take()?;
        if closed == 0 {
            return None;
        }
        let usual = self.usually_new();
        let came_back = new >= usual.median.saturating_add(closed) && new > usual.rarely_over;
        self.refills = match came_back {
            true => self.refills + 1,
            false => 0,
        };
        Some(came_back)
    }

    /// How many sockets are new in a sweep. Without knowledge, any new socket is one more than usual.
    fn usually_new(&self) -> Usual {
        if self.samples.len() < FEW_SAMPLES {
            return Usual::default();
        }
        let mut new: Vec<u32> = self.samples.iter().map(|sample| sample.new).collect();
        new.sort_unstable();
        let last = new.len() - 1;
        Usual {
            median: new[new.len() / 2],
            rarely_over: new[(new.len() * 95 / 100).min(last)],
        }
    }

    fn note_ended(&mut self, ended: &HashSet<ProcessId>) {
        let before = self.watched.len();
        self.watched.retain(|one| !ended.contains(&one.id()));
        let gone = u32::try_from(before - self.watched.len()).unwrap_or(u32::MAX);
        self.ended = self.ended.saturating_add(gone);
        for one in &mut self.watched {
            one.sweeps = one.sweeps.saturating_sub(1);
        }
        self.watched.retain(|one| one.sweeps > 0);
        // Those that ended are only counted together with others that were watched at the same time.
        if self.watched.is_empty() && gone == 0 {
            self.ended = 0;
        }
    }

    fn surges(&self, rules: &BreakerRules, selected: usize) -> bool {
        if self.samples.len() < FEW_SAMPLES {
            return false;
        }
        let mut before: Vec<u32> = self.samples.iter().map(|it| it.selected).collect();
        before.sort_unstable();
        let median = usize::try_from(before[before.len() / 2]).unwrap_or(usize::MAX);
        let times = usize::try_from(rules.surge).unwrap_or(usize::MAX);
        selected >= median.saturating_mul(times)
            && selected >= median.saturating_add(SMALLEST_SURGE)
    }

    fn fails(&self, rules: &BreakerRules) -> bool {
        let sum = |of: fn(&Act) -> u32| self.acts.iter().map(of).fold(0, u32::saturating_add);
        let (tried, failed) = (sum(|act| act.tried), sum(|act| act.failed));
        tried >= FEW_ACTS
            && u64::from(failed) * 100 > u64::from(tried) * u64::from(rules.failures.0)
    }
}

/// How many sockets are new in a sweep of the last hour.
#[derive(Default)]
struct Usual {
    median: u32,
    /// One sweep of twenty has more. A leak that is slow or comes in bursts often has more than the median.
    rarely_over: u32,
}

#[cfg(test)]
#[path = "breaker_tests.rs"]
mod tests;
