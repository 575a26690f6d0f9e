//! Chaos: do bystanders survive `cwkill`?
//!
//! Clients with fixed source ports open connections to two listeners of one server, one after the other on the same
//! 4-tuples. Some are *bystander*: they exchange bytes that both sides verify. Some get *stuck*: the client sends FIN and the
//! server holds its descriptor for a while, then closes it, if nobody else has closed the connection. All the while a killer
//! runs over and over. A connection may be closed from the moment its client has sent FIN; one that is hit before, or whose
//! bytes do not arrive, is a lost bystander, and there must be none.
//!
//! What a late or stray act may hit, and how it would show:
//!
//! - the next connection of the same 4-tuple, which exists some 100 µs after the stuck one is gone: its client reads
//!   ECONNRESET or an early end, or waits in vain; or its handshake fails, or takes a second longer
//! - a connection whose descriptor has the number the stuck one had: the same
//! - a listener: the report looks for both, from outside
//! - a connection that is idle or in the middle of its bytes while others are hit: long-lived ones last as long as the run
//! - half-closed streams, which look stuck but are in use, under `--min-age`: as bystanders
//!
//! - `killer`: runs `cwkill`, or something worse, and adds up what it says
//! - `server`, `client`: the two processes; `wire`: what they say to each other
//! - `workers`: how they are started and heard; `report`: what it all amounts to
//!
//! A detector that cannot fail proves nothing: [`Killer::other`] runs killers that are wrong on purpose.

mod client;
mod killer;
mod random;
mod report;
mod server;
mod wire;
mod workers;

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};

pub use killer::{KillStats, Killer};
pub use report::Report;
pub use wire::Loss;

use client::ClientStats;
use server::ServerStats;
pub(crate) use workers::run_worker;
use workers::{Event, EventSender, Worker};

use crate::kernel::TcpState;
use crate::lab::{Family, Lab};
use crate::{bench, privilege};

/// The stack of a thread with one connection, in bytes.
const STACK: usize = 128 << 10;

/// The source port of the first client.
const FIRST_PORT: u16 = 20_000;

/// How long the last connections of a run may take.
const END_DEADLINE: Duration = Duration::from_secs(90);

/// What the clients' host is set to, so that a 4-tuple is used again within milliseconds.
const CLIENT_SYSCTLS: [(&str, &str); 2] = [
    // TIME-WAIT of ours is no obstacle (with timestamps, which are on by default).
    ("ipv4/tcp_tw_reuse", "1"),
    // Milliseconds, since Linux 6.14; before, it is a second.
    ("ipv4/tcp_tw_reuse_delay", "1"),
];

/// What a process of a run does; a role.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum WorkerRole {
    Server(server::Config),
    Clients(client::Config),
}

/// What to do.
#[derive(Debug, Clone)]
pub struct Options {
    /// How long at most.
    pub time: Duration,
    /// End as soon as every method has reached for so many sockets, and fail if that is not to be had in time.
    pub acts: Option<u64>,
    /// Clients, each with a source port of its own.
    pub connections: u16,
    /// How the two sides address each other.
    pub family: Family,
    /// The port that accepts at once; the next one lets connections wait.
    pub port: u16,
    /// What is drawn by chance is drawn from this.
    pub seed: u64,
    /// What the killers leave alone; adds half-closed streams that live under it. Makes for fewer acts.
    pub min_age: Option<Duration>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            time: Duration::from_secs(30),
            acts: None,
            connections: 200,
            family: Family::V4,
            port: 8080,
            seed: 1,
            min_age: None,
        }
    }
}

impl Options {
    /// The ports of the two listeners.
    #[must_use]
    pub fn ports(&self) -> [u16; 2] {
        [self.port, self.port.saturating_add(1)]
    }
}

