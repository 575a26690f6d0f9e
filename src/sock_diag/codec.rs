//! The wire format of sock_diag for TCP, as pure functions over bytes.
//!
//! netlink-packet-core splits a datagram into frames and attributes. `struct inet_diag_msg` and `struct tcp_info` are parsed here,
//! without an allocation per socket. The kernel's structs only grow: unknown fields at the end are ignored, and a field that a
//! shorter struct lacks is `None`.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use netlink_packet_core::{
    Emitable, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NLMSG_NOOP,
    NetlinkBuffer, NetlinkHeader, NlasIterator,
};

use crate::tcp::{StateSet, TcpState, Tuple};

/// Message type of requests and of replies that describe a socket (linux/sock_diag.h).
pub const SOCK_DIAG_BY_FAMILY: u16 = 20;
/// Message type of a request to abort a socket (linux/sock_diag.h).
pub const SOCK_DESTROY: u16 = 21;

/// `struct nlmsghdr`.
const NLMSG_HDR_LEN: usize = 16;
/// `struct inet_diag_sockid`: ports 2+2, addresses 16+16, interface 4, cookie 8.
const SOCKID_LEN: usize = 48;
/// `struct inet_diag_req_v2`: family, protocol, ext, pad, states 4, id 48.
const REQUEST_LEN: usize = 8 + SOCKID_LEN;
/// `struct inet_diag_msg`: family, state, timer, retrans, id 48, expires, rqueue, wqueue, uid, inode.
const MESSAGE_LEN: usize = 4 + SOCKID_LEN + 5 * 4;

const IPPROTO_TCP: u8 = 6;
/// Attribute kinds of a reply (linux/inet_diag.h).
const INET_DIAG_INFO: u16 = 2;
const INET_DIAG_SKV6ONLY: u16 = 11;
const INET_DIAG_CGROUP_ID: u16 = 21;
/// Attribute kind of a request (linux/inet_diag.h).
const INET_DIAG_REQ_BYTECODE: u16 = 1;
/// `struct nlattr`: length 2, kind 2.
const ATTRIBUTE_HDR_LEN: usize = 4;
/// Offsets in `struct tcp_info`: after eight one-byte fields follow u32 fields; these three are the 10th, 12th and 13th.
const TCPI_LAST_DATA_SENT: usize = 8 + 9 * 4;
const TCPI_LAST_DATA_RECV: usize = 8 + 11 * 4;
pub(crate) const TCPI_LAST_ACK_RECV: usize = 8 + 12 * 4;

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
    family: Family,
    raw: [u8; SOCKID_LEN],
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
        DiagId { family, raw }
    }
}

impl fmt::Debug for DiagId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} cookie {}", self.tuple(), self.cookie())
    }
}

/// The three times in `struct tcp_info` that show how long a socket has been quiet, in milliseconds on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quiet {
    /// Time since the socket sent data. Before the first data it is the time since boot.
    pub last_data_sent: Duration,
    /// Time since data arrived. Meaningless before the first data. A FIN does not update it.
    pub last_data_recv: Duration,
    /// Time since any acceptable segment arrived, also a FIN.
    pub last_ack_recv: Duration,
}

/// The kernel's description of one socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketMessage {
    /// Its address pair, interface and cookie.
    pub id: DiagId,
    pub state: TcpState,
    /// Unread bytes: `rcv_nxt - copied_seq`. A FIN counts as one byte until the owner reads end of file. For a listener: the
    /// number of connections that wait for accept(2). Source: net/ipv4/tcp_diag.c, tcp_diag_get_info.
    pub recv_q: u32,
    /// Bytes that the application wrote and the peer has not acknowledged: `write_seq - snd_una`. The socket's own FIN counts as
    /// one byte. For a listener: the limit of its backlog.
    pub send_q: u32,
    /// The user of the socket's inode: the one who made or accepted the socket.
    pub uid: u32,
    /// Inode in sockfs; 0 if no descriptor exists (never accepted, or closed by its owner).
    pub inode: u32,
    /// The quiet times; `None` if they were not requested, or the kernel did not send them.
    pub quiet: Option<Quiet>,
    /// Whether an IPv6 socket refuses IPv4; `None` if the kernel does not report it.
    pub v6only: Option<bool>,
    /// The id of the cgroup v2 in which the socket was made: the inode of its directory. `None` if the kernel does not report it
    /// (before Linux 5.8).
    pub cgroup: Option<u64>,
}

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
/// The answer is one [`Frame::Socket`], or an error: ENOENT or ESTALE if that socket is no longer in the kernel's tables
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

