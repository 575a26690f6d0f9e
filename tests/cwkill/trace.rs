//! `cwkill trace`: the line of code that leaks.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};

use anyhow::{Context, Result, ensure};
use netns_harness::owners::leaks::{Leaker, Leaky};
use netns_harness::{Agent, Dial, Endpoint, Family, Lab, TcpState};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::support::{CWKILL, PATIENCE, Ran, at, cwkill, lab};
use crate::trial::{Need, Test, once};

pub const TESTS: &[Test] = &[
    once!(c_has_its_lines).needs(Need::Leaky(Leaky::C)),
    once!(c_with_frame_pointers_has_its_lines).needs(Need::Leaky(Leaky::CWithFramePointers)),
    once!(c_with_musl_has_its_lines).needs(Need::Leaky(Leaky::CWithMusl)),
    once!(c_without_symbols_has_addresses).needs(Need::Leaky(Leaky::CStripped)),
    once!(cpp_has_its_lines).needs(Need::Leaky(Leaky::Cpp)),
    once!(rust_has_its_lines).needs(Need::Leaky(Leaky::Rust)),
    once!(go_has_its_lines).needs(Need::Leaky(Leaky::Go)),
    once!(java_says_how_its_methods_get_names).needs(Need::Leaky(Leaky::Java)),
    once!(java_with_a_perf_map_has_its_methods).needs(Need::Leaky(Leaky::JavaWithFramePointers)),
    once!(python_says_what_it_cannot_tell).needs(Need::Leaky(Leaky::Python)),
    once!(node_says_what_it_cannot_tell).needs(Need::Leaky(Leaky::Node)),
    once!(a_rare_leak_among_many_connections_is_named).needs(Need::Leaky(Leaky::C)),
    once!(an_end_that_is_read_with_data_is_seen).needs(Need::Leaky(Leaky::C)),
    once!(two_leaks_have_their_shares).needs(Need::Leaky(Leaky::C)),
    once!(a_client_has_the_line_that_connects).needs(Need::Leaky(Leaky::Connect)),
    once!(what_was_stuck_before_is_counted).needs(Need::Iterator),
    once!(a_container_has_its_own_debug_symbols)
        .needs(Need::Leaky(Leaky::C))
        .needs(Need::RootOfTheMachine),
    once!(a_deleted_program_has_its_lines).needs(Need::Leaky(Leaky::C)),
    once!(a_trace_ends_by_itself).needs(Need::Iterator),
    once!(a_person_gets_the_place_and_the_next_caller).needs(Need::Leaky(Leaky::C)),
    once!(nothing_stays_attached_after_a_kill).needs(Need::Iterator),
    once!(without_privileges_it_says_what_it_needs).needs(Need::RootOfTheMachine),
];

/// A server with leaks, and a client on the same host.
pub struct Scene {
    pub lab: Lab,
    pub server: Leaker,
    client: Agent,
}

const SERVER: ([u8; 4], u16) = ([127, 0, 0, 1], 7000);

impl Scene {
    pub fn start(program: Leaky) -> Result<Self> {
        Self::start_through(&[], program)
    }

    /// Starts the server through a wrapper that executes its arguments.
    pub fn start_through(wrapper: &[&str], program: Leaky) -> Result<Self> {
        let lab = Lab::new()?;
        let server = Leaker::start_through(lab.app_host(), wrapper, program, &["7000"])?;
        let client = lab.app_host().agent("client")?;
        lab.wait_for(PATIENCE, || {
            let rows = lab.app_host().ss(&[])?;
            Ok(rows.iter().any(|row| row.state == TcpState::Listen))
        })?;
        Ok(Scene {
            lab,
            server,
            client,
        })
    }

    /// Makes `count` connections that begin with this byte, and finishes them.
    pub fn visit(&self, kind: u8, count: usize) -> Result<()> {
        (0..count).try_for_each(|_| self.finish(&self.connect()?, kind))
    }

    pub fn connect(&self) -> Result<Vec<Endpoint>> {
        let address = SocketAddr::from(SERVER);
        self.client.connect(address, 1, Dial::default(), PATIENCE)
    }

