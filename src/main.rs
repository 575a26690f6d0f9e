//! The `cwkill` program: parse, run, report, exit status; nothing else.

use std::io::{self, BufWriter, IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::{ColorChoice, Parser};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use cwkill::cli::Args;
use cwkill::config::{Action, Config, Format};
use cwkill::finder::owners::Proc;
use cwkill::injector::MethodName;
use cwkill::injector::ladder::Surroundings;
use cwkill::pipeline::{self, Run};
use cwkill::report::{ExitStatus, Tally, json, text};

fn main() -> ExitCode {
    let config = Config::from_args(Args::parse()).unwrap_or_else(|error| error.exit());
    match run(&config) {
        Ok(status) => status.into(),
        Err(error) => {
            eprintln!("cwkill: {error:#}");
            ExitStatus::Impossible.into()
        }
    }
}

fn run(config: &Config) -> anyhow::Result<ExitStatus> {
    if config.format != Format::Quiet {
        for note in &config.notes {
            eprintln!("cwkill: note: {note}");
        }
    }
    let terminal = Terminal::new(config)?;
    let run = pipeline::run(config, &Proc::default(), &terminal)?;
    terminal.progress.finish_and_clear();
    let status = Tally::of(&run).exit_status();
    match report(&run, config) {
        // The reader has seen enough; what was done is done, and the status still says how it went.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
        other => other.context("cannot write the report")?,
    }
    messages(&run, config);
    Ok(status)
}

fn report(run: &Run, config: &Config) -> io::Result<()> {
    let stdout = io::stdout();
    let color = match config.color {
        ColorChoice::Always => true,
        ColorChoice::Never => false,
        ColorChoice::Auto => anstream::AutoStream::choice(&stdout) != anstream::ColorChoice::Never,
    };
    let mut out = BufWriter::with_capacity(64 * 1024, stdout.lock());
    match config.format {
        Format::Table => text::write(run, config, color, &mut out)?,
        Format::Json => json::write_document(run, &mut out)?,
        Format::JsonLines => json::write_lines(run, &mut out)?,
        Format::Quiet => {}
    }
    out.flush()
}

/// What the operator should know beside the results, on stderr.
fn messages(run: &Run, config: &Config) {
    if config.format == Format::Quiet {
        return;
    }
    let mut err = io::stderr().lock();
    for note in text::notes(run) {
        let _ = writeln!(err, "cwkill: note: {note}");
    }
    if config.action != Action::List {
        for need in text::missing_privileges(run) {
            let _ = writeln!(err, "cwkill: hint: {}", need.hint());
        }
    }
}

/// The clock, the operator's Ctrl-C and the progress bar.
struct Terminal {
    interrupted: Arc<AtomicBool>,
    began: Instant,
    progress: ProgressBar,
}

impl Terminal {
    /// How long a run may take before it shows progress.
    const PATIENCE: Duration = Duration::from_secs(1);

    fn new(config: &Config) -> anyhow::Result<Self> {
        let interrupted = Arc::new(AtomicBool::new(false));
        if config.action == Action::Act {
            // The first signal ends the run after what is begun, with a report; the second ends it.
            for signal in [libc::SIGINT, libc::SIGTERM] {
                let flag = || Arc::clone(&interrupted);
                signal_hook::flag::register_conditional_default(signal, flag())
                    .and_then(|_| signal_hook::flag::register(signal, flag()))
                    .context("cannot handle Ctrl-C")?;
            }
        }
        Ok(Terminal {
            interrupted,
            began: Instant::now(),
            progress: ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden()),
        })
    }
}

impl Surroundings for Terminal {
    fn now(&self) -> Instant {
        Instant::now()
    }

    fn pause(&self, duration: Duration) {
        std::thread::sleep(duration);
    }

    fn interrupted(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }

    fn acted(&self, method: MethodName, sockets: usize) {
        self.progress
            .inc(u64::try_from(sockets).unwrap_or(u64::MAX));
        self.progress.set_message(method.name());
        if self.progress.is_hidden()
            && self.began.elapsed() > Self::PATIENCE
            && io::stderr().is_terminal()
        {
            self.progress.set_style(
                ProgressStyle::with_template("{spinner} {msg}: {pos} sockets")
                    .expect("the template is fixed and valid"),
            );
            self.progress.set_draw_target(ProgressDrawTarget::stderr());
        }
    }
}
