//! Frees the slots that dead connections take in a backlog, so that new clients get in.
//!
//! Only accept(2) frees a slot. cwkill accepts through a duplicate of the listening socket and closes what it gets. A live
//! connection that was accepted cannot be put back, so this must never take one:
//! - The kernel appends new connections at the end of the queue, and accept(2) takes the first
//!   (net/ipv4/inet_connection_sock.c, inet_csk_reqsk_queue_add; include/net/request_sock.h, reqsk_queue_remove). So if N
//!   connections wait and all are dead, the first N that are accepted are dead, whatever arrives meanwhile.
//! - All owners are stopped meanwhile. So no other process takes dead ones away, which would bring later connections to the front.
//! - All N are dead if no connection in the kernel's tables may wait at the listening socket: one without an inode, with its
//!   address, in its cgroup. The kernel counts N itself (TCP_INFO of the listening socket).
//! - Before each accept(2) the count must not be lower than expected. Lower means that a process that cwkill does not see accepts
//!   too.
//!
//! cwkill leaves the file status flags of the listening socket alone, because the owner shares them. Without O_NONBLOCK accept(2)
//! waits while the queue is empty:
//! - If the owner has just been told that a connection waits, its accept(2) would wait for the next client. So cwkill leaves it the
//!   last dead connection, unless that one alone fills the backlog.
//! - If another process empties the queue, the accept(2) of cwkill would wait. An `Interrupter` ends it.

use std::collections::HashSet;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use rustix::net::{SocketFlags, accept_with, ipproto, sockopt};
use socket2::SockRef;

use crate::control::Control;
use crate::filter::selectors::Selectors;
use crate::filter::{End, Expression, bytecode};
use crate::finder::listeners::Listeners;
use crate::finder::owners;
use crate::injector::duplicate::Duplicator;
use crate::model::{Backlog, DrainReason, DrainResult, Listener, ListeningSocket, Scan, Target};
use crate::proc::netns::Netns;
use crate::proc::{Inodes, ProcFs, Process};
use crate::reclaim::{Held, while_stopped};
use crate::sock_diag::{
    Cookie, Detail, DiagId, DumpError, DumpRequest, Family, LookupError, Protocol, SockDiag,
    SocketMessage,
};
use crate::sys::interrupter::Interrupter;
use crate::sys::{Duplicate, errno_of};
use crate::tcp::{StateSet, TcpState, info};

/// Pauses between two looks. A healthy owner accepts a connection within this time.
const PAUSES_BETWEEN_LOOKS: [Duration; 3] = [
    Duration::from_millis(1),
    Duration::from_millis(2),
    Duration::from_millis(5),
];
/// The time after which a call of accept(2) that waits is ended.
const ACCEPT_LIMIT: Duration = Duration::from_millis(1);

/// Finds the selected backlogs in which dead connections wait, or will wait when the planned targets of `scan` are closed. Writes
/// a result only if there is a reason not to drain it.
///
/// # Errors
/// The listeners cannot be listed, or the processes.
pub fn find(scan: &Scan, selectors: &Selectors, proc: &ProcFs) -> io::Result<Vec<Backlog>> {
    let matched: Inodes = scan.listeners.iter().flat_map(Listener::inodes).collect();
    let planned = |target: &&Target| target.listener.is_some() && target.plan.skip.is_none();
    let planned = scan.targets.iter().filter(planned);
    let planned: HashSet<Cookie> = planned.map(|target| target.socket.cookie()).collect();
    let mut backlogs = Vec::new();
    for (index, netns) in scan.namespaces.iter().enumerate() {
        let is_selected = |listener: &Listener| {
            listener.inodes().any(|inode| matched.contains(&inode))
                || selectors.could_match_backlog(listener.local, listener.uid)
        };
        let found = netns.within(|| find_in(index, &is_selected, &planned))?;
        backlogs.extend(found.map_err(io::Error::other)?);
    }
    let inodes: Inodes = backlogs
        .iter()
        .map(|backlog| backlog.socket.inode)
        .collect();
    let owners = owners::find(proc, &inodes)?;
    for backlog in &mut backlogs {
        backlog.owners = owners.of(backlog.socket.inode).collect();
    }
    if selectors.selects_owners() {
        backlogs.retain(|backlog| {
            let mut owners = backlog.owners.iter();
            owners.any(|owner| selectors.match_owner(&owner.process))
        });
    }
    Ok(backlogs)
}

