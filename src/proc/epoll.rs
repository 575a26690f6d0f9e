//! The epoll sets of a process, from `/proc/PID/fdinfo`. Pure.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::Hash;

/// The events for which a process waits at a file: whether it would wake without end if the file were a socket that has been closed. A
/// closed socket reports EPOLLHUP, which no mask keeps out.
///
/// In ascending order of harm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Interest {
    /// It is told of the end of the stream, or of each change only once, or of nothing. So a socket in CLOSE-WAIT has woken it
    /// already, and a close wakes it at most once more.
    Harmless,
    /// It is told of free space to send, and not of input.
    Output,
    /// It is told of neither input nor output. Nothing but the close wakes it, and that without end.
    Nothing,
}

impl Interest {
    /// From the events of a member of an epoll set. The kernel adds EPOLLERR and EPOLLHUP to those that the process asks for, and
    /// removes them when EPOLLONESHOT has fired. Source: fs/eventpoll.c, do_epoll_ctl, ep_send_events; net/ipv4/tcp.c, tcp_poll.
    pub fn by_epoll(events: u32) -> Self {
        // include/uapi/linux/eventpoll.h
        const INPUT: u32 = 0x0001 | 0x0040 | 0x2000; // EPOLLIN, EPOLLRDNORM, EPOLLRDHUP
        const OUTPUT: u32 = 0x0004 | 0x0100; // EPOLLOUT, EPOLLWRNORM
        const HUP: u32 = 0x0010;
        const ONCE: u32 = 1 << 31 | 1 << 30; // EPOLLET, EPOLLONESHOT
        match events {
            _ if events & ONCE != 0 || events & HUP == 0 || events & INPUT != 0 => {
                Interest::Harmless
            }
            _ if events & OUTPUT != 0 => Interest::Output,
            _ => Interest::Nothing,
        }
    }

    /// From the events of a `struct pollfd`. Source: fs/select.c, do_pollfd.
    pub fn by_poll(events: u16) -> Self {
        Interest::by_epoll(u32::from(events) | 0x0018) // EPOLLERR, EPOLLHUP
    }
}

/// An epoll set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EpollSet {
    /// Its descriptor.
    pub fd: i32,
    /// Its members by inode. A member stays in the set even if the descriptor that added it has been closed.
    pub by_inode: HashMap<u64, Interest>,
    /// The members by the descriptor that added them, if the kernel does not show inodes (before Linux 5.2).
    pub by_fd: HashMap<i32, Interest>,
}

impl EpollSet {
    /// Parses /proc/PID/fdinfo of an epoll set. Each member is a line `tfd: 7 events: 19 data: 7 pos:0 ino:2a sdev:9`. On
    /// older kernels the line ends after `data`. Source: fs/eventpoll.c, ep_show_fdinfo.
    pub fn parse(fd: i32, fdinfo: &str) -> Self {
        let mut set = EpollSet {
            fd,
            ..EpollSet::default()
        };
        for line in fdinfo.lines().filter_map(|line| line.strip_prefix("tfd:")) {
            let mut words = line.split_whitespace();
            let number: Option<i32> = words.next().and_then(|number| number.parse().ok());
            let events = words.by_ref().skip_while(|word| *word != "events:").nth(1);
            // If the events cannot be read, the member counts as harmful.
            let events = events.and_then(|events| u32::from_str_radix(events, 16).ok());
            let interest = events.map_or(Interest::Nothing, Interest::by_epoll);
            let inode =
                words.find_map(|word| u64::from_str_radix(word.strip_prefix("ino:")?, 16).ok());
            // A file is in the set several times if it was added through several descriptors.
            match (inode, number) {
                (Some(inode), _) => keep_worst(&mut set.by_inode, inode, interest, |it| *it),
                (None, Some(number)) => keep_worst(&mut set.by_fd, number, interest, |it| *it),
                (None, None) => {}
            }
        }
        set
    }

    /// The interest in the file with this inode, which the process has as descriptor `fd`; `None` if it is not a member.
    pub fn interest_in(&self, fd: i32, inode: u64) -> Option<Interest> {
        let by_inode = self.by_inode.get(&inode);
        by_inode.max(self.by_fd.get(&fd)).copied()
    }
}

