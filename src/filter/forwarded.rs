//! The selectors of connections that are routed through this host, as a pure predicate over entries of conntrack.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use ipnet::IpNet;

use super::SocketFacts;
use super::selectors::{IpVersion, Selectors, in_networks};
use crate::conntrack::{ConntrackState, DumpFilter, Entry};
use crate::sock_diag::Family;
use crate::tcp::TcpState;

/// A connection matches if it matches every selector. It matches a selector if it matches one of the values. A selector without values
/// matches every connection.
#[derive(Clone, Debug, Default)]
pub struct ForwardedSelectors {
    /// Ports, addresses, the IP version, the expression and the minimum age. Local is the source of the original direction: the end that
    /// has opened the connection.
    pub original: Selectors,
    /// Networks of any of its addresses, before or after NAT.
    pub hosts: Vec<IpNet>,
    /// Networks of the address that NAT gives to the source.
    pub nat_sources: Vec<IpNet>,
    /// Networks of the address that NAT gives to the destination.
    pub nat_destinations: Vec<IpNet>,
    pub marks: Vec<Mark>,
    pub zones: BTreeSet<u16>,
    pub states: BTreeSet<ConntrackState>,
    /// The addresses of the two ends of connections, as one of the ends sees them.
    pub connections: Vec<[SocketAddr; 2]>,
}

/// A mark of conntrack, of which only the bits of the mask count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark {
    pub value: u32,
    pub mask: u32,
}

impl Mark {
    fn matches(self, mark: u32) -> bool {
        mark & self.mask == self.value & self.mask
    }
}

impl ForwardedSelectors {
    /// Whether a connection matches, apart from its age.
    pub fn matches(&self, entry: &Entry) -> bool {
        let addresses = [
            entry.original.local,
            entry.original.peer,
            entry.reply.local,
            entry.reply.peer,
        ];
        let is_host = |host: &IpNet| addresses.iter().any(|address| host.contains(&address.ip()));
        let is_new = |address: Option<SocketAddr>, networks: &[IpNet]| {
            networks.is_empty()
                || address.is_some_and(|address| in_networks(networks, address.ip()))
        };
        let is_of = |connection: &[SocketAddr; 2]| self.is_of_connection(entry, connection);
        (self.connections.is_empty() || self.connections.iter().any(is_of))
            && self.original.match_addresses(&facts(entry))
            && (self.hosts.is_empty() || self.hosts.iter().any(is_host))
            && is_new(entry.nat_source(), &self.nat_sources)
            && is_new(entry.nat_destination(), &self.nat_destinations)
            && (self.marks.is_empty() || {
                let mark = entry.mark.unwrap_or(0);
                self.marks.iter().any(|selected| selected.matches(mark))
            })
            && (self.zones.is_empty() || self.zones.contains(&entry.zone.id))
            && (self.states.is_empty()
                || entry
                    .state
                    .is_some_and(|state| self.states.contains(&state)))
    }

    /// Whether an end of a connection sees these two addresses, in any order.
    pub fn is_of_connection(&self, entry: &Entry, [one, other]: &[SocketAddr; 2]) -> bool {
        [entry.original, entry.reply].iter().any(|seen| {
            let seen = [seen.local, seen.peer];
            seen == [*one, *other] || seen == [*other, *one]
        })
    }

    /// Whether a connection is left alone because its last packet is younger than `--min-age`, or its time is unknown.
    pub fn finds_too_young(&self, quiet: Option<Duration>) -> bool {
        self.original.finds_age_too_young(quiet)
    }

    /// Whether a connection is left alone because it is being opened, and `--conntrack-state` does not name that.
    pub fn finds_being_opened(&self, entry: &Entry) -> bool {
        self.states.is_empty() && entry.state.is_some_and(ConntrackState::is_being_opened)
    }

    /// The families to list: whether IPv6.
    pub fn families(&self) -> &'static [bool] {
        match self.original.ip_version {
            None => &[false, true],
            Some(IpVersion::V4) => &[false],
            Some(IpVersion::V6) => &[true],
        }
    }

    /// What the kernel can compare: the selectors with a single value. It lets every connection through that matches.
    pub fn dump_filter(&self) -> DumpFilter {
        let address = |networks: &[IpNet]| -> Option<IpAddr> {
            match networks {
                [one] if one.prefix_len() == one.max_prefix_len() => Some(one.addr()),
                _ => None,
            }
        };
        let port = |ranges: &[std::ops::RangeInclusive<u16>]| match ranges {
            [one] if one.start() == one.end() => Some(*one.start()),
            _ => None,
        };
        let selected = &self.original;
        DumpFilter {
            mark: match self.marks[..] {
                [Mark { value, mask }] => Some((value, mask)),
                _ => None,
            },
            source: address(&selected.local),
            destination: address(&selected.peer),
            source_port: port(&selected.ports),
            destination_port: port(&selected.peer_ports),
            reply_source: address(&self.nat_destinations),
            reply_destination: address(&self.nat_sources),
            zone: match self.zones.len() {
                1 => self.zones.first().copied(),
                _ => None,
            },
        }
    }
}

