//! The limit of packets a second.

use std::time::{Duration, Instant};

use crate::control::Control;

/// Keeps the number of packets a second below a limit.
pub struct Pace {
    gap: Duration,
    /// When the next packet may leave.
    next: Option<Instant>,
}

impl Pace {
    /// After a pause, this much may leave at once.
    const CREDIT: Duration = Duration::from_millis(5);

    /// `rate`: the packets per second.
    pub fn new(rate: u32) -> Self {
        Pace {
            gap: Duration::from_secs(1) / rate.max(1),
            next: None,
        }
    }

    /// Waits until the next packet may leave.
    pub fn wait(&mut self, control: &dyn Control) {
        let now = control.now();
        let next = self.next.unwrap_or(now);
        let ahead = next.saturating_duration_since(now);
        if ahead > Self::CREDIT {
            control.sleep(ahead);
        }
        // Time that was not used is lost.
        self.next = Some(next.max(now) + self.gap);
    }
}
