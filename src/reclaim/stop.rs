//! Stopping every thread of a process, and letting all of them go again.
//!
//! Threads are seized (PTRACE_SEIZE), which changes nothing for them, and interrupted, which no signal handler
//! sees. A thread may stop for a signal that was on its way: it is held with it, and goes on with it. A
//! process that was stopped (SIGSTOP) is stopped again when it is let go: the kernel sees to it
//! (kernel/ptrace.c, __ptrace_unlink).
//!
//! All of it is done by one thread of ours that ends right after ([`super::act`]). With it end all its
//! traces, whatever state they are in: that is what releases a thread that never came to its stop.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::arch::Registers;
use crate::proc::ProcFs;
use crate::sys::{self, Waiting};

/// include/uapi/linux/ptrace.h: the stop of a thread that was interrupted.
const EVENT_STOP: i32 = 128;
/// The stop at a system call, with PTRACE_O_TRACESYSGOOD.
const CALL_STOP: i32 = libc::SIGTRAP | 0x80;

/// Listings without a new thread, one after the other, before all are taken to be known.
const EMPTY_LISTINGS: u32 = 2;

/// Time between two looks at a thread that is expected to stop.
const LOOK_AGAIN: Duration = Duration::from_micros(20);
/// How often a thread is looked at before we sleep between two looks.
const LOOKS: u32 = 50;

/// Where a thread of the owner is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Not told to stop.
    Seized,
    /// Told to stop, and not there yet.
    Moving,
    /// Stopped, with nothing to pass on.
    Stopped,
    /// Stopped at the beginning or the end of a system call.
    AtCall,
    /// Stopped for this signal, which it gets when it goes on.
    Signal(i32),
    /// Gone.
    Ended,
}

/// A thread of the owner.
#[derive(Debug)]
pub struct Thread {
    /// Its number.
    pub tid: i32,
    /// Where it is.
    pub place: Place,
}

/// Why a process could not be stopped.
#[derive(Debug)]
pub enum StopError {
    /// It is gone.
    Gone,
    /// We may not.
    Denied(io::Error),
    /// This thread did not stop in time.
    Limit(i32),
    /// Anything else: the step and its errno.
    Os(&'static str, io::Error),
}

/// What became of the first thread while others were stopped.
enum Leader {
    /// It is stopped, or has ended.
    Held,
    /// It had not stopped, and has now.
    JustStopped,
    /// Its number is that of a thread that we have not seized.
    Replaced,
}

/// The threads that have been seized, for another thread of ours to see.
///
/// A thread of the owner that execs ends the others and waits until their tracer has taken notice. Meanwhile it holds
/// the lock that PTRACE_SEIZE of the next one waits for (cred_guard_mutex): without another thread that
/// takes notice, neither would go on.
#[derive(Debug, Default)]
pub struct Seized(Mutex<Vec<i32>>);

impl Seized {
    fn add(&self, tid: i32) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(tid);
    }

    /// Takes notice of those that have ended.
    pub fn take_ended(&self) {
        let mut tids = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tids.retain(|tid| match sys::peek_stop(*tid) {
            Ok(Waiting::End) => {
                // Only now: a stop would be taken, too, whatever waitid is asked for.
                // Source: kernel/exit.c, wait_task_stopped.
                let _ = sys::take_stop(*tid);
                false
            }
            Ok(_) => true,
            Err(_) => false,
        });
    }
}

/// The stopped threads of one process, let go when this is dropped.
#[derive(Debug)]
pub struct Stopped {
    pid: i32,
    threads: Vec<Thread>,
    since: Instant,
    deadline: Instant,
    /// Some have been told to stop.
    begun: bool,
}

impl Stopped {
    /// Stops every thread of process `pid`, also those that are made meanwhile.
    ///
    /// # Errors
    /// Not all of them have stopped by the end of `limit`, or one may not be stopped. All are going again
    /// then; with it, for how long they were not.
    pub fn stop(
        proc: &ProcFs,
        pid: i32,
        limit: Duration,
        seized: &Seized,
    ) -> Result<Self, (StopError, Duration)> {
        let since = Instant::now();
        let mut stopped = Stopped {
            pid,
            threads: Vec::new(),
            since,
            deadline: since + limit,
            begun: false,
        };
        let Err(error) = stopped.stop_all(proc, seized) else {
            return Ok(stopped);
        };
        let (since, begun) = (stopped.since, stopped.begun);
        drop(stopped);
        Err(match begun {
            true => (error, since.elapsed()),
            false => (error, Duration::ZERO),
        })
    }

