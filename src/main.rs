//! The `cwkill` program: parse, run, report, exit status; nothing else.

use std::io::{self, BufWriter, IsTerminal, Write};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::{ColorChoice, Parser};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use caps::CapsHashSet;
use cwkill::audit::{self, Audit};
use cwkill::check::{self, Check, Status};
use cwkill::cli::{CheckArgs, Cli, Command, DiagnoseArgs, DoctorArgs};
use cwkill::config::{Action, Config, Format, Scope};
use cwkill::diagnose;
use cwkill::doctor;
use cwkill::finder::netns::Which;
use cwkill::finder::owners::Proc;
use cwkill::injector::MethodName;
use cwkill::injector::ladder::Surroundings;
use cwkill::pipeline::{self, Run};
use cwkill::privileges::{HOW_TO_GRANT, Need, Privileges, least};
use cwkill::reclaim::command;
use cwkill::refill;
use cwkill::report::{self, ExitStatus, exit_status, json, notes, text};
use cwkill::threads;

fn main() -> ExitCode {
    let cli = Cli::try_parse().unwrap_or_else(|error| refuse(&error));
    let ended = match cli.command {
        None => {
            let config = Config::from_args(cli.args).unwrap_or_else(|error| error.exit());
            run(&config).map(ExitCode::from)
        }
        Some(Command::Diagnose(args)) => diagnose(args).map(ExitCode::from),
        Some(Command::Check(args)) => return check(args),
        Some(Command::Doctor(args)) => doctor(&args),
        Some(Command::Reclaim(args)) => {
            let config = command::Config::from_args(args).unwrap_or_else(|error| error.exit());
            reclaim(&config).map(ExitCode::from)
        }
    };
    ended.unwrap_or_else(|error| {
        say(format_args!("{error:#}"));
        ExitStatus::Impossible.into()
    })
}

fn doctor(args: &DoctorArgs) -> anyhow::Result<ExitCode> {
    let mut needed = least::to_find(&Which::All, true);
    needed.extend(least::to_act(&MethodName::ALL));
    give_up_all_but(&needed);
    let examination = doctor::examine(&Proc::default())?;
    let mut out = BufWriter::new(io::stdout().lock());
    let written = match args.json {
        true => doctor::report::write_json(&examination, &mut out),
        false => doctor::report::write_text(&examination, &mut out),
    };
    match written.and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(error).context("cannot write the findings")
        }
        _ => Ok(doctor::report::status(&examination).into()),
    }
}

/// Ends with a wrong command line, in the way of the command that was meant.
fn refuse(error: &clap::Error) -> ! {
    if error.use_stderr()
        && std::env::args_os()
            .nth(1)
            .is_some_and(|first| first == "check")
    {
        unknown_by_usage(error);
    }
    error.exit()
}

/// A monitoring system reads one line of stdout, and takes status 2 for CRITICAL.
fn unknown_by_usage(error: &clap::Error) -> ! {
    let text = error.to_string();
    let what = text.split("\n\n").next().unwrap_or_default();
    let what = what.strip_prefix("error: ").unwrap_or(what);
    let _ = error.print();
    let _ = writeln!(io::stdout(), "{}", check::unknown(what).line);
    std::process::exit(Status::Unknown as i32)
}

fn check(args: CheckArgs) -> ExitCode {
    let verdict = match Check::from_args(args) {
        Ok(check) => {
            for note in &check.scope.notes {
                say(format_args!("note: {note}"));
            }
            give_up_all_but(&least::to_find(&check.scope.netns, true));
            check::run(&check, &Proc::default())
                .unwrap_or_else(|error| check::unknown(&format!("{error:#}")))
        }
        Err(error) => unknown_by_usage(&error),
    };
    match writeln!(io::stdout(), "{}", verdict.line) {
        Ok(()) => verdict.status.into(),
        // Nobody can have read how it stands.
        Err(_) => Status::Unknown.into(),
    }
}

fn diagnose(args: DiagnoseArgs) -> anyhow::Result<ExitStatus> {
    let DiagnoseArgs {
        selection,
        sample,
        json,
    } = args;
    let scope = Scope::from_args(selection).unwrap_or_else(|error| error.exit());
    for note in &scope.notes {
        say(format_args!("note: {note}"));
    }
    give_up_all_but(&least::to_find(&scope.netns, true));
    let sample = sample.unwrap_or(diagnose::SAMPLE);
    if io::stderr().is_terminal() {
        let time = refill::seconds(sample);
        say(format_args!("looking twice, {time} apart"));
    }
    let diagnosis = diagnose::run(&scope, sample, &Proc::default())?;
    let mut out = BufWriter::new(io::stdout().lock());
    let written = match json {
        true => diagnose::json::write(&diagnosis, &mut out),
        false => diagnose::text::write(&diagnosis, columns(), rows(), &mut out),
    };
    let written = written.and_then(|()| out.flush());
    for note in diagnosis.notes() {
        say(format_args!("note: {note}"));
    }
    if diagnosis.is_partly_blind() {
        say(format_args!("hint: {}", Need::Ptrace.purpose()));
        say(format_args!("hint: {HOW_TO_GRANT}"));
    }
    match written {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
        other => other.context("cannot write the diagnosis")?,
    }
    Ok(diagnosis.exit_status())
}

