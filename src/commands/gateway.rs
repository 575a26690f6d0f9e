//! `cwkill gateway`: lists the connections that are routed through this host, or ends them.

use std::time::Duration;

use anyhow::Context;

use super::{
    drop_capabilities_and_start_threads, open_log, say_notes, time_and_place, was_reported,
};
use crate::config::{Action, Format, GatewayConfig};
use crate::conntrack::Conntrack;
use crate::control::Control;
use crate::finder::forwarded;
use crate::injector::gateway::{self, ForwardedRules, LinkNetwork, Pace};
use crate::model::ForwardedAct;
use crate::privileges::capabilities;
use crate::report::ExitStatus;
use crate::report::gateway::{self as report, ForwardedRun};
use crate::terminal::{Terminal, screen, write_out};

/// The hosts of the ends have the default of net.ipv4.tcp_invalid_ratelimit, or a setting that cannot be known here. They measure it in
/// jiffies.
const RETRY: Duration = Duration::from_millis(520);

pub(super) fn run(config: &GatewayConfig) -> anyhow::Result<ExitStatus> {
    let time_and_place = time_and_place();
    let quiet = config.format == Format::Quiet;
    let acts = config.action == Action::Act;
    if !quiet {
        say_notes(&config.notes);
    }
    let log = open_log(config.action, &config.log)?;
    drop_capabilities_and_start_threads(&capabilities::for_gateway(acts), None);
    let mut terminal = Terminal::new(acts, quiet)?;
    let mut scan = forwarded::find(&config.selectors)?;
    if let Some(act) = config.act {
        forwarded::limit(&mut scan, &config.selectors, act, config.max_kills);
    }
    let mut run = ForwardedRun {
        scan,
        act: config.act,
        acted: false,
    };
    let mut log = log.filter(|_| !run.scan.connections.is_empty());
    if let (Some(act), true) = (config.act, acts) {
        // Before the intents are logged: each must get an outcome.
        let mut sockets = Sockets::open()?;
        if let Some(log) = &mut log {
            let begun = terminal.aside(|| log.begin_gateway(&run));
            begun.context("nothing was done")?;
        }
        let pace = &mut Pace::new(config.rate);
        act_on(&mut run, act, config, &mut sockets, &terminal, pace);
    }
    terminal.release_signals();
    let summary = || report::summary(&run, config);
    let unrecorded = log.and_then(|log| log.finish_gateway(&run, summary()));
    drop(terminal);
    let columns = screen(config.color).map(|screen| screen.columns);
    let written = write_out(|out| match config.format {
        Format::Table => report::text::write(&run, config, columns, out),
        Format::Json => report::json::write_document(&run, &time_and_place, out),
        Format::JsonLines => report::json::write_lines(&run, &time_and_place, out),
        Format::Quiet => Ok(()),
    });
    if !quiet {
        say_notes(report::notes(&run, config));
    }
    let summary = run.acted.then(summary);
    match was_reported(written, unrecorded, summary.as_deref())? {
        true => Ok(report::exit_status(&run)),
        false => Ok(ExitStatus::Impossible),
    }
}

/// What an act needs.
pub(super) struct Sockets {
    pub table: Conntrack,
    pub network: LinkNetwork,
}

impl Sockets {
    /// # Errors
    /// A socket cannot be opened.
    pub(super) fn open() -> anyhow::Result<Self> {
        Ok(Sockets {
            network: LinkNetwork::open().context(
                "nothing was done: cannot open a packet socket, which needs CAP_NET_RAW",
            )?,
            table: Conntrack::open()
                .context("nothing was done: cannot open a socket to conntrack")?,
        })
    }
}

/// Asks and ends the connections.
pub(super) fn act_on(
    run: &mut ForwardedRun,
    act: ForwardedAct,
    config: &GatewayConfig,
    sockets: &mut Sockets,
    control: &dyn Control,
    pace: &mut Pace,
) {
    control.hold_signals();
    let rules = ForwardedRules {
        act,
        selectors: &config.selectors,
        timeouts: &run.scan.timeouts,
        rate: config.rate,
        retry: RETRY,
    };
    gateway::run(
        &mut run.scan.connections,
        &rules,
        &mut sockets.table,
        &mut sockets.network,
        control,
        pace,
    );
    run.acted = true;
}