    fn stop_all(&mut self, proc: &ProcFs, seized: &Seized) -> Result<(), StopError> {
        let pid = self.pid;
        let mut known = HashSet::new();
        let mut empty = 0;
        loop {
            let tids = tids(proc, pid).map_err(|error| match error.raw_os_error() {
                Some(libc::ENOENT | libc::ESRCH) => StopError::Gone,
                _ => StopError::Os("listing its threads", error),
            })?;
            let new: Vec<i32> = tids.into_iter().filter(|tid| known.insert(*tid)).collect();
            if new.is_empty() {
                // A listing begins anew behind a thread that ends under it, and can miss one.
                // Source: fs/proc/base.c, first_tid.
                empty += 1;
                if empty < EMPTY_LISTINGS {
                    continue;
                }
                match self.leader(proc)? {
                    Leader::Held => break,
                    Leader::JustStopped => {}
                    Leader::Replaced => drop(known.remove(&pid)),
                }
                if Instant::now() >= self.deadline {
                    return Err(StopError::Limit(pid));
                }
                empty = 0;
                continue;
            }
            empty = 0;
            if Instant::now() >= self.deadline {
                return Err(StopError::Limit(new[0]));
            }
            // None is told to stop before all have been seized: that can wait for an exec by one of them.
            for tid in new {
                self.seize(proc, tid, seized)?;
            }
            self.interrupt();
            // A thread that has not stopped may make another.
            for at in 0..self.threads.len() {
                if self.threads[at].place == Place::Moving {
                    self.wait(at, self.deadline)?;
                }
            }
        }
        match self.threads.iter().any(|t| t.place != Place::Ended) {
            true => Ok(()),
            false => Err(StopError::Gone),
        }
    }

    /// Whether the first thread is still the one that we hold. A thread that execs takes its number, whether we have
    /// seized that thread or not, and all others end (fs/exec.c, de_thread).
    fn leader(&mut self, proc: &ProcFs) -> Result<Leader, StopError> {
        let at = self.threads.iter().position(|t| t.tid == self.pid);
        let place = at.map(|at| self.threads[at].place);
        match sys::peek_stop(self.pid) {
            Ok(Waiting::Stop(_)) if place.is_some_and(|place| place != Place::Ended) => {
                Ok(Leader::Held)
            }
            Ok(waiting @ (Waiting::Stop(_) | Waiting::Nothing)) => {
                // It was seized under another number, and perhaps not told to stop.
                if matches!(waiting, Waiting::Nothing) {
                    // It can only be gone, which is seen next.
                    let _ = sys::ptrace_interrupt(self.pid);
                }
                let at = at.unwrap_or_else(|| {
                    self.threads.push(Thread {
                        tid: self.pid,
                        place: Place::Moving,
                    });
                    self.threads.len() - 1
                });
                self.wait(at, self.deadline)?;
                Ok(Leader::JustStopped)
            }
            Ok(Waiting::End) | Err(_) => {
                // Its number may come to stand for another thread.
                if let Some(at) = at {
                    self.threads.remove(at);
                }
                Ok(match has_ended(proc, self.pid, self.pid) {
                    true => Leader::Held,
                    false => Leader::Replaced,
                })
            }
        }
    }

