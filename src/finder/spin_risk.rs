//! Which owners of the found sockets would spin if their socket were closed: those that wait for it without asking for input.
//!
//! A closed socket reports EPOLLHUP, and no mask keeps it out. A process that waits for the socket but not for input, as event loops
//! do for back pressure, sleeps on a socket in CLOSE-WAIT, and wakes without end when it is closed. cwkill reads the epoll sets of
//! the owners, and the lists of their threads that sleep in poll(2). Other ways of waiting are not visible.
//!
//! The lists are in the memory of the owner, and a thread that waits for a page can hold the lock of an epoll set. cwkill reads
//! neither while a thread of the owner is in uninterruptible sleep (D): then the read could hang as well. A socket counts as harmless
//! only if the waits of all its owners could be read.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::hash::Hash;
use std::io;

use rayon::prelude::*;

use crate::model::{Owner, Poller, Scan, Socket, SpinRisk, Target};
use crate::proc::epoll::{EpollSet, Interest, keep_worst};
use crate::proc::status::MAX_THREADS;
use crate::proc::syscall::{Syscall, read_memory};
use crate::proc::{Inodes, ProcFs, Process, ProcessId, RemoteFd, is_missing};

/// How a process waits for a file: it has registered it with an epoll set, or passed it to poll(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Registration {
    interest: Interest,
    pid: i32,
    by: Poller,
}

/// How all owners wait.
#[derive(Debug, Default)]
struct Registrations {
    /// Members of epoll sets, by inode.
    by_inode: HashMap<u32, Registration>,
    /// Files for which a process waits, by its descriptor.
    by_fd: HashMap<(ProcessId, RemoteFd), Registration>,
    /// Owners that may wait in a way that could not be read.
    unread: HashSet<ProcessId>,
}

/// Finds out how the owners of each target wait for it, and writes the result to [`Target::spin_risk`].
pub fn find(scan: &mut Scan, proc: &ProcFs) {
    let owners = scan.targets.iter().flat_map(|target| &target.owners);
    let owners = owners.map(|owner| &*owner.process);
    let with_epolls = scan.epolls.iter().map(|(process, _)| &**process);
    let processes: BTreeMap<ProcessId, &Process> = owners
        .chain(with_epolls)
        .map(|process| (process.id, process))
        .collect();
    let inodes = scan.targets.iter().filter_map(|it| it.socket.inode);
    let inodes: Inodes = inodes.collect();
    let mut epolls: BTreeMap<ProcessId, Vec<RemoteFd>> = BTreeMap::new();
    for (process, fd) in &scan.epolls {
        epolls.entry(process.id).or_default().push(*fd);
    }
    let sets = |id: &ProcessId| epolls.get(id).map_or(&[][..], |fds| fds);
    let found: Vec<(&Process, Found)> = processes
        .into_par_iter()
        .map(|(id, process)| (process, Found::of(proc, process, sets(&id))))
        .collect();
    let mut registrations = Registrations::default();
    scan.in_select.clear();
    for (process, found) in found {
        if !found.complete {
            registrations.unread.insert(process.id);
        }
        for set in found.sets {
            registrations.add_set(process, set, &inodes);
        }
        for poll in found.polls {
            registrations.add_poll(process.id, poll);
        }
        scan.in_select.extend(found.in_select);
    }
    scan.targets.par_iter_mut().for_each(|target| {
        target.spin_risk = registrations.of(target);
    });
}

/// How one owner waits.
#[derive(Default)]
struct Found {
    sets: Vec<EpollSet>,
    polls: Vec<Poll>,
    /// The threads that sleep in select(2).
    in_select: Vec<i32>,
    /// All of it could be read.
    complete: bool,
}

impl Found {
    /// How `process`, which has these `epolls`, waits.
    fn of(proc: &ProcFs, process: &Process, epolls: &[RemoteFd]) -> Self {
        let mut found = Found::default();
        let tids = proc.tids(process.id.pid).unwrap_or_default();
        let is_stuck = || !proc.uninterruptible(process).is_empty();
        // Of a process with more threads it is not known whether one of them is stuck.
        if tids.is_empty() || tids.len() > MAX_THREADS || (!epolls.is_empty() && is_stuck()) {
            return found;
        }
        let sets = epolls.iter().map(|fd| epoll_set(proc, process, *fd));
        found.sets = sets.filter_map(Result::ok).collect();
        let all_sets = found.sets.len() == epolls.len();
        // The system calls take pids of cwkill's own namespace.
        let all_polls = proc.shows_own_pid_namespace() && found.add_polls(proc, process, &tids);
        found.complete = all_sets && all_polls;
        found
    }

