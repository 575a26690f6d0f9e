//! Runs the commands of the runbooks and of docs/tcp-states.md in the harness, and compares what they print.
//!
//! A fenced block is run if its first line starts with `$ `. The lines after a command are its expected output. Before the
//! block there is one of
//!
//! ```text
//! <!-- scenario: unread:3,established:2 -->     a new lab, as for `netns-harness run`; also: age=1s, idle=5s, family=v6
//! <!-- scenario: unread:3 outside -->            the same, with the commands on another host
//! <!-- scenario: none -->                       a host without sockets
//! <!-- scenario: gateway=masquerade:3 -->        a router, with connections from a client to port 443 of a server, and the commands on it
//! <!-- scenario: gateway=untracked:1 -->         the same, and conntrack does not know the connections
//! <!-- not run: why -->
//! ```
//!
//! or nothing, to use the lab of the block before. The documents show [`WRITTEN_PID`] as the pid of the application.
//! Commands read the pid from the shell variable `pid`, which `$ pid=18754` sets.
//!
//! With CWKILL_RENEW_RUNBOOKS=1 in the environment, the tests write outputs that differ into the documents.

use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use anyhow::{Context, Result, bail, ensure};
use netns_harness::{Agent, Dial, Family, Host, Lab, Leak, Nat, Routed, Side, TcpState, wait_for};
use regex::Regex;

use crate::AS_HARNESS;
use crate::support::{CWKILL, PATIENCE, count, cwkill, in_state, ran};
use crate::trial::{Test, once};

pub const TESTS: &[Test] = &[
    once!(tcp_states_prints_what_is_documented),
    once!(after_a_rule_change_prints_what_is_documented).slow(),
    once!(close_wait_without_a_pid_prints_what_is_documented).slow(),
    once!(end_a_connection_now_prints_what_is_documented).slow(),
    once!(from_a_timer_prints_what_is_documented).slow(),
    once!(inside_a_container_or_pod_prints_what_is_documented).slow(),
    once!(leave_it_running_prints_what_is_documented).slow(),
    once!(nothing_is_found_and_yet_prints_what_is_documented).slow(),
    once!(one_connection_blocks_a_drain_prints_what_is_documented).slow(),
    once!(thousands_of_close_wait_prints_what_is_documented).slow(),
    once!(too_many_open_files_prints_what_is_documented).slow(),
    once!(every_runbook_has_its_parts_and_runs_commands),
    once!(a_wrong_documented_output_is_detected),
    once!(only_varying_values_are_ignored),
];

/// Each has a test above.
const RUNBOOKS: [&str; 10] = [
    "after-a-rule-change",
    "close-wait-without-a-pid",
    "end-a-connection-now",
    "from-a-timer",
    "inside-a-container-or-pod",
    "leave-it-running",
    "nothing-is-found-and-yet",
    "one-connection-blocks-a-drain",
    "thousands-of-close-wait",
    "too-many-open-files",
];

/// The pid of the application in the documents, so that they do not change with every renewal.
const WRITTEN_PID: &str = "18754";

fn docs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("docs")
}

fn every_runbook_has_its_parts_and_runs_commands() -> Result<()> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(docs().join("runbooks"))? {
        let name = entry?.file_name().into_string().expect("UTF-8");
        names.push(name.trim_end_matches(".md").to_owned());
    }
    names.sort();
    assert_eq!(names, RUNBOOKS);
    for name in RUNBOOKS {
        let text = std::fs::read_to_string(docs().join(format!("runbooks/{name}.md")))?;
        for part in ["## How to undo or limit harm", "## When not to use cwkill"] {
            assert!(text.contains(part), "{name} has no part \"{part}\"");
        }
        // Somebody pastes it on a firewall.
        for harm in ["flush ruleset", "flush table", "conntrack -F"] {
            assert!(!text.contains(&format!("$ nft {harm}")), "{name}: {harm}");
            assert!(!text.contains(&format!("$ {harm}")), "{name}: {harm}");
        }
        assert!(Document::parse(&text)?.runs() > 0, "{name} runs nothing");
    }
    Ok(())
}

fn tcp_states_prints_what_is_documented() -> Result<()> {
    prints_what_is_documented("tcp-states.md")
}

fn after_a_rule_change_prints_what_is_documented() -> Result<()> {
    let name = "runbooks/after-a-rule-change.md";
    prints_what_is_documented(name)?;
    let text = std::fs::read_to_string(docs().join(name))?;
    // What a renewal cannot see: the last example is about a connection without an entry, so without a state and an age.
    let without_entry = Regex::new(r"(?m)^10\.79\.1\.2:\d+ +10\.79\.2\.2:443 +- +- +cut$")?;
    assert!(without_entry.is_match(&text), "{text}");
    Ok(())
}

