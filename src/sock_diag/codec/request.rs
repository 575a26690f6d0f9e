//! The bytes of requests: dumps, lookups and SOCK_DESTROY.

use netlink_packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST};

use super::{
    DiagId, Family, INET_DIAG_INFO, Protocol, SOCK_DESTROY, SOCK_DIAG_BY_FAMILY, SOCKID_LEN,
};
use crate::netlink::{ATTRIBUTE_LEN, HEADER_LEN, put_attribute, put_header};
use crate::tcp::StateSet;

/// `struct inet_diag_req_v2`: family, protocol, ext, pad, states 4, id 48.
const REQUEST_LEN: usize = 8 + SOCKID_LEN;
const IPPROTO_TCP: u8 = 6;
/// It does not fit the byte for the protocol, so it goes into an attribute.
const IPPROTO_MPTCP: u32 = 262;
/// Attribute kinds (linux/inet_diag.h). Kernels before 5.10 do not have INET_DIAG_REQ_PROTOCOL, and ignore it.
const INET_DIAG_REQ_BYTECODE: u16 = 1;
const INET_DIAG_REQ_PROTOCOL: u16 = 3;

/// The sockets that a dump requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DumpRequest<'a> {
    pub protocol: Protocol,
    pub family: Family,
    pub states: StateSet,
    /// Whether the kernel sends `struct tcp_info` or `struct mptcp_info`. It locks every socket for that.
    pub info: bool,
    /// A filter that the kernel runs ([`crate::filter::bytecode::bytecode`]); empty for no filter.
    pub bytecode: &'a [u8],
}

impl DumpRequest<'_> {
    /// The TCP sockets of a family in `states`, without their information and without a filter.
    pub fn plain(family: Family, states: StateSet) -> Self {
        DumpRequest {
            protocol: Protocol::Tcp,
            family,
            states,
            info: false,
            bytecode: &[],
        }
    }

    /// The request as one netlink message.
    ///
    /// # Panics
    /// The bytecode does not fit an attribute of 64 KiB.
    pub fn encode(&self, sequence: u32) -> Vec<u8> {
        let bytecode = match self.bytecode.len() {
            0 => 0,
            length => ATTRIBUTE_LEN + length,
        };
        let body = REQUEST_LEN + protocol_attribute_len(self.protocol) + bytecode;
        let mut bytes = Vec::with_capacity(HEADER_LEN + body);
        let flags = NLM_F_REQUEST | NLM_F_DUMP;
        put_header(&mut bytes, body, SOCK_DIAG_BY_FAMILY, flags, sequence);
        put_request(
            &mut bytes,
            self.protocol,
            self.family,
            self.states,
            self.info,
            &[0; SOCKID_LEN],
        );
        if bytecode > 0 {
            put_attribute(&mut bytes, INET_DIAG_REQ_BYTECODE, self.bytecode);
        }
        bytes
    }
}

/// The amount of data that a lookup requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detail {
    /// State, queues, inode.
    Basic,
    /// `struct tcp_info` too: the quiet times and the byte counters. The kernel locks the socket for it.
    TcpInfo,
}

/// Appends a lookup of exactly the socket `id` to `bytes`. The kernel finds an MPTCP socket by its token alone, and the answer
/// contains the cookie.
///
/// The answer is one [`super::Frame::Socket`], or an error: ENOENT or ESTALE if that socket is no longer in the kernel's tables
/// (net/ipv4/inet_diag.c, inet_diag_find_one_icsk; net/mptcp/mptcp_diag.c, mptcp_diag_dump_one).
pub fn put_lookup(bytes: &mut Vec<u8>, id: &DiagId, sequence: u32, detail: Detail) {
    let protocol = id.protocol();
    let mut raw = id.raw;
    if let Some(token) = id.token {
        // In place of the lower half of the cookie.
        raw[40..44].copy_from_slice(&token.to_ne_bytes());
    }
    put_header(
        bytes,
        REQUEST_LEN + protocol_attribute_len(protocol),
        SOCK_DIAG_BY_FAMILY,
        NLM_F_REQUEST,
        sequence,
    );
    put_request(
        bytes,
        protocol,
        id.family,
        StateSet::EMPTY,
        // Without the token in `struct mptcp_info`, the answer could not be looked up again.
        detail == Detail::TcpInfo || protocol == Protocol::Mptcp,
        &raw,
    );
}

/// Appends a request to abort exactly the socket `id` to `bytes`. The answer is one [`super::Frame::Ack`], or an error.
///
/// Without the cookie in `id` the kernel would abort the listener if the connection is gone.
pub fn put_destroy(bytes: &mut Vec<u8>, id: &DiagId, sequence: u32) {
    let flags = NLM_F_REQUEST | NLM_F_ACK;
    put_header(bytes, REQUEST_LEN, SOCK_DESTROY, flags, sequence);
    let tcp = Protocol::Tcp;
    put_request(bytes, tcp, id.family, StateSet::EMPTY, false, &id.raw);
}

fn put_request(
    bytes: &mut Vec<u8>,
    protocol: Protocol,
    family: Family,
    states: StateSet,
    info: bool,
    id: &[u8; SOCKID_LEN],
) {
    let extensions = if info { 1 << (INET_DIAG_INFO - 1) } else { 0 };
    let number = match protocol {
        Protocol::Tcp => IPPROTO_TCP,
        // A kernel that does not know the attribute finds no table for this number, and refuses (ENOENT).
        Protocol::Mptcp => 0,
    };
    bytes.extend_from_slice(&[family.number(), number, extensions, 0]);
    bytes.extend_from_slice(&states.mask().to_ne_bytes());
    bytes.extend_from_slice(id);
    if protocol == Protocol::Mptcp {
        put_attribute(bytes, INET_DIAG_REQ_PROTOCOL, &IPPROTO_MPTCP.to_ne_bytes());
    }
}

/// The length of the attribute that [`put_request`] appends.
fn protocol_attribute_len(protocol: Protocol) -> usize {
    match protocol {
        Protocol::Tcp => 0,
        Protocol::Mptcp => ATTRIBUTE_LEN + 4,
    }
}
