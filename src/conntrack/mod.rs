//! Connection tracking (conntrack): the table with which the kernel does NAT and stateful filtering.
//!
//! There are two ways to read it:
//! - This file reads /proc/net/nf_conntrack, for notes beside a report about sockets. It loads no kernel module: the file exists only
//!   while connection tracking is loaded. See docs/decisions/conntrack-by-proc.md.
//! - [`client`] asks over netlink, for `cwkill gateway`. That makes the kernel load nf_conntrack_netlink, and needs CAP_NET_ADMIN. See
//!   docs/decisions/gateway.md. [`codec`] has the messages, `events` hears of new and changed entries, `state` has the states, and `timeouts` what a timeout says about the last packet.

pub mod client;
pub mod codec;
mod entry;
mod events;
mod state;
mod timeouts;

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read};
use std::time::{Duration, Instant};

use strum::VariantArray;

use codec::TimeoutRules;

pub use client::{Conntrack, Delete};
pub use codec::{DumpFilter, Entry, Event};
pub use entry::{TrackedEnds, TranslatedConnection};
pub use events::Events;
pub use state::ConntrackState;
pub use timeouts::Timeouts;

/// The settings and counters of the network namespace of the calling thread.
const DIRECTORY: &str = "/proc/sys/net/netfilter";
/// The table of that namespace.
const TABLE: &str = "/proc/thread-self/net/nf_conntrack";
/// The kernel writes a page at a time, whatever the size of the buffer.
const BUFFER_BYTES: usize = 4096;
/// cwkill looks at the clock after this many lines.
const LINES_PER_CLOCK_READ: usize = 64;
/// cwkill keeps at most this many entries of a table: a few megabytes.
const MAX_KEPT: usize = 65_536;
/// The maximum length of a line. Those of the kernel have a few hundred bytes; what has more is no entry.
const MAX_LINE_BYTES: u64 = 4096;

/// What was read of a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TablePart<T> {
    pub entries: Vec<T>,
    /// Whether the whole table was read.
    pub complete: bool,
}

fn number(name: &str) -> Option<u64> {
    let text = fs::read_to_string(format!("{DIRECTORY}/{name}")).ok()?;
    text.trim().parse().ok()
}

/// A timeout of TCP, by the end of its name.
fn timeout(name: &str) -> Option<Duration> {
    number(&format!("nf_conntrack_tcp_timeout_{name}")).map(Duration::from_secs)
}

/// How long this namespace keeps the entry of a connection whose one side is closed; `None` if connection tracking is not loaded.
pub fn close_wait_timeout() -> Option<Duration> {
    timeout("close_wait")
}

/// The timeouts of the namespace of the calling thread. `conntrack` was opened in it.
pub fn timeouts(conntrack: &mut Conntrack) -> Timeouts {
    // What cannot be listed may have some.
    let modules = Modules::read();
    let mut has = |rules, module| {
        !modules.are_known_to_lack(module) && conntrack.has_rules(rules).unwrap_or(true)
    };
    let by_policy = has(TimeoutRules::NfTables, "nf_tables")
        || has(TimeoutRules::Cttimeout, "nfnetlink_cttimeout");
    // Those of tc(8) cannot be listed.
    let has_flow_tables = modules.has("act_ct") || has(TimeoutRules::FlowTables, "nf_tables");
    let of_state = |state: &ConntrackState| Some((*state, timeout(state.timeout_name()?)?));
    let shorter = ["max_retrans", "unacknowledged", "close"];
    Timeouts {
        of_state: ConntrackState::VARIANTS
            .iter()
            .filter_map(of_state)
            .collect(),
        shorter: shorter.into_iter().filter_map(timeout).collect(),
        by_policy,
        has_flow_tables,
    }
}

/// The kernel modules that are loaded, as lines of /proc/modules. A part of the kernel is none of them.
struct Modules(String);

impl Modules {
    fn read() -> Self {
        Modules(fs::read_to_string("/proc/modules").unwrap_or_default())
    }

    fn has(&self, module: &str) -> bool {
        let mut names = self.0.lines().filter_map(|line| line.split(' ').next());
        names.any(|name| name == module)
    }

