//! The ladder against a kernel of our own, in which everything that can change meanwhile does.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};

use super::*;
use crate::sock_diag::testdata::stuck;

/// A table of sockets; methods and the ladder share it.
#[derive(Clone, Default)]
struct Kernel(Arc<Mutex<HashMap<Cookie, SocketMessage>>>);

impl Kernel {
    fn change(&self, cookie: u64, change: impl FnOnce(&mut SocketMessage)) {
        change(self.0.lock().unwrap().get_mut(&Cookie(cookie)).unwrap());
    }

    fn remove(&self, cookie: u64) {
        self.0.lock().unwrap().remove(&Cookie(cookie));
    }
}

impl Observe for Kernel {
    fn observe(&mut self, ids: &[DiagId], _: Detail) -> io::Result<Looks> {
        let table = self.0.lock().unwrap();
        let look = |id: &DiagId| table.get(&id.cookie()).cloned().ok_or(LookupError::Gone);
        Ok(ids.iter().map(look).collect())
    }

    fn list(&mut self, states: StateSet) -> io::Result<HashSet<Cookie>> {
        let table = self.0.lock().unwrap();
        let listed = table.iter().filter(|(_, m)| states.contains(m.state));
        Ok(listed.map(|(cookie, _)| *cookie).collect())
    }
}

type Deed = dyn Fn(&Kernel, u64) -> Result<(), ActError>;

/// A method that does what the test says and remembers on which cookies.
struct Scripted {
    name: MethodName,
    kernel: Kernel,
    deed: Box<Deed>,
    touched: Arc<Mutex<Vec<u64>>>,
}

impl Method for Scripted {
    fn name(&self) -> MethodName {
        self.name
    }

    fn act(&mut self, targets: &[Target], _: &mut dyn Scene) -> Vec<Result<(), ActError>> {
        let act = |target: &Target| {
            let cookie = target.id.cookie().0;
            self.touched.lock().unwrap().push(cookie);
            (self.deed)(&self.kernel, cookie)
        };
        targets.iter().map(act).collect()
    }
}

/// A clock that moves only when someone waits.
struct Clock {
    start: Instant,
    waited: Mutex<Duration>,
    interrupted: bool,
    /// What happens in the world during a pause.
    meanwhile: Box<dyn Fn() + Sync>,
}

impl Clock {
    fn waited(&self) -> Duration {
        *self.waited.lock().unwrap()
    }
}

impl Control for Clock {
    fn now(&self) -> Instant {
        self.start + self.waited()
    }
    fn sleep(&self, duration: Duration) {
        *self.waited.lock().unwrap() += duration;
        (self.meanwhile)();
    }
    fn interrupted(&self) -> bool {
        self.interrupted
    }
    fn progress(&self, _: MethodName, _: usize) {}
}

struct World {
    kernel: Kernel,
    found: Found,
    plans: Vec<Plan>,
    selectors: Selectors,
    methods: Vec<Box<dyn Method>>,
    touched: Arc<Mutex<Vec<u64>>>,
    clock: Clock,
    discard_unsent: bool,
}

impl World {
    /// Sockets with the cookies 1 to `count`, planned for both methods.
    fn new(count: u64) -> Self {
        let kernel = Kernel::default();
        let mut found = Found::default();
        for cookie in 1..=count {
            let message = stuck("10.0.0.1:80", "10.0.0.2:5", cookie);
            found.sockets.push(Socket::from_message(&message));
            kernel.0.lock().unwrap().insert(Cookie(cookie), message);
        }
        let plan = Plan {
            methods: vec![Shutdown, Destroy],
            excluded: Vec::new(),
            over_limit: false,
        };
        World {
            kernel,
            plans: vec![plan; found.sockets.len()],
            found,
            selectors: Selectors::default(),
            methods: Vec::new(),
            touched: Arc::default(),
            clock: Clock {
                start: Instant::now(),
                waited: Mutex::default(),
                interrupted: false,
                meanwhile: Box::new(|| {}),
            },
            discard_unsent: false,
        }
    }

