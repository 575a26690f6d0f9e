//! Which sockets of a scan the policies select. Pure.

use std::collections::{HashMap, HashSet};

use super::{Readiness, StuckSocket, SweepFacts};
use crate::daemon::config::{Level, Policy, Protection};
use crate::filter::Expression;
use crate::filter::selectors::Selectors;
use crate::model::{Cause, NetnsKey, Owner, Scan, SocketKey, Target};
use crate::proc::{Process, ProcessId};
use crate::tcp::StateSet;

/// Collects the facts of a sweep from its scans.
#[derive(Debug)]
pub struct Collector<'a> {
    policies: &'a [Policy],
    protection: &'a Protection,
    facts: SweepFacts,
    /// The index of each socket in the facts: several scans may list it.
    indices: HashMap<SocketKey, usize>,
}

impl Policy {
    /// Whether its sockets can be selected from a scan of these states. Otherwise it needs a scan of its own, as the command makes one:
    /// another namespace, or names in an expression that mean something else in each namespace.
    pub fn can_share_scan(&self, states: StateSet) -> bool {
        self.netns.is_none()
            && self.selectors.expression == Expression::TRUE
            && self.selectors.states.union(states) == states
    }

    /// Whether the scan of its own follows its owners into their namespaces. `states`: those of the shared scan, which follows nobody.
    pub fn follows_owners(&self, states: StateSet) -> bool {
        !self.can_share_scan(states) && self.selectors.selects_owners()
    }
}

impl<'a> Collector<'a> {
    pub fn new(policies: &'a [Policy], protection: &'a Protection) -> Self {
        Collector {
            policies,
            protection,
            facts: SweepFacts {
                selected: vec![Vec::new(); policies.len()],
                ..SweepFacts::default()
            },
            indices: HashMap::new(),
        }
    }

    /// Adds the sockets of a scan that everybody shares, for the policies that can share it.
    pub fn add_shared(&mut self, scan: &Scan, states: StateSet) {
        self.note_listed(scan);
        let policies = self.policies;
        for (index, policy) in policies.iter().enumerate() {
            if policy.can_share_scan(states) {
                let selects = |target: &Target| selects(&policy.selectors, scan, target);
                self.add(scan, index, &selects);
            }
        }
    }

    /// Adds the sockets of a scan by the selectors of a policy, without its times.
    pub fn add_own(&mut self, scan: &Scan, policy: usize) {
        self.note_listed(scan);
        self.add(scan, policy, &|_| true);
    }

    /// The facts. `limit`: RLIMIT_NOFILE of a process.
    pub fn finish(
        self,
        limit: &dyn Fn(ProcessId) -> Option<u64>,
        ended: Vec<ProcessId>,
    ) -> SweepFacts {
        let mut facts = self.facts;
        let is_part = |level: Option<Level>| matches!(level, Some(Level::OfLimit(_)));
        if self
            .policies
            .iter()
            .any(|policy| is_part(policy.start_above))
        {
            let owners = facts.sockets.iter().flat_map(|socket| &socket.owners);
            let owners: HashSet<ProcessId> = owners.copied().collect();
            let known = owners
                .into_iter()
                .filter_map(|owner| Some((owner, limit(owner)?)));
            facts.limits = known.collect();
        }
        facts.ended = ended;
        facts
    }

    fn note_listed(&mut self, scan: &Scan) {
        let namespaces = scan.namespaces.iter().enumerate();
        let listed = namespaces.filter(|(index, _)| !scan.unlisted.contains(index));
        for key in listed.map(|(_, netns)| netns_key(netns.inode())) {
            if !self.facts.listed.contains(&key) {
                self.facts.listed.push(key);
            }
        }
    }

    fn add(&mut self, scan: &Scan, policy: usize, selects: &dyn Fn(&Target) -> bool) {
        let selectors = &self.policies[policy].selectors;
        let protection = self.protection;
        for target in scan.targets.iter().filter(|target| selects(target)) {
            let key = key_of(scan, target);
            let sockets = &mut self.facts.sockets;
            let index = *self.indices.entry(key).or_insert_with(|| {
                sockets.push(stuck_socket(scan, target, protection));
                sockets.len() - 1
            });
            let readiness = readiness(selectors, target);
            self.facts.selected[policy].push((index, readiness));
        }
    }
}

/// The key of a socket. The cookie of its namespace is not asked for: since Linux 5.12 no other socket of the host has its own cookie,
/// and before, a namespace with the inode of one that is gone can only keep a socket from being closed.
pub fn key_of(scan: &Scan, target: &Target) -> SocketKey {
    SocketKey {
        netns: netns_key(scan.netns(target).inode()),
        cookie: target.socket.cookie(),
    }
}

fn netns_key(inode: u64) -> NetnsKey {
    NetnsKey { inode, cookie: 0 }
}

