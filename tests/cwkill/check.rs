//! `cwkill check`: thresholds, as a monitoring system reads them.

use anyhow::{Context, Result};
use netns_harness::{Family, TcpState};

use crate::support::{CWKILL, Ran, alone, count, cwkill, in_state, lab, ran};
use crate::trial::{Test, each_family, once};

pub const TESTS: &[Test] = &[
    each_family!(a_threshold_alerts_above_its_value),
    once!(percent_is_of_the_limit_of_the_owner),
    once!(every_failure_is_status_unknown),
    once!(sockets_with_unknown_owners_are_not_ok),
    once!(check_never_acts),
];

/// The parts of the one line: the text before the bar, and the labels with their values behind it.
fn line(ran: &Ran) -> Result<(String, Vec<(String, String)>)> {
    let text = ran.stdout.strip_suffix('\n').context("no line")?;
    assert!(!text.contains('\n'), "more than a line: {ran:?}");
    let (text, performance) = text.split_once(" | ").context("no performance data")?;
    let pair = |word: &str| -> Result<(String, String)> {
        let (label, value) = word.split_once('=').context("no label=value")?;
        assert_eq!(value.matches(';').count(), 4);
        Ok((label.to_owned(), value.to_owned()))
    };
    let pairs = performance.split(' ').map(pair).collect::<Result<_>>()?;
    Ok((text.to_owned(), pairs))
}

fn a_threshold_alerts_above_its_value(family: Family) -> Result<()> {
    let (lab, leak) = lab("unread", family, 5)?;
    let _bystanders = lab.start("established", family, count(3))?;
    for (options, code, word) in [
        ("-w 5 -c 6", 0, "OK"),
        ("-w 4 -c 5", 1, "WARNING"),
        ("-w 4 -c 4", 2, "CRITICAL"),
        ("--warning 1 --critical 2", 2, "CRITICAL"),
        ("-w 4", 1, "WARNING"),
        ("-c 5", 0, "OK"),
        ("-c 0", 2, "CRITICAL"),
        ("-c 0 --port 9", 0, "OK"),
        ("-w 5: -c 4:", 0, "OK"),
        ("-w 6: -c 5:", 1, "WARNING"),
        ("-c 1:4", 2, "CRITICAL"),
        ("-c 5:5", 0, "OK"),
        ("-w @5:9 -c ~:9", 1, "WARNING"),
        ("-w @6:9 -c @0:4", 0, "OK"),
        ("-w 4 -t 60", 1, "WARNING"),
        ("-w 1 -c 2 --port 9", 0, "OK"),
        ("-w 1 -c 9 --port 8080 --cause unread", 1, "WARNING"),
        ("-w 1 -c 9 sport = :8080", 1, "WARNING"),
    ] {
        let ran = cwkill(&lab, &format!("check {options}"))?.exits(code);
        let (text, values) = line(&ran)?;
        assert!(text.starts_with(&format!("CWKILL {word}: ")), "{text}");
        assert!(ran.stderr.is_empty(), "{ran:?}");
        let stuck = if options.contains("--port 9") { 0 } else { 5 };
        let (label, value) = &values[0];
        assert_eq!(label.as_str(), "stuck");
        assert!(value.starts_with(&format!("{stuck};")), "{value}");
        if stuck > 0 {
            let whose = format!("5 in leaky-app/{}", leak.app().pid());
            assert!(text.contains(&whose), "{text}");
        }
    }
    let (_, values) = line(&cwkill(&lab, "check -w @6:7 -c ~:7")?)?;
    let wanted = [
        ("stuck", "5;@6:7;7;0;"),
        ("not_accepted", "0;;;0;"),
        ("unread", "5;;;0;"),
        ("drained", "0;;;0;"),
        ("sending", "0;;;0;"),
    ];
    let wanted: Vec<_> = wanted.map(|(l, v)| (l.to_owned(), v.to_owned())).into();
    assert_eq!(values, wanted);
    Ok(())
}

