//! Stopping every thread of a process, and releasing them.
//!
//! cwkill seizes each thread (PTRACE_SEIZE), which has no effect on it, and then interrupts it (PTRACE_INTERRUPT), which runs
//! no signal handler. A thread may instead stop for a signal that was already pending. cwkill keeps this signal, and delivers it
//! when it releases the thread. If a process was already stopped by SIGSTOP, the kernel stops it again after its release
//! (kernel/ptrace.c, __ptrace_unlink).
//!
//! One thread of cwkill makes all these calls and ends right afterwards ([`super::super::process`]). Its end also releases a
//! thread of the owner that has never stopped.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::errno::Errno;

use super::arch::Registers;
use super::{is_syscall_instruction, read_registers};
use crate::control::deadline;
use crate::model::ReclaimReason;
use crate::proc::ProcFs;
use crate::proc::status::thread_state;
use crate::proc::syscall::Syscall;
use crate::reclaim::error::{OwnerError, not_permitted};
use crate::reclaim::obstacle;
use crate::sys::errno_of;
use crate::sys::ptrace::{self, TraceEvent};

/// include/uapi/linux/ptrace.h: the stop of an interrupted thread.
const EVENT_STOP: i32 = 128;
/// The stop at a system call, with PTRACE_O_TRACESYSGOOD.
const SYSCALL_STOP: i32 = libc::SIGTRAP | 0x80;

/// After this number of listings in a row without a new thread, all threads are known.
const EMPTY_LISTINGS: u32 = 2;

/// Time between two checks of a thread that is about to stop.
const CHECK_INTERVAL: Duration = Duration::from_micros(20);
/// The first checks, which have no pause between them.
const BUSY_CHECKS: u32 = 50;

/// The state of a thread of the owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThreadState {
    /// Seized, not interrupted yet.
    Seized,
    /// Interrupted or resumed; it has not stopped yet.
    Running,
    /// Stopped, with no signal to deliver.
    Stopped,
    /// Stopped at the entry or the exit of a system call.
    AtSyscall,
    /// Stopped for this signal, which is delivered when the thread is resumed.
    AtSignal(i32),
    /// Gone or released.
    Ended,
}

impl ThreadState {
    /// The signal to deliver when the thread is resumed; 0 for none.
    fn signal(self) -> i32 {
        match self {
            ThreadState::AtSignal(signal) => signal,
            _ => 0,
        }
    }
}

/// A thread of the owner.
#[derive(Debug)]
pub struct Thread {
    pub tid: i32,
    pub state: ThreadState,
    /// Since the stop began, the time for which it was not kept from running.
    ran: Duration,
}

impl Thread {
    fn new(tid: i32, state: ThreadState) -> Self {
        Thread {
            tid,
            state,
            ran: Duration::ZERO,
        }
    }

    /// Waits until the thread has stopped or ended. Its state is still [`ThreadState::Running`] if it has not by the
    /// `deadline`.
    pub fn wait(&mut self, deadline: Instant) -> Result<ThreadState, OwnerError> {
        let mut checks = 0;
        loop {
            let waiting = ptrace::peek_stop(self.tid).or_else(|error| match errno_of(&error) {
                Errno::ECHILD => Ok(TraceEvent::End),
                errno => Err(ReclaimReason::SystemCall("waitid", errno)),
            })?;
            self.state = match waiting {
                TraceEvent::Nothing => ThreadState::Running,
                TraceEvent::End => ThreadState::Ended,
                TraceEvent::Stop(SYSCALL_STOP) => {
                    // If cwkill dies, the kernel would send an unconsumed stop of this kind as a signal.
                    let _ = ptrace::take_stop(self.tid);
                    ThreadState::AtSyscall
                }
                TraceEvent::Stop(code) if code >> 8 == EVENT_STOP => ThreadState::Stopped,
                TraceEvent::Stop(code) => ThreadState::AtSignal(code & 0x7f),
            };
            if self.state == ThreadState::Stopped {
                restart_interrupted_syscall(self.tid);
            }
            if self.state != ThreadState::Running || Instant::now() >= deadline {
                return Ok(self.state);
            }
            checks += 1;
            match checks < BUSY_CHECKS {
                true => std::thread::yield_now(),
                false => std::thread::sleep(CHECK_INTERVAL),
            }
        }
    }

