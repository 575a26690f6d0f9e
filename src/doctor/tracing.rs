//! Whether `cwkill trace` works here: its programs are loaded and attached, and detached again.

use nix::errno::Errno;

use crate::bpf::BpfError;
use crate::finder::way::NotUsed;
use crate::proc::ProcFs;
use crate::sys::bpf::BtfError;

/// Whether `cwkill trace` works here. Each reason is for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Tracing {
    Works {
        /// Why accepted connections are not seen.
        no_accepts: Option<String>,
    },
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

    /// `attached`: why accepted connections are not seen, or why the programs cannot be attached.
    fn of(attached: Result<Option<BpfError>, BpfError>) -> Self {
        match attached {
            Ok(no_accepts) => Tracing::Works {
                no_accepts: no_accepts.map(text),
            },
            Err(error) => Tracing::Not(why(error)),
        }
    }
}

#[cfg(feature = "trace")]
fn attach_and_detach() -> Result<Option<BpfError>, BpfError> {
    crate::bpf::tracer::Tracer::attach().map(crate::bpf::tracer::Tracer::detach)
}

#[cfg(not(feature = "trace"))]
fn attach_and_detach() -> Result<Option<BpfError>, BpfError> {
    Ok(None)
}

fn text(error: BpfError) -> String {
    format!("{:#}", anyhow::Error::from(error))
}

/// The error with what would help.
fn why(error: BpfError) -> String {
    let help = match (&error, error.errno()) {
        (BpfError::Refused(..), Errno::EPERM) => {
            "; it needs CAP_BPF and CAP_PERFMON, or CAP_SYS_ADMIN, of the first user namespace"
        }
        (BpfError::Types(BtfError::NotHere(_)), _) => "; it needs Linux 6.3",
        _ => "",
    };
    text(error) + help
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    #[test]
    fn what_works_says_whether_accepts_are_seen() {
        assert_eq!(Tracing::of(Ok(None)), Tracing::Works { no_accepts: None });
        let refused = BpfError::Refused("to attach a program", io::Error::from_raw_os_error(524));
        let Tracing::Works { no_accepts } = Tracing::of(Ok(Some(refused))) else {
            panic!("it works");
        };
        assert!(no_accepts.unwrap().contains("refuses to attach a program"));
    }

    #[test]
    fn a_refusal_names_what_would_help() {
        let why = |error| match Tracing::of(Err(error)) {
            Tracing::Not(why) => why,
            other => panic!("{other:?}"),
        };
        let eperm = || io::Error::from_raw_os_error(libc::EPERM);
        let refused = why(BpfError::Refused("to load a program", eperm()));
        assert!(refused.contains("CAP_PERFMON"), "{refused}");
        // Before Linux 6.3.
        let old = BtfError::NotHere("tracepoint sock_recv_length".into());
        let old = why(old.into());
        assert!(
            old.ends_with("sock_recv_length; it needs Linux 6.3"),
            "{old}"
        );
        let unreadable = why(BtfError::Unreadable(io::ErrorKind::NotFound.into()).into());
        assert!(unreadable.contains("CONFIG_DEBUG_INFO_BTF"), "{unreadable}");
        assert!(!unreadable.contains("6.3"), "{unreadable}");
    }
}
