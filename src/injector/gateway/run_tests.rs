use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::exchange::picked_up;
use super::*;
use crate::conntrack::ConntrackState;
use crate::conntrack::codec::Zone;
use crate::model::{EndReport, EntryDeletion, Method};
use crate::tcp::TcpFlags;

/// A clock that only sleeping moves, and a Ctrl-C.
struct Clock {
    now: Mutex<Instant>,
    interrupted: Arc<AtomicBool>,
}

impl Control for Clock {
    fn now(&self) -> Instant {
        *self.now.lock().unwrap()
    }

    fn sleep(&self, duration: Duration) {
        *self.now.lock().unwrap() += duration;
    }

    fn interrupted(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }

    fn progress(&self, _: Method, _: usize) {}
}

/// The ends by their addresses, with the number that each expects; those without one answer RST.
#[derive(Default)]
struct Hosts {
    numbers: HashMap<SocketAddr, u32>,
    without_path: Vec<SocketAddr>,
    sent: Vec<Segment>,
    answers: Vec<Segment>,
    drawn: u32,
    /// The errnos with which an interface refuses its next segments; 0: it takes the segment.
    refusals: HashMap<u32, VecDeque<i32>>,
    /// The numbers of the sent segments after which captured ones are lost.
    losses: Vec<usize>,
    /// Ctrl-C comes with the first RST.
    is_interrupted_by_reset: bool,
    interrupted: Arc<AtomicBool>,
    /// From the first RST on, captured segments are lost all the time, and an end that was reset answers nothing.
    is_flooded_by_reset: bool,
    /// The end that gets the first question opens a new connection.
    opens_anew: bool,
}

impl Network for Hosts {
    fn find_paths(
        &mut self,
        flows: &[Flow],
        _: &dyn Control,
    ) -> Vec<Result<[LinkDestination; 2], NoPath>> {
        let found = flows.iter().map(|flow| {
            let ends = flow.ends();
            let mut missing = ends.iter().filter(|end| self.without_path.contains(end));
            match missing.next() {
                Some(end) => Err(NoPath::NoRoute(end.ip())),
                None => Ok([1, 2].map(|interface| LinkDestination {
                    interface,
                    ..LinkDestination::default()
                })),
            }
        });
        found.collect()
    }

    fn listen(&mut self, _: &[Tuple]) -> io::Result<()> {
        Ok(())
    }

    fn send(&mut self, segment: &Segment, link: LinkDestination) -> io::Result<()> {
        let to = segment.to;
        if let Some(errno) = self
            .refusals
            .get_mut(&link.interface)
            .and_then(VecDeque::pop_front)
            && errno != 0
        {
            return Err(io::Error::from_raw_os_error(errno));
        }
        self.sent.push(*segment);
        if self.is_interrupted_by_reset && segment.flags == TcpFlags::RST {
            self.interrupted.store(true, Ordering::Relaxed);
        }
        let answer = |seq, ack, flags| Segment {
            from: segment.to,
            to: segment.from,
            seq,
            ack,
            flags,
            payload_len: 0,
        };
        if self.opens_anew && self.sent.len() == 1 {
            self.answers.push(answer(Seq(1), Seq(0), TcpFlags::SYN));
        }
        let is_flooded = self.is_flooded();
        match (self.numbers.get(&to).copied(), segment.flags) {
            (Some(number), TcpFlags::RST) if segment.seq == Seq(number) => {
                self.numbers.remove(&to);
            }
            (_, TcpFlags::RST) => {}
            (Some(number), _) => self
                .answers
                .push(answer(Seq(1), Seq(number), TcpFlags::ACK)),
            (None, _) if is_flooded => {}
            (None, _) => self
                .answers
                .push(answer(segment.ack, Seq(0), TcpFlags::RST)),
        }
        Ok(())
    }

    fn drain(&mut self, handle: &mut dyn FnMut(Segment)) -> io::Result<()> {
        self.answers.drain(..).for_each(handle);
        Ok(())
    }

    fn has_lost(&mut self) -> bool {
        let count = self.losses.len();
        self.losses.retain(|after| self.sent.len() < *after);
        self.losses.len() < count || self.is_flooded()
    }

    fn random(&mut self) -> Seq {
        self.drawn += 7;
        Seq(self.drawn)
    }
}

