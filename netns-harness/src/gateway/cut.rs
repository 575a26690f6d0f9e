//! Very many idle connections through a router, which `cwkill gateway --cut` ends in one run.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::{connections, entries};
use crate::agent::{Agent, Dial, End, Fd, How};
use crate::host::Host;
use crate::lab::Family;
use crate::program::{beside_this_program, is_found};
use crate::router::{Nat, Routed, Side};

/// Connections of a process. RLIMIT_NOFILE is 20,000 on many hosts.
const PER_PROCESS: usize = 19_000;
/// The port of the first server process, and the one on which the router offers it. The others follow.
const PORT: u16 = 7000;
const PUBLIC: u16 = 8000;
/// Connections that stay, with bytes both ways all the time. They go to the port before the first one.
const BYSTANDERS: usize = 10;
/// For all connections of a process.
const DEADLINE: Duration = Duration::from_secs(300);

/// Options of `netns-harness gateway cut`.
#[derive(Debug, clap::Args)]
pub(crate) struct Cut {
    /// Idle connections
    #[arg(long, value_name = "N", default_value = "10000", value_parser = clap::value_parser!(u32).range(1..=190_000))]
    connections: u32,
    /// Runs, each with new connections
    #[arg(long, value_name = "N", default_value = "3", value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// How the two sides address each other
    #[arg(long, value_enum, default_value = "v4")]
    family: Family,
    /// The NAT of the router
    #[arg(long, value_enum, default_value = "both")]
    nat: Nat,
    /// The links of the router are in a VRF; needs the module vrf
    #[arg(long)]
    vrf: bool,
    /// The `--rate` of cwkill, in packets a second [default: that of cwkill]
    #[arg(long, value_name = "N")]
    rate: Option<u32>,
    /// The cwkill program to measure
    #[arg(long, value_name = "PATH", default_value = "cwkill")]
    cwkill: PathBuf,
}

/// What a run has measured.
struct Measured {
    took: Duration,
    /// Packets that left the router and that it had not forwarded.
    packets: u64,
    cut: u64,
    left: [usize; 3],
    /// What cwkill has said of it.
    summary: Value,
}

impl Cut {
    pub(super) fn run(&self) -> Result<()> {
        let cwkill = beside_this_program(&self.cwkill)?.display().to_string();
        ensure!(
            is_found(&cwkill),
            "no program {cwkill}: build it (cargo build --release --workspace) or name it with --cwkill"
        );
        println!(
            "{} idle connections, {}, NAT: {:?}; {BYSTANDERS} more are in use",
            self.connections,
            self.family.name(),
            self.nat
        );
        println!(
            "{:>8} {:>8} {:>8} {:>14} {:>14} {:>13}",
            "cut", "seconds", "packets", "left at client", "left at server", "entries left"
        );
        for _ in 0..self.runs {
            let measured = self.measure(&cwkill)?;
            let [client, server, entries] = measured.left;
            println!(
                "{:>8} {:>8.2} {:>8} {client:>14} {server:>14} {entries:>13}",
                measured.cut,
                measured.took.as_secs_f64(),
                measured.packets
            );
            ensure!(
                measured.cut == u64::from(self.connections) && measured.left == [0; 3],
                "some connections were not cut, or something of them is left: {}",
                measured.summary
            );
        }
        println!("the connections in use have lost no byte");
        Ok(())
    }

    fn measure(&self, cwkill: &str) -> Result<Measured> {
        let lab = Routed::new()?;
        if self.vrf {
            lab.use_vrf()?;
        }
        let processes = usize::try_from(self.connections)?.div_ceil(PER_PROCESS);
        let offsets = (0..).take(processes + 1);
        let ports: Vec<(u16, u16)> = offsets
            .map(|offset: u16| (PUBLIC + offset, PORT + offset))
            .collect();
        let public = lab.translate(self.family, self.nat, &ports)?;
        Counters::add(&lab.router)?;
        let in_use = Pair::open(&lab, self.family, ports[0].1, public[0], BYSTANDERS)?;
        let mut idle = Vec::new();
        let mut left = usize::try_from(self.connections)?;
        for (&(_, port), &to) in ports.iter().zip(&public).skip(1) {
            let count = left.min(PER_PROCESS);
            idle.push(Pair::open(&lab, self.family, port, to, count)?);
            left -= count;
        }
        in_use
            .client
            .start_sending(&in_use.clients, Duration::from_millis(1))?;

        let selected: Vec<String> = public[1..].iter().map(|to| to.port().to_string()).collect();
        let mut line = vec!["gateway", "--cut", "--active", "--json", "--dport"];
        let (selected, rate) = (selected.join(","), self.rate.map(|rate| rate.to_string()));
        line.push(&selected);
        if let Some(rate) = &rate {
            line.extend(["--rate", rate]);
        }
        let of_cwkill = |line: &[&str]| -> Result<(Value, Duration)> {
            let (output, took) = lab.router.within(|| {
                let began = Instant::now();
                let output = Command::new(cwkill)
                    .args(line)
                    .stdin(Stdio::null())
                    .output()
                    .with_context(|| format!("run {cwkill}"))?;
                Ok((output, began.elapsed()))
            })?;
            let document = serde_json::from_slice(&output.stdout).with_context(|| {
                let stderr = String::from_utf8_lossy(&output.stderr);
                format!("{cwkill} ended with {}: {}", output.status, stderr.trim())
            })?;
            Ok((document, took))
        };
        let count = |document: &Value, name| document["summary"][name].as_u64();
        let (listed, _) = of_cwkill(&["gateway", "--json", "--dport", &selected])?;
        ensure!(
            count(&listed, "matched") == Some(self.connections.into()),
            "cwkill does not list the connections, but {}",
            listed["summary"]
        );
        let before = Counters::read(&lab.router)?;
        let (document, took) = of_cwkill(&line)?;
        let after = Counters::read(&lab.router)?;
        let bystanders = |count: usize| count.saturating_sub(BYSTANDERS);
        let left = [
            bystanders(connections(&lab.client)?.len()),
            bystanders(connections(&lab.server)?.len()),
            bystanders(entries(&lab.router)?),
        ];
        in_use.has_lost_nothing()?;
        drop(idle);
        Ok(Measured {
            took,
            packets: after.own_since(&before),
            cut: count(&document, "cut").context("no summary")?,
            left,
            summary: document["summary"].clone(),
        })
    }
}

