//! Who holds a socket: socket inodes to processes and descriptors, from /proc.
//!
//! A socket can have many owners (fork, SCM_RIGHTS), and nothing in the kernel says how many, so
//! every process is looked at. Only `/proc/PID/fd` and, for an owner, `/proc/PID/stat` and
//! `/proc/PID/cgroup` are read: never task, maps or exe, which can hang on a sick host. Processes are read in parallel, a big
//! descriptor table in chunks.
//!
//! Races: what vanishes (ENOENT, ESRCH) is passed over, what may not be read (EACCES, EPERM) is
//! counted, anything else is an error.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::fcntl::OFlag;
use rayon::prelude::*;

use crate::finder::Held;
use crate::proc::fds::{CHUNK, holding, read_socket_link, read_table};
use crate::proc::{
    FdState, ProcFs, Process, RemoteFd, Unreadable, identity, is_denied, is_gone, open_in,
};

/// What a scan of all processes gave.
#[derive(Debug, Default)]
pub struct OwnerScan {
    /// The processes that hold a wanted socket, by pid.
    pub processes: Vec<Process>,
    /// Socket inode and who holds it, by process and descriptor.
    pub held: Vec<(u32, Held)>,
    /// Processes that could not be looked at, or not at all of their descriptors.
    pub unreadable: Vec<Unreadable>,
    /// Processes of others are not shown at all: /proc is mounted with hidepid.
    pub hidden: bool,
}

/// The sockets that each process holds, whatever sockets they are.
#[derive(Default)]
pub struct Scan {
    looks: Vec<Look>,
    hidden: bool,
}

/// One process's share of a scan.
#[derive(Default)]
struct Look {
    /// It holds these sockets, by inode.
    holds: Option<(i32, Vec<(u32, RemoteFd)>)>,
    unreadable: Option<Unreadable>,
}

/// A process with the wanted sockets that it holds.
type Owner = (Process, Vec<(u32, RemoteFd)>);

impl OwnerScan {
    /// Orders `held` for [`OwnerScan::of`].
    pub fn sort_by_inode(&mut self) {
        self.held.par_sort_by_key(|(inode, _)| *inode);
    }

    /// Who holds the socket with this inode, once sorted.
    pub fn of(&self, inode: u32) -> &[(u32, Held)] {
        let from = self.held.partition_point(|(of, _)| *of < inode);
        let held = &self.held[from..];
        &held[..held.iter().take_while(|(of, _)| *of == inode).count()]
    }

    /// The same without the inode.
    pub fn holding(&self, inode: u32) -> Vec<Held> {
        self.of(inode).iter().map(|(_, held)| *held).collect()
    }
}

impl ProcFs {
    /// Finds every process that holds a socket whose inode is in `wanted`.
    ///
    /// # Errors
    /// As [`ProcFs::scan`].
    pub fn find_owners(&self, wanted: impl Iterator<Item = u32>) -> io::Result<OwnerScan> {
        let wanted: HashSet<u32> = wanted.collect();
        if wanted.is_empty() {
            return Ok(OwnerScan::default());
        }
        let scan = self.scan(&AtomicBool::new(false))?;
        self.owners(scan, &wanted, Trust::TheScan)
    }

    /// Reads the descriptors of all processes, until it is done or `needless` is set: what it has by then
    /// is of no use.
    ///
    /// # Errors
    /// The root cannot be listed, or a process's files fail in a way that is neither its end nor a
    /// missing right.
    pub fn scan(&self, needless: &AtomicBool) -> io::Result<Scan> {
        let pids = self.pids()?;
        Ok(Scan {
            // The first process of a pid namespace lives as long as the namespace.
            hidden: pids.first() != Some(&1),
            looks: pids
                .into_par_iter()
                .map(|pid| match needless.load(Ordering::Relaxed) {
                    true => Ok(Look::default()),
                    false => self.look(pid, needless),
                })
                .collect::<io::Result<_>>()?,
        })
    }

    /// Of what `scan` saw, the processes that hold a socket whose inode is in `wanted`.
    ///
    /// # Errors
    /// As [`ProcFs::scan`].
    pub fn owners(&self, scan: Scan, wanted: &HashSet<u32>, trust: Trust) -> io::Result<OwnerScan> {
        let identify = |look: Look| -> io::Result<(Option<Owner>, Option<Unreadable>)> {
            let Some((pid, mut held)) = look.holds else {
                return Ok((None, look.unreadable));
            };
            held.retain(|(inode, _)| wanted.contains(inode));
            if held.is_empty() {
                return Ok((None, look.unreadable));
            }
            match self.identify(pid, held, wanted, trust) {
                Ok((owner, denied)) => {
                    let unreadable = denied.then(|| self.unreadable(pid)).flatten();
                    Ok((owner, look.unreadable.or(unreadable)))
                }
                Err(error) if is_gone(&error) => Ok((None, look.unreadable)),
                Err(error) if is_denied(&error) => Ok((None, self.unreadable(pid))),
                Err(error) => Err(error),
            }
        };
        let looks: Vec<_> = scan
            .looks
            .into_par_iter()
            .map(identify)
            .collect::<io::Result<_>>()?;
        let mut found = OwnerScan {
            hidden: scan.hidden,
            ..OwnerScan::default()
        };
        for (owner, unreadable) in looks {
            found.unreadable.extend(unreadable);
            if let Some((process, held)) = owner {
                let index = found.processes.len();
                found.processes.push(process);
                let held = held
                    .into_iter()
                    .map(|(inode, fd)| (inode, Held { process: index, fd }));
                found.held.extend(held);
            }
        }
        Ok(found)
    }

