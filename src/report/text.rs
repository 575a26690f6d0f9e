//! The report for people: a table, a summary line, and notes on what closing a socket does not do.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io::{self, Write};
use std::time::Duration;

use comfy_table::{Cell, CellAlignment, Color, ContentArrangement, Table, presets};

use super::Tally;
use super::escape::escape;
use crate::config::{Action, Config};
use crate::diagnosis::Cause;
use crate::finder::cgroup::{Cgroup, unescape};
use crate::finder::{Found, Held, Socket};
use crate::injector::ActError;
use crate::injector::ladder::{Outcome, Verdict};
use crate::pipeline::Run;
use crate::plan::{LeftOut, Plan};
use crate::privileges::Need;

/// Rows that are laid out together: enough for stable columns, few enough that a listing of 100,000
/// sockets starts at once and stays small in memory.
const BLOCK: usize = 1000;

/// Writes the table and the summary.
///
/// # Errors
/// Those of `out`.
pub fn write(run: &Run, config: &Config, color: bool, out: &mut dyn Write) -> io::Result<()> {
    let layout = Layout::new(run, config);
    let rows: Vec<usize> = (0..run.found.sockets.len()).collect();
    let mut header = !config.no_header;
    let mut widths = Vec::new();
    for block in rows.chunks(BLOCK) {
        layout.write_block(run, block, header, color, &mut widths, out)?;
        header = false;
    }
    writeln!(out, "{}", summary(run, config))
}

/// Which columns there are.
struct Layout {
    whose: bool,
    state: bool,
    last: Option<&'static str>,
    verbose: bool,
}

impl Layout {
    fn new(run: &Run, config: &Config) -> Self {
        let states: BTreeSet<&str> = run.found.sockets.iter().map(|s| s.state.name()).collect();
        let belongs = |cgroup: &Cgroup| cgroup.unit.is_some() || cgroup.container.is_some();
        Layout {
            whose: run.found.processes.iter().any(|p| belongs(&p.cgroup)),
            state: states.len() > 1 || states.iter().any(|state| *state != "close-wait"),
            last: match config.action {
                Action::List => None,
                Action::DryRun => Some("PLAN"),
                Action::Act => Some("RESULT"),
            },
            verbose: config.verbose,
        }
    }

    fn names(&self) -> Vec<&'static str> {
        let mut names = vec!["PROCESS", "FD"];
        names.extend(self.whose.then_some("UNIT"));
        names.extend(self.state.then_some("STATE"));
        names.extend(["LOCAL", "PEER", "AGE", "RECV-Q", "SEND-Q", "CAUSE"]);
        names.extend(self.last);
        names
    }

    /// Writes a block of rows; `widths` grows to what the widest cell so far needs, so that columns
    /// stay aligned from block to block.
    fn write_block(
        &self,
        run: &Run,
        rows: &[usize],
        header: bool,
        color: bool,
        widths: &mut Vec<u16>,
        out: &mut dyn Write,
    ) -> io::Result<()> {
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        table.set_content_arrangement(ContentArrangement::Disabled);
        table.force_no_tty();
        if color {
            table.enforce_styling();
        }
        if header {
            table.set_header(self.names());
        }
        for &row in rows {
            table.add_row(self.cells(run, row));
        }
        table.discover_columns();
        let needed = table.column_max_content_widths();
        widths.resize(needed.len(), 0);
        for (width, needed) in widths.iter_mut().zip(needed) {
            *width = needed.max(*width);
        }
        let right = ["AGE", "RECV-Q", "SEND-Q"];
        for ((column, name), width) in table.column_iter_mut().zip(self.names()).zip(&*widths) {
            column.set_padding((0, 2));
            column.set_constraint(comfy_table::ColumnConstraint::LowerBoundary(
                comfy_table::Width::Fixed(width + 2),
            ));
            if right.contains(&name) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        for line in table.lines() {
            writeln!(out, "{}", line.trim_end())?;
        }
        Ok(())
    }

    fn cells(&self, run: &Run, row: usize) -> Vec<Cell> {
        let socket = &run.found.sockets[row];
        let (process, fd) = owner_cells(&run.found, socket, self.verbose);
        let mut cells = vec![Cell::new(process), Cell::new(fd)];
        if self.whose {
            cells.push(Cell::new(whose(&run.found, socket, self.verbose)));
        }
        if self.state {
            cells.push(Cell::new(socket.state));
        }
        cells.extend([
            Cell::new(socket.tuple.local),
            Cell::new(socket.tuple.peer),
            Cell::new(socket.age.map_or("-".into(), age)),
            Cell::new(socket.recv_q),
            Cell::new(socket.send_q),
            Cell::new(socket.cause),
        ]);
        match &run.deeds {
            Some(deeds) => cells.push(result_cell(&deeds[row].outcome, self.verbose)),
            None if self.last.is_some() => cells.push(Cell::new(plan_text(&run.plans[row]))),
            None => {}
        }
        cells
    }
}

