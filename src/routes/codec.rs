//! The wire format of RTM_GETROUTE, as pure functions over bytes (linux/rtnetlink.h).

use std::net::IpAddr;

use netlink_packet_core::NLM_F_REQUEST;

use super::Place;
use crate::netlink;

const RTM_NEWROUTE: u16 = 24;
const RTM_GETROUTE: u16 = 26;
/// Attribute kinds.
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
/// `struct rtmsg`: family, two prefix lengths, tos, table, protocol, scope, type, and four bytes of flags.
const ROUTE_LEN: usize = 12;
const ROUTE_TYPE: usize = 7;
/// Route types for which the kernel delivers packets to this host.
const RTN_LOCAL: u8 = 2;
const RTN_BROADCAST: u8 = 3;
const RTN_ANYCAST: u8 = 4;
const RTN_MULTICAST: u8 = 5;

/// The answer to a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// The kernel delivers packets to the address on this host.
    Local,
    /// The kernel would send them elsewhere, or refuse them.
    NotLocal,
    /// The kernel did not say.
    Unknown,
}

/// Appends the question for the route to `place` to `bytes`.
pub(super) fn put_question(bytes: &mut Vec<u8>, place: Place, sequence: u32) {
    let (family, octets) = match place.address {
        IpAddr::V4(address) => (libc::AF_INET, address.octets().to_vec()),
        IpAddr::V6(address) => (libc::AF_INET6, address.octets().to_vec()),
    };
    let mut body = vec![0; ROUTE_LEN];
    body[0] = u8::try_from(family).expect("AF_INET and AF_INET6 are small");
    body[1] = u8::try_from(octets.len() * 8).expect("at most 128 bits");
    netlink::put_attribute(&mut body, RTA_DST, &octets);
    if place.interface != 0 {
        netlink::put_attribute(&mut body, RTA_OIF, &place.interface.to_ne_bytes());
    }
    netlink::put_message(bytes, RTM_GETROUTE, NLM_F_REQUEST, sequence, &body);
}

/// The answers in a datagram, each with the sequence number of its question. Bytes that are not netlink end the list.
pub(super) fn answers(datagram: &[u8]) -> impl Iterator<Item = (u32, Answer)> {
    netlink::messages(datagram).filter_map(|message| {
        let answer = match (netlink::errno(&message), message.message_type()) {
            (Some(errno), _) => refused(errno),
            (None, RTM_NEWROUTE) => match message.payload().get(ROUTE_TYPE)? {
                &(RTN_LOCAL | RTN_BROADCAST | RTN_ANYCAST | RTN_MULTICAST) => Answer::Local,
                _ => Answer::NotLocal,
            },
            _ => return None,
        };
        Some((message.sequence_number(), answer))
    })
}

/// The answer of a kernel that has no route: the routes of this host come before all others, so the address is not local.
fn refused(errno: i32) -> Answer {
    match errno {
        // No route at all; routes of type unreachable, prohibit and blackhole.
        libc::ENETUNREACH | libc::EHOSTUNREACH | libc::EACCES | libc::EINVAL => Answer::NotLocal,
        _ => Answer::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use netlink_packet_core::NLMSG_ERROR;

    fn message(message_type: u16, sequence: u32, body: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        netlink::put_message(&mut bytes, message_type, 0, sequence, body);
        bytes
    }

    fn route(kind: u8) -> [u8; ROUTE_LEN] {
        let mut route = [0; ROUTE_LEN];
        route[ROUTE_TYPE] = kind;
        route
    }

    #[test]
    fn a_question_is_as_the_kernel_reads_it() {
        let mut bytes = Vec::new();
        let place = Place {
            address: "10.9.0.100".parse().unwrap(),
            interface: 3,
        };
        put_question(&mut bytes, place, 7);
        let mut expected = vec![44, 0, 0, 0, 26, 0, 1, 0, 7, 0, 0, 0, 0, 0, 0, 0];
        expected.extend([2, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        expected.extend([8, 0, 1, 0, 10, 9, 0, 100]);
        expected.extend([8, 0, 4, 0, 3, 0, 0, 0]);
        if cfg!(target_endian = "little") {
            assert_eq!(bytes, expected);
        }
        let v6 = Place {
            address: "fd00::1".parse().unwrap(),
            interface: 0,
        };
        bytes.clear();
        put_question(&mut bytes, v6, 8);
        assert_eq!(bytes.len(), netlink::HEADER_LEN + ROUTE_LEN + 20);
        assert_eq!(bytes[16..18], [10, 128]);
    }

    #[test]
    fn the_type_of_the_route_decides() {
        let mut datagram = Vec::new();
        for (sequence, kind) in [(1, 2), (2, 1), (3, 4), (4, 7)] {
            datagram.extend(message(RTM_NEWROUTE, sequence, &route(kind)));
        }
        let errno = |errno: i32| (-errno).to_ne_bytes();
        datagram.extend(message(NLMSG_ERROR, 5, &errno(libc::ENETUNREACH)));
        datagram.extend(message(NLMSG_ERROR, 6, &errno(libc::EPERM)));
        // A message of another kind, and one that is cut short.
        datagram.extend(message(16, 7, &[0; 16]));
        datagram.extend(&message(RTM_NEWROUTE, 8, &route(2))[..20]);
        assert_eq!(
            answers(&datagram).collect::<Vec<_>>(),
            [
                (1, Answer::Local),
                (2, Answer::NotLocal),
                (3, Answer::Local),
                (4, Answer::NotLocal),
                (5, Answer::NotLocal),
                (6, Answer::Unknown),
            ]
        );
        assert_eq!(answers(&[1, 2, 3]).count(), 0);
    }
}
