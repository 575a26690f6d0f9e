//! `cwkill` without a command: lists what is stuck, or closes it.

use std::io::{self, IsTerminal, Write};

use anyhow::Context;

use super::{drop_all_but, is_told, open_log, refuse, say_hints, say_notes};
use crate::cli::Args;
use crate::config::{Action, Config, Format};
use crate::injector::engine::Control;
use crate::pipeline::{self, Run};
use crate::privileges::{Privilege, Privileges, drop};
use crate::proc::ProcFs;
use crate::report::{ExitStatus, exit_status, json, notes, text};
use crate::terminal::{Terminal, is_coloured, say, write_out};
use crate::watch;

pub(super) fn run(args: Args) -> anyhow::Result<ExitStatus> {
    let config = &Config::from_args(args).unwrap_or_else(|error| refuse(&error));
    if config.format != Format::Quiet {
        say_notes(&config.notes);
    }
    // What may be planned is told by what was granted, also where nothing of it is used.
    let privileges = Privileges::of_this_thread()?;
    let audit = open_log(config.action, &config.log)?;
    let mut needed = drop::to_find(&config.netns, config.owners);
    if config.action == Action::Act {
        needed.extend(drop::to_act(&config.policy.methods));
        if config.reclaim.is_some() {
            needed.extend(drop::to_reclaim());
        }
    }
    drop_all_but(&needed);
    let quiet = config.format == Format::Quiet;
    let mut terminal = Terminal::new(config.action == Action::Act, quiet)?;
    let proc = ProcFs::default();
    let mut run = match &audit {
        None => pipeline::sweep_and_plan(config, &proc, &privileges, &terminal)?,
        // What is to be done is recorded first.
        Some(_) => pipeline::plan(config, &proc, &privileges)?,
    };
    // A run that has nothing to do leaves no record.
    let mut audit = audit.filter(|_| !run.plans.is_empty());
    if let Some(audit) = &mut audit {
        let begun = terminal.aside(|| audit.begin(&run));
        begun.context("nothing was done")?;
    }
    pipeline::carry_out(&mut run, config, &proc, &privileges, &terminal);
    // From here a signal ends the program again: a log on a disk or behind a pipe that hangs must not hold the operator.
    terminal.rest();
    let unrecorded = audit.and_then(|audit| audit.finish(&run, text::summary(&run, config)));
    // A document has room for what comes later; a person reads the results meanwhile.
    let early = config.format == Format::Json;
    let mut line = None;
    if early {
        line = watch(&mut run, config, &mut terminal);
    }
    let written = report(&run, config);
    messages(&run, config);
    if !early && written.is_ok() {
        line = watch(&mut run, config, &mut terminal);
    }
    drop(terminal);
    let written = match (line, config.format) {
        (Some(line), Format::Table) => written.and_then(|()| writeln!(io::stdout(), "{line}")),
        (Some(line), _) => {
            say(format_args!("note: {line}"));
            written
        }
        (None, _) => written,
    };
    let summary = run.deeds.is_some().then(|| text::summary(&run, config));
    if !is_told(written, unrecorded, summary.as_deref())? {
        return Ok(ExitStatus::Impossible);
    }
    let status = exit_status(&run);
    // The program ends here; a large result takes a while to give back piece by piece.
    std::mem::forget(run);
    Ok(status)
}

/// Watches for new stuck sockets, if that is asked for and something was done, and says what came.
fn watch(run: &mut Run, config: &Config, terminal: &mut Terminal) -> Option<String> {
    let duration = config.watch_refill?;
    if run.deeds.is_none() || terminal.interrupted() {
        return None;
    }
    if io::stderr().is_terminal() {
        let time = crate::text::seconds(duration);
        say(format_args!(
            "watching for new stuck sockets for {time}; Ctrl-C ends it"
        ));
    }
    // Ctrl-C ends the watch, and what was seen is told.
    terminal.begin();
    let refill = watch::watch(run, config, duration, &ProcFs::default(), terminal);
    terminal.rest();
    match refill {
        Ok(refill) => {
            let line = refill.line(config);
            run.refill = Some(refill);
            Some(line)
        }
        Err(error) => {
            let error = anyhow::Error::from(error);
            say(format_args!(
                "note: whether new ones came could not be seen: {error:#}"
            ));
            None
        }
    }
}

fn report(run: &Run, config: &Config) -> io::Result<()> {
    let color = is_coloured(config.color);
    write_out(|out| match config.format {
        Format::Table => text::write(run, config, color, out),
        Format::Json => json::write_document(run, out),
        Format::JsonLines => json::write_lines(run, out),
        Format::Quiet => Ok(()),
    })
}

/// What the operator should know beside the results, on stderr.
fn messages(run: &Run, config: &Config) {
    if config.format == Format::Quiet {
        return;
    }
    say_notes(notes::notes(run));
    let matters = |need: &Privilege| config.action != Action::List || *need == Privilege::Ptrace;
    let missing = notes::missing_privileges(run).into_iter();
    say_hints(&missing.filter(matters).collect::<Vec<_>>());
}
