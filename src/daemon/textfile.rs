//! The metrics as a file for the textfile collector of node_exporter.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// node_exporter reads the files with this ending.
const NAME: &str = "cwkill.prom";
/// A file that is not complete yet.
const NEW: &str = "cwkill.prom.new";

/// A directory that node_exporter reads.
#[derive(Clone, Debug)]
pub struct TextFile {
    directory: PathBuf,
}

impl TextFile {
    /// # Errors
    /// It is not a directory, or it cannot be read.
    pub fn in_directory(directory: &Path) -> io::Result<Self> {
        fs::read_dir(directory)?;
        Ok(TextFile {
            directory: directory.to_owned(),
        })
    }

    /// Whether a file can be written there: makes one, and removes it.
    ///
    /// # Errors
    /// It cannot: another user has the directory, or the service manager has made it read-only.
    pub fn try_write(&self) -> io::Result<()> {
        let new = self.directory.join(NEW);
        remove_rest(&new)?;
        write_new(&new, "")?;
        fs::remove_file(&new)
    }

    /// Replaces the file. A reader sees the old one or the new one, complete, also if the host loses its power meanwhile.
    ///
    /// # Errors
    /// It cannot be written. The old file stays.
    pub fn write(&self, text: &str) -> io::Result<()> {
        let (new, path) = (self.directory.join(NEW), self.path());
        remove_rest(&new)?;
        let written = write_new(&new, text).and_then(|()| fs::rename(&new, &path));
        if let Err(error) = written {
            let _ = fs::remove_file(&new);
            return Err(error);
        }
        File::open(&self.directory)?.sync_all()
    }

    pub fn path(&self) -> PathBuf {
        self.directory.join(NAME)
    }
}

/// A daemon that was killed may have left one. Another user's link must not be followed.
fn remove_rest(new: &Path) -> io::Result<()> {
    match fs::remove_file(new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The file may be read by every user, as node_exporter is none in particular. The umask of a service is often 077, so the mode is set after
/// the file is made.
fn write_new(path: &Path, text: &str) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o644)
        .open(path)?;
    file.set_permissions(Permissions::from_mode(0o644))?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_text_replaces_the_old_one() {
        let directory = tempfile::tempdir().unwrap();
        let file = TextFile::in_directory(directory.path()).unwrap();
        fs::write(directory.path().join(NEW), "half").unwrap();
        for text in ["one\n", "two\n"] {
            file.write(text).unwrap();
            assert_eq!(fs::read_to_string(file.path()).unwrap(), text);
        }
        let names: Vec<_> = fs::read_dir(directory.path()).unwrap().collect();
        assert_eq!(names.len(), 1, "{names:?}");
        assert!(TextFile::in_directory(&file.path()).is_err());
    }

    #[test]
    fn a_trial_leaves_nothing_and_fails_where_writing_would() {
        let directory = tempfile::tempdir().unwrap();
        let file = TextFile::in_directory(directory.path()).unwrap();
        file.try_write().unwrap();
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
        // Root may write into any directory, but not where there is none.
        fs::remove_dir(directory.path()).unwrap();
        let error = file.try_write().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_link_is_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        let other = directory.path().join("other");
        fs::write(&other, "precious").unwrap();
        std::os::unix::fs::symlink(&other, directory.path().join(NEW)).unwrap();
        let file = TextFile::in_directory(directory.path()).unwrap();
        file.write("text\n").unwrap();
        assert_eq!(fs::read_to_string(&other).unwrap(), "precious");
    }
}
