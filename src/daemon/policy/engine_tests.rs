use std::time::SystemTime;

use proptest::prelude::*;

use super::super::{StuckSocket, breaker::Trip};
use super::*;
use crate::daemon::config::Protected;
use crate::sock_diag::Cookie;

const HERE: NetnsKey = NetnsKey {
    inode: 4026531840,
    cookie: 1,
};
const ACTS: &str =
    "mode = \"act\"\nexpires = 2100-01-01\nmin_age = \"1m\"\nconfirm = 1\nshare = \"100%\"";

fn key(cookie: u64) -> SocketKey {
    SocketKey {
        netns: HERE,
        cookie: Cookie(cookie),
    }
}

fn owner(pid: i32) -> ProcessId {
    ProcessId { pid, start_time: 5 }
}

fn config(text: &str) -> DaemonConfig {
    DaemonConfig::parse(text).unwrap()
}

/// A policy that acts at once, with these further lines.
fn acting(name: &str, lines: &str) -> String {
    format!("[[policy]]\nname = \"{name}\"\nmatch = {{ port = 8080 }}\n{ACTS}\n{lines}\n")
}

/// Changes a line of [`ACTS`].
fn with(text: &str, line: &str, other: &str) -> String {
    assert!(text.contains(line));
    text.replace(line, other)
}

/// Sockets with these cookies, which each policy selects. A lower cookie is older; all are of process 1.
fn facts(cookies: impl IntoIterator<Item = u64>, policies: usize) -> SweepFacts {
    let socket = |cookie| StuckSocket {
        key: key(cookie),
        age: Some(Duration::from_secs(1_000_000 - cookie)),
        owners: vec![owner(1)],
        has_unknown_owner: false,
        protected: None,
    };
    let sockets: Vec<StuckSocket> = cookies.into_iter().map(socket).collect();
    let all = (0..sockets.len()).map(|index| (index, Readiness::Ready));
    SweepFacts {
        selected: vec![all.collect(); policies],
        sockets,
        listed: vec![HERE],
        ..SweepFacts::default()
    }
}

/// An engine with its clock.
struct Trial {
    engine: Engine,
    now: Now,
}

impl Trial {
    fn new(text: &str) -> Self {
        Trial {
            engine: Engine::new(&config(text)),
            now: Now {
                wall: SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000),
                since_boot: Duration::from_secs(1000),
            },
        }
    }

    /// As [`Trial::new`], after a sweep without sockets.
    fn begun(text: &str) -> Self {
        let mut trial = Trial::new(text);
        let policies = trial.engine.policies.len();
        trial.decide(&facts([], policies));
        trial
    }

    fn decide(&mut self, facts: &SweepFacts) -> Vec<Decision> {
        self.now.since_boot += Duration::from_secs(30);
        self.now.wall += Duration::from_secs(30);
        self.engine.decide(self.now, facts)
    }

    /// Decides, and closes what was chosen. Returns the decision about the first policy.
    fn act(&mut self, facts: &SweepFacts) -> Decision {
        let decisions = self.decide(facts);
        for decision in decisions.iter().filter(|it| it.hold.is_none()) {
            self.engine.reserve(self.now, decision, facts);
            let results = vec![ActResult::Closed; decision.chosen.len()];
            let now = self.now;
            self.engine.settle(now, decision, facts, &results, false);
        }
        decisions.into_iter().next().unwrap()
    }
}

/// The cookies of the chosen sockets.
fn chosen(decision: &Decision, facts: &SweepFacts) -> Vec<u64> {
    let cookie = |&index: &usize| facts.sockets[index].key.cookie.0;
    decision.chosen.iter().map(cookie).collect()
}

fn left(decision: &Decision) -> Vec<(Reason, usize)> {
    decision
        .left
        .iter()
        .map(|(reason, count)| (*reason, *count))
        .collect()
}

