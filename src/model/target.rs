//! One matched socket on its way through a run: its owners, its plan, the attempts and the outcome.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use nix::errno::Errno;
use strum::{IntoStaticStr, VariantNames};

use crate::model::method::ORPHANS;
use crate::model::{Cause, Method, Poller, Privilege, ReclaimOutcome, Socket, SpinRisk};
use crate::proc::{FdState, Process, RemoteFd};
use crate::sys::os_error;
use crate::tcp::TcpState;

/// A matched socket with all facts about it. Each step of a run fills in its own fields.
#[derive(Clone, Debug)]
pub struct Target {
    /// The socket, at the time when cwkill found it.
    pub socket: Socket,
    /// One entry per descriptor: the descriptors of a process are adjacent, and selected processes come first. Empty if no owner is
    /// known.
    pub owners: Vec<Owner>,
    /// For a socket that was never accepted: the index in [`crate::model::Scan::listeners`] of the listener that would accept it.
    pub listener: Option<usize>,
    /// Whether an owner would spin if it were closed; unknown in a listing.
    pub spin_risk: SpinRisk,
    pub plan: Plan,
    /// The methods tried so far, in order.
    pub attempts: Vec<Attempt>,
    /// `None` in a listing or dry run, and until the outcome is known.
    pub outcome: Option<Outcome>,
}

/// A descriptor of a socket in a process.
#[derive(Clone, Debug)]
pub struct Owner {
    pub process: Arc<Process>,
    /// The number of the descriptor in the table of the process.
    pub fd: RemoteFd,
    /// The thread whose table has the descriptor; `None` for the table that /proc shows for the process. Two threads of a process
    /// can have different tables, see unshare(2), CLONE_FILES.
    pub tid: Option<i32>,
    /// Whether the descriptor is still open after the socket was closed; `None` if cwkill did not check.
    pub after: Option<FdState>,
    /// The outcome of reclaiming the descriptor; `None` if cwkill was not to reclaim it.
    pub reclaim: Option<ReclaimOutcome>,
}

/// The methods to try on one socket, and the reasons against the others.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// The methods to try, one after the other until the socket is closed.
    pub methods: Vec<Method>,
    /// The selected methods that cannot be used on this socket.
    pub excluded: Vec<(Method, Exclusion)>,
    /// Why the socket is left alone although a method may be usable.
    pub skip: Option<SkipReason>,
}

/// One method tried on one socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attempt {
    pub method: Method,
    /// Why the method had no effect; `None` if it acted.
    pub error: Option<MethodError>,
    /// Whether the socket was judged at the instant of the act.
    pub at_one_instant: bool,
}

/// The result for a matched socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, IntoStaticStr)]
#[cfg_attr(test, derive(strum::VariantNames))]
#[strum(serialize_all = "kebab-case")]
pub enum Outcome {
    /// The connection is over, by this method: the socket is in no table of the kernel, or only left as TIME-WAIT.
    Closed(Method),
    /// This method brought it into another state, in which it waits for its peer.
    Closing(Method, TcpState),
    /// It left its state on its own before the act.
    Gone,
    /// cwkill left it alone.
    Skipped(SkipReason),
    /// It is still there; the attempts have the reasons.
    Failed,
}

/// The code of a failure without an error: no method reports one, and the socket is there.
const STILL_THERE: &str = "still-there";

/// Why a socket is left alone.
///
/// Its code in JSON and in the log is the variant in kebab case, and stable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error, IntoStaticStr, VariantNames)]
#[strum(serialize_all = "kebab-case")]
pub enum SkipReason {
    /// No method can be used; [`Plan::excluded`] has the reason for each.
    #[error("no method can be used")]
    NoMethod,
    /// Older sockets have reached the limit of --max-kills.
    #[error("over --max-kills")]
    OverMaxKills,
    /// The application wrote bytes after the plan was made, and an abort would lose them.
    #[error("would lose {0} unsent bytes (--discard-unsent allows it)")]
    UnsentData(u32),
    /// It no longer has the selected age or cause, or its address has come back.
    #[error("no longer has the selected age, cause or address")]
    NoLongerSelected,
    /// Data has moved since the plan was made.
    #[error("in use: data has just moved (--min-idle)")]
    InUse,
    /// The application accepted it after the plan was made.
    #[error("the application accepted it meanwhile")]
    Accepted,
    /// A close would make the process with this pid spin, because of this waiter.
    #[error(
        "process {pid} would spin: {by} waits for this socket and not for input, and a closed socket wakes it without end ({})",
        how_to_close(*.by)
    )]
    WouldSpin { pid: i32, by: Poller },
    /// The process with this pid spins since cwkill closed the socket of this descriptor, or several.
    #[error("process {pid} spins since {} closed", closed_socket(*.fd))]
    OwnerSpins { pid: i32, fd: Option<RemoteFd> },
    /// The process with this pid has more threads than cwkill observes, so a spin could be missed.
    #[error(
        "process {pid} has too many threads to see whether it spins; one of its sockets was closed (--allow-spin closes all)"
    )]
    TooManyThreads { pid: i32 },
    /// No method could close any of the oldest sockets of the process with this pid, so it is not known whether it would spin.
    #[error(
        "none of the oldest sockets of process {pid} could be closed, so cwkill has not seen whether it would spin (--allow-spin closes all)"
    )]
    CanaryRefused { pid: i32 },
    /// The peer answered a probe: the connection is in use, or half-closed on purpose.
    #[error("peer is alive")]
    PeerAlive,
    /// The operator interrupted the run before the first act on it.
    #[error("interrupted")]
    Interrupted,
}

