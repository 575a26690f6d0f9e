//! The diagnosis for people: a summary, charts where there is room, and a block for each process and
//! listener.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::{self, Write};
use std::time::Duration;

use super::bars;
use crate::diagnose::group::{AGES, SocketGroup};
use crate::diagnose::suggest::Suggestion;
use crate::diagnose::{
    Diagnosis, ListenerDiagnosis, MAX_SHOWN, ProcessDiagnosis, SuspectCounts, verdict,
};
use crate::model::ListeningSocket;
use crate::report::table::{backlogs, by_process, place};
use crate::text::{age, counted, escape, format_rate, seconds};

/// The maximum number of ports, peers or threads named in one line.
const MAX_NAMED: usize = 3;

/// Writes the report. `columns` and `rows` are the size of the terminal; `None` if `out` is not a terminal.
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
    let process = |(process, similar): &(&ProcessDiagnosis, usize)| {
        process_block(process, *similar, diagnosis.elapsed)
    };
    let processes_shown: Vec<String> = processes.iter().take(MAX_SHOWN).map(process).collect();
    let listeners = &diagnosis.listeners;
    let listener = |listener: &ListenerDiagnosis| listener_block(diagnosis, listener);
    let listeners_shown: Vec<String> = listeners.iter().take(MAX_SHOWN).map(listener).collect();
    let tail = diagnosis.ownerless.as_ref().map(|group| {
        let mut block = format!("unknown owner: {}", stuck_text(group, diagnosis.elapsed));
        push_causes(&mut block, group);
        push_places(&mut block, group);
        block
    });
    // The prompt takes one row. Each of the two "and N more" lines takes two, with the empty line before it.
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
        let count: usize = rest.clone().map(|(_, similar)| 1 + similar).sum();
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

/// The charts of the causes and of the ages that fit into `columns`.
fn charts(total: &SocketGroup, columns: usize) -> Vec<String> {
    if total.stuck == 0 {
        return Vec::new();
    }
    let causes = total.causes.iter();
    let causes: Vec<(&str, usize)> = causes.map(|(cause, s)| (cause.name(), s.count)).collect();
    let ages = AGES.iter().zip(total.ages);
    let ages: Vec<(&str, usize)> = ages.map(|((_, name), count)| (*name, count)).collect();
    let charts = [causes, ages].into_iter();
    charts
        .filter_map(|rows| Some(bars::chart(&rows, columns)?.join("\n")))
        .collect()
}

/// The number of rows of a block with the empty row before it. Lines that the terminal wraps count as one row.
fn height(block: &str) -> usize {
    block.lines().count() + 1
}

/// The number of `blocks` that fit into `room` rows, and the rows they take. At least one block is always shown.
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

/// Merges processes with the same report; the number is how many other processes each one stands for.
fn folded(processes: &[ProcessDiagnosis]) -> Vec<(&ProcessDiagnosis, usize)> {
    let mut folded: Vec<(&ProcessDiagnosis, usize)> = Vec::new();
    let mut rows: HashMap<u64, usize> = HashMap::new();
    for process in processes {
        match rows.get(&process.sockets_signature) {
            Some(row) if folded[*row].0.is_like(process) => folded[*row].1 += 1,
            _ => {
                rows.insert(process.sockets_signature, folded.len());
                folded.push((process, 0));
            }
        }
    }
    folded
}

fn summary(diagnosis: &Diagnosis) -> String {
    let total = &diagnosis.total;
    let mut line = format!("{} stuck", counted(total.stuck, "socket"));
    for (index, (cause, sockets)) in total.causes.iter().enumerate() {
        let separator = if index == 0 { ": " } else { ", " };
        let _ = write!(line, "{separator}{} {cause}", sockets.count);
    }
    let _ = write!(line, "; {}", growth_text(total, diagnosis.elapsed));
    let processes = diagnosis.processes.iter();
    let dead: usize = processes.map(|p| p.suspect_counts().dead).sum();
    if dead > 0 {
        let _ = write!(line, "; {}", counted(dead, "dead descriptor"));
    }
    line
}

/// The change between the scans, in words.
fn growth_text(group: &SocketGroup, elapsed: Duration) -> String {
    let time = seconds(elapsed);
    match (group.new, group.gone) {
        (0, 0) => format!("none new in {time}"),
        (new, gone) => {
            let rate = group.growth_per_minute(elapsed);
            let text = format_rate(rate);
            let sign = if rate > 0.0 && text != "0" { "+" } else { "" };
            format!("{sign}{text} a minute ({new} new, {gone} gone in {time})")
        }
    }
}

fn stuck_text(group: &SocketGroup, elapsed: Duration) -> String {
    if group.stuck + group.gone == 0 {
        return "no stuck sockets".into();
    }
    let mut text = format!("{} stuck", group.stuck);
    if let Some(oldest) = group.oldest {
        let _ = write!(text, ", oldest {}", age(oldest));
    }
    let _ = write!(text, ", {}", growth_text(group, elapsed));
    text
}