    fn seize(&mut self, proc: &ProcFs, tid: i32, list: &Seized) -> Result<(), StopError> {
        let once_more = |error: io::Error| match error.raw_os_error() {
            // A thread that we have seized under another number may have it by now.
            Some(libc::EPERM) if !matches!(sys::peek_stop(tid), Ok(Waiting::End) | Err(_)) => {
                Ok(())
            }
            // Refused may be a thread whose number another got while we waited for its exec (fs/exec.c, de_thread).
            Some(libc::EPERM) => sys::ptrace_seize(tid),
            _ => Err(error),
        };
        let seized = sys::ptrace_seize(tid).or_else(once_more).map(|()| {
            // An exec does not wait for anybody to take notice of the end of the first thread: it does so itself (fs/exec.c,
            // de_thread).
            if tid != self.pid {
                list.add(tid);
            }
            // From here on it must be let go.
            self.threads.push(Thread {
                tid,
                place: Place::Seized,
            });
        });
        match seized {
            Ok(()) => Ok(()),
            Err(error) => match error.raw_os_error() {
                Some(libc::ESRCH) => Ok(()),
                // A thread that has ended and is still listed, for one the first of a process whose others
                // go on, is refused like one that we have no right to.
                Some(libc::EPERM) if has_ended(proc, self.pid, tid) => Ok(()),
                Some(libc::EPERM) => Err(StopError::Denied(error)),
                _ => Err(StopError::Os("PTRACE_SEIZE", error)),
            },
        }
    }

    /// Tells those to stop that have not been told. The owner begins to stand still with the first.
    fn interrupt(&mut self) {
        if !self.begun {
            self.begun = true;
            let limit = self.deadline - self.since;
            self.since = Instant::now();
            self.deadline = self.since + limit;
        }
        for thread in &mut self.threads {
            if thread.place == Place::Seized {
                // It can only be gone, which is seen when it is waited for.
                let _ = sys::ptrace_interrupt(thread.tid);
                thread.place = Place::Moving;
            }
        }
    }

    /// Waits until the thread at `at` has stopped.
    pub fn wait(&mut self, at: usize, deadline: Instant) -> Result<Place, StopError> {
        let tid = self.threads[at].tid;
        let mut looks = 0;
        loop {
            let waiting = sys::peek_stop(tid).or_else(|error| match error.raw_os_error() {
                Some(libc::ECHILD) => Ok(Waiting::End),
                _ => Err(StopError::Os("waitid", error)),
            })?;
            let place = match waiting {
                Waiting::Nothing => Place::Moving,
                Waiting::End => Place::Ended,
                Waiting::Stop(CALL_STOP) => {
                    // Should we die, what is left of this stop would be sent as a signal.
                    let _ = sys::take_stop(tid);
                    Place::AtCall
                }
                Waiting::Stop(code) if code >> 8 == EVENT_STOP => Place::Stopped,
                Waiting::Stop(code) => Place::Signal(code & 0x7f),
            };
            self.threads[at].place = place;
            if place == Place::Stopped {
                undo_interruption(tid);
            }
            if place != Place::Moving {
                return Ok(place);
            }
            if Instant::now() >= deadline {
                return Err(StopError::Limit(tid));
            }
            looks += 1;
            match looks < LOOKS {
                true => std::thread::yield_now(),
                false => std::thread::sleep(LOOK_AGAIN),
            }
        }
    }

    /// Lets a stopped thread run to the next beginning or end of a system call.
    pub fn resume(&mut self, at: usize) -> Result<(), StopError> {
        let thread = &mut self.threads[at];
        sys::ptrace_syscall(thread.tid, thread.place.signal()).map_err(|error| {
            match error.raw_os_error() {
                Some(libc::ESRCH) => StopError::Gone,
                _ => StopError::Os("PTRACE_SYSCALL", error),
            }
        })?;
        thread.place = Place::Moving;
        Ok(())
    }

    /// The threads.
    pub fn threads(&self) -> &[Thread] {
        &self.threads
    }

    /// When this must be over.
    pub fn deadline(&self) -> Instant {
        self.deadline
    }

    /// When the first of its threads was told to stop.
    pub fn since(&self) -> Instant {
        self.since
    }

    /// How long it has been stopped.
    pub fn elapsed(&self) -> Duration {
        self.since.elapsed()
    }

    /// The registers of a stopped thread; `None` if it is gone or of another width than we.
    pub fn registers(&self, at: usize) -> Option<Registers> {
        read_registers(self.threads[at].tid)
    }

    /// Lets all threads go but the one at `keep`.
    pub fn let_go_others(&mut self, keep: usize) {
        for at in (0..self.threads.len()).filter(|at| *at != keep) {
            self.let_go(at);
        }
    }

