//! Nothing is left behind, whoever is killed, and Ctrl-C is the command's business while it runs.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use crate::support::{harness, wait_for_line, wait_until};

pub fn tests() -> Vec<Trial> {
    crate::tests!("cleanup":
        after_the_command_ends,
        after_sigkill_of_the_front,
        after_sigkill_of_the_keeper,
        after_sigkill_of_the_whole_group,
        after_sigterm_of_the_front,
        after_ctrl_c,
        ctrl_c_is_the_commands_business,
    )
}

/// A script with children that do not want to go: in the background, in a session of its own, and stopped.
const TENACIOUS: &str = "sleep 1000 & setsid sleep 1000 & (trap '' TERM HUP INT; sleep 1000) & \
                         sleep 1000 & kill -STOP $!; echo ready; sleep 1000";

/// A run of the harness whose descendants are recognised by a variable in their environment.
struct Run {
    mark: String,
    front: Child,
    namespaces: BTreeSet<String>,
}

impl Run {
    /// Starts the script in a process group of its own (as a shell does) and waits for it to say `ready`.
    fn start(script: &str) -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let mark = format!(
            "HARNESS_TEST={}.{}",
            std::process::id(),
            NUMBER.fetch_add(1, Ordering::Relaxed)
        );
        let (name, value) = mark.split_once('=').context("a variable")?;
        // A suite started in the background has SIGINT ignored, which every program after it inherits.
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
            .remove(&namespace(std::process::id()).context("our own namespace")?);
        // The application's and its peer's; the keeper, and agents and the command beside the front.
        ensure!(run.namespaces.len() == 2, "{:?}", run.namespaces);
        ensure!(run.processes()?.len() >= 7, "{:?}", run.processes()?);
        Ok(run)
    }

    fn front(&self) -> Pid {
        Pid::from_raw(self.front.id().cast_signed())
    }

    /// The end of the front.
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

    /// The living processes of this run.
    fn processes(&self) -> Result<Vec<u32>> {
        let marked = |pid: &u32| {
            // Unreadable: somebody else's. Empty: a zombie.
            let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            environment
                .split(|&byte| byte == 0)
                .any(|variable| variable == self.mark.as_bytes())
        };
        Ok(all_processes()?.into_iter().filter(marked).collect())
    }

    fn wait_until_all_is_gone(&self) -> Result<()> {
        wait_until("the processes and namespaces of the run are gone", || {
            let inhabited = all_processes()?
                .into_iter()
                .filter_map(namespace)
                .any(|ns| self.namespaces.contains(&ns));
            Ok(self.processes()?.is_empty() && !inhabited)
        })
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // Only matters if the test has failed before.
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
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    stat.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()
}

fn after_the_command_ends() -> Result<()> {
    let mut run =
        Run::start(&TENACIOUS.replace("echo ready; sleep 1000", "echo ready; exec sleep 0.2"))?;
    ensure!(run.wait()?.success());
    // At once, not some time later.
    ensure!(run.processes()?.is_empty(), "{:?}", run.processes()?);
    run.wait_until_all_is_gone()
}

fn after_sigkill_of_the_front() -> Result<()> {
    let run = Run::start(TENACIOUS)?;
    kill(run.front(), Signal::SIGKILL)?;
    run.wait_until_all_is_gone()
}

fn after_sigkill_of_the_keeper() -> Result<()> {
    let mut run = Run::start(TENACIOUS)?;
    kill(run.keeper()?, Signal::SIGKILL)?;
    ensure!(run.wait()?.code() == Some(137));
    ensure!(run.processes()?.is_empty(), "{:?}", run.processes()?);
    run.wait_until_all_is_gone()
}

/// As `timeout --signal=KILL` does it.
fn after_sigkill_of_the_whole_group() -> Result<()> {
    let run = Run::start(TENACIOUS)?;
    killpg(run.front(), Signal::SIGKILL)?;
    run.wait_until_all_is_gone()
}

fn after_sigterm_of_the_front() -> Result<()> {
    let mut run = Run::start(TENACIOUS)?;
    kill(run.front(), Signal::SIGTERM)?;
    ensure!(run.wait()?.signal() == Some(libc::SIGTERM));
    run.wait_until_all_is_gone()
}

fn after_ctrl_c() -> Result<()> {
    let mut run = Run::start(TENACIOUS)?;
    let mut status = None;
    // More than once: dash loses an interrupt that comes just before it starts a command.
    wait_until("the front ends of Ctrl-C", || {
        killpg(run.front(), Signal::SIGINT)?;
        status = run.front.try_wait()?;
        Ok(status.is_some())
    })?;
    ensure!(
        status.and_then(|status| status.code()) == Some(130),
        "{status:?}"
    );
    run.wait_until_all_is_gone()
}

fn ctrl_c_is_the_commands_business() -> Result<()> {
    // It carries on as it likes, and the application is not interrupted.
    let script =
        "trap 'kill -0 $HARNESS_APP_PID && exit 6' INT; echo ready; while :; do sleep 0.01; done";
    let mut run = Run::start(script)?;
    killpg(run.front(), Signal::SIGINT)?;
    ensure!(run.wait()?.code() == Some(6));
    run.wait_until_all_is_gone()
}
