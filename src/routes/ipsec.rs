//! Policies of IPsec (XFRM): whether the kernel would encrypt or drop a packet that this host forwards. Pure: the wire format of
//! linux/xfrm.h, and the comparison of net/xfrm/xfrm_policy.c.
//!
//! A packet socket sends below them. So a segment to an end behind a tunnel would leave in plain text.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST};

use crate::netlink::{self, attributes};

pub(super) const XFRM_MSG_NEWPOLICY: u16 = 0x13;
const XFRM_MSG_GETPOLICY: u16 = 0x15;
/// `struct xfrm_userpolicy_id`.
const ID_LEN: usize = 64;
/// `struct xfrm_userpolicy_info`, and the places in it. It begins with a `struct xfrm_selector`.
const INFO_LEN: usize = 168;
const DESTINATION: usize = 0;
const SOURCE: usize = 16;
const DESTINATION_PORT: usize = 32;
const SOURCE_PORT: usize = 36;
const FAMILY: usize = 40;
const DESTINATION_BITS: usize = 42;
const SOURCE_BITS: usize = 43;
const PROTOCOL: usize = 44;
const INTERFACE: usize = 48;
const PRIORITY: usize = 152;
const DIRECTION: usize = 160;
const ACTION: usize = 161;
const XFRM_POLICY_OUT: u8 = 1;
const XFRM_POLICY_FWD: u8 = 2;
const XFRM_POLICY_ALLOW: u8 = 0;
const XFRMA_TMPL: u16 = 5;
const XFRMA_MARK: u16 = 21;
const XFRMA_IF_ID: u16 = 31;
const TCP: u8 = 6;

/// A policy that can be about forwarded packets of TCP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct IpsecPolicy {
    destination: Network,
    source: Network,
    destination_port: Port,
    source_port: Port,
    /// The interface by which a packet leaves; 0 for any.
    interface: u32,
    /// A mark of packets and its mask.
    mark: (u32, u32),
    /// The lowest number counts.
    priority: u32,
    /// Of packets that leave; otherwise of packets that have arrived and are to be forwarded.
    is_out: bool,
    /// It lets packets pass in plain text.
    is_plain: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Network {
    address: IpAddr,
    bits: u8,
}

/// A port and its mask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Port {
    port: u16,
    mask: u16,
}

impl Network {
    fn has(self, address: IpAddr) -> bool {
        let differ = match (self.address, address) {
            (IpAddr::V4(own), IpAddr::V4(other)) => {
                (u128::from(u32::from(own) ^ u32::from(other))) << 96
            }
            (IpAddr::V6(own), IpAddr::V6(other)) => u128::from(own) ^ u128::from(other),
            _ => return false,
        };
        differ.leading_zeros() >= u32::from(self.bits)
    }
}

impl Port {
    fn has(self, port: u16) -> bool {
        (self.port ^ port) & self.mask == 0
    }
}

/// A packet that this host forwards, as the kernel compares it with policies.
#[derive(Clone, Copy, Debug)]
pub(super) struct Packet {
    pub from: SocketAddr,
    pub to: SocketAddr,
    /// Whether it is compared with the policies of direction out, otherwise with those of fwd.
    pub is_out: bool,
    /// The interface by which it leaves.
    pub interface: u32,
    pub mark: u32,
}

impl IpsecPolicy {
    fn covers(&self, packet: &Packet) -> bool {
        let Packet { from, to, .. } = packet;
        let (mark, mask) = self.mark;
        self.is_out == packet.is_out
            && self.destination.has(to.ip())
            && self.source.has(from.ip())
            && self.destination_port.has(to.port())
            && self.source_port.has(from.port())
            && packet.mark & mask == mark
            && [0, packet.interface].contains(&self.interface)
    }
}

/// Whether `policies` let such a packet pass only if it is not plain text, or not at all.
pub(super) fn forbid(policies: &[IpsecPolicy], packet: &Packet) -> bool {
    let covering = policies.iter().filter(|policy| policy.covers(packet));
    // Of several with one number the oldest counts, which the list does not tell: then one that forbids it is taken.
    let first = covering
        .map(|policy| (policy.priority, policy.is_plain))
        .min();
    first.is_some_and(|(_, is_plain)| !is_plain)
}

