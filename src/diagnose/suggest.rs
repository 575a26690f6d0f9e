//! The language runtime of a process, and the command that shows where the process hangs. Pure: cwkill prints
//! the command and never runs it.

use super::inside::Inside;
use super::limit::ReachedLimit;
use super::verdict::Condition;
use crate::proc::Process;

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

    /// Whether its programs keep their sockets in epoll sets or have finalizers, so that a reclaim would skip the descriptors.
    pub fn knows_numbers(self) -> bool {
        use LanguageRuntime::{DotNet, Go, Jvm, Node};
        matches!(self, Jvm | Go | Node | DotNet)
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

/// The facts about a process that decide which commands to suggest.
#[derive(Clone, Copy, Debug)]
pub struct SuggestionInput<'a> {
    pub pid: i32,
    /// `None`: unknown.
    pub runtime: Option<LanguageRuntime>,
    pub condition: Condition,
    /// The signals that the process has a handler for, as in [`ProcessStatus::caught`]. SIGQUIT and SIGUSR1 end a
    /// process that has no handler for them. `None`: unknown.
    ///
    /// [`ProcessStatus::caught`]: crate::proc::status::ProcessStatus::caught
    pub caught: Option<u64>,
    /// Descriptors of stuck sockets.
    pub held: usize,
    /// Descriptors of dead sockets.
    pub dead: usize,
    /// Its limit of descriptors, if it is at the limit.
    pub reached: Option<ReachedLimit>,
    /// The process that its sockets come from, if it does not use them.
    pub inherited_from: Option<&'a Process>,
    /// It is one of many processes with one connection each.
    pub per_connection: bool,
    /// The way into its container, if it is in one.
    pub inside: Option<&'a Inside>,
    /// It reads to the end and does not close, and not because of a leg of a proxy.
    pub leaks: bool,
}

impl SuggestionInput<'_> {
    fn catches(&self, signal: i32) -> bool {
        self.caught
            .is_some_and(|caught| caught >> (signal - 1) & 1 == 1)
    }
}

/// The commands to run, at most two, the first one first. None if the process is gone.
pub fn suggest(process: SuggestionInput<'_>) -> Vec<Suggestion> {
    let pid = process.pid;
    let halted = match process.condition {
        Condition::Exited => return Vec::new(),
        Condition::Zombie => Some((
            format!("ps -o ppid= -p {pid}"),
            "its parent must reap it".to_owned(),
        )),
        Condition::Stopped => Some((
            format!("kill -CONT {pid}"),
            "after you know who stopped it and why".to_owned(),
        )),
        Condition::Frozen => Some((
            format!("cat /proc/{pid}/cgroup"),
            "to thaw it: docker unpause, systemctl thaw; or write 0 to cgroup.freeze of that cgroup or of one above it"
                .to_owned(),
        )),
        Condition::Traced => Some((
            format!("grep TracerPid /proc/{pid}/status"),
            "the number of the debugger".to_owned(),
        )),
        // A debugger would block too.
        Condition::Uninterruptible => Some((
            format!("cat /proc/{pid}/wchan"),
            UNINTERRUPTIBLE_REMARK.to_owned(),
        )),
        Condition::ThreadUninterruptible(thread) => Some((
            format!("cat /proc/{pid}/task/{thread}/wchan"),
            UNINTERRUPTIBLE_REMARK.to_owned(),
        )),
        Condition::Normal => None,
    };
    let commands = match (halted, process.reached, process.inherited_from) {
        (Some(halted), ..) => vec![halted],
        (None, _, Some(from)) => vec![(
            reclaim(process),
            format!("closes them here; then set FD_CLOEXEC (close_fds) in {from}"),
        )],
        (None, Some(limit), None) => {
            vec![make_room(process, limit), stack_without_descriptor(process)]
        }
        (None, None, None) if process.per_connection => vec![
            stack_command(process),
            (
                format!("kill {pid}"),
                format!(
                    "ends this one process and its connection; repeat for the others. In PostgreSQL: SELECT pg_terminate_backend({pid})"
                ),
            ),
        ],
        // What the operator has closed is dead, and nothing is stuck any more.
        (None, None, None) if process.held == 0 && process.dead > 0 => {
            vec![
                (reclaim(process), dead_remark(process)),
                stack_command(process),
            ]
        }
        (None, None, None) => vec![stack_command(process)],
    };
    let suggestion = |(command, remark)| Suggestion { command, remark };
    commands.into_iter().map(suggestion).collect()
}

