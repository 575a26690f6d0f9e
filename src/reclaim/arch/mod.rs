//! Registers: how a thread of another process is made to run a system call of ours in place of its own.
//! Pure; one file a processor, each compiled and tested on every host.
//!
//! No instruction is looked for and no memory of the owner is written: the instruction is the one the
//! thread itself enters the kernel with. At the beginning of the thread's own call the number and the
//! arguments are exchanged; at the end of it the thread is set back to the instruction, so that its own
//! call runs as if nothing had been.

#[cfg(any(test, target_arch = "aarch64"))]
pub mod aarch64;
#[cfg(any(test, target_arch = "x86_64"))]
pub mod x86_64;

#[cfg(target_arch = "aarch64")]
pub use aarch64::Registers;
#[cfg(target_arch = "x86_64")]
pub use x86_64::Registers;

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
compile_error!("cwkill --reclaim knows the registers of x86-64 and aarch64 only");

/// A system call of a thread: its number and its arguments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// The number.
    pub number: i64,
    /// The arguments; what the call does not take is what happened to be in the register.
    pub arguments: [u64; 6],
}

/// Results with which the kernel says to itself that a call is to be made again.
/// Source: include/linux/errno.h.
pub const RESTARTS: [i64; 4] = [-512, -513, -514, -516];
