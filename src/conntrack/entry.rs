//! A line of /proc/net/nf_conntrack (net/netfilter/nf_conntrack_standalone.c, ct_seq_show). Pure.

use std::net::IpAddr;

/// The ends of a tracked connection: who opened it, and who answers after NAT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TrackedEnds {
    pub from: IpAddr,
    pub to: IpAddr,
}

/// The ends of the connection of `line`, if it is a TCP connection in CLOSE_WAIT.
pub(super) fn close_wait(line: &[u8]) -> Option<TrackedEnds> {
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    // ipv4 2 tcp 6 58 CLOSE_WAIT src=... dst=... sport=... dport=... src=... dst=...
    if words.nth(2)? != "tcp" || words.nth(2)? != "CLOSE_WAIT" {
        return None;
    }
    let mut sources = words.filter_map(|word| word.strip_prefix("src="));
    Some(TrackedEnds {
        from: sources.next()?.parse().ok()?,
        to: sources.next()?.parse().ok()?,
    })
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
        let v6 = b"ipv6     10 tcp      6 9 CLOSE_WAIT src=fd00:0000:0000:0000:0000:0000:0000:0001 dst=fd00:0000:0000:0000:0000:0000:0000:0002 sport=1 dport=2 src=fd00:0000:0000:0000:0000:0000:0000:0002 dst=fd00:0000:0000:0000:0000:0000:0000:0001 sport=2 dport=1 mark=0 zone=0 use=2";
        let ends = TrackedEnds {
            from: "fd00::1".parse().unwrap(),
            to: "fd00::2".parse().unwrap(),
        };
        assert_eq!(close_wait(v6), Some(ends));
        for cut in 0..v6.len() {
            let _ = close_wait(&v6[..cut]);
        }
        assert_eq!(close_wait(b"\xff\xfe tcp"), None);
        assert_eq!(close_wait(b""), None);
    }
}