/// Adds a value, unless the one with the same key does as much harm: the first of two equal ones stays.
pub fn keep_worst<K: Hash + Eq, V>(
    kept: &mut HashMap<K, V>,
    key: K,
    value: V,
    interest: impl Fn(&V) -> Interest,
) {
    match kept.entry(key) {
        Entry::Occupied(mut known) if interest(&value) > interest(known.get()) => {
            known.insert(value);
        }
        Entry::Occupied(_) => {}
        Entry::Vacant(free) => {
            free.insert(value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Interest::{Harmless, Nothing, Output};

    #[test]
    fn epoll_sets_of_old_and_new_kernels_are_parsed() {
        let text = "pos:\t0\nflags:\t02\nmnt_id:\t15\nino:\t1057\n\
            tfd:        7 events:       19 data:                7  pos:0 ino:2a sdev:9\n\
            tfd:       11 events: 80000019 data: 7f00\n\
            tfd:       12 events:       18 data: 7f00\n";
        let expected = EpollSet {
            fd: 4,
            by_inode: [(42, Harmless)].into(),
            by_fd: [(11, Harmless), (12, Nothing)].into(),
        };
        let set = EpollSet::parse(4, text);
        assert_eq!(set, expected);
        assert_eq!(set.interest_in(7, 42), Some(Harmless));
        assert_eq!(set.interest_in(12, 43), Some(Nothing));
        assert_eq!(set.interest_in(7, 43), None, "another file");
    }

    #[test]
    fn the_worst_of_several_entries_counts() {
        let line =
            |tfd, events| format!("tfd: {tfd} events: {events} data: 0  pos:0 ino:2a sdev:9\n");
        for lines in [
            [line(7, "19"), line(8, "18")],
            [line(8, "18"), line(7, "19")],
        ] {
            let set = EpollSet::parse(4, &lines.concat());
            assert_eq!(set.interest_in(7, 42), Some(Nothing));
        }
    }

    #[test]
    fn only_a_level_triggered_member_without_input_is_harmful() {
        for (events, interest) in [
            (0x18, Nothing),
            (0x1a, Nothing),
            (0x2000_0018, Nothing),
            (0x1c, Output),
            (0x118, Output),
            (0x19, Harmless),
            (0x58, Harmless),
            (0x2018, Harmless),
            (0x1d, Harmless),
            (0x8000_0018, Harmless),
            (0x8000_001c, Harmless),
            (0x4000_0018, Harmless),
            // After it has fired.
            (0x4000_0000, Harmless),
        ] {
            assert_eq!(Interest::by_epoll(events), interest, "{events:x}");
        }
        for (events, interest) in [
            (0, Nothing),
            (2, Nothing),
            (4, Output),
            (1, Harmless),
            (0x2000, Harmless),
        ] {
            assert_eq!(Interest::by_poll(events), interest, "{events:x}");
        }
    }

    /// The kernel goes on to list the number under which the member was added. Another file can have this number by now.
    #[test]
    fn fact_a_duplicate_keeps_a_member_whose_descriptor_is_closed() {
        use nix::sys::stat::fstat;
        use rustix::event::epoll;
        use std::os::fd::AsRawFd;
        use std::os::unix::net::UnixStream;

        let (socket, peer) = UnixStream::pair().unwrap();
        let (inode, other) = (fstat(&socket).unwrap().st_ino, fstat(&peer).unwrap().st_ino);
        let set = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        let nothing = epoll::EventFlags::empty();
        epoll::add(&set, &socket, epoll::EventData::new_u64(0), nothing).unwrap();
        let fdinfo = || {
            let path = format!("/proc/thread-self/fdinfo/{}", set.as_raw_fd());
            std::fs::read_to_string(path).unwrap()
        };
        let closed = socket.as_raw_fd();
        let duplicate = socket.try_clone().unwrap();
        drop(socket);
        let text = fdinfo();
        let mut members = text.lines().filter_map(|line| line.strip_prefix("tfd:"));
        let number = members
            .next()
            .and_then(|line| line.split_whitespace().next());
        assert_eq!(number, Some(closed.to_string().as_str()), "{text}");
        let members = EpollSet::parse(0, &text);
        assert_eq!(
            members.interest_in(duplicate.as_raw_fd(), inode),
            Some(Nothing)
        );
        assert_eq!(members.interest_in(closed, other), None, "another file");
        drop(duplicate);
        assert_eq!(EpollSet::parse(0, &fdinfo()), EpollSet::default());
    }
}
