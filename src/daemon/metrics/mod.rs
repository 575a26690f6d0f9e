//! The metrics: what the daemon has counted since its start, with the numbers of its last sweep, in Prometheus' text format. Pure.
//!
//! Every series whose labels are known in advance exists from the first sweep on, with 0 where there is nothing: a rate over a series that
//! appears with its first event misses that event. Owners come and go, and a gone owner has no series. No label is a pid, an address or a
//! socket: each would make a series that is never seen again.

mod exposition;
pub mod policies;

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

use prometheus_client::encoding::prometheus_text;
use prometheus_client::registry::Registry;
use strum::VariantArray;

use super::observation::{AgeClass, CAUSES, Changes, Observation, OwnerLabels, OwnerNumbers};
use crate::model::Cause;
use exposition::{Exposition, Labels, Value};
use policies::OfPolicies;

/// The type of the text, for HTTP.
pub use prometheus_text::CONTENT_TYPE;

/// The resources that the daemon itself uses. Each is `None` if it is unknown.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct OwnUse {
    /// Processor time of all threads since its start.
    pub cpu: Option<Duration>,
    pub resident_bytes: Option<u64>,
    pub descriptors: Option<u64>,
    pub threads: Option<u64>,
}

/// The last sweep that found something out.
#[derive(Clone, Debug)]
pub struct LastSweep {
    pub observation: Observation,
    /// When it ended.
    pub at: SystemTime,
    pub took: Duration,
}

/// Everything that the metrics say.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    /// `None` for a single sweep: when the next one is, a timer knows.
    pub interval: Option<Duration>,
    /// `None` before the first sweep.
    pub last: Option<LastSweep>,
    /// Sweeps that saw everything.
    pub complete: u64,
    /// Sweeps that may have missed a stuck socket or an owner.
    pub partial: u64,
    /// Sweeps that found nothing out.
    pub failed: u64,
    /// Sockets that have become stuck since the first sweep, and stayed so for two sweeps, by cause.
    pub new: BTreeMap<Cause, u64>,
    /// Those of them, and of the first sweep, that are not stuck any more, by the last cause.
    pub ended: BTreeMap<Cause, u64>,
    pub reloads: u64,
    pub failed_reloads: u64,
    /// Whether the last reload has failed, so that an older configuration is in use.
    pub is_configuration_old: bool,
    pub own: OwnUse,
    pub policies: OfPolicies,
}

impl Metrics {
    /// Of a daemon that starts.
    pub fn new(interval: Duration) -> Self {
        Metrics {
            interval: Some(interval),
            ..Metrics::default()
        }
    }

    /// Of a single sweep.
    pub fn of_one_sweep() -> Self {
        Metrics::default()
    }

    /// Adds a sweep that has found something out. `changes`: since the sweep before.
    pub fn add(&mut self, last: LastSweep, changes: Changes) {
        let count = match last.observation.is_partial {
            true => &mut self.partial,
            false => &mut self.complete,
        };
        *count += 1;
        let Changes { new, ended } = changes;
        for (sum, by_cause) in [(&mut self.new, new), (&mut self.ended, ended)] {
            for (cause, count) in by_cause {
                *sum.entry(cause).or_default() += count;
            }
        }
        self.last = Some(last);
    }

    /// All metrics as text; `None` before the first sweep: then nothing is known, and zeros would be a lie.
    pub fn text(&self) -> Option<String> {
        let mut all = self.without_own_use()?;
        self.of_own_use(&mut all);
        encode(all)
    }

    /// As [`Metrics::text`], for the textfile collector of node_exporter, without the metrics of a process: node_exporter has its own under
    /// the same names, and would refuse the file for them.
    pub fn text_for_collector(&self) -> Option<String> {
        encode(self.without_own_use()?)
    }

