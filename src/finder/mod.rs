//! The finder: which sockets are stuck, and who owns them.
//!
//! [`find`] asks the kernel for the sockets (`sockets`) and, at the same time, reads from /proc which processes hold
//! descriptors ([`owners`]). A connection that was never accepted gets the listener that would accept it ([`listeners`]).
//! [`dead`] finds descriptors of sockets that are in no table any more.

pub mod dead;
pub mod listeners;
pub mod owners;
pub(crate) mod sockets;

use std::collections::HashSet;
use std::io;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, ScopedJoinHandle};

use anyhow::Context;
use rayon::slice::ParallelSliceMut;

use crate::filter::selectors::Selectors;
use crate::model::{Coverage, Owner, Scan, Target};
use crate::parallel;
use crate::proc::netns::{Namespaces, Netns, NetnsScope};
use crate::proc::{ProcFs, Unreadable};
use crate::sock_diag::DumpError;
use listeners::Listeners;
use owners::{OwnerScan, Trust};
use sockets::NetnsScan;

/// How many namespaces are scanned at the same time.
const NAMESPACES_AT_ONCE: usize = 8;

/// Opens the namespaces of `scope`.
///
/// # Errors
/// As [`NetnsScope::open`].
pub fn open(scope: &NetnsScope, proc: &ProcFs) -> anyhow::Result<Namespaces> {
    scope.open(proc).with_context(|| match scope {
        NetnsScope::Named(text) => format!("cannot open the network namespace {text}"),
        NetnsScope::Current | NetnsScope::All => "cannot find the network namespaces".into(),
    })
}

/// Finds the sockets that `selectors` match in each of `namespaces`, and their owners.
///
/// /proc is read while the kernel lists the sockets, since each takes about as long as the other.
///
/// # Errors
/// When the kernel gives no list of sockets or /proc none of processes. A process that vanishes or may not be read is not an
/// error, nor is a namespace among several that cannot be entered.
pub fn find(
    namespaces: &Namespaces,
    proc: &ProcFs,
    selectors: &Selectors,
) -> Result<Scan, FindError> {
    let needless = AtomicBool::new(false);
    let (tables, descriptors) = std::thread::scope(|scope| {
        // Where no thread can be started, one comes after the other.
        let thread = parallel::are_there()
            .then(|| Builder::new().spawn_scoped(scope, || owners::scan(proc, &needless)));
        let tables = scan_tables(namespaces, selectors, false);
        let wanted = tables
            .as_ref()
            .is_ok_and(|tables| !tables.wanted.is_empty());
        needless.store(!wanted, Ordering::Relaxed);
        let descriptors = match thread {
            Some(Ok(thread)) => join(thread),
            Some(Err(_)) | None => owners::scan(proc, &needless),
        };
        (tables, descriptors)
    });
    let Tables {
        mut scan,
        listeners,
        wanted,
    } = tables?;
    let mut owners = match wanted.is_empty() {
        true => OwnerScan::default(),
        false => {
            let trust = match selectors.selects_owners() {
                true => Trust::Nothing,
                false => Trust::TheScan,
            };
            owners::select(proc, descriptors?, &wanted, trust)?
        }
    };
    // The scan may have passed a process before it got the descriptor of a socket that was listed later.
    if wanted.iter().any(|&inode| !owners.has(inode)) {
        owners = owners::find(proc, &wanted)?;
    }
    attach_owners(&mut scan, listeners, &owners);
    scan.owners_known = true;
    scan.coverage.hidden_processes = owners.hidden;
    scan.coverage.unreadable_processes = owners.unreadable.len();
    retain_selected(&mut scan, selectors, &owners.unreadable);
    sort(&mut scan.targets);
    Ok(scan)
}

/// Finds the sockets and not their owners, so `selectors` must not select any. `many`: there may be so many sockets that two threads
/// should share the work.
///
/// # Errors
/// As [`find`], but for /proc.
pub fn find_sockets(
    namespaces: &Namespaces,
    selectors: &Selectors,
    many: bool,
) -> Result<Scan, FindError> {
    let Tables {
        mut scan,
        listeners,
        ..
    } = scan_tables(namespaces, selectors, many)?;
    attach_owners(&mut scan, listeners, &OwnerScan::default());
    retain_selected(&mut scan, selectors, &[]);
    sort(&mut scan.targets);
    Ok(scan)
}

/// An empty scan of `namespaces`, with what could not be opened of them.
pub(crate) fn empty_scan(namespaces: &Namespaces) -> Scan {
    let failure = namespaces.failure.as_ref();
    Scan {
        namespaces: namespaces.open.clone(),
        coverage: Coverage {
            unreachable_namespaces: namespaces.unreachable,
            unknown_namespaces: namespaces.unknown,
            namespace_failure: failure.map(|error| format!("opening it: {error}")),
            ..Coverage::default()
        },
        ..Scan::default()
    }
}

/// Orders targets, the oldest first.
pub(crate) fn sort(targets: &mut [Target]) {
    targets.par_sort_by_key(|target| target.socket.oldest_first());
}

/// The kernel's socket tables of all namespaces.
struct Tables {
    scan: Scan,
    listeners: Vec<Listeners>,
    /// The inodes whose owners are to be found.
    wanted: HashSet<u32>,
}

