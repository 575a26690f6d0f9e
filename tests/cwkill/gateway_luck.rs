//! `cwkill gateway` with bad luck: Ctrl-C, an interface that goes away, ends that are not where or what they seem. The tests need nft(8), ip(8),
//! ss(8), and some python3 or conntrack(8).

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write as _};
use std::net::SocketAddr;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};

use anyhow::{Context, Result};
use netns_harness::owners::runtimes::Runtime;
use netns_harness::{Dial, Family, Host, Nat, Recv, Side, TcpState, address, wait_for};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::gateway::Gateway;
use crate::gateway_cut::{all_are, carries_data, connections, results, segments, settled_segments};
use crate::support::{CWKILL, PATIENCE, Ran, at, ran};
use crate::trial::{Need, Test, each_family, once};

pub const TESTS: &[Test] = &[
    once!(an_interrupt_leaves_no_connection_half),
    once!(an_interface_that_goes_away_costs_only_its_connections),
    each_family!(what_both_ends_have_forgotten_is_gone),
    once!(a_server_with_syn_cookies_is_cut),
    once!(an_end_whose_packets_pass_elsewhere_is_silent),
    once!(another_nat_behind_may_answer_for_its_host),
    once!(a_signed_connection_is_not_said_to_be_ended).needs(PYTHON),
    once!(a_connection_of_tcp_fast_open_is_cut).needs(PYTHON),
    once!(a_capture_that_loses_answers_claims_nothing).needs(PYTHON),
    once!(with_a_full_table_what_is_listed_is_cut)
        .slow()
        .needs(Need::Program("conntrack")),
];

const PYTHON: Need = Need::Language(Runtime::Python);

fn sh(host: &Host, script: &str) -> Result<()> {
    ran(host.command("sh").args(["-ec", script]))?.exits(0);
    Ok(())
}

/// Starts `cwkill gateway` on the router.
fn start(gateway: &Gateway, arguments: &str) -> Result<Child> {
    let command = gateway.lab.router.command(CWKILL).arg("gateway");
    let command = command.args(arguments.split_whitespace());
    command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
}

fn ended(child: Child) -> Result<Ran> {
    Ran::of("cwkill gateway", child.wait_with_output()?)
}

/// The number of connections with each outcome.
fn outcomes(ran: &Ran) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for connection in results(ran) {
        *counts
            .entry(at(&connection, "/result/outcome"))
            .or_default() += 1;
    }
    counts
}

fn an_interrupt_leaves_no_connection_half() -> Result<()> {
    const COUNT: usize = 60;
    let gateway = Gateway::start(Family::V4, Nat::Masquerade)?;
    gateway.connect(COUNT)?;
    // Two or three a second, so that most are left when a busy machine sends the signal.
    let child = start(&gateway, "--cut --all --active --json --rate 15")?;
    wait_for(PATIENCE, || Ok(connections(&gateway.lab.client)? < COUNT))?;
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGINT)?;
    let ran = ended(child)?.exits(4);
    let outcomes = outcomes(&ran);
    let left = [&gateway.lab.client, &gateway.lab.server].map(connections);
    let [left, at_server] = left.map(Result::unwrap);
    assert_eq!(left, at_server);
    let expected: BTreeMap<String, usize> = [
        ("cut".to_owned(), COUNT - left),
        ("skipped".to_owned(), left),
    ]
    .into();
    assert_eq!(outcomes, expected, "{ran:?}");
    for connection in results(&ran) {
        match at(&connection, "/result/outcome").as_str() {
            "cut" => {
                for end in ["source", "destination"] {
                    let now = at(&connection, &format!("/result/{end}/now"));
                    assert_eq!(now, "gone", "{connection:#}");
                }
                assert_eq!(at(&connection, "/result/entry"), "deleted");
            }
            _ => {
                let code = at(&connection, "/result/reason_code");
                assert_eq!(code, "interrupted", "{connection:#}");
            }
        }
    }
    assert_eq!(gateway.listed("")?.len(), left);
    Ok(())
}

