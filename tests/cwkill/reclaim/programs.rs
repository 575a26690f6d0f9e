//! Programs of special kinds.

use anyhow::{Context, Result};
use netns_harness::Lab;
use netns_harness::owners::{Build, Owner};

use super::{descriptors, left, links_of, number, outcomes, reclaim, reports_the_truth};
use crate::support::{at, leaderless};
use crate::trial::{Need, Test, once};

pub const TESTS: &[Test] = &[
    once!(a_process_without_its_first_thread_is_skipped),
    once!(descriptors_that_an_io_uring_may_use_are_skipped).needs(Need::IoUring),
    once!(a_32_bit_program_is_skipped).needs(Need::Bits32),
    once!(a_32_bit_call_is_skipped).needs(Need::Bits32),
];

pub fn has_io_uring() -> bool {
    // Older kernels cannot forbid it.
    let disabled = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled");
    disabled.is_ok_and(|disabled| match disabled.trim() {
        "0" => true,
        "1" => super::is_root_of_the_machine(),
        _ => false,
    })
}

pub fn runs_32_bits() -> bool {
    cfg!(target_arch = "x86_64") && std::path::Path::new("/proc/sys/abi/vsyscall32").exists()
}

fn descriptors_that_an_io_uring_may_use_are_skipped() -> Result<()> {
    for (mode, why) in [
        ("ring", "may have requests on it"),
        ("ring-holds", "registered with the io_uring of descriptor"),
        ("ring-polls", "has requests in flight"),
        ("ring-sq", "its thread iou-sqp-"),
        ("ring-wq", "its thread iou-wrk-"),
    ] {
        let lab = Lab::new()?;
        let mut owner = Owner::start(lab.app_host(), Build::Plain, mode, 2)?;
        let fds = owner.leak(2)?;
        let try_it = |owner: &mut Owner| -> Result<()> {
            let dry = descriptors(&reclaim(&lab, owner.pid(), "-n --json")?);
            assert_eq!(at(&dry[0], "/closable"), "false");
            let ran = reclaim(&lab, owner.pid(), "--json")?.exits(4);
            left(&ran, owner, &fds, "skipped", why)?;
            let ran = reclaim(&lab, owner.pid(), "--reclaim-force --json")?.exits(0);
            assert_eq!(number(&ran.json(), "/summary/freed"), 2);
            owner.report()?;
            Ok(())
        };
        try_it(&mut owner).context(mode)?;
    }
    Ok(())
}

/// For such a process, the kernel shows no descriptors under /proc/PID/fd.
fn a_process_without_its_first_thread_is_skipped() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = leaderless(&lab)?;
    owner.leak(2)?;
    let table = || -> Result<usize> {
        let mut most = 0;
        for task in std::fs::read_dir(format!("/proc/{}/task", owner.pid()))? {
            most = most.max(std::fs::read_dir(task?.path().join("fd"))?.count());
        }
        Ok(most)
    };
    let before = table()?;
    assert!(before > 2, "{before}");
    for more in ["", "-n", "--reclaim-force", "--json"] {
        let ran = reclaim(&lab, owner.pid(), more)?.exits(4);
        ran.complains("first thread has ended");
        assert_eq!(table()?, before);
    }
    owner.report()?;
    Ok(())
}

fn a_32_bit_program_is_skipped() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Bits32, "idle", 1)?;
    let fds = owner.leak(3)?;
    let dry = descriptors(&reclaim(&lab, owner.pid(), "-n --json")?);
    assert_eq!(at(&dry[0], "/closable"), "false");
    for force in ["", "--reclaim-force"] {
        let ran = reclaim(&lab, owner.pid(), &format!("--json {force}"))?.exits(4);
        left(&ran, &mut owner, &fds, "skipped", "32-bit program")?;
        // The owner was not stopped.
        let owners = ran.json()["owners"].as_array().map(Vec::len);
        assert_eq!(owners, Some(0));
    }
    Ok(())
}

/// A 64-bit program may make 32-bit system calls, whose numbers mean other calls.
fn a_32_bit_call_is_skipped() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "poll-int80", 1)?;
    // It waits on a pipe: after each stop, the call checks its descriptors again.
    owner.order("wait")?;
    let fds = owner.leak_scattered(2)?;
    let before = links_of(owner.pid())?;
    for force in ["", "--reclaim-force"] {
        let ran = reclaim(&lab, owner.pid(), &format!("--json {force}"))?.exits(4);
        reports_the_truth(&ran, &owner, &before, &fds)?;
        for (outcome, why) in outcomes(&ran).values() {
            assert_eq!(outcome, "skipped");
            assert!(why.contains("makes 32-bit system calls"), "{why}");
        }
        owner.report()?;
    }
    Ok(())
}
