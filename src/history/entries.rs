//! The entries of the history. Pure.

use std::time::Duration;

use foldhash::HashMap;

use super::fnv_1a;
use crate::filter::selectors::Selectors;
use crate::model::socket::TimeSource;
use crate::model::{HistoryUpdate, NetnsKey, Snapshot, Socket, SocketKey};
use crate::tcp::StateSet;

/// The maximum number of entries.
pub(super) const MAX_ENTRIES: usize = 500_000;
/// An entry that no run has seen for this time is dropped.
const FORGET_AFTER: Duration = Duration::from_secs(7 * 24 * 60 * 60);
/// The maximum number of unseen entries. The latest are kept: a namespace that has vanished is never looked into again, and each run
/// reads the whole file.
const MAX_UNSEEN: usize = 20_000;
/// An entry that no run has seen for this time is unseen.
const UNSEEN_AFTER: Duration = Duration::from_secs(60 * 60);
/// A socket is gone when this many complete lists in a row do not have it. The kernel can omit a socket if others vanish while it
/// lists them.
const MISSING_FROM_LISTS: u8 = 2;

/// Two idle times that differ by no more than this are the same: the clocks of the kernel tick up to ten milliseconds apart.
const IDLE_TOLERANCE: Duration = Duration::from_millis(100);

/// One socket in the history. All times are of the clock of [`super::now`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// As long as this is the snapshot of the socket, the times below are true.
    pub snapshot: Snapshot,
    /// It has been stuck since then, or longer.
    pub stuck_since: Duration,
    /// No data has moved since then, or longer.
    pub idle_since: Duration,
    /// When a run first saw it with this snapshot.
    pub unchanged_since: Duration,
    /// When a run last saw it.
    pub seen: Duration,
    /// The [`Reach`] of that run.
    pub reach: u32,
    /// How many complete lists in a row did not have it.
    pub missed: u8,
}

/// Which sockets of a namespace a run lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reach {
    /// A hash of the selectors that a socket cannot leave; 0 if every socket in the states matches.
    hash: u32,
    states: StateSet,
}

impl Reach {
    pub fn of(selectors: &Selectors) -> Self {
        let expression = selectors.as_expression();
        let hash = match expression == Selectors::default().as_expression() {
            true => 0,
            // The text is the same in every run with the same selectors. If it once is not, entries live longer.
            false => {
                let hash = fnv_1a(format!("{expression:?}").bytes().map(u64::from));
                u32::try_from(hash >> 32).unwrap_or(u32::MAX).max(1)
            }
        };
        Reach {
            hash,
            states: selectors.states,
        }
    }

    /// Whether a run with this reach would have listed the socket of `entry`.
    fn sees(self, entry: &Entry) -> bool {
        self.states.contains(entry.snapshot.state) && (self.hash == 0 || self.hash == entry.reach)
    }
}

/// The entries by socket.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entries(pub(super) HashMap<SocketKey, Entry>);

impl Entries {
    /// Makes the times of `socket` as long as its entry shows.
    pub fn apply_to(&self, netns: NetnsKey, socket: &mut Socket, now: Duration) {
        if self.0.is_empty() {
            return;
        }
        let cookie = socket.cookie();
        let (Some(snapshot), Some(entry)) =
            (socket.snapshot(), self.0.get(&SocketKey { netns, cookie }))
        else {
            return;
        };
        if entry.snapshot == snapshot {
            socket.unchanged_for = now.saturating_sub(entry.unchanged_since);
            let stuck = now.saturating_sub(entry.stuck_since);
            if socket.age.is_some_and(|age| age < stuck) {
                (socket.age, socket.age_source) = (Some(stuck), TimeSource::History);
            }
            // The kernel's idle time ignores reads by the application, so it can be too long. The history counts them, so it wins.
            let idle = now.saturating_sub(entry.idle_since);
            if socket
                .idle
                .is_some_and(|known| known.abs_diff(idle) > IDLE_TOLERANCE)
            {
                (socket.idle, socket.idle_source) = (Some(idle), TimeSource::History);
            }
        } else if entry.snapshot.state == snapshot.state && entry.snapshot.recv_q != snapshot.recv_q
        {
            // The application has read since then. The clocks of the kernel do not count that.
            let zero = socket.idle.map(|_| Duration::ZERO);
            (socket.idle, socket.idle_source) = (zero, TimeSource::History);
        }
    }

