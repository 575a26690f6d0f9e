//! A capture can deliver any bytes.

use super::*;
use proptest::prelude::*;

const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
const VLAN: u16 = 0x8100;
const QINQ: u16 = 0x88a8;

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len())
        .step_by(2)
        .map(|start| u8::from_str_radix(&text[start..start + 2], 16).unwrap())
        .collect()
}

fn segment(from: &str, to: &str, flags: u8) -> Segment {
    Segment {
        from: from.parse().unwrap(),
        to: to.parse().unwrap(),
        seq: Seq(0x0102_0304),
        ack: Seq(0x0a0b_0c0d),
        flags,
        payload_len: 0,
    }
}

fn samples() -> [(u16, Segment); 2] {
    [
        (
            IPV4,
            segment("10.0.0.2:5", "10.0.0.1:80", TcpFlags::RST | TcpFlags::ACK),
        ),
        (IPV6, segment("[fd00::2]:5", "[fd00::1]:80", TcpFlags::ACK)),
    ]
}

/// Bytes from an independent encoder, checksums included.
#[test]
fn golden_bytes() {
    let golden = [
        "4500002800004000ff0667cd0a0000020a00000100050050010203040a0b0c0d50140000815b0000",
        "60000000001406fffd000000000000000000000000000002fd000000000000000000000000000001\
         00050050010203040a0b0c0d501000009b5d0000",
    ];
    for ((ether_type, segment), golden) in samples().into_iter().zip(golden) {
        let bytes = unhex(&golden.replace(' ', ""));
        assert_eq!(segment.encode().unwrap(), bytes);
        assert_eq!(parse(ether_type, &bytes), Ok(segment));
    }
}

#[test]
fn addresses_of_two_families_make_no_packet() {
    assert_eq!(segment("10.0.0.2:5", "[fd00::1]:80", 0).encode(), None);
}

#[test]
fn cut_at_every_length() {
    for (ether_type, segment) in samples() {
        let bytes = segment.encode().unwrap();
        for length in 0..bytes.len() {
            assert_eq!(
                parse(ether_type, &bytes[..length]),
                Err(NoSegment::Truncated),
                "{length}"
            );
        }
    }
}

#[test]
fn payload_is_counted_by_the_ip_header() {
    let (_, segment) = samples()[0];
    let mut bytes = segment.encode().unwrap();
    bytes[2..4].copy_from_slice(&1500u16.to_be_bytes());
    // The filter cuts the packet after the headers.
    let parsed = parse(IPV4, &bytes).unwrap();
    assert_eq!(parsed.payload_len, 1460);
    assert_eq!(parsed.end_seq(), segment.seq.plus(1460));
    // The length is smaller than that of the headers.
    bytes[2..4].copy_from_slice(&39u16.to_be_bytes());
    assert_eq!(parse(IPV4, &bytes), Err(NoSegment::Truncated));
}

#[test]
fn syn_and_fin_take_a_number() {
    let (_, mut segment) = samples()[0];
    segment.flags = TcpFlags::FIN | TcpFlags::ACK;
    assert_eq!(segment.end_seq(), segment.seq.plus(1));
    segment.flags = TcpFlags::SYN;
    assert_eq!(segment.end_seq(), segment.seq.plus(1));
}

fn tagged(tags: &[u16], ether_type: u16, packet: &[u8]) -> (u16, Vec<u8>) {
    let mut bytes = Vec::new();
    for inner in tags[1..].iter().chain([&ether_type]) {
        bytes.extend([0, 7]);
        bytes.extend(inner.to_be_bytes());
    }
    bytes.extend(packet);
    (tags[0], bytes)
}

#[test]
fn vlan_tags() {
    for (ether_type, segment) in samples() {
        let packet = segment.encode().unwrap();
        let (outer, bytes) = tagged(&[VLAN], ether_type, &packet);
        assert_eq!(parse(outer, &bytes), Ok(segment));
        let (outer, bytes) = tagged(&[QINQ, VLAN], ether_type, &packet);
        assert_eq!(parse(outer, &bytes), Ok(segment));
        for length in 0..bytes.len() {
            assert_eq!(parse(outer, &bytes[..length]), Err(NoSegment::Truncated));
        }
        let (outer, bytes) = tagged(&[VLAN; 3], ether_type, &packet);
        assert_eq!(parse(outer, &bytes), Err(NoSegment::Other));
    }
}

