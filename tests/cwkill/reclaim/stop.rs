//! How the owner is stopped, and for how long.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use netns_harness::Lab;
use netns_harness::owners::{Build, Owner};

use super::{is_traced, left, links_of, number, outcomes, reclaim, reports_the_truth, states};
use crate::support::{CWKILL, PATIENCE, Ran, cwkill};
use crate::trial::{Need, Test, once};

pub const TESTS: &[Test] = &[
    once!(a_thread_that_does_not_stop_ends_the_attempt),
    once!(a_program_that_execs_meanwhile_goes_on),
    once!(the_stop_ends_with_its_limit),
    once!(no_thread_is_stopped_while_an_exec_hangs).needs(Need::Fanotify),
    once!(an_owner_whose_exec_hangs_is_skipped).needs(Need::Fanotify),
    once!(an_exec_that_was_waited_for_is_not_a_missing_right).needs(Need::Fanotify),
];

/// A thread that waits for its vfork() stops for nobody.
fn a_thread_that_does_not_stop_ends_the_attempt() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "vfork", 1)?;
    let fds = owner.leak(1)?;
    lab.wait_for(PATIENCE, || Ok(states(owner.pid())?.contains(&'D')))?;
    let mut gaps = Vec::new();
    for _ in 0..3 {
        let (ran, gap, _) = measured(&lab, &mut owner, Duration::from_millis(50))?;
        left(
            &ran.exits(4),
            &mut owner,
            &fds,
            "failed",
            "did not stop within 50ms",
        )?;
        gaps.push(gap);
    }
    // On a busy machine the time may be over before the first is stopped.
    let was_stopped = |gap: &Duration| *gap >= Duration::from_millis(40);
    assert!(gaps.iter().any(was_stopped), "it was not stopped: {gaps:?}");
    // Nothing is left of us.
    lab.wait_for(PATIENCE, || Ok(!is_traced(owner.pid())))
}

/// A thread that execs ends all others, those that we have stopped included, and takes the number of the first.
fn a_program_that_execs_meanwhile_goes_on() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "execs", 8)?;
    let began = owner.report()?;
    let mut freed = 0;
    for run in 0..60 {
        let fds = owner.leak_scattered(5)?;
        let before = links_of(owner.pid())?;
        assert!(fds.iter().all(|fd| before.contains_key(fd)), "{before:?}");
        let line = format!(
            "reclaim --pid {} --reclaim-age 0s --stop-limit 5s --json",
            owner.pid()
        );
        let command = lab.app_host().command(CWKILL).args(line.split_whitespace());
        // Without an end, if both wait for each other.
        let ran = Ran::of(&line, command.output_within(PATIENCE)?)?;
        assert!(matches!(ran.code, Some(0 | 4)), "{ran:?}");
        reports_the_truth(&ran, &owner, &before, &fds).with_context(|| format!("run {run}"))?;
        freed += number(&ran.json(), "/summary/freed");
        assert!(!is_traced(owner.pid()), "run {run}");
        let checks = owner.report().with_context(|| format!("run {run}"))?;
        // It is not held back, and is somewhere else each time.
        lab.wait_for(PATIENCE, || Ok(owner.report()? > checks))?;
    }
    let execs = owner.report()? - began;
    assert!(freed >= 100 && execs >= 60, "{freed} freed, {execs} times");
    Ok(())
}

/// How long an exec of such an owner hangs.
const HANGS: Duration = Duration::from_secs(3);

/// PTRACE_SEIZE waits for an exec by any thread, which begins when the first of them is seized.
fn no_thread_is_stopped_while_an_exec_hangs() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "hangs", 1000)?;
    for _ in 0..20 {
        let hung: u64 = owner.order("hang late")?.parse()?;
        owner.leak(2)?;
        let began = Instant::now();
        let (ran, gap, told) = measured(&lab, &mut owner, Duration::from_secs(1))?;
        let waited = began.elapsed() > HANGS - Duration::from_millis(500);
        lab.wait_for(PATIENCE, || Ok(owner.report()? > hung))?;
        if waited {
            ran.exits(0);
            assert!(gap < HANGS / 2, "{gap:?}");
            assert!(told < HANGS / 2, "it says {told:?}");
            return Ok(());
        }
        // All were seized before that thread got to it, and it did not stop within the limit.
        reclaim(&lab, owner.pid(), "-q")?;
    }
    bail!("no exec came between")
}

