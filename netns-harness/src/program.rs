//! Finds programs.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

/// Whether the program exists: at its path, or by its name in a directory of PATH.
pub(crate) fn is_found(program: impl AsRef<OsStr>) -> bool {
    path_of(program).is_some()
}

/// The path of a program that exists.
pub(crate) fn path_of(program: impl AsRef<OsStr>) -> Option<PathBuf> {
    let program = program.as_ref();
    if program.as_bytes().contains(&b'/') {
        return Some(PathBuf::from(program)).filter(|path| path.exists());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|directory| directory.join(program))
        .find(|path| path.exists())
}

/// Looks for a bare name in the directory of this program first.
pub(crate) fn beside_this_program(program: &Path) -> Result<PathBuf> {
    let this = std::env::current_exe().context("find the path of this program")?;
    let beside = this.with_file_name(program);
    Ok(if program.components().count() == 1 && beside.exists() {
        beside
    } else {
        program.to_owned()
    })
}
