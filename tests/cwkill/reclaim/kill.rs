//! If cwkill ends at any point, the owner goes on.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use netns_harness::owners::{Build, Owner as LeakyOwner};
use netns_harness::{Lab, Signal};

use cwkill::control::Control;
use cwkill::finder::dead::{self, DeadSocket, SuspectVerdict};
use cwkill::model::{Method, Owner, ReclaimOutcome, ReclaimReason};
use cwkill::proc::{Inodes, ProcFs};
use cwkill::reclaim::{ReclaimRules, ReclaimTarget};

use super::{is_traced, reclaim};
use crate::support::{CWKILL, PATIENCE};
use crate::trial::{Test, once};

pub const TESTS: &[Test] = &[
    once!(a_panic_leaves_the_owner_running),
    once!(an_interruption_leaves_the_owner_running).slow(),
    once!(sigkill_leaves_the_owner_running).slow(),
    once!(sigkill_ends_only_calls_that_may_end).slow(),
    once!(sigkill_leaves_no_standard_descriptor_free).slow(),
];

/// A descriptor of a dead socket.
struct Dead {
    owner: Owner,
    inode: u32,
    socket: DeadSocket,
}

/// The dead descriptors of one process, as `cwkill reclaim` finds them.
fn dead(owner: &LeakyOwner) -> Result<Vec<Dead>> {
    let pid = i32::try_from(owner.pid())?;
    let scan = dead::find(
        &ProcFs::default(),
        &|process| process.id.pid == pid,
        &Inodes::default(),
    )?;
    let table = scan.tables.into_iter().next().context("no such process")?;
    let process = Arc::new(table.process);
    let dead = table
        .suspects
        .iter()
        .filter_map(|suspect| match suspect.verdict {
            SuspectVerdict::Dead(socket) => Some(Dead {
                owner: Owner::new(Arc::clone(&process), suspect.fd),
                inode: suspect.inode,
                socket,
            }),
            _ => None,
        });
    Ok(dead.collect())
}

/// Reclaims `dead` as the library does, and returns the outcome of each. cwkill asks `interrupted` before each descriptor,
/// and at other times.
fn reclaim_each(
    dead: &mut [Dead],
    interrupted: impl Fn() -> bool + Sync,
) -> Vec<Option<ReclaimOutcome>> {
    let mut targets: Vec<ReclaimTarget<'_>> = dead
        .iter_mut()
        .map(|dead| ReclaimTarget::dead(&mut dead.owner, dead.inode, &dead.socket))
        .collect();
    let control = InterruptedBy(interrupted);
    cwkill::reclaim::reclaim(&mut targets, &RULES, &ProcFs::default(), &control);
    let outcomes = dead.iter().map(|dead| dead.owner.reclaim.clone());
    outcomes.collect()
}

/// The clock of the machine, and the interruption of a test.
struct InterruptedBy<F>(F);

impl<F: Fn() -> bool + Sync> Control for InterruptedBy<F> {
    fn now(&self) -> Instant {
        Instant::now()
    }
    fn sleep(&self, duration: Duration) {
        std::thread::sleep(duration);
    }
    fn interrupted(&self) -> bool {
        self.0()
    }
    fn progress(&self, _: Method, _: usize) {}
}

/// Most attempts to kill cwkill between two descriptors, a moment that a busy machine may miss.
const MOST_KILLS: u64 = 600;

const RULES: ReclaimRules = ReclaimRules {
    min_age: Duration::ZERO,
    force: false,
    replace: false,
    stop_limit: Duration::from_secs(20),
};

/// cwkill panics after N descriptors, while the owner is stopped.
fn a_panic_leaves_the_owner_running() -> Result<()> {
    for mode in ["works", "waits"] {
        let lab = Lab::new()?;
        let mut owner = LeakyOwner::start(lab.app_host(), Build::Plain, mode, 1)?;
        for after in 0..10 {
            owner.leak_scattered(10)?;
            let mut dead = dead(&owner)?;
            let (pid, asked) = (owner.pid(), AtomicU32::new(0));
            let bug = || {
                if is_traced(pid) && asked.fetch_add(1, Ordering::Relaxed) >= after {
                    // Does not print the message of a panic.
                    std::panic::resume_unwind(Box::new("a bug made for the test"));
                }
                false
            };
            let outcomes = reclaim_each(&mut dead, bug);
            let failed = outcomes
                .iter()
                .filter(|outcome| matches!(outcome, Some(ReclaimOutcome::Failed(_))));
            assert!(failed.count() > 0, "{outcomes:?}");
            assert!(!is_traced(owner.pid()), "{mode}, after {after}");
            owner
                .report()
                .with_context(|| format!("{mode}, after {after}"))?;
            let checks = owner.report()?;
            lab.wait_for(PATIENCE, || Ok(owner.report()? > checks))?;
        }
    }
    Ok(())
}

