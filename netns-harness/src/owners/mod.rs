//! Real programs that leak descriptors, in C, Go, Java, JavaScript and Python, and the effect of `cwkill --reclaim` on them.
//! They are compiled when they are needed.
//!
//! - [`Owner`]: a program that leaks dead sockets on order and checks itself for damage
//! - [`leaks`]: servers that forget to close connections, for `cwkill trace`
//! - [`runtimes`]: servers that leak until EMFILE and are recovered, repeatedly and under load
//! - `stops`: measures how long an owner is stopped

pub mod leaks;
pub mod runtimes;
pub(crate) mod stops;

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::host::Host;

/// How long to wait for an answer of a program.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// A temporary directory to compile in, removed when dropped.
#[derive(Debug)]
pub(crate) struct BuildDir(PathBuf);

impl BuildDir {
    pub(crate) fn new() -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("netns-harness-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).with_context(|| format!("create {}", path.display()))?;
        Ok(Self(path))
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// Compiles the program of [`Owner`].
    pub(crate) fn compile_owner(&self, flags: &[&str]) -> Result<PathBuf> {
        let sources = [
            ("owner.h", include_str!("../../owners/owner.h")),
            ("hangs.c", include_str!("../../owners/hangs.c")),
            ("locks.c", include_str!("../../owners/locks.c")),
            ("reacts.c", include_str!("../../owners/reacts.c")),
            ("ring.c", include_str!("../../owners/ring.c")),
            ("spins.c", include_str!("../../owners/spins.c")),
            ("transfers.c", include_str!("../../owners/transfers.c")),
            ("waits.c", include_str!("../../owners/waits.c")),
            ("works.c", include_str!("../../owners/works.c")),
        ];
        for (name, text) in sources {
            fs::write(self.path(name), text)?;
        }
        let compiler = "cc -O2 -pthread -o owner owner.c hangs.c locks.c reacts.c ring.c spins.c transfers.c waits.c works.c";
        let compiler: Vec<&str> = compiler.split(' ').collect();
        let text = include_str!("../../owners/owner.c");
        self.build("owner.c", text, &[&compiler, flags].concat())?;
        Ok(self.path("owner"))
    }

    /// Compiles the 32-bit program, which knows some orders of [`Owner`].
    fn compile_bits32(&self) -> Result<PathBuf> {
        let compiler = "cc -m32 -O2 -ffreestanding -fno-pic -fno-pie -fno-stack-protector -mno-sse -nostdlib \
                        -static -no-pie -o bits32 bits32.c";
        let compiler: Vec<&str> = compiler.split_whitespace().collect();
        let text = include_str!("../../owners/bits32.c");
        self.build("bits32.c", text, &compiler)?;
        Ok(self.path("bits32"))
    }

    /// Writes a source file and compiles it.
    pub(crate) fn build(&self, source: &str, text: &str, compiler: &[&str]) -> Result<()> {
        fs::write(self.path(source), text)?;
        let (program, arguments) = compiler
            .split_first()
            .context("an empty compiler command")?;
        let output = Command::new(program)
            .args(arguments)
            .current_dir(&self.0)
            .env("GOCACHE", self.path("cache"))
            .output()
            .with_context(|| format!("run {program}"))?;
        ensure!(
            output.status.success(),
            "{program} {source}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(())
    }
}

impl Drop for BuildDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// How the program of [`Owner`] is linked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Build {
    /// With the compiler's defaults.
    Plain,
    /// Statically, without symbols, at a fixed address.
    StaticStripped,
    /// The 32-bit program of `owners/bits32.c`, for x86-64.
    Bits32,
}

/// A program that leaks dead sockets on order. Killed when dropped.
#[derive(Debug)]
pub struct Owner {
    child: Child,
    stdin: ChildStdin,
    answers: Receiver<String>,
}

impl Owner {
    /// Starts the program in a mode of `owners/*.c` with this number of threads.
    ///
    /// # Errors
    /// There is no C compiler, or the program does not start.
    pub fn start(host: &Host, build: Build, mode: &str, threads: usize) -> Result<Self> {
        let program = Self::program(build)?;
        Self::start_through(host, &[], &program, mode, threads)
    }

