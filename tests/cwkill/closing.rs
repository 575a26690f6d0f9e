//! Stuck sockets are closed, and no others.

use anyhow::{Context, Result};
use netns_harness::owners::{Build, Owner};
use netns_harness::{Family, Lab, TcpState};

use crate::AS_HARNESS;
use crate::support::{
    CWKILL, all_have, alone, at, carries_data, connections, count, cwkill, first_error, in_state,
    lab, leaker, ran, skip_reason,
};
use crate::trial::{Test, each_family, once};

pub const TESTS: &[Test] = &[
    each_family!(forty_are_closed_and_bystanders_live),
    each_family!(destroy_closes_every_kind),
    each_family!(sockets_never_accepted_are_destroyed),
    each_family!(a_shared_socket_needs_one_act),
    each_family!(listing_and_dry_run_change_nothing),
    each_family!(a_silent_peer_is_left_to_the_next_method),
    each_family!(shutdown_loses_no_queued_data),
    each_family!(sockets_of_every_kind_of_owner_are_closed),
    once!(the_oldest_sockets_come_first),
    once!(without_privileges_nothing_is_done_and_the_reason_is_reported),
    once!(a_hidden_owner_is_not_taken_for_no_match),
    once!(an_unknown_owner_leaves_the_descriptor_unknown),
    once!(a_proc_of_another_pid_namespace_is_reported),
    once!(a_user_may_shut_down_own_sockets),
    once!(sockets_of_a_stopped_owner_are_closed),
    once!(a_reader_that_leaves_early_changes_nothing),
    once!(a_signal_ends_a_run_whose_output_nobody_reads),
    once!(the_harness_command_of_the_readme_closes_forty),
    once!(thousands_are_destroyed_in_batches),
    once!(the_longest_grace_is_a_grace),
    once!(an_owner_that_reacts_is_not_blamed_for_its_descriptors),
];

fn forty_are_closed_and_bystanders_live(family: Family) -> Result<()> {
    let (lab, leak) = lab("unread", family, 40)?;
    let bystanders = lab.start("established", family, count(5))?;
    let ran = cwkill(&lab, "--port 8080 --json")?.exits(0);
    let sockets = ran.sockets();
    assert_eq!(sockets.len(), 40);
    all_have(&sockets, "closed", "shutdown");
    assert_eq!(at(&ran.json(), "/summary/closed"), "40");
    for socket in &sockets {
        assert_eq!(at(socket, "/result/descriptor_open"), "true");
    }
    let ran = ran.complains("still has 40 descriptors of closed sockets open");
    assert!(!ran.stderr.contains("hint"), "{ran:?}");
    let rows = connections(&lab)?;
    assert_eq!(rows.len(), 5);
    assert!(rows.iter().all(|row| row.state == TcpState::Established));
    assert!(leak.app().is_alive());
    carries_data(&bystanders)?;
    cwkill(&lab, "--port 8080")?.exits(1);
    Ok(())
}

fn destroy_closes_every_kind(family: Family) -> Result<()> {
    let (lab, unread) = lab("unread", family, 70)?;
    let _drained = lab.start("drained", family, count(70))?;
    let bystanders = lab.start("established", family, count(2))?;
    let sockets = cwkill(&lab, "--all --method destroy --json")?
        .exits(0)
        .sockets();
    assert_eq!(sockets.len(), 140);
    all_have(&sockets, "closed", "destroy");
    assert_eq!(connections(&lab)?.len(), 2);
    assert!(unread.app().is_alive());
    carries_data(&bystanders)
}

/// A time that no clock can represent.
fn the_longest_grace_is_a_grace() -> Result<()> {
    for kind in ["drained", "not-accepted"] {
        for (method, outcome, by) in [
            ("destroy", "closed", "destroy"),
            ("rst", "closed", "rst"),
            ("probe", "skipped", "null"),
        ] {
            let (lab, _leak) = lab(kind, Family::V4, 2)?;
            let line = format!("--port 8080 --json --method {method} --grace 500000000000y");
            let sockets = cwkill(&lab, &line)?.sockets();
            assert_eq!(sockets.len(), 2, "{kind}, {method}");
            all_have(&sockets, outcome, by);
        }
    }
    Ok(())
}

