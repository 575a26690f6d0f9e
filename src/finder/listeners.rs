//! The listener at which a connection waits for accept(2).
//!
//! sock_diag does not report it, so cwkill chooses the address as the kernel does: an exact address before the wildcard, a
//! listener of the connection's own family before a dual-stack one, and the bound interface if there is one
//! (net/ipv4/inet_hashtables.c and net/ipv6/inet6_hashtables.c, compute_score).
//!
//! Several listening sockets can have one address (SO_REUSEPORT), each with a backlog of its own. The kernel chooses among them by
//! a hash with a secret that it does not show (net/core/sock_reuseport.c, reuseport_select_sock; net/ipv4/inet_hashtables.c,
//! inet_ehash_secret), or by a program that the owner has attached. So cwkill excludes those in whose backlog the connection
//! cannot be:
//! - the backlog was empty at some time after the connection was listed
//! - the listening socket was made in another cgroup: the kernel copies the cgroup of the listening socket to its connections
//!   (net/core/sock.c, sk_clone_lock)

use std::collections::HashMap;
use std::net::SocketAddr;
use std::thread;
use std::time::Duration;

use crate::model::{Cause, Listener, ListeningSocket, Socket};
use crate::sock_diag::{DiagId, DumpError, DumpRequest, Family, SockDiag, SocketMessage};
use crate::tcp::TcpState;

/// The pauses before the lists that show whether a backlog is ever empty. A process that accepts empties its backlog within
/// microseconds.
const PAUSES_BEFORE_LISTS: [Duration; 4] = [
    Duration::from_millis(1),
    Duration::from_millis(2),
    Duration::from_millis(5),
    Duration::from_millis(10),
];

/// The listeners of a network namespace, and which of them [`Listeners::accepting`] has returned.
#[derive(Debug, Default)]
pub struct Listeners {
    groups: Vec<Group>,
    /// Port to indices in `groups`.
    by_port: HashMap<u16, Vec<usize>>,
    /// The used listeners, in the order of first use.
    used: Vec<Used>,
}

/// The listening sockets at one address. Only with SO_REUSEPORT there are several.
#[derive(Debug)]
struct Group {
    local: SocketAddr,
    family: Family,
    interface: u32,
    /// It accepts IPv4 connections on an IPv6 wildcard address.
    dual_stack: bool,
    uid: u32,
    members: Vec<Member>,
}

#[derive(Debug)]
struct Member {
    socket: ListeningSocket,
    /// Its backlog was empty in some list.
    was_empty: bool,
}

/// A listener that [`Listeners::accepting`] has returned.
#[derive(Debug, PartialEq, Eq)]
struct Used {
    /// Index in [`Listeners::groups`].
    group: usize,
    /// Indices of the members of the group at which a connection may wait.
    members: Vec<usize>,
}

/// Lists the listening sockets in the namespace of `diag`; the values that `keep` returns for them.
fn dump<T>(
    diag: &mut SockDiag,
    keep: impl Fn(SocketMessage) -> Option<T>,
) -> Result<Vec<T>, DumpError> {
    let mut kept = Vec::new();
    for family in Family::ALL {
        let request = DumpRequest::plain(family, TcpState::Listen.into());
        kept.extend(diag.dump(&request, &keep)?);
    }
    Ok(kept)
}

/// A listening socket in the list of all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ListedListener {
    pub port: u16,
    pub inode: u32,
    /// The connections that wait for accept(2).
    pub waiting: u32,
}

/// All listening sockets in the network namespace of the calling thread. A port can occur more than once.
///
/// # Errors
/// As [`SockDiag::open`] and [`SockDiag::dump`].
pub fn list() -> Result<Vec<ListedListener>, DumpError> {
    dump(&mut SockDiag::open()?, |message| {
        Some(ListedListener {
            port: message.id.tuple().local.port(),
            inode: message.inode,
            waiting: message.recv_q,
        })
    })
}

impl Listeners {
    /// Lists the listeners in the namespace of `diag`.
    pub fn read(diag: &mut SockDiag) -> Result<Self, DumpError> {
        let mut listeners = Listeners::default();
        for message in dump(diag, Some)? {
            listeners.add(&message);
        }
        Ok(listeners)
    }

