//! The report of `cwkill reclaim`: [`text`] for people, [`json`] for programs, the notes, and the exit status.

pub mod json;
pub mod text;

use std::io;

use super::ExitStatus;
use super::descriptors::Tally;
use crate::config::{Action, ReclaimConfig};
use crate::finder::dead::DeadSocket;
use crate::model::{Owner, ReclaimOutcome};
use crate::proc::Process;
use crate::reclaim::StopStats;
use crate::text::counted;

/// A descriptor of a dead socket.
#[derive(Clone, Debug)]
pub struct DeadDescriptor {
    /// The process, the number of the descriptor, and what became of it.
    pub owner: Owner,
    /// The inode of the socket.
    pub inode: u32,
    /// The socket.
    pub socket: DeadSocket,
}

/// A run of `cwkill reclaim`: all that a report needs.
#[derive(Debug, Default)]
pub struct ReclaimRun {
    /// The descriptors of dead sockets.
    pub descriptors: Vec<DeadDescriptor>,
    /// Whether descriptors were to be closed; otherwise each outcome says only what would be done.
    pub acted: bool,
    /// The owners that were stopped.
    pub stops: Vec<StopStats>,
    /// Descriptors of TCP sockets in no table that may not be examined: they may be dead.
    pub unknown: usize,
    /// Selected processes that may not be read.
    pub unreadable: usize,
    /// Processes whose first thread has exited, so that their descriptors cannot be seen.
    pub leader_exited: Vec<Process>,
    /// Processes whose files could not be read, and why.
    pub failed: Vec<(i32, io::Error)>,
    /// Selected processes may not be shown at all: /proc is mounted with hidepid.
    pub hidden: bool,
}

impl ReclaimRun {
    /// Whether some of what was selected could not be seen.
    pub fn has_blind_spots(&self) -> bool {
        let unread = self.unreadable + self.leader_exited.len() + self.failed.len();
        self.unknown + unread > 0 || self.hidden
    }

    /// How many descriptors had which outcome.
    pub fn tally(&self) -> Tally {
        let outcomes = self.outcomes().filter(|_| self.acted);
        Tally::of(self.descriptors.len(), outcomes)
    }

    fn outcomes(&self) -> impl Iterator<Item = &ReclaimOutcome> {
        let descriptors = self.descriptors.iter();
        descriptors.filter_map(|dead| dead.owner.reclaim.as_ref())
    }
}

/// The status to exit with.
pub fn exit_status(run: &ReclaimRun) -> ExitStatus {
    let unseen = run.has_blind_spots();
    match run.descriptors.is_empty() {
        true if unseen => ExitStatus::NotAllClosed,
        true => ExitStatus::NothingMatched,
        false if !run.acted => ExitStatus::Done,
        false => {
            let tally = run.tally();
            match tally.skipped + tally.failed {
                0 if !unseen => ExitStatus::Done,
                _ => ExitStatus::NotAllClosed,
            }
        }
    }
}

/// One line that says how it went.
pub fn summary(run: &ReclaimRun, config: &ReclaimConfig) -> String {
    let found = counted(run.descriptors.len(), "dead descriptor");
    if run.acted {
        let tally = run.tally();
        return format!("{found}: {} freed{}", tally.freed, tally.left());
    }
    let allowed = run.outcomes().filter(|it| **it == ReclaimOutcome::Allowed);
    let mut line = format!("{found}, {} can be closed", allowed.count());
    if config.action == Action::DryRun {
        line.push_str("; dry run, nothing was done");
    }
    line
}

/// What the operator should know beside the results.
pub fn notes(run: &ReclaimRun) -> Vec<String> {
    let mut notes = Vec::new();
    if run.unknown > 0 {
        notes.push(format!(
            "{} of TCP may be dead and could not be examined",
            counted(run.unknown, "more descriptor")
        ));
    }
    if run.unreadable > 0 {
        notes.push(format!(
            "{} could not be read",
            counted(run.unreadable, "process")
        ));
    }
    for process in &run.leader_exited {
        notes.push(format!(
            "{process} could not be read: its first thread has ended, which hides its descriptors"
        ));
    }
    if let Some((pid, error)) = run.failed.first() {
        notes.push(format!(
            "{} could not be read (the first is {pid}: {error})",
            counted(run.failed.len(), "more process")
        ));
    }
    if run.hidden {
        notes.push(
            "processes of other users are not shown here (/proc is mounted with hidepid)"
                .to_owned(),
        );
    }
    notes
}

/// Whether a missing privilege kept a descriptor from being seen or closed.
pub fn lacks_privileges(run: &ReclaimRun) -> bool {
    let privilege = |outcome: &ReclaimOutcome| outcome.reason()?.privilege();
    run.unknown + run.unreadable > 0 || run.hidden || run.outcomes().find_map(privilege).is_some()
}
