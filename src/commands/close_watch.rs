//! `cwkill --watch`: closes the sockets that match, as they come.
//!
//! It lists the sockets again and again: the kernel reports the end of a socket (SKNLGRP_INET_TCP_DESTROY), but neither a new one nor a
//! change of its state. Each round is a run of its own on the sockets that no round before has dealt with.

use std::collections::HashSet;
use std::io;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context;

use super::close::{HELD_UP, Prepared, close, decide, find, messages, reclaim_descriptors, width};
use super::{confirm, say_notes, was_reported};
use crate::audit::Audit;
use crate::config::{Action, Config, Format, Watch};
use crate::control::{Control, deadline};
use crate::finder;
use crate::history::History;
use crate::injector::engine::Rules;
use crate::injector::way::ByIterator;
use crate::model::{Coverage, TimeAndPlace};
use crate::report::text::Rows;
use crate::report::{ExitStatus, Run, SocketCounts, exit_status, json};
use crate::sock_diag::Cookie;
use crate::terminal::{Terminal, is_coloured, say, write_out};
use crate::text::{counted, seconds};
use crate::watch::cookies;

/// The pause between two lists.
const INTERVAL: Duration = Duration::from_millis(200);
/// A list of many sockets and processes takes at most one part in so many of the time.
const LIST_SHARE: u32 = 4;
/// The longest time from Ctrl-C to the end, if nothing is in flight.
const LONGEST_WAIT: Duration = Duration::from_millis(50);

/// What the rounds of a watch have done.
#[derive(Default)]
struct Rounds {
    /// The sockets that were dealt with.
    known: HashSet<Cookie>,
    /// The number of those that were planned to be closed.
    planned: usize,
    counts: SocketCounts,
    /// Whether a round was not complete.
    is_incomplete: bool,
    /// What the last list could not see.
    coverage: Coverage,
    said: HashSet<String>,
    rows: Rows,
    log: Option<Audit>,
    /// Whether the log has its first record.
    is_recorded: bool,
}

/// The whole watch, to its exit status.
pub(super) fn run(mut prepared: Prepared, watch: Watch) -> anyhow::Result<ExitStatus> {
    // It shows no progress: the rows do.
    let mut terminal = Terminal::new(true, true)?;
    let begun = terminal.now();
    let until = watch.duration.map(|duration| deadline(begun, duration));
    let mut rounds = Rounds {
        log: prepared.log.take(),
        ..Rounds::default()
    };
    terminal.hold_signals();
    let ended = go_on(&prepared, &mut rounds, until, &terminal);
    let lasted = terminal.now().saturating_duration_since(begun);
    terminal.release_signals();
    let config = &prepared.config;
    let summary = rounds.summary(lasted, config.action);
    // A watch without a match leaves no record.
    let log = rounds.log.take().filter(|_| rounds.is_recorded);
    let unrecorded = log.and_then(|log| log.finish_watch(rounds.counts, summary.clone()));
    drop(terminal);
    let (written, failure) = match ended {
        Ok(written) => (written, None),
        Err(error) => (Ok(()), Some(error)),
    };
    let written = written.and_then(|()| match config.format {
        Format::Table => write_out(|out| writeln!(out, "{summary}")),
        Format::JsonLines => {
            say(format_args!("{summary}"));
            Ok(())
        }
        Format::Json | Format::Quiet => Ok(()),
    });
    let has_acted = (config.action == Action::Act).then_some(summary.as_str());
    let reported = was_reported(written, unrecorded, has_acted)?;
    match failure {
        Some(error) => Err(error.context(format!("the watch has ended early ({summary})"))),
        None if reported => Ok(rounds.exit_status()),
        None => Ok(ExitStatus::Impossible),
    }
}

/// Until the operator or a limit ends it. Returns whether the rows were written.
///
/// # Errors
/// The sockets cannot be listed, or the log cannot be written.
fn go_on(
    prepared: &Prepared,
    rounds: &mut Rounds,
    until: Option<Instant>,
    terminal: &Terminal,
) -> anyhow::Result<io::Result<()>> {
    let (config, proc) = (&prepared.config, &prepared.proc);
    let mut history = History::open();
    let mut is_first = true;
    loop {
        let begun = terminal.now();
        // A process that has come since may be in another namespace.
        let namespaces = finder::open_namespaces(&config.netns, &config.selectors, proc)?;
        let mut scan = find(config, &namespaces, &history, proc)?;
        let listed = terminal.now().saturating_duration_since(begun);
        let is_known = |cookie| rounds.known.contains(&cookie);
        scan.targets
            .retain(|target| !is_known(target.socket.cookie()));
        let left = config.policy.max_kills;
        let left = left.map(|most| most.saturating_sub(rounds.planned));
        let scan = decide(scan, config, left, &prepared.privileges, proc, terminal);
        let is_new = !scan.targets.is_empty();
        if is_new {
            // Before the act, so that no act makes a socket young for the next run.
            history.add(&scan, &config.selectors);
        }
        let mut run = Run::new(scan);
        if is_first && is_new && !is_agreed(&run, config) {
            say(format_args!("nothing was closed"));
            rounds.is_incomplete = true;
            return Ok(Ok(()));
        }
        rounds.known.extend(cookies(&run.scan));
        if is_new && config.action == Action::Act {
            act(prepared, rounds, &mut run, terminal)?;
        } else if let Some(rules) = config.reclaim.as_ref().filter(|_| is_new) {
            reclaim_descriptors(&mut run, rules, proc, terminal);
        }
        rounds.add(&run);
        if (is_first || is_new) && config.format != Format::Quiet {
            let mut messages = messages(&run, config);
            messages.retain(|message| rounds.said.insert(message.clone()));
            messages
                .iter()
                .for_each(|message| say(format_args!("{message}")));
        }
        is_first = false;
        if is_new && let Err(error) = write(prepared, rounds, &run) {
            return Ok(Err(error));
        }
        let is_done = config
            .policy
            .max_kills
            .is_some_and(|most| most <= rounds.planned);
        let next = terminal.now() + INTERVAL.max(listed * LIST_SHARE);
        loop {
            let now = terminal.now();
            if is_done || terminal.interrupted() || until.is_some_and(|until| until <= now) {
                return Ok(Ok(()));
            }
            if next <= now {
                break;
            }
            let wait = until.map_or(next, |until| until.min(next));
            terminal.sleep(wait.saturating_duration_since(now).min(LONGEST_WAIT));
        }
    }
}