/// Finds the backlogs in the network namespace of the calling thread.
fn find_in(
    netns: usize,
    is_selected: &(dyn Fn(&Listener) -> bool + Sync),
    planned: &HashSet<Cookie>,
) -> Result<Vec<Backlog>, DumpError> {
    let mut diag = SockDiag::open()?;
    let mut listeners = Listeners::read(&mut diag)?.waiting();
    listeners.retain(is_selected);
    if listeners.is_empty() {
        return Ok(Vec::new());
    }
    let addresses: Vec<SocketAddr> = listeners.iter().map(|listener| listener.local).collect();
    let backlog = |listener: Listener| {
        let socket = listener.sockets.into_iter().next()?;
        Some(Backlog {
            netns,
            local: listener.local,
            waiting_before: socket.waiting,
            dead: socket.waiting,
            socket,
            group_size: listener.group_size,
            owners: Vec::new(),
            result: None,
        })
    };
    let mut backlogs: Vec<Backlog> = listeners.into_iter().filter_map(backlog).collect();
    // A connection that is accepted between the two lists would seem dead in one look.
    for pause in PAUSES_BETWEEN_LOOKS {
        let mut live = waiting_rows(&mut diag, &addresses)?;
        live.retain(|row| !planned.contains(&row.id.cookie()));
        let waiting = Listeners::read(&mut diag)?.waiting_by_inode();
        for backlog in &mut backlogs {
            let waiting = waiting.get(&backlog.socket.inode).copied().unwrap_or(0);
            let may_wait = live.iter().filter(|row| may_wait_at(row, &backlog.socket));
            let live = u32::try_from(may_wait.count()).unwrap_or(u32::MAX);
            backlog.dead = backlog.dead.min(waiting.saturating_sub(live));
            backlog.result = (live > 0).then(|| DrainResult {
                reason: Some(DrainReason::LiveConnection(live)),
                ..DrainResult::default()
            });
        }
        backlogs.retain(|backlog| backlog.dead > 0);
        if backlogs.is_empty() {
            break;
        }
        thread::sleep(pause);
    }
    Ok(backlogs)
}

/// The connections at the ports of `addresses` that may wait for accept(2): without an inode, and not closed by an owner. A
/// connection whose handshake is not finished waits only with TCP Fast Open; then it is a socket of its own, and the kernel sends
/// its TCP_INFO.
fn waiting_rows(
    diag: &mut SockDiag,
    addresses: &[SocketAddr],
) -> Result<Vec<SocketMessage>, DumpError> {
    let ports: HashSet<u16> = addresses.iter().map(SocketAddr::port).collect();
    let port = |port: &u16| Expression::Port(End::Local, *port..=*port);
    let expression = Expression::Any(ports.iter().map(port).collect());
    let states = [
        TcpState::Established,
        TcpState::CloseWait,
        TcpState::SynRecv,
    ];
    let states = StateSet::from_iter(states);
    let bytecode = bytecode::bytecode(&expression, states);
    let keep = |message: SocketMessage| {
        let waits = message.inode == 0
            && ports.contains(&message.id.tuple().local.port())
            && (message.state != TcpState::SynRecv || message.quiet.is_some());
        waits.then_some(message)
    };
    let mut rows = Vec::new();
    for family in Family::ALL {
        let request = DumpRequest {
            protocol: Protocol::Tcp,
            family,
            states,
            info: true,
            bytecode: &bytecode,
        };
        rows.extend(diag.dump(&request, keep)?);
    }
    Ok(rows)
}

/// Whether a connection of [`waiting_rows`] may wait at `socket`.
fn may_wait_at(row: &SocketMessage, socket: &ListeningSocket) -> bool {
    let (local, listener) = (row.id.tuple().local, socket.id.tuple().local);
    local.port() == listener.port()
        // A connection has the family of its listening socket, and its cgroup.
        && row.id.family() == socket.id.family()
        && (listener.ip().is_unspecified() || listener.ip() == local.ip())
        && (row.cgroup.is_none() || socket.cgroup.is_none() || row.cgroup == socket.cgroup)
}

/// Drains each of `backlogs`, and writes its result. The owners are stopped for at most `stop_limit`.
pub fn drain(
    backlogs: &mut [Backlog],
    namespaces: &[Arc<Netns>],
    stop_limit: Duration,
    proc: &ProcFs,
    control: &dyn Control,
) {
    for backlog in backlogs {
        let mut result = DrainResult::default();
        let drained = match control.interrupted() {
            true => Err(DrainReason::Interrupted),
            false => namespaces[backlog.netns]
                .within(|| drain_one(backlog, &mut result, stop_limit, proc))
                .unwrap_or_else(|error| Err(failed("entering the network namespace", &error))),
        };
        result.reason = drained.err();
        backlog.result = Some(result);
    }
}

