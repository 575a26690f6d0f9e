//! Closing descriptors inside their owners. The owners are real programs that look at themselves for damage.
//!
//! Each run names one process: the machine may have others with dead descriptors.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use netns_harness::owners::{Build, Owner, runtimes};
use netns_harness::{Lab, Options, Signal};
use runtimes::Runtime;
use serde_json::Value;

use cwkill::finder::dead::{self, Verdict};
use cwkill::finder::owners::{Proc, Process};
use cwkill::reclaim::{Fate, Rules, Wanted};

use crate::Case::{self, Once};
use crate::support::{CWKILL, PATIENCE, Ran, at, count, cwkill, ran, same};

pub const CASES: &[Case] = &[
    Once(
        "the_descriptors_of_what_was_closed_are_freed",
        with_the_main_job,
    ),
    Once("every_owner_of_a_shared_socket_is_cured", forked),
    Once("c_at_emfile_accepts_again", || emfile(Runtime::C)),
    Once("static_c_at_emfile_accepts_again", || {
        emfile(Runtime::CStatic)
    }),
    Once("python_at_emfile_accepts_again", || emfile(Runtime::Python)),
    Once("everything_a_thread_waits_in_goes_on", waits),
    Once("everything_a_thread_does_goes_on", works),
    Once("static_stripped_programs_too", static_stripped),
    Once("a_stopped_process_stays_stopped", stopped),
    Once("listing_and_dry_run_stop_nobody", nothing_changes),
    Once("what_is_in_an_epoll_set_is_left", epoll),
    Once("what_a_system_call_is_on_is_left", in_a_call),
    Once("a_table_that_another_process_has_is_left", shares),
    Once("a_thread_with_another_table_never_closes", unshared),
    Once("what_is_young_is_left", young),
    Once("a_socket_never_connected_is_no_dead_one", living),
    Once("a_filter_that_forbids_close_is_seen_beforehand", seccomp),
    Once("a_traced_process_is_left_to_its_tracer", traced),
    Once("a_thread_that_does_not_stop_ends_it", limit),
    Once("other_pid_namespaces_too", pid_namespace),
    Once(
        "without_rights_nothing_happens_and_it_says_so",
        unprivileged,
    ),
    Once("a_panic_lets_the_owner_go", panics),
    Once("an_interruption_lets_the_owner_go", interrupted),
    Once("sigkill_leaves_the_owner_running", killed),
    Once("no_living_descriptor_of_a_busy_table_is_closed", churn),
    Once("a_wrong_reclaimer_would_be_found_out", wrong_reclaimer),
];

/// Those of runtimes that are not everywhere.
pub const RUNTIMES: &[(Runtime, Case)] = &[
    (Runtime::Java, Once("java_is_left_to_its_collector", java)),
    (
        Runtime::Go,
        Once("go_at_emfile_accepts_again", || emfile(Runtime::Go)),
    ),
    (
        Runtime::Java,
        Once("java_at_emfile_accepts_again", || emfile(Runtime::Java)),
    ),
    (
        Runtime::Node,
        Once("node_at_emfile_accepts_again", || emfile(Runtime::Node)),
    ),
];

/// `netns-harness cure` does more of them.
const RUNS: u32 = 3;

fn emfile(runtime: Runtime) -> Result<()> {
    let tally = runtimes::cure(runtime, RUNS, 3, CWKILL.as_ref())?;
    same(&tally.cured, &RUNS)?;
    ensure!(tally.bytes > 10_000, "{tally:?}");
    Ok(())
}

/// Its finalizers close numbers, so nothing is taken without --reclaim-force.
fn java() -> Result<()> {
    let refused = runtimes::cure_plainly(Runtime::Java, CWKILL.as_ref())?;
    ensure!(refused.len() > 10, "{refused:?}");
    for reason in refused {
        ensure!(reason.contains("jcmd PID GC.run"), "{reason}");
    }
    Ok(())
}

