//! `cwkill gateway` on a router between a client and a server. The tests need nft(8).

use std::net::SocketAddr;

use anyhow::{Context, Result};
use netns_harness::{
    Agent, Capability, Dial, Endpoint, Family, Fd, How, Nat, Routed, Side, wait_for,
};
use serde_json::Value;

use crate::support::{CWKILL, PATIENCE, Ran, at, ran};
use crate::trial::{Test, each_family, once};

pub const TESTS: &[Test] = &[
    each_family!(connections_are_listed_with_nat_both_ways),
    each_family!(selectors_mean_the_original_direction),
    each_family!(connections_of_the_router_itself_are_left_to_cwkill),
    each_family!(zones_and_marks_are_selected),
    once!(the_age_is_the_time_without_a_packet),
    once!(with_timeout_policies_no_age_is_known),
    once!(states_are_those_of_conntrack),
    once!(without_connection_tracking_it_says_why_nothing_is_listed),
    once!(it_needs_cap_net_admin_and_nothing_else),
];

/// The port of the server, and the one that the router sends there.
const PORT: u16 = 7000;
const SERVICE: u16 = 80;

/// Connections from a client to a server through a router.
pub struct Gateway {
    pub lab: Routed,
    pub client: Agent,
    pub server: Agent,
    pub listener: Fd,
    /// The address to which the client connects.
    pub to: SocketAddr,
}

impl Gateway {
    pub fn start(family: Family, nat: Nat) -> Result<Self> {
        let lab = Routed::new()?;
        let to = lab.translate(family, nat, &[(SERVICE, PORT)])?[0];
        let (client, server) = (lab.client.agent("client")?, lab.server.agent("server")?);
        let any = match family {
            Family::V4 => "0.0.0.0",
            Family::V6 | Family::Mapped => "::",
        };
        let any = SocketAddr::new(any.parse()?, PORT);
        let listener = server.listen(any, family == Family::V6, 1024)?;
        Ok(Gateway {
            lab,
            client,
            server,
            listener,
            to,
        })
    }

    /// Adds rules to the router.
    pub fn nft(&self, rules: &str) -> Result<()> {
        let script = format!("nft -f - <<'END'\n{rules}\nEND");
        self.sh(&script)
    }

    pub fn sh(&self, script: &str) -> Result<()> {
        ran(self.lab.router.command("sh").args(["-ec", script]))?.exits(0);
        Ok(())
    }

    /// Opens `count` connections, and returns the ends of each: that of the client and that of the server.
    pub fn connect(&self, count: usize) -> Result<Vec<(Endpoint, Endpoint)>> {
        let mut pairs = Vec::with_capacity(count);
        for _ in 0..count {
            let opened = self.client.connect(self.to, 1, Dial::default(), PATIENCE)?;
            let accepted = self.server.accept(self.listener, 1, PATIENCE)?;
            pairs.push((opened[0], accepted[0]));
        }
        Ok(pairs)
    }

    /// Runs `cwkill gateway` on the router.
    pub fn gateway(&self, arguments: &str) -> Result<Ran> {
        let command = self.lab.router.command(CWKILL).arg("gateway");
        ran(command.args(arguments.split_whitespace()))
    }

    /// The connections that it lists with these arguments.
    pub fn listed(&self, arguments: &str) -> Result<Vec<Value>> {
        let ran = self.gateway(&format!("--json {arguments}"))?;
        let Value::Array(connections) = ran.json()["connections"].clone() else {
            panic!("no connections in the document: {ran:?}");
        };
        assert_eq!(ran.code, Some(i32::from(connections.is_empty())), "{ran:?}");
        Ok(connections)
    }
}

/// The address in a document.
fn endpoint(value: &Value, pointer: &str) -> Result<SocketAddr> {
    let ip = at(value, &format!("{pointer}/address"));
    let port = at(value, &format!("{pointer}/port"));
    let ip = ip.parse().with_context(|| format!("{pointer}: {value}"))?;
    Ok(SocketAddr::new(ip, port.parse()?))
}