/// Asks the kernel of every namespace. `alone`: no other thread keeps the processors busy.
fn scan_tables(
    namespaces: &Namespaces,
    selectors: &Selectors,
    alone: bool,
) -> Result<Tables, FindError> {
    let mut scan = empty_scan(namespaces);
    let (mut listeners, mut used) = (Vec::new(), 0);
    let (mut failed, mut first_failure) = (0, None);
    // A name that means something in none of the namespaces is a mistake: `not dev` would match all.
    let (mut resolved, mut unresolved) = (false, None);
    let scans = scan_namespaces(&namespaces.open, selectors, alone);
    for (netns, netns_scan) in scans.into_iter().enumerate() {
        let netns_scan = match netns_scan {
            Ok(netns_scan) => netns_scan,
            // Nothing could be listed anywhere.
            Err(error) if failed + 1 == namespaces.open.len() => {
                return Err(first_failure.unwrap_or(error));
            }
            Err(error) => {
                failed += 1;
                first_failure.get_or_insert(error);
                continue;
            }
        };
        match netns_scan.unresolved {
            None => resolved = true,
            Some(error) => {
                unresolved.get_or_insert(error);
            }
        }
        // Listeners of all namespaces share one list.
        scan.targets.reserve(netns_scan.sockets.len());
        scan.targets
            .extend(netns_scan.sockets.into_iter().map(|mut target| {
                target.socket.netns = netns;
                target.listener = target.listener.map(|index| used + index);
                target
            }));
        used += netns_scan.listeners.used();
        listeners.push(netns_scan.listeners);
    }
    if let (false, Some(error)) = (resolved, unresolved) {
        return Err(error);
    }
    scan.coverage.unreachable_namespaces += failed;
    if let Some(error) = first_failure {
        scan.coverage.namespace_failure = Some(format!("{:#}", anyhow::Error::from(error)));
    }
    let inodes = scan.targets.iter().filter_map(|target| target.socket.inode);
    let wanted = inodes
        .chain(listeners.iter().flat_map(Listeners::used_inodes))
        .collect();
    Ok(Tables {
        scan,
        listeners,
        wanted,
    })
}

/// The result of a thread; its panic goes on here.
fn join<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| resume_unwind(panic))
}

/// Scans every namespace, some at a time.
fn scan_namespaces(
    namespaces: &[Arc<Netns>],
    selectors: &Selectors,
    alone: bool,
) -> Vec<Result<NetnsScan, FindError>> {
    let several = namespaces.len() > 1;
    let scan = |netns: &Arc<Netns>| {
        let scan = || sockets::scan(selectors, several, alone && !several);
        netns
            .within(scan)
            .unwrap_or_else(|error| Err(FindError::Enter(error)))
    };
    let scans = parallel::side_by_side(namespaces.iter().collect(), NAMESPACES_AT_ONCE, scan);
    let scan = |scan: std::thread::Result<_>| scan.unwrap_or_else(|panic| resume_unwind(panic));
    scans.into_iter().map(scan).collect()
}

/// Gives every socket its owners, and one that was never accepted its listener's user.
fn attach_owners(scan: &mut Scan, listeners: Vec<Listeners>, owners: &OwnerScan) {
    scan.listeners = listeners
        .into_iter()
        .flat_map(|listeners| listeners.into_used(|inode| owners.of(inode).collect()))
        .collect();
    for target in &mut scan.targets {
        match (target.listener, target.socket.inode) {
            // It will get the user of whoever accepts it; kernels differ in what they report until then.
            (Some(listener), _) => target.socket.uid = scan.listeners[listener].uid,
            (None, Some(inode)) => target.owners = owners.of(inode).collect(),
            (None, None) => {}
        }
    }
}

/// Keeps the sockets whose owners, or whose listener's, are selected, and puts those owners first.
fn retain_selected(scan: &mut Scan, selectors: &Selectors, unreadable: &[Unreadable]) {
    scan.targets
        .retain(|target| selectors.match_user(target.socket.uid));
    if !selectors.selects_owners() {
        return;
    }
    let listeners = &scan.listeners;
    let hidden = selectors.could_match(unreadable) || scan.coverage.hidden_processes;
    let mut undecided = 0;
    let selected = |owner: &Owner| selectors.match_owner(&owner.process);
    scan.targets.retain_mut(|target| {
        let responsible = match target.listener {
            Some(listener) => &listeners[listener].owners,
            None => {
                target.owners.sort_by_key(|owner| !selected(owner));
                &target.owners
            }
        };
        let keep = responsible.iter().any(selected);
        undecided += usize::from(!keep && hidden && responsible.is_empty());
        keep
    });
    scan.coverage.undecided = undecided;
}

/// Why nothing could be found at all.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    /// The network namespace could not be entered.
    #[error("{}", cannot_enter(.0))]
    Enter(#[source] io::Error),
    /// The sock_diag socket could not be opened.
    #[error("cannot open a sock_diag socket (is CONFIG_INET_DIAG in this kernel?)")]
    Open(#[source] io::Error),
    /// The expression means nothing in this network namespace.
    #[error("cannot apply the expression")]
    Expression(#[source] io::Error),
    /// The kernel's socket tables could not be listed.
    #[error("cannot list sockets")]
    Dump(#[from] DumpError),
    /// The processes could not be listed.
    #[error("cannot list processes")]
    Processes(#[from] io::Error),
}

fn cannot_enter(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPERM) => "cannot enter the network namespace (needs CAP_SYS_ADMIN)",
        _ => "cannot enter it as a network namespace",
    }
}
