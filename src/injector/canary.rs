//! The canary: one socket of each owner is closed first, the oldest, and cwkill looks whether the owner spins.
//!
//! A closed socket can wake a process without end, see [`crate::finder::spin_risk`]. How a process waits is not always visible. So
//! cwkill closes one socket, observes the threads of its owners for a moment, and closes the others only if no thread has begun to
//! spin. If the waits of an owner could not be read, its other sockets follow in growing steps, each followed by a look. At the end
//! all owners are observed once more: the sockets of one owner need not be waited for in the same way. All owners are observed at the
//! same time.
//!
//! Only a socket on which a method has acted shows how its owner waits. If it was refused, the next one is tried. If
//! `SOCKETS_PER_TRY` were refused, the other sockets of the owner are left: they would be closed without a look.
//!
//! `thread_usage` decides whether a thread spins.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::engine::Rules;
use super::thread_usage::{Usage, begun_to_spin, percent};
use super::workers;
use crate::control::Control;
use crate::model::{Method, Outcome, Owner, Scan, SkipReason, SpinRisk, Spinning, Target};
use crate::proc::epoll::EpollSet;
use crate::proc::threads::ThreadUsage;
use crate::proc::{FdState, ProcFs, Process, ProcessId, RemoteFd};

/// How long owners are observed before the close. A thread that works and sleeps in turn sleeps in this time.
const TIME_BEFORE_CLOSE: Duration = Duration::from_millis(50);
/// How many times as long they are observed before the close, if a thread has not slept meanwhile: 0.3 s in all.
const MAX_LOOKS_BEFORE_CLOSE: u32 = 6;
/// The time between the close and the first look at the owners after it, and between two looks.
const LOOK_INTERVAL: Duration = Duration::from_millis(100);
/// The number of looks at an owner that seems to spin: a second in all. Without such a thread, one look is enough.
const MAX_LOOKS_AFTER_CLOSE: u32 = 10;
/// How many sockets of an owner are tried at once, try by try, until a method acts on one. Most methods act on the first. The number
/// grows so that an owner with very many sockets that no method can close does not take as many tries. In a step of
/// [`SOCKETS_PER_STEP`] a try has at least as many sockets as the step.
const SOCKETS_PER_TRY: [usize; 8] = [1, 1, 1, 4, 16, 64, 256, 1024];
/// How many sockets of an owner follow the canary, step by step, if it could not be read how the owner waits for them.
const SOCKETS_PER_STEP: [usize; 5] = [4, 16, 64, 256, 1024];

