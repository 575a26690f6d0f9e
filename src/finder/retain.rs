//! Drops the sockets that the selectors leave out, and keeps count of those that may match although cwkill could not see their owner.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use super::owners::OwnerScan;
use crate::filter::containers::Match;
use crate::filter::selectors::Selectors;
use crate::model::{Listener, Owner, Scan, Target};
use crate::proc::netns::Netns;
use crate::sock_diag::{Detail, DiagId, LookupError, SockDiag, SocketMessage};

/// Sockets that were left out although they may match.
#[derive(Default)]
pub(super) struct Possible {
    /// No process that cwkill could read has them.
    pub(super) without_owner: Vec<Target>,
    /// The name of the container of their owner could not be read.
    pub(super) without_name: Vec<Target>,
}

/// Keeps the selected sockets with their listeners, and counts those that are left alone because they are too young or in use. Returns
/// the sockets that were left out although they may match, as [`retain_of_owners`].
pub(super) fn retain_selected(
    scan: &mut Scan,
    selectors: &Selectors,
    owners: &OwnerScan,
    shows_descriptors: &dyn Fn(i32) -> bool,
) -> Possible {
    let mut possible = retain_of_owners(scan, selectors, owners, shows_descriptors);
    let is_old = |target: &Target| !selectors.finds_too_young(&target.socket);
    let is_idle = |target: &Target| !selectors.finds_in_use(&target.socket);
    for targets in [&mut possible.without_owner, &mut possible.without_name] {
        targets.retain(|target| is_old(target) && is_idle(target));
    }
    let matched = scan.targets.len();
    scan.targets.retain(is_old);
    scan.younger = matched - scan.targets.len();
    let old = scan.targets.len();
    scan.targets.retain(is_idle);
    scan.in_use = old - scan.targets.len();
    if scan.younger + scan.in_use > 0 {
        retain_used_listeners(scan);
    }
    possible
}

/// Keeps the sockets that have a selected owner, or whose listener has one, and the listeners of these sockets. Selected owners
/// come first. Returns the sockets that were left out although they may match.
/// `shows_descriptors` says whether /proc shows the descriptors of a pid.
fn retain_of_owners(
    scan: &mut Scan,
    selectors: &Selectors,
    owners: &OwnerScan,
    shows_descriptors: &dyn Fn(i32) -> bool,
) -> Possible {
    scan.targets
        .retain(|target| selectors.match_user(target.socket.uid));
    if !selectors.selects_owners() {
        return Possible::default();
    }
    let of_owner = |owner: &Owner| selectors.of_owner(&owner.process);
    let selected = |owner: &Owner| of_owner(owner) == Match::Yes;
    let decide = |listener: &Listener| Selected::by_listener(listener, owners, &of_owner);
    let by_listener: Vec<Selected> = scan.listeners.iter().map(decide).collect();
    for listener in &mut scan.listeners {
        listener.owners.sort_by_key(|owner| !selected(owner));
    }
    let may_be_unseen = scan.coverage.hidden_processes
        || selectors.could_match(&owners.unreadable)
        || selectors.could_match_unseen(shows_descriptors);
    let mut possible = Possible::default();
    let mut undecided_in_group = 0;
    for mut target in std::mem::take(&mut scan.targets) {
        target.owners.sort_by_key(|owner| !selected(owner));
        let decided = match target.listener {
            Some(listener) => by_listener[listener],
            None => Selected::by_owners(&target.owners, &of_owner),
        };
        // Neither an orphan nor a connection whose listener has been closed has an owner.
        let has_owner = target.socket.inode.is_some() || target.listener.is_some();
        match decided {
            Selected::Yes => scan.targets.push(target),
            Selected::PartOfGroup => undecided_in_group += 1,
            Selected::NoOwner if may_be_unseen && has_owner => possible.without_owner.push(target),
            Selected::Unnamed => possible.without_name.push(target),
            Selected::NoOwner | Selected::No => {}
        }
    }
    scan.coverage.undecided_in_group = undecided_in_group;
    retain_used_listeners(scan);
    possible
}

