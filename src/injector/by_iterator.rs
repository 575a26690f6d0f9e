//! `destroy` by the kernel's iterator ([`crate::bpf::destroyer`]): each socket is judged and destroyed at one instant.
//!
//! cwkill judges sockets as always, by [`Batch::recheck`] and the plan. The iterator destroys a socket only if nothing has changed in it
//! since it was judged. What has changed is rechecked and tried again, or left alone for the reason that the recheck finds. So all
//! reasons are those of SOCK_DESTROY, and nothing can happen between the judgement and the act.

use nix::errno::Errno;

use super::engine::{Batch, Rules};
use super::way::ByIterator;
use crate::bpf::BpfError;
use crate::bpf::destroyer::{CAPACITY, Chosen, Data, Verdict};
use crate::model::socket::unsent;
use crate::model::{Method, MethodError, Outcome, SkipReason, Socket, Target};
use crate::sock_diag::Protocol;
use crate::tcp::TcpState;

/// How often cwkill tries a socket that changes again and again.
const PASSES: usize = 3;

/// A socket to destroy.
struct Item<'t> {
    target: &'t mut Target,
    chosen: Chosen,
}

/// What to do with targets right before the act. Returns those that are left.
type Prepare<'p> =
    dyn for<'t> FnMut(Vec<&'t mut Target>, &mut Batch<'_>) -> Vec<&'t mut Target> + 'p;

impl ByIterator {
    /// Destroys `targets`, of which the engine has rechecked none, and records an attempt for each on which it acted. `prepare` is called
    /// before. Returns the targets that only SOCK_DESTROY can destroy.
    pub(super) fn destroy<'t>(
        &self,
        mut targets: Vec<&'t mut Target>,
        batch: &mut Batch<'_>,
        prepare: &mut Prepare<'_>,
    ) -> Vec<&'t mut Target> {
        let mut others = Vec::new();
        while !targets.is_empty() && !batch.control().interrupted() {
            let rest = targets.split_off(targets.len().min(CAPACITY));
            let part = batch.leave_reachable(targets);
            let part = prepare(part, batch);
            // That takes a while, and an address can come back meanwhile.
            let part = batch.leave_reachable(part);
            self.destroy_part(part, batch, &mut others);
            targets = rest;
        }
        others
    }

    /// As [`ByIterator::destroy`], for one pass. Adds those that only SOCK_DESTROY can destroy to `others`.
    fn destroy_part<'t>(
        &self,
        targets: Vec<&'t mut Target>,
        batch: &mut Batch<'_>,
        others: &mut Vec<&'t mut Target>,
    ) {
        let (mut items, mut unknown) = (Vec::with_capacity(targets.len()), Vec::new());
        for target in targets {
            if !is_full(&target.socket) {
                others.push(target);
                continue;
            }
            // After an earlier method the socket differs from what was planned for.
            let known = target.acted().is_none();
            match known.then(|| choose(target, &target.socket, batch.rules())) {
                Some(Some(chosen)) => items.push(Item { target, chosen }),
                _ => unknown.push(target),
            }
        }
        items.extend(look_again(unknown, batch, others));
        for pass in 1..=PASSES {
            if items.is_empty() || batch.control().interrupted() {
                return;
            }
            let chosen: Vec<Chosen> = items.iter().map(|item| item.chosen).collect();
            let control = batch.control();
            let verdicts = match self.destroyer.destroy(&chosen, || !control.interrupted()) {
                Ok(verdicts) => verdicts,
                Err(error) => {
                    give_up(items, &error);
                    return;
                }
            };
            let mut destroyed = 0;
            let mut changed = Vec::new();
            for (Item { target, .. }, verdict) in items.into_iter().zip(verdicts) {
                match verdict {
                    Verdict::Destroyed => {
                        destroyed += 1;
                        target.acted_at_one_instant(Method::Destroy);
                    }
                    Verdict::Refused(Errno::EOPNOTSUPP) => others.push(target),
                    Verdict::Refused(errno) => target.record(Method::Destroy, Err(refused(errno))),
                    Verdict::NotSeen | Verdict::Changed | Verdict::Unsent(_) => {
                        changed.push((target, verdict));
                    }
                }
            }
            batch.control().progress(Method::Destroy, destroyed);
            if batch.control().interrupted() {
                return;
            }
            if pass == PASSES {
                leave(changed, others);
                return;
            }
            let changed = changed.into_iter().map(|(target, _)| target).collect();
            items = look_again(changed, batch, others);
        }
    }
}

/// The operator has asked for the iterator, so nothing else is tried.
fn give_up(items: Vec<Item<'_>>, error: &BpfError) {
    for Item { target, .. } in items {
        let error = MethodError::SystemCall("bpf", error.errno());
        target.record(Method::Destroy, Err(error));
    }
}

/// Rechecks `targets`, and chooses them by what they are now.
fn look_again<'t>(
    targets: Vec<&'t mut Target>,
    batch: &mut Batch<'_>,
    others: &mut Vec<&'t mut Target>,
) -> Vec<Item<'t>> {
    let mut items = Vec::with_capacity(targets.len());
    for (target, now) in batch.look_again(targets, false) {
        let now = Socket::from_message(&now);
        let chosen = is_full(&now).then(|| choose(target, &now, batch.rules()));
        match chosen.flatten() {
            Some(chosen) => items.push(Item { target, chosen }),
            None => others.push(target),
        }
    }
    items
}

/// Leaves the targets alone that were different at each pass. The iterator has shown them all but those that were not seen.
fn leave<'t>(changed: Vec<(&'t mut Target, Verdict)>, others: &mut Vec<&'t mut Target>) {
    for (target, verdict) in changed {
        match verdict {
            Verdict::Unsent(send_q) => {
                let unsent = unsent(target.socket.state, send_q);
                target.attempt(Method::Destroy, Some(MethodError::UnsentData(unsent)));
            }
            Verdict::Changed => target.outcome = Some(Outcome::Skipped(SkipReason::InUse)),
            // The kernel's walk can miss a socket if others of its hash bucket vanish.
            _ => others.push(target),
        }
    }
}

/// The socket of `target`, to be destroyed if it is still `seen`; `None` if too little is known of it.
fn choose(target: &Target, seen: &Socket, rules: Rules<'_>) -> Option<Chosen> {
    // As in the recheck: after another method, data and times do not describe the application.
    let compares_data = seen.state == target.socket.state && rules.selectors.depend_on_data();
    let data = match (compares_data, seen.counters) {
        (false, _) => None,
        (true, Some(counters)) => Some(Data {
            unread: seen.listed_recv_q,
            received: counters.received,
            acked: counters.acked,
            written: counters.written,
        }),
        (true, None) => return None,
    };
    // Its own FIN is no data.
    let fin = u32::from(unsent(seen.state, 1) == 0);
    Some(Chosen {
        cookie: seen.cookie().0,
        state: seen.state,
        accepted: seen.inode.is_some(),
        max_send_q: if rules.discard_unsent { u32::MAX } else { fin },
        data,
    })
}

/// Whether the socket can be a full one. The iterator cannot destroy the others.
fn is_full(socket: &Socket) -> bool {
    let is_mini = match socket.state {
        TcpState::TimeWait | TcpState::SynRecv => true,
        // The kernel keeps only a minisocket of most orphans.
        TcpState::FinWait2 => socket.inode.is_none(),
        _ => false,
    };
    socket.protocol() == Protocol::Tcp && !is_mini
}

fn refused(errno: Errno) -> MethodError {
    match errno {
        Errno::ENOENT => MethodError::Gone,
        _ => MethodError::SystemCall("bpf_sock_destroy", errno),
    }
}
