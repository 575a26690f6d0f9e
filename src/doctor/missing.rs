//! What to add to the settings of the container that cwkill runs in. Pure.

use caps::Capability;
use serde::Serialize;

use super::confinement::Engine;
use super::host::{CAPABILITIES, HostInfo};

/// The security module of a label that confines a process; `None`: it confines nothing.
fn confining_module(label: &str) -> Option<Module> {
    // SELinux: user:role:type:level.
    match label.split(':').nth(2) {
        Some(kind) if kind.starts_with("unconfined_") || kind == "spc_t" => None,
        Some(_) => Some(Module::SeLinux),
        None if label == "unconfined" || label.ends_with(" (complain)") => None,
        None => Some(Module::AppArmor),
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Module {
    AppArmor,
    SeLinux,
}

/// What the settings of the container lack.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Missing {
    /// The options for `docker run` or `podman run`; empty if neither runs the container.
    pub run_options: Vec<MissingOption>,
    /// The lines for the manifest of a pod; empty if the container is not one of kubernetes.
    pub manifest: Vec<String>,
}

/// An option of `docker run`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MissingOption {
    pub option: String,
    /// What does not work without it.
    pub without: &'static str,
}

impl Missing {
    /// What is missing on `host`; nothing if cwkill is in no container.
    pub(super) fn on(host: &HostInfo) -> Missing {
        let confinement = &host.confinement;
        let Some(container) = &confinement.container else {
            return Missing::default();
        };
        let settings = Settings::of(host);
        Missing {
            run_options: match container {
                Engine::Kubernetes => Vec::new(),
                Engine::Docker | Engine::Podman | Engine::Other(_) => settings.run_options(),
            },
            manifest: match container {
                Engine::Docker | Engine::Podman => Vec::new(),
                Engine::Kubernetes | Engine::Other(_) => settings.manifest(),
            },
        }
    }
}

/// The settings that are missing.
struct Settings {
    host_pid: bool,
    host_network: bool,
    root: bool,
    capabilities: Vec<Capability>,
    seccomp: bool,
    module: Option<Module>,
    host_root: bool,
}

impl Settings {
    fn of(host: &HostInfo) -> Self {
        let confinement = &host.confinement;
        let lacks = |capability: &Capability| !host.has(*capability);
        let module = confinement.label.as_deref().and_then(confining_module);
        let unreachable = host
            .reachability
            .as_ref()
            .map_or(0, |it| it.unreachable.len());
        Settings {
            host_pid: !confinement.first_pid_namespace,
            // Behind another pid namespace it is unknown, and the same line has both.
            host_network: !confinement.first_pid_namespace
                || confinement.netns_of_init == Some(false),
            root: host.uid != 0,
            capabilities: CAPABILITIES.into_iter().filter(lacks).collect(),
            // cwkill has tried it on a socket of its own, so nothing else forbids it. The filters of docker and containerd let it
            // through with this capability.
            seccomp: confinement.seccomp == Some(2)
                && host.pidfd_getfd.is_err()
                && host.has(Capability::CAP_SYS_PTRACE),
            module: module.filter(|_| unreachable > 0 && host.has(Capability::CAP_SYS_PTRACE)),
            host_root: matches!(&confinement.name_directories, Ok(found) if found.is_empty()),
        }
    }

    fn run_options(&self) -> Vec<MissingOption> {
        let mut options = Vec::new();
        let mut add = |is_missing: bool, option: &str, without| {
            if is_missing {
                let option = option.to_owned();
                options.push(MissingOption { option, without });
            }
        };
        add(
            self.host_pid,
            "--pid=host",
            "cwkill sees no process outside this container",
        );
        add(
            self.host_network,
            "--network=host",
            "it begins in a network namespace of its own",
        );
        add(self.root, "--user=0", "the capabilities are not in effect");
        for capability in &self.capabilities {
            let option = format!("--cap-add={}", short(*capability));
            add(true, &option, without_capability(*capability));
        }
        add(
            self.seccomp,
            "--security-opt=seccomp=unconfined",
            "the seccomp filter forbids pidfd_getfd(2): no shutdown",
        );
        let (option, without) = match self.module {
            Some(Module::SeLinux) => ("--security-opt=label=disable", FORBIDS),
            _ => ("--security-opt=apparmor=unconfined", FORBIDS),
        };
        add(self.module.is_some(), option, without);
        add(
            self.host_root,
            "-v=/:/host:ro",
            "there are only ids of containers; with it, give cwkill `--host-root /host`",
        );
        options
    }

