//! The report for people: a table and a summary line.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::io::{self, Write};
use std::net::SocketAddr;
use std::time::Duration;

use comfy_table::{Cell, CellAlignment, Color, ColumnConstraint, Table, Width};
use rayon::prelude::*;

use super::layout::KEPT;
use super::table::{Wanted, fit, has_unit, join, names, plain_table, short_names, unit_text};
use super::{Run, SocketCounts, advice, backlogs, descriptors};
use crate::config::{Action, Config, Limit};
use crate::model::{Cause, Outcome, Owner, Plan, Scan, SkipReason, Socket, Target};
use crate::parallel::in_blocks;
use crate::sock_diag::Protocol;
use crate::tcp::TcpState;
use crate::text::{age, broken, columns_of, counted, escape};

/// Number of rows that are laid out together. It is large enough for stable columns, and small enough that a listing of
/// 100,000 sockets begins at once and needs little memory.
const ROWS_PER_BLOCK: usize = 1000;
/// The maximum number of blocks in memory. They are laid out in parallel.
const BLOCKS_AT_ONCE: usize = 8;

/// The mark of a socket in use, after its idle time.
const IN_USE_SUFFIX: &str = " (in use)";
/// The width of the longest time, for example `23h59m`.
const TIME_WIDTH: u16 = 6;
/// The width of the longest time in use, `999ms (in use)`.
const TIME_IN_USE_WIDTH: u16 = 14;

/// Writes the table and the summary. `columns`: of the terminal, if `out` is one.
pub fn write(
    run: &Run,
    config: &Config,
    color: bool,
    columns: Option<usize>,
    out: &mut dyn Write,
) -> io::Result<()> {
    let (targets, rest) = match config.limit {
        Some(Limit::Rows(rows)) => run.scan.targets.split_at(rows.min(run.scan.targets.len())),
        Some(Limit::All) | None => (&run.scan.targets[..], &[][..]),
    };
    Rows::default().write(run, targets, config, (color, columns), out)?;
    if !rest.is_empty() {
        let more = counted(rest.len(), "more socket");
        writeln!(out, "and {more}: --limit all")?;
    }
    let mut lines = vec![summary(run, config)];
    lines.extend(backlogs::lines(run));
    if run.reclaim_requested && run.acted && !run.scan.targets.is_empty() {
        lines.extend(descriptors::lines(&run.scan, &run.stops));
    }
    lines.extend(advice::lines(&run.advice));
    for line in lines.iter().flat_map(|line| broken(line, columns)) {
        writeln!(out, "{line}")?;
    }
    Ok(())
}

/// The rows of a table, which may come in several parts.
#[derive(Default)]
pub struct Rows {
    /// Those of the last part.
    columns: Vec<Column>,
    widths: Vec<u16>,
}

impl Rows {
    /// Writes a row for each of `targets`, after a header if the last part had other columns.
    pub fn write(
        &mut self,
        run: &Run,
        targets: &[Target],
        config: &Config,
        (color, columns): (bool, Option<usize>),
        out: &mut dyn Write,
    ) -> io::Result<()> {
        let mut layout = Layout::new(run, config);
        let widths = match columns {
            Some(columns) => layout.fit(run, targets, columns),
            None => layout.least_widths(targets),
        };
        let is_other = self.columns != layout.columns;
        let mut header = is_other && !config.no_header;
        if is_other || columns.is_some() {
            self.columns.clone_from(&layout.columns);
            self.widths = widths;
        }
        for rows in targets.chunks(ROWS_PER_BLOCK * BLOCKS_AT_ONCE) {
            let mut tables = in_blocks(rows, ROWS_PER_BLOCK, |rows| layout.table(run, rows, color));
            if header && let Some(first) = tables.first_mut() {
                first.set_header(layout.columns.iter().map(|column| column.header()));
            }
            header = false;
            for table in &mut tables {
                layout.align(table, &mut self.widths);
            }
            for text in tables
                .into_par_iter()
                .map(|table| lines(&table))
                .collect::<Vec<_>>()
            {
                out.write_all(text.as_bytes())?;
            }
        }
        Ok(())
    }
}

