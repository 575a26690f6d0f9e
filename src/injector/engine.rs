//! The engine: runs the planned methods one after the other, each over all sockets that still need it. After each method it
//! waits for the sockets to close. At the end it looks up every socket that has no outcome yet.
//!
//! The engine rechecks the sockets of a batch ([`Executor::batch_size`]) right before the method acts on them. A socket that
//! has changed since it was planned is left alone. The application may still write in the microseconds between the recheck
//! and the act. Only `destroy` by the iterator closes this gap ([`Executor::act_at_one_instant`]).

use std::collections::HashSet;
use std::io;
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::Executor;
use super::way::ByIterator;
use crate::control::{Backoff, Control, deadline};
use crate::filter::selectors::Selectors;
use crate::kernel::KernelVersion;
use crate::model::socket::{is_sending_orphan, unsent};
use crate::model::{Attempt, Method, MethodError, Outcome, SkipReason, Socket, Target};
use crate::routes::{self, Place};
use crate::sock_diag::{
    Cookie, Detail, DiagId, DumpRequest, Family, LookupError, SockDiag, SocketMessage,
};
use crate::sys::errno_of;
use crate::tcp::{StateSet, TcpState};

/// Pauses between two lookups of sockets that are about to close.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(50);

/// For this number of sockets or more, one list of the kernel's tables is cheaper than a lookup of each.
const LIST_FROM: usize = 2048;

/// The current state of a socket.
pub type Lookup = Result<SocketMessage, LookupError>;

/// The kernel's socket tables, which tests replace.
pub trait SocketTables {
    /// Looks up each of `ids`. Returns one answer per id, in the same order.
    ///
    /// # Errors
    /// No socket can be looked up at all.
    fn lookup(&mut self, ids: &[DiagId], detail: Detail) -> io::Result<Vec<Lookup>>;

    /// Lists the sockets in `states`.
    ///
    /// The kernel can omit a socket if others vanish while it lists them. So absence from the list alone proves nothing.
    ///
    /// # Errors
    /// The sockets cannot be listed.
    fn list(&mut self, states: StateSet) -> io::Result<HashSet<Cookie>>;

    /// Those of `places` that are known not to be addresses of this host.
    fn not_local(&mut self, _places: &mut dyn Iterator<Item = Place>) -> HashSet<Place> {
        HashSet::new()
    }
}

impl SocketTables for SockDiag {
    fn lookup(&mut self, ids: &[DiagId], detail: Detail) -> io::Result<Vec<Lookup>> {
        SockDiag::lookup(self, ids, detail)
    }

    fn list(&mut self, states: StateSet) -> io::Result<HashSet<Cookie>> {
        let mut cookies = HashSet::new();
        for family in Family::ALL {
            let request = DumpRequest::plain(family, states);
            let dumped = self.dump(&request, |message| Some(message.id.cookie()));
            cookies.extend(dumped.map_err(io::Error::other)?);
        }
        Ok(cookies)
    }

    fn not_local(&mut self, places: &mut dyn Iterator<Item = Place>) -> HashSet<Place> {
        routes::not_local(places)
    }
}

/// The limits that the operator and the kernel set to the engine.
#[derive(Clone, Copy, Debug)]
pub struct Rules<'a> {
    /// The time that sockets get to close before the next method.
    pub grace: Duration,
    /// Whether unsent bytes may be lost.
    pub discard_unsent: bool,
    /// A socket that these no longer match is left alone.
    pub selectors: &'a Selectors,
    pub kernel_version: KernelVersion,
    /// The better way to destroy sockets, if it can be used.
    pub destroyer: Option<&'a ByIterator>,
}

/// Runs the plan of each target and gives it an outcome. A target that already has an outcome is left alone.
///
/// `kernel` and `executors` must belong to the network namespace of these sockets.
pub fn run(
    targets: &mut [&mut Target],
    executors: &mut [Box<dyn Executor>],
    kernel: &mut dyn SocketTables,
    rules: Rules<'_>,
    control: &dyn Control,
) {
    for target in targets.iter_mut() {
        target.outcome = target.outcome.or(target.plan.skip.map(Outcome::Skipped));
    }
    for executor in executors {
        let mut run = MethodRun::new(executor.method(), kernel, rules, control);
        run.run_method(targets, executor.as_mut());
    }
    verify(targets, kernel);
}

/// Uses the methods of each target up to the first one that acts, and does not wait for the sockets to close. [`run`] does the rest.
///
/// `kernel` and `executors` must belong to the network namespace of these sockets.
pub fn begin(
    targets: &mut [&mut Target],
    executors: &mut [Box<dyn Executor>],
    kernel: &mut dyn SocketTables,
    rules: Rules<'_>,
    control: &dyn Control,
) {
    for executor in executors {
        let mut run = MethodRun::new(executor.method(), kernel, rules, control);
        let untouched = targets
            .iter_mut()
            .map(|target| &mut **target)
            .filter(|target| target.acted().is_none());
        run.act(untouched, executor.as_mut());
    }
}

