//! Verdicts that need more than the cause of a socket: the limit of descriptors, processes of one connection each, inherited
//! descriptors, and a file system that hangs.

use std::fs;
use std::io::{BufRead, BufReader, Write as _};
use std::net::SocketAddr;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};

use anyhow::{Context, Result};
use netns_harness::{Agent, Dial, Endpoint, Family, Lab, TcpState};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use super::{QUICK, block, process};
use crate::support::{CWKILL, FILE_BY_FUSE, PATIENCE, Ran, at, cwkill, in_state, ran};
use crate::trial::{Need, Test, each_family, once};

pub const TESTS: &[Test] = &[
    each_family!(at_its_limit_a_server_accepts_again_after_the_advice),
    each_family!(processes_of_one_connection_each_are_one_group),
    each_family!(a_worker_with_live_connections_is_not_to_be_ended),
    each_family!(inherited_descriptors_are_told_from_leaked_ones).slow(),
    once!(an_inherited_connection_to_a_server_is_older_than_its_heir),
    once!(nothing_waits_for_an_executable_on_a_hung_mount).needs(Need::Fuse),
];

/// Gives Python `listen(host)`, and `child()`, which ends a child together with its parent.
const PRELUDE: &str = "
import ctypes, os, resource, signal, socket, subprocess, sys, time
signal.alarm(120)
libc = ctypes.CDLL(None, use_errno=True)
PORT = 7001
def listen(host):
    family = socket.AF_INET6 if ':' in host else socket.AF_INET
    return socket.create_server((host, PORT), family=family, dualstack_ipv6=host == '::')
def child():
    libc.prctl(1, signal.SIGKILL)
def say(text):
    print(text, flush=True)
";

/// A Python program that says lines and ends with its standard input.
struct Program {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Program {
    fn start(lab: &Lab, wrapper: &[&str], script: &str, arguments: &[&str]) -> Result<Self> {
        let script = format!("{PRELUDE}{script}");
        let words = [wrapper, &["python3", "-c", &script], arguments].concat();
        let (program, rest) = words.split_first().context("no program")?;
        let command = lab.app_host().command(program).args(rest);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        Ok(Program {
            stdin: child.stdin.take().context("no stdin")?,
            stdout: BufReader::new(child.stdout.take().context("no stdout")?),
            child,
        })
    }

    /// The next line that it says.
    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.stdout.read_line(&mut line)?;
        Ok(line.trim_end().to_owned())
    }

