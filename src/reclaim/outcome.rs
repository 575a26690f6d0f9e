//! The outcome for one descriptor, and the reasons why it is still open. Pure.

use std::io;
use std::time::Duration;

use humantime::format_duration;
use nix::errno::Errno;

use super::in_use::InUse;
use crate::privileges::Need;
use crate::report::escape::escape;

/// The outcome for one descriptor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReclaimOutcome {
    /// Dry run: cwkill found no reason to leave it alone.
    Allowed,
    /// cwkill closed it, and saw that its number is free.
    Freed,
    /// Its number no longer referred to the socket when cwkill came to it, or the owner had exited.
    Gone,
    /// cwkill left it alone.
    Skipped(Reason),
    /// cwkill could not close it.
    Failed(Reason),
}

impl ReclaimOutcome {
    /// Why the descriptor is still open.
    pub fn reason(&self) -> Option<&Reason> {
        match self {
            ReclaimOutcome::Skipped(reason) | ReclaimOutcome::Failed(reason) => Some(reason),
            ReclaimOutcome::Allowed | ReclaimOutcome::Freed | ReclaimOutcome::Gone => None,
        }
    }
}

/// Why a descriptor is still open.
///
/// Messages may change. [`Reason::code`] does not: programs rely on it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error, strum::IntoStaticStr)]
#[cfg_attr(test, derive(strum::VariantNames))]
#[strum(serialize_all = "kebab-case")]
pub enum Reason {
    /// There is evidence that the owner still uses it.
    #[error(transparent)]
    InUse(InUse),
    /// The owner is cwkill itself, which inherited the descriptor.
    #[error("cwkill itself was started with it open, and closes it by ending")]
    OwnProcess,
    /// Another process traces the owner: its pid, and its name if cwkill could read it.
    #[error("its process is traced by {name}", name = tracer(*.0, .1.as_deref()))]
    Traced(i32, Option<String>),
    /// A seccomp filter of the owner forbids close(2).
    #[error("a seccomp filter of its process does not let close() through")]
    SeccompForbidsClose,
    /// The owner has a seccomp filter that cwkill may not read.
    #[error(
        "its process has a seccomp filter that cannot be read: {error}: needs CAP_SYS_ADMIN, and no filter of our own",
        error = io_error(.0)
    )]
    SeccompUnreadable(Errno),
    /// The owner shares its descriptor table with this process, which cwkill would not stop.
    #[error("its process shares the table of descriptors with process {0}")]
    SharedTable(i32),
    /// kcmp(2) may not compare the owner's descriptor table with that of this process; CAP_SYS_PTRACE would help.
    #[error(
        "whether its process shares the table of descriptors with process {0} cannot be seen: {error}: needs {need}",
        error = io_error(.1), need = Need::Ptrace
    )]
    KcmpNotPermitted(i32, Errno),
    /// kcmp(2) failed for this process although cwkill has CAP_SYS_PTRACE.
    #[error(
        "whether its process shares the table of descriptors with process {0} cannot be seen: kcmp: {error}, by a \
         security module or from another user namespace",
        error = io_error(.1)
    )]
    KcmpFailed(i32, Errno),
    /// The kernel has no kcmp(2).
    #[error(
        "whether its process shares the table of descriptors with another cannot be seen: this kernel has no kcmp(2) \
         (CONFIG_KCMP)"
    )]
    NoKcmp,
    /// The first thread of the owner has exited, and others have not.
    #[error("the first thread of its process has ended, so its descriptors cannot be seen")]
    LeaderExited,
    /// This thread of the owner is inside execve(2), and a stop would wait for it.
    #[error(
        "thread {0} of its process is executing a program, which takes long, and a stop would wait for it; try \
         later, or wait with --reclaim-force"
    )]
    InExec(i32),
    /// No thread that cwkill could use shares the descriptor table of the first thread.
    #[error(
        "no thread of its process that could close it shares the table of descriptors with its first thread"
    )]
    SeparateTable,
    /// kcmp(2) does not report which descriptor table the threads have.
    #[error(
        "which table of descriptors the threads of its process have cannot be seen: kcmp: {error}",
        error = io_error(.0)
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
    #[error("{}", crate::injector::ActError::ForeignProc)]
    OtherPidNamespace,
    /// This thread of the owner did not stop within the limit.
    #[error("thread {0} did not stop within {limit} (--stop-limit); nothing was done", limit = format_duration(*.1))]
    NotStopped(i32, Duration),
    /// The owner had been stopped for this limit before cwkill came to the descriptor.
    #[error("its process had been stopped for {limit} before its turn (--stop-limit)", limit = format_duration(*.0))]
    StopLimitReached(Duration),
    /// No thread of the owner made a system call within the limit.
    #[error("no thread of its process made a system call within --stop-limit; nothing was done")]
    NoSyscall,
    /// Signals or an execve(2) of the owner interfered with every attempt.
    #[error("its process was busy with signals, or with executing a program; nothing was done")]
    OwnerBusy,
    /// cwkill may not inspect or stop the owner.
    #[error("{error}: needs {need}", error = io_error(.0), need = Need::Ptrace)]
    NotPermitted(Errno),
    /// The operator interrupted the run before cwkill came to the descriptor.
    #[error("interrupted")]
    Interrupted,
    /// close(2) in the owner has not returned, so cwkill could not restore the thread.
    #[error("close() in its process has not come back; one of its threads was let go as it was")]
    CloseHangs,
    /// close(2) returned, and the number is still in use.
    #[error("closed, and the number is still taken")]
    StillOpen,
    /// A bug in cwkill; the owner runs on.
    #[error("a bug of cwkill, list again to see the state")]
    Bug,
    /// Another system call failed: its name or purpose, and its errno.
    #[error("{0}: {error}", error = io_error(.1))]
    SystemError(&'static str, Errno),
}

