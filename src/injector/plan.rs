//! Plans the methods for each socket, and says why others are excluded. Pure.

use rayon::prelude::*;

use crate::model::socket::unsent;
use crate::model::{Exclusion, Method, Plan, Poller, Scan, SkipReason, SpinRisk, Target};
use crate::privileges::Privileges;
use crate::sock_diag::Protocol;

/// What the operator permits.
#[derive(Clone, Debug)]
pub struct Policy {
    /// The methods to try, in this order.
    pub methods: Vec<Method>,
    /// Whether unsent bytes may be lost.
    pub discard_unsent: bool,
    /// The maximum number of sockets to act on, the oldest first.
    pub max_kills: Option<usize>,
    /// Whether the operator gave a minimum age, a minimum idle time or `--active`, or watches for open connections. Without one of these,
    /// cwkill never closes an open connection.
    pub has_min_time: bool,
    /// Whether a close may make an owner spin.
    pub allow_spin: bool,
    /// Whether the descriptors of closed sockets will be closed too, also those in an epoll set (`--reclaim --reclaim-force`).
    pub frees_epoll_members: bool,
}

/// As [`decide`] and [`limit`].
pub fn build(scan: &mut Scan, policy: &Policy, privileges: &Privileges) {
    decide(scan, policy, privileges);
    limit(scan, policy.max_kills);
}

/// Plans every target of `scan` that has no outcome yet, without the limit on the number of targets. A target with an outcome keeps
/// its plan.
pub fn decide(scan: &mut Scan, policy: &Policy, privileges: &Privileges) {
    let undecided = scan.targets.par_iter_mut();
    let undecided = undecided.filter(|target| target.outcome.is_none());
    undecided.for_each(|target| {
        target.plan = plan_one(target, scan.owners_known, policy, privileges);
    });
}

/// Skips all but the first `max_kills` targets of `scan` that have no outcome yet and would be acted on. After everything that can
/// skip one.
pub fn limit(scan: &mut Scan, max_kills: Option<usize>) {
    let undecided = |target: &&mut Target| target.outcome.is_none() && target.plan.skip.is_none();
    let targets = scan.targets.iter_mut().filter(undecided);
    // The targets are sorted, the oldest first.
    for target in targets.skip(max_kills.unwrap_or(usize::MAX)) {
        target.plan.methods.clear();
        target.plan.skip = Some(SkipReason::OverMaxKills);
    }
}

/// The plan for one target, without the limit on the number of targets.
fn plan_one(target: &Target, owners_known: bool, policy: &Policy, privileges: &Privileges) -> Plan {
    let mut plan = Plan::default();
    for &method in &policy.methods {
        match exclusion(method, target, policy, privileges) {
            None => plan.methods.push(method),
            Some(Exclusion::NoOwner) if !owners_known => {
                plan.excluded.push((method, Exclusion::OwnersNotSearched));
            }
            Some(why) => plan.excluded.push((method, why)),
        }
    }
    // The kernel cannot finish an exchange of FINs. With IPv4 it cannot even send its own.
    if target.socket.address_gone && plan.methods.contains(&Method::Destroy) {
        let usable = plan.methods.len();
        plan.methods.retain(|method| *method != Method::Shutdown);
        if plan.methods.len() < usable {
            plan.excluded
                .push((Method::Shutdown, Exclusion::AddressGone));
        }
    }
    plan.skip = match plan.methods.is_empty() {
        true => Some(SkipReason::NoMethod),
        false => spin_skip(target.spin_risk, policy),
    };
    if plan.skip.is_some() {
        plan.methods.clear();
    }
    plan
}

/// The skip of a socket whose owner would spin. A descriptor that is closed leaves every epoll set.
fn spin_skip(risk: SpinRisk, policy: &Policy) -> Option<SkipReason> {
    match risk {
        _ if policy.allow_spin => None,
        SpinRisk::Paused {
            by: Poller::Epoll(_),
            ..
        } if policy.frees_epoll_members => None,
        risk => risk.would_spin(),
    }
}