/// What `ss` says of both ends is what conntrack says of both directions.
fn connections_are_listed_with_nat_both_ways(family: Family) -> Result<()> {
    for nat in Nat::ALL {
        let gateway = Gateway::start(family, nat)?;
        let pairs = gateway.connect(3)?;
        let at_client = gateway.lab.client.ss(&["state", "connected"])?;
        let at_server = gateway.lab.server.ss(&["state", "connected"])?;
        let connections = gateway.listed("")?;
        assert_eq!(connections.len(), 3, "{nat:?}");
        for connection in &connections {
            let [source, destination] = ["/original/src", "/original/dst"];
            let opened = (
                endpoint(connection, source)?,
                endpoint(connection, destination)?,
            );
            let seen = (
                endpoint(connection, "/reply/src")?,
                endpoint(connection, "/reply/dst")?,
            );
            let has = |rows: &[netns_harness::SsRow], (local, peer)| {
                rows.iter()
                    .any(|row| (row.local, row.peer) == (local, peer))
            };
            assert!(
                has(&at_client, opened),
                "{nat:?}: {connection:#} {at_client:?}"
            );
            assert!(
                has(&at_server, seen),
                "{nat:?}: {connection:#} {at_server:?}"
            );
            let is_masqueraded = matches!(nat, Nat::Masquerade | Nat::Both);
            let is_redirected = matches!(nat, Nat::Redirect | Nat::Both);
            assert_eq!(
                connection["nat_src"] != Value::Null,
                is_masqueraded,
                "{connection:#}"
            );
            assert_eq!(
                connection["nat_dst"] != Value::Null,
                is_redirected,
                "{connection:#}"
            );
            assert_eq!(at(connection, "/state"), "established");
            assert!(
                at(connection, "/status").contains("assured"),
                "{connection:#}"
            );
        }
        let ran = gateway.gateway("-v")?.exits(0);
        let expected = "3 forwarded connections\n";
        assert!(ran.stdout.ends_with(expected), "{ran:?}");
        assert!(
            ran.stdout.contains(&pairs[0].0.local.to_string()),
            "{ran:?}"
        );
        let lines = gateway.gateway("--jsonl")?.exits(0).stdout;
        assert_eq!(lines.lines().count(), 3, "{lines}");
        // A listing sends nothing and changes nothing.
        for (client, server) in pairs {
            gateway.client.send(&[client.fd], b"ping")?;
            let got = gateway.server.recv(server.fd, 100, PATIENCE)?;
            assert_eq!(got, netns_harness::Recv::Data(b"ping".to_vec()));
        }
    }
    Ok(())
}

fn selectors_mean_the_original_direction(family: Family) -> Result<()> {
    let gateway = Gateway::start(family, Nat::Both)?;
    let (first, _) = gateway.connect(2)?[0];
    let (client, server) = (Side::Client.host(family), Side::Server.host(family));
    let (inside, outside) = (Side::Client.router(family), Side::Server.router(family));
    let port = first.local.port();
    let destination = SocketAddr::new(inside, SERVICE);
    for (line, expected) in [
        (format!("--src {client}"), 2),
        (format!("--src {server}"), 0),
        (format!("--dst {inside} --dport {SERVICE}"), 2),
        (format!("--dst {server}"), 0),
        (format!("--dport {PORT}"), 0),
        (format!("--sport {port}"), 1),
        (format!("--sport {port}-{port} --src {client}"), 1),
        (format!("--nat-src {outside}"), 2),
        (format!("--nat-src {client}"), 0),
        (format!("--nat-dst {server}"), 2),
        (format!("--nat-dst {inside}"), 0),
        (format!("--host {client}"), 2),
        (format!("--host {server}"), 2),
        (format!("--host {outside}"), 2),
        ("--host 192.0.2.1".to_owned(), 0),
        (format!("dst {}", destination), 2),
        (format!("sport = :{port} and dport = :{SERVICE}"), 1),
        (format!("not sport = :{port}"), 1),
        ("--conntrack-state established".to_owned(), 2),
        ("--conntrack-state close-wait,time-wait".to_owned(), 0),
        ("-4".to_owned(), if client.is_ipv4() { 2 } else { 0 }),
        ("-6".to_owned(), if client.is_ipv4() { 0 } else { 2 }),
    ] {
        let found = gateway.listed(&line)?;
        assert_eq!(found.len(), expected, "{line}");
    }
    let none = gateway.gateway(&format!("--sport {SERVICE}"))?.exits(1);
    none.complains("that of its server is --dport");
    gateway.gateway("--host 192.0.2.1 --ok-if-none")?.exits(0);
    Ok(())
}

