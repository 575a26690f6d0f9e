//! The report for people: a table and a summary line.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io::{self, Write};

use comfy_table::{Cell, CellAlignment, Color};

use super::table::{has_unit, join, names, plain_table, unit_text};
use super::{Run, SocketCounts, descriptors};
use crate::config::{Action, Config};
use crate::model::{Cause, Outcome, Plan, Scan, SkipReason, Target};
use crate::tcp::TcpState;
use crate::text::{age, counted, escape};

/// Number of rows that are laid out together. It is large enough for stable columns, and small enough that a listing of
/// 100,000 sockets begins at once and needs little memory.
const BLOCK: usize = 1000;

/// Writes the table and the summary.
pub fn write(run: &Run, config: &Config, color: bool, out: &mut dyn Write) -> io::Result<()> {
    let layout = Layout::new(run, config);
    let mut header = !config.no_header;
    let mut widths = Vec::new();
    for block in run.scan.targets.chunks(BLOCK) {
        layout.write_block(run, block, header, color, &mut widths, out)?;
        header = false;
    }
    writeln!(out, "{}", summary(run, config))?;
    if run.reclaim_requested && run.acted {
        for line in descriptors::lines(&run.scan, &run.stops) {
            writeln!(out, "{line}")?;
        }
    }
    Ok(())
}

/// The optional columns of the table.
struct Layout {
    netns: bool,
    units: bool,
    state: bool,
    last: Option<&'static str>,
    verbose: bool,
}

