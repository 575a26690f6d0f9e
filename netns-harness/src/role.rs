//! Roles: every process of a lab is the calling program, executed again.
//!
//! Nothing here forks without exec. A process of the lab is `/proc/self/exe` with a *role* in its arguments: the namespace
//! to enter, the user and capabilities to take, and the work to do. So any executable can start agents and commands,
//! including a test binary, if the first call in its `main` is [`crate::run_role`].
//!
//! Invariant: a role ends when the thread that spawned it ends (PR_SET_PDEATHSIG). Therefore [`crate::spawner`] starts all
//! roles from one thread that lives as long as the process.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use caps::{CapSet, CapsHashSet};
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::{Gid, Pid, Uid};
use serde::{Deserialize, Serialize};

use crate::program::is_found;
use crate::run::{self, RunRequest};
use crate::{agent, chaos};

/// The first argument of a re-executed process.
const ROLE_ARGUMENT: &str = "__netns-harness-role";

/// The setup and the work of a re-executed process.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Role {
    /// The pid of the parent. A role whose parent is already gone ends at once.
    pub parent: i32,
    /// Path of the network namespace to enter (`/proc/PID/fd/N`).
    pub netns: Option<PathBuf>,
    pub group: Group,
    pub identity: Identity,
    pub become_: Become,
}

/// The process group of a process in the lab. Ctrl-C at the terminal reaches the foreground group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Group {
    /// The group of the process that starts it.
    Inherited,
    /// A new group.
    Own,
    /// This group of the same session.
    Of(i32),
}

/// The user and the capabilities of a process in the lab.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Identity {
    /// User and group id. `None` keeps those of the caller.
    pub uid: Option<u32>,
    /// Names of the only capabilities that it keeps, such as `CAP_NET_ADMIN`. `None` changes nothing.
    pub capabilities: Option<Vec<String>>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Become {
    /// A process with sockets that serves the requests on its stdin.
    Agent { comm: String },
    /// A process that only holds inherited descriptors.
    Holder { comm: String },
    /// The command in the arguments after the role.
    Command,
    /// The inner process of `netns-harness run`.
    Keeper { request: RunRequest },
    /// One of the two worker processes of `netns-harness chaos`.
    Chaos { role: chaos::WorkerRole },
}

impl Role {
    /// A role for a child of this process, in the current network namespace.
    pub(crate) fn here(identity: Identity, group: Group, become_: Become) -> Self {
        Self {
            parent: std::process::id().cast_signed(),
            netns: None,
            group,
            identity,
            become_,
        }
    }

    /// The command that starts this role. Only the process that built the role can spawn it.
    pub(crate) fn command(&self) -> Result<Command> {
        let mut command = Command::new("/proc/self/exe");
        command
            .arg0("netns-harness")
            .arg(ROLE_ARGUMENT)
            .arg(serde_json::to_string(self)?);
        Ok(command)
    }

    fn enter(&self) -> Result<()> {
        // Signal masks survive exec. The children of a keeper must not inherit its blocked SIGINT.
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
        // After the change of identity, which clears the parent death signal.
        let signal = match self.become_ {
            // The keeper must first remove its descendants.
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
                // `has_cap` fails for a capability that this kernel does not know. No process has it.
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
            // Only ambient capabilities survive an exec as a user other than root.
            caps::set(None, CapSet::Ambient, keep)?;
        }
        // A change of identity makes /proc/self unreadable for the new user. A program that this user starts has a
        // readable one.
        prctl::set_dumpable(true).context("set dumpable")
    }
}

fn unmapped(uid: u32, call: &str) -> String {
    format!("{call} to user {uid}: needs root, or a user namespace that maps {uid}")
}

/// If this process was started with a role, runs it and exits; otherwise returns.
///
/// Every executable that builds a [`crate::Lab`] must call this first in `main`, before any other thread exists: the
/// processes of the lab are the same executable, started again.
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
            close_inherited().context("close inherited descriptors")?;
            agent::server::serve(&comm).map(|()| 0)
        }
        Become::Holder { comm } => agent::server::hold(&comm).map(|()| 0),
        Become::Keeper { request } => Ok(run::keep(&request, &arguments)),
        Become::Chaos { role } => chaos::run_worker(&role).map(|()| 0),
        Become::Command => {
            let (program, rest) = arguments.split_first().context("no command to run")?;
            let error = Command::new(program).args(rest).exec();
            eprintln!("netns-harness: cannot run `{}`: {error}", program.display());
            // The exit statuses of a shell. The errno of execvp(3) is not enough: it is EACCES, too, if the program is
            // missing and a directory of PATH cannot be searched.
            Ok(if is_found(program) { 126 } else { 127 })
        }
    }
}

/// Closes all descriptors except stdin, stdout and stderr. Descriptors that a shell or a build tool left open would count as
/// the application's.
fn close_inherited() -> Result<()> {
    // Collects numbers, not entries: an entry keeps the directory open, and its descriptor is one of them.
    let numbers = std::fs::read_dir("/proc/self/fd")?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().parse()?))
        .collect::<Result<Vec<i32>>>()?;
    for number in numbers.into_iter().filter(|number| *number > 2) {
        let _ = nix::unistd::close(number);
    }
    Ok(())
}

/// Raises the soft limit of descriptors to the hard limit.
///
/// # Errors
/// As getrlimit(2) and setrlimit(2).
pub(crate) fn raise_descriptor_limit() -> nix::Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
}
