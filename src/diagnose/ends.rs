//! Who is at the other end of the stuck connections, as far as it is in one of the namespaces that were read, and what a proxy
//! still has to send on the other connections of its pairs.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;

use super::counts;
use super::nat::{self, Translations};
use super::origin::ListeningPort;
use super::pairing::{self, EndOwner, KnownBy, Leg, OtherEnd, OtherLeg, ScannedSocket, key};
use super::{ListenerDiagnosis, ProcessDiagnosis};
use crate::diagnose::counts::SocketCounts;
use crate::finder::FindError;
use crate::finder::connections::{self, Connection, Subflows};
use crate::finder::owners::{self, OwnerScan};
use crate::finder::tracked;
use crate::model::{Scan, Socket};
use crate::proc::netns::Netns;
use crate::proc::{Inodes, ProcFs, ProcessId};
use crate::sock_diag::{Protocol, SocketMessage};
use crate::tcp::{StateSet, TcpState, Tuple};

/// With more connections that have bytes to send, no legs are named: the host is busy, and each takes a lookup.
const MAX_SENDING: usize = 4096;

/// Of more connections that may have gone through NAT, none are compared: each takes two lookups.
const MAX_COMPARED: usize = 4096;

/// The connections that had bytes for their peers at the first scan.
#[derive(Debug, Default)]
pub(super) struct Sending(Vec<Connection>);

impl Sending {
    /// `namespaces` have the same indexes in both scans.
    pub(super) fn look(namespaces: &[Arc<Netns>], first: &Scan) -> Sending {
        let is_stuck = |socket: &Socket| socket.state == TcpState::CloseWait;
        if !first.targets.iter().any(|target| is_stuck(&target.socket)) {
            return Sending::default();
        }
        // An error means that fewer are known. A pair is then not named, because the numbers differ.
        let established = StateSet::from(TcpState::Established);
        let (listed, _) =
            connections::list(namespaces, established, Subflows::Listed, &|message| {
                message.send_q > 0
            });
        match listed.len() {
            0..=MAX_SENDING => Sending(connections::look_up(namespaces, &listed).0),
            _ => Sending::default(),
        }
    }

    /// Those whose peers have acknowledged nothing since.
    fn stalled(self, namespaces: &[Arc<Netns>]) -> Vec<Connection> {
        if self.0.is_empty() {
            return Vec::new();
        }
        let key = |connection: &Connection| (connection.netns, connection.cookie());
        let before: HashMap<ScannedSocket, Connection> =
            self.0.into_iter().map(|one| (key(&one), one)).collect();
        let earlier: Vec<Connection> = before.values().cloned().collect();
        let (mut now, _) = connections::look_up(namespaces, &earlier);
        now.retain(|later| {
            let earlier = before.get(&key(later));
            earlier.is_some_and(|earlier| pairing::is_stalled(earlier, later))
        });
        now
    }
}

/// The other ends and the other legs of the sockets of a scan.
#[derive(Debug, Default)]
pub(super) struct Ends {
    ends: HashMap<ScannedSocket, OtherEnd>,
    legs: HashMap<ProcessId, Vec<OtherLeg>>,
    /// Why other ends may be missing.
    pub failure: Option<String>,
}

impl Ends {
    /// `namespaces`: as for [`Sending::look`].
    pub(super) fn find(
        scan: &Scan,
        sending: Sending,
        namespaces: &[Arc<Netns>],
        listening: &[ListeningPort],
        proc: &ProcFs,
    ) -> Ends {
        let sockets = || scan.targets.iter().map(|target| &target.socket);
        let reversed = |socket: &Socket| socket.tuple().reversed();
        let wanted: HashSet<Tuple> = sockets().map(reversed).collect();
        let states = pairing::states_of_ends(sockets().map(|socket| socket.state));
        let (mut found, mut error) = (Vec::new(), None);
        if states != StateSet::EMPTY {
            // Across NAT any socket that has sent its FIN can be the other end.
            let keep = |message: &SocketMessage| {
                is_after_fin(message.state) || wanted.contains(&message.id.tuple())
            };
            let subflows = match sockets().any(|socket| socket.protocol() == Protocol::Mptcp) {
                true => Subflows::Replaced,
                false => Subflows::Listed,
            };
            (found, error) = connections::list(&scan.namespaces, states, subflows, &keep);
        }
        let by_addresses = |socket: &Socket| Some(reversed(socket));
        let direct = pairing::other_ends(sockets(), &found, by_addresses);
        let mut ends = known_by(KnownBy::Addresses, direct);
        let unpaired = sockets().filter(|socket| {
            socket.state == TcpState::CloseWait && !ends.contains_key(&key(socket))
        });
        let unpaired: Vec<&Socket> = unpaired.collect();
        // Which of several sockets it is, only a complete list tells.
        if error.is_none() {
            let across_nat = across_nat(&unpaired, &found, &wanted, &scan.namespaces);
            match across_nat {
                Ok(across_nat) => ends.extend(across_nat),
                Err(cause) => error = Some(cause),
            }
        }
        let stalled = sending.stalled(namespaces);
        // The selectors may match only some of the sockets in CLOSE-WAIT that a process has.
        let in_close_wait = match stalled.is_empty() {
            true => Vec::new(),
            false => {
                let states = StateSet::from(TcpState::CloseWait);
                let (listed, listing_failure) =
                    connections::list(namespaces, states, Subflows::Listed, &|_| true);
                error = error.or(listing_failure);
                listed
            }
        };
        let of_ends = ends.values().filter_map(|(end, _)| end.inode);
        let of_legs = stalled.iter().chain(&in_close_wait);
        let of_legs = of_legs.filter_map(|connection| connection.inode);
        let inodes: Inodes = of_ends.chain(of_legs).collect();
        let owners = owners::find(proc, &inodes).unwrap_or_else(|cause| {
            error.get_or_insert(FindError::Processes(cause));
            OwnerScan::default()
        });
        let legs = match &error {
            None => legs(&stalled, &in_close_wait, listening, &owners),
            Some(_) => HashMap::new(),
        };
        let end = |(socket, (end, known_by)): (ScannedSocket, KnownEnd<'_>)| {
            (socket, other_end(end, known_by, &owners))
        };
        Ends {
            ends: ends.into_iter().map(end).collect(),
            legs,
            failure: error.map(|error| {
                let error = anyhow::Error::from(error);
                format!("the other ends of connections on this host may be missing: {error:#}")
            }),
        }
    }

