//! The finder: which sockets are stuck, and whose they are.
//!
//! [`find`] asks the kernel for the sockets ([`sock_diag`]) and /proc for the processes that hold
//! their descriptors ([`owners`]); a connection that was never accepted gets the listener that would
//! accept it ([`listeners`]). What a selector can judge by the socket alone is judged before
//! anything is looked up for it.

pub mod cgroup;
pub mod filter;
pub mod listeners;
pub mod netns;
pub mod owners;
pub mod sock_diag;

use std::collections::HashMap;
use std::io;
use std::time::Duration;

use crate::diagnosis::{self, Cause};
use crate::selectors::Selectors;
use crate::tcp::{StateSet, TcpState, Tuple};

use listeners::{Listener, Listeners};
use owners::{OwnerScan, Proc, Process};
use sock_diag::{Cookie, DiagId, DumpError, DumpRequest, Family, SockDiag, SocketMessage};

pub use crate::sys::TargetFd;

/// A socket that matches, with everything known about it.
#[derive(Clone, Debug)]
pub struct Socket {
    /// Its name to the kernel.
    pub id: DiagId,
    /// Its endpoints, IPv4-mapped addresses written as IPv4.
    pub tuple: Tuple,
    /// Its state at the dump.
    pub state: TcpState,
    /// Unread bytes, the FIN counted as one. See [`SocketMessage::recv_q`].
    pub recv_q: u32,
    /// Bytes written and not acknowledged. See [`SocketMessage::send_q`].
    pub send_q: u32,
    /// User of the socket's inode.
    pub uid: u32,
    /// The cgroup v2 it was made in. See [`SocketMessage::cgroup`].
    pub cgroup: Option<u64>,
    /// Its inode; `None` when no descriptor exists.
    pub inode: Option<u32>,
    /// Lower bound of the time it has been quiet, `None` if the kernel does not say.
    pub age: Option<Duration>,
    /// Why it is stuck.
    pub cause: Cause,
    /// Its owners: process and descriptors, one entry a descriptor. Empty: none is known.
    pub owners: Vec<Held>,
    /// For a socket that was never accepted: the index in [`Found::listeners`] of who would accept it.
    pub listener: Option<usize>,
}

/// A descriptor of a socket in a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Held {
    /// Index in [`Found::processes`].
    pub process: usize,
    /// The number of the descriptor there.
    pub fd: TargetFd,
}

/// What [`find`] found.
#[derive(Debug, Default)]
pub struct Found {
    /// The sockets that match, oldest first.
    pub sockets: Vec<Socket>,
    /// The processes that hold one of them or one of `listeners`.
    pub processes: Vec<Process>,
    /// The listeners of never accepted sockets.
    pub listeners: Vec<Listener>,
    /// Processes whose descriptors could not be read: they may own sockets without a known owner.
    pub unreadable_processes: usize,
}

/// Finds the sockets that `selectors` match in the network namespace of the calling thread.
///
/// # Errors
/// When the kernel gives no list of sockets or /proc none of processes; a process that vanishes or
/// may not be read is no error.
pub fn find(diag: &mut SockDiag, proc: &Proc, selectors: &Selectors) -> Result<Found, FindError> {
    let selectors = &selectors
        .resolved(&filter::ThisNamespace)
        .map_err(FindError::Expression)?;
    let mut sockets = dump(diag, selectors)?;
    let mut listeners = Listeners::default();
    if sockets.iter().any(|s| s.cause.is_with_listener()) {
        listeners = Listeners::read(diag)?;
        for socket in &mut sockets {
            if socket.cause.is_with_listener() {
                socket.listener = listeners.accepting(&socket.id, socket.tuple.local);
            }
        }
    }

    let wanted = sockets
        .iter()
        .filter_map(|socket| socket.inode)
        .chain(listeners.used_inodes());
    let scan = proc.find_owners(wanted)?;
    let OwnerScan {
        processes,
        held,
        unreadable_processes,
    } = scan;
    let mut by_inode: HashMap<u32, Vec<Held>> = HashMap::with_capacity(held.len());
    for (inode, held) in held {
        by_inode.entry(inode).or_default().push(held);
    }
    let listeners = listeners.into_used(|inode| by_inode.get(&inode).cloned().unwrap_or_default());
    for socket in &mut sockets {
        if let Some(inode) = socket.inode {
            socket.owners = by_inode.remove(&inode).unwrap_or_default();
        }
    }

    sockets.retain(|socket| {
        let responsible = match socket.listener {
            Some(listener) => &listeners[listener].owners,
            None => &socket.owners,
        };
        selectors.match_owners(responsible.iter().map(|held| &processes[held.process]))
    });
    sockets.sort_by_key(|socket| (std::cmp::Reverse(socket.age), socket.tuple));
    Ok(Found {
        sockets,
        processes,
        listeners,
        unreadable_processes,
    })
}

