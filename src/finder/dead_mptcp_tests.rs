//! The verdicts on sockets of MPTCP. They rest on what the kernel tells of them.

use std::mem::MaybeUninit;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::thread;

use socket2::{Domain, Socket as Socket2, Type};

use super::*;

fn socket(address: SocketAddr) -> Socket2 {
    let protocol = Some(socket2::Protocol::MPTCP);
    Socket2::new(Domain::for_address(address), Type::STREAM, protocol).unwrap()
}

fn connected(to: SocketAddr) -> Socket2 {
    let socket = socket(to);
    socket.connect(&to.into()).unwrap();
    socket
}

/// The verdict on a socket of this process, once the kernel has processed what the peer has sent.
fn verdict(socket: &Socket2, is_expected: impl Fn(Option<SuspectVerdict>) -> bool) {
    let pidfd = sys::pidfd_open(std::process::id().cast_signed()).unwrap();
    let inode = u32::try_from(fstat(socket).unwrap().st_ino).unwrap();
    let fd = RemoteFd(socket.as_raw_fd());
    for _ in 0..5000 {
        if is_expected(examine(pidfd.as_fd(), fd, inode)) {
            return;
        }
        thread::sleep(Duration::from_millis(1));
    }
    panic!("{:?}", examine(pidfd.as_fd(), fd, inode));
}

fn is_dead(socket: &Socket2, unread: u32) {
    let cookie = sockopt::socket_cookie(socket).unwrap();
    verdict(socket, |verdict| {
        matches!(verdict, Some(SuspectVerdict::Dead(dead))
            if dead.protocol == Protocol::Mptcp
                && dead.cookie.0 == cookie
                && dead.unread == unread
                && dead.quiet < Duration::from_secs(60))
    });
}

/// connect(2) with AF_UNSPEC ends the connection, and the program can connect the socket again.
fn dissolve(socket: &Socket2) {
    rustix::net::connect_unspec(socket).unwrap();
}

fn was_never_connected(socket: &Socket2) {
    verdict(socket, |verdict| {
        verdict == Some(SuspectVerdict::NeverConnected)
    });
}

#[test]
fn only_an_mptcp_connection_that_is_over_is_dead() {
    for address in ["127.0.0.1:0", "[::1]:0"] {
        let any_port: SocketAddr = address.parse().unwrap();
        let listener = socket(any_port);
        listener.bind(&any_port.into()).unwrap();
        listener.listen(16).unwrap();
        let local = listener.local_addr().unwrap().as_socket().unwrap();
        let accepted = || {
            let peer = connected(local);
            (listener.accept().unwrap().0, peer)
        };

        let (open, _peer) = accepted();
        verdict(&open, |verdict| verdict.is_none());
        verdict(&listener, |verdict| verdict.is_none());
        let (half_closed, peer) = accepted();
        drop(peer);
        verdict(&half_closed, |verdict| verdict.is_none());
        half_closed.shutdown(Shutdown::Both).unwrap();
        is_dead(&half_closed, 0);
        let (unread, peer) = accepted();
        peer.send(b"hello").unwrap();
        drop(peer);
        verdict(&unread, |_| {
            unread.peek(&mut [MaybeUninit::uninit(); 9]).unwrap() == 5
        });
        unread.shutdown(Shutdown::Both).unwrap();
        is_dead(&unread, 5);
        // MP_FASTCLOSE: the kernel forgets the token at once.
        let (reset, peer) = accepted();
        peer.set_linger(Some(Duration::ZERO)).unwrap();
        drop(peer);
        is_dead(&reset, 0);

        was_never_connected(&socket(local));
        let (dissolved, _peer) = accepted();
        dissolve(&dissolved);
        was_never_connected(&dissolved);
        let refused = socket(local);
        refused
            .connect(&SocketAddr::new(local.ip(), 1).into())
            .unwrap_err();
        was_never_connected(&refused);

        // A server that only knows TCP.
        let server = TcpListener::bind(any_port).unwrap();
        let fallback = || {
            let socket = connected(server.local_addr().unwrap());
            (socket, server.accept().unwrap().0)
        };
        let (open, _server) = fallback();
        verdict(&open, |verdict| verdict.is_none());
        let (finished, peer) = fallback();
        drop(peer);
        verdict(&finished, |_| {
            finished.peek(&mut [MaybeUninit::uninit(); 9]).unwrap() == 0
        });
        finished.shutdown(Shutdown::Both).unwrap();
        is_dead(&finished, 0);
        let (reset, peer) = fallback();
        SockRef::from(&peer)
            .set_linger(Some(Duration::ZERO))
            .unwrap();
        drop(peer);
        is_dead(&reset, 0);

        // A client that only knows TCP.
        let peer = TcpStream::connect(local).unwrap();
        let tcp = listener.accept().unwrap().0;
        SockRef::from(&peer)
            .set_linger(Some(Duration::ZERO))
            .unwrap();
        drop(peer);
        verdict(
            &tcp,
            |verdict| matches!(verdict, Some(SuspectVerdict::Dead(dead)) if dead.protocol == Protocol::Tcp),
        );
    }
}
