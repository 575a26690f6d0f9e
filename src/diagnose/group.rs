//! Sockets counted together: by cause and age, what came and what went, where and from whom. Pure.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher, Hash};
use std::net::IpAddr;
use std::time::Duration;

use crate::model::{Cause, Scan, Socket};
use crate::proc::ProcessId;
use crate::sock_diag::Cookie;
use crate::tcp::TcpState;

/// The upper ends of the classes of age, and what each is called; the last has no end.
pub const AGES: [(Duration, &str); 5] = [
    (Duration::from_secs(60), "under 1m"),
    (Duration::from_secs(600), "1m to 10m"),
    (Duration::from_secs(3600), "10m to 1h"),
    (Duration::from_secs(86_400), "1h to 1d"),
    (Duration::MAX, "over 1d"),
];

/// Sockets of one process, of one listener, or all of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Group {
    /// How many there are now.
    pub stuck: usize,
    /// How many of each cause.
    pub causes: BTreeMap<Cause, OfCause>,
    /// How many in each class of [`AGES`]; one of unknown age is in none.
    pub ages: [usize; AGES.len()],
    /// The lower bound of the age of the oldest.
    pub oldest: Option<Duration>,
    /// There now, and not at the first look.
    pub new: usize,
    /// There at the first look, and not now.
    pub gone: usize,
    /// Local ports, most sockets first.
    pub ports: Vec<(u16, usize)>,
    /// Peers, most sockets first.
    pub peers: Vec<(IpAddr, usize)>,
    /// Ports of peers, most sockets first.
    pub peer_ports: Vec<(u16, usize)>,
}

/// The sockets of one cause.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OfCause {
    /// How many.
    pub count: usize,
    /// How many of them are in CLOSE-WAIT: what a cause means is known there. The rest is about those, or about all
    /// if there are none.
    pub close_wait: usize,
    /// How many were there at the first look, with the same cause.
    pub lasting: usize,
    /// How many were there at the first look and have heard nothing of their peer since. The others have
    /// just come, or are in use in one direction.
    pub idle: usize,
    /// The services they belong to, most sockets first.
    pub services: Vec<(Service, usize)>,
}

/// The code that sockets belong to, told by their ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Service {
    /// They were accepted at this port.
    Handles(u16),
    /// They were opened to this port of peers.
    CallsOut(u16),
}

impl Group {
    /// Counts the sockets of the second look, and compares with those of the first by their cookies.
    pub fn new<'a>(
        first: impl Iterator<Item = &'a Socket>,
        second: impl Iterator<Item = &'a Socket>,
        around: &Around,
    ) -> Group {
        let first: HashMap<Cookie, Cause> = first.map(|s| (s.cookie(), s.cause)).collect();
        let second: Vec<&Socket> = second.collect();
        let now: HashSet<Cookie> = second.iter().map(|socket| socket.cookie()).collect();
        let mut by_cause: BTreeMap<Cause, Vec<&Socket>> = BTreeMap::new();
        let mut group = Group {
            stuck: second.len(),
            oldest: second.iter().filter_map(|socket| socket.age).max(),
            new: now.iter().filter(|c| !first.contains_key(c)).count(),
            gone: first.keys().filter(|c| !now.contains(c)).count(),
            ports: most(second.iter().map(|socket| socket.tuple.local.port())),
            peers: most(second.iter().map(|socket| socket.tuple.peer.ip())),
            peer_ports: most(second.iter().map(|socket| socket.tuple.peer.port())),
            ..Group::default()
        };
        for socket in second {
            by_cause.entry(socket.cause).or_default().push(socket);
            if let Some(age) = socket.age {
                let class = AGES.iter().position(|(end, _)| age < *end);
                group.ages[class.unwrap_or(AGES.len() - 1)] += 1;
            }
        }
        // Half of the time, so that the clocks of the looks need not agree.
        let idle = |socket: &&&Socket| {
            first.contains_key(&socket.cookie())
                && socket.age.is_none_or(|age| age >= around.elapsed / 2)
        };
        let lasting = |socket: &&&Socket| first.get(&socket.cookie()) == Some(&socket.cause);
        let of_cause = |all: Vec<&Socket>| {
            let count = all.len();
            let in_close_wait = |socket: &&Socket| socket.state == TcpState::CloseWait;
            let close_wait: Vec<&Socket> = all.iter().copied().filter(in_close_wait).collect();
            let judged = if close_wait.is_empty() {
                &all
            } else {
                &close_wait
            };
            OfCause {
                count,
                close_wait: close_wait.len(),
                lasting: judged.iter().filter(lasting).count(),
                idle: judged.iter().filter(idle).count(),
                services: Service::of(judged, &around.listening),
            }
        };
        group.causes = by_cause
            .into_iter()
            .map(|(cause, sockets)| (cause, of_cause(sockets)))
            .collect();
        group
    }

    /// How many more, or fewer, there are a minute at the pace of `elapsed`.
    pub fn growth(&self, elapsed: Duration) -> f64 {
        crate::text::per_minute(self.new, elapsed) - crate::text::per_minute(self.gone, elapsed)
    }
}

