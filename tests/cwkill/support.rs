//! Shared by the tests: running cwkill, and reading its output and that of `ss`.

use std::ffi::OsString;
use std::time::Duration;

use anyhow::{Context, Result};
use netns_harness::owners::{Build, Owner};
use netns_harness::{Agent, AgentOptions, Dial, Family, How, Lab, Leak, Options, SsRow, TcpState};
use serde_json::Value;

/// The program under test.
pub const CWKILL: &str = env!("CARGO_BIN_EXE_cwkill");

/// Longest wait for a state.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// For Python: serves a file system by FUSE that has the file of the first argument as `/mnt/program`. The process that serves it, `server`, can
/// be stopped: then every open of the program hangs. It ends with its parent. Needs a mount namespace of its own.
pub const FILE_BY_FUSE: &str = "
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
directory, program = '/mnt', open(sys.argv[1], 'rb').read()
def attributes(node):
    mode, size = (0o40755, 0) if node == 1 else (0o100755, len(program))
    return struct.pack('<6Q10I', node, size, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)
def serve(fuse):
    # include/uapi/linux/fuse.h
    INIT, LOOKUP, FORGET, GETATTR, OPEN, READ, RELEASE, FLUSH, OPENDIR, FORGETS = 26, 1, 2, 3, 14, 15, 18, 25, 27, 42
    while True:
        request = os.read(fuse, 1 << 20)
        _, code, unique, node = struct.unpack_from('<IIQQ', request)
        error, answer = 0, b''
        if code == INIT:
            answer = struct.pack('<IIIIHHIIHHI7I', 7, 31, 0, 0, 0, 0, 4096, 0, 0, 0, 0, *[0] * 7)
        elif code == LOOKUP and request[40:].startswith(b'program'):
            answer = struct.pack('<QQQQII', 2, 0, 0, 0, 0, 0) + attributes(2)
        elif code == GETATTR:
            answer = struct.pack('<QII', 0, 0, 0) + attributes(node)
        elif code in (OPEN, OPENDIR):
            answer = struct.pack('<QII', 1, 0, 0)
        elif code == READ:
            _, offset, size = struct.unpack_from('<QQI', request, 40)
            answer = program[offset:offset + size]
        elif code in (FORGET, FORGETS):
            continue
        elif code not in (RELEASE, FLUSH):
            error = -38 if code != LOOKUP else -2
        os.write(fuse, struct.pack('<IiQ', 16 + len(answer), error, unique) + answer)
fuse = os.open('/dev/fuse', os.O_RDWR)
options = f'fd={fuse},rootmode=40000,user_id=0,group_id=0'.encode()
assert libc.mount(b'hung', directory.encode(), b'fuse', 0, options) == 0, ctypes.get_errno()
server = os.fork()
if server == 0:
    libc.prctl(1, 9)
    serve(fuse)
os.close(fuse)
";

/// The result of a command.
pub struct Ran {
    command: String,
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

/// For the message of a failed assertion.
impl std::fmt::Debug for Ran {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Ran {
            command,
            code,
            stdout,
            stderr,
        } = self;
        write!(
            f,
            "{command}\nexit status {code:?}\nstdout:\n{stdout}\nstderr:\n{stderr}"
        )
    }
}

impl Ran {
    /// Of `command`, which has ended.
    pub fn of(command: &str, output: std::process::Output) -> Result<Self> {
        Ok(Ran {
            command: command.to_owned(),
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).context("stdout is not UTF-8")?,
            stderr: String::from_utf8(output.stderr).context("stderr is not UTF-8")?,
        })
    }

    /// Asserts its exit status.
    #[track_caller]
    pub fn exits(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "exit status of {self:?}");
        self
    }

    /// The one JSON document on its standard output.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// The sockets of its JSON document.
    #[track_caller]
    pub fn sockets(&self) -> Vec<Value> {
        match &self.json()["sockets"] {
            Value::Array(sockets) => sockets.clone(),
            _ => panic!("no sockets in the document: {self:?}"),
        }
    }

    /// Asserts that its standard error contains `text`.
    #[track_caller]
    pub fn complains(self, text: &str) -> Self {
        assert!(
            self.stderr.contains(text),
            "no {text:?} on standard error of {self:?}"
        );
        self
    }
}

