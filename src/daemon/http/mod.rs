//! The server for scrapes: one thread with a bounded number of connections, none of which blocks another.
//!
//! `message` reads requests and makes answers, `published` has what they say, `connection` is one connection. Nothing can be changed over
//! HTTP, so there is no request that does more than read the last sweep.

mod connection;
mod message;
mod published;

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};

use super::listener::Listener;
use crate::proc::since_boot;
use connection::Connection;
use message::{Answer, Request};

pub use published::Published;

/// Connections at the same time. Others wait in the backlog of the listener.
const MAX_CONNECTIONS: usize = 64;
/// If all are taken, and each client still reads its answer, the oldest gives way to a new one once it is this old: a client that reads gets
/// the whole answer in less. One that has sent no request gives way at once.
const FULL_TURN: Duration = Duration::from_secs(1);
/// How long to accept nothing after accept(2) has failed for want of memory or descriptors.
const PAUSE: Duration = Duration::from_millis(200);

/// What a request is answered with.
type Answering<'a> = dyn Fn(&Request) -> Answer + 'a;

/// A thread that serves. It ends when this is dropped.
#[derive(Debug)]
pub struct Server {
    thread: Option<JoinHandle<()>>,
    stop: UnixStream,
    name: String,
}

impl Server {
    /// # Errors
    /// No thread can be started.
    pub fn start(listener: Listener, published: Arc<Published>) -> io::Result<Self> {
        let (stop, stopped) = UnixStream::pair()?;
        let name = listener.name();
        let thread = Builder::new()
            .name("cwkill-http".to_owned())
            .spawn(move || serve(&listener, &stopped, &published))?;
        Ok(Server {
            thread: Some(thread),
            stop,
            name,
        })
    }

    /// Whether the thread has ended although nobody has told it to: it has panicked.
    pub fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Where it listens, for people.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // If this fails, the thread has ended.
        let _ = self.stop.write_all(&[0]);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(listener: &Listener, stopped: &UnixStream, published: &Published) {
    let mut connections: Vec<Connection> = Vec::new();
    let mut accepts_from = Instant::now();
    loop {
        let now = Instant::now();
        connections.retain(|connection| connection.deadline() > now);
        let oldest = connections.iter().map(|it| it.began).min();
        let has_room = connections.len() < MAX_CONNECTIONS;
        let may_accept = match oldest {
            Some(oldest) if !has_room && !connections.iter().any(Connection::may_give_way) => {
                (oldest + FULL_TURN).max(accepts_from)
            }
            _ => accepts_from,
        };
        let mut fds = vec![PollFd::from_borrowed_fd(stopped.as_fd(), PollFlags::IN)];
        let waits = connections
            .iter()
            .map(|it| PollFd::from_borrowed_fd(it.as_fd(), it.interest()));
        fds.extend(waits);
        if may_accept <= now {
            fds.push(PollFd::from_borrowed_fd(listener.as_fd(), PollFlags::IN));
        }
        let deadlines = connections.iter().map(Connection::deadline);
        let next = deadlines
            .chain((may_accept > now).then_some(may_accept))
            .min();
        let patience = next.map(|next| timespec(next.saturating_duration_since(now)));
        match poll(&mut fds, patience.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            // For want of memory.
            Err(_) => std::thread::sleep(PAUSE),
        }
        let ready: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(fds);
        if ready[0] && has_ended(stopped) {
            return;
        }
        let now = Instant::now();
        let answer = |request: &_| published.answer(request, since_boot());
        let mut of_connection = ready[1..].iter();
        connections.retain_mut(|connection| match of_connection.next() {
            Some(true) => connection.proceed(now, &answer).is_ok(),
            _ => true,
        });
        // Only the listener is left.
        if of_connection.next() == Some(&true) {
            accepts_from = accept_all(listener, &mut connections, now, &answer);
        }
    }
}

/// Accepts while there is room. Returns from when on to accept again.
fn accept_all(
    listener: &Listener,
    connections: &mut Vec<Connection>,
    now: Instant,
    answer: &Answering<'_>,
) -> Instant {
    loop {
        if !has_room(connections, now, answer) {
            return now;
        }
        match accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(socket) => {
                // Most clients have sent their request by now. Then no other client can take their place before the answer.
                let mut connection = Connection::new(socket, now);
                if connection.proceed(now, answer).is_ok() {
                    connections.push(connection);
                }
            }
            Err(Errno::AGAIN) => return now,
            // The client has given up (accept(2)).
            Err(Errno::INTR | Errno::CONNABORTED | Errno::PROTO) => {}
            Err(_) => return now + PAUSE,
        }
    }
}

