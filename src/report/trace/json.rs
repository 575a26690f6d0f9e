//! The places for programs: `schema_version` 1 of its own. Fields are added, never renamed.

use std::io::{self, Write};

use serde::Serialize;

use super::clock;
use super::text::fd_in;
use crate::bpf::tracer::Opened;
use crate::model::{Scan, TimeAndPlace};
use crate::report::serialize::{
    Endpoint, JsonAbsentOwner, JsonContainer, JsonTimeAndPlace, container, endpoint,
    json_absent_owners, json_time_and_place, serializer,
};
use crate::trace::Trace;
use crate::trace::places::{End, Place, Places, Unread};
use crate::trace::stack::{Frame, Stack};

const SCHEMA_VERSION: u32 = 1;
/// The maximum number of sockets in the list of a place.
const MAX_SOCKETS: usize = 100;

/// Writes one document.
pub fn write(
    trace: &Trace,
    scan: &Scan,
    found: &Places<'_>,
    time_and_place: &TimeAndPlace,
    out: &mut dyn Write,
) -> io::Result<()> {
    let coverage = &scan.coverage;
    let document = Document {
        schema_version: SCHEMA_VERSION,
        cwkill_version: env!("CARGO_PKG_VERSION"),
        time_and_place: json_time_and_place(time_and_place),
        watched_seconds: trace.lasted.as_secs_f64(),
        became_stuck: found.new,
        stuck_before: found.before,
        end_not_read: found.end_not_read(),
        place_unknown: found.unknown,
        places: found.places.iter().map(place).collect(),
        problems: found
            .problems
            .iter()
            .map(|(traced, process, problem)| JsonProblem {
                pid: traced.pid,
                comm: process.as_ref().map(|process| process.comm.as_str()),
                code: problem.code(),
                message: problem.to_string(),
            })
            .collect(),
        not_read_by: found.unread.iter().map(unread).collect(),
        reads_not_seen: trace.not_seen.reads.as_deref(),
        accepts_not_seen: trace.not_seen.accepts.as_deref(),
        not_seen_later: trace.not_seen.later,
        ends_sampled: trace.counts.reads,
        ends_sampled_without_stack: trace.counts.reads_without_slot,
        connections_opened: trace.counts.opened,
        closed_by_peer: trace.counts.closed_by_peer,
        samples_missed: trace.symbols.missed,
        walk_incomplete: trace.incomplete.as_deref(),
        younger: scan.younger,
        in_use: scan.in_use,
        unreadable_processes: coverage.unreadable_processes,
        unreachable_namespaces: coverage.unreachable_namespaces,
        namespaces_not_looked_into: coverage.namespaces_not_looked_into,
        sockets_not_looked_into: coverage.sockets_not_looked_into,
        possible_matches: coverage.undecided,
        absent_owners: json_absent_owners(&coverage.absent_owners),
    };
    document.serialize(&mut serializer(&mut *out))?;
    out.write_all(b"\n")
}

#[derive(Serialize)]
struct Document<'a> {
    schema_version: u32,
    cwkill_version: &'static str,
    #[serde(flatten)]
    time_and_place: JsonTimeAndPlace<'a>,
    watched_seconds: f64,
    /// The sockets that became stuck during the trace and still are.
    became_stuck: usize,
    /// The sockets that were stuck before.
    stuck_before: usize,
    /// Those of `became_stuck` whose end nobody has read.
    end_not_read: usize,
    /// Those of `became_stuck` of which no stack was taken, or none could be read.
    place_unknown: usize,
    places: Vec<JsonPlace<'a>>,
    problems: Vec<JsonProblem<'a>>,
    /// Who has not read the end of sockets of which nothing else is known.
    not_read_by: Vec<JsonUnread<'a>>,
    /// Why it was not seen where ends are read: the places are then where connections were opened.
    reads_not_seen: Option<&'a str>,
    accepts_not_seen: Option<&'a str>,
    /// Whether `kernel.ftrace_enabled` became 0 during the trace.
    not_seen_later: bool,
    ends_sampled: u64,
    ends_sampled_without_stack: u64,
    connections_opened: u64,
    closed_by_peer: u64,
    samples_missed: usize,
    /// Why it is not known of all sockets when they became stuck.
    walk_incomplete: Option<&'a str>,
    younger: usize,
    in_use: usize,
    unreadable_processes: usize,
    unreachable_namespaces: usize,
    namespaces_not_looked_into: usize,
    sockets_not_looked_into: Option<usize>,
    possible_matches: usize,
    absent_owners: Vec<JsonAbsentOwner>,
}