    fn add(&mut self, message: &SocketMessage) {
        let candidate = Group {
            local: message.id.tuple().local,
            family: message.id.family(),
            interface: message.id.interface(),
            dual_stack: message.id.family() == Family::V6 && message.v6only != Some(true),
            uid: message.uid,
            members: vec![Member {
                socket: ListeningSocket {
                    id: message.id,
                    inode: message.inode,
                    waiting: message.recv_q,
                    backlog: message.send_q,
                    cgroup: message.cgroup,
                },
                was_empty: message.recv_q == 0,
            }],
        };
        let on_port = self.by_port.entry(candidate.local.port()).or_default();
        let groups = &mut self.groups;
        match on_port
            .iter()
            .find(|&&index| groups[index].is_group_of(&candidate))
        {
            Some(&index) => groups[index].members.extend(candidate.members),
            None => {
                on_port.push(groups.len());
                groups.push(candidate);
            }
        }
    }

    /// Lists the listeners again, with pauses, until the backlog of each of `waiting` is known, or for a few times.
    pub fn read_backlogs<'s>(
        &mut self,
        waiting: impl Iterator<Item = &'s Socket> + Clone,
        diag: &mut SockDiag,
    ) -> Result<(), DumpError> {
        for pause in PAUSES_BEFORE_LISTS {
            let is_unknown = |socket: &Socket| {
                let group = self.group(socket).map(|group| &self.groups[group]);
                socket.cause == Cause::NotAccepted
                    && group.is_some_and(|group| {
                        group.members.len() > 1 && group.holding(socket).len() > 1
                    })
            };
            if !waiting.clone().any(is_unknown) {
                break;
            }
            thread::sleep(pause);
            self.update(&dump(diag, Some)?);
        }
        Ok(())
    }

    /// Updates the backlogs from a new list. A listening socket that is not in it has been closed, with its backlog.
    fn update(&mut self, listed: &[SocketMessage]) {
        let listed: HashMap<u32, &SocketMessage> = listed
            .iter()
            .map(|message| (message.inode, message))
            .collect();
        for member in self.groups.iter_mut().flat_map(|group| &mut group.members) {
            let waiting = listed.get(&member.socket.inode);
            member.socket.waiting = waiting.map_or(0, |message| message.recv_q);
            member.was_empty |= member.socket.waiting == 0;
        }
    }

    /// The listener at which `socket` waits, as an index in the result of [`Listeners::into_used`]. `None` if that listener has
    /// been closed.
    pub fn accepting(&mut self, socket: &Socket) -> Option<usize> {
        let group = self.group(socket)?;
        let used = Used {
            group,
            members: self.groups[group].holding(socket),
        };
        let place = self.used.iter().position(|other| *other == used);
        Some(place.unwrap_or_else(|| {
            self.used.push(used);
            self.used.len() - 1
        }))
    }

    /// The index of the group at whose address `socket` was opened.
    fn group(&self, socket: &Socket) -> Option<usize> {
        let local = socket.tuple().local;
        let on_port = self.by_port.get(&local.port())?;
        let scored = on_port.iter().filter_map(|&index| {
            let score = self.groups[index].score(&socket.id, local)?;
            Some((score, index))
        });
        let (_, best) = scored.max_by_key(|(score, _)| *score)?;
        Some(best)
    }

    /// The number of connections that wait for accept(2) at each listening socket, by its inode.
    pub fn waiting_by_inode(&self) -> HashMap<u32, u32> {
        let members = self.groups.iter().flat_map(|group| &group.members);
        members
            .map(|member| (member.socket.inode, member.socket.waiting))
            .collect()
    }

    /// Every listening socket at which connections wait, without its owners.
    pub fn waiting(&self) -> Vec<Listener> {
        let waiting = |group: &Group| {
            let members = group.members.iter();
            let waiting = members.filter(|member| member.socket.waiting > 0);
            let alone = |member: &Member| group.listener(vec![member.socket.clone()]);
            waiting.map(alone).collect::<Vec<Listener>>()
        };
        self.groups.iter().flat_map(waiting).collect()
    }

    /// The used listeners, without their owners.
    pub fn into_used(self) -> Vec<Listener> {
        let listener = |used: &Used| {
            let group = &self.groups[used.group];
            let members = used.members.iter().map(|&index| &group.members[index]);
            group.listener(members.map(|member| member.socket.clone()).collect())
        };
        self.used.iter().map(listener).collect()
    }
}

