//! What the readers have answered: stacks with names, and which socket has which.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::time::{Duration, Instant};

use super::problem::Problem;
use super::protocol::Answer;
use super::readers::{NotAsked, ReaderId, Readers, Report};
use super::stack::Stack;
use crate::bpf::tracer::{Sample, Traced};

/// How long the last answers may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// Sockets of which it is kept who has read their end: 60 MB.
const MAX_READ: usize = 1 << 20;
/// Connections of which it is kept who has opened them. The oldest ones are forgotten.
const MAX_OPENED: usize = 1 << 17;
/// Bytes of stacks of all processes. A stack has some kilobytes, or 128 KiB if a hostile file gives it names. Further ones are not known.
const MAX_BYTES: usize = 256 << 20;
/// Readers that have ended and whose stacks no socket has, and processes without a reader, are remembered up to this number.
const MAX_REMEMBERED: usize = 4096;
/// How long the last samples may wait for their readers, all together.
const LAST_WAIT: Duration = Duration::from_secs(2);
/// How often it is tried again then to give a sample to a reader.
const PAUSE: Duration = Duration::from_millis(5);
/// Samples that wait beside those in the queues of the readers: 16 MiB, of a process 8.
const MAX_WAITING: usize = 1024;
const MAX_WAITING_OF_ONE: usize = MAX_WAITING / 2;

/// The stacks that a reader has told, and what keeps them from telling more.
#[derive(Debug, Default)]
struct Stacks {
    /// By their numbers.
    stacks: HashMap<usize, Stack>,
    problems: BTreeSet<Problem>,
    bytes: usize,
}

/// Where a socket was opened or its end was read: a stack of a process, by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StackId {
    pub reader: ReaderId,
    number: usize,
}

/// What was found out about stacks so far.
#[derive(Debug, Default)]
pub struct Symbols {
    readers: Readers,
    /// Samples that their readers could not take yet.
    waiting: VecDeque<Sample>,
    told: HashMap<ReaderId, Stacks>,
    /// Of all stacks.
    bytes: usize,
    /// Processes without a reader.
    refused: HashMap<Traced, Problem>,
    /// Where the end of sockets was read, by their cookies. `Err`: this process has read it, and no stack is known of that.
    read: HashMap<u64, Result<StackId, Traced>>,
    opened: HashMap<u64, StackId>,
    /// The cookies of `opened`, the oldest first.
    opened_order: VecDeque<u64>,
    /// Samples without an answer.
    pub missed: usize,
}

impl Symbols {
    /// Gives a sample to the reader for its process. Does not wait: if that one has too many, the sample waits, behind those that wait already.
    pub fn ask(&mut self, sample: Sample) {
        let waiting = self.waiting.iter();
        let before = waiting.filter(|it| it.process == sample.process).count();
        let not_given = match before {
            0 => self.give(sample),
            _ => Some(sample),
        };
        match not_given {
            Some(sample) if self.waiting.len() < MAX_WAITING && before < MAX_WAITING_OF_ONE => {
                self.waiting.push_back(sample);
            }
            Some(_) => self.missed += 1,
            None => {}
        }
    }

    /// Gives the samples that wait to their readers, as far as these take them.
    pub fn ask_again(&mut self) {
        let mut full = HashSet::new();
        for sample in std::mem::take(&mut self.waiting) {
            let process = sample.process;
            let not_given = match full.contains(&process) {
                true => Some(sample),
                false => self.give(sample),
            };
            if let Some(sample) = not_given {
                full.insert(process);
                self.waiting.push_back(sample);
            }
        }
    }

    /// Returns the sample if its reader has too many.
    fn give(&mut self, sample: Sample) -> Option<Sample> {
        let process = sample.process;
        match self.readers.ask(sample) {
            Ok(()) => return None,
            Err(NotAsked::Full(sample)) => return Some(sample),
            Err(NotAsked::Refused(problem)) if self.refused.len() < MAX_REMEMBERED => {
                self.refused.insert(process, problem);
            }
            Err(NotAsked::Refused(_) | NotAsked::Ended) => {}
        }
        self.missed += 1;
        None
    }

    /// The last samples have been given. Waits a moment for readers that have too many; what waits then still counts as missed.
    pub fn ask_last(&mut self) {
        let until = Instant::now() + LAST_WAIT;
        while !self.waiting.is_empty() && Instant::now() < until {
            std::thread::sleep(PAUSE);
            self.collect();
            self.ask_again();
        }
        self.missed += self.waiting.drain(..).count();
    }

    /// Takes the answers that have come. Does not wait.
    pub fn collect(&mut self) {
        while let Some(report) = self.readers.next(Duration::ZERO) {
            self.note(report);
        }
        self.readers.reap();
    }

    /// Waits for the last answers, but not for long.
    pub fn finish(&mut self) {
        self.readers.ask_no_more();
        let until = Instant::now() + PATIENCE;
        while !self.readers.is_empty() {
            let left = until.saturating_duration_since(Instant::now());
            match self.readers.next(left) {
                Some(report) => self.note(report),
                None => break,
            }
        }
        self.readers.end_late_ones();
    }

