//! What this process may do, and what to tell the operator about what it may not.

use std::fmt;

use anyhow::Context;
use caps::{CapSet, Capability};

use crate::injector::MethodName;
use crate::kernel::KernelVersion;

/// A privilege that a method needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Need {
    /// CAP_NET_ADMIN over the network namespace: SOCK_DESTROY (net/core/sock_diag.c, sock_diag_rcv_msg).
    NetAdmin,
    /// The right to attach to the owner: pidfd_getfd (kernel/pid.c, __pidfd_fget).
    Ptrace,
}

impl fmt::Display for Need {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Need::NetAdmin => "CAP_NET_ADMIN",
            Need::Ptrace => "the owner's uid or CAP_SYS_PTRACE",
        })
    }
}

impl Need {
    /// What it is for and how to grant it, as one sentence for the operator.
    pub fn hint(self) -> &'static str {
        match self {
            Need::NetAdmin => {
                "destroy needs CAP_NET_ADMIN to abort a socket: run cwkill with sudo, or grant it once \
                 with `setcap cap_net_admin+ep` on the binary"
            }
            Need::Ptrace => {
                "shutdown needs CAP_SYS_PTRACE to reach into another user's process: run cwkill with \
                 sudo or as the owner's user, or grant it once with \
                 `setcap cap_sys_ptrace,cap_dac_read_search+ep` on the binary \
                 (kernel.yama.ptrace_scope can forbid it even to the owner's user)"
            }
        }
    }
}

/// What this process may do on the kernel it runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Privileges {
    /// CAP_NET_ADMIN is effective.
    pub net_admin: bool,
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
        let net_admin = caps::has_cap(None, CapSet::Effective, Capability::CAP_NET_ADMIN)
            .context("cannot read the capabilities of this process")?;
        Ok(Privileges {
            net_admin,
            kernel: KernelVersion::running(),
        })
    }

    /// What `method` needs and this process certainly lacks. Rights over an owner cannot be told
    /// beforehand: they depend on it and on security modules.
    pub fn missing_for(&self, method: MethodName) -> Option<Need> {
        match method {
            MethodName::Shutdown => None,
            MethodName::Destroy => (!self.net_admin).then_some(Need::NetAdmin),
        }
    }
}
