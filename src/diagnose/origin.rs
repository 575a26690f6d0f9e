//! Where the sockets of a process come from: accepted by itself, inherited from another process, or given to it by a server that starts
//! a process for each connection.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use super::ProcessDiagnosis;
use crate::finder::dead::{DescriptorTable, SuspectVerdict};
use crate::finder::owners;
use crate::model::Scan;
use crate::proc::{Inodes, ProcFs, Process, ProcessId, RemoteFd};
use crate::reclaim::{self, Usage};

/// A difference of two clocks that proves nothing.
const CLOCK_ERROR: Duration = Duration::from_millis(100);

/// This number of processes, or more, with one connection each are a server that has a process for each connection, even if each of
/// them also accepts connections itself.
const PER_CONNECTION_FROM: usize = 3;

/// A listening socket: the index of its network namespace, its port and its inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListeningPort {
    pub netns: usize,
    pub port: u16,
    pub inode: u32,
    /// The connections that wait for accept(2).
    pub waiting: u32,
}

/// The leaked sockets of one process.
#[derive(Debug, Default)]
struct Leaked {
    /// Its descriptors, with the inodes of the sockets.
    fds: Vec<(RemoteFd, u32)>,
    /// The local ports, with the network namespace.
    ports: BTreeSet<(usize, u16)>,
    /// The sockets.
    inodes: Inodes,
    /// The other owners.
    others: HashSet<ProcessId>,
    /// The latest time at which the oldest connection can have been made, since boot.
    connected_at: Option<Duration>,
}

impl Leaked {
    /// Adds a connection that was at least `age` old at the time `seen`.
    fn add_age(&mut self, seen: Duration, age: Option<Duration>) {
        let connected_at = age.and_then(|age| seen.checked_sub(age));
        self.connected_at = match (self.connected_at, connected_at) {
            (Some(one), Some(other)) => Some(one.min(other)),
            (one, other) => one.or(other),
        };
    }
}

/// What decides whether a process has inherited its sockets.
#[derive(Clone, Copy, Debug)]
struct HeirFacts {
    /// It runs another program than the process that the sockets may come from.
    is_other_program: bool,
    /// One of the connections is older than the process.
    is_older: bool,
    /// It has several of them.
    has_several: bool,
    /// It has a descriptor of the listener.
    owns_listener: bool,
    /// One of them is its standard input, output or error: a server such as inetd(8) has given it to the process.
    is_standard: bool,
    usage: Usage,
}

impl HeirFacts {
    /// A process that accepts connections at a listener of another program, as systemd starts it, has no connection that is older
    /// than itself. One that a server starts for a connection has one connection, and uses it.
    fn is_heir(self) -> bool {
        self.is_other_program
            && !self.is_standard
            && match self.usage {
                Usage::Used => false,
                Usage::Unknown => self.is_older,
                Usage::Unused => self.is_older || (self.has_several && !self.owns_listener),
            }
    }
}

/// Finds for each process whether it has inherited its sockets, and whether it is one of many with one connection each. The
/// descriptor tables were read before the time `tables_read`, since boot.
pub fn find(
    processes: &mut [ProcessDiagnosis],
    scan: &Scan,
    listening: &[ListeningPort],
    netns_of: &dyn Fn(&Process) -> Option<usize>,
    tables_read: Duration,
    proc: &ProcFs,
) {
    let leaked: Vec<Leaked> = leaked(processes, scan, netns_of, tables_read);
    let ports: HashSet<(usize, u16)> = leaked
        .iter()
        .flat_map(|l| l.ports.iter().copied())
        .collect();
    let listeners = listener_owners(&ports, listening, proc);
    let listening: Inodes = listening.iter().map(|listener| listener.inode).collect();
    let mut programs = HashMap::new();
    for (diagnosis, leaked) in processes.iter_mut().zip(&leaked) {
        let at_ports = || {
            leaked
                .ports
                .iter()
                .filter_map(|port| listeners.get(port))
                .flatten()
        };
        diagnosis.inherited_from = origin(diagnosis, leaked, at_ports(), &mut programs, proc);
        let owns = |owner: &Arc<Process>| owner.id == diagnosis.process.id;
        let is_shared_with_listener = || at_ports().any(|owner| leaked.others.contains(&owner.id));
        let single = leaked.inodes.len() == 1
            && leaked.ports.len() == 1
            && has_no_other(diagnosis.table.as_ref(), &leaked.inodes, &listening);
        diagnosis.single_connection = match leaked.ports.first() {
            Some((_, port)) if single && diagnosis.inherited_from.is_none() => Some(Single {
                port: *port,
                was_given: at_ports().next().is_some()
                    && !at_ports().any(owns)
                    && !is_shared_with_listener(),
            }),
            _ => None,
        };
    }
    let mut sizes: HashMap<(String, u16), usize> = HashMap::new();
    let key = |diagnosis: &ProcessDiagnosis| {
        let single = diagnosis.single_connection?;
        (diagnosis.shared == 0 || single.was_given)
            .then(|| (format!("{:?}", diagnosis.process.kind()), single.port))
    };
    for diagnosis in &*processes {
        if let Some(key) = key(diagnosis) {
            *sizes.entry(key).or_default() += 1;
        }
    }
    for diagnosis in processes {
        let is_one_of_many = key(diagnosis).is_some_and(|key| sizes[&key] >= PER_CONNECTION_FROM);
        let was_given = diagnosis
            .single_connection
            .is_some_and(|single| single.was_given);
        diagnosis.per_connection = is_one_of_many || was_given;
    }
}

