//! The clock, the pauses and Ctrl-C of a run. With this trait a run needs no terminal, and a test need not wait.

use std::time::{Duration, Instant};

use crate::model::Method;

/// The connection of a run to its surroundings. Several workers share one.
pub trait Control: Sync {
    /// The time of a clock that never goes back.
    fn now(&self) -> Instant;

    /// From now on a signal only makes [`Control::interrupted`] true: an act may leave something to restore.
    fn hold_signals(&self) {}

    fn sleep(&self, duration: Duration);

    /// Whether the operator wants to stop. A started act is still verified.
    fn interrupted(&self) -> bool;

    /// Reports that `method` is done with this many more sockets.
    fn progress(&self, method: Method, sockets: usize);
}

/// The time at which `duration` has passed after `start`, at most a century later: the operator may give durations that the
/// clock cannot represent.
pub(crate) fn deadline(start: Instant, duration: Duration) -> Instant {
    const CENTURY: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);
    start + duration.min(CENTURY)
}

/// Growing pauses between lookups: short enough for an answer over loopback, long enough for one from far away.
pub(crate) struct Backoff {
    next: Duration,
    longest: Duration,
}

impl Backoff {
    /// The first pause is `first`; each further one is twice as long, up to `longest`.
    pub fn new(first: Duration, longest: Duration) -> Self {
        Backoff {
            next: first,
            longest,
        }
    }

    /// Waits for the next pause, but not beyond `deadline`.
    pub fn sleep(&mut self, control: &dyn Control, deadline: Instant) {
        let remaining = deadline.saturating_duration_since(control.now());
        control.sleep(self.next.min(remaining));
        self.next = (self.next * 2).min(self.longest);
    }
}
