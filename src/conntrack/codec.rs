//! The wire format of ctnetlink for TCP, as pure functions over bytes (include/uapi/linux/netfilter/nfnetlink_conntrack.h,
//! net/netfilter/nf_conntrack_netlink.c).
//!
//! netlink-packet-netfilter 0.3 has neither the id of an entry, nor zones, nor the filter of a dump; docs/decisions/gateway.md.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use netlink_packet_core::{
    NLA_F_NESTED, NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NetlinkBuffer,
};

use super::state::ConntrackState;
use crate::netlink::{self, attributes, put_attribute};
use crate::tcp::Tuple;

/// A message type of nfnetlink has the number of its subsystem in the upper byte (linux/netfilter/nfnetlink.h).
const CTNETLINK: u16 = 1 << 8;
const CT_NEW: u16 = CTNETLINK;
const CT_GET: u16 = CTNETLINK | 1;
const CT_DELETE: u16 = CTNETLINK | 2;
/// Objects of nf_tables, the kind of an object (big-endian), and the kind of a timeout policy (linux/netfilter/nf_tables.h).
const NFT_GETOBJ: u16 = 10 << 8 | 19;
const NFT_GETFLOWTABLE: u16 = 10 << 8 | 23;
const NFTA_OBJ_TYPE: u16 = 3;
const NFT_OBJECT_CT_TIMEOUT: u32 = 7;
/// Timeout policies of iptables (linux/netfilter/nfnetlink_cttimeout.h).
const TIMEOUT_GET: u16 = 8 << 8 | 1;
/// `struct nfgenmsg`: family, version, and a resource id of two bytes.
const NFGEN_LEN: usize = 4;

/// Attributes of an entry.
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_STATUS: u16 = 3;
const CTA_PROTOINFO: u16 = 4;
const CTA_TIMEOUT: u16 = 7;
const CTA_MARK: u16 = 8;
const CTA_ID: u16 = 12;
const CTA_ZONE: u16 = 18;
const CTA_MARK_MASK: u16 = 21;
const CTA_FILTER: u16 = 25;
/// Attributes of a tuple.
const CTA_TUPLE_IP: u16 = 1;
const CTA_TUPLE_PROTO: u16 = 2;
const CTA_TUPLE_ZONE: u16 = 3;
const CTA_IP_V4_SRC: u16 = 1;
const CTA_IP_V4_DST: u16 = 2;
const CTA_IP_V6_SRC: u16 = 3;
const CTA_IP_V6_DST: u16 = 4;
const CTA_PROTO_NUM: u16 = 1;
const CTA_PROTO_SRC_PORT: u16 = 2;
const CTA_PROTO_DST_PORT: u16 = 3;
/// Attributes of the protocol.
const CTA_PROTOINFO_TCP: u16 = 1;
const CTA_PROTOINFO_TCP_STATE: u16 = 1;
/// Attributes of a filter, and which parts of the tuple count (net/netfilter/nf_internals.h).
const CTA_FILTER_ORIG_FLAGS: u16 = 1;
const CTA_FILTER_REPLY_FLAGS: u16 = 2;
const FILTER_IP_SRC: u32 = 1 << 0;
const FILTER_IP_DST: u32 = 1 << 1;
const FILTER_PROTO_NUM: u32 = 1 << 3;
const FILTER_SRC_PORT: u32 = 1 << 4;
const FILTER_DST_PORT: u32 = 1 << 5;

const TCP: u8 = 6;

/// The bits that the kernel keeps of an entry (linux/netfilter/nf_conntrack_common.h, enum ip_conntrack_status).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Status(pub u32);

impl Status {
    pub const SEEN_REPLY: Status = Status(1 << 1);
    pub const ASSURED: Status = Status(1 << 2);
    pub const DYING: Status = Status(1 << 9);
    pub const FIXED_TIMEOUT: Status = Status(1 << 10);
    /// A flow table has the connection: its packets pass conntrack by, and the kernel refuses to delete the entry.
    pub const OFFLOAD: Status = Status(1 << 14);
    pub const HW_OFFLOAD: Status = Status(1 << 15);

    /// Whether one of the bits of `other` is set.
    pub fn has_any(self, other: Status) -> bool {
        self.0 & other.0 != 0
    }