    /// As [`Self::start`], through a wrapper such as `setpriv` that executes its arguments.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_through(
        host: &Host,
        wrapper: &[&str],
        program: &Path,
        mode: &str,
        threads: usize,
    ) -> Result<Self> {
        let program = program.display().to_string();
        let threads = threads.to_string();
        let words: Vec<&str> = wrapper
            .iter()
            .copied()
            .chain([&*program, mode, &threads])
            .collect();
        let mut child = host
            .command(words[0])
            .args(&words[1..])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let stdin = child.stdin.take().context("no stdin")?;
        let stdout = BufReader::new(child.stdout.take().context("no stdout")?);
        let (lines, answers) = channel();
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                if lines.send(line).is_err() {
                    break;
                }
            }
        });
        let owner = Self {
            child,
            stdin,
            answers,
        };
        let ready = owner.answer()?;
        ensure!(ready == "ready", "{mode}: {ready}");
        Ok(owner)
    }

    /// The path of the program. It is compiled once and kept only as an open file.
    ///
    /// # Errors
    /// There is no C compiler.
    pub fn program(build: Build) -> Result<PathBuf> {
        static PLAIN: OnceLock<Result<File, String>> = OnceLock::new();
        static STATIC: OnceLock<Result<File, String>> = OnceLock::new();
        static BITS32: OnceLock<Result<File, String>> = OnceLock::new();
        let cell = match build {
            Build::Plain => &PLAIN,
            Build::StaticStripped => &STATIC,
            Build::Bits32 => &BITS32,
        };
        let compile = || -> Result<File> {
            let build_dir = BuildDir::new()?;
            Ok(File::open(match build {
                Build::Plain => build_dir.compile_owner(&[])?,
                Build::StaticStripped => build_dir.compile_owner(&["-static", "-s", "-no-pie"])?,
                Build::Bits32 => build_dir.compile_bits32()?,
            })?)
        };
        match cell.get_or_init(|| compile().map_err(|error| format!("{error:#}"))) {
            Ok(file) => Ok(format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()).into()),
            Err(error) => bail!("{error}"),
        }
    }

    /// Pid of the process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends an order and returns the answer.
    ///
    /// # Errors
    /// The program does not answer.
    pub fn order(&mut self, order: &str) -> Result<String> {
        // In one write(2): the 32-bit program does not wait for the end of the line.
        let line = format!("{order}\n");
        let written = self.stdin.write_all(line.as_bytes());
        written.with_context(|| format!("order `{order}`"))?;
        self.answer().with_context(|| format!("order `{order}`"))
    }

    fn answer(&self) -> Result<String> {
        self.answers
            .recv_timeout(ANSWER_TIMEOUT)
            .context("the program does not answer")
    }

    /// Sends an order whose answer is a list of descriptors, and returns them.
    ///
    /// # Errors
    /// The program does not answer.
    pub fn order_fds(&mut self, order: &str) -> Result<Vec<i32>> {
        numbers(&self.order(order)?)
    }

    /// Lets the program leak dead sockets. Returns their descriptors.
    ///
    /// # Errors
    /// The program does not answer.
    pub fn leak(&mut self, count: usize) -> Result<Vec<i32>> {
        self.order_fds(&format!("leak {count}"))
    }

    /// Lets the program leak sockets that their peers have closed, and whose end it has read. Only the 32-bit program does that.
    ///
    /// # Errors
    /// The program does not answer.
    pub fn leak_ends(&mut self, count: usize) -> Result<Vec<i32>> {
        self.order_fds(&format!("ends {count}"))
    }

    /// Has a thread of the program keep the lock of an open connection, as if it waited for a page of a dead file server.
    ///
    /// # Errors
    /// The program does not answer: it needs userfaultfd(2) with CAP_SYS_PTRACE.
    pub fn lock_a_socket(&mut self) -> Result<()> {
        self.order("lock").map(drop)
    }

    /// Lets that thread go on. It then has received what was there.
    ///
    /// # Errors
    /// The program does not answer.
    pub fn unlock_the_socket(&mut self) -> Result<usize> {
        Ok(self.order("unlock")?.parse()?)
    }

    /// Lets the program leak dead sockets with 30000 unread bytes. Returns their descriptors.
    ///
    /// # Errors
    /// The program does not answer.
    pub fn leak_unread(&mut self, count: usize) -> Result<Vec<i32>> {
        numbers(&self.order(&format!("answered {count}"))?)
    }

    /// Lets the program leak sockets in CLOSE-WAIT. Returns their descriptors.
    ///
    /// # Errors
    /// The program does not answer.
    pub fn leak_stuck(&mut self, count: usize) -> Result<Vec<i32>> {
        numbers(&self.order(&format!("stuck {count}"))?)
    }

    /// As [`Self::leak`], with another open descriptor after each socket. Returns the descriptors of the dead sockets.
    ///
    /// # Errors
    /// The program does not answer.
    pub fn leak_scattered(&mut self, count: usize) -> Result<Vec<i32>> {
        self.order_fds(&format!("scatter {count}"))
    }

    /// The number of wake-ups of the program's event loop since the last call.
    ///
    /// # Errors
    /// The program does not answer, or has no loop.
    pub fn wakes(&mut self) -> Result<u64> {
        Ok(self.order("wakes")?.parse()?)
    }

    /// The longest time between two heartbeats since the last call.
    ///
    /// # Errors
    /// The program does not answer.
    pub fn longest_gap(&mut self) -> Result<Duration> {
        Ok(Duration::from_micros(self.order("gap")?.parse()?))
    }

    /// The number of checks that passed.
    ///
    /// # Errors
    /// A check failed; the message says which.
    pub fn report(&mut self) -> Result<u64> {
        let report = self.order("report")?;
        match report.strip_prefix("ok ") {
            Some(count) => Ok(count.parse()?),
            None => bail!("{report}"),
        }
    }

    /// Whether the process still runs.
    #[must_use]
    pub fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Sends a signal to the process.
    ///
    /// # Errors
    /// The process has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(self.child.id().cast_signed()), signal)?)
    }

    /// The open descriptors of the process.
    ///
    /// # Errors
    /// The process has ended.
    pub fn descriptors(&self) -> Result<Vec<i32>> {
        descriptors(self.pid())
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn numbers(line: &str) -> Result<Vec<i32>> {
    let number = |word: &str| word.parse().with_context(|| format!("`{line}`"));
    line.split_whitespace().map(number).collect()
}

/// The open descriptors of a process.
pub(crate) fn descriptors(pid: u32) -> Result<Vec<i32>> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        numbers.extend(
            entry?
                .file_name()
                .to_str()
                .and_then(|name| name.parse::<i32>().ok()),
        );
    }
    numbers.sort_unstable();
    Ok(numbers)
}
