//! The dead descriptors counted by process and by reason, for the JSON document.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use serde::Serialize;

use super::ReclaimRun;
use crate::model::{ReclaimOutcome, ReclaimReason};
use crate::proc::{Process, ProcessId};

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
pub(super) fn by_process(run: &ReclaimRun) -> Vec<JsonDescriptorCount<'_>> {
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
pub(super) fn by_reason(run: &ReclaimRun) -> BTreeMap<&'static str, usize> {
    let mut counts = BTreeMap::new();
    let outcomes = run.descriptors.iter();
    let outcomes = outcomes.filter_map(|dead| dead.owner.reclaim.as_ref());
    for reason in outcomes.filter_map(ReclaimOutcome::reason) {
        *counts.entry(ReclaimReason::code(reason)).or_default() += 1;
    }
    counts
}
