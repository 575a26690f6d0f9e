//! Who owns a socket: socket inodes to processes and descriptors, from /proc.
//!
//! A socket can have many owners (fork, SCM_RIGHTS), and the kernel does not say how many, so the descriptors of every process
//! are read. Only `/proc/PID/fd` and, for an owner, `/proc/PID/stat` and `/proc/PID/cgroup` are read: never task, maps or exe,
//! which can hang on a sick host. Processes are read in parallel, a big descriptor table in chunks.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::fcntl::OFlag;
use rayon::prelude::*;

use crate::model::{Outcome, Owner, Target};
use crate::proc::fds::{CHUNK, FdTable, fd_state, read_socket_link, read_table};
use crate::proc::{
    FdState, ProcFs, Process, ProcessId, RemoteFd, Unreadable, identity, is_denied, is_gone,
    open_in,
};

/// The owners of the wanted sockets.
#[derive(Debug, Default)]
pub struct OwnerScan {
    /// The processes that hold a wanted socket, by pid.
    processes: Vec<Arc<Process>>,
    /// Their descriptors, by inode; those of one inode by process.
    held: Vec<Held>,
    /// Processes whose descriptors could not be read, or not all of them.
    pub unreadable: Vec<Unreadable>,
    /// Processes of others are not shown at all: /proc is mounted with hidepid.
    pub hidden: bool,
}

/// A descriptor of the socket with this inode; 16 bytes, since a host has many.
#[derive(Clone, Copy, Debug)]
struct Held {
    inode: u32,
    /// Index in [`OwnerScan::processes`].
    process: usize,
    fd: RemoteFd,
}

/// The sockets that each process holds, wanted or not.
#[derive(Default)]
pub struct DescriptorScan {
    processes: Vec<ProcessScan>,
    hidden: bool,
}

/// The sockets of one process.
#[derive(Default)]
struct ProcessScan {
    /// Its pid, and its sockets by inode.
    sockets: Option<(i32, Vec<(u32, RemoteFd)>)>,
    unreadable: Option<Unreadable>,
}

/// A process with its descriptors of wanted sockets, by inode.
type WantedSockets = (Process, Vec<(u32, RemoteFd)>);

/// How far a scan from before the end of the dump is trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trust {
    /// Every descriptor of the scan is taken to be there still.
    TheScan,
    /// Every descriptor is read again: the owners decide which sockets are acted on.
    Nothing,
}

impl OwnerScan {
    /// The owners of the socket with this inode.
    pub fn of(&self, inode: u32) -> impl Iterator<Item = Owner> + '_ {
        let first = self.held.partition_point(|held| held.inode < inode);
        self.held[first..]
            .iter()
            .take_while(move |held| held.inode == inode)
            .map(|held| Owner::new(Arc::clone(&self.processes[held.process]), held.fd))
    }

    /// Whether the socket with this inode has a known owner.
    pub fn has(&self, inode: u32) -> bool {
        let held = self.held.binary_search_by_key(&inode, |held| held.inode);
        held.is_ok()
    }
}

/// Reads the descriptors of all processes, until it is done or `needless` is set: then the result is of no use.
///
/// # Errors
/// The root cannot be listed, or a process's files fail in a way that is neither its end nor a missing right.
pub fn scan(proc: &ProcFs, needless: &AtomicBool) -> io::Result<DescriptorScan> {
    let pids = proc.pids()?;
    Ok(DescriptorScan {
        // The first process of a pid namespace lives as long as the namespace.
        hidden: pids.first() != Some(&1),
        processes: pids
            .into_par_iter()
            .map(|pid| match needless.load(Ordering::Relaxed) {
                true => Ok(ProcessScan::default()),
                false => scan_process(proc, pid, needless),
            })
            .collect::<io::Result<_>>()?,
    })
}

/// Finds every process that holds a socket whose inode is in `wanted`.
///
/// # Errors
/// As [`scan`].
pub fn find(proc: &ProcFs, wanted: &HashSet<u32>) -> io::Result<OwnerScan> {
    if wanted.is_empty() {
        return Ok(OwnerScan::default());
    }
    let scan = scan(proc, &AtomicBool::new(false))?;
    select(proc, scan, wanted, Trust::TheScan)
}

