//! Which stuck sockets come from which place in the code.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::mem::{Discriminant, discriminant};
use std::sync::Arc;
use std::time::Duration;

use super::Trace;
use super::problem::Problem;
use super::stack::{Frame, Stack};
use crate::bpf::tracer::{Life, Opened, Traced};
use crate::model::{Cause, Scan, Target};
use crate::proc::{Process, ProcessId};

/// What the trace says about the sockets that are stuck at its end.
#[derive(Debug, Default)]
pub struct Places<'a> {
    /// The places, the one with most sockets first.
    pub places: Vec<Place<'a>>,
    /// The processes that have not read the end of sockets, if it is not known either where these were opened.
    pub unread: Vec<Unread>,
    /// The stuck sockets that became stuck during the trace.
    pub new: usize,
    /// Those of `new` whose end was read.
    pub read: usize,
    /// Those of `new` whose end was read, and of which no stack is known, neither of the read nor of the call that opened the connection.
    pub unknown: usize,
    /// The sockets that were stuck before, so that their place cannot be known.
    pub before: usize,
    /// What keeps stacks from telling more, by process.
    pub problems: Vec<(Traced, Option<Arc<Process>>, Problem)>,
}

/// A place in the code that reads the end of streams and leaves their sockets open; or one that opens connections whose end nobody reads,
/// or whose reads were not seen.
#[derive(Debug)]
pub struct Place<'a> {
    /// The processes that run this code, each as an owner if it owns one of the sockets.
    pub processes: BTreeMap<Traced, Option<Arc<Process>>>,
    pub end: End<'a>,
    /// How and where one of the connections was opened, if that was seen.
    pub opened: Option<(Opened, &'a Stack)>,
    /// The sockets, the oldest first.
    pub sockets: Vec<Stuck<'a>>,
    /// Its part of all sockets that became stuck, from 0 to 1. An estimate if the stack of some is not known.
    pub share: f64,
}

/// The end of the streams of a place.
#[derive(Clone, Copy, Debug)]
pub enum End<'a> {
    /// It was read here.
    ReadAt(&'a Stack),
    /// It was read, and no stack of that is known.
    Read,
    NotRead,
}

/// A socket of a place.
#[derive(Clone, Copy, Debug)]
pub struct Stuck<'a> {
    pub target: &'a Target,
    /// The process whose code it is.
    pub traced: Traced,
    /// When it became stuck, by CLOCK_MONOTONIC; `None` if its FIN was not sampled, or the walk did not come to it.
    pub since: Option<Duration>,
    weight: u64,
}

/// A process that has not read the end of sockets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unread {
    /// `None`: it is not known.
    pub process: Option<Arc<Process>>,
    /// Whether it has not even accepted them.
    pub not_accepted: bool,
    pub count: usize,
}

impl Place<'_> {
    /// The first of its processes, and the same as an owner.
    pub fn process(&self) -> (Traced, Option<&Arc<Process>>) {
        let known = self.processes.iter().find(|(_, process)| process.is_some());
        let (traced, process) = known
            .or(self.processes.iter().next())
            .expect("a place has a process");
        (*traced, process.as_ref())
    }

    /// When the first and the last of its sockets became stuck, as far as it is known. CLOCK_MONOTONIC.
    pub fn times(&self) -> Option<(Duration, Duration)> {
        let times = || self.sockets.iter().filter_map(|stuck| stuck.since);
        Some((times().min()?, times().max()?))
    }
}

impl Places<'_> {
    /// The sockets of `new` of which something is known.
    pub fn known(&self) -> usize {
        self.new - self.unknown
    }

    /// The sockets of `new` whose end nobody has read.
    pub fn end_not_read(&self) -> usize {
        let places = self.places.iter();
        let places = places.filter(|place| matches!(place.end, End::NotRead));
        let with_place: usize = places.map(|place| place.sockets.len()).sum();
        let without: usize = self.unread.iter().map(|unread| unread.count).sum();
        with_place + without
    }
}

