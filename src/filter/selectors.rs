//! The selectors of the command line, as a pure predicate over sockets and owners.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::time::Duration;

use globset::{GlobBuilder, GlobMatcher};
use ipnet::IpNet;

use crate::filter::containers::{ContainerSelectors, Match};
use crate::filter::{End, Expression, Namespace, SocketFacts};
use crate::model::{Cause, Socket};
use crate::proc::cgroup::{Cgroup, unescape};
use crate::proc::{AbsentOwner, OwnerKind, Process, Unreadable};
use crate::tcp::{StateSet, TcpState, Tuple};

/// A socket matches if it matches every selector. It matches a selector if it matches one of the values. A selector without values
/// matches every socket.
#[derive(Clone, Debug)]
pub struct Selectors {
    /// Local ports.
    pub ports: Vec<RangeInclusive<u16>>,
    pub peer_ports: Vec<RangeInclusive<u16>>,
    /// Networks of the local address. An IPv4-mapped address counts as IPv4.
    pub local: Vec<IpNet>,
    /// Networks of the peer address. An IPv4-mapped address counts as IPv4.
    pub peer: Vec<IpNet>,
    /// Only IPv4 or only IPv6 connections. An IPv4-mapped connection is IPv4.
    pub ip_version: Option<IpVersion>,
    /// Pids of owners.
    pub pids: BTreeSet<i32>,
    /// Names (comm) of owners.
    pub processes: Vec<GlobMatcher>,
    /// systemd units of owners.
    pub units: Vec<UnitName>,
    /// Containers of owners.
    pub containers: ContainerSelectors,
    /// Owners in one of these cgroups or below.
    pub cgroups: Vec<String>,
    /// Users of the socket's inode.
    pub users: BTreeSet<u32>,
    /// The states that cwkill requests from the kernel.
    pub states: StateSet,
    /// The minimum age of a socket.
    pub min_age: Duration,
    /// A socket in which data has moved within this time is in use, and left alone.
    pub min_idle: Duration,
    pub causes: BTreeSet<Cause>,
    /// Only sockets whose local address is not an address of this host any more. The finder applies it.
    pub address_gone: bool,
    /// An expression in the syntax of ss(8).
    pub expression: Expression,
}

/// The IP version of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IpVersion {
    /// IPv4, on a socket of either family.
    V4,
    V6,
}

/// The value of `--unit`: a name, with or without `.service`, or a pattern.
#[derive(Clone, Debug)]
pub struct UnitName {
    text: String,
    pattern: GlobMatcher,
}

impl UnitName {
    /// # Errors
    /// `text` is not a valid pattern.
    pub fn new(text: &str) -> Result<Self, globset::Error> {
        // The names of units contain escapes, for example `a\x2db.service`. So `\` is an ordinary character in the pattern.
        let pattern = GlobBuilder::new(text).backslash_escape(false).build()?;
        Ok(UnitName {
            text: text.to_owned(),
            pattern: pattern.compile_matcher(),
        })
    }

    /// Whether it matches the unit `name`, either escaped as systemctl prints it, or with the escapes undone.
    fn matches(&self, name: &str) -> bool {
        let matches = |name: &str| {
            let stem = name.strip_suffix(".service");
            [Some(name), stem]
                .into_iter()
                .flatten()
                .any(|name| name == self.text || self.pattern.is_match(name))
        };
        matches(name) || matches(&unescape(name))
    }
}

/// By default, a socket in which data has moved within this time is in use.
pub const IN_USE_WITHIN: Duration = Duration::from_secs(5);

/// Unread bytes that stay the same for this time, or for `--min-idle` if that is shorter, count as left unread.
const LEFT_UNREAD_AFTER: Duration = Duration::from_secs(5);

impl Default for Selectors {
    /// Everything in CLOSE-WAIT.
    fn default() -> Self {
        Selectors {
            ports: Vec::new(),
            peer_ports: Vec::new(),
            local: Vec::new(),
            peer: Vec::new(),
            ip_version: None,
            pids: BTreeSet::new(),
            processes: Vec::new(),
            units: Vec::new(),
            containers: ContainerSelectors::default(),
            cgroups: Vec::new(),
            users: BTreeSet::new(),
            states: StateSet::from(TcpState::CloseWait),
            min_age: Duration::ZERO,
            min_idle: Duration::ZERO,
            causes: BTreeSet::new(),
            address_gone: false,
            expression: Expression::TRUE,
        }
    }
}

