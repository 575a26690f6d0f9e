//! The server: serves bystanders, leaks the rest for a while, and goes on whatever happens to its connections.
//!
//! It has two listeners: one that accepts at once, and one whose connections wait a little, as under a busy worker,
//! so that some are stuck before they are accepted.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, Socket, Type};

use super::random::Random;
use super::wire::{Header, Line, PATIENCE, Side, Then, WireError};
use super::{Event, EventSender, STACK};
use crate::lab::POLL_INTERVAL;

const BACKLOG: i32 = 8192;

/// The longest that the second listener lets its connections wait, milliseconds.
const LAZY_MS: u32 = 40;

/// The longest between two replies of a stream, milliseconds.
const STREAM_PAUSE_MS: u32 = 8;

/// How long a FIN may be on its way, milliseconds: as long as a bystander's bytes.
const FIN_PATIENCE_MS: u16 = 20_000;

/// What the server is to be.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Config {
    /// The listener that accepts at once, and the one that does not.
    pub listen: [SocketAddr; 2],
    pub v6_only: bool,
    pub seed: u64,
}

/// What the server has done.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct ServerStats {
    /// Connections it accepted.
    pub accepted: u64,
    /// Accepted connections that were dead before their first byte could be read.
    pub dead_on_arrival: u64,
    /// Bystanders whose requests were all right and all answered.
    pub served: u64,
    /// Connections it leaked and then closed.
    pub leaked: u64,
}

struct Server {
    events: EventSender<ServerStats>,
    stats: Mutex<ServerStats>,
    busy: AtomicUsize,
}

/// Serves until stdin ends and the last connection is done.
pub(super) fn run(config: &Config) -> Result<()> {
    let listeners = config
        .listen
        .iter()
        .map(|&address| {
            listen(address, config.v6_only).with_context(|| format!("listen on {address}"))
        })
        .collect::<Result<Vec<_>>>()?;
    let server = Arc::new(Server {
        events: EventSender::default(),
        stats: Mutex::default(),
        busy: AtomicUsize::new(0),
    });
    server.events.send(&Event::Ready);
    thread::scope(|scope| {
        let lazy = [0, LAZY_MS];
        let threads: Vec<_> = (0..)
            .zip(&listeners)
            .zip(lazy)
            .map(|((number, listener), lazy)| {
                let server = Arc::clone(&server);
                let random = Random::new(config.seed, number);
                scope.spawn(move || accept(listener, lazy, random, &server))
            })
            .collect();
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().expect("accepting does not panic"))
    })?;
    // Threads whose listener died are back before the end.
    io::copy(&mut io::stdin().lock(), &mut io::sink()).context("wait for the end")?;
    let until = Instant::now() + PATIENCE + PATIENCE;
    while server.busy.load(Ordering::Acquire) > 0 {
        ensure!(Instant::now() < until, "connections that never end");
        thread::sleep(POLL_INTERVAL);
    }
    let stats = server.stats().clone();
    server.events.send(&Event::Done(stats));
    Ok(())
}

fn listen(address: SocketAddr, v6_only: bool) -> io::Result<Socket> {
    let socket = Socket::new(
        Domain::for_address(address),
        Type::STREAM,
        Some(Protocol::TCP),
    )?;
    if address.is_ipv6() {
        socket.set_only_v6(v6_only)?;
    }
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}

/// Accepts until stdin ends.
fn accept(listener: &Socket, lazy_ms: u32, mut random: Random, server: &Arc<Server>) -> Result<()> {
    let stdin = io::stdin();
    loop {
        let mut waiting = [
            PollFd::new(listener.as_fd(), PollFlags::POLLIN),
            PollFd::new(stdin.as_fd(), PollFlags::POLLIN),
        ];
        poll(&mut waiting, PollTimeout::NONE).context("wait for connections")?;
        if waiting[1].any().unwrap_or(false) {
            return Ok(());
        }
        thread::sleep(random.pause(lazy_ms));
        loop {
            let (socket, peer) = match listener.accept() {
                Ok(accepted) => accepted,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // It died in the queue.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
                // The listener is dead, which the report sees from outside; the connections go on.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(()),
                Err(error) => return Err(error).context("accept"),
            };
            server.stats().accepted += 1;
            let local = listener.local_addr()?.as_socket();
            let peer = peer.as_socket();
            let (local, peer) = local.zip(peer).context("not an internet address")?;
            // A connection that is dead has no address of its own any more.
            let local = socket
                .local_addr()
                .ok()
                .and_then(|local| local.as_socket())
                .unwrap_or(local);
            match Line::new(socket.into(), Side::Server, local, peer) {
                Ok(line) => server.serve(line, random.next())?,
                Err(_) => server.stats().dead_on_arrival += 1,
            }
        }
    }
}