/// The facts about a target that the engine needs.
pub fn stuck_socket(scan: &Scan, target: &Target, protection: &Protection) -> StuckSocket {
    let socket = &target.socket;
    let responsible = scan.responsible(target);
    let mut owners: Vec<ProcessId> = responsible.iter().map(|it| it.process.id).collect();
    owners.sort_unstable();
    owners.dedup();
    let waits = socket.cause == Cause::NotAccepted;
    let processes = responsible
        .iter()
        .map(|owner: &Owner| -> &Process { &owner.process });
    StuckSocket {
        key: key_of(scan, target),
        age: socket.age,
        has_unknown_owner: owners.is_empty() && (waits || socket.inode.is_some()),
        owners,
        protected: protection.of(socket.tuple().local.port(), socket.uid, processes),
    }
}

/// Whether the selectors select a target of a wider scan, apart from its times.
fn selects(selectors: &Selectors, scan: &Scan, target: &Target) -> bool {
    let socket = &target.socket;
    let is_of_owner = || {
        let owners = scan.responsible(target);
        let is_selected = |owner: &Owner| selectors.match_owner(&owner.process);
        // It may wait at any of these sockets.
        let waits_at_several = scan.listener(target).is_some_and(|it| it.sockets.len() > 1);
        match waits_at_several {
            true => !owners.is_empty() && owners.iter().all(is_selected),
            false => owners.iter().any(is_selected),
        }
    };
    selectors.match_fixed(socket)
        && selectors.match_cause(socket)
        && selectors.match_user(socket.uid)
        && (!selectors.address_gone || socket.address_gone)
        && (!selectors.selects_owners() || is_of_owner())
}

