//! Which socket is the other end of a stuck one, if NAT changes an address between the two. Pure.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::hash::Hash;
use std::net::SocketAddr;
use std::time::Duration;

use crate::conntrack::TranslatedConnection;
use crate::finder::connections::Connection;
use crate::tcp::Tuple;

/// The last segments of both ends of a connection come within this time: the kernel delays an ACK by 200 ms at most (TCP_DELACK_MAX),
/// and reads its clock every 10 ms.
const SAME_MOMENT: Duration = Duration::from_millis(300);
/// SYN and FIN count as a byte in some counters, and not in all.
const UNCOUNTED_BYTES: u64 = 2;

/// What conntrack knows: for the address pair of a socket, the pair of its other end.
#[derive(Debug, Default)]
pub struct Translations(Unique<Tuple, Tuple>);

impl Translations {
    pub fn new(connections: &[TranslatedConnection]) -> Self {
        let mut translations = Unique::default();
        for connection in connections {
            translations.insert(connection.opener, connection.answerer);
            translations.insert(connection.answerer, connection.opener);
        }
        Translations(translations)
    }

    /// The pair of the other end of the socket with this one; `None` if it is unknown, or the tables contradict each other.
    pub fn of(&self, socket: Tuple) -> Option<Tuple> {
        self.0.get(&socket).copied()
    }
}

/// Values by key. A key with several different values has none.
#[derive(Debug)]
struct Unique<K, V>(HashMap<K, Option<V>>);

impl<K, V> Default for Unique<K, V> {
    fn default() -> Self {
        Unique(HashMap::new())
    }
}

impl<K: Hash + Eq, V: PartialEq> Unique<K, V> {
    fn insert(&mut self, key: K, value: V) {
        match self.0.entry(key) {
            Entry::Vacant(free) => {
                free.insert(Some(value));
            }
            Entry::Occupied(mut known) if known.get().as_ref() != Some(&value) => {
                known.insert(None);
            }
            Entry::Occupied(_) => {}
        }
    }

    fn get(&self, key: &K) -> Option<&V> {
        self.0.get(key)?.as_ref()
    }
}

/// A socket in CLOSE-WAIT and one that has sent its FIN, of which one address is the same: NAT may have changed the other.
///
/// Both are given by their indices in `close_wait` and `after_fin`. Sockets that have an other end with the reversed pair are no
/// candidates. An address of several candidates proves nothing.
pub fn with_one_address(
    close_wait: &[Connection],
    after_fin: &[&Connection],
) -> Vec<(usize, usize)> {
    let of_close_wait: Vec<Tuple> = close_wait.iter().map(Connection::tuple).collect();
    let of_after_fin: Vec<Tuple> = after_fin.iter().map(|end| end.tuple()).collect();
    let stuck = without_direct_end(&of_close_wait, &of_after_fin);
    let ends = without_direct_end(&of_after_fin, &of_close_wait);
    let by = |candidates: &[(usize, Tuple)], address: fn(&Tuple) -> SocketAddr| {
        let mut by_address = Unique::default();
        for (index, tuple) in candidates {
            by_address.insert(address(tuple), *index);
        }
        by_address
    };
    let (local, peer) = (|tuple: &Tuple| tuple.local, |tuple: &Tuple| tuple.peer);
    let (mut end_of, mut socket_of) = (Unique::default(), Unique::default());
    for (stuck, ends) in [
        (by(&stuck, local), by(&ends, peer)),
        (by(&stuck, peer), by(&ends, local)),
    ] {
        for (address, index) in &stuck.0 {
            let (Some(index), Some(end)) = (index, ends.get(address)) else {
                continue;
            };
            if may_meet(&close_wait[*index], after_fin[*end]) {
                end_of.insert(*index, *end);
                socket_of.insert(*end, *index);
            }
        }
    }
    let mut pairs: Vec<(usize, usize)> = Vec::new();
    for (index, end) in &end_of.0 {
        if let Some(end) = end
            && socket_of.get(end) == Some(index)
        {
            pairs.push((*index, *end));
        }
    }
    pairs.sort_unstable();
    pairs
}

/// Those of `tuples` whose reversed pair is not among `others`, with their indices.
fn without_direct_end(tuples: &[Tuple], others: &[Tuple]) -> Vec<(usize, Tuple)> {
    let others: HashSet<&Tuple> = others.iter().collect();
    let all = tuples.iter().copied().enumerate();
    all.filter(|(_, tuple)| !others.contains(&tuple.reversed()))
        .collect()
}

/// Whether the two can be of one connection: loopback addresses do not leave their namespace.
fn may_meet(one: &Connection, other: &Connection) -> bool {
    let has_loopback = |connection: &Connection| {
        let Tuple { local, peer } = connection.tuple();
        local.ip().is_loopback() || peer.ip().is_loopback()
    };
    one.netns == other.netns || !(has_loopback(one) || has_loopback(other))
}

