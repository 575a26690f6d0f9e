//! The clients: each has one source port and lives one connection after the other on it, bystander or stuck by chance.

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
use super::wire::{Header, Line, PATIENCE, Side, Then, WireError, errno_name};
use super::{Event, EventSender, STACK};

/// A handshake that took longer had a segment lost or refused: the first retransmission comes after one second.
const SLOW: Duration = Duration::from_millis(500);

/// How long a client waits for the end of a connection that it left stuck, beyond the time the server holds it.
const STUCK_PATIENCE: Duration = Duration::from_secs(2);

/// How long a client's host keeps quiet after it has forgotten a connection (RFC 9293 §3.4.3). Initial sequence numbers go up
/// by one in 64 ns (net/core/secure_seq.c), so a SYN within 70 µs of a kilobyte can have the very number that the old
/// connection's ACK acknowledges: the client then takes that for an answer without a SYN and waits in vain, or for a refusal
/// if it is an RST [measured: once in 50,000 connections].
const QUIET_TIME: Duration = Duration::from_millis(1);

/// Between attempts to use a 4-tuple that the kernel still holds.
const TUPLE_RETRY: Duration = Duration::from_micros(500);

/// Of so many clients, one lives a single connection that lasts as long as the run.
const LONG_LIVED: u32 = 10;

/// Of so many clients, one connects to the listener that lets connections wait.
const LAZY: u32 = 4;

/// What the clients are to do.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Config {
    /// The listener that accepts at once, and the one that does not.
    pub servers: [SocketAddr; 2],
    /// The source of the first client; the others have the ports after it.
    pub first: SocketAddr,
    pub clients: u16,
    pub seed: u64,
    /// Sockets are acted on from this age only: stuck ones wait for it, and half-closed streams live under it.
    pub min_age_ms: Option<u16>,
}

/// What the clients have seen.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct ClientStats {
    /// Handshakes done.
    pub opened: u64,
    /// Of these, on a 4-tuple that had a connection before.
    pub reused: u64,
    /// From the end of a connection to the handshake of the next on its 4-tuple, microseconds.
    pub gaps_us: Vec<u32>,
    /// Bystanders that carried every byte to the end, long-lived ones and streams included.
    pub finished: u64,
    /// Bystanders that lasted as long as the run.
    pub long_lived: u64,
    /// Bystanders that were half-closed all the time.
    pub streams: u64,
    /// Bytes verified by the clients in bystanders that finished.
    pub bytes: u64,
    /// Stuck connections that ended with a FIN, with an RST, or not at all in time.
    pub stuck_fin: u64,
    pub stuck_reset: u64,
    pub stuck_silent: u64,
    /// Stuck connections that the client's host forgot.
    pub stuck_forgotten: u64,
    /// Handshakes that failed, by errno.
    pub refused: BTreeMap<String, u64>,
    /// Handshakes of more than [`SLOW`].
    pub slow: u64,
    pub longest_handshake_us: u64,
    /// Connections that had to wait until the kernel gave the 4-tuple back.
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
        for (errno, count) in other.refused {
            *self.refused.entry(errno).or_default() += count;
        }
        self.slow += other.slow;
        self.longest_handshake_us = self.longest_handshake_us.max(other.longest_handshake_us);
        self.waited_for_tuple += other.waited_for_tuple;
    }
}

