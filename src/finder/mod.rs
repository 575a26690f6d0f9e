//! The finder: which sockets are stuck, and who owns them.
//!
//! [`find`] lists the sockets (`sockets`) and, at the same time, reads the descriptors of all processes ([`owners`]), from /proc or by an
//! iterator of the kernel (`iterated`; [`way`] chooses). An MPTCP socket takes the place of its subflows (`mptcp`). `addresses` marks the sockets whose local address is
//! gone. A connection that was never accepted gets the listener that would accept it ([`listeners`]). [`dead`] finds descriptors of
//! sockets that the kernel no longer lists, [`dead_among_others`] finds them in what was read for the owners, [`leftovers`] those of them that are
//! selected. `connections` lists the sockets around the
//! targets, for `diagnose`. [`forwarded`] finds the connections that are routed through this host, for `gateway`, and [`arrivals`] those that come while it watches. [`tracked`] reads the conntrack tables: connections of others that pass through this host, and NAT.
//! [`reactions`] waits while owners close the descriptors of closed sockets. [`selected`] looks for the selected processes, and `retain`
//! drops the sockets of others. [`spin_risk`] finds out how the owners wait for the sockets. [`second_look`] finds out
//! whether the owners still read, before an act. `order` puts the oldest first. [`still_open`] looks which descriptors of closed sockets are left. [`table_use`] counts the descriptors of some owners, for the overview.

mod addresses;
pub mod arrivals;
mod connection_end;
pub(crate) mod connections;
pub mod dead;
pub mod dead_among_others;
mod descriptor_scan;
pub mod forwarded;
mod iterated;
pub mod leftovers;
pub mod listeners;
mod mptcp;
mod mptcp_socket;
mod nameless_netns;
mod order;
pub mod owners;
pub mod reactions;
mod retain;
pub mod second_look;
pub mod selected;
pub(crate) mod sockets;
pub mod spin_risk;
pub mod still_open;
pub mod table_use;
mod threads;
pub mod tracked;
pub mod way;

use std::io;
use std::panic::resume_unwind;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{Builder, ScopedJoinHandle};

use anyhow::Context;
use caps::Capability;
use nix::errno::Errno;
use rayon::prelude::*;

use crate::filter::selectors::Selectors;
use crate::history::History;
use crate::model::method::refused;
use crate::model::{Coverage, Listener, Owner, Scan};
use crate::parallel;
use crate::privileges;
use crate::proc::netns::{Namespaces, Netns, NetnsScope};
use crate::proc::{Inodes, ProcFs, Unreadable, since_boot};
use crate::sock_diag::DumpError;
use crate::sys::errno_of;
use crate::tcp::{StateSet, TcpState};
use descriptor_scan::{DescriptorScan, OtherDescriptors};
pub(crate) use order::sort;
use owners::{OwnerScan, Trust};
use retain::{count_undecided, retain_selected};
use sockets::NetnsScan;

/// Namespaces scanned at the same time.
const NAMESPACES_AT_ONCE: usize = 8;

/// Opens the namespaces of `scope`. If it names none, those of the selected owners are opened too, or without a selector of owners the
/// others are counted.
///
/// # Errors
/// As [`NetnsScope::open`], or the processes cannot be listed.
pub fn open_namespaces(
    scope: &NetnsScope,
    selectors: &Selectors,
    proc: &ProcFs,
) -> anyhow::Result<Namespaces> {
    let mut namespaces = scope.open(proc).with_context(|| match scope {
        NetnsScope::Named(text) => format!("cannot open the network namespace {text}"),
        NetnsScope::Current | NetnsScope::All => "cannot find the network namespaces".into(),
    })?;
    let is_unnamed = *scope == NetnsScope::Current;
    if selectors.selects_owners() {
        let owners = selected::look(proc, selectors).context("cannot list processes")?;
        owners.add_to(&mut namespaces, proc, is_unnamed);
    } else if is_unnamed {
        namespaces.count_left_out(proc);
    }
    Ok(namespaces)
}

