//! The report for programs: `schema_version` 1. Fields are added, never renamed.
//!
//! Written as it is walked, without a tree in memory.

use std::io::{self, Write};
use std::net::SocketAddr;

use nix::errno::Errno;
use rayon::prelude::*;
use serde::Serialize;
use serde_json::ser::Formatter;

use super::escape::is_unsafe;
use super::{Tally, reclaim};
use crate::finder::owners::{Holding, Process};
use crate::finder::{Found, Held, Socket};
use crate::injector::ladder::Verdict;
use crate::pipeline::{Deed, Run};
use crate::reclaim::{Reason, ReclaimOutcome};
use crate::refill::Refill;

pub(super) const SCHEMA_VERSION: u32 = 1;

/// Sockets that are written together; those of a long list are written side by side.
const BLOCK: usize = 512;
/// Blocks in memory at a time.
const BLOCKS: usize = 16;

/// Writes one document with every socket and the summary.
///
/// # Errors
/// Those of `out`.
pub fn write_document(run: &Run, out: &mut dyn Write) -> io::Result<()> {
    let head = Head {
        schema_version: SCHEMA_VERSION,
        cwkill_version: env!("CARGO_PKG_VERSION"),
        dry_run: run.deeds.is_none(),
    };
    let tail = Tail {
        owners_sought: run.found.owners_sought,
        unreadable_processes: run.found.unreadable_processes,
        hidden_processes: run.found.hidden_processes,
        unreachable_namespaces: run.found.unreachable_namespaces,
        untold_namespaces: run.found.untold_namespaces,
        undecided: run.found.undecided,
        unlisted: run.unlisted.as_deref(),
        reclaim: run.reclaimed.as_ref().map(|reclaimed| JsonReclaim {
            owners: reclaim::json_owners(&reclaimed.stops),
            summary: reclaim::Tally::of_run(reclaimed),
        }),
        summary: Tally::of(run),
        refill: run.refill.as_ref().map(json_refill),
    };
    // One object in three parts, of which the sockets are too many for one string.
    let (head, tail) = (to_bytes(&head)?, to_bytes(&tail)?);
    out.write_all(head.strip_suffix(b"}").unwrap_or(&head))?;
    out.write_all(b",\"sockets\":[")?;
    write_sockets(run, out, |at, socket, bytes| {
        if at > 0 {
            bytes.push(b',');
        }
        put(&socket, bytes)
    })?;
    out.write_all(b"],")?;
    out.write_all(tail.strip_prefix(b"{").unwrap_or(&tail))?;
    out.write_all(b"\n")
}

/// Writes one object a line, one line a socket.
///
/// # Errors
/// Those of `out`.
pub fn write_lines(run: &Run, out: &mut dyn Write) -> io::Result<()> {
    write_sockets(run, out, |_, socket, bytes| {
        let line = Line {
            schema_version: SCHEMA_VERSION,
            owners_sought: run.found.owners_sought,
            socket,
        };
        put(&line, bytes)?;
        bytes.push(b'\n');
        Ok(())
    })
}