/// Appends a request to abort exactly the socket `id` to `bytes`. The answer is one [`Frame::Ack`], or an error.
///
/// Without the cookie in `id` the kernel would abort the listener if the connection is gone.
pub fn put_destroy(bytes: &mut Vec<u8>, id: &DiagId, sequence: u32) {
    let flags = NLM_F_REQUEST | netlink_packet_core::NLM_F_ACK;
    put_destroy_with(bytes, id, sequence, flags);
}

/// As [`put_destroy`], but with an answer only if the request fails. netlink reports an error whatever the flags are
/// (net/netlink/af_netlink.c, netlink_rcv_skb).
pub fn put_quiet_destroy(bytes: &mut Vec<u8>, id: &DiagId, sequence: u32) {
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

/// One message of a datagram from the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    Socket(SocketMessage),
    /// The kernel did the request.
    Ack,
    /// The kernel refused the request with this errno.
    Error(i32),
    /// The end of a dump; 0, or the errno with which the dump failed.
    Done(i32),
    /// A message that cwkill ignores.
    Other,
}

/// A message with the header fields that assign it to a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Framed {
    /// The sequence number of the request.
    pub sequence: u32,
    /// NLM_F_DUMP_INTR: the tables changed during the dump, so sockets may be missing.
    pub interrupted: bool,
    pub frame: Frame,
}

/// Bytes that are not a sock_diag message, with the defect as a text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed(pub &'static str);

/// Parses the messages of one datagram.
pub fn frames(datagram: &[u8]) -> impl Iterator<Item = Result<Framed, Malformed>> + '_ {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        match NetlinkBuffer::new_checked(rest) {
            Ok(view) => {
                let length = usize::try_from(view.length()).unwrap_or(usize::MAX);
                // Messages start at multiples of four bytes. The last one may lack its padding.
                let next = length.next_multiple_of(4).min(rest.len());
                rest = &rest[next..];
                Some(parse_frame(&view))
            }
            Err(_) => {
                rest = &[];
                Some(Err(Malformed("a netlink message is cut short")))
            }
        }
    })
}

fn parse_frame(view: &NetlinkBuffer<&[u8]>) -> Result<Framed, Malformed> {
    let payload = view.payload();
    let frame = match view.message_type() {
        SOCK_DIAG_BY_FAMILY => Frame::Socket(parse_socket(payload)?),
        NLMSG_ERROR => match i32_at(payload, 0).ok_or(Malformed("an error without errno"))? {
            0 => Frame::Ack,
            negative => Frame::Error(negative.saturating_neg()),
        },
        // The errno of a dump that failed half-way. Older kernels send no errno.
        NLMSG_DONE => Frame::Done(i32_at(payload, 0).unwrap_or(0).saturating_neg()),
        NLMSG_NOOP => Frame::Other,
        _ => Frame::Other,
    };
    Ok(Framed {
        sequence: view.sequence_number(),
        interrupted: view.flags() & NLM_F_DUMP_INTR != 0,
        frame,
    })
}

/// Parses `struct inet_diag_msg` and the attributes that follow it.
fn parse_socket(payload: &[u8]) -> Result<SocketMessage, Malformed> {
    if payload.len() < MESSAGE_LEN {
        return Err(Malformed("struct inet_diag_msg is cut short"));
    }
    let family = match payload[0] {
        2 => Family::V4,
        10 => Family::V6,
        _ => return Err(Malformed("a socket of neither AF_INET nor AF_INET6")),
    };
    let mut message = SocketMessage {
        id: DiagId {
            family,
            raw: payload[4..4 + SOCKID_LEN].try_into().expect("48 bytes"),
        },
        state: TcpState::from_kernel(payload[1]),
        recv_q: u32_at(payload, 56),
        send_q: u32_at(payload, 60),
        uid: u32_at(payload, 64),
        inode: u32_at(payload, 68),
        quiet: None,
        v6only: None,
        cgroup: None,
    };
    for attribute in NlasIterator::new(&payload[MESSAGE_LEN..]) {
        let attribute = attribute.map_err(|_| Malformed("an attribute is cut short"))?;
        match attribute.kind() {
            INET_DIAG_INFO => message.quiet = parse_quiet(attribute.value()),
            INET_DIAG_CGROUP_ID => {
                let id = attribute.value().first_chunk();
                message.cgroup = id.map(|id| u64::from_ne_bytes(*id));
            }
            INET_DIAG_SKV6ONLY => message.v6only = attribute.value().first().map(|&b| b != 0),
            _ => {}
        }
    }
    Ok(message)
}