    fn method(
        mut self,
        name: MethodName,
        deed: impl Fn(&Kernel, u64) -> Result<(), ActError> + 'static,
    ) -> Self {
        self.methods.push(Box::new(Scripted {
            name,
            kernel: self.kernel.clone(),
            deed: Box::new(deed),
            touched: Arc::clone(&self.touched),
        }));
        self
    }

    fn climb(&mut self) -> Vec<Outcome> {
        let rules = Rules {
            grace: Duration::from_secs(1),
            discard_unsent: self.discard_unsent,
            selectors: &self.selectors,
            kernel: KernelVersion::ABORTS_ORPHANS,
        };
        let members: Vec<usize> = (0..self.found.sockets.len()).collect();
        climb(
            &self.found,
            &self.plans,
            &members,
            &mut self.methods,
            &mut self.kernel.clone(),
            rules,
            &self.clock,
        )
    }

    fn verdict(&mut self) -> Verdict {
        self.climb().remove(0).verdict
    }
}

fn close(kernel: &Kernel, cookie: u64) -> Result<(), ActError> {
    kernel.remove(cookie);
    Ok(())
}

fn to_last_ack(kernel: &Kernel, cookie: u64) -> Result<(), ActError> {
    kernel.change(cookie, |socket| {
        socket.state = TcpState::LastAck;
        socket.send_q = 1;
    });
    Ok(())
}

fn denied(_: &Kernel, _: u64) -> Result<(), ActError> {
    let error = io::Error::from_raw_os_error(libc::EPERM);
    Err(ActError::Denied(
        crate::privileges::Privilege::Ptrace,
        error,
    ))
}

use MethodName::{Destroy, Shutdown};

#[test]
fn the_first_method_that_works_is_the_one_reported() {
    let mut world = World::new(3).method(Shutdown, close).method(Destroy, close);
    for outcome in world.climb() {
        assert!(matches!(outcome.verdict, Verdict::Closed(Shutdown)));
        assert_eq!(outcome.attempts.len(), 1);
    }
    assert!(world.clock.waited().is_zero(), "nothing to wait for");
}

#[test]
fn a_refused_method_hands_over_to_the_next() {
    let mut world = World::new(1)
        .method(Shutdown, denied)
        .method(Destroy, close);
    let outcome = world.climb().remove(0);
    assert!(matches!(outcome.verdict, Verdict::Closed(Destroy)));
    assert_eq!(
        outcome.attempts[0].error.as_ref().unwrap().errno(),
        Some(libc::EPERM)
    );
    assert!(outcome.attempts[1].error.is_none());
}

#[test]
fn a_silent_peer_costs_one_grace_for_all_together() {
    let mut world = World::new(200)
        .method(Shutdown, to_last_ack)
        .method(Destroy, close);
    assert!(
        world
            .climb()
            .iter()
            .all(|outcome| matches!(outcome.verdict, Verdict::Closed(Destroy)))
    );
    assert_eq!(world.clock.waited(), Duration::from_secs(1));
}

#[test]
fn a_socket_that_closes_during_the_grace_ends_the_wait() {
    let mut world = World::new(1).method(Shutdown, to_last_ack);
    let kernel = world.kernel.clone();
    world.clock.meanwhile = Box::new(move || kernel.remove(1));
    assert!(matches!(world.verdict(), Verdict::Closed(Shutdown)));
    assert_eq!(world.clock.waited(), FIRST_PAUSE);
}

#[test]
fn without_a_next_method_it_is_closing() {
    let mut world = World::new(1).method(Shutdown, to_last_ack);
    assert!(matches!(
        world.verdict(),
        Verdict::Closing(Shutdown, TcpState::LastAck)
    ));
}

