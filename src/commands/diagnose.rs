//! `cwkill diagnose`: scans twice and reports the diagnosis.

use std::io::{self, IsTerminal};

use anyhow::Context;

use super::{
    drop_capabilities_and_start_threads, open_proc, refuse, say_hints, say_notes, time_and_place,
};
use crate::bpf::KernelTypes;
use crate::cli::DiagnoseArgs;
use crate::diagnose;
use crate::filter::Scope;
use crate::finder::tracked;
use crate::history::History;
use crate::model::Privilege;
use crate::privileges::capabilities;
use crate::report::{ExitStatus, diagnose as report};
use crate::terminal::{columns, ignore_closed_reader, rows, say, write_out};
use crate::text::seconds;

pub(super) fn run(args: DiagnoseArgs) -> anyhow::Result<ExitStatus> {
    let DiagnoseArgs {
        selection,
        sample,
        json,
        ok_if_none: _,
    } = args;
    let use_iterator = selection.bpf;
    let host_root = selection.owners.host_root.clone();
    let scope = Scope::from_args(selection).unwrap_or_else(|error| refuse(&error));
    let time_and_place = time_and_place();
    say_notes(&scope.notes);
    let proc = open_proc(
        use_iterator,
        false,
        &host_root,
        &scope.selectors,
        &KernelTypes::default(),
    )?;
    drop_capabilities_and_start_threads(
        &capabilities::to_find(&scope.netns, true, scope.selectors.selects_owners()),
        Some(&proc),
    );
    let sample = sample.unwrap_or(diagnose::DEFAULT_SAMPLE);
    if io::stderr().is_terminal() {
        let time = seconds(sample);
        say(format_args!("scanning twice, {time} apart"));
    }
    let mut history = History::open();
    let diagnosis = diagnose::run(&scope, sample, &proc, &mut history);
    say_notes(history.take_notes());
    let mut diagnosis = diagnosis?;
    if diagnosis.scan.targets.is_empty() {
        tracked::count(&mut diagnosis.scan);
    }
    let written = write_out(|out| match json {
        true => report::json::write(&diagnosis, &time_and_place, out),
        false => report::text::write(&diagnosis, columns(), rows(), out),
    });
    say_notes(diagnosis.notes());
    if diagnosis.lacks_privileges() {
        say_hints(&[Privilege::Ptrace]);
    }
    ignore_closed_reader(written).context("cannot write the diagnosis")?;
    Ok(report::exit_status(&diagnosis))
}
