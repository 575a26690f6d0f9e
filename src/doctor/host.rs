//! Facts about the host that can be read without any effect on other processes.

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

use super::confinement::Confinement;
use super::container_names::{self, ContainerNames};
use crate::conntrack::{self, EventsSent};
use crate::finder::owners;
use crate::injector::rst::repair::RepairMode;
use crate::packet::capture::{Capture, Seen};
use crate::packet::raw;
use crate::privileges::FIRST_USER_NAMESPACE;
use crate::proc::netns::NetnsScope;
use crate::proc::status::has_seccomp_filter;
use crate::proc::{Inodes, ProcFs, mounts};
use crate::sys::{self, RemoteFd};

/// The capabilities that cwkill can use, in the order of the report.
pub const CAPABILITIES: [Capability; 5] = [
    Capability::CAP_NET_ADMIN,
    Capability::CAP_NET_RAW,
    Capability::CAP_SYS_PTRACE,
    Capability::CAP_DAC_READ_SEARCH,
    Capability::CAP_SYS_ADMIN,
];

#[derive(Debug)]
pub struct HostInfo {
    /// The kernel release, as in `uname -r`.
    pub kernel: String,
    /// The effective user id.
    pub uid: u32,
    /// The effective capabilities, of [`CAPABILITIES`].
    pub capabilities: CapsHashSet,
    /// Whether cwkill runs in the initial user namespace, where capabilities count everywhere. `None`: /proc does not show it.
    pub first_user_namespace: Option<bool>,
    /// A seccomp filter is on cwkill itself. Then the kernel does not let it read the filters of other processes.
    pub has_seccomp_filter: bool,
    /// The sysctl that keeps users from creating user namespaces.
    pub user_namespaces_forbidden: Option<&'static str>,
    /// kernel.yama.ptrace_scope; `None` without Yama.
    pub ptrace_scope: Option<u8>,
    /// The hidepid option of /proc; `None` if it is off.
    pub hidepid: Option<String>,
    pub namespaces: Result<NamespaceCounts, String>,
    pub reachability: Result<Reachability, String>,
    /// pidfd_getfd(2) on cwkill itself. It fails only on a kernel older than 5.6 or under a seccomp filter.
    pub pidfd_getfd: io::Result<()>,
    /// The kernel has kcmp(2), which shows whether two processes share a descriptor table.
    pub kcmp: bool,
    /// TCP_REPAIR on a socket of cwkill.
    pub repair: io::Result<()>,
    /// A raw IPv4 socket.
    pub raw_v4: io::Result<()>,
    /// A raw IPv6 socket.
    pub raw_v6: io::Result<()>,
    /// The packet socket that captures the elicited ACK for an `rst` without an owner.
    pub capture: io::Result<()>,
    /// How many entries conntrack has in this network namespace, and how many it may have; `None` if it is not loaded.
    pub tracked: Option<(u64, u64)>,
    /// When conntrack sends events in this network namespace; `None` if it is not loaded.
    pub conntrack_events: Option<EventsSent>,
    /// The host has an IPv6 loopback address.
    pub ipv6: bool,
    /// Whether the kernel's iterator over the descriptors of all processes works, or why not.
    pub iterator: Result<(), String>,
    /// The containers whose names can be read.
    pub container_names: Result<ContainerNames, String>,
    /// What confines cwkill.
    pub confinement: Confinement,
}

/// Network namespaces, with the one of cwkill.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct NamespaceCounts {
    pub total: usize,
    /// Those that cwkill can enter.
    pub enterable: usize,
    /// Number of processes whose namespace is unknown.
    pub unknown_processes: usize,
}

/// The other processes that /proc shows, without kernel threads and zombies, which have no descriptors.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Reachability {
    /// Processes of the effective user of cwkill.
    pub same_user: ProcessCounts,
    /// Processes of other users.
    pub others: ProcessCounts,
    /// Processes that are not visible or not reachable.
    pub unreachable: Vec<UnreachableProcess>,
}