    fn let_go(&mut self, at: usize) {
        let thread = &mut self.threads[at];
        if matches!(thread.place, Place::Seized | Place::Moving) {
            // It may have stopped since. If not, the end of our own thread lets it go.
            match sys::peek_stop(thread.tid) {
                Ok(Waiting::Stop(code)) if code >> 8 == 0 && code != CALL_STOP => {
                    thread.place = Place::Signal(code);
                }
                Ok(Waiting::Stop(_)) => {
                    thread.place = Place::Stopped;
                    undo_interruption(thread.tid);
                }
                _ => {}
            }
        }
        if !matches!(thread.place, Place::Seized | Place::Moving | Place::Ended) {
            // It can only be gone.
            let _ = sys::ptrace_detach(thread.tid, thread.place.signal());
        }
        thread.place = Place::Ended;
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        for at in 0..self.threads.len() {
            self.let_go(at);
        }
    }
}

impl Place {
    /// What the thread must be given when it goes on.
    fn signal(self) -> i32 {
        match self {
            Place::Signal(signal) => signal,
            _ => 0,
        }
    }
}

/// Some calls end with EINTR because we stopped their thread. It makes them again.
fn undo_interruption(tid: i32) {
    if let Some(repeated) = read_registers(tid).and_then(|registers| registers.repeated()) {
        // It can only be gone.
        let _ = sys::ptrace_set_registers(tid, &repeated.0);
    }
}

/// The registers of a stopped thread; `None` if it is gone or of another width than we.
pub fn read_registers(tid: i32) -> Option<Registers> {
    let mut words = [0; Registers::WORDS];
    let read = sys::ptrace_registers(tid, &mut words).ok()?;
    let registers = Registers(words);
    (read == size_of_val(&words) && registers.is_native()).then_some(registers)
}

fn tids(proc: &ProcFs, pid: i32) -> io::Result<Vec<i32>> {
    let mut tids = Vec::new();
    for entry in fs::read_dir(proc.path(&format!("{pid}/task")))? {
        tids.extend(
            entry?
                .file_name()
                .to_str()
                .and_then(|n| n.parse::<i32>().ok()),
        );
    }
    Ok(tids)
}

