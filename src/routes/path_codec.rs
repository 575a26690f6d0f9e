//! The wire format of the questions for a path: routes, links and neighbours, as pure functions over bytes (linux/rtnetlink.h,
//! linux/neighbour.h).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use netlink_packet_core::{NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_REPLACE, NLM_F_REQUEST};

use super::forwarding::{Origin, Question};
use crate::netlink::{self, attributes, put_attribute};

pub(super) const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_NEWROUTE: u16 = 24;
const RTM_GETROUTE: u16 = 26;
const RTM_NEWNEIGH: u16 = 28;
const RTM_GETNEIGH: u16 = 30;
pub(super) const RTM_NEWRULE: u16 = 32;
const RTM_GETRULE: u16 = 34;

/// `struct rtmsg` and the place of the type of the route in it.
const ROUTE_LEN: usize = 12;
const ROUTE_TYPE: usize = 7;
const RTN_UNICAST: u8 = 1;
const RTN_LOCAL: u8 = 2;
const RTA_DST: u16 = 1;
const RTA_SRC: u16 = 2;
const RTA_IIF: u16 = 3;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_MULTIPATH: u16 = 9;
const RTA_MARK: u16 = 16;
const RTA_VIA: u16 = 18;
const RTA_ENCAP_TYPE: u16 = 21;
const RTA_IP_PROTO: u16 = 27;
const RTA_SPORT: u16 = 28;
const RTA_DPORT: u16 = 29;
const RTA_NH_ID: u16 = 30;
/// The place of the flags in `struct rtmsg`, and the one for the route as it is configured, instead of the hop that is chosen.
const ROUTE_FLAGS: usize = 8;
const RTM_F_FIB_MATCH: u32 = 0x2000;
/// `struct rtnexthop`, whose first two bytes are its length.
const NEXT_HOP_LEN: usize = 8;
const TCP: u8 = 6;

/// `struct fib_rule_hdr` (linux/fib_rules.h).
const RULE_LEN: usize = 12;
const FRA_IIFNAME: u16 = 3;
const FRA_FWMARK: u16 = 10;
const FRA_FWMASK: u16 = 16;

/// `struct ifinfomsg` and the places of the index and of the flags in it.
const LINK_LEN: usize = 16;
const LINK_INDEX: usize = 4;
const LINK_FLAGS: usize = 8;
const IFLA_IFNAME: u16 = 3;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_PROP_LIST: u16 = 52;
const IFLA_ALT_IFNAME: u16 = 53;
/// linux/if.h.
const IFF_UP: u32 = 0x1;
const IFF_LOOPBACK: u32 = 0x8;

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

/// The question for the route of a packet. Ports and the protocol count for rules and for the hash of a route with several hops.
pub(super) fn route_question(question: &Question, sequence: u32) -> Vec<u8> {
    let Question { to, from, .. } = question;
    let mut body = vec![0; ROUTE_LEN];
    body[0] = family(to.ip());
    body[1] = u8::try_from(octets(to.ip()).len() * 8).expect("at most 128 bits");
    put_attribute(&mut body, RTA_DST, &octets(to.ip()));
    match question.origin {
        Origin::Interface(interface) => {
            body[2] = body[1];
            put_attribute(&mut body, RTA_SRC, &octets(from.ip()));
            put_attribute(&mut body, RTA_IIF, &interface.to_ne_bytes());
        }
        // The kernel refuses a source that is not of this host.
        Origin::Host => {}
        Origin::Vrf(vrf) => put_attribute(&mut body, RTA_OIF, &vrf.to_ne_bytes()),
    }
    if question.mark != 0 {
        put_attribute(&mut body, RTA_MARK, &question.mark.to_ne_bytes());
    }
    put_attribute(&mut body, RTA_IP_PROTO, &[TCP]);
    put_attribute(&mut body, RTA_SPORT, &from.port().to_be_bytes());
    put_attribute(&mut body, RTA_DPORT, &to.port().to_be_bytes());
    message(RTM_GETROUTE, NLM_F_REQUEST, sequence, &body)
}

/// The question for the route as it is configured: the answer has all its hops.
pub(super) fn hops_question(question: &Question, sequence: u32) -> Vec<u8> {
    let mut bytes = route_question(question, sequence);
    bytes[netlink::HEADER_LEN + ROUTE_FLAGS..][..4].copy_from_slice(&RTM_F_FIB_MATCH.to_ne_bytes());
    bytes
}

/// The question for all links.
pub(super) fn links_question(sequence: u32) -> Vec<u8> {
    message(
        RTM_GETLINK,
        NLM_F_REQUEST | NLM_F_DUMP,
        sequence,
        &[0; LINK_LEN],
    )
}

