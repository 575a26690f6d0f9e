//! A packet socket that sees this host's own ACKs on their way out, through a filter in the kernel.
//!
//! Only taps for all protocols see outgoing packets (net/core/dev.c, dev_queue_xmit_nit). SOCK_DGRAM
//! starts every packet at its IP header, whatever the link layer is. A packet is seen once on every
//! device it passes (VLAN, bridge), and not at all while its neighbour has not answered ARP.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::sys::socket::{LinkAddr, recvfrom};
use socket2::{Domain, Protocol, SockFilter, Socket, Type};

use crate::tcp::{Segment, Tuple, segment};

/// Ports a filter can name, two instructions each: the whole fits net.core.optmem_max, which was
/// 20480 bytes before Linux 6.8, also after the kernel's translation (net/core/filter.c).
pub const MAX_PORTS: usize = 512;
/// Longer packets carry data. IP and TCP headers take 60 bytes each, and IPv6 extension headers some.
const LONGEST: u32 = 256;

/// Receive queue that is asked for, in bytes.
const RECEIVE_QUEUE: usize = 4 * 1024 * 1024;

/// The socket.
pub struct Capture {
    socket: Socket,
}

impl Capture {
    /// Opens it; it sees everything until [`Capture::watch`].
    ///
    /// # Errors
    /// EPERM: needs CAP_NET_RAW over the network namespace. EAFNOSUPPORT: no CONFIG_PACKET.
    pub fn open() -> io::Result<Self> {
        let all = i32::from(u16::try_from(libc::ETH_P_ALL).expect("it is 3").to_be());
        let protocol = Protocol::from(all);
        let socket = Socket::new(Domain::PACKET, Type::DGRAM, Some(protocol))?;
        socket.set_nonblocking(true)?;
        // Less than asked for loses answers on a busy host, which are then asked for again.
        let _ = socket.set_recv_buffer_size(RECEIVE_QUEUE);
        Ok(Capture { socket })
    }

    /// Lets through only bare ACKs of these connections' ports, and forgets what came before.
    ///
    /// # Errors
    /// ENOMEM: net.core.optmem_max is too small for the filter.
    pub fn watch(&self, connections: &[Tuple]) -> io::Result<()> {
        self.socket.attach_filter(&program(connections))?;
        self.drain(|_| {})
    }

