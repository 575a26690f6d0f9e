//! The files with code of a process: what may be read of each, and where its debug symbols are.
//!
//! Who rules a container, or writes a program, chooses what these files say. A path in them could have root open a device, a pipe, or a file that
//! nobody else may read. So debug symbols are looked for in the root directory of the process, and opened only if they are a regular file.

use std::ffi::OsStr;
use std::fmt::Write;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use object::read::{ReadCache, ReadRef};
use object::{CompressionFormat, Object, ObjectSection, ObjectSegment};
use rustix::fs::{FileType, Mode, OFlags, ResolveFlags};

/// The directories in which packages put debug symbols.
pub const DEBUG_DIRS: [&str; 2] = ["/usr/lib/debug", "/lib/debug"];

/// The most bytes that compressed sections of a file may have, of the 1 GiB that the process has.
const MAX_INFLATED: u64 = 512 << 20;

/// A file with code.
#[derive(Debug)]
pub struct Module {
    pub file: File,
    pub content: Content,
    /// The file with its debug symbols, if it is another one.
    pub debug: Option<Debug>,
}

/// What may be read of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    All,
    /// Its debug symbols are elsewhere, or it is no file of a program.
    NoDebug,
    /// Its debug symbols would take too much memory, or are not compressed by zlib.
    DebugUnreadable,
    /// Sections are compressed that no linker compresses. blazesym could run out of memory.
    Nothing,
}

/// A file with the debug symbols of another one.
#[derive(Debug)]
pub struct Debug {
    file: File,
    /// Where the parts of the other file are in it, and at which addresses of the program.
    segments: Vec<Segment>,
}

#[derive(Debug)]
struct Segment {
    at: u64,
    size: u64,
    address: u64,
}

impl Module {
    /// `name`: its path as the process sees it.
    pub fn new(file: File, name: &str, pid: i32) -> Self {
        let cache = ReadCache::new(&file);
        let Ok(elf) = object::File::parse(&cache) else {
            return Module {
                file,
                content: Content::NoDebug,
                debug: None,
            };
        };
        let content = match content(&elf) {
            // blazesym would follow them.
            Content::All if is_linked(&elf) || has_supplement(&elf) => Content::NoDebug,
            content => content,
        };
        let has_debug = elf.section_by_name(".debug_info").is_some();
        let is_wanted = content == Content::NoDebug || content == Content::All && !has_debug;
        let debug = match is_wanted {
            true => Debug::find(&elf, name, pid),
            false => None,
        };
        Module {
            file,
            content,
            debug,
        }
    }

    /// A path that leads to this very file.
    pub fn path(&self) -> PathBuf {
        path_of(&self.file)
    }
}

impl Debug {
    /// By the build id, which both files must have; also by the name that the file gives.
    fn find<'d, R: ReadRef<'d>>(elf: &object::File<'d, R>, name: &str, pid: i32) -> Option<Self> {
        let id = elf.build_id().ok()??;
        let mut names = Vec::new();
        if let [first, rest @ ..] = id {
            let rest = rest.iter().fold(String::new(), |mut rest, byte| {
                let _ = write!(rest, "{byte:02x}");
                rest
            });
            names = DEBUG_DIRS
                .map(|dir| format!("{dir}/.build-id/{first:02x}/{rest}.debug").into())
                .to_vec();
        }
        let by_build_id = names.len();
        if let Ok(Some((link, _))) = elf.gnu_debuglink() {
            let link = OsStr::from_bytes(link);
            let directory = Path::new(name).parent().unwrap_or(Path::new("/"));
            let in_debug_dir = Path::new(DEBUG_DIRS[0]).join(directory.strip_prefix("/").ok()?);
            names.extend([
                directory.join(link),
                directory.join(".debug").join(link),
                in_debug_dir.join(link),
            ]);
        }
        let found = |root: io::Result<Root>, names: &[PathBuf], may_have_supplement| {
            let root = root.ok()?;
            let mut files = names.iter().filter_map(|name| root.open(name).ok());
            files.find(|file| is_of(file, id, may_have_supplement))
        };
        let file = found(Root::of(pid), &names, false)
            // What root has installed on the host is not hostile.
            .or_else(|| found(Root::at("/"), &names[..by_build_id], true))?;
        let segments = elf.segments().map(|segment| {
            let (at, size) = segment.file_range();
            let address = segment.address();
            Segment { at, size, address }
        });
        Some(Debug {
            file,
            segments: segments.collect(),
        })
    }

    /// A path that leads to this very file.
    pub fn path(&self) -> PathBuf {
        path_of(&self.file)
    }

    /// The address in the program of a place in the other file.
    pub fn address(&self, at: u64) -> Option<u64> {
        self.segments.iter().find_map(|segment| {
            let offset = at.checked_sub(segment.at)?;
            (offset < segment.size).then(|| segment.address.wrapping_add(offset))
        })
    }
}

/// Whether a file has the debug symbols of the program with this build id, and they may be read.
fn is_of(file: &File, id: &[u8], may_have_supplement: bool) -> bool {
    let cache = ReadCache::new(file);
    object::File::parse(&cache).is_ok_and(|elf| {
        elf.build_id() == Ok(Some(id))
            && content(&elf) == Content::All
            && !is_linked(&elf)
            && (may_have_supplement || !has_supplement(&elf))
    })
}

