//! The netlink socket: dumps, lookups by id, and SOCK_DESTROY.
//!
//! A datagram carries one request for a dump, or several lookups or destroys. The kernel answers a dump with many messages, and a
//! lookup or a destroy with one. A request is about the network namespace in which the netlink socket was opened.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_SOCK_DIAG};
use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, MultiHeaders, recvmmsg};

use super::assembly::{Assembly, DumpError, DumpState, repeat};
use super::codec::{self, Detail, DiagId, DumpRequest, Frame, Malformed, Protocol, SocketMessage};
use crate::netlink::Overruns;
use crate::sys;

/// Room for the answers to a datagram of requests. The kernel fills a datagram of a dump with up to 32 KiB
/// (net/netlink/af_netlink.c, netlink_dump).
const RECEIVE_BUFFER: usize = REQUESTS_PER_DATAGRAM * ANSWER_BYTES;
/// Room for one answer. With `struct tcp_info` and all attributes an answer takes about 600 bytes, and new kernels add a few.
const ANSWER_BYTES: usize = 2048;
/// Room for a datagram of [`SockDiag::first`], so that the kernel does not list many more sockets than are enough.
const FIRST_BUFFER: usize = 16 * 1024;
/// Requests per datagram. All answers stay in the receive queue until the kernel has processed the whole datagram. 64 answers with
/// TCP_INFO fit the default queue (net.core.rmem_default).
const REQUESTS_PER_DATAGRAM: usize = 64;
/// The requested size of the receive queue, in bytes. The kernel limits it to net.core.rmem_max.
const RECEIVE_QUEUE: usize = 1024 * 1024;

/// Why a lookup of a socket failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LookupError {
    /// The socket is no longer in the kernel's tables (ENOENT), or another socket has its addresses (ESTALE).
    NotFound,
    /// Any other error.
    Errno(Errno),
}

/// Why a socket could not be aborted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DestroyError {
    /// EOPNOTSUPP: the kernel was built without CONFIG_INET_DIAG_DESTROY, or cannot abort this state.
    NotSupported,
    /// ENOENT or ESTALE: it closed before the act.
    NotFound,
    /// EPERM: needs CAP_NET_ADMIN over the network namespace.
    Denied,
    /// The kernel got the request, but its answer did not fit the receive queue.
    AnswerLost,
    /// Any other error.
    Errno(Errno),
}

/// A sock_diag socket in the network namespace of the thread that opened it.
pub struct SockDiag {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

impl SockDiag {
    /// Opens the netlink socket.
    ///
    /// # Errors
    /// EPROTONOSUPPORT: the kernel has no sock_diag (CONFIG_INET_DIAG).
    pub fn open() -> io::Result<Self> {
        Self::with_queue(RECEIVE_QUEUE)
    }

    /// Opens the netlink socket with a receive queue of about `bytes`.
    ///
    /// # Errors
    /// As [`SockDiag::open`].
    pub fn with_queue(bytes: usize) -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        // Keeps a copy of the request out of error replies. Without it (kernels before 4.3) the replies are only longer.
        let _ = socket.set_cap_ack(true);
        // A smaller queue costs only more datagrams.
        let _ = socket.set_rx_buf_sz(u32::try_from(bytes).unwrap_or(u32::MAX));
        Ok(SockDiag {
            socket,
            sequence: 0,
            buffer: vec![0; RECEIVE_BUFFER],
        })
    }

    /// The number that the kernel gives to the network namespace and to no later one; `None` before Linux 5.14.
    pub fn netns_cookie(&self) -> Option<u64> {
        let mut cookie = [0; 8];
        let read = sys::socket_option_bytes(
            self.socket.as_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            &mut cookie,
        );
        read.is_ok_and(|bytes| bytes.len() == 8)
            .then_some(u64::from_ne_bytes(cookie))
    }