    /// Adds the lists of those `tids` of `process` that sleep in poll(2). Whether all of them could be read.
    fn add_polls(&mut self, proc: &ProcFs, process: &Process, tids: &[i32]) -> bool {
        let pid = process.id.pid;
        let mut complete = true;
        let mut calls = Vec::new();
        for tid in tids {
            let path = proc.path(&format!("{pid}/task/{tid}/syscall"));
            match fs::read(path) {
                Ok(call) => {
                    let call = Syscall::parse(&String::from_utf8_lossy(&call));
                    if call.is_some_and(|call| call.is_select()) {
                        self.in_select.push(*tid);
                    }
                    let call = call.filter(Syscall::may_be_poll);
                    calls.extend(call.map(|call| (*tid, call)));
                }
                Err(error) => complete &= is_missing(&error),
            }
        }
        if calls.is_empty() {
            return complete;
        }
        if !proc.uninterruptible(process).is_empty() || !proc.is_alive(process.id) {
            return false;
        }
        let table_size = proc.table_size(pid);
        let memory = |address, length| read_memory(pid, address, length);
        for (tid, call) in calls {
            let list = call.pollfds(&memory, table_size);
            complete &= list.is_some();
            let polls = list.into_iter().flatten().map(|entry| Poll {
                fd: RemoteFd(entry.fd),
                interest: Interest::by_poll(entry.events),
                tid,
            });
            self.polls.extend(polls);
        }
        complete
    }
}

/// The epoll set of descriptor `fd`, without members if it is gone.
fn epoll_set(proc: &ProcFs, process: &Process, fd: RemoteFd) -> io::Result<EpollSet> {
    let path = proc.path(&format!("{}/fdinfo/{}", process.id.pid, fd.0));
    match fs::read_to_string(path) {
        Ok(fdinfo) => Ok(EpollSet::parse(fd.0, &fdinfo)),
        Err(error) if is_missing(&error) => Ok(EpollSet::parse(fd.0, "")),
        Err(error) => Err(error),
    }
}

/// A descriptor in the list of a thread that sleeps in poll(2).
struct Poll {
    fd: RemoteFd,
    interest: Interest,
    tid: i32,
}

impl Registrations {
    /// Adds the members of `set` that are among `inodes`.
    fn add_set(&mut self, process: &Process, set: EpollSet, inodes: &Inodes) {
        let registration = |interest| Registration {
            interest,
            pid: process.id.pid,
            by: Poller::Epoll(RemoteFd(set.fd)),
        };
        for (inode, interest) in set.by_inode {
            if let Some(inode) = u32::try_from(inode).ok().filter(|it| inodes.contains(it)) {
                keep(&mut self.by_inode, inode, registration(interest));
            }
        }
        for (fd, interest) in set.by_fd {
            keep(
                &mut self.by_fd,
                (process.id, RemoteFd(fd)),
                registration(interest),
            );
        }
    }

    fn add_poll(&mut self, id: ProcessId, poll: Poll) {
        let registration = Registration {
            interest: poll.interest,
            pid: id.pid,
            by: Poller::Poll(poll.tid),
        };
        keep(&mut self.by_fd, (id, poll.fd), registration);
    }

    /// The risk of `target`. The worst of its owners counts.
    fn of(&self, target: &Target) -> SpinRisk {
        // A number in the table of a single thread is not one of its process.
        let by_fd = |owner: &Owner| match owner.tid {
            None => self.by_fd.get(&(owner.process.id, owner.fd)),
            Some(_) => None,
        };
        let by_inode = target.socket.inode.and_then(|it| self.by_inode.get(&it));
        let registrations = by_inode
            .into_iter()
            .chain(target.owners.iter().filter_map(by_fd));
        let is_unread =
            |owner: &Owner| owner.tid.is_some() || self.unread.contains(&owner.process.id);
        match registrations.max_by_key(|it| it.interest) {
            Some(it) if spins(it.interest, &target.socket) => SpinRisk::Paused {
                pid: it.pid,
                by: it.by,
            },
            _ if target.owners.iter().any(is_unread) => SpinRisk::Unreadable,
            None => SpinRisk::Unknown,
            Some(_) => SpinRisk::Harmless,
        }
    }
}

/// Whether a process that waits for `socket` like this spins when it is closed. If it waits for space to send, and there is space,
/// then it is awake already, if it waits at all.
fn spins(interest: Interest, socket: &Socket) -> bool {
    match interest {
        Interest::Harmless => false,
        Interest::Output => socket.send_q > 0,
        Interest::Nothing => true,
    }
}

