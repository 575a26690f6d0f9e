//! sock_diag: the kernel's own list of sockets, and the way to name one of them exactly.
//!
//! [`codec`] turns bytes into values and back and does no I/O; [`client`] talks to the kernel.
//! Sources: sock_diag(7), include/uapi/linux/inet_diag.h, net/ipv4/inet_diag.c.

pub mod client;
pub mod codec;
#[cfg(test)]
pub(crate) mod testdata;

pub use client::{DestroyError, DumpError, LookupError, SockDiag};
pub use codec::{Cookie, Detail, DiagId, DumpRequest, Family, SocketMessage};
