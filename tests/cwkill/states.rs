//! Sockets in states other than CLOSE-WAIT: which methods close them, and which requests are refused.

use anyhow::Result;
use netns_harness::{Family, TcpState};

use crate::support::{
    all_have, as_typed, at, carries_data, connections, cwkill, first_exclusion, in_state, lab,
    skip_reason,
};
use crate::trial::{Test, each_family, once};

pub const TESTS: &[Test] = &[
    each_family!(every_state_can_be_destroyed),
    each_family!(an_open_connection_needs_a_minimum_age),
    each_family!(a_listener_is_never_closed),
    once!(the_default_is_close_wait_only),
];

/// Scenario, the state it makes, and what `auto` plans for it.
const STATES: &[(&str, &str, &str)] = &[
    ("fin-wait-1", "fin-wait-1", "drained"),
    ("fin-wait-1-orphan", "fin-wait-1", "orphan"),
    ("fin-wait-2", "fin-wait-2", "drained"),
    ("last-ack", "last-ack", "orphan"),
    ("closing", "closing", "drained"),
    ("syn-recv", "syn-recv", "handshake"),
    ("time-wait", "time-wait", "orphan"),
];

fn every_state_can_be_destroyed(family: Family) -> Result<()> {
    for (scenario, state, cause) in STATES {
        let (lab, _leak) = lab(scenario, family, 2)?;
        let planned = cwkill(&lab, &format!("--state {state} -n --json"))?
            .exits(0)
            .sockets();
        assert_eq!(planned.len(), 2);
        for socket in &planned {
            assert_eq!(at(socket, "/state"), *state);
            assert_eq!(at(socket, "/cause"), *cause);
            assert_eq!(at(socket, "/plan/0"), "destroy");
            let reason = first_exclusion(socket);
            let said = reason.contains("shut down already") || reason.contains("never accepted");
            assert!(said, "{scenario}: {socket:#}");
        }
        let ran = cwkill(&lab, &format!("--all --state {state} --json"))?.exits(0);
        all_have(&ran.sockets(), "closed", "destroy");
        assert!(!ran.stderr.contains("backlog"), "{scenario}: {ran:?}");
        assert_eq!(connections(&lab)?.len(), 0);
        assert_eq!(in_state(&lab, TcpState::Listen)?, 1);
    }
    Ok(())
}

fn an_open_connection_needs_a_minimum_age(family: Family) -> Result<()> {
    let (lab, leak) = lab("established", family, 2)?;
    for arguments in [
        "--all --state established",
        "--all state established",
        "--all state connected",
    ] {
        cwkill(&lab, arguments)?.exits(2).complains("--min-idle 1h");
    }
    for arguments in [
        "--all --state established --active",
        "--all --state established --watch",
    ] {
        let ran = as_typed(&lab, arguments)?.exits(2);
        ran.complains("--peer 192.0.2.7");
    }
    let ran = cwkill(&lab, "--state established -n --json")?.exits(0);
    assert_eq!(ran.sockets()[0]["plan"], serde_json::json!([]));
    cwkill(&lab, "--all --state established --min-age 1h")?.exits(1);
    carries_data(&leak)?;
    lab.wait_for(crate::support::PATIENCE, || {
        let line = "--state established --min-age 200ms -n";
        Ok(cwkill(&lab, line)?.code == Some(0))
    })?;
    let ran = cwkill(
        &lab,
        "--all --state established --min-age 200ms --method destroy --json",
    )?;
    all_have(&ran.exits(0).sockets(), "closed", "destroy");
    assert_eq!(connections(&lab)?.len(), 0);
    Ok(())
}

fn a_listener_is_never_closed(family: Family) -> Result<()> {
    let (lab, leak) = lab("established", family, 1)?;
    let line = "--all --state listen --discard-unsent --json";
    let sockets = cwkill(&lab, line)?.exits(4).sockets();
    all_have(&sockets, "skipped", "null");
    assert!(skip_reason(&sockets[0]).contains("takes its service down"));
    assert_eq!(in_state(&lab, TcpState::Listen)?, 1);
    carries_data(&leak)
}

fn the_default_is_close_wait_only() -> Result<()> {
    for scenario in ["fin-wait-2", "time-wait", "syn-recv", "established"] {
        let (lab, _leak) = lab(scenario, Family::V4, 1)?;
        cwkill(&lab, "--all")?.exits(1);
        assert_eq!(connections(&lab)?.len(), 1);
    }
    Ok(())
}
