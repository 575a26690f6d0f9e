//! A lab: one host for the leaking applications, and one host per peer, connected to it by a veth pair.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use clap::ValueEnum;
use nix::sys::resource::{Resource, getrlimit};
use serde::{Deserialize, Serialize};

use crate::agent::{Agent, AgentOptions, Endpoint, Fd};
use crate::host::Host;
use crate::rtnetlink;
use crate::scenario::{self, Expect, Scenario, Sharing, Stage};

/// Name of the link on the peer's host.
const PEER_LINK: &str = "eth0";

/// Descriptors that an agent needs in addition to its connections.
const SPARE_DESCRIPTORS: usize = 32;

/// Pause between two checks of a condition.
pub(crate) const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// How the two sides address each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
#[value(rename_all = "lowercase")]
pub enum Family {
    /// IPv4 on both sides.
    V4,
    /// IPv6 on both sides.
    V6,
    /// IPv4 connections to an IPv6 socket: the application's addresses are IPv4-mapped.
    Mapped,
}

impl Family {
    /// All families.
    pub const ALL: [Self; 3] = [Self::V4, Self::V6, Self::Mapped];

    /// The name on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::V4 => "v4",
            Self::V6 => "v6",
            Self::Mapped => "mapped",
        }
    }

    /// The wildcard address that a listener of this family binds to.
    pub(crate) fn any(self) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::UNSPECIFIED.into(),
            Self::V6 | Self::Mapped => Ipv6Addr::UNSPECIFIED.into(),
        }
    }
}

/// The address that the application's listener binds to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum Listen {
    /// The wildcard address, as with most applications. Only one application of a lab can have the port.
    #[default]
    Any,
    /// The address of the application's link. Several applications of a lab can have the same port.
    Own,
}

/// Options of [`Lab::start`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Number of sockets to bring into the state.
    pub count: usize,
    /// The application's port.
    pub port: u16,
    /// The address that its listener binds to.
    pub listen: Listen,
    /// Start a new application, peer and link, even if the lab has an application to share.
    pub own: bool,
    /// How long to wait until the kernel shows the state.
    pub deadline: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            count: 1,
            port: 8080,
            listen: Listen::Any,
            own: false,
            // Generous: the wait ends as soon as the state is reached.
            deadline: Duration::from_secs(60),
        }
    }
}

/// One connection of a scenario, from the application's side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Conn {
    /// The application's address.
    pub local: SocketAddr,
    /// The peer's address.
    pub peer: SocketAddr,
    /// The application's descriptor. `None` if the connection was not accepted, was closed, or is in flight.
    pub app_fd: Option<Fd>,
    /// The peer's descriptor. `None` if it was closed.
    pub peer_fd: Option<Fd>,
    /// Bytes of [`crate::pattern`] that the application has queued to the peer.
    pub sent: u64,
}

/// An application, its peer and the link between them.
#[derive(Debug)]
pub struct Pair {
    /// The leaking application.
    pub app: Agent,
    /// The process that connects to the application.
    pub peer: Agent,
    /// The peer's host.
    pub peer_host: Host,
    /// The application's listening socket.
    pub listener: Fd,
    /// The address that the peer connects to.
    pub app_address: SocketAddr,
    /// The peer's address on the link.
    pub peer_address: IpAddr,
    family: Family,
    options: Options,
    /// No other scenario may use this pair, because connections must stay in its accept queue.
    sealed: Mutex<bool>,
}

impl Pair {
    /// Sets the peer's end of the link up or down. Down is a peer that is unplugged.
    ///
    /// # Errors
    /// The kernel refuses the change.
    pub fn set_link(&self, up: bool) -> Result<()> {
        self.peer_host.set_link(PEER_LINK, up)
    }

    /// The peer's address as in the application's sockets.
    pub(crate) fn peer_address_of_app(&self) -> IpAddr {
        match (self.family, self.peer_address) {
            (Family::Mapped, IpAddr::V4(ip)) => ip.to_ipv6_mapped().into(),
            (_, ip) => ip,
        }
    }
}

/// Hosts, applications and peers. They are removed when the lab is dropped or this process ends, for whatever reason.
///
/// Labs are independent: several can exist at the same time with the same addresses and ports.
#[derive(Debug)]
pub struct Lab {
    app_host: Host,
    pairs: Mutex<Vec<Arc<Pair>>>,
    links: AtomicU8,
}

impl Lab {
    /// An empty lab.
    ///
    /// # Errors
    /// The kernel refuses a network namespace; see [`crate::ensure_privileges`].
    pub fn new() -> Result<Self> {
        Ok(Self {
            app_host: Host::new()?,
            pairs: Mutex::default(),
            links: AtomicU8::new(0),
        })
    }

    /// The host of the leaking applications.
    #[must_use]
    pub fn app_host(&self) -> &Host {
        &self.app_host
    }

