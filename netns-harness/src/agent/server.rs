//! The agent's process: it holds sockets and serves the requests on its stdin.
//!
//! It plays the leaking application or its peer, so it must look like one: one descriptor per socket, no timers, and no
//! threads that were not requested. It ends when its stdin ends.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::File;
use std::io::{self, BufRead as _, BufReader, IoSlice, Read as _, Write as _};
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::prctl;
use nix::sys::socket::sockopt::{
    IpTransparent, TcpRepair, TcpTlsRx, TcpTlsTx, TcpUlp, TlsCryptoInfo,
};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, sendmsg, setsockopt, socketpair,
};
use serde::Serialize;
use serde_json::Value;
use socket2::{Domain, Protocol, SockFilter, Socket, TcpKeepalive, Type};

use super::protocol::{
    Answer, Dial, Drained, End, Endpoint, Failure, Fd, How, Readiness, Recv, Request, SocketOption,
    pattern,
};
use crate::kernel::canonical;
use crate::role::{Become, Group, Identity, Role, raise_descriptor_limit};

/// Maximum number of descriptors in one SCM_RIGHTS message, as in the kernel.
const SCM_MAX_FD: usize = 253;

/// Bytes per socket and interval of `StartSending`.
const SENT_AT_ONCE: usize = 16;

/// Serves requests until stdin ends.
pub(crate) fn serve(comm: &str) -> anyhow::Result<()> {
    set_name(comm)?;
    // A leak can have many sockets.
    raise_descriptor_limit()?;
    let mut agent = Server {
        comm: comm.to_owned(),
        ..Server::default()
    };
    let mut stdout = io::stdout().lock();
    // The first answer says that the agent is ready.
    serde_json::to_writer(&mut stdout, &Answer::Ok(Value::Null))?;
    writeln!(stdout)?;
    for line in BufReader::new(io::stdin().lock()).lines() {
        let answer: Answer = agent
            .handle(serde_json::from_str(&line?)?)
            .map_err(|error| Failure {
                errno: error.raw_os_error(),
                message: error.to_string(),
            });
        serde_json::to_writer(&mut stdout, &answer)?;
        writeln!(stdout)?;
    }
    Ok(())
}

