//! The policies of `cwkill daemon`: what they close and what they never touch, also over restarts and SIGKILL.
//!
//! A policy that acts waits for a minute or more, and nothing can make a socket older. So these tests take that minute, too.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use netns_harness::{Family, Lab, TcpState};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::at_one_instant::walkers;
use crate::daemon::{Daemon, Place};
use crate::support::{CWKILL, PATIENCE, alone, as_typed, at, count, in_state, lab, ran};
use crate::trial::{Need, Test, once};

pub const TESTS: &[Test] = &[
    once!(a_policy_in_observe_mode_says_what_it_would_close),
    once!(no_policy_acts_if_the_command_line_forbids_it),
    once!(a_policy_acts_within_its_budgets_and_never_on_a_protected_port).slow(),
    once!(a_leak_that_refills_opens_the_breaker).slow(),
    once!(an_owner_that_ends_after_an_act_opens_the_breaker).slow(),
    once!(a_killed_daemon_acts_on_nothing_twice).slow(),
    once!(policies_that_wait_for_a_minute_side_by_side).slow(),
    once!(a_single_sweep_leaves_the_policies_to_the_daemon_that_runs),
    once!(a_policy_whose_sockets_cannot_be_listed_cannot_act),
    once!(who_does_not_act_leaves_the_orders_to_reset_to_the_next_daemon),
    once!(a_policy_that_observes_follows_its_owners_as_one_that_acts),
    once!(only_a_policy_that_destroys_loads_the_program_for_it).needs(Need::Iterator),
    once!(a_damaged_state_file_keeps_the_policies_from_acting),
    once!(a_breaker_of_an_unknown_policy_cannot_be_reset),
];

/// The port of the scenarios that have no other.
const PORT: u16 = 8080;

/// CAP_NET_ADMIN and CAP_NET_RAW.
const CAN_ACT: u64 = 1 << 12 | 1 << 13;

/// CAP_NET_ADMIN and CAP_SYS_ADMIN.
const CAN_FOLLOW: u64 = 1 << 12 | 1 << 21;

/// A policy that acts on everything that is a minute old, with these further lines.
fn acting(lines: &str) -> String {
    format!(
        "\n[[policy]]\nname = \"all\"\nmode = \"act\"\nexpires = 2100-01-01\nmatch = {{ all = true }}\nmin_age = \"1m\"\n\
         share = \"100%\"\n{lines}\n"
    )
}

/// The configuration of a daemon of `place`, with a log.
fn configure(place: &Place, more: &str) -> Result<()> {
    place.configure(&format!(
        "listen = \"unix:{}\"\nlog_file = \"{}\"\n{more}",
        place.path("socket"),
        place.path("acts.jsonl")
    ))
}

/// Waits until this many sockets are over a minute old.
fn wait_for_age(lab: &Lab, sockets: usize) -> Result<()> {
    lab.wait_for(2 * PATIENCE, || {
        let listed = as_typed(lab, "--min-age 61s --json")?;
        let listed: Value = serde_json::from_str(&listed.stdout)?;
        Ok(at(&listed, "/summary/matched") == sockets.to_string())
    })
}

/// The records of the log.
fn records(place: &Place) -> Result<Vec<Value>> {
    let text = match std::fs::read_to_string(place.path("acts.jsonl")) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
        other => other?,
    };
    // A daemon that was killed may have written half of a line.
    Ok(text
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect())
}

/// The records of this event.
fn events(place: &Place, event: &str) -> Result<Vec<Value>> {
    let mut records = records(place)?;
    records.retain(|record| at(record, "/event") == event);
    Ok(records)
}

/// How often a value occurs in the records.
fn counts(records: &[Value], pointer: &str) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for record in records {
        *counts.entry(at(record, pointer)).or_default() += 1;
    }
    counts
}

