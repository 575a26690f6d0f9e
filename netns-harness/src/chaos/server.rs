//! The server: it serves bystanders, leaks the other connections for a while, and goes on when connections fail.
//!
//! It has two listeners. One accepts at once. The other lets connections wait a little, as a busy server does, so that
//! some are stuck before they are accepted.

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
use super::wire::{BYTE_TIMEOUT, Connection, Header, Side, Then, WireError};
use super::workers::give_way;
use super::{Event, EventSender, STACK};
use crate::lab::POLL_INTERVAL;

const BACKLOG: i32 = 8192;

/// The longest time that a connection waits at the second listener, in milliseconds.
const ACCEPT_DELAY_MS: u32 = 40;

/// How long the server waits for a FIN, in milliseconds: as long as for a bystander's bytes.
const FIN_TIMEOUT_MS: u32 = 20_000;

/// The server's part of the [`super::Options`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Config {
    /// The address that accepts at once, and the one that delays.
    pub listen: [SocketAddr; 2],
    pub v6_only: bool,
    pub seed: u64,
    /// The longest time for which it leaks a connection.
    pub longest_leak: Duration,
}

/// Counters of the server.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct ServerStats {
    /// Accepted connections.
    pub accepted: u64,
    /// Accepted connections that were dead before their first byte could be read.
    pub dead_on_arrival: u64,
    /// Bystanders whose requests were all correct and all answered.
    pub served: u64,
    /// Connections leaked and then closed.
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
        let delays_ms = [0, ACCEPT_DELAY_MS];
        let threads: Vec<_> = (0..)
            .zip(&listeners)
            .zip(delays_ms)
            .map(|((number, listener), delay_ms)| {
                let server = Arc::clone(&server);
                let random = Random::new(config.seed, number);
                scope.spawn(move || accept(listener, delay_ms, random, &server))
            })
            .collect();
        threads
            .into_iter()
            .try_for_each(|thread| thread.join().expect("accepting does not panic"))
    })?;
    // A thread returns early if its listener was closed.
    io::copy(&mut io::stdin().lock(), &mut io::sink()).context("wait for the end")?;
    let until = Instant::now() + BYTE_TIMEOUT + BYTE_TIMEOUT + config.longest_leak;
    while server.busy.load(Ordering::Acquire) > 0 {
        ensure!(
            Instant::now() < until,
            "some connections did not end in time"
        );
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
fn accept(
    listener: &Socket,
    delay_ms: u32,
    mut random: Random,
    server: &Arc<Server>,
) -> Result<()> {
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
        thread::sleep(random.pause(delay_ms));
        loop {
            let (socket, peer) = match listener.accept() {
                Ok(accepted) => accepted,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                // The connection died in the accept queue.
                Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => continue,
                // The listener was closed. The report notices that from outside, and the connections go on.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return Ok(()),
                Err(error) => return Err(error).context("accept"),
            };
            server.stats().accepted += 1;
            let local = listener.local_addr()?.as_socket();
            let peer = peer.as_socket();
            let (local, peer) = local.zip(peer).context("not an internet address")?;
            // The kernel returns no address of a dead connection.
            let local = socket
                .local_addr()
                .ok()
                .and_then(|local| local.as_socket())
                .unwrap_or(local);
            match Connection::new(socket.into(), Side::Server, local, peer) {
                Ok(connection) => server.serve(connection, random.next())?,
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
    fn serve(self: &Arc<Self>, mut connection: Connection, seed: u64) -> Result<()> {
        let server = Arc::clone(self);
        server.busy.fetch_add(1, Ordering::AcqRel);
        thread::Builder::new()
            .stack_size(STACK)
            .spawn(move || {
                give_way();
                server.handle(&mut connection, Random::new(seed, 0));
                // Closed before the connection counts as done.
                drop(connection);
                server.busy.fetch_sub(1, Ordering::AcqRel);
            })
            .context("start a thread for a connection")?;
        Ok(())
    }

    fn handle(&self, connection: &mut Connection, mut random: Random) {
        let Ok(Some(mut header)) = connection.read_header() else {
            // The server cannot know its kind. The client of a bystander knows it and reports the loss.
            self.stats().dead_on_arrival += 1;
            return;
        };
        loop {
            let (kind, served) = match header.then {
                Then::Leak { read, watch, ms } => {
                    leak(connection, read, watch, ms);
                    self.stats().leaked += 1;
                    return;
                }
                Then::Idle => {
                    // A killer ends it, or the client.
                    let _ = connection.drain();
                    self.stats().leaked += 1;
                    return;
                }
                Then::Stream { replies, pause_ms } => {
                    let replies = (replies, pause_ms);
                    ("stream", stream(connection, &header, replies, &mut random))
                }
                Then::More | Then::ServerCloses | Then::ClientCloses => {
                    let served = connection
                        .read_request(&header)
                        .and_then(|()| connection.send_reply(&header, header.round));
                    ("bystander", served)
                }
            };
            let next = served.and_then(|()| match header.then {
                Then::More => match connection.read_header()? {
                    None => Err(WireError::new("the announced request is missing")),
                    next => Ok(next),
                },
                _ => Ok(None),
            });
            match next {
                Ok(Some(next)) => header = next,
                Ok(None) => break,
                Err(error) => {
                    let loss = connection.loss(header.id, kind, header.round, error);
                    self.events.send(&Event::Lost(loss));
                    return;
                }
            }
        }
        self.stats().served += 1;
        if header.then == Then::ClientCloses {
            // After its FIN, a killer may take the connection for stuck and close it.
            let _ = connection.drain();
        }
    }
}

/// Behaves as a program that forgets to close. Until the FIN has arrived, the connection is a bystander and must not be
/// closed.
fn leak(connection: &mut Connection, read: bool, watch: bool, ms: u32) {
    // nix has no constant for POLLRDHUP.
    wait_for(
        connection,
        PollFlags::from_bits_retain(libc::POLLRDHUP),
        FIN_TIMEOUT_MS,
    );
    if read {
        let _ = connection.drain();
    }
    if watch {
        // poll(2) always reports hang-ups and errors. The FIN that has arrived is neither.
        wait_for(connection, PollFlags::empty(), ms);
    } else {
        thread::sleep(Duration::from_millis(ms.into()));
    }
}

fn wait_for(connection: &Connection, events: PollFlags, ms: u32) {
    let mut waiting = [PollFd::new(connection.stream.as_fd(), events)];
    // No signal has a handler here, and the descriptor is valid: poll(2) cannot end early.
    let timeout = PollTimeout::try_from(ms).unwrap_or(PollTimeout::MAX);
    let _ = poll(&mut waiting, timeout);
}

/// Reads the request up to the FIN, then replies with pauses.
fn stream(
    connection: &mut Connection,
    header: &Header,
    (replies, pause_ms): (u16, u16),
    random: &mut Random,
) -> Result<(), WireError> {
    connection.read_request(header)?;
    connection.read_end()?;
    for reply in 0..replies {
        connection.send_reply(header, reply.into())?;
        thread::sleep(random.pause(pause_ms.into()));
    }
    Ok(())
}