impl Group {
    /// Whether `other` has the same address, which only SO_REUSEPORT allows.
    fn is_group_of(&self, other: &Group) -> bool {
        let key = |group: &Group| (group.local, group.family, group.interface, group.dual_stack);
        key(self) == key(other)
    }

    /// A listener with these sockets of the group.
    fn listener(&self, sockets: Vec<ListeningSocket>) -> Listener {
        Listener {
            local: self.local,
            sockets,
            group_size: self.members.len(),
            uid: self.uid,
            owners: Vec::new(),
        }
    }

    /// The indices of the members at which `socket` may wait.
    fn holding(&self, socket: &Socket) -> Vec<usize> {
        let all = || (0..self.members.len()).collect();
        // A connection whose handshake is not finished takes no slot, and has no cgroup.
        if socket.cause != Cause::NotAccepted {
            return all();
        }
        let mut holding: Vec<usize> = all();
        holding.retain(|&index| !self.members[index].was_empty);
        let same_cgroup = |&index: &usize| {
            socket.cgroup_id.is_some() && self.members[index].socket.cgroup == socket.cgroup_id
        };
        if holding.iter().any(same_cgroup) {
            holding.retain(same_cgroup);
        }
        match holding.is_empty() {
            // It has been accepted since it was listed.
            true => all(),
            false => holding,
        }
    }

    /// How well the listener matches a connection to `local`; higher is better. `None` if it would not accept it.
    fn score(&self, id: &DiagId, local: SocketAddr) -> Option<u32> {
        // The socket of a connection has the family of its listener, even if the connection uses IPv4
        // (net/ipv6/tcp_ipv6.c, tcp_v6_syn_recv_sock).
        if self.family != id.family() || (self.interface != 0 && self.interface != id.interface()) {
            return None;
        }
        let exact = self.local.ip() == local.ip();
        let wildcard = self.local.ip().is_unspecified() && (self.dual_stack || !self.mixes(local));
        (exact || wildcard).then(|| u32::from(exact) * 2 + u32::from(self.interface != 0))
    }

