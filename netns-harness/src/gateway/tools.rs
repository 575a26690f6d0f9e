//! The same scenes for each tool: a connection through a router that it is to end, and one beside it that must live.

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

use super::connections;
use crate::host::Host;
use crate::lab::{Family, POLL_INTERVAL};
use crate::program::{beside_this_program, is_found};
use crate::router::{Nat, Routed, Side};

/// The port of the server.
const PORT: u16 = 7000;
/// How long a tool may take that ends by itself. cutter waits 15 seconds for each end.
const LONGEST: Duration = Duration::from_secs(60);
/// How long tcpkill runs, which does not end by itself. On a connection in use, its effect shows at once.
const WATCHED: Duration = Duration::from_secs(5);
/// How long the ends may take to notice what a tool has sent.
const SETTLED: Duration = Duration::from_secs(1);
/// What a busy end writes at a time, in bytes.
const PIECE: usize = 64 << 10;
/// How often a busy end looks whether it is to stop.
const TICK: Duration = Duration::from_millis(100);

/// Options of `netns-harness gateway tools`.
#[derive(Debug, clap::Args)]
pub(crate) struct Tools {
    /// The cwkill program
    #[arg(long, value_name = "PATH", default_value = "cwkill")]
    cwkill: PathBuf,
    /// The cutter program, which Debian 12 does not have
    #[arg(long, value_name = "PATH", default_value = "cutter")]
    cutter: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tool {
    Tcpkill,
    Cutter,
    Conntrack,
    Cwkill,
}

/// What moves in the connection while the tool works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Traffic {
    Idle,
    /// The server sends as fast as it can.
    OneWay,
    /// Both ends do.
    BothWays,
}

impl Tools {
    pub(super) fn run(&self) -> Result<()> {
        let cwkill = beside_this_program(&self.cwkill)?.display().to_string();
        let cutter = self.cutter.display().to_string();
        let mut programs = vec![
            (Tool::Tcpkill, "tcpkill".to_owned()),
            (Tool::Cutter, cutter),
            (Tool::Conntrack, "conntrack".to_owned()),
            (Tool::Cwkill, cwkill),
        ];
        programs.retain(|(_, program)| {
            let is_found = is_found(program);
            if !is_found {
                println!("{program} is not installed, so it is left out");
            }
            is_found
        });
        println!(
            "| scene | tool | took | client | server | entry | next byte | then | the other one |"
        );
        println!("|---|---|---|---|---|---|---|---|---|");
        for traffic in [Traffic::Idle, Traffic::OneWay, Traffic::BothWays] {
            for nat in [Nat::None, Nat::Masquerade] {
                for family in [Family::V4, Family::V6] {
                    for (tool, program) in &programs {
                        let row = row(*tool, program, traffic, nat, family)?;
                        let traffic = match traffic {
                            Traffic::Idle => "idle",
                            Traffic::OneWay => "busy one way",
                            Traffic::BothWays => "busy both ways",
                        };
                        let nat = match nat {
                            Nat::None => "routed",
                            _ => "NATed",
                        };
                        println!("| {traffic}, {nat}, {} | {row} |", family.name());
                    }
                }
            }
        }
        Ok(())
    }
}