/// Holds the inherited descriptors until stdin ends.
pub(crate) fn hold(comm: &str) -> anyhow::Result<()> {
    set_name(comm)?;
    writeln!(io::stdout(), "holding")?;
    io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

fn set_name(comm: &str) -> anyhow::Result<()> {
    prctl::set_name(&CString::new(comm)?)?;
    Ok(())
}

#[derive(Default)]
struct Server {
    comm: String,
    sockets: BTreeMap<Fd, Arc<Socket>>,
    children: Vec<Child>,
    files: Vec<OwnedFd>,
    /// Unix sockets whose buffers hold descriptors.
    in_flight: Vec<(OwnedFd, OwnedFd)>,
    sending: Option<Sending>,
}

struct Sending {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Vec<u64>>,
}

impl Server {
    fn handle(&mut self, request: Request) -> io::Result<Value> {
        match request {
            Request::Listen {
                address,
                v6_only,
                reuse_port,
                backlog,
                mptcp,
            } => json(self.listen(address, v6_only, reuse_port, backlog, mptcp)?),
            Request::SetBacklog { listener, backlog } => {
                json(self.socket(listener)?.listen(backlog)?)
            }
            Request::Connect {
                to,
                count,
                dial,
                within_ms,
            } => json(self.connect(to, count, dial, after(within_ms))?),
            Request::Accept {
                listener,
                count,
                within_ms,
            } => json(self.accept(listener, count, after(within_ms))?),
            Request::Send { fds, data } => {
                self.each(&fds, |socket| (&*socket).write_all(&data))?;
                json(())
            }
            Request::Fill { fds, offset, len } => json(
                fds.iter()
                    .map(|&fd| fill(self.socket(fd)?, offset, len))
                    .collect::<io::Result<Vec<_>>>()?,
            ),
            Request::Recv { fd, max, within_ms } => {
                json(recv(self.socket(fd)?, max, after(within_ms))?)
            }
            Request::Drain { fds, within_ms } => {
                let deadline = after(within_ms);
                json(
                    fds.iter()
                        .map(|&fd| drain(fd, self.socket(fd)?, deadline))
                        .collect::<io::Result<Vec<_>>>()?,
                )
            }
            Request::Poll {
                fd,
                writable,
                within_ms,
            } => json(readiness(self.socket(fd)?, writable, after(within_ms))?),
            Request::Shutdown { fds, how } => {
                let how = match how {
                    How::Read => std::net::Shutdown::Read,
                    How::Write => std::net::Shutdown::Write,
                    How::Both => std::net::Shutdown::Both,
                };
                self.each(&fds, |socket| socket.shutdown(how))?;
                json(())
            }
            Request::Close { fds } => {
                fds.iter().try_for_each(|&fd| self.take(fd).map(drop))?;
                json(())
            }
            Request::OpenFiles { count } => {
                for _ in 0..count {
                    self.files.push(File::open("/dev/null")?.into());
                }
                json(())
            }
            Request::OpenSockets { count } => {
                for _ in 0..count {
                    let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
                    self.files.push(socket.into());
                }
                json(())
            }
            Request::CloseFiles => {
                self.files.clear();
                json(())
            }
            Request::Enter { netns } => {
                setns(File::open(netns)?, CloneFlags::CLONE_NEWNET)?;
                json(())
            }
            Request::SetOption { fds, option } => {
                self.each(&fds, |socket| set_option(socket, option))?;
                json(())
            }
            Request::ReplaceByListener { fds } => json(
                fds.iter()
                    .map(|&fd| self.replace_by_listener(fd))
                    .collect::<io::Result<Vec<_>>>()?,
            ),
            Request::TakeError { fd } => json(
                self.socket(fd)?
                    .take_error()?
                    .and_then(|error| error.raw_os_error())
                    .unwrap_or(0),
            ),
            Request::Share { fds, children } => json(self.share(&fds, children)?),
            Request::PutInFlight { fds } => {
                fds.chunks(SCM_MAX_FD)
                    .try_for_each(|chunk| self.put_in_flight(chunk))?;
                json(())
            }
            Request::LeaveToThread { fds } => {
                self.leave_to_thread(&fds)?;
                json(())
            }
            Request::Threads { count } => {
                for _ in 0..count {
                    thread::Builder::new().stack_size(64 * 1024).spawn(|| {
                        loop {
                            thread::park();
                        }
                    })?;
                }
                json(())
            }
            Request::StartSending { fds, interval_ms } => {
                self.start_sending(&fds, Duration::from_millis(interval_ms))?;
                json(())
            }
            Request::StopSending => json(self.stop_sending()?),
        }
    }

    fn socket(&self, fd: Fd) -> io::Result<&Socket> {
        self.sockets
            .get(&fd)
            .map(Arc::as_ref)
            .ok_or_else(|| no_such(fd))
    }

    fn take(&mut self, fd: Fd) -> io::Result<Arc<Socket>> {
        self.sockets.remove(&fd).ok_or_else(|| no_such(fd))
    }

    fn each(&self, fds: &[Fd], mut act: impl FnMut(&Socket) -> io::Result<()>) -> io::Result<()> {
        fds.iter().try_for_each(|&fd| act(self.socket(fd)?))
    }

    fn keep(&mut self, socket: Socket) -> Fd {
        let fd = Fd(socket.as_raw_fd());
        self.sockets.insert(fd, Arc::new(socket));
        fd
    }

    fn listen(
        &mut self,
        address: SocketAddr,
        v6_only: bool,
        reuse_port: bool,
        backlog: i32,
        mptcp: bool,
    ) -> io::Result<Fd> {
        let socket = stream_socket(address, mptcp)?;
        if address.is_ipv6() {
            socket.set_only_v6(v6_only)?;
        }
        socket.set_reuse_address(true)?;
        socket.set_reuse_port(reuse_port)?;
        socket.bind(&address.into())?;
        socket.listen(backlog)?;
        Ok(self.keep(socket))
    }

    fn replace_by_listener(&mut self, fd: Fd) -> io::Result<Fd> {
        let socket = self.socket(fd)?;
        let address = socket.local_addr()?;
        // Two sockets can have the port while both allow it and one of them does not listen.
        socket.set_reuse_address(true)?;
        let listener = stream_socket(address.as_socket().ok_or_else(not_ip)?, false)?;
        listener.set_reuse_address(true)?;
        set_option(&listener, SocketOption::DropIncoming(true))?;
        listener.bind(&address)?;
        listener.listen(1)?;
        // Only now: from here on, segments for the port reach the listener.
        drop(self.take(fd)?);
        Ok(self.keep(listener))
    }

    fn connect(
        &mut self,
        to: SocketAddr,
        count: usize,
        dial: Dial,
        deadline: Instant,
    ) -> io::Result<Vec<Endpoint>> {
        (0..count)
            .map(|nth| {
                let socket = stream_socket(to, dial.mptcp)?;
                if let Some(mut from) = dial.from {
                    if from.port() != 0 {
                        from.set_port(nth_port(from.port(), nth)?);
                        socket.set_reuse_address(true)?;
                    }
                    socket.bind(&from.into())?;
                }
                if let Some(bytes) = dial.recv_buffer {
                    socket.set_recv_buffer_size(bytes)?;
                }
                if dial.drop_incoming {
                    set_option(&socket, SocketOption::DropIncoming(true))?;
                }
                if dial.drop_incoming || dial.detached {
                    socket.set_nonblocking(true)?;
                    match socket.connect(&to.into()) {
                        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
                        result => result?,
                    }
                    socket.set_nonblocking(false)?;
                } else {
                    socket.connect_timeout(&to.into(), left(deadline))?;
                }
                let local = local_address(&socket)?;
                Ok(Endpoint {
                    fd: self.keep(socket),
                    local,
                    peer: canonical(to),
                })
            })
            .collect()
    }

    fn accept(
        &mut self,
        listener: Fd,
        count: usize,
        deadline: Instant,
    ) -> io::Result<Vec<Endpoint>> {
        let mut accepted = Vec::with_capacity(count);
        while accepted.len() < count {
            let listener = self.socket(listener)?;
            if !wait(listener, PollFlags::POLLIN, deadline)?.contains(PollFlags::POLLIN) {
                return Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    format!("{} of {count} connections arrived in time", accepted.len()),
                ));
            }
            let (socket, peer) = listener.accept()?;
            let local = local_address(&socket)?;
            let peer = canonical(peer.as_socket().ok_or_else(not_ip)?);
            accepted.push(Endpoint {
                fd: self.keep(socket),
                local,
                peer,
            });
        }
        Ok(accepted)
    }

    fn share(&mut self, fds: &[Fd], children: usize) -> io::Result<Vec<u32>> {
        let inheritable = |yes: bool| {
            let flags = if yes {
                FdFlag::empty()
            } else {
                FdFlag::FD_CLOEXEC
            };
            self.each(fds, |socket| {
                Ok(fcntl(socket, FcntlArg::F_SETFD(flags)).map(drop)?)
            })
        };
        inheritable(true)?;
        let started = (0..children)
            .map(|_| start_holder(&self.comm))
            .collect::<io::Result<Vec<_>>>();
        inheritable(false)?;
        let pids = started
            .as_ref()
            .map(|children| children.iter().map(Child::id).collect());
        let pids = pids.map_err(|error| io::Error::new(error.kind(), error.to_string()));
        self.children.extend(started.unwrap_or_default());
        pids
    }

    fn put_in_flight(&mut self, fds: &[Fd]) -> io::Result<()> {
        let (sender, receiver) = socketpair(
            AddressFamily::Unix,
            SockType::Stream,
            None,
            SockFlag::SOCK_CLOEXEC,
        )?;
        let sockets = fds
            .iter()
            .map(|&fd| self.take(fd))
            .collect::<io::Result<Vec<_>>>()?;
        let numbers: Vec<_> = sockets.iter().map(|socket| socket.as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&numbers)];
        sendmsg::<()>(
            sender.as_raw_fd(),
            &[IoSlice::new(b"x")],
            &rights,
            MsgFlags::empty(),
            None,
        )?;
        self.in_flight.push((sender, receiver));
        Ok(())
    }

    fn leave_to_thread(&mut self, fds: &[Fd]) -> io::Result<()> {
        let (unshared, is_unshared) = mpsc::channel();
        thread::Builder::new()
            .stack_size(64 * 1024)
            .spawn(move || {
                let result = unshare(CloneFlags::CLONE_FILES);
                let _ = unshared.send(result);
                while result.is_ok() {
                    thread::park();
                }
            })?;
        is_unshared.recv().map_err(io::Error::other)??;
        for &fd in fds {
            self.take(fd)?;
        }
        Ok(())
    }

    fn start_sending(&mut self, fds: &[Fd], interval: Duration) -> io::Result<()> {
        if self.sending.is_some() {
            return Err(io::Error::other("the agent is sending already"));
        }
        let find = |fd: &Fd| self.sockets.get(fd).cloned().ok_or_else(|| no_such(*fd));
        let sockets = fds.iter().map(find).collect::<io::Result<Vec<_>>>()?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut sent = vec![0; sockets.len()];
            while !stopped.load(Ordering::Relaxed) {
                for (socket, sent) in sockets.iter().zip(&mut sent) {
                    // An error shows in the total of the connection.
                    *sent += fill(socket, *sent, SENT_AT_ONCE as u64).unwrap_or(0);
                }
                thread::park_timeout(interval);
            }
            sent
        });
        self.sending = Some(Sending { stop, thread });
        Ok(())
    }

    fn stop_sending(&mut self) -> io::Result<Vec<u64>> {
        let Some(Sending { stop, thread }) = self.sending.take() else {
            return Ok(Vec::new());
        };
        stop.store(true, Ordering::Relaxed);
        thread.thread().unpark();
        thread
            .join()
            .map_err(|_| io::Error::other("the sending thread panicked"))
    }
}

