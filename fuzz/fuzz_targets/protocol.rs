//! Fuzzes what cwkill and a process that reads symbols say to each other.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| cwkill::fuzzing::protocol(data));
