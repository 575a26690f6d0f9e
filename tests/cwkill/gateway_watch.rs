//! `cwkill gateway --watch`: connections are ended as they come. The tests need nft(8).

use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::process::{Child, ChildStdout, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use netns_harness::{
    Agent, Dial, Endpoint, Family, Fd, HostCommand, Nat, Recv, Routed, Side, address, wait_for,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

use crate::gateway::Gateway;
use crate::gateway_cut::{carries_data, connections, segments, settled_segments};
use crate::support::{CWKILL, PATIENCE, Ran, at, ran};
use crate::trial::{Test, each_family, once};

pub const TESTS: &[Test] = &[
    each_family!(connections_are_cut_as_they_come_and_bystanders_live),
    once!(ctrl_c_ends_a_watch_in_order),
    once!(a_watch_ends_by_itself),
    once!(a_dry_run_of_a_watch_sends_nothing),
    once!(a_watch_without_an_act_lists_what_comes),
    once!(lost_events_are_said_and_made_up_for),
    once!(without_events_the_table_is_listed),
    once!(doctor_says_whether_there_are_events),
    once!(each_connection_of_a_watch_is_recorded),
    once!(a_dead_neighbour_holds_up_a_watch_once),
    once!(a_watch_uses_links_that_come_and_go),
];

/// A watch that runs.
pub struct Watching {
    child: Child,
    rows: BufReader<ChildStdout>,
}

impl Watching {
    fn start(gateway: &Gateway, line: &str) -> Result<Self> {
        let command = gateway.lab.router.command(CWKILL).arg("gateway");
        Watching::run(command.args(line.split_whitespace()))
    }

    pub fn run(command: HostCommand<'_>) -> Result<Self> {
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let rows = BufReader::new(child.stdout.take().context("no stdout")?);
        Ok(Watching { child, rows })
    }

    /// The next line, which it writes when something has come.
    pub fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        assert!(self.rows.read_line(&mut line)? > 0, "it has ended");
        Ok(line)
    }

    /// The next object of a watch with `--jsonl`.
    pub fn object(&mut self) -> Result<Value> {
        serde_json::from_str(&self.line()?).context("a line that is no object")
    }

    /// The next object that is not of a connection that was gone: where a SYN comes twice, the second ends the questions, and the connection
    /// is dealt with again.
    pub fn object_of_living(&mut self) -> Result<Value> {
        loop {
            let object = self.object()?;
            if at(&object, "/result/outcome") != "gone" {
                return Ok(object);
            }
        }
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(self.child.id().try_into()?), signal)?)
    }

    /// What is left to read after its end, with what it has said on standard error.
    pub fn ended(mut self) -> Result<Ran> {
        let mut rest = Vec::new();
        self.rows.read_to_end(&mut rest)?;
        let mut output = self.child.wait_with_output()?;
        output.stdout = rest;
        Ran::of("cwkill gateway --watch", output)
    }

    pub fn interrupted(self) -> Result<Ran> {
        self.signal(Signal::SIGINT)?;
        self.ended()
    }
}

/// Dials without waiting: the connection may be cut before anybody has seen it open.
fn dial(gateway: &Gateway) -> Result<Endpoint> {
    let dial = Dial {
        detached: true,
        ..Dial::default()
    };
    Ok(gateway.client.connect(gateway.to, 1, dial, PATIENCE)?[0])
}

/// Forgets the connections that wait for accept(2): those that were cut are among them.
fn listen_anew(gateway: &mut Gateway) -> Result<()> {
    gateway.server.close(&[gateway.listener])?;
    let any = if gateway.to.is_ipv4() {
        "0.0.0.0"
    } else {
        "::"
    };
    let address = SocketAddr::new(any.parse()?, 7000);
    gateway.listener = gateway.server.listen(address, gateway.to.is_ipv6(), 64)?;
    Ok(())
}

#[track_caller]
fn is_reset(gateway: &Gateway, fd: Fd) -> Result<()> {
    let got = gateway.client.recv(fd, 100, PATIENCE)?;
    assert_eq!(got, Recv::Failed(libc::ECONNRESET));
    Ok(())
}

/// A connection to another port of the server.
fn bystander(gateway: &Gateway, listener: Fd, to: SocketAddr) -> Result<(Endpoint, Endpoint)> {
    let opened = gateway.client.connect(to, 1, Dial::default(), PATIENCE)?;
    let accepted = gateway.server.accept(listener, 1, PATIENCE)?;
    Ok((opened[0], accepted[0]))
}