fn sockets_never_accepted_are_destroyed(family: Family) -> Result<()> {
    let (lab, leak) = lab("not-accepted", family, 3)?;
    let backlog = || -> Result<u32> {
        let rows = lab.app_host().ss(&["sport", "=", ":8080"])?;
        let listener = rows.iter().find(|row| row.state == TcpState::Listen);
        Ok(listener.context("the listener is gone")?.recv_q)
    };
    assert_eq!(backlog()?, 3);
    let ran = cwkill(&lab, "--port 8080 --json")?.exits(0);
    let sockets = ran.sockets();
    all_have(&sockets, "closed", "destroy");
    assert_eq!(sockets[0]["plan"], serde_json::json!(["destroy", "rst"]));
    assert_eq!(at(&sockets[0], "/result/descriptor_open"), "false");
    ran.complains("3 closed connections still take a slot in the backlog");
    assert_eq!(connections(&lab)?.len(), 0);
    assert!(leak.app().is_alive());
    // The note is right: no slot was freed.
    assert_eq!(backlog()?, 3);
    Ok(())
}

fn a_shared_socket_needs_one_act(family: Family) -> Result<()> {
    let (lab, _leak) = lab("forked", family, 2)?;
    let ran = cwkill(&lab, "--all --json")?.exits(0);
    all_have(&ran.sockets(), "closed", "shutdown");
    assert_eq!(connections(&lab)?.len(), 0);
    // One note for each of the three owners.
    let notes = ran.stderr.matches("still has 2 descriptors").count();
    assert_eq!(notes, 3);
    Ok(())
}

fn listing_and_dry_run_change_nothing(family: Family) -> Result<()> {
    let (lab, _unread) = lab("unread", family, 2)?;
    let _bystanders = lab.start("established", family, count(2))?;
    let _never = lab.start("not-accepted", family, count(2))?;
    let before = lab.app_host().ss(&[])?;
    for arguments in [
        "",
        "--json",
        "--jsonl",
        "-v",
        "--all --dry-run",
        "--port 8080 -n",
        "--port 8080 --dryrun --method destroy --discard-unsent",
        "--help",
        "--version",
    ] {
        cwkill(&lab, arguments)?.exits(0);
        assert_eq!(lab.app_host().ss(&[])?, before, "{arguments}");
    }
    let plan = cwkill(&lab, "--port 8080 -n --json")?.sockets();
    for socket in plan {
        let planned = match at(&socket, "/cause").as_str() {
            "not-accepted" => serde_json::json!(["destroy", "rst"]),
            _ => serde_json::json!(["shutdown", "destroy", "rst"]),
        };
        assert_eq!(socket["plan"], planned);
    }
    Ok(())
}

fn a_silent_peer_is_left_to_the_next_method(family: Family) -> Result<()> {
    let (lab, leak) = lab("drained", family, 2)?;
    leak.pair().set_link(false)?;
    let ran = cwkill(&lab, "--all --method shutdown --grace 100ms --json")?.exits(4);
    all_have(&ran.sockets(), "closing", "shutdown");
    assert_eq!(in_state(&lab, TcpState::LastAck)?, 2);

    let more = lab.start(
        "drained",
        family,
        netns_harness::Options {
            own: true,
            port: 9090,
            ..count(2)
        },
    )?;
    more.pair().set_link(false)?;
    let ran = cwkill(&lab, "--port 9090 --grace 100ms --json")?.exits(0);
    let sockets = ran.sockets();
    all_have(&sockets, "closed", "destroy");
    assert_eq!(at(&sockets[0], "/result/attempts/0/method"), "shutdown");
    assert_eq!(in_state(&lab, TcpState::LastAck)?, 2);
    Ok(())
}

