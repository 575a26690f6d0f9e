//! aarch64. Source: arch/arm64/include/uapi/asm/ptrace.h (struct user_pt_regs), arch/arm64/kernel/signal.c
//! (do_signal), arch/arm64/kernel/syscall.c.
//!
//! Three things differ from x86-64. The number of a call has its own register set
//! ([`crate::sys::ptrace::set_call_number`]), so x8 keeps the program's value. If the kernel will restart a call, it moves the
//! thread back to the instruction before the tracer sees it, and the result of the call is lost. At the entry and the exit of a call the
//! tracer sees another value in x7, and the kernel ignores what the tracer writes there (arch/arm64/kernel/ptrace.c, report_syscall).

use crate::proc::syscall::Syscall;

/// The general registers, in the order of `struct user_pt_regs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registers(pub [u64; 34]);

const X0: usize = 0;
/// At the entry and the exit of a call, the tracer sees 0 or 1 in place of its value.
const X7: usize = 7;
const X8: usize = 8;
const PC: usize = 32;

impl Registers {
    pub const WORDS: usize = 34;
    /// The instruction with which the program enters the kernel: `svc #0`.
    pub const INSTRUCTION: &'static [u8] = &[0x01, 0x00, 0x00, 0xd4];
    /// include/uapi/linux/audit.h, AUDIT_ARCH_AARCH64.
    pub const AUDIT_ARCH: u32 = 0xc000_00b7;

    /// Whether the thread runs 64-bit code. Always true: a 32-bit thread has fewer registers, so reading them fails before.
    pub fn is_native(&self) -> bool {
        true
    }

    /// The address after the instruction, at a stop in a call.
    pub fn pc(&self) -> u64 {
        self.0[PC]
    }

    /// The call that a stopped thread is about to make, or to make again if it was stopped in the call.
    ///
    /// `is_instruction` says whether the thread's memory has the instruction at an address.
    pub fn syscall(&self, is_instruction: &dyn Fn(u64) -> bool) -> Option<Syscall> {
        is_instruction(self.0[PC]).then(|| Syscall {
            number: self.0[X8].cast_signed(),
            arguments: std::array::from_fn(|argument| self.0[X0 + argument]),
        })
    }

    /// Whether the thread makes its call again when it goes on.
    pub fn restarts(&self, is_instruction: &dyn Fn(u64) -> bool) -> bool {
        is_instruction(self.0[PC])
    }

    /// The result of the call.
    pub fn result(&self) -> i64 {
        self.0[X0].cast_signed()
    }

    /// Always `None`: a call that ended with EINTR because cwkill stopped the thread looks like one that a signal ended.
    pub fn restart_eintr(&self) -> Option<Self> {
        None
    }

    /// From the registers at the entry of a call: those that replace its arguments. The number is set separately.
    pub fn with_syscall(&self, _number: i64, arguments: &[u64]) -> Self {
        let mut registers = *self;
        registers.0[X0..X0 + arguments.len()].copy_from_slice(arguments);
        registers
    }

    /// From the registers at the entry of call `number`: those of a thread that is about to make it.
    pub fn before_syscall(&self, _number: i64) -> Self {
        let mut registers = *self;
        registers.0[PC] = registers.0[PC].wrapping_sub(Self::INSTRUCTION.len() as u64);
        registers
    }

    /// The registers with which the thread is released: it is about to make its call. If that call continues another
    /// (restart_syscall), x8 has its number since the thread left its first stop.
    pub fn restored(_at_stop: &Self, entry: &Self, number: i64) -> Self {
        entry.before_syscall(number)
    }

    /// These registers, for a thread that has stopped for a signal. `current` are those of this stop, with its own x7.
    pub fn at_signal(&self, current: &Self) -> Self {
        let mut registers = *self;
        registers.0[X7] = current.0[X7];
        registers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FUTEX: u64 = 98;
    const CLOSE: i64 = 57;

    fn thread(pc: u64) -> Registers {
        let mut words = [7; Registers::WORDS];
        words[..3].copy_from_slice(&[1, 2, 3]);
        words[X8] = FUTEX;
        words[PC] = pc;
        Registers(words)
    }

    #[test]
    fn a_call_is_replaced_and_then_made() {
        let entry = thread(0x1004);
        let remote = entry.with_syscall(CLOSE, &[9]);
        assert_eq!(remote.0[..3], [9, 2, 3]);
        assert_eq!(remote.0[X8], FUTEX, "the program's own");
        assert_eq!(remote.pc(), entry.pc());
        let before = entry.before_syscall(FUTEX.cast_signed());
        assert_eq!(before.pc(), 0x1000);
        for word in (0..Registers::WORDS).filter(|word| *word != PC) {
            assert_eq!(before.0[word], entry.0[word], "{word}");
        }
        let restored = Registers::restored(&thread(0x1000), &entry, FUTEX.cast_signed());
        assert_eq!(restored, before);
    }

    #[test]
    fn a_signal_leaves_x7_as_it_is() {
        let mut entry = thread(0x1004);
        // The kernel shows that this is the entry of a call.
        entry.0[X7] = 0;
        let restored = Registers::restored(&thread(0x1000), &entry, FUTEX.cast_signed());
        assert_eq!(restored.at_signal(&thread(0x1000)), thread(0x1000));
    }

    #[test]
    fn a_thread_at_the_instruction_is_in_its_call() {
        let is_instruction = |address| address == 0x1000;
        let call = thread(0x1000).syscall(&is_instruction).unwrap();
        assert_eq!(call.number, FUTEX.cast_signed());
        assert_eq!(call.arguments[..3], [1, 2, 3]);
        assert!(thread(0x1000).restarts(&is_instruction));
        assert_eq!(thread(0x1004).syscall(&is_instruction), None);
        assert!(!thread(0x1004).restarts(&is_instruction));
        assert_eq!(thread(0x1000).restart_eintr(), None);
    }
}
