//! The diagnosis for people: a summary, charts where there is room, and a block for each process and
//! listener.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::{self, Write};
use std::time::Duration;

use super::bars;
use crate::diagnose::group::{AGES, Group};
use crate::diagnose::{Diagnosis, ProcessDiagnosis, SHOWN, Waiting, verdict};
use crate::report::table::{by_process, place};
use crate::text::{age, counted, escape, format_rate, seconds};

/// Ports and peers that are named.
const NAMED: usize = 3;

/// Writes it. `columns` and `rows`: the size of the terminal, `None` where there is none.
///
/// # Errors
/// Those of `out`.
pub fn write(
    diagnosis: &Diagnosis,
    columns: Option<usize>,
    rows: Option<usize>,
    out: &mut dyn Write,
) -> io::Result<()> {
    let mut head = summary(diagnosis);
    for chart in columns
        .into_iter()
        .flat_map(|columns| charts(&diagnosis.total, columns))
    {
        let _ = write!(head, "\n\n{chart}");
    }
    let processes = folded(&diagnosis.processes);
    let process = |(process, like): &(&ProcessDiagnosis, usize)| {
        of_process(process, *like, diagnosis.elapsed)
    };
    let processes_shown: Vec<String> = processes.iter().take(SHOWN).map(process).collect();
    let listeners = &diagnosis.listeners;
    let listener = |waiting: &Waiting| of_listener(diagnosis, waiting);
    let listeners_shown: Vec<String> = listeners.iter().take(SHOWN).map(listener).collect();
    let tail = diagnosis.ownerless.as_ref().map(|group| {
        let mut block = format!("unknown owner: {}", stuck(group, diagnosis.elapsed));
        push_causes(&mut block, group);
        push_places(&mut block, group);
        block
    });
    // The prompt takes a row too, and each of the two lines of what is left out takes two.
    let taken = height(&head) + tail.as_deref().map_or(0, height) + 5;
    let room = rows.map(|rows| rows.saturating_sub(taken));
    let of_listeners = listeners_shown.first().map_or(0, |block| height(block));
    let (processes_fit, used) = fitting(
        &processes_shown,
        room.map(|room| room.saturating_sub(of_listeners)),
    );
    let room = room.map(|room| room.saturating_sub(used));
    let (listeners_fit, _) = fitting(&listeners_shown, room);

    writeln!(out, "{head}")?;
    for block in &processes_shown[..processes_fit] {
        writeln!(out, "\n{block}")?;
    }
    let rest = processes.iter().skip(processes_fit);
    if rest.len() > 0 {
        let count: usize = rest.clone().map(|(_, like)| 1 + like).sum();
        let count = counted(count, "process");
        let stuck: usize = rest.map(|(process, _)| process.held.stuck).sum();
        let stuck = counted(stuck, "stuck socket");
        writeln!(out, "\nand {count} more with {stuck}: --json has all")?;
    }
    for block in &listeners_shown[..listeners_fit] {
        writeln!(out, "\n{block}")?;
    }
    let rest = listeners.len() - listeners_fit;
    if rest > 0 {
        let count = counted(rest, "listener");
        writeln!(out, "\nand {count} more: --json has all")?;
    }
    match tail {
        Some(block) => writeln!(out, "\n{block}"),
        None => Ok(()),
    }
}

/// Bars of the causes and the ages, as far as there is room.
fn charts(total: &Group, columns: usize) -> Vec<String> {
    if total.stuck == 0 {
        return Vec::new();
    }
    let causes = total.causes.iter();
    let causes: Vec<(&str, usize)> = causes.map(|(cause, of)| (cause.name(), of.count)).collect();
    let ages = AGES.iter().zip(total.ages);
    let ages: Vec<(&str, usize)> = ages.map(|((_, name), count)| (*name, count)).collect();
    let charts = [causes, ages].into_iter();
    charts
        .filter_map(|rows| Some(bars::chart(&rows, columns)?.join("\n")))
        .collect()
}

