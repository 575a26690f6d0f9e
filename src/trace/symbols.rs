//! The processes that read symbols, one for each traced process, and what they have answered.
//!
//! A thread for each asks and waits, so that one that hangs holds nobody up. What a process does not answer in time is not known.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::io::{self, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, SyncSender, TrySendError, channel, sync_channel};
use std::thread::Builder;
use std::time::{Duration, Instant};

use super::problem::Problem;
use super::protocol::{Answer, LastWord, Question, read_line};
use super::stack::Stack;
use crate::bpf::tracer::{Sample, Traced};

/// Traced processes at a time. Each takes a process and a thread.
const MAX_PROCESSES: usize = 32;
/// Those of them that connections may take that are opened. Many are of processes that soon end.
const MAX_OPENING: usize = MAX_PROCESSES / 2;
/// When another process needs a place, one that was not asked for so long gives its own.
const IDLE: Duration = Duration::from_secs(1);
/// Samples that wait for one of them: 4 MiB of it, and 128 MiB of all.
const MAX_WAITING: usize = 256;
/// How long the last answers may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// Sockets whose place is kept in memory: 60 MB.
const MAX_PLACES: usize = 1 << 20;
/// Connections that were opened, of these. The oldest ones are forgotten.
const MAX_OPENED: usize = 1 << 17;
/// Bytes of stacks of all processes. A stack has some kilobytes, or megabytes if a hostile file gives it names. Further ones are not known.
const MAX_BYTES: usize = 256 << 20;
/// Processes, and those without a reader, that are remembered.
const MAX_REMEMBERED: usize = 4096;
/// How long the last samples may wait for a reader.
const LAST_WAIT: Duration = Duration::from_secs(2);

/// The hidden command of cwkill that is such a process.
pub const COMMAND: &str = "trace-symbols";

/// The stacks of a process, and what keeps them from telling more.
#[derive(Debug, Default)]
pub struct Stacks {
    /// By their numbers.
    stacks: HashMap<usize, Stack>,
    problems: BTreeSet<Problem>,
    bytes: usize,
}

/// Where a socket was opened or its end was read: a stack of a process, by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StackId {
    pub process: Traced,
    /// Which reader of the process has numbered it.
    reader: u64,
    number: usize,
}

/// What was found out about stacks so far.
#[derive(Debug, Default)]
pub struct Symbols {
    readers: HashMap<Traced, Reader>,
    reports: Option<(Sender<Report>, Receiver<Report>)>,
    /// By the process and its reader: another reader begins with other numbers.
    processes: HashMap<(Traced, u64), Stacks>,
    /// Processes without a reader.
    refused: HashMap<Traced, Problem>,
    /// Processes one of whose samples has ended two readers: their files are too much for any.
    given_up: HashSet<Traced>,
    /// The number of readers that were started.
    started: u64,
    /// Of the stacks of all processes.
    bytes: usize,
    /// Readers that have ended, or will.
    ended: Vec<Child>,
    /// By the cookie, and whether it was opened there.
    places: HashMap<(u64, bool), StackId>,
    /// The cookies of connections that were opened, the oldest first.
    opened: VecDeque<u64>,
    /// Samples that no reader could take.
    pub missed: usize,
}

#[derive(Debug)]
struct Reader {
    /// `None` after the last question.
    questions: Option<SyncSender<Sample>>,
    child: Child,
    last_asked: Instant,
    serial: u64,
    /// The sample at which the one before it broke off: the cookie, and whether it opens.
    broke_off_at: Option<(u64, bool)>,
}

/// What a reader's thread reports.
#[derive(Debug)]
enum Report {
    Stack {
        reader: (Traced, u64),
        cookie: u64,
        opens: bool,
        answer: Answer,
    },
    /// More is known of a stack.
    Again {
        reader: (Traced, u64),
        answer: Answer,
    },
    /// The reader broke off at this sample. Those after it wait still.
    BrokeOff {
        reader: (Traced, u64),
        sample: Sample,
        waiting: Receiver<Sample>,
    },
    /// The reader has no more to say but what keeps stacks from telling more. `None`: it broke off.
    End {
        reader: (Traced, u64),
        problems: Option<BTreeSet<Problem>>,
    },
}

impl Symbols {
    /// Gives a sample to the reader for its process. Does not wait, or if `is_last` only for a moment.
    pub fn read(&mut self, sample: Sample, is_last: bool) {
        let process = sample.process;
        if self.given_up.contains(&process) {
            self.missed += 1;
            return;
        }
        if !self.readers.contains_key(&process) {
            let most = match sample.opens {
                true => MAX_OPENING,
                false => MAX_PROCESSES,
            };
            if self.readers.len() >= most {
                self.make_room();
                return self.refuse(process, Problem::TooManyProcesses);
            }
            let (questions, waiting) = sync_channel(MAX_WAITING);
            let Ok((child, serial)) = self.start(process, None, waiting) else {
                return self.refuse(process, Problem::NotStarted);
            };
            let reader = Reader {
                questions: Some(questions),
                child,
                last_asked: Instant::now(),
                serial,
                broke_off_at: None,
            };
            self.readers.insert(process, reader);
        }
        let Some(reader) = self.readers.get_mut(&process) else {
            return;
        };
        reader.last_asked = Instant::now();
        let Some(questions) = &reader.questions else {
            self.missed += 1;
            return;
        };
        let until = Instant::now() + if is_last { LAST_WAIT } else { Duration::ZERO };
        let mut sample = sample;
        while let Err(error) = questions.try_send(sample) {
            match error {
                TrySendError::Full(again) if Instant::now() < until => {
                    sample = again;
                    std::thread::sleep(Duration::from_millis(5));
                }
                TrySendError::Full(_) | TrySendError::Disconnected(_) => {
                    self.missed += 1;
                    return;
                }
            }
        }
    }

