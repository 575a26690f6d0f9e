//! TCP segments in IP packets: encodes them for a raw socket, and parses them from a packet socket. Pure; [`parse`] accepts any
//! bytes and never panics.
//!
//! The types of pnet_packet read and write the fields. They check only that a fixed header fits, so this module compares every length
//! in a packet with the number of bytes that are present.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use pnet_packet::ethernet::{EtherType, EtherTypes};
use pnet_packet::ip::{IpNextHeaderProtocol, IpNextHeaderProtocols};
use pnet_packet::ipv4::{Ipv4Flags, Ipv4Packet, MutableIpv4Packet};
use pnet_packet::ipv6::{Ipv6Packet, MutableIpv6Packet};
use pnet_packet::tcp::{self, MutableTcpPacket, TcpPacket};
use pnet_packet::vlan::VlanPacket;

pub use pnet_packet::tcp::TcpFlags;

use super::Seq;

const IPV4_HEADER_LEN: usize = 20;
const IPV6_HEADER_LEN: usize = 40;
const TCP_HEADER_LEN: usize = 20;
/// The lengths in the IP headers of encoded segments. IPv4 counts its own header, IPv6 does not.
const IPV4_TOTAL_LENGTH: u16 = 40;
const IPV6_PAYLOAD_LENGTH: u16 = 20;
/// Satisfies every IP_MINTTL of a listener or a connection (RFC 5082 asks for 255).
const HOP_LIMIT: u8 = 255;
/// The maximum number of VLAN tags: 802.1ad has two. This host sends no frames with more.
const MAX_VLAN_TAGS: usize = 2;
/// The maximum number of IPv6 extension headers. Socket options can add four kinds (RFC 8200 §4.1).
const MAX_EXTENSION_HEADERS: usize = 8;

/// A TCP segment without its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    pub from: SocketAddr,
    pub to: SocketAddr,
    /// Sequence number of its first byte.
    pub seq: Seq,
    /// The next sequence number that its sender expects. Meaningless without [`TcpFlags::ACK`].
    pub ack: Seq,
    /// [`TcpFlags`].
    pub flags: u8,
    /// Number of payload bytes. [`Segment::encode`] writes no payload.
    pub payload_len: u32,
}

/// Why bytes are not a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoSegment {
    /// They are not TCP over IP, or they are a fragment.
    Other,
    /// A header, or a length in it, goes beyond the end of the bytes.
    Truncated,
}

impl Segment {
    /// The sequence number after this segment. SYN and FIN count as one byte each (RFC 9293 §3.4).
    pub fn end_seq(&self) -> Seq {
        let flag = |flag| u32::from(self.flags & flag != 0);
        self.seq
            .plus(self.payload_len)
            .plus(flag(TcpFlags::SYN))
            .plus(flag(TcpFlags::FIN))
    }

    /// The IP packet with this segment; `None` if the addresses are of different families.
    ///
    /// The window is 0 and there are no options, because no segment of cwkill needs them. A receiver checks only the sequence
    /// number of an RST, also if the connection uses timestamps (RFC 7323 §3.2; net/ipv4/tcp_input.c, tcp_validate_incoming: PAWS
    /// applies only to segments with a timestamp).
    pub fn encode(&self) -> Option<Vec<u8>> {
        match (self.from.ip(), self.to.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => Some(self.encode_ipv4(from, to)),
            (IpAddr::V6(from), IpAddr::V6(to)) => Some(self.encode_ipv6(from, to)),
            _ => None,
        }
    }

    fn encode_ipv4(&self, from: Ipv4Addr, to: Ipv4Addr) -> Vec<u8> {
        let mut bytes = vec![0; IPV4_HEADER_LEN + TCP_HEADER_LEN];
        let mut ip = MutableIpv4Packet::new(&mut bytes).expect("the header fits");
        ip.set_version(4);
        ip.set_header_length(5);
        ip.set_total_length(IPV4_TOTAL_LENGTH);
        ip.set_flags(Ipv4Flags::DontFragment);
        ip.set_ttl(HOP_LIMIT);
        ip.set_next_level_protocol(IpNextHeaderProtocols::Tcp);
        ip.set_source(from);
        ip.set_destination(to);
        let checksum = pnet_packet::ipv4::checksum(&ip.to_immutable());
        ip.set_checksum(checksum);
        let mut tcp = self.encode_tcp(&mut bytes[IPV4_HEADER_LEN..]);
        tcp.set_checksum(tcp::ipv4_checksum(&tcp.to_immutable(), &from, &to));
        bytes
    }

    fn encode_ipv6(&self, from: Ipv6Addr, to: Ipv6Addr) -> Vec<u8> {
        let mut bytes = vec![0; IPV6_HEADER_LEN + TCP_HEADER_LEN];
        let mut ip = MutableIpv6Packet::new(&mut bytes).expect("the header fits");
        ip.set_version(6);
        ip.set_payload_length(IPV6_PAYLOAD_LENGTH);
        ip.set_next_header(IpNextHeaderProtocols::Tcp);
        ip.set_hop_limit(HOP_LIMIT);
        ip.set_source(from);
        ip.set_destination(to);
        let mut tcp = self.encode_tcp(&mut bytes[IPV6_HEADER_LEN..]);
        tcp.set_checksum(tcp::ipv6_checksum(&tcp.to_immutable(), &from, &to));
        bytes
    }

