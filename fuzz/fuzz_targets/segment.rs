//! Fuzzes the parser of the packets that a packet socket captures: `cargo +nightly fuzz run segment -- -max_total_time=60`.
//!
//! src/tcp/segment_tests.rs checks the same properties for a fixed number of inputs, without a nightly toolchain.
#![no_main]

use cwkill::tcp::segment;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((ether_type, packet)) = data.split_first_chunk() else {
        return;
    };
    if let Ok(segment) = segment::parse(u16::from_be_bytes(*ether_type), packet) {
        assert!(segment.payload_len <= 65535);
        // Without its payload cwkill can encode the segment, and gets the same segment back.
        let without_payload = segment::Segment {
            payload_len: 0,
            ..segment
        };
        let bytes = without_payload
            .encode()
            .expect("both addresses are of one family");
        let ether_type = match without_payload.from.is_ipv4() {
            true => 0x0800,
            false => 0x86dd,
        };
        assert_eq!(segment::parse(ether_type, &bytes), Ok(without_payload));
    }
});
