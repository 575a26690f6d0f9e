//! The limits of a scan. With them, cwkill never reports "nothing" about things that it could not see.

use std::time::Duration;

use crate::proc::{AbsentOwner, Unnamed};
use crate::text::{counted, escape, named_or_counted, seconds};

/// The limits of a scan. The default value means that it saw everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Coverage {
    /// The number of processes whose descriptors cwkill could not read. They may own sockets without a known owner.
    pub unreadable_processes: usize,
    /// Their names, if they are few.
    pub unreadable_names: Vec<String>,
    /// /proc does not show the processes of other users (hidepid). They may own any socket.
    pub hidden_processes: bool,
    /// Some sockets have no known owner, and /proc does not show the processes of every pid namespace. They may own these.
    pub other_pid_namespaces: bool,
    /// The number of sockets that may match, and were left out only because cwkill does not know their owner, or because they are
    /// counted in `undecided_in_group` or `undecided_by_name`.
    pub undecided: usize,
    /// The number of sockets that wait at one of several listening sockets with SO_REUSEPORT, and were left out only because
    /// not all of these have a selected owner.
    pub undecided_in_group: usize,
    /// The number of sockets that may match, and were left out only because the name of the container of their owner could not be
    /// read. `undecided` includes them.
    pub undecided_by_name: usize,
    /// The containers that may be selected: their names could not be read.
    pub unnamed: Unnamed,
    /// Notes on the selected owners.
    pub owner_notes: Vec<String>,
    /// The number of network namespaces that cwkill could not enter.
    pub unreachable_namespaces: usize,
    /// Why cwkill could not enter the first of them.
    pub namespace_failure: Option<String>,
    /// The number of processes in an unknown network namespace, which may be one that was not scanned.
    pub unknown_namespaces: usize,
    /// Why the namespace of the first of them is unknown.
    pub unknown_namespace_failure: Option<String>,
    /// The number of network namespaces that were left out because the operator named none. cwkill does not see those that only
    /// processes are in which it may not read. They are not in scope, so they do not count as unseen.
    pub namespaces_not_looked_into: usize,
    /// The number of TCP sockets in these, of which some may be stuck. `None` if it is not known of each namespace.
    pub sockets_not_looked_into: Option<usize>,
    /// The selected owners that do not exist.
    pub absent_owners: Vec<AbsentOwner>,
    /// Names of network namespaces for which there is none. They hide nothing, so they do not count as unseen.
    pub stale_namespace_names: Vec<String>,
    /// The number of descriptors that cwkill did not search for network namespaces without a process and a name, because there are
    /// too many.
    pub unexamined_descriptors: usize,
    /// The number of sockets of the selected owners in an unknown network namespace, which may be one that was not scanned.
    pub unplaced_sockets: usize,
    /// Why the namespace of the first of them is unknown.
    pub unplaced_failure: Option<String>,
    /// The number of TCP connections that match, but are subflows of MPTCP sockets, which the kernel cannot list.
    pub unlisted_subflows: usize,
    /// Connections of others in CLOSE-WAIT that pass through this host. `None`: there are none, or cwkill did not look.
    pub tracked: Option<TrackedCloseWait>,
}

/// Connections between other hosts whose conntrack entry is in CLOSE_WAIT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrackedCloseWait {
    pub entries: usize,
    /// Whether the whole table was read.
    pub complete: bool,
    /// How long the kernel keeps an entry without traffic.
    pub timeout: Option<Duration>,
}

impl TrackedCloseWait {
    fn note(&self) -> String {
        let at_least = if self.complete { "" } else { "at least " };
        let after = match self.timeout {
            Some(timeout) => format!(" after {} without traffic", seconds(timeout)),
            None => " some time after the last traffic".to_owned(),
        };
        format!(
            "the conntrack table has {at_least}{} in CLOSE_WAIT of connections between other hosts, which pass through this one: \
             these are not sockets of this host. The kernel removes each{after} (nf_conntrack_tcp_timeout_close_wait)",
            if self.entries == 1 {
                "1 entry".to_owned()
            } else {
                format!("{} entries", self.entries)
            },
        )
    }
}

impl Coverage {
    /// Whether cwkill could not read the descriptors of some process.
    pub fn has_hidden_owners(&self) -> bool {
        self.unreadable_processes > 0 || self.hidden_processes
    }

    /// The processes whose descriptors cwkill could not read.
    fn unreadable(&self) -> String {
        named_or_counted(self.unreadable_processes, &self.unreadable_names)
    }

    /// The number of sockets that may match, and were left out because cwkill does not know their owner.
    pub fn undecided_by_owner(&self) -> usize {
        self.undecided - self.undecided_in_group - self.undecided_by_name
    }

