//! A host: a network namespace and the processes in it.
//!
//! Invariant: the namespace has no name. It exists as long as its descriptor or a process in it, so nothing is left behind
//! when this process ends, for whatever reason.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use caps::Capability;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::agent::{Agent, AgentOptions};
use crate::kernel::{self, KernelSocket};
use crate::role::{Become, Group, Identity, Role};
use crate::ss::{self, SsRow};
use crate::{rtnetlink, spawner};

/// Time limit of [`HostCommand::output`].
const COMMAND_DEADLINE: Duration = Duration::from_secs(120);

/// Sysctls of every host. A new namespace inherits some from the machine.
const SYSCTLS: [(&str, &str); 10] = [
    // Addresses of both families, usable at once.
    ("ipv6/conf/all/disable_ipv6", "0"),
    ("ipv6/conf/default/disable_ipv6", "0"),
    ("ipv6/conf/all/accept_dad", "0"),
    ("ipv6/conf/default/accept_dad", "0"),
    ("ipv4/conf/all/rp_filter", "0"),
    ("ipv4/conf/default/rp_filter", "0"),
    // Allow thousands of connections from one client address that are not accepted.
    ("ipv4/ip_local_port_range", "1024 65535"),
    ("ipv4/tcp_max_syn_backlog", "65535"),
    ("core/somaxconn", "65535"),
    // Allow megabytes in the send buffer for a peer that does not read. SO_SNDBUF is capped by net.core.wmem_max, which
    // belongs to the machine.
    ("ipv4/tcp_wmem", "4096 4194304 8388608"),
];

/// Changes the arguments and the environment of a command before it starts.
pub type Rewrite = fn(&mut Vec<OsString>, &mut Vec<(OsString, OsString)>);

static REWRITE: OnceLock<Rewrite> = OnceLock::new();

/// From now on, `rewrite` changes every [`HostCommand`] of this process before it starts. Only the first call counts.
pub fn rewrite_commands(rewrite: Rewrite) {
    let _ = REWRITE.set(rewrite);
}

/// A network namespace without a name.
#[derive(Debug)]
pub struct Host {
    netns: File,
}

impl Host {
    /// A host with only its loopback interface, up.
    ///
    /// # Errors
    /// The kernel refuses the namespace; see [`crate::ensure_privileges`].
    pub fn new() -> Result<Self> {
        // On a new thread: a namespace belongs to a thread, and the caller stays in its own.
        let netns = on_a_thread(|| -> Result<File> {
            unshare(CloneFlags::CLONE_NEWNET).context("create a network namespace")?;
            for (name, value) in SYSCTLS {
                let path = format!("/proc/sys/net/{name}");
                fs::write(&path, value).with_context(|| format!("write {value} to {path}"))?;
            }
            rtnetlink::set_link("lo", true)?;
            File::open("/proc/thread-self/ns/net").context("open the network namespace")
        })?;
        Ok(Self { netns })
    }

