//! The scenarios: the ways in which a socket gets stuck, one per file, listed in [`ALL`].
//!
//! A scenario is a script of requests to the application and its peer, and the state that the kernel must show afterwards.
//! It works in every [`crate::Family`].

mod closing;
mod drained;
mod established;
mod fin_wait_1;
mod fin_wait_1_orphan;
mod fin_wait_2;
mod forked;
mod full_backlog;
mod half_closed;
mod ktls;
mod ktls_partial;
mod last_ack;
mod mptcp;
mod mptcp_fallback;
mod must_fail;
mod not_accepted;
mod other_user;
mod peer_gone;
mod peer_vanished;
mod reuse;
mod scm_rights;
mod sending;
mod silent_peer;
mod stopped;
mod syn_recv;
mod syn_sent;
mod thread_table;
mod threads;
mod time_wait;
mod unread;
mod vrf;

use std::collections::HashSet;
use std::fmt;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

use crate::agent::{Agent, Dial, End, Fd, How, SocketOption};
use crate::host::Host;
use crate::kernel::{self, TcpState};
use crate::lab::{Conn, POLL_INTERVAL, Pair, join_ends};

/// Every scenario, in the order of `netns-harness list`.
pub const ALL: &[&Scenario] = &[
    &unread::SCENARIO,
    &drained::SCENARIO,
    &not_accepted::SCENARIO,
    &full_backlog::SCENARIO,
    &forked::SCENARIO,
    &sending::SCENARIO,
    &half_closed::SCENARIO,
    &peer_gone::SCENARIO,
    &silent_peer::SCENARIO,
    &peer_vanished::SCENARIO,
    &scm_rights::SCENARIO,
    &other_user::SCENARIO,
    &stopped::SCENARIO,
    &threads::SCENARIO,
    &thread_table::SCENARIO,
    &reuse::SCENARIO,
    &fin_wait_1::SCENARIO,
    &fin_wait_1_orphan::SCENARIO,
    &fin_wait_2::SCENARIO,
    &last_ack::SCENARIO,
    &closing::SCENARIO,
    &syn_sent::SCENARIO,
    &syn_recv::SCENARIO,
    &time_wait::SCENARIO,
    &established::SCENARIO,
    &mptcp::SCENARIO,
    &mptcp_fallback::SCENARIO,
    &ktls::SCENARIO,
    &ktls_partial::SCENARIO,
    &vrf::SCENARIO,
    &must_fail::SCENARIO,
];

/// Connections to open before the application accepts them.
const BATCH: usize = 512;

/// Time limit of one step of a script.
pub(crate) const STEP: Duration = Duration::from_secs(60);

/// One way in which a socket gets stuck.
#[derive(Debug)]
pub struct Scenario {
    /// The name on the command line.
    pub name: &'static str,
    /// A description in one line.
    pub summary: &'static str,
    /// Whether `netns-harness list` omits it.
    pub hidden: bool,
    /// Properties of the application.
    pub(crate) app: App,
    /// Whether it shares its application with other scenarios.
    pub(crate) sharing: Sharing,
    /// The state that the application's kernel must show for every connection.
    pub expect: Expect,
    /// How long to wait for the state. `None` leaves it to the caller.
    pub(crate) deadline: Option<Duration>,
    pub(crate) build: fn(&Stage<'_>) -> Result<Vec<Conn>>,
}

impl Scenario {
    /// The defaults: the usual application, shared, with connections in CLOSE-WAIT.
    const fn new(
        name: &'static str,
        summary: &'static str,
        build: fn(&Stage<'_>) -> Result<Vec<Conn>>,
    ) -> Self {
        Scenario {
            name,
            summary,
            hidden: false,
            app: LEAKY_APP,
            sharing: Sharing::Freely,
            expect: Expect::CLOSE_WAIT,
            deadline: None,
            build,
        }
    }
}

/// Properties of the application of a scenario.
#[derive(Debug)]
pub(crate) struct App {
    pub comm: &'static str,
    pub uid: Option<u32>,
    /// Whether its listener is of IPPROTO_MPTCP.
    pub mptcp: bool,
}

/// The usual application.
pub(crate) const LEAKY_APP: App = App {
    comm: "leaky-app",
    uid: None,
    mptcp: false,
};

/// Whether scenarios on the same port and family share an application.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sharing {
    Freely,
    /// It can use a running application, but no other scenario can follow: it leaves connections in the accept queue.
    Last,
    Never,
}

/// The state that the kernel must show for a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expect {
    /// The TCP state.
    pub state: TcpState,
    /// Unread bytes, where an unread FIN counts as one.
    pub recv_q: RangeInclusive<u32>,
    /// Bytes that the peer has not acknowledged.
    pub send_q: RangeInclusive<u32>,
    /// Whether the socket has an inode.
    pub inode: bool,
    /// Number of processes with a descriptor of the socket.
    pub owners: usize,
}

impl Expect {
    /// CLOSE-WAIT, read to the end, nothing to send, one owner.
    pub(crate) const CLOSE_WAIT: Self = Self {
        state: TcpState::CloseWait,
        recv_q: 0..=0,
        send_q: 0..=0,
        inode: true,
        owners: 1,
    };

    /// Compares everything except the owners, which are not in the kernel's tables.
    pub(crate) fn fits(&self, state: TcpState, recv_q: u32, send_q: u32, inode: u64) -> bool {
        state == self.state
            && self.recv_q.contains(&recv_q)
            && self.send_q.contains(&send_q)
            && (inode != 0) == self.inode
    }
}