/// The owner has queued megabytes to a peer that does not read.
fn shutdown_loses_no_queued_data(family: Family) -> Result<()> {
    let (lab, leak) = lab("sending", family, 1)?;
    // The peer's kernel may still accept some of it, so the number varies.
    let queued = || -> Result<u32> { Ok(connections(&lab)?[0].send_q) };
    assert!(queued()? > 100_000, "{}", queued()?);
    // These methods would lose the data, so they are excluded.
    for method in ["destroy", "rst", "destroy,rst"] {
        let line = format!("--all --method {method} --json");
        let sockets = cwkill(&lab, &line)?.exits(4).sockets();
        all_have(&sockets, "skipped", "null");
        let reason = skip_reason(&sockets[0]);
        assert!(
            reason.contains("unsent bytes (--discard-unsent allows it)"),
            "{reason}"
        );
    }
    assert!(queued()? > 100_000, "{}", queued()?);
    // They stay excluded after a shutdown that the peer cannot answer yet.
    let sockets = cwkill(&lab, "--all --grace 100ms --json")?
        .exits(4)
        .sockets();
    all_have(&sockets, "closing", "shutdown");
    assert_eq!(in_state(&lab, TcpState::LastAck)?, 1);
    // The peer gets every byte and then EOF.
    let conn = leak.conns()[0];
    let peer = conn.peer_fd.context("the peer's descriptor")?;
    let drained = leak.peer().drain(&[peer], crate::support::PATIENCE)?;
    assert_eq!(drained[0].bytes, conn.sent);
    assert!(
        drained[0].intact && drained[0].end == netns_harness::End::Eof,
        "{drained:?}"
    );

    let (lab, _leak) = crate::support::lab("sending", family, 1)?;
    let line = "--all --method destroy --discard-unsent --json";
    all_have(&cwkill(&lab, line)?.exits(0).sockets(), "closed", "destroy");
    assert_eq!(connections(&lab)?.len(), 0);
    Ok(())
}

fn sockets_of_every_kind_of_owner_are_closed(family: Family) -> Result<()> {
    for (scenario, method) in [
        ("scm-rights", "destroy"),
        ("threads", "shutdown"),
        ("thread-table", "shutdown"),
        ("reuse", "shutdown"),
        ("peer-vanished", "shutdown"),
        ("silent-peer", "destroy"),
        ("peer-gone", "destroy"),
    ] {
        let (lab, _leak) = lab(scenario, family, 2)?;
        let ran = cwkill(&lab, "--all --grace 300ms --json")?.exits(0);
        for socket in ran.sockets() {
            assert_eq!(at(&socket, "/result/outcome"), "closed", "{scenario}");
            assert_eq!(at(&socket, "/result/method"), method, "{scenario}");
        }
        assert_eq!(connections(&lab)?.len(), 0);
    }
    Ok(())
}

fn the_oldest_sockets_come_first() -> Result<()> {
    let (lab, old) = lab("drained", Family::V4, 2)?;
    let oldest = || -> Result<u64> {
        let sockets = cwkill(&lab, "--json")?.sockets();
        let ages = sockets
            .iter()
            .filter_map(|socket| socket["age_ms"].as_u64());
        ages.min().context("no age")
    };
    // The kernel counts these ages in milliseconds.
    lab.wait_for(crate::support::PATIENCE, || Ok(oldest()? > 100))?;
    let young = lab.start("drained", Family::V4, count(3))?;
    let ran = cwkill(&lab, "--all --max-kills 2 --json")?.exits(0);
    let counts = &ran.json()["summary"];
    assert_eq!(counts["over_max_kills"], 3);
    assert_eq!(counts["skipped"], 3);
    let sockets = ran.sockets();
    assert_eq!(sockets.len(), 5);
    all_have(&sockets[..2], "closed", "shutdown");
    all_have(&sockets[2..], "skipped", "null");
    assert_eq!(skip_reason(&sockets[2]), "over --max-kills");
    let left: Vec<_> = connections(&lab)?.iter().map(|row| row.peer).collect();
    assert!(old.conns().iter().all(|conn| !left.contains(&conn.peer)));
    assert!(young.conns().iter().all(|conn| left.contains(&conn.peer)));
    Ok(())
}

fn without_privileges_nothing_is_done_and_the_reason_is_reported() -> Result<()> {
    let (lab, _leak) = lab("unread", Family::V4, 2)?;
    let _never = lab.start("not-accepted", Family::V4, count(2))?;
    let before = lab.app_host().ss(&[])?;
    let command = lab.app_host().command(CWKILL).capabilities(&[]);
    let ran = ran(command.args(["--port", "8080", "--json"]))?
        .exits(4)
        .complains("destroy needs CAP_NET_ADMIN")
        .complains("cwkill doctor");
    let hints = ran.stderr.lines().filter(|line| line.contains("hint:"));
    assert_eq!(hints.count(), 1, "{ran:?}");
    let sockets = ran.sockets();
    assert_eq!(sockets.len(), 4);
    all_have(&sockets, "skipped", "null");
    for socket in &sockets {
        let reason = skip_reason(socket);
        assert!(reason.contains("destroy: needs CAP_NET_ADMIN"), "{reason}");
    }
    assert_eq!(lab.app_host().ss(&[])?, before);
    Ok(())
}

