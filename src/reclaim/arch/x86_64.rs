//! x86-64. Source: arch/x86/include/asm/user_64.h (struct user_regs_struct), arch/x86/kernel/signal.c
//! (arch_do_signal_or_restart).

use super::{Call, RESTARTS};

/// The general registers, in the order of `struct user_regs_struct`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Registers(pub [u64; 27]);

const R10: usize = 7;
const R9: usize = 8;
const R8: usize = 9;
const RAX: usize = 10;
const RDX: usize = 12;
const RSI: usize = 13;
const RDI: usize = 14;
const ORIG_RAX: usize = 15;
const RIP: usize = 16;
const CS: usize = 17;

/// -ERESTARTNOHAND
const RESTART_UNLESS_HANDLED: i64 = -514;

impl Registers {
    /// How many words there are.
    pub const WORDS: usize = 27;
    /// What the program enters the kernel with: `syscall`.
    pub const INSTRUCTION: &'static [u8] = &[0x0f, 0x05];
    /// include/uapi/linux/audit.h, AUDIT_ARCH_X86_64.
    pub const AUDIT_ARCH: u32 = 0xc000_003e;

    /// Whether the thread runs 64-bit code: the numbers of calls are then those we know.
    pub fn is_native(&self) -> bool {
        // arch/x86/include/asm/segment.h, __USER_CS.
        self.0[CS] == 0x33
    }

    /// The address behind the instruction, at a stop in a call.
    pub fn pc(&self) -> u64 {
        self.0[RIP]
    }

    /// The call that a stopped thread is in, or has just left and not looked at.
    ///
    /// `at` reads the code of the thread; here it is not needed.
    pub fn call(&self, _at: &dyn Fn(u64) -> bool) -> Option<Call> {
        let number = self.0[ORIG_RAX].cast_signed();
        (number >= 0).then(|| Call {
            number,
            arguments: [RDI, RSI, RDX, R10, R8, R9].map(|at| self.0[at]),
        })
    }

    /// Whether the kernel makes the thread's call again when the thread goes on.
    pub fn restarts(&self, _at: &dyn Fn(u64) -> bool) -> bool {
        self.0[ORIG_RAX].cast_signed() >= 0 && RESTARTS.contains(&self.result())
    }

    /// What the call gave.
    pub fn result(&self) -> i64 {
        self.0[RAX].cast_signed()
    }

    /// Where our stopping it has ended the call with EINTR: the same, to be made again unless a signal
    /// with a handler is what ended it.
    pub fn repeated(&self) -> Option<Self> {
        let call = self.call(&|_| false)?;
        let ended = self.result() == -i64::from(libc::EINTR);
        (ended && ENDED_BY_A_STOP.contains(&call.number)).then(|| {
            let mut registers = *self;
            registers.0[RAX] = RESTART_UNLESS_HANDLED.cast_unsigned();
            registers
        })
    }

    /// From the registers at the beginning of a call: those that make it call `number` instead, with up to
    /// three arguments. The others stay as they are.
    pub fn instead(&self, number: i64, arguments: &[u64]) -> Self {
        let mut registers = *self;
        registers.0[ORIG_RAX] = number.cast_unsigned();
        for (at, argument) in [RDI, RSI, RDX].into_iter().zip(arguments) {
            registers.0[at] = *argument;
        }
        registers
    }

    /// From the registers at the beginning of call `number`: those of a thread that is about to make it.
    pub fn again(&self, number: i64) -> Self {
        let mut registers = *self;
        registers.0[RIP] = registers.0[RIP].wrapping_sub(Self::INSTRUCTION.len() as u64);
        registers.0[RAX] = number.cast_unsigned();
        // In no call: nothing is to be restarted.
        registers.0[ORIG_RAX] = u64::MAX;
        registers
    }

    /// What the thread is let go with: as it was when it was stopped, if it was in a call that the kernel
    /// restarts (it then decides as if we had not been there), else about to make its call.
    pub fn let_go(stopped: &Self, entered: &Self, number: i64) -> Self {
        match stopped.restarts(&|_| false) {
            true => *stopped,
            false => entered.again(number),
        }
    }
}

