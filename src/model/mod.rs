//! The data of a run: a [`Target`] for each matched socket, and the [`Scan`] that found them.

pub mod cause;
pub mod coverage;
pub mod drain;
pub mod forwarded;
mod left_out;
pub mod method;
pub mod reclaim;
pub mod scan;
pub mod socket;
pub mod spin;
pub mod target;
pub mod time_and_place;

pub use cause::Cause;
pub use coverage::{Coverage, TrackedCloseWait};
pub use drain::{Backlog, DrainReason, DrainResult};
pub use forwarded::{
    EndReport, EndState, EntryDeletion, Forwarded, ForwardedAct, ForwardedFailure,
    ForwardedOutcome, ForwardedScan, ForwardedSkip, forwarded_outcome,
};
pub use method::{Method, Privilege};
pub use reclaim::{InUse, ReclaimOutcome, ReclaimReason};
pub use scan::{Listener, ListeningSocket, Scan};
pub use socket::{HistoryUpdate, NetnsKey, NewEntry, Snapshot, Socket, SocketKey};
pub use spin::{Poller, SpinRisk, Spinning};
pub use target::{Attempt, Exclusion, MethodError, Outcome, Owner, Plan, SkipReason, Target};
pub use time_and_place::TimeAndPlace;