/// The rows of a block with the empty one before it; a long line may take more.
fn height(block: &str) -> usize {
    block.lines().count() + 1
}

/// How many of `blocks` fit into `room`, one at least, and the rows they take.
fn fitting(blocks: &[String], room: Option<usize>) -> (usize, usize) {
    let mut used = 0;
    for (index, block) in blocks.iter().enumerate() {
        let with = used + height(block);
        if index > 0 && room.is_some_and(|room| with > room) {
            return (index, used);
        }
        used = with;
    }
    (blocks.len(), used)
}

/// Processes, with how many others there are like each.
fn folded(processes: &[ProcessDiagnosis]) -> Vec<(&ProcessDiagnosis, usize)> {
    let mut folded: Vec<(&ProcessDiagnosis, usize)> = Vec::new();
    let mut places: HashMap<u64, usize> = HashMap::new();
    for process in processes {
        match places.get(&process.sockets) {
            Some(at) if folded[*at].0.is_like(process) => folded[*at].1 += 1,
            _ => {
                places.insert(process.sockets, folded.len());
                folded.push((process, 0));
            }
        }
    }
    folded
}

fn summary(diagnosis: &Diagnosis) -> String {
    let total = &diagnosis.total;
    let mut line = format!("{} stuck", counted(total.stuck, "socket"));
    for (index, (cause, of)) in total.causes.iter().enumerate() {
        let separator = if index == 0 { ": " } else { ", " };
        let _ = write!(line, "{separator}{} {cause}", of.count);
    }
    let _ = write!(line, "; {}", growth(total, diagnosis.elapsed));
    let dead: usize = diagnosis.processes.iter().map(|p| p.suspects()[0]).sum();
    if dead > 0 {
        let _ = write!(line, "; {}", counted(dead, "dead descriptor"));
    }
    line
}

/// How many come and go.
fn growth(group: &Group, elapsed: Duration) -> String {
    let time = seconds(elapsed);
    match (group.new, group.gone) {
        (0, 0) => format!("none new in {time}"),
        (new, gone) => {
            let rate = group.growth(elapsed);
            let text = format_rate(rate);
            let sign = if rate > 0.0 && text != "0" { "+" } else { "" };
            format!("{sign}{text} a minute ({new} new, {gone} gone in {time})")
        }
    }
}

fn stuck(group: &Group, elapsed: Duration) -> String {
    if group.stuck + group.gone == 0 {
        return "no stuck sockets".into();
    }
    let mut text = format!("{} stuck", group.stuck);
    if let Some(oldest) = group.oldest {
        let _ = write!(text, ", oldest {}", age(oldest));
    }
    let _ = write!(text, ", {}", growth(group, elapsed));
    text
}

fn of_process(of: &ProcessDiagnosis, like: usize, elapsed: Duration) -> String {
    let ProcessDiagnosis { process, held, .. } = of;
    let mut block = process.to_string();
    if like > 0 {
        let _ = write!(block, " (+{like} like it)");
    }
    if let Some(place) = place(&process.cgroup) {
        let _ = write!(block, " ({})", escape(&place));
    }
    let _ = write!(block, ": {}", stuck(held, elapsed));
    if of.shared > 0 {
        let _ = write!(block, ", {} of them shared with other processes", of.shared);
    }
    if let Some(verdict) = of.condition.verdict() {
        let _ = write!(block, "\n  {verdict}");
        for (index, thread) in of.asleep.iter().take(NAMED).enumerate() {
            let separator = if index == 0 { ": thread " } else { ", " };
            let _ = write!(block, "{separator}{thread}");
        }
        if of.asleep.len() > NAMED {
            let _ = write!(block, " and {} more", of.asleep.len() - NAMED);
        }
    }
    push_causes(&mut block, held);
    if of.waiting > 0 {
        let waiting = counted(of.waiting, "stuck connection");
        let _ = write!(block, "\n  {waiting} wait at its listener, see below");
    }
    let [dead, never, unknown] = of.suspects();
    if dead > 0 {
        let _ = write!(block, "\n  {dead} dead: {}", verdict::DEAD);
    }
    if never > 0 {
        let _ = write!(
            block,
            "\n  {never} never connected: fresh, or connect(2) failed; many are a leak of their own"
        );
    }
    if unknown > 0 {
        let them = counted(unknown, "descriptor");
        let _ = write!(
            block,
            "\n  {them} of TCP sockets in no table may be dead: their state may not be read"
        );
    }
    push_places(&mut block, held);
    let used = of.table.as_ref().map(|table| table.used);
    match (used, of.status.limit) {
        (Some(used), Some(limit)) => {
            let percent = (used as u128 * 100) / u128::from(limit.max(1));
            let _ = write!(block, "\n  descriptors: {used} of {limit} ({percent}%)");
        }
        (Some(used), None) => {
            let _ = write!(block, "\n  descriptors: {used}, limit unknown");
        }
        (None, _) => block.push_str("\n  descriptors: may not be read"),
    }
    if let Some(next) = &of.next {
        let _ = write!(block, "\n  next: {}  ({})", next.command, next.remark);
    }
    block
}

