//! Agents: the processes of a lab that own sockets. This module has the handle; `server` runs in the process.

mod protocol;
pub(crate) mod server;

use std::io::{self, Read as _, Write as _};
use std::net::SocketAddr;
use std::os::fd::AsFd as _;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use caps::Capability;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
use nix::unistd::Pid;
use serde::de::DeserializeOwned;

use protocol::{Answer, Request};
pub use protocol::{Dial, Drained, End, Endpoint, Fd, How, Readiness, Recv, SocketOption, pattern};

use crate::host::Host;
use crate::privilege;
use crate::role::{Become, Group, Identity};
use crate::spawner;

/// How long to wait for an answer, in addition to the time limit of the request itself.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Options of a new agent.
#[derive(Debug, Clone, Default)]
pub struct AgentOptions {
    /// Name in the process list. The kernel keeps 15 bytes.
    pub comm: String,
    /// The user to run as, without capabilities. `None` is the user of this process.
    pub uid: Option<u32>,
    /// The only capabilities to keep. `None` changes nothing.
    pub capabilities: Option<Vec<Capability>>,
}

/// A process on a [`Host`] that holds sockets and serves requests. Killed when dropped, with all its children.
///
/// A request for several sockets stops at the first failure. If a system call failed, the error contains its errno as an
/// [`io::Error`], which `downcast_ref` finds.
#[derive(Debug)]
pub struct Agent {
    comm: String,
    pid: u32,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: ChildStdout,
    /// The bytes of the next answer that have arrived.
    pending: Vec<u8>,
}

impl Agent {
    pub(crate) fn start(host: &Host, options: &AgentOptions) -> Result<Self> {
        if let Some(uid) = options.uid {
            privilege::ensure_mapped(uid)?;
        }
        let comm = options.comm.clone();
        let names = |list: &Vec<Capability>| list.iter().map(ToString::to_string).collect();
        let identity = Identity {
            uid: options.uid,
            capabilities: options.capabilities.as_ref().map(names),
        };
        let mut command = host
            .role(identity, Group::Own, Become::Agent { comm: comm.clone() })
            .command()?;
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child =
            spawner::spawn(command).with_context(|| format!("start the agent {comm}"))?;
        let stdin = child.stdin.take();
        let stdout = child.stdout.take().context("the agent has no stdout")?;
        let pid = child.id();
        let agent = Self {
            comm,
            pid,
            state: Mutex::new(State {
                child,
                stdin,
                stdout,
                pending: Vec::new(),
            }),
        };
        agent
            .state()
            .answer::<()>(Duration::ZERO)
            .with_context(|| format!("start the agent {}", agent.comm))?;
        Ok(agent)
    }

    /// Pid of the process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Name in the process list.
    #[must_use]
    pub fn comm(&self) -> &str {
        &self.comm
    }

