//! Dead descriptors: open descriptors of TCP sockets whose connection is over.
//!
//! Such a socket is in no table of the kernel, so no `ss` shows it; it costs its process a descriptor until
//! the process closes it. What is looked for are sockets in /proc/PID/fd whose inode is in no TCP table
//! ([`inodes_in_tables`]). That alone says little: UNIX and UDP sockets are in no TCP table either, nor is a TCP socket
//! that was never connected, nor one in a network namespace that was not looked into. So:
//!
//! 1. the protocol is read from the attribute `system.sockprotoname` of the descriptor (net/socket.c,
//!    sockfs_xattr_get), with the right that reading the link needs and no more; MPTCP has a name of its
//!    own and is left out;
//! 2. the state is read from TCP_INFO through a duplicate (pidfd_getfd(2)), which needs the right to
//!    attach to the process. Without it the descriptor is [`Verdict::Unknown`], never dead.
//!
//! A socket that was a connection has had a segment of its own acknowledged, its SYN or its SYN-ACK: `tcpi_delivered`
//! (net/ipv4/tcp_input.c, tcp_rcv_state_process and tcp_clean_rtx_queue). A refused one has not, and tcp_disconnect
//! (net/ipv4/tcp.c, since Linux 5.6) resets it when a program takes its socket back to connect it anew. The receive space is
//! not reset, and a refusal is a received segment, so these alone would call a socket dead that was taken back and
//! refused and is about to be connected again. They are asked for as well. [measured on Linux 6.18]

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::fstat;
use rayon::prelude::*;
use rustix::fs::getxattr;
use rustix::io::{Errno as Rustix, ioctl_fionread};
use rustix::net::sockopt;
use socket2::SockRef;

use super::FindError;
use crate::proc::netns::Netns;
use crate::proc::{
    ProcFs, Process, RemoteFd, Unreadable, fds, identity, image, is_denied, is_gone, open_in,
};
use crate::sock_diag::codec::TCPI_LAST_ACK_RECV;
use crate::sock_diag::{Cookie, DumpRequest, Family, SockDiag};
use crate::sys;
use crate::tcp::{StateSet, TcpState};

/// `struct tcp_info` (linux/tcp.h): the state is the first byte, the receive space the 23rd u32 behind eight
/// bytes, the count of received segments is there since Linux 4.2.
const TCPI_STATE: usize = 0;
const TCPI_RCV_SPACE: usize = 8 + 22 * 4;
const TCPI_SEGS_IN: usize = 140;
/// The count of acknowledged segments is there since Linux 4.18.
const TCPI_DELIVERED: usize = 192;

/// The descriptor table of one process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// The process.
    pub process: Process,
    /// Its open descriptors, of whatever kind.
    pub used: usize,
    /// Those of TCP sockets in no table that was looked into, by number.
    pub suspects: Vec<Suspect>,
}

/// A descriptor of a TCP socket that is in no table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Suspect {
    /// Its number in its process.
    pub fd: RemoteFd,
    /// The socket's inode.
    pub inode: u32,
    /// What it is.
    pub verdict: Verdict,
}

/// What a descriptor of a socket in no table is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The connection is over, state CLOSE: nothing can come of this descriptor any more but bytes that are in it already.
    Dead(DeadSocket),
    /// State CLOSE, and no connection since it was made or taken back: fresh, bound, or after a failed
    /// connect(2). Its process may still connect it.
    NeverConnected,
    /// It may not be duplicated, for this reason; the socket may be any of the above, or alive in
    /// a network namespace that was not looked into.
    Unknown(Errno),
}

/// What the kernel still knows of a dead socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeadSocket {
    /// Its identity.
    pub cookie: Cookie,
    /// Its local address, IPv4-mapped written as IPv4. The peer's is forgotten (inet_getname).
    pub local: Option<SocketAddr>,
    /// Time since the last acceptable segment of the peer. The connection ended later than that: an
    /// upper bound on the time the socket has been dead.
    pub quiet: Duration,
    /// Bytes that its program has not read, and still can: the kernel keeps them until the last descriptor is closed
    /// (net/ipv4/tcp.c, tcp_done; net/ipv4/af_inet.c, inet_sock_destruct).
    pub unread: u32,
}

