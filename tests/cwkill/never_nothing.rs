//! No command says "nothing" where there is something: what was left out is counted, and what does not exist is named.

use std::process::Command;

use anyhow::{Context, Result};
use netns_harness::{AgentOptions, Family, Lab, TcpState};
use regex::Regex;

use crate::support::{
    CWKILL, Ran, all_have, as_typed, at, cwkill, cwkill_outside, in_state, lab, leaker, settled,
};
use crate::trial::{Need, Test, each_family, once};

pub const TESTS: &[Test] = &[
    each_family!(younger_sockets_are_counted),
    once!(younger_sockets_of_other_owners_are_not_counted),
    once!(sockets_in_use_are_counted_beside_younger_ones),
    once!(namespaces_that_were_not_looked_into_are_counted),
    once!(what_may_be_in_other_namespaces_has_a_bound).needs(Need::RootOfTheMachine),
    each_family!(a_pid_leads_to_the_namespace_of_its_process),
    once!(a_name_leads_to_the_namespaces_of_its_processes),
    once!(a_process_that_does_not_exist_is_named),
    once!(an_absent_process_beside_one_that_exists_is_named),
];

/// The last line on standard output.
#[track_caller]
fn last_line(ran: &Ran) -> &str {
    ran.stdout.lines().last().unwrap_or_default()
}

/// The commands that do not act.
const LOOKING: [&str; 3] = ["", "-n", "diagnose --sample 10ms"];

/// Runs cwkill in our own namespace.
fn outside(line: &str) -> Result<Ran> {
    let mut command = cwkill_outside();
    command.args(line.split_whitespace());
    Ran::of(line, command.output()?)
}

fn younger_sockets_are_counted(family: Family) -> Result<()> {
    let (lab, leak) = lab("unread", family, 3)?;
    let _waiting = lab.start("not-accepted", family, crate::support::alone(8001, 1))?;
    let text = "4 match but are younger than 10m";
    for command in LOOKING {
        let ran = cwkill(&lab, &format!("{command} --min-age 10m"))?.exits(1);
        assert!(ran.stdout.contains(text), "{ran:?}");
    }
    let line = last_line(&cwkill(&lab, "--min-age 10m")?).to_owned();
    assert!(
        line.starts_with(&format!("0 sockets stuck; {text}")),
        "{line}"
    );
    for line in ["--json --min-age 10m", "-n --json --min-age 10m"] {
        let document = cwkill(&lab, line)?.exits(1).json();
        assert_eq!(at(&document, "/summary/younger"), "4");
        assert_eq!(at(&document, "/summary/matched"), "0");
    }
    let document = cwkill(&lab, "diagnose --sample 10ms --json --min-age 10m")?.json();
    assert_eq!(at(&document, "/younger"), "4");
    let check = cwkill(&lab, "check -w 1 -c 2 --min-age 10m")?.exits(0);
    assert!(check.stdout.contains(&format!(", {text}")), "{check:?}");

    let acted = cwkill(&lab, "--port 8080 --min-age 10m")?.exits(1);
    let text = "3 match but are younger than 10m";
    let line = last_line(&acted);
    assert!(
        line.starts_with(&format!("0 sockets matched: 0 closed; {text}")),
        "{acted:?}"
    );
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 4);
    drop(leak);
    Ok(())
}

/// What other selectors leave out does not match.
fn younger_sockets_of_other_owners_are_not_counted() -> Result<()> {
    let (lab, leak) = lab("unread", Family::V4, 3)?;
    let _other = lab.start("unread", Family::V4, crate::support::alone(8001, 2))?;
    let younger = |selectors: &str| -> Result<String> {
        let document = cwkill(&lab, &format!("-n --json --min-age 1h {selectors}"))?.json();
        Ok(at(&document, "/summary/younger"))
    };
    assert_eq!(younger("")?, "5");
    assert_eq!(younger(&format!("--pid {}", leak.app().pid()))?, "3");
    assert_eq!(younger("--port 8001")?, "2");
    assert_eq!(younger("--cause drained")?, "0");
    assert_eq!(younger("--user 54321")?, "0");
    assert_eq!(younger("--no-owners --port 8080")?, "3");
    let all_ages = cwkill(&lab, "-n --json --min-age 0s")?.json();
    assert_eq!(at(&all_ages, "/summary/younger"), "0");
    Ok(())
}

