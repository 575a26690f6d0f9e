//! The address on which the daemon listens, and its socket.

use std::fs;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use rustix::net::sockopt::{socket_acceptconn, socket_domain, socket_type};
use rustix::net::{AddressFamily, SocketType};
use socket2::{Domain, Socket, Type};

use super::config::Listen;
use crate::sys::errno_of;

/// Why the daemon cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error("cannot listen on {0}: another program listens there (`ss -ltnp`)")]
    InUse(String),
    #[error("cannot listen on {0}: it exists and is not a socket")]
    NotASocket(String),
    #[error("cannot listen on {address}")]
    Io { address: String, source: io::Error },
    #[error(
        "the configuration wants the socket of the service manager (listen = \"systemd\"), and it has passed none: start cwkill by a .socket unit"
    )]
    NothingPassed,
    #[error(
        "the service manager has passed {0} descriptors; cwkill takes one socket (ListenStream= of its .socket unit)"
    )]
    PassedSeveral(usize),
    #[error(
        "the descriptor that the service manager has passed is not a listening stream socket (ListenStream= of its .socket unit)"
    )]
    PassedOther,
}

/// A socket that listens. Its file is removed with it, unless the service manager owns it.
#[derive(Debug)]
pub struct Listener {
    socket: OwnedFd,
    /// Where it listens, for people.
    name: String,
    file: Option<SocketFile>,
}

/// The file of a Unix socket, by its device and inode: another program may have put its own there since.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    id: (u64, u64),
}

impl Listener {
    /// Connections that wait until one ends: more than a monitoring system makes at once.
    const BACKLOG: i32 = 1024;

    /// Opens the socket that the configuration names, or takes the one that the service manager has `passed`. `None`: there is to be none.
    ///
    /// # Errors
    /// The address is in use, or not one of this host; or the service manager has passed something else.
    pub fn open(listen: &Listen, passed: Vec<OwnedFd>) -> Result<Option<Self>, ListenError> {
        match listen {
            // Whoever writes a .socket unit wants it to be used.
            _ if !passed.is_empty() => Listener::passed(passed).map(Some),
            Listen::Systemd => Err(ListenError::NothingPassed),
            Listen::None => Ok(None),
            Listen::Address(address) => Listener::bind_tcp(*address).map(Some),
            Listen::Unix(path) => bind_unix(path, format!("unix:{}", path.display())).map(Some),
        }
    }

    fn bind_tcp(address: SocketAddr) -> Result<Self, ListenError> {
        let name = address.to_string();
        match tcp_socket(address) {
            Ok(socket) => Ok(Listener {
                socket,
                name,
                file: None,
            }),
            Err(error) if errno_of(&error) == Errno::EADDRINUSE => Err(ListenError::InUse(name)),
            Err(source) => Err(ListenError::Io {
                address: name,
                source,
            }),
        }
    }

    /// The socket that the service manager has passed, if it is one that listens.
    fn passed(descriptors: Vec<OwnedFd>) -> Result<Self, ListenError> {
        let count = descriptors.len();
        let Ok([socket]) = <[OwnedFd; 1]>::try_from(descriptors) else {
            return Err(ListenError::PassedSeveral(count));
        };
        let is_stream = socket_type(&socket) == Ok(SocketType::STREAM)
            && socket_acceptconn(&socket) == Ok(true)
            && matches!(
                socket_domain(&socket),
                Ok(AddressFamily::INET | AddressFamily::INET6 | AddressFamily::UNIX)
            );
        if !is_stream {
            return Err(ListenError::PassedOther);
        }
        let _ = rustix::io::ioctl_fionbio(&socket, true);
        Ok(Listener {
            name: format!("{} (passed by the service manager)", local_name(&socket)),
            socket,
            file: None,
        })
    }

