//! The diagnosis for people: a summary, charts where there is room, and a block for each process and
//! listener.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Write as _;
use std::io::{self, Write};
use std::time::Duration;

use super::bars;
use crate::diagnose::counts::{AGES, SocketCounts};
use crate::diagnose::pairing::{EndOwner, KnownBy, OtherEnd, OtherLeg};
use crate::diagnose::suggest::Suggestion;
use crate::diagnose::verdict::{Circumstance, Condition};
use crate::diagnose::{
    Diagnosis, ListenerDiagnosis, MAX_SHOWN, ProcessDiagnosis, SuspectCounts, verdict,
};
use crate::model::ListeningSocket;
use crate::report::table::{backlogs, by_process, place};
use crate::text::{age, columns_of, counted, escape, format_rate, seconds, wrap};

/// The maximum number of ports, peers or threads named in one line.
const MAX_NAMED: usize = 3;

/// Writes the report. `columns` and `rows` are the size of the terminal; `None` if `out` is not a terminal.
pub fn write(
    diagnosis: &Diagnosis,
    columns: Option<usize>,
    rows: Option<usize>,
    out: &mut dyn Write,
) -> io::Result<()> {
    let mut head = wrapped(&summary(diagnosis), columns);
    let processes = folded(&diagnosis.processes);
    let process = |(process, similar): &(&ProcessDiagnosis, Vec<&ProcessDiagnosis>)| {
        let mut block = wrapped(&process_block(process, similar, diagnosis.elapsed), columns);
        push_suggestions(&mut block, &process.suggestions, columns);
        if let Some(trace) = &process.trace {
            push_suggestion(&mut block, "where in the code", trace, columns);
        }
        block
    };
    let processes_shown: Vec<String> = processes.iter().take(MAX_SHOWN).map(process).collect();
    let listeners = &diagnosis.listeners;
    let listener =
        |listener: &ListenerDiagnosis| wrapped(&listener_block(diagnosis, listener), columns);
    let listeners_shown: Vec<String> = listeners.iter().take(MAX_SHOWN).map(listener).collect();
    let tail = diagnosis.ownerless.as_ref().map(|counts| {
        let mut block = format!("unknown owner: {}", stuck_text(counts, diagnosis.elapsed));
        push_causes(&mut block, counts, Circumstance::None);
        push_ports_and_peers(&mut block, counts);
        wrapped(&block, columns)
    });
    // The prompt takes one row. Each of the two "and N more" lines takes two, with the empty line before it.
    let taken =
        height(&head, columns) + tail.as_deref().map_or(0, |tail| height(tail, columns)) + 5;
    let mut room = rows.map(|rows| rows.saturating_sub(taken));
    let of_listeners = listeners_shown
        .first()
        .map_or(0, |block| height(block, columns));
    // The charts repeat what the blocks say, so the blocks come first.
    let least = of_listeners
        + processes_shown
            .first()
            .map_or(0, |block| height(block, columns));
    for chart in columns
        .into_iter()
        .flat_map(|columns| charts(&diagnosis.total, columns))
    {
        if room.is_some_and(|room| room < least + height(&chart, columns)) {
            continue;
        }
        room = room.map(|room| room - height(&chart, columns));
        let _ = write!(head, "\n\n{chart}");
    }
    let (processes_fit, used) = fitting(
        &processes_shown,
        room.map(|room| room.saturating_sub(of_listeners)),
        columns,
    );
    let room = room.map(|room| room.saturating_sub(used));
    let (listeners_fit, _) = fitting(&listeners_shown, room, columns);

    writeln!(out, "{head}")?;
    for block in &processes_shown[..processes_fit] {
        writeln!(out, "\n{block}")?;
    }
    let rest = processes.iter().skip(processes_fit);
    if rest.len() > 0 {
        let count: usize = rest.clone().map(|(_, similar)| 1 + similar.len()).sum();
        let count = counted(count, "process");
        let stuck =
            |(process, similar): &(&ProcessDiagnosis, Vec<_>)| merged(process, similar).stuck;
        let stuck: usize = rest.map(stuck).sum();
        let stuck = counted(stuck, "stuck socket");
        let more = format!("and {count} more with {stuck}: --json has all");
        writeln!(out, "\n{}", wrapped(&more, columns))?;
    }
    for block in &listeners_shown[..listeners_fit] {
        writeln!(out, "\n{block}")?;
    }
    let rest = listeners.len() - listeners_fit;
    if rest > 0 {
        let count = counted(rest, "listener");
        let more = format!("and {count} more: --json has all");
        writeln!(out, "\n{}", wrapped(&more, columns))?;
    }
    match tail {
        Some(block) => writeln!(out, "\n{block}"),
        None => Ok(()),
    }
}

