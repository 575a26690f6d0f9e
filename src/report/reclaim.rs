//! The report of `cwkill reclaim`, for people and for programs, and the part that `--reclaim` adds to the report of a run.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::time::Duration;

use comfy_table::{Cell, CellAlignment, Color};
use serde::Serialize;

use super::json::{Endpoint, JsonContainer, SCHEMA_VERSION, container, endpoint, serializer};
use super::text::{belongs, belongs_to, plain_table};
use super::{ExitStatus, Run};
use crate::config::{Action, ReclaimConfig};
use crate::finder::dead::DeadSocket;
use crate::model::{Owner, ReclaimOutcome, ReclaimReason, Target};
use crate::proc::Process;
use crate::reclaim::StopStats;
use crate::text::{age, counted, escape};

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

    fn outcomes(&self) -> impl Iterator<Item = &ReclaimOutcome> {
        let descriptors = self.descriptors.iter();
        descriptors.filter_map(|dead| dead.owner.reclaim.as_ref())
    }
}

/// How many descriptors had which outcome.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Tally {
    /// Descriptors of dead sockets.
    pub found: usize,
    /// Closed in their process.
    pub freed: usize,
    /// Closed by their process before we came to it.
    pub gone: usize,
    /// Left alone.
    pub skipped: usize,
    /// Tried, and still there.
    pub failed: usize,
}

impl Tally {
    fn of<'o>(found: usize, outcomes: impl Iterator<Item = &'o ReclaimOutcome>) -> Self {
        let mut tally = Tally {
            found,
            ..Tally::default()
        };
        for outcome in outcomes {
            *match outcome {
                ReclaimOutcome::Allowed => continue,
                ReclaimOutcome::Freed => &mut tally.freed,
                ReclaimOutcome::Gone => &mut tally.gone,
                ReclaimOutcome::Skipped(_) => &mut tally.skipped,
                ReclaimOutcome::Failed(_) => &mut tally.failed,
            } += 1;
        }
        tally
    }

    /// Counts the outcomes of `--reclaim`.
    pub fn of_run(run: &Run) -> Self {
        let owners = || run.scan.targets.iter().flat_map(|target| &target.owners);
        let outcomes = || owners().filter_map(|owner| owner.reclaim.as_ref());
        match run.acted {
            true => Self::of(outcomes().count(), outcomes()),
            false => Self::default(),
        }
    }

    /// Counts the outcomes of `cwkill reclaim`.
    pub fn of_descriptors(run: &ReclaimRun) -> Self {
        Self::of(run.descriptors.len(), run.outcomes().filter(|_| run.acted))
    }

    /// Those that were not freed, as words.
    pub fn left(&self) -> String {
        let mut text = String::new();
        for (count, name) in [
            (self.gone, "gone"),
            (self.skipped, "skipped"),
            (self.failed, "failed"),
        ] {
            if count > 0 {
                let _ = write!(text, ", {count} {name}");
            }
        }
        text
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
            let tally = Tally::of_descriptors(run);
            match tally.skipped + tally.failed {
                0 if !unseen => ExitStatus::Done,
                _ => ExitStatus::NotAllClosed,
            }
        }
    }
}

/// What the table of a run adds about the descriptors of one socket.
pub fn beside(target: &Target) -> String {
    let outcomes = || {
        target
            .owners
            .iter()
            .filter_map(|owner| owner.reclaim.as_ref())
    };
    let freed = outcomes().filter(|outcome| **outcome == ReclaimOutcome::Freed);
    let mut text = match freed.count() {
        0 => String::new(),
        1 => ", descriptor freed".to_owned(),
        freed => format!(", {freed} descriptors freed"),
    };
    let mut kept: Vec<String> = outcomes()
        .filter_map(|outcome| outcome.reason().map(ToString::to_string))
        .collect();
    kept.dedup();
    if !kept.is_empty() {
        let _ = write!(text, "; descriptor kept: {}", kept.join("; "));
    }
    text
}

/// The line that `--reclaim` adds to the summary, and those about the owners.
pub fn lines(run: &Run) -> Vec<String> {
    let tally = Tally::of_run(run);
    let found = counted(tally.found, "descriptor");
    let mut lines = vec![format!("{found}: {} freed{}", tally.freed, tally.left())];
    lines.extend(stops(&run.stops));
    lines
}

