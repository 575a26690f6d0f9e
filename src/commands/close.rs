//! `cwkill` without a command: lists the stuck sockets, or closes them.

use std::collections::{BTreeSet, HashMap};
use std::io::{self, IsTerminal, Write};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, ensure};
use clap::ColorChoice;

use super::reclaim::targets_of;
use super::{
    confirm, drop_capabilities_and_start_threads, hint_line, kept, open_destroyer, open_log,
    open_proc, refuse, say_notes, time_and_place, typed_words, was_reported,
};
use crate::audit::Audit;
use crate::bpf::KernelTypes;
use crate::cli::Args;
use crate::config::{Action, Config, DEFAULT_RECLAIM_RULES, Format, Limit};
use crate::control::Control;
use crate::diagnose::limit::is_reached;
use crate::drain;
use crate::finder::dead::SuspectVerdict;
use crate::finder::way::UseIterator;
use crate::finder::{
    self, FindError, leftovers, reactions, second_look, still_open, table_use, tracked,
};
use crate::history::History;
use crate::injector::canary::{self, Canaries};
use crate::injector::engine::Rules;
use crate::injector::way::ByIterator;
use crate::injector::{plan, workers};
use crate::memory;
use crate::model::{Method, Outcome, Privilege, ReclaimOutcome, Scan, Target, TimeAndPlace};
use crate::privileges::{Privileges, capabilities};
use crate::proc::netns::Namespaces;
use crate::proc::{FdState, ProcFs, ProcessId};
use crate::reclaim::{self, ReclaimRules, ReclaimTarget};
use crate::report::advice::{Advice, KeptBy, reclaim_command};
use crate::report::overview::Overview;
use crate::report::reclaim::DeadDescriptor;
use crate::report::{DeadOfProcess, ExitStatus, Run, backlogs, exit_status, json, notes, text};
use crate::terminal::{Terminal, broken, is_coloured, say, screen, write_out};
use crate::text::{counted, seconds};
use crate::watch::{self, WatchScope};

/// Why sockets were not judged at the instant of the act although the iterator can be used.
pub(super) const HELD_UP: &str = "an owner hangs and keeps the lock of its TCP socket, so the iterator could not walk on; a process \"cwkill-walk\" \
                       ends when the lock is free";

/// What a run needs. The privileges that it does not need are dropped.
pub(super) struct Prepared {
    pub config: Config,
    pub time_and_place: TimeAndPlace,
    pub privileges: Privileges,
    pub proc: ProcFs,
    pub destroyer: Option<ByIterator>,
    pub log: Option<Audit>,
}

/// Everything before the search.
///
/// # Errors
/// The log cannot be written, or the iterator is needed and cannot be used.
pub(super) fn prepare(args: Args) -> anyhow::Result<Prepared> {
    let (use_iterator, verbose) = (args.selection.bpf, args.output.verbose);
    let host_root = args.selection.owners.host_root.clone();
    let config = Config::from_args(args).unwrap_or_else(|error| refuse(&error));
    let time_and_place = time_and_place();
    let acts = config.action == Action::Act;
    if config.format != Format::Quiet {
        say_notes(&config.notes);
    }
    // Read before privileges are dropped: the plan depends on the granted ones, even in a dry run that uses none.
    let privileges = Privileges::of_this_thread()?;
    let log = open_log(config.action, &config.log)?;
    let types = KernelTypes::default();
    let proc = match config.owners {
        true => open_proc(use_iterator, verbose, &host_root, &config.selectors, &types)?,
        false => ProcFs::default(),
    };
    let destroys = acts && config.policy.methods.contains(&Method::Destroy);
    ensure!(
        !destroys || privileges.net_admin || use_iterator != UseIterator::Always,
        "cannot use the iterator (--bpf always): the method destroy needs CAP_NET_ADMIN by each way; leave it out (for example --method shutdown), or leave --bpf always out",
    );
    let destroyer = match destroys && privileges.net_admin {
        true => open_destroyer(use_iterator, verbose, &proc, &types)?,
        false => None,
    };
    // They take 10 MB.
    drop(types);
    drop_capabilities_and_start_threads(&needed_capabilities(&config), Some(&proc));
    Ok(Prepared {
        config,
        time_and_place,
        privileges,
        proc,
        destroyer,
        log,
    })
}

