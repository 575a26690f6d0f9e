//! The bytes of requests: dumps, lookups and SOCK_DESTROY.

use netlink_packet_core::{Emitable, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader};

use super::{
    DiagId, Family, INET_DIAG_INFO, NLMSG_HDR_LEN, SOCK_DESTROY, SOCK_DIAG_BY_FAMILY, SOCKID_LEN,
};
use crate::tcp::StateSet;

/// `struct inet_diag_req_v2`: family, protocol, ext, pad, states 4, id 48.
const REQUEST_LEN: usize = 8 + SOCKID_LEN;
const IPPROTO_TCP: u8 = 6;
/// Attribute kind (linux/inet_diag.h).
const INET_DIAG_REQ_BYTECODE: u16 = 1;
/// `struct nlattr`: length 2, kind 2.
const ATTRIBUTE_HDR_LEN: usize = 4;

/// The sockets that a dump requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DumpRequest<'a> {
    pub family: Family,
    pub states: StateSet,
    /// Whether the kernel sends `struct tcp_info`. It locks every socket for that.
    pub info: bool,
    /// A filter that the kernel runs ([`crate::filter::bytecode::bytecode`]); empty for no filter.
    pub bytecode: &'a [u8],
}

impl DumpRequest<'_> {
    /// The request as one netlink message.
    ///
    /// # Panics
    /// The bytecode does not fit an attribute of 64 KiB.
    pub fn encode(&self, sequence: u32) -> Vec<u8> {
        let attribute = match self.bytecode.len() {
            0 => 0,
            length => ATTRIBUTE_HDR_LEN + length,
        };
        let mut bytes = Vec::with_capacity(NLMSG_HDR_LEN + REQUEST_LEN + attribute);
        let flags = NLM_F_REQUEST | NLM_F_DUMP;
        let body = REQUEST_LEN + attribute;
        put_header(&mut bytes, body, SOCK_DIAG_BY_FAMILY, flags, sequence);
        put_request(
            &mut bytes,
            self.family,
            self.states,
            self.info,
            &[0; SOCKID_LEN],
        );
        if attribute > 0 {
            let length = u16::try_from(attribute).expect("bytecode fits an attribute");
            bytes.extend(length.to_ne_bytes());
            bytes.extend(INET_DIAG_REQ_BYTECODE.to_ne_bytes());
            bytes.extend(self.bytecode);
        }
        bytes
    }
}

/// The amount of data that a lookup requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detail {
    /// State, queues, inode.
    Basic,
    /// The quiet times of `struct tcp_info` too. The kernel locks the socket for them.
    Quiet,
}

/// Appends a lookup of exactly the socket `id` to `bytes`.
///
/// The answer is one [`super::Frame::Socket`], or an error: ENOENT or ESTALE if that socket is no longer in the kernel's tables
/// (net/ipv4/inet_diag.c, inet_diag_find_one_icsk).
pub fn put_lookup(bytes: &mut Vec<u8>, id: &DiagId, sequence: u32, detail: Detail) {
    put_header(
        bytes,
        REQUEST_LEN,
        SOCK_DIAG_BY_FAMILY,
        NLM_F_REQUEST,
        sequence,
    );
    put_request(
        bytes,
        id.family,
        StateSet::EMPTY,
        detail == Detail::Quiet,
        &id.raw,
    );
}

/// Appends a request to abort exactly the socket `id` to `bytes`. The answer is one [`super::Frame::Ack`], or an error.
///
/// Without the cookie in `id` the kernel would abort the listener if the connection is gone.
pub fn put_destroy(bytes: &mut Vec<u8>, id: &DiagId, sequence: u32) {
    let flags = NLM_F_REQUEST | NLM_F_ACK;
    put_destroy_with(bytes, id, sequence, flags);
}

/// As [`put_destroy`], but with an answer only if the request fails. netlink reports an error whatever the flags are
/// (net/netlink/af_netlink.c, netlink_rcv_skb).
pub fn put_destroy_without_ack(bytes: &mut Vec<u8>, id: &DiagId, sequence: u32) {
    put_destroy_with(bytes, id, sequence, NLM_F_REQUEST);
}

fn put_destroy_with(bytes: &mut Vec<u8>, id: &DiagId, sequence: u32, flags: u16) {
    put_header(bytes, REQUEST_LEN, SOCK_DESTROY, flags, sequence);
    put_request(bytes, id.family, StateSet::EMPTY, false, &id.raw);
}

fn put_header(bytes: &mut Vec<u8>, body: usize, message_type: u16, flags: u16, sequence: u32) {
    let mut header = NetlinkHeader::default();
    header.length = u32::try_from(NLMSG_HDR_LEN + body).expect("at most 64 KiB and 76 bytes");
    header.message_type = message_type;
    header.flags = flags;
    header.sequence_number = sequence;
    let start = bytes.len();
    bytes.resize(start + NLMSG_HDR_LEN, 0);
    header.emit(&mut bytes[start..]);
}

fn put_request(
    bytes: &mut Vec<u8>,
    family: Family,
    states: StateSet,
    info: bool,
    id: &[u8; SOCKID_LEN],
) {
    let extensions = if info { 1 << (INET_DIAG_INFO - 1) } else { 0 };
    bytes.extend_from_slice(&[family.number(), IPPROTO_TCP, extensions, 0]);
    bytes.extend_from_slice(&states.mask().to_ne_bytes());
    bytes.extend_from_slice(id);
}
