//! `cwkill diagnose`: which process leaks and why, compared with the kernel's own information.

pub mod ends;
pub mod verdicts;

use std::process::Stdio;

use anyhow::{Context, Result};
use netns_harness::{Dial, Family, How, Lab, Options, Recv, SocketOption, TcpState};
use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};

use crate::support::{
    CWKILL, PATIENCE, Ran, alone, at, connections, count, cwkill, in_state, lab, ran,
    until_it_sleeps,
};
use crate::trial::{Test, each_family, once};

pub const TESTS: &[Test] = &[
    each_family!(each_cause_has_its_verdict),
    each_family!(dead_descriptors_are_counted),
    each_family!(half_closed_streams_are_not_a_leak),
    each_family!(only_selected_processes_are_reported),
    once!(outgoing_and_accepted_connections_have_their_own_verdicts),
    once!(a_busy_listener_does_not_hide_the_leaker),
    once!(many_sockets_never_connected_are_reported),
    once!(unix_sockets_are_not_dead),
    once!(unreadable_descriptors_are_unknown),
    once!(growth_is_counted_by_cookie),
    once!(shared_sockets_count_for_each_owner),
    once!(without_privileges_missing_information_is_reported),
    each_family!(connections_at_a_listener_of_an_unknown_owner_count_once),
    once!(a_runtime_and_a_sleeping_thread_are_named),
    once!(bars_need_a_known_width),
    once!(a_closed_pipe_is_not_an_error),
    once!(a_named_process_is_reported_after_its_cure),
    once!(more_descriptors_than_the_limit_are_explained),
];

const QUICK: &str = "--sample 50ms --json";

/// The block of one process, or of one listener by its port.
fn block<'a>(document: &'a Value, list: &str, key: &str, value: u64) -> Result<&'a Value> {
    let blocks = document[list].as_array().context("no list")?;
    let found = blocks.iter().find(|block| block[key] == json!(value));
    found.with_context(|| format!("nothing of {value} in {document:#}"))
}

fn process(document: &Value, pid: u32) -> Result<&Value> {
    block(document, "processes", "pid", pid.into())
}

/// The group has this cause alone, with this count and a verdict that contains this text.
#[track_caller]
fn only_cause(group: &Value, cause: &str, sockets: u64, verdict: &str) {
    let causes = group["causes"].as_object().expect("causes");
    assert_eq!(causes.keys().collect::<Vec<_>>(), [cause]);
    assert_eq!(causes[cause]["count"], json!(sockets));
    let text = at(&causes[cause], "/verdict");
    assert!(text.contains(verdict), "{text}");
}

