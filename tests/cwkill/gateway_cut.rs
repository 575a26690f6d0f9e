//! `cwkill gateway --probe` and `--cut`: both ends are looked at with `ss`, and the entry with a list. The tests need nft(8).

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Context, Result};
use netns_harness::{
    Agent, Capability, Dial, End, Endpoint, Family, Fd, Host, Nat, Recv, Side, SocketOption,
    TcpState, wait_for,
};
use serde_json::Value;

use crate::gateway::Gateway;
use crate::support::{CWKILL, PATIENCE, Ran, at, ran};
use crate::trial::{Test, each_family, once};

pub const TESTS: &[Test] = &[
    each_family!(idle_connections_are_cut_at_both_ends_and_a_bystander_lives),
    each_family!(connections_in_use_are_cut_and_a_bystander_loses_no_byte),
    each_family!(a_probe_ends_what_one_end_has_forgotten),
    each_family!(what_one_end_has_forgotten_is_cut),
    once!(a_silent_end_is_said),
    once!(a_neighbour_that_does_not_answer_is_said),
    once!(a_dry_run_sends_nothing),
    once!(at_most_so_many_are_cut),
    once!(a_connection_without_an_entry_is_named_by_hand),
    once!(an_entry_in_a_zone_is_deleted),
    once!(every_act_is_recorded),
    once!(it_holds_two_capabilities_and_needs_both),
    once!(a_thousand_connections_are_cut_in_one_run).slow(),
    once!(connections_that_are_opened_again_meanwhile_live).slow(),
];

/// The connections that `ss` shows on a host.
pub fn connections(host: &Host) -> Result<usize> {
    let rows = host.ss(&["state", "connected"])?;
    Ok(rows
        .iter()
        .filter(|row| row.state != TcpState::TimeWait)
        .count())
}

/// The connections of a document.
pub fn results(ran: &Ran) -> Vec<Value> {
    match &ran.json()["connections"] {
        Value::Array(connections) => connections.clone(),
        _ => panic!("no connections in the document: {ran:?}"),
    }
}

/// Asserts that each connection has this outcome.
#[track_caller]
pub fn all_are(ran: &Ran, outcome: &str, count: usize) {
    let results = results(ran);
    assert_eq!(results.len(), count, "{ran:?}");
    for connection in results {
        assert_eq!(
            at(&connection, "/result/outcome"),
            outcome,
            "{connection:#}"
        );
    }
}

/// A selector for these connections, by the ports of the client.
fn selector(pairs: &[(Endpoint, Endpoint)]) -> String {
    let ports: Vec<String> = pairs
        .iter()
        .map(|(client, _)| client.local.port().to_string())
        .collect();
    format!("--sport {}", ports.join(","))
}

/// Asserts that bytes go both ways.
#[track_caller]
pub fn carries_data(gateway: &Gateway, (client, server): (Endpoint, Endpoint)) -> Result<()> {
    let mut ways: [(&Agent, Fd, &Agent, Fd); 2] = [
        (&gateway.client, client.fd, &gateway.server, server.fd),
        (&gateway.server, server.fd, &gateway.client, client.fd),
    ];
    for (from, out, to, into) in &mut ways {
        from.send(&[*out], b"ping")?;
        assert_eq!(to.recv(*into, 100, PATIENCE)?, Recv::Data(b"ping".to_vec()));
    }
    Ok(())
}

fn idle_connections_are_cut_at_both_ends_and_a_bystander_lives(family: Family) -> Result<()> {
    for nat in Nat::ALL {
        let gateway = Gateway::start(family, nat)?;
        let bystander = gateway.connect(1)?[0];
        let pairs = gateway.connect(4)?;
        carries_data(&gateway, pairs[0])?;
        let line = format!("--cut --active --json {}", selector(&pairs));
        let ran = gateway.gateway(&line)?.exits(0);
        all_are(&ran, "cut", 4);
        for connection in results(&ran) {
            for end in ["source", "destination"] {
                let said = (
                    at(&connection, &format!("/result/{end}/first")),
                    at(&connection, &format!("/result/{end}/now")),
                );
                assert_eq!(
                    said,
                    ("alive".into(), "gone".into()),
                    "{nat:?}: {connection:#}"
                );
            }
            assert_eq!(
                at(&connection, "/result/entry"),
                "deleted",
                "{connection:#}"
            );
        }
        for host in [&gateway.lab.client, &gateway.lab.server] {
            assert_eq!(connections(host)?, 1, "{nat:?}: {:?}", host.ss(&[])?);
        }
        for (client, server) in pairs {
            for (agent, fd) in [(&gateway.client, client.fd), (&gateway.server, server.fd)] {
                assert_eq!(
                    agent.recv(fd, 100, PATIENCE)?,
                    Recv::Failed(libc::ECONNRESET)
                );
            }
        }
        let left = gateway.listed("")?;
        assert_eq!(left.len(), 1, "{nat:?}: {left:#?}");
        carries_data(&gateway, bystander)?;
    }
    Ok(())
}

