//! A closed socket can wake its owner without end. cwkill leaves such sockets alone, and finds out what it cannot know beforehand
//! on one socket of each owner.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use netns_harness::owners::runtimes::{Paused, Runtime};
use netns_harness::owners::{Build, Owner};
use netns_harness::{Lab, TcpState};
use serde_json::Value;

use crate::support::{PATIENCE, Ran, at, cwkill, in_state};
use crate::trial::{Need, Test, once};

pub const TESTS: &[Test] = &[
    once!(a_loop_that_would_spin_is_spared),
    once!(a_full_close_by_any_method_wakes_a_paused_loop_without_end),
    once!(a_loop_that_is_told_once_is_no_obstacle),
    once!(a_socket_is_closed_if_its_descriptor_is_too),
    once!(a_socket_whose_descriptor_must_stay_open_is_spared),
    once!(what_cannot_be_known_is_tried_on_one_socket),
    once!(a_socket_that_spins_after_the_first_is_found),
    once!(a_poll_of_a_process_with_many_threads_is_seen),
    once!(a_spin_among_thousands_of_threads_is_found).slow(),
    once!(a_socket_whose_descriptor_stays_open_after_all_is_reported),
    once!(a_spared_socket_does_not_count_towards_the_limit),
    once!(the_command_in_the_note_ends_the_spin),
    once!(a_loop_that_sleeps_between_its_wake_ups_spins_too),
    once!(a_loop_that_wakes_once_a_second_does_not_spin),
    once!(a_loop_that_looks_once_a_second_can_spin_after_the_watch),
    once!(an_owner_that_is_busy_anyway_does_not_spin),
    once!(each_owner_has_its_own_canary),
    once!(node_pauses).needs(Need::Language(Runtime::Node)),
    once!(asyncio_pauses).needs(Need::Language(Runtime::Python)),
    once!(java_pauses).needs(Need::Language(Runtime::Java)),
    once!(go_pauses).needs(Need::Language(Runtime::Go)),
];

/// A loop on sockets in CLOSE-WAIT that sleeps.
fn paused(lab: &Lab, mode: &str, sockets: usize) -> Result<Owner> {
    let mut owner = Owner::start(lab.app_host(), Build::Plain, mode, 1)?;
    ensure!(owner.leak_stuck(sockets)?.len() == sockets);
    // The wake-ups for the new sockets.
    lab.wait_for(PATIENCE, || Ok(owner.wakes()? == 0))?;
    Ok(owner)
}

/// The number of wake-ups in a fifth of a second.
fn wakes(owner: &mut Owner) -> Result<u64> {
    let until = Instant::now() + Duration::from_millis(200);
    owner.wakes()?;
    let mut wakes = 0;
    while Instant::now() < until {
        wakes += owner.wakes()?;
    }
    Ok(wakes)
}

#[track_caller]
fn sleeps(owner: &mut Owner) -> Result<()> {
    let wakes = wakes(owner)?;
    assert!(wakes < 20, "{wakes} wake-ups");
    owner.report()?;
    Ok(())
}

/// Waits until the loop of `owner` wakes all the time.
fn until_it_spins(lab: &Lab, owner: &mut Owner) -> Result<()> {
    lab.wait_for(PATIENCE, || Ok(wakes(owner)? > 100))
}

/// Runs cwkill on one owner.
fn on(lab: &Lab, owner: &Owner, more: &str) -> Result<Ran> {
    cwkill(
        lab,
        &format!("--pid {} --min-idle 0s --json {more}", owner.pid()),
    )
}

/// How often a code is the reason of a result.
fn with_reason(sockets: &[Value], code: &str) -> usize {
    let reasons = sockets.iter().map(|it| at(it, "/result/reason_code"));
    reasons.filter(|reason| reason == code).count()
}

const WOULD_SPIN: [&str; 8] = [
    "loop-epoll-0",
    "loop-epoll-dup",
    "loop-epoll-pri",
    "loop-epoll-out",
    "loop-epoll-nested",
    "loop-epoll-forked",
    "loop-poll-0",
    "loop-poll-out",
];

