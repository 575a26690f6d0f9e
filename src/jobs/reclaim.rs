//! `cwkill reclaim`: descriptors of dead sockets.

use anyhow::Context;

use super::{give_up_all_but, is_told, open_log, refuse, say_hints, say_notes};
use crate::cli::ReclaimArgs;
use crate::config::{Action, Format};
use crate::finder::netns::Which;
use crate::finder::owners::Proc;
use crate::privileges::{Need, least};
use crate::reclaim::command::{self, Config};
use crate::report::{ExitStatus, reclaim as report};
use crate::terminal::{Terminal, is_coloured, write_out};

pub(super) fn run(args: ReclaimArgs) -> anyhow::Result<ExitStatus> {
    let config = &Config::from_args(args).unwrap_or_else(|error| refuse(&error));
    let quiet = config.format == Format::Quiet;
    let audit = open_log(config.action, &config.log)?;
    let mut needed = least::to_find(&Which::All, true);
    needed.extend(least::to_reclaim());
    give_up_all_but(&needed);
    let mut terminal = Terminal::new(config.action == Action::Act, quiet)?;
    let proc = Proc::default();
    let mut run = command::find(config, &proc)?;
    let mut audit = audit.filter(|_| !run.descriptors.is_empty());
    if let Some(audit) = &mut audit {
        let begun = terminal.aside(|| audit.begin_reclaim(&run));
        begun.context("nothing was done")?;
    }
    command::carry_out(&mut run, config, &proc, &terminal);
    terminal.rest();
    let summary = || report::summary(&run, config);
    let unrecorded = audit.and_then(|audit| audit.finish_reclaim(&run, summary()));
    drop(terminal);
    let color = is_coloured(config.color);
    let written = write_out(|out| match config.format {
        Format::Table => report::write(&run, config, color, out),
        Format::Json => report::write_document(&run, out),
        Format::JsonLines => report::write_lines(&run, out),
        Format::Quiet => Ok(()),
    });
    if !quiet {
        say_notes(report::notes(&run));
        if report::lacks_rights(&run) {
            say_hints(&[Need::Ptrace]);
        }
    }
    let summary = run.acted.then(summary);
    match is_told(written, unrecorded, summary.as_deref())? {
        true => Ok(report::exit_status(&run)),
        false => Ok(ExitStatus::Impossible),
    }
}
