//! Dead descriptors are closed inside their owner, and everything else in the owner goes on.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use netns_harness::owners::{Build, Owner};
use netns_harness::{Lab, Options, Signal};

use super::{descriptors, fds_of, number, reclaim, states};
use crate::support::{PATIENCE, at, count, cwkill};
use crate::trial::{Test, once};

pub const TESTS: &[Test] = &[
    once!(descriptors_of_closed_sockets_are_freed),
    once!(every_owner_of_a_shared_socket_is_reclaimed),
    once!(calls_that_threads_wait_in_go_on),
    once!(the_work_of_threads_goes_on),
    once!(static_stripped_programs_are_reclaimed),
    once!(a_stopped_process_stays_stopped),
    once!(listing_and_dry_run_change_no_owner),
    once!(a_dry_run_plans_nothing_for_a_skipped_socket),
    once!(a_thread_with_another_table_never_closes),
    once!(owners_in_other_pid_namespaces_are_reclaimed),
    once!(no_live_descriptor_of_a_busy_table_is_closed),
    once!(a_wrong_reclaimer_is_detected),
];

/// At any age, and with a stop limit that suffices on a busy machine.
const RECLAIM: &str = "--reclaim --reclaim-age 0s --stop-limit 5s";

fn descriptors_of_closed_sockets_are_freed() -> Result<()> {
    let lab = Lab::new()?;
    let leak = lab.start("drained", netns_harness::Family::V4, count(40))?;
    let _bystanders = lab.start("established", netns_harness::Family::V4, count(5))?;
    let before = fds_of(leak.app().pid())?;
    let began = Instant::now();
    let ran = cwkill(&lab, &format!("--port 8080 {RECLAIM} --json"))?.exits(0);
    let said = ran.json();
    assert_eq!(number(&said, "/reclaim/summary/freed"), 40);
    assert_eq!(number(&said, "/reclaim/owners/0/freed"), 40);
    let stopped = Duration::from_micros(number(&said, "/reclaim/owners/0/stopped_us"));
    assert!(stopped <= began.elapsed(), "{said}");
    for socket in ran.sockets() {
        assert_eq!(at(&socket, "/result/descriptor_open"), "false");
        assert_eq!(at(&socket, "/result/descriptors/0/outcome"), "freed");
        assert_eq!(
            at(&socket, "/result/descriptors/0/pid"),
            leak.app().pid().to_string()
        );
    }
    assert!(!ran.stderr.contains("still has"), "{ran:?}");
    let gone: HashSet<i32> = leak.app_fds().iter().map(|fd| fd.0).collect();
    let mut after = before;
    after.retain(|fd| !gone.contains(fd));
    assert_eq!(fds_of(leak.app().pid())?, after);

    // The text for people.
    let more = lab.start(
        "drained",
        netns_harness::Family::V4,
        Options {
            own: true,
            port: 9090,
            ..count(2)
        },
    )?;
    let ran = cwkill(&lab, "--port 9090 --reclaim")?.exits(4);
    for text in [
        "descriptor kept: quiet for only",
        "2 descriptors: 0 freed, 2 skipped",
    ] {
        assert!(ran.stdout.contains(text), "{text}: {ran:?}");
    }
    let pid = more.app().pid();
    let ran = reclaim(&lab, pid, "")?.exits(0);
    for text in ["10.78.", "freed", "was stopped for"] {
        assert!(ran.stdout.contains(text), "{text}: {ran:?}");
    }
    reclaim(&lab, pid, "")?.exits(1);
    Ok(())
}

fn every_owner_of_a_shared_socket_is_reclaimed() -> Result<()> {
    let lab = Lab::new()?;
    let _leak = lab.start("forked", netns_harness::Family::V4, count(2))?;
    let ran = cwkill(&lab, &format!("--all {RECLAIM} --json"))?.exits(0);
    let said = ran.json();
    assert_eq!(number(&said, "/reclaim/summary/freed"), 6);
    assert_eq!(said["reclaim"]["owners"].as_array().map(Vec::len), Some(3));
    Ok(())
}

/// Reclaims dead descriptors of an owner in `mode` many times. The owner checks itself for damage.
fn over_and_over(build: Build, mode: &str, times: usize) -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), build, mode, 4)?;
    let before = owner.descriptors()?;
    for run in 0..times {
        let fds = match run % 2 {
            0 => owner.leak(5)?,
            _ => owner.leak_scattered(5)?,
        };
        let ran = reclaim(&lab, owner.pid(), "--json")?.exits(0);
        assert_eq!(number(&ran.json(), "/summary/freed"), 5);
        let open = owner.descriptors()?;
        assert!(
            !fds.iter().any(|fd| open.contains(fd)),
            "{fds:?} of {open:?}"
        );
    }
    let checks = owner.report()?;
    // The owner still makes progress.
    lab.wait_for(PATIENCE, || Ok(mode == "idle" || owner.report()? > checks))?;
    let open = owner.descriptors()?;
    assert!(
        before.iter().all(|fd| open.contains(fd)),
        "{before:?} of {open:?}"
    );
    Ok(())
}

fn calls_that_threads_wait_in_go_on() -> Result<()> {
    over_and_over(Build::Plain, "waits", 25)
}

fn the_work_of_threads_goes_on() -> Result<()> {
    over_and_over(Build::Plain, "works", 25)
}

fn static_stripped_programs_are_reclaimed() -> Result<()> {
    over_and_over(Build::StaticStripped, "works", 10)?;
    over_and_over(Build::StaticStripped, "idle", 10)
}

