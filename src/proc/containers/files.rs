//! Reads files below the root directory of a host, which may be another one than that of cwkill.

use std::ffi::OsStr;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat, openat2};

/// The longest file about one container.
pub(super) const MAX_FILE: u64 = 4 << 20;
/// The longest file about all containers.
pub(super) const MAX_TABLE: u64 = 64 << 20;
/// The most names of a directory that are read.
const MAX_NAMES: usize = 65_536;

/// A directory that stands for `/`.
pub(super) struct HostRoot {
    path: PathBuf,
    /// `None`: it is `/` itself.
    dir: Option<OwnedFd>,
    /// The path that is being read, for the message if that does not end.
    reading: Arc<Mutex<PathBuf>>,
}

/// Why a file could not be read.
#[derive(Debug)]
pub(super) struct ReadError {
    path: PathBuf,
    pub why: Why,
}

#[derive(Debug)]
pub(super) enum Why {
    Io(io::Error),
    Link,
    NoFile,
    TooLong(u64),
    Content(String),
}

impl ReadError {
    pub fn is_missing(&self) -> bool {
        let Why::Io(error) = &self.why else {
            return false;
        };
        matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR))
    }
}

impl fmt::Display for ReadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path.display(), self.why)
    }
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Why::Io(error) => error.fmt(f),
            Why::Link => f.write_str("it is a symbolic link"),
            Why::NoFile => f.write_str("it is not a regular file"),
            Why::TooLong(limit) => write!(f, "it is longer than {} MiB", limit >> 20),
            Why::Content(why) => f.write_str(why),
        }
    }
}

impl HostRoot {
    /// `reading`: where it writes the path that it is about to read.
    ///
    /// # Errors
    /// It is not a directory that cwkill can open.
    pub fn open(path: &Path, reading: Arc<Mutex<PathBuf>>) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = match path == Path::new("/") {
            true => None,
            false => Some(openat(CWD, path, flags, Mode::empty())?),
        };
        Ok(HostRoot {
            path: path.to_owned(),
            dir,
            reading,
        })
    }

    /// `path`, which begins with a slash, as cwkill sees it.
    pub fn path(&self, path: &str) -> PathBuf {
        self.path.join(path.trim_start_matches('/'))
    }

    /// Reads the regular file `path`, of at most `limit` bytes. It waits for no writer of a FIFO, and leaves devices alone.
    ///
    /// # Errors
    /// It cannot be opened, is something else or longer, or cannot be read.
    pub fn read(&self, path: &str, limit: u64) -> Result<Vec<u8>, ReadError> {
        let error = |why| self.error(path, why);
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::NOCTTY;
        let file = self.at(path, flags).map_err(error)?;
        let metadata = file.metadata().map_err(|e| error(Why::Io(e)))?;
        if !metadata.is_file() {
            return Err(error(Why::NoFile));
        }
        let length = metadata.len().min(limit);
        let mut text = Vec::with_capacity(usize::try_from(length).unwrap_or_default() + 1);
        let read = file.take(limit + 1).read_to_end(&mut text);
        read.map_err(|e| error(Why::Io(e)))?;
        match text.len() as u64 > limit {
            true => Err(error(Why::TooLong(limit))),
            false => Ok(text),
        }
    }

    /// The names in the directory `path`; those that are no UTF-8 are left out.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn names(&self, path: &str) -> Result<Vec<String>, ReadError> {
        let error = |why| self.error(path, why);
        let dir = self
            .at(path, OFlags::RDONLY | OFlags::DIRECTORY)
            .map_err(error)?;
        let entries = rustix::fs::Dir::read_from(&dir).map_err(|e| error(Why::Io(e.into())))?;
        let mut names = Vec::new();
        for entry in entries.take(MAX_NAMES) {
            let entry = entry.map_err(|e| error(Why::Io(e.into())))?;
            let name = entry.file_name().to_str().unwrap_or_default();
            if !matches!(name, "" | "." | "..") {
                names.push(name.to_owned());
            }
        }
        Ok(names)
    }

    /// Opens `path`. In another root than `/`, no symbolic link leads out of it: an absolute one begins at this root.
    fn at(&self, path: &str, flags: OFlags) -> Result<File, Why> {
        *self.reading.lock().unwrap_or_else(PoisonError::into_inner) = self.path(path);
        let flags = flags | OFlags::CLOEXEC;
        let opened = match &self.dir {
            None => openat(CWD, OsStr::new(path), flags, Mode::empty()),
            Some(dir) => {
                let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
                openat2(dir, OsStr::new(path), flags, Mode::empty(), resolve)
            }
        };
        match opened {
            Ok(file) => Ok(File::from(file)),
            Err(error) if error.raw_os_error() == libc::ELOOP => Err(Why::Link),
            Err(error) => Err(Why::Io(error.into())),
        }
    }

    pub fn error(&self, path: &str, why: Why) -> ReadError {
        ReadError {
            path: self.path(path),
            why,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    fn host() -> (tempfile::TempDir, HostRoot) {
        let dir = tempfile::tempdir().unwrap();
        let root = HostRoot::open(dir.path(), Arc::default()).unwrap();
        (dir, root)
    }

    fn why(root: &HostRoot, path: &str, limit: u64) -> String {
        root.read(path, limit).unwrap_err().to_string()
    }

    #[test]
    fn only_a_regular_file_of_that_length_is_read() {
        let (dir, root) = host();
        fs::write(dir.path().join("file"), "12345").unwrap();
        assert_eq!(root.read("/file", 5).unwrap(), b"12345");
        let long = why(&root, "/file", 4);
        assert!(long.ends_with("/file: it is longer than 0 MiB"), "{long}");
        nix::unistd::mkfifo(&dir.path().join("pipe"), nix::sys::stat::Mode::S_IRUSR).unwrap();
        let pipe = why(&root, "/pipe", 4);
        assert!(pipe.ends_with("/pipe: it is not a regular file"), "{pipe}");
        fs::create_dir(dir.path().join("directory")).unwrap();
        assert!(why(&root, "/directory", 4).ends_with("it is not a regular file"));
        assert!(root.read("/missing", 4).unwrap_err().is_missing());
        assert!(root.read("/file/below", 4).unwrap_err().is_missing());
    }

    #[test]
    fn no_link_leads_out_of_the_root() {
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("secret"), "secret").unwrap();
        let (dir, root) = host();
        symlink(outside.path().join("secret"), dir.path().join("link")).unwrap();
        assert!(why(&root, "/link", 9).ends_with("it is a symbolic link"));
        symlink(outside.path(), dir.path().join("up")).unwrap();
        assert!(root.read("/up/secret", 9).unwrap_err().is_missing());
        let depth = "../".repeat(30);
        let path = format!("/{depth}{}/secret", outside.path().display());
        assert!(root.read(&path, 9).unwrap_err().is_missing());
        // A link to a directory of the same root works, as for a data root elsewhere.
        fs::create_dir(dir.path().join("data")).unwrap();
        fs::write(dir.path().join("data/file"), "12345").unwrap();
        symlink("/data", dir.path().join("var")).unwrap();
        assert_eq!(root.read("/var/file", 9).unwrap(), b"12345");
    }

    #[test]
    fn the_names_in_a_directory() {
        let (dir, root) = host();
        fs::create_dir(dir.path().join("d")).unwrap();
        fs::write(dir.path().join("d/a"), "").unwrap();
        symlink("/nowhere", dir.path().join("d/b")).unwrap();
        let mut names = root.names("/d").unwrap();
        names.sort();
        assert_eq!(names, ["a", "b"]);
        assert!(root.names("/missing").unwrap_err().is_missing());
    }
}