/// The whole run, to its exit status.
pub(super) fn run(prepared: Prepared) -> anyhow::Result<ExitStatus> {
    let Prepared {
        config,
        time_and_place,
        privileges,
        proc,
        destroyer,
        log,
    } = prepared;
    let config = &config;
    let acts = config.action == Action::Act;
    let quiet = config.format == Format::Quiet;
    let mut terminal = Terminal::new(acts, quiet)?;
    let mut history = History::open();
    let namespaces = finder::open_namespaces(&config.netns, &config.selectors, &proc)?;
    let scan = find_and_plan(config, &namespaces, &history, &privileges, &proc, &terminal)?;
    if acts {
        memory::check_room(scan.targets.len()).context("nothing was done")?;
    }
    // Before the act, so that no act makes a socket young for the next run.
    history.add(&scan, &config.selectors);
    if !quiet {
        terminal.aside(|| say_notes(history.take_notes()));
    }
    let mut run = Run::new(scan);
    // Only if it would be said that nothing is stuck.
    if !acts && run.scan.targets.is_empty() {
        tracked::count(&mut run.scan);
    }
    if config.drain_backlogs.is_some() {
        let found = drain::find(&run.scan, &config.selectors, &proc);
        run.backlogs = Some(found.context("cannot find the backlogs")?);
    }
    // Without owners cwkill does not know the processes.
    if acts
        && config.asks
        && config.owners
        && confirm::is_possible()
        && let Some(question) = confirm::question(&run, config, &BTreeSet::new())
        && !terminal.aside(|| confirm::agrees(&question))
    {
        say(format_args!("nothing was closed"));
        return Ok(ExitStatus::NotAllClosed);
    }
    // A run without a match leaves no record.
    let has_backlogs = run.backlogs.iter().flatten().next().is_some();
    let mut log = log.filter(|_| has_backlogs || !run.scan.targets.is_empty());
    if let Some(log) = &mut log {
        let intents = terminal.aside(|| log.begin(&run));
        intents.context("nothing was done")?;
    }
    let mut canaries = None;
    if acts {
        let rules = Rules {
            destroyer: destroyer.as_ref(),
            ..config.rules(&privileges)
        };
        canaries = close(&mut run, config, rules, &proc, &terminal);
        let was_held_up = destroyer.as_ref().is_some_and(ByIterator::was_held_up);
        if was_held_up && !quiet {
            terminal.aside(|| say_notes([HELD_UP]));
        }
        if let Some(stop_limit) = config.drain_backlogs {
            drain_backlogs(&mut run, stop_limit, &proc, &terminal);
        }
    }
    if let Some(rules) = &config.reclaim {
        reclaim_descriptors(&mut run, rules, &proc, &terminal);
        let by = KeptBy {
            rules,
            closed_sockets: true,
            predicted: !acts,
        };
        let owners = run.scan.targets.iter().flat_map(|target| &target.owners);
        run.advice = kept::advice(owners, by, &proc);
    }
    if run.scan.targets.is_empty() {
        match dead_descriptors(config, &namespaces, &proc) {
            Ok(None) => {}
            Ok(Some((dead, advice))) => {
                run.dead_descriptors = Some(dead);
                run.advice = advice;
            }
            Err(error) => {
                let error = anyhow::Error::from(error);
                run.dead_descriptors_failure = Some(format!("{error:#}"));
            }
        }
    }
    if let Some(mut canaries) = canaries {
        let more = canaries.observe_paused(&run.scan, &terminal);
        run.spinning.extend(more);
    }
    // From here on a signal ends cwkill at once, so that a log on a hanging disk or pipe does not block the operator.
    terminal.release_signals();
    let unrecorded = log.and_then(|log| log.finish(&run, text::totals(&run, config)));

    let status = conclude(
        &mut run,
        &time_and_place,
        config,
        &namespaces,
        &proc,
        terminal,
        unrecorded,
    )?;
    // cwkill exits now; freeing a large result would only take time.
    std::mem::forget(run);
    Ok(status)
}