    /// Lets the stopped thread run to its next entry or exit of a system call.
    pub fn resume(&mut self) -> Result<(), OwnerError> {
        ptrace::syscall(self.tid, self.state.signal())
            .map_err(|error| OwnerError::of_step("PTRACE_SYSCALL", &error))?;
        self.state = ThreadState::Running;
        Ok(())
    }

    /// The registers of the stopped thread; `None` if it is gone or runs 32-bit code.
    pub fn registers(&self) -> Option<Registers> {
        read_registers(self.tid)
    }

    /// The system call that the stopped thread is in.
    pub fn syscall(&self) -> Option<Syscall> {
        let is_instruction = |address| is_syscall_instruction(self.tid, address);
        self.registers()?.syscall(&is_instruction)
    }

    fn interrupt(&mut self) {
        // This fails only if the thread is gone, which the wait for it detects.
        let _ = ptrace::interrupt(self.tid);
        self.state = ThreadState::Running;
    }

    fn release(&mut self) {
        if matches!(self.state, ThreadState::Seized | ThreadState::Running) {
            // It may have stopped meanwhile. If it has not, the end of cwkill's own thread releases it.
            match ptrace::peek_stop(self.tid) {
                Ok(TraceEvent::Stop(code)) if code >> 8 == 0 && code != SYSCALL_STOP => {
                    self.state = ThreadState::AtSignal(code);
                }
                Ok(TraceEvent::Stop(_)) => {
                    self.state = ThreadState::Stopped;
                    restart_interrupted_syscall(self.tid);
                }
                _ => {}
            }
        }
        let is_stopped = !matches!(
            self.state,
            ThreadState::Seized | ThreadState::Running | ThreadState::Ended
        );
        if is_stopped {
            // This fails only if the thread is gone.
            let _ = ptrace::detach(self.tid, self.state.signal());
        }
        self.state = ThreadState::Ended;
    }
}

/// The state of the first thread after the others have been stopped.
enum Leader {
    /// It is stopped, or has ended.
    Stopped,
    /// It was running, and has stopped now.
    JustStopped,
    /// Its number belongs to a thread that cwkill has not seized.
    Replaced,
}

/// The threads that have been seized, shared with another thread of cwkill.
///
/// If a thread of the owner calls execve(2), it ends the others and waits until their tracer has reaped them. Meanwhile it
/// holds the lock that PTRACE_SEIZE of the next thread waits for (cred_guard_mutex). Without another thread of cwkill that
/// reaps the ended threads, both sides would wait forever.
#[derive(Debug, Default)]
pub struct SeizedThreads(Mutex<Vec<i32>>);

impl SeizedThreads {
    fn add(&self, tid: i32) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(tid);
    }

    /// Reaps the threads that have ended.
    pub fn reap_ended(&self) {
        let mut tids = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tids.retain(|tid| match ptrace::peek_stop(*tid) {
            Ok(TraceEvent::End) => {
                // Only after the end of the thread: this call would also consume a stop, even if it asked waitid(2) for ended
                // threads only. Source: kernel/exit.c, wait_task_stopped.
                let _ = ptrace::take_stop(*tid);
                false
            }
            Ok(_) => true,
            Err(_) => false,
        });
    }
}

/// A process with all its threads stopped. They are released when this is dropped.
#[derive(Debug)]
pub struct StoppedProcess {
    pid: i32,
    threads: Vec<Thread>,
    /// When the first thread was interrupted.
    since: Instant,
    limit: Duration,
    deadline: Instant,
    /// The stop has begun: at least one thread has been interrupted.
    is_stopping: bool,
}

impl StoppedProcess {
    fn new(pid: i32, limit: Duration) -> Self {
        let since = Instant::now();
        StoppedProcess {
            pid,
            threads: Vec::new(),
            since,
            limit,
            deadline: deadline(since, limit),
            is_stopping: false,
        }
    }

    /// Stops every thread of process `pid`, including those that are created meanwhile.
    ///
    /// # Errors
    /// Not all threads have stopped within `limit`, or cwkill is not permitted to stop one. All threads have been released then;
    /// the second value is the longest time for which one of them had stood still.
    pub fn stop(
        proc: &ProcFs,
        pid: i32,
        limit: Duration,
        seized: &SeizedThreads,
    ) -> Result<Self, (OwnerError, Duration)> {
        let mut stopped = Self::new(pid, limit);
        let Err(error) = stopped.stop_all(proc, seized) else {
            return Ok(stopped);
        };
        Err((error, stopped.longest_standstill()))
    }