/// Runs `cwkill reclaim` on one owner, whatever the age, and with time enough for a busy machine.
fn reclaim(lab: &Lab, pid: u32, more: &str) -> Result<Ran> {
    cwkill(
        lab,
        &format!("reclaim --pid {pid} --reclaim-age 0s --stop-limit 5s {more}"),
    )
}

fn descriptors(ran: &Ran) -> Result<Vec<Value>> {
    let list = ran.json()?["descriptors"].as_array().cloned();
    list.context("no descriptors in the document")
}

fn number(value: &Value, pointer: &str) -> Result<u64> {
    let number = value.pointer(pointer).and_then(Value::as_u64);
    number.with_context(|| format!("no number at {pointer}: {value}"))
}

/// All of them were left, for a reason with this text; the owner was not harmed.
fn left(ran: &Ran, owner: &mut Owner, fds: &[i32], outcome: &str, why: &str) -> Result<()> {
    let said = descriptors(ran)?;
    same(&said.len(), &fds.len())?;
    for one in &said {
        same(&at(one, "/outcome"), &outcome.to_owned())?;
        ensure!(at(one, "/reason").contains(why), "{one}");
    }
    let open = owner.descriptors()?;
    ensure!(
        fds.iter().all(|fd| open.contains(fd)),
        "{fds:?} of {open:?}"
    );
    owner.report()?;
    Ok(())
}

fn with_the_main_job() -> Result<()> {
    let lab = Lab::new()?;
    let leak = lab.start("drained", netns_harness::Family::V4, count(40))?;
    let _innocents = lab.start("established", netns_harness::Family::V4, count(5))?;
    let before = fds_of(leak.app().pid())?;
    let ran = cwkill(&lab, "--port 8080 --reclaim --reclaim-age 0s --json")?.exits(0)?;
    let said = ran.json()?;
    same(&number(&said, "/reclaim/summary/freed")?, &40)?;
    same(&number(&said, "/reclaim/owners/0/freed")?, &40)?;
    ensure!(
        number(&said, "/reclaim/owners/0/stopped_us")? < 100_000,
        "{said}"
    );
    for socket in ran.sockets()? {
        same(&at(&socket, "/result/descriptor_open"), &"false".to_owned())?;
        same(
            &at(&socket, "/result/descriptors/0/outcome"),
            &"freed".to_owned(),
        )?;
        same(
            &at(&socket, "/result/descriptors/0/pid"),
            &leak.app().pid().to_string(),
        )?;
    }
    ensure!(!ran.stderr.contains("still has"), "{ran:#?}");
    let gone: HashSet<i32> = leak.app_fds().iter().map(|fd| fd.0).collect();
    let mut after = before;
    after.retain(|fd| !gone.contains(fd));
    same(&fds_of(leak.app().pid())?, &after)?;

    // As people read it.
    let more = lab.start(
        "drained",
        netns_harness::Family::V4,
        Options {
            own: true,
            port: 9090,
            ..count(2)
        },
    )?;
    let ran = cwkill(&lab, "--port 9090 --reclaim")?.exits(4)?;
    for text in [
        "descriptor kept: quiet for only",
        "2 descriptors: 0 freed, 2 skipped",
    ] {
        ensure!(ran.stdout.contains(text), "{text}: {ran:#?}");
    }
    let pid = more.app().pid();
    let ran = reclaim(&lab, pid, "")?.exits(0)?;
    for text in ["10.78.", "freed", "was stopped for"] {
        ensure!(ran.stdout.contains(text), "{text}: {ran:#?}");
    }
    reclaim(&lab, pid, "")?.exits(1)?;
    Ok(())
}

fn fds_of(pid: u32) -> Result<Vec<i32>> {
    let mut fds = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        fds.push(entry?.file_name().to_string_lossy().parse()?);
    }
    fds.sort_unstable();
    Ok(fds)
}

