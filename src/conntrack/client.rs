//! The netlink socket for conntrack (ctnetlink): lists entries, looks one up, and deletes it.
//!
//! A request makes the kernel load nf_conntrack_netlink, and needs CAP_NET_ADMIN over the network namespace
//! (net/netfilter/nfnetlink.c, nfnetlink_rcv). It is about the network namespace in which the netlink socket was opened.

use std::io;

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_NETFILTER};

use super::codec::{self, Answer, DumpFilter, Entry, TimeoutRules};
use crate::netlink::Overruns;

/// The kernel fills a datagram of a dump with up to 32 KiB (net/netlink/af_netlink.c, netlink_dump).
const RECEIVE_BUFFER: usize = 64 * 1024;
/// The requested size of the receive queue, in bytes. The kernel limits it to net.core.rmem_max.
const RECEIVE_QUEUE: u32 = 1024 * 1024;
/// The maximum number of attempts at a list of which datagrams were lost.
const DUMP_ATTEMPTS: u32 = 3;

/// Why conntrack cannot be asked.
#[derive(Debug, thiserror::Error)]
pub enum ConntrackError {
    /// EPERM.
    #[error("conntrack can only be read with CAP_NET_ADMIN: {0}")]
    Denied(io::Error),
    /// The socket of nfnetlink, or the subsystem of conntrack.
    #[error(
        "this kernel has no conntrack, or not the module nf_conntrack_netlink, which `modprobe nf_conntrack_netlink` loads: {0}"
    )]
    NotSupported(io::Error),
    #[error("conntrack: {0}")]
    Io(io::Error),
}

impl From<io::Error> for ConntrackError {
    fn from(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => ConntrackError::Denied(error),
            // nfnetlink answers EINVAL for a subsystem that it does not have.
            Some(libc::EPROTONOSUPPORT | libc::EAFNOSUPPORT | libc::EINVAL | libc::EOPNOTSUPP) => {
                ConntrackError::NotSupported(error)
            }
            _ => ConntrackError::Io(error),
        }
    }
}

/// The result of a request to delete an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delete {
    Deleted,
    /// There is no such entry any more.
    Gone,
    /// A flow table has the connection.
    Offloaded,
}

/// A netlink socket in the network namespace of the thread that opened it.
pub struct Conntrack {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Conntrack {
    /// Opens the netlink socket.
    ///
    /// # Errors
    /// The kernel has no nfnetlink.
    pub fn open() -> Result<Self, ConntrackError> {
        let mut socket = Socket::new(NETLINK_NETFILTER)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        // Both only save room.
        let _ = socket.set_cap_ack(true);
        let _ = socket.set_rx_buf_sz(RECEIVE_QUEUE);
        Ok(Conntrack {
            socket,
            sequence: 0,
            buffer: vec![0; RECEIVE_BUFFER],
        })
    }

    /// Appends what `keep` returns of the entries of TCP of one family to `kept`. The kernel compares them with `filter` first, if it can.
    ///
    /// The kernel walks through its hash table while connections begin and end. An entry that moves meanwhile, because the table
    /// grows, may be missing or come twice.
    ///
    /// # Errors
    /// ENOBUFS: parts of each of some attempts were lost. Otherwise as the variants of [`ConntrackError`].
    pub fn dump<T>(
        &mut self,
        ipv6: bool,
        filter: &DumpFilter,
        kept: &mut Vec<T>,
        mut keep: impl FnMut(Entry) -> Option<T>,
    ) -> Result<(), ConntrackError> {
        let before = kept.len();
        let mut filter = Some(filter);
        let mut lost = io::Error::from_raw_os_error(libc::ENOBUFS);
        let mut attempts = 0;
        while attempts < DUMP_ATTEMPTS {
            kept.truncate(before);
            match self.dump_once(ipv6, filter, kept, &mut keep) {
                Ok(()) => return Ok(()),
                Err(error) => match error.raw_os_error() {
                    Some(libc::ENOBUFS) => {
                        attempts += 1;
                        lost = error;
                    }
                    // The filter is a help only, and not every kernel takes every part of it.
                    Some(libc::EINVAL | libc::EOPNOTSUPP) if filter.is_some() => filter = None,
                    _ => return Err(error.into()),
                },
            }
        }
        Err(lost.into())
    }