/// The selected owner cannot be inspected. That is not the same as no match.
fn a_hidden_owner_is_not_taken_for_no_match() -> Result<()> {
    let (lab, leak) = lab("unread", Family::V4, 2)?;
    let before = lab.app_host().ss(&[])?;
    let (pid, comm) = (leak.app().pid(), leak.app().comm().to_owned());
    for selector in [format!("--pid={pid}"), format!("--process={comm}")] {
        for also in ["--json", "--dry-run"] {
            let command = lab.app_host().command(CWKILL).capabilities(&[]);
            ran(command.args([&selector, also]))?
                .exits(4)
                .complains("2 more sockets may belong to the selected processes")
                .complains("CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH")
                .complains("cwkill doctor");
        }
    }
    let command = lab.app_host().command(CWKILL).capabilities(&[]);
    let ran = ran(command.args(["--process", "nobody-has-this", "--json"]))?;
    match crate::support::sees_every_process()? {
        true => ran
            .exits(1)
            .complains("no process has the name nobody-has-this"),
        // A process of another pid namespace may have it.
        false => ran
            .exits(4)
            .complains("2 more sockets may belong to the selected processes"),
    };
    assert_eq!(lab.app_host().ss(&[])?, before);
    Ok(())
}

fn an_unknown_owner_leaves_the_descriptor_unknown() -> Result<()> {
    let (lab, _leak) = lab("unread", Family::V4, 2)?;
    let command = lab.app_host().command(CWKILL);
    let command = command.capabilities(&[netns_harness::Capability::CAP_NET_ADMIN]);
    let ran = ran(command.args(["--all", "--json"]))?
        .exits(0)
        .complains("2 sockets without a known owner")
        .complains("could not be read")
        .complains("whether the descriptors of 2 closed sockets are still open could not be seen");
    let sockets = ran.sockets();
    all_have(&sockets, "closed", "destroy");
    assert_eq!(at(&sockets[0], "/result/descriptor_open"), "null");
    let unreadable = ran.json()["unreadable_processes"].as_u64();
    assert!(unreadable.is_some_and(|count| count > 0), "{ran:?}");
    Ok(())
}

/// /proc shows the pids of another pid namespace, so cwkill must not use them.
fn a_proc_of_another_pid_namespace_is_reported() -> Result<()> {
    let (lab, _leak) = lab("unread", Family::V4, 1)?;
    let line = format!("--pid --fork --kill-child {CWKILL} --all --method shutdown --json");
    let ran = ran(lab.app_host().command("unshare").args(line.split(' ')))?.exits(4);
    let error = first_error(&ran.sockets()[0]);
    assert!(error.contains("another pid namespace"), "{error}");
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 1);
    Ok(())
}

fn a_user_may_shut_down_own_sockets() -> Result<()> {
    let lab = Lab::new()?;
    let options = netns_harness::AgentOptions {
        comm: "no-privilege".into(),
        capabilities: Some(vec![]),
        ..Default::default()
    };
    let _leaker = leaker(&lab, &options)?;
    let command = lab.app_host().command(CWKILL).capabilities(&[]);
    let ran = ran(command.args(["--port", "7000", "--json"]))?.exits(0);
    all_have(&ran.sockets(), "closed", "shutdown");
    Ok(())
}

fn sockets_of_a_stopped_owner_are_closed() -> Result<()> {
    let (lab, leak) = lab("unread", Family::V4, 2)?;
    leak.app().stop()?;
    let sockets = cwkill(&lab, "--all --json")?.exits(0).sockets();
    all_have(&sockets, "closed", "shutdown");
    assert_eq!(connections(&lab)?.len(), 0);
    Ok(())
}