    fn note(&mut self, report: Report) {
        match report {
            Report::Stack {
                reader,
                cookie,
                opens,
                answer,
            } => {
                self.readers.note_answer(reader);
                let stack = self.keep(reader, answer);
                self.missed += usize::from(stack.is_none());
                match (opens, stack) {
                    (false, stack) => self.note_read(cookie, stack.ok_or(reader.process)),
                    (true, Some(stack)) => self.note_opened(cookie, stack),
                    (true, None) => {}
                }
            }
            Report::Again { reader, answer } => {
                self.keep(reader, answer);
            }
            Report::BrokeOff {
                reader,
                sample,
                waiting,
            } => {
                if let Err((lost, problem)) = self.readers.restart(reader, sample, waiting) {
                    self.missed += lost;
                    self.note_end(reader, [problem].into());
                }
            }
            Report::Ended { reader, problems } => {
                let problems = problems.unwrap_or_else(|| [Problem::Damaged].into());
                self.note_end(reader, problems);
            }
        }
    }

    fn note_read(&mut self, cookie: u64, at: Result<StackId, Traced>) {
        let known = self.read.get(&cookie);
        if known.is_none() && self.read.len() >= MAX_READ {
            self.missed += usize::from(at.is_ok());
        } else if at.is_ok() || known.is_none() {
            self.read.insert(cookie, at);
        }
    }

    fn note_opened(&mut self, cookie: u64, at: StackId) {
        if self.opened.insert(cookie, at).is_none() {
            self.opened_order.push_back(cookie);
        }
        if self.opened_order.len() > MAX_OPENED
            && let Some(oldest) = self.opened_order.pop_front()
        {
            self.opened.remove(&oldest);
        }
    }

    fn note_end(&mut self, reader: ReaderId, problems: BTreeSet<Problem>) {
        self.told
            .entry(reader)
            .or_default()
            .problems
            .extend(problems);
        self.readers.remove(reader);
        if self.told.len() > MAX_REMEMBERED {
            self.forget_unused();
        }
    }

    /// Returns the stack of the answer, if it is known now: further ones are not kept if those of all processes take too much memory.
    fn keep(&mut self, reader: ReaderId, answer: Answer) -> Option<StackId> {
        let told = self.told.entry(reader).or_default();
        told.problems.extend(answer.problems);
        let number = answer.number?;
        if let Some(stack) = answer.stack
            && self.bytes < MAX_BYTES
        {
            let bytes = stack.bytes();
            let before = told.stacks.insert(number, stack);
            let freed = before.map_or(0, |stack| stack.bytes());
            told.bytes = told.bytes + bytes - freed;
            self.bytes = self.bytes + bytes - freed;
        }
        let is_known = told.stacks.contains_key(&number);
        is_known.then_some(StackId { reader, number })
    }

    /// Whether so much is kept that [`Symbols::forget_all_but`] is due. After that, it would not help for long.
    pub fn is_nearly_full(&self) -> bool {
        self.read.len() > MAX_READ / 4 * 3 || self.bytes > MAX_BYTES / 4 * 3
    }

    /// Forgets what belongs to other sockets than these, which are stuck and whose cookies they are: who has read their end, and if that is
    /// not enough, who has opened them.
    pub fn forget_all_but(&mut self, stuck: &HashSet<u64>) {
        self.read.retain(|cookie, _| stuck.contains(cookie));
        self.forget_unused();
        if self.is_nearly_full() {
            self.opened.retain(|cookie, _| stuck.contains(cookie));
            let opened = &self.opened;
            self.opened_order
                .retain(|cookie| opened.contains_key(cookie));
            self.forget_unused();
        }
    }

    /// Forgets the stacks of readers that have ended, if no socket has one.
    fn forget_unused(&mut self) {
        let read = self.read.values().filter_map(|at| at.as_ref().ok());
        let used: HashSet<_> = read
            .chain(self.opened.values())
            .map(|id| id.reader)
            .collect();
        let readers = &self.readers;
        self.told
            .retain(|reader, _| used.contains(reader) || readers.has(reader.process));
        self.bytes = self.told.values().map(|told| told.bytes).sum();
    }

    /// The stack with which the end of this socket was read, and its process; `Err`: no stack is known of that.
    pub fn read_at(&self, cookie: u64) -> Option<Result<(Traced, &Stack), Traced>> {
        let at = *self.read.get(&cookie)?;
        Some(at.and_then(|id| {
            let process = id.reader.process;
            self.stack(id).map(|stack| (process, stack)).ok_or(process)
        }))
    }

    /// The stack with which this socket was opened, and its process.
    pub fn opened_at(&self, cookie: u64) -> Option<(Traced, &Stack)> {
        let id = *self.opened.get(&cookie)?;
        Some((id.reader.process, self.stack(id)?))
    }

    /// `None`: it is not known, or has no function.
    fn stack(&self, id: StackId) -> Option<&Stack> {
        let stack = self.told.get(&id.reader)?.stacks.get(&id.number)?;
        (!stack.frames.is_empty()).then_some(stack)
    }

    /// What keeps the stacks of a process from telling more.
    pub fn problems(&self) -> BTreeSet<(Traced, Problem)> {
        let told = self.told.iter().flat_map(|(reader, told)| {
            let problems = told.problems.iter();
            problems.map(|problem| (reader.process, *problem))
        });
        let late = self.readers.late.iter();
        let late = late.map(|reader| (reader.process, Problem::TooSlow));
        let refused = self
            .refused
            .iter()
            .map(|(process, problem)| (*process, *problem));
        told.chain(late).chain(refused).collect()
    }
}

#[cfg(test)]
#[path = "symbols_tests.rs"]
pub mod tests;