    /// Adds what a scan has seen, and drops the sockets that are gone.
    pub(super) fn add(&mut self, update: &HistoryUpdate, reach: Reach, now: Duration) {
        for (key, entry) in &mut self.0 {
            if reach.sees(entry) && update.namespaces.contains(&key.netns) {
                entry.missed = entry.missed.saturating_add(1);
            }
        }
        for new in &update.entries {
            let entry = Entry {
                snapshot: new.snapshot,
                stuck_since: new.stuck_since,
                idle_since: new.idle_since,
                unchanged_since: now,
                seen: now,
                reach: reach.hash,
                missed: 0,
            };
            let place = self.0.entry(new.key).or_insert(entry);
            let unchanged_since = match place.snapshot == new.snapshot {
                true => place.unchanged_since,
                false => now,
            };
            *place = Entry {
                unchanged_since,
                ..entry
            };
        }
        self.0.retain(|_, entry| {
            entry.missed < MISSING_FROM_LISTS && now.saturating_sub(entry.seen) < FORGET_AFTER
        });
        self.drop_unseen(now);
        self.shrink();
    }

    /// Keeps at most [`MAX_UNSEEN`] of the unseen entries, the latest.
    fn drop_unseen(&mut self, now: Duration) {
        let is_unseen = |entry: &Entry| now.saturating_sub(entry.seen) >= UNSEEN_AFTER;
        self.keep_latest(MAX_UNSEEN, is_unseen);
    }

    /// Keeps at most [`MAX_ENTRIES`], those that were seen last.
    pub(super) fn shrink(&mut self) {
        self.keep_latest(MAX_ENTRIES, |_| true);
    }

    /// Keeps at most `max` of the entries that `counts`, those that were seen last.
    fn keep_latest(&mut self, max: usize, counts: impl Fn(&Entry) -> bool) {
        if self.0.values().filter(|entry| counts(entry)).count() <= max {
            return;
        }
        let counted = self.0.iter().filter(|(_, entry)| counts(entry));
        let mut counted: Vec<(Duration, SocketKey)> =
            counted.map(|(key, entry)| (entry.seen, *key)).collect();
        counted.select_nth_unstable_by_key(max, |(seen, _)| std::cmp::Reverse(*seen));
        for (_, key) in &counted[max..] {
            self.0.remove(key);
        }
    }

