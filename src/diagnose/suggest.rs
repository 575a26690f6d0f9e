//! The language runtime of a process, and the command that shows where the process hangs. Pure: cwkill prints
//! the command and never runs it.

use super::verdict::Condition;

/// The language runtime of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LanguageRuntime {
    Jvm,
    Go,
    /// CPython or PyPy.
    Python,
    /// Node.js.
    Node,
    Ruby,
    DotNet,
}

/// Names of executables or processes, with their runtime. The name of a Go program does not show the language, so
/// well-known Go programs are listed; other programs get the default command with a remark about Go. The build
/// information inside the executable would show it, but a read from a dead file system would block cwkill.
const NAMES: &[(&str, LanguageRuntime)] = &[
    ("java", LanguageRuntime::Jvm),
    ("jsvc", LanguageRuntime::Jvm),
    ("node", LanguageRuntime::Node),
    ("nodejs", LanguageRuntime::Node),
    ("gunicorn", LanguageRuntime::Python),
    ("uwsgi", LanguageRuntime::Python),
    ("uvicorn", LanguageRuntime::Python),
    ("celery", LanguageRuntime::Python),
    ("puma", LanguageRuntime::Ruby),
    ("unicorn", LanguageRuntime::Ruby),
    ("dotnet", LanguageRuntime::DotNet),
    ("alertmanager", LanguageRuntime::Go),
    ("caddy", LanguageRuntime::Go),
    ("cockroach", LanguageRuntime::Go),
    ("consul", LanguageRuntime::Go),
    ("containerd", LanguageRuntime::Go),
    ("coredns", LanguageRuntime::Go),
    ("dockerd", LanguageRuntime::Go),
    ("docker-proxy", LanguageRuntime::Go),
    ("etcd", LanguageRuntime::Go),
    ("gitea", LanguageRuntime::Go),
    ("grafana", LanguageRuntime::Go),
    ("grafana-server", LanguageRuntime::Go),
    ("influxd", LanguageRuntime::Go),
    ("k3s", LanguageRuntime::Go),
    ("k3s-server", LanguageRuntime::Go),
    ("kube-apiserver", LanguageRuntime::Go),
    ("kube-proxy", LanguageRuntime::Go),
    ("kubelet", LanguageRuntime::Go),
    ("loki", LanguageRuntime::Go),
    ("minio", LanguageRuntime::Go),
    ("nomad", LanguageRuntime::Go),
    ("node_exporter", LanguageRuntime::Go),
    ("prometheus", LanguageRuntime::Go),
    ("telegraf", LanguageRuntime::Go),
    ("traefik", LanguageRuntime::Go),
    ("vault", LanguageRuntime::Go),
];

/// Prefixes of names that end with a version, for example python3.11.
const STEMS: &[(&str, LanguageRuntime)] = &[
    ("python", LanguageRuntime::Python),
    ("pypy", LanguageRuntime::Python),
    ("ruby", LanguageRuntime::Ruby),
];

impl LanguageRuntime {
    /// The runtime by the name of the executable, or by the name of the process (`comm`).
    ///
    /// A process can set its own `comm`. cwkill uses `comm` only if the executable is unknown, or for runtimes that run
    /// scripts: their commands are harmless if the guess is wrong.
    pub fn of(executable: Option<&str>, comm: &str) -> Option<LanguageRuntime> {
        let Some(executable) = executable else {
            return Self::of_name(comm);
        };
        Self::of_name(executable).or_else(|| {
            Self::of_name(comm).filter(|runtime| {
                matches!(runtime, LanguageRuntime::Python | LanguageRuntime::Ruby)
            })
        })
    }

    fn of_name(name: &str) -> Option<LanguageRuntime> {
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
            LanguageRuntime::Jvm => "jvm",
            LanguageRuntime::Go => "go",
            LanguageRuntime::Python => "python",
            LanguageRuntime::Node => "node",
            LanguageRuntime::Ruby => "ruby",
            LanguageRuntime::DotNet => "dotnet",
        }
    }
}

/// A command for the operator to run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Suggestion {
    pub command: String,
    /// The effect of the command on the process, or an alternative.
    pub remark: String,
}

/// The facts about a process that decide which command to suggest.
#[derive(Clone, Copy, Debug)]
pub struct SuggestionInput {
    pub pid: i32,
    /// `None`: unknown.
    pub runtime: Option<LanguageRuntime>,
    pub condition: Condition,
    /// The signals that the process has a handler for, as in [`ProcessStatus::caught`]. SIGQUIT and SIGUSR1 end a
    /// process that has no handler for them. `None`: unknown.
    ///
    /// [`ProcessStatus::caught`]: crate::proc::status::ProcessStatus::caught
    pub caught: Option<u64>,
}

impl SuggestionInput {
    fn catches(&self, signal: i32) -> bool {
        self.caught
            .is_some_and(|caught| caught >> (signal - 1) & 1 == 1)
    }
}

/// The command to run next; `None` if the process is gone.
pub fn suggest(process: SuggestionInput) -> Option<Suggestion> {
    let pid = process.pid;
    let (command, remark) = match process.condition {
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
        // A debugger would block too.
        Condition::Uninterruptible => (
            format!("cat /proc/{pid}/wchan"),
            UNINTERRUPTIBLE_REMARK.to_owned(),
        ),
        Condition::ThreadUninterruptible(thread) => (
            format!("cat /proc/{pid}/task/{thread}/wchan"),
            UNINTERRUPTIBLE_REMARK.to_owned(),
        ),
        Condition::Normal => stack_command(process),
    };
    Some(Suggestion { command, remark })
}

