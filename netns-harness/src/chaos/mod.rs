//! Chaos: do bystanders survive `cwkill`?
//!
//! Clients with fixed source ports open connections to two listeners of one server, one after the other on the same
//! 4-tuples. Some are *bystanders*: they exchange bytes that both sides verify. Some get *stuck*: the client sends FIN, and
//! the server holds its descriptor for a while and then closes it. Meanwhile the killers run in a loop. They may close a
//! connection once its client has sent FIN. A connection that is closed earlier, or whose bytes do not arrive, is a lost
//! bystander. There must be none.
//!
//! A late or misdirected act could hit one of these, and the run notices:
//!
//! - the next connection on the same 4-tuple, some 100 µs after the stuck one is gone: its client reads ECONNRESET or an
//!   early end, or waits in vain; or its handshake fails or takes a second longer
//! - a connection whose descriptor has the number of the stuck one: the same
//! - a listener: the report counts the listeners from outside
//! - a connection that is idle or sending while others are closed: some bystanders last as long as the run
//! - a half-closed stream, which looks stuck but is in use; it must stay younger than `--min-age`
//!
//! With [`Options::gateway`], a router is between clients and server, and the killers run there. They may also end connections that are
//! idle for long enough.
//!
//! - `killer`: runs `cwkill` or another command, and adds up its results; `daemon` runs `cwkill daemon` instead
//! - `server`, `client`: the two worker processes; `wire`: the protocol between them
//! - `workers`: starts the workers and reads their events
//! - `report`: the result of a run
//!
//! A detector that cannot fail proves nothing. [`Killer::other`] runs killers that are wrong on purpose.

mod client;
mod daemon;
mod killer;
mod random;
mod report;
mod server;
mod wire;
mod workers;

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, bail, ensure};
use serde::{Deserialize, Serialize};

pub use daemon::Daemon;
pub use killer::{KillStats, Killer};
pub use report::Report;
pub use wire::Loss;

use client::ClientStats;
use server::ServerStats;
pub(crate) use workers::run_worker;
use workers::{Event, EventSender, Progress, Worker};

use crate::host::Host;
use crate::kernel::TcpState;
use crate::lab::{Family, Lab, Link};
use crate::router::{Nat, Routed, Side};
use crate::{privilege, program};

/// Stack size of a thread with one connection, in bytes.
const STACK: usize = 128 << 10;

/// The source port of the first client.
const FIRST_PORT: u16 = 20_000;

/// How long the last connections may take after the run, in addition to those that last longer than the minimum age.
const END_DEADLINE: Duration = Duration::from_secs(90);

/// How long stuck connections last at most, in milliseconds, beyond the minimum age. See [`Options::held_ms`].
const HELD_MS: u32 = 2000;
/// Before the daemon they last longer by at most one of these times. It decides about all of them and then acts on one after the other.
const HELD_BEFORE_DAEMON_MS: [u32; 4] = [2000, 10_000, 20_000, 40_000];

/// Behind a gateway, a connection without a byte for this long is one that a killer may end. Bystanders pause for much less.
const IDLE: Duration = Duration::from_secs(5);

/// Sysctls of the clients' host, so that a 4-tuple can be used again within milliseconds.
const CLIENT_SYSCTLS: [(&str, &str); 2] = [
    // A connection in TIME-WAIT does not block its 4-tuple. Needs TCP timestamps, which are on by default.
    ("ipv4/tcp_tw_reuse", "1"),
    // In milliseconds, since Linux 6.14. Before, the delay is fixed at one second.
    ("ipv4/tcp_tw_reuse_delay", "1"),
];

/// The role of a worker process.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum WorkerRole {
    Server(server::Config),
    Clients(client::Config),
}