fn a_policy_in_observe_mode_says_what_it_would_close() -> Result<()> {
    let (lab, _leak) = lab("drained", Family::V4, 3)?;
    let place = Place::new()?;
    let policy = |port: u16| {
        format!(
            "\n[[policy]]\nname = \"web\"\nmatch = {{ port = {port} }}\nmin_idle = \"0s\"\nshare = \"100%\"\n\
             kills_per_sweep = 2\n"
        )
    };
    configure(&place, &policy(PORT))?;
    let mut daemon = Daemon::start(&lab, &place)?;
    daemon.wait_until("the policy says what it would do", |daemon| {
        Ok(daemon.said().contains(
            "policy web: would close 2 sockets of 3, but it only observes; left alone: 1 policy-sweep-budget",
        ))
    })?;
    daemon.wait_for_sweeps(3.0)?;
    let metrics = daemon.get("/metrics")?.body;
    for series in [
        "cwkill_policy_selected_sockets{policy=\"web\"} 3",
        "cwkill_policy_chosen_sockets{policy=\"web\"} 2",
        "cwkill_policy_held{policy=\"web\",reason=\"observe-mode\"} 1",
    ] {
        assert!(metrics.lines().any(|line| line == series), "{metrics}");
    }
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 3);
    assert!(records(&place)?.is_empty());
    configure(&place, &policy(PORT + 1))?;
    daemon.signal(Signal::SIGHUP)?;
    daemon.wait_until("the other policy selects nothing", |daemon| {
        let said = daemon.said();
        Ok(said.contains("policy web: would close 0 sockets of 0, but it only observes"))
    })?;
    configure(&place, &policy(PORT))?;
    let said = ran(place.command(&lab, "--check-config"))?.exits(0).stdout;
    for part in [
        "now it selects 3 sockets, of which 3 are old and idle enough",
        "policy web (",
        "observes, and closes nothing",
    ] {
        assert!(said.contains(part), "{said}");
    }
    Ok(())
}

/// Also after a reload, and without the privileges for an act.
fn no_policy_acts_if_the_command_line_forbids_it() -> Result<()> {
    let (lab, _leak) = lab("drained", Family::V4, 3)?;
    let place = Place::new()?;
    configure(&place, &acting(""))?;
    let mut daemon = Daemon::start_with(&lab, &place, "--observe")?;
    let is_held = |daemon: &mut Daemon<'_>| {
        daemon.wait_until("its policy is held", |daemon| {
            let held = "cwkill_policy_held{policy=\"all\",reason=\"observe-mode\"} 1";
            Ok(daemon
                .get("/metrics")?
                .body
                .lines()
                .any(|line| line == held))
        })
    };
    is_held(&mut daemon)?;
    let kept = "nothing is closed (--observe keeps policy all from acting)";
    assert!(daemon.said().contains(kept), "{}", daemon.said());
    assert_eq!(daemon.effective_capabilities()? & CAN_ACT, 0);
    configure(&place, &acting("kills_per_hour = 7"))?;
    daemon.signal(Signal::SIGHUP)?;
    daemon.wait_until("it has read the configuration again", |daemon| {
        Ok(daemon.said().matches(kept).count() == 2)
    })?;
    is_held(&mut daemon)?;
    let said = ran(place.command(&lab, "--check-config --observe"))?
        .exits(0)
        .stdout;
    assert!(
        said.contains("--observe keeps policy all from acting"),
        "{said}"
    );
    daemon.end(Signal::SIGTERM)?;
    let mut acts = Daemon::start(&lab, &place)?;
    assert_eq!(acts.effective_capabilities()? & CAN_ACT, CAN_ACT);
    acts.end(Signal::SIGTERM)?;
    Ok(())
}

/// Only if it has a list of its own. Then the daemon keeps the privileges for it from its start on.
fn a_policy_that_observes_follows_its_owners_as_one_that_acts() -> Result<()> {
    let (here, _leak) = lab("drained", Family::V4, 1)?;
    let (_there, leak) = lab("drained", Family::V4, 3)?;
    let place = Place::new()?;
    let policy = |more: &str| {
        let pid = leak.app().pid();
        format!(
            "\n[[policy]]\nname = \"web\"\nmatch = {{ pid = {pid}{more} }}\nmin_idle = \"0s\"\nshare = \"100%\"\n"
        )
    };
    let expression = format!(", expression = \"sport = :{PORT}\"");
    configure(&place, &policy(""))?;
    let mut daemon = Daemon::start(&here, &place)?;
    daemon.wait_until("it looks only here", |daemon| {
        Ok(daemon.said().contains("would close 0 sockets of 0"))
    })?;
    assert_eq!(daemon.effective_capabilities()? & CAN_FOLLOW, 0);
    configure(&place, &policy(&expression))?;
    daemon.signal(Signal::SIGHUP)?;
    daemon.wait_until("it refuses what it has no privileges for", |daemon| {
        let said = daemon.said();
        Ok(said.contains("a first policy with owners and an expression"))
    })?;
    daemon.end(Signal::SIGTERM)?;
    let mut daemon = Daemon::start(&here, &place)?;
    daemon.wait_until("it looks there", |daemon| {
        Ok(daemon.said().contains("would close 3 sockets of 3"))
    })?;
    assert_eq!(daemon.effective_capabilities()? & CAN_FOLLOW, CAN_FOLLOW);
    daemon.end(Signal::SIGTERM)?;
    Ok(())
}

