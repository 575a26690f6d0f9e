//! `--no-owners --method destroy`: cwkill destroys sockets while it still receives the list. Apart from that, the run is
//! like any other.

use std::collections::BTreeMap;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser as _;
use cwkill::cli::Cli;
use cwkill::commands::close;
use cwkill::config::Config;
use cwkill::control::Control;
use cwkill::finder;
use cwkill::history::History;
use cwkill::model::{Method, Target};
use cwkill::privileges::Privileges;
use cwkill::proc::ProcFs;
use cwkill::report::{self, ExitStatus, Run};
use netns_harness::{Family, Lab, TcpState};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::races::Now;
use crate::support::{
    CWKILL, PATIENCE, Ran, TAKE_ALL, all_have, alone, at, carries_data, connections, count, cwkill,
    in_state, lab, ran, skip_reason,
};
use crate::trial::{Test, each_family, once};

pub const TESTS: &[Test] = &[
    each_family!(a_sweep_ends_like_an_ordinary_run).slow(),
    each_family!(thousands_are_destroyed_and_bystanders_live),
    each_family!(only_selected_sockets_are_destroyed),
    once!(many_old_sockets_are_swept),
    once!(few_or_young_sockets_are_not_swept),
    once!(sockets_that_need_a_second_look_are_not_swept),
    once!(a_half_swept_run_is_reported),
    once!(an_unknown_interface_destroys_nothing),
    once!(young_sockets_are_left),
    once!(without_privileges_nothing_is_destroyed),
    once!(a_limit_takes_the_oldest_first),
    once!(a_logged_sweep_records_its_intents_first),
    once!(an_interrupted_sweep_is_reported_per_socket).slow(),
];

const SWEEP: &str = "--no-owners --method destroy --json";
/// Matches every socket of a scenario.
const STUCK: &str = "sport = :8080";
/// A limit closes the oldest first, so all sockets are found before the first is destroyed.
const NO_SWEEP: &str = "--no-owners --method destroy --json --max-kills 100000";

/// Most attempts to hit a moment that a busy machine may miss.
const TRIES: usize = 10;

/// Waits until all stuck sockets are old enough to be swept.
fn aged(lab: &Lab) -> Result<()> {
    let stuck = in_state(lab, TcpState::CloseWait)?;
    lab.wait_for(PATIENCE, || {
        let aged = cwkill(lab, "--all --dry-run --min-age 1s --no-owners --jsonl")?;
        Ok(aged.stdout.lines().count() == stuck)
    })
}

/// The configuration of a sweep of the sockets that `expression` matches.
fn config(expression: &str) -> Result<Config> {
    config_with(&TAKE_ALL, expression)
}

fn config_with(idle: &[&str], expression: &str) -> Result<Config> {
    let words = ["cwkill"].into_iter().chain(SWEEP.split(' '));
    let words = words.chain(idle.iter().copied()).chain([expression]);
    Ok(Config::from_args(Cli::try_parse_from(words)?.args)?)
}

/// What a sweep of the leaking host has destroyed.
fn sweep(lab: &Lab, control: &dyn Control) -> Result<Vec<Target>> {
    sweep_with(lab, &TAKE_ALL, control)
}

fn sweep_with(lab: &Lab, idle: &[&str], control: &dyn Control) -> Result<Vec<Target>> {
    lab.app_host().within(|| {
        let config = config_with(idle, STUCK)?;
        let privileges = Privileges::of_this_thread()?;
        let namespaces =
            finder::open_namespaces(&config.netns, &config.selectors, &ProcFs::default())?;
        Ok(close::sweep_if_possible(
            &config,
            &namespaces,
            &History::none(),
            &privileges,
            control,
        ))
    })
}

/// The stuck sockets of the leaking host.
fn left(lab: &Lab) -> Result<Vec<Target>> {
    lab.app_host().within(|| {
        let config = config(STUCK)?;
        let namespaces =
            finder::open_namespaces(&config.netns, &config.selectors, &ProcFs::default())?;
        let scan = finder::find_sockets(&namespaces, &config.selectors, &History::none(), true)?;
        Ok(scan.targets)
    })
}

/// Cancels the run after the first act.
#[derive(Default)]
struct Impatient(AtomicBool);