fn an_interface_that_goes_away_costs_only_its_connections() -> Result<()> {
    const COUNT: usize = 20;
    let gateway = Gateway::start(Family::V4, Nat::None)?;
    let third = gateway.lab.add_host("third", 3)?;
    let other = third.agent("other")?;
    let to = SocketAddr::new(address(Family::V4, 3, 2), 7000);
    other.listen(to, false, 1024)?;
    for _ in 0..COUNT {
        gateway.connect(1)?;
        gateway.client.connect(to, 1, Dial::default(), PATIENCE)?;
    }
    // Three a second: some are left when the interface goes away on a busy machine.
    let child = start(&gateway, "--cut --all --active --json --rate 20")?;
    wait_for(PATIENCE, || {
        Ok(connections(&gateway.lab.client)? < 2 * COUNT)
    })?;
    gateway.sh("ip link del server")?;
    let ran = ended(child)?.exits(4);
    let mut failed = 0;
    for connection in results(&ran) {
        let to_third = at(&connection, "/original/dst/address") == to.ip().to_string();
        let outcome = at(&connection, "/result/outcome");
        let code = at(&connection, "/result/reason_code");
        if to_third {
            assert_eq!(outcome, "cut", "{connection:#}");
        } else if outcome == "failed" {
            assert!(
                ["not-sent", "no-path", "no-answer"].contains(&code.as_str()),
                "{connection:#}"
            );
            failed += 1;
        }
    }
    assert!(failed > 0, "{ran:?}");
    assert_eq!(connections(&third)?, 0);
    Ok(())
}

fn what_both_ends_have_forgotten_is_gone(family: Family) -> Result<()> {
    let gateway = Gateway::start(family, Nat::Both)?;
    for (client, server) in &gateway.connect(2)? {
        gateway.client.forget(&[client.fd])?;
        gateway.server.forget(&[server.fd])?;
    }
    // A probe keeps the entries: something else may have answered.
    for (line, entry, left) in [
        ("--probe --all --json", "null", 2),
        ("--cut --all --active --json", "deleted", 0),
    ] {
        let ran = gateway.gateway(line)?.exits(0);
        all_are(&ran, "gone", 2);
        for connection in results(&ran) {
            for end in ["source", "destination"] {
                assert_eq!(at(&connection, &format!("/result/{end}/first")), "gone");
            }
            assert_eq!(at(&connection, "/result/entry"), entry);
        }
        assert_eq!(gateway.listed("")?.len(), left);
    }
    Ok(())
}

fn a_server_with_syn_cookies_is_cut() -> Result<()> {
    let gateway = Gateway::start(Family::V4, Nat::Masquerade)?;
    // Always, not only when the queue is full.
    sh(
        &gateway.lab.server,
        "echo 2 > /proc/sys/net/ipv4/tcp_syncookies",
    )?;
    let pairs = gateway.connect(3)?;
    carries_data(&gateway, pairs[0])?;
    let ran = gateway.gateway("--cut --all --active --json")?;
    all_are(&ran.exits(0), "cut", 3);
    for host in [&gateway.lab.client, &gateway.lab.server] {
        assert_eq!(connections(host)?, 0);
    }
    Ok(())
}

/// The packets of the server take another way than those of the client.
fn an_end_whose_packets_pass_elsewhere_is_silent() -> Result<()> {
    let gateway = Gateway::start(Family::V4, Nat::None)?;
    gateway.connect(1)?;
    gateway.lab.add_link_past_the_router()?;
    let client = Side::Client.host(Family::V4);
    sh(
        &gateway.lab.server,
        &format!("ip route add {client}/32 dev past"),
    )?;
    let ran = gateway.gateway("--probe --all")?.exits(0);
    assert!(
        ran.stdout
            .contains("alive: source alive, destination silent"),
        "{ran:?}"
    );
    a_cut_ends_the_source_alone(&gateway)?;
    assert_eq!(connections(&gateway.lab.client)?, 0);
    Ok(())
}