    /// The names of the bits that tell the operator something.
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        let named = [
            (Status::SEEN_REPLY, "seen-reply"),
            (Status::ASSURED, "assured"),
            (Status::DYING, "dying"),
            (Status::FIXED_TIMEOUT, "fixed-timeout"),
            (Status::OFFLOAD, "offload"),
            (Status::HW_OFFLOAD, "hw-offload"),
        ];
        named
            .into_iter()
            .filter(move |(bit, _)| self.has_any(*bit))
            .map(|(_, name)| name)
    }
}

impl std::ops::BitOr for Status {
    type Output = Status;

    fn bitor(self, other: Status) -> Status {
        Status(self.0 | other.0)
    }
}

/// The directions to which the zone of an entry applies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ZoneDirection {
    #[default]
    Both,
    Original,
    Reply,
}

/// The zone of an entry. With zones, one table has several connections with the same addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Zone {
    /// 0: the default zone.
    pub id: u16,
    pub direction: ZoneDirection,
}

/// The entry of a TCP connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The addresses of the packets of the end that has opened the connection, before NAT: what that end sees. `local` is its own
    /// address.
    pub original: Tuple,
    /// The same of the other end: what that one sees.
    pub reply: Tuple,
    /// `None` if the kernel sent none, or one without a name.
    pub state: Option<ConntrackState>,
    pub status: Status,
    /// What is left of its timeout, in whole seconds.
    pub left: Option<Duration>,
    /// `None` if the kernel has no marks (CONFIG_NF_CONNTRACK_MARK).
    pub mark: Option<u32>,
    pub zone: Zone,
    /// Tells this entry from an earlier or later one with the same addresses.
    pub id: Option<u32>,
}

impl Entry {
    /// The new address of the end that has opened the connection, if NAT changes it: what the other end sees.
    pub fn nat_source(&self) -> Option<SocketAddr> {
        Some(self.reply.peer).filter(|seen| *seen != self.original.local)
    }

    /// The real address of the other end, if NAT changes it.
    pub fn nat_destination(&self) -> Option<SocketAddr> {
        Some(self.reply.local).filter(|real| *real != self.original.peer)
    }

    /// A connection without an entry, and without NAT.
    pub fn by_hand(one: SocketAddr, other: SocketAddr) -> Self {
        let original = Tuple {
            local: one,
            peer: other,
        };
        Entry {
            original,
            reply: original.reversed(),
            state: None,
            status: Status::default(),
            left: None,
            mark: None,
            zone: Zone::default(),
            id: None,
        }
    }

    /// An entry without NAT, for tests.
    #[cfg(test)]
    pub(crate) fn example(source: &str, destination: &str) -> Self {
        let original = Tuple {
            local: source.parse().unwrap(),
            peer: destination.parse().unwrap(),
        };
        Entry {
            original,
            reply: original.reversed(),
            state: Some(ConntrackState::Established),
            status: Status::SEEN_REPLY | Status::ASSURED,
            left: Some(Duration::from_secs(431_000)),
            mark: Some(0),
            zone: Zone::default(),
            id: Some(7),
        }
    }
}

/// What the kernel compares before it sends an entry of a dump. It is a help only: kernels before 5.8 ignore a part of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DumpFilter {
    /// The value and the mask of the mark.
    pub mark: Option<(u32, u32)>,
    /// Parts of the original direction. IPv6 addresses are left out.
    pub source: Option<IpAddr>,
    pub destination: Option<IpAddr>,
    pub source_port: Option<u16>,
    pub destination_port: Option<u16>,
    /// Addresses of the reply direction: the real address of the destination, and that which NAT gives to the source.
    pub reply_source: Option<IpAddr>,
    pub reply_destination: Option<IpAddr>,
    /// Linux 6.8.
    pub zone: Option<u16>,
}

/// Appends the request for all entries of a family, or those that `filter` lets through.
pub fn put_dump(bytes: &mut Vec<u8>, ipv6: bool, filter: Option<&DumpFilter>, sequence: u32) {
    let mut body = nfgen(ipv6);
    if let Some(filter) = filter {
        put_filter(&mut body, ipv6, filter);
    }
    netlink::put_message(bytes, CT_GET, NLM_F_REQUEST | NLM_F_DUMP, sequence, &body);
}

