//! The overview: what a run shows on a terminal. It takes one screen: a row for each process and listener, with one row for many
//! processes of the same kind, the reasons that many sockets share, the totals, and the next command to type. `rows` makes the rows,
//! `next` chooses the command.

pub(in crate::report) mod next;
pub(super) mod reasons;
mod rows;

use std::collections::{BTreeMap, HashMap};
use std::fmt::Display;
use std::io::{self, Write};

use super::layout::{self, Cell, Color, Column, KEPT};
use super::table::unit_text;
use super::{Run, advice, backlogs, descriptors, text};
use crate::config::{Action, Config, Limit};
use crate::finder::table_use::TableUse;
use crate::model::Listener;
use crate::proc::{Process, ProcessId};
use crate::text::{age, broken, columns_of, counted, short_name};
use reasons::Reason;
use rows::{Counts, Row, Subject};

/// The size of a terminal, and what it can show.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Screen {
    pub columns: usize,
    pub rows: usize,
    pub color: bool,
    /// It shows no character outside ASCII.
    pub ascii: bool,
}

impl Screen {
    /// The rows of a line.
    pub fn broken(self, line: &str) -> Vec<String> {
        broken(line, Some(self.columns))
    }

    /// How many of `all` rows of a table to show, if these lines follow `below` it: as many as fit. A screen without room has some all
    /// the same.
    pub fn rows_shown<'l>(self, all: usize, below: impl Iterator<Item = &'l String>) -> usize {
        let height = |line: &String| columns_of(line).div_ceil(self.columns.max(1)).max(1);
        // The header, the line about more rows, and the prompt.
        let taken = below.map(height).sum::<usize>() + 3;
        let room = self.rows.saturating_sub(taken);
        let shown = match all {
            // Then there is no line about more.
            all if all <= room + 1 => all,
            _ if self.rows < LOW => room.max(1),
            _ => room.max(MIN_ROWS),
        };
        shown.min(all)
    }
}

/// So many rows are shown on any terminal that is not [`LOW`].
const MIN_ROWS: usize = 3;
/// A terminal with fewer rows than this shows one.
const LOW: usize = 12;
/// The longest name that the kernel keeps of a process. Only a name with escapes takes more columns.
const NAME_WIDTH: usize = 15;
/// The longest name of a unit or container in the table.
const UNIT_WIDTH: usize = 24;
/// A process with less than this part of its descriptors free is marked.
const NEARLY_FULL: u128 = 90;
/// The descriptors of more processes of one kind are not counted.
const MAX_COUNTED: usize = 64;

/// The overview of a run.
#[derive(Debug)]
pub struct Overview<'r> {
    run: &'r Run,
    config: &'r Config,
    screen: Screen,
    rows: Vec<Row<'r>>,
    shown: usize,
    /// The letters that stand for the reasons, if there are several.
    labels: HashMap<Reason, String>,
    /// The lines below the table.
    tail: Vec<String>,
    next: Option<String>,
}

impl<'r> Overview<'r> {
    /// `messages`: the lines that follow on stderr. `words`: the command line, without the name of the program. `is_at_limit`: whether a
    /// process has almost no free descriptor.
    pub fn new(
        run: &'r Run,
        config: &'r Config,
        screen: Screen,
        messages: &[String],
        words: &[String],
        is_at_limit: &dyn Fn(ProcessId) -> bool,
    ) -> Self {
        let is_listing = config.action == Action::List;
        let rows = rows::rows(run, !is_listing);
        let mut lines = Vec::new();
        let mut labels = HashMap::new();
        if !is_listing {
            lines.extend(reasons::ways(run));
            let reasons = reasons::lines(run);
            let are_several = reasons.len() > 1;
            for (index, (reason, line)) in reasons.into_iter().enumerate() {
                let label = reasons::label(index);
                lines.push(match are_several {
                    true => format!("{label}: {line}"),
                    false => line,
                });
                labels.extend(are_several.then_some((reason, label)));
            }
        }
        lines.push(text::totals(run, config));
        lines.extend(backlogs::lines(run));
        if run.reclaim_requested && run.acted {
            lines.extend(descriptors::lines(&run.scan, &run.stops));
        }
        lines.extend(advice::lines(&run.advice));
        lines.extend(run.scan.namespaces_left_out());
        let tail: Vec<String> = lines.iter().flat_map(|line| screen.broken(line)).collect();
        let next = next::line(run, config, &rows, words, is_at_limit);
        let below = tail.iter().chain(messages).chain(&next);
        let shown = match config.limit {
            Some(Limit::Rows(limit)) => limit,
            Some(Limit::All) => rows.len(),
            None => screen.rows_shown(rows.len(), below),
        };
        Overview {
            run,
            config,
            screen,
            shown: shown.min(rows.len()),
            rows,
            labels,
            tail,
            next,
        }
    }

