//! The next command to type after `cwkill reclaim`.

use super::ReclaimRun;
use crate::config::{Action, ReclaimConfig};
use crate::model::{ReclaimOutcome, ReclaimReason};
use crate::proc::Process;
use crate::reclaim::ReclaimRules;
use crate::report::advice::reclaim_command;
use crate::report::overview::next::{command, of_advice, without_dry_run};

/// The line with the next command, if there is one. `words`: the command line of this run, without the name of the program.
pub fn line(run: &ReclaimRun, config: &ReclaimConfig, words: &[String]) -> Option<String> {
    let next = |words: &[String]| command(words).map(|command| format!("next: {command}"));
    // Without force: they need none.
    let rules = ReclaimRules {
        force: false,
        ..config.rules
    };
    let of = |process: &Process| reclaim_command(process.id.pid, &rules);
    match (config.action, closable(run)) {
        (Action::List, Some(process)) => Some(format!("next: {} -n", of(process))),
        (Action::DryRun, Some(_)) if config.selects => next(&without_dry_run(words)),
        (Action::DryRun, Some(process)) => {
            let pid = process.id.pid.to_string();
            let more = ["--pid".to_owned(), pid];
            next(&[&without_dry_run(words)[..], &more].concat())
        }
        // Those that `--fd` has not named.
        (Action::Act, Some(process)) => Some(format!("next: {}", of(process))),
        (Action::Act, None) if run.advice.is_empty() && may_work_later(run) => next(words),
        (_, None) => of_advice(&run.advice),
    }
}

/// The process with the most descriptors that can be closed; the first of those with as many.
fn closable(run: &ReclaimRun) -> Option<&Process> {
    let all = run.descriptors.iter().chain(&run.not_named);
    let closable = all.filter(|dead| dead.owner.reclaim == Some(ReclaimOutcome::Allowed));
    let closable: Vec<&Process> = closable.map(|dead| &*dead.owner.process).collect();
    let by_process = closable.chunk_by(|a, b| a.id == b.id);
    let most = by_process.rev().max_by_key(|of_process| of_process.len())?;
    most.first().copied()
}

/// Whether some descriptors are left only because of the moment.
fn may_work_later(run: &ReclaimRun) -> bool {
    use ReclaimReason::{
        InExec, InVfork, Interrupted, NoSyscall, NotStopped, OwnerBusy, StopLimitReached,
    };
    let mut reasons = run.outcomes().filter_map(ReclaimOutcome::reason);
    reasons.any(|reason| {
        matches!(
            reason,
            InExec(_)
                | InVfork(_)
                | Interrupted
                | NoSyscall(_)
                | NotStopped(..)
                | OwnerBusy
                | StopLimitReached(_)
        )
    })
}
