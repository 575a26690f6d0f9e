//! The ladder: tries the planned methods one after the other, all sockets of one rung together, and
//! verifies each socket against the kernel by its cookie.
//!
//! Right before an act the socket is looked at again, as many at a time as the method takes
//! ([`Method::batch`]). What has changed since the plan is left alone. Between that look and the act
//! lie some microseconds in which the application may still write; no interface of the kernel closes
//! this gap.

use std::collections::HashSet;
use std::fmt;
use std::io;
use std::time::{Duration, Instant};

use super::{ActError, Method, MethodName, Scene, Target, same_errno};
use crate::filter::selectors::Selectors;
use crate::finder::{Found, Socket};
use crate::injector::plan::{Exclusion, Plan};
use crate::kernel::KernelVersion;
use crate::model::cause;
use crate::sock_diag::{
    Cookie, Detail, DiagId, DumpRequest, Family, LookupError, SockDiag, SocketMessage,
};
use crate::tcp::{StateSet, TcpState};

/// Pauses between looks at sockets that are about to close: from a loopback's answer to an ocean's.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(50);

/// Sockets from which a list of the kernel's tables is cheaper than a question for each.
const MANY: usize = 2048;

/// What became of a matched socket.
#[derive(Debug)]
pub struct Outcome {
    /// The one verdict.
    pub verdict: Verdict,
    /// Every method tried, in order.
    pub attempts: Vec<Attempt>,
}

/// One method tried on one socket.
#[derive(Debug)]
pub struct Attempt {
    /// The method.
    pub method: MethodName,
    /// Why it did nothing, if it did.
    pub error: Option<ActError>,
}

/// The one outcome of a socket.
#[derive(Debug)]
pub enum Verdict {
    /// It is no longer in the kernel's tables, by this method.
    Closed(MethodName),
    /// It has left its state by this method, and waits for its peer.
    Closing(MethodName, TcpState),
    /// It left its state on its own before the act.
    Gone,
    /// It is left alone.
    Skipped(Skip),
    /// It is still there; the attempts say why.
    Failed,
}

/// Why a socket was left alone.
#[derive(Debug, PartialEq, Eq)]
pub enum Skip {
    /// No method can work, each for its reason.
    NoMethod(Vec<(MethodName, Exclusion)>),
    /// --max-kills was reached by older sockets.
    OverLimit,
    /// Bytes were written after the plan was made, and an abort would lose them.
    Unsent(u32),
    /// It no longer has the age or the cause asked for.
    NoLongerSelected,
    /// The application accepted it after the plan was made.
    Accepted,
    /// The peer answered a probe: the connection is in use, or half-closed by intention.
    PeerAlive,
    /// The run was interrupted before anything was done to it.
    Interrupted,
}

impl Skip {
    /// Why `plan` leaves its socket alone, if it does.
    fn planned(plan: &Plan) -> Option<Skip> {
        if plan.over_limit {
            Some(Skip::OverLimit)
        } else if plan.methods.is_empty() {
            Some(Skip::NoMethod(plan.excluded.clone()))
        } else {
            None
        }
    }
}

impl Outcome {
    /// The step that fails where something ends in a panic.
    pub const BUG: &str = "a bug of cwkill, list again to see the state";

    /// Of a socket of which it is not known what was done to it, because `step` failed, with EIO if there is no errno.
    pub fn unknown(plan: &Plan, step: &'static str, errno: Option<i32>) -> Self {
        let errno = errno.unwrap_or(libc::EIO);
        let error = || ActError::Os(step, io::Error::from_raw_os_error(errno));
        let attempts = plan.methods.iter().map(|&method| Attempt {
            method,
            error: Some(error()),
        });
        Outcome {
            attempts: attempts.collect(),
            verdict: Skip::planned(plan).map_or(Verdict::Failed, Verdict::Skipped),
        }
    }
}

impl fmt::Display for Skip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Skip::NoMethod(excluded) => {
                for (index, (method, why)) in excluded.iter().enumerate() {
                    let separator = if index == 0 { "" } else { "; " };
                    write!(f, "{separator}{method}: {why}")?;
                }
                Ok(())
            }
            Skip::OverLimit => f.write_str("over --max-kills"),
            Skip::Unsent(bytes) => write!(
                f,
                "would lose {bytes} unsent bytes (--discard-unsent allows it)"
            ),
            Skip::NoLongerSelected => f.write_str("no longer has the age or cause asked for"),
            Skip::Accepted => f.write_str("the application accepted it meanwhile"),
            Skip::PeerAlive => f.write_str("peer is alive"),
            Skip::Interrupted => f.write_str("interrupted"),
        }
    }
}