fn put_filter(body: &mut Vec<u8>, ipv6: bool, filter: &DumpFilter) {
    if let Some((value, mask)) = filter.mark {
        put_attribute(body, CTA_MARK, &(value & mask).to_be_bytes());
        put_attribute(body, CTA_MARK_MASK, &mask.to_be_bytes());
    }
    if let Some(zone) = filter.zone {
        put_attribute(body, CTA_ZONE, &zone.to_be_bytes());
    }
    let (mut addresses, mut flags) = filtered_addresses(ipv6, filter.source, filter.destination);
    flags |= FILTER_PROTO_NUM;
    let mut protocol = Vec::new();
    put_attribute(&mut protocol, CTA_PROTO_NUM, &[TCP]);
    for (port, kind, flag) in [
        (filter.source_port, CTA_PROTO_SRC_PORT, FILTER_SRC_PORT),
        (filter.destination_port, CTA_PROTO_DST_PORT, FILTER_DST_PORT),
    ] {
        if let Some(port) = port {
            put_attribute(&mut protocol, kind, &port.to_be_bytes());
            flags |= flag;
        }
    }
    put_nested(&mut addresses, CTA_TUPLE_PROTO, &protocol);
    put_nested(body, CTA_TUPLE_ORIG, &addresses);
    let mut parts = Vec::new();
    put_attribute(&mut parts, CTA_FILTER_ORIG_FLAGS, &flags.to_ne_bytes());
    let (addresses, flags) =
        filtered_addresses(ipv6, filter.reply_source, filter.reply_destination);
    if flags != 0 {
        put_nested(body, CTA_TUPLE_REPLY, &addresses);
        put_attribute(&mut parts, CTA_FILTER_REPLY_FLAGS, &flags.to_ne_bytes());
    }
    put_nested(body, CTA_FILTER, &parts);
}

/// The part of a tuple with the addresses that the kernel compares, and the flags for them.
fn filtered_addresses(
    ipv6: bool,
    source: Option<IpAddr>,
    destination: Option<IpAddr>,
) -> (Vec<u8>, u32) {
    let (mut tuple, mut addresses, mut flags) = (Vec::new(), Vec::new(), 0);
    for (address, kinds, flag) in [
        (source, (CTA_IP_V4_SRC, CTA_IP_V6_SRC), FILTER_IP_SRC),
        (destination, (CTA_IP_V4_DST, CTA_IP_V6_DST), FILTER_IP_DST),
    ] {
        // Of IPv6 the kernel compares the wrong way round, and sends all others (ctnetlink_filter_match_tuple) [measured].
        if let Some(address) = address.filter(|address| address.is_ipv4() && !ipv6) {
            put_address(&mut addresses, kinds, address);
            flags |= flag;
        }
    }
    if flags != 0 {
        put_nested(&mut tuple, CTA_TUPLE_IP, &addresses);
    }
    (tuple, flags)
}

/// The rules by which a connection has another timeout than that of its state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TimeoutRules {
    /// `ct timeout` of nft(8).
    NfTables,
    /// `-j CT --timeout` of iptables(8).
    Cttimeout,
    /// `flow add` of nft(8): while a flow table has a connection, packets do not renew its timeout, and when it gives the connection back
    /// the timeout is an old one (net/netfilter/nf_flow_table_core.c, flow_offload_fixup_ct).
    FlowTables,
}

/// Appends the request for all of them. Each is answered with [`Answer::Other`].
pub fn put_rules_dump(bytes: &mut Vec<u8>, keeper: TimeoutRules, sequence: u32) {
    // Of every family.
    let mut body = vec![0; NFGEN_LEN];
    let kind = match keeper {
        TimeoutRules::NfTables => {
            put_attribute(
                &mut body,
                NFTA_OBJ_TYPE,
                &NFT_OBJECT_CT_TIMEOUT.to_be_bytes(),
            );
            NFT_GETOBJ
        }
        TimeoutRules::Cttimeout => TIMEOUT_GET,
        TimeoutRules::FlowTables => NFT_GETFLOWTABLE,
    };
    netlink::put_message(bytes, kind, NLM_F_REQUEST | NLM_F_DUMP, sequence, &body);
}

/// Appends the request for the entry with the original direction and the zone of `entry`.
pub fn put_lookup(bytes: &mut Vec<u8>, entry: &Entry, sequence: u32) {
    let body = named(entry);
    netlink::put_message(bytes, CT_GET, NLM_F_REQUEST, sequence, &body);
}