/// The cells of a row.
fn row(tool: Tool, program: &str, traffic: Traffic, nat: Nat, family: Family) -> Result<String> {
    let lab = Routed::new()?;
    let to = lab.translate(family, nat, &[(PORT, PORT)])?[0];
    let listener = lab.server.within(|| {
        TcpListener::bind(SocketAddr::new(family.any(), PORT)).context("listen on the server")
    })?;
    let mut pair = Pair::open(&lab, &listener, to)?;
    let mut other = Pair::open(&lab, &listener, to)?;
    other.carries_bytes()?;
    pair.carries_bytes()?;
    let mut busy = Vec::new();
    if traffic != Traffic::Idle {
        busy.push(Busy::start(&pair.server, &pair.client)?);
    }
    if traffic == Traffic::BothWays {
        busy.push(Busy::start(&pair.client, &pair.server)?);
    }
    for flow in &busy {
        // At full speed, with windows that have grown.
        let until = Instant::now() + LONGEST;
        while flow.bytes.load(Ordering::Relaxed) < 64 << 20 {
            ensure!(Instant::now() < until, "the connection carries no bytes");
            thread::sleep(POLL_INTERVAL);
        }
    }
    let moved = |busy: &[Busy]| -> u64 {
        let each = busy.iter().map(|flow| flow.bytes.load(Ordering::Relaxed));
        each.sum()
    };
    let before = moved(&busy);
    let began = Instant::now();
    let mut run = Run::start(&lab.router, tool, program, &pair, family)?;
    let until = began + run.deadline();
    while !run.has_ended()? && Instant::now() < until {
        if !run.ends_itself && pair.left(&lab)? == [false; 2] {
            break;
        }
        thread::sleep(POLL_INTERVAL);
    }
    let took = began.elapsed();
    let settled = Instant::now() + SETTLED;
    while pair.left(&lab)? != [false; 2] && Instant::now() < settled {
        thread::sleep(POLL_INTERVAL);
    }
    let passed = moved(&busy) - before;
    let left = pair.left(&lab)?;
    let end = |is_left: bool| if is_left { "**alive**" } else { "gone" };
    let entry = if pair.has_entry(&lab.router)? {
        "**left**"
    } else {
        "gone"
    };
    let (mut next, mut then) = (String::from("-"), String::from("-"));
    if left != [false; 2] && busy.is_empty() {
        next = match pair.sends_a_byte() {
            true => "passes".to_owned(),
            false => "does not pass".to_owned(),
        };
        thread::sleep(SETTLED);
        let [client, server] = pair.left(&lab)?.map(end);
        let entry = if pair.has_entry(&lab.router)? {
            "left"
        } else {
            "gone"
        };
        then = format!("client {client}, server {server}, entry {entry}");
    } else if !busy.is_empty() {
        next = format!("{} MiB passed", passed >> 20);
    }
    run.end()?;
    pair.shut_down();
    for flow in busy {
        flow.stop();
    }
    let other = match other.carries_bytes() {
        Ok(()) => "lives",
        Err(_) => "**is lost**",
    };
    let name = Path::new(program).file_name().context("no name")?;
    Ok(format!(
        "{} | {:.1} s | {} | {} | {entry} | {next} | {then} | {other}",
        name.display(),
        took.as_secs_f64(),
        end(left[0]),
        end(left[1])
    ))
}

/// A connection of which this process has both ends.
struct Pair {
    client: TcpStream,
    server: TcpStream,
    /// The addresses as the client sees them: its own, and that of the server.
    seen_by_client: (SocketAddr, SocketAddr),
    /// The addresses as the server sees them: its own, and that of the client.
    seen_by_server: (SocketAddr, SocketAddr),
}

impl Pair {
    fn open(lab: &Routed, listener: &TcpListener, to: SocketAddr) -> Result<Self> {
        let client = lab
            .client
            .within(|| TcpStream::connect(to).context("connect through the router"))?;
        let (server, _) = listener.accept()?;
        for end in [&client, &server] {
            end.set_nodelay(true)?;
            end.set_read_timeout(Some(TICK))?;
            end.set_write_timeout(Some(TICK))?;
        }
        Ok(Self {
            seen_by_client: (client.local_addr()?, client.peer_addr()?),
            seen_by_server: (server.local_addr()?, server.peer_addr()?),
            client,
            server,
        })
    }

    fn carries_bytes(&mut self) -> Result<()> {
        for (from, to) in [(&self.client, &self.server), (&self.server, &self.client)] {
            ensure!(passes(from, to), "a byte does not pass");
        }
        Ok(())
    }

    fn sends_a_byte(&self) -> bool {
        passes(&self.client, &self.server)
    }

    /// Whether `ss` shows each end: that of the client and that of the server.
    fn left(&self, lab: &Routed) -> Result<[bool; 2]> {
        Ok([
            connections(&lab.client)?.contains(&self.seen_by_client),
            connections(&lab.server)?.contains(&self.seen_by_server),
        ])
    }

