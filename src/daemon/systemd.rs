//! What the daemon tells the service manager: sd_notify(3), the protocol of systemd's `Type=notify-reload`.

use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

use crate::text::escape;

/// How long a message that the manager must get waits for room in its queue.
const PATIENCE: Duration = Duration::from_secs(10);

/// The service manager, if one has started the daemon.
#[derive(Debug, Default)]
pub struct ServiceManager {
    to: Option<(UnixDatagram, SocketAddr)>,
    /// Half of the time after which it takes the daemon for hung.
    watchdog: Option<Duration>,
}

impl ServiceManager {
    /// The one that the environment names.
    ///
    /// # Errors
    /// It names a socket that cannot be used. The daemon runs all the same, but the manager would wait for it in vain.
    pub fn of_environment() -> io::Result<Self> {
        let variable = |name| std::env::var(name).ok();
        let watchdog = watchdog(
            variable("WATCHDOG_USEC").as_deref(),
            variable("WATCHDOG_PID").as_deref(),
        );
        let to = match variable("NOTIFY_SOCKET").filter(|name| !name.is_empty()) {
            None => None,
            Some(name) => {
                let socket = UnixDatagram::unbound()?;
                // A manager that does not read must not stop the sweeps.
                socket.set_nonblocking(true)?;
                socket.set_write_timeout(Some(PATIENCE))?;
                Some((socket, address(&name)?))
            }
        };
        Ok(ServiceManager { to, watchdog })
    }

    /// How often to call [`ServiceManager::alive`]; `None`: never.
    pub fn watchdog(&self) -> Option<Duration> {
        self.watchdog
    }

    /// The first sweep has ended.
    pub fn ready(&self, status: &str) {
        self.tell_surely(&format!("READY=1\n{}", status_line(status)));
    }

    pub fn status(&self, status: &str) {
        self.tell(&status_line(status));
    }

    /// The sweep loop goes on.
    pub fn alive(&self) {
        if self.watchdog.is_some() {
            self.tell("WATCHDOG=1");
        }
    }

    /// A reload begins. [`ServiceManager::ready`] ends it.
    pub fn reloading(&self) {
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from);
        self.tell_surely(&format!("RELOADING=1\nMONOTONIC_USEC={}", now.as_micros()));
    }

    pub fn stopping(&self) {
        self.tell("STOPPING=1\nSTATUS=stopping");
    }

    /// Waits for room in the queue of the manager: without this message it would take the start or the reload for hung.
    fn tell_surely(&self, message: &str) {
        if let Some((socket, _)) = &self.to {
            let _ = socket.set_nonblocking(false);
            self.tell(message);
            let _ = socket.set_nonblocking(true);
        }
    }

    /// If the message does not arrive, there is nobody else to tell.
    fn tell(&self, message: &str) {
        if let Some((socket, address)) = &self.to {
            let _ = socket.send_to_addr(message.as_bytes(), address);
        }
    }
}

/// A line break would begin another assignment.
fn status_line(status: &str) -> String {
    format!("STATUS={}", escape(status))
}

/// An absolute path, or an abstract name after `@`.
fn address(name: &str) -> io::Result<SocketAddr> {
    match name.strip_prefix('@') {
        Some(name) => SocketAddr::from_abstract_name(name),
        None if name.starts_with('/') => SocketAddr::from_pathname(name),
        None => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!(
                "NOTIFY_SOCKET={} is neither a path nor an abstract name",
                escape(name)
            ),
        )),
    }
}

/// Half of the limit, as sd_watchdog_enabled(3) recommends. The variables may be meant for the process that has started this one.
fn watchdog(limit: Option<&str>, pid: Option<&str>) -> Option<Duration> {
    let is_own = |pid: &str| pid.parse() == Ok(std::process::id());
    if pid.is_some_and(|pid| !is_own(pid)) {
        return None;
    }
    let limit: u64 = limit?.parse().ok()?;
    (limit > 0).then(|| Duration::from_micros(limit) / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_of_the_watchdog_of_this_process() {
        let own = std::process::id().to_string();
        let second = Some(Duration::from_secs(1));
        assert_eq!(watchdog(Some("2000000"), None), second);
        assert_eq!(watchdog(Some("2000000"), Some(&own)), second);
        assert_eq!(watchdog(Some("2000000"), Some("1")), None);
        for limit in [None, Some(""), Some("0"), Some("x")] {
            assert_eq!(watchdog(limit, None), None);
        }
    }

    #[test]
    fn a_full_queue_takes_no_message_that_matters() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("notify");
        let manager_end = UnixDatagram::bind(&path).unwrap();
        let socket = UnixDatagram::unbound().unwrap();
        socket.set_nonblocking(true).unwrap();
        let manager = ServiceManager {
            to: Some((socket, address(path.to_str().unwrap()).unwrap())),
            watchdog: Some(Duration::from_secs(1)),
        };
        let filler = UnixDatagram::unbound().unwrap();
        filler.set_nonblocking(true).unwrap();
        while filler.send_to(b"full", &path).is_ok() {}
        // Neither waits.
        manager.alive();
        manager.status("lost");
        let ready = std::thread::spawn(move || manager.ready("ready"));
        let mut buffer = [0; 256];
        let mut last = Vec::new();
        while !last.starts_with(b"READY") {
            let length = manager_end.recv(&mut buffer).unwrap();
            last = buffer[..length].to_vec();
            assert!(last == b"full" || last == b"READY=1\nSTATUS=ready");
        }
        ready.join().unwrap();
    }

    #[test]
    fn messages_are_assignments_on_lines() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("notify");
        let manager_end = UnixDatagram::bind(&path).unwrap();
        let manager = ServiceManager {
            to: Some((
                UnixDatagram::unbound().unwrap(),
                address(path.to_str().unwrap()).unwrap(),
            )),
            watchdog: None,
        };
        let received = || {
            let mut buffer = [0; 256];
            let length = manager_end.recv(&mut buffer).unwrap();
            String::from_utf8(buffer[..length].to_vec()).unwrap()
        };
        manager.ready("a\nMAINPID=1");
        assert_eq!(received(), "READY=1\nSTATUS=a\\nMAINPID=1");
        manager.reloading();
        assert!(received().starts_with("RELOADING=1\nMONOTONIC_USEC="));
        // Nobody has asked for it.
        manager.alive();
        manager.stopping();
        assert_eq!(received(), "STOPPING=1\nSTATUS=stopping");
        assert!(address("relative").is_err());
        assert!(address("@abstract").is_ok());
    }
}
