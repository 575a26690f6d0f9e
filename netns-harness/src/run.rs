//! `netns-harness run`: build the lab, run a command in it, and leave nothing behind, whoever is killed.
//!
//! Two processes share the work. The *front* is what the user started; it only waits. The *keeper*, its child, builds the
//! lab and runs the command. Both are subreapers, so every descendant that loses its parent becomes a child of one of
//! them. When the front dies, the kernel tells the keeper (PR_SET_PDEATHSIG, SIGTERM), which kills all its children until
//! it has none; when the keeper dies, its children fall to the front, which does the same. The keeper has a process group
//! of its own, so that a signal to the group of the front and the command leaves it. If both are killed in the same
//! instant, the agents and the command still die with their parent, but not what the command has put in the background.
//!
//! Invariant: only children of our own are killed, and those not reaped yet, so a pid never means somebody else.

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

/// Exit status when the harness itself fails, as of `timeout`, `env` and the like.
pub(crate) const HARNESS_FAILED: i32 = 125;

/// What `netns-harness run` is to do, beside the command.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct RunRequest {
    /// Names and numbers of sockets.
    pub scenarios: Vec<(String, usize)>,
    pub family: Family,
    pub port: u16,
    /// Compare with `ss` before the command runs.
    pub check: bool,
}

/// The front: starts the keeper, waits for it, and removes what it may have left. Returns the exit status.
pub(crate) fn front(request: RunRequest, command: &[OsString]) -> Result<i32> {
    privilege::ensure_privileges()?;
    prctl::set_child_subreaper(true).context("become a subreaper")?;
    // Ctrl-C is for the command, which is in our process group, and while there is none for the keeper,
    // which is not: so a signal to the whole group, SIGKILL too, leaves one that can clean up.
    interrupts().thread_block().context("block signals")?;
    let role = Role::here(Identity::default(), Group::Own, Become::Keeper { request });
    // Not through the spawner: the main thread lives as long as the process.
    let mut keeper = role
        .command()?
        .args(command)
        .spawn()
        .context("start the keeper")?;
    let pid = Pid::from_raw(keeper.id().cast_signed());
    thread::spawn(move || {
        while let Ok(signal) = interrupts().wait() {
            // It may have ended; then so do we.
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

/// The signals that a keeper waits for on a thread.
fn keeper_signals() -> SigSet {
    interrupts()
        .into_iter()
        .chain([Signal::SIGTERM, Signal::SIGHUP])
        .collect()
}

/// Before any other thread exists, so that all of them have these blocked.
pub(crate) fn block_keeper_signals() -> Result<()> {
    keeper_signals().thread_set_mask().context("block signals")
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Building,
    /// The command runs, and Ctrl-C is its business, as under a shell.
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
    // Held while the command is started, and for ever once the end has begun.
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
        .env("PATH", path_with_our_directory()?)
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
    // By their own handles first: behind the back of those nothing may be reaped.
    drop(leaks);
    drop(lab);
    kill_children()?;
    Ok(exit_code(status.context("wait for the command")?))
}

fn build(lab: &Lab, request: &RunRequest) -> Result<Vec<Leak>> {
    let mut wanted = request
        .scenarios
        .iter()
        .map(|(name, count)| Ok((scenario::find(name)?, *count)))
        .collect::<Result<Vec<_>>>()?;
    // Those that leave connections in the accept queue come after those that accept.
    wanted.sort_by_key(|(scenario, _)| scenario.sharing == Sharing::Last);
    let alone = wanted
        .iter()
        .filter(|(scenario, _)| scenario.sharing != Sharing::Freely)
        .count();
    // More than one application on the port.
    let crowded = wanted.len() > 1
        && (alone > 1 || wanted.iter().any(|(one, _)| one.sharing == Sharing::Never));
    let listen = if crowded { Listen::Own } else { Listen::Any };
    wanted
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

/// Programs built beside this one are found first: `netns-harness run unread -- cwkill`.
fn path_with_our_directory() -> Result<OsString> {
    let ours = std::env::current_exe().context("find our own program")?;
    let directory = ours
        .parent()
        .context("our own program has no directory")?
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
        // There is nobody left to tell of a failure.
        let _ = kill_children();
        std::process::exit(128 + signal as i32);
    }
}

fn lock(phase: &Mutex<Phase>) -> MutexGuard<'_, Phase> {
    phase.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Kills all children, and those of theirs that fall to us, until there are none.
fn kill_children() -> Result<()> {
    loop {
        for child in children()? {
            match kill(child, Signal::SIGKILL) {
                // Another thread of ours has reaped it since.
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
    // A process that is gone by now is not our child: those stay until we wait for them.
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
