//! `destroy` by the kernel's iterator ([`crate::bpf::destroyer`]): each socket is judged and destroyed at one instant.
//!
//! cwkill judges sockets as always, by [`MethodRun::recheck`] and the plan. The iterator destroys a socket only if nothing has changed in it
//! since it was judged. What has changed is rechecked and tried again, or left alone for the reason that the recheck finds. So all
//! reasons are those of SOCK_DESTROY, and nothing can happen between the judgement and the act.

use nix::errno::Errno;

use super::engine::{MethodRun, Rules};
use super::revive::Revived;
use super::way::ByIterator;
use crate::bpf::destroyer::{CAPACITY, Chosen, Data, Verdict, Walk};
use crate::bpf::walk::End;
use crate::model::socket::unsent;
use crate::model::{Method, MethodError, Outcome, SkipReason, Socket, Target};
use crate::sock_diag::Protocol;
use crate::tcp::TcpState;

/// How often cwkill tries a socket that changes again and again.
const PASSES: usize = 3;

/// A target that is about to be destroyed.
struct Doomed<'t> {
    target: &'t mut Target,
    /// Its peer was sent a probe, and may answer it with RST.
    probed: bool,
}

impl AsMut<Target> for Doomed<'_> {
    fn as_mut(&mut self) -> &mut Target {
        self.target
    }
}

/// What to do with targets right before the act. Returns those that are left.
type Prepare<'p> = dyn for<'t> FnMut(Vec<&'t mut Target>, &mut MethodRun<'_>) -> Revived<'t> + 'p;

impl ByIterator {
    /// Destroys `targets`, of which the engine has rechecked none, and records an attempt for each on which it acted. `prepare` is called
    /// before. Returns the targets that are left to SOCK_DESTROY.
    pub(super) fn destroy<'t>(
        &self,
        mut targets: Vec<&'t mut Target>,
        run: &mut MethodRun<'_>,
        prepare: &mut Prepare<'_>,
    ) -> Vec<&'t mut Target> {
        let can_be_walked = targets.iter().filter(|target| is_full(&target.socket));
        let count = can_be_walked.count();
        if count == 0 || !self.pays(count) {
            return targets;
        }
        let mut others = Vec::new();
        while !targets.is_empty() && !run.control().interrupted() {
            let rest = targets.split_off(targets.len().min(CAPACITY));
            let part = run.skip_returned_addresses(targets);
            let Revived {
                others: quiet,
                probed,
            } = prepare(part, run);
            let mut part = Vec::with_capacity(quiet.len() + probed.len());
            for (targets, probed) in [(quiet, false), (probed, true)] {
                // That took a while, and an address can come back meanwhile.
                let targets = run.skip_returned_addresses(targets).into_iter();
                part.extend(targets.map(|target| Doomed { target, probed }));
            }
            self.destroy_part(part, run, &mut others);
            targets = rest;
        }
        others
    }

    /// As [`ByIterator::destroy`], for one pass. Adds those that are left to SOCK_DESTROY to `others`.
    fn destroy_part<'t>(
        &self,
        doomed: Vec<Doomed<'t>>,
        run: &mut MethodRun<'_>,
        others: &mut Vec<&'t mut Target>,
    ) {
        let (mut chosen, mut unknown) = (Vec::with_capacity(doomed.len()), Vec::new());
        for Doomed { target, probed } in doomed {
            if !is_full(&target.socket) {
                others.push(target);
                continue;
            }
            // After an earlier method the socket differs from what was planned for.
            let known = target.acted().is_none();
            match known.then(|| choose(target, &target.socket, run.rules())) {
                Some(Some(socket)) => chosen.push((Doomed { target, probed }, socket)),
                _ => unknown.push(Doomed { target, probed }),
            }
        }
        chosen.extend(look_again(unknown, run, others));
        for pass in 1..=PASSES {
            if chosen.is_empty() || run.control().interrupted() {
                return;
            }
            let (doomed, sockets): (Vec<Doomed<'t>>, Vec<Chosen>) = chosen.into_iter().unzip();
            let control = run.control();
            let Walk { verdicts, end } =
                self.destroyer.destroy(&sockets, || !control.interrupted());
            let mut destroyed = 0;
            let mut changed = Vec::new();
            for (it, verdict) in doomed.into_iter().zip(verdicts) {
                match verdict {
                    Verdict::Destroyed => {
                        destroyed += 1;
                        it.target.acted_at_one_instant(Method::Destroy);
                    }
                    Verdict::Refused(Errno::EOPNOTSUPP) => others.push(it.target),
                    Verdict::Refused(errno) => {
                        it.target.record(Method::Destroy, Err(refused(errno)));
                    }
                    Verdict::NotSeen
                    | Verdict::Changed
                    | Verdict::Unsent(_)
                    | Verdict::NotReached => changed.push((it, verdict)),
                }
            }
            run.control().progress(Method::Destroy, destroyed);
            if run.control().interrupted() {
                return;
            }
            if pass == PASSES && matches!(end, End::Whole) {
                leave(changed, others);
                return;
            }
            let changed = changed.into_iter().map(|(it, _)| it).collect();
            chosen = look_again(changed, run, others);
            let why = match end {
                End::Whole => continue,
                End::Stopped | End::HeldUp => MethodError::WalkHeldUp,
                End::Failed(error) => MethodError::SystemCall("bpf", error.errno()),
            };
            for (Doomed { target, .. }, _) in chosen {
                match self.is_required {
                    // The operator has asked for the iterator, so nothing else is tried.
                    true => target.record(Method::Destroy, Err(why.clone())),
                    false => others.push(target),
                }
            }
            return;
        }
    }
}

/// Rechecks the targets, and chooses them by what they are now.
fn look_again<'t>(
    doomed: Vec<Doomed<'t>>,
    run: &mut MethodRun<'_>,
    others: &mut Vec<&'t mut Target>,
) -> Vec<(Doomed<'t>, Chosen)> {
    let mut chosen = Vec::with_capacity(doomed.len());
    let (probed, quiet): (Vec<_>, Vec<_>) = doomed.into_iter().partition(|it| it.probed);
    for (doomed, after_segment) in [(quiet, false), (probed, true)] {
        for (it, now) in run.look_again(doomed, after_segment) {
            let now = Socket::from_message(&now);
            let socket = is_full(&now).then(|| choose(it.target, &now, run.rules()));
            match socket.flatten() {
                Some(socket) => chosen.push((it, socket)),
                None => others.push(it.target),
            }
        }
    }
    chosen
}

/// Leaves the targets alone that were different at each pass. The iterator has shown them all but those that were not seen.
fn leave<'t>(changed: Vec<(Doomed<'t>, Verdict)>, others: &mut Vec<&'t mut Target>) {
    for (Doomed { target, .. }, verdict) in changed {
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
