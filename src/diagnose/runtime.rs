//! What a program runs on, told from its names, and the command that shows where it hangs. Pure; the command is
//! shown and never run.

use super::verdict::Condition;

/// What a program runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Runtime {
    /// A Java virtual machine.
    Jvm,
    /// Go.
    Go,
    /// CPython or PyPy.
    Python,
    /// Node.js.
    Node,
    /// Ruby.
    Ruby,
    /// .NET.
    DotNet,
}

/// Names of executables, or of processes, and what they run on. Go leaves no trace in a name, so its
/// well-known programs are listed; others get what every program gets.
const NAMES: &[(&str, Runtime)] = &[
    ("java", Runtime::Jvm),
    ("jsvc", Runtime::Jvm),
    ("node", Runtime::Node),
    ("nodejs", Runtime::Node),
    ("gunicorn", Runtime::Python),
    ("uwsgi", Runtime::Python),
    ("uvicorn", Runtime::Python),
    ("celery", Runtime::Python),
    ("puma", Runtime::Ruby),
    ("unicorn", Runtime::Ruby),
    ("dotnet", Runtime::DotNet),
    ("alertmanager", Runtime::Go),
    ("caddy", Runtime::Go),
    ("cockroach", Runtime::Go),
    ("consul", Runtime::Go),
    ("containerd", Runtime::Go),
    ("coredns", Runtime::Go),
    ("dockerd", Runtime::Go),
    ("docker-proxy", Runtime::Go),
    ("etcd", Runtime::Go),
    ("gitea", Runtime::Go),
    ("grafana", Runtime::Go),
    ("grafana-server", Runtime::Go),
    ("influxd", Runtime::Go),
    ("k3s", Runtime::Go),
    ("k3s-server", Runtime::Go),
    ("kube-apiserver", Runtime::Go),
    ("kube-proxy", Runtime::Go),
    ("kubelet", Runtime::Go),
    ("loki", Runtime::Go),
    ("minio", Runtime::Go),
    ("nomad", Runtime::Go),
    ("node_exporter", Runtime::Go),
    ("prometheus", Runtime::Go),
    ("telegraf", Runtime::Go),
    ("traefik", Runtime::Go),
    ("vault", Runtime::Go),
];

/// Beginnings of versioned names: python3.11.
const STEMS: &[(&str, Runtime)] = &[
    ("python", Runtime::Python),
    ("pypy", Runtime::Python),
    ("ruby", Runtime::Ruby),
];

impl Runtime {
    /// Told from the name of the executable, or, without one that says anything, of the process.
    pub fn of(executable: Option<&str>, comm: &str) -> Option<Runtime> {
        executable
            .and_then(Self::of_name)
            .or_else(|| Self::of_name(comm))
    }

    fn of_name(name: &str) -> Option<Runtime> {
        let whole = NAMES.iter().find(|row| row.0 == name);
        let versioned = || {
            STEMS.iter().find(|row| {
                name.strip_prefix(row.0)
                    .is_some_and(|rest| rest.chars().all(|c| c.is_ascii_digit() || c == '.'))
            })
        };
        whole.or_else(versioned).map(|row| row.1)
    }

    /// The name in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Runtime::Jvm => "jvm",
            Runtime::Go => "go",
            Runtime::Python => "python",
            Runtime::Node => "node",
            Runtime::Ruby => "ruby",
            Runtime::DotNet => "dotnet",
        }
    }
}

/// A command for the operator to run, and what to know before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Next {
    /// The command.
    pub command: String,
    /// What it does to the process, or else what to try.
    pub remark: &'static str,
}

/// What to run next on process `pid`; `None` if it is gone.
pub fn next(pid: i32, runtime: Option<Runtime>, condition: Condition) -> Option<Next> {
    let (command, remark) = match (condition, runtime) {
        (Condition::Gone, _) => return None,
        (Condition::Zombie, _) => (format!("ps -o ppid= -p {pid}"), "its parent has to reap it"),
        (Condition::Stopped, _) => (
            format!("kill -CONT {pid}"),
            "once it is known who stopped it, and why",
        ),
        (Condition::Traced, _) => (
            format!("grep TracerPid /proc/{pid}/status"),
            "the number of the debugger",
        ),
        // A debugger would wait with it.
        (Condition::Uninterruptible, _) => (
            format!("cat /proc/{pid}/wchan"),
            "and the kernel log: what does it wait for? No debugger helps",
        ),
        (Condition::Usual, Some(Runtime::Jvm)) => {
            (format!("jcmd {pid} Thread.print"), "as its user; or jstack")
        }
        // SIGQUIT prints the goroutines too, and then ends the program.
        (Condition::Usual, Some(Runtime::Go)) => (
            format!("dlv attach {pid}"),
            "then `goroutines -t`, it is stopped meanwhile; or /debug/pprof/goroutine?debug=2 where it \
             serves that; never SIGQUIT, which ends it",
        ),
        (Condition::Usual, Some(Runtime::Python)) => {
            (format!("py-spy dump --pid {pid}"), "add --native for C")
        }
        (Condition::Usual, Some(Runtime::Node)) => (
            format!("node inspect -p {pid}"),
            "opens its debugger on 127.0.0.1:9229 and leaves it open",
        ),
        (Condition::Usual, Some(Runtime::Ruby)) => {
            (format!("rbspy dump --pid {pid}"), "as its user or root")
        }
        (Condition::Usual, Some(Runtime::DotNet)) => {
            (format!("dotnet-stack report -p {pid}"), "as its user")
        }
        (Condition::Usual, None) => (
            format!("gdb -p {pid} -batch -ex 'thread apply all bt'"),
            "stops it for a moment",
        ),
    };
    Some(Next { command, remark })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_the_runtime() {
        let cases = [
            (Some("java"), "http-nio-8080", Some(Runtime::Jvm)),
            (Some("python3.11"), "gunicorn: maste", Some(Runtime::Python)),
            (Some("bash"), "gunicorn", Some(Runtime::Python)),
            (None, "node", Some(Runtime::Node)),
            (Some("node_exporter"), "node_exporter", Some(Runtime::Go)),
            (Some("pythonista"), "x", None),
            (Some("nginx"), "nginx", None),
            (None, "leaky-app", None),
        ];
        for (executable, comm, wanted) in cases {
            assert_eq!(
                Runtime::of(executable, comm),
                wanted,
                "{executable:?} {comm}"
            );
        }
    }

    #[test]
    fn the_command_fits_the_process() {
        let command = |runtime, condition| next(42, runtime, condition).unwrap().command;
        assert!(command(Some(Runtime::Jvm), Condition::Usual).starts_with("jcmd 42"));
        assert!(command(None, Condition::Usual).starts_with("gdb -p 42"));
        assert_eq!(
            command(Some(Runtime::Jvm), Condition::Stopped),
            "kill -CONT 42"
        );
        let waits = command(Some(Runtime::Python), Condition::Uninterruptible);
        assert!(waits.starts_with("cat"), "{waits}: a debugger would hang");
        assert_eq!(next(42, None, Condition::Gone), None);
    }
}
