//! The report for programs: `schema_version` 1. Fields are added, never renamed.
//!
//! The sockets are written in blocks, so the document is never in memory as a whole.

use std::collections::BTreeMap;
use std::io::{self, Write};

use serde::Serialize;

use super::advice::{JsonAdvice, json_advice};
use super::backlogs::{JsonBacklog, json_backlog};
use super::counts::{self, JsonProcessCount};
use super::descriptors::{DescriptorCounts, JsonStop, json_stops};
use super::serialize::{
    Endpoint, JsonAbsentOwner, JsonNetns, JsonOwner, JsonTimeAndPlace, JsonTracked, SCHEMA_VERSION,
    endpoint, json_absent_owners, json_netns, json_owners, json_time, json_time_and_place,
    json_tracked, millis, put, write_around,
};
use super::{DeadOfProcess, Run, SocketCounts, text};
use crate::filter::selectors::IN_USE_WITHIN;
use crate::model::{
    Exclusion, Listener, ListeningSocket, Method, MethodError, Outcome, Owner, Plan, SkipReason,
    Spinning, Target, TimeAndPlace,
};
use crate::parallel::in_blocks;
use crate::watch::NewSockets;

/// Number of sockets that one thread serializes at a time. The blocks of a long list are serialized in parallel.
const SOCKETS_PER_BLOCK: usize = 512;
/// The maximum number of blocks in memory.
const MAX_BLOCKS: usize = 16;

/// Writes one document with every socket and the summary.
pub fn write_document(
    run: &Run,
    time_and_place: &TimeAndPlace,
    out: &mut dyn Write,
) -> io::Result<()> {
    let head = Head {
        schema_version: SCHEMA_VERSION,
        cwkill_version: env!("CARGO_PKG_VERSION"),
        time_and_place: json_time_and_place(time_and_place),
        dry_run: !run.acted,
    };
    let coverage = &run.scan.coverage;
    let tail = Tail {
        owners_known: run.scan.owners_known,
        unreadable_processes: coverage.unreadable_processes,
        hidden_processes: coverage.hidden_processes,
        unreachable_namespaces: coverage.unreachable_namespaces,
        processes_in_unknown_namespace: coverage.unknown_namespaces,
        namespaces_not_looked_into: coverage.namespaces_not_looked_into,
        sockets_not_looked_into: coverage.sockets_not_looked_into,
        absent_owners: json_absent_owners(&coverage.absent_owners),
        possible_matches: coverage.undecided,
        unnamed_containers: coverage.unnamed.containers,
        mptcp_subflows_in_unknown_state: coverage.unlisted_subflows,
        conntrack_close_wait: coverage.tracked.map(json_tracked),
        descriptors_not_searched: coverage.unexamined_descriptors,
        sockets_in_unknown_namespace: coverage.unplaced_sockets,
        backlogs: run.backlogs.as_ref().map(|backlogs| {
            let json = |backlog| json_backlog(run, backlog);
            backlogs.iter().map(json).collect()
        }),
        dead_descriptors: run
            .dead_descriptors
            .as_ref()
            .map(|dead| dead.iter().map(json_dead).collect()),
        reclaim: run.reclaim_requested.then(|| JsonReclaim {
            owners: json_stops(&run.stops),
            advice: json_advice(&run.advice),
            summary: match run.acted {
                true => DescriptorCounts::of_scan(&run.scan),
                false => DescriptorCounts::default(),
            },
        }),
        spinning: run.spinning.iter().map(json_spinning).collect(),
        by_process: counts::sockets_by_process(&run.scan),
        by_cause: counts::sockets_by_cause(&run.scan),
        summary: SocketCounts::of(run),
        new_sockets: run.new_sockets.as_ref().map(json_new_sockets),
    };
    write_around(&head, "sockets", &tail, out, |out| {
        write_sockets(run, out, b",", |socket, bytes| put(&socket, bytes))
    })
}

/// Writes one line per socket, each a JSON object.
pub fn write_lines(
    run: &Run,
    time_and_place: &TimeAndPlace,
    out: &mut dyn Write,
) -> io::Result<()> {
    let time = &json_time(time_and_place);
    write_sockets(run, out, b"\n", |socket, bytes| {
        let line = SocketLine {
            schema_version: SCHEMA_VERSION,
            time,
            owners_known: run.scan.owners_known,
            socket,
        };
        put(&line, bytes)
    })?;
    match run.scan.targets.is_empty() {
        true => Ok(()),
        false => out.write_all(b"\n"),
    }
}

