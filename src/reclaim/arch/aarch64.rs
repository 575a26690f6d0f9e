//! aarch64. Source: arch/arm64/include/uapi/asm/ptrace.h (struct user_pt_regs), arch/arm64/kernel/signal.c
//! (do_signal), arch/arm64/kernel/syscall.c.
//!
//! Two things differ from x86-64. The number of a call is in a register set of its own
//! ([`crate::sys::ptrace_set_call_number`]), so x8 keeps what the program put there. And a call that is to
//! be made again has been rewound before its thread can be seen: the thread stands at the instruction, and
//! what the call gave is gone.

use super::Call;

/// The general registers, in the order of `struct user_pt_regs`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registers(pub [u64; 34]);

const X0: usize = 0;
const X8: usize = 8;
const PC: usize = 32;

impl Registers {
    /// How many words there are.
    pub const WORDS: usize = 34;
    /// What the program enters the kernel with: `svc #0`.
    pub const INSTRUCTION: &'static [u8] = &[0x01, 0x00, 0x00, 0xd4];
    /// include/uapi/linux/audit.h, AUDIT_ARCH_AARCH64.
    pub const AUDIT_ARCH: u32 = 0xc000_00b7;

    /// Whether the thread runs 64-bit code. A 32-bit one has other registers, and fewer.
    pub fn is_native(&self) -> bool {
        true
    }

    /// The address behind the instruction, at a stop in a call.
    pub fn pc(&self) -> u64 {
        self.0[PC]
    }

    /// The call that a stopped thread is about to make, again if it was stopped in it.
    ///
    /// `at` says whether the instruction is at an address of the thread.
    pub fn call(&self, at: &dyn Fn(u64) -> bool) -> Option<Call> {
        at(self.0[PC]).then(|| Call {
            number: self.0[X8].cast_signed(),
            arguments: std::array::from_fn(|argument| self.0[X0 + argument]),
        })
    }

    /// Whether the thread makes its call again when it goes on.
    pub fn restarts(&self, at: &dyn Fn(u64) -> bool) -> bool {
        at(self.0[PC])
    }

    /// What the call gave.
    pub fn result(&self) -> i64 {
        self.0[X0].cast_signed()
    }

    /// A call that our stopping it has ended with EINTR cannot be told from one that a signal has ended.
    pub fn repeated(&self) -> Option<Self> {
        None
    }

    /// From the registers at the beginning of a call: those that give another call these arguments. Its
    /// number is set apart.
    pub fn instead(&self, _number: i64, arguments: &[u64]) -> Self {
        let mut registers = *self;
        registers.0[X0..X0 + arguments.len()].copy_from_slice(arguments);
        registers
    }

    /// From the registers at the beginning of call `number`: those of a thread that is about to make it.
    pub fn again(&self, _number: i64) -> Self {
        let mut registers = *self;
        registers.0[PC] = registers.0[PC].wrapping_sub(Self::INSTRUCTION.len() as u64);
        registers
    }

    /// What the thread is let go with: about to make its call. With a call that continues another
    /// (restart_syscall), x8 says so since the thread left its first stop.
    pub fn let_go(_stopped: &Self, entered: &Self, number: i64) -> Self {
        entered.again(number)
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
    fn a_call_is_exchanged_and_made_again() {
        let entered = thread(0x1004);
        let ours = entered.instead(CLOSE, &[9]);
        assert_eq!(ours.0[..3], [9, 2, 3]);
        assert_eq!(ours.0[X8], FUTEX, "the program's own");
        assert_eq!(ours.pc(), entered.pc());
        let again = entered.again(FUTEX.cast_signed());
        assert_eq!(again.pc(), 0x1000);
        for at in (0..Registers::WORDS).filter(|at| *at != PC) {
            assert_eq!(again.0[at], entered.0[at], "{at}");
        }
        let gone = Registers::let_go(&thread(0x1000), &entered, FUTEX.cast_signed());
        assert_eq!(gone, again);
    }

    #[test]
    fn a_thread_at_the_instruction_is_in_its_call() {
        let at = |address| address == 0x1000;
        let call = thread(0x1000).call(&at).unwrap();
        assert_eq!(call.number, FUTEX.cast_signed());
        assert_eq!(call.arguments[..3], [1, 2, 3]);
        assert!(thread(0x1000).restarts(&at));
        assert_eq!(thread(0x1004).call(&at), None);
        assert!(!thread(0x1004).restarts(&at));
        assert_eq!(thread(0x1000).repeated(), None);
    }
}
