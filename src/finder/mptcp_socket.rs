//! What a descriptor tells of an MPTCP socket: its protocol, its state, and its unread bytes.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::stat::fstat;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt;
use socket2::SockRef;

use super::connection_end::ConnectionEnd;
use crate::model::{Owner, Socket, Target};
use crate::proc::ProcFs;
use crate::sock_diag::Protocol;
use crate::sys::{self, Pidfds, errno_of};
use crate::tcp::TcpState;

/// Reads how many bytes of each MPTCP socket are unread, through a duplicate of a descriptor. The kernel's table has the memory that
/// they take. Without the right to duplicate the descriptor, that number stays.
pub(super) fn read_queues(proc: &ProcFs, targets: &mut [Target]) {
    let unread = |target: &&mut Target| {
        target.socket.protocol() == Protocol::Mptcp && target.socket.recv_q > 0
    };
    let mut pidfds = Pidfds::new();
    for target in targets.iter_mut().filter(unread) {
        let socket = &target.socket;
        let bytes = target.owners.iter().find_map(|owner| {
            let (id, tid) = (owner.process.id, owner.tid);
            let open = || match tid {
                None => proc.open_pidfd(id),
                Some(tid) => proc.open_pidfd_of_thread(id, tid),
            };
            unread_of(pidfds.get((id, tid), open).ok()?, owner, socket)
        });
        if let Some(bytes) = bytes {
            target.socket.recv_q = bytes;
        }
    }
}

/// The unread bytes of `socket`, if the descriptor of `owner` still refers to it. An unread DATA_FIN counts as one.
fn unread_of(pidfd: BorrowedFd<'_>, owner: &Owner, socket: &Socket) -> Option<u32> {
    let duplicate = sys::pidfd_getfd(pidfd, owner.fd).ok()?;
    let inode = fstat(&duplicate).ok()?.st_ino;
    let is_same = Some(inode) == socket.inode.map(u64::from)
        && sockopt::socket_cookie(&duplicate) == Ok(socket.cookie().0);
    let bytes = is_same.then(|| rustix::io::ioctl_fionread(&duplicate).ok())??;
    u32::try_from(bytes).ok()
}

/// The protocol of a socket of TCP or MPTCP.
pub(super) fn protocol(socket: BorrowedFd<'_>) -> io::Result<Protocol> {
    match sys::socket_option(socket, libc::SOL_SOCKET, libc::SO_PROTOCOL)? {
        libc::IPPROTO_MPTCP => Ok(Protocol::Mptcp),
        _ => Ok(Protocol::Tcp),
    }
}

/// The state of the MPTCP socket, whether it is or was connected, and the time since the last acceptable segment. `info` is the
/// TCP_INFO of the socket, which is that of its first subflow. That one can be over while the MPTCP socket still waits for another
/// subflow (net/mptcp/protocol.c, mptcp_close_timeout); then the state is unknown.
///
/// No option has the state of the MPTCP socket. In CLOSE, getpeername(2) fails with ENOTCONN (net/ipv4/af_inet.c, inet_getname) and
/// poll(2) reports HUP (net/mptcp/protocol.c, mptcp_poll); in SYN-SENT, only the former.
pub(super) fn state(
    socket: BorrowedFd<'_>,
    info: &ConnectionEnd,
) -> io::Result<(TcpState, bool, Duration)> {
    let events = events(socket)?;
    let peer = SockRef::from(&socket).peer_addr();
    let is_unconnected = peer.is_err_and(|error| errno_of(&error) == Errno::ENOTCONN);
    if !is_unconnected || !events.contains(PollFlags::HUP) {
        let state = match info.state {
            TcpState::Close => TcpState::Unknown(0),
            state => state,
        };
        return Ok((state, true, info.quiet));
    }
    let mut mptcp_info = [0; 512];
    let mptcp_info = sys::socket_option_bytes(socket, SOL_MPTCP, MPTCP_INFO, &mut mptcp_info);
    let was_connected = match mptcp_info {
        // The key of the peer comes with the handshake, and connect(2) with AF_UNSPEC drops it (mptcp_disconnect).
        Ok(info) => parse_flags(info).is_some_and(|flags| flags & REMOTE_KEY_RECEIVED != 0),
        // After a fallback the kernel passes the option on to TCP, which does not have it. The kernel also falls back if SYNs with
        // MPTCP get no answer. So there must be a sign of a connection that a failed connect(2) does not leave: the peer's FIN, or
        // segments. When the subflow has closed, its counts of segments are 0 again; its receive space stays.
        Err(_) => {
            info.has_receive_space && (info.has_delivered || events.contains(PollFlags::RDHUP))
        }
    };
    Ok((TcpState::Close, was_connected, info.quiet))
}

/// linux/socket.h and linux/mptcp.h; since Linux 5.16.
const SOL_MPTCP: i32 = 284;
const MPTCP_INFO: i32 = 1;
/// `struct mptcp_info`: the offset of `mptcpi_flags`, and the flag for a finished handshake with MPTCP.
const MPTCPI_FLAGS: usize = 8;
const REMOTE_KEY_RECEIVED: u32 = 2;

fn parse_flags(mptcp_info: &[u8]) -> Option<u32> {
    let bytes = mptcp_info.get(MPTCPI_FLAGS..MPTCPI_FLAGS + 4)?;
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

fn events(socket: BorrowedFd<'_>) -> io::Result<PollFlags> {
    let mut polled = [PollFd::new(&socket, PollFlags::RDHUP)];
    poll(&mut polled, Some(&Timespec::default()))?;
    Ok(polled[0].revents())
}

/// The unread bytes of a dead MPTCP socket.
///
/// FIONREAD counts the DATA_FIN, and gives 1 if nothing is unread (net/mptcp/protocol.c, mptcp_inq_hint). So the memory that the
/// unread bytes take decides whether there are any.
pub(super) fn unread(socket: BorrowedFd<'_>) -> io::Result<u32> {
    let mut memory = [0; 64];
    let memory = sys::socket_option_bytes(socket, libc::SOL_SOCKET, SO_MEMINFO, &mut memory)?;
    if memory.get(..4).is_some_and(|received| received == [0; 4]) {
        return Ok(0);
    }
    let bytes = u32::try_from(rustix::io::ioctl_fionread(socket)?).unwrap_or(u32::MAX);
    let fin = u32::from(events(socket)?.contains(PollFlags::RDHUP));
    Ok(bytes.saturating_sub(fin).max(1))
}

/// asm-generic/socket.h; the first number of the answer is the memory of received data.
const SO_MEMINFO: i32 = 55;
