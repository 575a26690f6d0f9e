//! The commands, one file for each, and their common parts. `confirm` is a part of `close`.
//!
//! A command validates its arguments, drops the privileges that it does not need, does its work, and reports: results on
//! stdout, everything else on stderr. `close` is `cwkill` without a command: it lists or closes sockets.

mod check;
pub mod close;
mod close_watch;
mod confirm;
mod daemon;
mod diagnose;
mod doctor;
mod gateway;
mod gateway_watch;
mod gateway_workers;
mod kept;
mod patience;
mod reclaim;
#[cfg(feature = "trace")]
mod trace;

use std::ffi::{OsStr, OsString};
use std::fmt::Display;
use std::io;
use std::path::Path;
use std::process::ExitCode;
use std::time::SystemTime;

use anyhow::Context;
use caps::CapsHashSet;
use clap::{CommandFactory, Parser};
use nix::sys::utsname::uname;
use nix::unistd::geteuid;

use crate::audit::Audit;
use crate::bpf::KernelTypes;
use crate::cli::{Args, Cli, Command, GatewayArgs, Misplaced, better_error};
use crate::config::{Action, Format, GatewayConfig, LogOptions};
use crate::filter::selectors::Selectors;
use crate::finder::way::{self, NotUsed, UseIterator};
use crate::injector::way::ByIterator;
use crate::kernel::KernelVersion;
use crate::model::{Privilege, TimeAndPlace};
use crate::parallel;
use crate::privileges::{capabilities, held, hint};
use crate::proc::ProcFs;
use crate::report::ExitStatus;
use crate::sys::caller::as_caller;
use crate::terminal::{
    ignore_closed_reader, ignore_signals_of_writes, print_usage, say, write_out,
};
use crate::text::escape;

/// Must be called first.
pub fn prepare() {
    ignore_signals_of_writes();
}

/// Runs the process that reads symbols for `cwkill trace`, if this is one. Its command line is not one for people, so neither the help nor
/// the completions have it.
pub fn serve_trace() -> Option<ExitCode> {
    #[cfg(feature = "trace")]
    {
        let words: Vec<OsString> = std::env::args_os().skip(1).collect();
        let number = |word: &OsString| word.to_str()?.parse().ok();
        if let [command, pid, started] = &words[..]
            && command == crate::trace::readers::COMMAND
            && let Some(pid) = number(pid).and_then(|pid: u64| i32::try_from(pid).ok())
            && let Some(started) = number(started)
        {
            let served = trace::read_symbols(pid, started);
            return Some(served.unwrap_or(ExitStatus::Impossible).into());
        }
    }
    None
}

/// Runs the command, and returns the exit status.
pub fn run(cli: Cli) -> ExitCode {
    let none_is_ok = match &cli.command {
        None => cli.args.output.ok_if_none,
        Some(Command::Diagnose(args)) => args.ok_if_none,
        Some(Command::Trace(args)) => args.ok_if_none,
        Some(Command::Reclaim(args)) => args.output.ok_if_none,
        Some(Command::Gateway(args)) => args.output.ok_if_none,
        Some(_) => false,
    };
    let code = |status: ExitStatus| ExitCode::from(status.with_none_ok(none_is_ok));
    let ended = match cli.command {
        None => run_close(cli.args).map(code),
        Some(Command::Diagnose(args)) => diagnose::run(args).map(code),
        #[cfg(feature = "trace")]
        Some(Command::Trace(args)) => trace::run(args).map(code),
        #[cfg(not(feature = "trace"))]
        Some(Command::Trace(_)) => Err(anyhow::anyhow!(
            "cannot trace: this cwkill was built without the feature `trace`"
        )),
        Some(Command::Check(args)) => return check::run(args),
        Some(Command::Doctor(args)) => doctor::run(&args),
        Some(Command::Reclaim(args)) => reclaim::run(args).map(code),
        Some(Command::Gateway(args)) => run_gateway(args).map(code),
        Some(Command::Daemon(args)) => daemon::run(&args),
        Some(Command::Completions { shell }) => print_completions(shell),
    };
    ended.unwrap_or_else(|error| {
        say(format_args!("{error:#}"));
        ExitStatus::Impossible.into()
    })
}

/// `cwkill` without a command.
fn run_close(args: Args) -> anyhow::Result<ExitStatus> {
    let prepared = close::prepare(args)?;
    match prepared.config.watch {
        Some(watch) => close_watch::run(prepared, watch),
        None => close::run(prepared),
    }
}

