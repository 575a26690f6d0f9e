//! Dead descriptors: open descriptors of TCP and MPTCP sockets whose connection is over.
//!
//! The kernel no longer lists these sockets among the connections, so `ss` does not show them. Each costs its process a descriptor until the
//! process closes it. cwkill searches /proc/PID/fd for sockets whose inode is not among the listed TCP sockets
//! ([`listed_inodes`]). That alone proves little: UNIX and UDP sockets are not among them either. The same holds for a
//! TCP socket that was never connected, and for one in a network namespace that was not scanned. So cwkill also reads:
//!
//! 1. the protocol, from the attribute `system.sockprotoname` of the descriptor (net/socket.c, sockfs_xattr_get). This
//!    needs the same right as reading the link. The name may be TCP or MPTCP;
//! 2. the protocol itself from SO_PROTOCOL, and the state, through a duplicate (pidfd_getfd(2)): that of TCP from
//!    TCP_INFO, that of MPTCP as in `mptcp_socket`. This needs the right to attach to the process. Without that right the
//!    descriptor is [`SuspectVerdict::Unknown`], never dead.
//!
//! If a socket was connected, the peer has acknowledged its SYN or SYN-ACK, and `tcpi_delivered` is not 0
//! (net/ipv4/tcp_input.c, tcp_rcv_state_process and tcp_clean_rtx_queue). After a refused connect(2) it is 0. It is 0 again
//! after connect(2) with AF_UNSPEC, which dissolves the connection (net/ipv4/tcp.c, tcp_disconnect, since Linux 5.6).
//! Two other fields must not be 0 either: the receive space and the number of received segments. They would not be enough
//! alone. tcp_disconnect keeps the receive space, and a refusal counts as a received segment. So a socket that was
//! dissolved, then refused, and that its program is about to connect again would seem dead. [measured on Linux 6.18]

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::fstat;
use rayon::prelude::*;
use rustix::fs::getxattr;
use rustix::io::{Errno as Rustix, ioctl_fionread};
use rustix::net::sockopt;
use socket2::SockRef;

use super::connection_end::ConnectionEnd;
use super::{FindError, mptcp_socket, threads};
use crate::proc::netns::Netns;
use crate::proc::{
    Inodes, ProcFs, Process, ProcessId, RemoteFd, Unreadable, fds, identity, is_denied, is_missing,
    open_in, read_between_execs,
};
use crate::sock_diag::{Cookie, DumpRequest, Family, Protocol, SockDiag};
use crate::sys::{self, errno_of};
use crate::tcp::{StateSet, TcpState};

/// The descriptor table of one process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DescriptorTable {
    pub process: Process,
    /// The number of its taken descriptor numbers: see `fds::count_used`.
    pub used: usize,
    /// Its descriptors of TCP sockets that the kernel does not list, by number. Those of the tables of single threads follow.
    pub suspects: Vec<Suspect>,
    /// The inodes of its other TCP sockets: those that the kernel lists, with listeners, and those that are alive and not in the list.
    /// A socket with two descriptors is there twice.
    pub connections: Vec<u32>,
}

/// A descriptor of a TCP or MPTCP socket that the kernel does not list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Suspect {
    pub fd: RemoteFd,
    /// The thread whose own table has it; `None` for the table of the process.
    pub tid: Option<i32>,
    pub inode: u32,
    pub verdict: SuspectVerdict,
}

/// The classification of a descriptor whose socket the kernel does not list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SuspectVerdict {
    /// The connection is over, state CLOSE. The process can still read the bytes that have arrived, but no more will come.
    Dead(DeadSocket),
    /// State CLOSE, and not connected since it was created or dissolved: fresh, bound, or after a failed connect(2). The
    /// process may still connect it.
    NeverConnected,
    /// cwkill cannot duplicate the descriptor, for this reason. The socket may be any of the above, or alive in a network
    /// namespace that was not scanned.
    Unknown(Errno),
}

