//! The privileges of this process, and the advice for the operator if one is missing.

pub mod capabilities;

use anyhow::Context;
use caps::{CapSet, Capability};

use crate::kernel::KernelVersion;
use crate::model::Privilege;

/// The purpose of a privilege, as one sentence for the operator.
pub fn purpose(privilege: Privilege) -> &'static str {
    match privilege {
        Privilege::NetAdmin => "destroy needs CAP_NET_ADMIN to make the kernel abort a socket",
        Privilege::NetRaw => {
            "rst needs CAP_NET_RAW to send and capture single segments; so does probe if the socket has no \
                 known owner"
        }
        Privilege::Ptrace => {
            "to see the descriptors of other users' processes, and to use them for shutdown and --reclaim, \
                 cwkill needs CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH; a process of the same user needs \
                 neither, if it has no capability that cwkill lacks and kernel.yama.ptrace_scope allows it"
        }
    }
}

/// How to grant all privileges. With only some of them, the remaining methods may be harsher.
pub const HOW_TO_GRANT: &str = "run cwkill with sudo, or grant its binary the capabilities once: \
    `setcap cap_dac_read_search,cap_net_admin,cap_net_raw,cap_sys_ptrace+ep \
    $(command -v cwkill)`, and let only those users run it who may close the connections of every user";

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
