//! The process that reads the symbols of a traced process, with files that are damaged or hostile: it answers or ends, soon, and within its
//! limits. What then becomes of the trace is in `trace_luck`.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use netns_harness::owners::leaks::Leaky;
use nix::sys::resource::{UsageWho, getrusage};
use object::{Object as _, ObjectSection as _, ObjectSymbol as _};
use serde_json::Value;

use crate::support::{CWKILL, at};
use crate::trace::{Scene, codes};
use crate::trial::{Need, Test, once};

pub const TESTS: &[Test] = &[
    once!(an_undamaged_file_is_read).needs(Need::Program("cc")),
    once!(a_reader_that_is_killed_is_started_again).needs(Need::Leaky(Leaky::C)),
    once!(debug_symbols_that_lead_nowhere_end).needs(Need::Program("cc")),
    once!(debug_symbols_beside_a_file_are_read).needs(Need::Program("cc")),
    once!(what_is_no_file_of_debug_symbols_is_left_alone).needs(Need::Program("cc")),
    once!(damaged_debug_symbols_of_another_file_end_nothing).needs(Need::Program("cc")),
    once!(damaged_files_are_read_or_refused)
        .needs(Need::Program("cc"))
        .slow(),
];

/// More processor time than this is taken from the process (`RLIMIT_CPU`).
const MAX_SECONDS: &str = "75";

/// A file as it is, and where the functions are in it.
struct Original {
    bytes: Vec<u8>,
    functions: Vec<u64>,
}

impl Original {
    /// Of a program or library, in which code is as far from the start of the file as from that of its memory.
    fn build(directory: &Path, text: &str, options: &str, functions: &[&str]) -> Result<Self> {
        let source = directory.join("source.c");
        fs::write(&source, text)?;
        let built = directory.join("built");
        let compiled = Command::new("cc")
            .args(options.split(' '))
            .arg("-o")
            .args([&built, &source])
            .output()?;
        ensure!(compiled.status.success(), "{compiled:?}");
        let bytes = fs::read(built)?;
        let file = object::File::parse(&*bytes)?;
        let address = |name: &&str| {
            let mut symbols = file.symbols();
            let symbol = symbols.find(|symbol| symbol.name() == Ok(name));
            symbol.map(|symbol| symbol.address() + 1)
        };
        let addresses: Option<Vec<u64>> = functions.iter().map(address).collect();
        Ok(Original {
            functions: addresses.context("a function is missing")?,
            bytes,
        })
    }

    fn leak(directory: &Path) -> Result<Self> {
        let text = include_str!("../../netns-harness/leaks/leak.c");
        let functions = ["read_to_end", "leaky_handler", "serve", "main"];
        Self::build(directory, text, "-O2 -g -gz=none", &functions)
    }

    /// The place of a section's header, and of its bytes.
    fn section(&self, name: &str) -> Result<Option<(usize, std::ops::Range<usize>)>> {
        let file = object::File::parse(&*self.bytes)?;
        let Some(section) = file.section_by_name(name) else {
            return Ok(None);
        };
        let Some((at, size)) = section.file_range() else {
            return Ok(None);
        };
        let headers = u64::from_le_bytes(*self.bytes[0x28..].first_chunk().context("a header")?);
        let header = usize::try_from(headers)? + 64 * section.index().0;
        let at = usize::try_from(at)?;
        Ok(Some((header, at..at + usize::try_from(size)?)))
    }
}

/// A file and what was done to it.
struct Damaged {
    what: String,
    bytes: Vec<u8>,
}

/// Numbers that are the same each time. Numerical Recipes, chapter 7.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: usize) -> usize {
        let next = self.0.wrapping_mul(6_364_136_223_846_793_005);
        self.0 = next.wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap_or_default() % limit
    }
}

const SECTIONS: [&str; 11] = [
    ".debug_info",
    ".debug_line",
    ".debug_abbrev",
    ".debug_str",
    ".debug_aranges",
    ".debug_rnglists",
    ".eh_frame",
    ".eh_frame_hdr",
    ".symtab",
    ".strtab",
    ".shstrtab",
];

// include/uapi/linux/elf.h: where the fields of a section's header are.
const SH_FLAGS: usize = 8;
const SH_OFFSET: usize = 24;
const SH_SIZE: usize = 32;
const SHF_COMPRESSED: u64 = 0x800;

