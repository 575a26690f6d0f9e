//! The clients: each has one source port and opens one connection after the other on it. Chance decides which of them are
//! bystanders and which get stuck.

use std::collections::BTreeMap;
use std::io;
use std::net::{Shutdown, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use nix::sys::socket::setsockopt;
use nix::sys::socket::sockopt::TcpRepair;
use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, Socket, Type};

use super::random::Random;
use super::wire::{BYTE_TIMEOUT, Connection, Header, Side, Then, WireError, errno_name};
use super::workers::give_way;
use super::{Event, EventSender, STACK};

/// In a handshake that took longer, a segment was lost or dropped: the kernel retransmits after one second.
const SLOW: Duration = Duration::from_millis(500);

/// How long a client waits for the end of a stuck connection, in addition to the time that the server holds it.
const STUCK_TIMEOUT: Duration = Duration::from_secs(2);

/// How long a client waits after its host has forgotten a connection (RFC 9293 §3.4.3). The initial sequence number grows by
/// one every 64 ns (net/core/secure_seq.c). A SYN sent within 70 µs of a kilobyte can thus have the number that an ACK of the
/// old connection acknowledges. The client takes that ACK for an answer without SYN and waits in vain; it takes an RST for a
/// refusal [measured: once in 50,000 connections].
const QUIET_TIME: Duration = Duration::from_millis(1);

/// Pause between attempts to use a 4-tuple that the kernel still holds.
const TUPLE_RETRY: Duration = Duration::from_micros(500);

/// One client in this many has a single connection that lasts as long as the run.
const LONG_LIVED: u32 = 10;

/// One client in this many connects to the listener that accepts with a delay.
const DELAYED: u32 = 4;

/// The longest pause between two replies of a stream, in milliseconds, as far as [`MOST_REPLIES`] are enough.
const STREAM_PAUSE_MS: u32 = 8;
/// The most replies of a stream. With more, the streams of a long minimum age would take all processor time.
const MOST_REPLIES: u32 = 1000;

/// The clients' part of the [`super::Options`].
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Config {
    /// The listener that accepts at once, and the one that delays.
    pub servers: [SocketAddr; 2],
    /// The source address of the first client. The others have the following ports.
    pub first: SocketAddr,
    pub clients: u16,
    pub seed: u64,
    /// The killers act on sockets of at least this age: stuck connections last longer, half-closed streams stay younger.
    pub min_age_ms: Option<u32>,
    /// How many connections of a hundred get stuck.
    pub stuck_percent: u32,
    /// Stuck connections last longer than the minimum age by at most one of these times, in milliseconds.
    pub held_ms: [u32; 4],
    /// A killer on a gateway ends connections that are idle for this long, and those of which one end has sent its FIN. Half of the stuck
    /// connections are idle ones.
    pub idle_ms: Option<u32>,
}

/// Counters of the clients.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct ClientStats {
    /// Completed handshakes.
    pub opened: u64,
    /// Completed handshakes on a 4-tuple that had a connection before.
    pub reused: u64,
    /// Times from the end of a connection to the next handshake on its 4-tuple, in microseconds.
    pub gaps_us: Vec<u32>,
    /// Bystanders that carried every byte to the end, long-lived ones and streams included.
    pub finished: u64,
    /// Bystanders that lasted as long as the run.
    pub long_lived: u64,
    /// Bystanders that were half-closed all the time.
    pub streams: u64,
    /// Bytes that the clients verified in the finished bystanders.
    pub bytes: u64,
    /// Stuck connections whose client read a FIN, an RST, or nothing in time.
    pub stuck_fin: u64,
    pub stuck_reset: u64,
    pub stuck_silent: u64,
    /// Stuck connections that the client's host forgot.
    pub stuck_forgotten: u64,
    /// Idle connections that a killer has ended, and those that it has not.
    pub idle_ended: u64,
    pub idle_left: u64,
    /// Bystanders that were reset after one of their ends had got no processor time for as long as an idle connection lasts.
    pub overslept: u64,
    /// Bystanders that were reset after their last byte and before the FIN that the server had announced.
    pub reset_at_end: u64,
    /// Handshakes that failed, by errno.
    pub refused: BTreeMap<String, u64>,
    /// Handshakes of more than [`SLOW`].
    pub slow: u64,
    pub longest_handshake_us: u64,
    /// Connections that waited until the kernel released the 4-tuple.
    pub waited_for_tuple: u64,
}

