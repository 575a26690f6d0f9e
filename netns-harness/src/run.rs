//! `netns-harness run`: builds the lab, runs a command in it, and leaves nothing behind, whichever process is killed.
//!
//! Two processes share the work. The *front* is the process that the user started; it only waits. The *keeper*, its child,
//! builds the lab and runs the command. Both are subreapers: a descendant that loses its parent becomes a child of one of
//! them. When the front dies, the kernel sends SIGTERM to the keeper (PR_SET_PDEATHSIG), and the keeper kills its children
//! until none is left. When the keeper dies, its children become those of the front, which does the same. The keeper has
//! its own process group, so that a signal to the group of the front and the command does not reach it. If both die at the
//! same instant, the kernel kills the agents and the command, but not the command's background processes.
//!
//! Invariant: a process kills only its own children, and only before it reaps them. So no other process can have the pid.

use std::ffi::{OsStr, OsString};
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;

use anyhow::{Context as _, Result};
use nix::errno::Errno;
use nix::sys::prctl;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{Pid, getpgid, getppid};
use serde::{Deserialize, Serialize};

use crate::lab::{Family, Lab, Leak, Listen, Options};
use crate::role::{Become, Group, Identity, Role};
use crate::scenario::{self, Sharing};
use crate::{privilege, verify};

/// Exit status if the harness itself fails; `timeout` and `env` use the same.
pub(crate) const HARNESS_FAILED: i32 = 125;

/// Arguments of `netns-harness run`, without the command.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct RunRequest {
    /// Names of scenarios and their numbers of sockets.
    pub scenarios: Vec<(String, usize)>,
    pub family: Family,
    pub port: u16,
    /// Compare the state with `ss` before the command runs.
    pub check: bool,
}

/// The front: starts the keeper, waits for it, and kills the processes it may have left. Returns the exit status.
pub(crate) fn front(request: RunRequest, command: &[OsString]) -> Result<i32> {
    privilege::ensure_privileges()?;
    prctl::set_child_subreaper(true).context("become a subreaper")?;
    // Ctrl-C reaches the command, which is in this process group, and not the keeper. So the keeper can clean up even
    // after SIGKILL to the whole group. While no command runs, the front forwards Ctrl-C to the keeper.
    interrupts().thread_block().context("block signals")?;
    let role = Role::here(Identity::default(), Group::Own, Become::Keeper { request });
    // Without the spawner: the main thread lives as long as the process.
    let mut keeper = role
        .command()?
        .args(command)
        .spawn()
        .context("start the keeper")?;
    let pid = Pid::from_raw(keeper.id().cast_signed());
    thread::spawn(move || {
        while let Ok(signal) = interrupts().wait() {
            // Fails only if the keeper has ended; then the front ends, too.
            let _ = kill(pid, signal);
        }
    });
    let status = keeper.wait().context("wait for the keeper")?;
    kill_children()?;
    Ok(exit_code(status))
}

fn interrupts() -> SigSet {
    [Signal::SIGINT, Signal::SIGQUIT].into_iter().collect()
}

/// The signals that a thread of the keeper waits for.
fn keeper_signals() -> SigSet {
    interrupts()
        .into_iter()
        .chain([Signal::SIGTERM, Signal::SIGHUP])
        .collect()
}

/// Blocks the signals of the keeper. Must run before other threads exist, which inherit the mask.
pub(crate) fn block_keeper_signals() -> Result<()> {
    keeper_signals().thread_set_mask().context("block signals")
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Building,
    /// The command runs and handles Ctrl-C, as under a shell.
    Running,
}

/// The keeper: builds the lab and runs the command in it. Returns the exit status.
pub(crate) fn keep(request: &RunRequest, command: &[OsString]) -> i32 {
    try_keep(request, command).unwrap_or_else(|error| {
        eprintln!("netns-harness: {error:#}");
        HARNESS_FAILED
    })
}

