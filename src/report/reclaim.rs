//! The report of `cwkill reclaim`, for people and for programs, and what `--reclaim` adds to that of
//! the main job.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::time::Duration;

use comfy_table::{Cell, CellAlignment, Color};
use serde::Serialize;

use super::ExitStatus;
use super::escape::escape;
use super::json::{Endpoint, JsonContainer, SCHEMA_VERSION, container, endpoint, serializer};
use super::text::{age, belongs, belongs_to, plain_table};
use crate::config::Action;
use crate::pipeline::Reclaimed;
use crate::reclaim::command::{Config, Run};
use crate::reclaim::{Reason, ReclaimOutcome, StopStats};

/// The number of descriptors per outcome.
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
    /// Counts.
    pub fn of<'o>(found: usize, outcomes: impl Iterator<Item = &'o ReclaimOutcome>) -> Self {
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

    /// Counts what `--reclaim` did.
    pub fn of_run(reclaimed: &Reclaimed) -> Self {
        let outcomes = || reclaimed.outcomes.iter().flatten().flatten();
        Self::of(outcomes().count(), outcomes())
    }

    /// Counts what `cwkill reclaim` did.
    pub fn of_command(run: &Run) -> Self {
        let outcomes = run.descriptors.iter().filter_map(|d| d.outcome.as_ref());
        Self::of(run.descriptors.len(), outcomes.filter(|_| run.acted))
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
pub fn exit_status(run: &Run) -> ExitStatus {
    let unseen = run.has_blind_spots();
    match run.acted {
        _ if run.descriptors.is_empty() && unseen => ExitStatus::NotAllClosed,
        _ if run.descriptors.is_empty() => ExitStatus::NothingMatched,
        false => ExitStatus::Done,
        true => {
            let tally = Tally::of_command(run);
            match tally.skipped + tally.failed {
                0 if !unseen => ExitStatus::Done,
                _ => ExitStatus::NotAllClosed,
            }
        }
    }
}

/// The outcome and its reason, as JSON has them.
pub fn outcome(outcome: &ReclaimOutcome) -> (&'static str, Option<String>) {
    let name = match outcome {
        ReclaimOutcome::Allowed => "would-free",
        ReclaimOutcome::Freed => "freed",
        ReclaimOutcome::Gone => "gone",
        ReclaimOutcome::Skipped(_) => "skipped",
        ReclaimOutcome::Failed(_) => "failed",
    };
    (name, outcome.reason().map(Reason::to_string))
}

/// What the table of the main job adds about a socket's descriptors.
pub fn beside(reclaimed: &Reclaimed, at: usize) -> String {
    let mut freed = 0;
    let mut left = Vec::new();
    for outcome in reclaimed.outcomes[at].iter().flatten() {
        freed += usize::from(*outcome == ReclaimOutcome::Freed);
        left.extend(outcome.reason().map(Reason::to_string));
    }
    left.extend(
        reclaimed.reasons[at]
            .iter()
            .flatten()
            .map(Reason::to_string),
    );
    left.dedup();
    let mut text = match freed {
        0 => String::new(),
        1 => ", descriptor freed".to_owned(),
        _ => format!(", {freed} descriptors freed"),
    };
    if !left.is_empty() {
        let _ = write!(text, "; descriptor kept: {}", left.join("; "));
    }
    text
}

/// The line that `--reclaim` adds to the summary, and those about the owners.
pub fn lines(reclaimed: &Reclaimed) -> Vec<String> {
    let tally = Tally::of_run(reclaimed);
    let counted = super::notes::counted(tally.found, "descriptor");
    let mut lines = vec![format!("{counted}: {} freed{}", tally.freed, tally.left())];
    lines.extend(stops(&reclaimed.stops));
    lines
}

/// One line for each owner that was stopped.
pub fn stops(stops: &[StopStats]) -> Vec<String> {
    let line = |stop: &StopStats| {
        format!(
            "{}/{} was stopped for {:.1} ms: {} freed",
            escape(&stop.process.comm),
            stop.process.pid,
            stop.stopped.as_secs_f64() * 1000.0,
            super::notes::counted(stop.freed, "descriptor"),
        )
    };
    stops.iter().map(line).collect()
}

/// Writes the table and the summary.
///
/// # Errors
/// Those of `out`.
pub fn write(run: &Run, config: &Config, color: bool, out: &mut dyn Write) -> io::Result<()> {
    if !run.descriptors.is_empty() {
        write_table(run, config, color, out)?;
    }
    writeln!(out, "{}", summary(run, config))?;
    for line in stops(&run.stops) {
        writeln!(out, "{line}")?;
    }
    Ok(())
}

fn write_table(run: &Run, config: &Config, color: bool, out: &mut dyn Write) -> io::Result<()> {
    let mut table = plain_table(color);
    let whose = run.descriptors.iter().any(|d| belongs(&d.process.cgroup));
    let mut header = vec!["PROCESS", "FD"];
    header.extend(whose.then_some("UNIT"));
    header.extend(["LOCAL", "QUIET", "DEAD BY"]);
    header.push(match config.action {
        Action::Act => "RESULT",
        Action::List | Action::DryRun => "MAY BE TAKEN",
    });
    if !config.no_header {
        table.set_header(header);
    }
    for target in &run.descriptors {
        let owner = &target.process;
        let mut cells = vec![
            Cell::new(format!("{}/{}", escape(&owner.comm), owner.pid)),
            Cell::new(target.fd.0),
        ];
        if whose {
            cells.push(Cell::new(belongs_to(&owner.cgroup, config.verbose)));
        }
        cells.extend([
            Cell::new(target.local.map_or("-".into(), |local| local.to_string())),
            Cell::new(age(target.age.unwrap_or_default())),
            Cell::new(DEAD_BY_TEXT),
        ]);
        cells.extend(target.outcome.as_ref().map(|outcome| match run.acted {
            true => outcome_cell(outcome),
            false => match outcome.reason() {
                None => Cell::new("yes").fg(Color::Green),
                Some(reason) => Cell::new(format!("no: {reason}")).fg(Color::Yellow),
            },
        }));
        table.add_row(cells);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
        if column.index == 3 + usize::from(whose) {
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

fn outcome_cell(outcome: &ReclaimOutcome) -> Cell {
    match outcome {
        ReclaimOutcome::Allowed => Cell::new("allowed"),
        ReclaimOutcome::Freed => Cell::new("freed").fg(Color::Green),
        ReclaimOutcome::Gone => Cell::new("gone before the act").fg(Color::Green),
        ReclaimOutcome::Skipped(reason) => {
            Cell::new(format!("skipped: {reason}")).fg(Color::Yellow)
        }
        ReclaimOutcome::Failed(reason) => Cell::new(format!("failed: {reason}")).fg(Color::Red),
    }
}

/// One line that says how it went.
pub fn summary(run: &Run, config: &Config) -> String {
    let found = run.descriptors.len();
    let counted = super::notes::counted(found, "dead descriptor");
    match run.acted {
        true => {
            let tally = Tally::of_command(run);
            format!("{counted}: {} freed{}", tally.freed, tally.left())
        }
        false => {
            let allowed = Some(ReclaimOutcome::Allowed);
            let allowed = run.descriptors.iter().filter(|d| d.outcome == allowed);
            let allowed = allowed.count();
            let mut line = format!("{counted}, {allowed} may be taken");
            if config.action == Action::DryRun {
                line.push_str("; dry run, nothing was done");
            }
            line
        }
    }
}

/// What the operator should know beside the results.
pub fn notes(run: &Run) -> Vec<String> {
    let mut notes = Vec::new();
    let counted = super::notes::counted;
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
    for process in &run.headless {
        notes.push(format!(
            "{}/{} could not be looked into: its first thread has ended, so its descriptors cannot be seen",
            escape(&process.comm),
            process.pid
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

/// Whether the lack of a right stood in the way.
pub fn lacks_rights(run: &Run) -> bool {
    let mut outcomes = run.descriptors.iter().filter_map(|d| d.outcome.as_ref());
    run.unknown + run.unreadable > 0
        || run.hidden
        || outcomes.any(|outcome| outcome.reason().and_then(Reason::need).is_some())
}

#[derive(Serialize)]
struct Document<'a> {
    schema_version: u32,
    cwkill_version: &'static str,
    dry_run: bool,
    descriptors: Vec<Descriptor<'a>>,
    owners: Vec<Owner<'a>>,
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
pub struct Owner<'a> {
    pid: i32,
    comm: &'a str,
    freed: usize,
    stopped_us: u64,
}

/// The owners that were stopped, for JSON.
pub fn json_owners(stops: &[StopStats]) -> Vec<Owner<'_>> {
    let stops = stops.iter();
    let owners = stops.map(|stop| Owner {
        pid: stop.process.pid,
        comm: &stop.process.comm,
        freed: stop.freed,
        stopped_us: micros(stop.stopped),
    });
    owners.collect()
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// Every descriptor of a run, in order.
pub(crate) fn descriptors(run: &Run) -> impl Iterator<Item = Descriptor<'_>> {
    run.descriptors.iter().map(|target| {
        let owner = &target.process;
        let (safe, outcome, reason) = match &target.outcome {
            // Nothing is decided before the act.
            None => (None, None, None),
            Some(result) => {
                let (outcome, reason) = outcome(result);
                match run.acted {
                    true => (None, Some(outcome), reason),
                    false => (Some(reason.is_none()), None, reason),
                }
            }
        };
        Descriptor {
            pid: owner.pid,
            comm: &owner.comm,
            unit: owner.cgroup.unit.as_deref(),
            container: container(owner),
            fd: target.fd.0,
            inode: target.inode,
            cookie: target.cookie.to_string(),
            local: target.local.map(endpoint),
            quiet_ms: u64::try_from(target.age.unwrap_or_default().as_millis()).unwrap_or(u64::MAX),
            unread: target.unread,
            dead_by: "state-close",
            safe,
            outcome,
            reason,
        }
    })
}

/// Writes one document.
///
/// # Errors
/// Those of `out`.
pub fn write_document(run: &Run, out: &mut dyn Write) -> io::Result<()> {
    let document = Document {
        schema_version: SCHEMA_VERSION,
        cwkill_version: env!("CARGO_PKG_VERSION"),
        dry_run: !run.acted,
        descriptors: descriptors(run).collect(),
        owners: json_owners(&run.stops),
        unknown: run.unknown,
        unreadable_processes: run.unreadable + run.headless.len() + run.failed.len(),
        hidden_processes: run.hidden,
        summary: Tally::of_command(run),
    };
    document.serialize(&mut serializer(out))?;
    out.write_all(b"\n")
}

/// Writes one object a line, one line a descriptor.
///
/// # Errors
/// Those of `out`.
pub fn write_lines(run: &Run, out: &mut dyn Write) -> io::Result<()> {
    for descriptor in descriptors(run) {
        let line = Line {
            schema_version: SCHEMA_VERSION,
            descriptor,
        };
        line.serialize(&mut serializer(out))?;
        out.write_all(b"\n")?;
    }
    Ok(())
}
