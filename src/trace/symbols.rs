//! The processes that read symbols, one for each traced process, and what they have answered.
//!
//! A thread for each asks and waits, so that one that hangs holds nobody up. What a process does not answer in time is not known.

use std::collections::{BTreeSet, HashMap};
use std::ffi::OsString;
use std::io::{self, BufRead, BufReader};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, SyncSender, TrySendError, channel, sync_channel};
use std::thread::Builder;
use std::time::{Duration, Instant};

use super::problem::Problem;
use super::protocol::{Answer, LastWords, Question};
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
/// Sockets whose place is kept in memory: 40 MB.
const MAX_PLACES: usize = 1 << 20;

/// The hidden command of cwkill that is such a process.
pub const COMMAND: &str = "trace-symbols";

/// The stacks of a process, and what keeps them from telling more.
#[derive(Debug, Default)]
pub struct Stacks {
    /// By their numbers.
    pub stacks: HashMap<usize, Stack>,
    pub problems: BTreeSet<Problem>,
}

/// Where a socket was opened or its end was read: a stack of a process, by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StackId {
    pub process: Traced,
    pub number: usize,
}

/// What was found out about stacks so far.
#[derive(Debug, Default)]
pub struct Symbols {
    readers: HashMap<Traced, Reader>,
    reports: Option<(Sender<Report>, Receiver<Report>)>,
    processes: HashMap<Traced, Stacks>,
    /// By the cookie, and whether it was opened there.
    places: HashMap<(u64, bool), StackId>,
    /// Samples that no reader could take.
    pub missed: usize,
}

#[derive(Debug)]
struct Reader {
    /// `None` after the last question.
    questions: Option<SyncSender<Sample>>,
    child: Child,
    last_asked: Instant,
}

/// What a reader's thread reports.
#[derive(Debug)]
enum Report {
    Stack {
        process: Traced,
        cookie: u64,
        opens: bool,
        answer: Answer,
    },
    /// The reader has no more to say. `None`: it broke off.
    End {
        process: Traced,
        last: Option<LastWords>,
    },
}

impl Symbols {
    /// Gives a sample to the reader for its process. Does not wait.
    pub fn read(&mut self, sample: Sample) {
        let process = sample.process;
        if !self.readers.contains_key(&process) {
            let most = if sample.opens {
                MAX_OPENING
            } else {
                MAX_PROCESSES
            };
            if self.readers.len() >= most {
                self.make_room();
                let stacks = self.processes.entry(process).or_default();
                stacks.problems.insert(Problem::TooManyProcesses);
                self.missed += 1;
                return;
            }
            match self.start(process) {
                Ok(reader) => drop(self.readers.insert(process, reader)),
                Err(_) => {
                    self.missed += 1;
                    return;
                }
            }
        }
        let Some(reader) = self.readers.get_mut(&process) else {
            return;
        };
        reader.last_asked = Instant::now();
        let questions = reader.questions.as_ref();
        match questions.map(|questions| questions.try_send(sample)) {
            Some(Ok(())) => {}
            Some(Err(TrySendError::Full(_) | TrySendError::Disconnected(_))) | None => {
                self.missed += 1;
            }
        }
    }

    /// Has the reader that was not asked for the longest time end. Its place is free when it has.
    fn make_room(&mut self) {
        let idle = self.readers.values_mut().min_by_key(|it| it.last_asked);
        if let Some(reader) = idle.filter(|reader| reader.last_asked.elapsed() > IDLE) {
            reader.questions = None;
        }
    }

