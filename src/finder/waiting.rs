//! How the owners of the found sockets wait for them: which would spin if their socket were closed.
//!
//! A closed socket reports EPOLLHUP, and no mask keeps it out. A process that waits for the socket but not for input, as event loops
//! do for back pressure, sleeps on a socket in CLOSE-WAIT, and wakes without end when it is closed. cwkill reads the epoll sets of
//! the owners, and the lists of their threads that sleep in poll(2). Other ways of waiting are not visible.
//!
//! The lists are in the memory of the owner. cwkill does not read them while a thread of the owner is in uninterruptible sleep (D):
//! then the read could hang as well.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;

use rayon::prelude::*;

use crate::model::{Owner, Scan, Socket, Target, Waiter, Waiting};
use crate::proc::epoll::{EpollSet, Watched};
use crate::proc::syscall::{Syscall, read_memory};
use crate::proc::{ProcFs, Process, ProcessId, RemoteFd};

/// cwkill reads the system calls of at most this many threads of a process.
const MAX_THREADS: usize = 512;

/// How a process waits for a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Wait {
    watched: Watched,
    pid: i32,
    by: Waiter,
}

/// What was seen of all owners.
#[derive(Debug, Default)]
struct Waits {
    /// Members of epoll sets, by inode.
    by_inode: HashMap<u32, Wait>,
    /// Files for which a process waits, by its descriptor.
    by_fd: HashMap<(ProcessId, RemoteFd), Wait>,
}

/// Finds out how the owners of each target wait for it, and writes it to [`Target::waiting`].
pub fn find(scan: &mut Scan, proc: &ProcFs) {
    let mut waits = Waits::default();
    if !scan.epolls.is_empty() {
        let targets = scan.targets.iter();
        let inodes: HashSet<u32> = targets.filter_map(|target| target.socket.inode).collect();
        let sets: Vec<(&Process, EpollSet)> = scan
            .epolls
            .par_iter()
            .filter_map(|(process, fd)| Some((&**process, epoll_set(proc, process, *fd)?)))
            .collect();
        for (process, set) in sets {
            waits.add_set(process, set, &inodes);
        }
    }
    // The system calls take pids of cwkill's own namespace.
    if proc.shows_own_pid_namespace() {
        let owners = scan.targets.iter().flat_map(|target| &target.owners);
        let processes: BTreeMap<ProcessId, &Process> = owners
            .map(|owner| (owner.process.id, &*owner.process))
            .collect();
        let lists: Vec<(ProcessId, Vec<Poll>)> = processes
            .into_par_iter()
            .map(|(id, process)| (id, polls(proc, process)))
            .collect();
        for (id, polls) in lists {
            for poll in polls {
                waits.add_poll(id, poll);
            }
        }
    }
    if waits.by_inode.is_empty() && waits.by_fd.is_empty() {
        return;
    }
    for target in &mut scan.targets {
        target.waiting = waits.of(target);
    }
}

/// The epoll set of descriptor `fd`; `None` if it is gone or cannot be read.
fn epoll_set(proc: &ProcFs, process: &Process, fd: RemoteFd) -> Option<EpollSet> {
    let path = proc.path(&format!("{}/fdinfo/{}", process.id.pid, fd.0));
    let fdinfo = fs::read_to_string(path).ok()?;
    Some(EpollSet::parse(fd.0, &fdinfo))
}

/// A descriptor in the list of a thread that sleeps in poll(2).
struct Poll {
    fd: RemoteFd,
    watched: Watched,
    tid: i32,
}

/// The lists of the threads of `process` that sleep in poll(2); empty if one of them cannot be read.
fn polls(proc: &ProcFs, process: &Process) -> Vec<Poll> {
    let pid = process.id.pid;
    let mut calls = Vec::new();
    let Ok(tids) = proc.tids(pid) else {
        return Vec::new();
    };
    for tid in tids.into_iter().take(MAX_THREADS) {
        let file = |name: &str| fs::read(proc.path(&format!("{pid}/task/{tid}/{name}")));
        let Ok(call) = file("syscall") else { continue };
        let call = Syscall::parse(&String::from_utf8_lossy(&call));
        if let Some(call) = call.filter(Syscall::may_be_poll) {
            calls.push((tid, call));
        }
    }
    if calls.is_empty() || !proc.uninterruptible(process).is_empty() || !proc.is_alive(process.id) {
        return Vec::new();
    }
    let table_size = proc.table_size(pid);
    let memory = |address, length| read_memory(pid, address, length);
    let list = |(tid, call): (i32, Syscall)| {
        let list = call.pollfds(&memory, table_size).unwrap_or_default();
        list.into_iter().map(move |entry| Poll {
            fd: RemoteFd(entry.fd),
            watched: Watched::by_poll(entry.events),
            tid,
        })
    };
    calls.into_iter().flat_map(list).collect()
}

