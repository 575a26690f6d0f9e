//! `netns-harness bench`: measures `cwkill` and similar tools in the same run, on sockets of a lab.
//!
//! Each round runs every command once, so that a slow moment of the machine affects all of them. A command that kills gets
//! new sockets for every run. Tools that are not installed are named in the output.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::resource::{UsageWho, getrusage};
use procfs::CurrentSI as _;

use crate::agent::Agent;
use crate::lab::{Family, Lab, Leak, Listen, Options};
use crate::owners::stops;
use crate::program::{beside_this_program, is_found};
use crate::{TcpState, lost_bytes, privilege, scenario, trace_cost};

/// Age of the sockets when a command kills them. On a real host they are older, and cwkill checks sockets younger than a
/// second twice.
const AGE: Duration = Duration::from_millis(1500);
/// How long to wait for an idle machine. The kernel is still removing the sockets of the lab before.
const IDLE_TIMEOUT: Duration = Duration::from_secs(15);
/// The machine is idle if it used at most this share of the processor time during [`IDLE_WINDOW`].
const IDLE_SHARE: f64 = 0.05;
const IDLE_WINDOW: Duration = Duration::from_millis(250);

/// Sockets per application. RLIMIT_NOFILE is 20,000 on many hosts.
const PER_PROCESS: usize = 19_000;

/// Options of `netns-harness bench`.
#[derive(Debug, clap::Args)]
pub struct Bench {
    /// Stuck sockets
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    sockets: usize,
    /// Runs of each command that lists; commands that kill run a third as often
    #[arg(long, value_name = "N", default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// The cwkill program to measure
    #[arg(long, value_name = "PATH", default_value = "cwkill")]
    cwkill: PathBuf,
    /// The scenario of the sockets, with state CLOSE-WAIT
    #[arg(long, value_name = "SCENARIO", default_value = "unread")]
    scenario: String,
    /// How the two sides address each other
    #[arg(long, value_enum, default_value = "v4")]
    family: Family,
    /// Additional descriptors that are not sockets
    #[arg(long, value_name = "N", default_value_t = 0)]
    idle_descriptors: usize,
    /// Run only commands that list
    #[arg(long, conflicts_with = "kill_only")]
    list_only: bool,
    /// Run only commands that kill
    #[arg(long)]
    kill_only: bool,
    /// Instead measure how long `cwkill reclaim` and gdb stop a process
    #[arg(long, conflicts_with_all = ["list_only", "kill_only", "sockets", "scenario"])]
    reclaim: bool,
    /// Instead destroy at least as many sockets as --sockets says while their owners send, and count the bytes that are lost
    #[arg(long, conflicts_with_all = ["list_only", "kill_only", "reclaim", "scenario"])]
    lost_bytes: bool,
    /// Instead measure what `cwkill trace` costs a connection that ends, what it finds in a storm of connections, and its memory while
    /// --sockets sockets become stuck
    #[arg(long, conflicts_with_all = ["list_only", "kill_only", "reclaim", "lost_bytes", "scenario"])]
    trace: bool,
}

/// One command line and its measurements.
struct Subject {
    name: &'static str,
    /// Name of the row of `cwkill` that does the same work, to compare with.
    baseline: Option<&'static str>,
    arguments: Vec<String>,
    times: Vec<Duration>,
    /// Largest resident set of a run, if it was larger than that of every earlier command.
    peak_kib: Option<i64>,
}

impl Subject {
    fn new(name: &'static str, baseline: Option<&'static str>, line: &str) -> Self {
        Self {
            name,
            baseline,
            arguments: line.split_whitespace().map(str::to_owned).collect(),
            times: Vec::new(),
            peak_kib: None,
        }
    }

    fn median(&self) -> Duration {
        let mut times = self.times.clone();
        times.sort_unstable();
        times.get(times.len() / 2).copied().unwrap_or_default()
    }
}

const LIST: &str = "list with owners";
const BY_ITERATOR: &str = "the same, by iterator";
const KILL: &str = "find, destroy, verify";
const KILL_BY_ITERATOR: &str = "destroy by iterator";

