//! The kernel's iterator over all descriptors: it finds the owners that /proc shows.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader};
use std::process::Stdio;

use anyhow::{Context, Result};
use netns_harness::owners::{Build, Owner};
use netns_harness::{Capability, Family, Lab, scenario};
use serde_json::Value;

use crate::doctor::without;
use crate::support::{CWKILL, PATIENCE, Ran, at, count, cwkill, lab, leaderless, ran};
use crate::trial::{Need, Test, each_family, once};

pub const TESTS: &[Test] = &[
    once!(the_kernel_accepts_the_program).needs(Need::Iterator),
    each_family!(both_ways_find_the_same_owners).needs(Need::Iterator),
    once!(both_ways_find_the_same_owners_on_a_busy_host).needs(Need::Iterator),
    once!(both_ways_find_the_owners_of_every_namespace).needs(Need::Iterator),
    once!(both_ways_see_how_owners_wait).needs(Need::Iterator),
    each_family!(pids_are_those_of_the_own_pid_namespace).needs(Need::Iterator),
    each_family!(start_times_are_those_of_the_own_time_namespace).needs(Need::Iterator),
    each_family!(an_owner_in_an_inner_pid_namespace_is_found).needs(Need::Iterator),
    once!(a_process_without_its_first_thread_is_found).needs(Need::Iterator),
    once!(a_copy_in_the_table_of_a_thread_is_found).needs(Need::Iterator),
    once!(an_owner_that_executes_programs_is_found).needs(Need::Iterator),
    once!(two_capabilities_show_the_owners_of_all_users).needs(Need::Iterator),
    once!(without_the_iterator_proc_is_read),
];

/// All states but LISTEN.
const STATES: &str =
    "close-wait,established,syn-sent,syn-recv,fin-wait-1,fin-wait-2,time-wait,last-ack,closing";

/// The owners of each socket, its listener, and why cwkill spares it, by cookie.
#[track_caller]
fn owners(ran: &Ran) -> BTreeMap<String, [Value; 3]> {
    let facts = |socket: &Value| {
        let names = ["owners", "listener", "skip"];
        (
            at(socket, "/cookie"),
            names.map(|name| socket[name].clone()),
        )
    };
    ran.sockets().iter().map(facts).collect()
}

/// Runs cwkill both ways; asserts that the owners are the same, and returns them.
fn compared(run: &dyn Fn(&str) -> Result<Ran>) -> Result<BTreeMap<String, [Value; 3]>> {
    let by_proc = run("--bpf never")?.exits(0);
    let by_iterator = run("--bpf always")?.exits(0);
    assert_eq!(owners(&by_proc), owners(&by_iterator));
    // Root cannot read every process from /proc, if a security module forbids it.
    assert_eq!(at(&by_iterator.json(), "/unreadable_processes"), "0");
    Ok(owners(&by_iterator))
}

/// The number of sockets with a known owner.
fn owned(owners: &BTreeMap<String, [Value; 3]>) -> usize {
    let has_owner = |facts: &&[Value; 3]| facts[0].as_array().is_some_and(|it| !it.is_empty());
    owners.values().filter(has_owner).count()
}

fn the_kernel_accepts_the_program() -> Result<()> {
    let lab = Lab::new()?;
    let findings = cwkill(&lab, "doctor --json")?.json();
    let checks = findings["checks"].as_array().context("no checks")?;
    let line = checks
        .iter()
        .find(|line| line["name"] == "owners by iterator");
    assert_eq!(line.context("no such line")?["ok"], true, "{findings:#}");
    Ok(())
}

fn both_ways_find_the_same_owners(family: Family) -> Result<()> {
    let mut with_owner = 0;
    for scenario in scenario::listed() {
        let lab = Lab::new()?;
        let leak = lab.start(scenario.name, family, count(2));
        let _leak = leak.with_context(|| scenario.name)?;
        let line = format!("-n --all --json --state {STATES}");
        let found = compared(&|way| cwkill(&lab, &format!("{line} {way}")))?;
        assert!(!found.is_empty(), "{}", scenario.name);
        with_owner += owned(&found);
    }
    assert!(with_owner > 20, "{with_owner}");
    Ok(())
}

/// Opens and closes descriptors in a table of up to 15,000, at numbers all over it, and starts and ends processes, until its input ends.
const BUSY: &str = "
import os, random, resource, select, socket
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
null = os.open('/dev/null', os.O_RDONLY)
table = [os.dup(null) for _ in range(min(15000, most - 100))]
print('busy', flush=True)
while not select.select([0], [], [], 0)[0]:
    for _ in range(200):
        at = random.randrange(len(table))
        os.close(table[at])
        table[at] = random.choice([lambda: os.dup(null), lambda: socket.socket().detach()])()
    child = os.fork()
    if child == 0:
        os.closerange(0, 5000)
        os._exit(0)
    os.waitpid(child, 0)
";

