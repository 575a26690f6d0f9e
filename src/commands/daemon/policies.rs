//! The policies of the daemon: what each would close in a sweep, what it closes, and what is said about it.

use std::path::Path;

use anyhow::Context;

use super::act::{self, Acting, now};
use super::sweep::Sweeper;
use crate::control::Control;
use crate::daemon::config::describe::MatchedNow;
use crate::daemon::config::{DaemonConfig, Policy};
use crate::daemon::metrics::policies::{OfPolicies, PolicyNumbers};
use crate::daemon::policy::breaker::{Change, Status};
use crate::daemon::policy::engine::Engine;
use crate::daemon::policy::matching::Collector;
use crate::daemon::policy::state::StateFile;
use crate::daemon::policy::{ActResult, Decision, Hold, Now, Readiness, SweepFacts};
use crate::finder;
use crate::history;
use crate::model::Scan;
use crate::proc::{ProcFs, ProcessId, is_missing, read_identity};
use crate::terminal::say;
use crate::text::counted;

/// The policies, with what they have seen and done.
pub(super) struct Policies {
    config: DaemonConfig,
    pub(super) engine: Engine,
    /// `None` if the file cannot be used. While no policy acts it is only read: another daemon may have the lock.
    pub(super) file: Option<StateFile>,
    /// For the metrics.
    pub(super) numbers: OfPolicies,
    /// What was said of each policy last.
    said: Vec<String>,
    /// The scans that failed, by policy, as they were said last.
    failures: Vec<Option<String>>,
    success: Success,
}

/// Whether the last sweep did what the policies want, for the exit status of `--once`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Success {
    AsWanted,
    /// An act failed, or a signal came before the acts.
    NotAllClosed,
    /// A policy could not act, because something could not be read or written.
    NothingDone,
}

impl Policies {
    /// Reads what an earlier daemon has kept in `directory`. If that cannot be known, the policies only observe; a message says why.
    pub fn open(config: &DaemonConfig, directory: &Path) -> Self {
        let (engine, file) = match opened(config, directory) {
            Ok((engine, file)) => (engine, Some(file)),
            Err(error) => {
                if config.acts() {
                    say(format_args!("the policies only observe: {error:#}"));
                }
                (Engine::unusable(config), None)
            }
        };
        Policies {
            numbers: OfPolicies::default(),
            said: Vec::new(),
            failures: Vec::new(),
            success: Success::AsWanted,
            config: config.clone(),
            engine,
            file,
        }
    }

    /// Takes another configuration. A new or changed policy observes a sweep before it acts.
    pub fn configure(&mut self, config: &DaemonConfig) {
        self.engine.configure(config);
        self.config = config.clone();
        let is_configured = |name: &String| config.policies.iter().any(|it| it.name == *name);
        self.numbers.policies.retain(|name, _| is_configured(name));
        self.said.clear();
        self.failures.clear();
    }

    /// Whether there is a policy.
    pub fn is_empty(&self) -> bool {
        self.config.policies.is_empty()
    }

    /// Decides about the sockets of a sweep, and acts. Returns a sentence about it; `None` without policies.
    pub fn sweep(
        &mut self,
        scan: &Scan,
        proc: &ProcFs,
        sweeper: &Sweeper,
        control: &dyn Control,
    ) -> Option<String> {
        self.carry_out_resets();
        if self.is_empty() {
            return None;
        }
        self.success = Success::AsWanted;
        let facts = self.facts(scan, proc, sweeper);
        let now = now();
        let mut decisions = self.engine.decide(now, &facts);
        for decision in &mut decisions {
            let name = &self.config.policies[decision.policy].name;
            if let Some(change) = decision.change {
                say(format_args!("policy {name}: {}", change.sentence()));
            }
            if decision.hold.is_some() || decision.chosen.is_empty() {
                continue;
            }
            if control.interrupted() {
                decision.hold = Some(Hold::Interrupted);
                self.success = Success::NotAllClosed;
                continue;
            }
            let acting = Acting {
                config: &self.config,
                facts: &facts,
                proc,
                sweeper,
                control,
            };
            match act::act(&mut self.engine, self.file.as_ref(), decision, &acting) {
                Err(hold) => decision.hold = Some(hold),
                Ok(batch) => {
                    let numbers = self.numbers.policies.entry(name.clone()).or_default();
                    let was_cut_short =
                        control.interrupted() && batch.results.contains(&ActResult::Untouched);
                    if was_cut_short || batch.results.contains(&ActResult::Failed) {
                        self.success = Success::NotAllClosed;
                    }
                    for (reason, count) in batch.not_closed {
                        *numbers.not_closed.entry(reason).or_default() += count;
                    }
                    for result in batch.results {
                        *match result {
                            ActResult::Closed => &mut numbers.acts.closed,
                            ActResult::Failed => &mut numbers.acts.failed,
                            ActResult::Untouched => &mut numbers.acts.untouched,
                        } += 1;
                    }
                    count_opened(numbers, batch.change);
                }
            }
        }
        self.write();
        let holds = decisions.iter().filter_map(|decision| decision.hold);
        if holds.into_iter().any(Hold::is_failure) {
            self.success = Success::NothingDone;
        }
        self.count(now, &decisions);
        let sentences: Vec<String> = decisions.iter().map(|it| self.sentence(it)).collect();
        for (index, sentence) in sentences.iter().enumerate() {
            if self.said.get(index) != Some(sentence) {
                say(format_args!("{sentence}"));
            }
        }
        self.said.clone_from(&sentences);
        Some(sentences.join("; "))
    }

