//! Counts sockets by cause, age, port and peer, and counts new and gone ones. Pure.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher, Hash};
use std::net::IpAddr;
use std::time::Duration;

use super::pairing::{self, OtherEnd};
use crate::model::{Cause, Listener, Scan, Socket, Target};
use crate::proc::{Inodes, ProcessId};
use crate::sock_diag::Cookie;
use crate::tcp::TcpState;
use crate::text::per_minute;

/// The age classes: the upper limit (exclusive) and the name of each. The last class has no limit.
pub const AGES: [(Duration, &str); 5] = [
    (Duration::from_secs(60), "under 1m"),
    (Duration::from_secs(600), "1m to 10m"),
    (Duration::from_secs(3600), "10m to 1h"),
    (Duration::from_secs(86_400), "1h to 1d"),
    (Duration::MAX, "over 1d"),
];

/// The sockets of one process, of one listener, or of the whole scan, counted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SocketCounts {
    /// Number of sockets in the second scan.
    pub stuck: usize,
    pub causes: BTreeMap<Cause, CauseCount>,
    /// Number of sockets in each class of [`AGES`]. A socket of unknown age is in none.
    pub ages: [usize; AGES.len()],
    /// The lower bound of the age of the oldest socket.
    pub oldest: Option<Duration>,
    /// In the second scan, and not in the first.
    pub new: usize,
    /// In the first scan, and not in the second.
    pub gone: usize,
    /// Local ports, most sockets first.
    pub ports: Vec<(u16, usize)>,
    /// Peers, most sockets first.
    pub peers: Vec<(IpAddr, usize)>,
    /// Ports of peers, most sockets first.
    pub peer_ports: Vec<(u16, usize)>,
    /// The other ends in the namespaces that were read, the most frequent first. `ends` fills them in.
    pub other_ends: Vec<OtherEnd>,
}

/// The sockets of one cause.
///
/// A cause has a known meaning only in CLOSE-WAIT, so `lasting`, `idle` and `services` count only the sockets in
/// CLOSE-WAIT, or all sockets if none is in CLOSE-WAIT.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CauseCount {
    /// All sockets of the cause.
    pub count: usize,
    /// Those in CLOSE-WAIT.
    pub close_wait: usize,
    /// Those that had the same cause in the first scan.
    pub lasting: usize,
    /// Those that were in the first scan and in which no data has moved since. The other sockets are new, or in use in
    /// one direction.
    pub idle: usize,
    /// The services that the sockets belong to, most sockets first.
    pub services: Vec<(Service, usize)>,
}

/// The code that uses a socket, derived from its ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Service {
    /// The code that accepts connections at this local port.
    Handles(u16),
    /// The code that connects to this port of its peers.
    CallsOut(u16),
}

