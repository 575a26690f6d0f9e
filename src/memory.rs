//! Whether the memory is there that a run needs after its first act.
//!
//! A Rust program is aborted if an allocation fails. After an act that would lose the report and the outcomes, so cwkill asks
//! before the first one. The limits that this finds are those on address space and on promised memory (RLIMIT_AS,
//! vm.overcommit_memory). A cgroup's limit shows only when the memory is used; then the kernel sends SIGKILL.

use thiserror::Error;

/// Memory for the threads of the acts: 16 stacks of 2 MiB, and their netlink buffers.
const BYTES_FOR_THREADS: usize = 48 * MIB;
/// Memory for the attempts, the outcome and the lines in the report and the log of one socket or descriptor, in bytes. With 15,000
/// sockets, 930 were needed with JSON and a log, and 2000 for each descriptor with `cwkill reclaim`.
const BYTES_PER_TARGET: usize = 2048;
const MIB: usize = 1 << 20;

/// Too little memory to act.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error(
    "the report would need {} MiB more memory, which a limit forbids (`ulimit -v`, vm.overcommit_memory)",
    .0.div_ceil(MIB)
)]
pub(crate) struct TooLittle(usize);

/// Checks that there is enough memory to act on `targets` sockets or descriptors.
///
/// It allocates address space and gives it back. The kernel provides no memory for it, so the size costs nothing.
pub(crate) fn check_room(targets: usize) -> Result<(), TooLittle> {
    let bytes = targets
        .saturating_mul(BYTES_PER_TARGET)
        .saturating_add(BYTES_FOR_THREADS);
    Vec::<u8>::new()
        .try_reserve_exact(bytes)
        .map_err(|_| TooLittle(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_that_no_host_has_is_refused() {
        assert_eq!(check_room(0), Ok(()));
        let too_little = check_room(usize::MAX / BYTES_PER_TARGET / 4).unwrap_err();
        assert!(too_little.to_string().contains("MiB"), "{too_little}");
        assert!(check_room(usize::MAX).is_err());
    }
}