/// The command that names the line of code that leaks; `None` if that would name nothing. It must run on the host, so the pid is the one
/// there. It is beside the others: it takes a while, and none of them waits for it.
pub fn trace(process: SuggestionInput<'_>) -> Option<Suggestion> {
    // One process of many with one connection each reads the end of no second one.
    let is_own_leak = process.leaks && process.inherited_from.is_none() && !process.per_connection;
    if !is_own_leak || process.condition != Condition::Normal {
        return None;
    }
    let needs = match process.runtime {
        None | Some(LanguageRuntime::Go) => String::new(),
        Some(LanguageRuntime::Jvm) => {
            let map = inside_or_here(process, false, &|pid| {
                format!("jcmd {pid} Compiler.perfmap")
            });
            format!(
                "; for names start Java with -XX:+PreserveFramePointer, and run `{map}` meanwhile"
            )
        }
        Some(LanguageRuntime::Python) => {
            "; for names start it with `python3 -X perf`, from 3.12".to_owned()
        }
        // The stack has only functions of the runtime.
        Some(LanguageRuntime::Node | LanguageRuntime::Ruby | LanguageRuntime::DotNet) => {
            return None;
        }
    };
    Some(Suggestion {
        command: format!("cwkill trace --pid {} --for 1m", process.pid),
        remark: format!("for sockets that become stuck meanwhile{needs}"),
    })
}

/// The command that closes the descriptors of stuck or dead sockets inside the process.
fn reclaim(process: SuggestionInput<'_>) -> String {
    let pid = process.pid;
    match process.held {
        0 => format!("cwkill reclaim --pid {pid}"),
        _ => format!("cwkill --pid {pid} --reclaim"),
    }
}

fn dead_remark(process: SuggestionInput<'_>) -> String {
    match process.runtime.is_some_and(LanguageRuntime::knows_numbers) {
        true => format!("says how to free its {} dead descriptors", process.dead),
        false => format!(
            "frees those of its {} dead descriptors that it does not use",
            process.dead
        ),
    }
}

/// The command that gives a process at its limit descriptors again, and a remark.
fn make_room(process: SuggestionInput<'_>, limit: ReachedLimit) -> (String, String) {
    let (raise, needs) = limit.raise(process.pid);
    let leaked = process.held + process.dead;
    match leaked {
        0 => (raise, format!("raises its limit{needs}")),
        _ if !limit.can_be_raised() => (
            reclaim(process),
            format!("frees up to {leaked}, or says how; or {raise}{needs}"),
        ),
        _ if process.runtime.is_some_and(LanguageRuntime::knows_numbers) => (
            raise,
            format!(
                "raises its limit{needs}; then `{}` says how to free {leaked}",
                reclaim(process)
            ),
        ),
        _ => (
            reclaim(process),
            format!("frees up to {leaked}; or {raise}"),
        ),
    }
}

/// The command that shows the stacks of a process that can open no descriptor, and a remark.
fn stack_without_descriptor(process: SuggestionInput<'_>) -> (String, String) {
    let pid = process.pid;
    match process.runtime {
        // jcmd and jstack connect to a socket of the JVM, which would have to accept them.
        Some(LanguageRuntime::Jvm) if process.catches(libc::SIGQUIT) => (
            format!("kill -QUIT {pid}"),
            match process.inside.and_then(Inside::logs) {
                Some(logs) => {
                    format!("prints the stacks to its output: `{logs}`; jcmd needs a free descriptor")
                }
                None => {
                    "prints the stacks to its standard output and does not end it; jcmd needs a free descriptor".into()
                }
            },
        ),
        Some(LanguageRuntime::Go) => (
            format!("dlv attach {pid}"),
            "then `goroutines -t`; at `exit` answer n to \"kill the process?\"; pprof needs a free descriptor"
                .to_owned(),
        ),
        // They listen on a socket.
        Some(LanguageRuntime::Jvm | LanguageRuntime::Node | LanguageRuntime::DotNet) => {
            debugger(pid)
        }
        Some(LanguageRuntime::Python | LanguageRuntime::Ruby) | None => stack_command(process),
    }
}

