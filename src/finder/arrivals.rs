//! The forwarded connections that a watch of `cwkill gateway` has still to deal with, from lists of the table and from events. Pure.
//!
//! An event only says that there is something to look at: it has a part of the entry, and by the time it is read the entry may be another
//! one. So each entry is looked up before it is dealt with.

use std::collections::{HashSet, VecDeque};
use std::io;

use crate::conntrack::{ConntrackState, Entry, Event};
use crate::filter::forwarded::ForwardedSelectors;
use crate::tcp::Tuple;

/// So many entries are looked at again at once.
const MAX_AGAIN: usize = 256;

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
    /// To be looked at again: those that the list shows as being opened, of which there may be no events.
    again: VecDeque<Entry>,
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
        }
        // Without a state only the lookup can tell.
        let is_due = entry.state.is_none() || self.is_due(&entry);
        if is_due && !self.dealt_with.contains(&Key::of(&entry)) {
            self.new.push_back(entry);
        }
    }

    /// Notes every entry of the table that matches.
    pub fn note_list(&mut self, entries: Vec<Entry>) {
        // What is not there any more needs not be known.
        let listed: HashSet<Key> = entries.iter().map(Key::of).collect();
        self.dealt_with.retain(|key| listed.contains(key));
        self.listed.clear();
        self.again.clear();
        for entry in entries {
            if self.dealt_with.contains(&Key::of(&entry)) {
                continue;
            }
            if self.is_due(&entry) {
                self.listed.push_back(entry);
            } else if self.selectors.finds_being_opened(&entry) {
                self.again.push_back(entry);
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

    /// Looks at the entry again, although it was dealt with: something was about to become of it.
    pub fn look_again(&mut self, entry: Entry) {
        self.dealt_with.remove(&Key::of(&entry));
        self.again.push_back(entry);
    }

    /// Whether some are to be looked at again. Nothing else will say when.
    pub fn has_again(&self) -> bool {
        !self.again.is_empty()
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
        mut lookup: impl FnMut(&Entry) -> io::Result<Option<Entry>>,
    ) -> Vec<Entry> {
        let mut taken = Vec::new();
        let again = self.again.len().min(MAX_AGAIN);
        let again: Vec<Entry> = self.again.drain(..again).collect();
        for entry in again {
            self.look_at(entry, &mut taken, &mut lookup);
        }
        while taken.len() < count {
            let next = match self.new.pop_front() {
                None if with_listed => self.listed.pop_front(),
                next => next,
            };
            let Some(entry) = next else {
                break;
            };
            self.look_at(entry, &mut taken, &mut lookup);
        }
        taken
    }

    fn look_at(
        &mut self,
        entry: Entry,
        taken: &mut Vec<Entry>,
        lookup: &mut impl FnMut(&Entry) -> io::Result<Option<Entry>>,
    ) {
        let key = Key::of(&entry);
        // One entry may have several events.
        if self.dealt_with.contains(&key) {
            return;
        }
        if self.in_flight.contains(&entry.original) {
            self.again.push_back(entry);
            return;
        }
        let now = match lookup(&entry) {
            Ok(Some(now)) if Key::of(&now) == key => now,
            Ok(_) => return,
            // The act fails in the same way, and says so.
            Err(_) => entry,
        };
        if self.selectors.finds_being_opened(&now) {
            self.again.push_back(now);
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
        let taken = arrivals.take(count, true, lookup);
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
        arrivals.note_list(table.to_vec());
        assert_eq!(taken(&mut arrivals, 9, &table), NONE);
        // The same addresses, and the same id.
        arrivals.note(event(true, &opening));
        arrivals.note(event(false, &open));
        assert_eq!(taken(&mut arrivals, 9, &table), [1]);
        arrivals.look_again(open.clone());
        assert!(arrivals.has_again());
        assert_eq!(taken(&mut arrivals, 9, &table), [1]);
        assert!(!arrivals.has_again());
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
        let failed = arrivals.take(9, true, |_| {
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
        arrivals.note_list(table.to_vec());
        arrivals.note(event(false, &entry(5, Established)));
        assert_eq!((arrivals.left(true), arrivals.left(false)), (3, 1));
        // Events come first.
        let mut now = table.to_vec();
        now.push(entry(5, Established));
        assert_eq!(taken(&mut arrivals, 1, &now), [5]);
        assert_eq!(taken(&mut arrivals, 9, &now), [1, 4]);
        assert!(arrivals.has_again());
        now[1] = entry(2, Established);
        assert_eq!(taken(&mut arrivals, 9, &now), [2]);
        assert!(!arrivals.has_again());
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
        assert!(arrivals.has_again());
        arrivals.ended(&open);
        assert_eq!(taken(&mut arrivals, 9, &table), [1]);
        assert!(!arrivals.has_again());
        // The last free worker is for those that have just come.
        arrivals.note_list(vec![entry(2, Established)]);
        let mut with = |with_listed| arrivals.take(9, with_listed, |entry| Ok(Some(entry.clone())));
        assert_eq!((with(false).len(), with(true).len()), (0, 1));
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