/// A method at work in one namespace: what an executor may ask and do.
pub struct MethodRun<'a> {
    method: Method,
    kernel: &'a mut dyn SocketTables,
    rules: Rules<'a>,
    control: &'a dyn Control,
}

impl<'a> MethodRun<'a> {
    fn new(
        method: Method,
        kernel: &'a mut dyn SocketTables,
        rules: Rules<'a>,
        control: &'a dyn Control,
    ) -> Self {
        MethodRun {
            method,
            kernel,
            rules,
            control,
        }
    }

    pub(super) fn rules(&self) -> Rules<'a> {
        self.rules
    }
}

impl MethodRun<'_> {
    /// The time to wait for answers.
    pub fn grace(&self) -> Duration {
        self.rules.grace
    }

    /// The time at which the grace is over, if it starts now.
    pub fn deadline(&self) -> Instant {
        deadline(self.control.now(), self.rules.grace)
    }

    /// The clock, the pauses and Ctrl-C.
    pub fn control(&self) -> &dyn Control {
        self.control
    }

    /// Looks up the socket of each item.
    pub fn lookup<T: AsMut<Target>>(&mut self, items: Vec<T>) -> Vec<(T, Lookup)> {
        lookup(self.kernel, items, Detail::TcpInfo)
    }

    /// Looks up the socket of each item, and returns the items whose socket has not changed since the plan. The others get
    /// their outcome, or an attempt with the reason. `after_segment`: the executor has sent a segment that may have closed them.
    pub fn recheck<T: AsMut<Target>>(&mut self, items: Vec<T>, after_segment: bool) -> Vec<T> {
        let eligible = self.look_again(items, after_segment).into_iter();
        eligible.map(|(item, _)| item).collect()
    }

    /// As [`MethodRun::recheck`], with the socket of each item as it is now.
    pub(super) fn look_again<T: AsMut<Target>>(
        &mut self,
        items: Vec<T>,
        after_segment: bool,
    ) -> Vec<(T, SocketMessage)> {
        let detail = match self.rules.selectors.depend_on_data() {
            true => Detail::TcpInfo,
            false => Detail::Basic,
        };
        let method = self.method;
        let mut eligible = Vec::with_capacity(items.len());
        for (mut item, now) in lookup(self.kernel, items, detail) {
            let target = item.as_mut();
            match now {
                Err(LookupError::NotFound) => {
                    // The peer answered the segment with RST.
                    if after_segment {
                        target.attempt(method, None);
                    }
                    target.note_vanished();
                }
                Err(LookupError::Errno(errno)) => {
                    target.attempt(method, Some(lookup_failed(errno)));
                }
                Ok(now) if ends_in_time_wait(&target.socket, &now) => target.note_time_wait(),
                Ok(now) => match check(target, &now, method, &self.rules) {
                    Check::Act => eligible.push((item, now)),
                    Check::Decide(outcome) => target.outcome = Some(outcome),
                    Check::Refuse(error) => target.attempt(method, Some(error)),
                },
            }
        }
        eligible
    }

    /// Refuses the targets whose local address is not of this host now, with an attempt that says so. Returns the others. A segment
    /// to the address would leave this host, perhaps for the host that has the address now.
    pub fn refuse_lost_addresses<'t>(
        &mut self,
        targets: Vec<&'t mut Target>,
    ) -> Vec<&'t mut Target> {
        let not_local = self.not_local(&targets);
        let (lost, here): (Vec<_>, Vec<_>) = targets
            .into_iter()
            .partition(|target| target.socket.has_lost_address(&not_local));
        for target in lost {
            target.attempt(self.method, Some(MethodError::AddressGone));
        }
        here
    }

    fn not_local(&mut self, targets: &[&mut Target]) -> HashSet<Place> {
        let mut places = targets.iter().map(|target| target.socket.place());
        self.kernel.not_local(&mut places)
    }

    /// Acts on every target that is planned for the method and still exists, then waits for all of them together.
    fn run_method(&mut self, targets: &mut [&mut Target], executor: &mut dyn Executor) {
        let targets = targets.iter_mut().map(|target| &mut **target);
        let planned = self.act(targets, executor);
        self.wait_for(planned);
    }

    /// Acts on every target that is planned for the method and still exists, except those on which the method was used before.
    /// Returns all that are planned for the method.
    fn act<'t>(
        &mut self,
        targets: impl Iterator<Item = &'t mut Target>,
        executor: &mut dyn Executor,
    ) -> Vec<&'t mut Target> {
        let method = self.method;
        let is_planned = |target: &&mut Target| {
            target.outcome.is_none() && target.plan.methods.contains(&method)
        };
        let (mut planned, done): (Vec<_>, Vec<_>) =
            targets.filter(is_planned).partition(|target| {
                let mut attempts = target.attempts.iter();
                attempts.all(|attempt| attempt.method != method)
            });
        let all = planned.iter_mut().map(|target| &mut **target).collect();
        let mut left = executor.act_at_one_instant(all, self);
        for chunk in left.chunks_mut(executor.batch_size()) {
            if self.control.interrupted() {
                break;
            }
            let chunk = chunk.iter_mut().map(|target| &mut **target).collect();
            let chunk = self.skip_returned_addresses(chunk);
            let eligible = self.recheck(chunk, false);
            let count = eligible.len();
            executor.act(eligible, self);
            self.control.progress(method, count);
        }
        planned.extend(done);
        planned
    }

    /// If only sockets without their local address are selected: skips the targets whose address has come back. Returns the others.
    pub(super) fn skip_returned_addresses<'t>(
        &mut self,
        targets: Vec<&'t mut Target>,
    ) -> Vec<&'t mut Target> {
        if !self.rules.selectors.address_gone {
            return targets;
        }
        let not_local = self.not_local(&targets);
        let (lost, back): (Vec<_>, Vec<_>) = targets.into_iter().partition(|target| {
            target.acted().is_some() || target.socket.has_lost_address(&not_local)
        });
        for target in back {
            target.outcome = Some(Outcome::Skipped(SkipReason::NoLongerSelected));
        }
        lost
    }

    /// Waits until the targets on which this method acted last are closed, at most for the grace.
    fn wait_for(&mut self, targets: Vec<&mut Target>) {
        let method = self.method;
        let requested = |target: &&mut Target| {
            let last = target.attempts.last().filter(|last| last.method == method);
            target.outcome.is_none()
                && last.is_some_and(|last| {
                    matches!(last.error, None | Some(MethodError::AnswerLost(_)))
                })
        };
        let requested: Vec<&mut Target> = targets.into_iter().filter(requested).collect();
        let pending = match method {
            Method::Destroy if requested.len() >= LIST_FROM => self.not_destroyed(requested),
            _ => requested,
        };
        self.wait(pending);
    }

    /// Verifies many destroyed sockets with one list of the kernel's tables. Returns those that the list does not confirm: they
    /// are still in it, or were in a state from which a socket can change to states that the list does not contain.
    ///
    /// The kernel acknowledges a request after the socket has left the tables (net/ipv4/tcp.c, tcp_abort). The list confirms
    /// that independently, at a tenth of the cost of one lookup per socket.
    fn not_destroyed<'t>(&mut self, requested: Vec<&'t mut Target>) -> Vec<&'t mut Target> {
        // Without ESTABLISHED: there may be many open connections.
        let states = StateSet::from(TcpState::CloseWait).union(TcpState::LastAck.into());
        let Ok(listed) = self.kernel.list(states) else {
            return requested;
        };
        let is_acknowledged =
            |last: &Attempt| last.method == Method::Destroy && last.error.is_none();
        let (confirmed, unconfirmed): (Vec<_>, Vec<_>) =
            requested.into_iter().partition(|target| {
                target.attempts.last().is_some_and(is_acknowledged)
                    && target.socket.state == TcpState::CloseWait
                    && !listed.contains(&target.socket.cookie())
            });
        for target in confirmed {
            target.note_vanished();
        }
        unconfirmed
    }

    /// Waits until the sockets of `pending` are closed, at most for the grace.
    fn wait(&mut self, pending: Vec<&mut Target>) {
        let note_closed = |target: &mut Target, now: &Lookup| {
            match now {
                Err(LookupError::NotFound) => target.note_vanished(),
                Ok(now) if ends_in_time_wait(&target.socket, now) => target.note_time_wait(),
                Ok(_) | Err(LookupError::Errno(_)) => return false,
            }
            true
        };
        let backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
        self.wait_until(pending, backoff, note_closed);
    }

    /// Looks up the sockets of `pending` until `note` returns true for each, at most for the grace. Returns the items for which
    /// it did, and the others. `note` writes the result to the target at once, so that it is not lost if a later step panics.
    pub(super) fn wait_until<T: AsMut<Target>>(
        &mut self,
        mut pending: Vec<T>,
        mut backoff: Backoff,
        note: impl Fn(&mut Target, &Lookup) -> bool,
    ) -> (Vec<T>, Vec<T>) {
        let until = self.deadline();
        let mut done = Vec::with_capacity(pending.len());
        loop {
            let mut left = Vec::new();
            for (mut item, now) in lookup(self.kernel, pending, Detail::Basic) {
                match note(item.as_mut(), &now) {
                    true => done.push(item),
                    false => left.push(item),
                }
            }
            pending = left;
            let over = self.control.now() >= until;
            if pending.is_empty() || over || self.control.interrupted() {
                return (done, pending);
            }
            backoff.sleep(self.control, until);
        }
    }
}