    /// Adds the entries that another run has written meanwhile.
    pub(super) fn merge(&mut self, other: Entries) {
        for (key, theirs) in other.0 {
            let ours = self.0.entry(key).or_insert(theirs);
            if ours.snapshot == theirs.snapshot {
                ours.stuck_since = ours.stuck_since.min(theirs.stuck_since);
                ours.idle_since = ours.idle_since.min(theirs.idle_since);
                ours.unchanged_since = ours.unchanged_since.min(theirs.unchanged_since);
                ours.seen = ours.seen.max(theirs.seen);
            } else if ours.seen < theirs.seen {
                *ours = theirs;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::NewEntry;
    use crate::sock_diag::testdata::stuck;
    use crate::sock_diag::{Cookie, SocketMessage};
    use crate::tcp::TcpState;

    const HERE: NetnsKey = NetnsKey {
        inode: 4026531840,
        cookie: 1,
    };
    const THERE: NetnsKey = NetnsKey {
        inode: 4026531840,
        cookie: 2,
    };

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// Stuck and idle for this many seconds by the clocks of the kernel.
    fn message(cookie: u64, age: u64) -> SocketMessage {
        let mut message = stuck("10.0.0.1:80", "10.0.0.2:5", cookie);
        let quiet = message.quiet.as_mut().unwrap();
        quiet.last_ack_recv = at(age);
        quiet.last_data_recv = at(age);
        quiet.last_data_sent = at(age);
        message
    }

    fn reach(ports: &[u16]) -> Reach {
        Reach::of(&Selectors {
            ports: ports.iter().map(|&port| port..=port).collect(),
            ..Selectors::default()
        })
    }

    /// A run at `now` that sees these sockets; returns them with their times.
    fn run(
        entries: &mut Entries,
        netns: NetnsKey,
        reach: Reach,
        now: u64,
        messages: &[SocketMessage],
    ) -> Vec<Socket> {
        run_slowly(entries, netns, reach, [now, now], messages)
    }

    /// A run that has the list of the kernel only some time after it asked: `before` and `after` are the times of both.
    fn run_slowly(
        entries: &mut Entries,
        netns: NetnsKey,
        reach: Reach,
        [before, after]: [u64; 2],
        messages: &[SocketMessage],
    ) -> Vec<Socket> {
        let mut update = HistoryUpdate {
            namespaces: vec![netns],
            entries: Vec::new(),
        };
        let see = |message| {
            let mut socket = Socket::from_message(message);
            entries.apply_to(netns, &mut socket, at(before));
            let entry = NewEntry::of(&socket, netns, at(before), at(after));
            update.entries.extend(entry);
            socket
        };
        let sockets = messages.iter().map(see).collect();
        entries.add(&update, reach, at(after));
        sockets
    }

    /// Age and idle time, in seconds, and whether they are from the history.
    fn times(socket: &Socket) -> (u64, bool, u64, bool) {
        let is_from_history = |source| source == TimeSource::History;
        (
            socket.age.unwrap().as_secs(),
            is_from_history(socket.age_source),
            socket.idle.unwrap().as_secs(),
            is_from_history(socket.idle_source),
        )
    }

    #[test]
    fn a_slow_list_makes_nothing_older() {
        let mut entries = Entries::default();
        let all = reach(&[]);
        // The kernel lists it at 1030: it has been stuck since 1025.
        run_slowly(&mut entries, HERE, all, [1000, 1030], &[message(1, 5)]);
        let second = run(&mut entries, HERE, all, 1040, &[message(1, 0)]);
        assert_eq!(times(&second[0]), (15, true, 15, true));
        // The times in the history do not drift, however slow the runs are.
        for now in [1100, 1200, 1300] {
            let slow = [now, now + 50];
            let later = run_slowly(&mut entries, HERE, all, slow, &[message(1, 0)]);
            assert_eq!(times(&later[0]), (now - 1025, true, now - 1025, true));
        }
        // The application may have read until the kernel listed it.
        let mut read = message(1, 0);
        read.recv_q += 7;
        run_slowly(&mut entries, HERE, all, [1400, 1430], &[read.clone()]);
        let after = run(&mut entries, HERE, all, 1440, &[read]);
        assert_eq!(times(&after[0]).2, 10);
    }

    #[test]
    fn two_looks_know_for_how_long_nothing_was_read() {
        let mut entries = Entries::default();
        let all = reach(&[]);
        let mut look = |before: u64, recv_q| {
            let mut message = message(1, 500);
            message.recv_q = recv_q;
            let slow = [before, before + 2];
            run_slowly(&mut entries, HERE, all, slow, &[message])[0]
                .unchanged_for
                .as_secs()
        };
        assert_eq!(look(1000, 90), 0, "a single look");
        assert_eq!(look(1005, 90), 3);
        assert_eq!(look(1060, 90), 58);
        assert_eq!(look(1061, 80), 0, "the application has read");
        assert_eq!(look(1073, 80), 10);
    }

    #[test]
    fn a_socket_with_the_same_counters_grows_older() {
        let mut entries = Entries::default();
        let all = reach(&[]);
        let first = run(&mut entries, HERE, all, 1000, &[message(1, 30)]);
        assert_eq!(times(&first[0]), (30, false, 30, false));
        // A keepalive is answered each second.
        for now in [1060, 1120, 4000] {
            let later = run(&mut entries, HERE, all, now, &[message(1, 0)]);
            assert_eq!(times(&later[0]), (now - 970, true, now - 970, true));
        }
        let later = run(&mut entries, HERE, all, 4100, &[message(1, 3130)]);
        assert_eq!(
            times(&later[0]),
            (3130, false, 3130, false),
            "the clocks agree"
        );
    }

    #[test]
    fn a_socket_in_which_data_moves_stays_young() {
        let mut entries = Entries::default();
        let all = reach(&[]);
        run(&mut entries, HERE, all, 1000, &[message(1, 500)]);
        type Change = fn(&mut SocketMessage);
        let changes: [Change; 5] = [
            |message| message.counters.as_mut().unwrap().written += 1,
            |message| message.counters.as_mut().unwrap().acked += 1,
            |message| message.counters.as_mut().unwrap().received += 1,
            |message| message.state = TcpState::LastAck,
            |message| message.counters = None,
        ];
        for change in changes {
            let mut moved = message(1, 2);
            change(&mut moved);
            let seen = run(&mut entries.clone(), HERE, all, 1060, &[moved]);
            assert_eq!(times(&seen[0]), (2, false, 2, false));
        }
        // The application reads; the clocks of the kernel do not see it.
        let mut read = message(1, 560);
        read.recv_q = 0;
        let seen = run(&mut entries, HERE, all, 1060, &[read.clone()]);
        assert_eq!(times(&seen[0]), (560, false, 0, true));
        let seen = run(&mut entries, HERE, all, 1070, &[read]);
        assert_eq!(times(&seen[0]), (570, true, 10, true));
    }

    #[test]
    fn a_cookie_counts_in_its_own_namespace() {
        let mut entries = Entries::default();
        let all = reach(&[]);
        run(&mut entries, HERE, all, 1000, &[message(1, 500)]);
        let there = run(&mut entries, THERE, all, 1060, &[message(1, 0)]);
        assert_eq!(times(&there[0]).0, 0);
        let here = run(&mut entries, HERE, all, 1060, &[message(1, 0)]);
        assert_eq!(times(&here[0]).0, 560);
    }

    #[test]
    fn only_what_is_known_to_be_gone_is_forgotten() {
        let known = |entries: &Entries, netns, cookie| {
            let cookie = Cookie(cookie);
            entries.0.contains_key(&SocketKey { netns, cookie })
        };
        let mut entries = Entries::default();
        let (all, web) = (reach(&[]), reach(&[80]));
        run(&mut entries, THERE, all, 900, &[message(3, 0)]);
        run(
            &mut entries,
            HERE,
            all,
            1000,
            &[message(1, 0), message(2, 0)],
        );
        // These see other sockets.
        let mut last_ack = all;
        last_ack.states = TcpState::LastAck.into();
        for reach in [web, last_ack, web, last_ack] {
            run(&mut entries, HERE, reach, 1060, &[]);
        }
        assert!(known(&entries, HERE, 1) && known(&entries, HERE, 2));
        // One list can miss a socket.
        run(&mut entries, HERE, all, 1120, &[message(2, 0)]);
        assert!(known(&entries, HERE, 1));
        run(&mut entries, HERE, all, 1180, &[message(2, 0)]);
        assert!(!known(&entries, HERE, 1) && known(&entries, HERE, 2));
        assert!(known(&entries, THERE, 3));
        // The same selectors as those that saw it.
        run(&mut entries, HERE, web, 1200, &[message(2, 0)]);
        for now in [1260, 1320] {
            assert!(known(&entries, HERE, 2));
            run(&mut entries, HERE, web, now, &[]);
        }
        assert!(!known(&entries, HERE, 2));
        // After a week without a run in its namespace.
        run(&mut entries, HERE, all, 900 + 7 * 24 * 60 * 60, &[]);
        assert!(!known(&entries, THERE, 3));
    }

    #[test]
    fn two_runs_at_once_lose_nothing_and_make_nothing_older() {
        let all = reach(&[]);
        let (mut one, mut other) = (Entries::default(), Entries::default());
        run(&mut one, HERE, all, 1000, &[message(1, 10), message(2, 10)]);
        run(
            &mut other,
            HERE,
            all,
            1001,
            &[message(1, 0), message(3, 10)],
        );
        let mut moved = message(2, 0);
        moved.counters.as_mut().unwrap().written += 1;
        run(
            &mut other,
            HERE,
            all,
            1002,
            &[message(1, 0), moved, message(3, 0)],
        );
        for (mut ours, theirs) in [(one.clone(), other.clone()), (other, one)] {
            ours.merge(theirs);
            let since = |cookie| {
                let cookie = Cookie(cookie);
                ours.0[&SocketKey {
                    netns: HERE,
                    cookie,
                }]
                    .stuck_since
            };
            assert_eq!([since(1), since(2), since(3)], [at(990), at(1002), at(991)]);
        }
    }

    #[test]
    fn few_entries_of_vanished_namespaces_stay() {
        let mut entries = Entries::default();
        let all = reach(&[]);
        run(&mut entries, HERE, all, 1000, &[message(1, 0)]);
        let entry = *entries.0.values().next().unwrap();
        for cookie in 2..MAX_UNSEEN as u64 + 10 {
            let cookie = Cookie(cookie);
            let seen = at(1000 + cookie.0 % 2);
            let key = SocketKey {
                netns: THERE,
                cookie,
            };
            entries.0.insert(key, Entry { seen, ..entry });
        }
        let before = entries.0.len();
        run(&mut entries, HERE, all, 1500, &[message(1, 0)]);
        assert_eq!(entries.0.len(), before, "a run may come back soon");
        run(&mut entries, HERE, all, 5000, &[message(1, 0)]);
        assert_eq!(entries.0.len(), MAX_UNSEEN + 1);
        let latest = entries.0.values().filter(|entry| entry.seen == at(1001));
        assert_eq!(latest.count(), MAX_UNSEEN / 2 + 4, "the latest stay");
    }

    #[test]
    fn the_number_of_entries_is_bounded() {
        let mut entries = Entries::default();
        let all = reach(&[]);
        run(&mut entries, HERE, all, 1000, &[message(1, 0)]);
        let entry = *entries.0.values().next().unwrap();
        for cookie in 2..=MAX_ENTRIES as u64 + 2 {
            let cookie = Cookie(cookie);
            entries.0.insert(
                SocketKey {
                    netns: THERE,
                    cookie,
                },
                entry,
            );
        }
        run(&mut entries, HERE, all, 1001, &[message(1, 0)]);
        assert_eq!(entries.0.len(), MAX_ENTRIES);
        let of_this_run = entries.0.values().filter(|entry| entry.seen == at(1001));
        assert_eq!(of_this_run.count(), 1, "the latest stay");
    }
}