    /// The processes whose descriptors the table shows.
    pub fn processes(&self) -> Vec<ProcessId> {
        let shown = self.rows[..self.shown].iter();
        let mut ids: Vec<ProcessId> = shown.flat_map(counted_processes).collect();
        ids.sort_unstable();
        ids.dedup();
        ids
    }

    /// Writes all but the next command.
    pub fn write(
        &self,
        tables: &HashMap<ProcessId, TableUse>,
        out: &mut dyn Write,
    ) -> io::Result<()> {
        let (rows, rest) = self.rows.split_at(self.shown);
        if !rows.is_empty() {
            for line in self.table(rows, tables) {
                writeln!(out, "{line}")?;
            }
        }
        if !rest.is_empty() {
            let sockets: usize = rest.iter().map(|row| row.sockets).sum();
            let is_process = |row: &Row<'_>| matches!(row.subject, Subject::Process(_));
            let rows = match rest.iter().all(is_process) {
                true => {
                    let processes = rest.iter().map(|row| row.processes.len());
                    counted(processes.sum(), "more process")
                }
                false => counted(rest.len(), "more row"),
            };
            let sockets = counted(sockets, "socket");
            let more = format!("and {rows} with {sockets}: -v shows all");
            for line in self.screen.broken(&more) {
                writeln!(out, "{line}")?;
            }
        }
        for line in &self.tail {
            writeln!(out, "{line}")?;
        }
        Ok(())
    }

    /// The last line. It is not broken, so that it can be copied.
    pub fn next(&self) -> Option<&str> {
        self.next.as_deref()
    }

