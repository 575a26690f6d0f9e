//! One matched socket on its way through the program: who owns it, the plan for it, what was tried, the outcome.

use std::fmt;
use std::sync::Arc;

use nix::errno::Errno;
use strum::IntoStaticStr;

use crate::model::method::ORPHANS;
use crate::model::{Cause, Method, Privilege, ReclaimOutcome, Socket};
use crate::proc::{FdState, Process, RemoteFd};
use crate::sys::os_error;
use crate::tcp::TcpState;

/// A matched socket with everything that is known of it and done to it. Each step of a run fills in its own fields.
#[derive(Clone, Debug)]
pub struct Target {
    /// The socket, as it was found.
    pub socket: Socket,
    /// Its owners: one entry for each descriptor, those of a process together, selected ones first. Empty: none is known.
    pub owners: Vec<Owner>,
    /// For a socket that was never accepted: the index in [`crate::model::Scan::listeners`] of the listener that would accept it.
    pub listener: Option<usize>,
    /// What is to be done.
    pub plan: Plan,
    /// Every method tried so far, in order.
    pub attempts: Vec<Attempt>,
    /// The one outcome; `None` in a listing or dry run, and until it is known.
    pub outcome: Option<Outcome>,
}

/// A descriptor of a socket in a process.
#[derive(Clone, Debug)]
pub struct Owner {
    /// The process.
    pub process: Arc<Process>,
    /// The number of the descriptor in its table.
    pub fd: RemoteFd,
    /// Whether the descriptor is still open after the socket was closed; `None` if that was not checked.
    pub after: Option<FdState>,
    /// The outcome of reclaiming the descriptor; `None` if that was not to be done.
    pub reclaim: Option<ReclaimOutcome>,
}

/// What is to be done to one socket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// The methods to try, one after the other until the socket is closed.
    pub methods: Vec<Method>,
    /// Methods that were wanted and cannot be used on this socket.
    pub excluded: Vec<(Method, Exclusion)>,
    /// Why the socket is left alone whatever the methods could do.
    pub skip: Option<SkipReason>,
}

/// One method tried on one socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attempt {
    /// The method.
    pub method: Method,
    /// Why it did nothing, if it did nothing.
    pub error: Option<MethodError>,
}

/// What became of a matched socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, IntoStaticStr)]
#[cfg_attr(test, derive(strum::VariantNames))]
#[strum(serialize_all = "kebab-case")]
pub enum Outcome {
    /// It is no longer in the kernel's tables, by this method.
    Closed(Method),
    /// It has left its state by this method, and waits for its peer.
    Closing(Method, TcpState),
    /// It left its state on its own before the act.
    Gone,
    /// It is left alone.
    Skipped(SkipReason),
    /// It is still there; the attempts say why.
    Failed,
}

/// Why a socket is left alone.
///
/// Its code in JSON and in the log is the variant in kebab case, and stable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error, IntoStaticStr)]
#[cfg_attr(test, derive(strum::VariantNames))]
#[strum(serialize_all = "kebab-case")]
pub enum SkipReason {
    /// No method can be used; [`Plan::excluded`] has the reason for each.
    #[error("no method can be used")]
    NoMethod,
    /// Older sockets have used up --max-kills.
    #[error("over --max-kills")]
    OverMaxKills,
    /// The application wrote bytes after the plan was made, and an abort would lose them.
    #[error("would lose {0} unsent bytes (--discard-unsent allows it)")]
    UnsentData(u32),
    /// It no longer has the age or the cause that was asked for.
    #[error("no longer has the selected age or cause")]
    NoLongerSelected,
    /// The application accepted it after the plan was made.
    #[error("the application accepted it meanwhile")]
    Accepted,
    /// The peer answered a probe: the connection is in use, or half-closed on purpose.
    #[error("peer is alive")]
    PeerAlive,
    /// The run was interrupted before anything was done to it.
    #[error("interrupted")]
    Interrupted,
}