    fn stop_all(&mut self, proc: &ProcFs, seized: &SeizedThreads) -> Result<(), OwnerError> {
        let mut known = HashSet::new();
        let mut empty_listings = 0;
        loop {
            let tids = proc
                .tids(self.pid)
                .map_err(|error| match errno_of(&error) {
                    Errno::ENOENT => OwnerError::Exited,
                    _ => OwnerError::of_step("listing its threads", &error),
                })?;
            let new: Vec<i32> = tids.into_iter().filter(|tid| known.insert(*tid)).collect();
            if new.is_empty() {
                // If a thread ends during a listing, the kernel continues after it and can miss another thread.
                // Source: fs/proc/base.c, first_tid.
                empty_listings += 1;
                if empty_listings < EMPTY_LISTINGS {
                    continue;
                }
                match self.check_leader(proc)? {
                    Leader::Stopped => break,
                    Leader::JustStopped => {}
                    Leader::Replaced => drop(known.remove(&self.pid)),
                }
                self.check_deadline(proc, self.pid)?;
                empty_listings = 0;
                continue;
            }
            empty_listings = 0;
            self.check_deadline(proc, new[0])?;
            // All are seized before the first is interrupted, because PTRACE_SEIZE can wait for an exec by one of them.
            for tid in new {
                self.seize(proc, tid, seized)?;
            }
            self.interrupt_seized();
            // A thread that still runs may create another.
            for thread in &mut self.threads {
                if thread.state == ThreadState::Running {
                    wait_for_stop(proc, self.pid, thread, self.deadline, self.limit)?;
                }
            }
        }
        match self.threads.iter().any(|t| t.state != ThreadState::Ended) {
            true => Ok(()),
            false => Err(OwnerError::Exited),
        }
    }

    fn check_deadline(&self, proc: &ProcFs, tid: i32) -> Result<(), OwnerError> {
        match Instant::now() >= self.deadline {
            true => Err(obstacle::not_stopped(proc, self.pid, tid, self.limit).into()),
            false => Ok(()),
        }
    }

    /// Whether the first thread is still the one that cwkill has stopped. A thread that execs takes its number, whether
    /// cwkill has seized that thread or not, and all others end (fs/exec.c, de_thread).
    fn check_leader(&mut self, proc: &ProcFs) -> Result<Leader, OwnerError> {
        let index = self.threads.iter().position(|t| t.tid == self.pid);
        let state = index.map(|index| self.threads[index].state);
        match ptrace::peek_stop(self.pid) {
            Ok(TraceEvent::Stop(_)) if state.is_some_and(|state| state != ThreadState::Ended) => {
                Ok(Leader::Stopped)
            }
            Ok(event @ (TraceEvent::Stop(_) | TraceEvent::Nothing)) => {
                // cwkill seized it under another number, and has perhaps not interrupted it.
                if matches!(event, TraceEvent::Nothing) {
                    // This fails only if the thread is gone, which the wait for it detects.
                    let _ = ptrace::interrupt(self.pid);
                }
                let index = index.unwrap_or_else(|| {
                    self.threads
                        .push(Thread::new(self.pid, ThreadState::Running));
                    self.threads.len() - 1
                });
                let thread = &mut self.threads[index];
                wait_for_stop(proc, self.pid, thread, self.deadline, self.limit)?;
                Ok(Leader::JustStopped)
            }
            Ok(TraceEvent::End) | Err(_) => {
                // Another thread may get its number.
                if let Some(index) = index {
                    self.threads.remove(index);
                }
                Ok(match has_ended(proc, self.pid, self.pid) {
                    true => Leader::Stopped,
                    false => Leader::Replaced,
                })
            }
        }
    }