/// Whether a process is known to have no TCP connection except those with the inodes `leaked`: to end it then cuts no other client off.
/// `listening` has the inodes of the listeners.
fn has_no_other(table: Option<&DescriptorTable>, leaked: &Inodes, listening: &Inodes) -> bool {
    let Some(table) = table else {
        return false;
    };
    let is_leaked = |inode: &u32| leaked.contains(inode);
    let mut connections = table.connections.iter();
    let mut suspects = table.suspects.iter();
    connections.all(|inode| is_leaked(inode) || listening.contains(inode))
        && suspects.all(|suspect| match suspect.verdict {
            SuspectVerdict::Dead(_) | SuspectVerdict::NeverConnected => true,
            SuspectVerdict::Unknown(_) => is_leaked(&suspect.inode),
        })
}

/// The only connection of a process: it has no other TCP connection, stuck or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Single {
    /// Its local port.
    pub port: u16,
    /// Another process listens at that port, and this one does not.
    pub was_given: bool,
}

/// The leaked sockets of each process.
fn leaked(
    processes: &[ProcessDiagnosis],
    scan: &Scan,
    netns_of: &dyn Fn(&Process) -> Option<usize>,
    tables_read: Duration,
) -> Vec<Leaked> {
    let mut leaked: Vec<Leaked> = processes.iter().map(|_| Leaked::default()).collect();
    let places: HashMap<ProcessId, usize> =
        processes.iter().map(|p| p.process.id).zip(0..).collect();
    for target in &scan.targets {
        let socket = &target.socket;
        let Some(inode) = socket.inode else {
            continue;
        };
        let owners: BTreeSet<ProcessId> = target.owners.iter().map(|o| o.process.id).collect();
        for owner in &target.owners {
            if let Some(&place) = places.get(&owner.process.id) {
                let of_owner = &mut leaked[place];
                of_owner.fds.push((owner.fd, inode));
                of_owner.inodes.insert(inode);
                of_owner
                    .ports
                    .insert((socket.netns, socket.tuple().local.port()));
                of_owner.add_age(scan.listed_at, socket.connected_for);
                let others = owners.iter().filter(|id| **id != owner.process.id);
                of_owner.others.extend(others);
            }
        }
    }
    for (diagnosis, of_owner) in processes.iter().zip(&mut leaked) {
        let Some(table) = &diagnosis.table else {
            continue;
        };
        let mut netns = None;
        for suspect in &table.suspects {
            if let SuspectVerdict::Dead(dead) = suspect.verdict {
                of_owner.fds.push((suspect.fd, suspect.inode));
                of_owner.inodes.insert(suspect.inode);
                of_owner.add_age(tables_read, Some(dead.quiet));
                let netns = *netns.get_or_insert_with(|| netns_of(&diagnosis.process));
                if let (Some(netns), Some(local)) = (netns, dead.local) {
                    of_owner.ports.insert((netns, local.port()));
                }
            }
        }
    }
    leaked
}

/// The owners of the listeners at `ports`, the process that started first before the others.
fn listener_owners(
    ports: &HashSet<(usize, u16)>,
    listening: &[ListeningPort],
    proc: &ProcFs,
) -> HashMap<(usize, u16), Vec<Arc<Process>>> {
    let at_ports = listening
        .iter()
        .filter(|l| ports.contains(&(l.netns, l.port)));
    let inodes: Inodes = at_ports.clone().map(|listener| listener.inode).collect();
    // Without the owners of the listeners the verdicts are those of the causes.
    let owners = owners::find(proc, &inodes).unwrap_or_default();
    let mut by_port: HashMap<(usize, u16), Vec<Arc<Process>>> = HashMap::new();
    for listener in at_ports {
        let of_port = by_port.entry((listener.netns, listener.port)).or_default();
        of_port.extend(owners.of(listener.inode).map(|owner| owner.process));
        of_port.sort_by_key(|process| (process.id.start_time, process.id.pid));
        of_port.dedup_by_key(|process| process.id);
    }
    by_port
}

