//! A netlink socket that hears of new and changed entries of conntrack, as they come.
//!
//! The kernel sends an event when the packet that has caused it leaves this host. An entry that was made before anybody listened has no
//! events (net.netfilter.nf_conntrack_events is 2 by default), so whoever listens must also list the table.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{setsockopt, sockopt};

use super::client::ConntrackError;
use super::codec::{self, Event};

/// Multicast groups (linux/netfilter/nfnetlink_compat.h).
const NFNLGRP_CONNTRACK_NEW: u32 = 1;
const NFNLGRP_CONNTRACK_UPDATE: u32 = 2;
/// The requested size of the receive queue, in bytes: room for some thousand events while cwkill acts.
const RECEIVE_QUEUE: usize = 4 * 1024 * 1024;
/// An event has a few hundred bytes.
const RECEIVE_BUFFER: usize = 8 * 1024;
/// So many are read at once. More wait in the queue.
const MAX_EVENTS: usize = 4096;

/// The events of the network namespace of the thread that opened it.
pub struct Events {
    socket: Socket,
    buffer: Vec<u8>,
}

impl Events {
    /// Hears every event from now on.
    ///
    /// # Errors
    /// As the variants of [`ConntrackError`].
    pub fn open() -> Result<Self, ConntrackError> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        socket.set_non_blocking(true)?;
        // Without CAP_NET_ADMIN over it, net.core.rmem_max is the limit.
        if setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_QUEUE).is_err() {
            let _ = setsockopt(&socket, sockopt::RcvBuf, &RECEIVE_QUEUE);
        }
        socket.add_membership(NFNLGRP_CONNTRACK_NEW)?;
        socket.add_membership(NFNLGRP_CONNTRACK_UPDATE)?;
        Ok(Events {
            socket,
            buffer: vec![0; RECEIVE_BUFFER],
        })
    }

    /// Waits for an event, for `longest` at most or until a signal comes, and calls `handle` with each that is there. Returns whether events
    /// were lost since the last call: then the table must be listed again.
    ///
    /// # Errors
    /// The socket failed.
    pub fn wait(&mut self, longest: Duration, mut handle: impl FnMut(Event)) -> io::Result<bool> {
        let timeout = PollTimeout::try_from(longest).unwrap_or(PollTimeout::MAX);
        let mut polled = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
        match poll(&mut polled, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let mut is_lossy = false;
        for _ in 0..MAX_EVENTS {
            match self.socket.recv(&mut &mut self.buffer[..], 0) {
                Ok(length) => codec::events(&self.buffer[..length]).for_each(&mut handle),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => is_lossy = true,
                Err(error) => return Err(error),
            }
        }
        Ok(is_lossy)
    }
}