/// Adds a registration, unless the one with the same key does as much harm.
fn keep<K: Hash + Eq>(kept: &mut HashMap<K, Registration>, key: K, registration: Registration) {
    keep_worst(kept, key, registration, |it| it.interest);
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

    fn epoll(pid: i32, line: &str) -> Registrations {
        let mut registrations = Registrations::default();
        let set = EpollSet::parse(5, line);
        registrations.add_set(&process(pid, "app"), set, &Inodes::from_iter([42]));
        registrations
    }

    fn poll(registrations: &mut Registrations, pid: i32, fd: i32, events: u16) {
        let poll = Poll {
            fd: RemoteFd(fd),
            interest: Interest::by_poll(events),
            tid: 9,
        };
        registrations.add_poll(process(pid, "app").id, poll);
    }

    #[test]
    fn the_worst_owner_counts() {
        let shared = target(&[(7, 3), (8, 3)], 0);
        let mut registrations = epoll(7, "tfd: 3 events: 19 data: 0 pos:0 ino:2a sdev:9");
        assert_eq!(registrations.of(&shared), SpinRisk::Harmless);
        poll(&mut registrations, 8, 3, 0);
        let by = Poller::Poll(9);
        assert_eq!(registrations.of(&shared), SpinRisk::Paused { pid: 8, by });
        let by = Poller::Epoll(RemoteFd(5));
        // The process has the set, and another descriptor of the socket than the one that was added.
        let registrations = epoll(7, "tfd: 9 events: 18 data: 0 pos:0 ino:2a sdev:9");
        assert_eq!(registrations.of(&shared), SpinRisk::Paused { pid: 7, by });
    }

    #[test]
    fn a_socket_is_harmless_only_if_all_its_owners_could_be_read() {
        let shared = target(&[(7, 3), (8, 3)], 0);
        let mut registrations = epoll(7, "tfd: 3 events: 19 data: 0 pos:0 ino:2a sdev:9");
        registrations.unread.insert(process(8, "app").id);
        assert_eq!(registrations.of(&shared), SpinRisk::Unreadable);
        assert_eq!(registrations.of(&target(&[(7, 3)], 0)), SpinRisk::Harmless);
        assert_eq!(
            registrations.of(&target(&[(8, 4)], 0)),
            SpinRisk::Unreadable
        );
        poll(&mut registrations, 7, 3, 0);
        let paused = registrations.of(&shared);
        assert!(matches!(paused, SpinRisk::Paused { .. }), "{paused:?}");
        let mut in_thread = target(&[(7, 4)], 0);
        in_thread.owners[0].tid = Some(9);
        assert_eq!(registrations.of(&in_thread), SpinRisk::Unreadable);
    }

    #[test]
    fn nothing_is_read_while_a_thread_is_in_uninterruptible_sleep() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        let one = process(7, "app");
        let zeros = "0 ".repeat(17);
        let stat = |state| {
            let start = one.id.start_time;
            format!("7 (app) {state} 1 {zeros}{start} {zeros}{zeros}{zeros}\n")
        };
        write("7/stat", &stat('S'));
        write("7/task/7/stat", &stat('S'));
        write("7/task/7/syscall", "running\n");
        write(
            "7/fdinfo/5",
            "tfd: 3 events: 19 data: 0 pos:0 ino:2a sdev:9\n",
        );
        let proc = ProcFs::at(root.path());
        assert_eq!(Found::of(&proc, &one, &[RemoteFd(5)]).sets.len(), 1);
        write("7/task/8/stat", &stat('D'));
        write("7/task/8/syscall", "running\n");
        let stuck = Found::of(&proc, &one, &[RemoteFd(5)]);
        assert!(stuck.sets.is_empty() && !stuck.complete);
    }

    #[test]
    fn another_process_with_the_same_number_does_not_count() {
        let mut registrations = Registrations::default();
        poll(&mut registrations, 7, 3, 0);
        assert_eq!(registrations.of(&target(&[(8, 3)], 0)), SpinRisk::Unknown);
        assert_eq!(registrations.of(&target(&[(7, 4)], 0)), SpinRisk::Unknown);
        // Before Linux 5.2 the kernel shows no inodes.
        let registrations = epoll(7, "tfd: 3 events: 18 data: 0");
        assert_eq!(registrations.of(&target(&[(8, 3)], 0)), SpinRisk::Unknown);
        assert_ne!(registrations.of(&target(&[(7, 3)], 0)), SpinRisk::Unknown);
    }

    #[test]
    fn waiting_for_space_to_send_is_harmless_while_there_is_space() {
        let registrations = epoll(7, "tfd: 3 events: 1c data: 0 pos:0 ino:2a sdev:9");
        assert_eq!(registrations.of(&target(&[(7, 3)], 0)), SpinRisk::Harmless);
        let full = registrations.of(&target(&[(7, 3)], 1));
        assert!(matches!(full, SpinRisk::Paused { .. }), "{full:?}");
    }
}