fn forked() -> Result<()> {
    let lab = Lab::new()?;
    let _leak = lab.start("forked", netns_harness::Family::V4, count(2))?;
    let ran = cwkill(&lab, "--all --reclaim --reclaim-age 0s --json")?.exits(0)?;
    let said = ran.json()?;
    same(&number(&said, "/reclaim/summary/freed")?, &6)?;
    same(
        &said["reclaim"]["owners"].as_array().map(Vec::len),
        &Some(3),
    )
}

/// An owner in `mode` is reclaimed over and over, and finds nothing wrong with itself.
fn over_and_over(build: Build, mode: &str, times: usize) -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), build, mode, 4)?;
    let before = owner.descriptors()?;
    for run in 0..times {
        let fds = match run % 2 {
            0 => owner.leak(5)?,
            _ => owner.scatter(5)?,
        };
        let ran = reclaim(&lab, owner.pid(), "--json")?.exits(0)?;
        same(&number(&ran.json()?, "/summary/freed")?, &5)?;
        let open = owner.descriptors()?;
        ensure!(
            !fds.iter().any(|fd| open.contains(fd)),
            "{fds:?} of {open:?}"
        );
    }
    let checks = owner.report()?;
    // And it still moves.
    lab.wait_for(PATIENCE, || Ok(mode == "idle" || owner.report()? > checks))?;
    let open = owner.descriptors()?;
    ensure!(
        before.iter().all(|fd| open.contains(fd)),
        "{before:?} of {open:?}"
    );
    Ok(())
}

fn waits() -> Result<()> {
    over_and_over(Build::Plain, "waits", 25)
}

fn works() -> Result<()> {
    over_and_over(Build::Plain, "works", 25)
}

fn static_stripped() -> Result<()> {
    over_and_over(Build::StaticStripped, "works", 10)?;
    over_and_over(Build::StaticStripped, "idle", 10)
}

fn stopped() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "works", 1)?;
    owner.leak(3)?;
    owner.signal(Signal::SIGSTOP)?;
    let is_stopped = || Ok(states(owner.pid())?.iter().all(|state| *state == 'T'));
    lab.wait_for(PATIENCE, is_stopped)?;
    let ran = reclaim(&lab, owner.pid(), "--json")?.exits(0)?;
    same(&number(&ran.json()?, "/summary/freed")?, &3)?;
    lab.wait_for(PATIENCE, is_stopped)?;
    owner.signal(Signal::SIGCONT)?;
    let checks = owner.report()?;
    lab.wait_for(PATIENCE, || Ok(owner.report()? > checks))
}

/// The states of its threads.
fn states(pid: u32) -> Result<Vec<char>> {
    let mut states = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let stat = std::fs::read_to_string(entry?.path().join("stat"))?;
        let state = stat
            .rsplit_once(") ")
            .and_then(|(_, rest)| rest.chars().next());
        states.push(state.context("no state")?);
    }
    Ok(states)
}

fn nothing_changes() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "idle", 2)?;
    let fds = owner.leak(3)?;
    let before = owner.descriptors()?;
    for more in [
        "-n",
        "--dry-run --json",
        "--dryrun --reclaim-force",
        "-n -v",
        "-n --jsonl",
    ] {
        reclaim(&lab, owner.pid(), more)?.exits(0)?;
        same(&owner.descriptors()?, &before)?;
    }
    cwkill(&lab, "reclaim --help")?.exits(0)?;
    let ran = reclaim(&lab, owner.pid(), "-n --json")?;
    let said = descriptors(&ran)?;
    same(&said.len(), &3)?;
    for (one, fd) in said.iter().zip(&fds) {
        same(&at(one, "/fd"), &fd.to_string())?;
        same(&at(one, "/pid"), &owner.pid().to_string())?;
        same(&at(one, "/safe"), &"true".to_owned())?;
        same(&at(one, "/dead_by"), &"state-close".to_owned())?;
        same(&at(one, "/local/address"), &"127.0.0.1".to_owned())?;
        ensure!(number(one, "/quiet_ms")? < 60_000, "{one}");
    }
    same(&number(&ran.json()?, "/summary/found")?, &3)
}