#[test]
fn a_new_policy_observes_one_sweep() {
    let mut trial = Trial::new(&acting("a", ""));
    let facts = facts([1, 2], 1);
    let first = trial.act(&facts);
    assert_eq!(first.hold, Some(Hold::New));
    assert_eq!(chosen(&first, &facts), [1, 2], "it says what it would do");
    assert_eq!(trial.act(&facts).hold, None);

    trial
        .engine
        .configure(&config(&acting("a", "kills_per_hour = 7")));
    assert_eq!(
        trial.decide(&facts)[0].hold,
        Some(Hold::New),
        "it has changed"
    );
    trial
        .engine
        .configure(&config(&acting("a", "kills_per_hour = 7\nreason = \"x\"")));
    assert_eq!(trial.decide(&facts)[0].hold, None, "the same with a reason");
}

#[test]
fn what_holds_a_policy_back() {
    let observes = acting("a", "").replace("act", "observe");
    for (text, expected) in [
        (observes, Hold::ObserveMode),
        (
            with(&acting("a", ""), "2100-01-01", "2020-01-01"),
            Hold::Expired,
        ),
        // 1_800_000_000 is 2027-01-15 08:00 UTC.
        (acting("a", "window = \"09:00-10:00\""), Hold::OutsideWindow),
    ] {
        let mut trial = Trial::begun(&text);
        let facts = facts([1], 1);
        let decision = trial.act(&facts);
        assert_eq!(decision.hold, Some(expected));
        assert_eq!(chosen(&decision, &facts), [1]);
        assert!(trial.engine.acted.is_empty());
    }
    let mut within = Trial::begun(&acting("a", "window = \"07:00-09:00\""));
    assert_eq!(within.act(&facts([1], 1)).hold, None);
    let unusable = Engine::unusable(&config(&acting("a", "")));
    let mut trial = Trial {
        engine: unusable,
        ..within
    };
    assert_eq!(trial.act(&facts([1], 1)).hold, Some(Hold::StateUnusable));
}

#[test]
fn the_same_cookie_must_be_ready_in_sweeps_in_a_row() {
    let text = with(&acting("a", ""), "confirm = 1", "confirm = 3");
    let mut trial = Trial::begun(&text);
    let ready = facts([1], 1);
    let mut young = ready.clone();
    young.selected[0][0].1 = Readiness::TooYoung;
    let none = facts([], 1);
    for (facts, expected) in [
        (&ready, Some(Reason::NotConfirmed)),
        (&ready, Some(Reason::NotConfirmed)),
        (&young, Some(Reason::TooYoung)),
        (&ready, Some(Reason::NotConfirmed)),
        (&none, None),
        (&ready, Some(Reason::NotConfirmed)),
        (&ready, Some(Reason::NotConfirmed)),
    ] {
        let decision = trial.act(facts);
        assert!(decision.chosen.is_empty());
        assert_eq!(decision.left.keys().copied().next(), expected);
    }
    assert_eq!(chosen(&trial.act(&ready), &ready), [1]);
}

#[test]
fn a_namespace_that_was_not_listed_breaks_the_row_and_makes_nothing_new() {
    let text = with(&acting("a", ""), "confirm = 1", "confirm = 2");
    let mut trial = Trial::begun(&text);
    let all = facts([1], 1);
    trial.act(&all);
    let mut unlisted = facts([], 1);
    unlisted.listed.clear();
    trial.act(&unlisted);
    assert!(trial.engine.memories[0].seen.contains_key(&key(1)));
    assert!(trial.act(&all).chosen.is_empty());
    assert_eq!(chosen(&trial.act(&all), &all), [1]);
    for _ in 0..=REMEMBERED_UNLISTED {
        trial.act(&unlisted);
    }
    assert!(trial.engine.memories[0].seen.is_empty(), "it has vanished");
}

