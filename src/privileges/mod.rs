//! The privileges of this process, and the advice for the operator if one is missing.

pub mod capabilities;

use std::os::unix::fs::MetadataExt;
use std::sync::LazyLock;

use anyhow::Context;
use caps::{CapSet, Capability};
use nix::errno::Errno;

use crate::kernel::KernelVersion;
use crate::model::{MethodError, Privilege};

/// What a privilege is needed for, as a part of a sentence.
fn need(privilege: Privilege) -> &'static str {
    match privilege {
        Privilege::NetAdmin => "destroy needs CAP_NET_ADMIN",
        Privilege::NetRaw => "rst and probe need CAP_NET_RAW",
        Privilege::Ptrace => {
            "the processes of other users need CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH"
        }
    }
}

/// The hint for privileges that the kernel did not accept, on one line; `None` if there are none. Those of `lacking` that are in `held`
/// are not missing, so the operator must not be told to get them. With root's uid sudo does not help. `is_filtered`: a seccomp filter
/// is on cwkill.
pub fn hint(
    lacking: &[Privilege],
    held: &[Privilege],
    is_root: bool,
    is_filtered: bool,
) -> Option<String> {
    let (refused, missing): (Vec<Privilege>, Vec<Privilege>) = lacking
        .iter()
        .partition(|privilege| held.contains(privilege));
    if missing.is_empty() {
        let refused: Vec<String> = refused
            .iter()
            .map(|it| it.capability().to_string())
            .collect();
        return (!refused.is_empty()).then(|| {
            let filter = match is_filtered {
                true => "the seccomp filter that is on cwkill itself, ",
                false => "",
            };
            format!(
                "cwkill has {}, and the kernel refused all the same: {filter}a security module or another user namespace may be \
                 the reason; `cwkill doctor` says more",
                refused.join(" and ")
            )
        });
    }
    let needs: Vec<&str> = missing.iter().map(|privilege| need(*privilege)).collect();
    let needs = needs.join(", ");
    let filter = match is_filtered {
        true => {
            "; or a seccomp filter is on cwkill itself (SystemCallFilter= of its unit, the profile of its container) and refuses it"
        }
        false => "",
    };
    Some(match is_root {
        true => {
            format!(
                "{needs}, which root may lack here{filter}: `cwkill doctor` says what to change"
            )
        }
        false => format!(
            "run cwkill with sudo: {needs}{filter} (without sudo: setcap, in three commands that `cwkill doctor` shows)"
        ),
    })
}

/// Whether the calling thread has the capability for `privilege`. If the kernel refuses all the same, the reason is another: a security
/// module, a seccomp filter, or the capability counts in the user namespace of cwkill only.
pub fn is_held(privilege: Privilege) -> bool {
    has_capability(privilege.capability())
}

/// Those of `privileges` that the calling thread has, so that they are not what is missing. To read processes takes two capabilities.
pub fn held(privileges: &[Privilege]) -> Vec<Privilege> {
    let reads = |privilege: &Privilege| match privilege {
        Privilege::Ptrace => has_capability(Capability::CAP_DAC_READ_SEARCH),
        Privilege::NetAdmin | Privilege::NetRaw => true,
    };
    let mut held = privileges.to_vec();
    held.retain(|privilege| is_held(*privilege) && reads(privilege));
    held
}

/// Whether `capability` is effective in the calling thread.
pub fn has_capability(capability: Capability) -> bool {
    caps::has_cap(None, CapSet::Effective, capability).unwrap_or(false)
}

/// The error of a method after the kernel has answered with `errno` that cwkill may not do something for which it needs `privilege`.
pub fn not_permitted(privilege: Privilege, errno: Errno) -> MethodError {
    match is_held(privilege) {
        true => MethodError::RefusedDespitePrivilege(privilege, errno),
        false => MethodError::NotPermitted(privilege, errno),
    }
}