fn epoll() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "epoll", 1)?;
    let fds = owner.leak(3)?;
    let ran = reclaim(&lab, owner.pid(), "--json")?.exits(4)?;
    left(
        &ran,
        &mut owner,
        &fds,
        "skipped",
        "in the epoll set of descriptor",
    )?;
    let dry = descriptors(&reclaim(&lab, owner.pid(), "-n --json")?)?;
    same(&at(&dry[0], "/safe"), &"false".to_owned())?;
    let ran = reclaim(&lab, owner.pid(), "--reclaim-force --json")?.exits(0)?;
    same(&number(&ran.json()?, "/summary/freed")?, &3)
}

fn in_a_call() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "splice", 1)?;
    let fds = owner.leak(2)?;
    lab.wait_for(PATIENCE, || {
        let splicing = |path: std::path::PathBuf| {
            std::fs::read_to_string(path.join("syscall"))
                .is_ok_and(|call| call.starts_with(&format!("{} ", libc::SYS_splice)))
        };
        let tasks = std::fs::read_dir(format!("/proc/{}/task", owner.pid()))?;
        Ok(tasks.flatten().filter(|task| splicing(task.path())).count() == 2)
    })?;
    let ran = reclaim(&lab, owner.pid(), "--json")?.exits(4)?;
    left(
        &ran,
        &mut owner,
        &fds,
        "skipped",
        "is inside a system call on it",
    )
}

fn shares() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "shares", 1)?;
    let fds = owner.leak(2)?;
    let ran = reclaim(&lab, owner.pid(), "--json")?.exits(4)?;
    let why = "shares the table of descriptors with process";
    left(&ran, &mut owner, &fds, "skipped", why)?;
    let ran = reclaim(&lab, owner.pid(), "--reclaim-force --json")?.exits(4)?;
    left(&ran, &mut owner, &fds, "skipped", why)
}

/// The threads wait for a lock, so one of them would be the first choice.
fn unshared() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "unshared", 4)?;
    let fds = owner.leak(3)?;
    let ran = reclaim(&lab, owner.pid(), "--json")?.exits(0)?;
    same(&number(&ran.json()?, "/summary/freed")?, &3)?;
    let open = owner.descriptors()?;
    ensure!(
        fds.iter().all(|fd| !open.contains(fd)),
        "{fds:?} of {open:?}"
    );
    owner.report()?;
    Ok(())
}

fn young() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "idle", 1)?;
    let fds = owner.leak(2)?;
    let line = format!("reclaim --pid {} --json", owner.pid());
    let ran = cwkill(&lab, &line)?.exits(4)?;
    left(&ran, &mut owner, &fds, "skipped", "quiet for only")?;
    let ran = cwkill(&lab, &format!("{line} --reclaim-force"))?.exits(0)?;
    same(&number(&ran.json()?, "/summary/freed")?, &2)
}

/// What looks dead to other tools: a socket that its program is about to connect.
fn living() -> Result<()> {
    let lab = Lab::new()?;
    let agent = lab.app_host().agent("fresh")?;
    let address = "127.0.0.1:7000".parse()?;
    let _listener = agent.listen(address, false, 16)?;
    let other = lab.app_host().agent("peer")?;
    other.connect(address, 1, netns_harness::Dial::default(), PATIENCE)?;
    agent.accept(_listener, 1, PATIENCE)?;
    for pid in [agent.pid(), other.pid()] {
        let before = fds_of(pid)?;
        reclaim(&lab, pid, "--reclaim-force")?.exits(1)?;
        same(&fds_of(pid)?, &before)?;
    }
    // Churn makes sockets that were never connected; see there.
    Ok(())
}