impl Hosts {
    fn is_flooded(&self) -> bool {
        self.is_flooded_by_reset && self.sent.iter().any(|it| it.flags == TcpFlags::RST)
    }
}

/// The entries that there are now.
#[derive(Default)]
struct Entries {
    now: Vec<Entry>,
    deleted: Vec<Entry>,
    is_busy: bool,
}

impl Table for Entries {
    fn lookup(&mut self, entry: &Entry) -> io::Result<Option<Entry>> {
        let is_it = |one: &&Entry| (one.original, one.zone) == (entry.original, entry.zone);
        Ok(self.now.iter().find(is_it).cloned())
    }

    fn delete(&mut self, entry: &Entry) -> io::Result<Delete> {
        if self.is_busy {
            self.deleted.push(entry.clone());
            return Ok(Delete::Offloaded);
        }
        let count = self.now.len();
        self.now.retain(|one| one.id != entry.id);
        if self.now.len() == count {
            return Ok(Delete::Gone);
        }
        self.deleted.push(entry.clone());
        Ok(Delete::Deleted)
    }
}

/// Connection number `index` between two living ends.
fn entry(index: u8) -> Entry {
    let source = format!("10.9.1.{index}:4000");
    Entry {
        id: Some(u32::from(index)),
        ..Entry::example(&source, "10.9.2.2:80")
    }
}

fn living(entries: &[Entry]) -> Hosts {
    let ends = entries
        .iter()
        .flat_map(|entry| [entry.original.local, entry.reply.local]);
    Hosts {
        numbers: ends.zip(1000..).collect(),
        ..Hosts::default()
    }
}

fn run_on(
    entries: &[Entry],
    selectors: &ForwardedSelectors,
    table: &mut dyn Table,
    hosts: &mut Hosts,
    rate: u32,
) -> (Vec<Forwarded>, Duration) {
    act_on(ForwardedAct::Cut, entries, selectors, table, hosts, rate)
}

fn act_on(
    act: ForwardedAct,
    entries: &[Entry],
    selectors: &ForwardedSelectors,
    table: &mut dyn Table,
    hosts: &mut Hosts,
    rate: u32,
) -> (Vec<Forwarded>, Duration) {
    let start = Instant::now();
    let clock = Clock {
        now: Mutex::new(start),
        interrupted: Arc::clone(&hosts.interrupted),
    };
    let mut connections: Vec<Forwarded> = entries
        .iter()
        .map(|entry| Forwarded::new(entry.clone(), None))
        .collect();
    let rules = ForwardedRules {
        act,
        selectors,
        timeouts: &Timeouts::default(),
        rate,
        retry: Duration::from_millis(520),
    };
    let mut pace = Pace::new(rules.rate);
    run(&mut connections, &rules, table, hosts, &clock, &mut pace);
    (connections, clock.now() - start)
}

fn outcomes(connections: &[Forwarded]) -> Vec<&'static str> {
    let outcome = |one: &Forwarded| one.outcome.as_ref().map_or("none", ForwardedOutcome::name);
    connections.iter().map(outcome).collect()
}

#[test]
fn only_the_entry_that_was_listed_is_acted_on() {
    let entries = [entry(1), entry(2), entry(3), entry(4)];
    let mut now = entries.to_vec();
    // The second has ended; the third has ended, and a new connection has its addresses; the mark of the fourth has changed.
    now.remove(1);
    now[1].id = Some(99);
    now[2].mark = Some(5);
    let mut table = Entries {
        now,
        ..Entries::default()
    };
    let mut hosts = Hosts {
        numbers: [(entries[0].original.local, 5), (entries[0].reply.local, 6)].into(),
        ..Hosts::default()
    };
    let selectors = ForwardedSelectors {
        marks: vec![crate::filter::forwarded::Mark {
            value: 0,
            mask: 0xff,
        }],
        ..ForwardedSelectors::default()
    };
    let (connections, _) = run_on(&entries, &selectors, &mut table, &mut hosts, 20_000);
    assert_eq!(outcomes(&connections), ["cut", "gone", "gone", "skipped"]);
    assert_eq!(table.deleted, [entries[0].clone()]);
    let first = |segment: &Segment| {
        let ends = [entries[0].original.local, entries[0].reply.local];
        ends.contains(&segment.to) && ends.contains(&segment.from)
    };
    assert!(hosts.sent.iter().all(first), "{:?}", hosts.sent);
    // For each end a question, an RST, and another question.
    assert_eq!(hosts.sent.len(), 6);
    assert_eq!(connections[1].ends, [EndReport::default(); 2]);
}

