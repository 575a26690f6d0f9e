//! The kernel's routing decision for an address: is it an address of this host?
//!
//! cwkill asks the kernel for the route to the address (RTM_GETROUTE, rtnetlink(7)), not for the list of addresses. A prefix can be
//! local without an address on a device, for example `local 10.0.0.0/8 dev lo` of an anycast service, and ip_nonlocal_bind does not
//! matter. Each question costs some microseconds, however large the tables are, and needs no privilege.

mod codec;

use std::collections::HashSet;
use std::io;
use std::net::IpAddr;

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use codec::Answer;

/// Questions per datagram. The kernel reserves a page or two for each answer (net/ipv4/route.c, inet_rtm_getroute), and all
/// answers of a datagram must fit the receive queue (net.core.rmem_default).
const QUESTIONS_PER_DATAGRAM: usize = 16;
/// cwkill asks about at most this many addresses at a time. Hosts have few; only a prefix that is local as a whole has more.
const MAX_PLACES: usize = 4096;
/// The maximum number of overruns while answers are received. The kernel reports an overrun once and goes on
/// (net/netlink/af_netlink.c, netlink_overrun), so more of them mean that something else answers in its place.
const MAX_OVERRUNS: u32 = 1000;
/// Room for the answers to a datagram of questions. One answer takes about 150 bytes.
const RECEIVE_BUFFER: usize = 16 * 1024;

/// An address, and the interface to which its socket is bound; 0 for none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    pub address: IpAddr,
    pub interface: u32,
}

/// Those of `places` that the kernel knows not to be local, in the network namespace of the calling thread.
///
/// An error is not reported: a place without an answer counts as local, and so do the places after the first `MAX_PLACES`
/// different ones.
pub fn not_local(places: impl Iterator<Item = Place>) -> HashSet<Place> {
    let mut different = HashSet::new();
    let mut last = None;
    for place in places {
        // Most sockets share their address with the one before.
        if last != Some(place) && different.len() < MAX_PLACES {
            different.insert(place);
        }
        last = Some(place);
    }
    let places: Vec<Place> = different.into_iter().collect();
    match Routes::open().and_then(|mut routes| routes.are_local(&places)) {
        Err(_) => HashSet::new(),
        Ok(answers) => {
            let answered = places.into_iter().zip(answers);
            let not_local = answered.filter(|(_, is_local)| *is_local == Some(false));
            not_local.map(|(place, _)| place).collect()
        }
    }
}

/// An rtnetlink socket in the network namespace of the thread that opened it.
struct Routes {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Routes {
    /// Opens the netlink socket.
    ///
    /// # Errors
    /// As socket(2).
    fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        Ok(Routes {
            socket,
            sequence: 0,
            buffer: vec![0; RECEIVE_BUFFER],
        })
    }

    /// Whether the kernel takes packets to each of `places` for this host; one answer per place, in order. `None`: unknown.
    ///
    /// # Errors
    /// The netlink socket itself failed.
    fn are_local(&mut self, places: &[Place]) -> io::Result<Vec<Option<bool>>> {
        // The interface selects the table of a VRF. An address of another device is local without it.
        let mut local = self.ask(places)?;
        let mut again: Vec<(usize, Place)> = Vec::new();
        for (index, place) in places.iter().enumerate() {
            if place.interface != 0 && local[index] == Some(false) && !needs_interface(place) {
                again.push((
                    index,
                    Place {
                        interface: 0,
                        ..*place
                    },
                ));
            }
        }
        let unbound: Vec<Place> = again.iter().map(|(_, place)| *place).collect();
        for ((index, _), answer) in again.iter().zip(self.ask(&unbound)?) {
            local[*index] = answer;
        }
        Ok(local)
    }

    fn ask(&mut self, places: &[Place]) -> io::Result<Vec<Option<bool>>> {
        let mut answers = vec![None; places.len()];
        let mut request = Vec::new();
        for (places, answers) in places
            .chunks(QUESTIONS_PER_DATAGRAM)
            .zip(answers.chunks_mut(QUESTIONS_PER_DATAGRAM))
        {
            let first = self.sequence.wrapping_add(1);
            request.clear();
            for place in places {
                // Every place takes a number, also without a question, so that the number gives the index of the answer.
                self.sequence = self.sequence.wrapping_add(1);
                if place.interface != 0 || !needs_interface(place) {
                    codec::put_question(&mut request, *place, self.sequence);
                }
            }
            if !request.is_empty() {
                self.socket.send(&request, 0)?;
                self.receive(first, answers)?;
            }
        }
        Ok(answers)
    }

    /// Reads the receive queue. The kernel answers inside send(), so an answer that is not in the queue now was lost.
    fn receive(&mut self, first: u32, answers: &mut [Option<bool>]) -> io::Result<()> {
        let mut overruns = 0;
        loop {
            let received = self
                .socket
                .recv(&mut &mut self.buffer[..], libc::MSG_DONTWAIT);
            let length = match received {
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // Some answers were lost: they stay unknown.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    overruns += 1;
                    match overruns > MAX_OVERRUNS {
                        true => return Err(error),
                        false => continue,
                    }
                }
                Err(error) => return Err(error),
            };
            for (sequence, answer) in codec::answers(&self.buffer[..length]) {
                let index = usize::try_from(sequence.wrapping_sub(first));
                if let Some(known) = index.ok().and_then(|index| answers.get_mut(index)) {
                    *known = match answer {
                        Answer::Local => Some(true),
                        Answer::NotLocal => Some(false),
                        Answer::Unknown => None,
                    };
                }
            }
        }
    }
}

/// Whether the address means nothing without an interface.
fn needs_interface(place: &Place) -> bool {
    match place.address {
        IpAddr::V4(_) => false,
        IpAddr::V6(address) => address.is_unicast_link_local(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(address: &str) -> Place {
        Place {
            address: address.parse().unwrap(),
            interface: 0,
        }
    }

    #[test]
    fn every_place_has_its_answer() {
        let mut routes = Routes::open().unwrap();
        let mut places = vec![place("127.0.0.1"); 3 * QUESTIONS_PER_DATAGRAM];
        // No host has this address of the documentation (RFC 5737).
        places[QUESTIONS_PER_DATAGRAM + 1] = place("192.0.2.77");
        places[2] = place("fe80::1");
        let answers = routes.are_local(&places).unwrap();
        for (index, answer) in answers.into_iter().enumerate() {
            let expected = match index {
                2 => None,
                index if index == QUESTIONS_PER_DATAGRAM + 1 => Some(false),
                _ => Some(true),
            };
            assert_eq!(answer, expected, "{index}");
        }
        assert_eq!(routes.are_local(&[]).unwrap(), []);
    }
}
