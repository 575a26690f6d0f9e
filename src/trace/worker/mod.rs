//! The process that reads the symbols of one traced process.
//!
//! Files of a traced process may be damaged, huge, hostile, or on a file system that hangs. So a process of its own reads them, with
//! little memory, little time and few rights. Whatever becomes of it, cwkill goes on without these names.

#[cfg(fuzzing)]
pub mod fuzzing;
mod memory;
mod module;
mod names;
mod perf_map;
mod rules;
mod unwind;

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};

use caps::Capability;
use nix::sys::resource::{RLIM_INFINITY, Resource, UsageWho, getrusage, setrlimit};

use super::origin::Runtime;
use super::problem::Problem;
use super::protocol::{Answer, LastWord, write_line};
use super::stack::{End, Frame, Stack};
use crate::bpf::tracer::Thread;
use crate::privileges::capabilities;
use memory::{CodeSource, Memory};
use module::{Root, open};
use names::Names;
use perf_map::PerfMap;
use unwind::Unwinder;

/// What it needs to read the files of a process of another user; the last one is for /proc/PID/map_files (fs/proc/base.c,
/// proc_map_files_get_link).
pub const CAPABILITIES: [Capability; 3] = [
    Capability::CAP_SYS_PTRACE,
    Capability::CAP_DAC_READ_SEARCH,
    Capability::CAP_CHECKPOINT_RESTORE,
];

/// Bytes of memory for unwind information and symbols of one process. Symbol files are mapped, which does not count.
const MAX_MEMORY: u64 = 1 << 30;
/// Seconds of processor time for one answer, and for all; and of which part of the time that passes it has some more.
const MAX_CPU: u64 = 20;
const MAX_CPU_OF_ALL: u64 = 120;
const CPU_PART: u64 = 10;
/// Who traces a sick host must not make it worse: other processes come first, and the kernel ends this one first if memory is short. With a lower
/// priority the last answers come too late on a busy host [at 19, a test with a JVM failed beside a build].
const NICE: i32 = 5;
const OOM_SCORE_ADJ: &str = "1000";
/// Frames of a stack, with the inlined ones.
const MAX_FRAMES: usize = 256;
/// Bytes of a stack with its names. Only those of hostile files are so long.
const MAX_STACK: usize = 128 << 10;
/// Different stacks of a process. Of further ones nothing is known.
const MAX_STACKS: usize = 10_000;
/// The memory map is read again for an unknown address, at most so often.
const REFRESH: Duration = Duration::from_secs(1);

/// The whole life of the process: it answers the questions on standard input until there are no more.
///
/// # Errors
/// What cannot be read or written. A problem with the traced process is an answer.
pub fn serve(pid: i32, started: u64) -> io::Result<()> {
    let begun = Instant::now();
    limit();
    limit_time(begun);
    let mut traced = TracedProcess::open(pid, started);
    let (mut questions, mut answers) = (io::stdin().lock(), io::stdout().lock());
    while let Some(question) = Thread::read(&mut questions)? {
        limit_time(begun);
        let answer = match &mut traced {
            Ok(traced) => traced.answer(&question),
            Err(problem) => Answer::unknown([*problem].into()),
        };
        write_line(&mut answers, &answer)?;
    }
    let problems = match traced {
        Ok(traced) => traced.finish(|answer| write_line(&mut answers, &LastWord::Again(answer)))?,
        Err(problem) => [problem].into(),
    };
    write_line(&mut answers, &LastWord::End(problems))
}

/// Gives up what it does not need. Where the kernel refuses that, it goes on with more rights, or without a limit.
fn limit() {
    let _ = capabilities::drop_all_but(&CAPABILITIES.into());
    let _ = setrlimit(Resource::RLIMIT_DATA, MAX_MEMORY, MAX_MEMORY);
    let _ = setrlimit(Resource::RLIMIT_CORE, 0, 0);
    let _ = rustix::process::nice(NICE);
    let _ = fs::write("/proc/self/oom_score_adj", OOM_SCORE_ADJ);
}

/// What a file may cost: the time of one answer. The kernel ends the process at its limit.
fn limit_time(begun: Instant) {
    let Ok(used) = getrusage(UsageWho::RUSAGE_SELF) else {
        return;
    };
    let used = used.user_time().tv_sec() + used.system_time().tv_sec();
    let used = u64::try_from(used).unwrap_or_default();
    let of_all = MAX_CPU_OF_ALL + begun.elapsed().as_secs() / CPU_PART;
    let most = (used + MAX_CPU).min(of_all);
    let _ = setrlimit(Resource::RLIMIT_CPU, most, RLIM_INFINITY);
}

