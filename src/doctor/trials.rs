//! Trials: each method on a stuck connection of our own, over loopback, through the finder and the ladder.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use crate::filter::selectors::Selectors;
use crate::finder::{self, Found};
use crate::injector::engine::{self, Control, Rules, Skip, Verdict};
use crate::injector::plan::Plan;
use crate::injector::{self, ActError, MethodName};
use crate::kernel::KernelVersion;
use crate::proc::ProcFs;
use crate::proc::netns::NetnsScope;
use crate::sock_diag::SockDiag;
use crate::tcp::TcpState;

/// How long a connection over loopback, or an answer on it, may take.
const PATIENCE: Duration = Duration::from_secs(3);
const PAUSE: Duration = Duration::from_millis(1);

/// What is tried on what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subject {
    /// The method.
    pub method: MethodName,
    /// Over IPv6.
    pub ipv6: bool,
    /// Its owner may be used.
    pub owned: bool,
}

/// Everything that is tried. The probes are last: they wait until their sockets have been quiet for a second.
const SUBJECTS: [Subject; 7] = [
    subject(MethodName::Shutdown, false, true),
    subject(MethodName::Destroy, false, true),
    subject(MethodName::Rst, false, true),
    subject(MethodName::Rst, false, false),
    subject(MethodName::Rst, true, false),
    subject(MethodName::Probe, false, false),
    subject(MethodName::Probe, false, true),
];

const fn subject(method: MethodName, ipv6: bool, owned: bool) -> Subject {
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
    Failed(ActError),
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
    pub fn of(&self, method: MethodName, ipv6: bool, owned: bool) -> &Tried {
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
fn find(proc: &ProcFs, ports: &[u16]) -> Result<Found, String> {
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
        let found = finder::find(&namespaces.open, proc, &selectors)
            .map_err(|error| format!("{:#}", anyhow::Error::from(error)))?;
        // The FIN is there before shutdown() returns, unless the host is busy.
        if found.sockets.len() >= ports.len() || Instant::now() > until {
            return Ok(found);
        }
        std::thread::sleep(PAUSE);
    }
}

fn attempt(subject: Subject, stuck: &Stuck, found: &Found, proc: &ProcFs) -> Tried {
    // Somebody may have connected to our port before the listener was gone.
    let ends = (stuck.local, stuck.peer);
    let mine = |socket: &&finder::Socket| (socket.tuple.local, socket.tuple.peer) == ends;
    let Some(socket) = found.sockets.iter().find(mine) else {
        return Tried::Untried("a connection of our own did not come to CLOSE-WAIT".into());
    };
    let mut socket = socket.clone();
    if subject.owned {
        if socket.owners.is_empty() {
            return Tried::Untried("/proc does not show our own descriptors".into());
        }
    } else {
        socket.owners.clear();
    }
    let found = Found {
        sockets: vec![socket],
        processes: found.processes.clone(),
        ..Found::default()
    };
    let plan = Plan {
        methods: vec![subject.method],
        excluded: Vec::new(),
        over_limit: false,
    };
    let rules = Rules {
        grace: PATIENCE,
        discard_unsent: false,
        selectors: &Selectors::default(),
        kernel: KernelVersion::running(),
    };
    let opened =
        SockDiag::open().and_then(|diag| Ok((diag, injector::methods(&plan.methods, proc)?)));
    let (mut diag, mut methods) = match opened {
        Ok(opened) => opened,
        Err(error) => return Tried::Failed(ActError::Os("sock_diag", error)),
    };
    let mut outcomes = engine::climb(
        &found,
        &[plan],
        &[0],
        &mut methods,
        &mut diag,
        rules,
        &Clock,
    );
    let outcome = outcomes.remove(0);
    match outcome.verdict {
        Verdict::Closed(_) | Verdict::Closing(_, TcpState::LastAck) => Tried::Works,
        // Our peer is alive, and a probe is to find that out.
        Verdict::Skipped(Skip::PeerAlive) if subject.method == MethodName::Probe => Tried::Works,
        verdict => match outcome
            .attempts
            .into_iter()
            .find_map(|attempt| attempt.error)
        {
            Some(error) => Tried::Failed(error),
            None => Tried::Untried(format!("{verdict:?}")),
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

    fn progress(&self, _: MethodName, _: usize) {}
}