/// A process whose descriptors cwkill cannot duplicate.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct UnreachableProcess {
    pub pid: i32,
    /// `None` if unreadable. The process can set it to any text.
    pub comm: Option<String>,
    /// The process has the effective user of cwkill.
    pub same_user: bool,
    /// cwkill can read its descriptor table.
    pub seen: bool,
}

/// Each count is a part of the one before it.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct ProcessCounts {
    /// Processes that /proc shows.
    pub total: usize,
    /// Processes whose descriptor table cwkill can read. Only these can be known as owners.
    pub visible: usize,
    /// Processes whose descriptors cwkill can duplicate.
    pub reachable: usize,
    /// Processes with a seccomp filter.
    pub with_seccomp: usize,
}

impl HostInfo {
    /// Reads the facts.
    ///
    /// # Errors
    /// The capabilities of this process cannot be read.
    pub fn read(proc: &ProcFs, iterator: Result<(), String>) -> anyhow::Result<Self> {
        let effective = caps::read(None, CapSet::Effective)
            .context("cannot read the capabilities of this process")?;
        // Yama refuses access to all processes but descendants of cwkill, and logs each refusal in the kernel log
        // (security/yama/yama_lsm.c, report_access). So cwkill does not probe if Yama would refuse.
        let ptrace_scope = read_number("/proc/sys/kernel/yama/ptrace_scope")
            .and_then(|scope| u8::try_from(scope).ok());
        let scope = ptrace_scope.unwrap_or(0);
        let may_probe =
            scope == 0 || (scope < 3 && effective.contains(&Capability::CAP_SYS_PTRACE));
        Ok(HostInfo {
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
            has_seccomp_filter: proc.filters_own_calls(),
            user_namespaces_forbidden: user_namespaces_forbidden(),
            ptrace_scope,
            hidepid: mounts::hidepid(&proc.mounts().unwrap_or_default()),
            namespaces: namespaces(proc).map_err(|error| error.to_string()),
            reachability: reachability(proc, may_probe).map_err(|error| error.to_string()),
            pidfd_getfd: duplicate_own(),
            kcmp: has_kcmp(),
            repair: repair(),
            raw_v4: raw::try_open(false),
            raw_v6: raw::try_open(true),
            capture: Capture::open().and_then(|capture| capture.filter_for(Seen::Leaving, &[])),
            tracked: conntrack::table_use(),
            conntrack_events: conntrack::events_sent(),
            ipv6: TcpListener::bind((Ipv6Addr::LOCALHOST, 0)).is_ok(),
            iterator,
            container_names: container_names::read(proc).map_err(|error| error.to_string()),
            confinement: Confinement::read(proc),
        })
    }

    /// Whether /proc hides the processes of other users from cwkill.
    pub fn hides_others(&self) -> bool {
        self.hidepid.is_some() && !self.has(Capability::CAP_SYS_PTRACE)
    }

    pub fn has(&self, capability: Capability) -> bool {
        self.capabilities.contains(&capability)
    }
}