    /// Adds to the counts and processes what is known of their other ends.
    pub(super) fn attach(
        mut self,
        scan: &Scan,
        total: &mut SocketCounts,
        ownerless: &mut SocketCounts,
        processes: &mut [ProcessDiagnosis],
        listeners: &mut [ListenerDiagnosis],
    ) {
        total.other_ends = self.of(super::sockets(scan));
        ownerless.other_ends = self.of(super::ownerless(scan));
        let by_process = counts::by_process(scan);
        for diagnosis in processes {
            let id = diagnosis.process.id;
            if let Some(sockets) = by_process.get(&id) {
                diagnosis.held.other_ends = self.of(sockets.held.iter().copied());
            }
            // All that it has in CLOSE-WAIT must be in its report, and none of it have come since the first scan.
            let held = &diagnosis.held;
            let close_wait: usize = held.causes.values().map(|cause| cause.close_wait).sum();
            diagnosis.other_legs = self.legs.remove(&id).filter(|legs| {
                let legs: usize = legs.iter().map(|leg| leg.count).sum();
                held.new == 0 && legs == close_wait && legs == held.stuck
            });
        }
        let by_listener = counts::by_listener(scan);
        for diagnosis in listeners {
            if let Some(sockets) = by_listener.get(&diagnosis.listener) {
                diagnosis.connections.other_ends = self.of(sockets.iter().copied());
            }
        }
    }

    fn of<'s>(&self, sockets: impl Iterator<Item = &'s Socket>) -> Vec<OtherEnd> {
        let end = |socket: &Socket| self.ends.get(&key(socket)).cloned();
        pairing::count(sockets.filter_map(end))
    }
}

/// The socket at the other end, and how it is known.
type KnownEnd<'c> = (&'c Connection, KnownBy);

fn known_by(
    how: KnownBy,
    ends: HashMap<ScannedSocket, &Connection>,
) -> HashMap<ScannedSocket, KnownEnd<'_>> {
    let ends = ends.into_iter();
    ends.map(|(socket, end)| (socket, (end, how))).collect()
}

fn is_after_fin(state: TcpState) -> bool {
    matches!(state, TcpState::FinWait1 | TcpState::FinWait2)
}

/// The other ends of `unpaired` sockets in CLOSE-WAIT, among `found`, if NAT changes an address between the two. Those with a pair in
/// `direct` are the other ends of other sockets, or could be.
fn across_nat<'c>(
    unpaired: &[&Socket],
    found: &'c [Connection],
    direct: &HashSet<Tuple>,
    namespaces: &[Arc<Netns>],
) -> Result<HashMap<ScannedSocket, KnownEnd<'c>>, FindError> {
    let is_free = |end: &&Connection| is_after_fin(end.state) && !direct.contains(&end.tuple());
    if unpaired.is_empty() || !found.iter().any(|end| is_free(&end)) {
        return Ok(HashMap::new());
    }
    let tuples: HashSet<Tuple> = unpaired.iter().map(|socket| socket.tuple()).collect();
    let translations = Translations::new(&tracked::translated(namespaces, &tuples));
    let sockets = || unpaired.iter().copied();
    let by_conntrack = |socket: &Socket| translations.of(socket.tuple());
    let by_conntrack = pairing::other_ends(sockets(), found, by_conntrack);
    let mut ends = known_by(KnownBy::Conntrack, by_conntrack);
    // Without an entry any more.
    let is_left = |socket: &&Socket| {
        socket.protocol() == Protocol::Tcp && translations.of(socket.tuple()).is_none()
    };
    let left: HashSet<ScannedSocket> = sockets().filter(is_left).map(key).collect();
    let by_last_segment = by_last_segment(&left, found, namespaces)?;
    let taken: HashSet<ScannedSocket> = ends.values().map(|(end, _)| end.key()).collect();
    let mut by_last_segment = known_by(KnownBy::LastSegment, by_last_segment);
    by_last_segment.retain(|_, (end, _)| !taken.contains(&end.key()));
    ends.extend(by_last_segment);
    Ok(ends)
}