/// The program comes with processes that make its walks.
fn only_a_policy_that_destroys_loads_the_program_for_it() -> Result<()> {
    let (lab, _leak) = lab("drained", Family::V4, 1)?;
    let place = Place::new()?;
    for (method, has_walkers) in [("shutdown", false), ("destroy", true)] {
        configure(&place, &acting(&format!("methods = [\"{method}\"]")))?;
        let mut daemon = Daemon::start_with(&lab, &place, "--bpf always")?;
        assert_eq!(walkers(&lab)? > 0, has_walkers, "{method}");
        daemon.end(Signal::SIGTERM)?;
        lab.wait_for(PATIENCE, || Ok(walkers(&lab)? == 0))?;
    }
    Ok(())
}

fn a_policy_acts_within_its_budgets_and_never_on_a_protected_port() -> Result<()> {
    let (lab, _leak) = lab("drained", Family::V4, 6)?;
    let _protected = lab.start("drained", Family::V4, alone(9090, 5))?;
    let place = Place::new()?;
    let config = format!(
        "[protect]\nports = [9090]\n{}",
        acting("kills_per_sweep = 2\nkills_per_hour = 3")
    );
    configure(&place, &config)?;
    wait_for_age(&lab, 11)?;
    let mut daemon = Daemon::start(&lab, &place)?;
    let left = |lab: &Lab| in_state(lab, TcpState::CloseWait);
    daemon.wait_until("its budget is used up", |daemon| {
        Ok(left(daemon.lab)? == 8 && daemon.said().contains("policy-hour-budget"))
    })?;
    daemon.wait_for_sweeps(3.0)?;
    assert_eq!(left(&lab)?, 8);
    let (code, _) = daemon.end(Signal::SIGTERM)?;
    assert_eq!(code, Some(0));
    // The budget is that of the hour, not of the daemon.
    let mut next = Daemon::start(&lab, &place)?;
    next.wait_for_sweeps(5.0)?;
    assert_eq!(left(&lab)?, 8);
    let (code, said) = next.end(Signal::SIGTERM)?;
    assert_eq!(code, Some(0));
    assert!(said.contains("5 protected"), "{said}");

    let intents = events(&place, "intent")?;
    assert_eq!(intents.len(), 3);
    assert!(counts(&intents, "/sweep").values().all(|count| *count <= 2));
    assert_eq!(counts(&intents, "/policy"), [("all".to_owned(), 3)].into());
    assert_eq!(
        counts(&intents, "/socket/local/port"),
        [(PORT.to_string(), 3)].into()
    );
    let outcomes = events(&place, "outcome")?;
    assert_eq!(
        counts(&outcomes, "/socket/result/outcome"),
        [("closed".to_owned(), 3)].into()
    );
    Ok(())
}