    /// Whether this is an IPv4 connection at an AF_INET6 listener.
    fn mixes(&self, local: SocketAddr) -> bool {
        self.family == Family::V6 && local.is_ipv4()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sock_diag::testdata::{listener, stuck};

    fn listeners(all: &[SocketMessage]) -> Listeners {
        let mut listeners = Listeners::default();
        for message in all {
            listeners.add(message);
        }
        listeners
    }

    /// The inodes of the listening sockets at which `connection` may wait.
    fn accepting(all: &[SocketMessage], connection: &SocketMessage) -> Vec<u32> {
        holding(&mut listeners(all), connection)
    }

    fn holding(listeners: &mut Listeners, connection: &SocketMessage) -> Vec<u32> {
        let group = listeners.group(&Socket::from_message(connection));
        let Some(group) = group else {
            return Vec::new();
        };
        let group = &listeners.groups[group];
        let members = group.holding(&Socket::from_message(connection));
        let inodes = members
            .iter()
            .map(|&index| group.members[index].socket.inode);
        inodes.collect()
    }

    /// A connection that was never accepted.
    fn waiting(local: &str) -> SocketMessage {
        SocketMessage {
            inode: 0,
            ..stuck(local, "10.0.0.9:5", 9)
        }
    }

    /// Listening sockets with one address, with the number of connections that wait at each.
    fn group(waiting: &[u32]) -> Vec<SocketMessage> {
        let member = |(&waiting, inode): (&u32, u32)| SocketMessage {
            recv_q: waiting,
            ..listener(Family::V4, "0.0.0.0:80", inode)
        };
        waiting.iter().zip(1..).map(member).collect()
    }

    #[test]
    fn an_exact_address_comes_before_the_wildcard() {
        let all = [
            listener(Family::V4, "0.0.0.0:80", 1),
            listener(Family::V4, "10.0.0.1:80", 2),
            listener(Family::V4, "10.0.0.1:81", 3),
        ];
        let to = |local| accepting(&all, &waiting(local));
        assert_eq!(to("10.0.0.1:80"), [2]);
        assert_eq!(to("10.0.0.2:80"), [1]);
        assert!(to("10.0.0.1:82").is_empty());
    }

    #[test]
    fn a_mapped_connection_came_through_a_dual_stack_listener() {
        let mut mapped = waiting("10.0.0.1:80");
        mapped.id = DiagId::example(Family::V6, mapped.id.tuple(), mapped.id.cookie());
        let v4 = listener(Family::V4, "0.0.0.0:80", 1);
        let dual = listener(Family::V6, "[::]:80", 2);
        let mut only = listener(Family::V6, "[::]:80", 3);
        only.v6only = Some(true);
        let all = [v4.clone(), only.clone(), dual.clone()];
        assert_eq!(accepting(&all, &mapped), [2]);
        assert!(accepting(&[v4, only], &mapped).is_empty());
    }

    #[test]
    fn a_connection_waits_at_a_listening_socket_whose_backlog_is_not_empty() {
        let connection = waiting("10.0.0.1:80");
        assert_eq!(accepting(&group(&[0, 9, 0]), &connection), [2]);
        assert_eq!(accepting(&group(&[3, 9, 0]), &connection), [1, 2]);
        let all = accepting(&group(&[0, 0]), &connection);
        assert_eq!(all, [1, 2], "accepted since it was listed");
    }

    #[test]
    fn a_backlog_that_was_once_empty_does_not_hold_it() {
        let connection = waiting("10.0.0.1:80");
        let mut listeners = listeners(&group(&[1, 9, 2]));
        assert_eq!(holding(&mut listeners, &connection), [1, 2, 3]);
        listeners.update(&group(&[0, 9, 2]));
        assert_eq!(holding(&mut listeners, &connection), [2, 3]);
        listeners.update(&group(&[4, 10]));
        assert_eq!(
            holding(&mut listeners, &connection),
            [2],
            "the third was closed"
        );
        assert_eq!(listeners.waiting_by_inode()[&1], 4);
    }

    #[test]
    fn the_cgroup_tells_the_listening_socket() {
        let mut members = group(&[2, 9, 1]);
        for (member, cgroup) in members.iter_mut().zip([70, 71, 71]) {
            member.cgroup = Some(cgroup);
        }
        let in_cgroup = |cgroup| {
            let connection = SocketMessage {
                cgroup,
                ..waiting("10.0.0.1:80")
            };
            accepting(&members, &connection)
        };
        assert_eq!(in_cgroup(Some(70)), [1]);
        assert_eq!(in_cgroup(Some(71)), [2, 3]);
        assert_eq!(in_cgroup(Some(72)), [1, 2, 3]);
        assert_eq!(in_cgroup(None), [1, 2, 3]);
    }

    #[test]
    fn a_handshake_takes_no_slot() {
        let handshake = SocketMessage {
            state: TcpState::SynRecv,
            ..waiting("10.0.0.1:80")
        };
        assert_eq!(accepting(&group(&[0, 9]), &handshake), [1, 2]);
    }

    #[test]
    fn each_set_of_listening_sockets_is_one_listener() {
        let mut listeners = listeners(&group(&[0, 9]));
        let connection = Socket::from_message(&waiting("10.0.0.1:80"));
        let handshake = Socket {
            cause: Cause::Handshake,
            ..connection.clone()
        };
        assert_eq!(listeners.accepting(&connection), Some(0));
        assert_eq!(listeners.accepting(&handshake), Some(1));
        assert_eq!(listeners.accepting(&connection), Some(0));
        let used = listeners.into_used();
        assert_eq!(used.len(), 2);
        assert_eq!((used[0].sockets.len(), used[0].group_size), (1, 2));
        assert_eq!((used[0].waiting(), used[0].backlog()), (9, 128));
        assert_eq!((used[1].sockets.len(), used[1].group_size), (2, 2));
    }
}
