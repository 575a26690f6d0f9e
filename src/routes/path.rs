//! The paths of the packets of connections that this host forwards: the interface, and the hardware address of the neighbour.
//!
//! `forwarding` decides from the routes. The neighbours of all connections that are asked for together are resolved together.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr as Address;
use std::sync::Arc;
use std::time::{Duration, Instant};

use netlink_sys::{
    Socket, SocketAddr,
    protocols::{NETLINK_ROUTE, NETLINK_XFRM},
};

use super::forwarding::{self, Hop, NoPath, Origin, Policy, Question, Route};
use super::ipsec::{self, IpsecPolicy, Packet};
use super::path_codec::{self as codec, Answer, Link};
use crate::netlink;
use crate::sys::link::{LinkDestination, MAX_HARDWARE_LEN};
use crate::tcp::Tuple;

/// The kernel gives up on a neighbour after three questions, a second apart (net.ipv4.neigh.default.mcast_solicit, retrans_time_ms).
const RESOLVE_TIME: Duration = Duration::from_millis(3200);
const RESOLVE_PAUSE: Duration = Duration::from_millis(2);
/// For how long a neighbour that did not answer is not waited for again.
const DEAD_TIME: Duration = Duration::from_secs(30);
/// For how long the lists of rules, links and policies of IPsec are used, or is known that they cannot be read.
const POLICY_TIME: Duration = Duration::from_secs(1);
/// A list is read so often at most, until two readings agree.
const READINGS: u32 = 5;
/// For how long a kernel without xfrm is not asked again: each question looks for a module.
const XFRM_MISSING_TIME: Duration = Duration::from_secs(30);
/// The kernel fills a datagram of a list with up to 32 KiB (net/netlink/af_netlink.c, netlink_dump).
const RECEIVE_BUFFER: usize = 64 * 1024;
/// linux/if.h, IFF_NOARP: the interface has no neighbours, for example a tunnel.
const IFF_NOARP: u32 = 0x80;

/// A connection whose packets this host forwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    /// What its ends see. `local` is the end itself.
    pub views: [Tuple; 2],
    /// The mark of its entry, 0 for none.
    pub mark: u32,
}

impl Flow {
    /// The real addresses of its ends: the kernel routes after the destination is translated, and before the source is.
    pub fn ends(&self) -> [Address; 2] {
        self.views.map(|view| view.local)
    }

    /// The packets to both ends, as the kernel compares them with policies of IPsec: as they have arrived (net/netfilter/nf_nat_core.c,
    /// __nf_nat_decode_session), as it routes them, and once more after the source is translated (nf_xfrm_me_harder).
    fn packets(&self, hops: &[Hop; 2]) -> Vec<Packet> {
        let mut packets = Vec::new();
        for (side, (view, hop)) in self.views.iter().zip(hops).enumerate() {
            let sender = self.views[1 - side];
            for (from, to, is_out) in [
                (sender.local, sender.peer, false),
                (sender.local, view.local, true),
                (view.peer, view.local, true),
            ] {
                for mark in [0, self.mark] {
                    packets.push(Packet {
                        from,
                        to,
                        is_out,
                        interface: hop.interface,
                        mark,
                    });
                }
            }
        }
        packets
    }
}

struct Policies {
    /// Of IPv4 and IPv6.
    routing: [Policy; 2],
    ipsec: Vec<IpsecPolicy>,
}

/// The paths of a network namespace: it must be that of the thread that opens it, and of those that ask it.
pub struct Paths {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
    /// What depends on more than addresses, and when it was asked.
    policies: Option<(Result<Arc<Policies>, NoPath>, Instant)>,
    /// When the kernel was found to have no xfrm.
    xfrm_missing: Option<Instant>,
    /// The neighbours that did not answer, and when.
    dead: HashMap<Hop, Instant>,
}

impl Paths {
    /// Opens the netlink socket.
    ///
    /// # Errors
    /// As socket(2).
    pub fn open() -> io::Result<Self> {
        Ok(Paths {
            socket: open_netlink(NETLINK_ROUTE)?,
            sequence: 0,
            buffer: vec![0; RECEIVE_BUFFER],
            policies: None,
            xfrm_missing: None,
            dead: HashMap::new(),
        })
    }

