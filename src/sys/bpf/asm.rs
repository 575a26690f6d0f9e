//! A small assembler for BPF, as far as the programs of cwkill need it.
//!
//! Each method appends one instruction, except where it says so. Loads take a [`Field`], so the kernel's own description of its types
//! gives the offset and the size of every access.

use super::btf::{Array, Field, Pointer, Size};

/// An instruction. Source: include/uapi/linux/bpf.h, struct bpf_insn.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Insn {
    code: u8,
    /// The destination in the low half, the source in the high half.
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// A register. A call uses R1 to R5 for its arguments, overwrites them, and returns R0. R6 to R9 survive it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Register {
    R0,
    R1,
    R2,
    R3,
    R4,
    R6 = 6,
    R7,
    R8,
    R9,
    /// The end of the stack of 512 bytes. Only to read.
    R10,
}

use Register::{R0, R10};

/// The part of an instruction code for the width of an access (BPF_B and so on).
fn width(size: Size) -> u8 {
    match size {
        Size::U8 => 0x10,
        Size::U16 => 0x08,
        Size::U32 => 0x00,
        Size::U64 => 0x18,
    }
}

/// A helper function of the kernel, by its number in include/uapi/linux/bpf.h.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(i32)]
pub enum Helper {
    /// `bpf_map_lookup_elem(map, key)`: the address of the value, or NULL.
    MapLookup = 1,
    /// `bpf_ktime_get_ns()`: CLOCK_MONOTONIC.
    Now = 5,
    /// `bpf_get_prandom_u32()`: a random number of 32 bits.
    Random = 7,
    /// `bpf_get_current_pid_tgid()`: the process in the upper half and the thread in the lower half, in the first pid namespace.
    CurrentPid = 14,
    /// `bpf_get_socket_cookie(sk)`: the socket's cookie. It gets one now if it had none.
    SocketCookie = 46,
    /// `bpf_sk_storage_get(map, sk, value, flags)`: the address of what the socket has in the map, or NULL.
    SocketStorage = 107,
    /// `bpf_probe_read_user(dst, size, address)`: 0, or an error if not all of it can be read without waiting for it.
    ReadUser = 112,
    /// `bpf_seq_write(seq, data, len)`: 0, or an error if the buffer of the reader is full. The kernel then shows the program the same
    /// object again at the next read(2).
    SeqWrite = 127,
    /// `bpf_skc_to_tcp_sock(sk)`: the same socket as a `struct tcp_sock`, or NULL if it is no full socket.
    ToTcpSock = 137,
    /// `bpf_get_current_task_btf()`: the current thread. For an iterator, the one that reads it.
    CurrentTask = 158,
    /// `bpf_sock_from_file(file)`: the socket of a file, or NULL.
    SockFromFile = 162,
    /// `bpf_task_pt_regs(task)`: the registers that the thread had when it entered the kernel.
    TaskRegisters = 175,
}

/// A place in a program to which instructions before it jump.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label(usize);

/// A program under construction.
#[derive(Debug, Default)]
pub struct Asm {
    instructions: Vec<Insn>,
    /// The instructions that jump, with the label.
    jumps: Vec<(usize, Label)>,
    /// The place of each label, once it is known.
    labels: Vec<Option<usize>>,
}

// Parts of an instruction code: include/uapi/linux/bpf_common.h and bpf.h.
const LOAD_64_BITS: u8 = 0x18;
const LOAD: u8 = 0x61;
const STORE: u8 = 0x63;
const STORE_IMMEDIATE: u8 = 0x62;
const MOVE: u8 = 0xbf;
const MOVE_IMMEDIATE: u8 = 0xb7;
const ADD_IMMEDIATE: u8 = 0x07;
const ADD: u8 = 0x0f;
const SUBTRACT: u8 = 0x1f;
const SUBTRACT_32_BITS: u8 = 0x1c;
const AND_IMMEDIATE: u8 = 0x57;
const AND: u8 = 0x5f;
const SHIFT_LEFT: u8 = 0x6f;
const SHIFT_LEFT_IMMEDIATE: u8 = 0x67;
/// On 64 bits of memory.
const ATOMIC: u8 = 0xdb;
const JUMP: u8 = 0x05;
const JUMP_IF_EQUAL_IMMEDIATE: u8 = 0x15;
const JUMP_IF_NOT_EQUAL_IMMEDIATE: u8 = 0x55;
const JUMP_IF_GREATER: u8 = 0x2d;
const JUMP_IF_NOT_EQUAL: u8 = 0x5d;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;
/// The immediates of ATOMIC (BPF_CMPXCHG, BPF_ADD).
const COMPARE_AND_EXCHANGE: i32 = 0xf1;
const ATOMIC_ADD: i32 = 0;
/// The source of a 64-bit load that stands for the map with this descriptor (BPF_PSEUDO_MAP_FD).
const OF_MAP: u8 = 1;
/// The source of a call of a function of the kernel that is not a helper (BPF_PSEUDO_KFUNC_CALL).
const OF_KERNEL: u8 = 2;
/// The source of a 64-bit load that stands for the address of a value in the map with this descriptor (BPF_PSEUDO_MAP_VALUE).
const OF_MAP_VALUE: u8 = 2;

