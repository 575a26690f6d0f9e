//! The neutral words of the golden tests for exclusions, skips, errors, reasons and outcomes.

use std::io;
use std::time::Duration;

use nix::errno::Errno;

use crate::model::{
    Exclusion, InUse, Method, MethodError, Poller, Privilege, ReclaimOutcome, ReclaimReason,
    SkipReason,
};
use crate::proc::RemoteFd;
use crate::sys::errno_of;
use crate::tcp::TcpState;

/// Why a method is not tried, by a word each.
pub const EXCLUSIONS: [&str; 10] = [
    "not-accepted",
    "mptcp-not-accepted",
    "no-owner",
    "owners-not-searched",
    "unsent",
    "needs-net-admin",
    "needs-net-raw",
    "needs-ptrace",
    "open-connection",
    "listener",
];

pub(super) fn exclusion(word: &str) -> Exclusion {
    match word {
        "not-accepted" => Exclusion::NotAccepted,
        "mptcp-not-accepted" => Exclusion::MptcpNotAccepted,
        "no-owner" => Exclusion::NoOwner,
        "owners-not-searched" => Exclusion::OwnersNotSearched,
        "unsent" => Exclusion::UnsentData(512),
        "needs-net-admin" => Exclusion::NotPermitted(Privilege::NetAdmin),
        "needs-net-raw" => Exclusion::NotPermitted(Privilege::NetRaw),
        "needs-ptrace" => Exclusion::NotPermitted(Privilege::Ptrace),
        "open-connection" => Exclusion::WrongState(TcpState::Established, "it is open"),
        "listener" => Exclusion::WrongState(TcpState::Listen, "it listens"),
        _ => panic!("exclusion {word}"),
    }
}

/// Why a socket is skipped, by a word each; `no-method` gives the reasons of its plan.
pub const SKIPS: [&str; 13] = [
    "no-method",
    "over-limit",
    "unsent",
    "no-longer-selected",
    "in-use",
    "accepted",
    "would-spin-epoll",
    "would-spin-poll",
    "owner-spins",
    "too-many-threads",
    "canary-refused",
    "peer-alive",
    "interrupted",
];

pub(super) fn skip(word: &str) -> SkipReason {
    match word {
        "no-method" => SkipReason::NoMethod,
        "over-limit" => SkipReason::OverMaxKills,
        "unsent" => SkipReason::UnsentData(77),
        "no-longer-selected" => SkipReason::NoLongerSelected,
        "in-use" => SkipReason::InUse,
        "accepted" => SkipReason::Accepted,
        "would-spin-epoll" => SkipReason::WouldSpin {
            pid: 4421,
            by: Poller::Epoll(RemoteFd(5)),
        },
        "would-spin-poll" => SkipReason::WouldSpin {
            pid: 4421,
            by: Poller::Poll(4422),
        },
        "too-many-threads" => SkipReason::TooManyThreads { pid: 7 },
        "canary-refused" => SkipReason::CanaryRefused { pid: 7 },
        "owner-spins" => SkipReason::OwnerSpins {
            pid: 4421,
            fd: Some(RemoteFd(20)),
        },
        "peer-alive" => SkipReason::PeerAlive,
        "interrupted" => SkipReason::Interrupted,
        _ => panic!("skip {word}"),
    }
}

/// Why an attempt did nothing, by a word each.
pub const ATTEMPTS: [&str; 22] = [
    "gone",
    "descriptors-gone",
    "foreign-proc",
    "denied-net-admin",
    "denied-net-raw",
    "denied-ptrace",
    "refused-ptrace",
    "not-supported",
    "orphan",
    "unsent",
    "no-ack",
    "no-ack-no-repair",
    "rst-ignored",
    "peer-alive",
    "peer-silent",
    "no-ack-unsupported",
    "unanswered",
    "os",
    "os-unknown-errno",
    "os-no-errno",
    "bug",
    "walk-held-up",
];

