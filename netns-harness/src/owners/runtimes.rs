//! Servers in several languages that leak until they cannot accept any more, and go on after `cwkill --reclaim`.
//!
//! All the while other connections exchange bytes that both sides check. A run is: leak to EMFILE, see that nobody is
//! served, reclaim, see that a new connection is.

use std::fmt;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use clap::ValueEnum;
use serde_json::Value;

use super::{BuildDir, descriptors};
use crate::bench::{beside_this_program, on_path};
use crate::host::Host;
use crate::kernel::TcpState;
use crate::{lab::Lab, privilege};

/// What a server is written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Runtime {
    /// A thread a connection.
    C,
    /// The same, linked statically and stripped.
    CStatic,
    /// A goroutine a connection, all in an epoll set: needs --reclaim-force.
    Go,
    /// A thread a connection, and one that closes what is forgotten: needs --reclaim-force.
    Java,
    /// One thread and an epoll set: needs --reclaim-force.
    Node,
    /// A thread a connection.
    Python,
}

impl fmt::Display for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = self.to_possible_value();
        f.write_str(value.as_ref().map_or("?", |value| value.get_name()))
    }
}

impl Runtime {
    /// What it takes to build and run it, and is not there.
    #[must_use]
    pub fn missing_tool(self) -> Option<&'static str> {
        let tools: &[&str] = match self {
            Self::C | Self::CStatic => &["cc"],
            Self::Go => &["go"],
            Self::Java => &["java", "javac"],
            Self::Node => &["node"],
            Self::Python => &["python3"],
        };
        tools.iter().copied().find(|tool| !on_path(tool))
    }

    /// Whether `--reclaim` leaves its connections alone: they are in an epoll set, or a collector may close them.
    #[must_use]
    pub fn needs_force(self) -> bool {
        matches!(self, Self::Go | Self::Java | Self::Node)
    }

    /// Builds the server; the command that runs it.
    fn build(self, build_dir: &BuildDir) -> Result<Vec<String>> {
        let path = |name: &str| build_dir.path(name).display().to_string();
        let c = |flags: &[&str]| -> Result<Vec<String>> {
            let compiler = [&["cc", "-O2", "-pthread", "-o", "echo", "echo.c"], flags].concat();
            build_dir.build("echo.c", include_str!("../../owners/echo.c"), &compiler)?;
            Ok(vec![path("echo")])
        };
        match self {
            Self::C => c(&[]),
            Self::CStatic => c(&["-static", "-s"]),
            Self::Go => {
                let compiler = ["go", "build", "-o", "echo", "echo.go"];
                build_dir.build("echo.go", include_str!("../../owners/echo.go"), &compiler)?;
                Ok(vec![path("echo")])
            }
            Self::Java => {
                let text = include_str!("../../owners/Echo.java");
                build_dir.build("Echo.java", text, &["javac", "Echo.java"])?;
                let words = ["java", "-Xmx64m", "-XX:+UseSerialGC", "-cp"];
                Ok(words
                    .map(str::to_owned)
                    .into_iter()
                    .chain([path(""), "Echo".into()])
                    .collect())
            }
            Self::Node => {
                let text = include_str!("../../owners/echo.js");
                build_dir.build("echo.js", text, &["true"])?;
                Ok(vec!["node".into(), path("echo.js")])
            }
            Self::Python => {
                let text = include_str!("../../owners/echo.py");
                build_dir.build("echo.py", text, &["true"])?;
                Ok(vec!["python3".into(), path("echo.py")])
            }
        }
    }
}

/// What to do.
#[derive(Debug, Clone, clap::Args)]
pub struct Runtimes {
    /// Which servers; all, if none is named
    #[arg(value_enum)]
    pub runtimes: Vec<Runtime>,
    /// How often each is leaked to its limit and recovered
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    pub runs: u32,
    /// Connections with checked bytes beside the leaked ones
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub clients: usize,
    /// The program to run
    #[arg(long, value_name = "PATH", default_value = "cwkill")]
    pub cwkill: PathBuf,
}

/// What came of the runs of one runtime.
#[derive(Debug, Clone, Copy, Default)]
pub struct RecoveryStats {
    /// Runs that ended with a server that accepts.
    pub recovered: u32,
    /// Descriptors that were freed.
    pub freed: u64,
    /// Bytes of other connections that went there and back, all of them right.
    pub bytes: u64,
    /// The longest time that a server was stopped, in microseconds, as `cwkill` says.
    pub longest_stop_us: u64,
}

/// Descriptors that a server may have. A JVM needs some thirty for itself.
const LIMIT: usize = 128;
/// Runs of one process of a server.
const RUNS_OF_A_SERVER: u32 = 20;
const PORT: u16 = 7400;
const PATIENCE: Duration = Duration::from_secs(30);

