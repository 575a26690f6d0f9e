//! Where this host forwards the packets of a connection to each of its ends. Pure: `lookup` asks the kernel.
//!
//! The kernel routes a packet to one end by the interface at which it has arrived (net/ipv4/route.c, ip_route_input_slow), among others:
//! rules of routing name interfaces, and an interface in a VRF has the table of that VRF. An entry of conntrack does not say at which
//! interfaces the packets of the ends arrive. But packets of an end arrive, as a rule, where those to it leave. So a pair of hops
//! is taken if each is the answer of the kernel for packets that arrive at the interface of the other. If different starts lead to
//! different pairs, nothing tells which is the right one.

use std::io;
use std::net::{IpAddr, SocketAddr};

use nix::errno::Errno;

use crate::sys::errno_of;

/// Why there is no path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoPath {
    #[error("there is no route to {0}")]
    NoRoute(IpAddr),
    #[error("the neighbour {0} does not answer ARP or neighbour discovery")]
    NoNeighbour(IpAddr),
    /// The routes of this host lead to other neighbours for other interfaces of arrival, or for other marks.
    #[error("several paths are possible")]
    Ambiguous,
    #[error("a policy of IPsec encrypts or drops its packets")]
    Ipsec,
    /// The kernel delivers packets to this end to this host.
    #[error("packets to {0} end on this host")]
    EndsHere(IpAddr),
    #[error("links, routes, neighbours or policies cannot be read: {}", crate::sys::os_error(.0))]
    Netlink(Errno),
}

impl From<io::Error> for NoPath {
    fn from(error: io::Error) -> Self {
        NoPath::Netlink(errno_of(&error))
    }
}

/// The next hop of packets to an end: the interface, and the address of the neighbour.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Hop {
    pub interface: u32,
    pub neighbour: IpAddr,
}

/// A question for the route of a packet of TCP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Question {
    pub to: SocketAddr,
    pub from: SocketAddr,
    pub origin: Origin,
    pub mark: u32,
}

/// Where a packet comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    /// It arrives at this interface. Then its source counts.
    Interface(u32),
    /// This host sends it.
    Host,
    /// This host sends it in this VRF.
    Vrf(u32),
}

/// The answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Route {
    To(Hop),
    /// To one of several hops, and nobody can tell which; or in another packet.
    Several,
    /// The kernel would deliver the packet to this host.
    Here,
    /// There is no route, or the kernel would drop the packet.
    None,
}

/// What of the routing of this host depends on more than addresses and ports.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Policy {
    /// Interfaces that rules name.
    pub interfaces: Vec<u32>,
    pub vrfs: Vec<u32>,
    /// Whether rules compare marks.
    pub by_mark: bool,
    /// All interfaces that are up.
    pub all: Vec<u32>,
    /// Whether the hop of a packet by a route with several ones is unknown.
    pub is_hash_unknown: bool,
}

/// Steps from a start to a pair of hops that fits.
const MAX_STEPS: usize = 4;
/// The interfaces and VRFs that are tried. With more, one that was left out could lead to another pair.
const MAX_STARTS: usize = 256;

/// The hops to both ends. `mark` is that of the entry of the connection: packets may have it too.
///
/// # Errors
/// [`NoPath`].
pub(super) fn hops(
    ends: [SocketAddr; 2],
    mark: u32,
    policy: &Policy,
    lookup: &mut dyn FnMut(Question) -> io::Result<Route>,
) -> Result<[Hop; 2], NoPath> {
    if policy.interfaces.len() + policy.vrfs.len() > MAX_STARTS {
        return Err(NoPath::Ambiguous);
    }
    let mut search = Search {
        ends,
        lookup,
        found: None,
        missing: None,
        here: None,
        is_unsteady: false,
    };
    // A mark of conntrack is, as a rule, that of the packets, or says nothing about them.
    let marks = [0, mark];
    let marks = &marks[..1 + usize::from(policy.by_mark && mark != 0)];
    for &mark in marks {
        for vrf in [None].into_iter().chain(policy.vrfs.iter().map(Some)) {
            let origin = vrf.map_or(Origin::Host, |vrf| Origin::Vrf(*vrf));
            search.start_from_routes(origin, mark)?;
        }
        for &interface in &policy.interfaces {
            search.start_at(interface, mark)?;
        }
    }
    if search.found.is_none() {
        if policy.all.len() > MAX_STARTS {
            return Err(NoPath::Ambiguous);
        }
        // The source alone may select a table.
        for &interface in &policy.all {
            search.start_at(interface, 0)?;
        }
    }
    search.result()
}