pub(super) fn method_error(word: &str) -> MethodError {
    let denied = |privilege| MethodError::NotPermitted(privilege, Errno::EPERM);
    match word {
        "gone" => MethodError::Gone,
        "descriptors-gone" => MethodError::DescriptorsGone,
        "foreign-proc" => MethodError::OtherPidNamespace,
        "denied-net-admin" => denied(Privilege::NetAdmin),
        "denied-net-raw" => denied(Privilege::NetRaw),
        "denied-ptrace" => denied(Privilege::Ptrace),
        "refused-ptrace" => MethodError::RefusedDespitePrivilege(Privilege::Ptrace, Errno::EPERM),
        "not-supported" => MethodError::NotSupported("the kernel cannot do it", Errno::EOPNOTSUPP),
        "orphan" => MethodError::OrphanOnOldKernel,
        "unsent" => MethodError::UnsentData(99),
        "no-ack" => MethodError::NoAck(None),
        "no-ack-no-repair" => MethodError::NoAck(Some(Box::new(denied(Privilege::NetAdmin)))),
        "no-ack-unsupported" => {
            let repair = MethodError::NotSupported("TCP_REPAIR", Errno::ENOPROTOOPT);
            MethodError::NoAck(Some(Box::new(repair)))
        }
        "rst-ignored" => MethodError::RstIgnored,
        "peer-alive" => MethodError::PeerAlive,
        "peer-silent" => MethodError::PeerSilent,
        "unanswered" => MethodError::AnswerLost(Errno::ENOBUFS),
        "os" => MethodError::SystemCall("pidfd_getfd", Errno::EMFILE),
        "os-unknown-errno" => MethodError::SystemCall("preparing", Errno::from_raw(4095)),
        "os-no-errno" => {
            MethodError::SystemCall("reading", errno_of(&io::ErrorKind::InvalidData.into()))
        }
        "bug" => MethodError::Bug,
        "walk-held-up" => MethodError::WalkHeldUp,
        _ => panic!("attempt {word}"),
    }
}

/// Why a descriptor is not closed in its process, by a word each.
pub const KEPT: [&str; 51] = [
    "in-call",
    "in-some-call",
    "in-epoll",
    "in-ring",
    "ring-in-flight",
    "ring",
    "ring-worker",
    "finalizer",
    "transfer",
    "unread-1",
    "unread",
    "too-young",
    "no-age",
    "standard",
    "ourselves",
    "traced-by-unknown",
    "traced",
    "filter-forbids",
    "seccomp-replace",
    "no-null",
    "other-null",
    "filter-unread",
    "shared-table",
    "shared-unknown",
    "shared-closed",
    "no-kcmp",
    "leader-ended",
    "executing",
    "in-vfork",
    "frozen",
    "other-table",
    "table-unread",
    "foreign",
    "foreign-call",
    "foreign-proc",
    "limit",
    "uninterruptible",
    "time-over",
    "no-call",
    "unsteady",
    "denied",
    "interrupted",
    "hangs",
    "still-taken",
    "bug",
    "os",
    "os-no-errno",
    "hostile-ring-worker",
    "hostile-tracer",
    "thread-table",
    "kernel-tls",
];

