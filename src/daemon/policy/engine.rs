//! The engine: decides for each sweep which sockets each policy would close, and whether it may. Pure.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

use super::breaker::{Breaker, Change, Done, Seen, Status};
use super::ledger::{Ledger, ms_up};
use super::{ActResult, Decision, Hold, Now, Readiness, Reason, SweepFacts};
use crate::daemon::config::{DaemonConfig, HALF_OPEN, Limits, Mode, Policy};
use crate::model::{NetnsKey, SocketKey};
use crate::proc::ProcessId;

/// An act stays noted for so long after its socket was listed last.
const NOTED_FOR: Duration = Duration::from_secs(60 * 60);
/// A socket of a namespace that is not listed is remembered for so many sweeps.
const REMEMBERED_UNLISTED: u64 = 10;

/// A socket on which no method could be used is left to the others for so many sweeps.
const DEFERRED_FOR: u64 = 10;

/// What the policies may do, and what they have seen.
#[derive(Debug)]
pub struct Engine {
    policies: Vec<Policy>,
    limits: Limits,
    /// Counts the sweeps, also over restarts.
    sweep: u64,
    /// All acts of the host.
    host: Ledger,
    /// By the name of the policy; also of policies that are no longer configured.
    known: BTreeMap<String, Known>,
    /// The sockets on which a policy has acted, or was about to.
    acted: HashMap<SocketKey, Acted>,
    /// One for each policy.
    memories: Vec<Memory>,
    /// Whether it is known what was done before.
    is_usable: bool,
}

/// What is kept of a policy over restarts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Known {
    /// Of the policy that has observed a sweep.
    pub fingerprint: Option<u64>,
    pub ledger: Ledger,
    pub breaker: Breaker,
}

/// An act on a socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Acted {
    pub policy: String,
    /// When the socket was listed last, in milliseconds since boot.
    pub seen_ms: u64,
}

/// What is kept over restarts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Kept {
    pub(super) sweep: u64,
    pub(super) host: Ledger,
    pub(super) known: BTreeMap<String, Known>,
    pub(super) acted: HashMap<SocketKey, Acted>,
}

impl Kept {
    /// A daemon goes on with it in the same boot. The one before may have been killed in the middle of its acts.
    pub fn restarted(mut self, now: Duration) -> Self {
        self.host.settle_all(now);
        for known in self.known.values_mut() {
            known.ledger.settle_all(now);
        }
        self
    }

    /// A daemon goes on with it in the same boot, by another clock.
    pub fn with_other_clock(mut self, now: Duration) -> Self {
        let acted = std::mem::take(&mut self.acted).into_iter();
        let now_ms = ms_up(now);
        let renewed = acted.map(|(key, acted)| {
            let seen_ms = now_ms;
            (key, Acted { seen_ms, ..acted })
        });
        Kept {
            acted: renewed.collect(),
            ..self.rebooted(now)
        }
    }

    /// A daemon goes on with it in another boot: no socket and no process is the same.
    pub fn rebooted(mut self, now: Duration) -> Self {
        self.host.rebase(now);
        for known in self.known.values_mut() {
            known.ledger.rebase(now);
            known.breaker.rebase(now);
        }
        self.acted.clear();
        self
    }
}

/// What a policy has seen in the sweeps since the start.
#[derive(Debug, Default)]
struct Memory {
    /// The sockets that it selected in the sweep before.
    seen: HashMap<SocketKey, SeenBefore>,
    /// Whether there was a sweep.
    has_begun: bool,
    /// The sockets on which no method could be used, and the sweep until which others go first.
    deferred: HashMap<SocketKey, u64>,
    /// The owners with more than `start_above`, until they have fewer than `stop_below`.
    active: HashSet<ProcessId>,
}

#[derive(Clone, Copy, Debug)]
struct SeenBefore {
    /// In how many sweeps in a row it was ready.
    ready: u32,
    /// The number of the sweep that listed it last.
    sweep: u64,
}

/// How many sockets the host may act on yet.
#[derive(Clone, Copy)]
struct HostLeft {
    sweep: usize,
    hour: usize,
}

impl Engine {
    /// An engine that knows nothing of earlier sweeps.
    pub fn new(config: &DaemonConfig) -> Self {
        Engine::with(config, Kept::default())
    }

    /// An engine that goes on with what an earlier one has kept, in the same boot.
    pub fn with(config: &DaemonConfig, kept: Kept) -> Self {
        let Kept {
            sweep,
            host,
            known,
            acted,
        } = kept;
        let mut engine = Engine {
            policies: Vec::new(),
            limits: config.limits,
            sweep,
            host,
            known,
            acted,
            memories: Vec::new(),
            is_usable: true,
        };
        engine.configure(config);
        engine
    }

