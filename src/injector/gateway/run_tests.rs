use std::collections::HashMap;
use std::sync::Mutex;

use super::*;
use crate::conntrack::codec::Zone;
use crate::model::{EndReport, Method};
use crate::tcp::TcpFlags;

/// A clock that only sleeping moves.
struct Clock(Mutex<Instant>);

impl Control for Clock {
    fn now(&self) -> Instant {
        *self.0.lock().unwrap()
    }

    fn sleep(&self, duration: Duration) {
        *self.0.lock().unwrap() += duration;
    }

    fn interrupted(&self) -> bool {
        false
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
}

impl Network for Hosts {
    fn find_path(&mut self, to: SocketAddr, _: SocketAddr) -> Result<(), NoPath> {
        match self.without_path.contains(&to) {
            true => Err(NoPath::NoRoute(to.ip())),
            false => Ok(()),
        }
    }

    fn listen(&mut self, _: &[Tuple]) -> io::Result<()> {
        Ok(())
    }

    fn send(
        &mut self,
        segment: &Segment,
        to: SocketAddr,
        _: SocketAddr,
    ) -> Result<(), SendFailure> {
        assert_eq!(segment.to, to);
        self.sent.push(*segment);
        let answer = |seq, ack, flags| Segment {
            from: segment.to,
            to: segment.from,
            seq,
            ack,
            flags,
            payload_len: 0,
        };
        match (self.numbers.get(&to).copied(), segment.flags) {
            (Some(number), TcpFlags::RST) if segment.seq == Seq(number) => {
                self.numbers.remove(&to);
            }
            (_, TcpFlags::RST) => {}
            (Some(number), _) => self
                .answers
                .push(answer(Seq(1), Seq(number), TcpFlags::ACK)),
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

    fn random(&mut self) -> Seq {
        self.drawn += 7;
        Seq(self.drawn)
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
    let start = Instant::now();
    let clock = Clock(Mutex::new(start));
    let mut connections: Vec<Forwarded> = entries
        .iter()
        .map(|entry| Forwarded::new(entry.clone(), None))
        .collect();
    let rules = ForwardedRules {
        act: ForwardedAct::Cut,
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
    assert_eq!(outcomes(&connections), ["cut", "healed"]);
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
        delete_picked_up(&old, &mut table);
        assert_eq!(table.1 > 0, is_deleted, "{found:?}");
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
