//! Trials: each method on a stuck connection of our own, over loopback, through the finder and the ladder.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use crate::control::Control;
use crate::filter::selectors::Selectors;
use crate::finder;
use crate::injector;
use crate::injector::engine::{self, Rules};
use crate::kernel::KernelVersion;
use crate::model::{Method, MethodError, Outcome, Scan, SkipReason, Target};
use crate::proc::ProcFs;
use crate::proc::netns::NetnsScope;
use crate::sock_diag::SockDiag;
use crate::sys::errno_of;
use crate::tcp::TcpState;

/// How long a connection over loopback, or an answer on it, may take.
const PATIENCE: Duration = Duration::from_secs(3);
const PAUSE: Duration = Duration::from_millis(1);

/// What is tried on what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subject {
    /// The method.
    pub method: Method,
    /// Over IPv6.
    pub ipv6: bool,
    /// Its owner may be used.
    pub owned: bool,
}

/// Everything that is tried. The probes are last: they wait until their sockets have been quiet for a second.
const SUBJECTS: [Subject; 7] = [
    subject(Method::Shutdown, false, true),
    subject(Method::Destroy, false, true),
    subject(Method::Rst, false, true),
    subject(Method::Rst, false, false),
    subject(Method::Rst, true, false),
    subject(Method::Probe, false, false),
    subject(Method::Probe, false, true),
];

const fn subject(method: Method, ipv6: bool, owned: bool) -> Subject {
    Subject {
        method,
        ipv6,
        owned,
    }
}

/// How a trial ended.
#[derive(Debug)]
pub enum Tried {
    /// It did what it is for.
    Works,
    /// It did not.
    Failed(MethodError),
    /// It could not be tried.
    Untried(String),
}

/// What was tried.
#[derive(Debug, Default)]
pub struct Trials {
    /// Why no socket can be listed at all, if so.
    pub blind: Option<String>,
    /// Each trial.
    pub tried: Vec<(Subject, Tried)>,
}

impl Trials {
    /// Tries everything.
    pub fn run(proc: &ProcFs) -> Self {
        let stuck: Vec<io::Result<Stuck>> = SUBJECTS
            .iter()
            .map(|subject| Stuck::new(subject.ipv6))
            .collect();
        let ports: Vec<u16> = stuck
            .iter()
            .flatten()
            .map(|stuck| stuck.local.port())
            .collect();
        let found = match find(proc, &ports) {
            Ok(found) => found,
            Err(why) => {
                return Trials {
                    blind: Some(why),
                    tried: Vec::new(),
                };
            }
        };
        let attempt = |(subject, stuck): (&Subject, &io::Result<Stuck>)| {
            let tried = match stuck {
                Ok(stuck) => attempt(*subject, stuck, &found, proc),
                Err(error) => Tried::Untried(no_connection(error, subject.ipv6)),
            };
            (*subject, tried)
        };
        Trials {
            blind: None,
            tried: SUBJECTS.iter().zip(&stuck).map(attempt).collect(),
        }
    }

    /// How the trial of `method` ended.
    pub fn of(&self, method: Method, ipv6: bool, owned: bool) -> &Tried {
        let wanted = subject(method, ipv6, owned);
        let trial = self.tried.iter().find(|(subject, _)| *subject == wanted);
        &trial.expect("every subject is tried").1
    }
}

/// A connection over loopback of which one end is in CLOSE-WAIT, with nothing read and nothing to send.
struct Stuck {
    local: SocketAddr,
    peer: SocketAddr,
    /// Open as long as this lives. The peer's end is closed first, by RST, so that no TIME-WAIT is left of it.
    _ends: (TcpStream, TcpStream),
}

impl Stuck {
    fn new(ipv6: bool) -> io::Result<Self> {
        let ip: IpAddr = match ipv6 {
            true => Ipv6Addr::LOCALHOST.into(),
            false => Ipv4Addr::LOCALHOST.into(),
        };
        let listener = TcpListener::bind((ip, 0))?;
        let peer = TcpStream::connect_timeout(&listener.local_addr()?, PATIENCE)?;
        listener.set_nonblocking(true)?;
        let until = Instant::now() + PATIENCE;
        let app = loop {
            match listener.accept() {
                // Anybody on this host can connect to it.
                Ok((app, address)) if address == peer.local_addr()? => break app,
                Ok(_) => {}
                Err(error)
                    if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < until =>
                {
                    std::thread::sleep(PAUSE);
                }
                Err(error) => return Err(error),
            }
        };
        peer.shutdown(std::net::Shutdown::Write)?;
        socket2::SockRef::from(&peer).set_linger(Some(Duration::ZERO))?;
        Ok(Stuck {
            // With a port of its own, so that the selector names no other socket.
            local: app.local_addr()?,
            peer: app.peer_addr()?,
            _ends: (peer, app),
        })
    }
}

