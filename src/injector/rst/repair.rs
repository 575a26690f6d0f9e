//! Sequence numbers from the socket itself, in repair mode, through a duplicate of its descriptor.
//!
//! The socket is in repair mode for five system calls. The duplicate stays open until the socket has left the mode, even if
//! the owner exits meanwhile. If cwkill gets SIGKILL within these microseconds, the socket stays in repair mode: a guard
//! cannot prevent that.

use std::io;
use std::os::fd::BorrowedFd;

use nix::errno::Errno;

use super::Numbers;
use crate::model::{MethodError, Privilege};
use crate::privileges;
use crate::sys::{self, errno_of};
use crate::tcp::Seq;

/// linux/tcp.h. The libc crate does not have these constants.
const TCP_REPAIR_ON: i32 = 1;
/// Leaves the mode without a window probe. Since Linux 4.19; older kernels return EPERM.
const TCP_REPAIR_OFF_NO_WP: i32 = -1;
const TCP_REPAIR_OFF: i32 = 0;
const TCP_NO_QUEUE: i32 = 0;
const TCP_RECV_QUEUE: i32 = 1;
const TCP_SEND_QUEUE: i32 = 2;

/// Reads the numbers of the connection of `socket`.
///
/// # Errors
/// [`MethodError::NotPermitted`] or [`MethodError::RefusedDespitePrivilege`]: cwkill needs CAP_NET_ADMIN over the socket's network namespace. EBUSY: another process has
/// put the socket into repair mode, to checkpoint it.
pub fn numbers(socket: BorrowedFd<'_>) -> Result<Numbers, MethodError> {
    let mode = RepairMode::enter(socket).map_err(|error| match errno_of(&error) {
        Errno::EPERM => privileges::not_permitted(Privilege::NetAdmin, Errno::EPERM),
        errno => MethodError::SystemCall("TCP_REPAIR", errno),
    })?;
    mode.numbers()
        .map_err(|error| MethodError::SystemCall("TCP_QUEUE_SEQ", errno_of(&error)))
}

/// A socket in repair mode. When this is dropped, the socket leaves the mode, and SO_REUSEADDR is restored: entering and
/// leaving both overwrite it (net/ipv4/tcp.c, do_tcp_setsockopt: SK_FORCE_REUSE, SK_NO_REUSE).
pub struct RepairMode<'fd> {
    socket: BorrowedFd<'fd>,
    reuse_address: i32,
}

impl<'fd> RepairMode<'fd> {
    /// Enters the mode.
    ///
    /// # Errors
    /// As [`numbers`].
    pub fn enter(socket: BorrowedFd<'fd>) -> io::Result<Self> {
        // Otherwise cwkill would end the mode of another process when it leaves.
        if sys::socket_option(socket, libc::IPPROTO_TCP, libc::TCP_REPAIR)? != 0 {
            return Err(io::Error::from_raw_os_error(libc::EBUSY));
        }
        let reuse_address = sys::socket_option(socket, libc::SOL_SOCKET, libc::SO_REUSEADDR)?;
        sys::set_socket_option(socket, libc::IPPROTO_TCP, libc::TCP_REPAIR, TCP_REPAIR_ON)?;
        Ok(RepairMode {
            socket,
            reuse_address,
        })
    }

    /// # Errors
    /// As getsockopt(2) and setsockopt(2).
    pub fn numbers(&self) -> io::Result<Numbers> {
        let rcv_nxt = self.queue_seq(TCP_RECV_QUEUE)?;
        // For the send queue the kernel returns write_seq. Unsent bytes lie between snd_nxt and write_seq.
        let write_seq = self.queue_seq(TCP_SEND_QUEUE)?;
        Ok(Numbers {
            rcv_nxt,
            snd_nxt: write_seq.minus(sys::unsent_bytes(self.socket)?),
        })
    }

    fn queue_seq(&self, queue: i32) -> io::Result<Seq> {
        let tcp = libc::IPPROTO_TCP;
        sys::set_socket_option(self.socket, tcp, libc::TCP_REPAIR_QUEUE, queue)?;
        let seq = sys::socket_option(self.socket, tcp, libc::TCP_QUEUE_SEQ)?;
        Ok(Seq(seq.cast_unsigned()))
    }
}

impl Drop for RepairMode<'_> {
    fn drop(&mut self) {
        let set = |level, name, value| sys::set_socket_option(self.socket, level, name, value);
        let tcp = libc::IPPROTO_TCP;
        let _ = set(tcp, libc::TCP_REPAIR_QUEUE, TCP_NO_QUEUE);
        let left = set(tcp, libc::TCP_REPAIR, TCP_REPAIR_OFF_NO_WP)
            .or_else(|_| set(tcp, libc::TCP_REPAIR, TCP_REPAIR_OFF))
            .and_then(|()| set(libc::SOL_SOCKET, libc::SO_REUSEADDR, self.reuse_address));
        // This cannot fail if the socket could enter the mode.
        debug_assert!(left.is_ok() || std::thread::panicking(), "{left:?}");
    }
}
