//! The report of `cwkill reclaim` for people.

use std::io::{self, Write};

use comfy_table::{Cell, CellAlignment, Color, ColumnConstraint, Table, Width};

use super::{DeadDescriptor, ReclaimRun, summary};
use crate::config::{Action, ReclaimConfig};
use crate::model::ReclaimOutcome;
use crate::report::advice;
use crate::report::descriptors::{result, stop_lines};
use crate::report::layout::KEPT;
use crate::report::table::{Wanted, fit, has_unit, plain_table, short_process, unit_text};
use crate::sock_diag::Protocol;
use crate::text::{age, broken};

/// Writes the table and the summary. `columns`: of the terminal, if `out` is one.
pub fn write(
    run: &ReclaimRun,
    config: &ReclaimConfig,
    color: bool,
    columns: Option<usize>,
    out: &mut dyn Write,
) -> io::Result<()> {
    if !run.descriptors.is_empty() {
        write_table(run, config, color, columns, out)?;
    }
    let mut lines = vec![summary(run, config)];
    lines.extend(stop_lines(&run.stops));
    lines.extend(advice::lines(&run.advice));
    for line in lines.iter().flat_map(|line| broken(line, columns)) {
        writeln!(out, "{line}")?;
    }
    Ok(())
}

/// The header of the column that is aligned to the right.
const QUIET: &str = "QUIET";

fn write_table(
    run: &ReclaimRun,
    config: &ReclaimConfig,
    color: bool,
    columns: Option<usize>,
    out: &mut dyn Write,
) -> io::Result<()> {
    let mut table = plain_table(color);
    let mut owners = run.descriptors.iter().map(|dead| &dead.owner);
    let has_units = owners.any(|owner| has_unit(&owner.process.cgroup));
    let is_mptcp = |dead: &DeadDescriptor| dead.socket.protocol == Protocol::Mptcp;
    let has_mptcp = run.descriptors.iter().any(is_mptcp);
    let mut header = vec!["PROCESS", "FD"];
    header.extend(has_units.then_some("UNIT"));
    header.extend(has_mptcp.then_some("PROTO"));
    header.extend(["LOCAL", QUIET]);
    header.push(match config.action {
        Action::Act => "RESULT",
        Action::List | Action::DryRun => "CLOSABLE",
    });
    let quiet = header.iter().position(|name| *name == QUIET);
    if !config.no_header {
        table.set_header(&header);
    }
    for dead in &run.descriptors {
        let DeadDescriptor { owner, socket, .. } = dead;
        let process = match columns {
            Some(_) => short_process(&owner.process),
            None => owner.process.to_string(),
        };
        let mut cells = vec![Cell::new(process), Cell::new(owner)];
        if has_units {
            let unit = unit_text(&owner.process.cgroup, config.verbose);
            cells.push(Cell::new(unit));
        }
        if has_mptcp {
            cells.push(Cell::new(socket.protocol));
        }
        cells.extend([
            Cell::new(socket.local.map_or("-".into(), |local| local.to_string())),
            Cell::new(age(socket.quiet)),
        ]);
        let (text, color) = match (run.acted, owner.reclaim.as_ref()) {
            (true, outcome) => result(outcome),
            (false, outcome) => match outcome.and_then(ReclaimOutcome::reason) {
                None if config.rules.replaces(owner.fd) => {
                    ("yes, replaced by /dev/null".to_owned(), Color::Green)
                }
                None => ("yes".to_owned(), Color::Green),
                Some(reason) => (format!("no: {reason}"), Color::Yellow),
            },
        };
        cells.push(Cell::new(text).fg(color));
        table.add_row(cells);
    }
    table.discover_columns();
    let mut sentence = None;
    if let Some(columns) = columns {
        let (kept, room) = fit(&wanted(&table, &header), columns);
        for (column, kept) in table.column_iter_mut().zip(kept) {
            if !kept {
                column.set_constraint(ColumnConstraint::Hidden);
            }
        }
        sentence = u16::try_from(room).ok();
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
        if let (Some(room), true) = (sentence, column.index + 1 == header.len()) {
            column.set_constraint(ColumnConstraint::UpperBoundary(Width::Fixed(room)));
        }
        if Some(column.index) == quiet {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    for line in table.lines() {
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(())
}

/// What each column of the table takes. The last one has the sentences.
fn wanted(table: &Table, header: &[&str]) -> Vec<Wanted> {
    let widths = table.column_max_content_widths();
    let columns = header.iter().zip(widths).enumerate();
    let wanted = |(index, (name, width)): (usize, (&&str, u16))| Wanted {
        worth: match *name {
            "UNIT" => 10,
            "PROTO" => 20,
            "LOCAL" => 30,
            QUIET => 40,
            "FD" => 85,
            _ => KEPT,
        },
        width: (index + 1 < header.len()).then_some(width.into()),
    };
    columns.map(wanted).collect()
}
