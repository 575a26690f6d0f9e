//! The identity of a socket: family, addresses, interface and cookie.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use strum::{Display, IntoStaticStr};

use super::{SOCKID_LEN, u32_at};
use crate::tcp::Tuple;

/// The address family of a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// AF_INET.
    V4,
    /// AF_INET6. The addresses of the socket may be IPv4-mapped.
    V6,
}

impl Family {
    /// Both families, in the order of the dumps.
    pub const ALL: [Family; 2] = [Family::V4, Family::V6];

    /// AF_INET or AF_INET6.
    pub fn number(self) -> u8 {
        match self {
            Family::V4 => 2,
            Family::V6 => 10,
        }
    }
}

/// The kernel's identity of a socket. The kernel gives each number once per boot.
///
/// Source: net/core/sock_diag.c, sock_gen_cookie. SO_COOKIE returns the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Cookie(pub u64);

impl fmt::Display for Cookie {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// The family of a socket and its `struct inet_diag_sockid`, byte for byte as the kernel dumped it.
///
/// cwkill sends it back unchanged, with interface and cookie. So a request is about exactly the socket that was dumped.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct DiagId {
    pub(super) family: Family,
    /// The token of an MPTCP socket, by which the kernel finds it; `None` for a TCP socket.
    pub(super) token: Option<u32>,
    pub(super) raw: [u8; SOCKID_LEN],
}

/// The protocol of a socket.
///
/// Its name in JSON and in the table is the variant in lower case.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Display, IntoStaticStr)]
#[strum(serialize_all = "lowercase")]
pub enum Protocol {
    #[default]
    Tcp,
    /// IPPROTO_MPTCP: one connection over several TCP connections, its subflows.
    Mptcp,
}

impl Protocol {
    /// The name in JSON and in the table.
    pub fn name(self) -> &'static str {
        self.into()
    }
}

impl DiagId {
    pub fn cookie(&self) -> Cookie {
        // Two u32 in host byte order, the low half first (sock_diag_save_cookie).
        let low = u64::from(u32_at(&self.raw, 40));
        let high = u64::from(u32_at(&self.raw, 44));
        Cookie(high << 32 | low)
    }

    pub fn family(&self) -> Family {
        self.family
    }

    pub fn protocol(&self) -> Protocol {
        match self.token {
            None => Protocol::Tcp,
            Some(_) => Protocol::Mptcp,
        }
    }

    /// The id of whichever TCP connection has this address pair now. Its cookie is INET_DIAG_NOCOOKIE, which matches every socket
    /// (net/core/sock_diag.c, sock_diag_check_cookie). It is only good for a lookup: without a connection the kernel returns the
    /// listener.
    pub(in crate::sock_diag) fn any_tcp(mut self) -> DiagId {
        self.token = None;
        self.raw[40..].fill(0xff);
        self
    }

    /// The index of the interface the socket is bound to, 0 for none.
    pub fn interface(&self) -> u32 {
        u32_at(&self.raw, 36)
    }

    /// The endpoints, with IPv4-mapped addresses written as IPv4.
    pub fn tuple(&self) -> Tuple {
        let address = |offset: usize| -> IpAddr {
            let bytes: [u8; 16] = self.raw[offset..offset + 16].try_into().expect("16 bytes");
            match self.family {
                Family::V4 => Ipv4Addr::new(bytes[0], bytes[1], bytes[2], bytes[3]).into(),
                Family::V6 => Ipv6Addr::from(bytes).to_canonical(),
            }
        };
        let port = |offset: usize| u16::from_be_bytes([self.raw[offset], self.raw[offset + 1]]);
        Tuple {
            local: SocketAddr::new(address(4), port(0)),
            peer: SocketAddr::new(address(20), port(2)),
        }
    }
}

#[cfg(test)]
impl DiagId {
    /// The id that the kernel would dump, for tests without a kernel.
    pub(crate) fn example(family: Family, tuple: Tuple, cookie: Cookie) -> Self {
        let mut raw = [0; SOCKID_LEN];
        for (port, address, end) in [(0, 4, tuple.local), (2, 20, tuple.peer)] {
            raw[port..port + 2].copy_from_slice(&end.port().to_be_bytes());
            match (family, end.ip()) {
                (Family::V4, IpAddr::V4(v4)) => {
                    raw[address..address + 4].copy_from_slice(&v4.octets());
                }
                (_, IpAddr::V4(v4)) => {
                    raw[address..address + 16].copy_from_slice(&v4.to_ipv6_mapped().octets())
                }
                (_, IpAddr::V6(v6)) => {
                    raw[address..address + 16].copy_from_slice(&v6.octets());
                }
            }
        }
        let [low, high] = [cookie.0 & 0xffff_ffff, cookie.0 >> 32];
        for (offset, half) in [(40, low), (44, high)] {
            let half = u32::try_from(half).expect("32 bits");
            raw[offset..offset + 4].copy_from_slice(&half.to_ne_bytes());
        }
        DiagId {
            family,
            token: None,
            raw,
        }
    }

    /// The same id, of an MPTCP socket.
    pub(crate) fn with_token(self, token: u32) -> Self {
        DiagId {
            token: Some(token),
            ..self
        }
    }
}

impl fmt::Debug for DiagId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} cookie {}", self.tuple(), self.cookie())
    }
}
