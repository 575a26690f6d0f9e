//! The descriptors that a run has kept, with the facts about their processes that decide what to do.

use crate::diagnose::inside::Inside;
use crate::diagnose::limit::ReachedLimit;
use crate::diagnose::suggest::LanguageRuntime;
use crate::finder::table_use;
use crate::model::Owner;
use crate::proc::{ProcFs, Process};
use crate::report::advice::{Advice, Facts, KeptBy, advise, kept};

/// The advice about the descriptors among `owners` that were kept.
pub(super) fn advice<'o>(
    owners: impl Iterator<Item = &'o Owner>,
    by: KeptBy<'_>,
    proc: &ProcFs,
) -> Vec<Advice> {
    let facts = |process: &Process| {
        let status = proc.status(process);
        let used = table_use::count_used(proc, process.id.pid).map(|used| used as u64);
        Facts {
            runtime: LanguageRuntime::of(status.executable.as_deref(), &process.comm),
            inside: Inside::of(&process.cgroup, &status.pids),
            reached: ReachedLimit::of(used, &status),
        }
    };
    advise(&kept(owners, &facts), by)
}
