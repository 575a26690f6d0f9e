//! Who acts on the stuck connections: `cwkill`, method by method, as a user would start it.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde::Deserialize;

use crate::host::{Host, finish_within};

/// How long one run may take: what lies between a loaded machine and a hang.
const RUN_DEADLINE: Duration = Duration::from_secs(60);

/// How long `cwkill` gives a socket to close. Clients answer a FIN at once, so more would only make it wait for those whose
/// peer never answers.
const GRACE: &str = "200ms";

/// The statuses of `cwkill` that say it did its job: closed all, found nothing, closed some.
const DONE: [i32; 3] = [0, 1, 4];

/// A command that is run over and over while the connections live.
#[derive(Debug, Clone)]
pub struct Killer {
    name: String,
    command: Vec<OsString>,
    /// It is `cwkill`, and says in JSON what it did.
    reports: bool,
}

impl Killer {
    /// `cwkill` with this method, on these ports.
    #[must_use]
    pub fn cwkill(
        program: &Path,
        method: &str,
        ports: [u16; 2],
        min_age: Option<Duration>,
    ) -> Self {
        let mut command = vec![program.as_os_str().to_owned()];
        let [first, second] = ports;
        command.extend(["--port".into(), format!("{first},{second}").into()]);
        command.extend(["--method", method, "--grace", GRACE, "--json"].map(OsString::from));
        if let Some(age) = min_age {
            command.extend(["--min-age".into(), format!("{}ms", age.as_millis()).into()]);
        }
        Self {
            name: method.to_owned(),
            command,
            reports: true,
        }
    }

    /// Any other command, to see whether what it does wrong is found out. Its exit status counts for nothing.
    #[must_use]
    pub fn other(name: &str, command: impl IntoIterator<Item = impl Into<OsString>>) -> Self {
        Self {
            name: name.to_owned(),
            command: command.into_iter().map(Into::into).collect(),
            reports: false,
        }
    }
}

/// What a killer has done, in sockets.
#[derive(Debug, Clone, Default)]
pub struct KillStats {
    /// The method.
    pub name: String,
    /// Whether it says what it does; all numbers of sockets are 0 if not.
    pub reports: bool,
    /// How often it ran.
    pub runs: u64,
    /// Sockets it found stuck.
    pub matched: u64,
    /// Sockets it reached for: those with an attempt, whatever came of it.
    pub acts: u64,
    /// Closed by it.
    pub closed: u64,
    /// On their way by it.
    pub closing: u64,
    /// Closed by others before it acted.
    pub gone: u64,
    /// Left alone.
    pub skipped: u64,
    /// Still there.
    pub failed: u64,
    /// The longest run.
    pub longest: Duration,
    /// Why sockets were left alone or are still there, and how many; without numbers, so that like is counted with like.
    pub reasons: BTreeMap<String, u64>,
}

impl KillStats {
    pub(super) const COLUMNS: &str =
        "method        runs  matched     acts   closed closing     gone  skipped  failed  longest";
}

impl fmt::Display for KillStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<10} {:>7}", self.name, self.runs)?;
        if !self.reports {
            return write!(f, "  (does not say what it does)");
        }
        write!(
            f,
            " {:>8} {:>8} {:>8} {:>7} {:>8} {:>8} {:>7} {:>5} ms",
            self.matched,
            self.acts,
            self.closed,
            self.closing,
            self.gone,
            self.skipped,
            self.failed,
            self.longest.as_millis()
        )?;
        for (reason, count) in &self.reasons {
            write!(f, "\n{count:>18} {reason}")?;
        }
        Ok(())
    }
}

#[derive(Deserialize)]
struct Document {
    sockets: Vec<JsonSocket>,
}

#[derive(Deserialize)]
struct JsonSocket {
    result: Option<JsonResult>,
}

#[derive(Deserialize)]
struct JsonResult {
    outcome: String,
    reason: Option<String>,
    attempts: Vec<JsonAttempt>,
}

#[derive(Deserialize)]
struct JsonAttempt {
    method: String,
    error: Option<String>,
}

/// Runs the killers in turn on `host` until `until`, or until each has reached for `acts` sockets.
pub(super) fn run_all(
    host: &Host,
    killers: &[Killer],
    until: Instant,
    acts: Option<u64>,
) -> Result<Vec<KillStats>> {
    let mut stats: Vec<KillStats> = killers
        .iter()
        .map(|killer| KillStats {
            name: killer.name.clone(),
            reports: killer.reports,
            ..KillStats::default()
        })
        .collect();
    host.within(|| {
        // From a thread in the namespace: a process more for each run would halve their number.
        'time: loop {
            let mut idle = true;
            for (killer, stats) in killers.iter().zip(&mut stats) {
                if Instant::now() >= until {
                    break 'time;
                }
                if killer.reports && acts.is_some_and(|acts| stats.acts >= acts) {
                    continue;
                }
                idle = false;
                run(killer, stats)?;
            }
            if idle {
                break;
            }
        }
        Ok(stats)
    })
}

fn run(killer: &Killer, stats: &mut KillStats) -> Result<()> {
    let (program, arguments) = killer.command.split_first().context("no command")?;
    let name = program.display().to_string();
    let began = Instant::now();
    let child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {name}"))?;
    let output = finish_within(child, &name, RUN_DEADLINE)?;
    stats.runs += 1;
    stats.longest = stats.longest.max(began.elapsed());
    if !killer.reports {
        return Ok(());
    }
    ensure!(
        output
            .status
            .code()
            .is_some_and(|code| DONE.contains(&code)),
        "{name} --method {} ended with {}: {}",
        killer.name,
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    let document: Document =
        serde_json::from_slice(&output.stdout).with_context(|| format!("read what {name} says"))?;
    for socket in document.sockets {
        let result = socket.result.context("a socket without a result")?;
        stats.matched += 1;
        stats.acts += u64::from(!result.attempts.is_empty());
        match result.outcome.as_str() {
            "closed" => stats.closed += 1,
            "closing" => stats.closing += 1,
            "gone" => stats.gone += 1,
            "skipped" => stats.skipped += 1,
            "failed" => stats.failed += 1,
            other => bail!("{name} knows an outcome that we do not: {other}"),
        }
        if matches!(result.outcome.as_str(), "skipped" | "failed") {
            *stats.reasons.entry(reason(&result)).or_default() += 1;
        }
    }
    Ok(())
}

fn reason(result: &JsonResult) -> String {
    let attempts = result.attempts.iter().map(|attempt| match &attempt.error {
        Some(error) => format!("{}: {error}", attempt.method),
        None => format!("{}: done, and still there", attempt.method),
    });
    let all: Vec<_> = result.reason.iter().cloned().chain(attempts).collect();
    let text = format!("{}: {}", result.outcome, all.join("; "));
    text.split(|c: char| c.is_ascii_digit())
        .filter(|part| !part.is_empty())
        .collect::<Vec<_>>()
        .join("N")
}