    /// Whether a kernel module that needs nf_conntrack is not loaded, so that a request to it would load it. If nf_conntrack is a module
    /// itself, such a module cannot be a part of the kernel.
    fn are_known_to_lack(&self, module: &str) -> bool {
        self.has("nf_conntrack") && !self.has(module)
    }
}

/// How many entries the table of the namespace of the calling thread has, of all protocols, and how many it may have. `None` if
/// connection tracking is not loaded.
pub fn table_use() -> Option<(u64, u64)> {
    Some((number("nf_conntrack_count")?, number("nf_conntrack_max")?))
}

/// When a namespace sends events about its entries (net.netfilter.nf_conntrack_events).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventsSent {
    /// The kernel was built without them (CONFIG_NF_CONNTRACK_EVENTS).
    Unsupported,
    Never,
    /// About each entry.
    Always,
    /// About entries that are made while somebody listens; the default since Linux 5.19.
    WhileHeard,
}

impl EventsSent {
    fn of_setting(value: Option<u64>) -> Self {
        match value {
            None => EventsSent::Unsupported,
            Some(0) => EventsSent::Never,
            Some(2) => EventsSent::WhileHeard,
            Some(_) => EventsSent::Always,
        }
    }

    /// Why nothing is heard of new connections, if it is so.
    pub fn why_none(self) -> Option<&'static str> {
        match self {
            EventsSent::Unsupported => {
                Some("this kernel was built without them, CONFIG_NF_CONNTRACK_EVENTS")
            }
            EventsSent::Never => Some("net.netfilter.nf_conntrack_events is 0"),
            EventsSent::Always | EventsSent::WhileHeard => None,
        }
    }
}

/// When the namespace of the calling thread sends events; `None` if connection tracking is not loaded.
pub fn events_sent() -> Option<EventsSent> {
    number("nf_conntrack_count")?;
    Some(EventsSent::of_setting(number("nf_conntrack_events")))
}

/// The entries in CLOSE_WAIT of the namespace of the calling thread. A table can have millions of entries, so cwkill reads until `until`
/// at most, and keeps a bounded number.
///
/// # Errors
/// ENOENT: the kernel has no such file, or connection tracking is not loaded. EACCES: cwkill may not read it.
pub fn close_wait_entries(until: Instant) -> io::Result<TablePart<TrackedEnds>> {
    read_table(until, entry::close_wait)
}

/// As [`close_wait_entries`]: the connections of which NAT changes an address, in any state, as far as `keep` wants them.
///
/// # Errors
/// As [`close_wait_entries`].
pub fn translated_connections(
    until: Instant,
    keep: impl Fn(&TranslatedConnection) -> bool,
) -> io::Result<TablePart<TranslatedConnection>> {
    read_table(until, |line| entry::translated(line).filter(&keep))
}

fn read_table<T>(
    until: Instant,
    parse: impl FnMut(&[u8]) -> Option<T>,
) -> io::Result<TablePart<T>> {
    // Without an entry the kernel would still walk the hash table, which all namespaces share.
    if number("nf_conntrack_count") == Some(0) {
        return Ok(TablePart {
            entries: Vec::new(),
            complete: true,
        });
    }
    read(File::open(TABLE)?, || Instant::now() >= until, parse)
}

