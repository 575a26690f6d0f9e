//! The processes that read symbols: one for each traced process.
//!
//! A thread for each asks and waits, so that one that hangs holds nobody up. What a process does not answer in time is not known.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::io::{self, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread::Builder;
use std::time::{Duration, Instant};

use super::problem::Problem;
use super::protocol::{Answer, LastWord, read_line};
use crate::bpf::tracer::{Sample, Traced};

/// Readers at a time. Each takes a process and a thread.
const MAX_READERS: usize = 32;
/// The sample of an opening starts a reader only while fewer than these run: many such processes soon end.
const MAX_FOR_OPENINGS: usize = MAX_READERS / 2;
/// When no further reader may run, the one that was not asked for the longest time ends, if that is longer ago than this.
const IDLE: Duration = Duration::from_secs(1);
/// Then one that owes an answer or its last words for so long is killed, too: a file system may hang.
const LATE: Duration = Duration::from_secs(60);
/// Samples that wait for one of them: 4 MiB of it, and 128 MiB of all.
const MAX_WAITING: usize = 256;
/// Reports that wait for cwkill. The threads wait then. Each has 128 KiB at most, see `worker`.
const MAX_REPORTS: usize = 1024;
/// Processes that are given up are remembered up to this number.
const MAX_GIVEN_UP: usize = 4096;
/// How often a reader that was killed is started again within this time.
const MAX_RESTARTS: usize = 3;
const RESTARTS_COUNT: Duration = Duration::from_secs(600);

/// The hidden command of cwkill that is such a process.
pub const COMMAND: &str = "trace-symbols";

/// A reader. A later one for the same process has another number, and numbers its stacks anew.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ReaderId {
    pub process: Traced,
    pub(super) serial: u64,
}

/// What a reader's thread reports.
#[derive(Debug)]
pub enum Report {
    Stack {
        reader: ReaderId,
        cookie: u64,
        opens: bool,
        answer: Answer,
    },
    /// More is known of a stack.
    Again { reader: ReaderId, answer: Answer },
    /// The reader broke off at this sample. Those after it wait still.
    BrokeOff {
        reader: ReaderId,
        sample: Sample,
        waiting: Receiver<Sample>,
    },
    /// The reader has no more to say but what keeps stacks from telling more. `None`: it broke off.
    Ended {
        reader: ReaderId,
        problems: Option<BTreeSet<Problem>>,
    },
}

/// Why a reader does not take a sample.
#[derive(Debug)]
pub enum NotAsked {
    /// Too many samples wait for it. This one may be tried again.
    Full(Sample),
    /// The process has no reader, and gets none for this sample.
    Refused(Problem),
    /// Its reader has ended, or is about to.
    Ended,
}

#[derive(Debug)]
struct Reader {
    id: ReaderId,
    /// `None` after the last question.
    questions: Option<SyncSender<Sample>>,
    /// When that was.
    closed: Instant,
    child: Child,
    /// Whether it was asked about an end that was read.
    has_read: bool,
    last_asked: Instant,
    /// Questions without an answer.
    owed: usize,
    /// When it answered, or when it was asked and owed nothing.
    last_answer: Instant,
    /// The sample at which the one before it broke off: the cookie, and whether it opens.
    broke_off_at: Option<(u64, bool)>,
    restarts: usize,
    last_start: Instant,
}

/// The readers that run.
#[derive(Debug, Default)]
pub struct Readers {
    running: HashMap<Traced, Reader>,
    reports: Option<(SyncSender<Report>, Receiver<Report>)>,
    /// Processes that get no reader any more: a sample of theirs has ended two, or theirs did not answer.
    given_up: HashSet<Traced>,
    /// The number of readers that were started.
    started: u64,
    /// Those that did not answer in time.
    pub late: HashSet<ReaderId>,
    /// Readers that have ended, or will.
    ended: Vec<Child>,
}

