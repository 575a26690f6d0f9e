//! What would be done to each socket, and why some are left alone. Pure.

use std::fmt;

use crate::diagnosis::{self, Cause};
use crate::finder::{Found, Socket};
use crate::injector::MethodName;
use crate::privileges::{Need, Privileges};

/// What the operator allows to be done.
#[derive(Clone, Debug)]
pub struct Policy {
    /// The methods to try, in this order.
    pub methods: Vec<MethodName>,
    /// Whether bytes still queued to the peer may be lost.
    pub discard_unsent: bool,
    /// At most so many sockets are acted on, the oldest first.
    pub max_kills: Option<usize>,
}

/// What is planned for one socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The methods to try, one after the other until the socket is closed. Empty: it is left alone.
    pub methods: Vec<MethodName>,
    /// Methods that were wanted and cannot be used on this socket.
    pub left_out: Vec<(MethodName, LeftOut)>,
    /// Set when the socket is left alone whatever the methods could do.
    pub over_limit: bool,
}

/// Why a method is not tried on a socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LeftOut {
    /// It was never accepted, so there is no descriptor to act through.
    NotAccepted,
    /// No process that can be seen holds a descriptor of it.
    NoOwner,
    /// It would lose so many bytes that are queued to the peer.
    Unsent(u32),
    /// This process lacks a privilege.
    Needs(Need),
}

impl fmt::Display for LeftOut {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            LeftOut::NotAccepted => f.write_str("never accepted: no descriptor exists"),
            LeftOut::NoOwner => f.write_str("no known owner"),
            LeftOut::Unsent(bytes) => write!(
                f,
                "would lose {bytes} unsent bytes (--discard-unsent allows it)"
            ),
            LeftOut::Needs(need) => write!(f, "needs {need}"),
        }
    }
}

/// Plans for every socket of `found`, in the same order.
pub fn build(found: &Found, policy: &Policy, privileges: &Privileges) -> Vec<Plan> {
    let mut allowed = policy.max_kills.unwrap_or(usize::MAX);
    let plan = |socket| {
        let mut plan = plan_one(socket, policy, privileges);
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

fn plan_one(socket: &Socket, policy: &Policy, privileges: &Privileges) -> Plan {
    let mut plan = Plan {
        methods: Vec::new(),
        left_out: Vec::new(),
        over_limit: false,
    };
    for &method in &policy.methods {
        match obstacle(method, socket, policy, privileges) {
            None => plan.methods.push(method),
            Some(why) => plan.left_out.push((method, why)),
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
) -> Option<LeftOut> {
    if method.needs_descriptor() && socket.owners.is_empty() {
        return Some(match socket.cause {
            Cause::NotAccepted => LeftOut::NotAccepted,
            _ => LeftOut::NoOwner,
        });
    }
    let unsent = diagnosis::unsent(socket.state, socket.send_q);
    if method.discards_unsent() && unsent > 0 && !policy.discard_unsent {
        return Some(LeftOut::Unsent(unsent));
    }
    privileges.missing_for(method).map(LeftOut::Needs)
}