/// What there is beside the sockets of a group.
#[derive(Clone, Debug, Default)]
pub struct Around {
    /// The local ports at which somebody listens, with the network namespace.
    pub listening: HashSet<(usize, u16)>,
    /// The time between the looks.
    pub elapsed: Duration,
}

impl Service {
    /// Connections to a port at which somebody listens were accepted there. Of the others either the listener is gone
    /// or they were opened here: a server has one port and many peers, a client a port for each connection
    /// and the peer's in common; where that tells nothing, the lower port is the server's.
    fn of(sockets: &[&Socket], listening: &HashSet<(usize, u16)>) -> Vec<(Service, usize)> {
        let is_accepted = |socket: &&&Socket| {
            let at = (socket.netns, socket.tuple.local.port());
            socket.cause.is_with_listener() || listening.contains(&at)
        };
        let (accepted, others): (Vec<&Socket>, Vec<&Socket>) =
            sockets.iter().partition(|socket| is_accepted(socket));
        let local = most(others.iter().map(|socket| socket.tuple.local.port()));
        let peer = most(others.iter().map(|socket| socket.tuple.peer.port()));
        let key = |ports: &[(u16, usize)]| (ports.len(), ports.first().map(|(port, _)| *port));
        let is_server = key(&local) <= key(&peer);
        let others = others.into_iter().map(|socket| match is_server {
            true => Service::Handles(socket.tuple.local.port()),
            false => Service::CallsOut(socket.tuple.peer.port()),
        });
        let accepted = accepted.into_iter();
        most(
            accepted
                .map(|socket| Service::Handles(socket.tuple.local.port()))
                .chain(others),
        )
    }
}

/// Each value with its count, the most frequent first.
fn most<T: Copy + Eq + Hash + Ord>(values: impl Iterator<Item = T>) -> Vec<(T, usize)> {
    let mut counts: HashMap<T, usize> = HashMap::new();
    for value in values {
        *counts.entry(value).or_default() += 1;
    }
    let mut counts: Vec<(T, usize)> = counts.into_iter().collect();
    counts.sort_by_key(|(value, count)| (std::cmp::Reverse(*count), *value));
    counts
}

/// The sockets of one process in one scan.
#[derive(Debug, Default)]
pub struct ProcessSockets<'a> {
    /// Sockets of which it holds a descriptor.
    pub held: Vec<&'a Socket>,
    /// How many of them other processes hold too.
    pub shared: usize,
    /// How many wait at its listeners.
    pub waiting: usize,
    /// The listeners with those, by index.
    pub listeners: BTreeSet<usize>,
}

impl ProcessSockets<'_> {
    /// A number that is the same for the same sockets, and another for others.
    pub fn signature(&self) -> u64 {
        let mut cookies: Vec<Cookie> = self.held.iter().map(|s| s.cookie()).collect();
        cookies.sort_unstable_by_key(|cookie| cookie.0);
        BuildHasherDefault::<DefaultHasher>::default().hash_one((cookies, &self.listeners))
    }
}

