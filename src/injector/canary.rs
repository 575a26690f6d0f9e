//! The canary: one socket of each owner is closed first, the oldest, and cwkill looks whether the owner spins.
//!
//! A closed socket can wake a process without end, see [`crate::finder::spin_risk`]. How a process waits is not always visible. So
//! cwkill closes one socket, watches the threads of its owners for a moment, and closes the others only if no thread has begun to
//! spin. If the waits of an owner could not be read, its other sockets follow in growing steps, with a watch after each. At the end
//! all owners are watched once more: the sockets of one owner need not be waited for in the same way. All owners are watched at the
//! same time.
//!
//! A thread spins if it has not slept for a second since the close, although it slept before. A thread that was idle before also
//! spins if it has needed a processor for half of that second. Time in which it waits for a processor counts too, so the load of the
//! machine does not matter. A thread that has not slept before the close either cannot be judged, and does not count. If a process
//! has more threads than cwkill reads, the processor time of all of them counts as well, as if they were one that was idle before.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rayon::prelude::*;

use super::engine::Rules;
use super::workers;
use crate::control::Control;
use crate::model::{Method, Outcome, Owner, Scan, SkipReason, SpinRisk, Spinning, Target};
use crate::proc::epoll::EpollSet;
use crate::proc::threads::ThreadSample;
use crate::proc::{FdState, ProcFs, Process, ProcessId, RemoteFd};

/// How long owners are watched before the close.
const BEFORE: Duration = Duration::from_millis(50);
/// How many times as long they are watched before the close, if a thread has not slept meanwhile.
const LOOKS_BEFORE: u32 = 6;
/// How long owners are watched after the close, if no thread seems to spin.
const MOMENT: Duration = Duration::from_millis(100);
/// How often they are watched for that time, if a thread seems to spin.
const MOMENTS: u32 = 10;
/// How many sockets of an owner are tried at once until a method acts on one.
const TRIES: [usize; 8] = [1, 1, 1, 4, 16, 64, 256, 1024];
/// How many sockets follow the canary, step by step, if it could not be read how their owner waits for them.
const STEPS: [usize; 5] = [4, 16, 64, 256, 1024];

/// The samples of all threads of some processes at one moment.
#[derive(Debug, Default)]
struct Sample {
    at: Option<Instant>,
    threads: HashMap<ProcessId, Vec<ThreadSample>>,
}

/// The owners of which cwkill does not know how they wait for their sockets.
#[derive(Debug)]
pub struct Canaries<'p> {
    proc: &'p ProcFs,
    owners: BTreeMap<ProcessId, Arc<Process>>,
    /// Two samples before the close.
    before: [Sample; 2],
    /// The sockets of each owner on which a method has acted since the owner was watched.
    closed: BTreeMap<ProcessId, Vec<Closed>>,
    /// The targets that are, or were, in `closed`.
    noted: HashSet<usize>,
    /// The owners that spin.
    spinning: HashSet<ProcessId>,
}

/// A socket on which a method has acted.
#[derive(Clone, Copy, Debug)]
struct Closed {
    fd: RemoteFd,
    inode: Option<u32>,
}

impl<'p> Canaries<'p> {
    /// Begins to watch the owners of `scan`.
    pub fn new(scan: &Scan, proc: &'p ProcFs, control: &dyn Control) -> Self {
        let is_watched = |target: &&Target| needs_canary(target) || is_paused(target);
        let targets = scan.targets.iter().filter(is_watched);
        let mut owners = BTreeMap::new();
        for owner in targets.flat_map(|target| &target.owners) {
            let process = || Arc::clone(&owner.process);
            owners.entry(owner.process.id).or_insert_with(process);
        }
        let mut canaries = Canaries {
            proc,
            owners,
            before: Default::default(),
            closed: BTreeMap::new(),
            noted: HashSet::new(),
            spinning: HashSet::new(),
        };
        canaries.before[0] = Sample::of(&canaries.owners, proc, control);
        canaries
    }