/// Writes the report, and returns the exit status. `unrecorded`: what the log lacks.
///
/// # Errors
/// A listing could not be written.
pub(super) fn conclude(
    run: &mut Run,
    time_and_place: &TimeAndPlace,
    config: &Config,
    namespaces: &Namespaces,
    proc: &ProcFs,
    mut terminal: Terminal,
    unrecorded: Option<String>,
) -> anyhow::Result<ExitStatus> {
    let Reported {
        written,
        new_sockets,
        next,
    } = report(run, time_and_place, config, namespaces, proc, &mut terminal);
    drop(terminal);
    let written = match (new_sockets, config.format) {
        (Some(line), Format::Table) => written.and_then(|()| writeln!(io::stdout(), "{line}")),
        (Some(line), _) => {
            say(format_args!("note: {line}"));
            written
        }
        (None, _) => written,
    };
    let written = match next {
        Some(next) => written.and_then(|()| writeln!(io::stdout(), "{next}")),
        None => written,
    };
    let summary = run.acted.then(|| text::totals(run, config));
    if !was_reported(written, unrecorded, summary.as_deref())? {
        return Ok(ExitStatus::Impossible);
    }
    Ok(exit_status(run))
}

fn needed_capabilities(config: &Config) -> caps::CapsHashSet {
    let mut needed = capabilities::to_find(
        &config.netns,
        config.owners,
        config.selectors.selects_owners(),
    );
    if config.action == Action::Act {
        needed.extend(capabilities::to_act(&config.policy.methods));
        if config.reclaim.is_some() {
            needed.extend(capabilities::to_reclaim());
        }
    }
    needed
}

/// Finds the sockets and plans the methods for each. Before an act, and in a dry run, it may wait some seconds to see whether unread
/// bytes are read.
///
/// # Errors
/// No sockets can be found.
pub fn find_and_plan(
    config: &Config,
    namespaces: &Namespaces,
    history: &History,
    privileges: &Privileges,
    proc: &ProcFs,
    control: &dyn Control,
) -> Result<Scan, FindError> {
    let mut scan = find(config, namespaces, history, proc)?;
    if config.action != Action::List {
        look_again(&mut scan, config, control);
    }
    Ok(decide(
        scan,
        config,
        config.policy.max_kills,
        privileges,
        proc,
    ))
}

/// Finds the sockets, as the configuration wants it.
///
/// # Errors
/// No sockets can be found.
pub(super) fn find(
    config: &Config,
    namespaces: &Namespaces,
    history: &History,
    proc: &ProcFs,
) -> Result<Scan, FindError> {
    match config.owners {
        true => finder::find(namespaces, proc, &config.selectors, history),
        false => finder::find_sockets(namespaces, &config.selectors, history),
    }
}

/// Plans the methods for each of the sockets, for at most `max_kills` of them.
pub(super) fn decide(
    mut scan: Scan,
    config: &Config,
    max_kills: Option<usize>,
    privileges: &Privileges,
    proc: &ProcFs,
) -> Scan {
    if config.action != Action::List && !config.policy.allow_spin {
        finder::spin_risk::find(&mut scan, proc);
    }
    plan::decide(&mut scan, &config.policy, privileges);
    if let Some(rules) = &config.reclaim {
        spare_those_that_stay_open(&mut scan, rules, proc);
    }
    plan::limit(&mut scan, max_kills);
    scan
}

/// Removes the sockets whose owner still reads, and says why this takes time.
fn look_again(scan: &mut Scan, config: &Config, control: &dyn Control) {
    let (wait, count) = second_look::needed(scan, &config.selectors);
    if count > 0 && config.format != Format::Quiet && io::stderr().is_terminal() {
        let sockets = counted(count, "socket");
        let time = seconds(wait);
        say(format_args!(
            "{sockets} with unread bytes: waiting {time} to see whether they are read (--min-idle)"
        ));
    }
    second_look::look_again(scan, &config.selectors, control);
}

/// Skips the sockets whose owner would spin, unless the descriptors of all known owners can be closed too.
fn spare_those_that_stay_open(scan: &mut Scan, rules: &ReclaimRules, proc: &ProcFs) {
    let is_paused =
        |target: &Target| target.plan.skip.is_none() && target.spin_risk.would_spin().is_some();
    if !scan.targets.iter().any(is_paused) {
        return;
    }
    let mut paused: Vec<&mut Target> = scan.targets.iter_mut().filter(|it| is_paused(it)).collect();
    let mut descriptors: Vec<ReclaimTarget<'_>> = paused
        .iter_mut()
        .flat_map(|target| descriptors(target))
        .collect();
    reclaim::judge(&mut descriptors, rules, proc);
    for target in paused {
        let owners = target.owners.iter_mut();
        // Taken, since only the judgement after the close counts.
        let judgements: Vec<_> = owners.map(|owner| owner.reclaim.take()).collect();
        let is_allowed = |judgement: &_| *judgement == Some(ReclaimOutcome::Allowed);
        if !judgements.iter().all(is_allowed) {
            target.plan.methods.clear();
            target.plan.skip = target.spin_risk.would_spin();
        }
    }
}