/// The conntrack of a NAT gateway between calls some questions invalid, by their random numbers, and does not translate those: then the gateway
/// answers RST in the place of its host.
fn another_nat_behind_may_answer_for_its_host() -> Result<()> {
    let gateway = Gateway::start(Family::V4, Nat::None)?;
    let inner = gateway.lab.add_host_behind_the_client(4)?;
    sh(
        &gateway.lab.client,
        "nft -f - <<'END'
        table ip nat {
            chain postrouting {
                type nat hook postrouting priority 100;
                oifname eth0 masquerade
            }
        }
END",
    )?;
    let agent = inner.agent("inner")?;
    let opened = agent.connect(gateway.to, 1, Dial::default(), PATIENCE)?[0];
    let accepted = gateway.server.accept(gateway.listener, 1, PATIENCE)?[0];
    // A probe ends nothing that lives.
    let ran = gateway.gateway("--probe --all --json")?;
    let outcome = at(&results(&ran)[0], "/result/outcome");
    assert!(["alive", "half"].contains(&outcome.as_str()), "{ran:?}");
    agent.send(&[opened.fd], b"ping")?;
    let got = gateway.server.recv(accepted.fd, 100, PATIENCE)?;
    assert_eq!(got, Recv::Data(b"ping".to_vec()));
    // A cut ends the other end. The hidden one hears of it by its next packet, at the latest.
    let ran = gateway.gateway("--cut --all --active --json")?.exits(0);
    all_are(&ran, "cut", 1);
    assert_eq!(connections(&gateway.lab.server)?, 0);
    wait_for(PATIENCE, || {
        // It fails once the connection is over.
        let _ = agent.send(&[opened.fd], b"ping");
        Ok(connections(&inner)? == 0)
    })
}

/// Connections with options that an agent cannot set: `md5` (TCP_MD5SIG) or `fastopen`. The server sends back what it gets. The client says its
/// port, then for each line that it reads whether its bytes came back.
const ECHO: &str = r#"
import socket, struct, sys, threading
mode, side, own, peer = sys.argv[1:]
def sign(s):
    if mode == 'md5':
        address = struct.pack('=H2x4s120x', socket.AF_INET, socket.inet_aton(peer))
        s.setsockopt(socket.IPPROTO_TCP, 14, address + struct.pack('=BBHi80s', 0, 0, 6, 0, b'secret'))
s = socket.socket()
sign(s)
def serve(c):
    try:
        while got := c.recv(100):
            c.sendall(got)
    except OSError:
        pass
if side == 'server':
    s.bind((own, 7000))
    s.listen(16)
    print('listening', flush=True)
    while True:
        threading.Thread(target=serve, args=(s.accept()[0],)).start()
s.bind((own, 0))
if mode == 'fastopen':
    s.sendto(b'ping', socket.MSG_FASTOPEN, (peer, 7000))
    # TCPI_OPT_SYN_DATA: the server has acknowledged the data of the SYN.
    assert s.recv(100) == b'ping' and s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 6)[5] & 32
else:
    s.connect((peer, 7000))
print(s.getsockname()[1], flush=True)
for line in sys.stdin:
    try:
        s.sendall(b'ping')
        print('echo' if s.recv(100) == b'ping' else 'end', flush=True)
    except ConnectionResetError:
        print('reset', flush=True)
"#;

/// A program of [`ECHO`].
struct Echo {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    /// The port of a client.
    first_line: String,
}

impl Echo {
    fn start(host: &Host, mode: &str, side: Side) -> Result<Self> {
        let (name, peer) = match side {
            Side::Client => ("client", Side::Server),
            Side::Server => ("server", Side::Client),
        };
        let [own, peer] = [side, peer].map(|side| side.host(Family::V4).to_string());
        let command = host.command("python3");
        let mut child = command
            .args(["-c", ECHO, mode, name, &own, &peer])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut echo = Echo {
            input: child.stdin.take().context("no stdin")?,
            output: BufReader::new(child.stdout.take().context("no stdout")?),
            child,
            first_line: String::new(),
        };
        echo.first_line = echo.line()?;
        Ok(echo)
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        Ok(line.trim().to_owned())
    }