/// Why a method is not tried on a socket.
///
/// Its code in JSON is the variant in kebab case, and stable.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, IntoStaticStr)]
#[cfg_attr(test, derive(strum::VariantNames))]
#[strum(serialize_all = "kebab-case")]
pub enum Exclusion {
    /// The socket was never accepted, so there is no descriptor to act through.
    #[error("never accepted: no descriptor exists")]
    NotAccepted,
    /// No process that can be seen holds a descriptor of it.
    #[error("no known owner")]
    NoOwner,
    /// The owners were not searched for.
    #[error("owners were not searched for (--no-owners)")]
    OwnersNotSearched,
    /// It would lose this many bytes that are queued to the peer.
    #[error("would lose {0} unsent bytes (--discard-unsent allows it)")]
    UnsentData(u32),
    /// This process lacks a privilege.
    #[error("needs {0}")]
    NotPermitted(Privilege),
    /// The socket's state does not allow it, for this reason.
    #[error("{0}: {1}")]
    WrongState(TcpState, &'static str),
}

/// Why a method did nothing to a socket.
///
/// Its code in JSON and in the log is the variant in kebab case, and stable.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, IntoStaticStr)]
#[cfg_attr(test, derive(strum::VariantNames))]
#[strum(serialize_all = "kebab-case")]
pub enum MethodError {
    /// The socket closed before the act.
    #[error("closed before the act")]
    Gone,
    /// None of the descriptors refers to the socket any more.
    #[error("every known descriptor has been closed")]
    DescriptorsGone,
    /// The /proc that names the owners is of another pid namespace than ours.
    #[error(
        "/proc shows another pid namespace than cwkill runs in; mount one of its own, or run it outside"
    )]
    ForeignPidNamespace,
    /// A privilege is missing; the kernel's answer is kept.
    #[error("{}: needs {}", os_error(.1), .0)]
    NotPermitted(Privilege, Errno),
    /// The kernel cannot do it at all.
    #[error("{}: {}", os_error(.1), .0)]
    NotSupported(&'static str, Errno),
    /// An orphan, which this kernel can keep for ever once it is aborted.
    #[error("{ORPHANS}")]
    OrphanOnOldKernel,
    /// It would lose this many bytes queued to the peer, which were written after the plan was made.
    #[error("would lose {0} unsent bytes (--discard-unsent allows it)")]
    UnsentData(u32),
    /// No ACK with the sequence numbers was seen within the grace; and why TCP_REPAIR did not give them.
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
    /// The peer has answered: the connection is alive.
    #[error("peer is alive")]
    PeerAlive,
    /// The peer has not answered within the grace; that does not prove that it is gone.
    #[error("no answer from the peer within the grace, which does not prove it gone")]
    PeerSilent,
    /// The order was given, and whether it was carried out is not known.
    #[error("the kernel's answer was lost: {}", os_error(.0))]
    AnswerLost(Errno),
    /// A step ended in a bug in cwkill.
    #[error("a bug in cwkill, list again to see the state")]
    Bug,
    /// Anything else: the system call and its errno.
    #[error("{}: {}", .0, os_error(.1))]
    SystemCall(&'static str, Errno),
}

/// An earlier error in front of a later one.
struct Prefix<'a>(Option<&'a MethodError>);

impl fmt::Display for Prefix<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.map_or(Ok(()), |error| write!(f, "{error}; "))
    }
}

impl SkipReason {
    /// The stable code.
    pub fn code(self) -> &'static str {
        self.into()
    }
}

impl Exclusion {
    /// The stable code.
    pub fn code(&self) -> &'static str {
        self.into()
    }
}

impl MethodError {
    /// The stable code.
    pub fn code(&self) -> &'static str {
        self.into()
    }

    /// The errno, where a system call gave one.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            MethodError::NotPermitted(_, errno)
            | MethodError::NotSupported(_, errno)
            | MethodError::AnswerLost(errno)
            | MethodError::SystemCall(_, errno) => Some(*errno),
            MethodError::NoAck(repair) => repair.as_ref()?.errno(),
            MethodError::Gone
            | MethodError::DescriptorsGone
            | MethodError::ForeignPidNamespace
            | MethodError::OrphanOnOldKernel
            | MethodError::UnsentData(_)
            | MethodError::RstIgnored
            | MethodError::PeerAlive
            | MethodError::PeerSilent
            | MethodError::Bug => None,
        }
    }
}

