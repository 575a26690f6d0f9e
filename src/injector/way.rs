//! By which way `destroy` works: by the kernel's iterator or by SOCK_DESTROY.

use crate::bpf::destroyer::Destroyer;
use crate::finder::way::{NotUsed, UseIterator};
use crate::proc::ProcFs;

/// The iterator that destroys sockets.
#[derive(Debug)]
pub struct ByIterator {
    pub(super) destroyer: Destroyer,
}

impl ByIterator {
    /// The iterator, if the operator asks for it. Must be called with the capabilities for it; they are not needed later.
    ///
    /// # Errors
    /// Why not. Then SOCK_DESTROY is used.
    pub fn choose(use_it: UseIterator) -> Result<Self, NotUsed> {
        match use_it {
            UseIterator::Never => Err(NotUsed::Never),
            UseIterator::Auto => Err(NotUsed::OnlyOnRequest),
            UseIterator::Always => Ok(ByIterator {
                destroyer: Destroyer::load()?,
            }),
        }
    }

    /// The iterator, if the host allows it, for a trial. As [`ByIterator::choose`].
    ///
    /// # Errors
    /// Why not.
    pub fn works(proc: &ProcFs) -> Result<Self, NotUsed> {
        match proc.filters_own_calls() {
            true => Err(NotUsed::SeccompFilter),
            false => Self::choose(UseIterator::Always),
        }
    }
}
