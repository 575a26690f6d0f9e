//! The memory of a process: which files its code is in, and how to open them.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use procfs::process::{MMPermissions, MMapPath, MemoryMap};

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
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapped {
    /// Its name, as the process sees it, without the mark of a deleted file.
    pub name: String,
    device: (i32, i32),
    inode: u64,
}

/// The mark that the kernel puts after the name of a file that has no name any more.
const DELETED: &str = " (deleted)";

/// The code in the memory of a process, by its address.
#[derive(Debug, Default)]
pub struct Memory {
    pid: i32,
    code: Vec<Code>,
}

impl Memory {
    /// # Errors
    /// ENOENT, ESRCH: no such process. EACCES, EPERM: /proc/PID/maps needs the same rights as ptrace(2).
    pub fn read(pid: i32) -> io::Result<Self> {
        let maps = procfs::process::Process::new(pid)
            .and_then(|process| process.maps())
            .map_err(crate::proc::stat_error)?;
        let code = maps.into_iter().filter_map(code).collect();
        Ok(Memory { pid, code })
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

    /// A path by which cwkill can open the file that `code` is in. The path leads to that file, also if another one has its name now.
    ///
    /// # Errors
    /// The file cannot be opened, or there is another one in its place.
    pub fn path(&self, code: &Code, file: &Mapped) -> io::Result<PathBuf> {
        // It needs CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN of the first user namespace (fs/proc/base.c, proc_map_files_get_link).
        let (start, end) = (code.start, code.end);
        let by_map = PathBuf::from(format!("/proc/{}/map_files/{start:x}-{end:x}", self.pid));
        if fs::metadata(&by_map).is_ok_and(|metadata| metadata.is_file()) {
            return Ok(by_map);
        }
        let by_name = PathBuf::from(format!("/proc/{}/root{}", self.pid, file.name));
        let metadata = fs::metadata(&by_name)?;
        match metadata.is_file() && metadata.ino() == file.inode {
            true => Ok(by_name),
            false => Err(io::ErrorKind::NotFound.into()),
        }
    }
}

/// Opens a file to read it. A FIFO in its place does not hold the reader up.
///
/// # Errors
/// As open(2).
pub fn open(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    options
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(path)
}

fn code(map: MemoryMap) -> Option<Code> {
    if !map.perms.contains(MMPermissions::EXECUTE) {
        return None;
    }
    let from = match map.pathname {
        MMapPath::Path(path) => {
            let name = path.to_string_lossy();
            CodeSource::File(Mapped {
                name: name.strip_suffix(DELETED).unwrap_or(&name).to_owned(),
                device: map.dev,
                inode: map.inode,
            })
        }
        MMapPath::Vdso => CodeSource::Vdso,
        _ => CodeSource::RunTime,
    };
    Some(Code {
        start: map.address.0,
        end: map.address.1,
        offset: map.offset,
        from,
    })
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
        let path = memory.path(code, file).unwrap();
        assert!(open(&path).unwrap().metadata().unwrap().is_file());
        assert_eq!(memory.at(0), None);
        assert!(memory.has_all_files_of(&Memory::read(pid).unwrap()));
        assert!(!Memory::default().has_all_files_of(&memory));
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
