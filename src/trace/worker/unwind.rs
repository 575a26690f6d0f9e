//! From registers and stack to the addresses of the calls.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::ops::Range;

use framehop::{
    CacheNative, ExplicitModuleSectionInfo, Module, UnwindRegsNative, Unwinder as _, UnwinderNative,
};
use object::read::{ReadCache, ReadRef};
use object::{Object, ObjectSection, ObjectSegment};

use super::memory::{Code, CodeSource, Memory};
use crate::trace::protocol::Question;
use crate::trace::stack::End;

/// A stack with more functions is cut.
const MAX_FRAMES: usize = 128;
/// The largest section with unwind information that is read. Those of the largest programs have 30 MB.
const MAX_SECTION: u64 = 256 << 20;

/// A missing word that is at most so far behind the copied part belongs to the stack. One farther away is on no stack: 8 MB is the usual limit.
const NEAR: u64 = 8 << 20;
/// Where a page ends is known by its lower bits. The smallest page has 4 KiB.
const IN_PAGE: u64 = 0xfff;

/// The unwind information of a process, as far as its stacks have needed it.
pub struct Unwinder {
    native: UnwinderNative<Vec<u8>, framehop::MayAllocateDuringUnwind>,
    cache: CacheNative<framehop::MayAllocateDuringUnwind>,
    /// The starts of the code that was added.
    added: HashSet<u64>,
    /// Whether a file is not what it says.
    pub is_damaged: bool,
}

impl Default for Unwinder {
    fn default() -> Self {
        Unwinder {
            native: UnwinderNative::new(),
            cache: CacheNative::new(),
            added: HashSet::new(),
            is_damaged: false,
        }
    }
}

impl Unwinder {
    /// The addresses of the calls, the innermost first: where the thread is, and for each caller an address in its call.
    pub fn unwind(&mut self, input: &Question, memory: &Memory) -> (Vec<u64>, End) {
        self.add(input.ip, memory);
        self.add(input.lr, memory);
        // What looks like an address of code may be one. Files that the stack does not name are not read.
        let (words, _) = input.stack.as_chunks::<8>();
        let code = memory.start()..memory.end();
        for word in words {
            let word = u64::from_ne_bytes(*word);
            if code.contains(&word) {
                self.add(word, memory);
            }
        }
        let mut read = |address: u64| {
            let at = usize::try_from(address.checked_sub(input.sp).ok_or(())?).map_err(drop)?;
            let word = input.stack.get(at..).and_then(<[u8]>::first_chunk);
            word.map(|word| u64::from_ne_bytes(*word)).ok_or(())
        };
        let registers = registers(input, memory);
        let frames = &mut self
            .native
            .iter_frames(input.ip, registers, &mut self.cache, &mut read);
        let mut addresses = Vec::new();
        let end = loop {
            match frames.next() {
                Ok(Some(_)) if addresses.len() == MAX_FRAMES => break End::Cut,
                Ok(Some(frame)) => addresses.push(frame.address_for_lookup()),
                Ok(None) => break End::Whole,
                Err(framehop::Error::CouldNotReadStack(address)) => {
                    let end = input.sp.saturating_add(input.stack.len() as u64);
                    // Beyond what was copied, or at no stack at all.
                    let is_beyond = address.saturating_add(8) > end && address - end < NEAR;
                    break if is_beyond { End::Cut } else { End::Lost };
                }
                Err(_) => break End::Lost,
            }
        };
        (addresses, end)
    }

    /// Reads the unwind information of the code at this address, if it has not been read.
    fn add(&mut self, address: u64, memory: &Memory) {
        let Some(code) = memory.at(address) else {
            return;
        };
        if !self.added.insert(code.start) {
            return;
        }
        // Without it, frame pointers are followed.
        let CodeSource::File(file) = &code.from else {
            return;
        };
        let Some(opened) = memory.module(code, file) else {
            return;
        };
        match module(&opened.file, &file.name, code) {
            Ok(Some(module)) => self.native.add_module(module),
            Ok(None) => self.is_damaged = true,
            Err(_) => {}
        }
    }
}

#[cfg(target_arch = "aarch64")]
fn registers(input: &Question, memory: &Memory) -> UnwindRegsNative {
    let mask = framehop::aarch64::PtrAuthMask::from_max_known_address(memory.end().max(input.sp));
    UnwindRegsNative::new_with_ptr_auth_mask(mask, input.lr, input.sp, input.fp)
}

#[cfg(not(target_arch = "aarch64"))]
fn registers(input: &Question, _: &Memory) -> UnwindRegsNative {
    UnwindRegsNative::new(input.ip, input.sp, input.fp)
}

/// `None`: the file is not what it was when it was mapped.
///
/// # Errors
/// It cannot be read, or it never was a file with unwind information: code that is made at run time can be in a file, too.
fn module(file: &File, name: &str, code: &Code) -> io::Result<Option<Module<Vec<u8>>>> {
    let cache = ReadCache::new(file);
    let magic = cache.read_bytes_at(0, object::elf::ELFMAG.len() as u64);
    if magic != Ok(&object::elf::ELFMAG[..]) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let Ok(elf) = object::File::parse(&cache) else {
        return Ok(None);
    };
    // The difference between addresses in memory and in the file.
    let bias = elf.segments().find_map(|segment| {
        let (at, size) = segment.file_range();
        // A mapping begins at a page, so it may have the end of the segment before.
        let covers =
            at <= code.offset.saturating_add(IN_PAGE) && code.offset < at.checked_add(size)?;
        let address = segment.address().wrapping_add(code.offset.wrapping_sub(at));
        let has_code = segment.permissions().executable();
        (has_code && covers).then(|| code.start.wrapping_sub(address))
    });
    let Some(bias) = bias else {
        return Ok(None);
    };
    let place = |name: &str| -> Option<Range<u64>> {
        let section = elf.section_by_name(name)?;
        let end = section.address().checked_add(section.size())?;
        Some(section.address()..end)
    };
    let sections = ExplicitModuleSectionInfo {
        base_svma: 0,
        text_svma: place(".text"),
        got_svma: place(".got"),
        eh_frame_svma: place(".eh_frame"),
        eh_frame: bytes(&elf, ".eh_frame"),
        eh_frame_hdr_svma: place(".eh_frame_hdr"),
        eh_frame_hdr: bytes(&elf, ".eh_frame_hdr"),
        debug_frame: bytes(&elf, ".debug_frame"),
        ..Default::default()
    };
    Ok(Some(Module::new(
        name.to_owned(),
        code.start..code.end,
        bias,
        sections,
    )))
}

/// The bytes of a section, if it is there and neither compressed nor huge.
fn bytes<'d, R: ReadRef<'d>>(file: &object::File<'d, R>, name: &str) -> Option<Vec<u8>> {
    let section = file.section_by_name(name)?;
    let range = section.compressed_file_range().ok()?;
    let is_plain = range.format == object::CompressionFormat::None;
    let is_small = range.uncompressed_size <= MAX_SECTION;
    let data = section.data().ok().filter(|_| is_plain && is_small)?;
    Some(data.to_vec())
}
