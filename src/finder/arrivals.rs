//! The forwarded connections that a watch of `cwkill gateway` has still to deal with, from lists of the table and from events. Pure.
//!
//! An event only says that there is something to look at: it has a part of the entry, and by the time it is read the entry may be another
//! one. So each entry is looked up before it is dealt with.

use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::time::{Duration, Instant};

use crate::conntrack::{ConntrackState, Entry, Event};
use crate::filter::forwarded::ForwardedSelectors;
use crate::tcp::Tuple;

/// The pause between two looks at an entry of which there may be no event.
const LOOK_AGAIN: Duration = Duration::from_millis(20);
/// So many entries are looked at again in this time: in a flood of SYNs new connections must not wait for those that are never opened.
const MAX_AGAIN: usize = 256;
/// So often an entry that was dealt with is dealt with again. Whoever sends a SYN at each question would keep a watch busy for ever.
const MAX_RETRIES: u8 = 3;

/// Tells an entry from others, as far as the kernel does: it may give the id to a later entry with the same addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    original: Tuple,
    zone: u16,
    id: Option<u32>,
}

impl Key {
    fn of(entry: &Entry) -> Self {
        Key {
            original: entry.original,
            zone: entry.zone.id,
            id: entry.id,
        }
    }
}

pub struct Arrivals<'s> {
    selectors: &'s ForwardedSelectors,
    /// The same without what an event may lack.
    of_events: ForwardedSelectors,
    /// Those that were given away by [`Arrivals::take`]. Each is given away once.
    dealt_with: HashSet<Key>,
    /// The addresses of those that are being dealt with, as each end sees them. Their last packets can make new entries, which wait.
    in_flight: HashSet<Tuple>,
    /// From events: they come first, because bytes may pass meanwhile.
    new: VecDeque<Entry>,
    /// From the last list.
    listed: VecDeque<Entry>,
    /// To be looked at again, and when: those that the list shows as being opened, of which there may be no events.
    again: VecDeque<(Instant, Entry)>,
    /// None of them is looked at before.
    next_looks: Option<Instant>,
    /// How often each was to be dealt with again.
    retries: HashMap<Key, u8>,
}

impl<'s> Arrivals<'s> {
    pub fn new(selectors: &'s ForwardedSelectors) -> Self {
        Arrivals {
            selectors,
            of_events: ForwardedSelectors {
                marks: Vec::new(),
                states: [].into(),
                ..selectors.clone()
            },
            dealt_with: HashSet::new(),
            in_flight: HashSet::new(),
            new: VecDeque::new(),
            listed: VecDeque::new(),
            again: VecDeque::new(),
            next_looks: None,
            retries: HashMap::new(),
        }
    }

    /// Notes an event.
    pub fn note(&mut self, event: Event) {
        let Event { is_new, entry } = event;
        if !self.of_events.matches(&entry) {
            return;
        }
        if is_new {
            self.dealt_with.remove(&Key::of(&entry));
            self.retries.remove(&Key::of(&entry));
        }
        // Without a state only the lookup can tell.
        let is_due = entry.state.is_none() || self.is_due(&entry);
        if is_due && !self.dealt_with.contains(&Key::of(&entry)) {
            self.new.push_back(entry);
        }
    }

    /// Notes every entry of the table that matches.
    pub fn note_list(&mut self, entries: Vec<Entry>, now: Instant) {
        // What is not there any more needs not be known.
        let listed: HashSet<Key> = entries.iter().map(Key::of).collect();
        self.dealt_with.retain(|key| listed.contains(key));
        self.retries.retain(|key, _| listed.contains(key));
        self.listed.clear();
        self.again.clear();
        for entry in entries {
            if self.dealt_with.contains(&Key::of(&entry)) {
                continue;
            }
            if self.is_due(&entry) {
                self.listed.push_back(entry);
            } else if self.selectors.finds_being_opened(&entry) {
                self.again.push_back((now + LOOK_AGAIN, entry));
            }
        }
    }

    /// Something is done to the connection of `entry` from now on.
    pub fn began(&mut self, entry: &Entry) {
        self.in_flight.extend([entry.original, entry.reply]);
    }

    /// It is over.
    pub fn ended(&mut self, entry: &Entry) {
        self.in_flight.remove(&entry.original);
        self.in_flight.remove(&entry.reply);
    }