/// What [`find`] found.
#[derive(Debug, Default)]
pub struct DeadScan {
    /// The processes that were wanted, by pid, with or without suspects.
    pub tables: Vec<Table>,
    /// Processes that may not be looked into.
    pub unreadable: Vec<Unreadable>,
    /// Processes whose first thread has ended and others have not: their tables cannot be seen by their number.
    pub leader_exited: Vec<Process>,
    /// Processes whose files failed in a way that is neither their end nor a missing right.
    pub failed: Vec<(i32, io::Error)>,
    /// Processes of others are not shown at all: /proc is mounted with hidepid.
    pub hidden: bool,
}

/// The inodes of all sockets in the TCP tables of `namespaces`.
///
/// # Errors
/// A namespace cannot be entered, or gives no list.
pub fn inodes_in_tables(namespaces: &[Arc<Netns>]) -> Result<HashSet<u32>, FindError> {
    let mut inodes = HashSet::new();
    for netns in namespaces {
        let dumped = netns.within(dump_inodes).map_err(FindError::Enter)?;
        inodes.extend(dumped?);
    }
    Ok(inodes)
}

fn dump_inodes() -> Result<Vec<u32>, FindError> {
    let mut diag = SockDiag::open().map_err(FindError::Open)?;
    let mut inodes = Vec::new();
    for family in Family::ALL {
        let request = DumpRequest {
            family,
            // An entry in TIME-WAIT has no inode. The kernel's list of bound sockets in CLOSE (Linux 6.8)
            // has dead ones as well, so it is not asked for.
            states: StateSet::ALL.without(TcpState::TimeWait.into()),
            info: false,
            bytecode: &[],
        };
        inodes.extend(diag.dump(&request, |message| {
            (message.inode != 0).then_some(message.inode)
        })?);
    }
    Ok(inodes)
}

/// Looks into the descriptor table of every process that is `wanted`, for sockets that are not in
/// `in_tables`.
///
/// What vanishes meanwhile is passed over. A connection that is made after `in_tables` was read is
/// told from a dead one by its state.
///
/// # Errors
/// The processes cannot be listed.
pub fn find(
    proc: &ProcFs,
    wanted: &(dyn Fn(&Process) -> bool + Sync),
    in_tables: &HashSet<u32>,
) -> io::Result<DeadScan> {
    let same_pids = proc.is_of_our_pid_namespace();
    let pids = proc.pids()?;
    let mut scan = DeadScan {
        // The first process of a pid namespace lives as long as the namespace.
        hidden: pids.first() != Some(&1),
        ..DeadScan::default()
    };
    let look = |pid: i32| (pid, look_inside(proc, pid, same_pids, wanted, in_tables));
    let looks: Vec<_> = pids.into_par_iter().map(look).collect();
    for (pid, look) in looks {
        match look {
            Ok(Look::Table(table)) => scan.tables.push(table),
            Ok(Look::LeaderExited(process)) => scan.leader_exited.push(process),
            Ok(Look::Nothing) => {}
            Err(error) if is_gone(&error) => {}
            Err(error) if is_denied(&error) => scan.unreadable.extend(proc.unreadable(pid)),
            Err(error) => scan.failed.push((pid, error)),
        }
    }
    Ok(scan)
}

/// What there is to say of one process.
enum Look {
    /// It is not wanted, or gone.
    Nothing,
    Table(Table),
    LeaderExited(Process),
}

/// Looks at a process that has another program or no first thread after the look, and the time between them: in an exec by
/// another thread the first one ends, and the other takes its place (fs/exec.c, de_thread); between these the table
/// seems to be empty.
const LOOKS: u32 = 20;
const BETWEEN_LOOKS: Duration = Duration::from_millis(1);