fn seccomp() -> Result<()> {
    let lab = Lab::new()?;
    for (mode, outcome) in [("kill", None), ("errno", None), ("log", Some(2))] {
        let mut owner = Owner::start(lab.app_host(), Build::Plain, mode, 1)?;
        let fds = owner.leak(2)?;
        let ran = reclaim(&lab, owner.pid(), "--json")?;
        let freed = number(&ran.json()?, "/summary/freed")?;
        match outcome {
            Some(wanted) if is_root_of_the_machine() => same(&freed, &wanted)?,
            // Not even root of a user namespace may read a filter.
            _ => {
                let why = match is_root_of_the_machine() {
                    true => "seccomp filter of its process does not let close() through",
                    false => "seccomp filter that cannot be read",
                };
                left(&ran, &mut owner, &fds, "skipped", why).context(mode)?;
            }
        }
        ensure!(owner.is_alive(), "{mode}");
        owner.report()?;
    }
    Ok(())
}

/// Not that of a user namespace: PTRACE_SECCOMP_GET_FILTER asks for CAP_SYS_ADMIN of the machine.
fn is_root_of_the_machine() -> bool {
    std::fs::read_to_string("/proc/self/uid_map").is_ok_and(|map| map.contains("4294967295"))
}

fn traced() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "traced", 1)?;
    let fds = owner.leak(1)?;
    for force in ["", "--reclaim-force"] {
        let ran = reclaim(&lab, owner.pid(), &format!("--json {force}"))?.exits(4)?;
        left(&ran, &mut owner, &fds, "skipped", "traced by its-tracer/")?;
    }
    Ok(())
}

/// A thread that waits for its vfork() stops for nobody.
fn limit() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "vfork", 1)?;
    let fds = owner.leak(1)?;
    lab.wait_for(PATIENCE, || Ok(states(owner.pid())?.contains(&'D')))?;
    for _ in 0..3 {
        owner.longest_gap()?;
        let began = Instant::now();
        let line = format!(
            "reclaim --pid {} --reclaim-age 0s --stop-limit 50ms --json",
            owner.pid()
        );
        let ran = cwkill(&lab, &line)?.exits(4)?;
        let took = began.elapsed();
        left(&ran, &mut owner, &fds, "failed", "did not stop within 50ms")?;
        let gap = owner.longest_gap()?;
        ensure!(
            gap >= Duration::from_millis(40),
            "it was not stopped: {gap:?}"
        );
        ensure!(gap <= took, "{gap:?} of {took:?}");
    }
    // Nothing is left of us.
    lab.wait_for(PATIENCE, || Ok(!is_traced(owner.pid())))
}

fn pid_namespace() -> Result<()> {
    let lab = Lab::new()?;
    // The program is reached by a descriptor: processes of ours are out of reach for root of the new
    // user namespace.
    let script = "exec 9<$1; shift; exec unshare --user --map-root-user --pid --fork --mount --kill-child \
                  /proc/self/fd/9 $@";
    let by = ["sh", "-c", script, "sh"];
    let program = Owner::program(Build::Plain)?;
    let mut owner = Owner::start_by(lab.app_host(), &by, &program, "works", 1)?;
    owner.leak(3)?;
    let children = format!("/proc/{0}/task/{0}/children", owner.pid());
    let inner: u32 = std::fs::read_to_string(children)?.trim().parse()?;
    let ran = reclaim(&lab, inner, "--json")?.exits(0)?;
    same(&number(&ran.json()?, "/summary/freed")?, &3)?;
    owner.report()?;
    Ok(())
}

fn unprivileged() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "idle", 1)?;
    owner.leak(2)?;
    let before = owner.descriptors()?;
    let line = format!("reclaim --pid {} --reclaim-age 0s", owner.pid());
    let command = lab.app_host().command(CWKILL).args(line.split_whitespace());
    let ran = ran(command.capabilities(&[]))?.exits(4)?;
    // Of a process with the same uid the table can be seen and nothing be touched.
    ran.complains("could not be looked")?
        .complains("CAP_SYS_PTRACE")?;
    same(&owner.descriptors()?, &before)
}

