//! Servers at EMFILE, in several languages.

use anyhow::{Result, ensure};
use netns_harness::owners::runtimes::{self, Runtime};

use crate::Case::{self, Once};
use crate::support::{CWKILL, same};

pub const CASES: &[Case] = &[
    Once("c_at_emfile_accepts_again", || emfile(Runtime::C)),
    Once("static_c_at_emfile_accepts_again", || {
        emfile(Runtime::CStatic)
    }),
    Once("python_at_emfile_accepts_again", || emfile(Runtime::Python)),
];

/// Those of runtimes that are not everywhere.
pub const RUNTIMES: &[(Runtime, Case)] = &[
    (Runtime::Java, Once("java_is_left_to_its_collector", java)),
    (
        Runtime::Go,
        Once("go_at_emfile_accepts_again", || emfile(Runtime::Go)),
    ),
    (
        Runtime::Java,
        Once("java_at_emfile_accepts_again", || emfile(Runtime::Java)),
    ),
    (
        Runtime::Node,
        Once("node_at_emfile_accepts_again", || emfile(Runtime::Node)),
    ),
];

/// `netns-harness recover` does more of them.
const RUNS: u32 = 3;

fn emfile(runtime: Runtime) -> Result<()> {
    let stats = runtimes::recover(runtime, RUNS, 3, CWKILL.as_ref())?;
    same(&stats.recovered, &RUNS)?;
    ensure!(stats.bytes > 10_000, "{stats:?}");
    Ok(())
}

/// Its finalizers close numbers, so nothing is taken without --reclaim-force.
fn java() -> Result<()> {
    let refused = runtimes::recover_unforced(Runtime::Java, CWKILL.as_ref())?;
    ensure!(refused.len() > 10, "{refused:?}");
    for reason in refused {
        ensure!(reason.contains("jcmd PID GC.run"), "{reason}");
    }
    Ok(())
}
