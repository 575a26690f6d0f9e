//! The matched sockets of one network namespace, listed by the kernel.

use std::thread;
use std::time::Duration;

use rayon::prelude::*;

use super::listeners::Listeners;
use super::{FindError, addresses, join, mptcp};
use crate::filter::selectors::Selectors;
use crate::filter::{self, bytecode};
use crate::history::{self, History};
use crate::model::{HistoryUpdate, NetnsKey, NewEntry, Socket, Target};
use crate::proc::netns::Netns;
use crate::sock_diag::client::FirstSockets;
use crate::sock_diag::{DumpError, DumpRequest, Family, Protocol, SockDiag, SocketMessage};

/// The sockets of a namespace that match by the kernel's data, without their owners.
pub(super) struct NetnsScan {
    /// Their `listener` is an index in the result of [`Listeners::into_used`].
    pub sockets: Vec<Target>,
    /// The listeners of the sockets that were never accepted.
    pub listeners: Listeners,
    /// The number of matching subflows whose MPTCP sockets the kernel cannot list.
    pub unlisted_subflows: usize,
    /// A name in the expression does not exist in this namespace; it may exist in another.
    pub unresolved: Option<FindError>,
    /// What this scan adds to the history.
    pub for_history: HistoryUpdate,
}

/// Scans the namespace of the calling thread. `may_split`: whether two threads may share a large dump.
pub(super) fn scan(
    netns: &Netns,
    selectors: &Selectors,
    history: &History,
    one_of_several: bool,
    may_split: bool,
) -> Result<NetnsScan, FindError> {
    let mut diag = SockDiag::open().map_err(FindError::Open)?;
    let resolve = |one_of_several| {
        let here = filter::ThisNamespace { one_of_several };
        selectors.resolved(&here).map_err(FindError::Expression)
    };
    let (selectors, unresolved) = match resolve(false) {
        Ok(selectors) => (selectors, None),
        Err(error) if one_of_several => (resolve(true)?, Some(error)),
        Err(error) => return Err(error),
    };
    // From before the kernel lists the sockets, so that no time becomes too long.
    let before = history::now();
    let split = match may_split {
        true => split_dump(&selectors),
        false => DumpSplit::Unknown,
    };
    let mut sockets = match split {
        DumpSplit::All(sockets) => sockets,
        DumpSplit::Halves(halves) => dump_in_halves(&mut diag, &selectors, &halves)?,
        DumpSplit::Unknown => dump(&mut diag, &selectors)?,
    };
    let (rows, unlisted_subflows) = mptcp::replace(&mut diag, &mut sockets, selectors.states)?;
    sockets.extend(rows.iter().filter_map(|row| matching(row, &selectors)));
    let key = netns_key(netns, &diag);
    let for_history = apply_history(&mut sockets, &selectors, history, key, before);
    addresses::mark_gone(&mut sockets, selectors.address_gone);
    let mut listeners = Listeners::default();
    let with_listener = |target: &Target| target.socket.cause.is_with_listener();
    if sockets.iter().any(with_listener) {
        listeners = Listeners::read(&mut diag)?;
        let waiting = sockets.iter().filter(|target| with_listener(target));
        let waiting = waiting.map(|target| &target.socket);
        listeners.read_backlogs(waiting, &mut diag)?;
    }
    for target in sockets.iter_mut().filter(|target| with_listener(target)) {
        target.listener = listeners.accepting(&target.socket);
    }
    Ok(NetnsScan {
        sockets,
        listeners,
        unlisted_subflows,
        unresolved,
        for_history,
    })
}

/// The key of the namespace in the history. `diag` was opened in it.
fn netns_key(netns: &Netns, diag: &SockDiag) -> NetnsKey {
    NetnsKey {
        inode: netns.inode(),
        cookie: diag.netns_cookie().unwrap_or(0),
    }
}

/// Applies the history to the times of `targets`, and keeps those that match by cause. Returns the entries of all of them for
/// the history. `before`: from before the kernel listed them.
fn apply_history(
    targets: &mut Vec<Target>,
    selectors: &Selectors,
    history: &History,
    netns: NetnsKey,
    before: Duration,
) -> HistoryUpdate {
    let mut update = HistoryUpdate::default();
    if history.is_used() {
        let after = history::now();
        update.namespaces.push(netns);
        let entry = |target: &mut Target| {
            history.apply_to(netns, &mut target.socket, before);
            NewEntry::of(&target.socket, netns, before, after)
        };
        update.entries = targets.par_iter_mut().filter_map(entry).collect();
    }
    targets.retain(|target| selectors.match_cause(&target.socket));
    update
}

/// How a large dump can be split, decided by its first sockets.
enum DumpSplit {
    /// These few sockets are all that match.
    All(Vec<Target>),
    /// Many match. Two parallel dumps can share the work: each of these selectors selects one half, by the peer port, which
    /// never changes during a connection.
    Halves(Box<[Selectors; 2]>),
    /// The number is unknown. Errors are not returned here: the dump that follows hits the same error and reports it.
    Unknown,
}