/// A table whose entries vanish after they were looked up.
struct Vanishing(Entries);

impl Table for Vanishing {
    fn lookup(&mut self, entry: &Entry) -> io::Result<Option<Entry>> {
        let found = self.0.lookup(entry);
        self.0.now.clear();
        found
    }

    fn delete(&mut self, entry: &Entry) -> io::Result<Delete> {
        self.0.delete(entry)
    }
}

#[test]
fn without_its_entry_a_connection_gets_no_rst() {
    let entries = [entry(1)];
    let mut table = Vanishing(Entries {
        now: entries.to_vec(),
        ..Entries::default()
    });
    let mut hosts = living(&entries);
    let all = ForwardedSelectors::default();
    let (connections, _) = run_on(&entries, &all, &mut table, &mut hosts, 20_000);
    assert_eq!(outcomes(&connections), ["gone"]);
    assert!(
        hosts
            .sent
            .iter()
            .all(|segment| segment.flags == TcpFlags::ACK)
    );
    assert_eq!(connections[0].ends.map(|end| end.resets), [0, 0]);
}

#[test]
fn nothing_is_sent_to_an_end_whose_other_end_has_no_path() {
    let entries = [entry(1)];
    for end in [entries[0].original.local, entries[0].reply.local] {
        let mut hosts = Hosts {
            without_path: vec![end],
            ..living(&entries)
        };
        let mut table = Entries {
            now: entries.to_vec(),
            ..Entries::default()
        };
        let all = ForwardedSelectors::default();
        let (connections, _) = run_on(&entries, &all, &mut table, &mut hosts, 20_000);
        let Some(ForwardedOutcome::Failed(failure)) = &connections[0].outcome else {
            panic!("{connections:?}");
        };
        assert_eq!((failure.code(), hosts.sent.len()), ("no-path", 0));
        assert!(table.deleted.is_empty());
    }
}

/// With zones, two connections have the same addresses. Their answers cannot be told apart, so one is asked after the other.
#[test]
fn connections_with_the_same_addresses_are_asked_one_after_the_other() {
    let in_zone = |id| Entry {
        zone: Zone {
            id,
            ..Zone::default()
        },
        id: Some(id.into()),
        ..entry(1)
    };
    let entries = [in_zone(0), in_zone(7)];
    let mut table = Entries {
        now: entries.to_vec(),
        is_busy: true,
        ..Entries::default()
    };
    let mut hosts = living(&entries[..1]);
    let all = ForwardedSelectors::default();
    let (connections, _) = run_on(&entries, &all, &mut table, &mut hosts, 20_000);
    assert_eq!(outcomes(&connections), ["cut", "gone"]);
    // That both ends are gone says nothing about those of another zone.
    assert_eq!(table.deleted, entries[..1]);
    assert_eq!(connections[0].deleted, Some(EntryDeletion::Offloaded));
}

#[test]
fn no_more_packets_leave_than_the_rate_allows() {
    let entries: Vec<Entry> = (1..=50).map(entry).collect();
    let mut table = Entries {
        now: entries.clone(),
        ..Entries::default()
    };
    let mut hosts = Hosts::default();
    for (index, entry) in entries.iter().enumerate() {
        let number = u32::try_from(index).unwrap();
        hosts.numbers.insert(entry.original.local, number);
    }
    let all = ForwardedSelectors::default();
    let (connections, took) = run_on(&entries, &all, &mut table, &mut hosts, 1000);
    assert!(
        outcomes(&connections)
            .iter()
            .all(|outcome| *outcome == "cut")
    );
    let fewest = Duration::from_millis(1) * u32::try_from(hosts.sent.len() - 10).unwrap();
    assert!(took >= fewest, "{took:?} for {} packets", hosts.sent.len());
}

#[test]
fn a_low_rate_makes_small_batches() {
    for (rate, size) in [
        (1, 1),
        (39, 1),
        (400, 20),
        (20_000, BATCH),
        (u32::MAX, BATCH),
    ] {
        assert_eq!(batch_size(rate), size, "{rate}");
    }
}

