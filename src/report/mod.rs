//! The reports, for people ([`text`], [`notes`]) and for programs ([`json`]), and the exit status.
//!
//! A report only reads a [`Run`]. The record of an intent reads it before the acts. The commands `reclaim`, `diagnose` and `doctor` have reports of their own.

pub mod backlogs;
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

use crate::model::{Backlog, Outcome, ReclaimOutcome, Scan, Spinning};
use crate::proc::ProcessId;
use crate::reclaim::StopStats;
use crate::text::counted;
use crate::watch::NewSockets;

/// A run of `cwkill` without a command.
#[derive(Debug)]
pub struct Run {
    pub scan: Scan,
    /// Whether sockets were to be closed. Then every target has an outcome.
    pub acted: bool,
    /// Whether the descriptors of closed sockets were to be closed too (`--reclaim`).
    pub reclaim_requested: bool,
    /// The owners that spin since cwkill closed a socket of them.
    pub spinning: Vec<Spinning>,
    /// The owners that `--reclaim` stopped.
    pub stops: Vec<StopStats>,
    /// The backlogs in which dead connections wait, or waited; `None` without `--drain-backlog`.
    pub backlogs: Option<Vec<Backlog>>,
    /// The sockets that became stuck afterwards; `None` without a watch.
    pub new_sockets: Option<NewSockets>,
}

impl Run {
    /// A run whose targets have plans and no outcomes yet.
    pub fn new(scan: Scan) -> Self {
        Run {
            scan,
            acted: false,
            reclaim_requested: false,
            spinning: Vec::new(),
            stops: Vec::new(),
            backlogs: None,
            new_sockets: None,
        }
    }

    /// Whether a process spins since cwkill closed a socket of it.
    pub fn spins(&self, id: ProcessId) -> bool {
        let mut spinning = self.spinning.iter().filter(|one| !one.ended);
        spinning.any(|one| one.process.id == id)
    }
}

/// The number of sockets with each outcome.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct SocketCounts {
    pub matched: usize,
    /// cwkill closed them, and the kernel no longer lists them.
    pub closed: usize,
    /// cwkill changed their state, and they wait for the peer.
    pub closing: usize,
    /// They changed their state before cwkill acted.
    pub gone: usize,
    pub skipped: usize,
    /// No method closed them.
    pub failed: usize,
    /// They were left alone because data has moved in them (`--min-idle`). They are not among `matched`.
    pub in_use: usize,
}

impl SocketCounts {
    pub fn of(run: &Run) -> Self {
        let mut counts = SocketCounts {
            matched: run.scan.targets.len(),
            in_use: run.scan.in_use,
            ..SocketCounts::default()
        };
        for outcome in run.scan.targets.iter().filter_map(|target| target.outcome) {
            *match outcome {
                Outcome::Closed(_) => &mut counts.closed,
                Outcome::Closing(..) => &mut counts.closing,
                Outcome::Gone => &mut counts.gone,
                Outcome::Skipped(_) => &mut counts.skipped,
                Outcome::Failed => &mut counts.failed,
            } += 1;
        }
        counts
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

    /// The exit status by these counts alone; [`exit_status`] adds the coverage.
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

/// The exit status of a run.
///
/// A run is not complete if some sockets were left alone because their owner was unreadable, if a backlog was not drained, if the
/// scan failed after cwkill had destroyed some sockets, or if an owner spins. A backlog counts as a match. A run without matches is
/// not complete if undecided sockets or unseen namespaces may have matched.
pub fn exit_status(run: &Run) -> ExitStatus {
    let coverage = &run.scan.coverage;
    let mut backlogs = run.backlogs.iter().flatten();
    match SocketCounts::of(run).exit_status() {
        ExitStatus::NothingMatched if coverage.may_have_missed() => ExitStatus::NotAllClosed,
        _ if run.acted && backlogs.clone().any(Backlog::is_left) => ExitStatus::NotAllClosed,
        ExitStatus::NothingMatched if backlogs.next().is_some() => ExitStatus::Done,
        ExitStatus::Done if coverage.undecided > 0 && run.acted => ExitStatus::NotAllClosed,
        ExitStatus::Done if coverage.relist_failure.is_some() => ExitStatus::NotAllClosed,
        ExitStatus::Done if run.acted && !all_reclaimed(&run.scan) => ExitStatus::NotAllClosed,
        ExitStatus::Done if run.spinning.iter().any(|one| !one.ended) => ExitStatus::NotAllClosed,
        status => status,
    }
}

/// Whether no descriptor was skipped or failed.
fn all_reclaimed(scan: &Scan) -> bool {
    let owners = scan.targets.iter().flat_map(|target| &target.owners);
    !owners
        .filter_map(|owner| owner.reclaim.as_ref())
        .any(|outcome| {
            matches!(
                outcome,
                ReclaimOutcome::Skipped(_) | ReclaimOutcome::Failed(_)
            )
        })
}

/// The exit status of the program.
///
/// | status | meaning |
/// |---|---|
/// | 0 | every matched socket is closed and every backlog drained, or the listing or dry run matched something |
/// | 1 | nothing matched |
/// | 2 | wrong usage: clap exits with it |
/// | 3 | the job could not be done at all |
/// | 4 | something matched, and not all of it is closed, or not all descriptors with `--reclaim`, or an owner spins |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitStatus {
    Done = 0,
    NothingMatched = 1,
    Impossible = 3,
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
        let counts = |matched, closing, gone, skipped, failed| SocketCounts {
            matched,
            closed: matched - closing - gone - skipped - failed,
            closing,
            gone,
            skipped,
            failed,
            in_use: 0,
        };
        let status = |t: SocketCounts| t.exit_status();
        assert_eq!(status(counts(0, 0, 0, 0, 0)), ExitStatus::NothingMatched);
        assert_eq!(status(counts(5, 0, 0, 0, 0)), ExitStatus::Done);
        assert_eq!(status(counts(5, 0, 5, 0, 0)), ExitStatus::Done);
        assert_eq!(status(counts(5, 1, 0, 0, 0)), ExitStatus::NotAllClosed);
        assert_eq!(status(counts(5, 0, 0, 1, 0)), ExitStatus::NotAllClosed);
        assert_eq!(status(counts(5, 0, 0, 0, 1)), ExitStatus::NotAllClosed);
    }
}