    /// The paths to both ends of each flow, in order, as this host forwards its packets. Once `is_over`, it waits for no neighbour any more.
    pub fn find(
        &mut self,
        flows: &[Flow],
        is_over: &dyn Fn() -> bool,
    ) -> Vec<Result<[LinkDestination; 2], NoPath>> {
        let hops: Vec<Result<[Hop; 2], NoPath>> =
            flows.iter().map(|flow| self.hops(flow)).collect();
        let known = self.resolve(hops.iter().flatten().flatten().copied(), is_over);
        let path = |hop: &Hop| known[hop];
        let found = hops.iter().map(|hops| match hops {
            Ok([one, other]) => Ok([path(one)?, path(other)?]),
            Err(no_path) => Err(*no_path),
        });
        found.collect()
    }

    fn hops(&mut self, flow: &Flow) -> Result<[Hop; 2], NoPath> {
        let policies = self.policies()?;
        let ends = flow.ends();
        let routing = &policies.routing[usize::from(ends[0].is_ipv6())];
        let lookup = &mut |question| self.route(&question, routing.is_hash_unknown);
        let hops = forwarding::hops(ends, flow.mark, routing, lookup)?;
        let is_forbidden = |packet: &Packet| ipsec::forbid(&policies.ipsec, packet);
        match flow.packets(&hops).iter().any(is_forbidden) {
            true => Err(NoPath::Ipsec),
            false => Ok(hops),
        }
    }

    fn policies(&mut self) -> Result<Arc<Policies>, NoPath> {
        let now = Instant::now();
        let known = self.policies.take();
        let (policies, asked) = match known.filter(|(_, asked)| now < *asked + POLICY_TIME) {
            Some(known) => known,
            None => (
                self.read_policies().map(Arc::new).map_err(NoPath::from),
                now,
            ),
        };
        self.policies = Some((policies.clone(), asked));
        policies
    }

    fn read_policies(&mut self) -> io::Result<Policies> {
        let links = list(
            NETLINK_ROUTE,
            codec::links_question,
            codec::RTM_NEWLINK,
            codec::link,
        )?;
        let routing = [
            routing_policy(false, &links)?,
            routing_policy(true, &links)?,
        ];
        let now = Instant::now();
        let ipsec = match self.xfrm_missing {
            Some(since) if now < since + XFRM_MISSING_TIME => Vec::new(),
            _ => {
                let found = ipsec_policies()?;
                self.xfrm_missing = found.is_none().then_some(now);
                found.unwrap_or_default()
            }
        };
        Ok(Policies { routing, ipsec })
    }

    fn route(&mut self, question: &Question, is_hash_unknown: bool) -> io::Result<Route> {
        let is_forwarded = matches!(question.origin, Origin::Interface(_));
        if is_forwarded && is_hash_unknown {
            let hops = self.ask(|number| codec::hops_question(question, number))?;
            if hops == Some(Answer::Several) {
                return Ok(Route::Several);
            }
        }
        match self.ask(|number| codec::route_question(question, number))? {
            Some(Answer::Route { interface, gateway }) => Ok(Route::To(Hop {
                interface,
                neighbour: gateway.unwrap_or(question.to.ip()),
            })),
            Some(Answer::Local) => Ok(Route::Here),
            // ENODEV: the interface is gone. EXDEV: reverse path filtering drops the packet.
            Some(Answer::Errno(
                libc::ENETUNREACH
                | libc::EHOSTUNREACH
                | libc::EACCES
                | libc::EINVAL
                | libc::EXDEV
                | libc::ENODEV,
            ))
            | Some(Answer::NotForwarded) => Ok(Route::None),
            Some(Answer::Errno(errno)) => Err(io::Error::from_raw_os_error(errno)),
            // A lost answer says nothing about the route.
            _ => Err(io::Error::from_raw_os_error(libc::ENOBUFS)),
        }
    }