    /// Where it listens, with the port that the kernel has chosen for port 0.
    pub fn name(&self) -> String {
        match self.file {
            None if self.name.ends_with(":0") => local_name(&self.socket),
            _ => self.name.clone(),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if file_id(&self.path).is_ok_and(|id| id == self.id) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn file_id(path: &Path) -> io::Result<(u64, u64)> {
    let metadata = fs::symlink_metadata(path)?;
    Ok((metadata.dev(), metadata.ino()))
}

fn tcp_socket(address: SocketAddr) -> io::Result<OwnedFd> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    // Connections of a daemon before may still be in TIME-WAIT. Linux does not let two listeners share the address by this.
    socket.set_reuse_address(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.bind(&address.into())?;
    socket.listen(Listener::BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(TcpListener::from(socket).into())
}

fn bind_unix(path: &Path, name: String) -> Result<Listener, ListenError> {
    let failed = |source| ListenError::Io {
        address: name.clone(),
        source,
    };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(failed(error)),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            return Err(ListenError::NotASocket(name));
        }
        // A daemon that was killed has left its file.
        Ok(_) => match UnixStream::connect(path) {
            Ok(_) => return Err(ListenError::InUse(name)),
            Err(error) if errno_of(&error) == Errno::ECONNREFUSED => {
                fs::remove_file(path).map_err(failed)?;
            }
            Err(error) => return Err(failed(error)),
        },
    }
    let socket = UnixListener::bind(path).map_err(failed)?;
    socket.set_nonblocking(true).map_err(failed)?;
    let file = SocketFile {
        id: file_id(path).map_err(failed)?,
        path: path.to_owned(),
    };
    Ok(Listener {
        socket: socket.into(),
        name,
        file: Some(file),
    })
}

/// The address of a socket, for people.
fn local_name(socket: &OwnedFd) -> String {
    let Ok(address) = rustix::net::getsockname(socket) else {
        return "an unknown address".to_owned();
    };
    if let Ok(address) = SocketAddr::try_from(address.clone()) {
        return address.to_string();
    }
    match rustix::net::SocketAddrUnix::try_from(address) {
        Ok(address) => match address.path_bytes() {
            Some(path) => format!("unix:{}", String::from_utf8_lossy(path)),
            None => "unix:(without a path)".to_owned(),
        },
        Err(_) => "an unknown address".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(listen: &Listen) -> Result<Listener, ListenError> {
        Listener::open(listen, Vec::new()).map(|listener| listener.expect("a socket"))
    }

    fn tcp(address: &str) -> Listen {
        Listen::Address(address.parse().unwrap())
    }

    #[test]
    fn an_address_in_use_is_an_error() {
        let first = open(&tcp("127.0.0.1:0")).unwrap();
        assert!(!first.name().ends_with(":0"), "{}", first.name());
        let same = tcp(&first.name());
        let error = open(&same).unwrap_err();
        assert!(
            matches!(&error, ListenError::InUse(name) if *name == first.name()),
            "{error}"
        );
        drop(first);
        open(&same).unwrap();
    }

    #[test]
    fn a_unix_socket_is_taken_over_only_from_a_dead_daemon() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("socket");
        let address = Listen::Unix(path.clone());
        let first = open(&address).unwrap();
        assert!(matches!(open(&address), Err(ListenError::InUse(_))));
        drop(first);
        assert!(!path.exists());
        // As one that was killed leaves it.
        drop(UnixListener::bind(&path).unwrap());
        let second = open(&address).unwrap();
        // Another program has its own file there by now.
        fs::remove_file(&path).unwrap();
        fs::write(&path, "").unwrap();
        drop(second);
        assert!(path.exists());
        assert!(matches!(open(&address), Err(ListenError::NotASocket(_))));
    }

    #[test]
    fn without_a_socket_nothing_is_served() {
        assert!(Listener::open(&Listen::None, Vec::new()).unwrap().is_none());
        let error = Listener::open(&Listen::Systemd, Vec::new()).unwrap_err();
        assert!(matches!(error, ListenError::NothingPassed));
    }

    #[test]
    fn only_a_listening_stream_socket_is_taken_from_the_service_manager() {
        let listener = || OwnedFd::from(TcpListener::bind("127.0.0.1:0").unwrap());
        let passed = Listener::passed(vec![listener()]).unwrap();
        assert!(passed.name().starts_with("127.0.0.1:"), "{}", passed.name());
        let error = Listener::passed(vec![listener(), listener()]).unwrap_err();
        assert!(matches!(error, ListenError::PassedSeveral(2)));
        let udp = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let file = fs::File::open("/dev/null").unwrap();
        for other in [OwnedFd::from(udp), file.into()] {
            assert!(matches!(
                Listener::passed(vec![other]),
                Err(ListenError::PassedOther)
            ));
        }
    }
}
