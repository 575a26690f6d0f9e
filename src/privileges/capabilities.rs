//! Least privilege: the capabilities that a command needs, and how cwkill drops all others.
//!
//! A thread inherits the capabilities of the thread that starts it, so cwkill drops them before it starts the first one. cwkill
//! starts no other program than itself, to read symbols (`trace`). If an attacker makes it start one, no_new_privs and an empty bounding
//! set keep that program from gaining privileges.

use anyhow::Context;
use caps::{CapSet, Capability, CapsHashSet};
use nix::sys::prctl;

use crate::kernel::KernelVersion;
use crate::model::Method;
use crate::proc::netns::NetnsScope;

/// The capabilities for listing sockets in `netns`, with or without their `owners`. `selects_owners`: whether only sockets of certain
/// owners are listed.
pub fn to_find(netns: &NetnsScope, owners: bool, selects_owners: bool) -> CapsHashSet {
    // /proc/PID/fd of another user needs both: CAP_DAC_READ_SEARCH for the directory (fs/proc/fd.c, proc_fd_permission), and
    // CAP_SYS_PTRACE for the links in it (fs/proc/base.c, proc_fd_access_allowed).
    let to_read_proc = [Capability::CAP_SYS_PTRACE, Capability::CAP_DAC_READ_SEARCH];
    // cwkill finds other namespaces in /proc/PID/ns, which needs the same (fs/proc/namespaces.c, proc_ns_readlink).
    let reads_proc = owners || *netns != NetnsScope::Current;
    let mut needed: CapsHashSet = to_read_proc.into_iter().filter(|_| reads_proc).collect();
    // cwkill follows the sockets of selected owners, and with --all-netns of all, into namespaces that nothing else leads to.
    let follows_sockets = owners && (*netns == NetnsScope::All || selects_owners);
    if follows_sockets {
        // net/socket.c, sock_ioctl, SIOCGSKNS.
        needed.insert(Capability::CAP_NET_ADMIN);
    }
    if *netns != NetnsScope::Current || follows_sockets {
        // net/core/net_namespace.c, netns_install.
        needed.insert(Capability::CAP_SYS_ADMIN);
    }
    needed
}

/// The capabilities that `methods` need in addition to [`to_find`].
pub fn to_act(methods: &[Method]) -> CapsHashSet {
    let needs = |method: &Method| match method {
        // Duplicating a descriptor of an owner needs the same right as reading its /proc.
        Method::Shutdown => [].as_slice(),
        Method::Probe => &[Capability::CAP_NET_RAW],
        Method::Destroy => &[Capability::CAP_NET_ADMIN],
        // CAP_NET_ADMIN for repair mode.
        Method::Rst => &[Capability::CAP_NET_RAW, Capability::CAP_NET_ADMIN],
    };
    methods.iter().flat_map(needs).copied().collect()
}

/// The capabilities for forwarded connections: CAP_NET_ADMIN reads conntrack (net/netfilter/nfnetlink.c, nfnetlink_rcv), and CAP_NET_RAW
/// opens the packet sockets of a run that `acts`.
pub fn for_gateway(acts: bool) -> CapsHashSet {
    let raw = acts.then_some(Capability::CAP_NET_RAW);
    [Capability::CAP_NET_ADMIN].into_iter().chain(raw).collect()
}

/// The capabilities for reading iterators that are loaded: none since Linux 5.19. Before, every call of bpf(2) needed CAP_BPF or
/// CAP_SYS_ADMIN, unless `kernel.unprivileged_bpf_disabled` was 0 (kernel/bpf/syscall.c, __sys_bpf; commit c8644cd0efe7). `forbidden`:
/// whether it is not 0.
pub fn to_read_iterators(kernel: KernelVersion, forbidden: bool) -> CapsHashSet {
    match forbidden && kernel < KernelVersion::FREES_LOADED_ITERATORS {
        true => [Capability::CAP_BPF, Capability::CAP_SYS_ADMIN].into(),
        false => CapsHashSet::new(),
    }
}

/// The capability for closing descriptors inside their owners, in addition to [`to_find`]: CAP_SYS_ADMIN reads seccomp filters
/// (kernel/seccomp.c, seccomp_get_filter).
pub fn to_reclaim() -> CapsHashSet {
    CapsHashSet::from([Capability::CAP_SYS_ADMIN])
}