#[test]
fn what_changed_since_the_plan_is_never_touched() {
    // It closed on its own; its address pair may belong to a new connection by now.
    let mut world = World::new(1).method(Destroy, close);
    world.kernel.remove(1);
    assert!(matches!(world.verdict(), Verdict::Gone));
    assert!(world.touched.lock().unwrap().is_empty());

    // The application closed it.
    let mut world = World::new(1).method(Destroy, close);
    to_last_ack(&world.kernel, 1).unwrap();
    assert!(matches!(world.verdict(), Verdict::Gone));
    assert!(world.touched.lock().unwrap().is_empty());

    // A segment arrived: it is younger than asked for.
    let mut world = World::new(1).method(Destroy, close);
    world.selectors.min_age = Duration::from_secs(60);
    world.kernel.change(1, |socket| {
        socket.quiet.as_mut().unwrap().last_ack_recv = Duration::ZERO;
    });
    assert!(matches!(
        world.verdict(),
        Verdict::Skipped(Skip::NoLongerSelected)
    ));
    assert!(world.touched.lock().unwrap().is_empty());

    // The application accepted it.
    let mut world = World::new(1).method(Destroy, close);
    world.found.sockets[0].inode = None;
    assert!(matches!(world.verdict(), Verdict::Skipped(Skip::Accepted)));
    assert!(world.touched.lock().unwrap().is_empty());
}

#[test]
fn bytes_written_after_the_plan_are_not_lost() {
    let unsent = |socket: &mut SocketMessage| socket.send_q = 9;

    let mut world = World::new(1).method(Destroy, close);
    world.kernel.change(1, unsent);
    assert!(matches!(world.verdict(), Verdict::Skipped(Skip::Unsent(9))));
    assert!(world.touched.lock().unwrap().is_empty());

    let mut world = World::new(1).method(Destroy, close);
    world.discard_unsent = true;
    world.kernel.change(1, unsent);
    assert!(matches!(world.verdict(), Verdict::Closed(Destroy)));

    // Behind a shutdown that the peer does not answer: the FIN alone may be dropped, data may not.
    let mut world = World::new(1)
        .method(Shutdown, |kernel, cookie| {
            to_last_ack(kernel, cookie)?;
            kernel.change(cookie, |socket| socket.send_q = 10);
            Ok(())
        })
        .method(Destroy, close);
    let outcome = world.climb().remove(0);
    assert!(matches!(
        outcome.verdict,
        Verdict::Closing(Shutdown, TcpState::LastAck)
    ));
    assert!(matches!(
        outcome.attempts[1].error,
        Some(ActError::Unsent(9))
    ));
}

#[test]
fn an_order_the_kernel_took_but_did_not_carry_out_is_a_failure() {
    let mut world = World::new(1).method(Destroy, |_, _| Ok(()));
    assert!(matches!(world.verdict(), Verdict::Failed));
    assert_eq!(world.clock.waited(), Duration::from_secs(1));
}

#[test]
fn one_bad_socket_does_not_stop_the_others() {
    let mut world = World::new(130).method(Destroy, |kernel, cookie| match cookie {
        65 => Err(ActError::Os("x", io::Error::from_raw_os_error(libc::EIO))),
        _ => close(kernel, cookie),
    });
    let outcomes = world.climb();
    let failed = |outcome: &&Outcome| matches!(outcome.verdict, Verdict::Failed);
    assert_eq!(outcomes.iter().filter(failed).count(), 1);
    assert!(matches!(outcomes[64].verdict, Verdict::Failed));
}

#[test]
fn interrupted_sockets_are_left_and_said_so() {
    let mut world = World::new(2).method(Destroy, close);
    world.clock.interrupted = true;
    assert!(matches!(
        world.verdict(),
        Verdict::Skipped(Skip::Interrupted)
    ));
    assert!(world.touched.lock().unwrap().is_empty());
}

#[test]
fn a_plan_without_methods_touches_nothing() {
    let mut world = World::new(2).method(Destroy, close);
    world.plans[0].methods.clear();
    world.plans[1].over_limit = true;
    world.plans[1].methods.clear();
    let outcomes = world.climb();
    assert!(matches!(
        outcomes[0].verdict,
        Verdict::Skipped(Skip::NoMethod(_))
    ));
    assert!(matches!(
        outcomes[1].verdict,
        Verdict::Skipped(Skip::OverLimit)
    ));
    assert!(world.touched.lock().unwrap().is_empty());
}