/// The subject of "closed": the socket of descriptor `fd`, or several if it is not known which.
fn closed_socket(fd: Option<RemoteFd>) -> String {
    match fd {
        Some(fd) => format!("the socket of its descriptor {} was", fd.0),
        None => "several of its sockets were".to_owned(),
    }
}

/// How to close a socket although its owner would spin.
fn how_to_close(by: Poller) -> &'static str {
    match by {
        Poller::Epoll(_) => {
            "--reclaim --reclaim-force closes its descriptor too; --allow-spin allows it"
        }
        // poll(2) returns at once for a descriptor that is closed, too.
        Poller::Poll(_) => "--allow-spin allows it",
    }
}

/// Why a method is not tried on a socket.
///
/// Its code in JSON is the variant in kebab case, and stable.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, IntoStaticStr)]
#[cfg_attr(test, derive(strum::VariantNames))]
#[strum(serialize_all = "kebab-case")]
pub enum Exclusion {
    /// The socket was never accepted, so it has no descriptor.
    #[error("never accepted: no descriptor exists")]
    NotAccepted,
    /// No visible process holds a descriptor of it.
    #[error("no known owner")]
    NoOwner,
    /// cwkill did not search for owners.
    #[error("owners were not searched for (--no-owners)")]
    OwnersNotSearched,
    /// The method would lose this many bytes that are queued to the peer.
    #[error("would lose {0} unsent bytes (--discard-unsent allows it)")]
    UnsentData(u32),
    /// The local address is not an address of this host any more, so the method cannot reach the peer or hear from it.
    #[error("the local address is no longer on this host")]
    AddressGone,
    /// cwkill lacks this privilege.
    #[error("needs {0}")]
    NotPermitted(Privilege),
    /// The socket is one of MPTCP that was never accepted, so it has no descriptor, and the kernel has no other way to close it.
    #[error(
        "a never-accepted MPTCP socket has no descriptor, and the kernel cannot destroy it: let its process accept it, or restart the process"
    )]
    MptcpNotAccepted,
    /// The method would act on one TCP connection of an MPTCP socket, and not on the MPTCP socket.
    #[error("an MPTCP socket can only be closed through its descriptor")]
    Mptcp,
    /// The state of the socket forbids the method, for this reason.
    #[error("{0}: {1}")]
    WrongState(TcpState, &'static str),
}

