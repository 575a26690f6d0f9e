//! `cwkill reclaim` on a terminal: one screen. The rows that fit, the reasons that many descriptors share, and the totals.

use std::collections::BTreeMap;
use std::io::{self, Write};

use super::{DeadDescriptor, ReclaimRun, summary};
use crate::config::{Action, ReclaimConfig};
use crate::model::ReclaimOutcome;
use crate::report::advice;
use crate::report::descriptors::stop_lines;
use crate::report::layout::{self, Cell, Color, Column, KEPT};
use crate::report::overview::Screen;
use crate::report::overview::reasons::{label, with_words};
use crate::report::table::{has_unit, unit_text};
use crate::sock_diag::Protocol;
use crate::text::{age, counted, short_name};

/// The longest name of a process in the table, and the longest on a narrow terminal.
const NAME_WIDTHS: (usize, usize) = (15, 8);
/// The longest name of a unit or container in the table.
const UNIT_WIDTH: usize = 24;
/// The rows for the table at least: the header, three rows, the lines about more rows and more reasons, and the prompt.
const LEAST_TABLE: usize = 7;

/// The kind of a result that has a reason: its word, and the stable code of the reason.
type Kind = (&'static str, &'static str);

/// Writes the screen. `messages`: the rows that follow on stderr. `next`: the line with the next command, which follows them.
pub fn write(
    run: &ReclaimRun,
    config: &ReclaimConfig,
    screen: Screen,
    messages: &[String],
    next: Option<&String>,
    out: &mut dyn Write,
) -> io::Result<()> {
    let mut totals = vec![summary(run, config)];
    totals.extend(stop_lines(&run.stops));
    totals.extend(advice::lines(&run.advice));
    let broken = |lines: &[String]| -> Vec<String> {
        lines.iter().flat_map(|line| screen.broken(line)).collect()
    };
    let totals = broken(&totals);
    let mut reasons = reasons(run);
    let room = screen
        .rows
        .saturating_sub(totals.len() + messages.len() + usize::from(next.is_some()) + LEAST_TABLE);
    let fitting = fitting(&reasons, screen, room);
    let others = reasons.split_off(fitting);
    let are_several = reasons.len() + others.len() > 1;
    let mut labels: BTreeMap<Kind, String> = BTreeMap::new();
    let mut lines = Vec::new();
    for (index, (kind, line)) in reasons.into_iter().enumerate() {
        match are_several {
            true => {
                lines.push(format!("{}: {line}", label(index)));
                labels.insert(kind, label(index));
            }
            false => lines.push(line),
        }
    }
    if !others.is_empty() {
        let count = counted(others.len(), "other reason");
        lines.push(format!("and {count}: -v shows all"));
    }
    let mut tail = broken(&lines);
    tail.extend(totals);
    let below = tail.iter().chain(messages).chain(next);
    let all = run.descriptors.len();
    let shown = screen.rows_shown(all, below);
    if shown > 0 {
        let columns = columns(run, config, screen, &run.descriptors[..shown], &labels);
        let columns = layout::fit(columns, screen.columns);
        for line in layout::lines(&columns, !config.no_header, screen.color) {
            writeln!(out, "{line}")?;
        }
    }
    if shown < all {
        let more = format!("and {} more: -v shows all", all - shown);
        for line in screen.broken(&more) {
            writeln!(out, "{line}")?;
        }
    }
    for line in &tail {
        writeln!(out, "{line}")?;
    }
    Ok(())
}

/// How many of the reasons fit into `room` rows. One is always shown.
fn fitting(reasons: &[(Kind, String)], screen: Screen, room: usize) -> usize {
    let mut used = 0;
    let fits = |(_, line): &&(Kind, String)| {
        // With its label.
        used += screen.broken(&format!("a: {line}")).len();
        used <= room
    };
    let fitting = reasons.iter().take_while(fits).count();
    fitting.max(1).min(reasons.len())
}

/// The result of a descriptor, or before the act whether it can be closed: its word, and its colour.
fn word(run: &ReclaimRun, config: &ReclaimConfig, dead: &DeadDescriptor) -> (&'static str, Color) {
    match (run.acted, dead.owner.reclaim.as_ref()) {
        (true, Some(ReclaimOutcome::Freed)) => ("freed", Color::Green),
        (true, Some(ReclaimOutcome::Replaced)) => ("replaced by /dev/null", Color::Green),
        (true, Some(ReclaimOutcome::Gone)) => ("gone", Color::Green),
        (true, Some(ReclaimOutcome::Failed(_))) => ("failed", Color::Red),
        (true, Some(ReclaimOutcome::Skipped(_))) => ("skipped", Color::Yellow),
        (true, Some(ReclaimOutcome::Allowed) | None) => ("not done", Color::Red),
        (false, outcome) if outcome.and_then(ReclaimOutcome::reason).is_some() => {
            ("no", Color::Yellow)
        }
        (false, _) if config.rules.replaces(dead.owner.fd) => {
            ("yes, replaced by /dev/null", Color::Green)
        }
        (false, _) => ("yes", Color::Green),
    }
}

