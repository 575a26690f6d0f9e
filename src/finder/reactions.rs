//! Waits while owners close the descriptors of closed sockets.
//!
//! A program that waits for its sockets (poll, epoll, a blocked read) is woken by the kernel before the act returns, so that one of its
//! threads is runnable from then on. If all threads sleep, none of them will close a descriptor because of the act, and cwkill does
//! not wait. So only owners that react cost time.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::still_open::{check_still_open, check_table};
use crate::control::{Backoff, Control, deadline};
use crate::model::{Outcome, Owner, Target};
use crate::proc::status::Activity;
use crate::proc::{FdState, ProcFs, ProcessId, TableId};

/// A process whose runnable threads have used this much processor time since its last descriptor was closed is busy with something
/// else.
const BUSY_ELSEWHERE_FROM: Duration = Duration::from_millis(20);
/// All threads of a process must be asleep at two looks in a row: the kernel wakes them just after it removes the socket from its
/// table (net/ipv4/tcp.c, tcp_done).
const LOOKS_ASLEEP: u32 = 2;
/// The longest wait for an owner that goes on closing.
const MAX_WAIT: Duration = Duration::from_secs(10);
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LONGEST_PAUSE: Duration = Duration::from_millis(20);

/// Waits while owners react to the end of their sockets: at most for `grace` without a closed descriptor, and ten seconds in all. Then
/// checks which descriptors of closed or closing sockets are still open, and writes the result to [`Owner::after`].
pub fn await_owners(proc: &ProcFs, targets: &mut [Target], grace: Duration, control: &dyn Control) {
    let mut waits = descriptors(targets, control.now());
    let over = deadline(control.now(), MAX_WAIT);
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    loop {
        let now = control.now();
        waits.retain_mut(|wait| wait.may_react(proc.activity(wait.process), now, grace));
        if waits.is_empty() || now >= over || control.interrupted() {
            break;
        }
        backoff.sleep(control, over);
        // An owner that sleeps may have very many.
        for wait in waits.iter_mut().filter(|wait| wait.asleep == 0) {
            wait.check(proc, control.now());
        }
        waits.retain(|wait| !wait.open.is_empty());
    }
    check_still_open(proc, targets);
}

/// An owner that may be about to close its descriptors.
struct ReactingOwner<'t> {
    process: ProcessId,
    /// The thread whose table has the descriptors, as [`Owner::tid`].
    tid: Option<i32>,
    /// Its descriptors that may be open, with the inode of each socket.
    open: Vec<(&'t mut Owner, u32)>,
    /// When cwkill last saw that a descriptor was closed.
    last_reaction: Instant,
    /// The processor time at the first look since then.
    cpu: Option<Duration>,
    /// How often in a row all its threads were asleep.
    asleep: u32,
}

impl ReactingOwner<'_> {
    /// Whether it can still close descriptors because of the act.
    fn may_react(&mut self, activity: Activity, now: Instant, grace: Duration) -> bool {
        if !activity.runnable {
            self.asleep += 1;
            return self.asleep < LOOKS_ASLEEP;
        }
        self.asleep = 0;
        let before = *self.cpu.get_or_insert(activity.cpu);
        let used = activity.cpu.saturating_sub(before);
        used < BUSY_ELSEWHERE_FROM && now.saturating_duration_since(self.last_reaction) < grace
    }

    /// Reads its descriptors again.
    fn check(&mut self, proc: &ProcFs, now: Instant) {
        let open = self.open.len();
        check_table(proc, (self.process, self.tid), &mut self.open);
        self.open
            .retain(|(owner, _)| owner.after == Some(FdState::Open));
        if self.open.len() < open {
            self.last_reaction = now;
            self.cpu = None;
            self.asleep = 0;
        }
    }
}

/// The descriptors of closed sockets, by table.
fn descriptors(targets: &mut [Target], now: Instant) -> Vec<ReactingOwner<'_>> {
    let mut waits: BTreeMap<TableId, ReactingOwner<'_>> = BTreeMap::new();
    for target in targets {
        let over = target.outcome.is_some_and(Outcome::is_closed_or_closing);
        let Some(inode) = target.socket.inode.filter(|_| over) else {
            continue;
        };
        for owner in &mut target.owners {
            let (process, tid) = (owner.process.id, owner.tid);
            let wait = waits
                .entry((process, tid))
                .or_insert_with(|| ReactingOwner {
                    process,
                    tid,
                    open: Vec::new(),
                    last_reaction: now,
                    cpu: None,
                    asleep: 0,
                });
            wait.open.push((owner, inode));
        }
    }
    waits.into_values().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRACE: Duration = Duration::from_secs(1);

    fn wait(now: Instant) -> ReactingOwner<'static> {
        ReactingOwner {
            process: ProcessId {
                pid: 7,
                start_time: 1,
            },
            tid: None,
            open: Vec::new(),
            last_reaction: now,
            cpu: None,
            asleep: 0,
        }
    }

    fn running(millis: u64) -> Activity {
        Activity {
            runnable: true,
            cpu: Duration::from_millis(millis),
        }
    }

    #[test]
    fn a_process_that_sleeps_twice_does_not_react() {
        let now = Instant::now();
        let mut wait = wait(now);
        assert!(wait.may_react(Activity::default(), now, GRACE));
        assert!(wait.may_react(running(1), now, GRACE));
        assert!(wait.may_react(Activity::default(), now, GRACE));
        assert!(!wait.may_react(Activity::default(), now, GRACE));
    }

    #[test]
    fn a_process_that_runs_without_closing_is_busy_elsewhere() {
        let now = Instant::now();
        let mut wait = wait(now);
        assert!(wait.may_react(running(500), now, GRACE));
        assert!(wait.may_react(running(519), now, GRACE));
        assert!(!wait.may_react(running(520), now, GRACE));
        // After a closed descriptor it counts anew.
        wait.cpu = None;
        assert!(wait.may_react(running(521), now, GRACE));
    }

    #[test]
    fn a_process_that_gets_no_processor_is_waited_for_until_the_grace_is_over() {
        let now = Instant::now();
        let mut wait = wait(now);
        let almost = now + GRACE - Duration::from_millis(1);
        assert!(wait.may_react(running(1), almost, GRACE));
        assert!(!wait.may_react(running(1), now + GRACE, GRACE));
        assert!(!wait.may_react(running(1), now, Duration::ZERO));
    }
}
