//! Least privilege: which capabilities a job needs, and giving up all others.
//!
//! What is given up is given up for every thread that is started later, so it is done before the first. cwkill starts no other
//! program; no_new_privs and an empty bounding set see to it that one it might be tricked into starting has no more rights.

use anyhow::Context;
use caps::{CapSet, Capability, CapsHashSet};
use nix::sys::prctl;

use crate::model::Method;
use crate::proc::netns::NetnsScope;

/// What it takes to list sockets in `netns`, with their `owners` or without.
pub fn to_find(netns: &NetnsScope, owners: bool) -> CapsHashSet {
    // Reading /proc/PID/fd of another user needs both: the directory is its owner's (fs/proc/fd.c, proc_fd_permission), and so are
    // the links in it (fs/proc/base.c, proc_fd_access_allowed).
    let see = [Capability::CAP_SYS_PTRACE, Capability::CAP_DAC_READ_SEARCH];
    // The namespaces of the others are found in /proc/PID/ns, behind the same door (fs/proc/namespaces.c, proc_ns_readlink).
    let sees = owners || *netns != NetnsScope::Current;
    let mut needed: CapsHashSet = see.into_iter().filter(|_| sees).collect();
    if *netns != NetnsScope::Current {
        // net/core/net_namespace.c, netns_install.
        needed.insert(Capability::CAP_SYS_ADMIN);
    }
    needed
}

/// What `methods` need beyond [`to_find`].
pub fn to_act(methods: &[Method]) -> CapsHashSet {
    let needs = |method: &Method| match method {
        // The right to reach into an owner is the one to see it.
        Method::Shutdown => [].as_slice(),
        Method::Probe => &[Capability::CAP_NET_RAW],
        Method::Destroy => &[Capability::CAP_NET_ADMIN],
        // CAP_NET_ADMIN for repair mode.
        Method::Rst => &[Capability::CAP_NET_RAW, Capability::CAP_NET_ADMIN],
    };
    methods.iter().flat_map(needs).copied().collect()
}

/// What it takes to close descriptors inside their owners, beyond [`to_find`]: to read a seccomp filter
/// (kernel/seccomp.c, seccomp_get_filter).
pub fn to_reclaim() -> CapsHashSet {
    CapsHashSet::from([Capability::CAP_SYS_ADMIN])
}

/// Gives up what is not in `needed`, and the right to get it back. Call it before the first thread.
///
/// Without CAP_SYS_PTRACE the capabilities in use stay: a process lets in only who has all that it has
/// itself (security/commoncap.c, cap_ptrace_access_check), so that root of a container could no longer look into its neighbours.
///
/// # Errors
/// A filter of system calls (seccomp) refuses a part of it. The rest is given up all the same; the first refusal is told.
pub fn drop_all_but(needed: &CapsHashSet) -> anyhow::Result<()> {
    let mut first = Ok(());
    let mut note = |result: anyhow::Result<()>| {
        if first.is_ok() {
            first = result;
        }
    };
    note(prctl::set_no_new_privs().context("cannot set no_new_privs"));
    let read = |set| caps::read(None, set).with_context(|| format!("cannot read the {set:?} set"));
    let drop_to = |set, keep: &CapsHashSet| {
        caps::set(None, set, keep).with_context(|| format!("cannot reduce the {set:?} set"))
    };
    // First of all, while CAP_SETPCAP is there; without it the set stays, and no_new_privs makes it harmless.
    if read(CapSet::Effective).is_ok_and(|set| set.contains(&Capability::CAP_SETPCAP)) {
        note(caps::clear(None, CapSet::Bounding).context("cannot clear the bounding set"));
    }
    // A kernel before 4.3 has no ambient set, and nothing in it.
    if caps::runtime::ambient_set_supported().is_ok() {
        note(caps::clear(None, CapSet::Ambient).context("cannot clear the ambient set"));
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
    note(drop_to(CapSet::Inheritable, &CapsHashSet::new()));
    first
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listing_needs_to_see_and_nothing_else() {
        let here = to_find(&NetnsScope::Current, true);
        assert_eq!(here.len(), 2);
        assert!(to_find(&NetnsScope::Current, false).is_empty());
        assert!(here.contains(&Capability::CAP_SYS_PTRACE));
        for elsewhere in [NetnsScope::All, NetnsScope::Named("blue".into())] {
            let added: Vec<_> = to_find(&elsewhere, true)
                .difference(&here)
                .copied()
                .collect();
            assert_eq!(added, [Capability::CAP_SYS_ADMIN]);
        }
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