/// Drops the listeners that are not of a target.
fn retain_used_listeners(scan: &mut Scan) {
    let used: BTreeSet<usize> = scan.targets.iter().filter_map(|t| t.listener).collect();
    let places: HashMap<usize, usize> = used.into_iter().zip(0..).collect();
    for target in &mut scan.targets {
        target.listener = target.listener.map(|index| places[&index]);
    }
    let listeners = std::mem::take(&mut scan.listeners).into_iter().enumerate();
    let used = listeners.filter(|(index, _)| places.contains_key(index));
    scan.listeners = used.map(|(_, listener)| listener).collect();
}

/// The number of sockets in `without_owner` that still have a descriptor. An owner may have closed one after it was listed and
/// before the descriptors of the owner were read.
pub(super) fn count_undecided(namespaces: &[Arc<Netns>], without_owner: &[Target]) -> usize {
    /// So many do not vanish all in that time, so they are not looked up.
    const MAX_LOOKED_UP: usize = 1000;
    if without_owner.len() > MAX_LOOKED_UP {
        return without_owner.len();
    }
    let in_namespace = |(index, netns): (usize, &Arc<Netns>)| {
        let targets = without_owner.iter();
        let targets: Vec<&Target> = targets.filter(|t| t.socket.netns == index).collect();
        if targets.is_empty() {
            return 0;
        }
        let ids: Vec<DiagId> = targets.iter().map(|target| target.socket.id).collect();
        let look_up = || SockDiag::open()?.lookup(&ids, Detail::Basic);
        match netns.within(look_up).and_then(|answers| answers) {
            Ok(answers) => {
                let pairs = targets.iter().zip(&answers);
                let is_closed = |(target, answer): &(&&Target, &Result<SocketMessage, _>)| {
                    target.socket.inode.is_some()
                        && match answer {
                            Ok(message) => message.inode == 0,
                            Err(error) => matches!(error, LookupError::NotFound),
                        }
                };
                targets.len() - pairs.filter(is_closed).count()
            }
            Err(_) => targets.len(),
        }
    };
    namespaces.iter().enumerate().map(in_namespace).sum()
}

/// Whether the selectors of owners select a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Selected {
    Yes,
    No,
    /// It has no known owner.
    NoOwner,
    /// The name of the container of its owner could not be read.
    Unnamed,
    /// It waits at one of several listening sockets, and only some of these have a selected owner.
    PartOfGroup,
}

impl Selected {
    fn by_owners(owners: &[Owner], of_owner: &impl Fn(&Owner) -> Match) -> Self {
        match owners.iter().map(of_owner).max() {
            None => Selected::NoOwner,
            Some(Match::Yes) => Selected::Yes,
            Some(Match::Unknown) => Selected::Unnamed,
            Some(Match::No) => Selected::No,
        }
    }

    /// The answer for the connections that wait at `listener`: that of its listening sockets, if it is the same for all.
    fn by_listener(
        listener: &Listener,
        owners: &OwnerScan,
        of_owner: &impl Fn(&Owner) -> Match,
    ) -> Self {
        let by_socket: Vec<Selected> = listener
            .inodes()
            .map(|inode| {
                let owners: Vec<Owner> = owners.of(inode).collect();
                Selected::by_owners(&owners, of_owner)
            })
            .collect();
        let are_all = |answer| by_socket.iter().all(|one| *one == answer);
        if are_all(Selected::Yes) {
            Selected::Yes
        } else if by_socket.contains(&Selected::Yes) {
            Selected::PartOfGroup
        } else if by_socket.contains(&Selected::NoOwner) {
            Selected::NoOwner
        } else if by_socket.contains(&Selected::Unnamed) {
            Selected::Unnamed
        } else {
            Selected::No
        }
    }
}
