//! The dead descriptors that selectors select. Of a dead socket only its owner and its local address are known.

use std::sync::Arc;

use super::FindError;
use super::dead::{self, DeadScan, SuspectVerdict};
use crate::filter::containers::Match;
use crate::filter::selectors::Selectors;
use crate::proc::netns::{self, Netns};
use crate::proc::{ProcFs, Process};

/// The selected dead descriptors.
#[derive(Debug, Default)]
pub struct Leftovers {
    /// The suspects in its tables are dead and selected, or their state is unknown.
    pub scan: DeadScan,
    /// The number of dead descriptors that match, except that their process is in a network namespace out of scope.
    pub elsewhere: usize,
    /// The number of dead descriptors of selected owners that were left out because their local address is unknown.
    pub without_address: usize,
    /// The number of descriptors that may be dead and selected: the name of the container of their process could not be read.
    pub without_name: usize,
}

/// Finds the dead descriptors that match. `listed`: the namespaces whose socket tables are read first. `everywhere`: whether processes
/// in others are in scope too.
///
/// # Errors
/// The sockets or the processes cannot be listed.
pub fn find(
    proc: &ProcFs,
    selectors: &Selectors,
    listed: &[Arc<Netns>],
    everywhere: bool,
) -> Result<Leftovers, FindError> {
    let inodes = dead::listed_inodes(listed)?;
    let selected = |process: &Process| selectors.of_owner(process) != Match::No;
    let mut found = Leftovers {
        scan: dead::find(proc, &selected, &inodes)?,
        ..Leftovers::default()
    };
    let is_in_scope = |process: &Process| {
        let is_listed = |id| listed.iter().any(|netns| netns.id() == id);
        everywhere || netns::id_of_process(proc, process.id.pid).is_ok_and(is_listed)
    };
    for table in &mut found.scan.tables {
        let before = table.suspects.len();
        table.suspects.retain(|suspect| match suspect.verdict {
            SuspectVerdict::NeverConnected => false,
            SuspectVerdict::Unknown(_) => selectors.could_match_some_dead(),
            SuspectVerdict::Dead(socket) => match socket.local.filter(|local| local.port() != 0) {
                Some(local) => selectors.could_match_dead(local),
                None if selectors.could_match_unbound() => true,
                None => {
                    found.without_address += usize::from(selectors.could_match_some_dead());
                    false
                }
            },
        });
        if before > 0 && !table.suspects.is_empty() && !is_in_scope(&table.process) {
            let is_dead = |verdict| matches!(verdict, SuspectVerdict::Dead(_));
            let suspects = table.suspects.drain(..);
            found.elsewhere += suspects.filter(|suspect| is_dead(suspect.verdict)).count();
        }
        if selectors.of_owner(&table.process) == Match::Unknown {
            found.without_name += table.suspects.drain(..).count();
        }
    }
    let tables = &mut found.scan.tables;
    tables.retain(|table| selectors.match_owner(&table.process));
    Ok(found)
}
