//! By which way `destroy` works: by the kernel's iterator or by SOCK_DESTROY.

use crate::bpf::destroyer::Destroyer;
use crate::finder::way::{NotUsed, UseIterator};
use crate::proc::ProcFs;

/// The iterator that destroys sockets.
#[derive(Debug)]
pub struct ByIterator {
    pub(super) destroyer: Destroyer,
    /// It is used whether it pays or not, and nothing else if it fails.
    pub(super) always: bool,
}

/// To walk this many sockets takes about as long as SOCK_DESTROY takes for one (docs/decisions/bpf.md).
const WALKED_PER_DESTROYED: usize = 16;
/// A walk of so many sockets takes about 50 ms. That is worth it for any number of sockets, since no byte can be lost.
const SHORT_WALK: usize = 100_000;

impl ByIterator {
    /// The iterator, if `use_it` and the host allow it. Must be called with the capabilities for it; they are not needed later.
    ///
    /// # Errors
    /// Why not. Then SOCK_DESTROY is used.
    pub fn choose(proc: &ProcFs, use_it: UseIterator) -> Result<Self, NotUsed> {
        match use_it {
            UseIterator::Never => return Err(NotUsed::Never),
            UseIterator::Auto if proc.filters_own_calls() => return Err(NotUsed::SeccompFilter),
            UseIterator::Auto | UseIterator::Always => {}
        }
        Ok(ByIterator {
            destroyer: Destroyer::load()?,
            always: use_it == UseIterator::Always,
        })
    }

    /// Whether to use it for this number of sockets in the network namespace of the calling thread.
    pub(super) fn pays(&self, sockets: usize) -> bool {
        let all = || ProcFs::default().tcp_sockets();
        self.always || all().is_none_or(|all| pays(sockets, all))
    }
}

/// Whether to walk `all` sockets of the kernel to destroy `sockets` of them.
fn pays(sockets: usize, all: usize) -> bool {
    all <= SHORT_WALK.saturating_add(sockets.saturating_mul(WALKED_PER_DESTROYED))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_of_very_many_sockets_are_not_walked_to() {
        assert!(pays(1, 100_000));
        assert!(!pays(10, 1_000_000));
        assert!(pays(60_000, 1_000_000));
    }
}