/// What makes two sockets belong to one place: the container or unit, whether the end was read there, and the lines of code. The workers of a
/// server run the same code.
#[derive(PartialEq, Eq, Hash)]
struct Key<'a> {
    lives_in: Option<String>,
    /// The name of the process, if no frame is the program's own: different programs run on the same runtime.
    comm: Option<String>,
    end: Discriminant<End<'a>>,
    lines: Vec<Line<'a>>,
}

/// The function, the file and the line; without a line, the file of the code and the address there.
#[derive(PartialEq, Eq, Hash)]
struct Line<'a> {
    function: Option<&'a str>,
    file: Option<&'a str>,
    line: Option<u32>,
    address: Option<u64>,
}

/// Puts the sockets that are stuck now together with what the trace has seen of them.
pub fn find<'a>(trace: &'a Trace, scan: &'a Scan) -> Places<'a> {
    let lives: HashMap<u64, Life> = trace
        .lives
        .iter()
        .map(|life| (life.cookie, *life))
        .collect();
    let mut found = Places::default();
    let mut index = HashMap::new();
    let mut unread: HashMap<(Option<ProcessId>, bool), Unread> = HashMap::new();
    for target in &scan.targets {
        let cookie = target.socket.cookie().0;
        let life = lives.get(&cookie).copied();
        let since = life.and_then(|life| life.stuck_since);
        if since.is_none() && trace.before.contains(&cookie) {
            found.before += 1;
            continue;
        }
        // It may be closed in a moment.
        let is_later = match since {
            Some(since) => since > trace.ended,
            None => trace
                .at_end
                .as_ref()
                .is_some_and(|it| !it.contains(&cookie)),
        };
        if is_later {
            continue;
        }
        found.new += 1;
        // The FIN counts as a byte that is not read.
        let end_was_read = target.socket.recv_q == 0;
        found.read += usize::from(end_was_read);
        let opened_at = trace.symbols.opened_at(cookie);
        let read_at = trace.symbols.read_at(cookie).and_then(Result::ok);
        let (end, (traced, decisive)) = match (end_was_read, read_at, opened_at) {
            (true, Some(read_at), _) => (End::ReadAt(read_at.1), read_at),
            (true, None, Some(opened_at)) => (End::Read, opened_at),
            (false, _, Some(opened_at)) => (End::NotRead, opened_at),
            (true, None, None) => {
                found.unknown += 1;
                continue;
            }
            (false, _, None) => {
                count_unread(&mut unread, scan, target);
                continue;
            }
        };
        let mut owners = target.owners.iter();
        let owner = owners.find(|owner| owner.process.id.pid == traced.pid);
        let process = owner.map(|owner| owner.process.clone());
        let cgroup = process.as_ref().map(|process| &process.cgroup);
        let container = cgroup.and_then(|it| it.container.as_ref());
        let unit = cgroup.and_then(|it| it.unit.clone());
        let comm = process.as_ref().map(|process| process.comm.to_string());
        let key = Key {
            lives_in: container.map(ToString::to_string).or(unit),
            comm: comm.filter(|_| decisive.first_own().is_none()),
            end: discriminant(&end),
            lines: decisive.place().into_iter().map(Line::of).collect(),
        };
        let next = found.places.len();
        let at = *index.entry(key).or_insert(next);
        if at == next {
            found.places.push(Place {
                processes: BTreeMap::new(),
                end,
                opened: None,
                sockets: Vec::new(),
                share: 0.0,
            });
        }
        let place = &mut found.places[at];
        place.sockets.push(Stuck {
            target,
            traced,
            since,
            weight: life.map_or(1, |life| life.weight.max(1)),
        });
        let known = place.processes.entry(traced).or_default();
        *known = known.take().or(process);
        let how = life.and_then(|life| life.opened);
        if let (None, Some(how), Some((_, stack))) = (place.opened, how, opened_at) {
            place.opened = Some((how, stack));
        }
    }
    set_shares(&mut found);
    // The sort is stable: of places with the same share, the one with the oldest socket comes first.
    found
        .places
        .sort_by(|one, other| other.share.total_cmp(&one.share));
    for place in &mut found.places {
        place.sockets.sort_by_key(|stuck| stuck.since);
    }
    found.unread = unread.into_values().collect();
    found.unread.sort_by_key(|it| {
        let pid = it.process.as_ref().map(|process| process.id.pid);
        (Reverse(it.count), pid, it.not_accepted)
    });
    found.problems = problems(trace, scan, &found.places);
    found
}

