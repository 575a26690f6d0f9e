//! Work on several threads, on hosts where none may be left to start.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Mutex, PoisonError};
use std::thread::{self, Builder};

/// Makes the pool of rayon. Where no thread can be started (RLIMIT_NPROC, pids.max of the cgroup) the calling
/// thread does the work of the pool.
///
/// # Errors
/// There is a pool already.
pub fn prepare() -> Result<(), rayon::ThreadPoolBuildError> {
    // The pool cannot be tried twice.
    let wanted = thread::available_parallelism().map_or(1, usize::from);
    let pool = rayon::ThreadPoolBuilder::new();
    match can_start(wanted) {
        true => pool.num_threads(wanted).build_global(),
        false => pool.num_threads(1).use_current_thread().build_global(),
    }
}

/// Whether so many threads can be at the same time.
fn can_start(threads: usize) -> bool {
    let gate = Mutex::new(());
    thread::scope(|scope| {
        let closed = gate.lock();
        let started = (0..threads)
            .map(|_| Builder::new().spawn_scoped(scope, || drop(gate.lock())))
            .take_while(Result::is_ok)
            .count();
        drop(closed);
        started == threads
    })
}

/// Whether the pool has threads of its own, so that others may give it work and wait.
pub(crate) fn are_there() -> bool {
    rayon::current_num_threads() > 1
}

/// Does `work` on each of `items`, `at_once` of them at the same time as far as threads can be started; one result each, in
/// order, the panic if it ended in one.
pub(crate) fn side_by_side<I: Send, T: Send>(
    items: Vec<I>,
    at_once: usize,
    work: impl Fn(I) -> T + Sync,
) -> Vec<thread::Result<T>> {
    // An item is taken by the thread that works on it, or stays here where none can be started.
    let work = |item: &Mutex<Option<I>>| {
        let item = item.lock().unwrap_or_else(PoisonError::into_inner).take();
        work(item.expect("each item is taken once"))
    };
    let here = |item| catch_unwind(AssertUnwindSafe(|| work(item)));
    let items: Vec<_> = items
        .into_iter()
        .map(|item| Mutex::new(Some(item)))
        .collect();
    if let [only] = &items[..] {
        return vec![here(only)];
    }
    let mut results = Vec::with_capacity(items.len());
    for some in items.chunks(at_once) {
        thread::scope(|scope| {
            let started: Vec<_> = some
                .iter()
                .map(|item| (item, Builder::new().spawn_scoped(scope, || work(item))))
                .collect();
            let result = |(item, thread): (_, std::io::Result<thread::ScopedJoinHandle<'_, T>>)| {
                thread.map_or_else(|_| here(item), thread::ScopedJoinHandle::join)
            };
            results.extend(started.into_iter().map(result));
        });
    }
    results
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_in_order_and_a_panic_stays_with_its_item() {
        let results = side_by_side(vec![1, 2, 3, 4, 5], 2, |item| match item {
            3 => panic!("on purpose"),
            item => item * 10,
        });
        let values: Vec<Option<i32>> = results.into_iter().map(Result::ok).collect();
        assert_eq!(values, [Some(10), Some(20), None, Some(40), Some(50)]);
        assert!(side_by_side(vec![0], 1, |_| panic!("on purpose"))[0].is_err());
    }
}
