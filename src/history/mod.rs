//! The history: which sockets earlier runs have seen, and for how long each has been stuck and idle.
//!
//! The clocks of the kernel start again when a keepalive or a window probe is answered, and when cwkill probes a socket. Byte
//! counters do not. So each run adds an entry for each socket that it sees, with its counters. If a later run sees the same
//! socket with the same counters, no data has moved in between, and the socket is as old as the first of these runs knew.
//!
//! [`entries`] is pure; `encoding` converts it to bytes and back; `file` reads and writes the file. The history only ever makes
//! a socket older by the time between two runs that saw it unchanged. If it is lost, sockets are younger, and fewer match.

mod encoding;
pub mod entries;
mod file;

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

use crate::filter::selectors::Selectors;
use crate::model::{NetnsKey, Scan, Socket};
use entries::{Entries, Reach};
use file::HistoryFile;

/// What earlier runs have seen.
#[derive(Debug, Default)]
pub struct History {
    entries: Entries,
    /// `None` if this run has no history.
    file: Option<HistoryFile>,
    /// Notes for the operator, one per line.
    notes: Vec<String>,
}

impl History {
    /// Reads the file of this user. A file that cannot be used counts as empty; a note says why.
    pub fn open() -> Self {
        let mut history = History::default();
        match HistoryFile::of_this_user() {
            None => {}
            Some(mut file) => {
                match file.read(now()) {
                    Ok(entries) => history.entries = entries,
                    Err(why) => history.notes.push(format!(
                        "cannot read the history of earlier runs, so ages can be too small: {why}"
                    )),
                }
                history.file = Some(file);
            }
        }
        history
    }

    /// An empty history that writes nothing.
    pub fn none() -> Self {
        History::default()
    }

    /// Whether scans must collect entries for it.
    pub fn is_used(&self) -> bool {
        self.file.is_some()
    }

    /// Makes the times of `socket` as long as its entry shows. `now`: from before the kernel listed it.
    pub fn apply_to(&self, netns: NetnsKey, socket: &mut Socket, now: Duration) {
        self.entries.apply_to(netns, socket, now);
    }

    /// Adds what `scan` has seen, and writes the file for the next run. Call it before the first act.
    pub fn add(&mut self, scan: &Scan, selectors: &Selectors) {
        let Some(file) = &mut self.file else {
            return;
        };
        let reach = Reach::of(selectors);
        self.entries.add(&scan.for_history, reach, now());
        if let Err(why) = file.write(&mut self.entries, now()) {
            let note =
                format!("cannot write the history: ages in later runs may be too small: {why}");
            // Two scans of one run can fail for the same reason.
            if !self.notes.contains(&note) {
                self.notes.push(note);
            }
        }
    }

    /// The notes since the last call.
    pub fn take_notes(&mut self) -> Vec<String> {
        std::mem::take(&mut self.notes)
    }
}

/// The hash FNV-1a, which stays the same from version to version.
pub(crate) fn fnv_1a(values: impl Iterator<Item = u64>) -> u64 {
    let step = |hash: u64, value: u64| (hash ^ value).wrapping_mul(0x0100_0000_01b3);
    values.fold(0xcbf2_9ce4_8422_2325, step)
}

/// The time since boot, without the time in which the host slept. It does not jump when the clock is set.
///
/// The clocks in `struct tcp_info` stand still while the host sleeps (they count jiffies), and no data moves then. With a clock that
/// goes on, a socket would seem idle for the whole night right after the host wakes.
pub fn now() -> Duration {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from)
}

/// Names the boot, and the clock of [`now`] in it: a time namespace can have another. `None` if /proc does not show the boot.
pub fn clock() -> Option<String> {
    file::epoch().map(|epoch| {
        let boot = u128::from_be_bytes(epoch.boot);
        format!("{boot:032x}-{}", epoch.time_namespace)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// On a host that has never slept, both clocks of Linux agree. In a time namespace they need not:
    /// `unshare --time --boottime 100000`.
    #[test]
    fn the_clock_stands_still_while_the_host_sleeps() {
        let monotonic = || Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap());
        let (before, now, after) = (monotonic(), now(), monotonic());
        assert!(before <= now && now <= after);
    }
}
