//! Which stuck sockets come from which place in the code.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use super::Trace;
use super::stack::{Frame, Problem, Stack};
use super::symbols::StackId;
use crate::bpf::tracer::{Life, Opened};
use crate::model::{Scan, Target};
use crate::proc::Process;

/// What the trace says about the sockets that are stuck at its end.
#[derive(Debug)]
pub struct Places<'a> {
    /// The places, the one with most sockets first.
    pub places: Vec<Place<'a>>,
    /// The stuck sockets that became stuck during the trace.
    pub new: usize,
    /// Those of them whose end nobody has read.
    pub unread: usize,
    /// Those of which no stack was taken, or none could be read.
    pub unknown: usize,
    /// Those that were stuck before, so that their place cannot be known.
    pub before: usize,
    /// What keeps stacks from telling more, by process.
    pub problems: Vec<(i32, Option<Arc<Process>>, Problem)>,
}

/// A place in the code that reads the end of streams and leaves their sockets open; or one that opens connections whose end nobody reads.
#[derive(Debug)]
pub struct Place<'a> {
    /// The process that has this code, by its pid.
    pub pid: i32,
    /// The process, if it owns one of the sockets.
    pub process: Option<Arc<Process>>,
    /// Where the end was read; `None` if nobody has read it.
    pub read: Option<&'a Stack>,
    /// Where the connection was opened, and how, if that was seen.
    pub opened: Option<(Opened, &'a Stack)>,
    /// The sockets, the oldest first.
    pub sockets: Vec<(&'a Target, &'a Life)>,
}

impl Place<'_> {
    /// When the first and the last of its sockets became stuck. CLOCK_MONOTONIC.
    pub fn times(&self) -> (Duration, Duration) {
        let times = || self.sockets.iter().filter_map(|(_, life)| life.stuck_since);
        let (first, last) = (times().min(), times().max());
        (first.unwrap_or_default(), last.unwrap_or_default())
    }
}

impl Places<'_> {
    /// The sockets of which a place is known.
    pub fn known(&self) -> usize {
        self.new - self.unknown
    }
}

/// What makes two sockets belong to one place: the process, and the lines of code.
#[derive(PartialEq, Eq, Hash)]
enum Key<'a> {
    Read(i32, Vec<Line<'a>>),
    /// The end was not read. Where it was opened, if that is known.
    Opened(i32, Vec<Line<'a>>),
    NotRead(i32),
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
    let lives: HashMap<u64, &Life> = trace.lives.iter().map(|life| (life.cookie, life)).collect();
    let mut found = Places {
        places: Vec::new(),
        new: 0,
        unread: 0,
        unknown: 0,
        before: 0,
        problems: Vec::new(),
    };
    let mut index: HashMap<Key<'_>, usize> = HashMap::new();
    for target in &scan.targets {
        let cookie = target.socket.cookie().0;
        let life = lives.get(&cookie).copied();
        let Some(life) = life.filter(|life| life.stuck_since.is_some()) else {
            found.before += 1;
            continue;
        };
        found.new += 1;
        // The FIN counts as a byte that is not read.
        let is_read = life.read.is_some() || target.socket.recv_q == 0;
        found.unread += usize::from(!is_read);
        let stack = |opens| {
            let id: StackId = trace.symbols.place(cookie, opens)?;
            Some((id.process.pid, trace.symbols.stack(id)?))
        };
        let opened = stack(true);
        let (key, pid, read) = match (is_read, stack(false)) {
            (true, Some((pid, stack))) => (Key::Read(pid, lines(stack)), pid, Some(stack)),
            // Somebody has read it, but it is not known where.
            (true, None) => {
                found.unknown += 1;
                continue;
            }
            (false, _) => {
                let owner = target.owners.first();
                let pid = opened.map(|(pid, _)| pid);
                let pid = pid.or(owner.map(|owner| owner.process.id.pid));
                let pid = pid.unwrap_or_default();
                let key = match opened {
                    Some((_, stack)) => Key::Opened(pid, lines(stack)),
                    None => Key::NotRead(pid),
                };
                (key, pid, None)
            }
        };
        let next = found.places.len();
        let at = *index.entry(key).or_insert(next);
        if at == next {
            found.places.push(Place {
                pid,
                process: None,
                read,
                opened: None,
                sockets: Vec::new(),
            });
        }
        let place = &mut found.places[at];
        place.sockets.push((target, life));
        if place.opened.is_none()
            && let (Some((how, _)), Some((_, stack))) = (life.opened, opened)
        {
            place.opened = Some((how, stack));
        }
        if place.process.is_none() {
            let mut owners = target.owners.iter();
            let owner = owners.find(|owner| owner.process.id.pid == pid);
            place.process = owner.map(|owner| owner.process.clone());
        }
    }
    // A stable sort: of places with as many sockets, the one that leaked first comes first.
    found
        .places
        .sort_by_key(|place| std::cmp::Reverse(place.sockets.len()));
    for place in &mut found.places {
        place.sockets.sort_by_key(|(_, life)| life.stuck_since);
    }
    found.problems = problems(trace, scan, &found.places);
    found
}

/// The lines that make a place.
fn lines(stack: &Stack) -> Vec<Line<'_>> {
    let place = stack.place().into_iter();
    place.map(Line::of).collect()
}

impl<'a> Line<'a> {
    fn of(frame: &'a Frame) -> Self {
        let function = frame.function.as_deref();
        let file = frame.file.as_deref();
        Line {
            function,
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
) -> Vec<(i32, Option<Arc<Process>>, Problem)> {
    let mut owners: HashMap<i32, Arc<Process>> = HashMap::new();
    for owner in scan.targets.iter().flat_map(|target| &target.owners) {
        owners.insert(owner.process.id.pid, owner.process.clone());
    }
    let mut problems: Vec<_> = trace
        .symbols
        .problems()
        .filter(|(pid, _)| owners.contains_key(pid) || places.iter().any(|place| place.pid == *pid))
        .map(|(pid, problem)| (pid, owners.get(&pid).cloned(), problem))
        .collect();
    problems.sort_by_key(|(pid, _, problem)| (*pid, *problem));
    problems
}