/// The traced process.
struct TracedProcess {
    pid: i32,
    /// The file that it runs, by device and inode.
    program: Option<(u64, u64)>,
    memory: Memory,
    read_at: Instant,
    unwinder: Unwinder,
    names: Names,
    /// The stacks that were answered, by their addresses.
    known: HashMap<Vec<u64>, Known>,
    /// The number of stacks that were answered before `known` was emptied.
    before: usize,
    /// Those that no answer has told yet.
    problems: BTreeSet<Problem>,
}

impl TracedProcess {
    fn open(pid: i32, started: u64) -> Result<Self, Problem> {
        let memory = Memory::read(pid).map_err(|error| match error.kind() {
            io::ErrorKind::PermissionDenied => Problem::Refused,
            io::ErrorKind::NotFound => Problem::Ended,
            _ if error.raw_os_error() == Some(libc::ESRCH) => Problem::Ended,
            _ => Problem::Unreadable,
        })?;
        // Another process may have the pid now.
        if started_at(pid) != Some(in_ticks(started)) {
            return Err(Problem::Ended);
        }
        // A process that ends has no memory any more.
        if memory.end() == 0 {
            return Err(Problem::Ended);
        }
        let (runtime, is_32_bit) = about_program(pid, memory.runtime());
        if is_32_bit {
            return Err(Problem::ThirtyTwoBits);
        }
        memory.open_files();
        Ok(TracedProcess {
            pid,
            program: program(pid),
            memory,
            read_at: Instant::now(),
            unwinder: Unwinder::default(),
            names: Names::new(runtime, read_perf_map(pid)),
            known: HashMap::new(),
            before: 0,
            problems: BTreeSet::new(),
        })
    }

    fn answer(&mut self, question: &Thread) -> Answer {
        let (number, stack) = match self.number(question) {
            Ok((number, stack)) => (Some(number), stack),
            Err(problem) => {
                self.problems.insert(problem);
                (None, None)
            }
        };
        Answer {
            number,
            stack,
            problems: std::mem::take(&mut self.problems),
        }
    }

    /// The number of the stack, and the stack if it is new.
    fn number(&mut self, question: &Thread) -> Result<(usize, Option<Stack>), Problem> {
        if !question.is_own_call {
            return Err(Problem::Asynchronous);
        }
        if program(self.pid) != self.program {
            self.read_again();
        }
        let (mut addresses, mut end) = self.unwinder.unwind(question, &self.memory);
        let is_known = |address: &u64| self.memory.at(*address).is_some();
        if !addresses.iter().all(is_known) && self.read_at.elapsed() > REFRESH {
            // A library was loaded meanwhile, or code was made.
            self.read_again();
            (addresses, end) = self.unwinder.unwind(question, &self.memory);
        }
        let next = self.before + self.known.len();
        if let Some(known) = self.known.get(&addresses) {
            return Ok((known.number, None));
        }
        if next >= MAX_STACKS {
            return Err(Problem::TooManyStacks);
        }
        let stack = self.stack(&addresses, end);
        self.note_problems(&addresses, &stack);
        self.known.insert(addresses, Known { number: next, end });
        Ok((next, Some(stack)))
    }

    /// Reads again which code is where. If the process has ended, what was read stays.
    fn read_again(&mut self) {
        self.read_at = Instant::now();
        let program = program(self.pid);
        let runs_another = program.is_some() && program != self.program;
        let memory = match runs_another {
            true => Memory::read(self.pid),
            false => self.memory.read_again(),
        };
        let Some(memory) = memory.ok().filter(|memory| memory.end() != 0) else {
            return;
        };
        if !memory.has_all_files_of(&self.memory) {
            // An address may be of other code now. The numbers go on.
            self.unwinder = Unwinder::default();
            self.before += self.known.len();
            self.known.clear();
        }
        self.memory = memory;
        if runs_another {
            self.program = program;
            self.memory.open_files();
            let (runtime, _) = about_program(self.pid, self.memory.runtime());
            self.names = Names::new(runtime, read_perf_map(self.pid));
        }
    }

    fn stack(&self, addresses: &[u64], end: End) -> Stack {
        let frames = addresses.iter();
        let frames = frames.flat_map(|&address| self.names.frames(address, &self.memory));
        let mut bytes = 0;
        let fits = |frame: &Frame| {
            bytes += frame.bytes();
            bytes <= MAX_STACK
        };
        let frames: Vec<Frame> = frames.take(MAX_FRAMES).take_while(fits).collect();
        // A chain of frame pointers also ends where code without them begins.
        let is_named = frames.last().is_some_and(|last| last.function.is_some());
        let end = match end {
            End::Whole if frames.len() == MAX_FRAMES || bytes > MAX_STACK => End::Cut,
            End::Whole if !is_named && self.names.runtime.is_some() => End::Lost,
            end => end,
        };
        Stack { frames, end }
    }

