//! `probe`: asks the peer whether it still knows the connection. A peer that does not answers RST, and
//! the kernel closes the socket; a peer that does, answers and is left alone.
//!
//! An owned socket asks by itself: keepalive is switched on through a duplicate of its descriptor,
//! for one probe, and everything is put back. For a socket without an owner the local stack is made to
//! send an ACK to the peer, and where that alone closes nothing, a keepalive probe is sent in its name.
//!
//! A silent peer is not proven gone. So keepalive never gets to its count: the second probe
//! would come long after the options are back. Nobody but the peer closes a socket here.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::duplicate::Duplicator;
use super::rst::{Numbers, Wire};
use super::{ActError, Method, MethodName, Scene, Target};
use crate::packet::raw::Outgoing;
use crate::proc::ProcFs;
use crate::sock_diag::{LookupError, SocketMessage};
use crate::sys;
use crate::tcp::{Segment, TcpFlags};

/// Sockets that wait for their peers together, if there are descriptors for as many duplicates.
const MOST: usize = 4096;
/// Descriptors for everything else that is open.
const RESERVED: u64 = 256;
/// Ladders that may run side by side and share the descriptors of this process.
const SHARES: u64 = 16;
/// The shortest TCP_KEEPIDLE (net/ipv4/tcp.c, tcp_sock_set_keepidle_locked): a socket that heard from
/// its peer less than this ago asks only when it is over.
const KEEP_IDLE: Duration = Duration::from_secs(1);
/// The longest TCP_KEEPINTVL and the highest TCP_KEEPCNT (include/net/tcp.h).
const MAX_KEEP_INTERVAL: i32 = 32767;
const MAX_KEEP_COUNT: i32 = 127;
/// What the kernel's milliseconds may be wrong by: two jiffies at 100 Hz.
const CLOCK_SLACK: Duration = Duration::from_millis(20);
const FIRST_PAUSE: Duration = Duration::from_millis(1);
/// Short: an interrupted run puts the options back within it.
const LONGEST_PAUSE: Duration = Duration::from_millis(10);

/// The method.
pub struct Probe {
    duplicator: Duplicator,
    wire: Wire,
    batch: usize,
}

/// A target that waits for its peer.
struct Asked {
    target: usize,
    /// Keepalive on its descriptor, put back when this is dropped.
    _keepalive: Option<Keepalive>,
    /// What the kernel said of it before the question.
    before: SocketMessage,
    since: Instant,
    /// Until when the peer may answer.
    until: Instant,
}

impl Probe {
    /// The method, with the proc file system that tells one process from the next of its number.
    pub fn new(proc: ProcFs) -> Self {
        Probe {
            duplicator: Duplicator::new(proc),
            wire: Wire::default(),
            batch: batch(),
        }
    }

    /// Switches keepalive on, on a descriptor of `target`.
    fn ask_by_keepalive(&mut self, target: &Target) -> Result<Keepalive, ActError> {
        let socket = self.duplicator.socket(target)?;
        Keepalive::start(socket).map_err(keepalive_error)
    }

    /// Makes the local stack ask the peers of `targets`, and asks in its name.
    fn ask_by_segments(
        &mut self,
        targets: &[Target],
        unsent: &[u32],
        scene: &dyn Scene,
    ) -> Vec<Result<(), ActError>> {
        let mut probes = Vec::new();
        let mut results = Vec::with_capacity(targets.len());
        let answers = self.wire.draw(targets, scene);
        for ((target, unsent), answer) in targets.iter().zip(unsent).zip(answers) {
            results.push(match answer {
                Ok(Some(numbers)) => {
                    probes.push(keepalive_probe(target, numbers, *unsent));
                    Ok(())
                }
                // It may have been sent and not seen; the peer's answer tells.
                Ok(None) => Ok(()),
                Err(error) => Err(error),
            });
        }
        self.wire.send(&probes);
        results
    }
}

impl Method for Probe {
    fn name(&self) -> MethodName {
        MethodName::Probe
    }

    fn batch(&self) -> usize {
        self.batch
    }

