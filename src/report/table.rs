//! Parts of tables and sentences for people: processes with their descriptors, units and containers.

use std::fmt::Write as _;

use comfy_table::{ContentArrangement, Table, presets};

use super::layout::{GAP, keep_what_fits};
use crate::model::{Listener, ListeningSocket, Owner, Scan};
use crate::proc::Process;
use crate::proc::cgroup::{Cgroup, unescape};
use crate::text::{escape, short_name};

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

/// With less room for the sentences of its last column, a table loses another column.
const LEAST_SENTENCE: usize = 24;
/// If it has none left to lose, the sentences get so much all the same.
const LEAST_WORD: usize = 8;

/// One column of a table that is to fit into a terminal.
#[derive(Clone, Copy, Debug)]
pub(super) struct Wanted {
    /// See [`keep_what_fits`].
    pub worth: u8,
    /// The columns of the terminal that its widest cell takes; of sentences `None`: they are broken between words.
    pub width: Option<usize>,
}

/// Which columns of a table fit into `room` columns of a terminal, and what is left there for sentences.
pub(super) fn fit(columns: &[Wanted], room: usize) -> (Vec<bool>, usize) {
    let shown = |is_kept: &[bool]| -> Vec<Option<usize>> {
        let shown = columns.iter().zip(is_kept).filter(|(_, kept)| **kept);
        shown.map(|(column, _)| column.width).collect()
    };
    // Of all columns but sentences, each with the space after it.
    let fixed = |widths: &[Option<usize>]| -> usize {
        widths.iter().flatten().map(|width| width + GAP).sum()
    };
    let worths: Vec<u8> = columns.iter().map(|column| column.worth).collect();
    let is_kept = keep_what_fits(&worths, |is_kept| {
        let widths = shown(is_kept);
        let needed = match widths.contains(&None) {
            true => fixed(&widths) + LEAST_SENTENCE,
            false => fixed(&widths).saturating_sub(GAP),
        };
        needed <= room
    });
    let left = room.saturating_sub(fixed(&shown(&is_kept)));
    (is_kept, left.max(LEAST_WORD))
}

/// The names of the processes and the numbers of their descriptors. Without `all`, only the first process and its first
/// descriptor, with the number of the others.
pub(super) fn names(scan: &Scan, owners: &[Owner], all: bool) -> (String, String) {
    names_within(scan, owners, all, usize::MAX)
}

/// The longest name that the kernel keeps of a process. Only a name with escapes takes more columns.
const NAME_WIDTH: usize = 15;

/// The name and the number of a process, for a terminal: the name is cut if it has many escapes.
pub(super) fn short_process(process: &Process) -> String {
    process_within(process, NAME_WIDTH)
}

fn process_within(process: &Process, width: usize) -> String {
    let name = short_name(&process.comm, width, false);
    format!("{name}/{}", process.id.pid)
}

/// The same for a terminal without room.
pub(super) fn short_names(scan: &Scan, owners: &[Owner]) -> (String, String) {
    names_within(scan, owners, false, NAME_WIDTH)
}

/// The same with names of at most `width` columns.
fn names_within(scan: &Scan, owners: &[Owner], all: bool, width: usize) -> (String, String) {
    let mut processes: Vec<&[Owner]> = by_process(owners).collect();
    let (count, first_fds) = match processes.first() {
        None if !scan.owners_known => return ("-".into(), "-".into()),
        None => return ("unknown".into(), "-".into()),
        Some(first) => (processes.len(), first.len()),
    };
    if !all {
        processes.truncate(1);
    }
    let name = |owners: &&[Owner]| process_within(&owners[0].process, width);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::layout::KEPT;

    #[test]
    fn the_least_worthy_columns_are_dropped_first() {
        let column = |worth, width| Wanted { worth, width };
        let columns = [
            column(KEPT, Some(10)),
            column(20, Some(20)),
            column(30, Some(8)),
            column(KEPT, None),
        ];
        let fitting = |room| fit(&columns, room);
        assert_eq!(fitting(100), (vec![true; 4], 100 - 44));
        assert_eq!(fitting(68), (vec![true; 4], 24));
        assert_eq!(fitting(67), (vec![true, false, true, true], 67 - 22));
        assert_eq!(fitting(45), (vec![true, false, false, true], 45 - 12));
        assert_eq!(fitting(5), (vec![true, false, false, true], LEAST_WORD));
        // Without sentences the last column needs no space after it.
        assert_eq!(fit(&columns[..3], 42).0, [true; 3]);
        assert_eq!(fit(&columns[..3], 41).0, [true, false, true]);
    }
}