#[test]
fn a_sweep_that_could_not_list_the_sockets_of_a_policy_says_nothing_about_them() {
    let unlisted = SweepFacts {
        unlisted: HashSet::from([0]),
        ..facts([], 1)
    };
    let all = facts([1, 2, 3], 1);

    // It is not the sweep that a new policy observes.
    let mut trial = Trial::new(&acting("a", ""));
    assert_eq!(trial.decide(&unlisted)[0].hold, Some(Hold::Unlisted));
    assert_eq!(trial.decide(&all)[0].hold, Some(Hold::New));
    assert_eq!(trial.decide(&all)[0].hold, None);
    // What holds the policy back anyway is said first.
    let observing = with(ACTS, "mode = \"act\"", "mode = \"observe\"");
    let mut observes = Trial::new(&acting("a", "").replace(ACTS, &observing));
    assert_eq!(observes.decide(&unlisted)[0].hold, Some(Hold::ObserveMode));

    // It breaks the row of sweeps that a socket must be ready in.
    let confirmed = acting("a", "").replace(ACTS, &with(ACTS, "confirm = 1", "confirm = 2"));
    let mut trial = Trial::begun(&confirmed);
    trial.decide(&all);
    trial.decide(&unlisted);
    assert_eq!(trial.decide(&all)[0].chosen.len(), 0);
    assert_eq!(trial.decide(&all)[0].chosen.len(), 3);

    // The breaker judges an act by the next sweep that listed them: as many have come back, twice.
    let mut trial = Trial::begun(&acting("a", "breaker = { sweeps = 2 }"));
    for cookies in [[1, 2, 3], [4, 5, 6]] {
        assert_eq!(trial.act(&facts(cookies, 1)).chosen.len(), 3);
        assert_eq!(trial.decide(&unlisted)[0].change, None);
    }
    let change = trial.decide(&facts([7, 8, 9], 1))[0].change;
    let why = change.map(|change| change.to);
    assert!(
        matches!(
            why,
            Some(Status::Open {
                why: Trip::Refill,
                ..
            })
        ),
        "{why:?}"
    );
}

#[test]
fn what_speaks_against_a_socket() {
    let mut trial = Trial::begun(&acting("a", ""));
    let mut facts = facts(1..=5, 1);
    facts.sockets[0].protected = Some(Protected::Port);
    facts.sockets[1].has_unknown_owner = true;
    facts.selected[0][2].1 = Readiness::InUse;
    facts.selected[0][3].1 = Readiness::TooYoung;
    let decision = trial.act(&facts);
    assert_eq!(chosen(&decision, &facts), [5]);
    let expected = [
        (Reason::Protected, 1),
        (Reason::OwnerUnknown, 1),
        (Reason::TooYoung, 1),
        (Reason::InUse, 1),
    ];
    assert_eq!(left(&decision), expected);
}

#[test]
fn no_socket_is_acted_on_twice() {
    let mut trial = Trial::begun(&acting("a", ""));
    let facts = facts([1, 2], 1);
    let decision = trial.decide(&facts).remove(0);
    trial.engine.reserve(trial.now, &decision, &facts);
    // A daemon that is killed here goes on with what was kept.
    let kept = trial.engine.kept().restarted(trial.now.since_boot);
    let mut next = Trial {
        engine: Engine::with(&config(&acting("a", "")), kept),
        now: trial.now,
    };
    assert_eq!(left(&next.act(&facts)), [(Reason::ActedBefore, 2)]);
    // One that is not: the second socket could not be touched.
    let results = [ActResult::Failed, ActResult::Untouched];
    let now = trial.now;
    trial.engine.settle(now, &decision, &facts, &results, false);
    for _ in 0..DEFERRED_FOR {
        let expected = [(Reason::ActedBefore, 1), (Reason::Deferred, 1)];
        assert_eq!(left(&trial.act(&facts)), expected);
    }
    let decision = trial.act(&facts);
    assert_eq!(chosen(&decision, &facts), [2]);
    assert_eq!(left(&decision), [(Reason::ActedBefore, 1)]);
    // The operator orders another attempt, after a sweep.
    assert!(trial.engine.reset("a") && !trial.engine.reset("b"));
    assert_eq!(trial.act(&facts).hold, Some(Hold::New));
    assert_eq!(trial.act(&facts).chosen.len(), 2);
}