impl SocketCounts {
    /// Counts the sockets of the second scan and compares them by cookie with those of the first.
    pub fn new<'a>(
        first: impl Iterator<Item = &'a Socket>,
        second: impl Iterator<Item = &'a Socket>,
        context: &CountContext,
    ) -> SocketCounts {
        let first: HashMap<Cookie, &Socket> = first.map(|s| (s.cookie(), s)).collect();
        let second: Vec<&Socket> = second.collect();
        let now: HashSet<Cookie> = second.iter().map(|socket| socket.cookie()).collect();
        let mut by_cause: BTreeMap<Cause, Vec<&Socket>> = BTreeMap::new();
        let mut counts = SocketCounts {
            stuck: second.len(),
            oldest: second.iter().filter_map(|socket| socket.age).max(),
            new: now.iter().filter(|c| !first.contains_key(c)).count(),
            gone: first.keys().filter(|c| !now.contains(c)).count(),
            ports: by_frequency(second.iter().map(|socket| socket.tuple().local.port())),
            peers: by_frequency(second.iter().map(|socket| socket.tuple().peer.ip())),
            peer_ports: by_frequency(second.iter().map(|socket| socket.tuple().peer.port())),
            ..SocketCounts::default()
        };
        for socket in second {
            by_cause.entry(socket.cause).or_default().push(socket);
            if let Some(age) = socket.age {
                let class = AGES.iter().position(|(end, _)| age < *end);
                counts.ages[class.unwrap_or(AGES.len() - 1)] += 1;
            }
        }
        let idle = |socket: &&&Socket| {
            let Some(before) = first.get(&socket.cookie()) else {
                return false;
            };
            // Without counters: half of the time is enough evidence, and leaves room for the difference between the clocks of the
            // two scans.
            let by_age = || socket.age.is_none_or(|age| age >= context.elapsed / 2);
            socket.is_unchanged_since(before).unwrap_or_else(by_age)
        };
        let lasting = |socket: &&&Socket| {
            let before = first.get(&socket.cookie());
            before.is_some_and(|before| before.cause == socket.cause)
        };
        let count_cause = |all: Vec<&Socket>| {
            let count = all.len();
            let in_close_wait = |socket: &&Socket| socket.state == TcpState::CloseWait;
            let close_wait: Vec<&Socket> = all.iter().copied().filter(in_close_wait).collect();
            let judged = match close_wait.is_empty() {
                true => &all,
                false => &close_wait,
            };
            CauseCount {
                count,
                close_wait: close_wait.len(),
                lasting: judged.iter().filter(lasting).count(),
                idle: judged.iter().filter(idle).count(),
                services: Service::count(judged, &context.listening_ports),
            }
        };
        counts.causes = by_cause
            .into_iter()
            .map(|(cause, sockets)| (cause, count_cause(sockets)))
            .collect();
        counts
    }

    /// The sum of several counts. Their sockets are different ones.
    pub fn merged<'a>(all_counts: impl Iterator<Item = &'a SocketCounts>) -> SocketCounts {
        let mut all = SocketCounts::default();
        for counts in all_counts {
            all.stuck += counts.stuck;
            all.new += counts.new;
            all.gone += counts.gone;
            all.oldest = all.oldest.max(counts.oldest);
            for (sum, count) in all.ages.iter_mut().zip(counts.ages) {
                *sum += count;
            }
            add(&mut all.ports, &counts.ports);
            add(&mut all.peers, &counts.peers);
            add(&mut all.peer_ports, &counts.peer_ports);
            all.other_ends.extend_from_slice(&counts.other_ends);
            for (cause, sockets) in &counts.causes {
                let sum = all.causes.entry(*cause).or_default();
                sum.count += sockets.count;
                sum.close_wait += sockets.close_wait;
                sum.lasting += sockets.lasting;
                sum.idle += sockets.idle;
                add(&mut sum.services, &sockets.services);
            }
        }
        sort(&mut all.ports);
        sort(&mut all.peers);
        sort(&mut all.peer_ports);
        all.other_ends = pairing::count(all.other_ends.into_iter());
        for sockets in all.causes.values_mut() {
            sort(&mut sockets.services);
        }
        all
    }

    /// The change in the number of sockets per minute, if `elapsed` is the time between the scans.
    pub fn growth_per_minute(&self, elapsed: Duration) -> f64 {
        per_minute(self.new, elapsed) - per_minute(self.gone, elapsed)
    }
}

/// The data beside the sockets that [`SocketCounts::new`] needs.
#[derive(Clone, Debug, Default)]
pub struct CountContext {
    /// The local ports that have a listener, each with the index of its network namespace.
    pub listening_ports: HashSet<(usize, u16)>,
    /// The time between the two scans.
    pub elapsed: Duration,
}

impl Service {
    /// The services of `sockets`, most sockets first.
    ///
    /// A connection whose local port has a listener was accepted there. For the other connections the listener may be
    /// gone, or this host opened them. A server has one local port and many peers. A client has a local port for each
    /// connection and one port of the peers. If this does not decide it, the lower port is the server's.
    fn count(
        sockets: &[&Socket],
        listening_ports: &HashSet<(usize, u16)>,
    ) -> Vec<(Service, usize)> {
        let is_accepted = |socket: &&&Socket| {
            let port = (socket.netns, socket.tuple().local.port());
            socket.cause.is_with_listener() || listening_ports.contains(&port)
        };
        let (accepted, others): (Vec<&Socket>, Vec<&Socket>) =
            sockets.iter().partition(|socket| is_accepted(socket));
        let local = by_frequency(others.iter().map(|socket| socket.tuple().local.port()));
        let peer = by_frequency(others.iter().map(|socket| socket.tuple().peer.port()));
        let key = |ports: &[(u16, usize)]| (ports.len(), ports.first().map(|(port, _)| *port));
        let is_server = key(&local) <= key(&peer);
        let others = others.into_iter().map(|socket| match is_server {
            true => Service::Handles(socket.tuple().local.port()),
            false => Service::CallsOut(socket.tuple().peer.port()),
        });
        let accepted = accepted.into_iter();
        by_frequency(
            accepted
                .map(|socket| Service::Handles(socket.tuple().local.port()))
                .chain(others),
        )
    }
}