/// The reason, if there is one, why `method` must not be used on `target`.
fn exclusion(
    method: Method,
    target: &Target,
    policy: &Policy,
    privileges: &Privileges,
) -> Option<Exclusion> {
    let socket = &target.socket;
    if let Some(why) =
        method.forbidden_by_state(socket, policy.has_min_time, privileges.kernel_version)
    {
        return Some(Exclusion::WrongState(socket.state, why));
    }
    if socket.protocol() == Protocol::Mptcp && !method.closes_mptcp() {
        return Some(match socket.cause.is_with_listener() {
            true => Exclusion::MptcpNotAccepted,
            false => Exclusion::Mptcp,
        });
    }
    if method.needs_descriptor() && target.owners.is_empty() {
        return Some(match socket.cause.is_with_listener() {
            true => Exclusion::NotAccepted,
            false => Exclusion::NoOwner,
        });
    }
    // RSTs and probes would leave this host, or stay without an answer.
    if socket.address_gone && matches!(method, Method::Rst | Method::Probe) {
        return Some(Exclusion::AddressGone);
    }
    let unsent = unsent(socket.state, socket.send_q);
    if method.discards_unsent() && unsent > 0 && !policy.discard_unsent {
        return Some(Exclusion::UnsentData(unsent));
    }
    let missing = method.privilege(!target.owners.is_empty());
    missing
        .filter(|privilege| !privileges.has(*privilege))
        .map(Exclusion::NotPermitted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::KernelVersion;
    use crate::model::{Outcome, Owner, Privilege, Socket};
    use crate::proc::RemoteFd;
    use crate::proc::testdata::process;
    use crate::sock_diag::testdata::stuck;
    use crate::tcp::TcpState;

    const ROOT: Privileges = Privileges {
        net_admin: true,
        net_raw: true,
        kernel_version: KernelVersion::ABORTS_ORPHANS,
    };
    const USER: Privileges = Privileges {
        net_admin: false,
        net_raw: false,
        ..ROOT
    };

    fn policy() -> Policy {
        Policy {
            methods: Method::AUTO.to_vec(),
            discard_unsent: false,
            max_kills: None,
            has_min_time: false,
            allow_spin: false,
            frees_epoll_members: false,
        }
    }

    fn unowned(send_q: u32) -> Target {
        let mut message = stuck("10.0.0.1:80", "10.0.0.2:5", 1);
        message.send_q = send_q;
        Target::new(Socket::from_message(&message))
    }

    fn owned(send_q: u32) -> Target {
        let mut target = unowned(send_q);
        let owner = Owner::new(process(7, "app"), RemoteFd(3));
        target.owners.push(owner);
        target
    }

    fn never_accepted() -> Target {
        let mut message = stuck("10.0.0.1:80", "10.0.0.2:5", 1);
        message.inode = 0;
        Target::new(Socket::from_message(&message))
    }

    fn scan(targets: Vec<Target>) -> Scan {
        Scan {
            owners_known: true,
            targets,
            ..Scan::default()
        }
    }

    fn plan(target: Target, policy: &Policy, privileges: &Privileges) -> Plan {
        let mut scan = scan(vec![target]);
        build(&mut scan, policy, privileges);
        scan.targets.remove(0).plan
    }

    #[test]
    fn an_idle_socket_gets_every_method() {
        let plan = plan(owned(0), &policy(), &ROOT);
        assert_eq!(plan.methods, Method::AUTO);
        assert_eq!(plan.skip, None);
    }

    #[test]
    fn an_mptcp_socket_is_closed_through_its_descriptor_only() {
        let all = Policy {
            methods: Method::ALL.to_vec(),
            ..policy()
        };
        let mptcp = |mut target: Target| {
            target.socket.id = target.socket.id.with_token(7);
            plan(target, &all, &ROOT)
        };
        let excluded = [Method::Probe, Method::Destroy, Method::Rst];
        let owned_plan = mptcp(owned(0));
        assert_eq!(owned_plan.methods, [Method::Shutdown]);
        assert_eq!(
            owned_plan.excluded,
            excluded.map(|method| (method, Exclusion::Mptcp))
        );
        let backlog = mptcp(never_accepted());
        assert_eq!(backlog.skip, Some(SkipReason::NoMethod));
        let shutdown = (Method::Shutdown, Exclusion::NotAccepted);
        assert!(backlog.excluded.contains(&shutdown));
        let others = excluded.map(|method| (method, Exclusion::MptcpNotAccepted));
        assert!(others.iter().all(|one| backlog.excluded.contains(one)));
    }

    #[test]
    fn unsent_bytes_forbid_the_methods_that_would_lose_them() {
        let protected = plan(owned(9), &policy(), &ROOT);
        assert_eq!(protected.methods, [Method::Shutdown]);
        assert_eq!(
            protected.excluded,
            [
                (Method::Destroy, Exclusion::UnsentData(9)),
                (Method::Rst, Exclusion::UnsentData(9))
            ]
        );
        let allowed = Policy {
            discard_unsent: true,
            ..policy()
        };
        assert_eq!(plan(owned(9), &allowed, &ROOT).methods, Method::AUTO);
    }

    #[test]
    fn without_the_local_address_only_destroy_ends_it_at_once() {
        let gone = |send_q| {
            let mut target = owned(send_q);
            target.socket.address_gone = true;
            target
        };
        let all = Policy {
            methods: Method::ALL.to_vec(),
            ..policy()
        };
        let idle = plan(gone(0), &all, &ROOT);
        assert_eq!(idle.methods, [Method::Destroy]);
        let excluded = [Method::Probe, Method::Rst, Method::Shutdown];
        assert_eq!(
            idle.excluded,
            excluded.map(|method| (method, Exclusion::AddressGone))
        );
        // Unsent bytes are not discarded for it, and without CAP_NET_ADMIN there is no other way.
        assert_eq!(plan(gone(9), &all, &ROOT).methods, [Method::Shutdown]);
        assert_eq!(plan(gone(0), &all, &USER).methods, [Method::Shutdown]);
    }

    #[test]
    fn without_a_descriptor_there_is_no_shutdown() {
        let backlog = plan(never_accepted(), &policy(), &ROOT);
        assert_eq!(backlog.methods, [Method::Destroy, Method::Rst]);
        assert_eq!(
            backlog.excluded,
            [(Method::Shutdown, Exclusion::NotAccepted)]
        );
        let unknown = plan(unowned(0), &policy(), &ROOT);
        assert_eq!(unknown.excluded, [(Method::Shutdown, Exclusion::NoOwner)]);
        let mut scan = scan(vec![unowned(0)]);
        scan.owners_known = false;
        build(&mut scan, &policy(), &ROOT);
        assert_eq!(
            scan.targets[0].plan.excluded,
            [(Method::Shutdown, Exclusion::OwnersNotSearched)]
        );
    }

    #[test]
    fn a_missing_capability_is_named() {
        let backlog = plan(never_accepted(), &policy(), &USER);
        assert!(backlog.methods.is_empty());
        assert_eq!(backlog.skip, Some(SkipReason::NoMethod));
        let needed = Exclusion::NotPermitted(Privilege::NetAdmin);
        assert!(backlog.excluded.contains(&(Method::Destroy, needed)));
        assert_eq!(plan(owned(0), &policy(), &USER).methods, [Method::Shutdown]);
    }

    #[test]
    fn raw_sockets_are_needed_without_a_descriptor() {
        let asked = Policy {
            methods: vec![Method::Probe, Method::Rst],
            ..policy()
        };
        let raw = |method| (method, Exclusion::NotPermitted(Privilege::NetRaw));
        let backlog = plan(never_accepted(), &asked, &USER);
        assert_eq!(backlog.excluded, [raw(Method::Probe), raw(Method::Rst)]);
        let owned_plan = plan(owned(0), &asked, &USER);
        assert_eq!(owned_plan.methods, [Method::Probe]);
        assert_eq!(owned_plan.excluded, [raw(Method::Rst)]);
        let only_raw = Privileges {
            net_raw: true,
            ..USER
        };
        assert_eq!(plan(owned(0), &asked, &only_raw).methods, asked.methods);
    }

    #[test]
    fn the_limit_counts_only_sockets_that_would_be_acted_on() {
        let mut only_destroy = policy();
        only_destroy.methods = vec![Method::Destroy];
        only_destroy.max_kills = Some(1);
        let mut scan = scan(vec![owned(9), owned(0), owned(0)]);
        build(&mut scan, &only_destroy, &ROOT);
        let plans: Vec<(&[Method], Option<SkipReason>)> = scan
            .targets
            .iter()
            .map(|target| (&target.plan.methods[..], target.plan.skip))
            .collect();
        assert_eq!(
            plans,
            [
                (&[][..], Some(SkipReason::NoMethod)),
                (&[Method::Destroy], None),
                (&[], Some(SkipReason::OverMaxKills)),
            ]
        );
    }

    #[test]
    fn a_target_with_an_outcome_keeps_its_plan_and_is_not_counted() {
        let mut done = owned(0);
        done.plan.methods = vec![Method::Rst];
        done.outcome = Some(Outcome::Closed(Method::Rst));
        let one = Policy {
            max_kills: Some(1),
            ..policy()
        };
        let mut scan = scan(vec![done.clone(), owned(0)]);
        build(&mut scan, &one, &ROOT);
        assert_eq!(scan.targets[0].plan, done.plan);
        assert_eq!(scan.targets[1].plan.methods, Method::AUTO);
    }

    fn in_state(state: TcpState, orphan: bool) -> Target {
        let mut target = owned(0);
        target.socket.state = state;
        if orphan {
            target.socket.inode = None;
            target.owners.clear();
        }
        target
    }

    #[test]
    fn an_owner_that_would_spin_is_spared() {
        let (epoll, poll) = (Poller::Epoll(RemoteFd(5)), Poller::Poll(8));
        let paused = |by, allow_spin, frees_epoll_members| {
            let policy = Policy {
                allow_spin,
                frees_epoll_members,
                ..policy()
            };
            let mut target = owned(0);
            target.spin_risk = SpinRisk::Paused { pid: 7, by };
            plan(target, &policy, &ROOT)
        };
        for by in [epoll, poll] {
            let spared = paused(by, false, false);
            assert_eq!(spared.skip, Some(SkipReason::WouldSpin { pid: 7, by }));
            assert_eq!(spared.methods, []);
            assert_eq!(paused(by, true, false).methods, Method::AUTO);
        }
        assert_eq!(paused(epoll, false, true).methods, Method::AUTO);
        // The descriptor of a poll(2) must stay: without it the poll does not wait any more.
        assert!(paused(poll, false, true).skip.is_some());
    }

    #[test]
    fn an_open_connection_needs_an_age() {
        let open = || in_state(TcpState::Established, false);
        assert!(plan(open(), &policy(), &ROOT).methods.is_empty());
        let idle = Policy {
            has_min_time: true,
            ..policy()
        };
        assert_eq!(plan(open(), &idle, &ROOT).methods, Method::AUTO);
    }

    #[test]
    fn a_socket_that_is_shut_down_already_is_aborted() {
        use TcpState::{Closing, FinWait1, FinWait2, LastAck, TimeWait};
        for state in [FinWait1, FinWait2, LastAck, Closing, TimeWait] {
            let plan = plan(in_state(state, false), &policy(), &ROOT);
            assert!(!plan.methods.contains(&Method::Shutdown), "{state}");
            assert!(plan.methods.contains(&Method::Destroy), "{state}");
        }
    }

    #[test]
    fn an_orphan_is_not_left_for_ever() {
        let old = Privileges {
            kernel_version: KernelVersion(6, 10),
            ..ROOT
        };
        let orphan = || in_state(TcpState::FinWait1, true);
        let refused = plan(orphan(), &policy(), &old);
        assert!(refused.methods.is_empty());
        assert!(refused.excluded[0].1.to_string().contains("FIN-WAIT-1"));
        assert!(!plan(orphan(), &policy(), &ROOT).methods.is_empty());
        let owned_plan = plan(in_state(TcpState::FinWait1, false), &policy(), &old);
        assert!(!owned_plan.methods.is_empty());
    }

    #[test]
    fn a_listener_is_never_closed() {
        use TcpState::{Close, Listen, SynSent, Unknown};
        let anything = Policy {
            has_min_time: true,
            discard_unsent: true,
            ..policy()
        };
        for state in [Listen, SynSent, Close, Unknown(99)] {
            let plan = plan(in_state(state, false), &anything, &ROOT);
            assert!(plan.methods.is_empty(), "{state}");
        }
    }
}