/// A column of the table.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Column {
    Netns,
    Process,
    Fd,
    Unit,
    Protocol,
    State,
    Local,
    Peer,
    Age,
    Idle,
    RecvQ,
    SendQ,
    Cause,
    Plan,
    Result,
}

impl Column {
    fn header(self) -> &'static str {
        match self {
            Column::Netns => "NETNS",
            Column::Process => "PROCESS",
            Column::Fd => "FD",
            Column::Unit => "UNIT",
            Column::Protocol => "PROTO",
            Column::State => "STATE",
            Column::Local => "LOCAL",
            Column::Peer => "PEER",
            Column::Age => "AGE",
            Column::Idle => "IDLE",
            Column::RecvQ => "RECV-Q",
            Column::SendQ => "SEND-Q",
            Column::Cause => "CAUSE",
            Column::Plan => "PLAN",
            Column::Result => "RESULT",
        }
    }

    fn is_number(self) -> bool {
        matches!(
            self,
            Column::Age | Column::Idle | Column::RecvQ | Column::SendQ
        )
    }

    /// The columns with the lowest worth are dropped first from a terminal without room.
    fn worth(self) -> u8 {
        match self {
            Column::Process | Column::Plan | Column::Result => KEPT,
            Column::Local => 80,
            Column::Cause => 70,
            Column::Age => 65,
            Column::Peer => 60,
            Column::Fd => 55,
            Column::State => 50,
            Column::Idle => 40,
            Column::RecvQ => 30,
            Column::SendQ => 25,
            Column::Protocol => 20,
            Column::Netns => 15,
            Column::Unit => 10,
        }
    }

    /// The cell of `target`. `process` and `fd` are its [`owner_cells`].
    fn cell(
        self,
        run: &Run,
        target: &Target,
        (process, fd): (&str, &str),
        layout: &Layout,
    ) -> Cell {
        let verbose = layout.verbose;
        let (scan, socket) = (&run.scan, &target.socket);
        match self {
            Column::Netns => Cell::new(escape(&scan.netns(target).label())),
            Column::Process => Cell::new(process),
            Column::Fd => Cell::new(fd),
            Column::Unit => Cell::new(units(scan, target, layout.all_owners)),
            Column::Protocol => Cell::new(socket.protocol()),
            Column::State => Cell::new(socket.state),
            Column::Local => Cell::new(socket.tuple().local),
            Column::Peer => Cell::new(socket.tuple().peer),
            Column::Age => Cell::new(socket.age.map_or("-".into(), age)),
            Column::Idle => Cell::new(idle_text(socket, layout.mark_in_use)),
            Column::RecvQ => Cell::new(socket.recv_q),
            Column::SendQ => Cell::new(socket.send_q),
            Column::Cause => Cell::new(cause_text(socket)),
            Column::Plan | Column::Result => last_cell(run, target, verbose),
        }
    }
}

/// The outcome of a target; before it has one, its plan.
fn last_cell(run: &Run, target: &Target, verbose: bool) -> Cell {
    let descriptors = descriptors::target_text(target);
    if let Some((text, color)) = result(target, verbose) {
        return Cell::new(text + &descriptors).fg(color);
    }
    let then = match target.plan.skip {
        Some(_) if run.reclaim_requested => "",
        None if run.reclaim_requested && !target.owners.is_empty() && descriptors.is_empty() => {
            ", then reclaim"
        }
        _ => &descriptors,
    };
    Cell::new(format!("{}{then}", plan_text(&target.plan)))
}

/// The columns of the table.
struct Layout {
    columns: Vec<Column>,
    verbose: bool,
    /// Every owner of a socket is named.
    all_owners: bool,
    /// The room for the sentences of the last column; `None`: they are not broken.
    sentence: Option<u16>,
    /// Sockets in which data has moved within this time are marked. Only in a listing: otherwise they are not among the targets, or
    /// the operator wants them.
    mark_in_use: Duration,
}