fn each_cause_has_its_verdict(family: Family) -> Result<()> {
    let lab = Lab::new()?;
    let drained = lab.start("drained", family, alone(8001, 5))?;
    let unread = lab.start("unread", family, alone(8002, 4))?;
    let sending = lab.start("sending", family, alone(8003, 3))?;
    let never = lab.start("not-accepted", family, alone(8004, 2))?;
    let stopped = lab.start("stopped", family, alone(8005, 1))?;
    let bystanders = lab.start("established", family, alone(8006, 6))?;
    let before = lab.app_host().ss(&[])?;

    let document = cwkill(&lab, &format!("diagnose {QUICK}"))?.exits(0).json();
    assert_eq!(document["schema_version"], json!(1));
    assert_eq!(document["total"]["stuck"], json!(15));
    let cases = [
        (
            &drained,
            "drained",
            5,
            "a leak in the code that handles :8001",
        ),
        (&unread, "unread", 4, "not reading"),
        (&sending, "sending", 3, "check the peers"),
        (&stopped, "drained", 1, "no verdict: its process is stopped"),
    ];
    for (leak, cause, sockets, verdict) in cases {
        let pid = leak.app().pid();
        let process = process(&document, pid)?;
        only_cause(process, cause, sockets, verdict);
        let peer = leak.pair().peer_address.to_string();
        assert_eq!(
            process["peers"],
            json!([{"address": peer, "count": sockets}])
        );
        let port = leak.pair().app_address.port();
        assert_eq!(process["ports"], json!([{"port": port, "count": sockets}]));
        let open = std::fs::read_dir(format!("/proc/{pid}/fd"))?.count();
        assert_eq!(process["descriptors"]["used"], json!(open));
        assert_eq!(process["descriptors"]["dead"], json!(0));
        let limits = std::fs::read_to_string(format!("/proc/{pid}/limits"))?;
        let files = limits
            .lines()
            .find(|line| line.starts_with("Max open files"));
        let soft = files.and_then(|line| line.split_whitespace().nth(3));
        assert_eq!(
            at(process, "/descriptors/limit"),
            soft.context("no limit")?.to_owned()
        );
        let command = at(process, "/next/command");
        match leak.scenario().name {
            "stopped" => assert_eq!(command, format!("kill -CONT {pid}")),
            _ => assert!(command.starts_with(&format!("gdb -p {pid} ")), "{command}"),
        }
        // Only one of them has read the end. The others wait, or have not come so far.
        let trace = match leak.scenario().name {
            "drained" => json!(format!("cwkill trace --pid {pid} --for 1m")),
            _ => json!(null),
        };
        assert_eq!(process["trace"]["command"], trace);
    }
    let frozen = process(&document, stopped.app().pid())?;
    assert_eq!(frozen["condition"], json!("stopped"));
    assert_eq!(frozen["state"], json!("T"));

    let listener = block(&document, "listeners", "port", 8004)?;
    only_cause(listener, "not-accepted", 2, "only accept(2) does");
    assert_eq!(listener["stalled"], json!(true));
    assert_eq!(listener["owners"], json!([never.app().pid()]));
    let rows = lab.app_host().ss(&["sport", "=", ":8004"])?;
    let row = rows.iter().find(|row| row.state == TcpState::Listen);
    let row = row.context("the listener is gone")?;
    assert_eq!(listener["waiting"], json!(row.recv_q));
    assert_eq!(listener["backlog"], json!(row.send_q));
    let waits = process(&document, never.app().pid())?;
    assert_eq!((&waits["stuck"], &waits["waiting"]), (&json!(0), &json!(2)));
    assert!(process(&document, bystanders.app().pid()).is_err());

    let text = cwkill(&lab, "diagnose --sample 50ms")?.exits(0).stdout;
    for wanted in [
        "15 sockets stuck: 2 not-accepted, 3 sending, 4 unread, 6 drained; none new".to_owned(),
        format!("leaky-app/{}: 5 stuck", drained.app().pid()),
        "5 drained: reads to the end and never closes: a leak in the code that handles :8001"
            .into(),
        "4 unread: not reading: idle pool or blocked worker".into(),
        "3 sending: ".into(),
        "2 not-accepted: not accepting: closing them frees no slot".into(),
        "stopped by a signal".into(),
        format!("of leaky-app/{}: 2 stuck", never.app().pid()),
    ] {
        assert!(text.contains(&wanted), "wanted {wanted:?} in\n{text}");
    }
    // It has changed no socket. Queues are not compared, because data may have moved on.
    let key = |rows: &[netns_harness::SsRow]| -> Vec<_> {
        rows.iter().map(|row| (row.cookie, row.state)).collect()
    };
    assert_eq!(key(&lab.app_host().ss(&[])?), key(&before));
    Ok(())
}