fn run_gateway(args: GatewayArgs) -> anyhow::Result<ExitStatus> {
    let config = GatewayConfig::from_args(args).unwrap_or_else(|error| refuse(&error));
    match config.watch {
        Some(watch) => gateway_watch::run(&config, watch),
        None => gateway::run(&config),
    }
}

/// Reports a wrong command line and exits, with the exit status of the intended command.
pub fn refuse(error: &clap::Error) -> ! {
    if !error.use_stderr() {
        print_usage(error);
        std::process::exit(error.exit_code());
    }
    // The message quotes words of the command line, which another program may have composed.
    let words: Vec<OsString> = std::env::args_os()
        .map(|word| escape(&word.to_string_lossy()).into())
        .collect();
    if let Some(help) = help_of_help(&words) {
        print_usage(&help);
        std::process::exit(help.exit_code());
    }
    let quoted = Cli::try_parse_from(&words).err();
    let quoted = quoted.filter(|quoted| quoted.kind() == error.kind());
    let misplaced = Misplaced::find(&words);
    let command = misplaced.as_ref().map(|it| OsStr::new(&it.command));
    let misplaced = misplaced.as_ref().map(|it| &it.error);
    let hint = better_error(&words, quoted.as_ref().unwrap_or(error));
    let better = misplaced.or(hint.as_ref()).or(quoted.as_ref());
    let error = better.unwrap_or(error);
    let of_command = with_own_usage(&words, error);
    let error = of_command.as_ref().unwrap_or(error);
    if command.or(words.get(1).map(AsRef::as_ref)) == Some(OsStr::new("check")) {
        check::unknown_by_usage(error);
    }
    print_usage(error);
    std::process::exit(error.exit_code())
}

/// The help for `cwkill help -h` and `cwkill help COMMAND --help`, which clap does not know.
fn help_of_help(words: &[OsString]) -> Option<clap::Error> {
    let (program, rest) = words.split_first()?;
    let (first, rest) = rest.split_first()?;
    let last = rest.last()?;
    if first != "help" || (last != "-h" && last != "--help") {
        return None;
    }
    let is_command = |word: &OsString| Cli::command().find_subcommand(word).is_some();
    let (_, names) = rest.split_last()?;
    if !names.iter().all(is_command) {
        return None;
    }
    let error = Cli::try_parse_from([std::slice::from_ref(program), rest].concat()).err()?;
    (!error.use_stderr()).then_some(error)
}

/// The same error with the usage of the command that `words` name, if it has that of the whole program.
fn with_own_usage(words: &[OsString], error: &clap::Error) -> Option<clap::Error> {
    let mut cli = Cli::command();
    cli.build();
    let name = words.get(1)?.to_str()?;
    let command = cli.find_subcommand_mut(name)?;
    let text = error.to_string();
    let (message, _) = text.split_once("\n\nUsage: cwkill [OPTIONS]")?;
    let message = message.strip_prefix("error: ").unwrap_or(message);
    Some(command.error(error.kind(), message))
}

/// When and where this run begins.
fn time_and_place() -> TimeAndPlace {
    let name = uname().map(|name| name.nodename().to_string_lossy().into_owned());
    TimeAndPlace {
        time: SystemTime::now(),
        host: name.unwrap_or_default(),
        boot_id: ProcFs::default().boot_id(),
    }
}

/// The command line, without the name of the program.
fn typed_words() -> Vec<String> {
    let words = std::env::args_os().skip(1);
    words
        .map(|word| word.to_string_lossy().into_owned())
        .collect()
}

/// Prints the completion script for `shell`.
fn print_completions(shell: clap_complete::Shell) -> anyhow::Result<ExitCode> {
    let written = write_out(|out| {
        // clap_complete panics if it cannot write, so it writes into memory.
        let mut script = Vec::new();
        clap_complete::generate(shell, &mut Cli::command(), "cwkill", &mut script);
        out.write_all(&script)
    });
    ignore_closed_reader(written).context("cannot write the completion script")?;
    Ok(ExitCode::SUCCESS)
}

fn say_notes(notes: impl IntoIterator<Item = impl Display>) {
    for note in notes {
        say(format_args!("note: {note}"));
    }
}

/// How to get the privileges without which cwkill saw or did less.
fn hint_line(missing: &[Privilege]) -> Option<String> {
    let is_filtered = ProcFs::default().filters_own_calls();
    let held = held(missing);
    let hint = hint(missing, &held, geteuid().is_root(), is_filtered)?;
    Some(format!("hint: {hint}"))
}