    /// Sends this byte twice, and closes.
    pub fn finish(&self, connection: &[Endpoint], kind: u8) -> Result<()> {
        let fd = [connection[0].fd];
        self.client.send(&fd, &[kind; 2])?;
        self.client.close(&fd)
    }

    /// Waits until so many connections are stuck, and their end is read. A FIN that is not read counts as one byte.
    pub fn until_stuck(&self, count: usize) -> Result<()> {
        self.lab.wait_for(PATIENCE, || {
            let rows = self.lab.app_host().ss(&[])?;
            let of_server = |row: &&netns_harness::SsRow| row.state == TcpState::CloseWait;
            let stuck: Vec<_> = rows.iter().filter(of_server).collect();
            Ok(stuck.len() == count && stuck.iter().all(|row| row.recv_q == 0))
        })
    }

    /// The document of a trace during which `count` connections leak.
    fn leaks(&self, count: usize) -> Result<Value> {
        self.traced(count, |_| self.visit(b'L', count))
    }

    /// The document of a trace during which `visits` leak `count` connections. While other tests close very many, not each is sampled; then
    /// it is done again.
    pub fn traced(&self, count: usize, visits: impl Fn(&Tracing) -> Result<()>) -> Result<Value> {
        const TRIES: usize = 5;
        for tried in 1.. {
            let tracing = Tracing::start(&self.lab, "--port 7000 --json")?;
            visits(&tracing)?;
            self.until_stuck(tried * count)?;
            let document = tracing.interrupted()?.json();
            if at(&document, "/place_unknown") == "0" || tried == TRIES {
                let before = (tried - 1) * count;
                assert_eq!(at(&document, "/stuck_before"), before.to_string());
                return Ok(document);
            }
        }
        unreachable!("the last try returns")
    }
}

/// A trace that runs.
pub struct Tracing {
    pub child: Child,
    said: Receiver<String>,
}

impl Tracing {
    pub fn start(lab: &Lab, line: &str) -> Result<Self> {
        let command = lab.app_host().command(CWKILL).arg("trace");
        let mut child = command
            .args(line.split_whitespace())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let lines = BufReader::new(child.stderr.take().context("no stderr")?).lines();
        let (sender, said) = channel();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        let first = said.recv_timeout(PATIENCE).context("it says nothing")?;
        assert!(first.starts_with("cwkill: watching"), "{first}");
        Ok(Tracing { child, said })
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(self.child.id().try_into()?), signal)?)
    }

    /// The processes that read symbols for it.
    pub fn readers(&self) -> Result<Vec<Pid>> {
        let pid = self.child.id();
        let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
        let pids = children.split_whitespace();
        Ok(pids
            .map(|it| it.parse().map(Pid::from_raw))
            .collect::<Result<_, _>>()?)
    }

    /// The one that reads the symbols of this process, if it lives.
    pub fn reader_of(&self, traced: u32) -> Result<Option<Pid>> {
        let traced = traced.to_string();
        let is_it = |reader: &Pid| {
            let arguments = fs::read_to_string(format!("/proc/{reader}/cmdline"));
            arguments.is_ok_and(|arguments| arguments.split('\0').nth(2) == Some(&traced))
        };
        Ok(self.readers()?.into_iter().find(is_it))
    }

    /// Waits for the one that reads the symbols of this process, and is not `before`, and kills it.
    pub fn kill_reader(&self, lab: &Lab, traced: u32, before: Option<Pid>) -> Result<Pid> {
        let mut found = None;
        lab.wait_for(PATIENCE, || {
            found = self.reader_of(traced)?.filter(|it| Some(*it) != before);
            Ok(found.is_some())
        })?;
        let reader = found.context("no reader")?;
        kill(reader, Signal::SIGKILL)?;
        Ok(reader)
    }

    pub fn interrupted(self) -> Result<Ran> {
        self.signal(Signal::SIGINT)?;
        self.ended()
    }

    fn ended(self) -> Result<Ran> {
        let output = self.child.wait_with_output()?;
        let mut ran = Ran::of("cwkill trace", output)?;
        let said: Vec<String> = self.said.iter().collect();
        ran.stderr = said.join("\n");
        Ok(ran)
    }
}

