//! One batch of acts of a policy: the same way as `cwkill` goes, for the sockets that the engine has chosen.
//!
//! The sockets are found anew by the selectors of the policy, and only those with a chosen cookie stay. What is written in the state file
//! and in the log comes before the acts; without either, nothing is done.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::SystemTime;

use super::sweep::Sweeper;
use crate::audit::{Audit, ByPolicy};
use crate::commands::close::{close, find_and_plan, reclaim_descriptors};
use crate::config::{Config, LogOptions};
use crate::control::Control;
use crate::daemon::config::{DaemonConfig, Policy};
use crate::daemon::metrics::policies::GONE;
use crate::daemon::policy::breaker::Change;
use crate::daemon::policy::engine::Engine;
use crate::daemon::policy::matching::{key_of, stuck_socket};
use crate::daemon::policy::state::StateFile;
use crate::daemon::policy::{ActResult, Decision, Hold, Now, SweepFacts};
use crate::finder;
use crate::history;
use crate::injector::engine::Rules;
use crate::injector::way::ByIterator;
use crate::model::{Method, Outcome, SocketKey, Target};
use crate::proc::ProcFs;
use crate::report::{Run, text};
use crate::terminal::say;

/// Why sockets were not judged at the instant of the act although the iterator can be used.
const HELD_UP: &str = "an owner hangs and keeps the lock of its TCP socket, so the iterator cannot walk on until the lock is free";

/// What an act needs.
pub(super) struct Acting<'a> {
    pub config: &'a DaemonConfig,
    pub facts: &'a SweepFacts,
    pub proc: &'a ProcFs,
    pub sweeper: &'a Sweeper,
    pub control: &'a dyn Control,
}

/// What became of a batch.
pub(super) struct Batch {
    /// In the order of the chosen sockets.
    pub results: Vec<ActResult>,
    /// Why sockets were not closed, each with its number.
    pub not_closed: BTreeMap<&'static str, u64>,
    /// What the breaker has done because of it.
    pub change: Option<Change>,
}

/// Acts as `decision` says.
///
/// # Errors
/// Nothing was done, for this reason.
pub(super) fn act(
    engine: &mut Engine,
    file: Option<&StateFile>,
    decision: &Decision,
    acting: &Acting<'_>,
) -> Result<Batch, Hold> {
    let Some(file) = file else {
        return Err(Hold::StateUnusable);
    };
    let policy = &acting.config.policies[decision.policy];
    let say = |why: &str| say(format_args!("policy {}: {why}", policy.name));
    let config = command_of(policy, acting.config);
    let mut run = match find(policy, &config, decision, acting) {
        Ok(run) => run,
        Err(error) => {
            say(&format!(
                "nothing was done, because its sockets cannot be listed again: {error:#}"
            ));
            return Err(Hold::Unlisted);
        }
    };
    engine.reserve(now(), decision, acting.facts);
    if let Err(error) = file.write(&engine.kept()) {
        engine.cancel(now(), decision, acting.facts);
        say(&format!(
            "nothing was done, because the state cannot be written: {error}"
        ));
        return Err(Hold::StateUnwritten);
    }
    let log = Audit::of_policy(
        &config.log,
        ByPolicy {
            policy: policy.name.clone(),
            sweep: engine.sweep_number(),
        },
    );
    let log = log.and_then(|mut log| log.begin(&run).map(|()| log));
    let log = match log {
        Ok(log) => log,
        Err(error) => {
            engine.cancel(now(), decision, acting.facts);
            say(&format!(
                "nothing was done, because the log cannot be written: {error:#}"
            ));
            return Err(Hold::LogUnwritten);
        }
    };
    let destroyer = acting.sweeper.destroyer.as_ref();
    if let Some(destroyer) = destroyer {
        destroyer.begin_run();
    }
    let rules = Rules {
        destroyer,
        ..config.rules(&acting.sweeper.privileges)
    };
    let canaries = close(&mut run, &config, rules, acting.proc, acting.control);
    if let Some(rules) = &config.reclaim {
        reclaim_descriptors(&mut run, rules, acting.proc, acting.control);
    }
    if let Some(mut canaries) = canaries {
        let more = canaries.observe_paused(&run.scan, acting.control);
        run.spinning.extend(more);
    }
    // Another policy does not care, and the next batch that destroys looks again.
    let destroys = policy.methods.contains(&Method::Destroy);
    if destroys && destroyer.is_some_and(ByIterator::was_held_up) {
        say(HELD_UP);
    }
    let summary = text::totals(&run, &config);
    if let Some(unrecorded) = log.finish(&run, summary.clone()) {
        say(&unrecorded);
    }
    say(&summary);
    let results = results(&run, decision, acting);
    let spins = run.spinning.iter().any(|one| !one.ended);
    let change = engine.settle(now(), decision, acting.facts, &results, spins);
    if let Some(change) = change {
        say(&change.sentence());
    }
    Ok(Batch {
        not_closed: not_closed(&run, decision),
        results,
        change,
    })
}

