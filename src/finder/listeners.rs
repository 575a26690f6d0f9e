//! The listener that would accept a connection that is still in a backlog.
//!
//! sock_diag does not report it, so cwkill chooses as the kernel does: an exact address before the wildcard, a listener of
//! the connection's own family before a dual-stack one, and the bound interface if there is one
//! (net/ipv4/inet_hashtables.c and net/ipv6/inet6_hashtables.c, compute_score).

use std::collections::HashMap;
use std::net::SocketAddr;

use crate::model::Listener;
use crate::sock_diag::{DiagId, DumpError, DumpRequest, Family, SockDiag, SocketMessage};
use crate::tcp::TcpState;

/// The listeners of a network namespace, and which of them [`Listeners::accepting`] has returned.
#[derive(Debug, Default)]
pub struct Listeners {
    groups: Vec<Group>,
    /// Port to indices in `groups`.
    by_port: HashMap<u16, Vec<usize>>,
    /// The used listeners: indices in `groups`, in the order of first use.
    used: Vec<usize>,
}

#[derive(Debug)]
struct Group {
    local: SocketAddr,
    family: Family,
    interface: u32,
    /// It accepts IPv4 connections on an IPv6 wildcard address.
    dual_stack: bool,
    uid: u32,
    waiting: u32,
    backlog: u32,
    /// The inode of each socket, and the number of connections that wait for accept(2) at it.
    sockets: Vec<(u32, u32)>,
}

/// Lists the listening sockets in the namespace of `diag`; the values that `keep` returns for them.
fn dump<T>(
    diag: &mut SockDiag,
    keep: impl Fn(SocketMessage) -> Option<T>,
) -> Result<Vec<T>, DumpError> {
    let mut kept = Vec::new();
    for family in Family::ALL {
        let request = DumpRequest {
            family,
            states: TcpState::Listen.into(),
            info: false,
            bytecode: &[],
        };
        kept.extend(diag.dump(&request, &keep)?);
    }
    Ok(kept)
}

/// The ports of all listeners in the network namespace of the calling thread. A port can occur more than once.
///
/// # Errors
/// As [`SockDiag::open`] and [`SockDiag::dump`].
pub fn ports() -> Result<Vec<u16>, DumpError> {
    dump(&mut SockDiag::open()?, |message| {
        Some(message.id.tuple().local.port())
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
            waiting: message.recv_q,
            backlog: message.send_q,
            sockets: vec![(message.inode, message.recv_q)],
        };
        let on_port = self.by_port.entry(candidate.local.port()).or_default();
        let groups = &mut self.groups;
        match on_port
            .iter()
            .find(|&&index| groups[index].is_group_of(&candidate))
        {
            Some(&index) => groups[index].join(candidate),
            None => {
                on_port.push(groups.len());
                groups.push(candidate);
            }
        }
    }

    /// The listener that would accept the connection `id` to `local`, as an index in the result of
    /// [`Listeners::into_used`]. `None` if that listener has been closed.
    pub fn accepting(&mut self, id: &DiagId, local: SocketAddr) -> Option<usize> {
        let on_port = self.by_port.get(&local.port())?;
        let scored = on_port.iter().filter_map(|&index| {
            let score = self.groups[index].score(id, local)?;
            Some((score, index))
        });
        let (_, best) = scored.max_by_key(|(score, _)| *score)?;
        let place = self.used.iter().position(|&index| index == best);
        Some(place.unwrap_or_else(|| {
            self.used.push(best);
            self.used.len() - 1
        }))
    }

    /// The number of connections that wait for accept(2) at each listening socket, by its inode.
    pub fn waiting_by_inode(&self) -> HashMap<u32, u32> {
        let sockets = self.groups.iter().flat_map(|group| &group.sockets);
        sockets.copied().collect()
    }

    /// The used listeners, without their owners.
    pub fn into_used(self) -> Vec<Listener> {
        let used = self.used.iter().map(|&index| &self.groups[index]);
        used.map(|group| Listener {
            local: group.local,
            inodes: group.inodes().collect(),
            uid: group.uid,
            waiting: group.waiting,
            backlog: group.backlog,
            owners: Vec::new(),
        })
        .collect()
    }
}

impl Group {
    /// Whether `other` has the same address, which only SO_REUSEPORT allows.
    fn is_group_of(&self, other: &Group) -> bool {
        let key = |group: &Group| (group.local, group.family, group.interface, group.dual_stack);
        key(self) == key(other)
    }

    fn inodes(&self) -> impl Iterator<Item = u32> + '_ {
        self.sockets.iter().map(|(inode, _)| *inode)
    }

    fn join(&mut self, other: Group) {
        self.waiting = self.waiting.saturating_add(other.waiting);
        self.backlog = self.backlog.saturating_add(other.backlog);
        self.sockets.extend(other.sockets);
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

    /// The inodes of the listener that would accept a connection to `local`.
    fn accepting(all: &[SocketMessage], connection: &SocketMessage) -> Vec<u32> {
        let mut listeners = listeners(all);
        let local = connection.id.tuple().local;
        let place = listeners.accepting(&connection.id, local);
        assert!(place.is_none_or(|place| place == 0));
        let used = listeners.into_used().into_iter();
        used.flat_map(|listener| listener.inodes).collect()
    }

    #[test]
    fn an_exact_address_comes_before_the_wildcard() {
        let all = [
            listener(Family::V4, "0.0.0.0:80", 1),
            listener(Family::V4, "10.0.0.1:80", 2),
            listener(Family::V4, "10.0.0.1:81", 3),
        ];
        let to = |local| accepting(&all, &stuck(local, "10.0.0.9:5", 9));
        assert_eq!(to("10.0.0.1:80"), [2]);
        assert_eq!(to("10.0.0.2:80"), [1]);
        assert!(to("10.0.0.1:82").is_empty());
    }

    #[test]
    fn a_mapped_connection_came_through_a_dual_stack_listener() {
        let mut mapped = stuck("10.0.0.1:80", "10.0.0.9:5", 9);
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
    fn a_reuseport_group_is_one_listener_with_all_sockets() {
        let all = [
            listener(Family::V4, "0.0.0.0:80", 1),
            listener(Family::V4, "0.0.0.0:80", 2),
        ];
        let mut group = listeners(&all);
        let connection = stuck("10.0.0.1:80", "10.0.0.9:5", 9);
        let local = connection.id.tuple().local;
        assert_eq!(group.accepting(&connection.id, local), Some(0));
        assert_eq!(group.accepting(&connection.id, local), Some(0));
        let used = group.into_used();
        assert_eq!(used.len(), 1);
        assert_eq!(used[0].inodes, [1, 2]);
        assert_eq!((used[0].waiting, used[0].backlog), (4, 256));
    }
}
