//! The report of `cwkill reclaim` for programs. Fields are added, never renamed.

use std::io::{self, Write};

use serde::Serialize;

use super::{DeadDescriptor, ReclaimRun};
use crate::model::{ReclaimOutcome, ReclaimReason};
use crate::report::descriptors::{JsonStop, Tally, json_stops};
use crate::report::serialize::{
    Endpoint, JsonContainer, SCHEMA_VERSION, container, endpoint, serializer,
};
use crate::text::escape;

#[derive(Serialize)]
struct Document<'a> {
    schema_version: u32,
    cwkill_version: &'static str,
    dry_run: bool,
    descriptors: Vec<JsonDescriptor<'a>>,
    owners: Vec<JsonStop<'a>>,
    unknown: usize,
    unreadable_processes: usize,
    hidden_processes: bool,
    summary: Tally,
}

#[derive(Serialize)]
struct Line<'a> {
    schema_version: u32,
    #[serde(flatten)]
    descriptor: JsonDescriptor<'a>,
}

/// A descriptor, as it was found and as it ended.
#[derive(Serialize)]
pub struct JsonDescriptor<'a> {
    pid: i32,
    comm: &'a str,
    unit: Option<&'a str>,
    container: Option<JsonContainer<'a>>,
    fd: i32,
    inode: u32,
    pub(crate) cookie: String,
    local: Option<Endpoint>,
    quiet_ms: u64,
    unread: u32,
    /// `None`: it is acted upon, and `outcome` says how that ends.
    closable: Option<bool>,
    outcome: Option<&'static str>,
    reason: Option<String>,
    reason_code: Option<&'static str>,
}

impl JsonDescriptor<'_> {
    /// Which one it is, for people.
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

/// A descriptor, as programs read it.
pub(crate) fn json_descriptor<'a>(
    run: &ReclaimRun,
    dead: &'a DeadDescriptor,
) -> JsonDescriptor<'a> {
    let DeadDescriptor { owner, socket, .. } = dead;
    let (process, outcome) = (&owner.process, owner.reclaim.as_ref());
    let reason = outcome.and_then(ReclaimOutcome::reason);
    JsonDescriptor {
        pid: process.id.pid,
        comm: &process.comm,
        unit: process.cgroup.unit.as_deref(),
        container: container(process),
        fd: owner.fd.0,
        inode: dead.inode,
        cookie: socket.cookie.to_string(),
        local: socket.local.map(endpoint),
        quiet_ms: u64::try_from(socket.quiet.as_millis()).unwrap_or(u64::MAX),
        unread: socket.unread,
        // Nothing is decided before the act.
        closable: outcome.filter(|_| !run.acted).map(|_| reason.is_none()),
        outcome: outcome.filter(|_| run.acted).map(ReclaimOutcome::name),
        reason: reason.map(ToString::to_string),
        reason_code: reason.map(ReclaimReason::code),
    }
}

/// Writes one document.
///
/// # Errors
/// Those of `out`.
pub fn write_document(run: &ReclaimRun, out: &mut dyn Write) -> io::Result<()> {
    let document = Document {
        schema_version: SCHEMA_VERSION,
        cwkill_version: env!("CARGO_PKG_VERSION"),
        dry_run: !run.acted,
        descriptors: run
            .descriptors
            .iter()
            .map(|dead| json_descriptor(run, dead))
            .collect(),
        owners: json_stops(&run.stops),
        unknown: run.unknown,
        unreadable_processes: run.unreadable + run.leader_exited.len() + run.failed.len(),
        hidden_processes: run.hidden,
        summary: run.tally(),
    };
    document.serialize(&mut serializer(out))?;
    out.write_all(b"\n")
}

/// Writes one object a line, one line a descriptor.
///
/// # Errors
/// Those of `out`.
pub fn write_lines(run: &ReclaimRun, out: &mut dyn Write) -> io::Result<()> {
    for dead in &run.descriptors {
        let line = Line {
            schema_version: SCHEMA_VERSION,
            descriptor: json_descriptor(run, dead),
        };
        line.serialize(&mut serializer(out))?;
        out.write_all(b"\n")?;
    }
    Ok(())
}