/// Why a method had no effect on a socket, or none that cwkill could see.
///
/// Its code in JSON and in the log is the variant in kebab case, and stable.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, IntoStaticStr, VariantNames)]
#[strum(serialize_all = "kebab-case")]
pub enum MethodError {
    /// The socket closed before the act.
    #[error("closed before the act")]
    Gone,
    /// No known descriptor refers to the socket any more.
    #[error("every known descriptor has been closed")]
    DescriptorsGone,
    /// /proc shows another pid namespace than the one of cwkill.
    #[error(
        "/proc shows another pid namespace than cwkill runs in; mount one of its own, or run it outside"
    )]
    OtherPidNamespace,
    /// A privilege is missing; the kernel's answer is kept.
    #[error("{}: needs {}", os_error(.1), .0)]
    NotPermitted(Privilege, Errno),
    /// cwkill has the capability, and the kernel refuses all the same; its answer is kept.
    #[error("{}: {}", os_error(.1), .0.refused())]
    RefusedDespitePrivilege(Privilege, Errno),
    /// The kernel does not have the feature; the text names it.
    #[error("{}: {}", os_error(.1), .0)]
    NotSupported(&'static str, Errno),
    /// The socket is an orphan, and this kernel can keep an aborted orphan for ever.
    #[error("{ORPHANS}")]
    OrphanOnOldKernel,
    /// The method would lose this many bytes that were queued to the peer after the plan was made.
    #[error("would lose {0} unsent bytes (--discard-unsent allows it)")]
    UnsentData(u32),
    /// The local address is not an address of this host any more, so no segment can reach the socket.
    #[error("the local address is no longer on this host; --method destroy works without it")]
    AddressGone,
    /// cwkill captured no ACK with the sequence numbers within the grace. The inner error is why TCP_REPAIR did not give them.
    #[error(
        "{}the socket sent no ACK within the grace (is something dropping packets on lo: nftables, conntrack's invalid \
         state? is there a route to the peer, does it answer ARP? TCP-MD5 or TCP-AO, NAT on this host?)",
        Prefix(.0.as_deref())
    )]
    NoAck(Option<Box<MethodError>>),
    /// The RST was sent at the exact sequence number, and the socket is still there.
    #[error(
        "RST sent, but the socket is still there (nftables dropping on lo? TCP-MD5 or TCP-AO?)"
    )]
    RstIgnored,
    /// The peer has answered, so the connection is alive.
    #[error("peer is alive")]
    PeerAlive,
    /// The peer has not answered within the grace. That does not prove that it is gone.
    #[error("no answer from the peer within the grace; it may still exist")]
    PeerSilent,
    /// The kernel got the request, and its answer was lost.
    #[error("the kernel's answer was lost: {}", os_error(.0))]
    AnswerLost(Errno),
    /// The walk of the iterator was given up before it came to the socket: some owner hangs while it has the lock of its own socket.
    #[error(
        "not reached: an owner hangs and keeps the lock of its socket, for which the iterator waits (without --bpf always SOCK_DESTROY is used)"
    )]
    WalkHeldUp,
    /// A step ended in a bug in cwkill.
    #[error("a bug in cwkill, list again to see the state")]
    Bug,
    /// Another error: the system call and its errno.
    #[error("{}: {}", .0, os_error(.1))]
    SystemCall(&'static str, Errno),
}

/// Prints an earlier error before a later one.
struct Prefix<'a>(Option<&'a MethodError>);

impl fmt::Display for Prefix<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.map_or(Ok(()), |error| write!(f, "{error}; "))
    }
}

impl SkipReason {
    /// The stable name for programs.
    pub fn code(self) -> &'static str {
        self.into()
    }
}

impl Exclusion {
    /// The stable name for programs.
    pub fn code(&self) -> &'static str {
        self.into()
    }
}

impl MethodError {
    /// The stable name for programs.
    pub fn code(&self) -> &'static str {
        self.into()
    }

    /// The errno, if a system call failed.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            MethodError::NotPermitted(_, errno)
            | MethodError::RefusedDespitePrivilege(_, errno)
            | MethodError::NotSupported(_, errno)
            | MethodError::AnswerLost(errno)
            | MethodError::SystemCall(_, errno) => Some(*errno),
            MethodError::NoAck(repair) => repair.as_ref()?.errno(),
            MethodError::Gone
            | MethodError::DescriptorsGone
            | MethodError::OtherPidNamespace
            | MethodError::OrphanOnOldKernel
            | MethodError::UnsentData(_)
            | MethodError::AddressGone
            | MethodError::RstIgnored
            | MethodError::PeerAlive
            | MethodError::PeerSilent
            | MethodError::WalkHeldUp
            | MethodError::Bug => None,
        }
    }
}

impl Outcome {
    /// The word for it in JSON and in the log.
    pub fn name(&self) -> &'static str {
        self.into()
    }

    /// Whether a method closed the socket, or brought it to a state that ends without cwkill.
    pub fn is_closed_or_closing(self) -> bool {
        matches!(self, Outcome::Closed(_) | Outcome::Closing(..))
    }
}

impl Owner {
    pub fn new(process: Arc<Process>, fd: RemoteFd) -> Self {
        Owner {
            process,
            fd,
            tid: None,
            after: None,
            reclaim: None,
        }
    }
}

impl fmt::Display for Owner {
    /// The number of the descriptor, for people.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.fd.0)?;
        self.tid.map_or(Ok(()), |tid| write!(f, " (thread {tid})"))
    }
}

impl AsMut<Target> for Target {
    fn as_mut(&mut self) -> &mut Target {
        self
    }
}

impl Target {
    /// A target of which only the socket is known.
    pub fn new(socket: Socket) -> Self {
        Target {
            socket,
            owners: Vec::new(),
            listener: None,
            spin_risk: SpinRisk::Unknown,
            plan: Plan::default(),
            attempts: Vec::new(),
            outcome: None,
        }
    }

    /// Whether a method closed the socket.
    pub fn is_closed(&self) -> bool {
        matches!(self.outcome, Some(Outcome::Closed(_)))
    }

