//! The outcome of reclaiming one descriptor, and the reasons why it is still open.

use std::time::Duration;

use humantime::format_duration;
use nix::errno::Errno;

use crate::model::{MethodError, Privilege};
use crate::sys::os_error;
use crate::text::{counted, escape};

/// The outcome for one descriptor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReclaimOutcome {
    /// Dry run: cwkill found no reason to leave it alone.
    Allowed,
    /// cwkill closed it, and saw that its number is free.
    Freed,
    /// A standard descriptor: cwkill closed it and put /dev/null in its place.
    Replaced,
    /// Its number no longer referred to the socket when cwkill came to it, or the owner had exited.
    Gone,
    /// cwkill left it alone.
    Skipped(ReclaimReason),
    /// cwkill could not close it.
    Failed(ReclaimReason),
}

impl ReclaimOutcome {
    /// The word for it in JSON and in the log.
    pub fn name(&self) -> &'static str {
        match self {
            ReclaimOutcome::Allowed => "allowed",
            ReclaimOutcome::Freed => "freed",
            ReclaimOutcome::Replaced => "replaced",
            ReclaimOutcome::Gone => "gone",
            ReclaimOutcome::Skipped(_) => "skipped",
            ReclaimOutcome::Failed(_) => "failed",
        }
    }

    /// Why the descriptor is still open.
    pub fn reason(&self) -> Option<&ReclaimReason> {
        match self {
            ReclaimOutcome::Skipped(reason) | ReclaimOutcome::Failed(reason) => Some(reason),
            ReclaimOutcome::Allowed
            | ReclaimOutcome::Freed
            | ReclaimOutcome::Replaced
            | ReclaimOutcome::Gone => None,
        }
    }
}

