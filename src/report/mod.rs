//! The reports, for people ([`overview`] on a terminal, [`text`] elsewhere, [`notes`]) and for programs ([`json`]), and the exit status.
//! `layout` fits tables into a terminal.
//!
//! A report only reads a [`Run`]. The record of an intent reads it before the acts. The commands `reclaim`, `diagnose`, `trace`, `doctor` and `gateway` have reports of their own.

pub mod advice;
pub mod backlogs;
mod counts;
pub mod descriptors;
pub mod diagnose;
pub mod doctor;
pub mod gateway;
pub mod json;
mod layout;
pub mod notes;
pub mod overview;
pub mod reclaim;
pub mod serialize;
pub mod table;
pub mod text;
#[cfg(feature = "trace")]
pub mod trace;

#[cfg(test)]
pub(crate) mod golden_tests;

use std::process::ExitCode;
use std::sync::Arc;

use crate::model::{Backlog, Outcome, ReclaimOutcome, Scan, SkipReason, Spinning};
use crate::proc::{Process, ProcessId};
use crate::reclaim::StopStats;
use crate::text::counted;
use crate::watch::NewSockets;
use advice::Advice;

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
    /// What to do about the descriptors that `--reclaim` has kept.
    pub advice: Vec<Advice>,
    /// The dead descriptors that match, by process; `None` if cwkill did not look for them. It looks only if no socket matches. `advice`
    /// is about those that cannot be closed now.
    pub dead_descriptors: Option<Vec<DeadOfProcess>>,
    /// Why cwkill could not look for dead descriptors.
    pub dead_descriptors_failure: Option<String>,
    /// The sockets that became stuck afterwards; `None` without a watch.
    pub new_sockets: Option<NewSockets>,
}

/// The dead descriptors of one process.
#[derive(Clone, Debug)]
pub struct DeadOfProcess {
    pub process: Arc<Process>,
    pub count: usize,
    /// The number of those that nothing speaks against closing.
    pub closable: usize,
    /// Closes these.
    pub command: String,
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
            advice: Vec::new(),
            dead_descriptors: None,
            dead_descriptors_failure: None,
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
    /// Those of `skipped` that were left for a later run, because older sockets had reached `--max-kills`.
    pub over_max_kills: usize,
    /// No method closed them.
    pub failed: usize,
    /// They were left alone because data has moved in them (`--min-idle`). They are not among `matched`.
    pub in_use: usize,
    /// They match, but are younger than `--min-age`. They are not among `matched`.
    pub younger: usize,
}

impl SocketCounts {
    pub fn of(run: &Run) -> Self {
        let mut counts = SocketCounts {
            matched: run.scan.targets.len(),
            in_use: run.scan.in_use,
            younger: run.scan.younger,
            ..SocketCounts::default()
        };
        for outcome in run.scan.targets.iter().filter_map(|target| target.outcome) {
            let is_over = outcome == Outcome::Skipped(SkipReason::OverMaxKills);
            counts.over_max_kills += usize::from(is_over);
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

    /// Adds the sockets of a later part of a watch. Those that were left alone are counted anew each time, so the last count stays.
    pub fn add(&mut self, more: SocketCounts) {
        self.matched += more.matched;
        self.closed += more.closed;
        self.closing += more.closing;
        self.gone += more.gone;
        self.skipped += more.skipped;
        self.over_max_kills += more.over_max_kills;
        self.failed += more.failed;
        self.in_use = more.in_use;
        self.younger = more.younger;
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
            (self.skipped - self.over_max_kills, "skipped"),
            (self.over_max_kills, "over --max-kills"),
            (self.failed, "failed"),
        ] {
            if count > 0 {
                line += &format!(", {count} {name}");
            }
        }
        line
    }

    /// The exit status by these counts alone; [`exit_status`] adds the coverage. A run that was to close at most so many sockets
    /// has done its job if these are closed.
    pub fn exit_status(&self) -> ExitStatus {
        if self.matched == 0 {
            ExitStatus::NothingMatched
        } else if self.closing + self.skipped - self.over_max_kills + self.failed > 0 {
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
/// | 0 | every matched socket is closed (of those that `--max-kills` allows) and every backlog drained, or the listing or dry run matched something |
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

impl ExitStatus {
    /// The same status, or [`ExitStatus::Done`] if nothing matched and `is_ok` (`--ok-if-none`).
    pub fn with_none_ok(self, is_ok: bool) -> Self {
        match self {
            ExitStatus::NothingMatched if is_ok => ExitStatus::Done,
            status => status,
        }
    }
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
            ..SocketCounts::default()
        };
        let status = |t: SocketCounts| t.exit_status();
        assert_eq!(status(counts(0, 0, 0, 0, 0)), ExitStatus::NothingMatched);
        assert_eq!(status(counts(5, 0, 0, 0, 0)), ExitStatus::Done);
        assert_eq!(status(counts(5, 0, 5, 0, 0)), ExitStatus::Done);
        assert_eq!(status(counts(5, 1, 0, 0, 0)), ExitStatus::NotAllClosed);
        assert_eq!(status(counts(5, 0, 0, 1, 0)), ExitStatus::NotAllClosed);
        assert_eq!(status(counts(5, 0, 0, 0, 1)), ExitStatus::NotAllClosed);
    }

    #[test]
    fn a_run_that_reaches_its_limit_has_done_its_job() {
        let counts = |closed, skipped, over_max_kills| SocketCounts {
            matched: 5,
            closed,
            skipped,
            over_max_kills,
            gone: 5 - closed - skipped,
            ..SocketCounts::default()
        };
        let status = |counts: SocketCounts| counts.exit_status();
        assert_eq!(status(counts(2, 3, 3)), ExitStatus::Done);
        assert_eq!(status(counts(0, 3, 3)), ExitStatus::Done, "two are gone");
        assert_eq!(status(counts(2, 3, 2)), ExitStatus::NotAllClosed);
        assert_eq!(
            counts(2, 3, 3).sentence(),
            "5 sockets matched: 2 closed, 3 over --max-kills"
        );
        assert_eq!(
            counts(2, 3, 2).sentence(),
            "5 sockets matched: 2 closed, 1 skipped, 2 over --max-kills"
        );
    }

    #[test]
    fn only_the_status_of_nothing_can_be_made_a_success() {
        use ExitStatus::{Done, Impossible, NotAllClosed, NothingMatched};
        let with = |is_ok| {
            [Done, NothingMatched, Impossible, NotAllClosed].map(|it| it.with_none_ok(is_ok))
        };
        assert_eq!(with(true), [Done, Done, Impossible, NotAllClosed]);
        assert_eq!(
            with(false),
            [Done, NothingMatched, Impossible, NotAllClosed]
        );
    }
}