/// The question for all policies.
pub(super) fn policies_question(sequence: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    let flags = NLM_F_REQUEST | NLM_F_DUMP;
    netlink::put_message(
        &mut bytes,
        XFRM_MSG_GETPOLICY,
        flags,
        sequence,
        &[0; ID_LEN],
    );
    bytes
}

/// A policy of the list; `Some(None)` if it is never about forwarded packets of TCP, `None` if it cannot be read.
pub(super) fn policy(payload: &[u8]) -> Option<Option<IpsecPolicy>> {
    let info = payload.get(..INFO_LEN)?;
    let number = |place: usize| Some(u32::from_ne_bytes(*info.get(place..)?.first_chunk()?));
    let port = |place: usize| -> Option<Port> {
        let of = |place: usize| Some(u16::from_be_bytes(*info.get(place..)?.first_chunk()?));
        let (port, mask) = (of(place)?, of(place + 2)?);
        Some(Port { port, mask })
    };
    let family = i32::from(u16::from_ne_bytes(*info.get(FAMILY..)?.first_chunk()?));
    let network = |place: usize, bits: usize| -> Option<Network> {
        let bytes = info.get(place..)?;
        let address = match family {
            libc::AF_INET => Ipv4Addr::from(*bytes.first_chunk::<4>()?).into(),
            libc::AF_INET6 => Ipv6Addr::from(*bytes.first_chunk::<16>()?).into(),
            _ => return None,
        };
        let bits = info[bits];
        Some(Network { address, bits })
    };
    let (direction, protocol) = (info[DIRECTION], info[PROTOCOL]);
    if ![XFRM_POLICY_OUT, XFRM_POLICY_FWD].contains(&direction) || ![0, TCP].contains(&protocol) {
        return Some(None);
    }
    let (mut mark, mut has_template) = ((0, 0), false);
    for (kind, value) in attributes(payload.get(INFO_LEN..)?) {
        let number = |place: usize| Some(u32::from_ne_bytes(*value.get(place..)?.first_chunk()?));
        match kind {
            XFRMA_TMPL => has_template = !value.is_empty(),
            XFRMA_MARK => mark = (number(0)?, number(4)?),
            // It is for packets that enter an xfrm interface, which encrypts those of packet sockets too.
            XFRMA_IF_ID if number(0)? != 0 => return Some(None),
            _ => {}
        }
    }
    Some(Some(IpsecPolicy {
        destination: network(DESTINATION, DESTINATION_BITS)?,
        source: network(SOURCE, SOURCE_BITS)?,
        destination_port: port(DESTINATION_PORT)?,
        source_port: port(SOURCE_PORT)?,
        interface: number(INTERFACE)?,
        mark,
        priority: number(PRIORITY)?,
        is_out: direction == XFRM_POLICY_OUT,
        is_plain: info[ACTION] == XFRM_POLICY_ALLOW && !has_template,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::put_attribute;

    const OUT: u8 = 1;
    const FWD: u8 = 2;

    /// The bytes of a policy from 10.0.0.0/8 to 10.79.2.0/24.
    fn info(direction: u8, priority: u32) -> Vec<u8> {
        let mut info = vec![0; INFO_LEN];
        info[DESTINATION..][..4].copy_from_slice(&[10, 79, 2, 0]);
        info[SOURCE..][..4].copy_from_slice(&[10, 0, 0, 0]);
        let family = u16::try_from(libc::AF_INET).unwrap();
        info[FAMILY..][..2].copy_from_slice(&family.to_ne_bytes());
        (info[DESTINATION_BITS], info[SOURCE_BITS]) = (24, 8);
        info[PRIORITY..][..4].copy_from_slice(&priority.to_ne_bytes());
        info[DIRECTION] = direction;
        info
    }

    fn encrypting(mut info: Vec<u8>) -> Vec<u8> {
        put_attribute(&mut info, XFRMA_TMPL, &[0; 64]);
        info
    }

    fn read(bodies: &[Vec<u8>]) -> Vec<IpsecPolicy> {
        for length in 0..INFO_LEN {
            let cut = bodies.first().map(|body| policy(&body[..length]));
            assert!(cut.is_none_or(|cut| cut.is_none()));
        }
        let policies = bodies.iter().map(|body| policy(body).unwrap());
        policies.flatten().collect()
    }

    fn packet(from: &str, to: &str, is_out: bool) -> Packet {
        Packet {
            is_out,
            from: from.parse().unwrap(),
            to: to.parse().unwrap(),
            interface: 3,
            mark: 0,
        }
    }

    /// Whether these policies forbid plain packets from the client to the server.
    fn forbidden(bodies: &[Vec<u8>]) -> bool {
        let policies = read(bodies);
        let forbids = |is_out| {
            forbid(
                &policies,
                &packet("10.79.1.2:40000", "10.79.2.2:7000", is_out),
            )
        };
        forbids(true) || forbids(false)
    }

    #[test]
    fn a_policy_covers_the_packets_of_its_networks() {
        for way in [OUT, FWD] {
            let policies = read(&[encrypting(info(way, 0))]);
            for (from, to, expected) in [
                ("10.79.1.2:40000", "10.79.2.2:7000", true),
                ("10.79.1.2:40000", "10.79.3.2:7000", false),
                ("11.79.1.2:40000", "10.79.2.2:7000", false),
                ("10.79.2.2:7000", "10.79.1.2:40000", false),
                ("[fd79::1]:4", "[fd79::2]:5", false),
            ] {
                let found = |is_out| forbid(&policies, &packet(from, to, is_out));
                assert_eq!(found(way == OUT), expected, "{way} {from} {to}");
                assert!(!found(way != OUT), "{way} {from} {to}");
            }
        }
        assert!(!forbidden(&[]));
        // Of packets to this host.
        assert!(read(&[encrypting(info(0, 0))]).is_empty());
    }

    #[test]
    fn ports_the_protocol_the_interface_and_the_mark_count() {
        let with = |place: usize, bytes: &[u8]| {
            let mut info = info(OUT, 0);
            info[place..][..bytes.len()].copy_from_slice(bytes);
            forbidden(&[encrypting(info)])
        };
        let port = |port: u16| [port.to_be_bytes(), [0xff; 2]].concat();
        assert!(with(DESTINATION_PORT, &port(7000)));
        assert!(!with(DESTINATION_PORT, &port(7001)));
        assert!(with(SOURCE_PORT, &port(40000)));
        assert!(!with(SOURCE_PORT, &port(7000)));
        assert!(with(PROTOCOL, &[TCP]));
        // UDP.
        assert!(!with(PROTOCOL, &[17]));
        assert!(with(INTERFACE, &3u32.to_ne_bytes()));
        assert!(!with(INTERFACE, &4u32.to_ne_bytes()));
        let with = |kind, value: [u32; 2]| {
            let mut body = encrypting(info(OUT, 0));
            let value = value.map(u32::to_ne_bytes).concat();
            put_attribute(&mut body, kind, &value);
            forbidden(&[body])
        };
        assert!(with(XFRMA_MARK, [0, 0xff]));
        assert!(!with(XFRMA_MARK, [1, 0xff]));
        assert!(with(XFRMA_IF_ID, [0, 0]));
        assert!(!with(XFRMA_IF_ID, [9, 0]));
    }

    #[test]
    fn the_policy_with_the_lowest_number_counts() {
        let mut block = info(OUT, 5);
        block[ACTION] = 1;
        assert!(forbidden(&[block]));
        let (plain, tunnel) = (|n| info(OUT, n), |n| encrypting(info(OUT, n)));
        assert!(!forbidden(&[plain(5)]));
        assert!(!forbidden(&[tunnel(6), plain(5)]));
        assert!(forbidden(&[plain(6), tunnel(5)]));
        assert!(forbidden(&[plain(5), tunnel(5)]));
        // Each way by itself.
        assert!(forbidden(&[plain(5), encrypting(info(FWD, 6))]));
    }

    #[test]
    fn networks_of_ipv6_are_compared_by_their_bits() {
        let network = |bits| Network {
            address: "fd79::8000".parse().unwrap(),
            bits,
        };
        let other: IpAddr = "fd79::c000".parse().unwrap();
        assert!(network(113).has(other));
        assert!(!network(114).has(other));
        assert!(network(0).has("::1".parse().unwrap()));
        assert!(network(128).has("fd79::8000".parse().unwrap()));
        assert!(!network(0).has("10.0.0.1".parse().unwrap()));
    }
}