fn start_holder(comm: &str) -> io::Result<Child> {
    let role = Role::here(
        Identity::default(),
        Group::Inherited,
        Become::Holder {
            comm: comm.to_owned(),
        },
    );
    let mut command = role.command().map_err(io::Error::other)?;
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut ready = String::new();
    BufReader::new(child.stdout.take().expect("piped")).read_line(&mut ready)?;
    if ready.is_empty() {
        return Err(io::Error::other(
            "a child that shares sockets did not start",
        ));
    }
    Ok(child)
}

fn json(value: impl Serialize) -> io::Result<Value> {
    Ok(serde_json::to_value(value)?)
}

fn after(ms: u64) -> Instant {
    Instant::now() + Duration::from_millis(ms)
}

/// The time left, at least one millisecond: some calls refuse zero.
fn left(deadline: Instant) -> Duration {
    deadline
        .saturating_duration_since(Instant::now())
        .max(Duration::from_millis(1))
}

fn no_such(fd: Fd) -> io::Error {
    io::Error::other(format!("the agent has no socket {fd}"))
}

fn not_ip() -> io::Error {
    io::Error::other("not an IP address")
}

fn nth_port(first: u16, nth: usize) -> io::Result<u16> {
    let port = u16::try_from(nth)
        .ok()
        .and_then(|nth| first.checked_add(nth));
    port.ok_or_else(|| io::Error::other(format!("there is no port {first} + {nth}")))
}

