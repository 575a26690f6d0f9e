//! The bytes of the file. Pure.
//!
//! A head, then one record per socket, then a checksum. All numbers are little-endian. A file of another boot or time namespace
//! says nothing about this one, so the head names both.

use std::time::Duration;

use super::entries::{Entries, Entry, MAX_ENTRIES};
use super::fnv_1a;
use crate::model::{NetnsKey, Snapshot, SocketKey};
use crate::sock_diag::{ByteCounters, Cookie};
use crate::tcp::TcpState;

/// The first bytes of the file. They change with its format.
const MAGIC: [u8; 8] = *b"cwkhis01";
/// Numbers of 64 bits in a record.
const FIELDS: usize = 11;
const RECORD: usize = FIELDS * 8;
/// [`MAGIC`], the boot, the time namespace.
const HEAD: usize = 8 + 16 + 8;
const CHECKSUM: usize = 8;
/// The maximum size of the file.
pub(super) const MAX_BYTES: usize = HEAD + MAX_ENTRIES * RECORD + CHECKSUM;

/// The time that the file counts in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Epoch {
    /// The id that the kernel gives to each boot.
    pub boot: [u8; 16],
    /// The inode of the time namespace, which has clocks of its own; 0 before Linux 5.6.
    pub time_namespace: u64,
}

/// Why the bytes are not used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Unusable {
    #[error("not a file of this version")]
    Format,
    #[error("it is damaged")]
    Damaged,
    /// Not an error: normal after a boot.
    #[error("it is of another boot")]
    OtherBoot,
}

pub(super) fn encode(entries: &Entries, epoch: Epoch) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEAD + entries.0.len() * RECORD + CHECKSUM);
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&epoch.boot);
    bytes.extend_from_slice(&epoch.time_namespace.to_le_bytes());
    for (key, entry) in &entries.0 {
        let Snapshot {
            state,
            recv_q,
            counters,
        } = entry.snapshot;
        let small = u64::from(state.number()) | u64::from(entry.missed) << 8;
        let fields: [u64; FIELDS] = [
            key.netns.inode,
            key.netns.cookie,
            key.cookie.0,
            small | u64::from(recv_q) << 32,
            counters.received,
            counters.acked,
            counters.written,
            millis(entry.stuck_since),
            millis(entry.idle_since),
            millis(entry.unchanged_since),
            entry.seen.as_secs() << 32 | u64::from(entry.reach),
        ];
        for field in fields {
            bytes.extend_from_slice(&field.to_le_bytes());
        }
    }
    bytes.extend_from_slice(&checksum(&bytes).to_le_bytes());
    bytes
}

/// Rounded up, so that no time before `now` becomes longer.
fn millis(since: Duration) -> u64 {
    let whole = u64::try_from(since.as_millis()).unwrap_or(u64::MAX);
    let is_whole = since.subsec_nanos().is_multiple_of(1_000_000);
    whole.saturating_add(u64::from(!is_whole))
}

/// The entries, without those that speak of the future.
pub(super) fn decode(bytes: &[u8], epoch: Epoch, now: Duration) -> Result<Entries, Unusable> {
    if bytes.get(..MAGIC.len()) != Some(&MAGIC) {
        return Err(Unusable::Format);
    }
    let records = bytes.len().checked_sub(HEAD + CHECKSUM);
    let Some(records) = records.filter(|size| size % RECORD == 0) else {
        return Err(Unusable::Damaged);
    };
    let (content, sum) = bytes.split_at(HEAD + records);
    if number(sum) != checksum(content) {
        return Err(Unusable::Damaged);
    }
    let found = Epoch {
        boot: content[8..24].try_into().expect("16 bytes"),
        time_namespace: number(&content[24..32]),
    };
    if found != epoch {
        return Err(Unusable::OtherBoot);
    }
    let mut entries = Entries::default();
    entries.0.reserve(records / RECORD);
    for record in content[HEAD..].chunks_exact(RECORD) {
        let (key, entry) = parse(record);
        let times = [
            entry.stuck_since,
            entry.idle_since,
            entry.unchanged_since,
            entry.seen,
        ];
        if times.into_iter().all(|time| time <= now) {
            entries.0.insert(key, entry);
        }
    }
    Ok(entries)
}