    fn seize(&mut self, proc: &ProcFs, tid: i32, seized: &SeizedThreads) -> Result<(), OwnerError> {
        let once_more = |error: io::Error| match error.raw_os_error() {
            // A thread that cwkill has seized under another number may have this number by now.
            Some(libc::EPERM)
                if !matches!(ptrace::peek_stop(tid), Ok(TraceEvent::End) | Err(_)) =>
            {
                Ok(())
            }
            // The kernel may refuse a thread whose number went to another while cwkill waited for its exec (fs/exec.c,
            // de_thread).
            Some(libc::EPERM) => ptrace::seize(tid),
            _ => Err(error),
        };
        let added = ptrace::seize(tid).or_else(once_more).map(|()| {
            // The first thread need not be reaped: execve(2) does that itself (fs/exec.c, de_thread).
            if tid != self.pid {
                seized.add(tid);
            }
            // From now on the thread must be released.
            self.threads.push(Thread::new(tid, ThreadState::Seized));
        });
        added.or_else(|error| match errno_of(&error) {
            Errno::ESRCH => Ok(()),
            // The kernel answers EPERM both for a missing privilege and for a thread that has ended and is still listed, for
            // example the first thread of a process whose others run on.
            Errno::EPERM if has_ended(proc, self.pid, tid) => Ok(()),
            errno @ Errno::EPERM => Err(not_permitted(errno).into()),
            errno => Err(ReclaimReason::SystemCall("PTRACE_SEIZE", errno).into()),
        })
    }

    /// Interrupts the threads that have only been seized. The stop of the owner begins with the first interruption.
    fn interrupt_seized(&mut self) {
        if !self.is_stopping {
            self.is_stopping = true;
            self.since = Instant::now();
            self.deadline = deadline(self.since, self.limit);
        }
        for thread in &mut self.threads {
            if thread.state == ThreadState::Seized {
                thread.interrupt();
            }
        }
    }

    pub fn pid(&self) -> i32 {
        self.pid
    }

    pub fn threads(&self) -> &[Thread] {
        &self.threads
    }

    pub fn thread_mut(&mut self, index: usize) -> &mut Thread {
        &mut self.threads[index]
    }

    /// The time at which the stop limit is reached.
    pub fn deadline(&self) -> Instant {
        self.deadline
    }

    pub fn limit(&self) -> Duration {
        self.limit
    }

    /// Notes that cwkill has let the thread with this index run.
    pub fn note_run(&mut self, thread: usize, time: Duration) {
        self.threads[thread].ran += time;
    }

    /// The longest time for which cwkill has kept one of the threads from running, so far. A thread that has not stopped is not
    /// kept, and neither is one that was resumed to make a system call.
    pub fn longest_standstill(&self) -> Duration {
        if !self.is_stopping {
            return Duration::ZERO;
        }
        let elapsed = self.since.elapsed();
        let stood = |thread: &Thread| match thread.state {
            ThreadState::Seized | ThreadState::Running | ThreadState::Ended => Duration::ZERO,
            _ => elapsed.saturating_sub(thread.ran),
        };
        self.threads.iter().map(stood).max().unwrap_or_default()
    }

    /// Time for which the process has been stopped.
    pub fn elapsed(&self) -> Duration {
        self.since.elapsed()
    }

    /// Releases all threads but the one with this index.
    pub fn release_others(&mut self, kept: usize) {
        for (index, thread) in self.threads.iter_mut().enumerate() {
            if index != kept {
                thread.release();
            }
        }
    }
}

impl Drop for StoppedProcess {
    fn drop(&mut self) {
        self.threads.iter_mut().for_each(Thread::release);
    }
}

/// Waits until the thread of process `pid` has stopped or ended, which must be before the deadline.
fn wait_for_stop(
    proc: &ProcFs,
    pid: i32,
    thread: &mut Thread,
    deadline: Instant,
    limit: Duration,
) -> Result<(), OwnerError> {
    match thread.wait(deadline)? {
        ThreadState::Running => Err(obstacle::not_stopped(proc, pid, thread.tid, limit).into()),
        _ => Ok(()),
    }
}

/// Makes the kernel restart a call that ended with EINTR only because cwkill stopped its thread.
fn restart_interrupted_syscall(tid: i32) {
    if let Some(restarted) = read_registers(tid).and_then(|registers| registers.restart_eintr()) {
        // This fails only if the thread is gone.
        let _ = ptrace::set_registers(tid, &restarted.0);
    }
}

/// Whether a thread is a zombie, or no longer listed.
fn has_ended(proc: &ProcFs, pid: i32, tid: i32) -> bool {
    let stat = fs::read(proc.path(&format!("{pid}/task/{tid}/stat")));
    stat.map_or(true, |stat| {
        matches!(thread_state(&stat), Some(b'Z' | b'X'))
    })
}

#[cfg(test)]
#[path = "stop_tests.rs"]
mod tests;
