//! The netlink socket: dumps, questions about one socket, and SOCK_DESTROY.
//!
//! Several requests travel in one datagram and are answered one message each. A namespace is the
//! one the socket was opened in.

use std::io;
use std::mem;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_SOCK_DIAG};
use nix::errno::Errno;

use super::codec::{self, Detail, DiagId, DumpRequest, Frame, Malformed, SocketMessage};
use crate::sys;

/// Enough for the answers to a datagram of requests; the kernel fills those of a dump up to 32 KiB
/// (net/netlink/af_netlink.c, netlink_dump).
const RECEIVE_BUFFER: usize = BATCH * ANSWER;
/// A dump that the kernel flags as interrupted, or that overruns the receive queue, is repeated this
/// often at most.
const DUMP_ATTEMPTS: u32 = 10;
/// Room for one answer. With `struct tcp_info` and all attributes it takes some 600 bytes, each new kernel
/// adds a few.
const ANSWER: usize = 2048;
/// Room for a datagram of a list that is acted on as it comes: the fewer sockets are in it, the fresher is what it says.
const STREAM_BUFFER: usize = 16 * 1024;
/// Requests in one datagram. Every answer waits in the receive queue until the whole datagram is
/// processed; 64 with TCP_INFO fit the default queue (net.core.rmem_default).
const BATCH: usize = 64;
/// Size of the receive queue that is asked for. The kernel gives what net.core.rmem_max allows.
const RECEIVE_QUEUE: usize = 1024 * 1024;

/// Why a dump failed.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// The tables changed under every attempt.
    #[error("the socket tables changed under each of {DUMP_ATTEMPTS} dumps; try again")]
    Interrupted,
    /// The answer was not sock_diag.
    #[error("sock_diag: {}", .0.0)]
    Malformed(Malformed),
    /// The kernel refused, or the socket failed.
    #[error("sock_diag: {0}")]
    Io(io::Error),
}

impl From<io::Error> for DumpError {
    fn from(error: io::Error) -> Self {
        DumpError::Io(error)
    }
}

/// Why a socket could not be looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LookupError {
    /// It is no longer in the kernel's tables (ENOENT), or its place is taken by another (ESTALE).
    Gone,
    /// Anything else.
    Errno(Errno),
}

/// Why a socket could not be aborted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DestroyError {
    /// EOPNOTSUPP: the kernel was built without CONFIG_INET_DIAG_DESTROY, or cannot abort this state.
    NotSupported,
    /// ENOENT or ESTALE: it closed before us.
    Gone,
    /// EPERM: needs CAP_NET_ADMIN over the network namespace.
    Denied,
    /// The kernel took the order, and its answer did not fit the receive queue.
    AnswerLost,
    /// Anything else.
    Errno(Errno),
}

/// A sock_diag socket in the network namespace of the thread that opened it.
pub struct SockDiag {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

impl SockDiag {
    /// Opens the socket.
    ///
    /// # Errors
    /// EPROTONOSUPPORT: no sock_diag in this kernel (CONFIG_INET_DIAG).
    pub fn open() -> io::Result<Self> {
        Self::with_queue(RECEIVE_QUEUE)
    }

