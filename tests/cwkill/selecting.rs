//! Every selector, on real sockets that differ in the selected property.

use anyhow::{Context, Result};
use netns_harness::{Family, Lab, TcpState};

use crate::support::{CWKILL, Ran, alone, cwkill, in_state, lab, ran, selects};
use crate::trial::{Test, each_family, once};

pub const TESTS: &[Test] = &[
    once!(each_selector_matches_what_it_names),
    once!(the_age_is_a_lower_bound),
    each_family!(an_owner_in_another_pid_namespace_may_match),
];

fn each_selector_matches_what_it_names() -> Result<()> {
    let lab = Lab::new()?;
    let v4 = lab.start("unread", Family::V4, alone(8001, 1))?;
    let mapped = lab.start("drained", Family::Mapped, alone(8002, 2))?;
    let v6 = lab.start("unread", Family::V6, alone(8003, 4))?;
    let never = lab.start("not-accepted", Family::V6, alone(8004, 8))?;
    let pid = |leak: &netns_harness::Leak| leak.app().pid();
    let conn = v4.conns()[0];
    let v6_peer = v6.conns()[0].peer;
    let comm = v6.app().comm().to_owned();
    let glob = format!("{}*", &comm[..2]);
    // A selector, and the number of sockets that it matches.
    let cases = [
        (String::new(), 15),
        ("--all".into(), 15),
        ("--port 8001".into(), 1),
        ("--port 8001,8003".into(), 5),
        ("--port 8001-8003".into(), 7),
        ("--port 8001 --port 8002".into(), 3),
        ("--port 9999".into(), 0),
        (format!("--peer-port {}", conn.peer.port()), 1),
        (format!("--local {}", conn.local.ip()), 1),
        ("--local 10.78.0.0/16".into(), 3),
        ("--local ::ffff:10.78.0.0/112".into(), 3),
        (format!("--peer {}", v6_peer.ip()), 4),
        ("--peer fd78::/16".into(), 12),
        (format!("--pid {}", pid(&v4)), 1),
        (format!("-p {},{}", pid(&v4), pid(&mapped)), 3),
        (format!("-p {}", pid(&never)), 8),
        (format!("--process {comm}"), 15),
        (format!("--process {glob}"), 15),
        ("--process nothing-like-it".into(), 0),
        ("--user root".into(), 15),
        ("--user 0".into(), 15),
        ("--user 12345".into(), 0),
        ("--state close-wait".into(), 15),
        ("--state last-ack,CLOSING".into(), 0),
        ("--cause unread".into(), 5),
        ("--cause drained,not-accepted".into(), 10),
        ("--cause sending".into(), 0),
        ("-4".into(), 3),
        ("-6".into(), 12),
        ("--min-age 0s".into(), 15),
        ("--min-age 1h".into(), 0),
        ("--port 8001 --cause drained".into(), 0),
        (format!("--port 8003 -6 --process {glob} --cause unread"), 4),
    ];
    for (selector, expected) in cases {
        selects(&lab, &selector, expected)?;
    }
    Ok(())
}

/// A socket is never selected before it has been stuck for the minimum age.
fn the_age_is_a_lower_bound() -> Result<()> {
    let began = std::time::Instant::now();
    let (lab, _leak) = lab("drained", Family::V4, 1)?;
    let mut old = Vec::new();
    lab.wait_for(crate::support::PATIENCE, || {
        old = cwkill(&lab, "-n --min-age 500ms --json")?.sockets();
        Ok(!old.is_empty())
    })?;
    let longest = u64::try_from(began.elapsed().as_millis())?;
    let age = old[0]["age_ms"].as_u64().context("no age")?;
    assert!((500..=longest).contains(&age), "{age} of {longest} ms");
    Ok(())
}

/// As in a pod: the network namespace is shared, and /proc shows only the processes of the own pid namespace.
fn an_owner_in_another_pid_namespace_may_match(family: Family) -> Result<()> {
    let (lab, leak) = lab("drained", family, 3)?;
    let _waiting = lab.start("not-accepted", family, alone(8001, 2))?;
    let _orphans = lab.start("last-ack", family, alone(8002, 1))?;
    let beside = |line: &str| -> Result<Ran> {
        let unshare = "--pid --fork --kill-child --mount-proc";
        let command = lab.app_host().command("unshare");
        let command = command.args(unshare.split(' ')).arg(CWKILL);
        ran(command.args(line.split_whitespace()))
    };
    let pid = leak.app().pid();
    for selector in [
        "--process leaky-app".to_owned(),
        "--process no-such-name".into(),
        "--unit no-such-unit".into(),
        "--container no-such-container".into(),
        "--cgroup /no/such/cgroup".into(),
        // A number that no process of this pid namespace has.
        format!("--pid {pid}"),
    ] {
        for action in ["-n", ""] {
            let listed = beside(&format!("{action} {selector} --min-age 0s --json"))?
                .exits(4)
                .complains(
                    "5 more sockets may belong to the selected processes: /proc shows no owner",
                );
            assert_eq!(listed.json()["possible_matches"], serde_json::json!(5));
            assert!(listed.sockets().is_empty() && !listed.stderr.contains("hint:"));
        }
        let check = beside(&format!("check -w 4 -c 9 {selector}"))?.exits(3);
        assert!(check.stdout.contains("5 more may match"), "{check:?}");
        beside(&format!("check -w 5 -c 9 {selector}"))?.exits(0);
        beside(&format!("check -w 50% -c 80% {selector}"))?.exits(3);
        beside(&format!("diagnose --sample 50ms {selector}"))?.exits(4);
    }
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 5);
    // /proc shows the descriptors of this process, so they are not its sockets.
    beside("-n --pid 1")?.exits(1);
    beside("check -w 0 -c 2 --pid 1")?.exits(0);
    // Without a selector of owners everything is counted, but the limits of the owners are unknown.
    beside("check -w 4 -c 6")?.exits(1);
    beside("check --percent-of-limit -w 50 -c 80")?.exits(3);
    // All owners are visible to the others.
    selects(&lab, "--process no-such-name", 0)?;
    selects(&lab, "--process leaky-app", 5)?;
    Ok(())
}
