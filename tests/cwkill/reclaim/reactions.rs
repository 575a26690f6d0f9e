//! Owners that deal with the end of a connection themselves, some time after it: nothing is taken from under them.

use anyhow::{Result, ensure};
use netns_harness::Lab;
use netns_harness::owners::{Build, Owner};

use crate::Case::{self, Once};
use crate::support::{PATIENCE, at, cwkill, same};

pub const CASES: &[Case] = &[
    Once("what_a_thread_waited_on_before_the_end_is_left", in_poll),
    Once("a_program_gets_time_to_react", looks_now_and_then),
];

/// The end of the socket ends the call as well, so that afterwards nothing shows that the thread is about to close it.
fn in_poll() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "reacts", 1)?;
    owner.stuck(3)?;
    lab.wait_for(PATIENCE, || {
        let waits = |path: std::path::PathBuf| {
            let call = std::fs::read_to_string(path.join("syscall")).unwrap_or_default();
            // One descriptor, and no limit of time.
            call.contains(" 0x1 0xffffffff")
        };
        let tasks = std::fs::read_dir(format!("/proc/{}/task", owner.pid()))?;
        // The one that takes orders waits like that, too.
        Ok(tasks.flatten().filter(|task| waits(task.path())).count() == 4)
    })?;
    let line = format!("--pid {} --reclaim --reclaim-age 0s --json", owner.pid());
    let ran = cwkill(&lab, &line)?.exits(4)?;
    for socket in ran.sockets()? {
        same(&at(&socket, "/result/outcome"), &"closed".to_owned())?;
        let why = at(&socket, "/result/descriptors/0/reason");
        ensure!(why.contains("is inside a system call on it"), "{socket}");
    }
    lab.wait_for(PATIENCE, || Ok(owner.report()? == 3))
}

fn looks_now_and_then() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "glances", 1)?;
    owner.stuck(3)?;
    let pid = owner.pid();
    lab.wait_for(PATIENCE, || {
        let old = cwkill(&lab, &format!("-n --pid {pid} --min-age 700ms --json"))?;
        Ok(old.sockets()?.len() == 3)
    })?;
    let line = format!("--pid {pid} --reclaim --reclaim-age 700ms --json");
    let ran = cwkill(&lab, &line)?.exits(0)?;
    for socket in ran.sockets()? {
        let outcome = at(&socket, "/result/descriptors/0/outcome");
        same(&outcome, &"gone".to_owned())?;
    }
    same(&owner.report()?, &3)
}