#[test]
fn an_order_whose_answer_was_lost_is_ours_all_the_same() {
    let mut world = World::new(2).method(Destroy, |kernel, cookie| {
        if cookie == 1 {
            kernel.remove(1);
        }
        let error = io::Error::from_raw_os_error(libc::ENOBUFS);
        Err(ActError::Unanswered(error))
    });
    let outcomes = world.climb();
    assert!(matches!(outcomes[0].verdict, Verdict::Closed(Destroy)));
    assert!(matches!(outcomes[1].verdict, Verdict::Failed));
}

/// A kernel that stops answering once something was done.
struct Mute(Kernel, Arc<Mutex<Vec<u64>>>);

impl Observe for Mute {
    fn observe(&mut self, ids: &[DiagId], detail: Detail) -> io::Result<Looks> {
        match self.1.lock().unwrap().is_empty() {
            true => self.0.observe(ids, detail),
            false => Err(io::Error::from_raw_os_error(libc::ENOBUFS)),
        }
    }

    fn list(&mut self, _: StateSet) -> io::Result<HashSet<Cookie>> {
        Err(io::Error::from_raw_os_error(libc::ENOBUFS))
    }
}

#[test]
fn every_socket_has_an_outcome_when_the_kernel_cannot_be_asked_any_more() {
    let mut world = World::new(3).method(Destroy, close);
    let rules = Rules {
        grace: Duration::ZERO,
        discard_unsent: false,
        selectors: &world.selectors,
        kernel: KernelVersion::ABORTS_ORPHANS,
    };
    let mut kernel = Mute(world.kernel.clone(), Arc::clone(&world.touched));
    let outcomes = climb(
        &world.found,
        &world.plans,
        &[0, 2],
        &mut world.methods,
        &mut kernel,
        rules,
        &world.clock,
    );
    assert_eq!(outcomes.len(), 2);
    for outcome in outcomes {
        assert!(matches!(outcome.verdict, Verdict::Failed));
        let last = outcome.attempts.last().unwrap().error.as_ref().unwrap();
        assert!(last.to_string().contains("lookup"), "{last}");
    }
    assert_eq!(*world.touched.lock().unwrap(), [1, 3], "only the members");
}

#[test]
fn an_alive_peer_ends_the_ladder() {
    let mut world = World::new(1)
        .method(Shutdown, |_, _| Err(ActError::PeerAlive))
        .method(Destroy, close);
    assert!(matches!(world.verdict(), Verdict::Skipped(Skip::PeerAlive)));
    assert_eq!(*world.touched.lock().unwrap(), [1]);
}

#[test]
fn what_a_method_did_not_get_to_is_interrupted() {
    let mut world = World::new(1).method(Shutdown, |_, _| Err(ActError::Interrupted));
    assert!(matches!(
        world.verdict(),
        Verdict::Skipped(Skip::Interrupted)
    ));
}

#[test]
fn a_late_reset_is_still_by_the_method() {
    let mut world = World::new(1).method(Shutdown, |kernel, cookie| {
        kernel.remove(cookie);
        Err(ActError::RstIgnored)
    });
    assert!(matches!(world.verdict(), Verdict::Closed(Shutdown)));
}

#[test]
fn bytes_that_forbid_every_method_are_a_reason_to_skip() {
    let unsent = |_: &Kernel, _| Err(ActError::Unsent(7));
    let mut world = World::new(1)
        .method(Shutdown, unsent)
        .method(Destroy, unsent);
    assert!(matches!(world.verdict(), Verdict::Skipped(Skip::Unsent(7))));
}

/// A method that takes its time: the world changes, then it looks again, then it closes what fits.
struct Slow {
    kernel: Kernel,
    change: Box<dyn Fn(&Kernel) + Send>,
    provoked: bool,
    fit: Arc<Mutex<Vec<bool>>>,
}

impl Method for Slow {
    fn name(&self) -> MethodName {
        Destroy
    }

    fn batch(&self) -> usize {
        1000
    }

