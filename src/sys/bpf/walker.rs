//! A walker: a child process that reads an iterator to its end.
//!
//! The kernel can let the reader of an iterator wait for a lock that a hanging process holds. No signal ends that, SIGKILL neither. A thread that
//! waits so would keep cwkill from ending: a process stays until its last thread is gone, and its parent is told only then
//! (kernel/exit.c, delay_group_leader). A child that waits so keeps nobody: cwkill ends, process 1 takes the child over, and the child ends as
//! soon as the lock is free.
//!
//! The walker has no capability, no file of cwkill and no terminal. It is started early: fork(2) of a process with much memory takes long.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::{self, MaybeUninit};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, SigmaskHow};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use rustix::thread::{CapabilitySet, CapabilitySets};

use super::MAX_PAUSES;

/// The child process. It ends when this is dropped, or when cwkill ends.
#[derive(Debug)]
pub struct Walker {
    /// cwkill sends an iterator, and gets an errno of 32 bits when it is read to its end; 0 for success.
    channel: OwnedFd,
    pid: Pid,
    is_walking: bool,
}

impl Walker {
    /// Starts the process. It has what cwkill has now: call it while that is little.
    ///
    /// # Errors
    /// EAGAIN: RLIMIT_NPROC, or pids.max of the cgroup. Source: kernel/fork.c, fork(2).
    pub fn start() -> io::Result<Self> {
        let (ours, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        // The child keeps them blocked: Ctrl-C must not end it between the destroy of a socket and its answer.
        let signals = BlockedSignals::all()?;
        // SAFETY: other threads of cwkill may hold locks, so the child only makes system calls, and allocates no memory. `serve` does not return
        // and drops nothing that the parent uses: the child has copies.
        let pid = match unsafe { libc::fork() } {
            0 => serve(&theirs),
            pid => pid,
        };
        let pid = Errno::result(pid);
        drop(signals);
        Ok(Walker {
            channel: ours,
            pid: Pid::from_raw(pid?),
            is_walking: false,
        })
    }

    /// Has the walker read `iterator` to its end, and write what it reads to `records`. It must not be walking. If somebody has killed it,
    /// perhaps the OOM killer, another one is started.
    ///
    /// # Errors
    /// As [`Walker::start`]. EPIPE: the other one was killed, too.
    pub fn begin(&mut self, iterator: &OwnedFd, records: Option<&OwnedFd>) -> io::Result<()> {
        let mut sent = self.send(iterator, records);
        if matches!(&sent, Err(error) if error.raw_os_error() == Some(libc::EPIPE)) {
            *self = Walker::start()?;
            sent = self.send(iterator, records);
        }
        sent?;
        self.is_walking = true;
        Ok(())
    }

    fn send(&self, iterator: &OwnedFd, records: Option<&OwnedFd>) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [iterator.as_fd(), records.unwrap_or(iterator).as_fd()];
        let sent = &fds[..1 + usize::from(records.is_some())];
        let fits = control.push(SendAncillaryMessage::ScmRights(sent));
        assert!(fits, "room for two descriptors");
        let byte = [IoSlice::new(&[0])];
        rustix::net::sendmsg(&self.channel, &byte, &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// Whether it has not come to the end of its iterator.
    pub fn is_walking(&self) -> bool {
        self.is_walking
    }

    /// Waits for the end of the walk, at most so many milliseconds. `None`: it goes on. ESRCH: somebody has killed the walker.
    pub fn result(&mut self, at_most: u16) -> Option<io::Result<()>> {
        let mut fds = [PollFd::new(self.channel.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::from(at_most)) {
            Ok(0) | Err(Errno::EINTR) => return None,
            Ok(_) => {}
            Err(errno) => return Some(Err(errno.into())),
        }
        self.is_walking = false;
        let mut answer = [0; mem::size_of::<i32>()];
        let read = nix::unistd::read(&self.channel, &mut answer);
        Some(match (read, i32::from_ne_bytes(answer)) {
            (Ok(0) | Err(Errno::ECONNRESET), _) => Err(Errno::ESRCH.into()),
            (Ok(_), 0) => Ok(()),
            (Ok(_), errno) => Err(io::Error::from_raw_os_error(errno)),
            (Err(errno), _) => Err(errno.into()),
        })
    }
}

impl Drop for Walker {
    fn drop(&mut self) {
        // It reads the end of its channel.
        let _ = rustix::net::shutdown(&self.channel, rustix::net::Shutdown::Both);
        // One that is held up would keep cwkill. Process 1 waits for it.
        let flags = self.is_walking.then_some(WaitPidFlag::WNOHANG);
        while waitpid(self.pid, flags) == Err(Errno::EINTR) {}
    }
}

/// All signals are blocked in this thread until it is dropped. The value is the mask before.
struct BlockedSignals(SigSet);

impl BlockedSignals {
    fn all() -> io::Result<Self> {
        let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK)?;
        Ok(BlockedSignals(before))
    }
}

impl Drop for BlockedSignals {
    fn drop(&mut self) {
        // Fails only with another `how`.
        let _ = self.0.thread_set_mask();
    }
}

/// The whole life of the child.
fn serve(channel: &OwnedFd) -> ! {
    let _ = give_up_everything_but(channel).and_then(|()| walk_on_order(channel));
    // SAFETY: ends the process at once. Nothing of cwkill is flushed or removed.
    unsafe { libc::_exit(0) }
}

fn give_up_everything_but(channel: &OwnedFd) -> io::Result<()> {
    let _ = rustix::thread::set_name(c"cwkill-walk");
    // Not in the process group of the terminal, and on no file system that somebody wants to unmount.
    let _ = rustix::process::setsid();
    let _ = rustix::process::chdir(c"/");
    let nothing = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, nothing)?;
    let kept = channel.as_raw_fd().unsigned_abs();
    // A pipe of cwkill must not stay open because of the walker.
    if kept > 0 {
        close_range(0, kept - 1)?;
    }
    close_range(kept.saturating_add(1), u32::MAX)
}

/// Closes the descriptors from `first` to `last`.
fn close_range(first: u32, last: u32) -> io::Result<()> {
    // SAFETY: the child uses none of these descriptors, and never returns to the code that does.
    let closed = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    Ok(Errno::result(closed).map(drop)?)
}

fn walk_on_order(channel: &OwnedFd) -> io::Result<()> {
    while let Some((iterator, records)) = receive(channel)? {
        let errno = read_to_end(&iterator, records.as_ref());
        drop((iterator, records));
        nix::unistd::write(channel, &errno.to_ne_bytes())?;
    }
    Ok(())
}

/// The next iterator, and where its records go; `None` if cwkill has ended.
fn receive(channel: &OwnedFd) -> io::Result<Option<(OwnedFd, Option<OwnedFd>)>> {
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = [IoSliceMut::new(&mut byte)];
    rustix::net::recvmsg(channel, &mut bytes, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(mut fds) = message {
            return Ok(fds.next().map(|iterator| (iterator, fds.next())));
        }
    }
    Ok(None)
}

/// Reads to the end, and writes it to `records`, a file in memory. Returns the errno of the call that failed, or 0.
fn read_to_end(iterator: &OwnedFd, records: Option<&OwnedFd>) -> i32 {
    let mut buffer = [0; 4096];
    let mut pauses = 0;
    loop {
        let read = nix::unistd::read(iterator, &mut buffer);
        let written = match (read, records) {
            (Ok(0), _) => return 0,
            (Ok(read), Some(records)) => nix::unistd::write(records, &buffer[..read]),
            (read, _) => read,
        };
        match written {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(Errno::EAGAIN) if pauses < MAX_PAUSES => pauses += 1,
            Err(errno) => return errno as i32,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::thread;

    use super::*;

    fn pipe() -> (OwnedFd, OwnedFd) {
        // Other tests start programs.
        nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).unwrap()
    }

    /// Far longer than it takes.
    const LONG: u16 = 60_000;

    #[test]
    fn it_reads_to_the_end_and_says_so() {
        let mut walker = Walker::start().unwrap();
        for _ in 0..3 {
            let (ours, theirs) = pipe();
            walker.begin(&ours, None).unwrap();
            drop(ours);
            nix::unistd::write(&theirs, &[0; 1000]).unwrap();
            assert!(walker.result(20).is_none());
            drop(theirs);
            walker.result(LONG).unwrap().unwrap();
        }
        let directory: OwnedFd = File::open("/").unwrap().into();
        walker.begin(&directory, None).unwrap();
        let error = walker.result(LONG).unwrap().unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EISDIR));
    }