/// Writes what `put` makes of every socket, in order.
fn write_sockets(
    run: &Run,
    out: &mut dyn Write,
    put: impl Fn(usize, JsonSocket<'_>, &mut Vec<u8>) -> io::Result<()> + Sync,
) -> io::Result<()> {
    let block = |from: usize| {
        let to = run.found.sockets.len().min(from + BLOCK);
        let mut bytes = Vec::with_capacity((to - from) * 512);
        for at in from..to {
            put(at, json_socket(run, at), &mut bytes)?;
        }
        Ok(bytes)
    };
    let starts: Vec<usize> = (0..run.found.sockets.len()).step_by(BLOCK).collect();
    for some in starts.chunks(BLOCKS) {
        let blocks: Vec<io::Result<Vec<u8>>> = match some {
            [only] => vec![block(*only)],
            _ => some.par_iter().map(|from| block(*from)).collect(),
        };
        for block in blocks {
            out.write_all(&block?)?;
        }
    }
    Ok(())
}

fn to_bytes(value: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    put(value, &mut bytes)?;
    Ok(bytes)
}

fn put(value: &impl Serialize, bytes: &mut Vec<u8>) -> io::Result<()> {
    Ok(value.serialize(&mut serializer(bytes))?)
}

/// One object, without the end of a line.
pub(crate) fn line(value: &impl Serialize) -> String {
    let mut bytes = Vec::with_capacity(1024);
    let written = value.serialize(&mut serializer(&mut bytes));
    written.expect("memory takes everything, and every key is a text");
    String::from_utf8(bytes).expect("JSON is UTF-8")
}

pub(crate) fn serializer(
    out: &mut dyn Write,
) -> serde_json::Serializer<&mut dyn Write, TerminalSafe> {
    serde_json::Serializer::with_formatter(out, TerminalSafe)
}

/// Compact JSON in which no name of another process can move the cursor of a terminal: what JSON
/// itself does not escape (DEL, the C1 controls, marks that reorder text) is escaped too.
pub(crate) struct TerminalSafe;

impl Formatter for TerminalSafe {
    fn write_string_fragment<W: Write + ?Sized>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        // Field names and most values.
        if fragment.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
            return writer.write_all(fragment.as_bytes());
        }
        let mut plain = 0;
        for (at, c) in fragment.char_indices().filter(|(_, c)| is_unsafe(*c)) {
            writer.write_all(&fragment.as_bytes()[plain..at])?;
            for unit in c.encode_utf16(&mut [0; 2]) {
                write!(writer, "\\u{unit:04x}")?;
            }
            plain = at + c.len_utf8();
        }
        writer.write_all(&fragment.as_bytes()[plain..])
    }
}

/// Whether any of the descriptors is still open, as far as that is known.
fn any_open(descriptors: &[Holding]) -> Option<bool> {
    if descriptors.contains(&Holding::Open) {
        return Some(true);
    }
    (!descriptors.contains(&Holding::Unknown)).then_some(false)
}

/// What comes before the sockets.
#[derive(Serialize)]
struct Head {
    schema_version: u32,
    cwkill_version: &'static str,
    dry_run: bool,
}

/// What comes after them.
#[derive(Serialize)]
struct Tail<'a> {
    owners_sought: bool,
    unreadable_processes: usize,
    hidden_processes: bool,
    unreachable_namespaces: usize,
    untold_namespaces: usize,
    undecided: usize,
    /// Why it is not known what else matches, where that is so.
    unlisted: Option<&'a str>,
    /// The owners that `--reclaim` stopped; `None` without it.
    reclaim: Option<JsonReclaim<'a>>,
    summary: Tally,
    refill: Option<JsonRefill<'a>>,
}

#[derive(Serialize)]
struct JsonRefill<'a> {
    seconds: f64,
    new: usize,
    per_minute: f64,
    by: Vec<Newcomers<'a>>,
    undecided: usize,
    partial: bool,
}

#[derive(Serialize)]
struct Newcomers<'a> {
    pid: Option<i32>,
    comm: Option<&'a str>,
    new: usize,
}

#[derive(Serialize)]
struct JsonReclaim<'a> {
    owners: Vec<reclaim::Owner<'a>>,
    summary: reclaim::Tally,
}

#[derive(Serialize)]
struct Line<'a> {
    schema_version: u32,
    owners_sought: bool,
    #[serde(flatten)]
    socket: JsonSocket<'a>,
}

/// A socket, as it was found and as it ended.
#[derive(Serialize)]
pub struct JsonSocket<'a> {
    netns: JsonNetns<'a>,
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
    cause: &'static str,
    owners: Vec<Owner<'a>>,
    listener: Option<JsonListener<'a>>,
    pub(crate) plan: Vec<&'static str>,
    left_out: Vec<LeftOut>,
    /// Of a dry run with `--reclaim`: what would become of each descriptor.
    reclaim_plan: Option<Vec<JsonDescriptor>>,
    pub(crate) result: Option<JsonResult>,
}