/// The columns of the screen: COLUMNS in the environment, or those of the terminal.
fn columns() -> Option<usize> {
    let told = std::env::var("COLUMNS").ok();
    let told = told.and_then(|columns| columns.parse().ok());
    told.filter(|columns| *columns > 0)
        .or_else(|| comfy_table::Table::new().width().map(usize::from))
}

/// The rows of the terminal, if stdout is one.
fn rows() -> Option<usize> {
    let (_, height) = terminal_size::terminal_size_of(io::stdout())?;
    Some(height.0.into()).filter(|rows| *rows > 0)
}

fn reclaim(config: &command::Config) -> anyhow::Result<ExitStatus> {
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
    let summary = || report::reclaim::summary(&run, config);
    let unrecorded = audit.and_then(|audit| audit.finish_reclaim(&run, summary()));
    drop(terminal);
    let written = write_out(config.color, |color, out| match config.format {
        Format::Table => report::reclaim::write(&run, config, color, out),
        Format::Json => report::reclaim::write_document(&run, out),
        Format::JsonLines => report::reclaim::write_lines(&run, out),
        Format::Quiet => Ok(()),
    });
    if !quiet {
        for note in report::reclaim::notes(&run) {
            say(format_args!("note: {note}"));
        }
        if report::reclaim::lacks_rights(&run) {
            say(format_args!("hint: {}", Need::Ptrace.purpose()));
            say(format_args!("hint: {HOW_TO_GRANT}"));
        }
    }
    let summary = run.fates.is_some().then(summary);
    match is_told(written, unrecorded, summary.as_deref())? {
        true => Ok(report::reclaim::exit_status(&run)),
        false => Ok(ExitStatus::Impossible),
    }
}

/// Opens the log of a job that is to act. Called before anything is given up, for where only root may write.
fn open_log(action: Action, wanted: &audit::Wanted) -> anyhow::Result<Option<Audit>> {
    match action {
        Action::Act => Audit::open(wanted).context("nothing was done"),
        Action::List | Action::DryRun => Ok(None),
    }
}