/// The output does not fit into a pipe, so cwkill is still writing when its reader has gone.
fn a_reader_that_leaves_early_changes_nothing() -> Result<()> {
    let (lab, _leak) = lab("unread", Family::V4, 1500)?;
    let script = format!("{{ {CWKILL} --all -v; echo status=$? >&2; }} | head -1");
    let ran = ran(lab.app_host().command("sh").args(["-c", &script]))?.exits(0);
    assert_eq!(ran.stdout.lines().count(), 1);
    let ran = ran.complains("status=0");
    assert!(!ran.stderr.contains("panic"), "{ran:?}");
    assert_eq!(connections(&lab)?.len(), 0);
    Ok(())
}

/// The work is done, and cwkill waits for a reader of its report. A signal ends it as usual.
fn a_signal_ends_a_run_whose_output_nobody_reads() -> Result<()> {
    use std::os::unix::process::ExitStatusExt;
    let (lab, _leak) = lab("unread", Family::V4, 1500)?;
    let (reader, writer) = std::io::pipe()?;
    let command = lab.app_host().command(CWKILL).args(["--all", "--json"]);
    let mut child = command.stdout(writer).spawn()?;
    lab.wait_for(crate::support::PATIENCE, || {
        let wchan = std::fs::read_to_string(format!("/proc/{}/wchan", child.id()))?;
        Ok(wchan.contains("pipe_write"))
    })?;
    let pid = nix::unistd::Pid::from_raw(child.id().try_into()?);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)?;
    let status = child.wait()?;
    assert_eq!(status.signal(), Some(libc::SIGTERM));
    drop(reader);
    assert_eq!(connections(&lab)?.len(), 0);
    Ok(())
}

/// `netns-harness run unread --count 40 -- cwkill --port 8080`, as CONTRIBUTING.md has it. This program acts as the harness.
fn the_harness_command_of_the_readme_closes_forty() -> Result<()> {
    let lab = Lab::new()?;
    let line = format!("run unread --count 40 -- {CWKILL} --port 8080");
    let harness = lab.app_host().command(std::env::current_exe()?);
    let ran = ran(harness.env(AS_HARNESS, "1").args(line.split(' ')))?.exits(0);
    let summary = "40 sockets matched: 40 closed";
    assert!(ran.stdout.contains(summary), "{ran:?}");
    Ok(())
}

/// Enough for two batches, each with more sockets than are looked up one by one.
fn thousands_are_destroyed_in_batches() -> Result<()> {
    let (lab, _leak) = lab("drained", Family::V4, 4500)?;
    let bystanders = lab.start("established", Family::V4, alone(9090, 3))?;
    let cookies = |arguments: &str| -> Result<std::collections::BTreeSet<String>> {
        let sockets = cwkill(&lab, arguments)?.exits(0).sockets();
        Ok(sockets.iter().map(|socket| at(socket, "/cookie")).collect())
    };
    let found = cookies("--all -n --json --no-owners")?;
    assert_eq!(found.len(), 4500);
    assert_eq!(found, cookies("--all -n --json")?);
    let ran = cwkill(&lab, "--all --method destroy --json")?.exits(0);
    all_have(&ran.sockets(), "closed", "destroy");
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 0);
    carries_data(&bystanders)
}

/// Its loop computes for a moment before it closes each descriptor, so the last one is closed well after the last socket.
fn an_owner_that_reacts_is_not_blamed_for_its_descriptors() -> Result<()> {
    for method in ["shutdown", "destroy", "rst"] {
        let lab = Lab::new()?;
        let mut owner = Owner::start(lab.app_host(), Build::Plain, "loops", 1)?;
        owner.leak_stuck(300)?;
        let line = format!(
            "--pid {} --method {method} --grace 20s --allow-spin --json",
            owner.pid()
        );
        let ran = cwkill(&lab, &line)?.exits(0);
        assert_eq!(ran.sockets().len(), 300);
        for socket in ran.sockets() {
            assert_eq!(at(&socket, "/result/outcome"), "closed", "{method}");
            assert_eq!(at(&socket, "/result/descriptor_open"), "false", "{method}");
        }
        assert!(!ran.stderr.contains("still"), "{ran:?}");
        assert_eq!(owner.report()?, 300);
    }
    Ok(())
}