    fn without_own_use(&self) -> Option<Exposition> {
        let last = self.last.as_ref()?;
        let mut all = Exposition::default();
        of_sockets(&last.observation, &mut all);
        of_owners(&last.observation.owners, &mut all);
        self.of_sweeps(last, &mut all);
        policies::add(&self.policies, &mut all);
        self.of_daemon(&mut all);
        Some(all)
    }

    fn of_sweeps(&self, last: &LastSweep, all: &mut Exposition) {
        let by_cause = |counts: &BTreeMap<Cause, u64>| {
            CAUSES.map(|cause| {
                let count = counts.get(&cause).copied().unwrap_or(0);
                (cause_label(cause), count.into())
            })
        };
        all.counter(
            "cwkill_new_stuck_sockets",
            "Sockets that were stuck at two sweeps in a row for the first time, by cause. Those of the first sweep do not count, nor those that are stuck for less than an interval.",
            by_cause(&self.new),
        );
        all.counter(
            "cwkill_ended_stuck_sockets",
            "Sockets that were stuck at two sweeps or more, and are not any more, by their last cause.",
            by_cause(&self.ended),
        );
        let results = [
            ("complete", self.complete),
            ("partial", self.partial),
            ("failed", self.failed),
        ];
        all.counter(
            "cwkill_sweeps",
            "Sweeps since the start of the daemon. A partial one may have missed stuck sockets or owners, see cwkill_unseen.",
            results.map(|(result, count)| (vec![("result", result.to_owned())], count.into())),
        );
        let single = |value: Value| [(Labels::new(), value)];
        all.gauge(
            "cwkill_sweep_duration_seconds",
            "How long the last sweep took that did not fail.",
            single(last.took.into()),
        );
        let at = last.at.duration_since(SystemTime::UNIX_EPOCH);
        all.gauge(
            "cwkill_sweep_last_success_timestamp_seconds",
            "When the last sweep ended that did not fail.",
            single(at.unwrap_or_default().into()),
        );
        all.gauge(
            "cwkill_sweep_interval_seconds",
            "The configured time from the start of a sweep to the start of the next.",
            self.interval
                .map(|interval| (Labels::new(), interval.into())),
        );
        all.gauge(
            "cwkill_namespaces",
            "Network namespaces whose sockets were read.",
            single((last.observation.namespaces as u64).into()),
        );
        let left_out = last.observation.not_looked_into;
        all.gauge(
            "cwkill_namespaces_not_looked_into",
            "Network namespaces that were left out, because all_netns is not set.",
            single(left_out.namespaces.into()),
        );
        all.gauge(
            "cwkill_sockets_not_looked_into",
            "TCP sockets in these, of which some may be stuck. Missing if it is not known of each namespace.",
            left_out.sockets.map(|count| (Labels::new(), count.into())),
        );
        let unseen = last.observation.unseen.iter();
        all.gauge(
            "cwkill_unseen",
            "What the last sweep could not see, by kind; cwkill-daemon(8) explains each.",
            unseen.map(|(what, count)| (vec![("what", (*what).to_owned())], (*count).into())),
        );
    }

    fn of_daemon(&self, all: &mut Exposition) {
        let results = [("success", self.reloads), ("failure", self.failed_reloads)];
        all.counter(
            "cwkill_configuration_reloads",
            "Reloads of the configuration (SIGHUP).",
            results.map(|(result, count)| (vec![("result", result.to_owned())], count.into())),
        );
        let single = |value: Value| [(Labels::new(), value)];
        all.gauge(
            "cwkill_configuration_last_reload_successful",
            "Whether the last reload was taken over; with 0 an older configuration is in use. 1 if there was none.",
            single((!self.is_configuration_old).into()),
        );
        let version = env!("CARGO_PKG_VERSION").to_owned();
        all.gauge(
            "cwkill_build_info",
            "The version of cwkill; the value is always 1.",
            [(vec![("version", version)], Value::Count(1))],
        );
    }