/// The facts that an expression can use. The configuration refuses expressions about states, interfaces and cgroups.
fn facts(entry: &Entry) -> SocketFacts {
    SocketFacts {
        family: match entry.original.local.is_ipv4() {
            true => Family::V4,
            false => Family::V6,
        },
        tuple: entry.original,
        state: TcpState::Established,
        interface: 0,
        cgroup: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conntrack::codec::{Zone, ZoneDirection};
    use crate::filter::{Services, parse};
    use crate::tcp::Tuple;

    /// 10.9.1.2:40000 has opened a connection to 192.0.2.80:80, which is 10.9.2.2:8080, and which sees 10.9.2.1:50000.
    fn entry() -> Entry {
        Entry {
            reply: Tuple {
                local: "10.9.2.2:8080".parse().unwrap(),
                peer: "10.9.2.1:50000".parse().unwrap(),
            },
            mark: Some(0x0203),
            zone: Zone {
                id: 7,
                direction: ZoneDirection::Both,
            },
            ..Entry::example("10.9.1.2:40000", "192.0.2.80:80")
        }
    }

    fn matches(change: impl FnOnce(&mut ForwardedSelectors)) -> bool {
        let mut selectors = ForwardedSelectors::default();
        change(&mut selectors);
        selectors.matches(&entry())
    }

    fn nets(text: &str) -> Vec<IpNet> {
        text.split(',').map(|net| net.parse().unwrap()).collect()
    }

    #[test]
    fn ports_addresses_and_expressions_mean_the_original_direction() {
        assert!(matches(|_| {}));
        assert!(matches(|s| s.original.local = nets("10.9.1.0/24")));
        assert!(!matches(|s| s.original.local = nets("10.9.2.1/32")));
        assert!(matches(|s| s.original.peer = nets("192.0.2.80/32")));
        assert!(!matches(|s| s.original.peer = nets("10.9.2.2/32")));
        assert!(matches(|s| s.original.peer_ports = vec![80..=80]));
        assert!(!matches(|s| s.original.peer_ports = vec![8080..=8080]));
        assert!(!matches(|s| s.original.ports = vec![50_000..=50_000]));
        assert!(!matches(|s| s.original.ip_version = Some(IpVersion::V6)));
        let expression = |text: &str| {
            let parsed = parse(text, &Services::from_text("")).unwrap();
            matches(|s| s.original.expression = parsed.expression)
        };
        assert!(expression("src 10.9.1.2 and dport = :80"));
        assert!(!expression("dport = :8080"));
        assert!(!expression("dst 10.9.2.2"));
    }

    #[test]
    fn a_host_is_either_end_before_or_after_nat() {
        for host in [
            "10.9.1.2/32",
            "192.0.2.80/32",
            "10.9.2.2/32",
            "10.9.2.1/32",
            "10.9.0.0/16",
        ] {
            assert!(matches(|s| s.hosts = nets(host)), "{host}");
        }
        assert!(!matches(|s| s.hosts = nets("10.9.3.0/24,fd00::/8")));
        assert!(matches(|s| s.hosts = nets("10.9.3.0/24,10.9.2.2/32")));
    }

    #[test]
    fn an_address_of_nat_is_one_that_nat_has_set() {
        assert!(matches(|s| s.nat_sources = nets("10.9.2.1/32")));
        assert!(!matches(|s| s.nat_sources = nets("10.9.1.2/32")));
        assert!(matches(|s| s.nat_destinations = nets("10.9.2.0/24")));
        assert!(!matches(|s| s.nat_destinations = nets("192.0.2.80/32")));
        let mut selectors = ForwardedSelectors::default();
        let routed = Entry::example("10.9.1.2:4", "10.9.2.2:80");
        assert!(selectors.matches(&routed));
        selectors.nat_sources = nets("0.0.0.0/0");
        assert!(!selectors.matches(&routed));
    }

    #[test]
    fn marks_count_under_their_masks() {
        let mark = |value, mask| matches(|s| s.marks = vec![Mark { value, mask }]);
        assert!(mark(0x0203, u32::MAX) && !mark(3, u32::MAX));
        assert!(mark(3, 0xff) && mark(0x0103, 0xff) && !mark(2, 0xff));
        let without = Entry {
            mark: None,
            ..entry()
        };
        let selectors = ForwardedSelectors {
            marks: vec![Mark {
                value: 0,
                mask: u32::MAX,
            }],
            ..ForwardedSelectors::default()
        };
        assert!(selectors.matches(&without) && !selectors.matches(&entry()));
    }

    #[test]
    fn zones_and_states_are_lists() {
        assert!(matches(|s| s.zones = [1, 7].into()));
        assert!(!matches(|s| s.zones = [0].into()));
        use ConntrackState::{CloseWait, Established};
        assert!(matches(|s| s.states = [CloseWait, Established].into()));
        assert!(!matches(|s| s.states = [CloseWait].into()));
        let unknown = Entry {
            state: None,
            ..entry()
        };
        let selectors = ForwardedSelectors {
            states: [Established].into(),
            ..ForwardedSelectors::default()
        };
        assert!(!selectors.matches(&unknown));
    }

    #[test]
    fn what_is_being_opened_must_be_named() {
        use ConntrackState::{CloseWait, Established, SynRecv, SynSent, SynSent2};
        let of = |state| Entry {
            state: Some(state),
            ..entry()
        };
        let mut selectors = ForwardedSelectors::default();
        for state in [SynSent, SynRecv, SynSent2] {
            assert!(selectors.finds_being_opened(&of(state)));
        }
        for state in [Established, CloseWait] {
            assert!(!selectors.finds_being_opened(&of(state)));
        }
        selectors.states = [SynRecv].into();
        assert!(!selectors.finds_being_opened(&of(SynRecv)));
    }

    #[test]
    fn a_connection_is_named_as_one_of_its_ends_sees_it() {
        let named = |one: &str, other: &str| {
            matches(|s| s.connections = vec![[one.parse().unwrap(), other.parse().unwrap()]])
        };
        assert!(named("10.9.1.2:40000", "192.0.2.80:80"));
        assert!(named("192.0.2.80:80", "10.9.1.2:40000"));
        assert!(named("10.9.2.1:50000", "10.9.2.2:8080"));
        assert!(!named("10.9.1.2:40000", "10.9.2.2:8080"));
        assert!(!named("10.9.1.2:40001", "192.0.2.80:80"));
    }

    #[test]
    fn an_unknown_time_is_never_long_enough() {
        let mut selectors = ForwardedSelectors::default();
        assert!(!selectors.finds_too_young(None));
        selectors.original.min_age = Duration::from_secs(60);
        assert!(selectors.finds_too_young(None));
        assert!(selectors.finds_too_young(Some(Duration::from_secs(59))));
        assert!(!selectors.finds_too_young(Some(Duration::from_secs(60))));
    }

    #[test]
    fn the_kernel_compares_single_values_only() {
        let mut selectors = ForwardedSelectors::default();
        assert_eq!(selectors.dump_filter(), DumpFilter::default());
        assert_eq!(selectors.families(), [false, true]);
        selectors.original.local = nets("10.9.1.2/32");
        selectors.original.peer = nets("10.9.2.0/24");
        selectors.original.peer_ports = vec![80..=80];
        selectors.original.ports = vec![1..=9];
        selectors.marks = vec![Mark { value: 1, mask: 3 }];
        selectors.nat_sources = nets("10.9.2.1/32");
        selectors.nat_destinations = nets("10.9.3.1/32");
        selectors.zones = [7].into();
        let expected = DumpFilter {
            mark: Some((1, 3)),
            source: Some("10.9.1.2".parse().unwrap()),
            destination_port: Some(80),
            reply_source: Some("10.9.3.1".parse().unwrap()),
            reply_destination: Some("10.9.2.1".parse().unwrap()),
            zone: Some(7),
            ..DumpFilter::default()
        };
        assert_eq!(selectors.dump_filter(), expected);
        selectors.nat_sources.clear();
        selectors.nat_destinations.clear();
        selectors.zones.insert(8);
        selectors.original.local = nets("10.9.1.2/32,10.9.1.3/32");
        selectors.original.peer_ports = vec![80..=80, 443..=443];
        selectors.marks.push(Mark { value: 2, mask: 3 });
        assert_eq!(selectors.dump_filter(), DumpFilter::default());
        selectors.original.ip_version = Some(IpVersion::V6);
        assert_eq!(selectors.families(), [true]);
    }
}