/// How to grant all privileges, in several lines. With only some of them, the remaining methods may be harsher. A change of the owner
/// removes the capabilities, so setcap(8) comes last.
pub const HOW_TO_GRANT: &str = "run cwkill with sudo; or let a group use it without, by these commands as root, in this order (its members can then close the \
    connections of every user):\n\
    chown root:GROUP $(command -v cwkill)\n\
    chmod 0750 $(command -v cwkill)\n\
    setcap cap_dac_read_search,cap_net_admin,cap_net_raw,cap_sys_ptrace+ep $(command -v cwkill)";

/// The inode of the initial user namespace, the same on every host (include/linux/proc_ns.h, PROC_USER_INIT_INO). /proc/self/uid_map
/// does not identify it, because another user namespace can map all users too.
pub const FIRST_USER_NAMESPACE: u64 = 0xEFFF_FFFD;

/// See [`may_raise_hard_limits`]. cwkill drops its bounding set early, so the set is read before.
static MAY_RAISE_HARD_LIMITS: LazyLock<bool> = LazyLock::new(|| {
    let namespace = std::fs::metadata("/proc/thread-self/ns/user");
    let is_first = namespace.is_ok_and(|it| it.ino() == FIRST_USER_NAMESPACE);
    is_first && caps::has_cap(None, CapSet::Bounding, Capability::CAP_SYS_RESOURCE).unwrap_or(true)
});

/// Whether root can raise the hard limit of another process here: CAP_SYS_RESOURCE can be had, and it is one of the initial user
/// namespace, which is the one that counts (kernel/sys.c, do_prlimit). It holds for the time before capabilities were dropped.
pub fn may_raise_hard_limits() -> bool {
    *MAY_RAISE_HARD_LIMITS
}

/// The privileges of this process, and its kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Privileges {
    /// CAP_NET_ADMIN is effective.
    pub net_admin: bool,
    /// CAP_NET_RAW is effective.
    pub net_raw: bool,
    pub kernel_version: KernelVersion,
}

impl Privileges {
    /// Reads the effective capabilities of the calling thread.
    ///
    /// A capability may be valid only in a user namespace that does not own the network namespace. Then the kernel still answers
    /// EPERM, and the report shows that.
    ///
    /// # Errors
    /// capget(2) failed.
    pub fn of_this_thread() -> anyhow::Result<Self> {
        let has = |capability| {
            caps::has_cap(None, CapSet::Effective, capability)
                .context("cannot read the capabilities of this process")
        };
        Ok(Privileges {
            net_admin: has(Capability::CAP_NET_ADMIN)?,
            net_raw: has(Capability::CAP_NET_RAW)?,
            kernel_version: KernelVersion::running(),
        })
    }

    /// Whether this process may have `privilege`. The right to attach to an owner depends on that owner and on security modules, so
    /// it is unknown until it is used, and counts as present.
    pub fn has(&self, privilege: Privilege) -> bool {
        match privilege {
            Privilege::NetAdmin => self.net_admin,
            Privilege::NetRaw => self.net_raw,
            Privilege::Ptrace => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_privileges_make_one_line() {
        let all = [Privilege::NetAdmin, Privilege::NetRaw, Privilege::Ptrace];
        assert_eq!(hint(&[], &[], false, true), None);
        assert_eq!(
            hint(&all[..2], &[], false, false).unwrap(),
            "run cwkill with sudo: destroy needs CAP_NET_ADMIN, rst and probe need CAP_NET_RAW (without sudo: setcap, in three \
             commands that `cwkill doctor` shows)"
        );
        let of_root = hint(&all, &[], true, true).unwrap();
        assert!(
            !of_root.contains("sudo") && !of_root.contains('\n'),
            "{of_root}"
        );
        assert!(
            of_root.contains("a seccomp filter is on cwkill itself"),
            "{of_root}"
        );
        assert_eq!(HOW_TO_GRANT.lines().count(), 4);
        // What cwkill has is not missing.
        let ptrace = [Privilege::Ptrace];
        let refused = hint(&ptrace, &ptrace, true, false).unwrap();
        assert!(
            refused.contains("security module") && !refused.contains("need"),
            "{refused}"
        );
        let others = hint(&all, &ptrace, true, false).unwrap();
        assert!(
            others.contains("CAP_NET_RAW") && !others.contains("CAP_SYS_PTRACE"),
            "{others}"
        );
    }
}
