//! Errors that end the work on one owner.

use std::io;

use nix::errno::Errno;

use crate::model::{Privilege, ReclaimReason};
use crate::privileges;
use crate::sys::errno_of;

/// Why cwkill stops working on an owner, or on a part of its descriptors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum OwnerError {
    /// The owner has exited.
    Exited,
    /// The obstacle may pass: try again.
    TryAgain,
    /// The reason for every descriptor that is left.
    Reason(ReclaimReason),
}

impl OwnerError {
    /// The error of a ptrace(2) request or a listing of threads.
    pub(super) fn of_step(step: &'static str, error: &io::Error) -> Self {
        match errno_of(error) {
            Errno::ESRCH => OwnerError::Exited,
            errno => ReclaimReason::SystemCall(step, errno).into(),
        }
    }
}

/// The reason why the kernel does not let cwkill inspect or stop an owner.
pub(super) fn not_permitted(errno: Errno) -> ReclaimReason {
    match privileges::is_held(Privilege::Ptrace) {
        true => ReclaimReason::RefusedDespitePrivilege(errno),
        false => ReclaimReason::NotPermitted(errno),
    }
}

impl From<ReclaimReason> for OwnerError {
    fn from(reason: ReclaimReason) -> Self {
        OwnerError::Reason(reason)
    }
}

impl From<Errno> for OwnerError {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::ESRCH | Errno::ENOENT => OwnerError::Exited,
            Errno::EPERM | Errno::EACCES => not_permitted(errno).into(),
            errno => ReclaimReason::SystemCall("reading the process", errno).into(),
        }
    }
}

impl From<io::Error> for OwnerError {
    fn from(error: io::Error) -> Self {
        errno_of(&error).into()
    }
}
