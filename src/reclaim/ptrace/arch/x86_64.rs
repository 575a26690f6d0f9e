//! x86-64. Source: arch/x86/include/asm/user_64.h (struct user_regs_struct), arch/x86/kernel/signal.c
//! (arch_do_signal_or_restart).

use crate::proc::syscall::Syscall;

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
/// The registers of the arguments of a system call.
const ARGUMENTS: [usize; 6] = [RDI, RSI, RDX, R10, R8, R9];
const RIP: usize = 16;
const CS: usize = 17;

/// Results by which the kernel marks a call that it will restart. Source: include/linux/errno.h.
const RESTARTS: [i64; 4] = [-512, -513, -514, -516];
/// -ERESTARTNOHAND
const RESTART_UNLESS_HANDLED: i64 = -514;

impl Registers {
    pub const WORDS: usize = 27;
    /// The instruction with which the program enters the kernel: `syscall`.
    pub const INSTRUCTION: &'static [u8] = &[0x0f, 0x05];
    /// include/uapi/linux/audit.h, AUDIT_ARCH_X86_64.
    pub const AUDIT_ARCH: u32 = 0xc000_003e;

    /// Whether the thread runs 64-bit code, and so uses the 64-bit numbers of system calls.
    pub fn is_native(&self) -> bool {
        // arch/x86/include/asm/segment.h, __USER_CS.
        self.0[CS] == 0x33
    }

    /// The address after the instruction, at a stop in a call.
    pub fn pc(&self) -> u64 {
        self.0[RIP]
    }

    /// The call that a stopped thread is in, or has just left without having seen its result.
    pub fn syscall(&self, _is_instruction: &dyn Fn(u64) -> bool) -> Option<Syscall> {
        let number = self.0[ORIG_RAX].cast_signed();
        (number >= 0).then(|| Syscall {
            number,
            arguments: ARGUMENTS.map(|register| self.0[register]),
        })
    }

    /// Whether the kernel restarts the thread's call when the thread goes on.
    pub fn restarts(&self, _is_instruction: &dyn Fn(u64) -> bool) -> bool {
        self.0[ORIG_RAX].cast_signed() >= 0 && RESTARTS.contains(&self.result())
    }

    /// The result of the call.
    pub fn result(&self) -> i64 {
        self.0[RAX].cast_signed()
    }

    /// For a call that ended with EINTR because cwkill stopped the thread: the registers with which the kernel restarts it,
    /// unless a signal with a handler ended it.
    pub fn restart_eintr(&self) -> Option<Self> {
        let call = self.syscall(&|_| false)?;
        let ended = self.result() == -i64::from(libc::EINTR);
        (ended && ENDED_BY_A_STOP.contains(&call.number)).then(|| {
            let mut registers = *self;
            registers.0[RAX] = RESTART_UNLESS_HANDLED.cast_unsigned();
            registers
        })
    }

    /// From the registers at the entry of a call: those that replace it by call `number`. The arguments beyond the given ones
    /// stay as they are.
    pub fn with_syscall(&self, number: i64, arguments: &[u64]) -> Self {
        let mut registers = *self;
        registers.0[ORIG_RAX] = number.cast_unsigned();
        for (register, argument) in ARGUMENTS.into_iter().zip(arguments) {
            registers.0[register] = *argument;
        }
        registers
    }

    /// From the registers at the entry of call `number`: those of a thread that is about to make it.
    pub fn before_syscall(&self, number: i64) -> Self {
        let mut registers = *self;
        registers.0[RIP] = registers.0[RIP].wrapping_sub(Self::INSTRUCTION.len() as u64);
        registers.0[RAX] = number.cast_unsigned();
        // Not in a call, so the kernel restarts nothing.
        registers.0[ORIG_RAX] = u64::MAX;
        registers
    }

    /// The registers with which the thread is released. If the kernel restarts the call in which cwkill stopped it, they are
    /// those at the stop (`at_stop`), and the kernel decides as if cwkill had not been there. Otherwise the thread is about to make its call.
    pub fn restored(at_stop: &Self, entry: &Self, number: i64) -> Self {
        match at_stop.restarts(&|_| false) {
            true => *at_stop,
            false => entry.before_syscall(number),
        }
    }

