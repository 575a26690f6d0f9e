//! The file of the history: where it is, and how it is read and written safely.
//!
//! Everything is done with the rights of the user who started cwkill. Another user must not be able to put a file there, so
//! the directory belongs to this user alone. A new file is complete before it gets the name of the old one.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg, OFlag, open, openat, renameat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat};
use nix::unistd::{UnlinkatFlags, getuid, unlinkat};

use super::encoding::{Epoch, MAX_BYTES, Unusable, decode, encode};
use super::entries::Entries;
use crate::sys::caller::as_caller;

/// The directory of root.
const OF_ROOT: &str = "/run/cwkill";
/// Names a directory for the file; if it is empty, there is no history.
const VARIABLE: &str = "CWKILL_HISTORY";
const NAME: &str = "history";
/// A file that is not complete yet.
const NEW: &str = "history.new";
const GROUP_OR_OTHERS_WRITE: u32 = 0o022;
/// How often to ask for the lock, and the pause in between. Another run holds it for some milliseconds.
const LOCK_ATTEMPTS: u32 = 50;
const LOCK_PAUSE: Duration = Duration::from_millis(10);

/// The file, and which version of it was read.
#[derive(Clone, Debug)]
pub(super) struct HistoryFile {
    directory: PathBuf,
    epoch: Epoch,
    /// The file that was read; `None` if there was none, or if it could not be used.
    known: Option<Stamp>,
}

/// A version of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    inode: u64,
    size: i64,
    modified: (i64, i64),
}

impl Stamp {
    fn of(stat: &FileStat) -> Self {
        Stamp {
            inode: stat.st_ino,
            size: stat.st_size,
            modified: (stat.st_mtime, stat.st_mtime_nsec),
        }
    }
}

/// Why the file is not used.
#[derive(Debug, thiserror::Error)]
enum FileError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Refused(&'static str),
    #[error("{0}")]
    Content(#[from] Unusable),
}

impl From<Errno> for FileError {
    fn from(errno: Errno) -> Self {
        FileError::Io(errno.into())
    }
}

impl HistoryFile {
    /// `None` if this user has no directory that ends with the host, or wants no history.
    pub fn of_this_user() -> Option<Self> {
        let directory = match std::env::var_os(VARIABLE) {
            Some(directory) => PathBuf::from(directory),
            None if getuid().is_root() => OF_ROOT.into(),
            None => Path::new(&std::env::var_os("XDG_RUNTIME_DIR")?).join("cwkill"),
        };
        Some(HistoryFile {
            epoch: epoch()?,
            known: None,
            directory: directory.is_absolute().then_some(directory)?,
        })
    }

    /// Reads the file. If there is none, or it is of another boot, nothing is known.
    ///
    /// # Errors
    /// In words: it cannot be used.
    pub fn read(&mut self, now: Duration) -> Result<Entries, String> {
        let result = as_caller(|| {
            Ok(match self.open_directory() {
                Err(FileError::Io(error)) if is_missing(&error) => None,
                Err(error) => return Ok(Err(error)),
                Ok(directory) => Some(directory),
            }
            .map_or(Ok(None), |directory| self.read_in(&directory, now)))
        });
        match result.unwrap_or_else(|error| Err(error.into())) {
            Ok(None) | Err(FileError::Content(Unusable::OtherBoot)) => Ok(Entries::default()),
            Ok(Some((entries, stamp))) => {
                self.known = Some(stamp);
                Ok(entries)
            }
            Err(error) => Err(self.describe(&error)),
        }
    }

    /// Writes the entries, together with those that another run has written since [`HistoryFile::read`].
    ///
    /// # Errors
    /// In words: they cannot be written. The old file stays.
    pub fn write(&mut self, entries: &mut Entries, now: Duration) -> Result<(), String> {
        let written = as_caller(|| Ok(self.write_as_caller(entries, now)));
        let written = written.unwrap_or_else(|error| Err(error.into()));
        written.map_err(|error| self.describe(&error))
    }

    fn write_as_caller(&mut self, entries: &mut Entries, now: Duration) -> Result<(), FileError> {
        match DirBuilder::new().mode(0o700).create(&self.directory) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error.into()),
            _ => {}
        }
        let directory = lock(self.open_directory()?)?;
        // A file that cannot be used is replaced. One that this run has read is not read again.
        if let Ok(Some((file, stamp))) = open_file(&directory)
            && self.known != Some(stamp)
            && let Ok(others) = self.decode_file(file, stamp, now)
        {
            entries.merge(others);
            entries.shrink();
        }
        // A run that was killed may have left one.
        match unlinkat(&*directory, NEW, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => {}
            Err(errno) => return Err(errno.into()),
        }
        let flags =
            OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let new = openat(&*directory, NEW, flags, Mode::S_IRUSR | Mode::S_IWUSR)?;
        let mut file = File::from(new);
        let written = file.write_all(&encode(entries, self.epoch));
        let renamed = written.and_then(|()| {
            renameat(&*directory, NEW, &*directory, NAME)?;
            Ok(())
        });
        if let Err(error) = renamed {
            let _ = unlinkat(&*directory, NEW, UnlinkatFlags::NoRemoveDir);
            return Err(error.into());
        }
        self.known = Some(Stamp::of(&fstat(&file)?));
        Ok(())
    }

    fn open_directory(&self) -> Result<OwnedFd, FileError> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let directory = open(&self.directory, flags, Mode::empty())?;
        let stat = fstat(&directory)?;
        if stat.st_uid != getuid().as_raw() {
            return Err(FileError::Refused("the directory belongs to another user"));
        }
        if stat.st_mode & GROUP_OR_OTHERS_WRITE != 0 {
            return Err(FileError::Refused(
                "others can write the directory (chmod go-w)",
            ));
        }
        Ok(directory)
    }

    /// `None` if there is no file.
    fn read_in(
        &self,
        directory: &OwnedFd,
        now: Duration,
    ) -> Result<Option<(Entries, Stamp)>, FileError> {
        let Some((file, stamp)) = open_file(directory)? else {
            return Ok(None);
        };
        Ok(Some((self.decode_file(file, stamp, now)?, stamp)))
    }

    fn decode_file(&self, file: File, stamp: Stamp, now: Duration) -> Result<Entries, FileError> {
        let mut bytes = Vec::with_capacity(usize::try_from(stamp.size).unwrap_or(0));
        let limit = u64::try_from(MAX_BYTES).unwrap_or(u64::MAX);
        file.take(limit).read_to_end(&mut bytes)?;
        Ok(decode(&bytes, self.epoch, now)?)
    }

    fn describe(&self, error: &FileError) -> String {
        format!("{}: {error}", self.directory.join(NAME).display())
    }
}

