//! The privileges of this process, and the advice for the operator if one is missing.

pub mod capabilities;

use anyhow::Context;
use caps::{CapSet, Capability};

use crate::kernel::KernelVersion;
use crate::model::Privilege;

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

/// The hint for missing privileges, on one line; `None` if none is missing. With root's uid sudo does not help. `is_filtered`: a
/// seccomp filter is on cwkill.
pub fn hint(missing: &[Privilege], is_root: bool, is_filtered: bool) -> Option<String> {
    if missing.is_empty() {
        return None;
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

/// How to grant all privileges, in several lines. With only some of them, the remaining methods may be harsher. A change of the owner
/// removes the capabilities, so setcap(8) comes last.
pub const HOW_TO_GRANT: &str = "run cwkill with sudo; or let a group use it without, by these commands as root, in this order (its members can then close the \
    connections of every user):\n\
    chown root:GROUP $(command -v cwkill)\n\
    chmod 0750 $(command -v cwkill)\n\
    setcap cap_dac_read_search,cap_net_admin,cap_net_raw,cap_sys_ptrace+ep $(command -v cwkill)";

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
        assert_eq!(hint(&[], false, true), None);
        assert_eq!(
            hint(&all[..2], false, false).unwrap(),
            "run cwkill with sudo: destroy needs CAP_NET_ADMIN, rst and probe need CAP_NET_RAW (without sudo: setcap, in three \
             commands that `cwkill doctor` shows)"
        );
        let of_root = hint(&all, true, true).unwrap();
        assert!(
            !of_root.contains("sudo") && !of_root.contains('\n'),
            "{of_root}"
        );
        assert!(
            of_root.contains("a seccomp filter is on cwkill itself"),
            "{of_root}"
        );
        assert_eq!(HOW_TO_GRANT.lines().count(), 4);
    }
}
