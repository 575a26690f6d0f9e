//! The report of `cwkill reclaim`, for people and for programs, and what `--reclaim` adds to that of
//! the main job.

use std::fmt::Write as _;
use std::io::{self, Write};
use std::time::Duration;

use comfy_table::{Cell, CellAlignment, Color};
use serde::Serialize;

use super::ExitStatus;
use super::json::{Endpoint, JsonContainer, SCHEMA_VERSION, container, endpoint, serializer};
use super::text::{belongs, belongs_to, plain_table};
use crate::config::Action;
use crate::pipeline::Reclaimed;
use crate::proc::Process;
use crate::reclaim::command::{Config, Run};
use crate::reclaim::{Fate, Reason, Visit};
use crate::text::age;
use crate::text::escape;

/// How many descriptors had which fate.
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
    pub fn of<'f>(found: usize, fates: impl Iterator<Item = &'f Fate>) -> Self {
        let mut tally = Tally {
            found,
            ..Tally::default()
        };
        for fate in fates {
            *match fate {
                Fate::Freed => &mut tally.freed,
                Fate::Gone => &mut tally.gone,
                Fate::Skipped(_) => &mut tally.skipped,
                Fate::Failed(_) => &mut tally.failed,
            } += 1;
        }
        tally
    }

    /// Counts what `--reclaim` did.
    pub fn of_run(reclaimed: &Reclaimed) -> Self {
        let fates = || reclaimed.fates.iter().flatten().flatten();
        Self::of(fates().count(), fates())
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
    match &run.fates {
        _ if run.descriptors.is_empty() && unseen => ExitStatus::NotAllClosed,
        _ if run.descriptors.is_empty() => ExitStatus::NothingMatched,
        None => ExitStatus::Done,
        Some(fates) => {
            let tally = Tally::of(fates.len(), fates.iter());
            match tally.skipped + tally.failed {
                0 if !unseen => ExitStatus::Done,
                _ => ExitStatus::NotAllClosed,
            }
        }
    }
}

/// The outcome and its reason, as JSON has them.
pub fn outcome(fate: &Fate) -> (&'static str, Option<String>) {
    match fate {
        Fate::Freed => ("freed", None),
        Fate::Gone => ("gone", None),
        Fate::Skipped(reason) => ("skipped", Some(reason.to_string())),
        Fate::Failed(reason) => ("failed", Some(reason.to_string())),
    }
}

