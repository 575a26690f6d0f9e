//! `cwkill gateway` with bad luck: Ctrl-C, an interface that goes away, ends that are not where or what they seem. The tests need nft(8) and
//! ip(8).

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::process::{Child, Stdio};

use anyhow::Result;
use netns_harness::{Dial, Family, Host, Nat, Recv, Side, address, wait_for};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::gateway::Gateway;
use crate::gateway_cut::{all_are, carries_data, connections, results};
use crate::support::{CWKILL, PATIENCE, Ran, at, ran};
use crate::trial::{Test, each_family, once};

pub const TESTS: &[Test] = &[
    once!(an_interrupt_leaves_no_connection_half),
    once!(an_interface_that_goes_away_costs_only_its_connections),
    each_family!(what_both_ends_have_forgotten_is_gone),
    once!(a_server_with_syn_cookies_is_cut),
    once!(an_end_whose_packets_pass_elsewhere_is_silent),
    once!(another_nat_behind_may_answer_for_its_host),
];

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
    let ran = gateway.gateway("--cut --all --active --json")?.exits(4);
    let found = results(&ran);
    let said: Vec<String> = ["outcome", "source/now", "destination/now"]
        .map(|name| at(&found[0], &format!("/result/{name}")))
        .into();
    assert_eq!(said, ["half", "gone", "silent"], "{ran:?}");
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