/// Counts a socket whose end nobody has read, and of which it is not known where it was opened.
fn count_unread(
    unread: &mut HashMap<(Option<ProcessId>, bool), Unread>,
    scan: &Scan,
    target: &Target,
) {
    let process = scan.culprit(target);
    let not_accepted = target.socket.cause == Cause::NotAccepted;
    let key = (process.map(|process| process.id), not_accepted);
    let group = unread.entry(key).or_insert_with(|| Unread {
        process: process.cloned(),
        not_accepted,
        count: 0,
    });
    group.count += 1;
}

/// A place has its own sockets. Of those whose end was read at an unknown place it has as many as its samples stand for, as far as there are so
/// many: a sample that was one of N stands for N - 1 others. The rest is shared out by the numbers of sockets.
#[expect(
    clippy::cast_precision_loss,
    reason = "numbers of sockets are far below 2^52"
)]
fn set_shares(found: &mut Places<'_>) {
    let count = |place: &Place<'_>| place.sockets.len() as f64;
    let others = |place: &Place<'_>| {
        let weights: u64 = place.sockets.iter().map(|it| it.weight).sum();
        weights as f64 - count(place)
    };
    let of_reads = || {
        found
            .places
            .iter()
            .filter(|it| matches!(it.end, End::ReadAt(_)))
    };
    let all: f64 = of_reads().map(count).sum();
    let all_others: f64 = of_reads().map(others).sum();
    let (new, unknown) = (found.new.max(1) as f64, found.unknown as f64);
    let by_weight = unknown.min(all_others);
    for place in &mut found.places {
        let mut sockets = count(place);
        if matches!(place.end, End::ReadAt(_)) {
            sockets += (unknown - by_weight) * count(place) / all;
            sockets += by_weight * others(place) / all_others.max(1.0);
        }
        place.share = sockets / new;
    }
}

impl<'a> Line<'a> {
    fn of(frame: &'a Frame) -> Self {
        let file = frame.file.as_deref();
        Line {
            function: frame.function.as_deref(),
            file: file.or(frame.module.as_deref()),
            line: frame.line,
            // Without a line, it tells the calls in one function apart. Code that is made at run time is made again elsewhere.
            address: (frame.line.is_none() && frame.module.is_some()).then_some(frame.address),
        }
    }
}

/// Only those of processes that have to do with a stuck socket.
fn problems(
    trace: &Trace,
    scan: &Scan,
    places: &[Place<'_>],
) -> Vec<(Traced, Option<Arc<Process>>, Problem)> {
    let mut owners: HashMap<i32, Arc<Process>> = HashMap::new();
    for owner in scan.targets.iter().flat_map(|target| &target.owners) {
        owners.insert(owner.process.id.pid, owner.process.clone());
    }
    // They may have ended.
    let targets = scan.targets.iter();
    let without_stack: HashSet<Traced> = targets
        .filter_map(|target| trace.symbols.read_at(target.socket.cookie().0)?.err())
        .collect();
    let concerns = |traced: &Traced| {
        owners.contains_key(&traced.pid)
            || without_stack.contains(traced)
            || places
                .iter()
                .any(|place| place.processes.contains_key(traced))
    };
    let problems = trace.symbols.problems();
    let mut problems: Vec<_> = problems
        .into_iter()
        .filter(|(traced, _)| concerns(traced))
        .map(|(traced, problem)| (traced, owners.get(&traced.pid).cloned(), problem))
        .collect();
    problems.sort_by_key(|(traced, _, problem)| (*traced, *problem));
    problems
}

#[cfg(test)]
#[path = "places_tests.rs"]
mod tests;
