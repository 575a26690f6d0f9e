//! The two processes of a run, seen from the one that starts them.

use std::io::{self, BufReader, Write as _};
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::wire::Loss;
use super::{WorkerRole, client, server};
use crate::host::Host;
use crate::role::{Become, Group, Identity, raise_descriptor_limit};
use crate::spawner;

/// How long a process may take to be ready.
const START_DEADLINE: Duration = Duration::from_secs(30);

/// What a process says on its stdout, one JSON line each.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Event<T> {
    /// It is in place.
    Ready,
    /// A bystander was lost.
    Lost(Loss),
    /// All is over; its figures.
    Done(T),
}

/// Says events, from any thread of the process.
pub(super) struct EventSender<T> {
    out: Mutex<io::Stdout>,
    figures: std::marker::PhantomData<fn(T)>,
}

impl<T> Default for EventSender<T> {
    fn default() -> Self {
        Self {
            out: Mutex::new(io::stdout()),
            figures: std::marker::PhantomData,
        }
    }
}

impl<T: Serialize> EventSender<T> {
    pub fn send(&self, event: &Event<T>) {
        let mut line = serde_json::to_vec(event).expect("events are plain data");
        line.push(b'\n');
        let mut out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        // Nobody listens any more: then the end is near.
        let _ = out.write_all(&line).and_then(|()| out.flush());
    }
}

/// What a process of a run does.
pub(crate) fn run_worker(role: &WorkerRole) -> Result<()> {
    raise_descriptor_limit()?;
    match role {
        WorkerRole::Server(config) => server::run(config),
        WorkerRole::Clients(config) => client::run(config),
    }
}

/// A process of a run. Killed when dropped.
pub(super) struct Worker<T> {
    name: &'static str,
    child: Child,
    /// Its end is what the process takes for the end of the run.
    stdin: Option<ChildStdin>,
    events: Receiver<Event<T>>,
    /// What it has lost so far.
    losses: Vec<Loss>,
}

impl<T: DeserializeOwned + Send + 'static> Worker<T> {
    /// Starts it and waits until it is in place.
    pub fn start(host: &Host, name: &'static str, role: WorkerRole) -> Result<Self> {
        let mut command = host
            .role(Identity::default(), Group::Own, Become::Chaos { role })
            .command()?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = spawner::spawn(command).with_context(|| format!("start the {name}"))?;
        let stdin = child.stdin.take();
        let stdout = BufReader::new(child.stdout.take().context("no stdout")?);
        let (sender, events) = channel();
        thread::spawn(move || forward(stdout, &sender));
        let mut worker = Self {
            name,
            child,
            stdin,
            events,
            losses: Vec::new(),
        };
        match worker.next(Instant::now() + START_DEADLINE)? {
            Event::Ready => Ok(worker),
            _ => bail!("the {name} is out of order"),
        }
    }

    /// The process still runs.
    pub fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Tells it that the run is over, and waits for its figures.
    pub fn finish(mut self, deadline: Duration) -> Result<(Vec<Loss>, T)> {
        let until = Instant::now() + deadline;
        self.stdin = None;
        loop {
            match self.next(until)? {
                Event::Ready => bail!("the {} is out of order", self.name),
                Event::Lost(loss) => self.losses.push(loss),
                Event::Done(figures) => {
                    let status = self.child.wait()?;
                    ensure!(status.success(), "the {} ended with {status}", self.name);
                    return Ok((std::mem::take(&mut self.losses), figures));
                }
            }
        }
    }

    fn next(&mut self, until: Instant) -> Result<Event<T>> {
        let left = until.saturating_duration_since(Instant::now());
        match self.events.recv_timeout(left) {
            Ok(event) => Ok(event),
            Err(RecvTimeoutError::Timeout) => bail!("the {} says nothing any more", self.name),
            Err(RecvTimeoutError::Disconnected) => bail!("the {} is gone", self.name),
        }
    }
}

impl<T> Drop for Worker<T> {
    fn drop(&mut self) {
        // It may have ended by itself, which is all that is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Ends with the process, or with what cannot be understood.
fn forward<T: DeserializeOwned>(lines: impl io::BufRead, events: &Sender<Event<T>>) {
    for line in lines.lines().map_while(Result::ok) {
        let Ok(event) = serde_json::from_str(&line) else {
            return;
        };
        if events.send(event).is_err() {
            return;
        }
    }
}