/// Why a descriptor is still open.
///
/// Messages may change. [`ReclaimReason::code`] does not: programs rely on it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, strum::IntoStaticStr)]
#[cfg_attr(test, derive(strum::VariantNames))]
#[strum(serialize_all = "kebab-case")]
pub enum ReclaimReason {
    /// There is evidence that the owner still uses it.
    #[error(transparent)]
    InUse(InUse),
    /// The owner is cwkill itself, which inherited the descriptor.
    #[error("cwkill itself inherited it, and closes it when it ends")]
    OwnProcess,
    /// Another process traces the owner: its pid, and its name if cwkill could read it.
    #[error("its process is traced by {name}", name = tracer(*.0, .1.as_deref()))]
    Traced(i32, Option<String>),
    /// A seccomp filter of the owner forbids close(2).
    #[error("a seccomp filter of its process forbids close()")]
    SeccompForbidsClose,
    /// A seccomp filter of the owner forbids a call that puts /dev/null in the place of a standard descriptor.
    #[error(
        "a seccomp filter of its process forbids the system calls that put /dev/null in its place"
    )]
    SeccompForbidsReplace,
    /// A standard descriptor of an owner that cannot open /dev/null. `None`: another file has that name there.
    #[error("its process has no /dev/null to put in its place: {error}", error = null_error(.0.as_ref()))]
    NoDevNull(Option<Errno>),
    /// The owner has a seccomp filter that cwkill is not permitted to read.
    #[error(
        "its process has a seccomp filter that cannot be read: {error}: needs CAP_SYS_ADMIN, and no filter of our own",
        error = os_error(.0)
    )]
    SeccompUnreadable(Errno),
    /// The owner shares its descriptor table with this process, which cwkill would not stop.
    #[error("its process shares its descriptor table with process {0}")]
    SharedTable(i32),
    /// cwkill is not permitted to compare the owner's descriptor table with that of this process (kcmp(2)); CAP_SYS_PTRACE would
    /// help.
    #[error(
        "cannot see whether its process shares its descriptor table with process {0}: {error}: needs {need}",
        error = os_error(.1), need = Privilege::Ptrace
    )]
    KcmpNotPermitted(i32, Errno),
    /// kcmp(2) failed for this process although cwkill has CAP_SYS_PTRACE.
    #[error(
        "cannot see whether its process shares its descriptor table with process {0}: kcmp: {error}; the reason may be \
         a security module or another user namespace",
        error = os_error(.1)
    )]
    KcmpFailed(i32, Errno),
    /// The kernel has no kcmp(2).
    #[error(
        "cannot see whether its process shares its descriptor table with another: this kernel has no kcmp(2) \
         (CONFIG_KCMP)"
    )]
    NoKcmp,
    /// The first thread of the owner has exited, and others have not.
    #[error("the first thread of its process has ended, which hides its descriptors")]
    LeaderExited,
    /// This thread of the owner is inside execve(2), and a stop would wait for it.
    #[error(
        "thread {0} of its process is in execve(), and a stop would wait for it; try later, or wait with --reclaim-force"
    )]
    InExec(i32),
    /// This thread of the owner waits for the child of its vfork(2), and nothing stops it.
    #[error(
        "thread {0} of its process waits in vfork() until its child executes a program or ends, and nothing stops it; try later"
    )]
    InVfork(i32),
    /// The cgroup of the owner is frozen.
    #[error("its process is frozen by its cgroup; thaw it first (cgroup.freeze, freezer.state)")]
    Frozen,
    /// No thread that cwkill could use shares the descriptor table of the first thread.
    #[error("no usable thread of its process shares the descriptor table of its first thread")]
    SeparateTable,
    /// Only the table of this thread of the owner has the descriptor.
    #[error("only the descriptor table of thread {0} of its process has it")]
    ThreadTable(i32),
    /// kcmp(2) does not report which descriptor table the threads have.
    #[error(
        "cannot see which descriptor table the threads of its process use: kcmp: {error}",
        error = os_error(.0)
    )]
    TableUnknown(Errno),
    /// The owner is a 32-bit program.
    #[error("its process is a 32-bit program")]
    #[strum(serialize = "32-bit-program")]
    Is32bit,
    /// This thread of the owner was stopped in a 32-bit system call, whose descriptors cwkill cannot identify.
    #[error("thread {0} of its process makes 32-bit system calls")]
    #[strum(serialize = "32-bit-syscall")]
    Makes32bitSyscalls(i32),
    /// /proc shows another pid namespace than the one cwkill runs in.
    #[error("{}", MethodError::OtherPidNamespace)]
    OtherPidNamespace,
    /// This thread of the owner was running, and did not stop within the limit.
    #[error(
        "thread {0} was running and did not stop within {limit} (--stop-limit); nothing was done",
        limit = format_duration(*.1)
    )]
    NotStopped(i32, Duration),
    /// This thread of the owner slept where nothing interrupts it, longer than the limit.
    #[error(
        "thread {0} waits in the kernel where nothing interrupts it (state D, for example for a disk), and did not stop within \
         {limit} (--stop-limit); nothing was done",
        limit = format_duration(*.1)
    )]
    Uninterruptible(i32, Duration),
    /// The owner had been stopped for this limit before cwkill came to the descriptor.
    #[error("its process had been stopped for {limit} before its turn (--stop-limit)", limit = format_duration(*.0))]
    StopLimitReached(Duration),
    /// No thread of the owner made a system call within the limit.
    #[error(
        "no thread of its process made a system call within {limit} (--stop-limit), as if all of them compute; nothing was done",
        limit = format_duration(*.0)
    )]
    NoSyscall(Duration),
    /// Signals or an execve(2) of the owner interfered with every attempt.
    #[error("its process was busy with signals, or with executing a program; nothing was done")]
    OwnerBusy,
    /// cwkill is not permitted to inspect or stop the owner.
    #[error("{error}: needs {need}", error = os_error(.0), need = Privilege::Ptrace)]
    NotPermitted(Errno),
    /// cwkill has CAP_SYS_PTRACE, and may not inspect or stop the owner all the same.
    #[error("{error}: {refused}", error = os_error(.0), refused = Privilege::Ptrace.refused())]
    RefusedDespitePrivilege(Errno),
    /// The operator interrupted the run before cwkill came to the descriptor.
    #[error("interrupted")]
    Interrupted,
    /// A system call that cwkill made in the owner has not returned, so cwkill could not restore the thread.
    #[error(
        "a system call that cwkill made in its process has not returned; the thread that made it was released as it was"
    )]
    CloseHangs,
    /// close(2) returned, and the number is still in use.
    #[error("closed, and the number is still in use")]
    StillOpen,
    /// A bug in cwkill; the owner runs on.
    #[error("a bug in cwkill, list again to see the state")]
    Bug,
    /// Another system call failed: its name or purpose, and its errno.
    #[error("{0}: {error}", error = os_error(.1))]
    SystemCall(&'static str, Errno),
}

