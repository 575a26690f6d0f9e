//! The memory of a process: which files its code is in, and how to open them.

use std::cell::{OnceCell, RefCell};
use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::rc::Rc;
use std::sync::mpsc::{Receiver, channel};
use std::thread::Builder;

use super::module::{self, Module, Root};
use crate::trace::origin::Runtime;

/// A part of the memory that has code.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Code {
    pub start: u64,
    pub end: u64,
    /// The place of `start` in the file.
    pub offset: u64,
    pub from: CodeSource,
}

/// Where code comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CodeSource {
    File(Mapped),
    /// The kernel's own code in every process.
    Vdso,
    /// Made at run time.
    RunTime,
}

/// A mapped file.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Mapped {
    /// Its name, as the process sees it, without the mark of a deleted file.
    pub name: String,
    device: String,
    inode: u64,
}

/// The mark that the kernel puts after the name of a file that has no name any more.
const DELETED: &str = " (deleted)";

/// The code in the memory of a process, by its address, and the files that it is in.
#[derive(Debug, Default)]
pub struct Memory {
    pid: i32,
    code: Vec<Code>,
    /// The files that are open. They can be read after they were deleted, and after the process has ended. None is closed before all are: names
    /// are remembered by the numbers of the descriptors.
    modules: Rc<RefCell<HashMap<Mapped, Rc<Module>>>>,
    /// Files that no stack has needed yet, as a thread opens them.
    early: Rc<Early>,
}

#[derive(Debug, Default)]
struct Early {
    arriving: OnceCell<Receiver<(Mapped, File)>>,
    arrived: RefCell<HashMap<Mapped, File>>,
}

/// Files that are opened before a stack needs them.
const OPENED_EARLY: usize = 256;

impl Memory {
    /// # Errors
    /// ENOENT, ESRCH: no such process. EACCES, EPERM: /proc/PID/maps needs the same rights as ptrace(2).
    pub fn read(pid: i32) -> io::Result<Self> {
        Ok(Self::parse(pid, &fs::read(format!("/proc/{pid}/maps"))?))
    }

    /// The same process later. The files stay open.
    ///
    /// # Errors
    /// As [`Memory::read`].
    pub fn read_again(&self) -> io::Result<Self> {
        let again = Self::read(self.pid)?;
        Ok(Memory {
            modules: self.modules.clone(),
            early: self.early.clone(),
            ..again
        })
    }

    /// A line that is not understood is left out. The name of a file may have any bytes.
    pub fn parse(pid: i32, maps: &[u8]) -> Self {
        let maps = String::from_utf8_lossy(maps);
        Memory {
            pid,
            code: maps.split('\n').filter_map(code).collect(),
            modules: Rc::default(),
            early: Rc::default(),
        }
    }

    /// Has a thread open the files: the process may end soon. One of them may hang; then only who needs it waits.
    pub fn open_files(&self) {
        let (pid, code) = (self.pid, self.code.clone());
        let (sender, receiver) = channel();
        let open_all = move || {
            for code in code.iter().take(OPENED_EARLY) {
                if let CodeSource::File(file) = &code.from
                    && let Ok(opened) = open(pid, code, file)
                {
                    let _ = sender.send((file.clone(), opened));
                }
            }
        };
        if Builder::new().name("files".into()).spawn(open_all).is_ok() {
            let _ = self.early.arriving.set(receiver);
        }
    }

    fn opened_early(&self, file: &Mapped) -> Option<File> {
        let mut arrived = self.early.arrived.borrow_mut();
        if let Some(arriving) = self.early.arriving.get() {
            arrived.extend(arriving.try_iter());
        }
        arrived.remove(file)
    }

    /// The file that `code` is in; `None` if it cannot be opened, or if there is another one in its place.
    pub fn module(&self, code: &Code, file: &Mapped) -> Option<Rc<Module>> {
        let mut modules = self.modules.borrow_mut();
        if let Some(module) = modules.get(file) {
            return Some(module.clone());
        }
        let opened = match self.opened_early(file) {
            Some(opened) => opened,
            None => open(self.pid, code, file).ok()?,
        };
        let module = Rc::new(Module::new(opened, &file.name, self.pid));
        modules.insert(file.clone(), module.clone());
        Some(module)
    }

    /// The code at this address.
    pub fn at(&self, address: u64) -> Option<&Code> {
        let after = self.code.partition_point(|code| code.start <= address);
        let code = self.code.get(after.checked_sub(1)?)?;
        (address < code.end).then_some(code)
    }

    /// Whether each file is where it was before.
    pub fn has_all_files_of(&self, before: &Memory) -> bool {
        let mut code = before.code.iter();
        code.all(|code| code.from == CodeSource::RunTime || self.at(code.start) == Some(code))
    }

    /// The first address of code.
    pub fn start(&self) -> u64 {
        self.code.first().map_or(0, |code| code.start)
    }

    /// The end of the last code.
    pub fn end(&self) -> u64 {
        self.code.last().map_or(0, |code| code.end)
    }

    /// What the process runs on, as far as the names of its files tell it.
    pub fn runtime(&self) -> Option<Runtime> {
        self.code.iter().find_map(|code| match &code.from {
            CodeSource::File(file) => runtime(base(&file.name)),
            CodeSource::Vdso | CodeSource::RunTime => None,
        })
    }
}

/// Opens the very file that `code` is in: by map_files, also after it was deleted or replaced; else by its name, if the inode is the same.
///
/// # Errors
/// The file cannot be opened, or there is another one in its place.
fn open(pid: i32, code: &Code, file: &Mapped) -> io::Result<File> {
    // It needs CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN of the first user namespace (fs/proc/base.c, proc_map_files_get_link).
    let (start, end) = (code.start, code.end);
    let by_map = format!("/proc/{pid}/map_files/{start:x}-{end:x}");
    if let Ok(file) = module::open(Path::new(&by_map)) {
        return Ok(file);
    }
    let by_name = Root::of(pid)?.open(Path::new(&file.name))?;
    match by_name.metadata()?.ino() == file.inode {
        true => Ok(by_name),
        false => Err(io::ErrorKind::NotFound.into()),
    }
}

