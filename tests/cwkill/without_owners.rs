//! `--no-owners --method destroy`: thousands of sockets, of which cwkill knows only what the kernel lists.

use std::process::Stdio;

use anyhow::{Context, Result};
use netns_harness::{Family, TcpState};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::support::{
    CWKILL, PATIENCE, Ran, all_have, alone, at, carries_data, connections, cwkill, in_state, lab,
    ran, skip_reason,
};
use crate::trial::{Test, each_family, once};

pub const TESTS: &[Test] = &[
    each_family!(thousands_are_destroyed_and_bystanders_live),
    each_family!(only_selected_sockets_are_destroyed),
    once!(an_unknown_interface_destroys_nothing),
    once!(without_privileges_nothing_is_destroyed),
    once!(a_limit_takes_the_oldest_first),
    once!(an_interrupted_run_is_reported_per_socket).slow(),
];

const DESTROY: &str = "--no-owners --method destroy --json";

/// Most attempts to hit a moment that a busy machine may miss.
const TRIES: usize = 10;

/// With an unknown interface, `not dev` must not match everything.
fn an_unknown_interface_destroys_nothing() -> Result<()> {
    let (lab, _leak) = lab("drained", Family::V4, 600)?;
    let before = in_state(&lab, TcpState::CloseWait)?;
    for place in ["", "--all-netns"] {
        let command = lab.app_host().command(CWKILL);
        let line = format!("{place} --port 8080 {DESTROY}");
        let command = command.args(line.split_whitespace());
        ran(command.args(["not dev nosuch9"]))?.exits(3);
        assert_eq!(in_state(&lab, TcpState::CloseWait)?, before);
    }
    Ok(())
}

fn thousands_are_destroyed_and_bystanders_live(family: Family) -> Result<()> {
    let (lab, leak) = lab("drained", family, 4500)?;
    let bystanders = lab.start("established", family, alone(9090, 3))?;
    let sockets = cwkill(&lab, &format!("--all {DESTROY}"))?
        .exits(0)
        .sockets();
    assert_eq!(sockets.len(), 4500);
    all_have(&sockets, "closed", "destroy");
    let ages: Vec<Option<u64>> = sockets.iter().map(|s| s["age_ms"].as_u64()).collect();
    // Ages within a second count as equal and sort by address, so that the order is the same in each run.
    let second_older = |one: &Option<u64>, next: &Option<u64>| one.map(|age| age + 1000) >= *next;
    assert!(
        ages.is_sorted_by(second_older),
        "not the oldest first: {ages:?}"
    );
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 0);
    assert!(leak.app().is_alive());
    carries_data(&bystanders)
}

fn only_selected_sockets_are_destroyed(family: Family) -> Result<()> {
    let (lab, _leak) = lab("unread", family, 600)?;
    let _other = lab.start("drained", family, alone(9090, 600))?;
    let peer_port = |row: &netns_harness::SsRow| row.peer.port();
    let rows = connections(&lab)?;
    let stuck = || {
        rows.iter()
            .filter(|row| row.state == TcpState::CloseWait && row.local.port() == 8080)
    };
    let some: Vec<String> = stuck()
        .take(7)
        .map(|row| peer_port(row).to_string())
        .collect();
    let some = some.join(",");
    for (selectors, closed, left) in [
        (format!("--port 8080 --peer-port {some}"), 7, 1193),
        ("--all --cause unread".to_owned(), 593, 600),
        ("--port 9091".to_owned(), 0, 600),
        ("sport = 9090".to_owned(), 600, 0),
    ] {
        // The expression comes last.
        let (options, expression) = match selectors.starts_with("--") {
            true => (selectors.as_str(), ""),
            false => ("", selectors.as_str()),
        };
        let code = i32::from(closed == 0);
        let ran = cwkill(&lab, &format!("{options} {DESTROY} {expression}"))?.exits(code);
        assert_eq!(ran.sockets().len(), closed);
        all_have(&ran.sockets(), "closed", "destroy");
        assert_eq!(in_state(&lab, TcpState::CloseWait)?, left);
    }
    Ok(())
}

fn without_privileges_nothing_is_destroyed() -> Result<()> {
    let (lab, _leak) = lab("unread", Family::V4, 3)?;
    let command = lab.app_host().command(CWKILL).capabilities(&[]);
    let ran = ran(command.args(format!("--all {DESTROY}").split_whitespace()))?
        .exits(4)
        .complains("destroy needs CAP_NET_ADMIN");
    assert_eq!(ran.sockets().len(), 3);
    all_have(&ran.sockets(), "skipped", "null");
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 3);
    Ok(())
}

fn a_limit_takes_the_oldest_first() -> Result<()> {
    let (lab, _leak) = lab("unread", Family::V4, 2)?;
    let mut old: Vec<String> = cwkill(&lab, "--json")?
        .sockets()
        .iter()
        .map(|socket| at(socket, "/cookie"))
        .collect();
    lab.wait_for(PATIENCE, || {
        let aged = cwkill(&lab, "--dry-run --min-age 200ms --jsonl")?;
        Ok(aged.stdout.lines().count() == 2)
    })?;
    let _younger = lab.start("drained", Family::V4, alone(9090, 100))?;
    let sockets = cwkill(&lab, &format!("--all {DESTROY} --max-kills 2"))?
        .exits(0)
        .sockets();
    let closed = sockets
        .iter()
        .filter(|socket| at(socket, "/result/outcome") == "closed");
    let mut closed: Vec<String> = closed.map(|socket| at(socket, "/cookie")).collect();
    closed.sort();
    old.sort();
    assert_eq!(closed, old);
    Ok(())
}

/// Enough sockets for a signal to arrive before all are destroyed.
const MANY: usize = 15_000;

fn an_interrupted_run_is_reported_per_socket() -> Result<()> {
    let in_the_middle = (0..TRIES).try_fold(false, |done, _| match done {
        true => Ok(true),
        false => interrupted_once(),
    })?;
    assert!(
        in_the_middle,
        "it was never in the middle in {TRIES} attempts"
    );
    Ok(())
}

/// Interrupts cwkill when the first sockets are gone. Returns whether others were left.
fn interrupted_once() -> Result<bool> {
    let (lab, _leak) = lab("drained", Family::V4, MANY)?;
    let mut child = lab
        .app_host()
        .command(CWKILL)
        .args(format!("--all {DESTROY}").split_whitespace())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let pid = Pid::from_raw(child.id().try_into()?);
    lab.app_host().within(|| {
        let before = in_use()?;
        while in_use()? > before.saturating_sub(64) && child.try_wait()?.is_none() {}
        Ok(kill(pid, Signal::SIGINT)?)
    })?;
    let ran = Ran::of("cwkill", child.wait_with_output()?)?;
    let sockets = ran.sockets();
    assert_eq!(sockets.len(), MANY);
    let outcome = |wanted: &str| {
        let all = sockets.iter();
        all.filter(|socket| at(socket, "/result/outcome") == wanted)
            .count()
    };
    let (closed, skipped) = (outcome("closed"), outcome("skipped"));
    assert_eq!(closed + skipped, MANY);
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, skipped);
    for socket in sockets.iter() {
        if at(socket, "/result/outcome") == "skipped" {
            assert_eq!(skip_reason(socket), "interrupted");
        }
    }
    Ok(skipped > 0)
}

/// The number of TCP sockets in use in this network namespace.
fn in_use() -> Result<usize> {
    let text = std::fs::read_to_string("/proc/thread-self/net/sockstat")?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("TCP: inuse "));
    let number = line.and_then(|line| line.split(' ').next());
    Ok(number.context("no line about TCP")?.parse()?)
}
