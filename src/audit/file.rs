//! Opens the log file safely. An attacker may have prepared its path: the directory may belong to the leaking application, which
//! also chooses a part of each record (a process names itself). Records must never go into a file that matters to another user.
//! So cwkill follows no symbolic link that another user could have created, and accepts only a file of its own user or of root.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Component, Path};

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat, readlinkat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstat};
use nix::unistd::getuid;

use crate::sys::caller::as_caller;

/// The maximum number of symbolic links in a path, as in the kernel (include/linux/namei.h, MAXSYMLINKS).
const MAX_LINKS: usize = 40;
const GROUP_WRITES: u32 = 0o020;
const OTHERS_WRITE: u32 = 0o002;

/// Opens a file for appending. A new file is accessible to its owner only.
///
/// If cwkill has more privileges than the user who started it (a set-user-ID bit, file capabilities), the file is opened with
/// the privileges of that user.
///
/// # Errors
/// EINVAL with a reason: it is not a regular file, or another user can write it or change its path. As open(2).
pub(super) fn open(path: &Path) -> io::Result<File> {
    as_caller(|| open_checked(path))
}

fn open_checked(path: &Path) -> io::Result<File> {
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
    let path_only = match openat(&directory, name, flags, Mode::empty()) {
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
    ensure_safe(&fstat(&path_only)?)?;
    // This opens the file that was checked, even if another file has its name by now.
    let mut file = OpenOptions::new()
        .read(true)
        .append(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(format!("/proc/self/fd/{}", path_only.as_raw_fd()))?;
    // A run that was killed may have left an incomplete line, which the next record must not continue.
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

/// Checks that an existing file may be used for the log.
fn ensure_safe(stat: &FileStat) -> io::Result<()> {
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

/// The directory at an absolute path. A symbolic link is followed only if a trusted user owns its directory and no other user can
/// write it.
///
/// openat2(2) cannot replace this walk. RESOLVE_NO_SYMLINKS would also refuse links that root has created, and no flag makes
/// the kernel check the owner of a link's directory.
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
        let parent = fstat(&directory)?;
        let is_shared = parent.st_mode & (GROUP_WRITES | OTHERS_WRITE) != 0;
        let next = openat(&directory, part.as_os_str(), flags, Mode::empty())?;
        let stat = fstat(&next)?;
        if kind(&stat) == SFlag::S_IFLNK {
            if is_shared || !is_trusted(parent.st_uid) {
                return Err(refused(
                    "a symbolic link that others can change leads there",
                ));
            }
            links += 1;
            if links > MAX_LINKS {
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

/// Whether `uid` is root or the real user. In a user namespace the root outside it has no uid, and the kernel shows it as the
/// overflow user (user_namespaces(7)).
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
    fn a_new_file_is_private_and_an_old_one_is_continued() {
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
    fn a_link_is_not_followed_and_its_target_not_created() {
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
    fn a_file_that_others_can_write_is_refused() {
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
    fn a_link_in_the_path_is_followed_if_only_a_trusted_user_can_have_created_it() {
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
}
