//! A simulated kernel with sockets, executors and a clock, for the tests of the engine.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use Method::{Destroy, Shutdown};

use super::*;
use crate::model::Privilege;
use crate::sock_diag::testdata::stuck;

/// A table of sockets, shared by the executors and the engine.
#[derive(Clone, Default)]
pub(super) struct Kernel(pub(super) Arc<Mutex<HashMap<Cookie, SocketMessage>>>);

impl Kernel {
    pub(super) fn change(&self, cookie: u64, change: impl FnOnce(&mut SocketMessage)) {
        change(self.0.lock().unwrap().get_mut(&Cookie(cookie)).unwrap());
    }

    pub(super) fn remove(&self, cookie: u64) {
        self.0.lock().unwrap().remove(&Cookie(cookie));
    }
}

impl SocketTables for Kernel {
    fn lookup(&mut self, ids: &[DiagId], _: Detail) -> io::Result<Vec<Lookup>> {
        let table = self.0.lock().unwrap();
        let lookup = |id: &DiagId| {
            table
                .get(&id.cookie())
                .cloned()
                .ok_or(LookupError::NotFound)
        };
        Ok(ids.iter().map(lookup).collect())
    }

    fn list(&mut self, states: StateSet) -> io::Result<HashSet<Cookie>> {
        let table = self.0.lock().unwrap();
        let listed = table.iter().filter(|(_, m)| states.contains(m.state));
        Ok(listed.map(|(cookie, _)| *cookie).collect())
    }
}

pub(super) type Effect = dyn Fn(&Kernel, u64) -> Result<(), MethodError>;

/// An executor with the effect that a test defines. It records the cookies of the sockets on which it acts.
pub(super) struct Scripted {
    pub(super) method: Method,
    pub(super) kernel: Kernel,
    pub(super) effect: Box<Effect>,
    pub(super) acted_on: Arc<Mutex<Vec<u64>>>,
}

impl Executor for Scripted {
    fn method(&self) -> Method {
        self.method
    }

    fn act(&mut self, targets: Vec<&mut Target>, _: &mut MethodRun<'_>) {
        for target in targets {
            let cookie = target.socket.cookie().0;
            self.acted_on.lock().unwrap().push(cookie);
            target.record(self.method, (self.effect)(&self.kernel, cookie));
        }
    }
}

/// An executor that is stopped before it reaches its first target.
pub(super) struct Stopped;

impl Executor for Stopped {
    fn method(&self) -> Method {
        Shutdown
    }

    fn act(&mut self, _: Vec<&mut Target>, _: &mut MethodRun<'_>) {}
}

/// A clock that moves only during pauses.
pub(super) struct Clock {
    pub(super) start: Instant,
    pub(super) waited: Mutex<Duration>,
    pub(super) interrupted: bool,
    /// Called during each pause.
    pub(super) meanwhile: Box<dyn Fn() + Sync>,
}

impl Clock {
    pub(super) fn waited(&self) -> Duration {
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
    fn progress(&self, _: Method, _: usize) {}
}

pub(super) struct World {
    pub(super) kernel: Kernel,
    pub(super) targets: Vec<Target>,
    pub(super) executors: Vec<Box<dyn Executor>>,
    pub(super) acted_on: Arc<Mutex<Vec<u64>>>,
    pub(super) clock: Clock,
    pub(super) selectors: Selectors,
    pub(super) grace: Duration,
    pub(super) discard_unsent: bool,
    pub(super) version: KernelVersion,
}

impl World {
    /// Sockets with the cookies 1 to `count`, planned for both methods.
    pub(super) fn new(count: u64) -> Self {
        let kernel = Kernel::default();
        let target = |cookie| {
            let message = stuck("10.0.0.1:80", "10.0.0.2:5", cookie);
            let mut target = Target::new(Socket::from_message(&message));
            target.plan.methods = vec![Shutdown, Destroy];
            kernel.0.lock().unwrap().insert(Cookie(cookie), message);
            target
        };
        World {
            targets: (1..=count).map(target).collect(),
            kernel,
            executors: Vec::new(),
            acted_on: Arc::default(),
            clock: Clock {
                start: Instant::now(),
                waited: Mutex::default(),
                interrupted: false,
                meanwhile: Box::new(|| {}),
            },
            selectors: Selectors::default(),
            grace: Duration::from_secs(1),
            discard_unsent: false,
            version: KernelVersion::ABORTS_ORPHANS,
        }
    }