impl Selectors {
    /// The same selectors without the minimum age and the minimum idle time.
    pub fn of_any_age(&self) -> Selectors {
        Selectors {
            min_age: Duration::ZERO,
            min_idle: Duration::ZERO,
            ..self.clone()
        }
    }

    /// The same selectors without what can change while a socket is stuck: its owners, age, idle time and cause.
    #[cfg(feature = "trace")]
    pub fn of_any_owner_and_cause(&self) -> Selectors {
        Selectors {
            pids: BTreeSet::new(),
            processes: Vec::new(),
            units: Vec::new(),
            containers: ContainerSelectors::default(),
            cgroups: Vec::new(),
            causes: BTreeSet::new(),
            address_gone: false,
            ..self.of_any_age()
        }
    }

    /// Whether cwkill need not request IPv4 sockets.
    pub fn selects_only_ipv6(&self) -> bool {
        self.ip_version == Some(IpVersion::V6)
    }

    /// The same selectors, with the names in the expression resolved in the network namespace.
    ///
    /// # Errors
    /// The namespace does not have a thing that the expression names.
    pub fn resolved(&self, namespace: &dyn Namespace) -> io::Result<Selectors> {
        Ok(Selectors {
            expression: self.expression.resolved(namespace)?,
            ..self.clone()
        })
    }

    /// The selectors that an expression can express. It matches every socket that the selectors match, and may match more.
    pub fn as_expression(&self) -> Expression {
        let any = |parts: Vec<Expression>| match parts.is_empty() {
            true => Expression::TRUE,
            false => Expression::Any(parts),
        };
        let ports = |end, ranges: &[RangeInclusive<u16>]| {
            any(ranges
                .iter()
                .map(|r| Expression::Port(end, r.clone()))
                .collect())
        };
        let networks =
            |end, networks: &[IpNet]| any(networks.iter().map(|n| canonical(end, *n)).collect());
        Expression::All(vec![
            ports(End::Local, &self.ports),
            ports(End::Peer, &self.peer_ports),
            networks(End::Local, &self.local),
            networks(End::Peer, &self.peer),
            match self.ip_version {
                None => Expression::TRUE,
                Some(IpVersion::V4) => Expression::over_ipv4(End::Local),
                Some(IpVersion::V6) => Expression::over_ipv4(End::Local).negated(),
            },
            self.expression.clone(),
        ])
    }

    /// Whether the socket matches, apart from the selectors of owners and users.
    pub fn match_socket(&self, socket: &Socket) -> bool {
        self.match_fixed(socket) && self.still_matches(socket) && !self.finds_in_use(socket)
    }

    /// The part of [`Selectors::match_socket`] that cannot change while a socket stays in its state.
    pub fn match_fixed(&self, socket: &Socket) -> bool {
        self.states.contains(socket.state) && self.match_addresses(&SocketFacts::from(socket))
    }

    /// Whether the addresses, the ports and the expression match.
    pub fn match_addresses(&self, facts: &SocketFacts) -> bool {
        let Tuple { local, peer } = facts.tuple;
        let version = match local.is_ipv4() {
            true => IpVersion::V4,
            false => IpVersion::V6,
        };
        in_ranges(&self.ports, local.port())
            && in_ranges(&self.peer_ports, peer.port())
            && in_networks(&self.local, local.ip())
            && in_networks(&self.peer, peer.ip())
            && self.ip_version.is_none_or(|selected| selected == version)
            && self.expression.matches(facts)
    }

    /// Whether a dead socket with this local address can match. The local address is the only known fact about it, so it matches
    /// no selector of other facts, such as another state.
    pub fn could_match_dead(&self, local: SocketAddr) -> bool {
        self.could_match_some_dead()
            && in_ranges(&self.ports, local.port())
            && in_networks(&self.local, local.ip())
            && self
                .ip_version
                .is_none_or(|selected| (selected == IpVersion::V4) == local.is_ipv4())
    }