fn readiness(selectors: &Selectors, target: &Target) -> Readiness {
    if selectors.finds_too_young(&target.socket) {
        Readiness::TooYoung
    } else if selectors.finds_in_use(&target.socket) {
        Readiness::InUse
    } else {
        Readiness::Ready
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::daemon::config::{DaemonConfig, Protected};
    use crate::model::{Listener, ListeningSocket, Socket};
    use crate::proc::RemoteFd;
    use crate::proc::cgroup::Cgroup;
    use crate::proc::netns::Netns;
    use crate::sock_diag::testdata::stuck;
    use crate::tcp::TcpState;

    fn owner(pid: i32, comm: &str) -> Owner {
        let process = Process {
            id: ProcessId { pid, start_time: 1 },
            comm: comm.into(),
            cgroup: Cgroup::default(),
        };
        Owner::new(Arc::new(process), RemoteFd(3))
    }

    /// Sockets at these local ports, each stuck for an hour, with these owners. The cookie is the place in the list, from 1.
    fn scan(sockets: &[(u16, &[(i32, &str)])]) -> Scan {
        let target = |nth: usize| {
            let (port, owners) = sockets[nth];
            let message = stuck(&format!("10.0.0.1:{port}"), "10.0.0.2:5", nth as u64 + 1);
            let mut target = Target::new(Socket::from_message(&message));
            target.owners = owners.iter().map(|(pid, comm)| owner(*pid, comm)).collect();
            target
        };
        Scan {
            targets: (0..sockets.len()).map(target).collect(),
            namespaces: vec![Arc::new(Netns::example(4026531840, None))],
            owners_known: true,
            ..Scan::default()
        }
    }

    fn facts(text: &str, scan: &Scan) -> SweepFacts {
        let config = DaemonConfig::parse(text).unwrap();
        let mut collector = Collector::new(&config.policies, &config.protection);
        collector.add_shared(scan, TcpState::CloseWait.into());
        collector.finish(
            &|owner| Some(u64::from(owner.pid.unsigned_abs())),
            Vec::new(),
        )
    }

    fn policy(selectors: &str, more: &str) -> String {
        format!("[[policy]]\nname = \"a\"\nmatch = {{ {selectors} }}\n{more}\n")
    }

    /// The cookies that the first policy selects.
    fn selected(facts: &SweepFacts) -> Vec<u64> {
        let cookie = |(index, _): &(usize, Readiness)| facts.sockets[*index].key.cookie.0;
        facts.selected[0].iter().map(cookie).collect()
    }

    #[test]
    fn selectors_select_as_on_the_command_line() {
        let scan = scan(&[
            (80, &[(7, "java")]),
            (8080, &[(7, "java"), (8, "node")]),
            (8080, &[(9, "nginx")]),
            (8080, &[]),
        ]);
        for (selectors, expected) in [
            ("all = true", &[1, 2, 3, 4][..]),
            ("port = 8080", &[2, 3, 4]),
            ("port = 8080, process = \"java\"", &[2]),
            ("process = [\"node\", \"nginx\"]", &[2, 3]),
            ("pid = 9", &[3]),
            ("cause = \"drained\"", &[]),
            ("cause = \"unread\"", &[1, 2, 3, 4]),
            ("peer = \"10.0.0.0/8\"", &[1, 2, 3, 4]),
            ("user = 4711", &[]),
            ("address_gone = true", &[]),
        ] {
            let facts = facts(&policy(selectors, ""), &scan);
            assert_eq!(selected(&facts), expected, "{selectors}");
        }
        let facts = facts(&policy("all = true", ""), &scan);
        let unknown: Vec<bool> = facts
            .sockets
            .iter()
            .map(|it| it.has_unknown_owner)
            .collect();
        assert_eq!(unknown, [false, false, false, true]);
        assert_eq!(facts.sockets[1].owners.len(), 2);
    }

    #[test]
    fn times_make_a_socket_ready() {
        let scan = scan(&[(80, &[(7, "java")])]);
        for (more, expected) in [
            ("min_age = \"1h\"", Readiness::Ready),
            ("min_age = \"61m\"", Readiness::TooYoung),
            ("min_idle = \"61m\"", Readiness::InUse),
            ("min_age = \"61m\"\nmin_idle = \"61m\"", Readiness::TooYoung),
        ] {
            let facts = facts(&policy("all = true", more), &scan);
            assert_eq!(facts.selected[0], [(0, expected)], "{more}");
        }
    }

    #[test]
    fn one_protected_owner_protects_the_socket() {
        let scan = scan(&[
            (80, &[(7, "java"), (8, "sshd")]),
            (22, &[(7, "java")]),
            (80, &[(7, "java")]),
        ]);
        let facts = facts(&policy("all = true", ""), &scan);
        let protected: Vec<Option<Protected>> =
            facts.sockets.iter().map(|it| it.protected).collect();
        assert_eq!(
            protected,
            [Some(Protected::Process), Some(Protected::Port), None]
        );
    }

    #[test]
    fn limits_are_read_only_if_a_policy_needs_them() {
        let scan = scan(&[(80, &[(7, "java")])]);
        assert!(
            facts(&policy("all = true", "start_above = 5"), &scan)
                .limits
                .is_empty()
        );
        let facts = facts(&policy("all = true", "start_above = \"50%\""), &scan);
        assert_eq!(facts.limits.values().collect::<Vec<_>>(), [&7]);
    }

    #[test]
    fn a_connection_that_waits_at_a_group_needs_all_its_owners() {
        let mut scan = scan(&[(80, &[])]);
        let message = stuck("10.0.0.1:80", "10.0.0.2:5", 9);
        let socket = |inode| ListeningSocket {
            id: message.id,
            inode,
            waiting: 1,
            backlog: 5,
            cgroup: None,
        };
        scan.listeners.push(Listener {
            local: "10.0.0.1:80".parse().unwrap(),
            sockets: vec![socket(1), socket(2)],
            group_size: 2,
            uid: 0,
            owners: vec![owner(7, "java"), owner(8, "nginx")],
        });
        scan.targets[0].listener = Some(0);
        assert!(selected(&facts(&policy("process = \"java\"", ""), &scan)).is_empty());
        let both = facts(&policy("process = [\"java\", \"nginx\"]", ""), &scan);
        assert_eq!(selected(&both), [1]);
        scan.listeners[0].sockets.pop();
        assert_eq!(
            selected(&facts(&policy("process = \"java\"", ""), &scan)),
            [1]
        );
    }

    #[test]
    fn a_policy_with_owners_and_a_scan_of_its_own_follows_them() {
        let follows = |selectors: &str| {
            let config = DaemonConfig::parse(&policy(selectors, "")).unwrap();
            config.policies[0].follows_owners(TcpState::CloseWait.into())
        };
        assert!(!follows("unit = \"a.service\""));
        assert!(!follows("expression = \"sport = :80\""));
        assert!(follows(
            "unit = \"a.service\", expression = \"sport = :80\""
        ));
        assert!(follows("process = \"java\", state = \"last-ack\""));
        assert!(follows("process = \"java\", netns = \"blue\""));
    }

    #[test]
    fn a_scan_of_its_own_adds_to_the_same_sockets() {
        let text = format!(
            "{}{}",
            policy("port = 80", ""),
            policy("expression = \"sport = :80\"", "").replace("\"a\"", "\"b\"")
        );
        let config = DaemonConfig::parse(&text).unwrap();
        let states = TcpState::CloseWait.into();
        let shares: Vec<bool> = config
            .policies
            .iter()
            .map(|it| it.can_share_scan(states))
            .collect();
        assert_eq!(shares, [true, false]);
        let scan = scan(&[(80, &[(7, "java")])]);
        let mut collector = Collector::new(&config.policies, &config.protection);
        collector.add_shared(&scan, states);
        collector.add_own(&scan, 1);
        let facts = collector.finish(&|_| None, Vec::new());
        assert_eq!((facts.sockets.len(), facts.listed.len()), (1, 1));
        assert_eq!(facts.selected[0], facts.selected[1]);
        let last_ack = DaemonConfig::parse(&policy("state = \"last-ack\"", "")).unwrap();
        assert!(!last_ack.policies[0].can_share_scan(states));
    }
}