    /// Resolves all these hops together: asks for each, and waits once.
    fn resolve(
        &mut self,
        hops: impl Iterator<Item = Hop>,
        is_over: &dyn Fn() -> bool,
    ) -> HashMap<Hop, Result<LinkDestination, NoPath>> {
        let mut known: HashMap<Hop, Result<LinkDestination, NoPath>> = HashMap::new();
        let mut open: Vec<Hop> = Vec::new();
        for hop in hops {
            if known.contains_key(&hop) {
                continue;
            }
            let found = self.destination(hop).map_err(NoPath::from);
            if let Ok(None) = found {
                open.push(hop);
            }
            let found = found.and_then(|found| found.ok_or(NoPath::NoNeighbour(hop.neighbour)));
            known.insert(hop, found);
        }
        let now = Instant::now();
        self.dead.retain(|_, since| now < *since + DEAD_TIME);
        // One that did not answer is asked again, but not waited for.
        let is_awaited = |hop: &Hop| !self.dead.contains_key(hop);
        let mut awaited: Vec<Hop> = open.iter().copied().filter(is_awaited).collect();
        for hop in open {
            let request = |number| codec::resolve_request(hop.neighbour, hop.interface, number);
            // Where it is refused, the neighbour does not answer.
            let _ = self.ask(request);
        }
        let until = now + RESOLVE_TIME;
        while !awaited.is_empty() && Instant::now() < until {
            if is_over() {
                return known;
            }
            std::thread::sleep(RESOLVE_PAUSE);
            awaited.retain(|hop| match self.destination(*hop) {
                Ok(None) => true,
                Ok(Some(found)) => {
                    known.insert(*hop, Ok(found));
                    false
                }
                Err(error) => {
                    known.insert(*hop, Err(error.into()));
                    false
                }
            });
        }
        let now = Instant::now();
        self.dead.extend(awaited.into_iter().map(|hop| (hop, now)));
        known
    }

    /// The place of a hop on its link; `None` if its hardware address is not known now.
    fn destination(&mut self, hop: Hop) -> io::Result<Option<LinkDestination>> {
        let mut destination = LinkDestination {
            interface: hop.interface,
            hardware: [0; MAX_HARDWARE_LEN],
            hardware_len: 0,
        };
        let link = self.ask(|number| codec::link_question(hop.interface, number))?;
        match link {
            Some(Answer::Link(flags)) if flags & IFF_NOARP != 0 => return Ok(Some(destination)),
            Some(Answer::Errno(errno)) => return Err(io::Error::from_raw_os_error(errno)),
            _ => {}
        }
        let question = |number| codec::neighbour_question(hop.neighbour, hop.interface, number);
        let Some(Answer::Neighbour(Some(hardware))) = self.ask(question)? else {
            return Ok(None);
        };
        let Some(room) = destination.hardware.get_mut(..hardware.len()) else {
            return Ok(None);
        };
        room.copy_from_slice(&hardware);
        destination.hardware_len = u8::try_from(hardware.len()).expect("at most 8");
        Ok(Some(destination))
    }