    /// These registers, for a thread that has stopped for a signal.
    pub fn at_signal(&self, _current: &Self) -> Self {
        *self
    }
}

/// arch/x86/entry/syscalls/syscall_64.tbl; libc does not have it.
const IO_PGETEVENTS: i64 = 333;

/// Calls that end with EINTR if their thread is stopped and continued, even without a signal. They have had no effect then, so
/// the thread can make them again. Source: signal(7), "Interruption of system calls and library functions by stop signals";
/// fs/eventpoll.c, ep_poll; net/core/sock.c, sock_intr_errno.
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
    // On a socket with SO_RCVTIMEO or SO_SNDTIMEO, or on inotify.
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

    /// A thread in call `number`, which returned `result`.
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
    fn a_call_is_replaced_and_then_made() {
        let entry = thread(libc::SYS_futex, -38);
        let remote = entry.with_syscall(libc::SYS_close, &[9]);
        let call = remote.syscall(&|_| false).unwrap();
        assert_eq!(
            (call.number, call.arguments[..3].to_vec()),
            (libc::SYS_close, vec![9, 2, 3])
        );
        assert_eq!(remote.pc(), entry.pc());
        let six = entry.with_syscall(libc::SYS_mmap, &[1, 2, 3, 4, 5, 6]);
        let call = six.syscall(&|_| false).unwrap();
        assert_eq!(
            (call.number, call.arguments),
            (libc::SYS_mmap, [1, 2, 3, 4, 5, 6])
        );
        let before = entry.before_syscall(libc::SYS_futex);
        assert_eq!(before.pc(), 0x40_1000);
        assert_eq!(before.result(), libc::SYS_futex);
        assert_eq!(
            before.syscall(&|_| false),
            None,
            "nothing is restarted twice"
        );
        // All other registers keep their values.
        for word in (0..Registers::WORDS).filter(|word| ![RAX, ORIG_RAX, RIP].contains(word)) {
            assert_eq!(before.0[word], entry.0[word], "{word}");
        }
    }

    #[test]
    fn a_pending_restart_is_left_to_the_kernel() {
        let entry = thread(libc::SYS_restart_syscall, -38);
        for result in RESTARTS {
            let at_stop = thread(libc::SYS_poll, result);
            let restored = Registers::restored(&at_stop, &entry, libc::SYS_restart_syscall);
            assert_eq!(restored, at_stop);
        }
        let running = thread(-1, 5);
        let entry = thread(libc::SYS_write, -38);
        let restored = Registers::restored(&running, &entry, libc::SYS_write);
        assert_eq!(restored, entry.before_syscall(libc::SYS_write));
        // The result of a finished call does not count as a restart.
        assert!(!thread(-1, -512).restarts(&|_| false));
        assert!(!thread(libc::SYS_read, 512).restarts(&|_| false));
    }

    #[test]
    fn only_a_call_that_the_stop_ended_is_restarted() {
        let eintr = -i64::from(libc::EINTR);
        for call in [libc::SYS_epoll_wait, libc::SYS_sendfile, libc::SYS_splice] {
            let restarted = thread(call, eintr).restart_eintr().unwrap();
            assert!(restarted.restarts(&|_| false));
            assert_eq!(restarted.result(), RESTART_UNLESS_HANDLED);
        }
        for other in [
            thread(libc::SYS_epoll_wait, 3),
            thread(libc::SYS_epoll_wait, -514),
            // It may have had its effect already.
            thread(libc::SYS_connect, eintr),
            thread(-1, eintr),
        ] {
            assert_eq!(other.restart_eintr(), None);
        }
    }

    #[test]
    fn code_of_32_bits_is_detected() {
        assert!(thread(0, 0).is_native());
        let mut compat = thread(0, 0);
        // __USER32_CS
        compat.0[CS] = 0x23;
        assert!(!compat.is_native());
    }
}
