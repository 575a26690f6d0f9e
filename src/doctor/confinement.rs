//! What confines cwkill: the container that it runs in, its pid namespace, its seccomp filter, its security label, and the files that it
//! can read there.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::proc::cgroup::{Cgroup, Runtime};
use crate::proc::status::seccomp_mode;
use crate::proc::{NameDirectory, ProcFs};

/// What confines cwkill.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Confinement {
    /// What runs the container that cwkill is in; `None`: there is no sign of a container.
    pub container: Option<Engine>,
    /// Whether cwkill is in the first pid namespace. Only there it sees every process of the host.
    pub first_pid_namespace: bool,
    /// Whether cwkill is in the network namespace of process 1; `None`: unknown, or process 1 is that of a container.
    pub netns_of_init: Option<bool>,
    /// The mode of seccomp(2): 0, 1 or 2.
    pub seccomp: Option<u8>,
    /// The label that a security module (AppArmor, SELinux) has given to cwkill.
    pub label: Option<String>,
    /// The directories with the names of containers that exist.
    pub name_directories: Result<Vec<NameDirectory>, String>,
}

impl Default for Confinement {
    /// No sign of a container, and no process of the host either.
    fn default() -> Self {
        Confinement {
            container: None,
            first_pid_namespace: false,
            netns_of_init: None,
            seccomp: None,
            label: None,
            name_directories: Ok(Vec::new()),
        }
    }
}

/// What runs a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Engine {
    Docker,
    Podman,
    Kubernetes,
    /// By its name, if it has one.
    Other(String),
}

impl Engine {
    pub fn name(&self) -> &str {
        match self {
            Engine::Docker => "docker",
            Engine::Podman => "podman",
            Engine::Kubernetes => "kubernetes",
            Engine::Other(name) => name,
        }
    }
}

impl Confinement {
    pub(super) fn read(proc: &ProcFs) -> Self {
        let first_pid_namespace = proc.shows_every_process();
        let own = fs::read_to_string(proc.path("self/cgroup")).unwrap_or_default();
        let runtime = Cgroup::parse(&own).container.map(|one| one.runtime);
        let variable = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        let signs = Signs {
            runtime,
            has_docker_file: Path::new("/.dockerenv").exists(),
            has_podman_file: Path::new("/run/.containerenv").exists(),
            is_in_pod: variable("KUBERNETES_SERVICE_HOST").is_some(),
            variable: variable("container"),
            first_pid_namespace,
        };
        let netns = |process: &str| {
            let path = proc.path(&format!("{process}/ns/net"));
            fs::metadata(path).ok().map(|netns| netns.ino())
        };
        let of_init = netns("1").filter(|_| first_pid_namespace);
        let status = fs::read_to_string(proc.path("self/status")).unwrap_or_default();
        let label = fs::read(proc.path("self/attr/current")).ok();
        Confinement {
            container: signs.container(),
            first_pid_namespace,
            netns_of_init: of_init.zip(netns("self")).map(|(init, own)| init == own),
            seccomp: seccomp_mode(&status),
            label: label.and_then(|label| label_text(&label)),
            name_directories: proc.name_directories(),
        }
    }
}

/// What tells that cwkill runs in a container.
struct Signs {
    /// The runtime in the path of its cgroup. A cgroup namespace hides it.
    runtime: Option<Runtime>,
    has_docker_file: bool,
    has_podman_file: bool,
    is_in_pod: bool,
    /// The variable `container` of its environment.
    variable: Option<String>,
    first_pid_namespace: bool,
}

impl Signs {
    fn container(self) -> Option<Engine> {
        match (self.runtime, self.variable.as_deref()) {
            _ if self.is_in_pod => Some(Engine::Kubernetes),
            (Some(Runtime::Kubernetes | Runtime::CriO), _) => Some(Engine::Kubernetes),
            (Some(Runtime::Docker), _) => Some(Engine::Docker),
            (Some(Runtime::Podman), _) => Some(Engine::Podman),
            _ if self.has_docker_file => Some(Engine::Docker),
            _ if self.has_podman_file => Some(Engine::Podman),
            (_, Some("docker")) => Some(Engine::Docker),
            (_, Some("podman" | "oci")) => Some(Engine::Podman),
            (Some(runtime), _) => Some(Engine::Other(runtime.name().to_owned())),
            (None, Some(name)) => Some(Engine::Other(name.to_owned())),
            (None, None) if !self.first_pid_namespace => Some(Engine::Other("unknown".to_owned())),
            (None, None) => None,
        }
    }
}

/// A label without the zero byte or the newline that the kernel appends.
fn label_text(label: &[u8]) -> Option<String> {
    let text = String::from_utf8_lossy(label);
    let text = text.trim_end_matches(['\0', '\n']);
    (!text.is_empty()).then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_signs_of_a_container() {
        let none = || Signs {
            runtime: None,
            has_docker_file: false,
            has_podman_file: false,
            is_in_pod: false,
            variable: None,
            first_pid_namespace: true,
        };
        let signs = [
            (none(), None),
            (
                Signs {
                    first_pid_namespace: false,
                    ..none()
                },
                Some("unknown"),
            ),
            (
                Signs {
                    has_docker_file: true,
                    ..none()
                },
                Some("docker"),
            ),
            (
                Signs {
                    // In a pod of docker.
                    has_docker_file: true,
                    is_in_pod: true,
                    ..none()
                },
                Some("kubernetes"),
            ),
            (
                Signs {
                    has_podman_file: true,
                    variable: Some("oci".into()),
                    ..none()
                },
                Some("podman"),
            ),
            (
                Signs {
                    variable: Some("systemd-nspawn".into()),
                    ..none()
                },
                Some("systemd-nspawn"),
            ),
            (
                Signs {
                    runtime: Some(Runtime::CriO),
                    ..none()
                },
                Some("kubernetes"),
            ),
        ];
        for (signs, expected) in signs {
            let found = signs.container();
            assert_eq!(found.as_ref().map(Engine::name), expected);
        }
    }

    #[test]
    fn labels_end_with_what_the_kernel_appends() {
        assert_eq!(label_text(b"unconfined\n").as_deref(), Some("unconfined"));
        assert_eq!(label_text(b"a:b:c:s0\0").as_deref(), Some("a:b:c:s0"));
        assert_eq!(label_text(b"\0"), None);
    }
}
