use super::*;

/// A breaker with its rules and a clock that goes on by 30 seconds in a sweep.
struct Trial {
    breaker: Breaker,
    rules: BreakerRules,
    now: Duration,
}

impl Trial {
    fn new() -> Self {
        Trial {
            breaker: Breaker::default(),
            rules: BreakerRules::default(),
            now: Duration::from_secs(1000),
        }
    }

    fn sweep(&mut self, selected: usize, new: usize) -> Option<Change> {
        self.sweep_with(selected, Some(new), &[])
    }

    fn sweep_with(
        &mut self,
        selected: usize,
        new: Option<usize>,
        ended: &[ProcessId],
    ) -> Option<Change> {
        self.now += Duration::from_secs(30);
        let ended = &ended.iter().copied().collect();
        let seen = Seen {
            selected,
            new,
            ended,
        };
        self.breaker.observe(&self.rules, self.now, seen)
    }

    fn act(&mut self, closed: u32, failed: u32) -> Option<Change> {
        let done = Done {
            closed,
            failed,
            owners: vec![owner(1)],
            spins: false,
        };
        self.breaker.record(&self.rules, self.now, &done)
    }
}

fn owner(pid: i32) -> ProcessId {
    ProcessId { pid, start_time: 5 }
}

fn opened(change: Option<Change>) -> Option<Trip> {
    match change?.to {
        Status::Open { why, .. } => Some(why),
        Status::Closed | Status::HalfOpen { .. } => None,
    }
}

#[test]
fn a_leak_that_refills_opens_it_in_three_sweeps() {
    let mut trial = Trial::new();
    trial.sweep(100, 0);
    for sweep in 1..=3 {
        assert_eq!(trial.act(10, 0), None);
        let change = trial.sweep(100, 10);
        let expected = (sweep == 3).then_some(Trip::Refill);
        assert_eq!(opened(change), expected, "sweep {sweep}");
    }
    assert_eq!(trial.breaker.status().code(), "open");
}

#[test]
fn a_sweep_that_does_not_know_what_is_new_leaves_the_act_to_the_next() {
    let mut trial = Trial::new();
    for sweep in 1..=3 {
        assert_eq!(trial.act(10, 0), None);
        assert_eq!(trial.sweep_with(100, None, &[]), None);
        let expected = (sweep == 3).then_some(Trip::Refill);
        assert_eq!(opened(trial.sweep(100, 10)), expected, "sweep {sweep}");
    }
}

#[test]
fn a_steady_leak_is_no_refill() {
    // As many become old enough as leak, sweep after sweep: a timeout for a leak.
    for leak in [
        &[3_u32, 4, 2, 5, 3, 1][..],
        &[0, 1, 0, 0, 2, 0, 1],
        &[20, 0, 0, 30, 0, 0, 10],
    ] {
        let mut trial = Trial::new();
        let leaks = || leak.iter().copied().cycle();
        for new in leaks().take(60) {
            assert_eq!(trial.sweep(50, new as usize), None);
        }
        for new in leaks().take(1000) {
            trial.act(new, 0);
            assert_eq!(trial.sweep(50, new as usize), None, "{leak:?}");
        }
    }
}

#[test]
fn fewer_that_come_back_start_the_count_again() {
    let mut trial = Trial::new();
    trial.sweep(100, 0);
    for _ in 0..10 {
        trial.act(10, 0);
        trial.sweep(100, 10);
        trial.act(10, 0);
        assert_eq!(trial.sweep(100, 9), None);
    }
}

#[test]
fn failures_over_the_share_open_it() {
    let mut trial = Trial::new();
    assert_eq!(trial.act(2, 2), None, "few acts say nothing");
    assert_eq!(trial.act(3, 3), None, "half of them is not more than half");
    assert_eq!(opened(trial.act(0, 1)), Some(Trip::Failures));
}

#[test]
fn only_the_last_acts_count() {
    let mut trial = Trial::new();
    assert_eq!(trial.act(0, 4), None);
    for _ in 0..3 {
        trial.act(100, 0);
    }
    assert_eq!(trial.act(3, 30), None);
}