/// A server that leaks three connections that it has opened and one that it has accepted.
fn outgoing_and_accepted_connections_have_their_own_verdicts() -> Result<()> {
    let lab = Lab::new()?;
    let app = lab.app_host().agent("server")?;
    let other = lab.app_host().agent("database")?;
    let (own, database) = ("127.0.0.1:7000".parse()?, "127.0.0.1:5432".parse()?);
    let listeners = (
        app.listen(own, false, 16)?,
        other.listen(database, false, 16)?,
    );
    let clients = other.connect(own, 1, Dial::default(), PATIENCE)?;
    let mut leaked = app.accept(listeners.0, 1, PATIENCE)?;
    leaked.extend(app.connect(database, 3, Dial::default(), PATIENCE)?);
    let mut closing = other.accept(listeners.1, 3, PATIENCE)?;
    closing.extend(clients);
    let closing: Vec<_> = closing.iter().map(|end| end.fd).collect();
    other.shutdown(&closing, How::Write)?;
    for end in &leaked {
        assert_eq!(app.recv(end.fd, 1, PATIENCE)?, Recv::Eof);
    }
    let document = cwkill(&lab, &format!("diagnose {QUICK}"))?.exits(0).json();
    let server = process(&document, app.pid())?;
    let verdict = "in the code that calls :5432 (3) and that handles :7000 (1)";
    only_cause(server, "drained", 4, verdict);
    assert_eq!(server["peer_ports"][0], json!({"port": 5432, "count": 3}));
    let text = cwkill(&lab, "diagnose --sample 50ms")?.exits(0).stdout;
    assert!(text.contains("; their ports :5432 (3), "), "{text}");
    Ok(())
}

/// Counts of descriptors: dead, never connected, unknown.
fn suspects(document: &Value, pid: u32) -> Result<[Value; 3]> {
    let descriptors = &process(document, pid)?["descriptors"];
    let one = |kind: &str| descriptors[kind].clone();
    Ok(["dead", "never_connected", "unknown"].map(one))
}

fn dead_descriptors_are_counted(family: Family) -> Result<()> {
    let (lab, leak) = lab("established", family, 3)?;
    let open = lab.start("established", family, count(2))?;
    // A reset by the peer ends them.
    leak.peer()
        .set_option(&leak.peer_fds(), SocketOption::Linger(Some(0)))?;
    leak.peer().close(&leak.peer_fds())?;
    lab.wait_for(PATIENCE, || Ok(in_state(&lab, TcpState::Established)? == 2))?;
    let pid = leak.app().pid();
    for fd in leak.app_fds() {
        let link = std::fs::read_link(format!("/proc/{pid}/fd/{fd}"))?;
        assert!(link.to_string_lossy().starts_with("socket:["), "{link:?}");
    }
    let wanted = [json!(3), json!(0), json!(0)];
    for selectors in [
        String::new(),
        "--port 8080".into(),
        format!("--pid {pid}"),
        "--process leaky*".into(),
    ] {
        let ran = cwkill(&lab, &format!("diagnose {selectors} {QUICK}"))?.exits(0);
        let document = ran.json();
        assert_eq!(document["total"]["stuck"], json!(0));
        assert_eq!(suspects(&document, pid)?, wanted);
    }
    // These selectors need information that a dead socket no longer has.
    for selectors in [
        "--port 8081",
        "--cause unread",
        "--min-age 1s",
        "--peer-port 1",
    ] {
        cwkill(&lab, &format!("diagnose {selectors} {QUICK}"))?.exits(1);
    }
    let text = cwkill(&lab, "diagnose --sample 50ms")?.exits(0).stdout;
    assert!(text.contains("3 dead descriptors"), "{text}");
    assert!(
        text.contains("only the process or cwkill reclaim can close them"),
        "{text}"
    );
    // The live connections were not touched.
    crate::support::carries_data(&open)?;
    leak.app().close(&leak.app_fds())?;
    cwkill(&lab, &format!("diagnose {QUICK}"))?.exits(1);
    Ok(())
}

fn half_closed_streams_are_not_a_leak(family: Family) -> Result<()> {
    let (lab, leak) = lab("half-closed", family, 2)?;
    let leaks = lab.start("drained", family, alone(8001, 2))?;
    let line = "diagnose --sample 4s --json";
    let document = cwkill(&lab, line)?.exits(0).json();
    let talks = process(&document, leak.app().pid())?;
    let causes = talks["causes"].as_object().context("no causes")?;
    let verdicts: Vec<String> = causes.values().map(|of| at(of, "/verdict")).collect();
    let leak_reported = verdicts.iter().any(|text| text.contains("never closes"));
    assert!(!causes.is_empty() && !leak_reported, "{verdicts:?}");
    only_cause(
        process(&document, leaks.app().pid())?,
        "drained",
        2,
        "never closes",
    );
    Ok(())
}