fn both_ways_find_the_same_owners_on_a_busy_host() -> Result<()> {
    let (lab, _leak) = lab("forked", Family::V4, 20)?;
    let python = lab.app_host().command("python3").args(["-c", BUSY]);
    let mut busy = (python.stdin(Stdio::piped()))
        .stdout(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    BufReader::new(busy.stdout.take().context("no output")?).read_line(&mut line)?;
    assert_eq!(line, "busy\n");
    for _ in 0..10 {
        let found = compared(&|way| cwkill(&lab, &format!("-n --all --json {way}")))?;
        assert_eq!(owned(&found), 20);
    }
    assert_eq!(busy.try_wait()?, None, "it was busy all the time");
    drop(busy.stdin.take());
    assert!(busy.wait()?.success());
    Ok(())
}

fn both_ways_find_the_owners_of_every_namespace() -> Result<()> {
    let (here, _leak) = lab("unread", Family::V4, 2)?;
    let (_elsewhere, other) = lab("forked", Family::V6, 3)?;
    let pid = other.app().pid().to_string();
    let ways = |line: &str| compared(&|way| cwkill(&here, &format!("{line} {way}")));
    // Other tests run at the same time, so only the sockets of one process are looked at.
    let found = ways(&format!("-n --all-netns --pid {pid} --json"))?;
    assert_eq!(owned(&found), 3);
    let found = ways(&format!("-n -N {pid} --all --json"))?;
    assert_eq!(owned(&found), 3);
    assert_eq!(owned(&ways("-n --all --json")?), 2);
    Ok(())
}

/// This takes the epoll sets of the owners.
fn both_ways_see_how_owners_wait() -> Result<()> {
    for mode in ["loop-epoll-0", "loop-poll-0"] {
        let lab = Lab::new()?;
        let mut owner = Owner::start(lab.app_host(), Build::Plain, mode, 1)?;
        owner.leak_stuck(2)?;
        lab.wait_for(PATIENCE, || Ok(owner.wakes()? == 0))?;
        for selector in ["--all".to_owned(), format!("--pid {}", owner.pid())] {
            let line = format!("-n --json {selector}");
            let found = compared(&|way| cwkill(&lab, &format!("{line} {way}")))?;
            for facts in found.values() {
                assert_eq!(at(&facts[2], "/reason_code"), "would-spin", "{mode}");
            }
            assert_eq!(found.len(), 2);
        }
    }
    Ok(())
}

/// cwkill in a new pid namespace sees no process outside; the owner is outside.
fn pids_are_those_of_the_own_pid_namespace(family: Family) -> Result<()> {
    let (lab, _leak) = lab("drained", family, 2)?;
    let found = compared(&|way| {
        let unshare = "--pid --fork --kill-child --mount-proc";
        let command = lab.app_host().command("unshare");
        let command = command.args(unshare.split(' ')).arg(CWKILL);
        let line = format!("-n --all --json {way}");
        ran(command.args(line.split_whitespace()))
    })?;
    assert_eq!((found.len(), owned(&found)), (2, 0));
    Ok(())
}

/// /proc shows start times in the time namespace of its reader, and the iterator those of the kernel. An owner whose start times differ
/// would count as another process with its pid.
fn start_times_are_those_of_the_own_time_namespace(family: Family) -> Result<()> {
    let (lab, leak) = lab("drained", family, 2)?;
    let pid = leak.app().pid();
    for offset in ["100000", "-1"] {
        for line in ["--all".to_owned(), format!("--pid {pid}")] {
            let found = compared(&|way| {
                let unshare = format!("--time --boottime {offset} --fork --kill-child");
                let command = lab.app_host().command("unshare");
                let command = command.args(unshare.split(' ')).arg(CWKILL);
                let line = format!("-n {line} --min-idle 0s --json {way}");
                ran(command.args(line.split_whitespace()))
            })?;
            assert_eq!((found.len(), owned(&found)), (2, 2), "{offset} {line}");
        }
    }
    Ok(())
}

/// The owner has one pid inside and one outside.
fn an_owner_in_an_inner_pid_namespace_is_found(family: Family) -> Result<()> {
    let (lab, _leak) = lab("drained", family, 1)?;
    let script =
        "exec 9<$1; shift; exec unshare --pid --fork --mount-proc --kill-child /proc/self/fd/9 $@";
    let by = ["sh", "-c", script, "sh"];
    let program = Owner::program(Build::Plain)?;
    let mut owner = Owner::start_through(lab.app_host(), &by, &program, "idle", 1)?;
    owner.leak_stuck(2)?;
    let children = format!("/proc/{0}/task/{0}/children", owner.pid());
    let inner: u32 = std::fs::read_to_string(children)?.trim().parse()?;

    let pids = |found: &BTreeMap<String, [Value; 3]>| {
        let mut pids: Vec<String> = found.values().map(|it| at(&it[0], "/0/pid")).collect();
        pids.retain(|pid| *pid == inner.to_string());
        pids.len()
    };
    let outside = compared(&|way| cwkill(&lab, &format!("-n --all --json {way}")))?;
    assert_eq!((owned(&outside), pids(&outside)), (3, 2));
    // The process has pid 1 there. The other owner is not seen.
    let inside = compared(&|way| {
        let line = format!("--target {inner} --pid --mount {CWKILL} -n --all --json {way}");
        let command = lab.app_host().command("nsenter");
        ran(command.args(line.split_whitespace()))
    })?;
    assert_eq!((inside.len(), owned(&inside)), (3, 2));
    for facts in inside
        .values()
        .filter(|facts| facts[0] != Value::Array(Vec::new()))
    {
        assert_eq!(at(&facts[0], "/0/pid"), "1");
    }
    Ok(())
}

/// /proc/PID/fd is empty for it.
fn a_process_without_its_first_thread_is_found() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = leaderless(&lab)?;
    owner.leak_stuck(2)?;
    let found = compared(&|way| cwkill(&lab, &format!("-n --all --json {way}")))?;
    assert_eq!(owned(&found), 2);
    Ok(())
}

