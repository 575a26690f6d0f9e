//! What could not be seen, so that "nothing" is never said of what was not looked at.

use crate::text::counted;

/// What a scan could not see. All zero and false: it saw everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Coverage {
    /// Processes whose descriptors could not be read: they may own sockets without a known owner.
    pub unreadable_processes: usize,
    /// /proc does not show the processes of other users (hidepid): they may own anything.
    pub hidden_processes: bool,
    /// Sockets that were left out only because their owner could not be read, and might match.
    pub undecided: usize,
    /// Network namespaces that could not be looked into.
    pub unreachable_namespaces: usize,
    /// Why the first of them could not.
    pub namespace_failure: Option<String>,
    /// Processes whose network namespace is unknown; it may be one that was not looked into.
    pub unknown_namespaces: usize,
    /// Why the sockets could not be listed again after some were destroyed.
    pub unlisted: Option<String>,
}

impl Coverage {
    /// Whether the descriptors of some process could not be seen.
    pub fn has_hidden_owners(&self) -> bool {
        self.unreadable_processes > 0 || self.hidden_processes
    }

    /// How many network namespaces, or processes in unknown ones, were not looked into.
    pub fn unseen_namespaces(&self) -> usize {
        self.unreachable_namespaces + self.unknown_namespaces
    }

    /// Whether more sockets may match than were found.
    pub fn may_have_missed(&self) -> bool {
        self.undecided + self.unseen_namespaces() > 0
    }

    /// The notes for the operator, one a line. `without_owner` sockets have no known owner.
    pub fn notes(&self, without_owner: usize) -> Vec<String> {
        let mut notes = Vec::new();
        if without_owner > 0 {
            let why = if self.hidden_processes {
                "/proc does not show the processes of others (hidepid)".to_owned()
            } else if self.unreadable_processes > 0 {
                format!(
                    "{} could not be read",
                    counted(self.unreadable_processes, "process")
                )
            } else {
                "in flight over a Unix socket, held by the kernel, or owned in another pid namespace"
                    .to_owned()
            };
            notes.push(format!(
                "{} without a known owner: {why}",
                counted(without_owner, "socket")
            ));
        }
        if self.undecided > 0 {
            notes.push(format!(
                "{} more may belong to the selected processes, whose descriptors could not be read; left alone",
                counted(self.undecided, "socket")
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
                "the network namespaces of {} are unknown (needs CAP_SYS_PTRACE)",
                counted(self.unknown_namespaces, "process")
            ));
        }
        if let Some(why) = &self.unlisted {
            notes.push(format!("the remaining sockets could not be listed ({why})"));
        }
        notes
    }
}