/// Bytes go both ways all the time, in the connections that are cut and in the one that is not.
fn connections_in_use_are_cut_and_a_bystander_loses_no_byte(family: Family) -> Result<()> {
    let gateway = Gateway::start(family, Nat::Both)?;
    let pairs = gateway.connect(4)?;
    let (bystander, in_use) = (pairs[0], &pairs[1..]);
    let clients: Vec<Fd> = pairs.iter().map(|(client, _)| client.fd).collect();
    gateway
        .client
        .start_sending(&clients, Duration::from_millis(1))?;
    let line = format!("--cut --active --json {}", selector(in_use));
    let ran = gateway.gateway(&line)?;
    all_are(&ran.exits(0), "cut", 3);
    for host in [&gateway.lab.client, &gateway.lab.server] {
        assert_eq!(connections(host)?, 1);
    }
    let sent = gateway.client.stop_sending()?;
    gateway
        .client
        .shutdown(&[bystander.0.fd], netns_harness::How::Write)?;
    let got = gateway.server.drain(&[bystander.1.fd], PATIENCE)?;
    assert!(sent[0] > 0, "{sent:?}");
    assert_eq!((got[0].bytes, got[0].end), (sent[0], End::Eof));
    assert!(got[0].intact);
    Ok(())
}

fn a_probe_ends_what_one_end_has_forgotten(family: Family) -> Result<()> {
    for nat in [Nat::None, Nat::Both] {
        let gateway = Gateway::start(family, nat)?;
        let pairs = gateway.connect(3)?;
        gateway.server.forget(&[pairs[1].1.fd])?;
        gateway.client.forget(&[pairs[2].0.fd])?;
        let ran = gateway.gateway("--probe --all --json")?.exits(0);
        let outcomes: BTreeSet<(u64, String)> = results(&ran)
            .iter()
            .map(|one| {
                let port = one["original"]["src"]["port"].as_u64();
                (port.unwrap_or(0), at(one, "/result/outcome"))
            })
            .collect();
        let expected = ["alive", "healed", "healed"];
        let expected: BTreeSet<(u64, String)> = pairs
            .iter()
            .zip(expected)
            .map(|((client, _), outcome)| (client.local.port().into(), outcome.to_owned()))
            .collect();
        assert_eq!(outcomes, expected, "{nat:?}: {ran:?}");
        for host in [&gateway.lab.client, &gateway.lab.server] {
            assert_eq!(connections(host)?, 1, "{nat:?}");
        }
        // The forgetful peer itself has healed the other end.
        let resets = results(&ran);
        let resets = resets.iter().map(|one| {
            let of = |end: &str| one["result"][end]["resets"].as_u64().unwrap_or(9);
            of("source") + of("destination")
        });
        assert_eq!(resets.sum::<u64>(), 0, "{nat:?}: {ran:?}");
        assert_eq!(gateway.listed("")?.len(), 1, "{nat:?}");
        carries_data(&gateway, pairs[0])?;
        let again = gateway.gateway("--probe --all")?.exits(0);
        assert!(
            again.stdout.contains("1 forwarded connection: 1 alive"),
            "{again:?}"
        );
    }
    Ok(())
}

fn what_one_end_has_forgotten_is_cut(family: Family) -> Result<()> {
    let gateway = Gateway::start(family, Nat::Masquerade)?;
    let pairs = gateway.connect(2)?;
    gateway.server.forget(&[pairs[0].1.fd])?;
    let ran = gateway.gateway("--cut --all --active --json")?.exits(0);
    let outcomes: BTreeSet<String> = results(&ran)
        .iter()
        .map(|one| at(one, "/result/outcome"))
        .collect();
    assert!(outcomes.iter().all(|one| one == "cut"), "{ran:?}");
    for host in [&gateway.lab.client, &gateway.lab.server] {
        assert_eq!(connections(host)?, 0);
    }
    Ok(())
}

