//! `cwkill gateway --watch`: ends the connections that match, or lists them, as they come.
//!
//! It hears the events of conntrack from before the first list of the table on, so no connection falls between the two. Each connection is
//! dealt with as soon as it is open: before, its ends have no numbers that could be asked for.

use std::io;
use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context;

use super::gateway::act_on;
use super::{
    drop_capabilities_and_start_threads, open_log, say_notes, time_and_place, was_reported,
};
use crate::audit::Audit;
use crate::config::{Action, Format, GatewayConfig, Watch};
use crate::conntrack::{self, Conntrack, Entry, Events, Timeouts};
use crate::control::{Control, deadline};
use crate::finder::arrivals::Arrivals;
use crate::finder::forwarded;
use crate::injector::gateway::{self as injector, LinkNetwork, Pace};
use crate::model::{ForwardedOutcome, ForwardedScan, Method, TimeAndPlace};
use crate::privileges::capabilities;
use crate::report::ExitStatus;
use crate::report::gateway::watch::{Rows, Watched};
use crate::report::gateway::{self as report, ForwardedRun};
use crate::terminal::{Terminal, say, write_out};

/// The longest time from Ctrl-C to the end, if nothing is in flight.
const LONGEST_WAIT: Duration = Duration::from_millis(50);
/// The pause between two looks at an entry of which there may be no event.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// The time between two lists of the table, where there are events: not every entry has them.
const LIST_INTERVAL: Duration = Duration::from_secs(10);
/// The same where there are none.
const LIST_INTERVAL_WITHOUT_EVENTS: Duration = Duration::from_millis(200);
/// Lists of a large table take at most one part in so many of the time.
const LIST_SHARE: u32 = 10;
/// Paths change while a watch runs, so they are not used for longer.
const PATHS_LAST: Duration = Duration::from_secs(2);
/// After Ctrl-C, what is in flight gets this long.
const FINISH_WITHIN: Duration = Duration::from_secs(10);

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
    let network = acts.then(open_network).transpose()?;
    if let (Some(log), Some(act)) = (&mut log, config.act) {
        log.begin_gateway_watch(act).context("nothing was done")?;
    }
    let begun = terminal.now();
    let mut watching = Watching {
        config,
        time_and_place,
        arrivals: Arrivals::new(&config.selectors),
        events,
        list_due: begun,
        has_events: conntrack::sends_events() != Some(false),
        table,
        timeouts,
        network,
        pace: Pace::new(config.rate),
        log,
        rows: Rows::new(config, acts),
        watched: Watched::new(config.act, acts),
        control: &terminal,
    };
    if !watching.has_events && !quiet {
        say_notes([
            "conntrack sends no events here (net.netfilter.nf_conntrack_events is 0): its table is listed again and again, so more \
             bytes pass before a connection is ended",
        ]);
    }
    if conntrack::table_use().is_none() && !quiet {
        say_notes(report::without_conntrack());
    }
    terminal.hold_signals();
    let until = watch.duration.map(|duration| deadline(begun, duration));
    let ended = watching.go_on(until);
    let Watching {
        log, mut watched, ..
    } = watching;
    let lasted = terminal.now().saturating_duration_since(begun);
    terminal.release_signals();
    let (written, failure) = match ended {
        Ok(End::Asked { left }) => {
            watched.not_reached = left;
            (Ok(()), None)
        }
        Ok(End::Unwritten(error)) => (Err(error), None),
        Err(error) => (Ok(()), Some(error)),
    };
    let summary = watched.summary(lasted);
    let unrecorded = log.and_then(|log| log.finish_gateway_watch(watched.counts, summary.clone()));
    drop(terminal);
    let written = written.and_then(|()| match config.format {
        Format::Table => write_out(|out| writeln!(out, "{summary}")),
        Format::JsonLines => {
            say(format_args!("{summary}"));
            Ok(())
        }
        Format::Json | Format::Quiet => Ok(()),
    });
    let has_acted = acts.then_some(summary.as_str());
    let reported = was_reported(written, unrecorded, has_acted)?;
    match failure {
        Some(error) => Err(error.context(format!("the watch has ended early ({summary})"))),
        None if reported => Ok(watched.exit_status()),
        None => Ok(ExitStatus::Impossible),
    }
}

fn open_network() -> anyhow::Result<(LinkNetwork, Instant)> {
    let network = LinkNetwork::open()
        .context("nothing was done: cannot open a packet socket, which needs CAP_NET_RAW")?;
    Ok((network, Instant::now()))
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
    has_events: bool,
    table: Conntrack,
    timeouts: Timeouts,
    /// With the time since when its paths are known; `None` if nothing is sent.
    network: Option<(LinkNetwork, Instant)>,
    pace: Pace,
    log: Option<Audit>,
    rows: Rows,
    watched: Watched,
    control: &'w dyn Control,
}