/// The sockets of each process. A socket that several share counts for each.
pub fn by_process(scan: &Scan) -> HashMap<ProcessId, ProcessSockets<'_>> {
    let mut by_process: HashMap<ProcessId, ProcessSockets<'_>> = HashMap::new();
    for target in &scan.targets {
        let responsible = scan.responsible(target).iter();
        let processes: BTreeSet<ProcessId> = responsible.map(|owner| owner.process.id).collect();
        for id in &processes {
            let sockets = by_process.entry(*id).or_default();
            match target.listener {
                Some(listener) => {
                    sockets.waiting += 1;
                    sockets.listeners.insert(listener);
                }
                None => {
                    sockets.held.push(&target.socket);
                    sockets.shared += usize::from(processes.len() > 1);
                }
            }
        }
    }
    by_process
}

/// The connections that wait at each listener, by the inodes of its sockets.
pub fn by_listener(scan: &Scan) -> HashMap<&[u32], Vec<&Socket>> {
    let mut waiting: HashMap<&[u32], Vec<&Socket>> = HashMap::new();
    for target in &scan.targets {
        if let Some(listener) = scan.listener(target) {
            let sockets = waiting.entry(&listener.inodes[..]).or_default();
            sockets.push(&target.socket);
        }
    }
    waiting
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    use crate::model::{Owner, Target};
    use crate::proc::RemoteFd;
    use crate::proc::testdata::process;
    use crate::sock_diag::testdata::stuck;

    fn socket(local: &str, peer: &str, cookie: u64) -> Socket {
        Socket::from_message(&stuck(local, peer, cookie))
    }

    #[test]
    fn growth_is_by_identity_and_not_by_count() {
        let sockets: Vec<Socket> = (0..6)
            .map(|cookie| socket("10.0.0.1:80", "10.0.0.2:5", cookie))
            .collect();
        let around = Around::default();
        let group = Group::new(sockets[..3].iter(), sockets[2..].iter(), &around);
        assert_eq!((group.stuck, group.new, group.gone), (4, 3, 2));
        assert!((group.growth(Duration::from_secs(5)) - 12.0).abs() < 1e-9);
        assert_eq!(group.growth(Duration::ZERO), 0.0);
    }

    #[test]
    fn only_what_stays_and_hears_nothing_is_idle() {
        let aged = |cookie, age| Socket {
            age,
            ..socket("10.0.0.1:80", "10.0.0.2:5", cookie)
        };
        let seconds = |seconds| Some(Duration::from_secs(seconds));
        let second = [
            aged(1, seconds(60)),
            aged(2, None),
            aged(3, seconds(1)),
            aged(4, seconds(60)),
        ];
        let around = Around {
            elapsed: Duration::from_secs(10),
            ..Around::default()
        };
        let group = Group::new(second[..3].iter(), second.iter(), &around);
        let of = &group.causes[&Cause::Unread];
        assert_eq!((of.count, of.idle), (4, 2));
    }

    #[test]
    fn ages_fall_into_classes() {
        let ages = [None, Some(0), Some(59), Some(60), Some(3600), Some(86_400)];
        let sockets = ages.map(|age| Socket {
            age: age.map(Duration::from_secs),
            ..socket("10.0.0.1:80", "10.0.0.2:5", 1)
        });
        let group = Group::new([].iter(), sockets.iter(), &Around::default());
        assert_eq!(group.ages, [2, 1, 0, 1, 1]);
        assert_eq!(group.oldest, Some(Duration::from_secs(86_400)));
    }

    fn services(pairs: &[(&str, &str)], listening: &[u16]) -> Vec<(Service, usize)> {
        let sockets: Vec<Socket> = pairs.iter().map(|(l, p)| socket(l, p, 1)).collect();
        let around = Around {
            listening: listening.iter().map(|port| (0, *port)).collect(),
            elapsed: Duration::ZERO,
        };
        let group = Group::new([].iter(), sockets.iter(), &around);
        group.causes[&Cause::Unread].services.clone()
    }

    #[test]
    fn the_service_is_where_somebody_listens_or_else_the_common_port() {
        use Service::{CallsOut, Handles};
        let (server, a, b) = ("10.0.0.1:8080", "10.0.0.2:40000", "10.0.0.3:50000");
        let of = |pairs: &[(&str, &str)], listening: &[u16]| services(pairs, listening);
        assert_eq!(of(&[(server, a), (server, b)], &[]), [(Handles(8080), 2)]);
        assert_eq!(of(&[(a, server), (b, server)], &[]), [(CallsOut(8080), 2)]);
        assert_eq!(of(&[(server, a)], &[]), [(Handles(8080), 1)]);
        assert_eq!(of(&[(a, server)], &[]), [(CallsOut(8080), 1)]);
        let low = "10.0.0.2:1730";
        assert_eq!(of(&[(server, low)], &[8080]), [(Handles(8080), 1)]);
        assert_eq!(of(&[(server, low)], &[9090]), [(CallsOut(1730), 1)]);
    }

    #[test]
    fn one_accepted_socket_does_not_blame_the_server_for_the_clients() {
        use Service::{CallsOut, Handles};
        let database = "10.0.0.9:5432";
        let pairs = [
            ("10.0.0.1:8080", "10.0.0.2:40000"),
            ("10.0.0.1:41000", database),
            ("10.0.0.1:41001", database),
            ("10.0.0.1:41002", database),
        ];
        let services = services(&pairs, &[8080]);
        assert_eq!(services, [(CallsOut(5432), 3), (Handles(8080), 1)]);
    }

    #[test]
    fn only_what_is_in_close_wait_is_judged() {
        let mut sockets: Vec<Socket> = (0..4)
            .map(|cookie| socket("10.0.0.1:80", "10.0.0.2:40000", cookie))
            .collect();
        sockets[0].state = TcpState::LastAck;
        sockets[1].cause = Cause::Sending;
        let group = Group::new(sockets[..3].iter(), sockets.iter(), &Around::default());
        let of = &group.causes[&Cause::Unread];
        assert_eq!((of.count, of.close_wait, of.lasting, of.idle), (3, 2, 1, 1));
        assert_eq!(of.services, [(Service::Handles(80), 2)]);
        // It was unread before: nothing is known of how long it has been sending.
        let mut before = sockets[1].clone();
        before.cause = Cause::Unread;
        let group = Group::new([before].iter(), sockets[1..2].iter(), &Around::default());
        assert_eq!(group.causes[&Cause::Sending].lasting, 0);
    }

    #[test]
    fn the_most_frequent_come_first() {
        let counted = most([8443, 8080, 8443, 80].into_iter());
        assert_eq!(counted, [(8443, 2), (80, 1), (8080, 1)]);
    }

    #[test]
    fn a_shared_socket_counts_for_each_process_and_once_for_two_descriptors() {
        let processes = [process(7, "p"), process(8, "p")];
        let owner = |process: usize, fd| Owner::new(Arc::clone(&processes[process]), RemoteFd(fd));
        let mut shared = Target::new(socket("10.0.0.1:80", "10.0.0.2:5", 1));
        shared.owners = vec![owner(0, 3), owner(0, 4), owner(1, 3)];
        let mut own = Target::new(socket("10.0.0.1:80", "10.0.0.2:6", 2));
        own.owners = vec![owner(0, 5)];
        let scan = Scan {
            targets: vec![shared, own],
            ..Scan::default()
        };
        let by_process = by_process(&scan);
        let counts = |process: usize| {
            let sockets = &by_process[&processes[process].id];
            (sockets.held.len(), sockets.shared)
        };
        assert_eq!((counts(0), counts(1)), ((2, 1), (1, 1)));
    }
}
