//! The age and the idle time of a socket, and what cwkill leaves alone because of them.

use anyhow::{Context, Result};
use netns_harness::{Family, Lab, TcpState};

use crate::support::{PATIENCE, alone, as_typed, at, cwkill, in_state, lab};
use crate::trial::{Test, each_family, once};

pub const TESTS: &[Test] = &[
    each_family!(a_connection_in_use_is_left_alone),
    once!(a_connection_in_use_is_closed_on_request),
    each_family!(an_idle_open_connection_is_closed_by_its_idle_time),
];

/// Waits until this many sockets have been idle for `time`.
fn idle(lab: &Lab, time: &str, count: usize) -> Result<()> {
    lab.wait_for(PATIENCE, || {
        let line = format!("-n --json --min-idle {time}");
        Ok(cwkill(lab, &line)?.sockets().len() == count)
    })
}

/// Beside a leak, which is closed.
fn a_connection_in_use_is_left_alone(family: Family) -> Result<()> {
    let (lab, _half_closed) = lab("half-closed", family, 2)?;
    let listed = as_typed(&lab, "")?.exits(0);
    let marked = listed
        .stdout
        .lines()
        .filter(|line| line.contains("ms in use "));
    assert!(marked.count() > 0, "{listed:?}");
    for line in ["--all", "--all --no-owners --method destroy", "-n"] {
        let ran = as_typed(&lab, line)?.exits(1);
        assert!(
            ran.stdout
                .contains("2 in use and left alone (--min-idle): data moved in the last 5s"),
            "{ran:?}"
        );
        let json = as_typed(&lab, &format!("{line} --json"))?.exits(1).json();
        assert_eq!(at(&json, "/summary/in_use"), "2");
        assert_eq!(at(&json, "/summary/matched"), "0");
    }
    let _leak = lab.start("drained", family, alone(9000, 3))?;
    idle(&lab, "5s", 3)?;
    let json = as_typed(&lab, "--all --json")?.exits(0).json();
    let summary = json["summary"].as_object().context("no summary")?;
    assert_eq!(summary["closed"], 3);
    assert_eq!(summary["in_use"], 2);
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 2);
    Ok(())
}

fn a_connection_in_use_is_closed_on_request() -> Result<()> {
    let (lab, _half_closed) = lab("half-closed", Family::V4, 1)?;
    let sockets = cwkill(&lab, "--all --min-idle 0s --json")?.sockets();
    assert_eq!(at(&sockets[0], "/result/method"), "shutdown");
    assert_eq!(at(&sockets[0], "/in_use"), "true");
    Ok(())
}

fn an_idle_open_connection_is_closed_by_its_idle_time(family: Family) -> Result<()> {
    let (lab, _leak) = lab("established", family, 2)?;
    let line = "--state established --min-idle 1s --json";
    lab.wait_for(PATIENCE, || {
        Ok(cwkill(&lab, &format!("-n {line}"))?.sockets().len() == 2)
    })?;
    cwkill(&lab, line)?.exits(0);
    assert_eq!(in_state(&lab, TcpState::Established)?, 0);
    Ok(())
}