/// Asserts that the only place is where `read` reads the end for `caller`, at the lines with the comments.
#[track_caller]
fn has_lines(document: &Value, program: Leaky, count: usize, read: &str, caller: &str) {
    assert_eq!(
        at(document, "/became_stuck"),
        count.to_string(),
        "{document:#}"
    );
    assert_eq!(at(document, "/place_unknown"), "0", "{document:#}");
    let places = document["places"].as_array().map_or(0, Vec::len);
    assert_eq!(places, 1, "{document:#}");
    assert_eq!(
        at(document, "/places/0/count"),
        count.to_string(),
        "{document:#}"
    );
    let stack = &document["places"][0]["read"];
    let own = stack["first_own_frame"].as_u64().unwrap_or(u64::MAX);
    let (source, _) = program.source();
    for (frame, function, comment) in [
        (own, read, "the end is read here"),
        (own.saturating_add(1), caller, "the leak"),
    ] {
        let frame = format!("/frames/{frame}");
        let part = |name: &str| at(stack, &format!("{frame}/{name}"));
        let line = program.line_of(comment).map(|line| line.to_string());
        assert!(part("function").contains(function), "{frame}: {document:#}");
        assert!(part("file").ends_with(source), "{frame}: {document:#}");
        assert_eq!(Some(part("line")), line, "{frame}: {document:#}");
    }
}

/// Asserts that the first frame of the program's own is this function, at the line with the comment.
#[track_caller]
fn has_own_frame(stack: &Value, program: Leaky, function: &str, comment: &str) {
    let own = at(stack, "/first_own_frame");
    let part = |name: &str| at(stack, &format!("/frames/{own}/{name}"));
    assert_eq!(part("function"), function, "{stack:#}");
    let line = program.line_of(comment).map(|line| line.to_string());
    assert_eq!(Some(part("line")), line, "{stack:#}");
}

fn names_lines(program: Leaky, read: &str, caller: &str) -> Result<()> {
    let scene = Scene::start(program)?;
    let document = scene.leaks(3)?;
    has_lines(&document, program, 3, read, caller);
    let pid = scene.server.pid().to_string();
    assert_eq!(at(&document, "/places/0/pid"), pid, "{document:#}");
    assert_eq!(at(&document, "/places/0/comm"), "leak", "{document:#}");
    Ok(())
}

fn c_has_its_lines() -> Result<()> {
    names_lines(Leaky::C, "read_to_end", "leaky_handler")
}

fn c_with_musl_has_its_lines() -> Result<()> {
    names_lines(Leaky::CWithMusl, "read_to_end", "leaky_handler")
}

fn c_with_frame_pointers_has_its_lines() -> Result<()> {
    names_lines(Leaky::CWithFramePointers, "read_to_end", "leaky_handler")
}

fn cpp_has_its_lines() -> Result<()> {
    names_lines(Leaky::Cpp, "shop::read_to_end", "shop::Leaky::handle")
}

fn rust_has_its_lines() -> Result<()> {
    names_lines(Leaky::Rust, "leak::read_to_end", "leak::leaky_handler")
}

fn go_has_its_lines() -> Result<()> {
    names_lines(Leaky::Go, "main.readToEnd", "main.leakyHandler")
}

fn c_without_symbols_has_addresses() -> Result<()> {
    let scene = Scene::start(Leaky::CStripped)?;
    let document = scene.leaks(2)?;
    let stack = &document["places"][0]["read"];
    let own = at(stack, "/first_own_frame");
    let frame = |name: &str| at(stack, &format!("/frames/{own}/{name}"));
    assert_eq!(frame("function"), "null", "{document:#}");
    assert_eq!(frame("module"), scene.server.file().display().to_string());
    // The callers of a file without symbols are found all the same: read_to_end, leaky_handler, serve and main.
    let frames = stack["frames"].as_array().context("no frames")?;
    let of_program = frames.iter().filter(|frame| frame["origin"] == "own");
    assert!(of_program.count() >= 4, "{document:#}");
    Ok(())
}