/// Looks up the socket of each item. If the lookup fails as a whole, each item gets that error, so that earlier attempts are
/// still reported.
fn lookup<T: AsMut<Target>>(
    kernel: &mut dyn SocketTables,
    mut items: Vec<T>,
    detail: Detail,
) -> Vec<(T, Lookup)> {
    let ids: Vec<DiagId> = items
        .iter_mut()
        .map(|item| item.as_mut().socket.id)
        .collect();
    match kernel.lookup(&ids, detail) {
        Ok(answers) => items.into_iter().zip(answers).collect(),
        Err(error) => {
            let failure = LookupError::Errno(errno_of(&error));
            let fail = |item| (item, Err(failure));
            items.into_iter().map(fail).collect()
        }
    }
}

pub(super) fn lookup_failed(errno: Errno) -> MethodError {
    MethodError::SystemCall("sock_diag lookup", errno)
}

/// Gives every target without an outcome the outcome that follows from the kernel's tables.
fn verify(targets: &mut [&mut Target], kernel: &mut dyn SocketTables) {
    let open = targets
        .iter_mut()
        .map(|target| &mut **target)
        .filter(|target| target.outcome.is_none())
        .collect();
    for (target, now) in lookup(kernel, open, Detail::Basic) {
        match now {
            Err(LookupError::NotFound) => target.note_vanished(),
            Ok(now) if ends_in_time_wait(&target.socket, &now) => target.note_time_wait(),
            Ok(now) if now.state != target.socket.state => {
                target.outcome = Some(match target.acted() {
                    Some(method) => Outcome::Closing(method, now.state),
                    None => Outcome::Gone,
                });
            }
            Err(LookupError::Errno(errno)) => {
                let method = target.acted().or(target.plan.methods.first().copied());
                if let Some(method) = method {
                    target.attempt(method, Some(lookup_failed(errno)));
                }
                target.outcome = Some(Outcome::Failed);
            }
            Ok(_) => target.outcome = Some(unchanged(target)),
        }
    }
}

