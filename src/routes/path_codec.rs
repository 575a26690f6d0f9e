//! The wire format of the questions for a path: routes, links and neighbours, as pure functions over bytes (linux/rtnetlink.h,
//! linux/neighbour.h).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST};

use crate::netlink::{self, attributes, put_attribute};

const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_NEWROUTE: u16 = 24;
const RTM_GETROUTE: u16 = 26;
const RTM_NEWNEIGH: u16 = 28;
const RTM_GETNEIGH: u16 = 30;

/// `struct rtmsg` and the place of the type of the route in it.
const ROUTE_LEN: usize = 12;
const ROUTE_TYPE: usize = 7;
const RTN_UNICAST: u8 = 1;
const RTA_DST: u16 = 1;
const RTA_SRC: u16 = 2;
const RTA_IIF: u16 = 3;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_VIA: u16 = 18;

/// `struct ifinfomsg` and the place of the flags in it.
const LINK_LEN: usize = 16;
const LINK_FLAGS: usize = 8;

/// `struct ndmsg`: family, padding of three bytes, interface, state, flags, type.
const NEIGHBOUR_LEN: usize = 12;
const NEIGHBOUR_STATE: usize = 8;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
/// The kernel resolves the address if it has to.
const NTF_USE: u8 = 1;
/// The states in which the address of a neighbour can be used: reachable, stale, delay, probe, noarp, permanent.
const NUD_VALID: u16 = 0x02 | 0x04 | 0x08 | 0x10 | 0x40 | 0x80;

fn family(address: IpAddr) -> u8 {
    let family = match address {
        IpAddr::V4(_) => libc::AF_INET,
        IpAddr::V6(_) => libc::AF_INET6,
    };
    u8::try_from(family).expect("AF_INET and AF_INET6 are small")
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => Some(Ipv4Addr::from(*bytes.first_chunk::<4>()?).into()),
        16 => Some(Ipv6Addr::from(*bytes.first_chunk::<16>()?).into()),
        _ => None,
    }
}

/// The question for the route of a packet to `to`: one of this host, or one from `from` that arrives at an interface.
pub(super) fn route_question(to: IpAddr, arrives: Option<(IpAddr, u32)>, sequence: u32) -> Vec<u8> {
    let mut body = vec![0; ROUTE_LEN];
    body[0] = family(to);
    body[1] = u8::try_from(octets(to).len() * 8).expect("at most 128 bits");
    put_attribute(&mut body, RTA_DST, &octets(to));
    if let Some((from, interface)) = arrives {
        body[2] = body[1];
        put_attribute(&mut body, RTA_SRC, &octets(from));
        put_attribute(&mut body, RTA_IIF, &interface.to_ne_bytes());
    }
    message(RTM_GETROUTE, NLM_F_REQUEST, sequence, &body)
}

/// The question for a link.
pub(super) fn link_question(interface: u32, sequence: u32) -> Vec<u8> {
    let mut body = vec![0; LINK_LEN];
    body[4..8].copy_from_slice(&interface.to_ne_bytes());
    message(RTM_GETLINK, NLM_F_REQUEST, sequence, &body)
}

/// The question for a neighbour.
pub(super) fn neighbour_question(hop: IpAddr, interface: u32, sequence: u32) -> Vec<u8> {
    message(
        RTM_GETNEIGH,
        NLM_F_REQUEST,
        sequence,
        &neighbour(hop, interface, 0),
    )
}

/// The request to find the hardware address of a neighbour.
pub(super) fn resolve_request(hop: IpAddr, interface: u32, sequence: u32) -> Vec<u8> {
    let flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
    message(
        RTM_NEWNEIGH,
        flags,
        sequence,
        &neighbour(hop, interface, NTF_USE),
    )
}

fn neighbour(hop: IpAddr, interface: u32, flags: u8) -> Vec<u8> {
    let mut body = vec![0; NEIGHBOUR_LEN];
    body[0] = family(hop);
    body[4..8].copy_from_slice(&interface.to_ne_bytes());
    body[10] = flags;
    put_attribute(&mut body, NDA_DST, &octets(hop));
    body
}

fn message(kind: u16, flags: u16, sequence: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    netlink::put_message(&mut bytes, kind, flags, sequence, body);
    bytes
}

/// An answer of the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// The interface of a route to another host, and the gateway, if it has one.
    Route {
        interface: u32,
        gateway: Option<IpAddr>,
    },
    /// A route that does not lead to another host.
    NotForwarded,
    /// The flags of a link (linux/if.h).
    Link(u32),
    /// The hardware address of a neighbour; `None` if it is not known now.
    Neighbour(Option<Vec<u8>>),
    /// 0: an acknowledgement. Otherwise the errno.
    Errno(i32),
}

/// The first answer to the request with this number.
pub(super) fn answer(datagram: &[u8], sequence: u32) -> Option<Answer> {
    let mut messages = netlink::messages(datagram);
    let message = messages.find(|message| message.sequence_number() == sequence)?;
    if let Some(errno) = netlink::errno(&message) {
        return Some(Answer::Errno(errno));
    }
    let payload = message.payload();
    match message.message_type() {
        RTM_NEWROUTE => route(payload),
        RTM_NEWLINK => {
            let flags = payload.get(LINK_FLAGS..)?.first_chunk()?;
            Some(Answer::Link(u32::from_ne_bytes(*flags)))
        }
        RTM_NEWNEIGH => {
            let state = u16::from_ne_bytes(*payload.get(NEIGHBOUR_STATE..)?.first_chunk()?);
            let mut parts = attributes(payload.get(NEIGHBOUR_LEN..)?);
            let hardware = parts.find(|(kind, _)| *kind == NDA_LLADDR);
            let hardware = hardware.filter(|_| state & NUD_VALID != 0);
            Some(Answer::Neighbour(hardware.map(|(_, value)| value.to_vec())))
        }
        _ => None,
    }
}

