//! The threads in which a watch of `cwkill gateway` acts, each on a batch of its own: an end that is silent holds up its own batch, for about a
//! second, and no other.

use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::Scope;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use super::gateway::{Sockets, act_on};
use crate::config::GatewayConfig;
use crate::control::Control;
use crate::injector::gateway::Pace;
use crate::model::{ForwardedAct, Method};
use crate::report::gateway::ForwardedRun;

/// The batches that are in flight at most.
const WORKERS: u32 = 4;
/// After Ctrl-C, what is in flight gets this long.
const FINISH_WITHIN: Duration = Duration::from_secs(10);

/// Opens the sockets of each worker. They share the rate, so there are not more of them than packets in a second.
///
/// # Errors
/// A socket cannot be opened.
pub(super) fn open(config: &GatewayConfig) -> anyhow::Result<Vec<Sockets>> {
    let count = config.rate.clamp(1, WORKERS);
    (0..count).map(|_| Sockets::open()).collect()
}

struct Worker {
    jobs: Sender<ForwardedRun>,
    done: Receiver<ForwardedRun>,
    is_busy: bool,
}

/// They end when this is dropped.
pub(super) struct Workers {
    workers: Vec<Worker>,
    rate_of_each: u32,
}

impl Workers {
    /// Starts a thread for each of `sockets`.
    pub(super) fn start<'s, 'e: 's>(
        scope: &'s Scope<'s, 'e>,
        sockets: Vec<Sockets>,
        act: ForwardedAct,
        config: &'e GatewayConfig,
        control: &'e dyn Control,
    ) -> Self {
        let count = u32::try_from(sockets.len()).unwrap_or(WORKERS);
        let rate = config.rate / count.max(1);
        let start = |sockets| {
            let ((jobs, taken), (finished, done)) = (channel(), channel());
            scope.spawn(move || work(sockets, rate, act, config, control, taken, finished));
            Worker {
                jobs,
                done,
                is_busy: false,
            }
        };
        Workers {
            workers: sockets.into_iter().map(start).collect(),
            rate_of_each: rate,
        }
    }

    /// The number of packets a second that each may send.
    pub(super) fn rate_of_each(&self) -> u32 {
        self.rate_of_each
    }

    pub(super) fn free(&self) -> usize {
        self.workers.iter().filter(|worker| !worker.is_busy).count()
    }

    /// Whether the last free one is left, of several.
    pub(super) fn is_last_free(&self) -> bool {
        self.workers.len() > 1 && self.free() == 1
    }

    pub(super) fn is_busy(&self) -> bool {
        self.workers.iter().any(|worker| worker.is_busy)
    }

    /// Gives the connections of `run` to a free worker.
    ///
    /// # Errors
    /// There is none.
    pub(super) fn give(&mut self, run: ForwardedRun) -> anyhow::Result<()> {
        let free = self.workers.iter_mut().find(|worker| !worker.is_busy);
        let worker = free.context("no thread is free")?;
        worker.is_busy = true;
        worker.jobs.send(run).ok().context("a thread has ended")
    }

    /// The runs that are over.
    ///
    /// # Errors
    /// A thread has panicked.
    pub(super) fn done(&mut self) -> anyhow::Result<Vec<ForwardedRun>> {
        let mut runs = Vec::new();
        for worker in self.workers.iter_mut().filter(|worker| worker.is_busy) {
            match worker.done.try_recv() {
                Ok(run) => {
                    worker.is_busy = false;
                    runs.push(run);
                }
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => bail!("a thread has ended"),
            }
        }
        Ok(runs)
    }
}

fn work(
    mut sockets: Sockets,
    rate: u32,
    act: ForwardedAct,
    config: &GatewayConfig,
    control: &dyn Control,
    jobs: Receiver<ForwardedRun>,
    done: Sender<ForwardedRun>,
) {
    let mut pace = Pace::new(rate);
    for mut run in jobs {
        let control = Finishing::new(control);
        act_on(&mut run, act, config, &mut sockets, &control, &mut pace);
        if done.send(run).is_err() {
            return;
        }
    }
}

/// Lets a batch of connections end in order after Ctrl-C: those that were asked get their RSTs and are verified.
struct Finishing<'c> {
    inner: &'c dyn Control,
    since: OnceLock<Instant>,
}

impl<'c> Finishing<'c> {
    fn new(inner: &'c dyn Control) -> Self {
        let since = OnceLock::new();
        Finishing { inner, since }
    }
}

impl Control for Finishing<'_> {
    fn now(&self) -> Instant {
        self.inner.now()
    }

    fn sleep(&self, duration: Duration) {
        self.inner.sleep(duration);
    }

    fn interrupted(&self) -> bool {
        if !self.inner.interrupted() {
            return false;
        }
        let now = self.now();
        let since = *self.since.get_or_init(|| now);
        now.saturating_duration_since(since) >= FINISH_WITHIN
    }

    fn progress(&self, method: Method, sockets: usize) {
        self.inner.progress(method, sockets);
    }
}
