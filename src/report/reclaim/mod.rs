//! The report of `cwkill reclaim`: [`text`] for people, [`json`] for programs, the notes, and the exit status.

mod counts;
pub mod json;
pub mod next;
pub mod screen;
pub mod text;

use std::fmt::Write as _;
use std::io;
use std::sync::Arc;

use super::ExitStatus;
use super::advice::Advice;
use super::descriptors::DescriptorCounts;
use crate::config::{Action, ReclaimConfig};
use crate::finder::dead::{DeadSocket, Suspect};
use crate::model::{Owner, ReclaimOutcome};
use crate::proc::{AbsentOwner, OWNER_OPTIONS, Process, Unnamed};
use crate::reclaim::StopStats;
use crate::text::{counted, named_or_counted};

#[derive(Clone, Debug)]
pub struct DeadDescriptor {
    /// The process, the number of the descriptor, and the outcome.
    pub owner: Owner,
    /// The inode of the socket.
    pub inode: u32,
    pub socket: DeadSocket,
}

impl DeadDescriptor {
    /// The descriptor `suspect` of `process`, with its dead socket.
    pub fn new(process: &Arc<Process>, suspect: &Suspect, socket: DeadSocket) -> Self {
        DeadDescriptor {
            owner: Owner {
                tid: suspect.tid,
                ..Owner::new(Arc::clone(process), suspect.fd)
            },
            inode: suspect.inode,
            socket,
        }
    }
}

/// A run of `cwkill reclaim`.
#[derive(Debug, Default)]
pub struct ReclaimRun {
    pub descriptors: Vec<DeadDescriptor>,
    /// Dead descriptors of the processes that `--pid` names, which `--fd` leaves alone. A run that acts judges them, to say how to go on.
    pub not_named: Vec<DeadDescriptor>,
    /// Whether descriptors were to be closed. Without it each outcome is only a prediction.
    pub acted: bool,
    /// The owners that were stopped.
    pub stops: Vec<StopStats>,
    /// Number of descriptors of TCP sockets that the kernel does not list and that cwkill is not permitted to examine. They
    /// may be dead.
    pub unknown: usize,
    /// Number of selected processes that cwkill is not permitted to read.
    pub unreadable: usize,
    /// Their names, if they are few.
    pub unreadable_names: Vec<String>,
    /// Processes whose first thread has exited. /proc no longer shows their descriptors.
    pub leader_exited: Vec<Process>,
    /// The pids of processes whose files could not be read, with the error.
    pub failed: Vec<(i32, io::Error)>,
    /// /proc is mounted with hidepid, so it may hide selected processes.
    pub hidden: bool,
    /// The selected owners that do not exist.
    pub absent: Vec<AbsentOwner>,
    /// The number of dead descriptors that match, except that their process is in another network namespace.
    pub elsewhere: usize,
    /// The number of dead descriptors that were left out because their local address is unknown.
    pub without_address: usize,
    /// The number of descriptors that may be dead and selected: the name of the container of their process could not be read.
    pub without_name: usize,
    /// The containers that may be selected: their names could not be read.
    pub unnamed: Unnamed,
    /// Notes on the selected owners.
    pub owner_notes: Vec<String>,
    /// What to do about the descriptors that were kept.
    pub advice: Vec<Advice>,
}

impl ReclaimRun {
    /// Whether some selected processes or descriptors were not visible.
    pub fn has_blind_spots(&self) -> bool {
        let unread = self.unreadable + self.leader_exited.len() + self.failed.len();
        self.unknown + self.without_name + unread > 0 || self.hidden
    }

    pub fn counts(&self) -> DescriptorCounts {
        let outcomes = self.outcomes().filter(|_| self.acted);
        DescriptorCounts::of(self.descriptors.len(), outcomes)
    }

    fn outcomes(&self) -> impl Iterator<Item = &ReclaimOutcome> {
        let descriptors = self.descriptors.iter();
        descriptors.filter_map(|dead| dead.owner.reclaim.as_ref())
    }
}

pub fn exit_status(run: &ReclaimRun) -> ExitStatus {
    let unseen = run.has_blind_spots();
    match run.descriptors.is_empty() {
        true if unseen => ExitStatus::NotAllClosed,
        true => ExitStatus::NothingMatched,
        false if !run.acted => ExitStatus::Done,
        false => {
            let counts = run.counts();
            match counts.skipped + counts.failed {
                0 if !unseen => ExitStatus::Done,
                _ => ExitStatus::NotAllClosed,
            }
        }
    }
}

/// The line after the table.
pub fn summary(run: &ReclaimRun, config: &ReclaimConfig) -> String {
    let found = counted(run.descriptors.len(), "dead descriptor");
    if run.acted {
        let counts = run.counts();
        let freed = counts.freed;
        return format!("{found}: {freed} freed{}{}", counts.left(), left_out(run));
    }
    let is_allowed = |outcome: &&ReclaimOutcome| **outcome == ReclaimOutcome::Allowed;
    let allowed = run.outcomes().filter(is_allowed);
    let mut line = format!(
        "{found}, {} can be closed{}",
        allowed.count(),
        left_out(run)
    );
    if config.action == Action::DryRun {
        line.push_str("; dry run, nothing was done");
    }
    line
}

/// What was left out although it matches otherwise.
fn left_out(run: &ReclaimRun) -> String {
    let mut text = String::new();
    if run.elsewhere > 0 {
        let _ = write!(text, "; {} in other network namespaces", run.elsewhere);
    }
    if run.without_address > 0 {
        let _ = write!(text, "; {} of an unknown local port", run.without_address);
    }
    if !run.not_named.is_empty() {
        let _ = write!(
            text,
            "; {} more that --fd leaves alone",
            run.not_named.len()
        );
    }
    if run.unknown > 0 {
        let _ = write!(text, "; {} more may be dead", run.unknown);
    }
    if run.without_name > 0 {
        let _ = write!(
            text,
            "; {} more in containers without a known name",
            run.without_name
        );
    }
    text
}

/// The notes beside the results, one per line.
pub fn notes(run: &ReclaimRun) -> Vec<String> {
    let mut notes: Vec<String> = run.absent.iter().map(ToString::to_string).collect();
    notes.extend(run.owner_notes.iter().cloned());
    if run.unnamed.containers > 0 {
        notes.push(run.unnamed.note());
    }
    if run.elsewhere > 0 {
        notes.push(format!(
            "{} of that port in other network namespaces: a selector of owners ({OWNER_OPTIONS}) or --all selects them too",
            counted(run.elsewhere, "more dead descriptor")
        ));
    }
    if run.without_address > 0 {
        notes.push(format!(
            "{} left out: the kernel does not report the local port; select them without --port",
            counted(run.without_address, "dead descriptor")
        ));
    }
    if run.unknown > 0 {
        notes.push(format!(
            "{} of TCP may be dead and could not be examined",
            counted(run.unknown, "more descriptor")
        ));
    }
    if run.unreadable > 0 {
        notes.push(format!(
            "{} could not be read",
            named_or_counted(run.unreadable, &run.unreadable_names)
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

/// Whether a missing privilege kept cwkill from finding or closing a descriptor.
pub fn lacks_privileges(run: &ReclaimRun) -> bool {
    let privilege = |outcome: &ReclaimOutcome| outcome.reason()?.privilege();
    run.unknown + run.unreadable > 0 || run.hidden || run.outcomes().find_map(privilege).is_some()
}