/// A new connection has the addresses of the old one when what was picked up is deleted.
#[test]
fn only_what_was_picked_up_is_deleted() {
    let old = entry(1);
    let with = |original, state| Entry {
        original,
        state: Some(state),
        id: Some(9),
        ..old.clone()
    };
    use ConntrackState::{Established, SynRecv, SynSent, SynSent2};
    let other = Entry::example("10.9.9.9:1", "10.9.9.8:2").original;
    for (found, is_deleted) in [
        (with(old.original, Established), true),
        (with(old.original, SynSent), false),
        (with(old.original, SynRecv), false),
        (with(old.original, SynSent2), false),
        (with(other, Established), false),
    ] {
        let mut table = AlwaysFinds(found.clone(), 0);
        let picked_up = picked_up(&old, old.original, &mut table);
        assert_eq!(picked_up.is_some(), is_deleted, "{found:?}");
    }
}

/// A table that finds the same entry by any addresses, and counts deletions.
struct AlwaysFinds(Entry, usize);

impl Table for AlwaysFinds {
    fn lookup(&mut self, _: &Entry) -> io::Result<Option<Entry>> {
        Ok(Some(self.0.clone()))
    }

    fn delete(&mut self, _: &Entry) -> io::Result<Delete> {
        self.1 += 1;
        Ok(Delete::Deleted)
    }
}

#[test]
fn a_refused_segment_is_sent_again_and_a_dead_interface_is_said() {
    let entries = [entry(1), entry(2)];
    let table = || Entries {
        now: entries.to_vec(),
        ..Entries::default()
    };
    let all = ForwardedSelectors::default();
    for errno in [libc::EAGAIN, libc::ENOBUFS, libc::ENETDOWN] {
        let mut hosts = living(&entries);
        hosts.refusals = [(1, vec![errno; 5].into()), (2, vec![errno; 2].into())].into();
        let (connections, _) = run_on(&entries, &all, &mut table(), &mut hosts, 20_000);
        assert_eq!(outcomes(&connections), ["cut", "cut"]);
    }
    // An interface that stays down is waited for once.
    for errno in [libc::ENETDOWN, libc::ENXIO] {
        let mut hosts = living(&entries);
        hosts.refusals = [(2, vec![errno; 100].into())].into();
        let mut table = table();
        let (connections, took) = run_on(&entries, &all, &mut table, &mut hosts, 20_000);
        for connection in &connections {
            let Some(ForwardedOutcome::Failed(failure)) = &connection.outcome else {
                panic!("{connection:?}");
            };
            assert_eq!(failure.code(), "not-sent");
            assert_eq!(connection.ends.map(|end| end.resets), [0, 0]);
        }
        assert!(took < Duration::from_secs(1), "{took:?}");
        assert!(table.deleted.is_empty());
        assert!(hosts.refusals[&2].len() >= 100 - 6 - 1, "{errno}");
    }
}

/// Only the end that was reset before is verified, and its other end is reset too.
#[test]
fn an_interrupt_leaves_no_reset_unverified() {
    let entries: Vec<Entry> = (1..=20).map(entry).collect();
    let mut table = Entries {
        now: entries.clone(),
        ..Entries::default()
    };
    let mut hosts = Hosts {
        is_interrupted_by_reset: true,
        ..living(&entries)
    };
    let all = ForwardedSelectors::default();
    let (connections, _) = run_on(&entries, &all, &mut table, &mut hosts, 100);
    let outcomes = outcomes(&connections);
    let cut = outcomes.iter().filter(|outcome| **outcome == "cut").count();
    let skipped = outcomes.iter().filter(|outcome| **outcome == "skipped");
    assert!((1..20).contains(&cut), "{outcomes:?}");
    assert_eq!(skipped.count(), 20 - cut);
    for (connection, outcome) in connections.iter().zip(outcomes) {
        let is_cut = outcome == "cut";
        let resets = connection.ends.map(|end| end.resets);
        assert_eq!(resets, [u8::from(is_cut); 2], "{connection:?}");
    }
    assert_eq!(table.deleted.len(), cut);
}

