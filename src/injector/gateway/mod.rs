//! Ends connections that are routed through this host: asks both ends, deletes the entry of conntrack, resets the ends, and verifies.
//!
//! `questions` decides what to send (pure), [`Network`] sends and captures. A batch takes one round trip, or about a second if an end is
//! silent. A connection is looked up again right before its ends are asked, a SYN of a new one with the same addresses ends the questions, and
//! an RST ends only a connection that has the numbers of the answer. So a new connection lives.

mod network;
mod questions;

use std::collections::{HashSet, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

pub use network::{LinkNetwork, SendFailure};

use crate::conntrack::{Conntrack, ConntrackState, Delete, Entry, Timeouts};
use crate::control::Control;
use crate::filter::forwarded::ForwardedSelectors;
use crate::model::{
    EndState, EntryDeletion, Forwarded, ForwardedAct, ForwardedFailure, ForwardedOutcome,
    ForwardedSkip, forwarded_outcome,
};
use crate::packet::capture::MAX_PORTS;
use crate::routes::NoPath;
use crate::tcp::{Segment, Seq, TcpFlags, Tuple};
use questions::Questions;

/// The connections of a batch: a filter compares the port of each of their ends.
const BATCH: usize = MAX_PORTS / 2;
/// Segments sent before the capture is read.
const BURST: usize = 32;
const SHORTEST_PAUSE: Duration = Duration::from_micros(50);
const LONGEST_PAUSE: Duration = Duration::from_millis(1);

/// How to act.
pub struct ForwardedRules<'r> {
    pub act: ForwardedAct,
    pub selectors: &'r ForwardedSelectors,
    pub timeouts: &'r Timeouts,
    /// Packets per second.
    pub rate: u32,
    /// The time after which an end answers again.
    pub retry: Duration,
}

/// What sends segments to the ends, and captures theirs.
pub trait Network {
    /// Finds the path to the end `to`, for packets of the host `other`.
    fn find_path(&mut self, to: SocketAddr, other: SocketAddr) -> Result<(), NoPath>;

    /// Captures only segments that the ends with these views send, from now on.
    fn listen(&mut self, views: &[Tuple]) -> io::Result<()>;

    /// Sends a segment to the end `to.local`, as if it came from the host `other`, where it is forwarded to it.
    fn send(
        &mut self,
        segment: &Segment,
        to: SocketAddr,
        other: SocketAddr,
    ) -> Result<(), SendFailure>;

    /// Calls `handle` with each segment that was captured.
    fn drain(&mut self, handle: &mut dyn FnMut(Segment)) -> io::Result<()>;

    /// Random numbers that cannot be predicted.
    fn random(&mut self) -> Seq;
}

/// What knows the entries.
pub trait Table {
    fn lookup(&mut self, entry: &Entry) -> io::Result<Option<Entry>>;
    fn delete(&mut self, entry: &Entry) -> io::Result<Delete>;
}

impl Table for Conntrack {
    fn lookup(&mut self, entry: &Entry) -> io::Result<Option<Entry>> {
        Conntrack::lookup(self, entry)
    }

    fn delete(&mut self, entry: &Entry) -> io::Result<Delete> {
        Conntrack::delete(self, entry)
    }
}