/// Adds counts to others.
fn add<T: Copy + Eq>(sums: &mut Vec<(T, usize)>, counts: &[(T, usize)]) {
    for (value, count) in counts {
        match sums.iter_mut().find(|(known, _)| known == value) {
            Some((_, sum)) => *sum += count,
            None => sums.push((*value, *count)),
        }
    }
}

/// Sorts counts, the largest first.
fn sort<T: Ord>(counts: &mut [(T, usize)]) {
    counts.sort_by(|(a, of_a), (b, of_b)| of_b.cmp(of_a).then_with(|| a.cmp(b)));
}

/// Each value with its count, the most frequent first.
fn by_frequency<T: Copy + Eq + Hash + Ord>(values: impl Iterator<Item = T>) -> Vec<(T, usize)> {
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
    /// The sockets that the process holds a descriptor of.
    pub held: Vec<&'a Socket>,
    /// The number of `held` sockets that other processes hold too.
    pub shared: usize,
    /// The number of connections that wait at its listeners.
    pub waiting: usize,
    /// The indexes of the listeners with waiting connections.
    pub listeners: BTreeSet<usize>,
}

impl ProcessSockets<'_> {
    /// A hash of the held sockets and of the listeners, to compare processes.
    pub fn signature(&self) -> u64 {
        let mut cookies: Vec<Cookie> = self.held.iter().map(|s| s.cookie()).collect();
        cookies.sort_unstable_by_key(|cookie| cookie.0);
        BuildHasherDefault::<DefaultHasher>::default().hash_one((cookies, &self.listeners))
    }
}

/// The sockets of each process. A socket that several processes share counts for each of them.
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

/// The connections that wait at each listener, by its index.
pub fn by_listener(scan: &Scan) -> HashMap<usize, Vec<&Socket>> {
    let mut waiting: HashMap<usize, Vec<&Socket>> = HashMap::new();
    for target in &scan.targets {
        if let Some(listener) = target.listener {
            waiting.entry(listener).or_default().push(&target.socket);
        }
    }
    waiting
}

