//! The report: what happened, for people ([`text`], [`notes`]) and for programs ([`json`]), and the
//! exit status.
//!
//! Reports read a finished [`Run`] and nothing else.

pub mod descriptors;
pub mod diagnose;
pub mod doctor;
pub mod json;
pub mod notes;
pub mod reclaim;
pub mod serialize;
pub mod table;
pub mod text;

#[cfg(test)]
mod golden_tests;

use std::process::ExitCode;

use crate::model::{Outcome, ReclaimOutcome, Scan};
use crate::reclaim::StopStats;
use crate::text::counted;
use crate::watch::NewSockets;

/// A run of `cwkill` without a command: all that a report needs.
#[derive(Debug)]
pub struct Run {
    /// The sockets that matched, with what was planned and done.
    pub scan: Scan,
    /// Whether anything was to be done; then every target has an outcome.
    pub acted: bool,
    /// Whether the descriptors of closed sockets were to be closed in their owners too.
    pub reclaimed: bool,
    /// The owners that were stopped for that.
    pub stops: Vec<StopStats>,
    /// The sockets that became stuck afterwards; `None` if that was not watched.
    pub new_sockets: Option<NewSockets>,
}

impl Run {
    /// A run that has found its targets, and planned for them.
    pub fn new(scan: Scan) -> Self {
        Run {
            scan,
            acted: false,
            reclaimed: false,
            stops: Vec::new(),
            new_sockets: None,
        }
    }
}

/// How many sockets had which outcome.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Tally {
    /// Sockets that matched.
    pub matched: usize,
    /// No longer in the kernel's tables, by our act.
    pub closed: usize,
    /// Out of their state by our act, waiting for the peer.
    pub closing: usize,
    /// Left their state on their own before the act.
    pub gone: usize,
    /// Left alone.
    pub skipped: usize,
    /// Still there.
    pub failed: usize,
}

impl Tally {
    /// Counts the outcomes of a run.
    pub fn of(run: &Run) -> Self {
        let mut tally = Tally {
            matched: run.scan.targets.len(),
            ..Tally::default()
        };
        for outcome in run.scan.targets.iter().filter_map(|target| target.outcome) {
            *match outcome {
                Outcome::Closed(_) => &mut tally.closed,
                Outcome::Closing(..) => &mut tally.closing,
                Outcome::Gone => &mut tally.gone,
                Outcome::Skipped(_) => &mut tally.skipped,
                Outcome::Failed => &mut tally.failed,
            } += 1;
        }
        tally
    }

    /// One line for people.
    pub fn sentence(&self) -> String {
        let mut line = format!(
            "{} matched: {} closed",
            counted(self.matched, "socket"),
            self.closed
        );
        for (count, name) in [
            (self.closing, "closing"),
            (self.gone, "gone"),
            (self.skipped, "skipped"),
            (self.failed, "failed"),
        ] {
            if count > 0 {
                line += &format!(", {count} {name}");
            }
        }
        line
    }

    /// The status to exit with.
    pub fn exit_status(&self) -> ExitStatus {
        if self.matched == 0 {
            ExitStatus::NothingMatched
        } else if self.closing + self.skipped + self.failed > 0 {
            ExitStatus::NotAllClosed
        } else {
            ExitStatus::Done
        }
    }
}

/// The status to exit with after a run.
///
/// Sockets that may match and were left alone because their owner could not be read keep an act from being complete, and so does a
/// scan that failed after some were destroyed. They, and namespaces that could not be seen, keep a result from being empty.
pub fn exit_status(run: &Run) -> ExitStatus {
    let coverage = &run.scan.coverage;
    match Tally::of(run).exit_status() {
        ExitStatus::NothingMatched if coverage.may_have_missed() => ExitStatus::NotAllClosed,
        ExitStatus::Done if coverage.undecided > 0 && run.acted => ExitStatus::NotAllClosed,
        ExitStatus::Done if coverage.unlisted.is_some() => ExitStatus::NotAllClosed,
        ExitStatus::Done if run.acted && !all_reclaimed(&run.scan) => ExitStatus::NotAllClosed,
        status => status,
    }
}

/// Whether every descriptor that was to be closed is.
fn all_reclaimed(scan: &Scan) -> bool {
    let owners = scan.targets.iter().flat_map(|target| &target.owners);
    !owners
        .filter_map(|owner| owner.reclaim.as_ref())
        .any(|it| matches!(it, ReclaimOutcome::Skipped(_) | ReclaimOutcome::Failed(_)))
}

/// The exit status of the program.
///
/// | status | meaning |
/// |---|---|
/// | 0 | every matched socket is closed, or the listing or dry run matched something |
/// | 1 | nothing matched |
/// | 2 | wrong usage |
/// | 3 | the job could not be done at all |
/// | 4 | something matched, and not all of it is closed, or not all descriptors with `--reclaim` |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitStatus {
    /// 0
    Done = 0,
    /// 1
    NothingMatched = 1,
    /// 2
    Usage = 2,
    /// 3
    Impossible = 3,
    /// 4
    NotAllClosed = 4,
}

impl From<ExitStatus> for ExitCode {
    fn from(status: ExitStatus) -> Self {
        ExitCode::from(status as u8)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exit_status_says_whether_all_are_closed() {
        let tally = |matched, closing, gone, skipped, failed| Tally {
            matched,
            closed: matched - closing - gone - skipped - failed,
            closing,
            gone,
            skipped,
            failed,
        };
        let status = |t: Tally| t.exit_status();
        assert_eq!(status(tally(0, 0, 0, 0, 0)), ExitStatus::NothingMatched);
        assert_eq!(status(tally(5, 0, 0, 0, 0)), ExitStatus::Done);
        assert_eq!(status(tally(5, 0, 5, 0, 0)), ExitStatus::Done);
        assert_eq!(status(tally(5, 1, 0, 0, 0)), ExitStatus::NotAllClosed);
        assert_eq!(status(tally(5, 0, 0, 1, 0)), ExitStatus::NotAllClosed);
        assert_eq!(status(tally(5, 0, 0, 0, 1)), ExitStatus::NotAllClosed);
    }
}