    /// Of the last sweep.
    pub fn success(&self) -> Success {
        self.success
    }

    /// Takes the decisions into the numbers.
    fn count(&mut self, now: Now, decisions: &[Decision]) {
        self.numbers.host_budget_left = self.engine.host_left_in_hour(now);
        for decision in decisions {
            let index = decision.policy;
            let policy = &self.config.policies[index];
            let numbers = self
                .numbers
                .policies
                .entry(policy.name.clone())
                .or_default();
            numbers.selected = decision.selected as u64;
            numbers.chosen = decision.chosen.len() as u64;
            numbers.hold = decision.hold;
            numbers.left.clone_from(&decision.left);
            numbers.status = self.engine.status(index);
            numbers.budget_left = self.engine.left_in_hour(index, now);
            numbers.expires = policy.expires.as_ref().map(|end| end.at);
            count_opened(numbers, decision.change);
        }
    }

    /// What the sweep has seen of the sockets that the policies select.
    fn facts(&mut self, scan: &Scan, proc: &ProcFs, sweeper: &Sweeper) -> SweepFacts {
        let (facts, failures) = collect(&self.config, &self.engine, scan, proc, sweeper);
        for (index, failure) in failures.iter().enumerate() {
            let said = self.failures.get(index).cloned().flatten();
            if let Some(why) = failure.as_ref().filter(|why| said.as_ref() != Some(why)) {
                let name = &self.config.policies[index].name;
                say(format_args!("policy {name}: {why}"));
            }
        }
        self.failures = failures;
        facts
    }

    /// Closes the breakers that the operator has ordered to close. While no policy acts nothing is kept, so the orders are left to the
    /// next daemon that acts.
    fn carry_out_resets(&mut self) {
        let Some(file) = self.file.clone().filter(|_| self.config.acts()) else {
            return;
        };
        let names = match file.resets() {
            Ok(names) => names,
            Err(error) => {
                say(format_args!(
                    "cannot read the orders of cwkill daemon --reset: {error}"
                ));
                return;
            }
        };
        for name in names {
            match self.engine.reset(&name) {
                true => say(format_args!(
                    "policy {name}: its circuit breaker was reset; it observes a sweep before it acts"
                )),
                false => say(format_args!("there is no policy {name} to reset")),
            }
            // If it cannot be written, the order is carried out again after the next start.
            if self.write()
                && let Err(error) = file.remove_reset(&name)
            {
                say(format_args!(
                    "cannot remove the order to reset {name}: {error}"
                ));
            }
        }
    }

    /// Writes what a later daemon must know. Returns whether it did.
    fn write(&self) -> bool {
        let Some(file) = self.file.as_ref().filter(|_| self.config.acts()) else {
            return true;
        };
        match file.write(&self.engine.kept()) {
            Ok(()) => true,
            Err(error) => {
                say(format_args!(
                    "cannot write the state of the policies: {error}"
                ));
                false
            }
        }
    }

    fn name(&self, decision: &Decision) -> &str {
        &self.config.policies[decision.policy].name
    }