    /// Runs `work` on a thread in this host's namespace and waits for it.
    ///
    /// # Errors
    /// The namespace cannot be entered, or `work` fails.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        on_a_thread(|| {
            setns(&self.netns, CloneFlags::CLONE_NEWNET).context("enter the network namespace")?;
            work()
        })
    }

    /// The inode of the namespace, as in `/proc/PID/ns/net`.
    ///
    /// # Errors
    /// As fstat(2).
    pub fn netns_inode(&self) -> Result<u64> {
        Ok(self
            .netns
            .metadata()
            .context("stat the network namespace")?
            .ino())
    }

    /// A path of the namespace for other programs. Valid while this `Host` exists.
    #[must_use]
    pub fn netns_path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.netns.as_raw_fd()).into()
    }

    /// Connects this host to `other` by a veth pair. Both ends are down and have no address.
    pub(crate) fn join(&self, name: &str, other: &Self, other_name: &str) -> Result<()> {
        self.within(|| rtnetlink::add_veth(name, other_name, other.netns.as_fd()))
    }

    /// Sets a link of this host up or down.
    ///
    /// # Errors
    /// The link does not exist.
    pub fn set_link(&self, name: &str, up: bool) -> Result<()> {
        self.within(|| rtnetlink::set_link(name, up))
    }

    /// All TCP sockets of this host in every state.
    ///
    /// # Errors
    /// /proc cannot be read.
    pub fn sockets(&self) -> Result<Vec<KernelSocket>> {
        self.within(kernel::sockets)
    }

    /// The TCP sockets of this host and their owners as shown by `ss`. The filter of `ss` is for example
    /// `["sport", "=", ":8080"]`.
    ///
    /// # Errors
    /// `ss` is missing, fails, or prints an unknown format.
    pub fn ss(&self, filter: &[&str]) -> Result<Vec<SsRow>> {
        self.ss_of("-t", filter)
    }

    /// As [`Self::ss`], but the MPTCP sockets. Their Recv-Q is the memory that the unread bytes take.
    ///
    /// # Errors
    /// As [`Self::ss`].
    pub fn ss_mptcp(&self, filter: &[&str]) -> Result<Vec<SsRow>> {
        self.ss_of("-M", filter)
    }

    fn ss_of(&self, protocol: &str, filter: &[&str]) -> Result<Vec<SsRow>> {
        let output = self
            .command("ss")
            .args(["-H", "-O", "-n", protocol, "-a", "-e", "-p"])
            .args(filter)
            .output()?;
        if !output.status.success() {
            bail!(
                "ss {protocol} {filter:?}: {}: {}",
                output.status,
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        ss::parse(&String::from_utf8_lossy(&output.stdout))
    }

    /// Starts a process on this host that holds sockets and serves requests. Its name in the process list is `comm`.
    ///
    /// # Errors
    /// The process cannot be started.
    pub fn agent(&self, comm: &str) -> Result<Agent> {
        self.agent_as(&AgentOptions {
            comm: comm.to_owned(),
            ..AgentOptions::default()
        })
    }

    /// As [`Self::agent`], as another user or with other capabilities.
    ///
    /// # Errors
    /// The process cannot be started, or not as that user.
    pub fn agent_as(&self, options: &AgentOptions) -> Result<Agent> {
        Agent::start(self, options)
    }

    /// A command to run on this host.
    #[must_use]
    pub fn command(&self, program: impl AsRef<OsStr>) -> HostCommand<'_> {
        HostCommand {
            host: self,
            arguments: vec![program.as_ref().to_owned()],
            environment: Vec::new(),
            identity: Identity::default(),
            group: Group::Own,
            stdio: [None, None, None],
        }
    }

    pub(crate) fn role(&self, identity: Identity, group: Group, become_: Become) -> Role {
        Role {
            netns: Some(self.netns_path()),
            ..Role::here(identity, group, become_)
        }
    }
}

fn on_a_thread<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(work);
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// A command to run on a [`Host`], similar to [`std::process::Command`]. The kernel kills it when this process ends.
#[derive(Debug)]
pub struct HostCommand<'a> {
    host: &'a Host,
    arguments: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    identity: Identity,
    group: Group,
    stdio: [Option<Stdio>; 3],
}