impl Asm {
    fn push(&mut self, code: u8, dst: Register, src: u8, offset: i16, immediate: i32) -> &mut Self {
        self.instructions.push(Insn {
            code,
            registers: src << 4 | dst as u8,
            offset,
            immediate,
        });
        self
    }

    /// `dst = src`
    pub fn copy(&mut self, dst: Register, src: Register) -> &mut Self {
        self.push(MOVE, dst, src as u8, 0, 0)
    }

    /// `dst = value`
    pub fn set(&mut self, dst: Register, value: i32) -> &mut Self {
        self.push(MOVE_IMMEDIATE, dst, 0, 0, value)
    }

    /// `dst = &value`, of the only element of the array map with this descriptor. Two instructions.
    pub fn address_of_map_value(&mut self, dst: Register, map: i32) -> &mut Self {
        self.push(LOAD_64_BITS, dst, OF_MAP_VALUE, 0, map)
            .push(0, R0, 0, 0, 0)
    }

    /// `dst = &map`, of the map with this descriptor. Two instructions.
    pub fn address_of_map(&mut self, dst: Register, map: i32) -> &mut Self {
        self.push(LOAD_64_BITS, dst, OF_MAP, 0, map)
            .push(0, R0, 0, 0, 0)
    }

    /// `dst += value`
    pub fn add(&mut self, dst: Register, value: i32) -> &mut Self {
        self.push(ADD_IMMEDIATE, dst, 0, 0, value)
    }

    /// `dst += src`
    pub fn add_register(&mut self, dst: Register, src: Register) -> &mut Self {
        self.push(ADD, dst, src as u8, 0, 0)
    }

    /// `dst -= src`, in 64 bits or in 32. The upper half of `dst` is zero after 32 bits.
    pub fn subtract(&mut self, dst: Register, src: Register, size: Size) -> &mut Self {
        let code = match size {
            Size::U64 => SUBTRACT,
            Size::U8 | Size::U16 | Size::U32 => SUBTRACT_32_BITS,
        };
        self.push(code, dst, src as u8, 0, 0)
    }

    /// `dst &= mask`
    pub fn mask(&mut self, dst: Register, mask: i32) -> &mut Self {
        self.push(AND_IMMEDIATE, dst, 0, 0, mask)
    }

    /// `dst &= src`
    pub fn and(&mut self, dst: Register, src: Register) -> &mut Self {
        self.push(AND, dst, src as u8, 0, 0)
    }

    /// `dst = 1 << src`, for a `src` below 64. Two instructions, with a third that tells the verifier so.
    pub fn bit(&mut self, dst: Register, src: Register) -> &mut Self {
        self.mask(src, 63)
            .set(dst, 1)
            .push(SHIFT_LEFT, dst, src as u8, 0, 0)
    }

    /// `dst = src->field`
    pub fn load(&mut self, dst: Register, src: Register, field: Field) -> &mut Self {
        self.load_at(dst, src, field.offset, field.size)
    }

    /// `dst = src->pointer`
    pub fn follow(&mut self, dst: Register, src: Register, pointer: &Pointer<'_>) -> &mut Self {
        self.load_at(dst, src, pointer.offset, Size::U64)
    }

    /// `dst = *(size *)(src->array + skipped)`
    pub fn load_chars(
        &mut self,
        dst: Register,
        src: Register,
        array: &Array,
        skipped: i16,
        size: Size,
    ) -> &mut Self {
        self.load_at(dst, src, array.offset + skipped, size)
    }

    /// `dst = *src`, of 64 bits, for a value in a map.
    pub fn load_value(&mut self, dst: Register, src: Register) -> &mut Self {
        self.load_at(dst, src, 0, Size::U64)
    }

    /// `dst = *(size *)(src + offset)`, for what cwkill has put into a map.
    pub fn load_at(&mut self, dst: Register, src: Register, offset: i16, size: Size) -> &mut Self {
        self.push(LOAD | width(size), dst, src as u8, offset, 0)
    }

    /// Writes `src` to the stack, `below` bytes below its end.
    pub fn spill(&mut self, below: i16, size: Size, src: Register) -> &mut Self {
        self.push(STORE | width(size), R10, src as u8, -below, 0)
    }