    /// What a policy has done or would do.
    fn sentence(&self, decision: &Decision) -> String {
        let name = self.name(decision);
        let chosen = counted(decision.chosen.len(), "socket");
        let of = decision.selected;
        let left: Vec<String> = decision
            .left
            .iter()
            .map(|(reason, count)| format!("{count} {}", reason.code()))
            .collect();
        let left = match left.is_empty() {
            true => String::new(),
            false => format!("; left alone: {}", left.join(", ")),
        };
        match decision.hold {
            None => format!("policy {name}: acted on {chosen} of {of}{left}"),
            Some(hold) => format!(
                "policy {name}: would close {chosen} of {of}, but {}{left}",
                hold.sentence()
            ),
        }
    }
}

/// Counts a breaker that has opened.
fn count_opened(numbers: &mut PolicyNumbers, change: Option<Change>) {
    if let Some(Status::Open { why, .. }) = change.map(|change| change.to) {
        *numbers.opened.entry(why).or_default() += 1;
    }
}

/// How many sockets each policy matches now, for `--check-config`.
pub(super) fn matched_now(
    config: &DaemonConfig,
    scan: &Scan,
    proc: &ProcFs,
    sweeper: &Sweeper,
) -> Vec<Option<MatchedNow>> {
    let engine = Engine::unusable(config);
    let (facts, failures) = collect(config, &engine, scan, proc, sweeper);
    let matched = |(selected, failure): (&Vec<(usize, Readiness)>, &Option<String>)| {
        let is_ready = |(index, readiness): &&(usize, Readiness)| {
            *readiness == Readiness::Ready && facts.sockets[*index].protected.is_none()
        };
        failure.is_none().then(|| MatchedNow {
            selected: selected.len(),
            ready: selected.iter().filter(is_ready).count(),
        })
    };
    facts.selected.iter().zip(&failures).map(matched).collect()
}

/// The facts of a sweep, and for each policy why its own sockets could not be listed.
fn collect(
    config: &DaemonConfig,
    engine: &Engine,
    scan: &Scan,
    proc: &ProcFs,
    sweeper: &Sweeper,
) -> (SweepFacts, Vec<Option<String>>) {
    let states = sweeper.config.selectors.states;
    let mut collector = Collector::new(&config.policies, &config.protection);
    collector.add_shared(scan, states);
    let mut failures = vec![None; config.policies.len()];
    for (index, policy) in config.policies.iter().enumerate() {
        if !policy.can_share_scan(states) {
            match own_scan(policy, config, proc, sweeper) {
                Ok(scan) => collector.add_own(&scan, index),
                Err(error) => {
                    failures[index] = Some(format!("its sockets cannot be listed: {error:#}"));
                }
            }
        }
    }
    let limit = |id: ProcessId| proc.open_file_limits(id.pid).map(|(soft, _)| soft);
    let ended = engine
        .watched()
        .into_iter()
        .filter(|id| has_ended(proc, *id));
    let mut facts = collector.finish(&limit, ended.collect());
    facts.unlisted = (0..failures.len())
        .filter(|&index| failures[index].is_some())
        .collect();
    (facts, failures)
}

/// The sockets that the selectors of a policy select, without its times.
fn own_scan(
    policy: &Policy,
    config: &DaemonConfig,
    proc: &ProcFs,
    sweeper: &Sweeper,
) -> anyhow::Result<Scan> {
    let selectors = policy.selectors.of_any_age();
    let scope = policy.scope(config.all_netns);
    let namespaces = finder::open_namespaces(&scope, &selectors, proc)?;
    Ok(finder::find(
        &namespaces,
        proc,
        &selectors,
        &sweeper.history,
    )?)
}

/// Whether the process has ended; another one may have its pid.
fn has_ended(proc: &ProcFs, id: ProcessId) -> bool {
    match read_identity(proc, id.pid) {
        Ok(process) => process.id != id,
        Err(error) => is_missing(&error),
    }
}

/// An engine with its file.
fn opened(config: &DaemonConfig, directory: &Path) -> anyhow::Result<(Engine, StateFile)> {
    let clock = history::clock().context("/proc does not show which boot this is")?;
    let file = StateFile::new(directory.to_owned(), clock);
    let kept = file.read(history::now())?;
    Ok((Engine::with(config, kept), file))
}
