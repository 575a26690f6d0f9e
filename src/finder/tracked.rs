//! What the conntrack tables tell: how many connections between other hosts are in CLOSE-WAIT, because this host is their router, NAT
//! node or mesh, so that they are not sockets of this host; and which addresses NAT has changed.

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::conntrack::{self, TrackedEnds, TranslatedConnection};
use crate::model::{Scan, TrackedCloseWait};
use crate::proc::netns::Netns;
use crate::routes::{self, Place};
use crate::tcp::Tuple;

/// The maximum time for reading the tables of all namespaces together: a note about them is not worth a longer wait.
const MAX_READ_TIME: Duration = Duration::from_millis(200);
/// As [`MAX_READ_TIME`], for the NAT of stuck connections.
const MAX_TRANSLATION_TIME: Duration = Duration::from_secs(1);

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
            let part = conntrack::close_wait_entries(until).ok()?;
            let (of_others, all_asked) = of_others(&part.entries);
            let complete = part.complete && all_asked;
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

/// How many of `entries` have no end in the namespace of the calling thread, and whether cwkill asked about all their addresses. What it
/// did not ask about is not counted.
fn of_others(entries: &[TrackedEnds]) -> (usize, bool) {
    let place = |address| Place {
        address,
        interface: 0,
    };
    let addresses: HashSet<IpAddr> = entries
        .iter()
        .flat_map(|ends| [ends.from, ends.to])
        .collect();
    let all_asked = addresses.len() <= routes::MAX_PLACES;
    let elsewhere = routes::not_local(addresses.into_iter().map(place));
    let is_of_others = |ends: &&TrackedEnds| {
        elsewhere.contains(&place(ends.from)) && elsewhere.contains(&place(ends.to))
    };
    (entries.iter().filter(is_of_others).count(), all_asked)
}

/// The connections of which NAT in one of `namespaces` changes an address, and of which an end sees one of the `wanted` pairs.
///
/// At most `MAX_TRANSLATION_TIME` is spent. A table that cannot be read to its end counts as empty, because what is missing may
/// contradict.
pub fn translated(namespaces: &[Arc<Netns>], wanted: &HashSet<Tuple>) -> Vec<TranslatedConnection> {
    let until = Instant::now() + MAX_TRANSLATION_TIME;
    let is_wanted = |connection: &TranslatedConnection| {
        wanted.contains(&connection.opener) || wanted.contains(&connection.answerer)
    };
    let mut all = Vec::new();
    for netns in namespaces {
        let read = netns.within(|| conntrack::translated_connections(until, is_wanted));
        if let Ok(Ok(part)) = read
            && part.complete
        {
            all.extend(part.entries);
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn between(from: [u8; 4], to: [u8; 4]) -> TrackedEnds {
        TrackedEnds {
            from: from.into(),
            to: to.into(),
        }
    }

    #[test]
    fn more_addresses_than_are_asked_about_are_not_a_complete_count() {
        // Networks of the documentation (RFC 5737), which no host has.
        let elsewhere = [192, 0, 2, 7];
        let entries = [
            between(elsewhere, [198, 51, 100, 7]),
            between(elsewhere, [127, 0, 0, 1]),
        ];
        assert_eq!(of_others(&entries), (1, true));
        let many = (0..=u16::try_from(routes::MAX_PLACES).unwrap()).map(|number| {
            let [high, low] = number.to_be_bytes();
            between(elsewhere, [198, 18, high, low])
        });
        let many: Vec<TrackedEnds> = many.collect();
        let (counted, all_asked) = of_others(&many);
        assert!(!all_asked && counted <= routes::MAX_PLACES);
    }
}