    /// Every code that [`Target::reason_code`] can return, each once.
    pub fn reason_codes() -> BTreeSet<&'static str> {
        let of_skipped = SkipReason::VARIANTS.iter();
        let of_failed = MethodError::VARIANTS.iter().chain([&STILL_THERE]);
        of_skipped.chain(of_failed).copied().collect()
    }

    /// The code of the reason for which it was skipped or is still there.
    pub fn reason_code(&self) -> Option<&'static str> {
        match self.outcome? {
            Outcome::Skipped(reason) => Some(reason.code()),
            Outcome::Failed => {
                let last = self.attempts.last().and_then(|last| last.error.as_ref());
                Some(last.map_or(STILL_THERE, MethodError::code))
            }
            Outcome::Closed(_) | Outcome::Closing(..) | Outcome::Gone => None,
        }
    }

    /// Whether the socket has a descriptor, but no known owner.
    pub fn is_without_known_owner(&self) -> bool {
        self.socket.inode.is_some() && self.owners.is_empty()
    }

    /// Whether cwkill closed it while it waited for accept(2). Then its slot in the backlog stays taken.
    pub fn was_closed_in_backlog(&self) -> bool {
        self.socket.cause == Cause::NotAccepted && self.is_closed()
    }

    /// Whether any of its descriptors is still open after the socket was closed; `None` if that is unknown.
    pub fn descriptor_open(&self) -> Option<bool> {
        if !self.outcome.is_some_and(Outcome::is_closed_or_closing) {
            return None;
        }
        let any = |state| self.owners.iter().any(|owner| owner.after == state);
        match self.socket.inode {
            _ if any(Some(FdState::Open)) => Some(true),
            // It never had a descriptor, or has none any more.
            None => Some(false),
            Some(_) if self.owners.is_empty() || any(Some(FdState::Unknown)) || any(None) => None,
            Some(_) => Some(false),
        }
    }

    /// Adds the attempt of a method. If the peer answered, this also sets the outcome.
    pub fn record(&mut self, method: Method, result: Result<(), MethodError>) {
        if result == Err(MethodError::PeerAlive) {
            self.outcome = Some(Outcome::Skipped(SkipReason::PeerAlive));
        }
        self.attempt(method, result.err());
    }

    /// Adds an attempt.
    pub fn attempt(&mut self, method: Method, error: Option<MethodError>) {
        // Most targets have one attempt, and a run can have very many targets.
        self.attempts.reserve_exact(1);
        self.attempts.push(Attempt {
            method,
            error,
            at_one_instant: false,
        });
    }

    /// Adds the attempt of a method that has judged the socket at the instant of its act.
    pub fn acted_at_one_instant(&mut self, method: Method) {
        self.attempt(method, None);
        if let Some(last) = self.attempts.last_mut() {
            last.at_one_instant = true;
        }
    }

    /// The last method that acted without an error.
    pub fn acted(&self) -> Option<Method> {
        let acted = |attempt: &&Attempt| attempt.error.is_none();
        self.attempts
            .iter()
            .rfind(acted)
            .map(|attempt| attempt.method)
    }

    /// The method that closed the socket, if the socket is gone: the last one that acted without an error, or a later one that may
    /// have worked in spite of its error. That is a request whose answer was lost, or an RST that a busy kernel had not processed
    /// yet.
    pub fn maybe_closed_by(&self) -> Option<Method> {
        let may_have_closed = |attempt: &&Attempt| {
            matches!(
                attempt.error,
                None | Some(MethodError::RstIgnored | MethodError::AnswerLost(_))
            )
        };
        self.attempts
            .iter()
            .rfind(may_have_closed)
            .map(|attempt| attempt.method)
    }

    /// Sets the outcome of a socket that has ended in TIME-WAIT. Only an exchange of FINs leads there, never an abort, so an
    /// abort that may have worked in spite of its error does not count.
    pub fn note_time_wait(&mut self) {
        self.outcome = Some(self.acted().map_or(Outcome::Gone, Outcome::Closed));
    }

    /// Sets the outcome of a socket that is no longer in the kernel's tables.
    pub fn note_vanished(&mut self) {
        self.outcome = Some(match self.maybe_closed_by() {
            Some(method) => Outcome::Closed(method),
            None => Outcome::Gone,
        });
    }

    /// Sets the outcome of a target without one, after the run broke off with `error`. The error stands with the last method
    /// that was tried, or with every planned one if none was.
    pub fn fail_unfinished(&mut self, error: MethodError) {
        if self.outcome.is_some() {
            return;
        }
        self.outcome = Some(match self.plan.skip {
            Some(reason) => Outcome::Skipped(reason),
            None => {
                let methods = match self.attempts.last() {
                    Some(last) => vec![last.method],
                    None => self.plan.methods.clone(),
                };
                for method in methods {
                    self.attempt(method, Some(error.clone()));
                }
                Outcome::Failed
            }
        });
    }
}

#[cfg(test)]
#[path = "target_tests.rs"]
mod tests;
