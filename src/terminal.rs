//! The operator's terminal: stdout, stderr, either of which may be closed, the progress bar and Ctrl-C.

use std::io::{self, BufWriter, IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::ColorChoice;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::control::Control;
use crate::model::Method;

/// Writes a line to stderr. If that fails, there is no other place to report it.
pub(crate) fn say(message: std::fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr(), "cwkill: {message}");
}

/// Writes results to stdout, through a buffer.
pub(crate) fn write_out(write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
    let mut out = BufWriter::with_capacity(64 * 1024, io::stdout().lock());
    write(&mut out)?;
    out.flush()
}

/// The result of writing to stdout. If the reader has closed it, that is not an error.
pub(crate) fn unless_closed(written: io::Result<()>) -> io::Result<()> {
    match written {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}

/// Whether the output on stdout must be coloured.
pub(crate) fn is_coloured(choice: ColorChoice) -> bool {
    match choice {
        ColorChoice::Always => true,
        ColorChoice::Never => false,
        ColorChoice::Auto => {
            anstream::AutoStream::choice(&io::stdout()) != anstream::ColorChoice::Never
        }
    }
}

/// The width of the output in columns: COLUMNS from the environment, or the width of the terminal.
pub(crate) fn columns() -> Option<usize> {
    let from_environment = std::env::var("COLUMNS").ok();
    let from_environment = from_environment.and_then(|columns| columns.parse().ok());
    from_environment
        .filter(|columns| *columns > 0)
        .or_else(|| comfy_table::Table::new().width().map(usize::from))
}

/// The rows of the terminal, if stdout is one.
pub(crate) fn rows() -> Option<usize> {
    let (_, height) = terminal_size::terminal_size_of(io::stdout())?;
    Some(height.0.into()).filter(|rows| *rows > 0)
}

/// The clock, the operator's Ctrl-C and the progress bar.
pub(crate) struct Terminal {
    interrupted: Arc<AtomicBool>,
    /// cwkill is not acting, so a signal may end it at once.
    idle: Arc<AtomicBool>,
    progress: ProgressBar,
    /// Dropped when there is no more progress to show.
    running: Option<mpsc::Sender<()>>,
}

/// The time after which a run shows its progress.
const PROGRESS_DELAY: Duration = Duration::from_secs(1);

impl Terminal {
    pub(crate) fn new(acts: bool, quiet: bool) -> anyhow::Result<Self> {
        let interrupted = Arc::new(AtomicBool::new(false));
        let idle = Arc::new(AtomicBool::new(true));
        if acts {
            // Before and after the acts a signal ends cwkill as usual. During the acts cwkill first finishes and reports those
            // that it has begun, because a method may have changed options of an owner's socket that it must restore. All waits
            // are bounded.
            let signals = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT];
            for signal in signals.into_iter().filter(|signal| !is_ignored(*signal)) {
                signal_hook::flag::register_conditional_default(signal, Arc::clone(&idle))
                    .and_then(|_| signal_hook::flag::register(signal, Arc::clone(&interrupted)))
                    .context("cannot handle Ctrl-C")?;
            }
            // If Ctrl-Z stopped cwkill during a reclaim, an owner that cwkill has stopped would stay stopped.
            let never = Arc::new(AtomicBool::new(false));
            signal_hook::flag::register_conditional_default(libc::SIGTSTP, Arc::clone(&idle))
                .and_then(|_| signal_hook::flag::register(libc::SIGTSTP, never))
                .context("cannot handle Ctrl-Z")?;
        }
        let progress = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
        progress.set_message("searching");
        let (running, ended) = mpsc::channel::<()>();
        if !quiet && io::stderr().is_terminal() {
            let progress = progress.clone();
            // Without this thread no progress is shown.
            let _ = std::thread::Builder::new().spawn(move || {
                if ended.recv_timeout(PROGRESS_DELAY) == Err(mpsc::RecvTimeoutError::Timeout) {
                    progress.set_draw_target(ProgressDrawTarget::stderr());
                    progress.enable_steady_tick(Duration::from_millis(100));
                }
            });
        }
        Ok(Terminal {
            interrupted,
            idle,
            progress: progress.with_style(
                ProgressStyle::with_template("{spinner} {msg}")
                    .expect("the template is fixed and valid"),
            ),
            running: Some(running),
        })
    }

    /// Hides the progress bar while `work` runs, which may write lines to stderr.
    pub(crate) fn aside<T>(&self, work: impl FnOnce() -> T) -> T {
        self.progress.suspend(work)
    }

    /// Shows `message`, and the number of sockets that were acted on so far, if any.
    fn show(&self, message: &'static str) {
        match self.progress.position() {
            0 => self.progress.set_message(message),
            count => {
                let text = format!("{message} ({count} sockets acted on)");
                self.progress.set_message(text);
            }
        }
    }

    /// Marks the end of the acts, until the next [`Control::hold_signals`].
    pub(crate) fn release_signals(&mut self) {
        self.idle.store(true, Ordering::Relaxed);
        self.running = None;
        self.progress.finish_and_clear();
    }
}

/// Whether a signal was already ignored when cwkill started, for example because of nohup(1).
fn is_ignored(signal: libc::c_int) -> bool {
    let status = procfs::process::Process::myself().and_then(|process| process.status());
    status.is_ok_and(|status| status.sigign >> (signal - 1) & 1 == 1)
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.release_signals();
    }
}

impl Control for Terminal {
    fn now(&self) -> Instant {
        Instant::now()
    }

    fn hold_signals(&self) {
        self.idle.store(false, Ordering::Relaxed);
    }

    fn sleep(&self, duration: Duration) {
        self.show("waiting");
        std::thread::sleep(duration);
    }

    fn interrupted(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }

    fn progress(&self, method: Method, sockets: usize) {
        self.progress
            .inc(u64::try_from(sockets).unwrap_or(u64::MAX));
        self.show(method.name());
    }
}
