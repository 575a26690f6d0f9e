//! Parses the output of `ss`, which is independent evidence of a scenario's state.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result};

use crate::kernel::{TcpState, canonical};

/// One line of `ss -H -O -n -t -a -e -p`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SsRow {
    /// The TCP state.
    pub state: TcpState,
    /// The Recv-Q column.
    pub recv_q: u32,
    /// The Send-Q column.
    pub send_q: u32,
    /// The local endpoint. An IPv4-mapped address is given as IPv4, and `*` (any address of both families) as `::`.
    pub local: SocketAddr,
    /// The peer's endpoint, likewise. The port `*` is given as 0.
    pub peer: SocketAddr,
    /// Whether `ss` printed an IPv4-mapped IPv6 address.
    pub mapped: bool,
    /// One entry per descriptor of the socket.
    pub owners: Vec<SsOwner>,
    /// 0 if the socket has none: it was never accepted, or its last descriptor is closed.
    pub inode: u64,
    /// The user who opened the socket. `ss` omits root.
    pub uid: u32,
    /// The sock_diag cookie.
    pub cookie: u64,
}

/// A process with a descriptor of a socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SsOwner {
    /// Name of the process.
    pub comm: String,
    /// Pid of the process.
    pub pid: u32,
    /// Number of the descriptor.
    pub fd: u32,
}

/// Parses the output of `ss -H -O -n -t -a -e -p`.
pub(crate) fn parse(output: &str) -> Result<Vec<SsRow>> {
    output
        .lines()
        .filter(|line| !line.trim().is_empty())
        .map(|line| {
            parse_row(line).with_context(|| format!("cannot parse this line of ss: {line:?}"))
        })
        .collect()
}

fn parse_row(line: &str) -> Option<SsRow> {
    let mut columns = line.split_whitespace();
    let state = TcpState::from_ss(columns.next()?)?;
    let recv_q = columns.next()?.parse().ok()?;
    let send_q = columns.next()?.parse().ok()?;
    let (local, local_mapped) = parse_endpoint(columns.next()?)?;
    let (peer, peer_mapped) = parse_endpoint(columns.next()?)?;
    let field = |name: &str| {
        line.split_whitespace()
            .rev()
            .find_map(|word| word.strip_prefix(name))
    };
    Some(SsRow {
        state,
        recv_q,
        send_q,
        local,
        peer,
        mapped: local_mapped || peer_mapped,
        owners: parse_owners(line)?,
        inode: field("ino:").map_or(Some(0), |ino| ino.parse().ok())?,
        uid: field("uid:").map_or(Some(0), |uid| uid.parse().ok())?,
        cookie: u64::from_str_radix(field("sk:")?, 16).ok()?,
    })
}

/// Parses `10.0.0.1:80`, `[::1]:80`, `*:80`, `0.0.0.0:*` or `[fe80::1]%eth0:80`. Also returns whether it is IPv4-mapped.
fn parse_endpoint(word: &str) -> Option<(SocketAddr, bool)> {
    let (address, port) = word.rsplit_once(':')?;
    let port = if port == "*" { 0 } else { port.parse().ok()? };
    let address = address
        .split('%')
        .next()?
        .trim_start_matches('[')
        .trim_end_matches(']');
    let address: IpAddr = if address == "*" {
        "::".parse().ok()?
    } else {
        address.parse().ok()?
    };
    let mapped = address.is_ipv6() && address.to_canonical().is_ipv4();
    Some((canonical(SocketAddr::new(address, port)), mapped))
}

/// Parses `users:(("name",pid=1,fd=3),("na)me",pid=2,fd=4))`. A name may contain anything; `",pid=` follows it.
fn parse_owners(line: &str) -> Option<Vec<SsOwner>> {
    let Some((_, mut rest)) = line.split_once("users:((\"") else {
        return Some(Vec::new());
    };
    let mut owners = Vec::new();
    loop {
        let (comm, after) = rest.split_once("\",pid=")?;
        let (pid, after) = after.split_once(",fd=")?;
        let (fd, after) = after.split_once(')')?;
        owners.push(SsOwner {
            comm: comm.to_owned(),
            pid: pid.parse().ok()?,
            fd: fd.parse().ok()?,
        });
        match after.strip_prefix(",(\"") {
            Some(next) => rest = next,
            None => return Some(owners),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_output_of_ss_is_parsed() {
        let rows = parse(concat!(
            "LISTEN     0      128                    *:8081      *:*     users:((\"python3\",pid=4972,fd=6)) ino:24015 sk:4 cgroup:/ v6only:0 <->\n",
            "CLOSE-WAIT 7      0      [::ffff:10.78.1.1]:8080 [::ffff:10.78.1.2]:40000 users:((\"a),(b\",pid=7,fd=5),(\"leaky\",pid=8,fd=5)) uid:1000 ino:24013 sk:a1 cgroup:/ -->\n",
            "SYN-RECV 0 0 10.78.1.1:8080 10.78.1.2:40001 ino:0 sk:2 cgroup:/ <->\n",
        ))
        .unwrap();
        assert_eq!(rows.len(), 3);
        assert_eq!(
            (rows[0].state, rows[0].local),
            (TcpState::Listen, "[::]:8081".parse().unwrap())
        );
        let stuck = &rows[1];
        assert_eq!(
            (stuck.state, stuck.recv_q, stuck.inode, stuck.uid),
            (TcpState::CloseWait, 7, 24013, 1000)
        );
        assert_eq!(stuck.local, "10.78.1.1:8080".parse().unwrap());
        assert!(stuck.mapped);
        assert_eq!(stuck.cookie, 0xa1);
        let owners: Vec<_> = stuck
            .owners
            .iter()
            .map(|owner| (owner.comm.as_str(), owner.pid, owner.fd))
            .collect();
        assert_eq!(owners, [("a),(b", 7, 5), ("leaky", 8, 5)]);
        assert_eq!((rows[2].inode, rows[2].owners.len()), (0, 0));
    }

    #[test]
    fn a_line_that_cannot_be_parsed_is_named() {
        let error = parse("ESTAB 0 nonsense").unwrap_err();
        assert!(error.to_string().contains("nonsense"), "{error}");
    }
}