fn a_silent_end_is_said() -> Result<()> {
    let gateway = Gateway::start(Family::V4, Nat::Masquerade)?;
    let (client, server) = gateway.connect(1)?[0];
    let deaf = |agent: &Agent, fd| agent.set_option(&[fd], SocketOption::DropIncoming(true));
    deaf(&gateway.server, server.fd)?;
    let ran = gateway.gateway("--probe --all")?.exits(0);
    assert!(
        ran.stdout
            .contains("alive: source alive, destination silent"),
        "{ran:?}"
    );
    assert_eq!(connections(&gateway.lab.client)?, 1);
    let ran = gateway.gateway("--cut --all --active")?.exits(4);
    assert!(
        ran.stdout.contains("half: source gone, destination silent"),
        "{ran:?}"
    );
    assert_eq!(connections(&gateway.lab.client)?, 0);
    assert_eq!(connections(&gateway.lab.server)?, 1);
    let got = gateway.client.recv(client.fd, 1, PATIENCE)?;
    assert_eq!(got, Recv::Failed(libc::ECONNRESET));
    // Nothing answers any more.
    let (client, server) = gateway.connect(1)?[0];
    deaf(&gateway.server, server.fd)?;
    deaf(&gateway.client, client.fd)?;
    let ran = gateway.gateway("--cut --all --active --json")?.exits(4);
    let failed = results(&ran);
    assert_eq!(
        at(&failed[0], "/result/reason_code"),
        "no-answer",
        "{ran:?}"
    );
    assert_eq!(at(&failed[0], "/result/entry"), "null", "{ran:?}");
    Ok(())
}

fn a_neighbour_that_does_not_answer_is_said() -> Result<()> {
    let gateway = Gateway::start(Family::V4, Nat::None)?;
    gateway.connect(1)?;
    gateway.lab.server.set_link("eth0", false)?;
    gateway.sh("ip neigh flush dev server")?;
    let ran = gateway.gateway("--cut --all --active --json")?.exits(4);
    let failed = results(&ran);
    let code = at(&failed[0], "/result/reason_code");
    assert_eq!(code, "no-path", "{ran:?}");
    // Nothing was sent to the other end.
    assert_eq!(connections(&gateway.lab.client)?, 1);
    Ok(())
}

/// The segments that the TCP of a host has got.
fn segments_in(host: &Host) -> Result<String> {
    let snmp = ran(host.command("cat").arg("/proc/net/snmp"))?
        .exits(0)
        .stdout;
    let mut tcp = snmp.lines().filter(|line| line.starts_with("Tcp:"));
    let names = tcp.next().context("no names")?.split(' ');
    let values = tcp.next().context("no values")?.split(' ');
    let mut pairs = names.zip(values);
    let (_, value) = pairs
        .find(|(name, _)| *name == "InSegs")
        .context("no InSegs")?;
    Ok(value.to_owned())
}

/// The segments that the TCP of the client and of the server have got.
pub fn segments(gateway: &Gateway) -> Result<[String; 2]> {
    let hosts = [&gateway.lab.client, &gateway.lab.server];
    Ok([segments_in(hosts[0])?, segments_in(hosts[1])?])
}

/// The same, as soon as the last acknowledgement has come.
pub fn settled_segments(gateway: &Gateway) -> Result<[String; 2]> {
    let mut before = segments(gateway)?;
    wait_for(PATIENCE, || {
        std::thread::sleep(Duration::from_millis(100));
        let now = segments(gateway)?;
        let is_same = now == before;
        before = now;
        Ok(is_same)
    })?;
    Ok(before)
}

fn a_dry_run_sends_nothing() -> Result<()> {
    let gateway = Gateway::start(Family::V4, Nat::Masquerade)?;
    let pairs = gateway.connect(2)?;
    carries_data(&gateway, pairs[0])?;
    let before = settled_segments(&gateway)?;
    for line in [
        "--cut --all --active -n",
        "--probe --all --dry-run",
        "--cut -n",
        "",
    ] {
        let ran = gateway.gateway(line)?.exits(0);
        let is_plan = ran.stdout.contains("PLAN");
        assert_eq!(is_plan, !line.is_empty(), "{line}: {ran:?}");
    }
    let ran = gateway
        .gateway("--cut --all -n --max-kills 1 --json")?
        .exits(0);
    let plans: Vec<String> = results(&ran).iter().map(|one| at(one, "/plan")).collect();
    assert_eq!(
        plans.iter().filter(|plan| *plan == "cut").count(),
        1,
        "{ran:?}"
    );
    assert_eq!(segments(&gateway)?, before);
    assert_eq!(gateway.listed("")?.len(), 2);
    Ok(())
}