fn damages(original: &Original) -> Result<Vec<Damaged>> {
    let mut all = Vec::new();
    let mut add = |what: String, bytes: Vec<u8>| all.push(Damaged { what, bytes });
    let with = |at: usize, part: &[u8]| {
        let mut bytes = original.bytes.clone();
        bytes[at..at + part.len()].copy_from_slice(part);
        bytes
    };
    let len = original.bytes.len();
    for part in 0..16 {
        add(
            format!("cut at {part}/16"),
            original.bytes[..len * part / 16].to_vec(),
        );
    }
    for (field, at, size) in [
        ("the class", 4, 1),
        ("the byte order", 5, 1),
        ("the processor", 18, 2),
        ("the program headers", 32, 8),
        ("the section headers", 40, 8),
        ("the number of program headers", 56, 2),
        ("the size of a section header", 58, 2),
        ("the number of sections", 60, 2),
        ("the section of names", 62, 2),
    ] {
        for value in [0, 2, u64::MAX] {
            add(
                format!("{field}: {value:#x}"),
                with(at, &value.to_le_bytes()[..size]),
            );
        }
    }
    let mut numbers = Numbers(17);
    for name in SECTIONS {
        let Some((header, range)) = original.section(name)? else {
            continue;
        };
        for (field, at) in [("offset", SH_OFFSET), ("size", SH_SIZE)] {
            for value in [1, len as u64 - 1, u64::MAX >> 1, u64::MAX] {
                let bytes = with(header + at, &value.to_le_bytes());
                add(format!("{name}, {field} {value:#x}"), bytes);
            }
        }
        let flags = u64::from_le_bytes(
            *original.bytes[header + SH_FLAGS..]
                .first_chunk()
                .context("flags")?,
        );
        let compressed = with(header + SH_FLAGS, &(flags | SHF_COMPRESSED).to_le_bytes());
        for (kind, size) in [(1, 1), (1, 1 << 40), (1, u64::MAX), (2, 1 << 30), (77, 0)] {
            // struct Elf64_Chdr, and an empty stream of zlib.
            let head = [kind, size, 1_u64].map(u64::to_le_bytes).concat();
            let stream = [0x78, 0x9c, 0x03, 0, 0, 0, 0, 1];
            let mut bytes = compressed.clone();
            if range.len() > head.len() + stream.len() {
                bytes[range.start..][..head.len()].copy_from_slice(&head);
                bytes[range.start + head.len()..][..stream.len()].copy_from_slice(&stream);
            }
            add(
                format!("{name}, compressed by {kind} from {size:#x}"),
                bytes,
            );
        }
        for at_once in [1, 1, 2, 5, 20, 50] {
            let mut bytes = original.bytes.clone();
            for _ in 0..at_once {
                let other = bytes[range.start + numbers.below(range.len())];
                let value = [0, 1, 0x7f, 0x80, 0xff, other][numbers.below(6)];
                bytes[range.start + numbers.below(range.len())] = value;
            }
            add(format!("{name}, {at_once} other bytes"), bytes);
        }
    }
    Ok(all)
}

/// A process that has files mapped as code.
struct Holder {
    child: Child,
    addresses: Vec<u64>,
}

impl Holder {
    fn start(directory: &Path, files: &[PathBuf]) -> Result<Self> {
        let source = directory.join("holds.c");
        fs::write(&source, include_str!("../../netns-harness/leaks/holds.c"))?;
        let program = directory.join("holds");
        let compiled = Command::new("cc")
            .arg("-o")
            .args([&program, &source])
            .output()?;
        ensure!(compiled.status.success(), "{compiled:?}");
        let mut child = Command::new(program)
            .args(files)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let lines = BufReader::new(child.stdout.take().context("no stdout")?).lines();
        let mut addresses = Vec::new();
        for line in lines.take(files.len()) {
            let line = line?;
            let digits = line.strip_prefix("0x").with_context(|| line.clone())?;
            addresses.push(u64::from_str_radix(digits, 16)?);
        }
        ensure!(addresses.len() == files.len(), "not all files are mapped");
        Ok(Holder { child, addresses })
    }

