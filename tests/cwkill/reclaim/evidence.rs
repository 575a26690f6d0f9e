//! Descriptors that are not closed, and the reasons.

use anyhow::{Context, Result, bail};
use netns_harness::Lab;
use netns_harness::owners::{Build, Owner};

use super::{
    descriptors, fds_of, is_root_of_the_machine, left, links_of, number, outcomes, reason, reclaim,
};
use crate::support::{CWKILL, PATIENCE, Ran, at, cwkill, ran};
use crate::trial::{Test, once};

pub const TESTS: &[Test] = &[
    once!(descriptors_in_an_epoll_set_are_skipped),
    once!(descriptors_in_a_system_call_are_skipped),
    once!(descriptors_in_poll_and_select_are_skipped),
    once!(nothing_is_closed_in_the_middle_of_a_transfer),
    once!(young_descriptors_are_skipped),
    once!(a_socket_never_connected_is_not_dead),
    once!(a_socket_that_may_still_connect_is_not_dead),
    once!(duplicates_that_cwkill_makes_are_not_reported),
    once!(a_table_shared_with_another_process_is_skipped),
    once!(a_seccomp_filter_that_forbids_close_is_seen_beforehand),
    once!(a_traced_process_is_left_to_its_tracer),
];

fn descriptors_in_an_epoll_set_are_skipped() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "epoll", 1)?;
    let fds = owner.leak(3)?;
    let ran = reclaim(&lab, owner.pid(), "--json")?.exits(4);
    left(
        &ran,
        &mut owner,
        &fds,
        "skipped",
        "in the epoll set of descriptor",
    )?;
    let dry = descriptors(&reclaim(&lab, owner.pid(), "-n --json")?);
    assert_eq!(at(&dry[0], "/closable"), "false");
    let ran = reclaim(&lab, owner.pid(), "--reclaim-force --json")?.exits(0);
    assert_eq!(number(&ran.json(), "/summary/freed"), 3);
    Ok(())
}

fn descriptors_in_a_system_call_are_skipped() -> Result<()> {
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
    let ran = reclaim(&lab, owner.pid(), "--json")?.exits(4);
    left(
        &ran,
        &mut owner,
        &fds,
        "skipped",
        "is inside a system call on it",
    )
}

/// Descriptors that the calls do not wait on are closed.
fn descriptors_in_poll_and_select_are_skipped() -> Result<()> {
    for mode in ["poll", "ppoll", "select", "pselect"] {
        let lab = Lab::new()?;
        let mut owner = Owner::start(lab.app_host(), Build::Plain, mode, 1)?;
        let only = |ran: &Ran, waited_on: &[i32], others: &[i32]| -> Result<()> {
            let said = outcomes(ran);
            assert_eq!(said.len(), waited_on.len() + others.len());
            for (fd, (outcome, why)) in said {
                let is_waited_on = waited_on.contains(&fd);
                let wanted = if is_waited_on { "skipped" } else { "freed" };
                assert_eq!(outcome, wanted, "{mode}, {fd}: {why}");
                let named = why.contains("is inside a system call on it");
                assert_eq!(named, is_waited_on, "{mode}, {fd}: {why}");
            }
            Ok(())
        };
        // The owner has not been stopped yet.
        let waited_on = owner.leak(2)?;
        let before = owner.descriptors()?;
        let ran = reclaim(&lab, owner.pid(), "--json")?.exits(4);
        only(&ran, &waited_on, &[])?;
        assert_eq!(owner.descriptors()?, before);
        owner.report().context(mode)?;

        // cwkill stops the owner for the other descriptors. The poll(2) then restarts, and would see a dead descriptor.
        // So the descriptor dies after that, while the thread is in restart_syscall(2).
        let polls = mode.ends_with("poll");
        let (mut owner, waited_on) = match polls {
            true => {
                let mut owner = Owner::start(lab.app_host(), Build::Plain, mode, 1)?;
                let pipe = owner.order_fds("wait")?;
                let others = owner.leak_scattered(3)?;
                let ran = reclaim(&lab, owner.pid(), "--json")?.exits(0);
                only(&ran, &[], &others)?;
                owner.order_fds(&format!("onto {}", pipe[0]))?;
                (owner, pipe)
            }
            false => (owner, waited_on),
        };
        if mode == "poll" {
            let restarted = |task: std::fs::DirEntry| {
                let call = std::fs::read_to_string(task.path().join("syscall"));
                let number = format!("{} ", libc::SYS_restart_syscall);
                call.is_ok_and(|call| call.starts_with(&number))
            };
            lab.wait_for(PATIENCE, || {
                let tasks = std::fs::read_dir(format!("/proc/{}/task", owner.pid()))?;
                Ok(tasks.flatten().any(restarted))
            })?;
        }
        let ran = reclaim(&lab, owner.pid(), "--json")?.exits(4);
        only(&ran, &waited_on, &[])?;
        if !polls {
            let others = owner.leak_scattered(3)?;
            let ran = reclaim(&lab, owner.pid(), "--json")?.exits(4);
            only(&ran, &waited_on, &others)?;
        }
        owner.report().context(mode)?;
    }
    Ok(())
}