    /// An engine that only observes: what was done before cannot be known.
    pub fn unusable(config: &DaemonConfig) -> Self {
        Engine {
            is_usable: false,
            ..Engine::new(config)
        }
    }

    /// Whether what was done before is known. Otherwise nothing is done, and nothing is to be kept.
    pub fn is_usable(&self) -> bool {
        self.is_usable
    }

    /// What is to be kept.
    pub fn kept(&self) -> Kept {
        Kept {
            sweep: self.sweep,
            host: self.host.clone(),
            known: self.known.clone(),
            acted: self.acted.clone(),
        }
    }

    /// Takes another configuration. A policy that is the same goes on; a new or changed one observes first.
    pub fn configure(&mut self, config: &DaemonConfig) {
        let old = std::mem::take(&mut self.policies);
        let memories = std::mem::take(&mut self.memories);
        let mut before: HashMap<(String, u64), Memory> = old
            .into_iter()
            .map(|policy| (policy.name, policy.fingerprint))
            .zip(memories)
            .collect();
        self.limits = config.limits;
        self.policies = config.policies.clone();
        for policy in &self.policies {
            let known = self.known.entry(policy.name.clone()).or_default();
            let memory = before.remove(&(policy.name.clone(), policy.fingerprint));
            if known.fingerprint != Some(policy.fingerprint) {
                known.fingerprint = None;
                known.breaker.forget_samples();
            }
            self.memories.push(memory.unwrap_or_default());
        }
    }

    pub fn policies(&self) -> &[Policy] {
        &self.policies
    }

    /// The number of the last sweep, also over restarts.
    pub fn sweep_number(&self) -> u64 {
        self.sweep
    }

    /// The status of the breaker of a policy.
    pub fn status(&self, policy: usize) -> Status {
        self.known(policy).breaker.status()
    }

    /// How many sockets a policy may act on yet in this hour.
    pub fn left_in_hour(&self, policy: usize, now: Now) -> u32 {
        let used = self.known(policy).ledger.used(now.since_boot);
        self.policies[policy].kills_per_hour.saturating_sub(used)
    }

    /// How many sockets all policies together may act on yet in this hour.
    pub fn host_left_in_hour(&self, now: Now) -> u32 {
        let used = self.host.used(now.since_boot);
        self.limits.kills_per_hour.saturating_sub(used)
    }

    /// The owners of which the next sweep must tell whether they have ended.
    pub fn watched(&self) -> HashSet<ProcessId> {
        let breakers = self.known.values().map(|known| &known.breaker);
        breakers.flat_map(Breaker::watched).collect()
    }

    /// Closes the breaker of a policy by the order of the operator, and lets it act again on sockets on which it has acted before. It
    /// observes a sweep first. Returns whether there is such a policy.
    pub fn reset(&mut self, name: &str) -> bool {
        let Some(known) = self.known.get_mut(name) else {
            return false;
        };
        known.breaker.reset();
        known.fingerprint = None;
        self.acted.retain(|_, acted| acted.policy != name);
        true
    }

    fn known(&self, policy: usize) -> &Known {
        &self.known[&self.policies[policy].name]
    }

    fn known_mut(&mut self, policy: usize) -> &mut Known {
        let name = self.policies[policy].name.clone();
        self.known.entry(name).or_default()
    }

    /// Decides about a sweep. It changes no budget: see [`Engine::reserve`].
    pub fn decide(&mut self, now: Now, facts: &SweepFacts) -> Vec<Decision> {
        self.sweep += 1;
        let time = now.since_boot;
        self.host.clamp(time);
        for known in self.known.values_mut() {
            known.ledger.clamp(time);
        }
        self.note_seen(time, facts);
        let count = |number: u32| usize::try_from(number).unwrap_or(usize::MAX);
        let mut left = HostLeft {
            sweep: count(self.limits.kills_per_sweep),
            hour: count(self.host_left_in_hour(now)),
        };
        let mut taken = HashSet::new();
        let mut decisions = Vec::with_capacity(self.policies.len());
        for policy in 0..self.policies.len() {
            let decision = self.decide_policy(policy, now, facts, left, &taken);
            if decision.hold.is_none() {
                left.sweep -= decision.chosen.len();
                left.hour -= decision.chosen.len();
                taken.extend(&decision.chosen);
            }
            decisions.push(decision);
        }
        self.forget_unconfigured(time);
        decisions
    }

