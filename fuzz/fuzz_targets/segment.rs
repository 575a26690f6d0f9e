//! Anything that a packet socket may hand over: `cargo +nightly fuzz run segment -- -max_total_time=60`.
//!
//! The same properties run bounded and without nightly in src/tcp/segment_tests.rs.
#![no_main]

use cwkill::tcp::segment;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((ether_type, packet)) = data.split_first_chunk() else {
        return;
    };
    if let Ok(segment) = segment::parse(u16::from_be_bytes(*ether_type), packet) {
        assert!(segment.payload_len <= 65535);
        // Without payload it is one that we could have sent.
        let ours = segment::Segment {
            payload_len: 0,
            ..segment
        };
        let bytes = ours.encode().expect("both addresses are of one family");
        let ether_type = if ours.from.is_ipv4() { 0x0800 } else { 0x86dd };
        assert_eq!(segment::parse(ether_type, &bytes), Ok(ours));
    }
});