/// The same as a configuration of `cwkill`.
fn command_of(policy: &Policy, config: &DaemonConfig) -> Config {
    let scope = policy.scope(config.all_netns);
    let mut command = Config::of_policy(
        policy.selectors.clone(),
        scope,
        policy.methods.clone(),
        policy.reclaim,
    );
    command.log = LogOptions {
        file: config.log_file.clone(),
        ..LogOptions::default()
    };
    command
}

/// Finds and plans the sockets of the policy again, and keeps those that were chosen and are still not protected.
///
/// # Errors
/// They cannot be listed.
fn find(
    policy: &Policy,
    config: &Config,
    decision: &Decision,
    acting: &Acting<'_>,
) -> anyhow::Result<Run> {
    let Acting {
        proc,
        sweeper,
        control,
        ..
    } = *acting;
    let namespaces = finder::open_namespaces(&config.netns, &policy.selectors, proc)?;
    let mut scan = find_and_plan(
        config,
        &namespaces,
        &sweeper.history,
        &sweeper.privileges,
        proc,
        control,
    )?;
    let chosen = decision.chosen.iter();
    let chosen: HashSet<SocketKey> = chosen.map(|&it| acting.facts.sockets[it].key).collect();
    let protection = &acting.config.protection;
    let targets = std::mem::take(&mut scan.targets);
    let is_meant = |target: &Target| {
        let socket = stuck_socket(&scan, target, protection);
        chosen.contains(&socket.key) && socket.protected.is_none() && !socket.has_unknown_owner
    };
    let kept = targets.into_iter().filter(is_meant).collect();
    scan.targets = kept;
    Ok(Run::new(scan))
}

/// What became of the chosen sockets, in their order.
fn results(run: &Run, decision: &Decision, acting: &Acting<'_>) -> Vec<ActResult> {
    let of_target = |target: &Target| (key_of(&run.scan, target), result(target));
    let by_key: HashMap<SocketKey, ActResult> = run.scan.targets.iter().map(of_target).collect();
    let result = |&index: &usize| {
        // A socket that was not found again was not touched.
        let key = acting.facts.sockets[index].key;
        by_key.get(&key).copied().unwrap_or(ActResult::Untouched)
    };
    decision.chosen.iter().map(result).collect()
}

/// How many of the chosen sockets were not closed, by the reason. Those that were not found again are gone.
fn not_closed(run: &Run, decision: &Decision) -> BTreeMap<&'static str, u64> {
    let mut reasons = BTreeMap::new();
    let unclosed = run.scan.targets.iter();
    for target in unclosed.filter(|target| result(target) != ActResult::Closed) {
        let reason = target.reason_code().unwrap_or(GONE);
        *reasons.entry(reason).or_default() += 1;
    }
    let lost = decision.chosen.len().saturating_sub(run.scan.targets.len());
    if lost > 0 {
        *reasons.entry(GONE).or_default() += lost as u64;
    }
    reasons
}

fn result(target: &Target) -> ActResult {
    let was_tried = target.maybe_closed_by().is_some();
    match target.outcome {
        Some(outcome) if outcome.is_closed_or_closing() => ActResult::Closed,
        Some(Outcome::Gone) if was_tried => ActResult::Closed,
        Some(Outcome::Failed) => ActResult::Failed,
        // A peer that answered a probe, for example.
        _ if was_tried => ActResult::Failed,
        _ => ActResult::Untouched,
    }
}

pub(super) fn now() -> Now {
    Now {
        wall: SystemTime::now(),
        since_boot: history::now(),
    }
}
