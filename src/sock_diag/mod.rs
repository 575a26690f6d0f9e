//! sock_diag: the kernel's tables of sockets, and the id that names one socket exactly.
//!
//! [`codec`] converts bytes to values and back without I/O; [`client`] talks to the kernel; `assembly` puts dumps together; `mptcp` joins the rows of an MPTCP
//! socket.
//! Sources: sock_diag(7), include/uapi/linux/inet_diag.h, net/ipv4/inet_diag.c,
//! net/mptcp/mptcp_diag.c.

mod assembly;
pub mod client;
pub mod codec;
mod mptcp;
#[cfg(test)]
pub(crate) mod testdata;

pub use assembly::DumpError;
pub use client::{DestroyError, LookupError, SockDiag};
pub use codec::{
    ByteCounters, Cookie, Detail, DiagId, DumpRequest, Family, Protocol, SocketMessage,
};