/// A process with dead descriptors and with connections that wait at its listener is not reported as another process.
fn only_selected_processes_are_reported(family: Family) -> Result<()> {
    let (lab, leak) = lab("drained", family, 2)?;
    cwkill(&lab, "--all --method destroy")?.exits(0);
    let waiting = Options {
        port: 8081,
        ..count(3)
    };
    let _waiting = lab.start("not-accepted", family, waiting)?;
    let other = lab.start("established", family, alone(8082, 1))?;
    let forked = lab.start("forked", family, alone(8083, 2))?;
    let pids = |selectors: &str, code: i32| -> Result<Vec<Value>> {
        let line = format!("diagnose {selectors} {QUICK}");
        let document = cwkill(&lab, &line)?.exits(code).json();
        let processes = document["processes"].as_array().context("no processes")?;
        Ok(processes.iter().map(|p| p["pid"].clone()).collect())
    };
    let guilty = leak.app().pid();
    assert_eq!(pids(&format!("--pid {guilty}"), 0)?, [json!(guilty)]);
    let other = other.app().pid();
    assert_eq!(pids(&format!("--pid {other}"), 1)?, Vec::<Value>::new());
    // Of the owners of a shared socket only the selected one.
    let one = forked.app().pid();
    assert_eq!(pids(&format!("--pid {one}"), 0)?, [json!(one)]);
    // The same for the descriptors that a check counts, and for those that a reclaim would close.
    let check = |pid: u32, code: i32| -> Result<String> {
        let line = format!("check --percent-of-limit -w 1 -c 99 --pid {pid}");
        Ok(cwkill(&lab, &line)?.exits(code).stdout)
    };
    for pid in [guilty, one, other] {
        let line = format!("--pid {pid} --nofile=60:");
        ran(lab.app_host().command("prlimit").args(line.split(' ')))?.exits(0);
    }
    let dead = format!("/{guilty} has lost 2 of 60 descriptors (2 of them dead)");
    assert!(check(guilty, 1)?.contains(&dead));
    assert!(check(one, 1)?.contains(&format!("/{one} has lost 2 of 60 descriptors")));
    assert!(check(other, 0)?.contains(" dead=0;"));
    cwkill(&lab, &format!("reclaim -n --pid {other}"))?.exits(1);
    Ok(())
}

fn unix_sockets_are_not_dead() -> Result<()> {
    let (lab, leak) = lab("unread", Family::V4, 3)?;
    // This leaves two UNIX sockets in the application's table, and one TCP socket, without which the process is not shown.
    leak.app().put_in_flight(&leak.app_fds()[..2])?;
    let document = cwkill(&lab, &format!("diagnose {QUICK}"))?.exits(0).json();
    assert_eq!(document["unknown_owner"]["stuck"], json!(2));
    let pid = leak.app().pid();
    assert_eq!(process(&document, pid)?["stuck"], json!(1));
    assert_eq!(suspects(&document, pid)?, [json!(0), json!(0), json!(0)]);
    Ok(())
}

/// /proc shows the pids of another pid namespace, so no descriptor can be duplicated.
fn unreadable_descriptors_are_unknown() -> Result<()> {
    let (lab, leak) = lab("drained", Family::V4, 3)?;
    cwkill(&lab, "--all --method destroy")?.exits(0);
    let diagnose = || {
        let line = format!("--pid --fork --kill-child {CWKILL} diagnose {QUICK}");
        let command = lab.app_host().command("unshare");
        ran(command.args(line.split_whitespace()))
    };
    // There is nothing else to report: they may be dead, which is not the same as none.
    let document = diagnose()?
        .exits(4)
        .complains("3 descriptors of TCP sockets in no table may be dead")
        .json();
    assert_eq!(document["unknown_descriptors"], json!(3));
    let _more = lab.start("unread", Family::V4, count(1))?;
    let document = diagnose()?.exits(0).json();
    let wanted = [json!(0), json!(0), json!(3)];
    assert_eq!(suspects(&document, leak.app().pid())?, wanted);
    // No command is suggested, because there the pid names another process.
    for process in document["processes"].as_array().context("no processes")? {
        assert_eq!(process["next"], json!(null));
    }
    Ok(())
}

