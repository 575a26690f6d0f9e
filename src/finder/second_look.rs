//! The second look at sockets with unread bytes, before an act.
//!
//! The clocks of the kernel count what arrives and what is sent, not what the application reads. So an upload that has arrived as a
//! whole, and that the application still reads, looks idle. Only two looks show it: between them the unread bytes become fewer.
//! The first look may be one of an earlier run ([`crate::history`]). If it is of this run, cwkill waits before the second.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::{Duration, Instant};

use crate::control::Control;
use crate::filter::selectors::Selectors;
use crate::model::{Scan, Socket, Target};
use crate::sock_diag::{Cookie, Detail, DiagId, LookupError, SockDiag, SocketMessage};

/// The wait is made of pauses of this length, so that Ctrl-C ends it.
const INTERRUPT_INTERVAL: Duration = Duration::from_millis(100);

/// How long to wait before the second look, and for how many sockets. It is the same wait for all.
pub fn needed(scan: &Scan, selectors: &Selectors) -> (Duration, usize) {
    let waits = scan.targets.iter().map(|target| wait(target, selectors));
    waits
        .filter(|wait| !wait.is_zero())
        .fold((Duration::ZERO, 0), |(longest, count), wait| {
            (longest.max(wait), count + 1)
        })
}

fn wait(target: &Target, selectors: &Selectors) -> Duration {
    selectors.second_look_after(&target.socket)
}

/// Waits, looks again at the sockets that need it, and removes those in which bytes were read meanwhile: they are in use.
pub fn look_again(scan: &mut Scan, selectors: &Selectors, control: &dyn Control) {
    let (mut left, count) = needed(scan, selectors);
    if count == 0 {
        return;
    }
    while !left.is_zero() && !control.interrupted() {
        let pause = left.min(INTERRUPT_INTERVAL);
        control.sleep(pause);
        left -= pause;
    }
    let mut is_used = vec![false; scan.targets.len()];
    let mut by_netns: BTreeMap<usize, Vec<usize>> = BTreeMap::new();
    for (at, target) in scan.targets.iter().enumerate() {
        if !wait(target, selectors).is_zero() {
            by_netns.entry(target.socket.netns).or_default().push(at);
        }
    }
    for (netns, looked_at) in by_netns {
        let netns = &scan.namespaces[netns];
        let ids: Vec<DiagId> = looked_at
            .iter()
            .map(|&at| scan.targets[at].socket.id)
            .collect();
        let looked = netns.within(|| SockDiag::open()?.lookup(&ids, Detail::TcpInfo));
        // If it fails, it is unknown whether they are read.
        let answers = looked.and_then(|answers| answers).ok();
        for (index, at) in looked_at.into_iter().enumerate() {
            let answer = answers.as_ref().map(|answers| &answers[index]);
            is_used[at] = answer.is_none_or(|answer| is_read(&scan.targets[at].socket, answer));
        }
    }
    let mut is_used = is_used.into_iter();
    let before = scan.targets.len();
    scan.targets.retain(|_| is_used.next() == Some(false));
    scan.in_use += before - scan.targets.len();
}

/// Whether data has moved in `socket` since the first look. Sockets that are gone stay targets, and so do those in another state:
/// the recheck right before the act says what became of them.
fn is_read(socket: &Socket, now: &Result<SocketMessage, LookupError>) -> bool {
    match now {
        Err(LookupError::NotFound) => false,
        Err(LookupError::Errno(_)) => true,
        Ok(now) if now.state != socket.state => false,
        Ok(now) => has_moved(socket, &Socket::from_message(now)),
    }
}

/// Whether data has moved between two looks at a socket in the same state.
fn has_moved(socket: &Socket, now: &Socket) -> bool {
    // Without counters, only the unread bytes can be compared.
    now.listed_recv_q != socket.listed_recv_q || now.is_unchanged_since(socket) == Some(false)
}

/// The first looks of a run that lists the sockets again and again: each list is a look, so that it needs not wait.
#[derive(Debug, Default)]
pub struct Looks(HashMap<Cookie, (Socket, Instant)>);

