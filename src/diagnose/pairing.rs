//! Which socket is the other end of a stuck one, and which connection is the other leg of a proxy's pair. Pure.

use std::collections::HashMap;
use std::net::SocketAddr;

use strum::IntoStaticStr;

use crate::finder::connections::Connection;
use crate::model::Socket;
use crate::sock_diag::Cookie;
use crate::tcp::{StateSet, TcpState, Tuple};

/// A socket of a scan: the index of its namespace, and its cookie.
pub type ScannedSocket = (usize, Cookie);

/// The other ends of connections that belong to one process and are in one state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OtherEnd {
    pub owner: EndOwner,
    pub state: TcpState,
    pub known_by: KnownBy,
    pub count: usize,
}

/// How it is known that a socket is the other end of another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, IntoStaticStr)]
#[strum(serialize_all = "kebab-case")]
pub enum KnownBy {
    /// It has the reversed pair of addresses.
    Addresses,
    /// NAT changes an address between the two, and conntrack has both pairs.
    Conntrack,
    /// NAT changes an address between the two. The other address, the last segment and the bytes agree, and those of no other socket.
    LastSegment,
}

impl KnownBy {
    /// The code in JSON.
    pub fn code(self) -> &'static str {
        self.into()
    }
}

/// Who has the socket at the other end.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum EndOwner {
    Process {
        pid: i32,
        comm: String,
        /// Its descriptor; `None` for several ends.
        fd: Option<i32>,
    },
    /// It has a descriptor, in a process that cwkill does not know.
    Unknown,
    /// Its process has closed it.
    Orphan,
}

/// The other legs of a process that have one peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OtherLeg {
    pub peer: SocketAddr,
    pub count: usize,
    /// The bytes that this peer has not acknowledged, of all of them.
    pub send_q: u64,
}

/// One connection of a process, to find legs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leg {
    pub peer: SocketAddr,
    /// A process listens at its local port.
    pub is_accepted: bool,
    pub send_q: u32,
}

/// The states that the other end of a socket in one of `states` can have. The end of one in CLOSE-WAIT has sent a FIN and got none.
pub fn states_of_ends(states: impl Iterator<Item = TcpState>) -> StateSet {
    let after_fin = StateSet::from_iter([TcpState::FinWait1, TcpState::FinWait2]);
    let connected = StateSet::from_iter([
        TcpState::Established,
        TcpState::CloseWait,
        TcpState::LastAck,
        TcpState::Closing,
    ]);
    states.fold(StateSet::EMPTY, |set, state| match state {
        TcpState::CloseWait => set.union(after_fin),
        TcpState::Listen => set,
        _ => set.union(after_fin).union(connected),
    })
}

/// The other end of each of `sockets`, among `connections`: the socket with the pair of addresses that `pair_of_end` gives for it. Without
/// NAT that is the reversed pair.
///
/// Other namespaces can have the same addresses. So a socket of the same namespace comes first. Loopback addresses do not leave
/// the namespace. If several sockets are possible, none is taken.
pub fn other_ends<'s, 'c>(
    sockets: impl Iterator<Item = &'s Socket>,
    connections: &'c [Connection],
    pair_of_end: impl Fn(&Socket) -> Option<Tuple>,
) -> HashMap<ScannedSocket, &'c Connection> {
    let mut by_tuple: HashMap<Tuple, Vec<&Connection>> = HashMap::new();
    for connection in connections {
        let same = by_tuple.entry(connection.tuple()).or_default();
        same.push(connection);
    }
    let other_end = |socket: &Socket| {
        let pair = pair_of_end(socket)?;
        let possible = by_tuple.get(&pair)?;
        // A socket can be connected to itself.
        let is_itself = |end: &Connection| end.cookie() == socket.cookie();
        let others = || possible.iter().copied().filter(|end| !is_itself(end));
        let is_here = |end: &&Connection| end.netns == socket.netns;
        if others().any(|end| is_here(&end)) {
            return only(others().filter(is_here));
        }
        let Tuple { local, peer } = socket.tuple();
        let addresses = [local, peer, pair.local, pair.peer];
        match addresses.iter().any(|address| address.ip().is_loopback()) {
            true => None,
            false => only(others()),
        }
    };
    sockets
        .filter_map(|socket| Some((key(socket), other_end(socket)?)))
        .collect()
}

/// See [`ScannedSocket`].
pub fn key(socket: &Socket) -> ScannedSocket {
    (socket.netns, socket.cookie())
}