/// The kernel's remaining data about a dead socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeadSocket {
    pub protocol: Protocol,
    pub cookie: Cookie,
    /// Its local address; an IPv4-mapped one as IPv4. The kernel no longer gives the peer's address (inet_getname).
    pub local: Option<SocketAddr>,
    /// Time since the last acceptable segment of the peer. The connection ended later, so the socket has been dead for at
    /// most this time.
    pub quiet: Duration,
    /// Bytes that the program has not read. It still can: the kernel keeps them until the last descriptor is closed
    /// (net/ipv4/tcp.c, tcp_done; net/ipv4/af_inet.c, inet_sock_destruct).
    pub unread: u32,
    /// TLS in the kernel is on. It keeps the rest of a record that the program has read in part, and nothing counts these bytes
    /// (net/tls/tls_sw.c, process_rx_list).
    pub kernel_tls: bool,
}

/// The result of [`find`].
#[derive(Debug, Default)]
pub struct DeadScan {
    /// The descriptor tables of the selected processes, by pid, with or without suspects.
    pub tables: Vec<DescriptorTable>,
    /// Processes whose descriptors cwkill is not permitted to read.
    pub unreadable: Vec<Unreadable>,
    /// Processes whose first thread has exited while others still run. The kernel shows an empty table for them.
    pub leader_exited: Vec<Process>,
    /// Processes whose files could not be read for another reason than their end or a missing right.
    pub failed: Vec<(i32, io::Error)>,
    /// /proc does not list the processes of other users: it is mounted with hidepid.
    pub hidden: bool,
}

/// The inodes of all TCP sockets that the kernel lists in `namespaces`.
///
/// # Errors
/// A namespace cannot be entered, or its sockets cannot be listed.
pub fn listed_inodes(namespaces: &[Arc<Netns>]) -> Result<Inodes, FindError> {
    let mut inodes = Inodes::default();
    for netns in namespaces {
        inodes.extend(listed_inodes_in(netns, StateSet::ALL)?);
    }
    Ok(inodes)
}

/// As [`listed_inodes`], of the sockets in one of `states` in one namespace.
pub(super) fn listed_inodes_in(netns: &Netns, states: StateSet) -> Result<Vec<u32>, FindError> {
    let dumped = netns.within(|| dump_inodes(states));
    dumped.map_err(FindError::Enter)?
}

fn dump_inodes(states: StateSet) -> Result<Vec<u32>, FindError> {
    let mut diag = SockDiag::open().map_err(FindError::Open)?;
    let mut inodes = Vec::new();
    // An entry in TIME-WAIT has no inode. The kernel's list of bound sockets in CLOSE (Linux 6.8) contains dead sockets too, so
    // it is left out.
    let states = states.without(TcpState::TimeWait.into());
    for family in Family::ALL {
        let request = DumpRequest::plain(family, states);
        inodes.extend(diag.dump(&request, |message| {
            (message.inode != 0).then_some(message.inode)
        })?);
    }
    Ok(inodes)
}

/// Reads the descriptor table of every `selected` process, and finds the sockets that are not in `listed`.
///
/// A process or descriptor that vanishes meanwhile is ignored. A connection that is made after `listed` was read is
/// not in state CLOSE, so it is not taken for a dead socket.
///
/// # Errors
/// The processes cannot be listed.
pub fn find(
    proc: &ProcFs,
    selected: &(dyn Fn(&Process) -> bool + Sync),
    listed: &Inodes,
) -> io::Result<DeadScan> {
    let same_pids = proc.shows_own_pid_namespace();
    let pids = proc.pids()?;
    let mut scan = DeadScan {
        // Process 1 lives as long as its pid namespace, so only hidepid can hide it.
        hidden: pids.first() != Some(&1),
        ..DeadScan::default()
    };
    let scan_one = |pid: i32| (pid, scan_process(proc, pid, same_pids, selected, listed));
    // cwkill comes first: while it scans the others, it has duplicates of their sockets.
    let own_pid = i32::try_from(std::process::id()).ok();
    let (own, others): (Vec<i32>, Vec<i32>) = pids
        .into_iter()
        .partition(|&pid| same_pids && Some(pid) == own_pid);
    let mut results: Vec<_> = own.into_iter().map(scan_one).collect();
    results.par_extend(others.into_par_iter().map(scan_one));
    results.sort_by_key(|(pid, _)| *pid);
    for (pid, result) in results {
        match result {
            Ok(TableScan::DescriptorTable(table)) => scan.tables.push(table),
            Ok(TableScan::LeaderExited(process)) => scan.leader_exited.push(process),
            Ok(TableScan::None) => {}
            Err(error) if is_missing(&error) => {}
            Err(error) if is_denied(&error) => scan.unreadable.extend(proc.unreadable(pid)),
            Err(error) => scan.failed.push((pid, error)),
        }
    }
    Ok(scan)
}

