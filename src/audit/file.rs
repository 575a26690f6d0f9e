//! Opening the file of the log, where others may have prepared the place: the directory may be the leaking application's, and what a
//! record says is in part chosen by it (a process names itself). So that no record ever lands in a file that means something to
//! somebody else, no symbolic link is followed that another user could have made, and only a file of ours is taken.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Component, Path};

use caps::{CapSet, CapsHashSet};
use nix::errno::Errno;
use nix::fcntl::{OFlag, openat, readlinkat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat};
use nix::unistd::{getegid, geteuid, getgid, getuid, setfsgid, setfsuid};

/// Links in a path that are followed, as many as the kernel does (include/linux/namei.h, MAXSYMLINKS).
const LINKS: usize = 40;
const GROUP_WRITES: u32 = 0o020;
const OTHERS_WRITE: u32 = 0o002;

/// Opens a file for appending, new for its owner only.
///
/// Where the program has more rights than who started it (a set-user-ID bit, file capabilities), it is opened with those of the
/// latter.
///
/// # Errors
/// EINVAL and the reason in words: it is not a regular file, or others can write it or have a hand in where it is. Those of open(2).
pub(super) fn open(path: &Path) -> io::Result<File> {
    match getuid().is_root() {
        true => open_as_we_are(path),
        false => as_the_caller(|| open_as_we_are(path)),
    }
}

/// Runs `work` with the rights of the real user.
fn as_the_caller<T>(work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let failed = |error: caps::errors::CapsError| io::Error::other(error.to_string());
    let effective = caps::read(None, CapSet::Effective).map_err(failed)?;
    setfsgid(getgid());
    setfsuid(getuid());
    let result = caps::set(None, CapSet::Effective, &CapsHashSet::new())
        .map_err(failed)
        .and_then(|()| work());
    setfsuid(geteuid());
    setfsgid(getegid());
    // The permitted set has been left as it was, so this is always allowed.
    caps::set(None, CapSet::Effective, &effective).map_err(failed)?;
    result
}

fn open_as_we_are(path: &Path) -> io::Result<File> {
    let name = match path.components().next_back() {
        Some(Component::Normal(name)) if !path.as_os_str().as_encoded_bytes().ends_with(b"/") => {
            name
        }
        _ => return Err(refused("it is a directory")),
    };
    let absolute = std::path::absolute(path)?;
    let directory = walk(absolute.parent().unwrap_or(Path::new("/")))?;
    let stat = fstat(&directory)?;
    if !is_trusted(stat.st_uid) {
        return Err(refused(
            "its directory belongs to another user; use a directory such as /var/log/cwkill",
        ));
    }
    if stat.st_mode & OTHERS_WRITE != 0 {
        return Err(refused(
            "everybody can write to its directory; use a directory such as /var/log/cwkill",
        ));
    }
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let found = match openat(&directory, name, flags, Mode::empty()) {
        Err(Errno::ENOENT) => {
            let flags = OFlag::O_RDWR
                | OFlag::O_APPEND
                | OFlag::O_CREAT
                | OFlag::O_EXCL
                | OFlag::O_NOFOLLOW
                | OFlag::O_CLOEXEC;
            return Ok(openat(&directory, name, flags, Mode::S_IRUSR | Mode::S_IWUSR)?.into());
        }
        other => other?,
    };
    suits(&fstat(&found)?)?;
    // What was looked at is opened, whatever its name has come to mean.
    let mut file = OpenOptions::new()
        .read(true)
        .append(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(format!("/proc/self/fd/{}", found.as_raw_fd()))?;
    // A run that was killed may have left half a line; the next record must not be a part of it.
    let end = file.seek(io::SeekFrom::End(0))?;
    let mut last = [b'\n'];
    if end > 0 {
        file.read_exact_at(&mut last, end - 1)?;
    }
    if last != [b'\n'] {
        file.write_all(b"\n")?;
    }
    Ok(file)
}

/// Whether the file of the log may be this one.
fn suits(stat: &FileStat) -> io::Result<()> {
    match kind(stat) {
        SFlag::S_IFREG => {}
        SFlag::S_IFLNK => return Err(refused("it is a symbolic link")),
        SFlag::S_IFDIR => return Err(refused("it is a directory")),
        _ => return Err(refused("it is not a regular file")),
    }
    if !is_trusted(stat.st_uid) {
        return Err(refused("it belongs to another user"));
    }
    if stat.st_mode & (GROUP_WRITES | OTHERS_WRITE) != 0 {
        return Err(refused("others can write it (chmod go-w)"));
    }
    if stat.st_nlink != 1 {
        return Err(refused("it has more than one name (hard links)"));
    }
    Ok(())
}

/// The directory at an absolute path. Links are followed only where nobody else can have made them.
fn walk(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let root = || nix::fcntl::open("/", flags | OFlag::O_DIRECTORY, Mode::empty());
    let mut directory = root()?;
    let parts = |path: &Path| -> VecDeque<OsString> {
        let part = |component: Component<'_>| match component {
            Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
            Component::ParentDir => Some(OsStr::new("..").to_owned()),
            Component::Normal(name) => Some(name.to_owned()),
        };
        path.components().filter_map(part).collect()
    };
    let mut left = parts(path);
    let mut links = 0;
    while let Some(part) = left.pop_front() {
        let around = fstat(&directory)?;
        let shared = around.st_mode & (GROUP_WRITES | OTHERS_WRITE) != 0;
        let next = openat(&directory, part.as_os_str(), flags, Mode::empty())?;
        let stat = fstat(&next)?;
        if kind(&stat) == SFlag::S_IFLNK {
            if shared || !is_trusted(around.st_uid) {
                return Err(refused(
                    "a symbolic link that others can change leads there",
                ));
            }
            links += 1;
            if links > LINKS {
                return Err(Errno::ELOOP.into());
            }
            let target = readlinkat(&directory, part.as_os_str())?;
            let target = Path::new(&target);
            if target.is_absolute() {
                directory = root()?;
            }
            let mut joined = parts(target);
            joined.append(&mut left);
            left = joined;
            continue;
        }
        if kind(&stat) != SFlag::S_IFDIR {
            return Err(Errno::ENOTDIR.into());
        }
        directory = next;
    }
    Ok(directory)
}

