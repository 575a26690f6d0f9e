//! A line of /proc/net/nf_conntrack (net/netfilter/nf_conntrack_standalone.c, ct_seq_show). Pure.

use std::net::{IpAddr, SocketAddr};
use std::str::SplitAsciiWhitespace;

use crate::tcp::Tuple;

/// The ends of a tracked connection: who opened it, and who answers after NAT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrackedEnds {
    pub from: IpAddr,
    pub to: IpAddr,
}

/// A connection of which NAT changes an address. Each pair is as the end that sends its segments sees it, so `local` is their source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TranslatedConnection {
    /// As the end that opened the connection sees it.
    pub opener: Tuple,
    /// As the end that answers sees it.
    pub answerer: Tuple,
}

/// The words of `line` after the number of the protocol, if it is of a TCP connection.
fn of_tcp(line: &[u8]) -> Option<SplitAsciiWhitespace<'_>> {
    // ipv4 2 tcp 6 58 CLOSE_WAIT src=... dst=... sport=... dport=... src=... dst=... sport=... dport=...
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    let is_tcp = words.nth(2)? == "tcp" && words.next()? == "6";
    is_tcp.then_some(words)
}

/// The ends of the connection of `line`, if it is a TCP connection in CLOSE_WAIT.
pub(super) fn close_wait(line: &[u8]) -> Option<TrackedEnds> {
    let mut words = of_tcp(line)?;
    if words.nth(1)? != "CLOSE_WAIT" {
        return None;
    }
    let mut sources = words.filter_map(|word| word.strip_prefix("src="));
    Some(TrackedEnds {
        from: sources.next()?.parse().ok()?,
        to: sources.next()?.parse().ok()?,
    })
}

/// The connection of `line`, if it is a TCP connection of which NAT changes an address.
pub(super) fn translated(line: &[u8]) -> Option<TranslatedConnection> {
    let mut words = of_tcp(line)?;
    // A connection in a flow table has no timeout and no state.
    let mut value = |name: &str| words.find_map(|word| word.strip_prefix(name));
    let mut pair = || {
        let (source, destination): (IpAddr, IpAddr) =
            (value("src=")?.parse().ok()?, value("dst=")?.parse().ok()?);
        Some(Tuple {
            local: SocketAddr::new(source, value("sport=")?.parse().ok()?),
            peer: SocketAddr::new(destination, value("dport=")?.parse().ok()?),
        })
    };
    let (opener, answerer) = (pair()?, pair()?);
    (answerer != opener.reversed()).then_some(TranslatedConnection { opener, answerer })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_close_wait_of_tcp_counts() {
        let line = |protocol: &str, state: &str| {
            let text = format!(
                "ipv4     2 {protocol}      6 58 {state}src=10.0.1.2 dst=10.0.1.100 sport=50576 dport=80 \
                 src=10.0.2.2 dst=10.0.2.1 sport=8080 dport=50576 [ASSURED] mark=0 use=1\n"
            );
            close_wait(text.as_bytes())
        };
        let ends = TrackedEnds {
            from: "10.0.1.2".parse().unwrap(),
            to: "10.0.2.2".parse().unwrap(),
        };
        assert_eq!(line("tcp", "CLOSE_WAIT "), Some(ends));
        assert_eq!(line("tcp", "ESTABLISHED "), None);
        assert_eq!(line("udp", ""), None);
        let ends = TrackedEnds {
            from: "fd00::1".parse().unwrap(),
            to: "fd00::2".parse().unwrap(),
        };
        assert_eq!(close_wait(V6), Some(ends));
        for cut in 0..V6.len() {
            let _ = (close_wait(&V6[..cut]), translated(&V6[..cut]));
        }
        assert_eq!(close_wait(b"\xff\xfe tcp"), None);
        assert_eq!(close_wait(b""), None);
    }

    const V6: &[u8] = b"ipv6     10 tcp      6 9 CLOSE_WAIT src=fd00:0000:0000:0000:0000:0000:0000:0001 dst=fd00:0000:0000:0000:0000:0000:0000:0002 sport=1 dport=2 src=fd00:0000:0000:0000:0000:0000:0000:0002 dst=fd00:0000:0000:0000:0000:0000:0000:0001 sport=2 dport=1 mark=0 zone=0 use=2";

    #[test]
    fn both_ends_of_a_translated_connection_are_read() {
        let tuple = |local: &str, peer: &str| Tuple {
            local: local.parse().unwrap(),
            peer: peer.parse().unwrap(),
        };
        let expected = TranslatedConnection {
            opener: tuple("10.0.1.2:50576", "10.0.1.100:80"),
            answerer: tuple("10.0.2.2:8080", "10.0.2.1:50576"),
        };
        let line = |state: &str, counts: &str| {
            let text = format!(
                "ipv4     2 tcp      6 {state}src=10.0.1.2 dst=10.0.1.100 sport=50576 dport=80 {counts}\
                 src=10.0.2.2 dst=10.0.2.1 sport=8080 dport=50576 {counts}[ASSURED] mark=0 use=1\n"
            );
            translated(text.as_bytes())
        };
        assert_eq!(line("58 CLOSE_WAIT ", ""), Some(expected));
        assert_eq!(
            line("431999 ESTABLISHED ", "packets=7 bytes=812 "),
            Some(expected)
        );
        // In a flow table.
        assert_eq!(line("", ""), Some(expected));
        // No NAT.
        assert_eq!(translated(V6), None);
        assert_eq!(translated(b"ipv4 2 udp 17 29 src=10.0.1.2 dst=10.0.1.9 sport=1 dport=2 src=10.0.2.2 dst=10.0.1.2 sport=2 dport=1"), None);
    }
}