/// The connections of the first scan that belong to `listener` of the second scan: those that wait at it now, and those that
/// waited at one of its listening sockets and are gone.
pub fn before_at<'a>(
    first: &'a Scan,
    listener: &Listener,
    waiting: &[&Socket],
    second: &HashSet<Cookie>,
) -> Vec<&'a Socket> {
    let waiting: HashSet<Cookie> = waiting.iter().map(|socket| socket.cookie()).collect();
    let inodes: Inodes = listener.inodes().collect();
    let belongs = |target: &&Target| {
        let cookie = target.socket.cookie();
        let was_here = || {
            let before = first.listener(target);
            before.is_some_and(|before| before.inodes().any(|inode| inodes.contains(&inode)))
        };
        waiting.contains(&cookie) || (!second.contains(&cookie) && was_here())
    };
    let targets = first.targets.iter().filter(belongs);
    targets.map(|target| &target.socket).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ops::Range;
    use std::sync::Arc;

    use crate::model::Owner;
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
        let context = CountContext::default();
        let counts = SocketCounts::new(sockets[..3].iter(), sockets[2..].iter(), &context);
        assert_eq!((counts.stuck, counts.new, counts.gone), (4, 3, 2));
        assert!((counts.growth_per_minute(Duration::from_secs(5)) - 12.0).abs() < 1e-9);
        assert_eq!(counts.growth_per_minute(Duration::ZERO), 0.0);
    }

    #[test]
    fn only_sockets_in_which_no_data_moves_are_idle() {
        let before: Vec<Socket> = (1..=5)
            .map(|cookie| socket("10.0.0.1:80", "10.0.0.2:5", cookie))
            .collect();
        let mut second = before.clone();
        // A keepalive was answered.
        second[0].age = Some(Duration::ZERO);
        second[1].counters.as_mut().unwrap().written += 1;
        second[2].counters.as_mut().unwrap().received += 1;
        second[3].listed_recv_q += 1;
        let context = CountContext::default();
        let counts = SocketCounts::new(before[..4].iter(), second.iter(), &context);
        let counts = &counts.causes[&Cause::Unread];
        assert_eq!((counts.count, counts.idle), (5, 1));
    }

    #[test]
    fn merged_groups_are_as_if_counted_together() {
        let sockets: Vec<Socket> = (0..6)
            .map(|cookie| {
                let mut socket = socket("10.0.0.1:80", "10.0.0.2:5", cookie);
                if cookie % 3 == 0 {
                    (socket.cause, socket.age) = (Cause::Drained, None);
                }
                socket
            })
            .collect();
        let of = |first: Range<usize>, second: Range<usize>| {
            let first = sockets[first].iter();
            SocketCounts::new(first, sockets[second].iter(), &CountContext::default())
        };
        let (one, two) = (of(0..3, 1..3), of(3..4, 3..6));
        assert_eq!(
            SocketCounts::merged([&one, &two].into_iter()),
            of(0..4, 1..6)
        );
    }

    #[test]
    fn without_counters_the_age_decides_about_idle() {
        let aged = |cookie, age| Socket {
            age,
            counters: None,
            ..socket("10.0.0.1:80", "10.0.0.2:5", cookie)
        };
        let seconds = |seconds| Some(Duration::from_secs(seconds));
        let second = [
            aged(1, seconds(60)),
            aged(2, None),
            aged(3, seconds(1)),
            aged(4, seconds(60)),
        ];
        let context = CountContext {
            elapsed: Duration::from_secs(10),
            ..CountContext::default()
        };
        let counts = SocketCounts::new(second[..3].iter(), second.iter(), &context);
        let counts = &counts.causes[&Cause::Unread];
        assert_eq!((counts.count, counts.idle), (4, 2));
    }

    #[test]
    fn ages_fall_into_classes() {
        let ages = [None, Some(0), Some(59), Some(60), Some(3600), Some(86_400)];
        let sockets = ages.map(|age| Socket {
            age: age.map(Duration::from_secs),
            ..socket("10.0.0.1:80", "10.0.0.2:5", 1)
        });
        let counts = SocketCounts::new([].iter(), sockets.iter(), &CountContext::default());
        assert_eq!(counts.ages, [2, 1, 0, 1, 1]);
        assert_eq!(counts.oldest, Some(Duration::from_secs(86_400)));
    }

    fn services(pairs: &[(&str, &str)], ports: &[u16]) -> Vec<(Service, usize)> {
        let sockets: Vec<Socket> = pairs.iter().map(|(l, p)| socket(l, p, 1)).collect();
        let context = CountContext {
            listening_ports: ports.iter().map(|port| (0, *port)).collect(),
            elapsed: Duration::ZERO,
        };
        let counts = SocketCounts::new([].iter(), sockets.iter(), &context);
        counts.causes[&Cause::Unread].services.clone()
    }

    #[test]
    fn the_service_is_at_the_listening_port_or_else_at_the_common_port() {
        use Service::{CallsOut, Handles};
        let (server, a, b) = ("10.0.0.1:8080", "10.0.0.2:40000", "10.0.0.3:50000");
        let services_of = |pairs: &[(&str, &str)], ports: &[u16]| services(pairs, ports);
        assert_eq!(
            services_of(&[(server, a), (server, b)], &[]),
            [(Handles(8080), 2)]
        );
        assert_eq!(
            services_of(&[(a, server), (b, server)], &[]),
            [(CallsOut(8080), 2)]
        );
        assert_eq!(services_of(&[(server, a)], &[]), [(Handles(8080), 1)]);
        assert_eq!(services_of(&[(a, server)], &[]), [(CallsOut(8080), 1)]);
        let low = "10.0.0.2:1730";
        assert_eq!(services_of(&[(server, low)], &[8080]), [(Handles(8080), 1)]);
        assert_eq!(
            services_of(&[(server, low)], &[9090]),
            [(CallsOut(1730), 1)]
        );
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
    fn only_sockets_in_close_wait_are_judged() {
        let mut sockets: Vec<Socket> = (0..4)
            .map(|cookie| socket("10.0.0.1:80", "10.0.0.2:40000", cookie))
            .collect();
        sockets[0].state = TcpState::LastAck;
        sockets[1].cause = Cause::Sending;
        let counts = SocketCounts::new(
            sockets[..3].iter(),
            sockets.iter(),
            &CountContext::default(),
        );
        let counts = &counts.causes[&Cause::Unread];
        assert_eq!(
            (counts.count, counts.close_wait, counts.lasting, counts.idle),
            (3, 2, 1, 1)
        );
        assert_eq!(counts.services, [(Service::Handles(80), 2)]);
        // The cause was another one in the first scan, so the socket has not been sending the whole time.
        let mut before = sockets[1].clone();
        before.cause = Cause::Unread;
        let counts = SocketCounts::new(
            [before].iter(),
            sockets[1..2].iter(),
            &CountContext::default(),
        );
        assert_eq!(counts.causes[&Cause::Sending].lasting, 0);
    }

    #[test]
    fn the_most_frequent_come_first() {
        let counted = by_frequency([8443, 8080, 8443, 80].into_iter());
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
