//! Sockets in descriptor tables that /proc/PID/fd does not show.

use std::collections::HashSet;

use anyhow::{Context, Result};
use netns_harness::owners::{Build, Owner};
use netns_harness::{Family, Lab, TcpState};

use crate::support::{all_have, at, cwkill, in_state, lab, leaderless};
use crate::trial::{Need, Test, each_family, once};

pub const TESTS: &[Test] = &[
    each_family!(a_socket_that_only_one_thread_has_is_found_and_closed),
    once!(a_process_without_its_first_thread_owns_its_sockets),
    once!(a_dead_descriptor_that_only_one_thread_has_is_shown_and_left),
    once!(a_copy_in_the_table_of_a_thread_counts_as_open),
    once!(the_iterator_counts_the_copy_of_a_thread).needs(Need::Iterator),
    once!(an_owner_that_executes_a_program_keeps_its_sockets),
];

/// The thread of process `pid` with a descriptor table of its own: /proc shows another number of descriptors for it.
fn odd_thread(pid: u32) -> Result<i32> {
    let descriptors = |path: String| -> Result<usize> { Ok(std::fs::read_dir(path)?.count()) };
    let of_process = descriptors(format!("/proc/{pid}/fd"))?;
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let tid = task?.file_name().into_string().unwrap_or_default();
        if descriptors(format!("/proc/{pid}/task/{tid}/fd"))? != of_process {
            return Ok(tid.parse()?);
        }
    }
    anyhow::bail!("no thread of process {pid} has a table of its own")
}

fn a_socket_that_only_one_thread_has_is_found_and_closed(family: Family) -> Result<()> {
    let (lab, leak) = lab("thread-table", family, 2)?;
    let pid = leak.app().pid();
    let tid = odd_thread(pid)?;
    for socket in cwkill(&lab, "--json")?.exits(0).sockets() {
        assert_eq!(at(&socket, "/owners/0/pid"), pid.to_string());
        assert_eq!(at(&socket, "/owners/0/thread"), tid.to_string());
    }
    let text = cwkill(&lab, &format!("--pid {pid} -n"))?.exits(0).stdout;
    assert_eq!(
        text.matches(&format!(" (thread {tid})")).count(),
        2,
        "{text}"
    );
    // Also for commands that only count.
    cwkill(&lab, &format!("check --warning 0 --critical 1 --pid {pid}"))?.exits(2);
    let text = cwkill(&lab, &format!("diagnose --sample 1ms --pid {pid}"))?
        .exits(0)
        .stdout;
    assert!(text.contains("2 stuck"), "{text}");

    let line = format!("--pid {pid} --method shutdown --reclaim --reclaim-age 0s --json");
    let sockets = cwkill(&lab, &line)?.exits(4).sockets();
    assert_eq!(sockets.len(), 2);
    all_have(&sockets, "closed", "shutdown");
    for socket in &sockets {
        assert_eq!(at(socket, "/result/descriptor_open"), "true");
        let kept = "/result/descriptors/0/reason_code";
        assert_eq!(at(socket, kept), "thread-table");
    }
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 0);
    Ok(())
}

/// The kernel shows no descriptors under /proc/PID/fd, and the process still runs.
fn a_process_without_its_first_thread_owns_its_sockets() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = leaderless(&lab)?;
    owner.leak_stuck(2)?;
    let line = format!("diagnose --sample 1ms --pid {}", owner.pid());
    let text = cwkill(&lab, &line)?.exits(0).stdout;
    assert!(text.contains("2 stuck"), "{text}");
    assert!(!text.contains("ended"), "{text}");
    let line = format!("--pid {} --method shutdown --json", owner.pid());
    let sockets = cwkill(&lab, &line)?.exits(0).sockets();
    assert_eq!(sockets.len(), 2);
    all_have(&sockets, "closed", "shutdown");
    owner.report()?;
    Ok(())
}