    /// Sends a question, and reads its answer: the kernel answers inside send(). `None`: the answer was lost, or is an unknown one.
    fn ask(&mut self, question: impl Fn(u32) -> Vec<u8>) -> io::Result<Option<Answer>> {
        self.sequence = self.sequence.wrapping_add(1);
        self.socket.send(&question(self.sequence), 0)?;
        loop {
            let room = &mut &mut self.buffer[..];
            match self.socket.recv(room, libc::MSG_DONTWAIT) {
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

fn open_netlink(protocol: isize) -> io::Result<Socket> {
    let mut socket = Socket::new(protocol)?;
    socket.bind_auto()?;
    socket.connect(&SocketAddr::new(0, 0))?;
    Ok(socket)
}

fn routing_policy(ipv6: bool, links: &[Link]) -> io::Result<Policy> {
    let question = |sequence| codec::rules_question(ipv6, sequence);
    let rules = list(NETLINK_ROUTE, question, codec::RTM_NEWRULE, codec::rule);
    let rules = match rules {
        // A kernel without rules, or without this family.
        Err(error) if is_errno(&error, &[libc::EAFNOSUPPORT, libc::EOPNOTSUPP]) => Vec::new(),
        rules => rules?,
    };
    let is_named = |link: &Link| {
        let mut named = rules.iter().filter_map(|rule| rule.arrives_at.as_ref());
        named.any(|name| link.names.contains(name))
    };
    let indexes = |wanted: &dyn Fn(&Link) -> bool| -> Vec<u32> {
        let wanted = links.iter().filter(|link| link.is_used && wanted(link));
        wanted.map(|link| link.index).collect()
    };
    Ok(Policy {
        interfaces: indexes(&is_named),
        vrfs: indexes(&|link| link.is_vrf),
        by_mark: rules.iter().any(|rule| rule.by_mark),
        all: indexes(&|link| !link.is_vrf),
        is_hash_unknown: is_hash_unknown(ipv6),
    })
}

/// `None`: this kernel has none (without CONFIG_XFRM_USER), or its module cannot be loaded.
fn ipsec_policies() -> io::Result<Option<Vec<IpsecPolicy>>> {
    let policies = list(
        NETLINK_XFRM,
        ipsec::policies_question,
        ipsec::XFRM_MSG_NEWPOLICY,
        ipsec::policy,
    );
    match policies {
        Err(error) if is_errno(&error, &[libc::EPROTONOSUPPORT]) => Ok(None),
        policies => Ok(Some(policies?.into_iter().flatten().collect())),
    }
}

fn is_errno(error: &io::Error, errnos: &[i32]) -> bool {
    error
        .raw_os_error()
        .is_some_and(|errno| errnos.contains(&errno))
}

/// A list of the kernel, read until two readings agree: the kernel sends it in parts, and what is added or removed between two parts can hide
/// an item that was there all the time. It says so of links, and not of rules and policies (net/core/fib_rules.c, dump_rules;
/// net/xfrm/xfrm_policy.c, xfrm_policy_walk).
///
/// # Errors
/// As socket(2), and as the kernel answers. EAGAIN: what it lists changes all the time.
fn list<T: PartialEq>(
    protocol: isize,
    question: impl Fn(u32) -> Vec<u8>,
    kind: u16,
    parse: impl Fn(&[u8]) -> Option<T>,
) -> io::Result<Vec<T>> {
    let (mut before, mut buffer) = (None, vec![0; RECEIVE_BUFFER]);
    for _ in 0..READINGS {
        // On another socket the rest of a list that broke off would come first.
        let socket = open_netlink(protocol)?;
        socket.send(&question(1), 0)?;
        let mut items = Vec::new();
        loop {
            let length = match socket.recv(&mut &mut buffer[..], 0) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                length => length?,
            };
            if netlink::add_items(&mut items, &buffer[..length], kind, &parse)? {
                break;
            }
        }
        if before.as_ref() == Some(&items) {
            return Ok(items);
        }
        before = Some(items);
    }
    Err(io::Error::from_raw_os_error(libc::EAGAIN))
}

/// Whether nobody can tell which hop of a route with several ones a forwarded packet takes (net/ipv4/route.c, fib_multipath_hash;
/// net/ipv6/route.c, rt6_multipath_hash).
///
/// With the policy for ports (1) the kernel takes the number that the link has computed for a packet, if it has: many devices do. The hash of
/// IPv6 has the flow label, and with named fields (3) too it differs from that of an answer to RTM_GETROUTE (measured on Linux 6.18). That
/// over addresses, also with those of an inner packet (2), is the same. A kernel without such routes has no setting, and then the
/// answer does not matter.
fn is_hash_unknown(ipv6: bool) -> bool {
    const POLICY: &str = "/proc/sys/net/ipv4/fib_multipath_hash_policy";
    let policy = || std::fs::read_to_string(POLICY);
    ipv6 || !policy().is_ok_and(|policy| matches!(policy.trim(), "0" | "2"))
}
