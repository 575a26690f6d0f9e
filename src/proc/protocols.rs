//! How many TCP sockets a network namespace has, without entering it.

use std::fs;

use super::ProcFs;

/// The protocols whose sockets can be stuck. Those of MPTCP are counted from Linux 6.3 on.
const PROTOCOLS: [&str; 4] = ["TCP", "TCPv6", "MPTCP", "MPTCPv6"];

impl ProcFs {
    /// The number of TCP sockets in the network namespace of a process, whatever their state: all that are hashed, so each that
    /// waits for an application, and no TIME-WAIT. An MPTCP socket counts beside its subflows. `None`: it cannot be read.
    ///
    /// The kernel keeps this number, so reading it takes 70 µs (measured) however many sockets there are. It needs no privilege.
    pub(crate) fn tcp_sockets_around(&self, pid: i32) -> Option<usize> {
        let text = fs::read_to_string(self.path(&format!("{pid}/net/protocols"))).ok()?;
        tcp_sockets(&text)
    }
}

/// The sum for the protocols of TCP; `None` if the table has no TCP.
///
/// Source: net/core/sock.c, proto_seq_printf: name, size of a socket, sockets, and more.
fn tcp_sockets(protocols: &str) -> Option<usize> {
    let mut sum = None;
    for line in protocols.lines() {
        let mut words = line.split_whitespace();
        if words.next().is_some_and(|name| PROTOCOLS.contains(&name)) {
            let sockets: usize = words.nth(1)?.parse().ok()?;
            sum = Some(sum.unwrap_or(0) + sockets);
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sockets_of_tcp_and_mptcp_are_added() {
        let text = "\
protocol  size sockets  memory press maxhdr  slab module     cl co di ac io in de sh ss gs se re bi br ha uh gp em
MPTCPv6   2064      1      48   no       0   yes  kernel      y  y  y  n  y  y  y  y  y  y  y  y  n  n  y  y  y  n
TCPv6     2432     20      48   no     192   yes  kernel      y  y  y  y  y  y  y  y  y  y  y  y  n  y  y  y  y  y
UDP       1280    300      -1   NI       0   yes  kernel      y  y  y  n  y  y  y  n  y  y  y  y  y  n  y  y  y  n
TCP       2304   4000      48   no     192   yes  kernel      y  y  y  y  y  y  y  y  y  y  y  y  n  y  y  y  y  y
";
        assert_eq!(tcp_sockets(text), Some(4021));
        assert_eq!(tcp_sockets("TCP 2304 0 48"), Some(0));
        for unknown in ["", "UDP 1280 3 -1", "TCP 2304", "TCP 2304 many"] {
            assert_eq!(tcp_sockets(unknown), None, "{unknown}");
        }
    }

    #[test]
    fn this_process_has_a_table() {
        let pid = std::process::id().cast_signed();
        let proc = ProcFs::default();
        let _listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        assert!(proc.tcp_sockets_around(pid).unwrap() > 0);
        assert_eq!(proc.tcp_sockets_around(i32::MAX), None);
    }
}
