//! What is left alone, and why.

use anyhow::{Context, Result, ensure};
use netns_harness::Lab;
use netns_harness::owners::{Build, Owner};

use super::{descriptors, fds_of, left, number, reclaim};
use crate::Case::{self, Once};
use crate::support::{CWKILL, PATIENCE, at, cwkill, ran, same};

pub const CASES: &[Case] = &[
    Once("what_is_in_an_epoll_set_is_left", epoll),
    Once("what_a_system_call_is_on_is_left", in_a_call),
    Once("what_is_young_is_left", young),
    Once("a_socket_never_connected_is_no_dead_one", living),
    Once("a_table_that_another_process_has_is_left", shares),
    Once("a_filter_that_forbids_close_is_seen_beforehand", seccomp),
    Once("a_traced_process_is_left_to_its_tracer", traced),
    Once(
        "without_rights_nothing_happens_and_it_says_so",
        unprivileged,
    ),
];

fn epoll() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "epoll", 1)?;
    let fds = owner.leak(3)?;
    let ran = reclaim(&lab, owner.pid(), "--json")?.exits(4)?;
    left(
        &ran,
        &mut owner,
        &fds,
        "skipped",
        "in the epoll set of descriptor",
    )?;
    let dry = descriptors(&reclaim(&lab, owner.pid(), "-n --json")?)?;
    same(&at(&dry[0], "/safe"), &"false".to_owned())?;
    let ran = reclaim(&lab, owner.pid(), "--reclaim-force --json")?.exits(0)?;
    same(&number(&ran.json()?, "/summary/freed")?, &3)
}

fn in_a_call() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "splice", 1)?;
    let fds = owner.leak(2)?;
    lab.wait_for(PATIENCE, || {
        let splicing = |path: std::path::PathBuf| {
            std::fs::read_to_string(path.join("syscall"))
                .is_ok_and(|call| call.starts_with(&format!("{} ", libc::SYS_splice)))
        };
        let tasks = std::fs::read_dir(format!("/proc/{}/task", owner.pid()))?;
        Ok(tasks.flatten().filter(|task| splicing(task.path())).count() == 2)
    })?;
    let ran = reclaim(&lab, owner.pid(), "--json")?.exits(4)?;
    left(
        &ran,
        &mut owner,
        &fds,
        "skipped",
        "is inside a system call on it",
    )
}

fn shares() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "shares", 1)?;
    let fds = owner.leak(2)?;
    let ran = reclaim(&lab, owner.pid(), "--json")?.exits(4)?;
    let why = "shares the table of descriptors with process";
    left(&ran, &mut owner, &fds, "skipped", why)?;
    let ran = reclaim(&lab, owner.pid(), "--reclaim-force --json")?.exits(4)?;
    left(&ran, &mut owner, &fds, "skipped", why)
}

fn young() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "idle", 1)?;
    let fds = owner.leak(2)?;
    let line = format!("reclaim --pid {} --json", owner.pid());
    let ran = cwkill(&lab, &line)?.exits(4)?;
    left(&ran, &mut owner, &fds, "skipped", "quiet for only")?;
    let ran = cwkill(&lab, &format!("{line} --reclaim-force"))?.exits(0)?;
    same(&number(&ran.json()?, "/summary/freed")?, &2)
}

/// What looks dead to other tools: a socket that its program is about to connect.
fn living() -> Result<()> {
    let lab = Lab::new()?;
    let agent = lab.app_host().agent("fresh")?;
    let address = "127.0.0.1:7000".parse()?;
    let _listener = agent.listen(address, false, 16)?;
    let other = lab.app_host().agent("peer")?;
    other.connect(address, 1, netns_harness::Dial::default(), PATIENCE)?;
    agent.accept(_listener, 1, PATIENCE)?;
    for pid in [agent.pid(), other.pid()] {
        let before = fds_of(pid)?;
        reclaim(&lab, pid, "--reclaim-force")?.exits(1)?;
        same(&fds_of(pid)?, &before)?;
    }
    // Churn makes sockets that were never connected; see there.
    Ok(())
}

fn seccomp() -> Result<()> {
    let lab = Lab::new()?;
    for (mode, outcome) in [("kill", None), ("errno", None), ("log", Some(2))] {
        let mut owner = Owner::start(lab.app_host(), Build::Plain, mode, 1)?;
        let fds = owner.leak(2)?;
        let ran = reclaim(&lab, owner.pid(), "--json")?;
        let freed = number(&ran.json()?, "/summary/freed")?;
        match outcome {
            Some(wanted) if is_root_of_the_machine() => same(&freed, &wanted)?,
            // Not even root of a user namespace may read a filter.
            _ => {
                let why = match is_root_of_the_machine() {
                    true => "seccomp filter of its process does not let close() through",
                    false => "seccomp filter that cannot be read",
                };
                left(&ran, &mut owner, &fds, "skipped", why).context(mode)?;
            }
        }
        ensure!(owner.is_alive(), "{mode}");
        owner.report()?;
    }
    Ok(())
}

/// Not that of a user namespace: PTRACE_SECCOMP_GET_FILTER asks for CAP_SYS_ADMIN of the machine.
fn is_root_of_the_machine() -> bool {
    std::fs::read_to_string("/proc/self/uid_map").is_ok_and(|map| map.contains("4294967295"))
}

fn traced() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "traced", 1)?;
    let fds = owner.leak(1)?;
    for force in ["", "--reclaim-force"] {
        let ran = reclaim(&lab, owner.pid(), &format!("--json {force}"))?.exits(4)?;
        left(&ran, &mut owner, &fds, "skipped", "traced by its-tracer/")?;
    }
    Ok(())
}

fn unprivileged() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "idle", 1)?;
    owner.leak(2)?;
    let before = owner.descriptors()?;
    let line = format!("reclaim --pid {} --reclaim-age 0s", owner.pid());
    let command = lab.app_host().command(CWKILL).args(line.split_whitespace());
    let ran = ran(command.capabilities(&[]))?.exits(4)?;
    // Of a process with the same uid the table can be seen and nothing be touched.
    ran.complains("could not be looked")?
        .complains("CAP_SYS_PTRACE")?;
    same(&owner.descriptors()?, &before)
}