fn end_a_connection_now_prints_what_is_documented() -> Result<()> {
    prints_what_is_documented("runbooks/end-a-connection-now.md")
}

fn close_wait_without_a_pid_prints_what_is_documented() -> Result<()> {
    prints_what_is_documented("runbooks/close-wait-without-a-pid.md")
}

fn from_a_timer_prints_what_is_documented() -> Result<()> {
    prints_what_is_documented("runbooks/from-a-timer.md")
}

fn leave_it_running_prints_what_is_documented() -> Result<()> {
    prints_what_is_documented("runbooks/leave-it-running.md")
}

fn inside_a_container_or_pod_prints_what_is_documented() -> Result<()> {
    prints_what_is_documented("runbooks/inside-a-container-or-pod.md")
}

fn nothing_is_found_and_yet_prints_what_is_documented() -> Result<()> {
    prints_what_is_documented("runbooks/nothing-is-found-and-yet.md")
}

fn one_connection_blocks_a_drain_prints_what_is_documented() -> Result<()> {
    prints_what_is_documented("runbooks/one-connection-blocks-a-drain.md")
}

fn thousands_of_close_wait_prints_what_is_documented() -> Result<()> {
    prints_what_is_documented("runbooks/thousands-of-close-wait.md")
}

fn too_many_open_files_prints_what_is_documented() -> Result<()> {
    prints_what_is_documented("runbooks/too-many-open-files.md")
}

fn prints_what_is_documented(name: &str) -> Result<()> {
    let renew = std::env::var_os("CWKILL_RENEW_RUNBOOKS").is_some();
    let path = docs().join(name);
    let text = std::fs::read_to_string(&path).context(name.to_owned())?;
    let (differences, renewed) = Document::parse(&text)?.run()?;
    if renew && renewed != text {
        std::fs::write(&path, renewed)?;
    }
    assert!(
        renew || differences.is_empty(),
        "{name}: {}",
        differences.join("\n")
    );
    Ok(())
}

/// A document: text, labs, and commands with their outputs.
struct Document {
    parts: Vec<Block>,
}

enum Block {
    /// A line outside the blocks that are run.
    Line(String),
    /// The commands after this run in a new lab.
    NewLab(Scenarios),
    Command {
        line: String,
        output: Vec<String>,
    },
}

/// The rules of a router.
#[derive(Clone, Copy)]
enum Rules {
    /// This NAT, and connection tracking.
    Of(Nat),
    /// None, so that conntrack does not know its connections.
    Untracked,
}

/// The content of `<!-- scenario: … -->`.
#[derive(Clone, Default)]
struct Scenarios {
    wanted: Vec<(String, usize)>,
    family: Option<Family>,
    /// How old the sockets must be before the first command.
    age: Option<String>,
    /// For how long no data must have moved in them before the first command.
    idle: Option<String>,
    /// The commands run on another host.
    outside: bool,
    /// The rules of a router on which the commands run, and the connections through it.
    gateway: Option<(Rules, usize)>,
}

impl Scenarios {
    fn parse(text: &str) -> Result<Self> {
        let mut scenarios = Scenarios::default();
        for word in text.split_whitespace() {
            match word.split_once('=') {
                Some(("age", age)) => scenarios.age = Some(age.to_owned()),
                Some(("idle", idle)) => scenarios.idle = Some(idle.to_owned()),
                Some(("family", name)) => {
                    let family = Family::ALL.into_iter().find(|f| f.name() == name);
                    scenarios.family = Some(family.with_context(|| format!("no family {name}"))?);
                }
                Some(("gateway", gateway)) => {
                    let (nat, count) = gateway.split_once(':').context("no count")?;
                    let rules = match nat {
                        "none" => Rules::Of(Nat::None),
                        "masquerade" => Rules::Of(Nat::Masquerade),
                        "redirect" => Rules::Of(Nat::Redirect),
                        "both" => Rules::Of(Nat::Both),
                        "untracked" => Rules::Untracked,
                        _ => bail!("no NAT {nat}"),
                    };
                    scenarios.gateway = Some((rules, count.parse()?));
                }
                Some(_) => {
                    bail!("`{word}` is none of age=1s, idle=5s, family=v6 and gateway=both:3")
                }
                None if word == "none" => {}
                None if word == "outside" => scenarios.outside = true,
                None => {
                    for one in word.split(',') {
                        let (name, count) = one.split_once(':').unwrap_or((one, "1"));
                        let count = count.parse().with_context(|| one.to_owned())?;
                        scenarios.wanted.push((name.to_owned(), count));
                    }
                }
            }
        }
        Ok(scenarios)
    }