pub(super) fn reason(word: &str) -> ReclaimReason {
    let limit = Duration::from_millis(100);
    let (tid, number) = (4431, 232);
    let in_use = match word {
        "in-call" => InUse::InSyscall { tid, number },
        "in-some-call" => InUse::MaybeInSyscall { tid, number },
        "in-epoll" => InUse::InEpoll(4),
        "in-ring" => InUse::InIoUring(5),
        "ring-in-flight" => InUse::IoUringInFlight(6),
        "ring" => InUse::IoUringOpen(7),
        "ring-worker" => InUse::IoUringWorker("iou-wrk-4421".into()),
        "hostile-ring-worker" => InUse::IoUringWorker("iou\x1b[2J".into()),
        "finalizer" => InUse::Finalizer("Finalizer".into()),
        "transfer" => InUse::Transfer { tid, number },
        "unread-1" => InUse::Unread(1),
        "unread" => InUse::Unread(1460),
        "kernel-tls" => InUse::KernelTls,
        "too-young" => InUse::TooYoung(Duration::from_micros(12_345_678)),
        "no-age" => InUse::AgeUnknown,
        "standard" => InUse::StandardDescriptor,
        _ => {
            return match word {
                "ourselves" => ReclaimReason::OwnProcess,
                "traced-by-unknown" => ReclaimReason::Traced(99, None),
                "traced" => ReclaimReason::Traced(99, Some("gdb".into())),
                "hostile-tracer" => ReclaimReason::Traced(99, Some("g\u{202e}db\n".into())),
                "filter-forbids" => ReclaimReason::SeccompForbidsClose,
                "filter-unread" => ReclaimReason::SeccompUnreadable(Errno::EACCES),
                "shared-table" => ReclaimReason::SharedTable(98),
                "shared-unknown" => ReclaimReason::KcmpNotPermitted(98, Errno::EPERM),
                "shared-closed" => ReclaimReason::KcmpFailed(98, Errno::EPERM),
                "no-kcmp" => ReclaimReason::NoKcmp,
                "leader-ended" => ReclaimReason::LeaderExited,
                "executing" => ReclaimReason::InExec(tid),
                "other-table" => ReclaimReason::SeparateTable,
                "thread-table" => ReclaimReason::ThreadTable(tid),
                "table-unread" => ReclaimReason::TableUnknown(Errno::EPERM),
                "foreign" => ReclaimReason::Is32bit,
                "foreign-call" => ReclaimReason::Makes32bitSyscalls(tid),
                "foreign-proc" => ReclaimReason::OtherPidNamespace,
                "limit" => ReclaimReason::NotStopped(tid, limit),
                "time-over" => ReclaimReason::StopLimitReached(limit),
                "no-call" => ReclaimReason::NoSyscall(limit),
                "in-vfork" => ReclaimReason::InVfork(tid),
                "frozen" => ReclaimReason::Frozen,
                "uninterruptible" => ReclaimReason::Uninterruptible(tid, limit),
                "no-null" => ReclaimReason::NoDevNull(Some(Errno::ENOENT)),
                "other-null" => ReclaimReason::NoDevNull(None),
                "seccomp-replace" => ReclaimReason::SeccompForbidsReplace,
                "unsteady" => ReclaimReason::OwnerBusy,
                "denied" => ReclaimReason::NotPermitted(Errno::EPERM),
                "interrupted" => ReclaimReason::Interrupted,
                "hangs" => ReclaimReason::CloseHangs,
                "still-taken" => ReclaimReason::StillOpen,
                "bug" => ReclaimReason::Bug,
                "os" => ReclaimReason::SystemCall("ptrace", Errno::ESRCH),
                "os-no-errno" => ReclaimReason::SystemCall(
                    "reading",
                    errno_of(&io::ErrorKind::UnexpectedEof.into()),
                ),
                _ => panic!("reason {word}"),
            };
        }
    };
    ReclaimReason::InUse(in_use)
}

/// `freed`, `gone`, `skipped WORD` or `failed WORD`.
pub(super) fn reclaim_outcome(words: &str) -> ReclaimOutcome {
    match words.split_once(' ') {
        None if words == "freed" => ReclaimOutcome::Freed,
        None if words == "replaced" => ReclaimOutcome::Replaced,
        None if words == "gone" => ReclaimOutcome::Gone,
        Some(("skipped", word)) => ReclaimOutcome::Skipped(reason(word)),
        Some(("failed", word)) => ReclaimOutcome::Failed(reason(word)),
        _ => panic!("outcome {words}"),
    }
}

/// Of a dry run: the word of a reason, or nothing.
pub(super) fn judgement(word: &str) -> ReclaimOutcome {
    match word {
        "" => ReclaimOutcome::Allowed,
        word => ReclaimOutcome::Skipped(reason(word)),
    }
}

pub(super) fn method(name: &str) -> Method {
    name.parse().expect("a method")
}

pub(super) fn state(name: &str) -> TcpState {
    match name.parse() {
        Ok(state) => state,
        Err(()) => TcpState::from_kernel(name.parse().expect("a state or its number")),
    }
}