    /// Lists sockets. `keep` gets each of them, and returns the data to keep.
    ///
    /// # Errors
    /// [`DumpError::Incomplete`]: each of `DUMP_ATTEMPTS` attempts was incomplete.
    pub fn dump<T>(
        &mut self,
        request: &DumpRequest,
        mut keep: impl FnMut(SocketMessage) -> Option<T>,
    ) -> Result<Vec<T>, DumpError> {
        let all = usize::MAX;
        repeat(
            || match self.dump_once(request, RECEIVE_BUFFER, &mut keep, all)? {
                FirstSockets::All(sockets) | FirstSockets::Enough(sockets) => Ok(Some(sockets)),
                FirstSockets::Repeat => Ok(None),
            },
        )
    }

    /// Lists sockets once, until `enough` of them are kept or all are listed. `keep` returns the data to keep of each socket. After a
    /// break, the rest of the dump still waits in this netlink socket.
    ///
    /// # Errors
    /// As [`SockDiag::dump`], except that a list that must be repeated is [`FirstSockets::Repeat`].
    pub fn first<T>(
        &mut self,
        request: &DumpRequest,
        mut keep: impl FnMut(SocketMessage) -> Option<T>,
        enough: usize,
    ) -> Result<FirstSockets<T>, DumpError> {
        self.dump_once(request, FIRST_BUFFER, &mut keep, enough)
    }

    /// Does one dump, in datagrams of at most `room` bytes, until `enough` sockets are kept.
    fn dump_once<T>(
        &mut self,
        request: &DumpRequest,
        room: usize,
        keep: &mut impl FnMut(SocketMessage) -> Option<T>,
        enough: usize,
    ) -> Result<FirstSockets<T>, DumpError> {
        let sequence = self.next_sequence();
        self.socket.send(&request.encode(sequence), 0)?;
        let mut assembly = Assembly::new(sequence, request.protocol);
        let mut overruns = Overruns::default();
        loop {
            match receive(&self.socket, &mut self.buffer[..room]) {
                Ok(datagram) => match assembly.feed(datagram, keep)? {
                    DumpState::Complete => return Ok(FirstSockets::All(assembly.kept)),
                    DumpState::Repeat => return Ok(FirstSockets::Repeat),
                    DumpState::More if assembly.kept.len() >= enough => {
                        return Ok(FirstSockets::Enough(assembly.kept));
                    }
                    DumpState::More => {}
                },
                // The queue overran. The kernel goes on, so the rest must be read before the dump is repeated.
                Err(error) => {
                    overruns.note(error)?;
                    assembly.interrupted = true;
                }
            }
        }
    }

    /// Looks up each of `ids`; one result per id, in order. An MPTCP socket whose connection is over is [`LookupError::NotFound`].
    ///
    /// # Errors
    /// The netlink socket itself failed.
    pub fn lookup(
        &mut self,
        ids: &[DiagId],
        detail: Detail,
    ) -> io::Result<Vec<Result<SocketMessage, LookupError>>> {
        match ids.iter().any(|id| id.protocol() == Protocol::Mptcp) {
            true => self.lookup_each_protocol(ids, detail),
            false => self.lookup_in(Protocol::Tcp, ids, detail),
        }
    }

    /// Looks up each of `ids`, which must all be of `protocol`, in the kernel's table of `protocol`.
    pub(super) fn lookup_in(
        &mut self,
        protocol: Protocol,
        ids: &[DiagId],
        detail: Detail,
    ) -> io::Result<Vec<Result<SocketMessage, LookupError>>> {
        let put = |bytes: &mut Vec<u8>, id: &DiagId, sequence| {
            codec::put_lookup(bytes, id, sequence, detail);
        };
        let mut answers: Vec<Option<Frame>> = ids.iter().map(|_| None).collect();
        for (ids, answers) in ids
            .chunks(REQUESTS_PER_DATAGRAM)
            .zip(answers.chunks_mut(REQUESTS_PER_DATAGRAM))
        {
            // A lookup may be repeated. Answers that did not fit the queue together fit it one by one.
            let mut batch = REQUESTS_PER_DATAGRAM;
            while self.request(protocol, ids, answers, batch, put)? == Completeness::SomeLost
                && batch > 1
            {
                batch /= 2;
            }
        }
        let read = |answer| match answer {
            Some(Frame::Socket(message)) => Ok(message),
            Some(Frame::Error(libc::ENOENT | libc::ESTALE)) => Err(LookupError::NotFound),
            Some(Frame::Error(errno)) => Err(LookupError::Errno(Errno::from_raw(errno))),
            Some(_) => Err(LookupError::Errno(Errno::EBADMSG)),
            None => Err(LookupError::Errno(Errno::ENOBUFS)),
        };
        Ok(answers.into_iter().map(read).collect())
    }

