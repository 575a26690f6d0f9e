//! The directory with the state of the daemon. Its lock makes sure that there is one daemon.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

/// The directory of root.
const OF_ROOT: &str = "/var/lib/cwkill";
/// systemd names the directory of its `StateDirectory=` here.
const VARIABLE: &str = "STATE_DIRECTORY";
const LOCK: &str = "daemon.lock";
const OWNER_ONLY: u32 = 0o600;

/// Where the state is, from the environment.
pub fn directory() -> PathBuf {
    // With several names, systemd separates them by a colon.
    let variable = std::env::var(VARIABLE).unwrap_or_default();
    let first = variable.split(':').next().unwrap_or_default();
    match Path::new(first).is_absolute() {
        true => first.into(),
        false => OF_ROOT.into(),
    }
}

/// Why the directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    #[error("another cwkill daemon, or cwkill daemon --once, runs already{}: it has locked {path}", of_process(.pid))]
    Locked { path: String, pid: Option<i32> },
    #[error("cannot use the state directory {path}")]
    Io { path: String, source: io::Error },
}

fn of_process(pid: &Option<i32>) -> String {
    pid.map_or_else(String::new, |pid| format!(" (process {pid})"))
}

/// The lock of the state directory. It is free again as soon as the process ends, in whatever way.
#[derive(Debug)]
pub struct DaemonLock {
    _file: Flock<File>,
}

impl DaemonLock {
    /// Makes the directory if it is not there, and locks it. Who can open the file can lock it (flock(2)), and so keep the daemon from
    /// starting: it is for its owner only.
    ///
    /// # Errors
    /// Another daemon has the lock, or the directory cannot be used.
    pub fn take(directory: &Path) -> Result<Self, LockError> {
        let path = directory.join(LOCK);
        let failed = |at: &Path| {
            let path = at.display().to_string();
            |source| LockError::Io { path, source }
        };
        match DirBuilder::new().mode(0o700).create(directory) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(failed(directory)(error));
            }
            _ => {}
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(OWNER_ONLY)
            .custom_flags(libc::O_NOFOLLOW)
            .open(&path)
            .map_err(failed(&path))?;
        // It may have been there before.
        let owner_only = Permissions::from_mode(OWNER_ONLY);
        file.set_permissions(owner_only).map_err(failed(&path))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(mut file) => {
                // Only for the message of a second daemon.
                let _ = note_pid(&mut file);
                Ok(DaemonLock { _file: file })
            }
            Err((_, Errno::EWOULDBLOCK)) => Err(LockError::Locked {
                pid: noted_pid(&path),
                path: path.display().to_string(),
            }),
            Err((_, errno)) => Err(failed(&path)(errno.into())),
        }
    }
}

fn note_pid(file: &mut File) -> io::Result<()> {
    file.set_len(0)?;
    file.rewind()?;
    writeln!(file, "{}", std::process::id())
}

fn noted_pid(path: &Path) -> Option<i32> {
    let mut text = String::new();
    // A daemon writes a short number.
    fs::File::open(path)
        .ok()?
        .take(16)
        .read_to_string(&mut text)
        .ok()?;
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_daemon_has_the_lock() {
        let place = tempfile::tempdir().unwrap();
        let directory = place.path().join("cwkill");
        let lock = DaemonLock::take(&directory).unwrap();
        let error = DaemonLock::take(&directory).unwrap_err();
        let own = format!("(process {})", std::process::id());
        assert!(error.to_string().contains(&own), "{error}");
        drop(lock);
        DaemonLock::take(&directory).unwrap();
    }

    #[test]
    fn no_other_user_can_open_the_lock() {
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        let place = tempfile::tempdir().unwrap();
        let directory = place.path().join("cwkill");
        let file = directory.join(LOCK);
        drop(DaemonLock::take(&directory).unwrap());
        assert_eq!((mode(&directory), mode(&file)), (0o700, 0o600));
        fs::set_permissions(&file, Permissions::from_mode(0o666)).unwrap();
        let _lock = DaemonLock::take(&directory).unwrap();
        assert_eq!(mode(&file), 0o600);
    }

    #[test]
    fn a_directory_that_cannot_be_made_is_named() {
        let place = tempfile::tempdir().unwrap();
        let error = DaemonLock::take(&place.path().join("a/b")).unwrap_err();
        assert!(error.to_string().contains("a/b"), "{error}");
    }
}
