//! Fuzzes the parser of /tmp/perf-PID.map, which any process may write.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| cwkill::fuzzing::perf_map(data));
