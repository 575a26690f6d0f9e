//! The processes that the selectors of owners select: which of the named ones do not exist, and in which network namespaces the
//! others are.

use std::io;

use rayon::prelude::*;

use crate::filter::containers::Match;
use crate::filter::selectors::Selectors;
use crate::proc::netns::Namespaces;
use crate::proc::{
    AbsentOwner, OwnerKind, Presence, ProcFs, Process, Unnamed, is_missing, read_identity,
};

/// A thread reads so many processes or more, about 20 µs each.
const AT_ONCE: usize = 16;

/// The processes that the selectors of owners select.
#[derive(Debug, Default)]
pub struct SelectedOwners {
    pub pids: Vec<i32>,
    /// The selected owners that do not exist.
    pub absent: Vec<AbsentOwner>,
    /// Processes that may be selected: the name of their container could not be read.
    pub unnamed: Unnamed,
    /// Notes on names that several containers have.
    pub notes: Vec<String>,
    /// Whether no process is selected. Not if one may be selected that /proc does not show.
    pub nobody: bool,
}

/// Looks for the processes that `selectors` select.
///
/// # Errors
/// /proc cannot be listed.
pub fn look(proc: &ProcFs, selectors: &Selectors) -> io::Result<SelectedOwners> {
    if !selectors.selects_owners() {
        return Ok(SelectedOwners::default());
    }
    let (mut absent, mut is_hidden) = (Vec::new(), false);
    for &pid in &selectors.pids {
        match proc.presence(pid) {
            Presence::Shown => {}
            Presence::Hidden => is_hidden = true,
            Presence::ThreadOf(leader) => {
                absent.push(AbsentOwner::new(OwnerKind::Thread(leader), pid));
            }
            Presence::Absent => absent.push(AbsentOwner::new(OwnerKind::Pid, pid)),
        }
    }
    let by_pid = !selectors.pids.is_empty();
    let no_pid_exists = by_pid && absent.len() == selectors.pids.len();
    let by_name = selectors.selects_owners_by_name();
    let mut candidates = match by_pid && !by_name {
        true => selectors.pids.iter().copied().collect(),
        false => proc.pids()?,
    };
    // Process 1 lives as long as its pid namespace, so only hidepid can hide it.
    is_hidden |= by_name && candidates.first() != Some(&1);
    if !by_name {
        candidates.retain(|pid| proc.presence(*pid) == Presence::Shown);
    }
    let read: Vec<io::Result<Process>> = candidates
        .into_par_iter()
        .with_min_len(AT_ONCE)
        .map(|pid| read_identity(proc, pid))
        .collect();
    let mut processes = Vec::with_capacity(read.len());
    for result in read {
        match result {
            Ok(process) => processes.push(process),
            Err(error) if is_missing(&error) => {}
            Err(_) => is_hidden = true,
        }
    }
    if !is_hidden {
        absent.extend(selectors.absent_names(&processes));
    }
    let selected = processes.iter().filter(|one| selectors.match_owner(one));
    let selected: Vec<&Process> = selected.collect();
    let pids: Vec<i32> = selected.iter().map(|process| process.id.pid).collect();
    let may_be = |one: &&Process| selectors.of_owner(one) == Match::Unknown;
    let unnamed = Unnamed::of(processes.iter().filter(may_be));
    // A process of another pid namespace may have the name, and there the number may be that of another process.
    let sees_all = proc.shows_every_process() && (!is_hidden || no_pid_exists);
    let nobody = pids.is_empty() && unnamed.pids.is_empty() && sees_all;
    if nobody && absent.is_empty() {
        absent.push(AbsentOwner::new(OwnerKind::Together, ""));
    }
    Ok(SelectedOwners {
        pids,
        absent,
        notes: selectors.containers.names_of_several(&selected),
        unnamed,
        nobody,
    })
}

impl SelectedOwners {
    /// Adds what is known of the owners to `namespaces`; with `follows`, also the namespaces that they are in.
    pub(super) fn add_to(self, namespaces: &mut Namespaces, proc: &ProcFs, follows: bool) {
        if follows {
            namespaces.follows_owners = true;
            namespaces.add_of_processes(proc, &self.pids);
            namespaces.add_of_processes(proc, &self.unnamed.pids);
        }
        namespaces.unnamed = self.unnamed;
        namespaces.notes = self.notes;
        namespaces.absent = self.absent;
        namespaces.nobody = self.nobody;
    }
}
