//! Closing dead descriptors inside the processes that leak them, after their sockets have been closed.
//!
//! [`reclaim`] closes descriptors of dead sockets. It inspects each owner for evidence that the owner still uses them. Then it
//! stops all threads of the owner, checks the evidence again, makes one of the threads close the descriptors, and releases the
//! owner. If cwkill dies meanwhile, the owner continues to run; docs/decisions/reclaim.md explains why.
//!
//! - `inspect`: the owner as /proc shows it; `in_use`: the decision from that evidence (pure)
//! - `syscalls`: the descriptors that a system call uses (pure); `seccomp`: whether a filter permits a call (pure)
//! - `process`: the work on one owner; `replace`: /dev/null in the place of a descriptor; `obstacle`: why an owner
//!   cannot be stopped; `ptrace`: stopping it, and system calls in one of its threads
//! - `hold`: stopping several processes together, for work of other modules

mod error;
mod hold;
mod in_use;
mod inspect;
mod obstacle;
mod process;
mod ptrace;
mod replace;
mod seccomp;
mod syscalls;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::control::Control;
use crate::finder::dead::DeadSocket;
use crate::model::{InUse, Owner, ReclaimOutcome, ReclaimReason};
use crate::proc::{ProcFs, Process, ProcessId, RemoteFd};
use crate::sock_diag::Cookie;

pub use hold::{Held, NotHeld, while_stopped};

use error::OwnerError;
use in_use::{Evidence, too_young};
use inspect::Inspection;

/// Time until an owner that was busy is inspected or stopped again.
const RETRY_INTERVAL: Duration = Duration::from_millis(2);
/// Time between the end of a socket, or its discovery if it was dead, and the first stop. A program that reacts to the end
/// of its connection closes the descriptor within this time. The kernel does not report how long a socket has been dead.
const REACTION_TIME: Duration = Duration::from_secs(1);
/// The maximum number of descriptors that are closed in one stop. The last check of each takes some microseconds.
const MAX_PER_STOP: usize = 1000;

/// A descriptor to close in its owner. Its outcome is [`Owner::reclaim`]; while that is `None`, it is pending.
#[derive(Debug)]
pub struct ReclaimTarget<'a> {
    /// The process, the number of the descriptor, and the outcome.
    pub owner: &'a mut Owner,
    /// The inode of the socket.
    pub inode: u32,
    /// The cookie of the socket.
    pub cookie: Cookie,
    /// The time for which the socket has been quiet, if that is known.
    pub age: Option<Duration>,
    /// Unread bytes when cwkill found the socket; 0 if the socket was alive then, because more could arrive. cwkill reads their
    /// number again during the stop.
    pub unread: u32,
    /// Whether TLS in the kernel may keep more bytes than those. Known of a dead socket.
    pub kernel_tls: bool,
    /// Unread bytes in the listing from which the operator had the socket closed; their loss is accepted. 0 if cwkill found the
    /// socket dead.
    pub may_lose: u32,
}

impl<'a> ReclaimTarget<'a> {
    /// The descriptor `owner` of a socket with `inode` that was `dead` when cwkill found it.
    pub fn dead(owner: &'a mut Owner, inode: u32, dead: &DeadSocket) -> Self {
        ReclaimTarget {
            owner,
            inode,
            cookie: dead.cookie,
            age: Some(dead.quiet),
            unread: dead.unread,
            kernel_tls: dead.kernel_tls,
            may_lose: 0,
        }
    }

    fn is_pending(&self) -> bool {
        self.owner.reclaim.is_none()
    }

    /// The reason to leave it alone, given this evidence and this number of unread bytes.
    fn in_use(&self, evidence: &Evidence, unread: u32, rules: &ReclaimRules) -> Option<InUse> {
        match rules.force {
            true => None,
            // cwkill never leaves such a number free: the program would take the next file that it opens for its input or output.
            false if self.owner.fd.is_standard() => Some(InUse::StandardDescriptor),
            false if unread > self.may_lose => Some(InUse::Unread(unread)),
            false if self.kernel_tls => Some(InUse::KernelTls),
            false => evidence
                .against(self.owner.fd.0, self.inode)
                .or_else(|| too_young(self.age, rules.min_age)),
        }
    }
}