#[derive(Serialize)]
struct JsonNetns<'a> {
    inode: u64,
    name: Option<&'a str>,
}

#[derive(Serialize)]
pub(crate) struct Endpoint {
    address: std::net::IpAddr,
    port: u16,
}

impl std::fmt::Display for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        SocketAddr::new(self.address, self.port).fmt(f)
    }
}

#[derive(Serialize)]
struct Owner<'a> {
    pid: i32,
    comm: &'a str,
    fds: Vec<i32>,
    unit: Option<&'a str>,
    container: Option<JsonContainer<'a>>,
}

#[derive(Serialize)]
pub(crate) struct JsonContainer<'a> {
    runtime: &'static str,
    id: Option<&'a str>,
    name: Option<&'a str>,
    pod_uid: Option<&'a str>,
}

#[derive(Serialize)]
struct JsonListener<'a> {
    address: std::net::IpAddr,
    port: u16,
    waiting: u32,
    backlog: u32,
    owners: Vec<Owner<'a>>,
}

#[derive(Serialize)]
struct LeftOut {
    method: &'static str,
    reason: String,
}

#[derive(Serialize)]
pub(crate) struct JsonResult {
    pub(crate) outcome: &'static str,
    pub(crate) method: Option<&'static str>,
    reason: Option<String>,
    attempts: Vec<JsonAttempt>,
    /// `None`: not known, or not asked because the socket is not closed.
    descriptor_open: Option<bool>,
    /// With `--reclaim`, of a closed socket: what became of each descriptor.
    descriptors: Option<Vec<JsonDescriptor>>,
}

#[derive(Serialize)]
struct JsonDescriptor {
    pid: i32,
    fd: i32,
    outcome: &'static str,
    reason: Option<String>,
}

#[derive(Serialize)]
struct JsonAttempt {
    method: &'static str,
    error: Option<String>,
    errno: Option<String>,
}

/// Every socket of a run, in order.
pub(crate) fn sockets(run: &Run) -> impl Iterator<Item = JsonSocket<'_>> {
    (0..run.found.sockets.len()).map(|at| json_socket(run, at))
}

fn json_socket(run: &Run, at: usize) -> JsonSocket<'_> {
    let (socket, plan) = (&run.found.sockets[at], &run.plans[at]);
    let deed = run.deeds.as_ref().map(|deeds| &deeds[at]);
    JsonSocket {
        netns: JsonNetns {
            inode: run.namespaces[socket.netns].inode(),
            name: run.namespaces[socket.netns].name.as_deref(),
        },
        family: if socket.is_ipv4() { "ipv4" } else { "ipv6" },
        state: socket.state.name(),
        local: endpoint(socket.tuple.local),
        peer: endpoint(socket.tuple.peer),
        cookie: socket.cookie().to_string(),
        inode: socket.inode,
        uid: socket.uid,
        recv_q: socket.recv_q,
        send_q: socket.send_q,
        age_ms: socket
            .age
            .map(|age| u64::try_from(age.as_millis()).unwrap_or(u64::MAX)),
        cause: socket.cause.name(),
        owners: owners(&run.found, &socket.owners),
        listener: socket.listener.map(|at| {
            let listener = &run.found.listeners[at];
            JsonListener {
                address: listener.local.ip(),
                port: listener.local.port(),
                waiting: listener.waiting,
                backlog: listener.backlog,
                owners: owners(&run.found, &listener.owners),
            }
        }),
        plan: plan.methods.iter().map(|method| method.name()).collect(),
        left_out: plan
            .left_out
            .iter()
            .map(|(method, why)| LeftOut {
                method: method.name(),
                reason: why.to_string(),
            })
            .collect(),
        reclaim_plan: match deed {
            None => run.reclaimed.as_ref().map(|reclaimed| {
                let planned = |reason: &Option<Reason>| match reason {
                    None => Some(("would-free", None)),
                    Some(reason) => Some(("skipped", Some(reason.to_string()))),
                };
                descriptors(run, socket, reclaimed.reasons[at].iter().map(planned))
            }),
            Some(_) => None,
        },
        result: deed.map(|deed| JsonResult {
            descriptors: run.reclaimed.as_ref().map(|reclaimed| {
                let outcome =
                    |outcome: &Option<ReclaimOutcome>| outcome.as_ref().map(reclaim::outcome);
                descriptors(run, socket, reclaimed.outcomes[at].iter().map(outcome))
            }),
            ..json_result(deed)
        }),
    }
}