fn nothing_is_closed_in_the_middle_of_a_transfer() -> Result<()> {
    for (mode, number_of_call) in [
        ("transfer-send", libc::SYS_sendto),
        ("transfer-recv", libc::SYS_recvfrom),
        ("transfer-pipe", libc::SYS_write),
    ] {
        let lab = Lab::new()?;
        let mut owner = Owner::start(lab.app_host(), Build::Plain, mode, 1)?;
        let fds = owner.leak(2)?;
        lab.wait_for(PATIENCE, || {
            let waits = |path: std::path::PathBuf| {
                let stat = std::fs::read_to_string(path.join("stat")).unwrap_or_default();
                std::fs::read_to_string(path.join("syscall"))
                    .is_ok_and(|call| call.starts_with(&format!("{number_of_call} ")))
                    && stat.contains(") S ")
            };
            let tasks = std::fs::read_dir(format!("/proc/{}/task", owner.pid()))?;
            Ok(tasks.flatten().any(|task| waits(task.path())))
        })?;
        let why = "waits to send or receive more";
        let dry = descriptors(&reclaim(&lab, owner.pid(), "-n --json")?);
        assert!(reason(&dry[0]).contains(why), "{mode}: {dry:?}");
        let ran = reclaim(&lab, owner.pid(), "--json")?.exits(4);
        left(&ran, &mut owner, &fds, "skipped", why).context(mode)?;
        owner.order("finish")?;
        lab.wait_for(PATIENCE, || Ok(owner.report()? == 1))?;
        let ran = reclaim(&lab, owner.pid(), "--json")?.exits(0);
        assert_eq!(number(&ran.json(), "/summary/freed"), 2);

        let mut owner = Owner::start(lab.app_host(), Build::Plain, mode, 1)?;
        owner.leak(2)?;
        let ran = reclaim(&lab, owner.pid(), "--reclaim-force --json")?.exits(0);
        assert_eq!(number(&ran.json(), "/summary/freed"), 2);
    }
    Ok(())
}

fn a_table_shared_with_another_process_is_skipped() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "shares", 1)?;
    let fds = owner.leak(2)?;
    let ran = reclaim(&lab, owner.pid(), "--json")?.exits(4);
    let why = "shares its descriptor table with process";
    left(&ran, &mut owner, &fds, "skipped", why)?;
    let ran = reclaim(&lab, owner.pid(), "--reclaim-force --json")?.exits(4);
    left(&ran, &mut owner, &fds, "skipped", why)
}

fn young_descriptors_are_skipped() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "idle", 1)?;
    let fds = owner.leak(2)?;
    let line = format!("reclaim --pid {} --json", owner.pid());
    let ran = cwkill(&lab, &line)?.exits(4);
    left(&ran, &mut owner, &fds, "skipped", "quiet for only")?;
    let ran = cwkill(&lab, &format!("{line} --reclaim-force"))?.exits(0);
    assert_eq!(number(&ran.json(), "/summary/freed"), 2);
    Ok(())
}

/// A socket that its program is about to connect looks dead to other tools.
fn a_socket_never_connected_is_not_dead() -> Result<()> {
    let lab = Lab::new()?;
    let agent = lab.app_host().agent("fresh")?;
    let address = "127.0.0.1:7000".parse()?;
    let _listener = agent.listen(address, false, 16)?;
    let other = lab.app_host().agent("peer")?;
    other.connect(address, 1, netns_harness::Dial::default(), PATIENCE)?;
    agent.accept(_listener, 1, PATIENCE)?;
    for pid in [agent.pid(), other.pid()] {
        let before = fds_of(pid)?;
        reclaim(&lab, pid, "--reclaim-force")?.exits(1);
        assert_eq!(fds_of(pid)?, before);
    }
    // The owner in mode `churn` also makes sockets that were never connected.
    Ok(())
}

