//! What can be read and counted without doing anything to anyone.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::net::{Ipv6Addr, TcpListener};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use anyhow::Context;
use caps::{CapSet, Capability, CapsHashSet};
use nix::sys::utsname::uname;
use nix::unistd::{geteuid, getpid};
use socket2::{Domain, Socket, Type};

use crate::finder::owners;
use crate::injector::rst::repair::RepairMode;
use crate::packet::capture::Capture;
use crate::packet::raw;
use crate::proc::netns::NetnsScope;
use crate::proc::{ProcFs, mounts};
use crate::sys::{self, RemoteFd};

/// The capabilities that some job needs, in the order they are shown.
pub const CAPABILITIES: [Capability; 5] = [
    Capability::CAP_NET_ADMIN,
    Capability::CAP_NET_RAW,
    Capability::CAP_SYS_PTRACE,
    Capability::CAP_DAC_READ_SEARCH,
    Capability::CAP_SYS_ADMIN,
];

/// What was read and counted.
#[derive(Debug)]
pub struct Host {
    /// The release of the kernel.
    pub kernel: String,
    /// The effective user.
    pub uid: u32,
    /// Those of [`CAPABILITIES`] that are effective.
    pub capabilities: CapsHashSet,
    /// We are in the first user namespace, where capabilities hold for everything; `None` without a /proc that tells.
    pub first_user_namespace: Option<bool>,
    /// A filter of system calls is on us: we may not read those of others.
    pub filtered: bool,
    /// What keeps users from making user namespaces of their own.
    pub user_namespaces_forbidden: Option<&'static str>,
    /// kernel.yama.ptrace_scope; `None` without that security module.
    pub ptrace_scope: Option<u8>,
    /// The hidepid option of /proc, unless it is off.
    pub hidepid: Option<String>,
    /// The network namespaces.
    pub namespaces: Result<Namespaces, String>,
    /// Into which processes we can see and reach.
    pub reach: Result<Reach, String>,
    /// pidfd_getfd(2) on ourselves, which nothing but the kernel's age or a filter of system calls refuses.
    pub pidfd_getfd: io::Result<()>,
    /// The kernel has kcmp(2), which tells who shares a table of descriptors.
    pub kcmp: bool,
    /// TCP_REPAIR on a socket of our own.
    pub repair: io::Result<()>,
    /// A raw socket, IPv4.
    pub raw_v4: io::Result<()>,
    /// A raw socket, IPv6.
    pub raw_v6: io::Result<()>,
    /// The packet socket that sees the ACK an `rst` without an owner goes by.
    pub capture: io::Result<()>,
    /// There is an IPv6 loopback address.
    pub ipv6: bool,
}

/// Network namespaces, ours among them.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Namespaces {
    /// Found.
    pub found: usize,
    /// Of those, how many can be worked in.
    pub enterable: usize,
    /// Processes whose namespace cannot be told.
    pub unknown: usize,
}

/// Other processes, without those that have no descriptors.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Reach {
    /// Of our effective user.
    pub same_user: Count,
    /// Of other users.
    pub others: Count,
    /// Those that are not reached, or not seen.
    pub missed: Vec<Missed>,
}

/// A process through which nothing can be closed.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Missed {
    /// Its number.
    pub pid: i32,
    /// Its name, where that can be read; chosen by the process.
    pub comm: Option<String>,
    /// It is of our effective user.
    pub same_user: bool,
    /// Its descriptors can be seen.
    pub seen: bool,
}

/// How many processes there are, and what we can do with them.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Count {
    /// That /proc shows.
    pub total: usize,
    /// Whose descriptors can be seen: they are known as owners.
    pub seen: usize,
    /// Of those, whose descriptors could be duplicated.
    pub reached: usize,
    /// Of those, how many have a filter of system calls (seccomp).
    pub filtered: usize,
}

impl Host {
    /// Reads and counts.
    ///
    /// # Errors
    /// The capabilities of this process cannot be read.
    pub fn gather(proc: &ProcFs) -> anyhow::Result<Self> {
        let effective = caps::read(None, CapSet::Effective)
            .context("cannot read the capabilities of this process")?;
        // Yama refuses all but our descendants, and writes each refusal to the log of the kernel (security/yama/yama_lsm.c,
        // report_access).
        let ptrace_scope = read_number("/proc/sys/kernel/yama/ptrace_scope")
            .and_then(|scope| u8::try_from(scope).ok());
        let scope = ptrace_scope.unwrap_or(0);
        let asks = scope == 0 || (scope < 3 && effective.contains(&Capability::CAP_SYS_PTRACE));
        Ok(Host {
            kernel: uname().map_or_else(
                |_| "unknown".into(),
                |name| name.release().to_string_lossy().into_owned(),
            ),
            uid: geteuid().as_raw(),
            capabilities: CAPABILITIES
                .into_iter()
                .filter(|c| effective.contains(c))
                .collect(),
            first_user_namespace: fs::metadata(proc.path("self/ns/user"))
                .ok()
                .map(|namespace| namespace.ino() == FIRST_USER_NAMESPACE),
            filtered: fs::read_to_string(proc.path("self/status"))
                .is_ok_and(|status| has_filter(&status)),
            user_namespaces_forbidden: user_namespaces_forbidden(),
            ptrace_scope,
            hidepid: mounts::hidepid(&proc.mounts().unwrap_or_default()),
            namespaces: namespaces(proc).map_err(|error| error.to_string()),
            reach: reach(proc, asks).map_err(|error| error.to_string()),
            pidfd_getfd: duplicate_own(),
            kcmp: has_kcmp(),
            repair: repair(),
            raw_v4: raw::try_open(false),
            raw_v6: raw::try_open(true),
            capture: Capture::open().and_then(|capture| capture.watch(&[])),
            ipv6: TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).is_ok(),
        })
    }

    /// Whether /proc shows us fewer processes than there are.
    pub fn hides_others(&self) -> bool {
        self.hidepid.is_some() && !self.has(Capability::CAP_SYS_PTRACE)
    }

    /// Whether a capability is effective.
    pub fn has(&self, capability: Capability) -> bool {
        self.capabilities.contains(&capability)
    }
}