const UNINTERRUPTIBLE_REMARK: &str =
    "and the kernel log show what it waits for; a debugger does not help";

/// The command that shows the stacks of a process in a normal state, and a remark.
fn stack_command(process: SuggestionInput) -> (String, String) {
    let pid = process.pid;
    // jcmd and jstack first send SIGQUIT (jdk.attach), `node inspect` first sends SIGUSR1 (process._debugProcess).
    let without_signal = |signal: &str, tool: &str| {
        let (command, remark) = debugger(pid);
        (
            command,
            format!("{remark}; no {tool}: {signal} is not caught, and would end it"),
        )
    };
    let (command, remark) = match process.runtime {
        Some(LanguageRuntime::Jvm) if !process.catches(libc::SIGQUIT) => {
            return without_signal("SIGQUIT", "jcmd or jstack");
        }
        Some(LanguageRuntime::Node) if !process.catches(libc::SIGUSR1) => {
            return without_signal("SIGUSR1", "node inspect");
        }
        None => return debugger(pid),
        Some(LanguageRuntime::Jvm) => (
            format!("jcmd {pid} Thread.print"),
            "as its user; or jstack".to_owned(),
        ),
        // SIGQUIT prints the goroutines too, but then it ends the program.
        Some(LanguageRuntime::Go) => (
            "curl 'http://127.0.0.1:PORT/debug/pprof/goroutine?debug=2'".to_owned(),
            format!(
                "if it serves that; else `dlv attach {pid}`, then `goroutines -t`: this stops it meanwhile, and at `exit` answer n to \"kill the process?\": Enter kills it; never SIGQUIT, which ends it"
            ),
        ),
        Some(LanguageRuntime::Python) => (
            format!("py-spy dump --pid {pid}"),
            "pauses it meanwhile; --native adds C".to_owned(),
        ),
        Some(LanguageRuntime::Node) => (
            format!("node inspect -p {pid}"),
            "opens its debugger on 127.0.0.1:9229 and leaves it open".to_owned(),
        ),
        Some(LanguageRuntime::Ruby) => (
            format!("rbspy dump --pid {pid}"),
            "as its user or root; pauses it meanwhile".to_owned(),
        ),
        Some(LanguageRuntime::DotNet) => (
            format!("dotnet-stack report -p {pid}"),
            "as its user".to_owned(),
        ),
    };
    (command, remark)
}

/// The command for a process of unknown runtime, and a remark.
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
    fn the_names_show_the_runtime() {
        let cases = [
            (Some("java"), "http-nio-8080", Some(LanguageRuntime::Jvm)),
            (
                Some("python3.11"),
                "gunicorn: maste",
                Some(LanguageRuntime::Python),
            ),
            (Some("bash"), "gunicorn", Some(LanguageRuntime::Python)),
            (None, "node", Some(LanguageRuntime::Node)),
            (
                Some("node_exporter"),
                "node_exporter",
                Some(LanguageRuntime::Go),
            ),
            (Some("pythonista"), "x", None),
            (Some("nginx"), "nginx", None),
            // The process set this name itself, and the command of the wrong runtime would end the process.
            (Some("nginx"), "java", None),
            (Some("bash"), "node", None),
            (Some("bash"), "etcd", None),
            (None, "java", Some(LanguageRuntime::Jvm)),
            (None, "leaky-app", None),
        ];
        for (executable, comm, expected) in cases {
            assert_eq!(
                LanguageRuntime::of(executable, comm),
                expected,
                "{executable:?} {comm}"
            );
        }
    }

    fn input(runtime: Option<LanguageRuntime>, condition: Condition) -> SuggestionInput {
        SuggestionInput {
            pid: 42,
            runtime,
            condition,
            caught: Some(1 << (libc::SIGQUIT - 1) | 1 << (libc::SIGUSR1 - 1)),
        }
    }

    #[test]
    fn the_command_is_right_for_the_process() {
        let command = |runtime, condition| suggest(input(runtime, condition)).unwrap().command;
        assert!(command(Some(LanguageRuntime::Jvm), Condition::Normal).starts_with("jcmd 42"));
        assert!(command(None, Condition::Normal).starts_with("gdb -p 42"));
        assert_eq!(
            command(Some(LanguageRuntime::Jvm), Condition::Stopped),
            "kill -CONT 42"
        );
        let waits = command(Some(LanguageRuntime::Python), Condition::Uninterruptible);
        assert!(waits.starts_with("cat"), "{waits}: a debugger would hang");
        let waits = command(None, Condition::ThreadUninterruptible(43));
        assert_eq!(waits, "cat /proc/42/task/43/wchan");
        assert_eq!(suggest(input(None, Condition::Gone)), None);
    }

    #[test]
    fn no_command_sends_a_signal_that_ends_the_process() {
        for (runtime, signal) in [
            (LanguageRuntime::Jvm, libc::SIGQUIT),
            (LanguageRuntime::Node, libc::SIGUSR1),
        ] {
            for caught in [None, Some(0), Some(!(1 << (signal - 1)))] {
                let process = SuggestionInput {
                    caught,
                    ..input(Some(runtime), Condition::Normal)
                };
                let suggestion = suggest(process).unwrap();
                assert!(suggestion.command.starts_with("gdb"), "{suggestion:?}");
                assert!(suggestion.remark.contains("would end it"), "{suggestion:?}");
            }
        }
        let go = suggest(input(Some(LanguageRuntime::Go), Condition::Normal)).unwrap();
        assert!(!go.command.contains("dlv"), "{go:?}");
        assert!(go.remark.contains("answer n"), "{go:?}");
    }
}