pub fn codes(document: &Value) -> Vec<String> {
    let problems = document["problems"].as_array().into_iter().flatten();
    problems.map(|problem| at(problem, "/code")).collect()
}

fn java_says_how_its_methods_get_names() -> Result<()> {
    let document = Scene::start(Leaky::Java)?.leaks(1)?;
    assert_eq!(codes(&document), ["no-perf-map"], "{document:#}");
    Ok(())
}

fn java_with_a_perf_map_has_its_methods() -> Result<()> {
    let scene = Scene::start(Leaky::JavaWithFramePointers)?;
    let tracing = Tracing::start(&scene.lab, "--port 7000 --json")?;
    scene.visit(b'L', 2)?;
    scene.until_stuck(2)?;
    // What was made since is named, too: the names are read at the end.
    let pid = scene.server.pid();
    let written = scene.lab.app_host().command("jcmd");
    let written = written
        .args([&pid.to_string(), "Compiler.perfmap"])
        .output()?;
    assert!(written.status.success(), "{written:?}");
    let document = tracing.interrupted()?.exits(0).json();
    let _ = std::fs::remove_file(format!("/tmp/perf-{pid}.map"));
    let stack = &document["places"][0]["read"];
    let own = stack["first_own_frame"]
        .as_u64()
        .context("no frame of its own")?;
    for (frame, method) in [(own, "Leak.readToEnd("), (own + 1, "Leak.leakyHandler(")] {
        let name = at(stack, &format!("/frames/{frame}/function"));
        assert!(name.contains(method), "{document:#}");
    }
    assert_eq!(codes(&document), [""; 0], "{document:#}");
    Ok(())
}

fn python_says_what_it_cannot_tell() -> Result<()> {
    let document = Scene::start(Leaky::Python)?.leaks(1)?;
    let codes = codes(&document);
    assert!(
        codes == ["old-python"] || codes == ["python-without-perf"],
        "{document:#}"
    );
    Ok(())
}

fn node_says_what_it_cannot_tell() -> Result<()> {
    let document = Scene::start(Leaky::Node)?.leaks(1)?;
    assert_eq!(codes(&document), ["node"], "{document:#}");
    Ok(())
}

fn a_rare_leak_among_many_connections_is_named() -> Result<()> {
    let scene = Scene::start(Leaky::C)?;
    let document = scene.traced(5, |_| {
        for _ in 0..5 {
            scene.visit(b'G', 99)?;
            scene.visit(b'L', 1)?;
        }
        Ok(())
    })?;
    has_lines(&document, Leaky::C, 5, "read_to_end", "leaky_handler");
    assert_eq!(at(&document, "/places/0/share"), "1.0", "{document:#}");
    Ok(())
}

/// The kernel takes the FIN together with the last bytes. A server that does not read again never gets a 0.
fn an_end_that_is_read_with_data_is_seen() -> Result<()> {
    let scene = Scene::start(Leaky::C)?;
    let document = scene.traced(3, |_| scene.visit(b'D', 3))?;
    assert_eq!(at(&document, "/place_unknown"), "0", "{document:#}");
    let stack = &document["places"][0]["read"];
    has_own_frame(stack, Leaky::C, "once_handler", "the end is read with data");
    Ok(())
}

fn two_leaks_have_their_shares() -> Result<()> {
    let scene = Scene::start(Leaky::C)?;
    let document = scene.traced(40, |_| {
        for _ in 0..5 {
            scene.visit(b'M', 2)?;
            scene.visit(b'L', 6)?;
            scene.visit(b'G', 8)?;
        }
        Ok(())
    })?;
    for (place, share, handler) in [(0, "0.75", "leaky_handler"), (1, "0.25", "other_handler")] {
        let place = &document["places"][place];
        assert_eq!(at(place, "/share"), share, "{document:#}");
        let own = place["read"]["first_own_frame"]
            .as_u64()
            .context("no frame of its own")?;
        let caller = at(place, &format!("/read/frames/{}/function", own + 1));
        assert_eq!(caller, handler, "{document:#}");
    }
    assert_eq!(document["places"].as_array().map(Vec::len), Some(2));
    Ok(())
}

