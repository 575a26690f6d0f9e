//! `cwkill --watch`: closes the sockets that match, as they come.
//!
//! It lists the sockets again and again: the kernel reports the end of a socket (SKNLGRP_INET_TCP_DESTROY), but neither a new one nor a
//! change of its state. Each round is a run of its own on the sockets that no round before has dealt with.

use std::collections::{HashMap, HashSet};
use std::io::{self, IsTerminal};
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context;

use super::close::{HELD_UP, Prepared, close, decide, find, messages, reclaim_descriptors, width};
use super::patience::Patience;
use super::{confirm, report_watch_end, say_notes};
use crate::audit::Audit;
use crate::config::{Action, Config, Format, Watch};
use crate::control::{Control, deadline};
use crate::finder;
use crate::finder::second_look::Looks;
use crate::history::History;
use crate::injector::engine::Rules;
use crate::injector::way::ByIterator;
use crate::memory;
use crate::model::{Coverage, Outcome, Scan, TimeAndPlace};
use crate::report::text::Rows;
use crate::report::{ExitStatus, Run, SocketCounts, exit_status, json};
use crate::sock_diag::Cookie;
use crate::terminal::{Terminal, is_coloured, say, write_out_unless};
use crate::text::{counted, seconds};

/// The pause between two lists.
const INTERVAL: Duration = Duration::from_millis(200);
/// A list of many sockets and processes takes at most one part in so many of the time.
const LIST_SHARE: u32 = 4;
/// The longest time from Ctrl-C to the end, if nothing is in flight.
const LONGEST_WAIT: Duration = Duration::from_millis(50);

/// The sockets are added to the history so often at least, so that they grow older while the watch runs.
const HISTORY_INTERVAL: Duration = Duration::from_secs(5);
/// A socket that was dealt with is forgotten when the lists have not had it for so long: a list can omit one for a moment.
const FORGET_AFTER: Duration = Duration::from_secs(60);
/// So many different messages are said. A watch may last for months.
const MAX_SAID: usize = 200;

/// What the rounds of a watch have done.
#[derive(Default)]
struct Rounds {
    known: Known,
    /// The number of sockets that were closed, or that failed; in a dry run, of those that would be closed.
    acts: usize,
    looks: Looks,
    /// The processes that were acted on without a question.
    unasked: confirm::Asked,
    is_agreed: bool,
    counts: SocketCounts,
    /// Whether a round was not complete.
    is_incomplete: bool,
    /// Whether the last list has failed.
    cannot_list: bool,
    /// What the last list could not see.
    coverage: Coverage,
    said: Said,
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
    report_watch_end(
        ended,
        unrecorded,
        &summary,
        config.format,
        config.action,
        rounds.exit_status(),
    )
}