    /// Whether the dead connections at a listener with this address and user can match, apart from the selectors of owners. Only
    /// the port, the user and the address of the listener are known of them. A listener on the wildcard address may have
    /// accepted connections to any.
    pub fn could_match_backlog(&self, local: SocketAddr, uid: u32) -> bool {
        let is_wildcard = local.ip().is_unspecified();
        self.states.contains(TcpState::CloseWait)
            && in_ranges(&self.ports, local.port())
            && self.match_user(uid)
            && self.peer_ports.is_empty()
            && self.peer.is_empty()
            && !self.address_gone
            && self.min_age.is_zero()
            && (self.causes.is_empty() || self.causes.contains(&Cause::NotAccepted))
            && self.expression == Expression::TRUE
            && (self.local.is_empty() || (!is_wildcard && in_networks(&self.local, local.ip())))
            && match self.ip_version {
                None => true,
                // A wildcard listener of IPv6 may accept IPv4 too.
                Some(IpVersion::V4) => local.is_ipv4(),
                Some(IpVersion::V6) => local.is_ipv6() && !is_wildcard,
            }
    }

    /// Whether a dead socket with some local address can match.
    pub fn could_match_some_dead(&self) -> bool {
        self.states == TcpState::CloseWait.into()
            && self.peer_ports.is_empty()
            && self.peer.is_empty()
            && self.users.is_empty()
            && self.causes.is_empty()
            && !self.address_gone
            && self.min_age.is_zero()
            && self.min_idle.is_zero()
            && self.expression == Expression::TRUE
    }

    /// Whether a dead socket without a local address can match.
    pub fn could_match_unbound(&self) -> bool {
        self.could_match_some_dead()
            && self.ports.is_empty()
            && self.local.is_empty()
            && self.ip_version.is_none()
    }

    /// Whether the age and the cause of a socket match. They can change while it stays in its state.
    pub fn still_matches(&self, socket: &Socket) -> bool {
        !self.finds_too_young(socket) && self.match_cause(socket)
    }

    /// Whether [`Selectors::still_matches`] or [`Selectors::finds_in_use`] can change while no data moves in a socket, or with data that
    /// moves.
    pub fn depend_on_data(&self) -> bool {
        !(self.min_age.is_zero() && self.min_idle.is_zero() && self.causes.is_empty())
    }

    /// Whether the cause of a socket matches.
    pub fn match_cause(&self, socket: &Socket) -> bool {
        self.causes.is_empty() || self.causes.contains(&socket.cause)
    }

    /// Whether a socket is left alone because it is younger than `--min-age`, or its age is unknown.
    pub fn finds_too_young(&self, socket: &Socket) -> bool {
        self.finds_age_too_young(socket.age)
    }

    /// As [`Selectors::finds_too_young`].
    pub fn finds_age_too_young(&self, age: Option<Duration>) -> bool {
        !self.min_age.is_zero() && age.is_none_or(|age| age < self.min_age)
    }

    /// Whether a socket is left alone because it is in use (`--min-idle`).
    pub fn finds_in_use(&self, socket: &Socket) -> bool {
        socket.is_in_use(self.min_idle)
    }

    /// After how long an act needs a second look at the unread bytes of `socket`; zero if it needs none: there are none, they were the
    /// same for long enough, or `--min-idle` is zero. No clock of the kernel counts what the application reads.
    pub fn second_look_after(&self, socket: &Socket) -> Duration {
        match socket.has_unread_data() {
            true => self
                .min_idle
                .min(LEFT_UNREAD_AFTER)
                .saturating_sub(socket.unchanged_for),
            false => Duration::ZERO,
        }
    }

    /// Whether the user of a socket is selected.
    pub fn match_user(&self, uid: u32) -> bool {
        self.users.is_empty() || self.users.contains(&uid)
    }

    /// Whether `owner` is selected.
    pub fn match_owner(&self, owner: &Process) -> bool {
        self.of_owner(owner) == Match::Yes
    }

    /// Whether `owner` is selected. That is unknown if the name of its container could not be read.
    pub fn of_owner(&self, owner: &Process) -> Match {
        let matches =
            self.match_process(owner.id.pid, Some(&owner.comm)) && self.match_cgroup(&owner.cgroup);
        match matches {
            true => self.containers.of(owner.cgroup.container.as_ref()),
            false => Match::No,
        }
    }