impl Reason {
    /// A stable name of the reason, for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Reason::InUse(in_use) => in_use.into(),
            other => other.into(),
        }
    }

    /// The privilege that is missing.
    pub fn need(&self) -> Option<Need> {
        let missing = matches!(self, Reason::NotPermitted(_) | Reason::KcmpNotPermitted(..));
        missing.then_some(Need::Ptrace)
    }

    /// The reason why kcmp(2) could not compare the owner with process `other`. `has_ptrace`: cwkill has CAP_SYS_PTRACE.
    pub(super) fn not_compared(other: i32, errno: Errno, has_ptrace: bool) -> Self {
        match errno {
            Errno::ENOSYS => Reason::NoKcmp,
            Errno::EPERM if !has_ptrace => Reason::KcmpNotPermitted(other, errno),
            _ => Reason::KcmpFailed(other, errno),
        }
    }

    /// The outcome of a descriptor that is left for this reason: skipped if cwkill decided to leave it, failed if it
    /// could not close it.
    pub(super) fn into_outcome(self) -> ReclaimOutcome {
        match self {
            Reason::InUse(_)
            | Reason::OwnProcess
            | Reason::Traced(..)
            | Reason::SeccompForbidsClose
            | Reason::SeccompUnreadable(_)
            | Reason::SharedTable(_)
            | Reason::KcmpNotPermitted(..)
            | Reason::KcmpFailed(..)
            | Reason::NoKcmp
            | Reason::LeaderExited
            | Reason::InExec(_)
            | Reason::SeparateTable
            | Reason::TableUnknown(_)
            | Reason::Is32bit
            | Reason::Makes32bitSyscalls(_)
            | Reason::OtherPidNamespace
            | Reason::Interrupted => ReclaimOutcome::Skipped(self),
            Reason::NotStopped(..)
            | Reason::StopLimitReached(_)
            | Reason::NoSyscall
            | Reason::OwnerBusy
            | Reason::NotPermitted(_)
            | Reason::CloseHangs
            | Reason::StillOpen
            | Reason::Bug
            | Reason::SystemError(..) => ReclaimOutcome::Failed(self),
        }
    }
}

/// Why cwkill stops working on an owner, or on a part of its descriptors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum OwnerError {
    /// The owner has exited.
    Exited,
    /// The obstacle may pass: try again.
    TryAgain,
    /// The reason for every descriptor that is left.
    Reason(Reason),
}

impl OwnerError {
    /// The error of a ptrace(2) request or a listing of threads.
    pub(super) fn of_step(step: &'static str, error: &io::Error) -> Self {
        match errno(error) {
            Errno::ESRCH => OwnerError::Exited,
            errno => Reason::SystemError(step, errno).into(),
        }
    }
}

impl From<Reason> for OwnerError {
    fn from(reason: Reason) -> Self {
        OwnerError::Reason(reason)
    }
}

impl From<Errno> for OwnerError {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::ESRCH | Errno::ENOENT => OwnerError::Exited,
            Errno::EPERM | Errno::EACCES => Reason::NotPermitted(errno).into(),
            errno => Reason::SystemError("looking into the process", errno).into(),
        }
    }
}

impl From<io::Error> for OwnerError {
    fn from(error: io::Error) -> Self {
        errno(&error).into()
    }
}

/// The errno of an error; EIO if no system call failed.
pub(super) fn errno(error: &io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))
}

/// The text of an errno, as the rest of cwkill prints it.
fn io_error(errno: &Errno) -> io::Error {
    (*errno).into()
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
    use strum::VariantNames;

    #[test]
    fn a_privilege_is_named_only_if_it_would_help() {
        let reason = |errno, has_ptrace| {
            let reason = Reason::not_compared(7, errno, has_ptrace);
            (reason.need(), reason.to_string())
        };
        let (need, text) = reason(Errno::EPERM, false);
        assert_eq!(need, Some(Need::Ptrace));
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
        let codes = || Reason::VARIANTS.iter().chain(InUse::VARIANTS);
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
            Reason::VARIANTS,
            [
                "in-use",
                "own-process",
                "traced",
                "seccomp-forbids-close",
                "seccomp-unreadable",
                "shared-table",
                "kcmp-not-permitted",
                "kcmp-failed",
                "no-kcmp",
                "leader-exited",
                "in-exec",
                "separate-table",
                "table-unknown",
                "32-bit-program",
                "32-bit-syscall",
                "other-pid-namespace",
                "not-stopped",
                "stop-limit-reached",
                "no-syscall",
                "owner-busy",
                "not-permitted",
                "interrupted",
                "close-hangs",
                "still-open",
                "bug",
                "system-error",
            ]
        );
        assert_eq!(
            InUse::VARIANTS,
            [
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
                "too-young",
                "age-unknown",
            ]
        );
        let reason = Reason::InUse(InUse::InEpoll(4));
        assert_eq!(reason.code(), "in-epoll", "the evidence, not its kind");
        assert_eq!(Reason::Is32bit.code(), "32-bit-program");
    }

    #[test]
    fn an_errno_is_printed_as_an_io_error() {
        let reason = Reason::SystemError("close", Errno::EIO);
        let text = io::Error::from_raw_os_error(libc::EIO);
        assert_eq!(reason.to_string(), format!("close: {text}"));
        let reason = Reason::Traced(7, Some("a\nb".into()));
        assert_eq!(reason.to_string(), "its process is traced by a\\nb/7");
    }
}