    /// Closes the canary of each owner, and watches the owners. If one spins, its other sockets are skipped. If it could not be read
    /// how an owner waits, its other sockets are closed in growing steps, and it is watched after each. Returns the owners that spin.
    pub fn close_first(
        &mut self,
        scan: &mut Scan,
        methods: &[Method],
        rules: Rules<'_>,
        control: &dyn Control,
    ) -> Vec<Spinning> {
        if self.owners.is_empty() {
            return Vec::new();
        }
        self.watch_before(control);
        for count in TRIES {
            let covered = self.closed.keys().copied().collect();
            let chosen = choose(&scan.targets, covered, count, needs_canary);
            if chosen.is_empty() || control.interrupted() {
                break;
            }
            workers::begin(scan, &chosen, methods, rules, self.proc, control);
            self.note_closed(&scan.targets, chosen);
        }
        let mut spinning = self.watch_and_spare(scan, control);
        let is_unread =
            |target: &Target| target.spin_risk == SpinRisk::Unreadable && needs_canary(target);
        for count in STEPS {
            let chosen = choose(&scan.targets, self.spinning.clone(), count, is_unread);
            if chosen.is_empty() || control.interrupted() {
                break;
            }
            workers::begin(scan, &chosen, methods, rules, self.proc, control);
            self.note_closed(&scan.targets, chosen);
            spinning.extend(self.watch_and_spare(scan, control));
        }
        spinning
    }

    fn watch_and_spare(&mut self, scan: &mut Scan, control: &dyn Control) -> Vec<Spinning> {
        let spinning = self.watch(scan, control);
        for one in &spinning {
            spare(&mut scan.targets, one);
        }
        spinning
    }

    /// Takes the second sample before the close, later if a thread has not slept yet: on a busy machine it may only have waited for a
    /// processor.
    fn watch_before(&mut self, control: &dyn Control) {
        for looks in 1..=LOOKS_BEFORE {
            wait_since(self.before[0].at, BEFORE * looks, control);
            self.before[1] = Sample::of(&self.owners, self.proc, control);
            let [first, second] = &self.before;
            let all = |id: &ProcessId| {
                first
                    .pairs(second, *id)
                    .all(|(from, to)| to.has_slept(from))
            };
            if self.owners.keys().all(all) || control.interrupted() {
                break;
            }
        }
    }

    /// Watches the owners of the sockets that were closed after the canaries: a socket can be waited for in another way than the first
    /// of its owner. Returns those that spin.
    pub fn watch_the_rest(&mut self, scan: &Scan, control: &dyn Control) -> Vec<Spinning> {
        self.watch_closed(scan, control, |target| target.spin_risk.is_uncertain())
    }

    /// Watches the owners that would spin if a descriptor of a closed socket is still open. Returns those that spin.
    pub fn watch_paused(&mut self, scan: &Scan, control: &dyn Control) -> Vec<Spinning> {
        self.watch_closed(scan, control, |target| {
            target.spin_risk.would_spin().is_some()
        })
    }

    fn watch_closed(
        &mut self,
        scan: &Scan,
        control: &dyn Control,
        is_meant: impl Fn(&Target) -> bool,
    ) -> Vec<Spinning> {
        // If all owners have closed it, nobody waits for it.
        let is_open = |target: &Target| {
            let is_closed = |owner: &Owner| owner.after == Some(FdState::Closed);
            !target.owners.iter().all(is_closed)
        };
        let targets = scan.targets.iter().enumerate();
        let meant = targets.filter(|(_, target)| is_meant(target) && is_open(target));
        self.note_closed(&scan.targets, meant.map(|(index, _)| index));
        self.watch(scan, control)
    }

    /// Notes those of the targets with these `indices` on which a method has acted.
    fn note_closed(&mut self, targets: &[Target], indices: impl IntoIterator<Item = usize>) {
        for index in indices {
            let target = &targets[index];
            if target.acted().is_none() || !self.noted.insert(index) {
                continue;
            }
            for owner in &target.owners {
                let id = owner.process.id;
                if self.owners.contains_key(&id) {
                    self.closed.entry(id).or_default().push(Closed {
                        fd: owner.fd,
                        inode: target.socket.inode,
                    });
                }
            }
        }
    }

