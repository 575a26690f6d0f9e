//! `cwkill reclaim`: closes the descriptors of dead sockets.

use std::io::{self, Write};
use std::sync::Arc;

use anyhow::Context;

use super::{
    drop_capabilities_and_start_threads, hint_line, kept, open_log, proc_with_names, refuse,
    time_and_place, typed_words, was_reported,
};
use crate::cli::ReclaimArgs;
use crate::config::{Action, Format, ReclaimConfig};
use crate::control::Control;
use crate::finder::dead::SuspectVerdict;
use crate::finder::leftovers::{self, Leftovers};
use crate::finder::selected;
use crate::memory;
use crate::model::Privilege;
use crate::privileges::capabilities;
use crate::proc::netns::NetnsScope;
use crate::proc::{ProcFs, RemoteFd, Unreadable};
use crate::reclaim::{self, ReclaimRules, ReclaimTarget};
use crate::report::ExitStatus;
use crate::report::advice::KeptBy;
use crate::report::reclaim::{self as report, DeadDescriptor, ReclaimRun};
use crate::terminal::{Terminal, broken, is_coloured, say, screen, write_out};

pub(super) fn run(args: ReclaimArgs) -> anyhow::Result<ExitStatus> {
    let host_root = args.owners.host_root.clone();
    let config = &ReclaimConfig::from_args(args).unwrap_or_else(|error| refuse(&error));
    let time_and_place = time_and_place();
    let quiet = config.format == Format::Quiet;
    let acts = config.action == Action::Act;
    let log = open_log(config.action, &config.log)?;
    let mut needed = capabilities::to_find(&NetnsScope::Current, true, false);
    if acts {
        needed.extend(capabilities::to_reclaim());
    }
    drop_capabilities_and_start_threads(&needed, None);
    let mut terminal = Terminal::new(acts, quiet)?;
    let proc = proc_with_names(&host_root, &config.selectors)?;
    let mut run = find(config, &proc)?;
    if acts {
        memory::check_room(run.descriptors.len()).context("nothing was done")?;
    }
    let mut log = log.filter(|_| !run.descriptors.is_empty());
    if let Some(log) = &mut log {
        let begun = terminal.aside(|| log.begin_reclaim(&run));
        begun.context("nothing was done")?;
    }
    match acts {
        true => close(&mut run, config, &proc, &terminal),
        false => reclaim::judge(&mut targets_of(&mut run.descriptors), &config.rules, &proc),
    }
    // Those that were not named may need less than force.
    let rules = ReclaimRules {
        force: false,
        ..config.rules
    };
    let by = KeptBy {
        rules: &rules,
        closed_sockets: false,
        predicted: !acts,
    };
    if acts {
        reclaim::judge(&mut targets_of(&mut run.not_named), &rules, &proc);
    }
    let all = run.descriptors.iter().chain(&run.not_named);
    run.advice = kept::advice(all.map(|dead| &dead.owner), by, &proc);
    terminal.release_signals();
    let summary = || report::summary(&run, config);
    let unrecorded = log.and_then(|log| log.finish_reclaim(&run, summary()));
    drop(terminal);
    let mut messages: Vec<String> = Vec::new();
    if !quiet {
        let notes = report::notes(&run).into_iter();
        messages.extend(notes.map(|note| format!("note: {note}")));
        if report::lacks_privileges(&run) {
            messages.extend(hint_line(&[Privilege::Ptrace]));
        }
    }
    let color = is_coloured(config.color);
    let is_screen = config.format == Format::Table && !config.verbose;
    let next = match is_screen && screen(config.color).is_some() {
        true => report::next::line(&run, config, &typed_words()),
        false => None,
    };
    let written = write_out(|out| match (config.format, screen(config.color)) {
        (Format::Table, Some(screen)) if !config.verbose => {
            let below = messages.iter();
            let below: Vec<String> = below
                .flat_map(|message| broken(&format!("cwkill: {message}")))
                .collect();
            report::screen::write(&run, config, screen, &below, next.as_ref(), out)
        }
        (Format::Table, screen) => {
            let columns = screen.map(|screen| screen.columns);
            report::text::write(&run, config, color, columns, out)
        }
        (Format::Json, _) => report::json::write_document(&run, &time_and_place, out),
        (Format::JsonLines, _) => report::json::write_lines(&run, &time_and_place, out),
        (Format::Quiet, _) => Ok(()),
    });
    for message in &messages {
        say(format_args!("{message}"));
    }
    let written = match next {
        Some(next) => written.and_then(|()| writeln!(io::stdout(), "{next}")),
        None => written,
    };
    let summary = run.acted.then(summary);
    match was_reported(written, unrecorded, summary.as_deref())? {
        true => Ok(report::exit_status(&run)),
        false => Ok(ExitStatus::Impossible),
    }
}