    fn tell(&mut self, line: &str) -> Result<()> {
        Ok(writeln!(self.stdin, "{line}")?)
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The address at which a program of the family listens, and the one to connect to.
fn addresses(family: Family) -> (&'static str, SocketAddr) {
    match family {
        Family::V4 => ("127.0.0.1", "127.0.0.1:7001".parse().expect("an address")),
        Family::V6 => ("::1", "[::1]:7001".parse().expect("an address")),
        Family::Mapped => ("::", "127.0.0.1:7001".parse().expect("an address")),
    }
}

fn connect(lab: &Lab, to: SocketAddr, count: usize) -> Result<(Agent, Vec<Endpoint>)> {
    let peer = lab.app_host().agent("peer")?;
    let ends = peer.connect(to, count, Dial::default(), PATIENCE)?;
    Ok((peer, ends))
}

/// Closes the peers' ends, and waits until `stuck` sockets are in CLOSE-WAIT.
fn close(lab: &Lab, (peer, ends): &(Agent, Vec<Endpoint>), stuck: usize) -> Result<()> {
    let fds: Vec<_> = ends.iter().map(|end| end.fd).collect();
    peer.close(&fds)?;
    lab.wait_for(
        PATIENCE,
        || Ok(in_state(lab, TcpState::CloseWait)? == stuck),
    )
}

fn diagnosed(lab: &Lab, selectors: &str) -> Result<Value> {
    let line = format!("diagnose {selectors} {QUICK}");
    Ok(cwkill(lab, &line)?.exits(0).json())
}

/// The only verdict on the causes of a group.
#[track_caller]
fn verdict(group: &Value) -> String {
    let causes = group["causes"].as_object().expect("causes");
    let codes: Vec<String> = causes.values().map(|c| at(c, "/verdict_code")).collect();
    assert_eq!(codes.len(), 1, "{group:#}");
    codes[0].clone()
}

/// Runs a command that a diagnosis suggests, on sockets that are younger than those it is meant for and on a busy machine.
fn follow(lab: &Lab, command: &str) -> Result<Ran> {
    let arguments = command.strip_prefix("cwkill ").context("another program")?;
    cwkill(
        lab,
        &format!("{arguments} --reclaim-age 0s --stop-limit 10s"),
    )
}

/// Accepts until it has no descriptor left, as most servers do, and tries again and again.
const LIMITED: &str = "
server = listen(sys.argv[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (24, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
kept, failed = [], False
say('ready')
while True:
    try:
        kept.append(server.accept()[0])
        if failed:
            say('accepted again')
            failed = False
    except OSError as error:
        if not failed:
            say(error.errno)
        failed = True
        time.sleep(0.02)
";

fn at_its_limit_a_server_accepts_again_after_the_advice(family: Family) -> Result<()> {
    let lab = Lab::new()?;
    let (host, to) = addresses(family);
    let mut server = Program::start(&lab, &[], LIMITED, &[host])?;
    assert_eq!(server.line()?, "ready");
    let clients = connect(&lab, to, 40)?;
    assert_eq!(server.line()?, libc::EMFILE.to_string());
    close(&lab, &clients, 40)?;
    let pid = server.pid();
    let document = diagnosed(&lab, "")?;
    let leaker = process(&document, pid)?;
    assert_eq!(leaker["descriptors"]["at_limit"], json!(true));
    let waits = block(&document, "listeners", "port", 7001)?;
    assert_eq!(verdict(waits), "at-descriptor-limit");
    let text = cwkill(&lab, "diagnose --sample 50ms")?.exits(0).stdout;
    assert!(text.contains("accept(2) fails with EMFILE"), "{text}");
    assert!(
        !text.contains("will not help") && !text.contains("loop is stuck"),
        "{text}"
    );
    let then = at(leaker, "/then/command");
    assert_eq!(
        then,
        format!("py-spy dump --pid {pid}"),
        "needs no descriptor"
    );
    let next = at(leaker, "/next/command");
    assert_eq!(next, format!("cwkill --pid {pid} --reclaim"));
    follow(&lab, &next)?.exits(0);
    assert_eq!(server.line()?, "accepted again");
    // With room it is no longer at its limit, whatever it holds.
    let raise = format!("--pid {pid} --nofile=200:");
    ran(lab.app_host().command("prlimit").args(raise.split(' ')))?.exits(0);
    let more = connect(&lab, to, 2)?;
    lab.wait_for(PATIENCE, || {
        let rows = lab.app_host().ss(&[])?;
        let mut listeners = rows.iter().filter(|row| row.state == TcpState::Listen);
        Ok(listeners.all(|row| row.recv_q == 0))
    })?;
    close(&lab, &more, 2)?;
    let document = diagnosed(&lab, "")?;
    let leaker = process(&document, pid)?;
    assert_eq!(leaker["descriptors"]["at_limit"], json!(false));
    Ok(())
}

/// A process for each connection: made after accept(2), or before it and then kept.
const FORKING: &str = "
host, how, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
server = listen(host)
say('ready')
for _ in range(count):
    conn = server.accept()[0] if how == 'after' else None
    if os.fork() == 0:
        child()
        conn = conn or server.accept()[0]
        if how == 'after':
            server.close()
        assert conn.recv(10) == b''
        while True:
            signal.pause()
    if conn:
        conn.close()
sys.stdin.read()
";

fn processes_of_one_connection_each_are_one_group(family: Family) -> Result<()> {
    for how in ["after", "before"] {
        let lab = Lab::new()?;
        let (host, to) = addresses(family);
        let mut server = Program::start(&lab, &[], FORKING, &[host, how, "8"])?;
        assert_eq!(server.line()?, "ready");
        let clients = connect(&lab, to, 8)?;
        close(&lab, &clients, 8)?;
        // A leak of another kind beside them.
        let leak = lab.start("drained", Family::V4, crate::support::alone(8001, 5))?;
        lab.wait_for(PATIENCE, || {
            let listed = cwkill(&lab, "--json -n --port 7001")?.exits(0);
            let mut sockets = listed.sockets().into_iter();
            Ok(sockets.all(|socket| socket["cause"] == json!("drained")))
        })?;
        let document = diagnosed(&lab, "")?;
        let processes = document["processes"].as_array().context("no processes")?;
        assert_eq!(processes.len(), 9, "each is in the JSON");
        let pids: Vec<u64> = processes.iter().filter_map(|p| p["pid"].as_u64()).collect();
        for one in processes {
            let is_leak = one["pid"] == json!(leak.app().pid());
            assert_eq!(one["process_per_connection"], json!(!is_leak));
            let (code, then) = match is_leak {
                true => ("leak", json!(null)),
                false => {
                    assert_eq!(one["parent"], json!(server.pid()));
                    let kill = format!("kill {}", one["pid"]);
                    ("process-per-connection", json!(kill))
                }
            };
            assert_eq!(verdict(one), code);
            assert_eq!(one["then"]["command"], then);
        }
        let text = cwkill(&lab, "diagnose --sample 50ms")?.exits(0).stdout;
        assert_eq!(
            text.matches("one process per connection, busy or waiting")
                .count(),
            1,
            "{text}"
        );
        assert!(text.contains("\n8 processes python3: 8 stuck"), "{text}");
        let parent = format!("and 5 more; parent {}\n", server.pid());
        assert!(text.contains(&parent), "{text}");
        let check = cwkill(&lab, "check -w 7 -c 99 --port 7001")?.exits(1);
        assert!(
            check.stdout.contains(", 8 in 8 processes named python3,"),
            "{check:?}"
        );

        // Those that do not run are told apart.
        let children = pids
            .iter()
            .filter(|pid| **pid != u64::from(leak.app().pid()));
        let stopped: Vec<i32> = children
            .take(2)
            .map(|pid| i32::try_from(*pid))
            .collect::<Result<_, _>>()?;
        for pid in &stopped {
            kill(Pid::from_raw(*pid), Signal::SIGSTOP)?;
        }
        lab.wait_for(PATIENCE, || {
            let is_stopped = |pid: &i32| {
                fs::read_to_string(format!("/proc/{pid}/stat")).map(|s| s.contains(") T "))
            };
            Ok(stopped
                .iter()
                .map(is_stopped)
                .collect::<Result<Vec<_>, _>>()?
                .iter()
                .all(|is| *is))
        })?;
        let document = diagnosed(&lab, "")?;
        for pid in &stopped {
            let one = process(&document, u32::try_from(*pid)?)?;
            assert_eq!(one["condition"], json!("stopped"));
            assert_eq!(verdict(one), "owner-stopped");
            assert_eq!(at(one, "/next/command"), format!("kill -CONT {pid}"));
        }
        let text = cwkill(&lab, "diagnose --sample 50ms")?.exits(0).stdout;
        assert!(text.contains("\n6 processes python3: 6 stuck"), "{text}");
        assert!(text.contains("\n2 processes python3: 2 stuck"), "{text}");

        let closed = cwkill(&lab, "--port 7001")?.exits(0);
        let notes: Vec<&str> = closed
            .stderr
            .lines()
            .filter(|l| l.contains("still have"))
            .collect();
        assert_eq!(notes.len(), 1, "{closed:?}");
        assert!(notes[0].contains("8 processes python3 ("), "{notes:?}");
        assert!(!closed.stderr.contains("still has"), "{closed:?}");
    }
    Ok(())
}

/// Workers that accept several connections each, made before them. With `reload` they no longer listen, as those of an old configuration.
const PREFORK: &str = "
host, how, workers, count = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
server = listen(host)
say('ready')
for _ in range(workers):
    if os.fork() == 0:
        child()
        conns = [server.accept()[0] for _ in range(count)]
        if how == 'reload':
            server.close()
        say('accepted')
        while True:
            signal.pause()
    sys.stdin.readline()
sys.stdin.read()
";

fn a_worker_with_live_connections_is_not_to_be_ended(family: Family) -> Result<()> {
    for (how, workers) in [("prefork", 4), ("reload", 1)] {
        let lab = Lab::new()?;
        let (host, to) = addresses(family);
        let arguments = [host, how, &workers.to_string(), "3"];
        let mut server = Program::start(&lab, &[], PREFORK, &arguments)?;
        assert_eq!(server.line()?, "ready");
        let mut clients = Vec::new();
        for stuck in 1..=workers {
            let (peer, ends) = connect(&lab, to, 3)?;
            assert_eq!(server.line()?, "accepted");
            peer.close(&[ends[0].fd])?;
            lab.wait_for(PATIENCE, || {
                Ok(in_state(&lab, TcpState::CloseWait)? == stuck)
            })?;
            clients.push((peer, ends));
            server.tell("next")?;
        }
        assert_eq!(in_state(&lab, TcpState::Established)?, 4 * workers);
        lab.wait_for(PATIENCE, || {
            let listed = cwkill(&lab, "--json -n --port 7001")?.exits(0);
            let mut sockets = listed.sockets().into_iter();
            Ok(sockets.all(|socket| socket["cause"] == json!("unread")))
        })?;
        let document = diagnosed(&lab, "")?;
        let processes = document["processes"].as_array().context("no processes")?;
        assert_eq!(processes.len(), workers, "{how}");
        for one in processes {
            assert_eq!(one["process_per_connection"], json!(false), "{how}");
            assert_eq!(verdict(one), "not-reading", "{how}");
            assert_eq!(one["then"]["command"], json!(null), "{how}");
            assert!(!at(one, "/next/command").contains("kill"), "{how}: {one:#}");
        }
        let text = cwkill(&lab, "diagnose --sample 50ms")?.exits(0).stdout;
        assert!(!text.contains("kill "), "{how}: {text}");
    }
    Ok(())
}

/// Starts `sleep`, which gets the connections and does not use them.
const BEQUEATHING: &str = "
how, host, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
if how == 'outgoing':
    conns = [socket.create_connection((host, PORT)) for _ in range(count)]
else:
    server = listen(host)
    say('ready')
    conns = [server.accept()[0] for _ in range(count)]
# The connections are clearly older than the heir.
time.sleep(2)
if how == 'listener':
    server.set_inheritable(True)
files = {'stdin': conns[0], 'stdout': conns[0]} if how == 'standard' else {}
for conn in conns:
    conn.set_inheritable(how != 'standard')
heir = subprocess.Popen(['sleep', '120'], close_fds=False, preexec_fn=child, **files)
for conn in conns:
    conn.close()
say(heir.pid)
sys.stdin.read()
";

/// The descriptors of sockets of a process.
fn sockets_of(pid: u32) -> Result<usize> {
    let mut sockets = 0;
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let link = fs::read_link(entry?.path())?;
        sockets += usize::from(link.to_string_lossy().starts_with("socket:"));
    }
    Ok(sockets)
}

fn inherited_descriptors_are_told_from_leaked_ones(family: Family) -> Result<()> {
    for (how, count, inherited) in [
        ("accepted", 3, true),
        // It has the listener too, as a service that was started for its socket.
        ("listener", 3, true),
        ("accepted", 1, true),
        // As inetd starts a server for a connection.
        ("standard", 1, false),
    ] {
        let lab = Lab::new()?;
        let (host, to) = addresses(family);
        let mut server = Program::start(&lab, &[], BEQUEATHING, &[how, host, &count.to_string()])?;
        assert_eq!(server.line()?, "ready");
        let clients = connect(&lab, to, count)?;
        let heir: u32 = server.line()?.parse()?;
        close(&lab, &clients, count)?;
        let document = diagnosed(&lab, "")?;
        let found = process(&document, heir)?;
        assert!(
            process(&document, server.pid()).is_err(),
            "it has closed its own"
        );
        if !inherited {
            assert_eq!(found["inherited_from"], json!(null), "{how}");
            assert_eq!(verdict(found), "process-per-connection");
            continue;
        }
        let from = json!({"pid": server.pid(), "comm": "python3"});
        assert_eq!(found["inherited_from"], from, "{how}: {found:#}");
        assert_eq!(verdict(found), "inherited");
        let next = at(found, "/next/command");
        assert_eq!(next, format!("cwkill --pid {heir} --reclaim"));
        let remark = at(found, "/next/remark");
        assert!(
            remark.contains(&format!("in python3/{}", server.pid())),
            "{remark}"
        );
        let text = cwkill(&lab, "diagnose --sample 50ms")?.exits(0).stdout;
        let sentence = format!("inherited from python3/{}, and not used here", server.pid());
        assert!(text.contains(&sentence) && !text.contains("gdb"), "{text}");
        let with_listener = usize::from(how == "listener");
        assert_eq!(sockets_of(heir)?, count + with_listener);
        match (how, count) {
            // Closed from outside, they are still inherited.
            ("accepted", 3) => {
                cwkill(&lab, "--all --method destroy")?.exits(0);
                let document = diagnosed(&lab, "")?;
                let found = process(&document, heir)?;
                assert_eq!(found["inherited_from"], from);
                let next = at(found, "/next/command");
                assert_eq!(next, format!("cwkill reclaim --pid {heir}"));
                follow(&lab, &next)?.exits(0);
            }
            _ => drop(follow(&lab, &next)?.exits(0)),
        }
        assert_eq!(sockets_of(heir)?, with_listener, "{how}");
        // The server still accepts.
        connect(&lab, to, 1)?;
    }
    Ok(())
}

/// Nobody listens at the local port, so the parent decides, and the time.
fn an_inherited_connection_to_a_server_is_older_than_its_heir() -> Result<()> {
    let lab = Lab::new()?;
    let database = lab.app_host().agent("database")?;
    let address: SocketAddr = "127.0.0.1:7001".parse()?;
    let listener = database.listen(address, false, 16)?;
    let mut client = Program::start(&lab, &[], BEQUEATHING, &["outgoing", "127.0.0.1", "2"])?;
    let ends = database.accept(listener, 2, PATIENCE)?;
    let heir: u32 = client.line()?.parse()?;
    close(&lab, &(database, ends), 2)?;
    let document = diagnosed(&lab, "")?;
    let found = process(&document, heir)?;
    assert_eq!(
        found["inherited_from"]["pid"],
        json!(client.pid()),
        "{found:#}"
    );
    client.tell("")?;
    Ok(())
}

/// Becomes the program on [`FILE_BY_FUSE`], in its directory, with three stuck sockets.
const ON_FUSE: &str = "
listener = listen('127.0.0.1')
peers = [socket.create_connection(('127.0.0.1', PORT)) for _ in range(3)]
for _ in peers:
    os.dup2(listener.accept()[0].detach(), 100 + len(os.listdir('/proc/self/fd')))
say(server)
os.chdir(directory)
os.execv('./program', ['program', *sys.argv[2:]])
";

fn nothing_waits_for_an_executable_on_a_hung_mount() -> Result<()> {
    let lab = Lab::new()?;
    let script = format!("{FILE_BY_FUSE}{ON_FUSE}");
    let program = ["/bin/sleep", "120"];
    let mut owner = Program::start(&lab, &["unshare", "-m"], &script, &program)?;
    let server = Pid::from_raw(owner.line()?.parse()?);
    let pid = owner.pid();
    lab.wait_for(PATIENCE, || Ok(in_state(&lab, TcpState::CloseWait)? == 3))?;
    crate::support::until_it_sleeps(&lab, pid)?;
    kill(server, Signal::SIGSTOP)?;
    // The mount hangs: whoever opens the program waits.
    let limited = |program: &[&str]| {
        let command = lab.app_host().command("timeout");
        ran(command.args(["-s", "KILL", "60"]).args(program))
    };
    let exe = format!("/proc/{pid}/exe");
    let opens = lab.app_host().command("timeout");
    let opens = opens.args(["-s", "KILL", "2", "head", "-c", "1", &exe]);
    assert_eq!(ran(opens)?.stdout, "", "the mount does not hang");
    // A check that waits for such a mount ends in time.
    let netns = format!("/proc/{pid}/cwd/somewhere");
    let late = limited(&[CWKILL, "check", "-c", "0", "-t", "500ms", "-N", &netns])?.exits(3);
    assert_eq!(
        late.stdout, "CWKILL UNKNOWN: no result within 500ms\n",
        "{late:?}"
    );
    for (line, code) in [
        ("-n", 0),
        ("-n --json --all-netns", 0),
        ("-n --reclaim", 0),
        ("diagnose --sample 50ms", 0),
        ("diagnose --sample 50ms --json", 0),
        ("check -w 2 -c 9", 1),
        ("check -w 1% -c 99%", 0),
        ("reclaim -n --process program", 1),
        ("--process program --reclaim --reclaim-age 0s", 0),
        ("doctor", 0),
    ] {
        let words: Vec<&str> = line.split_whitespace().collect();
        let ran = limited(&[&[CWKILL], &words[..]].concat())?;
        assert_ne!(ran.code, Some(137), "{line} hangs");
        if line != "doctor" {
            let ran = ran.exits(code);
            if line.starts_with("diagnose --sample 50ms --json") {
                assert_eq!(at(process(&ran.json(), pid)?, "/executable"), "program");
            }
        }
    }
    assert_eq!(sockets_of(pid)?, 0, "the owner has closed them");
    kill(server, Signal::SIGKILL)?;
    Ok(())
}
