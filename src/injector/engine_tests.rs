//! The engine with a simulated kernel, in which sockets change while the engine runs.

use std::collections::{HashMap, HashSet};
use std::mem;
use std::sync::{Arc, Mutex};

use Method::{Destroy, Shutdown};

use super::world::*;
use super::*;
use crate::model::Plan;
use crate::sock_diag::testdata::stuck;

#[test]
fn the_first_method_that_works_is_the_one_reported() {
    let mut world = World::new(3).method(Shutdown, close).method(Destroy, close);
    world.run();
    for target in &world.targets {
        assert_eq!(target.outcome, closed(Shutdown));
        assert_eq!(target.attempts, [attempt(Shutdown, None)]);
    }
    assert!(world.clock.waited().is_zero(), "nothing to wait for");
}

#[test]
fn after_a_refused_method_the_next_is_tried() {
    let mut world = World::new(1)
        .method(Shutdown, |_, _| Err(DENIED))
        .method(Destroy, close);
    assert_eq!(world.outcome(), closed(Destroy));
    let attempts = [attempt(Shutdown, Some(DENIED)), attempt(Destroy, None)];
    assert_eq!(world.targets[0].attempts, attempts);
}

#[test]
fn a_silent_peer_costs_one_grace_for_all_together() {
    let mut world = World::new(200)
        .method(Shutdown, to_last_ack)
        .method(Destroy, close);
    world.run();
    assert_eq!(world.outcomes(), [closed(Destroy); 200]);
    assert_eq!(world.clock.waited(), Duration::from_secs(1));
}

#[test]
fn a_canary_is_acted_on_once_and_waits_with_the_others() {
    let refused_once = |kernel: &Kernel, cookie| match cookie {
        1 => Err(DENIED),
        _ => to_last_ack(kernel, cookie),
    };
    let mut world = World::new(2)
        .method(Shutdown, refused_once)
        .method(Destroy, close);
    world.begin();
    assert_eq!(world.outcomes(), [None; 2]);
    assert_eq!(world.acted_on(), [1, 2, 1]);
    assert!(world.clock.waited().is_zero());
    world.run();
    assert_eq!(world.outcomes(), [closed(Destroy); 2]);
    let refused = [attempt(Shutdown, Some(DENIED)), attempt(Destroy, None)];
    assert_eq!(world.targets[0].attempts, refused);
    // The second was in LAST-ACK until the grace was over.
    assert_eq!(world.acted_on(), [1, 2, 1, 2]);
    assert_eq!(world.clock.waited(), Duration::from_secs(1));
}

#[test]
fn a_grace_that_the_clock_cannot_represent_is_a_long_one() {
    let mut world = World::new(1).method(Destroy, close);
    world.grace = Duration::MAX;
    assert_eq!(world.outcome(), closed(Destroy));
}

#[test]
fn a_socket_that_closes_during_the_grace_ends_the_wait() {
    let mut world = World::new(1).method(Shutdown, to_last_ack);
    let kernel = world.kernel.clone();
    world.clock.meanwhile = Box::new(move || kernel.remove(1));
    assert_eq!(world.outcome(), closed(Shutdown));
    assert_eq!(world.clock.waited(), FIRST_PAUSE);
}

#[test]
fn without_a_next_method_it_is_closing() {
    let mut world = World::new(1).method(Shutdown, to_last_ack);
    let closing = Outcome::Closing(Shutdown, TcpState::LastAck);
    assert_eq!(world.outcome(), Some(closing));
}

#[test]
fn a_socket_that_changed_since_the_plan_is_never_acted_on() {
    // The socket closed without cwkill; a new connection may have its address pair by now.
    let mut world = World::new(1).method(Destroy, close);
    world.kernel.remove(1);
    assert_eq!(world.outcome(), Some(Outcome::Gone));
    assert!(world.acted_on().is_empty());

    // The application closed it.
    let mut world = World::new(1).method(Destroy, close);
    to_last_ack(&world.kernel, 1).unwrap();
    assert_eq!(world.outcome(), Some(Outcome::Gone));
    assert!(world.acted_on().is_empty());

    // Data moved, so the socket is younger than the minimum age, and in use.
    for is_by_age in [true, false] {
        let mut world = World::new(1).method(Destroy, close);
        let (limit, reason) = match is_by_age {
            true => (&mut world.selectors.min_age, SkipReason::NoLongerSelected),
            false => (&mut world.selectors.min_idle, SkipReason::InUse),
        };
        *limit = Duration::from_secs(60);
        world.kernel.change(1, send_data);
        assert_eq!(world.outcome(), skipped(reason));
        assert!(world.acted_on().is_empty());
    }

    // The application accepted it.
    let mut world = World::new(1).method(Destroy, close);
    world.targets[0].socket.inode = None;
    assert_eq!(world.outcome(), skipped(SkipReason::Accepted));
    assert!(world.acted_on().is_empty());
}

