//! /dev/null in the place of a descriptor of the owner.
//!
//! The owner opens it: no other process can give it a descriptor. The path must be in the memory of the owner, so one of its threads
//! first maps a page for it (mmap(2)), which is unmapped afterwards. If the owner has /dev/null open already, that descriptor is
//! duplicated instead.

use nix::errno::Errno;

use super::ReclaimTarget;
use super::error::OwnerError;
use super::inspect::{InspectedProcess, Inspection};
use super::ptrace::RemoteThread;
use crate::model::{ReclaimOutcome, ReclaimReason};
use crate::proc::RemoteFd;

/// With its end, as open(2) wants it.
const PATH: &[u8] = b"/dev/null\0";
/// A page of the smallest size; the kernel rounds it up.
const PAGE: u64 = 4096;

/// Whether cwkill may make another call in the owner.
pub type MayGoOn<'f> = &'f dyn Fn(&RemoteThread) -> Result<(), OwnerError>;

/// A descriptor of the owner for /dev/null.
pub struct DevNull {
    fd: RemoteFd,
    /// The owner opened it for cwkill, and it is closed in the end.
    is_opened: bool,
}

impl DevNull {
    /// Takes a descriptor of /dev/null that the owner has, or makes it open one.
    ///
    /// # Errors
    /// The owner cannot open it, or a seccomp filter forbids a call.
    pub fn find_or_open(
        remote: &mut RemoteThread,
        inspection: &Inspection<'_>,
    ) -> Result<Self, OwnerError> {
        let process = &inspection.process;
        let is_usable = |fd: &RemoteFd| process.is_dev_null(*fd) && process.is_for_both(*fd);
        match inspection.null_fds().find(is_usable) {
            Some(fd) => Ok(DevNull {
                fd,
                is_opened: false,
            }),
            None => Self::open(remote, process),
        }
    }

    fn open(remote: &mut RemoteThread, process: &InspectedProcess<'_>) -> Result<Self, OwnerError> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        let mapping = [0, PAGE, word(access), word(kind), word(-1), 0];
        let flags = libc::O_RDWR | libc::O_CLOEXEC | libc::O_NOCTTY;
        let opening = |page: u64| [word(libc::AT_FDCWD), page, word(flags), 0];
        // Checked before the first of them is made.
        for (number, arguments) in [
            (libc::SYS_openat, &opening(0)[..]),
            (libc::SYS_munmap, &[0, PAGE]),
            (libc::SYS_dup3, &[0, 0, 0]),
            (libc::SYS_close, &[0]),
        ] {
            ensure_permitted(remote, number, arguments)?;
        }
        let page = permitted_call(remote, libc::SYS_mmap, &mapping)?;
        let page = u64::try_from(page).map_err(|_| failed("mmap", page))?;
        let opened = match remote.write(page, PATH) {
            true => permitted_call(remote, libc::SYS_openat, &opening(page)),
            false => Err(failed("process_vm_writev", -i64::from(libc::EFAULT))),
        };
        let unmapped = permitted_call(remote, libc::SYS_munmap, &[page, PAGE]);
        let opened = opened?;
        let fd = match i32::try_from(opened) {
            Ok(fd) if fd >= 0 => RemoteFd(fd),
            _ => return Err(not_opened(opened)),
        };
        let null = DevNull {
            fd,
            is_opened: true,
        };
        let is_right = process.is_dev_null(fd);
        match unmapped {
            Ok(_) if is_right => Ok(null),
            Ok(_) => {
                null.release(remote);
                Err(ReclaimReason::NoDevNull(None).into())
            }
            Err(error) => {
                null.release(remote);
                Err(error)
            }
        }
    }

    /// Puts it in the place of each of `targets`.
    ///
    /// # Errors
    /// The error applies to all targets that are still pending.
    pub fn replace_all(
        &self,
        remote: &mut RemoteThread,
        process: &InspectedProcess<'_>,
        targets: Vec<&mut ReclaimTarget>,
        may_go_on: MayGoOn<'_>,
    ) -> Result<(), OwnerError> {
        for target in targets {
            may_go_on(remote)?;
            let fd = target.owner.fd;
            let flags = process.closes_on_exec(fd).map_or(0, |closes| match closes {
                true => word(libc::O_CLOEXEC),
                false => 0,
            });
            let arguments = [word(self.fd.0), word(fd.0), flags];
            ensure_permitted(remote, libc::SYS_dup3, &arguments)?;
            let is_done = || process.is_dev_null(fd);
            let result = remote.call(libc::SYS_dup3, &arguments, &is_done);
            target.owner.reclaim = match (process.is_dev_null(fd), &result) {
                (true, _) => Some(ReclaimOutcome::Replaced),
                (false, Ok(result)) if *result >= 0 => {
                    Some(ReclaimReason::StillOpen.into_outcome())
                }
                (false, Ok(result)) => return Err(failed("dup3", *result)),
                (false, Err(_)) => None,
            };
            result?;
        }
        Ok(())
    }

    /// Closes it if the owner has opened it for cwkill. If that fails, one descriptor of /dev/null is left in the owner.
    pub fn release(&self, remote: &mut RemoteThread) {
        if self.is_opened {
            let _ = permitted_call(remote, libc::SYS_close, &[word(self.fd.0)]);
        }
    }
}

/// An argument of a system call: the kernel takes the lower half of the register for an `int`.
fn word(argument: i32) -> u64 {
    i64::from(argument).cast_unsigned()
}

fn ensure_permitted(
    remote: &RemoteThread,
    number: i64,
    arguments: &[u64],
) -> Result<(), OwnerError> {
    match remote.permits(number, arguments) {
        true => Ok(()),
        false => Err(ReclaimReason::SeccompForbidsReplace.into()),
    }
}

/// Makes a call, if the seccomp filters of the thread permit it.
fn permitted_call(
    remote: &mut RemoteThread,
    number: i64,
    arguments: &[u64],
) -> Result<i64, OwnerError> {
    ensure_permitted(remote, number, arguments)?;
    remote.call(number, arguments, &|| false)
}

/// The error of a call that returned a negative errno.
fn failed(call: &'static str, result: i64) -> OwnerError {
    ReclaimReason::SystemCall(call, errno(result)).into()
}

fn not_opened(result: i64) -> OwnerError {
    match errno(result) {
        errno @ (Errno::EMFILE | Errno::ENFILE | Errno::ENOMEM) => {
            ReclaimReason::SystemCall("opening /dev/null", errno).into()
        }
        errno => ReclaimReason::NoDevNull(Some(errno)).into(),
    }
}

fn errno(result: i64) -> Errno {
    Errno::from_raw(i32::try_from(-result).unwrap_or(libc::EIO))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_negative_argument_fills_its_register() {
        assert_eq!(word(-1), u64::MAX);
        assert_eq!(word(7), 7);
    }

    #[test]
    fn an_owner_at_its_limit_is_not_one_without_dev_null() {
        let reason = |result: i32| match not_opened(-i64::from(result)) {
            OwnerError::Reason(reason) => reason.code(),
            other => panic!("{other:?}"),
        };
        assert_eq!(reason(libc::EMFILE), "system-call");
        assert_eq!(reason(libc::ENOENT), "no-dev-null");
        assert_eq!(reason(libc::EACCES), "no-dev-null");
    }
}
