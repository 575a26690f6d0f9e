//! Plans the methods for each socket, and says why others are excluded. Pure.

use crate::model::socket::unsent;
use crate::model::{Exclusion, Method, Plan, Scan, SkipReason, Target};
use crate::privileges::Privileges;

/// What the operator permits.
#[derive(Clone, Debug)]
pub struct Policy {
    /// The methods to try, in this order.
    pub methods: Vec<Method>,
    /// Whether unsent bytes may be lost.
    pub discard_unsent: bool,
    /// The maximum number of sockets to act on, the oldest first.
    pub max_kills: Option<usize>,
    /// Whether the operator gave a minimum age. Without one, cwkill never closes an open connection.
    pub idle_only: bool,
}

/// Plans every target of `scan`.
pub fn build(scan: &mut Scan, policy: &Policy, privileges: &Privileges) {
    let mut allowed = policy.max_kills.unwrap_or(usize::MAX);
    // The targets are sorted, the oldest first.
    for target in &mut scan.targets {
        target.plan = plan_one(target, scan.owners_known, policy, privileges);
        if target.plan.skip.is_none() {
            match allowed.checked_sub(1) {
                Some(rest) => allowed = rest,
                None => {
                    target.plan.methods.clear();
                    target.plan.skip = Some(SkipReason::OverMaxKills);
                }
            }
        }
    }
}

/// The plan for one target, without the limit on the number of targets.
pub fn plan_one(
    target: &Target,
    owners_known: bool,
    policy: &Policy,
    privileges: &Privileges,
) -> Plan {
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
    plan.skip = plan.methods.is_empty().then_some(SkipReason::NoMethod);
    plan
}