    /// The number of network namespaces that were not scanned, plus the number of processes in unknown ones.
    pub fn unseen_namespaces(&self) -> usize {
        self.unreachable_namespaces + self.unknown_namespaces
    }

    /// Whether the namespaces that were not looked into may have sockets.
    pub fn may_be_elsewhere(&self) -> bool {
        self.namespaces_not_looked_into > 0 && self.sockets_not_looked_into != Some(0)
    }

    /// Whether more sockets may match than were found.
    pub fn may_have_missed(&self) -> bool {
        let sockets = self.undecided + self.unlisted_subflows + self.unplaced_sockets;
        sockets + self.unseen_namespaces() + self.unexamined_descriptors > 0
    }

    /// The notes for the operator, one per line. `without_owner` is the number of sockets without a known owner.
    pub fn notes(&self, without_owner: usize) -> Vec<String> {
        let absent = self.absent_owners.iter();
        let mut notes: Vec<String> = absent.map(ToString::to_string).collect();
        notes.extend(self.owner_notes.iter().cloned());
        if self.undecided_by_name > 0 {
            notes.push(format!(
                "{} may belong to the selected containers: {}; left alone",
                counted(self.undecided_by_name, "more socket"),
                self.unnamed.note()
            ));
        } else if self.unnamed.containers > 0 {
            notes.push(self.unnamed.note());
        }
        if without_owner > 0 {
            let why = if self.hidden_processes {
                "/proc does not show the processes of others (hidepid)".to_owned()
            } else if self.unreadable_processes > 0 {
                format!("{} could not be read", self.unreadable())
            } else {
                "in flight over a Unix socket, held by the kernel, or owned in another pid namespace"
                    .to_owned()
            };
            notes.push(format!(
                "{} without a known owner: {why}",
                counted(without_owner, "socket")
            ));
        }
        if self.undecided_by_owner() > 0 {
            let why = match self.has_hidden_owners() {
                true if self.hidden_processes || self.unreadable_names.is_empty() => {
                    ", whose descriptors could not be read".to_owned()
                }
                true => format!(": {} could not be read", self.unreadable()),
                false => {
                    ": /proc shows no owner of them (another pid namespace, in flight, or held by the kernel)".to_owned()
                }
            };
            notes.push(format!(
                "{} may belong to the selected processes{why}; left alone",
                counted(self.undecided_by_owner(), "more socket")
            ));
        }
        if self.undecided_in_group > 0 {
            notes.push(format!(
                "{} may belong to the selected processes: several listening sockets share the port (SO_REUSEPORT), and the \
                 kernel does not tell in whose backlog each waits; left alone (--port selects all of them)",
                counted(self.undecided_in_group, "more socket")
            ));
        }
        if self.unreachable_namespaces > 0 {
            let why = self.namespace_failure.as_deref();
            notes.push(format!(
                "{} could not be entered ({})",
                counted(self.unreachable_namespaces, "network namespace"),
                why.unwrap_or("needs CAP_SYS_ADMIN")
            ));
        }
        if self.unknown_namespaces > 0 {
            notes.push(format!(
                "the network namespaces of {} are unknown ({})",
                counted(self.unknown_namespaces, "process"),
                self.unknown_namespace_failure
                    .as_deref()
                    .unwrap_or("needs CAP_SYS_PTRACE")
            ));
        }
        if self.unexamined_descriptors > 0 {
            notes.push(format!(
                "{} not searched for network namespaces that only a socket keeps alive: there are too many",
                counted(self.unexamined_descriptors, "descriptor")
            ));
        }
        if self.unplaced_sockets > 0 {
            notes.push(format!(
                "{} in an unknown network namespace ({})",
                counted(self.unplaced_sockets, "socket"),
                self.unplaced_failure
                    .as_deref()
                    .unwrap_or("needs CAP_NET_ADMIN")
            ));
        }
        if self.unlisted_subflows > 0 {
            notes.push(format!(
                "{} of MPTCP left alone: this kernel does not list MPTCP sockets (CONFIG_INET_MPTCP_DIAG), so their state is \
                 unknown",
                counted(self.unlisted_subflows, "subflow")
            ));
        }
        if let Some(first) = self.stale_namespace_names.first() {
            let count = self.stale_namespace_names.len();
            let others = match count {
                1 => String::new(),
                _ => format!(" and {}", counted(count - 1, "other")),
            };
            notes.push(format!(
                "no network namespace has the name {}{others} in /run/netns or /run/docker/netns: the file is left over (`ip netns \
                 delete` removes it), or the namespace is mounted only in another mount namespace",
                escape(first)
            ));
        }
        notes.extend(self.tracked.as_ref().map(TrackedCloseWait::note));
        notes
    }
}