fn a_loop_that_would_spin_is_spared() -> Result<()> {
    for mode in WOULD_SPIN {
        let lab = Lab::new()?;
        let mut owner = paused(&lab, mode, 3)?;
        for socket in on(&lab, &owner, "-n")?.exits(0).sockets() {
            assert_eq!(at(&socket, "/skip/reason_code"), "would-spin", "{mode}");
            assert_eq!(at(&socket, "/plan"), "[]", "{mode}");
        }
        let ran = on(&lab, &owner, "--discard-unsent")?.exits(4);
        assert_eq!(with_reason(&ran.sockets(), "would-spin"), 3, "{mode}");
        assert_eq!(in_state(&lab, TcpState::CloseWait)?, 3, "{mode}");
        sleeps(&mut owner).context(mode)?;
        // The table says it too, and how to go on.
        let pid = owner.pid();
        let table = cwkill(&lab, &format!("--pid {pid} --min-idle 0s"))?
            .exits(4)
            .stdout;
        assert!(table.contains("would spin: its "), "{mode}: {table}");
        assert!(table.contains("--allow-spin"), "{mode}: {table}");
    }
    Ok(())
}

/// This is what the other tests rest on.
fn a_full_close_by_any_method_wakes_a_paused_loop_without_end() -> Result<()> {
    for mode in [
        "loop-epoll-0",
        "loop-epoll-dup",
        "loop-poll-0",
        "loop-epoll-forked",
    ] {
        for method in ["shutdown", "destroy", "rst"] {
            let lab = Lab::new()?;
            let mut owner = paused(&lab, mode, 2)?;
            let line = format!("--allow-spin --method {method}");
            let ran = on(&lab, &owner, &line)?.exits(0);
            let sockets = ran.sockets();
            assert_eq!(at(&sockets[0], "/result/method"), method, "{mode}");
            until_it_spins(&lab, &mut owner).with_context(|| format!("{mode} {method}"))?;
        }
    }
    // An abort by the peer, as the answer to a probe of a peer that is gone.
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "loop-epoll-0", 1)?;
    owner.order("aborted")?;
    until_it_spins(&lab, &mut owner)
}

fn a_loop_that_is_told_once_is_no_obstacle() -> Result<()> {
    for mode in ["loop-epoll-et", "loop-epoll-once", "loop-select"] {
        for method in ["shutdown", "destroy", "rst"] {
            let lab = Lab::new()?;
            let mut owner = paused(&lab, mode, 3)?;
            let ran = on(&lab, &owner, &format!("--method {method}"))?.exits(0);
            assert_eq!(at(&ran.json(), "/summary/closed"), "3", "{mode}");
            assert_eq!(at(&ran.json(), "/spinning"), "[]", "{mode}");
            sleeps(&mut owner).with_context(|| format!("{mode} {method}"))?;
        }
    }
    Ok(())
}

const RECLAIM: &str = "--reclaim --reclaim-age 0s --stop-limit 5s";

fn a_socket_is_closed_if_its_descriptor_is_too() -> Result<()> {
    for mode in [
        "loop-epoll-0",
        "loop-epoll-dup",
        "loop-epoll-pri",
        "loop-epoll-nested",
    ] {
        let lab = Lab::new()?;
        let mut owner = paused(&lab, mode, 3)?;
        // Without force, a descriptor in an epoll set stays open.
        let ran = on(&lab, &owner, RECLAIM)?.exits(4);
        assert_eq!(with_reason(&ran.sockets(), "would-spin"), 3, "{mode}");
        sleeps(&mut owner).context(mode)?;
        let ran = on(&lab, &owner, &format!("{RECLAIM} --reclaim-force"))?.exits(0);
        assert_eq!(at(&ran.json(), "/summary/closed"), "3", "{mode}");
        assert_eq!(at(&ran.json(), "/reclaim/summary/freed"), "3", "{mode}");
        sleeps(&mut owner).context(mode)?;
    }
    Ok(())
}

