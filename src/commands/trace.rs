//! `cwkill trace`: watches who reads the end of streams, and reports the lines of code that leave sockets stuck.

use std::collections::HashSet;

use anyhow::{Context, ensure};
use nix::errno::Errno;

use super::{
    hand_down_capabilities_and_start_threads, open_proc, refuse, say_hints, say_notes,
    time_and_place, to_read_iterators,
};
use crate::bpf::KernelTypes;
use crate::bpf::tracer::Tracer;
use crate::cli::TraceArgs;
use crate::control::{Control, deadline};
use crate::filter::Scope;
use crate::finder;
use crate::history::History;
use crate::model::Privilege;
use crate::privileges::capabilities;
use crate::proc::netns::{Namespaces, NetnsScope};
use crate::report::{ExitStatus, trace as report};
use crate::tcp::TcpState;
use crate::terminal::{Terminal, columns, ignore_closed_reader, is_coloured, say, write_out};
use crate::text::seconds;
use crate::trace::{Watch, places, worker};

pub(super) fn run(args: TraceArgs) -> anyhow::Result<ExitStatus> {
    let TraceArgs {
        selection,
        duration,
        verbose,
        json,
        ok_if_none: _,
    } = args;
    let use_iterator = selection.bpf;
    let host_root = selection.owners.host_root.clone();
    let scope = Scope::from_args(selection).unwrap_or_else(|error| refuse(&error));
    let time_and_place = time_and_place();
    say_notes(&scope.notes);
    ensure!(
        scope.selectors.states == TcpState::CloseWait.into(),
        "cannot trace other states than close-wait: leave --state out",
    );
    let types = KernelTypes::default();
    let proc = open_proc(use_iterator, false, &host_root, &scope.selectors, &types)?;
    drop(types);
    // The programs tell processes by their pids there.
    ensure!(
        proc.shows_every_process(),
        "cannot trace from inside a pid namespace: run it on the host, or in a container with --pid=host",
    );
    let tracer = Tracer::attach().map_err(|error| {
        let what = match error.errno() {
            Errno::EPERM => {
                "cannot trace: it takes root, or CAP_BPF and CAP_PERFMON, or CAP_SYS_ADMIN"
            }
            Errno::EOPNOTSUPP => "cannot trace, which needs Linux 5.15 and its types",
            _ => "cannot trace",
        };
        anyhow::Error::new(error).context(what)
    })?;
    let mut needed = capabilities::to_find(&scope.netns, true, scope.selectors.selects_owners());
    needed.extend(worker::CAPABILITIES);
    needed.extend(to_read_iterators(&proc));
    // The processes that read symbols get them, too.
    hand_down_capabilities_and_start_threads(&needed, &worker::CAPABILITIES.into(), Some(&proc));
    // It shows no progress.
    let mut terminal = Terminal::new(true, true)?;
    terminal.hold_signals();
    let mut history = History::open();
    let open_namespaces = || finder::open_namespaces(&scope.netns, &scope.selectors, &proc);
    // Of any owner, age and cause: what is of interest is decided at the end.
    let selectors = scope.selectors.of_any_owner_and_cause();
    let find_sockets = |namespaces: &Namespaces| -> anyhow::Result<HashSet<u64>> {
        let scan = finder::find_sockets(namespaces, &selectors, &history)?;
        let cookies = scan.targets.iter().map(|it| it.socket.cookie().0);
        Ok(cookies.collect())
    };
    let first = open_namespaces()?;
    let mut watch = Watch::new(tracer, find_sockets(&first)?);
    // A namespace may lose its name meanwhile. Those of all containers are not kept: each would stay after its container's end.
    let kept = (scope.netns != NetnsScope::All).then_some(first);
    let time = duration.map_or_else(String::new, |time| format!(" for {}", seconds(time)));
    // Printed without a terminal, too: scripts wait for this line.
    say(format_args!(
        "watching{time}; Ctrl-C ends it and shows what was found"
    ));
    let until = duration.map(|duration| deadline(terminal.now(), duration));
    watch.go_on(until, &terminal, || {
        find_sockets(&open_namespaces().ok()?).ok()
    });
    let namespaces = match (open_namespaces(), kept) {
        (Err(_), Some(kept)) => kept,
        (opened, _) => opened?,
    };
    let scan = finder::find(&namespaces, &proc, &scope.selectors, &history);
    say_notes(history.take_notes());
    let scan = scan?;
    let trace = watch.finish(&scan);
    terminal.release_signals();
    let found = places::find(&trace, &scan);
    let written = write_out(|out| match json {
        true => report::json::write(&trace, &scan, &found, &time_and_place, out),
        false => {
            let style = report::text::Style {
                columns: columns(),
                color: is_coloured(clap::ColorChoice::Auto),
                verbose,
            };
            report::text::write(&trace, &found, style, out)
        }
    });
    drop(terminal);
    say_notes(report::notes(&trace, &scan, &found));
    if scan.coverage.has_hidden_owners() && scan.coverage.undecided_by_owner() > 0 {
        say_hints(&[Privilege::Ptrace]);
    }
    ignore_closed_reader(written).context("cannot write the report")?;
    Ok(report::exit_status(&scan, &found))
}

/// The hidden command of the process that reads symbols.
pub(super) fn read_symbols(pid: i32, started: u64) -> anyhow::Result<ExitStatus> {
    worker::serve(pid, started).context("cannot read symbols")?;
    Ok(ExitStatus::Done)
}