    fn dump_once<T>(
        &mut self,
        ipv6: bool,
        filter: Option<&DumpFilter>,
        kept: &mut Vec<T>,
        keep: &mut impl FnMut(Entry) -> Option<T>,
    ) -> io::Result<()> {
        let request =
            |bytes: &mut Vec<u8>, sequence| codec::put_dump(bytes, ipv6, filter, sequence);
        self.exchange(request, 0, |answer| {
            match answer {
                Answer::Entry(entry) => kept.extend(keep(*entry)),
                Answer::Done(0) => return Some(Ok(())),
                Answer::Done(errno) | Answer::Errno(errno) => {
                    return Some(Err(io::Error::from_raw_os_error(errno)));
                }
                Answer::Other => {}
            }
            None
        })
    }

    /// Whether `keeper` has timeout policies. A kernel without the keeper has none.
    ///
    /// # Errors
    /// They cannot be listed.
    pub fn has_rules(&mut self, keeper: TimeoutRules) -> io::Result<bool> {
        let request =
            |bytes: &mut Vec<u8>, sequence| codec::put_rules_dump(bytes, keeper, sequence);
        let mut found = false;
        let listed = self.exchange(request, 0, |answer| match answer {
            Answer::Other | Answer::Entry(_) => {
                found = true;
                None
            }
            Answer::Done(0) => Some(Ok(())),
            Answer::Done(errno) | Answer::Errno(errno) => {
                Some(Err(io::Error::from_raw_os_error(errno)))
            }
        });
        match listed {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP)) => {
                Ok(false)
            }
            other => other.map(|()| found),
        }
    }

    /// The present entry with the addresses and the zone of `entry`; `None` if there is none.
    ///
    /// # Errors
    /// The netlink socket failed.
    pub fn lookup(&mut self, entry: &Entry) -> io::Result<Option<Entry>> {
        let request = |bytes: &mut Vec<u8>, sequence| codec::put_lookup(bytes, entry, sequence);
        let mut found = None;
        let result = self.exchange(request, libc::MSG_DONTWAIT, |answer| match answer {
            Answer::Entry(entry) => {
                found = Some(*entry);
                Some(Ok(()))
            }
            Answer::Errno(errno) | Answer::Done(errno) => {
                Some(Err(io::Error::from_raw_os_error(errno)))
            }
            Answer::Other => Some(Ok(())),
        });
        match result {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
            other => other.map(|()| found),
        }
    }

    /// Deletes `entry`, if it still has the id.
    ///
    /// # Errors
    /// The netlink socket failed, or the kernel refuses.
    pub fn delete(&mut self, entry: &Entry) -> io::Result<Delete> {
        let request = |bytes: &mut Vec<u8>, sequence| codec::put_delete(bytes, entry, sequence);
        let deleted = self.exchange(request, libc::MSG_DONTWAIT, |answer| match answer {
            Answer::Errno(0) => Some(Ok(())),
            Answer::Errno(errno) => Some(Err(io::Error::from_raw_os_error(errno))),
            Answer::Entry(_) | Answer::Done(_) | Answer::Other => None,
        });
        match deleted {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(Delete::Gone),
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(Delete::Offloaded),
            other => other.map(|()| Delete::Deleted),
        }
    }

    /// Sends a request, and gives each answer to it to `handle`, which returns the result when it has all. The kernel answers a single
    /// request inside send(), so with MSG_DONTWAIT in `flags` an answer that is not there was lost.
    fn exchange(
        &mut self,
        put: impl Fn(&mut Vec<u8>, u32),
        flags: i32,
        mut handle: impl FnMut(Answer) -> Option<io::Result<()>>,
    ) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut request = Vec::new();
        put(&mut request, self.sequence);
        self.socket.send(&request, 0)?;
        let mut overruns = Overruns::default();
        let mut is_lossy = false;
        loop {
            let length = match self
                .socket
                .recv(&mut &mut self.buffer[..], flags | libc::MSG_TRUNC)
            {
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Err(io::Error::from_raw_os_error(libc::ENOBUFS));
                }
                // The kernel goes on, so the rest must be read before the request is repeated.
                Err(error) => {
                    overruns.note(error)?;
                    is_lossy = true;
                    continue;
                }
            };
            // A longer datagram was cut.
            let datagram = self.buffer.get(..length);
            let datagram = datagram.ok_or_else(|| io::Error::from_raw_os_error(libc::EMSGSIZE))?;
            for (sequence, answer) in codec::answers(datagram) {
                if sequence != self.sequence {
                    continue;
                }
                match handle(answer) {
                    Some(Ok(())) if is_lossy => {
                        return Err(io::Error::from_raw_os_error(libc::ENOBUFS));
                    }
                    Some(result) => return result,
                    None => {}
                }
            }
        }
    }
}