    /// Aborts each of `ids`; one result per id, in order.
    ///
    /// A request is never repeated: the kernel would answer the second one with ENOENT, as if the socket had closed before the
    /// first.
    ///
    /// # Errors
    /// The netlink socket itself failed. Some of `ids` may be aborted all the same.
    pub fn destroy(&mut self, ids: &[DiagId]) -> io::Result<Vec<Result<(), DestroyError>>> {
        let mut answers: Vec<Option<Frame>> = ids.iter().map(|_| None).collect();
        for (ids, answers) in ids
            .chunks(REQUESTS_PER_DATAGRAM)
            .zip(answers.chunks_mut(REQUESTS_PER_DATAGRAM))
        {
            self.request(
                Protocol::Tcp,
                ids,
                answers,
                REQUESTS_PER_DATAGRAM,
                codec::put_destroy,
            )?;
        }
        Ok(answers.into_iter().map(destroyed).collect())
    }

    /// As [`SockDiag::destroy`], for MPTCP sockets, to see whether the kernel can do it.
    #[cfg(test)]
    pub(super) fn destroy_mptcp(
        &mut self,
        ids: &[DiagId],
    ) -> io::Result<Vec<Result<(), DestroyError>>> {
        let mut answers: Vec<Option<Frame>> = ids.iter().map(|_| None).collect();
        // The request for a lookup, with another type. codec::put_destroy asks for TCP only.
        let put = |bytes: &mut Vec<u8>, id: &DiagId, sequence| {
            const SOCK_DESTROY: u16 = 21;
            let start = bytes.len();
            codec::put_lookup(bytes, id, sequence, Detail::TcpInfo);
            bytes[start + 4..start + 6].copy_from_slice(&SOCK_DESTROY.to_ne_bytes());
        };
        self.request(
            Protocol::Mptcp,
            ids,
            &mut answers,
            REQUESTS_PER_DATAGRAM,
            put,
        )?;
        Ok(answers.into_iter().map(destroyed).collect())
    }

    /// Sends one request for each of `ids` without an answer, `batch` of them per datagram. Assigns the answers by sequence number.
    fn request(
        &mut self,
        protocol: Protocol,
        ids: &[DiagId],
        answers: &mut [Option<Frame>],
        batch: usize,
        put: impl Fn(&mut Vec<u8>, &DiagId, u32),
    ) -> io::Result<Completeness> {
        let mut request = Vec::new();
        for (ids, answers) in ids.chunks(batch).zip(answers.chunks_mut(batch)) {
            // Every id takes a sequence number, also without a request, so that the number gives the index of the answer.
            let first = self.sequence.wrapping_add(1);
            request.clear();
            for (id, answer) in ids.iter().zip(&*answers) {
                let sequence = self.next_sequence();
                if answer.is_none() {
                    put(&mut request, id, sequence);
                }
            }
            if !request.is_empty() {
                self.socket.send(&request, 0)?;
                self.receive_answers(protocol, first, answers)?;
            }
        }
        Ok(match answers.iter().all(Option::is_some) {
            true => Completeness::All,
            false => Completeness::SomeLost,
        })
    }