fn only<T>(mut values: impl Iterator<Item = T>) -> Option<T> {
    let first = values.next()?;
    values.next().is_none().then_some(first)
}

/// Counts `ends` by process, state and how they are known, the most frequent first.
pub fn count(ends: impl Iterator<Item = OtherEnd>) -> Vec<OtherEnd> {
    let mut counts: HashMap<(EndOwner, u8, KnownBy), OtherEnd> = HashMap::new();
    for mut end in ends {
        let descriptor = end.owner.take_fd();
        let key = (end.owner.clone(), end.state.number(), end.known_by);
        match counts.get_mut(&key) {
            Some(known) => {
                known.count += end.count;
                known.owner.take_fd();
            }
            None => {
                end.owner.set_fd(descriptor);
                counts.insert(key, end);
            }
        }
    }
    let mut counts: Vec<OtherEnd> = counts.into_values().collect();
    counts.sort_by(|a, b| {
        let by_count = b.count.cmp(&a.count);
        let by_owner = || a.owner.cmp(&b.owner);
        let by_state = || a.state.number().cmp(&b.state.number());
        let by_way = || a.known_by.cmp(&b.known_by);
        by_count
            .then_with(by_owner)
            .then_with(by_state)
            .then_with(by_way)
    });
    counts
}

impl EndOwner {
    fn take_fd(&mut self) -> Option<i32> {
        match self {
            EndOwner::Process { fd, .. } => fd.take(),
            EndOwner::Unknown | EndOwner::Orphan => None,
        }
    }

    fn set_fd(&mut self, number: Option<i32>) {
        if let EndOwner::Process { fd, .. } = self {
            *fd = number;
        }
    }
}

/// The connections that a process with bytes for their peers keeps for its sockets in CLOSE-WAIT: `stuck` are all that it has, and
/// `stalled` all its connections whose peers have acknowledged nothing between the two scans. The peers with the most come first.
///
/// cwkill cannot see which of them belong together. So it names them only if there are as many of one as of the other, and all of
/// one kind were accepted and all of the other were opened by the process. A slow download beside a leak is not a pair.
pub fn other_legs(stuck: &[Leg], stalled: &[Leg]) -> Option<Vec<OtherLeg>> {
    let accepted = stuck.first()?.is_accepted;
    let is_pair = stuck.len() == stalled.len()
        && stuck
            .iter()
            .all(|leg| leg.is_accepted == accepted && leg.send_q == 0)
        && stalled.iter().all(|leg| leg.is_accepted != accepted);
    if !is_pair {
        return None;
    }
    let mut legs: Vec<OtherLeg> = Vec::new();
    let mut indices: HashMap<SocketAddr, usize> = HashMap::new();
    for leg in stalled {
        let index = *indices.entry(leg.peer).or_insert_with(|| {
            legs.push(OtherLeg {
                peer: leg.peer,
                count: 0,
                send_q: 0,
            });
            legs.len() - 1
        });
        legs[index].count += 1;
        legs[index].send_q += u64::from(leg.send_q);
    }
    legs.sort_by(|a, b| b.count.cmp(&a.count).then_with(|| a.peer.cmp(&b.peer)));
    Some(legs)
}