impl Layout {
    fn new(run: &Run, config: &Config) -> Self {
        let scan = &run.scan;
        let states: BTreeSet<&str> = scan.targets.iter().map(|t| t.socket.state.name()).collect();
        Layout {
            netns: scan.namespaces.len() > 1,
            units: scan.processes().values().any(|p| has_unit(&p.cgroup)),
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
        names.extend(self.units.then_some("UNIT"));
        names.extend(self.state.then_some("STATE"));
        names.extend(["LOCAL", "PEER", "AGE", "RECV-Q", "SEND-Q", "CAUSE"]);
        names.extend(self.last);
        names
    }

    /// Writes a block of rows. `widths` has the width of the widest cell of each column so far, so that the columns of
    /// all blocks are aligned.
    fn write_block(
        &self,
        run: &Run,
        rows: &[Target],
        header: bool,
        color: bool,
        widths: &mut Vec<u16>,
        out: &mut dyn Write,
    ) -> io::Result<()> {
        let mut table = plain_table(color);
        if header {
            table.set_header(self.names());
        }
        for target in rows {
            table.add_row(self.cells(run, target));
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

    fn cells(&self, run: &Run, target: &Target) -> Vec<Cell> {
        let (scan, socket) = (&run.scan, &target.socket);
        let (process, fd) = owner_cells(scan, target, self.verbose);
        let mut cells = Vec::with_capacity(12);
        if self.netns {
            cells.push(Cell::new(escape(&scan.netns(target).label())));
        }
        cells.extend([Cell::new(process), Cell::new(fd)]);
        if self.units {
            cells.push(Cell::new(units(scan, target, self.verbose)));
        }
        if self.state {
            cells.push(Cell::new(socket.state));
        }
        cells.extend([
            Cell::new(socket.tuple().local),
            Cell::new(socket.tuple().peer),
            Cell::new(socket.age.map_or("-".into(), age)),
            Cell::new(socket.recv_q),
            Cell::new(socket.send_q),
            Cell::new(socket.cause),
        ]);
        let descriptors = descriptors::target_text(target);
        if let Some((text, color)) = result(target, self.verbose) {
            cells.push(Cell::new(text + &descriptors).fg(color));
        } else if self.last.is_some() {
            let then = match target.plan.skip {
                Some(_) if run.reclaim_requested => "",
                None if run.reclaim_requested
                    && !target.owners.is_empty()
                    && descriptors.is_empty() =>
                {
                    ", then reclaim"
                }
                _ => &descriptors,
            };
            cells.push(Cell::new(format!("{}{then}", plan_text(&target.plan))));
        }
        cells
    }
}

/// The cells for the owner of a socket and for its descriptor.
fn owner_cells(scan: &Scan, target: &Target, verbose: bool) -> (String, String) {
    if target.socket.cause == Cause::Orphan {
        return ("(orphan)".into(), "-".into());
    }
    if let Some(listener) = scan.listener(target) {
        let (process, _) = names(scan, &listener.owners, verbose);
        return (format!("{process} (listener)"), "-".into());
    }
    names(scan, &target.owners, verbose)
}

/// The container or the unit of the first owner; with `all`, of all owners.
pub(crate) fn units(scan: &Scan, target: &Target, all: bool) -> String {
    let owners = scan.responsible(target);
    let shown = match all {
        true => owners,
        false => &owners[..owners.len().min(1)],
    };
    let mut names: Vec<String> = Vec::new();
    for owner in shown {
        let name = unit_text(&owner.process.cgroup, all);
        if !names.contains(&name) {
            names.push(name);
        }
    }
    match names.is_empty() {
        true => "-".to_owned(),
        false => names.join(","),
    }
}

fn plan_text(plan: &Plan) -> String {
    match plan.skip {
        Some(reason) => format!("skip: {}", skip_reason(plan, reason)),
        None => {
            let methods: Vec<&str> = plan.methods.iter().map(|method| method.name()).collect();
            methods.join(", then ")
        }
    }
}

/// The reason for the skip of a target with this plan.
pub(super) fn skip_reason(plan: &Plan, reason: SkipReason) -> String {
    match reason {
        SkipReason::NoMethod => {
            let reasons = plan.excluded.iter();
            join(
                reasons.map(|(method, why)| format!("{method}: {why}")),
                "; ",
            )
        }
        reason => reason.to_string(),
    }
}

/// The outcome in words, and its colour; `None` in a listing or dry run.
pub(crate) fn result(target: &Target, verbose: bool) -> Option<(String, Color)> {
    let attempts = || {
        let failed = target.attempts.iter().filter_map(|attempt| {
            let error = attempt.error.as_ref()?;
            Some(format!("{}: {error}", attempt.method))
        });
        join(failed, "; ")
    };
    let outcome = target.outcome?;
    let (mut text, color) = match outcome {
        Outcome::Closed(method) => (format!("closed by {method}"), Color::Green),
        Outcome::Closing(method, state) => (
            format!("closing: {state} after {method}, the peer has not answered"),
            Color::Yellow,
        ),
        Outcome::Gone => ("gone before the act".into(), Color::Green),
        Outcome::Skipped(why) => (
            format!("skipped: {}", skip_reason(&target.plan, why)),
            Color::Yellow,
        ),
        Outcome::Failed => (format!("failed: {}", attempts()), Color::Red),
    };
    if verbose && outcome != Outcome::Failed && !attempts().is_empty() {
        let _ = write!(text, " ({})", attempts());
    }
    Some((text, color))
}

/// The line after the table.
pub fn summary(run: &Run, config: &Config) -> String {
    let counts = SocketCounts::of(run);
    if run.acted {
        return counts.sentence();
    }
    let sockets = || run.scan.targets.iter().map(|target| &target.socket);
    let mut line = match sockets().all(|socket| socket.state == TcpState::CloseWait) {
        true => format!("{} stuck", counted(counts.matched, "socket")),
        false => format!("{} matched", counted(counts.matched, "socket")),
    };
    let mut causes: BTreeMap<Cause, usize> = BTreeMap::new();
    for socket in sockets() {
        *causes.entry(socket.cause).or_default() += 1;
    }
    for (index, (cause, count)) in causes.into_iter().enumerate() {
        let separator = if index == 0 { ": " } else { ", " };
        let _ = write!(line, "{separator}{count} {cause}");
    }
    if config.action == Action::DryRun {
        line.push_str("; dry run, nothing was done");
    }
    line
}