/// Whether these two sockets, which were looked up within `took`, are the ends of one connection: the last segment of both came at the
/// same time, and each has received what the other has sent.
///
/// The socket of an earlier connection with the same port can still wait for the FIN that NAT has lost. Then the later connection
/// began, and ended, after the last segment of the earlier one.
pub fn had_the_same_end(stuck: &Connection, end: &Connection, took: Duration) -> bool {
    let (Some(of_stuck), Some(of_end)) = (stuck.last_segment, end.last_segment) else {
        return false;
    };
    let (Some(counted), Some(counted_at_end)) = (stuck.counters, end.counters) else {
        return false;
    };
    let is_near = |one: u64, other: u64| one.abs_diff(other) <= UNCOUNTED_BYTES;
    of_stuck.abs_diff(of_end) <= SAME_MOMENT + took
        && is_near(counted.received, counted_at_end.acked)
        && is_near(counted.acked, counted_at_end.received)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sock_diag::{ByteCounters, Cookie, DiagId, Family};
    use crate::tcp::TcpState;

    fn tuple(local: &str, peer: &str) -> Tuple {
        Tuple {
            local: local.parse().unwrap(),
            peer: peer.parse().unwrap(),
        }
    }

    fn connection(local: &str, peer: &str, netns: usize) -> Connection {
        let tuple = tuple(local, peer);
        let family = match tuple.local.is_ipv4() {
            true => Family::V4,
            false => Family::V6,
        };
        Connection {
            netns,
            id: DiagId::example(family, tuple, Cookie(1)),
            state: TcpState::FinWait2,
            inode: Some(7),
            send_q: 0,
            counters: None,
            last_segment: None,
        }
    }

    const APP: &str = "10.0.0.1:4000";
    const SERVICE: &str = "10.96.0.9:80";
    const PROXY: &str = "10.0.0.1:15001";

    #[test]
    fn conntrack_leads_from_either_end_to_the_other() {
        let (opener, answerer) = (tuple(APP, SERVICE), tuple(PROXY, APP));
        let redirected = TranslatedConnection { opener, answerer };
        let translations = Translations::new(&[redirected, redirected]);
        assert_eq!(translations.of(opener), Some(answerer));
        assert_eq!(translations.of(answerer), Some(opener));
        assert_eq!(translations.of(opener.reversed()), None);
        // Another namespace has the same addresses.
        let other = TranslatedConnection {
            opener,
            answerer: tuple("10.0.0.7:80", APP),
        };
        let translations = Translations::new(&[redirected, other]);
        assert_eq!(translations.of(opener), None);
        assert_eq!(translations.of(answerer), Some(opener));
    }

    fn pairs(stuck: &[Connection], ends: &[Connection]) -> Vec<(usize, usize)> {
        let ends: Vec<&Connection> = ends.iter().collect();
        with_one_address(stuck, &ends)
    }

    #[test]
    fn one_address_must_be_the_same() {
        let stuck = || connection(APP, SERVICE, 0);
        let end = || connection(PROXY, APP, 0);
        // The destination of the application was changed, or that of its client.
        assert_eq!(pairs(&[stuck()], &[end()]), [(0, 0)]);
        let accepted = connection(PROXY, APP, 0);
        let client = connection(APP, SERVICE, 1);
        assert_eq!(pairs(&[accepted], &[client]), [(0, 0)]);
        let other_port = connection(PROXY, "10.0.0.1:4001", 0);
        assert_eq!(pairs(&[stuck()], &[other_port]), []);
        assert_eq!(pairs(&[stuck()], &[]), []);
        assert_eq!(pairs(&[], &[end()]), []);
    }

    #[test]
    fn an_address_of_several_sockets_proves_nothing() {
        let stuck = || connection(APP, SERVICE, 0);
        let end = || connection(PROXY, APP, 0);
        let also = connection(APP, "10.96.0.10:80", 0);
        assert_eq!(pairs(&[stuck(), also.clone()], &[end()]), []);
        let second = connection("10.0.0.1:15002", APP, 0);
        assert_eq!(pairs(&[stuck()], &[end(), second]), []);
        // By one address it would be the one, and by the other another.
        let by_peer = connection(SERVICE, "10.0.0.8:4000", 0);
        assert_eq!(pairs(&[stuck()], &[end(), by_peer]), []);
        // The other socket has its own end, so it does not count. And neither does its end.
        let own_end = connection("10.96.0.10:80", APP, 0);
        let (stuck, ends) = ([also, stuck()], [own_end, end()]);
        assert_eq!(pairs(&stuck, &ends), [(1, 1)]);
    }

    #[test]
    fn loopback_does_not_leave_its_namespace() {
        let stuck = || connection(APP, SERVICE, 0);
        let end = |netns| connection("127.0.0.1:15001", APP, netns);
        assert_eq!(pairs(&[stuck()], &[end(0)]), [(0, 0)]);
        assert_eq!(pairs(&[stuck()], &[end(1)]), []);
        let elsewhere = connection(PROXY, APP, 1);
        assert_eq!(pairs(&[stuck()], &[elsewhere]), [(0, 0)]);
    }

    #[test]
    fn the_last_segment_and_the_bytes_must_agree() {
        let at = |seconds: f64, received, acked| Connection {
            last_segment: Some(Duration::from_secs_f64(seconds)),
            counters: Some(ByteCounters {
                received,
                acked,
                written: acked,
            }),
            ..connection(APP, SERVICE, 0)
        };
        let took = Duration::from_millis(20);
        let agree = |stuck: &Connection, end: &Connection| had_the_same_end(stuck, end, took);
        let stuck = at(700.0, 501, 90);
        assert!(agree(&stuck, &at(700.0, 90, 501)));
        assert!(agree(&stuck, &at(699.75, 91, 502)));
        assert!(agree(&stuck, &at(700.3, 90, 500)));
        // An earlier connection with the same port.
        assert!(!agree(&stuck, &at(712.0, 90, 501)));
        assert!(!agree(&stuck, &at(699.5, 90, 501)));
        assert!(!agree(&stuck, &at(700.0, 90, 700)));
        assert!(!agree(&stuck, &at(700.0, 7, 501)));
        assert!(!agree(&stuck, &connection(PROXY, APP, 0)));
        let without_counters = Connection {
            counters: None,
            ..at(700.0, 0, 0)
        };
        assert!(!agree(&without_counters, &without_counters));
    }
}