    fn of_own_use(&self, all: &mut Exposition) {
        let own = self.own;
        all.counter(
            "process_cpu_seconds",
            "Processor time of the daemon, in user and kernel mode.",
            own.cpu.map(|cpu| (Labels::new(), cpu.into())),
        );
        for (name, help, value) in [
            (
                "process_resident_memory_bytes",
                "Resident memory of the daemon.",
                own.resident_bytes,
            ),
            (
                "process_open_fds",
                "Open descriptors of the daemon.",
                own.descriptors,
            ),
            ("process_threads", "Threads of the daemon.", own.threads),
        ] {
            all.gauge(name, help, value.map(|value| (Labels::new(), value.into())));
        }
    }
}

fn encode(all: Exposition) -> Option<String> {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(all));
    let mut text = String::new();
    // A String takes everything.
    prometheus_text::encode(&mut text, &registry).ok()?;
    Some(text)
}

fn cause_label(cause: Cause) -> Labels {
    vec![("cause", cause.name().to_owned())]
}

fn of_sockets(observation: &Observation, all: &mut Exposition) {
    let mut stuck = Vec::new();
    for cause in CAUSES {
        for class in AgeClass::VARIANTS {
            let mut labels = cause_label(cause);
            labels.push(("age", class.name().to_owned()));
            stuck.push((labels, observation.stuck_of(cause, *class).into()));
        }
    }
    all.gauge(
        "cwkill_stuck_sockets",
        "Sockets in CLOSE-WAIT, by the cause and by how long they have been in it.",
        stuck,
    );
    let oldest = |cause| observation.oldest.get(&cause).copied();
    all.gauge(
        "cwkill_stuck_oldest_age_seconds",
        "How long the oldest stuck socket of each cause has been stuck, at least; 0 if there is none.",
        CAUSES.map(|cause| (cause_label(cause), oldest(cause).unwrap_or_default().into())),
    );
    let dead = [
        ("dead", observation.dead),
        (
            "unknown",
            observation
                .unseen
                .get(super::observation::MAY_BE_DEAD)
                .copied()
                .unwrap_or(0),
        ),
    ];
    all.gauge(
        "cwkill_dead_descriptors",
        "Open descriptors of sockets that are dead, and of those for which it cannot be told.",
        dead.map(|(verdict, count)| (vec![("verdict", verdict.to_owned())], count.into())),
    );
}

fn of_owners(owners: &BTreeMap<OwnerLabels, OwnerNumbers>, all: &mut Exposition) {
    let labels = |owner: &OwnerLabels| -> Labels {
        let OwnerLabels {
            process,
            unit,
            namespace,
            pod,
            container,
        } = owner.clone();
        vec![
            ("process", process),
            ("unit", unit),
            ("namespace", namespace),
            ("pod", pod),
            ("container", container),
        ]
    };
    type Number = fn(&OwnerNumbers) -> Option<Value>;
    let metrics: [(&str, &str, Number); 5] = [
        (
            "cwkill_owner_stuck_sockets",
            "Stuck sockets that these processes are responsible for; each counts once.",
            |numbers| Some(numbers.stuck.into()),
        ),
        (
            "cwkill_owner_oldest_age_seconds",
            "How long the oldest of them has been stuck, at least.",
            |numbers| Some(numbers.oldest.into()),
        ),
        (
            "cwkill_owner_dead_descriptors",
            "Open descriptors of dead sockets in these processes.",
            |numbers| Some(numbers.dead.into()),
        ),
        (
            "cwkill_owner_open_descriptors",
            "Open descriptors of every kind, of that one of these processes that is nearest to its limit.",
            |numbers| Some(numbers.fullest?.open.into()),
        ),
        (
            "cwkill_owner_max_descriptors",
            "The limit of open descriptors (soft RLIMIT_NOFILE) of the same process.",
            |numbers| Some(numbers.fullest?.limit.into()),
        ),
    ];
    for (name, help, value) in metrics {
        let series = owners
            .iter()
            .filter_map(|(owner, numbers)| Some((labels(owner), value(numbers)?)));
        all.gauge(name, help, series);
    }
}

#[cfg(test)]
mod tests;