fn look_inside(
    proc: &ProcFs,
    pid: i32,
    same_pids: bool,
    wanted: &(dyn Fn(&Process) -> bool + Sync),
    in_tables: &HashSet<u32>,
) -> io::Result<Look> {
    // Stays with the process it was opened for, as in owners.
    let dir = File::open(proc.path(&pid.to_string()))?;
    let process = identity(dir.as_fd(), pid)?;
    if !wanted(&process) {
        return Ok(Look::Nothing);
    }
    for _ in 0..LOOKS {
        let before = image(dir.as_fd())?;
        if before.is_none() {
            thread::sleep(BETWEEN_LOOKS);
            continue;
        }
        let (suspects, used) = look_at_table(proc, dir.as_fd(), &process, same_pids, in_tables)?;
        if image(dir.as_fd())? != before {
            continue;
        }
        // The attribute was read by the number of the process.
        if !suspects.is_empty() && !proc.is_alive(process.id) {
            return Ok(Look::Nothing);
        }
        return Ok(Look::Table(Table {
            process,
            used,
            suspects,
        }));
    }
    Ok(Look::LeaderExited(process))
}

/// The suspects in the table of a process, and how many descriptors it has.
fn look_at_table(
    proc: &ProcFs,
    dir: BorrowedFd<'_>,
    process: &Process,
    same_pids: bool,
    in_tables: &HashSet<u32>,
) -> io::Result<(Vec<Suspect>, usize)> {
    let fds = open_in(dir, c"fd", OFlag::O_DIRECTORY)?;
    let numbers = fds::list_fds(fds.as_fd())?;
    let missing: Vec<(RemoteFd, u32)> = numbers
        .par_chunks(fds::CHUNK)
        .map(|numbers| in_no_table(fds.as_fd(), numbers, in_tables))
        .collect::<io::Result<Vec<_>>>()?
        .concat();
    if missing.is_empty() {
        return Ok((Vec::new(), numbers.len()));
    }
    let pidfd = match same_pids {
        true => open_pidfd(proc, process),
        false => Err(Errno::ESRCH),
    };
    let suspect = |&(fd, inode): &(RemoteFd, u32)| {
        if !is_tcp(proc, process.id.pid, fd)? {
            return Ok(None);
        }
        let verdict = match &pidfd {
            Ok(pidfd) => examine(pidfd.as_fd(), fd, inode),
            Err(errno) => Some(Verdict::Unknown(*errno)),
        };
        Ok(verdict.map(|verdict| Suspect { fd, inode, verdict }))
    };
    let found: Vec<Option<Suspect>> = missing
        .par_iter()
        .with_min_len(fds::CHUNK)
        .map(suspect)
        .collect::<io::Result<_>>()?;
    let mut suspects: Vec<Suspect> = found.into_iter().flatten().collect();
    suspects.sort_unstable_by_key(|suspect| suspect.fd);
    Ok((suspects, numbers.len()))
}