/// The question for all rules of a family.
pub(super) fn rules_question(ipv6: bool, sequence: u32) -> Vec<u8> {
    let mut body = vec![0; RULE_LEN];
    let family = if ipv6 { libc::AF_INET6 } else { libc::AF_INET };
    body[0] = u8::try_from(family).expect("AF_INET and AF_INET6 are small");
    message(RTM_GETRULE, NLM_F_REQUEST | NLM_F_DUMP, sequence, &body)
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
    /// A route with several hops, or one that puts packets into other ones (MPLS, SRv6, a tunnel): a plain packet to its neighbour could reach
    /// another host.
    Several,
    /// The kernel delivers the packet to this host.
    Local,
    /// A route that leads nowhere.
    NotForwarded,
    /// The flags of a link (linux/if.h).
    Link(u32),
    /// The hardware address of a neighbour; `None` if it is not known now.
    Neighbour(Option<Vec<u8>>),
    /// 0: an acknowledgement. Otherwise the errno.
    Errno(i32),
}

/// A link of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Link {
    pub index: u32,
    /// Its name, and the alternative ones.
    pub names: Vec<Vec<u8>>,
    /// Whether it is up, and not the loopback interface.
    pub is_used: bool,
    pub is_vrf: bool,
}

/// A rule of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rule {
    /// The name of the interface at which packets arrive.
    pub arrives_at: Option<Vec<u8>>,
    pub by_mark: bool,
}

pub(super) fn link(payload: &[u8]) -> Option<Link> {
    let index = u32::from_ne_bytes(*payload.get(LINK_INDEX..)?.first_chunk()?);
    let flags = u32::from_ne_bytes(*payload.get(LINK_FLAGS..)?.first_chunk()?);
    let (mut names, mut is_vrf) = (Vec::new(), false);
    for (kind, value) in attributes(payload.get(LINK_LEN..)?) {
        match kind {
            IFLA_IFNAME => names.push(text(value)),
            IFLA_PROP_LIST => {
                let others = attributes(value).filter(|(kind, _)| *kind == IFLA_ALT_IFNAME);
                names.extend(others.map(|(_, value)| text(value)));
            }
            IFLA_LINKINFO => {
                is_vrf = attributes(value)
                    .any(|(kind, value)| kind == IFLA_INFO_KIND && text(value) == b"vrf");
            }
            _ => {}
        }
    }
    Some(Link {
        index,
        names,
        is_used: flags & IFF_UP != 0 && flags & IFF_LOOPBACK == 0,
        is_vrf,
    })
}

pub(super) fn rule(payload: &[u8]) -> Option<Rule> {
    let (mut arrives_at, mut by_mark) = (None, false);
    for (kind, value) in attributes(payload.get(RULE_LEN..)?) {
        match kind {
            FRA_IIFNAME => arrives_at = Some(text(value)),
            // Of the mark 0 the kernel reports only the mask.
            FRA_FWMARK | FRA_FWMASK => by_mark = true,
            _ => {}
        }
    }
    Some(Rule {
        arrives_at,
        by_mark,
    })
}

/// A string without the NUL at its end.
fn text(value: &[u8]) -> Vec<u8> {
    let end = value.iter().position(|byte| *byte == 0);
    value[..end.unwrap_or(value.len())].to_vec()
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
    let (mut hops, mut is_object, mut is_wrapped) = (0, false, false);
    for (kind, value) in attributes(payload.get(ROUTE_LEN..)?) {
        match kind {
            RTA_OIF => interface = value.first_chunk().map(|index| u32::from_ne_bytes(*index)),
            RTA_GATEWAY => gateway = address(value),
            RTA_MULTIPATH => hops = next_hops(value),
            RTA_NH_ID => is_object = true,
            RTA_ENCAP_TYPE => is_wrapped = true,
            // A gateway of the other family: the family in two bytes, then the address.
            RTA_VIA => gateway = address(value.get(2..)?),
            _ => {}
        }
    }
    Some(match (payload[ROUTE_TYPE], interface) {
        // Of a group of nexthop objects the kernel may name only the id (net.ipv4.nexthop_compat_mode).
        (RTN_UNICAST, interface)
            if hops > 1 || is_wrapped || (is_object && interface.is_none()) =>
        {
            Answer::Several
        }
        (RTN_UNICAST, Some(interface)) => Answer::Route { interface, gateway },
        (RTN_LOCAL, _) => Answer::Local,
        _ => Answer::NotForwarded,
    })
}

