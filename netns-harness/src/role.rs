//! Re-executing ourselves: how every process of a lab comes to life.
//!
//! Nothing here forks. A process of the lab is `/proc/self/exe` started again with a *role* as its arguments: which
//! namespace to enter, whom to be, and what to become. So agents, their children and commands can be started from any
//! executable that calls [`crate::run_role`] first thing, a test binary included.
//!
//! Invariant: a role ends when the thread that spawned it ends (PR_SET_PDEATHSIG), which is why [`crate::spawner`]
//! starts them all from one thread that lives as long as the process.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use caps::{CapSet, CapsHashSet};
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::{Gid, Pid, Uid};
use serde::{Deserialize, Serialize};

use crate::run::{self, RunRequest};
use crate::{agent, chaos};

/// The first argument of a re-executed process. Not a word anybody types.
const ROLE_ARGUMENT: &str = "__netns-harness-role";

/// What a re-executed process does before it becomes what it is.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Role {
    /// The pid that spawns it; a role whose parent is already gone ends at once.
    pub parent: i32,
    /// The network namespace to enter, as a path (`/proc/PID/fd/N`).
    pub netns: Option<PathBuf>,
    pub group: Group,
    pub identity: Identity,
    pub become_: Become,
}

/// The process group of a process of the lab: whom Ctrl-C at the terminal reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Group {
    /// That of the process that starts it.
    Inherited,
    /// One of its own.
    Own,
    /// This one, of the same session.
    Of(i32),
}

/// Whose rights a process of the lab has.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Identity {
    /// User and group id; `None` keeps the caller's.
    pub uid: Option<u32>,
    /// Names (`CAP_NET_ADMIN`) of the only capabilities it keeps; `None` leaves them as they are.
    pub capabilities: Option<Vec<String>>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Become {
    /// A process with sockets that does what its stdin says.
    Agent { comm: String },
    /// A process that only holds the descriptors it inherited.
    Holder { comm: String },
    /// The command in the arguments after the role.
    Command,
    /// The inner process of `netns-harness run`.
    Keeper { request: RunRequest },
    /// One of the two processes of `netns-harness chaos`.
    Chaos { role: chaos::WorkerRole },
}

impl Role {
    /// A role of a child of this process, in our own network namespace.
    pub(crate) fn here(identity: Identity, group: Group, become_: Become) -> Self {
        Self {
            parent: std::process::id().cast_signed(),
            netns: None,
            group,
            identity,
            become_,
        }
    }

    /// A command line that starts this role. It must be spawned by the process that built it.
    pub(crate) fn command(&self) -> Result<Command> {
        let mut command = Command::new("/proc/self/exe");
        command
            .arg0("netns-harness")
            .arg(ROLE_ARGUMENT)
            .arg(serde_json::to_string(self)?);
        Ok(command)
    }

    fn enter(&self) -> Result<()> {
        // Signal masks survive exec; a keeper's blocked SIGINT must not be its children's.
        SigSet::empty()
            .thread_set_mask()
            .context("unblock signals")?;
        if let Some(path) = &self.netns {
            let netns =
                std::fs::File::open(path).with_context(|| format!("open {}", path.display()))?;
            setns(netns, CloneFlags::CLONE_NEWNET).context("enter the network namespace")?;
        }
        let group = match self.group {
            Group::Inherited => None,
            Group::Own => Some(0),
            Group::Of(group) => Some(group),
        };
        if let Some(group) = group {
            nix::unistd::setpgid(Pid::from_raw(0), Pid::from_raw(group)).context("setpgid")?;
        }
        self.identity.assume()?;
        // After the change of identity, which clears it.
        let signal = match self.become_ {
            // It has descendants of its own to remove first.
            Become::Keeper { .. } => Signal::SIGTERM,
            _ => Signal::SIGKILL,
        };
        if matches!(self.become_, Become::Keeper { .. }) {
            run::block_keeper_signals()?;
        }
        prctl::set_pdeathsig(signal).context("set the parent death signal")?;
        if nix::unistd::getppid().as_raw() != self.parent {
            bail!("the parent is gone");
        }
        Ok(())
    }
}

