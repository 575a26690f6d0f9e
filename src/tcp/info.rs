//! `struct tcp_info` (include/uapi/linux/tcp.h): the facts about a connection from getsockopt(2) TCP_INFO and from sock_diag.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use super::TcpState;
use crate::sys;

/// Offsets in bytes. Eight one-byte fields come first, then fields of 32 bits, and from `tcpi_pacing_rate` at 104 on of 64 bits. The
/// kernel only adds fields at the end.
const STATE: usize = 0;
const PROBES: usize = 3;
const UNACKED: usize = 24;
const LAST_DATA_SENT: usize = 44;
const LAST_DATA_RECV: usize = 52;
const LAST_ACK_RECV: usize = 56;
const RCV_SPACE: usize = 96;
const BYTES_ACKED: usize = 120;
const BYTES_RECEIVED: usize = 128;
const SEGS_IN: usize = 140;
const NOTSENT_BYTES: usize = 144;
const DELIVERED: usize = 192;
const BYTES_SENT: usize = 200;
const BYTES_RETRANS: usize = 208;

/// Room for a `struct tcp_info`: more than any kernel has so far (the kernel cuts a longer one).
pub type Buffer = [u8; 512];

/// The bytes of a `struct tcp_info`. Each field is `None` if the struct of this kernel is too short for it.
#[derive(Clone, Copy, Debug)]
pub struct TcpInfo<'b>(&'b [u8]);

/// Reads the struct of a socket by getsockopt(2).
pub fn read<'b>(socket: BorrowedFd<'_>, buffer: &'b mut Buffer) -> io::Result<TcpInfo<'b>> {
    let bytes = sys::socket_option_bytes(socket, libc::IPPROTO_TCP, libc::TCP_INFO, buffer)?;
    Ok(TcpInfo(bytes))
}

impl<'b> TcpInfo<'b> {
    pub fn new(bytes: &'b [u8]) -> Self {
        TcpInfo(bytes)
    }

    pub fn state(self) -> Option<TcpState> {
        self.0.get(STATE).copied().map(TcpState::from_kernel)
    }

    /// The keepalives and window probes that the peer has not answered.
    pub fn probes(self) -> Option<u8> {
        self.0.get(PROBES).copied()
    }

    /// Of a listening socket: the connections that wait for accept(2) (net/ipv4/tcp.c, tcp_get_info).
    pub fn unacked(self) -> Option<u32> {
        self.u32_at(UNACKED)
    }

    pub fn last_data_sent(self) -> Option<Duration> {
        self.time_at(LAST_DATA_SENT)
    }

    pub fn last_data_recv(self) -> Option<Duration> {
        self.time_at(LAST_DATA_RECV)
    }

    pub fn last_ack_recv(self) -> Option<Duration> {
        self.time_at(LAST_ACK_RECV)
    }

    pub fn rcv_space(self) -> Option<u32> {
        self.u32_at(RCV_SPACE)
    }

    /// Segments that have arrived. Since Linux 4.2.
    pub fn segs_in(self) -> Option<u32> {
        self.u32_at(SEGS_IN)
    }

    /// Segments that the peer has acknowledged. Since Linux 4.18.
    pub fn delivered(self) -> Option<u32> {
        self.u32_at(DELIVERED)
    }

    pub fn bytes_acked(self) -> Option<u64> {
        self.u64_at(BYTES_ACKED)
    }

    pub fn bytes_received(self) -> Option<u64> {
        self.u64_at(BYTES_RECEIVED)
    }

    /// Bytes in the send queue that have not been sent yet.
    pub fn notsent_bytes(self) -> Option<u32> {
        self.u32_at(NOTSENT_BYTES)
    }

    /// With those that were sent again. Since Linux 4.19, as the next.
    pub fn bytes_sent(self) -> Option<u64> {
        self.u64_at(BYTES_SENT)
    }

    pub fn bytes_retrans(self) -> Option<u64> {
        self.u64_at(BYTES_RETRANS)
    }

    fn u32_at(self, offset: usize) -> Option<u32> {
        Some(u32::from_ne_bytes(*self.0.get(offset..)?.first_chunk()?))
    }

    fn u64_at(self, offset: usize) -> Option<u64> {
        Some(u64::from_ne_bytes(*self.0.get(offset..)?.first_chunk()?))
    }

    /// A number of milliseconds.
    fn time_at(self, offset: usize) -> Option<Duration> {
        Some(Duration::from_millis(self.u32_at(offset)?.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;

    #[test]
    fn a_field_that_the_struct_is_too_short_for_is_unknown() {
        let bytes = [1; BYTES_RETRANS + 8];
        let cut = |end: usize| TcpInfo::new(&bytes[..end]);
        assert_eq!(cut(BYTES_RETRANS + 7).bytes_retrans(), None);
        assert_eq!(
            cut(BYTES_RETRANS + 8).bytes_retrans(),
            Some(0x0101_0101_0101_0101)
        );
        assert_eq!(cut(DELIVERED + 3).delivered(), None);
        assert_eq!(cut(DELIVERED + 4).delivered(), Some(0x0101_0101));
        assert!(cut(0).state().is_none() && cut(BYTES_SENT).state().is_some());
    }

    /// The offsets, against this kernel.
    #[test]
    fn the_fields_of_a_listener_and_of_a_connection() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut buffer = [0; 512];
        let info = read(listener.as_fd(), &mut buffer).unwrap();
        assert_eq!(info.state(), Some(TcpState::Listen));
        assert_eq!(info.unacked(), Some(1), "it waits for accept(2)");
        let info = read(client.as_fd(), &mut buffer).unwrap();
        assert_eq!(info.state(), Some(TcpState::Established));
        assert_eq!(info.probes(), Some(0));
        assert!(info.rcv_space() > Some(0));
        assert!(info.segs_in() > Some(0), "the SYN-ACK");
        assert!(info.last_data_recv() < Some(Duration::from_secs(600)));
        assert!(info.last_ack_recv() < Some(Duration::from_secs(600)));
        assert_eq!(info.notsent_bytes(), Some(0));
    }
}
