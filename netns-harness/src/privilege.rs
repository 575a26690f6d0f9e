//! Gets the privileges to create namespaces: root has them, and other users get them in a user namespace.

use std::fs;

use anyhow::{Context as _, Result, bail};
use caps::{CapSet, Capability};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Gid, Uid};

/// Environment variable that makes even root use a user namespace, unless it is empty or `0`. Lets root test both ways.
pub const FORCE_USERNS: &str = "NETNS_HARNESS_USERNS";

/// Ensures that this process may create network namespaces. If necessary, it enters a new user namespace in which the
/// current user is root.
///
/// Must be called while the process has a single thread; otherwise the kernel refuses the user namespace.
///
/// # Errors
/// The process is not root, and user namespaces are not allowed. The message says what to allow.
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
    // Containers often have one of these without the other.
    Ok(
        caps::has_cap(None, CapSet::Effective, Capability::CAP_SYS_ADMIN)?
            && caps::has_cap(None, CapSet::Effective, Capability::CAP_NET_ADMIN)?,
    )
}

fn enter_user_namespace() -> Result<()> {
    let (uid, gid) = (Uid::effective(), Gid::effective());
    unshare(CloneFlags::CLONE_NEWUSER).context("create a user namespace")?;
    // Since Linux 3.19, an unprivileged process must disable setgroups before it writes gid_map.
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

/// Creates a network namespace and drops it: AppArmor may allow the user namespace but not its use.
fn try_network_namespace() -> Result<()> {
    std::thread::spawn(|| unshare(CloneFlags::CLONE_NEWNET))
        .join()
        .expect("unshare does not panic")
        .context("create a network namespace")
}

/// Checks that a child process can become this user.
///
/// # Errors
/// This user namespace does not map the user.
pub(crate) fn ensure_mapped(uid: u32) -> Result<()> {
    let map = fs::read_to_string("/proc/self/uid_map").context("read /proc/self/uid_map")?;
    if is_mapped(&map, uid) {
        return Ok(());
    }
    bail!(
        "user {uid} is not mapped in this user namespace, which maps only the caller: run as root to use a second user"
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
