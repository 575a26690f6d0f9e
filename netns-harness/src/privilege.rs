//! Becoming somebody who may build namespaces: root as we are, anybody else as root of a user namespace.

use std::fs;

use anyhow::{Context as _, Result, bail};
use caps::{CapSet, Capability};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Gid, Uid};

/// Set to anything but `0` or nothing, it makes even root use a user namespace, so that one run tests both ways.
pub const FORCE_USERNS: &str = "NETNS_HARNESS_USERNS";

/// Makes sure that this process may create network namespaces, if need be by entering a user namespace of its own in
/// which the caller's user is root.
///
/// Must be called while the process has a single thread: the kernel refuses a user namespace to any other.
///
/// # Errors
/// Neither root nor unprivileged user namespaces are to be had; the message says what to allow.
pub fn ensure_privileges() -> Result<()> {
    let forced =
        std::env::var_os(FORCE_USERNS).is_some_and(|value| !value.is_empty() && value != "0");
    let allowed = match !forced && may_build()? {
        true => try_network_namespace(),
        false => enter_user_namespace().and_then(|()| try_network_namespace()),
    };
    allowed.with_context(|| {
        "cannot build network namespaces: run as root, or allow unprivileged user namespaces (sysctl \
         kernel.unprivileged_userns_clone=1 where it exists, user.max_user_namespaces and user.max_net_namespaces \
         above 0, kernel.apparmor_restrict_unprivileged_userns=0 where it exists; in a container, a seccomp profile \
         that allows unshare)"
    })
}

fn may_build() -> Result<bool> {
    // NET_ADMIN too: containers often have one without the other.
    Ok(
        caps::has_cap(None, CapSet::Effective, Capability::CAP_SYS_ADMIN)?
            && caps::has_cap(None, CapSet::Effective, Capability::CAP_NET_ADMIN)?,
    )
}

fn enter_user_namespace() -> Result<()> {
    let (uid, gid) = (Uid::effective(), Gid::effective());
    unshare(CloneFlags::CLONE_NEWUSER).context("create a user namespace")?;
    // Since Linux 3.19 an unprivileged gid_map needs setgroups given up first.
    for (file, content) in [
        ("setgroups", "deny".to_owned()),
        ("uid_map", format!("0 {uid} 1")),
        ("gid_map", format!("0 {gid} 1")),
    ] {
        let path = format!("/proc/self/{file}");
        fs::write(&path, content).with_context(|| format!("write {path}"))?;
    }
    Ok(())
}

/// AppArmor lets the user namespace come into being, and refuses what is done in it.
fn try_network_namespace() -> Result<()> {
    std::thread::spawn(|| unshare(CloneFlags::CLONE_NEWNET))
        .join()
        .expect("unshare does not panic")
        .context("create a network namespace")
}

/// Can a process of ours become this user?
///
/// # Errors
/// Not in this user namespace; the message says why.
pub(crate) fn ensure_mapped(uid: u32) -> Result<()> {
    let map = fs::read_to_string("/proc/self/uid_map").context("read /proc/self/uid_map")?;
    if is_mapped(&map, uid) {
        return Ok(());
    }
    bail!(
        "user {uid} is not mapped in this user namespace (only the caller's own is): run as root for a second user"
    )
}

fn is_mapped(map: &str, uid: u32) -> bool {
    map.lines().any(|line| {
        let mut numbers = line.split_whitespace().map(str::parse::<u64>);
        let (Some(Ok(inside)), Some(Ok(_)), Some(Ok(count))) =
            (numbers.next(), numbers.next(), numbers.next())
        else {
            return false;
        };
        (inside..inside + count).contains(&u64::from(uid))
    })
}

#[cfg(test)]
mod tests {
    use super::is_mapped;

    #[test]
    fn a_uid_is_mapped_if_one_line_covers_it() {
        let map = "         0          0          1\n      1000       1000         10\n";
        for (uid, mapped) in [
            (0, true),
            (1, false),
            (999, false),
            (1000, true),
            (1009, true),
            (1010, false),
        ] {
            assert_eq!(is_mapped(map, uid), mapped, "{uid}");
        }
        assert!(is_mapped("0 0 4294967295", 65534));
    }
}