/// Both a connection from the router and one to it.
fn connections_of_the_router_itself_are_left_to_cwkill(family: Family) -> Result<()> {
    let gateway = Gateway::start(family, Nat::Masquerade)?;
    gateway.connect(1)?;
    let own = gateway.lab.router.agent("own")?;
    own.connect(gateway.to, 1, Dial::default(), PATIENCE)?;
    gateway.server.accept(gateway.listener, 1, PATIENCE)?;
    let to_router = SocketAddr::new(Side::Client.router(family), 22);
    let listener = own.listen(to_router, false, 16)?;
    gateway
        .client
        .connect(to_router, 1, Dial::default(), PATIENCE)?;
    own.accept(listener, 1, PATIENCE)?;
    let ran = gateway.gateway("--json")?.exits(0);
    let document = ran.json();
    assert_eq!(at(&document, "/ending_here"), "2", "{ran:?}");
    assert_eq!(at(&document, "/summary/matched"), "1", "{ran:?}");
    let text = gateway.gateway("")?.exits(0).stdout;
    assert!(text.contains("2 more that end on this host"), "{text}");
    // Only those that match are counted.
    let ran = gateway.gateway("--dport 22 --json")?.exits(1);
    assert_eq!(at(&ran.json(), "/ending_here"), "1", "{ran:?}");
    Ok(())
}

fn zones_and_marks_are_selected(family: Family) -> Result<()> {
    let gateway = Gateway::start(family, Nat::None)?;
    gateway.connect(1)?;
    gateway.nft(
        "table inet zones {
            chain raw {
                type filter hook prerouting priority -300;
                ct zone set 7
            }
            chain forward {
                type filter hook forward priority 10;
                ct mark set 0x21
            }
        }",
    )?;
    gateway.connect(2)?;
    for (line, expected) in [
        ("--zone 7", 2),
        ("--zone 0", 1),
        ("--zone 0,7", 3),
        ("--zone 8", 0),
        ("--mark 0x21", 2),
        ("--mark 1/0xf", 2),
        ("--mark 0x21/0xf0", 2),
        ("--mark 0x22", 0),
        ("--mark 0 --zone 0", 1),
        ("--mark 0x21,0", 3),
    ] {
        let found = gateway.listed(line)?;
        assert_eq!(found.len(), expected, "{line}: {found:#?}");
    }
    let found = gateway.listed("--zone 7")?;
    assert_eq!(
        (at(&found[0], "/zone"), at(&found[0], "/mark")),
        ("7".into(), "33".into())
    );
    Ok(())
}

/// The age of the one connection that is listed, in milliseconds.
fn age_ms(gateway: &Gateway) -> Result<Option<u64>> {
    Ok(gateway.listed("")?[0]["age_ms"].as_u64())
}