/// The kind of the result of a descriptor, and the text of its reason; `None` without a reason.
fn reason(run: &ReclaimRun, dead: &DeadDescriptor) -> Option<(Kind, String)> {
    let outcome = dead.owner.reclaim.as_ref()?;
    let reason = outcome.reason()?;
    let word = match outcome {
        _ if !run.acted => "would be skipped",
        ReclaimOutcome::Failed(_) => "failed",
        _ => "skipped",
    };
    Some(((word, reason.code()), reason.to_string()))
}

/// The reasons, the most frequent first, each with its line.
fn reasons(run: &ReclaimRun) -> Vec<(Kind, String)> {
    let mut reasons: BTreeMap<Kind, BTreeMap<String, usize>> = BTreeMap::new();
    for (kind, text) in run.descriptors.iter().filter_map(|dead| reason(run, dead)) {
        *reasons.entry(kind).or_default().entry(text).or_default() += 1;
    }
    let mut reasons: Vec<_> = reasons.into_iter().collect();
    reasons.sort_by_key(|(_, texts)| std::cmp::Reverse(texts.values().sum::<usize>()));
    let line = |(kind, texts): (Kind, BTreeMap<String, usize>)| {
        let words = |count: usize| format!("{count} {}", kind.0);
        (kind, with_words(words, &texts))
    };
    reasons.into_iter().map(line).collect()
}

fn with_short(text: String, short: String) -> Cell {
    Cell {
        short: Some(short),
        ..Cell::new(text)
    }
}

fn columns(
    run: &ReclaimRun,
    config: &ReclaimConfig,
    screen: Screen,
    rows: &[DeadDescriptor],
    labels: &BTreeMap<Kind, String>,
) -> Vec<Column> {
    let column = |header, worth, is_number, cell: &dyn Fn(&DeadDescriptor) -> Cell| Column {
        header,
        worth,
        is_number,
        cells: rows.iter().map(cell).collect(),
    };
    let mut columns = vec![
        column("PROCESS", KEPT, false, &|dead| {
            let process = &dead.owner.process;
            let name = |width| {
                let name = short_name(&process.comm, width, screen.ascii);
                format!("{name}/{}", process.id.pid)
            };
            with_short(name(NAME_WIDTHS.0), name(NAME_WIDTHS.1))
        }),
        column("FD", KEPT, false, &|dead| {
            with_short(dead.owner.to_string(), dead.owner.fd.0.to_string())
        }),
    ];
    if rows.iter().any(|dead| has_unit(&dead.owner.process.cgroup)) {
        columns.push(column("UNIT", 10, false, &|dead| {
            let unit = unit_text(&dead.owner.process.cgroup, false);
            Cell::new(short_name(&unit, UNIT_WIDTH, screen.ascii))
        }));
    }
    let is_mptcp = |dead: &DeadDescriptor| dead.socket.protocol == Protocol::Mptcp;
    if rows.iter().any(is_mptcp) {
        columns.push(column("PROTO", 20, false, &|dead| {
            Cell::new(dead.socket.protocol)
        }));
    }
    columns.push(column("LOCAL", 30, false, &|dead| {
        Cell::new(
            dead.socket
                .local
                .map_or("-".into(), |local| local.to_string()),
        )
    }));
    columns.push(column("QUIET", 40, true, &|dead| {
        Cell::new(age(dead.socket.quiet))
    }));
    let header = match config.action {
        Action::Act => "RESULT",
        Action::List | Action::DryRun => "CLOSABLE",
    };
    columns.push(column(header, KEPT, false, &|dead| {
        let (word, color) = word(run, config, dead);
        let short = word.replace(" by /dev/null", "").replace(", replaced", "");
        with_short(word.to_owned(), short).color(Some(color))
    }));
    if !labels.is_empty() {
        columns.push(column("WHY", 85, false, &|dead| {
            let label = reason(run, dead).and_then(|(kind, _)| labels.get(&kind));
            Cell::new(label.map_or("", String::as_str))
        }));
    }
    columns
}