/// Closes the sockets as planned, and checks which of their descriptors are still open. Writes the results to the targets. Returns
/// what is known of the owners that might spin.
pub fn close<'p>(
    run: &mut Run,
    config: &Config,
    rules: Rules<'_>,
    proc: &'p ProcFs,
    control: &dyn Control,
) -> Option<Canaries<'p>> {
    control.hold_signals();
    if let Some(reclaim_rules) = &config.reclaim {
        let mut descriptors = reclaim_targets(&mut run.scan);
        reclaim::skip_used_by_syscalls(&mut descriptors, reclaim_rules, proc);
    }
    let methods = &config.policy.methods[..];
    let mut canaries = (!config.policy.allow_spin).then(|| Canaries::new(&run.scan, proc, control));
    if let Some(canaries) = &mut canaries {
        run.spinning = canaries.close_first(&mut run.scan, methods, rules, control);
    }
    workers::close(&mut run.scan, methods, rules, proc, control);
    run.acted = true;
    reactions::await_owners(proc, &mut run.scan.targets, config.grace, control);
    // After the owners had time to react, which keeps them awake as well.
    if let Some(canaries) = &mut canaries {
        let more = canaries.observe_the_rest(&run.scan, control);
        run.spinning.extend(more);
    }
    canaries
}

/// Drains the backlogs, and updates what is known of their listeners.
fn drain_backlogs(run: &mut Run, stop_limit: Duration, proc: &ProcFs, control: &dyn Control) {
    let backlogs = run.backlogs.as_deref_mut().unwrap_or_default();
    drain::drain(backlogs, &run.scan.namespaces, stop_limit, proc, control);
    let waiting: HashMap<u32, u32> = backlogs
        .iter()
        .map(|backlog| (backlog.socket.inode, backlog.socket.waiting))
        .collect();
    let listeners = run.scan.listeners.iter_mut();
    for socket in listeners.flat_map(|listener| &mut listener.sockets) {
        if let Some(&waiting) = waiting.get(&socket.inode) {
            socket.waiting = waiting;
        }
    }
}

/// Closes the descriptors of closed sockets in their owners. In a dry run, decides which ones could be closed.
pub(super) fn reclaim_descriptors(
    run: &mut Run,
    rules: &ReclaimRules,
    proc: &ProcFs,
    control: &dyn Control,
) {
    run.reclaim_requested = true;
    if !run.acted {
        reclaim::judge(&mut reclaim_targets(&mut run.scan), rules, proc);
        return;
    }
    let mut owners_may_react = false;
    for target in &mut run.scan.targets {
        match target.is_closed() {
            true => owners_may_react |= target.socket.inode.is_some() && !target.owners.is_empty(),
            // It is still open, so what was said about its descriptors before no longer matters.
            false => target
                .owners
                .iter_mut()
                .for_each(|owner| owner.reclaim = None),
        }
    }
    if owners_may_react {
        reclaim::let_owners_react(rules, control);
        still_open::check_still_open(proc, &mut run.scan.targets);
    }
    let mut targets = reclaim_targets(&mut run.scan);
    for target in &mut targets {
        // A system call was on this descriptor, and its thread has closed it meanwhile.
        if target.owner.reclaim.is_some() && target.owner.after == Some(FdState::Closed) {
            target.owner.reclaim = Some(ReclaimOutcome::Gone);
        }
    }
    run.stops = reclaim::reclaim(&mut targets, rules, proc, control);
    for target in targets {
        if let Some(ReclaimOutcome::Freed | ReclaimOutcome::Replaced | ReclaimOutcome::Gone) =
            target.owner.reclaim
        {
            target.owner.after = Some(FdState::Closed);
        }
    }
    canary::note_ended(&mut run.spinning, proc, control);
}

/// The descriptors of every socket that was closed, or in a dry run would be closed.
fn reclaim_targets(scan: &mut Scan) -> Vec<ReclaimTarget<'_>> {
    let mut targets = Vec::new();
    for target in &mut scan.targets {
        let is_eligible = match target.outcome {
            None => target.plan.skip.is_none(),
            Some(outcome) => matches!(outcome, Outcome::Closed(_)),
        };
        if is_eligible {
            targets.extend(descriptors(target));
        }
    }
    targets
}