fn process_block(diagnosis: &ProcessDiagnosis, similar: usize, elapsed: Duration) -> String {
    let ProcessDiagnosis { process, held, .. } = diagnosis;
    let mut block = process.to_string();
    if similar > 0 {
        let _ = write!(block, " (+{similar} like it)");
    }
    if let Some(place) = place(&process.cgroup) {
        let _ = write!(block, " ({})", escape(&place));
    }
    let _ = write!(block, ": {}", stuck_text(held, elapsed));
    if diagnosis.shared > 0 {
        let _ = write!(
            block,
            ", {} of them shared with other processes",
            diagnosis.shared
        );
    }
    if let Some(verdict) = diagnosis.condition.verdict() {
        let _ = write!(block, "\n  {verdict}");
        for (index, thread) in diagnosis
            .uninterruptible_threads
            .iter()
            .take(MAX_NAMED)
            .enumerate()
        {
            let separator = if index == 0 { ": thread " } else { ", " };
            let _ = write!(block, "{separator}{thread}");
        }
        if diagnosis.uninterruptible_threads.len() > MAX_NAMED {
            let _ = write!(
                block,
                " and {} more",
                diagnosis.uninterruptible_threads.len() - MAX_NAMED
            );
        }
    }
    push_causes(&mut block, held);
    if diagnosis.waiting > 0 {
        let waiting = counted(diagnosis.waiting, "stuck connection");
        let _ = write!(block, "\n  {waiting} wait at its listener, see below");
    }
    let SuspectCounts {
        dead,
        never_connected,
        unknown,
    } = diagnosis.suspect_counts();
    if dead > 0 {
        let _ = write!(block, "\n  {dead} dead: {}", verdict::DEAD);
    }
    if never_connected > 0 {
        let _ = write!(
            block,
            "\n  {never_connected} never connected: fresh, or connect(2) failed; many are a leak of their own"
        );
    }
    if unknown > 0 {
        let them = counted(unknown, "descriptor");
        let _ = write!(
            block,
            "\n  {them} of TCP sockets in no table may be dead: their state could not be read"
        );
    }
    push_places(&mut block, held);
    let used = diagnosis.table.as_ref().map(|table| table.used);
    match (used, diagnosis.status.limit) {
        (Some(used), Some(limit)) => {
            let percent = (used as u128 * 100) / u128::from(limit.max(1));
            let _ = write!(block, "\n  descriptors: {used} of {limit} ({percent}%)");
        }
        (Some(used), None) => {
            let _ = write!(block, "\n  descriptors: {used}, limit unknown");
        }
        (None, _) => block.push_str("\n  descriptors: could not be read"),
    }
    if let Some(Suggestion { command, remark }) = &diagnosis.suggestion {
        let _ = write!(block, "\n  next: {command}  ({remark})");
    }
    block
}

fn listener_block(diagnosis: &Diagnosis, listener_diagnosis: &ListenerDiagnosis) -> String {
    let listener = &diagnosis.scan.listeners[listener_diagnosis.listener];
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
        ": {}, {} {}",
        stuck_text(&listener_diagnosis.connections, diagnosis.elapsed),
        if listener.sockets.len() == 1 {
            "backlog"
        } else {
            "backlogs"
        },
        backlogs(listener, " of ")
    );
    let is_full = |socket: &ListeningSocket| socket.backlog > 0 && socket.is_full();
    if listener.sockets.iter().any(is_full) {
        block.push_str(" (full: new connections are dropped)");
    }
    if listener.sockets.len() > 1 {
        let _ = write!(
            block,
            "\n  {} listening sockets share the address (SO_REUSEPORT); the kernel does not tell in whose backlog each connection waits",
            listener.group_size
        );
    } else if listener.group_size > 1 {
        let _ = write!(
            block,
            "\n  one of {} listening sockets at this address (SO_REUSEPORT); this backlog is its own",
            listener.group_size
        );
    }
    push_causes(&mut block, &listener_diagnosis.connections);
    if listener_diagnosis.is_stalled {
        let _ = write!(
            block,
            "\n  nothing was accepted in {}: {}",
            seconds(diagnosis.elapsed),
            match diagnosis.is_at_limit(listener) {
                true => "its owner is at its limit of descriptors, so accept(2) fails",
                false => "the accept loop is stuck",
            }
        );
    }
    push_places(&mut block, &listener_diagnosis.connections);
    block
}

fn push_causes(block: &mut String, group: &SocketGroup) {
    for (cause, sockets) in &group.causes {
        let verdict = verdict::cause_verdict(*cause, sockets);
        let _ = write!(block, "\n  {} {cause}: {verdict}", sockets.count);
    }
}

/// The main ports and peers.
fn push_places(block: &mut String, group: &SocketGroup) {
    if group.stuck == 0 {
        return;
    }
    let port = |port: &u16| format!(":{port}");
    let ports = join_counts(&group.ports, port);
    let peers = join_counts(&group.peers, ToString::to_string);
    let _ = write!(block, "\n  ports {ports}; peers {peers}");
    // Ports that occur once are ephemeral ports of clients, which are of no use to the operator.
    if group.peer_ports[0].1 > 1 || group.stuck == 1 {
        let _ = write!(
            block,
            "; their ports {}",
            join_counts(&group.peer_ports, port)
        );
    }
}

fn join_counts<T>(counts: &[(T, usize)], text: impl Fn(&T) -> String) -> String {
    let first = counts.iter().take(MAX_NAMED);
    let mut names: Vec<String> = first
        .map(|(value, count)| format!("{} ({count})", text(value)))
        .collect();
    if counts.len() > MAX_NAMED {
        names.push(format!("{} more", counts.len() - MAX_NAMED));
    }
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_blocks_that_fit_are_shown_and_always_one() {
        let blocks = ["a\nb", "c", "d\ne\nf"].map(String::from);
        for (room, expected) in [
            (None, (3, 9)),
            (Some(9), (3, 9)),
            (Some(8), (2, 5)),
            (Some(4), (1, 3)),
            (Some(0), (1, 3)),
        ] {
            assert_eq!(fitting(&blocks, room), expected, "{room:?}");
        }
        assert_eq!(fitting(&[], Some(0)), (0, 0));
    }
}