/// Reads the first sockets of a dump. The kernel lists sockets in hash order, so the first ones stand for all.
fn split_dump(selectors: &Selectors) -> DumpSplit {
    /// Read this many sockets before a split: their median splits all to within 2 % of a half, with a probability of 2 in 3.
    const SPLIT_FROM: usize = 512;
    let bytecode = bytecode::bytecode(&selectors.as_expression(), selectors.states);
    let mut sockets = Vec::new();
    for request in requests(selectors, &bytecode) {
        let keep = |message| matching(&message, selectors);
        let more = SPLIT_FROM - sockets.len();
        // The netlink socket of an unfinished dump stays busy, so it is not reused.
        match SockDiag::open().map(|mut diag| diag.first(&request, keep, more)) {
            Ok(Ok(FirstSockets::Enough(mut first))) => {
                sockets.append(&mut first);
                return halves(selectors, &sockets);
            }
            Ok(Ok(FirstSockets::All(mut all))) if all.len() < more => sockets.append(&mut all),
            _ => return DumpSplit::Unknown,
        }
    }
    DumpSplit::All(sockets)
}

/// The two halves, split at the median peer port of `first`, the first sockets of a dump.
fn halves(selectors: &Selectors, first: &[Target]) -> DumpSplit {
    if !selectors.peer_ports.is_empty() {
        return DumpSplit::Unknown;
    }
    let mut ports: Vec<u16> = first
        .iter()
        .map(|target| target.socket.tuple().peer.port())
        .collect();
    ports.sort_unstable();
    let middle = ports[ports.len() / 2].max(1);
    let half = |ports| Selectors {
        peer_ports: vec![ports],
        ..selectors.clone()
    };
    let lower = half(0..=middle - 1);
    // A half takes half the time only if the kernel filters by port. Without bytecode it does not.
    match bytecode::bytecode(&lower.as_expression(), lower.states).is_empty() {
        true => DumpSplit::Unknown,
        false => DumpSplit::Halves(Box::new([lower, half(middle..=u16::MAX)])),
    }
}

fn dump_in_halves(
    diag: &mut SockDiag,
    selectors: &Selectors,
    [lower, upper]: &[Selectors; 2],
) -> Result<Vec<Target>, FindError> {
    thread::scope(|scope| {
        let upper = thread::Builder::new().spawn_scoped(scope, || {
            let mut diag = SockDiag::open().map_err(FindError::Open)?;
            Ok::<_, FindError>(dump(&mut diag, upper)?)
        });
        let Ok(upper) = upper else {
            return Ok(dump(diag, selectors)?);
        };
        let mut sockets = dump(diag, lower)?;
        sockets.append(&mut join(upper)?);
        Ok(sockets)
    })
}

/// The target, if its socket can match by the kernel's data. Age, cause and use are decided later.
fn matching(message: &SocketMessage, selectors: &Selectors) -> Option<Target> {
    let socket = Socket::from_message(message);
    selectors.match_fixed(&socket).then(|| Target::new(socket))
}

/// The dump requests whose answers contain every socket that `selectors` match.
fn requests<'b>(
    selectors: &Selectors,
    bytecode: &'b [u8],
) -> impl Iterator<Item = DumpRequest<'b>> {
    let states = selectors.states;
    // An IPv4 connection can be on an AF_INET6 socket, but an IPv6 connection is never on an AF_INET socket.
    let without_v4 = selectors.selects_only_ipv6();
    let families = Family::ALL.into_iter();
    let families = families.filter(move |family| !(without_v4 && *family == Family::V4));
    families.map(move |family| DumpRequest {
        protocol: Protocol::Tcp,
        family,
        states,
        info: true,
        bytecode,
    })
}

fn dump(diag: &mut SockDiag, selectors: &Selectors) -> Result<Vec<Target>, DumpError> {
    let bytecode = bytecode::bytecode(&selectors.as_expression(), selectors.states);
    let mut sockets = Vec::new();
    for mut request in requests(selectors, &bytecode) {
        let mut keep = |message| matching(&message, selectors);
        let dumped = match diag.dump(&request, &mut keep) {
            // An old kernel lacks an operation of the bytecode (EINVAL). `matching` applies the same condition in user space.
            Err(DumpError::Io(error))
                if error.raw_os_error() == Some(libc::EINVAL) && !bytecode.is_empty() =>
            {
                request.bytecode = &[];
                diag.dump(&request, &mut keep)
            }
            other => other,
        };
        let mut dumped = dumped?;
        match sockets.is_empty() {
            true => sockets = dumped,
            false => sockets.append(&mut dumped),
        }
    }
    Ok(sockets)
}