/// The process that the sockets of `diagnosis` were inherited from; `None` if they seem to be its own.
fn origin<'a>(
    diagnosis: &ProcessDiagnosis,
    leaked: &Leaked,
    listeners: impl Iterator<Item = &'a Arc<Process>> + Clone,
    programs: &mut HashMap<ProcessId, Option<String>>,
    proc: &ProcFs,
) -> Option<Arc<Process>> {
    let heir = &diagnosis.process;
    let program = diagnosis.status.program.as_ref()?;
    if leaked.fds.is_empty() {
        return None;
    }
    let is_older = leaked
        .connected_at
        .zip(started(heir.id))
        .is_some_and(|(connected, started)| connected + CLOCK_ERROR < started);
    let parent = || {
        let parent = diagnosis.status.parent.filter(|_| is_older)?;
        proc.process(parent).map(Arc::new)
    };
    // The first process of the system gives its listeners to services on purpose.
    let mut is_other = |other: &Arc<Process>| {
        other.id.pid != 1 && other.id.start_time <= heir.id.start_time && other.id != heir.id && {
            let of_other = programs
                .entry(other.id)
                .or_insert_with(|| proc.status(other).program);
            of_other.as_ref().is_some_and(|other| other != program)
        }
    };
    let from = listeners.clone().find(|owner| is_other(owner)).cloned();
    let from = from.or_else(|| parent().filter(|parent| is_other(parent)))?;
    let facts = HeirFacts {
        is_other_program: true,
        is_older,
        has_several: leaked.inodes.len() > 1,
        owns_listener: listeners.clone().any(|owner| owner.id == heir.id),
        is_standard: leaked.fds.iter().any(|(fd, _)| fd.0 <= 2),
        usage: Usage::Unused,
    };
    // The evidence of use costs the most, so it is read only if it matters.
    let facts = HeirFacts {
        usage: match facts.is_heir() {
            true => reclaim::usage(proc, heir, &leaked.fds),
            false => return None,
        },
        ..facts
    };
    facts.is_heir().then_some(from)
}

/// The time from boot to the start of the process.
fn started(id: ProcessId) -> Option<Duration> {
    let ticks_per_second = u32::try_from(procfs::ticks_per_second()).ok()?;
    Duration::from_secs(id.start_time).checked_div(ticks_per_second)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::finder::dead::Suspect;
    use crate::proc::since_boot;

    const HEIR: HeirFacts = HeirFacts {
        is_other_program: true,
        is_older: true,
        has_several: true,
        owns_listener: false,
        is_standard: false,
        usage: Usage::Unused,
    };

    #[test]
    fn only_unused_sockets_of_another_program_are_inherited() {
        assert!(HEIR.is_heir());
        for other in [
            HeirFacts {
                is_other_program: false,
                ..HEIR
            },
            // inetd(8) gives the connection as standard input and output.
            HeirFacts {
                is_standard: true,
                ..HEIR
            },
            HeirFacts {
                usage: Usage::Used,
                ..HEIR
            },
        ] {
            assert!(!other.is_heir(), "{other:?}");
        }
        let accepted = HeirFacts {
            is_older: false,
            ..HEIR
        };
        assert!(accepted.is_heir());
        for other in [
            // It may have accepted them itself at a listener that it was started with.
            HeirFacts {
                owns_listener: true,
                ..accepted
            },
            // It may have been started for this one connection.
            HeirFacts {
                has_several: false,
                ..accepted
            },
            HeirFacts {
                usage: Usage::Unknown,
                ..accepted
            },
        ] {
            assert!(!other.is_heir(), "{other:?}");
        }
        let unseen = HeirFacts {
            usage: Usage::Unknown,
            ..HEIR
        };
        assert!(unseen.is_heir());
    }

    #[test]
    fn a_process_with_another_connection_is_not_there_for_one() {
        let set = |inodes: &[u32]| inodes.iter().copied().collect::<Inodes>();
        let (leaked, listening) = (set(&[10]), set(&[20, 21]));
        let unknown = |inode| Suspect {
            fd: RemoteFd(9),
            tid: None,
            inode,
            verdict: SuspectVerdict::Unknown(nix::errno::Errno::EPERM),
        };
        for (connections, suspects, expected) in [
            // Two descriptors of the socket, and an inherited listener.
            (vec![10, 10, 20], vec![], true),
            (vec![], vec![], true),
            (vec![10, 11, 20], vec![], false),
            (vec![10], vec![unknown(30)], false),
            (vec![], vec![unknown(10)], true),
        ] {
            let table = DescriptorTable {
                process: (*crate::proc::testdata::process(7, "worker")).clone(),
                used: 12,
                suspects,
                connections,
            };
            let found = has_no_other(Some(&table), &leaked, &listening);
            assert_eq!(found, expected, "{table:?}");
        }
        assert!(!has_no_other(None, &leaked, &listening), "nothing was seen");
    }

    #[test]
    fn the_oldest_connection_counts() {
        let mut leaked = Leaked::default();
        let seconds = Duration::from_secs;
        leaked.add_age(seconds(100), None);
        assert_eq!(leaked.connected_at, None);
        for (age, connected_at) in [(5, 95), (3, 95), (40, 60), (101, 60)] {
            leaked.add_age(seconds(100), Some(seconds(age)));
            assert_eq!(leaked.connected_at, Some(seconds(connected_at)));
        }
    }

    #[test]
    fn start_times_and_the_clock_agree() {
        let own = i32::try_from(std::process::id()).unwrap();
        let start_time = ProcFs::default().start_time(own).unwrap();
        let id = ProcessId {
            pid: own,
            start_time,
        };
        let started = started(id).unwrap();
        let now = since_boot();
        assert!(started < now && now - started < Duration::from_secs(3600));
    }
}
