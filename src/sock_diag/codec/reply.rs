//! Parses the messages of the kernel: sockets, acknowledgements, errors, and the end of a dump.

use netlink_packet_core::{NLM_F_DUMP_INTR, NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer, NlasIterator};

use super::activity::{ByteCounters, Quiet};
use super::mptcp::{self, MptcpSocket};
use super::{DiagId, Family, INET_DIAG_INFO, Protocol, SOCK_DIAG_BY_FAMILY, SOCKID_LEN, u32_at};
use crate::tcp::TcpState;
use crate::tcp::info::TcpInfo;

/// `struct inet_diag_msg`: family, state, timer, retrans, id 48, expires, rqueue, wqueue, uid, inode.
const MESSAGE_LEN: usize = 4 + SOCKID_LEN + 5 * 4;
/// Attribute kinds (linux/inet_diag.h).
const INET_DIAG_SKV6ONLY: u16 = 11;
const INET_DIAG_ULP_INFO: u16 = 19;
const INET_DIAG_CGROUP_ID: u16 = 21;
const INET_DIAG_SOCKOPT: u16 = 22;
/// IP_TRANSPARENT in the first byte of `struct inet_diag_sockopt`. C puts the first bit field at the low end of a byte on a
/// little-endian machine, and at the high end on others.
const TRANSPARENT: u8 = if cfg!(target_endian = "little") {
    1 << 5
} else {
    1 << 2
};
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
    /// The byte counters; `None` if they were not requested, or the kernel does not have all of them (before Linux 4.19).
    pub counters: Option<ByteCounters>,
    /// Whether an IPv6 socket refuses IPv4; `None` if the kernel does not report it.
    pub v6only: Option<bool>,
    /// The id of the cgroup v2 in which the socket was made: the inode of its directory. `None` if the kernel does not report it
    /// (before Linux 5.8).
    pub cgroup: Option<u64>,
    /// Whether the socket has IP_TRANSPARENT, so that its local address need not be one of this host. `None` if the kernel does
    /// not report it (before Linux 5.10).
    pub transparent: Option<bool>,
    /// The facts that only an MPTCP socket has. Then `recv_q` is the memory in bytes that its unread data takes, and `send_q`
    /// comes from `struct mptcp_info`, as the quiet times do.
    pub mptcp: Option<MptcpSocket>,
    /// If a TCP socket is a subflow of an MPTCP socket: the token of that socket, or 0 if the kernel does not report the token.
    /// `None` for any other socket, if the information was not requested, and without CAP_NET_ADMIN before Linux 6.15.
    pub subflow_of: Option<u32>,
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

/// Parses the messages of one datagram. `protocol` is that of the request.
pub fn frames(
    datagram: &[u8],
    protocol: Protocol,
) -> impl Iterator<Item = Result<Framed, Malformed>> + '_ {
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
                Some(parse_frame(&view, protocol))
            }
            Err(_) => {
                rest = &[];
                Some(Err(Malformed("a netlink message is cut short")))
            }
        }
    })
}

fn parse_frame(view: &NetlinkBuffer<&[u8]>, protocol: Protocol) -> Result<Framed, Malformed> {
    let payload = view.payload();
    let frame = match view.message_type() {
        SOCK_DIAG_BY_FAMILY => Frame::Socket(parse_socket(payload, protocol)?),
        NLMSG_ERROR => match i32_at(payload, 0).ok_or(Malformed("an error without errno"))? {
            0 => Frame::Ack,
            negative => Frame::Error(negative.saturating_neg()),
        },
        // The errno of a dump that failed half-way. Older kernels send no errno.
        NLMSG_DONE => Frame::Done(i32_at(payload, 0).unwrap_or(0).saturating_neg()),
        _ => Frame::Other,
    };
    Ok(Framed {
        sequence: view.sequence_number(),
        interrupted: view.flags() & NLM_F_DUMP_INTR != 0,
        frame,
    })
}

/// Parses `struct inet_diag_msg` and the attributes that follow it.
fn parse_socket(payload: &[u8], protocol: Protocol) -> Result<SocketMessage, Malformed> {
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
            token: None,
            raw: payload[4..4 + SOCKID_LEN].try_into().expect("48 bytes"),
        },
        state: TcpState::from_kernel(payload[1]),
        recv_q: u32_at(payload, 56),
        send_q: u32_at(payload, 60),
        uid: u32_at(payload, 64),
        inode: u32_at(payload, 68),
        quiet: None,
        counters: None,
        v6only: None,
        cgroup: None,
        transparent: None,
        mptcp: None,
        subflow_of: None,
    };
    for attribute in NlasIterator::new(&payload[MESSAGE_LEN..]) {
        let attribute = attribute.map_err(|_| Malformed("an attribute is cut short"))?;
        match attribute.kind() {
            INET_DIAG_INFO if protocol == Protocol::Mptcp => {
                let Some(info) = mptcp::parse_info(attribute.value()) else {
                    continue;
                };
                message.id.token = Some(info.socket.token);
                message.mptcp = Some(info.socket);
                message.send_q = info.send_q;
                message.quiet = info.quiet;
                message.counters = Some(info.counters);
            }
            INET_DIAG_INFO => {
                message.quiet = parse_quiet(attribute.value());
                message.counters = parse_counters(attribute.value());
            }
            INET_DIAG_CGROUP_ID => {
                let id = attribute.value().first_chunk();
                message.cgroup = id.map(|id| u64::from_ne_bytes(*id));
            }
            INET_DIAG_SOCKOPT => {
                let options = attribute.value().first();
                message.transparent = options.map(|options| options & TRANSPARENT != 0);
            }
            INET_DIAG_ULP_INFO => message.subflow_of = mptcp::parse_subflow(attribute.value()),
            INET_DIAG_SKV6ONLY => message.v6only = attribute.value().first().map(|&b| b != 0),
            _ => {}
        }
    }
    Ok(message)
}

pub(super) fn parse_quiet(tcp_info: &[u8]) -> Option<Quiet> {
    let info = TcpInfo::new(tcp_info);
    Some(Quiet {
        last_data_sent: info.last_data_sent()?,
        last_data_recv: info.last_data_recv()?,
        last_ack_recv: info.last_ack_recv()?,
    })
}

/// `None` if the struct is too short, or for a request socket, whose struct is all zero.
pub(super) fn parse_counters(tcp_info: &[u8]) -> Option<ByteCounters> {
    let info = TcpInfo::new(tcp_info);
    let sent_once = info.bytes_sent()?.wrapping_sub(info.bytes_retrans()?);
    Some(ByteCounters {
        received: info.bytes_received()?,
        acked: info.bytes_acked()?,
        written: sent_once.wrapping_add(info.notsent_bytes()?.into()),
    })
}

fn i32_at(bytes: &[u8], offset: usize) -> Option<i32> {
    let four = bytes.get(offset..offset + 4)?;
    Some(i32::from_ne_bytes(four.try_into().expect("4 bytes")))
}
