//! `cwkill gateway --watch`: ends the connections that match, or lists them, as they come.
//!
//! It hears the events of conntrack from before the first list of the table on, so no connection falls between the two. Each connection is
//! dealt with as soon as it is open: before, its ends have no numbers that could be asked for.

use std::io;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context;

use super::gateway_workers::{self as workers, Workers};
use super::patience::Patience;
use super::{
    drop_capabilities_and_start_threads, open_log, report_watch_end, say_notes, time_and_place,
};
use crate::audit::Audit;
use crate::config::{Action, Format, GatewayConfig, Watch};
use crate::conntrack::{self, Conntrack, Events, EventsSent, Timeouts};
use crate::control::{Control, deadline};
use crate::finder::arrivals::Arrivals;
use crate::finder::forwarded;
use crate::injector::gateway as injector;
use crate::model::{
    EndState, Forwarded, ForwardedFailure, ForwardedOutcome, ForwardedScan, ForwardedSkip,
    TimeAndPlace,
};
use crate::privileges::capabilities;
use crate::report::ExitStatus;
use crate::report::gateway::watch::{Rows, Watched};
use crate::report::gateway::{self as report, ForwardedRun};
use crate::terminal::{Terminal, write_out_unless};

/// The longest time from Ctrl-C to the end, if nothing is in flight.
const LONGEST_WAIT: Duration = Duration::from_millis(50);
/// The time between two lists of the table, where there are events: not every entry has them.
const LIST_INTERVAL: Duration = Duration::from_secs(10);
/// The same where there are none.
const LIST_INTERVAL_WITHOUT_EVENTS: Duration = Duration::from_millis(200);
/// Lists of a large table take at most one part in so many of the time.
const LIST_SHARE: u32 = 10;
/// Losses of events are said no more often.
const SAY_LOSS_INTERVAL: Duration = Duration::from_secs(10);
/// The pause after a failure that may pass.
const RETRY_PAUSE: Duration = Duration::from_millis(200);
/// At the end so many connections are looked up at most, to say how many were not reached. The operator waits for that.
const MAX_COUNTED_AT_END: usize = 10_000;
/// The same while connections are in flight.
const WAIT_IN_FLIGHT: Duration = Duration::from_millis(5);

/// The whole watch, from its configuration to its exit status.
pub(super) fn run(config: &GatewayConfig, watch: Watch) -> anyhow::Result<ExitStatus> {
    let time_and_place = time_and_place();
    let quiet = config.format == Format::Quiet;
    let acts = config.action == Action::Act;
    if !quiet {
        say_notes(&config.notes);
    }
    let mut log = open_log(config.action, &config.log)?;
    drop_capabilities_and_start_threads(&capabilities::for_gateway(acts), None);
    // It shows no progress: the rows do.
    let mut terminal = Terminal::new(true, true)?;
    // Before the first list, so that nothing falls between.
    let events = Events::open()?;
    let mut table = Conntrack::open()?;
    let timeouts = conntrack::timeouts(&mut table);
    let sockets = acts.then(|| workers::open(config)).transpose()?;
    if let (Some(log), Some(act)) = (&mut log, config.act) {
        log.begin_gateway_watch(act).context("nothing was done")?;
    }
    let begun = terminal.now();
    let why_no_events = conntrack::events_sent().and_then(EventsSent::why_none);
    let mut watching = Watching {
        config,
        time_and_place,
        arrivals: Arrivals::new(&config.selectors),
        events,
        list_due: begun,
        list_allowed: begun,
        loss_said: None,
        listing: Patience::new(quiet),
        hearing: Patience::new(quiet),
        sorting: Patience::new(quiet),
        has_events: why_no_events.is_none(),
        table,
        timeouts,
        workers: None,
        planned: 0,
        log,
        rows: Rows::new(config, acts),
        watched: Watched::new(config.act, acts),
        control: &terminal,
    };
    if let Some(why) = why_no_events.filter(|_| !quiet) {
        say_notes([format!(
            "conntrack sends no events here ({why}): its table is listed again and again, so more bytes pass before a connection is ended"
        )]);
    }
    if conntrack::table_use().is_none() && !quiet {
        say_notes(report::without_conntrack());
    }
    terminal.hold_signals();
    let until = watch.duration.map(|duration| deadline(begun, duration));
    let ended = std::thread::scope(|scope| {
        if let (Some(sockets), Some(act)) = (sockets, config.act) {
            watching.workers = Some(Workers::start(scope, sockets, act, config, &terminal));
        }
        let ended = watching.go_on(until);
        watching.workers = None;
        ended
    });
    let Watching {
        log, mut watched, ..
    } = watching;
    let lasted = terminal.now().saturating_duration_since(begun);
    terminal.release_signals();
    let ended = ended.map(|end| match end {
        End::Asked { left } => {
            watched.not_reached = left;
            Ok(())
        }
        End::Unwritten(error) => Err(error),
    });
    let summary = watched.summary(lasted);
    let unrecorded = log.and_then(|log| log.finish_gateway_watch(watched.counts, summary.clone()));
    drop(terminal);
    report_watch_end(
        ended,
        unrecorded,
        &summary,
        config.format,
        config.action,
        watched.exit_status(),
    )
}