    /// Watches the owners in `closed`. Returns those that spin, without those that did before.
    fn watch(&mut self, scan: &Scan, control: &dyn Control) -> Vec<Spinning> {
        let closed = std::mem::take(&mut self.closed);
        let mut suspects: BTreeMap<ProcessId, Arc<Process>> = closed
            .keys()
            .filter(|id| !self.spinning.contains(id))
            .map(|id| (*id, Arc::clone(&self.owners[id])))
            .collect();
        let first = Sample::of(&suspects, self.proc, control);
        // The threads that have been awake at every look, each with its share of a processor.
        let mut awake: BTreeMap<ProcessId, Vec<(i32, f64)>> = BTreeMap::new();
        let mut last = first.at;
        for moment in 0..MOMENTS {
            // After Ctrl-C one look must do: cwkill has acted already.
            if suspects.is_empty() || (moment > 0 && control.interrupted()) {
                break;
            }
            wait_until(last, MOMENT, control);
            let now = Sample::of(&suspects, self.proc, control);
            last = now.at;
            suspects.retain(|id, _| {
                let mut threads = begun_to_spin(&self.before, &first, &now, *id);
                let earlier = awake.remove(id).unwrap_or_default();
                let was_awake = |tid: i32| earlier.iter().any(|(other, _)| *other == tid);
                threads.retain(|(tid, _)| moment == 0 || was_awake(*tid));
                let spins = !threads.is_empty();
                awake.insert(*id, threads);
                spins
            });
        }
        self.spinning.extend(suspects.keys());
        let spinning = |id: &ProcessId| {
            let closed = &closed[id];
            let (tid, after) = awake[id][0];
            let member = self.member_of_epoll(scan, *id, closed);
            let only = match closed[..] {
                [only] => Some(only.fd),
                _ => None,
            };
            Spinning {
                process: Arc::clone(&self.owners[id]),
                fd: member.map(|(fd, _)| fd).or(only),
                tid: Some(tid).filter(|tid| *tid != ThreadSample::ALL),
                before: percent(self.before[0].share(&self.before[1], *id, tid)),
                after: percent(after),
                epoll: member.map(|(_, epoll)| epoll),
                in_select: scan.in_select.contains(&tid),
                ended: false,
            }
        };
        suspects.keys().map(spinning).collect()
    }

    /// One of the `closed` sockets that is in an epoll set of owner `id`, and the set; the most harmful.
    fn member_of_epoll(
        &self,
        scan: &Scan,
        id: ProcessId,
        closed: &[Closed],
    ) -> Option<(RemoteFd, RemoteFd)> {
        let stuck = self.proc.uninterruptible(&self.owners[&id]);
        let epolls = scan.epolls.iter().filter(|(process, _)| process.id == id);
        let mut worst = None;
        for (_, epoll) in epolls.filter(|_| stuck.is_empty()) {
            let path = self.proc.path(&format!("{}/fdinfo/{}", id.pid, epoll.0));
            let fdinfo = fs::read_to_string(path).unwrap_or_default();
            let set = EpollSet::parse(epoll.0, &fdinfo);
            for one in closed {
                let inode = one.inode.map_or(0, u64::from);
                if let Some(interest) = set.interest_in(one.fd.0, inode)
                    && worst.is_none_or(|(known, _)| interest > known)
                {
                    worst = Some((interest, (one.fd, *epoll)));
                }
            }
        }
        worst.map(|(_, member)| member)
    }
}

