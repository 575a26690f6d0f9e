//! The clock, the pauses and Ctrl-C of a run, so that the steps of a run need no terminal and tests need no time.

use std::time::{Duration, Instant};

use crate::model::Method;

/// What a run takes from the world around it; several workers share one.
pub trait Control: Sync {
    /// A clock that never goes back.
    fn now(&self) -> Instant;

    /// Called before the first socket is acted on: from then on there may be something to restore.
    fn begin(&self) {}

    /// Waits.
    fn sleep(&self, duration: Duration);

    /// Whether the operator wants to stop. Acts that were begun are still verified.
    fn interrupted(&self) -> bool;

    /// Reports that `method` has dealt with this many sockets more.
    fn progress(&self, method: Method, sockets: usize);
}

/// Growing pauses between lookups: short enough for an answer over loopback, long enough for one from far away.
pub(crate) struct Backoff {
    next: Duration,
    longest: Duration,
}

impl Backoff {
    /// Pauses from `first` on, each twice as long as the one before, up to `longest`.
    pub fn new(first: Duration, longest: Duration) -> Self {
        Backoff {
            next: first,
            longest,
        }
    }

    /// Waits for the next pause, at most until `until`.
    pub fn sleep(&mut self, control: &dyn Control, until: Instant) {
        let left = until.saturating_duration_since(control.now());
        control.sleep(self.next.min(left));
        self.next = (self.next * 2).min(self.longest);
    }
}
