//! From registers and stack to the addresses of the calls.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use framehop::{
    CacheNative, ExplicitModuleSectionInfo, Module, UnwindRegsNative, Unwinder as _, UnwinderNative,
};
use object::read::{ReadCache, ReadRef};
use object::{Object, ObjectSection, ObjectSegment};

use super::memory::{Code, CodeSource, Memory};
use super::rules::{self, Bytes, Call, LONGEST_CALL, Rules};
use crate::bpf::tracer::Thread;
use crate::trace::stack::End;

/// A stack with more functions is cut.
const MAX_FRAMES: usize = 128;
/// The largest section with unwind information that is read. Those of the largest programs have 30 MB.
const MAX_SECTION: u64 = 256 << 20;

/// A missing word that is at most so far behind the copied part belongs to the stack. One farther away is on no stack: 8 MB is the usual limit.
const NEAR: u64 = 8 << 20;
/// Words of a stack in which a caller is looked for.
const SEARCHED: usize = 256;
/// The most bytes of a function without unwind information.
const LONGEST_BARE: u64 = 4096;
/// Addresses of which it is remembered whether they have unwind information.
const MAX_KNOWN: usize = 1 << 16;
/// Where a page ends is known by its lower bits. The smallest page has 4 KiB.
const IN_PAGE: u64 = 0xfff;

/// The unwind information of a process, as far as its stacks have needed it.
pub struct Unwinder {
    native: UnwinderNative<Bytes, framehop::MayAllocateDuringUnwind>,
    cache: CacheNative<framehop::MayAllocateDuringUnwind>,
    /// The starts of the code that was added.
    added: HashSet<u64>,
    rules: Vec<Rules>,
    /// What they say, by the address.
    has_rule: HashMap<u64, bool>,
    /// Whether a file is not what it says.
    pub is_damaged: bool,
}

impl Default for Unwinder {
    fn default() -> Self {
        Unwinder {
            native: UnwinderNative::new(),
            cache: CacheNative::new(),
            added: HashSet::new(),
            rules: Vec::new(),
            has_rule: HashMap::new(),
            is_damaged: false,
        }
    }
}

impl Unwinder {
    /// The addresses of the calls, the innermost first: where the thread is, and for each caller an address in its call.
    pub fn unwind(&mut self, input: &Thread, memory: &Memory) -> (Vec<u64>, End) {
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
        let mut addresses = Vec::new();
        let mut thread = Registers::of(input);
        if let Some(caller) = self.caller_of_a_bare_function(input, memory) {
            addresses.push(input.ip);
            thread = caller;
        }
        let frames = &mut self.native.iter_frames(
            thread.ip,
            thread.of_framehop(memory),
            &mut self.cache,
            &mut read,
        );
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

    /// If the innermost function has no unwind information, as those of musl: the registers in its nearest caller that has some, as far as the
    /// stack shows one. Callers between them are left out. Without such a one, the frame pointer is followed, as Go has it.
    ///
    /// What a function has left on the stack before can look like a caller. So one that calls the bare function by its address comes first.
    fn caller_of_a_bare_function(&mut self, input: &Thread, memory: &Memory) -> Option<Registers> {
        // On arm64 the place of a return address does not tell where the caller's frame begins.
        if cfg!(target_arch = "aarch64") || self.has_rule(input.ip) {
            return None;
        }
        let (words, _) = input.stack.as_chunks::<8>();
        let word = |at: usize| words.get(at).map(|word| u64::from_ne_bytes(*word));
        // Behind a frame pointer stands the caller of the function that has it: the nearest one is before that.
        let frame = input.fp.checked_sub(input.sp).map(|distance| distance / 8);
        let frame = frame.and_then(|frame| usize::try_from(frame).ok());
        let is_frame = |frame: &usize| {
            let after = word(frame + 1).and_then(|word| call_before(word, memory));
            after.is_some()
        };
        let searched = frame.filter(is_frame).unwrap_or(SEARCHED).min(SEARCHED);
        let mut bare = input.ip;
        let mut found = None;
        for at in 0..searched {
            let word = word(at)?;
            let Some(call) = call_before(word, memory) else {
                continue;
            };
            if !self.has_rule(word - 1) {
                bare = word;
                continue;
            }
            let calls_it = match call {
                Call::Direct(distance) => {
                    let target = word.wrapping_add_signed(distance.into());
                    (target..target.saturating_add(LONGEST_BARE)).contains(&bare)
                }
                Call::Indirect => false,
            };
            if calls_it {
                found = Some((at, word));
                break;
            }
            found = found.or(Some((at, word)));
        }
        let (at, word) = found?;
        Some(Registers {
            // In the call: the address after it may be of another function.
            ip: word - 1,
            sp: input.sp.wrapping_add(8 * (at as u64 + 1)),
            ..Registers::of(input)
        })
    }

    fn has_rule(&mut self, address: u64) -> bool {
        if let Some(known) = self.has_rule.get(&address) {
            return *known;
        }
        let mut rules = self.rules.iter();
        let rules = rules.find(|rules| rules.code.contains(&address));
        let has_rule = rules.is_some_and(|rules| rules.has(address));
        if self.has_rule.len() < MAX_KNOWN {
            self.has_rule.insert(address, has_rule);
        }
        has_rule
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
            Ok(Some((module, rules))) => {
                self.native.add_module(module);
                self.rules.push(rules);
            }
            Ok(None) => self.is_damaged = true,
            Err(_) => {}
        }
    }
}