/// Selects from `scan` the processes that hold a socket whose inode is in `wanted`.
///
/// # Errors
/// As [`scan`].
pub fn select(
    proc: &ProcFs,
    scan: DescriptorScan,
    wanted: &HashSet<u32>,
    trust: Trust,
) -> io::Result<OwnerScan> {
    let identify =
        |process: ProcessScan| -> io::Result<(Option<WantedSockets>, Option<Unreadable>)> {
            let Some((pid, mut sockets)) = process.sockets else {
                return Ok((None, process.unreadable));
            };
            sockets.retain(|(inode, _)| wanted.contains(inode));
            if sockets.is_empty() {
                return Ok((None, process.unreadable));
            }
            match identify(proc, pid, sockets, wanted, trust) {
                Ok((owner, denied)) => {
                    let unreadable = denied.then(|| proc.unreadable(pid)).flatten();
                    Ok((owner, process.unreadable.or(unreadable)))
                }
                Err(error) if is_gone(&error) => Ok((None, process.unreadable)),
                Err(error) if is_denied(&error) => Ok((None, proc.unreadable(pid))),
                Err(error) => Err(error),
            }
        };
    let identified: Vec<_> = scan
        .processes
        .into_par_iter()
        .map(identify)
        .collect::<io::Result<_>>()?;
    let mut owners = OwnerScan {
        hidden: scan.hidden,
        ..OwnerScan::default()
    };
    for (owner, unreadable) in identified {
        owners.unreadable.extend(unreadable);
        if let Some((process, sockets)) = owner {
            let process_index = owners.processes.len();
            owners.processes.push(Arc::new(process));
            owners
                .held
                .extend(sockets.into_iter().map(|(inode, fd)| Held {
                    inode,
                    process: process_index,
                    fd,
                }));
        }
    }
    owners.held.par_sort_by_key(|held| held.inode);
    Ok(owners)
}

/// Checks which descriptors of closed or closing sockets are still open, and notes it in [`Owner::after`].
pub fn recheck(proc: &ProcFs, targets: &mut [Target]) {
    let mut by_process: BTreeMap<ProcessId, Vec<(&mut Owner, u32)>> = BTreeMap::new();
    for target in targets {
        let over = target.outcome.is_some_and(Outcome::is_closed_or_closing);
        if let Some(inode) = target.socket.inode.filter(|_| over) {
            for owner in &mut target.owners {
                let owners = by_process.entry(owner.process.id).or_default();
                owners.push((owner, inode));
            }
        }
    }
    by_process.into_par_iter().for_each(|(id, mut owners)| {
        let table = FdTable::open(proc, id);
        owners
            .par_iter_mut()
            .with_min_len(CHUNK)
            .for_each(|(owner, inode)| owner.after = Some(table.state(owner.fd, *inode)));
    });
}

fn scan_process(proc: &ProcFs, pid: i32, needless: &AtomicBool) -> io::Result<ProcessScan> {
    let read = || -> io::Result<ProcessScan> {
        // These descriptors stay with the process they were opened for: if the number is given to another process,
        // everything below answers ESRCH.
        let process = File::open(proc.path(&pid.to_string()))?;
        let dir = open_in(process.as_fd(), c"fd", OFlag::O_DIRECTORY)?;
        let table = read_table(dir.as_fd(), needless)?;
        Ok(ProcessScan {
            sockets: (!table.sockets.is_empty()).then_some((pid, table.sockets)),
            unreadable: table.denied.then(|| proc.unreadable(pid)).flatten(),
        })
    };
    match read() {
        Err(error) if is_gone(&error) => Ok(ProcessScan::default()),
        Err(error) if is_denied(&error) => Ok(ProcessScan {
            sockets: None,
            unreadable: proc.unreadable(pid),
        }),
        other => other,
    }
}