/// The descriptors of a socket.
fn descriptors(target: &mut Target) -> impl Iterator<Item = ReclaimTarget<'_>> {
    let socket = &target.socket;
    let owners = socket.inode.map(|inode| (inode, target.owners.iter_mut()));
    owners.into_iter().flat_map(move |(inode, owners)| {
        owners.map(move |owner| ReclaimTarget {
            owner,
            inode,
            cookie: socket.cookie(),
            age: socket.age,
            unread: 0,
            kernel_tls: false,
            may_lose: socket.recv_q,
        })
    })
}

/// Dead descriptors by process, and what to do about those that cannot be closed now.
type DeadByProcess = (Vec<DeadOfProcess>, Vec<Advice>);

/// The dead descriptors that the selectors match, by process, and what to do about those that cannot be closed now. `None` if the
/// operator did not ask for descriptors or for owners.
///
/// # Errors
/// The sockets or the processes cannot be listed.
fn dead_descriptors(
    config: &Config,
    namespaces: &Namespaces,
    proc: &ProcFs,
) -> Result<Option<DeadByProcess>, FindError> {
    let selects_owners = config.selectors.selects_owners();
    if !config.owners || namespaces.nobody || !(config.reclaim.is_some() || selects_owners) {
        return Ok(None);
    }
    // How long a dead socket has been dead is not known.
    let selectors = config.selectors.of_any_age();
    let everywhere = namespaces.everywhere || namespaces.follows_owners;
    let found = leftovers::find(proc, &selectors, &namespaces.open, everywhere)?;
    let mut dead: Vec<DeadDescriptor> = Vec::new();
    for table in found.scan.tables {
        let process = Arc::new(table.process);
        for suspect in table.suspects {
            if let SuspectVerdict::Dead(socket) = suspect.verdict {
                dead.push(DeadDescriptor::new(&process, &suspect, socket));
            }
        }
    }
    // The next run would decide by these.
    let rules = config.reclaim.as_ref().unwrap_or(&DEFAULT_RECLAIM_RULES);
    reclaim::judge(&mut targets_of(&mut dead), rules, proc);
    let by = KeptBy {
        rules,
        closed_sockets: false,
        predicted: true,
    };
    let advice = kept::advice(dead.iter().map(|dead| &dead.owner), by, proc);
    let of_process = |of_process: &[DeadDescriptor]| {
        let process = &of_process[0].owner.process;
        let is_closable =
            |dead: &&DeadDescriptor| dead.owner.reclaim == Some(ReclaimOutcome::Allowed);
        DeadOfProcess {
            process: Arc::clone(process),
            count: of_process.len(),
            closable: of_process.iter().filter(is_closable).count(),
            command: reclaim_command(process.id.pid, rules),
        }
    };
    let by_process = dead.chunk_by(|a, b| a.owner.process.id == b.owner.process.id);
    Ok(Some((by_process.map(of_process).collect(), advice)))
}

/// The report, and the lines that follow it.
struct Reported {
    written: io::Result<()>,
    /// About the new sockets.
    new_sockets: Option<String>,
    /// The next command, which comes last.
    next: Option<String>,
}

/// Writes the results and the notes, and watches for new stuck sockets if the operator asked for it.
fn report(
    run: &mut Run,
    time_and_place: &TimeAndPlace,
    config: &Config,
    namespaces: &Namespaces,
    proc: &ProcFs,
    terminal: &mut Terminal,
) -> Reported {
    // A JSON document contains the result of the watch. A person reads the table while cwkill watches.
    let watch_first = config.format == Format::Json;
    let mut line = None;
    if watch_first {
        line = watch_for_new(run, config, namespaces, proc, terminal);
    }
    let messages = messages(run, config);
    let overview = overview(run, config, &messages, proc);
    let color = is_coloured(config.color);
    let written = write_out(|out| match (config.format, &overview) {
        (Format::Table, Some(overview)) => {
            let tables = table_use::read(proc, &overview.processes(), &run.scan.namespaces);
            overview.write(&tables, out)
        }
        (Format::Table, None) => text::write(run, config, color, width(config.color), out),
        (Format::Json, _) => json::write_document(run, time_and_place, out),
        (Format::JsonLines, _) => json::write_lines(run, time_and_place, out),
        (Format::Quiet, _) => Ok(()),
    });
    for message in &messages {
        say(format_args!("{message}"));
    }
    let next = overview.as_ref().and_then(Overview::next);
    let next = next.map(str::to_owned);
    drop(overview);
    if !watch_first && written.is_ok() {
        line = watch_for_new(run, config, namespaces, proc, terminal);
    }
    Reported {
        written,
        new_sockets: line,
        next,
    }
}