/// The application sends a byte, and the peer acknowledges it.
fn send_data(socket: &mut SocketMessage) {
    let quiet = socket.quiet.as_mut().unwrap();
    (quiet.last_ack_recv, quiet.last_data_sent) = (Duration::ZERO, Duration::ZERO);
    socket.counters.as_mut().unwrap().written += 1;
}

#[test]
fn an_answered_keepalive_changes_nothing() {
    let mut world = World::new(1)
        .method(Shutdown, |kernel, cookie| {
            kernel.change(cookie, |socket| {
                socket.quiet.as_mut().unwrap().last_ack_recv = Duration::ZERO;
            });
            Err(MethodError::PeerSilent)
        })
        .method(Destroy, close);
    world.selectors.min_age = Duration::from_secs(60);
    world.selectors.min_idle = Duration::from_secs(60);
    assert_eq!(world.outcome(), closed(Destroy));
}

#[test]
fn bytes_written_after_the_plan_are_not_lost() {
    let unsent = |socket: &mut SocketMessage| socket.send_q = 9;

    let mut world = World::new(1).method(Destroy, close);
    world.kernel.change(1, unsent);
    assert_eq!(world.outcome(), skipped(SkipReason::UnsentData(9)));
    assert!(world.acted_on().is_empty());

    let mut world = World::new(1).method(Destroy, close);
    world.discard_unsent = true;
    world.kernel.change(1, unsent);
    assert_eq!(world.outcome(), closed(Destroy));

    // After a shutdown that the peer does not answer, the FIN alone may be discarded, but data may not.
    let mut world = World::new(1)
        .method(Shutdown, |kernel, cookie| {
            to_last_ack(kernel, cookie)?;
            kernel.change(cookie, |socket| socket.send_q = 10);
            Ok(())
        })
        .method(Destroy, close);
    let closing = Outcome::Closing(Shutdown, TcpState::LastAck);
    assert_eq!(world.outcome(), Some(closing));
    assert_eq!(
        world.targets[0].attempts,
        [
            attempt(Shutdown, None),
            attempt(Destroy, Some(MethodError::UnsentData(9)))
        ]
    );
}

#[test]
fn an_order_the_kernel_took_but_did_not_carry_out_is_a_failure() {
    let mut world = World::new(1).method(Destroy, |_, _| Ok(()));
    assert_eq!(world.outcome(), Some(Outcome::Failed));
    assert_eq!(world.clock.waited(), Duration::from_secs(1));
}

#[test]
fn one_bad_socket_does_not_stop_the_others() {
    let mut world = World::new(130).method(Destroy, |kernel, cookie| match cookie {
        65 => Err(MethodError::SystemCall("x", Errno::EIO)),
        _ => close(kernel, cookie),
    });
    world.run();
    let mut expected = [closed(Destroy); 130];
    expected[64] = Some(Outcome::Failed);
    assert_eq!(world.outcomes(), expected);
}

#[test]
fn interrupted_sockets_are_left_alone_and_reported() {
    let mut world = World::new(2).method(Destroy, close);
    world.clock.interrupted = true;
    world.run();
    assert_eq!(world.outcomes(), [skipped(SkipReason::Interrupted); 2]);
    assert!(world.acted_on().is_empty());
}

#[test]
fn a_socket_that_the_plan_skips_is_not_acted_on() {
    let mut world = World::new(2).method(Destroy, close);
    let reasons = [SkipReason::NoMethod, SkipReason::OverMaxKills];
    for (target, reason) in world.targets.iter_mut().zip(reasons) {
        target.plan = Plan {
            skip: Some(reason),
            ..Plan::default()
        };
    }
    world.run();
    assert_eq!(world.outcomes(), reasons.map(skipped));
    assert!(world.acted_on().is_empty());
}

#[test]
fn a_target_that_has_an_outcome_keeps_it() {
    let mut world = World::new(2).method(Destroy, close);
    world.targets[0].outcome = Some(Outcome::Gone);
    world.run();
    assert_eq!(world.outcomes(), [Some(Outcome::Gone), closed(Destroy)]);
    assert_eq!(world.acted_on(), [2]);
}

