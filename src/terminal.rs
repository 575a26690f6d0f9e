//! The operator's terminal: stdout, stderr, either of which may be closed, the progress bar and Ctrl-C.

use std::io::{self, BufWriter, IsTerminal, Write};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use anyhow::Context;
use clap::ColorChoice;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, poll};

use crate::control::Control;
use crate::model::Method;
use crate::report::overview::Screen;
use crate::sys;
use crate::text::{self, escape, escape_lines};

/// Writes a line to stderr. If that fails, there is no other place to report it.
///
/// The message may contain names, and words of the command line that come from another program. They must not move the cursor.
///
/// On a terminal the line is broken between words.
pub(crate) fn say(message: std::fmt::Arguments<'_>) {
    let line = format!("cwkill: {}", escape(&message.to_string()));
    for row in broken(&line) {
        let _ = writeln!(io::stderr(), "{row}");
    }
}

/// The rows of a line on stderr.
pub(crate) fn broken(line: &str) -> Vec<String> {
    let size = terminal_size::terminal_size_of(io::stderr());
    let columns = size.map(|(width, _)| usize::from(width.0));
    text::broken(line, columns.filter(|columns| *columns > 0))
}

/// Prints what clap has to say about the command line. It may quote words as they are.
///
/// clap breaks the lines of a help; those of an error are broken here.
pub(crate) fn print_usage(error: &clap::Error) {
    let is_safe = |word: std::ffi::OsString| {
        let word = word.to_string_lossy();
        escape(&word) == word
    };
    let is_safe = std::env::args_os().all(is_safe);
    let rendered = error.render();
    let plain = escape_lines(&rendered.to_string());
    // If printing fails, there is no other place to report it.
    let _ = match (is_safe, error.use_stderr()) {
        (true, false) => error.print(),
        (false, false) => write!(io::stdout(), "{plain}"),
        (_, true) => {
            let styled = rendered.ansi().to_string();
            let lines = match is_safe {
                true => plain.lines().zip(styled.lines()),
                false => plain.lines().zip(plain.lines()),
            };
            let mut rows =
                lines.flat_map(|(plain, shown)| text::broken_alike(shown, &broken(plain)));
            // Without colours if stderr is no terminal.
            let mut out = anstream::stderr();
            rows.try_for_each(|row| writeln!(out, "{row}"))
        }
    };
}

/// Ignores the signals with which the kernel answers a write. cwkill starts no other program that could inherit this: only itself.
///
/// - SIGXFSZ: a write beyond RLIMIT_FSIZE then fails with EFBIG, as on a full disk. By default the signal would end cwkill after its
///   acts, and their result would be lost.
/// - SIGTTOU: with `stty tostop`, a write to the terminal would stop cwkill if it runs in the background, between two acts as
///   well. Ignored, the kernel writes as without that setting (drivers/tty/tty_jobctrl.c, __tty_check_change).
pub(crate) fn ignore_signals_of_writes() {
    // This cannot fail: the signals exist.
    let _ = sys::ignore_signal(libc::SIGXFSZ);
    let _ = sys::ignore_signal(libc::SIGTTOU);
}

/// Writes results to stdout, through a buffer.
pub(crate) fn write_out(write: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
    let mut out = BufWriter::with_capacity(64 * 1024, io::stdout().lock());
    write(&mut out)?;
    out.flush()
}