/// Finds the sockets that `selectors` match in each of `namespaces`, and their owners. `history`: what earlier runs have seen.
///
/// Both scans take about the same time, so they run in parallel.
///
/// # Errors
/// The sockets cannot be listed in any namespace, or the processes cannot be listed. A process that vanishes or that cwkill
/// is not permitted to read is not an error. If there are several namespaces, one that cannot be entered is not an error either.
pub fn find(
    namespaces: &Namespaces,
    proc: &ProcFs,
    selectors: &Selectors,
    history: &History,
) -> Result<Scan, FindError> {
    let (mut scan, _) = search(namespaces, proc, selectors, history, Wanted::Owners)?;
    sort(&mut scan.targets);
    Ok(scan)
}

/// As [`find`], for `selectors` that select no owners. The sockets are in no order. Also returns the descriptors of the other sockets that may be
/// dead, read in the same pass.
///
/// # Errors
/// As [`find`].
pub fn find_with_others(
    namespaces: &Namespaces,
    proc: &ProcFs,
    selectors: &Selectors,
    history: &History,
) -> Result<(Scan, OtherDescriptors), FindError> {
    search(namespaces, proc, selectors, history, Wanted::AllDescriptors)
}

/// Which descriptors are read.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Wanted {
    /// As far as owners are needed.
    Owners,
    /// All, also if no socket matches.
    AllDescriptors,
}

/// The states in which a descriptor is of interest, in addition to the selected ones.
fn states_of_interest(wanted: Wanted) -> StateSet {
    // A socket can wait at a listener.
    let listen = StateSet::from(TcpState::Listen);
    match wanted {
        Wanted::Owners => listen,
        // A dead socket, and one that was stuck when it was listed.
        Wanted::AllDescriptors => listen
            .union(TcpState::Close.into())
            .union(TcpState::LastAck.into()),
    }
}

fn search(
    namespaces: &Namespaces,
    proc: &ProcFs,
    selectors: &Selectors,
    history: &History,
    wanted: Wanted,
) -> Result<(Scan, OtherDescriptors), FindError> {
    if namespaces.nobody {
        let scan = Scan {
            owners_known: true,
            ..empty_scan(namespaces)
        };
        return Ok((scan, OtherDescriptors::default()));
    }
    let wants_all = wanted == Wanted::AllDescriptors;
    let cancelled = AtomicBool::new(false);
    // Otherwise only the processes that the operator selects are read.
    let searches_all = wants_all || namespaces.everywhere && !selectors.selects_owners();
    // If the owners decide on which sockets cwkill acts, they must be read after the sockets. From /proc, each descriptor is read again
    // for that. The iterator then need not report the sockets that were in no state of interest.
    let side_by_side = proc.iterator().is_none() || !selectors.selects_owners() && !wants_all;
    // Beside the list, a socket may change its state between two of its owners.
    let states = match side_by_side {
        true => StateSet::ALL,
        false => selectors.states.union(states_of_interest(wanted)),
    };
    let read = || match wanted {
        Wanted::Owners => owners::scan(proc, states, &cancelled),
        Wanted::AllDescriptors => owners::scan_to_end(proc, states),
    };
    let (listed, descriptors) = std::thread::scope(|scope| {
        // If no thread can be started, the scans run one after the other.
        let thread = (parallel::has_threads() && side_by_side)
            .then(|| Builder::new().spawn_scoped(scope, read));
        // The iterator takes less time than the list, so two threads share the list.
        let may_split = proc.iterator().is_some();
        let listed = list_sockets(namespaces, selectors, history, may_split);
        let needed = listed
            .as_ref()
            .is_ok_and(|listed| !listed.inodes.is_empty());
        cancelled.store(!needed && !searches_all, Ordering::Relaxed);
        let descriptors = match thread {
            Some(Ok(thread)) => join(thread),
            Some(Err(_)) | None => read(),
        };
        (listed, descriptors)
    });
    let (mut listed, mut descriptors) = (listed?, descriptors);
    let is_complete = searches_all || !listed.inodes.is_empty();
    if namespaces.everywhere || selectors.selects_owners() {
        let selected;
        let of_sockets = match &descriptors {
            Ok(descriptors) if is_complete => descriptors,
            _ => {
                selected = owners::scan_selected(proc, selectors)?;
                &selected
            }
        };
        let are_there_more = add_nameless(
            &mut listed,
            namespaces,
            of_sockets,
            proc,
            selectors,
            history,
        );
        // Their sockets were listed after the descriptors were read.
        if are_there_more && !side_by_side {
            descriptors = owners::scan(proc, states, &AtomicBool::new(false));
        }
    }
    let Listed { mut scan, inodes } = listed;
    let others = match wanted {
        Wanted::Owners => OtherDescriptors::default(),
        Wanted::AllDescriptors => {
            let read = descriptors?;
            let others = read.others(&inodes);
            descriptors = Ok(read);
            others
        }
    };
    let mut owners = match inodes.is_empty() {
        true => OwnerScan::default(),
        false => {
            let trust = match selectors.selects_owners() {
                true => Trust::Nothing,
                false => Trust::TheScan,
            };
            owners::select(proc, descriptors?, &inodes, trust)?
        }
    };
    // A process may have got its descriptor after it was scanned, but before its socket was listed.
    if inodes.iter().any(|&inode| !owners.has(inode)) {
        owners = owners::find(proc, &inodes)?;
        owners.add_thread_tables(proc, &inodes)?;
    }
    attach_owners(&mut scan, &owners);
    mptcp_socket::read_queues(proc, &mut scan.targets);
    scan.owners_known = true;
    scan.epolls = std::mem::take(&mut owners.epolls);
    scan.coverage.hidden_processes = owners.hidden;
    // A process with tables of single threads may be there for each.
    owners.unreadable.sort_by_key(|process| process.pid);
    owners.unreadable.dedup_by_key(|process| process.pid);
    scan.coverage.unreadable_processes = owners.unreadable.len();
    scan.coverage.unreadable_names = Unreadable::names(&owners.unreadable);
    scan.coverage.other_pid_namespaces =
        scan.without_known_owner() > 0 && !proc.shows_every_process();
    let possible = retain_selected(&mut scan, selectors, &owners, &|pid| {
        proc.shows_descriptors(pid)
    });
    let without_owner = count_undecided(&scan.namespaces, &possible.without_owner);
    let coverage = &mut scan.coverage;
    coverage.undecided_by_name = count_undecided(&scan.namespaces, &possible.without_name);
    coverage.undecided = without_owner + coverage.undecided_by_name + coverage.undecided_in_group;
    Ok((scan, others))
}

