//! Whether `cwkill trace` works here: its programs are loaded and attached, and detached again.

use nix::errno::Errno;

use crate::bpf::{BpfError, NotSeen};
use crate::finder::way::NotUsed;
use crate::proc::ProcFs;
use crate::sys::bpf::BtfError;

/// Whether `cwkill trace` works here. Each reason is for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tracing {
    Works(NotSeen),
    Not(String),
    /// This cwkill has no `trace`.
    NotBuilt,
}

impl Tracing {
    /// Tries it. This must be called before privileges are dropped. Nothing stays in the kernel.
    pub fn examine(proc: &ProcFs) -> Self {
        if cfg!(not(feature = "trace")) {
            return Tracing::NotBuilt;
        }
        // As for the iterators: a filter may end a process for a system call that it does not expect.
        if proc.filters_own_calls() {
            return Tracing::Not(NotUsed::SeccompFilter.to_string());
        }
        // The programs tell processes by their pids in the first pid namespace.
        if !proc.shows_every_process() {
            return Tracing::Not("cwkill is inside a pid namespace".into());
        }
        Self::of(attach_and_detach())
    }

    /// `attached`: what the attached programs do not see, or why they cannot be attached.
    fn of(attached: Result<NotSeen, BpfError>) -> Self {
        match attached {
            Ok(not_seen) => Tracing::Works(not_seen),
            Err(error) => Tracing::Not(why(error)),
        }
    }
}

#[cfg(feature = "trace")]
fn attach_and_detach() -> Result<NotSeen, BpfError> {
    crate::bpf::tracer::Tracer::attach().map(|mut tracer| tracer.detach())
}

#[cfg(not(feature = "trace"))]
fn attach_and_detach() -> Result<NotSeen, BpfError> {
    Ok(NotSeen::default())
}

/// The error with what would help.
fn why(error: BpfError) -> String {
    let help = match (&error, error.errno()) {
        (BpfError::Refused(..), Errno::EPERM) => {
            "; it needs CAP_BPF and CAP_PERFMON, or CAP_SYS_ADMIN, of the first user namespace"
        }
        (BpfError::Types(BtfError::NotHere(_)), _) => "; it needs Linux 5.15",
        _ => "",
    };
    format!("{:#}{help}", anyhow::Error::from(error))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    #[test]
    fn a_refusal_names_what_would_help() {
        let why = |error| match Tracing::of(Err(error)) {
            Tracing::Not(why) => why,
            other => panic!("{other:?}"),
        };
        let eperm = || io::Error::from_raw_os_error(libc::EPERM);
        let refused = why(BpfError::Refused("to load a program", eperm()));
        assert!(refused.contains("CAP_PERFMON"), "{refused}");
        let old = BtfError::NotHere("function bpf_task_pt_regs".into());
        let old = why(old.into());
        assert!(
            old.ends_with("bpf_task_pt_regs; it needs Linux 5.15"),
            "{old}"
        );
        let unreadable = why(BtfError::Unreadable(io::ErrorKind::NotFound.into()).into());
        assert!(unreadable.contains("CONFIG_DEBUG_INFO_BTF"), "{unreadable}");
        assert!(!unreadable.contains("5.15"), "{unreadable}");
    }
}
