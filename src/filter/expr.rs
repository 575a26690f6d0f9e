//! Expressions in the filter syntax of ss(8): `sport = :8080 and dst 10.0.0.0/8`.
//!
//! [`super::parse()`] converts text to a tree, [`Expression`]. [`super::matches`] compares the tree with a socket;
//! [`super::bytecode`] translates it for the kernel. docs/decisions/expressions.md lists the differences from ss.
//!
//! Invariant: a parsed tree has at most [`MAX_DEPTH`] levels, so recursion over it is safe.

use std::io;
use std::ops::RangeInclusive;

use ipnet::{IpNet, Ipv4Net};

use crate::tcp::StateSet;

/// The maximum depth of an expression. Parentheses count, and so do changes between `and` and `or`.
pub const MAX_DEPTH: usize = 200;

/// A condition on a socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Expression {
    /// All of these are true. An empty list is true.
    All(Vec<Expression>),
    /// At least one of these is true. An empty list is false.
    Any(Vec<Expression>),
    Not(Box<Expression>),
    /// The port at an end is in this range.
    Port(End, RangeInclusive<u16>),
    /// The address at an end is in this network.
    ///
    /// The comparison is that of the kernel (net/ipv4/inet_diag.c, inet_diag_bc_run). An IPv4 network matches IPv4 and IPv4-mapped
    /// addresses. An IPv6 network is compared with the bits of every address of an AF_INET6 socket, also of an IPv4-mapped one. It
    /// never matches an AF_INET socket.
    Address(End, IpNet),
    /// The state is one of these.
    State(StateSet),
    /// The socket is bound to this interface.
    Interface(Interface),
    /// The socket was made in exactly this cgroup v2, or accepted from a listener that was made in it. The present cgroups of its
    /// owners do not matter.
    Cgroup(Cgroup2),
    /// The kernel chose the local port, because bind(2) did not name one.
    Autobound(Ephemeral),
}

/// An end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// `src`, `sport`.
    Local,
    /// `dst`, `dport`.
    Peer,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Interface {
    /// The name in the text. It is valid in one network namespace only.
    Named(String),
    /// The index in that network namespace.
    Index(u32),
}

/// A cgroup of cgroup v2.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cgroup2 {
    /// The path in the text: below the mount point, or the directory itself.
    Path(String),
    /// The inode of its directory.
    Id(u64),
}

/// The ports that the kernel chooses itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ephemeral {
    /// Not read yet (net.ipv4.ip_local_port_range of the network namespace).
    Unread,
    Range(RangeInclusive<u16>),
}

/// The facts about a network namespace, and about the host, that an expression needs.
pub trait Namespace {
    /// The range of ports from which the kernel chooses.
    ///
    /// # Errors
    /// /proc/sys is not mounted.
    fn ephemeral_ports(&self) -> io::Result<RangeInclusive<u16>>;

    fn interface(&self, name: &str) -> Option<u32>;

    /// The id of the cgroup `path`: the inode of its directory.
    fn cgroup(&self, path: &str) -> Option<u64>;
}

/// The states of the sockets that an expression can match.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum States {
    /// The expression names no states.
    Unmentioned,
    /// Only sockets in these states can match.
    Within(StateSet),
    /// The expression names states, but sockets in any state can match because of another part.
    Partly,
}

impl Expression {
    /// Matches every socket.
    pub const TRUE: Expression = Expression::All(Vec::new());
    /// Matches no socket.
    pub const FALSE: Expression = Expression::Any(Vec::new());

    #[must_use]
    pub fn negated(self) -> Expression {
        match self {
            Expression::Not(inner) => *inner,
            other => Expression::Not(Box::new(other)),
        }
    }

    /// The address at `end` is an IPv4 address, on a socket of either family.
    pub fn over_ipv4(end: End) -> Expression {
        Expression::Address(end, IpNet::V4(Ipv4Net::default()))
    }

