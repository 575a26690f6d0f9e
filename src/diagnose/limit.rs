//! A process at its limit of open descriptors (RLIMIT_NOFILE), and the command that raises it.

use crate::privileges::may_raise_hard_limits;
use crate::proc::status::ProcessStatus;

/// A process with this number of free descriptors or fewer is at its limit: some come and go between the look at its table and the
/// next accept(2).
const FREE_AT_LIMIT: u64 = 3;

/// The limit of a process that has reached it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReachedLimit {
    pub soft: u64,
    /// `None`: unknown.
    pub hard: Option<u64>,
    /// Whether root can raise hard limits here: see [`may_raise_hard_limits`].
    pub may_raise_hard: bool,
}

/// Whether a process with so many open descriptors has almost no free one. `None`: unknown.
pub fn is_reached(used: Option<u64>, soft: Option<u64>) -> bool {
    used.zip(soft)
        .is_some_and(|(used, soft)| used.saturating_add(FREE_AT_LIMIT) >= soft)
}

impl ReachedLimit {
    /// The limit of a process with so many open descriptors; `None` if it has not reached it, or if that is unknown.
    pub fn of(used: Option<u64>, status: &ProcessStatus) -> Option<Self> {
        let soft = status.limit.filter(|_| is_reached(used, status.limit))?;
        Some(ReachedLimit {
            soft,
            hard: status.hard_limit,
            may_raise_hard: may_raise_hard_limits(),
        })
    }

    /// Whether the limit can be raised from here.
    pub fn can_be_raised(self) -> bool {
        self.may_raise_hard || self.hard.is_some_and(|hard| hard > self.soft)
    }

    /// The command that raises the limit of process `pid`, and the privilege that it needs. Where nobody can raise it, as in a
    /// container, the process may have another number on the host, so the command has none.
    pub fn raise(self, pid: i32) -> (String, &'static str) {
        let more = self.soft.max(1).saturating_mul(2);
        match self.hard {
            Some(hard) if hard > self.soft => (
                format!("prlimit --pid {pid} --nofile={}:", more.min(hard)),
                "",
            ),
            _ if self.may_raise_hard => (
                format!("prlimit --pid {pid} --nofile={more}:{more}"),
                " (needs CAP_SYS_RESOURCE)",
            ),
            _ => (
                format!("prlimit --pid PID --nofile={more}:{more}"),
                " (on the host, with the PID that it has there: nobody has CAP_SYS_RESOURCE here)",
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_soft_limit_is_raised_without_a_privilege() {
        let limit = |hard, may_raise_hard| ReachedLimit {
            soft: 1024,
            hard,
            may_raise_hard,
        };
        let below = limit(Some(1500), false);
        assert!(below.can_be_raised());
        assert_eq!(
            below.raise(42),
            ("prlimit --pid 42 --nofile=1500:".into(), "")
        );
        for hard in [None, Some(1024)] {
            assert!(limit(hard, true).can_be_raised());
            assert!(!limit(hard, false).can_be_raised());
            let (command, needs) = limit(hard, false).raise(42);
            assert_eq!(command, "prlimit --pid PID --nofile=2048:2048");
            assert!(needs.contains("on the host"), "{needs}");
        }
    }

    #[test]
    fn some_free_descriptors_come_and_go() {
        assert!(is_reached(Some(61), Some(64)));
        assert!(!is_reached(Some(60), Some(64)));
        assert!(!is_reached(None, Some(64)) && !is_reached(Some(64), None));
    }
}