fn try_keep(request: &RunRequest, command: &[OsString]) -> Result<i32> {
    prctl::set_child_subreaper(true).context("become a subreaper")?;
    // Locked while the command starts, and permanently once the end has begun.
    let phase = Arc::new(Mutex::new(Phase::Building));
    let watched = Arc::clone(&phase);
    thread::spawn(move || watch_signals(&watched));

    let front_group = getpgid(Some(getppid())).context("find the group of the front")?;
    let lab = Lab::new()?;
    let leaks = build(&lab, request)?;
    let first = leaks.first().context("no scenario")?;
    let (program, arguments) = command.split_first().context("no command")?;
    let mut command = lab
        .app_host()
        .command(program)
        .args(arguments)
        .in_group(front_group.as_raw());
    command = command
        .env("PATH", path_with_own_directory()?)
        .env("HARNESS_APP_PID", first.app().pid().to_string())
        .env(
            "HARNESS_APP_ADDR",
            first.pair().app_address.ip().to_string(),
        )
        .env("HARNESS_PEER_ADDR", first.pair().peer_address.to_string())
        .env("HARNESS_PORT", request.port.to_string());
    let mut child = {
        let mut phase = lock(&phase);
        let child = command.spawn()?;
        *phase = Phase::Running;
        child
    };
    let status = child.wait();
    let _ending = lock(&phase);
    // The handles of the agents must reap their processes before `kill_children` does.
    drop(leaks);
    drop(lab);
    kill_children()?;
    Ok(exit_code(status.context("wait for the command")?))
}

fn build(lab: &Lab, request: &RunRequest) -> Result<Vec<Leak>> {
    let mut scenarios = request
        .scenarios
        .iter()
        .map(|(name, count)| Ok((scenario::find(name)?, *count)))
        .collect::<Result<Vec<_>>>()?;
    // Scenarios that leave connections in the accept queue come last.
    scenarios.sort_by_key(|(scenario, _)| scenario.sharing == Sharing::Last);
    let alone = scenarios
        .iter()
        .filter(|(scenario, _)| scenario.sharing != Sharing::Freely)
        .count();
    // Whether several applications need the port.
    let port_is_shared = scenarios.len() > 1
        && (alone > 1
            || scenarios
                .iter()
                .any(|(one, _)| one.sharing == Sharing::Never));
    let listen = if port_is_shared {
        Listen::Own
    } else {
        Listen::Any
    };
    scenarios
        .into_iter()
        .map(|(scenario, count)| {
            let options = Options {
                count,
                port: request.port,
                listen,
                ..Options::default()
            };
            let leak = lab.start(scenario.name, request.family, options)?;
            if request.check {
                verify::check(lab, &leak, request.family)?;
            }
            Ok(leak)
        })
        .collect()
}

/// PATH with the directory of this program first, so that `netns-harness run unread -- cwkill` finds a built `cwkill`.
fn path_with_own_directory() -> Result<OsString> {
    let program = std::env::current_exe().context("find the path of this program")?;
    let directory = program
        .parent()
        .context("the path of this program has no directory")?
        .to_owned();
    let path = std::env::var_os("PATH").unwrap_or_else(|| OsStr::new("/usr/bin:/bin").to_owned());
    std::env::join_paths(std::iter::once(directory).chain(std::env::split_paths(&path)))
        .context("compose PATH")
}

fn watch_signals(phase: &Mutex<Phase>) {
    loop {
        let Ok(signal) = keeper_signals().wait() else {
            continue;
        };
        let phase = lock(phase);
        if matches!(signal, Signal::SIGINT | Signal::SIGQUIT) && *phase == Phase::Running {
            continue;
        }
        // The front cleans up if this fails.
        let _ = kill_children();
        std::process::exit(128 + signal as i32);
    }
}

fn lock(phase: &Mutex<Phase>) -> MutexGuard<'_, Phase> {
    phase.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Kills all children until none is left, including descendants that become children meanwhile.
fn kill_children() -> Result<()> {
    loop {
        for child in children()? {
            match kill(child, Signal::SIGKILL) {
                // Another thread has reaped it meanwhile.
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(error) => {
                    return Err(error).with_context(|| format!("kill the process {child}"));
                }
            }
        }
        match waitpid(None, None) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(Errno::ECHILD) => return Ok(()),
            Err(error) => return Err(error).context("wait for the last processes"),
        }
    }
}

fn children() -> Result<Vec<Pid>> {
    let own = std::process::id().cast_signed();
    let processes = procfs::process::all_processes().context("list /proc")?;
    // Errors are processes that have ended. A child of this process stays until it is reaped.
    let stats = processes.filter_map(|process| process.and_then(|process| process.stat()).ok());
    Ok(stats
        .filter(|stat| stat.ppid == own)
        .map(|stat| Pid::from_raw(stat.pid))
        .collect())
}

fn exit_code(status: ExitStatus) -> i32 {
    status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}