fn stream_socket(like: SocketAddr, mptcp: bool) -> io::Result<Socket> {
    let protocol = match mptcp {
        true => Protocol::MPTCP,
        false => Protocol::TCP,
    };
    Socket::new(Domain::for_address(like), Type::STREAM, Some(protocol))
}

fn local_address(socket: &Socket) -> io::Result<SocketAddr> {
    Ok(canonical(
        socket.local_addr()?.as_socket().ok_or_else(not_ip)?,
    ))
}

fn wait(socket: &Socket, events: PollFlags, deadline: Instant) -> io::Result<PollFlags> {
    let mut fds = [PollFd::new(socket.as_fd(), events)];
    let timeout = PollTimeout::try_from(left(deadline)).map_err(io::Error::other)?;
    poll(&mut fds, timeout)?;
    Ok(fds[0].revents().unwrap_or(PollFlags::empty()))
}

fn readiness(socket: &Socket, writable: bool, deadline: Instant) -> io::Result<Readiness> {
    // epoll instead of poll, because servers use it.
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let mut interest = EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP;
    interest.set(EpollFlags::EPOLLOUT, writable);
    epoll.add(socket, EpollEvent::new(interest, 0))?;
    let mut events = [EpollEvent::empty()];
    let timeout = EpollTimeout::try_from(left(deadline)).map_err(io::Error::other)?;
    let woken = epoll.wait(&mut events, timeout)?;
    let ready = if woken == 0 {
        EpollFlags::empty()
    } else {
        events[0].events()
    };
    Ok(Readiness {
        readable: ready.contains(EpollFlags::EPOLLIN),
        writable: ready.contains(EpollFlags::EPOLLOUT),
        read_hangup: ready.contains(EpollFlags::EPOLLRDHUP),
        hangup: ready.contains(EpollFlags::EPOLLHUP),
        error: ready.contains(EpollFlags::EPOLLERR),
    })
}