    /// Whether the process exists. A stopped process does.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        matches!(self.state().child.try_wait(), Ok(None))
    }

    /// Sends a signal to the process.
    ///
    /// # Errors
    /// The process has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        // Only the holder of the lock reaps the process, so no other process can have its pid.
        let mut state = self.state();
        if state.child.try_wait()?.is_some() {
            return Err(anyhow!("the agent {} is gone", self.comm));
        }
        kill(self.raw_pid(), signal).with_context(|| format!("signal the agent {}", self.comm))
    }

    /// Stops the process with SIGSTOP and waits until it has stopped. It serves no requests until SIGCONT.
    ///
    /// # Errors
    /// The process has ended.
    pub fn stop(&self) -> Result<()> {
        self.signal(Signal::SIGSTOP)?;
        match waitid(
            Id::Pid(self.raw_pid()),
            WaitPidFlag::WSTOPPED | WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT,
        )? {
            WaitStatus::Stopped(..) => Ok(()),
            other => Err(anyhow!("the agent {} did not stop: {other:?}", self.comm)),
        }
    }

    /// Kills the process with SIGKILL and waits for its end. The kernel closes its sockets.
    ///
    /// # Errors
    /// As kill(2) and waitpid(2).
    pub fn kill(&self) -> Result<()> {
        let mut state = self.state();
        state.child.kill()?;
        state.child.wait()?;
        Ok(())
    }

    fn raw_pid(&self) -> Pid {
        Pid::from_raw(self.pid.cast_signed())
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn call<T: DeserializeOwned>(&self, action: &str, request: &Request) -> Result<T> {
        self.call_within(action, Duration::ZERO, request)
    }

    /// `within` is the time limit of the request itself.
    fn call_within<T: DeserializeOwned>(
        &self,
        action: &str,
        within: Duration,
        request: &Request,
    ) -> Result<T> {
        let mut state = self.state();
        state
            .ask(request)
            .and_then(|()| state.answer(within))
            .with_context(|| format!("{} (pid {}): {action}", self.comm, self.pid))
    }

    /// Opens a listening socket. Without `v6_only`, an IPv6 socket also accepts IPv4 connections.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn listen(&self, address: SocketAddr, v6_only: bool, backlog: i32) -> Result<Fd> {
        self.listen_with(address, v6_only, backlog, false)
    }

    /// As [`Self::listen`]. With `mptcp`, the socket is of IPPROTO_MPTCP, and also accepts connections of plain TCP.
    ///
    /// # Errors
    /// As [`Self::listen`].
    pub fn listen_with(
        &self,
        address: SocketAddr,
        v6_only: bool,
        backlog: i32,
        mptcp: bool,
    ) -> Result<Fd> {
        self.call(
            &format!("listen on {address}"),
            &Request::Listen {
                address,
                v6_only,
                reuse_port: false,
                backlog,
                mptcp,
            },
        )
    }

    /// As [`Self::listen`], with SO_REUSEPORT: other processes of the user can listen at the same address.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn listen_shared(&self, address: SocketAddr, v6_only: bool, backlog: i32) -> Result<Fd> {
        self.call(
            &format!("listen on {address} with SO_REUSEPORT"),
            &Request::Listen {
                address,
                v6_only,
                reuse_port: true,
                backlog,
                mptcp: false,
            },
        )
    }

    /// Changes the limit of the backlog of a listening socket.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn set_backlog(&self, listener: Fd, backlog: i32) -> Result<()> {
        self.call(
            "set the backlog",
            &Request::SetBacklog { listener, backlog },
        )
    }

    /// Opens `count` connections to `to`, one after the other.
    ///
    /// # Errors
    /// The kernel's errno, or a timeout if they are not all established `within`.
    pub fn connect(
        &self,
        to: SocketAddr,
        count: usize,
        dial: Dial,
        within: Duration,
    ) -> Result<Vec<Endpoint>> {
        let request = Request::Connect {
            to,
            count,
            dial,
            within_ms: millis(within),
        };
        self.call_within(&format!("connect to {to}"), within, &request)
    }

    /// Accepts `count` connections.
    ///
    /// # Errors
    /// The kernel's errno, or a timeout if they did not all arrive `within`.
    pub fn accept(&self, listener: Fd, count: usize, within: Duration) -> Result<Vec<Endpoint>> {
        self.call_within(
            "accept",
            within,
            &Request::Accept {
                listener,
                count,
                within_ms: millis(within),
            },
        )
    }

    /// Sends all of `data` on each socket.
    ///
    /// # Errors
    /// The kernel's errno of the first that failed.
    pub fn send(&self, fds: &[Fd], data: &[u8]) -> Result<()> {
        self.call(
            "send",
            &Request::Send {
                fds: fds.to_vec(),
                data: data.to_vec(),
            },
        )
    }

    /// Sends [`pattern`] from `offset` on each socket, until `len` bytes are sent or the send buffer is full.
    /// Returns the bytes sent per socket.
    ///
    /// # Errors
    /// The kernel's errno of the first that failed.
    pub fn fill(&self, fds: &[Fd], offset: u64, len: u64) -> Result<Vec<u64>> {
        self.call(
            "fill",
            &Request::Fill {
                fds: fds.to_vec(),
                offset,
                len,
            },
        )
    }

    /// Reads once, at most `max` bytes.
    ///
    /// # Errors
    /// The agent failed. An errno of the read itself is [`Recv::Failed`].
    pub fn recv(&self, fd: Fd, max: usize, within: Duration) -> Result<Recv> {
        self.call_within(
            "recv",
            within,
            &Request::Recv {
                fd,
                max,
                within_ms: millis(within),
            },
        )
    }

    /// Reads each socket to its end, all of them `within`.
    ///
    /// # Errors
    /// The agent failed. [`Drained::end`] says how reading a socket ended.
    pub fn drain(&self, fds: &[Fd], within: Duration) -> Result<Vec<Drained>> {
        self.call_within(
            "drain",
            within,
            &Request::Drain {
                fds: fds.to_vec(),
                within_ms: millis(within),
            },
        )
    }

    /// Waits in epoll_wait(2) until the socket is readable, at its end, in error or, with `writable`, writable.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn poll(&self, fd: Fd, writable: bool, within: Duration) -> Result<Readiness> {
        self.call_within(
            "poll",
            within,
            &Request::Poll {
                fd,
                writable,
                within_ms: millis(within),
            },
        )
    }

    /// Shuts down each socket.
    ///
    /// # Errors
    /// The kernel's errno of the first that failed.
    pub fn shutdown(&self, fds: &[Fd], how: How) -> Result<()> {
        self.call(
            "shutdown",
            &Request::Shutdown {
                fds: fds.to_vec(),
                how,
            },
        )
    }

    /// Closes each socket.
    ///
    /// # Errors
    /// The agent has no such socket.
    pub fn close(&self, fds: &[Fd]) -> Result<()> {
        self.call("close", &Request::Close { fds: fds.to_vec() })
    }

    /// Opens `count` descriptors that are not sockets.
    ///
    /// # Errors
    /// EMFILE at the limit of descriptors.
    pub fn open_files(&self, count: usize) -> Result<()> {
        self.call("open files", &Request::OpenFiles { count })
    }

    /// Opens `count` TCP sockets that are in no table of the kernel: never bound, never connected.
    ///
    /// # Errors
    /// EMFILE at the limit of descriptors.
    pub fn open_sockets(&self, count: usize) -> Result<()> {
        self.call("open sockets", &Request::OpenSockets { count })
    }

    /// Closes the descriptors of [`Self::open_files`] and [`Self::open_sockets`].
    ///
    /// # Errors
    /// The agent has ended.
    pub fn close_files(&self) -> Result<()> {
        self.call("close files", &Request::CloseFiles)
    }

    /// Enters the network namespace of `host`. Sockets stay in the namespace that they were created in.
    ///
    /// # Errors
    /// EPERM without CAP_SYS_ADMIN.
    pub fn enter(&self, host: &Host) -> Result<()> {
        let netns = host.netns_path();
        self.call("enter a network namespace", &Request::Enter { netns })
    }

    /// Sets a socket option on each socket.
    ///
    /// # Errors
    /// The kernel's errno of the first that failed.
    pub fn set_option(&self, fds: &[Fd], option: SocketOption) -> Result<()> {
        self.call(
            &format!("set {option:?}"),
            &Request::SetOption {
                fds: fds.to_vec(),
                option,
            },
        )
    }

    /// Makes this host forget the connections: it sends neither FIN nor RST, and later answers the other side with RST. The
    /// agent closes the sockets in TCP_REPAIR mode.
    ///
    /// # Errors
    /// EPERM without CAP_NET_ADMIN.
    pub fn forget(&self, fds: &[Fd]) -> Result<()> {
        self.set_option(fds, SocketOption::Repair(true))?;
        self.close(fds)
    }

    /// Replaces each connecting socket by a listener on its address and port that drops every segment. The kernel then
    /// neither sends the SYN again nor answers a SYN-ACK with RST. Returns the listeners.
    ///
    /// # Errors
    /// The kernel's errno of the first that failed.
    pub fn replace_by_listener(&self, fds: &[Fd]) -> Result<Vec<Fd>> {
        self.call(
            "replace by a listener",
            &Request::ReplaceByListener { fds: fds.to_vec() },
        )
    }

    /// Reads and clears SO_ERROR: an errno, or 0.
    ///
    /// # Errors
    /// The agent failed.
    pub fn take_error(&self, fd: Fd) -> Result<i32> {
        self.call("SO_ERROR", &Request::TakeError { fd })
    }

    /// Starts processes that inherit these descriptors with the same numbers, as after a fork. Returns their pids. They end
    /// with the agent.
    ///
    /// # Errors
    /// A process cannot be started.
    pub fn share(&self, fds: &[Fd], children: usize) -> Result<Vec<u32>> {
        self.call(
            "share",
            &Request::Share {
                fds: fds.to_vec(),
                children,
            },
        )
    }

    /// Sends the descriptors over a Unix socket that no process reads, and closes them. The sockets then exist without owner.
    ///
    /// # Errors
    /// The kernel's errno, for example ETOOMANYREFS beyond RLIMIT_NOFILE without CAP_SYS_RESOURCE.
    pub fn put_in_flight(&self, fds: &[Fd]) -> Result<()> {
        self.call(
            "send descriptors",
            &Request::PutInFlight { fds: fds.to_vec() },
        )
    }

    /// Starts an idle thread with a descriptor table of its own (unshare(2), CLONE_FILES), and closes the descriptors in the
    /// table of the other threads. Then only this thread has them.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn leave_to_thread(&self, fds: &[Fd]) -> Result<()> {
        self.call(
            "leave descriptors to a thread",
            &Request::LeaveToThread { fds: fds.to_vec() },
        )
    }

    /// Starts idle threads.
    ///
    /// # Errors
    /// The kernel's errno.
    pub fn start_threads(&self, count: usize) -> Result<()> {
        self.call("start threads", &Request::Threads { count })
    }

    /// Starts to send [`pattern`] on each socket, a few bytes every `interval`, until [`Self::stop_sending`].
    ///
    /// # Errors
    /// The agent has no such socket.
    pub fn start_sending(&self, fds: &[Fd], interval: Duration) -> Result<()> {
        self.call(
            "start sending",
            &Request::StartSending {
                fds: fds.to_vec(),
                interval_ms: millis(interval),
            },
        )
    }

    /// Ends [`Self::start_sending`]. Returns the bytes sent per socket.
    ///
    /// # Errors
    /// The agent failed.
    pub fn stop_sending(&self) -> Result<Vec<u64>> {
        self.call("stop sending", &Request::StopSending)
    }
}