    fn start(&self) -> Result<(Lab, Vec<Leak>)> {
        let lab = Lab::new()?;
        let family = self.family.unwrap_or(Family::V4);
        let started = self.wanted.iter();
        let started = started.map(|(name, number)| lab.start(name, family, count(*number)));
        let leaks: Vec<Leak> = started.collect::<Result<_>>()?;
        let limits = [("--min-age", &self.age), ("--min-idle", &self.idle)];
        for (option, limit) in limits {
            let Some(limit) = limit else { continue };
            let line = format!("{option} {limit} --dry-run --jsonl");
            let all = in_state(&lab, TcpState::CloseWait)?;
            lab.wait_for(PATIENCE, || {
                Ok(cwkill(&lab, &line)?.stdout.lines().count() == all)
            })?;
        }
        Ok((lab, leaks))
    }
}

/// A router with connections through it, and their ends.
struct Gateway {
    routed: Routed,
    _ends: [Agent; 2],
}

impl Gateway {
    /// The port of the server.
    const SERVICE: u16 = 443;
    /// The port of the client in the first connection. The others follow.
    const FIRST: u16 = 40_001;

    fn start(rules: Rules, count: usize, age: Option<&str>) -> Result<Self> {
        let routed = Routed::new()?;
        let ports = [(Self::SERVICE, Self::SERVICE)];
        let to = match rules {
            Rules::Of(nat) => routed.translate(Family::V4, nat, &ports)?[0],
            Rules::Untracked => SocketAddr::new(Side::Server.host(Family::V4), Self::SERVICE),
        };
        let (client, server) = (
            routed.client.agent("client")?,
            routed.server.agent("server")?,
        );
        let any = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), Self::SERVICE);
        let listener = server.listen(any, false, 64)?;
        let dial = Dial {
            from: Some(SocketAddr::new(Side::Client.host(Family::V4), Self::FIRST)),
            ..Dial::default()
        };
        client.connect(to, count, dial, PATIENCE)?;
        server.accept(listener, count, PATIENCE)?;
        if let Some(age) = age {
            wait_for(PATIENCE, || {
                let command = routed.router.command(CWKILL);
                let ran = ran(command.args(["gateway", "--jsonl", "--min-age", age]))?;
                Ok(ran.stdout.lines().count() == count)
            })?;
        }
        Ok(Gateway {
            routed,
            _ends: [client, server],
        })
    }
}

/// The content of the line if it is the comment with this name.
fn comment<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    let inner = line.trim().strip_prefix("<!--")?.strip_suffix("-->")?;
    inner.trim().strip_prefix(name)?.strip_prefix(':')
}

impl Document {
    fn parse(text: &str) -> Result<Self> {
        let mut parts = Vec::new();
        let mut lines = text.lines().peekable();
        let (mut lab, mut not_run) = (false, false);
        while let Some(line) = lines.next() {
            parts.push(Block::Line(line.to_owned()));
            if let Some(scenarios) = comment(line, "scenario") {
                parts.push(Block::NewLab(
                    Scenarios::parse(scenarios).context(line.to_owned())?,
                ));
                lab = true;
            }
            not_run |= comment(line, "not run").is_some();
            if !line.starts_with("```") {
                continue;
            }
            let run = lines.peek().is_some_and(|next| next.starts_with("$ ")) && !not_run;
            ensure!(lab || !run, "nothing says where to run {:?}", lines.peek());
            not_run = false;
            for line in lines.by_ref() {
                if line == "```" {
                    parts.push(Block::Line(line.to_owned()));
                    break;
                }
                match (line.strip_prefix("$ "), parts.last_mut()) {
                    (Some(command), _) if run => parts.push(Block::Command {
                        line: command.to_owned(),
                        output: Vec::new(),
                    }),
                    (None, Some(Block::Command { output, .. })) => output.push(line.to_owned()),
                    _ => parts.push(Block::Line(line.to_owned())),
                }
            }
        }
        Ok(Document { parts })
    }

    fn runs(&self) -> usize {
        let commands = self.parts.iter();
        commands
            .filter(|part| matches!(part, Block::Command { .. }))
            .count()
    }

