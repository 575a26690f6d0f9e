//! The matched sockets and the dead descriptors counted by process, cause and reason, for the JSON documents.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use serde::Serialize;

use super::reclaim::ReclaimRun;
use super::serialize::{JsonContainer, container};
use crate::model::{Cause, Outcome, ReclaimOutcome, ReclaimReason, Scan};
use crate::proc::{Process, ProcessId};

/// The matched sockets of one process, or those without a known one. A socket counts for the process that is responsible: the first of
/// its owners, or the owner of its listener.
#[derive(Serialize)]
pub(super) struct JsonProcessCount<'a> {
    pid: Option<i32>,
    comm: Option<&'a str>,
    unit: Option<&'a str>,
    container: Option<JsonContainer<'a>>,
    matched: usize,
    closed: usize,
    oldest_ms: Option<u64>,
    by_cause: BTreeMap<&'static str, usize>,
}

/// The sockets by process, most first, those without a known process last.
pub(super) fn sockets_by_process(scan: &Scan) -> Vec<JsonProcessCount<'_>> {
    let mut counts: BTreeMap<Option<ProcessId>, JsonProcessCount<'_>> = BTreeMap::new();
    for target in &scan.targets {
        let process = scan.culprit(target).map(AsRef::as_ref);
        let count = counts
            .entry(process.map(|process| process.id))
            .or_insert_with(|| JsonProcessCount {
                pid: process.map(|process| process.id.pid),
                comm: process.map(|process| process.comm.as_str()),
                unit: process.and_then(|process| process.cgroup.unit.as_deref()),
                container: process.and_then(container),
                matched: 0,
                closed: 0,
                oldest_ms: None,
                by_cause: BTreeMap::new(),
            });
        count.matched += 1;
        count.closed += usize::from(matches!(target.outcome, Some(Outcome::Closed(_))));
        count.oldest_ms = count
            .oldest_ms
            .max(target.socket.age.map(super::json::millis));
        *count
            .by_cause
            .entry(target.socket.cause.name())
            .or_default() += 1;
    }
    let mut counts: Vec<JsonProcessCount<'_>> = counts.into_values().collect();
    counts.sort_by_key(|count| (count.pid.is_none(), Reverse(count.matched), count.pid));
    counts
}

/// The sockets by cause. Each cause is there, also with 0, so that a program needs no default.
pub(super) fn sockets_by_cause(scan: &Scan) -> BTreeMap<&'static str, usize> {
    let mut counts: BTreeMap<&'static str, usize> =
        Cause::SELECTABLE.map(|cause| (cause.name(), 0)).into();
    for target in &scan.targets {
        *counts.entry(target.socket.cause.name()).or_default() += 1;
    }
    counts
}

/// The dead descriptors of one process.
#[derive(Serialize)]
pub(super) struct JsonDescriptorCount<'a> {
    pid: i32,
    comm: &'a str,
    found: usize,
    /// Those that could be closed, in a run that does not act.
    closable: Option<usize>,
    /// Those that were closed or replaced, in a run that acts.
    freed: Option<usize>,
}

/// The dead descriptors by process, most first.
pub(super) fn descriptors_by_process(run: &ReclaimRun) -> Vec<JsonDescriptorCount<'_>> {
    let mut counts: BTreeMap<ProcessId, (&Process, [usize; 3])> = BTreeMap::new();
    for dead in &run.descriptors {
        let process = &dead.owner.process;
        let (_, [found, closable, freed]) = counts.entry(process.id).or_insert((process, [0; 3]));
        *found += 1;
        match dead.owner.reclaim {
            Some(ReclaimOutcome::Allowed) => *closable += 1,
            Some(ReclaimOutcome::Freed | ReclaimOutcome::Replaced) => *freed += 1,
            _ => {}
        }
    }
    let mut counts: Vec<_> = counts.into_values().collect();
    counts.sort_by_key(|(process, [found, ..])| (Reverse(*found), process.id));
    counts
        .into_iter()
        .map(|(process, [found, closable, freed])| JsonDescriptorCount {
            pid: process.id.pid,
            comm: &process.comm,
            found,
            closable: (!run.acted).then_some(closable),
            freed: run.acted.then_some(freed),
        })
        .collect()
}

/// The dead descriptors that are kept, by the code of the reason.
pub(super) fn descriptors_by_reason(run: &ReclaimRun) -> BTreeMap<&'static str, usize> {
    let mut counts = BTreeMap::new();
    let outcomes = run.descriptors.iter();
    let outcomes = outcomes.filter_map(|dead| dead.owner.reclaim.as_ref());
    for reason in outcomes.filter_map(ReclaimOutcome::reason) {
        *counts.entry(ReclaimReason::code(reason)).or_default() += 1;
    }
    counts
}