/// The code of a line of /proc/PID/maps, if it has code. Source: proc_pid_maps(5).
fn code(line: &str) -> Option<Code> {
    let mut words = line.splitn(6, ' ');
    let (start, end) = words.next()?.split_once('-')?;
    if !words.next()?.contains('x') {
        return None;
    }
    let hex = |word| u64::from_str_radix(word, 16).ok();
    let offset = hex(words.next()?)?;
    let device = words.next()?;
    let inode = words.next()?.parse().ok()?;
    let from = match words.next()?.trim_start_matches(' ') {
        name if is_made_at_run_time(name) => CodeSource::RunTime,
        name if name.starts_with('/') => CodeSource::File(Mapped {
            name: name.strip_suffix(DELETED).unwrap_or(name).to_owned(),
            device: device.to_owned(),
            inode,
        }),
        "[vdso]" => CodeSource::Vdso,
        _ => CodeSource::RunTime,
    };
    Some(Code {
        start: hex(start)?,
        end: hex(end)?,
        offset,
        from,
    })
}

/// Files in memory that runtimes put code into, to have it mapped twice: .NET, QEMU, and any with large pages.
fn is_made_at_run_time(name: &str) -> bool {
    const FILES: [&str; 4] = [
        "/memfd:doublemapper",
        "/memfd:tcg-jit",
        "/anon_hugepage",
        "/dev/zero",
    ];
    FILES.contains(&name.strip_suffix(DELETED).unwrap_or(name))
}

pub fn base(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}

fn runtime(base: &str) -> Option<Runtime> {
    let after = |start: &str| base.strip_prefix(start);
    if after("libjvm.so").is_some() {
        return Some(Runtime::Java);
    }
    if after("libnode.so").is_some() || base == "node" || base == "nodejs" {
        return Some(Runtime::Node);
    }
    let version = after("libpython").or_else(|| after("python"))?;
    let mut numbers = version.split('.').map(|number| number.parse().ok());
    let (major, minor) = (numbers.next().flatten()?, numbers.next().flatten()?);
    Some(Runtime::Python(major, minor))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_finds_its_own_code() {
        let pid = std::process::id().cast_signed();
        let memory = Memory::read(pid).unwrap();
        let here = a_process_finds_its_own_code as *const () as usize as u64;
        let code = memory.at(here).unwrap();
        let CodeSource::File(file) = &code.from else {
            panic!("{code:?}");
        };
        let own = File::open("/proc/self/exe").unwrap().metadata().unwrap();
        let opened = open(pid, code, file).unwrap().metadata().unwrap();
        assert_eq!((opened.dev(), opened.ino()), (own.dev(), own.ino()));
        assert_eq!(memory.at(0), None);
        assert!(memory.has_all_files_of(&Memory::read(pid).unwrap()));
        assert!(!Memory::default().has_all_files_of(&memory));
    }

    #[test]
    fn only_lines_with_code_are_kept() {
        let maps = b"1000-3000 r--p 00000000 fe:01 7   /srv/app
3000-5000 r-xp 00002000 fe:01 7                          /srv/app
5000-6000 rwxp 00000000 00:00 0 \n6000-7000 r-xp 00000000 00:00 0   [vdso]
7000-8000 r-xp 0000
8000-9000 r-xp 00001000 00:1f 99   /srv/a b \xe9.so (deleted)
9000-a000 r-xp 00000000 00:1f 98   /SYSV
a000-b000 rwxs 00000000 00:01 97   /memfd:doublemapper (deleted)
b000-c000 r-xp 00000000 00:01 96   /memfd:runc_cloned:/proc/self/exe (deleted)
";
        let file = |name: &str, device: &str, inode| {
            CodeSource::File(Mapped {
                name: name.into(),
                device: device.into(),
                inode,
            })
        };
        let cloned = "/memfd:runc_cloned:/proc/self/exe";
        let code = [
            (0x3000, 0x5000, 0x2000, file("/srv/app", "fe:01", 7)),
            (0x5000, 0x6000, 0, CodeSource::RunTime),
            (0x6000, 0x7000, 0, CodeSource::Vdso),
            (
                0x8000,
                0x9000,
                0x1000,
                file("/srv/a b \u{fffd}.so", "00:1f", 99),
            ),
            // Not a part of memory that processes share (shmget(2)), though its name begins like one's.
            (0x9000, 0xa000, 0, file("/SYSV", "00:1f", 98)),
            (0xa000, 0xb000, 0, CodeSource::RunTime),
            // A program can be run from memory.
            (0xb000, 0xc000, 0, file(cloned, "00:01", 96)),
        ];
        let code = code.map(|(start, end, offset, from)| Code {
            start,
            end,
            offset,
            from,
        });
        assert_eq!(Memory::parse(1, maps).code, code);
    }

    #[test]
    fn runtimes_are_known_by_their_files() {
        for (name, expected) in [
            ("libjvm.so", Some(Runtime::Java)),
            ("python3.11", Some(Runtime::Python(3, 11))),
            ("libpython3.13.so.1.0", Some(Runtime::Python(3, 13))),
            ("node", Some(Runtime::Node)),
            ("libnode.so.108", Some(Runtime::Node)),
            ("nodejs-exporter", None),
            ("python-like", None),
        ] {
            assert_eq!(runtime(name), expected, "{name}");
        }
    }
}
