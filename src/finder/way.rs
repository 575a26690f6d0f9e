//! By which way the descriptors of all processes are read: by the kernel's iterator or from /proc.

use crate::bpf::BpfError;
pub use crate::bpf::KernelTypes;
use crate::bpf::descriptors::Descriptors;
use crate::proc::ProcFs;

/// When the iterator is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum UseIterator {
    /// Where it works and pays.
    Auto,
    Never,
    /// Or the command fails.
    Always,
}

/// Why the iterator is not used.
#[derive(Debug, thiserror::Error)]
pub enum NotUsed {
    #[error("--bpf never")]
    Never,
    #[error("the host has only {0} open files, so /proc is as fast")]
    FewFiles(u64),
    /// A filter may end a process for a system call that it does not expect.
    #[error("a seccomp filter is on cwkill, and may end it for bpf(2); --bpf always tries it")]
    SeccompFilter,
    #[error("/proc is of another pid namespace, or hides processes")]
    OtherProcesses,
    #[error(transparent)]
    Bpf(#[from] BpfError),
}

impl NotUsed {
    /// All that the kernel's verifier says about a program that it refuses.
    pub fn verifier_log(&self) -> Option<&str> {
        match self {
            NotUsed::Bpf(BpfError::Verifier { log, .. }) => Some(log),
            _ => None,
        }
    }
}

/// With fewer open files on the host, the time to load the iterator is longer than what it saves.
pub const MANY_FILES: u64 = 10_000;

/// The file system with the iterator, if `use_it` and the host allow it. Must be called with the capabilities for it; they are not
/// needed later. `from`: it pays on a host with so many open files, see [`MANY_FILES`].
///
/// # Errors
/// Why not. The file system can be used without it.
pub fn choose(
    proc: &ProcFs,
    use_it: UseIterator,
    from: u64,
    types: &KernelTypes,
) -> Result<ProcFs, NotUsed> {
    match use_it {
        UseIterator::Always => {}
        UseIterator::Never => return Err(NotUsed::Never),
        UseIterator::Auto => {
            if let Some((open, _)) = proc.open_files()
                && open < from
            {
                return Err(NotUsed::FewFiles(open));
            }
            if proc.filters_own_calls() {
                return Err(NotUsed::SeccompFilter);
            }
        }
    }
    let iterator = load(proc, types)?;
    Ok(proc.with_iterator(iterator, use_it == UseIterator::Always))
}

/// Whether the iterator works here. A host without many files does not use it all the same.
///
/// # Errors
/// Why it does not work.
pub fn works(proc: &ProcFs, types: &KernelTypes) -> Result<(), NotUsed> {
    match proc.filters_own_calls() {
        true => Err(NotUsed::SeccompFilter),
        false => load(proc, types).map(drop),
    }
}

fn load(proc: &ProcFs, types: &KernelTypes) -> Result<Descriptors, NotUsed> {
    // Names and cgroups of processes are read from /proc in any case. Only hidepid can hide process 1.
    if !proc.shows_own_pid_namespace() || !proc.path("1").exists() {
        return Err(NotUsed::OtherProcesses);
    }
    Ok(Descriptors::load(types)?)
}