#[test]
fn what_was_not_done_costs_nothing() {
    let mut trial = Trial::begun(&acting("a", "kills_per_hour = 2"));
    let facts = facts([1, 2], 1);
    let decision = trial.decide(&facts).remove(0);
    trial.engine.reserve(trial.now, &decision, &facts);
    assert_eq!(trial.engine.left_in_hour(0, trial.now), 0);
    let now = trial.now;
    trial.engine.cancel(now, &decision, &facts);
    assert_eq!(trial.engine.left_in_hour(0, trial.now), 2);
    assert_eq!(trial.act(&facts).chosen.len(), 2);
}

#[test]
fn budgets_leave_the_youngest() {
    let text = format!(
        "[limits]\nkills_per_sweep = 3\nkills_per_hour = 4\n{}{}",
        acting("a", "kills_per_sweep = 2\nkills_per_hour = 3"),
        acting("b", "")
    );
    let mut trial = Trial::begun(&text);
    let facts = facts(1..=10, 2);
    let decisions = trial.decide(&facts);
    assert_eq!(chosen(&decisions[0], &facts), [1, 2]);
    assert_eq!(left(&decisions[0]), [(Reason::PolicySweepBudget, 8)]);
    assert_eq!(chosen(&decisions[1], &facts), [3]);
    let expected = [(Reason::OtherPolicy, 2), (Reason::HostSweepBudget, 7)];
    assert_eq!(left(&decisions[1]), expected);

    let act = |trial: &mut Trial| {
        let decisions = trial.decide(&facts);
        for decision in &decisions {
            trial.engine.reserve(trial.now, decision, &facts);
            let results = vec![ActResult::Closed; decision.chosen.len()];
            let now = trial.now;
            trial.engine.settle(now, decision, &facts, &results, false);
        }
        decisions
    };
    act(&mut trial);
    assert_eq!(trial.engine.left_in_hour(0, trial.now), 1);
    assert_eq!(trial.engine.host_left_in_hour(trial.now), 1);
    let decisions = act(&mut trial);
    assert_eq!(chosen(&decisions[0], &facts), [4]);
    assert_eq!(decisions[0].left[&Reason::PolicyHourBudget], 6);
    assert_eq!(decisions[1].left[&Reason::HostHourBudget], 6);
    trial.now.since_boot += Duration::from_secs(3600);
    assert_eq!(trial.engine.left_in_hour(0, trial.now), 3);
}

#[test]
fn an_owner_keeps_its_share() {
    let text = with(&acting("a", ""), "share = \"100%\"", "share = \"25%\"");
    let mut trial = Trial::begun(&text);
    let mut facts = facts(1..=8, 1);
    facts.sockets[7].owners = vec![owner(2)];
    let decision = trial.act(&facts);
    assert_eq!(
        chosen(&decision, &facts),
        [1, 2, 8],
        "7 of one process, 1 of another"
    );
    assert_eq!(left(&decision), [(Reason::OwnerShare, 5)]);
    // A shared socket counts for each.
    facts.sockets[3].owners = vec![owner(1), owner(2)];
    facts.sockets[7].owners = vec![owner(2), owner(3)];
    let decision = trial.decide(&facts).remove(0);
    assert_eq!(chosen(&decision, &facts), [3, 4]);
}

#[test]
fn it_starts_above_and_stops_below() {
    let mut trial = Trial::begun(&acting("a", "start_above = 5\nstop_below = 3"));
    let few = facts(1..=5, 1);
    assert_eq!(left(&trial.act(&few)), [(Reason::BelowLevel, 5)]);
    let many = facts(1..=6, 1);
    let decision = trial.act(&many);
    assert_eq!(
        chosen(&decision, &many),
        [1, 2, 3, 4],
        "2 are left, fewer than 3"
    );
    let again = facts(11..=13, 1);
    assert_eq!(trial.act(&again).chosen.len(), 1, "it goes on");
    let below = facts(14..=15, 1);
    assert_eq!(left(&trial.act(&below)), [(Reason::BelowLevel, 2)]);
    assert_eq!(
        left(&trial.act(&few)),
        [(Reason::BelowLevel, 1), (Reason::ActedBefore, 4)]
            .into_iter()
            .rev()
            .collect::<Vec<_>>()
    );
}