/// The process that held `sockets`, with those it holds now as far as the scan is not trusted; and whether a part of its table may
/// no longer be read.
fn identify(
    proc: &ProcFs,
    pid: i32,
    mut sockets: Vec<(u32, RemoteFd)>,
    wanted: &HashSet<u32>,
    trust: Trust,
) -> io::Result<(Option<WantedSockets>, bool)> {
    let process = File::open(proc.path(&pid.to_string()))?;
    let dir = open_in(process.as_fd(), c"fd", OFlag::O_DIRECTORY)?;
    let still_open = |&(inode, fd): &(u32, RemoteFd)| {
        fd_state(read_socket_link(dir.as_fd(), fd.0), inode) == FdState::Open
    };
    let checked = match trust {
        // The first shows whether the number of the process has been given to another.
        Trust::TheScan => &sockets[..1],
        Trust::Nothing => &sockets[..],
    };
    let mut denied = false;
    if !checked.par_iter().with_min_len(CHUNK).all(still_open) {
        let table = read_table(dir.as_fd(), &AtomicBool::new(false))?;
        denied = table.denied;
        sockets = table.sockets;
        sockets.retain(|(inode, _)| wanted.contains(inode));
        if sockets.is_empty() {
            return Ok((None, denied));
        }
    }
    Ok((Some((identity(process.as_fd(), pid)?, sockets)), denied))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    /// A proc file system of our own.
    struct TestProc {
        dir: tempfile::TempDir,
    }

    impl TestProc {
        fn new() -> Self {
            TestProc {
                dir: tempfile::tempdir().unwrap(),
            }
        }

        fn process(&self, pid: i32, comm: &str, fds: &[(i32, &str)]) {
            let process = self.dir.path().join(pid.to_string());
            fs::create_dir_all(process.join("fd")).unwrap();
            let zeros = "0 ".repeat(18);
            let stat = format!("{pid} ({comm}) S 1 {zeros}{} {zeros}{zeros}\n", 4_000 + pid);
            fs::write(process.join("stat"), stat).unwrap();
            for (fd, target) in fds {
                symlink(target, process.join("fd").join(fd.to_string())).unwrap();
            }
        }

        fn find(&self, wanted: &[u32]) -> OwnerScan {
            find(&self.proc(), &wanted.iter().copied().collect()).unwrap()
        }

        fn proc(&self) -> ProcFs {
            ProcFs::at(self.dir.path())
        }
    }

    #[test]
    fn every_owner_of_a_shared_socket_is_found() {
        let proc = TestProc::new();
        proc.process(7, "parent", &[(3, "socket:[42]"), (4, "socket:[43]")]);
        proc.process(8, "child", &[(3, "socket:[42]"), (9, "socket:[42]")]);
        proc.process(
            9,
            "other",
            &[(3, "pipe:[42]"), (4, "/a/very/long/path/to/some/file")],
        );
        fs::write(proc.dir.path().join("version"), "not a process").unwrap();
        let scan = proc.find(&[42]);
        let comms: Vec<&str> = scan.processes.iter().map(|p| p.comm.as_str()).collect();
        assert_eq!(comms, ["parent", "child"]);
        let mut held: Vec<_> = scan
            .of(42)
            .map(|owner| (owner.process.id.pid, owner.fd.0))
            .collect();
        held.sort_unstable();
        assert_eq!(held, [(7, 3), (8, 3), (8, 9)]);
    }

    #[test]
    fn an_owner_has_its_cgroup() {
        let proc = TestProc::new();
        proc.process(7, "nginx", &[(3, "socket:[42]")]);
        proc.process(8, "none", &[(3, "socket:[42]")]);
        let file = proc.dir.path().join("7/cgroup");
        fs::write(file, "0::/system.slice/nginx.service\n").unwrap();
        let scan = proc.find(&[42]);
        let units: Vec<_> = scan
            .processes
            .iter()
            .map(|p| p.cgroup.unit.as_deref())
            .collect();
        assert_eq!(units, [Some("nginx.service"), None]);
    }

    #[test]
    fn start_time_and_an_odd_name_are_read() {
        let proc = TestProc::new();
        proc.process(7, "a) R (b", &[(3, "socket:[42]")]);
        let scan = proc.find(&[42]);
        assert_eq!(scan.processes[0].comm, "a) R (b");
        let start = ProcFs::at(proc.dir.path()).start_time(7);
        assert_eq!(start, Some(scan.processes[0].id.start_time));
        assert_eq!(ProcFs::at(proc.dir.path()).start_time(8), None);
    }

    #[test]
    fn a_table_larger_than_a_chunk_is_read_whole() {
        let proc = TestProc::new();
        let count = i32::try_from(CHUNK * 3 + 1).unwrap();
        let targets: Vec<String> = (0..count)
            .map(|fd| format!("socket:[{}]", fd + 100))
            .collect();
        let fds: Vec<(i32, &str)> = (0..count).zip(targets.iter().map(String::as_str)).collect();
        proc.process(7, "big", &fds);
        let wanted: Vec<u32> = (100..).take(CHUNK * 3 + 1).collect();
        assert_eq!(proc.find(&wanted).held.len(), wanted.len());
    }

    #[test]
    fn what_moves_after_the_scan_is_not_its_old_owners() {
        let proc = TestProc::new();
        proc.process(7, "old", &[(5, "socket:[42]"), (6, "socket:[43]")]);
        proc.process(8, "new", &[(3, "socket:[1]")]);
        let here = ProcFs::at(proc.dir.path());
        let wanted = HashSet::from([42, 43]);
        let scan = || scan(&here, &AtomicBool::new(false)).unwrap();
        let (first, second, third) = (scan(), scan(), scan());
        let moved = proc.dir.path().join("8/fd/4");
        fs::rename(proc.dir.path().join("7/fd/6"), moved).unwrap();
        let holders = |owners: OwnerScan| [42, 43].map(|inode| owners.of(inode).count());
        let owners = |scan, trust| select(&here, scan, &wanted, trust).unwrap();
        assert_eq!(holders(owners(first, Trust::Nothing)), [1, 0]);
        assert_eq!(
            holders(owners(second, Trust::TheScan)),
            [1, 1],
            "not looked at"
        );
        // The first descriptor is another's: the number of the process may have been given away.
        fs::rename(
            proc.dir.path().join("7/fd/5"),
            proc.dir.path().join("7/fd/9"),
        )
        .unwrap();
        assert_eq!(holders(owners(third, Trust::TheScan)), [1, 0]);
        assert_eq!(holders(find(&here, &wanted).unwrap()), [1, 1]);
    }

    #[test]
    fn a_process_that_vanishes_is_passed_over() {
        let proc = TestProc::new();
        proc.process(7, "here", &[(3, "socket:[42]")]);
        // Listed, but its files are already gone, as for a process that exits while it is read.
        fs::create_dir(proc.dir.path().join("8")).unwrap();
        let scan = proc.find(&[42]);
        assert_eq!(scan.processes.len(), 1);
        assert!(scan.unreadable.is_empty());
    }

    #[test]
    fn nothing_wanted_reads_nothing() {
        let nowhere = ProcFs::at("/nonexistent");
        assert!(
            find(&nowhere, &HashSet::new())
                .unwrap()
                .processes
                .is_empty()
        );
        assert!(find(&nowhere, &HashSet::from([1])).is_err());
    }

    #[test]
    fn a_descriptor_used_again_is_not_still_open() {
        let proc = TestProc::new();
        proc.process(7, "p", &[(3, "socket:[42]"), (4, "socket:[99]")]);
        let process = &proc.find(&[42]).processes[0];
        let states = |id| {
            let table = FdTable::open(&proc.proc(), id);
            [3, 4, 5].map(|fd| table.state(RemoteFd(fd), 42))
        };
        use FdState::{Closed, Open};
        assert_eq!(states(process.id), [Open, Closed, Closed]);
        let later = ProcessId {
            start_time: process.id.start_time + 1,
            ..process.id
        };
        assert_eq!(states(later), [Closed; 3], "another process of that number");
    }
}
