//! The killers: `cwkill`, one method per killer and started as a user would, or another command.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde::Deserialize;

use super::IDLE;
use crate::host::{Host, finish_within};

/// How long one run may take. On a loaded machine it takes seconds; longer than this is a hang.
const RUN_DEADLINE: Duration = Duration::from_secs(60);

/// The `--grace` of `cwkill`. Clients answer a FIN at once, so a longer one would only wait for peers that never answer.
const GRACE: &str = "200ms";

/// The `--min-idle` of `cwkill`: data moves in every connection all the time, and the killers must act all the same.
const MIN_IDLE: &str = "0s";

/// The exit statuses of a `cwkill` that worked: closed all, found nothing, closed some.
const DONE: [i32; 3] = [0, 1, 4];

/// A command that is run over and over while the connections live.
#[derive(Debug, Clone)]
pub struct Killer {
    name: String,
    command: Vec<OsString>,
    /// It is `cwkill` and reports its results in JSON.
    reports: bool,
    /// They are connections and not sockets.
    is_gateway: bool,
}

impl Killer {
    /// `cwkill` with this method on these ports.
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
        let options = ["--method", method, "--grace", GRACE, "--min-idle", MIN_IDLE];
        command.extend(options.map(OsString::from));
        // The server waits for the FIN of some connections with poll(2), and would be left alone for it.
        command.extend(["--allow-spin".into(), "--json".into()]);
        if let Some(age) = min_age {
            command.extend(["--min-age".into(), format!("{}ms", age.as_millis()).into()]);
        }
        Self {
            name: method.to_owned(),
            command,
            reports: true,
            is_gateway: false,
        }
    }

    /// `cwkill gateway --cut` for connections to these ports: one for those that are idle for 5 s, and one for those of which one end
    /// has sent its FIN.
    #[must_use]
    pub fn gateway(program: &Path, [first, second]: [u16; 2]) -> [Self; 2] {
        let idle = format!("established --min-age {}ms", IDLE.as_millis());
        [("idle", idle.as_str()), ("close-wait", "close-wait")].map(|(name, states)| {
            let line =
                format!("gateway --cut --json --dport {first},{second} --conntrack-state {states}");
            let mut command = vec![program.as_os_str().to_owned()];
            command.extend(line.split(' ').map(OsString::from));
            Self {
                name: name.to_owned(),
                command,
                reports: true,
                is_gateway: true,
            }
        })
    }

    /// Any other command, to see whether the run detects the harm it does. Its exit status is ignored.
    #[must_use]
    pub fn other(name: &str, command: impl IntoIterator<Item = impl Into<OsString>>) -> Self {
        Self {
            name: name.to_owned(),
            command: command.into_iter().map(Into::into).collect(),
            reports: false,
            is_gateway: false,
        }
    }
}

/// Results of one killer, counted in sockets.
#[derive(Debug, Clone, Default)]
pub struct KillStats {
    /// The method of `cwkill`, or the name of the command.
    pub name: String,
    /// Whether it reports its results. If not, all counts of sockets are 0.
    pub reports: bool,
    /// Runs of the command.
    pub runs: u64,
    /// Sockets that it matched.
    pub matched: u64,
    /// Sockets that it attempted to close.
    pub acts: u64,
    /// Sockets that it closed.
    pub closed: u64,
    /// Sockets that are closing because of it.
    pub closing: u64,
    /// Sockets that were gone before it acted.
    pub gone: u64,
    /// Sockets that it skipped.
    pub skipped: u64,
    /// Sockets that it failed to close.
    pub failed: u64,
    /// Duration of the longest run.
    pub longest: Duration,
    /// Sockets per reason for skipping or failing. Digits are replaced by `N`, so that equal reasons count together.
    pub reasons: BTreeMap<String, u64>,
}

impl KillStats {
    pub(super) const COLUMNS: &str =
        "method        runs  matched     acts   closed closing     gone  skipped  failed  longest";

    /// Counts a socket with its result.
    pub(super) fn add(&mut self, result: JsonResult) -> Result<()> {
        self.matched += 1;
        self.acts += u64::from(!result.attempts.is_empty());
        match result.outcome.as_str() {
            "closed" => self.closed += 1,
            "closing" => self.closing += 1,
            "gone" => self.gone += 1,
            "skipped" => self.skipped += 1,
            "failed" => self.failed += 1,
            other => bail!("unknown outcome of cwkill: {other}"),
        }
        if matches!(result.outcome.as_str(), "skipped" | "failed") {
            *self.reasons.entry(reason(&result)).or_default() += 1;
        }
        Ok(())
    }