    /// Whether conntrack has an entry that is not about to go.
    fn has_entry(&self, router: &Host) -> Result<bool> {
        let port = format!(" sport={} ", self.seen_by_client.0.port());
        router.within(|| {
            let path = "/proc/thread-self/net/nf_conntrack";
            let text = fs::read_to_string(path).with_context(|| format!("read {path}"))?;
            let mut entries = text.lines().filter(|line| line.contains(&port));
            Ok(entries.any(|line| !line.contains(" CLOSE ")))
        })
    }

    fn shut_down(&self) {
        for end in [&self.client, &self.server] {
            // It fails where the connection is gone.
            let _ = end.shutdown(Shutdown::Both);
        }
    }
}

/// Sends a byte, and says whether it arrives.
fn passes(mut from: &TcpStream, mut to: &TcpStream) -> bool {
    if from.write_all(b"x").is_err() {
        return false;
    }
    let until = Instant::now() + 10 * SETTLED;
    loop {
        match to.read(&mut [0]) {
            Ok(read) => return read == 1,
            Err(error) if is_timeout(&error) && Instant::now() < until => {}
            Err(_) => return false,
        }
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

/// Bytes from one end to the other, as fast as they go.
struct Busy {
    bytes: Arc<AtomicU64>,
    over: Arc<AtomicBool>,
    threads: [JoinHandle<()>; 2],
}

impl Busy {
    fn start(from: &TcpStream, to: &TcpStream) -> Result<Self> {
        let (mut from, mut to) = (from.try_clone()?, to.try_clone()?);
        let (bytes, over) = (
            Arc::new(AtomicU64::new(0)),
            Arc::new(AtomicBool::new(false)),
        );
        let is_over = Arc::clone(&over);
        let writer = thread::spawn(move || {
            let piece = vec![0; PIECE];
            while !is_over.load(Ordering::Relaxed) {
                match from.write(&piece) {
                    Err(error) if !is_timeout(&error) => return,
                    _ => {}
                }
            }
        });
        let (is_over, count) = (Arc::clone(&over), Arc::clone(&bytes));
        let reader = thread::spawn(move || {
            let mut piece = vec![0; PIECE];
            while !is_over.load(Ordering::Relaxed) {
                match to.read(&mut piece) {
                    Ok(0) => return,
                    Ok(read) => {
                        count.fetch_add(read as u64, Ordering::Relaxed);
                    }
                    Err(error) if is_timeout(&error) => {}
                    Err(_) => return,
                }
            }
        });
        Ok(Self {
            bytes,
            over,
            threads: [writer, reader],
        })
    }

    fn stop(self) {
        self.over.store(true, Ordering::Relaxed);
        for thread in self.threads {
            // A panic of it has been printed.
            let _ = thread.join();
        }
    }
}

/// A tool at work.
struct Run {
    child: Child,
    ends_itself: bool,
}

impl Run {
    fn start(
        router: &Host,
        tool: Tool,
        program: &str,
        pair: &Pair,
        family: Family,
    ) -> Result<Self> {
        let (client, server) = pair.seen_by_client;
        let port = client.port();
        let link = Side::Client.link();
        let line = match tool {
            Tool::Tcpkill => format!("-i {link} port {port}"),
            Tool::Cutter => format!("{} {port} {} {}", client.ip(), server.ip(), server.port()),
            Tool::Conntrack => format!(
                "-D -f {} -p tcp --orig-port-src {port}",
                if family == Family::V6 { "ipv6" } else { "ipv4" }
            ),
            Tool::Cwkill => format!("gateway --cut --active --sport {port}"),
        };
        let child = router.within(|| {
            Command::new(program)
                .args(line.split(' '))
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .with_context(|| format!("start {program}"))
        })?;
        Ok(Self {
            child,
            ends_itself: tool != Tool::Tcpkill,
        })
    }

    fn deadline(&self) -> Duration {
        if self.ends_itself { LONGEST } else { WATCHED }
    }

    fn has_ended(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    fn end(mut self) -> Result<()> {
        if !self.has_ended()? {
            self.child.kill()?;
            self.child.wait()?;
        }
        Ok(())
    }
}
