//! Servers in several languages that leak until they cannot accept, and recover after `cwkill --reclaim`.
//!
//! A run: leak until EMFILE, check that the server serves no new connection, reclaim, check that it does again. Meanwhile
//! other connections exchange bytes, and the clients verify them.

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
use crate::host::Host;
use crate::kernel::TcpState;
use crate::program::{beside_this_program, is_found};
use crate::{lab::Lab, privilege};

/// The language of a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Runtime {
    /// One thread per connection.
    C,
    /// As `C`, linked statically and stripped.
    CStatic,
    /// One goroutine per connection, all in an epoll set: needs --reclaim-force.
    Go,
    /// One thread per connection, and a collector that closes unreferenced sockets: needs --reclaim-force.
    Java,
    /// One thread with an epoll set: needs --reclaim-force.
    Node,
    /// One thread per connection.
    Python,
}

impl fmt::Display for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = self.to_possible_value();
        f.write_str(value.as_ref().map_or("?", |value| value.get_name()))
    }
}

impl Runtime {
    /// A program that is needed to build or run the server, but not installed.
    #[must_use]
    pub fn missing_tool(self) -> Option<&'static str> {
        let tools: &[&str] = match self {
            Self::C | Self::CStatic => &["cc"],
            Self::Go => &["go"],
            Self::Java => &["java", "javac"],
            Self::Node => &["node"],
            Self::Python => &["python3"],
        };
        tools.iter().copied().find(|tool| !is_found(tool))
    }

    /// Whether plain `--reclaim` skips its connections: they are in an epoll set, or a collector may close them.
    #[must_use]
    pub fn needs_force(self) -> bool {
        matches!(self, Self::Go | Self::Java | Self::Node)
    }

    /// Builds the server. Returns the command that runs it.
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
                // It keeps its soft limit. Otherwise it raises that to the hard one, which only CAP_SYS_RESOURCE can raise.
                let words = [
                    "java",
                    "-Xmx64m",
                    "-XX:+UseSerialGC",
                    "-XX:-MaxFDLimit",
                    "-cp",
                ];
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

/// Options of `netns-harness recover`.
#[derive(Debug, Clone, clap::Args)]
pub struct Runtimes {
    /// Servers to run [default: all]
    #[arg(value_enum)]
    pub runtimes: Vec<Runtime>,
    /// How often each server leaks until its limit and is recovered
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    pub runs: u32,
    /// Other connections whose bytes are verified
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub clients: usize,
    /// The cwkill program to run
    #[arg(long, value_name = "PATH", default_value = "cwkill")]
    pub cwkill: PathBuf,
}

/// Results of the runs of one runtime.
#[derive(Debug, Clone, Copy, Default)]
pub struct RecoveryStats {
    /// Runs after which the server accepted again.
    pub recovered: u32,
    /// Descriptors that `cwkill` freed.
    pub freed: u64,
    /// Verified bytes of other connections.
    pub bytes: u64,
    /// The longest stop of a server that `cwkill` reported, in microseconds.
    pub longest_stop_us: u64,
}

/// Descriptor limit of a server. A JVM needs about thirty itself.
const LIMIT: usize = 128;
/// Runs per server process.
const RUNS_OF_A_SERVER: u32 = 20;
const PORT: u16 = 7400;
const TIMEOUT: Duration = Duration::from_secs(30);