/// Adds `--min-idle 0s` to a command line of cwkill that acts or lists, unless it gives `--min-idle` itself: the sockets of the
/// tests are young. Commands that need a shell are changed too. cwkill has no history, unless the environment says where.
/// With [`AS_TYPED`] in its environment, a command stays as it is.
pub fn take_sockets_in_use(
    arguments: &mut Vec<OsString>,
    environment: &mut Vec<(OsString, OsString)>,
) {
    // The tests run side by side, and each knows only its own runs.
    if !environment.iter().any(|(name, _)| name == HISTORY) {
        environment.push((HISTORY.into(), OsString::new()));
    }
    if environment.iter().any(|(name, _)| name == AS_TYPED) {
        return;
    }
    stay_in_this_namespace(arguments);
    let gives_it = |argument: &OsString| argument.to_string_lossy().contains(TAKE_ALL[0]);
    if arguments.iter().any(gives_it) {
        return;
    }
    if let Some(place) = arguments.iter().position(|argument| argument == CWKILL) {
        let is_command = |text: &OsString| COMMANDS.iter().any(|command| text == command);
        if !arguments[place..].iter().any(is_command) {
            arguments.splice(place + 1..place + 1, TAKE_ALL.map(OsString::from));
        }
        return;
    }
    for argument in arguments.iter_mut() {
        let Some(script) = argument.to_str().filter(|text| text.contains(CWKILL)) else {
            continue;
        };
        let mut parts = script.split(CWKILL);
        let mut changed = parts.next().unwrap_or_default().to_owned();
        for part in parts {
            let next = part.split_whitespace().next().unwrap_or_default();
            changed.push_str(CWKILL);
            if part.starts_with(' ') && !COMMANDS.contains(&next) {
                changed.push(' ');
                changed.push_str(&TAKE_ALL.join(" "));
            }
            changed.push_str(part);
        }
        *argument = changed.into();
    }
}

/// Adds the namespace of the host to a command line that selects owners by a name: other tests have owners of the same name in other
/// namespaces. A command line that names namespaces stays as it is.
fn stay_in_this_namespace(arguments: &mut Vec<OsString>) {
    let Some(place) = arguments.iter().position(|argument| argument == CWKILL) else {
        return;
    };
    let has = |options: &[&str]| {
        let mut given = arguments[place..].iter().map(|one| one.to_string_lossy());
        given.any(|one| options.contains(&one.split('=').next().unwrap_or_default()))
    };
    let by_name = [
        "--process",
        "--unit",
        "--container",
        "--pod",
        "--namespace",
        "--compose-service",
        "--cgroup",
    ];
    if has(&by_name) && !has(&["-N", "--netns", "--all-netns", "reclaim"]) {
        arguments.extend(["-N", "/proc/self/ns/net"].map(OsString::from));
    }
}

/// Whether /proc shows the processes of every pid namespace: it is of the initial one.
pub fn sees_every_process() -> Result<bool> {
    let link = std::fs::read_link("/proc/self/ns/pid")?;
    Ok(link.as_os_str() == "pid:[4026531836]")
}

/// The variable with the directory for the history; empty for none.
pub const HISTORY: &str = "CWKILL_HISTORY";

/// See [`take_sockets_in_use`].
pub const AS_TYPED: &str = "CWKILL_TESTS_AS_TYPED";

/// Makes cwkill take the sockets in which data has just moved.
pub const TAKE_ALL: [&str; 2] = ["--min-idle", "0s"];

/// The commands of cwkill, which have selectors of their own.
const COMMANDS: [&str; 7] = [
    "diagnose", "trace", "check", "doctor", "reclaim", "daemon", "gateway",
];

/// cwkill in our own namespace, without a history: the sockets of all tests would be in it.
pub fn cwkill_outside() -> std::process::Command {
    let mut command = std::process::Command::new(CWKILL);
    command.env(HISTORY, "");
    command
}

/// Runs cwkill on the leaking host.
pub fn cwkill(lab: &Lab, arguments: &str) -> Result<Ran> {
    let command = lab.app_host().command(CWKILL);
    ran(command.args(arguments.split_whitespace()))
}

/// Runs cwkill on the leaking host with its default for `--min-idle`.
pub fn as_typed(lab: &Lab, arguments: &str) -> Result<Ran> {
    let command = lab.app_host().command(CWKILL).env(AS_TYPED, "1");
    ran(command.args(arguments.split_whitespace()))
}

/// Runs a command to its end.
pub fn ran(command: netns_harness::HostCommand<'_>) -> Result<Ran> {
    Ran::of(&format!("{command:?}"), command.output()?)
}

/// Waits until the first thread of process `pid` sleeps in nanosleep(2), or the process has ended.
pub fn until_it_sleeps(lab: &Lab, pid: u32) -> Result<()> {
    lab.wait_for(PATIENCE, || {
        let wchan = std::fs::read_to_string(format!("/proc/{pid}/wchan"))?;
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        Ok(wchan.contains("nanosleep") || stat.contains(") Z "))
    })
}

/// A process whose first thread has ended, with others that run. The kernel shows no descriptors under its /proc/PID/fd.
pub fn leaderless(lab: &Lab) -> Result<Owner> {
    let owner = Owner::start(lab.app_host(), Build::Plain, "leaderless", 2)?;
    let first = format!("/proc/{}/stat", owner.pid());
    lab.wait_for(PATIENCE, || {
        Ok(std::fs::read_to_string(&first)?.contains(") Z "))
    })?;
    Ok(owner)
}

