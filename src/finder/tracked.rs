//! Connections between other hosts that are in CLOSE-WAIT, from the conntrack table: this host is their router, NAT node or mesh. They
//! are not sockets of this host.

use std::time::{Duration, Instant};

use crate::conntrack::{self, TrackedEnds};
use crate::model::{Scan, TrackedCloseWait};
use crate::routes::{self, Place};

/// The maximum time for reading the tables of all namespaces together: a note about them is not worth a longer wait.
const MAX_READ_TIME: Duration = Duration::from_millis(200);

/// Counts the connections of others in CLOSE-WAIT, in the namespaces of `scan`, and writes the result to its coverage. A table that
/// cwkill cannot read counts as empty.
pub fn count(scan: &mut Scan) {
    let until = Instant::now() + MAX_READ_TIME;
    let mut tracked = TrackedCloseWait {
        entries: 0,
        complete: true,
        timeout: None,
    };
    for netns in &scan.namespaces {
        let counted = netns.within(|| {
            let (entries, complete) = conntrack::close_wait_entries(until).ok()?;
            let of_others = of_others(&entries);
            Some((of_others, complete, conntrack::close_wait_timeout()))
        });
        if let Ok(Some((of_others, complete, timeout))) = counted {
            tracked.entries += of_others;
            tracked.complete &= complete;
            tracked.timeout = tracked.timeout.max(timeout);
        }
    }
    scan.coverage.tracked = (tracked.entries > 0).then_some(tracked);
}

/// How many of `entries` have no end in the namespace of the calling thread.
fn of_others(entries: &[TrackedEnds]) -> usize {
    let place = |address| Place {
        address,
        interface: 0,
    };
    let places = entries.iter().flat_map(|ends| [ends.from, ends.to]);
    let elsewhere = routes::not_local(places.map(place));
    let is_of_others = |ends: &&TrackedEnds| {
        elsewhere.contains(&place(ends.from)) && elsewhere.contains(&place(ends.to))
    };
    entries.iter().filter(is_of_others).count()
}