/// Neither host has a connection on the port of the server.
fn all_are_over(gateway: &Gateway, left: usize) -> Result<()> {
    for host in [&gateway.lab.client, &gateway.lab.server] {
        wait_for(PATIENCE, || Ok(connections(host)? == left))?;
    }
    Ok(())
}

fn connections_are_cut_as_they_come_and_bystanders_live(family: Family) -> Result<()> {
    const COUNT: usize = 40;
    let mut gateway = Gateway::start(family, Nat::Masquerade)?;
    let other = SocketAddr::new(Side::Server.host(family), 7001);
    let any = if other.is_ipv4() { "0.0.0.0" } else { "::" };
    let listener = gateway.server.listen(
        SocketAddr::new(any.parse()?, 7001),
        family == Family::V6,
        64,
    )?;
    let mut bystanders = vec![bystander(&gateway, listener, other)?];
    let before = gateway.connect(1)?[0].0;
    let line = "--dport 7000 --cut --active --watch --jsonl";
    let mut watching = Watching::start(&gateway, line)?;
    // It hears events from before the first list on.
    is_reset(&gateway, before.fd)?;
    for nth in 0..COUNT {
        let fd = dial(&gateway)?.fd;
        is_reset(&gateway, fd)?;
        if nth % 8 == 0 {
            bystanders.push(bystander(&gateway, listener, other)?);
        }
    }
    let mut cut = 0;
    while cut < COUNT + 1 {
        let object = watching.object_of_living()?;
        assert_eq!(at(&object, "/result/outcome"), "cut", "{object:#}");
        assert_eq!(at(&object, "/original/dst/port"), "7000", "{object:#}");
        cut += 1;
    }
    all_are_over(&gateway, bystanders.len())?;
    let ran = watching.interrupted()?.exits(0);
    assert_eq!(ran.stdout, "", "{ran:?}");
    ran.complains(&format!("forwarded connections: {} cut", COUNT + 1));
    for pair in bystanders {
        carries_data(&gateway, pair)?;
    }
    // Nobody ends what comes now.
    listen_anew(&mut gateway)?;
    let after = gateway.connect(1)?[0];
    carries_data(&gateway, after)
}

/// The batch in flight gets its RSTs, its verdicts and its records.
fn ctrl_c_ends_a_watch_in_order() -> Result<()> {
    let gateway = Gateway::start(Family::V4, Nat::None)?;
    let pairs = gateway.connect(3)?;
    // So slow that Ctrl-C comes before the last packet.
    let line = "--all --cut --active --watch --rate 20 -v";
    let mut watching = Watching::start(&gateway, line)?;
    let header = watching.line()?;
    assert!(header.starts_with("SOURCE"), "{header}");
    watching.signal(Signal::SIGINT)?;
    let ran = watching.ended()?;
    let cut = ran
        .stdout
        .matches("cut: source gone, destination gone")
        .count();
    assert!(cut >= 1, "{ran:?}");
    let left = connections(&gateway.lab.client)?;
    assert_eq!(left, connections(&gateway.lab.server)?, "{ran:?}");
    assert_eq!(left, pairs.len() - cut, "{ran:?}");
    let summary = ran.stdout.lines().last().unwrap_or_default();
    assert!(summary.contains("watched for"), "{ran:?}");
    // What it knew of and did not reach is said.
    let (status, is_said) = match left {
        0 => (0, false),
        _ => (4, true),
    };
    assert_eq!(summary.contains("not reached"), is_said, "{ran:?}");
    ran.exits(status);
    Ok(())
}

fn a_watch_ends_by_itself() -> Result<()> {
    let mut gateway = Gateway::start(Family::V4, Nat::None)?;
    let nothing = "--host 192.0.2.1 --cut --active --watch --for 100ms";
    let ran = gateway.gateway(nothing)?.exits(1);
    let expected = "0 forwarded connections; watched for";
    assert!(ran.stdout.starts_with(expected), "{ran:?}");
    gateway
        .gateway(&format!("{nothing} --ok-if-none"))?
        .exits(0);
    // By the number: the third is left alone.
    gateway.connect(1)?;
    let line = "--all --cut --active --watch --max-kills 2 --jsonl";
    let mut watching = Watching::start(&gateway, line)?;
    watching.object()?;
    is_reset(&gateway, dial(&gateway)?.fd)?;
    assert_eq!(at(&watching.object_of_living()?, "/result/outcome"), "cut");
    watching.ended()?.exits(0).complains(": 2 cut");
    listen_anew(&mut gateway)?;
    let third = gateway.connect(1)?[0];
    carries_data(&gateway, third)
}