/// Finds the sockets without their owners, so `selectors` must not select owners.
///
/// # Errors
/// As [`find`], except that /proc is not read.
pub fn find_sockets(
    namespaces: &Namespaces,
    selectors: &Selectors,
    history: &History,
) -> Result<Scan, FindError> {
    let Listed { mut scan, .. } = list_sockets(namespaces, selectors, history, true)?;
    retain_selected(&mut scan, selectors, &OwnerScan::default(), &|_| true);
    sort(&mut scan.targets);
    Ok(scan)
}

/// A scan of `namespaces` without sockets. Its coverage says which namespaces could not be opened.
fn empty_scan(namespaces: &Namespaces) -> Scan {
    let failure = namespaces.failure.as_ref();
    let unknown = namespaces.unknown_because.as_ref();
    Scan {
        namespaces: namespaces.open.clone(),
        coverage: Coverage {
            unreachable_namespaces: namespaces.unreachable,
            unknown_namespaces: namespaces.unknown,
            unknown_namespace_failure: unknown.map(|error| why(Capability::CAP_SYS_PTRACE, error)),
            stale_namespace_names: namespaces.stale_names.clone(),
            namespaces_not_looked_into: namespaces.left_out,
            sockets_not_looked_into: namespaces.left_out_sockets,
            absent_owners: namespaces.absent.clone(),
            unnamed: namespaces.unnamed.clone(),
            owner_notes: namespaces.notes.clone(),
            namespace_failure: failure.map(|error| format!("opening it: {error}")),
            ..Coverage::default()
        },
        ..Scan::default()
    }
}

/// Why cwkill could not see something that needs `capability`.
fn why(capability: Capability, error: &io::Error) -> String {
    match errno_of(error) {
        Errno::EPERM | Errno::EACCES if !privileges::has_capability(capability) => {
            format!("needs {capability}")
        }
        Errno::EPERM | Errno::EACCES => format!("{error}: {}", refused(capability)),
        _ => error.to_string(),
    }
}

/// The matched sockets of all namespaces and their listeners.
struct Listed {
    /// Without owners.
    scan: Scan,
    /// The inodes of the matched sockets and of their listeners.
    inodes: Inodes,
}