fn a_leak_that_refills_opens_the_breaker() -> Result<()> {
    /// So many that it opens even if a new leak sometimes comes too late for a sweep.
    const SOCKETS: usize = 40;
    let (lab, _leak) = lab("drained", Family::V4, SOCKETS)?;
    let place = Place::new()?;
    configure(&place, &acting("kills_per_sweep = 2"))?;
    wait_for_age(&lab, SOCKETS)?;
    let mut daemon = Daemon::start_with(&lab, &place, "--interval 3s")?;
    let mut leaks = Vec::new();
    let is_open = |daemon: &Daemon<'_>| {
        let said = daemon.said();
        said.contains("its circuit breaker opens: as many sockets come back as it closes")
    };
    while !is_open(&daemon) {
        let (before, port) = (2 * leaks.len(), 9100 + u16::try_from(leaks.len())?);
        ensure!(before < SOCKETS, "it never opened: {}", daemon.said());
        daemon.wait_until("it acts, or its breaker opens", |daemon| {
            Ok(events(&place, "outcome")?.len() > before || is_open(daemon))
        })?;
        leaks.push(lab.start("drained", Family::V4, alone(port, 2))?);
    }
    ensure!(leaks.len() >= 3, "three acts in a row, not {}", leaks.len());
    let before = events(&place, "intent")?.len();
    daemon.wait_for_sweeps(2.0)?;
    assert_eq!(events(&place, "intent")?.len(), before);
    let said = daemon.said();
    assert!(said.contains("but its circuit breaker is open"), "{said}");
    // Over a restart as well, until the operator closes it.
    daemon.end(Signal::SIGTERM)?;
    let mut next = Daemon::start(&lab, &place)?;
    next.wait_for_sweeps(5.0)?;
    assert_eq!(events(&place, "intent")?.len(), before);
    ran(place.command(&lab, "--reset all"))?.exits(0);
    next.wait_until("it acts again", |_| {
        Ok(events(&place, "intent")?.len() > before)
    })
}

fn an_owner_that_ends_after_an_act_opens_the_breaker() -> Result<()> {
    let (lab, leak) = lab("drained", Family::V4, 40)?;
    let _other = lab.start("drained", Family::V4, alone(9090, 3))?;
    let place = Place::new()?;
    configure(
        &place,
        &acting("kills_per_sweep = 1\nbreaker = { sweeps = 1000 }"),
    )?;
    wait_for_age(&lab, 43)?;
    let mut daemon = Daemon::start(&lab, &place)?;
    daemon.wait_until("it acts", |_| Ok(!events(&place, "outcome")?.is_empty()))?;
    leak.app().kill()?;
    daemon.wait_until("its breaker opens", |daemon| {
        let said = daemon.said();
        Ok(said.contains("its circuit breaker opens: an owner ended soon after an act"))
    })?;
    let before = events(&place, "intent")?.len();
    daemon.wait_for_sweeps(3.0)?;
    assert_eq!(events(&place, "intent")?.len(), before);
    Ok(())
}

fn a_killed_daemon_acts_on_nothing_twice() -> Result<()> {
    const SOCKETS: usize = 80;
    const KILLS_PER_HOUR: usize = 60;
    const POINTS: u64 = 50;
    let (lab, _leak) = lab("drained", Family::V4, SOCKETS)?;
    let place = Place::new()?;
    configure(
        &place,
        &acting(&format!(
            "kills_per_sweep = 3\nkills_per_hour = {KILLS_PER_HOUR}"
        )),
    )?;
    wait_for_age(&lab, SOCKETS)?;
    for point in 0..POINTS {
        let mut daemon = Daemon::start(&lab, &place)?;
        // Not a wait for a state: the kill is to come at any point of a sweep.
        std::thread::sleep(Duration::from_millis(point * 37 % 1500));
        daemon.end(Signal::SIGKILL)?;
    }
    let intents = events(&place, "intent")?;
    let by_cookie = counts(&intents, "/socket/cookie");
    assert!(by_cookie.values().all(|count| *count == 1), "{by_cookie:?}");
    assert!(counts(&intents, "/sweep").values().all(|count| *count <= 3));
    assert!(intents.len() <= KILLS_PER_HOUR, "{}", intents.len());
    let left = in_state(&lab, TcpState::CloseWait)?;
    assert!(left >= SOCKETS - KILLS_PER_HOUR, "{left} are left");
    // Otherwise nothing was tested.
    assert!(left < SOCKETS, "nothing was closed");
    Ok(())
}