/// The reason, if there is one, why `method` must not be used on `target`.
fn exclusion(
    method: Method,
    target: &Target,
    policy: &Policy,
    privileges: &Privileges,
) -> Option<Exclusion> {
    let socket = &target.socket;
    if let Some(why) = method.forbidden_by_state(socket, policy.idle_only, privileges.kernel) {
        return Some(Exclusion::WrongState(socket.state, why));
    }
    if method.needs_descriptor() && target.owners.is_empty() {
        return Some(match socket.cause.is_with_listener() {
            true => Exclusion::NotAccepted,
            false => Exclusion::NoOwner,
        });
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
    use crate::finder::{Held, RemoteFd};
    use crate::sock_diag::testdata::stuck;

    const ROOT: Privileges = Privileges {
        net_admin: true,
        net_raw: true,
        kernel: KernelVersion::ABORTS_ORPHANS,
    };
    const USER: Privileges = Privileges {
        net_admin: false,
        net_raw: false,
        ..ROOT
    };

    fn policy() -> Policy {
        Policy {
            methods: MethodName::AUTO.to_vec(),
            discard_unsent: false,
            max_kills: None,
            idle_only: false,
        }
    }

    fn owned(send_q: u32) -> Socket {
        let mut message = stuck("10.0.0.1:80", "10.0.0.2:5", 1);
        message.send_q = send_q;
        let mut socket = Socket::from_message(&message);
        socket.owners.push(Held {
            process: 0,
            fd: RemoteFd(3),
        });
        socket
    }

    fn never_accepted() -> Socket {
        let mut message = stuck("10.0.0.1:80", "10.0.0.2:5", 1);
        message.inode = 0;
        Socket::from_message(&message)
    }

    fn plan(socket: Socket, policy: &Policy, privileges: &Privileges) -> Plan {
        let found = Found {
            owners_sought: true,
            sockets: vec![socket],
            ..Found::default()
        };
        build(&found, policy, privileges).remove(0)
    }

    #[test]
    fn an_idle_socket_gets_every_method() {
        assert_eq!(plan(owned(0), &policy(), &ROOT).methods, MethodName::AUTO);
    }

    #[test]
    fn unsent_bytes_forbid_what_would_lose_them() {
        let protected = plan(owned(9), &policy(), &ROOT);
        assert_eq!(protected.methods, [MethodName::Shutdown]);
        assert_eq!(
            protected.excluded,
            [
                (MethodName::Destroy, Exclusion::Unsent(9)),
                (MethodName::Rst, Exclusion::Unsent(9))
            ]
        );
        let allowed = Policy {
            discard_unsent: true,
            ..policy()
        };
        assert_eq!(plan(owned(9), &allowed, &ROOT).methods, MethodName::AUTO);
    }

    #[test]
    fn without_a_descriptor_there_is_no_shutdown() {
        let socket = plan(never_accepted(), &policy(), &ROOT);
        assert_eq!(socket.methods, [MethodName::Destroy, MethodName::Rst]);
        assert_eq!(
            socket.excluded,
            [(MethodName::Shutdown, Exclusion::NotAccepted)]
        );
        let mut orphaned = owned(0);
        orphaned.owners.clear();
        let unknown = plan(orphaned, &policy(), &ROOT);
        assert_eq!(
            unknown.excluded,
            [(MethodName::Shutdown, Exclusion::NoOwner)]
        );
    }

    #[test]
    fn a_missing_capability_is_named() {
        let socket = plan(never_accepted(), &policy(), &USER);
        assert!(socket.methods.is_empty());
        assert!(
            socket
                .excluded
                .contains(&(MethodName::Destroy, Exclusion::Needs(Privilege::NetAdmin)))
        );
        assert_eq!(
            plan(owned(0), &policy(), &USER).methods,
            [MethodName::Shutdown]
        );
    }

    #[test]
    fn raw_sockets_are_needed_where_no_descriptor_is() {
        let wanted = Policy {
            methods: vec![MethodName::Probe, MethodName::Rst],
            ..policy()
        };
        let raw = |method| (method, Exclusion::Needs(Privilege::NetRaw));
        let socket = plan(never_accepted(), &wanted, &USER);
        assert_eq!(
            socket.excluded,
            [raw(MethodName::Probe), raw(MethodName::Rst)]
        );
        let socket = plan(owned(0), &wanted, &USER);
        assert_eq!(socket.methods, [MethodName::Probe]);
        assert_eq!(socket.excluded, [raw(MethodName::Rst)]);
        let only_raw = Privileges {
            net_raw: true,
            ..USER
        };
        assert_eq!(plan(owned(0), &wanted, &only_raw).methods, wanted.methods);
    }

    #[test]
    fn the_limit_counts_only_what_would_be_acted_on() {
        let mut only_destroy = policy();
        only_destroy.methods = vec![MethodName::Destroy];
        only_destroy.max_kills = Some(1);
        let found = Found {
            owners_sought: true,
            sockets: vec![owned(9), owned(0), owned(0)],
            ..Found::default()
        };
        let plans = build(&found, &only_destroy, &ROOT);
        let acts: Vec<bool> = plans.iter().map(|plan| !plan.methods.is_empty()).collect();
        assert_eq!(acts, [false, true, false]);
        let over: Vec<bool> = plans.iter().map(|plan| plan.over_limit).collect();
        assert_eq!(over, [false, false, true]);
    }

    fn in_state(state: TcpState, orphan: bool) -> Socket {
        let mut socket = owned(0);
        socket.state = state;
        if orphan {
            socket.inode = None;
            socket.owners.clear();
        }
        socket
    }

    #[test]
    fn an_open_connection_needs_an_age() {
        let open = || in_state(TcpState::Established, false);
        assert!(plan(open(), &policy(), &ROOT).methods.is_empty());
        let idle = Policy {
            idle_only: true,
            ..policy()
        };
        assert_eq!(plan(open(), &idle, &ROOT).methods, MethodName::AUTO);
    }

    #[test]
    fn what_is_shut_down_already_is_aborted() {
        use TcpState::{Closing, FinWait1, FinWait2, LastAck, TimeWait};
        for state in [FinWait1, FinWait2, LastAck, Closing, TimeWait] {
            let plan = plan(in_state(state, false), &policy(), &ROOT);
            assert!(!plan.methods.contains(&MethodName::Shutdown), "{state}");
            assert!(plan.methods.contains(&MethodName::Destroy), "{state}");
        }
    }

    #[test]
    fn an_orphan_is_not_left_for_ever() {
        let old = Privileges {
            kernel: KernelVersion(6, 10),
            ..ROOT
        };
        let orphan = || in_state(TcpState::FinWait1, true);
        let refused = plan(orphan(), &policy(), &old);
        assert!(refused.methods.is_empty());
        assert!(refused.excluded[0].1.to_string().contains("FIN-WAIT-1"));
        assert!(!plan(orphan(), &policy(), &ROOT).methods.is_empty());
        let held = plan(in_state(TcpState::FinWait1, false), &policy(), &old);
        assert!(!held.methods.is_empty());
    }

    #[test]
    fn a_listener_is_never_closed() {
        use TcpState::{Close, Listen, SynSent, Unknown};
        let anything = Policy {
            idle_only: true,
            discard_unsent: true,
            ..policy()
        };
        for state in [Listen, SynSent, Close, Unknown(99)] {
            let plan = plan(in_state(state, false), &anything, &ROOT);
            assert!(plan.methods.is_empty(), "{state}");
        }
    }
}
