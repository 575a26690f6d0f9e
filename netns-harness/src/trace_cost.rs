//! What `cwkill trace` costs: processor time of each connection that ends, with and without it, and memory with many stuck sockets; and what it
//! finds in a storm of connections.

use std::io::{BufRead as _, BufReader, Read as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::signal::{Signal, kill};
use nix::sys::time::TimeValLike as _;
use nix::unistd::Pid;
use serde_json::Value;

use crate::agent::Dial;
use crate::host::Host;
use crate::kernel::TcpState;
use crate::lab::Lab;
use crate::owners::leaks::{Leaker, Leaky};

/// Connections of a round.
const CONNECTIONS: u32 = 20_000;
/// Stuck sockets of a process. RLIMIT_NOFILE is 20,000 on many hosts.
const PER_PROCESS: usize = 19_000;
const PATIENCE: Duration = Duration::from_secs(60);
/// The most microseconds that a trace may add to a connection that ends.
const MOST: f64 = 3.0;
/// Connections of each client of the storm, and how long it may take.
const STORM: u32 = 50_000;
const STORM_TIME: Duration = Duration::from_secs(20);

/// Measures and prints. `sockets`: how many become stuck for the measurement of memory.
///
/// # Errors
/// The kernel refuses a socket, or cwkill fails.
pub fn run(cwkill: &str, sockets: usize, rounds: u32) -> Result<()> {
    let lab = Lab::new()?;
    let host = lab.app_host();
    let (mut off, mut on, mut tracer) = (Vec::new(), Vec::new(), Vec::new());
    // One after the other, so that a slow moment of the machine affects both.
    for _ in 0..rounds {
        off.push(host.within(|| connections(CONNECTIONS))?);
        let trace = Trace::start(host, cwkill)?;
        // It reads the symbols of this process.
        host.within(|| connections(1000))?;
        let before = trace.processor_time()?;
        on.push(host.within(|| connections(CONNECTIONS))?);
        tracer.push(trace.processor_time()?.saturating_sub(before));
        trace.end()?;
    }
    let (off, on, tracer) = (median(off), median(on), median(tracer));
    let each = |time: Duration| time.as_secs_f64() * 1e6 / f64::from(CONNECTIONS);
    println!(
        "processor time of a connection that ends, in microseconds ({rounds} rounds of {CONNECTIONS}):"
    );
    println!("  without a trace   {:6.2}", each(off));
    println!("  during a trace    {:6.2}", each(on));
    let more = each(on) - each(off);
    println!("  the difference    {more:6.2} (the limit is {MOST})");
    println!("  the trace itself  {:6.2}", each(tracer));
    storm(&lab, cwkill)?;
    memory(&lab, cwkill, sockets)
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}

/// Makes `count` connections whose server reads the end and closes. Returns the processor time of both ends, which are in this thread.
fn connections(count: u32) -> Result<Duration> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?;
    let before = used()?;
    for _ in 0..count {
        let client = TcpStream::connect(address)?;
        let (mut server, _) = listener.accept()?;
        drop(client);
        ensure!(server.read(&mut [0; 64])? == 0, "the end was expected");
    }
    Ok(used()?.saturating_sub(before))
}

fn used() -> Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_THREAD)?;
    let micros = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    Ok(Duration::from_micros(u64::try_from(micros)?))
}

/// Has clients, one for each processor, connect as fast as they can to servers of their own with two leaks, and prints what is found.
fn storm(lab: &Lab, cwkill: &str) -> Result<()> {
    let host = lab.app_host();
    let processors = std::thread::available_parallelism()?.get();
    // One of 32 leaks. Three of four leaks are those of one handler.
    let good = "G".repeat(31);
    let pattern = ["L", "L", "L", "M"].map(|leak| format!("{leak}{good}"));
    let pattern = pattern.concat();
    let ports: Vec<u16> = (800..).take(processors).collect();
    let mut servers = Vec::new();
    for port in &ports {
        servers.push(server(lab, *port)?);
    }
    let trace = Trace::start(host, cwkill)?;
    let begun = Instant::now();
    let mut clients = Vec::new();
    for port in &ports {
        let arguments = [port.to_string(), STORM.to_string(), pattern.clone()];
        let arguments = arguments.each_ref().map(String::as_str);
        clients.push(Leaker::start(host, Leaky::Storm, &arguments)?);
    }
    lab.wait_for(PATIENCE, || {
        let ended: Result<Vec<bool>> = clients.iter_mut().map(Leaker::has_ended).collect();
        Ok(begun.elapsed() > STORM_TIME || ended?.into_iter().all(|ended| ended))
    })?;
    drop(clients);
    let took = begun.elapsed().as_secs_f64();
    until_none_is_half_open(lab)?;
    let used = trace.memory()?;
    let report = trace.end()?;
    let count = report["closed_by_peer"].as_f64().unwrap_or_default();
    println!(
        "a storm of {count} connections by {processors} clients, {:.0} a second; of the leaks, 3 of 4 are at one place:",
        count / took
    );
    for name in [
        "became_stuck",
        "ends_sampled",
        "ends_sampled_without_stack",
        "samples_missed",
        "place_unknown",
    ] {
        println!("  {name} {}", report[name]);
    }
    say_places(&report);
    println!("  {used}");
    Ok(())
}