#[test]
fn an_order_whose_answer_was_lost_closed_the_socket_if_it_is_gone() {
    let mut world = World::new(2).method(Destroy, |kernel, cookie| {
        if cookie == 1 {
            kernel.remove(1);
        }
        Err(LOST)
    });
    world.run();
    assert_eq!(world.outcomes(), [closed(Destroy), Some(Outcome::Failed)]);
}

/// A kernel that stops answering once an executor has acted.
struct Mute(Kernel, Arc<Mutex<Vec<u64>>>);

impl SocketTables for Mute {
    fn lookup(&mut self, ids: &[DiagId], detail: Detail) -> io::Result<Vec<Lookup>> {
        match self.1.lock().unwrap().is_empty() {
            true => self.0.lookup(ids, detail),
            false => Err(Errno::ENOBUFS.into()),
        }
    }

    fn list(&mut self, _: StateSet) -> io::Result<HashSet<Cookie>> {
        Err(Errno::ENOBUFS.into())
    }
}

/// A kernel on whose host the addresses of the first sockets are gone.
struct Moved(Kernel, HashSet<Place>);

impl SocketTables for Moved {
    fn lookup(&mut self, ids: &[DiagId], detail: Detail) -> io::Result<Vec<Lookup>> {
        self.0.lookup(ids, detail)
    }

    fn list(&mut self, states: StateSet) -> io::Result<HashSet<Cookie>> {
        self.0.list(states)
    }

    fn not_local(&mut self, places: &mut dyn Iterator<Item = Place>) -> HashSet<Place> {
        places.filter(|place| self.1.contains(place)).collect()
    }
}

#[test]
fn an_address_that_has_come_back_is_left_alone() {
    let mut world = World::new(2).method(Destroy, close);
    world.selectors.address_gone = true;
    let elsewhere = stuck("10.0.0.9:80", "10.0.0.2:5", 2);
    world.targets[1].socket = Socket::from_message(&elsewhere);
    let gone = HashSet::from([world.targets[0].socket.place()]);
    let mut kernel = Moved(world.kernel.clone(), gone);
    world.run_on(&[0, 1], &mut kernel);
    let back = Outcome::Skipped(SkipReason::NoLongerSelected);
    assert_eq!(
        world.outcomes(),
        [Some(Outcome::Closed(Destroy)), Some(back)]
    );
    assert_eq!(
        *world.acted_on.lock().unwrap(),
        [world.targets[0].socket.cookie().0]
    );
}

#[test]
fn every_socket_has_an_outcome_when_the_kernel_no_longer_answers() {
    let mut world = World::new(3).method(Destroy, close);
    world.grace = Duration::ZERO;
    let mut kernel = Mute(world.kernel.clone(), Arc::clone(&world.acted_on));
    world.run_on(&[0, 2], &mut kernel);
    let failed = Some(Outcome::Failed);
    assert_eq!(world.outcomes(), [failed, None, failed]);
    let error = MethodError::SystemCall("sock_diag lookup", Errno::ENOBUFS);
    for target in [&world.targets[0], &world.targets[2]] {
        assert_eq!(
            target.attempts,
            [
                attempt(Destroy, None),
                attempt(Destroy, Some(error.clone()))
            ]
        );
    }
    assert_eq!(world.acted_on(), [1, 3], "only the targets of the run");
}

/// A kernel that never answers.
struct Silent;

impl SocketTables for Silent {
    fn lookup(&mut self, _: &[DiagId], _: Detail) -> io::Result<Vec<Lookup>> {
        Err(Errno::ENOBUFS.into())
    }

    fn list(&mut self, _: StateSet) -> io::Result<HashSet<Cookie>> {
        Err(Errno::ENOBUFS.into())
    }
}

#[test]
fn a_socket_that_cannot_be_looked_up_is_not_acted_on() {
    let mut world = World::new(1).method(Shutdown, close).method(Destroy, close);
    world.run_on(&[0], &mut Silent);
    assert_eq!(world.outcomes(), [Some(Outcome::Failed)]);
    assert!(world.acted_on().is_empty());
    let error = MethodError::SystemCall("sock_diag lookup", Errno::ENOBUFS);
    // The lookup fails before each method and at the end. No method has acted, so the last error goes to the first method.
    let methods = [Shutdown, Destroy, Shutdown];
    let attempts = methods.map(|method| attempt(method, Some(error.clone())));
    assert_eq!(world.targets[0].attempts, attempts);
}

#[test]
fn after_an_answer_of_the_peer_no_other_method_is_tried() {
    let mut world = World::new(1)
        .method(Shutdown, |_, _| Err(MethodError::PeerAlive))
        .method(Destroy, close);
    assert_eq!(world.outcome(), skipped(SkipReason::PeerAlive));
    assert_eq!(world.acted_on(), [1]);
    let alive = Some(MethodError::PeerAlive);
    assert_eq!(world.targets[0].attempts, [attempt(Shutdown, alive)]);
}