/// Lists the sockets that match by what the kernel says of them.
fn dump(diag: &mut SockDiag, selectors: &Selectors) -> Result<Vec<Socket>, DumpError> {
    let bytecode = filter::bytecode(&selectors.as_expression(), selectors.states());
    let mut sockets = Vec::new();
    for family in Family::ALL {
        // An IPv4 connection can be on an AF_INET6 socket, never the other way round.
        if family == Family::V4 && selectors.wants_only_ipv6() {
            continue;
        }
        let mut request = DumpRequest {
            family,
            states: selectors.states(),
            info: true,
            bytecode: &bytecode,
        };
        let mut keep = |message| {
            let socket = Socket::from_message(&message);
            selectors.match_socket(&socket).then_some(socket)
        };
        let dumped = match diag.dump(&request, &mut keep) {
            // An old kernel does not know an operation; the predicate does.
            Err(DumpError::Io(error))
                if error.raw_os_error() == Some(libc::EINVAL) && !bytecode.is_empty() =>
            {
                request.bytecode = &[];
                diag.dump(&request, &mut keep)
            }
            other => other,
        };
        sockets.extend(dumped?);
    }
    Ok(sockets)
}

impl Socket {
    /// What the kernel's message alone says; owners and listener are still to be found.
    pub fn from_message(message: &SocketMessage) -> Socket {
        Socket {
            id: message.id,
            tuple: message.id.tuple(),
            state: message.state,
            recv_q: message.recv_q,
            send_q: message.send_q,
            uid: message.uid,
            cgroup: message.cgroup,
            inode: (message.inode != 0).then_some(message.inode),
            age: diagnosis::age(message),
            cause: diagnosis::cause(message),
            owners: Vec::new(),
            listener: None,
        }
    }

    /// The kernel's identity of the socket.
    pub fn cookie(&self) -> Cookie {
        self.id.cookie()
    }

    /// Whether the connection runs over IPv4, on a socket of either family.
    pub fn is_ipv4(&self) -> bool {
        self.tuple.local.is_ipv4()
    }
}

/// States of sockets that a listener made and nobody accepted yet.
pub(crate) fn listening() -> StateSet {
    StateSet::from(TcpState::Listen)
}

/// Why nothing could be found at all.
#[derive(Debug)]
pub enum FindError {
    /// The expression means nothing in this network namespace.
    Expression(io::Error),
    /// The kernel's socket tables.
    Dump(DumpError),
    /// The list of processes.
    Proc(io::Error),
}

impl std::fmt::Display for FindError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            FindError::Expression(_) => f.write_str("cannot apply the expression"),
            FindError::Dump(_) => f.write_str("cannot list sockets"),
            FindError::Proc(_) => f.write_str("cannot list processes"),
        }
    }
}

impl std::error::Error for FindError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            FindError::Dump(error) => Some(error),
            FindError::Expression(error) | FindError::Proc(error) => Some(error),
        }
    }
}

impl From<DumpError> for FindError {
    fn from(error: DumpError) -> Self {
        FindError::Dump(error)
    }
}

impl From<io::Error> for FindError {
    fn from(error: io::Error) -> Self {
        FindError::Proc(error)
    }
}
