use proptest::prelude::*;

use super::*;

/// Bytes of an attribute, for messages as the kernel writes them.
fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    put_attribute(&mut bytes, kind, value);
    bytes
}

fn nested(kind: u16, parts: &[Vec<u8>]) -> Vec<u8> {
    attribute(kind | NLA_F_NESTED, &parts.concat())
}

fn kernel_tuple(kind: u16, tuple: Tuple, protocol: u8, zone: Option<u16>) -> Vec<u8> {
    let (mut addresses, Tuple { local, peer }) = (Vec::new(), tuple);
    put_address(&mut addresses, (CTA_IP_V4_SRC, CTA_IP_V6_SRC), local.ip());
    put_address(&mut addresses, (CTA_IP_V4_DST, CTA_IP_V6_DST), peer.ip());
    let ports = [
        attribute(CTA_PROTO_NUM, &[protocol]),
        attribute(CTA_PROTO_SRC_PORT, &local.port().to_be_bytes()),
        attribute(CTA_PROTO_DST_PORT, &peer.port().to_be_bytes()),
    ];
    let mut parts = vec![
        nested(CTA_TUPLE_IP, &[addresses]),
        nested(CTA_TUPLE_PROTO, &ports),
    ];
    parts.extend(zone.map(|zone| attribute(CTA_TUPLE_ZONE, &zone.to_be_bytes())));
    nested(kind, &parts)
}

/// The message of the kernel about `entry`, with attributes that cwkill does not use.
fn kernel_message(entry: &Entry, protocol: u8, sequence: u32) -> Vec<u8> {
    let zone_in = |direction| {
        let is_here = entry.zone.direction == direction;
        is_here.then_some(entry.zone.id)
    };
    let mut body = nfgen(entry.original.local.is_ipv6());
    let (original, reply) = (ZoneDirection::Original, ZoneDirection::Reply);
    body.extend(kernel_tuple(
        CTA_TUPLE_ORIG,
        entry.original,
        protocol,
        zone_in(original),
    ));
    body.extend(kernel_tuple(
        CTA_TUPLE_REPLY,
        entry.reply,
        protocol,
        zone_in(reply),
    ));
    if entry.zone.direction == ZoneDirection::Both && entry.zone.id != 0 {
        body.extend(attribute(CTA_ZONE, &entry.zone.id.to_be_bytes()));
    }
    body.extend(attribute(CTA_STATUS, &entry.status.0.to_be_bytes()));
    if let Some(left) = entry.left {
        let seconds = u32::try_from(left.as_secs()).unwrap();
        body.extend(attribute(CTA_TIMEOUT, &seconds.to_be_bytes()));
    }
    if let Some(state) = entry.state {
        // The window scale and the flags of both directions.
        let tcp = [
            attribute(CTA_PROTOINFO_TCP_STATE, &[state as u8]),
            attribute(2, &[7]),
            attribute(3, &[7]),
            attribute(4, &[0x23, 0]),
            attribute(5, &[0x23, 0]),
        ];
        let tcp = nested(CTA_PROTOINFO_TCP, &tcp);
        body.extend(nested(CTA_PROTOINFO, &[tcp]));
    }
    if let Some(mark) = entry.mark {
        body.extend(attribute(CTA_MARK, &mark.to_be_bytes()));
    }
    if let Some(id) = entry.id {
        body.extend(attribute(CTA_ID, &id.to_be_bytes()));
    }
    body.extend(attribute(11, &1u32.to_be_bytes()));
    let mut bytes = Vec::new();
    netlink::put_message(&mut bytes, CT_NEW, 2, sequence, &body);
    bytes
}

fn tuple(local: &str, peer: &str) -> Tuple {
    Tuple {
        local: local.parse().unwrap(),
        peer: peer.parse().unwrap(),
    }
}

fn samples() -> Vec<Entry> {
    let zone = |id, direction| Zone { id, direction };
    let masqueraded = Entry {
        reply: tuple("10.9.2.2:7000", "10.9.2.1:40000"),
        ..Entry::example("10.9.1.2:40000", "10.9.2.2:7000")
    };
    let redirected = Entry {
        reply: tuple("[fd00:2::2]:8080", "[fd00:1::2]:5"),
        zone: zone(7, ZoneDirection::Both),
        mark: Some(0x0100_0002),
        state: Some(ConntrackState::SynSent2),
        ..Entry::example("[fd00:1::2]:5", "[fd00::80]:80")
    };
    let bare = Entry {
        state: None,
        status: Status::OFFLOAD,
        left: None,
        mark: None,
        id: None,
        zone: zone(9, ZoneDirection::Original),
        ..Entry::example("10.0.0.1:1", "10.0.0.2:2")
    };
    let by_reply = Entry {
        zone: zone(3, ZoneDirection::Reply),
        ..bare.clone()
    };
    vec![masqueraded, redirected, bare, by_reply]
}