/// Appends the request to delete `entry`, and no other one with its addresses.
pub fn put_delete(bytes: &mut Vec<u8>, entry: &Entry, sequence: u32) {
    let mut body = named(entry);
    if let Some(id) = entry.id {
        put_attribute(&mut body, CTA_ID, &id.to_be_bytes());
    }
    let flags = NLM_F_REQUEST | NLM_F_ACK;
    netlink::put_message(bytes, CT_DELETE, flags, sequence, &body);
}

/// The attributes that name an entry.
fn named(entry: &Entry) -> Vec<u8> {
    let Tuple { local, peer } = entry.original;
    let mut body = nfgen(local.is_ipv6());
    let (mut tuple, mut addresses, mut protocol) = (Vec::new(), Vec::new(), Vec::new());
    put_address(&mut addresses, (CTA_IP_V4_SRC, CTA_IP_V6_SRC), local.ip());
    put_address(&mut addresses, (CTA_IP_V4_DST, CTA_IP_V6_DST), peer.ip());
    put_attribute(&mut protocol, CTA_PROTO_NUM, &[TCP]);
    put_attribute(
        &mut protocol,
        CTA_PROTO_SRC_PORT,
        &local.port().to_be_bytes(),
    );
    put_attribute(
        &mut protocol,
        CTA_PROTO_DST_PORT,
        &peer.port().to_be_bytes(),
    );
    put_nested(&mut tuple, CTA_TUPLE_IP, &addresses);
    put_nested(&mut tuple, CTA_TUPLE_PROTO, &protocol);
    let zone = entry.zone.id.to_be_bytes();
    // In the reply direction alone, the original one is in the default zone.
    match entry.zone.direction {
        ZoneDirection::Both if entry.zone.id != 0 => put_attribute(&mut body, CTA_ZONE, &zone),
        ZoneDirection::Original => put_attribute(&mut tuple, CTA_TUPLE_ZONE, &zone),
        ZoneDirection::Both | ZoneDirection::Reply => {}
    }
    put_nested(&mut body, CTA_TUPLE_ORIG, &tuple);
    body
}

fn nfgen(ipv6: bool) -> Vec<u8> {
    let family = if ipv6 { libc::AF_INET6 } else { libc::AF_INET };
    let family = u8::try_from(family).expect("AF_INET and AF_INET6 are small");
    vec![family, 0, 0, 0]
}

fn put_nested(body: &mut Vec<u8>, kind: u16, value: &[u8]) {
    put_attribute(body, kind | NLA_F_NESTED, value);
}

fn put_address(body: &mut Vec<u8>, (v4, v6): (u16, u16), address: IpAddr) {
    match address {
        IpAddr::V4(address) => put_attribute(body, v4, &address.octets()),
        IpAddr::V6(address) => put_attribute(body, v6, &address.octets()),
    }
}

/// A message of the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    Entry(Box<Entry>),
    /// The entry of a connection that is not TCP, or something that cwkill does not know.
    Other,
    /// 0: an acknowledgement. Otherwise the errno.
    Errno(i32),
    /// The end of a dump; 0, or the errno with which it failed.
    Done(i32),
}

/// The messages of a datagram, each with the sequence number of its request. Bytes that are not netlink end the list.
pub fn answers(datagram: &[u8]) -> impl Iterator<Item = (u32, Answer)> {
    netlink::messages(datagram).map(|message| (message.sequence_number(), answer(&message)))
}

fn answer(message: &NetlinkBuffer<&[u8]>) -> Answer {
    if let Some(errno) = netlink::errno(message) {
        return Answer::Errno(errno);
    }
    match message.message_type() {
        NLMSG_DONE => Answer::Done(netlink::end_of_list(message).unwrap_or(0)),
        CT_NEW => match entry(message.payload()) {
            Some(entry) => Answer::Entry(Box::new(entry)),
            None => Answer::Other,
        },
        _ => Answer::Other,
    }
}

/// An entry that the kernel has made or changed. A message about a change has only a part of the entry: the addresses, the zone, the id,
/// the status, and of the state and the mark what has changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    /// The kernel has made the entry.
    pub is_new: bool,
    pub entry: Entry,
}