    fn table(&self, rows: &[Row<'_>], tables: &HashMap<ProcessId, TableUse>) -> Vec<String> {
        let Screen { columns, color, .. } = self.screen;
        let mut fitting = layout::fit(self.columns(rows, tables, usize::MAX), columns);
        let excess = layout::total(&fitting).saturating_sub(columns);
        if excess > 0 {
            // Only names can give way now.
            let names = fitting[0].cells.iter().map(|cell| columns_of(&cell.text));
            let width = names.max().unwrap_or(0).saturating_sub(excess);
            let all = self.columns(rows, tables, width);
            fitting = layout::fit(all, columns);
        }
        layout::lines(&fitting, !self.config.no_header, color)
    }

    /// All columns. The cells of the first one take at most `width`, if their numbers allow it.
    fn columns(
        &self,
        rows: &[Row<'_>],
        tables: &HashMap<ProcessId, TableUse>,
        width: usize,
    ) -> Vec<Column> {
        let table_of = |row: &Row<'_>| table_of(row, tables);
        let count = |header, worth, color, value: fn(&Counts) -> usize| Column {
            header,
            worth,
            is_number: true,
            cells: rows
                .iter()
                .map(|row| {
                    let value = value(&row.counts);
                    Cell::new(value).color(color).color_if(value > 0)
                })
                .collect(),
        };
        let column = |header, worth, is_number, cell: &dyn Fn(&Row<'_>) -> Cell| Column {
            header,
            worth,
            is_number,
            cells: rows.iter().map(cell).collect(),
        };
        let any = |value: fn(&Counts) -> usize| rows.iter().any(|row| value(&row.counts) > 0);
        let mut columns = vec![column("PROCESS", KEPT, false, &|row| {
            Cell::new(self.name(row, width))
        })];
        match self.config.action {
            Action::List => {
                columns.push(column("STUCK", KEPT, true, &|row| Cell::new(row.sockets)))
            }
            Action::DryRun => {
                columns.push(count("TO CLOSE", KEPT, None, |counts| counts.planned));
                let kept = |counts: &Counts| counts.kept;
                columns.push(count("KEPT", KEPT, Some(Color::Yellow), kept));
            }
            Action::Act => {
                let closed = |counts: &Counts| counts.closed;
                columns.push(count("CLOSED", KEPT, Some(Color::Green), closed));
                for (header, color, value) in [
                    (
                        "CLOSING",
                        Color::Yellow,
                        (|counts| counts.closing) as fn(&Counts) -> usize,
                    ),
                    ("GONE", Color::Green, |counts| counts.gone),
                ] {
                    columns.extend(any(value).then(|| count(header, 90, Some(color), value)));
                }
                let kept = |counts: &Counts| counts.kept;
                columns.push(count("KEPT", KEPT, Some(Color::Yellow), kept));
                let failed = |counts: &Counts| counts.failed;
                if any(failed) {
                    columns.push(count("FAILED", KEPT, Some(Color::Red), failed));
                }
            }
        }
        if !self.labels.is_empty() {
            columns.push(column("WHY", 85, false, &|row| {
                let mut labels: Vec<&str> = row
                    .reasons
                    .iter()
                    .filter_map(|reason| self.labels.get(reason).map(String::as_str))
                    .collect();
                labels.sort_unstable();
                Cell::new(labels.join(" "))
            }));
        }
        columns.push(column("OLDEST", 80, true, &|row| {
            Cell::new(row.oldest.map_or("-".into(), age))
        }));
        columns.push(column("CAUSES", 70, false, &|row| shares(&row.causes)));
        let states = || rows.iter().flat_map(|row| row.states.keys());
        if states().any(|state| *state != "close-wait") {
            columns.push(column("STATES", 60, false, &|row| shares(&row.states)));
        }
        columns.push(column("PORTS", 50, false, &|row| ports(row)));
        if rows.iter().any(|row| table_of(row).used.is_some()) {
            columns.push(column("FDS/LIMIT", 40, true, &|row| fds(table_of(row))));
        }
        if rows.iter().any(|row| table_of(row).dead.is_some()) {
            let dead = |row: &Row<'_>| {
                let dead = table_of(row).dead;
                Cell::new(dead.map_or("-".into(), |dead| dead.to_string()))
                    .color(Some(Color::Red))
                    .color_if(dead.is_some_and(|dead| dead > 0))
            };
            columns.push(column("DEAD", 30, true, &dead));
        }
        let scan = &self.run.scan;
        if scan.namespaces.len() > 1 {
            columns.push(column("NETNS", 20, false, &|row| {
                let mut labels = row.namespaces.iter().map(|netns| {
                    let label = scan.namespaces[*netns].label();
                    short_name(&label, NAME_WIDTH, self.screen.ascii)
                });
                let first = labels.next().unwrap_or_default();
                Cell::new(with_others(first, labels.len()))
            }));
        }
        let units: Vec<String> = rows
            .iter()
            .map(|row| {
                let process = row.process();
                process.map_or("-".into(), |process| unit_text(&process.cgroup, false))
            })
            .collect();
        if units.iter().any(|unit| unit != "-") {
            let cells = units.into_iter();
            columns.push(Column {
                header: "UNIT",
                worth: 10,
                is_number: false,
                cells: cells
                    .map(|unit| Cell::new(short_name(&unit, UNIT_WIDTH, self.screen.ascii)))
                    .collect(),
            });
        }
        columns
    }

    /// Who is responsible, in at most `width` columns, if that leaves room for the number and two columns of the name.
    fn name(&self, row: &Row<'_>, width: usize) -> String {
        /// Columns of a name that always remain.
        const LEAST: usize = 2;
        let of_process = |process: &Process, ending: &str| {
            let number = format!("/{}", process.id.pid);
            let rest = match number.len() + ending.len() + LEAST <= width {
                true => number + ending,
                false => number,
            };
            let room = width.saturating_sub(rest.len()).clamp(LEAST, NAME_WIDTH);
            short_name(&process.comm, room, self.screen.ascii) + &rest
        };
        let unknown = match self.run.scan.owners_known {
            true => "unknown",
            false => "-",
        };
        match row.subject {
            Subject::Process(process) if row.is_folded() => {
                let number = format!(" ({} processes)", row.processes.len());
                let ending = with_others(number, row.others);
                let room = width.saturating_sub(ending.len()).clamp(LEAST, NAME_WIDTH);
                short_name(&process.comm, room, self.screen.ascii) + &ending
            }
            Subject::Process(process) => {
                of_process(process, &with_others(String::new(), row.others))
            }
            Subject::Listener(listener) => {
                let ending = with_others(String::new(), row.others) + listeners(listener);
                match row.process() {
                    Some(process) => of_process(process, &ending),
                    None => format!("{unknown}{ending}"),
                }
            }
            Subject::Unknown => unknown.to_owned(),
            Subject::Kernel => "(orphan)".to_owned(),
        }
    }
}

impl Cell {
    /// Keeps the colour only under a condition.
    fn color_if(self, is_colored: bool) -> Self {
        let color = self.color.filter(|_| is_colored);
        self.color(color)
    }
}

fn listeners(listener: &Listener) -> &'static str {
    match listener.sockets.len() {
        0 | 1 => " (listener)",
        _ => " (listeners)",
    }
}