    fn note_problems(&mut self, addresses: &[u64], stack: &Stack) {
        let is_gone = |address: &u64| match self.memory.at(*address).map(|code| (code, &code.from))
        {
            Some((code, CodeSource::File(file))) => self.memory.module(code, file).is_none(),
            _ => false,
        };
        let has_names = stack.frames.iter().any(|frame| frame.function.is_some());
        if addresses.iter().any(is_gone) {
            self.problems.insert(match program(self.pid) {
                Some(_) => Problem::FileGone,
                None => Problem::Ended,
            });
        } else if self.unwinder.is_damaged || self.names.are_damaged() {
            self.problems.insert(Problem::Damaged);
        } else if !has_names && self.names.runtime.is_none() {
            self.problems.insert(Problem::NoSymbols);
        }
    }

    /// A virtual machine may have written its names only now. `again` gets the stacks that have names by them. Returns the problems.
    fn finish(
        mut self,
        mut again: impl FnMut(Answer) -> io::Result<()>,
    ) -> io::Result<BTreeSet<Problem>> {
        self.names.perf_map = read_perf_map(self.pid).or(self.names.perf_map.take());
        let has_map = self.names.perf_map.is_some();
        let problem = match self.names.runtime {
            Some(Runtime::Java) if !has_map => Some(Problem::NoPerfMap),
            Some(Runtime::Python(major, minor)) if !has_map => {
                Some(match (major, minor) >= (3, 12) {
                    true => Problem::PythonWithoutPerf,
                    false => Problem::OldPython,
                })
            }
            Some(Runtime::Node) => Some(Problem::Node),
            _ => None,
        };
        self.problems.extend(problem);
        let is_of_run_time = |address: &u64| {
            let code = self.memory.at(*address);
            code.is_some_and(|code| code.from == CodeSource::RunTime)
        };
        for (addresses, known) in &self.known {
            if has_map && addresses.iter().any(is_of_run_time) {
                again(Answer {
                    number: Some(known.number),
                    stack: Some(self.stack(addresses, known.end)),
                    problems: BTreeSet::new(),
                })?;
            }
        }
        Ok(self.problems)
    }
}

/// The device and inode of the file that a process runs. A program that it starts in its own place has another one.
fn program(pid: i32) -> Option<(u64, u64)> {
    let metadata = fs::metadata(format!("/proc/{pid}/exe")).ok()?;
    Some((metadata.dev(), metadata.ino()))
}

/// A stack that was answered.
#[derive(Clone, Copy)]
struct Known {
    number: usize,
    end: End,
}

/// When a process was started, in clock ticks since boot.
fn started_at(pid: i32) -> Option<u64> {
    let process = procfs::process::Process::new(pid).ok()?;
    Some(process.stat().ok()?.starttime)
}

/// Nanoseconds in clock ticks, as /proc/PID/stat has them (fs/proc/array.c, do_task_stat).
fn in_ticks(nanoseconds: u64) -> u64 {
    nanoseconds / (1_000_000_000 / procfs::ticks_per_second())
}

/// The runtime, if the program itself tells it, and whether it has 32 bits.
fn about_program(pid: i32, known: Option<Runtime>) -> (Option<Runtime>, bool) {
    use object::Object;
    let path = format!("/proc/{pid}/exe");
    let Ok(file) = open(Path::new(&path)) else {
        return (known, false);
    };
    let cache = object::read::ReadCache::new(file);
    let Ok(program) = object::File::parse(&cache) else {
        return (known, false);
    };
    let is_go = program.section_by_name(".go.buildinfo").is_some();
    let runtime = known.or(is_go.then_some(Runtime::Go));
    (runtime, !program.is_64())
}

/// The names of code that the process makes at run time, if it has written them down.
fn read_perf_map(pid: i32) -> Option<PerfMap> {
    let status = procfs::process::Process::new(pid).ok()?.status().ok()?;
    // The number that the process knows itself by.
    let own = status.nspid.and_then(|pids| pids.last().copied());
    let own = own.unwrap_or(pid);
    let user = fs::metadata(format!("/proc/{pid}")).ok()?.uid();
    let name = format!("/tmp/perf-{own}.map");
    let file = Root::of(pid).ok()?.open_itself(Path::new(&name)).ok()?;
    PerfMap::read(&file, user).ok()
}
