//! Whether there is unwind information for an address.
//!
//! framehop follows the frame pointer where there is none. For a function that does not have one, its caller is left out or wrong.

use std::ops::Range;
use std::sync::Arc;

use gimli::{
    BaseAddresses, DebugFrame, EhFrame, EhFrameHdr, NativeEndian, SectionBaseAddresses,
    UnwindSection,
};

/// The bytes of a section.
pub type Bytes = Arc<[u8]>;

/// The unwind information of a part of the memory.
pub struct Rules {
    pub code: Range<u64>,
    /// The difference between addresses in memory and in the file.
    pub bias: u64,
    /// The addresses of sections, in the file.
    pub text: Option<u64>,
    pub got: Option<u64>,
    pub eh_frame: Option<(u64, Bytes)>,
    pub eh_frame_hdr: Option<(u64, Bytes)>,
    pub debug_frame: Option<Bytes>,
}

impl Rules {
    pub fn has(&self, address: u64) -> bool {
        let address = address.wrapping_sub(self.bias);
        let bases = self.bases();
        let by_table = || {
            let (_, header) = self.eh_frame_hdr.as_ref()?;
            let (_, frames) = self.eh_frame.as_ref()?;
            let header = EhFrameHdr::new(header, NativeEndian)
                .parse(&bases, 8)
                .ok()?;
            let frames = EhFrame::new(frames, NativeEndian);
            let found =
                header
                    .table()?
                    .fde_for_address(&frames, &bases, address, EhFrame::cie_from_offset);
            Some(found.is_ok())
        };
        let in_eh_frame = || {
            by_table().or_else(|| {
                let (_, frames) = self.eh_frame.as_ref()?;
                let frames = EhFrame::new(frames, NativeEndian);
                let found = frames.fde_for_address(&bases, address, EhFrame::cie_from_offset);
                Some(found.is_ok())
            })
        };
        // framehop reads this section only where there is no other.
        let in_debug_frame = || {
            let frames = DebugFrame::new(self.debug_frame.as_ref()?, NativeEndian);
            let found = frames.fde_for_address(&bases, address, DebugFrame::cie_from_offset);
            Some(found.is_ok())
        };
        in_eh_frame().or_else(in_debug_frame) == Some(true)
    }

    fn bases(&self) -> BaseAddresses {
        let section = |section: Option<u64>| SectionBaseAddresses {
            section,
            text: self.text,
            data: self.got,
        };
        let header = self.eh_frame_hdr.as_ref().map(|(address, _)| *address);
        BaseAddresses {
            eh_frame: section(self.eh_frame.as_ref().map(|(address, _)| *address)),
            // A pointer in the header counts from its start.
            eh_frame_hdr: SectionBaseAddresses {
                data: header,
                ..section(header)
            },
        }
    }
}

/// The longest instruction that calls, in bytes.
pub const LONGEST_CALL: usize = 7;

/// An instruction that calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// What it calls is so far from its end.
    Direct(i32),
    /// By a register, or by memory.
    Indirect,
}

/// The instruction at the end of this code, if it calls. Intel SDM, volume 2, CALL: E8 with a distance of 4 bytes, and FF /2 with a register, or
/// with memory and a distance of no, 1 or 4 bytes.
pub fn call_at_end(code: &[u8; LONGEST_CALL]) -> Option<Call> {
    let [.., opcode, a, b, c, d] = *code;
    if opcode == 0xe8 {
        return Some(Call::Direct(i32::from_le_bytes([a, b, c, d])));
    }
    let calls_through = |length: usize, kinds: &[u8]| {
        let [opcode, how] = [0, 1].map(|at| code[LONGEST_CALL - length + at]);
        opcode == 0xff && how >> 3 & 7 == 2 && kinds.contains(&(how >> 6))
    };
    let is_indirect = calls_through(2, &[0, 3])
        || calls_through(3, &[0, 1])
        || calls_through(4, &[1])
        || calls_through(6, &[0, 2])
        || calls_through(7, &[0, 2]);
    is_indirect.then_some(Call::Indirect)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_known() {
        let code = |end: &[u8]| {
            let mut code = [0x90; LONGEST_CALL];
            code[LONGEST_CALL - end.len()..].copy_from_slice(end);
            code
        };
        let direct = call_at_end(&code(&[0xe8, 0xfe, 0xff, 0xff, 0xff]));
        assert_eq!(direct, Some(Call::Direct(-2)));
        for call in [
            &[0xff, 0xd0][..],
            &[0xff, 0x50, 8],
            &[0xff, 0x14, 0xc8],
            &[0xff, 0x15, 1, 2, 3, 4],
            &[0xff, 0x94, 0xc8, 1, 2, 3, 4],
            // With R8 to R15, behind a prefix.
            &[0x41, 0xff, 0xd4],
        ] {
            assert_eq!(call_at_end(&code(call)), Some(Call::Indirect), "{call:x?}");
        }
        for other in [
            &[0x0f, 0x05][..],
            &[0xff, 0xe0],
            &[0xe9, 1, 0, 0, 0],
            &[0xc3],
        ] {
            assert_eq!(call_at_end(&code(other)), None, "{other:x?}");
        }
    }
}