/// Workers that wait at one listener do not hide the process that leaks, and are shown once.
fn a_busy_listener_does_not_hide_the_leaker() -> Result<()> {
    let lab = Lab::new()?;
    let busy = lab.start("not-accepted", Family::V4, alone(8001, 6))?;
    let leaker = lab.start("drained", Family::V4, alone(8002, 2))?;
    let forked = lab.start("forked", Family::V4, alone(8003, 1))?;
    let document = cwkill(&lab, &format!("diagnose {QUICK}"))?.exits(0).json();
    let processes = document["processes"].as_array().context("no processes")?;
    let at = |pid: u32| processes.iter().position(|p| p["pid"] == json!(pid));
    assert_eq!(at(leaker.app().pid()), Some(0));
    assert_eq!(at(busy.app().pid()), Some(processes.len() - 1));
    let text = cwkill(&lab, "diagnose --sample 50ms")?.exits(0).stdout;
    assert!(text.contains(" (+2 like it)"), "{text}");
    let blocks = |pid: u32| text.matches(&format!("\nleaky-app/{pid}")).count();
    assert_eq!(blocks(leaker.app().pid()), 1);
    let shared = processes.iter().filter(|p| p["shared"] == json!(1));
    let pids: Vec<u64> = shared.filter_map(|p| p["pid"].as_u64()).collect();
    assert_eq!(pids.len(), 3);
    assert!(pids.contains(&forked.app().pid().into()));
    let shown = pids
        .iter()
        .filter(|pid| text.contains(&format!("/{pid} (+2")));
    assert_eq!(shown.count(), 1);
    Ok(())
}

/// A program that makes sockets and never connects them.
fn many_sockets_never_connected_are_reported() -> Result<()> {
    const SCRIPT: &str = "
import signal, socket, sys
signal.alarm(60)
sockets = [socket.socket() for _ in range(int(sys.argv[1]))]
print(len(sockets), flush=True)
sys.stdin.read()
";
    let lab = Lab::new()?;
    for (sockets, code) in [("99", 1), ("100", 0)] {
        let command = lab.app_host().command("python3");
        let command = command.args(["-c", SCRIPT, sockets]);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let diagnose = |child: &mut std::process::Child| -> Result<()> {
            let mut line = String::new();
            let stdout = child.stdout.take().context("no stdout")?;
            std::io::BufRead::read_line(&mut std::io::BufReader::new(stdout), &mut line)?;
            assert_eq!(line.trim(), sockets);
            let ran = cwkill(&lab, "diagnose --sample 50ms")?.exits(code);
            let shown = format!("\n  {sockets} never connected: ");
            assert_eq!(ran.stdout.contains(&shown), code == 0);
            cwkill(&lab, "diagnose --sample 50ms --port 80")?.exits(1);
            Ok(())
        };
        let result = diagnose(&mut child);
        child.kill()?;
        child.wait()?;
        result?;
    }
    Ok(())
}