    /// Whether one of these processes, which cwkill could not read, may be a selected owner.
    pub fn could_match(&self, unreadable: &[Unreadable]) -> bool {
        let may_match =
            |process: &Unreadable| self.match_process(process.pid, process.comm.as_deref());
        self.selects_owners() && unreadable.iter().any(may_match)
    }

    /// Whether a process that /proc does not show may be a selected owner: one of another pid namespace, or a thread with a
    /// descriptor table of its own. If /proc shows the descriptors of every selected pid, no other process is meant.
    pub fn could_match_unseen(&self, shows_descriptors: &dyn Fn(i32) -> bool) -> bool {
        self.selects_owners()
            && (self.pids.is_empty() || !self.pids.iter().all(|pid| shows_descriptors(*pid)))
    }

    /// Whether a process is selected by its pid and its name. An unknown name matches every pattern.
    fn match_process(&self, pid: i32, comm: Option<&str>) -> bool {
        let named = |comm| self.processes.iter().any(|glob| glob.is_match(comm));
        (self.pids.is_empty() || self.pids.contains(&pid))
            && (self.processes.is_empty() || comm.is_none_or(named))
    }

    /// Whether a selector of owners is given.
    pub fn selects_owners(&self) -> bool {
        !(self.pids.is_empty()
            && self.processes.is_empty()
            && self.units.is_empty()
            && self.containers.is_empty()
            && self.cgroups.is_empty())
    }

    /// Whether a selector of owners is given that is not a pid.
    pub fn selects_owners_by_name(&self) -> bool {
        !(self.processes.is_empty()
            && self.units.is_empty()
            && self.containers.is_empty()
            && self.cgroups.is_empty())
    }

    /// The names, units, containers and cgroups that none of `processes` has.
    pub fn absent_names(&self, processes: &[Process]) -> Vec<AbsentOwner> {
        let mut absent = Vec::new();
        let mut add = |kind, value: &str, matches: &dyn Fn(&Process) -> bool| {
            if !processes.iter().any(matches) {
                absent.push(AbsentOwner::new(kind, value));
            }
        };
        for glob in &self.processes {
            let matches = |process: &Process| glob.is_match(&process.comm);
            add(OwnerKind::Process, glob.glob().glob(), &matches);
        }
        for name in &self.units {
            let matches = |process: &Process| {
                let unit = process.cgroup.unit.as_deref();
                unit.is_some_and(|unit| name.matches(unit))
            };
            add(OwnerKind::Unit, &name.text, &matches);
        }
        for path in &self.cgroups {
            let matches = |process: &Process| process.cgroup.is_below(path);
            add(OwnerKind::Cgroup, path, &matches);
        }
        absent.extend(self.containers.absent(processes));
        absent
    }

    fn match_cgroup(&self, cgroup: &Cgroup) -> bool {
        let unit = || cgroup.unit.as_deref();
        (self.units.is_empty()
            || unit().is_some_and(|unit| self.units.iter().any(|name| name.matches(unit))))
            && (self.cgroups.is_empty() || self.cgroups.iter().any(|path| cgroup.is_below(path)))
    }
}

/// The condition for a network of the selectors. There an IPv6 network does not match IPv4-mapped addresses; in an expression it
/// does.
fn canonical(end: End, network: IpNet) -> Expression {
    let address = Expression::Address(end, network);
    match network {
        IpNet::V4(_) => address,
        IpNet::V6(_) => Expression::All(vec![address, Expression::over_ipv4(end).negated()]),
    }
}

fn in_ranges(ranges: &[RangeInclusive<u16>], port: u16) -> bool {
    ranges.is_empty() || ranges.iter().any(|range| range.contains(&port))
}

