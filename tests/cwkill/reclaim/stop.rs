//! How the owner is stopped, and for how long.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use netns_harness::Lab;
use netns_harness::owners::{Build, Owner};

use super::{
    descriptors, is_traced, left, links_of, number, outcomes, reclaim, reports_the_truth, states,
};
use crate::cgroups::{Freezer, Frozen};
use crate::support::{CWKILL, PATIENCE, Ran, at, cwkill};
use crate::trial::{Need, Test, once};

pub const TESTS: &[Test] = &[
    once!(a_thread_that_does_not_stop_ends_the_attempt),
    once!(an_owner_in_vfork_is_skipped_before_the_stop),
    once!(an_owner_that_computes_did_not_stand_still),
    once!(a_frozen_owner_is_told_as_frozen).needs(Need::RootOfTheMachine),
    once!(a_program_that_execs_meanwhile_goes_on),
    once!(the_stop_ends_with_its_limit),
    once!(no_thread_is_stopped_while_an_exec_hangs).needs(Need::Fanotify),
    once!(an_owner_whose_exec_hangs_is_skipped).needs(Need::Fanotify),
    once!(an_exec_that_was_waited_for_is_not_a_missing_right).needs(Need::Fanotify),
];

/// A thread that waits in vfork(2) cannot be stopped.
fn a_thread_that_does_not_stop_ends_the_attempt() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "vfork", 1)?;
    let fds = owner.leak(1)?;
    lab.wait_for(PATIENCE, || Ok(states(owner.pid())?.contains(&'D')))?;
    // On a busy machine the limit may be over before the first thread is stopped.
    let mut was_stopped = false;
    for _ in 0..100 {
        let limit = Duration::from_millis(50);
        let (ran, gap, _) = measured(&lab, &mut owner, limit, "--reclaim-force")?;
        let why = "waits in vfork() until its child executes a program or ends";
        left(&ran.exits(4), &mut owner, &fds, "skipped", why)?;
        was_stopped = gap >= Duration::from_millis(40);
        if was_stopped {
            break;
        }
    }
    assert!(was_stopped, "no thread was stopped");
    // The owner is not traced any more.
    lab.wait_for(PATIENCE, || Ok(!is_traced(owner.pid())))
}

/// The vfork is seen before, so nothing has to stand still.
fn an_owner_in_vfork_is_skipped_before_the_stop() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "vfork", 1)?;
    let fds = owner.leak(1)?;
    lab.wait_for(PATIENCE, || Ok(states(owner.pid())?.contains(&'D')))?;
    for more in ["-n --json", "--json"] {
        let ran = reclaim(&lab, owner.pid(), more)?;
        assert_eq!(at(&descriptors(&ran)[0], "/reason_code"), "in-vfork");
        assert_eq!(ran.json()["owners"].as_array().map(Vec::len), Some(0));
    }
    let ran = reclaim(&lab, owner.pid(), "--json")?.exits(4);
    left(&ran, &mut owner, &fds, "skipped", "in vfork()")
}

/// cwkill waits for a system call of its only thread, which goes on meanwhile.
fn an_owner_that_computes_did_not_stand_still() -> Result<()> {
    const LIMIT: Duration = Duration::from_millis(300);
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "computes", 0)?;
    assert_eq!(states(owner.pid())?.len(), 1);
    let fds = owner.leak(1)?;
    let mut runs = Vec::new();
    for _ in 0..TRIES {
        // Much longer than the run.
        owner.order("compute 4000")?;
        let line = format!(
            "reclaim --pid {} --reclaim-age 0s --stop-limit {}ms --json",
            owner.pid(),
            LIMIT.as_millis()
        );
        let ran = cwkill(&lab, &line)?.exits(4);
        let said = descriptors(&ran);
        let code = at(&said[0], "/reason_code");
        let stopped = ran
            .json()
            .pointer("/owners/0/stopped_us")
            .map_or(0, |us| us.as_u64().unwrap_or(u64::MAX));
        let stopped = Duration::from_micros(stopped);
        // The owner answers again.
        owner.report()?;
        if code == "no-syscall" && stopped < LIMIT / 2 {
            let ran = reclaim(&lab, owner.pid(), "--json")?.exits(0);
            assert_eq!(number(&ran.json(), "/summary/freed"), 1, "{fds:?}");
            return Ok(());
        }
        // A busy machine may delay its thread.
        runs.push((code, stopped));
    }
    bail!("{runs:?}")
}