fn the_age_is_the_time_without_a_packet() -> Result<()> {
    let gateway = Gateway::start(Family::V4, Nat::Masquerade)?;
    let (client, server) = gateway.connect(1)?[0];
    let min_age = "--min-age 2s --json";
    wait_for(PATIENCE, || Ok(gateway.gateway(min_age)?.code == Some(0)))?;
    assert!(age_ms(&gateway)? >= Some(2000));
    let ran = gateway.gateway("--min-age 1h")?.exits(1);
    assert!(
        ran.stdout.contains("1 more with a packet within 1h00m"),
        "{ran:?}"
    );
    // A byte makes it young, and so does the acknowledgement. It grows old again, so another byte follows if a list comes late.
    let before = age_ms(&gateway)?;
    wait_for(PATIENCE, || {
        gateway.client.send(&[client.fd], b"x")?;
        gateway.server.recv(server.fd, 1, PATIENCE)?;
        Ok(age_ms(&gateway)?.is_some_and(|now| Some(now) < before))
    })?;
    // With a timeout that another reason may have set, the age is unknown.
    gateway.sh(
        "echo 200 > /proc/sys/net/netfilter/nf_conntrack_tcp_timeout_max_retrans
                echo 250 > /proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established
                echo 249 > /proc/sys/net/netfilter/nf_conntrack_tcp_timeout_unacknowledged",
    )?;
    gateway.client.send(&[client.fd], b"x")?;
    gateway.server.recv(server.fd, 1, PATIENCE)?;
    wait_for(PATIENCE, || Ok(age_ms(&gateway)?.is_none()))?;
    let ran = gateway.gateway("--min-age 1s")?.exits(1);
    assert!(ran.stdout.contains("1 more of unknown age"), "{ran:?}");
    Ok(())
}

fn with_timeout_policies_no_age_is_known() -> Result<()> {
    let gateway = Gateway::start(Family::V4, Nat::None)?;
    gateway.connect(1)?;
    assert!(age_ms(&gateway)?.is_some());
    gateway.nft(
        "table ip policies {
            ct timeout short { protocol tcp; l3proto ip; policy = { established: 86400 }; }
        }",
    )?;
    assert_eq!(age_ms(&gateway)?, None);
    gateway.gateway("")?.exits(0).complains("ct timeout");
    Ok(())
}

fn states_are_those_of_conntrack() -> Result<()> {
    let gateway = Gateway::start(Family::V4, Nat::None)?;
    let (client, server) = gateway.connect(1)?[0];
    gateway.client.shutdown(&[client.fd], How::Write)?;
    wait_for(PATIENCE, || {
        Ok(gateway.listed("--conntrack-state close-wait")?.len() == 1)
    })?;
    gateway.server.close(&[server.fd])?;
    wait_for(PATIENCE, || {
        Ok(gateway.listed("--conntrack-state TIME_WAIT")?.len() == 1)
    })
}

fn without_connection_tracking_it_says_why_nothing_is_listed() -> Result<()> {
    let gateway = Gateway::start(Family::V4, Nat::None)?;
    gateway.sh("nft flush ruleset")?;
    let opened = gateway
        .client
        .connect(gateway.to, 1, Dial::default(), PATIENCE)?;
    assert_eq!(opened.len(), 1);
    let ran = gateway.gateway("")?.exits(1);
    let ran = ran.complains("has no entries in this network namespace now");
    assert_eq!(ran.stdout, "0 forwarded connections\n");
    Ok(())
}

fn it_needs_cap_net_admin_and_nothing_else() -> Result<()> {
    let gateway = Gateway::start(Family::V4, Nat::None)?;
    gateway.connect(1)?;
    let with = |capabilities: &[Capability]| {
        let command = gateway.lab.router.command(CWKILL).arg("gateway");
        ran(command.capabilities(capabilities))
    };
    with(&[Capability::CAP_NET_ADMIN])?.exits(0);
    with(&[Capability::CAP_NET_RAW])?
        .exits(3)
        .complains("CAP_NET_ADMIN");
    Ok(())
}
