//! From addresses to functions, files and lines.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use blazesym::ErrorKind;
use blazesym::symbolize::source::{Elf, Source};
use blazesym::symbolize::{CodeInfo, Input, Sym, Symbolized, Symbolizer};

use super::memory::{CodeSource, Memory};
use super::perf_map::{self, PerfMap};
use crate::trace::origin::{Origin, Runtime};
use crate::trace::stack::Frame;

/// The reader of symbols of one process.
pub struct Names {
    symbolizer: Symbolizer,
    pub runtime: Option<Runtime>,
    /// The names of code that was made at run time.
    pub perf_map: Option<PerfMap>,
    /// Whether the process has the same root directory as cwkill. Otherwise, who rules a container may have put its files there.
    is_in_root_of_cwkill: bool,
    /// Whether a file is not what it says.
    is_damaged: Cell<bool>,
}

impl Names {
    pub fn new(pid: i32, runtime: Option<Runtime>, perf_map: Option<PerfMap>) -> Self {
        // Debug symbols of the process's own file system, and of the host's.
        let roots = [format!("/proc/{pid}/root"), String::new()];
        let debug_dirs = roots.iter().flat_map(|root| {
            ["/usr/lib/debug", "/lib/debug"].map(|dir| PathBuf::from(format!("{root}{dir}")))
        });
        let symbolizer = Symbolizer::builder()
            .enable_auto_reload(false)
            .enable_code_info(true)
            .enable_inlined_fns(true)
            .enable_demangling(true)
            .set_debug_dirs(Some(debug_dirs))
            .build();
        Names {
            symbolizer,
            runtime,
            perf_map,
            is_in_root_of_cwkill: has_root_of_cwkill(pid),
            is_damaged: Cell::new(false),
        }
    }

    pub fn are_damaged(&self) -> bool {
        self.is_damaged.get()
    }

    /// The functions at this address, the innermost first: more than one if the compiler has put some into others.
    pub fn frames(&self, address: u64, memory: &Memory) -> Vec<Frame> {
        let code = memory.at(address);
        match code.map(|code| (code, &code.from)) {
            Some((code, CodeSource::File(file))) => {
                let in_file = address - code.start + code.offset;
                let path = memory.path(code, file).ok();
                self.frames_of_file(path.as_deref(), &file.name, in_file)
            }
            Some((code, CodeSource::Vdso)) => {
                vec![self.frame(None, None, None, Some("[vdso]"), address - code.start)]
            }
            Some((_, CodeSource::RunTime)) | None => vec![self.frame_of_run_time(address)],
        }
    }

    fn frames_of_file(&self, path: Option<&Path>, module: &str, in_file: u64) -> Vec<Frame> {
        let symbol = path.and_then(|path| self.symbol(path, in_file));
        match symbol {
            Some(Symbolized::Sym(symbol)) => self.frames_of_symbol(&symbol, module, in_file),
            Some(Symbolized::Unknown(_)) | None => {
                vec![self.frame(None, None, None, Some(module), in_file)]
            }
        }
    }

    /// With damaged debug symbols, the names that the file has without them are left.
    fn symbol(&self, path: &Path, in_file: u64) -> Option<Symbolized<'_>> {
        let may_have_debug = match kind(path, self.is_in_root_of_cwkill) {
            Kind::WithDebug => true,
            Kind::WithoutDebug => false,
            Kind::TooLarge => {
                self.is_damaged.set(true);
                false
            }
            Kind::Damaged => {
                self.is_damaged.set(true);
                return None;
            }
        };
        for debug_syms in [true, false]
            .into_iter()
            .filter(|debug| may_have_debug || !debug)
        {
            let mut file = Elf::new(path);
            file.debug_syms = debug_syms;
            let source = Source::Elf(file);
            let input = Input::FileOffset(in_file);
            // One damaged file does not cost the names of the others. blazesym 0.2.7 panics at a section whose compressed size is wrong.
            let symbolize = || self.symbolizer.symbolize_single(&source, input);
            match catch_unwind(AssertUnwindSafe(symbolize)) {
                // An origin that leads nowhere has no name.
                Ok(Ok(Symbolized::Sym(symbol))) if symbol.name.is_empty() => {}
                Ok(Ok(symbol)) => return Some(symbol),
                Ok(Err(error)) if error.kind() != ErrorKind::InvalidDwarf => {}
                Ok(Err(_)) | Err(_) => self.is_damaged.set(true),
            }
        }
        None
    }

    fn frames_of_symbol(&self, symbol: &Sym<'_>, module: &str, in_file: u64) -> Vec<Frame> {
        let frame = |name: &str, place: Option<&CodeInfo<'_>>, inlined| {
            let file = place.map(|place| place.to_path().to_string_lossy().into_owned());
            let line = place.and_then(|place| place.line);
            Frame {
                inlined,
                ..self.frame(Some(name), file, line, Some(module), in_file)
            }
        };
        let inlined = symbol.inlined.iter().rev();
        let mut frames: Vec<Frame> = inlined
            .map(|inner| frame(&inner.name, inner.code_info.as_ref(), true))
            .collect();
        frames.push(frame(&symbol.name, symbol.code_info.as_deref(), false));
        frames
    }

    fn frame_of_run_time(&self, address: u64) -> Frame {
        let name = self.perf_map.as_ref().and_then(|map| map.name(address));
        match name.and_then(perf_map::python) {
            Some((function, file)) => {
                self.frame(Some(function), Some(file.to_owned()), None, None, address)
            }
            None => self.frame(name, None, None, None, address),
        }
    }

    fn frame(
        &self,
        function: Option<&str>,
        file: Option<String>,
        line: Option<u32>,
        module: Option<&str>,
        address: u64,
    ) -> Frame {
        Frame {
            origin: Origin::of(function, file.as_deref(), module, self.runtime),
            function: function.map(short),
            file: file.as_deref().map(short),
            line,
            module: module.map(short),
            address,
            inlined: false,
        }
    }
}

