//! The worst case for a socket that is destroyed: connections whose clients have finished, and whose servers go on sending. A byte is lost
//! if send(2) took it and the client never got it.

use std::fmt::Write as _;
use std::io::{self, Read as _, Write as _};
use std::net::{Ipv4Addr, Shutdown, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context as _, Result, ensure};
use socket2::{Domain, Socket, Type};

use crate::lab::Lab;

/// The receive buffer of the clients in bytes. It is so small that a server often has bytes that it may not send yet.
const RECEIVE_BUFFER: usize = 2048;
/// What a server sends at a time, in bytes.
const PIECE: usize = 1000;
/// Connections at a time. A process may have 20,000 descriptors, and a connection takes two.
const AT_A_TIME: usize = 4000;
/// How often a command runs for the same connections. Each time it leaves those that have unsent bytes.
const RUNS: usize = 5;
/// After so many groups of connections in a row of which it closes none, a command is given up. On a busy machine one group may have unsent
/// bytes all the time.
const FRUITLESS: usize = 10;

/// Connections whose clients have finished, and whose servers go on sending. Both ends belong to this process.
#[derive(Debug)]
pub struct HalfOpen {
    servers: Vec<TcpStream>,
    clients: Vec<TcpStream>,
}

/// What became of connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Losses {
    /// Connections whose server's socket was closed by another process.
    pub closed: usize,
    /// Those of them that lost bytes.
    pub with_losses: usize,
    /// The bytes that they lost.
    pub bytes: u64,
}

impl HalfOpen {
    /// On loopback, in the namespace of the calling thread.
    ///
    /// # Errors
    /// The kernel refuses a socket.
    pub fn new(count: usize) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let address = listener.local_addr()?.into();
        let (mut servers, mut clients) = (Vec::new(), Vec::new());
        for _ in 0..count {
            let client = Socket::new(Domain::IPV4, Type::STREAM, None)?;
            // Before the handshake, which tells the server the size.
            client.set_recv_buffer_size(RECEIVE_BUFFER)?;
            client.connect(&address)?;
            let (server, _) = listener.accept()?;
            server.set_nodelay(true)?;
            server.set_nonblocking(true)?;
            client.set_nonblocking(true)?;
            client.shutdown(Shutdown::Write)?;
            servers.push(server);
            clients.push(client.into());
        }
        Ok(Self { servers, clients })
    }

    /// Sends on all connections, and reads at the other ends, while `run` works.
    ///
    /// # Errors
    /// Those of `run`.
    ///
    /// # Panics
    /// If one of its threads panics.
    pub fn losses_during(&self, run: impl FnOnce() -> Result<()>) -> Result<Losses> {
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut got = vec![0_u64; self.clients.len()];
                while !over.load(Ordering::Relaxed) {
                    self.read_all(&mut got);
                }
                got
            });
            let sender = scope.spawn(|| {
                let mut sent = vec![(0_u64, false); self.servers.len()];
                while !over.load(Ordering::Relaxed) {
                    for (mut server, (bytes, closed)) in self.servers.iter().zip(&mut sent) {
                        match server.write(&[0; PIECE]) {
                            Ok(written) => *bytes += written as u64,
                            Err(error) => *closed |= error.kind() != io::ErrorKind::WouldBlock,
                        }
                    }
                }
                sent
            });
            let ran = run();
            over.store(true, Ordering::Relaxed);
            let sent = sender.join().expect("the sender does not panic");
            let mut got = reader.join().expect("the reader does not panic");
            ran?;
            // On loopback all that was sent has arrived by now.
            self.read_all(&mut got);
            let mut losses = Losses::default();
            for ((sent, _), got) in sent.iter().zip(got).filter(|((_, closed), _)| *closed) {
                losses.closed += 1;
                losses.with_losses += usize::from(*sent > got);
                losses.bytes += sent - got;
            }
            Ok(losses)
        })
    }

    /// Reads what the clients have got, and adds its size in bytes to `got`, which has a number for each connection.
    fn read_all(&self, got: &mut [u64]) {
        let mut buffer = [0; 4096];
        for (mut client, got) in self.clients.iter().zip(got) {
            while let Ok(read @ 1..) = client.read(&mut buffer) {
                *got += read as u64;
            }
        }
    }
}

/// Closes connections with a command, in the namespace of `lab`'s application, until it has closed `least`.
///
/// # Errors
/// The connections cannot be made, the command cannot be started, or it closes none of several groups in a row.
pub fn by_command(lab: &Lab, line: &[String], least: usize) -> Result<Losses> {
    let mut all = Losses::default();
    let mut fruitless = 0;
    while all.closed < least {
        let mut last = None;
        let some = lab.app_host().within(|| {
            let connections = HalfOpen::new(AT_A_TIME)?;
            connections.losses_during(|| {
                for _ in 0..RUNS {
                    // Its exit status says that some sockets were left, and it is the same if none was.
                    let ran = Command::new(&line[0])
                        .args(&line[1..])
                        .stdin(Stdio::null())
                        .output()
                        .with_context(|| format!("run {}", line[0]))?;
                    last = Some(ran);
                }
                Ok(())
            })
        })?;
        fruitless = if some.closed == 0 { fruitless + 1 } else { 0 };
        ensure!(
            fruitless < FRUITLESS,
            "{} closes nothing: {last:?}",
            line.join(" ")
        );
        all.closed += some.closed;
        all.with_losses += some.with_losses;
        all.bytes += some.bytes;
    }
    Ok(all)
}

/// Prints the losses by each way of destroying sockets, for at least `least` sockets each.
///
/// # Errors
/// As [`by_command`].
pub(crate) fn run(cwkill: &str, least: usize) -> Result<()> {
    let destroy =
        format!("{cwkill} --all --min-idle 0s --no-owners --method destroy --quiet --bpf");
    let mut table = String::new();
    writeln!(
        table,
        "{:<26} {:>9} {:>9} {:>12}",
        "", "closed", "with loss", "bytes lost"
    )?;
    for (name, line) in [
        ("cwkill, by iterator", format!("{destroy} always")),
        ("cwkill, by SOCK_DESTROY", format!("{destroy} never")),
        ("ss -K", "ss -K -tn state close-wait".to_owned()),
    ] {
        let lab = Lab::new()?;
        let line: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        let losses = by_command(&lab, &line, least)?;
        let Losses {
            closed,
            with_losses,
            bytes,
        } = losses;
        writeln!(table, "{name:<26} {closed:>9} {with_losses:>9} {bytes:>12}")?;
    }
    print!("{table}");
    Ok(())
}
