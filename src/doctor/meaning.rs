//! What the processes that cwkill cannot read mean for the operator. Pure.

use super::host::{HostInfo, UnreachableProcess};
use super::row::{MethodRow, Support, named};
use crate::model::Method;
use crate::proc::OWNER_OPTIONS;
use crate::text::counted;

/// What follows from processes that cwkill cannot read, one sentence or two for each kind. Empty if it can read all.
pub fn meaning(host: &HostInfo, rows: &[MethodRow]) -> Vec<String> {
    let mut meaning = Vec::new();
    let closes = closes(rows);
    let consequence = format!(
        "is listed without a known owner, and no selector of owners ({OWNER_OPTIONS}) finds it; {closes}"
    );
    if host.hides_others() {
        meaning.push(format!(
            "/proc hides the processes of other users. A stuck socket of such a process {consequence}."
        ));
    }
    if let Ok(reachability) = &host.reachability {
        let total = reachability.same_user.total + reachability.others.total;
        let others = |count: usize| match total - count {
            0 => String::new(),
            1 => " The other process is not affected.".to_owned(),
            others => format!(" The other {others} processes are not affected."),
        };
        let (visible, hidden): (Vec<_>, Vec<_>) = reachability
            .unreachable
            .iter()
            .partition(|process| process.seen);
        let of_total = |processes: &[&UnreachableProcess]| {
            let count = processes.len();
            format!(
                "{count} of {} ({})",
                counted(total, "process"),
                named(processes.iter().copied())
            )
        };
        if !hidden.is_empty() {
            meaning.push(format!(
                "cwkill cannot read {}. A stuck socket of {} {consequence}.{}",
                of_total(&hidden),
                such(hidden.len()),
                others(reachability.unreachable.len())
            ));
        }
        if !visible.is_empty() {
            meaning.push(format!(
                "cwkill can list the descriptors of {}, but not use them. A stuck socket of {} is listed with its owner; {closes}.{}",
                of_total(&visible),
                such(visible.len()),
                match hidden.is_empty() {
                    true => others(visible.len()),
                    false => String::new(),
                }
            ));
        }
    }
    if let Ok(namespaces) = &host.namespaces
        && namespaces.unknown_processes > 0
    {
        meaning.push(format!(
            "--all-netns does not know the network namespace of {}: if it finds nothing, its exit status is 4, and that of a check 3.",
            counted(namespaces.unknown_processes, "process")
        ));
    }
    meaning
}

fn such(count: usize) -> &'static str {
    match count {
        1 => "this process",
        _ => "such a process",
    }
}

/// Which methods close a socket whose owner is out of reach.
fn closes(rows: &[MethodRow]) -> String {
    let works = |method: &Method| {
        let mut rows = rows.iter().filter(|row| row.name == method.name());
        rows.any(|row| matches!(row.ownerless, Some(Support::Yes | Support::Partly)))
    };
    let methods: Vec<&str> = [Method::Destroy, Method::Rst]
        .iter()
        .filter(|method| works(method))
        .map(|method| method.name())
        .collect();
    match &methods[..] {
        [] => "nothing closes it here".to_owned(),
        [one] => format!("{one} closes it, shutdown and reclaim do not"),
        more => format!(
            "{} close it, shutdown and reclaim do not",
            more.join(" and ")
        ),
    }
}
