//! The questions and answers of one batch: sends what [`Questions`] says, deletes the entries, and sets the outcomes.

use std::collections::{HashSet, VecDeque};
use std::io;
use std::time::Duration;

use super::pace::Pace;
use super::questions::Questions;
use super::{ForwardedRules, Network, Pending, Table};
use crate::conntrack::{ConntrackState, Delete, Entry};
use crate::control::Control;
use crate::model::{
    EndState, EntryDeletion, Forwarded, ForwardedAct, ForwardedFailure, ForwardedOutcome,
    ForwardedSkip, forwarded_outcome,
};
use crate::tcp::{Segment, TcpFlags, Tuple};

/// Segments sent before the capture is read.
const BURST: usize = 32;
const SHORTEST_PAUSE: Duration = Duration::from_micros(50);
const LONGEST_PAUSE: Duration = Duration::from_millis(1);
/// How often the ends of a connection are asked in all, if answers are lost each time.
const MAX_ATTEMPTS: u8 = 3;
/// The pauses in milliseconds before a segment that was refused is sent again. A queue of a link drains in this time.
const SEND_PAUSES_MS: [u64; 5] = [1, 2, 4, 8, 16];

pub(super) struct Exchange<'x, 'c> {
    batch: Vec<Pending<'c>>,
    questions: Questions,
    /// Why the ends of a connection cannot be reached.
    failures: Vec<Option<ForwardedFailure>>,
    /// Interfaces that have refused a segment for as long as cwkill waits.
    stuck: HashSet<u32>,
    act: ForwardedAct,
    table: &'x mut dyn Table,
    network: &'x mut dyn Network,
    control: &'x dyn Control,
    pace: &'x mut Pace,
}

impl<'x, 'c> Exchange<'x, 'c> {
    pub fn new(
        batch: Vec<Pending<'c>>,
        rules: &ForwardedRules<'_>,
        table: &'x mut dyn Table,
        network: &'x mut dyn Network,
        control: &'x dyn Control,
        pace: &'x mut Pace,
    ) -> Self {
        let views: Vec<[Tuple; 2]> = batch.iter().map(|it| it.connection.views()).collect();
        Exchange {
            questions: Questions::new(rules.act, &views, rules.retry, control.now()),
            failures: vec![None; batch.len()],
            stuck: HashSet::new(),
            act: rules.act,
            batch,
            table,
            network,
            control,
            pace,
        }
    }