    pub fn states(&self) -> States {
        match self.possible_states(false) {
            _ if !self.mentions_states() => States::Unmentioned,
            Some(states) => States::Within(states),
            None => States::Partly,
        }
    }

    fn mentions_states(&self) -> bool {
        match self {
            Expression::All(parts) | Expression::Any(parts) => {
                parts.iter().any(Expression::mentions_states)
            }
            Expression::Not(inner) => inner.mentions_states(),
            Expression::State(_) => true,
            _ => false,
        }
    }

    /// Whether the expression has a condition besides states. Then it says which sockets are meant.
    pub fn says_more_than_states(&self) -> bool {
        match self {
            Expression::All(parts) | Expression::Any(parts) => {
                parts.iter().any(Expression::says_more_than_states)
            }
            Expression::Not(inner) => inner.says_more_than_states(),
            Expression::State(_) => false,
            _ => true,
        }
    }

    /// The first word of the expression that is about a socket of this host, and not about addresses and ports.
    pub fn word_about_a_socket(&self) -> Option<&'static str> {
        match self {
            Expression::All(parts) | Expression::Any(parts) => {
                parts.iter().find_map(Expression::word_about_a_socket)
            }
            Expression::Not(inner) => inner.word_about_a_socket(),
            Expression::Port(..) | Expression::Address(..) => None,
            Expression::State(_) => Some("state"),
            Expression::Interface(_) => Some("dev"),
            Expression::Cgroup(_) => Some("cgroup"),
            Expression::Autobound(_) => Some("autobound"),
        }
    }

    /// The states in which the expression, or its negation, can be true; `None` if it does not restrict them.
    fn possible_states(&self, negated: bool) -> Option<StateSet> {
        match (self, negated) {
            (Expression::State(states), false) => Some(*states),
            (Expression::State(states), true) => Some(StateSet::ALL.without(*states)),
            (Expression::Not(inner), _) => inner.possible_states(!negated),
            // One part that restricts the states is enough.
            (Expression::All(parts), false) | (Expression::Any(parts), true) => parts
                .iter()
                .filter_map(|part| part.possible_states(negated))
                .reduce(StateSet::intersection),
            // Every part must restrict the states.
            (Expression::Any(parts), false) | (Expression::All(parts), true) => parts
                .iter()
                .map(|part| part.possible_states(negated))
                .try_fold(StateSet::EMPTY, |all, part| Some(all.union(part?))),
            _ => None,
        }
    }

    /// The same expression, with names replaced by their values in the network namespace.
    ///
    /// # Errors
    /// An interface or a cgroup does not exist, or the namespace cannot be read.
    pub fn resolved(&self, namespace: &dyn Namespace) -> io::Result<Expression> {
        let each = |parts: &[Expression]| -> io::Result<Vec<Expression>> {
            parts.iter().map(|part| part.resolved(namespace)).collect()
        };
        Ok(match self {
            Expression::All(parts) => Expression::All(each(parts)?),
            Expression::Any(parts) => Expression::Any(each(parts)?),
            Expression::Not(inner) => Expression::Not(Box::new(inner.resolved(namespace)?)),
            Expression::Interface(Interface::Named(name)) => {
                let index = namespace.interface(name).or_else(|| name.parse().ok());
                let index = index.ok_or_else(|| {
                    io::Error::new(
                        io::ErrorKind::NotFound,
                        format!("no interface `{name}` in this network namespace"),
                    )
                })?;
                Expression::Interface(Interface::Index(index))
            }
            Expression::Cgroup(Cgroup2::Path(path)) => {
                let id = namespace.cgroup(path).ok_or_else(|| {
                    io::Error::new(
                        io::ErrorKind::NotFound,
                        format!(
                            "no cgroup {} in cgroup v2",
                            super::syntax_error::quoted(path)
                        ),
                    )
                })?;
                Expression::Cgroup(Cgroup2::Id(id))
            }
            Expression::Autobound(Ephemeral::Unread) => {
                Expression::Autobound(Ephemeral::Range(namespace.ephemeral_ports()?))
            }
            other => other.clone(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filter::{Services, parse};
    use crate::tcp::TcpState::{CloseWait, Established, LastAck};

    fn tree(text: &str) -> Expression {
        let services = Services::from_text("http 80/tcp www\n");
        parse(text, &services).expect(text).expression
    }

    #[test]
    fn states_alone_do_not_say_which_sockets() {
        for text in ["state close-wait", "state all", "not state connected"] {
            assert!(!tree(text).says_more_than_states(), "{text}");
        }
        for text in [
            "sport = :80",
            "state close-wait sport = :80",
            "not ( dst 10/8 )",
            "autobound",
        ] {
            assert!(tree(text).says_more_than_states(), "{text}");
        }
    }

    #[test]
    fn words_about_sockets_are_found() {
        for (text, word) in [
            ("sport = :80 or not ( dst 10/8 )", None),
            ("sport = :80 and not ( state close-wait )", Some("state")),
            ("dst 10/8 or dev eth0", Some("dev")),
            ("cgroup /a", Some("cgroup")),
            ("not autobound", Some("autobound")),
        ] {
            assert_eq!(tree(text).word_about_a_socket(), word, "{text}");
        }
    }

    #[test]
    fn states_that_can_match() {
        let set =
            |states: &[crate::tcp::TcpState]| States::Within(states.iter().copied().collect());
        for (text, states) in [
            ("sport = :80", States::Unmentioned),
            ("state close-wait", set(&[CloseWait])),
            ("state close-wait sport = :80", set(&[CloseWait])),
            ("sport = :80 state close-wait", set(&[CloseWait])),
            (
                "state close-wait state last-ack sport = :80 or dport = :80",
                set(&[CloseWait, LastAck]),
            ),
            (
                "state close-wait or state established",
                set(&[CloseWait, Established]),
            ),
            ("state close-wait or sport = :80", States::Partly),
            ("not (state close-wait sport = :80)", States::Partly),
            ("exclude all", set(&[])),
            ("not (exclude close-wait)", set(&[CloseWait])),
            ("state close-wait and not state close-wait", set(&[])),
        ] {
            assert_eq!(tree(text).states(), states, "{text}");
        }
    }

    struct Lab;

    impl Namespace for Lab {
        fn ephemeral_ports(&self) -> io::Result<RangeInclusive<u16>> {
            Ok(32_768..=60_999)
        }

        fn interface(&self, name: &str) -> Option<u32> {
            (name == "veth0").then_some(7)
        }

        fn cgroup(&self, path: &str) -> Option<u64> {
            (path == "/app.slice").then_some(99)
        }
    }

    #[test]
    fn names_are_resolved_where_they_are_applied() {
        let resolved = |text| tree(text).resolved(&Lab);
        let index = |index| Expression::Interface(Interface::Index(index));
        assert_eq!(resolved("dev veth0").unwrap(), index(7));
        assert_eq!(resolved("dev = 3").unwrap(), index(3));
        assert_eq!(resolved("dev != 3").unwrap(), index(3).negated());
        let error = resolved("sport 80 or not dev eth9").unwrap_err();
        assert!(error.to_string().contains("eth9"), "{error}");
        let cgroup = Expression::Cgroup(Cgroup2::Id(99));
        assert_eq!(resolved("cgroup = /app.slice").unwrap(), cgroup);
        assert_eq!(resolved("cgroup != /app.slice").unwrap(), cgroup.negated());
        let error = resolved("cgroup /nowhere").unwrap_err();
        assert!(error.to_string().contains("/nowhere"), "{error}");
        let range = Expression::Autobound(Ephemeral::Range(32_768..=60_999));
        assert_eq!(resolved("autobound").unwrap(), range);
    }
}
