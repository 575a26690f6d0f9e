//! Trials: runs each method on a stuck loopback connection of cwkill itself, with the real finder and engine.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use crate::control::Control;
use crate::filter::selectors::Selectors;
use crate::finder;
use crate::history::History;
use crate::injector;
use crate::injector::engine::{self, Rules};
use crate::injector::way::ByIterator;
use crate::kernel::KernelVersion;
use crate::model::{Method, MethodError, Outcome, Scan, SkipReason, Target};
use crate::proc::ProcFs;
use crate::proc::netns::NetnsScope;
use crate::sock_diag::SockDiag;
use crate::sys::errno_of;
use crate::tcp::TcpState;

/// The time limit for a connection over loopback, and for an answer on it. Both take far less, also on a busy machine.
const TRIAL_TIMEOUT: Duration = Duration::from_secs(3);
const POLL_INTERVAL: Duration = Duration::from_millis(1);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trial {
    pub method: Method,
    pub ipv6: bool,
    /// Whether the method gets the owner of the socket. Without it the socket looks like one without a known owner.
    pub use_owner: bool,
}

/// All trials. The probes are last: they wait until their sockets have been quiet for a second, and the other trials take a
/// part of that time.
const TRIALS: [Trial; 7] = [
    trial(Method::Shutdown, false, true),
    trial(Method::Destroy, false, true),
    trial(Method::Rst, false, true),
    trial(Method::Rst, false, false),
    trial(Method::Rst, true, false),
    trial(Method::Probe, false, false),
    trial(Method::Probe, false, true),
];

/// The trial of `destroy` by the iterator.
const BY_ITERATOR: Trial = trial(Method::Destroy, false, true);

const fn trial(method: Method, ipv6: bool, use_owner: bool) -> Trial {
    Trial {
        method,
        ipv6,
        use_owner,
    }
}

#[derive(Debug)]
pub enum TrialResult {
    Succeeded,
    Failed(MethodError),
    /// The trial could not be run, for this reason.
    NotRun(String),
}

#[derive(Debug, Default)]
pub struct Trials {
    /// Why cwkill cannot list any sockets. Then there are no results.
    pub list_error: Option<String>,
    pub results: Vec<(Trial, TrialResult)>,
    /// The result of `destroy` by the iterator; `None` if it could not be loaded.
    pub by_iterator: Option<TrialResult>,
}

impl Trials {
    /// Runs all trials, and `destroy` by the iterator too, if there is one.
    pub fn run(proc: &ProcFs, destroyer: Option<&ByIterator>) -> Self {
        let stuck: Vec<io::Result<StuckConnection>> = TRIALS
            .iter()
            .chain(destroyer.map(|_| &BY_ITERATOR))
            .map(|trial| StuckConnection::new(trial.ipv6))
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
                    list_error: Some(why),
                    results: Vec::new(),
                    by_iterator: None,
                };
            }
        };
        let run = |trial: Trial, stuck: &io::Result<StuckConnection>, destroyer| match stuck {
            Ok(stuck) => run_trial(trial, stuck, &found, proc, destroyer),
            Err(error) => TrialResult::NotRun(no_connection(error, trial.ipv6)),
        };
        let results = TRIALS.iter().zip(&stuck);
        Trials {
            list_error: None,
            results: results
                .map(|(trial, stuck)| (*trial, run(*trial, stuck, None)))
                .collect(),
            by_iterator: stuck
                .get(TRIALS.len())
                .map(|stuck| run(BY_ITERATOR, stuck, destroyer)),
        }
    }

    pub fn result(&self, method: Method, ipv6: bool, use_owner: bool) -> &TrialResult {
        let expected = trial(method, ipv6, use_owner);
        let found = self.results.iter().find(|(trial, _)| *trial == expected);
        &found.expect("every trial has a result").1
    }
}

/// A connection over loopback whose `local` end is in CLOSE-WAIT. No data is unread or unsent.
struct StuckConnection {
    local: SocketAddr,
    peer: SocketAddr,
    /// Peer and local end. The peer's end is dropped first, and closes with a RST so that no TIME-WAIT socket remains.
    _ends: (TcpStream, TcpStream),
}