impl Runtimes {
    /// Runs and prints a line for each runtime.
    ///
    /// # Errors
    /// A runtime is not installed, a server was not recovered or was harmed, or bytes were wrong.
    pub fn run(&self) -> Result<()> {
        privilege::ensure_privileges()?;
        let cwkill = beside_this_program(&self.cwkill)?;
        let runtimes = match self.runtimes.as_slice() {
            [] => Runtime::value_variants(),
            some => some,
        };
        for &runtime in runtimes {
            let stats = recover(runtime, self.runs, self.clients, &cwkill)
                .with_context(|| format!("runtime {runtime}"))?;
            println!(
                "{runtime}: {} of {} runs recovered, {} descriptors freed, {} bytes of {} other connections right, \
                 longest stop {:.1} ms",
                stats.recovered,
                self.runs,
                stats.freed,
                stats.bytes,
                self.clients,
                Duration::from_micros(stats.longest_stop_us).as_secs_f64() * 1000.0
            );
        }
        Ok(())
    }
}

/// Leaks a server of `runtime` to its limit and recovers it, `runs` times.
///
/// # Errors
/// It is not installed, was not recovered or was harmed, or bytes were wrong.
pub fn recover(
    runtime: Runtime,
    runs: u32,
    clients: usize,
    cwkill: &Path,
) -> Result<RecoveryStats> {
    if let Some(tool) = runtime.missing_tool() {
        bail!("{tool} is not installed");
    }
    let build_dir = BuildDir::new()?;
    let command = runtime.build(&build_dir)?;
    let mut stats = RecoveryStats::default();
    while stats.recovered < runs {
        let lab = Lab::new()?;
        let mut server = Server::start(lab.app_host(), &command)?;
        let some = (runs - stats.recovered).min(RUNS_OF_A_SERVER);
        let bytes = AtomicU64::new(0);
        let over = AtomicBool::new(false);
        lab.app_host().within(|| {
            thread::scope(|scope| {
                let talks: Vec<_> = (0..clients)
                    .map(|number| {
                        scope.spawn({
                            let (bytes, over) = (&bytes, &over);
                            let host = lab.app_host();
                            move || host.within(|| talk(number, bytes, over))
                        })
                    })
                    .collect();
                let recovered = (|| -> Result<()> {
                    for _ in 0..some {
                        server.leak_to_the_limit()?;
                        let done = server.reclaim(lab.app_host(), runtime, cwkill)?;
                        stats.freed += done.0;
                        stats.longest_stop_us = stats.longest_stop_us.max(done.1);
                        server.serves()?;
                        stats.recovered += 1;
                    }
                    Ok(())
                })();
                over.store(true, Ordering::Relaxed);
                for talk in talks {
                    talk.join()
                        .map_err(|_| anyhow::anyhow!("a client panicked"))??;
                }
                recovered
            })
        })?;
        ensure!(
            matches!(server.child.try_wait(), Ok(None)),
            "the server is gone"
        );
        stats.bytes += bytes.load(Ordering::Relaxed);
    }
    Ok(stats)
}

/// Leaks a server of `runtime` to its limit and runs `cwkill --reclaim` without force; why descriptors were left.
///
/// # Errors
/// It is not installed, or `cwkill` cannot be run.
pub fn recover_unforced(runtime: Runtime, cwkill: &Path) -> Result<Vec<String>> {
    let build_dir = BuildDir::new()?;
    let command = runtime.build(&build_dir)?;
    let lab = Lab::new()?;
    let server = Server::start(lab.app_host(), &command)?;
    lab.app_host().within(|| server.leak_to_the_limit())?;
    let said = server.run_cwkill(lab.app_host(), cwkill, &[])?;
    Ok(reasons(&said))
}

struct Server {
    child: Child,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn address() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], PORT))
}

impl Server {
    fn start(host: &Host, command: &[String]) -> Result<Self> {
        let script = format!("ulimit -n {LIMIT}; exec \"$@\" {PORT}");
        let mut child = host
            .command("sh")
            .args(["-c", &script, "sh"])
            .args(command)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let mut stdout = child.stdout.take().context("no stdout")?;
        let server = Self { child };
        let mut ready = [0; 6];
        stdout
            .read_exact(&mut ready)
            .context("the server does not start")?;
        Ok(server)
    }