/// Writes every socket with `put`, in order, with `separator` between them.
fn write_sockets(
    run: &Run,
    out: &mut dyn Write,
    separator: &[u8],
    put: impl Fn(JsonSocket<'_>, &mut Vec<u8>) -> io::Result<()> + Sync,
) -> io::Result<()> {
    let block = |targets: &[Target]| -> io::Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(targets.len() * 512);
        for (index, target) in targets.iter().enumerate() {
            if index > 0 {
                bytes.extend_from_slice(separator);
            }
            put(json_socket(run, target), &mut bytes)?;
        }
        Ok(bytes)
    };
    let mut is_first = true;
    for targets in run.scan.targets.chunks(SOCKETS_PER_BLOCK * MAX_BLOCKS) {
        for block in in_blocks(targets, SOCKETS_PER_BLOCK, block) {
            if !is_first {
                out.write_all(separator)?;
            }
            is_first = false;
            out.write_all(&block?)?;
        }
    }
    Ok(())
}

/// The fields before the sockets.
#[derive(Serialize)]
struct Head<'a> {
    schema_version: u32,
    cwkill_version: &'static str,
    #[serde(flatten)]
    time_and_place: JsonTimeAndPlace<'a>,
    dry_run: bool,
}

/// The fields after the sockets.
#[derive(Serialize)]
struct Tail<'a> {
    owners_known: bool,
    unreadable_processes: usize,
    hidden_processes: bool,
    unreachable_namespaces: usize,
    /// They may be in a namespace that was not searched.
    processes_in_unknown_namespace: usize,
    /// Sockets that were left alone because their owner is unknown: they may match.
    possible_matches: usize,
    /// Containers that may be selected, and whose names could not be read.
    unnamed_containers: usize,
    mptcp_subflows_in_unknown_state: usize,
    /// Not in scope, because the operator named none.
    namespaces_not_looked_into: usize,
    /// All their TCP sockets; `None`: not known of each namespace.
    sockets_not_looked_into: Option<usize>,
    absent_owners: Vec<JsonAbsentOwner>,
    /// Conntrack entries of connections of others; `None`: there are none, or cwkill did not look.
    conntrack_close_wait: Option<JsonTracked>,
    /// They were not searched for namespaces that only a socket keeps alive.
    descriptors_not_searched: usize,
    sockets_in_unknown_namespace: usize,
    /// The backlogs with dead connections; `None` without `--drain-backlog`.
    backlogs: Option<Vec<JsonBacklog<'a>>>,
    /// The dead descriptors that match; `None` if cwkill did not look for them.
    dead_descriptors: Option<Vec<JsonDead<'a>>>,
    /// `None` without `--reclaim`.
    reclaim: Option<JsonReclaim<'a>>,
    spinning: Vec<JsonSpinning<'a>>,
    by_process: Vec<JsonProcessCount<'a>>,
    by_cause: BTreeMap<&'static str, usize>,
    summary: SocketCounts,
    new_sockets: Option<JsonNewSockets<'a>>,
}

#[derive(Serialize)]
struct JsonNewSockets<'a> {
    seconds: f64,
    new: usize,
    per_minute: f64,
    by_process: Vec<JsonNewSocketsOf<'a>>,
    possible_matches: usize,
    /// Not every namespace could be searched.
    incomplete: bool,
}

/// The new sockets of one process.
#[derive(Serialize)]
struct JsonNewSocketsOf<'a> {
    pid: Option<i32>,
    comm: Option<&'a str>,
    new: usize,
}

/// The dead descriptors of one process.
#[derive(Serialize)]
struct JsonDead<'a> {
    pid: i32,
    comm: &'a str,
    dead: usize,
    /// Those that `cwkill reclaim` would close.
    closable: usize,
}

fn json_dead(dead: &DeadOfProcess) -> JsonDead<'_> {
    JsonDead {
        pid: dead.process.id.pid,
        comm: &dead.process.comm,
        dead: dead.count,
        closable: dead.closable,
    }
}

#[derive(Serialize)]
struct JsonReclaim<'a> {
    owners: Vec<JsonStop<'a>>,
    advice: Vec<JsonAdvice<'a>>,
    summary: DescriptorCounts,
}

/// An owner that spins since a socket of it was closed.
#[derive(Serialize)]
struct JsonSpinning<'a> {
    pid: i32,
    comm: &'a str,
    /// The descriptor of that socket; null if several were closed at once.
    fd: Option<i32>,
    /// Null if the process has too many threads to tell.
    thread: Option<i32>,
    cpu_percent_before: u32,
    cpu_percent: u32,
    /// It no longer spins, because its descriptor was closed.
    ended: bool,
    /// The command that ends it; null if only a restart does.
    next: Option<String>,
}