    /// Counts a connection between other hosts. An act is an RST to an end of it.
    fn add_forwarded(&mut self, result: &JsonForwardedResult) -> Result<()> {
        let ends = [&result.source, &result.destination];
        self.matched += 1;
        self.acts += u64::from(ends.iter().any(|end| end.resets > 0));
        match result.outcome.as_str() {
            "cut" | "healed" => self.closed += 1,
            "gone" => self.gone += 1,
            "skipped" => self.skipped += 1,
            "half" | "alive" | "failed" => self.failed += 1,
            other => bail!("unknown outcome of cwkill gateway: {other}"),
        }
        if !matches!(result.outcome.as_str(), "cut" | "healed" | "gone") {
            let mut reason = result.outcome.clone();
            match &result.reason_code {
                Some(code) => reason += &format!(": {code}"),
                None => {
                    let [source, destination] = ends.map(|end| end.now.as_str());
                    reason += &format!(": source {source}, destination {destination}");
                }
            }
            *self.reasons.entry(reason).or_default() += 1;
        }
        Ok(())
    }
}

impl fmt::Display for KillStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<10} {:>7}", self.name, self.runs)?;
        if !self.reports {
            return write!(f, "  (reports no results)");
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
struct ForwardedDocument {
    connections: Vec<JsonConnection>,
}

#[derive(Deserialize)]
struct JsonConnection {
    result: Option<JsonForwardedResult>,
}

#[derive(Deserialize)]
struct JsonForwardedResult {
    outcome: String,
    reason_code: Option<String>,
    source: JsonEnd,
    destination: JsonEnd,
}

#[derive(Deserialize)]
struct JsonEnd {
    now: String,
    resets: u32,
}

/// The result of a socket, in the document and in the log of `cwkill`.
#[derive(Deserialize)]
pub(super) struct JsonResult {
    outcome: String,
    reason: Option<String>,
    attempts: Vec<JsonAttempt>,
}

#[derive(Deserialize)]
struct JsonAttempt {
    method: String,
    error: Option<String>,
}

/// Runs the killers in turn on `host`, at most until `until`. Before each round it calls `is_done`, with the information
/// whether every killer has attempted to close `acts` sockets.
pub(super) fn run_all(
    host: &Host,
    killers: &[Killer],
    until: Instant,
    acts: Option<u64>,
    mut is_done: impl FnMut(bool) -> Result<bool> + Send,
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
        // From a thread in the namespace: one more process per run would halve the number of runs.
        'time: loop {
            let reached =
                |stats: &KillStats| stats.reports && acts.is_some_and(|acts| stats.acts >= acts);
            let all_reached = stats.iter().all(reached);
            if is_done(all_reached)? {
                break;
            }
            for (killer, stats) in killers.iter().zip(&mut stats) {
                if Instant::now() >= until {
                    break 'time;
                }
                if reached(stats) && !all_reached {
                    continue;
                }
                run(killer, stats)?;
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
        "{name} ({}) ended with {}: {}",
        killer.name,
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    if killer.is_gateway {
        let document: ForwardedDocument = serde_json::from_slice(&output.stdout)
            .with_context(|| format!("read the JSON of {name}"))?;
        for connection in document.connections {
            let result = connection.result.context("a connection without a result")?;
            stats.add_forwarded(&result)?;
        }
        return Ok(());
    }
    let document: Document = serde_json::from_slice(&output.stdout)
        .with_context(|| format!("read the JSON of {name}"))?;
    for socket in document.sockets {
        stats.add(socket.result.context("a socket without a result")?)?;
    }
    Ok(())
}

fn reason(result: &JsonResult) -> String {
    let attempts = result.attempts.iter().map(|attempt| match &attempt.error {
        Some(error) => format!("{}: {error}", attempt.method),
        None => format!("{}: no error, but not closed", attempt.method),
    });
    let all: Vec<_> = result.reason.iter().cloned().chain(attempts).collect();
    let text = format!("{}: {}", result.outcome, all.join("; "));
    text.split(|c: char| c.is_ascii_digit())
        .filter(|part| !part.is_empty())
        .collect::<Vec<_>>()
        .join("N")
}
