//! Processes, units, containers and cgroups that an operator names, and that do not exist.

use std::fmt;

/// The longest name that the kernel keeps of a process. Source: include/linux/sched.h, TASK_COMM_LEN.
const LONGEST_NAME: usize = 15;

/// A selected owner that does not exist. It is printed as a sentence that says so, with what may have been meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AbsentOwner {
    pub kind: OwnerKind,
    /// The value as the operator gave it; empty for [`OwnerKind::Together`].
    pub value: String,
}

/// What an operator names as the owner of sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum OwnerKind {
    Pid,
    /// The number is that of a thread of this process.
    Thread(i32),
    /// By its name.
    Process,
    Unit,
    Container,
    /// Of kubernetes or podman.
    Pod,
    /// Of kubernetes.
    Namespace,
    ComposeService,
    Cgroup,
    /// Each of the values exists, and no process has all of them.
    Together,
}

/// The options that name owners, as a list in a sentence.
pub const OWNER_OPTIONS: &str =
    "--pid, --process, --unit, --container, --pod, --namespace, --compose-service, --cgroup";

impl AbsentOwner {
    pub fn new(kind: OwnerKind, value: impl fmt::Display) -> Self {
        AbsentOwner {
            kind,
            value: value.to_string(),
        }
    }

    /// The option that gave the value; `None` if several did together.
    pub fn option(&self) -> Option<&'static str> {
        match self.kind {
            OwnerKind::Pid | OwnerKind::Thread(_) => Some("--pid"),
            OwnerKind::Process => Some("--process"),
            OwnerKind::Unit => Some("--unit"),
            OwnerKind::Container => Some("--container"),
            OwnerKind::Pod => Some("--pod"),
            OwnerKind::Namespace => Some("--namespace"),
            OwnerKind::ComposeService => Some("--compose-service"),
            OwnerKind::Cgroup => Some("--cgroup"),
            OwnerKind::Together => None,
        }
    }
}

impl fmt::Display for AbsentOwner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let value = crate::text::escape(&self.value);
        match self.kind {
            OwnerKind::Pid => {
                write!(f, "no process {value}")?;
                match value.parse::<u16>() {
                    Ok(port) => write!(f, "; for a port use --port {port}"),
                    Err(_) => Ok(()),
                }
            }
            OwnerKind::Thread(pid) => {
                write!(f, "{value} is a thread of process {pid}: use --pid {pid}")
            }
            OwnerKind::Process => {
                write!(f, "no process has the name {value}")?;
                // Also a name with its number, as tables show it.
                let number = value.rsplit('/').next().unwrap_or_default();
                if number.parse::<u32>().is_ok() {
                    return write!(f, "; for a process number use --pid {number}");
                }
                // Of a pattern it is unknown what it should match.
                let is_pattern = self.value.contains(['*', '?', '[', '{', '\\']);
                match (is_pattern, kept_by_kernel(&self.value)) {
                    (false, Some(kept)) => write!(
                        f,
                        "; the kernel keeps {LONGEST_NAME} bytes of a name: use --process '{}'",
                        crate::text::escape(kept)
                    ),
                    _ => Ok(()),
                }
            }
            OwnerKind::Unit => write!(f, "no process is in the unit {value}"),
            OwnerKind::Container => write!(f, "no process is in the container {value}"),
            OwnerKind::Pod => write!(f, "no process is in the pod {value}"),
            OwnerKind::Namespace => write!(
                f,
                "no process is in the kubernetes namespace {value}; for a network namespace use --netns"
            ),
            OwnerKind::ComposeService => write!(f, "no process is in the compose service {value}"),
            OwnerKind::Cgroup => write!(f, "no process is in the cgroup {value}"),
            OwnerKind::Together => write!(
                f,
                "no process matches all of {OWNER_OPTIONS} that were given"
            ),
        }
    }
}

/// The part of `name` that the kernel keeps; `None` if that is the whole.
fn kept_by_kernel(name: &str) -> Option<&str> {
    (name.len() > LONGEST_NAME).then(|| &name[..name.floor_char_boundary(LONGEST_NAME)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_says_what_may_have_been_meant() {
        let text = |kind, value: &str| AbsentOwner::new(kind, value).to_string();
        for (kind, value, expected) in [
            (
                OwnerKind::Pid,
                "8080",
                "no process 8080; for a port use --port 8080",
            ),
            (OwnerKind::Pid, "4194300", "no process 4194300"),
            (
                OwnerKind::Thread(7),
                "9",
                "9 is a thread of process 7: use --pid 7",
            ),
            (OwnerKind::Process, "jav", "no process has the name jav"),
            (
                OwnerKind::Process,
                "4711",
                "no process has the name 4711; for a process number use --pid 4711",
            ),
            (
                OwnerKind::Process,
                "leaky-app/14142",
                "no process has the name leaky-app/14142; for a process number use --pid 14142",
            ),
            (
                OwnerKind::Process,
                "kworker/u8",
                "no process has the name kworker/u8",
            ),
            (
                OwnerKind::Process,
                "systemd-resolved",
                "no process has the name systemd-resolved; the kernel keeps 15 bytes of a name: use --process 'systemd-resolve'",
            ),
            (
                OwnerKind::Process,
                "systemd-resolv*",
                "no process has the name systemd-resolv*",
            ),
            (OwnerKind::Unit, "ngin", "no process is in the unit ngin"),
            (
                OwnerKind::Container,
                "web",
                "no process is in the container web",
            ),
            (
                OwnerKind::Pod,
                "shop/web-*",
                "no process is in the pod shop/web-*",
            ),
            (
                OwnerKind::Namespace,
                "blue",
                "no process is in the kubernetes namespace blue; for a network namespace use --netns",
            ),
            (
                OwnerKind::ComposeService,
                "web",
                "no process is in the compose service web",
            ),
            (
                OwnerKind::Cgroup,
                "/a\nb",
                "no process is in the cgroup /a\\nb",
            ),
        ] {
            assert_eq!(text(kind, value), expected);
        }
    }

    #[test]
    fn a_name_is_cut_between_characters() {
        assert_eq!(kept_by_kernel("fifteen-bytes.."), None);
        assert_eq!(kept_by_kernel("abcdefghijklmnopq"), Some("abcdefghijklmno"));
        assert_eq!(
            kept_by_kernel("abcdefghijklmn\u{e4}xyz"),
            Some("abcdefghijklmn")
        );
    }
}
