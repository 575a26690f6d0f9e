//! Ends connections that are routed through this host: asks both ends, deletes the entry of conntrack, resets the ends, and verifies.
//!
//! `questions` decides what to send (pure), [`Network`] sends and captures. A batch takes one round trip, or about a second if an end is
//! silent. A connection is looked up again right before its ends are asked, a SYN of a new one with the same addresses ends the questions, and
//! an RST ends only a connection that has the numbers of the answer. So a new connection lives.

mod exchange;
mod network;
mod pace;
mod questions;

use std::collections::{HashSet, VecDeque};
use std::io;
use std::time::Duration;

pub use network::LinkNetwork;
pub use pace::Pace;

use crate::conntrack::{Conntrack, Delete, Entry, Timeouts};
use crate::control::Control;
use crate::filter::forwarded::ForwardedSelectors;
use crate::model::{Forwarded, ForwardedAct, ForwardedFailure, ForwardedOutcome, ForwardedSkip};
use crate::packet::capture::MAX_PORTS;
use crate::routes::{Flow, NoPath};
use crate::sys::link::LinkDestination;
use crate::tcp::{Segment, Seq, Tuple};
use exchange::Exchange;

/// The connections of a batch: a filter compares the port of each of their ends.
const BATCH: usize = MAX_PORTS / 2;

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
    /// Finds the paths to both ends of each flow, in order. After Ctrl-C it waits for no neighbour.
    fn find_paths(
        &mut self,
        flows: &[Flow],
        control: &dyn Control,
    ) -> Vec<Result<[LinkDestination; 2], NoPath>>;

    /// Captures only segments that the ends with these views send, from now on.
    fn listen(&mut self, views: &[Tuple]) -> io::Result<()>;

    /// Sends a segment to this neighbour.
    fn send(&mut self, segment: &Segment, to: LinkDestination) -> io::Result<()>;

    /// Calls `handle` with each segment that was captured.
    fn drain(&mut self, handle: &mut dyn FnMut(Segment)) -> io::Result<()>;

    /// Whether segments were lost since the last call, because they came faster than they were read.
    fn has_lost(&mut self) -> bool;

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

/// A connection that is to be asked, or is asked.
struct Pending<'c> {
    connection: &'c mut Forwarded,
    /// How to reach its ends.
    paths: [LinkDestination; 2],
    /// How often its ends were asked in vain: answers were lost.
    attempts: u8,
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
    let mut pending = VecDeque::new();
    for connection in connections {
        match connection.skip {
            Some(skip) => connection.outcome = Some(ForwardedOutcome::Skipped(skip)),
            None => pending.push_back(Pending {
                connection,
                paths: [LinkDestination::default(); 2],
                attempts: 0,
            }),
        }
    }
    let batch_size = batch_size(rules.rate);
    while !pending.is_empty() {
        if control.interrupted() {
            let skipped = ForwardedOutcome::Skipped(ForwardedSkip::Interrupted);
            pending
                .iter_mut()
                .for_each(|it| it.connection.outcome = Some(skipped.clone()));
            return;
        }
        let batch = next_batch(&mut pending, batch_size);
        let batch = with_paths(batch, network, control);
        // From here on a SYN is seen: what is looked up now is what is asked.
        let views = batch.iter().flat_map(|it| it.connection.views());
        let batch = match network.listen(&views.collect::<Vec<Tuple>>()) {
            Ok(()) => recheck(batch, rules, table),
            Err(error) => {
                let failure = ForwardedFailure::NotSent(error.to_string());
                for it in batch {
                    it.connection.outcome = Some(ForwardedOutcome::Failed(failure.clone()));
                }
                continue;
            }
        };
        let again = Exchange::new(batch, rules, table, network, control, pace).act();
        pending.extend(again);
    }
}

/// The connections of a batch, so that its questions take a tenth of a second at most: an answer must not wait long for the RST, nor the
/// operator for the end.
pub fn batch_size(rate: u32) -> usize {
    usize::try_from(rate / 20).map_or(BATCH, |size| size.clamp(1, BATCH))
}

/// Takes the first connections, as far as their answers can be told apart: with zones, several have the same addresses.
fn next_batch<'c>(pending: &mut VecDeque<Pending<'c>>, size: usize) -> Vec<Pending<'c>> {
    let mut views: HashSet<Tuple> = HashSet::new();
    let (mut batch, mut later) = (Vec::new(), Vec::new());
    while batch.len() < size && later.len() < size {
        let Some(next) = pending.pop_front() else {
            break;
        };
        let of_next = next.connection.views();
        match of_next.iter().any(|view| views.contains(view)) {
            true => later.push(next),
            false => {
                views.extend(of_next);
                batch.push(next);
            }
        }
    }
    for next in later.into_iter().rev() {
        pending.push_front(next);
    }
    batch
}

/// The connections that are still there, and still match. The others get their outcome.
fn recheck<'c>(
    mut batch: Vec<Pending<'c>>,
    rules: &ForwardedRules<'_>,
    table: &mut dyn Table,
) -> Vec<Pending<'c>> {
    batch.retain_mut(|it| {
        let entry = &it.connection.entry;
        if entry.id.is_none() {
            return true;
        }
        let outcome = match table.lookup(entry) {
            Ok(Some(now)) if now.id == entry.id => {
                let quiet = rules.timeouts.quiet(&now);
                let selectors = rules.selectors;
                let is_left_alone =
                    selectors.finds_too_young(quiet) || selectors.finds_being_opened(&now);
                if selectors.matches(&now) && !is_left_alone {
                    return true;
                }
                ForwardedOutcome::Skipped(ForwardedSkip::NoLongerSelected)
            }
            Ok(_) => ForwardedOutcome::Gone,
            Err(error) => ForwardedOutcome::Failed(ForwardedFailure::Conntrack(error.to_string())),
        };
        it.connection.outcome = Some(outcome);
        false
    });
    batch
}

/// The connections of which both ends can be reached. Nothing is sent to an end if the other one cannot be asked.
fn with_paths<'c>(
    mut batch: Vec<Pending<'c>>,
    network: &mut dyn Network,
    control: &dyn Control,
) -> Vec<Pending<'c>> {
    let flow = |it: &Pending<'_>| Flow {
        views: it.connection.views(),
        mark: it.connection.entry.mark.unwrap_or(0),
    };
    let flows: Vec<Flow> = batch.iter().map(flow).collect();
    let mut found = network.find_paths(&flows, control).into_iter();
    batch.retain_mut(|it| match found.next() {
        Some(Ok(paths)) => {
            it.paths = paths;
            true
        }
        Some(Err(no_path)) => {
            it.connection.outcome = Some(match no_path {
                NoPath::Ambiguous => ForwardedOutcome::Skipped(ForwardedSkip::AmbiguousPath),
                NoPath::Ipsec => ForwardedOutcome::Skipped(ForwardedSkip::IpsecPolicy),
                NoPath::EndsHere(_) => ForwardedOutcome::Skipped(ForwardedSkip::PathEndsHere),
                // Nobody has waited for it.
                NoPath::NoNeighbour(_) if control.interrupted() => {
                    ForwardedOutcome::Skipped(ForwardedSkip::Interrupted)
                }
                NoPath::Netlink(_) => {
                    let why = no_path.to_string();
                    ForwardedOutcome::Failed(ForwardedFailure::RoutesUnreadable(why))
                }
                other => ForwardedOutcome::Failed(ForwardedFailure::NoPath(other.to_string())),
            });
            false
        }
        None => false,
    });
    batch
}

#[cfg(test)]
#[path = "run_tests.rs"]
mod tests;