fn a_dry_run_of_a_watch_sends_nothing() -> Result<()> {
    let gateway = Gateway::start(Family::V4, Nat::Masquerade)?;
    let first = gateway.connect(1)?[0];
    let mut watching = Watching::start(&gateway, "--all --cut --watch -n --jsonl")?;
    let object = watching.object()?;
    assert_eq!(at(&object, "/plan"), "cut", "{object:#}");
    assert_eq!(at(&object, "/result"), "null", "{object:#}");
    let second = gateway.connect(1)?[0];
    let object = watching.object()?;
    let port = second.0.local.port().to_string();
    assert_eq!(at(&object, "/original/src/port"), port);
    carries_data(&gateway, first)?;
    carries_data(&gateway, second)?;
    let before = settled_segments(&gateway)?;
    let ran = watching.interrupted()?.exits(0);
    assert_eq!(ran.stdout, "", "each is shown once: {ran:?}");
    ran.complains("dry run, nothing was sent");
    gateway
        .gateway("--all --cut --watch -n --for 100ms")?
        .exits(0);
    assert_eq!(segments(&gateway)?, before);
    Ok(())
}

fn a_watch_without_an_act_lists_what_comes() -> Result<()> {
    let gateway = Gateway::start(Family::V4, Nat::Both)?;
    gateway.connect(1)?;
    let mut watching = Watching::start(&gateway, "--watch")?;
    let header = watching.line()?;
    assert!(
        header.contains("NAT-SRC") && !header.contains("PLAN"),
        "{header}"
    );
    watching.line()?;
    let new = gateway.connect(1)?[0];
    let row = watching.line()?;
    assert!(row.starts_with(&new.0.local.to_string()), "{row}");
    assert!(row.trim_end().ends_with("ESTABLISHED"), "{row}");
    let ran = watching.interrupted()?.exits(0);
    assert!(
        ran.stdout
            .starts_with("2 forwarded connections; watched for"),
        "{ran:?}"
    );
    carries_data(&gateway, new)
}

/// While it is stopped, more events come than its queue takes.
fn lost_events_are_said_and_made_up_for() -> Result<()> {
    let gateway = Gateway::start(Family::V4, Nat::None)?;
    let first = gateway.connect(1)?[0].0;
    let line = "--dport 7000 --cut --active --watch --jsonl";
    let mut watching = Watching::start(&gateway, line)?;
    is_reset(&gateway, first.fd)?;
    assert_eq!(at(&watching.object_of_living()?, "/result/outcome"), "cut");
    watching.signal(Signal::SIGSTOP)?;
    // Each datagram makes an entry, and so an event.
    let server = Side::Server.host(Family::V4);
    let script =
        format!("for port in {{1..25000}}; do echo > /dev/udp/{server}/$port; done; exit 0");
    ran(gateway.lab.client.command("bash").args(["-c", &script]))?.exits(0);
    let new = gateway.connect(1)?[0].0;
    watching.signal(Signal::SIGCONT)?;
    is_reset(&gateway, new.fd)?;
    assert_eq!(at(&watching.object_of_living()?, "/result/outcome"), "cut");
    watching
        .interrupted()?
        .exits(0)
        .complains("some are lost: the table is listed again")
        .complains("events were lost");
    Ok(())
}

fn without_events_the_table_is_listed() -> Result<()> {
    let gateway = Gateway::start(Family::V4, Nat::None)?;
    gateway.sh("echo 0 > /proc/sys/net/netfilter/nf_conntrack_events")?;
    gateway.connect(1)?;
    let mut watching = Watching::start(&gateway, "--all --cut --active --watch --jsonl")?;
    watching.object()?;
    is_reset(&gateway, dial(&gateway)?.fd)?;
    assert_eq!(at(&watching.object_of_living()?, "/result/outcome"), "cut");
    watching
        .interrupted()?
        .exits(0)
        .complains("nf_conntrack_events is 0");
    Ok(())
}

fn doctor_says_whether_there_are_events() -> Result<()> {
    let lab = Routed::new()?;
    lab.translate(Family::V4, Nat::None, &[])?;
    for (setting, is_heard) in [(0, "false"), (1, "true"), (2, "true")] {
        let script = format!("echo {setting} > /proc/sys/net/netfilter/nf_conntrack_events");
        ran(lab.router.command("sh").args(["-ec", &script]))?.exits(0);
        let ran = ran(lab.router.command(CWKILL).args(["doctor", "--json"]))?;
        let document = ran.json();
        let mut checks = document["checks"].as_array().context("no checks")?.iter();
        let line = checks.find(|check| at(check, "/name") == "gateway events");
        let line = line.context("no line")?;
        assert_eq!(at(line, "/ok"), is_heard, "{setting}: {line}");
    }
    Ok(())
}