fn a_copy_in_the_table_of_a_thread_is_found() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "idle", 1)?;
    owner.leak_stuck(2)?;
    owner.order("copy")?;
    let found = compared(&|way| cwkill(&lab, &format!("-n --all --json {way}")))?;
    for facts in found.values() {
        assert_eq!(facts[0].as_array().map(Vec::len), Some(2), "{facts:?}");
        assert_ne!(at(&facts[0], "/1/thread"), "(nothing there)");
    }
    assert_eq!(found.len(), 2);
    Ok(())
}

/// A thread that executes a program takes the place of the first, and its table with it.
fn an_owner_that_executes_programs_is_found() -> Result<()> {
    const RUNS: usize = 50;
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "execs", 8)?;
    let began = owner.report()?;
    owner.leak_stuck(2)?;
    let mut missed = Vec::new();
    for _ in 0..RUNS {
        let ran = cwkill(&lab, "--json --bpf always")?.exits(0);
        let pid = owner.pid().to_string();
        let sockets = ran.sockets();
        assert_eq!(sockets.len(), 2);
        if !sockets.iter().all(|it| at(it, "/owners/0/pid") == pid) {
            missed.push(ran);
        }
    }
    // Both passes must hit the moment in which the thread becomes the first one.
    assert!(missed.len() < RUNS / 10, "{missed:?}");
    let execs = owner.report()? - began;
    assert!(execs >= 30, "{execs}");
    Ok(())
}

/// A user without any privilege.
const NOBODY: u32 = 65534;

/// With CAP_BPF and CAP_PERFMON, cwkill sees owners that /proc does not show to it. With one of them it cannot use the iterator.
fn two_capabilities_show_the_owners_of_all_users() -> Result<()> {
    use Capability::{CAP_BPF, CAP_PERFMON};
    let (lab, leak) = lab("unread", Family::V4, 1)?;
    let run = |capabilities: &[Capability], arguments: &str| {
        let command = lab.app_host().command(CWKILL).uid(NOBODY);
        ran(command
            .capabilities(capabilities)
            .args(arguments.split_whitespace()))
    };
    let both = [CAP_BPF, CAP_PERFMON];
    let sockets = run(&both, "--json --bpf always")?.exits(0).sockets();
    assert_eq!(
        at(&sockets[0], "/owners/0/pid"),
        leak.app().pid().to_string()
    );
    let sockets = run(&both, "--json --bpf never")?.exits(0).sockets();
    assert_eq!(at(&sockets[0], "/owners/0/pid"), "(nothing there)");
    for one in [CAP_BPF, CAP_PERFMON] {
        run(&[one], "--json --bpf always")?
            .exits(3)
            .complains("cannot use the iterator (--bpf always)");
        run(&[one], "--json")?.exits(0);
    }
    Ok(())
}

/// A seccomp filter refuses bpf(2), as that of a container does.
fn without_the_iterator_proc_is_read() -> Result<()> {
    let (lab, leak) = lab("unread", Family::V4, 1)?;
    let pid = leak.app().pid().to_string();
    let run = |arguments: &str| {
        let command = without(&lab, "bpf")?;
        ran(command.args(arguments.split_whitespace()))
    };
    for way in ["", "--bpf auto", "--bpf never"] {
        let sockets = run(&format!("--json {way}"))?.exits(0).sockets();
        assert_eq!(at(&sockets[0], "/owners/0/pid"), pid, "{way}");
    }
    for command in ["", "diagnose", "check -w 1 -c 2"] {
        let ran = run(&format!("{command} --bpf always"))?.exits(3);
        let said = format!("{}{}", ran.stdout, ran.stderr);
        assert!(
            said.contains("cannot use the iterator (--bpf always)"),
            "{said}"
        );
        assert!(said.contains("bpf(2) refuses"), "{said}");
    }
    let findings = run("doctor --json")?.json();
    let checks = findings["checks"].to_string();
    assert!(checks.contains("from /proc instead"), "{checks}");
    Ok(())
}