fn failed(step: &'static str, error: &io::Error) -> DrainReason {
    DrainReason::SystemCall(step, errno_of(error))
}

fn drain_one(
    backlog: &mut Backlog,
    result: &mut DrainResult,
    stop_limit: Duration,
    proc: &ProcFs,
) -> Result<(), DrainReason> {
    let inode = backlog.socket.inode;
    let cannot_list = |error: io::Error| failed("listing the processes", &error);
    // A process that is created after this list is not in it, so it is checked while the owners are stopped.
    let pids: HashSet<i32> = proc.pids().map_err(cannot_list)?.into_iter().collect();
    let owners = owners::find(proc, &Inodes::from_iter([inode])).map_err(cannot_list)?;
    backlog.owners = owners.of(inode).collect();
    if backlog.owners.is_empty() {
        return Err(DrainReason::NoOwner);
    }
    let cookie = backlog.socket.id.cookie();
    let listener = Duplicator::new(proc.clone())
        .of_owners(&backlog.owners, cookie)
        .map_err(DrainReason::NoDuplicate)?;
    let is_tcp = sockopt::socket_protocol(&listener) == Ok(Some(ipproto::TCP));
    if !is_tcp || state_and_waiting(listener.as_fd())?.0 != TcpState::Listen {
        return Err(DrainReason::NotTcp);
    }
    let diag = SockDiag::open().map_err(|error| failed("opening a netlink socket", &error))?;
    let flags = rustix::fs::fcntl_getfl(&listener).unwrap_or(rustix::fs::OFlags::empty());
    let mut queue = Queue {
        listener: listener.as_fd(),
        socket: &backlog.socket,
        leave: u32::from(
            !flags.contains(rustix::fs::OFlags::NONBLOCK) && backlog.socket.backlog > 0,
        ),
        diag,
    };
    // If a live connection waits, the owners need not be stopped.
    let leave = queue.leave;
    let drained = match queue.dead(&|| false) {
        Ok(dead) if dead <= leave => Ok(()),
        Err(reason) => Err(reason),
        Ok(_) => {
            let mut processes: Vec<Arc<Process>> = backlog
                .owners
                .iter()
                .map(|owner| Arc::clone(&owner.process))
                .collect();
            processes.sort_by_key(|process| process.id);
            processes.dedup_by_key(|process| process.id);
            let (stop_time, done) = while_stopped(&processes, stop_limit, proc, |held| {
                let mut drained = 0;
                let result =
                    no_new_owner(&pids, inode, proc).and_then(|()| queue.drain(held, &mut drained));
                (drained, result)
            });
            result.stop_time = stop_time;
            match done {
                Ok((drained, done)) => {
                    result.drained = drained;
                    done
                }
                Err(not_held) => Err(DrainReason::OwnerNotStopped(
                    not_held.process.to_string(),
                    not_held.reason,
                )),
            }
        }
    };
    // What was done is reported even if this fails.
    if let Ok((_, waiting)) = state_and_waiting(listener.as_fd()) {
        backlog.socket.waiting = waiting;
        result.left_one = drained.is_ok() && leave > 0 && waiting > 0;
    }
    drained
}

/// Fails if a process that is not in `pids` has a descriptor of the listening socket.
fn no_new_owner(pids: &HashSet<i32>, inode: u32, proc: &ProcFs) -> Result<(), DrainReason> {
    let now = proc.pids();
    let now = now.map_err(|error| failed("listing the processes", &error))?;
    for pid in now.into_iter().filter(|pid| !pids.contains(pid)) {
        match owners::owns(proc, pid, inode) {
            Ok(false) => {}
            Ok(true) => return Err(DrainReason::NewOwner),
            Err(error) => return Err(failed("reading a process", &error)),
        }
    }
    Ok(())
}

/// The connections that wait at a listening socket.
struct Queue<'a> {
    /// A duplicate of the listening socket.
    listener: BorrowedFd<'a>,
    socket: &'a ListeningSocket,
    /// The number of dead connections to leave in it.
    leave: u32,
    diag: SockDiag,
}