/// Acts on the connections that have no reason to be skipped. Afterwards each has an outcome. `pace` goes on after earlier acts of this run.
pub fn run(
    connections: &mut [Forwarded],
    rules: &ForwardedRules<'_>,
    table: &mut dyn Table,
    network: &mut dyn Network,
    control: &dyn Control,
    pace: &mut Pace,
) {
    let mut pending: Vec<&mut Forwarded> = Vec::with_capacity(connections.len());
    for connection in connections {
        match connection.skip {
            Some(skip) => connection.outcome = Some(ForwardedOutcome::Skipped(skip)),
            None => pending.push(connection),
        }
    }
    let batch_size = batch_size(rules.rate);
    while !pending.is_empty() {
        if control.interrupted() {
            let skipped = ForwardedOutcome::Skipped(ForwardedSkip::Interrupted);
            pending
                .iter_mut()
                .for_each(|connection| connection.outcome = Some(skipped.clone()));
            return;
        }
        let (batch, rest) = next_batch(pending, batch_size);
        pending = rest;
        let batch = with_paths(batch, network);
        // From here on a SYN is seen: what is looked up now is what is asked.
        let views: Vec<Tuple> = batch
            .iter()
            .flat_map(|connection| connection.views())
            .collect();
        let batch = match network.listen(&views) {
            Ok(()) => recheck(batch, rules, table),
            Err(error) => {
                let failure = ForwardedFailure::NotSent(error.to_string());
                for connection in batch {
                    connection.outcome = Some(ForwardedOutcome::Failed(failure.clone()));
                }
                Vec::new()
            }
        };
        act(batch, rules, table, network, control, pace);
    }
}

/// The connections of a batch, so that its questions take a tenth of a second at most: an answer must not wait long for the RST, nor the
/// operator for the end.
pub fn batch_size(rate: u32) -> usize {
    usize::try_from(rate / 20).map_or(BATCH, |size| size.clamp(1, BATCH))
}

/// The first connections, as far as their answers can be told apart: with zones, several have the same addresses.
fn next_batch(
    pending: Vec<&mut Forwarded>,
    size: usize,
) -> (Vec<&mut Forwarded>, Vec<&mut Forwarded>) {
    let mut views: HashSet<Tuple> = HashSet::new();
    let (mut batch, mut rest) = (Vec::new(), Vec::new());
    for connection in pending {
        let is_new =
            batch.len() < size && !connection.views().iter().any(|view| views.contains(view));
        match is_new {
            true => {
                views.extend(connection.views());
                batch.push(connection);
            }
            false => rest.push(connection),
        }
    }
    (batch, rest)
}

/// The connections that are still there, and still match. The others get their outcome.
fn recheck<'c>(
    batch: Vec<&'c mut Forwarded>,
    rules: &ForwardedRules<'_>,
    table: &mut dyn Table,
) -> Vec<&'c mut Forwarded> {
    let mut left = Vec::with_capacity(batch.len());
    for connection in batch {
        if connection.entry.id.is_none() {
            left.push(connection);
            continue;
        }
        let outcome = match table.lookup(&connection.entry) {
            Ok(Some(now)) if now.id == connection.entry.id => {
                let quiet = rules.timeouts.quiet(&now);
                let selectors = rules.selectors;
                let is_left_alone =
                    selectors.finds_too_young(quiet) || selectors.finds_being_opened(&now);
                match selectors.matches(&now) && !is_left_alone {
                    true => {
                        left.push(connection);
                        continue;
                    }
                    false => ForwardedOutcome::Skipped(ForwardedSkip::NoLongerSelected),
                }
            }
            Ok(_) => ForwardedOutcome::Gone,
            Err(error) => ForwardedOutcome::Failed(ForwardedFailure::Conntrack(error.to_string())),
        };
        connection.outcome = Some(outcome);
    }
    left
}

/// The connections of which both ends can be reached. Nothing is sent to an end if the other one cannot be asked.
fn with_paths<'c>(
    batch: Vec<&'c mut Forwarded>,
    network: &mut dyn Network,
) -> Vec<&'c mut Forwarded> {
    let mut left = Vec::with_capacity(batch.len());
    for connection in batch {
        let [one, other] = connection.end_addresses();
        let found = network.find_path(one, other);
        match found.and_then(|()| network.find_path(other, one)) {
            Ok(()) => left.push(connection),
            Err(no_path) => {
                let failure = ForwardedFailure::NoPath(no_path.to_string());
                connection.outcome = Some(ForwardedOutcome::Failed(failure));
            }
        }
    }
    left
}

