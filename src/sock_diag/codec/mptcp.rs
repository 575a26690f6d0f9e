//! `struct mptcp_info`, and the attribute that marks a TCP socket as a subflow.
//!
//! An MPTCP socket has one row in the table of MPTCP, and its subflows have rows in the table of TCP. A socket of IPPROTO_MPTCP whose
//! peer does not know MPTCP falls back: it has one subflow for ever, which is plain TCP on the wire.
//! Source: include/uapi/linux/mptcp.h.

use std::time::Duration;

use netlink_packet_core::NlasIterator;

use super::activity::{ByteCounters, Quiet};
use super::{u32_at, u64_at};

/// Offsets in `struct mptcp_info`.
const MPTCPI_FLAGS: usize = 8;
const MPTCPI_TOKEN: usize = 12;
const MPTCPI_WRITE_SEQ: usize = 16;
const MPTCPI_SND_UNA: usize = 24;
const MPTCPI_RCV_NXT: usize = 32;
/// These three exist since Linux 6.10.
const MPTCPI_LAST_DATA_SENT: usize = 84;
const MPTCPI_LAST_DATA_RECV: usize = 88;
const MPTCPI_LAST_ACK_RECV: usize = 92;
/// A flag: the socket has fallen back to TCP.
const MPTCP_INFO_FLAG_FALLBACK: u32 = 1;
/// Attribute kinds inside INET_DIAG_ULP_INFO (linux/inet_diag.h), and inside INET_ULP_INFO_MPTCP (linux/mptcp.h).
const INET_ULP_INFO_NAME: u16 = 1;
const INET_ULP_INFO_MPTCP: u16 = 3;
const MPTCP_SUBFLOW_ATTR_TOKEN_LOC: u16 = 2;

/// The facts that only an MPTCP socket has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MptcpSocket {
    /// The kernel finds the socket by this number. A later socket can have it too.
    pub token: u32,
    /// It has fallen back to TCP.
    pub is_fallback: bool,
}

/// The contents of a `struct mptcp_info`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MptcpInfo {
    pub socket: MptcpSocket,
    /// Bytes that the application wrote and the peer has not acknowledged. The DATA_FIN counts as one byte. After a fallback the
    /// bytes that are in the send queue of the subflow are not among them.
    pub send_q: u32,
    /// `None` before Linux 6.10. After a fallback `last_ack_recv` is too long: no MPTCP option comes any more.
    pub quiet: Option<Quiet>,
    /// Counted from the random numbers with which the sequences begin.
    pub counters: ByteCounters,
}

/// Parses a `struct mptcp_info`; `None` if it is too short.
pub(super) fn parse_info(info: &[u8]) -> Option<MptcpInfo> {
    if info.len() < MPTCPI_RCV_NXT + 8 {
        return None;
    }
    let counters = ByteCounters {
        received: u64_at(info, MPTCPI_RCV_NXT),
        acked: u64_at(info, MPTCPI_SND_UNA),
        written: u64_at(info, MPTCPI_WRITE_SEQ),
    };
    let send_q = counters.written.wrapping_sub(counters.acked);
    let time = |offset| Duration::from_millis(u64::from(u32_at(info, offset)));
    Some(MptcpInfo {
        socket: MptcpSocket {
            token: u32_at(info, MPTCPI_TOKEN),
            is_fallback: u32_at(info, MPTCPI_FLAGS) & MPTCP_INFO_FLAG_FALLBACK != 0,
        },
        send_q: u32::try_from(send_q).unwrap_or(u32::MAX),
        counters,
        quiet: (info.len() >= MPTCPI_LAST_ACK_RECV + 4).then(|| Quiet {
            last_data_sent: time(MPTCPI_LAST_DATA_SENT),
            last_data_recv: time(MPTCPI_LAST_DATA_RECV),
            last_ack_recv: time(MPTCPI_LAST_ACK_RECV),
        }),
    })
}

/// Parses an INET_DIAG_ULP_INFO: the token of the MPTCP socket if the TCP socket is its subflow, or 0 if the kernel does not report
/// the token. `None` for another protocol above TCP, for example TLS.
pub(super) fn parse_subflow(ulp_info: &[u8]) -> Option<u32> {
    let mut is_subflow = false;
    let mut token = 0;
    for attribute in NlasIterator::new(ulp_info).map_while(Result::ok) {
        match attribute.kind() {
            INET_ULP_INFO_NAME => is_subflow |= attribute.value().starts_with(b"mptcp"),
            INET_ULP_INFO_MPTCP => {
                is_subflow = true;
                let nested = NlasIterator::new(attribute.value()).map_while(Result::ok);
                for attribute in nested {
                    if attribute.kind() == MPTCP_SUBFLOW_ATTR_TOKEN_LOC
                        && attribute.value().len() >= 4
                    {
                        token = u32_at(attribute.value(), 0);
                    }
                }
            }
            _ => {}
        }
    }
    is_subflow.then_some(token)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A `struct mptcp_info` of Linux 6.18, from getsockopt(2) MPTCP_INFO.
    const INFO: &str = "000000020000000002000000\
        0bf0c20adb6e315c8e067374db6e315c8e0673747fb1ef743d7d757a\
        0000000000000000000000000000000000000000000000000500000000000000\
        010000000000000000000000b8090000b8090000b4030000";

    fn info() -> Vec<u8> {
        crate::sock_diag::testdata::bytes(INFO)
    }

    #[test]
    fn reads_a_real_info() {
        let info = info();
        assert_eq!(info.len(), 96);
        let parsed = parse_info(&info).unwrap();
        assert_eq!(parsed.socket.token, 0x0ac2_f00b);
        assert_eq!((parsed.send_q, parsed.socket.is_fallback), (0, false));
        let counters = parsed.counters;
        assert_eq!(counters.acked, counters.written);
        assert_eq!(counters.received, 0x7a75_7d3d_74ef_b17f);
        let quiet = parsed.quiet.unwrap();
        assert_eq!(quiet.last_data_sent, Duration::from_millis(2488));
        assert_eq!(quiet.last_ack_recv, Duration::from_millis(948));
    }

    #[test]
    fn an_info_of_an_older_kernel_has_no_times() {
        let mut info = info();
        info.truncate(MPTCPI_LAST_ACK_RECV + 3);
        info[MPTCPI_FLAGS] |= 1;
        info[MPTCPI_SND_UNA] -= 3;
        let parsed = parse_info(&info).unwrap();
        assert_eq!(parsed.quiet, None);
        assert_eq!((parsed.send_q, parsed.socket.is_fallback), (3, true));
        assert_eq!(parse_info(&info[..MPTCPI_RCV_NXT + 7]), None);
    }

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let length = u16::try_from(4 + value.len()).unwrap();
        let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn a_subflow_has_the_token_of_its_socket() {
        let name = attribute(INET_ULP_INFO_NAME, b"mptcp\0");
        let token = attribute(MPTCP_SUBFLOW_ATTR_TOKEN_LOC, &7_u32.to_ne_bytes());
        let nested = attribute(INET_ULP_INFO_MPTCP, &token);
        assert_eq!(
            parse_subflow(&[name.clone(), nested.clone()].concat()),
            Some(7)
        );
        assert_eq!(parse_subflow(&nested), Some(7));
        assert_eq!(parse_subflow(&name), Some(0));
        assert_eq!(
            parse_subflow(&attribute(INET_ULP_INFO_NAME, b"tls\0")),
            None
        );
        for length in 0..nested.len() {
            let _ = parse_subflow(&nested[..length]);
        }
    }
}