    /// Looks at the entry again a moment later, although it was dealt with: something was about to become of it. Not for ever.
    pub fn retry(&mut self, entry: Entry, now: Instant) {
        let key = Key::of(&entry);
        let retries = self.retries.entry(key).or_default();
        if *retries < MAX_RETRIES {
            *retries += 1;
            self.dealt_with.remove(&key);
            self.again.push_back((now + LOOK_AGAIN, entry));
        }
    }

    /// Takes back what could not be dealt with.
    pub fn put_back(&mut self, entry: Entry) {
        self.dealt_with.remove(&Key::of(&entry));
        self.new.push_back(entry);
    }

    /// When some are to be looked at again. Nothing else will say when.
    pub fn next_look(&self) -> Option<Instant> {
        let (due, _) = self.again.front()?;
        Some(self.next_looks.map_or(*due, |next| next.max(*due)))
    }

    /// The number of those that wait in the queues, with or without those from the list.
    pub fn left(&self, with_listed: bool) -> usize {
        let listed = if with_listed { self.listed.len() } else { 0 };
        self.new.len() + listed
    }

    /// At most `count` entries to deal with, as `lookup` finds them now. One that cannot be looked up is among them.
    pub fn take(
        &mut self,
        count: usize,
        with_listed: bool,
        now: Instant,
        mut lookup: impl FnMut(&Entry) -> io::Result<Option<Entry>>,
    ) -> Vec<Entry> {
        let mut taken = Vec::new();
        while taken.len() < count
            && let Some(entry) = self.new.pop_front()
        {
            self.look_at(entry, now, &mut taken, &mut lookup);
        }
        if taken.len() < count && self.next_look().is_some_and(|due| due <= now) {
            self.next_looks = Some(now + LOOK_AGAIN);
            for _ in 0..MAX_AGAIN {
                let is_due = |(due, _): &mut (Instant, Entry)| *due <= now;
                let Some((_, entry)) = self.again.pop_front_if(is_due) else {
                    break;
                };
                self.look_at(entry, now, &mut taken, &mut lookup);
                if taken.len() == count {
                    break;
                }
            }
        }
        while with_listed
            && taken.len() < count
            && let Some(entry) = self.listed.pop_front()
        {
            self.look_at(entry, now, &mut taken, &mut lookup);
        }
        taken
    }

    fn look_at(
        &mut self,
        entry: Entry,
        at: Instant,
        taken: &mut Vec<Entry>,
        lookup: &mut impl FnMut(&Entry) -> io::Result<Option<Entry>>,
    ) {
        let key = Key::of(&entry);
        // One entry may have several events.
        if self.dealt_with.contains(&key) {
            return;
        }
        if self.in_flight.contains(&entry.original) {
            self.again.push_back((at + LOOK_AGAIN, entry));
            return;
        }
        let now = match lookup(&entry) {
            Ok(Some(now)) if Key::of(&now) == key => now,
            Ok(_) => return,
            // The act fails in the same way, and says so.
            Err(_) => entry,
        };
        if self.selectors.finds_being_opened(&now) {
            self.again.push_back((at + LOOK_AGAIN, now));
        } else if self.selectors.matches(&now) && self.is_due(&now) {
            self.dealt_with.insert(key);
            taken.push(now);
        }
    }

