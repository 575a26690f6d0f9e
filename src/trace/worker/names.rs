//! From addresses to functions, files and lines.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

use blazesym::ErrorKind;
use blazesym::symbolize::source::{Elf, Source};
use blazesym::symbolize::{CodeInfo, Input, Sym, Symbolized, Symbolizer};

use super::memory::{CodeSource, Memory};
use super::module::{Content, DEBUG_DIRS, Module};
use super::perf_map::{self, PerfMap};
use crate::trace::origin::{Origin, Runtime};
use crate::trace::stack::Frame;

/// Names the addresses of one process.
pub struct Names {
    symbolizer: Symbolizer,
    pub runtime: Option<Runtime>,
    /// The names of code that was made at run time.
    pub perf_map: Option<PerfMap>,
    /// Whether a file is not what it says.
    is_damaged: Cell<bool>,
}

impl Names {
    pub fn new(runtime: Option<Runtime>, perf_map: Option<PerfMap>) -> Self {
        let symbolizer = Symbolizer::builder()
            .enable_auto_reload(false)
            .enable_code_info(true)
            .enable_inlined_fns(true)
            .enable_demangling(true)
            // For what several files of debug symbols share. Only those of the host may name it.
            .set_debug_dirs(Some(DEBUG_DIRS))
            .build();
        Names {
            symbolizer,
            runtime,
            perf_map,
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
                let module = memory.module(code, file);
                self.frames_of_file(module.as_deref(), &file.name, in_file)
            }
            Some((code, CodeSource::Vdso)) => {
                vec![self.frame(None, None, None, Some("[vdso]"), address - code.start)]
            }
            Some((_, CodeSource::RunTime)) | None => vec![self.frame_of_run_time(address)],
        }
    }

    fn frames_of_file(&self, module: Option<&Module>, name: &str, in_file: u64) -> Vec<Frame> {
        let symbol = module.and_then(|module| self.symbol(module, in_file));
        match symbol {
            Some(symbol) => self.frames_of_symbol(&symbol, name, in_file),
            None => vec![self.frame(None, None, None, Some(name), in_file)],
        }
    }

    /// With damaged debug symbols, the names that the file has without them are left.
    fn symbol(&self, module: &Module, in_file: u64) -> Option<Sym<'_>> {
        match module.content {
            Content::All | Content::NoDebug => {}
            Content::DebugUnreadable => self.is_damaged.set(true),
            Content::Nothing => {
                self.is_damaged.set(true);
                return None;
            }
        }
        let mut sources = Vec::new();
        if let Some(debug) = &module.debug
            && let Some(address) = debug.address(in_file)
        {
            sources.push((debug.path(), true, Input::VirtOffset(address)));
        }
        let path = module.path();
        if module.content == Content::All {
            sources.push((path.clone(), true, Input::FileOffset(in_file)));
        }
        sources.push((path, false, Input::FileOffset(in_file)));
        for (path, debug_syms, input) in sources {
            let mut file = Elf::new(path);
            file.debug_syms = debug_syms;
            let source = Source::Elf(file);
            // One damaged file does not cost the names of the others. blazesym 0.2.7 panics at a section whose compressed size is wrong.
            let symbolize = || self.symbolizer.symbolize_single(&source, input);
            match catch_unwind(AssertUnwindSafe(symbolize)) {
                // An origin that leads nowhere has no name.
                Ok(Ok(Symbolized::Sym(symbol))) if symbol.name.is_empty() => {}
                Ok(Ok(Symbolized::Sym(symbol))) => return Some(symbol),
                Ok(Ok(Symbolized::Unknown(_))) => {}
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
