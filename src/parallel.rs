//! Work on several threads, also on hosts where no further thread can be started.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{self, Sender};
use std::sync::{Mutex, PoisonError};
use std::thread::{self, Builder};

use rayon::ThreadBuilder;
use rayon::prelude::*;

use crate::sys;

/// Starts the threads of rayon's pool. If some cannot be started (RLIMIT_NPROC, pids.max of the cgroup), the calling thread does the
/// work of the pool.
///
/// This function starts the threads first and then gives them to the pool. A pool that fails to start a thread cannot be built
/// again. A thread that is started only as a test counts against the limit until the kernel has released it.
///
/// # Errors
/// There is a pool already.
pub fn prepare() -> Result<(), rayon::ThreadPoolBuildError> {
    let threads = thread::available_parallelism().map_or(1, usize::from);
    sys::share_heap_if_address_space_is_limited();
    let mut started = start(threads);
    let pool = rayon::ThreadPoolBuilder::new();
    match started.len() == threads {
        true => {
            let give = move |thread| {
                let started = started.pop().expect("one for each thread of the pool");
                started
                    .send(thread)
                    .map_err(|_| io::ErrorKind::BrokenPipe.into())
            };
            pool.num_threads(threads).spawn_handler(give).build_global()
        }
        false => pool.num_threads(1).use_current_thread().build_global(),
    }
}

/// Starts up to `threads` threads. Each waits for the work of a pool, and ends if its sender is dropped.
fn start(threads: usize) -> Vec<Sender<ThreadBuilder>> {
    let start = |_| -> io::Result<Sender<ThreadBuilder>> {
        let (sender, receiver) = mpsc::channel::<ThreadBuilder>();
        Builder::new().spawn(move || receiver.recv().map(ThreadBuilder::run))?;
        Ok(sender)
    };
    (0..threads).map(start).map_while(Result::ok).collect()
}

/// Whether the pool has threads of its own, so that another thread may give it work and wait.
pub(crate) fn has_threads() -> bool {
    rayon::current_num_threads() > 1
}

/// Does `work` on each of `items`, on up to `threads` threads at a time. The calling thread does the work of a thread that cannot be started.
/// Returns one result per item, in order; `Err` holds the panic of an item.
pub(crate) fn side_by_side<I: Send, T: Send>(
    items: Vec<I>,
    threads: usize,
    work: impl Fn(I) -> T + Sync,
) -> Vec<thread::Result<T>> {
    // The thread that works on an item takes it. If no thread can be started, the item is still here.
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
    for chunk in items.chunks(threads) {
        thread::scope(|scope| {
            let started: Vec<_> = chunk
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

/// The results of `work` on blocks of at most `size` items, in order. The blocks of a long list are worked on in parallel.
pub fn in_blocks<T: Sync, R: Send>(
    items: &[T],
    size: usize,
    work: impl Fn(&[T]) -> R + Send + Sync,
) -> Vec<R> {
    match items.len() <= size {
        true => vec![work(items)],
        false => items.par_chunks(size).map(work).collect(),
    }
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
