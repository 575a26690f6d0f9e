//! The selection of sockets: the selectors of the command line, and expressions in the syntax of ss(8).
//!
//! - [`selectors`]: the options, with those of [`containers`]; [`forwarded`]: those for connections that are routed through this host;
//!   [`expr`]: the tree of an expression
//! - `parse`: text to tree, with `lexer`, `host`, `services` and `syntax_error`
//! - [`matches`](mod@matches): compares a tree with a socket; [`bytecode`]: the same tree as a filter that the kernel runs

pub mod bytecode;
pub mod containers;
pub mod expr;
pub mod forwarded;
mod host;
mod lexer;
pub mod matches;
mod netns_info;
mod parse;
pub mod selectors;
mod services;
mod syntax_error;

pub use expr::{Cgroup2, End, Ephemeral, Expression, Interface, MAX_DEPTH, Namespace, States};
pub use matches::SocketFacts;
pub use netns_info::ThisNamespace;
pub use parse::{Parsed, parse};
pub use services::Services;
pub use syntax_error::SyntaxError;

use crate::proc::netns::NetnsScope;
use selectors::Selectors;

/// The selectors of a command, and the network namespaces that it scans.
#[derive(Clone, Debug)]
pub struct Scope {
    pub selectors: Selectors,
    pub netns: NetnsScope,
    /// Notes for the operator before the first act, one per line.
    pub notes: Vec<String>,
}