/// Lists the sockets of every namespace. `may_split`: whether two threads may share a large dump.
fn list_sockets(
    namespaces: &Namespaces,
    selectors: &Selectors,
    history: &History,
    may_split: bool,
) -> Result<Listed, FindError> {
    let mut scan = empty_scan(namespaces);
    let (mut failed, mut first_failure) = (0, None);
    // If a name in the expression exists in none of the namespaces, it is a mistake: `not dev` would match every socket.
    let (mut resolved, mut unresolved) = (false, None);
    let several = scan.namespaces.len() > 1;
    let scanned = scan_namespaces(&scan.namespaces, selectors, history, several, may_split);
    for (index, netns_scan) in scanned.into_iter().enumerate() {
        let mut netns_scan = match netns_scan {
            Ok(netns_scan) => netns_scan,
            // No namespace could be listed.
            Err(error) if failed + 1 == namespaces.open.len() => {
                return Err(first_failure.unwrap_or(error));
            }
            Err(error) => {
                failed += 1;
                scan.unlisted.push(index);
                first_failure.get_or_insert(error);
                continue;
            }
        };
        match netns_scan.unresolved.take() {
            None => resolved = true,
            Some(error) => {
                unresolved.get_or_insert(error);
            }
        }
        add(&mut scan, netns_scan);
    }
    scan.listed_at = since_boot();
    if let (false, Some(error)) = (resolved, unresolved) {
        return Err(error);
    }
    scan.coverage.unreachable_namespaces += failed;
    if let Some(error) = first_failure {
        scan.coverage.namespace_failure = Some(format!("{:#}", anyhow::Error::from(error)));
    }
    let inodes = inodes(&scan);
    Ok(Listed { scan, inodes })
}

/// The inodes of the sockets of `scan` and of their listeners.
fn inodes(scan: &Scan) -> Inodes {
    let inodes = scan.targets.iter().filter_map(|target| target.socket.inode);
    let of_listeners = scan.listeners.iter().flat_map(Listener::inodes);
    inodes.chain(of_listeners).collect()
}

/// Adds the sockets of a namespace and their listeners to those of the other namespaces.
fn add(scan: &mut Scan, netns_scan: NetnsScan) {
    let NetnsScan {
        mut sockets,
        listeners,
        mut for_history,
        unlisted_subflows,
        ..
    } = netns_scan;
    let update = &mut scan.for_history;
    update.namespaces.append(&mut for_history.namespaces);
    update.entries.append(&mut for_history.entries);
    scan.coverage.unlisted_subflows += unlisted_subflows;
    let others = scan.listeners.len();
    scan.listeners.extend(listeners.into_used());
    for target in &mut sockets {
        if let Some(index) = target.listener {
            let listener = others + index;
            target.listener = Some(listener);
            // The socket gets the user of the process that accepts it. Until then kernels differ in the user they report.
            target.socket.uid = scan.listeners[listener].uid;
        }
    }
    match scan.targets.is_empty() {
        true => scan.targets = sockets,
        false => scan.targets.append(&mut sockets),
    }
}

/// The result of a thread. If the thread panicked, this panics too.
fn join<T>(thread: ScopedJoinHandle<'_, T>) -> T {
    thread.join().unwrap_or_else(|panic| resume_unwind(panic))
}

/// Adds the sockets in namespaces that only a socket keeps alive. Returns whether there are such namespaces.
fn add_nameless(
    listed: &mut Listed,
    namespaces: &Namespaces,
    descriptors: &DescriptorScan,
    proc: &ProcFs,
    selectors: &Selectors,
    history: &History,
) -> bool {
    let search = nameless_netns::Search {
        proc,
        selectors,
        namespaces: &namespaces.open,
        known: &listed.inodes,
        everywhere: namespaces.everywhere,
        follows_owners: namespaces.follows_owners,
        bounds: nameless_netns::Bounds::USUAL,
    };
    let found = search.run(descriptors);
    let coverage = &mut listed.scan.coverage;
    coverage.unexamined_descriptors = found.unexamined;
    coverage.unplaced_sockets = found.unplaced;
    coverage.unplaced_failure = found
        .unplaced_because
        .map(|error| why(Capability::CAP_NET_ADMIN, &error));
    let first = listed.scan.namespaces.len();
    let are_there_any = !found.namespaces.is_empty();
    let netns_scans = scan_namespaces(&found.namespaces, selectors, history, true, false);
    listed.scan.namespaces.extend(found.namespaces);
    for (index, netns_scan) in netns_scans.into_iter().enumerate() {
        match netns_scan {
            Ok(mut netns_scan) => {
                for target in &mut netns_scan.sockets {
                    target.socket.netns += first;
                }
                add(&mut listed.scan, netns_scan);
            }
            Err(error) => {
                listed.scan.unlisted.push(first + index);
                let coverage = &mut listed.scan.coverage;
                coverage.unreachable_namespaces += 1;
                let failure = || format!("{:#}", anyhow::Error::from(error));
                coverage.namespace_failure.get_or_insert_with(failure);
            }
        }
    }
    listed.inodes = inodes(&listed.scan);
    are_there_any
}