    fn encode_tcp<'b>(&self, bytes: &'b mut [u8]) -> MutableTcpPacket<'b> {
        let mut tcp = MutableTcpPacket::new(bytes).expect("the header fits");
        tcp.set_source(self.from.port());
        tcp.set_destination(self.to.port());
        tcp.set_sequence(self.seq.0);
        tcp.set_acknowledgement(self.ack.0);
        tcp.set_data_offset(5);
        tcp.set_flags(self.flags);
        tcp
    }
}

/// Parses the segment in a packet; `ether_type` is from the link layer. Checksums are not checked: if the device computes them, an
/// outgoing packet has none yet.
///
/// # Errors
/// [`NoSegment`]: the packet has no complete segment.
pub fn parse(ether_type: u16, bytes: &[u8]) -> Result<Segment, NoSegment> {
    let (mut ether_type, mut bytes) = (EtherType(ether_type), bytes);
    for _ in 0..=MAX_VLAN_TAGS {
        match ether_type {
            EtherTypes::Ipv4 => return parse_ipv4(bytes),
            EtherTypes::Ipv6 => return parse_ipv6(bytes),
            EtherTypes::Vlan | EtherTypes::PBridge => {
                let tag = VlanPacket::new(bytes).ok_or(NoSegment::Truncated)?;
                ether_type = tag.get_ethertype();
                bytes = &bytes[VlanPacket::minimum_packet_size()..];
            }
            _ => return Err(NoSegment::Other),
        }
    }
    Err(NoSegment::Other)
}

fn parse_ipv4(bytes: &[u8]) -> Result<Segment, NoSegment> {
    let ip = Ipv4Packet::new(bytes).ok_or(NoSegment::Truncated)?;
    let more = ip.get_flags() & Ipv4Flags::MoreFragments != 0;
    if ip.get_version() != 4
        || ip.get_next_level_protocol() != IpNextHeaderProtocols::Tcp
        || more
        || ip.get_fragment_offset() != 0
    {
        return Err(NoSegment::Other);
    }
    let header = usize::from(ip.get_header_length()) * 4;
    if header < IPV4_HEADER_LEN {
        return Err(NoSegment::Other);
    }
    let length = usize::from(ip.get_total_length());
    let payload = length.checked_sub(header).ok_or(NoSegment::Truncated)?;
    let rest = bytes.get(header..).ok_or(NoSegment::Truncated)?;
    parse_tcp(
        rest,
        payload,
        ip.get_source().into(),
        ip.get_destination().into(),
    )
}

fn parse_ipv6(bytes: &[u8]) -> Result<Segment, NoSegment> {
    let ip = Ipv6Packet::new(bytes).ok_or(NoSegment::Truncated)?;
    if ip.get_version() != 6 {
        return Err(NoSegment::Other);
    }
    let mut payload = usize::from(ip.get_payload_length());
    let mut next = ip.get_next_header();
    let mut rest = &bytes[IPV6_HEADER_LEN..];
    for _ in 0..=MAX_EXTENSION_HEADERS {
        if next == IpNextHeaderProtocols::Tcp {
            let (from, to) = (ip.get_source().into(), ip.get_destination().into());
            return parse_tcp(rest, payload, from, to);
        }
        let (following, length) = extension_header(next, rest)?;
        next = following;
        rest = rest.get(length..).ok_or(NoSegment::Truncated)?;
        payload = payload.checked_sub(length).ok_or(NoSegment::Truncated)?;
    }
    Err(NoSegment::Other)
}

/// The header after the extension header `kind` at the start of `bytes`, and the length of the latter.
fn extension_header(
    kind: IpNextHeaderProtocol,
    bytes: &[u8],
) -> Result<(IpNextHeaderProtocol, usize), NoSegment> {
    // RFC 8200 §4.2 to §4.6: the next header, then the length in units of 8 bytes, without the first unit. A fragment header is not
    // accepted: its segment is incomplete. RFC 4302 §2: the authentication header counts in units of 4 bytes.
    let (unit, first) = match kind {
        IpNextHeaderProtocols::Hopopt
        | IpNextHeaderProtocols::Ipv6Route
        | IpNextHeaderProtocols::Ipv6Opts => (8, 8),
        IpNextHeaderProtocols::Ah => (4, 8),
        _ => return Err(NoSegment::Other),
    };
    match bytes {
        [next, length, ..] => Ok((
            IpNextHeaderProtocol(*next),
            first + unit * usize::from(*length),
        )),
        _ => Err(NoSegment::Truncated),
    }
}

/// `length` is from the IP header. The capture may have cut `bytes` after the TCP header.
fn parse_tcp(bytes: &[u8], length: usize, from: IpAddr, to: IpAddr) -> Result<Segment, NoSegment> {
    let tcp = TcpPacket::new(bytes).ok_or(NoSegment::Truncated)?;
    let header = usize::from(tcp.get_data_offset()) * 4;
    if header < TCP_HEADER_LEN {
        return Err(NoSegment::Other);
    }
    let payload = length.checked_sub(header).ok_or(NoSegment::Truncated)?;
    Ok(Segment {
        from: SocketAddr::new(from, tcp.get_source()),
        to: SocketAddr::new(to, tcp.get_destination()),
        seq: Seq(tcp.get_sequence()),
        ack: Seq(tcp.get_acknowledgement()),
        flags: tcp.get_flags(),
        payload_len: u32::try_from(payload).map_err(|_| NoSegment::Other)?,
    })
}

#[cfg(test)]
#[path = "segment_tests.rs"]
mod tests;
