//! The report for people: a table, a summary line, and notes on what closing a socket does not do.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io::{self, Write};
use std::time::Duration;

use comfy_table::{Cell, CellAlignment, Color, ContentArrangement, Table, presets};

use super::escape::escape;
use super::{Tally, reclaim, sockets};
use crate::config::{Action, Config};
use crate::diagnosis::Cause;
use crate::finder::cgroup::{Cgroup, unescape};
use crate::finder::{Found, Held, Socket};
use crate::injector::ladder::{Outcome, Verdict};
use crate::pipeline::Run;
use crate::plan::{LeftOut, Plan};
use crate::tcp::TcpState;

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
    writeln!(out, "{}", summary(run, config))?;
    if let (Some(reclaimed), Action::Act) = (&run.reclaimed, config.action) {
        for line in reclaim::lines(reclaimed) {
            writeln!(out, "{line}")?;
        }
    }
    Ok(())
}

/// Which columns there are.
struct Layout {
    netns: bool,
    whose: bool,
    state: bool,
    last: Option<&'static str>,
    verbose: bool,
}

impl Layout {
    fn new(run: &Run, config: &Config) -> Self {
        let states: BTreeSet<&str> = run.found.sockets.iter().map(|s| s.state.name()).collect();
        Layout {
            netns: run.namespaces.len() > 1,
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
        let mut names = Vec::with_capacity(12);
        names.extend(self.netns.then_some("NETNS"));
        names.extend(["PROCESS", "FD"]);
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
        let mut table = plain_table(color);
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
        let mut cells = Vec::with_capacity(12);
        if self.netns {
            cells.push(Cell::new(escape(&run.namespaces[socket.netns].label())));
        }
        cells.extend([Cell::new(process), Cell::new(fd)]);
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
        let reclaimed = run.reclaimed.as_ref();
        let beside = reclaimed.map_or_else(String::new, |it| reclaim::beside(it, row));
        match &run.deeds {
            Some(deeds) => cells.push(result_cell(&deeds[row].outcome, self.verbose, &beside)),
            None if self.last.is_some() => {
                let then = match &run.reclaimed {
                    Some(_) if run.plans[row].methods.is_empty() => "",
                    Some(_) if !socket.owners.is_empty() && beside.is_empty() => ", then reclaim",
                    _ => &beside,
                };
                cells.push(Cell::new(format!("{}{then}", plan_text(&run.plans[row]))));
            }
            None => {}
        }
        cells
    }
}

/// A table without lines, each column as wide as it needs.
pub(super) fn plain_table(color: bool) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_content_arrangement(ContentArrangement::Disabled);
    table.force_no_tty();
    if color {
        table.enforce_styling();
    }
    table
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

/// The first process of `held` with its first descriptor, or all of them.
pub(super) fn names(found: &Found, held: &[Held], all: bool) -> (String, String) {
    let mut processes: Vec<&[Held]> = held.chunk_by(|a, b| a.process == b.process).collect();
    let (count, of_first) = match processes.first() {
        None if !found.owners_sought => return ("-".into(), "-".into()),
        None => return ("unknown".into(), "-".into()),
        Some(first) => (processes.len(), first.len()),
    };
    if !all {
        processes.truncate(1);
    }
    let name = |held: &&[Held]| {
        let process = &found.processes[held[0].process];
        format!("{}/{}", escape(&process.comm), process.pid)
    };
    let fds = |held: &&[Held]| match all {
        true => join(held.iter().map(|held| held.fd.0.to_string()), ","),
        false => held[0].fd.0.to_string(),
    };
    let mut names = join(processes.iter().map(name), ",");
    let mut fds = join(processes.iter().map(fds), " ");
    if !all && count > 1 {
        let _ = write!(names, " +{}", count - 1);
    }
    if !all && of_first > 1 {
        let _ = write!(fds, " +{}", of_first - 1);
    }
    (names, fds)
}

fn join(parts: impl Iterator<Item = String>, separator: &str) -> String {
    parts.collect::<Vec<_>>().join(separator)
}

/// The container or the unit of a process.
pub(crate) fn place(cgroup: &Cgroup) -> Option<String> {
    match (&cgroup.container, &cgroup.unit) {
        (Some(container), _) => Some(container.to_string()),
        (None, Some(unit)) => Some(unescape(unit.strip_suffix(".service").unwrap_or(unit))),
        (None, None) => None,
    }
}

/// The container or the unit of the first owner, or of all of them.
pub(crate) fn whose(found: &Found, socket: &Socket, all: bool) -> String {
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
        let name = belongs_to(&found.processes[held.process].cgroup, all);
        if !names.contains(&name) {
            names.push(name);
        }
    }
    match names.is_empty() {
        true => "-".to_owned(),
        false => names.join(","),
    }
}

/// Whether a process has a unit or a container.
pub(super) fn belongs(cgroup: &Cgroup) -> bool {
    cgroup.unit.is_some() || cgroup.container.is_some()
}

/// The container or the unit of a process.
pub(super) fn belongs_to(cgroup: &Cgroup, all: bool) -> String {
    let mut name = place(cgroup).unwrap_or_else(|| "-".to_owned());
    if let Some(pod) = cgroup.container.as_ref().and_then(|c| c.pod_uid.as_ref())
        && all
    {
        let _ = write!(name, " pod {pod}");
    }
    escape(&name)
}

/// A duration in its two largest units.
pub fn age(age: Duration) -> String {
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
    join(parts, "; ")
}

fn result_cell(outcome: &Outcome, verbose: bool, beside: &str) -> Cell {
    let (text, color) = result(outcome, verbose);
    Cell::new(text + beside).fg(color)
}

/// The outcome in words, and its colour.
pub(crate) fn result(outcome: &Outcome, verbose: bool) -> (String, Color) {
    let attempts = || {
        let failed = outcome.attempts.iter().filter_map(|attempt| {
            let error = attempt.error.as_ref()?;
            Some(format!("{}: {error}", attempt.method))
        });
        join(failed, "; ")
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
    (text, color)
}

/// One line that says how it went.
pub fn summary(run: &Run, config: &Config) -> String {
    let tally = Tally::of(run);
    if run.deeds.is_none() {
        let close_wait = |socket: &Socket| socket.state == TcpState::CloseWait;
        let mut line = match run.found.sockets.iter().all(close_wait) {
            true => format!("{} stuck", sockets(tally.matched)),
            false => format!("{} matched", sockets(tally.matched)),
        };
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
    tally.sentence()
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
