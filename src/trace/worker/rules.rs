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
        let in_debug_frame = || {
            let frames = DebugFrame::new(self.debug_frame.as_ref()?, NativeEndian);
            let found = frames.fde_for_address(&bases, address, DebugFrame::cie_from_offset);
            Some(found.is_ok())
        };
        in_eh_frame() == Some(true) || in_debug_frame() == Some(true)
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
pub const CALL: usize = 7;

/// Whether code ends with an instruction that calls.
pub fn ends_with_call(code: &[u8; CALL]) -> bool {
    if cfg!(target_arch = "aarch64") {
        let [.., a, b, c, d] = *code;
        let instruction = u32::from_le_bytes([a, b, c, d]);
        // BL and BLR. Arm Architecture Reference Manual, C6.2.
        return instruction >> 26 == 0b10_0101 || instruction & 0xffff_fc1f == 0xd63f_0000;
    }
    // E8 with a distance of 4 bytes, and FF /2 with a register, or memory with a distance of no, 1 or 4 bytes. Intel SDM, volume 2, CALL.
    let calls_through = |at: usize, kinds: &[u8]| {
        let is_call = code[at] == 0xff && code[at + 1] >> 3 & 7 == 2;
        is_call && kinds.contains(&(code[at + 1] >> 6))
    };
    code[CALL - 5] == 0xe8
        || calls_through(CALL - 2, &[0, 3])
        || calls_through(CALL - 3, &[0, 1])
        || calls_through(CALL - 4, &[1])
        || calls_through(CALL - 6, &[0, 2])
        || calls_through(CALL - 7, &[0, 2])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn calls_are_known() {
        let code = |end: &[u8]| {
            let mut code = [0x90; CALL];
            code[CALL - end.len()..].copy_from_slice(end);
            code
        };
        for call in [
            &[0xe8, 1, 0, 0, 0][..],
            &[0xff, 0xd0],
            &[0xff, 0x50, 8],
            &[0xff, 0x14, 0xc8],
            &[0xff, 0x15, 1, 2, 3, 4],
            &[0xff, 0x94, 0xc8, 1, 2, 3, 4],
            // With R8 to R15, behind a prefix.
            &[0x41, 0xff, 0xd4],
        ] {
            assert!(ends_with_call(&code(call)), "{call:x?}");
        }
        for other in [
            &[0x0f, 0x05][..],
            &[0xff, 0xe0],
            &[0xe9, 1, 0, 0, 0],
            &[0xc3],
        ] {
            assert!(!ends_with_call(&code(other)), "{other:x?}");
        }
    }
}