fn at_most_so_many_are_cut() -> Result<()> {
    let gateway = Gateway::start(Family::V4, Nat::Masquerade)?;
    gateway.connect(3)?;
    let ran = gateway
        .gateway("--cut --all --active --max-kills 1")?
        .exits(0);
    assert!(
        ran.stdout
            .contains("3 forwarded connections: 1 cut, 2 over --max-kills"),
        "{ran:?}"
    );
    assert_eq!(connections(&gateway.lab.client)?, 2);
    assert_eq!(connections(&gateway.lab.server)?, 2);
    Ok(())
}

fn a_connection_without_an_entry_is_named_by_hand() -> Result<()> {
    for family in [Family::V4, Family::V6] {
        let gateway = Gateway::start(family, Nat::None)?;
        gateway.sh("nft flush ruleset")?;
        let (client, server) = gateway.connect(2)?[0];
        let named = format!("--connection {},{}", client.local, server.local);
        // An end on this host is left alone.
        let own = std::net::SocketAddr::new(Side::Client.router(family), 5);
        let ran = gateway
            .gateway(&format!("--connection {own},{}", server.local))?
            .exits(1);
        assert!(
            ran.stdout.contains("1 more that end on this host"),
            "{ran:?}"
        );
        let ran = gateway
            .gateway(&format!("{named} --cut --active --json"))?
            .exits(0);
        all_are(&ran, "cut", 1);
        assert_eq!(at(&results(&ran)[0], "/result/entry"), "null");
        assert_eq!(connections(&gateway.lab.client)?, 1);
        assert_eq!(connections(&gateway.lab.server)?, 1);
    }
    Ok(())
}

fn an_entry_in_a_zone_is_deleted() -> Result<()> {
    let gateway = Gateway::start(Family::V4, Nat::None)?;
    for (zone, set) in [("7", "ct zone set 7"), ("8", "ct original zone set 8")] {
        gateway.nft(&format!(
            "table inet zones
            delete table inet zones
            table inet zones {{
                chain raw {{
                    type filter hook prerouting priority -300;
                    {set}
                }}
            }}"
        ))?;
        gateway.connect(1)?;
        let line = format!("--cut --all --active --zone {zone} --json");
        let ran = gateway.gateway(&line)?.exits(0);
        all_are(&ran, "cut", 1);
        assert_eq!(at(&results(&ran)[0], "/result/entry"), "deleted", "{ran:?}");
        assert_eq!(gateway.listed(&format!("--zone {zone}"))?.len(), 0);
    }
    Ok(())
}

fn every_act_is_recorded() -> Result<()> {
    let gateway = Gateway::start(Family::V4, Nat::Both)?;
    gateway.connect(2)?;
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("acts.jsonl");
    // Nothing is done without the log.
    let line = "--cut --all --active --log-file /nowhere/log";
    gateway
        .gateway(line)?
        .exits(3)
        .complains("nothing was done");
    assert_eq!(connections(&gateway.lab.client)?, 2);
    let line = format!(
        "--cut --all --active --max-kills 1 --log-file {}",
        path.display()
    );
    gateway.gateway(&line)?.exits(0);
    let text = std::fs::read_to_string(&path)?;
    let records: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).context("a record"))
        .collect::<Result<_>>()?;
    let events: Vec<String> = records.iter().map(|record| at(record, "/event")).collect();
    assert_eq!(
        events,
        ["begin", "intent", "outcome", "outcome", "end"],
        "{text}"
    );
    assert_eq!(
        (at(&records[0], "/act"), at(&records[0], "/to_act_on")),
        ("cut".into(), "1".into())
    );
    assert_eq!(at(&records[1], "/connection/plan"), "cut");
    assert_eq!(at(&records[2], "/connection/result/outcome"), "cut");
    assert_eq!(
        at(&records[3], "/connection/result/reason_code"),
        "over-max-kills"
    );
    assert_eq!(at(&records[4], "/summary/cut"), "1");
    let ran = gateway
        .gateway("--cut --all --active --log stderr")?
        .exits(0);
    let said = ran.complains("to be asked");
    assert!(
        said.stderr.contains(": cut: source gone, destination gone"),
        "{said:?}"
    );
    Ok(())
}

fn it_holds_two_capabilities_and_needs_both() -> Result<()> {
    let gateway = Gateway::start(Family::V4, Nat::None)?;
    gateway.connect(1)?;
    let with = |capabilities: &[Capability]| {
        let command = gateway
            .lab
            .router
            .command(CWKILL)
            .capabilities(capabilities);
        ran(command.args(["gateway", "--cut", "--all", "--active"]))
    };
    let (admin, raw) = (Capability::CAP_NET_ADMIN, Capability::CAP_NET_RAW);
    with(&[admin])?.exits(3).complains("CAP_NET_RAW");
    with(&[raw])?.exits(3).complains("CAP_NET_ADMIN");
    assert_eq!(connections(&gateway.lab.client)?, 1);
    with(&[admin, raw])?.exits(0);
    assert_eq!(connections(&gateway.lab.client)?, 0);
    Ok(())
}