    /// Hands over the segments that have been seen since the last call, without waiting.
    ///
    /// # Errors
    /// Those of recvfrom(2); that a device went down is none.
    pub fn drain(&self, mut see: impl FnMut(Segment)) -> io::Result<()> {
        let mut buffer = [0; LONGEST as usize];
        loop {
            match recvfrom::<LinkAddr>(self.socket.as_raw_fd(), &mut buffer) {
                Ok((length, Some(address))) => {
                    let ether_type = u16::from_be(address.protocol());
                    if let Ok(segment) = segment::parse(ether_type, &buffer[..length]) {
                        see(segment);
                    }
                }
                Ok((_, None)) | Err(Errno::EINTR | Errno::ENETDOWN) => {}
                Err(Errno::EAGAIN) => return Ok(()),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

/// The filter, in classic BPF: a TCP segment on its way out, of the kind bare ACK, from one of the
/// local ports or to one of the peer ports of `connections`, whichever are more: many different ports say
/// more about a segment than the one port of a busy server. What has IPv6
/// extension headers, which it cannot walk, is let through.
fn program(connections: &[Tuple]) -> Vec<SockFilter> {
    /// Places in the program.
    const V6: usize = 13;
    const TCP: usize = 21;
    const DROP: usize = 26;
    const ACCEPT: usize = 27;
    const PORTS: usize = 28;

    let local: BTreeSet<u16> = connections.iter().map(|t| t.local.port()).collect();
    let peer: BTreeSet<u16> = connections.iter().map(|t| t.peer.port()).collect();
    let (ports, offset) = if local.len() > peer.len() {
        (local, 0)
    } else {
        (peer, 2)
    };
    debug_assert!(ports.len() <= MAX_PORTS);

    let mut code = Assembler(Vec::with_capacity(PORTS + ports.len() * 2 + 1));
    // Negative offsets are not into the packet but into what the kernel knows about it.
    let packet_type = (libc::SKF_AD_OFF + libc::SKF_AD_PKTTYPE).cast_unsigned();
    code.load(libc::BPF_W | libc::BPF_ABS, packet_type);
    code.jump(libc::BPF_JEQ, u32::from(libc::PACKET_OUTGOING), NEXT, DROP);
    code.load(libc::BPF_W | libc::BPF_LEN, 0);
    code.jump(libc::BPF_JGT, LONGEST, DROP, NEXT);
    code.load(libc::BPF_B | libc::BPF_ABS, 0);
    code.put(libc::BPF_ALU | libc::BPF_RSH | libc::BPF_K, 4);
    code.jump(libc::BPF_JEQ, 4, NEXT, V6);
    // IPv4: protocol, no fragment, X = length of the header.
    code.load(libc::BPF_B | libc::BPF_ABS, 9);
    code.jump(libc::BPF_JEQ, PROTOCOL_TCP, NEXT, DROP);
    code.load(libc::BPF_H | libc::BPF_ABS, 6);
    code.jump(libc::BPF_JSET, 0x3fff, DROP, NEXT);
    code.put(libc::BPF_LDX | libc::BPF_B | libc::BPF_MSH, 0);
    code.jump(libc::BPF_JA, 0, TCP, TCP);
    // IPv6: next header, X = 40.
    assert_eq!(code.0.len(), V6);
    code.jump(libc::BPF_JEQ, 6, NEXT, DROP);
    code.load(libc::BPF_B | libc::BPF_ABS, 6);
    code.jump(libc::BPF_JEQ, PROTOCOL_TCP, TCP - 1, NEXT);
    code.jump(libc::BPF_JEQ, 0, ACCEPT, NEXT);
    code.jump(libc::BPF_JEQ, 43, ACCEPT, NEXT);
    code.jump(libc::BPF_JEQ, 51, ACCEPT, NEXT);
    code.jump(libc::BPF_JEQ, 60, ACCEPT, DROP);
    code.put(libc::BPF_LDX | libc::BPF_IMM, 40);
    // TCP at X: of FIN, SYN, RST and ACK only the last.
    assert_eq!(code.0.len(), TCP);
    code.load(libc::BPF_B | libc::BPF_IND, 13);
    code.put(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, 0x17);
    code.jump(libc::BPF_JEQ, 0x10, NEXT, DROP);
    code.load(libc::BPF_H | libc::BPF_IND, offset);
    code.jump(libc::BPF_JA, 0, PORTS, PORTS);
    assert_eq!(code.0.len(), DROP);
    code.put(libc::BPF_RET | libc::BPF_K, 0);
    code.put(libc::BPF_RET | libc::BPF_K, LONGEST);
    // A jump goes 255 instructions far at most, so every port has its own way out.
    for port in ports {
        let after = code.0.len() + 2;
        code.jump(libc::BPF_JEQ, u32::from(port), NEXT, after);
        code.put(libc::BPF_RET | libc::BPF_K, LONGEST);
    }
    code.put(libc::BPF_RET | libc::BPF_K, 0);
    code.0
}

const PROTOCOL_TCP: u32 = 6;
/// The instruction after a jump.
const NEXT: usize = usize::MAX;

/// Writes instructions with places instead of distances.
struct Assembler(Vec<SockFilter>);

impl Assembler {
    fn put(&mut self, code: u32, k: u32) {
        self.push(code, 0, 0, k);
    }

    fn load(&mut self, code: u32, k: u32) {
        self.put(libc::BPF_LD | code, k);
    }

    /// Jumps to `yes` or `no`, both further on.
    fn jump(&mut self, condition: u32, k: u32, yes: usize, no: usize) {
        let here = self.0.len();
        let distance = |place| match place {
            NEXT => 0,
            place => u8::try_from(place - here - 1).expect("the head is short"),
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