fn each_connection_of_a_watch_is_recorded() -> Result<()> {
    let gateway = Gateway::start(Family::V4, Nat::Both)?;
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("acts.jsonl");
    let line = "--all --cut --active --watch --log-file /nowhere/log";
    gateway
        .gateway(line)?
        .exits(3)
        .complains("nothing was done");
    gateway.connect(1)?;
    let line = format!(
        "--all --cut --active --watch --jsonl --log-file {}",
        path.display()
    );
    let mut watching = Watching::start(&gateway, &line)?;
    watching.object()?;
    is_reset(&gateway, dial(&gateway)?.fd)?;
    watching.object_of_living()?;
    watching.interrupted()?.exits(0);
    let text = std::fs::read_to_string(&path)?;
    let records: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).context("a record"))
        .collect::<Result<_>>()?;
    let events: Vec<String> = records.iter().map(|record| at(record, "/event")).collect();
    // One that was gone has a pair of its own.
    let of_acts = events.strip_prefix(&["begin".to_owned()][..]);
    let of_acts = of_acts.and_then(|events| events.strip_suffix(&["end".to_owned()][..]));
    let of_acts = of_acts.context("no begin, or no end")?;
    let pairs = of_acts.chunks(2);
    assert!(of_acts.len() >= 4, "{text}");
    pairs.for_each(|pair| assert_eq!(pair, ["intent", "outcome"], "{text}"));
    assert_eq!(at(&records[0], "/watch"), "true", "{text}");
    let last = &records[records.len() - 2..];
    assert_eq!(at(&last[0], "/connection/result/outcome"), "cut");
    assert_eq!(at(&last[1], "/summary/cut"), "2");
    Ok(())
}

/// The first connection waits for the answer to ARP for longer than the second one may take.
fn a_dead_neighbour_holds_up_a_watch_once() -> Result<()> {
    const RESOLVE: Duration = Duration::from_secs(3);
    let gateway = Gateway::start(Family::V4, Nat::None)?;
    let line = "--cut --conntrack-state syn-sent --all --watch --jsonl";
    let mut watching = Watching::start(&gateway, line)?;
    // Nobody has this address.
    let to = SocketAddr::new(address(Family::V4, 2, 200), 7000);
    let mut took = || -> Result<Duration> {
        let begun = Instant::now();
        let dial = Dial {
            detached: true,
            ..Dial::default()
        };
        gateway.client.connect(to, 1, dial, PATIENCE)?;
        let object = watching.object()?;
        assert_eq!(at(&object, "/result/reason_code"), "no-path", "{object:#}");
        Ok(begun.elapsed())
    };
    let (first, second) = (took()?, took()?);
    assert!(first >= RESOLVE, "{first:?}");
    assert!(second < RESOLVE, "{first:?}, then {second:?}");
    watching.interrupted()?.exits(4);
    Ok(())
}

/// The router forgets its routes and neighbours on a link that goes away, and learns those of a new one.
fn a_watch_uses_links_that_come_and_go() -> Result<()> {
    let gateway = Gateway::start(Family::V4, Nat::None)?;
    let line = "--dport 7000 --cut --active --watch --jsonl";
    let mut watching = Watching::start(&gateway, line)?;
    let mut is_cut = |client: &Agent, to| -> Result<()> {
        let dial = Dial {
            detached: true,
            ..Dial::default()
        };
        let fd = client.connect(to, 1, dial, PATIENCE)?[0].fd;
        let got = client.recv(fd, 100, PATIENCE)?;
        assert_eq!(got, Recv::Failed(libc::ECONNRESET));
        let object = watching.object_of_living()?;
        assert_eq!(at(&object, "/result/outcome"), "cut", "{object:#}");
        Ok(())
    };
    is_cut(&gateway.client, gateway.to)?;
    gateway.sh("ip link del server")?;
    // It has the addresses of the one before, and other hardware addresses.
    let other = gateway.lab.add_host("server", 2)?;
    let agent = other.agent("other")?;
    agent.listen(SocketAddr::new("0.0.0.0".parse()?, 7000), false, 16)?;
    is_cut(&gateway.client, gateway.to)?;
    assert_eq!(connections(&other)?, 0);
    gateway.sh("ip link set server down; ip link set server up")?;
    is_cut(&gateway.client, gateway.to)?;
    watching.interrupted()?.exits(0);
    Ok(())
}
