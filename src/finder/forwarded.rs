//! Finds the connections that are routed through this host, in conntrack.

use std::cmp::Reverse;
use std::collections::HashSet;
use std::net::IpAddr;

use anyhow::Context;

use crate::conntrack::{self, Conntrack, Entry};
use crate::filter::forwarded::ForwardedSelectors;
use crate::model::{Forwarded, ForwardedScan, ForwardedSkip};
use crate::routes::{self, Place};

/// The connections of the network namespace of the calling thread that match.
///
/// # Errors
/// Conntrack or the routes cannot be read.
pub fn find(selectors: &ForwardedSelectors) -> anyhow::Result<ForwardedScan> {
    let mut conntrack = Conntrack::open()?;
    let filter = selectors.dump_filter();
    let mut entries: Vec<Entry> = Vec::new();
    for ipv6 in selectors.families() {
        let keep = |entry: Entry| selectors.matches(&entry).then_some(entry);
        entries.extend(conntrack.dump(*ipv6, &filter, keep)?);
    }
    let timeouts = conntrack::timeouts(&mut conntrack);
    let mut scan = ForwardedScan {
        table_use: conntrack::table_use(),
        ..ForwardedScan::default()
    };
    // Those that the operator names, and that conntrack does not know.
    for [one, other] in &selectors.connections {
        let by_hand = Entry::by_hand(*one, *other);
        let is_known = |entry: &Entry| selectors.is_of_connection(entry, &[*one, *other]);
        if !entries.iter().any(is_known) {
            entries.push(by_hand);
        }
    }
    let elsewhere = routes::each_not_local(ends(&entries))
        .context("cannot ask the kernel which addresses are of this host")?;
    for entry in entries {
        let is_elsewhere = |address: IpAddr| elsewhere.contains(&place(address));
        let quiet = timeouts.quiet(&entry);
        if !is_elsewhere(entry.original.local.ip()) || !is_elsewhere(entry.reply.local.ip()) {
            scan.ends_here += 1;
        } else if !selectors.finds_too_young(quiet) {
            scan.connections.push(Forwarded::new(entry, quiet));
        } else if quiet.is_some() {
            scan.younger += 1;
        } else {
            scan.of_unknown_age += 1;
        }
    }
    // The connections whose last packet is unknown come last.
    scan.connections
        .sort_by_key(|one| (Reverse(one.quiet), one.entry.original));
    scan.timeouts = timeouts;
    Ok(scan)
}

/// Leaves alone all but the first `max_kills`.
pub fn limit(scan: &mut ForwardedScan, max_kills: Option<usize>) {
    let first = max_kills.unwrap_or(usize::MAX);
    for connection in scan.connections.iter_mut().skip(first) {
        connection.skip = Some(ForwardedSkip::OverMaxKills);
    }
}

/// The addresses of the ends of the connections, after NAT.
fn ends(entries: &[Entry]) -> HashSet<Place> {
    let ends = entries.iter();
    let ends = ends.flat_map(|entry| [entry.original.local.ip(), entry.reply.local.ip()]);
    ends.map(place).collect()
}

fn place(address: IpAddr) -> Place {
    Place {
        address,
        interface: 0,
    }
}
