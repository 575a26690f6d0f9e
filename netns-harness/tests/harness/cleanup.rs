//! Nothing is left behind, whichever process is killed. While the command runs, Ctrl-C reaches only the command.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use procfs::process::Process;

use crate::support::{harness, wait_for_line, wait_until};

pub fn tests() -> Vec<Trial> {
    crate::tests!("cleanup":
        after_the_command_ends,
        after_sigkill_of_the_front,
        after_sigkill_of_the_keeper,
        after_sigkill_of_the_whole_group,
        after_sigterm_of_the_front,
        after_ctrl_c,
        ctrl_c_reaches_only_the_command,
    )
}

/// A script with children that are hard to remove: in the background, in another session, ignoring signals, stopped.
const STUBBORN: &str = "sleep 1000 & setsid sleep 1000 & (trap '' TERM HUP INT; sleep 1000) & \
                         sleep 1000 & kill -STOP $!; echo ready; sleep 1000";

/// A run of the harness. A variable in their environment marks its descendants.
struct Run {
    mark: String,
    front: Child,
    namespaces: BTreeSet<String>,
}

impl Run {
    /// Starts the script in a new process group, as a shell does, and waits until it prints `ready`.
    fn start(script: &str) -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let mark = format!(
            "HARNESS_TEST={}.{}",
            std::process::id(),
            NUMBER.fetch_add(1, Ordering::Relaxed)
        );
        let (name, value) = mark.split_once('=').context("a variable")?;
        // A shell starts background jobs with SIGINT ignored, and child processes inherit that.
        let mut command = Command::new("env");
        command
            .args(["--default-signal=INT,QUIT"])
            .arg(harness().get_program());
        command.args([
            "run",
            "unread,forked,not-accepted",
            "--count",
            "2",
            "--",
            "sh",
            "-c",
        ]);
        command
            .arg(script)
            .env(name, value)
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let mut front = command.spawn()?;
        wait_for_line(front.stdout.as_mut().context("no stdout")?, "ready")?;
        let mut run = Self {
            mark,
            front,
            namespaces: BTreeSet::new(),
        };
        for pid in run.processes()? {
            run.namespaces.extend(namespace(pid));
        }
        run.namespaces
            .remove(&namespace(std::process::id()).context("no namespace of this process")?);
        // The namespaces of the application and of the peer.
        ensure!(run.namespaces.len() == 2, "{:?}", run.namespaces);
        // The front, the keeper, the agents and the command.
        ensure!(run.processes()?.len() >= 7, "{:?}", run.processes()?);
        Ok(run)
    }

    fn front(&self) -> Pid {
        Pid::from_raw(self.front.id().cast_signed())
    }

    /// Waits until the front ends.
    fn wait(&mut self) -> Result<ExitStatus> {
        let mut status = None;
        wait_until("the front ends", || {
            status = self.front.try_wait()?;
            Ok(status.is_some())
        })?;
        status.context("no status")
    }

    fn keeper(&self) -> Result<Pid> {
        let child = self
            .processes()?
            .into_iter()
            .find(|&pid| parent(pid) == Some(self.front.id()));
        Ok(Pid::from_raw(child.context("no keeper")?.cast_signed()))
    }

    /// The processes of this run that still exist.
    fn processes(&self) -> Result<Vec<u32>> {
        let marked = |pid: &u32| {
            // Unreadable for a process of another user, empty for a zombie.
            let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environment
                .split(|&byte| byte == 0)
                .any(|variable| variable == self.mark.as_bytes())
        };
        Ok(all_processes()?.into_iter().filter(marked).collect())
    }

    fn wait_until_everything_is_gone(&self) -> Result<()> {
        wait_until("the processes and namespaces of the run are gone", || {
            let is_used = all_processes()?
                .into_iter()
                .filter_map(namespace)
                .any(|ns| self.namespaces.contains(&ns));
            Ok(self.processes()?.is_empty() && !is_used)
        })
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // Matters only if the test has failed.
        let _ = self.front.kill();
        let _ = self.front.wait();
    }
}

fn all_processes() -> Result<Vec<u32>> {
    let entries =
        fs::read_dir("/proc")?.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    Ok(entries.collect())
}

fn namespace(pid: u32) -> Option<String> {
    Some(
        fs::read_link(format!("/proc/{pid}/ns/net"))
            .ok()?
            .to_string_lossy()
            .into_owned(),
    )
}

fn parent(pid: u32) -> Option<u32> {
    let stat = Process::new(pid.cast_signed()).and_then(|process| process.stat());
    stat.ok().map(|stat| stat.ppid.cast_unsigned())
}

fn after_the_command_ends() -> Result<()> {
    let mut run =
        Run::start(&STUBBORN.replace("echo ready; sleep 1000", "echo ready; exec sleep 0.2"))?;
    ensure!(run.wait()?.success());
    // Without waiting: nothing is left when the front ends.
    ensure!(run.processes()?.is_empty(), "{:?}", run.processes()?);
    run.wait_until_everything_is_gone()
}

fn after_sigkill_of_the_front() -> Result<()> {
    let run = Run::start(STUBBORN)?;
    kill(run.front(), Signal::SIGKILL)?;
    run.wait_until_everything_is_gone()
}

fn after_sigkill_of_the_keeper() -> Result<()> {
    let mut run = Run::start(STUBBORN)?;
    kill(run.keeper()?, Signal::SIGKILL)?;
    ensure!(run.wait()?.code() == Some(137));
    ensure!(run.processes()?.is_empty(), "{:?}", run.processes()?);
    run.wait_until_everything_is_gone()
}

/// As with `timeout --signal=KILL`.
fn after_sigkill_of_the_whole_group() -> Result<()> {
    let run = Run::start(STUBBORN)?;
    killpg(run.front(), Signal::SIGKILL)?;
    run.wait_until_everything_is_gone()
}

fn after_sigterm_of_the_front() -> Result<()> {
    let mut run = Run::start(STUBBORN)?;
    kill(run.front(), Signal::SIGTERM)?;
    ensure!(run.wait()?.signal() == Some(libc::SIGTERM));
    run.wait_until_everything_is_gone()
}

fn after_ctrl_c() -> Result<()> {
    let mut run = Run::start(STUBBORN)?;
    let mut status = None;
    // Repeatedly: dash loses an interrupt that arrives just before it starts a command.
    wait_until("the front ends of Ctrl-C", || {
        killpg(run.front(), Signal::SIGINT)?;
        status = run.front.try_wait()?;
        Ok(status.is_some())
    })?;
    ensure!(
        status.and_then(|status| status.code()) == Some(130),
        "{status:?}"
    );
    run.wait_until_everything_is_gone()
}

fn ctrl_c_reaches_only_the_command() -> Result<()> {
    // The command handles the signal, and the application is not interrupted.
    let script =
        "trap 'kill -0 $HARNESS_APP_PID && exit 6' INT; echo ready; while :; do sleep 0.01; done";
    let mut run = Run::start(script)?;
    killpg(run.front(), Signal::SIGINT)?;
    ensure!(run.wait()?.code() == Some(6));
    run.wait_until_everything_is_gone()
}