/// Drops all capabilities that are not in `needed`, for good. Call it before the first thread is started.
///
/// Without CAP_SYS_PTRACE the effective and permitted sets stay as they are. To read another process, cwkill then needs at least the
/// capabilities of that process (security/commoncap.c, cap_ptrace_access_check). If root of a container dropped some, it could no
/// longer read its neighbours.
///
/// # Errors
/// A seccomp filter refuses a step. The other steps are done all the same; the error is the first refusal.
pub fn drop_all_but(needed: &CapsHashSet) -> anyhow::Result<()> {
    drop_and_hand_down(needed, &CapsHashSet::new())
}

/// As [`drop_all_but`]. The programs that cwkill starts get those of `handed` that it has itself.
///
/// # Errors
/// As [`drop_all_but`].
pub fn drop_and_hand_down(needed: &CapsHashSet, handed: &CapsHashSet) -> anyhow::Result<()> {
    // It reads the bounding set once, which is cleared below.
    super::may_raise_hard_limits();
    let mut first_error = Ok(());
    let mut note = |result: anyhow::Result<()>| {
        if first_error.is_ok() {
            first_error = result;
        }
    };
    note(prctl::set_no_new_privs().context("cannot set no_new_privs"));
    let read = |set| caps::read(None, set).with_context(|| format!("cannot read the {set:?} set"));
    let drop_to = |set, keep: &CapsHashSet| {
        caps::set(None, set, keep).with_context(|| format!("cannot reduce the {set:?} set"))
    };
    let handed = read(CapSet::Permitted).map(|held| held.intersection(handed).copied().collect());
    let handed: CapsHashSet = handed.unwrap_or_default();
    // What is not in the bounding set can no longer be made inheritable.
    note(drop_to(CapSet::Inheritable, &handed));
    // This needs CAP_SETPCAP. Without CAP_SETPCAP the set stays, and no_new_privs makes it harmless.
    if read(CapSet::Effective).is_ok_and(|set| set.contains(&Capability::CAP_SETPCAP)) {
        note(caps::clear(None, CapSet::Bounding).context("cannot clear the bounding set"));
    }
    // Kernels before 4.3 have no ambient set.
    if caps::runtime::ambient_set_supported().is_ok() {
        note(drop_to(CapSet::Ambient, &handed));
    }
    match read(CapSet::Permitted) {
        Ok(permitted) if permitted.contains(&Capability::CAP_SYS_PTRACE) => {
            let keep = |held: &CapsHashSet| held.intersection(needed).copied().collect();
            let effective = read(CapSet::Effective);
            note(effective.and_then(|held| drop_to(CapSet::Effective, &keep(&held))));
            note(drop_to(CapSet::Permitted, &keep(&permitted)));
        }
        Ok(_) => {}
        Err(error) => note(Err(error)),
    }
    first_error
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listing_needs_to_see_and_nothing_else() {
        let here = to_find(&NetnsScope::Current, true, false);
        assert_eq!(here.len(), 2);
        assert!(to_find(&NetnsScope::Current, false, true).is_empty());
        assert!(here.contains(&Capability::CAP_SYS_PTRACE));
        let added = |needed: CapsHashSet| -> CapsHashSet { &needed - &here };
        let named = NetnsScope::Named("blue".into());
        let enter = [Capability::CAP_SYS_ADMIN].into();
        assert_eq!(added(to_find(&named, true, false)), enter);
        // The namespace of a socket.
        let follow = [Capability::CAP_SYS_ADMIN, Capability::CAP_NET_ADMIN].into();
        assert_eq!(added(to_find(&NetnsScope::All, true, false)), follow);
        assert_eq!(added(to_find(&NetnsScope::Current, true, true)), follow);
        assert_eq!(added(to_find(&NetnsScope::All, false, false)), enter);
    }

    #[test]
    fn a_loaded_iterator_needs_a_capability_on_old_kernels_only() {
        let needs = |kernel, forbidden| to_read_iterators(kernel, forbidden).len();
        assert_eq!(needs(KernelVersion(5, 18), true), 2);
        assert_eq!(needs(KernelVersion(5, 18), false), 0);
        assert_eq!(needs(KernelVersion(5, 19), true), 0);
        assert_eq!(needs(KernelVersion(6, 18), true), 0);
    }

    #[test]
    fn methods_add_what_they_need() {
        let needs = |methods: &[Method]| to_act(methods);
        assert!(needs(&[Method::Shutdown]).is_empty());
        assert_eq!(
            needs(&[Method::Destroy]),
            CapsHashSet::from([Capability::CAP_NET_ADMIN])
        );
        assert_eq!(
            needs(&[Method::Probe]),
            CapsHashSet::from([Capability::CAP_NET_RAW])
        );
        assert_eq!(needs(&Method::AUTO).len(), 2);
    }
}
