//! The wire format of sock_diag for TCP and MPTCP, as pure functions over bytes.
//!
//! netlink-packet-core splits a datagram into frames and attributes. `struct inet_diag_msg`, `struct tcp_info` and `struct mptcp_info`
//! are parsed here, without an allocation per socket. The kernel's structs only grow: unknown fields at the end are ignored, and a
//! field that a shorter struct lacks is `None`.
//!
//! [`DiagId`] identifies a socket; `request` writes requests; `reply` parses the answers; `mptcp` parses what only MPTCP has.

mod activity;
mod id;
mod mptcp;
mod reply;
mod request;
#[cfg(test)]
mod tests;

pub use activity::{ByteCounters, Quiet};
pub use id::{Cookie, DiagId, Family, Protocol};
pub use mptcp::MptcpSocket;
pub use reply::{Frame, Framed, Malformed, SocketMessage, frames};
pub use request::{Detail, DumpRequest, put_destroy, put_lookup};

/// Message type of requests and of replies that describe a socket (linux/sock_diag.h).
pub const SOCK_DIAG_BY_FAMILY: u16 = 20;
/// Message type of a request to abort a socket (linux/sock_diag.h).
pub const SOCK_DESTROY: u16 = 21;

/// `struct inet_diag_sockid`: ports 2+2, addresses 16+16, interface 4, cookie 8.
const SOCKID_LEN: usize = 48;
/// The kind of the attribute with `struct tcp_info` or `struct mptcp_info`, and the bit that requests it (linux/inet_diag.h).
const INET_DIAG_INFO: u16 = 2;

/// A u64 in host byte order. The caller has checked the length.
fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_ne_bytes(bytes[offset..offset + 8].try_into().expect("8 bytes"))
}

/// A u32 in host byte order. The caller has checked the length.
fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_ne_bytes(bytes[offset..offset + 4].try_into().expect("4 bytes"))
}