#[test]
fn a_level_can_be_a_part_of_the_limit() {
    let mut trial = Trial::begun(&acting("a", "start_above = \"50%\""));
    let mut facts = facts(1..=6, 1);
    assert_eq!(
        left(&trial.act(&facts)),
        [(Reason::BelowLevel, 6)],
        "no limit is known"
    );
    facts.limits.insert(owner(1), 12);
    assert_eq!(left(&trial.act(&facts)), [(Reason::BelowLevel, 6)]);
    facts.limits.insert(owner(1), 11);
    assert_eq!(trial.act(&facts).hold, None);
    facts.limits.insert(owner(1), 10);
    assert_eq!(
        chosen(&trial.act(&facts), &facts),
        [1, 2],
        "4 are fewer than half of 10"
    );
}

#[test]
fn a_leak_that_refills_opens_the_breaker_within_three_sweeps() {
    let mut trial = Trial::new(&acting("a", "kills_per_sweep = 5"));
    let mut next = 100;
    let mut cookies: Vec<u64> = (1..=20).collect();
    let mut changes = Vec::new();
    trial.decide(&facts(cookies.clone(), 1));
    for _ in 0..4 {
        let facts = facts(cookies.clone(), 1);
        let decision = trial.act(&facts);
        let closed = chosen(&decision, &facts);
        changes.push(decision.change.map(|change| change.to.code()));
        if decision.hold.is_none() {
            cookies.retain(|cookie| !closed.contains(cookie));
            cookies.extend(closed.iter().map(|_| {
                next += 1;
                next
            }));
        } else {
            assert_eq!(decision.hold, Some(Hold::BreakerOpen));
        }
    }
    assert_eq!(changes, [None, None, None, Some("open")]);
    let Status::Open { why, .. } = trial.engine.status(0) else {
        panic!("it is not open");
    };
    assert_eq!(why, Trip::Refill);
    // Open over a restart.
    let kept = trial.engine.kept().restarted(trial.now.since_boot);
    let engine = Engine::with(&config(&acting("a", "kills_per_sweep = 5")), kept);
    assert_eq!(engine.status(0).code(), "open");
}

#[test]
fn half_open_it_acts_on_ten() {
    let mut trial = Trial::begun(&acting("a", "breaker = { cooldown = \"30s\" }"));
    let facts = facts(1..=20, 1);
    let decision = trial.decide(&facts).remove(0);
    trial.engine.reserve(trial.now, &decision, &facts);
    let results = vec![ActResult::Failed; 20];
    let now = trial.now;
    let change = trial.engine.settle(now, &decision, &facts, &results, false);
    assert_eq!(change.unwrap().to.code(), "open");
    trial.engine.acted.clear();
    let decision = trial.act(&facts);
    assert_eq!(decision.change.unwrap().to.code(), "half-open");
    assert_eq!((decision.hold, decision.chosen.len()), (None, HALF_OPEN));
    assert_eq!(left(&decision), [(Reason::HalfOpen, 10)]);
}

#[test]
fn a_policy_that_was_taken_out_keeps_its_budget() {
    let mut trial = Trial::begun(&acting("a", "kills_per_hour = 2"));
    let all = facts(1..=5, 1);
    assert_eq!(trial.act(&all).chosen.len(), 2);
    trial.engine.configure(&config(""));
    trial.decide(&facts([], 0));
    trial
        .engine
        .configure(&config(&acting("a", "kills_per_hour = 2")));
    assert_eq!(trial.engine.left_in_hour(0, trial.now), 0);
    trial.engine.configure(&config(""));
    trial.now.since_boot += Duration::from_secs(3600);
    trial.decide(&facts([], 0));
    assert!(trial.engine.known.is_empty(), "nothing is kept for ever");
}