/// What `cwkill reclaim` would be given of one process.
fn wanted(owner: &Owner) -> Result<(Vec<Process>, Vec<Wanted>)> {
    let pid = i32::try_from(owner.pid())?;
    let scan = dead::find(
        &Proc::default(),
        &|process| process.pid == pid,
        &HashSet::new(),
    )?;
    let table = scan.tables.into_iter().next().context("no such process")?;
    let wanted = table
        .suspects
        .iter()
        .filter_map(|suspect| match suspect.verdict {
            Verdict::Dead(socket) => Some(Wanted {
                owner: 0,
                fd: suspect.fd,
                inode: suspect.inode,
                cookie: socket.cookie,
                age: Some(socket.quiet),
            }),
            _ => None,
        });
    Ok((vec![table.process], wanted.collect()))
}

const RULES: Rules = Rules {
    age: Duration::ZERO,
    force: false,
    stop_limit: Duration::from_secs(1),
};

fn is_traced(pid: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"));
    status.is_ok_and(|status| !status.contains("TracerPid:\t0\n"))
}

/// A bug of ours after so many descriptors, while the owner stands still.
fn panics() -> Result<()> {
    for mode in ["works", "waits"] {
        let lab = Lab::new()?;
        let mut owner = Owner::start(lab.app_host(), Build::Plain, mode, 1)?;
        for after in 0..10 {
            owner.scatter(10)?;
            let (owners, wanted) = wanted(&owner)?;
            let (pid, asked) = (owner.pid(), AtomicU32::new(0));
            let bug = || {
                if is_traced(pid) && asked.fetch_add(1, Ordering::Relaxed) >= after {
                    // Without the message of a panic.
                    std::panic::resume_unwind(Box::new("a bug made for the test"));
                }
                false
            };
            let done = cwkill::reclaim::reclaim(&owners, &wanted, &RULES, &Proc::default(), &bug);
            let failed = done
                .fates
                .iter()
                .filter(|fate| matches!(fate, Fate::Failed(_)));
            ensure!(failed.count() > 0, "{done:?}");
            ensure!(!is_traced(owner.pid()), "{mode}, after {after}");
            owner
                .report()
                .with_context(|| format!("{mode}, after {after}"))?;
            let checks = owner.report()?;
            lab.wait_for(PATIENCE, || Ok(owner.report()? > checks))?;
        }
    }
    Ok(())
}

fn interrupted() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "works", 1)?;
    owner.scatter(10)?;
    let (owners, wanted) = wanted(&owner)?;
    let (pid, asked) = (owner.pid(), AtomicU32::new(0));
    // Asked before each descriptor, and at other times.
    let stop = || is_traced(pid) && asked.fetch_add(1, Ordering::Relaxed) >= 3;
    let done = cwkill::reclaim::reclaim(&owners, &wanted, &RULES, &Proc::default(), &stop);
    let freed = done
        .fates
        .iter()
        .filter(|fate| matches!(fate, Fate::Freed))
        .count();
    same(&freed, &3)?;
    ensure!(
        format!("{:?}", done.fates[9]).contains("Interrupted"),
        "{done:?}"
    );
    let checks = owner.report()?;
    lab.wait_for(PATIENCE, || Ok(owner.report()? > checks))?;

    // The signals of an operator, at any time.
    let signals = [
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGHUP,
        Signal::SIGTSTP,
    ];
    for (number, signal) in (0..40).zip(signals.iter().cycle()) {
        owner.scatter(20)?;
        kill_after(&lab, &owner, *signal, Duration::from_micros(number * 50))?;
        owner.report()?;
    }
    Ok(())
}