    /// Reads the receive queue. The kernel answers inside send(), so an answer that is not in the queue now was lost or never sent.
    fn receive_answers(
        &mut self,
        protocol: Protocol,
        first: u32,
        answers: &mut [Option<Frame>],
    ) -> io::Result<()> {
        // With fewer answers, each may be longer.
        let room = self.buffer.len() / answers.len().max(1);
        let mut overruns = Overruns::default();
        while answers.iter().any(Option::is_none) {
            let lengths = match receive_waiting(&self.socket, &mut self.buffer, room) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    overruns.note(error)?;
                    continue;
                }
                Ok(lengths) => lengths,
            };
            for (slot, length) in self.buffer.chunks(room).zip(lengths) {
                // A longer datagram was cut, so it is lost.
                let datagram = slot.get(..length).unwrap_or_default();
                for framed in codec::frames(datagram, protocol) {
                    let framed = framed.map_err(|Malformed(_)| io::Error::from(Errno::EBADMSG))?;
                    let answer = usize::try_from(framed.sequence.wrapping_sub(first))
                        .ok()
                        .and_then(|index| answers.get_mut(index));
                    if let Some(answer) = answer.filter(|answer| answer.is_none()) {
                        *answer = Some(framed.frame);
                    }
                }
            }
        }
        Ok(())
    }

    fn next_sequence(&mut self) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        self.sequence
    }
}

impl AsFd for SockDiag {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The result of a request to abort a socket, from the answer to it.
fn destroyed(answer: Option<Frame>) -> Result<(), DestroyError> {
    match answer {
        Some(Frame::Ack) => Ok(()),
        Some(Frame::Error(libc::ENOENT | libc::ESTALE)) => Err(DestroyError::NotFound),
        Some(Frame::Error(libc::EOPNOTSUPP)) => Err(DestroyError::NotSupported),
        Some(Frame::Error(libc::EPERM)) => Err(DestroyError::Denied),
        Some(Frame::Error(errno)) => Err(DestroyError::Errno(Errno::from_raw(errno))),
        Some(_) => Err(DestroyError::Errno(Errno::EBADMSG)),
        None => Err(DestroyError::AnswerLost),
    }
}

/// How a dump ended, with what was kept of its sockets.
pub enum FirstSockets<T> {
    /// These are all.
    All(Vec<T>),
    /// There are perhaps more.
    Enough(Vec<T>),
    /// The list has gaps, so the dump must be repeated.
    Repeat,
}

/// Whether the kernel answered every request.
#[derive(Debug, PartialEq, Eq)]
enum Completeness {
    All,
    SomeLost,
}

/// Receives the next datagram. A signal does not end the wait.
fn receive<'b>(socket: &Socket, buffer: &'b mut [u8]) -> io::Result<&'b [u8]> {
    let length = loop {
        // The socket is connected to port 0, so only the kernel can send to it.
        match socket.recv(&mut &mut buffer[..], libc::MSG_TRUNC) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => break other?,
        }
    };
    // The datagram was longer than the buffer.
    buffer.get(..length).ok_or_else(|| Errno::EMSGSIZE.into())
}

/// Receives the datagrams that are in the queue, up to one per `room` bytes of `buffer`, without waiting. Returns their lengths; a
/// length above `room` means that the datagram was cut.
///
/// # Errors
/// EAGAIN: the queue is empty. ENOBUFS: netlink has lost datagrams. Source: net/socket.c, do_recvmmsg.
fn receive_waiting(socket: &Socket, buffer: &mut [u8], room: usize) -> io::Result<Vec<usize>> {
    let mut slots: Vec<[IoSliceMut<'_>; 1]> = buffer
        .chunks_exact_mut(room)
        .map(|slot| [IoSliceMut::new(slot)])
        .collect();
    let mut headers = MultiHeaders::<()>::preallocate(slots.len(), None);
    let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_TRUNC;
    let socket = socket.as_raw_fd();
    let received = recvmmsg(socket, &mut headers, slots.iter_mut(), flags, None)?;
    Ok(received.map(|datagram| datagram.bytes).collect())
}
