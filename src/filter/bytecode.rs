//! Expressions as bytecode. The kernel runs it on every socket of a dump, before it copies the socket to user space.
//!
//! The bytecode accepts every socket that the expression matches, and may accept more: it cannot test states, for which the request
//! has a mask. [`Expression::matches`] then checks every socket.
//!
//! Sources: include/uapi/linux/inet_diag.h; net/ipv4/inet_diag.c, inet_diag_bc_audit (the valid bytecode) and inet_diag_bc_run (its
//! meaning). An operation is `code, yes, no`, followed by its argument. `yes` and `no` are offsets from the start of the operation.
//! A jump to the end means that the socket matches; a jump to four bytes beyond the end means that it does not. The audit follows
//! `yes` from operation to operation. `no` must lead forward to one of these operations.

use std::ops::RangeInclusive;

use ipnet::IpNet;

use super::{Cgroup2, End, Ephemeral, Expression, Interface};
use crate::sock_diag::Family;
use crate::tcp::StateSet;

/// cwkill does not send longer bytecode: the kernel audits it in quadratic time, and runs it with a bucket of its table locked. The
/// limit of the format is 64 KiB, the length of an attribute.
pub const MAX_BYTECODE: usize = 16 * 1024;

/// Operations of linux/inet_diag.h.
mod code {
    pub const JMP: u8 = 1;
    pub const S_GE: u8 = 2;
    pub const S_LE: u8 = 3;
    pub const D_GE: u8 = 4;
    pub const D_LE: u8 = 5;
    pub const AUTO: u8 = 6;
    pub const S_COND: u8 = 7;
    pub const D_COND: u8 = 8;
    /// Since Linux 4.0.
    pub const DEV_COND: u8 = 9;
    /// Since Linux 5.8.
    pub const CGROUP_COND: u8 = 13;
}

/// `struct inet_diag_bc_op`.
const OP_LEN: usize = 4;
/// The distance beyond the end to which a rejecting jump leads.
const BEYOND: usize = 4;

/// Translates `expression` for a dump of sockets in `states`. Empty if the kernel could reject no socket, or if the bytecode would be
/// longer than [`MAX_BYTECODE`].
pub fn bytecode(expression: &Expression, states: StateSet) -> Vec<u8> {
    let mut program = Program::default();
    match lower(expression, false, states) {
        Node::True => {}
        node => {
            let failing = program.emit(&node);
            let end = program.bytes.len();
            program.set_no(&failing, end + BEYOND);
        }
    }
    match program.bytes.len() {
        0..=MAX_BYTECODE => program.bytes,
        _ => Vec::new(),
    }
}

/// An expression without the conditions that the kernel cannot test. Only leaves are negated.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Node {
    True,
    False,
    All(Vec<Node>),
    Any(Vec<Node>),
    Test { test: Test, negated: bool },
}

/// The condition of one operation.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Test {
    AtLeast(End, u16),
    AtMost(End, u16),
    Port(End, u16),
    Address(End, IpNet),
    Interface(u32),
    Cgroup(u64),
    Autobound,
}

fn lower(expression: &Expression, negated: bool, states: StateSet) -> Node {
    let test = |test| Node::Test { test, negated };
    match (expression, negated) {
        (Expression::Not(inner), _) => lower(inner, !negated, states),
        (Expression::All(parts), false) | (Expression::Any(parts), true) => {
            all(parts.iter().map(|part| lower(part, negated, states)))
        }
        (Expression::Any(parts), false) | (Expression::All(parts), true) => {
            any(parts.iter().map(|part| lower(part, negated, states)))
        }
        (Expression::Port(end, range), false) => port_within(*end, range),
        (Expression::Port(end, range), true) => port_outside(*end, range),
        (Expression::Address(end, network), _) => test(Test::Address(*end, *network)),
        (Expression::Interface(Interface::Index(index)), _) => test(Test::Interface(*index)),
        (Expression::Cgroup(Cgroup2::Id(id)), _) => test(Test::Cgroup(*id)),
        (Expression::Autobound(Ephemeral::Range(_)), _) => test(Test::Autobound),
        (Expression::State(set), _) => {
            let possible = match negated {
                false => states.intersection(*set),
                true => states.without(*set),
            };
            match possible {
                StateSet::EMPTY => Node::False,
                // True for all dumped states, or for some of them; `Expression::matches` decides the latter.
                _ => Node::True,
            }
        }
        // Unresolved names. `Expression::matches` decides them.
        (Expression::Interface(Interface::Named(_)), _) => Node::True,
        (Expression::Cgroup(Cgroup2::Path(_)), _) => Node::True,
        (Expression::Autobound(Ephemeral::Unread), _) => Node::True,
    }
}

fn port_within(end: End, range: &RangeInclusive<u16>) -> Node {
    let test = |test| Node::Test {
        test,
        negated: false,
    };
    match (*range.start(), *range.end()) {
        (first, last) if first > last => Node::False,
        (0, u16::MAX) => Node::True,
        (first, last) if first == last => test(Test::Port(end, first)),
        (0, last) => test(Test::AtMost(end, last)),
        (first, u16::MAX) => test(Test::AtLeast(end, first)),
        (first, last) => Node::All(vec![
            test(Test::AtLeast(end, first)),
            test(Test::AtMost(end, last)),
        ]),
    }
}