impl fmt::Display for Expect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            state,
            recv_q,
            send_q,
            inode,
            owners,
        } = self;
        let inode = if *inode { "an" } else { "no" };
        write!(
            f,
            "{state}, recv_q {recv_q:?}, send_q {send_q:?}, {inode} inode, {owners} owners"
        )
    }
}

/// The scenario with this name.
///
/// # Errors
/// The name is unknown; the message lists all names.
pub fn find(name: &str) -> Result<&'static Scenario> {
    match ALL.iter().find(|scenario| scenario.name == name) {
        Some(scenario) => Ok(scenario),
        None => {
            let names: Vec<_> = listed().map(|scenario| scenario.name).collect();
            bail!(
                "unknown scenario `{name}`; choose one of {}",
                names.join(", ")
            )
        }
    }
}

/// The scenarios that `netns-harness list` shows.
pub fn listed() -> impl Iterator<Item = &'static Scenario> {
    ALL.iter().copied().filter(|scenario| !scenario.hidden)
}

/// The environment of a script.
pub(crate) struct Stage<'a> {
    pub app_host: &'a Host,
    pub pair: &'a Pair,
    pub count: usize,
}

impl Stage<'_> {
    pub(crate) fn app(&self) -> &Agent {
        &self.pair.app
    }

    pub(crate) fn peer(&self) -> &Agent {
        &self.pair.peer
    }

    /// Opens and accepts `count` connections.
    pub(crate) fn connected(&self) -> Result<Vec<Conn>> {
        self.connected_by(Dial::default())
    }

    pub(crate) fn connected_by(&self, dial: Dial) -> Result<Vec<Conn>> {
        let mut conns = Vec::with_capacity(self.count);
        while conns.len() < self.count {
            let size = BATCH.min(self.count - conns.len());
            let mut dial = dial;
            if let Some(from) = dial.from.as_mut().filter(|from| from.port() != 0) {
                let port = u16::try_from(conns.len())
                    .ok()
                    .and_then(|done| from.port().checked_add(done));
                from.set_port(port.with_context(|| {
                    format!("there are no {} ports from {}", self.count, from.port())
                })?);
            }
            let peer_ends = self
                .peer()
                .connect(self.pair.app_address, size, dial, STEP)?;
            let app_ends = self.app().accept(self.pair.listener, size, STEP)?;
            conns.extend(join_ends(&app_ends, &peer_ends)?);
        }
        Ok(conns)
    }

    /// Lets the peer finish, and waits until the application's kernel has acknowledged the FIN, which it may delay by 40 ms.
    /// No segment is then in flight that could reach a peer that drops segments or has forgotten the connection.
    pub(crate) fn finish_in_peer(&self, conns: &[Conn]) -> Result<()> {
        self.peer().shutdown(&peer_fds(conns), How::Write)?;
        let tuples = conns.iter().map(|conn| (conn.peer, conn.local));
        wait_for_state(&self.pair.peer_host, TcpState::FinWait2, tuples.collect())
            .context("the FINs of the peer were not acknowledged")
    }

    /// Waits until the application's kernel shows all these connections in `state`.
    pub(crate) fn wait_in_app(&self, conns: &[Conn], state: TcpState) -> Result<()> {
        let tuples = conns.iter().map(|conn| (conn.local, conn.peer));
        wait_for_state(self.app_host, state, tuples.collect())
    }

    /// Opens connections that the application reads to the end and does not close.
    pub(crate) fn leaked(&self) -> Result<Vec<Conn>> {
        let conns = self.connected()?;
        self.finish_in_peer(&conns)?;
        self.read_to_end(self.app(), &app_fds(&conns))?;
        Ok(conns)
    }

    /// Opens connections whose peer then drops every segment.
    pub(crate) fn with_silent_peer(&self) -> Result<Vec<Conn>> {
        let conns = self.connected()?;
        self.peer()
            .set_option(&peer_fds(&conns), SocketOption::DropIncoming(true))?;
        Ok(conns)
    }

    pub(crate) fn close_in_app(&self, conns: &mut [Conn]) -> Result<()> {
        self.app().close(&app_fds(conns))?;
        conns.iter_mut().for_each(|conn| conn.app_fd = None);
        Ok(())
    }

    pub(crate) fn read_to_end(&self, agent: &Agent, fds: &[Fd]) -> Result<()> {
        for drained in agent.drain(fds, STEP)? {
            if drained.end != End::Eof {
                bail!("{} did not read to the end: {drained:?}", agent.comm());
            }
        }
        Ok(())
    }
}

/// Waits until the kernel of `host` has shown every connection (local and peer address) in `state`.
fn wait_for_state(
    host: &Host,
    state: TcpState,
    mut waiting: HashSet<(SocketAddr, SocketAddr)>,
) -> Result<()> {
    let until = Instant::now() + STEP;
    host.within(|| {
        loop {
            for socket in kernel::sockets()? {
                if socket.state == state {
                    waiting.remove(&(socket.local, socket.peer));
                }
            }
            if waiting.is_empty() {
                return Ok(());
            }
            if Instant::now() > until {
                bail!(
                    "{} connections were not in {state} within {STEP:?}",
                    waiting.len()
                );
            }
            thread::sleep(POLL_INTERVAL);
        }
    })
}

pub(crate) fn app_fds(conns: &[Conn]) -> Vec<Fd> {
    conns.iter().filter_map(|conn| conn.app_fd).collect()
}

pub(crate) fn peer_fds(conns: &[Conn]) -> Vec<Fd> {
    conns.iter().filter_map(|conn| conn.peer_fd).collect()
}