/// A step of a long life.
#[derive(Clone, Debug)]
enum Step {
    /// A sweep after so many seconds: this many sockets more become stuck, and the acts take so many seconds.
    Sweep { after: u64, new: u8, takes: u64 },
    /// As a sweep, and the daemon is killed after so many of its acts, before it can write them down.
    Killed { after: u64, new: u8, acts: u8 },
    /// A sweep whose state cannot be written.
    DiskFull { after: u64 },
    /// The daemon starts again with what it has written.
    Restart,
    /// The host starts again: another boot, and no socket is left.
    Reboot,
    /// Somebody sets the clock.
    SetClock { to: u64 },
    /// Another configuration.
    Reload { variant: usize },
    /// The operator orders it.
    Reset,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (1..400_u64, 0..30_u8, 0..100_u64).prop_map(|(after, new, takes)| Step::Sweep { after, new, takes }),
        2 => (1..400_u64, 0..30_u8, 0..20_u8).prop_map(|(after, new, acts)| Step::Killed { after, new, acts }),
        1 => (1..400_u64).prop_map(|after| Step::DiskFull { after }),
        1 => Just(Step::Restart),
        1 => Just(Step::Reboot),
        1 => (0..4_000_000_000_u64).prop_map(|to| Step::SetClock { to }),
        1 => (0..3_usize).prop_map(|variant| Step::Reload { variant }),
        1 => Just(Step::Reset),
    ]
}

const SWEEP_LIMITS: [usize; 3] = [9, 5, 7];
const HOUR_LIMITS: [usize; 3] = [20, 12, 15];

/// The limits stay the same; what else the policies say does not. Breakers hardly open, so that the budgets do the work.
fn variants() -> [DaemonConfig; 3] {
    let easy = "breaker = { sweeps = 1000, surge = 1000, failures = \"100%\", restarts = 1000 }";
    let limits = |index: usize| {
        let (sweep, hour) = (SWEEP_LIMITS[index], HOUR_LIMITS[index]);
        format!("kills_per_sweep = {sweep}\nkills_per_hour = {hour}\n")
    };
    ["", "methods = \"destroy\"\n", "window = \"06:00-18:00\"\n"].map(|more| {
        config(&format!(
            "[limits]\n{}{}{}",
            limits(0),
            acting("a", &format!("{}{easy}\n{more}", limits(1))),
            acting("b", &format!("{}{easy}", limits(2))),
        ))
    })
}

/// A world with the true time, which no daemon knows.
struct World {
    engine: Engine,
    /// What was written.
    written: Kept,
    variants: [DaemonConfig; 3],
    variant: usize,
    /// Seconds since the beginning.
    time: u64,
    booted: u64,
    /// The difference of the wall clock to the true time.
    wall: u64,
    /// The next cookie.
    next: u64,
    stuck: Vec<u64>,
    /// The true time of each act, and its policy.
    acts: Vec<(u64, usize)>,
    touched: HashSet<u64>,
}

impl World {
    fn new() -> Self {
        let variants = variants();
        World {
            engine: Engine::new(&variants[0]),
            written: Kept::default(),
            variants,
            variant: 0,
            time: 1000,
            booted: 0,
            wall: 1_800_000_000,
            next: 1,
            stuck: Vec::new(),
            acts: Vec::new(),
            touched: HashSet::new(),
        }
    }

    fn now(&self) -> Now {
        Now {
            wall: SystemTime::UNIX_EPOCH + Duration::from_secs(self.wall.saturating_add(self.time)),
            since_boot: Duration::from_secs(self.time - self.booted),
        }
    }

    fn restart(&mut self) {
        let kept = self.written.clone().restarted(self.now().since_boot);
        self.engine = Engine::with(&self.variants[self.variant], kept);
    }

