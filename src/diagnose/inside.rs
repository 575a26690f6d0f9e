//! Commands that run inside the container of a process, where the tools of its language are, and its number is another one. Pure.

use crate::proc::cgroup::{Cgroup, Container, Runtime, short_id};

/// The way into the container of a process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inside {
    /// The number of the process there.
    pub pid: i32,
    /// `docker exec`, with options to come.
    exec: &'static str,
    /// What follows the options: ` my-leaky-app`.
    container: String,
    /// The command that prints its output.
    logs: Option<String>,
}

impl Inside {
    /// The way into the container of a process with this `cgroup` and these numbers in its pid namespaces, the outermost first; `None`:
    /// it is in none, or there is no sure way.
    pub fn of(cgroup: &Cgroup, pids: &[i32]) -> Option<Inside> {
        let container = cgroup.container.as_ref()?;
        let pid = match *pids {
            [own] | [_, own] => own,
            // Which of them is the container's is not known.
            _ => return None,
        };
        let way = |exec, container: String, logs| Inside {
            pid,
            exec,
            container,
            logs,
        };
        if let Some(pod) = of_pod(container) {
            let logs = format!("kubectl logs{pod}");
            return Some(way("kubectl exec", format!("{pod} --"), Some(logs)));
        }
        let id = short_id(container.id.as_deref()?);
        if container.pod_uid.is_some() {
            let logs = format!("crictl logs {id}");
            return Some(way("crictl exec", format!(" {id}"), Some(logs)));
        }
        // The daemon of a user has a socket of its own, and podman the storage of its user.
        if cgroup.user().is_some() {
            return None;
        }
        let name = container.name.as_deref().filter(|name| is_plain(name));
        let (exec, logs) = match container.runtime {
            Runtime::Docker => ("docker exec", "docker logs"),
            Runtime::Podman => ("podman exec", "podman logs"),
            Runtime::Containerd => ("nerdctl exec", "nerdctl logs"),
            Runtime::CriO => ("crictl exec", "crictl logs"),
            Runtime::Kubernetes | Runtime::Nspawn | Runtime::Lxc => return None,
        };
        let name = match container.runtime {
            Runtime::CriO => id,
            _ => name.unwrap_or(id),
        };
        Some(way(
            exec,
            format!(" {name}"),
            Some(format!("{logs} {name}")),
        ))
    }

    /// `command`, run inside.
    pub fn run(&self, command: &str) -> String {
        format!("{}{} {command}", self.exec, self.container)
    }

    /// `command`, run inside with a terminal.
    pub fn run_on_terminal(&self, command: &str) -> String {
        format!("{} -it{} {command}", self.exec, self.container)
    }

    /// The command that prints the output of the container.
    pub fn logs(&self) -> Option<&str> {
        self.logs.as_deref()
    }
}

/// ` -n NAMESPACE POD -c CONTAINER`, if all three are known.
fn of_pod(container: &Container) -> Option<String> {
    let facts = &container.facts;
    let namespace = facts.namespace.as_deref()?;
    let (pod, name) = (facts.pod.as_deref()?, container.name.as_deref()?);
    let are_plain = [namespace, pod, name].into_iter().all(is_plain);
    are_plain.then(|| format!(" -n {namespace} {pod} -c {name}"))
}

