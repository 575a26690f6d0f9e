//! What became of a descriptor, and why.

use std::fmt;
use std::io;
use std::time::Duration;

use super::evidence::Doubt;
use crate::privileges::Privilege;

/// What became of a descriptor.
#[derive(Debug)]
pub enum Fate {
    /// It was closed, and its number was seen to be free.
    Freed,
    /// It was no longer the socket's before we came to it, or its owner was gone.
    Gone,
    /// It was left alone.
    Skipped(Reason),
    /// It was tried.
    Failed(Reason),
}

/// Why a descriptor is still there.
#[derive(Debug)]
pub enum Reason {
    /// The evidence does not allow it.
    Doubt(Doubt),
    /// The owner is this process, which was started with the descriptor open.
    Ourselves,
    /// The owner is traced by this process.
    Traced(i32, Option<String>),
    /// The owner's seccomp filter does not let close(2) through.
    FilterForbids,
    /// The owner has a seccomp filter, and it cannot be read.
    FilterUnread(io::Error),
    /// The owner shares its table of descriptors with this process, which would not be stopped.
    SharedTable(i32),
    /// Whether the owner shares its table of descriptors with this process cannot be seen.
    SharedUnknown(i32, io::Error),
    /// The same, although we have the right that is asked for.
    SharedClosed(i32, io::Error),
    /// The kernel does not tell who shares a table.
    NoKcmp,
    /// The first thread of the owner has ended, and others have not.
    LeaderEnded,
    /// This thread of the owner is executing a program: a stop would wait for it.
    Executing(i32),
    /// The owner has no thread that can be used and has its table of descriptors.
    OtherTable,
    /// The kernel does not say which table of descriptors a thread of the owner has.
    TableUnread(io::Error),
    /// The owner is a 32-bit program, or of another kind than cwkill.
    Foreign,
    /// This thread of the owner was stopped in a system call of 32-bit programs, which does not say on what it is.
    ForeignCall(i32),
    /// The /proc that names the owners is of another pid namespace than ours.
    ForeignProc,
    /// A thread of the owner did not stop, or not in time.
    Limit(i32, Duration),
    /// The time was over before its turn.
    TimeOver(Duration),
    /// No thread of the owner made a system call within the limit.
    NoCall,
    /// Signals to the owner, or its execution of a program, came between, several times.
    Unsteady,
    /// We may not look into the owner, or not stop it.
    Denied(io::Error),
    /// The operator stopped the run before its turn.
    Interrupted,
    /// close(2) in the owner has not come back; the thread could not be set back.
    Hangs,
    /// It was closed, and the number is still taken.
    StillTaken,
    /// A bug of ours; the owner was let go.
    Bug,
    /// Anything else: the step and its errno.
    Os(&'static str, io::Error),
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Reason::Doubt(doubt) => doubt.fmt(f),
            Reason::Ourselves => {
                f.write_str("cwkill itself was started with it open, and closes it by ending")
            }
            Reason::Traced(pid, None) => write!(f, "its process is traced by process {pid}"),
            Reason::Traced(pid, Some(comm)) => {
                let comm = crate::text::escape(comm);
                write!(f, "its process is traced by {comm}/{pid}")
            }
            Reason::FilterForbids => {
                f.write_str("a seccomp filter of its process does not let close() through")
            }
            Reason::FilterUnread(error) => write!(
                f,
                "its process has a seccomp filter that cannot be read: {error}: needs CAP_SYS_ADMIN, and \
                 no filter of our own"
            ),
            Reason::SharedTable(pid) => write!(
                f,
                "its process shares the table of descriptors with process {pid}"
            ),
            Reason::SharedUnknown(pid, error) => write!(
                f,
                "whether its process shares the table of descriptors with process {pid} cannot be seen: {error}: \
                 needs {}",
                Privilege::Ptrace
            ),
            Reason::SharedClosed(pid, error) => write!(
                f,
                "whether its process shares the table of descriptors with process {pid} cannot be seen: kcmp: {error}, by a \
                 security module or from another user namespace"
            ),
            Reason::NoKcmp => f.write_str(
                "whether its process shares the table of descriptors with another cannot be seen: this kernel has no kcmp(2) \
                 (CONFIG_KCMP)",
            ),
            Reason::LeaderEnded => f.write_str(
                "the first thread of its process has ended, so its descriptors cannot be seen",
            ),
            Reason::Executing(tid) => write!(
                f,
                "thread {tid} of its process is executing a program, which takes long, and a stop would wait for it; try \
                 later, or wait with --reclaim-force"
            ),
            Reason::OtherTable => f.write_str(
                "no thread of its process that could close it shares the table of descriptors with its first \
                 thread",
            ),
            Reason::TableUnread(error) => write!(
                f,
                "which table of descriptors the threads of its process have cannot be seen: kcmp: {error}"
            ),
            Reason::Foreign => f.write_str("its process is a 32-bit program"),
            Reason::ForeignCall(tid) => {
                write!(f, "thread {tid} of its process makes 32-bit system calls")
            }
            Reason::ForeignProc => crate::injector::ActError::ForeignProc.fmt(f),
            Reason::Limit(tid, limit) => write!(
                f,
                "thread {tid} did not stop within {} (--stop-limit); nothing was done",
                humantime::format_duration(*limit)
            ),
            Reason::TimeOver(limit) => write!(
                f,
                "its process had been stopped for {} before its turn (--stop-limit)",
                humantime::format_duration(*limit)
            ),
            Reason::NoCall => f.write_str(
                "no thread of its process made a system call within --stop-limit; nothing was done",
            ),
            Reason::Unsteady => f.write_str(
                "its process was busy with signals, or with executing a program; nothing was done",
            ),
            Reason::Denied(error) => write!(f, "{error}: needs {}", Privilege::Ptrace),
            Reason::Interrupted => f.write_str("interrupted"),
            Reason::Hangs => f.write_str(
                "close() in its process has not come back; one of its threads was let go as it was",
            ),
            Reason::StillTaken => f.write_str("closed, and the number is still taken"),
            Reason::Bug => f.write_str("a bug of cwkill, list again to see the state"),
            Reason::Os(step, error) => write!(f, "{step}: {error}"),
        }
    }
}