/// The owners of which cwkill does not know how they wait for their sockets.
#[derive(Debug)]
pub struct Canaries<'p> {
    proc: &'p ProcFs,
    owners: BTreeMap<ProcessId, Arc<Process>>,
    /// Two readings before the close.
    before: [Usage; 2],
    /// The sockets of each owner on which a method has acted since the owner was observed.
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
    /// Begins to observe the owners of `scan`.
    pub fn new(scan: &Scan, proc: &'p ProcFs, control: &dyn Control) -> Self {
        let is_observed = |target: &&Target| needs_canary(target) || is_paused(target);
        let targets = scan.targets.iter().filter(is_observed);
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
        canaries.before[0] = Usage::of(&canaries.owners, proc, control);
        canaries
    }

    /// Closes the canary of each owner, and observes the owners. If one spins, its other sockets are skipped. If it could not be read
    /// how an owner waits, its other sockets are closed in growing steps, and it is observed after each. Returns the owners that spin.
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
        let proc = self.proc;
        let begin = |scan: &mut Scan, chosen: &[usize]| {
            workers::begin(scan, chosen, methods, rules, proc, control);
        };
        self.close_in_steps(scan, &begin, control)
    }

    /// [`Canaries::close_first`], with `begin` to use the methods on the sockets with some indices.
    fn close_in_steps(
        &mut self,
        scan: &mut Scan,
        begin: &dyn Fn(&mut Scan, &[usize]),
        control: &dyn Control,
    ) -> Vec<Spinning> {
        self.observe_before(control);
        self.close_some(scan, 1, needs_canary, begin, control);
        let mut spinning = self.observe_and_spare(scan, control);
        for id in self
            .owners
            .keys()
            .filter(|id| self.before[1].is_partial(**id))
        {
            let reason = SkipReason::TooManyThreads { pid: id.pid };
            leave(&mut scan.targets, *id, reason, needs_canary);
        }
        let is_unread =
            |target: &Target| target.spin_risk == SpinRisk::Unreadable && needs_canary(target);
        for count in SOCKETS_PER_STEP {
            if !self.close_some(scan, count, is_unread, begin, control) {
                break;
            }
            spinning.extend(self.observe_and_spare(scan, control));
        }
        spinning
    }

    /// Closes some of the sockets of each owner that `may_go`, the oldest: `count`, and if no method acts on any of these, the next
    /// ones. The sockets of an owner of which none of [`SOCKETS_PER_TRY`] was closed are left. Returns whether there were any.
    fn close_some(
        &mut self,
        scan: &mut Scan,
        count: usize,
        may_go: impl Fn(&Target) -> bool,
        begin: &dyn Fn(&mut Scan, &[usize]),
        control: &dyn Control,
    ) -> bool {
        let is_untried = |target: &Target| may_go(target) && target.attempts.is_empty();
        let mut any = false;
        for at_once in SOCKETS_PER_TRY {
            let closed = self.closed.keys();
            let covered = closed.chain(&self.spinning).copied().collect();
            let chosen = choose(&scan.targets, covered, at_once.max(count), is_untried);
            if chosen.is_empty() || control.interrupted() {
                return any;
            }
            any = true;
            begin(scan, &chosen);
            self.note_closed(&scan.targets, chosen);
        }
        let refused = |id: &&ProcessId| !self.closed.contains_key(id);
        for id in self.owners.keys().filter(refused) {
            let reason = SkipReason::CanaryRefused { pid: id.pid };
            leave(&mut scan.targets, *id, reason, is_untried);
        }
        any
    }

    fn observe_and_spare(&mut self, scan: &mut Scan, control: &dyn Control) -> Vec<Spinning> {
        let spinning = self.observe(scan, control);
        for one in &spinning {
            spare(&mut scan.targets, one);
        }
        spinning
    }

    /// Takes the second reading before the close, later if a thread has not slept yet: on a busy machine it may only have waited for a
    /// processor.
    fn observe_before(&mut self, control: &dyn Control) {
        for looks in 1..=MAX_LOOKS_BEFORE_CLOSE {
            wait_since(self.before[0].at, TIME_BEFORE_CLOSE * looks, control);
            self.before[1] = Usage::of(&self.owners, self.proc, control);
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

    /// Observes the owners of the sockets that were closed after the canaries: a socket can be waited for in another way than the first
    /// of its owner. Returns those that spin.
    pub fn observe_the_rest(&mut self, scan: &Scan, control: &dyn Control) -> Vec<Spinning> {
        self.observe_closed(scan, control, |target| target.spin_risk.is_uncertain())
    }

    /// Observes the owners that would spin if a descriptor of a closed socket is still open. Returns those that spin.
    pub fn observe_paused(&mut self, scan: &Scan, control: &dyn Control) -> Vec<Spinning> {
        self.observe_closed(scan, control, |target| {
            target.spin_risk.would_spin().is_some()
        })
    }

    fn observe_closed(
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
        self.observe(scan, control)
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

    /// Observes the owners in `closed`. Returns those that spin, without those that did before.
    fn observe(&mut self, scan: &Scan, control: &dyn Control) -> Vec<Spinning> {
        let closed = std::mem::take(&mut self.closed);
        let mut suspects: BTreeMap<ProcessId, Arc<Process>> = closed
            .keys()
            .filter(|id| !self.spinning.contains(id))
            .map(|id| (*id, Arc::clone(&self.owners[id])))
            .collect();
        let first = Usage::of(&suspects, self.proc, control);
        // The threads that have been awake at every look, each with its share of a processor.
        let mut awake: BTreeMap<ProcessId, Vec<(i32, f64)>> = BTreeMap::new();
        let mut last = first.at;
        for look in 0..MAX_LOOKS_AFTER_CLOSE {
            // After Ctrl-C one look must do: cwkill has acted already.
            if suspects.is_empty() || (look > 0 && control.interrupted()) {
                break;
            }
            wait_until(last, LOOK_INTERVAL, control);
            let now = Usage::of(&suspects, self.proc, control);
            last = now.at;
            suspects.retain(|id, _| {
                let mut threads = begun_to_spin(&self.before, &first, &now, *id);
                let earlier = awake.remove(id).unwrap_or_default();
                let was_awake = |tid: i32| earlier.iter().any(|(other, _)| *other == tid);
                threads.retain(|(tid, _)| look == 0 || was_awake(*tid));
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
                tid: Some(tid).filter(|tid| *tid != ThreadUsage::ALL),
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
    let first = Usage::of(&owners, proc, control);
    wait_since(first.at, LOOK_INTERVAL, control);
    let second = Usage::of(&owners, proc, control);
    for one in spinning {
        let tid = one.tid.unwrap_or(ThreadUsage::ALL);
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

/// The indices of the next sockets to close: the `count` oldest of each owner that is not `covered`, among those that `may_go`.
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
        if may_go(target) {
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
    let reason = SkipReason::OwnerSpins {
        pid: id.pid,
        fd: spinning.fd,
    };
    leave(targets, id, reason, |target| {
        target.outcome.is_none() && target.plan.skip.is_none()
    });
}

/// Skips the sockets of owner `id` that `may_be_left`, except those on which a method has acted.
fn leave(
    targets: &mut [Target],
    id: ProcessId,
    reason: SkipReason,
    may_be_left: impl Fn(&Target) -> bool,
) {
    for target in targets {
        let is_owned = target.owners.iter().any(|owner| owner.process.id == id);
        if is_owned && may_be_left(target) && target.acted().is_none() {
            target.outcome = Some(Outcome::Skipped(reason));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::model::{MethodError, Owner, Plan, Socket};
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
        let is_untried = |target: &Target| needs_canary(target) && target.attempts.is_empty();
        let next = |targets: &[Target], covered, count| choose(targets, covered, count, is_untried);
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

    #[test]
    fn the_sockets_of_an_owner_with_too_many_threads_are_left_after_the_canary() {
        let mut targets: Vec<Target> = [&[7][..], &[7], &[8], &[8, 7], &[7]].map(target).into();
        targets[0].attempt(Method::Shutdown, None);
        targets[4].spin_risk = SpinRisk::Harmless;
        let reason = SkipReason::TooManyThreads { pid: 7 };
        leave(&mut targets, process(7, "app").id, reason, needs_canary);
        let left = Some(Outcome::Skipped(reason));
        let outcomes: Vec<_> = targets.iter().map(|target| target.outcome).collect();
        assert_eq!(outcomes, [None, left, None, left, None]);
    }

    /// A clock that moves only during pauses.
    struct Clock(Instant, Mutex<Duration>);

    impl Control for Clock {
        fn now(&self) -> Instant {
            self.0 + *self.1.lock().unwrap()
        }
        fn sleep(&self, duration: Duration) {
            *self.1.lock().unwrap() += duration;
        }
        fn interrupted(&self) -> bool {
            false
        }
        fn progress(&self, _: Method, _: usize) {}
    }

    /// Closes `count` sockets of process 7, except those for whose index `refused` is true. Returns the scan, and how many were closed
    /// in each step.
    fn close_in_steps(
        count: usize,
        risk: SpinRisk,
        refused: impl Fn(usize) -> bool,
    ) -> (Scan, Vec<usize>) {
        let new = |_| Target {
            spin_risk: risk,
            ..target(&[7])
        };
        let mut scan = Scan {
            targets: (0..count).map(new).collect(),
            ..Scan::default()
        };
        let proc = ProcFs::at("/nonexistent");
        let clock = Clock(Instant::now(), Mutex::default());
        let steps = Mutex::new(Vec::new());
        let begin = |scan: &mut Scan, chosen: &[usize]| {
            for &index in chosen {
                let error = refused(index).then_some(MethodError::DescriptorsGone);
                scan.targets[index].attempt(Method::Shutdown, error);
            }
            let closed = chosen.iter().filter(|&&index| !refused(index)).count();
            steps.lock().unwrap().push(closed);
        };
        let mut canaries = Canaries::new(&scan, &proc, &clock);
        canaries.close_in_steps(&mut scan, &begin, &clock);
        (scan, steps.into_inner().unwrap())
    }

    fn left(scan: &Scan) -> usize {
        let left = Some(Outcome::Skipped(SkipReason::CanaryRefused { pid: 7 }));
        let targets = scan.targets.iter();
        targets.filter(|target| target.outcome == left).count()
    }

    #[test]
    fn a_socket_that_is_refused_is_no_canary() {
        let (scan, closed) = close_in_steps(20, SpinRisk::Unknown, |index| index < 2);
        assert_eq!((closed, left(&scan)), (vec![0, 0, 1], 0));
        // The others are closed after that.
        assert!(scan.targets[3..].iter().all(|it| it.attempts.is_empty()));
    }

    #[test]
    fn without_a_canary_the_rest_is_left() {
        let tried: usize = SOCKETS_PER_TRY.iter().sum();
        let (scan, _) = close_in_steps(tried + 30, SpinRisk::Unknown, |index| index < tried);
        assert_eq!(left(&scan), 30);
        // Those that were refused keep their own reasons.
        assert!(scan.targets[..tried].iter().all(|it| it.outcome.is_none()));
        let (scan, _) = close_in_steps(tried + 30, SpinRisk::Unknown, |index| index + 1 < tried);
        assert_eq!(left(&scan), 0);
    }

    /// A step is larger than the one before only if that closed a socket.
    #[test]
    fn a_step_without_a_close_is_repeated() {
        let (scan, closed) = close_in_steps(100, SpinRisk::Unreadable, |_| false);
        assert_eq!((closed, left(&scan)), (vec![1, 4, 16, 64, 15], 0));
        let tried: usize = SOCKETS_PER_TRY.iter().map(|&count| count.max(4)).sum();
        let (scan, _) = close_in_steps(tried + 11, SpinRisk::Unreadable, |index| index > 0);
        assert_eq!(left(&scan), 10);
    }
}