impl Identity {
    fn assume(&self) -> Result<()> {
        if *self == Self::default() {
            return Ok(());
        }
        let keep = match &self.capabilities {
            None => None,
            Some(names) => Some(
                names
                    .iter()
                    .map(|name| name.parse().with_context(|| format!("capability `{name}`")))
                    .collect::<Result<CapsHashSet>>()?,
            ),
        };
        if let Some(keep) = &keep {
            for capability in caps::all() {
                // The kernel may know fewer than the crate; those it does not know nobody has.
                if !keep.contains(&capability)
                    && caps::has_cap(None, CapSet::Bounding, capability).unwrap_or(false)
                {
                    caps::drop(None, CapSet::Bounding, capability)
                        .with_context(|| format!("drop {capability} from the bounding set"))?;
                }
            }
            prctl::set_keepcaps(true).context("keep capabilities over setuid")?;
        }
        if let Some(id) = self.uid.filter(|&id| id != Uid::current().as_raw()) {
            let (uid, gid) = (Uid::from_raw(id), Gid::from_raw(id));
            nix::unistd::setgroups(&[]).with_context(|| unmapped(id, "setgroups"))?;
            nix::unistd::setresgid(gid, gid, gid).with_context(|| unmapped(id, "setgid"))?;
            nix::unistd::setresuid(uid, uid, uid).with_context(|| unmapped(id, "setuid"))?;
        }
        if let Some(keep) = &keep {
            caps::set(None, CapSet::Effective, &CapsHashSet::new())?;
            caps::set(None, CapSet::Permitted, keep)?;
            caps::set(None, CapSet::Inheritable, keep)?;
            caps::set(None, CapSet::Effective, keep)?;
            // Ambient, so that an exec as a user other than root keeps them.
            caps::set(None, CapSet::Ambient, keep)?;
        }
        // A change of identity hides /proc/self from the new user; a program started by that user would not be hidden.
        prctl::set_dumpable(true).context("set dumpable")
    }
}

fn unmapped(uid: u32, call: &str) -> String {
    format!("{call} to user {uid}: needs root, or a user namespace in which {uid} is mapped")
}

/// Runs the role this process was started for and exits, or returns if it was started by somebody else.
///
/// Must be called first thing in `main`, before any other thread exists, by every executable that builds a
/// [`crate::Lab`]: the processes of the lab are that same executable, started again.
pub fn run_role() {
    let mut arguments = std::env::args_os().skip(1);
    if arguments.next().is_none_or(|first| first != ROLE_ARGUMENT) {
        return;
    }
    let specification = arguments.next().unwrap_or_default();
    let code = run_specified(&specification, arguments.collect()).unwrap_or_else(|error| {
        eprintln!("netns-harness: {error:#}");
        1
    });
    std::process::exit(code);
}

fn run_specified(specification: &OsStr, arguments: Vec<OsString>) -> Result<i32> {
    let role: Role = serde_json::from_slice(specification.as_bytes()).context("read the role")?;
    role.enter()?;
    match role.become_ {
        Become::Agent { comm } => {
            close_inherited().context("close what was inherited")?;
            agent::server::serve(&comm).map(|()| 0)
        }
        Become::Holder { comm } => agent::server::hold(&comm).map(|()| 0),
        Become::Keeper { request } => Ok(run::keep(&request, &arguments)),
        Become::Chaos { role } => chaos::run_worker(&role).map(|()| 0),
        Become::Command => {
            let (program, rest) = arguments.split_first().context("no command to run")?;
            let error = Command::new(program).args(rest).exec();
            eprintln!("netns-harness: cannot run `{}`: {error}", program.display());
            // The shell's convention.
            Ok(if is_found(program) { 126 } else { 127 })
        }
    }
}

/// Closes all descriptors but the three of stdio: those that a shell or a build tool left open are no part of a lab, and
/// would be counted as the application's.
fn close_inherited() -> Result<()> {
    // Numbers alone: an entry keeps the directory open, whose own descriptor is among them.
    let numbers = std::fs::read_dir("/proc/self/fd")?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().parse()?))
        .collect::<Result<Vec<i32>>>()?;
    for number in numbers.into_iter().filter(|number| *number > 2) {
        let _ = nix::unistd::close(number);
    }
    Ok(())
}

/// Lets this process have as many descriptors as it may.
///
/// # Errors
/// The kernel's.
pub(crate) fn raise_descriptor_limit() -> nix::Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
}

/// Not the kind of the exec error: execvp says "permission denied" of a name it has not found either, if some directory of
/// PATH is closed to us.
fn is_found(program: &OsStr) -> bool {
    if program.as_bytes().contains(&b'/') {
        return Path::new(program).exists();
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|directory| directory.join(program).exists())
}
