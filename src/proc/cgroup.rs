//! Whose a process is: its systemd unit and its container, from the text of `/proc/PID/cgroup`. Pure.
//!
//! Every runtime puts the processes of a container into a cgroup whose path tells the runtime and the
//! container's id or name; systemd does the same with units. Nothing is asked of a runtime, so nothing
//! can hang, and it works for containers of every runtime at once. What is not in the path, such as the
//! name of a docker container, is not known.
//!
//! Source: cgroups(7); the paths of each runtime are in the tests.

use std::fmt;

/// The cgroups of a process, in all hierarchies, and what they tell.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cgroup {
    /// Its paths, each once; those of cgroup2 and of systemd first. The roots are left out.
    pub paths: Vec<String>,
    /// The systemd unit it belongs to, a service or a scope, by the name that systemctl(1) knows: of
    /// several the innermost, which may be one of the systemd in a container or of a user's.
    pub unit: Option<String>,
    /// The container it runs in: of several the innermost.
    pub container: Option<Container>,
}

/// A container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Container {
    /// Who runs it.
    pub runtime: Runtime,
    /// What the runtime calls it; 64 hexadecimal digits with most of them.
    pub id: Option<String>,
    /// Its name, with runtimes that have it in the path.
    pub name: Option<String>,
    /// The UID of its kubernetes pod, as kubectl shows it.
    pub pod_uid: Option<String>,
}

/// Who runs containers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Runtime {
    /// dockerd.
    Docker,
    /// containerd, by the kubelet, nerdctl or ctr.
    Containerd,
    /// CRI-O.
    CriO,
    /// podman, also rootless.
    Podman,
    /// The kubelet, by a runtime that the path does not tell.
    Kubernetes,
    /// systemd-nspawn.
    Nspawn,
    /// LXC, LXD, Incus or Proxmox VE.
    Lxc,
}

impl Runtime {
    /// The name in JSON and in the table.
    pub fn name(self) -> &'static str {
        match self {
            Runtime::Docker => "docker",
            Runtime::Containerd => "containerd",
            Runtime::CriO => "cri-o",
            Runtime::Podman => "podman",
            Runtime::Kubernetes => "kubernetes",
            Runtime::Nspawn => "systemd-nspawn",
            Runtime::Lxc => "lxc",
        }
    }
}

impl fmt::Display for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The first digits of a container's id that say which one is meant, as runtimes print them: 12. Fewer
/// than this select nothing.
pub const MIN_ID_PREFIX: usize = 8;

/// As people call it: `docker 3f4a9b2c1d0e`, `lxc web`.
impl fmt::Display for Container {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let called = self.name.as_deref().or(self.id.as_deref()).unwrap_or("?");
        match is_id(called) {
            true => write!(f, "{} {}", self.runtime, &called[..12]),
            false => write!(f, "{} {called}", self.runtime),
        }
    }
}

impl Container {
    /// Whether `text` is its name, its id, or at least [`MIN_ID_PREFIX`] digits that begin the id.
    pub fn is_called(&self, text: &str) -> bool {
        let prefix = |id: &str| {
            let abbreviates = text.len() >= MIN_ID_PREFIX && id.starts_with(text);
            id == text || (is_id(id) && abbreviates)
        };
        self.name.as_deref() == Some(text) || self.id.as_deref().is_some_and(prefix)
    }
}

impl Cgroup {
    /// Understands the text of `/proc/PID/cgroup`: lines `hierarchy:controllers:path`, of cgroup v1, of
    /// v2 (hierarchy 0, no controllers) or of both. Lines that are none are passed over.
    pub fn parse(text: &str) -> Cgroup {
        let mut lines: Vec<(u8, &str)> = text.lines().filter_map(parse_line).collect();
        lines.sort_by_key(|(rank, _)| *rank);
        let mut cgroup = Cgroup::default();
        for (_, path) in lines {
            if cgroup.paths.iter().any(|known| known == path) {
                continue;
            }
            let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
            if cgroup.unit.is_none() {
                cgroup.unit = unit(&parts).map(str::to_owned);
            }
            if cgroup.container.is_none() {
                cgroup.container = container(&parts);
            }
            cgroup.paths.push(path.to_owned());
        }
        cgroup
    }

    /// Whether it is in the cgroup `path` or below it, in any hierarchy.
    pub fn is_below(&self, path: &str) -> bool {
        let path = path.trim_end_matches('/');
        // All is below the root, also what is in it.
        path.is_empty()
            || self.paths.iter().any(|own| {
                own.strip_prefix(path)
                    .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            })
    }
}

/// How much a line says, from 0 on, and its path; `None` for the root, where everything is that is
/// nowhere else.
fn parse_line(line: &str) -> Option<(u8, &str)> {
    let (hierarchy, rest) = line.split_once(':')?;
    let (controllers, path) = rest.split_once(':')?;
    let path = path.strip_suffix(" (deleted)").unwrap_or(path);
    let rank = match (hierarchy, controllers) {
        ("0", "") => 0,
        (_, "name=systemd") => 1,
        _ => 2,
    };
    (path.starts_with('/') && path != "/").then_some((rank, path))
}

/// The innermost service or scope.
fn unit<'p>(parts: &[&'p str]) -> Option<&'p str> {
    let is_unit = |part: &&&str| {
        let name = part
            .strip_suffix(".service")
            .or(part.strip_suffix(".scope"));
        name.is_some_and(|name| !name.is_empty())
    };
    let mut units = parts.iter().rev().filter(is_unit);
    match units.next()? {
        // Where a manager of units keeps itself; what runs the manager says more.
        &"init.scope" => Some(units.next().unwrap_or(&"init.scope")),
        unit => Some(unit),
    }
}

