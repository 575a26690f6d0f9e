//! The fields of `struct tcp_info` that show whether a connection is over, from getsockopt(2) TCP_INFO.

use std::time::Duration;

use crate::sock_diag::codec::TCPI_LAST_ACK_RECV;
use crate::tcp::TcpState;

/// Offsets in `struct tcp_info` (linux/tcp.h), in bytes. The receive space is the 23rd u32 after eight bytes. The count of
/// received segments exists since Linux 4.2.
const TCPI_STATE: usize = 0;
const TCPI_RCV_SPACE: usize = 8 + 22 * 4;
const TCPI_SEGS_IN: usize = 140;
/// The count of acknowledged segments exists since Linux 4.18.
const TCPI_DELIVERED: usize = 192;

/// The facts from a `struct tcp_info` that show whether a connection is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TcpInfo {
    pub state: TcpState,
    pub has_receive_space: bool,
    /// Whether segments have arrived, and the peer has acknowledged some, since the socket was created or dissolved.
    pub has_delivered: bool,
    /// Time since the last acceptable segment.
    pub quiet: Duration,
}

impl TcpInfo {
    /// Whether a TCP socket is or was connected.
    pub fn was_connected(&self) -> bool {
        self.has_receive_space && self.has_delivered
    }
}

/// Reads a `struct tcp_info`; `None` if it is too short.
pub(super) fn parse_info(info: &[u8]) -> Option<TcpInfo> {
    let number = |offset: usize| -> Option<u32> {
        let bytes = info.get(offset..offset + 4)?;
        Some(u32::from_ne_bytes(bytes.try_into().ok()?))
    };
    Some(TcpInfo {
        state: TcpState::from_kernel(*info.get(TCPI_STATE)?),
        has_receive_space: number(TCPI_RCV_SPACE)? > 0,
        has_delivered: number(TCPI_SEGS_IN)? > 0 && number(TCPI_DELIVERED)? > 0,
        quiet: Duration::from_millis(number(TCPI_LAST_ACK_RECV)?.into()),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_tcp_info_says_nothing() {
        assert_eq!(parse_info(&[7; TCPI_DELIVERED + 3]), None);
        let mut info = [0; TCPI_DELIVERED + 4];
        info[0] = 7;
        info[TCPI_LAST_ACK_RECV..][..4].copy_from_slice(&1500_u32.to_ne_bytes());
        info[TCPI_SEGS_IN..][..4].copy_from_slice(&3_u32.to_ne_bytes());
        let was_connected = |info: &[u8]| {
            let info = parse_info(info).unwrap();
            assert_eq!(info.state, TcpState::Close);
            assert_eq!(info.quiet, Duration::from_millis(1500));
            info.was_connected()
        };
        assert!(!was_connected(&info));
        info[TCPI_RCV_SPACE] = 1;
        assert!(
            !was_connected(&info),
            "a connection that was dissolved, and then refused"
        );
        info[TCPI_DELIVERED] = 1;
        assert!(was_connected(&info));
    }
}
