//! Network namespaces that only sockets lead to. A nameless one has no process and no name; a descriptor of a socket keeps it alive,
//! for example after setns(2) to another one. For the selected owners cwkill follows their sockets into other namespaces as well,
//! unless the operator named one.
//!
//! /proc does not show the namespace of a socket. SIOCGSKNS on a duplicate of a descriptor tells it. On a host with a million
//! descriptors cwkill cannot ask for each. It asks only for sockets of TCP and MPTCP that are in no table that it has read, and that
//! have a selected state or listen. Sockets in a namespace that was read, dead ones, UNIX and UDP sockets are left out.

use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use nix::sys::stat::fstat;
use rayon::prelude::*;

use super::dead::{self, may_be_tcp};
use super::descriptor_scan::DescriptorScan;
use crate::filter::containers::Match;
use crate::filter::selectors::Selectors;
use crate::proc::netns::{self, Netns};
use crate::proc::{Inodes, ProcFs, RemoteFd, read_identity};
use crate::sys::{self, Pidfds};
use crate::tcp::{StateSet, TcpState};

/// For this number of descriptors or fewer, asking for each is cheaper than a list of all sockets.
const MAX_SINGLE_QUERIES: usize = 256;

/// What a search costs at most.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// The maximum number of descriptors whose protocol is read, about 2 µs each.
    examined: usize,
    /// The maximum number of descriptors that are duplicated, about 8 µs each.
    asked: usize,
}

impl Bounds {
    /// Those of a run.
    pub const USUAL: Bounds = Bounds {
        examined: 262_144,
        asked: 65_536,
    };
}

/// The nameless namespaces that the search has found.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub namespaces: Vec<Arc<Netns>>,
    /// The number of descriptors that were not examined, because there are too many.
    pub unexamined: usize,
    /// The number of matching sockets whose namespace is unknown: SIOCGSKNS needs CAP_NET_ADMIN.
    pub unplaced: usize,
    /// Why the namespace of the first of them is unknown.
    pub unplaced_because: Option<io::Error>,
}

/// A descriptor of a socket.
#[derive(Clone, Copy, Debug)]
struct Candidate {
    pid: i32,
    fd: RemoteFd,
    inode: u32,
}

/// The search for nameless namespaces.
pub(super) struct Search<'a> {
    pub proc: &'a ProcFs,
    pub selectors: &'a Selectors,
    /// The namespaces that were read.
    pub namespaces: &'a [Arc<Netns>],
    /// The inodes of sockets that were found in them.
    pub known: &'a Inodes,
    /// Whether every namespace is in scope, and not only those of the selected owners' sockets.
    pub everywhere: bool,
    /// Whether also a namespace is in scope that a process or a name leads to.
    pub follows_owners: bool,
    pub bounds: Bounds,
}