impl Waits {
    /// Adds the members of `set` that are among `inodes`.
    fn add_set(&mut self, process: &Process, set: EpollSet, inodes: &HashSet<u32>) {
        let wait = |watched| Wait {
            watched,
            pid: process.id.pid,
            by: Waiter::Epoll(RemoteFd(set.fd)),
        };
        for (inode, watched) in set.by_inode {
            if let Some(inode) = u32::try_from(inode).ok().filter(|it| inodes.contains(it)) {
                keep_worst(&mut self.by_inode, inode, wait(watched));
            }
        }
        for (fd, watched) in set.by_fd {
            keep_worst(&mut self.by_fd, (process.id, RemoteFd(fd)), wait(watched));
        }
    }

    fn add_poll(&mut self, id: ProcessId, poll: Poll) {
        let wait = Wait {
            watched: poll.watched,
            pid: id.pid,
            by: Waiter::Poll(poll.tid),
        };
        keep_worst(&mut self.by_fd, (id, poll.fd), wait);
    }

    /// How the owners of `target` wait for it. The worst of them counts.
    fn of(&self, target: &Target) -> Waiting {
        // A number in the table of a single thread is not one of its process.
        let by_fd = |owner: &Owner| match owner.tid {
            None => self.by_fd.get(&(owner.process.id, owner.fd)),
            Some(_) => None,
        };
        let by_inode = target.socket.inode.and_then(|it| self.by_inode.get(&it));
        let waits = by_inode
            .into_iter()
            .chain(target.owners.iter().filter_map(by_fd));
        match waits.max_by_key(|wait| wait.watched) {
            None => Waiting::Unknown,
            Some(wait) if would_spin(wait.watched, &target.socket) => Waiting::Paused {
                pid: wait.pid,
                by: wait.by,
            },
            Some(_) => Waiting::Told,
        }
    }
}

/// Whether a process that waits for `socket` like this spins when it is closed. If it waits for space to send, and there is space,
/// then it is awake already, if it waits at all.
fn would_spin(watched: Watched, socket: &Socket) -> bool {
    match watched {
        Watched::Harmlessly => false,
        Watched::ForOutput => socket.send_q > 0,
        Watched::ForNothing => true,
    }
}

fn keep_worst<K: std::hash::Hash + Eq>(waits: &mut HashMap<K, Wait>, key: K, wait: Wait) {
    let known = waits.entry(key).or_insert(wait);
    if wait.watched > known.watched {
        *known = wait;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proc::testdata::process;
    use crate::sock_diag::testdata::stuck;

    fn target(owners: &[(i32, i32)], send_q: u32) -> Target {
        let mut message = stuck("10.0.0.1:80", "10.0.0.2:5", 1);
        (message.inode, message.send_q) = (42, send_q);
        let mut target = Target::new(Socket::from_message(&message));
        let owner = |(pid, fd): &(i32, i32)| Owner::new(process(*pid, "app"), RemoteFd(*fd));
        target.owners = owners.iter().map(owner).collect();
        target
    }

    fn epoll(pid: i32, line: &str) -> Waits {
        let mut waits = Waits::default();
        let set = EpollSet::parse(5, line);
        waits.add_set(&process(pid, "app"), set, &HashSet::from([42]));
        waits
    }

    fn poll(waits: &mut Waits, pid: i32, fd: i32, events: u16) {
        let poll = Poll {
            fd: RemoteFd(fd),
            watched: Watched::by_poll(events),
            tid: 9,
        };
        waits.add_poll(process(pid, "app").id, poll);
    }

    #[test]
    fn the_worst_owner_counts() {
        let shared = target(&[(7, 3), (8, 3)], 0);
        let mut waits = epoll(7, "tfd: 3 events: 19 data: 0 pos:0 ino:2a sdev:9");
        assert_eq!(waits.of(&shared), Waiting::Told);
        poll(&mut waits, 8, 3, 0);
        let by = Waiter::Poll(9);
        assert_eq!(waits.of(&shared), Waiting::Paused { pid: 8, by });
        let by = Waiter::Epoll(RemoteFd(5));
        // The process has the set, and another descriptor of the socket than the one that was added.
        let waits = epoll(7, "tfd: 9 events: 18 data: 0 pos:0 ino:2a sdev:9");
        assert_eq!(waits.of(&shared), Waiting::Paused { pid: 7, by });
    }

    #[test]
    fn another_process_with_the_same_number_does_not_count() {
        let mut waits = Waits::default();
        poll(&mut waits, 7, 3, 0);
        assert_eq!(waits.of(&target(&[(8, 3)], 0)), Waiting::Unknown);
        assert_eq!(waits.of(&target(&[(7, 4)], 0)), Waiting::Unknown);
        // Before Linux 5.2 the kernel shows no inodes.
        let waits = epoll(7, "tfd: 3 events: 18 data: 0");
        assert_eq!(waits.of(&target(&[(8, 3)], 0)), Waiting::Unknown);
        assert_ne!(waits.of(&target(&[(7, 3)], 0)), Waiting::Unknown);
    }

    #[test]
    fn waiting_for_space_to_send_is_harmless_while_there_is_space() {
        let waits = epoll(7, "tfd: 3 events: 1c data: 0 pos:0 ino:2a sdev:9");
        assert_eq!(waits.of(&target(&[(7, 3)], 0)), Waiting::Told);
        let full = waits.of(&target(&[(7, 3)], 1));
        assert!(matches!(full, Waiting::Paused { .. }), "{full:?}");
    }
}