    #[test]
    fn it_writes_what_it_reads() {
        use std::io::{Read, Seek, Write};
        let mut walker = Walker::start().unwrap();
        let (ours, theirs) = pipe();
        let mut records = tempfile::tempfile().unwrap();
        let to: OwnedFd = records.try_clone().unwrap().into();
        walker.begin(&ours, Some(&to)).unwrap();
        File::from(theirs).write_all(&[7; 10_000]).unwrap();
        walker.result(LONG).unwrap().unwrap();
        records.rewind().unwrap();
        let mut read = Vec::new();
        records.read_to_end(&mut read).unwrap();
        assert_eq!(read, [7; 10_000]);
    }

    /// The walker has only its channel, so the pipe ends with the last descriptor of the test.
    #[test]
    fn it_holds_nothing_of_cwkill() {
        let (ours, theirs) = pipe();
        let walker = Walker::start().unwrap();
        drop(theirs);
        let mut fds = [PollFd::new(ours.as_fd(), PollFlags::POLLIN)];
        assert_eq!(poll(&mut fds, PollTimeout::from(LONG)), Ok(1));
        let status = std::fs::read_to_string(format!("/proc/{}/status", walker.pid)).unwrap();
        assert!(status.contains("CapPrm:\t0000000000000000"), "{status}");
        let pid = walker.pid;
        drop(walker);
        // It was waited for, so there is not even a zombie.
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
    }

    #[test]
    fn a_killed_walker_is_an_error() {
        let mut walker = Walker::start().unwrap();
        let (ours, _theirs) = pipe();
        walker.begin(&ours, None).unwrap();
        let raw = rustix::process::Pid::from_raw(walker.pid.as_raw()).unwrap();
        rustix::process::kill_process(raw, rustix::process::Signal::KILL).unwrap();
        let error = walker.result(LONG).unwrap().unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ESRCH));
        // The next walk has another walker.
        let (ours, theirs) = pipe();
        drop(theirs);
        walker.begin(&ours, None).unwrap();
        walker.result(LONG).unwrap().unwrap();
    }

    /// A walker that is held up does not keep cwkill from going on, and ends later.
    #[test]
    fn a_walker_that_walks_is_left_behind() {
        let (ours, theirs) = pipe();
        let mut walker = Walker::start().unwrap();
        walker.begin(&ours, None).unwrap();
        let pid = walker.pid;
        drop(walker);
        drop(theirs);
        let ended = thread::spawn(move || waitpid(pid, None));
        ended.join().unwrap().unwrap();
    }
}
