//! The rights of the user who started cwkill, for files that the user names.
//!
//! A set-user-ID bit or file capabilities give cwkill more rights than its caller has. It must not use them on a path from its
//! command line: the caller would learn about files, or open files, that are out of the caller's reach.

use std::io;

use caps::{CapSet, CapsHashSet};
use nix::unistd::{getegid, geteuid, getgid, getuid, setfsgid, setfsuid};

/// Runs `work` with the rights of the real user. Other threads keep theirs. Root keeps all.
///
/// # Errors
/// Those of `work`. The rights cannot be read or changed.
pub fn as_caller<T>(work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    match getuid().is_root() {
        true => work(),
        false => as_real_user(work),
    }
}

fn as_real_user<T>(work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    let failed = |error: caps::errors::CapsError| io::Error::other(error.to_string());
    let effective = caps::read(None, CapSet::Effective).map_err(failed)?;
    setfsgid(getgid());
    setfsuid(getuid());
    let result = caps::set(None, CapSet::Effective, &CapsHashSet::new())
        .map_err(failed)
        .and_then(|()| work());
    setfsuid(geteuid());
    setfsgid(getegid());
    // This is always permitted, since the permitted set has not changed.
    caps::set(None, CapSet::Effective, &effective).map_err(failed)?;
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn privileges_are_restored() {
        let before = caps::read(None, CapSet::Effective).unwrap();
        let inside = as_real_user(|| {
            caps::read(None, CapSet::Effective).map_err(|error| io::Error::other(error.to_string()))
        });
        assert!(inside.unwrap().is_empty());
        assert_eq!(caps::read(None, CapSet::Effective).unwrap(), before);
    }
}
