//! A packet socket that captures the ACKs that leave this host, or the answers that arrive at it, through a filter in the kernel.
//!
//! Only a packet socket for all protocols sees outgoing packets (net/core/dev.c, dev_queue_xmit_nit). With SOCK_DGRAM every packet
//! starts at its IP header, whatever the link layer is. The socket sees a packet once per device that it passes (VLAN, bridge). It
//! does not see a packet that still waits for an ARP answer.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;
use nix::sys::socket::{LinkAddr, recvfrom};
use socket2::{Domain, Protocol, SockFilter, Socket, Type};

use crate::sys;
use crate::tcp::{Segment, Tuple, segment};

/// The maximum number of ports in a filter. A port takes two instructions. The whole filter must fit net.core.optmem_max (20480 bytes
/// before Linux 6.8), also after the kernel has translated it (net/core/filter.c).
pub const MAX_PORTS: usize = 512;
/// A longer packet carries data. IP and TCP headers take up to 60 bytes each, and IPv6 extension headers some more. Of longer packets that
/// count all the same, as a SYN with data (TCP Fast Open), only this much is read.
const MAX_PACKET_BYTES: u32 = 256;

/// The requested size of the receive queue, in bytes. A short packet takes some 800 of them. Without CAP_NET_ADMIN the kernel limits it to
/// net.core.rmem_max.
const RECEIVE_QUEUE: i32 = 16 * 1024 * 1024;

pub struct Capture {
    socket: Socket,
}

/// The segments that a filter lets through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// Bare ACKs that leave this host.
    Leaving,
    /// Bare ACKs, RSTs and SYNs that arrive at this host, also those that it forwards. They are seen before netfilter.
    Arriving,
}

impl Capture {
    /// Opens the packet socket. Until [`Capture::filter_for`] it has no filter.
    ///
    /// # Errors
    /// EPERM: needs CAP_NET_RAW over the network namespace. EAFNOSUPPORT: the kernel lacks CONFIG_PACKET.
    pub fn open() -> io::Result<Self> {
        let all = i32::from(u16::try_from(libc::ETH_P_ALL).expect("it is 3").to_be());
        let protocol = Protocol::from(all);
        let socket = Socket::new(Domain::PACKET, Type::DGRAM, Some(protocol))?;
        socket.set_nonblocking(true)?;
        // With a smaller queue, answers can be lost on a busy host. cwkill then asks again.
        for name in [libc::SO_RCVBUF, libc::SO_RCVBUFFORCE] {
            let _ = sys::set_socket_option(socket.as_fd(), libc::SOL_SOCKET, name, RECEIVE_QUEUE);
        }
        Ok(Capture { socket })
    }

    /// Captures only segments with the ports of these connections from now on, and drops all earlier packets.
    ///
    /// # Errors
    /// ENOMEM: net.core.optmem_max is too small for the filter.
    pub fn filter_for(&self, seen: Seen, connections: &[Tuple]) -> io::Result<()> {
        self.socket.attach_filter(&program(seen, connections))?;
        self.drain(|_| {})?;
        self.has_lost();
        Ok(())
    }

    /// Whether the queue has overflowed since the last call, so that packets are missing.
    pub fn has_lost(&self) -> bool {
        // `struct tpacket_stats`: packets and drops. The kernel sets both to 0 when it is read.
        let mut counts = [0; 8];
        let read = sys::socket_option_bytes(
            self.socket.as_fd(),
            libc::SOL_PACKET,
            libc::PACKET_STATISTICS,
            &mut counts,
        );
        read.is_ok_and(|counts| counts.iter().skip(4).any(|byte| *byte != 0))
    }

