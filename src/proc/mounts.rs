//! The mounts that this process sees, from /proc/self/mountinfo.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use procfs::process::MountInfo;

use super::ProcFs;

impl ProcFs {
    /// The mounts of this process, oldest first. A line that cannot be parsed is left out.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn mounts(&self) -> io::Result<Vec<MountInfo>> {
        let text = fs::read(self.path("self/mountinfo"))?;
        Ok(parse(&String::from_utf8_lossy(&text)))
    }
}

fn parse(mountinfo: &str) -> Vec<MountInfo> {
    let lines = mountinfo.lines();
    lines
        .filter_map(|line| MountInfo::from_line(line).ok())
        .collect()
}

/// The mount points of network namespaces.
pub(crate) fn network_namespaces(mounts: &[MountInfo]) -> impl Iterator<Item = PathBuf> {
    let is_netns = |mount: &&MountInfo| mount.fs_type == "nsfs" && mount.root.starts_with("net:[");
    let mounts = mounts.iter().filter(is_netns);
    mounts.map(|mount| unescape(&mount.mount_point))
}

/// The mount point of cgroup v2.
pub(crate) fn cgroup2(mounts: &[MountInfo]) -> Option<PathBuf> {
    let mount = mounts.iter().find(|mount| mount.fs_type == "cgroup2")?;
    Some(unescape(&mount.mount_point))
}

/// The freezer hierarchy of cgroup v1: the cgroup that is mounted, and where.
pub(crate) fn freezer(mounts: &[MountInfo]) -> Option<(String, PathBuf)> {
    let is_freezer = |mount: &&MountInfo| {
        mount.fs_type == "cgroup" && mount.super_options.contains_key("freezer")
    };
    let mount = mounts.iter().find(is_freezer)?;
    Some((mount.root.clone(), unescape(&mount.mount_point)))
}

/// The value of the option `hidepid` of /proc, if it hides processes. The last mount counts.
///
/// Source: fs/proc/root.c, proc_show_options. Before Linux 5.8 all values were numbers.
pub(crate) fn hidepid(mounts: &[MountInfo]) -> Option<String> {
    let is_proc =
        |mount: &&MountInfo| mount.fs_type == "proc" && mount.mount_point == Path::new("/proc");
    let options = &mounts.iter().rfind(is_proc)?.super_options;
    let value = options.get("hidepid")?.clone()?;
    (!matches!(value.as_str(), "0" | "off")).then_some(value)
}

/// Undoes the octal escapes of space, tab, newline and backslash (fs/proc_namespace.c, mangle).
fn unescape(path: &Path) -> PathBuf {
    let escapes = [
        ("\\040", " "),
        ("\\011", "\t"),
        ("\\012", "\n"),
        ("\\134", "\\"),
    ];
    let text = path.to_string_lossy().into_owned();
    let plain = escapes
        .iter()
        .fold(text, |text, (escape, plain)| text.replace(escape, plain));
    PathBuf::from(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounted_namespaces_are_found() {
        let text = "\
            22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/root rw\n\
            90 22 0:4 net:[4026532177] /run/netns/blue rw shared:9 - nsfs nsfs rw\n\
            91 22 0:4 mnt:[4026532178] /run/mnt rw shared:9 - nsfs nsfs rw\n\
            92 22 0:4 net:[4026532179] /var/a\\040b rw - nsfs nsfs rw\n\
            93 22 0:9 net:[1] /tmp/fake rw - tmpfs tmpfs rw\n\
            cut short\n";
        let found: Vec<PathBuf> = network_namespaces(&parse(text)).collect();
        assert_eq!(found, [Path::new("/run/netns/blue"), Path::new("/var/a b")]);
    }

    #[test]
    fn cgroup_v1_is_not_taken_for_cgroup2() {
        let v2 = "23 1 0:22 / /proc rw - proc proc rw\n\
                  30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw\n";
        assert_eq!(cgroup2(&parse(v2)), Some("/sys/fs/cgroup".into()));
        let hybrid = "31 30 0:27 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                      32 30 0:28 / /sys/fs/cgroup/unified rw - cgroup2 none rw\n";
        assert_eq!(
            cgroup2(&parse(hybrid)),
            Some("/sys/fs/cgroup/unified".into())
        );
        let named = "31 30 0:27 / /x rw - cgroup cgroup2 rw\nbad\n";
        assert_eq!(cgroup2(&parse(named)), None);
    }

    #[test]
    fn hidepid_is_read_from_the_last_mount_of_proc() {
        let line = |point: &str, kind: &str, options: &str| {
            format!("25 22 0:23 / {point} rw,nosuid shared:5 - {kind} {kind} {options}\n")
        };
        let of = |text: &str| hidepid(&parse(text));
        assert_eq!(of(&line("/proc", "proc", "rw")), None);
        assert_eq!(of(&line("/proc", "proc", "rw,hidepid=0")), None);
        assert_eq!(of(&line("/proc", "proc", "rw,hidepid=off")), None);
        let two = line("/proc", "proc", "rw,gid=9,hidepid=2");
        assert_eq!(of(&two), Some("2".into()));
        assert_eq!(
            of(&(two.clone() + &line("/mnt/proc", "proc", "rw"))),
            Some("2".into())
        );
        assert_eq!(
            of(&(two.clone() + &line("/proc", "proc", "rw"))),
            None,
            "over-mounted"
        );
        let named = line("/proc", "proc", "rw,hidepid=invisible");
        assert_eq!(of(&named), Some("invisible".into()));
        assert_eq!(of(&(two + "cut short")), Some("2".into()));
    }
}