impl ClientStats {
    fn add(&mut self, other: Self) {
        self.opened += other.opened;
        self.reused += other.reused;
        self.gaps_us.extend(other.gaps_us);
        self.finished += other.finished;
        self.long_lived += other.long_lived;
        self.streams += other.streams;
        self.bytes += other.bytes;
        self.stuck_fin += other.stuck_fin;
        self.stuck_reset += other.stuck_reset;
        self.stuck_silent += other.stuck_silent;
        self.stuck_forgotten += other.stuck_forgotten;
        self.idle_ended += other.idle_ended;
        self.idle_left += other.idle_left;
        self.overslept += other.overslept;
        self.reset_at_end += other.reset_at_end;
        for (errno, count) in other.refused {
            *self.refused.entry(errno).or_default() += count;
        }
        self.slow += other.slow;
        self.longest_handshake_us = self.longest_handshake_us.max(other.longest_handshake_us);
        self.waited_for_tuple += other.waited_for_tuple;
    }
}

/// Runs until stdin ends, then completes the connections that are open.
pub(super) fn run(config: &Config) -> Result<()> {
    let stop = AtomicBool::new(false);
    let events = EventSender::default();
    let stats = thread::scope(|scope| -> Result<ClientStats> {
        let clients = (0..config.clients)
            .map(|number| {
                let client = Client::new(config, number, &stop, &events)?;
                thread::Builder::new()
                    .stack_size(STACK)
                    .spawn_scoped(scope, move || {
                        give_way();
                        client.run()
                    })
                    .context("start a client")
            })
            .collect::<Result<Vec<_>>>()
            .inspect_err(|_| stop.store(true, Ordering::Relaxed))?;
        events.send(&Event::Ready);
        // Only the end of stdin matters, not its content.
        let ended = io::copy(&mut io::stdin().lock(), &mut io::sink());
        stop.store(true, Ordering::Relaxed);
        ended.context("wait for the end")?;
        let mut stats = ClientStats::default();
        for client in clients {
            stats.add(client.join().expect("a client does not panic")?);
        }
        Ok(stats)
    })?;
    events.send(&Event::Done(stats));
    Ok(())
}

/// How a bystander ends.
#[derive(Debug, Clone, Copy)]
enum End {
    ServerCloses,
    ClientCloses,
    /// The client resets after the last byte, which leaves no TIME-WAIT on either side.
    ClientResets,
}

/// When bytes of a connection have moved, as its client knows it: the last four times.
struct Moved([Instant; 4]);

impl Default for Moved {
    fn default() -> Self {
        Self([Instant::now(); 4])
    }
}

impl Moved {
    fn mark(&mut self) {
        self.0.rotate_left(1);
        self.0[3] = Instant::now();
    }

    /// The longest time without bytes, from the first of these times until now.
    fn longest_gap(&self) -> Duration {
        let gaps = self.0.windows(2).map(|pair| pair[1] - pair[0]);
        gaps.fold(self.0[3].elapsed(), Duration::max)
    }
}

struct Client<'a> {
    config: &'a Config,
    number: u16,
    local: SocketAddr,
    server: SocketAddr,
    random: Random,
    stop: &'a AtomicBool,
    events: &'a EventSender<ClientStats>,
    stats: ClientStats,
    connections: u64,
    last_end: Option<Instant>,
}