fn a_dead_descriptor_that_only_one_thread_has_is_shown_and_left() -> Result<()> {
    let (lab, leak) = lab("thread-table", Family::V4, 2)?;
    let pid = leak.app().pid();
    cwkill(&lab, "--all --method destroy")?.exits(0);
    let tid = odd_thread(pid)?;
    let table = || -> Result<HashSet<_>> {
        let entries = std::fs::read_dir(format!("/proc/{pid}/task/{tid}/fd"))?;
        entries
            .map(|entry| Ok(entry.context("its table")?.file_name()))
            .collect()
    };
    let before = table()?;
    for (line, status) in [
        ("reclaim -n --reclaim-age 0s --json", 0),
        ("reclaim --reclaim-age 0s --json", 4),
        ("reclaim --reclaim-age 0s --reclaim-force --json", 4),
    ] {
        let ran = cwkill(&lab, &format!("{line} --pid {pid}"))?.exits(status);
        let document = ran.json();
        let found = document["descriptors"].as_array().context("no list")?;
        assert_eq!(found.len(), 2, "{ran:?}");
        for descriptor in found {
            assert_eq!(at(descriptor, "/thread"), tid.to_string());
            assert_eq!(at(descriptor, "/reason_code"), "thread-table");
        }
    }
    assert_eq!(table()?, before);
    Ok(())
}

/// The process closes its own descriptor, and one of its threads still has a copy.
fn a_copy_in_the_table_of_a_thread_counts_as_open() -> Result<()> {
    copy_counts("--bpf never")
}

fn the_iterator_counts_the_copy_of_a_thread() -> Result<()> {
    copy_counts("--bpf always")
}

fn copy_counts(way: &str) -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "idle", 1)?;
    let fd = owner.leak_stuck(1)?[0];
    owner.order("copy")?;
    let listed = cwkill(&lab, &format!("{way} --json"))?.exits(0).sockets();
    let owners = listed[0]["owners"].as_array().context("a list")?;
    assert_eq!(owners.len(), 2, "{listed:#?}");
    let copy = at(&owners[1], "/thread");
    let line = format!("{way} --all --method shutdown --allow-spin --json");
    let closed = cwkill(&lab, &line)?.exits(0).sockets();
    all_have(&closed, "closed", "shutdown");
    assert_eq!(at(&closed[0], "/result/descriptor_open"), "true");
    // Only the copy is left: it is a dead descriptor of the thread.
    owner.order(&format!("close {fd}"))?;
    assert_eq!(odd_thread(owner.pid())?.to_string(), copy);
    let line = format!("reclaim --pid {} -n --json", owner.pid());
    let dead = cwkill(&lab, &line)?.exits(0).json();
    assert_eq!(at(&dead, "/descriptors/0/thread"), copy);
    Ok(())
}

/// A thread that executes a program ends all others and takes the place of the first. For a moment /proc shows no descriptors.
fn an_owner_that_executes_a_program_keeps_its_sockets() -> Result<()> {
    const RUNS: usize = 50;
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "execs", 8)?;
    let began = owner.report()?;
    let mut missed = Vec::new();
    for run in 0..RUNS {
        owner.leak_stuck(1)?;
        for line in ["--json", "--all --method shutdown --allow-spin --json"] {
            let ran = cwkill(&lab, line)?;
            let sockets = ran.sockets();
            let pid = owner.pid().to_string();
            let is_owned = sockets.len() == 1 && at(&sockets[0], "/owners/0/pid") == pid;
            let open = is_owned.then(|| at(&sockets[0], "/result/descriptor_open"));
            let open = open.filter(|_| line.starts_with("--all"));
            assert_ne!(open.as_deref(), Some("false"), "run {run}: {ran:?}");
            if !is_owned || open.is_some_and(|open| open != "true") {
                missed.push(format!("run {run}: {ran:?}"));
            }
        }
        // What the act has missed.
        cwkill(&lab, "--all --method destroy --allow-spin")?;
    }
    // On a busy machine an execve(2) can take longer than cwkill waits. A single look misses half of them.
    assert!(missed.len() < RUNS / 2, "{missed:?}");
    let execs = owner.report()? - began;
    assert!(execs >= 30, "{execs}");
    Ok(())
}