/// One line for each owner that was stopped.
fn stops(stops: &[StopStats]) -> impl Iterator<Item = String> {
    stops.iter().map(|stop| {
        format!(
            "{} was stopped for {:.1} ms: {} freed",
            stop.process,
            stop.stopped.as_secs_f64() * 1000.0,
            counted(stop.freed, "descriptor"),
        )
    })
}

/// Writes the table and the summary.
///
/// # Errors
/// Those of `out`.
pub fn write(
    run: &ReclaimRun,
    config: &ReclaimConfig,
    color: bool,
    out: &mut dyn Write,
) -> io::Result<()> {
    if !run.descriptors.is_empty() {
        write_table(run, config, color, out)?;
    }
    writeln!(out, "{}", summary(run, config))?;
    for line in stops(&run.stops) {
        writeln!(out, "{line}")?;
    }
    Ok(())
}

fn write_table(
    run: &ReclaimRun,
    config: &ReclaimConfig,
    color: bool,
    out: &mut dyn Write,
) -> io::Result<()> {
    let mut table = plain_table(color);
    let mut owners = run.descriptors.iter().map(|dead| &dead.owner);
    let has_units = owners.any(|owner| belongs(&owner.process.cgroup));
    let mut header = vec!["PROCESS", "FD"];
    header.extend(has_units.then_some("UNIT"));
    header.extend(["LOCAL", "QUIET", "DEAD BY"]);
    header.push(match config.action {
        Action::Act => "RESULT",
        Action::List | Action::DryRun => "MAY BE TAKEN",
    });
    if !config.no_header {
        table.set_header(header);
    }
    for dead in &run.descriptors {
        let DeadDescriptor { owner, socket, .. } = dead;
        let mut cells = vec![Cell::new(&owner.process), Cell::new(owner.fd.0)];
        if has_units {
            let unit = belongs_to(&owner.process.cgroup, config.verbose);
            cells.push(Cell::new(unit));
        }
        cells.extend([
            Cell::new(socket.local.map_or("-".into(), |local| local.to_string())),
            Cell::new(age(socket.quiet)),
            Cell::new(DEAD_BY_TEXT),
        ]);
        let (text, color) = match (run.acted, owner.reclaim.as_ref()) {
            (true, outcome) => result(outcome),
            (false, outcome) => match outcome.and_then(ReclaimOutcome::reason) {
                None => ("yes".to_owned(), Color::Green),
                Some(reason) => (format!("no: {reason}"), Color::Yellow),
            },
        };
        cells.push(Cell::new(text).fg(color));
        table.add_row(cells);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
        if column.index == 3 + usize::from(has_units) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    for line in table.lines() {
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(())
}

/// How a descriptor is known to be dead.
const DEAD_BY_TEXT: &str = "state close, in no TCP table";

/// The outcome of an act in words, and its colour.
pub(crate) fn result(outcome: Option<&ReclaimOutcome>) -> (String, Color) {
    match outcome {
        Some(ReclaimOutcome::Freed) => ("freed".into(), Color::Green),
        Some(ReclaimOutcome::Gone) => ("gone before the act".into(), Color::Green),
        Some(ReclaimOutcome::Skipped(reason)) => (format!("skipped: {reason}"), Color::Yellow),
        Some(ReclaimOutcome::Failed(reason)) => (format!("failed: {reason}"), Color::Red),
        Some(ReclaimOutcome::Allowed) | None => ("not done".into(), Color::Red),
    }
}

/// One line that says how it went.
pub fn summary(run: &ReclaimRun, config: &ReclaimConfig) -> String {
    let found = counted(run.descriptors.len(), "dead descriptor");
    if run.acted {
        let tally = Tally::of_descriptors(run);
        return format!("{found}: {} freed{}", tally.freed, tally.left());
    }
    let allowed = run.outcomes().filter(|it| **it == ReclaimOutcome::Allowed);
    let mut line = format!("{found}, {} may be taken", allowed.count());
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
            "{} of TCP may be dead and could not be looked at",
            counted(run.unknown, "more descriptor")
        ));
    }
    if run.unreadable > 0 {
        notes.push(format!(
            "{} could not be looked into",
            counted(run.unreadable, "process")
        ));
    }
    for process in &run.leader_exited {
        notes.push(format!(
            "{process} could not be looked into: its first thread has ended, so its descriptors cannot be seen"
        ));
    }
    if let Some((pid, error)) = run.failed.first() {
        notes.push(format!(
            "{} could not be looked into (the first is {pid}: {error})",
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

#[derive(Serialize)]
struct Document<'a> {
    schema_version: u32,
    cwkill_version: &'static str,
    dry_run: bool,
    descriptors: Vec<Descriptor<'a>>,
    owners: Vec<JsonStop<'a>>,
    unknown: usize,
    unreadable_processes: usize,
    hidden_processes: bool,
    summary: Tally,
}

#[derive(Serialize)]
struct Line<'a> {
    schema_version: u32,
    #[serde(flatten)]
    descriptor: Descriptor<'a>,
}

/// A descriptor, as it was found and as it ended.
#[derive(Serialize)]
pub struct Descriptor<'a> {
    pid: i32,
    comm: &'a str,
    unit: Option<&'a str>,
    container: Option<JsonContainer<'a>>,
    fd: i32,
    inode: u32,
    pub(crate) cookie: String,
    local: Option<Endpoint>,
    quiet_ms: u64,
    unread: u32,
    dead_by: &'static str,
    /// `None`: it is acted upon, and `outcome` says how that ends.
    safe: Option<bool>,
    outcome: Option<&'static str>,
    reason: Option<String>,
    reason_code: Option<&'static str>,
}

