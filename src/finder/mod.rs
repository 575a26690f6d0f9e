//! The finder: which sockets are stuck, and whose they are.
//!
//! [`find`] asks the kernel for the sockets ([`sock_diag`]) and, beside that, /proc for the processes that
//! hold descriptors ([`owners`]); a connection that was never accepted gets the listener that would
//! accept it ([`listeners`]).

pub mod dead;
pub mod listeners;
pub mod owners;
pub(crate) mod sockets;

use std::collections::HashSet;
use std::io;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, ScopedJoinHandle};
use std::time::Duration;

use rayon::slice::ParallelSliceMut;

use crate::filter::selectors::Selectors;
use crate::model::cause::{self, Cause};
use crate::parallel;
use crate::tcp::{TcpState, Tuple};

pub use crate::proc::RemoteFd;
use crate::proc::netns::Netns;
use crate::proc::{ProcFs, Process, Unreadable};
use crate::sock_diag::{Cookie, DiagId, DumpError, SocketMessage};
use listeners::{Listener, Listeners};
use owners::{OwnerScan, Trust};
use sockets::View;

/// How many namespaces are looked into at the same time.
const NAMESPACES_AT_ONCE: usize = 8;

/// A socket that matches, with everything known about it.
#[derive(Clone, Debug)]
pub struct Socket {
    /// Its name to the kernel.
    pub id: DiagId,
    /// Index of its network namespace in the list that was given to [`find`].
    pub netns: usize,
    /// Its endpoints, IPv4-mapped addresses written as IPv4.
    pub tuple: Tuple,
    /// Its state at the dump.
    pub state: TcpState,
    /// Unread bytes, the FIN counted as one. See [`SocketMessage::recv_q`].
    pub recv_q: u32,
    /// Bytes written and not acknowledged. See [`SocketMessage::send_q`].
    pub send_q: u32,
    /// User of the socket's inode; of the listener's, for one that was never accepted.
    pub uid: u32,
    /// The cgroup v2 it was made in. See [`SocketMessage::cgroup`].
    pub cgroup: Option<u64>,
    /// Its inode; `None` when no descriptor exists.
    pub inode: Option<u32>,
    /// Lower bound of the time it has been quiet, `None` if the kernel does not say.
    pub age: Option<Duration>,
    /// Why it is stuck.
    pub cause: Cause,
    /// Its owners: one entry a descriptor, those of a process together, selected ones first. Empty: none
    /// is known.
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
    pub fd: RemoteFd,
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
    /// Whether the owners were looked for.
    pub owners_sought: bool,
    /// Processes whose descriptors could not be read: they may own sockets without a known owner.
    pub unreadable_processes: usize,
    /// Sockets that are not in `sockets` only because their owner could not be read, and might match.
    pub undecided: usize,
    /// /proc does not show the processes of other users (hidepid): they may own anything.
    pub hidden_processes: bool,
    /// Namespaces that could not be looked into.
    pub unreachable_namespaces: usize,
    /// Why the first of them could not.
    pub namespace_failure: Option<String>,
    /// Processes whose namespace could not be told, which may be one that was not looked into.
    pub untold_namespaces: usize,
}

/// Finds the sockets that `selectors` match in each of `namespaces`.
///
/// /proc is read while the kernel lists the sockets, since each takes about as long as the other.
///
/// # Errors
/// When the kernel gives no list of sockets or /proc none of processes; a process that vanishes or
/// may not be read is no error, nor is a namespace among several that cannot be entered.
pub fn find(
    namespaces: &[Netns],
    proc: &ProcFs,
    selectors: &Selectors,
) -> Result<Found, FindError> {
    let needless = AtomicBool::new(false);
    let (seen, scan) = std::thread::scope(|scope| {
        // Where no thread can be started, one comes after the other.
        let scan = parallel::are_there()
            .then(|| Builder::new().spawn_scoped(scope, || proc.scan(&needless)));
        let seen = see(namespaces, selectors, false);
        let wanted = seen.as_ref().is_ok_and(|seen| !seen.wanted.is_empty());
        needless.store(!wanted, Ordering::Relaxed);
        let scan = match scan {
            Some(Ok(scan)) => joined(scan),
            Some(Err(_)) | None => proc.scan(&needless),
        };
        (seen, scan)
    });
    let Seen {
        mut found,
        listeners,
        wanted,
    } = seen?;
    let mut owners = match wanted.is_empty() {
        true => OwnerScan::default(),
        false => {
            let trust = match selectors.selects_owners() {
                true => Trust::Nothing,
                false => Trust::TheScan,
            };
            proc.owners(scan?, &wanted, trust)?
        }
    };
    owners.sort_by_inode();
    // The scan may have passed a process before it got the descriptor of a socket that was listed later.
    if wanted.iter().any(|&inode| owners.of(inode).is_empty()) {
        owners = proc.find_owners(wanted.into_iter())?;
        owners.sort_by_inode();
    }
    found.attach(listeners, &owners);
    found.owners_sought = true;
    found.hidden_processes = owners.hidden;
    found.processes = owners.processes;
    found.unreadable_processes = owners.unreadable.len();
    found.retain_selected(selectors, &owners.unreadable);
    found.sort();
    Ok(found)
}

