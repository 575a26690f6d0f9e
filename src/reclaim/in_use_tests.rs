use super::*;
use crate::proc::epoll::Interest;

#[test]
fn each_piece_of_evidence_is_enough() {
    let against = |evidence: &Evidence| evidence.against(7, 42);
    assert_eq!(against(&Evidence::default()), None);

    let in_syscall = |fds: Option<&[i32]>| Evidence {
        syscalls: vec![SyscallFds {
            tid: 3,
            number: 45,
            fds: fds.map(|fds| fds.iter().copied().collect()),
        }],
        ..Evidence::default()
    };
    let (tid, number) = (3, 45);
    assert_eq!(
        against(&in_syscall(None)),
        Some(InUse::MaybeInSyscall { tid, number })
    );
    assert_eq!(
        against(&in_syscall(Some(&[6, 7]))),
        Some(InUse::InSyscall { tid, number })
    );
    assert_eq!(against(&in_syscall(Some(&[6]))), None);

    let epoll = |inodes: &[u64], fds: &[i32]| Evidence {
        epolls: vec![EpollSet {
            fd: 4,
            by_inode: inodes
                .iter()
                .map(|inode| (*inode, Interest::Harmless))
                .collect(),
            by_fd: fds.iter().map(|fd| (*fd, Interest::Harmless)).collect(),
        }],
        ..Evidence::default()
    };
    let in_epoll = Some(InUse::InEpoll(4));
    assert_eq!(against(&epoll(&[42], &[])), in_epoll);
    assert_eq!(against(&epoll(&[], &[7])), in_epoll);
    assert_eq!(against(&epoll(&[41], &[9])), None, "other files");

    let io_uring = |sockets: &[u64], in_flight| Evidence {
        io_urings: vec![IoUring {
            fd: 5,
            sockets: sockets.iter().copied().collect(),
            in_flight,
        }],
        ..Evidence::default()
    };
    assert_eq!(against(&io_uring(&[42], false)), Some(InUse::InIoUring(5)));
    assert_eq!(
        against(&io_uring(&[], true)),
        Some(InUse::IoUringInFlight(5))
    );
    assert_eq!(
        against(&io_uring(&[41], false)),
        Some(InUse::IoUringOpen(5))
    );
    let worker = Evidence {
        io_uring_worker: Some("iou-wrk-9".into()),
        ..Evidence::default()
    };
    assert_eq!(
        against(&worker),
        Some(InUse::IoUringWorker("iou-wrk-9".into()))
    );

    let java = Evidence {
        finalizer: Some("Common-Cleaner".into()),
        ..Evidence::default()
    };
    assert_eq!(
        against(&java),
        Some(InUse::Finalizer("Common-Cleaner".into()))
    );

    let sends = Evidence {
        transfer: Some((tid, number)),
        ..Evidence::default()
    };
    assert_eq!(against(&sends), Some(InUse::Transfer { tid, number }));
}

#[test]
fn a_young_socket_is_left() {
    let hour = Duration::from_secs(3600);
    let minute = Duration::from_secs(60);
    let second = Duration::from_secs(1);
    assert_eq!(too_young(Some(hour), minute), None);
    assert_eq!(too_young(Some(minute), minute), None);
    assert_eq!(
        too_young(Some(second), minute),
        Some(InUse::TooYoung(second))
    );
    assert_eq!(too_young(None, minute), Some(InUse::AgeUnknown));
    assert_eq!(too_young(None, Duration::ZERO), None);
}

#[test]
fn io_urings_are_parsed() {
    let text = "pos:\t0\nSqMask:\t0x7\nSQEs:\t0\nCQEs:\t0\nSqThread:\t-1\n\
        UserFiles:\t3\n    0: socket:[42]\n    1: /dev/null\n    2: <none>\n\
        UserBufs:\t0\nPollList:\n  op=6, task_works=0\nCqOverflowList:\n";
    let ring = IoUring::parse(5, text);
    assert_eq!(ring.sockets, [42].into());
    assert!(ring.in_flight);
    let idle = IoUring::parse(
        5,
        "UserFiles:\t0\nUserBufs:\t0\nPollList:\nCqOverflowList:\n  user_data=1\n",
    );
    assert_eq!(
        idle,
        IoUring {
            fd: 5,
            ..IoUring::default()
        }
    );
}

#[test]
fn runtimes_are_known_by_the_names_of_their_threads() {
    for name in [
        "VM Thread",
        "Common-Cleaner",
        "Finalizer",
        "Finalizer threa",
        ".NET Finalizer",
    ] {
        assert!(runs_finalizers(name), "{name}");
    }
    assert!(works_for_io_uring("iou-wrk-4711") && works_for_io_uring("iou-sqp-4711"));
    assert!(!works_for_io_uring("worker"));
    for name in ["java", "nginx", "python3", "node", "MainThread", ""] {
        assert!(!runs_finalizers(name), "{name}");
    }
}