/// Opens the file, if it can only be of this user; `None` if there is none.
fn open_file(directory: &OwnedFd) -> Result<Option<(File, Stamp)>, FileError> {
    // Without O_NONBLOCK, opening a FIFO would wait for a writer.
    let flags = OFlag::O_RDONLY
        | OFlag::O_NOFOLLOW
        | OFlag::O_NONBLOCK
        | OFlag::O_NOCTTY
        | OFlag::O_CLOEXEC;
    let file = match openat(directory, NAME, flags, Mode::empty()) {
        Err(Errno::ENOENT) => return Ok(None),
        Err(Errno::ELOOP) => return Err(FileError::Refused("it is a symbolic link")),
        other => other?,
    };
    let stat = fstat(&file)?;
    if SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT != SFlag::S_IFREG {
        return Err(FileError::Refused("it is not a regular file"));
    }
    if stat.st_uid != getuid().as_raw() {
        return Err(FileError::Refused("it belongs to another user"));
    }
    if stat.st_mode & GROUP_OR_OTHERS_WRITE != 0 {
        return Err(FileError::Refused("others can write it"));
    }
    if usize::try_from(stat.st_size).is_ok_and(|size| size > MAX_BYTES) {
        return Err(FileError::Refused("it is too large"));
    }
    Ok(Some((File::from(file), Stamp::of(&stat))))
}

/// The boot and the time namespace; `None` if /proc does not show the boot.
pub(super) fn epoch() -> Option<Epoch> {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let digits: String = id.chars().filter(char::is_ascii_hexdigit).collect();
    let namespace = fs::metadata("/proc/thread-self/ns/time");
    Some(Epoch {
        boot: u128::from_str_radix(&digits, 16).ok()?.to_be_bytes(),
        time_namespace: namespace.map_or(0, |namespace| namespace.ino()),
    })
}

fn is_missing(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
}

/// Waits for runs that write at this moment. A reader needs no lock: a file that has the name is complete.
fn lock(directory: OwnedFd) -> Result<Flock<OwnedFd>, FileError> {
    let mut directory = directory;
    for _ in 0..LOCK_ATTEMPTS {
        match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
            Ok(locked) => return Ok(locked),
            Err((back, Errno::EWOULDBLOCK | Errno::EINTR)) => directory = back,
            Err((_, errno)) => return Err(errno.into()),
        }
        std::thread::sleep(LOCK_PAUSE);
    }
    Err(FileError::Refused(
        "another run of cwkill has kept it locked for half a second; the next run adds the sockets of this one",
    ))
}