fn a_socket_whose_descriptor_must_stay_open_is_spared() -> Result<()> {
    // The first cannot be reclaimed. In the second, poll(2) returns at once for a closed descriptor, too.
    for mode in ["loop-epoll-shared", "loop-poll-0"] {
        let lab = Lab::new()?;
        let mut owner = paused(&lab, mode, 2)?;
        for act in ["-n", ""] {
            let line = format!("{act} {RECLAIM} --reclaim-force");
            let ran = on(&lab, &owner, &line)?.exits(if act.is_empty() { 4 } else { 0 });
            for socket in ran.sockets() {
                assert_eq!(at(&socket, "/skip/reason_code"), "would-spin", "{mode}");
            }
        }
        assert_eq!(in_state(&lab, TcpState::CloseWait)?, 2, "{mode}");
        sleeps(&mut owner).context(mode)?;
    }
    Ok(())
}

fn what_cannot_be_known_is_tried_on_one_socket() -> Result<()> {
    for (mode, sockets) in [
        ("loop-glances", 20),
        ("loop-glances", 1),
        ("loop-select-out", 4),
    ] {
        let lab = Lab::new()?;
        let mut owner = paused(&lab, mode, sockets)?;
        let pid = owner.pid();
        for socket in on(&lab, &owner, "-n")?.exits(0).sockets() {
            assert_eq!(at(&socket, "/skip"), "null", "{mode}");
        }
        let ran = on(&lab, &owner, "--method destroy --discard-unsent")?.exits(4);
        let json = ran.json();
        assert_eq!(at(&json, "/summary/closed"), "1", "{mode}");
        let left = with_reason(&ran.sockets(), "owner-spins");
        assert_eq!(left, sockets - 1, "{mode}");
        assert_eq!(in_state(&lab, TcpState::CloseWait)?, sockets - 1, "{mode}");
        // The first of the list is the oldest.
        let oldest = ran.sockets().remove(0);
        assert_eq!(at(&oldest, "/result/outcome"), "closed", "{mode}");
        assert_eq!(at(&oldest, "/owners/0/spinning"), "true", "{mode}");
        let spinning = &json["spinning"][0];
        assert_eq!(at(spinning, "/pid"), pid.to_string(), "{mode}");
        assert_eq!(
            at(spinning, "/fd"),
            at(&oldest, "/owners/0/fds/0"),
            "{mode}"
        );
        assert_eq!(at(spinning, "/ended"), "false", "{mode}");
        let note = format!("{pid} spins since the socket of descriptor");
        // No command ends a select(2).
        let command = match mode {
            "loop-select-out" => "To end it: restart the process",
            _ => "To end it: cwkill reclaim --pid",
        };
        ran.complains(&note).complains(command);
        until_it_spins(&lab, &mut owner)?;
    }
    Ok(())
}

/// The canary is harmless, and the other sockets are not, but that cannot be seen.
fn a_socket_that_spins_after_the_first_is_found() -> Result<()> {
    // Because a thread is in uninterruptible sleep: after the canary, four are tried. Because it polls only now and then: all.
    for (mode, rest, closed) in [
        ("loop-poll-hidden", 19, 5),
        ("loop-poll-hidden", 1, 2),
        ("loop-glances-rest", 19, 20),
    ] {
        let lab = Lab::new()?;
        let mut owner = paused(&lab, mode, 1)?;
        // The first is certainly the oldest.
        let until = Instant::now() + Duration::from_millis(200);
        lab.wait_for(PATIENCE, || Ok(Instant::now() > until))?;
        ensure!(owner.leak_stuck(rest)?.len() == rest);
        lab.wait_for(PATIENCE, || Ok(owner.wakes()? == 0))?;
        let ran = on(&lab, &owner, "--method shutdown")?.exits(4);
        let json = ran.json();
        assert_eq!(at(&json, "/summary/closed"), closed.to_string(), "{mode}");
        let left = with_reason(&ran.sockets(), "owner-spins");
        assert_eq!(left, rest + 1 - closed, "{mode}");
        let pid = owner.pid().to_string();
        assert_eq!(at(&json, "/spinning/0/pid"), pid, "{mode}");
        // Which of several it was is not known.
        let is_null = at(&json, "/spinning/0/fd") == "null";
        assert_eq!(is_null, rest > 1, "{mode}: {json}");
        until_it_spins(&lab, &mut owner)?;
    }
    Ok(())
}

fn a_poll_of_a_process_with_many_threads_is_seen() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "loop-poll-0", 700)?;
    ensure!(owner.leak_stuck(3)?.len() == 3);
    lab.wait_for(PATIENCE, || Ok(owner.wakes()? == 0))?;
    let ran = on(&lab, &owner, "")?.exits(4);
    assert_eq!(with_reason(&ran.sockets(), "would-spin"), 3, "{ran:?}");
    sleeps(&mut owner)
}

