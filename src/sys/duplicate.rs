//! A duplicate of another process's descriptor, which can be dropped at any time without a wait.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::mpsc;
use std::thread::Builder;
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};
use rustix::net::sockopt;

/// A descriptor of cwkill for a file of another process.
///
/// If that process closes its descriptor meanwhile, the drop of the duplicate closes the file. For a socket with SO_LINGER
/// close(2) would then wait for the peer, for as long as the process has asked for. cwkill must not wait for that, and must not
/// change the option. The kernel does not wait in a thread that exits (net/ipv4/af_inet.c, inet_release: PF_EXITING), and for the
/// peer nothing is different: the FIN is sent before the wait.
#[derive(Debug)]
pub struct Duplicate(Option<OwnedFd>);

impl From<OwnedFd> for Duplicate {
    fn from(file: OwnedFd) -> Self {
        Duplicate(Some(file))
    }
}

impl AsFd for Duplicate {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_ref().expect("only a drop takes it").as_fd()
    }
}

impl AsRawFd for Duplicate {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

impl Drop for Duplicate {
    fn drop(&mut self) {
        let Some(file) = self.0.take() else {
            return;
        };
        let linger = sockopt::socket_linger(&file).unwrap_or(None);
        // Without a time, close(2) aborts the connection and returns at once.
        if linger.is_some_and(|linger| linger > Duration::ZERO) {
            close_without_waiting(file);
        }
    }
}

/// Closes `file`. If this is its last descriptor, an exiting thread closes it.
fn close_without_waiting(file: OwnedFd) {
    let (copied, has_copied) = mpsc::channel();
    let (give, given) = mpsc::channel::<OwnedFd>();
    let closer = Builder::new().spawn(move || {
        // In its own descriptor table, a copy of that of cwkill, the thread has a second descriptor of the file. The exit of the
        // thread closes that table.
        let has_table = unshare(CloneFlags::CLONE_FILES).is_ok();
        let _ = copied.send(has_table);
        // A seccomp filter forbids the table: close(2) may wait, in this thread, until cwkill ends.
        drop(given.recv());
    });
    match closer {
        Ok(_) => match has_copied.recv() {
            // It cannot be the last descriptor.
            Ok(true) => drop(file),
            Ok(false) | Err(_) => drop(give.send(file)),
        },
        // No thread can be started. The exit of cwkill closes the file.
        Err(_) => std::mem::forget(file),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::{TcpListener, TcpStream};
    use std::time::Instant;

    use socket2::{SockFilter, SockRef};

    use super::*;

    /// The owner's end of a connection, with this SO_LINGER, and the peer's end, which drops every segment.
    fn lingering(linger: Duration) -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (owner, _) = listener.accept().unwrap();
        SockRef::from(&owner).set_linger(Some(linger)).unwrap();
        // BPF_RET | BPF_K: accept 0 bytes of each segment.
        let drop_all = [SockFilter::new(0x06, 0, 0, 0)];
        SockRef::from(&peer).attach_filter(&drop_all).unwrap();
        (owner, peer)
    }

    /// Otherwise nothing here would be needed.
    #[test]
    fn the_kernel_waits_in_close() {
        let (owner, _peer) = lingering(Duration::from_secs(2));
        let began = Instant::now();
        drop(owner);
        assert!(began.elapsed() >= Duration::from_secs(1));
    }

    #[test]
    fn the_last_descriptor_is_dropped_without_a_wait() {
        const LINGER: Duration = Duration::from_secs(60);
        let (owner, mut peer) = lingering(LINGER);
        let duplicate = Duplicate::from(OwnedFd::from(owner.try_clone().unwrap()));
        let began = Instant::now();
        drop(owner);
        drop(duplicate);
        // The peer gets the FIN as if the owner itself had closed the socket.
        SockRef::from(&peer).detach_filter().unwrap();
        assert_eq!(peer.read(&mut [0]).unwrap(), 0);
        assert!(began.elapsed() < LINGER / 2, "{:?}", began.elapsed());
    }
}