#[test]
fn a_target_that_the_executor_did_not_reach_is_interrupted() {
    let mut world = World::new(1);
    world.executors.push(Box::new(Stopped));
    assert_eq!(world.outcome(), skipped(SkipReason::Interrupted));
    assert!(world.targets[0].attempts.is_empty());
}

#[test]
fn a_socket_that_a_late_rst_closes_is_closed_by_the_method() {
    let mut world = World::new(1).method(Shutdown, |kernel, cookie| {
        kernel.remove(cookie);
        Err(MethodError::RstIgnored)
    });
    assert_eq!(world.outcome(), closed(Shutdown));
}

#[test]
fn bytes_that_forbid_every_method_are_a_reason_to_skip() {
    let unsent = |_: &Kernel, _| Err(MethodError::UnsentData(7));
    let mut world = World::new(1)
        .method(Shutdown, unsent)
        .method(Destroy, unsent);
    assert_eq!(world.outcome(), skipped(SkipReason::UnsentData(7)));
}

#[test]
fn bytes_that_forbid_one_method_do_not_hide_the_failure_of_another() {
    let mut world = World::new(1)
        .method(Shutdown, |_, _| Err(DENIED))
        .method(Destroy, |_, _| Err(MethodError::UnsentData(7)));
    assert_eq!(world.outcome(), Some(Outcome::Failed));
}

/// A slow executor: the sockets change, then it rechecks its targets, then it closes those that are eligible.
struct Slow {
    kernel: Kernel,
    change: Box<dyn Fn(&Kernel)>,
    after_segment: bool,
    eligible: Arc<Mutex<Vec<u64>>>,
}

impl Executor for Slow {
    fn method(&self) -> Method {
        Destroy
    }

    fn batch_size(&self) -> usize {
        1000
    }

    fn act(&mut self, targets: Vec<&mut Target>, run: &mut MethodRun<'_>) {
        (self.change)(&self.kernel);
        for target in run.recheck(targets, self.after_segment) {
            let cookie = target.socket.cookie().0;
            self.eligible.lock().unwrap().push(cookie);
            target.record(Destroy, close(&self.kernel, cookie));
        }
    }
}

/// Runs a slow executor on five sockets, some of which `change` changes meanwhile. Returns the cookies of those that are still
/// eligible, and all outcomes.
fn change_at_work(
    after_segment: bool,
    change: impl Fn(&Kernel) + 'static,
) -> (Vec<u64>, Vec<Option<Outcome>>) {
    let mut world = World::new(5);
    let eligible = Arc::default();
    world.executors.push(Box::new(Slow {
        kernel: world.kernel.clone(),
        change: Box::new(change),
        after_segment,
        eligible: Arc::clone(&eligible),
    }));
    world.run();
    let eligible = mem::take(&mut *eligible.lock().unwrap());
    (eligible, world.outcomes())
}

#[test]
fn a_recheck_in_the_middle_of_an_act_counts() {
    let (eligible, outcomes) = change_at_work(false, |kernel| {
        kernel.remove(2);
        kernel.change(3, |socket| socket.state = TcpState::LastAck);
        kernel.change(4, |socket| socket.send_q = 9);
    });
    assert_eq!(eligible, [1, 5]);
    assert_eq!(
        outcomes,
        [
            closed(Destroy),
            Some(Outcome::Gone),
            Some(Outcome::Gone),
            skipped(SkipReason::UnsentData(9)),
            closed(Destroy)
        ]
    );
}

#[test]
fn a_socket_that_the_segment_of_an_executor_closes_is_closed_by_its_method() {
    let (eligible, outcomes) = change_at_work(true, |kernel| kernel.remove(2));
    assert_eq!(eligible, [1, 3, 4, 5]);
    assert_eq!(outcomes, [closed(Destroy); 5]);
}

#[test]
fn an_attempt_that_maybe_did_nothing_does_not_lift_the_checks() {
    // The connection becomes active while the first method waits without success.
    let mut world = World::new(1)
        .method(Shutdown, |kernel, cookie| {
            kernel.change(cookie, send_data);
            Err(MethodError::RstIgnored)
        })
        .method(Destroy, close);
    world.selectors.min_age = Duration::from_secs(60);
    assert_eq!(world.outcome(), skipped(SkipReason::NoLongerSelected));
    assert_eq!(world.acted_on(), [1], "not a second time");
}

