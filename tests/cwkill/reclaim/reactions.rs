//! Owners that handle the end of a connection themselves after some time: cwkill does not close their descriptors before.

use anyhow::{Context, Result};
use netns_harness::owners::{Build, Owner};
use netns_harness::{Family, Lab};

use super::{descriptors, left, number, reason, reclaim};
use crate::support::{PATIENCE, at, cwkill, lab};
use crate::trial::{Test, once};

pub const TESTS: &[Test] = &[
    once!(descriptors_a_thread_waited_on_are_skipped),
    once!(descriptors_with_unread_data_are_skipped),
    once!(a_program_gets_time_to_react),
];

/// The end of the socket ends the call as well. After that, nothing shows that the thread is about to close the socket.
fn descriptors_a_thread_waited_on_are_skipped() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "reacts", 1)?;
    owner.leak_stuck(3)?;
    lab.wait_for(PATIENCE, || {
        let waits = |path: std::path::PathBuf| {
            let call = std::fs::read_to_string(path.join("syscall")).unwrap_or_default();
            let number: i64 = call
                .split(' ')
                .next()
                .unwrap_or_default()
                .parse()
                .unwrap_or(-1);
            #[cfg(target_arch = "x86_64")]
            if number == libc::SYS_poll {
                return true;
            }
            number == libc::SYS_ppoll
        };
        let tasks = std::fs::read_dir(format!("/proc/{}/task", owner.pid()))?;
        // The thread that takes orders waits in poll(2), too.
        Ok(tasks.flatten().filter(|task| waits(task.path())).count() == 4)
    })?;
    let line = format!(
        "--pid {} --reclaim --reclaim-age 0s --stop-limit 5s --allow-spin --json",
        owner.pid()
    );
    let ran = cwkill(&lab, &line)?.exits(4);
    for socket in ran.sockets() {
        assert_eq!(at(&socket, "/result/outcome"), "closed");
        let why = reason(&socket["result"]["descriptors"][0]);
        assert!(why.contains("is inside a system call on it"), "{socket}");
    }
    lab.wait_for(PATIENCE, || Ok(owner.report()? == 3))
}

fn a_program_gets_time_to_react() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "glances", 1)?;
    owner.leak_stuck(3)?;
    let pid = owner.pid();
    lab.wait_for(PATIENCE, || {
        let old = cwkill(&lab, &format!("-n --pid {pid} --min-age 3s --json"))?;
        Ok(old.sockets().len() == 3)
    })?;
    let line = format!("--pid {pid} --allow-spin --reclaim --reclaim-age 3s --json");
    let ran = cwkill(&lab, &line)?.exits(0);
    for socket in ran.sockets() {
        let outcome = at(&socket, "/result/descriptors/0/outcome");
        assert_eq!(outcome, "gone");
    }
    assert_eq!(owner.report()?, 3);
    Ok(())
}

fn descriptors_with_unread_data_are_skipped() -> Result<()> {
    const BYTES: &str = "30000";
    let own = Lab::new()?;
    let mut owner = Owner::start(own.app_host(), Build::Plain, "idle", 1)?;
    let fds = owner.leak_unread(2)?;
    let pid = owner.pid();
    for one in descriptors(&reclaim(&own, pid, "-n --json")?.exits(0)) {
        assert_eq!(at(&one, "/closable"), "false");
        assert_eq!(at(&one, "/unread"), BYTES);
    }
    let ran = reclaim(&own, pid, "--json")?.exits(4);
    left(
        &ran,
        &mut owner,
        &fds,
        "skipped",
        "can still read 30000 bytes",
    )?;
    let force = format!("cwkill reclaim --pid {pid} --reclaim-force");
    assert_eq!(at(&ran.json(), "/advice/0/advice_code"), "unread");
    assert_eq!(at(&ran.json(), "/advice/0/commands/0"), force);
    assert_eq!(owner.order(&format!("read {}", fds[0]))?, BYTES);
    // The socket that has been read is closed, the other only with --reclaim-force.
    let ran = reclaim(&own, pid, "--json")?.exits(4);
    assert_eq!(number(&ran.json(), "/summary/freed"), 1);
    let ran = reclaim(&own, pid, "--json --reclaim-force")?.exits(0);
    assert_eq!(number(&ran.json(), "/summary/freed"), 1);

    // What a run that closes such sockets says to type, and what that command says.
    let (closing, leak) = lab("unread", Family::V4, 3)?;
    let pid = leak.app().pid();
    let ran = cwkill(&closing, "--port 8080 --allow-spin")?.exits(0);
    let command = format!("`cwkill reclaim --pid {pid}` (keeps 3 with unread bytes, and says how");
    ran.complains(&command);
    let kept = cwkill(&closing, &format!("reclaim --pid {pid} --json"))?.exits(4);
    let force = format!("cwkill reclaim --pid {pid} --reclaim-force");
    assert_eq!(at(&kept.json(), "/advice/0/commands/0"), force);
    let typed = force.strip_prefix("cwkill ").context("a command")?;
    let freed = cwkill(&closing, &format!("{typed} --json"))?.exits(0);
    assert_eq!(number(&freed.json(), "/summary/freed"), 3);

    // The operator has seen these bytes in RECV-Q and closed the socket, so the descriptor may be closed.
    let (lab, _leak) = lab("unread", Family::V4, 3)?;
    let ran = cwkill(
        &lab,
        "--port 8080 --reclaim --reclaim-age 0s --stop-limit 5s --json",
    )?
    .exits(0);
    assert_eq!(number(&ran.json(), "/reclaim/summary/freed"), 3);
    Ok(())
}