/// Notes which of `spinning` have ceased to spin.
pub fn note_ended(spinning: &mut [Spinning], proc: &ProcFs, control: &dyn Control) {
    if spinning.is_empty() {
        return;
    }
    let owners = spinning.iter();
    let owners = owners
        .map(|one| (one.process.id, Arc::clone(&one.process)))
        .collect();
    let first = Sample::of(&owners, proc, control);
    wait_since(first.at, MOMENT, control);
    let second = Sample::of(&owners, proc, control);
    for one in spinning {
        let tid = one.tid.unwrap_or(ThreadSample::ALL);
        one.ended = !first.is_awake(&second, one.process.id, tid);
    }
}

/// Waits until `duration` has passed after `start`, also after Ctrl-C.
fn wait_until(start: Option<Instant>, duration: Duration, control: &dyn Control) {
    let until = start.unwrap_or_else(|| control.now()) + duration;
    loop {
        let left = until.saturating_duration_since(control.now());
        if left.is_zero() {
            break;
        }
        control.sleep(left);
    }
}

/// Waits until `duration` has passed after `start`. Ctrl-C ends the wait.
fn wait_since(start: Option<Instant>, duration: Duration, control: &dyn Control) {
    let until = start.unwrap_or_else(|| control.now()) + duration;
    let left = until.saturating_duration_since(control.now());
    if !left.is_zero() && !control.interrupted() {
        control.sleep(left);
    }
}

/// Whether a socket is closed only after the canary of its owners.
fn needs_canary(target: &Target) -> bool {
    target.outcome.is_none()
        && target.plan.skip.is_none()
        && target.spin_risk.is_uncertain()
        && !target.owners.is_empty()
}

/// Whether a socket is closed although an owner would spin, because its descriptor will be closed too.
fn is_paused(target: &Target) -> bool {
    target.outcome.is_none()
        && target.plan.skip.is_none()
        && target.spin_risk.would_spin().is_some()
}

/// The indices of the next sockets to close: the `count` oldest of each owner that is not `covered`, among those that `may_go` first.
/// The targets are sorted, the oldest first.
fn choose(
    targets: &[Target],
    covered: HashSet<ProcessId>,
    count: usize,
    may_go: impl Fn(&Target) -> bool,
) -> Vec<usize> {
    let mut left: HashMap<ProcessId, usize> = covered.into_iter().map(|id| (id, 0)).collect();
    let mut chosen = Vec::new();
    for (index, target) in targets.iter().enumerate() {
        if may_go(target) && target.attempts.is_empty() {
            let mut is_chosen = false;
            for owner in &target.owners {
                let left = left.entry(owner.process.id).or_insert(count);
                is_chosen |= *left > 0;
            }
            if is_chosen {
                chosen.push(index);
                for owner in &target.owners {
                    let left = left.entry(owner.process.id).or_default();
                    *left = left.saturating_sub(1);
                }
            }
        }
    }
    chosen
}

/// Skips the sockets of an owner that spins, except those on which a method has acted.
fn spare(targets: &mut [Target], spinning: &Spinning) {
    let id = spinning.process.id;
    for target in targets {
        let is_owned = target.owners.iter().any(|owner| owner.process.id == id);
        if is_owned
            && target.outcome.is_none()
            && target.plan.skip.is_none()
            && target.acted().is_none()
        {
            target.outcome = Some(Outcome::Skipped(SkipReason::OwnerSpins {
                pid: id.pid,
                fd: spinning.fd,
            }));
        }
    }
}

/// A thread that needed a processor for less than this share of the time was idle before the close.
const QUARTER: f64 = 0.25;
/// A thread that needs a processor for this share of the time is not idle.
const HALF: f64 = 0.5;

impl Sample {
    fn of(
        owners: &BTreeMap<ProcessId, Arc<Process>>,
        proc: &ProcFs,
        control: &dyn Control,
    ) -> Self {
        let ids: Vec<ProcessId> = owners.keys().copied().collect();
        let threads = ids
            .into_par_iter()
            .map(|id| (id, proc.thread_samples(id)))
            .collect();
        Sample {
            at: Some(control.now()),
            threads,
        }
    }

    fn time_to(&self, later: &Sample) -> Duration {
        match (self.at, later.at) {
            (Some(at), Some(later)) => later.saturating_duration_since(at),
            _ => Duration::ZERO,
        }
    }

