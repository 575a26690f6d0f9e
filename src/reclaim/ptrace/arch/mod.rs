//! Registers of a thread, and how they change so that the thread makes a system call of cwkill in place of its own.
//! Pure; one file per processor, each compiled and tested on every host.
//!
//! cwkill does not search for an instruction and does not write to the owner's memory: it uses the instruction with which
//! the thread itself enters the kernel. At the entry of the thread's own call it replaces the number and the arguments. At
//! the exit it moves the thread back to the instruction, so that the thread's own call runs as if nothing had happened.

#[cfg(any(test, target_arch = "aarch64"))]
#[cfg_attr(
    not(target_arch = "aarch64"),
    allow(dead_code, reason = "compiled for its tests only")
)]
mod aarch64;
#[cfg(any(test, target_arch = "x86_64"))]
#[cfg_attr(
    not(target_arch = "x86_64"),
    allow(dead_code, reason = "compiled for its tests only")
)]
mod x86_64;

#[cfg(target_arch = "aarch64")]
pub use aarch64::Registers;
#[cfg(target_arch = "x86_64")]
pub use x86_64::Registers;

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
compile_error!("cwkill --reclaim knows the registers of x86-64 and aarch64 only");