/// As [`write_out`], of a run that goes on, and on which Ctrl-C has no effect at once. If the operator wants it to end, it does not wait for a
/// reader that does not read.
///
/// # Errors
/// As write(2), or the operator wants to end it and nobody reads.
pub(crate) fn write_out_unless(
    control: &dyn Control,
    write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> io::Result<()> {
    let mut rows = Vec::new();
    write(&mut rows)?;
    write_in_parts(&rows, io::stdout(), control)
}

/// A pipe that poll(2) calls writable takes so many bytes without waiting (PIPE_BUF).
const PART: usize = 4096;
/// The longest time from Ctrl-C to the end of a write that waits.
const WRITE_WAIT_MS: u16 = 50;

fn write_in_parts(
    rows: &[u8],
    mut out: impl Write + AsFd,
    control: &dyn Control,
) -> io::Result<()> {
    for part in rows.chunks(PART) {
        loop {
            let mut polled = [PollFd::new(out.as_fd(), PollFlags::POLLOUT)];
            match poll(&mut polled, WRITE_WAIT_MS) {
                Ok(0) | Err(Errno::EINTR) if control.interrupted() => {
                    return Err(io::Error::new(
                        io::ErrorKind::TimedOut,
                        "nobody reads the output",
                    ));
                }
                Ok(0) | Err(Errno::EINTR) => {}
                // Also what cannot be polled: the write says why.
                _ => break,
            }
        }
        out.write_all(part)?;
        out.flush()?;
    }
    Ok(())
}

/// The result of writing to stdout. If the reader has closed it, that is not an error.
pub(crate) fn ignore_closed_reader(written: io::Result<()>) -> io::Result<()> {
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

/// The width of the output in columns: COLUMNS from the environment, or the width of the terminal. A terminal that does not know its size
/// says 0.
pub(crate) fn columns() -> Option<usize> {
    let from_environment = std::env::var("COLUMNS").ok();
    let from_environment = from_environment.and_then(|columns| columns.parse().ok());
    let of_terminal = || comfy_table::Table::new().width().map(usize::from);
    let is_known = |columns: &usize| *columns > 0;
    let from_environment = from_environment.filter(is_known);
    from_environment.or_else(|| of_terminal().filter(is_known))
}

/// The rows of the terminal, if stdout is one.
pub(crate) fn rows() -> Option<usize> {
    let (_, height) = terminal_size::terminal_size_of(io::stdout())?;
    Some(height.0.into()).filter(|rows| *rows > 0)
}

/// What the terminal on stdout can show; `None` if stdout is not a terminal. One that does not know its size has that of a VT100.
pub(crate) fn screen(color: ColorChoice) -> Option<Screen> {
    const USUAL: (usize, usize) = (80, 24);
    if !io::stdout().is_terminal() {
        return None;
    }
    let size = terminal_size::terminal_size_of(io::stdout());
    let size = size.map(|(width, height)| (usize::from(width.0), usize::from(height.0)));
    let (columns, rows) = size
        .filter(|(columns, rows)| *columns > 0 && *rows > 0)
        .unwrap_or(USUAL);
    Some(Screen {
        columns,
        rows,
        color: is_coloured(color),
        ascii: !is_utf8(),
    })
}

/// Whether the locale says that the terminal shows UTF-8: the first of these variables that is set decides (locale(7)).
fn is_utf8() -> bool {
    let set = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
    let locale = ["LC_ALL", "LC_CTYPE", "LANG"].into_iter().find_map(set);
    let locale = locale.unwrap_or_default().to_ascii_lowercase();
    locale.ends_with("utf-8") || locale.ends_with("utf8")
}

/// Signals of an operator who wants cwkill to end.
const REQUESTS: [i32; 4] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT];
/// Timers and limits that cwkill may have inherited (execve(2) keeps alarm(2) and RLIMIT_CPU), and signals without a fixed meaning.
/// Their default action ends a process.
const LIMITS: [i32; 6] = [
    libc::SIGALRM,
    libc::SIGVTALRM,
    libc::SIGPROF,
    libc::SIGXCPU,
    libc::SIGUSR1,
    libc::SIGUSR2,
];
/// Their default action ends a process as well, and nobody sends them to cwkill on purpose.
fn stray_signals() -> impl Iterator<Item = i32> {
    let real_time = libc::SIGRTMIN()..=libc::SIGRTMAX();
    [libc::SIGIO, libc::SIGPWR, libc::SIGSTKFLT]
        .into_iter()
        .chain(real_time)
}

/// The clock, the operator's Ctrl-C and the progress bar.
pub(crate) struct Terminal {
    interrupted: Arc<AtomicBool>,
    /// cwkill is not acting, so a request of the operator may end it at once.
    idle: Arc<AtomicBool>,
    /// cwkill has not acted yet, so an expired limit may end it at once.
    untouched: Arc<AtomicBool>,
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
        let untouched = Arc::new(AtomicBool::new(true));
        if acts {
            // During the acts cwkill first finishes and reports those that it has begun, because a method may have changed options
            // of an owner's socket that it must restore. All waits are bounded. Before and after the acts a request ends cwkill as
            // usual: the log may be on a disk that hangs. A limit ends it only before: afterwards the report and the outcomes in
            // the log would be lost.
            let ignored = ignored_signals();
            let handle = |signal: i32, ends: &Arc<AtomicBool>| {
                signal_hook::flag::register_conditional_default(signal, Arc::clone(ends))
                    .and_then(|_| signal_hook::flag::register(signal, Arc::clone(&interrupted)))
            };
            for (signals, ends) in [(&REQUESTS[..], &idle), (&LIMITS[..], &untouched)] {
                for signal in signals.iter().filter(|signal| !is_in(ignored, **signal)) {
                    handle(*signal, ends).context("cannot handle Ctrl-C")?;
                }
            }
            for signal in stray_signals() {
                sys::ignore_signal(signal).context("cannot ignore a signal")?;
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
            untouched,
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

    /// Runs `work`, which waits for a person: meanwhile a request ends cwkill at once. Not while something is in flight.
    pub(crate) fn while_idle<T>(&self, work: impl FnOnce() -> T) -> T {
        self.idle.store(true, Ordering::Relaxed);
        let done = self.aside(work);
        self.hold_signals();
        done
    }

    /// Marks the end of the acts, until the next [`Control::hold_signals`].
    pub(crate) fn release_signals(&mut self) {
        self.idle.store(true, Ordering::Relaxed);
        self.running = None;
        self.progress.finish_and_clear();
    }
}

/// The signals that were already ignored when cwkill started, for example because of nohup(1): bit N-1 for signal N.
fn ignored_signals() -> u64 {
    let status = procfs::process::Process::myself().and_then(|process| process.status());
    status.map_or(0, |status| status.sigign)
}

fn is_in(set: u64, signal: i32) -> bool {
    set >> (signal - 1) & 1 == 1
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
        self.untouched.store(false, Ordering::Relaxed);
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

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    struct Interrupted(bool);

    impl Control for Interrupted {
        fn now(&self) -> Instant {
            Instant::now()
        }

        fn sleep(&self, _: Duration) {}

        fn interrupted(&self) -> bool {
            self.0
        }

        fn progress(&self, _: Method, _: usize) {}
    }

    #[test]
    fn nobody_waits_for_a_reader_that_does_not_read() {
        let rows = vec![b'x'; 1 << 20];
        let (reader, writer) = io::pipe().unwrap();
        // The queue of a pipe has no room for all.
        let error = write_in_parts(&rows, &writer, &Interrupted(true)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop(reader);
        let error = write_in_parts(&rows, &writer, &Interrupted(true)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
        // What takes all is not left without its last rows.
        let null = File::options().write(true).open("/dev/null").unwrap();
        write_in_parts(&rows, &null, &Interrupted(true)).unwrap();
        let (mut reader, writer) = io::pipe().unwrap();
        let reading = std::thread::spawn(move || io::copy(&mut reader, &mut io::sink()));
        write_in_parts(&rows, &writer, &Interrupted(false)).unwrap();
        drop(writer);
        assert_eq!(reading.join().unwrap().unwrap(), 1 << 20);
    }
}
