//! The report for programs: `schema_version` 1. Fields are added, never renamed.
//!
//! Written as it is walked, without a tree in memory.

use std::io::{self, Write};

use nix::errno::Errno;
use serde::Serialize;
use serde::ser::{SerializeSeq, Serializer};
use serde_json::ser::Formatter;

use super::escape::is_unsafe;
use super::{Tally, reclaim};
use crate::finder::cgroup::Container;
use crate::finder::owners::Holding;
use crate::finder::{Found, Held, Socket};
use crate::injector::ladder::Verdict;
use crate::pipeline::{Deed, Run};
use crate::plan::Plan;
use crate::reclaim::{Fate, Reason};

pub(super) const SCHEMA_VERSION: u32 = 1;

/// Writes one document with every socket and the summary.
///
/// # Errors
/// Those of `out`.
pub fn write_document(run: &Run, out: &mut dyn Write) -> io::Result<()> {
    let document = Document {
        schema_version: SCHEMA_VERSION,
        cwkill_version: env!("CARGO_PKG_VERSION"),
        dry_run: run.deeds.is_none(),
        sockets: Sockets(run),
        unreadable_processes: run.found.unreadable_processes,
        hidden_processes: run.found.hidden_processes,
        unreachable_namespaces: run.found.unreachable_namespaces,
        untold_namespaces: run.found.untold_namespaces,
        undecided: run.found.undecided,
        reclaim: run.reclaimed.as_ref().map(|reclaimed| JsonReclaim {
            owners: reclaim::json_owners(&run.found.processes, &reclaimed.visits),
            summary: reclaim::Tally::of_run(reclaimed),
        }),
        summary: Tally::of(run),
    };
    document.serialize(&mut serializer(out))?;
    out.write_all(b"\n")
}

/// Writes one object a line, one line a socket.
///
/// # Errors
/// Those of `out`.
pub fn write_lines(run: &Run, out: &mut dyn Write) -> io::Result<()> {
    for socket in sockets(run) {
        let line = Line {
            schema_version: SCHEMA_VERSION,
            socket,
        };
        line.serialize(&mut serializer(out))?;
        out.write_all(b"\n")?;
    }
    Ok(())
}

pub(super) fn serializer(
    out: &mut dyn Write,
) -> serde_json::Serializer<&mut dyn Write, TerminalSafe> {
    serde_json::Serializer::with_formatter(out, TerminalSafe)
}

/// Compact JSON in which no name of another process can move the cursor of a terminal: what JSON
/// itself does not escape (DEL, the C1 controls, marks that reorder text) is escaped too.
pub(super) struct TerminalSafe;

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

#[derive(Serialize)]
struct Document<'a> {
    schema_version: u32,
    cwkill_version: &'static str,
    dry_run: bool,
    sockets: Sockets<'a>,
    unreadable_processes: usize,
    hidden_processes: bool,
    unreachable_namespaces: usize,
    untold_namespaces: usize,
    undecided: usize,
    /// The owners that `--reclaim` stopped; `None` without it.
    reclaim: Option<JsonReclaim<'a>>,
    summary: Tally,
}

#[derive(Serialize)]
struct JsonReclaim<'a> {
    owners: Vec<reclaim::Owner<'a>>,
    summary: reclaim::Tally,
}

#[derive(Serialize)]
struct Line<'a> {
    schema_version: u32,
    #[serde(flatten)]
    socket: JsonSocket<'a>,
}

struct Sockets<'a>(&'a Run);

impl Serialize for Sockets<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut list = serializer.serialize_seq(Some(self.0.found.sockets.len()))?;
        for socket in sockets(self.0) {
            list.serialize_element(&socket)?;
        }
        list.end()
    }
}

#[derive(Serialize)]
struct JsonSocket<'a> {
    netns: JsonNetns<'a>,
    family: &'static str,
    state: &'static str,
    local: Endpoint,
    peer: Endpoint,
    cookie: String,
    inode: Option<u32>,
    uid: u32,
    recv_q: u32,
    send_q: u32,
    age_ms: Option<u64>,
    cause: &'static str,
    owners: Vec<Owner<'a>>,
    listener: Option<JsonListener<'a>>,
    plan: Vec<&'static str>,
    left_out: Vec<LeftOut>,
    /// Of a dry run with `--reclaim`: what would become of each descriptor.
    reclaim_plan: Option<Vec<JsonDescriptor>>,
    result: Option<JsonResult>,
}

#[derive(Serialize)]
struct JsonNetns<'a> {
    inode: u64,
    name: Option<&'a str>,
}

#[derive(Serialize)]
pub(super) struct Endpoint {
    address: std::net::IpAddr,
    port: u16,
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
pub(super) struct JsonContainer<'a> {
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
struct JsonResult {
    outcome: &'static str,
    method: Option<&'static str>,
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

fn sockets(run: &Run) -> impl Iterator<Item = JsonSocket<'_>> {
    let sockets = run.found.sockets.iter().zip(&run.plans).enumerate();
    sockets.map(|(at, (socket, plan))| {
        let deed = run.deeds.as_ref().map(|deeds| &deeds[at]);
        json_socket(run, at, socket, plan, deed)
    })
}

fn json_socket<'a>(
    run: &'a Run,
    at: usize,
    socket: &'a Socket,
    plan: &'a Plan,
    deed: Option<&'a Deed>,
) -> JsonSocket<'a> {
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
                let doubt = |doubt: &Option<Reason>| match doubt {
                    None => Some(("would-free", None)),
                    Some(reason) => Some(("skipped", Some(reason.to_string()))),
                };
                descriptors(run, socket, reclaimed.doubts[at].iter().map(doubt))
            }),
            Some(_) => None,
        },
        result: deed.map(|deed| JsonResult {
            descriptors: run.reclaimed.as_ref().map(|reclaimed| {
                let fate = |fate: &Option<Fate>| fate.as_ref().map(reclaim::outcome);
                descriptors(run, socket, reclaimed.fates[at].iter().map(fate))
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

pub(super) fn endpoint(address: std::net::SocketAddr) -> Endpoint {
    Endpoint {
        address: address.ip(),
        port: address.port(),
    }
}

pub(super) fn container(container: &Container) -> JsonContainer<'_> {
    JsonContainer {
        runtime: container.runtime.name(),
        id: container.id.as_deref(),
        name: container.name.as_deref(),
        pod_uid: container.pod_uid.as_deref(),
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
                container: process.cgroup.container.as_ref().map(container),
            }
        })
        .collect()
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