/// Finds the sockets alone: nobody's owners are looked for, so `selectors` must not ask for any. `many`: there may be so many
/// that two should share the work.
///
/// # Errors
/// As [`find`], but for /proc.
pub fn find_sockets(
    namespaces: &[Netns],
    selectors: &Selectors,
    many: bool,
) -> Result<Found, FindError> {
    let Seen {
        mut found,
        listeners,
        ..
    } = see(namespaces, selectors, many)?;
    found.attach(listeners, &OwnerScan::default());
    found.retain_selected(selectors, &[]);
    found.sort();
    Ok(found)
}

/// What the kernel says in all namespaces.
struct Seen {
    found: Found,
    listeners: Vec<Listeners>,
    /// The inodes of which the owners are asked for.
    wanted: HashSet<u32>,
}

/// Asks the kernel of every namespace. `alone`: nothing else keeps the processors busy.
fn see(namespaces: &[Netns], selectors: &Selectors, alone: bool) -> Result<Seen, FindError> {
    let mut found = Found::default();
    let (mut listeners, mut used) = (Vec::new(), 0);
    let mut first_failure = None;
    // A name that means something in none of the namespaces is a mistake: `not dev` would match all.
    let (mut resolved, mut unresolved) = (false, None);
    for (netns, view) in views(namespaces, selectors, alone).into_iter().enumerate() {
        let mut view = match view {
            Ok(view) => view,
            // Nothing could be seen anywhere.
            Err(error) if found.unreachable_namespaces + 1 == namespaces.len() => {
                return Err(first_failure.unwrap_or(error));
            }
            Err(error) => {
                found.unreachable_namespaces += 1;
                first_failure.get_or_insert(error);
                continue;
            }
        };
        match view.unresolved {
            None => resolved = true,
            Some(error) => {
                unresolved.get_or_insert(error);
            }
        }
        // Listeners of all namespaces share one list.
        for socket in &mut view.sockets {
            socket.netns = netns;
            socket.listener = socket.listener.map(|at| used + at);
        }
        match found.sockets.is_empty() {
            true => found.sockets = view.sockets,
            false => found.sockets.append(&mut view.sockets),
        }
        used += view.listeners.used();
        listeners.push(view.listeners);
    }
    if let (false, Some(error)) = (resolved, unresolved) {
        return Err(error);
    }
    found.namespace_failure =
        first_failure.map(|error| format!("{:#}", anyhow::Error::from(error)));
    let inodes = found.sockets.iter().filter_map(|socket| socket.inode);
    let wanted = inodes
        .chain(listeners.iter().flat_map(Listeners::used_inodes))
        .collect();
    Ok(Seen {
        found,
        listeners,
        wanted,
    })
}

/// What a thread brings back; its panic goes on here.
fn joined<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| resume_unwind(panic))
}

/// Looks into every namespace, some at a time.
fn views(namespaces: &[Netns], selectors: &Selectors, alone: bool) -> Vec<Result<View, FindError>> {
    let several = namespaces.len() > 1;
    let look = |netns: &Netns| {
        let look = || sockets::look(selectors, several, alone && !several);
        netns
            .within(look)
            .unwrap_or_else(|error| Err(FindError::Enter(error)))
    };
    let views = parallel::side_by_side(namespaces, NAMESPACES_AT_ONCE, look);
    let view = |view: std::thread::Result<_>| view.unwrap_or_else(|panic| resume_unwind(panic));
    views.into_iter().map(view).collect()
}