fn a_client_has_the_line_that_connects() -> Result<()> {
    const COUNT: usize = 40;
    let lab = Lab::new()?;
    let server = lab.app_host().agent("server")?;
    let listener = server.listen(SERVER.into(), false, 64)?;
    let tracing = Tracing::start(&lab, "--peer-port 7000 --json")?;
    let client = Leaker::start(
        lab.app_host(),
        Leaky::Connect,
        &["7000", &COUNT.to_string()],
    )?;
    let accepted = server.accept(listener, COUNT, PATIENCE)?;
    let fds: Vec<_> = accepted.iter().map(|end| end.fd).collect();
    server.close(&fds)?;
    lab.wait_for(PATIENCE, || {
        let rows = lab.app_host().ss(&[])?;
        let stuck = rows.iter().filter(|row| row.state == TcpState::CloseWait);
        Ok(stuck.count() == COUNT)
    })?;
    let document = tracing.interrupted()?.exits(0).json();
    assert_eq!(
        at(&document, "/end_not_read"),
        COUNT.to_string(),
        "{document:#}"
    );
    let mut places = document["places"].as_array().into_iter().flatten();
    // While other tests open connections, not each is sampled.
    let place = places.find(|place| at(place, "/opened_how") == "connected");
    let place = place.with_context(|| format!("no place: {document:#}"))?;
    assert_eq!(at(place, "/pid"), client.pid().to_string(), "{document:#}");
    assert_eq!(at(place, "/read"), "null", "{document:#}");
    let stack = &place["opened_example"];
    has_own_frame(stack, Leaky::Connect, "open_connection", "connected here");
    Ok(())
}

fn what_was_stuck_before_is_counted() -> Result<()> {
    let (lab, _leak) = lab("unread", Family::V4, 2)?;
    let tracing = Tracing::start(&lab, "--port 8080 --json")?;
    let ran = tracing.interrupted()?.exits(1);
    let document = ran.json();
    assert_eq!(at(&document, "/stuck_before"), "2", "{document:#}");
    assert_eq!(at(&document, "/became_stuck"), "0", "{document:#}");
    // What selects owners and causes does not hide them at the begin.
    let tracing = Tracing::start(&lab, "--process * --cause unread --ok-if-none")?;
    let ran = tracing.interrupted()?.exits(0);
    assert!(
        ran.stdout
            .contains("2 were stuck before, and their places cannot be known"),
        "{ran:?}"
    );
    Ok(())
}

/// In a mount namespace of its own, by the build id alone.
fn a_container_has_its_own_debug_symbols() -> Result<()> {
    const PREPARE: &str = r#"
set -eu
cd "$1"
cc -O2 -g -static -o leak -x c "$2"
id=$(readelf --notes leak | sed -n 's/.*Build ID: //p')
directory=usr/lib/debug/.build-id/$(printf %.2s "$id")
mkdir -p "$directory" old
objcopy --only-keep-debug leak "$directory/${id#??}.debug"
strip leak
"#;
    let root = tempfile::tempdir()?;
    let source = tempfile::NamedTempFile::new()?;
    let (_, text) = Leaky::C.source();
    fs::write(source.path(), text)?;
    let prepared = Command::new("sh")
        .args(["-c", PREPARE, "sh"])
        .args([root.path(), source.path()])
        .output()?;
    ensure!(prepared.status.success(), "{prepared:?}");
    let root = root.path().to_str().context("a path of letters")?;
    const ENTER: &str =
        r#"mount --bind "$0" "$0" && cd "$0" && pivot_root . old && exec /leak 7000"#;
    let wrapper = ["unshare", "-m", "sh", "-c", ENTER, root];
    let scene = Scene::start_through(&wrapper, Leaky::C)?;
    let document = scene.leaks(3)?;
    let stack = &document["places"][0]["read"];
    let own = stack["first_own_frame"].as_u64().context("no own frame")?;
    let frame = |at: u64| &stack["frames"][usize::try_from(at).unwrap_or_default()];
    assert_eq!(at(frame(own), "/function"), "read_to_end", "{document:#}");
    let line = Leaky::C.line_of("the leak").map(|line| line.to_string());
    assert_eq!(Some(at(frame(own + 1), "/line")), line, "{document:#}");
    assert_eq!(at(frame(own), "/module"), "/leak", "{document:#}");
    Ok(())
}

