//! JSON for all reports and for the log: safe for a terminal, with the parts that several documents share.

use std::io::{self, Write};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use serde::Serialize;
use serde_json::ser::Formatter;

use super::Run;
use crate::model::{Owner, TimeAndPlace, TrackedCloseWait};
use crate::proc::netns::Netns;
use crate::proc::{AbsentOwner, Process};
use crate::text::is_unsafe;

/// Within a version, fields are added and never renamed.
pub(super) const SCHEMA_VERSION: u32 = 1;

pub(super) fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// When and where a document was made.
#[derive(Serialize)]
pub(super) struct JsonTimeAndPlace<'a> {
    /// The start of the run.
    time: String,
    host: &'a str,
    boot_id: Option<&'a str>,
}

/// The time of a run, in RFC 3339.
pub(super) fn json_time(time_and_place: &TimeAndPlace) -> String {
    humantime::format_rfc3339_millis(time_and_place.time).to_string()
}

pub(super) fn json_time_and_place(time_and_place: &TimeAndPlace) -> JsonTimeAndPlace<'_> {
    JsonTimeAndPlace {
        time: json_time(time_and_place),
        host: &time_and_place.host,
        boot_id: time_and_place.boot_id.as_deref(),
    }
}

pub(super) fn to_bytes(value: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    put(value, &mut bytes)?;
    Ok(bytes)
}

/// Writes one JSON object: the fields of `head`, the array `name`, and the fields of `tail`. `write_items` writes the items of the array,
/// which would be too large in memory.
pub(super) fn write_around(
    head: &impl Serialize,
    name: &str,
    tail: &impl Serialize,
    out: &mut dyn Write,
    write_items: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> io::Result<()> {
    let (head, tail) = (to_bytes(head)?, to_bytes(tail)?);
    out.write_all(head.strip_suffix(b"}").unwrap_or(&head))?;
    write!(out, ",\"{name}\":[")?;
    write_items(out)?;
    out.write_all(b"],")?;
    out.write_all(tail.strip_prefix(b"{").unwrap_or(&tail))?;
    out.write_all(b"\n")
}

pub(super) fn put(value: &impl Serialize, bytes: &mut Vec<u8>) -> io::Result<()> {
    Ok(value.serialize(&mut serializer(bytes))?)
}

/// One JSON object, without a newline.
pub(crate) fn line(value: &impl Serialize) -> String {
    let mut bytes = Vec::with_capacity(1024);
    let written = value.serialize(&mut serializer(&mut bytes));
    written.expect("memory takes everything, and every key is a text");
    String::from_utf8(bytes).expect("JSON is UTF-8")
}

pub(crate) fn serializer<W: Write>(out: W) -> serde_json::Serializer<W, TerminalSafe> {
    serde_json::Serializer::with_formatter(out, TerminalSafe)
}

/// Compact JSON that is safe for a terminal. It also escapes characters that JSON allows and that could move the cursor
/// or reorder text: DEL, the C1 controls and bidirectional marks. A process can put them into its name.
pub(crate) struct TerminalSafe;

impl Formatter for TerminalSafe {
    fn write_string_fragment<W: Write + ?Sized>(
        &mut self,
        writer: &mut W,
        fragment: &str,
    ) -> io::Result<()> {
        // The fast path: field names and most values are printable ASCII.
        if fragment.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
            return writer.write_all(fragment.as_bytes());
        }
        let mut plain = 0;
        for (start, c) in fragment.char_indices().filter(|(_, c)| is_unsafe(*c)) {
            writer.write_all(&fragment.as_bytes()[plain..start])?;
            for unit in c.encode_utf16(&mut [0; 2]) {
                write!(writer, "\\u{unit:04x}")?;
            }
            plain = start + c.len_utf8();
        }
        writer.write_all(&fragment.as_bytes()[plain..])
    }
}

/// A selected owner that does not exist.
#[derive(Serialize)]
pub(crate) struct JsonAbsentOwner {
    /// The option that gave the value; null if several exclude each other.
    selector: Option<&'static str>,
    value: String,
    message: String,
}

pub(crate) fn json_absent_owners(absent: &[AbsentOwner]) -> Vec<JsonAbsentOwner> {
    let json = |absent: &AbsentOwner| JsonAbsentOwner {
        selector: absent.option(),
        value: absent.value.clone(),
        message: absent.to_string(),
    };
    absent.iter().map(json).collect()
}

/// Conntrack entries of connections of others.
#[derive(Serialize)]
pub(crate) struct JsonTracked {
    entries: usize,
    complete: bool,
}

pub(crate) fn json_tracked(tracked: TrackedCloseWait) -> JsonTracked {
    JsonTracked {
        entries: tracked.entries,
        complete: tracked.complete,
    }
}

#[derive(Serialize)]
pub(crate) struct Endpoint {
    address: IpAddr,
    port: u16,
}

impl std::fmt::Display for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        SocketAddr::new(self.address, self.port).fmt(f)
    }
}

pub(super) fn endpoint(address: SocketAddr) -> Endpoint {
    Endpoint {
        address: address.ip(),
        port: address.port(),
    }
}

#[derive(Serialize)]
pub(crate) struct JsonContainer<'a> {
    runtime: &'static str,
    id: Option<&'a str>,
    name: Option<&'a str>,
    image: Option<&'a str>,
    pod: Option<&'a str>,
    namespace: Option<&'a str>,
    pod_uid: Option<&'a str>,
    compose_service: Option<&'a str>,
    /// Why some of these are unknown.
    unread: Option<&'a str>,
}

pub(crate) fn container(process: &Process) -> Option<JsonContainer<'_>> {
    let container = process.cgroup.container.as_ref()?;
    Some(JsonContainer {
        runtime: container.runtime.name(),
        id: container.id.as_deref(),
        name: container.name.as_deref(),
        image: container.facts.image.as_deref(),
        pod: container.facts.pod.as_deref(),
        namespace: container.facts.namespace.as_deref(),
        pod_uid: container.pod_uid.as_deref(),
        compose_service: container.facts.compose_service.as_deref(),
        unread: container.facts.unread.as_deref(),
    })
}

/// A network namespace.
#[derive(Serialize)]
pub(crate) struct JsonNetns<'a> {
    inode: u64,
    name: Option<&'a str>,
}

/// A process with its descriptors.
#[derive(Serialize)]
pub(crate) struct JsonOwner<'a> {
    pid: i32,
    comm: &'a str,
    fds: Vec<i32>,
    /// Only if a single thread has these descriptors.
    #[serde(skip_serializing_if = "Option::is_none")]
    thread: Option<i32>,
    unit: Option<&'a str>,
    container: Option<JsonContainer<'a>>,
    /// It wakes without end since cwkill closed one of its sockets.
    spinning: bool,
}

pub(super) fn json_netns(netns: &Netns) -> JsonNetns<'_> {
    JsonNetns {
        inode: netns.inode(),
        name: netns.name.as_deref(),
    }
}

/// The processes of `owners`, each with its descriptors.
pub(super) fn json_owners<'a>(run: &Run, owners: &'a [Owner]) -> Vec<JsonOwner<'a>> {
    owners
        .chunk_by(|a, b| (a.process.id, a.tid) == (b.process.id, b.tid))
        .map(|owners| {
            let process = &owners[0].process;
            JsonOwner {
                pid: process.id.pid,
                comm: &process.comm,
                fds: owners.iter().map(|owner| owner.fd.0).collect(),
                thread: owners[0].tid,
                unit: process.cgroup.unit.as_deref(),
                container: container(process),
                spinning: run.spins(process.id),
            }
        })
        .collect()
}