fn route(payload: &[u8]) -> Option<Answer> {
    let (mut interface, mut gateway) = (None, None);
    for (kind, value) in attributes(payload.get(ROUTE_LEN..)?) {
        match kind {
            RTA_OIF => interface = value.first_chunk().map(|index| u32::from_ne_bytes(*index)),
            RTA_GATEWAY => gateway = address(value),
            // A gateway of the other family: the family in two bytes, then the address.
            RTA_VIA => gateway = address(value.get(2..)?),
            _ => {}
        }
    }
    Some(match (payload[ROUTE_TYPE], interface) {
        (RTN_UNICAST, Some(interface)) => Answer::Route { interface, gateway },
        _ => Answer::NotForwarded,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn route_of(kind: u8, parts: &[(u16, &[u8])]) -> Option<Answer> {
        let mut body = vec![0; ROUTE_LEN];
        body[ROUTE_TYPE] = kind;
        for (kind, value) in parts {
            put_attribute(&mut body, *kind, value);
        }
        answer(&message(RTM_NEWROUTE, 0, 7, &body), 7)
    }

    #[test]
    fn a_route_leads_to_an_interface_and_perhaps_a_gateway() {
        let interface = 3u32.to_ne_bytes();
        let to = |gateway: Option<&str>| {
            Some(Answer::Route {
                interface: 3,
                gateway: gateway.map(ip),
            })
        };
        assert_eq!(route_of(1, &[(RTA_OIF, &interface)]), to(None));
        let parts: &[(u16, &[u8])] = &[(RTA_OIF, &interface), (RTA_GATEWAY, &[10, 0, 0, 1])];
        assert_eq!(route_of(1, parts), to(Some("10.0.0.1")));
        let mut via = vec![10, 0];
        via.extend(octets(ip("fe80::1")));
        assert_eq!(
            route_of(1, &[(RTA_OIF, &interface), (RTA_VIA, &via)]),
            to(Some("fe80::1"))
        );
        // Local, unreachable, and without an interface.
        for kind in [2, 7] {
            assert_eq!(
                route_of(kind, &[(RTA_OIF, &interface)]),
                Some(Answer::NotForwarded)
            );
        }
        assert_eq!(route_of(1, &[]), Some(Answer::NotForwarded));
    }

    #[test]
    fn only_a_neighbour_that_can_be_used_has_an_address() {
        let of = |state: u16, hardware: Option<&[u8]>| {
            let mut body = neighbour(ip("10.0.0.1"), 3, 0);
            body[NEIGHBOUR_STATE..NEIGHBOUR_STATE + 2].copy_from_slice(&state.to_ne_bytes());
            if let Some(hardware) = hardware {
                put_attribute(&mut body, NDA_LLADDR, hardware);
            }
            answer(&message(RTM_NEWNEIGH, 0, 1, &body), 1)
        };
        let mac = [2, 0, 0, 0, 0, 1];
        for state in [0x02, 0x04, 0x08, 0x10, 0x80] {
            assert_eq!(
                of(state, Some(&mac)),
                Some(Answer::Neighbour(Some(mac.to_vec())))
            );
        }
        // Incomplete and failed.
        for (state, hardware) in [(0x01, None), (0x20, Some(&mac[..])), (0x02, None)] {
            assert_eq!(of(state, hardware), Some(Answer::Neighbour(None)));
        }
    }

    #[test]
    fn questions_are_as_the_kernel_reads_them() {
        let bytes = route_question(ip("10.9.1.2"), Some((ip("10.9.2.2"), 5)), 1);
        let body = &bytes[netlink::HEADER_LEN..];
        assert_eq!(body[..3], [2, 32, 32]);
        let parts: Vec<(u16, &[u8])> = attributes(&body[ROUTE_LEN..]).collect();
        let interface = 5u32.to_ne_bytes();
        let expected: [(u16, &[u8]); 3] =
            [(1, &[10, 9, 1, 2]), (2, &[10, 9, 2, 2]), (3, &interface)];
        assert_eq!(parts, expected);
        assert_eq!(
            route_question(ip("fd00::1"), None, 1).len(),
            netlink::HEADER_LEN + 12 + 20
        );
        let link = link_question(0x0102, 1);
        assert_eq!(
            link[netlink::HEADER_LEN + 4..][..4],
            0x0102u32.to_ne_bytes()
        );
        let resolve = resolve_request(ip("fd00::1"), 3, 1);
        assert_eq!(resolve[netlink::HEADER_LEN + 10], NTF_USE);
        let link_answer = {
            let mut body = vec![0; LINK_LEN];
            body[LINK_FLAGS..LINK_FLAGS + 4].copy_from_slice(&0x1043u32.to_ne_bytes());
            message(RTM_NEWLINK, 0, 9, &body)
        };
        assert_eq!(answer(&link_answer, 9), Some(Answer::Link(0x1043)));
        assert_eq!(answer(&link_answer, 8), None);
        for length in 0..link_answer.len() {
            assert_eq!(answer(&link_answer[..length], 9), None);
        }
    }
}
