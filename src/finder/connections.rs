//! Sockets of the namespaces that were read, whichever the selectors match: the other ends of the targets, and the other
//! connections of their owners.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use super::{FindError, mptcp};
use crate::proc::netns::Netns;
use crate::sock_diag::{
    ByteCounters, Cookie, Detail, DiagId, DumpRequest, Family, SockDiag, SocketMessage,
};
use crate::tcp::{StateSet, TcpState, Tuple};

/// A TCP socket, at the time when the kernel reported it.
#[derive(Clone, Debug)]
pub struct Connection {
    /// The index of its network namespace, among those that were given.
    pub netns: usize,
    pub id: DiagId,
    pub state: TcpState,
    /// `None` if no descriptor exists.
    pub inode: Option<u32>,
    /// See [`SocketMessage::send_q`].
    pub send_q: u32,
    /// See [`SocketMessage::counters`]. Only [`look_up`] fills it in.
    pub counters: Option<ByteCounters>,
    /// The time since the last acceptable segment of the peer. Only [`look_up`] fills it in.
    pub last_segment: Option<Duration>,
}

impl Connection {
    fn of(message: &SocketMessage, netns: usize) -> Self {
        Connection {
            netns,
            id: message.id,
            state: message.state,
            inode: (message.inode != 0).then_some(message.inode),
            send_q: message.send_q,
            counters: message.counters,
            last_segment: message.quiet.map(|quiet| quiet.last_ack_recv),
        }
    }

    pub fn tuple(&self) -> Tuple {
        self.id.tuple()
    }

    pub fn cookie(&self) -> Cookie {
        self.id.cookie()
    }

    /// Its namespace and its cookie. No other socket has both.
    pub fn key(&self) -> (usize, Cookie) {
        (self.netns, self.cookie())
    }
}

/// What stands in a list for the subflows of MPTCP sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subflows {
    /// They themselves.
    Listed,
    /// Their MPTCP socket. After a fallback the subflow stays: its state is that of the connection.
    Replaced,
}

/// Lists the sockets in `states` that `keep` wants. Also returns the first error: the sockets of its namespace are missing.
pub fn list(
    namespaces: &[Arc<Netns>],
    states: StateSet,
    subflows: Subflows,
    keep: &(dyn Fn(&SocketMessage) -> bool + Sync),
) -> (Vec<Connection>, Option<FindError>) {
    in_each(namespaces, &|netns| {
        let mut diag = SockDiag::open().map_err(FindError::Open)?;
        let mut connections = Vec::new();
        for family in Family::ALL {
            let request = DumpRequest::plain(family, states);
            let of = |message| keep(&message).then(|| Connection::of(&message, netns));
            connections.append(&mut diag.dump(&request, of)?);
        }
        if subflows == Subflows::Listed {
            return Ok(connections);
        }
        // An MPTCP socket exists at least as long as its subflows, so it is listed after them.
        let mut rows = mptcp::connections(&mut diag)?.unwrap_or_default();
        rows.retain(|row| row.mptcp.is_some_and(|mptcp| !mptcp.is_fallback));
        let tuples: HashSet<Tuple> = rows.iter().map(|row| row.id.tuple()).collect();
        connections.retain(|connection| !tuples.contains(&connection.tuple()));
        let is_wanted = |row: &&SocketMessage| states.contains(row.state) && keep(row);
        let wanted = rows.iter().filter(is_wanted);
        connections.extend(wanted.map(|row| Connection::of(row, netns)));
        Ok(connections)
    })
}

/// Looks up the same sockets again, with their byte counters and times. Those that are gone are left out.
pub fn look_up(
    namespaces: &[Arc<Netns>],
    connections: &[Connection],
) -> (Vec<Connection>, Option<FindError>) {
    in_each(namespaces, &|netns| {
        let here = connections.iter().filter(|one| one.netns == netns);
        let ids: Vec<DiagId> = here.map(|connection| connection.id).collect();
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        let mut diag = SockDiag::open().map_err(FindError::Open)?;
        let answers = diag.lookup(&ids, Detail::TcpInfo);
        let answers = answers.map_err(FindError::Lookup)?.into_iter();
        let found = answers.filter_map(|answer| Some(Connection::of(&answer.ok()?, netns)));
        Ok(found.collect())
    })
}

/// Runs `read` in each namespace, with its index.
fn in_each(
    namespaces: &[Arc<Netns>],
    read: &(dyn Fn(usize) -> Result<Vec<Connection>, FindError> + Sync),
) -> (Vec<Connection>, Option<FindError>) {
    let (mut all, mut first_error) = (Vec::new(), None);
    for (index, netns) in namespaces.iter().enumerate() {
        let connections = netns.within(|| read(index)).map_err(FindError::Enter);
        match connections.and_then(|connections| connections) {
            Ok(mut connections) => all.append(&mut connections),
            Err(error) => {
                first_error.get_or_insert(error);
            }
        }
    }
    (all, first_error)
}
