//! Parts of tables and sentences for people: processes with their descriptors, units and containers.

use std::fmt::Write as _;

use comfy_table::{ContentArrangement, Table, presets};

use crate::model::{Listener, ListeningSocket, Owner, Scan};
use crate::proc::cgroup::{Cgroup, unescape};
use crate::text::escape;

/// A table without lines. Each column is as wide as its widest cell.
pub(super) fn plain_table(color: bool) -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_content_arrangement(ContentArrangement::Disabled);
    table.force_no_tty();
    if color {
        table.enforce_styling();
    }
    table
}

/// The names of the processes and the numbers of their descriptors. Without `all`, only the first process and its first
/// descriptor, with the number of the others.
pub(super) fn names(scan: &Scan, owners: &[Owner], all: bool) -> (String, String) {
    let mut processes: Vec<&[Owner]> = by_process(owners).collect();
    let (count, first_fds) = match processes.first() {
        None if !scan.owners_known => return ("-".into(), "-".into()),
        None => return ("unknown".into(), "-".into()),
        Some(first) => (processes.len(), first.len()),
    };
    if !all {
        processes.truncate(1);
    }
    let name = |owners: &&[Owner]| owners[0].process.to_string();
    let fds = |owners: &&[Owner]| match all {
        true => join(owners.iter().map(ToString::to_string), ","),
        false => owners[0].to_string(),
    };
    let mut names = join(processes.iter().map(name), ",");
    let mut fds = join(processes.iter().map(fds), " ");
    if !all && count > 1 {
        let _ = write!(names, " +{}", count - 1);
    }
    if !all && first_fds > 1 {
        let _ = write!(fds, " +{}", first_fds - 1);
    }
    (names, fds)
}

/// The descriptors of each process; `owners` are ordered by process.
pub(super) fn by_process(owners: &[Owner]) -> impl Iterator<Item = &[Owner]> {
    owners.chunk_by(|a, b| a.process.id == b.process.id)
}

pub(super) fn join(parts: impl Iterator<Item = String>, separator: &str) -> String {
    parts.collect::<Vec<_>>().join(separator)
}

/// The connections that wait at each listening socket, and the limit of its backlog.
pub(super) fn backlogs(listener: &Listener, separator: &str) -> String {
    let one = |socket: &ListeningSocket| format!("{}{separator}{}", socket.waiting, socket.backlog);
    join(listener.sockets.iter().map(one), " and ")
}

/// The container of a process, or else its unit.
pub(crate) fn place(cgroup: &Cgroup) -> Option<String> {
    match (&cgroup.container, &cgroup.unit) {
        (Some(container), _) => Some(container.to_string()),
        (None, Some(unit)) => Some(unescape(unit.strip_suffix(".service").unwrap_or(unit))),
        (None, None) => None,
    }
}

pub(super) fn has_unit(cgroup: &Cgroup) -> bool {
    cgroup.unit.is_some() || cgroup.container.is_some()
}

/// The container or the unit of a process, or `-`. With `all`, also the pod.
pub(super) fn unit_text(cgroup: &Cgroup, all: bool) -> String {
    let mut name = place(cgroup).unwrap_or_else(|| "-".to_owned());
    if let Some(pod) = cgroup.container.as_ref().and_then(|c| c.pod_uid.as_ref())
        && all
    {
        let _ = write!(name, " pod {pod}");
    }
    escape(&name)
}