/// As after an upgrade of its package.
fn a_deleted_program_has_its_lines() -> Result<()> {
    let scene = Scene::start(Leaky::C)?;
    std::fs::remove_file(scene.server.file())?;
    let document = scene.leaks(1)?;
    has_lines(&document, Leaky::C, 1, "read_to_end", "leaky_handler");
    Ok(())
}

fn a_trace_ends_by_itself() -> Result<()> {
    let lab = Lab::new()?;
    let tracing = Tracing::start(&lab, "--port 7000 --for 1s")?;
    let ran = tracing.ended()?.exits(1);
    assert_eq!(
        ran.stdout, "no socket became stuck in 1 s and stayed so\n",
        "{ran:?}"
    );
    Ok(())
}

fn a_person_gets_the_place_and_the_next_caller() -> Result<()> {
    let scene = Scene::start(Leaky::C)?;
    let tracing = Tracing::start(&scene.lab, "--port 7000")?;
    scene.visit(b'L', 3)?;
    scene.until_stuck(3)?;
    let ran = tracing.interrupted()?.exits(0);
    let head = format!("\n1. leak/{}: 3 of 3 (100 %), stuck ", scene.server.pid());
    assert!(ran.stdout.contains(&head), "{ran:?}");
    let line = |comment| Leaky::C.line_of(comment).unwrap_or_default();
    let (read, leak) = (line("the end is read here"), line("the leak"));
    let mut rows = ran.stdout.lines().skip_while(|row| !row.contains("   > "));
    for (start, end) in [
        ("   > read_to_end  ", format!("/leak.c:{read}")),
        ("     leaky_handler  ", format!("/leak.c:{leak}")),
    ] {
        let row = rows.next().unwrap_or_default();
        assert!(row.starts_with(start) && row.ends_with(&end), "{ran:?}");
    }
    Ok(())
}

/// Other tests trace at the same time, so the programs of this one are known by the process that holds their links.
fn nothing_stays_attached_after_a_kill() -> Result<()> {
    let lab = Lab::new()?;
    let tracing = Tracing::start(&lab, "--port 7000")?;
    let pid = tracing.child.id();
    let mut ids = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
        let text = std::fs::read_to_string(entry?.path())?;
        let id = text
            .lines()
            .find_map(|line| line.strip_prefix("prog_id:\t"));
        ids.extend(id.map(|id| id.trim().to_owned()));
    }
    // The two tracepoints and the iterator.
    assert!(ids.len() >= 3, "{ids:?}");
    let is_there = |id: &String| -> Result<bool> {
        let output = std::process::Command::new("bpftool")
            .args(["prog", "show", "id", id])
            .output()?;
        Ok(output.status.success())
    };
    for id in &ids {
        assert!(is_there(id)?, "{id}");
    }
    tracing.signal(Signal::SIGKILL)?;
    tracing.ended()?;
    // The kernel frees them a moment later.
    lab.wait_for(PATIENCE, || {
        let left = ids.iter().map(is_there).collect::<Result<Vec<_>>>()?;
        Ok(!left.contains(&true))
    })
}

fn without_privileges_it_says_what_it_needs() -> Result<()> {
    let lab = Lab::new()?;
    let command = lab.app_host().command(CWKILL).uid(65534);
    let ran = crate::support::ran(command.args(["trace", "--for", "1s"]))?.exits(3);
    ran.complains(
        "cwkill: cannot trace: it takes root, or CAP_BPF and CAP_PERFMON, or CAP_SYS_ADMIN: ",
    );
    let ran = cwkill(&lab, "trace --for 0s")?.exits(2);
    ran.complains("--for");
    Ok(())
}