    /// The threads of a process that were there in both samples.
    fn pairs<'s>(
        &'s self,
        later: &'s Sample,
        id: ProcessId,
    ) -> impl Iterator<Item = (&'s ThreadSample, &'s ThreadSample)> {
        let threads = |sample: &'s Sample| sample.threads.get(&id).map_or(&[][..], |it| it);
        let first: HashMap<i32, &ThreadSample> = threads(self)
            .iter()
            .map(|thread| (thread.tid, thread))
            .collect();
        let pair = move |thread: &'s ThreadSample| Some((*first.get(&thread.tid)?, thread));
        threads(later).iter().filter_map(pair)
    }

    /// The share of the time between the samples in which a thread needed a processor.
    fn share(&self, later: &Sample, id: ProcessId, tid: i32) -> f64 {
        let time = self.time_to(later);
        let mut pairs = self.pairs(later, id);
        pairs
            .find(|(_, thread)| thread.tid == tid)
            .map_or(0.0, |(from, to)| needed(from, to, time))
    }

    /// Whether a thread has not slept between the samples, or needed a processor for half of the time.
    fn is_awake(&self, later: &Sample, id: ProcessId, tid: i32) -> bool {
        let mut pairs = self.pairs(later, id);
        let pair = pairs.find(|(_, thread)| thread.tid == tid);
        pair.is_some_and(|(from, to)| {
            !to.has_slept(from) || needed(from, to, self.time_to(later)) >= HALF
        })
    }
}

/// The share of `time` between two samples in which a thread ran or waited for a processor.
fn needed(from: &ThreadSample, to: &ThreadSample, time: Duration) -> f64 {
    let total = |thread: &ThreadSample| thread.ran + thread.waited;
    let needed = total(to).saturating_sub(total(from));
    needed.as_secs_f64() / time.as_secs_f64().max(f64::MIN_POSITIVE)
}

