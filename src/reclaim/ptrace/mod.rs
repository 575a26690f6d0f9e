//! Stopping a process with ptrace(2), and making system calls in one of its threads.
//!
//! - [`stop`]: every thread of a process is stopped, and released when the [`StoppedProcess`] is dropped
//! - [`remote`]: one stopped thread makes a system call of cwkill in place of its own
//! - [`arch`]: the registers of a processor (pure)

mod arch;
mod remote;
mod stop;

use std::io::IoSlice;

use nix::sys::uio::{RemoteIoVec, process_vm_writev};
use nix::unistd::Pid;

use super::error::OwnerError;
use crate::proc::syscall::read_memory;
use crate::sys::ptrace;
use arch::Registers;

pub use remote::RemoteThread;
pub use stop::{SeizedThreads, StoppedProcess, Thread};

/// The registers of a stopped thread; `None` if the thread is gone or runs 32-bit code.
fn read_registers(tid: i32) -> Option<Registers> {
    let mut words = [0; Registers::WORDS];
    let read = ptrace::registers(tid, &mut words).ok()?;
    let registers = Registers(words);
    (read == size_of_val(&words) && registers.is_native()).then_some(registers)
}

fn write_registers(tid: i32, registers: &Registers) -> Result<(), OwnerError> {
    ptrace::set_registers(tid, &registers.0)
        .map_err(|error| OwnerError::of_step("PTRACE_SETREGSET", &error))
}

/// Whether the owner has the instruction that enters the kernel at `address`.
fn is_syscall_instruction(tid: i32, address: u64) -> bool {
    read_memory(tid, address, Registers::INSTRUCTION.len())
        .is_some_and(|code| code == Registers::INSTRUCTION)
}

/// Writes `bytes` to the memory of the process of `tid`. Returns whether all were written.
fn write_memory(tid: i32, address: u64, bytes: &[u8]) -> bool {
    let Ok(base) = usize::try_from(address) else {
        return false;
    };
    let remote = RemoteIoVec {
        base,
        len: bytes.len(),
    };
    let written = process_vm_writev(Pid::from_raw(tid), &[IoSlice::new(bytes)], &[remote]);
    written == Ok(bytes.len())
}
