//! Programs that the kernel runs at its tracepoints, and at functions and security hooks.
//!
//! The link is a descriptor that nothing else holds. So a program is detached when cwkill ends, however it ends.

use std::mem;
use std::os::fd::{AsRawFd, OwnedFd};

use super::program::{self, Kind};
use super::{BpfError, Insn, RAW_TRACEPOINT_OPEN, bpf_fd, number};

#[repr(C)]
#[derive(Default)]
struct RawTracepointAttr {
    /// 0 for a program that says at loading where it belongs.
    name: u64,
    prog_fd: u32,
    padding: u32,
}

const _: () = assert!(mem::size_of::<RawTracepointAttr>() == 16);

/// Where the kernel runs a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// At a tracepoint, by the number of the type `btf_trace_NAME`.
    Tracepoint(u32),
    /// When a function returns, by its number.
    Return(u32),
    /// At a hook for security modules, by the number of the function `bpf_lsm_NAME`.
    Security(u32),
}

/// An attached program. It is detached when this is dropped.
#[derive(Debug)]
pub struct Tracepoint {
    hook: Hook,
    _link: OwnedFd,
}

impl Tracepoint {
    /// Loads a program and attaches it. `name` has at most 15 letters.
    ///
    /// # Errors
    /// [`BpfError::Refused`], or [`BpfError::Verifier`] with what the verifier says. [`BpfError::FunctionsNotTraced`]: the kernel would attach
    /// the program and never run it.
    pub fn attach(name: &str, program: &[Insn], hook: Hook) -> Result<Self, BpfError> {
        if !is_run(hook) {
            return Err(BpfError::FunctionsNotTraced);
        }
        let (kind, target) = match hook {
            Hook::Tracepoint(target) => (Kind::TRACEPOINT, target),
            Hook::Return(target) => (Kind::RETURN, target),
            Hook::Security(target) => (Kind::SECURITY_HOOK, target),
        };
        let loaded = program::load(name, program, kind, target)?;
        let mut attr = RawTracepointAttr {
            prog_fd: number(loaded.as_raw_fd()),
            ..RawTracepointAttr::default()
        };
        let link = bpf_fd(RAW_TRACEPOINT_OPEN, &mut attr);
        // The link keeps the program.
        link.map(|link| Tracepoint { hook, _link: link })
            .map_err(|error| BpfError::Refused("to attach a program", error))
    }

    /// Whether the kernel still runs it.
    pub fn is_run(&self) -> bool {
        is_run(self.hook)
    }
}

/// Whether the kernel runs programs there. It runs none at functions while `kernel.ftrace_enabled` is 0; a security hook is a function, too.
fn is_run(hook: Hook) -> bool {
    let enabled = || std::fs::read_to_string("/proc/sys/kernel/ftrace_enabled");
    let is_traced = || enabled().map_or(true, |enabled| enabled.trim_end() != "0");
    matches!(hook, Hook::Tracepoint(_)) || is_traced()
}
