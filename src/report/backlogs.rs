//! The parts of a report about backlogs that `--drain-backlog` drains.

use std::net::IpAddr;

use serde::Serialize;

use super::Run;
use super::descriptors::micros;
use super::serialize::{JsonNetns, JsonOwner, json_netns, json_owners};
use super::table::names;
use crate::model::{Backlog, DrainReason};
use crate::text::counted;

/// One line for each backlog.
pub fn lines(run: &Run) -> Vec<String> {
    let backlogs = run.backlogs.iter().flatten();
    backlogs.map(|backlog| line(run, backlog)).collect()
}

/// The result of one backlog in words; in a dry run, the expected one.
pub fn line(run: &Run, backlog: &Backlog) -> String {
    let connections = |count: u32| {
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        counted(count, "dead connection")
    };
    let place = place(run, backlog);
    let reason = backlog
        .result
        .as_ref()
        .and_then(|result| result.reason.as_ref());
    match (&backlog.result, reason) {
        (None, _) => format!(
            "{} to be drained from the backlog of {place}",
            connections(backlog.dead)
        ),
        (Some(_), Some(reason)) if !run.acted => {
            format!("the backlog of {place} would not be drained: {reason}")
        }
        (Some(result), Some(reason)) if result.drained == 0 => {
            format!("the backlog of {place} was not drained: {reason}")
        }
        (Some(result), Some(reason)) => format!(
            "only {} drained from the backlog of {place}: {reason}",
            connections(result.drained)
        ),
        (Some(result), None) if result.drained == 0 => {
            format!("nothing was left to drain from the backlog of {place}")
        }
        (Some(result), None) => format!(
            "{} drained from the backlog of {place}{}; its owners were stopped for {:.1} ms",
            connections(result.drained),
            match result.left_one {
                true => ", one left for its owner, which has no O_NONBLOCK",
                false => "",
            },
            result.stop_time.as_secs_f64() * 1000.0
        ),
    }
}

/// The address of a backlog, its owners, its length and limit, and its network namespace if there are several.
pub fn place(run: &Run, backlog: &Backlog) -> String {
    let (owner, _) = names(&run.scan, &backlog.owners, false);
    let netns = match run.scan.namespaces.len() {
        1 => String::new(),
        _ => format!(
            ", netns {}",
            crate::text::escape(&run.scan.namespaces[backlog.netns].label())
        ),
    };
    format!(
        "{} ({owner}, backlog {}/{}{netns})",
        backlog.local, backlog.socket.waiting, backlog.socket.backlog
    )
}

/// A backlog with its result.
#[derive(Serialize)]
pub struct JsonBacklog<'a> {
    netns: JsonNetns<'a>,
    address: IpAddr,
    port: u16,
    /// The inode of the listening socket.
    inode: u32,
    owners: Vec<JsonOwner<'a>>,
    group_size: usize,
    /// The limit.
    backlog: u32,
    /// The connections that waited at first, and those of them that were dead.
    waiting_before: u32,
    dead: u32,
    /// `None` in a listing or dry run.
    drained: Option<u32>,
    /// Whether one dead connection was left for the owner.
    left_one: Option<bool>,
    /// The connections that wait now.
    waiting: u32,
    /// Why dead ones are left, or in a dry run would be left.
    reason: Option<String>,
    reason_code: Option<&'static str>,
    /// The time for which the owners were stopped.
    stopped_us: Option<u64>,
}

pub fn json_backlog<'a>(run: &'a Run, backlog: &'a Backlog) -> JsonBacklog<'a> {
    let result = backlog.result.as_ref();
    let reason = result.and_then(|result| result.reason.as_ref());
    JsonBacklog {
        netns: json_netns(&run.scan.namespaces[backlog.netns]),
        address: backlog.local.ip(),
        port: backlog.local.port(),
        inode: backlog.socket.inode,
        owners: json_owners(run, &backlog.owners),
        group_size: backlog.group_size,
        backlog: backlog.socket.backlog,
        waiting_before: backlog.waiting_before,
        dead: backlog.dead,
        drained: result.filter(|_| run.acted).map(|result| result.drained),
        left_one: result.filter(|_| run.acted).map(|result| result.left_one),
        waiting: backlog.socket.waiting,
        reason: reason.map(ToString::to_string),
        reason_code: reason.map(DrainReason::code),
        stopped_us: result
            .filter(|_| run.acted)
            .map(|result| micros(result.stop_time)),
    }
}