fn port_outside(end: End, range: &RangeInclusive<u16>) -> Node {
    let (first, last) = (*range.start(), *range.end());
    if first > last {
        return Node::True;
    }
    let below = first.checked_sub(1).map(|below| 0..=below);
    let above = last.checked_add(1).map(|above| above..=u16::MAX);
    any([below, above]
        .into_iter()
        .flatten()
        .map(|range| port_within(end, &range)))
}

fn all(parts: impl Iterator<Item = Node>) -> Node {
    let mut kept = Vec::new();
    for part in parts {
        match part {
            Node::True => {}
            Node::False => return Node::False,
            Node::All(parts) => kept.extend(parts),
            part => kept.push(part),
        }
    }
    match kept.len() {
        0 => Node::True,
        1 => kept.remove(0),
        _ => Node::All(kept),
    }
}

fn any(parts: impl Iterator<Item = Node>) -> Node {
    let mut kept = Vec::new();
    for part in parts {
        match part {
            Node::True => return Node::True,
            Node::False => {}
            Node::Any(parts) => kept.extend(parts),
            part => kept.push(part),
        }
    }
    match kept.len() {
        0 => Node::False,
        1 => kept.remove(0),
        _ => Node::Any(kept),
    }
}

/// The bytecode so far.
///
/// The code of a node falls through if the node is true. Each method that appends code returns the offsets of the operations that
/// fail if the node is false. Their `no` is not set yet.
#[derive(Default)]
struct Program {
    bytes: Vec<u8>,
}

impl Program {
    fn emit(&mut self, node: &Node) -> Vec<usize> {
        // The bytecode is too long already, and will not be sent.
        if self.bytes.len() > MAX_BYTECODE {
            return Vec::new();
        }
        match node {
            Node::True => Vec::new(),
            Node::False => vec![self.op(code::JMP, &[])],
            Node::Test {
                test,
                negated: false,
            } => vec![self.test(test)],
            Node::Test {
                test,
                negated: true,
            } => {
                let operation = self.test(test);
                let jump = self.op(code::JMP, &[]);
                self.set_no(&[operation], self.bytes.len());
                vec![jump]
            }
            Node::All(parts) => parts.iter().flat_map(|part| self.emit(part)).collect(),
            Node::Any(parts) => {
                let mut succeeding = Vec::new();
                let mut failing = Vec::new();
                for (index, part) in parts.iter().enumerate() {
                    self.set_no(&failing, self.bytes.len());
                    failing = self.emit(part);
                    if index + 1 < parts.len() {
                        succeeding.push(self.op(code::JMP, &[]));
                    }
                }
                self.set_no(&succeeding, self.bytes.len());
                failing
            }
        }
    }

    fn test(&mut self, test: &Test) -> usize {
        let either = |end: &End, local, peer| match end {
            End::Local => local,
            End::Peer => peer,
        };
        match test {
            // The argument has the form of an operation, whose `no` is the port.
            Test::AtLeast(end, port) => {
                let [low, high] = port.to_ne_bytes();
                self.op(either(end, code::S_GE, code::D_GE), &[0, 0, low, high])
            }
            Test::AtMost(end, port) => {
                let [low, high] = port.to_ne_bytes();
                self.op(either(end, code::S_LE, code::D_LE), &[0, 0, low, high])
            }
            Test::Port(end, port) => {
                let argument = host_condition(0, 0, i32::from(*port), &[]);
                self.op(either(end, code::S_COND, code::D_COND), &argument)
            }
            Test::Address(end, network) => {
                let argument = match network {
                    IpNet::V4(network) => host_condition(
                        Family::V4.number(),
                        network.prefix_len(),
                        ANY_PORT,
                        &network.addr().octets(),
                    ),
                    IpNet::V6(network) => host_condition(
                        Family::V6.number(),
                        network.prefix_len(),
                        ANY_PORT,
                        &network.addr().octets(),
                    ),
                };
                self.op(either(end, code::S_COND, code::D_COND), &argument)
            }
            Test::Interface(index) => self.op(code::DEV_COND, &index.to_ne_bytes()),
            Test::Cgroup(id) => self.op(code::CGROUP_COND, &id.to_ne_bytes()),
            Test::Autobound => self.op(code::AUTO, &[]),
        }
    }

    /// Appends an operation and returns its offset. Its `no` is not set yet.
    fn op(&mut self, code: u8, argument: &[u8]) -> usize {
        let offset = self.bytes.len();
        let yes = u8::try_from(OP_LEN + argument.len()).expect("arguments are at most 24 bytes");
        self.bytes.extend([code, yes, 0, 0]);
        self.bytes.extend(argument);
        offset
    }

    /// Sets the `no` of `operations`, so that they jump to `target` if they fail.
    fn set_no(&mut self, operations: &[usize], target: usize) {
        for &operation in operations {
            // A distance beyond u16 is beyond MAX_BYTECODE too, and such bytecode is not sent.
            let distance = u16::try_from(target - operation).unwrap_or(u16::MAX);
            self.bytes[operation + 2..operation + 4].copy_from_slice(&distance.to_ne_bytes());
        }
    }
}

const ANY_PORT: i32 = -1;

/// `struct inet_diag_hostcond`: family, prefix_len, two bytes of padding, port, address.
fn host_condition(family: u8, length: u8, port: i32, address: &[u8]) -> Vec<u8> {
    let mut bytes = vec![family, length, 0, 0];
    bytes.extend(port.to_ne_bytes());
    bytes.extend(address);
    bytes
}

#[cfg(test)]
#[path = "bytecode_tests.rs"]
mod tests;