impl Runtimes {
    /// Runs all servers and prints one line per runtime.
    ///
    /// # Errors
    /// A runtime is not installed, a server did not recover or was harmed, or bytes were wrong.
    pub fn run(&self) -> Result<()> {
        privilege::ensure_privileges()?;
        let cwkill = beside_this_program(&self.cwkill)?;
        let runtimes = match self.runtimes.as_slice() {
            [] => Runtime::value_variants(),
            selected => selected,
        };
        for &runtime in runtimes {
            let stats = recover(runtime, self.runs, self.clients, &cwkill)
                .with_context(|| format!("runtime {runtime}"))?;
            println!(
                "{runtime}: {} of {} runs recovered, {} descriptors freed, {} bytes of {} other connections correct, \
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

/// Lets a server of `runtime` leak until its limit and recovers it, `runs` times.
///
/// # Errors
/// The runtime is not installed, the server did not recover or was harmed, or bytes were wrong.
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
        let batch = (runs - stats.recovered).min(RUNS_OF_A_SERVER);
        let bytes = AtomicU64::new(0);
        let over = AtomicBool::new(false);
        lab.app_host().within(|| {
            thread::scope(|scope| {
                let exchanges: Vec<_> = (0..clients)
                    .map(|number| {
                        scope.spawn({
                            let (bytes, over) = (&bytes, &over);
                            let host = lab.app_host();
                            move || host.within(|| exchange(number, bytes, over))
                        })
                    })
                    .collect();
                let recovered = (|| -> Result<()> {
                    for _ in 0..batch {
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
                for exchange in exchanges {
                    exchange
                        .join()
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

/// Lets a server of `runtime` leak until its limit and runs `cwkill --reclaim` without force. Returns the reasons for
/// descriptors that were not freed.
///
/// # Errors
/// The runtime is not installed, or `cwkill` cannot be run.
pub fn recover_unforced(runtime: Runtime, cwkill: &Path) -> Result<Vec<String>> {
    let build_dir = BuildDir::new()?;
    let command = runtime.build(&build_dir)?;
    let lab = Lab::new()?;
    let server = Server::start(lab.app_host(), &command)?;
    lab.app_host().within(|| server.leak_to_the_limit())?;
    let json = server.run_cwkill(lab.app_host(), cwkill, &[])?;
    Ok(reasons(&json))
}

/// What an operator did and got, who cures a server at its limit with the commands that `cwkill` prints.
#[derive(Debug)]
pub struct Cure {
    /// The lines about kept descriptors that `cwkill --reclaim` has printed, without force.
    pub advice: Vec<String>,
    /// The commands in them, in order.
    pub commands: Vec<String>,
    /// The descriptors that these have freed.
    pub freed: u64,
}

/// Whether the limit of a server can be raised.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HardLimit {
    Higher,
    /// Its hard limit is its soft one, and cwkill runs without CAP_SYS_RESOURCE, which nobody can get.
    Reached,
}

/// Lets a server of `runtime` leak until its limit, runs `cwkill --reclaim`, and then the commands that its advice names.
///
/// # Errors
/// The runtime is not installed, a command fails, or the server does not accept again.
pub fn cure(runtime: Runtime, cwkill: &Path, limit: HardLimit) -> Result<Cure> {
    let build_dir = BuildDir::new()?;
    let command = runtime.build(&build_dir)?;
    let lab = Lab::new()?;
    let host = lab.app_host();
    let server = Server::start(host, &command)?;
    // A class of Java whose initializer fails at the limit stays unusable, so it must have served a connection before.
    host.within(|| server.serves())?;
    host.within(|| server.leak_to_the_limit())?;
    let pid = server.child.id().to_string();
    let line = ["--pid", &pid, "--reclaim", "--reclaim-age", "1s", "--json"];
    let closed = match limit {
        HardLimit::Higher => host.command(cwkill),
        HardLimit::Reached => {
            let line = format!("--pid {pid} --nofile={LIMIT}:{LIMIT}");
            let lowered = host.command("prlimit").args(line.split(' ')).output()?;
            ensure!(lowered.status.success(), "{lowered:?}");
            let without = [
                "--bounding-set",
                "-sys_resource",
                "--inh-caps",
                "-sys_resource",
            ];
            host.command("setpriv").args(without).args([cwkill])
        }
    };
    let closed = closed.args(line).output()?;
    let closed: Value = serde_json::from_slice(&closed.stdout)?;
    let advice = closed.pointer("/reclaim/advice").and_then(Value::as_array);
    let advice = advice.context("no advice")?;
    let mut cure = Cure {
        advice: advice.iter().map(|one| one["text"].to_string()).collect(),
        commands: Vec::new(),
        freed: 0,
    };
    for one in advice {
        for command in one["commands"].as_array().context("no commands")? {
            let command = command.as_str().context("a command")?.to_owned();
            let words: Vec<&str> = command.split(' ').collect();
            match words[0] {
                "cwkill" => cure.freed += reclaimed(host, cwkill, &words[1..])?,
                program => {
                    let output = host.command(program).args(&words[1..]).output()?;
                    ensure!(output.status.success(), "{command}: {output:?}");
                }
            }
            cure.commands.push(command);
        }
    }
    host.within(|| server.serves())?;
    Ok(cure)
}

/// Runs a command of `cwkill reclaim` until nothing is left. Returns how many descriptors it has freed.
fn reclaimed(host: &Host, cwkill: &Path, words: &[&str]) -> Result<u64> {
    let mut freed = 0;
    wait(TIMEOUT, || {
        let more = ["--stop-limit", "5s", "--json"];
        let output = host.command(cwkill).args(words).args(more).output()?;
        let json: Value = serde_json::from_slice(&output.stdout)?;
        let count = json.pointer("/summary/freed").and_then(Value::as_u64);
        freed += count.context("no summary")?;
        Ok(output.status.code().is_some_and(|code| code <= 1))
    })?;
    Ok(freed)
}

/// A server of a runtime that accepts connections on 127.0.0.1:7400 and has paused reading on them, in the way of the runtime: Node.js
/// `pause()`, asyncio `pause_reading()`, Java's selector with interest in nothing, Go without a read. Killed when dropped.
#[derive(Debug)]
pub struct Paused {
    server: Server,
    _build_dir: BuildDir,
}

impl Paused {
    /// Starts the server.
    ///
    /// # Errors
    /// There is no such server for the runtime, or the runtime is not installed.
    pub fn start(host: &Host, runtime: Runtime) -> Result<Self> {
        let build_dir = BuildDir::new()?;
        let path = |name: &str| build_dir.path(name).display().to_string();
        let (source, text, compiler, command) = match runtime {
            Runtime::Node => (
                "pause.js",
                include_str!("../../owners/pause.js"),
                vec!["true"],
                vec!["node".into(), path("pause.js")],
            ),
            Runtime::Python => (
                "pause.py",
                include_str!("../../owners/pause.py"),
                vec!["true"],
                vec!["python3".into(), path("pause.py")],
            ),
            Runtime::Java => (
                "Pause.java",
                include_str!("../../owners/Pause.java"),
                vec!["javac", "Pause.java"],
                vec!["java".into(), "-cp".into(), path(""), "Pause".into()],
            ),
            Runtime::Go => (
                "pause.go",
                include_str!("../../owners/pause.go"),
                vec!["go", "build", "-o", "pause", "pause.go"],
                vec![path("pause")],
            ),
            Runtime::C | Runtime::CStatic => bail!("no server of {runtime} pauses reading"),
        };
        build_dir.build(source, text, &compiler)?;
        Ok(Self {
            server: Server::start(host, &command)?,
            _build_dir: build_dir,
        })
    }

    /// Pid of the process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.server.child.id()
    }

    /// Opens connections whose peers then finish, and waits until they are in CLOSE-WAIT. Returns the peers.
    ///
    /// # Errors
    /// The server does not accept, or the connections do not get into that state.
    pub fn half_closed(&self, host: &Host, count: usize) -> Result<Vec<TcpStream>> {
        host.within(|| {
            let before = descriptors(self.pid())?.len();
            let connect = |_| TcpStream::connect(address());
            let peers = (0..count)
                .map(connect)
                .collect::<std::io::Result<Vec<_>>>()?;
            wait(TIMEOUT, || {
                Ok(descriptors(self.pid())?.len() >= before + count)
            })?;
            for peer in &peers {
                peer.shutdown(Shutdown::Write)?;
            }
            wait(TIMEOUT, || Ok(in_state(TcpState::CloseWait)? == count))?;
            Ok(peers)
        })
    }

    /// The processor time that the process has used.
    ///
    /// # Errors
    /// The process has ended.
    pub fn processor_time(&self) -> Result<Duration> {
        let pid = self.pid().cast_signed();
        let stat = procfs::process::Process::new(pid)?.stat()?;
        Ok(Duration::from_millis(
            (stat.utime + stat.stime) * 1000 / procfs::ticks_per_second(),
        ))
    }
}

#[derive(Debug)]
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
        // Go and Node.js raise the soft limit to the hard one.
        let limit = match command[0].as_str() {
            "java" => "-S -n",
            _ => "-n",
        };
        let script = format!("ulimit {limit} {LIMIT}; exec \"$@\" {PORT}");
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

    /// Leaks connections until no descriptor is free and the server serves no new connection. Then their peers close.
    fn leak_to_the_limit(&self) -> Result<()> {
        let until = Instant::now() + TIMEOUT;
        let mut leaked = Vec::new();
        while self.has_room()? {
            ensure!(
                Instant::now() < until,
                "the server does not reach its limit"
            );
            let before = descriptors(self.child.id())?.len();
            let mut peer = TcpStream::connect(address())?;
            peer.write_all(b"L")?;
            leaked.push(peer);
            // Wait until the server has accepted it or is at its limit: Node.js drops connections beyond the limit.
            let is_done = || Ok(descriptors(self.child.id())?.len() > before || !self.has_room()?);
            wait(Duration::from_secs(2), is_done).ok();
        }
        ensure!(
            !echoes(Duration::from_millis(50)),
            "the server still serves"
        );
        for peer in &leaked {
            match peer.shutdown(Shutdown::Write) {
                // Node.js reserves a descriptor to accept and drop connections beyond the limit.
                Err(error) if error.kind() == ErrorKind::NotConnected => {}
                other => other?,
            }
        }
        let count = leaked.len();
        wait(TIMEOUT, || Ok(in_state(TcpState::CloseWait)? + 2 >= count))
            .context("the leaked connections are not in CLOSE-WAIT")
    }

    /// Whether a descriptor below the limit is free. Inherited descriptors may be above it.
    fn has_room(&self) -> Result<bool> {
        let below = |fd: &&i32| usize::try_from(**fd).is_ok_and(|fd| fd < LIMIT);
        Ok(descriptors(self.child.id())?.iter().filter(below).count() < LIMIT)
    }

    /// Runs `cwkill --reclaim` and returns its JSON.
    fn run_cwkill(&self, host: &Host, cwkill: &Path, more: &[&str]) -> Result<Value> {
        let port = PORT.to_string();
        // A generous stop limit, because the machine may be busy.
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

    /// Reclaims. Returns the number of freed descriptors and the duration of the stop in microseconds.
    fn reclaim(&self, host: &Host, runtime: Runtime, cwkill: &Path) -> Result<(u64, u64)> {
        let force: &[&str] = if runtime.needs_force() {
            &["--reclaim-force"]
        } else {
            &[]
        };
        let json = self.run_cwkill(host, cwkill, force)?;
        // cwkill skips a socket whose end a thread is still reading: its peer has closed a moment ago.
        let reasons = reasons(&json);
        let busy = |reason: &String| reason.contains("inside a system call");
        ensure!(reasons.iter().all(busy), "not freed: {reasons:?}");
        let number = |pointer: &str| json.pointer(pointer).and_then(Value::as_u64);
        let freed = number("/reclaim/summary/freed").context("no summary")?;
        ensure!(
            freed > 10,
            "only {freed} descriptors were freed: {reasons:?}"
        );
        Ok((freed, number("/reclaim/owners/0/stopped_us").unwrap_or(0)))
    }

    /// Waits until the server serves a new connection.
    fn serves(&self) -> Result<()> {
        wait(TIMEOUT, || Ok(echoes(Duration::from_millis(500))))
            .context("the server does not accept again")
    }
}

/// The reasons for descriptors that were not freed.
fn reasons(json: &Value) -> Vec<String> {
    let sockets = json["sockets"].as_array().into_iter().flatten();
    let descriptors =
        sockets.flat_map(|s| s["result"]["descriptors"].as_array().into_iter().flatten());
    descriptors
        .filter_map(|d| Some(d["reason"].as_str()?.to_owned()))
        .collect()
}

/// Number of sockets of the server's connections, on both sides, in `state`.
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

/// Whether a new connection receives the bytes that it sends.
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

/// Sends bytes on one connection and checks the echo, until `over`.
fn exchange(number: usize, bytes: &AtomicU64, over: &AtomicBool) -> Result<()> {
    let mut stream = TcpStream::connect(address())?;
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.write_all(b"E")?;
    let mut state = u64::try_from(number)? + 1;
    let (mut sent, mut received) = (vec![0; 4096], vec![0; 4096]);
    while !over.load(Ordering::Relaxed) {
        for byte in &mut sent {
            // xorshift64 (Marsaglia, Xorshift RNGs, 2003)
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            *byte = state.to_le_bytes()[0];
        }
        stream.write_all(&sent).context("a client cannot send")?;
        if let Err(error) = stream.read_exact(&mut received) {
            match error.kind() {
                ErrorKind::UnexpectedEof => bail!("a client's connection ended"),
                _ => return Err(error).context("a client cannot receive"),
            }
        }
        ensure!(
            sent == received,
            "a client received other bytes than it sent"
        );
        bytes.fetch_add(u64::try_from(sent.len())?, Ordering::Relaxed);
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}