/// The other end of each of `left` whose last segment came when that of one of `found` came, if NAT has left one address as it was.
fn by_last_segment<'c>(
    left: &HashSet<ScannedSocket>,
    found: &'c [Connection],
    namespaces: &[Arc<Netns>],
) -> Result<HashMap<ScannedSocket, &'c Connection>, FindError> {
    let none = || Ok(HashMap::new());
    let ends: Vec<&Connection> = found.iter().filter(|end| is_after_fin(end.state)).collect();
    if left.is_empty() || ends.is_empty() {
        return none();
    }
    let addresses: HashSet<SocketAddr> = ends
        .iter()
        .flat_map(|end| [end.tuple().local, end.tuple().peer])
        .collect();
    // All that could be meant, whichever the selectors match.
    let keep = |message: &SocketMessage| {
        let Tuple { local, peer } = message.id.tuple();
        addresses.contains(&local) || addresses.contains(&peer)
    };
    let states = StateSet::from(TcpState::CloseWait);
    let (close_wait, error) = connections::list(namespaces, states, Subflows::Listed, &keep);
    if let Some(error) = error {
        return Err(error);
    }
    let mut pairs = nat::with_one_address(&close_wait, &ends);
    pairs.retain(|(stuck, _)| left.contains(&close_wait[*stuck].key()));
    if pairs.is_empty() || pairs.len() > MAX_COMPARED {
        return none();
    }
    let both = pairs.iter();
    let both = both.flat_map(|(stuck, end)| [&close_wait[*stuck], ends[*end]]);
    let both: Vec<Connection> = both.cloned().collect();
    let begin = Instant::now();
    let (now, error) = connections::look_up(namespaces, &both);
    let took = begin.elapsed();
    if let Some(error) = error {
        return Err(error);
    }
    let now: HashMap<ScannedSocket, Connection> =
        now.into_iter().map(|one| (one.key(), one)).collect();
    let is_end = |(stuck, end): &(usize, usize)| {
        let stuck = now.get(&close_wait[*stuck].key());
        let end = now.get(&ends[*end].key());
        stuck
            .zip(end)
            .is_some_and(|(stuck, end)| nat::had_the_same_end(stuck, end, took))
    };
    let pairs = pairs.iter().filter(|pair| is_end(pair));
    Ok(pairs
        .map(|(stuck, end)| (close_wait[*stuck].key(), ends[*end]))
        .collect())
}

fn other_end(end: &Connection, known_by: KnownBy, owners: &OwnerScan) -> OtherEnd {
    let owner = end.inode.map(|inode| owners.of(inode).next());
    OtherEnd {
        owner: match owner {
            Some(Some(owner)) => EndOwner::Process {
                pid: owner.process.id.pid,
                comm: owner.process.comm.clone(),
                fd: Some(owner.fd.0),
            },
            Some(None) => EndOwner::Unknown,
            None => EndOwner::Orphan,
        },
        state: end.state,
        known_by,
        count: 1,
    }
}

/// The other legs of each process that has connections in `stalled`.
fn legs(
    stalled: &[Connection],
    in_close_wait: &[Connection],
    listening: &[ListeningPort],
    owners: &OwnerScan,
) -> HashMap<ProcessId, Vec<OtherLeg>> {
    let ports: HashSet<(usize, u16)> = listening.iter().map(|l| (l.netns, l.port)).collect();
    let by_process = |connections: &[Connection]| {
        let mut legs: HashMap<ProcessId, Vec<Leg>> = HashMap::new();
        for connection in connections {
            let tuple = connection.tuple();
            let leg = Leg {
                peer: tuple.peer,
                is_accepted: ports.contains(&(connection.netns, tuple.local.port())),
                send_q: connection.send_q,
            };
            let of = connection.inode.into_iter();
            let of = of.flat_map(|inode| owners.of(inode));
            let processes: HashSet<ProcessId> = of.map(|owner| owner.process.id).collect();
            for process in processes {
                legs.entry(process).or_default().push(leg);
            }
        }
        legs
    };
    let stuck = by_process(in_close_wait);
    let other = |(id, stalled): (ProcessId, Vec<Leg>)| {
        Some((id, pairing::other_legs(stuck.get(&id)?, &stalled)?))
    };
    by_process(stalled).into_iter().filter_map(other).collect()
}