fn an_interruption_leaves_the_owner_running() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = LeakyOwner::start(lab.app_host(), Build::Plain, "works", 1)?;
    owner.leak_scattered(10)?;
    let mut dead = dead(&owner)?;
    let (pid, asked) = (owner.pid(), AtomicU32::new(0));
    let stop = || is_traced(pid) && asked.fetch_add(1, Ordering::Relaxed) >= 3;
    let outcomes = reclaim_each(&mut dead, stop);
    let freed = outcomes
        .iter()
        .filter(|outcome| **outcome == Some(ReclaimOutcome::Freed))
        .count();
    assert_eq!(freed, 3);
    assert_eq!(
        outcomes[9],
        Some(ReclaimOutcome::Skipped(ReclaimReason::Interrupted)),
        "{outcomes:?}"
    );
    let checks = owner.report()?;
    lab.wait_for(PATIENCE, || Ok(owner.report()? > checks))?;

    // The signals that an operator may send, at various times.
    let signals = [
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGHUP,
        Signal::SIGTSTP,
    ];
    for (number, signal) in (0..40).zip(signals.iter().cycle()) {
        owner.leak_scattered(20)?;
        kill_after(&lab, &owner, *signal, Duration::from_micros(number * 50))?;
        owner.report()?;
    }
    Ok(())
}

/// Starts `cwkill reclaim`, sends it a signal `delay` after it has begun to stop the owner, and waits for its end.
fn kill_after(lab: &Lab, owner: &LeakyOwner, signal: Signal, delay: Duration) -> Result<()> {
    kill_with(lab, owner, signal, delay, "")
}