fn recv(mut socket: &Socket, max: usize, deadline: Instant) -> io::Result<Recv> {
    if wait(socket, PollFlags::POLLIN, deadline)?.is_empty() {
        return Ok(Recv::Nothing);
    }
    let mut buffer = vec![0; max];
    match socket.read(&mut buffer) {
        Ok(0) if max > 0 => Ok(Recv::Eof),
        Ok(len) => {
            buffer.truncate(len);
            Ok(Recv::Data(buffer))
        }
        Err(error) => error.raw_os_error().map(Recv::Failed).ok_or(error),
    }
}

fn drain(fd: Fd, socket: &Socket, deadline: Instant) -> io::Result<Drained> {
    let mut bytes = 0;
    let mut intact = true;
    let end = loop {
        match recv(socket, 64 * 1024, deadline)? {
            Recv::Data(data) => {
                intact &= data
                    .iter()
                    .zip(bytes..)
                    .all(|(&byte, offset)| byte == pattern(offset));
                bytes += data.len() as u64;
            }
            Recv::Eof => break End::Eof,
            Recv::Failed(errno) => break End::Failed(errno),
            Recv::Nothing => break End::Deadline,
        }
    };
    Ok(Drained {
        fd,
        bytes,
        intact,
        end,
    })
}

/// Sends the pattern from `offset`, until `len` bytes are sent or the buffer is full.
fn fill(socket: &Socket, offset: u64, len: u64) -> io::Result<u64> {
    let mut sent = 0;
    while sent < len {
        let data: Vec<u8> = (offset + sent..offset + len)
            .take(64 * 1024)
            .map(pattern)
            .collect();
        match socket.send_with_flags(&data, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) {
            Ok(bytes) => sent += bytes as u64,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) => return Err(error),
        }
    }
    Ok(sent)
}

/// A key that protects nothing.
fn tls_key() -> TlsCryptoInfo {
    TlsCryptoInfo::Aes128Gcm(libc::tls12_crypto_info_aes_gcm_128 {
        info: libc::tls_crypto_info {
            version: libc::TLS_1_2_VERSION,
            cipher_type: libc::TLS_CIPHER_AES_GCM_128,
        },
        iv: [1; libc::TLS_CIPHER_AES_GCM_128_IV_SIZE],
        key: [2; libc::TLS_CIPHER_AES_GCM_128_KEY_SIZE],
        salt: [3; libc::TLS_CIPHER_AES_GCM_128_SALT_SIZE],
        rec_seq: [0; libc::TLS_CIPHER_AES_GCM_128_REC_SEQ_SIZE],
    })
}

fn set_option(socket: &Socket, option: SocketOption) -> io::Result<()> {
    match option {
        SocketOption::RecvBuffer(bytes) => socket.set_recv_buffer_size(bytes),
        SocketOption::SendBuffer(bytes) => socket.set_send_buffer_size(bytes),
        SocketOption::KeepAlive {
            idle_s,
            interval_s,
            probes,
        } => socket.set_tcp_keepalive(
            &TcpKeepalive::new()
                .with_time(Duration::from_secs(idle_s))
                .with_interval(Duration::from_secs(interval_s))
                .with_retries(probes),
        ),
        SocketOption::Linger(seconds) => socket.set_linger(seconds.map(Duration::from_secs)),
        // BPF_RET | BPF_K: accept 0 bytes of each segment.
        SocketOption::DropIncoming(true) => socket.attach_filter(&[SockFilter::new(0x06, 0, 0, 0)]),
        SocketOption::DropIncoming(false) => socket.detach_filter(),
        SocketOption::NonBlocking(on) => socket.set_nonblocking(on),
        SocketOption::Transparent(on) => Ok(setsockopt(socket, IpTransparent, &on)?),
        SocketOption::Repair(on) => Ok(setsockopt(socket, TcpRepair, &u32::from(on))?),
        SocketOption::KernelTls => {
            setsockopt(socket, TcpUlp::default(), b"tls")?;
            setsockopt(socket, TcpTlsTx, &tls_key())?;
            Ok(setsockopt(socket, TcpTlsRx, &tls_key())?)
        }
    }
}