/// Whether the operator and the log have been told all; if not, stderr has been told so. `summary` is that of what was done.
///
/// # Errors
/// A listing could not be written.
fn is_told(
    written: io::Result<()>,
    unrecorded: Option<String>,
    summary: Option<&str>,
) -> anyhow::Result<bool> {
    let unwritten = match written {
        // The reader has seen enough; what was done is done, and the status still says how it went.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => None,
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

fn run(config: &Config) -> anyhow::Result<ExitStatus> {
    if config.format != Format::Quiet {
        for note in &config.notes {
            say(format_args!("note: {note}"));
        }
    }
    // What may be planned is told by what was granted, also where nothing of it is used.
    let privileges = Privileges::of_this_thread()?;
    let audit = open_log(config.action, &config.log)?;
    let mut needed = least::to_find(&config.netns, config.owners);
    if config.action == Action::Act {
        needed.extend(least::to_act(&config.policy.methods));
        if config.reclaim.is_some() {
            needed.extend(least::to_reclaim());
        }
    }
    give_up_all_but(&needed);
    let quiet = config.format == Format::Quiet;
    let mut terminal = Terminal::new(config.action == Action::Act, quiet)?;
    let proc = Proc::default();
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
        let time = refill::seconds(duration);
        say(format_args!(
            "watching for new stuck sockets for {time}; Ctrl-C ends it"
        ));
    }
    // Ctrl-C ends the watch, and what was seen is told.
    terminal.begin();
    let refill = refill::watch(run, config, duration, &Proc::default(), terminal);
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

/// Keeps only the capabilities that are `needed`, and then starts the threads that share the work: a thread keeps what it is started
/// with. More rights than that are no reason to leave the host without help.
fn give_up_all_but(needed: &CapsHashSet) {
    if let Err(error) = least::give_up_all_but(needed) {
        say(format_args!(
            "note: more privileges are held than needed: {error:#}"
        ));
    }
    // A thread keeps what it is started with, so none comes before.
    if let Err(error) = threads::prepare() {
        say(format_args!("note: {error}"));
    }
}

/// Writes a line to stderr; where that is closed or full there is nobody to tell.
fn say(message: std::fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr(), "cwkill: {message}");
}

fn report(run: &Run, config: &Config) -> io::Result<()> {
    write_out(config.color, |color, out| match config.format {
        Format::Table => text::write(run, config, color, out),
        Format::Json => json::write_document(run, out),
        Format::JsonLines => json::write_lines(run, out),
        Format::Quiet => Ok(()),
    })
}

fn write_out(
    color: ColorChoice,
    write: impl FnOnce(bool, &mut dyn Write) -> io::Result<()>,
) -> io::Result<()> {
    let stdout = io::stdout();
    let color = match color {
        ColorChoice::Always => true,
        ColorChoice::Never => false,
        ColorChoice::Auto => anstream::AutoStream::choice(&stdout) != anstream::ColorChoice::Never,
    };
    let mut out = BufWriter::with_capacity(64 * 1024, stdout.lock());
    write(color, &mut out)?;
    out.flush()
}

/// What the operator should know beside the results, on stderr.
fn messages(run: &Run, config: &Config) {
    if config.format == Format::Quiet {
        return;
    }
    for note in notes::notes(run) {
        say(format_args!("note: {note}"));
    }
    let mut missing = notes::missing_privileges(run);
    if config.action == Action::List {
        missing.retain(|need| *need == Need::Ptrace);
    }
    for need in &missing {
        say(format_args!("hint: {}", need.purpose()));
    }
    if !missing.is_empty() {
        say(format_args!("hint: {HOW_TO_GRANT}"));
    }
}

/// The clock, the operator's Ctrl-C and the progress bar.
struct Terminal {
    interrupted: Arc<AtomicBool>,
    /// Nothing is being done to any socket.
    idle: Arc<AtomicBool>,
    progress: ProgressBar,
    /// Closed when there is no more progress to show.
    running: Option<mpsc::Sender<()>>,
}

/// How long a run may take before it shows progress.
const PATIENCE: Duration = Duration::from_secs(1);

impl Terminal {
    fn new(acts: bool, quiet: bool) -> anyhow::Result<Self> {
        let interrupted = Arc::new(AtomicBool::new(false));
        let idle = Arc::new(AtomicBool::new(true));
        if acts {
            // Before and after the act a signal ends the program as usual. What is begun is brought to its end and reported, whatever is pressed: a method may have
            // changed options of an owner's socket that it still has to put back. All waits are bounded.
            let signals = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT];
            for signal in signals.into_iter().filter(|signal| !is_ignored(*signal)) {
                signal_hook::flag::register_conditional_default(signal, Arc::clone(&idle))
                    .and_then(|_| signal_hook::flag::register(signal, Arc::clone(&interrupted)))
                    .context("cannot handle Ctrl-C")?;
            }
            // Ctrl-Z while a process is stopped for us would keep it stopped.
            let never = Arc::new(AtomicBool::new(false));
            signal_hook::flag::register_conditional_default(libc::SIGTSTP, Arc::clone(&idle))
                .and_then(|_| signal_hook::flag::register(libc::SIGTSTP, never))
                .context("cannot handle Ctrl-Z")?;
        }
        let progress = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
        progress.set_message("looking for sockets");
        let (running, ended) = mpsc::channel::<()>();
        if !quiet && io::stderr().is_terminal() {
            let progress = progress.clone();
            // Without a thread there is no progress to be seen.
            let _ = std::thread::Builder::new().spawn(move || {
                if ended.recv_timeout(PATIENCE) == Err(mpsc::RecvTimeoutError::Timeout) {
                    progress.set_draw_target(ProgressDrawTarget::stderr());
                    progress.enable_steady_tick(Duration::from_millis(100));
                }
            });
        }
        Ok(Terminal {
            interrupted,
            idle,
            progress: progress.with_style(
                ProgressStyle::with_template("{spinner} {msg} ({pos} sockets acted on)")
                    .expect("the template is fixed and valid"),
            ),
            running: Some(running),
        })
    }

    /// Runs what may write lines to standard error, without what shows the progress.
    fn aside<T>(&self, work: impl FnOnce() -> T) -> T {
        self.progress.suspend(work)
    }

    /// Nothing is being done any more, until the next [`Surroundings::begin`].
    fn rest(&mut self) {
        self.idle.store(true, Ordering::Relaxed);
        self.running = None;
        self.progress.finish_and_clear();
    }
}

/// Whether a signal was to be ignored when the program was started, as nohup(1) does it.
fn is_ignored(signal: libc::c_int) -> bool {
    let status = procfs::process::Process::myself().and_then(|process| process.status());
    status.is_ok_and(|status| status.sigign >> (signal - 1) & 1 == 1)
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.rest();
    }
}

impl Surroundings for Terminal {
    fn now(&self) -> Instant {
        Instant::now()
    }

    fn begin(&self) {
        self.idle.store(false, Ordering::Relaxed);
    }

    fn pause(&self, duration: Duration) {
        self.progress.set_message("waiting for sockets to close");
        std::thread::sleep(duration);
    }

    fn interrupted(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }

    fn acted(&self, method: MethodName, sockets: usize) {
        self.progress.set_message(method.name());
        self.progress
            .inc(u64::try_from(sockets).unwrap_or(u64::MAX));
    }
}