impl StuckConnection {
    fn new(ipv6: bool) -> io::Result<Self> {
        let ip: IpAddr = match ipv6 {
            true => Ipv6Addr::LOCALHOST.into(),
            false => Ipv4Addr::LOCALHOST.into(),
        };
        let listener = TcpListener::bind((ip, 0))?;
        let peer = TcpStream::connect_timeout(&listener.local_addr()?, TRIAL_TIMEOUT)?;
        listener.set_nonblocking(true)?;
        let until = Instant::now() + TRIAL_TIMEOUT;
        let app = loop {
            match listener.accept() {
                // Any process on this host can connect to the listener.
                Ok((app, address)) if address == peer.local_addr()? => break app,
                Ok(_) => {}
                Err(error)
                    if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < until =>
                {
                    std::thread::sleep(POLL_INTERVAL);
                }
                Err(error) => return Err(error),
            }
        };
        // Bytes both ways, all read, so that no counter of the socket is 0.
        for (mut from, mut to) in [(&peer, &app), (&app, &peer)] {
            to.set_read_timeout(Some(TRIAL_TIMEOUT))?;
            from.write_all(b"trial")?;
            to.read_exact(&mut [0; 5])?;
        }
        peer.shutdown(std::net::Shutdown::Write)?;
        socket2::SockRef::from(&peer).set_linger(Some(Duration::ZERO))?;
        Ok(StuckConnection {
            // The listener's port. It is unique among the trials and ephemeral, so the selector matches no other socket.
            local: app.local_addr()?,
            peer: app.peer_addr()?,
            _ends: (peer, app),
        })
    }
}

/// Finds the connections of the trials, as soon as all are in CLOSE-WAIT.
fn find(proc: &ProcFs, ports: &[u16]) -> Result<Scan, String> {
    let namespaces = NetnsScope::Current
        .open(proc)
        .map_err(|error| error.to_string())?;
    let selectors = Selectors {
        // An empty list of ports would match every socket, so the list always has the unused port 0.
        ports: ports
            .iter()
            .map(|&port| port..=port)
            .chain([0..=0])
            .collect(),
        ..Selectors::default()
    };
    let until = Instant::now() + TRIAL_TIMEOUT;
    loop {
        let scan = finder::find(&namespaces, proc, &selectors, &History::none())
            .map_err(|error| format!("{:#}", anyhow::Error::from(error)))?;
        // Over loopback the FIN has usually arrived when shutdown() returns, but not always on a busy host.
        if scan.targets.len() >= ports.len() || Instant::now() > until {
            return Ok(scan);
        }
        std::thread::sleep(POLL_INTERVAL);
    }
}

fn run_trial(
    trial: Trial,
    stuck: &StuckConnection,
    scan: &Scan,
    proc: &ProcFs,
    destroyer: Option<&ByIterator>,
) -> TrialResult {
    // Another process may have connected to the same port before the listener was closed.
    let ends = (stuck.local, stuck.peer);
    let is_local_end =
        |target: &&Target| (target.socket.tuple().local, target.socket.tuple().peer) == ends;
    let Some(found) = scan.targets.iter().find(is_local_end) else {
        return TrialResult::NotRun("a connection of our own did not come to CLOSE-WAIT".into());
    };
    let mut target = Target::new(found.socket.clone());
    if trial.use_owner {
        if found.owners.is_empty() {
            return TrialResult::NotRun("/proc does not show our own descriptors".into());
        }
        target.owners = found.owners.clone();
    }
    target.plan.methods = vec![trial.method];
    let selectors = match destroyer {
        // With a minimum idle time, as by default, it compares the counters too.
        Some(_) => Selectors {
            min_idle: POLL_INTERVAL,
            ..Selectors::default()
        },
        None => Selectors::default(),
    };
    let rules = Rules {
        grace: TRIAL_TIMEOUT,
        discard_unsent: false,
        selectors: &selectors,
        kernel_version: KernelVersion::running(),
        destroyer,
    };
    let opened =
        SockDiag::open().and_then(|diag| Ok((diag, injector::executors(&[trial.method], proc)?)));
    let (mut diag, mut executors) = match opened {
        Ok(opened) => opened,
        Err(error) => {
            return TrialResult::Failed(MethodError::SystemCall("sock_diag", errno_of(&error)));
        }
    };
    engine::run(
        &mut [&mut target],
        &mut executors,
        &mut diag,
        rules,
        &SystemClock,
    );
    let is_by_iterator = target.attempts.iter().any(|attempt| attempt.at_one_instant);
    match target.outcome {
        Some(Outcome::Closed(_)) if destroyer.is_some() && !is_by_iterator => {
            TrialResult::NotRun("the walk did not show our own socket".into())
        }
        Some(Outcome::Closed(_) | Outcome::Closing(_, TcpState::LastAck)) => TrialResult::Succeeded,
        // The peer in a trial is alive, so a probe succeeds if it detects that.
        Some(Outcome::Skipped(SkipReason::PeerAlive)) if trial.method == Method::Probe => {
            TrialResult::Succeeded
        }
        outcome => match target
            .attempts
            .into_iter()
            .find_map(|attempt| attempt.error)
        {
            Some(error) => TrialResult::Failed(error),
            None => TrialResult::NotRun(format!("{outcome:?}")),
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

/// The real clock, without Ctrl-C: a signal ends the program, and the kernel closes the connections of the trials.
struct SystemClock;

impl Control for SystemClock {
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