/// The threads of owner `id` that are awake since the close and were not before, each with its share of a processor.
fn begun_to_spin(
    before: &[Sample; 2],
    after: &Sample,
    now: &Sample,
    id: ProcessId,
) -> Vec<(i32, f64)> {
    let [first, second] = before;
    let earlier: HashMap<i32, (&ThreadSample, &ThreadSample)> = first
        .pairs(second, id)
        .map(|(from, to)| (to.tid, (from, to)))
        .collect();
    let begun = |(from, to): (&ThreadSample, &ThreadSample)| {
        let (first_of, second_of) = earlier.get(&to.tid)?;
        let was_idle = !first_of.runnable
            && !second_of.runnable
            && needed(first_of, second_of, first.time_to(second)) < QUARTER;
        let share = needed(from, to, after.time_to(now));
        let spins = match was_idle {
            true => !to.has_slept(from) || share >= HALF,
            false => !to.has_slept(from) && second_of.has_slept(first_of),
        };
        spins.then_some((to.tid, share))
    };
    after.pairs(now, id).filter_map(begun).collect()
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "between 0 and some hundred"
)]
fn percent(share: f64) -> u32 {
    (share * 100.0).round() as u32
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Owner, Plan, Socket};
    use crate::proc::testdata::process;
    use crate::sock_diag::testdata::stuck;

    fn target(owners: &[i32]) -> Target {
        let mut target = Target::new(Socket::from_message(&stuck("10.0.0.1:80", "10.0.0.2:5", 1)));
        let owner = |pid: &i32| Owner::new(process(*pid, "app"), RemoteFd(3));
        target.owners = owners.iter().map(owner).collect();
        target.plan = Plan {
            methods: vec![Method::Shutdown],
            ..Plan::default()
        };
        target
    }

    #[test]
    fn the_oldest_socket_of_each_owner_is_the_canary() {
        let mut targets: Vec<Target> = [&[7][..], &[7], &[8], &[8, 9], &[9], &[], &[10], &[10]]
            .map(target)
            .into();
        targets[6].spin_risk = SpinRisk::Harmless;
        targets[7].plan.skip = Some(SkipReason::OverMaxKills);
        let next =
            |targets: &[Target], covered, count| choose(targets, covered, count, needs_canary);
        assert_eq!(next(&targets, HashSet::new(), 1), [0, 2, 3]);
        assert_eq!(next(&targets, HashSet::new(), 2), [0, 1, 2, 3, 4]);
        // The first was left alone, so the next is tried.
        targets[0].outcome = Some(Outcome::Gone);
        targets[2].attempt(Method::Shutdown, None);
        let covered = HashSet::from([process(8, "app").id]);
        assert_eq!(next(&targets, covered, 1), [1, 3]);
    }

    #[test]
    fn the_sockets_of_an_owner_that_spins_are_left() {
        let mut targets: Vec<Target> = [&[7][..], &[7], &[8], &[8, 7]].map(target).into();
        targets[0].attempt(Method::Shutdown, None);
        let spinning = Spinning {
            process: process(7, "app"),
            fd: Some(RemoteFd(3)),
            tid: Some(7),
            before: 0,
            after: 98,
            epoll: None,
            in_select: false,
            ended: false,
        };
        spare(&mut targets, &spinning);
        let left = Some(Outcome::Skipped(SkipReason::OwnerSpins {
            pid: 7,
            fd: Some(RemoteFd(3)),
        }));
        let outcomes: Vec<_> = targets.iter().map(|target| target.outcome).collect();
        assert_eq!(outcomes, [None, left, None, left]);
    }

    /// A thread that is there at 0, 50, 60 and 160 ms: before and after the close.
    fn begins(threads: [(bool, u64, u64); 4]) -> bool {
        let start = Instant::now();
        let id = process(7, "app").id;
        let mut times = [0, 50, 60, 160].into_iter();
        let [first, second, third, fourth] = threads.map(|(runnable, sleeps, ran)| {
            let thread = ThreadSample {
                tid: 7,
                runnable,
                sleeps,
                ran: Duration::from_millis(ran / 2),
                waited: Duration::from_millis(ran - ran / 2),
            };
            Sample {
                at: times.next().map(|time| start + Duration::from_millis(time)),
                threads: HashMap::from([(id, vec![thread])]),
            }
        });
        !begun_to_spin(&[first, second], &third, &fourth, id).is_empty()
    }

    #[test]
    fn a_thread_that_has_not_slept_since_the_close_spins() {
        let (asleep, awake) = (false, true);
        let (idle, spins) = ((asleep, 5, 0), (awake, 5, 1));
        assert!(begins([idle, idle, spins, (awake, 5, 99)]));
        // The kernel has not added up its times yet.
        assert!(begins([idle, idle, spins, (awake, 5, 1)]));
        assert!(!begins([idle, idle, idle, idle]));
        assert!(!begins([idle, idle, spins, (asleep, 6, 2)]), "it reacted");
        assert!(!begins([idle, idle, spins, (awake, 7, 40)]), "it works");
        // It writes a line for every wake-up, and sleeps until the line is written.
        assert!(begins([idle, idle, (awake, 9, 1), (asleep, 999, 61)]));
    }

    #[test]
    fn a_thread_that_was_busy_before_must_cease_to_sleep() {
        let (asleep, awake) = (false, true);
        let computes = [
            (awake, 5, 0),
            (awake, 5, 50),
            (awake, 5, 60),
            (awake, 5, 160),
        ];
        assert!(!begins(computes));
        let (often, later) = ((asleep, 50, 30), (asleep, 60, 36));
        assert!(!begins([(asleep, 5, 0), often, later, (asleep, 160, 96)]));
        // The kernel had not added up its wait yet.
        let waits = (awake, 50, 2);
        assert!(!begins([(asleep, 5, 0), waits, later, (asleep, 160, 96)]));
        assert!(begins([(asleep, 5, 0), waits, later, (awake, 60, 96)]));
    }
}