/// Reads the descriptor tables of these processes alone. A table that cannot be read is missing.
pub(super) fn tables(
    proc: &ProcFs,
    processes: &[ProcessId],
    listed: &Inodes,
) -> Vec<DescriptorTable> {
    let same_pids = proc.shows_own_pid_namespace();
    let scan_one = |id: &ProcessId| {
        let is_it = |process: &Process| process.id == *id;
        match scan_process(proc, id.pid, same_pids, &is_it, listed) {
            Ok(TableScan::DescriptorTable(table)) => Some(table),
            Ok(TableScan::None | TableScan::LeaderExited(_)) | Err(_) => None,
        }
    };
    processes.par_iter().filter_map(scan_one).collect()
}

/// The result for one process.
enum TableScan {
    /// It is not selected, or gone.
    None,
    DescriptorTable(DescriptorTable),
    LeaderExited(Process),
}

fn scan_process(
    proc: &ProcFs,
    pid: i32,
    same_pids: bool,
    selected: &(dyn Fn(&Process) -> bool + Sync),
    listed: &Inodes,
) -> io::Result<TableScan> {
    // This directory keeps referring to the same process, even if another process gets the pid.
    let dir = File::open(proc.path(&pid.to_string()))?;
    let process = identity(proc, dir.as_fd(), pid)?;
    if !selected(&process) {
        return Ok(TableScan::None);
    }
    let read = || scan_tables(proc, dir.as_fd(), &process, same_pids, listed);
    let Some(scanned) = read_between_execs(dir.as_fd(), read)? else {
        return Ok(TableScan::LeaderExited(process));
    };
    // The attribute was read through the pid, which another process may have by now.
    if !scanned.suspects.is_empty() && !proc.is_alive(process.id) {
        return Ok(TableScan::None);
    }
    let process = match scanned.suspects.is_empty() {
        true => process,
        false => proc.to_show(process),
    };
    Ok(TableScan::DescriptorTable(DescriptorTable {
        process,
        used: scanned.used,
        suspects: scanned.suspects,
        connections: scanned.connections,
    }))
}

/// What one table has: see [`DescriptorTable`].
#[derive(Default)]
struct ScannedTable {
    suspects: Vec<Suspect>,
    used: usize,
    connections: Vec<u32>,
}

/// The table of the process, with those that only single threads have.
fn scan_tables(
    proc: &ProcFs,
    dir: BorrowedFd<'_>,
    process: &Process,
    same_pids: bool,
    listed: &Inodes,
) -> io::Result<ScannedTable> {
    let mut scanned = scan_table(proc, dir, process, None, same_pids, listed)?;
    if same_pids {
        for of_thread in scan_thread_tables(proc, dir, process, listed)? {
            scanned.suspects.extend(of_thread.suspects);
            scanned.connections.extend(of_thread.connections);
        }
    }
    Ok(scanned)
}