fn a_frozen_owner_is_told_as_frozen() -> Result<()> {
    for version in [Freezer::V2, Freezer::V1] {
        let lab = Lab::new()?;
        let mut owner = Owner::start(lab.app_host(), Build::Plain, "idle", 2)?;
        owner.leak(2)?;
        let frozen = Frozen::new(version, owner.pid())?;
        for more in ["-n --json", "--json", "--reclaim-force --json"] {
            let ran = frozen.reclaim(&lab, owner.pid(), more)?;
            for one in descriptors(&ran) {
                assert_eq!(
                    at(&one, "/reason_code"),
                    "frozen",
                    "{version:?} {more}: {one}"
                );
            }
            assert_eq!(ran.json()["owners"].as_array().map(Vec::len), Some(0));
        }
        drop(frozen);
        owner.report()?;
        let ran = reclaim(&lab, owner.pid(), "--json")?.exits(0);
        assert_eq!(number(&ran.json(), "/summary/freed"), 2);
    }
    Ok(())
}

/// A thread that execs ends all others, also those that cwkill has stopped, and takes the thread id of the first.
fn a_program_that_execs_meanwhile_goes_on() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "execs", 8)?;
    let began = owner.report()?;
    let mut freed = 0;
    for run in 0.. {
        if run >= 60 && freed >= 100 {
            break;
        }
        assert!(run < 1000, "{freed} freed");
        let fds = owner.leak_scattered(5)?;
        let before = links_of(owner.pid())?;
        assert!(fds.iter().all(|fd| before.contains_key(fd)), "{before:?}");
        let line = format!(
            "reclaim --pid {} --reclaim-age 0s --stop-limit 5s --json",
            owner.pid()
        );
        let command = lab.app_host().command(CWKILL).args(line.split_whitespace());
        // It would not end if both waited for each other.
        let ran = Ran::of(&line, command.output_within(PATIENCE)?)?;
        assert!(matches!(ran.code, Some(0 | 4)), "{ran:?}");
        // During an exec, cwkill may not be able to list the descriptors. It then must not touch them.
        if number(&ran.json(), "/unreadable_processes") == 0 {
            reports_the_truth(&ran, &owner, &before, &fds)?;
        } else {
            let after = links_of(owner.pid())?;
            assert!(fds.iter().all(|fd| before[fd] == after[fd]), "{ran:?}");
        }
        freed += number(&ran.json(), "/summary/freed");
        assert!(!is_traced(owner.pid()), "run {run}");
        let checks = owner.report().with_context(|| format!("run {run}"))?;
        // The owner makes progress, so each run finds it at another point.
        lab.wait_for(PATIENCE, || Ok(owner.report()? > checks))?;
    }
    let execs = owner.report()? - began;
    assert!(execs >= 60, "{execs}");
    Ok(())
}

/// How long an exec of an owner in mode `hangs` takes.
const HANGS: Duration = Duration::from_secs(3);

/// Most attempts to hit a moment that a busy machine may miss.
const TRIES: usize = 100;

/// PTRACE_SEIZE waits for an exec by any thread, which begins when the first of them is seized.
fn no_thread_is_stopped_while_an_exec_hangs() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "hangs", 1000)?;
    let mut waits = Vec::new();
    for _ in 0..TRIES {
        let hung: u64 = owner.order("hang late")?.parse()?;
        owner.leak(2)?;
        let began = Instant::now();
        let (ran, gap, reported) = measured(&lab, &mut owner, Duration::from_secs(1), "")?;
        let mut waited = began.elapsed() > HANGS - Duration::from_millis(500);
        lab.wait_for(PATIENCE, || {
            if owner.report()? > hung {
                return Ok(true);
            }
            // On a busy machine the owner may not see that it is traced. Its exec then begins in a later run.
            waited = false;
            owner.leak(1)?;
            reclaim(&lab, owner.pid(), "-q")?;
            Ok(false)
        })?;
        // Otherwise all threads were seized before the exec began, and that thread did not stop within the limit.
        if waited && ran.code == Some(0) {
            // A busy machine may delay the owner as well, but not in each run.
            if gap < HANGS / 2 && reported < HANGS / 2 {
                return Ok(());
            }
            waits.push((gap, reported));
        }
        assert!(waits.len() < 5, "stopped all the time: {waits:?}");
        reclaim(&lab, owner.pid(), "-q")?;
    }
    panic!("no exec came between: {waits:?}")
}