#[test]
fn a_surge_opens_it() {
    let mut trial = Trial::new();
    for _ in 0..9 {
        assert_eq!(trial.sweep(20, 0), None);
    }
    assert_eq!(
        trial.sweep(5000, 0),
        None,
        "it does not know yet what is usual"
    );
    assert_eq!(trial.sweep(199, 0), None);
    assert_eq!(opened(trial.sweep(200, 0)), Some(Trip::Surge));
    let mut quiet = Trial::new();
    for _ in 0..20 {
        quiet.sweep(0, 0);
    }
    assert_eq!(quiet.sweep(99, 99), None, "few sockets are no surge");
}

#[test]
fn an_owner_that_ends_after_an_act_opens_it() {
    let mut trial = Trial::new();
    trial.act(1, 0);
    assert_eq!(trial.breaker.watched().collect::<Vec<_>>(), [owner(1)]);
    assert_eq!(trial.sweep_with(1, Some(0), &[owner(2)]), None, "another");
    let change = trial.sweep_with(1, Some(0), &[owner(1)]);
    assert_eq!(opened(change), Some(Trip::OwnerEnded));

    let mut later = Trial::new();
    later.act(1, 0);
    for _ in 0..3 {
        later.sweep(1, 0);
    }
    assert_eq!(later.breaker.watched().count(), 0);
    assert_eq!(
        later.sweep_with(1, Some(0), &[owner(1)]),
        None,
        "long after"
    );
}

#[test]
fn some_owners_may_end_if_the_operator_says_so() {
    let mut trial = Trial::new();
    trial.rules.restarts = 2;
    for pid in [1, 2] {
        let done = Done {
            closed: 1,
            owners: vec![owner(pid)],
            ..Done::default()
        };
        trial.breaker.record(&trial.rules, trial.now, &done);
    }
    assert_eq!(trial.sweep_with(1, Some(0), &[owner(1)]), None);
    let change = trial.sweep_with(1, Some(0), &[owner(2)]);
    assert_eq!(opened(change), Some(Trip::OwnerEnded));
}

#[test]
fn an_owner_that_spins_opens_it_at_once() {
    let mut trial = Trial::new();
    let done = Done {
        closed: 1,
        spins: true,
        ..Done::default()
    };
    let change = trial.breaker.record(&trial.rules, trial.now, &done);
    assert_eq!(opened(change), Some(Trip::OwnerSpins));
}

#[test]
fn after_the_cooldown_it_tries_again_with_few() {
    let mut trial = Trial::new();
    trial.rules.cooldown = Duration::from_secs(90);
    trial.act(0, 5);
    for _ in 0..2 {
        assert_eq!(trial.sweep(9, 0), None);
    }
    let change = trial.sweep(9, 0).unwrap();
    assert_eq!(change.to, Status::HalfOpen { good: 0 });
    for _ in 0..2 {
        trial.act(2, 0);
        assert_eq!(trial.sweep(9, 0), None);
    }
    trial.act(2, 0);
    let change = trial.sweep(9, 0).unwrap();
    assert_eq!(change.to, Status::Closed);
}

#[test]
fn half_open_a_single_refill_opens_it_again() {
    let mut trial = Trial::new();
    trial.rules.cooldown = Duration::from_secs(30);
    trial.act(0, 5);
    trial.sweep(9, 0);
    assert_eq!(trial.breaker.status().code(), "half-open");
    trial.act(5, 0);
    assert_eq!(opened(trial.sweep(9, 5)), Some(Trip::Refill));
}

#[test]
fn it_stays_open_over_a_reboot_and_closes_by_order() {
    let mut trial = Trial::new();
    trial.act(0, 5);
    trial.now = Duration::from_secs(5);
    trial.breaker.rebase(trial.now);
    assert_eq!(trial.sweep(9, 0), None);
    assert_eq!(trial.breaker.status().code(), "open");
    let json = serde_json::to_string(&trial.breaker).unwrap();
    assert_eq!(
        serde_json::from_str::<Breaker>(&json).unwrap(),
        trial.breaker
    );
    trial.breaker.reset();
    assert_eq!(trial.breaker.status(), Status::Closed);
}

#[test]
fn a_clock_that_goes_back_does_not_keep_it_open_for_ever() {
    let mut trial = Trial::new();
    trial.now = Duration::from_secs(1_000_000);
    trial.act(0, 5);
    trial.now = Duration::from_secs(0);
    for _ in 0..120 {
        trial.sweep(9, 0);
    }
    assert_eq!(trial.breaker.status().code(), "open");
    assert!(trial.sweep(9, 0).is_some());
}