    fn refuse(&mut self, process: Traced, problem: Problem) {
        self.missed += 1;
        if self.refused.len() < MAX_REMEMBERED {
            self.refused.insert(process, problem);
        }
    }

    /// Has the reader that was not asked for the longest time end. Its place is free when it has.
    fn make_room(&mut self) {
        let open = self
            .readers
            .values_mut()
            .filter(|it| it.questions.is_some());
        let idle = open.min_by_key(|it| it.last_asked);
        if let Some(reader) = idle.filter(|reader| reader.last_asked.elapsed() > IDLE) {
            reader.questions = None;
        }
    }

    /// Starts a reader that is asked about `first` and about what waits, and returns it with its serial number. If that fails, these samples count
    /// as missed.
    fn start(
        &mut self,
        process: Traced,
        first: Option<Sample>,
        waiting: Receiver<Sample>,
    ) -> io::Result<(Child, u64)> {
        let pid = process.pid;
        self.started += 1;
        let serial = self.started;
        let (reports, _) = self.reports.get_or_insert_with(channel);
        let reports = reports.clone();
        let child = Command::new("/proc/self/exe")
            .args([COMMAND, &pid.to_string(), &process.started.to_string()])
            // Ctrl-C is for cwkill alone.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn();
        let mut child = child.inspect_err(|_| {
            self.missed += waiting.try_iter().chain(first.clone()).count();
        })?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(io::ErrorKind::BrokenPipe.into());
        };
        let ask = move || {
            let _ = reports.send(ask_all(
                (process, serial),
                first,
                waiting,
                input,
                output,
                &reports,
            ));
        };
        let thread = Builder::new().name(format!("symbols-{pid}")).spawn(ask);
        if let Err(error) = thread {
            end(&mut child);
            return Err(error);
        }
        Ok((child, serial))
    }

    /// Takes the answers that have come. Does not wait.
    pub fn collect(&mut self) {
        while let Some(report) = self.next(Duration::ZERO) {
            self.note(report);
        }
        self.ended
            .retain_mut(|child| matches!(child.try_wait(), Ok(None)));
    }

    /// As if a reader had answered that a socket was opened with this stack, or that its end was read with it.
    #[cfg(test)]
    pub fn answered(&mut self, process: Traced, cookie: u64, opens: bool, stack: Stack) {
        let answer = Answer {
            number: Some(0),
            stack: Some(stack),
            problems: BTreeSet::new(),
        };
        self.note(Report::Stack {
            reader: (process, 0),
            cookie,
            opens,
            answer,
        });
    }

    /// Waits for the last answers, but not for long.
    pub fn finish(&mut self) {
        for reader in self.readers.values_mut() {
            reader.questions = None;
        }
        let until = Instant::now() + PATIENCE;
        while !self.readers.is_empty() {
            let left = until.saturating_duration_since(Instant::now());
            match self.next(left) {
                Some(report) => self.note(report),
                None => break,
            }
        }
        for (process, mut reader) in self.readers.drain() {
            let stacks = self.processes.entry((process, reader.serial)).or_default();
            stacks.problems.insert(Problem::TooSlow);
            end(&mut reader.child);
        }
    }

    fn next(&self, at_most: Duration) -> Option<Report> {
        let (_, reports) = self.reports.as_ref()?;
        // Nobody closes it: `self` has a sender.
        reports.recv_timeout(at_most).ok()
    }

    fn note(&mut self, report: Report) {
        match report {
            Report::Stack {
                reader,
                cookie,
                opens,
                answer,
            } => {
                let number = answer.number;
                let is_kept = self.keep(reader, answer);
                match number {
                    Some(number) if is_kept && self.places.len() < MAX_PLACES => {
                        let id = StackId {
                            process: reader.0,
                            reader: reader.1,
                            number,
                        };
                        self.places.insert((cookie, opens), id);
                        if opens {
                            self.opened.push_back(cookie);
                        }
                    }
                    _ => self.missed += 1,
                }
                if self.opened.len() > MAX_OPENED
                    && let Some(oldest) = self.opened.pop_front()
                {
                    self.places.remove(&(oldest, true));
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
                // Perhaps the kernel was short of memory. At the second time the sample is to blame.
                let at = Some((sample.cookie, sample.opens));
                let known = self.readers.get(&reader.0);
                if known.is_none_or(|it| it.broke_off_at == at) {
                    self.missed += 1 + waiting.try_iter().count();
                    if self.given_up.len() < MAX_REMEMBERED {
                        self.given_up.insert(reader.0);
                    }
                    return self.note_end(reader, [Problem::Damaged].into());
                }
                let Ok((child, serial)) = self.start(reader.0, Some(sample), waiting) else {
                    return self.note_end(reader, [Problem::NotStarted].into());
                };
                if let Some(now) = self.readers.get_mut(&reader.0) {
                    (now.serial, now.broke_off_at) = (serial, at);
                    self.ended.push(std::mem::replace(&mut now.child, child));
                }
            }
            Report::End { reader, problems } => {
                let problems = problems.unwrap_or_else(|| [Problem::Damaged].into());
                self.note_end(reader, problems);
            }
        }
    }

    fn note_end(&mut self, reader: (Traced, u64), problems: BTreeSet<Problem>) {
        let stacks = self.processes.entry(reader).or_default();
        stacks.problems.extend(problems);
        if let Some(mut reader) = self.readers.remove(&reader.0) {
            end(&mut reader.child);
            self.ended.push(reader.child);
        }
        self.forget_unused();
    }

    /// Returns whether the stack of this number is known now: further ones are not kept if those of all processes take too much memory.
    fn keep(&mut self, reader: (Traced, u64), answer: Answer) -> bool {
        let stacks = self.processes.entry(reader).or_default();
        stacks.problems.extend(answer.problems);
        let Some(number) = answer.number else {
            return false;
        };
        if let Some(stack) = answer.stack
            && self.bytes < MAX_BYTES
        {
            let bytes = stack.bytes();
            let before = stacks.stacks.insert(number, stack);
            let freed = before.map_or(0, |stack| stack.bytes());
            stacks.bytes = stacks.bytes + bytes - freed;
            self.bytes = self.bytes + bytes - freed;
        }
        stacks.stacks.contains_key(&number)
    }

    /// Forgets processes whose stacks no place names, if many are remembered.
    fn forget_unused(&mut self) {
        if self.processes.len() > MAX_REMEMBERED {
            let used: HashSet<_> = self
                .places
                .values()
                .map(|id| (id.process, id.reader))
                .collect();
            let readers = &self.readers;
            self.processes
                .retain(|key, _| used.contains(key) || readers.contains_key(&key.0));
            self.bytes = self.processes.values().map(|stacks| stacks.bytes).sum();
        }
    }

    /// The stack with which this socket was opened, or with which its end was read.
    pub fn place(&self, cookie: u64, opens: bool) -> Option<StackId> {
        self.places.get(&(cookie, opens)).copied()
    }

    pub fn stack(&self, id: StackId) -> Option<&Stack> {
        let stack = self
            .processes
            .get(&(id.process, id.reader))?
            .stacks
            .get(&id.number)?;
        (!stack.frames.is_empty()).then_some(stack)
    }

    /// What keeps the stacks of a process from telling more.
    pub fn problems(&self) -> BTreeSet<(Traced, Problem)> {
        let of_readers = self.processes.iter().flat_map(|((process, _), stacks)| {
            let problems = stacks.problems.iter();
            problems.map(|problem| (*process, *problem))
        });
        let refused = self
            .refused
            .iter()
            .map(|(process, problem)| (*process, *problem));
        of_readers.chain(refused).collect()
    }
}