/// Most of the time each of these waits for its sockets to become old.
fn policies_that_wait_for_a_minute_side_by_side() -> Result<()> {
    type Named = (&'static str, fn() -> Result<()>);
    let tests: [Named; 5] = [
        (
            "a signal in the middle of a batch",
            a_signal_in_the_middle_of_a_batch_ends_it_with_its_records,
        ),
        ("reclaim", a_policy_that_reclaims_frees_the_descriptors),
        (
            "another namespace",
            a_policy_acts_in_the_namespace_that_it_names,
        ),
        ("single sweeps", single_sweeps_carry_out_policies),
        (
            "a full disk",
            on_a_full_disk_nothing_is_closed_and_sweeps_go_on,
        ),
    ];
    std::thread::scope(|scope| {
        for (name, thread) in tests.map(|(name, test)| (name, scope.spawn(test))) {
            let ended = thread.join();
            ended
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
                .context(name)?;
        }
        Ok(())
    })
}

/// A daemon that shuts sockets down and waits for their silent peers.
fn a_signal_in_the_middle_of_a_batch_ends_it_with_its_records() -> Result<()> {
    const SOCKETS: usize = 20;
    let (lab, _leak) = lab("silent-peer", Family::V4, SOCKETS)?;
    let place = Place::new()?;
    configure(
        &place,
        &acting("methods = [\"shutdown\"]\nkills_per_hour = 100"),
    )?;
    wait_for_age(&lab, SOCKETS)?;
    let mut daemon = Daemon::start(&lab, &place)?;
    daemon.wait_until("it waits for the answer of a peer", |daemon| {
        Ok(in_state(daemon.lab, TcpState::LastAck)? > 0)
    })?;
    let (code, said) = daemon.end(Signal::SIGTERM)?;
    assert_eq!(code, Some(0), "{said}");
    let (intents, outcomes) = (events(&place, "intent")?, events(&place, "outcome")?);
    assert_eq!(intents.len(), SOCKETS);
    assert_eq!(
        counts(&intents, "/socket/cookie"),
        counts(&outcomes, "/socket/cookie")
    );
    // What was begun is recorded as begun, and what was not as left alone.
    let results = counts(&outcomes, "/socket/result/outcome");
    let closing = in_state(&lab, TcpState::LastAck)?;
    let result = |outcome: &str| results.get(outcome).copied().unwrap_or(0);
    assert_eq!(result("closing"), closing, "{results:?}");
    assert_eq!(closing + result("skipped"), SOCKETS, "{results:?}");
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, SOCKETS - closing);
    assert_eq!(events(&place, "end")?.len(), 1);
    // The batch is over, and what was left alone counts for no budget.
    let state = std::fs::read_to_string(place.path("policies.json"))?;
    let state: Value = serde_json::from_str(state.lines().next().unwrap_or_default())?;
    assert_eq!(at(&state, "/policies/all/acts/0/over"), "true", "{state}");
    assert_eq!(
        at(&state, "/policies/all/acts/0/count"),
        closing.to_string()
    );
    // The next daemon goes on with those.
    let mut next = Daemon::start(&lab, &place)?;
    next.wait_until("it acts on the others", |daemon| {
        Ok(in_state(daemon.lab, TcpState::CloseWait)? == 0)
    })
}

fn a_policy_that_reclaims_frees_the_descriptors() -> Result<()> {
    const SOCKETS: usize = 10;
    let (lab, leak) = lab("drained", Family::V4, SOCKETS)?;
    let _bystanders = lab.start("established", Family::V4, count(3))?;
    let place = Place::new()?;
    configure(
        &place,
        &acting(
            "methods = [\"destroy\"]\nreclaim = true\nkills_per_sweep = 1\nkills_per_hour = 100",
        ),
    )?;
    wait_for_age(&lab, SOCKETS)?;
    let descriptors = || -> Result<usize> {
        let table = std::fs::read_dir(format!("/proc/{}/fd", leak.app().pid()))?;
        Ok(table.count())
    };
    let before = descriptors()?;
    let mut daemon = Daemon::start(&lab, &place)?;
    daemon.wait_until("every socket is closed", |daemon| {
        Ok(in_state(daemon.lab, TcpState::CloseWait)? == 0
            && events(&place, "outcome")?.len() == SOCKETS)
    })?;
    let (_, said) = daemon.end(Signal::SIGTERM)?;
    let freed = counts(
        &events(&place, "outcome")?,
        "/socket/result/descriptors/0/outcome",
    );
    let freed = freed.get("freed").copied().unwrap_or(0);
    assert_eq!(descriptors()?, before - freed, "{said}");
    // A busy machine may stop a process for too long, which leaves its descriptor.
    assert!(freed > 0, "{said}");
    assert_eq!(in_state(&lab, TcpState::Established)?, 3);
    Ok(())
}