#[derive(Serialize)]
struct SocketLine<'a> {
    schema_version: u32,
    /// The start of the run.
    time: &'a str,
    owners_known: bool,
    #[serde(flatten)]
    socket: JsonSocket<'a>,
}

/// A socket with its plan and its outcome.
#[derive(Serialize)]
pub struct JsonSocket<'a> {
    netns: JsonNetns<'a>,
    protocol: &'static str,
    family: &'static str,
    state: &'static str,
    pub(crate) local: Endpoint,
    pub(crate) peer: Endpoint,
    pub(crate) cookie: String,
    inode: Option<u32>,
    uid: u32,
    recv_q: u32,
    send_q: u32,
    age_ms: Option<u64>,
    /// How `age_ms` is known; `None` with it.
    age_source: Option<&'static str>,
    idle_ms: Option<u64>,
    idle_source: Option<&'static str>,
    /// Whether data has moved in the last five seconds.
    in_use: bool,
    cause: &'static str,
    /// Its local address is not an address of this host any more.
    address_gone: bool,
    owners: Vec<JsonOwner<'a>>,
    listener: Option<JsonListener<'a>>,
    pub(crate) plan: Vec<&'static str>,
    excluded: Vec<JsonExclusion>,
    /// Why the socket is skipped, independent of the methods.
    skip: Option<JsonReason>,
    /// The expected outcome for each descriptor, in a dry run with `--reclaim`.
    reclaim_plan: Option<Vec<JsonReclaimOutcome>>,
    pub(crate) result: Option<JsonResult>,
}

#[derive(Serialize)]
struct JsonListener<'a> {
    address: std::net::IpAddr,
    port: u16,
    waiting: u32,
    backlog: u32,
    owners: Vec<JsonOwner<'a>>,
    /// The number of listening sockets at this address; more than one only with SO_REUSEPORT.
    group_size: usize,
    /// The listening sockets at which the connection may wait; several if the kernel does not tell at which of a group.
    sockets: Vec<JsonListeningSocket>,
}

#[derive(Serialize)]
struct JsonListeningSocket {
    inode: u32,
    waiting: u32,
    backlog: u32,
}

#[derive(Serialize)]
struct JsonExclusion {
    method: &'static str,
    #[serde(flatten)]
    reason: JsonReason,
}

/// A reason in words, which may change, and as a code, which is stable.
#[derive(Serialize)]
struct JsonReason {
    reason: String,
    reason_code: &'static str,
}

#[derive(Serialize)]
pub(crate) struct JsonResult {
    pub(crate) outcome: &'static str,
    pub(crate) method: Option<&'static str>,
    reason: Option<String>,
    /// `None` unless the socket was skipped or failed.
    reason_code: Option<&'static str>,
    attempts: Vec<JsonAttempt>,
    /// `None`: unknown, or not checked because the socket is not closed.
    descriptor_open: Option<bool>,
    /// The outcome for each descriptor of a closed socket, with `--reclaim`.
    descriptors: Option<Vec<JsonReclaimOutcome>>,
}

#[derive(Serialize)]
struct JsonReclaimOutcome {
    pid: i32,
    fd: i32,
    outcome: &'static str,
    reason: Option<String>,
    reason_code: Option<&'static str>,
}

#[derive(Serialize)]
struct JsonAttempt {
    method: &'static str,
    error: Option<String>,
    reason_code: Option<&'static str>,
    errno: Option<String>,
    /// `Some(true)` if the socket was judged at the instant of the act.
    #[serde(skip_serializing_if = "Option::is_none")]
    at_one_instant: Option<bool>,
}

