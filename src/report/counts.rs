//! The matched sockets counted by process and by cause, for the JSON document.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use serde::Serialize;

use super::serialize::{JsonContainer, container, millis};
use crate::model::{Cause, Outcome, Scan};
use crate::proc::ProcessId;

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
        count.oldest_ms = count.oldest_ms.max(target.socket.age.map(millis));
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