fn a_policy_acts_in_the_namespace_that_it_names() -> Result<()> {
    let (lab, _leak) = lab("drained", Family::V4, 3)?;
    let (other, leak) = crate::support::lab("drained", Family::V4, 2)?;
    let place = Place::new()?;
    let policy = acting("").replace(
        "all = true",
        &format!("all = true, netns = \"/proc/{}/ns/net\"", leak.app().pid()),
    );
    configure(&place, &policy)?;
    wait_for_age(&lab, 3)?;
    wait_for_age(&other, 2)?;
    let mut daemon = Daemon::start(&lab, &place)?;
    daemon.wait_until("the sockets there are closed", |_| {
        Ok(in_state(&other, TcpState::CloseWait)? == 0 && events(&place, "outcome")?.len() == 2)
    })?;
    daemon.wait_for_sweeps(3.0)?;
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 3, "not here");
    // It is observed and exported as every policy is.
    let metrics = daemon.get("/metrics")?.body;
    let series = "cwkill_policy_acts_total{policy=\"all\",result=\"closed\"} 2";
    assert!(metrics.lines().any(|line| line == series), "{metrics}");
    Ok(())
}

/// As from a timer. Only a policy that needs no earlier sweep of the same process can act.
fn single_sweeps_carry_out_policies() -> Result<()> {
    let (lab, _leak) = lab("drained", Family::V4, 4)?;
    let place = Place::new()?;
    wait_for_age(&lab, 4)?;
    let sweep = || ran(place.command(&lab, "--once"));
    let left = || in_state(&lab, TcpState::CloseWait);
    configure(&place, &acting("confirm = 2"))?;
    for _ in 0..3 {
        let ran = sweep()?.exits(0);
        assert!(ran.stdout.contains("4 sockets stuck"), "{ran:?}");
    }
    sweep()?.exits(0).complains("4 not-confirmed");
    assert_eq!(left()?, 4);
    configure(&place, &acting("confirm = 1\nkills_per_sweep = 3"))?;
    sweep()?.exits(0).complains("observes one sweep first");
    assert_eq!(left()?, 4);
    // What it lists was stuck before the acts.
    let ran = sweep()?.exits(0).complains("acted on 3 sockets of 4");
    assert!(ran.stdout.contains("4 sockets stuck"), "{ran:?}");
    assert_eq!(left()?, 1);
    assert_eq!(events(&place, "outcome")?.len(), 3);
    // What cannot be recorded is not done, and the status says so.
    let text = std::fs::read_to_string(place.path("policies.json"))?;
    std::fs::write(place.path("policies.json"), text.replace("version", "v"))?;
    sweep()?.exits(3).complains("the state file cannot be used");
    assert_eq!(left()?, 1);
    std::fs::write(place.path("policies.json"), text)?;
    sweep()?.exits(0);
    assert_eq!(left()?, 0);
    sweep()?.exits(1);
    Ok(())
}

/// No file can grow, as on a full disk.
fn on_a_full_disk_nothing_is_closed_and_sweeps_go_on() -> Result<()> {
    let (lab, _leak) = lab("drained", Family::V4, 2)?;
    let place = Place::new()?;
    configure(&place, &acting("confirm = 1"))?;
    wait_for_age(&lab, 2)?;
    let script = format!(
        "ulimit -f 0; exec {CWKILL} daemon --interval 20ms --config {}",
        place.path("daemon.toml")
    );
    let command = lab
        .app_host()
        .command("sh")
        .args(["-c", &script])
        .env("STATE_DIRECTORY", place.path(""));
    let mut daemon = Daemon::spawn(&lab, &place, command)?;
    daemon.wait_until("the policy says why it does not act", |daemon| {
        let said = daemon.said();
        Ok(
            said.contains("nothing was done, because the state cannot be written: File too large")
                && said.contains("but the state file cannot be written"),
        )
    })?;
    daemon.wait_for_sweeps(3.0)?;
    let metrics = daemon.get("/metrics")?.body;
    let series = "cwkill_policy_held{policy=\"all\",reason=\"state-unwritten\"} 1";
    assert!(metrics.lines().any(|line| line == series), "{metrics}");
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 2);
    // There is room again, but the log is no file.
    daemon.end(Signal::SIGKILL)?;
    std::fs::create_dir(place.path("acts.jsonl"))?;
    let mut next = Daemon::start(&lab, &place)?;
    next.wait_until("the policy says why it does not act", |daemon| {
        Ok(daemon
            .said()
            .contains("nothing was done, because the log cannot be written"))
    })?;
    next.wait_for_sweeps(3.0)?;
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 2);
    // What was not done counts for no budget.
    std::fs::remove_dir(place.path("acts.jsonl"))?;
    next.wait_until("it acts", |daemon| {
        Ok(in_state(daemon.lab, TcpState::CloseWait)? == 0)
    })
}

