//! Connection tracking (conntrack): the table with which the kernel does NAT and stateful filtering.
//!
//! Nothing here loads a kernel module. The table is read from /proc/net/nf_conntrack, which exists only while connection tracking
//! is loaded. A request over netlink would load nf_conntrack_netlink (net/netfilter/nfnetlink.c, nfnetlink_rcv_msg), and needs
//! CAP_NET_ADMIN. See docs/decisions/conntrack-by-proc.md.

mod entry;

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::time::{Duration, Instant};

pub use entry::TrackedEnds;

/// The settings and counters of the network namespace of the calling thread.
const DIRECTORY: &str = "/proc/sys/net/netfilter";
/// The table of that namespace.
const TABLE: &str = "/proc/thread-self/net/nf_conntrack";
/// The kernel writes a page at a time, whatever the size of the buffer.
const BUFFER_BYTES: usize = 4096;
/// cwkill looks at the clock after this many lines.
const LINES_PER_CLOCK_READ: usize = 64;

fn number(name: &str) -> Option<u64> {
    let text = fs::read_to_string(format!("{DIRECTORY}/{name}")).ok()?;
    text.trim().parse().ok()
}

/// How long this namespace keeps the entry of a connection whose one side is closed; `None` if connection tracking is not loaded.
pub fn close_wait_timeout() -> Option<Duration> {
    number("nf_conntrack_tcp_timeout_close_wait").map(Duration::from_secs)
}

/// The entries in CLOSE_WAIT of the namespace of the calling thread, and whether these are all. Reads until `until` at most: a table
/// can have millions of entries.
///
/// # Errors
/// ENOENT: the kernel has no such file, or connection tracking is not loaded. EACCES: cwkill may not read it.
pub fn close_wait_entries(until: Instant) -> io::Result<(Vec<TrackedEnds>, bool)> {
    // Without an entry the kernel would still walk the whole hash table.
    if number("nf_conntrack_count") == Some(0) {
        return Ok((Vec::new(), true));
    }
    read(File::open(TABLE)?, || Instant::now() >= until)
}

fn read(table: impl io::Read, is_over: impl Fn() -> bool) -> io::Result<(Vec<TrackedEnds>, bool)> {
    let mut table = BufReader::with_capacity(BUFFER_BYTES, table);
    let mut entries = Vec::new();
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        if table.read_until(b'\n', &mut line)? == 0 {
            break;
        }
        entries.extend(entry::close_wait(&line));
        if number % LINES_PER_CLOCK_READ == 0 && is_over() {
            return Ok((entries, false));
        }
    }
    Ok((entries, true))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_of_a_million_entries_is_read_only_in_part() {
        let line = "ipv4     2 tcp      6 58 CLOSE_WAIT src=10.0.1.2 dst=10.0.1.100 sport=1 dport=80 src=10.0.2.2 \
                    dst=10.0.2.1 sport=8080 dport=1 mark=0 zone=0 use=2\n";
        let table = format!("unknown\n{}", line.repeat(1000));
        let left = std::cell::Cell::new(3);
        let is_over = || {
            left.set(left.get() - 1);
            left.get() == 0
        };
        let (entries, complete) = read(table.as_bytes(), is_over).unwrap();
        assert_eq!(
            (entries.len(), complete),
            (3 * LINES_PER_CLOCK_READ - 1, false)
        );
        let (entries, complete) = read(line.repeat(1000).as_bytes(), || false).unwrap();
        assert_eq!((entries.len(), complete), (1000, true));
        let (entries, complete) = read(&b""[..], || true).unwrap();
        assert_eq!((entries.len(), complete), (0, true));
    }
}
