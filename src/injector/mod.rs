//! The injector: closes sockets. One file a method, and the [`ladder`] that runs a plan over them.
//!
//! A new method is a variant of [`MethodName`], a module that implements [`Method`], and a line in
//! [`methods`]; neither the plan nor the ladder nor the report changes.

pub mod destroy;
mod duplicate;
pub mod engine;
pub mod plan;
pub mod probe;
pub mod rst;
pub mod shutdown;

use std::fmt;
use std::io;
use std::str::FromStr;
use std::time::Duration;

use crate::finder::{Found, RemoteFd};
use crate::privileges::Privilege;
use crate::sock_diag::{DiagId, LookupError, SocketMessage};
use crate::tcp::TcpState;
use engine::Control;

/// The ways to close a socket, gentlest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum MethodName {
    /// A question to the peer; a peer that is gone answers RST, and the kernel closes the socket.
    Probe,
    /// shutdown(2) on a duplicate of an owner's descriptor.
    Shutdown,
    /// SOCK_DESTROY over sock_diag.
    Destroy,
    /// RSTs by raw socket, at the exact sequence numbers.
    Rst,
}

const NAMES: [(MethodName, &str); 4] = [
    (MethodName::Probe, "probe"),
    (MethodName::Shutdown, "shutdown"),
    (MethodName::Destroy, "destroy"),
    (MethodName::Rst, "rst"),
];

impl MethodName {
    /// Every method.
    pub const ALL: [MethodName; 4] = [
        MethodName::Probe,
        MethodName::Shutdown,
        MethodName::Destroy,
        MethodName::Rst,
    ];

    /// What `auto` stands for.
    pub const AUTO: [MethodName; 3] = [MethodName::Shutdown, MethodName::Destroy, MethodName::Rst];

    /// The name in `--method`, in JSON and in the table.
    pub fn name(self) -> &'static str {
        NAMES
            .iter()
            .find(|row| row.0 == self)
            .expect("every method is in NAMES")
            .1
    }

    /// Whether it works through a descriptor of an owner.
    pub fn needs_descriptor(self) -> bool {
        self == MethodName::Shutdown
    }

    /// Whether bytes queued to the peer are lost.
    pub fn discards_unsent(self) -> bool {
        matches!(self, MethodName::Destroy | MethodName::Rst)
    }
}

impl fmt::Display for MethodName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for MethodName {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let row = NAMES.iter().find(|row| row.1 == text).ok_or(())?;
        Ok(row.0)
    }
}

/// A socket to act on, with what a method may use.
#[derive(Clone, Debug)]
pub struct Target {
    /// Its name to the kernel.
    pub id: DiagId,
    /// Its state when it was found.
    pub state: TcpState,
    /// Descriptors of it in other processes.
    pub descriptors: Vec<Descriptor>,
}

/// A descriptor in another process, which may have closed it or exited since it was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// The process.
    pub pid: i32,
    /// When that process started; another process with its number started later.
    pub start_time: u64,
    /// The number in its table.
    pub fd: RemoteFd,
}

impl Target {
    /// The socket alone, for methods that need no descriptor.
    pub fn without_owner(socket: &crate::finder::Socket) -> Self {
        Target {
            id: socket.id,
            state: socket.state,
            descriptors: Vec::new(),
        }
    }

    /// The socket at `index` of `found`.
    pub fn new(found: &Found, index: usize) -> Self {
        let socket = &found.sockets[index];
        let descriptor = |held: &crate::finder::Held| {
            let process = &found.processes[held.process];
            Descriptor {
                pid: process.pid,
                start_time: process.start_time,
                fd: held.fd,
            }
        };
        Target {
            id: socket.id,
            state: socket.state,
            descriptors: socket.owners.iter().map(descriptor).collect(),
        }
    }
}

/// A way to close sockets.
pub trait Method {
    /// Its name.
    fn name(&self) -> MethodName;

    /// How many sockets it takes at once. Every target is looked at right before [`Method::act`], so
    /// more sockets mean more time between that look and the act. A method that gains by more, because
    /// it waits for answers, looks again with [`Scene::still_fit`] before it does what cannot be undone.
    fn batch(&self) -> usize {
        64
    }

    /// Acts on every target, each already checked to be the one that was planned; one result each,
    /// in order. `Ok` says that the kernel took the order, not that the socket is closed.
    fn act(&mut self, targets: &[Target], scene: &mut dyn Scene) -> Vec<Result<(), ActError>>;
}

/// What the ladder gives a method that needs time. Targets go by their place in the batch.
pub trait Scene {
    /// How long answers may take.
    fn grace(&self) -> Duration;

    /// The clock, the pauses and the operator's Ctrl-C.
    fn control(&self) -> &dyn Control;

    /// Looks at these targets again and says of each whether it is still what was planned. What became
    /// of those that are not is noted, whatever the method reports of them. `provoked` says that the
    /// method has already sent something that may have closed them.
    fn still_fit(&mut self, targets: &[usize], provoked: bool) -> Vec<bool>;

