//! Work on several threads, on hosts where none may be left to start.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{self, Sender};
use std::sync::{Mutex, PoisonError};
use std::thread::{self, Builder};

use rayon::ThreadBuilder;

/// Starts the threads of rayon's pool. Where not all can be started (RLIMIT_NPROC, pids.max of the cgroup), the calling thread does
/// the work of the pool.
///
/// The threads are started first and given to the pool then: a pool that fails to start a thread cannot be built again, and a thread
/// that was only tried counts against the limit until the kernel has released it.
///
/// # Errors
/// There is a pool already.
pub fn prepare() -> Result<(), rayon::ThreadPoolBuildError> {
    let wanted = thread::available_parallelism().map_or(1, usize::from);
    let mut started = start(wanted);
    let pool = rayon::ThreadPoolBuilder::new();
    match started.len() == wanted {
        true => {
            let give = move |thread| {
                let started = started.pop().expect("one for each thread of the pool");
                started
                    .send(thread)
                    .map_err(|_| io::ErrorKind::BrokenPipe.into())
            };
            pool.num_threads(wanted).spawn_handler(give).build_global()
        }
        false => pool.num_threads(1).use_current_thread().build_global(),
    }
}

/// Starts up to `threads` threads, each of which waits for the work of a pool, or ends when its sender is dropped.
fn start(threads: usize) -> Vec<Sender<ThreadBuilder>> {
    let start = |_| -> io::Result<Sender<ThreadBuilder>> {
        let (sender, receiver) = mpsc::channel::<ThreadBuilder>();
        Builder::new().spawn(move || receiver.recv().map(ThreadBuilder::run))?;
        Ok(sender)
    };
    (0..threads).map(start).map_while(Result::ok).collect()
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