    /// Whether the connection is open. One that is being opened has no numbers yet, and of one that is over there is nothing to end, unless
    /// the operator names its state.
    fn is_due(&self, entry: &Entry) -> bool {
        use ConntrackState::{Close, LastAck, TimeWait};
        let is_over = matches!(entry.state, Some(TimeWait | Close | LastAck));
        match self.selectors.states.is_empty() {
            true => !is_over && !self.selectors.finds_being_opened(entry),
            false => entry
                .state
                .is_some_and(|state| self.selectors.states.contains(&state)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ConntrackState::{CloseWait, Established, SynRecv, SynSent, TimeWait};

    /// A time that is later each time, by more than a pause between two looks.
    fn tick() -> Instant {
        use std::sync::LazyLock;
        use std::sync::atomic::{AtomicU32, Ordering};
        static START: LazyLock<Instant> = LazyLock::new(Instant::now);
        static CALLS: AtomicU32 = AtomicU32::new(1);
        *START + LOOK_AGAIN * CALLS.fetch_add(1, Ordering::Relaxed)
    }

    /// No port.
    const NONE: [u16; 0] = [];

    fn entry(port: u16, state: ConntrackState) -> Entry {
        Entry {
            state: Some(state),
            id: Some(port.into()),
            ..Entry::example(&format!("10.9.1.2:{port}"), "10.9.2.2:80")
        }
    }

    fn event(is_new: bool, entry: &Entry) -> Event {
        let entry = entry.clone();
        Event { is_new, entry }
    }

    /// The ports of what is taken, when the table has these entries.
    fn taken(arrivals: &mut Arrivals<'_>, count: usize, table: &[Entry]) -> Vec<u16> {
        let lookup = |entry: &Entry| {
            let mut found = table.iter();
            Ok(found.find(|now| now.original == entry.original).cloned())
        };
        let taken = arrivals.take(count, true, tick(), lookup);
        taken
            .iter()
            .map(|entry| entry.original.local.port())
            .collect()
    }

    #[test]
    fn an_open_connection_is_taken_once_and_its_successor_again() {
        let all = ForwardedSelectors::default();
        let mut arrivals = Arrivals::new(&all);
        let (opening, open) = (entry(1, SynSent), entry(1, Established));
        arrivals.note(event(true, &opening));
        assert_eq!(
            taken(&mut arrivals, 9, std::slice::from_ref(&opening)),
            NONE
        );
        arrivals.note(event(false, &open));
        arrivals.note(event(false, &open));
        let table = [open.clone()];
        assert_eq!(taken(&mut arrivals, 9, &table), [1]);
        arrivals.note(event(false, &open));
        arrivals.note(event(false, &entry(1, CloseWait)));
        assert_eq!(taken(&mut arrivals, 9, &table), NONE);
        // A list does not bring it back.
        arrivals.note_list(table.to_vec(), tick());
        assert_eq!(taken(&mut arrivals, 9, &table), NONE);
        // The same addresses, and the same id.
        arrivals.note(event(true, &opening));
        arrivals.note(event(false, &open));
        assert_eq!(taken(&mut arrivals, 9, &table), [1]);
        arrivals.retry(open.clone(), tick());
        assert!(arrivals.next_look().is_some());
        assert_eq!(taken(&mut arrivals, 9, &table), [1]);
        assert!(arrivals.next_look().is_none());
    }

    #[test]
    fn an_event_is_only_a_reason_to_look() {
        let by_mark = ForwardedSelectors {
            marks: vec![crate::filter::forwarded::Mark {
                value: 7,
                mask: u32::MAX,
            }],
            ..ForwardedSelectors::default()
        };
        let mut arrivals = Arrivals::new(&by_mark);
        let marked = Entry {
            mark: Some(7),
            ..entry(1, Established)
        };
        let of_change = Entry {
            state: None,
            mark: None,
            ..marked.clone()
        };
        // Gone, another one by now, another mark.
        arrivals.note(event(false, &of_change));
        assert_eq!(taken(&mut arrivals, 9, &[]), NONE);
        let later = Entry {
            id: Some(99),
            ..marked.clone()
        };
        arrivals.note(event(false, &of_change));
        assert_eq!(taken(&mut arrivals, 9, &[later]), NONE);
        arrivals.note(event(false, &of_change));
        assert_eq!(taken(&mut arrivals, 9, &[entry(1, Established)]), NONE);
        arrivals.note(event(false, &of_change));
        assert_eq!(taken(&mut arrivals, 9, std::slice::from_ref(&marked)), [1]);
        // One that cannot be looked up is not lost.
        arrivals.note(event(true, &marked));
        let failed = arrivals.take(9, true, tick(), |_| {
            Err(io::Error::from_raw_os_error(libc::ENOBUFS))
        });
        assert_eq!(failed, [marked]);
    }

    #[test]
    fn what_the_list_shows_as_being_opened_is_looked_at_until_it_is_open() {
        let all = ForwardedSelectors::default();
        let mut arrivals = Arrivals::new(&all);
        let table = [
            entry(1, Established),
            entry(2, SynRecv),
            entry(3, TimeWait),
            entry(4, CloseWait),
        ];
        arrivals.note_list(table.to_vec(), tick());
        arrivals.note(event(false, &entry(5, Established)));
        assert_eq!((arrivals.left(true), arrivals.left(false)), (3, 1));
        // Events come first.
        let mut now = table.to_vec();
        now.push(entry(5, Established));
        assert_eq!(taken(&mut arrivals, 1, &now), [5]);
        assert_eq!(taken(&mut arrivals, 9, &now), [1, 4]);
        assert!(arrivals.next_look().is_some());
        now[1] = entry(2, Established);
        assert_eq!(taken(&mut arrivals, 9, &now), [2]);
        assert!(arrivals.next_look().is_none());
    }

    #[test]
    fn what_comes_with_addresses_in_flight_waits() {
        let all = ForwardedSelectors::default();
        let mut arrivals = Arrivals::new(&all);
        let open = entry(1, Established);
        arrivals.note(event(true, &open));
        let table = [open.clone()];
        assert_eq!(taken(&mut arrivals, 9, &table), [1]);
        arrivals.began(&open);
        // Loose pick-up of the last packets.
        arrivals.note(event(true, &open));
        assert_eq!(taken(&mut arrivals, 9, &table), NONE);
        assert!(arrivals.next_look().is_some());
        arrivals.ended(&open);
        assert_eq!(taken(&mut arrivals, 9, &table), [1]);
        assert!(arrivals.next_look().is_none());
        // The last free worker is for those that have just come.
        arrivals.note_list(vec![entry(2, Established)], tick());
        let mut with =
            |with_listed| arrivals.take(9, with_listed, tick(), |entry| Ok(Some(entry.clone())));
        assert_eq!((with(false).len(), with(true).len()), (0, 1));
    }

    #[test]
    fn an_entry_is_dealt_with_again_a_few_times_and_not_at_once() {
        let all = ForwardedSelectors::default();
        let mut arrivals = Arrivals::new(&all);
        let open = entry(1, Established);
        let table = [open.clone()];
        arrivals.note(event(false, &open));
        assert_eq!(taken(&mut arrivals, 9, &table), [1]);
        for _ in 0..MAX_RETRIES {
            let now = tick();
            arrivals.retry(open.clone(), now);
            assert_eq!(arrivals.next_look(), Some(now + LOOK_AGAIN));
            let at_once = arrivals.take(9, true, now, |entry| Ok(Some(entry.clone())));
            assert!(at_once.is_empty());
            assert_eq!(taken(&mut arrivals, 9, &table), [1]);
        }
        arrivals.retry(open.clone(), tick());
        assert!(arrivals.next_look().is_none());
        arrivals.note(event(false, &open));
        assert_eq!(taken(&mut arrivals, 9, &table), NONE);
        // Another connection has the addresses and the id.
        arrivals.note(event(true, &open));
        assert_eq!(taken(&mut arrivals, 9, &table), [1]);
        arrivals.retry(open.clone(), tick());
        assert_eq!(taken(&mut arrivals, 9, &table), [1]);
    }

    #[test]
    fn a_new_connection_does_not_wait_for_those_that_are_never_opened() {
        let all = ForwardedSelectors::default();
        let mut arrivals = Arrivals::new(&all);
        let flood = (1..1000).map(|port| entry(port, SynSent)).collect();
        arrivals.note_list(flood, tick());
        arrivals.note(event(false, &entry(5000, Established)));
        let (now, mut lookups) = (tick() + LOOK_AGAIN, Vec::new());
        let mut lookup = |entry: &Entry| {
            lookups.push(entry.original.local.port());
            Ok(Some(entry.clone()))
        };
        assert_eq!(arrivals.take(1, true, now, &mut lookup).len(), 1);
        for _ in 0..3 {
            assert!(arrivals.take(9, true, now, &mut lookup).is_empty());
        }
        assert_eq!((lookups[0], lookups.len()), (5000, 1 + MAX_AGAIN));
        assert_eq!(arrivals.next_look(), Some(now + LOOK_AGAIN));
    }

    #[test]
    fn a_state_that_is_named_counts() {
        let by_state = ForwardedSelectors {
            states: [SynRecv, TimeWait].into(),
            ..ForwardedSelectors::default()
        };
        let mut arrivals = Arrivals::new(&by_state);
        let table = [
            entry(1, SynRecv),
            entry(2, Established),
            entry(3, TimeWait),
            entry(4, SynSent),
        ];
        for entry in &table {
            arrivals.note(event(false, entry));
        }
        assert_eq!(taken(&mut arrivals, 9, &table), [1, 3]);
    }
}