    fn start(&mut self, process: Traced) -> io::Result<Reader> {
        let pid = process.pid;
        let (reports, _) = self.reports.get_or_insert_with(channel);
        let reports = reports.clone();
        let mut child = Command::new("/proc/self/exe")
            .args([OsString::from(COMMAND), pid.to_string().into()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(io::ErrorKind::BrokenPipe.into());
        };
        let (questions, waiting) = sync_channel(MAX_WAITING);
        let ask = move || ask_all(process, &waiting, input, output, &reports);
        let thread = Builder::new().name(format!("symbols-{pid}")).spawn(ask);
        if let Err(error) = thread {
            end(&mut child);
            return Err(error);
        }
        Ok(Reader {
            questions: Some(questions),
            child,
            last_asked: Instant::now(),
        })
    }

    /// Takes the answers that have come. Does not wait.
    pub fn collect(&mut self) {
        while let Some(report) = self.next(Duration::ZERO) {
            self.note(report);
        }
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
            let stacks = self.processes.entry(process).or_default();
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
                process,
                cookie,
                opens,
                answer,
            } => {
                let number = answer.number;
                self.processes.entry(process).or_default().note(answer);
                match number {
                    Some(number) if self.places.len() < MAX_PLACES => {
                        let id = StackId { process, number };
                        self.places.insert((cookie, opens), id);
                    }
                    _ => self.missed += 1,
                }
            }
            Report::End { process, last } => {
                let stacks = self.processes.entry(process).or_default();
                match last {
                    Some(last) => {
                        last.again.into_iter().for_each(|it| stacks.note(it));
                        stacks.problems.extend(last.problems);
                    }
                    None => drop(stacks.problems.insert(Problem::Damaged)),
                }
                if let Some(mut reader) = self.readers.remove(&process) {
                    end(&mut reader.child);
                }
            }
        }
    }

    /// The stack with which this socket was opened, or with which its end was read.
    pub fn place(&self, cookie: u64, opens: bool) -> Option<StackId> {
        self.places.get(&(cookie, opens)).copied()
    }

    pub fn stack(&self, id: StackId) -> Option<&Stack> {
        let stack = self.processes.get(&id.process)?.stacks.get(&id.number)?;
        (!stack.frames.is_empty()).then_some(stack)
    }

    /// What keeps the stacks of a process from telling more.
    pub fn problems(&self) -> impl Iterator<Item = (Traced, Problem)> + '_ {
        let processes = self.processes.iter();
        processes.flat_map(|(process, stacks)| {
            let problems = stacks.problems.iter();
            problems.map(|problem| (*process, *problem))
        })
    }
}

impl Drop for Symbols {
    fn drop(&mut self) {
        for reader in self.readers.values_mut() {
            end(&mut reader.child);
        }
    }
}

impl Stacks {
    fn note(&mut self, answer: Answer) {
        if let (Some(number), Some(stack)) = (answer.number, answer.stack) {
            self.stacks.insert(number, stack);
        }
    }
}

/// Ends a process that reads symbols. One that waits for a file system that hangs ends when that does.
fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = child.try_wait();
}

/// Asks about each sample, and reports the answers.
fn ask_all(
    process: Traced,
    waiting: &Receiver<Sample>,
    mut input: ChildStdin,
    output: ChildStdout,
    reports: &Sender<Report>,
) {
    let mut lines = BufReader::new(output).lines();
    let mut next_line = || lines.next()?.ok();
    for sample in waiting {
        let question = Question {
            ip: sample.ip,
            sp: sample.sp,
            fp: sample.fp,
            lr: sample.lr,
            stack: sample.stack,
        };
        let answer = question.write(&mut input).ok();
        let answer = answer.and_then(|()| next_line());
        let answer = answer.and_then(|line| serde_json::from_str(&line).ok());
        let Some(answer) = answer else {
            let _ = reports.send(Report::End {
                process,
                last: None,
            });
            return;
        };
        let sent = reports.send(Report::Stack {
            process,
            cookie: sample.cookie,
            opens: sample.opens,
            answer,
        });
        if sent.is_err() {
            return;
        }
    }
    drop(input);
    let last = next_line().and_then(|line| serde_json::from_str(&line).ok());
    let _ = reports.send(Report::End { process, last });
}