/// What the operator permits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReclaimRules {
    /// Minimum time for which a socket must have been quiet.
    pub min_age: Duration,
    /// Close descriptors even if there is evidence that they are in use.
    pub force: bool,
    /// Put /dev/null in the place of every descriptor, not only of standard ones.
    pub replace: bool,
    /// Maximum time for which an owner may be stopped.
    pub stop_limit: Duration,
}

impl ReclaimRules {
    /// Whether /dev/null takes the place of descriptor `fd`, so that its number never becomes free.
    pub fn replaces(&self, fd: RemoteFd) -> bool {
        self.replace || fd.is_standard()
    }
}

/// The duration of the stop of one owner, and its result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StopStats {
    /// The owner.
    pub process: Arc<Process>,
    /// The number of descriptors that cwkill closed in it.
    pub freed: usize,
    /// The number of those that cwkill replaced by /dev/null.
    pub replaced: usize,
    /// The longest time for which one of its threads stood still, in one stop.
    pub stop_time: Duration,
}

/// Whether a process uses descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Usage {
    /// None of them is in a system call, an epoll set or an io_uring.
    Unused,
    Used,
    /// cwkill could not see it, or a thread waits in a call that may use any.
    Unknown,
}

/// Whether `process` uses one of `fds`, each with the inode of its socket. It reads nothing that a hung process can block.
pub fn usage(proc: &ProcFs, process: &Process, fds: &[(RemoteFd, u32)]) -> Usage {
    let Ok(evidence) = Inspection::without_memory(proc, process) else {
        return Usage::Unknown;
    };
    let mut usage = Usage::Unused;
    for (fd, inode) in fds {
        match evidence.against(fd.0, *inode) {
            None => {}
            Some(InUse::InSyscall { .. } | InUse::InEpoll(_) | InUse::InIoUring(_)) => {
                return Usage::Used;
            }
            Some(_) => usage = Usage::Unknown,
        }
    }
    usage
}