impl Queue<'_> {
    /// The number of connections that wait, if all of them are dead.
    ///
    /// # Errors
    /// A connection that may wait there is not dead.
    fn dead(&mut self, is_over: &dyn Fn() -> bool) -> Result<u32, DrainReason> {
        // Before the lists: a connection that waits now is in them, or it is dead.
        let (_, waiting) = state_and_waiting(self.listener)?;
        let listed = |error: DumpError| match error {
            DumpError::Io(error) => failed("listing the sockets", &error),
            DumpError::Malformed(_) => {
                DrainReason::SystemCall("listing the sockets", Errno::EBADMSG)
            }
            // They change too fast.
            DumpError::Incomplete => DrainReason::SystemCall("listing the sockets", Errno::EAGAIN),
        };
        let mut live: Vec<DiagId> = Vec::new();
        // Twice, because a list can omit a socket while others vanish.
        for _ in 0..2 {
            let rows = waiting_rows(&mut self.diag, &[self.socket.id.tuple().local]);
            let rows = rows.map_err(listed)?.into_iter();
            let rows = rows.filter(|row| may_wait_at(row, self.socket));
            live.extend(rows.map(|row| row.id));
        }
        live.sort_by_key(|id| id.cookie().0);
        live.dedup_by_key(|id| id.cookie());
        // A connection that another member of a group accepts has an inode soon.
        for pause in PAUSES_BETWEEN_LOOKS {
            self.retain_waiting(&mut live)?;
            if live.is_empty() || is_over() {
                break;
            }
            thread::sleep(pause);
        }
        match u32::try_from(live.len()) {
            Ok(0) => Ok(waiting),
            live => Err(DrainReason::LiveConnection(live.unwrap_or(u32::MAX))),
        }
    }

    /// Keeps the connections that still wait for accept(2).
    fn retain_waiting(&mut self, live: &mut Vec<DiagId>) -> Result<(), DrainReason> {
        let lookup = "looking up a connection";
        let now = self.diag.lookup(live, Detail::Basic);
        let mut now = now.map_err(|error| failed(lookup, &error))?.into_iter();
        live.retain(|_| match now.next() {
            Some(Ok(message)) => message.inode == 0,
            Some(Err(LookupError::NotFound)) => false,
            Some(Err(_)) | None => true,
        });
        Ok(())
    }

    /// Accepts and closes the dead connections, while all owners are stopped. Counts them in `drained`.
    fn drain(&mut self, held: &Held, drained: &mut u32) -> Result<(), DrainReason> {
        let is_over = || held.is_over();
        let dead = self.dead(&is_over)?;
        let to_take = dead.saturating_sub(self.leave);
        let interrupter = Interrupter::start(ACCEPT_LIMIT);
        let _interrupter = interrupter.map_err(|error| failed("starting a timer", &error))?;
        while *drained < to_take {
            if held.is_over() {
                return Err(DrainReason::StopLimitReached);
            }
            let (_, waiting) = state_and_waiting(self.listener)?;
            if waiting < dead - *drained {
                return Err(DrainReason::AcceptedElsewhere);
            }
            let accepted = accept_with(self.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK);
            let accepted = match accepted {
                // It has the SO_LINGER of the listening socket.
                Ok(accepted) => Duplicate::from(accepted),
                // It would have waited, so another process has taken those that waited.
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {
                    return Err(DrainReason::AcceptedElsewhere);
                }
                Err(errno) => {
                    let errno = Errno::from_raw(errno.raw_os_error());
                    return Err(DrainReason::SystemCall("accept", errno));
                }
            };
            let (state, _) = state_and_waiting(accepted.as_fd())?;
            if state != TcpState::Close {
                let peer = SockRef::from(&accepted.as_fd()).peer_addr().ok();
                let peer = peer.and_then(|peer| peer.as_socket());
                let peer = peer.map_or("unknown peer".to_owned(), |peer| peer.to_string());
                return Err(DrainReason::LostLiveConnection(peer));
            }
            *drained += 1;
        }
        Ok(())
    }
}

/// The state of a TCP socket, and the number of connections that wait for accept(2) if it listens.
fn state_and_waiting(socket: BorrowedFd<'_>) -> Result<(TcpState, u32), DrainReason> {
    let mut buffer = [0; 512];
    let info = info::read(socket, &mut buffer);
    let info = info.map_err(|error| failed("getsockopt TCP_INFO", &error))?;
    match (info.state(), info.unacked()) {
        (Some(state), Some(waiting)) => Ok((state, waiting)),
        _ => Err(DrainReason::SystemCall(
            "getsockopt TCP_INFO",
            Errno::EBADMSG,
        )),
    }
}
