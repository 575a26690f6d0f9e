//! Ends a system call of the calling thread that waits for too long.

use std::io;
use std::marker::PhantomData;
use std::mem;
use std::ptr;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::time::TimeSpec;
use nix::unistd::gettid;

/// cwkill uses this signal for nothing else. By default a process ignores it, so one that comes late does no harm.
const SIGNAL: libc::c_int = libc::SIGURG;

/// Interrupts the system calls of the thread that started it, again and again until it is dropped. A call that waits then fails
/// with EINTR.
#[derive(Debug)]
pub struct Interrupter {
    timer: libc::timer_t,
    /// The timer belongs to the thread that started it.
    _not_send: PhantomData<*const ()>,
}

impl Interrupter {
    /// # Errors
    /// EAGAIN: no timer is left. Source: kernel/time/posix-timers.c, timer_create(2).
    pub fn start(interval: Duration) -> io::Result<Self> {
        accept_signal()?;
        // SAFETY: all bytes zero is a value of this struct of integers and pointers; the fields that the kernel reads are set below.
        let mut event: libc::sigevent = unsafe { mem::zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = SIGNAL;
        event.sigev_notify_thread_id = gettid().as_raw();
        let mut timer: libc::timer_t = ptr::null_mut();
        // SAFETY: both pointers are to live values, `timer` is writable, and the kernel keeps neither pointer.
        let created =
            unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer) };
        Errno::result(created)?;
        let interrupter = Interrupter {
            timer,
            _not_send: PhantomData,
        };
        let interval = *TimeSpec::from_duration(interval).as_ref();
        let times = libc::itimerspec {
            it_interval: interval,
            it_value: interval,
        };
        // SAFETY: the timer exists, `times` is live and only read, and the old times are not asked for.
        let set = unsafe { libc::timer_settime(timer, 0, &raw const times, ptr::null_mut()) };
        Errno::result(set)?;
        Ok(interrupter)
    }
}

impl Drop for Interrupter {
    fn drop(&mut self) {
        // SAFETY: the timer exists, and it is deleted only here.
        unsafe { libc::timer_delete(self.timer) };
    }
}

/// Makes the signal interrupt calls of the calling thread. Without SA_RESTART the kernel does not continue them.
fn accept_signal() -> io::Result<()> {
    extern "C" fn ignore(_: libc::c_int) {}
    // SAFETY: all bytes zero is a value of this struct: no flags, an empty mask.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    action.sa_sigaction = ignore as *const () as libc::sighandler_t;
    // SAFETY: `action` is live and only read. The handler does nothing, so it may run at any time.
    let set = unsafe { libc::sigaction(SIGNAL, &raw const action, ptr::null_mut()) };
    Errno::result(set)?;
    // SAFETY: all bytes zero is an empty set.
    let mut signals: libc::sigset_t = unsafe { mem::zeroed() };
    // SAFETY: `signals` is live and writable.
    unsafe { libc::sigaddset(&raw mut signals, SIGNAL) };
    // SAFETY: `signals` is live and only read, and the old mask is not asked for.
    match unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const signals, ptr::null_mut()) } {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread;

    use super::*;

    #[test]
    fn a_call_that_waits_ends() {
        let thread = thread::spawn(|| {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let _interrupter = Interrupter::start(Duration::from_millis(1)).unwrap();
            // The listener of std would try again.
            let accepted =
                rustix::net::accept_with(&listener, rustix::net::SocketFlags::CLOEXEC).map(drop);
            assert_eq!(accepted, Err(rustix::io::Errno::INTR));
        });
        thread.join().unwrap();
    }
}
