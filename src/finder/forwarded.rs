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
use crate::sock_diag::codec::DumpRequest;
use crate::sock_diag::{DumpError, Family, SockDiag};
use crate::tcp::{StateSet, Tuple};

/// The connections of the network namespace of the calling thread that match.
///
/// # Errors
/// Conntrack or the routes cannot be read.
pub fn find(selectors: &ForwardedSelectors) -> anyhow::Result<ForwardedScan> {
    let mut conntrack = Conntrack::open()?;
    let mut found = each_matching(selectors, &mut conntrack, |it| Forwarded::new(it, None))?;
    let timeouts = conntrack::timeouts(&mut conntrack);
    // Those that the operator names, and that conntrack does not know.
    for [one, other] in &selectors.connections {
        let by_hand = Entry::by_hand(*one, *other);
        let is_known = |it: &Forwarded| selectors.is_of_connection(&it.entry, &[*one, *other]);
        if !found.iter().any(is_known) {
            found.push(Forwarded::new(by_hand, None));
        }
    }
    Ok(ForwardedScan {
        table_use: conntrack::table_use(),
        ..sort_out(found, selectors, timeouts)?
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
    each_matching(selectors, conntrack, |entry| entry)
}

fn each_matching<T>(
    selectors: &ForwardedSelectors,
    conntrack: &mut Conntrack,
    make: impl Fn(Entry) -> T,
) -> Result<Vec<T>, ConntrackError> {
    let filter = selectors.dump_filter();
    let mut found = Vec::new();
    for ipv6 in selectors.families() {
        conntrack.dump(*ipv6, &filter, &mut found, |entry| {
            let matches = selectors.matches(&entry);
            matches.then(|| make(entry))
        })?;
    }
    Ok(found)
}

/// Those of the connections that are forwarded, and old enough. The others are counted.
///
/// # Errors
/// The routes or the sockets cannot be read.
pub fn sort_out(
    mut found: Vec<Forwarded>,
    selectors: &ForwardedSelectors,
    timeouts: Timeouts,
) -> anyhow::Result<ForwardedScan> {
    let mut scan = ForwardedScan::default();
    let elsewhere = routes::each_not_local(ends(&found))
        .context("cannot ask the kernel which addresses are of this host")?;
    let sockets = match found.is_empty() {
        true => Some(HashSet::new()),
        false => own_sockets().context("cannot list the sockets of this host")?,
    };
    scan.are_sockets_unknown = sockets.is_none();
    let sockets = sockets.unwrap_or_default();
    // In place: a table can have a million entries.
    found.retain_mut(|connection| {
        let ends_here = connection
            .views()
            .iter()
            .any(|view| !elsewhere.contains(&place(view.local.ip())) || sockets.contains(view));
        connection.quiet = timeouts.quiet(&connection.entry);
        let is_too_young = selectors.finds_too_young(connection.quiet);
        if ends_here {
            scan.ends_here += 1;
        } else if is_too_young && connection.quiet.is_some() {
            scan.younger += 1;
        } else if is_too_young {
            scan.of_unknown_age += 1;
        }
        !ends_here && !is_too_young
    });
    scan.connections = found;
    // The connections whose last packet is unknown come last.
    scan.connections
        .sort_unstable_by_key(|one| (Reverse(one.quiet), one.entry.original));
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
            _ if scan.are_sockets_unknown => Some(ForwardedSkip::SocketsUnknown),
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

/// The addresses of the connected sockets of this host. A transparent proxy has sockets with addresses of other hosts, so that conntrack shows
/// its connections like forwarded ones. `None`: this kernel cannot list sockets.
///
/// All are listed, instead of looked up by their addresses: one that is bound to an interface or a VRF is only found by that.
fn own_sockets() -> anyhow::Result<Option<HashSet<Tuple>>> {
    let mut diag = match SockDiag::open() {
        Ok(diag) => diag,
        // The kernel has no module sock_diag.
        Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let mut found = HashSet::new();
    // An IPv6 socket can have a connection of IPv4.
    for family in [Family::V4, Family::V6] {
        let request = DumpRequest::plain(family, StateSet::ALL);
        let listed = diag.dump(&request, |socket| {
            let tuple = socket.id.tuple();
            (tuple.peer.port() != 0).then_some(tuple)
        });
        match listed {
            Ok(tuples) => found.extend(tuples),
            // The kernel has no module tcp_diag.
            Err(DumpError::Io(error)) if error.raw_os_error() == Some(libc::ENOENT) => {
                return Ok(None);
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(Some(found))
}

/// The addresses of the ends of the connections, after NAT.
fn ends(connections: &[Forwarded]) -> HashSet<Place> {
    let ends = connections.iter().flat_map(Forwarded::end_addresses);
    ends.map(|end| place(end.ip())).collect()
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

    /// The connection may be of a transparent proxy on this host.
    #[test]
    fn without_a_list_of_sockets_nothing_is_acted_on() {
        let mut scan = ForwardedScan {
            connections: vec![Forwarded::new(
                Entry::example("10.0.0.1:5", "10.0.0.2:80"),
                None,
            )],
            are_sockets_unknown: true,
            ..ForwardedScan::default()
        };
        for act in [ForwardedAct::Probe, ForwardedAct::Cut] {
            limit(&mut scan, &ForwardedSelectors::default(), act, None);
            let skip = scan.connections[0].skip;
            assert_eq!(skip, Some(ForwardedSkip::SocketsUnknown));
        }
    }
}