/// The kernel would send all entries but those with the address.
#[test]
fn an_ipv6_address_is_not_in_the_filter() {
    let bytes = |source: Option<&str>, ipv6| {
        let filter = DumpFilter {
            source: source.map(|source| source.parse().unwrap()),
            ..DumpFilter::default()
        };
        let mut bytes = Vec::new();
        put_dump(&mut bytes, ipv6, Some(&filter), 1);
        bytes
    };
    assert_eq!(bytes(Some("fd00::1"), true), bytes(None, true));
    assert_eq!(bytes(Some("10.0.0.1"), true), bytes(None, true));
    assert_ne!(bytes(Some("10.0.0.1"), false), bytes(None, false));
}

#[test]
fn an_entry_is_read_with_nat_state_mark_and_zone() {
    for sample in samples() {
        let bytes = kernel_message(&sample, TCP, 5);
        let read: Vec<(u32, Answer)> = answers(&bytes).collect();
        assert_eq!(read, [(5, Answer::Entry(Box::new(sample)))]);
    }
    let [masqueraded, redirected, ..] = &samples()[..] else {
        panic!("too few samples");
    };
    let address = |text: &str| Some(text.parse().unwrap());
    assert_eq!(masqueraded.nat_source(), address("10.9.2.1:40000"));
    assert_eq!(masqueraded.nat_destination(), None);
    assert_eq!(redirected.nat_source(), None);
    assert_eq!(redirected.nat_destination(), address("[fd00:2::2]:8080"));
}

/// The request for a list, byte for byte. Numbers are big-endian inside the attributes, except for the parts of the filter.
#[test]
fn golden_bytes() {
    if cfg!(target_endian = "big") {
        return;
    }
    let request = {
        let mut bytes = Vec::new();
        let filter = DumpFilter {
            mark: Some((0x12, 0xff)),
            source: Some("10.9.1.2".parse().unwrap()),
            destination_port: Some(7000),
            ..DumpFilter::default()
        };
        put_dump(&mut bytes, false, Some(&filter), 1);
        bytes
    };
    #[rustfmt::skip]
    let expected: &[u8] = &[
        // nlmsghdr: length, type, NLM_F_REQUEST | NLM_F_DUMP, sequence, port; nfgenmsg.
        96, 0, 0, 0, 1, 1, 1, 3, 1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0,
        // CTA_MARK, CTA_MARK_MASK.
        8, 0, 8, 0, 0, 0, 0, 0x12, 8, 0, 21, 0, 0, 0, 0, 0xff,
        // CTA_TUPLE_ORIG: CTA_TUPLE_IP with the source, CTA_TUPLE_PROTO with the protocol and the destination port.
        36, 0, 1, 0x80, 12, 0, 1, 0x80, 8, 0, 1, 0, 10, 9, 1, 2,
        20, 0, 2, 0x80, 5, 0, 1, 0, 6, 0, 0, 0, 6, 0, 3, 0, 0x1b, 0x58, 0, 0,
        // CTA_FILTER: source address, protocol and destination port count.
        12, 0, 25, 0x80, 8, 0, 1, 0, 0b10_1001, 0, 0, 0,
    ];
    let mut expected = expected.to_vec();
    expected[0] = u8::try_from(expected.len()).unwrap();
    assert_eq!(request, expected);
}

#[test]
fn a_request_names_one_entry_with_its_zone_and_its_id() {
    for sample in samples() {
        let mut bytes = Vec::new();
        put_delete(&mut bytes, &sample, 3);
        let message = netlink::messages(&bytes).next().unwrap();
        assert_eq!((message.message_type(), message.flags()), (CT_DELETE, 5));
        let payload = message.payload();
        let mut found = (None, None, None);
        for (kind, value) in attributes(&payload[NFGEN_LEN..]) {
            match kind {
                CTA_TUPLE_ORIG => {
                    let mut zone = Zone::default();
                    let read = tuple_of(value, &mut zone);
                    found.0 = read;
                    if zone != Zone::default() {
                        found.1 = Some(zone.id);
                    }
                }
                CTA_ZONE => found.1 = be16(value),
                CTA_ID => found.2 = be32(value),
                other => panic!("attribute {other}"),
            }
        }
        let in_original = sample.zone.direction != ZoneDirection::Reply;
        let zone = in_original.then_some(sample.zone.id).filter(|id| *id != 0);
        assert_eq!(found, (Some(sample.original), zone, sample.id));
        let mut lookup = Vec::new();
        put_lookup(&mut lookup, &sample, 3);
        let message = netlink::messages(&lookup).next().unwrap();
        assert_eq!((message.message_type(), message.flags()), (CT_GET, 1));
    }
}