fn of_listener(diagnosis: &Diagnosis, waiting: &Waiting) -> String {
    let listener = &diagnosis.scan.listeners[waiting.listener];
    let owners: Vec<_> = by_process(&listener.owners).collect();
    let owner = match owners.first() {
        Some(first) => first[0].process.to_string(),
        None => "an unknown process".into(),
    };
    let mut block = format!("listener {} of {owner}", listener.local);
    if owners.len() > 1 {
        let _ = write!(block, " and {} more", owners.len() - 1);
    }
    let _ = write!(
        block,
        ": {}, backlog {} of {}",
        stuck(&waiting.group, diagnosis.elapsed),
        listener.waiting,
        listener.backlog
    );
    // The kernel takes one more than the limit (include/net/sock.h, sk_acceptq_is_full).
    if listener.backlog > 0 && listener.waiting > listener.backlog {
        block.push_str(" (full: new connections are dropped)");
    }
    push_causes(&mut block, &waiting.group);
    push_places(&mut block, &waiting.group);
    block
}

fn push_causes(block: &mut String, group: &Group) {
    for (cause, sockets) in &group.causes {
        let verdict = verdict::of_cause(*cause, sockets);
        let _ = write!(block, "\n  {} {cause}: {verdict}", sockets.count);
    }
}

/// The main ports and peers.
fn push_places(block: &mut String, group: &Group) {
    if group.stuck == 0 {
        return;
    }
    let port = |port: &u16| format!(":{port}");
    let ports = named(&group.ports, port);
    let peers = named(&group.peers, ToString::to_string);
    let _ = write!(block, "\n  ports {ports}; peers {peers}");
    // Clients of a server have a port each, which tells nothing.
    if group.peer_ports[0].1 > 1 || group.stuck == 1 {
        let _ = write!(block, "; their ports {}", named(&group.peer_ports, port));
    }
}

fn named<T>(counts: &[(T, usize)], text: impl Fn(&T) -> String) -> String {
    let first = counts.iter().take(NAMED);
    let mut names: Vec<String> = first
        .map(|(value, count)| format!("{} ({count})", text(value)))
        .collect();
    if counts.len() > NAMED {
        names.push(format!("{} more", counts.len() - NAMED));
    }
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_blocks_as_fit_are_shown_and_one_always() {
        let blocks = ["a\nb", "c", "d\ne\nf"].map(String::from);
        for (room, wanted) in [
            (None, (3, 9)),
            (Some(9), (3, 9)),
            (Some(8), (2, 5)),
            (Some(4), (1, 3)),
            (Some(0), (1, 3)),
        ] {
            assert_eq!(fitting(&blocks, room), wanted, "{room:?}");
        }
        assert_eq!(fitting(&[], Some(0)), (0, 0));
    }
}