/// Finds the dead descriptors of the selected processes.
fn find(config: &ReclaimConfig, proc: &ProcFs) -> anyhow::Result<ReclaimRun> {
    let current = NetnsScope::Current
        .open(proc)
        .context("cannot find the network namespace of cwkill")?;
    let owners = selected::look(proc, &config.selectors).context("cannot list processes")?;
    if owners.nobody {
        return Ok(ReclaimRun {
            absent: owners.absent,
            owner_notes: owners.notes,
            ..ReclaimRun::default()
        });
    }
    let Leftovers {
        scan,
        elsewhere,
        without_address,
        without_name,
    } = leftovers::find(proc, &config.selectors, &current.open, config.everywhere)?;
    let everyone = !config.selectors.selects_owners();
    let unreadable = match everyone || config.selectors.could_match(&scan.unreadable) {
        true => &scan.unreadable[..],
        false => &[],
    };
    // If every process that was selected by its pid was read, none of them is hidden.
    let was_read = |pid: &i32| {
        let tables = scan.tables.iter().map(|table| &table.process);
        tables
            .chain(&scan.leader_exited)
            .any(|process| process.id.pid == *pid)
    };
    let pids = &config.selectors.pids;
    let mut run = ReclaimRun {
        unreadable: unreadable.len(),
        unreadable_names: Unreadable::names(unreadable),
        hidden: scan.hidden && (pids.is_empty() || !pids.iter().all(was_read)),
        leader_exited: scan.leader_exited,
        failed: scan.failed,
        absent: owners.absent,
        elsewhere,
        without_address,
        without_name,
        unnamed: owners.unnamed,
        owner_notes: owners.notes,
        ..ReclaimRun::default()
    };
    for table in scan.tables {
        let process = Arc::new(table.process);
        let is_chosen = |fd: RemoteFd| config.fds.is_empty() || config.fds.contains(&fd.0);
        for suspect in table.suspects {
            let is_chosen = is_chosen(suspect.fd);
            match suspect.verdict {
                SuspectVerdict::Dead(socket) => {
                    let dead = DeadDescriptor::new(&process, &suspect, socket);
                    match is_chosen {
                        true => run.descriptors.push(dead),
                        false => run.not_named.push(dead),
                    }
                }
                SuspectVerdict::Unknown(_) => run.unknown += usize::from(is_chosen),
                SuspectVerdict::NeverConnected => {}
            }
        }
    }
    Ok(run)
}

/// Closes the descriptors in their owners.
fn close(run: &mut ReclaimRun, config: &ReclaimConfig, proc: &ProcFs, control: &dyn Control) {
    control.hold_signals();
    if !run.descriptors.is_empty() {
        reclaim::let_owners_react(&config.rules, control);
    }
    let mut targets = targets_of(&mut run.descriptors);
    run.stops = reclaim::reclaim(&mut targets, &config.rules, proc, control);
    run.acted = true;
}

pub(super) fn targets_of(descriptors: &mut [DeadDescriptor]) -> Vec<ReclaimTarget<'_>> {
    descriptors
        .iter_mut()
        .map(|dead| ReclaimTarget::dead(&mut dead.owner, dead.inode, &dead.socket))
        .collect()
}
