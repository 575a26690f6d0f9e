//! sock_diag: the kernel's own list of sockets, and the way to name one of them exactly.
//!
//! [`codec`] turns bytes into values and back and does no I/O; [`socket`] talks to the kernel.
//! Sources: sock_diag(7), include/uapi/linux/inet_diag.h, net/ipv4/inet_diag.c.

pub mod codec;
pub mod socket;
#[cfg(test)]
pub(crate) mod testdata;

pub use codec::{Cookie, Detail, DiagId, DumpRequest, Family, SocketMessage};
pub use socket::{DestroyError, DumpError, LookupError, SockDiag};
