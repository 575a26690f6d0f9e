//! Whether a seccomp filter permits a system call: classic BPF over `struct seccomp_data`. Pure.
//!
//! Source: kernel/seccomp.c, seccomp_check_filter, for the permitted instructions; net/core/filter.c, bpf_convert_filter, for
//! their meaning.

/// The input of a filter: `struct seccomp_data`.
#[derive(Clone, Copy, Debug)]
pub struct SeccompData {
    /// The number of the call.
    pub number: i32,
    /// AUDIT_ARCH of the caller.
    pub arch: u32,
    /// The address after the instruction.
    pub instruction_pointer: u64,
    pub arguments: [u64; 6],
}

impl SeccompData {
    /// The word at a byte offset of `struct seccomp_data`.
    fn word(&self, offset: u32) -> Option<u32> {
        let low = |value: u64| u32::try_from(value & 0xffff_ffff).expect("masked");
        let half = |value: u64, byte: u32| low(value >> (byte * 8));
        match offset {
            0 => Some(self.number.cast_unsigned()),
            4 => Some(self.arch),
            8 | 12 => Some(half(self.instruction_pointer, offset - 8)),
            16..=60 if offset.is_multiple_of(4) => {
                let argument = usize::try_from((offset - 16) / 8).ok()?;
                Some(half(self.arguments[argument], (offset - 16) % 8))
            }
            _ => None,
        }
    }
}

/// Whether the verdict of one of `programs` may depend on the address at which the thread makes the call.
pub fn any_reads_instruction_pointer(programs: &[Vec<u64>]) -> bool {
    /// BPF_LD | BPF_W | BPF_ABS
    const LOAD: u16 = 0x20;
    let reads = |word: &u64| {
        let Instruction { code, k, .. } = Instruction::from(*word);
        code == LOAD && matches!(k, 8 | 12)
    };
    programs.iter().flatten().any(reads)
}

/// Whether every one of `programs` permits the call without further effect: SECCOMP_RET_ALLOW or SECCOMP_RET_LOG. An
/// invalid program does not.
pub fn all_permit(programs: &[Vec<u64>], data: &SeccompData) -> bool {
    programs
        .iter()
        .all(|program| run(program, data).is_some_and(permits))
}

/// include/uapi/linux/seccomp.h
fn permits(verdict: u32) -> bool {
    const ACTION: u32 = 0xffff_0000;
    const ALLOW: u32 = 0x7fff_0000;
    const LOG: u32 = 0x7ffc_0000;
    matches!(verdict & ACTION, ALLOW | LOG)
}

/// The verdict of a program; `None` if the kernel would not have accepted the program.
fn run(program: &[u64], data: &SeccompData) -> Option<u32> {
    const LENGTH: u32 = 64;
    let (mut a, mut x) = (0u32, 0u32);
    let mut memory = [0u32; 16];
    let mut next = 0usize;
    // Jumps only go forward, so it ends.
    loop {
        let Instruction { code, jt, jf, k } = Instruction::from(*program.get(next)?);
        next += 1;
        // The classes of instructions and their modes: include/uapi/linux/bpf_common.h.
        let operand = if code & 0x08 == 0 { k } else { x };
        let slot = usize::try_from(k).ok()?;
        match code {
            0x20 => a = data.word(k)?,
            0x80 => a = LENGTH,
            0x81 => x = LENGTH,
            0x00 => a = k,
            0x01 => x = k,
            0x60 => a = *memory.get(slot)?,
            0x61 => x = *memory.get(slot)?,
            0x02 => *memory.get_mut(slot)? = a,
            0x03 => *memory.get_mut(slot)? = x,
            0x04 | 0x0c => a = a.wrapping_add(operand),
            0x14 | 0x1c => a = a.wrapping_sub(operand),
            0x24 | 0x2c => a = a.wrapping_mul(operand),
            // Division by zero ends a program with 0, which is SECCOMP_RET_KILL_THREAD.
            0x34 | 0x3c => match a.checked_div(operand) {
                Some(quotient) => a = quotient,
                None => return Some(0),
            },
            0x44 | 0x4c => a |= operand,
            0x54 | 0x5c => a &= operand,
            0x64 | 0x6c => a = a.wrapping_shl(operand),
            0x74 | 0x7c => a = a.wrapping_shr(operand),
            0xa4 | 0xac => a ^= operand,
            0x84 => a = a.wrapping_neg(),
            0x05 => next = next.checked_add(slot)?,
            0x15 | 0x1d => next += if a == operand { jt } else { jf },
            0x25 | 0x2d => next += if a > operand { jt } else { jf },
            0x35 | 0x3d => next += if a >= operand { jt } else { jf },
            0x45 | 0x4d => next += if a & operand != 0 { jt } else { jf },
            0x06 => return Some(k),
            0x16 => return Some(a),
            0x07 => x = a,
            0x87 => a = x,
            _ => return None,
        }
    }
}