impl Bench {
    /// Measures and prints the table.
    ///
    /// # Errors
    /// The sockets cannot be made, or `cwkill` fails.
    pub fn run(&self) -> Result<()> {
        privilege::ensure_privileges()?;
        let cwkill = beside_this_program(&self.cwkill)?;
        let cwkill = cwkill.display().to_string();
        ensure!(
            is_found(&cwkill),
            "no program {cwkill}: build it (cargo build --release --workspace) or name it with --cwkill"
        );
        if self.reclaim {
            return stops::run(Path::new(&cwkill), self.runs);
        }
        ensure!(
            self.sockets > 0,
            "--sockets must be greater than 0, for example 1000"
        );
        if self.lost_bytes {
            return lost_bytes::run(&cwkill, self.sockets);
        }
        if self.trace {
            return trace_cost::run(&cwkill, self.sockets, self.runs);
        }
        let mut listers = vec![
            Subject::new(
                LIST,
                None,
                &format!("{cwkill} --all --min-idle 0s --dry-run --json"),
            ),
            Subject::new(
                "the same as a table",
                Some(LIST),
                &format!("{cwkill} --all --min-idle 0s --dry-run"),
            ),
            Subject::new(
                BY_ITERATOR,
                Some(LIST),
                &format!("{cwkill} --all --min-idle 0s --dry-run --json --bpf always"),
            ),
            Subject::new(
                "the same, from /proc",
                Some(LIST),
                &format!("{cwkill} --all --min-idle 0s --dry-run --json --bpf never"),
            ),
            Subject::new("ss -tnp", Some(LIST), "ss -tnp"),
            Subject::new("ss -tn, no owners", Some(LIST), "ss -tn state close-wait"),
            Subject::new("lsof", Some(LIST), "lsof -nP -iTCP -sTCP:CLOSE_WAIT"),
            Subject::new("netstat", Some(LIST), "netstat -antp"),
        ];
        let mut killers = vec![
            Subject::new(
                KILL,
                None,
                &format!("{cwkill} --all --min-idle 0s --method destroy --no-owners --quiet"),
            ),
            Subject::new(
                KILL_BY_ITERATOR,
                Some(KILL),
                &format!(
                    "{cwkill} --all --min-idle 0s --method destroy --no-owners --quiet --bpf always"
                ),
            ),
            Subject::new(
                "destroy by SOCK_DESTROY",
                Some(KILL),
                &format!(
                    "{cwkill} --all --min-idle 0s --method destroy --no-owners --quiet --bpf never"
                ),
            ),
            Subject::new(
                "the same, with JSON",
                Some(KILL),
                &format!("{cwkill} --all --min-idle 0s --method destroy --no-owners --json"),
            ),
            Subject::new(
                "the same, and owners",
                Some(KILL),
                &format!("{cwkill} --all --min-idle 0s --method destroy --json"),
            ),
            Subject::new(
                "find, shut down, verify",
                Some(KILL),
                &format!("{cwkill} --all --min-idle 0s --method shutdown --json"),
            ),
            Subject::new(
                "find, rst, verify",
                Some(KILL),
                &format!("{cwkill} --all --min-idle 0s --method rst --json"),
            ),
            Subject::new("ss -K", Some(KILL), "ss -K -tn state close-wait"),
        ];
        if !scenario::find(&self.scenario)?.expect.inode {
            // `shutdown` needs a descriptor.
            killers.retain(|killer| !killer.name.contains("shut down"));
        }
        if self.list_only {
            killers.clear();
        }
        if self.kill_only {
            listers.clear();
        }
        let mut missing = BTreeMap::new();
        let checks = doctor(&cwkill)?;
        for (subjects, name, check) in [
            (&mut listers, BY_ITERATOR, "owners by iterator"),
            (&mut killers, KILL_BY_ITERATOR, "destroy by iterator"),
        ] {
            if !checks.contains(&format!(r#"{{"name":"{check}","ok":true"#)) {
                subjects.retain(|subject| subject.name != name);
                println!("no {check} here, so it is not measured");
            }
        }
        for subjects in [&mut listers, &mut killers] {
            subjects.retain(|subject| {
                let found = is_found(&subject.arguments[0]);
                if !found {
                    missing.insert(subject.arguments[0].clone(), ());
                }
                found
            });
        }

        if !listers.is_empty() {
            let lab = Lab::new()?;
            let _leaks = self.leak(&lab)?;
            let _idle = self.idle(&lab)?;
            let history = EmptyHistory::new()?;
            for _ in 0..self.runs {
                for subject in &mut listers {
                    measure(&lab, subject, &history)?;
                }
            }
        }
        for _ in 0..self.runs.div_ceil(3) {
            for subject in &mut killers {
                let lab = Lab::new()?;
                let leaks = self.leak(&lab)?;
                let _idle = self.idle(&lab)?;
                let began = Instant::now();
                while began.elapsed() < AGE
                    || (busy()? > IDLE_SHARE && began.elapsed() < IDLE_TIMEOUT)
                {}
                measure(&lab, subject, &EmptyHistory::new()?)?;
                let stuck = |socket: &&crate::KernelSocket| socket.state == TcpState::CloseWait;
                let left = lab.app_host().sockets()?.iter().filter(stuck).count();
                ensure!(
                    left == 0,
                    "{} left {left} sockets in CLOSE-WAIT",
                    subject.name
                );
                drop(leaks);
            }
        }
        let mut title = format!(
            "{} sockets, {} {}",
            self.sockets,
            self.scenario,
            self.family.name()
        );
        if self.idle_descriptors > 0 {
            title += &format!(", {} other descriptors", self.idle_descriptors);
        }
        print(&title, &[listers, killers]);
        for (program, ()) in missing {
            println!("{program} is not installed, so not measured");
        }
        Ok(())
    }

    /// Opens the descriptors that are not sockets, in as many processes as necessary.
    fn idle(&self, lab: &Lab) -> Result<Vec<Agent>> {
        let mut agents = Vec::new();
        let mut left = self.idle_descriptors;
        while left > 0 {
            let count = left.min(PER_PROCESS);
            let agent = lab.app_host().agent("idle")?;
            agent.open_files(count)?;
            agents.push(agent);
            left -= count;
        }
        Ok(agents)
    }

    /// Makes the sockets, in as many processes as necessary.
    fn leak(&self, lab: &Lab) -> Result<Vec<Leak>> {
        let mut leaks = Vec::new();
        let mut left = self.sockets;
        while left > 0 {
            let count = left.min(PER_PROCESS);
            let options = Options {
                count,
                listen: Listen::Own,
                own: true,
                deadline: Duration::from_secs(60),
                ..Options::default()
            };
            leaks.push(lab.start(&self.scenario, self.family, options)?);
            left -= count;
        }
        Ok(leaks)
    }
}

/// The document of `cwkill doctor`.
fn doctor(cwkill: &str) -> Result<String> {
    let ran = Command::new(cwkill)
        .args(["doctor", "--json"])
        .output()
        .with_context(|| format!("run {cwkill}"))?;
    Ok(String::from_utf8_lossy(&ran.stdout).into_owned())
}

/// The share of the processor time that was used during [`IDLE_WINDOW`].
fn busy() -> Result<f64> {
    let times = || -> Result<(u64, u64)> {
        let all = procfs::KernelStats::current()?.total;
        let used = all.user + all.nice + all.system;
        let used = used + all.irq.unwrap_or(0) + all.softirq.unwrap_or(0);
        Ok((used, used + all.idle + all.iowait.unwrap_or(0)))
    };
    let (used, all) = times()?;
    thread::sleep(IDLE_WINDOW);
    let (used_later, all_later) = times()?;
    let ticks = |later: u64, before: u64| u32::try_from(later.saturating_sub(before));
    Ok(f64::from(ticks(used_later, used)?) / f64::from(ticks(all_later, all)?.max(1)))
}

/// A directory for the history of cwkill. The one of the machine has the sockets of all benches of the last hour, and reading them would count.
struct EmptyHistory(PathBuf);

impl EmptyHistory {
    fn new() -> Result<Self> {
        let name = format!("netns-harness-bench-{}", std::process::id());
        let directory = std::env::temp_dir().join(name);
        std::fs::create_dir(&directory).with_context(|| format!("make {}", directory.display()))?;
        Ok(EmptyHistory(directory))
    }
}

impl Drop for EmptyHistory {
    fn drop(&mut self) {
        // One that is left behind is small, and of no further use.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn measure(lab: &Lab, subject: &mut Subject, history: &EmptyHistory) -> Result<()> {
    let before = getrusage(UsageWho::RUSAGE_CHILDREN)?.max_rss();
    let took = lab.app_host().within(|| {
        // Started from a thread in the namespace, so that only the command itself is timed.
        let began = Instant::now();
        let status = Command::new(&subject.arguments[0])
            .args(&subject.arguments[1..])
            .env("CWKILL_HISTORY", history.0.join("history"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .with_context(|| format!("run {}", subject.arguments[0]))?;
        let took = began.elapsed();
        if subject.arguments[0].ends_with("cwkill") && !status.success() {
            bail!("{} ended with {status}", subject.arguments.join(" "));
        }
        Ok(took)
    })?;
    subject.times.push(took);
    let after = getrusage(UsageWho::RUSAGE_CHILDREN)?.max_rss();
    if after > before {
        subject.peak_kib = Some(after);
    }
    Ok(())
}

fn print(title: &str, groups: &[Vec<Subject>]) {
    println!("{title}, wall time in ms");
    println!(
        "{:<26} {:>9} {:>9} {:>9} {:>10} {:>9}",
        "", "median", "min", "max", "x cwkill", "peak MiB"
    );
    for group in groups {
        for subject in group {
            let ms = |time: Duration| time.as_secs_f64() * 1000.0;
            let baseline = group
                .iter()
                .find(|other| Some(other.name) == subject.baseline);
            let ratio = baseline.map_or_else(String::new, |baseline| {
                format!(
                    "{:.2}",
                    subject.median().as_secs_f64() / baseline.median().as_secs_f64()
                )
            });
            let peak = subject
                .peak_kib
                .map_or_else(String::new, |kib| (kib / 1024).to_string());
            println!(
                "{:<26} {:>9.1} {:>9.1} {:>9.1} {ratio:>10} {peak:>9}",
                subject.name,
                ms(subject.median()),
                ms(subject.times.iter().min().copied().unwrap_or_default()),
                ms(subject.times.iter().max().copied().unwrap_or_default()),
            );
        }
    }
}