    /// Asks the ends, deletes the entries, resets and verifies. Returns the connections that must be asked anew, because answers were
    /// lost; the others have an outcome.
    pub fn act(mut self) -> Vec<Pending<'c>> {
        self.ask_all();
        let mut again = Vec::new();
        for (index, mut it) in std::mem::take(&mut self.batch).into_iter().enumerate() {
            // A new connection may have the addresses by now, and the id of the entry. Its entry must stay.
            self.capture(&mut VecDeque::new());
            it.connection.ends = self.questions.reports(index);
            if self.failures[index].is_none() && self.questions.is_lost(index) {
                it.attempts += 1;
                // A probe ends nothing that lives. A cut would end also a new connection whose SYN was lost: its entry can have the same id.
                if self.act == ForwardedAct::Probe && it.attempts < MAX_ATTEMPTS {
                    it.connection.ends = Default::default();
                    again.push(it);
                    continue;
                }
                self.failures[index] = Some(ForwardedFailure::AnswersLost);
            }
            self.conclude(index, &mut it);
        }
        again
    }

    /// Sets the outcome of a connection, and deletes its entry if it is over.
    fn conclude(&mut self, index: usize, it: &mut Pending<'_>) {
        let connection = &mut *it.connection;
        if self.questions.has_ended(index) {
            connection.outcome = Some(ForwardedOutcome::Gone);
            // That is not why it is gone.
            if connection.both_had_forgotten() {
                connection.ends = Default::default();
            }
            return;
        }
        let ends = connection.ends;
        let is_asked = ends.iter().all(|end| end.now != EndState::NotAsked);
        let is_left = !is_asked || self.questions.is_cancelled(index);
        let outcome = match self.failures[index].take() {
            Some(ForwardedFailure::NotSent(reason)) => ForwardedOutcome::Failed(
                ForwardedFailure::NotSent(with_what_was_done(reason, connection)),
            ),
            Some(failure) => ForwardedOutcome::Failed(failure),
            None if is_left => ForwardedOutcome::Skipped(ForwardedSkip::Interrupted),
            None => forwarded_outcome(self.act, ends),
        };
        let is_over = match outcome {
            ForwardedOutcome::Cut => true,
            // Hosts that answer RST in the main table may not be those of another zone.
            ForwardedOutcome::Healed => connection.entry.zone.id == 0,
            // With NAT gateways at both sides each may have answered for its host, and the connection lives.
            ForwardedOutcome::Gone => {
                self.act == ForwardedAct::Cut && connection.entry.zone.id == 0
            }
            // The mapping of NAT leads the silent end to the one that has forgotten the connection.
            ForwardedOutcome::Half => self.act == ForwardedAct::Cut,
            _ => false,
        };
        if is_over && connection.entry.id.is_some() && self.questions.may_delete(index) {
            let deleted = connection.deleted.take();
            let deleted = deleted.unwrap_or_else(|| delete(&connection.entry, self.table));
            if deleted == EntryDeletion::Deleted {
                self.delete_picked_up(index, &connection.entry);
            }
            connection.deleted = Some(deleted);
        }
        connection.outcome = Some(outcome);
    }

    /// Until nothing more is to be asked. When the operator wants to stop, only what was reset is still verified. In each round the answers
    /// are read before the silence of an end counts.
    fn ask_all(&mut self) {
        while let Some(next) = self.questions.next_due() {
            self.read_answers();
            let due = self.questions.due(self.control.now());
            for burst in due.chunks(BURST) {
                self.read_answers();
                for &index in burst {
                    let (seq, nonce) = (self.network.random(), self.network.random());
                    let now = self.control.now();
                    if let Some(segment) = self.questions.ask(index, seq, nonce, now) {
                        self.send(index, &segment);
                    }
                }
            }
            if due.is_empty() {
                let wait = next.saturating_duration_since(self.control.now());
                self.control
                    .sleep(wait.clamp(SHORTEST_PAUSE, LONGEST_PAUSE));
            }
        }
    }

    /// Reads what was captured, and sends what follows from it.
    fn read_answers(&mut self) {
        let mut captured = VecDeque::new();
        self.capture(&mut captured);
        loop {
            if self.control.interrupted() {
                self.questions.cancel();
            }
            let Some(segment) = captured.pop_front() else {
                return;
            };
            let (seq, nonce) = (self.network.random(), self.network.random());
            let now = self.control.now();
            let due = self.questions.note(&segment, seq, nonce, now);
            if let Some((index, _)) = due.iter().find(|(_, it)| it.flags == TcpFlags::RST) {
                // A SYN that has arrived since the answer, or was lost: the entry may be that of the new connection.
                self.capture(&mut captured);
                if !self.questions.may_reset(index / 2) {
                    continue;
                }
                if !self.delete_before_reset(index / 2) {
                    self.questions.note_vanished(index / 2);
                    continue;
                }
            }
            for (index, segment) in due {
                if !self.send(index, &segment) {
                    break;
                }
            }
        }
    }

    /// Appends what was captured since the last call. SYNs count at once.
    fn capture(&mut self, captured: &mut VecDeque<Segment>) {
        let questions = &mut self.questions;
        let drained = self
            .network
            .drain(&mut |segment| match segment.flags & TcpFlags::SYN {
                0 => captured.push_back(segment),
                _ => questions.note_syn(&segment),
            });
        match drained {
            Ok(()) if self.network.has_lost() => self.questions.note_loss(self.control.now()),
            Ok(()) => {}
            Err(_) => self.questions.give_up(),
        }
    }

    /// Deletes what was picked up. A new connection can have been opened since the capture was read, and the entry is then its own. Its SYN
    /// was captured before it had that entry, so the capture is read once more in between.
    fn delete_picked_up(&mut self, index: usize, entry: &Entry) {
        for original in [entry.original, entry.reply] {
            let Some(found) = picked_up(entry, original, self.table) else {
                continue;
            };
            self.capture(&mut VecDeque::new());
            if self.questions.has_ended(index) || !self.questions.may_delete(index) {
                return;
            }
            // It times out in any case.
            let _ = self.table.delete(&found);
        }
    }

    /// Deletes the entry before the first RST, which passes conntrack by: with the entry of the old connection, which it takes for alive, a
    /// new one of the ends would lose segments as invalid. Returns whether the entry was still there.
    fn delete_before_reset(&mut self, index: usize) -> bool {
        let connection = &mut *self.batch[index].connection;
        if connection.entry.id.is_none() || connection.deleted.is_some() {
            return true;
        }
        let deleted = delete(&connection.entry, self.table);
        let was_there = deleted != EntryDeletion::Gone;
        connection.deleted = Some(deleted);
        was_there
    }

    /// Sends a segment to the end with this index. Returns whether it has left.
    fn send(&mut self, index: usize, segment: &Segment) -> bool {
        let (connection, side) = (index / 2, index % 2);
        let to = self.batch[connection].paths[side];
        self.pace.wait(self.control);
        let mut sent = self.network.send(segment, to);
        for pause in SEND_PAUSES_MS.map(Duration::from_millis) {
            match &sent {
                Err(error) if may_pass(error) && !self.stuck.contains(&to.interface) => {
                    self.control.sleep(pause);
                    sent = self.network.send(segment, to);
                }
                _ => break,
            }
        }
        let Err(error) = sent else {
            self.stuck.remove(&to.interface);
            if segment.flags == TcpFlags::RST {
                self.questions.reset_sent(index);
            }
            return true;
        };
        self.stuck.insert(to.interface);
        self.questions.not_sent(index);
        self.failures[connection]
            .get_or_insert_with(|| ForwardedFailure::NotSent(error.to_string()));
        false
    }
}

/// Whether a segment that was refused for this reason can leave a moment later.
fn may_pass(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EAGAIN | libc::ENOBUFS | libc::ENETDOWN | libc::EINTR)
    )
}

/// The reason why a segment was not sent, with what was done before: the connection may live without its entry.
fn with_what_was_done(reason: String, connection: &Forwarded) -> String {
    let resets: u8 = connection.ends.iter().map(|end| end.resets).sum();
    match (resets, &connection.deleted) {
        (0, Some(EntryDeletion::Deleted)) => format!("{reason}; its entry was deleted before"),
        (0, _) => reason,
        _ => format!("{reason}; an RST was sent before"),
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

/// The entry that conntrack has made of the last answers of the ends (loose pick-up) in this direction, if it is there.
pub(super) fn picked_up(entry: &Entry, original: Tuple, table: &mut dyn Table) -> Option<Entry> {
    let named = Entry {
        original,
        ..entry.clone()
    };
    let found = table.lookup(&named).ok()??;
    // One that is being opened was not picked up, and one that has these addresses only after NAT is another.
    let is_new =
        found.original != original || found.state.is_some_and(ConntrackState::is_being_opened);
    (!is_new).then_some(found)
}