fn sockets_in_use_are_counted_beside_younger_ones() -> Result<()> {
    let (lab, leak) = lab("drained", Family::V4, 2)?;
    settled(&lab, &leak)?;
    let ran = as_typed(&lab, "-n --min-idle 1h --json")?.exits(1);
    let summary = |pointer: &str| at(&ran.json(), pointer);
    assert_eq!(summary("/summary/in_use"), "2");
    assert_eq!(summary("/summary/younger"), "0");
    let diagnosed = as_typed(&lab, "diagnose --sample 10ms --min-idle 1h")?.exits(1);
    let text = "2 in use: data moved in the last 1h";
    assert!(diagnosed.stdout.contains(text), "{diagnosed:?}");
    let check = as_typed(&lab, "check -w 1 -c 2 --min-idle 1h")?.exits(0);
    assert!(check.stdout.contains(text), "{check:?}");
    // Too young and in use: counted once.
    let document = as_typed(&lab, "-n --min-idle 1h --min-age 1h --json")?.json();
    assert_eq!(at(&document, "/summary/younger"), "2");
    assert_eq!(at(&document, "/summary/in_use"), "0");
    Ok(())
}

/// At least the one that the tests run in is not that of the lab.
fn namespaces_that_were_not_looked_into_are_counted() -> Result<()> {
    let (lab, leak) = lab("unread", Family::V4, 2)?;
    let pid = leak.app().pid();
    let text = Regex::new("not looked into \\(--all-netns\\)(: at most [0-9]+ TCP sockets?)?")?;
    for command in LOOKING {
        let ran = cwkill(&lab, command)?.exits(0);
        assert!(text.is_match(&ran.stdout), "{ran:?}");
    }
    let check = cwkill(&lab, "check -w 5 -c 6")?.exits(0);
    assert!(check.stdout.contains("not looked into"), "{check:?}");
    let counted = |line: &str| -> Result<u64> {
        let document = cwkill(&lab, line)?.json();
        let count = &document["namespaces_not_looked_into"];
        count.as_u64().context("no number of namespaces")
    };
    assert!(counted("--json")? > 0);
    assert!(counted("--port 9 --json")? > 0);
    assert!(counted("diagnose --sample 10ms --json")? > 0);
    // The operator says where to look.
    assert_eq!(counted("-n --all-netns --port 9 --json")?, 0);
    assert_eq!(counted(&format!("-N {pid} --json"))?, 0);
    assert_eq!(counted(&format!("-n --pid {pid} --json"))?, 0);
    Ok(())
}

/// In a pid namespace with one process in each of two network namespaces, so that those of other tests are not in sight.
fn what_may_be_in_other_namespaces_has_a_bound() -> Result<()> {
    let (lab, _leak) = lab("unread", Family::V4, 2)?;
    let run = |sleeper: &str, cwkill: &str| -> Result<Ran> {
        let script = format!(
            "for mount in $(grep ' - nsfs ' /proc/self/mountinfo | cut -d' ' -f5); do umount $mount; done
            {sleeper} sleep 1000 &
            for _ in $(seq 1000); do grep -q sleep /proc/$!/comm && break; sleep 0.01; done
            {cwkill} {CWKILL}"
        );
        let output = lab
            .app_host()
            .command("unshare")
            .args([
                "--mount",
                "--pid",
                "--fork",
                "--kill-child",
                "--mount-proc",
                "sh",
                "-c",
                &script,
            ])
            .output()?;
        Ran::of(&script, output)
    };
    // The sockets of the lab: the listener, and those that are stuck.
    let ran = run("", "unshare --net")?.exits(1);
    assert_eq!(
        last_line(&ran),
        "0 sockets stuck; 1 network namespace not looked into (--all-netns): at most 3 TCP sockets"
    );
    let ran = run("unshare --net", "")?.exits(0);
    let end = "; 1 network namespace without TCP sockets not looked into";
    assert!(last_line(&ran).ends_with(end), "{ran:?}");
    Ok(())
}

fn a_pid_leads_to_the_namespace_of_its_process(family: Family) -> Result<()> {
    let (lab, leak) = lab("unread", family, 3)?;
    let waiting = lab.start("not-accepted", family, crate::support::alone(8001, 2))?;
    let bystanders = lab.start("established", family, crate::support::alone(8002, 2))?;
    let (pid, other) = (leak.app().pid(), waiting.app().pid());
    let inode = lab.app_host().netns_inode()?.to_string();
    let ran = outside(&format!("-n --min-idle 0s --json --pid {pid},{other}"))?.exits(0);
    assert_eq!(ran.sockets().len(), 5);
    for socket in ran.sockets() {
        assert_eq!(at(&socket, "/netns/inode"), inode);
    }
    let diagnosed = outside(&format!("diagnose --sample 10ms --json --pid {pid}"))?.exits(0);
    assert_eq!(at(&diagnosed.json(), "/processes/0/stuck"), "3");
    outside(&format!("check -w 2 -c 9 --pid {pid}"))?.exits(1);
    // A named namespace is the only one.
    outside(&format!(
        "-n --min-idle 0s -N /proc/self/ns/net --pid {pid}"
    ))?
    .exits(1);
    let acted = outside(&format!("--min-idle 0s --allow-spin --json --pid {pid}"))?.exits(0);
    all_have(&acted.sockets(), "closed", "shutdown");
    let acted = outside(&format!("--min-idle 0s --json --pid {other}"))?.exits(0);
    all_have(&acted.sockets(), "closed", "destroy");
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 0);
    crate::support::carries_data(&bystanders)
}