    /// Below `spec` of a pod.
    fn manifest(&self) -> Vec<String> {
        let mut context: Vec<String> = Vec::new();
        if self.root {
            context.push("runAsUser: 0".to_owned());
        }
        if !self.capabilities.is_empty() {
            let names = |set: &mut dyn Iterator<Item = &Capability>| {
                let names: Vec<String> = set.map(|capability| short(*capability)).collect();
                names.join(", ")
            };
            let mut line = format!(
                "capabilities: {{add: [{}]}}",
                names(&mut self.capabilities.iter())
            );
            let to_act = names(&mut self.capabilities.iter().filter(|it| is_only_to_act(**it)));
            if !to_act.is_empty() {
                line.push_str(&format!("  # {to_act}: only to act"));
            }
            context.push(line);
        }
        if self.seccomp {
            context.push("seccompProfile: {type: Unconfined}".to_owned());
        }
        context.extend(self.module.map(|module| match module {
            Module::AppArmor => "appArmorProfile: {type: Unconfined}".to_owned(),
            Module::SeLinux => "seLinuxOptions: {type: spc_t}".to_owned(),
        }));
        let mut container: Vec<String> = Vec::new();
        if !context.is_empty() {
            container.push("securityContext:".to_owned());
            container.extend(context.iter().map(|line| format!("  {line}")));
        }
        if self.host_root {
            container.push("args: [--host-root, /host]".to_owned());
            container
                .push("volumeMounts: [{name: host, mountPath: /host, readOnly: true}]".to_owned());
        }
        let mut lines: Vec<String> = Vec::new();
        if self.host_pid {
            lines.push("hostPID: true".to_owned());
        }
        if !container.is_empty() {
            lines.push("containers:".to_owned());
            let marks = std::iter::once("- ").chain(std::iter::repeat("  "));
            let marked = marks
                .zip(&container)
                .map(|(mark, line)| format!("{mark}{line}"));
            lines.extend(marked);
        }
        if self.host_root {
            lines.push("volumes: [{name: host, hostPath: {path: /}}]".to_owned());
        }
        lines
    }
}

const FORBIDS: &str = "the security module may forbid to look into other processes";

fn short(capability: Capability) -> String {
    let name = capability.to_string();
    name.trim_start_matches("CAP_").to_owned()
}

/// Whether who only observes leaves it out.
fn is_only_to_act(capability: Capability) -> bool {
    matches!(
        capability,
        Capability::CAP_NET_ADMIN | Capability::CAP_NET_RAW
    )
}