impl ReclaimReason {
    /// A stable name of the reason, for programs.
    pub fn code(&self) -> &'static str {
        match self {
            ReclaimReason::InUse(in_use) => in_use.into(),
            other => other.into(),
        }
    }

    /// The privilege that is missing, or that the kernel did not accept.
    pub fn privilege(&self) -> Option<Privilege> {
        let missing = matches!(
            self,
            ReclaimReason::NotPermitted(_)
                | ReclaimReason::RefusedDespitePrivilege(_)
                | ReclaimReason::KcmpNotPermitted(..)
        );
        missing.then_some(Privilege::Ptrace)
    }

    /// The reason why kcmp(2) could not compare the owner with process `other`. `has_ptrace`: cwkill has CAP_SYS_PTRACE.
    pub(crate) fn not_compared(other: i32, errno: Errno, has_ptrace: bool) -> Self {
        match errno {
            Errno::ENOSYS => ReclaimReason::NoKcmp,
            Errno::EPERM if !has_ptrace => ReclaimReason::KcmpNotPermitted(other, errno),
            _ => ReclaimReason::KcmpFailed(other, errno),
        }
    }

    /// The outcome of a descriptor that is left for this reason: skipped if cwkill decided to leave it, failed if it
    /// could not close it.
    pub(crate) fn into_outcome(self) -> ReclaimOutcome {
        match self {
            ReclaimReason::InUse(_)
            | ReclaimReason::OwnProcess
            | ReclaimReason::Traced(..)
            | ReclaimReason::SeccompForbidsClose
            | ReclaimReason::SeccompForbidsReplace
            | ReclaimReason::NoDevNull(_)
            | ReclaimReason::SeccompUnreadable(_)
            | ReclaimReason::SharedTable(_)
            | ReclaimReason::KcmpNotPermitted(..)
            | ReclaimReason::KcmpFailed(..)
            | ReclaimReason::NoKcmp
            | ReclaimReason::LeaderExited
            | ReclaimReason::InExec(_)
            | ReclaimReason::InVfork(_)
            | ReclaimReason::Frozen
            | ReclaimReason::SeparateTable
            | ReclaimReason::ThreadTable(_)
            | ReclaimReason::TableUnknown(_)
            | ReclaimReason::Is32bit
            | ReclaimReason::Makes32bitSyscalls(_)
            | ReclaimReason::OtherPidNamespace
            | ReclaimReason::Interrupted => ReclaimOutcome::Skipped(self),
            ReclaimReason::NotStopped(..)
            | ReclaimReason::Uninterruptible(..)
            | ReclaimReason::StopLimitReached(_)
            | ReclaimReason::NoSyscall(_)
            | ReclaimReason::OwnerBusy
            | ReclaimReason::NotPermitted(_)
            | ReclaimReason::RefusedDespitePrivilege(_)
            | ReclaimReason::CloseHangs
            | ReclaimReason::StillOpen
            | ReclaimReason::Bug
            | ReclaimReason::SystemCall(..) => ReclaimOutcome::Failed(self),
        }
    }
}