fn parse(record: &[u8]) -> (SocketKey, Entry) {
    let field = |index: usize| number(&record[index * 8..]);
    let byte = |index: usize, shift: u32| (field(index) >> shift & 0xff) as u8;
    let key = SocketKey {
        netns: NetnsKey {
            inode: field(0),
            cookie: field(1),
        },
        cookie: Cookie(field(2)),
    };
    let entry = Entry {
        snapshot: Snapshot {
            state: TcpState::from_kernel(byte(3, 0)),
            recv_q: (field(3) >> 32) as u32,
            counters: ByteCounters {
                received: field(4),
                acked: field(5),
                written: field(6),
            },
        },
        missed: byte(3, 8),
        stuck_since: Duration::from_millis(field(7)),
        idle_since: Duration::from_millis(field(8)),
        unchanged_since: Duration::from_millis(field(9)),
        seen: Duration::from_secs(field(10) >> 32),
        reach: u32::try_from(field(10) & u64::from(u32::MAX)).unwrap_or(u32::MAX),
    };
    (key, entry)
}

/// The number in the first eight bytes.
fn number(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(*bytes.first_chunk().expect("eight bytes"))
}

/// It finds accidents; against an attacker the file has its owner and mode.
fn checksum(bytes: &[u8]) -> u64 {
    fnv_1a(bytes.chunks_exact(8).map(number)) ^ bytes.len() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    const EPOCH: Epoch = Epoch {
        boot: *b"0123456789abcdef",
        time_namespace: 4026531834,
    };

    fn now() -> Duration {
        Duration::from_secs(1_000_000)
    }

    fn example() -> Entries {
        let entry = |cookie: u64| {
            let key = SocketKey {
                netns: NetnsKey {
                    inode: 4026531840,
                    cookie: 3,
                },
                cookie: Cookie(cookie),
            };
            let entry = Entry {
                snapshot: Snapshot {
                    state: TcpState::CloseWait,
                    recv_q: u32::MAX,
                    counters: ByteCounters {
                        received: 1 << 40,
                        acked: cookie,
                        written: u64::MAX,
                    },
                },
                stuck_since: Duration::from_millis(1234),
                idle_since: Duration::from_millis(5678),
                unchanged_since: Duration::from_millis(9012),
                seen: Duration::from_secs(900_000),
                reach: u32::MAX,
                missed: 1,
            };
            (key, entry)
        };
        Entries((0..50).map(entry).collect())
    }

    #[test]
    fn what_is_written_is_read_back() {
        let bytes = encode(&example(), EPOCH);
        assert_eq!(decode(&bytes, EPOCH, now()), Ok(example()));
        let none = encode(&Entries::default(), EPOCH);
        assert_eq!(decode(&none, EPOCH, now()), Ok(Entries::default()));
    }

    #[test]
    fn a_damaged_file_is_not_used() {
        let bytes = encode(&example(), EPOCH);
        for end in 0..bytes.len() {
            assert!(decode(&bytes[..end], EPOCH, now()).is_err(), "cut at {end}");
        }
        for index in 0..bytes.len() {
            let mut wrong = bytes.clone();
            wrong[index] ^= 0x10;
            assert!(decode(&wrong, EPOCH, now()).is_err(), "wrong at {index}");
        }
        assert_eq!(decode(b"#!/bin/sh\n", EPOCH, now()), Err(Unusable::Format));
        let mut other = bytes.clone();
        other[..8].copy_from_slice(b"cwkhis00");
        assert_eq!(decode(&other, EPOCH, now()), Err(Unusable::Format));
        let longer = [&bytes[..], &[0; RECORD]].concat();
        assert_eq!(decode(&longer, EPOCH, now()), Err(Unusable::Damaged));
    }

    #[test]
    fn another_boot_or_time_namespace_says_nothing() {
        let bytes = encode(&example(), EPOCH);
        let other_boot = Epoch {
            boot: [0; 16],
            ..EPOCH
        };
        let other_namespace = Epoch {
            time_namespace: 1,
            ..EPOCH
        };
        for epoch in [other_boot, other_namespace] {
            let decoded = decode(&bytes, epoch, now());
            assert_eq!(decoded, Err(Unusable::OtherBoot));
        }
    }

    #[test]
    fn an_entry_of_the_future_is_not_used() {
        let mut entries = example();
        let (key, entry) = entries.0.iter().next().map(|(k, e)| (*k, *e)).unwrap();
        let later = now() + Duration::from_secs(1);
        type Change = fn(&mut Entry, Duration);
        let changes: [Change; 4] = [
            |entry, later| entry.stuck_since = later,
            |entry, later| entry.idle_since = later,
            |entry, later| entry.unchanged_since = later,
            |entry, later| entry.seen = later,
        ];
        for change in changes {
            let mut changed = entry;
            change(&mut changed, later);
            entries.0.insert(key, changed);
            let decoded = decode(&encode(&entries, EPOCH), EPOCH, now()).unwrap();
            assert_eq!(decoded.0.len(), 49);
        }
    }

    #[test]
    fn a_time_never_grows_by_being_written() {
        assert_eq!(millis(Duration::from_micros(1500)), 2);
        assert_eq!(millis(Duration::from_millis(1)), 1);
    }
}