impl<'a> Client<'a> {
    fn new(
        config: &'a Config,
        number: u16,
        stop: &'a AtomicBool,
        events: &'a EventSender<ClientStats>,
    ) -> Result<Self> {
        let port = config.first.port().checked_add(number);
        let delayed = usize::from(u32::from(number) % DELAYED == 1);
        Ok(Self {
            config,
            number,
            local: SocketAddr::new(config.first.ip(), port.context("no more source ports")?),
            server: config.servers[delayed],
            random: Random::new(config.seed, number.into()),
            stop,
            events,
            stats: ClientStats::default(),
            connections: 0,
            last_end: None,
        })
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn run(mut self) -> Result<ClientStats> {
        while !self.stopped() {
            let connection = match self.connect() {
                Ok(connection) => connection,
                Err(error) => {
                    let errno = error
                        .raw_os_error()
                        .map_or_else(|| error.to_string(), errno_name);
                    *self.stats.refused.entry(errno).or_default() += 1;
                    thread::sleep(self.random.pause(20));
                    continue;
                }
            };
            self.connections += 1;
            let id = u64::from(self.number) << 40 | self.connections;
            if u32::from(self.number) % LONG_LIVED == 0 {
                self.bystander(connection, id, None);
            } else if self.random.up_to(99) < self.config.stuck_percent {
                match self.config.idle_ms {
                    Some(idle_ms) if self.random.once_in(2) => {
                        self.idle(connection, id, idle_ms)?;
                    }
                    _ => self.stuck(connection, id)?,
                }
            } else if self.config.min_age_ms.is_some() && self.random.once_in(3) {
                self.stream(connection, id);
            } else {
                let rounds = 1 + self.random.up_to(11);
                self.bystander(connection, id, Some(rounds));
            }
            self.last_end = Some(Instant::now());
        }
        Ok(self.stats)
    }

    /// Opens the next connection from this source port, as soon as the kernel releases the 4-tuple.
    fn connect(&mut self) -> io::Result<Connection> {
        let until = Instant::now() + BYTE_TIMEOUT;
        let mut waited = false;
        loop {
            let began = Instant::now();
            let socket = Socket::new(
                Domain::for_address(self.local),
                Type::STREAM,
                Some(Protocol::TCP),
            )?;
            socket.set_reuse_address(true)?;
            socket.bind(&self.local.into())?;
            match socket.connect_timeout(&self.server.into(), BYTE_TIMEOUT) {
                Ok(()) => {}
                // The kernel of this side still holds the connection before it.
                Err(error)
                    if error.raw_os_error() == Some(libc::EADDRNOTAVAIL)
                        && Instant::now() < until =>
                {
                    waited = true;
                    thread::sleep(TUPLE_RETRY);
                    continue;
                }
                Err(error) => return Err(error),
            }
            let took = began.elapsed();
            self.stats.opened += 1;
            self.stats.slow += u64::from(took > SLOW);
            self.stats.longest_handshake_us = self.stats.longest_handshake_us.max(micros(took));
            self.stats.waited_for_tuple += u64::from(waited);
            if let Some(last_end) = self.last_end {
                self.stats.reused += 1;
                let gap = micros(last_end.elapsed());
                self.stats
                    .gaps_us
                    .push(u32::try_from(gap).unwrap_or(u32::MAX));
            }
            return Connection::new(socket.into(), Side::Client, self.local, self.server);
        }
    }

    fn lost(&self, connection: &Connection, id: u64, kind: &str, round: u32, error: WireError) {
        let loss = connection.loss(id, kind, round, error);
        self.events.send(&Event::Lost(loss));
    }

    fn finished(&mut self, connection: &Connection) {
        self.stats.finished += 1;
        self.stats.bytes += connection.sent + connection.received;
    }

    /// Exchanges requests and replies, then ends in order. Without `rounds`, it lasts as long as the run.
    fn bystander(&mut self, mut connection: Connection, id: u64, rounds: Option<u32>) {
        let (kind, pause_ms) = match rounds {
            Some(_) => ("bystander", 20),
            // Pauses that are shorter would take most of the processor time.
            None => ("long-lived", 200),
        };
        let end = match self.random.up_to(2) {
            0 => End::ServerCloses,
            1 => End::ClientCloses,
            _ => End::ClientResets,
        };
        let mut round = 0;
        let mut moved = Moved::default();
        loop {
            let last = rounds == Some(round + 1) || self.stopped();
            let header = Header {
                id,
                round,
                request: self.payload(),
                // Never empty: the reply confirms that the server has every byte, so that a reset comes late enough.
                reply: 1 + self.payload(),
                then: match (last, end) {
                    (false, _) => Then::More,
                    (true, End::ServerCloses) => Then::ServerCloses,
                    (true, End::ClientCloses | End::ClientResets) => Then::ClientCloses,
                },
            };
            let mut at_end = false;
            let done = connection
                .send_request(&header)
                .and_then(|()| {
                    moved.mark();
                    connection.read_reply(&header, round)
                })
                .and_then(|()| match header.then {
                    Then::ServerCloses => {
                        at_end = true;
                        connection.read_end()
                    }
                    _ => Ok(()),
                });
            if let Err(error) = done {
                let idle_ms = self.config.idle_ms.map(u64::from);
                match idle_ms.map(Duration::from_millis) {
                    // A connection that the killer is to end. Data may have moved since its last look.
                    Some(idle) if error.is_reset() && moved.longest_gap() >= idle => {
                        self.stats.overslept += 1;
                    }
                    // A killer on a gateway may end a connection after its first FIN. After a FIN this reads an end and no error, also if
                    // an RST has followed (net/ipv4/tcp.c, tcp_recvmsg_locked: SOCK_DONE). So the RST came first.
                    Some(_) if error.is_reset() && at_end => self.stats.reset_at_end += 1,
                    _ => self.lost(&connection, id, kind, round, error),
                }
                return;
            }
            if last {
                break;
            }
            round += 1;
            moved.mark();
            thread::sleep(self.random.pause(pause_ms));
        }
        self.finished(&connection);
        self.stats.long_lived += u64::from(rounds.is_none());
        if let End::ClientResets = end {
            reset(&connection);
        }
    }

    /// A payload size: mostly small, sometimes larger than a window.
    fn payload(&mut self) -> u32 {
        let most = if self.random.once_in(100) {
            128 << 10
        } else {
            1 << 10
        };
        self.random.up_to(most)
    }

    /// Sends a request and a FIN, then reads the replies. Used with `--min-age` only.
    fn stream(&mut self, mut connection: Connection, id: u64) {
        let min_age_ms = self.config.min_age_ms.unwrap_or(0);
        // The stream lasts twice the minimum age: a pause is half of the longest one on average.
        let pause_ms = (min_age_ms * 4 / MOST_REPLIES).max(STREAM_PAUSE_MS);
        let replies = min_age_ms * 4 / pause_ms + 1;
        let header = Header {
            id,
            round: 0,
            request: self.payload(),
            // Never empty: without bytes, a stream is as stuck as any other.
            reply: 1 + self.random.up_to(2 << 10),
            then: Then::Stream {
                replies: u16::try_from(replies).unwrap_or(u16::MAX),
                pause_ms: u16::try_from(pause_ms).unwrap_or(u16::MAX),
            },
        };
        let mut replies_read = 0;
        let done = connection
            .send_request(&header)
            .and_then(|()| end_requests(&connection))
            .and_then(|()| {
                while replies_read < replies {
                    connection.read_reply(&header, replies_read)?;
                    replies_read += 1;
                }
                connection.read_end()
            });
        match done {
            Ok(()) => {
                self.finished(&connection);
                self.stats.streams += 1;
                self.events.send(&Event::StreamFinished);
            }
            Err(error) => self.lost(&connection, id, "stream", replies_read, error),
        }
    }

    /// Sends some bytes, and then nothing for longer than `idle_ms`. From then on a killer on a gateway may end the connection. If it does
    /// not, this client resets, closes or forgets it. Then it opens the next one on the same 4-tuple.
    fn idle(&mut self, mut connection: Connection, id: u64, idle_ms: u32) -> Result<()> {
        let header = Header {
            id,
            round: 0,
            request: self.random.up_to(1 << 10),
            reply: 0,
            then: Then::Idle,
        };
        if let Err(error) = connection.send_request(&header) {
            self.lost(&connection, id, "not yet idle", 0, error);
            return Ok(());
        }
        let longest = self.config.held_ms[usize::try_from(self.random.up_to(3)).unwrap_or(0)];
        // The kernel counts the age in seconds.
        let ms = idle_ms + 1000 + self.random.up_to(longest);
        connection
            .stream
            .set_read_timeout(Some(Duration::from_millis(ms.into())))?;
        if connection.drain().is_err_and(|error| error.is_reset()) {
            self.stats.idle_ended += 1;
            return Ok(());
        }
        self.stats.idle_left += 1;
        match self.random.up_to(2) {
            0 => reset(&connection),
            1 => {}
            _ => {
                setsockopt(&connection.stream, TcpRepair, &1).context("enter repair mode")?;
                drop(connection);
                thread::sleep(QUIET_TIME);
            }
        }
        Ok(())
    }

    /// Sends some bytes and a FIN. From then on the server's socket is stuck, and a killer may close it.
    fn stuck(&mut self, mut connection: Connection, id: u64) -> Result<()> {
        let times = self.config.held_ms;
        let longest = times[usize::try_from(self.random.up_to(3)).unwrap_or(0)];
        let ms = self.random.up_to(longest) + self.config.min_age_ms.unwrap_or(0);
        let header = Header {
            id,
            round: 0,
            request: self.random.up_to(1 << 10),
            reply: 0,
            then: Then::Leak {
                read: self.random.once_in(2),
                watch: self.random.once_in(2),
                ms,
            },
        };
        // Until its FIN it is a bystander.
        let begun = connection
            .send_request(&header)
            .and_then(|()| end_requests(&connection));
        if let Err(error) = begun {
            self.lost(&connection, id, "not yet stuck", 0, error);
            return Ok(());
        }
        let held = Duration::from_millis(ms.into());
        if self.random.once_in(6) {
            // In repair mode a close sends nothing. If the client comes again at once, the server still has the old
            // connection.
            setsockopt(&connection.stream, TcpRepair, &1).context("enter repair mode")?;
            drop(connection);
            self.stats.stuck_forgotten += 1;
            let at_once = self.random.once_in(4);
            thread::sleep(if at_once {
                QUIET_TIME
            } else {
                held.max(QUIET_TIME)
            });
            return Ok(());
        }
        connection
            .stream
            .set_read_timeout(Some(held + STUCK_TIMEOUT))?;
        match connection.drain() {
            Ok(()) => self.stats.stuck_fin += 1,
            Err(error) if error.is_reset() => self.stats.stuck_reset += 1,
            Err(_) => {
                self.stats.stuck_silent += 1;
                reset(&connection);
            }
        }
        Ok(())
    }
}

fn end_requests(connection: &Connection) -> Result<(), WireError> {
    connection
        .stream
        .shutdown(Shutdown::Write)
        .map_err(|error| WireError::io("send FIN", &error))
}

/// Makes the following close send RST.
fn reset(connection: &Connection) {
    let socket = socket2::SockRef::from(&connection.stream);
    // Fails only on a dead connection, which needs no reset.
    let _ = socket.set_linger(Some(Duration::ZERO));
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
