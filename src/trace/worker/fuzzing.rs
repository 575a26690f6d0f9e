//! What the fuzz targets in `fuzz/` call. It is there with `--cfg fuzzing` alone.

use std::collections::{BTreeSet, HashMap};
use std::fmt::Debug;
use std::fs::File;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::{Duration, Instant};

use object::{Object, ObjectSection, ObjectSegment, ObjectSymbol, SymbolKind};
use rustix::fs::{MemfdFlags, memfd_create};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::memory::{CodeSource, Memory};
use super::names::Names;
use super::perf_map::{self, PerfMap};
use super::unwind::Unwinder;
use super::{MAX_FRAMES, TracedProcess, program};
use crate::bpf::tracer::Thread;
use crate::trace::origin::Origin;
use crate::trace::protocol::{Answer, LastWord, read_line, write_line};
use crate::trace::stack::{Frame, Stack};

/// Any text, and lines that overlap: of those with the nearest start, the last one holds.
pub fn perf_map(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let map = PerfMap::parse(text.clone().into_owned());
    for word in text.split([' ', '\n']) {
        if let Ok(address) = u64::from_str_radix(word.trim_start_matches("0x"), 16)
            && let Some(name) = map.name(address)
        {
            assert!(!name.is_empty() && !name.contains('\n'));
            perf_map::python(name);
        }
    }
    let (entries, _) = data.as_chunks::<2>();
    let line =
        |(number, [start, size]): (usize, &[u8; 2])| format!("{start:x} {size:x} {number}\n");
    let map = PerfMap::parse(entries.iter().enumerate().map(line).collect());
    for address in 0..=u8::MAX {
        let before = entries
            .iter()
            .enumerate()
            .filter(|(_, it)| it[0] <= address);
        let nearest = before.max_by_key(|(number, it)| (it[0], *number));
        let covers = nearest.filter(|(_, it)| address - it[0] < it[1]);
        let expected = covers.map(|(number, _)| number.to_string());
        assert_eq!(map.name(address.into()), expected.as_deref());
    }
}

/// Any text, and a file with any name.
pub fn maps(data: &[u8]) {
    let memory = Memory::parse(1, data);
    for address in [0, memory.start(), memory.end(), u64::MAX] {
        memory.at(address);
    }
    memory.runtime();
    // The kernel escapes it (fs/seq_file.c, seq_path).
    let name = data.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let line = [b"1000-2000 r-xp 00003000 00:01 4    /", name, b"\n"].concat();
    let memory = Memory::parse(1, &line);
    let code = memory.at(0x1fff).expect("the line is whole");
    assert_eq!(
        (code.start, code.end, code.offset),
        (0x1000, 0x2000, 0x3000)
    );
    let CodeSource::File(file) = &code.from else {
        panic!("{code:?}");
    };
    let name = format!("/{}", String::from_utf8_lossy(name));
    assert_eq!(file.name, name.strip_suffix(" (deleted)").unwrap_or(&name));
}

/// Whatever a process says is read or refused, and what is read is written as it was.
pub fn protocol(data: &[u8]) {
    if let Ok(Some(question)) = Thread::read(&mut &*data) {
        let mut bytes = Vec::new();
        question.write(&mut bytes).expect("it is in memory");
        let again = Thread::read(&mut &*bytes).expect("it is whole");
        assert_eq!(again.as_ref(), Some(&question));
    }
    same_again(read_line::<Answer>(&mut &*data));
    same_again(read_line::<LastWord>(&mut &*data));
    let text = String::from_utf8_lossy(data);
    let names: Vec<&str> = text.split(' ').collect();
    let frame = |names: &[&str]| Frame {
        function: names.first().map(ToString::to_string),
        file: names.get(1).map(ToString::to_string),
        line: u32::try_from(data.len()).ok(),
        module: names.get(2).map(ToString::to_string),
        address: u64::MAX,
        inlined: names.len() == 1,
        origin: Origin::Own,
    };
    same_again(Some(Answer {
        number: Some(usize::MAX),
        stack: Some(Stack {
            frames: names.chunks(3).map(frame).collect(),
            ..Stack::default()
        }),
        problems: BTreeSet::new(),
    }));
}

fn same_again<T: Serialize + DeserializeOwned + PartialEq + Debug>(value: Option<T>) {
    let Some(value) = value else {
        return;
    };
    let mut line = Vec::new();
    write_line(&mut line, &value).expect("it is in memory");
    assert_eq!(
        line.iter().position(|byte| *byte == b'\n'),
        Some(line.len() - 1)
    );
    assert_eq!(read_line(&mut &*line), Some(value));
}