impl State {
    fn ask(&mut self, request: &Request) -> Result<()> {
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        self.stdin
            .as_mut()
            .context("the agent's stdin is closed")?
            .write_all(&line)
            .context("the agent is gone")
    }

    fn answer<T: DeserializeOwned>(&mut self, within: Duration) -> Result<T> {
        let deadline = Instant::now() + within + ANSWER_TIMEOUT;
        let line = loop {
            if let Some(end) = self.pending.iter().position(|&byte| byte == b'\n') {
                let rest = self.pending.split_off(end + 1);
                break std::mem::replace(&mut self.pending, rest);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let mut fds = [PollFd::new(self.stdout.as_fd(), PollFlags::POLLIN)];
            if poll(&mut fds, PollTimeout::try_from(left)?)? == 0 {
                return Err(anyhow!("no answer within {:?}", within + ANSWER_TIMEOUT));
            }
            let mut chunk = vec![0; 64 * 1024];
            let len = self.stdout.read(&mut chunk)?;
            if len == 0 {
                return Err(anyhow!("the agent is gone"));
            }
            self.pending.extend_from_slice(&chunk[..len]);
        };
        match serde_json::from_slice::<Answer>(&line)? {
            Ok(value) => Ok(serde_json::from_value(value)?),
            Err(failure) => Err(match failure.errno {
                Some(errno) => io::Error::from_raw_os_error(errno).into(),
                None => anyhow!(failure.message),
            }),
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        // Fails only if the process has already ended.
        let _ = self.kill();
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