/// Whether a shell and a runtime take `name` as it is. Its author chooses it.
fn is_plain(name: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    name.bytes().all(is_plain) && name.starts_with(|c: char| c.is_ascii_alphanumeric())
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    const ID: &str = "3f4a9b2c1d0e5f6a7b8c9d0e1f2a3b4c5d6e7f8091a2b3c4d5e6f708192a3b4c";

    pub(crate) fn cgroup(path: &str, name: Option<&str>, pod: Option<(&str, &str)>) -> Cgroup {
        let mut cgroup = Cgroup::parse(&format!("0::{}\n", path.replace("{ID}", ID)));
        if let Some(container) = &mut cgroup.container {
            container.name = container.name.take().or(name.map(str::to_owned));
            container.facts.namespace = pod.map(|(namespace, _)| namespace.to_owned());
            container.facts.pod = pod.map(|(_, pod)| pod.to_owned());
        }
        cgroup
    }

    fn command(path: &str, name: Option<&str>, pod: Option<(&str, &str)>) -> Option<String> {
        let inside = Inside::of(&cgroup(path, name, pod), &[4711, 1])?;
        Some(inside.run(&format!("jcmd {} Thread.print", inside.pid)))
    }

    #[test]
    fn each_runtime_has_its_command() {
        let pod = "/kubepods/pod8bd1fb9b-72ff-4a6f-8f9e-5d0f3a6c2b17/{ID}";
        for (path, name, of_pod, expected) in [
            (
                "/docker/{ID}",
                Some("my-leaky-app"),
                None,
                Some("docker exec my-leaky-app"),
            ),
            ("/docker/{ID}", None, None, Some("docker exec 3f4a9b2c1d0e")),
            // The name does not reach a shell.
            (
                "/docker/{ID}",
                Some("a;reboot"),
                None,
                Some("docker exec 3f4a9b2c1d0e"),
            ),
            (
                "/docker/{ID}",
                Some("-it"),
                None,
                Some("docker exec 3f4a9b2c1d0e"),
            ),
            (
                "/machine.slice/libpod-{ID}.scope",
                Some("web"),
                None,
                Some("podman exec web"),
            ),
            ("/default/{ID}", Some("web"), None, Some("nerdctl exec web")),
            (
                "/crio-{ID}.scope",
                Some("web"),
                None,
                Some("crictl exec 3f4a9b2c1d0e"),
            ),
            (
                pod,
                Some("php"),
                Some(("shop", "web-5c9")),
                Some("kubectl exec -n shop web-5c9 -c php --"),
            ),
            (
                pod,
                Some("php"),
                Some(("shop", "$(reboot)")),
                Some("crictl exec 3f4a9b2c1d0e"),
            ),
            (
                pod,
                None,
                Some(("shop", "web-5c9")),
                Some("crictl exec 3f4a9b2c1d0e"),
            ),
            // Of a user.
            (
                "/user.slice/user-1000.slice/user@1000.service/libpod-{ID}.scope",
                Some("web"),
                None,
                None,
            ),
            ("/lxc.payload.web", None, None, None),
            ("/machine.slice/machine-web.scope", None, None, None),
            ("/system.slice/tomcat.service", None, None, None),
        ] {
            let expected = expected.map(|start| format!("{start} jcmd 1 Thread.print"));
            assert_eq!(command(path, name, of_pod), expected, "{path} {name:?}");
        }
    }

    #[test]
    fn the_number_is_the_one_inside() {
        let pid = |pids: &[i32]| {
            let inside = Inside::of(&cgroup("/docker/{ID}", None, None), pids);
            inside.map(|inside| inside.pid)
        };
        assert_eq!(pid(&[4711, 1]), Some(1));
        assert_eq!(
            pid(&[4711]),
            Some(4711),
            "the container has the pids of the host"
        );
        assert_eq!(pid(&[4711, 30, 1]), None, "one in the other");
        assert_eq!(pid(&[]), None);
    }

    #[test]
    fn a_terminal_and_the_output() {
        let inside = Inside::of(&cgroup("/docker/{ID}", Some("web"), None), &[4711, 1]).unwrap();
        assert_eq!(
            inside.run_on_terminal("node inspect -p 1"),
            "docker exec -it web node inspect -p 1"
        );
        assert_eq!(inside.logs(), Some("docker logs web"));
        let pod = "/kubepods/pod8bd1fb9b-72ff-4a6f-8f9e-5d0f3a6c2b17/{ID}";
        let inside = Inside::of(&cgroup(pod, Some("php"), Some(("shop", "web"))), &[7]).unwrap();
        assert_eq!(
            inside.run_on_terminal("x"),
            "kubectl exec -it -n shop web -c php -- x"
        );
        assert_eq!(inside.logs(), Some("kubectl logs -n shop web -c php"));
    }
}