/// Asks the ends of a batch, deletes the entries, resets and verifies.
fn act(
    mut batch: Vec<&mut Forwarded>,
    rules: &ForwardedRules<'_>,
    table: &mut dyn Table,
    network: &mut dyn Network,
    control: &dyn Control,
    pace: &mut Pace,
) {
    let views: Vec<[Tuple; 2]> = batch.iter().map(|connection| connection.views()).collect();
    let mut exchange = Exchange {
        questions: Questions::new(rules.act, &views, rules.retry, control.now()),
        failures: vec![None; batch.len()],
        deleted: vec![None; batch.len()],
        entries: batch
            .iter()
            .map(|connection| connection.entry.clone())
            .collect(),
        views,
        table,
        network,
        control,
        pace,
    };
    exchange.run();
    for (index, connection) in batch.iter_mut().enumerate() {
        // A new connection may have the addresses by now, and the id of the entry. Its entry must stay.
        exchange.read_answers();
        connection.ends = exchange.questions.reports(index);
        connection.deleted = exchange.deleted[index].take();
        if exchange.questions.is_reopened(index) {
            connection.outcome = Some(ForwardedOutcome::Gone);
            continue;
        }
        let is_asked = connection
            .ends
            .iter()
            .all(|end| end.now != EndState::NotAsked);
        let outcome = match exchange.failures[index].take() {
            Some(failure) => ForwardedOutcome::Failed(failure),
            None if !is_asked => ForwardedOutcome::Skipped(ForwardedSkip::Interrupted),
            None => forwarded_outcome(rules.act, connection.ends),
        };
        let is_over = match outcome {
            ForwardedOutcome::Cut => true,
            // Hosts that answer RST in the main table may not be those of another zone.
            ForwardedOutcome::Healed => connection.entry.zone.id == 0,
            // The mapping of NAT leads the silent end to the one that has forgotten the connection.
            ForwardedOutcome::Half => rules.act == ForwardedAct::Cut,
            _ => false,
        };
        if is_over && connection.entry.id.is_some() {
            connection.deleted = Some(match connection.deleted.take() {
                Some(deleted) => deleted,
                None => delete(&connection.entry, exchange.table),
            });
            if connection.deleted == Some(EntryDeletion::Deleted) {
                delete_picked_up(&connection.entry, exchange.table);
            }
        }
        connection.outcome = Some(outcome);
    }
}

fn delete(entry: &Entry, table: &mut dyn Table) -> EntryDeletion {
    match table.delete(entry) {
        Ok(Delete::Deleted) => EntryDeletion::Deleted,
        Ok(Delete::Gone) => EntryDeletion::Gone,
        Ok(Delete::Offloaded) => EntryDeletion::Offloaded,
        Err(error) => EntryDeletion::Failed(error.to_string()),
    }
}

/// Deletes what conntrack has made of the last answers of the ends (loose pick-up), if it is there.
fn delete_picked_up(entry: &Entry, table: &mut dyn Table) {
    for original in [entry.original, entry.reply] {
        let named = Entry {
            original,
            ..entry.clone()
        };
        // One that is being opened was not picked up, and one that has these addresses only after NAT is another.
        let is_new = |found: &Entry| {
            found.original != original || found.state.is_some_and(ConntrackState::is_being_opened)
        };
        if let Ok(Some(found)) = table.lookup(&named)
            && !is_new(&found)
        {
            // It times out in any case.
            let _ = table.delete(&found);
        }
    }
}

/// The questions and answers of one batch.
struct Exchange<'x> {
    questions: Questions,
    /// Why the ends of a connection cannot be reached.
    failures: Vec<Option<ForwardedFailure>>,
    /// What became of the entries that were to be deleted.
    deleted: Vec<Option<EntryDeletion>>,
    entries: Vec<Entry>,
    views: Vec<[Tuple; 2]>,
    table: &'x mut dyn Table,
    network: &'x mut dyn Network,
    control: &'x dyn Control,
    pace: &'x mut Pace,
}