/// The descriptors of a socket, with what is said of them.
fn descriptors(
    run: &Run,
    socket: &Socket,
    said: impl Iterator<Item = Option<(&'static str, Option<String>)>>,
) -> Vec<JsonDescriptor> {
    let one = |(held, said): (&Held, Option<(&'static str, Option<String>)>)| {
        said.map(|(outcome, reason)| JsonDescriptor {
            pid: run.found.processes[held.process].pid,
            fd: held.fd.0,
            outcome,
            reason,
        })
    };
    socket.owners.iter().zip(said).filter_map(one).collect()
}

pub(super) fn endpoint(address: SocketAddr) -> Endpoint {
    Endpoint {
        address: address.ip(),
        port: address.port(),
    }
}

fn json_refill(refill: &Refill) -> JsonRefill<'_> {
    JsonRefill {
        seconds: refill.watched.as_secs_f64(),
        new: refill.new,
        per_minute: refill.per_minute(),
        undecided: refill.undecided,
        partial: refill.partial,
        by: refill
            .by
            .iter()
            .map(|(culprit, new)| Newcomers {
                pid: culprit.as_ref().map(|culprit| culprit.pid),
                comm: culprit.as_ref().map(|culprit| culprit.comm.as_str()),
                new: *new,
            })
            .collect(),
    }
}

/// Gathers the descriptors of each process; `held` is ordered by process.
fn owners<'a>(found: &'a Found, held: &[Held]) -> Vec<Owner<'a>> {
    let same = |a: &Held, b: &Held| a.process == b.process;
    held.chunk_by(same)
        .map(|of_one| {
            let process = &found.processes[of_one[0].process];
            Owner {
                pid: process.pid,
                comm: &process.comm,
                fds: of_one.iter().map(|held| held.fd.0).collect(),
                unit: process.cgroup.unit.as_deref(),
                container: container(process),
            }
        })
        .collect()
}

/// The container of a process, if it is in one.
pub(crate) fn container(process: &Process) -> Option<JsonContainer<'_>> {
    let container = process.cgroup.container.as_ref()?;
    Some(JsonContainer {
        runtime: container.runtime.name(),
        id: container.id.as_deref(),
        name: container.name.as_deref(),
        pod_uid: container.pod_uid.as_deref(),
    })
}

fn json_result(deed: &Deed) -> JsonResult {
    let (outcome, method, reason) = match &deed.outcome.verdict {
        Verdict::Closed(method) => ("closed", Some(method), None),
        Verdict::Closing(method, state) => {
            ("closing", Some(method), Some(format!("now in {state}")))
        }
        Verdict::Gone => ("gone", None, None),
        Verdict::Skipped(why) => ("skipped", None, Some(why.to_string())),
        Verdict::Failed => ("failed", None, None),
    };
    let attempt = |attempt: &crate::injector::ladder::Attempt| JsonAttempt {
        method: attempt.method.name(),
        error: attempt.error.as_ref().map(ToString::to_string),
        errno: attempt
            .error
            .as_ref()
            .and_then(|error| error.errno())
            .map(|errno| format!("{:?}", Errno::from_raw(errno))),
    };
    JsonResult {
        outcome,
        method: method.map(|method| method.name()),
        reason,
        attempts: deed.outcome.attempts.iter().map(attempt).collect(),
        descriptor_open: deed.descriptors.as_deref().and_then(any_open),
        descriptors: None,
    }
}
