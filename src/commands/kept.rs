//! The descriptors that a run has kept, with the facts about their processes that decide what to do.

use std::fs;

use crate::diagnose::inside::Inside;
use crate::diagnose::limit::{self, ReachedLimit};
use crate::diagnose::suggest::LanguageRuntime;
use crate::model::Owner;
use crate::privileges::may_raise_hard_limits;
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
        let used = fs::read_dir(proc.path(&format!("{}/fd", process.id.pid)));
        let used = used.ok().map(|fds| fds.count() as u64);
        let reached = status
            .limit
            .filter(|_| limit::is_reached(used, status.limit));
        Facts {
            runtime: LanguageRuntime::of(status.executable.as_deref(), &process.comm),
            inside: Inside::of(&process.cgroup, &status.pids),
            reached: reached.map(|soft| ReachedLimit {
                soft,
                hard: status.hard_limit,
                may_raise_hard: may_raise_hard_limits(),
            }),
        }
    };
    advise(&kept(owners, &facts), by)
}