impl Layout {
    fn new(run: &Run, config: &Config) -> Self {
        let scan = &run.scan;
        let states: BTreeSet<&str> = scan.targets.iter().map(|t| t.socket.state.name()).collect();
        let has_units = scan.processes().values().any(|p| has_unit(&p.cgroup));
        let is_mptcp = |target: &Target| target.socket.protocol() == Protocol::Mptcp;
        let has_mptcp = scan.targets.iter().any(is_mptcp);
        let has_states = states.len() > 1 || states.iter().any(|state| *state != "close-wait");
        let mut columns = Vec::with_capacity(12);
        columns.extend((scan.namespaces.len() > 1).then_some(Column::Netns));
        columns.extend([Column::Process, Column::Fd]);
        columns.extend(has_units.then_some(Column::Unit));
        columns.extend(has_mptcp.then_some(Column::Protocol));
        columns.extend(has_states.then_some(Column::State));
        columns.extend([Column::Local, Column::Peer]);
        columns.extend([Column::Age, Column::Idle]);
        columns.extend([Column::RecvQ, Column::SendQ, Column::Cause]);
        columns.extend(match config.action {
            Action::List => None,
            Action::DryRun => Some(Column::Plan),
            Action::Act => Some(Column::Result),
        });
        Layout {
            columns,
            verbose: config.verbose,
            all_owners: config.verbose,
            sentence: None,
            mark_in_use: match config.action {
                Action::List => config.mark_in_use,
                Action::DryRun | Action::Act => Duration::ZERO,
            },
        }
    }

    /// The widths at which the columns begin. Times, numbers and addresses are of any width in each block, so with several blocks their
    /// columns begin as wide as they will become.
    fn least_widths(&self, targets: &[Target]) -> Vec<u16> {
        if targets.len() <= ROWS_PER_BLOCK {
            return Vec::new();
        }
        let in_use = |target: &Target| target.socket.is_in_use(self.mark_in_use);
        let digits = |number: &dyn Fn(&Target) -> u32| {
            let largest = targets.iter().map(number).max().unwrap_or(0);
            u16::try_from(largest.to_string().len()).unwrap_or(u16::MAX)
        };
        let address = |address: &dyn Fn(&Target) -> SocketAddr| {
            let longest = targets.iter().map(|target| length(address(target))).max();
            u16::try_from(longest.unwrap_or(0)).unwrap_or(u16::MAX)
        };
        let width = |column: &Column| match column {
            Column::Fd => digits(&|target| {
                target
                    .owners
                    .first()
                    .map_or(0, |owner| owner.fd.0.unsigned_abs())
            }),
            Column::Local => address(&|target| target.socket.tuple().local),
            Column::Peer => address(&|target| target.socket.tuple().peer),
            Column::RecvQ => digits(&|target| target.socket.recv_q),
            Column::SendQ => digits(&|target| target.socket.send_q),
            Column::Idle if targets.iter().any(in_use) => TIME_IN_USE_WIDTH,
            Column::Age | Column::Idle => TIME_WIDTH,
            _ => 0,
        };
        self.columns.iter().map(width).collect()
    }

    /// Fits the table into a terminal with so many columns: only the first owner of each socket is named, then columns are dropped, and the
    /// sentences of the last one are broken between words. Returns the widths of the columns.
    fn fit(&mut self, run: &Run, targets: &[Target], columns: usize) -> Vec<u16> {
        // Any number: only whether there is one matters before the columns are known.
        self.sentence = Some(0);
        let mut wanted = self.wanted(run, targets);
        let (kept, _) = fit(&wanted, columns);
        if kept.contains(&false) {
            self.all_owners = false;
            wanted = self.wanted(run, targets);
        }
        let (kept, sentence) = fit(&wanted, columns);
        let is_kept = |index: &usize| kept[*index];
        let shown: Vec<usize> = (0..wanted.len()).filter(is_kept).collect();
        self.columns = shown.iter().map(|index| self.columns[*index]).collect();
        self.sentence = u16::try_from(sentence).ok();
        let width = |index: &usize| wanted[*index].width.unwrap_or(0);
        let narrow = |width| u16::try_from(width).unwrap_or(u16::MAX);
        shown.iter().map(width).map(narrow).collect()
    }