fn kind(stat: &FileStat) -> SFlag {
    SFlag::from_bits_truncate(stat.st_mode) & SFlag::S_IFMT
}

/// Root's or ours. In a user namespace the root outside it has no number and is shown as the overflow user (user_namespaces(7)).
fn is_trusted(uid: u32) -> bool {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let overflow = || read("/proc/sys/kernel/overflowuid").trim().parse() == Ok(uid);
    uid == 0
        || uid == getuid().as_raw()
        || (overflow() && std::fs::metadata("/").is_ok_and(|root| root.uid() == uid))
}

fn refused(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, why)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    fn set_mode(path: &Path, mode: u32) {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    fn refusal(path: &Path) -> String {
        open(path).unwrap_err().to_string()
    }

    #[test]
    fn a_new_file_is_its_owners_and_an_old_one_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        open(&path).unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        for (before, after) in [("", ""), ("{}\n", "{}\n"), ("{\"ha", "{\"ha\n")] {
            std::fs::write(&path, before).unwrap();
            open(&path).unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), after);
        }
    }

    #[test]
    fn a_link_is_not_followed_and_its_target_not_made() {
        let dir = tempfile::tempdir().unwrap();
        let (path, target) = (dir.path().join("log"), dir.path().join("target"));
        symlink(&target, &path).unwrap();
        assert!(refusal(&path).contains("symbolic link"));
        assert!(!target.exists());
        std::fs::write(&target, "").unwrap();
        assert!(refusal(&path).contains("symbolic link"));
        let second = dir.path().join("second");
        std::fs::hard_link(&target, &second).unwrap();
        assert!(refusal(&second).contains("hard links"));
    }

    #[test]
    fn what_others_can_write_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        std::fs::write(&path, "").unwrap();
        for mode in [0o666, 0o620, 0o602] {
            set_mode(&path, mode);
            assert!(refusal(&path).contains("others can write it"), "{mode:o}");
        }
        set_mode(&path, 0o644);
        open(&path).unwrap();
        for mode in [0o777, 0o1777] {
            set_mode(dir.path(), mode);
            assert!(refusal(&path).contains("directory"), "{mode:o}");
        }
    }

    #[test]
    fn a_link_on_the_way_counts_if_nobody_else_can_have_made_it() {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().join("real");
        std::fs::create_dir(&real).unwrap();
        symlink("real", dir.path().join("link")).unwrap();
        let path = dir.path().join("link/log");
        open(&path).unwrap();
        assert!(real.join("log").exists());
        set_mode(dir.path(), 0o770);
        assert!(refusal(&path).contains("symbolic link"));
        open(&real.join("log")).unwrap();
        symlink("round", real.join("round")).unwrap();
        let error = open(&real.join("round/log")).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ELOOP));
    }

    #[test]
    fn rights_of_the_caller_are_given_back() {
        let before = caps::read(None, CapSet::Effective).unwrap();
        let inside = as_the_caller(|| {
            caps::read(None, CapSet::Effective).map_err(|error| io::Error::other(error.to_string()))
        });
        assert!(inside.unwrap().is_empty());
        assert_eq!(caps::read(None, CapSet::Effective).unwrap(), before);
    }
}