impl Looks {
    /// Removes the targets whose second look is not due yet, or in which bytes were read since the first one. They count as in use for now.
    /// Returns the number of those that were looked at for the first time, and the longest time to their second look.
    pub fn defer(
        &mut self,
        scan: &mut Scan,
        selectors: &Selectors,
        now: Instant,
    ) -> (usize, Duration) {
        let targets = scan.targets.iter();
        let listed: HashSet<Cookie> = targets.map(|target| target.socket.cookie()).collect();
        self.0.retain(|cookie, _| listed.contains(cookie));
        let (longest, count) = needed(scan, selectors);
        let mut known = 0;
        let before = scan.targets.len();
        scan.targets.retain(|target| {
            if wait(target, selectors).is_zero() {
                return true;
            }
            let socket = &target.socket;
            let look = (socket.clone(), now);
            let Some((seen, since)) = self.0.get_mut(&socket.cookie()) else {
                self.0.insert(socket.cookie(), look);
                return false;
            };
            known += 1;
            if seen.state != socket.state || has_moved(seen, socket) {
                (*seen, *since) = look;
                return false;
            }
            now.saturating_duration_since(*since) >= selectors.second_look_after(seen)
        });
        scan.in_use += before - scan.targets.len();
        (count - known, longest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sock_diag::testdata::stuck;
    use crate::tcp::TcpState;

    #[test]
    fn fewer_unread_bytes_are_use() {
        let mut message = stuck("10.0.0.1:80", "10.0.0.2:5", 1);
        message.recv_q = 500;
        let socket = Socket::from_message(&message);
        assert!(!is_read(&socket, &Ok(message.clone())));
        // An answered keepalive reads nothing.
        message.quiet.as_mut().unwrap().last_ack_recv = Duration::ZERO;
        assert!(!is_read(&socket, &Ok(message.clone())));
        let mut read = message.clone();
        read.recv_q = 400;
        assert!(is_read(&socket, &Ok(read.clone())));
        read.counters = None;
        assert!(is_read(&socket, &Ok(read)));
        let mut sent = message.clone();
        sent.counters.as_mut().unwrap().written += 1;
        assert!(is_read(&socket, &Ok(sent)));
        message.state = TcpState::LastAck;
        assert!(!is_read(&socket, &Ok(message)));
        assert!(!is_read(&socket, &Err(LookupError::NotFound)));
        let failed = LookupError::Errno(nix::errno::Errno::ENOMEM);
        assert!(is_read(&socket, &Err(failed)));
    }

    #[test]
    fn each_list_of_a_watch_is_a_look() {
        let selectors = Selectors {
            min_idle: Duration::from_secs(3),
            ..Selectors::default()
        };
        let start = Instant::now();
        let mut looks = Looks::default();
        // The unread bytes of two sockets at this time; the first is read.
        let mut seen = |seconds, unread: [u32; 2]| {
            let target = |(&unread, cookie)| {
                let mut message = stuck("10.0.0.1:80", "10.0.0.2:5", cookie);
                message.recv_q = unread;
                Target::new(Socket::from_message(&message))
            };
            let mut scan = Scan {
                targets: unread.iter().zip(1..).map(target).collect(),
                ..Scan::default()
            };
            let now = start + Duration::from_secs(seconds);
            let (first, _) = looks.defer(&mut scan, &selectors, now);
            let left: Vec<u32> = scan
                .targets
                .iter()
                .map(|target| target.socket.listed_recv_q)
                .collect();
            (first, scan.in_use, left)
        };
        assert_eq!(seen(0, [500, 1]), (1, 1, vec![1]), "a FIN is not unread");
        assert_eq!(seen(1, [500, 700]), (1, 2, vec![]));
        assert_eq!(seen(2, [400, 700]), (0, 2, vec![]));
        assert_eq!(seen(4, [400, 700]), (0, 1, vec![700]));
        assert_eq!(seen(5, [400, 700]), (0, 0, vec![400, 700]));
        assert_eq!(seen(6, [300, 700]), (0, 1, vec![700]));
    }
}