    /// A sweep. Returns whether the daemon was killed.
    fn sweep(
        &mut self,
        after: u64,
        new: u8,
        takes: u64,
        killed_after: Option<usize>,
        is_disk_full: bool,
    ) -> bool {
        self.time += after;
        for _ in 0..new {
            self.stuck.push(self.next);
            self.next += 1;
        }
        let facts = facts(self.stuck.clone(), 2);
        let decisions = self.engine.decide(self.now(), &facts);
        let mut of_sweep = 0;
        for decision in decisions.iter().filter(|it| it.hold.is_none()) {
            self.engine.reserve(self.now(), decision, &facts);
            if is_disk_full {
                let now = self.now();
                self.engine.cancel(now, decision, &facts);
                continue;
            }
            self.written = self.engine.kept();
            self.time += takes;
            assert!(decision.chosen.len() <= SWEEP_LIMITS[1 + decision.policy]);
            let mut results = Vec::new();
            for (nth, cookie) in chosen(decision, &facts).into_iter().enumerate() {
                if killed_after == Some(of_sweep) {
                    return true;
                }
                // Some go on their own, and some cannot be closed.
                let result = match cookie % 5 {
                    0 if nth % 2 == 0 => ActResult::Untouched,
                    1 => ActResult::Failed,
                    _ => ActResult::Closed,
                };
                results.push(result);
                if result != ActResult::Untouched {
                    assert!(self.touched.insert(cookie), "{cookie} twice");
                    self.acts.push((self.time, decision.policy));
                    of_sweep += 1;
                }
                if result == ActResult::Closed {
                    self.stuck.retain(|one| *one != cookie);
                }
            }
            let now = self.now();
            self.engine.settle(now, decision, &facts, &results, false);
            self.written = self.engine.kept();
        }
        assert!(of_sweep <= SWEEP_LIMITS[0], "{of_sweep} in a sweep");
        killed_after.is_some()
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Sweep { after, new, takes } => {
                self.sweep(after, new, takes, None, false);
            }
            Step::Killed { after, new, acts } => {
                if self.sweep(after, new, 0, Some(acts.into()), false) {
                    self.restart();
                }
            }
            Step::DiskFull { after } => {
                self.sweep(after, 3, 0, None, true);
            }
            Step::Restart => self.restart(),
            Step::Reboot => {
                self.time += 30;
                self.booted = self.time;
                self.stuck.clear();
                let kept = self.written.clone().rebooted(self.now().since_boot);
                self.engine = Engine::with(&self.variants[self.variant], kept);
            }
            Step::SetClock { to } => self.wall = to,
            Step::Reload { variant } => {
                self.variant = variant;
                self.engine.configure(&self.variants[variant]);
            }
            // It allows another act on the same socket, so only in a world without stuck sockets.
            Step::Reset => {
                self.stuck.clear();
                self.engine.reset("a");
            }
        }
    }

    /// Checks each hour that ends with an act.
    fn check(&self) {
        for (index, &(time, _)) in self.acts.iter().enumerate() {
            let hour = self.acts[..=index].iter().rev();
            let hour: Vec<usize> = hour
                .take_while(|(earlier, _)| earlier + 3600 > time)
                .map(|(_, policy)| *policy)
                .collect();
            assert!(hour.len() <= HOUR_LIMITS[0], "{} of the host", hour.len());
            for policy in [0, 1] {
                let count = hour.iter().filter(|it| **it == policy).count();
                assert!(
                    count <= HOUR_LIMITS[1 + policy],
                    "{count} of policy {policy}"
                );
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]
    #[test]
    fn no_budget_is_exceeded_and_nothing_is_done_twice(steps in prop::collection::vec(step(), 1..60)) {
        let mut world = World::new();
        for step in &steps {
            world.step(step);
        }
        world.check();
    }
}

#[test]
fn the_world_of_the_property_acts_up_to_its_budgets() {
    let mut world = World::new();
    for _ in 0..200 {
        world.step(&Step::Sweep {
            after: 30,
            new: 10,
            takes: 0,
        });
    }
    world.check();
    let first_hour = world.acts.iter().filter(|(time, _)| *time < 1000 + 3600);
    assert_eq!(first_hour.count(), HOUR_LIMITS[0]);
}
