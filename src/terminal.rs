//! The operator's terminal: stdout that may be closed, stderr that may be nobody's, the progress bar and Ctrl-C.

use std::io::{self, BufWriter, IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::ColorChoice;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::control::Control;
use crate::model::Method;

/// Writes a line to stderr; where that is closed or full there is nobody to tell.
pub(crate) fn say(message: std::fmt::Arguments<'_>) {
    let _ = writeln!(io::stderr(), "cwkill: {message}");
}

/// Writes results to stdout, through a buffer.
pub(crate) fn write_out(write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
    let mut out = BufWriter::with_capacity(64 * 1024, io::stdout().lock());
    write(&mut out)?;
    out.flush()
}

/// What came of writing; that the reader has seen enough is no error.
pub(crate) fn unless_closed(written: io::Result<()>) -> io::Result<()> {
    match written {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}

/// Whether stdout is to be coloured.
pub(crate) fn is_coloured(choice: ColorChoice) -> bool {
    match choice {
        ColorChoice::Always => true,
        ColorChoice::Never => false,
        ColorChoice::Auto => {
            anstream::AutoStream::choice(&io::stdout()) != anstream::ColorChoice::Never
        }
    }
}

/// The columns of the screen: COLUMNS in the environment, or those of the terminal.
pub(crate) fn columns() -> Option<usize> {
    let told = std::env::var("COLUMNS").ok();
    let told = told.and_then(|columns| columns.parse().ok());
    told.filter(|columns| *columns > 0)
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
    /// Nothing is being done to any socket.
    idle: Arc<AtomicBool>,
    progress: ProgressBar,
    /// Closed when there is no more progress to show.
    running: Option<mpsc::Sender<()>>,
}

/// How long a run may take before it shows progress.
const PATIENCE: Duration = Duration::from_secs(1);

impl Terminal {
    pub(crate) fn new(acts: bool, quiet: bool) -> anyhow::Result<Self> {
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
        progress.set_message("searching for sockets");
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
    pub(crate) fn aside<T>(&self, work: impl FnOnce() -> T) -> T {
        self.progress.suspend(work)
    }

    /// Nothing is being done any more, until the next [`Control::begin`].
    pub(crate) fn rest(&mut self) {
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

impl Control for Terminal {
    fn now(&self) -> Instant {
        Instant::now()
    }

    fn begin(&self) {
        self.idle.store(false, Ordering::Relaxed);
    }

    fn sleep(&self, duration: Duration) {
        self.progress.set_message("waiting for sockets to close");
        std::thread::sleep(duration);
    }

    fn interrupted(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }

    fn progress(&self, method: Method, sockets: usize) {
        self.progress.set_message(method.name());
        self.progress
            .inc(u64::try_from(sockets).unwrap_or(u64::MAX));
    }
}