/// Until the operator or a limit ends it. Returns whether the rows were written.
///
/// # Errors
/// The sockets cannot be listed at the start or for too long, there is too little memory, or the log cannot be written.
fn go_on(
    prepared: &Prepared,
    rounds: &mut Rounds,
    until: Option<Instant>,
    terminal: &Terminal,
) -> anyhow::Result<io::Result<()>> {
    let (config, proc) = (&prepared.config, &prepared.proc);
    let quiet = config.format == Format::Quiet;
    let mut history = History::open();
    let mut history_due = terminal.now();
    let mut listing = Patience::new(quiet);
    let mut is_first = true;
    loop {
        let begun = terminal.now();
        let listed = list(prepared, &history);
        let now = terminal.now();
        let lasted = now.saturating_duration_since(begun);
        let scan = listing.judge(listed, now)?;
        rounds.cannot_list = listing.is_failing();
        if let Some(mut scan) = scan {
            rounds.known.remove_from(&mut scan, now);
            let awaited = match config.action {
                Action::List => 0,
                _ => rounds.look(&mut scan, config, now),
            };
            let left = config.policy.max_kills;
            let left = left.map(|most| most.saturating_sub(rounds.acts));
            let scan = decide(scan, config, left, &prepared.privileges, proc);
            let is_new = !scan.targets.is_empty();
            if is_new || awaited > 0 || history_due <= now {
                // Before the act, so that no act makes a socket young for the next run.
                history.add(&scan, &config.selectors);
                history_due = now + HISTORY_INTERVAL;
                if !quiet {
                    say_notes(rounds.said.unsaid(history.take_notes()));
                }
            }
            let mut run = Run::new(scan);
            if is_new && !rounds.is_agreed(&run, config, terminal) {
                match rounds.acts {
                    0 => say(format_args!("nothing was closed")),
                    _ => say(format_args!("nothing more was closed")),
                }
                rounds.is_incomplete = true;
                return Ok(Ok(()));
            }
            rounds.known.add(&run.scan, now);
            if is_new && config.action == Action::Act {
                act(prepared, rounds, &mut run, terminal)?;
            } else if let Some(rules) = config.reclaim.as_ref().filter(|_| is_new) {
                reclaim_descriptors(&mut run, rules, proc, terminal);
            }
            rounds.add(&run);
            if (is_first || is_new) && !quiet {
                let messages = rounds.said.unsaid(messages(&run, config));
                messages.for_each(|message| say(format_args!("{message}")));
            }
            is_first = false;
            if is_new && let Err(error) = write(prepared, rounds, &run, terminal) {
                return Ok(Err(error));
            }
        }
        let is_done = config
            .policy
            .max_kills
            .is_some_and(|most| most <= rounds.acts);
        let next = terminal.now() + INTERVAL.max(lasted * LIST_SHARE);
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

/// The sockets that match now.
fn list(prepared: &Prepared, history: &History) -> anyhow::Result<Scan> {
    let (config, proc) = (&prepared.config, &prepared.proc);
    // A process that has come since may be in another namespace.
    let namespaces = finder::open_namespaces(&config.netns, &config.selectors, proc)?;
    Ok(find(config, &namespaces, history, proc)?)
}

fn act(
    prepared: &Prepared,
    rounds: &mut Rounds,
    run: &mut Run,
    terminal: &Terminal,
) -> anyhow::Result<()> {
    let (config, proc) = (&prepared.config, &prepared.proc);
    memory::check_room(run.scan.targets.len())?;
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
    if was_held_up && config.format != Format::Quiet {
        say_notes(rounds.said.unsaid([HELD_UP.to_owned()]));
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

fn write(
    prepared: &Prepared,
    rounds: &mut Rounds,
    run: &Run,
    terminal: &Terminal,
) -> io::Result<()> {
    let config = &prepared.config;
    match config.format {
        Format::Table => {
            let looks = (is_coloured(config.color), width(config.color));
            write_out_unless(terminal, |out| {
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
            write_out_unless(terminal, |out| json::write_lines(run, &time_and_place, out))
        }
        Format::Json | Format::Quiet => Ok(()),
    }
}

impl Rounds {
    /// Looks at sockets with unread bytes, and leaves them for later rounds until it has seen that they are not read. Returns how many of
    /// them are new.
    fn look(&mut self, scan: &mut Scan, config: &Config, now: Instant) -> usize {
        let (count, wait) = self.looks.defer(scan, &config.selectors, now);
        if count > 0 && config.format != Format::Quiet && io::stderr().is_terminal() {
            let message = format!(
                "sockets with unread bytes: each is watched for {} to see whether they are read (--min-idle)",
                seconds(wait)
            );
            let messages = self.said.unsaid([message]);
            messages.for_each(|message| say(format_args!("{message}")));
        }
        count
    }

    /// Asks once, before an act on a second process, as without a watch.
    fn is_agreed(&mut self, run: &Run, config: &Config, terminal: &Terminal) -> bool {
        let asks = config.action == Action::Act && config.asks && config.owners;
        if self.is_agreed || !asks || !confirm::is_possible() {
            return true;
        }
        match confirm::question(run, config, &self.unasked) {
            None => {
                self.unasked.extend(confirm::processes(run));
                true
            }
            Some(question) => {
                self.is_agreed = terminal.while_idle(|| confirm::agrees(&question));
                self.is_agreed
            }
        }
    }

    fn add(&mut self, run: &Run) {
        let acts = run
            .scan
            .targets
            .iter()
            .filter(|target| match target.outcome {
                None => target.plan.skip.is_none(),
                Some(outcome) => !matches!(outcome, Outcome::Gone | Outcome::Skipped(_)),
            });
        self.acts += acts.count();
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
            _ if self.is_incomplete || self.cannot_list => ExitStatus::NotAllClosed,
            0 if self.coverage.may_have_missed() => ExitStatus::NotAllClosed,
            0 => ExitStatus::NothingMatched,
            _ => ExitStatus::Done,
        }
    }
}

/// The sockets that were dealt with, and when a list had them last.
#[derive(Default)]
struct Known(HashMap<Cookie, Instant>);

impl Known {
    /// Removes those of `scan` that are known.
    fn remove_from(&mut self, scan: &mut Scan, now: Instant) {
        scan.targets
            .retain(|target| match self.0.get_mut(&target.socket.cookie()) {
                Some(listed) => {
                    *listed = now;
                    false
                }
                None => true,
            });
        self.0
            .retain(|_, listed| now.saturating_duration_since(*listed) < FORGET_AFTER);
    }

    fn add(&mut self, scan: &Scan, now: Instant) {
        let targets = scan.targets.iter();
        self.0
            .extend(targets.map(|target| (target.socket.cookie(), now)));
    }
}

/// The kinds of messages that were said.
#[derive(Default)]
struct Said(HashSet<String>);

impl Said {
    /// Those of `messages` of which none of the same kind was said. Their numbers do not count.
    fn unsaid(
        &mut self,
        messages: impl IntoIterator<Item = String>,
    ) -> impl Iterator<Item = String> {
        messages.into_iter().filter(|message| {
            let kind: String = message.chars().filter(|c| !c.is_ascii_digit()).collect();
            self.0.len() < MAX_SAID && self.0.insert(kind)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Socket, Target};
    use crate::sock_diag::testdata::stuck;

    #[test]
    fn what_is_not_listed_any_more_is_forgotten() {
        let start = Instant::now();
        let mut known = Known::default();
        let scan = |cookies: std::ops::Range<u64>| Scan {
            targets: cookies
                .map(|cookie| {
                    let message = stuck("10.0.0.1:80", "10.0.0.2:5", cookie);
                    Target::new(Socket::from_message(&message))
                })
                .collect(),
            ..Scan::default()
        };
        known.add(&scan(1..4), start);
        let mut left = |cookies, after| {
            let mut scan = scan(cookies);
            known.remove_from(&mut scan, start + after);
            (scan.targets.len(), known.0.len())
        };
        assert_eq!(left(1..6, FORGET_AFTER / 2), (2, 3));
        assert_eq!(left(1..3, FORGET_AFTER), (0, 3));
        assert_eq!(left(1..3, FORGET_AFTER * 3 / 2), (0, 2));
        assert_eq!(left(3..4, FORGET_AFTER * 2), (1, 2));
    }

    #[test]
    fn a_message_is_said_once_whatever_its_numbers_are() {
        let mut said = Said::default();
        let mut new = |message: &str| said.unsaid([message.to_owned()]).count();
        assert_eq!((new("note: 3 in use"), new("note: 14 in use")), (1, 0));
        assert_eq!(new("note: 3 younger"), 1);
        let many = (0..1000).map(|at| "x".repeat(at + 1)).collect::<Vec<_>>();
        assert!(many.iter().map(|it| new(it)).sum::<usize>() < MAX_SAID);
    }
}
