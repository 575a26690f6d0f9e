use super::*;
use crate::finder::attach_owners;
use crate::model::{Listener, ListeningSocket, Scan};
use crate::proc::ProcessId;
use crate::sock_diag::Family;
use crate::sock_diag::testdata::listener;
use std::fs;
use std::os::unix::fs::symlink;

/// A directory that looks like /proc.
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

    fn find(&self, inodes: &[u32]) -> OwnerScan {
        find(&self.proc(), &inodes.iter().copied().collect()).unwrap()
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
    let comms: Vec<&str> = scan
        .tables
        .iter()
        .map(|table| &table.process)
        .map(|p| p.comm.as_str())
        .collect();
    assert_eq!(comms, ["parent", "child"]);
    let mut owners: Vec<_> = scan
        .of(42)
        .map(|owner| (owner.process.id.pid, owner.fd.0))
        .collect();
    owners.sort_unstable();
    assert_eq!(owners, [(7, 3), (8, 3), (8, 9)]);
}

fn listening(inode: u32) -> ListeningSocket {
    ListeningSocket {
        id: listener(Family::V4, "127.0.0.1:80", inode).id,
        inode,
        waiting: 0,
        backlog: 0,
        cgroup: None,
    }
}

#[test]
fn a_listener_has_the_owners_of_all_its_sockets() {
    let proc = TestProc::new();
    proc.process(7, "first", &[(3, "socket:[42]"), (4, "socket:[44]")]);
    proc.process(8, "second", &[(3, "socket:[43]")]);
    let mut scan = Scan {
        listeners: vec![Listener {
            local: "127.0.0.1:80".parse().unwrap(),
            sockets: [43, 42].map(listening).into(),
            group_size: 2,
            uid: 0,
            owners: Vec::new(),
        }],
        ..Scan::default()
    };
    attach_owners(&mut scan, &proc.find(&[42, 43, 44]));
    let owners = scan.listeners[0].owners.iter();
    let owners: Vec<_> = owners
        .map(|owner| (owner.process.id.pid, owner.fd.0))
        .collect();
    assert_eq!(owners, [(7, 3), (8, 3)]);
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
        .tables
        .iter()
        .map(|table| &table.process)
        .map(|p| p.cgroup.unit.as_deref())
        .collect();
    assert_eq!(units, [Some("nginx.service"), None]);
}

#[test]
fn start_time_and_an_odd_name_are_read() {
    let proc = TestProc::new();
    proc.process(7, "a) R (b", &[(3, "socket:[42]")]);
    let scan = proc.find(&[42]);
    assert_eq!(scan.tables[0].process.comm, "a) R (b");
    let start = ProcFs::at(proc.dir.path()).start_time(7);
    assert_eq!(start, Some(scan.tables[0].process.id.start_time));
    assert_eq!(ProcFs::at(proc.dir.path()).start_time(8), None);
}

#[test]
fn a_table_larger_than_a_chunk_is_read_whole() {
    let proc = TestProc::new();
    let count = i32::try_from(FDS_PER_TASK * 3 + 1).unwrap();
    let targets: Vec<String> = (0..count)
        .map(|fd| format!("socket:[{}]", fd + 100))
        .collect();
    let fds: Vec<(i32, &str)> = (0..count).zip(targets.iter().map(String::as_str)).collect();
    proc.process(7, "big", &fds);
    let inodes: Vec<u32> = (100..).take(FDS_PER_TASK * 3 + 1).collect();
    assert_eq!(proc.find(&inodes).descriptors.len(), inodes.len());
}

#[test]
fn a_socket_that_moves_after_the_scan_is_not_its_old_owners() {
    let proc = TestProc::new();
    proc.process(7, "old", &[(5, "socket:[42]"), (6, "socket:[43]")]);
    proc.process(8, "new", &[(3, "socket:[1]")]);
    let root = ProcFs::at(proc.dir.path());
    let inodes = Inodes::from_iter([42, 43]);
    let scan = || scan(&root, StateSet::ALL, &AtomicBool::new(false)).unwrap();
    let (first, second, third) = (scan(), scan(), scan());
    let moved = proc.dir.path().join("8/fd/4");
    fs::rename(proc.dir.path().join("7/fd/6"), moved).unwrap();
    let counts = |owners: OwnerScan| [42, 43].map(|inode| owners.of(inode).count());
    let owners = |scan, trust| select(&root, scan, &inodes, trust).unwrap();
    assert_eq!(counts(owners(first, Trust::Nothing)), [1, 0]);
    assert_eq!(
        counts(owners(second, Trust::TheScan)),
        [1, 1],
        "not read again"
    );
    // The first descriptor has changed, so another process may have the pid: all descriptors are read again.
    fs::rename(
        proc.dir.path().join("7/fd/5"),
        proc.dir.path().join("7/fd/9"),
    )
    .unwrap();
    assert_eq!(counts(owners(third, Trust::TheScan)), [1, 0]);
    assert_eq!(counts(find(&root, &inodes).unwrap()), [1, 1]);
}

#[test]
fn a_process_that_vanishes_is_ignored() {
    let proc = TestProc::new();
    proc.process(7, "here", &[(3, "socket:[42]")]);
    // It is listed, but its files are gone, as if it had exited while it was read.
    fs::create_dir(proc.dir.path().join("8")).unwrap();
    let scan = proc.find(&[42]);
    assert_eq!(scan.tables.len(), 1);
    assert!(scan.unreadable.is_empty());
}

#[test]
fn without_inodes_nothing_is_read() {
    let nowhere = ProcFs::at("/nonexistent");
    assert!(
        find(&nowhere, &Inodes::default())
            .unwrap()
            .tables
            .is_empty()
    );
    assert!(find(&nowhere, &Inodes::from_iter([1])).is_err());
}

#[test]
fn a_descriptor_used_again_is_not_still_open() {
    let proc = TestProc::new();
    proc.process(7, "p", &[(3, "socket:[42]"), (4, "socket:[99]")]);
    let process = &proc.find(&[42]).tables[0].process;
    let states = |id| {
        let table = crate::proc::fds::FdTable::open(&proc.proc(), id, None);
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