/// Lets the killers run among bystanders.
///
/// # Errors
/// The run itself fails: processes that do not start or never end, a killer that does not do its job. What it finds out is
/// in the report.
pub fn run(options: &Options, killers: &[Killer]) -> Result<Report> {
    ensure!(!killers.is_empty(), "no killer");
    let ports = options.ports();
    ensure!(ports[0] != ports[1], "the port {} has no next", ports[0]);
    let lab = Lab::new()?;
    let link = lab.link()?;
    link.peer_host.within(|| {
        for (name, value) in CLIENT_SYSCTLS {
            match fs::write(format!("/proc/sys/net/{name}"), value) {
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                done => done.with_context(|| format!("set {name} to {value}"))?,
            }
        }
        Ok(())
    })?;
    let (app, peer) = link.addresses(options.family);
    let min_age_ms = options
        .min_age
        .map(|age| u16::try_from(age.as_millis()).context("a minimum age of more than a minute"))
        .transpose()?;
    let server_config = server::Config {
        listen: ports.map(|port| SocketAddr::new(options.family.any(), port)),
        v6_only: options.family == Family::V6,
        seed: options.seed,
    };
    let client_config = client::Config {
        servers: ports.map(|port| SocketAddr::new(app, port)),
        first: SocketAddr::new(peer, FIRST_PORT),
        clients: options.connections,
        seed: options.seed,
        min_age_ms,
    };
    let mut server = Worker::start(lab.app_host(), "server", WorkerRole::Server(server_config))?;
    let mut clients = Worker::start(
        &link.peer_host,
        "clients",
        WorkerRole::Clients(client_config),
    )?;

    let began = Instant::now();
    let stats = killer::run_all(lab.app_host(), killers, began + options.time, options.acts)?;
    ensure!(clients.is_alive(), "the clients are gone");
    let (lost_by_clients, seen): (_, ClientStats) = clients.finish(END_DEADLINE)?;
    let took = began.elapsed();

    let listening = |socket: &crate::KernelSocket| {
        socket.state == TcpState::Listen && ports.contains(&socket.local.port())
    };
    let sockets = lab.app_host().sockets()?;
    let listeners = sockets.iter().filter(|socket| listening(socket)).count();
    let server_alive = server.is_alive();
    let (lost_by_server, served): (_, ServerStats) = match server_alive {
        true => server.finish(END_DEADLINE)?,
        false => Default::default(),
    };
    // Both sides of one connection are one loss; the client, who has more to say, comes first.
    let mut losses = BTreeMap::new();
    for loss in lost_by_clients.into_iter().chain(lost_by_server) {
        losses.entry(loss.life).or_insert(loss);
    }
    Ok(Report {
        options: options.clone(),
        took,
        stats,
        seen,
        served,
        losses: losses.into_values().collect(),
        listeners,
        server_alive,
    })
}

/// The command line of `netns-harness chaos`.
#[derive(Debug, clap::Args)]
pub(crate) struct Chaos {
    /// How long at most
    #[arg(long, value_name = "N", default_value = "30", value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,
    /// End as soon as every method has reached for N sockets; fail if there are fewer in the end
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    acts: Option<u64>,
    /// Methods of cwkill, run in turn
    #[arg(long, value_name = "M,…", value_delimiter = ',', default_values = METHODS)]
    method: Vec<String>,
    /// Clients, each with a source port of its own
    #[arg(long, value_name = "N", default_value = "200", value_parser = clap::value_parser!(u16).range(1..=5000))]
    connections: u16,
    /// How the two sides address each other
    #[arg(long, value_enum, default_value = "v4")]
    family: Family,
    /// The server's port; it takes the next one as well
    #[arg(long, default_value = "8080", value_parser = clap::value_parser!(u16).range(1..=65534))]
    port: u16,
    /// What chance is drawn from; a new one each time, if not given
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Let cwkill act from this age on, and let half-closed streams live under it
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u16).range(500..=20000))]
    min_age_ms: Option<u16>,
    /// The program to run
    #[arg(long, value_name = "PATH", default_value = "cwkill")]
    cwkill: PathBuf,
    /// Run this on the server's host instead of cwkill, to see whether it is found out: `ss -K sport = :8080`
    #[arg(long, value_name = "COMMAND", conflicts_with_all = ["method", "cwkill", "acts"])]
    instead: Option<String>,
}

/// The methods of `cwkill`.
pub const METHODS: [&str; 4] = ["shutdown", "destroy", "rst", "probe"];

impl Chaos {
    /// Runs, prints what came of it, and returns the exit status.
    ///
    /// # Errors
    /// As [`run`].
    pub fn run(self) -> Result<i32> {
        privilege::ensure_privileges()?;
        let seed = match self.seed {
            Some(seed) => seed,
            None => {
                let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
                now.as_secs()
            }
        };
        let options = Options {
            time: Duration::from_secs(self.seconds),
            acts: self.acts,
            connections: self.connections,
            family: self.family,
            port: self.port,
            seed,
            min_age: self.min_age_ms.map(|ms| Duration::from_millis(ms.into())),
        };
        let killers = match &self.instead {
            Some(command) => {
                let words: Vec<_> = command.split_whitespace().collect();
                let Some(name) = words.first() else {
                    bail!("--instead needs a command, for example `ss -K sport = :8080`")
                };
                vec![Killer::other(name, &words)]
            }
            None => {
                let program = bench::beside_us(&self.cwkill)?;
                let cwkill =
                    |method| Killer::cwkill(&program, method, options.ports(), options.min_age);
                self.method.iter().map(|method| cwkill(method)).collect()
            }
        };
        let report = run(&options, &killers)?;
        println!("{report}");
        let faults = report.faults();
        for fault in &faults {
            println!("FAULT: {fault}");
        }
        Ok(i32::from(!faults.is_empty()))
    }
}