/// Prints how to get the privileges without which cwkill saw or did less.
fn say_hints(missing: &[Privilege]) {
    if let Some(hint) = hint_line(missing) {
        say(format_args!("{hint}"));
    }
}

/// /proc, with the names of the containers of the host whose root directory is `host_root`.
///
/// # Errors
/// `host_root` is not a directory that the caller may use.
fn proc_with_names(host_root: &Path, selectors: &Selectors) -> anyhow::Result<ProcFs> {
    if host_root != Path::new("/") {
        as_caller(|| std::fs::read_dir(host_root).map(drop)).with_context(|| {
            let path = host_root.to_string_lossy();
            format!("cannot use --host-root {}", escape(&path))
        })?;
    }
    let by_name = !selectors.containers.is_empty();
    Ok(ProcFs::default().with_names(host_root, by_name))
}

/// As [`proc_with_names`], with the iterator over all descriptors if `use_iterator` and the host allow it. It must be called before privileges are
/// dropped. `verbose`: whether to say why the kernel does not accept the iterator.
///
/// # Errors
/// The iterator is needed, and cannot be used.
fn open_proc(
    use_iterator: UseIterator,
    verbose: bool,
    host_root: &Path,
    selectors: &Selectors,
    types: &KernelTypes,
) -> anyhow::Result<ProcFs> {
    let proc = proc_with_names(host_root, selectors)?;
    let chosen = way::choose(&proc, use_iterator, way::MANY_FILES, types);
    proc_by(proc, chosen, use_iterator, verbose)
}

/// As [`open_proc`], for a command that scans often: the time to load the iterator does not matter.
fn open_proc_for_long(
    use_iterator: UseIterator,
    host_root: &Path,
    selectors: &Selectors,
    types: &KernelTypes,
) -> anyhow::Result<ProcFs> {
    let proc = proc_with_names(host_root, selectors)?;
    let chosen = way::choose(&proc, use_iterator, 0, types);
    proc_by(proc, chosen, use_iterator, false)
}

fn proc_by(
    proc: ProcFs,
    chosen: Result<ProcFs, NotUsed>,
    use_iterator: UseIterator,
    verbose: bool,
) -> anyhow::Result<ProcFs> {
    let used = used_or_note(
        chosen,
        use_iterator,
        verbose,
        "the owners are read from /proc",
    );
    Ok(used?.unwrap_or(proc))
}

/// The iterator that destroys sockets, if `use_iterator` and the host allow it. As [`open_proc`].
///
/// # Errors
/// The iterator is needed, and cannot be used.
fn open_destroyer(
    use_iterator: UseIterator,
    verbose: bool,
    proc: &ProcFs,
    types: &KernelTypes,
) -> anyhow::Result<Option<ByIterator>> {
    let instead = "sockets are destroyed by SOCK_DESTROY";
    match ByIterator::choose(proc, use_iterator, types) {
        Err(error)
            if verbose && use_iterator == UseIterator::Auto && error.verifier_log().is_none() =>
        {
            let error = anyhow::Error::from(error);
            say(format_args!("note: {instead}, because {error:#}"));
            Ok(None)
        }
        chosen => used_or_note(chosen, use_iterator, verbose, instead),
    }
}

/// What was `chosen`; `None` for `instead`, the other way.
///
/// # Errors
/// The iterator is needed, and cannot be used.
fn used_or_note<T>(
    chosen: Result<T, NotUsed>,
    use_iterator: UseIterator,
    verbose: bool,
    instead: &str,
) -> anyhow::Result<Option<T>> {
    let error = match chosen {
        Ok(chosen) => return Ok(Some(chosen)),
        Err(error) => error,
    };
    let log = error.verifier_log().filter(|_| verbose);
    if use_iterator == UseIterator::Always {
        if let Some(log) = log {
            say(format_args!("note: the kernel's verifier: {log}"));
        }
        return Err(error).context("cannot use the iterator (--bpf always)");
    }
    if let Some(log) = log {
        say(format_args!(
            "note: {instead}, because {error}; the kernel's verifier: {log}"
        ));
    }
    Ok(None)
}

/// Drops all capabilities except those that are `needed`, then starts the worker threads. If dropping fails, cwkill goes on
/// with more privileges than it needs. `proc`: may have an iterator, which needs a capability on old kernels.
fn drop_capabilities_and_start_threads(needed: &CapsHashSet, proc: Option<&ProcFs>) {
    hand_down_capabilities_and_start_threads(needed, &CapsHashSet::new(), proc);
}

