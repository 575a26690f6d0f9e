//! The systemd unit and the container of a process, from the text of `/proc/PID/cgroup`. Pure.
//!
//! Every runtime puts the processes of a container into a cgroup, and the path of that cgroup contains the id or the name of the
//! container. systemd does the same for units. cwkill asks no runtime, so it cannot hang, and it knows the containers of all
//! runtimes at once. `containers` adds the facts that are not in the path, for example the name of a docker container.
//!
//! Source: cgroups(7). The tests have the paths of each runtime.

use std::fmt;
use std::sync::Arc;

/// The cgroups of a process in all hierarchies, with the unit and the container that follow from them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Cgroup {
    /// Each path once, as the kernel writes it; cgroup v2 first, then the hierarchy of systemd. Root cgroups are omitted.
    pub paths: Vec<String>,
    /// The name that systemctl(1) has for its innermost service or scope. A systemd in a container, or of a user, may own that unit.
    pub unit: Option<String>,
    /// The innermost container.
    pub container: Option<Container>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Container {
    pub runtime: Runtime,
    /// The id that the runtime gave it; most runtimes use 64 hexadecimal digits.
    pub id: Option<String>,
    /// The name, from the path or from a file of the runtime. In a pod, the one that its manifest gives.
    pub name: Option<String>,
    /// The UID of its kubernetes pod, as kubectl shows it.
    pub pod_uid: Option<String>,
    /// Whether it may be in a pod of podman, whose name is in a database. The cgroup of a pod shows it; of a container that is split off into
    /// the cgroup of a unit, it is unknown.
    pub may_be_in_pod_of_podman: bool,
    pub facts: Facts,
}

/// What only the files of a runtime say about a container.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// The image, as the runtime names it.
    pub image: Option<String>,
    /// The name of its kubernetes pod.
    pub pod: Option<String>,
    /// The kubernetes namespace of the pod.
    pub namespace: Option<String>,
    /// The service of docker compose that it is a part of.
    pub compose_service: Option<String>,
    /// Whether all of these were read: what is `None` does not exist.
    pub was_read: bool,
    /// Why the files could not be read.
    pub unread: Option<Arc<str>>,
}

/// A program that runs containers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Runtime {
    /// dockerd.
    Docker,
    /// containerd, driven by the kubelet, nerdctl or ctr.
    Containerd,
    /// CRI-O.
    CriO,
    /// podman, also rootless.
    Podman,
    /// The kubelet, with a runtime that the path does not name.
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

impl Runtime {
    /// Whether its containers may be in a namespace of kubernetes.
    pub(crate) fn may_be_of_kubernetes(self) -> bool {
        !matches!(self, Runtime::Podman | Runtime::Nspawn | Runtime::Lxc)
    }
}

impl fmt::Display for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The shortest prefix of a container id that selects the container. Runtimes print 12 digits.
pub const MIN_ID_PREFIX: usize = 8;

/// The shortest text that is clear: `shop/web-5c9 (php)` in a pod, `my-leaky-app`, `lxc web`, or the runtime with the abbreviated id:
/// `docker 3f4a9b2c1d0e`.
impl fmt::Display for Container {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = self.name.as_deref();
        if let Some(pod) = &self.facts.pod {
            if let Some(namespace) = &self.facts.namespace {
                write!(f, "{namespace}/")?;
            }
            f.write_str(pod)?;
            return name.map_or(Ok(()), |name| write!(f, " ({name})"));
        }
        match (name, &self.id) {
            // It comes from a file of the runtime, so it has an id too.
            (Some(name), Some(_)) => f.write_str(name),
            _ => f.write_str(&self.with_id()),
        }
    }
}

/// The first digits of an id, as runtimes print them.
pub(crate) fn short_id(id: &str) -> &str {
    match is_id(id) {
        true => &id[..12],
        false => id,
    }
}

impl Container {
    /// What no other container has: its runtime with its id, or with its name if there is none.
    pub(crate) fn key(&self) -> (Runtime, &str) {
        let id = self.id.as_deref().or(self.name.as_deref());
        (self.runtime, id.unwrap_or_default())
    }

    /// The runtime with the abbreviated id, or with the name if there is no id.
    pub(crate) fn with_id(&self) -> String {
        let id = self.id.as_deref().map(short_id);
        let name = id.or(self.name.as_deref()).unwrap_or("?");
        format!("{} {name}", self.runtime)
    }