    /// Calls `handle` with each segment captured since the last call. Does not wait.
    ///
    /// # Errors
    /// recvfrom(2) failed. A device that went down (ENETDOWN) is not an error.
    pub fn drain(&self, mut handle: impl FnMut(Segment)) -> io::Result<()> {
        let mut buffer = [0; MAX_PACKET_BYTES as usize];
        loop {
            match recvfrom::<LinkAddr>(self.socket.as_raw_fd(), &mut buffer) {
                Ok((length, Some(address))) => {
                    let ether_type = u16::from_be(address.protocol());
                    if let Ok(segment) = segment::parse(ether_type, &buffer[..length]) {
                        handle(segment);
                    }
                }
                Ok((_, None)) | Err(Errno::EINTR | Errno::ENETDOWN) => {}
                Err(Errno::EAGAIN) => return Ok(()),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

/// The filter, in classic BPF. It accepts what is to be `seen` from the local ports of `connections`, or to their peer ports.
///
/// It compares the side with more different ports, because these select better than the one port of a busy server. The filter
/// cannot parse IPv6 extension headers, so it accepts every packet that has some.
fn program(seen: Seen, connections: &[Tuple]) -> Vec<SockFilter> {
    // Indexes of instructions.
    const V6: usize = 11;
    const TCP: usize = 19;
    const LENGTH: usize = 23;
    const PORT: usize = 25;
    const DROP: usize = 27;
    const ACCEPT: usize = 28;
    const PORTS: usize = 29;

    let local: BTreeSet<u16> = connections.iter().map(|t| t.local.port()).collect();
    let peer: BTreeSet<u16> = connections.iter().map(|t| t.peer.port()).collect();
    let (ports, offset) = if local.len() > peer.len() {
        (local, 0)
    } else {
        (peer, 2)
    };
    debug_assert!(ports.len() <= MAX_PORTS);

    let mut code = Assembler(Vec::with_capacity(PORTS + ports.len() * 2 + 1));
    // A negative offset addresses metadata of the kernel, not the packet.
    let packet_type = (libc::SKF_AD_OFF + libc::SKF_AD_PKTTYPE).cast_unsigned();
    code.load(libc::BPF_W | libc::BPF_ABS, packet_type);
    let (leaving, arriving, rst) = match seen {
        Seen::Leaving => (NEXT, DROP, DROP),
        Seen::Arriving => (DROP, NEXT, NEXT),
    };
    code.jump(
        libc::BPF_JEQ,
        u32::from(libc::PACKET_OUTGOING),
        leaving,
        arriving,
    );
    code.load(libc::BPF_B | libc::BPF_ABS, 0);
    code.put(libc::BPF_ALU | libc::BPF_RSH | libc::BPF_K, 4);
    code.jump(libc::BPF_JEQ, 4, NEXT, V6);
    // IPv4: check the protocol, refuse fragments, set X to the length of the header.
    code.load(libc::BPF_B | libc::BPF_ABS, 9);
    code.jump(libc::BPF_JEQ, PROTOCOL_TCP, NEXT, DROP);
    code.load(libc::BPF_H | libc::BPF_ABS, 6);
    code.jump(libc::BPF_JSET, 0x3fff, DROP, NEXT);
    code.put(libc::BPF_LDX | libc::BPF_B | libc::BPF_MSH, 0);
    code.jump(libc::BPF_JA, 0, TCP, TCP);
    // IPv6: check the next header, set X to 40.
    assert_eq!(code.0.len(), V6);
    code.jump(libc::BPF_JEQ, 6, NEXT, DROP);
    code.load(libc::BPF_B | libc::BPF_ABS, 6);
    code.jump(libc::BPF_JEQ, PROTOCOL_TCP, TCP - 1, NEXT);
    code.jump(libc::BPF_JEQ, 0, ACCEPT, NEXT);
    code.jump(libc::BPF_JEQ, 43, ACCEPT, NEXT);
    code.jump(libc::BPF_JEQ, 51, ACCEPT, NEXT);
    code.jump(libc::BPF_JEQ, 60, ACCEPT, DROP);
    code.put(libc::BPF_LDX | libc::BPF_IMM, 40);
    // TCP at X: of FIN, SYN, RST and ACK, only ACK is set, and there is little data; or perhaps SYN or RST, whatever the length.
    assert_eq!(code.0.len(), TCP);
    code.load(libc::BPF_B | libc::BPF_IND, 13);
    code.put(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, 0x17);
    code.jump(libc::BPF_JEQ, 0x10, LENGTH, rst);
    code.jump(libc::BPF_JSET, 0x06, PORT, DROP);
    assert_eq!(code.0.len(), LENGTH);
    code.load(libc::BPF_W | libc::BPF_LEN, 0);
    code.jump(libc::BPF_JGT, MAX_PACKET_BYTES, DROP, NEXT);
    assert_eq!(code.0.len(), PORT);
    code.load(libc::BPF_H | libc::BPF_IND, offset);
    code.jump(libc::BPF_JA, 0, PORTS, PORTS);
    assert_eq!(code.0.len(), DROP);
    code.put(libc::BPF_RET | libc::BPF_K, 0);
    code.put(libc::BPF_RET | libc::BPF_K, MAX_PACKET_BYTES);
    // A jump spans at most 255 instructions, so every port has its own return.
    for port in ports {
        let after = code.0.len() + 2;
        code.jump(libc::BPF_JEQ, u32::from(port), NEXT, after);
        code.put(libc::BPF_RET | libc::BPF_K, MAX_PACKET_BYTES);
    }
    code.put(libc::BPF_RET | libc::BPF_K, 0);
    code.0
}

const PROTOCOL_TCP: u32 = 6;
/// The instruction after a jump.
const NEXT: usize = usize::MAX;

/// Writes instructions whose jumps name the index of their target instead of a distance.
struct Assembler(Vec<SockFilter>);

impl Assembler {
    fn put(&mut self, code: u32, k: u32) {
        self.push(code, 0, 0, k);
    }

    fn load(&mut self, code: u32, k: u32) {
        self.put(libc::BPF_LD | code, k);
    }

    /// Jumps forward to instruction `yes` or `no`.
    fn jump(&mut self, condition: u32, k: u32, yes: usize, no: usize) {
        let here = self.0.len();
        let distance = |target| match target {
            NEXT => 0,
            target => u8::try_from(target - here - 1).expect("the head is short"),
        };
        let (yes, no) = (distance(yes), distance(no));
        match condition {
            libc::BPF_JA => self.put(libc::BPF_JMP | libc::BPF_JA, u32::from(yes)),
            _ => self.push(libc::BPF_JMP | condition | libc::BPF_K, yes, no, k),
        }
    }

    fn push(&mut self, code: u32, yes: u8, no: u8, k: u32) {
        let code = u16::try_from(code).expect("operation codes are 16 bits");
        self.0.push(SockFilter::new(code, yes, no, k));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::tcp::{Seq, TcpFlags};

    /// The packet of a segment with these flags and this many bytes of data.
    fn packet(from: &str, to: &str, flags: u8, data: usize) -> Vec<u8> {
        let segment = Segment {
            from: from.parse().unwrap(),
            to: to.parse().unwrap(),
            seq: Seq(1),
            ack: Seq(2),
            flags,
            payload_len: 0,
        };
        let mut bytes = segment.encode().unwrap();
        bytes.resize(bytes.len() + data, 7);
        bytes
    }

    /// How much of a packet the filter lets through. The kernel runs the filter, on a socket that needs no privilege: there each packet
    /// is one that arrives.
    fn let_through(seen: Seen, packet: &[u8]) -> Option<usize> {
        let view = Tuple {
            local: "10.9.1.2:4000".parse().unwrap(),
            peer: "10.9.2.2:80".parse().unwrap(),
        };
        let (sender, receiver) = Socket::pair(Domain::UNIX, Type::DGRAM, None).unwrap();
        receiver.attach_filter(&program(seen, &[view])).unwrap();
        receiver
            .set_read_timeout(Some(Duration::from_millis(1)))
            .unwrap();
        sender.send(packet).unwrap();
        let mut buffer = [0; 2048];
        let length = std::io::Read::read(&mut &receiver, &mut buffer);
        length.ok()
    }

    #[test]
    fn answers_and_every_syn_are_seen() {
        const SYN_ACK: u8 = TcpFlags::SYN | TcpFlags::ACK;
        const RST_ACK: u8 = TcpFlags::RST | TcpFlags::ACK;
        const PSH_ACK: u8 = TcpFlags::PSH | TcpFlags::ACK;
        const FIN_ACK: u8 = TcpFlags::FIN | TcpFlags::ACK;
        for (flags, data, is_seen) in [
            (TcpFlags::ACK, 0, true),
            (PSH_ACK, 20, true),
            (PSH_ACK, 1000, false),
            (TcpFlags::RST, 0, true),
            (RST_ACK, 1000, true),
            (TcpFlags::SYN, 0, true),
            (SYN_ACK, 0, true),
            // TCP Fast Open.
            (TcpFlags::SYN, 1000, true),
            (SYN_ACK, 1000, true),
            (FIN_ACK, 0, false),
        ] {
            for (from, to) in [
                ("10.9.1.2:4000", "10.9.2.2:80"),
                ("[fd00::1]:4000", "[fd00::2]:80"),
            ] {
                let packet = packet(from, to, flags, data);
                let seen = let_through(Seen::Arriving, &packet);
                let expected = is_seen.then_some(packet.len().min(256));
                assert_eq!(seen, expected, "{flags:#x} {data} {from}");
            }
        }
        let foreign = packet("10.9.1.2:4000", "10.9.2.2:81", TcpFlags::SYN, 0);
        assert_eq!(let_through(Seen::Arriving, &foreign), None);
        let leaving = packet("10.9.1.2:4000", "10.9.2.2:80", TcpFlags::ACK, 0);
        assert_eq!(let_through(Seen::Leaving, &leaving), None);
    }

    /// Of a packet that was cut, the head is enough.
    #[test]
    fn the_head_of_a_long_syn_is_a_segment() {
        let long = packet("10.9.1.2:4000", "10.9.2.2:80", TcpFlags::SYN, 1000);
        let ether_type = u16::try_from(libc::ETH_P_IP).unwrap();
        let parsed = segment::parse(ether_type, &long[..256]).unwrap();
        assert_eq!(parsed.flags, TcpFlags::SYN);
    }
}