/// The outcome of a target whose socket is still in the state in which it was found.
fn unchanged(target: &Target) -> Outcome {
    if target.attempts.is_empty() {
        return Outcome::Skipped(SkipReason::Interrupted);
    }
    // Skipped only if no method acted, each because of unsent bytes.
    let mut protected = None;
    for attempt in &target.attempts {
        match attempt.error {
            Some(MethodError::UnsentData(bytes)) => protected = Some(bytes),
            _ => return Outcome::Failed,
        }
    }
    protected.map_or(Outcome::Failed, |bytes| {
        Outcome::Skipped(SkipReason::UnsentData(bytes))
    })
}

/// Whether the connection is over: in TIME-WAIT the kernel keeps the address pair, but not the socket. A socket that was
/// already found in TIME-WAIT has not changed.
fn ends_in_time_wait(planned: &Socket, now: &SocketMessage) -> bool {
    now.state == TcpState::TimeWait && planned.state != TcpState::TimeWait
}

enum Check {
    Act,
    Decide(Outcome),
    /// The method must not be used on it.
    Refuse(MethodError),
}

/// Compares the current state of a socket with the one that was planned for.
fn check(target: &Target, now: &SocketMessage, method: Method, rules: &Rules<'_>) -> Check {
    let planned = &target.socket;
    let changed = now.state != planned.state;
    if changed && target.acted().is_none() {
        return Check::Decide(Outcome::Gone);
    }
    // If an earlier method has changed the state, the times and the cause no longer describe the application.
    if !changed {
        let fresh = planned.later(now);
        if planned.inode.is_none() && fresh.inode.is_some() {
            return Check::Decide(Outcome::Skipped(SkipReason::Accepted));
        }
        if !rules.selectors.still_matches(&fresh) {
            return Check::Decide(Outcome::Skipped(SkipReason::NoLongerSelected));
        }
        if rules.selectors.finds_in_use(&fresh) {
            return Check::Decide(Outcome::Skipped(SkipReason::InUse));
        }
    }
    if is_sending_orphan(now.state, now.inode)
        && method.can_leave_orphan(now.state, rules.kernel_version)
    {
        return Check::Refuse(MethodError::OrphanOnOldKernel);
    }
    let unsent = unsent(now.state, now.send_q);
    if unsent > 0 && method.discards_unsent() && !rules.discard_unsent {
        return Check::Refuse(MethodError::UnsentData(unsent));
    }
    Check::Act
}

#[cfg(test)]
#[path = "engine_tests.rs"]
mod tests;
#[cfg(test)]
#[path = "engine_world.rs"]
mod world;