/// Evidence that a descriptor is in use. `--reclaim-force` overrides it.
///
/// [`ReclaimReason::code`] takes its codes from here.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, strum::IntoStaticStr)]
#[cfg_attr(test, derive(strum::VariantNames))]
#[strum(serialize_all = "kebab-case")]
pub enum InUse {
    /// It is standard input, output or error. After it is closed, the next file of the program gets its number, and becomes its
    /// input or takes its output.
    #[error(
        "it is standard input, output or error of its process, and the next file that is opened would take its place; \
         --reclaim-force puts /dev/null there"
    )]
    StandardDescriptor,
    /// A thread is inside a system call that uses it.
    #[error("thread {tid} is inside a system call on it (number {number})")]
    InSyscall {
        /// The thread.
        tid: i32,
        /// The number of the call.
        number: i64,
    },
    /// A thread is inside a system call that may use it: cwkill could not read the list of its descriptors.
    #[error(
        "thread {tid} is inside a system call that may be on it (number {number}): the list of its descriptors could not \
         be read"
    )]
    MaybeInSyscall {
        /// The thread.
        tid: i32,
        /// The number of the call.
        number: i64,
    },
    /// It is in the epoll set of this descriptor of the owner.
    #[error("in the epoll set of descriptor {0}")]
    InEpoll(i32),
    /// It is registered with the io_uring of this descriptor of the owner.
    #[error("registered with the io_uring of descriptor {0}")]
    InIoUring(i32),
    /// The io_uring of this descriptor has requests in flight, and the kernel does not show their descriptors.
    #[error("the io_uring of descriptor {0} has requests in flight, which may be on it")]
    IoUringInFlight(i32),
    /// The owner has an io_uring at this descriptor, and the kernel does not show all of its requests.
    #[error("the io_uring of descriptor {0} may have requests on it, which cannot be seen")]
    IoUringOpen(i32),
    /// A kernel thread with this name works for an io_uring of the owner.
    #[error(
        "its thread {} works for an io_uring, which may have requests on it",
        escape(.0)
    )]
    IoUringWorker(String),
    /// A thread with this name closes the descriptors of objects to which the program no longer refers.
    #[error(
        "its garbage collector may close the number after reuse (thread {})",
        escape(.0)
    )]
    Finalizer(String),
    /// A thread of the owner is in the middle of a transfer, and a stop would end its system call early.
    #[error(
        "thread {tid} of its process waits to send or receive more (system call number {number}), and a stop would end the call early; try later, or use --reclaim-force if its program continues with the rest"
    )]
    Transfer {
        /// The thread.
        tid: i32,
        /// The number of the call.
        number: i64,
    },
    /// It holds this many bytes that its program can still read.
    #[error("its process can still read {}, which --reclaim-force loses", bytes(*.0))]
    Unread(u32),
    /// TLS in the kernel may keep bytes that its program can still read, and that nothing counts.
    #[error(
        "TLS in the kernel may keep the rest of a record that its process can still read, which --reclaim-force loses"
    )]
    KernelTls,
    /// It has been quiet only for this long.
    #[error("quiet for only {} (--reclaim-age)", format_duration(whole_millis(*.0)))]
    TooYoung(Duration),
    /// The kernel does not report how long it has been quiet.
    #[error("the kernel does not report how long it has been quiet")]
    AgeUnknown,
}

fn null_error(errno: Option<&Errno>) -> String {
    match errno {
        Some(errno) => os_error(errno).to_string(),
        None => "another file has that name".to_owned(),
    }
}

fn bytes(count: u32) -> String {
    counted(usize::try_from(count).unwrap_or(usize::MAX), "byte")
}

fn whole_millis(age: Duration) -> Duration {
    Duration::from_millis(u64::try_from(age.as_millis()).unwrap_or(u64::MAX))
}

