//! The kernel's routing decisions: is an address one of this host? Where do the packets of a forwarded connection go (`path`)?
//!
//! cwkill asks the kernel for the route to the address (RTM_GETROUTE, rtnetlink(7)), not for the list of addresses. A prefix can be
//! local without an address on a device, for example `local 10.0.0.0/8 dev lo` of an anycast service, and ip_nonlocal_bind does not
//! matter. Each question costs some microseconds, however large the tables are, and needs no privilege.

mod codec;
mod forwarding;
mod ipsec;
mod path;
mod path_codec;

use std::collections::HashSet;
use std::io;
use std::net::IpAddr;

use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

use crate::netlink::Overruns;
use codec::Answer;
pub use forwarding::NoPath;
pub use path::{Flow, Paths};

/// Questions per datagram. The kernel reserves a page or two for each answer (net/ipv4/route.c, inet_rtm_getroute), and all
/// answers of a datagram must fit the receive queue (net.core.rmem_default).
const QUESTIONS_PER_DATAGRAM: usize = 16;
/// cwkill asks about at most this many addresses at a time. Hosts have few; only a prefix that is local as a whole has more.
pub const MAX_PLACES: usize = 4096;
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
    each_not_local(different).unwrap_or_default()
}

/// As [`not_local`], of any number of places.
///
/// # Errors
/// The kernel could not be asked.
pub fn each_not_local(places: HashSet<Place>) -> io::Result<HashSet<Place>> {
    let places: Vec<Place> = places.into_iter().collect();
    let answers = Routes::open()?.are_local(&places)?;
    let answered = places.into_iter().zip(answers);
    let not_local = answered.filter(|(_, is_local)| *is_local == Some(false));
    Ok(not_local.map(|(place, _)| place).collect())
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

    fn receive(&mut self, first: u32, answers: &mut [Option<bool>]) -> io::Result<()> {
        let socket = &self.socket;
        let next = |mut buffer: &mut [u8]| socket.recv(&mut buffer, libc::MSG_DONTWAIT);
        receive(next, &mut self.buffer, first, answers)
    }
}

/// Reads the receive queue, with `next` for one datagram. The kernel answers inside send(), so an answer that is not in the queue now
/// was lost.
///
/// # Errors
/// ENOBUFS: the queue overran without end. Otherwise the error of `next`.
fn receive(
    mut next: impl FnMut(&mut [u8]) -> io::Result<usize>,
    buffer: &mut [u8],
    first: u32,
    answers: &mut [Option<bool>],
) -> io::Result<()> {
    let mut overruns = Overruns::default();
    loop {
        let length = match next(buffer) {
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            // Some answers were lost: they stay unknown.
            Err(error) => {
                overruns.note(error)?;
                continue;
            }
        };
        for (sequence, answer) in codec::answers(&buffer[..length]) {
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

    fn no_room() -> io::Error {
        io::Error::from_raw_os_error(libc::ENOBUFS)
    }

    #[test]
    fn a_queue_that_overruns_without_end_is_an_error() {
        let mut calls = 0;
        let next = |_: &mut [u8]| {
            calls += 1;
            assert!(calls < 100_000, "it does not end");
            Err(no_room())
        };
        let error = receive(next, &mut [0; 64], 1, &mut [None; 2]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOBUFS));
        assert!(calls > 1, "one overrun is borne");
    }

    /// The kernel reports the loss once, and goes on. What arrived counts, and the rest stays unknown.
    #[test]
    fn after_an_overrun_the_answers_that_arrived_count() {
        // No route: the address is not local.
        let mut answer = Vec::new();
        let errno = (-libc::ENETUNREACH).to_ne_bytes();
        crate::netlink::put_message(&mut answer, netlink_packet_core::NLMSG_ERROR, 0, 8, &errno);
        let length = answer.len();
        let mut steps = [
            Err(no_room()),
            Err(io::ErrorKind::Interrupted.into()),
            Ok(length),
            Err(no_room()),
            Err(io::ErrorKind::WouldBlock.into()),
        ]
        .into_iter();
        let next = |buffer: &mut [u8]| {
            buffer[..length].copy_from_slice(&answer);
            steps.next().unwrap()
        };
        let mut answers = [None; 3];
        receive(next, &mut [0; 64], 7, &mut answers).unwrap();
        assert_eq!(answers, [None, Some(false), None]);
        assert!(steps.next().is_none());
    }
}