/// Our connections as the finder shows them, once all are in CLOSE-WAIT.
fn find(proc: &ProcFs, ports: &[u16]) -> Result<Scan, String> {
    let namespaces = NetnsScope::Current
        .open(proc)
        .map_err(|error| error.to_string())?;
    let selectors = Selectors {
        // Without a port it would be every socket.
        ports: ports
            .iter()
            .map(|&port| port..=port)
            .chain([0..=0])
            .collect(),
        ..Selectors::default()
    };
    let until = Instant::now() + PATIENCE;
    loop {
        let scan = finder::find(&namespaces, proc, &selectors)
            .map_err(|error| format!("{:#}", anyhow::Error::from(error)))?;
        // The FIN is there before shutdown() returns, unless the host is busy.
        if scan.targets.len() >= ports.len() || Instant::now() > until {
            return Ok(scan);
        }
        std::thread::sleep(PAUSE);
    }
}

fn attempt(subject: Subject, stuck: &Stuck, scan: &Scan, proc: &ProcFs) -> Tried {
    // Somebody may have connected to our port before the listener was gone.
    let ends = (stuck.local, stuck.peer);
    let is_ours = |target: &&Target| (target.socket.tuple.local, target.socket.tuple.peer) == ends;
    let Some(found) = scan.targets.iter().find(is_ours) else {
        return Tried::Untried("a connection of our own did not come to CLOSE-WAIT".into());
    };
    let mut target = Target::new(found.socket.clone());
    if subject.owned {
        if found.owners.is_empty() {
            return Tried::Untried("/proc does not show our own descriptors".into());
        }
        target.owners = found.owners.clone();
    }
    target.plan.methods = vec![subject.method];
    let rules = Rules {
        grace: PATIENCE,
        discard_unsent: false,
        selectors: &Selectors::default(),
        kernel: KernelVersion::running(),
    };
    let opened =
        SockDiag::open().and_then(|diag| Ok((diag, injector::executors(&[subject.method], proc)?)));
    let (mut diag, mut executors) = match opened {
        Ok(opened) => opened,
        Err(error) => {
            return Tried::Failed(MethodError::SystemCall("sock_diag", errno_of(&error)));
        }
    };
    engine::run(&mut [&mut target], &mut executors, &mut diag, rules, &Clock);
    match target.outcome {
        Some(Outcome::Closed(_) | Outcome::Closing(_, TcpState::LastAck)) => Tried::Works,
        // Our peer is alive, and a probe is to find that out.
        Some(Outcome::Skipped(SkipReason::PeerAlive)) if subject.method == Method::Probe => {
            Tried::Works
        }
        outcome => match target
            .attempts
            .into_iter()
            .find_map(|attempt| attempt.error)
        {
            Some(error) => Tried::Failed(error),
            None => Tried::Untried(format!("{outcome:?}")),
        },
    }
}

fn no_connection(error: &io::Error, ipv6: bool) -> String {
    match error.raw_os_error() {
        Some(libc::EADDRNOTAVAIL | libc::EAFNOSUPPORT) if ipv6 => "no IPv6 on loopback".into(),
        Some(libc::EADDRNOTAVAIL | libc::ENETUNREACH | libc::ENETDOWN) => "loopback is down".into(),
        _ => format!("no connection over loopback: {error}"),
    }
}

/// The real time, and nobody to interrupt it: a signal ends the program, and our connections with it.
struct Clock;

impl Control for Clock {
    fn now(&self) -> Instant {
        Instant::now()
    }

    fn sleep(&self, duration: Duration) {
        std::thread::sleep(duration);
    }

    fn interrupted(&self) -> bool {
        false
    }

    fn progress(&self, _: Method, _: usize) {}
}