    /// Why its name could not be read, with its id.
    pub(crate) fn why_unnamed(&self) -> String {
        let unknown = match self.runtime {
            Runtime::Podman => "podman keeps pods and labels in a database",
            _ => "no file has it",
        };
        let why = self.facts.unread.as_deref().unwrap_or(unknown);
        format!("{}: {why}", self.with_id())
    }

    /// Whether `text` is its id, or a prefix of it with at least [`MIN_ID_PREFIX`] digits.
    pub fn has_id(&self, text: &str) -> bool {
        let abbreviates = |id: &str| text.len() >= MIN_ID_PREFIX && id.starts_with(text);
        self.id
            .as_deref()
            .is_some_and(|id| id == text || (is_id(id) && abbreviates(id)))
    }

    /// Whether it may have a name that could not be read.
    pub fn may_have_a_name(&self) -> bool {
        self.name.is_none() && self.has_unread_facts()
    }

    /// Whether it may be in a pod that could not be read.
    pub fn may_be_in_a_pod(&self) -> bool {
        let may_be = match self.runtime {
            Runtime::Podman => self.may_be_in_pod_of_podman,
            _ => self.has_unread_facts(),
        };
        self.facts.pod.is_none() && may_be
    }

    /// Whether it may be of a compose service that could not be read.
    pub fn may_be_of_a_service(&self) -> bool {
        self.facts.compose_service.is_none() && self.has_unread_facts()
    }

    /// Nothing else than its cgroup describes a container of systemd-nspawn or LXC.
    fn has_unread_facts(&self) -> bool {
        self.id.is_some() && !self.facts.was_read
    }
}