/// Why a watch has ended.
enum End {
    /// The operator wanted it: by Ctrl-C, `--for` or `--max-kills`.
    Asked {
        /// The number of connections that are known and were not reached.
        left: usize,
    },
    /// The rows could not be written.
    Unwritten(io::Error),
}

/// A watch.
struct Watching<'w> {
    config: &'w GatewayConfig,
    time_and_place: TimeAndPlace,
    arrivals: Arrivals<'w>,
    events: Events,
    /// When the table is listed next.
    list_due: Instant,
    /// It is not listed before, even after a loss of events: a list of a large table takes longer than the queue of the events lasts.
    list_allowed: Instant,
    /// When a loss was said last.
    loss_said: Option<Instant>,
    listing: Patience,
    hearing: Patience,
    /// Which connections end on this host.
    sorting: Patience,
    has_events: bool,
    table: Conntrack,
    timeouts: Timeouts,
    /// `None` if nothing is sent.
    workers: Option<Workers>,
    /// The number of connections that are to be asked, or were. It does not count those that were gone by then.
    planned: usize,
    log: Option<Audit>,
    rows: Rows,
    watched: Watched,
    control: &'w dyn Control,
}

impl Watching<'_> {
    /// The whole watch. What is in flight at its end is verified, recorded and reported, whatever the reason.
    ///
    /// # Errors
    /// Conntrack or the routes cannot be read at the start or for too long, or the log cannot be written.
    fn go_on(&mut self, until: Option<Instant>) -> anyhow::Result<End> {
        let ended = self.until_over(until);
        let mut written = Ok(());
        while self.is_busy() {
            written = written.and(self.take_done()?);
            self.control.sleep(WAIT_IN_FLIGHT);
        }
        match (ended?, written) {
            (End::Asked { .. }, Err(error)) => Ok(End::Unwritten(error)),
            (ended, _) => Ok(ended),
        }
    }

    /// Until the operator or a limit ends it.
    fn until_over(&mut self, until: Option<Instant>) -> anyhow::Result<End> {
        loop {
            if self.control.now() >= self.list_due {
                self.list()?;
            }
            if let Err(error) = self.take_done()? {
                return Ok(End::Unwritten(error));
            }
            if let Err(error) = self.deal_with_next()? {
                return Ok(End::Unwritten(error));
            }
            let is_over = until.is_some_and(|until| until <= self.control.now());
            if is_over || self.control.interrupted() {
                let left = self.not_reached();
                return Ok(End::Asked { left });
            }
            // One that is in flight may turn out to be gone.
            if self.kills_left() == Some(0) && !self.is_busy() {
                return Ok(End::Asked { left: 0 });
            }
            let wait = self.longest_wait(until);
            let arrivals = &mut self.arrivals;
            let heard = self.events.wait(wait, |event| arrivals.note(event));
            let heard = heard.context("cannot hear the events of conntrack");
            match self.hearing.judge(heard, self.control.now())? {
                Some(false) => {}
                Some(true) => self.note_loss(),
                None => self.control.sleep(LONGEST_WAIT),
            }
        }
    }

    fn note_loss(&mut self) {
        let now = self.control.now();
        self.watched.losses += 1;
        self.list_due = self.list_due.min(self.list_allowed.max(now));
        let was_said = |said: Instant| now.saturating_duration_since(said) < SAY_LOSS_INTERVAL;
        if self.config.format == Format::Quiet || self.loss_said.is_some_and(was_said) {
            return;
        }
        self.loss_said = Some(now);
        say_notes([
            "the kernel has sent events faster than they were read, and some are lost: the table is listed again",
        ]);
    }

    fn is_busy(&self) -> bool {
        self.workers.as_ref().is_some_and(Workers::is_busy)
    }

    /// The number of connections that are known, match, and were not dealt with.
    fn not_reached(&mut self) -> usize {
        if self.kills_left() == Some(0) {
            return 0;
        }
        let now = self.control.now();
        let Watching {
            arrivals, table, ..
        } = self;
        let entries = arrivals.take(MAX_COUNTED_AT_END, true, now, |entry| table.lookup(entry));
        let (count, more) = (entries.len(), arrivals.left(true));
        let selectors = &self.config.selectors;
        let connections = entries.into_iter().map(|it| Forwarded::new(it, None));
        let connections = connections.collect();
        let Ok(mut scan) = forwarded::sort_out(connections, selectors, self.timeouts.clone())
        else {
            return count + more;
        };
        if let Some(act) = self.config.act {
            forwarded::limit(&mut scan, selectors, act, None);
        }
        let connections = scan.connections.iter();
        connections.filter(|one| one.skip.is_none()).count() + more
    }

    /// Whether connections from the list can be dealt with: the last free worker is for those that have just come. `None`: none can.
    fn takes_listed(&self) -> Option<bool> {
        match &self.workers {
            _ if self.kills_left() == Some(0) => None,
            None => Some(true),
            Some(workers) if workers.free() == 0 => None,
            Some(workers) => Some(!workers.is_last_free()),
        }
    }

    fn longest_wait(&self, until: Option<Instant>) -> Duration {
        let takes_listed = self.takes_listed();
        if takes_listed.is_some_and(|takes_listed| self.arrivals.left(takes_listed) > 0) {
            return Duration::ZERO;
        }
        let longest = match self.is_busy() {
            true => WAIT_IN_FLIGHT,
            false => LONGEST_WAIT,
        };
        let now = self.control.now();
        let dues = [until, takes_listed.and(self.arrivals.next_look())];
        let due = dues.into_iter().flatten().fold(self.list_due, Instant::min);
        longest.min(due.saturating_duration_since(now))
    }

    /// How many connections may still be acted on; `None`: no limit.
    fn kills_left(&self) -> Option<usize> {
        let most = self.config.max_kills?;
        Some(most.saturating_sub(self.planned))
    }

    /// Lists the table.
    ///
    /// # Errors
    /// It cannot be listed at the start, or for too long.
    fn list(&mut self) -> anyhow::Result<()> {
        let begun = self.control.now();
        let listed = forwarded::matching(&self.config.selectors, &mut self.table);
        let now = self.control.now();
        let lasted = now.saturating_duration_since(begun);
        let listed = self.listing.judge(listed.map_err(Into::into), now)?;
        let interval = match (&listed, self.has_events) {
            (None, _) => RETRY_PAUSE,
            (Some(_), true) => LIST_INTERVAL,
            (Some(_), false) => LIST_INTERVAL_WITHOUT_EVENTS,
        };
        if let Some(entries) = listed {
            self.arrivals.note_list(entries, now);
        }
        self.list_allowed = now + lasted * LIST_SHARE;
        self.list_due = self.list_allowed.max(now + interval);
        Ok(())
    }

    /// Records and reports what the workers have done. Returns whether the rows were written.
    ///
    /// # Errors
    /// A thread has panicked.
    fn take_done(&mut self) -> anyhow::Result<io::Result<()>> {
        let done = match &mut self.workers {
            Some(workers) => workers.done()?,
            None => Vec::new(),
        };
        let mut written = Ok(());
        for run in done {
            for connection in &run.scan.connections {
                self.arrivals.ended(&connection.entry);
                let planned = connection.skip.is_none();
                if planned && !counts_as_act(connection) {
                    self.planned = self.planned.saturating_sub(1);
                }
                if may_come_back(connection) {
                    let now = self.control.now();
                    self.arrivals.retry(connection.entry.clone(), now);
                }
            }
            if let Some(log) = &mut self.log {
                log.record_gateway(&run);
            }
            self.watched.add(&run);
            written = written.and(self.write(&run));
        }
        Ok(written)
    }

    /// Gives the next connections to a worker, or only reports them. Returns whether the rows were written.
    ///
    /// # Errors
    /// The routes or the sockets cannot be read at the start or for too long, or the log cannot be written.
    fn deal_with_next(&mut self) -> anyhow::Result<io::Result<()>> {
        let Some(takes_listed) = self.takes_listed() else {
            return Ok(Ok(()));
        };
        let rate = match &self.workers {
            Some(workers) => workers.rate_of_each(),
            None => self.config.rate,
        };
        let most = self.kills_left().unwrap_or(usize::MAX);
        let count = injector::batch_size(rate).min(most);
        let now = self.control.now();
        let Watching {
            arrivals, table, ..
        } = self;
        let entries = arrivals.take(count, takes_listed, now, |entry| table.lookup(entry));
        if entries.is_empty() {
            return Ok(Ok(()));
        }
        let selectors = &self.config.selectors;
        let connections = entries.iter().cloned().map(|it| Forwarded::new(it, None));
        let connections = connections.collect();
        let sorted = forwarded::sort_out(connections, selectors, self.timeouts.clone());
        let Some(mut scan) = self.sorting.judge(sorted, now)? else {
            for entry in entries {
                self.arrivals.put_back(entry);
            }
            self.control.sleep(RETRY_PAUSE);
            return Ok(Ok(()));
        };
        if let Some(act) = self.config.act {
            forwarded::limit(&mut scan, selectors, act, self.kills_left());
        }
        let run = ForwardedRun {
            scan,
            act: self.config.act,
            acted: false,
        };
        let planned = run.scan.connections.iter();
        self.planned += planned.filter(|one| one.skip.is_none()).count();
        let Some(workers) = self
            .workers
            .as_mut()
            .filter(|_| !run.scan.connections.is_empty())
        else {
            self.watched.add(&run);
            return Ok(self.write(&run));
        };
        if let Some(log) = &mut self.log {
            log.intend_gateway(&run)
                .context("the log cannot be written")?;
        }
        for connection in &run.scan.connections {
            self.arrivals.began(&connection.entry);
        }
        workers.give(run)?;
        Ok(Ok(()))
    }

    fn write(&mut self, run: &ForwardedRun) -> io::Result<()> {
        let ForwardedScan { connections, .. } = &run.scan;
        if connections.is_empty() {
            return Ok(());
        }
        match self.config.format {
            Format::Table => write_out_unless(self.control, |out| {
                self.rows.write(run, self.config.verbose, out)
            }),
            Format::JsonLines => {
                self.time_and_place.time = SystemTime::now();
                write_out_unless(self.control, |out| {
                    report::json::write_lines(run, &self.time_and_place, out)
                })
            }
            Format::Json | Format::Quiet => Ok(()),
        }
    }
}