/// Asks before the first act, as without a watch.
fn is_agreed(run: &Run, config: &Config) -> bool {
    let asks = config.action == Action::Act && config.asks && config.owners;
    let question = match asks && confirm::is_possible() {
        true => confirm::question(run, config),
        false => None,
    };
    question.is_none_or(|question| confirm::agrees(&question))
}

fn act(
    prepared: &Prepared,
    rounds: &mut Rounds,
    run: &mut Run,
    terminal: &Terminal,
) -> anyhow::Result<()> {
    let (config, proc) = (&prepared.config, &prepared.proc);
    if let Some(log) = &mut rounds.log {
        let intended = match rounds.is_recorded {
            true => log.intend_more(run),
            false => log.begin(run),
        };
        intended.context("the log cannot be written")?;
        rounds.is_recorded = true;
    }
    let rules = Rules {
        destroyer: prepared.destroyer.as_ref(),
        ..config.rules(&prepared.privileges)
    };
    let canaries = close(run, config, rules, proc, terminal);
    let was_held_up = prepared
        .destroyer
        .as_ref()
        .is_some_and(ByIterator::was_held_up);
    if was_held_up && config.format != Format::Quiet && rounds.said.insert(HELD_UP.to_owned()) {
        say_notes([HELD_UP]);
    }
    if let Some(rules) = &config.reclaim {
        reclaim_descriptors(run, rules, proc, terminal);
    }
    if let Some(mut canaries) = canaries {
        let more = canaries.observe_paused(&run.scan, terminal);
        run.spinning.extend(more);
    }
    if let Some(log) = &mut rounds.log {
        log.record(run);
    }
    Ok(())
}

fn write(prepared: &Prepared, rounds: &mut Rounds, run: &Run) -> io::Result<()> {
    let config = &prepared.config;
    match config.format {
        Format::Table => {
            let looks = (is_coloured(config.color), width(config.color));
            write_out(|out| {
                rounds
                    .rows
                    .write(run, &run.scan.targets, config, looks, out)
            })
        }
        Format::JsonLines => {
            let time_and_place = TimeAndPlace {
                time: SystemTime::now(),
                ..prepared.time_and_place.clone()
            };
            write_out(|out| json::write_lines(run, &time_and_place, out))
        }
        Format::Json | Format::Quiet => Ok(()),
    }
}

impl Rounds {
    fn add(&mut self, run: &Run) {
        let planned = run.scan.targets.iter();
        self.planned += planned.filter(|it| it.plan.skip.is_none()).count();
        self.counts.add(SocketCounts::of(run));
        self.is_incomplete |=
            !run.scan.targets.is_empty() && exit_status(run) == ExitStatus::NotAllClosed;
        self.coverage = run.scan.coverage.clone();
    }

    fn summary(&self, lasted: Duration, action: Action) -> String {
        let SocketCounts {
            in_use, younger, ..
        } = self.counts;
        let mut line = match action {
            Action::Act => self.counts.sentence(),
            Action::List | Action::DryRun => {
                let matched = counted(self.counts.matched, "socket");
                format!("{matched} matched; dry run, nothing was done")
            }
        };
        for (count, why) in [
            (in_use, "in use (--min-idle)"),
            (younger, "younger than --min-age"),
        ] {
            if count > 0 {
                line += &format!("; {count} {why} and left alone at the end");
            }
        }
        line + &format!("; watched for {}", seconds(lasted))
    }

    /// As for a run that acts once.
    fn exit_status(&self) -> ExitStatus {
        match self.counts.matched {
            _ if self.is_incomplete => ExitStatus::NotAllClosed,
            0 if self.coverage.may_have_missed() => ExitStatus::NotAllClosed,
            0 => ExitStatus::NothingMatched,
            _ => ExitStatus::Done,
        }
    }
}