    /// Writes `value` to the stack, `below` bytes below its end.
    pub fn spill_value(&mut self, below: i16, size: Size, value: i32) -> &mut Self {
        self.push(STORE_IMMEDIATE | width(size), R10, 0, -below, value)
    }

    /// `*(size *)(dst + offset) = src`, for a value in a map.
    pub fn store_at(&mut self, dst: Register, offset: i16, size: Size, src: Register) -> &mut Self {
        self.push(STORE | width(size), dst, src as u8, offset, 0)
    }

    /// `dst <<= bits`
    pub fn shift_left(&mut self, dst: Register, bits: i32) -> &mut Self {
        self.push(SHIFT_LEFT_IMMEDIATE, dst, 0, 0, bits)
    }

    /// At one instant: `old = *dst; if (old == R0) *dst = new; R0 = old`, of 64 bits.
    pub fn compare_and_exchange(&mut self, dst: Register, new: Register) -> &mut Self {
        self.push(ATOMIC, dst, new as u8, 0, COMPARE_AND_EXCHANGE)
    }

    /// At one instant: `*dst += src`, of 64 bits.
    pub fn add_at_once(&mut self, dst: Register, src: Register) -> &mut Self {
        self.push(ATOMIC, dst, src as u8, 0, ATOMIC_ADD)
    }

    /// Calls a helper, with what R1 to R5 hold.
    pub fn call(&mut self, helper: Helper) -> &mut Self {
        self.push(CALL, R0, 0, 0, helper as i32)
    }

    /// Calls a function of the kernel, by its number in the kernel's types, with what R1 to R5 hold.
    pub fn call_kernel(&mut self, function: u32) -> &mut Self {
        let number = i32::try_from(function).expect("the kernel has fewer types");
        self.push(CALL, R0, OF_KERNEL, 0, number)
    }

    /// A label whose place is not known yet.
    pub fn label(&mut self) -> Label {
        self.labels.push(None);
        Label(self.labels.len() - 1)
    }

    /// Puts `label` before the next instruction.
    pub fn place(&mut self, label: Label) -> &mut Self {
        self.labels[label.0] = Some(self.instructions.len());
        self
    }

    /// `goto label`
    pub fn jump(&mut self, label: Label) -> &mut Self {
        self.jump_if(JUMP, R0, 0, 0, label)
    }

    /// `if (register == value) goto label`
    pub fn if_is(&mut self, register: Register, value: i32, label: Label) -> &mut Self {
        self.jump_if(JUMP_IF_EQUAL_IMMEDIATE, register, 0, value, label)
    }

    /// `if (register != value) goto label`
    pub fn if_not(&mut self, register: Register, value: i32, label: Label) -> &mut Self {
        self.jump_if(JUMP_IF_NOT_EQUAL_IMMEDIATE, register, 0, value, label)
    }

    /// `if (register != other) goto label`
    pub fn if_differs(&mut self, register: Register, other: Register, label: Label) -> &mut Self {
        self.jump_if(JUMP_IF_NOT_EQUAL, register, other as u8, 0, label)
    }

    /// `if (register > other) goto label`, without signs.
    pub fn if_greater(&mut self, register: Register, other: Register, label: Label) -> &mut Self {
        self.jump_if(JUMP_IF_GREATER, register, other as u8, 0, label)
    }

    fn jump_if(
        &mut self,
        code: u8,
        register: Register,
        src: u8,
        value: i32,
        label: Label,
    ) -> &mut Self {
        self.jumps.push((self.instructions.len(), label));
        self.push(code, register, src, 0, value)
    }

    /// `return 0`. Two instructions. An iterator program returns 0 to go on with the next object, and every other program of cwkill
    /// returns 0, too.
    pub fn go_on(&mut self) -> &mut Self {
        self.set(R0, 0).push(EXIT, R0, 0, 0, 0)
    }

    /// The finished program.
    ///
    /// # Panics
    /// A label has no place, or one before a jump to it: the program would have a loop.
    pub fn finish(mut self) -> Vec<Insn> {
        for (at, label) in self.jumps {
            let place = self.labels[label.0].expect("every label has a place");
            // The offset counts from the next instruction.
            let distance = place.checked_sub(at + 1).expect("jumps go forward");
            self.instructions[at].offset = i16::try_from(distance).expect("a short program");
        }
        self.instructions
    }
}

#[cfg(test)]
mod tests {
    use super::Register::{R1, R2, R6};
    use super::*;

    fn code(asm: Asm) -> Vec<(u8, u8, i16, i32)> {
        let instructions = asm.finish().into_iter();
        instructions
            .map(|it| (it.code, it.registers, it.offset, it.immediate))
            .collect()
    }