fn growth_is_counted_by_cookie() -> Result<()> {
    let (lab, leak) = lab("unread", Family::V4, 3)?;
    let later = lab.start("established", Family::V4, count(2))?;
    let command = lab.app_host().command(CWKILL);
    let command = command.args(["diagnose", "--sample", "4s", "--json"]);
    let child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    until_it_sleeps(&lab, child.id())?;
    // While it is stopped, it cannot take the second sample.
    let pid = nix::unistd::Pid::from_raw(child.id().try_into()?);
    kill(pid, Signal::SIGSTOP)?;
    // One socket goes and two come.
    leak.app().close(&leak.app_fds()[..1])?;
    later.peer().shutdown(&later.peer_fds(), How::Write)?;
    lab.wait_for(PATIENCE, || Ok(in_state(&lab, TcpState::CloseWait)? == 4))?;
    kill(pid, Signal::SIGCONT)?;
    let document = Ran::of("cwkill", child.wait_with_output()?)?
        .exits(0)
        .json();
    for group in [&document["total"], process(&document, leak.app().pid())?] {
        let growth = &group["growth"];
        assert_eq!((&growth["new"], &growth["gone"]), (&json!(2), &json!(1)));
        let seconds = document["sample_seconds"].as_f64().context("no time")?;
        assert!(seconds >= 4.0, "{seconds}");
        let rate = growth["per_minute"].as_f64().context("no rate")?;
        assert!(
            (rate - 60.0 / seconds).abs() < 0.01,
            "{rate} in {seconds} s"
        );
    }
    Ok(())
}

fn shared_sockets_count_for_each_owner() -> Result<()> {
    let (lab, leak) = lab("forked", Family::V4, 2)?;
    let document = cwkill(&lab, &format!("diagnose {QUICK}"))?.exits(0).json();
    assert_eq!(document["total"]["stuck"], json!(2));
    let processes = document["processes"].as_array().context("no processes")?;
    assert_eq!(processes.len(), 3);
    for process in processes {
        assert_eq!(
            (&process["stuck"], &process["shared"]),
            (&json!(2), &json!(2))
        );
    }
    process(&document, leak.app().pid())?;
    // Dead descriptors count for each owner as well.
    cwkill(&lab, "--all --method destroy")?.exits(0);
    let document = cwkill(&lab, &format!("diagnose {QUICK}"))?.exits(0).json();
    let processes = document["processes"].as_array().context("no processes")?;
    let dead: Vec<String> = processes
        .iter()
        .map(|p| at(p, "/descriptors/dead"))
        .collect();
    assert_eq!(dead, vec!["2".to_owned(); 3]);
    Ok(())
}

fn without_privileges_missing_information_is_reported() -> Result<()> {
    let (lab, _leak) = lab("unread", Family::V4, 2)?;
    let command = lab.app_host().command(CWKILL).capabilities(&[]);
    let ran = ran(command.args(["diagnose", "--sample", "50ms"]))?
        .exits(0)
        .complains("2 sockets without a known owner")
        .complains("could not be read: dead ones among them are not counted")
        .complains("cwkill doctor");
    assert!(ran.stdout.contains("unknown owner: 2 stuck"), "{ran:?}");
    let command = lab.app_host().command(CWKILL).capabilities(&[]);
    let line = format!("diagnose --process leaky-app {QUICK}");
    let ran = crate::support::ran(command.args(line.split(' ')))?.exits(4);
    assert_eq!(ran.json()["possible_matches"], json!(2));
    Ok(())
}

fn connections_at_a_listener_of_an_unknown_owner_count_once(family: Family) -> Result<()> {
    let lab = Lab::new()?;
    let _waiting = lab.start("not-accepted", family, alone(8001, 3))?;
    let _accepted = lab.start("unread", family, alone(8002, 2))?;
    let document = |line: &str| {
        let command = lab.app_host().command(CWKILL).capabilities(&[]);
        ran(command.args(line.split(' ')))
    };
    let ran = document(&format!("diagnose {QUICK}"))?.exits(0);
    let json = ran.json();
    assert_eq!(json["total"]["stuck"], json!(5));
    let listeners = json["listeners"].as_array().context("listeners")?;
    assert_eq!(listeners.len(), 1, "{json:#}");
    assert_eq!(listeners[0]["stuck"], json!(3), "{json:#}");
    // Only those that were accepted.
    assert_eq!(json["unknown_owner"]["stuck"], json!(2), "{json:#}");
    let only_waiting = document(&format!("diagnose --port 8001 {QUICK}"))?;
    assert_eq!(only_waiting.json()["unknown_owner"], json!(null));
    // Its owner is still a matter of privileges.
    only_waiting.complains("cwkill doctor");
    Ok(())
}

