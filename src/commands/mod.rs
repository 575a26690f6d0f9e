//! The jobs: what each command does, from its arguments to its exit status, and what all of them have in common.
//!
//! A job reads its arguments, gives up the privileges it does not need, calls what does the work, and tells what came of it: results
//! on stdout, anything else on stderr. The job without a name, to list and close, is in `close`.

mod check;
pub mod close;
mod diagnose;
mod doctor;
mod reclaim;
pub mod sweep;

use std::ffi::{OsStr, OsString};
use std::fmt::Display;
use std::io;
use std::process::ExitCode;

use anyhow::Context;
use caps::CapsHashSet;

use crate::audit::Audit;
use crate::cli::{Cli, Command, Misplaced};
use crate::config::{Action, LogOptions};
use crate::model::Privilege;
use crate::parallel;
use crate::privileges::{HOW_TO_GRANT, drop, purpose};
use crate::report::ExitStatus;
use crate::terminal::{say, unless_closed};

/// Does what the operator asks for.
pub fn run(cli: Cli) -> ExitCode {
    let ended = match cli.command {
        None => close::run(cli.args).map(ExitCode::from),
        Some(Command::Diagnose(args)) => diagnose::run(args).map(ExitCode::from),
        Some(Command::Check(args)) => return check::run(args),
        Some(Command::Doctor(args)) => doctor::run(&args),
        Some(Command::Reclaim(args)) => reclaim::run(args).map(ExitCode::from),
    };
    ended.unwrap_or_else(|error| {
        say(format_args!("{error:#}"));
        ExitStatus::Impossible.into()
    })
}

/// Ends with a wrong command line, in the way of the command that was meant.
pub fn refuse(error: &clap::Error) -> ! {
    if !error.use_stderr() {
        error.exit();
    }
    let words: Vec<OsString> = std::env::args_os().collect();
    let misplaced = Misplaced::find(&words);
    let meant = misplaced.as_ref().map(|it| OsStr::new(&it.command));
    let error = misplaced.as_ref().map_or(error, |it| &it.error);
    if meant.or(words.get(1).map(AsRef::as_ref)) == Some(OsStr::new("check")) {
        check::unknown_by_usage(error);
    }
    error.exit()
}

/// What the operator should know beside the results.
fn say_notes(notes: impl IntoIterator<Item = impl Display>) {
    for note in notes {
        say(format_args!("note: {note}"));
    }
}

/// How more would have been seen or done.
fn say_hints(missing: &[Privilege]) {
    for need in missing {
        say(format_args!("hint: {}", purpose(*need)));
    }
    if !missing.is_empty() {
        say(format_args!("hint: {HOW_TO_GRANT}"));
    }
}

/// Keeps only the capabilities that are `needed`, and then starts the threads that share the work: a thread keeps what it is started
/// with. More rights than that are no reason to leave the host without help.
fn drop_all_but(needed: &CapsHashSet) {
    if let Err(error) = drop::drop_all_but(needed) {
        say(format_args!(
            "note: more privileges are held than needed: {error:#}"
        ));
    }
    // A thread keeps what it is started with, so none comes before.
    if let Err(error) = parallel::prepare() {
        say(format_args!("note: {error}"));
    }
}

/// Opens the log of a job that is to act. Called before anything is given up, for where only root may write.
fn open_log(action: Action, options: &LogOptions) -> anyhow::Result<Option<Audit>> {
    match action {
        Action::Act => Audit::open(options).context("nothing was done"),
        Action::List | Action::DryRun => Ok(None),
    }
}

/// Whether the operator and the log have been told all; if not, stderr has been told so. `summary` is that of what was done.
///
/// # Errors
/// A listing could not be written.
fn was_reported(
    written: io::Result<()>,
    unrecorded: Option<String>,
    summary: Option<&str>,
) -> anyhow::Result<bool> {
    // What was done is done, also where the reader has seen enough: the status still says how it went.
    let unwritten = match unless_closed(written) {
        Err(error) if summary.is_some() => Some(format!("its report cannot be written: {error}")),
        other => other.context("cannot write the listing").map(|()| None)?,
    };
    let missing: Vec<String> = unrecorded.into_iter().chain(unwritten).collect();
    for why in &missing {
        let summary = summary.unwrap_or_default();
        say(format_args!("the work is done ({summary}), but {why}"));
    }
    Ok(missing.is_empty())
}