    /// Notes that the acts of `decision` are about to happen. If this cannot be written to the state file, do nothing, and call
    /// [`Engine::cancel`].
    pub fn reserve(&mut self, now: Now, decision: &Decision, facts: &SweepFacts) {
        let count = u32::try_from(decision.chosen.len()).unwrap_or(u32::MAX);
        self.host.reserve(now.since_boot, count);
        let known = self.known_mut(decision.policy);
        known.ledger.reserve(now.since_boot, count);
        let policy = self.policies[decision.policy].name.clone();
        for &index in &decision.chosen {
            let acted = Acted {
                policy: policy.clone(),
                seen_ms: ms_up(now.since_boot),
            };
            self.acted.insert(facts.sockets[index].key, acted);
        }
    }

    /// Takes back what [`Engine::reserve`] has noted: nothing was done.
    pub fn cancel(&mut self, now: Now, decision: &Decision, facts: &SweepFacts) {
        let count = u32::try_from(decision.chosen.len()).unwrap_or(u32::MAX);
        for &index in &decision.chosen {
            self.acted.remove(&facts.sockets[index].key);
        }
        self.host.settle(now.since_boot, count);
        let known = self.known_mut(decision.policy);
        known.ledger.settle(now.since_boot, count);
    }

    /// Takes in what became of the sockets of `decision`, in the same order. What was not touched is given back. `spins`: whether one of
    /// their owners spins now.
    pub fn settle(
        &mut self,
        now: Now,
        decision: &Decision,
        facts: &SweepFacts,
        results: &[ActResult],
        spins: bool,
    ) -> Option<Change> {
        let mut done = Done {
            spins,
            ..Done::default()
        };
        let mut untouched = 0;
        let mut owners = HashSet::new();
        for (&index, result) in decision.chosen.iter().zip(results) {
            let socket = &facts.sockets[index];
            match result {
                ActResult::Untouched => {
                    untouched += 1;
                    self.acted.remove(&socket.key);
                    let deferred = &mut self.memories[decision.policy].deferred;
                    deferred.insert(socket.key, self.sweep + DEFERRED_FOR);
                    continue;
                }
                ActResult::Closed => done.closed += 1,
                ActResult::Failed => done.failed += 1,
            }
            owners.extend(&socket.owners);
        }
        done.owners = owners.into_iter().collect();
        self.host.settle(now.since_boot, untouched);
        let rules = self.policies[decision.policy].breaker;
        let known = self.known_mut(decision.policy);
        known.ledger.settle(now.since_boot, untouched);
        known.breaker.record(&rules, now.since_boot, &done)
    }

    /// Notes which of the sockets with acts are still listed, and forgets those that have long been gone.
    fn note_seen(&mut self, now: Duration, facts: &SweepFacts) {
        if self.acted.is_empty() {
            return;
        }
        let now_ms = ms_up(now);
        for socket in &facts.sockets {
            if let Some(acted) = self.acted.get_mut(&socket.key) {
                acted.seen_ms = now_ms;
            }
        }
        self.acted.retain(|_, acted| {
            // The clock has started again.
            acted.seen_ms = acted.seen_ms.min(now_ms);
            now < Duration::from_millis(acted.seen_ms).saturating_add(NOTED_FOR)
        });
    }

    /// Forgets policies that are no longer configured, as soon as they could come back with no more than a new one has.
    fn forget_unconfigured(&mut self, now: Duration) {
        let policies = &self.policies;
        self.known.retain(|name, known| {
            policies.iter().any(|policy| policy.name == *name)
                || known.ledger.used(now) > 0
                || known.breaker.status() != Status::Closed
        });
    }

