//! Raw sockets: send whole IP packets, many per system call.
//!
//! With IPPROTO_RAW the sender writes the IP header, in both families (raw(7)). A packet to an address of this host leaves through
//! `lo` and keeps its route. The kernel looks up only packets without a route (net/ipv4/ip_input.c, ip_rcv_finish_core), so neither
//! the reverse path filter nor the martian check refuses the foreign source address.

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

/// Packets per sendmmsg(2).
const PACKETS_PER_CALL: usize = 64;

/// asm-generic/socket.h, since Linux 5.1. The libc crate does not have it.
const SO_BINDTOIFINDEX: i32 = 62;

/// A segment to send.
#[derive(Clone, Copy, Debug)]
pub struct Outgoing {
    pub segment: Segment,
    /// Index of the interface that the target is bound to, 0 for none.
    pub interface: u32,
}

/// Why a packet was not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SendError {
    /// cwkill cannot open a raw socket. EPERM: needs CAP_NET_RAW over the network namespace.
    Open(Errno),
    /// The kernel refused the packet. EPERM: netfilter dropped it in its output hook.
    Send(Errno),
}

/// Whether a raw socket is IPv6, and the interface that it is bound to, 0 for none.
type Binding = (bool, u32);

/// Raw sockets of both families, one per bound interface, opened at first use.
#[derive(Default)]
pub struct RawSockets(HashMap<Binding, Socket>);

impl RawSockets {
    /// Sends each packet, and returns its item with the result. The call does not wait: if the send queue is full, the kernel
    /// refuses the packet (EAGAIN). The queue also fills with packets to a neighbour that has not answered ARP.
    pub fn send<T>(&mut self, packets: Vec<(T, Outgoing)>) -> Vec<(T, Result<(), SendError>)> {
        let mut results = Vec::with_capacity(packets.len());
        let mut by_socket: HashMap<Binding, Vec<(T, Outgoing)>> = HashMap::new();
        for (item, packet) in packets {
            let key = (packet.segment.to.is_ipv6(), packet.interface);
            by_socket.entry(key).or_default().push((item, packet));
        }
        for (key, mut packets) in by_socket {
            match self.socket(key) {
                Ok(socket) => {
                    while !packets.is_empty() {
                        let rest = packets.split_off(packets.len().min(PACKETS_PER_CALL));
                        send_batch(socket, packets, &mut results);
                        packets = rest;
                    }
                }
                Err(error) => {
                    let failure = SendError::Open(errno_of(&error));
                    let fail = |(item, _)| (item, Err(failure));
                    results.extend(packets.into_iter().map(fail));
                }
            }
        }
        results
    }

    fn socket(&mut self, key: Binding) -> io::Result<&Socket> {
        match self.0.entry(key) {
            Entry::Occupied(open) => Ok(open.into_mut()),
            Entry::Vacant(entry) => Ok(entry.insert(open(key.0, key.1)?)),
        }
    }
}

/// Checks that cwkill can open a raw socket.
///
/// # Errors
/// EPERM: needs CAP_NET_RAW over the network namespace. EAFNOSUPPORT: the kernel has no IPv6.
pub fn try_open(ipv6: bool) -> io::Result<()> {
    open(ipv6, 0).map(drop)
}

fn open(ipv6: bool, interface: u32) -> io::Result<Socket> {
    let domain = if ipv6 { Domain::IPV6 } else { Domain::IPV4 };
    let protocol = Protocol::from(libc::IPPROTO_RAW);
    let socket = Socket::new(domain, Type::RAW, Some(protocol))?;
    if interface != 0 {
        // A bound connection accepts only packets that arrive on its interface. For a packet to this host that is the interface of
        // its route.
        sys::set_socket_option(
            socket.as_fd(),
            libc::SOL_SOCKET,
            SO_BINDTOIFINDEX,
            interface.cast_signed(),
        )?;
    }
    Ok(socket)
}

/// Sends the packets of `batch` and appends their results.
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
            // sendmmsg(2) stops before a packet that fails. The next call starts with that packet and reports the errno.
            Ok(done) => (done.count(), Ok(())),
            Err(Errno::EINTR) => continue,
            Err(errno) => (1, Err(SendError::Send(errno))),
        };
        results.extend(unsent.by_ref().take(count).map(|item| (item, result)));
        sent += count;
    }
}

/// The address for sendmmsg(2). The port must be 0 or the protocol (net/ipv6/raw.c, rawv6_sendmsg). A link-local address needs its
/// interface.
fn destination(packet: &Outgoing) -> SocketAddr {
    match packet.segment.to.ip() {
        IpAddr::V4(ip) => SocketAddr::new(ip.into(), 0),
        IpAddr::V6(ip) => SocketAddrV6::new(ip, 0, 0, packet.interface).into(),
    }
}
