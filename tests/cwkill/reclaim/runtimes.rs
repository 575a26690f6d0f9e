//! Servers at EMFILE, in several languages.

use anyhow::Result;
use netns_harness::owners::runtimes::{self, HardLimit, Runtime};

use crate::support::CWKILL;
use crate::trial::{Need, Test, once};

pub const TESTS: &[Test] = &[
    once!(c_at_emfile_accepts_again),
    once!(static_c_at_emfile_accepts_again),
    once!(python_at_emfile_accepts_again),
    once!(java_is_left_to_its_garbage_collector).needs(Need::Language(Runtime::Java)),
    once!(the_printed_commands_cure_java_at_emfile).needs(Need::Language(Runtime::Java)),
    once!(the_printed_commands_cure_java_whose_limit_nobody_can_raise)
        .needs(Need::Language(Runtime::Java)),
    once!(the_printed_commands_cure_go_at_emfile).needs(Need::Language(Runtime::Go)),
    once!(the_printed_commands_cure_node_at_emfile).needs(Need::Language(Runtime::Node)),
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
        assert!(
            reason.contains("its garbage collector may close"),
            "{reason}"
        );
    }
    Ok(())
}

fn the_printed_commands_cure_java_at_emfile() -> Result<()> {
    let cure = runtimes::cure(Runtime::Java, CWKILL.as_ref(), HardLimit::Higher)?;
    let [raise, first, second, last] = &cure.commands[..] else {
        panic!("{cure:?}");
    };
    let raises = raise.starts_with("prlimit --pid ") && raise.contains("--nofile=256:");
    assert!(raises, "{cure:?}");
    let collects = first.starts_with("jcmd ") && first.ends_with(" GC.run");
    assert!(collects && first == second, "{cure:?}");
    assert!(last.ends_with(" --reclaim-force"), "{cure:?}");
    assert!(cure.freed > 10, "{cure:?}");
    // The rule is said once, not for each descriptor.
    assert_eq!(cure.advice.len(), 1, "{cure:?}");
    assert!(cure.advice[0].contains("GC.run` twice, then `cwkill"));
    Ok(())
}

fn the_printed_commands_cure_java_whose_limit_nobody_can_raise() -> Result<()> {
    let cure = runtimes::cure(Runtime::Java, CWKILL.as_ref(), HardLimit::Reached)?;
    let some = cure.commands[0].split_once(" --reclaim-force --fd ");
    let (command, fds) = some.unwrap_or_else(|| panic!("{cure:?}"));
    assert!(command.starts_with("cwkill reclaim --pid "), "{cure:?}");
    assert_eq!(fds.split(',').count(), 10, "{cure:?}");
    assert!(
        cure.advice[0].contains("nobody has CAP_SYS_RESOURCE"),
        "{cure:?}"
    );
    assert!(cure.freed > 10, "{cure:?}");
    Ok(())
}

fn the_printed_commands_cure_go_at_emfile() -> Result<()> {
    let cure = runtimes::cure(Runtime::Go, CWKILL.as_ref(), HardLimit::Higher)?;
    let forces = cure.commands[0].ends_with(" --reclaim-force");
    assert!(forces && cure.commands.len() == 1, "{cure:?}");
    assert!(cure.freed > 10, "{cure:?}");
    Ok(())
}

/// Node.js takes a socket out of its epoll set when it has ended, and keeps the descriptor. So after some time nothing needs force.
fn the_printed_commands_cure_node_at_emfile() -> Result<()> {
    let cure = runtimes::cure(Runtime::Node, CWKILL.as_ref(), HardLimit::Higher)?;
    assert!(cure.freed > 10, "{cure:?}");
    assert!(cure.advice.len() <= 2, "{cure:?}");
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