fn next_hops(mut bytes: &[u8]) -> usize {
    let mut count = 0;
    while let Some(length) = bytes.first_chunk() {
        let length = usize::from(u16::from_ne_bytes(*length)).max(NEXT_HOP_LEN);
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        count += 1;
    }
    count
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
        let of_kind = |kind| route_of(kind, &[(RTA_OIF, &interface)]);
        assert_eq!(of_kind(2), Some(Answer::Local));
        assert_eq!(of_kind(7), Some(Answer::NotForwarded));
        assert_eq!(route_of(1, &[]), Some(Answer::NotForwarded));
        let hop = [16, 0, 0, 0, 3, 0, 0, 0, 8, 0, 5, 0, 10, 0, 0, 1];
        if cfg!(target_endian = "little") {
            let hops = [hop, hop].concat();
            assert_eq!(route_of(1, &[(9, &hops)]), Some(Answer::Several));
        }
        assert_eq!(route_of(1, &[(30, &[1, 0, 0, 0])]), Some(Answer::Several));
        let object: &[(u16, &[u8])] = &[(RTA_OIF, &interface), (30, &[1, 0, 0, 0])];
        assert_eq!(route_of(1, object), to(None));
        // MPLS (LWTUNNEL_ENCAP_MPLS).
        let wrapped: &[(u16, &[u8])] = &[(RTA_OIF, &interface), (21, &[1, 0]), (22, &[0; 4])];
        assert_eq!(route_of(1, wrapped), Some(Answer::Several));
    }

    #[test]
    fn a_link_has_a_name_flags_and_perhaps_a_kind() {
        let body = |flags: u32, name: &[u8], kind: Option<&[u8]>| {
            let mut body = vec![0; LINK_LEN];
            body[LINK_INDEX..][..4].copy_from_slice(&3u32.to_ne_bytes());
            body[LINK_FLAGS..][..4].copy_from_slice(&flags.to_ne_bytes());
            put_attribute(&mut body, IFLA_IFNAME, name);
            if let Some(kind) = kind {
                let mut info = Vec::new();
                put_attribute(&mut info, IFLA_INFO_KIND, kind);
                put_attribute(&mut body, IFLA_LINKINFO, &info);
            }
            body
        };
        let expected = |name: &[u8], is_used, is_vrf| {
            Some(Link {
                index: 3,
                names: vec![name.to_vec()],
                is_used,
                is_vrf,
            })
        };
        let link_of = |flags, name, kind| link(&body(flags, name, kind));
        assert_eq!(link_of(0x9, b"lo\0", None), expected(b"lo", false, false));
        assert_eq!(
            link_of(0x1043, b"eth0\0", Some(b"veth")),
            expected(b"eth0", true, false)
        );
        assert_eq!(
            link_of(0x1, b"red\0", Some(b"vrf\0")),
            expected(b"red", true, true)
        );
        assert_eq!(link(&body(1, b"eth0\0", None)[..LINK_LEN - 1]), None);
        let (mut named, mut others) = (body(1, b"eth0\0", None), Vec::new());
        put_attribute(&mut others, IFLA_ALT_IFNAME, b"uplink\0");
        put_attribute(&mut named, IFLA_PROP_LIST, &others);
        let names = link(&named).unwrap().names;
        assert_eq!(names, [b"eth0".to_vec(), b"uplink".to_vec()]);
    }

    #[test]
    fn a_rule_may_be_about_an_interface_or_a_mark() {
        let rule_of = |parts: &[(u16, &[u8])]| {
            let mut body = vec![0; RULE_LEN];
            for (kind, value) in parts {
                put_attribute(&mut body, *kind, value);
            }
            rule(&body)
        };
        let expected = |arrives_at: Option<&[u8]>, by_mark| {
            Some(Rule {
                arrives_at: arrives_at.map(<[u8]>::to_vec),
                by_mark,
            })
        };
        assert_eq!(rule_of(&[]), expected(None, false));
        // fwmark 0/0xff00.
        assert_eq!(rule_of(&[(16, &[0, 0xff, 0, 0])]), expected(None, true));
        assert_eq!(
            rule_of(&[(FRA_IIFNAME, b"eth0\0"), (FRA_FWMARK, &[1, 0, 0, 0])]),
            expected(Some(b"eth0"), true)
        );
        assert_eq!(rule(&[0; RULE_LEN - 1]), None);
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
        let question = |to: &str, from: &str, origin, mark| {
            let question = Question {
                to: to.parse().unwrap(),
                from: from.parse().unwrap(),
                origin,
                mark,
            };
            route_question(&question, 1)
        };
        let bytes = question("10.9.1.2:80", "10.9.2.2:4000", Origin::Interface(5), 0x0102);
        let body = &bytes[netlink::HEADER_LEN..];
        assert_eq!(body[..3], [2, 32, 32]);
        let parts: Vec<(u16, &[u8])> = attributes(&body[ROUTE_LEN..]).collect();
        let (interface, mark) = (5u32.to_ne_bytes(), 0x0102u32.to_ne_bytes());
        let of_tcp: [(u16, &[u8]); 3] = [(27, &[6]), (28, &[0x0f, 0xa0]), (29, &[0, 80])];
        let expected: [(u16, &[u8]); 4] = [
            (1, &[10, 9, 1, 2]),
            (2, &[10, 9, 2, 2]),
            (3, &interface),
            (16, &mark),
        ];
        assert_eq!(parts, [&expected[..], &of_tcp[..]].concat());
        for (origin, vrf) in [(Origin::Host, 0), (Origin::Vrf(5), 8)] {
            let bytes = question("[fd00::1]:80", "[fd00::2]:4000", origin, 0);
            assert_eq!(bytes.len(), netlink::HEADER_LEN + 12 + 20 + 24 + vrf);
        }
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
