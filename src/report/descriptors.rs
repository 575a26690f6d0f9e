//! The parts of a report about reclaimed descriptors, for `cwkill reclaim` and for `--reclaim`.

use std::fmt::Write as _;
use std::time::Duration;

use comfy_table::Color;
use serde::Serialize;

use crate::model::{ReclaimOutcome, Scan, Target};
use crate::reclaim::StopStats;
use crate::text::counted;

/// The number of descriptors with each outcome.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct DescriptorCounts {
    /// Descriptors of dead sockets.
    pub found: usize,
    /// Closed in their process.
    pub freed: usize,
    /// Closed in their process, with /dev/null in their place.
    pub replaced: usize,
    /// Closed by their process before cwkill stopped it.
    pub gone: usize,
    /// cwkill did not try to close them.
    pub skipped: usize,
    /// cwkill tried to close them, and they are still open.
    pub failed: usize,
}

impl DescriptorCounts {
    pub(super) fn of<'o>(found: usize, outcomes: impl Iterator<Item = &'o ReclaimOutcome>) -> Self {
        let mut counts = DescriptorCounts {
            found,
            ..DescriptorCounts::default()
        };
        for outcome in outcomes {
            *match outcome {
                ReclaimOutcome::Allowed => continue,
                ReclaimOutcome::Freed => &mut counts.freed,
                ReclaimOutcome::Replaced => &mut counts.replaced,
                ReclaimOutcome::Gone => &mut counts.gone,
                ReclaimOutcome::Skipped(_) => &mut counts.skipped,
                ReclaimOutcome::Failed(_) => &mut counts.failed,
            } += 1;
        }
        counts
    }

    /// Counts the outcomes of `--reclaim`.
    pub fn of_scan(scan: &Scan) -> Self {
        let owners = || scan.targets.iter().flat_map(|target| &target.owners);
        let outcomes = || owners().filter_map(|owner| owner.reclaim.as_ref());
        Self::of(outcomes().count(), outcomes())
    }

    /// The counts of the descriptors that were not freed, in words.
    pub fn left(&self) -> String {
        let mut text = String::new();
        for (count, name) in [
            (self.replaced, "replaced by /dev/null"),
            (self.gone, "gone"),
            (self.skipped, "skipped"),
            (self.failed, "failed"),
        ] {
            if count > 0 {
                let _ = write!(text, ", {count} {name}");
            }
        }
        text
    }
}

/// The text about the descriptors of one target in the table of a run.
pub fn target_text(target: &Target) -> String {
    let outcomes = || {
        target
            .owners
            .iter()
            .filter_map(|owner| owner.reclaim.as_ref())
    };
    let freed = outcomes().filter(|outcome| **outcome == ReclaimOutcome::Freed);
    let mut text = match freed.count() {
        0 => String::new(),
        1 => ", descriptor freed".to_owned(),
        freed => format!(", {freed} descriptors freed"),
    };
    let replaced = outcomes().filter(|outcome| **outcome == ReclaimOutcome::Replaced);
    match replaced.count() {
        0 => {}
        1 => text.push_str(", descriptor replaced by /dev/null"),
        replaced => {
            let _ = write!(text, ", {replaced} descriptors replaced by /dev/null");
        }
    }
    let mut kept: Vec<String> = outcomes()
        .filter_map(|outcome| outcome.reason().map(ToString::to_string))
        .collect();
    kept.dedup();
    if !kept.is_empty() {
        let _ = write!(text, "; descriptor kept: {}", kept.join("; "));
    }
    text
}

/// The line that `--reclaim` adds to the summary, and one line for each stopped owner.
pub fn lines(scan: &Scan, stops: &[StopStats]) -> Vec<String> {
    let counts = DescriptorCounts::of_scan(scan);
    let found = counted(counts.found, "descriptor");
    let mut lines = vec![format!("{found}: {} freed{}", counts.freed, counts.left())];
    lines.extend(stop_lines(stops));
    lines
}

/// One line for each owner that was stopped.
pub(super) fn stop_lines(stops: &[StopStats]) -> impl Iterator<Item = String> {
    stops.iter().map(|stop| {
        let replaced = match stop.replaced {
            0 => String::new(),
            replaced => format!(", {replaced} replaced by /dev/null"),
        };
        format!(
            "{} was stopped for {:.1} ms: {} freed{replaced}",
            stop.process,
            stop.stop_time.as_secs_f64() * 1000.0,
            counted(stop.freed, "descriptor"),
        )
    })
}

/// The outcome in words, and its colour.
pub(crate) fn result(outcome: Option<&ReclaimOutcome>) -> (String, Color) {
    match outcome {
        Some(ReclaimOutcome::Freed) => ("freed".into(), Color::Green),
        Some(ReclaimOutcome::Replaced) => ("replaced by /dev/null".into(), Color::Green),
        Some(ReclaimOutcome::Gone) => ("gone before the act".into(), Color::Green),
        Some(ReclaimOutcome::Skipped(reason)) => (format!("skipped: {reason}"), Color::Yellow),
        Some(ReclaimOutcome::Failed(reason)) => (format!("failed: {reason}"), Color::Red),
        Some(ReclaimOutcome::Allowed) | None => ("not done".into(), Color::Red),
    }
}

#[derive(Serialize)]
pub struct JsonStop<'a> {
    pid: i32,
    comm: &'a str,
    freed: usize,
    replaced: usize,
    stopped_us: u64,
}

pub fn json_stops(stops: &[StopStats]) -> Vec<JsonStop<'_>> {
    let stops = stops.iter().map(|stop| JsonStop {
        pid: stop.process.id.pid,
        comm: &stop.process.comm,
        freed: stop.freed,
        replaced: stop.replaced,
        stopped_us: micros(stop.stop_time),
    });
    stops.collect()
}

pub(super) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