/// Whether a thread is only listed any more, or not even that.
fn has_ended(proc: &ProcFs, pid: i32, tid: i32) -> bool {
    let stat = fs::read_to_string(proc.path(&format!("{pid}/task/{tid}/stat")));
    // The state is what follows the name, which may have anything in it.
    stat.map_or(true, |stat| {
        stat.rsplit_once(") ")
            .is_some_and(|(_, rest)| rest.starts_with(['Z', 'X']))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::signal::{Signal, kill};
    use nix::unistd::Pid;
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::process::CommandExt;
    use std::process::{Child, Command, Stdio};
    use std::thread;

    const PATIENCE: Duration = Duration::from_secs(20);
    /// Set in the environment, this test is the process that is stopped.
    const STOPPED: &str = "CWKILL_TESTS_STOPPED";
    const NAME: &str = "reclaim::stop::tests::a_thread_that_execs_is_held_under_its_new_number";

    /// No child of ours, like what is to be stopped: waitid(2) answers for a child that is not traced. Killed when
    /// dropped.
    struct Process {
        parent: Child,
        pid: i32,
    }

    impl Process {
        /// One that has a thread which executes another program when it is told to; its first thread waits.
        fn start() -> Self {
            let script = "exec 3<&0; \"$@\" <&3 >/dev/null & echo $!; wait";
            let mut parent = Command::new("sh")
                .args(["-c", script, "sh"])
                .arg(std::env::current_exe().unwrap())
                .args(["--exact", NAME, "--test-threads=2"])
                .env(STOPPED, "yes")
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let mut line = String::new();
            let mut lines = BufReader::new(parent.stdout.take().unwrap());
            lines.read_line(&mut line).unwrap();
            let pid = line.trim().parse().unwrap();
            Process { parent, pid }
        }

        fn comms(&self) -> Vec<String> {
            let tids = tids(&ProcFs::default(), self.pid).unwrap_or_default();
            let comm = |tid| fs::read_to_string(format!("/proc/{tid}/comm")).ok();
            let comms = tids.into_iter().filter_map(comm);
            comms.map(|comm| comm.trim_end().to_owned()).collect()
        }

        fn wait_for(&self, what: impl Fn(&[String]) -> bool) {
            let until = Instant::now() + PATIENCE;
            while !what(&self.comms()) {
                assert!(Instant::now() < until, "{:?}", self.comms());
                thread::sleep(Duration::from_millis(1));
            }
        }

        /// Waits for the thread that will execute; its number.
        fn executor(&self) -> i32 {
            self.wait_for(|comms| comms.iter().any(|comm| comm == "executes"));
            let tids = tids(&ProcFs::default(), self.pid).unwrap();
            let is_it = |tid: &i32| {
                fs::read_to_string(format!("/proc/{tid}/comm")).unwrap() == "executes\n"
            };
            tids.into_iter().find(is_it).unwrap()
        }

        fn execute(&mut self) {
            let stdin = self.parent.stdin.as_mut().unwrap();
            stdin.write_all(b"\n").unwrap();
        }
    }

    impl Drop for Process {
        fn drop(&mut self) {
            let _ = kill(Pid::from_raw(self.pid), Signal::SIGKILL);
            // While we trace it, its end is not shown to its parent.
            let _ = self.parent.kill();
            let _ = self.parent.wait();
        }
    }

    fn be_stopped() {
        let execute = || {
            let _ = io::stdin().read_line(&mut String::new());
            Command::new("sleep").arg("1000").exec()
        };
        let thread = thread::Builder::new().name("executes".into());
        let error = thread.spawn(execute).unwrap().join().unwrap();
        panic!("{error}");
    }

    #[test]
    fn a_thread_that_execs_is_held_under_its_new_number() {
        if std::env::var_os(STOPPED).is_some() {
            return be_stopped();
        }
        let proc = ProcFs::default();
        for executor_is_seized in [false, true] {
            let mut process = Process::start();
            let (pid, executor) = (process.pid, process.executor());
            let since = Instant::now();
            let mut stopped = Stopped {
                pid,
                threads: Vec::new(),
                since,
                deadline: since + PATIENCE,
                begun: false,
            };
            let seized = Seized::default();
            stopped.seize(&proc, pid, &seized).unwrap();
            stopped.interrupt();
            assert_eq!(stopped.wait(0, stopped.deadline).unwrap(), Place::Stopped);
            assert!(matches!(stopped.leader(&proc), Ok(Leader::Held)));
            if executor_is_seized {
                stopped.seize(&proc, executor, &seized).unwrap();
            }

            process.execute();
            process.wait_for(|comms| comms == ["sleep"]);
            if executor_is_seized {
                assert!(matches!(stopped.leader(&proc), Ok(Leader::JustStopped)));
            } else {
                assert!(matches!(stopped.leader(&proc), Ok(Leader::Replaced)));
                assert!(stopped.threads().is_empty());
                stopped.seize(&proc, pid, &seized).unwrap();
                // What is ours already is not refused.
                stopped.threads.clear();
                stopped.seize(&proc, pid, &seized).unwrap();
                stopped.interrupt();
                let place = stopped.wait(0, stopped.deadline).unwrap();
                assert_eq!(place, Place::Stopped);
            }
            assert!(matches!(stopped.leader(&proc), Ok(Leader::Held)));
            let state = || fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
            assert!(state().contains(" t "), "{}", state());
            drop(stopped);
            let until = Instant::now() + PATIENCE;
            while !state().contains(" S ") {
                assert!(Instant::now() < until, "{}", state());
                thread::sleep(Duration::from_millis(1));
            }
        }
    }

    #[test]
    fn all_threads_are_stopped() {
        let proc = ProcFs::default();
        let process = Process::start();
        process.executor();
        let stopped = Stopped::stop(&proc, process.pid, PATIENCE, &Seized::default()).unwrap();
        let listed = tids(&proc, process.pid).unwrap();
        assert_eq!(stopped.threads().len(), listed.len());
        assert!(stopped.threads().iter().all(|t| t.place == Place::Stopped));
        assert!(stopped.elapsed() < PATIENCE);
    }
}