/// Who holds the socket, and as which descriptor.
fn owner_cells(found: &Found, socket: &Socket, verbose: bool) -> (String, String) {
    if socket.cause == Cause::Orphan {
        return ("(orphan)".into(), "-".into());
    }
    if let Some(listener) = socket.listener {
        let owners = &found.listeners[listener].owners;
        let (process, _) = names(found, owners, verbose);
        return (format!("{process} (listener)"), "-".into());
    }
    names(found, &socket.owners, verbose)
}

/// The first of `held`, or all of them.
fn names(found: &Found, held: &[Held], all: bool) -> (String, String) {
    if held.is_empty() {
        return ("unknown".into(), "-".into());
    }
    let shown = if all { held } else { &held[..1] };
    let (mut processes, mut fds) = (String::new(), String::new());
    for (index, held) in shown.iter().enumerate() {
        let process = &found.processes[held.process];
        let separator = if index == 0 { "" } else { "," };
        let comm = escape(&process.comm);
        let _ = write!(processes, "{separator}{comm}/{}", process.pid);
        let _ = write!(fds, "{separator}{}", held.fd.0);
    }
    if held.len() > shown.len() {
        let _ = write!(processes, " +{}", held.len() - shown.len());
    }
    (processes, fds)
}

/// The container or the unit of the first owner, or of all of them.
fn whose(found: &Found, socket: &Socket, all: bool) -> String {
    let held = match socket.listener {
        Some(listener) => &found.listeners[listener].owners,
        None => &socket.owners,
    };
    let shown = if all {
        &held[..]
    } else {
        &held[..held.len().min(1)]
    };
    let mut names: Vec<String> = Vec::new();
    for held in shown {
        let cgroup = &found.processes[held.process].cgroup;
        let name = match (&cgroup.container, &cgroup.unit) {
            (Some(container), _) => match &container.pod_uid {
                Some(pod) if all => format!("{container} pod {pod}"),
                _ => container.to_string(),
            },
            (None, Some(unit)) => unescape(unit.strip_suffix(".service").unwrap_or(unit)),
            (None, None) => "-".to_owned(),
        };
        let name = escape(&name);
        if !names.contains(&name) {
            names.push(name);
        }
    }
    match names.is_empty() {
        true => "-".to_owned(),
        false => names.join(","),
    }
}

/// A duration in its two largest units.
fn age(age: Duration) -> String {
    let seconds = age.as_secs();
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3_600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) if seconds == 0 => format!("{}ms", age.as_millis()),
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m{:02}s", seconds % 60),
        (0, _, _) => format!("{hours}h{minutes:02}m"),
        _ => format!("{days}d{hours:02}h"),
    }
}

fn plan_text(plan: &Plan) -> String {
    if plan.over_limit {
        return "skip: over --max-kills".into();
    }
    if plan.methods.is_empty() {
        return format!("skip: {}", left_out_text(&plan.left_out));
    }
    let methods: Vec<&str> = plan.methods.iter().map(|method| method.name()).collect();
    methods.join(", then ")
}

fn left_out_text(left_out: &[(crate::injector::MethodName, LeftOut)]) -> String {
    let parts = left_out
        .iter()
        .map(|(method, why)| format!("{method}: {why}"));
    parts.collect::<Vec<_>>().join("; ")
}

fn result_cell(outcome: &Outcome, verbose: bool) -> Cell {
    let attempts = || {
        let failed = outcome.attempts.iter().filter_map(|attempt| {
            let error = attempt.error.as_ref()?;
            Some(format!("{}: {error}", attempt.method))
        });
        failed.collect::<Vec<_>>().join("; ")
    };
    let (mut text, color) = match &outcome.verdict {
        Verdict::Closed(method) => (format!("closed by {method}"), Color::Green),
        Verdict::Closing(method, state) => (
            format!("closing: {state} after {method}, the peer has not answered"),
            Color::Yellow,
        ),
        Verdict::Gone => ("gone before the act".into(), Color::Green),
        Verdict::Skipped(why) => (format!("skipped: {why}"), Color::Yellow),
        Verdict::Failed => (format!("failed: {}", attempts()), Color::Red),
    };
    if verbose && !matches!(outcome.verdict, Verdict::Failed) && !attempts().is_empty() {
        let _ = write!(text, " ({})", attempts());
    }
    Cell::new(text).fg(color)
}