    /// `echo`, or `reset`.
    fn ping(&mut self) -> Result<String> {
        writeln!(self.input)?;
        self.line()
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Connections of [`ECHO`] through a router.
struct Echoes {
    gateway: Gateway,
    _server: Echo,
    clients: Vec<Echo>,
}

impl Echoes {
    fn start(mode: &str, count: usize) -> Result<Self> {
        let gateway = Gateway::start(Family::V4, Nat::None)?;
        gateway.server.close(&[gateway.listener])?;
        if mode == "fastopen" {
            for host in [&gateway.lab.client, &gateway.lab.server] {
                // For each listener, and without a cookie.
                sh(host, "echo 1543 > /proc/sys/net/ipv4/tcp_fastopen")?;
            }
        }
        let server = Echo::start(&gateway.lab.server, mode, Side::Server)?;
        assert_eq!(server.first_line, "listening");
        let mut clients = Vec::new();
        for _ in 0..count {
            let mut client = Echo::start(&gateway.lab.client, mode, Side::Client)?;
            assert_eq!(client.ping()?, "echo");
            clients.push(client);
        }
        Ok(Echoes {
            gateway,
            _server: server,
            clients,
        })
    }
}

/// Linux discards a segment without the signature of its connection, also an RST (net/ipv4/tcp_ipv4.c, tcp_inbound_hash).
fn a_signed_connection_is_not_said_to_be_ended() -> Result<()> {
    let mut echoes = Echoes::start("md5", 1)?;
    let gateway = &echoes.gateway;
    for line in ["--probe --all --json", "--cut --all --active --json"] {
        let ran = gateway.gateway(line)?.exits(4);
        let found = results(&ran);
        assert_eq!(found.len(), 1, "{ran:?}");
        let code = at(&found[0], "/result/reason_code");
        assert_eq!(code, "no-answer", "{ran:?}");
        assert_eq!(at(&found[0], "/result/entry"), "null", "{ran:?}");
        assert_eq!(echoes.clients[0].ping()?, "echo");
    }
    // The RST of a client that has forgotten it has no signature either.
    sh(
        &gateway.lab.client,
        "nft 'add table ip drops; add chain ip drops out { type filter hook output priority 0; }
              add rule ip drops out tcp flags & (fin|rst) != 0 drop'",
    )?;
    echoes.clients.clear();
    let is_forgotten = || Ok(connections(&gateway.lab.client)? == 0);
    sh(&gateway.lab.client, "ss -K dst 10.79.2.2 > /dev/null")?;
    wait_for(PATIENCE, is_forgotten)?;
    sh(&gateway.lab.client, "nft delete table ip drops")?;
    a_cut_ends_the_source_alone(gateway)?;
    assert_eq!(connections(&gateway.lab.server)?, 1);
    Ok(())
}

fn a_connection_of_tcp_fast_open_is_cut() -> Result<()> {
    let mut echoes = Echoes::start("fastopen", 2)?;
    let gateway = &echoes.gateway;
    let listed = gateway.listed("")?;
    assert_eq!(listed.len(), 2, "{listed:#?}");
    let line = format!(
        "--cut --active --json --sport {}",
        echoes.clients[0].first_line
    );
    let ran = gateway.gateway(&line)?.exits(0);
    all_are(&ran, "cut", 1);
    assert_eq!(echoes.clients[0].ping()?, "reset");
    assert_eq!(echoes.clients[1].ping()?, "echo");
    for host in [&gateway.lab.client, &gateway.lab.server] {
        assert_eq!(connections(host)?, 1);
    }
    assert_eq!(gateway.listed("")?.len(), 1);
    Ok(())
}

/// Cuts the only connection: its source is gone then, and its destination silent.
#[track_caller]
fn a_cut_ends_the_source_alone(gateway: &Gateway) -> Result<()> {
    let ran = gateway.gateway("--cut --all --active --json")?.exits(4);
    let found = results(&ran);
    let said: Vec<String> = ["outcome", "source/now", "destination/now"]
        .map(|name| at(&found[0], &format!("/result/{name}")))
        .into();
    assert_eq!(said, ["half", "gone", "silent"], "{ran:?}");
    Ok(())
}

/// While it is stopped, more segments come than the queue of its packet socket takes.
fn a_capture_that_loses_answers_claims_nothing() -> Result<()> {
    const FLOOD: &str = "
import socket, struct, sys
s = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)
s.connect((sys.argv[1], 0))
segment = struct.pack('!HHIIBBHHH', 1, 7000, 0, 0, 5 << 4, 16, 0, 0, 0)
for _ in range(60000):
    s.send(segment)
";
    let gateway = Gateway::start(Family::V4, Nat::None)?;
    let pair = gateway.connect(1)?[0];
    carries_data(&gateway, pair)?;
    // It is captured before netfilter.
    gateway.nft(
        "table ip flood {
            chain raw { type filter hook prerouting priority -300; tcp sport 1 drop; }
        }",
    )?;
    let before = settled_segments(&gateway)?;
    // A second between the questions to both ends.
    let child = start(&gateway, "--cut --all --active --json --rate 1")?;
    wait_for(PATIENCE, || Ok(segments(&gateway)? != before))?;
    let pid = Pid::from_raw(child.id().cast_signed());
    kill(pid, Signal::SIGSTOP)?;
    let server = Side::Server.host(Family::V4).to_string();
    let flood = gateway.lab.client.command("python3");
    ran(flood.args(["-c", FLOOD, &server]))?.exits(0);
    kill(pid, Signal::SIGCONT)?;
    let ran = ended(child)?.exits(4);
    let found = results(&ran);
    assert_eq!(at(&found[0], "/result/outcome"), "failed", "{ran:?}");
    let code = at(&found[0], "/result/reason_code");
    assert_eq!(code, "answers-lost", "{ran:?}");
    assert_eq!(at(&found[0], "/result/entry"), "null", "{ran:?}");
    carries_data(&gateway, pair)?;
    let again = gateway.gateway("--cut --all --active --json")?.exits(0);
    all_are(&again, "cut", 1);
    Ok(())
}