impl Drop for Symbols {
    fn drop(&mut self) {
        for reader in self.readers.values_mut() {
            end(&mut reader.child);
        }
    }
}

/// Ends a process that reads symbols. One that waits for a file system that hangs ends when that does.
fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = child.try_wait();
}

/// Asks about each sample, and reports the answers. Returns the last report.
fn ask_all(
    reader: (Traced, u64),
    first: Option<Sample>,
    waiting: Receiver<Sample>,
    mut input: ChildStdin,
    output: ChildStdout,
    reports: &Sender<Report>,
) -> Report {
    let mut output = BufReader::new(output);
    for sample in first.into_iter().chain(waiting.iter()) {
        let question = Question {
            ip: sample.ip,
            sp: sample.sp,
            fp: sample.fp,
            lr: sample.lr,
            is_own_call: sample.is_own_call,
            stack: sample.stack.clone(),
        };
        let written = question.write(&mut input).ok();
        let Some(answer) = written.and_then(|()| read_line(&mut output)) else {
            return Report::BrokeOff {
                reader,
                sample,
                waiting,
            };
        };
        let _ = reports.send(Report::Stack {
            reader,
            cookie: sample.cookie,
            opens: sample.opens,
            answer,
        });
    }
    drop(input);
    loop {
        let problems = match read_line(&mut output) {
            Some(LastWord::Again(answer)) => {
                let _ = reports.send(Report::Again { reader, answer });
                continue;
            }
            Some(LastWord::End(problems)) => Some(problems),
            None => None,
        };
        return Report::End { reader, problems };
    }
}

#[cfg(test)]
#[path = "symbols_tests.rs"]
pub mod tests;