    /// Brings sockets into the state of `scenario` and waits until the kernel shows it.
    ///
    /// Where possible, scenarios on the same port and family share one application and its listener.
    ///
    /// # Errors
    /// The scenario is unknown, a requirement of it is missing, or the state was not reached in time. In the last case, the
    /// message says what the kernel shows instead.
    pub fn start(&self, scenario: &str, family: Family, options: Options) -> Result<Leak> {
        let leak = self.prepare(scenario, family, options)?;
        leak.wait_for_state(&self.app_host, options.deadline)?;
        Ok(leak)
    }

    /// As [`Self::start`], but does not wait for the state.
    ///
    /// # Errors
    /// The scenario is unknown, or a requirement of it is missing.
    pub fn prepare(&self, scenario: &str, family: Family, options: Options) -> Result<Leak> {
        let scenario = scenario::find(scenario)?;
        ensure!(options.count > 0, "a scenario needs at least one socket");
        let (_, limit) = getrlimit(Resource::RLIMIT_NOFILE).context("read RLIMIT_NOFILE")?;
        let limit = usize::try_from(limit)
            .unwrap_or(usize::MAX)
            .saturating_sub(SPARE_DESCRIPTORS);
        ensure!(
            options.count <= limit,
            "{} sockets are more than one process can have (the hard RLIMIT_NOFILE allows {limit})",
            options.count
        );
        let pair = self.pair_for(scenario, family, options)?;
        let stage = Stage {
            app_host: &self.app_host,
            pair: &pair,
            count: options.count,
        };
        let conns =
            (scenario.build)(&stage).with_context(|| format!("scenario {}", scenario.name))?;
        Ok(Leak {
            scenario,
            pair,
            conns,
        })
    }

    /// Waits until `condition` holds.
    ///
    /// # Errors
    /// `condition` fails, or does not hold within `deadline`.
    pub fn wait_for(
        &self,
        deadline: Duration,
        condition: impl FnMut() -> Result<bool>,
    ) -> Result<()> {
        wait_for(deadline, condition)
    }

    fn pair_for(&self, scenario: &Scenario, family: Family, options: Options) -> Result<Arc<Pair>> {
        let mut pairs = self.pairs.lock().unwrap_or_else(PoisonError::into_inner);
        let seals = scenario.sharing == Sharing::Last;
        if !options.own && scenario.sharing != Sharing::Never {
            let fits = |pair: &&Arc<Pair>| {
                let same = pair.family == family && pair.options.port == options.port;
                same && !pair.options.own
                    && !*pair.sealed.lock().unwrap_or_else(PoisonError::into_inner)
            };
            if let Some(pair) = pairs.iter().find(fits) {
                *pair.sealed.lock().unwrap_or_else(PoisonError::into_inner) |= seals;
                return Ok(Arc::clone(pair));
            }
        }
        let options = Options {
            own: options.own || scenario.sharing == Sharing::Never,
            ..options
        };
        let pair = Arc::new(self.new_pair(&scenario.app, family, options)?);
        *pair.sealed.lock().unwrap_or_else(PoisonError::into_inner) = seals;
        pairs.push(Arc::clone(&pair));
        Ok(pair)
    }

    /// Connects a new host to the application's and assigns addresses to both ends.
    pub(crate) fn link(&self) -> Result<Link> {
        let number = self
            .links
            .fetch_add(1, Ordering::Relaxed)
            .checked_add(1)
            .context("no more links in this lab")?;
        let link = Link {
            peer_host: Host::new()?,
            number,
        };
        let app_link = format!("veth{number}");
        self.app_host.join(&app_link, &link.peer_host, PEER_LINK)?;
        for (host, name, end) in [
            (&self.app_host, app_link.as_str(), Link::APP),
            (&link.peer_host, PEER_LINK, Link::PEER),
        ] {
            host.within(|| {
                rtnetlink::set_link(name, true)?;
                rtnetlink::add_address(name, link.v4(end), 24)?;
                rtnetlink::add_address(name, link.v6(end), 64)
            })?;
        }
        Ok(link)
    }

    fn new_pair(
        &self,
        app_of_scenario: &scenario::App,
        family: Family,
        options: Options,
    ) -> Result<Pair> {
        let link = self.link()?;
        let (app_ip, peer_address) = link.addresses(family);
        let bound = match (options.listen, family, app_ip) {
            (Listen::Any, _, _) => family.any(),
            (Listen::Own, Family::Mapped, IpAddr::V4(ip)) => ip.to_ipv6_mapped().into(),
            (Listen::Own, _, ip) => ip,
        };
        let app_options = AgentOptions {
            comm: app_of_scenario.comm.to_owned(),
            uid: app_of_scenario.uid,
            capabilities: None,
        };
        let app = self.app_host.agent_as(&app_options)?;
        let peer = link.peer_host.agent("peer")?;
        let listener = app.listen_with(
            SocketAddr::new(bound, options.port),
            family == Family::V6,
            i32::from(u16::MAX),
            app_of_scenario.mptcp,
        )?;
        Ok(Pair {
            app,
            peer,
            peer_host: link.peer_host,
            listener,
            app_address: SocketAddr::new(app_ip, options.port),
            peer_address,
            family,
            options,
            sealed: Mutex::new(false),
        })
    }
}