/// The limit can be set in the first network namespace only, and then counts for all. So the table gets as many entries as it may have.
fn with_a_full_table_what_is_listed_is_cut() -> Result<()> {
    const PORTS: usize = 60_000;
    let gateway = Gateway::start(Family::V4, Nat::None)?;
    let pairs = gateway.connect(3)?;
    let most = "cat /proc/sys/net/netfilter/nf_conntrack_max";
    let most = ran(gateway.lab.router.command("sh").args(["-c", most]))?.exits(0);
    let most: usize = most.stdout.trim().parse()?;
    // The kernel makes room for a new entry by removing one that is not assured.
    let mut lines = String::new();
    for nth in 0..most {
        writeln!(
            lines,
            "-I -p udp -s 10.{}.0.1 -d 192.0.2.1 --sport {} --dport 9 -t 3600 -u ASSURED,SEEN_REPLY",
            1 + nth / PORTS,
            1 + nth % PORTS
        )?;
    }
    let file = tempfile::NamedTempFile::new()?;
    std::fs::write(file.path(), lines)?;
    // It ends with 1: the last ones are refused.
    ran(gateway
        .lab
        .router
        .command("conntrack")
        .arg("-R")
        .arg(file.path()))?;
    let dial = Dial {
        detached: true,
        ..Dial::default()
    };
    gateway.client.connect(gateway.to, 1, dial, PATIENCE)?;
    let dropped = || -> Result<bool> {
        let ran = ran(gateway.lab.router.command("conntrack").arg("-S"))?.exits(0);
        let mut words = ran.stdout.split_whitespace();
        Ok(words.any(|word| word.starts_with("drop=") && word != "drop=0"))
    };
    wait_for(PATIENCE, dropped)?;
    let waits = || -> Result<bool> {
        let rows = gateway.lab.client.ss(&["state", "connected"])?;
        Ok(rows.iter().any(|row| row.state == TcpState::SynSent))
    };
    assert!(waits()?);
    let ran = gateway.gateway("")?.exits(0);
    ran.complains("the table of conntrack is full");
    assert_eq!(gateway.listed("")?.len(), 3);
    let ports: Vec<String> = pairs[1..]
        .iter()
        .map(|(client, _)| client.local.port().to_string())
        .collect();
    let line = format!("--cut --active --json --sport {}", ports.join(","));
    all_are(&gateway.gateway(&line)?.exits(0), "cut", 2);
    for (agent, fd) in [
        (&gateway.client, pairs[1].0.fd),
        (&gateway.server, pairs[1].1.fd),
    ] {
        let got = agent.recv(fd, 1, PATIENCE)?;
        assert_eq!(got, Recv::Failed(libc::ECONNRESET));
    }
    // What waited has a place now.
    wait_for(PATIENCE, || Ok(!waits()?))?;
    carries_data(&gateway, pairs[0])
}