    /// Opens the socket with a receive queue of about `bytes`.
    ///
    /// # Errors
    /// As [`SockDiag::open`].
    pub fn with_queue(bytes: usize) -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_SOCK_DIAG)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        // Keeps the request out of error replies. Kernels before 4.3 do not know it; only longer
        // replies follow from that.
        let _ = socket.set_cap_ack(true);
        // Less than asked for means more, smaller datagrams, nothing else.
        let _ = socket.set_rx_buf_sz(u32::try_from(bytes).unwrap_or(u32::MAX));
        Ok(SockDiag {
            socket,
            sequence: 0,
            buffer: vec![0; RECEIVE_BUFFER],
        })
    }

    /// Lists sockets; `keep` sees each and says what to keep of it.
    ///
    /// # Errors
    /// [`DumpError::Interrupted`] when the tables changed under every one of a bounded number of dumps.
    pub fn dump<T>(
        &mut self,
        request: &DumpRequest,
        mut keep: impl FnMut(SocketMessage) -> Option<T>,
    ) -> Result<Vec<T>, DumpError> {
        let all = |_: &mut Vec<T>, _| ControlFlow::Continue(());
        repeat(|| self.dump_once(request, RECEIVE_BUFFER, &mut keep, all))
    }

    /// Lists sockets once, a datagram of them at a time; whether the list is whole. `keep` says what to keep of each, and `part`
    /// is at work on that, and is told since when it may be so, while the next datagram waits.
    ///
    /// Whole is what is listed if `part` closes nothing: the kernel goes on in a hash bucket after as many sockets as it has
    /// listed of it, so what is closed hides others (net/ipv4/tcp_diag.c, tcp_diag_dump). After a break this socket stays busy with
    /// the rest.
    ///
    /// # Errors
    /// As [`SockDiag::dump`], but changed tables are none.
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

    /// One dump, in datagrams of at most `room` bytes; `None` if it has to be asked for again. `after` each datagram may
    /// take what was kept so far, and break off; it gets the time before which the datagram was not begun.
    fn dump_once<T>(
        &mut self,
        request: &DumpRequest,
        room: usize,
        keep: &mut impl FnMut(SocketMessage) -> Option<T>,
        mut after: impl FnMut(&mut Vec<T>, Instant) -> ControlFlow<()>,
    ) -> Result<Option<Vec<T>>, DumpError> {
        let sequence = self.next_sequence();
        // The first datagram is put together in send(), each other in the recv() of the one before it
        // (net/netlink/af_netlink.c, __netlink_dump_start and netlink_recvmsg).
        let mut begun = Instant::now();
        self.socket.send(&request.encode(sequence), 0)?;
        let mut assembly = Assembly::new(sequence);
        loop {
            let since = mem::replace(&mut begun, Instant::now());
            match receive(&self.socket, &mut self.buffer[..room]) {
                Ok(datagram) => {
                    let verdict = assembly.feed(datagram, keep)?;
                    if after(&mut assembly.kept, since).is_break() {
                        return Ok(None);
                    }
                    match verdict {
                        Verdict::More => {}
                        Verdict::Complete => return Ok(Some(assembly.kept)),
                        Verdict::Again => return Ok(None),
                    }
                }
                // The queue overran. The kernel goes on, so the rest is read before asking again.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    assembly.interrupted = true;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Looks at each of `ids` now; one result each, in order.
    ///
    /// # Errors
    /// Only when the netlink socket itself fails.
    pub fn lookup(
        &mut self,
        ids: &[DiagId],
        detail: Detail,
    ) -> io::Result<Vec<Result<SocketMessage, LookupError>>> {
        let put = |bytes: &mut Vec<u8>, id: &DiagId, sequence| {
            codec::put_lookup(bytes, id, sequence, detail);
        };
        let mut answers: Vec<Option<Frame>> = ids.iter().map(|_| None).collect();
        for (ids, answers) in ids.chunks(BATCH).zip(answers.chunks_mut(BATCH)) {
            // A question may be asked again. What did not fit the queue together fits it one by one.
            let mut at_once = BATCH;
            while self.ask(ids, answers, at_once, put)? == Answers::SomeLost && at_once > 1 {
                at_once /= 2;
            }
        }
        let read = |answer| match answer {
            Some(Frame::Socket(message)) => Ok(message),
            Some(Frame::Error(libc::ENOENT | libc::ESTALE)) => Err(LookupError::Gone),
            Some(Frame::Error(errno)) => Err(LookupError::Errno(Errno::from_raw(errno))),
            Some(_) => Err(LookupError::Errno(Errno::EBADMSG)),
            None => Err(LookupError::Errno(Errno::ENOBUFS)),
        };
        Ok(answers.into_iter().map(read).collect())
    }

    /// Aborts each of `ids`; one result each, in order.
    ///
    /// An order is never given twice: the second would be answered with ENOENT, as if the socket had
    /// closed before the first.
    ///
    /// # Errors
    /// Only when the netlink socket itself fails; some of `ids` may be aborted then.
    pub fn destroy(&mut self, ids: &[DiagId]) -> io::Result<Vec<Result<(), DestroyError>>> {
        let mut answers: Vec<Option<Frame>> = ids.iter().map(|_| None).collect();
        for (ids, answers) in ids.chunks(BATCH).zip(answers.chunks_mut(BATCH)) {
            self.ask(ids, answers, BATCH, codec::put_destroy)?;
        }
        Ok(answers.into_iter().map(destroyed).collect())
    }

    /// The same with one answer for as many as fit a datagram, and one for each that fails. The kernel works through a datagram
    /// in order before it returns from send(), and a failure that does not fit the queue is an overrun that recv() tells of: then
    /// nothing is taken for done that is not told.
    ///
    /// # Errors
    /// As [`SockDiag::destroy`].
    pub fn destroy_together(
        &mut self,
        ids: &[DiagId],
    ) -> io::Result<Vec<Result<(), DestroyError>>> {
        let mut results = Vec::with_capacity(ids.len());
        let mut request = Vec::new();
        for ids in ids.chunks(BATCH) {
            let first = self.sequence.wrapping_add(1);
            request.clear();
            for (at, id) in ids.iter().enumerate() {
                let put = match at + 1 == ids.len() {
                    true => codec::put_destroy,
                    false => codec::put_quiet_destroy,
                };
                put(&mut request, id, self.next_sequence());
            }
            self.socket.send(&request, 0)?;
            let mut answers: Vec<Option<Frame>> = ids.iter().map(|_| None).collect();
            let lost = self.take_answers(first, &mut answers, Until::TheLast)?;
            let all_told = !lost && answers.last().is_some_and(Option::is_some);
            let silent = |answer: Option<Frame>| answer.or(all_told.then_some(Frame::Ack));
            results.extend(answers.into_iter().map(|answer| destroyed(silent(answer))));
        }
        Ok(results)
    }

    /// Sends one request for each of `ids` that has no answer yet, `at_once` in a datagram, and pairs
    /// the answers by sequence number.
    fn ask(
        &mut self,
        ids: &[DiagId],
        answers: &mut [Option<Frame>],
        at_once: usize,
        put: impl Fn(&mut Vec<u8>, &DiagId, u32),
    ) -> io::Result<Answers> {
        let mut request = Vec::new();
        for (ids, answers) in ids.chunks(at_once).zip(answers.chunks_mut(at_once)) {
            // One sequence number a slot, asked or not, so that a number finds its slot.
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
                self.take_answers(first, answers, Until::All)?;
            }
        }
        Ok(match answers.iter().all(Option::is_some) {
            true => Answers::All,
            false => Answers::SomeLost,
        })
    }

    /// Empties the receive queue; whether something did not fit it. The kernel answers inside send(), so what is not there now was
    /// lost, or never sent.
    fn take_answers(
        &mut self,
        first: u32,
        answers: &mut [Option<Frame>],
        until: Until,
    ) -> io::Result<bool> {
        // The fewer, the longer each may be.
        let room = self.buffer.len() / answers.len().max(1);
        let mut lost = false;
        loop {
            let open = match until {
                Until::All => answers.iter().any(Option::is_none),
                Until::TheLast => answers.last().is_some_and(Option::is_none),
            };
            if !open {
                return Ok(lost);
            }
            let lengths = match sys::recvmmsg(self.socket.as_fd(), &mut self.buffer, room) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(lost),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    lost = true;
                    continue;
                }
                other => other?,
            };
            for (slot, length) in self.buffer.chunks(room).zip(lengths) {
                // One that does not fit is lost.
                lost |= length > room;
                let datagram = slot.get(..length).unwrap_or_default();
                for framed in codec::frames(datagram) {
                    let framed = framed.map_err(|Malformed(what)| io::Error::other(what))?;
                    let place = usize::try_from(framed.sequence.wrapping_sub(first))
                        .ok()
                        .and_then(|index| answers.get_mut(index));
                    if let Some(place) = place.filter(|place| place.is_none()) {
                        *place = Some(framed.frame);
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

/// What an answer says of an order.
fn destroyed(answer: Option<Frame>) -> Result<(), DestroyError> {
    match answer {
        Some(Frame::Ack) => Ok(()),
        Some(Frame::Error(libc::ENOENT | libc::ESTALE)) => Err(DestroyError::Gone),
        Some(Frame::Error(libc::EOPNOTSUPP)) => Err(DestroyError::NotSupported),
        Some(Frame::Error(libc::EPERM)) => Err(DestroyError::Denied),
        Some(Frame::Error(errno)) => Err(DestroyError::Errno(Errno::from_raw(errno))),
        Some(_) => Err(DestroyError::Errno(Errno::EBADMSG)),
        None => Err(DestroyError::AnswerLost),
    }
}

/// Which answers are waited for.
#[derive(Clone, Copy)]
enum Until {
    All,
    /// Those before it have come when it comes.
    TheLast,
}

/// Whether every question of an exchange was answered.
#[derive(Debug, PartialEq, Eq)]
enum Answers {
    All,
    SomeLost,
}

/// Tries a dump until it is whole, a bounded number of times.
fn repeat<T>(
    mut once: impl FnMut() -> Result<Option<Vec<T>>, DumpError>,
) -> Result<Vec<T>, DumpError> {
    for _ in 0..DUMP_ATTEMPTS {
        if let Some(whole) = once()? {
            return Ok(whole);
        }
    }
    Err(DumpError::Interrupted)
}

/// Takes the next datagram; a signal does not end the wait.
fn receive<'b>(socket: &Socket, buffer: &'b mut [u8]) -> io::Result<&'b [u8]> {
    let length = loop {
        // The socket is connected to port 0, so only the kernel can have sent what arrives here.
        match socket.recv(&mut &mut buffer[..], libc::MSG_TRUNC) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => break other?,
        }
    };
    buffer.get(..length).ok_or_else(|| {
        io::Error::other(format!(
            "a datagram of {length} bytes does not fit the receive buffer"
        ))
    })
}

/// What a datagram did to a dump.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    More,
    Complete,
    Again,
}

/// Puts the datagrams of one dump together. Pure, so that bad luck can be played to it.
struct Assembly<T> {
    sequence: u32,
    interrupted: bool,
    kept: Vec<T>,
}

impl<T> Assembly<T> {
    fn new(sequence: u32) -> Self {
        Assembly {
            sequence,
            interrupted: false,
            kept: Vec::new(),
        }
    }

    fn feed(
        &mut self,
        datagram: &[u8],
        keep: &mut impl FnMut(SocketMessage) -> Option<T>,
    ) -> Result<Verdict, DumpError> {
        for framed in codec::frames(datagram) {
            let framed = framed.map_err(DumpError::Malformed)?;
            if framed.sequence != self.sequence {
                continue;
            }
            self.interrupted |= framed.interrupted;
            match framed.frame {
                Frame::Socket(message) => self.kept.extend(keep(message)),
                Frame::Done(0) if self.interrupted => return Ok(Verdict::Again),
                Frame::Done(0) => return Ok(Verdict::Complete),
                Frame::Done(errno) | Frame::Error(errno) => {
                    return Err(io::Error::from_raw_os_error(errno).into());
                }
                Frame::Ack | Frame::Other => {}
            }
        }
        Ok(Verdict::More)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testdata;
    use super::*;

    const NLM_F_DUMP_INTR: u16 = 0x10;

    /// A real dump with its datagrams' sequence numbers and flags set.
    fn dump(sequence: u32, flags: u16) -> Vec<u8> {
        let mut bytes = testdata::bytes(testdata::DUMP_V4);
        let mut at = 0;
        while at < bytes.len() {
            let length = u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
            bytes[at + 6..at + 8].copy_from_slice(&flags.to_ne_bytes());
            bytes[at + 8..at + 12].copy_from_slice(&sequence.to_ne_bytes());
            at += usize::try_from(length).unwrap().next_multiple_of(4);
        }
        bytes
    }

    fn feed(assembly: &mut Assembly<SocketMessage>, datagram: &[u8]) -> Verdict {
        assembly.feed(datagram, &mut Some).unwrap()
    }

    #[test]
    fn a_whole_dump_is_complete() {
        let mut assembly = Assembly::new(5);
        assert_eq!(feed(&mut assembly, &dump(5, 2)), Verdict::Complete);
        assert_eq!(assembly.kept.len(), 2);
    }

    #[test]
    fn an_interrupted_dump_is_asked_for_again() {
        let mut assembly = Assembly::new(5);
        let datagram = dump(5, 2 | NLM_F_DUMP_INTR);
        assert_eq!(feed(&mut assembly, &datagram), Verdict::Again);
    }

    #[test]
    fn an_interruption_in_an_early_datagram_is_not_forgotten() {
        let whole = dump(5, 2);
        let first = usize::try_from(u32::from_ne_bytes(whole[..4].try_into().unwrap())).unwrap();
        let mut early = whole[..first].to_vec();
        early[6] |= 0x10;
        let mut assembly = Assembly::new(5);
        assert_eq!(feed(&mut assembly, &early), Verdict::More);
        assert_eq!(feed(&mut assembly, &whole[first..]), Verdict::Again);
    }

    #[test]
    fn a_dump_that_is_interrupted_again_and_again_ends_in_an_error() {
        let mut attempts = 0;
        let never: Result<Vec<u8>, _> = repeat(|| {
            attempts += 1;
            Ok(None)
        });
        assert!(matches!(never, Err(DumpError::Interrupted)));
        assert_eq!(attempts, DUMP_ATTEMPTS);

        let mut attempts = 0;
        let third = repeat(|| {
            attempts += 1;
            Ok((attempts == 3).then(|| vec![1]))
        });
        assert_eq!(third.unwrap(), [1]);

        let refused: Result<Vec<u8>, _> = repeat(|| Err(DumpError::Malformed(Malformed("x"))));
        assert!(matches!(refused, Err(DumpError::Malformed(_))));
    }

    #[test]
    fn answers_to_another_question_are_not_taken() {
        let mut assembly = Assembly::new(6);
        assert_eq!(feed(&mut assembly, &dump(5, 2)), Verdict::More);
        assert!(assembly.kept.is_empty());
    }

    #[test]
    fn a_refused_dump_keeps_its_errno() {
        let mut refusal = Vec::new();
        refusal.extend_from_slice(&20u32.to_ne_bytes());
        refusal.extend_from_slice(&2u16.to_ne_bytes());
        refusal.extend_from_slice(&0u16.to_ne_bytes());
        refusal.extend_from_slice(&5u32.to_ne_bytes());
        refusal.extend_from_slice(&0u32.to_ne_bytes());
        refusal.extend_from_slice(&(-libc::EPERM).to_ne_bytes());
        let mut assembly: Assembly<SocketMessage> = Assembly::new(5);
        let Err(DumpError::Io(error)) = assembly.feed(&refusal, &mut Some) else {
            panic!("an error");
        };
        assert_eq!(error.raw_os_error(), Some(libc::EPERM));
    }
}