/// The longest name. Those of C++ and Rust can have many kilobytes, and those of hostile files any number.
const MAX_NAME: usize = 1024;

fn short(name: &str) -> String {
    match name.char_indices().nth(MAX_NAME) {
        Some((end, _)) => format!("{}...", &name[..end]),
        None => name.to_owned(),
    }
}

fn has_root_of_cwkill(pid: i32) -> bool {
    use std::os::unix::fs::MetadataExt;
    let root = |path: &str| {
        let metadata = std::fs::metadata(path).ok()?;
        Some((metadata.dev(), metadata.ino()))
    };
    let own = root("/");
    own.is_some() && root(&format!("/proc/{pid}/root/")) == own
}

/// The most bytes that compressed sections of a file may have, of the 1 GiB that the process has.
const MAX_INFLATED: u64 = 512 << 20;

/// What is read of a file.
enum Kind {
    WithDebug,
    /// Its debug symbols may be elsewhere. Who makes a file that leads elsewhere could have root open any device or pipe, also by a plain name
    /// beside a file of their own. So only a file of root's may, by a plain name.
    WithoutDebug,
    /// As before, since its debug symbols would take too much memory.
    TooLarge,
    /// Nothing.
    Damaged,
}

fn kind(path: &Path, is_in_root_of_cwkill: bool) -> Kind {
    use object::{Object, ObjectSection};
    use std::os::unix::fs::MetadataExt;
    let Ok(file) = super::memory::open(path) else {
        return Kind::WithoutDebug;
    };
    let is_roots = file
        .metadata()
        .is_ok_and(|metadata| metadata.uid() == 0 && metadata.mode() & 0o022 == 0);
    let cache = object::read::ReadCache::new(file);
    let Ok(elf) = object::File::parse(&cache) else {
        return Kind::WithoutDebug;
    };
    // blazesym 0.2.7 asks for as much memory as a section says, and ends the process if there is not as much.
    let mut inflated = 0_u64;
    for section in elf.sections() {
        let range = section.compressed_file_range();
        match range.map(|it| (it.format, it.uncompressed_size)) {
            Ok((object::CompressionFormat::None, _)) => {}
            Ok((_, size)) if is_debug(section.name_bytes()) => {
                inflated = inflated.saturating_add(size);
            }
            // No linker compresses others.
            Ok(_) => return Kind::Damaged,
            Err(_) => inflated = u64::MAX,
        }
    }
    if inflated > MAX_INFLATED {
        return Kind::TooLarge;
    }
    let section = |name: &str| elf.section_by_name(name);
    if section(".gnu_debugaltlink").is_some() || section(".debug_sup").is_some() {
        // These are always paths.
        return Kind::WithoutDebug;
    }
    match section(".gnu_debuglink").map(|section| section.data()) {
        Some(Ok(link)) if is_roots && is_in_root_of_cwkill && is_plain_name(link) => {
            Kind::WithDebug
        }
        Some(_) => Kind::WithoutDebug,
        None => Kind::WithDebug,
    }
}

/// Also by the names that compressed ones had before they had a flag.
fn is_debug(name: Result<&[u8], object::Error>) -> bool {
    name.is_ok_and(|name| name.starts_with(b".debug_") || name.starts_with(b".zdebug_"))
}

/// Of a section `.gnu_debuglink`: the name, a zero, and a checksum, which may have any byte.
fn is_plain_name(link: &[u8]) -> bool {
    let name = link.split(|byte| *byte == 0).next();
    name.is_some_and(|name| !name.contains(&b'/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checksum_of_a_link_is_no_part_of_its_name() {
        assert!(is_plain_name(b"a.debug\0/\0\0/"));
        assert!(!is_plain_name(b"../a.debug\0abcd"));
        assert!(is_plain_name(b""));
    }
}