/// The events of TCP in a datagram. Bytes that are not netlink end the list.
pub fn events(datagram: &[u8]) -> impl Iterator<Item = Event> {
    netlink::messages(datagram).filter_map(|message| {
        let is_of_entry = message.message_type() == CT_NEW;
        let entry = entry(message.payload()).filter(|_| is_of_entry)?;
        Some(Event {
            is_new: message.flags() & NLM_F_CREATE != 0,
            entry,
        })
    })
}

fn be16(bytes: &[u8]) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.first_chunk()?))
}

fn be32(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(*bytes.first_chunk()?))
}

/// The entry in the payload of a message; `None` if it is not one of TCP, or a tuple is missing.
fn entry(payload: &[u8]) -> Option<Entry> {
    let (mut original, mut reply, mut zone) = (None, None, Zone::default());
    let (mut state, mut status, mut left, mut mark, mut id) = (None, 0, None, None, None);
    for (kind, value) in attributes(payload.get(NFGEN_LEN..)?) {
        match kind {
            CTA_TUPLE_ORIG => original = Some(tuple(value, &mut zone, ZoneDirection::Original)?),
            CTA_TUPLE_REPLY => reply = Some(tuple(value, &mut zone, ZoneDirection::Reply)?),
            CTA_STATUS => status = be32(value)?,
            CTA_PROTOINFO => state = tcp_state(value),
            CTA_TIMEOUT => left = Some(Duration::from_secs(be32(value)?.into())),
            CTA_MARK => mark = Some(be32(value)?),
            CTA_ID => id = Some(be32(value)?),
            CTA_ZONE => {
                zone = Zone {
                    id: be16(value)?,
                    direction: ZoneDirection::Both,
                }
            }
            _ => {}
        }
    }
    Some(Entry {
        original: original?,
        reply: reply?,
        state,
        status: Status(status),
        left,
        mark,
        zone,
        id,
    })
}

fn tcp_state(bytes: &[u8]) -> Option<ConntrackState> {
    let (_, tcp) = attributes(bytes).find(|(kind, _)| *kind == CTA_PROTOINFO_TCP)?;
    let (_, state) = attributes(tcp).find(|(kind, _)| *kind == CTA_PROTOINFO_TCP_STATE)?;
    ConntrackState::from_kernel(*state.first()?)
}

/// The addresses and ports of a tuple of TCP. Sets the zone, if it is that of this `direction` alone.
fn tuple(bytes: &[u8], zone: &mut Zone, direction: ZoneDirection) -> Option<Tuple> {
    let (mut source, mut destination, mut ports) = (None, None, [None; 2]);
    let mut protocol = None;
    for (kind, value) in attributes(bytes) {
        match kind {
            CTA_TUPLE_IP => {
                for (kind, value) in attributes(value) {
                    match kind {
                        CTA_IP_V4_SRC => source = Some(v4(value)?),
                        CTA_IP_V4_DST => destination = Some(v4(value)?),
                        CTA_IP_V6_SRC => source = Some(v6(value)?),
                        CTA_IP_V6_DST => destination = Some(v6(value)?),
                        _ => {}
                    }
                }
            }
            CTA_TUPLE_PROTO => {
                for (kind, value) in attributes(value) {
                    match kind {
                        CTA_PROTO_NUM => protocol = value.first().copied(),
                        CTA_PROTO_SRC_PORT => ports[0] = be16(value),
                        CTA_PROTO_DST_PORT => ports[1] = be16(value),
                        _ => {}
                    }
                }
            }
            CTA_TUPLE_ZONE => {
                *zone = Zone {
                    id: be16(value)?,
                    direction,
                }
            }
            _ => {}
        }
    }
    let (source, destination): (IpAddr, IpAddr) = (source?, destination?);
    let is_tcp = protocol == Some(TCP) && source.is_ipv4() == destination.is_ipv4();
    is_tcp.then_some(Tuple {
        local: SocketAddr::new(source, ports[0]?),
        peer: SocketAddr::new(destination, ports[1]?),
    })
}

fn v4(bytes: &[u8]) -> Option<IpAddr> {
    Some(Ipv4Addr::from(*bytes.first_chunk::<4>()?).into())
}

fn v6(bytes: &[u8]) -> Option<IpAddr> {
    Some(Ipv6Addr::from(*bytes.first_chunk::<16>()?).into())
}

#[cfg(test)]
#[path = "codec_tests.rs"]
mod tests;