fn an_owner_whose_exec_hangs_is_skipped() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "hangs", 4)?;
    let fds = owner.leak(2)?;
    for denied in 1.. {
        owner.order("hang now")?;
        let began = Instant::now();
        let ran = reclaim(&lab, owner.pid(), "--json")?;
        let took = began.elapsed();
        // The exec is denied in the end, so the owner goes on as before.
        lab.wait_for(PATIENCE, || Ok(owner.report()? == denied))?;
        if took < HANGS / 2 {
            left(&ran.exits(4), &mut owner, &fds, "skipped", "is in execve()")?;
            reclaim(&lab, owner.pid(), "-q")?.exits(0);
            return Ok(());
        }
        // A busy machine is not this slow each time.
        assert!(denied < 5, "{took:?}: {ran:?}");
    }
    unreachable!("the loop ends by itself")
}

/// The thread that cwkill wanted to seize is gone by then, and another has its thread id.
fn an_exec_that_was_waited_for_is_not_a_missing_right() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "hangs", 4)?;
    owner.leak(2)?;
    let began = Instant::now();
    owner.order("hang through")?;
    let ran = reclaim(&lab, owner.pid(), "--reclaim-force --json")?.exits(0);
    assert!(began.elapsed() > HANGS / 2, "it did not wait");
    assert_eq!(number(&ran.json(), "/summary/freed"), 2);
    owner.report()?;
    Ok(())
}

/// Measured inside the owner, by its heartbeat. A busy machine may delay the owner or cwkill, so a run that took too long
/// is repeated.
fn the_stop_ends_with_its_limit() -> Result<()> {
    // A thread that does not stop uses up the limit.
    const WHOLE: Duration = Duration::from_millis(200);
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "vfork", 1)?;
    let fds = owner.leak(1)?;
    lab.wait_for(PATIENCE, || Ok(states(owner.pid())?.contains(&'D')))?;
    let mut runs = Vec::new();
    for _ in 0..TRIES {
        let (ran, gap, reported) = measured(&lab, &mut owner, WHOLE, "--reclaim-force")?;
        left(&ran, &mut owner, &fds, "skipped", "in vfork()")?;
        assert!(reported >= WHOLE, "it reports {reported:?}");
        // The stop ends soon after the limit, and the reported duration is the one that the owner has measured.
        let is_right =
            gap < 2 * WHOLE && reported < 2 * WHOLE && gap.abs_diff(reported) < WHOLE / 2;
        runs.push((gap, reported));
        if is_right {
            break;
        }
        assert!(runs.len() < TRIES, "{runs:?}");
    }

    // More descriptors than the limit allows: the others are skipped and reported. Their time depends on the machine, so
    // the test tries limits until some descriptors are closed and some are not.
    let mut runs = Vec::new();
    let limits = [4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512];
    for limit in limits.repeat(20).into_iter().map(Duration::from_millis) {
        let mut owner = Owner::start(lab.app_host(), Build::Plain, "idle", 4)?;
        let fds = owner.leak_scattered(1000)?;
        let before = links_of(owner.pid())?;
        let (ran, gap, reported) = measured(&lab, &mut owner, limit, "")?;
        reports_the_truth(&ran, &owner, &before, &fds)?;
        owner.report()?;
        let said = outcomes(&ran);
        let over = |why: &str| why.contains("had been stopped for") && why.contains("--stop-limit");
        let over = said.values().filter(|(_, why)| over(why)).count();
        let freed = number(&ran.json(), "/summary/freed");
        if freed > 0 && over > 0 {
            runs.push((limit, gap, reported));
            // The owner went on within a multiple of the limit, and the report agrees.
            if gap < 2 * limit && reported < limit + limit / 2 && reported >= limit {
                return Ok(());
            }
        }
    }
    bail!("{runs:?}")
}

/// A run with a limit, the longest gap of the owner's heartbeat during it, and the reported duration of the stop.
fn measured(
    lab: &Lab,
    owner: &mut Owner,
    limit: Duration,
    more: &str,
) -> Result<(Ran, Duration, Duration)> {
    let line = format!(
        "reclaim --pid {} --reclaim-age 0s --stop-limit {}ms --json {more}",
        owner.pid(),
        limit.as_millis()
    );
    owner.longest_gap()?;
    let ran = cwkill(lab, &line)?;
    let gap = owner.longest_gap()?;
    let reported = number(&ran.json(), "/owners/0/stopped_us");
    Ok((ran, gap, Duration::from_micros(reported)))
}
