//! Bytes and messages for tests without a kernel.

use super::codec::{ByteCounters, Cookie, DiagId, Family, Quiet, SocketMessage};
use crate::tcp::{TcpState, Tuple};
use std::time::Duration;

/// Dumps of Linux 6.18, states CLOSE-WAIT and LISTEN with TCP_INFO, of one leaked connection to
/// 127.0.0.1:18080 (AF_INET), one to 127.0.0.1:18081 on `::` (IPv4-mapped) and one to [::1]:18082.
pub(crate) const DUMP_V4: &str = include_str!("testdata/dump-v4.hex");
pub(crate) const DUMP_V6: &str = include_str!("testdata/dump-v6.hex");

/// The bytes of a hex dump.
pub(crate) fn bytes(hex: &str) -> Vec<u8> {
    let digits: String = hex.split_whitespace().collect();
    let pairs = (0..digits.len()).step_by(2);
    pairs
        .map(|start| u8::from_str_radix(&digits[start..start + 2], 16).unwrap())
        .collect()
}

/// A socket in CLOSE-WAIT with a descriptor and an unread FIN, idle for an hour.
pub(crate) fn stuck(local: &str, peer: &str, cookie: u64) -> SocketMessage {
    let tuple = Tuple {
        local: local.parse().unwrap(),
        peer: peer.parse().unwrap(),
    };
    let family = match tuple.local.is_ipv4() {
        true => Family::V4,
        false => Family::V6,
    };
    let hour = Duration::from_secs(3600);
    SocketMessage {
        id: DiagId::example(family, tuple, Cookie(cookie)),
        state: TcpState::CloseWait,
        recv_q: 1,
        send_q: 0,
        uid: 1000,
        inode: 77,
        quiet: Some(Quiet {
            last_data_sent: hour,
            last_data_recv: hour,
            last_ack_recv: hour,
        }),
        counters: Some(ByteCounters {
            received: 101,
            acked: 2000,
            written: 2000,
        }),
        v6only: None,
        cgroup: None,
        transparent: Some(false),
        mptcp: None,
        subflow_of: None,
    }
}

/// A listener with a backlog of 128, in which two connections wait.
pub(crate) fn listener(family: Family, local: &str, inode: u32) -> SocketMessage {
    let tuple = Tuple {
        local: local.parse().unwrap(),
        peer: match local.starts_with('[') {
            true => "[::]:0".parse().unwrap(),
            false => "0.0.0.0:0".parse().unwrap(),
        },
    };
    SocketMessage {
        id: DiagId::example(family, tuple, Cookie(u64::from(inode))),
        state: TcpState::Listen,
        recv_q: 2,
        send_q: 128,
        inode,
        quiet: None,
        counters: None,
        ..stuck("127.0.0.1:1", "127.0.0.1:1", 0)
    }
}