pub(crate) fn json_socket<'a>(run: &'a Run, target: &'a Target) -> JsonSocket<'a> {
    let (socket, netns) = (&target.socket, run.scan.netns(target));
    JsonSocket {
        netns: json_netns(netns),
        protocol: socket.protocol().name(),
        family: if socket.is_ipv4() { "ipv4" } else { "ipv6" },
        state: socket.state.name(),
        local: endpoint(socket.tuple().local),
        peer: endpoint(socket.tuple().peer),
        cookie: socket.cookie().to_string(),
        inode: socket.inode,
        uid: socket.uid,
        recv_q: socket.recv_q,
        send_q: socket.send_q,
        age_ms: socket.age.map(millis),
        age_source: socket.age.map(|_| socket.age_source.name()),
        idle_ms: socket.idle.map(millis),
        idle_source: socket.idle.map(|_| socket.idle_source.name()),
        in_use: socket.is_in_use(IN_USE_WITHIN),
        cause: socket.cause.name(),
        address_gone: socket.address_gone,
        owners: json_owners(run, &target.owners),
        listener: run.scan.listener(target).map(|listener| JsonListener {
            address: listener.local.ip(),
            port: listener.local.port(),
            waiting: listener.waiting(),
            backlog: listener.backlog(),
            owners: json_owners(run, &listener.owners),
            group_size: listener.group_size,
            sockets: listening_sockets(listener),
        }),
        plan: target.plan.methods.iter().map(|m| m.name()).collect(),
        excluded: target.plan.excluded.iter().map(exclusion).collect(),
        skip: target.plan.skip.map(|reason| skip(&target.plan, reason)),
        reclaim_plan: (run.reclaim_requested && !run.acted)
            .then(|| reclaim_outcomes(&target.owners)),
        result: target.outcome.map(|outcome| JsonResult {
            descriptors: run
                .reclaim_requested
                .then(|| reclaim_outcomes(&target.owners)),
            ..result(target, outcome)
        }),
    }
}

fn listening_sockets(listener: &Listener) -> Vec<JsonListeningSocket> {
    let socket = |socket: &ListeningSocket| JsonListeningSocket {
        inode: socket.inode,
        waiting: socket.waiting,
        backlog: socket.backlog,
    };
    listener.sockets.iter().map(socket).collect()
}

fn exclusion((method, why): &(Method, Exclusion)) -> JsonExclusion {
    JsonExclusion {
        method: method.name(),
        reason: JsonReason {
            reason: why.to_string(),
            reason_code: why.code(),
        },
    }
}

fn skip(plan: &Plan, reason: SkipReason) -> JsonReason {
    JsonReason {
        reason: text::skip_reason(plan, reason),
        reason_code: reason.code(),
    }
}

/// The outcome for each descriptor that cwkill checked or reclaimed.
fn reclaim_outcomes(owners: &[Owner]) -> Vec<JsonReclaimOutcome> {
    let descriptor = |owner: &Owner| {
        let outcome = owner.reclaim.as_ref()?;
        Some(JsonReclaimOutcome {
            pid: owner.process.id.pid,
            fd: owner.fd.0,
            outcome: outcome.name(),
            reason: outcome.reason().map(ToString::to_string),
            reason_code: outcome.reason().map(|reason| reason.code()),
        })
    };
    owners.iter().filter_map(descriptor).collect()
}

fn json_new_sockets(new: &NewSockets) -> JsonNewSockets<'_> {
    JsonNewSockets {
        seconds: new.watched.as_secs_f64(),
        new: new.new,
        per_minute: new.per_minute(),
        possible_matches: new.coverage.undecided,
        incomplete: new.coverage.unseen_namespaces() > 0,
        by_process: new
            .by
            .iter()
            .map(|(process, new)| JsonNewSocketsOf {
                pid: process.as_ref().map(|process| process.id.pid),
                comm: process.as_ref().map(|process| process.comm.as_str()),
                new: *new,
            })
            .collect(),
    }
}

fn json_spinning(one: &Spinning) -> JsonSpinning<'_> {
    JsonSpinning {
        pid: one.process.id.pid,
        comm: &one.process.comm,
        fd: one.fd.map(|fd| fd.0),
        thread: one.tid,
        cpu_percent_before: one.before,
        cpu_percent: one.after,
        ended: one.ended,
        next: one.stop_command().filter(|_| !one.ended),
    }
}

fn result(target: &Target, outcome: Outcome) -> JsonResult {
    let (method, reason) = match outcome {
        Outcome::Closed(method) => (Some(method), None),
        Outcome::Closing(method, state) => (Some(method), Some(format!("now in {state}"))),
        Outcome::Skipped(why) => (None, Some(text::skip_reason(&target.plan, why))),
        Outcome::Gone | Outcome::Failed => (None, None),
    };
    JsonResult {
        outcome: outcome.name(),
        method: method.map(|method| method.name()),
        reason,
        reason_code: target.reason_code(),
        attempts: target
            .attempts
            .iter()
            .map(|attempt| {
                let error = attempt.error.as_ref();
                JsonAttempt {
                    method: attempt.method.name(),
                    error: error.map(ToString::to_string),
                    reason_code: error.map(MethodError::code),
                    errno: error
                        .and_then(MethodError::errno)
                        .map(|errno| format!("{errno:?}")),
                    at_one_instant: attempt.at_one_instant.then_some(true),
                }
            })
            .collect(),
        descriptor_open: target.descriptor_open(),
        descriptors: None,
    }
}