impl Readers {
    /// Gives a sample to the reader for its process. Does not wait.
    ///
    /// # Errors
    /// Why it was not given.
    pub fn ask(&mut self, sample: Sample) -> Result<(), NotAsked> {
        let process = sample.process;
        if self.given_up.contains(&process) {
            return Err(NotAsked::Ended);
        }
        if !self.running.contains_key(&process) {
            self.add(process, sample.opens).map_err(NotAsked::Refused)?;
        }
        let reader = self.running.get_mut(&process).ok_or(NotAsked::Ended)?;
        let now = Instant::now();
        reader.last_asked = now;
        reader.has_read |= !sample.opens;
        let questions = reader.questions.as_ref().ok_or(NotAsked::Ended)?;
        questions.try_send(sample).map_err(|error| match error {
            TrySendError::Full(sample) => NotAsked::Full(sample),
            TrySendError::Disconnected(_) => NotAsked::Ended,
        })?;
        if reader.owed == 0 {
            reader.last_answer = now;
        }
        reader.owed += 1;
        Ok(())
    }

    /// Starts the first reader for a process. `opens`: for the sample of an opening.
    fn add(&mut self, process: Traced, opens: bool) -> Result<(), Problem> {
        let most = match opens {
            true => MAX_FOR_OPENINGS,
            false => MAX_READERS,
        };
        if self.running.len() >= most {
            self.make_room(opens);
            return Err(Problem::TooManyProcesses);
        }
        let (questions, waiting) = sync_channel(MAX_WAITING);
        let started = self.start(process, None, waiting);
        let (child, id) = started.map_err(|_| Problem::NotStarted)?;
        let now = Instant::now();
        let reader = Reader {
            id,
            questions: Some(questions),
            closed: now,
            child,
            has_read: false,
            last_asked: now,
            owed: 0,
            last_answer: now,
            broke_off_at: None,
            restarts: 0,
            last_start: now,
        };
        self.running.insert(process, reader);
        Ok(())
    }

    /// Kills the readers that do not answer, and has the one that was not asked for the longest time end. Its room is free when it has. An
    /// opening does not take the room of one that knows of reads.
    fn make_room(&mut self, opens: bool) {
        let is_late = |it: &Reader| match it.questions {
            Some(_) => it.owed > 0 && it.last_answer.elapsed() > LATE,
            None => it.last_answer.max(it.closed).elapsed() > LATE,
        };
        for (process, mut reader) in self.running.extract_if(|_, reader| is_late(reader)) {
            end(&mut reader.child);
            self.ended.push(reader.child);
            self.late.insert(reader.id);
            give_up(&mut self.given_up, process);
        }
        let open = self.running.values_mut();
        let open = open.filter(|it| it.questions.is_some() && !(opens && it.has_read));
        let idle = open.min_by_key(|it| it.last_asked);
        if let Some(reader) = idle.filter(|reader| reader.last_asked.elapsed() > IDLE) {
            reader.questions = None;
            reader.closed = Instant::now();
        }
    }