pub(super) fn in_networks(networks: &[IpNet], address: IpAddr) -> bool {
    networks.is_empty() || networks.iter().any(|network| network.contains(&address))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filter::containers::ContainerName;
    use crate::proc::ProcessId;
    use crate::sock_diag::testdata::stuck;
    use crate::sock_diag::{Cookie, DiagId, Family, SocketMessage};
    use globset::Glob;

    fn socket() -> Socket {
        Socket::from_message(&message())
    }

    fn message() -> SocketMessage {
        stuck("10.0.0.1:8080", "10.0.0.2:50000", 1)
    }

    fn matches(change: impl FnOnce(&mut Selectors)) -> bool {
        let mut selectors = Selectors::default();
        change(&mut selectors);
        selectors.match_socket(&socket())
    }

    #[test]
    fn different_selectors_are_anded_values_of_one_ored() {
        assert!(matches(|_| {}));
        assert!(matches(|s| s.ports = vec![80..=80, 8000..=9000]));
        assert!(!matches(|s| s.ports = vec![80..=80]));
        assert!(!matches(|s| {
            s.ports = vec![8080..=8080];
            s.peer_ports = vec![1..=2];
        }));
        assert!(matches(|s| s.local = vec!["10.0.0.0/8".parse().unwrap()]));
        assert!(!matches(|s| s.peer = vec!["10.0.0.1/32".parse().unwrap()]));
        assert!(!matches(|s| s.states = TcpState::LastAck.into()));
        assert!(matches(
            |s| s.causes = [Cause::Unread, Cause::Drained].into()
        ));
        assert!(!matches(|s| s.causes = [Cause::Drained].into()));
    }

    #[test]
    fn only_the_local_address_of_a_dead_socket_is_compared() {
        let could = |change: fn(&mut Selectors)| {
            let mut selectors = Selectors::default();
            change(&mut selectors);
            selectors.could_match_dead("10.0.0.1:8080".parse().unwrap())
        };
        assert!(could(|_| {}));
        let mut selectors = Selectors::default();
        assert!(selectors.could_match_unbound());
        selectors.ports = vec![80..=80];
        assert!(!selectors.could_match_unbound() && selectors.could_match_some_dead());
        assert!(could(|s| s.ports = vec![8000..=9000]));
        assert!(!could(|s| s.ports = vec![80..=80]));
        assert!(!could(|s| s.local = vec!["10.1.0.0/16".parse().unwrap()]));
        assert!(!could(|s| s.ip_version = Some(IpVersion::V6)));
        assert!(!could(|s| s.peer_ports = vec![1..=u16::MAX]));
        assert!(!could(|s| s.states = TcpState::Established.into()));
        assert!(!could(|s| s.expression = Expression::TRUE.negated()));
    }

    #[test]
    fn a_mapped_socket_is_ipv4() {
        let mut message = message();
        let tuple = message.id.tuple();
        message.id = DiagId::example(Family::V6, tuple, Cookie(1));
        let mapped = Socket::from_message(&message);
        let mut selectors = Selectors {
            ip_version: Some(IpVersion::V4),
            local: vec!["10.0.0.1/32".parse().unwrap()],
            ..Selectors::default()
        };
        assert!(selectors.match_socket(&mapped));
        selectors.ip_version = Some(IpVersion::V6);
        assert!(!selectors.match_socket(&mapped));
    }

    #[test]
    fn an_unknown_age_is_never_old_enough() {
        assert!(matches(|s| s.min_age = Duration::from_secs(3600)));
        assert!(!matches(|s| s.min_age = Duration::from_secs(3601)));
        let mut ageless = socket();
        ageless.age = None;
        let mut selectors = Selectors::default();
        assert!(selectors.match_socket(&ageless));
        selectors.min_age = Duration::from_millis(1);
        assert!(!selectors.match_socket(&ageless));
    }

    #[test]
    fn a_socket_in_use_does_not_match() {
        assert!(matches(|s| s.min_idle = Duration::from_secs(3600)));
        assert!(!matches(|s| s.min_idle = Duration::from_secs(3601)));
    }

    #[test]
    fn unread_bytes_need_a_second_look() {
        let after = |min_idle, recv_q, unchanged_for| {
            let mut socket = socket();
            (socket.listed_recv_q, socket.unchanged_for) =
                (recv_q, Duration::from_secs(unchanged_for));
            let selectors = Selectors {
                min_idle: Duration::from_secs(min_idle),
                ..Selectors::default()
            };
            selectors.second_look_after(&socket).as_secs()
        };
        assert_eq!(after(3, 8, 0), 3);
        assert_eq!(after(600, 8, 0), 5, "the wait is bounded");
        assert_eq!(after(600, 8, 2), 3, "an earlier run was the first look");
        assert_eq!(after(600, 8, 5), 0);
        assert_eq!(after(5, 1, 0), 0, "only the FIN is unread");
        assert_eq!(after(0, 8, 0), 0);
    }

    #[test]
    fn one_owner_must_match_pid_and_name_together() {
        let process = |pid, comm: &str| Process {
            id: ProcessId { pid, start_time: 0 },
            comm: comm.into(),
            cgroup: Cgroup::default(),
        };
        let owners = [process(1, "java"), process(2, "nginx")];
        let any = |selectors: &Selectors| owners.iter().any(|owner| selectors.match_owner(owner));
        let mut selectors = Selectors {
            processes: vec![Glob::new("ja*").unwrap().compile_matcher()],
            ..Selectors::default()
        };
        assert!(any(&selectors));
        selectors.pids = [2].into();
        assert!(!any(&selectors));
        selectors.pids = [1].into();
        assert!(any(&selectors));
        assert!(selectors.selects_owners());
        assert!(!Selectors::default().selects_owners());
    }

    #[test]
    fn a_process_that_cannot_be_read_may_be_the_one() {
        let hidden = |pid, comm: Option<&str>| Unreadable {
            pid,
            comm: comm.map(str::to_owned),
        };
        let java = Selectors {
            processes: vec![Glob::new("java").unwrap().compile_matcher()],
            ..Selectors::default()
        };
        assert!(java.could_match(&[hidden(1, Some("java"))]));
        assert!(!java.could_match(&[hidden(1, Some("nginx"))]));
        assert!(java.could_match(&[hidden(1, None)]));
        let pid = Selectors {
            pids: [7].into(),
            ..Selectors::default()
        };
        assert!(pid.could_match(&[hidden(7, Some("x"))]));
        assert!(!pid.could_match(&[hidden(8, None)]));
        assert!(!Selectors::default().could_match(&[hidden(7, None)]));
        // A process that /proc does not show may have any name, but not the number of one that it shows.
        assert!(java.could_match_unseen(&|_| true));
        assert!(pid.could_match_unseen(&|_| false) && !pid.could_match_unseen(&|_| true));
        let mut both = java.clone();
        both.pids = [7].into();
        assert!(!both.could_match_unseen(&|_| true));
        assert!(!Selectors::default().could_match_unseen(&|_| false));
    }

    #[test]
    fn units_containers_and_cgroups_are_those_of_one_owner() {
        let process = |pid, cgroup: &str| Process {
            id: ProcessId { pid, start_time: 0 },
            comm: "java".into(),
            cgroup: Cgroup::parse(cgroup),
        };
        let id = "3f4a9b2c1d0e5f6a7b8c9d0e1f2a3b4c5d6e7f8091a2b3c4d5e6f708192a3b4c";
        let owners = [
            process(1, "0::/system.slice/tomcat@a\\x2db.service/main\n"),
            process(2, &format!("0::/docker/{id}\n")),
            process(3, "0::/user.slice/session-3.scope\n"),
            process(4, ""),
        ];
        let who = |change: &dyn Fn(&mut Selectors)| -> Vec<i32> {
            let mut selectors = Selectors::default();
            change(&mut selectors);
            let matching = |owner: &&Process| selectors.match_owner(owner);
            owners.iter().filter(matching).map(|p| p.id.pid).collect()
        };
        let unit = |name: &str| who(&|s| s.units = vec![UnitName::new(name).unwrap()]);
        for name in [
            "tomcat@a\\x2db.service",
            "tomcat@a\\x2db",
            "tomcat@a-b",
            "tomcat@a-b.service",
            "tomcat@*",
            "tom*.service",
        ] {
            assert_eq!(unit(name), [1], "{name}");
        }
        let none: [i32; 0] = [];
        assert_eq!(unit("tomcat"), none);
        assert_eq!(unit("session-3.scope"), [3]);
        assert_eq!(unit("session-3"), none, "only .service may be left out");
        assert_eq!(unit("*"), [1, 3]);
        let container = |name: &str| {
            who(&|s| s.containers.containers = vec![ContainerName::new(name).unwrap()])
        };
        assert_eq!(container(&id[..12]), [2]);
        assert_eq!(container("web"), none);
        assert_eq!(who(&|s| s.cgroups = vec!["/system.slice".into()]), [1]);
        assert_eq!(who(&|s| s.cgroups = vec!["/".into()]), [1, 2, 3, 4]);
        assert_eq!(
            who(&|s| {
                s.cgroups = vec!["/user.slice".into(), "/docker".into()];
                s.pids = [3].into();
            }),
            [3]
        );
    }
}