/// As [`Lab::wait_for`].
///
/// # Errors
/// `condition` fails, or does not hold within `deadline`.
pub fn wait_for(deadline: Duration, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    let until = Instant::now() + deadline;
    while !condition()? {
        ensure!(
            Instant::now() < until,
            "the condition did not hold within {deadline:?}"
        );
        std::thread::sleep(POLL_INTERVAL);
    }
    Ok(())
}

/// A peer's host and its link to the application's host. Link N has the networks 10.78.N.0/24 and fd78:0:0:N::/64.
#[derive(Debug)]
pub(crate) struct Link {
    pub peer_host: Host,
    number: u8,
}

impl Link {
    /// Host numbers of the two ends in the networks of the link.
    const APP: u8 = 1;
    const PEER: u8 = 2;

    /// The addresses of the application and of the peer, as in packets.
    pub(crate) fn addresses(&self, family: Family) -> (IpAddr, IpAddr) {
        match family {
            Family::V4 | Family::Mapped => (self.v4(Self::APP), self.v4(Self::PEER)),
            Family::V6 => (self.v6(Self::APP), self.v6(Self::PEER)),
        }
    }

    fn v4(&self, end: u8) -> IpAddr {
        Ipv4Addr::new(10, 78, self.number, end).into()
    }

    fn v6(&self, end: u8) -> IpAddr {
        Ipv6Addr::new(0xfd78, 0, 0, self.number.into(), 0, 0, 0, end.into()).into()
    }
}

/// Sockets in the state of one scenario.
#[derive(Debug)]
pub struct Leak {
    scenario: &'static Scenario,
    pair: Arc<Pair>,
    conns: Vec<Conn>,
}

impl Leak {
    /// The scenario.
    #[must_use]
    pub fn scenario(&self) -> &'static Scenario {
        self.scenario
    }

    /// The application.
    #[must_use]
    pub fn app(&self) -> &Agent {
        &self.pair.app
    }

    /// The peer.
    #[must_use]
    pub fn peer(&self) -> &Agent {
        &self.pair.peer
    }

    /// The application, the peer and the link between them.
    #[must_use]
    pub fn pair(&self) -> &Pair {
        &self.pair
    }

    /// The connections.
    #[must_use]
    pub fn conns(&self) -> &[Conn] {
        &self.conns
    }

    /// The application's descriptors of the connections.
    #[must_use]
    pub fn app_fds(&self) -> Vec<Fd> {
        self.conns.iter().filter_map(|conn| conn.app_fd).collect()
    }

    /// The peer's descriptors of the connections.
    #[must_use]
    pub fn peer_fds(&self) -> Vec<Fd> {
        self.conns.iter().filter_map(|conn| conn.peer_fd).collect()
    }

    /// Waits until the kernel shows every connection as the scenario expects.
    pub(crate) fn wait_for_state(&self, app_host: &Host, deadline: Duration) -> Result<()> {
        let until = Instant::now() + self.scenario.deadline.unwrap_or(deadline);
        app_host.within(|| {
            loop {
                let wrong = self.differences(&crate::kernel::sockets()?);
                let Some(first) = wrong.first() else { return Ok(()) };
                if Instant::now() >= until {
                    bail!(
                        "scenario {}: {} of {} sockets did not reach the expected state ({}) in time, for example {first}",
                        self.scenario.name,
                        wrong.len(),
                        self.conns.len(),
                        self.scenario.expect,
                    );
                }
                std::thread::sleep(POLL_INTERVAL);
            }
        })
    }

    fn differences(&self, sockets: &[crate::KernelSocket]) -> Vec<String> {
        let by_tuple: std::collections::HashMap<_, _> = sockets
            .iter()
            .map(|socket| ((socket.local, socket.peer), socket))
            .collect();
        let expect: &Expect = &self.scenario.expect;
        self.conns
            .iter()
            .filter_map(|conn| match by_tuple.get(&(conn.local, conn.peer)) {
                None => Some(format!("{} {}: no such socket", conn.local, conn.peer)),
                Some(socket)
                    if expect.fits(socket.state, socket.recv_q, socket.send_q, socket.inode) =>
                {
                    None
                }
                Some(socket) => Some(format!("{socket:?}")),
            })
            .collect()
    }
}

/// Matches the ends of connections in the application and in the peer.
pub(crate) fn join_ends(app_ends: &[Endpoint], peer_ends: &[Endpoint]) -> Result<Vec<Conn>> {
    let by_local: std::collections::HashMap<_, _> =
        peer_ends.iter().map(|end| (end.local, end)).collect();
    app_ends
        .iter()
        .map(|end| {
            let other = by_local
                .get(&end.peer)
                .with_context(|| format!("unexpected connection from {}", end.peer))?;
            Ok(Conn {
                local: end.local,
                peer: end.peer,
                app_fd: Some(end.fd),
                peer_fd: Some(other.fd),
                sent: 0,
            })
        })
        .collect()
}