/// Whether the kernel has kcmp(2). To compare a process with itself needs no privilege.
fn has_kcmp() -> bool {
    let own = getpid().as_raw();
    let compared = sys::share_descriptors(own, own);
    compared.map_or_else(|error| error.raw_os_error() != Some(libc::ENOSYS), |_| true)
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

fn namespaces(proc: &ProcFs) -> io::Result<NamespaceCounts> {
    let all = NetnsScope::All.open(proc)?;
    let enterable = all.open.iter().filter(|netns| netns.within(|| ()).is_ok());
    Ok(NamespaceCounts {
        enterable: enterable.count(),
        total: all.open.len() + all.unreachable,
        unknown_processes: all.unknown,
    })
}

/// Counts the processes that cwkill can reach. With `probe == false` nothing is probed, and all other processes count as
/// unreachable.
fn reachability(proc: &ProcFs, probe: bool) -> io::Result<Reachability> {
    /// An inode number that no socket has, because only the list of unreadable processes is needed.
    const NO_INODE: u32 = u32::MAX;
    /// A descriptor that no process has: it is above the highest possible fs.nr_open.
    const NO_DESCRIPTOR: RemoteFd = RemoteFd(i32::MAX);
    if !proc.shows_own_pid_namespace() {
        return Err(io::Error::other(
            "/proc shows another pid namespace than cwkill runs in",
        ));
    }
    let unreadable: HashSet<i32> = owners::find(proc, &Inodes::from_iter([NO_INODE]))?
        .unreadable
        .into_iter()
        .map(|process| process.pid)
        .collect();
    let mut reachability = Reachability::default();
    let own_pid = std::process::id().cast_signed();
    let uid = geteuid().as_raw();
    for (pid, comm) in proc.with_descriptors()? {
        let Ok(metadata) = fs::metadata(proc.path(&pid.to_string())) else {
            continue;
        };
        // The kernel checks the rights of the caller before it looks up the descriptor (kernel/pid.c, __pidfd_fget). So a
        // descriptor that does not exist shows the rights and has no effect: EBADF means that access is allowed.
        let answer = sys::pidfd_open(pid).and_then(|pidfd| match probe {
            true => sys::pidfd_getfd(pidfd.as_fd(), NO_DESCRIPTOR),
            false => Err(io::Error::from_raw_os_error(libc::EPERM)),
        });
        let errno = answer.err().and_then(|error| error.raw_os_error());
        if pid == own_pid || errno == Some(libc::ESRCH) {
            continue;
        }
        let same_user = metadata.uid() == uid;
        let count = match same_user {
            true => &mut reachability.same_user,
            false => &mut reachability.others,
        };
        let (seen, reachable) = (!unreadable.contains(&pid), errno == Some(libc::EBADF));
        count.total += 1;
        count.visible += usize::from(seen);
        count.reachable += usize::from(seen && reachable);
        let filtered = seen
            && reachable
            && fs::read_to_string(proc.path(&format!("{pid}/status")))
                .is_ok_and(|status| has_seccomp_filter(&status));
        count.with_seccomp += usize::from(filtered);
        if !(seen && reachable) {
            reachability.unreachable.push(UnreachableProcess {
                pid,
                comm,
                same_user,
                seen,
            });
        }
    }
    Ok(reachability)
}

fn socket() -> io::Result<OwnedFd> {
    Ok(Socket::new(Domain::IPV4, Type::STREAM, None)?.into())
}

fn duplicate_own() -> io::Result<()> {
    let socket = socket()?;
    let pidfd = sys::pidfd_open(std::process::id().cast_signed())?;
    sys::pidfd_getfd(pidfd.as_fd(), RemoteFd(socket.as_raw_fd())).map(drop)
}

fn repair() -> io::Result<()> {
    RepairMode::enter(socket()?.as_fd()).map(drop)
}

#[cfg(test)]
pub(super) mod testdata {
    use super::*;

    /// A host on which nothing is missing but capabilities.
    pub fn host(capabilities: &[Capability]) -> HostInfo {
        HostInfo {
            kernel: "6.18.0".into(),
            uid: 0,
            capabilities: capabilities.iter().copied().collect(),
            first_user_namespace: Some(true),
            has_seccomp_filter: false,
            user_namespaces_forbidden: None,
            ptrace_scope: None,
            hidepid: None,
            namespaces: Ok(NamespaceCounts::default()),
            reachability: Ok(Reachability::default()),
            pidfd_getfd: Ok(()),
            kcmp: true,
            repair: Ok(()),
            raw_v4: Ok(()),
            raw_v6: Ok(()),
            capture: Ok(()),
            tracked: None,
            conntrack_events: None,
            ipv6: true,
            iterator: Ok(()),
            container_names: Ok(ContainerNames::default()),
            confinement: Confinement::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_descriptors_can_be_duplicated() {
        duplicate_own().unwrap();
    }
}
