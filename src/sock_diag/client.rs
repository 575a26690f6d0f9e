//! The netlink socket: dumps, lookups by id, and SOCK_DESTROY.
//!
//! A datagram carries one request for a dump, or several lookups or destroys. The kernel answers a dump with many messages, and a
//! lookup or a destroy with one. A destroy can be sent without NLM_F_ACK; then the kernel answers only if it fails. A request is
//! about the network namespace in which the netlink socket was opened.

use std::io::{self, IoSliceMut};
use std::mem;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::time::Instant;

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
/// Room for a datagram of [`SockDiag::stream`]. With fewer sockets in a datagram, their descriptions are fresher.
const STREAM_BUFFER: usize = 16 * 1024;
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
        let all = |_: &mut Vec<T>, _| ControlFlow::Continue(());
        repeat(|| self.dump_once(request, RECEIVE_BUFFER, &mut keep, all))
    }

    /// Lists sockets once, datagram by datagram, and returns whether the list is complete. `keep` returns the data to keep of each
    /// socket. `part` then works on the data of one datagram while the next one waits. It also gets an instant: the kernel wrote
    /// the datagram after it.
    ///
    /// The list can be complete only if `part` closes no sockets. The kernel resumes a hash bucket at the number of sockets that it
    /// has listed from it, so each closed socket hides another (net/ipv4/tcp_diag.c, tcp_diag_dump). After a break, the rest of the
    /// dump still waits in this netlink socket.
    ///
    /// # Errors
    /// As [`SockDiag::dump`], except that an incomplete list is not an error.
    pub fn stream<T>(
        &mut self,
        request: &DumpRequest,
        mut keep: impl FnMut(SocketMessage) -> Option<T>,
        mut part: impl FnMut(Vec<T>, Instant) -> ControlFlow<()>,
    ) -> Result<bool, DumpError> {
        let part = |kept: &mut Vec<T>, since| part(mem::take(kept), since);
        let rest = self.dump_once(request, STREAM_BUFFER, &mut keep, part)?;
        Ok(rest.is_some())
    }

    /// Does one dump, in datagrams of at most `room` bytes; `None` if it must be repeated, or `after` broke it off.
    ///
    /// cwkill calls `after` for each datagram. It may take the kept data, and gets an instant: the kernel wrote the datagram after
    /// it.
    fn dump_once<T>(
        &mut self,
        request: &DumpRequest,
        room: usize,
        keep: &mut impl FnMut(SocketMessage) -> Option<T>,
        mut after: impl FnMut(&mut Vec<T>, Instant) -> ControlFlow<()>,
    ) -> Result<Option<Vec<T>>, DumpError> {
        let sequence = self.next_sequence();
        // The kernel writes the first datagram in send(), and each further one in the recv() of the one before
        // (net/netlink/af_netlink.c, __netlink_dump_start and netlink_recvmsg).
        let mut begun = Instant::now();
        self.socket.send(&request.encode(sequence), 0)?;
        let mut assembly = Assembly::new(sequence, request.protocol);
        let mut overruns = Overruns::default();
        loop {
            let since = mem::replace(&mut begun, Instant::now());
            match receive(&self.socket, &mut self.buffer[..room]) {
                Ok(datagram) => {
                    let state = assembly.feed(datagram, keep)?;
                    if after(&mut assembly.kept, since).is_break() {
                        return Ok(None);
                    }
                    match state {
                        DumpState::More => {}
                        DumpState::Complete => return Ok(Some(assembly.kept)),
                        DumpState::Repeat => return Ok(None),
                    }
                }
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

    /// As [`SockDiag::destroy`], but the kernel answers only the last request of each datagram, and each request that fails.
    ///
    /// The kernel processes a datagram in order before it returns from send(), so a request without an answer succeeded. If an
    /// answer does not fit the queue, recv() reports an overrun. Then a request without an answer counts as
    /// [`DestroyError::AnswerLost`].
    ///
    /// # Errors
    /// As [`SockDiag::destroy`].
    pub fn destroy_together(
        &mut self,
        ids: &[DiagId],
    ) -> io::Result<Vec<Result<(), DestroyError>>> {
        let mut results = Vec::with_capacity(ids.len());
        let mut request = Vec::new();
        for ids in ids.chunks(REQUESTS_PER_DATAGRAM) {
            let first = self.sequence.wrapping_add(1);
            request.clear();
            for (index, id) in ids.iter().enumerate() {
                let put = match index + 1 == ids.len() {
                    true => codec::put_destroy,
                    false => codec::put_destroy_without_ack,
                };
                put(&mut request, id, self.next_sequence());
            }
            self.socket.send(&request, 0)?;
            let mut answers: Vec<Option<Frame>> = ids.iter().map(|_| None).collect();
            let lost = self.receive_answers(Protocol::Tcp, first, &mut answers, Until::Last)?;
            let complete = !lost && answers.last().is_some_and(Option::is_some);
            let or_ack = |answer: Option<Frame>| answer.or(complete.then_some(Frame::Ack));
            results.extend(answers.into_iter().map(|answer| destroyed(or_ack(answer))));
        }
        Ok(results)
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
                self.receive_answers(protocol, first, answers, Until::All)?;
            }
        }
        Ok(match answers.iter().all(Option::is_some) {
            true => Completeness::All,
            false => Completeness::SomeLost,
        })
    }

    /// Reads the receive queue, and returns whether an answer was lost because it did not fit. The kernel answers inside send(), so
    /// an answer that is not in the queue now was lost or never sent.
    fn receive_answers(
        &mut self,
        protocol: Protocol,
        first: u32,
        answers: &mut [Option<Frame>],
        until: Until,
    ) -> io::Result<bool> {
        // With fewer answers, each may be longer.
        let room = self.buffer.len() / answers.len().max(1);
        let mut lost = false;
        let mut overruns = Overruns::default();
        loop {
            let waiting = match until {
                Until::All => answers.iter().any(Option::is_none),
                Until::Last => answers.last().is_some_and(Option::is_none),
            };
            if !waiting {
                return Ok(lost);
            }
            let lengths = match receive_waiting(&self.socket, &mut self.buffer, room) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(lost),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    overruns.note(error)?;
                    lost = true;
                    continue;
                }
                Ok(lengths) => lengths,
            };
            for (slot, length) in self.buffer.chunks(room).zip(lengths) {
                // A longer datagram was cut, so it is lost.
                lost |= length > room;
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

/// The answers to wait for.
#[derive(Clone, Copy)]
enum Until {
    All,
    /// The kernel answers in order, so all earlier answers come before it.
    Last,
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