/// Starts `cwkill reclaim`, and sends it a signal so long after it has begun to stop the owner; waits for its
/// end.
fn kill_after(lab: &Lab, owner: &Owner, signal: Signal, delay: Duration) -> Result<()> {
    let line = format!("reclaim --pid {} --reclaim-age 0s -q", owner.pid());
    let mut child = lab
        .app_host()
        .command(CWKILL)
        .args(line.split_whitespace())
        .spawn()?;
    let until = Instant::now() + PATIENCE;
    while !is_traced(owner.pid()) && child.try_wait()?.is_none() {
        ensure!(Instant::now() < until, "it does not come to stop the owner");
    }
    let until = Instant::now() + delay;
    while Instant::now() < until {
        std::hint::spin_loop();
    }
    let pid = child.id().to_string();
    let send = |signal: Signal| {
        let name = signal.as_str().trim_start_matches("SIG");
        // It may have ended by itself.
        let _ = std::process::Command::new("kill")
            .args(["-s", name, &pid])
            .stderr(std::process::Stdio::null())
            .status();
    };
    send(signal);
    if signal == Signal::SIGTSTP {
        // Before and after the act it stops like any program, but never while the owner stands still.
        lab.wait_for(PATIENCE, || Ok(!is_traced(owner.pid())))?;
    }
    let until = Instant::now() + PATIENCE;
    while child.try_wait()?.is_none() {
        if Instant::now() > until {
            let _ = child.kill();
            bail!("{signal} does not end it");
        }
        if signal == Signal::SIGTSTP {
            // It may only be about to stop.
            send(Signal::SIGCONT);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// At many points of its work, most of them while the owner stands still. Its threads may see a wake-up
/// without cause (docs/decisions/reclaim.md), as every program has to expect; so not the owner that waits.
fn killed() -> Result<()> {
    let lab = Lab::new()?;
    let (mut begun, mut whole) = (0, 0);
    for mode in ["works", "idle"] {
        let mut owner = Owner::start(lab.app_host(), Build::Plain, mode, 4)?;
        for number in 0..30u64 {
            let fds = owner.scatter(60)?;
            kill_after(
                &lab,
                &owner,
                Signal::SIGKILL,
                Duration::from_micros(number * 240),
            )?;
            let open = owner.descriptors()?;
            let left = fds.iter().filter(|fd| open.contains(fd)).count();
            begun += usize::from(left > 0 && left < fds.len());
            whole += usize::from(left == 0);
            ensure!(owner.is_alive(), "{mode}: the owner died");
            owner.report().context(mode)?;
            reclaim(&lab, owner.pid(), "-q")?;
        }
        let checks = owner.report()?;
        lab.wait_for(PATIENCE, || Ok(mode == "idle" || owner.report()? > checks))?;
    }
    // Otherwise it was killed too early or too late each time.
    ensure!(
        begun >= 3,
        "{begun} were killed between two descriptors, {whole} after the last"
    );
    Ok(())
}

const CHURNING: usize = 4;

fn churn() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "churn", CHURNING)?;
    let (mut freed, mut gone) = (0, 0);
    for run in 0..60 {
        let force = if run % 2 == 0 { "" } else { "--reclaim-force" };
        let said = reclaim(&lab, owner.pid(), &format!("--json {force}"))?.json()?;
        freed += number(&said, "/summary/freed")?;
        gone += number(&said, "/summary/gone")?;
        owner.report().with_context(|| format!("run {run}"))?;
    }
    // There was something to get wrong.
    ensure!(freed >= 20 && gone >= 20, "{freed} freed, {gone} gone");
    lab.wait_for(PATIENCE, || {
        Ok(owner.order("taken")?.parse::<u64>()? >= freed)
    })
}

/// The same without the look at what a number is by then.
fn wrong_reclaimer() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "churn", CHURNING)?;
    for _ in 0..200 {
        for one in descriptors(&reclaim(&lab, owner.pid(), "-n --json")?)? {
            owner.order(&format!("close {}", at(&one, "/fd")))?;
        }
        if let Err(error) = owner.report() {
            ensure!(error.to_string().contains("descriptor"), "{error:#}");
            return Ok(());
        }
    }
    bail!("the owner lost descriptors and did not notice")
}
