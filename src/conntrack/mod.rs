//! Connection tracking (conntrack): the table with which the kernel does NAT and stateful filtering.
//!
//! Nothing here loads a kernel module: where connection tracking is not loaded, its files do not exist.

use std::fs;
use std::time::Duration;

/// The settings and counters of the network namespace of the calling thread.
const DIRECTORY: &str = "/proc/sys/net/netfilter";

fn number(name: &str) -> Option<u64> {
    let text = fs::read_to_string(format!("{DIRECTORY}/{name}")).ok()?;
    text.trim().parse().ok()
}

/// How long this namespace keeps the entry of a connection whose one side is closed; `None` if connection tracking is not loaded.
pub fn close_wait_timeout() -> Option<Duration> {
    number("nf_conntrack_tcp_timeout_close_wait").map(Duration::from_secs)
}