fn read<T>(
    table: impl io::Read,
    is_over: impl Fn() -> bool,
    mut parse: impl FnMut(&[u8]) -> Option<T>,
) -> io::Result<TablePart<T>> {
    let mut table = BufReader::with_capacity(BUFFER_BYTES, table);
    let mut entries = Vec::new();
    let mut line = Vec::new();
    for number in 0.. {
        // Also before the first line: a read(2) can walk over the entries of all other namespaces.
        if entries.len() >= MAX_KEPT || (number % LINES_PER_CLOCK_READ == 0 && is_over()) {
            return Ok(TablePart {
                entries,
                complete: false,
            });
        }
        line.clear();
        let mut rest = table.by_ref().take(MAX_LINE_BYTES);
        if rest.read_until(b'\n', &mut line)? == 0 {
            break;
        }
        entries.extend(parse(&line));
    }
    Ok(TablePart {
        entries,
        complete: true,
    })
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    const LINE: &str = "ipv4     2 tcp      6 58 CLOSE_WAIT src=10.0.1.2 dst=10.0.1.100 sport=1 dport=80 src=10.0.2.2 \
                        dst=10.0.2.1 sport=8080 dport=1 mark=0 zone=0 use=2\n";

    #[test]
    fn the_setting_says_when_events_are_sent() {
        let sent = [None, Some(0), Some(1), Some(2)].map(EventsSent::of_setting);
        let expected = [
            EventsSent::Unsupported,
            EventsSent::Never,
            EventsSent::Always,
            EventsSent::WhileHeard,
        ];
        assert_eq!(sent, expected);
    }

    /// Writes `lines` lines as they are read, and counts those that were begun.
    struct Lines<'c> {
        lines: usize,
        begun: &'c Cell<usize>,
        rest: &'static [u8],
    }

    impl io::Read for Lines<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            if self.rest.is_empty() && self.begun.get() < self.lines {
                self.begun.set(self.begun.get() + 1);
                self.rest = LINE.as_bytes();
            }
            self.rest.read(buffer)
        }
    }

    /// Reads a table of `lines` until the clock was read `looks` times. Also returns how many lines were begun.
    fn read_lines(lines: usize, looks: usize) -> (TablePart<TrackedEnds>, usize) {
        let (begun, left) = (Cell::new(0), Cell::new(looks));
        let table = Lines {
            lines,
            begun: &begun,
            rest: &[],
        };
        let is_over = || {
            left.set(left.get().saturating_sub(1));
            left.get() == 0
        };
        let part = read(table, is_over, entry::close_wait).unwrap();
        (part, begun.get())
    }

    #[test]
    fn of_a_million_entries_only_those_before_the_deadline_are_read() {
        let (part, begun) = read_lines(1_000_000, 4);
        assert_eq!(part.entries.len(), 3 * LINES_PER_CLOCK_READ);
        assert!(!part.complete);
        assert!(begun <= 3 * LINES_PER_CLOCK_READ + 1, "{begun}");
    }

    #[test]
    fn of_a_million_entries_a_bounded_number_is_kept() {
        let (part, begun) = read_lines(1_000_000, usize::MAX);
        assert_eq!((part.entries.len(), part.complete), (MAX_KEPT, false));
        assert!(begun <= MAX_KEPT + 1, "{begun}");
        // Entries that are not kept take no room.
        let table = Lines {
            lines: 1_000_000,
            begun: &Cell::new(0),
            rest: &[],
        };
        let part: TablePart<()> = read(table, || false, |_| None).unwrap();
        assert!(part.entries.is_empty() && part.complete);
    }

    #[test]
    fn a_small_table_is_read_to_its_end() {
        let (part, _) = read_lines(1000, usize::MAX);
        assert_eq!((part.entries.len(), part.complete), (1000, true));
        let (part, _) = read_lines(0, usize::MAX);
        assert_eq!((part.entries.len(), part.complete), (0, true));
        let other = read(&b"unknown\n"[..], || false, entry::close_wait).unwrap();
        assert!(other.entries.is_empty() && other.complete);
    }

    #[test]
    fn a_table_without_end_is_read_until_the_deadline() {
        for table in [
            // A line that does not end, and lines without a word.
            &mut io::repeat(b'x') as &mut dyn Read,
            &mut io::repeat(b'\n'),
        ] {
            let looks = Cell::new(0);
            let is_over = || {
                looks.set(looks.get() + 1);
                looks.get() == 100
            };
            let part = read(table, is_over, entry::close_wait).unwrap();
            assert_eq!((part.entries.len(), part.complete), (0, false));
        }
    }

    #[test]
    fn nothing_is_read_after_the_deadline() {
        let (part, begun) = read_lines(1000, 1);
        assert_eq!((part.entries.len(), part.complete), (0, false));
        assert_eq!(begun, 0);
    }
}