impl Control for Impatient {
    fn now(&self) -> Instant {
        Instant::now()
    }
    fn sleep(&self, duration: Duration) {
        std::thread::sleep(duration);
    }
    fn interrupted(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
    fn progress(&self, _: Method, _: usize) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn many_old_sockets_are_swept() -> Result<()> {
    // Sockets whose rows a busy machine reads too late are not swept.
    for _ in 0..TRIES {
        let (lab, _leak) = lab("drained", Family::V4, 2000)?;
        aged(&lab)?;
        let swept = sweep(&lab, &Now)?.len();
        let left = left(&lab)?.len();
        assert_eq!(swept + left, 2000);
        assert_eq!(in_state(&lab, TcpState::CloseWait)?, left);
        if swept > 100 {
            return Ok(());
        }
    }
    panic!("in {TRIES} attempts nothing was swept");
}

fn few_or_young_sockets_are_not_swept() -> Result<()> {
    let (few, _leak) = lab("drained", Family::V4, 400)?;
    aged(&few)?;
    let (young, _others) = lab("drained", Family::V4, 1000)?;
    for (lab, sockets) in [(&young, 1000), (&few, 400)] {
        let swept = sweep(lab, &Now)?.len();
        let left = left(lab)?;
        let oldest = left.iter().filter_map(|target| target.socket.age).max();
        // The first sockets may already be old when the last are made.
        let fair = oldest.is_some_and(|age| age < Duration::from_secs(1)) || sockets == 400;
        assert!(swept == 0 || !fair, "{swept} of {sockets}");
        assert_eq!(swept + left.len(), sockets);
    }
    Ok(())
}

/// Their owner may still read.
fn sockets_that_need_a_second_look_are_not_swept() -> Result<()> {
    let (lab, _leak) = lab("unread", Family::V4, 1000)?;
    aged(&lab)?;
    let idle = &["--min-idle", "1s"];
    assert_eq!(sweep_with(&lab, idle, &Now)?.len(), 0);
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 1000);

    let ran = cwkill(&lab, &format!("--all {SWEEP} --min-idle 1s"))?.exits(0);
    assert_eq!(ran.json()["summary"]["closed"], 1000);
    Ok(())
}

fn a_half_swept_run_is_reported() -> Result<()> {
    for _ in 0..TRIES {
        let (lab, _leak) = lab("drained", Family::V4, 2000)?;
        aged(&lab)?;
        let swept = sweep(&lab, &Impatient::default())?;
        // Sockets whose rows a busy machine reads too late are not swept.
        if !swept.is_empty() {
            return half_swept(&lab, swept);
        }
    }
    panic!("in {TRIES} attempts nothing was swept");
}

/// A run that has destroyed the sockets `swept`, and cannot list the others.
fn half_swept(lab: &Lab, swept: Vec<Target>) -> Result<()> {
    let destroyed = swept.len();
    assert!(destroyed < 500, "{destroyed} of 2000");
    assert_eq!(destroyed + left(lab)?.len(), 2000);
    let mut run = lab.app_host().within(|| {
        let config = config("dev nosuch9")?;
        let privileges = Privileges::of_this_thread()?;
        let proc = ProcFs::default();
        let namespaces = finder::open_namespaces(&config.netns, &config.selectors, &proc)?;
        let scan = close::find_and_plan(
            &config,
            &namespaces,
            &History::none(),
            swept,
            &privileges,
            &proc,
            &Now,
        )?;
        let mut run = Run::new(scan);
        close::close(&mut run, &config, config.rules(&privileges), &proc, &Now);
        Ok(run)
    })?;
    assert_eq!(run.scan.targets.len(), destroyed);
    assert_eq!(report::exit_status(&run), ExitStatus::NotAllClosed);
    let notes = report::notes::notes(&run).join("\n");
    let unlisted = "could not be listed (cannot apply the expression";
    assert!(notes.contains(unlisted), "{notes}");
    run.scan.coverage.relist_failure = None;
    assert_eq!(report::exit_status(&run), ExitStatus::Done);
    Ok(())
}

/// With an unknown interface, `not dev` must not match everything.
fn an_unknown_interface_destroys_nothing() -> Result<()> {
    let (lab, _leak) = lab("drained", Family::V4, 600)?;
    let before = in_state(&lab, TcpState::CloseWait)?;
    aged(&lab)?;
    for place in ["", "--all-netns"] {
        let command = lab.app_host().command(CWKILL);
        let line = format!("{place} --port 8080 {SWEEP}");
        let command = command.args(line.split_whitespace());
        ran(command.args(["not dev nosuch9"]))?.exits(3);
        assert_eq!(in_state(&lab, TcpState::CloseWait)?, before);
    }
    Ok(())
}

/// The kinds of sockets that a run reports, without numbers of bytes, and their counts.
fn kinds(ran: &Ran) -> Result<BTreeMap<String, usize>> {
    let mut counts = BTreeMap::new();
    for socket in ran.sockets() {
        let parts = ["/state", "/cause", "/plan", "/excluded", "/result"];
        let kind: Vec<String> = parts.iter().map(|part| at(&socket, part)).collect();
        let kind = kind.join(" ").replace(|c: char| c.is_ascii_digit(), "");
        *counts.entry(kind).or_default() += 1;
    }
    Ok(counts)
}

fn a_sweep_ends_like_an_ordinary_run(family: Family) -> Result<()> {
    let run = |arguments: &str, code| -> Result<_> {
        let lab = Lab::new()?;
        let _leaks = [
            lab.start("unread", family, count(400))?,
            lab.start("drained", family, count(400))?,
            lab.start("forked", family, alone(9001, 2))?,
            lab.start("sending", family, alone(9002, 2))?,
            lab.start("not-accepted", family, alone(9003, 3))?,
        ];
        let bystanders = lab.start("established", family, alone(9004, 3))?;
        aged(&lab)?;
        // Only an iterator adds to a record that the act was at one instant.
        let ran = cwkill(&lab, &format!("--all --bpf never {arguments}"))?.exits(code);
        carries_data(&bystanders)?;
        let left: BTreeMap<String, usize> =
            connections(&lab)?
                .iter()
                .fold(BTreeMap::new(), |mut left, row| {
                    *left.entry(format!("{:?}", row.state)).or_default() += 1;
                    left
                });
        let summary = at(&ran.json(), "/summary");
        Ok((kinds(&ran)?, summary, ran.stderr, left))
    };
    // Sockets with unsent bytes stay.
    let swept = run(SWEEP, 4)?;
    assert_eq!(swept, run(NO_SWEEP, 4)?);
    assert_eq!(swept.0.values().sum::<usize>(), 807);
    let discarding = format!("{SWEEP} --discard-unsent");
    let all = run(&discarding, 0)?;
    assert_eq!(all, run(&format!("{NO_SWEEP} --discard-unsent"), 0)?);
    assert_eq!(all.3, BTreeMap::from([("Established".to_owned(), 3)]));
    Ok(())
}

fn thousands_are_destroyed_and_bystanders_live(family: Family) -> Result<()> {
    let (lab, leak) = lab("drained", family, 4500)?;
    let bystanders = lab.start("established", family, alone(9090, 3))?;
    aged(&lab)?;
    let sockets = cwkill(&lab, &format!("--all {SWEEP}"))?.exits(0).sockets();
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
    aged(&lab)?;
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
        let ran = cwkill(&lab, &format!("{options} {SWEEP} {expression}"))?.exits(code);
        assert_eq!(ran.sockets().len(), closed);
        all_have(&ran.sockets(), "closed", "destroy");
        assert_eq!(in_state(&lab, TcpState::CloseWait)?, left);
    }
    Ok(())
}