const UNINTERRUPTIBLE_REMARK: &str =
    "and the kernel log show what it waits for; a debugger does not help";

/// The command that shows the stacks of a process in a normal state, and a remark.
fn stack_command(process: SuggestionInput<'_>) -> (String, String) {
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
            inside_or_here(process, false, &|pid| format!("jcmd {pid} Thread.print")),
            "as its user; or jstack".to_owned(),
        ),
        // SIGQUIT prints the goroutines too, but then it ends the program.
        Some(LanguageRuntime::Go) => (
            match process.inside {
                // An image of a Go program has no curl.
                Some(_) => format!("nsenter -t {pid} -n {PPROF}"),
                None => PPROF.to_owned(),
            },
            format!(
                "if it serves that; else `dlv attach {pid}`, then `goroutines -t`: this stops it meanwhile, and at `exit` answer n to \"kill the process?\": Enter kills it; never SIGQUIT, which ends it"
            ),
        ),
        Some(LanguageRuntime::Python) => (
            format!("py-spy dump --pid {pid}"),
            "pauses it meanwhile; --native adds C".to_owned(),
        ),
        Some(LanguageRuntime::Node) => (
            inside_or_here(process, true, &|pid| format!("node inspect -p {pid}")),
            "opens its debugger on 127.0.0.1:9229 and leaves it open".to_owned(),
        ),
        Some(LanguageRuntime::Ruby) => (
            format!("rbspy dump --pid {pid}"),
            "as its user or root; pauses it meanwhile".to_owned(),
        ),
        Some(LanguageRuntime::DotNet) => (
            inside_or_here(process, false, &|pid| {
                format!("dotnet-stack report -p {pid}")
            }),
            "as its user".to_owned(),
        ),
    };
    (command, remark)
}

const PPROF: &str = "curl 'http://127.0.0.1:PORT/debug/pprof/goroutine?debug=2'";