    fn decide_policy(
        &mut self,
        index: usize,
        now: Now,
        facts: &SweepFacts,
        left: HostLeft,
        taken: &HashSet<usize>,
    ) -> Decision {
        let selected = facts.selected.get(index).map_or(&[][..], Vec::as_slice);
        let policy = &self.policies[index];
        let memory = &mut self.memories[index];
        let is_unlisted = facts.unlisted.contains(&index);
        let new = match is_unlisted {
            false => memory.observe(self.sweep, selected, facts),
            true => None,
        };
        let known = self.known.entry(policy.name.clone()).or_default();
        let ended = facts.ended.iter().copied().collect();
        let seen = Seen {
            selected: selected.len(),
            new,
            ended: &ended,
        };
        let change = known.breaker.observe(&policy.breaker, now.since_boot, seen);
        let hold = match hold(policy, now, known, self.is_usable) {
            None | Some(Hold::New) if is_unlisted => Some(Hold::Unlisted),
            hold => hold,
        };
        if !is_unlisted {
            known.fingerprint = Some(policy.fingerprint);
        }
        memory.update_active(policy, selected, facts);
        let count = |number: u32| usize::try_from(number).unwrap_or(usize::MAX);
        let used = known.ledger.used(now.since_boot);
        let half_open = match known.breaker.status() {
            Status::HalfOpen { .. } => HALF_OPEN,
            Status::Closed | Status::Open { .. } => usize::MAX,
        };
        let chooser = Chooser {
            policy,
            facts,
            memory,
            acted: &self.acted,
            taken,
            caps: [
                (half_open, Reason::HalfOpen),
                (count(policy.kills_per_sweep), Reason::PolicySweepBudget),
                (
                    count(policy.kills_per_hour.saturating_sub(used)),
                    Reason::PolicyHourBudget,
                ),
                (left.sweep, Reason::HostSweepBudget),
                (left.hour, Reason::HostHourBudget),
            ],
        };
        let (chosen, left) = chooser.choose(selected);
        Decision {
            policy: index,
            selected: selected.len(),
            chosen,
            hold,
            left,
            change,
        }
    }
}

/// Why the policy does not act now.
fn hold(policy: &Policy, now: Now, known: &Known, is_usable: bool) -> Option<Hold> {
    let is_over = policy
        .expires
        .as_ref()
        .is_some_and(|end| now.wall >= end.at);
    let in_window = policy.windows.is_empty()
        || policy
            .windows
            .iter()
            .any(|window| window.contains(now.wall));
    if policy.mode == Mode::Observe {
        Some(Hold::ObserveMode)
    } else if !is_usable {
        Some(Hold::StateUnusable)
    } else if is_over {
        Some(Hold::Expired)
    } else if matches!(known.breaker.status(), Status::Open { .. }) {
        Some(Hold::BreakerOpen)
    } else if known.fingerprint != Some(policy.fingerprint) {
        Some(Hold::New)
    } else if !in_window {
        Some(Hold::OutsideWindow)
    } else {
        None
    }
}

impl Memory {
    /// Takes in the sockets of a sweep. Returns how many of them are new; `None` in the first sweep.
    fn observe(
        &mut self,
        sweep: u64,
        selected: &[(usize, Readiness)],
        facts: &SweepFacts,
    ) -> Option<usize> {
        let before = std::mem::take(&mut self.seen);
        let mut new = 0;
        for &(index, readiness) in selected {
            let key = facts.sockets[index].key;
            let earlier = before.get(&key);
            new += usize::from(earlier.is_none());
            let ready = match readiness {
                // A sweep that did not list it breaks the row.
                Readiness::Ready => earlier
                    .filter(|earlier| earlier.sweep + 1 == sweep)
                    .map_or(1, |earlier| earlier.ready.saturating_add(1)),
                Readiness::TooYoung | Readiness::InUse => 0,
            };
            self.seen.insert(key, SeenBefore { ready, sweep });
        }
        self.deferred.retain(|_, until| *until >= sweep);
        // Those of a namespace that could not be listed are not gone.
        let listed: HashSet<NetnsKey> = facts.listed.iter().copied().collect();
        for (key, earlier) in before {
            let is_recent = earlier.sweep + REMEMBERED_UNLISTED > sweep;
            if !listed.contains(&key.netns) && is_recent {
                self.seen.entry(key).or_insert(earlier);
            }
        }
        let had_begun = std::mem::replace(&mut self.has_begun, true);
        had_begun.then_some(new)
    }

    /// Which owners have more than `start_above`, or have not fewer than `stop_below` yet.
    fn update_active(
        &mut self,
        policy: &Policy,
        selected: &[(usize, Readiness)],
        facts: &SweepFacts,
    ) {
        let Some(start) = policy.start_above else {
            return;
        };
        let stop = policy.stop_below.unwrap_or(start);
        let counts = counts(selected, facts);
        let mut active = HashSet::new();
        for (&owner, &count) in &counts {
            let Some(owner) = owner else {
                continue;
            };
            let limit = facts.limits.get(&owner).copied();
            let exceeds = start.sockets(limit).is_some_and(|start| count > start);
            let goes_on = self.active.contains(&owner)
                && stop.sockets(limit).is_some_and(|stop| count >= stop);
            if exceeds || goes_on {
                active.insert(owner);
            }
        }
        self.active = active;
    }
}

/// The number of selected sockets of each owner; `None` for those without one.
fn counts(
    selected: &[(usize, Readiness)],
    facts: &SweepFacts,
) -> HashMap<Option<ProcessId>, usize> {
    let mut counts = HashMap::new();
    for &(index, _) in selected {
        for group in groups(&facts.sockets[index].owners) {
            *counts.entry(group).or_default() += 1;
        }
    }
    counts
}

