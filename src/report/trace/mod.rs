//! The report of `cwkill trace`: [`text`] for people, [`json`] for programs, notes, and the exit status.

pub mod json;
pub mod text;

use super::ExitStatus;
use crate::model::Scan;
use crate::text::counted;
use crate::trace::Trace;
use crate::trace::places::Places;

/// 0 if a place was found, 1 if nothing became stuck, 4 if places were not found or something may have been missed.
pub fn exit_status(scan: &Scan, found: &Places<'_>) -> ExitStatus {
    match (found.places.is_empty(), found.new) {
        (false, _) => ExitStatus::Done,
        (true, 0) if !scan.coverage.may_have_missed() => ExitStatus::NothingMatched,
        (true, _) => ExitStatus::NotAllClosed,
    }
}

/// What the places do not tell, one line each.
pub fn notes(trace: &Trace, scan: &Scan, found: &Places<'_>) -> Vec<String> {
    let mut notes = scan.coverage.notes(scan.without_known_owner());
    for (pid, process, problem) in &found.problems {
        let process = match process {
            Some(process) => process.to_string(),
            None => format!("process {pid}"),
        };
        let text = problem.to_string().replace("{pid}", &pid.to_string());
        notes.push(format!("{process}: {text}"));
    }
    if found.unknown > 0 {
        notes.push(format!(
            "the stack of {} could not be taken or read: the shares are of the others",
            counted(found.unknown, "socket")
        ));
    }
    if let Some(error) = &trace.no_accepts
        && found.new > 0
    {
        notes.push(format!(
            "who accepted the connections is not known: {error}"
        ));
    }
    notes
}