/// Inserts extension headers (kind, length in the unit of that kind) between IPv6 and TCP.
fn extended(headers: &[(u8, u8)]) -> Vec<u8> {
    let (_, segment) = samples()[1];
    let packet = segment.encode().unwrap();
    let mut extensions = Vec::new();
    let following = headers[1..].iter().map(|&(kind, _)| kind).chain([6]);
    for (&(kind, units), next) in headers.iter().zip(following) {
        let unit = if kind == 51 { 4 } else { 8 };
        let mut header = vec![0; 8 + unit * usize::from(units)];
        header[..2].copy_from_slice(&[next, units]);
        extensions.extend(header);
    }
    let mut bytes = packet[..IPV6_HEADER_LEN].to_vec();
    bytes[6] = headers[0].0;
    let payload = u16::try_from(extensions.len() + TCP_HEADER_LEN).unwrap();
    bytes[4..6].copy_from_slice(&payload.to_be_bytes());
    bytes.extend(extensions);
    bytes.extend(&packet[IPV6_HEADER_LEN..]);
    bytes
}

#[test]
fn ipv6_extension_headers() {
    let (_, segment) = samples()[1];
    for headers in [
        &[(0, 0)][..],
        &[(0, 3), (43, 2), (60, 1)],
        &[(51, 4), (60, 0)],
        &[(60, 0); 8],
    ] {
        let bytes = extended(headers);
        assert_eq!(parse(IPV6, &bytes), Ok(segment), "{headers:?}");
        for length in 0..bytes.len() {
            assert!(parse(IPV6, &bytes[..length]).is_err(), "{length}");
        }
    }
    // Too many headers; a fragment; no next header.
    assert_eq!(parse(IPV6, &extended(&[(60, 0); 9])), Err(NoSegment::Other));
    assert_eq!(parse(IPV6, &extended(&[(44, 0)])), Err(NoSegment::Other));
    assert_eq!(parse(IPV6, &extended(&[(59, 0)])), Err(NoSegment::Other));
    // A header that is longer than the packet.
    let mut bytes = extended(&[(60, 0)]);
    bytes[IPV6_HEADER_LEN + 1] = 255;
    assert_eq!(parse(IPV6, &bytes), Err(NoSegment::Truncated));
}

#[test]
fn foreign_traffic() {
    let (_, segment) = samples()[0];
    let good = segment.encode().unwrap();
    let with = |offset: usize, byte: u8| {
        let mut bytes = good.clone();
        bytes[offset] = byte;
        parse(IPV4, &bytes)
    };
    assert_eq!(with(9, 17), Err(NoSegment::Other), "UDP");
    assert_eq!(with(6, 0x20), Err(NoSegment::Other), "first fragment");
    assert_eq!(with(7, 1), Err(NoSegment::Other), "later fragment");
    assert_eq!(with(0, 0x44), Err(NoSegment::Other), "short IP header");
    assert_eq!(with(0, 0x65), Err(NoSegment::Other), "another version");
    assert_eq!(with(0, 0x4f), Err(NoSegment::Truncated), "long IP header");
    assert_eq!(with(32, 0x40), Err(NoSegment::Other), "short TCP header");
    assert_eq!(with(32, 0xf0), Err(NoSegment::Truncated), "long TCP header");
    assert_eq!(parse(0x0806, &good), Err(NoSegment::Other), "ARP");
}

fn address() -> impl Strategy<Value = (SocketAddr, SocketAddr)> {
    prop_oneof![
        any::<(u32, u16, u32, u16)>().prop_map(|(a, p, b, q)| {
            let v4 = |bits: u32, port| (Ipv4Addr::from_bits(bits), port).into();
            (v4(a, p), v4(b, q))
        }),
        any::<(u128, u16, u128, u16)>().prop_map(|(a, p, b, q)| {
            let v6 = |bits: u128, port| (Ipv6Addr::from_bits(bits), port).into();
            (v6(a, p), v6(b, q))
        }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn what_is_encoded_is_parsed((from, to) in address(), seq: u32, ack: u32, flags: u8) {
        let segment = Segment { from, to, seq: Seq(seq), ack: Seq(ack), flags, payload_len: 0 };
        let ether_type = if from.is_ipv4() { IPV4 } else { IPV6 };
        prop_assert_eq!(parse(ether_type, &segment.encode().unwrap()), Ok(segment));
    }

    #[test]
    fn any_bytes_are_survived(ether_type: u16, bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        for ether_type in [ether_type, IPV4, IPV6, VLAN, QINQ] {
            let _ = parse(ether_type, &bytes);
        }
    }

    /// A slightly damaged packet gets further in the parser than random bytes.
    #[test]
    fn damaged_packets_are_survived(
        which in 0usize..3,
        damage in prop::collection::vec((0usize..120, any::<u8>()), 1..6),
        length in 0usize..200,
    ) {
        let (ether_type, mut bytes) = match which {
            0 | 1 => (samples()[which].0, samples()[which].1.encode().unwrap()),
            _ => tagged(&[QINQ, VLAN], IPV6, &extended(&[(0, 1), (60, 2)])),
        };
        for (offset, byte) in damage {
            let offset = offset % bytes.len();
            bytes[offset] = byte;
        }
        bytes.truncate(length);
        if let Ok(segment) = parse(ether_type, &bytes) {
            prop_assert!(segment.payload_len <= 65535);
        }
    }
}
