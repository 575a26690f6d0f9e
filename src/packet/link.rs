//! Sends segments to a neighbour on a link, below netfilter.
//!
//! A segment that a raw IP socket sends passes conntrack on its way out. On a NAT gateway conntrack then takes it for a connection of this
//! host, and gives it another source port (measured). A packet socket hands its packets to the device.

use std::io;
use std::os::fd::AsFd;

use socket2::{Domain, Socket, Type};

use crate::sys::link::{LinkDestination, send_to_link};
use crate::tcp::Segment;

pub struct LinkSender {
    socket: Socket,
}

impl LinkSender {
    /// Opens the packet socket. It receives nothing.
    ///
    /// # Errors
    /// EPERM: needs CAP_NET_RAW over the network namespace. EAFNOSUPPORT: the kernel lacks CONFIG_PACKET.
    pub fn open() -> io::Result<Self> {
        Ok(LinkSender {
            socket: Socket::new(Domain::PACKET, Type::DGRAM, None)?,
        })
    }

    /// Sends a segment to the neighbour.
    ///
    /// # Errors
    /// The errno of sendto(2). EINVAL: the addresses of the segment are of different families.
    pub fn send(&self, segment: &Segment, to: LinkDestination) -> io::Result<()> {
        let packet = segment
            .encode()
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
        let ether_type = match segment.to.is_ipv4() {
            true => libc::ETH_P_IP,
            false => libc::ETH_P_IPV6,
        };
        let ether_type = u16::try_from(ether_type).expect("an Ethernet type has 16 bits");
        send_to_link(self.socket.as_fd(), &packet, ether_type, to)
    }
}