/// Whether there is kcmp(2): it compares a process with itself for everybody.
fn has_kcmp() -> bool {
    let own = getpid().as_raw();
    let compared = sys::share_descriptors(own, own);
    compared.map_or_else(|error| error.raw_os_error() != Some(libc::ENOSYS), |_| true)
}

/// Its inode, the same on every host (include/linux/proc_ns.h, PROC_USER_INIT_INO). Its map of users is no mark: another one can map
/// everybody, too.
const FIRST_USER_NAMESPACE: u64 = 0xEFFF_FFFD;

/// Whether the process of this /proc/PID/status has a filter of system calls (fs/proc/array.c, task_seccomp).
fn has_filter(status: &str) -> bool {
    let mode = status
        .lines()
        .find_map(|line| line.strip_prefix("Seccomp:"));
    mode.is_some_and(|mode| mode.trim() == "2")
}

fn read_number(path: &str) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn user_namespaces_forbidden() -> Option<&'static str> {
    [
        (
            "/proc/sys/user/max_user_namespaces",
            0,
            "user.max_user_namespaces=0",
        ),
        (
            "/proc/sys/kernel/unprivileged_userns_clone",
            0,
            "kernel.unprivileged_userns_clone=0",
        ),
        (
            "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
            1,
            "kernel.apparmor_restrict_unprivileged_userns=1",
        ),
    ]
    .into_iter()
    .find_map(|(path, forbids, setting)| (read_number(path)? == forbids).then_some(setting))
}

fn namespaces(proc: &ProcFs) -> io::Result<Namespaces> {
    let all = NetnsScope::All.open(proc)?;
    let enterable = all.open.iter().filter(|netns| netns.within(|| ()).is_ok());
    Ok(Namespaces {
        enterable: enterable.count(),
        found: all.open.len() + all.unreachable,
        unknown: all.unknown,
    })
}

/// Counts. Where none of them is `asked`, they are out of reach.
fn reach(proc: &ProcFs, asked: bool) -> io::Result<Reach> {
    /// No socket has it: the kernel gives inode numbers of sockets from 1 on, and would take hundreds of years.
    const NO_INODE: u32 = u32::MAX;
    /// No process has it: it is beyond the highest fs.nr_open.
    const NO_DESCRIPTOR: RemoteFd = RemoteFd(i32::MAX);
    if !proc.is_of_our_pid_namespace() {
        return Err(io::Error::other(
            "/proc shows another pid namespace than cwkill runs in",
        ));
    }
    let unreadable: HashSet<i32> = owners::find(proc, &HashSet::from([NO_INODE]))?
        .unreadable
        .into_iter()
        .map(|process| process.pid)
        .collect();
    let mut reach = Reach::default();
    let ours = std::process::id().cast_signed();
    let uid = geteuid().as_raw();
    for (pid, comm) in proc.with_descriptors()? {
        let Ok(metadata) = fs::metadata(proc.path(&pid.to_string())) else {
            continue;
        };
        // The kernel looks at our rights before it looks for the descriptor (kernel/pid.c, __pidfd_fget), so one that does not
        // exist tells them without touching anything.
        let answer = sys::pidfd_open(pid).and_then(|pidfd| match asked {
            true => sys::pidfd_getfd(pidfd.as_fd(), NO_DESCRIPTOR),
            false => Err(io::Error::from_raw_os_error(libc::EPERM)),
        });
        let errno = answer.err().and_then(|error| error.raw_os_error());
        if pid == ours || errno == Some(libc::ESRCH) {
            continue;
        }
        let same_user = metadata.uid() == uid;
        let count = match same_user {
            true => &mut reach.same_user,
            false => &mut reach.others,
        };
        let (seen, reached) = (!unreadable.contains(&pid), errno == Some(libc::EBADF));
        count.total += 1;
        count.seen += usize::from(seen);
        count.reached += usize::from(seen && reached);
        let filtered = seen
            && reached
            && fs::read_to_string(proc.path(&format!("{pid}/status")))
                .is_ok_and(|status| has_filter(&status));
        count.filtered += usize::from(filtered);
        if !(seen && reached) {
            reach.missed.push(Missed {
                pid,
                comm,
                same_user,
                seen,
            });
        }
    }
    Ok(reach)
}

fn socket() -> io::Result<OwnedFd> {
    Ok(Socket::new(Domain::IPV4, Type::STREAM, None)?.into())
}

fn duplicate_own() -> io::Result<()> {
    let socket = socket()?;
    let ours = sys::pidfd_open(std::process::id().cast_signed())?;
    sys::pidfd_getfd(ours.as_fd(), RemoteFd(socket.as_raw_fd())).map(drop)
}

fn repair() -> io::Result<()> {
    RepairMode::enter(socket()?.as_fd()).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_is_read_from_the_status() {
        assert!(has_filter("Name:\tx\nSeccomp:\t2\nSeccomp_filters:\t1\n"));
        assert!(!has_filter("Name:\tSeccomp: 2\nSeccomp:\t0\n"));
        assert!(!has_filter(""));
    }

    #[test]
    fn our_own_descriptors_can_be_duplicated() {
        duplicate_own().unwrap();
    }
}