    /// What each column takes.
    fn wanted(&self, run: &Run, targets: &[Target]) -> Vec<Wanted> {
        let scan = &run.scan;
        let widest = |width: &dyn Fn(&Target) -> usize| targets.iter().map(width).max();
        let digits = |number: u32| number.to_string().len();
        let in_use = |target: &Target| target.socket.is_in_use(self.mark_in_use);
        let of_state = |target: &Target| target.socket.state.to_string().len();
        let owners = |target: &Target| owner_cells(scan, target, self);
        let width = |column: Column| {
            let cells = match column {
                Column::Plan | Column::Result => return None,
                Column::Netns => {
                    let labels = scan.namespaces.iter();
                    labels
                        .map(|netns| columns_of(&escape(&netns.label())))
                        .max()
                }
                Column::Process => widest(&|target| columns_of(&owners(target).0)),
                Column::Fd => widest(&|target| columns_of(&owners(target).1)),
                Column::Unit => widest(&|target| columns_of(&units(scan, target, self.all_owners))),
                Column::Protocol => Some(Protocol::Mptcp.to_string().len()),
                Column::State => widest(&of_state),
                Column::Local => widest(&|target| length(target.socket.tuple().local)),
                Column::Peer => widest(&|target| length(target.socket.tuple().peer)),
                Column::Idle if targets.iter().any(in_use) => Some(TIME_IN_USE_WIDTH.into()),
                Column::Age | Column::Idle => Some(TIME_WIDTH.into()),
                Column::RecvQ => widest(&|target| digits(target.socket.recv_q)),
                Column::SendQ => widest(&|target| digits(target.socket.send_q)),
                Column::Cause => widest(&|target| cause_text(&target.socket).len()),
            };
            Some(cells.unwrap_or(0).max(column.header().len()))
        };
        let wanted = |column: &Column| Wanted {
            worth: column.worth(),
            width: width(*column),
        };
        self.columns.iter().map(wanted).collect()
    }

    /// A block of rows.
    fn table(&self, run: &Run, rows: &[Target], color: bool) -> Table {
        let mut table = plain_table(color);
        for target in rows {
            let (process, fd) = owner_cells(&run.scan, target, self);
            let cell = |column: &Column| column.cell(run, target, (&process, &fd), self);
            table.add_row(self.columns.iter().map(cell));
        }
        table
    }

    /// Gives the columns of `table` their widths. `widths` has the width of the widest cell of each column so far, so that the columns of
    /// all blocks are aligned.
    fn align(&self, table: &mut Table, widths: &mut Vec<u16>) {
        table.discover_columns();
        let needed = table.column_max_content_widths();
        widths.resize(needed.len(), 0);
        for (width, needed) in widths.iter_mut().zip(needed) {
            *width = needed.max(*width);
        }
        for ((laid_out, column), width) in table.column_iter_mut().zip(&self.columns).zip(&*widths)
        {
            laid_out.set_padding((0, 2));
            laid_out.set_constraint(match (column, self.sentence) {
                (Column::Plan | Column::Result, Some(sentence)) => {
                    ColumnConstraint::UpperBoundary(Width::Fixed(sentence))
                }
                _ => ColumnConstraint::LowerBoundary(Width::Fixed(width + 2)),
            });
            if column.is_number() {
                laid_out.set_cell_alignment(CellAlignment::Right);
            }
        }
    }
}

