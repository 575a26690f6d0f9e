//! Keepalive of a socket of another process, turned on until the kernel has sent one probe.
//!
//! If cwkill gets SIGKILL meanwhile, keepalive stays on, with values that do little: see [`super::probe`].

use std::os::fd::AsFd;
use std::time::Duration;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::workers::WORKERS_AT_ONCE;
use crate::sys::{self, Duplicate};
use crate::tcp::info;

/// Sockets per batch, if the limit of open descriptors permits one duplicate for each.
const MAX_BATCH: usize = 4096;
/// Descriptors that are kept free for the other files of cwkill: namespaces, netlink sockets, the log.
const DESCRIPTORS_KEPT_FREE: u64 = 256;
/// Workers that may run in parallel and share the descriptors of this process.
const WORKERS: u64 = WORKERS_AT_ONCE as u64;
/// The shortest TCP_KEEPIDLE (net/ipv4/tcp.c, tcp_sock_set_keepidle_locked). The kernel sends the probe when this time has
/// passed since the last segment of the peer.
pub(super) const KEEP_IDLE: Duration = Duration::from_secs(1);
/// The longest TCP_KEEPINTVL and the highest TCP_KEEPCNT (include/net/tcp.h).
const MAX_KEEP_INTERVAL: i32 = 32767;
const MAX_KEEP_COUNT: i32 = 127;
/// The keepalive options of a socket, with the values to restore.
pub(super) struct Keepalive {
    socket: Duplicate,
    /// Level, name and former value, in the order in which they are restored.
    former: [(i32, i32, i32); 4],
    /// The number of unanswered probes before this one. The program may have asked the peer itself.
    probes: u8,
    /// How long the peer had been quiet before it.
    idle: Duration,
}

/// How long no segment of the peer has arrived.
pub(super) fn idle(socket: &Duplicate) -> std::io::Result<Duration> {
    Ok(probes_and_idle(socket)?.1)
}

/// The unanswered probes of a socket, and the time since the last segment of its peer.
fn probes_and_idle(socket: &Duplicate) -> std::io::Result<(u8, Duration)> {
    let mut buffer = [0; 512];
    let info = info::read(socket.as_fd(), &mut buffer)?;
    let data = info.last_data_recv().unwrap_or_default();
    let ack = info.last_ack_recv().unwrap_or_default();
    // net/ipv4/tcp_timer.c, keepalive_time_elapsed.
    Ok((info.probes().unwrap_or(0), data.min(ack)))
}

impl Keepalive {
    const ON: (i32, i32) = (libc::SOL_SOCKET, libc::SO_KEEPALIVE);
    const COUNT: (i32, i32) = (libc::IPPROTO_TCP, libc::TCP_KEEPCNT);
    const INTERVAL: (i32, i32) = (libc::IPPROTO_TCP, libc::TCP_KEEPINTVL);
    const IDLE: (i32, i32) = (libc::IPPROTO_TCP, libc::TCP_KEEPIDLE);

    /// Makes the kernel send one probe. It sends it at its next tick if the socket has been idle for [`KEEP_IDLE`].
    pub(super) fn start(socket: Duplicate) -> std::io::Result<Self> {
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
        // A value that comes from a large sysctl can be read but not set (net/ipv4/tcp.c, do_tcp_setsockopt). cwkill could
        // not restore it.
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
        let (probes, idle) = probes_and_idle(&socket)?;
        // The time for which it has been idle already: the probe is due, and if these values stay, the next is far away.
        let seconds = i32::try_from(idle.max(KEEP_IDLE).as_secs()).unwrap_or(i32::MAX);
        let keepalive = Keepalive {
            socket,
            former,
            probes,
            idle,
        };
        let set = |(level, name), value| {
            sys::set_socket_option(keepalive.socket.as_fd(), level, name, value)
        };
        // The kernel must not close the socket if the peer is silent: neither because of the count of probes nor, when the
        // timer expires again, because of TCP_USER_TIMEOUT.
        set(Self::COUNT, MAX_KEEP_COUNT)?;
        set(Self::INTERVAL, MAX_KEEP_INTERVAL)?;
        // SO_KEEPALIVE first and TCP_KEEPIDLE last: only setting TCP_KEEPIDLE makes the kernel count the time for which the
        // socket has already been idle.
        set(Self::ON, 1)?;
        set(Self::IDLE, seconds.min(MAX_KEEP_INTERVAL))?;
        Ok(keepalive)
    }

    /// Whether the kernel has sent the probe. An answer resets the count of probes, so `false` says nothing after an answer.
    pub(super) fn is_sent(&self) -> bool {
        probes_and_idle(&self.socket).is_ok_and(|(probes, _)| probes > self.probes)
    }

    /// Whether the probe is sent, or need not be: a segment of the peer has arrived since, or the socket is closed.
    pub(super) fn is_over(&self) -> bool {
        let now = probes_and_idle(&self.socket);
        now.map_or(true, |(probes, idle)| {
            probes > self.probes || idle < self.idle
        })
    }

    pub(super) fn socket(&self) -> &Duplicate {
        &self.socket
    }
}

impl Drop for Keepalive {
    fn drop(&mut self) {
        for (level, name, value) in self.former {
            // This cannot fail: a closed socket accepts the options as well, they could be set before, and `start` has
            // checked the limits.
            let _ = sys::set_socket_option(self.socket.as_fd(), level, name, value);
        }
    }
}

/// The number of duplicates that one worker may keep open. Raises the soft limit of open descriptors as far as needed.
pub(super) fn batch_size() -> usize {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else {
        return 1;
    };
    let max_batch = u64::try_from(MAX_BATCH).unwrap_or(u64::MAX);
    let needed = (max_batch * WORKERS + DESCRIPTORS_KEPT_FREE)
        .min(hard)
        .max(soft);
    let limit = match setrlimit(Resource::RLIMIT_NOFILE, needed, hard) {
        Ok(()) => needed,
        Err(_) => soft,
    };
    let share = limit.saturating_sub(DESCRIPTORS_KEPT_FREE) / WORKERS;
    usize::try_from(share)
        .unwrap_or(MAX_BATCH)
        .clamp(1, MAX_BATCH)
}