/// Of the descriptors `numbers` in `fds`, the sockets whose inode is in no table.
fn in_no_table(
    fds: BorrowedFd<'_>,
    numbers: &[i32],
    in_tables: &HashSet<u32>,
) -> io::Result<Vec<(RemoteFd, u32)>> {
    let mut missing = Vec::new();
    for &number in numbers {
        match fds::read_socket_link(fds, number) {
            Ok(Some(inode)) if !in_tables.contains(&inode) => {
                missing.push((RemoteFd(number), inode));
            }
            Ok(_) => {}
            // Closed since the directory was read.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(missing)
}

/// Whether the kernel calls the descriptor's protocol TCP.
fn is_tcp(proc: &ProcFs, pid: i32, fd: RemoteFd) -> io::Result<bool> {
    let path = proc.path(&format!("{pid}/fd/{}", fd.0));
    let mut name = [0; 32];
    match getxattr(&path, c"system.sockprotoname", &mut name[..]) {
        Ok(length) => Ok(matches!(&name[..length], b"TCP\0" | b"TCPv6\0")),
        // Closed meanwhile, or something else by now.
        Err(Rustix::NOENT | Rustix::OPNOTSUPP | Rustix::NODATA | Rustix::RANGE) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// A pidfd of exactly `process`.
pub(crate) fn open_pidfd(proc: &ProcFs, process: &Process) -> Result<OwnedFd, Errno> {
    let pidfd = sys::pidfd_open(process.id.pid).map_err(errno)?;
    // Read after the pidfd was opened: it still has its number, so the pidfd is of it.
    match proc.is_alive(process.id) {
        true => Ok(pidfd),
        false => Err(Errno::ESRCH),
    }
}

/// Looks at a descriptor through a duplicate of it, which is closed again at once. `None`: it is no longer
/// this socket, or the socket is alive.
pub(crate) fn examine(pidfd: BorrowedFd<'_>, fd: RemoteFd, inode: u32) -> Option<Verdict> {
    let socket = match sys::pidfd_getfd(pidfd, fd) {
        Ok(socket) => socket,
        Err(error) => match errno(error) {
            Errno::EBADF | Errno::ESRCH => return None,
            other => return Some(Verdict::Unknown(other)),
        },
    };
    if fstat(&socket).map(|stat| stat.st_ino) != Ok(inode.into()) {
        return None;
    }
    read_verdict(socket.as_fd()).unwrap_or_else(|error| Some(Verdict::Unknown(errno(error))))
}

fn read_verdict(socket: BorrowedFd<'_>) -> io::Result<Option<Verdict>> {
    // Longer than any tcp_info so far; a longer one is cut by the kernel.
    let mut info = [0; 512];
    let info = sys::socket_option_bytes(socket, libc::IPPROTO_TCP, libc::TCP_INFO, &mut info)?;
    let Some((state, was_connected, quiet)) = parse_info(info) else {
        return Err(Errno::ENODATA.into());
    };
    Ok(match (state, was_connected) {
        (TcpState::Close, false) => Some(Verdict::NeverConnected),
        (TcpState::Close, true) => {
            let local = SockRef::from(&socket).local_addr().ok();
            let canonical =
                |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
            Some(Verdict::Dead(DeadSocket {
                cookie: Cookie(sockopt::socket_cookie(socket)?),
                local: local.and_then(|address| address.as_socket()).map(canonical),
                quiet,
                unread: u32::try_from(ioctl_fionread(socket)?).unwrap_or(u32::MAX),
            }))
        }
        _ => None,
    })
}

/// What a `struct tcp_info` says: the state, whether the socket is or was a connection, and the time since the
/// last acceptable segment.
fn parse_info(info: &[u8]) -> Option<(TcpState, bool, Duration)> {
    let number = |at: usize| -> Option<u32> {
        let bytes = info.get(at..at + 4)?;
        Some(u32::from_ne_bytes(bytes.try_into().ok()?))
    };
    Some((
        TcpState::from_kernel(*info.get(TCPI_STATE)?),
        number(TCPI_SEGS_IN)? > 0 && number(TCPI_RCV_SPACE)? > 0 && number(TCPI_DELIVERED)? > 0,
        Duration::from_millis(number(TCPI_LAST_ACK_RECV)?.into()),
    ))
}

pub(crate) fn errno(error: io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proc::netns::NetnsScope;
    use socket2::{Domain, Socket, Type};
    use std::io::Read;
    use std::net::{Shutdown, TcpListener, TcpStream, UdpSocket};
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;

    /// What is said of descriptors of this process.
    fn verdicts(fds: &[BorrowedFd<'_>]) -> Vec<Option<Verdict>> {
        let proc = ProcFs::default();
        let ours = NetnsScope::Current.open(&proc).unwrap().open;
        let in_tables = inodes_in_tables(&ours).unwrap();
        let own = i32::try_from(std::process::id()).unwrap();
        let mut scan = find(&proc, &|process| process.id.pid == own, &in_tables).unwrap();
        let table = scan.tables.remove(0);
        assert!(table.used >= fds.len());
        let verdict = |fd: &BorrowedFd<'_>| {
            let mut suspects = table.suspects.iter();
            suspects
                .find(|suspect| suspect.fd.0 == fd.as_raw_fd())
                .map(|suspect| suspect.verdict)
        };
        fds.iter().map(verdict).collect()
    }

    /// A connection over `listener`, whose accepted end has seen a reset.
    fn reset(listener: &TcpListener) -> TcpStream {
        let peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut accepted, _) = listener.accept().unwrap();
        SockRef::from(&peer)
            .set_linger(Some(Duration::ZERO))
            .unwrap();
        drop(peer);
        let error = accepted.read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        accepted
    }

    #[test]
    fn only_a_connection_that_is_over_is_dead() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(address).unwrap();
            let local = listener.local_addr().unwrap();
            let dead = reset(&listener);
            // Both sides have closed, in this order: the kernel keeps TIME-WAIT without the descriptor.
            let mut peer = TcpStream::connect(local).unwrap();
            let (mut finished, _) = listener.accept().unwrap();
            finished.shutdown(Shutdown::Write).unwrap();
            assert_eq!(peer.read(&mut [0]).unwrap(), 0);
            drop(peer);
            assert_eq!(finished.read(&mut [0]).unwrap(), 0);
            let open = TcpStream::connect(local).unwrap();
            let fresh = Socket::new(Domain::for_address(local), Type::STREAM, None).unwrap();
            let bound = Socket::new(Domain::for_address(local), Type::STREAM, None).unwrap();
            let any_port: SocketAddr = address.parse().unwrap();
            bound.bind(&any_port.into()).unwrap();
            let refused = Socket::new(Domain::for_address(local), Type::STREAM, None).unwrap();
            let nobody = SocketAddr::new(local.ip(), 1);
            refused.connect(&nobody.into()).unwrap_err();
            // The kernel has the refusal ready, and nobody has asked for it.
            let waiting = Socket::new(Domain::for_address(local), Type::STREAM, None).unwrap();
            waiting.set_nonblocking(true).unwrap();
            waiting.connect(&nobody.into()).unwrap_err();
            let udp = UdpSocket::bind(address).unwrap();
            let (unix, _other) = UnixStream::pair().unwrap();

            let said = verdicts(&[
                listener.as_fd(),
                open.as_fd(),
                fresh.as_fd(),
                bound.as_fd(),
                refused.as_fd(),
                waiting.as_fd(),
                udp.as_fd(),
                unix.as_fd(),
                dead.as_fd(),
                finished.as_fd(),
            ]);
            let never = Some(Verdict::NeverConnected);
            assert_eq!(said[..3], [None, None, never]);
            assert_eq!(said[3..8], [never, never, never, None, None]);
            for verdict in &said[8..] {
                let Some(Verdict::Dead(socket)) = verdict else {
                    panic!("{address}: {verdict:?}");
                };
                assert_eq!(socket.local, Some(local), "{address}");
                assert!(socket.quiet < Duration::from_secs(60), "{socket:?}");
            }
            let cookie = sockopt::socket_cookie(dead.as_fd()).unwrap();
            assert!(matches!(said[8], Some(Verdict::Dead(d)) if d.cookie == Cookie(cookie)));
        }
    }

    #[test]
    fn a_live_socket_in_no_known_table_is_not_dead() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let inode = u32::try_from(fstat(&listener).unwrap().st_ino).unwrap();
        let proc = ProcFs::default();
        let own = i32::try_from(std::process::id()).unwrap();
        let scan = find(&proc, &|process| process.id.pid == own, &HashSet::new()).unwrap();
        let mut suspects = scan.tables.iter().flat_map(|table| &table.suspects);
        assert!(!suspects.any(|suspect| suspect.inode == inode));
    }

    #[test]
    fn a_short_tcp_info_says_nothing() {
        assert_eq!(parse_info(&[7; TCPI_DELIVERED + 3]), None);
        let mut info = [0; TCPI_DELIVERED + 4];
        info[0] = 7;
        info[TCPI_LAST_ACK_RECV..][..4].copy_from_slice(&1500_u32.to_ne_bytes());
        info[TCPI_SEGS_IN..][..4].copy_from_slice(&3_u32.to_ne_bytes());
        let quiet = Duration::from_millis(1500);
        assert_eq!(parse_info(&info), Some((TcpState::Close, false, quiet)));
        info[TCPI_RCV_SPACE] = 1;
        // Taken back after it was a connection, and refused.
        assert_eq!(parse_info(&info), Some((TcpState::Close, false, quiet)));
        info[TCPI_DELIVERED] = 1;
        assert_eq!(parse_info(&info), Some((TcpState::Close, true, quiet)));
    }
}