    /// What the process that reads symbols says of a stack with these functions of a file, and how it ends: the status, and its lines.
    fn ask(&self, file: usize, functions: &[u64]) -> Result<(Option<i32>, Vec<Value>)> {
        let at = self.addresses[file];
        // The stack has the addresses often, so that each of them is found, whatever the unwind information says.
        let words = functions[1..].iter().flat_map(|function| {
            let mut words = [0; 8];
            words[0] = at + function;
            words
        });
        let words: Vec<u64> = words.collect();
        let stack = words.repeat(40).into_iter().flat_map(u64::to_le_bytes);
        let stack: Vec<u8> = stack.collect();
        let sp = 0x7fff_0000_0000;
        // The registers, that the thread is in a system call for sockets, and the length of the stack.
        let head = [at + functions[0], sp, sp + 0x100, 0, 1, stack.len() as u64];
        let pid = self.child.id();
        // The start time: its 22nd field, in ticks, here in nanoseconds.
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let (_, fields) = stat.rsplit_once(')').context("no name")?;
        let ticks = fields.split_whitespace().nth(19).context("no start time")?;
        let started = ticks.parse::<u64>()? * 10_000_000;
        let mut reader = Command::new("timeout")
            .args(["-s", "KILL", MAX_SECONDS, CWKILL, "trace-symbols"])
            .args([pid.to_string(), started.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let mut input = reader.stdin.take().context("no stdin")?;
        // It may have ended.
        let _ = input.write_all(&[head.map(u64::to_le_bytes).concat(), stack].concat());
        drop(input);
        let output = reader.wait_with_output()?;
        let text = String::from_utf8(output.stdout)?;
        let lines = text.lines().map(serde_json::from_str);
        Ok((output.status.code(), lines.collect::<Result<_, _>>()?))
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The functions of the stack in an answer.
fn functions(answer: &Value) -> Vec<&str> {
    let frames = answer["stack"]["frames"].as_array().into_iter().flatten();
    frames
        .filter_map(|frame| frame["function"].as_str())
        .collect()
}

fn an_undamaged_file_is_read() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let original = Original::leak(directory.path())?;
    let holder = Holder::start(directory.path(), &[directory.path().join("built")])?;
    let (status, lines) = holder.ask(0, &original.functions)?;
    assert_eq!((status, lines.len()), (Some(0), 2), "{lines:?}");
    assert_eq!(functions(&lines[0])[0], "read_to_end", "{lines:?}");
    assert_eq!(at(&lines[0], "/problems"), "[]", "{lines:?}");
    assert_eq!(at(&lines[1], "/End"), "[]", "{lines:?}");
    Ok(())
}

/// For example because the kernel was short of memory.
fn a_reader_that_is_killed_is_started_again() -> Result<()> {
    let scene = Scene::start(Leaky::C)?;
    let document = scene.traced(3, |tracing| {
        scene.visit(b'L', 1)?;
        tracing.kill_reader(&scene.lab, scene.server.pid(), None)?;
        scene.visit(b'M', 2)
    })?;
    assert_eq!(at(&document, "/place_unknown"), "0", "{document:#}");
    assert_eq!(codes(&document), [""; 0], "{document:#}");
    for (place, count, handler) in [(0, "2", "other_handler"), (1, "1", "leaky_handler")] {
        let place = &document["places"][place];
        assert_eq!(at(place, "/count"), count, "{document:#}");
        let frames = place["read"]["frames"].as_array().into_iter().flatten();
        let mut names = frames.map(|frame| at(frame, "/function"));
        assert!(names.any(|name| name == handler), "{document:#}");
    }
    Ok(())
}

/// Functions whose origin is themselves, or each other.
fn debug_symbols_that_lead_nowhere_end() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let text = include_str!("../../netns-harness/leaks/cyclic.c");
    let options = "-O2 -shared -fPIC -nostdlib";
    let original = Original::build(directory.path(), text, options, &["read_to_end"])?;
    let holder = Holder::start(directory.path(), &[directory.path().join("built")])?;
    let began = Instant::now();
    let (status, lines) = holder.ask(0, &original.functions)?;
    assert!(began.elapsed() < Duration::from_secs(30), "{lines:?}");
    assert_eq!(status, Some(0), "{lines:?}");
    assert_eq!(functions(&lines[0])[0], "read_to_end", "{lines:?}");
    Ok(())
}

/// A program whose debug symbols are in a file beside it.
struct Separate {
    directory: tempfile::TempDir,
    original: Original,
    built: PathBuf,
    symbols: PathBuf,
}

impl Separate {
    fn build() -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let original = Original::leak(directory.path())?;
        let built = directory.path().join("built");
        let symbols = directory.path().join("symbols.debug");
        let run = |program: &str, arguments: &[&Path]| -> Result<()> {
            let output = Command::new(program).args(arguments).output()?;
            ensure!(output.status.success(), "{output:?}");
            Ok(())
        };
        let option = Path::new("--only-keep-debug");
        run("objcopy", &[option, &built, &symbols])?;
        run("strip", &[&built])?;
        run(
            "objcopy",
            &[Path::new("--add-gnu-debuglink"), &symbols, &built],
        )?;
        Ok(Separate {
            directory,
            original,
            built,
            symbols,
        })
    }

    /// The answer about its functions.
    fn answer(&self) -> Result<Value> {
        let holder = Holder::start(self.directory.path(), std::slice::from_ref(&self.built))?;
        let began = Instant::now();
        let (status, lines) = holder.ask(0, &self.original.functions)?;
        assert!(began.elapsed() < Duration::from_secs(30), "{lines:?}");
        assert_eq!((status, lines.len()), (Some(0), 2), "{lines:?}");
        Ok(lines[0].clone())
    }
}

fn debug_symbols_beside_a_file_are_read() -> Result<()> {
    let program = Separate::build()?;
    let answer = program.answer()?;
    assert_eq!(functions(&answer)[0], "read_to_end", "{answer}");
    let file = at(&answer, "/stack/frames/0/file");
    assert!(file.ends_with("source.c"), "{answer}");
    Ok(())
}

/// What has another build id, or none, is of another program. A pipe would hold the process up.
fn what_is_no_file_of_debug_symbols_is_left_alone() -> Result<()> {
    let program = Separate::build()?;
    let other = Original::build(
        program.directory.path(),
        "int main(void) { return 0; }",
        "-g",
        &["main"],
    )?;
    for content in [other.bytes.as_slice(), b"", b"no program"] {
        fs::write(&program.symbols, content)?;
        let answer = program.answer()?;
        assert_eq!(functions(&answer), [""; 0], "{answer}");
    }
    fs::remove_file(&program.symbols)?;
    nix::unistd::mkfifo(&program.symbols, nix::sys::stat::Mode::S_IRWXU)?;
    let answer = program.answer()?;
    assert_eq!(functions(&answer), [""; 0], "{answer}");
    Ok(())
}

fn damaged_debug_symbols_of_another_file_end_nothing() -> Result<()> {
    let program = Separate::build()?;
    let symbols = Original {
        bytes: fs::read(&program.symbols)?,
        functions: Vec::new(),
    };
    let damages = damages(&symbols)?;
    let huge = damages
        .iter()
        .filter(|it| it.what.contains(", compressed by 1 from 0x1"));
    for Damaged { what, bytes } in huge {
        fs::write(&program.symbols, bytes)?;
        let answer = program.answer().with_context(|| what.clone())?;
        assert!(answer["number"].is_number(), "{what}: {answer}");
    }
    Ok(())
}

fn damaged_files_are_read_or_refused() -> Result<()> {
    let directory = tempfile::tempdir_in("/dev/shm")?;
    let original = Original::leak(directory.path())?;
    let damages = damages(&original)?;
    let mut files = Vec::new();
    for (number, damaged) in damages.iter().enumerate() {
        files.push(directory.path().join(format!("damaged-{number}")));
        fs::write(&files[number], &damaged.bytes)?;
    }
    let holder = Holder::start(directory.path(), &files)?;
    let mut ended = Vec::new();
    for (number, Damaged { what, .. }) in damages.iter().enumerate() {
        let began = Instant::now();
        let (status, lines) = holder.ask(number, &original.functions)?;
        // 137: it did not end by itself. 152 or no status: it was ended for its processor time.
        assert!(
            began.elapsed() < Duration::from_secs(30),
            "{what}: {status:?} {lines:?}"
        );
        if status == Some(0) {
            assert_eq!(lines.len(), 2, "{what}: {lines:?}");
        } else {
            ended.push(what);
        }
    }
    assert!(ended.is_empty(), "{ended:?}");
    let most = getrusage(UsageWho::RUSAGE_CHILDREN)?.max_rss() >> 10;
    assert!(most < 1500, "{most} MB");
    Ok(())
}