/// One line that says how it went.
fn summary(run: &Run, config: &Config) -> String {
    let tally = Tally::of(run);
    let sockets = |count| match count {
        1 => "1 socket".to_owned(),
        _ => format!("{count} sockets"),
    };
    if run.deeds.is_none() {
        let mut line = format!("{} stuck", sockets(tally.matched));
        let mut causes: BTreeMap<Cause, usize> = BTreeMap::new();
        for socket in &run.found.sockets {
            *causes.entry(socket.cause).or_default() += 1;
        }
        for (index, (cause, count)) in causes.into_iter().enumerate() {
            let separator = if index == 0 { ": " } else { ", " };
            let _ = write!(line, "{separator}{count} {cause}");
        }
        if config.action == Action::DryRun {
            line.push_str("; dry run, nothing was done");
        }
        return line;
    }
    let mut line = format!(
        "{} matched: {} closed",
        sockets(tally.matched),
        tally.closed
    );
    for (count, name) in [
        (tally.closing, "closing"),
        (tally.gone, "gone"),
        (tally.skipped, "skipped"),
        (tally.failed, "failed"),
    ] {
        if count > 0 {
            let _ = write!(line, ", {count} {name}");
        }
    }
    line
}

/// What the operator should know beside the result, one note a line.
pub fn notes(run: &Run) -> Vec<String> {
    let mut notes = Vec::new();
    let Some(deeds) = &run.deeds else {
        let unaccepted = run
            .found
            .sockets
            .iter()
            .filter(|s| s.cause == Cause::NotAccepted);
        let listeners: BTreeSet<usize> = unaccepted.filter_map(|s| s.listener).collect();
        for listener in listeners.into_iter().map(|at| &run.found.listeners[at]) {
            let (owner, _) = names(&run.found, &listener.owners, false);
            notes.push(format!(
                "{owner} does not accept what comes to {}: backlog {}/{}",
                listener.local, listener.waiting, listener.backlog
            ));
        }
        notes.extend(unknown_owners(run));
        return notes;
    };

    let mut descriptors: BTreeMap<usize, usize> = BTreeMap::new();
    let mut backlogs: BTreeMap<usize, usize> = BTreeMap::new();
    for (socket, deed) in run.found.sockets.iter().zip(deeds) {
        for &owner in &deed.open_descriptors {
            *descriptors.entry(socket.owners[owner].process).or_default() += 1;
        }
        if let (Verdict::Closed(_), Cause::NotAccepted, Some(listener)) =
            (&deed.outcome.verdict, socket.cause, socket.listener)
        {
            *backlogs.entry(listener).or_default() += 1;
        }
    }
    for (process, count) in descriptors {
        let process = &run.found.processes[process];
        notes.push(format!(
            "{}/{} still has {count} descriptor{} of closed sockets open: closing a socket does not free \
             the descriptor, only the process can",
            escape(&process.comm),
            process.pid,
            plural(count),
        ));
    }
    for (listener, count) in backlogs {
        let listener = &run.found.listeners[listener];
        let (owner, _) = names(&run.found, &listener.owners, false);
        notes.push(format!(
            "{count} closed connection{} still take{} a slot in the backlog of {} ({owner}, backlog \
             {}/{}): only its accept() frees them",
            plural(count),
            if count == 1 { "s" } else { "" },
            listener.local,
            listener.waiting,
            listener.backlog,
        ));
    }
    notes.extend(unknown_owners(run));
    notes
}

/// Sockets whose owner could not be told.
fn unknown_owners(run: &Run) -> Option<String> {
    let unknown = run
        .found
        .sockets
        .iter()
        .filter(|socket| socket.inode.is_some() && socket.owners.is_empty())
        .count();
    (unknown > 0).then(|| {
        format!(
            "{unknown} socket{} without a known owner; {} process{} could not be looked into: run as \
             root, in the pid namespace of the owner",
            plural(unknown),
            run.found.unreadable_processes,
            if run.found.unreadable_processes == 1 { "" } else { "es" },
        )
    })
}

/// The privileges whose lack kept a socket open, or would.
pub fn missing_privileges(run: &Run) -> BTreeSet<Need> {
    let mut needs = BTreeSet::new();
    for (at, plan) in run.plans.iter().enumerate() {
        let done = match &run.deeds {
            None => !plan.methods.is_empty(),
            Some(deeds) => matches!(
                deeds[at].outcome.verdict,
                Verdict::Closed(_) | Verdict::Gone
            ),
        };
        if done || plan.over_limit {
            continue;
        }
        needs.extend(plan.left_out.iter().filter_map(|(_, why)| match why {
            LeftOut::Needs(need) => Some(*need),
            _ => None,
        }));
        for attempt in run.deeds.iter().flat_map(|d| &d[at].outcome.attempts) {
            if let Some(ActError::Denied(need, _)) = attempt.error {
                needs.insert(need);
            }
        }
    }
    needs
}

fn plural(count: usize) -> &'static str {
    if count == 1 { "" } else { "s" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_show_two_units() {
        let text = |seconds| age(Duration::from_secs(seconds));
        assert_eq!(age(Duration::from_millis(7)), "7ms");
        assert_eq!(text(59), "59s");
        assert_eq!(text(60), "1m00s");
        assert_eq!(text(3_725), "1h02m");
        assert_eq!(text(90_000), "1d01h");
    }
}