/// arch/x86/entry/syscalls/syscall_64.tbl; libc does not have it.
const IO_PGETEVENTS: i64 = 333;

/// Calls that end with EINTR when their thread is stopped and goes on, whatever stopped it. They have
/// done nothing then, and can be made again. Source: signal(7), "Interruption of system calls and
/// library functions by stop signals"; fs/eventpoll.c, ep_poll; net/core/sock.c, sock_intr_errno.
const ENDED_BY_A_STOP: [i64; 23] = [
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_semop,
    libc::SYS_semtimedop,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_io_getevents,
    IO_PGETEVENTS,
    libc::SYS_io_uring_enter,
    // With SO_RCVTIMEO or SO_SNDTIMEO, or of inotify.
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_recvmmsg,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_sendmmsg,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_sendfile,
    libc::SYS_splice,
];

#[cfg(test)]
mod tests {
    use super::*;

    /// A thread in the kernel for `number`, which gave `result`.
    fn thread(number: i64, result: i64) -> Registers {
        let mut words = [7; Registers::WORDS];
        words[ORIG_RAX] = number.cast_unsigned();
        words[RAX] = result.cast_unsigned();
        words[RIP] = 0x40_1002;
        words[CS] = 0x33;
        [words[RDI], words[RSI], words[RDX]] = [1, 2, 3];
        Registers(words)
    }

    #[test]
    fn a_call_is_exchanged_and_made_again() {
        let entered = thread(libc::SYS_futex, -38);
        let ours = entered.instead(libc::SYS_close, &[9]);
        let call = ours.call(&|_| false).unwrap();
        assert_eq!(
            (call.number, call.arguments[..3].to_vec()),
            (libc::SYS_close, vec![9, 2, 3])
        );
        assert_eq!(ours.pc(), entered.pc());
        let again = entered.again(libc::SYS_futex);
        assert_eq!(again.pc(), 0x40_1000);
        assert_eq!(again.result(), libc::SYS_futex);
        assert_eq!(again.call(&|_| false), None, "nothing is restarted twice");
        // Everything else is as the thread has it.
        for at in (0..Registers::WORDS).filter(|at| ![RAX, ORIG_RAX, RIP].contains(at)) {
            assert_eq!(again.0[at], entered.0[at], "{at}");
        }
    }

    #[test]
    fn a_pending_restart_is_left_to_the_kernel() {
        let entered = thread(libc::SYS_restart_syscall, -38);
        for result in RESTARTS {
            let stopped = thread(libc::SYS_poll, result);
            let gone = Registers::let_go(&stopped, &entered, libc::SYS_restart_syscall);
            assert_eq!(gone, stopped);
        }
        let running = thread(-1, 5);
        let entered = thread(libc::SYS_write, -38);
        let gone = Registers::let_go(&running, &entered, libc::SYS_write);
        assert_eq!(gone, entered.again(libc::SYS_write));
        // The result of a call that is over is not taken for a restart.
        assert!(!thread(-1, -512).restarts(&|_| false));
        assert!(!thread(libc::SYS_read, 512).restarts(&|_| false));
    }

    #[test]
    fn only_what_the_stop_ended_is_repeated() {
        let eintr = -i64::from(libc::EINTR);
        for call in [libc::SYS_epoll_wait, libc::SYS_sendfile, libc::SYS_splice] {
            let repeated = thread(call, eintr).repeated().unwrap();
            assert!(repeated.restarts(&|_| false));
            assert_eq!(repeated.result(), RESTART_UNLESS_HANDLED);
        }
        for other in [
            thread(libc::SYS_epoll_wait, 3),
            thread(libc::SYS_epoll_wait, -514),
            // May have been made already.
            thread(libc::SYS_connect, eintr),
            thread(-1, eintr),
        ] {
            assert_eq!(other.repeated(), None);
        }
    }

    #[test]
    fn code_of_another_width_is_known() {
        assert!(thread(0, 0).is_native());
        let mut narrow = thread(0, 0);
        narrow.0[CS] = 0x23;
        assert!(!narrow.is_native());
    }
}
