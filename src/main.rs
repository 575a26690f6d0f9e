//! The `cwkill` program: parse, run, report, exit status; nothing else.

use std::io::{self, BufWriter, IsTerminal, Write};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::{ColorChoice, Parser};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use cwkill::cli::{Cli, Command};
use cwkill::config::{Action, Config, Format};
use cwkill::finder::owners::Proc;
use cwkill::injector::MethodName;
use cwkill::injector::ladder::Surroundings;
use cwkill::pipeline::{self, Run};
use cwkill::privileges::{HOW_TO_GRANT, Need};
use cwkill::reclaim::command;
use cwkill::report::{self, ExitStatus, exit_status, json, notes, text};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let ended = match cli.command {
        None => {
            let config = Config::from_args(cli.args).unwrap_or_else(|error| error.exit());
            run(&config)
        }
        Some(Command::Reclaim(args)) => {
            let config = command::Config::from_args(args).unwrap_or_else(|error| error.exit());
            reclaim(&config)
        }
    };
    match ended {
        Ok(status) => status.into(),
        Err(error) => {
            say(format_args!("{error:#}"));
            ExitStatus::Impossible.into()
        }
    }
}

fn reclaim(config: &command::Config) -> anyhow::Result<ExitStatus> {
    let quiet = config.format == Format::Quiet;
    let terminal = Terminal::new(config.action == Action::Act, quiet)?;
    let run = command::run(config, &Proc::default(), &terminal)?;
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
    match written {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
        Err(error) if run.fates.is_some() => {
            let summary = report::reclaim::summary(&run, config);
            say(format_args!(
                "the work is done ({summary}), but its report cannot be written: {error}"
            ));
            return Ok(ExitStatus::Impossible);
        }
        other => other.context("cannot write the listing")?,
    }
    Ok(report::reclaim::exit_status(&run))
}

fn run(config: &Config) -> anyhow::Result<ExitStatus> {
    if config.format != Format::Quiet {
        for note in &config.notes {
            say(format_args!("note: {note}"));
        }
    }
    let quiet = config.format == Format::Quiet;
    let terminal = Terminal::new(config.action == Action::Act, quiet)?;
    let run = pipeline::run(config, &Proc::default(), &terminal)?;
    drop(terminal);
    let written = report(&run, config);
    messages(&run, config);
    match written {
        // The reader has seen enough; what was done is done, and the status still says how it went.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
        Err(error) if run.deeds.is_some() => {
            say(format_args!(
                "the work is done ({}), but its report cannot be written: {error}",
                text::summary(&run, config)
            ));
            return Ok(ExitStatus::Impossible);
        }
        other => other.context("cannot write the listing")?,
    }
    Ok(exit_status(&run))
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
    /// Closed when the run is over.
    _running: mpsc::Sender<()>,
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
            std::thread::spawn(move || {
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
            _running: running,
        })
    }
}

/// Whether a signal was to be ignored when the program was started, as nohup(1) does it.
fn is_ignored(signal: libc::c_int) -> bool {
    let status = procfs::process::Process::myself().and_then(|process| process.status());
    status.is_ok_and(|status| status.sigign >> (signal - 1) & 1 == 1)
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.idle.store(true, Ordering::Relaxed);
        self.progress.finish_and_clear();
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
