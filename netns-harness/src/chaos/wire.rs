//! The protocol between clients and server, and a connection that counts its bytes.
//!
//! The client leads: each of its requests is a [`Header`] and a payload. The header says how the connection goes on. Every
//! payload is a function of the connection's id, the round and the side, so bytes of an earlier connection on the same
//! 4-tuple never pass for the right ones.

use std::fmt;
use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::Result;
use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use super::random::Random;
use crate::kernel::canonical;

/// How long a bystander waits for a byte. Far above any retransmission: bytes that are not there by then are lost.
pub(super) const BYTE_TIMEOUT: Duration = Duration::from_secs(20);

/// The largest payload that a header may announce, in bytes.
const MAX_PAYLOAD: u32 = 1 << 20;

/// The side that sends a payload.
#[derive(Debug, Clone, Copy)]
pub(super) enum Side {
    Client,
    Server,
}

/// How a connection goes on after a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Then {
    /// The server replies, and the client sends another request.
    More,
    /// The server replies and closes.
    ServerCloses,
    /// The server replies, and the client closes.
    ClientCloses,
    /// The client sends FIN, and the server leaks the connection for `ms` milliseconds.
    Leak {
        /// The server first reads to the end.
        read: bool,
        /// The server closes early if it notices that the connection is dead.
        watch: bool,
        ms: u32,
    },
    /// The client sends nothing more, and the server waits for the end.
    Idle,
    /// The client sends FIN, and the server sends `replies` replies with pauses of up to `pause_ms` milliseconds: a half-closed connection in
    /// use.
    Stream { replies: u16, pause_ms: u16 },
}

/// The beginning of a request. On the wire it is JSON after two bytes with its length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Header {
    /// The connection's number in the run.
    pub id: u64,
    /// The request's number in the connection.
    pub round: u32,
    /// Bytes of payload that follow.
    pub request: u32,
    /// Bytes of payload in each reply.
    pub reply: u32,
    pub then: Then,
}

impl Header {
    fn encode(&self) -> Vec<u8> {
        let json = serde_json::to_vec(self).expect("a header is plain data");
        let len = u16::try_from(json.len()).expect("a header is short");
        [&len.to_be_bytes()[..], &json].concat()
    }

    fn decode(json: &[u8]) -> Option<Self> {
        let header: Self = serde_json::from_slice(json).ok()?;
        (header.request.max(header.reply) <= MAX_PAYLOAD).then_some(header)
    }
}

fn payload(id: u64, round: u32, side: Side, len: u32) -> Vec<u8> {
    let side = match side {
        Side::Client => 0,
        Side::Server => 1,
    };
    let mut random = Random::new(id, u64::from(round) << 1 | side);
    let len = usize::try_from(len).expect("32 bits fit");
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        bytes.extend_from_slice(&random.next().to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

/// Why a connection failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct WireError {
    action: String,
    errno: Option<i32>,
}

impl WireError {
    pub fn new(action: impl Into<String>) -> Self {
        Self {
            action: action.into(),
            errno: None,
        }
    }

    pub fn io(action: &str, error: &io::Error) -> Self {
        // A read or write that ran into its timeout.
        if error.kind() == io::ErrorKind::WouldBlock {
            return Self::new(format!("{action}: no progress for {BYTE_TIMEOUT:?}"));
        }
        Self {
            action: action.to_owned(),
            errno: error.raw_os_error(),
        }
    }

    /// Whether the other side or the kernel has reset the connection.
    pub fn is_reset(&self) -> bool {
        self.errno.is_some()
    }
}

impl fmt::Display for WireError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.action)?;
        match self.errno {
            Some(errno) => write!(f, ": {}", errno_name(errno)),
            None => Ok(()),
        }
    }
}

/// `ECONNRESET`.
pub(super) fn errno_name(errno: i32) -> String {
    format!("{:?}", Errno::from_raw(errno))
}

/// A connection whose bytes should have arrived and did not.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Loss {
    /// The connection's number in the run.
    pub(super) id: u64,
    side: String,
    kind: String,
    server: SocketAddr,
    client: SocketAddr,
    round: u32,
    sent: u64,
    received: u64,
    age_ms: u128,
    pub(super) error: WireError,
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} {} (id {:#x}, {}), reported by the {} in round {} after {} ms: sent {} bytes, received {}: {}",
            self.server,
            self.client,
            self.id,
            self.kind,
            self.side,
            self.round,
            self.age_ms,
            self.sent,
            self.received,
            self.error
        )
    }
}

/// One end of a connection.
#[derive(Debug)]
pub(super) struct Connection {
    pub stream: TcpStream,
    side: Side,
    local: SocketAddr,
    peer: SocketAddr,
    began: Instant,
    pub sent: u64,
    pub received: u64,
}

impl Connection {
    /// The caller passes the addresses, because the kernel does not return those of a dead connection.
    ///
    /// # Errors
    /// The kernel refuses a socket option.
    pub fn new(
        stream: TcpStream,
        side: Side,
        local: SocketAddr,
        peer: SocketAddr,
    ) -> io::Result<Self> {
        stream.set_read_timeout(Some(BYTE_TIMEOUT))?;
        stream.set_write_timeout(Some(BYTE_TIMEOUT))?;
        stream.set_nodelay(true)?;
        Ok(Self {
            stream,
            side,
            local: canonical(local),
            peer: canonical(peer),
            began: Instant::now(),
            sent: 0,
            received: 0,
        })
    }