    /// Starts a reader that is asked about `first` and about what waits.
    fn start(
        &mut self,
        process: Traced,
        first: Option<Sample>,
        waiting: Receiver<Sample>,
    ) -> io::Result<(Child, ReaderId)> {
        self.started += 1;
        let id = ReaderId {
            process,
            serial: self.started,
        };
        let (reports, _) = self
            .reports
            .get_or_insert_with(|| sync_channel(MAX_REPORTS));
        let reports = reports.clone();
        let pid = process.pid;
        let mut child = Command::new("/proc/self/exe")
            .args([COMMAND, &pid.to_string(), &process.started.to_string()])
            // Ctrl-C is for cwkill alone.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(io::ErrorKind::BrokenPipe.into());
        };
        let ask = move || {
            let _ = reports.send(ask_all(id, first, waiting, input, output, &reports));
        };
        let thread = Builder::new().name(format!("symbols-{pid}")).spawn(ask);
        if let Err(error) = thread {
            end(&mut child);
            self.ended.push(child);
            return Err(error);
        }
        Ok((child, id))
    }

    /// The next report.
    pub fn next(&self, at_most: Duration) -> Option<Report> {
        let (_, reports) = self.reports.as_ref()?;
        // Nobody closes it: `self` has a sender.
        reports.recv_timeout(at_most).ok()
    }

    pub fn note_answer(&mut self, id: ReaderId) {
        if let Some(reader) = self.of(id) {
            reader.owed = reader.owed.saturating_sub(1);
            reader.last_answer = Instant::now();
        }
    }

    /// Starts a reader again that broke off at this sample. If that is in vain, returns how many samples are lost, and why.
    pub fn restart(
        &mut self,
        id: ReaderId,
        sample: Sample,
        waiting: Receiver<Sample>,
    ) -> Result<(), (usize, Problem)> {
        let lost = |waiting: Receiver<Sample>| 1 + waiting.try_iter().count();
        if self.late.contains(&id) {
            return Err((lost(waiting), Problem::TooSlow));
        }
        // Perhaps the kernel was short of memory. At the second time the sample is to blame.
        let at = Some((sample.cookie, sample.opens));
        let restarts = self.of(id).filter(|it| it.broke_off_at != at).map(|it| {
            let is_long_ago = it.last_start.elapsed() > RESTARTS_COUNT;
            (if is_long_ago { 0 } else { it.restarts }, it.owed)
        });
        let Some((restarts, owed)) = restarts.filter(|(restarts, _)| *restarts < MAX_RESTARTS)
        else {
            give_up(&mut self.given_up, id.process);
            return Err((lost(waiting), Problem::Damaged));
        };
        let started = self.start(id.process, Some(sample), waiting);
        let (child, next) = started.map_err(|_| (owed, Problem::NotStarted))?;
        if let Some(reader) = self.of(id) {
            (reader.id, reader.broke_off_at, reader.restarts) = (next, at, restarts + 1);
            reader.last_start = Instant::now();
            reader.last_answer = reader.last_start;
            let before = std::mem::replace(&mut reader.child, child);
            self.ended.push(before);
        }
        Ok(())
    }

    /// The reader has ended.
    pub fn remove(&mut self, id: ReaderId) {
        if self.of(id).is_some()
            && let Some(mut reader) = self.running.remove(&id.process)
        {
            end(&mut reader.child);
            self.ended.push(reader.child);
        }
    }

    fn of(&mut self, id: ReaderId) -> Option<&mut Reader> {
        let reader = self.running.get_mut(&id.process);
        reader.filter(|reader| reader.id == id)
    }

    /// Whether this process has a reader.
    pub fn has(&self, process: Traced) -> bool {
        self.running.contains_key(&process)
    }

    pub fn is_empty(&self) -> bool {
        self.running.is_empty()
    }

    /// No more questions come. Each says its last words.
    pub fn ask_no_more(&mut self) {
        for reader in self.running.values_mut() {
            reader.questions = None;
        }
    }

    /// Kills those that have not ended.
    pub fn end_late_ones(&mut self) {
        for (_, mut reader) in self.running.drain() {
            self.late.insert(reader.id);
            end(&mut reader.child);
        }
    }

    /// Waits for those that have ended.
    pub fn reap(&mut self) {
        self.ended
            .retain_mut(|child| matches!(child.try_wait(), Ok(None)));
    }
}

impl Drop for Readers {
    fn drop(&mut self) {
        for reader in self.running.values_mut() {
            end(&mut reader.child);
        }
    }
}

fn give_up(given_up: &mut HashSet<Traced>, process: Traced) {
    if given_up.len() < MAX_GIVEN_UP {
        given_up.insert(process);
    }
}

/// Ends a process that reads symbols. One that waits for a file system that hangs ends when that does.
fn end(child: &mut Child) {
    let _ = child.kill();
    let _ = child.try_wait();
}

/// Asks about each sample, and reports the answers. Returns the last report.
fn ask_all(
    reader: ReaderId,
    first: Option<Sample>,
    waiting: Receiver<Sample>,
    mut input: ChildStdin,
    output: ChildStdout,
    reports: &SyncSender<Report>,
) -> Report {
    let mut output = BufReader::new(output);
    for sample in first.into_iter().chain(waiting.iter()) {
        let written = sample.thread.write(&mut input).ok();
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
        return Report::Ended { reader, problems };
    }
}