/// A command of a tool that speaks with the process, and has to be where it is: in its container, if it is in one.
fn inside_or_here(
    process: SuggestionInput<'_>,
    needs_terminal: bool,
    command: &dyn Fn(i32) -> String,
) -> String {
    match process.inside {
        Some(inside) if needs_terminal => inside.run_on_terminal(&command(inside.pid)),
        Some(inside) => inside.run(&command(inside.pid)),
        None => command(process.pid),
    }
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

    fn input(runtime: Option<LanguageRuntime>, condition: Condition) -> SuggestionInput<'static> {
        SuggestionInput {
            pid: 42,
            runtime,
            condition,
            caught: Some(1 << (libc::SIGQUIT - 1) | 1 << (libc::SIGUSR1 - 1)),
            held: 3,
            dead: 2,
            reached: None,
            inherited_from: None,
            per_connection: false,
            inside: None,
            leaks: true,
        }
    }

    fn commands(process: SuggestionInput<'_>) -> Vec<String> {
        suggest(process)
            .into_iter()
            .map(|one| one.command)
            .collect()
    }

    #[test]
    fn the_command_is_right_for_the_process() {
        let command = |runtime, condition| suggest(input(runtime, condition))[0].command.clone();
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
        assert_eq!(command(None, Condition::Frozen), "cat /proc/42/cgroup");
        assert_eq!(suggest(input(None, Condition::Exited)), []);
    }

    #[test]
    fn the_command_fits_the_container() {
        let cgroup = crate::diagnose::inside::tests::cgroup;
        let docker = cgroup("/docker/{ID}", Some("my-leaky-app"), None);
        let inside = Inside::of(&docker, &[42, 1]);
        let of = |runtime| SuggestionInput {
            inside: inside.as_ref(),
            ..input(runtime, Condition::Normal)
        };
        let command = |runtime| suggest(of(Some(runtime)))[0].command.clone();
        assert_eq!(
            command(LanguageRuntime::Jvm),
            "docker exec my-leaky-app jcmd 1 Thread.print"
        );
        assert_eq!(
            command(LanguageRuntime::Node),
            "docker exec -it my-leaky-app node inspect -p 1"
        );
        assert_eq!(
            command(LanguageRuntime::DotNet),
            "docker exec my-leaky-app dotnet-stack report -p 1"
        );
        assert!(command(LanguageRuntime::Go).starts_with("nsenter -t 42 -n curl 'http://127"));
        // These work from the host, and are hardly in the image.
        assert_eq!(command(LanguageRuntime::Python), "py-spy dump --pid 42");
        assert!(suggest(of(None))[0].command.starts_with("gdb -p 42"));
        let at_limit = SuggestionInput {
            reached: Some(ReachedLimit {
                soft: 64,
                hard: None,
                may_raise_hard: true,
            }),
            ..of(Some(LanguageRuntime::Jvm))
        };
        let quit = &suggest(at_limit)[1];
        assert_eq!(quit.command, "kill -QUIT 42");
        assert!(
            quit.remark.contains("`docker logs my-leaky-app`"),
            "{quit:?}"
        );
    }

    #[test]
    fn at_its_limit_a_process_first_needs_descriptors() {
        let at = |runtime, hard| SuggestionInput {
            reached: Some(ReachedLimit {
                soft: 1024,
                hard,
                may_raise_hard: true,
            }),
            ..input(runtime, Condition::Normal)
        };
        let jvm = at(Some(LanguageRuntime::Jvm), Some(4096));
        let raise_soft = "prlimit --pid 42 --nofile=2048:";
        assert_eq!(commands(jvm), [raise_soft, "kill -QUIT 42"]);
        let remark = "raises its limit; then `cwkill --pid 42 --reclaim` says how to free 5";
        assert_eq!(suggest(jvm)[0].remark, remark);
        let python = at(Some(LanguageRuntime::Python), Some(1024));
        let raise = "prlimit --pid 42 --nofile=2048:2048";
        assert_eq!(commands(python)[0], "cwkill --pid 42 --reclaim");
        assert_eq!(
            suggest(python)[0].remark,
            format!("frees up to 5; or {raise}")
        );
        let deaf = SuggestionInput {
            caught: Some(0),
            ..jvm
        };
        assert!(commands(deaf)[1].starts_with("gdb"), "SIGQUIT would end it");
        let dead = SuggestionInput { held: 0, ..python };
        assert_eq!(commands(dead)[0], "cwkill reclaim --pid 42");
        // Nobody here may raise the limit.
        let mut bound = jvm;
        bound.reached.as_mut().unwrap().may_raise_hard = false;
        assert_eq!(commands(bound)[0], raise_soft, "its hard limit is higher");
        bound.reached.as_mut().unwrap().hard = Some(1024);
        assert_eq!(commands(bound)[0], "cwkill --pid 42 --reclaim");
        assert!(suggest(bound)[0].remark.contains("or prlimit --pid PID"));
        // What fills the table is not leaked sockets.
        let other = SuggestionInput {
            held: 0,
            dead: 0,
            ..at(None, Some(1024))
        };
        assert_eq!(commands(other)[0], raise);
        for runtime in [
            LanguageRuntime::Node,
            LanguageRuntime::DotNet,
            LanguageRuntime::Go,
        ] {
            let second = commands(at(Some(runtime), None)).remove(1);
            assert!(
                second.starts_with("gdb") || second.starts_with("dlv"),
                "{second}"
            );
        }
        assert!(commands(at(Some(LanguageRuntime::Python), None))[1].starts_with("py-spy"));
    }

    #[test]
    fn what_was_closed_is_freed_first() {
        let closed = |runtime| SuggestionInput {
            held: 0,
            ..input(runtime, Condition::Normal)
        };
        let reclaim = "cwkill reclaim --pid 42";
        assert_eq!(commands(closed(None))[0], reclaim);
        assert!(commands(closed(None))[1].starts_with("gdb"));
        let java = suggest(closed(Some(LanguageRuntime::Jvm)));
        assert_eq!(java[0].command, reclaim);
        assert_eq!(java[0].remark, "says how to free its 2 dead descriptors");
    }

    #[test]
    fn an_heir_is_freed_and_a_process_of_one_connection_is_ended() {
        let from = crate::proc::testdata::process(7, "server");
        let heir = SuggestionInput {
            inherited_from: Some(&from),
            reached: Some(ReachedLimit {
                soft: 64,
                hard: None,
                may_raise_hard: true,
            }),
            ..input(None, Condition::Normal)
        };
        assert_eq!(commands(heir), ["cwkill --pid 42 --reclaim"]);
        assert!(
            suggest(heir)[0]
                .remark
                .ends_with("FD_CLOEXEC (close_fds) in server/7")
        );
        let one = SuggestionInput {
            per_connection: true,
            ..input(Some(LanguageRuntime::Python), Condition::Normal)
        };
        assert_eq!(commands(one), ["py-spy dump --pid 42", "kill 42"]);
        assert!(
            suggest(one)[1]
                .remark
                .starts_with("ends this one process and its connection")
        );
        let stopped = SuggestionInput {
            condition: Condition::Stopped,
            ..one
        };
        assert_eq!(commands(stopped), ["kill -CONT 42"]);
    }

    #[test]
    fn a_trace_is_suggested_where_it_names_a_line() {
        use LanguageRuntime::{DotNet, Go, Jvm, Node, Python, Ruby};
        let of = |runtime| input(runtime, Condition::Normal);
        let native = trace(of(None)).unwrap();
        assert_eq!(native.command, "cwkill trace --pid 42 --for 1m");
        assert_eq!(native.remark, "for sockets that become stuck meanwhile");
        assert_eq!(trace(of(Some(Go))), Some(native));
        let java = trace(of(Some(Jvm))).unwrap().remark;
        assert!(java.contains("`jcmd 42 Compiler.perfmap`"), "{java}");
        let python = trace(of(Some(Python))).unwrap().remark;
        assert!(python.contains("`python3 -X perf`"), "{python}");
        for runtime in [Node, Ruby, DotNet] {
            assert_eq!(trace(of(Some(runtime))), None);
        }
        for condition in [
            Condition::Stopped,
            Condition::Frozen,
            Condition::Traced,
            Condition::Uninterruptible,
            Condition::ThreadUninterruptible(43),
            Condition::Zombie,
            Condition::Exited,
        ] {
            assert_eq!(trace(input(None, condition)), None, "{condition:?}");
        }
        let from = crate::proc::testdata::process(7, "server");
        for not_its_own in [
            SuggestionInput {
                leaks: false,
                ..of(None)
            },
            SuggestionInput {
                inherited_from: Some(&from),
                ..of(None)
            },
            SuggestionInput {
                per_connection: true,
                ..of(None)
            },
        ] {
            assert_eq!(trace(not_its_own), None, "{not_its_own:?}");
        }
    }

    /// cwkill traces from the host, and jcmd has to be in the container.
    #[test]
    fn a_trace_has_the_pid_of_the_host() {
        let cgroup = crate::diagnose::inside::tests::cgroup;
        let docker = cgroup("/docker/{ID}", Some("my-leaky-app"), None);
        let inside = Inside::of(&docker, &[42, 1]);
        let java = trace(SuggestionInput {
            inside: inside.as_ref(),
            ..input(Some(LanguageRuntime::Jvm), Condition::Normal)
        });
        let java = java.unwrap();
        assert_eq!(java.command, "cwkill trace --pid 42 --for 1m");
        let map = "`docker exec my-leaky-app jcmd 1 Compiler.perfmap`";
        assert!(java.remark.contains(map), "{java:?}");
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
                let suggestion = suggest(process).remove(0);
                assert!(suggestion.command.starts_with("gdb"), "{suggestion:?}");
                assert!(suggestion.remark.contains("would end it"), "{suggestion:?}");
            }
        }
        let go = suggest(input(Some(LanguageRuntime::Go), Condition::Normal)).remove(0);
        assert!(!go.command.contains("dlv"), "{go:?}");
        assert!(go.remark.contains("answer n"), "{go:?}");
    }
}
