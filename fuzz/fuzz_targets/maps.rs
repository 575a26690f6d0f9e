//! Fuzzes the parser of /proc/PID/maps: a process may map files of any name.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| cwkill::fuzzing::maps(data));
