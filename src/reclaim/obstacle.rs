//! Why an owner cannot be stopped, or makes no system call: the state of its threads in /proc.

use std::fs;
use std::time::Duration;

use super::read_text;
use crate::model::ReclaimReason;
use crate::proc::ProcFs;
use crate::proc::status::thread_state;
use crate::proc::syscall::Syscall;

/// The reason why thread `tid` of process `pid` did not stop within `limit`.
pub fn not_stopped(proc: &ProcFs, pid: i32, tid: i32, limit: Duration) -> ReclaimReason {
    if !is_uninterruptible(proc, pid, tid) {
        return ReclaimReason::NotStopped(tid, limit);
    }
    if proc.is_frozen(pid) {
        return ReclaimReason::Frozen;
    }
    let call = read_text(proc.path(&format!("{pid}/task/{tid}/syscall")));
    let call = call.ok().and_then(|line| Syscall::parse(&line));
    match call.is_some_and(|call| call.waits_for_vfork()) {
        true => ReclaimReason::InVfork(tid),
        false => ReclaimReason::Uninterruptible(tid, limit),
    }
}

/// The reason why no thread of process `pid` made a system call within `limit`.
pub fn no_syscall(proc: &ProcFs, pid: i32, limit: Duration) -> ReclaimReason {
    match proc.is_frozen(pid) {
        true => ReclaimReason::Frozen,
        false => ReclaimReason::NoSyscall(limit),
    }
}

/// Whether a thread sleeps where nothing interrupts it.
pub fn is_uninterruptible(proc: &ProcFs, pid: i32, tid: i32) -> bool {
    let stat = fs::read(proc.path(&format!("{pid}/task/{tid}/stat")));
    stat.is_ok_and(|stat| thread_state(&stat) == Some(b'D'))
}
