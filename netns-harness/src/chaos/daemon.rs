//! `cwkill daemon` as the killer: policies close what is stuck for a minute, and its log is the result.
//!
//! A policy that acts needs a minimum age of a minute, and nothing can make a socket older. So a run waits that minute, and has enough
//! clients that very many sockets come of age at the same time.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, ErrorKind};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, mkdtemp};
use serde::Deserialize;

use super::killer::{JsonResult, KillStats};
use super::{FIRST_PORT, Options};
use crate::host::Host;
use crate::lab::POLL_INTERVAL;

/// The least `min_age` of a policy that acts.
pub(super) const MIN_AGE: Duration = Duration::from_secs(60);

/// The time from one sweep to the next. The default is 30 seconds; with more sweeps there are more chances to hit a bystander.
const INTERVAL: &str = "100ms";

/// How long the daemon may take to end: the acts in flight wait for peers that never answer.
const END_DEADLINE: Duration = Duration::from_secs(60);

/// A daemon with a policy in act mode for each method. Each policy has a part of the clients.
#[derive(Debug, Clone)]
pub struct Daemon {
    program: PathBuf,
    methods: Vec<String>,
}

impl Daemon {
    /// `program`: cwkill.
    #[must_use]
    pub fn new(program: &Path, methods: impl IntoIterator<Item = impl Into<String>>) -> Self {
        Self {
            program: program.to_owned(),
            methods: methods.into_iter().map(Into::into).collect(),
        }
    }

    /// The configuration. Limits and breakers are wide: this is about what is closed, not about how much.
    fn configuration(&self, options: &Options, log: &Path) -> String {
        let [first, second] = options.ports();
        let mut text = format!(
            "[daemon]\nlisten = \"none\"\nlog_file = {log:?}\n\
             [limits]\nkills_per_sweep = 1000000\nkills_per_hour = 1000000\n"
        );
        let parts = u32::try_from(self.methods.len()).unwrap_or(u32::MAX);
        for (part, method) in (0..).zip(&self.methods) {
            let port =
                |part: u32| u32::from(FIRST_PORT) + u32::from(options.connections) * part / parts;
            let (from, to) = (port(part), port(part + 1).saturating_sub(1));
            text += &format!(
                "[[policy]]\nname = \"{method}\"\nmode = \"act\"\nexpires = 2100-01-01\nmethods = [\"{method}\"]\n\
                 match = {{ port = [{first}, {second}], peer_port = \"{from}-{to}\" }}\n\
                 min_age = \"{}s\"\nconfirm = 1\nshare = \"100%\"\nkills_per_sweep = 1000000\nkills_per_hour = 1000000\n\
                 breaker = {{ sweeps = 1000000, failures = \"100%\", surge = 1000000, restarts = 1000000 }}\n",
                MIN_AGE.as_secs()
            );
        }
        text
    }
}

/// A record of the log.
#[derive(Deserialize)]
struct Record {
    event: String,
    policy: Option<String>,
    sweep: Option<u64>,
    socket: Option<LoggedSocket>,
}

#[derive(Deserialize)]
struct LoggedSocket {
    cookie: String,
    result: Option<JsonResult>,
}

/// The log as far as it was read.
struct Log {
    path: PathBuf,
    file: Option<BufReader<File>>,
    /// A line whose end is not written yet.
    rest: String,
    /// The cookies of the sockets with an intent and no outcome yet.
    open: HashSet<String>,
    /// The last sweep of each policy with acts.
    sweeps: Vec<Option<u64>>,
}