    fn act(&mut self, targets: &[Target], scene: &mut dyn Scene) -> Vec<Result<(), ActError>> {
        (self.change)(&self.kernel);
        let all: Vec<usize> = (0..targets.len()).collect();
        let fit = scene.still_fit(&all, self.provoked);
        for (target, fit) in targets.iter().zip(&fit) {
            if *fit {
                self.kernel.remove(target.id.cookie().0);
            }
        }
        *self.fit.lock().unwrap() = fit;
        targets.iter().map(|_| Ok(())).collect()
    }
}

/// The verdicts on five sockets of which `change` changes some while the method is at work.
fn while_at_work(
    provoked: bool,
    change: impl Fn(&Kernel) + Send + 'static,
) -> (Vec<bool>, Vec<Verdict>) {
    let mut world = World::new(5);
    let fit = Arc::default();
    world.methods.push(Box::new(Slow {
        kernel: world.kernel.clone(),
        change: Box::new(change),
        provoked,
        fit: Arc::clone(&fit),
    }));
    let outcomes = world.climb();
    let verdicts = outcomes.into_iter().map(|outcome| outcome.verdict);
    (
        std::mem::take(&mut *fit.lock().unwrap()),
        verdicts.collect(),
    )
}

#[test]
fn the_look_in_the_middle_of_an_act_counts() {
    let (fit, verdicts) = while_at_work(false, |kernel| {
        kernel.remove(2);
        kernel.change(3, |socket| socket.state = TcpState::LastAck);
        kernel.change(4, |socket| socket.send_q = 9);
    });
    assert_eq!(fit, [true, false, false, false, true]);
    assert!(matches!(
        verdicts[..],
        [
            Verdict::Closed(Destroy),
            Verdict::Gone,
            Verdict::Gone,
            Verdict::Skipped(Skip::Unsent(9)),
            Verdict::Closed(Destroy)
        ]
    ));
}

#[test]
fn what_a_question_has_closed_is_closed_by_the_method() {
    let (fit, verdicts) = while_at_work(true, |kernel| kernel.remove(2));
    assert_eq!(fit, [true, false, true, true, true]);
    assert!(
        verdicts
            .iter()
            .all(|v| matches!(v, Verdict::Closed(Destroy)))
    );
}

#[test]
fn what_perhaps_did_nothing_does_not_lift_the_checks() {
    // The connection comes to life while the first method waits in vain.
    let mut world = World::new(1)
        .method(Shutdown, |kernel, cookie| {
            kernel.change(cookie, |socket| {
                socket.quiet.as_mut().unwrap().last_ack_recv = Duration::ZERO;
            });
            Err(ActError::RstIgnored)
        })
        .method(Destroy, close);
    world.selectors.min_age = Duration::from_secs(60);
    assert!(matches!(
        world.verdict(),
        Verdict::Skipped(Skip::NoLongerSelected)
    ));
    assert_eq!(*world.touched.lock().unwrap(), [1], "not a second time");
}

#[test]
fn an_orphan_made_meanwhile_is_not_left_for_ever() {
    let climb_on = |kernel| {
        let mut world = World::new(1)
            .method(Shutdown, |kernel, cookie| {
                to_last_ack(kernel, cookie)?;
                // And the owner closes its descriptor.
                kernel.change(cookie, |socket| socket.inode = 0);
                Ok(())
            })
            .method(Destroy, close);
        let rules = Rules {
            grace: Duration::ZERO,
            discard_unsent: true,
            selectors: &world.selectors,
            kernel,
        };
        let mut table = world.kernel.clone();
        climb(
            &world.found,
            &world.plans,
            &[0],
            &mut world.methods,
            &mut table,
            rules,
            &world.clock,
        )
        .remove(0)
    };
    let old = climb_on(KernelVersion(6, 10));
    assert!(matches!(old.verdict, Verdict::Closing(Shutdown, _)));
    assert!(matches!(old.attempts[1].error, Some(ActError::Orphan)));
    let new = climb_on(KernelVersion::ABORTS_ORPHANS);
    assert!(matches!(new.verdict, Verdict::Closed(Destroy)));
}