fn a_name_leads_to_the_namespaces_of_its_processes() -> Result<()> {
    let named = |comm: &str| AgentOptions {
        comm: comm.to_owned(),
        uid: None,
        capabilities: None,
    };
    let (first, second) = (Lab::new()?, Lab::new()?);
    let _one = leaker(&first, &named("never-first"))?;
    let _two = leaker(&second, &named("never-second"))?;
    for (selector, expected) in [
        ("never-first", 1),
        ("never-second", 1),
        ("never-first,never-second", 2),
        ("never-*", 2),
    ] {
        let line = format!("-n --min-idle 0s --json --process {selector}");
        assert_eq!(outside(&line)?.exits(0).sockets().len(), expected, "{line}");
    }
    let table = outside("--process never-* -n --min-idle 0s")?
        .exits(0)
        .stdout;
    assert!(table.starts_with("NETNS"), "{table}");
    Ok(())
}

/// The number of a process that has ended.
fn ended() -> Result<u32> {
    let mut child = Command::new("true").spawn()?;
    child.wait()?;
    Ok(child.id())
}

fn a_process_that_does_not_exist_is_named() -> Result<()> {
    let (lab, leak) = lab("unread", Family::V4, 2)?;
    // A test runs in a thread of its own.
    let thread = std::fs::read_link("/proc/thread-self")?;
    let thread = thread.file_name().context("a thread")?.to_string_lossy();
    let own = std::process::id();
    let pid = ended()?;
    let at_a_port = match u16::try_from(pid) {
        Ok(port) => format!("no process {pid}; for a port use --port {port}"),
        Err(_) => format!("no process {pid}"),
    };
    for (selector, text) in [
        (format!("--pid {pid}"), at_a_port.as_str()),
        (
            format!("--pid {thread}"),
            &format!("{thread} is a thread of process {own}: use --pid {own}"),
        ),
        (
            "--process nobody-is-this".into(),
            "no process has the name nobody-is-this",
        ),
        (
            "--process 4711".into(),
            "no process has the name 4711; for a process number use --pid 4711",
        ),
        (
            "--process nobody-has-this-name".into(),
            "keeps 15 bytes of a name: use --process 'nobody-has-this'",
        ),
        (
            "--unit nobody.service".into(),
            "no process is in the unit nobody.service",
        ),
        (
            "--cgroup /no/such".into(),
            "no process is in the cgroup /no/such",
        ),
        (
            format!("--pid {} --process nginx-not", leak.app().pid()),
            "no process has the name nginx-not",
        ),
    ] {
        for command in ["", "-n", "diagnose --sample 10ms", "reclaim", "reclaim -n"] {
            let line = format!("{command} {selector}");
            cwkill(&lab, &line)?.exits(1).complains(text);
        }
        let check = cwkill(&lab, &format!("check -w 1 -c 2 {selector}"))?.exits(0);
        assert!(check.stdout.contains(text), "{check:?}");
        for command in ["-n", "diagnose --sample 10ms", "reclaim"] {
            let document = cwkill(&lab, &format!("{command} --json {selector}"))?.json();
            let message = at(&document, "/absent_owners/0/message");
            assert!(message.contains(text), "{selector}: {message}");
        }
    }
    let line = format!("-n --pid {own} --process {}", leak.app().comm());
    cwkill(&lab, &line)?
        .exits(1)
        .complains("no process matches all of --pid");
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 2);
    Ok(())
}

fn an_absent_process_beside_one_that_exists_is_named() -> Result<()> {
    let (lab, leak) = lab("unread", Family::V4, 2)?;
    let (pid, gone) = (leak.app().pid(), ended()?);
    let ran = cwkill(&lab, &format!("--json --pid {pid},{gone}"))?.exits(0);
    let ran = ran.complains(&format!("no process {gone}"));
    assert_eq!(at(&ran.json(), "/absent_owners/0/selector"), "--pid");
    assert_eq!(at(&ran.json(), "/absent_owners/0/value"), gone.to_string());
    assert!(ran.json()["absent_owners"][1].is_null(), "{ran:?}");
    all_have(&ran.sockets(), "closed", "shutdown");
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 0);
    Ok(())
}
