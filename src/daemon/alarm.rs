//! Waiting for the next sweep, or for a signal.
//!
//! The time until the next sweep goes on while the host is suspended (CLOCK_BOOTTIME), so that a host that wakes up after an hour sweeps at
//! once. A clock that is set does not matter to it.

use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::control::Control;
use crate::model::Method;
use crate::proc::since_boot;

/// Why a wait has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// It is time.
    Due,
    /// The watchdog wants to hear from the daemon.
    Watchdog,
    /// SIGHUP.
    Reload,
    /// SIGTERM or SIGINT.
    Stop,
}

/// The signals of the daemon, and its clock.
#[derive(Debug)]
pub struct Alarm {
    stop: Arc<AtomicBool>,
    reload: Arc<AtomicBool>,
    /// Readable after a signal.
    signals: UnixStream,
    timer: TimerFd,
}

impl Alarm {
    /// Takes over SIGTERM, SIGINT and SIGHUP. From now on they end no sweep.
    ///
    /// # Errors
    /// No descriptor is free.
    pub fn new() -> io::Result<Self> {
        let (signals, write_end) = UnixStream::pair()?;
        signals.set_nonblocking(true)?;
        let (stop, reload) = (Arc::default(), Arc::default());
        for (signal, flag) in [
            (libc::SIGTERM, &stop),
            (libc::SIGINT, &stop),
            (libc::SIGHUP, &reload),
        ] {
            // The flag comes first: who wakes up by the pipe must find it set.
            signal_hook::flag::register(signal, Arc::clone(flag))?;
            signal_hook::low_level::pipe::register(signal, write_end.try_clone()?)?;
        }
        let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
        Ok(Alarm {
            stop,
            reload,
            signals,
            timer: TimerFd::new(ClockId::CLOCK_BOOTTIME, flags)?,
        })
    }

    /// Waits until `due`, a time since boot. `watchdog`: for this long at most.
    ///
    /// # Errors
    /// The kernel refuses to wait.
    pub fn wait(&self, due: Duration, watchdog: Option<Duration>) -> io::Result<Wake> {
        // A timer with the value 0 never expires.
        let at = TimeSpec::from_duration(due.max(Duration::from_nanos(1)));
        let flags = TimerSetTimeFlags::TFD_TIMER_ABSTIME;
        self.timer.set(Expiration::OneShot(at), flags)?;
        let patience = watchdog.and_then(|time| Timespec::try_from(time).ok());
        loop {
            if self.stop.load(Ordering::Relaxed) {
                return Ok(Wake::Stop);
            }
            if self.reload.swap(false, Ordering::Relaxed) {
                return Ok(Wake::Reload);
            }
            if since_boot() >= due {
                return Ok(Wake::Due);
            }
            let readable = [self.signals.as_fd(), self.timer.as_fd()];
            let mut fds = readable.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
            match poll(&mut fds, patience.as_ref()) {
                Ok(0) => return Ok(Wake::Watchdog),
                Ok(_) => self.drain(),
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Reads what the signals have written.
    fn drain(&self) {
        let mut bytes = [0; 64];
        while (&self.signals).read(&mut bytes).is_ok_and(|read| read > 0) {}
    }
}

impl Control for Alarm {
    fn now(&self) -> Instant {
        Instant::now()
    }

    fn sleep(&self, duration: Duration) {
        std::thread::sleep(duration);
    }

    fn interrupted(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    fn progress(&self, _method: Method, _sockets: usize) {}
}