/// Of a cut they are not: a new connection whose SYN was lost can have the same entry.
#[test]
fn a_probe_asks_anew_when_answers_were_lost() {
    use ForwardedAct::{Cut, Probe};
    let entries = [entry(1), entry(2)];
    let all = ForwardedSelectors::default();
    // After the questions, and each time.
    let (once, always) = (vec![4], (1..=60).collect());
    for (act, losses, outcome) in [
        (Probe, once.clone(), "alive"),
        (Probe, always, "failed"),
        (Cut, once, "failed"),
    ] {
        let mut table = Entries {
            now: entries.to_vec(),
            ..Entries::default()
        };
        let mut hosts = Hosts {
            losses,
            ..living(&entries)
        };
        let (connections, _) = act_on(act, &entries, &all, &mut table, &mut hosts, 20_000);
        assert_eq!(outcomes(&connections), [outcome; 2], "{act:?}");
        assert!(table.deleted.is_empty());
        assert!(hosts.sent.iter().all(|it| it.flags == TcpFlags::ACK));
    }
}

/// Otherwise each loss would cause new questions at once, and their answers the next loss.
#[test]
fn losses_without_end_do_not_keep_a_run_busy() {
    let entries = [entry(1)];
    let mut table = Entries {
        now: entries.to_vec(),
        ..Entries::default()
    };
    let mut hosts = Hosts {
        is_flooded_by_reset: true,
        ..living(&entries)
    };
    let all = ForwardedSelectors::default();
    let (connections, took) = run_on(&entries, &all, &mut table, &mut hosts, 20_000);
    let Some(ForwardedOutcome::Failed(failure)) = &connections[0].outcome else {
        panic!("{connections:?}");
    };
    assert_eq!(failure.code(), "answers-lost");
    assert_eq!(connections[0].ends.map(|end| end.resets), [1, 0]);
    assert!(hosts.sent.len() <= 10, "{:?}", hosts.sent);
    assert!(took < Duration::from_secs(3), "{took:?}");
}

/// Nothing is sent to the new connection, and its entry stays, also if it is asked about again.
#[test]
fn a_new_connection_is_left_alone_also_after_a_loss() {
    use ForwardedAct::{Cut, Probe};
    let entries = [entry(1)];
    let all = ForwardedSelectors::default();
    for act in [Probe, Cut] {
        let mut table = Entries {
            now: entries.to_vec(),
            ..Entries::default()
        };
        let mut hosts = Hosts {
            losses: vec![1],
            opens_anew: true,
            ..living(&entries)
        };
        let (connections, _) = act_on(act, &entries, &all, &mut table, &mut hosts, 20_000);
        assert_eq!(outcomes(&connections), ["gone"]);
        assert!(!connections[0].both_had_forgotten());
        assert!(table.deleted.is_empty());
        assert!(hosts.sent.iter().all(|it| it.flags == TcpFlags::ACK));
        assert!(hosts.sent.len() <= 2, "{:?}", hosts.sent);
    }
}

/// The connection lives, and its entry may be gone: the operator must hear of it.
#[test]
fn a_refused_rst_is_said_with_what_was_done_before() {
    let entries = [entry(1)];
    let all = ForwardedSelectors::default();
    for (refusing, said) in [(1, "entry was deleted"), (2, "RST was sent")] {
        let mut table = Entries {
            now: entries.to_vec(),
            ..Entries::default()
        };
        let mut hosts = living(&entries);
        // It takes the question.
        hosts.refusals = [(refusing, vec![0, libc::ENXIO].into())].into();
        let (connections, _) = run_on(&entries, &all, &mut table, &mut hosts, 20_000);
        let Some(ForwardedOutcome::Failed(failure)) = &connections[0].outcome else {
            panic!("{connections:?}");
        };
        assert_eq!(failure.code(), "not-sent");
        assert!(failure.to_string().contains(said), "{failure}");
    }
}

/// A probe keeps the entry: NAT gateways at both sides may have answered for their hosts.
#[test]
fn of_what_both_ends_have_forgotten_a_cut_deletes_the_entry() {
    let entries = [entry(1)];
    let all = ForwardedSelectors::default();
    for (act, deleted) in [(ForwardedAct::Probe, 0), (ForwardedAct::Cut, 1)] {
        let mut table = Entries {
            now: entries.to_vec(),
            ..Entries::default()
        };
        let mut nobody = Hosts::default();
        let (connections, _) = act_on(act, &entries, &all, &mut table, &mut nobody, 20_000);
        assert_eq!(outcomes(&connections), ["gone"]);
        assert!(connections[0].both_had_forgotten());
        assert_eq!(table.deleted.len(), deleted);
    }
}