fn a_stopped_process_stays_stopped() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "works", 1)?;
    owner.leak(3)?;
    owner.signal(Signal::SIGSTOP)?;
    let is_stopped = || Ok(states(owner.pid())?.iter().all(|state| *state == 'T'));
    lab.wait_for(PATIENCE, is_stopped)?;
    let ran = reclaim(&lab, owner.pid(), "--json")?.exits(0);
    assert_eq!(number(&ran.json(), "/summary/freed"), 3);
    lab.wait_for(PATIENCE, is_stopped)?;
    owner.signal(Signal::SIGCONT)?;
    let checks = owner.report()?;
    lab.wait_for(PATIENCE, || Ok(owner.report()? > checks))
}

fn listing_and_dry_run_change_no_owner() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "idle", 2)?;
    let began = Instant::now();
    let fds = owner.leak(3)?;
    let before = owner.descriptors()?;
    for more in [
        "-n",
        "--dry-run --json",
        "--dryrun --reclaim-force",
        "-n -v",
        "-n --jsonl",
    ] {
        reclaim(&lab, owner.pid(), more)?.exits(0);
        assert_eq!(owner.descriptors()?, before);
    }
    cwkill(&lab, "reclaim --help")?.exits(0);
    let ran = reclaim(&lab, owner.pid(), "-n --json")?;
    let said = descriptors(&ran);
    assert_eq!(said.len(), 3);
    for (one, fd) in said.iter().zip(&fds) {
        assert_eq!(at(one, "/fd"), fd.to_string());
        assert_eq!(at(one, "/pid"), owner.pid().to_string());
        assert_eq!(at(one, "/closable"), "true");
        assert_eq!(at(one, "/local/address"), "127.0.0.1");
        let quiet = Duration::from_millis(number(one, "/quiet_ms"));
        assert!(quiet <= began.elapsed(), "{one}");
    }
    assert_eq!(number(&ran.json(), "/summary/found"), 3);
    Ok(())
}

fn a_dry_run_plans_nothing_for_a_skipped_socket() -> Result<()> {
    let lab = Lab::new()?;
    let _leak = lab.start("drained", netns_harness::Family::V4, count(3))?;
    let line = format!("--port 8080 {RECLAIM} -n --max-kills 1 --json");
    let sockets = cwkill(&lab, &line)?.exits(0).sockets();
    assert_eq!(sockets.len(), 3);
    assert_eq!(at(&sockets[0], "/skip"), "null");
    assert_eq!(at(&sockets[0], "/reclaim_plan/0/outcome"), "allowed");
    for socket in &sockets[1..] {
        assert_eq!(at(socket, "/skip/reason_code"), "over-max-kills");
        assert_eq!(at(socket, "/reclaim_plan"), "[]");
    }
    Ok(())
}

/// The threads wait for a lock, so cwkill would prefer one of them.
fn a_thread_with_another_table_never_closes() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "unshared", 4)?;
    let fds = owner.leak(3)?;
    let ran = reclaim(&lab, owner.pid(), "--json")?.exits(0);
    assert_eq!(number(&ran.json(), "/summary/freed"), 3);
    let open = owner.descriptors()?;
    assert!(
        fds.iter().all(|fd| !open.contains(fd)),
        "{fds:?} of {open:?}"
    );
    owner.report()?;
    Ok(())
}

fn owners_in_other_pid_namespaces_are_reclaimed() -> Result<()> {
    let lab = Lab::new()?;
    // The program is executed by its descriptor: root of the new user namespace cannot reach it by its path.
    let script = "exec 9<$1; shift; exec unshare --user --map-root-user --pid --fork --mount --kill-child \
                  /proc/self/fd/9 $@";
    let by = ["sh", "-c", script, "sh"];
    let program = Owner::program(Build::Plain)?;
    let mut owner = Owner::start_through(lab.app_host(), &by, &program, "works", 1)?;
    owner.leak(3)?;
    let children = format!("/proc/{0}/task/{0}/children", owner.pid());
    let inner: u32 = std::fs::read_to_string(children)?.trim().parse()?;
    let ran = reclaim(&lab, inner, "--json")?.exits(0);
    assert_eq!(number(&ran.json(), "/summary/freed"), 3);
    owner.report()?;
    Ok(())
}

const CHURNING: usize = 4;

fn no_live_descriptor_of_a_busy_table_is_closed() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "churn", CHURNING)?;
    let (mut freed, mut gone) = (0, 0);
    // At least until some descriptors were freed and some were gone before.
    for run in 0.. {
        if run >= 60 && freed >= 20 && gone >= 20 {
            break;
        }
        assert!(run < 600, "{freed} freed, {gone} gone");
        let force = if run % 2 == 0 { "" } else { "--reclaim-force" };
        let said = reclaim(&lab, owner.pid(), &format!("--json {force}"))?.json();
        freed += number(&said, "/summary/freed");
        gone += number(&said, "/summary/gone");
        owner.report().with_context(|| format!("run {run}"))?;
    }
    lab.wait_for(PATIENCE, || {
        Ok(owner.order("taken")?.parse::<u64>()? >= freed)
    })
}

/// A reclaimer that does not check again what a number refers to.
fn a_wrong_reclaimer_is_detected() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "churn", CHURNING)?;
    for _ in 0..1000 {
        for one in descriptors(&reclaim(&lab, owner.pid(), "-n --json")?) {
            owner.order(&format!("close {}", at(&one, "/fd")))?;
        }
        if let Err(error) = owner.report() {
            assert!(error.to_string().contains("descriptor"), "{error:#}");
            return Ok(());
        }
    }
    bail!("the owner lost descriptors and did not notice")
}