/// A server with a full backlog drops what makes a connection whole. Its peer sends that again, and the FIN.
fn until_none_is_half_open(lab: &Lab) -> Result<()> {
    lab.wait_for(PATIENCE, || {
        let rows = lab.app_host().ss(&[])?;
        Ok(rows.iter().all(|row| row.state != TcpState::SynRecv))
    })
}

/// A server that leaks, when it listens.
fn server(lab: &Lab, port: u16) -> Result<Leaker> {
    let host = lab.app_host();
    let text = port.to_string();
    let server = Leaker::start(host, Leaky::C, &[&text])?;
    lab.wait_for(PATIENCE, || {
        Ok(host.ss(&["-l", "sport", "=", &format!(":{text}")])?.len() == 1)
    })?;
    Ok(server)
}

/// The handler of each place, with its share and its number of sockets.
fn say_places(report: &Value) {
    for place in report["places"].as_array().into_iter().flatten() {
        let frames = place["read"]["frames"].as_array().into_iter().flatten();
        let names = frames.filter_map(|frame| frame["function"].as_str());
        let handler = names.rev().find(|name| name.ends_with("_handler"));
        let share = place["share"].as_f64().unwrap_or_default() * 100.0;
        let (handler, count) = (handler.unwrap_or("?"), &place["count"]);
        println!("  {handler}: {share:.1} %, {count} sockets");
    }
}

/// Has servers leak so many sockets during a trace, and prints what it takes then.
fn memory(lab: &Lab, cwkill: &str, sockets: usize) -> Result<()> {
    let host = lab.app_host();
    let trace = Trace::start(host, cwkill)?;
    let begun = Instant::now();
    let mut servers = Vec::new();
    let mut clients = Vec::new();
    let mut left = sockets;
    // Below the ports of clients, of which many are in TIME-WAIT.
    for port in 700.. {
        let count = left.min(PER_PROCESS);
        if count == 0 {
            break;
        }
        left -= count;
        servers.push(server(lab, port)?);
        let client = host.agent("client")?;
        let address = (Ipv4Addr::LOCALHOST, port).into();
        for _ in 0..count {
            let ends = client.connect(address, 1, Dial::default(), PATIENCE)?;
            client.send(&[ends[0].fd], b"L")?;
            client.close(&[ends[0].fd])?;
        }
        clients.push(client);
    }
    let took = begun.elapsed();
    until_none_is_half_open(lab)?;
    let used = trace.memory()?;
    let ended = Instant::now();
    let report = trace.end()?;
    println!(
        "{sockets} sockets became stuck in {:.1} s: {used}; the report took {:.1} s",
        took.as_secs_f64(),
        ended.elapsed().as_secs_f64()
    );
    for name in ["became_stuck", "place_unknown"] {
        println!("  {name} {}", report[name]);
    }
    say_places(&report);
    Ok(())
}

/// A trace that runs.
struct Trace(Child);

impl Trace {
    fn start(host: &Host, cwkill: &str) -> Result<Self> {
        let mut child = host
            .command(cwkill)
            .args(["trace", "--json"])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let mut said = BufReader::new(child.stderr.take().context("no stderr")?);
        let mut line = String::new();
        said.read_line(&mut line)?;
        ensure!(line.contains("watching"), "{line}");
        // It may say more.
        std::thread::spawn(move || said.lines().count());
        Ok(Self(child))
    }

    fn pid(&self) -> u32 {
        self.0.id()
    }

    /// The pids of the processes that read symbols.
    fn readers(&self) -> Result<Vec<u32>> {
        let path = format!("/proc/{0}/task/{0}/children", self.pid());
        let text = std::fs::read_to_string(path)?;
        Ok(text
            .split_whitespace()
            .filter_map(|pid| pid.parse().ok())
            .collect())
    }

    /// Of cwkill and its processes.
    fn processor_time(&self) -> Result<Duration> {
        let ticks = procfs::ticks_per_second();
        let mut used = 0;
        for pid in self.readers()?.into_iter().chain([self.pid()]) {
            let stat = procfs::process::Process::new(i32::try_from(pid)?)?.stat()?;
            used += stat.utime + stat.stime;
        }
        Ok(Duration::from_millis(1000 * used / ticks))
    }

    /// What it has had in memory at most, in words.
    fn memory(&self) -> Result<String> {
        let own = peak_memory(self.pid())? >> 10;
        let readers: Result<Vec<u64>> = self.readers()?.into_iter().map(peak_memory).collect();
        let readers = readers?;
        let (count, of_readers) = (readers.len(), readers.iter().sum::<u64>() >> 10);
        Ok(format!(
            "cwkill had {own} MiB, and its {count} processes for symbols {of_readers} MiB"
        ))
    }

    fn end(self) -> Result<Value> {
        kill(Pid::from_raw(i32::try_from(self.pid())?), Signal::SIGINT)?;
        let output = self.0.wait_with_output()?;
        Ok(serde_json::from_slice(&output.stdout)?)
    }
}

/// In KiB.
fn peak_memory(pid: u32) -> Result<u64> {
    let status = procfs::process::Process::new(i32::try_from(pid)?)?.status()?;
    status.vmhwm.context("no VmHWM")
}
