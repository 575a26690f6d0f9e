//! Whether the cgroup of a process is frozen.

use std::fs;

use super::ProcFs;
use super::mounts::freezer;
use super::status::thread_state;

/// The functions in which a thread of a frozen cgroup (v2) waits. Source: kernel/signal.c, do_freezer_trap, which the compiler may
/// put into get_signal.
const TRAPS: [&str; 2] = ["do_freezer_trap", "get_signal"];

impl ProcFs {
    /// Whether process `pid` stands still because its cgroup is frozen. `false` if cwkill cannot see it.
    ///
    /// Frozen by cgroup v2, a thread sleeps at the place where it would handle signals; by v1, where nothing interrupts it. The
    /// files of cgroup v2 are not needed for it: in many containers they cannot be seen.
    pub(crate) fn is_frozen(&self, pid: i32) -> bool {
        let stat = fs::read(self.path(&format!("{pid}/stat"))).unwrap_or_default();
        match thread_state(&stat) {
            Some(b'S') => {
                let place = fs::read_to_string(self.path(&format!("{pid}/wchan")));
                place.is_ok_and(|place| TRAPS.contains(&place.trim_end()))
            }
            Some(b'D') => self.is_in_frozen_v1(pid),
            _ => false,
        }
    }

    fn is_in_frozen_v1(&self, pid: i32) -> bool {
        let frozen = || {
            let mounts = self.mounts().ok()?;
            let (root, mount_point) = freezer(&mounts)?;
            let text = fs::read(self.path(&format!("{pid}/cgroup"))).ok()?;
            let path = freezer_path(&String::from_utf8_lossy(&text), &root)?;
            let state = mount_point.join(path).join("freezer.state");
            let state = fs::read_to_string(state).ok()?;
            Some(matches!(state.trim_end(), "FROZEN" | "FREEZING"))
        };
        frozen().unwrap_or(false)
    }
}

/// The path of a process below the mount point of the freezer hierarchy, of which `root` is mounted. `cgroup` is the text of its
/// /proc/PID/cgroup.
fn freezer_path(cgroup: &str, root: &str) -> Option<String> {
    let path = cgroup.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let controllers = fields.next()?;
        let is_freezer = controllers.split(',').any(|name| name == "freezer");
        is_freezer.then(|| fields.next())?
    })?;
    let below = path.strip_prefix(root.trim_end_matches('/'))?;
    Some(below.trim_start_matches('/').to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_freezer_has_its_own_path() {
        let text = "5:cpu,freezer:/a/b\n1:name=systemd:/c\n0::/d\n";
        assert_eq!(freezer_path(text, "/").as_deref(), Some("a/b"));
        assert_eq!(freezer_path(text, "/a").as_deref(), Some("b"));
        assert_eq!(freezer_path(text, "/x"), None);
        assert_eq!(freezer_path("0::/d\n", "/"), None);
    }

    #[test]
    fn this_process_is_not_frozen() {
        let pid = i32::try_from(std::process::id()).unwrap();
        assert!(!ProcFs::default().is_frozen(pid));
    }
}