fn a_single_sweep_leaves_the_policies_to_the_daemon_that_runs() -> Result<()> {
    let (lab, _leak) = lab("drained", Family::V4, 1)?;
    let place = Place::new()?;
    configure(&place, &acting(""))?;
    let _daemon = Daemon::start(&lab, &place)?;
    let ran = ran(place.command(&lab, "--once"))?.exits(0).complains(
        "no policy is carried out: another cwkill daemon, or cwkill daemon --once, runs already",
    );
    assert!(ran.stdout.contains("1 socket stuck"), "{ran:?}");
    Ok(())
}

fn a_policy_whose_sockets_cannot_be_listed_cannot_act() -> Result<()> {
    let (lab, _leak) = lab("drained", Family::V4, 1)?;
    let place = Place::new()?;
    let policy = acting("confirm = 1").replace("all = true", "all = true, netns = \"/gone\"");
    configure(&place, &policy)?;
    for sweep in ["the first", "the second"] {
        let ran = ran(place.command(&lab, "--once"))?
            .exits(3)
            .complains("but its sockets cannot be listed");
        assert!(ran.stdout.contains("1 socket stuck"), "{sweep}: {ran:?}");
    }
    let mut daemon = Daemon::start(&lab, &place)?;
    let series = "cwkill_policy_held{policy=\"all\",reason=\"unlisted\"} 1";
    daemon.wait_until("its policy is held", |daemon| {
        let metrics = daemon.get("/metrics")?.body;
        Ok(metrics.lines().any(|line| line == series))
    })?;
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 1);
    Ok(())
}

fn who_does_not_act_leaves_the_orders_to_reset_to_the_next_daemon() -> Result<()> {
    let (lab, _leak) = lab("drained", Family::V4, 1)?;
    let place = Place::new()?;
    configure(&place, &acting(""))?;
    let order = place.path("reset-all");
    let is_there = || std::path::Path::new(&order).exists();
    let mut daemon = Daemon::start_with(&lab, &place, "--observe")?;
    ran(place.command(&lab, "--reset all"))?.exits(0);
    daemon.wait_for_sweeps(2.0)?;
    assert!(is_there(), "{}", daemon.said());
    for arguments in ["--once", "--once --observe"] {
        let ran = ran(place.command(&lab, arguments))?.exits(0);
        assert!(is_there(), "{arguments}: {ran:?}");
    }
    daemon.end(Signal::SIGTERM)?;
    let mut next = Daemon::start(&lab, &place)?;
    next.wait_until("it carries out the order, and removes it", |daemon| {
        let said = "policy all: its circuit breaker was reset";
        Ok(!is_there() && daemon.said().contains(said))
    })
}

fn a_damaged_state_file_keeps_the_policies_from_acting() -> Result<()> {
    let (lab, _leak) = lab("drained", Family::V4, 1)?;
    let place = Place::new()?;
    configure(&place, &acting(""))?;
    let path = place.path("policies.json");
    for (text, why) in [
        ("{\"version\":1,\"clock\":\"x\"}\n0\n", "is damaged"),
        ("{\"version\":7}\n0\n", "is of another version (7"),
    ] {
        std::fs::write(&path, text)?;
        let mut daemon = Daemon::start(&lab, &place)?;
        daemon.wait_until("the policy only observes", |daemon| {
            Ok(daemon.said().contains("but the state file cannot be used"))
        })?;
        let (_, said) = daemon.end(Signal::SIGTERM)?;
        assert!(said.contains(why) && said.contains(&path), "{said}");
        assert_eq!(std::fs::read_to_string(&path)?, text, "the file stays");
    }
    Ok(())
}

fn a_breaker_of_an_unknown_policy_cannot_be_reset() -> Result<()> {
    let lab = Lab::new()?;
    let place = Place::new()?;
    configure(&place, &acting(""))?;
    ran(place.command(&lab, "--reset al"))?
        .exits(2)
        .complains("there is no policy `al`: they are all");
    ran(place.command(&lab, "--reset all"))?.exits(0);
    Ok(())
}
