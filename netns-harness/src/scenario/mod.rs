//! The scenarios: every way a socket gets stuck, one file each, listed in [`ALL`].
//!
//! A scenario is a script of requests to the application and its peer, and a statement of what the kernel must show
//! afterwards. It knows nothing of families: those come from [`crate::Family`].

mod drained;
mod established;
mod forked;
mod must_fail;
mod not_accepted;
mod unread;

use std::fmt;
use std::ops::RangeInclusive;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::agent::{Agent, Dial, End, Fd, How};
use crate::kernel::TcpState;
use crate::lab::{Conn, Pair, join_ends};

/// Every scenario, in the order of `netns-harness list`.
pub const ALL: &[&Scenario] = &[
    &unread::SCENARIO,
    &drained::SCENARIO,
    &not_accepted::SCENARIO,
    &forked::SCENARIO,
    &established::SCENARIO,
    &must_fail::SCENARIO,
];

/// Connections opened before the application accepts them.
const BATCH: usize = 512;

/// How long one step of a script may take.
pub(crate) const STEP: Duration = Duration::from_secs(60);

/// One way a socket gets stuck.
#[derive(Debug)]
pub struct Scenario {
    /// Its name on the command line.
    pub name: &'static str,
    /// One line on what it is.
    pub summary: &'static str,
    /// Left out of `netns-harness list`.
    pub hidden: bool,
    /// What the application is like.
    pub(crate) app: App,
    /// May it share its application with other scenarios?
    pub(crate) sharing: Sharing,
    /// What every connection must look like on the application's host.
    pub expect: Expect,
    /// How long the state may take to come about; `None` leaves it to the caller.
    pub(crate) deadline: Option<Duration>,
    pub(crate) build: fn(&Stage<'_>) -> Result<Vec<Conn>>,
}

/// What the application of a scenario is like.
#[derive(Debug)]
pub(crate) struct App {
    pub comm: &'static str,
    pub uid: Option<u32>,
}

/// The usual application.
pub(crate) const LEAKY_APP: App = App {
    comm: "leaky-app",
    uid: None,
};

/// Whether scenarios on the same port and family share an application.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sharing {
    Freely,
    /// With those before it, but none may follow: it leaves connections in the accept queue.
    Last,
    Never,
}

/// What a connection must look like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expect {
    /// Its state.
    pub state: TcpState,
    /// Unread bytes (a FIN not read yet counts as one).
    pub recv_q: RangeInclusive<u32>,
    /// Bytes not acknowledged by the peer.
    pub send_q: RangeInclusive<u32>,
    /// Does it have an inode?
    pub inode: bool,
    /// Processes that hold a descriptor of it.
    pub owners: usize,
}

impl Expect {
    /// In CLOSE-WAIT, read to the end, nothing to send, one owner.
    pub(crate) const CLOSE_WAIT: Self = Self {
        state: TcpState::CloseWait,
        recv_q: 0..=0,
        send_q: 0..=0,
        inode: true,
        owners: 1,
    };

    /// All of it but the owners, which the kernel's table does not tell.
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

/// The scenario of that name.
///
/// # Errors
/// There is none; the message lists them.
pub fn find(name: &str) -> Result<&'static Scenario> {
    match ALL.iter().find(|scenario| scenario.name == name) {
        Some(scenario) => Ok(scenario),
        None => {
            let names: Vec<_> = listed().map(|scenario| scenario.name).collect();
            bail!("no scenario `{name}`; there are {}", names.join(", "))
        }
    }
}

/// The scenarios for people.
pub fn listed() -> impl Iterator<Item = &'static Scenario> {
    ALL.iter().copied().filter(|scenario| !scenario.hidden)
}

/// What a script works with.
pub(crate) struct Stage<'a> {
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

    /// `count` connections, accepted.
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
                from.set_port(
                    port.with_context(|| format!("no {} ports above {}", self.count, from.port()))?,
                );
            }
            let theirs = self
                .peer()
                .connect(self.pair.app_address, size, dial, STEP)?;
            let ours = self.app().accept(self.pair.listener, size, STEP)?;
            conns.extend(join_ends(&ours, &theirs)?);
        }
        Ok(conns)
    }

    /// Connections whose peer has finished, and whose application has not looked.
    pub(crate) fn finished_by_peer(&self) -> Result<Vec<Conn>> {
        let conns = self.connected()?;
        self.peer().shutdown(&peer_fds(&conns), How::Write)?;
        Ok(conns)
    }

    /// Connections that the application has read to the end and forgotten to close.
    pub(crate) fn leaked(&self) -> Result<Vec<Conn>> {
        let conns = self.finished_by_peer()?;
        self.read_to_end(self.app(), &app_fds(&conns))?;
        Ok(conns)
    }

    pub(crate) fn read_to_end(&self, agent: &Agent, fds: &[Fd]) -> Result<()> {
        for drained in agent.drain(fds, STEP)? {
            if drained.end != End::Eof {
                bail!("{} could not read to the end: {drained:?}", agent.comm());
            }
        }
        Ok(())
    }
}

pub(crate) fn app_fds(conns: &[Conn]) -> Vec<Fd> {
    conns.iter().filter_map(|conn| conn.app_fd).collect()
}

pub(crate) fn peer_fds(conns: &[Conn]) -> Vec<Fd> {
    conns.iter().filter_map(|conn| conn.peer_fd).collect()
}