    /// The codes are those of `llvm-objdump -d` for the same lines of C.
    #[test]
    fn instructions_are_encoded_as_the_kernel_reads_them() {
        let mut asm = Asm::default();
        asm.copy(R6, R1) // r6 = r1
            .set(R2, -1) // r2 = -1
            .add(R2, -32) // r2 += -32
            .and(R1, R2) // r1 &= r2
            .load(
                R1,
                R6,
                Field {
                    offset: 18,
                    size: Size::U8,
                },
            ) // r1 = *(u8 *)(r6 + 18)
            .spill(32, Size::U64, R1) // *(u64 *)(r10 - 32) = r1
            .spill_value(8, Size::U32, 7) // *(u32 *)(r10 - 8) = 7
            .call(Helper::SeqWrite) // call 127
            .go_on(); // r0 = 0, exit
        assert_eq!(
            code(asm),
            [
                (0xbf, 0x16, 0, 0),
                (0xb7, 0x02, 0, -1),
                (0x07, 0x02, 0, -32),
                (0x5f, 0x21, 0, 0),
                (0x71, 0x61, 18, 0),
                (0x7b, 0x1a, -32, 0),
                (0x62, 0x0a, -8, 7),
                (0x85, 0x00, 0, 127),
                (0xb7, 0x00, 0, 0),
                (0x95, 0x00, 0, 0),
            ]
        );
    }

    #[test]
    fn the_address_of_a_value_takes_two_instructions() {
        let mut asm = Asm::default();
        asm.address_of_map_value(R1, 9);
        assert_eq!(code(asm), [(0x18, 0x21, 0, 9), (0, 0, 0, 0),]);
    }

    /// As llvm-objdump shows them.
    #[test]
    fn maps_registers_and_functions_of_the_kernel_are_encoded() {
        let mut asm = Asm::default();
        let end = asm.label();
        asm.address_of_map(R1, 9) // r1 = map of descriptor 9
            .subtract(R1, R2, Size::U32) // w1 -= w2
            .subtract(R1, R2, Size::U64) // r1 -= r2
            .add_register(R1, R2) // r1 += r2
            .if_differs(R1, R2, end) // if r1 != r2 goto
            .if_greater(R1, R2, end) // if r1 > r2 goto
            .call_kernel(4711) // call kernel function 4711
            .place(end)
            .go_on();
        assert_eq!(
            code(asm)[..8],
            [
                (0x18, 0x11, 0, 9),
                (0, 0, 0, 0),
                (0x1c, 0x21, 0, 0),
                (0x1f, 0x21, 0, 0),
                (0x0f, 0x21, 0, 0),
                (0x5d, 0x21, 2, 0),
                (0x2d, 0x21, 1, 0),
                (0x85, 0x20, 0, 4711),
            ]
        );
    }

    /// As llvm-objdump shows them.
    #[test]
    fn a_value_in_a_map_is_changed_at_one_instant() {
        let mut asm = Asm::default();
        asm.shift_left(R1, 32) // r1 <<= 32
            .store_at(R2, 8, Size::U64, R1) // *(u64 *)(r2 + 8) = r1
            .compare_and_exchange(R6, R1) // r0 = cmpxchg_64(r6 + 0, r0, r1)
            .add_at_once(R6, R1) // lock *(u64 *)(r6 + 0) += r1
            .mask(R1, 7); // r1 &= 7
        let codes = [
            (0x67, 0x01, 0, 32),
            (0x7b, 0x12, 8, 0),
            (0xdb, 0x16, 0, 0xf1),
            (0xdb, 0x16, 0, 0),
            (0x57, 0x01, 0, 7),
        ];
        assert_eq!(code(asm), codes);
    }

    #[test]
    fn every_width_has_its_own_code() {
        let mut asm = Asm::default();
        for size in [Size::U8, Size::U16, Size::U32, Size::U64] {
            asm.load(R1, R2, Field { offset: 4, size });
        }
        let codes: Vec<u8> = code(asm).iter().map(|it| it.0).collect();
        assert_eq!(codes, [0x71, 0x69, 0x61, 0x79]);
    }

    #[test]
    fn a_jump_counts_from_the_next_instruction() {
        let mut asm = Asm::default();
        let (end, other) = (asm.label(), asm.label());
        asm.if_is(R1, 0, end)
            .if_not(R1, 7, other)
            .jump(end)
            .place(other)
            .set(R2, 1)
            .place(end)
            .go_on();
        let offsets: Vec<(u8, i16)> = code(asm).iter().map(|it| (it.0, it.2)).collect();
        let jumps = [(0x15, 3), (0x55, 1), (0x05, 1)];
        assert_eq!(offsets[..3], jumps);
    }

    #[test]
    #[should_panic(expected = "jumps go forward")]
    fn a_loop_is_refused() {
        let mut asm = Asm::default();
        let start = asm.label();
        asm.place(start).jump(start);
        asm.finish();
    }
}