/// The registers of a thread that unwinding needs.
#[derive(Clone, Copy)]
struct Registers {
    ip: u64,
    sp: u64,
    fp: u64,
    #[cfg_attr(
        not(target_arch = "aarch64"),
        expect(dead_code, reason = "it has none")
    )]
    lr: u64,
}

impl Registers {
    fn of(input: &Thread) -> Self {
        Registers {
            ip: input.ip,
            sp: input.sp,
            fp: input.fp,
            lr: input.lr,
        }
    }

    #[cfg(target_arch = "aarch64")]
    fn of_framehop(self, memory: &Memory) -> UnwindRegsNative {
        let most = memory.end().max(self.sp);
        let mask = framehop::aarch64::PtrAuthMask::from_max_known_address(most);
        UnwindRegsNative::new_with_ptr_auth_mask(mask, self.lr, self.sp, self.fp)
    }

    #[cfg(not(target_arch = "aarch64"))]
    fn of_framehop(self, _: &Memory) -> UnwindRegsNative {
        UnwindRegsNative::new(self.ip, self.sp, self.fp)
    }
}

/// The instruction before this address, if it is in a file and calls.
fn call_before(address: u64, memory: &Memory) -> Option<Call> {
    let code = memory.at(address)?;
    let CodeSource::File(file) = &code.from else {
        return None;
    };
    let at = (address - code.start + code.offset).checked_sub(LONGEST_CALL as u64)?;
    let mut bytes = [0; LONGEST_CALL];
    let module = memory.module(code, file)?;
    module.file.read_exact_at(&mut bytes, at).ok()?;
    rules::call_at_end(&bytes)
}

/// `None`: the file is not what it was when it was mapped.
///
/// # Errors
/// It cannot be read, or it never was a file with unwind information: code that is made at run time can be in a file, too.
fn module(file: &File, name: &str, code: &Code) -> io::Result<Option<(Module<Bytes>, Rules)>> {
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
    let start = |name: &str| place(name).map(|place| place.start);
    let section = |name: &str| Some((start(name)?, bytes(&elf, name)?));
    let rules = Rules {
        code: code.start..code.end,
        bias,
        text: start(".text"),
        got: start(".got"),
        eh_frame: section(".eh_frame"),
        eh_frame_hdr: section(".eh_frame_hdr"),
        debug_frame: bytes(&elf, ".debug_frame"),
    };
    let of = |section: &Option<(u64, Bytes)>| section.as_ref().map(|(_, bytes)| bytes.clone());
    let sections = ExplicitModuleSectionInfo {
        base_svma: 0,
        text_svma: place(".text"),
        got_svma: place(".got"),
        eh_frame_svma: place(".eh_frame"),
        eh_frame: of(&rules.eh_frame),
        eh_frame_hdr_svma: place(".eh_frame_hdr"),
        eh_frame_hdr: of(&rules.eh_frame_hdr),
        debug_frame: rules.debug_frame.clone(),
        ..Default::default()
    };
    let module = Module::new(name.to_owned(), code.start..code.end, bias, sections);
    Ok(Some((module, rules)))
}

/// The bytes of a section, if it is there and neither compressed nor huge.
fn bytes<'d, R: ReadRef<'d>>(file: &object::File<'d, R>, name: &str) -> Option<Bytes> {
    let section = file.section_by_name(name)?;
    let range = section.compressed_file_range().ok()?;
    let is_plain = range.format == object::CompressionFormat::None;
    let is_small = range.uncompressed_size <= MAX_SECTION;
    if !is_plain || !is_small {
        return None;
    }
    section.data().ok().map(Bytes::from)
}