impl Cgroup {
    /// Parses the text of `/proc/PID/cgroup`: lines `hierarchy:controllers:path` of cgroup v1, of v2 (hierarchy 0, no controllers)
    /// or of both. Other lines are ignored.
    pub fn parse(text: &str) -> Cgroup {
        let mut lines: Vec<(u8, &str)> = text.lines().filter_map(parse_line).collect();
        lines.sort_by_key(|(rank, _)| *rank);
        let mut cgroup = Cgroup::default();
        for (_, path) in lines {
            if cgroup.paths.iter().any(|known| known == path) {
                continue;
            }
            let parts: Vec<&str> = without_mark(path)
                .split('/')
                .filter(|part| !part.is_empty())
                .collect();
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

    /// The user whose systemd runs it: 1000 of `/user.slice/user-1000.slice/...`; `None` for root.
    pub fn user(&self) -> Option<u32> {
        let user = |part: &str| {
            let uid = part.strip_prefix("user-")?.strip_suffix(".slice")?;
            uid.parse().ok().filter(|uid| *uid != 0)
        };
        let mut paths = self.paths.iter();
        paths.find_map(|path| path.split('/').find_map(user))
    }

    /// Whether the process is in the cgroup `path` or below it, in any hierarchy.
    pub fn is_below(&self, path: &str) -> bool {
        let path = path.trim_end_matches('/');
        // Every process is below the root, or in it.
        path.is_empty()
            || self.paths.iter().any(|own| {
                own.strip_prefix(path)
                    .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
                    || without_mark(own) == path
            })
    }
}

/// The rank of a line, 0 for the best, and its path; `None` for the root, which holds every process without a cgroup of its own.
fn parse_line(line: &str) -> Option<(u8, &str)> {
    let (hierarchy, rest) = line.split_once(':')?;
    let (controllers, path) = rest.split_once(':')?;
    let rank = match (hierarchy, controllers) {
        ("0", "") => 0,
        (_, "name=systemd") => 1,
        _ => 2,
    };
    (path.starts_with('/') && path != "/").then_some((rank, path))
}

/// `path` without the mark that the kernel appends after the removal of the cgroup (kernel/cgroup/cgroup.c, proc_cgroup_show).
///
/// The mark is ambiguous: a cgroup can also have a name that ends like this.
fn without_mark(path: &str) -> &str {
    path.strip_suffix(" (deleted)").unwrap_or(path)
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
        // A unit manager runs in `init.scope`. The unit that contains the manager is more useful.
        &"init.scope" => Some(units.next().unwrap_or(&"init.scope")),
        unit => Some(unit),
    }
}

/// The innermost container, with the pod around it.
fn container(parts: &[&str]) -> Option<Container> {
    let (index, mut container) = (0..parts.len())
        .rev()
        .find_map(|index| Some((index, container_at(parts, index)?)))?;
    // The part of the container may name the pod too: `kubepods-pod….slice:cri-containerd:…`.
    container.pod_uid = parts[..=index].iter().rev().find_map(|part| pod_uid(part));
    container.may_be_in_pod_of_podman =
        container.runtime == Runtime::Podman && may_be_in_pod_of_podman(parts, index);
    Some(container)
}

/// Whether the container of podman that the part `index` names may be in a pod: `machine-libpod_pod_ID.slice` with systemd,
/// `libpod_parent/ID` without. `libpod-payload-ID` is below the unit that started it, in a pod or not.
fn may_be_in_pod_of_podman(parts: &[&str], index: usize) -> bool {
    let above = &parts[..index];
    let is_below = |pair: &[&str]| pair[0] == "libpod_parent" && is_id(pair[1]);
    parts[index].starts_with("libpod-payload-")
        || above.iter().any(|part| part.contains("libpod_pod_"))
        || above.windows(2).any(is_below)
}

/// The container that the part `index` names. Its neighbours decide in some cases.
fn container_at(parts: &[&str], index: usize) -> Option<Container> {
    let part = parts[index];
    let parent = index.checked_sub(1).map(|above| parts[above]);
    let identified = |runtime, id: &str| {
        is_id(id).then(|| Container {
            runtime,
            id: Some(id.to_owned()),
            name: None,
            pod_uid: None,
            may_be_in_pod_of_podman: false,
            facts: Facts::default(),
        })
    };
    let named = |runtime, name: &str| {
        (!name.is_empty()).then(|| Container {
            runtime,
            id: None,
            name: Some(unescape(name)),
            pod_uid: None,
            may_be_in_pod_of_podman: false,
            facts: Facts::default(),
        })
    };

    // The systemd driver makes `RUNTIME-ID.scope`, or `SLICE:RUNTIME:ID` if the runtime itself does not use systemd. The cgroupfs
    // driver makes `RUNTIME-ID`.
    let stem = part.strip_suffix(".scope").unwrap_or(part);
    let (prefix, id) = stem.rsplit_once(['-', ':']).unwrap_or(("", stem));
    let runtime = match prefix.rsplit(':').next().unwrap_or(prefix) {
        "docker" => Some(Runtime::Docker),
        "cri-containerd" | "containerd" | "nerdctl" => Some(Runtime::Containerd),
        "crio" => Some(Runtime::CriO),
        // libpod-conmon is not a container but podman's monitor.
        "libpod" | "libpod-payload" => Some(Runtime::Podman),
        _ => None,
    };
    if let Some(container) = runtime.and_then(|runtime| identified(runtime, id)) {
        return Some(container);
    }

    // systemd-nspawn itself runs in `supervisor`, beside the container.
    let inside = parts.get(index + 1) != Some(&"supervisor");
    if let Some(machine) = part
        .strip_prefix("machine-")
        .and_then(|p| p.strip_suffix(".scope"))
    {
        // systemd-machined also registers the virtual machines of libvirt.
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
        // ctr and nerdctl with cgroupfs: the containerd namespace, then the id.
        "default" | "k8s.io" | "moby" => identified(Runtime::Containerd, part),
        parent if pod_uid(parent).is_some() => identified(Runtime::Kubernetes, part),
        _ => None,
    }
}

/// Whether `text` is a container id: 64 hexadecimal digits.
fn is_id(text: &str) -> bool {
    let digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    text.len() == 64 && text.bytes().all(digit)
}

/// The pod UID in a part of a path: `podUID`, or `kubepods-burstable-podUID.slice` with `_` for `-`, because `-` separates levels
/// of systemd slices. The UID of a static pod has 32 digits and no dash.
fn pod_uid(part: &str) -> Option<String> {
    let slice = part.split(':').next().unwrap_or(part);
    let name = slice.strip_suffix(".slice").unwrap_or(slice);
    let name = match name.rsplit_once('-') {
        // The cgroupfs driver keeps the dashes of the UID.
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

/// Undoes the escapes of systemd, for example `\x2d`. The result is for display and comparison; systemctl wants the escaped name.
///
/// Source: systemd.unit(5), String Escaping for Inclusion in Unit Names.
pub fn unescape(name: &str) -> String {
    let mut bytes = Vec::with_capacity(name.len());
    let mut rest = name.as_bytes();
    while let [first, after @ ..] = rest {
        let escaped = after
            .strip_prefix(b"x")
            .and_then(|digits| std::str::from_utf8(digits.get(..2)?).ok())
            .and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match (first, escaped) {
            (b'\\', Some(byte)) => {
                bytes.push(byte);
                rest = &after[3..];
            }
            _ => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    String::from_utf8(bytes).unwrap_or_else(|_| name.to_owned())
}

#[cfg(test)]
#[path = "cgroup_tests.rs"]
mod tests;
