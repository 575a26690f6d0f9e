//! What would be done to each socket, and why some are left alone. Pure.

use std::fmt;

use crate::finder::{Found, Socket};
use crate::injector::{MethodName, ORPHANS};
use crate::kernel::KernelVersion;
use crate::model::cause;
use crate::privileges::{Privilege, Privileges};
use crate::tcp::TcpState;

/// What the operator allows to be done.
#[derive(Clone, Debug)]
pub struct Policy {
    /// The methods to try, in this order.
    pub methods: Vec<MethodName>,
    /// Whether bytes still queued to the peer may be lost.
    pub discard_unsent: bool,
    /// At most so many sockets are acted on, the oldest first.
    pub max_kills: Option<usize>,
    /// Whether a minimum age was asked for, without which an open connection is never closed.
    pub idle_only: bool,
}

/// What is planned for one socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The methods to try, one after the other until the socket is closed. Empty: it is left alone.
    pub methods: Vec<MethodName>,
    /// Methods that were wanted and cannot be used on this socket.
    pub excluded: Vec<(MethodName, Exclusion)>,
    /// Set when the socket is left alone whatever the methods could do.
    pub over_limit: bool,
}

/// Why a method is not tried on a socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exclusion {
    /// It was never accepted, so there is no descriptor to act through.
    NotAccepted,
    /// No process that can be seen holds a descriptor of it.
    NoOwner,
    /// Nobody has looked for one.
    OwnersNotSought,
    /// It would lose so many bytes that are queued to the peer.
    Unsent(u32),
    /// This process lacks a privilege.
    Needs(Privilege),
    /// The socket's state does not allow it, for this reason.
    State(TcpState, &'static str),
}

impl fmt::Display for Exclusion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Exclusion::NotAccepted => f.write_str("never accepted: no descriptor exists"),
            Exclusion::NoOwner => f.write_str("no known owner"),
            Exclusion::OwnersNotSought => f.write_str("owners were not looked for (--no-owners)"),
            Exclusion::Unsent(bytes) => write!(
                f,
                "would lose {bytes} unsent bytes (--discard-unsent allows it)"
            ),
            Exclusion::Needs(need) => write!(f, "needs {need}"),
            Exclusion::State(state, why) => write!(f, "{state}: {why}"),
        }
    }
}

/// Plans for every socket of `found`, in the same order.
pub fn build(found: &Found, policy: &Policy, privileges: &Privileges) -> Vec<Plan> {
    let mut allowed = policy.max_kills.unwrap_or(usize::MAX);
    let plan = |socket| {
        let mut plan = one(socket, found.owners_sought, policy, privileges);
        if !plan.methods.is_empty() {
            match allowed.checked_sub(1) {
                Some(rest) => allowed = rest,
                None => {
                    plan.methods.clear();
                    plan.over_limit = true;
                }
            }
        }
        plan
    };
    // The oldest come first in `found`.
    found.sockets.iter().map(plan).collect()
}

/// Plans for one socket, whatever is planned for others.
pub fn one(socket: &Socket, owners_sought: bool, policy: &Policy, privileges: &Privileges) -> Plan {
    let mut plan = Plan {
        methods: Vec::new(),
        excluded: Vec::new(),
        over_limit: false,
    };
    for &method in &policy.methods {
        match obstacle(method, socket, policy, privileges) {
            None => plan.methods.push(method),
            Some(Exclusion::NoOwner) if !owners_sought => {
                plan.excluded.push((method, Exclusion::OwnersNotSought));
            }
            Some(why) => plan.excluded.push((method, why)),
        }
    }
    plan
}

/// What stands against using `method` on `socket`, if anything does.
fn obstacle(
    method: MethodName,
    socket: &Socket,
    policy: &Policy,
    privileges: &Privileges,
) -> Option<Exclusion> {
    if let Some(why) = forbidden_by_state(method, socket, policy, privileges) {
        return Some(Exclusion::State(socket.state, why));
    }
    if method.needs_descriptor() && socket.owners.is_empty() {
        return Some(match socket.cause.is_with_listener() {
            true => Exclusion::NotAccepted,
            false => Exclusion::NoOwner,
        });
    }
    let unsent = cause::unsent(socket.state, socket.send_q);
    if method.discards_unsent() && unsent > 0 && !policy.discard_unsent {
        return Some(Exclusion::Unsent(unsent));
    }
    let owned = !socket.owners.is_empty();
    privileges.missing_for(method, owned).map(Exclusion::Needs)
}

/// What the socket's state has against `method`, if anything.
fn forbidden_by_state(
    method: MethodName,
    socket: &Socket,
    policy: &Policy,
    privileges: &Privileges,
) -> Option<&'static str> {
    match socket.state {
        TcpState::CloseWait => None,
        TcpState::Established if policy.idle_only => None,
        TcpState::Established => Some("an open connection is only closed with --min-age"),
        // net/ipv4/af_inet.c, inet_shutdown and net/ipv4/tcp.c, tcp_shutdown: our FIN has been sent,
        // and shutdown(2) sends no other.
        TcpState::FinWait1
        | TcpState::FinWait2
        | TcpState::LastAck
        | TcpState::Closing
        | TcpState::TimeWait
            if method == MethodName::Shutdown =>
        {
            Some("our side is shut down already")
        }
        // The kernel keeps no time of the last ACK for it.
        TcpState::TimeWait if method == MethodName::Probe => Some("there is no one left to ask"),
        // Its listener answers an ACK with RST (net/ipv4/tcp_minisocks.c, tcp_check_req).
        TcpState::SynRecv if matches!(method, MethodName::Probe | MethodName::Rst) => {
            Some("a half-open request does not tell its sequence numbers")
        }
        TcpState::FinWait1 | TcpState::LastAck | TcpState::Closing
            if socket.inode.is_none()
                && privileges.kernel < KernelVersion::ABORTS_ORPHANS
                && (method == MethodName::Destroy || socket.state == TcpState::FinWait1) =>
        {
            Some(ORPHANS)
        }
        TcpState::FinWait1
        | TcpState::FinWait2
        | TcpState::LastAck
        | TcpState::Closing
        | TcpState::TimeWait
        | TcpState::SynRecv => None,
        TcpState::Listen => Some("closing a listener takes its service down; stop the service"),
        TcpState::SynSent => Some("its application is still opening it"),
        TcpState::Close | TcpState::Unknown(_) => Some("it is no connection"),
    }
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
