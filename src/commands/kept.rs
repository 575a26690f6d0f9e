//! The descriptors that a run has kept, with the facts about their processes that decide what to do.

use std::fs;

use crate::diagnose::inside::Inside;
use crate::diagnose::suggest::LanguageRuntime;
use crate::model::Owner;
use crate::proc::{ProcFs, Process};
use crate::report::advice::{Advice, Facts, KeptBy, advise, kept};

/// With so few free descriptors a process is at its limit.
const FEW_FREE: u64 = 3;

/// The advice about the descriptors among `owners` that were kept.
pub(super) fn advice<'o>(
    owners: impl Iterator<Item = &'o Owner>,
    by: KeptBy<'_>,
    proc: &ProcFs,
) -> Vec<Advice> {
    let facts = |process: &Process| {
        let status = proc.status(process);
        let used = fs::read_dir(proc.path(&format!("{}/fd", process.id.pid)));
        let used = used.map_or(0, |fds| fds.count() as u64);
        let reached = status.limit.filter(|limit| used + FEW_FREE >= *limit);
        Facts {
            runtime: LanguageRuntime::of(status.executable.as_deref(), &process.comm),
            inside: Inside::of(&process.cgroup, &status.pids),
            reached: reached.map(|soft| (soft, status.hard_limit)),
        }
    };
    advise(&kept(owners, &facts), by)
}
