//! The path of a packet from this host to another one: the interface, and the hardware address of the neighbour.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use nix::errno::Errno;

use super::path_codec::{self as codec, Answer};
use crate::sys::errno_of;
use crate::sys::link::{LinkDestination, MAX_HARDWARE_LEN};

/// The kernel gives up on a neighbour after three questions, a second apart (net.ipv4.neigh.default.mcast_solicit, retrans_time_ms).
const RESOLVE_TIME: Duration = Duration::from_millis(3200);
const RESOLVE_PAUSE: Duration = Duration::from_millis(2);
const RECEIVE_BUFFER: usize = 16 * 1024;
/// linux/if.h, IFF_NOARP: the interface has no neighbours, for example a tunnel.
const IFF_NOARP: u32 = 0x80;

/// Why there is no path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoPath {
    #[error("there is no route to {0}")]
    NoRoute(IpAddr),
    #[error("the neighbour {0} does not answer ARP or neighbour discovery")]
    NoNeighbour(IpAddr),
    #[error("rtnetlink: {}", crate::sys::os_error(.0))]
    Netlink(Errno),
}

impl From<io::Error> for NoPath {
    fn from(error: io::Error) -> Self {
        NoPath::Netlink(errno_of(&error))
    }
}

/// The paths of the network namespace of the thread that opened it. Each is asked for once.
pub struct Paths {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
    known: HashMap<(IpAddr, IpAddr), Result<LinkDestination, NoPath>>,
}

impl Paths {
    /// Opens the netlink socket.
    ///
    /// # Errors
    /// As socket(2).
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Paths {
            socket,
            sequence: 0,
            buffer: vec![0; RECEIVE_BUFFER],
            known: HashMap::new(),
        })
    }

    /// The path of a packet from the host `from` to the host `to`, as this host would forward it.
    ///
    /// # Errors
    /// [`NoPath`].
    pub fn to(&mut self, to: IpAddr, from: IpAddr) -> Result<LinkDestination, NoPath> {
        if let Some(known) = self.known.get(&(to, from)) {
            return *known;
        }
        let found = self.find(to, from);
        self.known.insert((to, from), found);
        found
    }

    fn find(&mut self, to: IpAddr, from: IpAddr) -> Result<LinkDestination, NoPath> {
        // A rule of routing can depend on the interface at which packets of the other end arrive: that of the route to it.
        let arrives = self
            .route(from, None)?
            .map(|(interface, _)| (from, interface));
        let forwarded = match arrives {
            // The kernel refuses to forward if reverse path filtering would. Then only its own route is left.
            Some(_) => self.route(to, arrives).unwrap_or(None),
            None => None,
        };
        let route = match forwarded {
            Some(route) => Some(route),
            None => self.route(to, None)?,
        };
        let (interface, gateway) = route.ok_or(NoPath::NoRoute(to))?;
        let mut destination = LinkDestination {
            interface,
            hardware: [0; MAX_HARDWARE_LEN],
            hardware_len: 0,
        };
        if let Some(Answer::Link(flags)) =
            self.ask(|number| codec::link_question(interface, number))?
            && flags & IFF_NOARP != 0
        {
            return Ok(destination);
        }
        let hop = gateway.unwrap_or(to);
        let hardware = self.neighbour(hop, interface)?;
        let hardware = hardware.ok_or(NoPath::NoNeighbour(hop))?;
        let room = destination.hardware.get_mut(..hardware.len());
        room.ok_or(NoPath::NoNeighbour(hop))?
            .copy_from_slice(&hardware);
        destination.hardware_len = u8::try_from(hardware.len()).expect("at most 8");
        Ok(destination)
    }

    /// The interface and the gateway; `None` if the route does not lead to another host.
    fn route(
        &mut self,
        to: IpAddr,
        arrives: Option<(IpAddr, u32)>,
    ) -> io::Result<Option<(u32, Option<IpAddr>)>> {
        match self.ask(|number| codec::route_question(to, arrives, number))? {
            Some(Answer::Route { interface, gateway }) => Ok(Some((interface, gateway))),
            Some(Answer::Errno(
                libc::ENETUNREACH | libc::EHOSTUNREACH | libc::EACCES | libc::EINVAL | libc::EXDEV,
            )) => Ok(None),
            Some(Answer::Errno(errno)) => Err(io::Error::from_raw_os_error(errno)),
            _ => Ok(None),
        }
    }

    /// The hardware address of a neighbour. If it is not known, the kernel asks for it.
    fn neighbour(&mut self, hop: IpAddr, interface: u32) -> io::Result<Option<Vec<u8>>> {
        let until = Instant::now() + RESOLVE_TIME;
        let mut has_asked = false;
        loop {
            let known = self.ask(|number| codec::neighbour_question(hop, interface, number))?;
            if let Some(Answer::Neighbour(Some(hardware))) = known {
                return Ok(Some(hardware));
            }
            if !has_asked {
                self.ask(|number| codec::resolve_request(hop, interface, number))?;
                has_asked = true;
            }
            if Instant::now() >= until {
                return Ok(None);
            }
            std::thread::sleep(RESOLVE_PAUSE);
        }
    }

    /// Sends a question, and reads its answer: the kernel answers inside send(). `None`: the answer was lost, or is an unknown one.
    fn ask(&mut self, question: impl Fn(u32) -> Vec<u8>) -> io::Result<Option<Answer>> {
        self.sequence = self.sequence.wrapping_add(1);
        self.socket.send(&question(self.sequence), 0)?;
        loop {
            match self
                .socket
                .recv(&mut &mut self.buffer[..], libc::MSG_DONTWAIT)
            {
                Ok(length) => {
                    if let Some(answer) = codec::answer(&self.buffer[..length], self.sequence) {
                        return Ok(Some(answer));
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }
}