impl Search<'_> {
    /// Asks for the sockets in `descriptors`.
    pub fn run(&self, descriptors: &DescriptorScan) -> Found {
        let mut found = Found::default();
        let mut candidates = self.candidates(descriptors);
        // If a namespace cannot be listed, more sockets are asked for.
        let mut listed = (candidates.len() > MAX_SINGLE_QUERIES)
            .then(|| dead::listed_inodes(self.namespaces).unwrap_or_default());
        if let Some(listed) = &listed {
            candidates.retain(|candidate| !listed.contains(&candidate.inode));
        }
        // fork(2) shares sockets.
        let mut seen = HashSet::with_capacity(candidates.len());
        candidates.retain(|candidate| seen.insert(candidate.inode));
        let Bounds { examined, .. } = self.bounds;
        found.unexamined = candidates.len().saturating_sub(examined);
        candidates.truncate(examined);
        let of_tcp = |candidate: &Candidate| {
            let path = format!("{}/fd/{}", candidate.pid, candidate.fd.0);
            may_be_tcp(&self.proc.path(&path)).unwrap_or(false)
        };
        let candidates: Vec<Candidate> = candidates.into_par_iter().filter(of_tcp).collect();
        let mut unplaced = self.ask(&candidates, &mut found);
        if !unplaced.is_empty() {
            // Nothing tells the namespace of these, but most of them may be in a table that was read, for example those that listen.
            let listed = listed
                .get_or_insert_with(|| dead::listed_inodes(self.namespaces).unwrap_or_default());
            unplaced.retain(|(inode, _)| !listed.contains(inode));
        }
        found.unplaced = unplaced.len();
        found.unplaced_because = unplaced.into_iter().next().map(|(_, error)| error);
        found
    }

    /// The descriptors of sockets that were not found yet, in the processes that are selected.
    fn candidates(&self, descriptors: &DescriptorScan) -> Vec<Candidate> {
        let mut candidates = Vec::new();
        for (pid, sockets) in descriptors.sockets() {
            let unknown = sockets
                .iter()
                .filter(|(inode, _)| !self.known.contains(inode));
            let of_process: Vec<Candidate> = unknown
                .map(|&(inode, fd)| Candidate { pid, fd, inode })
                .collect();
            let is_selected = || {
                let process = read_identity(self.proc, pid);
                process.is_ok_and(|process| self.selectors.of_owner(&process) != Match::No)
            };
            if !of_process.is_empty() && (!self.selectors.selects_owners() || is_selected()) {
                candidates.extend(of_process);
            }
        }
        candidates
    }

    /// Asks for the namespace of each of `candidates` that has a selected state. Returns the inodes of those for which the kernel refuses
    /// to tell it, and which may be in a nameless one.
    fn ask(&self, candidates: &[Candidate], found: &mut Found) -> Vec<(u32, io::Error)> {
        let states = self.selectors.states.union(TcpState::Listen.into());
        let mut namespaces = KnownNamespaces::new(self);
        let mut pidfds = Pidfds::new();
        let mut listed = HashSet::new();
        let mut asked = 0;
        let mut unplaced = Vec::new();
        for candidate in candidates {
            if listed.contains(&candidate.inode) {
                continue;
            }
            if asked == self.bounds.asked {
                found.unexamined += 1;
                continue;
            }
            asked += 1;
            let open = || sys::pidfd_open(candidate.pid);
            let Ok(pidfd) = pidfds.get(candidate.pid, open) else {
                continue;
            };
            match netns_of(pidfd, candidate, states) {
                Ok(Some(netns)) if namespaces.is_new(&netns) => {
                    let netns = Arc::new(netns.named_if_known());
                    let inodes = dead::listed_inodes(std::slice::from_ref(&netns));
                    listed.extend(inodes.unwrap_or_default());
                    found.namespaces.push(netns);
                }
                Ok(_) => {}
                Err(error) if self.may_be_nameless(candidate.pid) => {
                    unplaced.push((candidate.inode, error));
                }
                Err(_) => {}
            }
        }
        unplaced
    }

    /// Whether a socket of process `pid` in an unknown namespace may be in a nameless one. If the process is in a namespace that the
    /// operator has not selected, its sockets are there.
    fn may_be_nameless(&self, pid: i32) -> bool {
        let own = netns::id_of_process(self.proc, pid);
        let is_scanned = |id| self.namespaces.iter().any(|netns| netns.id() == id);
        self.everywhere || own.is_ok_and(is_scanned)
    }
}

/// The network namespace of a socket in one of `states`; `None` if the descriptor is something else by now, or has another state.
///
/// # Errors
/// EPERM: needs CAP_NET_ADMIN over the namespace. Source: net/socket.c, sock_ioctl.
fn netns_of(
    pidfd: BorrowedFd<'_>,
    candidate: &Candidate,
    states: StateSet,
) -> io::Result<Option<Netns>> {
    // Without the right to duplicate it, the owner of a socket in a table is unknown too.
    let Ok(socket) = sys::pidfd_getfd(pidfd, candidate.fd) else {
        return Ok(None);
    };
    if fstat(&socket).map(|stat| stat.st_ino) != Ok(candidate.inode.into()) {
        return Ok(None);
    }
    match dead::may_be_in(socket.as_fd(), states) {
        Ok(true) => Netns::of_socket(socket.as_fd()).map(Some),
        Ok(false) | Err(_) => Ok(None),
    }
}