    pub(super) fn method(
        mut self,
        method: Method,
        effect: impl Fn(&Kernel, u64) -> Result<(), MethodError> + 'static,
    ) -> Self {
        self.executors.push(Box::new(Scripted {
            method,
            kernel: self.kernel.clone(),
            effect: Box::new(effect),
            acted_on: Arc::clone(&self.acted_on),
        }));
        self
    }

    /// Runs the engine on all targets.
    pub(super) fn run(&mut self) {
        let mut kernel = self.kernel.clone();
        let all: Vec<usize> = (0..self.targets.len()).collect();
        self.run_on(&all, &mut kernel);
    }

    /// Runs the engine on the targets with these indices.
    pub(super) fn run_on(&mut self, indices: &[usize], kernel: &mut dyn SocketTables) {
        let rules = Rules {
            grace: self.grace,
            discard_unsent: self.discard_unsent,
            selectors: &self.selectors,
            kernel_version: self.version,
            destroyer: None,
        };
        let targets = self.targets.iter_mut().enumerate();
        let mut targets: Vec<&mut Target> = targets
            .filter(|(index, _)| indices.contains(index))
            .map(|(_, target)| target)
            .collect();
        run(
            &mut targets,
            &mut self.executors,
            kernel,
            rules,
            &self.clock,
        );
    }

    /// Uses the methods up to the first that acts, on all targets.
    pub(super) fn begin(&mut self) {
        let mut kernel = self.kernel.clone();
        let rules = Rules {
            grace: self.grace,
            discard_unsent: self.discard_unsent,
            selectors: &self.selectors,
            kernel_version: self.version,
            destroyer: None,
        };
        let mut targets: Vec<&mut Target> = self.targets.iter_mut().collect();
        let executors = &mut self.executors;
        begin(&mut targets, executors, &mut kernel, rules, &self.clock);
    }

    /// Runs the engine and returns the outcome of the first target.
    pub(super) fn outcome(&mut self) -> Option<Outcome> {
        self.run();
        self.targets[0].outcome
    }

    pub(super) fn outcomes(&self) -> Vec<Option<Outcome>> {
        self.targets.iter().map(|target| target.outcome).collect()
    }

    /// The cookies of the sockets on which an executor acted, in order.
    pub(super) fn acted_on(&self) -> Vec<u64> {
        self.acted_on.lock().unwrap().clone()
    }
}

pub(super) fn attempt(method: Method, error: Option<MethodError>) -> Attempt {
    Attempt {
        method,
        error,
        at_one_instant: false,
    }
}

pub(super) fn skipped(reason: SkipReason) -> Option<Outcome> {
    Some(Outcome::Skipped(reason))
}

pub(super) fn closed(method: Method) -> Option<Outcome> {
    Some(Outcome::Closed(method))
}

pub(super) fn close(kernel: &Kernel, cookie: u64) -> Result<(), MethodError> {
    kernel.remove(cookie);
    Ok(())
}

pub(super) fn to_last_ack(kernel: &Kernel, cookie: u64) -> Result<(), MethodError> {
    kernel.change(cookie, |socket| {
        socket.state = TcpState::LastAck;
        socket.send_q = 1;
    });
    Ok(())
}

pub(super) const DENIED: MethodError = MethodError::NotPermitted(Privilege::Ptrace, Errno::EPERM);
pub(super) const LOST: MethodError = MethodError::AnswerLost(Errno::ENOBUFS);
