//! Raw sockets: puts whole IP packets on their way, many in one system call.
//!
//! IPPROTO_RAW means that the header is ours, in both families (raw(7)). A packet to an address of this
//! host leaves by `lo` and keeps the route it got there, so neither the reverse path filter nor the
//! martian check sees its foreign source address (net/ipv4/ip_input.c, ip_rcv_finish_core: only a
//! packet without a route is looked up).

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::io::{self, IoSlice};
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, MultiHeaders, SockaddrStorage, sendmmsg};
use socket2::{Domain, Protocol, Socket, Type};

use crate::sys::{self, errno_of};
use crate::tcp::Segment;

/// Packets in one system call.
const BATCH: usize = 64;

/// asm-generic/socket.h, since Linux 5.1; not in the libc crate.
const SO_BINDTOIFINDEX: i32 = 62;

/// A segment and the interface it belongs to, 0 for any.
#[derive(Clone, Copy, Debug)]
pub struct Outgoing {
    /// The segment.
    pub segment: Segment,
    /// Index of the interface its socket is bound to.
    pub interface: u32,
}

/// Why a packet was not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SendError {
    /// There is no raw socket. EPERM: needs CAP_NET_RAW over the network namespace.
    Open(Errno),
    /// The kernel refused the packet. EPERM: netfilter dropped it in its output hook.
    Send(Errno),
}

/// The family of a socket (IPv6 or not) and the interface it is bound to, 0 for none.
type SocketKey = (bool, u32);

/// Raw sockets of both families, opened at first use, one for each bound interface.
#[derive(Default)]
pub struct RawSockets(HashMap<SocketKey, Socket>);

impl RawSockets {
    /// Sends each packet and returns what it was for with the result. Nothing waits: a packet without room is refused (EAGAIN), as
    /// are packets to a neighbour that does not answer ARP soon.
    pub fn send<T>(&mut self, packets: Vec<(T, Outgoing)>) -> Vec<(T, Result<(), SendError>)> {
        let mut results = Vec::with_capacity(packets.len());
        let mut groups: HashMap<SocketKey, Vec<(T, Outgoing)>> = HashMap::new();
        for (item, packet) in packets {
            let key = (packet.segment.to.is_ipv6(), packet.interface);
            groups.entry(key).or_default().push((item, packet));
        }
        for (key, mut group) in groups {
            match self.socket(key) {
                Ok(socket) => {
                    while !group.is_empty() {
                        let rest = group.split_off(group.len().min(BATCH));
                        send_batch(socket, group, &mut results);
                        group = rest;
                    }
                }
                Err(error) => {
                    let failure = SendError::Open(errno_of(&error));
                    let fail = |(item, _)| (item, Err(failure));
                    results.extend(group.into_iter().map(fail));
                }
            }
        }
        results
    }

    fn socket(&mut self, key: SocketKey) -> io::Result<&Socket> {
        match self.0.entry(key) {
            Entry::Occupied(open) => Ok(open.into_mut()),
            Entry::Vacant(place) => Ok(place.insert(open(key.0, key.1)?)),
        }
    }
}

/// Whether such a socket can be had.
///
/// # Errors
/// EPERM: needs CAP_NET_RAW over the network namespace. EAFNOSUPPORT: no IPv6 in this kernel.
pub fn try_open(ipv6: bool) -> io::Result<()> {
    open(ipv6, 0).map(drop)
}

fn open(ipv6: bool, interface: u32) -> io::Result<Socket> {
    let domain = if ipv6 { Domain::IPV6 } else { Domain::IPV4 };
    let protocol = Protocol::from(libc::IPPROTO_RAW);
    let socket = Socket::new(domain, Type::RAW, Some(protocol))?;
    if interface != 0 {
        // A bound connection only takes what comes in by its interface; for a packet to ourselves that
        // is the interface it was routed by.
        sys::set_socket_option(
            socket.as_fd(),
            libc::SOL_SOCKET,
            SO_BINDTOIFINDEX,
            interface.cast_signed(),
        )?;
    }
    Ok(socket)
}

/// Sends the packets of `batch`, and adds the result of each.
fn send_batch<T>(
    socket: &Socket,
    batch: Vec<(T, Outgoing)>,
    results: &mut Vec<(T, Result<(), SendError>)>,
) {
    let bytes: Vec<Vec<u8>> = batch
        .iter()
        .map(|(_, packet)| packet.segment.encode().unwrap_or_default())
        .collect();
    let slices: Vec<[IoSlice; 1]> = bytes.iter().map(|bytes| [IoSlice::new(bytes)]).collect();
    let addresses: Vec<Option<SockaddrStorage>> = batch
        .iter()
        .map(|(_, packet)| Some(destination(packet).into()))
        .collect();
    let mut unsent = batch.into_iter().map(|(item, _)| item);
    let mut sent = 0;
    while sent < slices.len() {
        let mut headers = MultiHeaders::preallocate(slices.len() - sent, None);
        let result = sendmmsg(
            socket.as_raw_fd(),
            &mut headers,
            &slices[sent..],
            &addresses[sent..],
            [],
            MsgFlags::MSG_DONTWAIT,
        );
        let (count, result) = match result {
            // It stopped in front of one that fails; the next call starts with that and says why.
            Ok(done) => (done.count(), Ok(())),
            Err(Errno::EINTR) => continue,
            Err(errno) => (1, Err(SendError::Send(errno))),
        };
        results.extend(unsent.by_ref().take(count).map(|item| (item, result)));
        sent += count;
    }
}

/// Where the socket sends it: the port must be 0 or the protocol (net/ipv6/raw.c, rawv6_sendmsg), and
/// a link-local address means nothing without its interface.
fn destination(packet: &Outgoing) -> SocketAddr {
    match packet.segment.to.ip() {
        IpAddr::V4(ip) => SocketAddr::new(ip.into(), 0),
        IpAddr::V6(ip) => SocketAddrV6::new(ip, 0, 0, packet.interface).into(),
    }
}
