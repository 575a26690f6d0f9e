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

use nix::sys::socket::{MsgFlags, MultiHeaders, SockaddrStorage, sendmmsg};
use socket2::{Domain, Protocol, Socket, Type};

use crate::injector::same_errno;
use crate::sys;
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

/// Why a packet is not on its way.
#[derive(Debug)]
pub enum SendError {
    /// There is no raw socket. EPERM: needs CAP_NET_RAW over the network namespace.
    Open(io::Error),
    /// The kernel refused the packet. EPERM: netfilter dropped it in its output hook.
    Send(io::Error),
}

/// Raw sockets of both families, opened at first use, one for each bound interface.
#[derive(Default)]
pub struct RawSockets(HashMap<(bool, u32), Socket>);

impl RawSockets {
    /// Sends each packet; one result each, in order. Nothing waits: what has no room is refused
    /// (EAGAIN), as packets to a neighbour that does not answer ARP soon are.
    pub fn send(&mut self, packets: &[Outgoing]) -> Vec<Result<(), SendError>> {
        let mut results: Vec<Result<(), SendError>> = packets.iter().map(|_| Ok(())).collect();
        let mut groups: HashMap<(bool, u32), Vec<usize>> = HashMap::new();
        for (at, packet) in packets.iter().enumerate() {
            let key = (packet.segment.to.is_ipv6(), packet.interface);
            groups.entry(key).or_default().push(at);
        }
        for (key, group) in groups {
            match self.socket(key) {
                Ok(socket) => {
                    for group in group.chunks(BATCH) {
                        send_batch(socket, packets, group, &mut results);
                    }
                }
                Err(error) => {
                    for at in group {
                        results[at] = Err(SendError::Open(same_errno(&error)));
                    }
                }
            }
        }
        results
    }

    fn socket(&mut self, key: (bool, u32)) -> io::Result<&Socket> {
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

/// Sends the packets at the places `group`, and notes the result of each.
fn send_batch(
    socket: &Socket,
    packets: &[Outgoing],
    group: &[usize],
    results: &mut [Result<(), SendError>],
) {
    let bytes: Vec<Vec<u8>> = group
        .iter()
        .map(|&at| packets[at].segment.encode().unwrap_or_default())
        .collect();
    let slices: Vec<[IoSlice; 1]> = bytes.iter().map(|bytes| [IoSlice::new(bytes)]).collect();
    let addresses: Vec<Option<SockaddrStorage>> = group
        .iter()
        .map(|&at| Some(destination(&packets[at]).into()))
        .collect();
    let mut sent = 0;
    while sent < group.len() {
        let mut headers = MultiHeaders::preallocate(group.len() - sent, None);
        let result = sendmmsg(
            socket.as_raw_fd(),
            &mut headers,
            &slices[sent..],
            &addresses[sent..],
            [],
            MsgFlags::MSG_DONTWAIT,
        );
        match result {
            // It stopped in front of one that fails; the next call starts with that and says why.
            Ok(done) => sent += done.count(),
            Err(nix::errno::Errno::EINTR) => {}
            Err(errno) => {
                results[group[sent]] = Err(SendError::Send(errno.into()));
                sent += 1;
            }
        }
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