/// The columns of the terminal on stdout, if it is one.
pub(super) fn width(color: ColorChoice) -> Option<usize> {
    screen(color).map(|screen| screen.columns)
}

/// The overview, if it is to be shown: on a terminal, unless the operator asked for every socket.
fn overview<'r>(
    run: &'r Run,
    config: &'r Config,
    messages: &[String],
    proc: &ProcFs,
) -> Option<Overview<'r>> {
    if config.format != Format::Table || config.verbose || config.limit == Some(Limit::All) {
        return None;
    }
    let screen = screen(config.color)?;
    let messages: Vec<String> = messages
        .iter()
        .flat_map(|message| broken(&format!("cwkill: {message}")))
        .collect();
    let is_at_limit = |id: ProcessId| {
        let table = table_use::of(proc, id).unwrap_or_default();
        is_reached(table.used.map(|used| used as u64), table.limit)
    };
    Some(Overview::new(
        run,
        config,
        screen,
        &messages,
        &typed_words(),
        &is_at_limit,
    ))
}

/// Watches for new stuck sockets, if the operator asked for it and cwkill has acted. Returns the line about them.
fn watch_for_new(
    run: &mut Run,
    config: &Config,
    namespaces: &Namespaces,
    proc: &ProcFs,
    terminal: &mut Terminal,
) -> Option<String> {
    let duration = config.watch_refill?;
    if !run.acted || terminal.interrupted() {
        return None;
    }
    if io::stderr().is_terminal() {
        let time = seconds(duration);
        say(format_args!(
            "watching for new stuck sockets for {time}; Ctrl-C ends it"
        ));
    }
    // Ctrl-C ends the watch; the new sockets so far are reported.
    terminal.hold_signals();
    let scope = WatchScope {
        namespaces,
        selectors: &config.selectors,
        owners: config.owners,
    };
    let known = watch::cookies(&run.scan);
    let new = watch::watch(scope, known, duration, proc, terminal);
    terminal.release_signals();
    match new {
        Ok(new) => {
            let line = new.line(&config.selectors);
            run.new_sockets = Some(new);
            Some(line)
        }
        Err(error) => {
            let error = anyhow::Error::from(error);
            say(format_args!(
                "note: cannot watch for new stuck sockets: {error:#}"
            ));
            None
        }
    }
}

/// The notes and hints for the operator.
pub(super) fn messages(run: &Run, config: &Config) -> Vec<String> {
    if config.format == Format::Quiet {
        return Vec::new();
    }
    // The lines of the table and the document have them already.
    let backlogs = match config.format {
        Format::JsonLines => backlogs::lines(run),
        Format::Table | Format::Json | Format::Quiet => Vec::new(),
    };
    let notes = backlogs.into_iter().chain(notes::notes(run));
    let mut messages: Vec<String> = notes.map(|note| format!("note: {note}")).collect();
    let is_relevant =
        |privilege: &Privilege| config.action != Action::List || *privilege == Privilege::Ptrace;
    let missing = notes::missing_privileges(run).into_iter();
    messages.extend(hint_line(&missing.filter(is_relevant).collect::<Vec<_>>()));
    messages
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::Cli;

    #[test]
    fn dead_descriptors_that_cannot_be_looked_for_are_an_error() {
        let cli = Cli::try_parse_from(["cwkill", "--pid", "4711", "-n"]).unwrap();
        let config = Config::from_args(cli.args).unwrap();
        let no_proc = ProcFs::at("/nonexistent");
        let error = dead_descriptors(&config, &Namespaces::default(), &no_proc).unwrap_err();
        let text = format!("{:#}", anyhow::Error::from(error));
        assert!(text.contains("os error 2"), "{text}");
        let mut run = Run::new(Scan::default());
        run.dead_descriptors_failure = Some(text.clone());
        let notes = notes::notes(&run);
        assert!(notes.iter().any(|note| note.contains(&text)), "{notes:?}");
    }
}