    /// Runs all commands. Returns the differences, and the document with the actual outputs.
    fn run(&self) -> Result<(Vec<String>, String)> {
        let programs = programs()?;
        let (mut differences, mut renewed) = (Vec::new(), String::new());
        let mut place: Option<Session> = None;
        for part in &self.parts {
            match part {
                Block::Line(line) => renewed += &format!("{line}\n"),
                Block::NewLab(scenarios) => {
                    // The lab before is removed first.
                    drop(place.take());
                    place = Some(Session::new(scenarios)?);
                }
                Block::Command { line, output } => {
                    let place = place.as_mut().context("no lab")?;
                    let printed = place.run(programs.path(), line)?;
                    let same = normal(&printed) == normal(output);
                    if !same {
                        differences.push(format!(
                            "$ {line}\n--- is\n{}\n--- written\n{}\n",
                            printed.join("\n"),
                            output.join("\n")
                        ));
                    }
                    renewed += &format!("$ {line}\n");
                    for line in if same { output } else { &printed } {
                        renewed += &format!("{line}\n");
                    }
                }
            }
        }
        Ok((differences, renewed))
    }
}

/// A lab, and the state that a shell in it keeps from one command to the next.
struct Session {
    lab: Lab,
    outside: Option<Lab>,
    gateway: Option<Gateway>,
    leaks: Vec<Leak>,
    status: i32,
    /// Set once the document has set it.
    pid: Option<String>,
}

impl Session {
    fn new(scenarios: &Scenarios) -> Result<Self> {
        let (lab, leaks) = scenarios.start()?;
        let gateway = scenarios
            .gateway
            .map(|(rules, count)| Gateway::start(rules, count, scenarios.age.as_deref()));
        Ok(Session {
            lab,
            gateway: gateway.transpose()?,
            outside: scenarios.outside.then(Lab::new).transpose()?,
            leaks,
            status: 0,
            pid: None,
        })
    }

    /// Runs a command and returns the lines that it printed.
    fn run(&mut self, programs: &Path, line: &str) -> Result<Vec<String>> {
        let pid = self.leaks.first().map(|leak| leak.app().pid().to_string());
        if let Some(written) = line.strip_prefix("pid=") {
            ensure!(written == WRITTEN_PID, "write pid={WRITTEN_PID}");
            self.pid = Some(pid.context("no application has a pid")?);
            return Ok(Vec::new());
        }
        let path = std::env::var("PATH").context("PATH")?;
        let script = format!(
            "exec 2>&1; cd {}; (exit {}); {line}",
            programs.display(),
            self.status
        );
        let host: &Host = match &self.gateway {
            Some(gateway) => &gateway.routed.router,
            None => self.outside.as_ref().unwrap_or(&self.lab).app_host(),
        };
        let mut command = host.command("sh").args(["-c", &script]);
        if let Some(pid) = &self.pid {
            command = command.env("pid", pid);
        }
        let ran = ran(command.env("PATH", format!("{}:{path}", programs.display())))?;
        self.status = ran.code.with_context(|| format!("killed: {ran:?}"))?;
        let stdout = NAMESPACES_OF_OTHERS.replace_all(&ran.stdout, "");
        let lines = stdout.lines().map(|line| match &pid {
            Some(pid) => ["/", "-p ", "--pid "].into_iter().fold(
                line.trim_end().to_owned(),
                |line, before| {
                    line.replace(&format!("{before}{pid}"), &format!("{before}{WRITTEN_PID}"))
                },
            ),
            None => line.trim_end().to_owned(),
        });
        Ok(lines.collect())
    }
}

/// A directory with the programs `cwkill` and `netns-harness`. This program acts as the harness.
fn programs() -> Result<tempfile::TempDir> {
    let directory = tempfile::tempdir()?;
    std::os::unix::fs::symlink(CWKILL, directory.path().join("cwkill"))?;
    let harness = directory.path().join("netns-harness");
    let ours = std::env::current_exe()?;
    let script = format!("#!/bin/sh\n{AS_HARNESS}=1 exec {} \"$@\"\n", ours.display());
    std::fs::write(&harness, script)?;
    std::fs::set_permissions(&harness, std::fs::Permissions::from_mode(0o755))?;
    Ok(directory)
}