fn without_capability(capability: Capability) -> &'static str {
    match capability {
        Capability::CAP_NET_ADMIN => "no destroy; leave it out to observe only",
        Capability::CAP_NET_RAW => {
            "no rst, no probe of a socket without a known owner; leave it out to observe only"
        }
        Capability::CAP_SYS_PTRACE => "no owners of other users, no shutdown, no reclaim",
        Capability::CAP_DAC_READ_SEARCH => "no descriptors of other users",
        Capability::CAP_SYS_ADMIN => "no other network namespace, no reclaim",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::confinement::Confinement;
    use crate::doctor::host::testdata::host;
    use crate::proc::NameDirectory;

    fn directory(path: &str) -> NameDirectory {
        NameDirectory {
            path: path.into(),
            error: None,
        }
    }

    fn complete(container: Engine) -> HostInfo {
        let mut host = host(&CAPABILITIES);
        host.confinement = Confinement {
            container: Some(container),
            first_pid_namespace: true,
            netns_of_init: Some(true),
            seccomp: Some(2),
            label: Some("docker-default (enforce)".into()),
            name_directories: Ok(vec![directory("/host/var/lib/docker/containers")]),
        };
        host
    }

    fn options(host: &HostInfo) -> Vec<String> {
        let options = Missing::on(host).run_options.into_iter();
        options.map(|missing| missing.option).collect()
    }

    #[test]
    fn nothing_is_missing_where_all_is_given_or_in_no_container() {
        for container in [Engine::Docker, Engine::Podman, Engine::Kubernetes] {
            assert_eq!(Missing::on(&complete(container)), Missing::default());
        }
        let mut bare = complete(Engine::Docker);
        bare.confinement = Confinement::default();
        bare.capabilities.clear();
        assert_eq!(Missing::on(&bare), Missing::default());
    }

    #[test]
    fn what_a_line_of_docker_lacks() {
        let mut host = complete(Engine::Docker);
        host.confinement.first_pid_namespace = false;
        host.confinement.netns_of_init = None;
        host.confinement.name_directories = Ok(Vec::new());
        host.capabilities = [Capability::CAP_NET_RAW].into_iter().collect();
        assert_eq!(
            options(&host),
            [
                "--pid=host",
                "--network=host",
                "--cap-add=NET_ADMIN",
                "--cap-add=SYS_PTRACE",
                "--cap-add=DAC_READ_SEARCH",
                "--cap-add=SYS_ADMIN",
                "-v=/:/host:ro"
            ]
        );
        assert!(Missing::on(&host).manifest.is_empty());
        let mut host = complete(Engine::Docker);
        for (netns, missing) in [(None, 0), (Some(true), 0), (Some(false), 1)] {
            host.confinement.netns_of_init = netns;
            assert_eq!(
                options(&host).len(),
                missing,
                "{netns:?}: process 1 cannot be read"
            );
        }
        let mut host = complete(Engine::Podman);
        host.pidfd_getfd = Err(std::io::Error::from_raw_os_error(libc::EPERM));
        host.uid = 1000;
        let expected = ["--user=0", "--security-opt=seccomp=unconfined"];
        assert_eq!(options(&host), expected);
        // The usual filters let it through with the capability.
        host.capabilities.remove(&Capability::CAP_SYS_PTRACE);
        assert_eq!(options(&host), ["--user=0", "--cap-add=SYS_PTRACE"]);
        host.capabilities.insert(Capability::CAP_SYS_PTRACE);
        // On an old kernel there is no filter to lift.
        host.confinement.seccomp = Some(0);
        assert_eq!(options(&host), ["--user=0"]);
    }

    #[test]
    fn what_a_manifest_lacks() {
        let mut host = complete(Engine::Kubernetes);
        host.confinement.first_pid_namespace = false;
        host.confinement.name_directories = Ok(Vec::new());
        host.capabilities.remove(&Capability::CAP_SYS_PTRACE);
        host.capabilities.remove(&Capability::CAP_SYS_ADMIN);
        assert_eq!(
            Missing::on(&host).manifest,
            [
                "hostPID: true",
                "containers:",
                "- securityContext:",
                "    capabilities: {add: [SYS_PTRACE, SYS_ADMIN]}",
                "  args: [--host-root, /host]",
                "  volumeMounts: [{name: host, mountPath: /host, readOnly: true}]",
                "volumes: [{name: host, hostPath: {path: /}}]",
            ]
        );
        assert!(options(&host).is_empty());
        // As a pod that only observes.
        let mut host = complete(Engine::Kubernetes);
        host.capabilities.remove(&Capability::CAP_NET_ADMIN);
        host.capabilities.remove(&Capability::CAP_NET_RAW);
        assert_eq!(
            Missing::on(&host).manifest,
            [
                "containers:",
                "- securityContext:",
                "    capabilities: {add: [NET_ADMIN, NET_RAW]}  # NET_ADMIN, NET_RAW: only to act",
            ]
        );
    }

    #[test]
    fn a_label_matters_only_if_a_process_is_out_of_reach() {
        use crate::doctor::host::UnreachableProcess;
        let mut host = complete(Engine::Docker);
        let unreachable = UnreachableProcess {
            pid: 7,
            comm: None,
            same_user: false,
            seen: false,
        };
        if let Ok(reachability) = &mut host.reachability {
            reachability.unreachable.push(unreachable);
        }
        assert_eq!(options(&host), ["--security-opt=apparmor=unconfined"]);
        host.confinement.label = Some("system_u:system_r:container_t:s0:c1,c2".into());
        assert_eq!(options(&host), ["--security-opt=label=disable"]);
        for free in [
            "unconfined",
            "docker-default (complain)",
            "unconfined_u:unconfined_r:unconfined_t:s0",
            "system_u:system_r:spc_t:s0",
        ] {
            host.confinement.label = Some(free.into());
            assert!(options(&host).is_empty(), "{free}");
        }
    }
}