impl Watching<'_> {
    /// Until the operator or a limit ends it.
    ///
    /// # Errors
    /// Conntrack or the routes cannot be read, or the log cannot be written.
    fn go_on(&mut self, until: Option<Instant>) -> anyhow::Result<End> {
        let count = injector::batch_size(self.config.rate);
        loop {
            if self.control.now() >= self.list_due {
                self.list()?;
            }
            let Watching {
                arrivals, table, ..
            } = self;
            let entries = arrivals.take(count, |entry| table.lookup(entry));
            if let Err(error) = self.deal_with(entries)? {
                return Ok(End::Unwritten(error));
            }
            let is_over = until.is_some_and(|until| until <= self.control.now());
            if is_over || self.control.interrupted() {
                let left = self.arrivals.left();
                return Ok(End::Asked { left });
            }
            if self.kills_left() == Some(0) {
                return Ok(End::Asked { left: 0 });
            }
            let wait = self.longest_wait(until);
            let arrivals = &mut self.arrivals;
            if self.events.wait(wait, |event| arrivals.note(event))? {
                self.watched.losses += 1;
                self.list_due = self.control.now();
                if self.config.format != Format::Quiet {
                    say_notes([
                        "the kernel has sent events faster than they were read, and some are lost: the table is listed again",
                    ]);
                }
            }
        }
    }

    fn longest_wait(&self, until: Option<Instant>) -> Duration {
        if self.arrivals.left() > 0 {
            return Duration::ZERO;
        }
        let longest = match self.arrivals.has_again() {
            true => LOOK_AGAIN,
            false => LONGEST_WAIT,
        };
        let now = self.control.now();
        let due = until.map_or(self.list_due, |until| until.min(self.list_due));
        longest.min(due.saturating_duration_since(now))
    }

    /// How many connections may still be acted on; `None`: no limit.
    fn kills_left(&self) -> Option<usize> {
        let most = self.config.max_kills?;
        Some(most.saturating_sub(self.watched.planned))
    }

    /// Lists the table.
    fn list(&mut self) -> anyhow::Result<()> {
        let begun = self.control.now();
        let entries = forwarded::matching(&self.config.selectors, &mut self.table)?;
        self.arrivals.note_list(entries);
        let now = self.control.now();
        let interval = match self.has_events {
            true => LIST_INTERVAL,
            false => LIST_INTERVAL_WITHOUT_EVENTS,
        };
        let lasted = now.saturating_duration_since(begun);
        self.list_due = now + interval.max(lasted * LIST_SHARE);
        Ok(())
    }

    /// Acts on the connections of these entries, records and reports them. Returns whether the rows were written.
    ///
    /// # Errors
    /// The routes cannot be read, or the log cannot be written.
    fn deal_with(&mut self, entries: Vec<Entry>) -> anyhow::Result<io::Result<()>> {
        if entries.is_empty() {
            return Ok(Ok(()));
        }
        let selectors = &self.config.selectors;
        let mut scan = forwarded::sort_out(entries, selectors, self.timeouts.clone())?;
        if let Some(act) = self.config.act {
            forwarded::limit(&mut scan, selectors, act, self.kills_left());
        }
        let mut run = ForwardedRun {
            scan,
            act: self.config.act,
            acted: false,
        };
        if self.network.is_some() && !run.scan.connections.is_empty() {
            self.act(&mut run)?;
        }
        self.watched.add(&run);
        Ok(self.write(&run))
    }

    fn act(&mut self, run: &mut ForwardedRun) -> anyhow::Result<()> {
        if let Some(log) = &mut self.log {
            log.intend_gateway(run)
                .context("the log cannot be written")?;
        }
        let is_old = |since: Instant| since.elapsed() >= PATHS_LAST;
        if self
            .network
            .as_ref()
            .is_some_and(|(_, since)| is_old(*since))
        {
            self.network = Some(open_network()?);
        }
        let (Some((network, _)), Some(act)) = (&mut self.network, self.config.act) else {
            return Ok(());
        };
        let control = Finishing::new(self.control);
        act_on(
            run,
            act,
            self.config,
            &mut self.table,
            network,
            &control,
            &mut self.pace,
        );
        if let Some(log) = &mut self.log {
            log.record_gateway(run);
        }
        // A new connection has its addresses, or its first SYN came twice.
        for connection in &run.scan.connections {
            if connection.outcome == Some(ForwardedOutcome::Gone) {
                self.arrivals.look_again(connection.entry.clone());
            }
        }
        Ok(())
    }

    fn write(&mut self, run: &ForwardedRun) -> io::Result<()> {
        let ForwardedScan { connections, .. } = &run.scan;
        if connections.is_empty() {
            return Ok(());
        }
        match self.config.format {
            Format::Table => write_out(|out| self.rows.write(run, self.config.verbose, out)),
            Format::JsonLines => {
                self.time_and_place.time = SystemTime::now();
                write_out(|out| report::json::write_lines(run, &self.time_and_place, out))
            }
            Format::Json | Format::Quiet => Ok(()),
        }
    }
}

/// Lets a batch of connections end in order after Ctrl-C: those that were asked get their RSTs and are verified.
struct Finishing<'c> {
    inner: &'c dyn Control,
    since: OnceLock<Instant>,
}

impl<'c> Finishing<'c> {
    fn new(inner: &'c dyn Control) -> Self {
        let since = OnceLock::new();
        Finishing { inner, since }
    }
}

impl Control for Finishing<'_> {
    fn now(&self) -> Instant {
        self.inner.now()
    }

    fn sleep(&self, duration: Duration) {
        self.inner.sleep(duration);
    }

    fn interrupted(&self) -> bool {
        if !self.inner.interrupted() {
            return false;
        }
        let now = self.now();
        let since = *self.since.get_or_init(|| now);
        now.saturating_duration_since(since) >= FINISH_WITHIN
    }

    fn progress(&self, method: Method, sockets: usize) {
        self.inner.progress(method, sockets);
    }
}