/// `count` sockets on port 8080.
pub fn count(count: usize) -> Options {
    Options {
        count,
        ..Options::default()
    }
}

/// `sockets` sockets on `port`, in an application of their own.
pub fn alone(port: u16, sockets: usize) -> Options {
    Options {
        port,
        own: true,
        ..count(sockets)
    }
}

/// A process with these `options` that leaves one socket on 127.0.0.1:7000 in CLOSE-WAIT, and its peer.
pub fn leaker(lab: &Lab, options: &AgentOptions) -> Result<(Agent, Agent)> {
    let app = lab.app_host().agent_as(options)?;
    let address = "127.0.0.1:7000".parse()?;
    let listener = app.listen(address, false, 16)?;
    let peer = lab.app_host().agent("peer")?;
    let ends = peer.connect(address, 1, Dial::default(), PATIENCE)?;
    app.accept(listener, 1, PATIENCE)?;
    peer.shutdown(&[ends[0].fd], How::Write)?;
    // Not by ss: it prints names unescaped, so a hostile name breaks its lines.
    lab.wait_for(PATIENCE, || {
        let stuck = |socket: &netns_harness::KernelSocket| socket.state == TcpState::CloseWait;
        Ok(lab.app_host().sockets()?.iter().any(stuck))
    })?;
    Ok((app, peer))
}

/// A lab with one scenario.
pub fn lab(scenario: &str, family: Family, sockets: usize) -> Result<(Lab, Leak)> {
    let lab = Lab::new()?;
    let leak = lab.start(scenario, family, count(sockets))?;
    Ok((lab, leak))
}

/// The connections (not the listeners) that `ss` shows, ordered by cookie.
pub fn connections(lab: &Lab) -> Result<Vec<SsRow>> {
    let mut rows = lab.app_host().ss(&[])?;
    rows.retain(|row| row.state != TcpState::Listen);
    rows.sort_by_key(|row| row.cookie);
    Ok(rows)
}

/// The number of sockets that `ss` shows in `state`.
pub fn in_state(lab: &Lab, state: TcpState) -> Result<usize> {
    let rows = lab.app_host().ss(&[])?;
    Ok(rows.iter().filter(|row| row.state == state).count())
}

/// Waits until the FIN of the peer is acknowledged. From then on both ends are quiet.
pub fn settled(lab: &Lab, leak: &Leak) -> Result<()> {
    lab.wait_for(PATIENCE, || {
        let rows = leak.pair().peer_host.ss(&[])?;
        let closing = |row: &SsRow| row.state == TcpState::FinWait1;
        Ok(!rows.iter().any(closing))
    })
}

/// Asserts that every connection of `leak` still carries bytes from the peer to the application and back.
#[track_caller]
pub fn carries_data(leak: &Leak) -> Result<()> {
    for conn in leak.conns() {
        let app = conn.app_fd.context("no descriptor in the application")?;
        let peer = conn.peer_fd.context("no descriptor in the peer")?;
        leak.peer().send(&[peer], b"ping")?;
        let got = leak.app().recv(app, 100, PATIENCE)?;
        assert_eq!(got, netns_harness::Recv::Data(b"ping".to_vec()));
        leak.app().send(&[app], b"pong")?;
        let got = leak.peer().recv(peer, 100, PATIENCE)?;
        assert_eq!(got, netns_harness::Recv::Data(b"pong".to_vec()));
    }
    Ok(())
}

/// The value at a JSON pointer, as text without quotes.
pub fn at(value: &Value, pointer: &str) -> String {
    match value.pointer(pointer) {
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
        None => "(nothing there)".to_owned(),
    }
}

/// Why a socket was skipped.
pub fn skip_reason(socket: &Value) -> String {
    at(socket, "/result/reason")
}

/// Why the first method that was tried on a socket has failed.
pub fn first_error(socket: &Value) -> String {
    at(socket, "/result/attempts/0/error")
}

/// Why the first method that is not planned for a socket is excluded.
pub fn first_exclusion(socket: &Value) -> String {
    at(socket, "/excluded/0/reason")
}

/// Asserts that every socket has this outcome by this method.
#[track_caller]
pub fn all_have(sockets: &[Value], outcome: &str, method: &str) {
    for socket in sockets {
        let is = (at(socket, "/result/outcome"), at(socket, "/result/method"));
        assert_eq!(is, (outcome.into(), method.into()), "{socket:#}");
    }
}

/// Asserts that a dry run with `selector` shows this number of sockets.
#[track_caller]
pub fn selects(lab: &Lab, selector: &str, expected: usize) -> Result<()> {
    let status = if expected == 0 { 1 } else { 0 };
    let ran = cwkill(lab, &format!("-n --json {selector}"))?.exits(status);
    assert_eq!(ran.sockets().len(), expected, "{selector}");
    Ok(())
}