    fn look(&self, pid: i32, needless: &AtomicBool) -> io::Result<Look> {
        match self.look_inside(pid, needless) {
            Err(error) if is_gone(&error) => Ok(Look::default()),
            Err(error) if is_denied(&error) => Ok(Look {
                holds: None,
                unreadable: self.unreadable(pid),
            }),
            other => other,
        }
    }

    fn look_inside(&self, pid: i32, needless: &AtomicBool) -> io::Result<Look> {
        // These descriptors stay with the process they were opened for: if the number is given to
        // another, everything below answers ESRCH.
        let process = File::open(self.path(&pid.to_string()))?;
        let dir = open_in(process.as_fd(), c"fd", OFlag::O_DIRECTORY)?;
        let table = read_table(dir.as_fd(), needless)?;
        Ok(Look {
            holds: (!table.sockets.is_empty()).then_some((pid, table.sockets)),
            unreadable: table.denied.then(|| self.unreadable(pid)).flatten(),
        })
    }

    /// The process that was seen to hold `held`, and what it holds now as far as the scan is not trusted; and
    /// whether a part of that may no longer be read.
    fn identify(
        &self,
        pid: i32,
        mut held: Vec<(u32, RemoteFd)>,
        wanted: &HashSet<u32>,
        trust: Trust,
    ) -> io::Result<(Option<Owner>, bool)> {
        let process = File::open(self.path(&pid.to_string()))?;
        let dir = open_in(process.as_fd(), c"fd", OFlag::O_DIRECTORY)?;
        let still = |&(inode, fd): &(u32, RemoteFd)| {
            holding(read_socket_link(dir.as_fd(), fd.0), inode) == FdState::Open
        };
        let checked = match trust {
            // The first tells whether the number of the process has been given to another.
            Trust::TheScan => &held[..1],
            Trust::Nothing => &held[..],
        };
        let mut denied = false;
        if !checked.par_iter().with_min_len(CHUNK).all(still) {
            let table = read_table(dir.as_fd(), &AtomicBool::new(false))?;
            denied = table.denied;
            held = table.sockets;
            held.retain(|(inode, _)| wanted.contains(inode));
            if held.is_empty() {
                return Ok((None, denied));
            }
        }
        Ok((Some((identity(process.as_fd(), pid)?, held)), denied))
    }
}

/// How far a scan from before the end of the dump is trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trust {
    /// What a process held then it holds.
    TheScan,
    /// Every descriptor is looked at again: the owners decide what is acted on.
    Nothing,
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
            let proc = ProcFs::at(self.dir.path());
            proc.find_owners(wanted.iter().copied()).unwrap()
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
            .held
            .iter()
            .map(|(inode, held)| (*inode, held.process, held.fd.0))
            .collect();
        held.sort_unstable();
        assert_eq!(held, [(42, 0, 3), (42, 1, 3), (42, 1, 9)]);
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
        assert_eq!(start, Some(scan.processes[0].start_time));
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
        let scan = || here.scan(&AtomicBool::new(false)).unwrap();
        let (first, second, third) = (scan(), scan(), scan());
        let moved = proc.dir.path().join("8/fd/4");
        fs::rename(proc.dir.path().join("7/fd/6"), moved).unwrap();
        let holders = |mut owners: OwnerScan| {
            owners.sort_by_inode();
            [42, 43].map(|inode| owners.of(inode).len())
        };
        let owners = |scan, trust| here.owners(scan, &wanted, trust).unwrap();
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
        let now = here.find_owners([42, 43].into_iter()).unwrap();
        assert_eq!(holders(now), [1, 1]);
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
        let scan = ProcFs::at("/nonexistent").find_owners(std::iter::empty());
        assert!(scan.unwrap().processes.is_empty());
        assert!(
            ProcFs::at("/nonexistent")
                .find_owners([1].into_iter())
                .is_err()
        );
    }

    #[test]
    fn a_descriptor_used_again_is_not_still_held() {
        let proc = TestProc::new();
        proc.process(7, "p", &[(3, "socket:[42]"), (4, "socket:[99]")]);
        let scan = proc.find(&[42]);
        let asked = vec![vec![
            (RemoteFd(3), 42, 'a'),
            (RemoteFd(4), 42, 'b'),
            (RemoteFd(5), 42, 'c'),
        ]];
        let here = ProcFs::at(proc.dir.path());
        let wanted = [
            ('a', FdState::Open),
            ('b', FdState::Closed),
            ('c', FdState::Closed),
        ];
        assert_eq!(here.recheck_fds(&scan.processes, &asked), wanted);
        let mut later = scan.processes;
        later[0].start_time += 1;
        let closed = |(_, holding): &(char, FdState)| *holding == FdState::Closed;
        let later = here.recheck_fds(&later, &asked);
        assert!(later.iter().all(closed), "another process of that number");
    }
}