fn an_owner_whose_exec_hangs_is_skipped() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "hangs", 4)?;
    let fds = owner.leak(2)?;
    owner.order("hang now")?;
    let began = Instant::now();
    let ran = reclaim(&lab, owner.pid(), "--json")?.exits(4);
    let took = began.elapsed();
    left(&ran, &mut owner, &fds, "skipped", "is executing a program")?;
    assert!(took < HANGS / 2, "{took:?}");
    // It was denied, so the owner goes on as before.
    lab.wait_for(PATIENCE, || Ok(owner.report()? == 1))?;
    reclaim(&lab, owner.pid(), "-q")?.exits(0);
    Ok(())
}

/// The thread that was to be seized is gone by then, and another has its number.
fn an_exec_that_was_waited_for_is_not_a_missing_right() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "hangs", 4)?;
    owner.leak(2)?;
    owner.order("hang through")?;
    let began = Instant::now();
    let ran = reclaim(&lab, owner.pid(), "--reclaim-force --json")?.exits(0);
    assert!(began.elapsed() > HANGS / 2, "it did not wait");
    assert_eq!(number(&ran.json(), "/summary/freed"), 2);
    owner.report()?;
    Ok(())
}

/// From inside, by its heartbeat. The machine may be busy, so it is the best of some runs that counts for what must not
/// be longer.
fn the_stop_ends_with_its_limit() -> Result<()> {
    // All of the limit is used up by a thread that does not stop.
    const WHOLE: Duration = Duration::from_millis(200);
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "vfork", 1)?;
    let fds = owner.leak(1)?;
    lab.wait_for(PATIENCE, || Ok(states(owner.pid())?.contains(&'D')))?;
    let mut runs = Vec::new();
    for _ in 0..6 {
        let (ran, gap, told) = measured(&lab, &mut owner, WHOLE)?;
        left(
            &ran,
            &mut owner,
            &fds,
            "failed",
            "did not stop within 200ms",
        )?;
        assert!(told >= WHOLE, "it says {told:?}");
        runs.push((gap, told));
    }
    let some =
        |good: &dyn Fn(Duration, Duration) -> bool| runs.iter().any(|run| good(run.0, run.1));
    assert!(some(&|gap, _| gap < 2 * WHOLE), "{runs:?}");
    assert!(some(&|_, told| told < 2 * WHOLE), "{runs:?}");
    // What it says is what it was, neither more nor less.
    assert!(
        some(&|gap, told| gap.abs_diff(told) < WHOLE / 2),
        "{runs:?}"
    );

    // More descriptors than there is time for: the rest is left, and said to be. How long they take depends on the
    // machine, so limits are tried until some are closed and some are not.
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "idle", 4)?;
    let mut runs = Vec::new();
    let limits = [4, 8, 12, 16, 24, 32, 48, 64, 96];
    for limit in limits.repeat(4).into_iter().map(Duration::from_millis) {
        let fds = owner.leak_scattered(1000)?;
        let before = links_of(owner.pid())?;
        let (ran, gap, told) = measured(&lab, &mut owner, limit)?;
        reports_the_truth(&ran, &owner, &before, &fds)?;
        owner.report()?;
        let said = outcomes(&ran);
        let over = |why: &str| why.contains("had been stopped for") && why.contains("--stop-limit");
        let over = said.values().filter(|(_, why)| over(why)).count();
        let freed = number(&ran.json(), "/summary/freed");
        reclaim(&lab, owner.pid(), "-q")?;
        if freed > 0 && over > 0 {
            runs.push((limit, gap, told));
            // It went on within some multiple of the limit, and said so.
            if gap < 2 * limit && told < limit + limit / 2 && told >= limit {
                return Ok(());
            }
        }
    }
    bail!("{runs:?}")
}

/// A run with a limit; the longest gap of the owner's heartbeat in it, and for how long it says the owner was stopped.
fn measured(lab: &Lab, owner: &mut Owner, limit: Duration) -> Result<(Ran, Duration, Duration)> {
    let line = format!(
        "reclaim --pid {} --reclaim-age 0s --stop-limit {}ms --json",
        owner.pid(),
        limit.as_millis()
    );
    owner.longest_gap()?;
    let ran = cwkill(lab, &line)?;
    let gap = owner.longest_gap()?;
    let told = number(&ran.json(), "/owners/0/stopped_us");
    Ok((ran, gap, Duration::from_micros(told)))
}
