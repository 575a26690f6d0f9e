//! States, address pairs, sequence numbers and segments, in the words of RFC 9293 and the kernel. All is pure, except that [`info`]
//! can ask the kernel about a socket.

pub mod info;
pub mod segment;
mod seq;
mod state;

pub use segment::{Segment, TcpFlags};
pub use seq::Seq;
pub use state::{StateSet, TcpState};

use std::fmt;
use std::net::SocketAddr;

/// The two endpoints of a connection, seen from the socket on this host.
///
/// Addresses are canonical: an IPv4-mapped IPv6 address is stored as IPv4.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tuple {
    pub local: SocketAddr,
    pub peer: SocketAddr,
}

impl Tuple {
    /// The pair from the view of the peer.
    #[must_use]
    pub fn reversed(self) -> Tuple {
        Tuple {
            local: self.peer,
            peer: self.local,
        }
    }
}

impl fmt::Display for Tuple {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} -> {}", self.local, self.peer)
    }
}