impl Found {
    /// Gives every socket its owners, and one that was never accepted its listener's user.
    fn attach(&mut self, listeners: Vec<Listeners>, owners: &OwnerScan) {
        self.listeners = listeners
            .into_iter()
            .flat_map(|listeners| listeners.into_used(|inode| owners.holding(inode)))
            .collect();
        for socket in &mut self.sockets {
            match (socket.listener, socket.inode) {
                // It will get the user of whoever accepts it; kernels differ in what they say until then.
                (Some(listener), _) => socket.uid = self.listeners[listener].uid,
                (None, Some(inode)) => socket.owners = owners.holding(inode),
                (None, None) => {}
            }
        }
    }

    fn sort(&mut self) {
        self.sockets.par_sort_by_key(Socket::oldest_first);
    }

    /// Keeps the sockets whose owners, or whose listener's, are selected, and puts those first.
    fn retain_selected(&mut self, selectors: &Selectors, unreadable: &[Unreadable]) {
        self.sockets
            .retain(|socket| selectors.match_user(socket.uid));
        if !selectors.selects_owners() {
            return;
        }
        let (processes, listeners) = (&self.processes, &self.listeners);
        let hidden = selectors.could_match(unreadable) || self.hidden_processes;
        let mut undecided = 0;
        self.sockets.retain_mut(|socket| {
            let selected = |held: &Held| selectors.match_owner(&processes[held.process]);
            let responsible = match socket.listener {
                Some(listener) => &listeners[listener].owners,
                None => {
                    socket.owners.sort_by_key(|held| !selected(held));
                    &socket.owners
                }
            };
            let keep = responsible.iter().any(selected);
            undecided += usize::from(!keep && hidden && responsible.is_empty());
            keep
        });
        self.undecided = undecided;
    }
}

impl Socket {
    /// What the kernel's message alone says; owners and listener are still to be found.
    pub fn from_message(message: &SocketMessage) -> Socket {
        Socket {
            id: message.id,
            netns: 0,
            tuple: message.id.tuple(),
            state: message.state,
            recv_q: message.recv_q,
            send_q: message.send_q,
            uid: message.uid,
            cgroup: message.cgroup,
            inode: (message.inode != 0).then_some(message.inode),
            age: cause::age(message),
            cause: cause::cause(message),
            owners: Vec::new(),
            listener: None,
        }
    }

    /// What sockets are sorted by.
    pub fn oldest_first(&self) -> impl Ord + use<> {
        (std::cmp::Reverse(self.age), self.netns, self.tuple)
    }

    /// The kernel's identity of the socket.
    pub fn cookie(&self) -> Cookie {
        self.id.cookie()
    }

    /// The process to blame, by its index in [`Found::processes`]: its first owner, or its listener's.
    pub fn culprit(&self, found: &Found) -> Option<usize> {
        let held = match self.listener {
            Some(listener) => &found.listeners[listener].owners,
            None => &self.owners,
        };
        held.first().map(|held| held.process)
    }

    /// Whether the connection runs over IPv4, on a socket of either family.
    pub fn is_ipv4(&self) -> bool {
        self.tuple.local.is_ipv4()
    }
}

/// Why nothing could be found at all.
#[derive(Debug)]
pub enum FindError {
    /// The network namespace.
    Enter(io::Error),
    /// The sock_diag socket.
    Open(io::Error),
    /// The expression means nothing in this network namespace.
    Expression(io::Error),
    /// The kernel's socket tables.
    Dump(DumpError),
    /// The list of processes.
    Processes(io::Error),
}

impl std::fmt::Display for FindError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            FindError::Enter(error) if error.raw_os_error() == Some(libc::EPERM) => {
                f.write_str("cannot enter the network namespace (needs CAP_SYS_ADMIN)")
            }
            FindError::Enter(_) => f.write_str("cannot enter it as a network namespace"),
            FindError::Open(_) => {
                f.write_str("cannot open a sock_diag socket (is CONFIG_INET_DIAG in this kernel?)")
            }
            FindError::Expression(_) => f.write_str("cannot apply the expression"),
            FindError::Dump(_) => f.write_str("cannot list sockets"),
            FindError::Processes(_) => f.write_str("cannot list processes"),
        }
    }
}

impl std::error::Error for FindError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            FindError::Dump(error) => Some(error),
            FindError::Enter(error)
            | FindError::Open(error)
            | FindError::Expression(error)
            | FindError::Processes(error) => Some(error),
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
        FindError::Processes(error)
    }
}