/// Connections of one process to another one.
struct Pair {
    client: Agent,
    clients: Vec<Fd>,
    server: Agent,
    servers: Vec<Fd>,
}

impl Pair {
    fn open(lab: &Routed, family: Family, port: u16, to: SocketAddr, count: usize) -> Result<Self> {
        let (client, server) = (lab.client.agent("client")?, lab.server.agent("server")?);
        let any = SocketAddr::new(family.any(), port);
        let backlog = i32::try_from(count)?;
        let listener = server.listen(any, family == Family::V6, backlog)?;
        // Each process has the same source ports: the destination is another one.
        let from = SocketAddr::new(Side::Client.host(family), 10_000);
        let dial = Dial {
            from: Some(from),
            ..Dial::default()
        };
        let clients = client.connect(to, count, dial, DEADLINE)?;
        let servers = server.accept(listener, count, DEADLINE)?;
        Ok(Self {
            client,
            clients: clients.iter().map(|end| end.fd).collect(),
            server,
            servers: servers.iter().map(|end| end.fd).collect(),
        })
    }

    /// Ends the connections in order, and compares what one side has sent with what the other has got.
    fn has_lost_nothing(&self) -> Result<()> {
        let mut sent = self.client.stop_sending()?;
        self.client.shutdown(&self.clients, How::Write)?;
        let got = self.server.drain(&self.servers, DEADLINE)?;
        ensure!(
            got.iter().all(|got| got.end == End::Eof && got.intact),
            "a connection in use was lost: {got:?}"
        );
        // They are accepted in any order.
        let mut got: Vec<u64> = got.iter().map(|got| got.bytes).collect();
        got.sort_unstable();
        sent.sort_unstable();
        ensure!(
            got == sent && sent[0] > 0,
            "bytes of a connection in use were lost: {sent:?} were sent, {got:?} have arrived"
        );
        Ok(())
    }
}

/// Packet counters of a router.
struct Counters {
    /// All that have left by its links.
    left: u64,
    /// Those that the IP layer has forwarded.
    forwarded: u64,
}

impl Counters {
    /// A chain that counts what is forwarded. The counters of /proc/net/snmp also count what a rule drops afterwards.
    const RULES: &str = "table inet counted {
        chain postrouting {
            type filter hook postrouting priority 300
            counter
        }
    }";

    fn add(router: &Host) -> Result<()> {
        let output = router.command("nft").arg(Self::RULES).output()?;
        ensure!(output.status.success(), "nft cannot count: {output:?}");
        Ok(())
    }

    fn read(router: &Host) -> Result<Self> {
        let list = ["list", "chain", "inet", "counted", "postrouting"];
        let output = router.command("nft").args(list).output()?;
        let chain = String::from_utf8_lossy(&output.stdout);
        let mut words = chain.split_whitespace();
        words
            .find(|word| *word == "packets")
            .context("no counter in the chain")?;
        let forwarded = words.next().context("no number in the chain")?.parse()?;
        let path = "/proc/thread-self/net/dev";
        let devices = router.within(|| fs::read_to_string(path).context(path))?;
        let links = [Side::Client, Side::Server].map(Side::link);
        let mut left = 0;
        for line in devices.lines() {
            let Some((name, numbers)) = line.split_once(':') else {
                continue;
            };
            if links.contains(&name.trim()) {
                // Eight numbers of what has come, the bytes that have left, and the packets.
                let packets = numbers.split_whitespace().nth(9);
                left += packets.context("no packets")?.parse::<u64>()?;
            }
        }
        Ok(Self { left, forwarded })
    }

    /// The packets since then that were not forwarded. The counters are not read at one instant, while the connections in use send.
    fn own_since(&self, before: &Self) -> u64 {
        let left = self.left - before.left;
        left.saturating_sub(self.forwarded - before.forwarded)
    }
}