/// Leaves a socket in CLOSE-WAIT. With the argument `sleep`, a thread then waits for a child as vfork(2) does, in
/// uninterruptible sleep; the child ends with the thread.
const LEAKY_PYTHON: &str = "
import ctypes, os, platform, signal, socket, sys, threading
signal.alarm(60)
# No thread demands the interpreter's lock. The child below would wait for that thread for ever.
sys.setswitchinterval(1000)
server = socket.create_server(('127.0.0.1', 7001))
peer = socket.create_connection(('127.0.0.1', 7001))
accepted, _ = server.accept()
peer.shutdown(socket.SHUT_WR)
assert accepted.recv(1) == b''
def sleep():
    # Keeps the interpreter's lock, for which the child would wait for ever if another thread had it.
    libc = ctypes.PyDLL(None)
    clone = {'x86_64': 56, 'aarch64': 220}[platform.machine()]
    us = threading.get_native_id()
    if libc.syscall(clone, 0x4000 | signal.SIGCHLD, 0, 0, 0, 0) == 0:
        libc.prctl(1, signal.SIGKILL)
        print(us, flush=True)
        libc.pause()
        os._exit(0)
if sys.argv[1] == 'sleep':
    threading.Thread(target=sleep).start()
else:
    print(threading.get_native_id(), flush=True)
sys.stdin.read()
";

fn a_runtime_and_a_sleeping_thread_are_named() -> Result<()> {
    for how in ["run", "sleep"] {
        let lab = Lab::new()?;
        let command = lab.app_host().command("python3");
        let command = command.args(["-c", LEAKY_PYTHON, how]);
        // The runtime is recognised by the program that was executed, not by its parent.
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let result = at_python(&lab, &mut child, how == "sleep");
        child.kill()?;
        child.wait()?;
        result?;
    }
    Ok(())
}

fn at_python(lab: &Lab, child: &mut std::process::Child, sleeps: bool) -> Result<()> {
    let mut line = String::new();
    let stdout = child.stdout.take().context("no stdout")?;
    std::io::BufRead::read_line(&mut std::io::BufReader::new(stdout), &mut line)?;
    let thread: u32 = line.trim().parse().with_context(|| format!("{line:?}"))?;
    let pid = child.id();
    let state = format!("/proc/{pid}/task/{thread}/stat");
    if sleeps {
        let asleep = || Ok(std::fs::read_to_string(&state)?.contains(") D "));
        lab.wait_for(PATIENCE, asleep)?;
    }
    let document = cwkill(lab, &format!("diagnose --pid {pid} {QUICK}"))?
        .exits(0)
        .json();
    let python = process(&document, pid)?;
    assert_eq!(python["runtime"], json!("python"));
    let (condition, threads, command) = match sleeps {
        false => (json!(null), json!([]), format!("py-spy dump --pid {pid}")),
        true => (
            json!("thread-uninterruptible"),
            json!([thread]),
            format!("cat /proc/{pid}/task/{thread}/wchan"),
        ),
    };
    assert_eq!(python["condition"], condition);
    assert_eq!(python["uninterruptible_threads"], threads);
    assert_eq!(at(python, "/next/command"), command);
    let line = format!("diagnose --pid {pid} --sample 50ms");
    let text = cwkill(lab, &line)?.exits(0).stdout;
    assert!(text.contains(&format!("next: {command}  (")), "{text}");
    Ok(())
}

fn bars_need_a_known_width() -> Result<()> {
    let (lab, _leak) = lab("unread", Family::V4, 4)?;
    let _more = lab.start("drained", Family::V4, count(2))?;
    for (columns, wanted) in [(None, false), (Some("20"), false), (Some("100"), true)] {
        let command = lab.app_host().command(CWKILL);
        let command = command.args(["diagnose", "--sample", "50ms"]);
        let command = command.env("COLUMNS", columns.unwrap_or_default());
        let text = ran(command)?.exits(0).stdout;
        let bars = |name: &str| -> Vec<usize> {
            let rows = text
                .lines()
                .filter(|line| line.trim_start().starts_with(name));
            let rows = rows.filter(|line| line.contains('#'));
            rows.map(|line| line.matches('#').count()).collect()
        };
        let drawn = match wanted {
            true => (vec![40], vec![20], vec![40]),
            false => (vec![], vec![], vec![]),
        };
        let is = (bars("unread"), bars("drained"), bars("under 1m"));
        assert_eq!(is, drawn, "{columns:?}: {text}");
    }
    Ok(())
}