impl Exchange<'_> {
    /// Until nothing more is to be asked, or the operator wants to stop.
    fn run(&mut self) {
        while let Some(next) = self.questions.next_due() {
            if self.control.interrupted() {
                return;
            }
            let due = self.questions.due(self.control.now());
            for burst in due.chunks(BURST) {
                if self.control.interrupted() {
                    return;
                }
                for &index in burst {
                    let (seq, nonce) = (self.network.random(), self.network.random());
                    let now = self.control.now();
                    if let Some(segment) = self.questions.ask(index, seq, nonce, now) {
                        self.send(index, &segment);
                    }
                }
                self.read_answers();
            }
            if due.is_empty() {
                let wait = next.saturating_duration_since(self.control.now());
                self.control
                    .sleep(wait.clamp(SHORTEST_PAUSE, LONGEST_PAUSE));
                self.read_answers();
            }
        }
    }

    /// Reads what was captured, and sends what follows from it.
    fn read_answers(&mut self) {
        let mut captured = VecDeque::new();
        self.capture(&mut captured);
        while let Some(segment) = captured.pop_front() {
            let (seq, nonce) = (self.network.random(), self.network.random());
            let now = self.control.now();
            let due = self.questions.note(&segment, seq, nonce, now);
            if let Some((index, _)) = due.iter().find(|(_, it)| it.flags == TcpFlags::RST) {
                // A SYN that has arrived since the answer: the entry may be that of the new connection.
                self.capture(&mut captured);
                if self.questions.is_reopened(index / 2) || !self.may_reset(index / 2) {
                    self.questions.stop(*index);
                    continue;
                }
            }
            for (index, segment) in due {
                self.send(index, &segment);
            }
        }
    }

    /// Appends what was captured since the last call. SYNs count at once.
    fn capture(&mut self, captured: &mut VecDeque<Segment>) {
        let questions = &mut self.questions;
        // After an error of the capture the ends seem silent.
        let _ = self
            .network
            .drain(&mut |segment| match segment.flags & TcpFlags::SYN {
                0 => captured.push_back(segment),
                _ => questions.note_syn(&segment),
            });
    }

    /// Deletes the entry before the first RST, which passes conntrack by: with the entry of the old connection, which it takes for alive, a
    /// new one of the ends would lose segments as invalid. Returns whether the entry was still there.
    fn may_reset(&mut self, connection: usize) -> bool {
        let entry = &self.entries[connection];
        if entry.id.is_none() || self.deleted[connection].is_some() {
            return true;
        }
        let deleted = delete(entry, self.table);
        let was_there = deleted != EntryDeletion::Gone;
        self.deleted[connection] = Some(deleted);
        was_there
    }

    fn send(&mut self, index: usize, segment: &Segment) {
        self.pace.wait(self.control);
        let (connection, side) = (index / 2, index % 2);
        let ends = self.views[connection].map(|view| view.local);
        if let Err(failure) = self.network.send(segment, ends[side], ends[1 - side]) {
            self.questions.not_sent(index);
            self.failures[connection].get_or_insert(match failure {
                SendFailure::NoPath(no_path) => ForwardedFailure::NoPath(no_path.to_string()),
                SendFailure::Send(error) => ForwardedFailure::NotSent(error.to_string()),
            });
        }
    }
}

/// Keeps the number of packets a second below a limit.
pub struct Pace {
    gap: Duration,
    /// When the next packet may leave.
    next: Option<Instant>,
}

impl Pace {
    /// After a pause, this much may leave at once.
    const CREDIT: Duration = Duration::from_millis(5);

    /// `rate`: the packets per second.
    pub fn new(rate: u32) -> Self {
        Pace {
            gap: Duration::from_secs(1) / rate.max(1),
            next: None,
        }
    }

    fn wait(&mut self, control: &dyn Control) {
        let now = control.now();
        let next = self.next.unwrap_or(now);
        let ahead = next.saturating_duration_since(now);
        if ahead > Self::CREDIT {
            control.sleep(ahead);
        }
        // Time that was not used is lost.
        self.next = Some(next.max(now) + self.gap);
    }
}

#[cfg(test)]
#[path = "run_tests.rs"]
mod tests;