fn parse_quiet(tcp_info: &[u8]) -> Option<Quiet> {
    if tcp_info.len() < TCPI_LAST_ACK_RECV + 4 {
        return None;
    }
    let time = |offset| Duration::from_millis(u64::from(u32_at(tcp_info, offset)));
    Some(Quiet {
        last_data_sent: time(TCPI_LAST_DATA_SENT),
        last_data_recv: time(TCPI_LAST_DATA_RECV),
        last_ack_recv: time(TCPI_LAST_ACK_RECV),
    })
}

/// A u32 in host byte order. The caller has checked the length.
fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_ne_bytes(bytes[offset..offset + 4].try_into().expect("4 bytes"))
}

fn i32_at(bytes: &[u8], offset: usize) -> Option<i32> {
    let four = bytes.get(offset..offset + 4)?;
    Some(i32::from_ne_bytes(four.try_into().expect("4 bytes")))
}

#[cfg(test)]
mod tests {
    use super::super::testdata::{DUMP_V4, DUMP_V6, bytes};
    use super::*;

    fn sockets(hex: &str) -> Vec<SocketMessage> {
        let datagram = bytes(hex);
        let socket = |framed: Result<Framed, Malformed>| match framed.unwrap().frame {
            Frame::Socket(message) => Some(message),
            _ => None,
        };
        frames(&datagram).filter_map(socket).collect()
    }

    #[test]
    fn reads_a_real_dump() {
        let [listener, stuck] = &sockets(DUMP_V4)[..] else {
            panic!("two sockets");
        };
        assert_eq!(listener.state, TcpState::Listen);
        assert_eq!(listener.send_q, 4, "the backlog that listen() was given");
        assert_eq!(stuck.state, TcpState::CloseWait);
        assert_eq!(stuck.id.tuple().local, "127.0.0.1:18080".parse().unwrap());
        assert_eq!(stuck.recv_q, 6, "five bytes and the FIN");
        assert_eq!(stuck.send_q, 0);
        assert_ne!(stuck.inode, 0);
        assert_ne!(stuck.id.cookie(), listener.id.cookie());
        let quiet = stuck.quiet.unwrap();
        assert!(quiet.last_ack_recv >= Duration::from_millis(200));
        assert!(quiet.last_ack_recv < Duration::from_secs(1));
    }

    #[test]
    fn writes_mapped_addresses_as_ipv4() {
        let stuck: Vec<_> = sockets(DUMP_V6)
            .into_iter()
            .filter(|message| message.state == TcpState::CloseWait)
            .collect();
        let [mapped, v6] = &stuck[..] else {
            panic!("two stuck sockets");
        };
        assert_eq!(mapped.id.family(), Family::V6);
        assert_eq!(mapped.id.tuple().local, "127.0.0.1:18081".parse().unwrap());
        assert_eq!(v6.id.tuple().local, "[::1]:18082".parse().unwrap());
    }

    #[test]
    fn reads_whether_a_listener_refuses_ipv4() {
        let only: Vec<_> = sockets(DUMP_V6)
            .into_iter()
            .filter(|message| message.state == TcpState::Listen)
            .map(|message| (message.id.tuple().local.port(), message.v6only))
            .collect();
        assert!(only.contains(&(18081, Some(false))), "{only:?}");
    }

    #[test]
    fn a_dump_cut_at_any_byte_is_an_error_or_shorter_never_a_panic() {
        for hex in [DUMP_V4, DUMP_V6] {
            let whole = bytes(hex);
            let all = sockets(hex).len();
            for length in 0..whole.len() {
                let good = frames(&whole[..length])
                    .take_while(Result::is_ok)
                    .filter(|framed| matches!(framed.as_ref().unwrap().frame, Frame::Socket(_)))
                    .count();
                assert!(good <= all);
            }
        }
    }