/// Decides for each pending target whether [`reclaim`] would close it, without stopping an owner. The socket may still be
/// alive. Writes [`ReclaimOutcome::Allowed`] or [`ReclaimOutcome::Skipped`].
pub fn judge(targets: &mut [ReclaimTarget<'_>], rules: &ReclaimRules, proc: &ProcFs) {
    let skipped = |reason: ReclaimReason| Some(ReclaimOutcome::Skipped(reason));
    let same_pids = proc.shows_own_pid_namespace();
    skip_thread_tables(targets);
    for owned in by_process(targets) {
        let inspection = match same_pids {
            true => Inspection::of(proc, &owned[0].owner.process, rules),
            false => Err(ReclaimReason::OtherPidNamespace.into()),
        };
        for target in owned {
            target.owner.reclaim = match &inspection {
                Ok(inspection) => match inspection.in_use(target, rules) {
                    None => Some(ReclaimOutcome::Allowed),
                    Some(in_use) => skipped(ReclaimReason::InUse(in_use)),
                },
                // A dry run reports a descriptor as closable, or the reason why not. After the exit of the owner no reason is
                // left, and a run that acts reports no failure either (`Gone`). An inspection never returns `TryAgain`.
                Err(OwnerError::Exited | OwnerError::TryAgain) => Some(ReclaimOutcome::Allowed),
                Err(OwnerError::Reason(reason)) => skipped(reason.clone()),
            };
        }
    }
}

/// Skips each pending target that a waiting system call uses. It must be called before the sockets are closed: closing a
/// socket ends the call, and its thread is then likely to close the descriptor. The other targets stay pending.
pub fn skip_used_by_syscalls(
    targets: &mut [ReclaimTarget<'_>],
    rules: &ReclaimRules,
    proc: &ProcFs,
) {
    if rules.force || !proc.shows_own_pid_namespace() {
        return;
    }
    skip_thread_tables(targets);
    for mut owned in by_process(targets) {
        match Inspection::syscalls_only(proc, &owned[0].owner.process) {
            Ok(evidence) => {
                for target in owned {
                    let in_use = evidence.against(target.owner.fd.0, target.inode);
                    target.owner.reclaim =
                        in_use.map(|in_use| ReclaimOutcome::Skipped(ReclaimReason::InUse(in_use)));
                }
            }
            // The owner is checked again after the sockets have been closed.
            Err(OwnerError::Exited) => {}
            Err(error) => decide(&mut owned, &error),
        }
    }
}

/// Gives the owners time to react to the end of their connections. A program that reacts closes the descriptor within
/// milliseconds; a descriptor that it has not closed after this time is leaked. Ctrl-C ends the wait.
pub fn let_owners_react(rules: &ReclaimRules, control: &dyn Control) {
    // With `--reclaim-age 0s` the operator wants no wait at all, and a shorter age also shortens this wait.
    let until = control.now() + REACTION_TIME.min(rules.min_age);
    while !control.interrupted() {
        match until.checked_duration_since(control.now()) {
            None | Some(Duration::ZERO) => return,
            Some(left) => control.sleep(left.min(Duration::from_millis(50))),
        }
    }
}

/// Closes the pending targets in their owners, one owner after the other, as far as the evidence allows, and writes the
/// outcome of each. Returns the owners that were stopped.
pub fn reclaim(
    targets: &mut [ReclaimTarget<'_>],
    rules: &ReclaimRules,
    proc: &ProcFs,
    control: &dyn Control,
) -> Vec<StopStats> {
    let interrupted = || control.interrupted();
    let mut stops = Vec::new();
    let same_pids = proc.shows_own_pid_namespace();
    let mut was_interrupted = false;
    skip_thread_tables(targets);
    for mut owned in by_process(targets) {
        if !same_pids {
            decide(&mut owned, &ReclaimReason::OtherPidNamespace.into());
            continue;
        }
        let process = Arc::clone(&owned[0].owner.process);
        let mut stop_time = Duration::ZERO;
        for batch in owned.chunks_mut(MAX_PER_STOP) {
            was_interrupted = was_interrupted || interrupted();
            if !was_interrupted {
                let longest = process::close_in(&process, batch, rules, proc, &interrupted);
                stop_time = stop_time.max(longest);
            }
            decide(batch, &ReclaimReason::Interrupted.into());
        }
        if !stop_time.is_zero() {
            let count = |outcome: ReclaimOutcome| {
                let reclaimed = owned.iter().map(|target| target.owner.reclaim.as_ref());
                reclaimed.filter(|it| *it == Some(&outcome)).count()
            };
            stops.push(StopStats {
                freed: count(ReclaimOutcome::Freed),
                replaced: count(ReclaimOutcome::Replaced),
                process,
                stop_time,
            });
        }
    }
    stops
}

/// Skips the pending targets in tables of single threads. The inspection and the calls inside the owner are about the table of its
/// first thread, where the same number is another file.
fn skip_thread_tables(targets: &mut [ReclaimTarget<'_>]) {
    for target in targets.iter_mut().filter(|target| target.is_pending()) {
        if let Some(tid) = target.owner.tid {
            target.owner.reclaim = Some(ReclaimReason::ThreadTable(tid).into_outcome());
        }
    }
}

/// The pending targets, by owner, in the order of pids.
fn by_process<'t, 'a>(targets: &'t mut [ReclaimTarget<'a>]) -> Vec<Vec<&'t mut ReclaimTarget<'a>>> {
    let mut by_process: BTreeMap<ProcessId, Vec<&mut ReclaimTarget<'a>>> = BTreeMap::new();
    for target in targets.iter_mut().filter(|target| target.is_pending()) {
        by_process
            .entry(target.owner.process.id)
            .or_default()
            .push(target);
    }
    by_process.into_values().collect()
}

/// The targets without an outcome.
fn pending<'t, 'a>(
    targets: &'t mut [&mut ReclaimTarget<'a>],
) -> impl Iterator<Item = &'t mut ReclaimTarget<'a>> {
    let targets = targets.iter_mut().map(|target| &mut **target);
    targets.filter(|target| target.is_pending())
}

/// Gives every pending target the outcome that follows from an error of its owner. After [`OwnerError::TryAgain`] they stay
/// pending.
fn decide(targets: &mut [&mut ReclaimTarget<'_>], error: &OwnerError) {
    let outcome = match error {
        OwnerError::TryAgain => return,
        OwnerError::Exited => ReclaimOutcome::Gone,
        OwnerError::Reason(reason) => reason.clone().into_outcome(),
    };
    for target in pending(targets) {
        target.owner.reclaim = Some(outcome.clone());
    }
}

/// Reads a file of /proc. Names in it need not be valid UTF-8: the kernel cuts them after 15 bytes, also inside a
/// character.
fn read_text(path: impl AsRef<Path>) -> io::Result<String> {
    Ok(String::from_utf8_lossy(&fs::read(path)?).into_owned())
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::model::Method;
    use crate::proc::RemoteFd;
    use crate::proc::testdata::process;
    use nix::errno::Errno;

    pub(super) fn owner(pid: i32, fd: i32) -> Owner {
        Owner::new(process(pid, "app"), RemoteFd(fd))
    }

    pub(super) fn target(owner: &mut Owner) -> ReclaimTarget<'_> {
        ReclaimTarget {
            owner,
            inode: 42,
            cookie: Cookie(5),
            age: Some(Duration::from_secs(60)),
            unread: 0,
            kernel_tls: false,
            may_lose: 0,
        }
    }

    /// A control that is interrupted from the start, or never.
    struct Fixed {
        interrupted: bool,
    }

    impl Control for Fixed {
        fn now(&self) -> Instant {
            Instant::now()
        }
        fn sleep(&self, _: Duration) {}
        fn interrupted(&self) -> bool {
            self.interrupted
        }
        fn progress(&self, _: Method, _: usize) {}
    }

    #[test]
    fn targets_are_grouped_by_owner_and_those_with_an_outcome_left_out() {
        let mut owners = [owner(9, 3), owner(7, 4), owner(9, 5), owner(8, 6)];
        owners[3].reclaim = Some(ReclaimOutcome::Gone);
        let mut targets: Vec<ReclaimTarget<'_>> = owners.iter_mut().map(target).collect();
        let fds: Vec<Vec<i32>> = by_process(&mut targets)
            .into_iter()
            .map(|owned| owned.into_iter().map(|target| target.owner.fd.0).collect())
            .collect();
        assert_eq!(fds, [vec![4], vec![3, 5]]);
    }

    #[test]
    fn an_error_settles_only_pending_targets() {
        let settled = |error: OwnerError| {
            let (mut freed, mut open) = (owner(7, 3), owner(7, 4));
            freed.reclaim = Some(ReclaimOutcome::Freed);
            decide(
                &mut [&mut target(&mut freed), &mut target(&mut open)],
                &error,
            );
            assert_eq!(freed.reclaim, Some(ReclaimOutcome::Freed));
            open.reclaim
        };
        assert_eq!(settled(OwnerError::TryAgain), None);
        assert_eq!(settled(OwnerError::Exited), Some(ReclaimOutcome::Gone));
        for (reason, outcome) in [
            (
                ReclaimReason::LeaderExited,
                ReclaimOutcome::Skipped(ReclaimReason::LeaderExited),
            ),
            (
                ReclaimReason::Bug,
                ReclaimOutcome::Failed(ReclaimReason::Bug),
            ),
        ] {
            assert_eq!(settled(reason.into()), Some(outcome));
        }
        // Whether the tests have the capability or not.
        let denied = error::not_permitted(Errno::EPERM);
        assert_eq!(denied.privilege(), Some(crate::model::Privilege::Ptrace));
        assert_eq!(
            settled(Errno::EPERM.into()),
            Some(ReclaimOutcome::Failed(denied))
        );
        assert_eq!(settled(Errno::ESRCH.into()), Some(ReclaimOutcome::Gone));
    }

    #[test]
    fn unread_bytes_age_and_evidence_keep_a_descriptor() {
        let rules = ReclaimRules {
            min_age: Duration::from_secs(60),
            force: false,
            replace: false,
            stop_limit: Duration::from_secs(1),
        };
        let none = Evidence::default();
        let in_use = |target: &ReclaimTarget<'_>, unread| target.in_use(&none, unread, &rules);
        let mut owner = owner(7, 3);
        let mut target = target(&mut owner);
        assert_eq!(in_use(&target, 0), None);
        assert_eq!(in_use(&target, 5), Some(InUse::Unread(5)));
        target.may_lose = 5;
        assert_eq!(in_use(&target, 5), None);
        assert_eq!(in_use(&target, 6), Some(InUse::Unread(6)));
        target.kernel_tls = true;
        assert_eq!(in_use(&target, 5), Some(InUse::KernelTls));
        assert_eq!(in_use(&target, 6), Some(InUse::Unread(6)));
        target.kernel_tls = false;
        target.age = None;
        assert_eq!(in_use(&target, 0), Some(InUse::AgeUnknown));
        let java = Evidence {
            finalizer: Some("Finalizer".into()),
            ..Evidence::default()
        };
        let finalizer = Some(InUse::Finalizer("Finalizer".into()));
        assert_eq!(target.in_use(&java, 0, &rules), finalizer);
        let force = ReclaimRules {
            force: true,
            ..rules
        };
        assert_eq!(target.in_use(&java, 6, &force), None);
        for fd in 0..=2 {
            target.owner.fd = RemoteFd(fd);
            let standard = Some(InUse::StandardDescriptor);
            assert_eq!(target.in_use(&none, 0, &rules), standard);
            assert_eq!(target.in_use(&none, 0, &force), None, "it is replaced");
        }
    }

    #[test]
    fn a_foreign_proc_is_refused() {
        let root = tempfile::tempdir().unwrap();
        let proc = ProcFs::at(root.path());
        let rules = ReclaimRules {
            min_age: Duration::ZERO,
            force: true,
            replace: false,
            stop_limit: Duration::from_secs(1),
        };
        let skipped = Some(ReclaimOutcome::Skipped(ReclaimReason::OtherPidNamespace));
        let mut owner = owner(7, 3);
        skip_used_by_syscalls(&mut [target(&mut owner)], &rules, &proc);
        assert_eq!(owner.reclaim, None);
        judge(&mut [target(&mut owner)], &rules, &proc);
        assert_eq!(owner.reclaim, skipped);
        owner.reclaim = None;
        let control = Fixed { interrupted: false };
        let stops = reclaim(&mut [target(&mut owner)], &rules, &proc, &control);
        assert_eq!((&owner.reclaim, stops.len()), (&skipped, 0));
    }

    #[test]
    fn targets_of_an_interrupted_run_are_skipped() {
        let rules = ReclaimRules {
            min_age: Duration::ZERO,
            force: false,
            replace: false,
            stop_limit: Duration::from_secs(1),
        };
        let mut owners = [owner(7, 3), owner(8, 3)];
        owners[1].reclaim = Some(ReclaimOutcome::Gone);
        let mut targets: Vec<ReclaimTarget<'_>> = owners.iter_mut().map(target).collect();
        let control = Fixed { interrupted: true };
        let stops = reclaim(&mut targets, &rules, &ProcFs::default(), &control);
        let interrupted = ReclaimOutcome::Skipped(ReclaimReason::Interrupted);
        assert_eq!(owners[0].reclaim, Some(interrupted));
        assert_eq!(owners[1].reclaim, Some(ReclaimOutcome::Gone));
        assert!(stops.is_empty());
    }
}