/// `struct sock_filter`.
struct Instruction {
    code: u16,
    jt: usize,
    jf: usize,
    k: u32,
}

impl From<u64> for Instruction {
    fn from(word: u64) -> Self {
        let [c0, c1, jt, jf, k @ ..] = word.to_ne_bytes();
        Instruction {
            code: u16::from_ne_bytes([c0, c1]),
            jt: jt.into(),
            jf: jf.into(),
            k: u32::from_ne_bytes(k),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn op(code: u16, jt: u8, jf: u8, k: u32) -> u64 {
        let (code, k) = (code.to_ne_bytes(), k.to_ne_bytes());
        u64::from_ne_bytes([code[0], code[1], jt, jf, k[0], k[1], k[2], k[3]])
    }

    const ALLOW: u32 = 0x7fff_0000;
    const KILL: u32 = 0x8000_0000;
    const ERRNO: u32 = 0x0005_0001;
    const TRACE: u32 = 0x7ff0_0000;
    const LOG: u32 = 0x7ffc_0000;
    const ARCH: u32 = 0xc000_003e;
    const CLOSE: i32 = 3;

    fn data(number: i32, first: u64) -> SeccompData {
        SeccompData {
            number,
            arch: ARCH,
            instruction_pointer: 0x7f12_3456_789a,
            arguments: [first, 2, 3, 4, 5, 6],
        }
    }

    /// A filter as systemd and the container runtimes write it: the architecture, then a list of numbers.
    fn all_but(number: i32, verdict: u32) -> Vec<u64> {
        vec![
            op(0x20, 0, 0, 4),
            op(0x15, 1, 0, ARCH),
            op(0x06, 0, 0, KILL),
            op(0x20, 0, 0, 0),
            op(0x15, 0, 1, number.cast_unsigned()),
            op(0x06, 0, 0, verdict),
            op(0x06, 0, 0, ALLOW),
        ]
    }

    #[test]
    fn a_filter_that_forbids_close_is_detected() {
        for verdict in [KILL, 0, ERRNO, TRACE, 0x7fc0_0000, 0x0003_0000] {
            let filter = vec![all_but(CLOSE, verdict)];
            assert!(!all_permit(&filter, &data(CLOSE, 7)), "{verdict:#x}");
            assert!(all_permit(&filter, &data(CLOSE + 1, 7)));
        }
        assert!(all_permit(&[all_but(CLOSE, LOG)], &data(CLOSE, 7)));
        assert!(all_permit(&[], &data(CLOSE, 7)));
        // One of several filters is enough to forbid it.
        let filters = [all_but(99, KILL), all_but(CLOSE, KILL)];
        assert!(!all_permit(&filters, &data(CLOSE, 7)));
        let mut other = data(CLOSE, 7);
        other.arch = 0x4000_0003;
        assert!(!all_permit(&[all_but(99, KILL)], &other));
    }

    #[test]
    fn arguments_and_the_address_are_checked() {
        // Permit close only below 1000.
        let filter = vec![
            op(0x20, 0, 0, 16),
            op(0x35, 0, 1, 1000),
            op(0x06, 0, 0, KILL),
            op(0x20, 0, 0, 20),
            op(0x15, 1, 0, 0),
            op(0x06, 0, 0, KILL),
            op(0x06, 0, 0, ALLOW),
        ];
        assert!(all_permit(std::slice::from_ref(&filter), &data(CLOSE, 999)));
        assert!(!all_permit(
            std::slice::from_ref(&filter),
            &data(CLOSE, 1000)
        ));
        assert!(!all_permit(&[filter], &data(CLOSE, 1 << 32)));
        let address = vec![
            op(0x20, 0, 0, 12),
            op(0x15, 0, 1, 0x7f12),
            op(0x06, 0, 0, ALLOW),
            op(0x06, 0, 0, KILL),
        ];
        assert!(all_permit(&[address], &data(CLOSE, 0)));
    }

    #[test]
    fn every_instruction_is_interpreted_as_the_kernel_does() {
        let verdict = |program: &[u64]| run(program, &data(CLOSE, 7));
        let with =
            |code: u16, k: u32| verdict(&[op(0, 0, 0, 12), op(code, 0, 0, k), op(0x16, 0, 0, 0)]);
        assert_eq!(with(0x04, 5), Some(17));
        assert_eq!(with(0x14, 13), Some(u32::MAX));
        assert_eq!(with(0x24, 3), Some(36));
        assert_eq!(with(0x34, 5), Some(2));
        assert_eq!(with(0x34, 0), Some(0));
        assert_eq!(with(0x44, 3), Some(15));
        assert_eq!(with(0x54, 10), Some(8));
        assert_eq!(with(0x64, 1), Some(24));
        assert_eq!(with(0x74, 1), Some(6));
        assert_eq!(with(0xa4, 15), Some(3));
        assert_eq!(with(0x84, 0), Some(12u32.wrapping_neg()));
        // Through x and memory, and back.
        let program = [
            op(0x01, 0, 0, 40),
            op(0x03, 0, 0, 5),
            op(0x60, 0, 0, 5),
            op(0x0c, 0, 0, 0),
            op(0x07, 0, 0, 0),
            op(0x00, 0, 0, 0),
            op(0x87, 0, 0, 0),
            op(0x16, 0, 0, 0),
        ];
        assert_eq!(verdict(&program), Some(80));
        // Jumps, taken and not taken.
        let jumps = [
            op(0x05, 0, 0, 1),
            op(0x06, 0, 0, 1),
            op(0x80, 0, 0, 0),
            op(0x25, 0, 1, 63),
            op(0x45, 1, 0, 64),
            op(0x06, 0, 0, 2),
            op(0x06, 0, 0, 3),
        ];
        assert_eq!(verdict(&jumps), Some(3));
        // Programs that the kernel would not have accepted.
        for bad in [
            vec![],
            vec![op(0x20, 0, 0, 64), op(0x06, 0, 0, ALLOW)],
            vec![op(0x20, 0, 0, 1), op(0x06, 0, 0, ALLOW)],
            vec![op(0x60, 0, 0, 16), op(0x06, 0, 0, ALLOW)],
            vec![op(0x28, 0, 0, 0), op(0x06, 0, 0, ALLOW)],
            vec![op(0x05, 0, 0, 9), op(0x06, 0, 0, ALLOW)],
        ] {
            assert_eq!(verdict(&bad), None);
        }
    }

    #[test]
    fn filters_that_read_the_address_are_detected() {
        let number = vec![op(0x20, 0, 0, 0), op(0x06, 0, 0, ALLOW)];
        let arguments = vec![op(0x20, 0, 0, 16), op(0x00, 0, 0, 8), op(0x06, 0, 0, ALLOW)];
        assert!(!any_reads_instruction_pointer(&[number.clone(), arguments]));
        for half in [8, 12] {
            let place = vec![op(0x20, 0, 0, half), op(0x06, 0, 0, ALLOW)];
            assert!(any_reads_instruction_pointer(&[number.clone(), place]));
        }
    }
}