impl HostCommand<'_> {
    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, argument: impl AsRef<OsStr>) -> Self {
        self.arguments.push(argument.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args(mut self, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        self.arguments.extend(
            arguments
                .into_iter()
                .map(|argument| argument.as_ref().to_owned()),
        );
        self
    }

    /// Sets an environment variable.
    #[must_use]
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.environment
            .push((name.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Runs the command as another user and the group with the same id. It has no capabilities, unless
    /// [`Self::capabilities`] grants some.
    #[must_use]
    pub fn uid(mut self, uid: u32) -> Self {
        self.identity.uid = Some(uid);
        self
    }

    /// Runs the command with only these capabilities. With an empty list, even root has no privileges.
    #[must_use]
    pub fn capabilities(mut self, keep: &[Capability]) -> Self {
        self.identity.capabilities = Some(keep.iter().map(ToString::to_string).collect());
        self
    }

    /// Leaves the command in the caller's process group: Ctrl-C reaches it, and it can read from the terminal.
    #[must_use]
    pub fn in_our_group(mut self) -> Self {
        self.group = Group::Inherited;
        self
    }

    /// Puts the command into this process group of the current session.
    #[must_use]
    pub(crate) fn in_group(mut self, group: i32) -> Self {
        self.group = Group::Of(group);
        self
    }

    /// Sets stdin. The default is inherited, or empty with [`Self::output`].
    #[must_use]
    pub fn stdin(mut self, stdin: impl Into<Stdio>) -> Self {
        self.stdio[0] = Some(stdin.into());
        self
    }

    /// Sets stdout. The default is inherited, or captured with [`Self::output`].
    #[must_use]
    pub fn stdout(mut self, stdout: impl Into<Stdio>) -> Self {
        self.stdio[1] = Some(stdout.into());
        self
    }

    /// Sets stderr. The default is inherited, or captured with [`Self::output`].
    #[must_use]
    pub fn stderr(mut self, stderr: impl Into<Stdio>) -> Self {
        self.stdio[2] = Some(stderr.into());
        self
    }

    /// Starts the command. If the program cannot be executed, the exit status is 127 (not found) or 126, with a message on
    /// stderr.
    ///
    /// # Errors
    /// No process can be started, or not as the requested user.
    pub fn spawn(mut self) -> Result<Child> {
        let program = self.arguments[0].clone();
        if let Some(rewrite) = REWRITE.get() {
            rewrite(&mut self.arguments, &mut self.environment);
        }
        if let Some(uid) = self.identity.uid {
            crate::privilege::ensure_mapped(uid)?;
        }
        let mut command: Command = self
            .host
            .role(self.identity, self.group, Become::Command)
            .command()?;
        command.args(self.arguments).envs(self.environment);
        let [stdin, stdout, stderr] = self.stdio;
        if let Some(stdin) = stdin {
            command.stdin(stdin);
        }
        if let Some(stdout) = stdout {
            command.stdout(stdout);
        }
        if let Some(stderr) = stderr {
            command.stderr(stderr);
        }
        spawner::spawn(command).with_context(|| format!("start `{}`", program.display()))
    }

    /// Runs the command to its end, for two minutes at most.
    ///
    /// # Errors
    /// As [`Self::spawn`], or the command did not end in time and was killed.
    pub fn output(self) -> Result<Output> {
        self.output_within(COMMAND_DEADLINE)
    }

    /// Runs the command to its end, or kills it at the deadline.
    ///
    /// # Errors
    /// As [`Self::spawn`], or the command did not end in time and was killed.
    pub fn output_within(mut self, deadline: Duration) -> Result<Output> {
        let name = format!("{:?}", self.arguments);
        for (stdio, default) in self
            .stdio
            .iter_mut()
            .zip([Stdio::null, Stdio::piped, Stdio::piped])
        {
            stdio.get_or_insert_with(default);
        }
        let child = self.spawn()?;
        finish_within(child, &name, deadline)
    }
}

/// Waits for `child` and its output, or kills it at the deadline.
///
/// # Errors
/// `child` did not end in time and was killed.
pub(crate) fn finish_within(child: Child, name: &str, deadline: Duration) -> Result<Output> {
    // The thread below reaps the child, so until then no other process can have its pid.
    let pid = Pid::from_raw(child.id().cast_signed());
    let (done, result) = channel();
    std::thread::spawn(move || done.send(child.wait_with_output()));
    match result.recv_timeout(deadline) {
        Ok(output) => output.with_context(|| format!("wait for {name}")),
        Err(RecvTimeoutError::Timeout) => {
            let _ = kill(pid, Signal::SIGKILL);
            bail!("{name} did not end within {deadline:?}")
        }
        Err(RecvTimeoutError::Disconnected) => bail!("the thread that waited for {name} is gone"),
    }
}