#[test]
fn the_credit_goes_to_the_method_that_worked() {
    let mut world = World::new(1)
        .method(Destroy, |_, _| Err(ActError::RstIgnored))
        .method(Shutdown, close);
    assert!(matches!(world.verdict(), Verdict::Closed(Shutdown)));
}

#[test]
fn a_connection_that_ended_in_time_wait_is_left_there() {
    // After the grace, before the next method.
    let mut world = World::new(1)
        .method(Shutdown, to_last_ack)
        .method(Destroy, close);
    let (kernel, waits) = (world.kernel.clone(), Mutex::new(0));
    world.clock.meanwhile = Box::new(move || {
        *waits.lock().unwrap() += 1;
        kernel.change(1, |socket| socket.state = TcpState::TimeWait);
    });
    assert!(matches!(world.verdict(), Verdict::Closed(Shutdown)));
    assert_eq!(*world.touched.lock().unwrap(), [1], "not destroyed as well");
}

/// A kernel whose lists lack some sockets, and that counts what it is asked one by one.
struct Listing {
    kernel: Kernel,
    lacks: HashSet<Cookie>,
    fails: bool,
    asked: HashMap<Cookie, usize>,
}

impl Observe for Listing {
    fn observe(&mut self, ids: &[DiagId], detail: Detail) -> io::Result<Looks> {
        for id in ids {
            *self.asked.entry(id.cookie()).or_default() += 1;
        }
        self.kernel.observe(ids, detail)
    }

    fn list(&mut self, states: StateSet) -> io::Result<HashSet<Cookie>> {
        if self.fails {
            return Err(io::Error::from_raw_os_error(libc::ENOBUFS));
        }
        let listed = self.kernel.list(states)?;
        Ok(listed.difference(&self.lacks).copied().collect())
    }
}

/// Destroys many sockets, of which 7 stays although it is acknowledged, 8 stays and has no acknowledgement, 9
/// closes without one, and 10 goes to LAST-ACK.
fn destroy_many(fails: bool) -> (Vec<Outcome>, HashMap<Cookie, usize>) {
    let many = u64::try_from(MANY).unwrap();
    let unanswered = || {
        let lost = io::Error::from_raw_os_error(libc::ENOBUFS);
        Err(ActError::Unanswered(lost))
    };
    let mut world = World::new(many).method(Destroy, move |kernel, cookie| match cookie {
        7 => Ok(()),
        8 => unanswered(),
        9 => {
            kernel.remove(cookie);
            unanswered()
        }
        10 => to_last_ack(kernel, cookie),
        _ => close(kernel, cookie),
    });
    for plan in &mut world.plans {
        plan.methods = vec![Destroy];
    }
    let rules = Rules {
        grace: Duration::ZERO,
        discard_unsent: false,
        selectors: &world.selectors,
        kernel: KernelVersion::ABORTS_ORPHANS,
    };
    let mut kernel = Listing {
        kernel: world.kernel.clone(),
        lacks: HashSet::from([Cookie(8)]),
        fails,
        asked: HashMap::new(),
    };
    let members: Vec<usize> = (0..world.found.sockets.len()).collect();
    let outcomes = climb(
        &world.found,
        &world.plans,
        &members,
        &mut world.methods,
        &mut kernel,
        rules,
        &world.clock,
    );
    (outcomes, kernel.asked)
}

#[test]
fn a_list_confirms_many_destroyed_sockets_and_nothing_else() {
    for fails in [false, true] {
        let (outcomes, asked) = destroy_many(fails);
        for (cookie, outcome) in (1..).zip(outcomes) {
            let right = match (cookie, outcome.verdict) {
                (7 | 8, verdict) => matches!(verdict, Verdict::Failed),
                (10, verdict) => matches!(verdict, Verdict::Closing(Destroy, TcpState::LastAck)),
                (_, verdict) => matches!(verdict, Verdict::Closed(Destroy)),
            };
            assert!(right, "{cookie}");
            // Once before the act; after it only what the list does not confirm.
            let confirmed = !fails && !(7..=10).contains(&cookie);
            assert_eq!(asked[&Cookie(cookie)] == 1, confirmed, "{cookie}");
        }
    }
}
