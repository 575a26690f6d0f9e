//! Sending a packet to a link layer address (packet(7)), which nix and rustix offer only through addresses that cannot be built.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Room for a hardware address in `struct sockaddr_ll`.
pub const MAX_HARDWARE_LEN: usize = 8;

/// The next hop of a packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkDestination {
    /// The index of the interface.
    pub interface: u32,
    /// The hardware address of the neighbour, and how many of its bytes count: none for an interface without such addresses.
    pub hardware: [u8; MAX_HARDWARE_LEN],
    pub hardware_len: u8,
}

/// Sends an IP packet to `to` by a packet socket of type SOCK_DGRAM. The kernel writes the header of the link layer. Does not wait.
///
/// # Errors
/// ENXIO, ENODEV: there is no such interface. ENETDOWN: it is down. EAGAIN, ENOBUFS: its queue is full. EMSGSIZE: the packet is longer
/// than its MTU.
pub fn send_to_link(
    socket: BorrowedFd<'_>,
    packet: &[u8],
    ether_type: u16,
    to: LinkDestination,
) -> io::Result<()> {
    let family = u16::try_from(libc::AF_PACKET).expect("it is 17");
    let address = libc::sockaddr_ll {
        sll_family: family,
        sll_protocol: ether_type.to_be(),
        sll_ifindex: to.interface.cast_signed(),
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: to.hardware_len.min(8),
        sll_addr: to.hardware,
    };
    // SAFETY: the pointers and lengths describe `packet` and `address`, which live until the call returns, and which the kernel only
    // reads.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            packet.as_ptr().cast(),
            packet.len(),
            libc::MSG_DONTWAIT,
            (&raw const address).cast(),
            ADDRESS_LEN,
        )
    };
    match sent {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[expect(clippy::cast_possible_truncation, reason = "20 fits")]
const ADDRESS_LEN: libc::socklen_t = mem::size_of::<libc::sockaddr_ll>() as libc::socklen_t;