/// The innermost container, with the pod around it.
fn container(parts: &[&str]) -> Option<Container> {
    let (at, mut container) = (0..parts.len())
        .rev()
        .find_map(|at| Some((at, container_at(parts, at)?)))?;
    // The last part may name the pod itself: `kubepods-pod….slice:cri-containerd:…`.
    container.pod_uid = parts[..=at].iter().rev().find_map(|part| pod_uid(part));
    Some(container)
}

/// What the part `at` says, seen with those around it.
fn container_at(parts: &[&str], at: usize) -> Option<Container> {
    let part = parts[at];
    let parent = at.checked_sub(1).map(|above| parts[above]);
    let identified = |runtime, id: &str| {
        is_id(id).then(|| Container {
            runtime,
            id: Some(id.to_owned()),
            name: None,
            pod_uid: None,
        })
    };
    let named = |runtime, name: &str| {
        (!name.is_empty()).then(|| Container {
            runtime,
            id: None,
            name: Some(unescape(name)),
            pod_uid: None,
        })
    };

    // Of the systemd driver `RUNTIME-ID.scope`; where it meets a runtime that does not drive systemd,
    // `SLICE:RUNTIME:ID`; with cgroupfs `RUNTIME-ID`.
    let stem = part.strip_suffix(".scope").unwrap_or(part);
    let (prefix, id) = stem.rsplit_once(['-', ':']).unwrap_or(("", stem));
    let runtime = match prefix.rsplit(':').next().unwrap_or(prefix) {
        "docker" => Some(Runtime::Docker),
        "cri-containerd" | "containerd" | "nerdctl" => Some(Runtime::Containerd),
        "crio" => Some(Runtime::CriO),
        // Not libpod-conmon, which is podman's own process.
        "libpod" | "libpod-payload" => Some(Runtime::Podman),
        _ => None,
    };
    if let Some(container) = runtime.and_then(|runtime| identified(runtime, id)) {
        return Some(container);
    }

    // Beside the payload runs systemd-nspawn itself.
    let inside = parts.get(at + 1) != Some(&"supervisor");
    if let Some(machine) = part
        .strip_prefix("machine-")
        .and_then(|p| p.strip_suffix(".scope"))
    {
        // systemd-machined has virtual machines of libvirt too.
        let virtual_machine = machine.starts_with("qemu\\x2d");
        return named(Runtime::Nspawn, machine).filter(|_| !virtual_machine && inside);
    }
    if let Some(machine) = part
        .strip_prefix("systemd-nspawn@")
        .and_then(|part| part.strip_suffix(".service"))
    {
        return named(Runtime::Nspawn, machine).filter(|_| inside);
    }
    if let Some(name) = part.strip_prefix("lxc.payload.") {
        return named(Runtime::Lxc, name);
    }
    match parent? {
        "lxc" | "lxc.payload" => named(Runtime::Lxc, part),
        "docker" => identified(Runtime::Docker, part),
        // Amazon ECS runs docker.
        _ if parts.first() == Some(&"ecs") => identified(Runtime::Docker, part),
        // ctr and nerdctl with cgroupfs: the namespace of containerd, then the id.
        "default" | "k8s.io" | "moby" => identified(Runtime::Containerd, part),
        parent if pod_uid(parent).is_some() => identified(Runtime::Kubernetes, part),
        _ => None,
    }
}

/// The id of a container: 64 hexadecimal digits.
fn is_id(text: &str) -> bool {
    let digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    text.len() == 64 && text.bytes().all(digit)
}

/// The UID of the pod whose cgroup `part` is: `podUID`, `kubepods-burstable-podUID.slice`, `_` for `-`
/// since systemd takes `-` for a level. UIDs of static pods are 32 digits without a dash.
fn pod_uid(part: &str) -> Option<String> {
    let slice = part.split(':').next().unwrap_or(part);
    let name = slice.strip_suffix(".slice").unwrap_or(slice);
    let name = match name.rsplit_once('-') {
        // A UID with dashes, of cgroupfs.
        Some(_) if name.starts_with("pod") => name,
        Some((_, last)) => last,
        None => name,
    };
    let uid = name.strip_prefix("pod")?.replace('_', "-");
    let digits = uid.bytes().filter(u8::is_ascii_hexdigit).count();
    let dashes = uid.len() - digits;
    let plausible = uid.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-');
    (plausible && digits == 32 && (dashes == 0 || dashes == 4)).then_some(uid)
}

/// Undoes systemd's escapes, `\x2d`: for people and for names, not for systemctl.
///
/// Source: systemd.unit(5), String Escaping for Inclusion in Unit Names.
pub fn unescape(name: &str) -> String {
    let mut bytes = Vec::with_capacity(name.len());
    let mut rest = name.as_bytes();
    while let [first, behind @ ..] = rest {
        let escaped = behind
            .strip_prefix(b"x")
            .and_then(|digits| std::str::from_utf8(digits.get(..2)?).ok())
            .and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match (first, escaped) {
            (b'\\', Some(byte)) => {
                bytes.push(byte);
                rest = &behind[3..];
            }
            _ => {
                bytes.push(*first);
                rest = behind;
            }
        }
    }
    String::from_utf8(bytes).unwrap_or_else(|_| name.to_owned())
}

#[cfg(test)]
#[path = "cgroup_tests.rs"]
mod tests;