    fn act(&mut self, targets: &[Target], scene: &mut dyn Scene) -> Vec<Result<(), ActError>> {
        let mut results: Vec<Result<(), ActError>> = targets.iter().map(|_| Ok(())).collect();
        let all: Vec<usize> = (0..targets.len()).collect();
        let looks = scene.look(&all);
        let mut asked = Vec::with_capacity(targets.len());
        let mut unowned = Vec::new();
        for (target, look) in looks.into_iter().enumerate() {
            let before = match look {
                Ok(before) => before,
                Err(LookupError::Gone) => {
                    results[target] = Err(ActError::Gone);
                    continue;
                }
                Err(LookupError::Io(error)) => {
                    results[target] = Err(ActError::Os("sock_diag lookup", error));
                    continue;
                }
            };
            if scene.control().interrupted() {
                results[target] = Err(ActError::Interrupted);
                continue;
            }
            let since = scene.control().now();
            if targets[target].descriptors.is_empty() {
                unowned.push((target, before, since));
                continue;
            }
            match self.ask_by_keepalive(&targets[target]) {
                Ok(keepalive) => {
                    let idle = before.quiet.map_or(Duration::ZERO, |quiet| {
                        quiet.last_ack_recv.min(quiet.last_data_recv)
                    });
                    asked.push(Asked {
                        target,
                        _keepalive: Some(keepalive),
                        before,
                        since,
                        until: since + KEEP_IDLE.saturating_sub(idle) + scene.grace(),
                    });
                }
                Err(error) => results[target] = Err(error),
            }
        }
        let questions: Vec<Target> = unowned
            .iter()
            .map(|(target, ..)| targets[*target].clone())
            .collect();
        let unsent: Vec<u32> = unowned.iter().map(|(_, before, _)| before.send_q).collect();
        let sent = self.ask_by_segments(&questions, &unsent, scene);
        let until = scene.control().now() + scene.grace();
        for ((target, before, since), sent) in unowned.into_iter().zip(sent) {
            match sent {
                Ok(()) => asked.push(Asked {
                    target,
                    _keepalive: None,
                    before,
                    since,
                    until,
                }),
                Err(error) => results[target] = Err(error),
            }
        }
        await_answers(asked, scene, &mut results);
        results
    }
}