    /// Looks at these targets now.
    fn look(&mut self, targets: &[usize]) -> Vec<Result<SocketMessage, LookupError>>;
}

/// The methods in the order they are tried, for the network namespace of the calling thread.
///
/// # Errors
/// The netlink socket cannot be opened.
pub fn methods(
    names: &[MethodName],
    proc: &crate::proc::ProcFs,
) -> io::Result<Vec<Box<dyn Method>>> {
    let build = |name: &MethodName| -> io::Result<Box<dyn Method>> {
        Ok(match name {
            MethodName::Probe => Box::new(probe::Probe::new(proc.clone())),
            MethodName::Rst => Box::new(rst::Rst::new(proc.clone())),
            MethodName::Shutdown => Box::new(shutdown::Shutdown::new(proc.clone())),
            MethodName::Destroy => Box::new(destroy::Destroy::open()?),
        })
    };
    names.iter().map(build).collect()
}

/// Why an orphan is not aborted on an old kernel; see [`crate::kernel::KernelVersion::ABORTS_ORPHANS`].
pub(crate) const ORPHANS: &str = "kernels before 6.11 can keep an aborted orphan for ever";

/// A copy of an error, of which one is needed for every socket it concerns.
pub(crate) fn same_errno(error: &io::Error) -> io::Error {
    io::Error::from_raw_os_error(error.raw_os_error().unwrap_or(libc::EIO))
}

/// Why a method did nothing to a socket.
#[derive(Debug)]
pub enum ActError {
    /// The socket closed before the act.
    Gone,
    /// None of the descriptors refers to the socket any more.
    DescriptorsGone,
    /// The /proc that names the owners is of another pid namespace than ours.
    ForeignProc,
    /// A privilege is missing; the kernel's answer is kept.
    Denied(Privilege, io::Error),
    /// The kernel cannot do it at all.
    NotSupported(&'static str, io::Error),
    /// An orphan, which this kernel can keep for ever once it is aborted.
    Orphan,
    /// It would lose so many bytes queued to the peer, which were written after the plan was made.
    Unsent(u32),
    /// No ACK with the sequence numbers was seen within the grace; and why TCP_REPAIR did not give them.
    NoAck(Option<Box<ActError>>),
    /// The RST was sent at the exact sequence number, and the socket is still there.
    RstIgnored,
    /// The peer has answered: the connection is alive.
    PeerAlive,
    /// The peer has not answered within the grace; that does not prove that it is gone.
    PeerSilent,
    /// The operator stopped the run before its turn.
    Interrupted,
    /// The order was given, and whether it was carried out is not known.
    Unanswered(io::Error),
    /// Anything else: the system call and its errno.
    Os(&'static str, io::Error),
}

impl ActError {
    /// The errno, where a system call gave one.
    pub fn errno(&self) -> Option<i32> {
        match self {
            ActError::Denied(_, error)
            | ActError::NotSupported(_, error)
            | ActError::Unanswered(error)
            | ActError::Os(_, error) => error.raw_os_error(),
            ActError::NoAck(repair) => repair.as_ref()?.errno(),
            ActError::Gone
            | ActError::DescriptorsGone
            | ActError::ForeignProc
            | ActError::Orphan
            | ActError::Unsent(_)
            | ActError::RstIgnored
            | ActError::PeerAlive
            | ActError::PeerSilent
            | ActError::Interrupted => None,
        }
    }
}

impl fmt::Display for ActError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ActError::Gone => f.write_str("closed before the act"),
            ActError::DescriptorsGone => f.write_str("every known descriptor has been closed"),
            ActError::ForeignProc => f.write_str(
                "/proc shows another pid namespace than cwkill runs in; mount one of its own, or run it \
                 outside",
            ),
            ActError::Denied(need, error) => write!(f, "{error}: needs {need}"),
            ActError::NotSupported(what, error) => write!(f, "{error}: {what}"),
            ActError::Orphan => f.write_str(ORPHANS),
            ActError::Unsent(bytes) => write!(
                f,
                "would lose {bytes} unsent bytes (--discard-unsent allows it)"
            ),
            ActError::NoAck(repair) => {
                if let Some(error) = repair {
                    write!(f, "{error}; ")?;
                }
                f.write_str(
                    "no ACK could be drawn from it within the grace (is something dropping packets on lo: \
                     nftables, conntrack's invalid state? is there a route to the peer, does it answer \
                     ARP? TCP-MD5 or TCP-AO, NAT on this host?)",
                )
            }
            ActError::RstIgnored => f.write_str(
                "RST sent, but the socket is still there (nftables dropping on lo? TCP-MD5 or TCP-AO?)",
            ),
            ActError::PeerAlive => f.write_str("peer is alive"),
            ActError::PeerSilent => {
                f.write_str("no answer from the peer within the grace, which does not prove it gone")
            }
            ActError::Interrupted => f.write_str("interrupted"),
            ActError::Unanswered(error) => write!(f, "the kernel's answer was lost: {error}"),
            ActError::Os(call, error) => write!(f, "{call}: {error}"),
        }
    }
}