/// Whether a connection counts for `--max-kills`: it was there, and its ends were asked.
fn counts_as_act(connection: &Forwarded) -> bool {
    let mut ends = connection.ends.iter();
    match connection.outcome {
        // Whoever had it has lost it by an RST, and a new one came at once.
        Some(ForwardedOutcome::Gone) => ends.any(|end| end.resets > 0),
        _ => ends.any(|end| end.first != EndState::NotAsked),
    }
}

/// Whether the entry is worth another look: a new connection has its addresses, its first SYN came twice, or the routes could not be read.
fn may_come_back(connection: &Forwarded) -> bool {
    match connection.outcome {
        Some(ForwardedOutcome::Gone) => !connection.both_had_forgotten(),
        Some(
            ForwardedOutcome::Skipped(ForwardedSkip::NoLongerSelected)
            | ForwardedOutcome::Failed(ForwardedFailure::RoutesUnreadable(_)),
        ) => true,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conntrack::Entry;
    use crate::model::EndReport;

    #[test]
    fn what_was_gone_does_not_count_for_the_limit() {
        use ForwardedOutcome::{Cut, Gone, Skipped};
        let example = Entry::example("10.0.0.1:5", "10.0.0.2:80");
        let judged = |outcome, first, resets| {
            let mut connection = Forwarded::new(example.clone(), None);
            connection.outcome = Some(outcome);
            connection.ends[0] = EndReport {
                first,
                now: first,
                resets,
            };
            (counts_as_act(&connection), may_come_back(&connection))
        };
        assert_eq!(judged(Cut, EndState::Alive, 1), (true, false));
        assert_eq!(judged(Gone, EndState::Alive, 0), (false, true));
        assert_eq!(judged(Gone, EndState::Alive, 1), (true, true));
        assert_eq!(judged(Gone, EndState::NotAsked, 0), (false, true));
        let changed = Skipped(ForwardedSkip::NoLongerSelected);
        assert_eq!(judged(changed, EndState::NotAsked, 0), (false, true));
    }
}