fn lines(table: &Table) -> String {
    let mut text = String::new();
    for line in table.lines() {
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

fn cause_text(socket: &Socket) -> String {
    match socket.address_gone {
        true => format!("{}, address gone", socket.cause),
        false => socket.cause.to_string(),
    }
}

/// The length of an address with its port, as it is shown.
fn length(address: SocketAddr) -> usize {
    struct Length(usize);
    impl std::fmt::Write for Length {
        fn write_str(&mut self, text: &str) -> std::fmt::Result {
            self.0 += text.len();
            Ok(())
        }
    }
    let mut length = Length(0);
    let _ = write!(length, "{address}");
    length.0
}

/// The time without data, with a mark for a socket that cwkill would leave alone.
fn idle_text(socket: &Socket, mark_in_use: Duration) -> String {
    match socket.idle {
        None => "-".into(),
        Some(idle) if socket.is_in_use(mark_in_use) => age(idle) + IN_USE_SUFFIX,
        Some(idle) => age(idle),
    }
}

/// The cells for the owner of a socket and for its descriptor.
fn owner_cells(scan: &Scan, target: &Target, layout: &Layout) -> (String, String) {
    let names = |owners: &[Owner]| match layout.sentence {
        Some(_) if !layout.all_owners => short_names(scan, owners),
        _ => names(scan, owners, layout.all_owners),
    };
    if target.socket.cause == Cause::Orphan {
        return ("(orphan)".into(), "-".into());
    }
    if let Some(listener) = scan.listener(target) {
        let (process, _) = names(&listener.owners);
        return match listener.sockets.len() {
            1 => (format!("{process} (listener)"), "-".into()),
            several => (
                format!("{process} (one of {several} listeners)"),
                "-".into(),
            ),
        };
    }
    names(&target.owners)
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

pub(super) fn plan_text(plan: &Plan) -> String {
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

/// The attempts that had no effect, with their errors.
pub(super) fn attempts(target: &Target) -> String {
    let failed = target.attempts.iter().filter_map(|attempt| {
        let error = attempt.error.as_ref()?;
        Some(format!("{}: {error}", attempt.method))
    });
    join(failed, "; ")
}

/// The outcome in words, and its colour; `None` in a listing or dry run.
pub(crate) fn result(target: &Target, verbose: bool) -> Option<(String, Color)> {
    let attempts = || attempts(target);
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
    last_line(run, config, true)
}

/// The same without the namespaces that were not looked into.
pub fn totals(run: &Run, config: &Config) -> String {
    last_line(run, config, false)
}

fn last_line(run: &Run, config: &Config, with_namespaces: bool) -> String {
    let counts = SocketCounts::of(run);
    let left_out = left_out_text(run, config, with_namespaces);
    if run.acted {
        return counts.sentence() + &left_out;
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
    line.push_str(&left_out);
    if config.action == Action::DryRun {
        line.push_str("; dry run, nothing was done");
    } else if config.narrows && counts.matched > 0 {
        line.push_str("; nothing was closed: add --port, --process, ... or --all");
    }
    line
}

/// What was left out although it may match.
fn left_out_text(run: &Run, config: &Config, with_namespaces: bool) -> String {
    let mut parts = run.scan.left_out(config.selectors.min_age);
    parts.extend(run.scan.namespaces_left_out().filter(|_| with_namespaces));
    // Both are about sockets that match.
    parts.insert(usize::from(run.scan.younger > 0), in_use_text(run, config));
    parts.insert(0, dead_text(run));
    parts.retain(|part| !part.is_empty());
    parts.iter().map(|part| format!("; {part}")).collect()
}

/// The dead descriptors, where no socket matches.
fn dead_text(run: &Run) -> String {
    let by = run.dead_descriptors.as_deref().unwrap_or_default();
    let count = by.iter().map(|one| one.count).sum();
    let dead = counted(count, "dead descriptor");
    match by {
        [] => String::new(),
        [one] if one.closable == 0 => {
            format!("{dead} in {}, none can be closed now", one.process)
        }
        [one] => format!("{dead} in {}: {}", one.process, one.command),
        several => format!(
            "{dead} in {}: cwkill reclaim lists them",
            counted(several.len(), "process")
        ),
    }
}

/// The sockets in use: those that were left alone, or in a listing those that would be.
fn in_use_text(run: &Run, config: &Config) -> String {
    let (count, limit, ending) = match config.action {
        Action::List if config.selectors.min_idle.is_zero() => {
            let marked = |target: &&Target| target.socket.is_in_use(config.mark_in_use);
            let count = run.scan.targets.iter().filter(marked).count();
            (count, config.mark_in_use, "")
        }
        _ => (
            run.scan.in_use,
            config.selectors.min_idle,
            " and left alone (--min-idle)",
        ),
    };
    match count {
        0 => String::new(),
        _ => format!(
            "{count} in use{ending}: data moved in the last {}",
            age(limit)
        ),
    }
}
