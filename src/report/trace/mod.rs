//! The report of `cwkill trace`: [`text`] for people, [`json`] for programs, notes, and the exit status.

pub mod json;
pub mod text;

#[cfg(test)]
mod tests;

use std::time::{Duration, SystemTime};

use super::ExitStatus;
use crate::model::Scan;
use crate::sys::monotonic;
use crate::text::counted;
use crate::trace::Trace;
use crate::trace::places::Places;

/// 0 if something was found, 1 if nothing became stuck, 4 if no place was found but something became stuck or may have been missed.
pub fn exit_status(scan: &Scan, found: &Places<'_>) -> ExitStatus {
    match (found.known(), found.new) {
        (0, 0) if !scan.coverage.may_have_missed() => ExitStatus::NothingMatched,
        (0, _) => ExitStatus::NotAllClosed,
        (_, _) => ExitStatus::Done,
    }
}

/// What the places do not tell, one line each.
pub fn notes(trace: &Trace, scan: &Scan, found: &Places<'_>) -> Vec<String> {
    let mut notes = scan.coverage.notes(scan.without_known_owner());
    for (traced, process, problem) in &found.problems {
        let process = match process {
            Some(process) => process.to_string(),
            None => format!("process {}", traced.pid),
        };
        notes.push(format!("{process}: {problem}"));
    }
    if let Some(error) = &trace.not_seen.reads
        && found.new > 0
    {
        notes.push(format!(
            "it is not known where the ends were read, so the places are where connections were opened: {error}"
        ));
    }
    let unknown = counted(found.unknown, "socket");
    if found.unknown > 0 && trace.not_seen.reads.is_some() {
        let were = if found.unknown == 1 { "was" } else { "were" };
        notes.push(format!("it is not known where {unknown} {were} opened"));
    } else if found.unknown > 0 {
        notes.push(format!(
            "no stack is known of {unknown}: {}",
            why_no_stack(trace)
        ));
    }
    if trace.not_seen.later {
        notes.push(
            "kernel.ftrace_enabled became 0 during the trace: since then it was not seen who accepted, nor, before Linux 6.3, where ends were read"
                .to_owned(),
        );
    }
    if let Some(why) = &trace.incomplete
        && found.new > 0
    {
        notes.push(format!(
            "{why}, so it is not known since when some sockets are stuck, and the shares are less exact"
        ));
    }
    if let Some(error) = &trace.not_seen.accepts
        && found.new > 0
    {
        notes.push(format!(
            "who accepted the connections is not known: {error}"
        ));
    }
    notes
}

/// Why stacks of reads are missing. The numbers are of the whole host.
fn why_no_stack(trace: &Trace) -> String {
    let mut reasons = Vec::new();
    if trace.is_sampled {
        reasons
            .push("the peers closed so many connections that only a part was sampled".to_owned());
    }
    if trace.counts.reads_without_slot > 0 {
        let count = usize::try_from(trace.counts.reads_without_slot).unwrap_or(usize::MAX);
        let reads = counted(count, "read");
        reasons.push(format!("{reads} found no free slot"));
    }
    if trace.symbols.missed > 0 {
        let samples = counted(trace.symbols.missed, "sample");
        reasons.push(format!("{samples} gave no stack"));
    }
    if reasons.is_empty() {
        reasons.push("the end was read in a way that is not seen, such as splice(2)".to_owned());
    }
    reasons.join("; ")
}

/// A time of CLOCK_MONOTONIC in RFC 3339.
fn clock(at: Duration) -> String {
    let ago = monotonic().saturating_sub(at);
    let time = SystemTime::now().checked_sub(ago);
    humantime::format_rfc3339_seconds(time.unwrap_or(SystemTime::UNIX_EPOCH)).to_string()
}
