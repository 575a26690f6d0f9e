//! `--watch-refill`: new stuck sockets after an act are reported.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Stdio};

use anyhow::{Context, Result};
use netns_harness::{Family, How, Lab, Leak, TcpState};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::support::{CWKILL, PATIENCE, Ran, count, cwkill, in_state, lab, until_it_sleeps};
use crate::trial::{Test, each_family, once};

pub const TESTS: &[Test] = &[
    each_family!(new_sockets_are_counted_and_their_owner_named),
    once!(no_new_sockets_are_reported_as_none),
    once!(ctrl_c_ends_the_watch_and_not_the_report),
    once!(the_minimum_age_does_not_apply_to_new_sockets),
    once!(json_has_the_new_sockets),
];

/// A run that has written its report and watches.
struct Watching {
    child: Child,
    rest: BufReader<std::process::ChildStdout>,
}

impl Watching {
    fn start(lab: &Lab, line: &str) -> Result<Self> {
        let command = lab.app_host().command(CWKILL).args(line.split(' '));
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let mut rest = BufReader::new(child.stdout.take().context("no stdout")?);
        let mut summary = String::new();
        while !summary.contains("matched:") {
            summary.clear();
            assert!(rest.read_line(&mut summary)? > 0, "no summary");
        }
        // After the report, cwkill sleeps only in the watch, after its first scan.
        until_it_sleeps(lab, child.id())?;
        Ok(Watching { child, rest })
    }

    /// Interrupts it. Returns the last text and the exit status.
    fn end(mut self) -> Result<(String, Option<i32>)> {
        interrupt(&self.child)?;
        let mut text = String::new();
        self.rest.read_to_string(&mut text)?;
        Ok((text, self.child.wait()?.code()))
    }
}

fn interrupt(child: &Child) -> Result<()> {
    Ok(kill(Pid::from_raw(child.id().try_into()?), Signal::SIGINT)?)
}

/// Leaves all connections of `leak` in CLOSE-WAIT, and waits until `stuck` sockets are too old to be ones that are just
/// being closed.
fn get_stuck(lab: &Lab, leak: &Leak, stuck: usize) -> Result<()> {
    leak.peer().shutdown(&leak.peer_fds(), How::Write)?;
    lab.wait_for(PATIENCE, || {
        let sockets = cwkill(lab, "--json")?.sockets();
        let old = |socket: &&Value| socket["age_ms"].as_u64() > Some(100);
        Ok(sockets.iter().filter(old).count() == stuck)
    })
}

fn new_sockets_are_counted_and_their_owner_named(family: Family) -> Result<()> {
    let (lab, leak) = lab("unread", family, 4)?;
    let later = lab.start("established", family, count(3))?;
    let watching = Watching::start(&lab, "--port 8080 --watch-refill 5m")?;
    get_stuck(&lab, &later, 3)?;
    let (text, code) = watching.end()?;
    assert!(text.starts_with("3 new in "), "{text}");
    let whose = format!(" from leaky-app/{}, ", leak.app().pid());
    assert!(text.contains(&whose), "{text}");
    assert!(text.ends_with("a minute: the leak continues\n"), "{text}");
    // The new sockets do not change the exit status.
    assert_eq!(code, Some(0));
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 3);
    Ok(())
}

fn no_new_sockets_are_reported_as_none() -> Result<()> {
    let (lab, _leak) = lab("unread", Family::V4, 4)?;
    // Sockets that were skipped are not new.
    let ran = cwkill(&lab, "--all --max-kills 2 --watch-refill 300ms")?.exits(0);
    assert!(ran.stdout.contains("\nnone new in "), "{ran:?}");
    // cwkill watches even if there was nothing to close.
    let ran = cwkill(&lab, "--port 9 --watch-refill 300ms")?.exits(1);
    assert!(ran.stdout.contains("none new in"), "{ran:?}");
    Ok(())
}

fn ctrl_c_ends_the_watch_and_not_the_report() -> Result<()> {
    let (lab, _leak) = lab("unread", Family::V4, 2)?;
    let watching = Watching::start(&lab, "--all --watch-refill 5m")?;
    let (text, code) = watching.end()?;
    assert!(text.starts_with("none new in "), "{text}");
    assert_eq!(code, Some(0));
    Ok(())
}

fn the_minimum_age_does_not_apply_to_new_sockets() -> Result<()> {
    let (lab, _leak) = lab("unread", Family::V4, 2)?;
    let later = lab.start("established", Family::V4, count(2))?;
    let young = lab.start("unread", Family::V4, count(1))?;
    let line = "--port 8080 --min-age 1h --watch-refill 5m";
    let watching = Watching::start(&lab, line)?;
    get_stuck(&lab, &later, 5)?;
    let (text, code) = watching.end()?;
    // Sockets that were too young to be closed are not new.
    assert!(text.starts_with("2 new in "), "{text}");
    assert!(young.app().is_alive());
    assert_eq!(code, Some(1));
    Ok(())
}

fn json_has_the_new_sockets() -> Result<()> {
    let (lab, leak) = lab("unread", Family::V4, 2)?;
    let later = lab.start("established", Family::V4, count(3))?;
    let command = lab.app_host().command(CWKILL);
    let command = command.args([
        "--all",
        "--allow-spin",
        "--method=destroy",
        "--json",
        "--watch-refill=5m",
    ]);
    let child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    // `destroy` does not sleep, and there is no canary, so cwkill sleeps only in the watch.
    lab.wait_for(PATIENCE, || Ok(in_state(&lab, TcpState::CloseWait)? == 0))?;
    until_it_sleeps(&lab, child.id())?;
    get_stuck(&lab, &later, 3)?;
    interrupt(&child)?;
    let new_sockets = &Ran::of("cwkill", child.wait_with_output()?)?
        .exits(0)
        .json()["new_sockets"];
    assert_eq!(new_sockets["new"], json!(3));
    let by = json!([{"pid": leak.app().pid(), "comm": "leaky-app", "new": 3}]);
    assert_eq!(new_sockets["by_process"], by);
    let rate = new_sockets["per_minute"].as_f64().context("no rate")?;
    let seconds = new_sockets["seconds"].as_f64().context("no time")?;
    assert!((rate * seconds - 180.0).abs() < 0.1, "{new_sockets}");
    let ran = cwkill(&lab, "--all --json")?.exits(0);
    assert_eq!(ran.json()["new_sockets"], json!(null));
    Ok(())
}