/// The tables that only single threads have.
fn scan_thread_tables(
    proc: &ProcFs,
    dir: BorrowedFd<'_>,
    process: &Process,
    listed: &Inodes,
) -> io::Result<Vec<ScannedTable>> {
    let mut tables = Vec::new();
    for tid in threads::own_tables(process.id.pid, &proc.tids(process.id.pid)?) {
        match scan_table(proc, dir, process, Some(tid), true, listed) {
            Ok(found) => tables.push(found),
            // The thread has ended.
            Err(error) if is_missing(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(tables)
}

/// The table of a process or of its thread `tid`.
fn scan_table(
    proc: &ProcFs,
    dir: BorrowedFd<'_>,
    process: &Process,
    tid: Option<i32>,
    same_pids: bool,
    listed: &Inodes,
) -> io::Result<ScannedTable> {
    let name = match tid {
        Some(tid) => format!("task/{tid}/fd"),
        None => "fd".to_owned(),
    };
    let fds = open_in(dir, &CString::new(name.as_str())?, OFlag::O_DIRECTORY)?;
    let numbers = fds::list_fds(fds.as_fd())?;
    let chunks: Vec<SplitByList> = numbers
        .par_chunks(fds::FDS_PER_TASK)
        .map(|numbers| split_by_list(fds.as_fd(), numbers, listed))
        .collect::<io::Result<Vec<_>>>()?;
    let (not_in_table, connections): (Vec<_>, Vec<_>) = chunks.into_iter().unzip();
    let (not_in_table, mut connections) = (not_in_table.concat(), connections.concat());
    let used = fds::count_used_beside(fds.as_fd(), numbers.len())?;
    if not_in_table.is_empty() {
        return Ok(ScannedTable {
            used,
            connections,
            ..ScannedTable::default()
        });
    }
    let (suspects, alive) = classify(proc, process.id, tid, same_pids, &not_in_table)?;
    connections.extend(alive);
    Ok(ScannedTable {
        suspects,
        used,
        connections,
    })
}

/// The suspects among descriptors of sockets that the kernel does not list, by number, and the inodes of the TCP sockets among them that are
/// alive. The descriptors are in the table of the process, or of its thread `tid`. `same_pids`: whether the pids of `proc` are those of system
/// calls.
///
/// # Errors
/// A file of the process cannot be read, as after its end.
pub(super) fn classify(
    proc: &ProcFs,
    id: ProcessId,
    tid: Option<i32>,
    same_pids: bool,
    descriptors: &[(RemoteFd, u32)],
) -> io::Result<(Vec<Suspect>, Vec<u32>)> {
    let directory = match tid {
        Some(tid) => format!("{}/task/{tid}/fd", id.pid),
        None => format!("{}/fd", id.pid),
    };
    let pidfd = match (same_pids, tid) {
        (true, Some(tid)) => proc.open_pidfd_of_thread(id, tid),
        (true, None) => proc.open_pidfd(id),
        (false, _) => Err(Errno::ESRCH),
    };
    let suspect = |&(fd, inode): &(RemoteFd, u32)| {
        if !may_be_tcp(&proc.path(&format!("{directory}/{}", fd.0)))? {
            return Ok(NotInTable::Other);
        }
        let verdict = match &pidfd {
            Ok(pidfd) => examine(pidfd.as_fd(), fd, inode),
            Err(errno) => Some(SuspectVerdict::Unknown(*errno)),
        };
        Ok(match verdict {
            Some(verdict) => NotInTable::Suspect(Suspect {
                fd,
                tid,
                inode,
                verdict,
            }),
            None => NotInTable::Alive(inode),
        })
    };
    let found: Vec<NotInTable> = descriptors
        .par_iter()
        .with_min_len(fds::FDS_PER_TASK)
        .map(suspect)
        .collect::<io::Result<_>>()?;
    let (mut suspects, mut alive) = (Vec::new(), Vec::new());
    for socket in found {
        match socket {
            NotInTable::Suspect(suspect) => suspects.push(suspect),
            NotInTable::Alive(inode) => alive.push(inode),
            NotInTable::Other => {}
        }
    }
    suspects.sort_unstable_by_key(|suspect| suspect.fd);
    Ok((suspects, alive))
}

/// A descriptor of a socket that the kernel does not list among those of TCP.
enum NotInTable {
    Suspect(Suspect),
    /// A TCP or MPTCP socket that is alive, as one that was connected after the list was made; or a descriptor that is closed by now.
    Alive(u32),
    /// Not of TCP.
    Other,
}

/// The sockets that are not in a list of inodes, and the inodes of those that are.
type SplitByList = (Vec<(RemoteFd, u32)>, Vec<u32>);

/// The sockets among the descriptors `numbers` in the directory `fds`: those whose inode is not in `listed`, and the inodes of the others.
fn split_by_list(fds: BorrowedFd<'_>, numbers: &[i32], listed: &Inodes) -> io::Result<SplitByList> {
    let (mut not_in_table, mut connections) = (Vec::new(), Vec::new());
    for &number in numbers {
        match fds::read_socket_link(fds, number) {
            Ok(Some(inode)) if !listed.contains(&inode) => {
                not_in_table.push((RemoteFd(number), inode));
            }
            Ok(Some(inode)) => connections.push(inode),
            Ok(None) => {}
            // It was closed after the directory was read.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(error) => return Err(error),
        }
    }
    Ok((not_in_table, connections))
}

/// Whether the kernel names TCP or MPTCP as the protocol of the socket of the descriptor at `path`. A TCP socket that an MPTCP
/// listener has accepted has the name of MPTCP too.
pub(super) fn may_be_tcp(path: &Path) -> io::Result<bool> {
    let mut name = [0; 32];
    match getxattr(path, c"system.sockprotoname", &mut name[..]) {
        Ok(length) => Ok(matches!(
            &name[..length],
            b"TCP\0" | b"TCPv6\0" | b"MPTCP\0" | b"MPTCPv6\0"
        )),
        // It was closed meanwhile, or is another file by now.
        Err(Rustix::NOENT | Rustix::OPNOTSUPP | Rustix::NODATA | Rustix::RANGE) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Classifies a descriptor through a duplicate, which is closed at once. `None`: it is another file by now, or the socket
/// is alive.
pub(crate) fn examine(pidfd: BorrowedFd<'_>, fd: RemoteFd, inode: u32) -> Option<SuspectVerdict> {
    let socket = match sys::pidfd_getfd(pidfd, fd) {
        Ok(socket) => socket,
        Err(error) => match errno_of(&error) {
            Errno::EBADF | Errno::ESRCH => return None,
            other => return Some(SuspectVerdict::Unknown(other)),
        },
    };
    if fstat(&socket).map(|stat| stat.st_ino) != Ok(inode.into()) {
        return None;
    }
    read_verdict(socket.as_fd())
        .unwrap_or_else(|error| Some(SuspectVerdict::Unknown(errno_of(&error))))
}

/// Whether the socket is alive, and may be in one of `states`. The state of an MPTCP socket that is alive is unknown.
pub(super) fn may_be_in(socket: BorrowedFd<'_>, states: StateSet) -> io::Result<bool> {
    let info = ConnectionEnd::read(socket)?;
    Ok(match mptcp_socket::protocol(socket)? {
        Protocol::Tcp => info.state != TcpState::Close && states.contains(info.state),
        Protocol::Mptcp => mptcp_socket::state(socket, &info)?.0 != TcpState::Close,
    })
}

fn read_verdict(socket: BorrowedFd<'_>) -> io::Result<Option<SuspectVerdict>> {
    let protocol = mptcp_socket::protocol(socket)?;
    let info = ConnectionEnd::read(socket)?;
    let (state, was_connected, quiet) = match protocol {
        Protocol::Tcp => (info.state, info.was_connected(), info.quiet),
        Protocol::Mptcp => mptcp_socket::state(socket, &info)?,
    };
    Ok(match (state, was_connected) {
        (TcpState::Close, false) => Some(SuspectVerdict::NeverConnected),
        (TcpState::Close, true) => {
            let local = SockRef::from(&socket).local_addr().ok();
            let canonical =
                |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
            let unread = match protocol {
                Protocol::Tcp => u32::try_from(ioctl_fionread(socket)?).unwrap_or(u32::MAX),
                Protocol::Mptcp => mptcp_socket::unread(socket)?,
            };
            Some(SuspectVerdict::Dead(DeadSocket {
                protocol,
                cookie: Cookie(sockopt::socket_cookie(socket)?),
                local: local.and_then(|address| address.as_socket()).map(canonical),
                quiet,
                unread,
                kernel_tls: has_kernel_tls(socket),
            }))
        }
        _ => None,
    })
}

/// Whether TLS in the kernel (TCP_ULP) is on at a TCP socket. Without the option, for example at one of MPTCP, it is not.
fn has_kernel_tls(socket: BorrowedFd<'_>) -> bool {
    // TCP_ULP_NAME_MAX of include/net/tcp.h.
    let mut name = [0; 16];
    sys::socket_option_bytes(socket, libc::IPPROTO_TCP, libc::TCP_ULP, &mut name)
        .is_ok_and(|name| name.starts_with(b"tls\0"))
}

#[cfg(test)]
#[path = "dead_mptcp_tests.rs"]
mod mptcp_tests;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proc::netns::NetnsScope;
    use socket2::{Domain, Socket, Type};
    use std::io::Read;
    use std::net::{Shutdown, TcpListener, TcpStream, UdpSocket};
    use std::os::fd::AsRawFd;
    use std::os::unix::net::UnixStream;

    /// The verdicts on these descriptors of the test process.
    fn verdicts(fds: &[BorrowedFd<'_>]) -> Vec<Option<SuspectVerdict>> {
        let proc = ProcFs::default();
        let current = NetnsScope::Current.open(&proc).unwrap().open;
        let listed = listed_inodes(&current).unwrap();
        let own = i32::try_from(std::process::id()).unwrap();
        let mut scan = find(&proc, &|process| process.id.pid == own, &listed).unwrap();
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

    /// The accepted end of a connection through `listener` that the peer has reset.
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
            // Both sides have closed, the accepted end first, so the kernel keeps its TIME-WAIT without the descriptor.
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
            let no_listener = SocketAddr::new(local.ip(), 1);
            refused.connect(&no_listener.into()).unwrap_err();
            // The kernel has received the refusal, and the program has not read the error.
            let waiting = Socket::new(Domain::for_address(local), Type::STREAM, None).unwrap();
            waiting.set_nonblocking(true).unwrap();
            waiting.connect(&no_listener.into()).unwrap_err();
            let udp = UdpSocket::bind(address).unwrap();
            let (unix, _other) = UnixStream::pair().unwrap();

            let found = verdicts(&[
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
            let never = Some(SuspectVerdict::NeverConnected);
            assert_eq!(found[..3], [None, None, never]);
            assert_eq!(found[3..8], [never, never, never, None, None]);
            for verdict in &found[8..] {
                let Some(SuspectVerdict::Dead(socket)) = verdict else {
                    panic!("{address}: {verdict:?}");
                };
                assert_eq!(socket.local, Some(local), "{address}");
                assert!(socket.quiet < Duration::from_secs(60), "{socket:?}");
            }
            let cookie = sockopt::socket_cookie(dead.as_fd()).unwrap();
            assert!(
                matches!(found[8], Some(SuspectVerdict::Dead(d)) if d.cookie == Cookie(cookie))
            );
        }
    }

    #[test]
    fn a_live_socket_that_was_not_listed_is_not_dead() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let inode = u32::try_from(fstat(&listener).unwrap().st_ino).unwrap();
        let proc = ProcFs::default();
        let own = i32::try_from(std::process::id()).unwrap();
        let scan = find(&proc, &|process| process.id.pid == own, &Inodes::default()).unwrap();
        let mut suspects = scan.tables.iter().flat_map(|table| &table.suspects);
        assert!(!suspects.any(|suspect| suspect.inode == inode));
    }
}
