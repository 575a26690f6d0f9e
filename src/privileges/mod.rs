//! What this process may do, and what to tell the operator about what it may not.

pub mod drop;

use anyhow::Context;
use caps::{CapSet, Capability};

use crate::kernel::KernelVersion;
use crate::model::Privilege;

/// What a privilege is for, as one sentence for the operator.
pub fn purpose(privilege: Privilege) -> &'static str {
    match privilege {
        Privilege::NetAdmin => "destroy needs CAP_NET_ADMIN to have the kernel abort a socket",
        Privilege::NetRaw => {
            "rst, and probe of a socket without an owner, need CAP_NET_RAW to send and see single \
                 segments"
        }
        Privilege::Ptrace => {
            "seeing the owners of other users' sockets, shutdown through them and --reclaim need \
                 CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH (within one user only that the owner has no \
                 more capabilities than cwkill, and that kernel.yama.ptrace_scope allows it)"
        }
    }
}

/// How to grant whatever is missing. All of it: with a part, the methods that are left may be harsher.
pub const HOW_TO_GRANT: &str = "run cwkill with sudo, or grant its binary what it needs once: \
    `setcap cap_dac_read_search,cap_net_admin,cap_net_raw,cap_sys_ptrace+ep \
    $(command -v cwkill)`, and let only those run it who may close the connections of every user";

/// What this process may do on the kernel it runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Privileges {
    /// CAP_NET_ADMIN is effective.
    pub net_admin: bool,
    /// CAP_NET_RAW is effective.
    pub net_raw: bool,
    /// The running kernel.
    pub kernel: KernelVersion,
}

impl Privileges {
    /// Reads the effective capabilities of the calling thread.
    ///
    /// A capability may hold only inside a user namespace that does not own the network namespace;
    /// the kernel then still answers EPERM, which the report shows.
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
            kernel: KernelVersion::running(),
        })
    }

    /// Whether this process may have `privilege`. The right to reach into an owner is unknown beforehand: it depends on the owner
    /// and on security modules.
    pub fn has(&self, privilege: Privilege) -> bool {
        match privilege {
            Privilege::NetAdmin => self.net_admin,
            Privilege::NetRaw => self.net_raw,
            Privilege::Ptrace => true,
        }
    }
}