#[test]
fn an_orphan_made_meanwhile_is_not_left_for_ever() {
    let run_on = |version| {
        let mut world = World::new(1)
            .method(Shutdown, |kernel, cookie| {
                to_last_ack(kernel, cookie)?;
                // The owner closes its descriptor.
                kernel.change(cookie, |socket| socket.inode = 0);
                Ok(())
            })
            .method(Destroy, close);
        world.grace = Duration::ZERO;
        world.discard_unsent = true;
        world.version = version;
        world.run();
        world.targets.remove(0)
    };
    let old = run_on(KernelVersion(6, 10));
    let closing = Outcome::Closing(Shutdown, TcpState::LastAck);
    assert_eq!(old.outcome, Some(closing));
    assert_eq!(
        old.attempts,
        [
            attempt(Shutdown, None),
            attempt(Destroy, Some(MethodError::OrphanOnOldKernel))
        ]
    );
    let new = run_on(KernelVersion::ABORTS_ORPHANS);
    assert_eq!(new.outcome, closed(Destroy));
}

#[test]
fn the_socket_is_closed_by_the_last_method_that_acted() {
    let mut world = World::new(1)
        .method(Destroy, |_, _| Err(MethodError::RstIgnored))
        .method(Shutdown, close);
    assert_eq!(world.outcome(), closed(Shutdown));
}

#[test]
fn a_connection_that_ended_in_time_wait_is_left_there() {
    // After the grace, before the next method.
    let mut world = World::new(1)
        .method(Shutdown, to_last_ack)
        .method(Destroy, close);
    let kernel = world.kernel.clone();
    world.clock.meanwhile =
        Box::new(move || kernel.change(1, |socket| socket.state = TcpState::TimeWait));
    assert_eq!(world.outcome(), closed(Shutdown));
    assert_eq!(world.acted_on(), [1], "not destroyed as well");
}

/// A kernel whose lists lack some sockets, and that counts the lookups of each.
struct Listing {
    kernel: Kernel,
    lacks: HashSet<Cookie>,
    fails: bool,
    lookups: HashMap<Cookie, usize>,
}

impl SocketTables for Listing {
    fn lookup(&mut self, ids: &[DiagId], detail: Detail) -> io::Result<Vec<Lookup>> {
        for id in ids {
            *self.lookups.entry(id.cookie()).or_default() += 1;
        }
        self.kernel.lookup(ids, detail)
    }

    fn list(&mut self, states: StateSet) -> io::Result<HashSet<Cookie>> {
        if self.fails {
            return Err(Errno::ENOBUFS.into());
        }
        let listed = self.kernel.list(states)?;
        Ok(listed.difference(&self.lacks).copied().collect())
    }
}

/// Destroys many sockets. Socket 7 stays although the kernel acknowledges the request, 8 stays without an acknowledgement, 9
/// closes without one, and 10 goes to LAST-ACK. Returns the outcomes, and the number of lookups of each socket.
fn destroy_many(fails: bool) -> (Vec<Option<Outcome>>, HashMap<Cookie, usize>) {
    let many = u64::try_from(LIST_FROM).unwrap();
    let mut world = World::new(many).method(Destroy, |kernel, cookie| match cookie {
        7 => Ok(()),
        8 => Err(LOST),
        9 => {
            kernel.remove(cookie);
            Err(LOST)
        }
        10 => to_last_ack(kernel, cookie),
        _ => close(kernel, cookie),
    });
    for target in &mut world.targets {
        target.plan.methods = vec![Destroy];
    }
    world.grace = Duration::ZERO;
    let mut kernel = Listing {
        kernel: world.kernel.clone(),
        lacks: HashSet::from([Cookie(8)]),
        fails,
        lookups: HashMap::new(),
    };
    let all: Vec<usize> = (0..world.targets.len()).collect();
    world.run_on(&all, &mut kernel);
    (world.outcomes(), kernel.lookups)
}

#[test]
fn a_list_confirms_many_destroyed_sockets_and_nothing_else() {
    for fails in [false, true] {
        let (outcomes, lookups) = destroy_many(fails);
        for (cookie, outcome) in (1..).zip(outcomes) {
            let expected = match cookie {
                7 | 8 => Some(Outcome::Failed),
                10 => Some(Outcome::Closing(Destroy, TcpState::LastAck)),
                _ => closed(Destroy),
            };
            assert_eq!(outcome, expected, "{cookie}");
            // Each is looked up once before the act. After it, only those that the list does not confirm are looked up.
            let confirmed = !fails && !(7..=10).contains(&cookie);
            assert_eq!(lookups[&Cookie(cookie)] == 1, confirmed, "{cookie}");
        }
    }
}