/// Scans every namespace, [`NAMESPACES_AT_ONCE`] at the same time. Each socket gets the index of its namespace. `several`: whether
/// other namespaces may have the names in the expression.
fn scan_namespaces(
    namespaces: &[Arc<Netns>],
    selectors: &Selectors,
    history: &History,
    several: bool,
    may_split: bool,
) -> Vec<Result<NetnsScan, FindError>> {
    let scan_one = |(index, netns): (usize, &Arc<Netns>)| {
        let mut netns_scan = netns
            .within(|| sockets::scan(netns, selectors, history, several, may_split && !several))
            .map_err(FindError::Enter)??;
        for target in &mut netns_scan.sockets {
            target.socket.netns = index;
        }
        Ok(netns_scan)
    };
    let items = namespaces.iter().enumerate().collect();
    parallel::side_by_side(items, NAMESPACES_AT_ONCE, scan_one)
        .into_iter()
        .map(|result| result.unwrap_or_else(|panic| resume_unwind(panic)))
        .collect()
}

/// Gives every listener its owners, and every socket that has no listener.
fn attach_owners(scan: &mut Scan, owners: &OwnerScan) {
    for listener in &mut scan.listeners {
        let inodes = listener.sockets.iter().map(|socket| socket.inode);
        listener.owners = inodes.flat_map(|inode| owners.of(inode)).collect();
        let by_process = |owner: &Owner| (owner.process.id, owner.fd);
        listener.owners.sort_unstable_by_key(by_process);
    }
    scan.targets.par_iter_mut().for_each(|target| {
        if let (None, Some(inode)) = (target.listener, target.socket.inode) {
            target.owners = owners.of(inode).collect();
        }
    });
}

/// Why the search failed.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    #[error("{}", cannot_enter(.0))]
    Enter(#[source] io::Error),
    #[error("cannot open a sock_diag socket ({})", why_no_sock_diag(.0))]
    Open(#[source] io::Error),
    /// A name in the expression does not exist in this network namespace.
    #[error("cannot apply the expression")]
    Expression(#[source] io::Error),
    #[error("cannot list sockets")]
    Dump(#[from] DumpError),
    #[error("cannot look up sockets")]
    Lookup(#[source] io::Error),
    #[error("cannot list processes")]
    Processes(#[from] io::Error),
}

/// The usual cause of an error when a netlink socket is opened.
fn why_no_sock_diag(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::EPROTONOSUPPORT) => "is CONFIG_INET_DIAG in this kernel?",
        Some(libc::EMFILE | libc::ENFILE) => "no descriptor is free for it",
        // systemd's RestrictAddressFamilies= answers EAFNOSUPPORT, a profile of a container mostly EPERM.
        _ => {
            "does a seccomp filter forbid netlink sockets to cwkill: RestrictAddressFamilies= of its unit, the profile of its \
             container?"
        }
    }
}

fn cannot_enter(error: &io::Error) -> String {
    let capability = Capability::CAP_SYS_ADMIN;
    let text = match errno_of(error) {
        Errno::EPERM if privileges::has_capability(capability) => {
            return format!(
                "cannot enter the network namespace ({})",
                refused(capability)
            );
        }
        Errno::EPERM => "cannot enter the network namespace (needs CAP_SYS_ADMIN)",
        // To enter one takes a thread of its own.
        Errno::EAGAIN => {
            "cannot start a thread to enter the network namespace (RLIMIT_NPROC, pids.max of the cgroup)"
        }
        _ => "cannot enter it as a network namespace",
    };
    text.to_owned()
}
