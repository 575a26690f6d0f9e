//! Finds the connections that are routed through this host, in conntrack.

use std::cmp::Reverse;
use std::collections::HashSet;
use std::net::IpAddr;

use anyhow::Context;

use crate::conntrack::client::ConntrackError;
use crate::conntrack::{self, Conntrack, Entry, Timeouts};
use crate::filter::forwarded::ForwardedSelectors;
use crate::model::{Forwarded, ForwardedAct, ForwardedScan, ForwardedSkip};
use crate::routes::{self, Place};

/// The connections of the network namespace of the calling thread that match.
///
/// # Errors
/// Conntrack or the routes cannot be read.
pub fn find(selectors: &ForwardedSelectors) -> anyhow::Result<ForwardedScan> {
    let mut conntrack = Conntrack::open()?;
    let mut entries = matching(selectors, &mut conntrack)?;
    let timeouts = conntrack::timeouts(&mut conntrack);
    // Those that the operator names, and that conntrack does not know.
    for [one, other] in &selectors.connections {
        let by_hand = Entry::by_hand(*one, *other);
        let is_known = |entry: &Entry| selectors.is_of_connection(entry, &[*one, *other]);
        if !entries.iter().any(is_known) {
            entries.push(by_hand);
        }
    }
    Ok(ForwardedScan {
        table_use: conntrack::table_use(),
        ..sort_out(entries, selectors, timeouts)?
    })
}

/// The entries that match, apart from their age, with those of connections that end on this host.
///
/// # Errors
/// Conntrack cannot be read.
pub fn matching(
    selectors: &ForwardedSelectors,
    conntrack: &mut Conntrack,
) -> Result<Vec<Entry>, ConntrackError> {
    let filter = selectors.dump_filter();
    let mut entries: Vec<Entry> = Vec::new();
    for ipv6 in selectors.families() {
        let keep = |entry: Entry| selectors.matches(&entry).then_some(entry);
        entries.extend(conntrack.dump(*ipv6, &filter, keep)?);
    }
    Ok(entries)
}

/// Those of the entries that are of forwarded connections, and old enough. The others are counted.
///
/// # Errors
/// The routes cannot be read.
pub fn sort_out(
    entries: Vec<Entry>,
    selectors: &ForwardedSelectors,
    timeouts: Timeouts,
) -> anyhow::Result<ForwardedScan> {
    let mut scan = ForwardedScan::default();
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

/// Leaves alone what `act` must not touch, and of the others all but the first `max_kills`.
pub fn limit(
    scan: &mut ForwardedScan,
    selectors: &ForwardedSelectors,
    act: ForwardedAct,
    max_kills: Option<usize>,
) {
    let mut left = max_kills.unwrap_or(usize::MAX);
    for connection in &mut scan.connections {
        let zone = connection.entry.zone.id;
        let is_named = act == ForwardedAct::Cut && selectors.zones.contains(&zone);
        connection.skip = match left {
            _ if selectors.finds_being_opened(&connection.entry) => {
                Some(ForwardedSkip::BeingOpened)
            }
            _ if zone != 0 && !is_named => Some(ForwardedSkip::OtherZone),
            0 => Some(ForwardedSkip::OverMaxKills),
            _ => {
                left -= 1;
                None
            }
        };
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conntrack::ConntrackState;
    use crate::conntrack::codec::Zone;

    #[test]
    fn what_an_act_must_not_touch_does_not_count_for_the_limit() {
        let example = Entry::example("10.0.0.1:5", "10.0.0.2:80");
        let opening = Entry {
            state: Some(ConntrackState::SynRecv),
            ..example.clone()
        };
        let in_zone = Entry {
            zone: Zone {
                id: 7,
                ..Zone::default()
            },
            ..example.clone()
        };
        let entries = [opening, in_zone, example.clone(), example];
        let codes = |act, selectors: &ForwardedSelectors, max_kills| -> Vec<&str> {
            let connections = entries.iter().cloned();
            let mut scan = ForwardedScan {
                connections: connections.map(|it| Forwarded::new(it, None)).collect(),
                ..ForwardedScan::default()
            };
            limit(&mut scan, selectors, act, max_kills);
            let skips = scan.connections.iter().map(|one| one.skip);
            skips
                .map(|skip| skip.map_or("none", ForwardedSkip::code))
                .collect()
        };
        let all = ForwardedSelectors::default();
        let [opening, zone, over] = ["being-opened", "other-zone", "over-max-kills"];
        let (probe, cut) = (ForwardedAct::Probe, ForwardedAct::Cut);
        for act in [probe, cut] {
            assert_eq!(codes(act, &all, None), [opening, zone, "none", "none"]);
            assert_eq!(codes(act, &all, Some(1)), [opening, zone, "none", over]);
        }
        let named = ForwardedSelectors {
            zones: [0, 7].into(),
            states: [ConntrackState::SynRecv, ConntrackState::Established].into(),
            ..ForwardedSelectors::default()
        };
        assert_eq!(codes(probe, &named, None), ["none", zone, "none", "none"]);
        assert_eq!(codes(cut, &named, Some(3)), ["none", "none", "none", over]);
    }
}