impl Outcome {
    /// The word for it in JSON and in the log.
    pub fn name(&self) -> &'static str {
        self.into()
    }

    /// Whether the socket is no longer in the kernel's tables, or about to leave them.
    pub fn is_closed_or_closing(self) -> bool {
        matches!(self, Outcome::Closed(_) | Outcome::Closing(..))
    }
}

impl Owner {
    /// The descriptor `fd` of `process`.
    pub fn new(process: Arc<Process>, fd: RemoteFd) -> Self {
        Owner {
            process,
            fd,
            after: None,
            reclaim: None,
        }
    }
}

impl AsMut<Target> for Target {
    fn as_mut(&mut self) -> &mut Target {
        self
    }
}

impl Target {
    /// A socket of which nothing but the kernel's message is known.
    pub fn new(socket: Socket) -> Self {
        Target {
            socket,
            owners: Vec::new(),
            listener: None,
            plan: Plan::default(),
            attempts: Vec::new(),
            outcome: None,
        }
    }

    /// Whether it was closed by one of our methods.
    pub fn is_closed(&self) -> bool {
        matches!(self.outcome, Some(Outcome::Closed(_)))
    }

    /// The code of the reason why it was skipped or is still there.
    pub fn reason_code(&self) -> Option<&'static str> {
        match self.outcome? {
            Outcome::Skipped(reason) => Some(reason.code()),
            Outcome::Failed => {
                let last = self.attempts.last().and_then(|last| last.error.as_ref());
                Some(last.map_or("still-there", MethodError::code))
            }
            Outcome::Closed(_) | Outcome::Closing(..) | Outcome::Gone => None,
        }
    }

    /// Whether the socket has a descriptor, and no process is known to hold it.
    pub fn is_without_known_owner(&self) -> bool {
        self.socket.inode.is_some() && self.owners.is_empty()
    }

    /// Whether it was closed while it waited for accept(): its slot in the backlog stays taken.
    pub fn was_closed_in_backlog(&self) -> bool {
        self.socket.cause == Cause::NotAccepted && self.is_closed()
    }

    /// Whether any of its descriptors is still open after the socket was closed; `None` if that is not known.
    pub fn descriptor_open(&self) -> Option<bool> {
        if !self.outcome.is_some_and(Outcome::is_closed_or_closing) {
            return None;
        }
        let any = |state| self.owners.iter().any(|owner| owner.after == state);
        match self.socket.inode {
            _ if any(Some(FdState::Open)) => Some(true),
            // No descriptor was ever made, or none is left.
            None => Some(false),
            Some(_) if self.owners.is_empty() || any(Some(FdState::Unknown)) || any(None) => None,
            Some(_) => Some(false),
        }
    }

    /// Adds the attempt of an executor. A peer that answered decides the outcome at once.
    pub fn record(&mut self, method: Method, result: Result<(), MethodError>) {
        if result == Err(MethodError::PeerAlive) {
            self.outcome = Some(Outcome::Skipped(SkipReason::PeerAlive));
        }
        self.attempt(method, result.err());
    }

    /// Adds an attempt.
    pub fn attempt(&mut self, method: Method, error: Option<MethodError>) {
        self.attempts.push(Attempt { method, error });
    }

    /// The last method whose act the kernel took.
    pub fn acted(&self) -> Option<Method> {
        let acted = |attempt: &&Attempt| attempt.error.is_none();
        self.attempts
            .iter()
            .rfind(acted)
            .map(|attempt| attempt.method)
    }

    /// The method that closed the socket, if it is gone: the last whose act the kernel took, or a later one that seemed to fail
    /// and may have worked all the same (an order whose answer was lost, an RST still on its way through a busy kernel).
    pub fn maybe_closed_by(&self) -> Option<Method> {
        let may_have = |attempt: &&Attempt| {
            matches!(
                attempt.error,
                None | Some(MethodError::RstIgnored | MethodError::AnswerLost(_))
            )
        };
        self.attempts
            .iter()
            .rfind(may_have)
            .map(|attempt| attempt.method)
    }

    /// Notes that the socket is no longer in the kernel's tables.
    pub fn note_vanished(&mut self) {
        self.outcome = Some(match self.maybe_closed_by() {
            Some(method) => Outcome::Closed(method),
            None => Outcome::Gone,
        });
    }

    /// Gives a target without an outcome the one of a run that broke off with `error`. The error stands with the last method
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