fn a_spin_among_thousands_of_threads_is_found() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "loop-glances", 5000)?;
    ensure!(owner.leak_stuck(20)?.len() == 20);
    lab.wait_for(PATIENCE, || Ok(owner.wakes()? == 0))?;
    let ran = on(&lab, &owner, "")?.exits(4);
    let json = ran.json();
    assert_eq!(at(&json, "/summary/closed"), "1", "{json}");
    assert_eq!(with_reason(&ran.sockets(), "owner-spins"), 19, "{json}");
    assert_eq!(at(&json, "/spinning/0/pid"), owner.pid().to_string());
    until_it_spins(&lab, &mut owner)
}

/// cwkill expects to close the descriptors, but cannot stop the process for long enough.
fn a_socket_whose_descriptor_stays_open_after_all_is_reported() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = paused(&lab, "loop-epoll-0", 3)?;
    let line = "--reclaim --reclaim-force --reclaim-age 0s --stop-limit 1us";
    let ran = on(&lab, &owner, line)?.exits(4);
    let json = ran.json();
    assert_eq!(at(&json, "/summary/closed"), "3", "{json}");
    assert_eq!(at(&json, "/reclaim/summary/freed"), "0", "{json}");
    assert_eq!(at(&json, "/spinning/0/pid"), owner.pid().to_string());
    assert_eq!(at(&json, "/spinning/0/ended"), "false");
    let next = at(&json, "/spinning/0/next");
    assert!(next.starts_with("cwkill reclaim"), "{next}");
    until_it_spins(&lab, &mut owner)
}

fn a_spared_socket_does_not_count_towards_the_limit() -> Result<()> {
    let lab = Lab::new()?;
    let mut spared = paused(&lab, "loop-epoll-shared", 2)?;
    let mut idle = Owner::start(lab.app_host(), Build::Plain, "idle", 1)?;
    idle.leak_stuck(1)?;
    let line = format!("--all --min-idle 0s --json --max-kills 1 {RECLAIM} --reclaim-force");
    let ran = cwkill(&lab, &line)?.exits(4);
    assert_eq!(with_reason(&ran.sockets(), "would-spin"), 2, "{ran:?}");
    assert_eq!(at(&ran.json(), "/summary/closed"), "1", "{ran:?}");
    sleeps(&mut spared)
}

fn the_command_in_the_note_ends_the_spin() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = paused(&lab, "loop-glances", 3)?;
    let ran = on(&lab, &owner, "")?.exits(4);
    let command = at(&ran.json(), "/spinning/0/next");
    until_it_spins(&lab, &mut owner)?;
    let before = owner.descriptors()?.len();
    let line = command.strip_prefix("cwkill ").context("a command")?;
    let ended = cwkill(&lab, &format!("{line} --stop-limit 5s --json"))?.exits(0);
    assert_eq!(at(&ended.json(), "/summary/replaced"), "1", "{command}");
    // The number stays taken: poll(2) would report a free one without end, too.
    assert_eq!(owner.descriptors()?.len(), before);
    sleeps(&mut owner)
}

fn a_loop_that_sleeps_between_its_wake_ups_spins_too() -> Result<()> {
    // Only the share of the time in which it needs a processor shows this spin. On a busy machine that share is high before the
    // close as well, but not each time.
    let mut runs = Vec::new();
    for _ in 0..20 {
        let lab = Lab::new()?;
        let owner = paused(&lab, "loop-logs", 5)?;
        let ran = on(&lab, &owner, "")?;
        if ran.code == Some(4) && with_reason(&ran.sockets(), "owner-spins") == 4 {
            return Ok(());
        }
        runs.push(ran);
    }
    panic!("it was not seen to spin: {runs:?}")
}

