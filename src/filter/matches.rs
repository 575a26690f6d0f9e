//! Compares an expression with one socket. cwkill applies this to every socket, also after the filter in the kernel.

use std::net::{IpAddr, Ipv6Addr};

use ipnet::IpNet;

use super::{Cgroup2, End, Ephemeral, Expression, Interface};
use crate::model::Socket;
use crate::sock_diag::Family;
use crate::tcp::{TcpState, Tuple};

/// The facts about a socket that an expression can use.
#[derive(Clone, Copy, Debug)]
pub struct SocketFacts {
    pub family: Family,
    pub tuple: Tuple,
    pub state: TcpState,
    /// The index of the interface that the socket is bound to, 0 for none.
    pub interface: u32,
    /// The cgroup in which it was made; `None` if the kernel does not report it (before Linux 5.8, and in TIME-WAIT and SYN-RECV).
    pub cgroup: Option<u64>,
}

impl From<&Socket> for SocketFacts {
    fn from(socket: &Socket) -> Self {
        SocketFacts {
            family: socket.id.family(),
            tuple: socket.tuple(),
            state: socket.state,
            interface: socket.id.interface(),
            cgroup: socket.cgroup_id,
        }
    }
}

impl Expression {
    /// Whether the expression is true for a socket. A name that [`Expression::resolved`] has not replaced is false.
    pub fn matches(&self, facts: &SocketFacts) -> bool {
        match self {
            Expression::All(parts) => parts.iter().all(|part| part.matches(facts)),
            Expression::Any(parts) => parts.iter().any(|part| part.matches(facts)),
            Expression::Not(inner) => !inner.matches(facts),
            Expression::Port(end, range) => range.contains(&facts.end(*end).port()),
            Expression::Address(end, network) => facts.is_in(*end, network),
            Expression::State(states) => states.contains(facts.state),
            Expression::Interface(Interface::Index(index)) => facts.interface == *index,
            Expression::Autobound(Ephemeral::Range(range)) => {
                range.contains(&facts.end(End::Local).port())
            }
            Expression::Cgroup(Cgroup2::Id(id)) => facts.cgroup == Some(*id),
            Expression::Interface(Interface::Named(_)) => false,
            Expression::Cgroup(Cgroup2::Path(_)) => false,
            Expression::Autobound(Ephemeral::Unread) => false,
        }
    }
}

impl SocketFacts {
    fn end(&self, end: End) -> std::net::SocketAddr {
        match end {
            End::Local => self.tuple.local,
            End::Peer => self.tuple.peer,
        }
    }

    fn is_in(&self, end: End, network: &IpNet) -> bool {
        match (network, self.end(end).ip(), self.family) {
            (IpNet::V4(network), IpAddr::V4(address), _) => network.contains(&address),
            (IpNet::V4(_), IpAddr::V6(_), _) => false,
            (IpNet::V6(_), _, Family::V4) => false,
            (IpNet::V6(network), address, Family::V6) => {
                let address: Ipv6Addr = match address {
                    IpAddr::V4(mapped) => mapped.to_ipv6_mapped(),
                    IpAddr::V6(address) => address,
                };
                network.contains(&address)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filter::{Services, parse};

    fn matches(text: &str, family: Family, local: &str, peer: &str) -> bool {
        let facts = SocketFacts {
            family,
            tuple: Tuple {
                local: local.parse().unwrap(),
                peer: peer.parse().unwrap(),
            },
            state: TcpState::CloseWait,
            interface: 0,
            cgroup: None,
        };
        let services = Services::from_text("");
        parse(text, &services)
            .expect(text)
            .expression
            .matches(&facts)
    }

    /// Whether `text` matches `10.0.0.1:80 -> 10.0.0.2:4000` on AF_INET, the same on AF_INET6 (IPv4-mapped), and
    /// `[fd00::1]:80 -> [fd00::2]:4000`.
    fn families(text: &str) -> [bool; 3] {
        let v4 = |family| matches(text, family, "10.0.0.1:80", "10.0.0.2:4000");
        let v6 = matches(text, Family::V6, "[fd00::1]:80", "[fd00::2]:4000");
        [v4(Family::V4), v4(Family::V6), v6]
    }

    #[test]
    fn addresses_match_as_in_the_kernel() {
        for (text, expected) in [
            ("src 10.0.0.1", [true, true, false]),
            ("src 10.0.0.2", [false, false, false]),
            ("dst 10/8", [true, true, false]),
            ("src 0.0.0.0/0", [true, true, false]),
            ("src [fd00::1]", [false, false, true]),
            ("src fd00::/8", [false, false, true]),
            ("src ::/0", [false, true, true]),
            ("src [::ffff:10.0.0.1]", [false, true, false]),
            ("src *", [true, true, true]),
            ("src != 10.0.0.1", [false, false, true]),
            ("src = 10.0.0.1:80", [true, true, false]),
            ("src = 10.0.0.1:81", [false, false, false]),
            ("src :80", [true, true, true]),
            ("dst [fd00::2]:4000", [false, false, true]),
            ("src != [fd00::1]:81", [true, true, true]),
        ] {
            assert_eq!(families(text), expected, "{text}");
        }
    }

    #[test]
    fn ports_compare_as_numbers() {
        for (text, expected) in [
            ("sport = :80", true),
            ("sport 80", true),
            ("sport != 80", false),
            ("sport < 81", true),
            ("sport < 80", false),
            ("sport <= 80", true),
            ("sport > 79", true),
            ("sport > 80", false),
            ("sport >= 80", true),
            ("sport < 0", false),
            ("sport > 65535", false),
            ("sport >= 0", true),
            ("sport = *", true),
            ("sport != *", false),
            ("dport ge 4000 and dport le 4000", true),
        ] {
            assert_eq!(families(text), [expected; 3], "{text}");
        }
    }

    #[test]
    fn operators_bind_from_left_to_right_as_in_ss() {
        for (text, expected) in [
            // According to ss(8) `and` binds tighter than `or`, but in ss 6.1.0 it does not.
            ("sport 80 or sport 81 and sport 82", false),
            ("sport 80 or (sport 81 and sport 82)", true),
            ("sport 82 and sport 81 or sport 80", true),
            ("! sport 80 and sport 81", false),
            ("! (sport 80 and sport 81)", true),
            ("sport 80 dport 4000", true),
            ("sport 80 dport 4001", false),
        ] {
            assert_eq!(families(text), [expected; 3], "{text}");
        }
    }
}