/// As [`kill_after`], with more options.
fn kill_with(
    lab: &Lab,
    owner: &LeakyOwner,
    signal: Signal,
    delay: Duration,
    more: &str,
) -> Result<()> {
    let line = format!(
        "reclaim --pid {} --reclaim-age 0s --stop-limit 5s -q {more}",
        owner.pid()
    );
    let mut child = lab
        .app_host()
        .command(CWKILL)
        .args(line.split_whitespace())
        .spawn()?;
    let until = Instant::now() + PATIENCE;
    while !is_traced(owner.pid()) && child.try_wait()?.is_none() {
        assert!(Instant::now() < until, "it does not come to stop the owner");
    }
    let until = Instant::now() + delay;
    while Instant::now() < until {
        std::hint::spin_loop();
    }
    let pid = child.id().to_string();
    let send = |signal: Signal| {
        let name = signal.as_str().trim_start_matches("SIG");
        // cwkill may have ended by itself.
        let _ = std::process::Command::new("kill")
            .args(["-s", name, &pid])
            .stderr(std::process::Stdio::null())
            .status();
    };
    send(signal);
    if signal == Signal::SIGTSTP {
        // cwkill may stop before and after the act, but never while the owner is stopped.
        lab.wait_for(PATIENCE, || Ok(!is_traced(owner.pid())))?;
    }
    let until = Instant::now() + PATIENCE;
    while child.try_wait()?.is_none() {
        if Instant::now() > until {
            let _ = child.kill();
            bail!("{signal} does not end it");
        }
        if signal == Signal::SIGTSTP {
            // It may not have stopped yet.
            send(Signal::SIGCONT);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// SIGKILL at many points, most of them while the owner is stopped. A call of its threads may then end early
/// (docs/decisions/reclaim.md), which every program must expect. An owner in mode `waits` does not, so it is not used here.
fn sigkill_leaves_the_owner_running() -> Result<()> {
    let lab = Lab::new()?;
    let (mut begun, mut whole) = (0, 0);
    for mode in ["works", "idle"] {
        let mut owner = LeakyOwner::start(lab.app_host(), Build::Plain, mode, 4)?;
        for kill in 0..MOST_KILLS {
            // Goes on only if too few kills came between two descriptors.
            if kill >= 30 && (begun >= 3 || mode == "works") {
                break;
            }
            let fds = owner.leak_scattered(60)?;
            let delay = Duration::from_micros(kill % 30 * 240);
            kill_after(&lab, &owner, Signal::SIGKILL, delay)?;
            let open = owner.descriptors()?;
            let left = fds.iter().filter(|fd| open.contains(fd)).count();
            begun += usize::from(left > 0 && left < fds.len());
            whole += usize::from(left == 0);
            assert!(owner.is_alive(), "{mode}: the owner died");
            owner.report().context(mode)?;
            reclaim(&lab, owner.pid(), "-q")?;
        }
        let checks = owner.report()?;
        lab.wait_for(PATIENCE, || Ok(mode == "idle" || owner.report()? > checks))?;
    }
    assert!(
        begun >= 3,
        "{begun} were killed between two descriptors, {whole} after the last"
    );
    Ok(())
}

/// docs/decisions/reclaim.md: in a killed run, at most one waiting call appears to return 0, and only a wait for a lock or
/// a sleep, if a thread is in one. Some calls end with EINTR. The owner counts these and fails at any other.
fn sigkill_ends_only_calls_that_may_end() -> Result<()> {
    /// The number of its threads that wait in calls which a stop may end with EINTR if they are not restored.
    const ENDED_BY_A_STOP: u64 = 5;
    let lab = Lab::new()?;
    let mut owner = LeakyOwner::start(lab.app_host(), Build::Plain, "forgiving", 4)?;
    let forgiven =
        |owner: &mut LeakyOwner| -> Result<u64> { Ok(owner.order("forgiven")?.parse()?) };
    let (mut begun, mut before) = (0, 0);
    for number in 0..MOST_KILLS {
        // Goes on only if too few kills came between two descriptors.
        if number >= 40 && begun >= 3 {
            break;
        }
        let fds = owner.leak_scattered(60)?;
        let delay = Duration::from_micros(number % 40 * 200);
        kill_after(&lab, &owner, Signal::SIGKILL, delay)?;
        lab.wait_for(PATIENCE, || Ok(!is_traced(owner.pid())))?;
        let open = owner.descriptors()?;
        let left = fds.iter().filter(|fd| open.contains(fd)).count();
        begun += usize::from(left > 0 && left < fds.len());
        let checks = owner.report().with_context(|| format!("kill {number}"))?;
        // A run that is not killed ends no call.
        let ran = reclaim(&lab, owner.pid(), "--json")?;
        assert!(matches!(ran.code, Some(0 | 1)), "kill {number}: {ran:?}");
        lab.wait_for(PATIENCE, || Ok(owner.report()? > checks))?;
        let now = forgiven(&mut owner)?;
        assert!(
            now - before <= ENDED_BY_A_STOP + 1,
            "kill {number}: {}",
            now - before
        );
        before = now;
    }
    assert!(begun >= 3, "{begun} were killed between two descriptors");
    Ok(())
}

/// While /dev/null is opened and put in the place of standard input, output and error. At any point the next file of the owner gets
/// another number. At most one descriptor of /dev/null is left behind by each kill. Its threads sleep: cwkill prefers such a thread,
/// which takes any result of a call of cwkill for the end of its sleep.
fn sigkill_leaves_no_standard_descriptor_free() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = LeakyOwner::start(lab.app_host(), Build::Plain, "sleeps", 4)?;
    owner.order("inetd")?;
    let before = super::links_of(owner.pid())?.len();
    let (mut begun, mut whole, mut kills) = (0, 0, 0);
    for kill in 0..MOST_KILLS {
        // Goes on only if too few kills came between the first and the last of the three.
        if kill >= 60 && begun >= 3 {
            break;
        }
        owner.order("inetd")?;
        let delay = Duration::from_micros(kill % 60 * 40);
        kill_with(&lab, &owner, Signal::SIGKILL, delay, "--reclaim-force")?;
        kills += 1;
        lab.wait_for(PATIENCE, || Ok(!is_traced(owner.pid())))?;
        let links = super::links_of(owner.pid())?;
        let replaced = (0..=2).filter(|fd| links[fd] == "/dev/null").count();
        begun += usize::from(replaced == 1 || replaced == 2);
        whole += usize::from(replaced == 3);
        assert!(links.len() <= before + kills, "{links:?}");
        assert!(owner.is_alive(), "the owner died");
        let answer = owner.order("log")?;
        let fd: i32 = answer.split(' ').next().context("no number")?.parse()?;
        assert!(fd > 2 && answer.ends_with(" 0"), "kill {kill}: {answer}");
        owner.report()?;
    }
    assert!(
        begun >= 3,
        "{begun} were killed between two descriptors, {whole} after the last"
    );
    Ok(())
}