/// The namespaces that are not nameless, or were found already.
struct KnownNamespaces<'a> {
    search: &'a Search<'a>,
    ids: HashSet<(u64, u64)>,
    /// Whether `ids` has the namespaces of all processes and names.
    has_all: bool,
}

impl<'a> KnownNamespaces<'a> {
    fn new(search: &'a Search<'a>) -> Self {
        KnownNamespaces {
            search,
            ids: search.namespaces.iter().map(|netns| netns.id()).collect(),
            has_all: search.everywhere || search.follows_owners,
        }
    }

    /// Whether `netns` was not found before, and no process or name leads to it if the search does not follow owners there.
    fn is_new(&mut self, netns: &Netns) -> bool {
        if self.ids.contains(&netns.id()) {
            return false;
        }
        if !self.has_all {
            self.has_all = true;
            // Without these ids every namespace would seem nameless.
            let Ok(ids) = netns::ids(self.search.proc) else {
                return false;
            };
            self.ids.extend(ids);
        }
        self.ids.insert(netns.id())
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, UdpSocket};
    use std::os::fd::AsRawFd;

    use super::*;
    use crate::finder::descriptor_scan::ProcessScan;
    use crate::proc::fds::SocketFds;
    use crate::proc::netns::NetnsScope;

    /// How many of these descriptors of the test process are left out within `bounds`.
    fn left_out(sockets: &[BorrowedFd<'_>], bounds: Bounds) -> usize {
        let proc = ProcFs::default();
        let entry = |socket: &BorrowedFd<'_>| {
            let inode = fstat(socket).unwrap().st_ino.try_into().unwrap();
            (inode, RemoteFd(socket.as_raw_fd()))
        };
        let table = SocketFds {
            sockets: sockets.iter().map(entry).collect(),
            ..SocketFds::default()
        };
        let own = i32::try_from(std::process::id()).unwrap();
        let scan = DescriptorScan {
            processes: vec![ProcessScan {
                table: Some((own, table)),
                ..ProcessScan::default()
            }],
            ..DescriptorScan::default()
        };
        let search = Search {
            proc: &proc,
            selectors: &Selectors::default(),
            namespaces: &NetnsScope::Current.open(&proc).unwrap().open,
            known: &Inodes::default(),
            everywhere: true,
            follows_owners: false,
            bounds,
        };
        let found = search.run(&scan);
        assert!(found.namespaces.is_empty(), "all are in this namespace");
        found.unexamined
    }

    #[test]
    fn what_a_bound_leaves_out_is_counted() {
        let tcp: Vec<TcpListener> = (0..5)
            .map(|_| TcpListener::bind("127.0.0.1:0").unwrap())
            .collect();
        let udp: Vec<UdpSocket> = (0..3)
            .map(|_| UdpSocket::bind("127.0.0.1:0").unwrap())
            .collect();
        let duplicate = tcp[0].try_clone().unwrap();
        // The sockets of UDP are examined, and cwkill need not ask for them. The duplicate is one socket more often.
        let mut sockets: Vec<BorrowedFd<'_>> = udp.iter().map(AsFd::as_fd).collect();
        sockets.extend(tcp.iter().map(AsFd::as_fd));
        sockets.push(duplicate.as_fd());
        for ((examined, asked), expected) in [
            ((8, 5), 0),
            ((8, 4), 1),
            ((8, 0), 5),
            // Of the six, three are of TCP.
            ((6, 5), 2),
            ((6, 2), 2 + 1),
            ((0, 5), 8),
        ] {
            let bounds = Bounds { examined, asked };
            assert_eq!(left_out(&sockets, bounds), expected, "{bounds:?}");
        }
        assert_eq!(left_out(&sockets, Bounds::USUAL), 0);
    }
}
