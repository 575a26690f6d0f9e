//! The report of `cwkill diagnose`: [`text`] for people, with charts from [`bars`], [`json`] for programs, and the exit status.

pub mod bars;
pub mod json;
pub mod text;

use super::ExitStatus;
use crate::diagnose::Diagnosis;

/// 0 if there is something to report, 1 if nothing matched, 4 if nothing was found but something may have been missed.
pub fn exit_status(diagnosis: &Diagnosis) -> ExitStatus {
    let missed = diagnosis.scan.coverage.may_have_missed();
    // One that was named may have nothing to report.
    let mut processes = diagnosis.processes.iter();
    let leaking = usize::from(processes.any(|process| !process.is_healthy()));
    match (diagnosis.total.stuck, leaking) {
        (0, 0) if missed || diagnosis.are_descriptors_unseen() => ExitStatus::NotAllClosed,
        (0, 0) => ExitStatus::NothingMatched,
        _ => ExitStatus::Done,
    }
}