fn a_named_process_is_reported_after_its_cure() -> Result<()> {
    let (lab, leak) = lab("drained", Family::V4, 3)?;
    let pid = leak.app().pid();
    cwkill(
        &lab,
        &format!("--pid {pid} --allow-spin --reclaim --reclaim-age 0s"),
    )?
    .exits(0);
    let text = cwkill(&lab, &format!("diagnose --sample 50ms --pid {pid}"))?
        .exits(1)
        .stdout;
    assert!(
        text.contains(&format!("leaky-app/{pid}: no stuck sockets\n")),
        "{text}"
    );
    let used = std::fs::read_dir(format!("/proc/{pid}/fd"))?.count();
    assert!(
        text.contains(&format!("\n  descriptors: {used} of ")),
        "{text}"
    );
    assert!(
        text.contains("\n  it can accept, and no connection waits at :8080\n"),
        "{text}"
    );
    assert!(!text.contains("next: "), "{text}");
    let document = cwkill(&lab, &format!("diagnose {QUICK} --pid {pid}"))?
        .exits(1)
        .json();
    assert_eq!(document["processes"], json!([]));
    assert_eq!(document["healthy_processes"][0]["pid"], json!(pid));
    // Without its pid it is one of many.
    let text = cwkill(&lab, "diagnose --sample 50ms")?.exits(1).stdout;
    assert!(!text.contains("descriptors: "), "{text}");
    // A connection that waits is not accepted, whatever the descriptors say.
    let address = leak.conns()[0].local;
    let _client = leak.peer().connect(address, 1, Dial::default(), PATIENCE)?;
    lab.wait_for(PATIENCE, || {
        let text = cwkill(&lab, &format!("diagnose --sample 50ms --pid {pid}"))?.stdout;
        Ok(text.contains("\n  1 connection waits at :8080 for accept(2)\n"))
    })
}

fn more_descriptors_than_the_limit_are_explained() -> Result<()> {
    let (lab, leak) = lab("drained", Family::V4, 3)?;
    let pid = leak.app().pid();
    let used = std::fs::read_dir(format!("/proc/{pid}/fd"))?.count();
    let line = format!("--pid {pid} --nofile={}:", used - 1);
    ran(lab.app_host().command("prlimit").args(line.split(' ')))?.exits(0);
    let text = cwkill(&lab, &format!("diagnose --sample 50ms --pid {pid}"))?
        .exits(0)
        .stdout;
    let more = format!("\n  descriptors: {used} of {} (1", used - 1);
    assert!(text.contains(&more), "{text}");
    assert!(
        text.contains("%): the limit was lowered after they were opened\n"),
        "{text}"
    );
    Ok(())
}

fn a_closed_pipe_is_not_an_error() -> Result<()> {
    let (lab, _leak) = lab("unread", Family::V4, 2)?;
    for output in ["", "--json"] {
        let (reader, writer) = std::io::pipe()?;
        drop(reader);
        let line = format!("diagnose --sample 50ms {output}");
        let command = lab.app_host().command(CWKILL).args(line.split_whitespace());
        let child = command.stdout(writer).stderr(Stdio::null()).spawn();
        let status = child?.wait()?;
        assert_eq!(status.code(), Some(0), "{line}");
    }
    let empty = Lab::new()?;
    let ran = cwkill(&empty, "diagnose --sample 50ms")?.exits(1);
    assert!(ran.stdout.starts_with("0 sockets stuck"), "{ran:?}");
    assert_eq!(connections(&lab)?.len(), 2);
    Ok(())
}