    pub fn send_request(&mut self, header: &Header) -> Result<(), WireError> {
        let mut bytes = header.encode();
        bytes.extend(payload(
            header.id,
            header.round,
            Side::Client,
            header.request,
        ));
        self.send(&bytes)
    }

    /// The header of the next request; `None` after an orderly end.
    pub fn read_header(&mut self) -> Result<Option<Header>, WireError> {
        let mut len = [0; 2];
        if self.read(&mut len[..1])? == 0 {
            return Ok(None);
        }
        self.fill(&mut len[1..])?;
        let mut json = vec![0; u16::from_be_bytes(len).into()];
        self.fill(&mut json)?;
        match Header::decode(&json) {
            Some(header) => Ok(Some(header)),
            None => Err(WireError::new(format!("not a header: {json:02x?}"))),
        }
    }

    pub fn read_request(&mut self, header: &Header) -> Result<(), WireError> {
        self.read_payload(header.id, header.round, Side::Client, header.request)
    }

    /// Sends the reply `round`. In a stream, replies are numbered separately from requests.
    pub fn send_reply(&mut self, header: &Header, round: u32) -> Result<(), WireError> {
        self.send(&payload(header.id, round, Side::Server, header.reply))
    }

    pub fn read_reply(&mut self, header: &Header, round: u32) -> Result<(), WireError> {
        self.read_payload(header.id, round, Side::Server, header.reply)
    }

    /// Reads an orderly end; bytes before it are an error.
    pub fn read_end(&mut self) -> Result<(), WireError> {
        match self.read(&mut [0])? {
            0 => Ok(()),
            _ => Err(WireError::new("bytes after the end")),
        }
    }

    /// Reads and discards everything up to the end.
    pub fn drain(&mut self) -> Result<(), WireError> {
        let mut bytes = [0; 4096];
        while self.read(&mut bytes)? > 0 {}
        Ok(())
    }

    pub fn loss(&self, id: u64, kind: &str, round: u32, error: WireError) -> Loss {
        let (side, server, client) = match self.side {
            Side::Client => ("client", self.peer, self.local),
            Side::Server => ("server", self.local, self.peer),
        };
        Loss {
            id,
            side: side.to_owned(),
            kind: kind.to_owned(),
            server,
            client,
            round,
            sent: self.sent,
            received: self.received,
            age_ms: self.began.elapsed().as_millis(),
            error,
        }
    }

    fn send(&mut self, mut bytes: &[u8]) -> Result<(), WireError> {
        while !bytes.is_empty() {
            match self.stream.write(bytes) {
                Ok(written) => {
                    bytes = &bytes[written..];
                    self.sent += written as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(WireError::io("send", &error)),
            }
        }
        Ok(())
    }

    fn read(&mut self, bytes: &mut [u8]) -> Result<usize, WireError> {
        loop {
            match self.stream.read(bytes) {
                Ok(read) => {
                    self.received += read as u64;
                    return Ok(read);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(WireError::io("receive", &error)),
            }
        }
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<(), WireError> {
        let mut filled = 0;
        while filled < bytes.len() {
            match self.read(&mut bytes[filled..])? {
                0 => return Err(WireError::new("the connection ended too early")),
                read => filled += read,
            }
        }
        Ok(())
    }

    fn read_payload(&mut self, id: u64, round: u32, side: Side, len: u32) -> Result<(), WireError> {
        let right = payload(id, round, side, len);
        let mut bytes = vec![0; right.len()];
        self.fill(&mut bytes)?;
        match right.iter().zip(&bytes).position(|(a, b)| a != b) {
            None => Ok(()),
            Some(offset) => Err(WireError::new(format!("byte {offset} of {len} is wrong"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_the_wire_if_its_payloads_are_small() {
        let mut header = Header {
            id: u64::MAX,
            round: 9,
            request: MAX_PAYLOAD,
            reply: 3,
            then: Then::Leak {
                read: true,
                watch: false,
                ms: 513,
            },
        };
        let bytes = header.encode();
        assert_eq!(
            usize::from(u16::from_be_bytes([bytes[0], bytes[1]])),
            bytes.len() - 2
        );
        assert_eq!(Header::decode(&bytes[2..]), Some(header));
        header.reply = MAX_PAYLOAD + 1;
        assert_eq!(Header::decode(&header.encode()[2..]), None);
        assert_eq!(Header::decode(b"\0\0"), None);
    }

    #[test]
    fn payloads_differ_by_id_round_and_side() {
        let first = payload(1, 1, Side::Client, 21);
        assert_eq!(first.len(), 21);
        assert_eq!(first, payload(1, 1, Side::Client, 21));
        for other in [
            payload(2, 1, Side::Client, 21),
            payload(1, 2, Side::Client, 21),
            payload(1, 1, Side::Server, 21),
        ] {
            assert_ne!(first, other);
        }
    }
}