fn young_sockets_are_left() -> Result<()> {
    let (lab, _leak) = lab("unread", Family::V4, 3)?;
    cwkill(&lab, &format!("--all --min-age 1h {SWEEP}"))?.exits(1);
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 3);
    Ok(())
}

fn without_privileges_nothing_is_destroyed() -> Result<()> {
    let (lab, _leak) = lab("unread", Family::V4, 3)?;
    let command = lab.app_host().command(CWKILL).capabilities(&[]);
    let ran = ran(command.args(format!("--all {SWEEP}").split_whitespace()))?
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
    let sockets = cwkill(&lab, &format!("--all {SWEEP} --max-kills 2"))?
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

fn a_logged_sweep_records_its_intents_first() -> Result<()> {
    let (lab, _leak) = lab("unread", Family::V4, 3)?;
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("log");
    let arguments = format!("--all {SWEEP} --log-file {}", path.display());
    cwkill(&lab, &arguments)?.exits(0);
    let records: Vec<Value> = std::fs::read_to_string(&path)?
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<_, _>>()?;
    let events: Vec<String> = records.iter().map(|record| at(record, "/event")).collect();
    let wanted = [
        "begin", "intent", "intent", "intent", "outcome", "outcome", "outcome", "end",
    ];
    assert_eq!(events, wanted.map(str::to_owned).to_vec());
    Ok(())
}

/// Enough sockets for a signal to arrive before all are destroyed.
const MANY: usize = 15_000;
fn an_interrupted_sweep_is_reported_per_socket() -> Result<()> {
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
    aged(&lab)?;
    let mut child = lab
        .app_host()
        .command(CWKILL)
        .args(format!("--all {SWEEP}").split_whitespace())
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