fn tuple_of(value: &[u8], zone: &mut Zone) -> Option<Tuple> {
    super::tuple(value, zone, ZoneDirection::Original)
}

#[test]
fn other_protocols_and_errors_are_told_apart() {
    let mut bytes = kernel_message(&samples()[0], 17, 1);
    bytes.extend(kernel_message(&samples()[1], TCP, 1));
    let error = (-libc::ENOENT).to_ne_bytes();
    netlink::put_message(&mut bytes, netlink_packet_core::NLMSG_ERROR, 0, 1, &error);
    netlink::put_message(&mut bytes, NLMSG_DONE, 0, 1, &0i32.to_ne_bytes());
    netlink::put_message(&mut bytes, NLMSG_DONE, 0, 1, &(-libc::EBUSY).to_ne_bytes());
    netlink::put_message(&mut bytes, 0x0f00, 0, 1, &[1, 2]);
    let read: Vec<Answer> = answers(&bytes).map(|(_, answer)| answer).collect();
    let entry = Answer::Entry(Box::new(samples()[1].clone()));
    let (enoent, ebusy) = (Answer::Errno(libc::ENOENT), Answer::Done(libc::EBUSY));
    assert_eq!(
        read,
        [
            Answer::Other,
            entry,
            enoent,
            Answer::Done(0),
            ebusy,
            Answer::Other
        ]
    );
}

#[test]
fn cut_at_every_length() {
    for sample in samples() {
        let bytes = kernel_message(&sample, TCP, 1);
        for length in 0..bytes.len() {
            // A message that is cut is none.
            assert_eq!(answers(&bytes[..length]).count(), 0, "{length}");
            // One whose length was set to fit has fewer attributes, and is no entry without both tuples.
            let mut cut = bytes[..length].to_vec();
            if let Some(head) = cut.first_chunk_mut::<4>() {
                *head = u32::try_from(length).unwrap().to_ne_bytes();
            }
            for (_, answer) in answers(&cut) {
                if let Answer::Entry(entry) = answer {
                    assert_eq!(
                        (entry.original, entry.reply),
                        (sample.original, sample.reply)
                    );
                }
            }
        }
    }
}

#[test]
fn the_bits_of_the_status_have_names() {
    let names = |status: Status| status.names().collect::<Vec<_>>();
    assert_eq!(names(Status(0b1110)), ["seen-reply", "assured"]);
    assert_eq!(names(Status::OFFLOAD | Status::DYING), ["dying", "offload"]);
    assert!(names(Status(0)).is_empty());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1000))]

    #[test]
    fn damaged_messages_are_survived(
        which in 0usize..4,
        damage in prop::collection::vec((16usize..200, any::<u8>()), 1..6),
    ) {
        let mut bytes = kernel_message(&samples()[which], TCP, 1);
        for (offset, byte) in damage {
            let offset = offset.min(bytes.len() - 1);
            bytes[offset] = byte;
        }
        for (_, answer) in answers(&bytes) {
            if let Answer::Entry(entry) = answer {
                prop_assert_eq!(entry.original.local.is_ipv4(), entry.original.peer.is_ipv4());
            }
        }
    }

    #[test]
    fn any_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = answers(&bytes).count();
        let mut message = Vec::new();
        netlink::put_message(&mut message, CT_NEW, 0, 1, &bytes);
        let _ = answers(&message).count();
    }
}

#[test]
fn an_event_says_whether_the_entry_is_new() {
    let entry = Entry::example("10.0.0.1:5", "10.0.0.2:80");
    let mut made = kernel_message(&entry, TCP, 0);
    // NLM_F_CREATE | NLM_F_EXCL, in the header of the message.
    made[6..8].copy_from_slice(&0x600_u16.to_ne_bytes());
    let changed = kernel_message(&entry, TCP, 0);
    let other = kernel_message(&entry, 17, 0);
    let datagram = [made, changed, other].concat();
    let event = |is_new| Event {
        is_new,
        entry: entry.clone(),
    };
    let read: Vec<Event> = events(&datagram).collect();
    assert_eq!(read, [event(true), event(false)]);
    for cut in 0..datagram.len() {
        let _ = events(&datagram[..cut]).count();
    }
}