/// A text, and the number of others like it.
fn with_others(text: String, others: usize) -> String {
    match others {
        0 => text,
        _ => format!("{text} +{others}"),
    }
}

/// Names with the number of sockets of each, the largest first. A single name needs no number.
fn shares<T: Display>(counts: &BTreeMap<T, usize>) -> Cell {
    let mut shares: Vec<(&T, usize)> = counts.iter().map(|(name, count)| (name, *count)).collect();
    shares.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    let text = |(name, count): &(&T, usize)| format!("{count} {name}");
    match &shares[..] {
        [] => Cell::new("-"),
        [(only, _)] => Cell::new(only),
        [(first, _), ..] => {
            let all: Vec<String> = shares.iter().map(text).collect();
            let mut cell = Cell::new(all.join(", "));
            cell.short = Some(format!("{first}, others"));
            cell
        }
    }
}

/// The ports of a row: those of the end that has fewer, which is the end of the service. `to` marks ports of peers.
fn ports(row: &Row<'_>) -> Cell {
    /// Ports that are named.
    const NAMED: usize = 2;
    let (local, peer) = (&row.local_ports, &row.peer_ports);
    let least = |ports: &HashMap<u16, usize>| ports.keys().min().copied();
    // With as many on both ends, the lower port is that of the service.
    let is_client = match local.len().cmp(&peer.len()) {
        std::cmp::Ordering::Less => false,
        std::cmp::Ordering::Greater => true,
        std::cmp::Ordering::Equal => least(peer) < least(local) && least(peer) > Some(0),
    };
    let mut ports: Vec<(u16, usize)> = match is_client {
        true => peer.iter().map(|(port, count)| (*port, *count)).collect(),
        false => local.iter().map(|(port, count)| (*port, *count)).collect(),
    };
    ports.sort_by_key(|(port, count)| (std::cmp::Reverse(*count), *port));
    let named = |count: usize| {
        let names = ports.iter().take(count).map(|(port, _)| port.to_string());
        let names: Vec<String> = names.collect();
        let others = ports.len().saturating_sub(count);
        let to = if is_client { "to " } else { "" };
        with_others(format!("{to}{}", names.join(" ")), others)
    };
    let mut cell = Cell::new(named(NAMED));
    if ports.len() > 1 {
        cell.short = Some(named(1));
    }
    cell
}

/// The processes of a row whose descriptors are counted for it.
fn counted_processes(row: &Row<'_>) -> Vec<ProcessId> {
    match row.processes.len() {
        // A listener.
        0 => row
            .process()
            .map(|process| process.id)
            .into_iter()
            .collect(),
        1..=MAX_COUNTED => row.processes.clone(),
        _ => Vec::new(),
    }
}

/// The descriptors of a row: those of the process that is nearest to its limit, and the dead ones of all its processes.
fn table_of(row: &Row<'_>, tables: &HashMap<ProcessId, TableUse>) -> TableUse {
    let processes = counted_processes(row);
    let tables = || processes.iter().filter_map(|id| tables.get(id));
    let fullest = tables().max_by(|a, b| {
        let key = |table: &TableUse| {
            let limit = table.limit.unwrap_or(u64::MAX).max(1);
            table.used.map(|used| used as f64 / limit as f64)
        };
        key(a)
            .partial_cmp(&key(b))
            .unwrap_or(std::cmp::Ordering::Equal)
    });
    let Some(fullest) = fullest else {
        return TableUse::default();
    };
    let are_all_known = tables().count() == processes.len();
    let dead = tables().map(|table| table.dead).sum::<Option<usize>>();
    TableUse {
        dead: dead.filter(|_| are_all_known),
        ..*fullest
    }
}

/// The taken descriptors against their limit.
fn fds(table: TableUse) -> Cell {
    let limit = match table.limit {
        None => "?".to_owned(),
        Some(u64::MAX) => "unlimited".to_owned(),
        Some(limit) => limit.to_string(),
    };
    let Some(used) = table.used else {
        return Cell::new("-");
    };
    let is_full = table
        .limit
        .is_some_and(|limit| used as u128 * 100 >= u128::from(limit) * NEARLY_FULL);
    Cell::new(format!("{used}/{limit}"))
        .color(Some(Color::Red))
        .color_if(is_full)
}