impl Log {
    fn read(&mut self, stats: &mut [KillStats]) -> Result<()> {
        if self.file.is_none() {
            self.file = match File::open(&self.path) {
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
                opened => Some(BufReader::new(opened.context("open the log")?)),
            };
        }
        let Some(file) = &mut self.file else {
            return Ok(());
        };
        while file.read_line(&mut self.rest).context("read the log")? > 0 {
            if !self.rest.ends_with('\n') {
                return Ok(());
            }
            let record: Record = serde_json::from_str(&self.rest)
                .with_context(|| format!("a record of the log: {}", self.rest))?;
            self.rest.clear();
            let policy = record.policy.context("a record without a policy")?;
            let of_policy = stats.iter().position(|stats| stats.name == policy);
            let of_policy = of_policy.context("a record of another policy")?;
            let Some(socket) = record.socket else {
                continue;
            };
            match record.event.as_str() {
                "intent" => {
                    self.open.insert(socket.cookie);
                }
                // A socket that was left alone from the start has an outcome alone.
                "outcome" => {
                    self.open.remove(&socket.cookie);
                    if std::mem::replace(&mut self.sweeps[of_policy], record.sweep) != record.sweep
                    {
                        stats[of_policy].runs += 1;
                    }
                    let result = socket.result.context("an outcome without a result")?;
                    stats[of_policy].add(result)?;
                }
                _ => {}
            }
        }
        Ok(())
    }
}

/// Runs the daemon on `host`, at most until `until`. As [`super::killer::run_all`].
pub(super) fn run(
    host: &Host,
    daemon: &Daemon,
    options: &Options,
    until: Instant,
    mut is_done: impl FnMut(bool) -> Result<bool> + Send,
) -> Result<Vec<KillStats>> {
    let place = Place::new()?;
    let (config, said) = (place.0.join("daemon.toml"), place.0.join("said"));
    let mut log = Log {
        path: place.0.join("acts.jsonl"),
        file: None,
        rest: String::new(),
        open: HashSet::new(),
        sweeps: vec![None; daemon.methods.len()],
    };
    fs::write(&config, daemon.configuration(options, &log.path))
        .context("write its configuration")?;
    let mut stats: Vec<KillStats> = daemon
        .methods
        .iter()
        .map(|method| KillStats {
            name: method.clone(),
            reports: true,
            ..KillStats::default()
        })
        .collect();
    let name = daemon.program.display().to_string();
    let what_it_said = || fs::read_to_string(&said).unwrap_or_default();
    // It ends with the harness.
    let command = host
        .command(&name)
        .args(["daemon", "--interval", INTERVAL, "--config"])
        .args([&config])
        .env("STATE_DIRECTORY", &place.0)
        .env("CWKILL_HISTORY", &place.0)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(&said).context("write what it says")?);
    let spawned = command.spawn();
    let mut child = Killed(spawned.with_context(|| format!("start {name}"))?);
    loop {
        log.read(&mut stats)?;
        let has_enough = |stats: &KillStats| options.acts.is_some_and(|acts| stats.acts >= acts);
        if is_done(stats.iter().all(has_enough))? || Instant::now() >= until {
            break;
        }
        let ended = child.0.try_wait()?;
        ensure!(ended.is_none(), "{name} has ended: {}", what_it_said());
        thread::sleep(POLL_INTERVAL);
    }
    let pid = i32::try_from(child.0.id()).context("a pid")?;
    kill(Pid::from_raw(pid), Signal::SIGTERM).context("end the daemon")?;
    let status = child.wait(END_DEADLINE)?;
    ensure!(
        status == Some(0),
        "{name} ended with {status:?}: {}",
        what_it_said()
    );
    log.read(&mut stats)?;
    ensure!(
        log.open.is_empty() && log.rest.is_empty(),
        "{} acts have no outcome in the log: {}",
        log.open.len(),
        what_it_said()
    );
    Ok(stats)
}

/// A directory, which is removed when this is dropped.
struct Place(PathBuf);

impl Place {
    fn new() -> Result<Self> {
        let name = std::env::temp_dir().join("netns-harness-chaos-XXXXXX");
        let made = mkdtemp(&name).context("make a directory for the daemon")?;
        Ok(Place(made))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // One that is left behind is of no further use.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Killed when dropped.
struct Killed(Child);

impl Killed {
    /// Waits for its end. Returns its exit status; `None` if a signal has ended it.
    fn wait(&mut self, at_most: Duration) -> Result<Option<i32>> {
        let until = Instant::now() + at_most;
        loop {
            if let Some(status) = self.0.try_wait()? {
                return Ok(status.code());
            }
            ensure!(Instant::now() < until, "the daemon does not end");
            thread::sleep(POLL_INTERVAL);
        }
    }
}

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
