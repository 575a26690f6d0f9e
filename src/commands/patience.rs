//! Failures of a watch that may pass: it says so, and tries again.

use std::time::{Duration, Instant};

use super::say_notes;

/// What fails for so long does not pass.
const GIVE_UP_AFTER: Duration = Duration::from_secs(60);

/// One thing that a watch does again and again.
#[derive(Debug, Default)]
pub(super) struct Patience {
    /// Since when it has failed each time.
    failing: Option<Instant>,
    /// Whether it has ever succeeded.
    has_succeeded: bool,
    quiet: bool,
}

impl Patience {
    pub(super) fn new(quiet: bool) -> Self {
        Patience {
            quiet,
            ..Patience::default()
        }
    }

    pub(super) fn is_failing(&self) -> bool {
        self.failing.is_some()
    }

    /// The result of one attempt, at this time; `None` if it is to be tried again. The first failure in a row is said.
    ///
    /// # Errors
    /// It has never succeeded, or has failed for too long.
    pub(super) fn judge<T>(
        &mut self,
        result: anyhow::Result<T>,
        now: Instant,
    ) -> anyhow::Result<Option<T>> {
        let error = match result {
            Ok(done) => {
                (self.failing, self.has_succeeded) = (None, true);
                return Ok(Some(done));
            }
            Err(error) => error,
        };
        let is_first = self.failing.is_none();
        let since = *self.failing.get_or_insert(now);
        let is_too_long = now.saturating_duration_since(since) >= GIVE_UP_AFTER;
        if !self.has_succeeded || is_too_long {
            return Err(error);
        }
        if is_first && !self.quiet {
            say_notes([format!("{error:#}; the watch tries again")]);
        }
        Ok(None)
    }
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;

    #[test]
    fn a_watch_bears_a_failure_that_passes() {
        let start = Instant::now();
        let mut patience = Patience::new(true);
        let failed = |patience: &mut Patience, seconds| {
            let now = start + Duration::from_secs(seconds);
            patience.judge::<()>(Err(anyhow!("no buffer")), now)
        };
        assert!(failed(&mut patience, 0).is_err(), "at the start");
        let mut patience = Patience::new(true);
        assert_eq!(patience.judge(Ok(7), start).unwrap(), Some(7));
        assert!(failed(&mut patience, 10).unwrap().is_none());
        assert!(patience.is_failing());
        assert!(failed(&mut patience, 69).unwrap().is_none());
        assert!(failed(&mut patience, 70).is_err(), "for too long");
        patience.judge(Ok(()), start).unwrap();
        assert!(!patience.is_failing());
        assert!(failed(&mut patience, 80).unwrap().is_none());
    }
}