/// Whether there is room for one more connection. If there is none, the oldest that may give way does.
fn has_room(connections: &mut Vec<Connection>, now: Instant, answer: &Answering<'_>) -> bool {
    if connections.len() < MAX_CONNECTIONS {
        return true;
    }
    // What has arrived meanwhile counts.
    connections.retain_mut(|connection| {
        !connection.may_give_way() || connection.proceed(now, answer).is_ok()
    });
    if connections.len() < MAX_CONNECTIONS {
        return true;
    }
    let may_go =
        |at: &usize| connections[*at].may_give_way() || connections[*at].began + FULL_TURN <= now;
    let oldest = (0..connections.len()).filter(may_go).min_by_key(|&at| {
        let connection = &connections[at];
        (!connection.may_give_way(), connection.began)
    });
    let Some(oldest) = oldest else { return false };
    connections.swap_remove(oldest);
    true
}

/// Rounded up, so that a deadline has passed when poll(2) returns.
fn timespec(time: Duration) -> Timespec {
    Timespec::try_from(time + Duration::from_millis(1)).unwrap_or(Timespec {
        tv_sec: 1,
        tv_nsec: 0,
    })
}

fn has_ended(mut stopped: &UnixStream) -> bool {
    stopped.read(&mut [0]).is_ok()
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::net::{Shutdown, TcpStream};

    use super::*;
    use crate::daemon::config::Listen;

    fn listener(address: &str) -> Listener {
        let listen = Listen::Address(address.parse().unwrap());
        Listener::open(&listen, Vec::new()).unwrap().unwrap()
    }

    /// A server with `size` bytes of metrics, and its address.
    fn server(size: usize) -> (Server, String) {
        let listener = listener("127.0.0.1:0");
        let published = Arc::new(Published::default());
        let text = "x".repeat(size);
        let minute = Duration::from_secs(60);
        published.set(Some(text), Some(since_boot()), minute, Duration::ZERO);
        let server = Server::start(listener, published).unwrap();
        let address = server.name().to_owned();
        (server, address)
    }

    fn get(address: &str, request: &[u8]) -> (String, usize) {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(request).unwrap();
        let mut reader = BufReader::new(stream);
        let (mut status, mut line) = (String::new(), String::new());
        reader.read_line(&mut status).unwrap();
        while line != "\r\n" {
            line.clear();
            reader.read_line(&mut line).unwrap();
        }
        let mut body = Vec::new();
        reader.read_to_end(&mut body).unwrap();
        (status.trim_end().to_owned(), body.len())
    }

    const SCRAPE: &[u8] = b"GET /metrics HTTP/1.1\r\nHost: h\r\n\r\n";

    #[test]
    fn a_client_that_never_reads_blocks_nobody() {
        // More than the buffers of both ends take.
        let size = 32 << 20;
        let (server, address) = server(size);
        let mut silent = Vec::new();
        for number in 0..MAX_CONNECTIONS + 10 {
            let mut stream = TcpStream::connect(&address).unwrap();
            // Some do not even ask.
            if number % 2 == 0 {
                stream.write_all(SCRAPE).unwrap();
            }
            silent.push(stream);
        }
        assert_eq!(get(&address, SCRAPE), ("HTTP/1.1 200 OK".to_owned(), size));
        drop(server);
    }

    /// A connection without a request at `began`, and the end of its client.
    fn connection(began: Instant) -> (Connection, UnixStream) {
        let (socket, client) = UnixStream::pair().unwrap();
        socket.set_nonblocking(true).unwrap();
        (Connection::new(socket.into(), began), client)
    }

    /// `MAX_CONNECTIONS` of them, the oldest last.
    fn full(now: Instant) -> (Vec<Connection>, Vec<UnixStream>) {
        let age = |number: usize| Duration::from_millis(number as u64);
        (0..MAX_CONNECTIONS)
            .map(|number| connection(now - age(number)))
            .unzip()
    }

    #[test]
    fn a_client_without_a_request_gives_way_at_once() {
        let answer = |_: &Request| Answer::line(message::Status::Ok, "ok", false);
        let now = Instant::now();
        let (mut connections, mut clients) = full(now);
        // The oldest has sent its request after the last look: it is answered. Its answer is in its socket then.
        let mut oldest = clients.pop().unwrap();
        oldest.write_all(SCRAPE).unwrap();
        assert!(has_room(&mut connections, now, &answer));
        let mut text = String::new();
        oldest.read_to_string(&mut text).unwrap();
        assert!(text.starts_with("HTTP/1.1 200 OK"), "{text}");
        let (another, _its_client) = connection(now);
        connections.push(another);
        assert_eq!(connections.len(), MAX_CONNECTIONS);
        assert!(has_room(&mut connections, now, &answer));
        let oldest = clients.pop().unwrap();
        oldest.set_nonblocking(true).unwrap();
        assert_eq!((&oldest).read(&mut [0]).unwrap(), 0, "it is closed");
        let younger = clients.pop().unwrap();
        younger.set_nonblocking(true).unwrap();
        let error = (&younger).read(&mut [0]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "it is open");
    }

    #[test]
    fn a_client_that_gets_its_answer_has_a_turn() {
        // More than a socket takes.
        let body: Arc<[u8]> = vec![b'x'; 32 << 20].into();
        let answer =
            |_: &Request| Answer::new(message::Status::Ok, "text/plain", Arc::clone(&body), false);
        let began = Instant::now();
        let mut clients = Vec::new();
        let mut connections = Vec::new();
        for _ in 0..MAX_CONNECTIONS {
            let (mut connection, mut client) = connection(began);
            client.write_all(SCRAPE).unwrap();
            connection.proceed(began, &answer).unwrap();
            connections.push(connection);
            clients.push(client);
        }
        assert!(!has_room(&mut connections, began, &answer));
        assert_eq!(connections.len(), MAX_CONNECTIONS);
        assert!(has_room(&mut connections, began + FULL_TURN, &answer));
        assert_eq!(connections.len(), MAX_CONNECTIONS - 1);
    }

    #[test]
    fn a_thread_that_has_ended_is_noticed() {
        let (mut server, _) = server(1);
        assert!(!server.has_ended());
        server.stop.write_all(&[0]).unwrap();
        while !server.thread.as_ref().unwrap().is_finished() {
            std::thread::yield_now();
        }
        assert!(server.has_ended());
        server.thread = None;
        assert!(server.has_ended());
    }

    #[test]
    fn very_many_scrapes_at_once_are_all_answered() {
        let (_server, address) = server(100_000);
        std::thread::scope(|scope| {
            let scrapes: Vec<_> = (0..50)
                .map(|_| scope.spawn(|| (0..20).map(|_| get(&address, SCRAPE)).collect::<Vec<_>>()))
                .collect();
            for answers in scrapes {
                for (status, length) in answers.join().unwrap() {
                    assert_eq!((status.as_str(), length), ("HTTP/1.1 200 OK", 100_000));
                }
            }
        });
    }

    #[test]
    fn a_refused_request_still_gets_its_answer() {
        let (_server, address) = server(1);
        let post = [b"POST /metrics HTTP/1.1\r\n\r\n".as_slice(), &[b'x'; 4000]].concat();
        assert_eq!(get(&address, &post).0, "HTTP/1.1 405 Method Not Allowed");
        assert_eq!(
            get(&address, &[b'x'; message::MAX_HEAD]).0,
            "HTTP/1.1 431 Request Header Fields Too Large"
        );
        assert_eq!(get(&address, b"\n\n").0, "HTTP/1.1 400 Bad Request");
        // One that closes at once takes no connection.
        let gone = TcpStream::connect(&address).unwrap();
        gone.shutdown(Shutdown::Both).unwrap();
        assert_eq!(get(&address, SCRAPE).1, 1);
    }

    #[test]
    fn a_dropped_server_frees_its_address() {
        let (server, address) = server(1);
        let _open = TcpStream::connect(&address).unwrap();
        drop(server);
        listener(&address);
    }
}