/// What the table of the main job adds about a socket's descriptors.
pub fn beside(reclaimed: &Reclaimed, at: usize) -> String {
    let mut freed = 0;
    let mut left = Vec::new();
    for fate in reclaimed.fates[at].iter().flatten() {
        match fate {
            Fate::Freed => freed += 1,
            Fate::Gone => {}
            Fate::Skipped(reason) | Fate::Failed(reason) => left.push(reason.to_string()),
        }
    }
    left.extend(reclaimed.doubts[at].iter().flatten().map(Reason::to_string));
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
pub fn lines(owners: &[Process], reclaimed: &Reclaimed) -> Vec<String> {
    let tally = Tally::of_run(reclaimed);
    let counted = crate::text::counted(tally.found, "descriptor");
    let mut lines = vec![format!("{counted}: {} freed{}", tally.freed, tally.left())];
    lines.extend(visits(owners, &reclaimed.visits));
    lines
}

/// One line for each owner that was stopped.
pub fn visits(owners: &[Process], visits: &[Visit]) -> Vec<String> {
    let line = |visit: &Visit| {
        let owner = &owners[visit.owner];
        format!(
            "{}/{} was stopped for {:.1} ms: {} freed",
            escape(&owner.comm),
            owner.pid,
            visit.stopped.as_secs_f64() * 1000.0,
            crate::text::counted(visit.freed, "descriptor"),
        )
    };
    visits.iter().map(line).collect()
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
    for line in visits(&run.owners, &run.visits) {
        writeln!(out, "{line}")?;
    }
    Ok(())
}

fn write_table(run: &Run, config: &Config, color: bool, out: &mut dyn Write) -> io::Result<()> {
    let mut table = plain_table(color);
    let whose = run
        .descriptors
        .iter()
        .any(|d| belongs(&run.owners[d.wanted.owner].cgroup));
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
    for (at, dead) in run.descriptors.iter().enumerate() {
        let owner = &run.owners[dead.wanted.owner];
        let mut cells = vec![
            Cell::new(format!("{}/{}", escape(&owner.comm), owner.pid)),
            Cell::new(dead.wanted.fd.0),
        ];
        if whose {
            cells.push(Cell::new(belongs_to(&owner.cgroup, config.verbose)));
        }
        cells.extend([
            Cell::new(
                dead.socket
                    .local
                    .map_or("-".into(), |local| local.to_string()),
            ),
            Cell::new(age(dead.socket.quiet)),
            Cell::new(DEAD_BY_TEXT),
        ]);
        cells.push(match &run.fates {
            None => match &run.doubts[at] {
                None => Cell::new("yes").fg(Color::Green),
                Some(reason) => Cell::new(format!("no: {reason}")).fg(Color::Yellow),
            },
            Some(fates) => fate_cell(&fates[at]),
        });
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

fn fate_cell(fate: &Fate) -> Cell {
    match fate {
        Fate::Freed => Cell::new("freed").fg(Color::Green),
        Fate::Gone => Cell::new("gone before the act").fg(Color::Green),
        Fate::Skipped(reason) => Cell::new(format!("skipped: {reason}")).fg(Color::Yellow),
        Fate::Failed(reason) => Cell::new(format!("failed: {reason}")).fg(Color::Red),
    }
}

/// One line that says how it went.
pub fn summary(run: &Run, config: &Config) -> String {
    let found = run.descriptors.len();
    let counted = crate::text::counted(found, "dead descriptor");
    match &run.fates {
        Some(fates) => {
            let tally = Tally::of(found, fates.iter());
            format!("{counted}: {} freed{}", tally.freed, tally.left())
        }
        None => {
            let allowed = run.doubts.iter().filter(|doubt| doubt.is_none()).count();
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
    let counted = crate::text::counted;
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
    let denied = |fate: &Fate| match fate {
        Fate::Skipped(reason) | Fate::Failed(reason) => reason.need().is_some(),
        Fate::Freed | Fate::Gone => false,
    };
    run.unknown + run.unreadable > 0
        || run.hidden
        || run
            .doubts
            .iter()
            .flatten()
            .any(|reason| reason.need().is_some())
        || run.fates.iter().flatten().any(denied)
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
pub fn json_owners<'a>(owners: &'a [Process], visits: &[Visit]) -> Vec<Owner<'a>> {
    let owner = |visit: &Visit| Owner {
        pid: owners[visit.owner].pid,
        comm: &owners[visit.owner].comm,
        freed: visit.freed,
        stopped_us: micros(visit.stopped),
    };
    visits.iter().map(owner).collect()
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// Every descriptor of a run, in order.
pub(crate) fn descriptors(run: &Run) -> impl Iterator<Item = Descriptor<'_>> {
    run.descriptors.iter().enumerate().map(|(at, dead)| {
        let owner = &run.owners[dead.wanted.owner];
        let (safe, outcome, reason) = match &run.fates {
            Some(fates) => {
                let (outcome, reason) = outcome(&fates[at]);
                (None, Some(outcome), reason)
            }
            None => {
                // Before the act nobody has judged.
                let doubt = run.doubts.get(at);
                let safe = doubt.map(Option::is_none);
                (
                    safe,
                    None,
                    doubt.and_then(|doubt| Some(doubt.as_ref()?.to_string())),
                )
            }
        };
        Descriptor {
            pid: owner.pid,
            comm: &owner.comm,
            unit: owner.cgroup.unit.as_deref(),
            container: container(owner),
            fd: dead.wanted.fd.0,
            inode: dead.wanted.inode,
            cookie: dead.wanted.cookie.to_string(),
            local: dead.socket.local.map(endpoint),
            quiet_ms: u64::try_from(dead.socket.quiet.as_millis()).unwrap_or(u64::MAX),
            unread: dead.socket.unread,
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
        dry_run: run.fates.is_none(),
        descriptors: descriptors(run).collect(),
        owners: json_owners(&run.owners, &run.visits),
        unknown: run.unknown,
        unreadable_processes: run.unreadable + run.leader_exited.len() + run.failed.len(),
        hidden_processes: run.hidden,
        summary: Tally::of(run.descriptors.len(), run.fates.iter().flatten()),
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
