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

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::Executor;
use super::duplicate::Duplicator;
use super::engine::Batch;
use super::rst::{self, Numbers, Wire};
use crate::control::Backoff;
use crate::model::{Method, MethodError, Target};
use crate::packet::raw::Outgoing;
use crate::proc::ProcFs;
use crate::sock_diag::{DiagId, LookupError, SocketMessage};
use crate::sys::{self, errno_of};
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

/// Asks peers whether they still know the connection.
pub struct Probe {
    duplicator: Duplicator,
    wire: Wire,
    batch_size: usize,
}

/// A target that waits for its peer.
struct Asked<'t> {
    target: &'t mut Target,
    /// Keepalive on its descriptor, restored when this is dropped.
    _keepalive: Option<Keepalive>,
    /// The socket before the question.
    before: SocketMessage,
    since: Instant,
    /// Until when the peer may answer.
    until: Instant,
}

impl AsMut<Target> for Asked<'_> {
    fn as_mut(&mut self) -> &mut Target {
        self.target
    }
}

impl Probe {
    /// Recognises the owners by their start times in `proc`.
    pub fn new(proc: ProcFs) -> Self {
        Probe {
            duplicator: Duplicator::new(proc),
            wire: Wire::default(),
            batch_size: batch_size(),
        }
    }

    /// Switches keepalive on, on a descriptor of `target`.
    fn ask_by_keepalive(&mut self, target: &Target) -> Result<Keepalive, MethodError> {
        let socket = self.duplicator.socket(target)?;
        Keepalive::start(socket).map_err(|error| keepalive_error(errno_of(&error)))
    }

    /// Makes the local stack ask the peers of `unowned`, and asks in its name. Returns those that wait for an answer.
    fn ask_by_segments<'t>(
        &mut self,
        unowned: Vec<Asked<'t>>,
        batch: &Batch<'_>,
    ) -> Vec<Asked<'t>> {
        let ids: Vec<DiagId> = unowned.iter().map(|asked| asked.target.socket.id).collect();
        let answers = self.wire.elicit(&ids, batch);
        let mut probes = Vec::new();
        let mut waiting = Vec::with_capacity(unowned.len());
        for asked in unowned {
            let id = asked.target.socket.id;
            let numbers = answers
                .as_ref()
                .map_err(MethodError::clone)
                .and_then(|answers| rst::numbers(answers.of(&id.tuple())));
            match numbers {
                Ok(numbers) => {
                    // Without numbers the ACK may have been sent and not seen; the peer's answer tells.
                    let probe = |numbers| keepalive_probe(&id, numbers, asked.before.send_q);
                    probes.extend(numbers.map(probe));
                    waiting.push(asked);
                }
                Err(error) => asked.target.record(Method::Probe, Err(error)),
            }
        }
        self.wire.send(probes);
        let until = batch.control().now() + batch.grace();
        for asked in &mut waiting {
            asked.until = until;
        }
        waiting
    }
}

impl Executor for Probe {
    fn method(&self) -> Method {
        Method::Probe
    }

    fn batch_size(&self) -> usize {
        self.batch_size
    }

    fn act(&mut self, targets: Vec<&mut Target>, batch: &mut Batch<'_>) {
        let mut asked = Vec::with_capacity(targets.len());
        let mut unowned = Vec::new();
        for (target, before) in batch.lookup(targets) {
            let before = match before {
                Ok(before) => before,
                Err(LookupError::Gone) => {
                    target.record(Method::Probe, Err(MethodError::Gone));
                    continue;
                }
                Err(LookupError::Errno(errno)) => {
                    let error = MethodError::SystemCall("sock_diag lookup", errno);
                    target.record(Method::Probe, Err(error));
                    continue;
                }
            };
            if batch.control().interrupted() {
                continue;
            }
            let since = batch.control().now();
            if target.owners.is_empty() {
                unowned.push(Asked {
                    target,
                    _keepalive: None,
                    before,
                    since,
                    until: since,
                });
                continue;
            }
            match self.ask_by_keepalive(target) {
                Ok(keepalive) => {
                    let idle = before.quiet.map_or(Duration::ZERO, |quiet| {
                        quiet.last_ack_recv.min(quiet.last_data_recv)
                    });
                    asked.push(Asked {
                        target,
                        _keepalive: Some(keepalive),
                        before,
                        since,
                        until: since + KEEP_IDLE.saturating_sub(idle) + batch.grace(),
                    });
                }
                Err(error) => target.record(Method::Probe, Err(error)),
            }
        }
        asked.extend(self.ask_by_segments(unowned, batch));
        await_answers(asked, batch);
    }
}

/// Watches the sockets of `asked` until each is gone, has heard from its peer, or has waited long enough, and records its attempt.
fn await_answers(mut asked: Vec<Asked<'_>>, batch: &mut Batch<'_>) {
    let mut backoff = Backoff::new(FIRST_PAUSE, LONGEST_PAUSE);
    loop {
        let answers = batch.lookup(asked);
        let now = batch.control().now();
        let interrupted = batch.control().interrupted();
        asked = Vec::new();
        for (item, after) in answers {
            let result = match after {
                Err(LookupError::Gone) => Ok(()),
                Ok(after) if has_answered(&item, &after, now) => Err(MethodError::PeerAlive),
                _ if interrupted => continue,
                _ if now >= item.until => Err(MethodError::PeerSilent),
                _ => {
                    asked.push(item);
                    continue;
                }
            };
            item.target.record(Method::Probe, result);
        }
        if asked.is_empty() {
            return;
        }
        backoff.sleep(batch.control(), now + LONGEST_PAUSE);
    }
}

/// Whether an acceptable segment of the peer has arrived since the question.
///
/// Only one that passes tcp_ack sets the clock back (net/ipv4/tcp_input.c, `rcv_tstamp`): the segment
/// that we spoof to draw an ACK does not.
fn has_answered(asked: &Asked<'_>, after: &SocketMessage, now: Instant) -> bool {
    let (Some(before), Some(after)) = (asked.before.quiet, after.quiet) else {
        return false;
    };
    let passed = now.duration_since(asked.since);
    after.last_ack_recv <= passed
        || after.last_ack_recv + CLOCK_SLACK < before.last_ack_recv + passed
}

/// A segment like the kernel's own keepalive probe: of a byte that the peer has acknowledged long
/// ago, so that it must answer (RFC 9293 §3.8.4; net/ipv4/tcp_output.c, tcp_xmit_probe_skb).
fn keepalive_probe(id: &DiagId, numbers: Numbers, send_q: u32) -> Outgoing {
    let tuple = id.tuple();
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
        interface: id.interface(),
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

fn keepalive_error(errno: Errno) -> MethodError {
    match errno {
        Errno::ERANGE => MethodError::SystemCall(
            "keepalive values of the socket (from net.ipv4.tcp_keepalive_*?) that could not be restored",
            errno,
        ),
        _ => MethodError::SystemCall("keepalive", errno),
    }
}

/// How many duplicates may be open at once; takes what the hard limit allows.
fn batch_size() -> usize {
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