/// Whether it names another file with its debug symbols.
fn is_linked<'d, R: ReadRef<'d>>(elf: &object::File<'d, R>) -> bool {
    elf.section_by_name(".gnu_debuglink").is_some()
}

/// Whether it names a file with a part of its debug symbols, which several files share (dwz).
fn has_supplement<'d, R: ReadRef<'d>>(elf: &object::File<'d, R>) -> bool {
    [".gnu_debugaltlink", ".debug_sup"]
        .iter()
        .any(|name| elf.section_by_name(name).is_some())
}

/// By its compressed sections: blazesym 0.2.7 asks for as much memory as one says, and ends the process if there is not as much. It is built
/// with zlib alone.
fn content<'d, R: ReadRef<'d>>(elf: &object::File<'d, R>) -> Content {
    let mut inflated = 0_u64;
    for section in elf.sections() {
        let range = section.compressed_file_range();
        match range.map(|it| (it.format, it.uncompressed_size)) {
            Ok((CompressionFormat::None, _)) => {}
            Ok((format, size)) if is_debug(section.name_bytes()) => {
                let is_zlib = format == CompressionFormat::Zlib;
                inflated = inflated.saturating_add(if is_zlib { size } else { u64::MAX });
            }
            // No linker compresses others.
            Ok(_) => return Content::Nothing,
            Err(_) => inflated = u64::MAX,
        }
    }
    match inflated > MAX_INFLATED {
        true => Content::DebugUnreadable,
        false => Content::All,
    }
}

/// Also by the names that compressed ones had before they had a flag.
fn is_debug(name: Result<&[u8], object::Error>) -> bool {
    name.is_ok_and(|name| name.starts_with(b".debug_") || name.starts_with(b".zdebug_"))
}

/// The root directory of a process.
pub struct Root(OwnedFd);

impl Root {
    /// # Errors
    /// As open(2).
    pub fn of(pid: i32) -> io::Result<Self> {
        Self::at(&format!("/proc/{pid}/root"))
    }

    fn at(path: &str) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Root(rustix::fs::open(path, flags, Mode::empty())?))
    }

    /// Opens a regular file. No link leads out of the root directory.
    ///
    /// # Errors
    /// As openat2(2). EINVAL: it is no regular file.
    pub fn open(&self, name: &Path) -> io::Result<File> {
        self.open_with(name, OFlags::empty())
    }

    /// The same, and the name must not be that of a link: anybody may put one into /tmp.
    ///
    /// # Errors
    /// As [`Root::open`].
    pub fn open_itself(&self, name: &Path) -> io::Result<File> {
        self.open_with(name, OFlags::NOFOLLOW)
    }

    fn open_with(&self, name: &Path, flags: OFlags) -> io::Result<File> {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let flags = OFlags::PATH | OFlags::CLOEXEC | flags;
        open_regular(rustix::fs::openat2(
            &self.0,
            name,
            flags,
            Mode::empty(),
            resolve,
        )?)
    }
}

/// Opens a regular file, by any path.
///
/// # Errors
/// As open(2). EINVAL: it is no regular file.
pub fn open(path: &Path) -> io::Result<File> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    open_regular(rustix::fs::open(path, flags, Mode::empty())?)
}

/// To open a device can do something already. So it is looked at first.
fn open_regular(found: OwnedFd) -> io::Result<File> {
    match FileType::from_raw_mode(rustix::fs::fstat(&found)?.st_mode) {
        FileType::RegularFile => File::open(path_of(&found)),
        _ => Err(Errno::EINVAL.into()),
    }
}

fn path_of(file: &impl AsRawFd) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn no_link_leads_out_of_the_root() {
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("secret"), "").unwrap();
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        fs::create_dir(at("in")).unwrap();
        fs::write(at("in/file"), "").unwrap();
        symlink("/in/file", at("absolute")).unwrap();
        symlink("../../../../in/file", at("in/up")).unwrap();
        symlink(outside.path().join("secret"), at("out")).unwrap();
        symlink("/proc/self/exe", at("magic")).unwrap();
        let device = Path::new("/dev/null");
        assert!(open(device).is_err());
        assert!(open(&at("in/file")).is_ok());
        nix::unistd::mkfifo(&at("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let root = Root::at(root.path().to_str().unwrap()).unwrap();
        let is_opened = |name: &str| root.open(Path::new(name)).is_ok();
        for name in ["in/file", "/in/file", "absolute", "in/up", "/../in/file"] {
            assert!(is_opened(name), "{name}");
        }
        assert!(root.open_itself(Path::new("in/file")).is_ok());
        assert!(root.open_itself(Path::new("absolute")).is_err());
        for name in ["out", "magic", "pipe", "in", "/none"] {
            assert!(!is_opened(name), "{name}");
        }
    }

    #[test]
    fn a_place_in_the_file_has_an_address() {
        let segment = |at, size, address| Segment { at, size, address };
        let debug = Debug {
            file: File::open("/dev/null").unwrap(),
            segments: vec![segment(0, 0x100, 0x40_0000), segment(0x100, 8, 0x60_0100)],
        };
        assert_eq!(debug.address(0x10), Some(0x40_0010));
        assert_eq!(debug.address(0x100), Some(0x60_0100));
        assert_eq!(debug.address(0x108), None);
    }
}