/// What was seen of some sockets, in the order they were asked for.
pub type Looks = Vec<Result<SocketMessage, LookupError>>;

/// How the ladder sees the kernel.
pub trait Observe {
    /// Looks at each of `ids` now, in order.
    ///
    /// # Errors
    /// Only when none of them can be looked at.
    fn observe(&mut self, ids: &[DiagId], detail: Detail) -> io::Result<Looks>;

    /// Lists the sockets in `states`.
    ///
    /// A list can lack a socket when others vanish while it is made, so absence from it proves nothing alone.
    ///
    /// # Errors
    /// The kernel gives no list.
    fn list(&mut self, states: StateSet) -> io::Result<HashSet<Cookie>>;
}

impl Observe for SockDiag {
    fn observe(&mut self, ids: &[DiagId], detail: Detail) -> io::Result<Looks> {
        self.lookup(ids, detail)
    }

    fn list(&mut self, states: StateSet) -> io::Result<HashSet<Cookie>> {
        let mut cookies = HashSet::new();
        for family in Family::ALL {
            let request = DumpRequest {
                family,
                states,
                info: false,
                bytecode: &[],
            };
            let dumped = self.dump(&request, |message| Some(message.id.cookie()));
            cookies.extend(dumped.map_err(io::Error::other)?);
        }
        Ok(cookies)
    }
}

/// What the ladder takes from its control; several ladders may stand in the same.
pub trait Control: Sync {
    /// A clock that never goes back.
    fn now(&self) -> Instant;
    /// From now on sockets are acted on, and there may be something to put back.
    fn begin(&self) {}
    /// Waits.
    fn sleep(&self, duration: Duration);
    /// Whether the operator wants to stop. What is begun is still verified.
    fn interrupted(&self) -> bool;
    /// So many sockets more have been dealt with by `method`.
    fn progress(&self, method: MethodName, sockets: usize);
}

/// What the ladder must keep to.
#[derive(Clone, Copy, Debug)]
pub struct Rules<'a> {
    /// How long the sockets of a rung get to close.
    pub grace: Duration,
    /// Whether unsent bytes may be lost.
    pub discard_unsent: bool,
    /// What the operator selected.
    pub selectors: &'a Selectors,
    /// The running kernel.
    pub kernel: KernelVersion,
}

/// Runs `plans` over the sockets of `found` whose indices are `members`; one outcome each, in order.
///
/// `kernel` and `methods` must be of the network namespace these sockets are in.
pub fn climb(
    found: &Found,
    plans: &[Plan],
    members: &[usize],
    methods: &mut [Box<dyn Method>],
    kernel: &mut dyn Observe,
    rules: Rules<'_>,
    control: &dyn Control,
) -> Vec<Outcome> {
    let mut ladder = Ladder {
        found,
        members,
        climbers: members.iter().map(|&at| Climber::new(&plans[at])).collect(),
        kernel,
        rules,
        control,
    };
    for method in methods {
        ladder.rung(plans, method.as_mut());
    }
    ladder.last_look(plans);
    ladder.climbers.into_iter().map(Climber::outcome).collect()
}

/// Verifies sockets on which SOCK_DESTROY was used with these results; one outcome each, in order.
///
/// `kernel` must be of the network namespace these sockets are in.
pub fn verify_destroyed(
    found: &Found,
    plans: &[Plan],
    results: Vec<Result<(), ActError>>,
    kernel: &mut dyn Observe,
    rules: Rules<'_>,
    control: &dyn Control,
) -> Vec<Outcome> {
    let members: Vec<usize> = (0..found.sockets.len()).collect();
    let mut ordered = Vec::with_capacity(members.len());
    let mut climbers = Vec::with_capacity(members.len());
    for (at, (plan, result)) in plans.iter().zip(results).enumerate() {
        if let Ok(()) | Err(ActError::Unanswered(_)) = result {
            ordered.push(at);
        }
        let mut climber = Climber::new(plan);
        climber.attempt(MethodName::Destroy, result.err());
        climbers.push(climber);
    }
    let mut ladder = Ladder {
        found,
        members: &members,
        climbers,
        kernel,
        rules,
        control,
    };
    ladder.wait_for(MethodName::Destroy, ordered);
    ladder.last_look(plans);
    ladder.climbers.into_iter().map(Climber::outcome).collect()
}

