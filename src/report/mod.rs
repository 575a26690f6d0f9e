//! The report: what happened, for people ([`text`], [`notes`]) and for programs ([`json`]), and the
//! exit status.
//!
//! Reports read a finished [`Run`] and nothing else.

pub mod escape;
pub mod json;
pub mod notes;
pub mod reclaim;
pub mod text;

#[cfg(test)]
mod golden_tests;

use std::process::ExitCode;

use crate::injector::ladder::Verdict;
use crate::pipeline::Run;
use crate::reclaim::Fate;

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
            matched: run.found.sockets.len(),
            ..Tally::default()
        };
        for deed in run.deeds.iter().flatten() {
            *match deed.outcome.verdict {
                Verdict::Closed(_) => &mut tally.closed,
                Verdict::Closing(..) => &mut tally.closing,
                Verdict::Gone => &mut tally.gone,
                Verdict::Skipped(_) => &mut tally.skipped,
                Verdict::Failed => &mut tally.failed,
            } += 1;
        }
        tally
    }

    /// One line for people.
    pub fn sentence(&self) -> String {
        let mut line = format!("{} matched: {} closed", sockets(self.matched), self.closed);
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

/// A number of sockets in words.
fn sockets(count: usize) -> String {
    match count {
        1 => "1 socket".to_owned(),
        _ => format!("{count} sockets"),
    }
}

/// The status to exit with after a run.
///
/// Sockets that may have matched and were left alone because their owner could not be read keep an act
/// from being complete, and so does a list that failed after some were destroyed. They, and namespaces that could not be seen, keep a result from being empty.
pub fn exit_status(run: &Run) -> ExitStatus {
    let status = Tally::of(run).exit_status();
    let found = &run.found;
    let unseen = found.unreachable_namespaces + found.untold_namespaces > 0;
    match status {
        ExitStatus::NothingMatched if unseen || found.undecided > 0 => ExitStatus::NotAllClosed,
        ExitStatus::Done if found.undecided > 0 && run.deeds.is_some() => ExitStatus::NotAllClosed,
        ExitStatus::Done if run.unlisted.is_some() => ExitStatus::NotAllClosed,
        ExitStatus::Done if !all_reclaimed(run) => ExitStatus::NotAllClosed,
        status => status,
    }
}

/// Whether every descriptor that was to be closed is.
fn all_reclaimed(run: &Run) -> bool {
    let left = |fate: &Fate| matches!(fate, Fate::Skipped(_) | Fate::Failed(_));
    !run.reclaimed
        .iter()
        .any(|reclaimed| reclaimed.fates.iter().flatten().flatten().any(left))
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