/// Whether `later` is `earlier` at a later lookup, still with bytes that its peer has not acknowledged, and none of them
/// acknowledged in between. Without byte counters no.
pub fn is_stalled(earlier: &Connection, later: &Connection) -> bool {
    let acknowledged = |one: &Connection| one.counters.map(|counters| counters.acked);
    later.state == TcpState::Established
        && earlier.send_q > 0
        && later.send_q > 0
        && acknowledged(earlier).is_some()
        && acknowledged(earlier) == acknowledged(later)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sock_diag::testdata::stuck;
    use crate::sock_diag::{ByteCounters, DiagId, Family};

    fn socket(local: &str, peer: &str, cookie: u64, netns: usize) -> Socket {
        Socket {
            netns,
            ..Socket::from_message(&stuck(local, peer, cookie))
        }
    }

    fn connection(local: &str, peer: &str, cookie: u64, netns: usize) -> Connection {
        let (local, peer) = (local.parse().unwrap(), peer.parse().unwrap());
        let tuple = Tuple { local, peer };
        let family = match tuple.local.is_ipv4() {
            true => Family::V4,
            false => Family::V6,
        };
        Connection {
            netns,
            id: DiagId::example(family, tuple, Cookie(cookie)),
            state: TcpState::FinWait2,
            inode: Some(7),
            send_q: 0,
            counters: None,
            last_segment: None,
        }
    }

    fn cookie_of_end(socket: &Socket, connections: &[Connection]) -> Option<u64> {
        let reversed = |socket: &Socket| Some(socket.tuple().reversed());
        let ends = other_ends(std::iter::once(socket), connections, reversed);
        let end = ends.get(&(socket.netns, socket.cookie()))?;
        Some(end.cookie().0)
    }

    #[test]
    fn the_other_end_has_the_reversed_pair() {
        let (a, b) = ("10.0.0.1:80", "10.0.0.2:4000");
        let here = socket(a, b, 1, 0);
        assert_eq!(cookie_of_end(&here, &[connection(b, a, 2, 0)]), Some(2));
        assert_eq!(cookie_of_end(&here, &[connection(b, a, 2, 1)]), Some(2));
        assert_eq!(cookie_of_end(&here, &[connection(a, b, 2, 0)]), None);
        let other_port = connection("10.0.0.2:4001", a, 2, 0);
        assert_eq!(cookie_of_end(&here, &[other_port]), None);
        let (a, b) = ("[fd00::1]:80", "[fd00::2]:4000");
        let end = connection(b, a, 2, 1);
        assert_eq!(cookie_of_end(&socket(a, b, 1, 0), &[end]), Some(2));
    }

    #[test]
    fn an_ipv4_end_can_be_on_an_ipv6_socket() {
        let (a, b) = ("10.0.0.1:80", "10.0.0.2:4000");
        let end = connection(b, a, 2, 0);
        let mapped = Connection {
            id: DiagId::example(Family::V6, end.tuple(), Cookie(3)),
            ..end
        };
        assert_eq!(cookie_of_end(&socket(a, b, 1, 0), &[mapped]), Some(3));
    }

    #[test]
    fn the_same_addresses_in_other_namespaces_prove_nothing() {
        let (a, b) = ("10.0.0.1:80", "10.0.0.2:4000");
        let here = socket(a, b, 1, 0);
        let ends = [
            connection(b, a, 2, 1),
            connection(b, a, 3, 0),
            connection(b, a, 4, 2),
        ];
        assert_eq!(cookie_of_end(&here, &ends), Some(3));
        assert_eq!(cookie_of_end(&socket(a, b, 1, 3), &ends), None);
        let two_here = [connection(b, a, 2, 0), connection(b, a, 3, 0)];
        assert_eq!(cookie_of_end(&here, &two_here), None);
        let (a, b) = ("127.0.0.1:80", "127.0.0.1:4000");
        let elsewhere = [connection(b, a, 2, 1)];
        assert_eq!(cookie_of_end(&socket(a, b, 1, 0), &elsewhere), None);
    }

    #[test]
    fn across_nat_the_end_has_the_pair_that_conntrack_gives() {
        let (app, service, proxy) = ("10.0.0.1:4000", "10.96.0.9:80", "10.0.0.1:15001");
        let here = socket(app, service, 1, 0);
        let found = |pair: (&str, &str), ends: &[Connection]| {
            let pair = Tuple {
                local: pair.0.parse().unwrap(),
                peer: pair.1.parse().unwrap(),
            };
            let ends = other_ends(std::iter::once(&here), ends, |_| Some(pair));
            ends.get(&key(&here)).map(|end| end.cookie().0)
        };
        let end = |netns| [connection(proxy, app, 2, netns)];
        assert_eq!(found((proxy, app), &end(0)), Some(2));
        assert_eq!(found((proxy, app), &end(1)), Some(2));
        assert_eq!(found((service, app), &end(0)), None);
        let proxy = "127.0.0.1:15001";
        let end = |netns| [connection(proxy, app, 2, netns)];
        assert_eq!(found((proxy, app), &end(0)), Some(2));
        assert_eq!(found((proxy, app), &end(1)), None);
    }

    #[test]
    fn a_socket_is_not_its_own_other_end() {
        let a = "127.0.0.1:80";
        let same = [connection(a, a, 1, 0)];
        assert_eq!(cookie_of_end(&socket(a, a, 1, 0), &same), None);
    }

    #[test]
    fn the_other_end_of_close_wait_has_sent_its_fin() {
        let of = |state| states_of_ends(std::iter::once(state));
        let after_fin = StateSet::from_iter([TcpState::FinWait1, TcpState::FinWait2]);
        assert_eq!(of(TcpState::CloseWait), after_fin);
        assert!(of(TcpState::Established).contains(TcpState::Established));
        assert!(of(TcpState::FinWait2).contains(TcpState::CloseWait));
        assert_eq!(of(TcpState::Listen), StateSet::EMPTY);
    }

    #[test]
    fn a_descriptor_is_named_only_for_one_end() {
        let end = |pid, fd, state| OtherEnd {
            owner: EndOwner::Process {
                pid,
                comm: "envoy".into(),
                fd,
            },
            state,
            known_by: KnownBy::Addresses,
            count: 1,
        };
        let orphan = OtherEnd {
            owner: EndOwner::Orphan,
            ..end(0, None, TcpState::FinWait1)
        };
        let two = TcpState::FinWait2;
        let ends = [
            end(9, Some(3), two),
            orphan.clone(),
            end(7, Some(4), two),
            end(7, Some(5), two),
            end(7, Some(6), two),
        ];
        let three = OtherEnd {
            count: 3,
            ..end(7, None, two)
        };
        let counted = count(ends.into_iter());
        assert_eq!(counted, [three.clone(), end(9, Some(3), two), orphan]);
        // What is known in another way is told apart.
        let mut across_nat = end(7, None, two);
        across_nat.known_by = KnownBy::Conntrack;
        let both = count([end(7, None, two), across_nat.clone()].into_iter());
        assert_eq!(both, [end(7, None, two), across_nat]);
        // Counts can be added.
        assert_eq!(count(counted.clone().into_iter()), counted);
    }

    fn leg(peer: &str, is_accepted: bool, send_q: u32) -> Leg {
        Leg {
            peer: peer.parse().unwrap(),
            is_accepted,
            send_q,
        }
    }

    #[test]
    fn legs_are_named_only_if_they_match_in_number_and_direction() {
        let client = leg("10.0.0.2:4000", true, 0);
        let (one, other) = ("10.0.0.9:5432", "10.0.0.8:5432");
        let backend = leg(one, false, 100);
        let found = |peer: &str, count, send_q| OtherLeg {
            peer: peer.parse().unwrap(),
            count,
            send_q,
        };
        assert_eq!(
            other_legs(&[client], &[backend]),
            Some(vec![found(one, 1, 100)])
        );
        assert_eq!(
            other_legs(&[client; 3], &[leg(other, false, 1), backend, backend]),
            Some(vec![found(one, 2, 200), found(other, 1, 1)])
        );
        // The other way round: the client reads nothing, and the backend has closed.
        let (to_backend, slow) = (leg(one, false, 0), leg("10.0.0.2:4000", true, 9));
        let expected = Some(vec![found("10.0.0.2:4000", 1, 9)]);
        assert_eq!(other_legs(&[to_backend], &[slow]), expected);

        assert_eq!(other_legs(&[], &[]), None);
        assert_eq!(other_legs(&[client], &[]), None);
        assert_eq!(other_legs(&[client], &[backend; 2]), None);
        assert_eq!(other_legs(&[client; 2], &[backend]), None);
        // A slow download beside a leak.
        assert_eq!(other_legs(&[client], &[slow]), None);
        assert_eq!(other_legs(&[client, to_backend], &[backend, slow]), None);
        assert_eq!(
            other_legs(&[leg("10.0.0.2:4000", true, 5)], &[backend]),
            None
        );
    }

    #[test]
    fn a_connection_is_stalled_if_nothing_was_acknowledged() {
        let at = |acked, send_q| Connection {
            state: TcpState::Established,
            send_q,
            counters: Some(ByteCounters {
                received: 5,
                acked,
                written: 900,
            }),
            ..connection("10.0.0.1:4001", "10.0.0.9:5432", 1, 0)
        };
        assert!(is_stalled(&at(10, 20), &at(10, 30)));
        assert!(!is_stalled(&at(10, 20), &at(11, 20)));
        assert!(!is_stalled(&at(10, 20), &at(10, 0)));
        assert!(!is_stalled(&at(10, 0), &at(10, 20)));
        let without_counters = Connection {
            counters: None,
            ..at(10, 20)
        };
        assert!(!is_stalled(&without_counters, &without_counters));
        let ended = Connection {
            state: TcpState::CloseWait,
            ..at(10, 20)
        };
        assert!(!is_stalled(&at(10, 20), &ended));
    }
}