/// Options of a run.
#[derive(Debug, Clone)]
pub struct Options {
    /// Longest duration of the run.
    pub time: Duration,
    /// Ends the run as soon as every method has attempted to close this many sockets. Fewer are a fault.
    pub acts: Option<u64>,
    /// With `acts`: ends the run only when this many half-closed streams have finished, too. Fewer are a fault.
    pub streams: Option<u64>,
    /// Ends the run as soon as the clients have reported this many losses.
    pub losses: Option<usize>,
    /// Clients, each with a source port of its own.
    pub connections: u16,
    /// How the two sides address each other.
    pub family: Family,
    /// The port that accepts at once. The next port accepts with a delay.
    pub port: u16,
    /// Seed of the random numbers.
    pub seed: u64,
    /// How many connections of a hundred get stuck. The others are bystanders; so is every tenth client, which has a single connection.
    pub stuck_percent: u32,
    /// Stuck connections last longer than the minimum age by at most this, in milliseconds, or a part of it down to a four hundredth. The
    /// killers act on more of them if it is long, and on more that are about to end by themselves if it is short. Not for the daemon.
    pub held_ms: u32,
    /// The `--min-age` of the killers. Adds half-closed streams that stay younger. Reduces the number of acts.
    pub min_age: Option<Duration>,
    /// A router with this NAT is between clients and server, and the killers run on it: [`Killer::gateway`].
    pub gateway: Option<Nat>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            time: Duration::from_secs(30),
            acts: None,
            streams: None,
            losses: None,
            connections: 200,
            family: Family::V4,
            port: 8080,
            seed: 1,
            stuck_percent: 50,
            held_ms: HELD_MS,
            min_age: None,
            gateway: None,
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

/// Runs the killers among bystanders.
///
/// # Errors
/// The run itself failed: a worker did not start or end, or a killer did not work. Harm that the killers did is in the report.
pub fn run(options: &Options, killers: &[Killer]) -> Result<Report> {
    ensure!(!killers.is_empty(), "no killer to run");
    let held_ms = [400, 40, 4, 1].map(|part| options.held_ms / part);
    run_with(options, held_ms, |host, until, is_done| {
        killer::run_all(host, killers, until, options.acts, is_done)
    })
}

/// Runs the daemon among bystanders. Its minimum age is a minute.
///
/// # Errors
/// As [`run`].
pub fn run_daemon(options: &Options, daemon: &Daemon) -> Result<Report> {
    let options = &Options {
        min_age: Some(daemon::MIN_AGE),
        ..options.clone()
    };
    run_with(options, HELD_BEFORE_DAEMON_MS, |host, until, is_done| {
        daemon::run(host, daemon, options, until, is_done)
    })
}

/// Whether the run is over, from whether every killer has attempted to close enough sockets.
type IsDone<'a> = dyn FnMut(bool) -> Result<bool> + Send + 'a;

fn run_with(
    options: &Options,
    held_ms: [u32; 4],
    run_killers: impl FnOnce(&Host, Instant, &mut IsDone<'_>) -> Result<Vec<KillStats>>,
) -> Result<Report> {
    let ports = options.ports();
    ensure!(ports[0] != ports[1], "there is no port after {}", ports[0]);
    let hosts = Hosts::new(options)?;
    hosts.clients().within(|| {
        for (name, value) in CLIENT_SYSCTLS {
            match fs::write(format!("/proc/sys/net/{name}"), value) {
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                done => done.with_context(|| format!("set {name} to {value}"))?,
            }
        }
        Ok(())
    })?;
    let min_age_ms = options
        .min_age
        .map(|age| u32::try_from(age.as_millis()).context("the minimum age is too long"))
        .transpose()?;
    let min_age = options.min_age.unwrap_or_default();
    let longest_leak = min_age + held_ms.map(u64::from).map(Duration::from_millis)[3];
    let server_config = server::Config {
        listen: ports.map(|port| SocketAddr::new(options.family.any(), port)),
        v6_only: options.family == Family::V6,
        seed: options.seed,
        longest_leak,
    };
    let client_config = client::Config {
        servers: hosts.servers(options)?,
        first: SocketAddr::new(hosts.first_client(options.family), FIRST_PORT),
        clients: options.connections,
        seed: options.seed,
        min_age_ms,
        stuck_percent: options.stuck_percent,
        held_ms,
        idle_ms: options
            .gateway
            .and_then(|_| u32::try_from(IDLE.as_millis()).ok()),
    };
    let mut server = Worker::start(hosts.server(), "server", WorkerRole::Server(server_config))?;
    let mut clients = Worker::start(
        hosts.clients(),
        "clients",
        WorkerRole::Clients(client_config),
    )?;

    let began = Instant::now();
    let mut is_done = |acts_reached| {
        let Progress { losses, streams } = clients.progress()?;
        let streams_reached = options.streams.is_none_or(|wanted| streams >= wanted);
        let lost = options.losses.is_some_and(|wanted| losses >= wanted);
        Ok(lost || acts_reached && streams_reached)
    };
    let until = began + options.time;
    let kill_stats = run_killers(hosts.killers(), until, &mut is_done)?;
    ensure!(clients.is_alive(), "the client process is gone");
    // A half-closed stream lasts twice the minimum age.
    let end_deadline = END_DEADLINE + longest_leak + 2 * min_age;
    let (lost_by_clients, client_stats): (_, ClientStats) = clients.finish(end_deadline)?;
    let duration = began.elapsed();

    let listening = |socket: &crate::KernelSocket| {
        socket.state == TcpState::Listen && ports.contains(&socket.local.port())
    };
    let sockets = hosts.server().sockets()?;
    let listeners = sockets.iter().filter(|socket| listening(socket)).count();
    let server_alive = server.is_alive();
    let (lost_by_server, server_stats): (_, ServerStats) = match server_alive {
        true => server.finish(end_deadline)?,
        false => Default::default(),
    };
    // If both sides of a connection report a loss, it counts once. The client's report has more details.
    let mut losses = BTreeMap::new();
    for loss in lost_by_clients.into_iter().chain(lost_by_server) {
        losses.entry(loss.id).or_insert(loss);
    }
    Ok(Report {
        options: options.clone(),
        duration,
        kill_stats,
        clients: client_stats,
        server: server_stats,
        losses: losses.into_values().collect(),
        listeners,
        server_alive,
    })
}

/// The hosts of a run.
enum Hosts {
    Linked { lab: Lab, link: Link },
    Routed(Routed),
}

impl Hosts {
    fn new(options: &Options) -> Result<Self> {
        if options.gateway.is_some() {
            return Ok(Hosts::Routed(Routed::new()?));
        }
        let lab = Lab::new()?;
        let link = lab.link()?;
        Ok(Hosts::Linked { lab, link })
    }

    fn server(&self) -> &Host {
        match self {
            Hosts::Linked { lab, .. } => lab.app_host(),
            Hosts::Routed(routed) => &routed.server,
        }
    }

    fn clients(&self) -> &Host {
        match self {
            Hosts::Linked { link, .. } => &link.peer_host,
            Hosts::Routed(routed) => &routed.client,
        }
    }

    fn killers(&self) -> &Host {
        match self {
            Hosts::Linked { lab, .. } => lab.app_host(),
            Hosts::Routed(routed) => &routed.router,
        }
    }

    /// Makes the server reachable. Returns the addresses of its two listeners, as clients see them.
    fn servers(&self, options: &Options) -> Result<[SocketAddr; 2]> {
        let ports = options.ports();
        match self {
            Hosts::Linked { link, .. } => {
                let (app, _) = link.addresses(options.family);
                Ok(ports.map(|port| SocketAddr::new(app, port)))
            }
            Hosts::Routed(routed) => {
                let nat = options.gateway.unwrap_or(Nat::None);
                let pairs = ports.map(|port| (port, port));
                let addresses = routed.translate(options.family, nat, &pairs)?;
                addresses.try_into().ok().context("two addresses")
            }
        }
    }

    fn first_client(&self, family: Family) -> IpAddr {
        match self {
            Hosts::Linked { link, .. } => link.addresses(family).1,
            Hosts::Routed(_) => Side::Client.host(family),
        }
    }
}

/// The command line of `netns-harness chaos`.
#[derive(Debug, clap::Args)]
pub(crate) struct Chaos {
    /// Longest duration of the run, in seconds; the daemon acts after the first minute
    #[arg(long, value_name = "N", default_value = "30", value_parser = clap::value_parser!(u64).range(1..))]
    seconds: u64,
    /// End as soon as every method has attempted to close N sockets; fewer are a fault
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    acts: Option<u64>,
    /// Methods of cwkill to run in turn
    #[arg(long, value_name = "M,…", value_delimiter = ',', default_values = METHODS)]
    method: Vec<String>,
    /// Clients, each with a source port of its own
    #[arg(long, value_name = "N", default_value = "200", value_parser = clap::value_parser!(u16).range(1..=5000))]
    connections: u16,
    /// How the two sides address each other
    #[arg(long, value_enum, default_value = "v4")]
    family: Family,
    /// The server's first port; it also uses the next one
    #[arg(long, default_value = "8080", value_parser = clap::value_parser!(u16).range(1..=65534))]
    port: u16,
    /// Seed of the random numbers [default: a new one for each run]
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// How many connections of a hundred get stuck; with more, there are more acts and fewer bystanders
    #[arg(long, value_name = "N", default_value = "50", value_parser = clap::value_parser!(u32).range(1..=99))]
    stuck_percent: u32,
    /// How long a stuck connection lasts at most, in milliseconds; with more, there are more acts
    #[arg(long, value_name = "MS", default_value_t = HELD_MS, value_parser = clap::value_parser!(u32).range(100..=60000))]
    held_ms: u32,
    /// The `--min-age` of cwkill; adds half-closed streams that stay younger
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u16).range(500..=20000))]
    min_age_ms: Option<u16>,
    /// The cwkill program to run
    #[arg(long, value_name = "PATH", default_value = "cwkill")]
    cwkill: PathBuf,
    /// Run `cwkill daemon` with a policy for each method instead of cwkill. Its minimum age is a minute
    #[arg(long, conflicts_with_all = ["min_age_ms", "instead"])]
    daemon: bool,
    /// Run `cwkill gateway --cut` on a router between clients and server: for connections that are idle for 5 s, and for those of which one
    /// end has sent its FIN
    #[arg(long, conflicts_with_all = ["daemon", "min_age_ms", "method"])]
    gateway: bool,
    /// The NAT of that router
    #[arg(long, value_enum, default_value = "both", requires = "gateway")]
    nat: Nat,
    /// Run this on the server's host or on the router instead of cwkill, to see whether its harm is detected; for example `ss -K sport = :8080`
    #[arg(long, value_name = "COMMAND", conflicts_with_all = ["method", "cwkill", "acts"])]
    instead: Option<String>,
}