/// A program as it was when it was started, and a file in memory that becomes what was made of it.
pub struct Program {
    bytes: Vec<u8>,
    /// Where its headers, its sections and the headers of these are.
    parts: Vec<Range<usize>>,
    /// Its code, as lines of /proc/PID/maps.
    maps: String,
    /// The addresses of its functions in memory.
    functions: Vec<u64>,
    file: File,
}

/// Where the loader has put it.
const BASE: u64 = 0x5555_0000_0000;

impl Program {
    pub fn new(bytes: Vec<u8>) -> Self {
        let file = File::from(memfd_create("program", MemfdFlags::CLOEXEC).expect("a file"));
        let inode = file.metadata().expect("its metadata").ino();
        let elf = object::File::parse(&*bytes).expect("the seed is a program");
        let part = |(at, size): (u64, u64)| {
            let at = usize::try_from(at).expect("an offset");
            at..at + usize::try_from(size).expect("a size")
        };
        let sections = elf.sections().filter_map(|section| section.file_range());
        let headers = u64::from_le_bytes(*bytes[0x28..].first_chunk().expect("a header"));
        let headers = part((headers, 0)).start..bytes.len();
        let mut parts: Vec<_> = sections.map(part).filter(|it| !it.is_empty()).collect();
        parts.extend([0..0x400, headers]);
        let mut maps = String::new();
        for segment in elf.segments().filter(|it| it.permissions().executable()) {
            let (start, (offset, size)) = (BASE + segment.address(), segment.file_range());
            let end = start + size.next_multiple_of(0x1000);
            let name = format!("/proc/self/fd/{}", file.as_raw_fd());
            maps += &format!("{start:x}-{end:x} r-xp {offset:x} 00:01 {inode} {name}\n");
        }
        let functions = elf
            .symbols()
            .filter(|it| it.kind() == SymbolKind::Text && it.size() > 0);
        let functions = functions.map(|it| BASE + it.address() + 1).collect();
        Program {
            parts,
            maps,
            functions,
            file,
            bytes,
        }
    }

    /// `data`: which part, where in it, how many bytes and these bytes, again and again.
    fn patched(&self, mut data: &[u8]) -> Vec<u8> {
        let mut bytes = self.bytes.clone();
        while let Some(([part, at @ .., count], rest)) = data.split_first_chunk::<4>() {
            let (patch, rest) = rest.split_at(rest.len().min(usize::from(*count)));
            let part = &mut bytes[self.parts[usize::from(*part) % self.parts.len()].clone()];
            let at = usize::from(u16::from_le_bytes(*at)) % part.len();
            for (byte, new) in part[at..].iter_mut().zip(patch) {
                *byte = *new;
            }
            data = rest;
        }
        bytes
    }

    /// The way of a sample through a process that reads symbols.
    pub fn trace(&self, data: &[u8]) {
        let bytes = self.patched(data);
        self.file.set_len(bytes.len() as u64).expect("memory");
        self.file.write_all_at(&bytes, 0).expect("memory");
        let pid = std::process::id().cast_signed();
        let mut traced = TracedProcess {
            pid,
            program: program(pid),
            memory: Memory::parse(pid, self.maps.as_bytes()),
            // What this process itself has mapped is never read.
            read_at: Instant::now() + Duration::from_hours(1),
            unwinder: Unwinder::default(),
            names: Names::new(None, None),
            known: HashMap::new(),
            before: 0,
            problems: BTreeSet::new(),
        };
        let words = self.functions.iter().flat_map(|address| [*address, 0]);
        let words: Vec<u64> = words.collect();
        let question = Thread {
            ip: self.functions[0],
            sp: 0x7fff_0000_0000,
            fp: 0x7fff_0000_0100,
            lr: 0,
            is_own_call: true,
            stack: words
                .repeat(8)
                .into_iter()
                .flat_map(u64::to_le_bytes)
                .collect(),
        };
        let answer = traced.answer(&question);
        assert_eq!(answer.number, Some(0));
        let frames = answer.stack.expect("the first stack").frames;
        assert!((1..=MAX_FRAMES).contains(&frames.len()));
        // Its functions are asked for in any case: the stack may have ended before.
        for address in &self.functions {
            traced.names.frames(*address, &traced.memory);
        }
        traced.finish(|_| Ok(())).expect("nothing is written");
    }
}
