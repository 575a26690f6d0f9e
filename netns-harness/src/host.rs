//! A host: a network namespace, and the processes in it.
//!
//! Invariant: the namespace has no name. It lives while its descriptor or a process in it does, so nothing is left behind
//! whatever happens to this process.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
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

/// How long [`HostCommand::output`] lets a command run.
const COMMAND_DEADLINE: Duration = Duration::from_secs(120);

/// What every host is set to, whatever the machine's own settings are (a new namespace inherits some of them).
const SYSCTLS: [(&str, &str); 10] = [
    // Addresses are ours: usable at once, and on both families.
    ("ipv6/conf/all/disable_ipv6", "0"),
    ("ipv6/conf/default/disable_ipv6", "0"),
    ("ipv6/conf/all/accept_dad", "0"),
    ("ipv6/conf/default/accept_dad", "0"),
    ("ipv4/conf/all/rp_filter", "0"),
    ("ipv4/conf/default/rp_filter", "0"),
    // Thousands of connections from one client address, none of them accepted.
    ("ipv4/ip_local_port_range", "1024 65535"),
    ("ipv4/tcp_max_syn_backlog", "65535"),
    ("core/somaxconn", "65535"),
    // Megabytes can be queued to a peer that does not read (SO_SNDBUF is capped by a limit that is not ours to set).
    ("ipv4/tcp_wmem", "4096 4194304 8388608"),
];

/// A network namespace of its own, without a name.
#[derive(Debug)]
pub struct Host {
    netns: File,
}

impl Host {
    /// A host with nothing but its loopback, up.
    ///
    /// # Errors
    /// The kernel refuses the namespace; see [`crate::ensure_privileges`].
    pub fn new() -> Result<Self> {
        // On a thread that ends: namespaces are a thread's, and the caller's stays what it is.
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

    /// Runs `work` on a thread that is in this host's namespace, and waits for it.
    ///
    /// # Errors
    /// The namespace cannot be entered, or what `work` says.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        on_a_thread(|| {
            setns(&self.netns, CloneFlags::CLONE_NEWNET).context("enter the network namespace")?;
            work()
        })
    }

    /// The inode of the namespace, as in `/proc/PID/ns/net`.
    ///
    /// # Errors
    /// The kernel's.
    pub fn netns_inode(&self) -> Result<u64> {
        Ok(self
            .netns
            .metadata()
            .context("stat the network namespace")?
            .ino())
    }

    /// A path that other programs can open to reach the namespace, while this `Host` lives.
    #[must_use]
    pub fn netns_path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.netns.as_raw_fd()).into()
    }

    /// Joins this host to `other` by a veth pair with a name on either side, both ends still down and without addresses.
    pub(crate) fn join(&self, name: &str, other: &Self, other_name: &str) -> Result<()> {
        self.within(|| rtnetlink::add_veth(name, other_name, other.netns.as_fd()))
    }

    /// Takes a link of this host up or down.
    ///
    /// # Errors
    /// No such link.
    pub fn set_link(&self, name: &str, up: bool) -> Result<()> {
        self.within(|| rtnetlink::set_link(name, up))
    }

    /// All TCP sockets of this host, in every state.
    ///
    /// # Errors
    /// /proc cannot be read.
    pub fn sockets(&self) -> Result<Vec<KernelSocket>> {
        self.within(kernel::sockets)
    }

    /// All TCP sockets of this host as `ss` sees them, with owners, narrowed by an `ss` filter (`["sport", "=", ":8080"]`).
    ///
    /// # Errors
    /// `ss` is missing, fails, or prints what we do not understand.
    pub fn ss(&self, filter: &[&str]) -> Result<Vec<SsRow>> {
        let output = self
            .command("ss")
            .args(["-H", "-O", "-n", "-t", "-a", "-e", "-p"])
            .args(filter)
            .output()?;
        if !output.status.success() {
            bail!(
                "ss {filter:?}: {}: {}",
                output.status,
                String::from_utf8_lossy(&output.stderr).trim()
            );
        }
        ss::parse(&String::from_utf8_lossy(&output.stdout))
    }

    /// A process on this host that holds sockets and does what it is told, called `comm` in the process list.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn agent(&self, comm: &str) -> Result<Agent> {
        self.agent_as(&AgentOptions {
            comm: comm.to_owned(),
            ..AgentOptions::default()
        })
    }

    /// The same with a choice of user and capabilities.
    ///
    /// # Errors
    /// It cannot be started, or not as that user.
    pub fn agent_as(&self, options: &AgentOptions) -> Result<Agent> {
        Agent::start(self, options)
    }

    /// A command to be run on this host.
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

