//! Starts the two worker processes of a run and reads their events.

use std::io::{self, BufReader, Write as _};
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
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

/// How long a worker may take to be ready.
const START_DEADLINE: Duration = Duration::from_secs(30);

/// An event that a worker reports on its stdout, as one JSON object per line.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Event<T> {
    /// The worker is ready.
    Ready,
    /// A bystander was lost.
    Lost(Loss),
    /// A half-closed stream carried every byte to the end.
    StreamFinished,
    /// All connections are over; the worker's counters.
    Done(T),
}

/// The number of events so far.
#[derive(Debug, Clone, Copy)]
pub(super) struct Progress {
    pub losses: usize,
    /// Half-closed streams that have finished.
    pub streams: u64,
}

/// Reports events from any thread of a worker.
pub(super) struct EventSender<T> {
    out: Mutex<io::Stdout>,
    stats: std::marker::PhantomData<fn(T)>,
}

impl<T> Default for EventSender<T> {
    fn default() -> Self {
        Self {
            out: Mutex::new(io::stdout()),
            stats: std::marker::PhantomData,
        }
    }
}

impl<T: Serialize> EventSender<T> {
    pub fn send(&self, event: &Event<T>) {
        let mut line = serde_json::to_vec(event).expect("events are plain data");
        line.push(b'\n');
        let mut out = self.out.lock().unwrap_or_else(PoisonError::into_inner);
        // Fails only if the parent is gone, and then the kernel kills this process.
        let _ = out.write_all(&line).and_then(|()| out.flush());
    }
}

/// The niceness of a thread with a connection (setpriority(2)). There are hundreds. Beside them, a killer of equal rank gets so little
/// processor time that most sockets are gone before it acts, and the threads that accept get so little that connections wait for minutes.
const NICENESS: i32 = 15;

/// Lowers the priority of this thread, which has a connection.
pub(super) fn give_way() {
    // Everybody may lower it. In Linux each thread has its own.
    let _ = rustix::process::nice(NICENESS);
}

/// Runs one worker to its end.
pub(crate) fn run_worker(role: &WorkerRole) -> Result<()> {
    raise_descriptor_limit()?;
    match role {
        WorkerRole::Server(config) => server::run(config),
        WorkerRole::Clients(config) => client::run(config),
    }
}

/// A worker process. Killed when dropped.
pub(super) struct Worker<T> {
    name: &'static str,
    child: Child,
    /// The worker takes the end of its stdin for the end of the run.
    stdin: Option<ChildStdin>,
    events: Receiver<Event<T>>,
    losses: Vec<Loss>,
    streams: u64,
}

impl<T: DeserializeOwned + Send + 'static> Worker<T> {
    /// Starts the worker and waits until it is ready.
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
            streams: 0,
        };
        match worker.next(Instant::now() + START_DEADLINE)? {
            Event::Ready => Ok(worker),
            _ => bail!("the {name} process did not begin with `Ready`"),
        }
    }

    /// Whether the process still runs.
    pub fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Counts the events that have arrived.
    pub fn progress(&mut self) -> Result<Progress> {
        loop {
            match self.events.try_recv() {
                Ok(event) => match self.note(event)? {
                    None => {}
                    Some(_) => bail!("the {} process ended before the run", self.name),
                },
                Err(TryRecvError::Empty) => {
                    return Ok(Progress {
                        losses: self.losses.len(),
                        streams: self.streams,
                    });
                }
                Err(TryRecvError::Disconnected) => bail!("the {} process is gone", self.name),
            }
        }
    }

    /// Ends the run of the worker and waits for its counters.
    pub fn finish(mut self, deadline: Duration) -> Result<(Vec<Loss>, T)> {
        let until = Instant::now() + deadline;
        self.stdin = None;
        loop {
            let event = self.next(until)?;
            if let Some(stats) = self.note(event)? {
                let status = self.child.wait()?;
                ensure!(
                    status.success(),
                    "the {} process ended with {status}",
                    self.name
                );
                return Ok((std::mem::take(&mut self.losses), stats));
            }
        }
    }

    /// Counts an event. Returns the counters if it was the last one.
    fn note(&mut self, event: Event<T>) -> Result<Option<T>> {
        match event {
            Event::Ready => bail!("the {} process reported twice that it is ready", self.name),
            Event::Lost(loss) => self.losses.push(loss),
            Event::StreamFinished => self.streams += 1,
            Event::Done(stats) => return Ok(Some(stats)),
        }
        Ok(None)
    }

    fn next(&mut self, until: Instant) -> Result<Event<T>> {
        let left = until.saturating_duration_since(Instant::now());
        match self.events.recv_timeout(left) {
            Ok(event) => Ok(event),
            Err(RecvTimeoutError::Timeout) => {
                bail!("the {} process reported nothing in time", self.name)
            }
            Err(RecvTimeoutError::Disconnected) => bail!("the {} process is gone", self.name),
        }
    }
}

impl<T> Drop for Worker<T> {
    fn drop(&mut self) {
        // Fails only if the process has already ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Passes events on until the process ends or prints an unknown line.
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
