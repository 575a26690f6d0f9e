//! `cwkill diagnose`: two looks, and what they say.

use std::io::{self, IsTerminal};

use anyhow::Context;

use super::{drop_all_but, refuse, say_hints, say_notes};
use crate::cli::DiagnoseArgs;
use crate::config::Scope;
use crate::diagnose;
use crate::privileges::{Privilege, drop};
use crate::proc::ProcFs;
use crate::report::ExitStatus;
use crate::terminal::{columns, rows, say, unless_closed, write_out};

pub(super) fn run(args: DiagnoseArgs) -> anyhow::Result<ExitStatus> {
    let DiagnoseArgs {
        selection,
        sample,
        json,
    } = args;
    let scope = Scope::from_args(selection).unwrap_or_else(|error| refuse(&error));
    say_notes(&scope.notes);
    drop_all_but(&drop::to_find(&scope.netns, true));
    let sample = sample.unwrap_or(diagnose::SAMPLE);
    if io::stderr().is_terminal() {
        let time = crate::text::seconds(sample);
        say(format_args!("looking twice, {time} apart"));
    }
    let diagnosis = diagnose::run(&scope, sample, &ProcFs::default())?;
    let written = write_out(|out| match json {
        true => diagnose::json::write(&diagnosis, out),
        false => diagnose::text::write(&diagnosis, columns(), rows(), out),
    });
    say_notes(diagnosis.notes());
    if diagnosis.is_partly_blind() {
        say_hints(&[Privilege::Ptrace]);
    }
    unless_closed(written).context("cannot write the diagnosis")?;
    Ok(diagnosis.exit_status())
}
