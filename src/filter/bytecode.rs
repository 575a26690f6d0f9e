//! Expressions as bytecode that the kernel runs on every socket of a dump, before it copies anything.
//!
//! The bytecode lets through every socket that the expression matches; what it cannot say (states, which
//! are the mask of the request) it leaves to [`Expression::matches`], which judges every socket again.
//!
//! Sources: include/uapi/linux/inet_diag.h; net/ipv4/inet_diag.c, inet_diag_bc_audit (what the kernel
//! takes) and inet_diag_bc_run (what it means). An operation is `code, yes, no` with its argument behind
//! it; `yes` and `no` are offsets from the operation. It is reached at the end exactly: match. A jump of
//! four bytes beyond the end: no match. The audit follows `yes` from one operation to the next and lets
//! `no` only land on one of them, forwards.

use std::ops::RangeInclusive;

use ipnet::IpNet;

use super::{Cgroup2, End, Ephemeral, Expression, Interface};
use crate::sock_diag::Family;
use crate::tcp::StateSet;

/// Longer bytecode is not sent: the kernel runs it with a bucket of its table locked, and checks it in
/// quadratic time. The format itself ends at 64 KiB, the length of an attribute.
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
/// How far beyond the end a jump rejects.
const BEYOND: usize = 4;

/// Translates `expression`, for a dump of sockets in `states`; empty when there is nothing that the
/// kernel could sort out, or it would be too long.
pub fn bytecode(expression: &Expression, states: StateSet) -> Vec<u8> {
    let mut program = Program::default();
    match lower(expression, false, states) {
        Node::True => {}
        node => {
            let failing = program.emit(&node);
            let end = program.bytes.len();
            program.land(&failing, end + BEYOND);
        }
    }
    match program.bytes.len() {
        0..=MAX_BYTECODE => program.bytes,
        _ => Vec::new(),
    }
}

/// An expression without what the kernel cannot judge, negations only at its leaves.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Node {
    True,
    False,
    All(Vec<Node>),
    Any(Vec<Node>),
    Test { test: Test, negated: bool },
}

/// What one operation judges.
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
        (Expression::State(wanted), _) => {
            let possible = match negated {
                false => states.intersection(*wanted),
                true => states.without(*wanted),
            };
            match possible {
                StateSet::EMPTY => Node::False,
                // True of every state that is dumped, or for the predicate to tell.
                _ => Node::True,
            }
        }
        // Never true, and not of the kernel's making.
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

/// Bytecode in the making. What is emitted is fallen through when it holds; the places of the operations
/// whose `no` is still to be set, for when it does not, are returned.
#[derive(Default)]
struct Program {
    bytes: Vec<u8>,
}

impl Program {
    fn emit(&mut self, node: &Node) -> Vec<usize> {
        // Too long already: what follows is thrown away.
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
                let held = self.test(test);
                let jump = self.op(code::JMP, &[]);
                self.land(&[held], self.bytes.len());
                vec![jump]
            }
            Node::All(parts) => parts.iter().flat_map(|part| self.emit(part)).collect(),
            Node::Any(parts) => {
                let mut held = Vec::new();
                let mut failing = Vec::new();
                for (at, part) in parts.iter().enumerate() {
                    self.land(&failing, self.bytes.len());
                    failing = self.emit(part);
                    if at + 1 < parts.len() {
                        held.push(self.op(code::JMP, &[]));
                    }
                }
                self.land(&held, self.bytes.len());
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
            // The port is the `no` of an operation that is an argument.
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

    /// Appends an operation and returns where it is; `no` is still to be set.
    fn op(&mut self, code: u8, argument: &[u8]) -> usize {
        let at = self.bytes.len();
        let yes = u8::try_from(OP_LEN + argument.len()).expect("arguments are at most 24 bytes");
        self.bytes.extend([code, yes, 0, 0]);
        self.bytes.extend(argument);
        at
    }

    /// Lets the operations `from` jump to `target` when they do not hold.
    fn land(&mut self, from: &[usize], target: usize) {
        for &at in from {
            // Beyond u16 it is beyond MAX_BYTECODE too, and never sent.
            let offset = u16::try_from(target - at).unwrap_or(u16::MAX);
            self.bytes[at + 2..at + 4].copy_from_slice(&offset.to_ne_bytes());
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