fn a_thousand_connections_are_cut_in_one_run() -> Result<()> {
    let gateway = Gateway::start(Family::V4, Nat::Masquerade)?;
    let bystander = gateway.connect(1)?[0];
    let opened = gateway
        .client
        .connect(gateway.to, 1000, Dial::default(), PATIENCE)?;
    gateway.server.accept(gateway.listener, 1000, PATIENCE)?;
    assert_eq!(opened.len(), 1000);
    let not_it = format!("not sport = :{}", bystander.0.local.port());
    let command = gateway
        .lab
        .router
        .command(CWKILL)
        .arg("gateway")
        .arg(not_it);
    let ran = ran(command.args(["--cut", "--active", "--json"]))?.exits(0);
    all_are(&ran, "cut", 1000);
    for host in [&gateway.lab.client, &gateway.lab.server] {
        assert_eq!(connections(host)?, 1);
    }
    assert_eq!(gateway.listed("")?.len(), 1);
    carries_data(&gateway, bystander)
}

/// The client opens every second connection again on the same addresses while the old ones are cut.
fn connections_that_are_opened_again_meanwhile_live() -> Result<()> {
    const COUNT: usize = 200;
    // The new connections must be younger until the end of the run.
    const OLD: &str = "--min-age 20s";
    let mut scenes = Vec::new();
    for nat in [Nat::Masquerade, Nat::None, Nat::Both] {
        let gateway = Gateway::start(Family::V4, nat)?;
        let opened = gateway
            .client
            .connect(gateway.to, COUNT, Dial::default(), PATIENCE)?;
        gateway.server.accept(gateway.listener, COUNT, PATIENCE)?;
        scenes.push((nat, gateway, opened));
    }
    for (nat, gateway, opened) in &scenes {
        wait_for(3 * PATIENCE, || Ok(gateway.listed(OLD)?.len() == COUNT))?;
        // So slow that connections are opened again during all of it.
        let line = format!("gateway --all --cut --json --rate 500 {OLD}");
        let command = gateway.lab.router.command(CWKILL);
        let cut = command
            .args(line.split(' '))
            .stdout(std::process::Stdio::piped())
            .spawn()?;
        let mut again = Vec::new();
        for end in opened.iter().step_by(2) {
            gateway
                .client
                .set_option(&[end.fd], SocketOption::Linger(Some(0)))?;
            gateway.client.close(&[end.fd])?;
            let dial = Dial {
                from: Some(end.local),
                ..Dial::default()
            };
            let new = gateway.client.connect(gateway.to, 1, dial, PATIENCE)?;
            let accepted = gateway.server.accept(gateway.listener, 1, PATIENCE)?;
            again.push((new[0], accepted[0]));
        }
        let output = cut.wait_with_output()?;
        assert!(
            matches!(output.status.code(), Some(0 | 4)),
            "{nat:?}: {output:?}"
        );
        for pair in &again {
            carries_data(gateway, *pair)?;
        }
        let document: Value = serde_json::from_slice(&output.stdout)?;
        let mut outcomes = BTreeMap::new();
        for one in document["connections"].as_array().context("no list")? {
            let port = one["original"]["src"]["port"].as_u64().context("no port")?;
            outcomes.insert(port, at(one, "/result/outcome"));
        }
        let left: BTreeSet<u64> = gateway
            .lab
            .client
            .ss(&["state", "connected"])?
            .iter()
            .map(|row| row.local.port().into())
            .collect();
        // Those that stay open are ended. Those of which the client has closed the old one may have any outcome, and live.
        for (index, end) in opened.iter().enumerate() {
            let port = u64::from(end.local.port());
            let is_again = index % 2 == 0;
            let outcome = outcomes.get(&port).map(String::as_str);
            assert!(
                is_again || matches!(outcome, Some("cut" | "half" | "skipped")),
                "{nat:?}: {port}: {outcome:?}"
            );
            if is_again || outcome == Some("cut") {
                assert_eq!(left.contains(&port), is_again, "{nat:?}: {port}");
            }
        }
        let cut = outcomes.values().filter(|outcome| *outcome == "cut");
        assert!(cut.count() > COUNT / 4, "{nat:?}: {outcomes:?}");
    }
    Ok(())
}