impl Server {
    fn stats(&self) -> std::sync::MutexGuard<'_, ServerStats> {
        self.stats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Serves a connection on a thread of its own.
    fn serve(self: &Arc<Self>, mut line: Line, seed: u64) -> Result<()> {
        let server = Arc::clone(self);
        server.busy.fetch_add(1, Ordering::AcqRel);
        thread::Builder::new()
            .stack_size(STACK)
            .spawn(move || {
                server.live(&mut line, Random::new(seed, 0));
                // Closed before it counts as done.
                drop(line);
                server.busy.fetch_sub(1, Ordering::AcqRel);
            })
            .context("start a thread for a connection")?;
        Ok(())
    }

    fn live(&self, line: &mut Line, mut random: Random) {
        let Ok(Some(mut header)) = line.read_header() else {
            // Nobody knows whose it was; a bystander's client does, and says so.
            self.stats().dead_on_arrival += 1;
            return;
        };
        loop {
            let (kind, served) = match header.then {
                Then::Leak { read, watch, ms } => {
                    leak(line, read, watch, ms);
                    self.stats().leaked += 1;
                    return;
                }
                Then::Stream { replies } => ("stream", stream(line, &header, replies, &mut random)),
                Then::More | Then::ServerCloses | Then::ClientCloses => {
                    let served = line
                        .read_request(&header)
                        .and_then(|()| line.send_reply(&header, header.round));
                    ("bystander", served)
                }
            };
            let next = served.and_then(|()| match header.then {
                Then::More => match line.read_header()? {
                    None => Err(WireError::new("no request where one was announced")),
                    next => Ok(next),
                },
                _ => Ok(None),
            });
            match next {
                Ok(Some(next)) => header = next,
                Ok(None) => break,
                Err(error) => {
                    let loss = line.loss(header.life, kind, header.round, error);
                    self.events.send(&Event::Lost(loss));
                    return;
                }
            }
        }
        self.stats().served += 1;
        if header.then == Then::ClientCloses {
            // From its FIN on, the connection may be taken for stuck, and closed.
            let _ = line.drain();
        }
    }
}

/// What a program that forgets to close does. Until the FIN has arrived its connection is bystander, and not to be closed.
fn leak(line: &mut Line, read: bool, watch: bool, ms: u16) {
    // The crate has no name for it.
    wait_for(
        line,
        PollFlags::from_bits_retain(libc::POLLRDHUP),
        FIN_PATIENCE_MS,
    );
    if read {
        let _ = line.drain();
    }
    if watch {
        // Hang-ups and errors are always reported; the FIN that is already there is neither.
        wait_for(line, PollFlags::empty(), ms);
    } else {
        thread::sleep(Duration::from_millis(ms.into()));
    }
}

fn wait_for(line: &Line, what: PollFlags, ms: u16) {
    let mut waiting = [PollFd::new(line.stream.as_fd(), what)];
    // Neither signals nor a bad descriptor can end it early.
    let _ = poll(&mut waiting, PollTimeout::from(ms));
}

/// Reads the request to the FIN, then replies little by little.
fn stream(
    line: &mut Line,
    header: &Header,
    replies: u16,
    random: &mut Random,
) -> Result<(), WireError> {
    line.read_request(header)?;
    line.read_end()?;
    for reply in 0..replies {
        line.send_reply(header, reply.into())?;
        thread::sleep(random.pause(STREAM_PAUSE_MS));
    }
    Ok(())
}
