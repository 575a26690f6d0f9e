//! Servers at EMFILE, in several languages.

use anyhow::Result;
use netns_harness::owners::runtimes::{self, Runtime};

use crate::support::CWKILL;
use crate::trial::{Need, Test, once};

pub const TESTS: &[Test] = &[
    once!(c_at_emfile_accepts_again),
    once!(static_c_at_emfile_accepts_again),
    once!(python_at_emfile_accepts_again),
    once!(java_is_left_to_its_garbage_collector).needs(Need::Language(Runtime::Java)),
    once!(go_at_emfile_accepts_again).needs(Need::Language(Runtime::Go)),
    once!(java_at_emfile_accepts_again)
        .slow()
        .needs(Need::Language(Runtime::Java)),
    once!(node_at_emfile_accepts_again).needs(Need::Language(Runtime::Node)),
];

/// `netns-harness recover` makes more runs.
const RUNS: u32 = 3;

fn emfile(runtime: Runtime) -> Result<()> {
    let stats = runtimes::recover(runtime, RUNS, 3, CWKILL.as_ref())?;
    assert_eq!(stats.recovered, RUNS);
    assert!(stats.bytes > 10_000, "{stats:?}");
    Ok(())
}

/// Finalizers of Java close descriptors by number, so nothing is closed without --reclaim-force.
fn java_is_left_to_its_garbage_collector() -> Result<()> {
    let refused = runtimes::recover_unforced(Runtime::Java, CWKILL.as_ref())?;
    assert!(refused.len() > 10, "{refused:?}");
    for reason in refused {
        assert!(reason.contains("jcmd PID GC.run"), "{reason}");
    }
    Ok(())
}

fn c_at_emfile_accepts_again() -> Result<()> {
    emfile(Runtime::C)
}

fn static_c_at_emfile_accepts_again() -> Result<()> {
    emfile(Runtime::CStatic)
}

fn python_at_emfile_accepts_again() -> Result<()> {
    emfile(Runtime::Python)
}

fn go_at_emfile_accepts_again() -> Result<()> {
    emfile(Runtime::Go)
}

fn java_at_emfile_accepts_again() -> Result<()> {
    emfile(Runtime::Java)
}

fn node_at_emfile_accepts_again() -> Result<()> {
    emfile(Runtime::Node)
}
