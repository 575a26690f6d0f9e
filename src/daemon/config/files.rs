//! Which files are read, and their texts.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::error::ConfigError;

/// The file that is read if no other is named.
pub const DEFAULT_FILE: &str = "/etc/cwkill/daemon.toml";
/// The files of the directory beside it that are read.
const EXTENSION: &str = "toml";

/// The files with their texts, in the order in which they are read. Without `file`, [`DEFAULT_FILE`] may be missing.
pub(super) fn read(file: Option<&Path>) -> Result<Vec<(PathBuf, String)>, ConfigError> {
    let mut texts = Vec::new();
    let main = file.unwrap_or(Path::new(DEFAULT_FILE));
    match text(main) {
        Ok(text) => texts.push((main.to_owned(), text)),
        Err(error) if file.is_none() && error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(unreadable(main, error)),
    }
    for path in beside(main)? {
        let text = text(&path).map_err(|error| unreadable(&path, error))?;
        texts.push((path, text));
    }
    Ok(texts)
}

/// The files in the directory that is named as `main`, with `.d` for its extension, in the order of their names.
fn beside(main: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let directory = main.with_extension("d");
    let entries = match fs::read_dir(&directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(unreadable(&directory, error)),
    };
    let mut paths = Vec::new();
    for entry in entries {
        let name = entry
            .map_err(|error| unreadable(&directory, error))?
            .file_name();
        let is_hidden = name.as_encoded_bytes().starts_with(b".");
        if !is_hidden
            && Path::new(&name)
                .extension()
                .is_some_and(|it| it == EXTENSION)
        {
            paths.push(directory.join(name));
        }
    }
    paths.sort();
    Ok(paths)
}

fn text(path: &Path) -> io::Result<String> {
    // A FIFO would wait for a writer.
    if !fs::metadata(path)?.is_file() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "it is not a regular file",
        ));
    }
    fs::read_to_string(path)
}

fn unreadable(path: &Path, error: io::Error) -> ConfigError {
    ConfigError::Unreadable {
        path: path.to_owned(),
        error,
    }
}