impl Descriptor<'_> {
    /// Which one it is, for people.
    pub(crate) fn sentence(&self) -> String {
        let local = self
            .local
            .as_ref()
            .map_or_else(String::new, |local| format!(", {local}"));
        format!(
            "descriptor {} of {}/{} (socket {}{local})",
            self.fd,
            escape(self.comm),
            self.pid,
            self.inode
        )
    }
}

/// An owner that was stopped.
#[derive(Serialize)]
pub struct JsonStop<'a> {
    pid: i32,
    comm: &'a str,
    freed: usize,
    stopped_us: u64,
}

/// The owners that were stopped, for JSON.
pub fn json_stops(stops: &[StopStats]) -> Vec<JsonStop<'_>> {
    let stops = stops.iter().map(|stop| JsonStop {
        pid: stop.process.id.pid,
        comm: &stop.process.comm,
        freed: stop.freed,
        stopped_us: micros(stop.stopped),
    });
    stops.collect()
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// A descriptor, as programs read it.
pub(crate) fn json_descriptor<'a>(run: &ReclaimRun, dead: &'a DeadDescriptor) -> Descriptor<'a> {
    let DeadDescriptor { owner, socket, .. } = dead;
    let (process, outcome) = (&owner.process, owner.reclaim.as_ref());
    let reason = outcome.and_then(ReclaimOutcome::reason);
    Descriptor {
        pid: process.id.pid,
        comm: &process.comm,
        unit: process.cgroup.unit.as_deref(),
        container: container(process),
        fd: owner.fd.0,
        inode: dead.inode,
        cookie: socket.cookie.to_string(),
        local: socket.local.map(endpoint),
        quiet_ms: u64::try_from(socket.quiet.as_millis()).unwrap_or(u64::MAX),
        unread: socket.unread,
        dead_by: "state-close",
        // Nothing is decided before the act.
        safe: outcome.filter(|_| !run.acted).map(|_| reason.is_none()),
        outcome: outcome.filter(|_| run.acted).map(ReclaimOutcome::name),
        reason: reason.map(ToString::to_string),
        reason_code: reason.map(ReclaimReason::code),
    }
}

/// Writes one document.
///
/// # Errors
/// Those of `out`.
pub fn write_document(run: &ReclaimRun, out: &mut dyn Write) -> io::Result<()> {
    let document = Document {
        schema_version: SCHEMA_VERSION,
        cwkill_version: env!("CARGO_PKG_VERSION"),
        dry_run: !run.acted,
        descriptors: run
            .descriptors
            .iter()
            .map(|dead| json_descriptor(run, dead))
            .collect(),
        owners: json_stops(&run.stops),
        unknown: run.unknown,
        unreadable_processes: run.unreadable + run.leader_exited.len() + run.failed.len(),
        hidden_processes: run.hidden,
        summary: Tally::of_descriptors(run),
    };
    document.serialize(&mut serializer(out))?;
    out.write_all(b"\n")
}

/// Writes one object a line, one line a descriptor.
///
/// # Errors
/// Those of `out`.
pub fn write_lines(run: &ReclaimRun, out: &mut dyn Write) -> io::Result<()> {
    for dead in &run.descriptors {
        let line = Line {
            schema_version: SCHEMA_VERSION,
            descriptor: json_descriptor(run, dead),
        };
        line.serialize(&mut serializer(out))?;
        out.write_all(b"\n")?;
    }
    Ok(())
}