fn tracer(pid: i32, comm: Option<&str>) -> String {
    match comm {
        Some(comm) => format!("{}/{pid}", escape(comm)),
        None => format!("process {pid}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use std::io;
    use strum::VariantNames;

    #[test]
    fn a_privilege_is_named_only_if_it_would_help() {
        let reason = |errno, has_ptrace| {
            let reason = ReclaimReason::not_compared(7, errno, has_ptrace);
            (reason.privilege(), reason.to_string())
        };
        let (need, text) = reason(Errno::EPERM, false);
        assert_eq!(need, Some(Privilege::Ptrace));
        assert!(
            text.contains("needs the owner's uid or CAP_SYS_PTRACE"),
            "{text}"
        );
        for (errno, has_ptrace, expected) in [
            (Errno::EPERM, true, "security module"),
            (Errno::ENOSYS, false, "CONFIG_KCMP"),
            (Errno::ENOSYS, true, "CONFIG_KCMP"),
        ] {
            let (need, text) = reason(errno, has_ptrace);
            assert_eq!(need, None);
            assert!(text.contains(expected) && !text.contains("needs"), "{text}");
        }
    }

    #[test]
    fn every_reason_has_a_code_of_its_own() {
        let codes = || ReclaimReason::VARIANTS.iter().chain(InUse::VARIANTS);
        let distinct: HashSet<_> = codes().collect();
        assert_eq!(distinct.len(), codes().count());
        for code in codes() {
            let is_kebab_case = code.split('-').all(|word| {
                !word.is_empty()
                    && word
                        .bytes()
                        .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
            });
            assert!(is_kebab_case, "{code}");
        }
    }

    /// Programs compare codes, so a renamed variant must keep its code.
    #[test]
    fn codes_are_stable() {
        assert_eq!(
            ReclaimReason::VARIANTS,
            [
                "in-use",
                "own-process",
                "traced",
                "seccomp-forbids-close",
                "seccomp-forbids-replace",
                "no-dev-null",
                "seccomp-unreadable",
                "shared-table",
                "kcmp-not-permitted",
                "kcmp-failed",
                "no-kcmp",
                "leader-exited",
                "in-exec",
                "in-vfork",
                "frozen",
                "separate-table",
                "thread-table",
                "table-unknown",
                "32-bit-program",
                "32-bit-syscall",
                "other-pid-namespace",
                "not-stopped",
                "uninterruptible",
                "stop-limit-reached",
                "no-syscall",
                "owner-busy",
                "not-permitted",
                "refused-despite-privilege",
                "interrupted",
                "close-hangs",
                "still-open",
                "bug",
                "system-call",
            ]
        );
        assert_eq!(
            InUse::VARIANTS,
            [
                "standard-descriptor",
                "in-syscall",
                "maybe-in-syscall",
                "in-epoll",
                "in-io-uring",
                "io-uring-in-flight",
                "io-uring-open",
                "io-uring-worker",
                "finalizer",
                "transfer",
                "unread",
                "kernel-tls",
                "too-young",
                "age-unknown",
            ]
        );
        let reason = ReclaimReason::InUse(InUse::InEpoll(4));
        assert_eq!(reason.code(), "in-epoll", "the evidence, not its kind");
        assert_eq!(ReclaimReason::Is32bit.code(), "32-bit-program");
    }

    #[test]
    fn an_errno_is_printed_as_an_io_error() {
        let reason = ReclaimReason::SystemCall("close", Errno::EIO);
        let text = io::Error::from_raw_os_error(libc::EIO);
        assert_eq!(reason.to_string(), format!("close: {text}"));
        let reason = ReclaimReason::Traced(7, Some("a\nb".into()));
        assert_eq!(reason.to_string(), "its process is traced by a\\nb/7");
    }

    #[test]
    fn the_man_page_lists_every_code() {
        let page = include_str!("../../man/cwkill-reclaim.8");
        let reasons = ReclaimReason::VARIANTS.iter();
        // The evidence has codes of its own.
        let reasons = reasons.filter(|code| **code != "in-use");
        for code in reasons.chain(InUse::VARIANTS) {
            let line = format!("\n.B {}\n", code.replace('-', "\\-"));
            assert!(page.contains(&line), "{code}");
        }
    }
}
