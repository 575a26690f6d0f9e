//! The report of `cwkill reclaim` for programs. Fields are added, never renamed.

use std::collections::BTreeMap;
use std::io::{self, Write};

use serde::Serialize;

use super::counts::{self, JsonDescriptorCount};
use super::{DeadDescriptor, ReclaimRun};
use crate::model::{ReclaimOutcome, ReclaimReason, TimeAndPlace};
use crate::report::advice::{JsonAdvice, json_advice};
use crate::report::descriptors::{DescriptorCounts, JsonStop, json_stops};
use crate::report::serialize::{
    Endpoint, JsonAbsentOwner, JsonContainer, JsonTimeAndPlace, SCHEMA_VERSION, container,
    endpoint, json_absent_owners, json_time, json_time_and_place, serializer,
};
use crate::text::escape;

#[derive(Serialize)]
struct ReclaimDocument<'a> {
    schema_version: u32,
    cwkill_version: &'static str,
    #[serde(flatten)]
    time_and_place: JsonTimeAndPlace<'a>,
    dry_run: bool,
    descriptors: Vec<JsonDeadDescriptor<'a>>,
    owners: Vec<JsonStop<'a>>,
    /// Descriptors that may be dead.
    unknown_descriptors: usize,
    unreadable_processes: usize,
    hidden_processes: bool,
    by_process: Vec<JsonDescriptorCount<'a>>,
    /// Those that are kept, by reason code.
    by_reason: BTreeMap<&'static str, usize>,
    absent_owners: Vec<JsonAbsentOwner>,
    /// They match, but their process is in another network namespace.
    in_other_namespaces: usize,
    /// They may match, but their local port is unknown.
    of_unknown_port: usize,
    /// They may match, but the name of their container could not be read.
    in_unnamed_containers: usize,
    /// Containers that may be selected, and whose names could not be read.
    unnamed_containers: usize,
    advice: Vec<JsonAdvice<'a>>,
    summary: DescriptorCounts,
}

#[derive(Serialize)]
struct DescriptorLine<'a> {
    schema_version: u32,
    /// The start of the run.
    time: &'a str,
    #[serde(flatten)]
    descriptor: JsonDeadDescriptor<'a>,
}

#[derive(Serialize)]
pub struct JsonDeadDescriptor<'a> {
    pid: i32,
    comm: &'a str,
    unit: Option<&'a str>,
    container: Option<JsonContainer<'a>>,
    fd: i32,
    /// Only if a single thread has the descriptor.
    #[serde(skip_serializing_if = "Option::is_none")]
    thread: Option<i32>,
    protocol: &'static str,
    inode: u32,
    pub(crate) cookie: String,
    local: Option<Endpoint>,
    quiet_ms: u64,
    unread: u32,
    /// Whether `reclaim` would close the descriptor. `None` in a run that acts: `outcome` has the result.
    closable: Option<bool>,
    outcome: Option<&'static str>,
    reason: Option<String>,
    reason_code: Option<&'static str>,
}

impl JsonDeadDescriptor<'_> {
    /// The identity of the descriptor, for people.
    pub(crate) fn sentence(&self) -> String {
        let local = self
            .local
            .as_ref()
            .map_or_else(String::new, |local| format!(", {local}"));
        format!(
            "descriptor {} of {}/{} (socket {}{local})",
            self.fd,
            escape(self.comm),
            self.pid,
            self.inode
        )
    }
}

pub(crate) fn json_dead_descriptor<'a>(
    run: &ReclaimRun,
    dead: &'a DeadDescriptor,
) -> JsonDeadDescriptor<'a> {
    let DeadDescriptor { owner, socket, .. } = dead;
    let (process, outcome) = (&owner.process, owner.reclaim.as_ref());
    let reason = outcome.and_then(ReclaimOutcome::reason);
    JsonDeadDescriptor {
        pid: process.id.pid,
        comm: &process.comm,
        unit: process.cgroup.unit.as_deref(),
        container: container(process),
        fd: owner.fd.0,
        thread: owner.tid,
        protocol: socket.protocol.name(),
        inode: dead.inode,
        cookie: socket.cookie.to_string(),
        local: socket.local.map(endpoint),
        quiet_ms: u64::try_from(socket.quiet.as_millis()).unwrap_or(u64::MAX),
        unread: socket.unread,
        // In a run that acts, the outcome is known only after the act.
        closable: outcome.filter(|_| !run.acted).map(|_| reason.is_none()),
        outcome: outcome.filter(|_| run.acted).map(ReclaimOutcome::name),
        reason: reason.map(ToString::to_string),
        reason_code: reason.map(ReclaimReason::code),
    }
}

/// Writes one document with every descriptor and the summary.
pub fn write_document(
    run: &ReclaimRun,
    time_and_place: &TimeAndPlace,
    out: &mut dyn Write,
) -> io::Result<()> {
    let document = ReclaimDocument {
        schema_version: SCHEMA_VERSION,
        cwkill_version: env!("CARGO_PKG_VERSION"),
        time_and_place: json_time_and_place(time_and_place),
        dry_run: !run.acted,
        descriptors: run
            .descriptors
            .iter()
            .map(|dead| json_dead_descriptor(run, dead))
            .collect(),
        owners: json_stops(&run.stops),
        unknown_descriptors: run.unknown,
        unreadable_processes: run.unreadable + run.leader_exited.len() + run.failed.len(),
        hidden_processes: run.hidden,
        by_process: counts::by_process(run),
        by_reason: counts::by_reason(run),
        absent_owners: json_absent_owners(&run.absent),
        in_other_namespaces: run.elsewhere,
        of_unknown_port: run.without_address,
        in_unnamed_containers: run.without_name,
        unnamed_containers: run.unnamed.containers,
        advice: json_advice(&run.advice),
        summary: run.counts(),
    };
    document.serialize(&mut serializer(&mut *out))?;
    out.write_all(b"\n")
}

/// Writes one line per descriptor, each a JSON object.
pub fn write_lines(
    run: &ReclaimRun,
    time_and_place: &TimeAndPlace,
    out: &mut dyn Write,
) -> io::Result<()> {
    let time = &json_time(time_and_place);
    for dead in &run.descriptors {
        let line = DescriptorLine {
            schema_version: SCHEMA_VERSION,
            time,
            descriptor: json_dead_descriptor(run, dead),
        };
        line.serialize(&mut serializer(&mut *out))?;
        out.write_all(b"\n")?;
    }
    Ok(())
}
