//! The policies: which stuck sockets each of them would close in a sweep, and whether it may. Pure, except [`state`].
//!
//! [`matching`] compares the sockets of a scan with the selectors of the policies. [`engine`] decides: it keeps what was seen in earlier
//! sweeps, the budgets (`ledger`) and the circuit breakers ([`breaker`]). [`state`] keeps budgets, breakers and intents in a file.
//!
//! An act goes in this order: [`engine::Engine::decide`], [`engine::Engine::reserve`], the state file is written, the act,
//! [`engine::Engine::settle`], the state file is written. If the first write fails, nothing is done. So a daemon that was killed loses no
//! budget and acts on nothing twice.

pub mod breaker;
pub mod engine;
mod ledger;
pub mod matching;
pub mod state;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::{Duration, SystemTime};

use strum::{IntoStaticStr, VariantArray};

use crate::daemon::config::Protected;
use crate::model::{NetnsKey, SocketKey};
use crate::proc::ProcessId;
use breaker::Change;

/// The time of a sweep, by two clocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// It can be set, and jumps then. Only the end of a policy and its times of day are by it.
    pub wall: SystemTime,
    /// The time since boot, as [`crate::history::now`].
    pub since_boot: Duration,
}

/// A stuck socket of a sweep.
#[derive(Clone, Debug)]
pub struct StuckSocket {
    pub key: SocketKey,
    pub age: Option<Duration>,
    /// The processes that are responsible for it, each once. Empty if there are none, or if they are not known.
    pub owners: Vec<ProcessId>,
    /// Whether it has owners that are not known.
    pub has_unknown_owner: bool,
    /// Why no policy may touch it.
    pub protected: Option<Protected>,
}

/// How far a socket that a policy selects fulfils its times.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readiness {
    Ready,
    /// Younger than `min_age`, or of unknown age.
    TooYoung,
    /// Data has moved within `min_idle`.
    InUse,
}

/// What a sweep has seen.
#[derive(Clone, Debug, Default)]
pub struct SweepFacts {
    /// The sockets that at least one policy selects.
    pub sockets: Vec<StuckSocket>,
    /// For each policy the sockets that it selects, as indices into `sockets`.
    pub selected: Vec<Vec<(usize, Readiness)>>,
    /// The policies whose own sockets could not be listed: what they select is not known.
    pub unlisted: HashSet<usize>,
    /// The namespaces whose sockets were listed.
    pub listed: Vec<NetnsKey>,
    /// The soft limit of open files (RLIMIT_NOFILE) of the owners, if it is known.
    pub limits: HashMap<ProcessId, u64>,
    /// Those of [`engine::Engine::watched`] that have ended.
    pub ended: Vec<ProcessId>,
}

/// Why a policy does not act in a sweep, whatever it selects. Its code is the variant in kebab case, and stable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "kebab-case")]
pub enum Hold {
    /// Its mode is to observe.
    ObserveMode,
    /// Its time is over.
    Expired,
    /// It is not its time of day.
    OutsideWindow,
    /// It is new, or has changed, and must observe one sweep first.
    New,
    /// Its circuit breaker is open.
    BreakerOpen,
    /// The state file cannot be used, so it is not known how much was done.
    StateUnusable,
    /// Its sockets could not be listed, or not again before the act.
    Unlisted,
    /// The state file could not be written: what cannot be recorded is not done.
    StateUnwritten,
    /// The log could not be written: what cannot be recorded is not done.
    LogUnwritten,
    /// A signal ends the daemon.
    Interrupted,
}

impl Hold {
    /// The stable name for programs.
    pub fn code(self) -> &'static str {
        self.into()
    }

    /// Whether something is wrong, that the operator must mend.
    pub fn is_failure(self) -> bool {
        match self {
            Hold::StateUnusable | Hold::Unlisted | Hold::StateUnwritten | Hold::LogUnwritten => {
                true
            }
            Hold::ObserveMode
            | Hold::Expired
            | Hold::OutsideWindow
            | Hold::New
            | Hold::BreakerOpen
            | Hold::Interrupted => false,
        }
    }

    /// The same in words.
    pub fn sentence(self) -> &'static str {
        match self {
            Hold::ObserveMode => "it only observes",
            Hold::Expired => "its time is over",
            Hold::OutsideWindow => "it is not its time of day",
            Hold::New => "it is new or has changed, and observes one sweep first",
            Hold::BreakerOpen => "its circuit breaker is open",
            Hold::StateUnusable => "the state file cannot be used",
            Hold::Unlisted => "its sockets cannot be listed",
            Hold::StateUnwritten => "the state file cannot be written",
            Hold::LogUnwritten => "the log cannot be written",
            Hold::Interrupted => "a signal came before its acts",
        }
    }
}

/// Why a policy leaves a socket alone that it selects. Its code is the variant in kebab case, and stable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "kebab-case")]
pub enum Reason {
    Protected,
    /// Not all of its owners are known, so one may be protected.
    OwnerUnknown,
    /// A policy has acted on it before, or was about to when the daemon was killed.
    ActedBefore,
    /// No method could be used on it in one of the last sweeps, so others go first.
    Deferred,
    /// Another policy acts on it in this sweep.
    OtherPolicy,
    TooYoung,
    InUse,
    /// It was ready in too few sweeps in a row.
    NotConfirmed,
    /// Its owner has too few of them for `start_above`, or few enough for `stop_below`.
    BelowLevel,
    /// The share of its owner's sockets is used up in this sweep.
    OwnerShare,
    /// The breaker is half open, and lets only few through.
    HalfOpen,
    PolicySweepBudget,
    PolicyHourBudget,
    HostSweepBudget,
    HostHourBudget,
}

impl Reason {
    /// The stable name for programs.
    pub fn code(self) -> &'static str {
        self.into()
    }
}

/// What a policy would do in a sweep, and whether it may.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Decision {
    /// The index of the policy in the configuration.
    pub policy: usize,
    /// The number of sockets that it selects, whatever their age.
    pub selected: usize,
    /// The sockets to close, as indices into [`SweepFacts::sockets`], the oldest first.
    pub chosen: Vec<usize>,
    /// Why it does not close them; `None` if it does.
    pub hold: Option<Hold>,
    /// The others that it selects, by the reason against each.
    pub left: BTreeMap<Reason, usize>,
    /// What its breaker has done.
    pub change: Option<Change>,
}

/// What became of a chosen socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ActResult {
    /// No method was tried: it was gone, or the plan or the recheck spoke against it.
    Untouched,
    /// It is closed, or closing.
    Closed,
    /// Methods were tried, and it is still there.
    Failed,
}

#[cfg(test)]
mod tests {
    use super::*;
    use breaker::Trip;

    #[test]
    fn the_manual_has_every_code() {
        let manual = include_str!("../../../man/cwkill-daemon.8");
        let holds = Hold::VARIANTS.iter().map(|hold| hold.code());
        let reasons = Reason::VARIANTS.iter().map(|reason| reason.code());
        let trips = Trip::VARIANTS.iter().map(|trip| trip.code());
        for code in holds.chain(reasons).chain(trips) {
            let code = code.replace('-', "\\-");
            assert!(manual.contains(&code), "{code}");
        }
    }
}