struct Search<'s> {
    ends: [SocketAddr; 2],
    lookup: &'s mut dyn FnMut(Question) -> io::Result<Route>,
    found: Option<[Hop; 2]>,
    /// An end to which there was no route.
    missing: Option<IpAddr>,
    /// An end that is this host.
    here: Option<IpAddr>,
    /// Whether no pair was found that fits, or several.
    is_unsteady: bool,
}

impl Search<'_> {
    fn result(self) -> Result<[Hop; 2], NoPath> {
        match (self.found, self.here) {
            _ if self.is_unsteady => Err(NoPath::Ambiguous),
            // The kernel may take its packets for its own, for example by a mark (a transparent proxy).
            (Some(_), Some(_)) => Err(NoPath::Ambiguous),
            (Some(hops), None) => Ok(hops),
            (None, Some(end)) => Err(NoPath::EndsHere(end)),
            (None, None) => Err(NoPath::NoRoute(self.missing.unwrap_or(self.ends[0].ip()))),
        }
    }

    /// Takes the interface of the route of this host to either end for the one where the packets of that end arrive.
    fn start_from_routes(&mut self, origin: Origin, mark: u32) -> io::Result<()> {
        for side in [0, 1] {
            if let Route::To(hop) = self.route(side, origin, mark)? {
                self.follow(side, hop.interface, mark)?;
            }
        }
        Ok(())
    }

    /// Takes `interface` for the one where the packets of either end arrive.
    fn start_at(&mut self, interface: u32, mark: u32) -> io::Result<()> {
        for side in [0, 1] {
            self.follow(side, interface, mark)?;
        }
        Ok(())
    }

    /// The packets of the end `side` may arrive at `interface`: looks for the pair of hops to which this leads.
    fn follow(&mut self, side: usize, interface: u32, mark: u32) -> io::Result<()> {
        let mut interface = interface;
        for _ in 0..MAX_STEPS {
            let Route::To(other) = self.route(1 - side, Origin::Interface(interface), mark)? else {
                return Ok(());
            };
            let origin = Origin::Interface(other.interface);
            let Route::To(back) = self.route(side, origin, mark)? else {
                return Ok(());
            };
            if back.interface == interface {
                let pair = if side == 0 {
                    [back, other]
                } else {
                    [other, back]
                };
                self.is_unsteady |= self.found.is_some_and(|found| found != pair);
                self.found = Some(pair);
                return Ok(());
            }
            interface = back.interface;
        }
        self.is_unsteady = true;
        Ok(())
    }

    /// The route to the end `side`.
    fn route(&mut self, side: usize, origin: Origin, mark: u32) -> io::Result<Route> {
        let (to, from) = (self.ends[side], self.ends[1 - side]);
        let question = Question {
            to,
            from,
            origin,
            mark,
        };
        let route = (self.lookup)(question)?;
        match route {
            Route::To(_) => {}
            Route::Several => self.is_unsteady = true,
            Route::Here => self.here = Some(to.ip()),
            Route::None => self.missing = Some(to.ip()),
        }
        Ok(route)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLIENT: &str = "10.9.1.2:40000";
    const SERVER: &str = "10.9.2.2:80";

    fn ends() -> [SocketAddr; 2] {
        [CLIENT.parse().unwrap(), SERVER.parse().unwrap()]
    }

    fn hop(interface: u32) -> Hop {
        Hop {
            interface,
            neighbour: ends()[0].ip(),
        }
    }

    /// The result with a kernel that answers as `answer`: with the interface of a hop, 0 for none.
    fn found(
        policy: &Policy,
        mark: u32,
        answer: impl Fn(bool, Origin, u32) -> u32,
    ) -> Result<[u32; 2], NoPath> {
        let mut lookup = |question: Question| {
            let is_client = question.to == ends()[0];
            Ok(match answer(is_client, question.origin, question.mark) {
                0 => Route::None,
                98 => Route::Several,
                99 => Route::Here,
                interface => Route::To(hop(interface)),
            })
        };
        let hops = hops(ends(), mark, policy, &mut lookup)?;
        Ok(hops.map(|hop| hop.interface))
    }

    #[test]
    fn a_plain_router_has_one_path() {
        let plain = |is_client, _, _| if is_client { 1 } else { 2 };
        assert_eq!(found(&Policy::default(), 7, plain), Ok([1, 2]));
    }

    #[test]
    fn the_route_of_arriving_packets_counts() {
        // ECMP: the routes of this host have another hash.
        let ecmp = |is_client, origin, _| match (is_client, origin) {
            (true, _) => 1,
            (false, Origin::Host) => 2,
            (false, _) => 3,
        };
        assert_eq!(found(&Policy::default(), 0, ecmp), Ok([1, 3]));
        let unknown = |is_client, _, _| if is_client { 1 } else { 98 };
        let found = found(&Policy::default(), 0, unknown);
        assert_eq!(found, Err(NoPath::Ambiguous));
    }

    #[test]
    fn a_missing_end_is_said() {
        let no_server = |is_client, _, _| u32::from(is_client);
        let expected = Err(NoPath::NoRoute(ends()[1].ip()));
        assert_eq!(found(&Policy::default(), 0, no_server), expected);
        let here = |is_client, _, _| if is_client { 1 } else { 99 };
        let expected = Err(NoPath::EndsHere(ends()[1].ip()));
        assert_eq!(found(&Policy::default(), 0, here), expected);
    }

    #[test]
    fn tables_by_interface_are_found() {
        // Only packets between the interfaces 1 and 2 have routes, in a table that rules or the source name.
        let table = |is_client, origin, _| match origin {
            Origin::Interface(1 | 2) if is_client => 1,
            Origin::Interface(1 | 2) => 2,
            _ => 0,
        };
        for policy in [
            Policy {
                interfaces: vec![2],
                ..Policy::default()
            },
            Policy {
                all: vec![3, 4, 1],
                ..Policy::default()
            },
        ] {
            assert_eq!(found(&policy, 0, table), Ok([1, 2]));
        }
        let missing = found(&Policy::default(), 0, table);
        assert!(matches!(missing, Err(NoPath::NoRoute(_))));
    }

    #[test]
    fn with_two_paths_none_is_taken() {
        // Both networks are also in a VRF, with the interfaces 3 and 4.
        let twice = |is_client, origin, _| match origin {
            Origin::Vrf(9) | Origin::Interface(3 | 4) if is_client => 3,
            Origin::Vrf(9) | Origin::Interface(3 | 4) => 4,
            _ if is_client => 1,
            _ => 2,
        };
        let policy = Policy {
            vrfs: vec![9],
            ..Policy::default()
        };
        assert_eq!(found(&policy, 0, twice), Err(NoPath::Ambiguous));
        assert_eq!(found(&Policy::default(), 0, twice), Ok([1, 2]));
        // The packets of the client may have the mark.
        let marked = |is_client, _, mark| match (is_client, mark) {
            (true, _) => 1,
            (false, 5) => 3,
            (false, _) => 2,
        };
        let policy = Policy {
            by_mark: true,
            ..Policy::default()
        };
        assert_eq!(found(&policy, 5, marked), Err(NoPath::Ambiguous));
        assert_eq!(found(&policy, 6, marked), Ok([1, 2]));
        assert_eq!(found(&Policy::default(), 5, marked), Ok([1, 2]));
    }

    /// A transparent proxy: packets with the mark end on this host.
    #[test]
    fn with_a_path_that_ends_here_none_is_taken() {
        let diverted = |is_client, _, mark| match (is_client, mark) {
            (_, 5) => 99,
            (true, _) => 1,
            (false, _) => 2,
        };
        let policy = Policy {
            by_mark: true,
            ..Policy::default()
        };
        assert_eq!(found(&policy, 5, diverted), Err(NoPath::Ambiguous));
        assert_eq!(found(&policy, 6, diverted), Ok([1, 2]));
    }

    #[test]
    fn with_more_interfaces_than_are_tried_none_is_taken() {
        let many: Vec<u32> = (1..).take(MAX_STARTS + 1).collect();
        let plain = |is_client, _, _| if is_client { 1 } else { 2 };
        let nowhere = |_, _, _| 0;
        let of_all = Policy {
            all: many.clone(),
            ..Policy::default()
        };
        assert_eq!(found(&of_all, 0, plain), Ok([1, 2]));
        assert_eq!(found(&of_all, 0, nowhere), Err(NoPath::Ambiguous));
        let named = Policy {
            interfaces: many,
            ..Policy::default()
        };
        assert_eq!(found(&named, 0, plain), Err(NoPath::Ambiguous));
    }

    #[test]
    fn routes_that_never_fit_are_not_taken() {
        // To the client by 1 if the other end is at 2, and by 3 otherwise; to the server the other way round.
        let turning = |is_client, origin, _| match (is_client, origin) {
            (true, Origin::Interface(4)) => 1,
            (true, _) => 3,
            (false, Origin::Interface(1)) => 2,
            (false, _) => 4,
        };
        let result = found(&Policy::default(), 0, turning);
        assert_eq!(result, Err(NoPath::Ambiguous));
    }
}
