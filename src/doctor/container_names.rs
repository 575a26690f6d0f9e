//! Of which containers cwkill can read the names, by runtime.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use crate::proc::cgroup::{Container, Runtime};
use crate::proc::{ProcFs, read_identity};

/// The containers of one runtime that have a process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NameCounts {
    pub total: usize,
    /// Those whose names are known.
    pub named: usize,
    /// Why the name of the first of the others is unknown, and which one that is.
    pub why: Option<String>,
}

/// The containers of each runtime.
pub type ContainerNames = BTreeMap<Runtime, NameCounts>;

/// Reads the names of the containers of all processes.
///
/// # Errors
/// /proc cannot be listed.
pub(super) fn read(proc: &ProcFs) -> io::Result<ContainerNames> {
    let processes = proc.pids()?.into_iter();
    let processes = processes.filter_map(|pid| Some(proc.to_show(read_identity(proc, pid).ok()?)));
    Ok(count(
        processes.filter_map(|process| process.cgroup.container),
    ))
}

/// Counts each container once.
fn count(containers: impl Iterator<Item = Container>) -> ContainerNames {
    let mut seen = BTreeSet::new();
    let mut counts = ContainerNames::new();
    for container in containers {
        let (runtime, id) = container.key();
        if !seen.insert((runtime, id.to_owned())) {
            continue;
        }
        let counts = counts.entry(container.runtime).or_default();
        counts.total += 1;
        match container.may_have_a_name() {
            false => counts.named += 1,
            true => {
                counts.why.get_or_insert_with(|| container.why_unnamed());
            }
        }
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proc::cgroup::{Cgroup, Facts};

    #[test]
    fn each_container_counts_once() {
        let docker = |number: u32| {
            let id = format!("{number:08x}").repeat(8);
            Cgroup::parse(&format!("0::/docker/{id}\n"))
                .container
                .unwrap()
        };
        let named = Container {
            name: Some("web".into()),
            facts: Facts {
                was_read: true,
                ..Facts::default()
            },
            ..docker(1)
        };
        let unread = |number| Container {
            facts: Facts {
                unread: Some("/x: cut".into()),
                ..Facts::default()
            },
            ..docker(number)
        };
        let lxc = Cgroup::parse("0::/lxc.payload.web\n").container.unwrap();
        let all = [named.clone(), named, unread(2), unread(2), unread(3), lxc];
        let counts = count(all.into_iter());
        let of_docker = NameCounts {
            total: 3,
            named: 1,
            why: Some("docker 000000020000: /x: cut".into()),
        };
        assert_eq!(counts[&Runtime::Docker], of_docker);
        assert_eq!(
            (counts[&Runtime::Lxc].total, counts[&Runtime::Lxc].named),
            (1, 1)
        );
        assert_eq!(counts.len(), 2);
    }
}
