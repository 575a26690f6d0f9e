//! The facts from getsockopt(2) TCP_INFO that show whether a connection is over.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use nix::errno::Errno;

use crate::tcp::TcpState;
use crate::tcp::info::{self, TcpInfo};

/// The facts about a socket that show whether its connection is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ConnectionEnd {
    pub state: TcpState,
    pub has_receive_space: bool,
    /// Whether segments have arrived, and the peer has acknowledged some, since the socket was created or dissolved.
    pub has_delivered: bool,
    /// Time since the last acceptable segment.
    pub quiet: Duration,
}

impl ConnectionEnd {
    /// ENODATA: the kernel is older than Linux 4.18.
    pub fn read(socket: BorrowedFd<'_>) -> io::Result<Self> {
        let info = info::read(socket, &mut [0; 512]).map(ConnectionEnd::of);
        info?.ok_or_else(|| Errno::ENODATA.into())
    }

    /// `None` if `info` is too short.
    fn of(info: TcpInfo<'_>) -> Option<Self> {
        Some(ConnectionEnd {
            state: info.state()?,
            has_receive_space: info.rcv_space()? > 0,
            has_delivered: info.segs_in()? > 0 && info.delivered()? > 0,
            quiet: info.last_ack_recv()?,
        })
    }

    /// Whether a TCP socket is or was connected.
    pub fn was_connected(&self) -> bool {
        self.has_receive_space && self.has_delivered
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;

    #[test]
    fn a_short_tcp_info_says_nothing() {
        assert_eq!(ConnectionEnd::of(TcpInfo::new(&[7; 195])), None);
        assert!(ConnectionEnd::of(TcpInfo::new(&[7; 196])).is_some());
    }

    #[test]
    fn only_with_space_to_receive_and_segments_it_was_connected() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut end = ConnectionEnd::read(client.as_fd()).unwrap();
        assert!(end.was_connected());
        assert!(
            !ConnectionEnd::read(listener.as_fd())
                .unwrap()
                .was_connected()
        );
        end.has_delivered = false;
        assert!(
            !end.was_connected(),
            "a connection that was dissolved, and then refused"
        );
        (end.has_delivered, end.has_receive_space) = (true, false);
        assert!(!end.was_connected());
    }
}