/// A command to be run on a [`Host`], in the manner of [`std::process::Command`]. It is killed when this process ends.
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

    /// Sets a variable of its environment.
    #[must_use]
    pub fn env(mut self, name: impl AsRef<OsStr>, value: impl AsRef<OsStr>) -> Self {
        self.environment
            .push((name.as_ref().to_owned(), value.as_ref().to_owned()));
        self
    }

    /// Runs it as another user (and the group of the same number), without any capability unless
    /// [`Self::capabilities`] grants some.
    #[must_use]
    pub fn uid(mut self, uid: u32) -> Self {
        self.identity.uid = Some(uid);
        self
    }

    /// Runs it with these capabilities and no others; with an empty list it has no privilege even as root.
    #[must_use]
    pub fn capabilities(mut self, keep: &[Capability]) -> Self {
        self.identity.capabilities = Some(keep.iter().map(ToString::to_string).collect());
        self
    }

    /// Keeps it in our process group, so that the terminal's Ctrl-C reaches it and it may read from the terminal.
    #[must_use]
    pub fn in_our_group(mut self) -> Self {
        self.group = Group::Inherited;
        self
    }

    /// Puts it into this process group of our session.
    #[must_use]
    pub(crate) fn in_group(mut self, group: i32) -> Self {
        self.group = Group::Of(group);
        self
    }

    /// Its standard input; inherited by default, empty with [`Self::output`].
    #[must_use]
    pub fn stdin(mut self, stdin: impl Into<Stdio>) -> Self {
        self.stdio[0] = Some(stdin.into());
        self
    }

    /// Its standard output; inherited by default, captured with [`Self::output`].
    #[must_use]
    pub fn stdout(mut self, stdout: impl Into<Stdio>) -> Self {
        self.stdio[1] = Some(stdout.into());
        self
    }

    /// Its standard error; inherited by default, captured with [`Self::output`].
    #[must_use]
    pub fn stderr(mut self, stderr: impl Into<Stdio>) -> Self {
        self.stdio[2] = Some(stderr.into());
        self
    }

    /// Starts it. A program that cannot be run shows as exit status 127 (not found) or 126, with a message on stderr.
    ///
    /// # Errors
    /// No process can be started, or not as the wanted user.
    pub fn spawn(self) -> Result<Child> {
        let program = self.arguments[0].clone();
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

    /// Runs it to its end, two minutes at most.
    ///
    /// # Errors
    /// As [`Self::spawn`]; or it did not end in time and was killed.
    pub fn output(self) -> Result<Output> {
        self.output_within(COMMAND_DEADLINE)
    }

    /// Runs it to its end, or kills it at the deadline.
    ///
    /// # Errors
    /// As [`Self::spawn`]; or it did not end in time and was killed.
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

/// Waits for the end of `child` and what it has written, or kills it at the deadline.
///
/// # Errors
/// It did not end in time and was killed.
pub(crate) fn finish_within(child: Child, name: &str, deadline: Duration) -> Result<Output> {
    // Unreaped until the thread below is done with it, so the number cannot become another process's.
    let pid = Pid::from_raw(child.id().cast_signed());
    let (done, result) = channel();
    std::thread::spawn(move || done.send(child.wait_with_output()));
    match result.recv_timeout(deadline) {
        Ok(output) => output.with_context(|| format!("wait for {name}")),
        Err(RecvTimeoutError::Timeout) => {
            let _ = kill(pid, Signal::SIGKILL);
            bail!("{name} did not end within {deadline:?}")
        }
        Err(RecvTimeoutError::Disconnected) => bail!("lost {name}"),
    }
}
