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
/// well-known programs are listed; others get what every program gets, with a word on Go. Its mark is inside
/// the executable, which is not read: a dead file system would hold us there.
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
    /// Told from the name of the executable. A process chooses its own name, so that this counts only where
    /// the executable may not be read, or for what runs scripts and does nothing to the wrong process.
    pub fn of(executable: Option<&str>, comm: &str) -> Option<Runtime> {
        let Some(executable) = executable else {
            return Self::of_name(comm);
        };
        Self::of_name(executable).or_else(|| {
            Self::of_name(comm).filter(|runtime| matches!(runtime, Runtime::Python | Runtime::Ruby))
        })
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
    pub remark: String,
}

/// The process that a command is for.
#[derive(Clone, Copy, Debug)]
pub struct Subject {
    /// Its number.
    pub pid: i32,
    /// What it runs on, if that could be told.
    pub runtime: Option<Runtime>,
    /// What its state says.
    pub condition: Condition,
    /// The signals for which it has a handler, as [`ProcessStatus::caught`]. One that it has none for ends it.
    ///
    /// [`ProcessStatus::caught`]: crate::proc::status::ProcessStatus::caught
    pub caught: Option<u64>,
}

impl Subject {
    fn catches(&self, signal: i32) -> bool {
        self.caught
            .is_some_and(|caught| caught >> (signal - 1) & 1 == 1)
    }
}

/// What to run next; `None` if the process is gone.
pub fn next(subject: Subject) -> Option<Next> {
    let pid = subject.pid;
    let (command, remark) = match subject.condition {
        Condition::Gone => return None,
        Condition::Zombie => (
            format!("ps -o ppid= -p {pid}"),
            "its parent must reap it".to_owned(),
        ),
        Condition::Stopped => (
            format!("kill -CONT {pid}"),
            "after you know who stopped it and why".to_owned(),
        ),
        Condition::Traced => (
            format!("grep TracerPid /proc/{pid}/status"),
            "the number of the debugger".to_owned(),
        ),
        // A debugger would wait with it.
        Condition::Uninterruptible => (format!("cat /proc/{pid}/wchan"), ASLEEP.to_owned()),
        Condition::ThreadUninterruptible(thread) => (
            format!("cat /proc/{pid}/task/{thread}/wchan"),
            ASLEEP.to_owned(),
        ),
        Condition::Usual => inside(subject),
    };
    Some(Next { command, remark })
}

const ASLEEP: &str = "and the kernel log show what it waits for; a debugger does not help";

/// What shows where a process hangs that runs as usual.
fn inside(subject: Subject) -> (String, String) {
    let pid = subject.pid;
    // jcmd and jstack begin with SIGQUIT (jdk.attach), node with SIGUSR1 (process._debugProcess).
    let ends_it = |signal: &str, what: &str| {
        let (command, remark) = debugger(pid);
        (
            command,
            format!("{remark}; no {what}: {signal} is not caught, and would end it"),
        )
    };
    let (command, remark) = match subject.runtime {
        Some(Runtime::Jvm) if !subject.catches(libc::SIGQUIT) => {
            return ends_it("SIGQUIT", "jcmd or jstack");
        }
        Some(Runtime::Node) if !subject.catches(libc::SIGUSR1) => {
            return ends_it("SIGUSR1", "node inspect");
        }
        None => return debugger(pid),
        Some(Runtime::Jvm) => (
            format!("jcmd {pid} Thread.print"),
            "as its user; or jstack".to_owned(),
        ),
        // SIGQUIT prints the goroutines too, and then ends the program.
        Some(Runtime::Go) => (
            "curl 'http://127.0.0.1:PORT/debug/pprof/goroutine?debug=2'".to_owned(),
            format!(
                "if it serves that; else `dlv attach {pid}`, then `goroutines -t`: this stops it meanwhile, and at `exit` answer n to \"kill the process?\": Enter kills it; never SIGQUIT, which ends it"
            ),
        ),
        Some(Runtime::Python) => (
            format!("py-spy dump --pid {pid}"),
            "pauses it meanwhile; --native adds C".to_owned(),
        ),
        Some(Runtime::Node) => (
            format!("node inspect -p {pid}"),
            "opens its debugger on 127.0.0.1:9229 and leaves it open".to_owned(),
        ),
        Some(Runtime::Ruby) => (
            format!("rbspy dump --pid {pid}"),
            "as its user or root; pauses it meanwhile".to_owned(),
        ),
        Some(Runtime::DotNet) => (
            format!("dotnet-stack report -p {pid}"),
            "as its user".to_owned(),
        ),
    };
    (command, remark)
}

fn debugger(pid: i32) -> (String, String) {
    (
        format!("gdb -p {pid} -batch -ex 'thread apply all bt'"),
        "stops it while symbols load, which can take long; for Go use /debug/pprof/goroutine?debug=2 instead, if it serves that"
            .to_owned(),
    )
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
            // Its name is its own choice, and the command would end it.
            (Some("nginx"), "java", None),
            (Some("bash"), "node", None),
            (Some("bash"), "etcd", None),
            (None, "java", Some(Runtime::Jvm)),
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

    fn subject(runtime: Option<Runtime>, condition: Condition) -> Subject {
        Subject {
            pid: 42,
            runtime,
            condition,
            caught: Some(1 << (libc::SIGQUIT - 1) | 1 << (libc::SIGUSR1 - 1)),
        }
    }

    #[test]
    fn the_command_fits_the_process() {
        let command = |runtime, condition| next(subject(runtime, condition)).unwrap().command;
        assert!(command(Some(Runtime::Jvm), Condition::Usual).starts_with("jcmd 42"));
        assert!(command(None, Condition::Usual).starts_with("gdb -p 42"));
        assert_eq!(
            command(Some(Runtime::Jvm), Condition::Stopped),
            "kill -CONT 42"
        );
        let waits = command(Some(Runtime::Python), Condition::Uninterruptible);
        assert!(waits.starts_with("cat"), "{waits}: a debugger would hang");
        let waits = command(None, Condition::ThreadUninterruptible(43));
        assert_eq!(waits, "cat /proc/42/task/43/wchan");
        assert_eq!(next(subject(None, Condition::Gone)), None);
    }

    #[test]
    fn no_command_sends_a_signal_that_ends_the_process() {
        for (runtime, signal) in [
            (Runtime::Jvm, libc::SIGQUIT),
            (Runtime::Node, libc::SIGUSR1),
        ] {
            for caught in [None, Some(0), Some(!(1 << (signal - 1)))] {
                let subject = Subject {
                    caught,
                    ..subject(Some(runtime), Condition::Usual)
                };
                let next = next(subject).unwrap();
                assert!(next.command.starts_with("gdb"), "{next:?}");
                assert!(next.remark.contains("would end it"), "{next:?}");
            }
        }
        let go = next(subject(Some(Runtime::Go), Condition::Usual)).unwrap();
        assert!(!go.command.contains("dlv"), "{go:?}");
        assert!(go.remark.contains("answer n"), "{go:?}");
    }
}