/// The charts of the causes and of the ages that fit into `columns`.
fn charts(total: &SocketCounts, columns: usize) -> Vec<String> {
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

/// A block whose lines are broken between words where they are wider than a terminal.
fn wrapped(block: &str, columns: Option<usize>) -> String {
    /// The spaces before the later rows of a broken line, more than before any line.
    const INDENT: usize = 4;
    let Some(columns) = columns else {
        return block.to_owned();
    };
    let rows = block.lines().flat_map(|line| wrap(line, columns, INDENT));
    rows.collect::<Vec<_>>().join("\n")
}

/// The commands to run next. They are not broken, so that they can be copied; what they do stands below if it has no room beside.
fn push_suggestions(block: &mut String, suggestions: &[Suggestion], columns: Option<usize>) {
    let words = ["next", "then"].into_iter().zip(suggestions);
    words.for_each(|(word, suggestion)| push_suggestion(block, word, suggestion, columns));
}

fn push_suggestion(
    block: &mut String,
    word: &str,
    Suggestion { command, remark }: &Suggestion,
    columns: Option<usize>,
) {
    let line = format!("  {word}: {command}");
    let whole = format!("{line}  ({remark})");
    match columns {
        Some(columns) if columns_of(&whole) > columns => {
            let remark = wrapped(&format!("    ({remark})"), Some(columns));
            let _ = write!(block, "\n{line}\n{remark}");
        }
        _ => {
            let _ = write!(block, "\n{whole}");
        }
    }
}

/// The number of rows of a block with the empty row before it. The terminal breaks a command that is wider.
fn height(block: &str, columns: Option<usize>) -> usize {
    let rows = |line: &str| {
        columns.map_or(1, |columns| {
            columns_of(line).div_ceil(columns.max(1)).max(1)
        })
    };
    block.lines().map(rows).sum::<usize>() + 1
}

/// The number of `blocks` that fit into `room` rows, and the rows they take. At least one block is always shown.
fn fitting(blocks: &[String], room: Option<usize>, columns: Option<usize>) -> (usize, usize) {
    let mut used = 0;
    for (index, block) in blocks.iter().enumerate() {
        let with = used + height(block, columns);
        if index > 0 && room.is_some_and(|room| with > room) {
            return (index, used);
        }
        used = with;
    }
    (blocks.len(), used)
}

/// Merges processes with the same report, and processes with one connection each. The list has the other processes that each one
/// stands for. The processes with the most leaked descriptors come first.
fn folded(processes: &[ProcessDiagnosis]) -> Vec<(&ProcessDiagnosis, Vec<&ProcessDiagnosis>)> {
    let mut folded: Vec<(&ProcessDiagnosis, Vec<&ProcessDiagnosis>)> = Vec::new();
    let mut rows: HashMap<u64, usize> = HashMap::new();
    let mut siblings: Vec<usize> = Vec::new();
    for process in processes {
        let is_sibling = |row: &&usize| folded[**row].0.is_sibling(process);
        if let Some(&row) = siblings.iter().find(is_sibling) {
            folded[row].1.push(process);
            continue;
        }
        match rows.get(&process.sockets_signature) {
            Some(row) if folded[*row].0.is_like(process) => folded[*row].1.push(process),
            _ => {
                rows.insert(process.sockets_signature, folded.len());
                if process.per_connection {
                    siblings.push(folded.len());
                }
                folded.push((process, Vec::new()));
            }
        }
    }
    let leaked = |row: &(&ProcessDiagnosis, Vec<&ProcessDiagnosis>)| match row.0.per_connection {
        true => row.0.leaked() + row.1.iter().map(|other| other.leaked()).sum::<usize>(),
        false => row.0.leaked(),
    };
    folded.sort_by_key(|row| std::cmp::Reverse((leaked(row), row.0.waiting)));
    folded
}

/// The sockets of a process, together with those of its siblings. Workers that share all their sockets have the same ones.
fn merged(process: &ProcessDiagnosis, similar: &[&ProcessDiagnosis]) -> SocketCounts {
    match process.per_connection {
        false => process.held.clone(),
        true => {
            let mut all_counts: BTreeMap<u64, &SocketCounts> = BTreeMap::new();
            for one in std::iter::once(&process).chain(similar) {
                all_counts.insert(one.sockets_signature, &one.held);
            }
            SocketCounts::merged(all_counts.into_values())
        }
    }
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
    for part in &diagnosis.left_out {
        let _ = write!(line, "; {part}");
    }
    line
}

/// The change between the scans, in words.
fn growth_text(counts: &SocketCounts, elapsed: Duration) -> String {
    let time = seconds(elapsed);
    match (counts.new, counts.gone) {
        (0, 0) => format!("none new in {time}"),
        (new, gone) => {
            let rate = counts.growth_per_minute(elapsed);
            let text = format_rate(rate);
            let sign = if rate > 0.0 && text != "0" { "+" } else { "" };
            format!("{sign}{text} a minute ({new} new, {gone} gone in {time})")
        }
    }
}

fn stuck_text(counts: &SocketCounts, elapsed: Duration) -> String {
    if counts.stuck + counts.gone == 0 {
        return "no stuck sockets".into();
    }
    let mut text = format!("{} stuck", counts.stuck);
    if let Some(oldest) = counts.oldest {
        let _ = write!(text, ", oldest {}", age(oldest));
    }
    let _ = write!(text, ", {}", growth_text(counts, elapsed));
    text
}

fn process_block(
    diagnosis: &ProcessDiagnosis,
    similar: &[&ProcessDiagnosis],
    elapsed: Duration,
) -> String {
    let process = &diagnosis.process;
    let held = &merged(diagnosis, similar);
    let is_group = diagnosis.per_connection && !similar.is_empty();
    let mut block = match is_group {
        true => format!("{} processes {}", 1 + similar.len(), escape(&process.comm)),
        false => process.to_string(),
    };
    if !is_group && !similar.is_empty() {
        let _ = write!(block, " (+{} like it)", similar.len());
    }
    if let Some(place) = place(&process.cgroup) {
        let _ = write!(block, " ({})", escape(&place));
    }
    let _ = write!(block, ": {}", stuck_text(held, elapsed));
    if is_group {
        let all = || std::iter::once(diagnosis).chain(similar.iter().copied());
        let named = all().take(MAX_NAMED);
        let pids: Vec<String> = named.map(|one| one.process.id.pid.to_string()).collect();
        let _ = write!(block, "\n  pids {}", pids.join(", "));
        let rest = (1 + similar.len()).saturating_sub(MAX_NAMED);
        if rest > 0 {
            let _ = write!(block, " and {rest} more");
        }
        if let Some(parent) = diagnosis.status.parent {
            let _ = write!(block, "; parent {parent}");
        }
    } else if diagnosis.shared > 0 {
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
    push_causes(&mut block, held, diagnosis.circumstance());
    if diagnosis.is_at_limit() {
        let _ = write!(block, "\n  {}", verdict::AT_LIMIT);
    }
    if diagnosis.waiting > 0 {
        let waiting = match diagnosis.waiting {
            1 => "1 stuck connection waits".to_owned(),
            waiting => format!("{waiting} stuck connections wait"),
        };
        let _ = write!(block, "\n  {waiting} at its listener, see below");
    }
    let SuspectCounts {
        dead,
        never_connected,
        unknown,
    } = suspects(diagnosis, similar);
    if dead > 0 {
        let verdict = verdict::dead_verdict(diagnosis.circumstance());
        let _ = write!(block, "\n  {dead} dead: {verdict}");
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
    push_ports_and_peers(&mut block, held);
    if let (false, Some(legs)) = (is_group, &diagnosis.other_legs) {
        push_other_legs(&mut block, legs, elapsed);
    }
    let used = diagnosis.table.as_ref().map(|table| table.used);
    match (used, diagnosis.status.limit) {
        (Some(used), Some(limit)) => {
            let percent = (used as u128 * 100) / u128::from(limit.max(1));
            let _ = write!(block, "\n  descriptors: {used} of {limit} ({percent}%)");
            // The kernel gives out no number at or above the limit.
            if used as u64 > limit {
                block.push_str(": the limit was lowered after they were opened");
            }
        }
        (Some(used), None) => {
            let _ = write!(block, "\n  descriptors: {used}, limit unknown");
        }
        (None, _) => block.push_str("\n  descriptors: could not be read"),
    }
    push_accepting(&mut block, diagnosis);
    block
}

/// Whether connections wait at the listeners of a process that leaks nothing.
fn push_accepting(block: &mut String, diagnosis: &ProcessDiagnosis) {
    let listeners = &diagnosis.accepting;
    if listeners.is_empty() {
        return;
    }
    let ports: BTreeSet<u16> = listeners.iter().map(|listener| listener.port).collect();
    let named = ports.iter().take(MAX_NAMED);
    let mut names: Vec<String> = named.map(|port| format!(":{port}")).collect();
    if ports.len() > MAX_NAMED {
        names.push(format!("{} more", ports.len() - MAX_NAMED));
    }
    let at = names.join(", ");
    let waiting: u64 = listeners
        .iter()
        .map(|listener| u64::from(listener.waiting))
        .sum();
    let waiting = usize::try_from(waiting).unwrap_or(usize::MAX);
    let runs = diagnosis.condition == Condition::Normal;
    let _ = match waiting {
        0 if runs && !diagnosis.is_at_limit() => {
            write!(block, "\n  it can accept, and no connection waits at {at}")
        }
        0 => write!(block, "\n  no connection waits at {at}"),
        1 => write!(block, "\n  1 connection waits at {at} for accept(2)"),
        _ => write!(
            block,
            "\n  {waiting} connections wait at {at} for accept(2)"
        ),
    };
}

/// The suspects of a process, together with those of its siblings.
fn suspects(diagnosis: &ProcessDiagnosis, similar: &[&ProcessDiagnosis]) -> SuspectCounts {
    let mut counts = diagnosis.suspect_counts();
    for other in similar.iter().filter(|_| diagnosis.per_connection) {
        let of_other = other.suspect_counts();
        counts.dead += of_other.dead;
        counts.never_connected += of_other.never_connected;
        counts.unknown += of_other.unknown;
    }
    counts
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
    let circumstance = diagnosis.circumstance(listener);
    push_causes(&mut block, &listener_diagnosis.connections, circumstance);
    if listener_diagnosis.is_stalled {
        let _ = write!(
            block,
            "\n  nothing was accepted in {}{}",
            seconds(diagnosis.elapsed),
            match circumstance {
                Circumstance::None => ": the accept loop is stuck",
                _ => "",
            }
        );
    }
    push_ports_and_peers(&mut block, &listener_diagnosis.connections);
    block
}

fn push_causes(block: &mut String, counts: &SocketCounts, circumstance: Circumstance<'_>) {
    for (cause, sockets) in &counts.causes {
        let verdict = verdict::cause_verdict(*cause, sockets, circumstance);
        let _ = write!(block, "\n  {} {cause}: {verdict}", sockets.count);
    }
}

/// The main ports and peers.
fn push_ports_and_peers(block: &mut String, counts: &SocketCounts) {
    if counts.stuck == 0 {
        return;
    }
    let port = |port: &u16| format!(":{port}");
    let ports = join_counts(&counts.ports, port);
    let peers = join_counts(&counts.peers, ToString::to_string);
    let _ = write!(block, "\n  ports {ports}; peers {peers}");
    // Ports that occur once are ephemeral ports of clients, which are of no use to the operator.
    if counts.peer_ports[0].1 > 1 || counts.stuck == 1 {
        let _ = write!(
            block,
            "; their ports {}",
            join_counts(&counts.peer_ports, port)
        );
    }
    push_other_ends(block, counts);
}

/// Who is at the other ends, as far as they are on this host.
fn push_other_ends(block: &mut String, counts: &SocketCounts) {
    let text = |end: &OtherEnd| {
        let owner = match &end.owner {
            EndOwner::Process { pid, comm, fd } => {
                let fd = fd.map(|fd| format!(" (fd {fd})")).unwrap_or_default();
                format!("{}/{pid}{fd} on this host", escape(comm))
            }
            EndOwner::Unknown => "an unknown process on this host".to_owned(),
            EndOwner::Orphan => "on this host, closed by its process".to_owned(),
        };
        let nat = match end.known_by {
            KnownBy::Addresses => "",
            KnownBy::Conntrack => " behind NAT",
            KnownBy::LastSegment => " behind NAT (by the time of its last segment)",
        };
        match counts.stuck {
            1 => format!("{owner}{nat}, {}", end.state),
            stuck => format!("{owner}{nat}, {} ({} of {stuck})", end.state, end.count),
        }
    };
    let named = counts.other_ends.iter().take(MAX_NAMED);
    let mut ends: Vec<String> = named.map(text).collect();
    if ends.is_empty() {
        return;
    }
    let rest = counts.other_ends.iter().skip(MAX_NAMED);
    let rest: usize = rest.map(|end| end.count).sum();
    if rest > 0 {
        ends.push(format!("{rest} of others"));
    }
    let _ = write!(block, "\n  other end: {}", ends.join("; "));
}

/// What a proxy still has to send on the other connections of its pairs.
fn push_other_legs(block: &mut String, legs: &[OtherLeg], elapsed: Duration) {
    let count: usize = legs.iter().map(|leg| leg.count).sum();
    let bytes: u64 = legs.iter().map(|leg| leg.send_q).sum();
    let time = seconds(elapsed);
    let still = format!("with {bytes} unacknowledged bytes, and none was acknowledged in {time}");
    let _ = match legs {
        [leg] if count == 1 => write!(
            block,
            "\n  its other leg to {} is likely what keeps it: ESTABLISHED {still}",
            leg.peer
        ),
        legs => {
            let legs: Vec<_> = legs.iter().map(|leg| (leg.peer, leg.count)).collect();
            write!(
                block,
                "\n  their other legs to {} are likely what keeps them: ESTABLISHED {still}",
                join_counts(&legs, ToString::to_string)
            )
        }
    };
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
            assert_eq!(fitting(&blocks, room, None), expected, "{room:?}");
        }
        assert_eq!(fitting(&[], Some(0), None), (0, 0));
    }

    #[test]
    fn prose_is_broken_between_words_and_commands_are_not() {
        let suggestion = Suggestion {
            command: "gdb -p 4711 -batch -ex 'thread apply all bt'".into(),
            remark: "stops it while symbols load, which can take long".into(),
        };
        let shown = |columns| {
            let prose =
                "java/4711: 3 stuck\n  3 drained: it has read all bytes, and has not closed";
            let mut block = wrapped(prose, columns);
            push_suggestions(&mut block, std::slice::from_ref(&suggestion), columns);
            block
        };
        assert_eq!(shown(None).lines().count(), 3);
        assert_eq!(shown(Some(200)), shown(None));
        let narrow = shown(Some(40));
        assert_eq!(
            narrow,
            "java/4711: 3 stuck\n  3 drained: it has read all bytes, and\n    has not closed\n  \
             next: gdb -p 4711 -batch -ex 'thread apply all bt'\n    (stops it while symbols load, which\n    can take long)"
        );
        let mut traced = narrow.clone();
        push_suggestion(&mut traced, "where in the code", &suggestion, None);
        let last = traced.lines().last();
        assert!(last.is_some_and(|line| line.starts_with("  where in the code: gdb ")));
        // The command takes two rows.
        assert_eq!(height(&narrow, Some(40)), narrow.lines().count() + 2);
    }
}