/// The same, and the programs that cwkill starts get the capabilities `handed`.
fn hand_down_capabilities_and_start_threads(
    needed: &CapsHashSet,
    handed: &CapsHashSet,
    proc: Option<&ProcFs>,
) {
    let mut needed = needed.clone();
    if let Some(proc) = proc.filter(|proc| proc.iterator().is_some()) {
        needed.extend(to_read_iterators(proc));
    }
    if let Err(error) = capabilities::drop_and_hand_down(&needed, handed) {
        say(format_args!(
            "note: more privileges are held than needed: {error:#}"
        ));
    }
    // A thread keeps the capabilities with which it was started, so the threads start only now.
    if let Err(error) = parallel::prepare() {
        say(format_args!("note: {error}"));
    }
}

/// What it takes here to read iterators that are loaded.
fn to_read_iterators(proc: &ProcFs) -> CapsHashSet {
    capabilities::to_read_iterators(KernelVersion::running(), proc.forbids_bpf_to_users())
}

/// Opens the log of a command that acts. It must be called before privileges are dropped: only root may be able to write the
/// log.
fn open_log(action: Action, options: &LogOptions) -> anyhow::Result<Option<Audit>> {
    match action {
        Action::Act => Audit::open(options).context("nothing was done"),
        Action::List | Action::DryRun => Ok(None),
    }
}

/// Whether the report and the log are complete; prints a message if they are not. `summary` describes the acts of this run;
/// `None` if there were none.
///
/// # Errors
/// A listing could not be written.
fn was_reported(
    written: io::Result<()>,
    unrecorded: Option<String>,
    summary: Option<&str>,
) -> anyhow::Result<bool> {
    // If the reader closed stdout, or nothing but the report failed, the exit status still describes the acts.
    let unwritten = match ignore_closed_reader(written) {
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

/// Ends the report of a watch with the sum of all rounds. Returns `status`, if the report and the log are complete. `ended`: whether the
/// rows were written, or why the watch has ended early.
///
/// # Errors
/// It has ended early, or a listing could not be written.
fn report_watch_end(
    ended: anyhow::Result<io::Result<()>>,
    unrecorded: Option<String>,
    summary: &str,
    format: Format,
    action: Action,
    status: ExitStatus,
) -> anyhow::Result<ExitStatus> {
    let (written, failure) = match ended {
        Ok(written) => (written, None),
        Err(error) => (Ok(()), Some(error)),
    };
    let written = written.and_then(|()| match format {
        Format::Table => write_out(|out| writeln!(out, "{summary}")),
        Format::JsonLines => {
            say(format_args!("{summary}"));
            Ok(())
        }
        Format::Json | Format::Quiet => Ok(()),
    });
    let has_acted = (action == Action::Act).then_some(summary);
    let reported = was_reported(written, unrecorded, has_acted)?;
    match failure {
        Some(error) => Err(error.context(format!("the watch has ended early ({summary})"))),
        None if reported => Ok(status),
        None => Ok(ExitStatus::Impossible),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<OsString> {
        let line = format!("cwkill {line}");
        line.split(' ').map(OsString::from).collect()
    }

    #[test]
    fn an_error_has_the_usage_of_its_command() {
        let error = crate::config::usage("a threshold is missing");
        let text = |line: &str| {
            let own = with_own_usage(&words(line), &error);
            own.map(|error| error.to_string())
        };
        let check = text("check --port 80").expect("another usage");
        assert!(
            check.starts_with("error: a threshold is missing\n"),
            "{check}"
        );
        assert!(check.contains("Usage: cwkill check [OPTIONS]"), "{check}");
        assert!(text("reclaim").unwrap().contains("Usage: cwkill reclaim"));
        assert_eq!(text("--port 80"), None);
    }

    #[test]
    fn help_has_help() {
        let text = |line: &str| help_of_help(&words(line)).map(|help| help.to_string());
        for (line, like) in [
            ("help -h", "-h"),
            ("help --help", "--help"),
            ("help check -h", "check -h"),
            ("help reclaim --help", "reclaim --help"),
        ] {
            let expected = Cli::try_parse_from(words(like)).unwrap_err().to_string();
            assert_eq!(text(line), Some(expected), "{line}");
        }
        for line in ["help", "help check", "help nonsense -h", "-h"] {
            assert_eq!(text(line), None, "{line}");
        }
    }
}