/// The owners by which a socket is counted.
fn groups(owners: &[ProcessId]) -> impl Iterator<Item = Option<ProcessId>> + '_ {
    let nobody = owners.is_empty().then_some(None);
    owners.iter().copied().map(Some).chain(nobody)
}

/// Chooses the sockets of a policy.
struct Chooser<'a> {
    policy: &'a Policy,
    facts: &'a SweepFacts,
    memory: &'a Memory,
    acted: &'a HashMap<SocketKey, Acted>,
    /// Those that other policies act on.
    taken: &'a HashSet<usize>,
    /// How many may be chosen, and the reason against more.
    caps: [(usize, Reason); 5],
}

impl Chooser<'_> {
    /// The sockets to close, the oldest first, and the number of the others by reason.
    fn choose(&self, selected: &[(usize, Readiness)]) -> (Vec<usize>, BTreeMap<Reason, usize>) {
        let mut order: Vec<(usize, Readiness)> = selected.to_vec();
        order.sort_by_key(|&(index, _)| Reverse(self.facts.sockets[index].age));
        let mut allowances = self.allowances(selected);
        let mut chosen = Vec::new();
        let mut left = BTreeMap::new();
        for (index, readiness) in order {
            let against = self
                .against(index, readiness)
                .or_else(|| self.against_owners(index, &allowances))
                .or_else(|| {
                    let is_reached = |(cap, _): &&(usize, Reason)| chosen.len() >= *cap;
                    self.caps.iter().find(is_reached).map(|(_, reason)| *reason)
                });
            match against {
                Some(reason) => *left.entry(reason).or_default() += 1,
                None => {
                    for group in groups(&self.facts.sockets[index].owners) {
                        if let Some(allowance) = allowances.get_mut(&group) {
                            *allowance -= 1;
                        }
                    }
                    chosen.push(index);
                }
            }
        }
        (chosen, left)
    }

    /// The reason in the socket itself.
    fn against(&self, index: usize, readiness: Readiness) -> Option<Reason> {
        let socket = &self.facts.sockets[index];
        let seen = self.memory.seen.get(&socket.key);
        if socket.protected.is_some() {
            return Some(Reason::Protected);
        }
        if socket.has_unknown_owner {
            return Some(Reason::OwnerUnknown);
        }
        if self.acted.contains_key(&socket.key) {
            return Some(Reason::ActedBefore);
        }
        if self.memory.deferred.contains_key(&socket.key) {
            return Some(Reason::Deferred);
        }
        if self.taken.contains(&index) {
            return Some(Reason::OtherPolicy);
        }
        match readiness {
            Readiness::TooYoung => return Some(Reason::TooYoung),
            Readiness::InUse => return Some(Reason::InUse),
            Readiness::Ready => {}
        }
        let is_confirmed = seen.is_some_and(|seen| seen.ready >= self.policy.confirm);
        (!is_confirmed).then_some(Reason::NotConfirmed)
    }

    /// The reason in its owners: a shared socket needs an owner over the level, and room with each of them.
    fn against_owners(
        &self,
        index: usize,
        allowances: &HashMap<Option<ProcessId>, usize>,
    ) -> Option<Reason> {
        let owners = &self.facts.sockets[index].owners;
        let is_active = |owner: &ProcessId| self.memory.active.contains(owner);
        if self.policy.start_above.is_some() && !owners.iter().any(is_active) {
            return Some(Reason::BelowLevel);
        }
        let has_room = |group| allowances.get(&group).is_some_and(|room| *room > 0);
        (!groups(owners).all(has_room)).then_some(Reason::OwnerShare)
    }

    /// How many sockets of each owner may be chosen.
    fn allowances(&self, selected: &[(usize, Readiness)]) -> HashMap<Option<ProcessId>, usize> {
        let stop = self.policy.stop_below.or(self.policy.start_above);
        let mut allowances = counts(selected, self.facts);
        for (group, allowance) in &mut allowances {
            let count = *allowance;
            *allowance = self.policy.share.of(count);
            let limit = group.and_then(|owner| self.facts.limits.get(&owner).copied());
            if let Some(stop) = stop.and_then(|stop| stop.sockets(limit)) {
                // Until it has fewer.
                *allowance = (*allowance).min((count + 1).saturating_sub(stop));
            }
        }
        allowances
    }
}

#[cfg(test)]
#[path = "engine_tests.rs"]
mod tests;
