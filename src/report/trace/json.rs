//! The places for programs: `schema_version` 1 of its own. Fields are added, never renamed.

use std::io::{self, Write};
use std::time::Duration;

use serde::Serialize;

use crate::bpf::tracer::Opened;
use crate::model::{Scan, TimeAndPlace};
use crate::report::serialize::{
    Endpoint, JsonAbsentOwner, JsonContainer, JsonTimeAndPlace, container, endpoint,
    json_absent_owners, json_time_and_place, millis, serializer,
};
use crate::sys::monotonic;
use crate::trace::Trace;
use crate::trace::places::{Place, Places};
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
        end_not_read: found.unread,
        place_unknown: found.unknown,
        places: found.places.iter().map(|it| place(it, found)).collect(),
        problems: found
            .problems
            .iter()
            .map(|(pid, process, problem)| JsonProblem {
                pid: *pid,
                comm: process.as_ref().map(|process| process.comm.as_str()),
                code: problem.code(),
                message: problem.to_string().replace("{pid}", &pid.to_string()),
            })
            .collect(),
        accepts_not_seen: trace.no_accepts.as_ref().map(ToString::to_string),
        ends_sampled: trace.counts.reads,
        ends_sampled_without_stack: trace.counts.reads_without_slot,
        connections_opened: trace.counts.opened,
        closed_by_peer: trace.counts.closed_by_peer,
        samples_missed: trace.symbols.missed,
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
    accepts_not_seen: Option<String>,
    ends_sampled: u64,
    ends_sampled_without_stack: u64,
    connections_opened: u64,
    closed_by_peer: u64,
    samples_missed: usize,
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
    pid: i32,
    comm: Option<&'a str>,
    container: Option<JsonContainer<'a>>,
    count: usize,
    /// Of the sockets of which a place is known.
    share: f64,
    /// How long ago the first and the last of them became stuck.
    first_stuck_ms: u64,
    last_stuck_ms: u64,
    /// Where the end was read; null if nobody has read it.
    read: Option<JsonStack<'a>>,
    /// `connected` or `accepted`; null if that was not seen.
    opened_by: Option<&'static str>,
    opened: Option<JsonStack<'a>>,
    /// The first of its sockets.
    sockets: Vec<JsonSocket>,
}

#[derive(Serialize)]
struct JsonStack<'a> {
    /// The innermost first.
    frames: Vec<JsonFrame<'a>>,
    /// The index of the first frame of the program's own.
    own: Option<usize>,
    end: &'static str,
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
    stuck_ms: Option<u64>,
}

#[derive(Serialize)]
struct JsonProblem<'a> {
    pid: i32,
    comm: Option<&'a str>,
    code: &'static str,
    message: String,
}

fn place<'a>(place: &'a Place<'_>, found: &Places<'_>) -> JsonPlace<'a> {
    let (first, last) = place.times();
    let process = place.process.as_deref();
    let sockets = place.sockets.iter().take(MAX_SOCKETS);
    JsonPlace {
        pid: place.pid,
        comm: process.map(|process| process.comm.as_str()),
        container: process.and_then(container),
        count: place.sockets.len(),
        share: share(place.sockets.len(), found.known()),
        first_stuck_ms: ago(first),
        last_stuck_ms: ago(last),
        read: place.read.map(stack),
        opened_by: place.opened.map(|(how, _)| match how {
            Opened::Connected => "connected",
            Opened::Accepted => "accepted",
        }),
        opened: place.opened.map(|(_, it)| stack(it)),
        sockets: sockets
            .map(|(target, life)| JsonSocket {
                local: endpoint(target.socket.id.tuple().local),
                peer: endpoint(target.socket.id.tuple().peer),
                cookie: target.socket.cookie().to_string(),
                fd: target.owners.first().map(|owner| owner.fd.0),
                stuck_ms: life.stuck_since.map(ago),
            })
            .collect(),
    }
}

fn stack(stack: &Stack) -> JsonStack<'_> {
    JsonStack {
        frames: stack.frames.iter().map(frame).collect(),
        own: stack.first_own(),
        end: stack.end.name(),
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

fn ago(at: Duration) -> u64 {
    millis(monotonic().saturating_sub(at))
}

fn share(part: usize, whole: usize) -> f64 {
    #[expect(
        clippy::cast_precision_loss,
        reason = "numbers of sockets are far below 2^52"
    )]
    let share = part as f64 / whole.max(1) as f64;
    share
}
