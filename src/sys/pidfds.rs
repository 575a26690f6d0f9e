//! Open pidfds, kept for reuse.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::Hash;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

/// pidfds open at the same time. The limit of open descriptors is 1024 on many hosts.
const MAX_OPEN: usize = 128;

/// The pidfds of processes, or of threads, by `K`.
#[derive(Debug)]
pub struct Pidfds<K>(HashMap<K, OwnedFd>);

impl<K: Eq + Hash> Pidfds<K> {
    pub fn new() -> Self {
        Pidfds(HashMap::new())
    }

    /// The pidfd of `key`. `open` opens it at the first use, and again after others have taken its place.
    ///
    /// # Errors
    /// Those of `open`. They are not kept.
    pub fn get<E>(
        &mut self,
        key: K,
        open: impl FnOnce() -> Result<OwnedFd, E>,
    ) -> Result<BorrowedFd<'_>, E> {
        if self.0.len() >= MAX_OPEN && !self.0.contains_key(&key) {
            self.0.clear();
        }
        let pidfd: &OwnedFd = match self.0.entry(key) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => new.insert(open()?),
        };
        Ok(pidfd.as_fd())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;
    use std::fs::File;

    #[test]
    fn a_pidfd_is_opened_once_and_their_number_is_limited() {
        let mut pidfds = Pidfds::new();
        let mut opened = 0;
        for key in (0..MAX_OPEN).chain(0..MAX_OPEN) {
            let open = || {
                opened += 1;
                Ok::<_, Infallible>(File::open("/dev/null").unwrap().into())
            };
            pidfds.get(key, open).unwrap();
        }
        assert_eq!((opened, pidfds.0.len()), (MAX_OPEN, MAX_OPEN));
        let open = || Ok::<_, Infallible>(File::open("/dev/null").unwrap().into());
        pidfds.get(MAX_OPEN, open).unwrap();
        assert_eq!(pidfds.0.len(), 1);
        assert_eq!(pidfds.get(7, || Err(5)).unwrap_err(), 5);
    }
}