/// A socket on its way up.
struct Climber {
    attempts: Vec<Attempt>,
    /// The last method whose act the kernel took.
    acted: Option<MethodName>,
    /// A later one that may have closed the socket although it seemed to fail: an order whose answer was
    /// lost, an RST still on its way through a busy kernel.
    perhaps: Option<MethodName>,
    verdict: Option<Verdict>,
}

impl Climber {
    fn new(plan: &Plan) -> Self {
        Climber {
            attempts: Vec::new(),
            acted: None,
            perhaps: None,
            verdict: Skip::planned(plan).map(Verdict::Skipped),
        }
    }

    fn settle(&mut self, verdict: Verdict) {
        self.verdict = Some(verdict);
    }

    /// Notes that the socket is no longer in the kernel's tables.
    fn vanished(&mut self) {
        self.settle(match self.perhaps.or(self.acted) {
            Some(method) => Verdict::Closed(method),
            None => Verdict::Gone,
        });
    }

    fn attempt(&mut self, method: MethodName, error: Option<ActError>) {
        match error {
            None => {
                self.acted = Some(method);
                self.perhaps = None;
            }
            Some(ActError::RstIgnored | ActError::Unanswered(_)) => self.perhaps = Some(method),
            Some(_) => {}
        }
        self.attempts.push(Attempt { method, error });
    }

    /// The unsent bytes, if they alone kept every method from acting.
    fn only_protected(&self) -> Option<u32> {
        let mut bytes = None;
        for attempt in &self.attempts {
            match attempt.error {
                Some(ActError::Unsent(unsent)) => bytes = Some(unsent),
                _ => return None,
            }
        }
        bytes
    }

    fn outcome(self) -> Outcome {
        Outcome {
            verdict: self.verdict.unwrap_or(Verdict::Failed),
            attempts: self.attempts,
        }
    }
}

struct Ladder<'a> {
    found: &'a Found,
    /// Indices of the sockets in `found`; everything else here counts by the place in this list.
    members: &'a [usize],
    climbers: Vec<Climber>,
    kernel: &'a mut dyn Observe,
    rules: Rules<'a>,
    control: &'a dyn Control,
}