/// Lives until stdin ends, and then to the end of every connection.
pub(super) fn run(config: &Config) -> Result<()> {
    let stop = AtomicBool::new(false);
    let events = EventSender::default();
    let stats = thread::scope(|scope| -> Result<ClientStats> {
        let clients = (0..config.clients)
            .map(|number| {
                let client = Client::new(config, number, &stop, &events)?;
                thread::Builder::new()
                    .stack_size(STACK)
                    .spawn_scoped(scope, move || client.live())
                    .context("start a client")
            })
            .collect::<Result<Vec<_>>>()
            .inspect_err(|_| stop.store(true, Ordering::Relaxed))?;
        events.send(&Event::Ready);
        // Whatever is said, only the end counts.
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
    /// A reset of the client, after the last byte: leaves nothing behind on either side.
    ClientResets,
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
    lives: u64,
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
        let lazy = usize::from(u32::from(number) % LAZY == 1);
        Ok(Self {
            config,
            number,
            local: SocketAddr::new(config.first.ip(), port.context("no more source ports")?),
            server: config.servers[lazy],
            random: Random::new(config.seed, number.into()),
            stop,
            events,
            stats: ClientStats::default(),
            lives: 0,
            last_end: None,
        })
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn live(mut self) -> Result<ClientStats> {
        while !self.stopped() {
            let line = match self.connect() {
                Ok(line) => line,
                Err(error) => {
                    let errno = error
                        .raw_os_error()
                        .map_or_else(|| error.to_string(), errno_name);
                    *self.stats.refused.entry(errno).or_default() += 1;
                    thread::sleep(self.random.pause(20));
                    continue;
                }
            };
            self.lives += 1;
            let life = u64::from(self.number) << 40 | self.lives;
            if u32::from(self.number) % LONG_LIVED == 0 {
                self.bystander(line, life, None);
            } else if self.random.once_in(2) {
                self.stuck(line, life)?;
            } else if self.config.min_age_ms.is_some() && self.random.once_in(3) {
                self.stream(line, life);
            } else {
                let rounds = 1 + self.random.up_to(11);
                self.bystander(line, life, Some(rounds));
            }
            self.last_end = Some(Instant::now());
        }
        Ok(self.stats)
    }

    /// The next connection of this source port, as soon as the kernel gives the 4-tuple back.
    fn connect(&mut self) -> io::Result<Line> {
        let until = Instant::now() + PATIENCE;
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
            match socket.connect_timeout(&self.server.into(), PATIENCE) {
                Ok(()) => {}
                // The connection before it is not quite over on this side.
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
            return Line::new(socket.into(), Side::Client, self.local, self.server);
        }
    }

    fn lost(&self, line: &Line, life: u64, kind: &str, round: u32, error: WireError) {
        let loss = line.loss(life, kind, round, error);
        self.events.send(&Event::Lost(loss));
    }

    fn finished(&mut self, line: &Line) {
        self.stats.finished += 1;
        self.stats.bytes += line.sent + line.received;
    }

    /// Requests and replies, and an end in order. Without a number of rounds, as many as fit into the run.
    fn bystander(&mut self, mut line: Line, life: u64, rounds: Option<u32>) {
        let (kind, pause_ms) = match rounds {
            Some(_) => ("bystander", 20),
            None => ("long-lived", 40),
        };
        let end = match self.random.up_to(2) {
            0 => End::ServerCloses,
            1 => End::ClientCloses,
            _ => End::ClientResets,
        };
        let mut round = 0;
        loop {
            let last = rounds == Some(round + 1) || self.stopped();
            let header = Header {
                life,
                round,
                request: self.payload(),
                // The server's word that it has every byte; without it the client might reset too early.
                reply: 1 + self.payload(),
                then: match (last, end) {
                    (false, _) => Then::More,
                    (true, End::ServerCloses) => Then::ServerCloses,
                    (true, End::ClientCloses | End::ClientResets) => Then::ClientCloses,
                },
            };
            let done = line
                .send_request(&header)
                .and_then(|()| line.read_reply(&header, round))
                .and_then(|()| match header.then {
                    Then::ServerCloses => line.read_end(),
                    _ => Ok(()),
                });
            if let Err(error) = done {
                self.lost(&line, life, kind, round, error);
                return;
            }
            if last {
                break;
            }
            round += 1;
            thread::sleep(self.random.pause(pause_ms));
        }
        self.finished(&line);
        self.stats.long_lived += u64::from(rounds.is_none());
        if let End::ClientResets = end {
            reset(&line);
        }
    }

    /// Mostly small, sometimes more than a window.
    fn payload(&mut self) -> u32 {
        let most = if self.random.once_in(100) {
            128 << 10
        } else {
            1 << 10
        };
        self.random.up_to(most)
    }

    /// A request and a FIN; then the server's word for as long as its replies take. Under `--min-age` only.
    fn stream(&mut self, mut line: Line, life: u64) {
        let min_age_ms = self.config.min_age_ms.unwrap_or(0);
        let header = Header {
            life,
            round: 0,
            request: self.payload(),
            reply: self.random.up_to(2 << 10),
            // About 4 ms each: twice the age from which it would be taken for stuck.
            then: Then::Stream {
                replies: min_age_ms / 2 + 1,
            },
        };
        let Then::Stream { replies } = header.then else {
            unreachable!("it was just made")
        };
        let mut got = 0;
        let done = line
            .send_request(&header)
            .and_then(|()| end_requests(&line))
            .and_then(|()| {
                while got < u32::from(replies) {
                    line.read_reply(&header, got)?;
                    got += 1;
                }
                line.read_end()
            });
        match done {
            Ok(()) => {
                self.finished(&line);
                self.stats.streams += 1;
            }
            Err(error) => self.lost(&line, life, "stream", got, error),
        }
    }

    /// Some bytes and a FIN; from then on the server's socket is stuck and may be closed by anybody.
    fn stuck(&mut self, mut line: Line, life: u64) -> Result<()> {
        let ms = match self.random.up_to(3) {
            0 => self.random.up_to(5),
            1 => self.random.up_to(50),
            // Long enough for a killer on a busy machine; a quick one never lets it come to that.
            2 => self.random.up_to(500),
            _ => self.random.up_to(2000),
        };
        let ms = ms + u32::from(self.config.min_age_ms.unwrap_or(0));
        let ms = u16::try_from(ms).unwrap_or(u16::MAX);
        let header = Header {
            life,
            round: 0,
            request: self.random.up_to(1 << 10),
            reply: 0,
            then: Then::Leak {
                read: self.random.once_in(2),
                watch: self.random.once_in(2),
                ms,
            },
        };
        // Until its FIN it is as bystander as any.
        let begun = line
            .send_request(&header)
            .and_then(|()| end_requests(&line));
        if let Err(error) = begun {
            self.lost(&line, life, "not yet stuck", 0, error);
            return Ok(());
        }
        let held = Duration::from_millis(ms.into());
        if self.random.once_in(6) {
            // In repair mode a close is silent. The peer that comes again at once finds its old connection.
            setsockopt(&line.stream, TcpRepair, &1).context("enter repair mode")?;
            drop(line);
            self.stats.stuck_forgotten += 1;
            let comes_at_once = self.random.once_in(4);
            thread::sleep(if comes_at_once {
                QUIET_TIME
            } else {
                held.max(QUIET_TIME)
            });
            return Ok(());
        }
        line.stream.set_read_timeout(Some(held + STUCK_PATIENCE))?;
        match line.drain() {
            Ok(()) => self.stats.stuck_fin += 1,
            Err(error) if error.is_reset() => self.stats.stuck_reset += 1,
            Err(_) => {
                self.stats.stuck_silent += 1;
                reset(&line);
            }
        }
        Ok(())
    }
}

fn end_requests(line: &Line) -> Result<(), WireError> {
    line.stream
        .shutdown(Shutdown::Write)
        .map_err(|error| WireError::io("send FIN", &error))
}

/// Makes the close that follows a reset.
fn reset(line: &Line) {
    let socket = socket2::SockRef::from(&line.stream);
    // Of a connection that is already dead there is nothing to reset.
    let _ = socket.set_linger(Some(Duration::ZERO));
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