#[derive(Serialize)]
struct JsonPlace<'a> {
    /// One of the processes that run this code.
    pid: i32,
    /// All of them.
    pids: Vec<i32>,
    comm: Option<&'a str>,
    container: Option<JsonContainer<'a>>,
    count: usize,
    /// Its part of `became_stuck`; an estimate if `place_unknown` is not 0.
    share: f64,
    /// When the first and the last of them became stuck, in RFC 3339; null if it is known of none.
    first_stuck: Option<String>,
    last_stuck: Option<String>,
    end_was_read: bool,
    /// Where the end was read; null if nobody has read it, or if it was not seen where.
    read: Option<JsonStack<'a>>,
    /// How one of them was opened, `connected` or `accepted`; null if that was not seen.
    opened_how: Option<&'static str>,
    /// Where that one was opened.
    opened_example: Option<JsonStack<'a>>,
    /// The first of its sockets.
    sockets: Vec<JsonSocket>,
}

#[derive(Serialize)]
struct JsonStack<'a> {
    /// The innermost first.
    frames: Vec<JsonFrame<'a>>,
    /// The index of the first frame of the program's own.
    first_own_frame: Option<usize>,
    stack_end: &'static str,
}

#[derive(Serialize)]
struct JsonFrame<'a> {
    function: Option<&'a str>,
    file: Option<&'a str>,
    line: Option<u32>,
    module: Option<&'a str>,
    address: u64,
    inlined: bool,
    origin: &'static str,
}

#[derive(Serialize)]
struct JsonSocket {
    local: Endpoint,
    peer: Endpoint,
    cookie: String,
    fd: Option<i32>,
    stuck_since: Option<String>,
}

#[derive(Serialize)]
struct JsonUnread<'a> {
    pid: Option<i32>,
    comm: Option<&'a str>,
    /// Whether it has not even accepted them.
    not_accepted: bool,
    count: usize,
}

#[derive(Serialize)]
struct JsonProblem<'a> {
    pid: i32,
    comm: Option<&'a str>,
    code: &'static str,
    message: String,
}

fn place<'a>(place: &'a Place<'_>) -> JsonPlace<'a> {
    let times = place.times();
    let (traced, process) = place.process();
    let process = process.map(|process| &**process);
    let sockets = place.sockets.iter().take(MAX_SOCKETS);
    JsonPlace {
        pid: traced.pid,
        pids: place.processes.keys().map(|it| it.pid).collect(),
        comm: process.map(|process| process.comm.as_str()),
        container: process.and_then(container),
        count: place.sockets.len(),
        share: place.share,
        first_stuck: times.map(|(first, _)| clock(first)),
        last_stuck: times.map(|(_, last)| clock(last)),
        end_was_read: !matches!(place.end, End::NotRead),
        read: match place.end {
            End::ReadAt(read) => Some(stack(read)),
            End::Read | End::NotRead => None,
        },
        opened_how: place.opened.map(|(how, _)| match how {
            Opened::Connected => "connected",
            Opened::Accepted => "accepted",
        }),
        opened_example: place.opened.map(|(_, it)| stack(it)),
        sockets: sockets
            .map(|stuck| JsonSocket {
                local: endpoint(stuck.target.socket.id.tuple().local),
                peer: endpoint(stuck.target.socket.id.tuple().peer),
                cookie: stuck.target.socket.cookie().to_string(),
                fd: fd_in(stuck.target, stuck.traced.pid),
                stuck_since: stuck.since.map(clock),
            })
            .collect(),
    }
}

fn stack(stack: &Stack) -> JsonStack<'_> {
    JsonStack {
        frames: stack.frames.iter().map(frame).collect(),
        first_own_frame: stack.first_own(),
        stack_end: stack.end.name(),
    }
}

fn frame(frame: &Frame) -> JsonFrame<'_> {
    JsonFrame {
        function: frame.function.as_deref(),
        file: frame.file.as_deref(),
        line: frame.line,
        module: frame.module.as_deref(),
        address: frame.address,
        inlined: frame.inlined,
        origin: frame.origin.name(),
    }
}

fn unread(unread: &Unread) -> JsonUnread<'_> {
    let process = unread.process.as_deref();
    JsonUnread {
        pid: process.map(|process| process.id.pid),
        comm: process.map(|process| process.comm.as_str()),
        not_accepted: unread.not_accepted,
        count: unread.count,
    }
}