impl Ladder<'_> {
    /// Acts with one method on every socket that is planned for it and still there, then waits for
    /// them together.
    fn rung(&mut self, plans: &[Plan], method: &mut dyn Method) {
        let name = method.name();
        let mine: Vec<usize> = (0..self.members.len())
            .filter(|&at| self.climbers[at].verdict.is_none())
            .filter(|&at| plans[self.members[at]].methods.contains(&name))
            .collect();
        let mut ordered = Vec::with_capacity(mine.len());
        for chunk in mine.chunks(method.batch()) {
            if self.control.interrupted() {
                break;
            }
            let chunk: Vec<usize> = self.recheck(chunk, name, false);
            let targets: Vec<Target> = chunk
                .iter()
                .map(|&at| Target::new(self.found, self.members[at]))
                .collect();
            let mut scene = OnRung {
                unfit: vec![false; chunk.len()],
                ladder: self,
                chunk: &chunk,
                method: name,
            };
            let results = method.act(&targets, &mut scene);
            let unfit = scene.unfit;
            for ((&at, result), unfit) in chunk.iter().zip(results).zip(unfit) {
                match result {
                    // Noted when it was found out.
                    _ if unfit => continue,
                    Err(ActError::Interrupted) => continue,
                    Err(ActError::PeerAlive) => {
                        self.climbers[at].settle(Verdict::Skipped(Skip::PeerAlive));
                    }
                    Ok(()) | Err(ActError::Unanswered(_)) => ordered.push(at),
                    Err(_) => {}
                }
                self.climbers[at].attempt(name, result.err());
            }
            self.control.progress(name, chunk.len());
        }
        self.wait_for(name, ordered);
    }

    /// Waits until what `method` has acted on is closed, at most for the grace.
    fn wait_for(&mut self, method: MethodName, ordered: Vec<usize>) {
        let pending = match method {
            MethodName::Destroy if ordered.len() >= MANY => self.not_destroyed(ordered),
            _ => ordered,
        };
        self.wait(pending);
    }

    /// Looks at the sockets right before the act and returns those to act on. `provoked`: the method has
    /// sent something that may have closed them.
    fn recheck(&mut self, chunk: &[usize], method: MethodName, provoked: bool) -> Vec<usize> {
        let detail = match self.rules.selectors.min_age.is_zero() {
            true => Detail::Basic,
            false => Detail::Quiet,
        };
        let mut fit = Vec::with_capacity(chunk.len());
        for (&at, look) in chunk.iter().zip(self.look(chunk, detail)) {
            let climber = &mut self.climbers[at];
            let planned = &self.found.sockets[self.members[at]];
            match look {
                Err(LookupError::Gone) => {
                    // What the method has sent so far made the peer answer RST.
                    if provoked {
                        climber.attempt(method, None);
                    }
                    climber.vanished();
                }
                Err(LookupError::Io(error)) => {
                    let error = ActError::Os("sock_diag lookup", error);
                    climber.attempt(method, Some(error));
                }
                Ok(now) if climber.acted.is_some() && ends_in_time_wait(planned, &now) => {
                    climber.vanished();
                }
                Ok(now) => {
                    match check(planned, &now, climber.acted.is_some(), method, &self.rules) {
                        Check::Act => fit.push(at),
                        Check::Settle(verdict) => climber.settle(verdict),
                        Check::Refuse(error) => climber.attempt(method, Some(error)),
                    }
                }
            }
        }
        fit
    }

    /// Of many sockets that the kernel says it has destroyed, those that one list of its tables does not
    /// confirm: they are still in it, or were in a state from which more states can follow than it has.
    ///
    /// The acknowledgement is given after the socket has left the tables (net/ipv4/tcp.c, tcp_abort); the list is
    /// the second witness, at a tenth of the cost of a question for each.
    fn not_destroyed(&mut self, ordered: Vec<usize>) -> Vec<usize> {
        // Open connections are not listed, which may be many.
        let states = StateSet::from(TcpState::CloseWait).union(TcpState::LastAck.into());
        let Ok(listed) = self.kernel.list(states) else {
            return ordered;
        };
        let (confirmed, doubtful): (Vec<usize>, Vec<usize>) =
            ordered.into_iter().partition(|&at| {
                let socket = &self.found.sockets[self.members[at]];
                let acknowledged = self.climbers[at].acted == Some(MethodName::Destroy)
                    && self.climbers[at].perhaps.is_none();
                acknowledged
                    && socket.state == TcpState::CloseWait
                    && !listed.contains(&socket.cookie())
            });
        for at in confirmed {
            self.climbers[at].vanished();
        }
        doubtful
    }

    /// Waits until the sockets in `pending` are closed, at most for the grace.
    fn wait(&mut self, mut pending: Vec<usize>) {
        let began = self.control.now();
        let mut pause = FIRST_PAUSE;
        loop {
            let looks = self.look(&pending, Detail::Basic);
            let mut left = Vec::new();
            for (at, look) in pending.into_iter().zip(looks) {
                match look {
                    Err(LookupError::Gone) => self.climbers[at].vanished(),
                    Ok(now) if ends_in_time_wait(&self.found.sockets[self.members[at]], &now) => {
                        self.climbers[at].vanished();
                    }
                    Ok(_) | Err(LookupError::Io(_)) => left.push(at),
                }
            }
            pending = left;
            let rest = self
                .rules
                .grace
                .saturating_sub(self.control.now().duration_since(began));
            if pending.is_empty() || rest.is_zero() || self.control.interrupted() {
                return;
            }
            self.control.sleep(pause.min(rest));
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// Gives every socket without a verdict the one that the kernel's tables say.
    fn last_look(&mut self, plans: &[Plan]) {
        let open: Vec<usize> = (0..self.climbers.len())
            .filter(|&at| self.climbers[at].verdict.is_none())
            .collect();
        for (at, look) in open.iter().copied().zip(self.look(&open, Detail::Basic)) {
            let planned = &self.found.sockets[self.members[at]];
            let climber = &mut self.climbers[at];
            match look {
                Err(LookupError::Gone) => climber.vanished(),
                Ok(now) if now.state != planned.state => climber.settle(match climber.acted {
                    Some(method) if now.state == TcpState::TimeWait => Verdict::Closed(method),
                    Some(method) => Verdict::Closing(method, now.state),
                    None => Verdict::Gone,
                }),
                Err(LookupError::Io(error)) => {
                    let error = ActError::Os("sock_diag lookup", error);
                    let planned = plans[self.members[at]].methods[0];
                    climber.attempt(climber.acted.unwrap_or(planned), Some(error));
                }
                _ if climber.attempts.is_empty() => {
                    climber.settle(Verdict::Skipped(Skip::Interrupted));
                }
                _ => {
                    if let Some(bytes) = climber.only_protected() {
                        climber.settle(Verdict::Skipped(Skip::Unsent(bytes)));
                    }
                }
            }
        }
    }

    /// Looks at sockets now. When the kernel cannot be asked that is said of each: what was done to the
    /// others still has to be reported.
    fn look(&mut self, climbers: &[usize], detail: Detail) -> Looks {
        let id = |&at: &usize| self.found.sockets[self.members[at]].id;
        let ids: Vec<DiagId> = climbers.iter().map(id).collect();
        self.kernel.observe(&ids, detail).unwrap_or_else(|error| {
            let failure = || LookupError::Io(same_errno(&error));
            ids.iter().map(|_| Err(failure())).collect()
        })
    }
}

/// The ladder, as the method on one of its rungs sees it.
struct OnRung<'s, 'a> {
    ladder: &'s mut Ladder<'a>,
    chunk: &'s [usize],
    method: MethodName,
    /// Of the chunk: those that changed while the method was at work.
    unfit: Vec<bool>,
}

impl Scene for OnRung<'_, '_> {
    fn grace(&self) -> Duration {
        self.ladder.rules.grace
    }

    fn control(&self) -> &dyn Control {
        self.ladder.control
    }

    fn still_fit(&mut self, targets: &[usize], provoked: bool) -> Vec<bool> {
        let sockets: Vec<usize> = targets.iter().map(|&target| self.chunk[target]).collect();
        let fit = self.ladder.recheck(&sockets, self.method, provoked);
        // `fit` is `sockets` with gaps.
        let mut fit = fit.into_iter().peekable();
        let still = |at: &usize| fit.next_if_eq(at).is_some();
        let still: Vec<bool> = sockets.iter().map(still).collect();
        for (&target, still) in targets.iter().zip(&still) {
            self.unfit[target] |= !still;
        }
        still
    }

    fn look(&mut self, targets: &[usize]) -> Looks {
        let sockets: Vec<usize> = targets.iter().map(|&target| self.chunk[target]).collect();
        self.ladder.look(&sockets, Detail::Quiet)
    }
}

/// Whether the connection is over: TIME-WAIT keeps the address pair, not the socket. For a socket that
/// was in TIME-WAIT to begin with, nothing has changed.
fn ends_in_time_wait(planned: &Socket, now: &SocketMessage) -> bool {
    now.state == TcpState::TimeWait && planned.state != TcpState::TimeWait
}

enum Check {
    Act,
    Settle(Verdict),
    /// This method must not be used on it.
    Refuse(ActError),
}

/// Compares a socket as it is `now` with what was planned for it.
fn check(
    planned: &Socket,
    now: &SocketMessage,
    acted: bool,
    method: MethodName,
    rules: &Rules<'_>,
) -> Check {
    let changed = now.state != planned.state;
    if changed && !acted {
        return Check::Settle(Verdict::Gone);
    }
    // Once our own act has changed the state, the age and the cause are no longer the application's.
    if !changed {
        let fresh = Socket::from_message(now);
        if planned.inode.is_none() && fresh.inode.is_some() {
            return Check::Settle(Verdict::Skipped(Skip::Accepted));
        }
        if !rules.selectors.still_matches(&fresh) {
            return Check::Settle(Verdict::Skipped(Skip::NoLongerSelected));
        }
    }
    if (method == MethodName::Destroy || now.state == TcpState::FinWait1)
        && rules.kernel < KernelVersion::ABORTS_ORPHANS
        && cause::is_orphan(now)
    {
        return Check::Refuse(ActError::Orphan);
    }
    let unsent = cause::unsent(now.state, now.send_q);
    if unsent > 0 && method.discards_unsent() && !rules.discard_unsent {
        return Check::Refuse(ActError::Unsent(unsent));
    }
    Check::Act
}

#[cfg(test)]
#[path = "engine_tests.rs"]
mod tests;