/// Its sockets wake it at each look, and it sleeps a second all the same.
fn a_loop_that_wakes_once_a_second_does_not_spin() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = paused(&lab, "loop-seldom", 5)?;
    let ran = on(&lab, &owner, "")?.exits(0);
    assert_eq!(at(&ran.json(), "/summary/closed"), "5");
    assert_eq!(at(&ran.json(), "/spinning"), "[]");
    assert!(!ran.stderr.contains("spin"), "{ran:?}");
    // It has seen the closed sockets.
    owner.wakes()?;
    lab.wait_for(PATIENCE, || Ok(owner.wakes()? > 0))?;
    sleeps(&mut owner)
}

/// The manual says so. What cwkill says is true in any case: the loop looks during the watch, or after it.
fn a_loop_that_looks_once_a_second_can_spin_after_the_watch() -> Result<()> {
    for _ in 0..3 {
        let lab = Lab::new()?;
        let mut owner = paused(&lab, "loop-seldom-spins", 3)?;
        let ran = on(&lab, &owner, "")?;
        match at(&ran.json(), "/spinning") == "[]" {
            true => {
                assert!(!ran.stderr.contains("spin"), "{ran:?}");
                ran.exits(0)
            }
            false => {
                let pid = owner.pid().to_string();
                assert_eq!(at(&ran.json(), "/spinning/0/pid"), pid, "{ran:?}");
                ran.exits(4)
            }
        };
        until_it_spins(&lab, &mut owner)?;
    }
    Ok(())
}

fn an_owner_that_is_busy_anyway_does_not_spin() -> Result<()> {
    // Where the hypervisor takes the processors away before the close, the owner seems to have been idle. Not each time.
    let mut runs = Vec::new();
    for _ in 0..5 {
        let lab = Lab::new()?;
        let owner = paused(&lab, "busy", 20)?;
        let ran = on(&lab, &owner, "")?;
        if ran.code == Some(0) && at(&ran.json(), "/summary/closed") == "20" {
            return Ok(());
        }
        runs.push(ran);
    }
    panic!("it was taken for one that spins: {runs:?}")
}

fn each_owner_has_its_own_canary() -> Result<()> {
    let lab = Lab::new()?;
    let spins = paused(&lab, "loop-glances", 5)?;
    let mut idle = Owner::start(lab.app_host(), Build::Plain, "idle", 1)?;
    idle.leak_stuck(5)?;
    let ran = cwkill(&lab, "--all --min-idle 0s --json")?.exits(4);
    for socket in ran.sockets() {
        let pid = at(&socket, "/owners/0/pid");
        let is_left = at(&socket, "/result/outcome") == "skipped";
        assert!(!is_left || pid == spins.pid().to_string(), "{socket}");
    }
    assert_eq!(at(&ran.json(), "/summary/closed"), "6");
    assert_eq!(with_reason(&ran.sockets(), "owner-spins"), 4);
    // Without the watch, all are closed.
    let ran = cwkill(&lab, "--all --min-idle 0s --json --allow-spin")?.exits(0);
    assert_eq!(at(&ran.json(), "/summary/closed"), "4");
    Ok(())
}

/// What the common runtimes do to pause does not make them spin, and does not keep cwkill from closing.
fn pauses(runtime: Runtime) -> Result<()> {
    for method in ["shutdown", "destroy"] {
        let lab = Lab::new()?;
        let server = Paused::start(lab.app_host(), runtime)?;
        let _peers = server.half_closed(lab.app_host(), 5)?;
        let line = format!(
            "--pid {} --method {method} --min-idle 0s --json",
            server.pid()
        );
        let ran = cwkill(&lab, &line)?.exits(0);
        assert_eq!(at(&ran.json(), "/summary/closed"), "5", "{ran:?}");
        assert_eq!(at(&ran.json(), "/spinning"), "[]", "{ran:?}");
        let before = server.processor_time()?;
        let until = Instant::now() + Duration::from_secs(1);
        while Instant::now() < until {
            std::thread::sleep(Duration::from_millis(10));
        }
        let used = server.processor_time()? - before;
        assert!(used < Duration::from_millis(100), "{used:?}");
    }
    Ok(())
}

fn node_pauses() -> Result<()> {
    pauses(Runtime::Node)
}

fn asyncio_pauses() -> Result<()> {
    pauses(Runtime::Python)
}

fn java_pauses() -> Result<()> {
    pauses(Runtime::Java)
}

fn go_pauses() -> Result<()> {
    pauses(Runtime::Go)
}