fn percent_is_of_the_limit_of_the_owner() -> Result<()> {
    let (lab, leak) = lab("drained", Family::V4, 10)?;
    let _roomy = lab.start("drained", Family::V4, alone(8081, 30))?;
    let pid = leak.app().pid();
    let line = format!("--pid {pid} --nofile=50:");
    ran(lab.app_host().command("prlimit").args(line.split(' ')))?.exits(0);
    for (options, code) in [
        ("-w 20% -c 90%", 0),
        ("-w 19% -c 90%", 1),
        ("-w 10% -c 19%", 2),
        ("-w 19 -c 90 --percent-of-limit", 1),
        ("-c 20%:90%", 0),
        ("-c 21%:90%", 2),
        // A number of sockets, and a percentage: two owners have 40.
        ("-w 39 -c 90%", 1),
        ("-w 19% -c 40", 1),
    ] {
        let ran = cwkill(&lab, &format!("check {options}"))?.exits(code);
        let whose = format!("leaky-app/{pid} has lost 10 of 50 descriptors");
        assert!(ran.stdout.contains(&whose), "{ran:?}");
        assert!(ran.stdout.contains(" | percent=20.0%;"), "{ran:?}");
    }
    // A closed socket leaves a dead descriptor, which still counts against the limit.
    cwkill(&lab, &format!("--pid {pid} --method destroy"))?.exits(0);
    for (selectors, code) in [
        (String::new(), 1),
        (format!("--pid {pid}"), 1),
        ("--port 8080".to_owned(), 1),
        ("--port 8081".to_owned(), 0),
        // How long a descriptor has been dead is not known.
        ("--min-age 1s --port 8080".to_owned(), 1),
    ] {
        let line = format!("check -w 19% -c 90% {selectors}");
        let ran = cwkill(&lab, &line)?.exits(code);
        let whose = format!("leaky-app/{pid} has lost 10 of 50 descriptors (10 of them dead)");
        assert_eq!(ran.stdout.contains(&whose), code == 1);
        assert_eq!(ran.stdout.contains(" | percent=20.0%;"), code == 1);
    }
    Ok(())
}

fn every_failure_is_status_unknown() -> Result<()> {
    let (lab, _leak) = lab("unread", Family::V4, 1)?;
    let is_unknown = |words: &str, named: &str| -> Result<()> {
        let ran = cwkill(&lab, words)?.exits(3);
        let text = ran.stdout.strip_suffix('\n').context("no line")?;
        let good = text.starts_with("CWKILL UNKNOWN: ") && text.contains(named);
        assert!(good && !text.contains('\n'), "{words}: {ran:?}");
        Ok(())
    };
    for (options, named) in [
        ("", "--warning"),
        ("-w -5 -c 1", "`-5`"),
        ("-w many -c 1", "many"),
        ("-w 20:10", "10:20"),
        ("-w 10:20%", "10%:20%"),
        ("-w -c 5", "`-c` is not a threshold"),
        ("-w 5 -c 4", "-w 4 -c 5"),
        ("-w 5% -c 4%", "-w 4% -c 5%"),
        ("-w 50 -c 101 --percent-of-limit", "-w 50% -c 80%"),
        ("-w 50% -c 100%", "-w 50% -c 80%"),
        ("-w 1 -t 0", "10 (seconds)"),
        ("-w 1 -t soon", "`soon`"),
        ("-w 1 -c 2 --port 80x", "80x"),
        ("-w 1 -c 2 --method destroy", "--method"),
        ("-w 1 -c 2 sport = :8O80", "column 9"),
        ("-w 1 -c 2 -N no-such-namespace", "no-such-namespace"),
        ("-w 1 -c 2 state close-wait --state close-wait", "--state"),
    ] {
        is_unknown(&format!("check {options}"), named)?;
    }
    // The command must come first.
    is_unknown("--port 1 check", "`cwkill check --port 1`")?;
    is_unknown(
        "--port 1 check -w 1 -c 2",
        "`cwkill check --port 1 -w 1 -c 2`",
    )?;
    // The version is no failure.
    for option in ["-V", "--version"] {
        let ran = cwkill(&lab, &format!("check {option}"))?.exits(0);
        assert!(ran.stdout.contains(env!("CARGO_PKG_VERSION")), "{ran:?}");
    }
    // The result cannot be written.
    let script = format!("{CWKILL} check -w 5 -c 6 >/dev/full");
    ran(lab.app_host().command("sh").args(["-c", &script]))?.exits(3);
    Ok(())
}

fn sockets_with_unknown_owners_are_not_ok() -> Result<()> {
    let (lab, _leak) = lab("unread", Family::V4, 3)?;
    let bare = |options: &str| {
        let command = lab.app_host().command(CWKILL).capabilities(&[]);
        ran(command.args(["check"]).args(options.split(' ')))
    };
    // The number of sockets does not depend on their owners.
    bare("-w 3 -c 5")?.exits(0);
    bare("-w 2 -c 5")?.exits(1);
    // With a selector by owner it does: three sockets may match.
    let ran = bare("-w 2 -c 5 --process leaky-app")?.exits(3);
    assert!(ran.stdout.contains("3 more may match"), "{ran:?}");
    bare("-w 3 -c 5 --process leaky-app")?.exits(0);
    // More of them would end this alert.
    bare("-c 1: --process leaky-app")?.exits(3);
    let ran = bare("-w 50% -c 80%")?.exits(3);
    let shown = ran
        .stdout
        .contains("the owners of 3 sockets could not be seen");
    assert!(shown, "{ran:?}");
    Ok(())
}

fn check_never_acts() -> Result<()> {
    let (lab, _leak) = lab("unread", Family::V4, 3)?;
    let before = lab.app_host().ss(&[])?;
    cwkill(&lab, "check -w 1 -c 1 --all --port 8080")?.exits(2);
    assert_eq!(lab.app_host().ss(&[])?, before);
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 3);
    Ok(())
}