    #[test]
    fn unknown_attributes_and_longer_structs_are_passed_over() {
        let mut datagram = bytes(DUMP_V4);
        let first = usize::try_from(u32_at(&datagram, 0)).unwrap();
        // An attribute of kind 999 with four bytes, after the attributes of the first message.
        let extra = [8u8, 0, 0xe7, 0x03, 1, 2, 3, 4];
        datagram.splice(first..first, extra);
        let longer = u32::try_from(first + extra.len()).unwrap();
        datagram[..4].copy_from_slice(&longer.to_ne_bytes());
        let all: Vec<_> = frames(&datagram).map(Result::unwrap).collect();
        assert!(matches!(all[0].frame, Frame::Socket(_)));
        assert_eq!(all.len(), 3);
    }

    #[test]
    fn a_shorter_tcp_info_gives_no_age() {
        assert_eq!(parse_quiet(&[0; TCPI_LAST_ACK_RECV + 3]), None);
        assert!(parse_quiet(&[0; TCPI_LAST_ACK_RECV + 4]).is_some());
    }

    fn quiet_lookup(bytes: &mut Vec<u8>, id: &DiagId, sequence: u32) {
        put_lookup(bytes, id, sequence, Detail::Quiet);
    }

    #[test]
    fn a_question_carries_the_id_byte_for_byte() {
        let stuck = &sockets(DUMP_V6)[2];
        for (put, kind, flags) in [
            (
                quiet_lookup as fn(&mut Vec<u8>, &DiagId, u32),
                20u16,
                0x01u16,
            ),
            (put_destroy, 21, 0x05),
        ] {
            let mut request = Vec::new();
            put(&mut request, &stuck.id, 77);
            assert_eq!(request.len(), 72);
            assert_eq!(request[4..6], kind.to_ne_bytes());
            assert_eq!(request[6..8], flags.to_ne_bytes());
            assert_eq!(request[8..12], 77u32.to_ne_bytes());
            assert_eq!(request[16..18], [10, 6], "AF_INET6, IPPROTO_TCP");
            let dumped = bytes(DUMP_V6);
            let is_dumped = dumped.windows(48).any(|w| w == &request[24..72]);
            assert!(is_dumped, "the id is the dumped one, cookie included");
        }
    }

    #[test]
    fn a_dump_asks_by_state() {
        let request = DumpRequest {
            family: Family::V4,
            states: StateSet::from(TcpState::CloseWait),
            info: true,
            bytecode: &[],
        };
        let bytes = request.encode(3);
        assert_eq!(
            bytes[4..8],
            [20, 0, 0x01, 0x03],
            "SOCK_DIAG_BY_FAMILY, REQUEST|DUMP"
        );
        assert_eq!(bytes[16..20], [2, 6, 2, 0], "AF_INET, TCP, INET_DIAG_INFO");
        assert_eq!(bytes[20..24], (1u32 << 8).to_ne_bytes());
        assert_eq!(bytes.len(), 72);

        let code = [1, 4, 8, 0];
        let filtered = DumpRequest {
            bytecode: &code,
            ..request
        };
        let filtered = filtered.encode(3);
        assert_eq!(filtered[..4], 80u32.to_ne_bytes());
        assert_eq!(filtered[4..72], bytes[4..]);
        assert_eq!(filtered[72..74], 8u16.to_ne_bytes());
        assert_eq!(filtered[74..76], 1u16.to_ne_bytes());
        assert_eq!(filtered[76..], code);
    }

    #[test]
    fn errors_and_acks_are_told_apart() {
        let message = |kind: u16, payload: &[u8]| {
            let mut bytes = Vec::new();
            let length = u32::try_from(16 + payload.len()).unwrap();
            bytes.extend_from_slice(&length.to_ne_bytes());
            bytes.extend_from_slice(&kind.to_ne_bytes());
            bytes.extend_from_slice(&[0; 10]);
            bytes.extend_from_slice(payload);
            bytes
        };
        let frame = |bytes: &[u8]| frames(bytes).next().unwrap().map(|framed| framed.frame);
        assert_eq!(frame(&message(2, &0i32.to_ne_bytes())), Ok(Frame::Ack));
        let refused = (-libc::EPERM).to_ne_bytes();
        assert_eq!(frame(&message(2, &refused)), Ok(Frame::Error(libc::EPERM)));
        assert_eq!(frame(&message(3, &0i32.to_ne_bytes())), Ok(Frame::Done(0)));
        assert_eq!(frame(&message(3, &[])), Ok(Frame::Done(0)));
        assert!(frame(&message(2, &[1, 2])).is_err());
        assert!(frame(&message(20, &[0; 71])).is_err());
    }
}