    /// Connections are leaked until no descriptor is left and nobody is served; then their peers close.
    fn leak_to_the_limit(&self) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        let mut leaked = Vec::new();
        while self.has_room()? {
            ensure!(Instant::now() < until, "it does not come to its limit");
            let before = descriptors(self.child.id())?.len();
            let mut peer = TcpStream::connect(address())?;
            peer.write_all(b"L")?;
            leaked.push(peer);
            // Accepted, or one too many. A busy machine must not run ahead of it: Node.js drops all that are too many.
            let settled = || Ok(descriptors(self.child.id())?.len() > before || !self.has_room()?);
            wait(Duration::from_secs(2), settled).ok();
        }
        ensure!(!echoes(Duration::from_millis(50)), "it still serves");
        for peer in &leaked {
            match peer.shutdown(Shutdown::Write) {
                // Node.js keeps a descriptor back to accept and drop what comes at its limit.
                Err(error) if error.kind() == ErrorKind::NotConnected => {}
                other => other?,
            }
        }
        let count = leaked.len();
        wait(PATIENCE, || Ok(in_state(TcpState::CloseWait)? + 2 >= count))
            .context("the leaked connections are not stuck")
    }

    /// Whether a number below the limit is free; inherited ones may be above it.
    fn has_room(&self) -> Result<bool> {
        let below = |fd: &&i32| usize::try_from(**fd).is_ok_and(|fd| fd < LIMIT);
        Ok(descriptors(self.child.id())?.iter().filter(below).count() < LIMIT)
    }

    /// What `cwkill --reclaim` says.
    fn run_cwkill(&self, host: &Host, cwkill: &Path, more: &[&str]) -> Result<Value> {
        let port = PORT.to_string();
        // The limit is not what is tried here, and the machine may be busy.
        let fixed = [
            "--port",
            &port,
            "--reclaim",
            "--reclaim-age",
            "0s",
            "--stop-limit",
            "5s",
            "--json",
        ];
        let output = host.command(cwkill).args(fixed).args(more).output()?;
        serde_json::from_slice(&output.stdout).with_context(|| {
            let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
            format!("cwkill ended with {}: {stderr}", output.status)
        })
    }

    /// How many descriptors were freed, and for how long it was stopped.
    fn reclaim(&self, host: &Host, runtime: Runtime, cwkill: &Path) -> Result<(u64, u64)> {
        let force: &[&str] = if runtime.needs_force() {
            &["--reclaim-force"]
        } else {
            &[]
        };
        let said = self.run_cwkill(host, cwkill, force)?;
        // A thread may still be reading the end of what its peer has closed a moment ago: that one is skipped.
        let reasons = reasons(&said);
        let busy = |reason: &String| reason.contains("inside a system call");
        ensure!(reasons.iter().all(busy), "not freed: {reasons:?}");
        let number = |pointer: &str| said.pointer(pointer).and_then(Value::as_u64);
        let freed = number("/reclaim/summary/freed").context("no summary")?;
        ensure!(freed > 10, "only {freed} were freed: {reasons:?}");
        Ok((freed, number("/reclaim/owners/0/stopped_us").unwrap_or(0)))
    }

    /// A new connection is served.
    fn serves(&self) -> Result<()> {
        wait(PATIENCE, || Ok(echoes(Duration::from_millis(500))))
            .context("it does not accept again")
    }
}

/// Why descriptors are still there.
fn reasons(said: &Value) -> Vec<String> {
    let sockets = said["sockets"].as_array().into_iter().flatten();
    let descriptors =
        sockets.flat_map(|s| s["result"]["descriptors"].as_array().into_iter().flatten());
    descriptors
        .filter_map(|d| Some(d["reason"].as_str()?.to_owned()))
        .collect()
}

/// How many ends of connections of the server are in `state`.
fn in_state(state: TcpState) -> Result<usize> {
    let sockets = crate::kernel::sockets()?;
    Ok(sockets
        .iter()
        .filter(|socket| {
            socket.state == state && (socket.local.port() == PORT || socket.peer.port() == PORT)
        })
        .count())
}

fn wait(limit: Duration, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    let until = Instant::now() + limit;
    while !condition()? {
        ensure!(Instant::now() < until, "not within {limit:?}");
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Whether a new connection gets back what it sends.
fn echoes(limit: Duration) -> bool {
    let try_it = || -> std::io::Result<bool> {
        let mut stream = TcpStream::connect(address())?;
        stream.set_read_timeout(Some(limit))?;
        stream.write_all(b"Eping")?;
        let mut back = [0; 4];
        stream.read_exact(&mut back)?;
        Ok(&back == b"ping")
    };
    try_it().unwrap_or(false)
}

/// Sends bytes and checks that the same come back, on one connection that lives as long as the runs.
fn talk(number: usize, bytes: &AtomicU64, over: &AtomicBool) -> Result<()> {
    let mut stream = TcpStream::connect(address())?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"E")?;
    let mut state = u64::try_from(number)? + 1;
    let (mut sent, mut back) = (vec![0; 4096], vec![0; 4096]);
    while !over.load(Ordering::Relaxed) {
        for byte in &mut sent {
            // xorshift64 (Marsaglia, Xorshift RNGs, 2003)
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            *byte = state.to_le_bytes()[0];
        }
        stream.write_all(&sent).context("a client cannot send")?;
        if let Err(error) = stream.read_exact(&mut back) {
            match error.kind() {
                ErrorKind::UnexpectedEof => bail!("a client's connection ended"),
                _ => return Err(error).context("a client cannot receive"),
            }
        }
        ensure!(sent == back, "a client got back other bytes than it sent");
        bytes.fetch_add(u64::try_from(sent.len())?, Ordering::Relaxed);
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}