/// The methods of `cwkill`.
pub const METHODS: [&str; 4] = ["shutdown", "destroy", "rst", "probe"];

impl Chaos {
    /// Runs the killers, prints the report and returns the exit status.
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
            streams: None,
            losses: None,
            connections: self.connections,
            family: self.family,
            port: self.port,
            seed,
            stuck_percent: self.stuck_percent,
            held_ms: self.held_ms,
            min_age: self.min_age_ms.map(|ms| Duration::from_millis(ms.into())),
            gateway: self.gateway.then_some(self.nat),
        };
        let report = match self.daemon {
            true => {
                let cwkill_program = program::beside_this_program(&self.cwkill)?;
                run_daemon(&options, &Daemon::new(&cwkill_program, &self.method))?
            }
            false => run(&options, &self.killers(&options)?)?,
        };
        println!("{report}");
        let faults = report.faults();
        for fault in &faults {
            println!("FAULT: {fault}");
        }
        Ok(i32::from(!faults.is_empty()))
    }

    fn killers(&self, options: &Options) -> Result<Vec<Killer>> {
        Ok(match &self.instead {
            Some(command) => {
                let words: Vec<_> = command.split_whitespace().collect();
                let Some(name) = words.first() else {
                    bail!("--instead needs a command, for example `ss -K sport = :8080`")
                };
                vec![Killer::other(name, &words)]
            }
            None if self.gateway => {
                let cwkill_program = program::beside_this_program(&self.cwkill)?;
                Killer::gateway(&cwkill_program, options.ports()).into()
            }
            None => {
                let cwkill_program = program::beside_this_program(&self.cwkill)?;
                let cwkill = |method| {
                    Killer::cwkill(&cwkill_program, method, options.ports(), options.min_age)
                };
                self.method.iter().map(|method| cwkill(method)).collect()
            }
        })
    }
}