impl Reason {
    /// Why it is not known whether process `other` shares the table of the owner, by what kcmp(2) answered; `may` says whether we
    /// have CAP_SYS_PTRACE.
    pub(super) fn not_compared(other: i32, error: io::Error, may: bool) -> Self {
        match error.raw_os_error() {
            Some(libc::ENOSYS) => Reason::NoKcmp,
            Some(libc::EPERM) if !may => Reason::SharedUnknown(other, error),
            _ => Reason::SharedClosed(other, error),
        }
    }

    /// The privilege that is missing.
    pub fn need(&self) -> Option<Privilege> {
        matches!(self, Reason::Denied(_) | Reason::SharedUnknown(..)).then_some(Privilege::Ptrace)
    }

    /// The same again, for another descriptor of the same owner.
    pub(super) fn same(&self) -> Self {
        let copy = crate::injector::same_errno;
        match self {
            Reason::Doubt(doubt) => Reason::Doubt(doubt.clone()),
            Reason::Ourselves => Reason::Ourselves,
            Reason::Traced(pid, comm) => Reason::Traced(*pid, comm.clone()),
            Reason::FilterForbids => Reason::FilterForbids,
            Reason::FilterUnread(error) => Reason::FilterUnread(copy(error)),
            Reason::SharedTable(pid) => Reason::SharedTable(*pid),
            Reason::SharedUnknown(pid, error) => Reason::SharedUnknown(*pid, copy(error)),
            Reason::SharedClosed(pid, error) => Reason::SharedClosed(*pid, copy(error)),
            Reason::NoKcmp => Reason::NoKcmp,
            Reason::LeaderEnded => Reason::LeaderEnded,
            Reason::Executing(tid) => Reason::Executing(*tid),
            Reason::OtherTable => Reason::OtherTable,
            Reason::TableUnread(error) => Reason::TableUnread(copy(error)),
            Reason::Foreign => Reason::Foreign,
            Reason::ForeignCall(tid) => Reason::ForeignCall(*tid),
            Reason::ForeignProc => Reason::ForeignProc,
            Reason::Limit(tid, limit) => Reason::Limit(*tid, *limit),
            Reason::TimeOver(limit) => Reason::TimeOver(*limit),
            Reason::NoCall => Reason::NoCall,
            Reason::Unsteady => Reason::Unsteady,
            Reason::Denied(error) => Reason::Denied(copy(error)),
            Reason::Interrupted => Reason::Interrupted,
            Reason::Hangs => Reason::Hangs,
            Reason::StillTaken => Reason::StillTaken,
            Reason::Bug => Reason::Bug,
            Reason::Os(step, error) => Reason::Os(step, copy(error)),
        }
    }

    /// Whether we would not, in contrast to could not.
    pub(super) fn is_refusal(&self) -> bool {
        matches!(
            self,
            Reason::Doubt(_)
                | Reason::Ourselves
                | Reason::Traced(..)
                | Reason::FilterForbids
                | Reason::FilterUnread(_)
                | Reason::SharedTable(_)
                | Reason::SharedUnknown(..)
                | Reason::SharedClosed(..)
                | Reason::NoKcmp
                | Reason::LeaderEnded
                | Reason::Executing(_)
                | Reason::OtherTable
                | Reason::TableUnread(_)
                | Reason::Foreign
                | Reason::ForeignCall(_)
                | Reason::ForeignProc
                | Reason::Interrupted
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_right_is_only_missed_where_it_would_help() {
        let reason = |errno, may| {
            let reason = Reason::not_compared(7, io::Error::from_raw_os_error(errno), may);
            (reason.need(), reason.to_string())
        };
        let (need, text) = reason(libc::EPERM, false);
        assert_eq!(need, Some(Privilege::Ptrace));
        assert!(
            text.contains("needs the owner's uid or CAP_SYS_PTRACE"),
            "{text}"
        );
        for (errno, may, why) in [
            (libc::EPERM, true, "security module"),
            (libc::ENOSYS, false, "CONFIG_KCMP"),
            (libc::ENOSYS, true, "CONFIG_KCMP"),
        ] {
            let (need, text) = reason(errno, may);
            assert_eq!(need, None);
            assert!(text.contains(why) && !text.contains("needs"), "{text}");
        }
    }
}
