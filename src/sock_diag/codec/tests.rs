//! Real dumps, damaged dumps, and the bytes of requests.

use std::time::Duration;

use super::reply::{parse_counters, parse_quiet};
use super::*;
use crate::sock_diag::testdata::{DUMP_V4, DUMP_V6, bytes};
use crate::tcp::{StateSet, TcpState};

fn sockets(hex: &str) -> Vec<SocketMessage> {
    let datagram = bytes(hex);
    let socket = |framed: Result<Framed, Malformed>| match framed.unwrap().frame {
        Frame::Socket(message) => Some(message),
        _ => None,
    };
    frames(&datagram, Protocol::Tcp)
        .filter_map(socket)
        .collect()
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
            let good = frames(&whole[..length], Protocol::Tcp)
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
    let all: Vec<_> = frames(&datagram, Protocol::Tcp)
        .map(Result::unwrap)
        .collect();
    assert!(matches!(all[0].frame, Frame::Socket(_)));
    assert_eq!(all.len(), 3);
}

#[test]
fn a_shorter_tcp_info_gives_no_age() {
    assert_eq!(parse_quiet(&[0; 59]), None);
    assert!(parse_quiet(&[0; 60]).is_some());
    assert_eq!(parse_counters(&[0; 215]), None, "Linux 4.18");
    assert!(parse_counters(&[0; 216]).is_some());
}

fn quiet_lookup(bytes: &mut Vec<u8>, id: &DiagId, sequence: u32) {
    put_lookup(bytes, id, sequence, Detail::TcpInfo);
}

#[test]
fn a_request_carries_the_id_byte_for_byte() {
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
        protocol: Protocol::Tcp,
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
    let of_mptcp = DumpRequest {
        protocol: Protocol::Mptcp,
        ..filtered
    };
    let of_mptcp = of_mptcp.encode(3);
    assert_eq!(of_mptcp[..4], 88u32.to_ne_bytes());
    assert_eq!(of_mptcp[17], 0, "262 does not fit");
    assert_eq!(of_mptcp[72..74], 8u16.to_ne_bytes());
    assert_eq!(of_mptcp[74..76], 3u16.to_ne_bytes());
    assert_eq!(of_mptcp[76..80], 262u32.to_ne_bytes());
    let filtered = filtered.encode(3);
    assert_eq!(of_mptcp[80..], filtered[72..]);
    assert_eq!(filtered[..4], 80u32.to_ne_bytes());
    assert_eq!(filtered[4..72], bytes[4..]);
    assert_eq!(filtered[72..74], 8u16.to_ne_bytes());
    assert_eq!(filtered[74..76], 1u16.to_ne_bytes());
    assert_eq!(filtered[76..], code);
}

#[test]
fn errors_and_acks_are_distinguished() {
    let message = |kind: u16, payload: &[u8]| {
        let mut bytes = Vec::new();
        let length = u32::try_from(16 + payload.len()).unwrap();
        bytes.extend_from_slice(&length.to_ne_bytes());
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&[0; 10]);
        bytes.extend_from_slice(payload);
        bytes
    };
    let frame = |bytes: &[u8]| {
        frames(bytes, Protocol::Tcp)
            .next()
            .unwrap()
            .map(|framed| framed.frame)
    };
    assert_eq!(frame(&message(2, &0i32.to_ne_bytes())), Ok(Frame::Ack));
    let refused = (-libc::EPERM).to_ne_bytes();
    assert_eq!(frame(&message(2, &refused)), Ok(Frame::Error(libc::EPERM)));
    assert_eq!(frame(&message(3, &0i32.to_ne_bytes())), Ok(Frame::Done(0)));
    assert_eq!(frame(&message(3, &[])), Ok(Frame::Done(0)));
    assert!(frame(&message(2, &[1, 2])).is_err());
    assert!(frame(&message(20, &[0; 71])).is_err());
}