/// cwkill examines a socket through a duplicate, while another of its threads could read the descriptors of cwkill.
fn duplicates_that_cwkill_makes_are_not_reported() -> Result<()> {
    let lab = Lab::new()?;
    let (mut owner, inner) = in_pid_namespace(&lab)?;
    owner.leak(500)?;
    for _ in 0..20 {
        let found = descriptors(&beside(&lab, inner, "")?.exits(0));
        assert_eq!(found.len(), 500);
        for descriptor in &found {
            assert_eq!(number(descriptor, "/pid"), 1);
        }
    }
    Ok(())
}

/// A program in a pid namespace, so that `--all` selects it alone, and its pid outside.
fn in_pid_namespace(lab: &Lab) -> Result<(Owner, u32)> {
    let script =
        "exec 9<$1; shift; exec unshare --pid --fork --mount-proc --kill-child /proc/self/fd/9 $@";
    let by = ["sh", "-c", script, "sh"];
    let program = Owner::program(Build::Plain)?;
    let owner = Owner::start_through(lab.app_host(), &by, &program, "idle", 1)?;
    let children = format!("/proc/{0}/task/{0}/children", owner.pid());
    let inner = std::fs::read_to_string(children)?.trim().parse()?;
    Ok((owner, inner))
}

/// Runs `cwkill reclaim --json` in the pid namespace of process `inner`.
fn beside(lab: &Lab, inner: u32, more: &str) -> Result<Ran> {
    let line = format!("--target {inner} --pid --mount {CWKILL} reclaim --json {more}");
    let command = lab.app_host().command("nsenter");
    ran(command.args(line.split_whitespace()))
}

/// The program has dead sockets, and others that it is about to connect, connects, or listens on.
fn a_socket_that_may_still_connect_is_not_dead() -> Result<()> {
    let lab = Lab::new()?;
    let (mut owner, inner) = in_pid_namespace(&lab)?;
    let fresh = owner.order_fds("fresh")?;
    let [.., connecting, listening] = fresh[..] else {
        bail!("{fresh:?}");
    };
    for more in ["", "--reclaim-force"] {
        let dead = owner.leak(3)?;
        let before = links_of(inner)?;
        let ran = beside(&lab, inner, &format!("--all --reclaim-age 0s {more}"))?.exits(0);
        let said: Vec<i32> = outcomes(&ran).into_keys().collect();
        assert_eq!(said, dead);
        assert_eq!(number(&ran.json(), "/summary/freed"), 3);
        let mut after = before;
        after.retain(|fd, _| !dead.contains(fd));
        assert_eq!(links_of(inner)?, after);
        owner.report()?;
    }
    // They can still be connected.
    for fd in fresh
        .iter()
        .filter(|fd| ![connecting, listening].contains(fd))
    {
        assert_eq!(owner.order(&format!("use {fd}"))?, "0", "{fd} of {fresh:?}");
    }
    assert_eq!(owner.order("connect")?, "0");
    owner.report()?;
    Ok(())
}

fn a_seccomp_filter_that_forbids_close_is_seen_beforehand() -> Result<()> {
    let lab = Lab::new()?;
    for (mode, outcome) in [("kill", None), ("errno", None), ("log", Some(2))] {
        let mut owner = Owner::start(lab.app_host(), Build::Plain, mode, 1)?;
        let fds = owner.leak(2)?;
        let ran = reclaim(&lab, owner.pid(), "--json")?;
        let freed = number(&ran.json(), "/summary/freed");
        match outcome {
            Some(wanted) if is_root_of_the_machine() => assert_eq!(freed, wanted),
            // Root of a user namespace may not read a filter.
            _ => {
                let why = match is_root_of_the_machine() {
                    true => "seccomp filter of its process forbids close()",
                    false => "seccomp filter that cannot be read",
                };
                left(&ran, &mut owner, &fds, "skipped", why).context(mode)?;
            }
        }
        assert!(owner.is_alive(), "{mode}");
        owner.report()?;
    }
    Ok(())
}

fn a_traced_process_is_left_to_its_tracer() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "traced", 1)?;
    let fds = owner.leak(1)?;
    for force in ["", "--reclaim-force"] {
        let ran = reclaim(&lab, owner.pid(), &format!("--json {force}"))?.exits(4);
        left(&ran, &mut owner, &fds, "skipped", "traced by its-tracer/")?;
    }
    Ok(())
}