/// Patterns of texts that vary from run to run, and their replacements.
static VARIES: LazyLock<Vec<(Regex, &str)>> = LazyLock::new(|| {
    [
        // The program's name, then its pid; in /proc and as `users:((…,pid=1,fd=4))` too.
        (r"\b([a-z][a-z-]*)/[0-9]+\b", "$1/PID"),
        (r"\bpid=[0-9]+", "pid=PID"),
        (r"\(thread [0-9]+\)", "(thread TID)"),
        (r"(-p|--pid) [0-9]+", "$1 PID"),
        // RLIMIT_NOFILE depends on the machine.
        (r"\bof [0-9]+ \([0-9]+%\)", "of LIMIT"),
        (r#"("(?:pid|inode|age_ms|idle_ms|uid)": ?)[0-9]+"#, "${1}N"),
        (r#"("cookie": ?")[0-9a-f]{16}"#, "${1}COOKIE"),
        // The peer has any port, the application has 8080.
        (r"(10\.78\.[0-9]+\.1:)8080\b", "${1}APPLICATION"),
        (r"(10\.78\.[0-9]+\.[12]:)[0-9]+", "${1}PORT"),
        (r#"("peer":\{"address":"[^"]*","port":)[0-9]+"#, "${1}PORT"),
        (r"\b([0-9]+(\.[0-9]+)?(ms|[smhd]))+\b", "AGE"),
        (r"\bin [0-9]+ s\b", "in AGE"),
        (r"\b[0-9]+\.[0-9] ms\b", "DURATION"),
        // The number of bytes queued to a peer with a small window.
        (r"\b[0-9]{6,}\b", "BYTES"),
        (r"\s+", " "),
        (r"^ | $", ""),
    ]
    .map(|(pattern, text)| (Regex::new(pattern).expect("fixed and valid"), text))
    .into()
});

/// The tests run side by side, each in a namespace of its own.
static NAMESPACES_OF_OTHERS: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new(
        r"[;,] [0-9]+ network namespaces? (without TCP sockets not looked into|not looked into \(--all-netns\)(: at most [0-9]+ TCP sockets?)?)",
    )
    .expect("fixed and valid")
});

/// Lines that depend on other processes of this machine. Where one cannot be read, it may hold what is in flight.
static OF_THE_MACHINE: LazyLock<Regex> = LazyLock::new(|| {
    Regex::new("could not be read|in flight over a Unix socket|^cwkill: hint: ")
        .expect("fixed and valid")
});

/// The lines without the parts that vary. They are sorted, because their order depends on the ages of the sockets.
fn normal(lines: &[String]) -> Vec<String> {
    let lines = lines.iter().filter(|line| !OF_THE_MACHINE.is_match(line));
    let mut lines: Vec<String> = lines
        .map(|line| {
            VARIES.iter().fold(line.clone(), |line, (pattern, text)| {
                pattern.replace_all(&line, *text).into_owned()
            })
        })
        .filter(|line| !line.is_empty())
        .collect();
    lines.sort();
    lines
}

fn a_wrong_documented_output_is_detected() -> Result<()> {
    let right = "<!-- scenario: unread:2,established -->\n```console\n$ cwkill --min-idle 0s | tail -n 1\n\
        2 sockets stuck: 2 unread\n$ cwkill --port 9 -q\n$ echo $?\n1\n```\n";
    let (differences, renewed) = Document::parse(right)?.run()?;
    assert!(
        differences.is_empty() && renewed == right,
        "{differences:?}"
    );
    for (from, to) in [
        ("2 unread", "3 unread"),
        ("\n1\n", "\n0\n"),
        ("-q\n", "-q\nsomething\n"),
    ] {
        let (differences, renewed) = Document::parse(&right.replace(from, to))?.run()?;
        assert!(
            differences.len() == 1 && renewed == right,
            "{to}: {differences:?}"
        );
    }
    assert!(Document::parse("```\n$ cwkill\n```\n").is_err());
    Ok(())
}

fn only_varying_values_are_ignored() -> Result<()> {
    let same = |one: &str, other: &str| normal(&[one.to_owned()]) == normal(&[other.to_owned()]);
    let row = "leaky-app/17    4  10.78.1.1:8080  10.78.1.2:5506   528ms       8       0  unread";
    for other in [
        "leaky-app/29406  4  10.78.1.1:8080  10.78.1.2:50290  2m3s  8  0  unread",
        "leaky-app/1  4  10.78.1.1:8080  10.78.1.2:1  1s  8  0  unread",
    ] {
        assert!(same(row, other), "{other}");
    }
    for (from, to) in [
        ("unread", "drained"),
        (" 8 ", " 9 "),
        ("app/", "ape/"),
        (".1:8080", ".1:80"),
    ] {
        assert!(!same(row, &row.replacen(from, to, 1)), "{to}");
    }
    assert!(!same(
        "3 sockets matched: 3 closed",
        "3 sockets matched: 2 closed"
    ));
    Ok(())
}
