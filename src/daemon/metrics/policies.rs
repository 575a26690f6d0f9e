//! What the policies have decided and done.

use std::collections::BTreeMap;
use std::time::SystemTime;

use strum::VariantArray;

use super::exposition::{Exposition, Labels, Value};
use crate::daemon::policy::breaker::{Status, Trip};
use crate::daemon::policy::{Hold, Reason};
use crate::model::Target;

/// The numbers of a policy.
#[derive(Clone, Debug, Default)]
pub struct PolicyNumbers {
    /// Sockets that it selects, and those that it would close, or has closed, in the last sweep.
    pub selected: u64,
    pub chosen: u64,
    /// Why it does not act.
    pub hold: Option<Hold>,
    pub left: BTreeMap<Reason, usize>,
    pub status: Status,
    /// How many sockets it may act on yet in this hour.
    pub budget_left: u32,
    pub expires: Option<SystemTime>,
    /// Its acts since the start of the daemon.
    pub acts: ActCounts,
    /// Why chosen sockets were not closed since the start of the daemon, by the code of the record, or [`GONE`].
    pub not_closed: BTreeMap<&'static str, u64>,
    /// How often its breaker has opened since the start of the daemon.
    pub opened: BTreeMap<Trip, u64>,
}

/// The reason of the sockets that were gone before the act.
pub const GONE: &str = "gone";

/// How many chosen sockets had which result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ActCounts {
    pub closed: u64,
    pub failed: u64,
    pub untouched: u64,
}

/// The numbers of all policies, by name.
#[derive(Clone, Debug, Default)]
pub struct OfPolicies {
    pub policies: BTreeMap<String, PolicyNumbers>,
    /// How many sockets all of them may act on yet in this hour.
    pub host_budget_left: u32,
}

const STATUSES: [&str; 3] = ["closed", "half-open", "open"];

/// Adds the metrics; nothing without policies.
pub(super) fn add(of: &OfPolicies, all: &mut Exposition) {
    if of.policies.is_empty() {
        return;
    }
    let one = |name: &str| -> Labels { vec![("policy", name.to_owned())] };
    let two = |name: &str, label: &'static str, value: &str| -> Labels {
        vec![("policy", name.to_owned()), (label, value.to_owned())]
    };
    let each = |value: fn(&PolicyNumbers) -> Value| {
        let policies = of.policies.iter();
        policies.map(move |(name, numbers)| (one(name), value(numbers)))
    };
    all.gauge(
        "cwkill_policy_selected_sockets",
        "Sockets that the policy selects, whatever their age.",
        each(|numbers| numbers.selected.into()),
    );
    all.gauge(
        "cwkill_policy_chosen_sockets",
        "Sockets that the policy would close in the last sweep, or has tried to close.",
        each(|numbers| numbers.chosen.into()),
    );
    let left = of.policies.iter().flat_map(|(name, numbers)| {
        Reason::VARIANTS.iter().map(move |reason| {
            let count = numbers.left.get(reason).copied().unwrap_or(0) as u64;
            (two(name, "reason", reason.code()), count.into())
        })
    });
    all.gauge(
        "cwkill_policy_left_sockets",
        "Sockets that the policy selects and leaves alone, by the reason; cwkill-daemon(8) explains each.",
        left,
    );
    let held = of.policies.iter().flat_map(|(name, numbers)| {
        Hold::VARIANTS.iter().map(move |hold| {
            let is_so = numbers.hold == Some(*hold);
            (two(name, "reason", hold.code()), is_so.into())
        })
    });
    all.gauge(
        "cwkill_policy_held",
        "1 for the reason for which the policy does not act.",
        held,
    );
    let breaker = of.policies.iter().flat_map(|(name, numbers)| {
        STATUSES.iter().map(move |status| {
            let is_so = numbers.status.code() == *status;
            (two(name, "state", status), is_so.into())
        })
    });
    all.gauge(
        "cwkill_policy_breaker",
        "1 for the state of the circuit breaker of the policy.",
        breaker,
    );
    let opened = of.policies.iter().flat_map(|(name, numbers)| {
        Trip::VARIANTS.iter().map(move |trip| {
            let count = numbers.opened.get(trip).copied().unwrap_or(0);
            (two(name, "reason", trip.code()), count.into())
        })
    });
    all.counter(
        "cwkill_policy_breaker_opened",
        "How often the circuit breaker of the policy has opened since the start of the daemon.",
        opened,
    );
    let acts = of.policies.iter().flat_map(|(name, numbers)| {
        let ActCounts {
            closed,
            failed,
            untouched,
        } = numbers.acts;
        let results = [
            ("closed", closed),
            ("failed", failed),
            ("untouched", untouched),
        ];
        results.map(|(result, count)| (two(name, "result", result), count.into()))
    });
    all.counter(
        "cwkill_policy_acts",
        "Sockets that the policy has chosen and was allowed to close, by the result. Those of untouched were gone, or spared at the last look.",
        acts,
    );
    let not_closed = of.policies.iter().flat_map(|(name, numbers)| {
        Target::reason_codes().into_iter().map(move |reason| {
            let count = numbers.not_closed.get(reason).copied().unwrap_or(0);
            (two(name, "reason", reason), count.into())
        })
    });
    all.counter(
        "cwkill_policy_not_closed",
        "Sockets of failed and untouched acts, by the reason_code of their records; gone for those that were gone.",
        not_closed,
    );
    all.gauge(
        "cwkill_policy_budget_left",
        "Sockets that the policy may act on yet in this hour.",
        each(|numbers| u64::from(numbers.budget_left).into()),
    );
    all.gauge(
        "cwkill_budget_left",
        "Sockets that all policies together may act on yet in this hour.",
        [(Labels::new(), u64::from(of.host_budget_left).into())],
    );
    let expires = of.policies.iter().filter_map(|(name, numbers)| {
        let at = numbers
            .expires?
            .duration_since(SystemTime::UNIX_EPOCH)
            .ok()?;
        Some((one(name), at.into()))
    });
    all.gauge(
        "cwkill_policy_expires_timestamp_seconds",
        "When the policy ends to act. Policies without an end have no series.",
        expires,
    );
}
