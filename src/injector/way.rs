//! By which way `destroy` works: by the kernel's iterator or by SOCK_DESTROY.

use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::bpf::KernelTypes;
use crate::bpf::destroyer::Destroyer;
use crate::finder::way::{NotUsed, UseIterator};
use crate::proc::ProcFs;

/// The iterator that destroys sockets.
#[derive(Debug)]
pub struct ByIterator {
    pub(super) destroyer: Destroyer,
    /// Whether the operator has asked for it. Then nothing else is tried where it can be used, whatever it costs.
    pub(super) is_required: bool,
    proc: ProcFs,
    allowance: Allowance,
}

/// A walk takes 0.65 us of processor time for each socket, and SOCK_DESTROY with its recheck takes about 6 us more for each target than the
/// iterator: in all as long as the walk over this many sockets (docs/decisions/bpf.md).
const SOCKETS_PER_TARGET: usize = 10;
/// A walk over no socket takes as long as the walk over this many: the hash table has many empty buckets.
const EMPTY_TABLE: usize = 5_000;
/// A run may walk over this many sockets even if SOCK_DESTROY were quicker. That takes 0.13 s of one processor.
const ALLOWANCE: usize = 200_000;

impl ByIterator {
    /// The iterator, if `use_it` and the host allow it. Must be called with the capabilities for it; they are not needed later.
    ///
    /// # Errors
    /// Why not. Then SOCK_DESTROY is used.
    pub fn choose(
        proc: &ProcFs,
        use_it: UseIterator,
        types: &KernelTypes,
    ) -> Result<Self, NotUsed> {
        match use_it {
            UseIterator::Never => return Err(NotUsed::Never),
            UseIterator::Auto if proc.filters_own_calls() => return Err(NotUsed::SeccompFilter),
            UseIterator::Auto | UseIterator::Always => {}
        }
        Ok(ByIterator {
            destroyer: Destroyer::load(types)?,
            is_required: use_it == UseIterator::Always,
            proc: proc.clone(),
            allowance: Allowance(AtomicUsize::new(ALLOWANCE)),
        })
    }

    /// The iterator, if the host allows it, for a trial. As [`ByIterator::choose`].
    ///
    /// # Errors
    /// Why not.
    pub fn works(proc: &ProcFs, types: &KernelTypes) -> Result<Self, NotUsed> {
        match proc.filters_own_calls() {
            true => Err(NotUsed::SeccompFilter),
            false => Self::choose(proc, UseIterator::Always, types),
        }
    }

    /// A run begins: it has its own allowance, and walks again if the lock that has held up an earlier walk is free. Of a daemon, each batch of
    /// acts is a run.
    pub fn begin_run(&self) {
        self.destroyer.begin_again();
        self.allowance.0.store(ALLOWANCE, Ordering::Relaxed);
    }

    /// Whether a walk was given up because it waited for the lock of a socket.
    pub fn was_held_up(&self) -> bool {
        self.destroyer.is_held_up()
    }

    /// Whether a walk through the network namespace of the calling thread is worth its time for so many targets.
    pub(super) fn pays(&self, targets: usize) -> bool {
        if self.is_required {
            return true;
        }
        let sockets = tcp_sockets(&self.proc);
        !self.was_held_up() && sockets.is_some_and(|all| self.allowance.covers(targets, all))
    }
}

/// How many sockets a run may still walk over although SOCK_DESTROY were quicker.
#[derive(Debug)]
struct Allowance(AtomicUsize);

impl Allowance {
    /// Whether a walk over `all` sockets is quicker than SOCK_DESTROY of `targets`, or allowed all the same.
    fn covers(&self, targets: usize, all: usize) -> bool {
        let cost = all.saturating_add(EMPTY_TABLE);
        let take = |left: usize| left.checked_sub(cost);
        targets.saturating_mul(SOCKETS_PER_TARGET) >= cost
            || (self
                .0
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, take))
            .is_ok()
    }
}

/// The number of TCP sockets that a walk shows or passes over: those of all network namespaces, and the TIME-WAIT sockets of this one.
fn tcp_sockets(proc: &ProcFs) -> Option<usize> {
    parse(&fs::read_to_string(proc.path("thread-self/net/sockstat")).ok()?)
}

/// The sum of `tw` and `alloc` in the line for TCP. Source: net/ipv4/proc.c, sockstat_seq_show.
fn parse(sockstat: &str) -> Option<usize> {
    let mut lines = sockstat.lines();
    let line = lines.find_map(|line| line.strip_prefix("TCP: "))?;
    let words: Vec<&str> = line.split_whitespace().collect();
    let value = |name: &str| -> Option<usize> {
        let mut pairs = words.chunks_exact(2);
        pairs.find(|pair| pair[0] == name)?[1].parse().ok()
    };
    value("tw")?.checked_add(value("alloc")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_targets_of_a_large_table_are_left_to_sock_destroy() {
        let allowance = Allowance(AtomicUsize::new(ALLOWANCE));
        let covers = |targets, all| allowance.covers(targets, all);
        assert!(!covers(10, 1_000_000));
        assert!(covers(200_000, 1_000_000), "no allowance is needed");
        assert!(covers(1, 100_000), "allowed");
        assert!(!covers(1, 100_000), "the allowance is used up");
        assert!(covers(1, 50_000), "but for a smaller table");
        assert!(!covers(1, usize::MAX));
        // Many namespaces with one socket each.
        let walks = (0..1000).filter(|_| covers(1, 0)).count();
        assert!(walks < 10, "{walks}");
        assert!(covers(2000, 10_000));
    }

    #[test]
    fn the_sockets_of_a_walk_are_counted() {
        let text = "sockets: used 302\nTCP: inuse 7 orphan 0 tw 20 alloc 60000 mem 3\nUDP: inuse 2 mem 0\n";
        assert_eq!(parse(text), Some(60_020));
        assert_eq!(parse("sockets: used 302\n"), None);
        assert_eq!(parse("TCP: inuse 7 tw x alloc 1\n"), None);
    }
}