/// Watches the sockets in `asked` until each is gone, has heard from its peer, or has waited long
/// enough.
fn await_answers(
    mut asked: Vec<Asked>,
    scene: &mut dyn Scene,
    results: &mut [Result<(), ActError>],
) {
    let mut pause = FIRST_PAUSE;
    loop {
        let targets: Vec<usize> = asked.iter().map(|asked| asked.target).collect();
        let looks = scene.look(&targets);
        let now = scene.control().now();
        let interrupted = scene.control().interrupted();
        let mut looks = looks.into_iter();
        asked.retain(|asked| {
            results[asked.target] = match looks.next().expect("one look a target") {
                Err(LookupError::Gone) => Ok(()),
                Ok(after) if has_answered(asked, &after, now) => Err(ActError::PeerAlive),
                _ if interrupted => Err(ActError::Interrupted),
                _ if now >= asked.until => Err(ActError::PeerSilent),
                _ => return true,
            };
            false
        });
        if asked.is_empty() {
            return;
        }
        scene.control().sleep(pause);
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// Whether an acceptable segment of the peer has arrived since the question.
///
/// Only one that passes tcp_ack sets the clock back (net/ipv4/tcp_input.c, `rcv_tstamp`): the segment
/// that we spoof to draw an ACK does not.
fn has_answered(asked: &Asked, after: &SocketMessage, now: Instant) -> bool {
    let (Some(before), Some(after)) = (asked.before.quiet, after.quiet) else {
        return false;
    };
    let passed = now.duration_since(asked.since);
    after.last_ack_recv <= passed
        || after.last_ack_recv + CLOCK_SLACK < before.last_ack_recv + passed
}

/// A segment like the kernel's own keepalive probe: of a byte that the peer has acknowledged long
/// ago, so that it must answer (RFC 9293 §3.8.4; net/ipv4/tcp_output.c, tcp_xmit_probe_skb).
fn keepalive_probe(target: &Target, numbers: Numbers, send_q: u32) -> Outgoing {
    let tuple = target.id.tuple();
    Outgoing {
        segment: Segment {
            from: tuple.local,
            to: tuple.peer,
            // At most snd_una - 1, whatever part of send_q has been sent.
            seq: numbers.snd_nxt.minus(send_q).minus(1),
            ack: numbers.rcv_nxt,
            flags: TcpFlags::ACK,
            payload_len: 0,
        },
        interface: target.id.interface(),
    }
}

/// The options of keepalive and the values an owner had given them.
struct Keepalive {
    socket: OwnedFd,
    /// Level, name and former value, in the order they are put back.
    former: [(i32, i32, i32); 4],
}

impl Keepalive {
    const ON: (i32, i32) = (libc::SOL_SOCKET, libc::SO_KEEPALIVE);
    const COUNT: (i32, i32) = (libc::IPPROTO_TCP, libc::TCP_KEEPCNT);
    const INTERVAL: (i32, i32) = (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL);
    const IDLE: (i32, i32) = (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE);

    /// Makes the kernel send one probe, at once if the socket has been idle for [`KEEP_IDLE`].
    ///
    /// A socket with unacknowledged data sends none (net/ipv4/tcp_timer.c, tcp_keepalive_timer): its
    /// retransmissions ask the peer already.
    fn start(socket: OwnedFd) -> std::io::Result<Self> {
        let former = |(level, name)| {
            let value = sys::socket_option(socket.as_fd(), level, name)?;
            std::io::Result::Ok((level, name, value))
        };
        let former = [
            former(Self::ON)?,
            former(Self::COUNT)?,
            former(Self::INTERVAL)?,
            former(Self::IDLE)?,
        ];
        // A value that follows a large sysctl can be read and not be set (net/ipv4/tcp.c,
        // do_tcp_setsockopt): then it could not be put back either.
        for (_, name, value) in former {
            let most = match name {
                libc::TCP_KEEPIDLE | libc::TCP_KEEPINTVL => MAX_KEEP_INTERVAL,
                libc::TCP_KEEPCNT => MAX_KEEP_COUNT,
                _ => continue,
            };
            if value > most {
                return Err(std::io::Error::from_raw_os_error(libc::ERANGE));
            }
        }
        let keepalive = Keepalive { socket, former };
        let set = |(level, name), value| {
            sys::set_socket_option(keepalive.socket.as_fd(), level, name, value)
        };
        // A silent peer must not be given up: neither by the count nor, on the second expiry, by
        // TCP_USER_TIMEOUT.
        set(Self::COUNT, MAX_KEEP_COUNT)?;
        set(Self::INTERVAL, MAX_KEEP_INTERVAL)?;
        // On first, idle last: only setting the idle time counts from when the socket fell silent.
        set(Self::ON, 1)?;
        set(Self::IDLE, 1)?;
        Ok(keepalive)
    }
}

impl Drop for Keepalive {
    fn drop(&mut self) {
        for (level, name, value) in self.former {
            // A socket that has been closed meanwhile takes them as well.
            // It could be set before, and start() has seen that the value is within the limits.
            let _ = sys::set_socket_option(self.socket.as_fd(), level, name, value);
        }
    }
}

fn keepalive_error(error: std::io::Error) -> ActError {
    match error.raw_os_error() {
        Some(libc::ERANGE) => ActError::Os(
            "keepalive values of the socket (from net.ipv4.tcp_keepalive_*?) that could not be put back",
            error,
        ),
        _ => ActError::Os("keepalive", error),
    }
}

/// How many duplicates may be open at once; takes what the hard limit allows.
fn batch() -> usize {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else {
        return 1;
    };
    let most = u64::try_from(MOST).unwrap_or(u64::MAX);
    let wanted = (most * SHARES + RESERVED).min(hard).max(soft);
    let limit = match setrlimit(Resource::RLIMIT_NOFILE, wanted, hard) {
        Ok(()) => wanted,
        Err(_) => soft,
    };
    let share = limit.saturating_sub(RESERVED) / SHARES;
    usize::try_from(share).unwrap_or(MOST).clamp(1, MOST)
}
