//! Helpers of several tests.

use std::io::Read as _;
use std::process::{Command, Output, Stdio};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// A generous limit. A test that passes never waits for it.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// The program under test.
pub fn harness() -> Command {
    Command::new(env!("CARGO_BIN_EXE_netns-harness"))
}

/// The program under test, with arguments separated by spaces.
pub fn harness_with(arguments: &str) -> Command {
    let mut command = harness();
    command.args(arguments.split_whitespace());
    command
}

/// Runs a command to its end, or kills it at the deadline.
pub fn output(command: &mut Command) -> Result<Output> {
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let pid = Pid::from_raw(child.id().cast_signed());
    let (done, result) = channel();
    std::thread::spawn(move || done.send(child.wait_with_output()));
    match result.recv_timeout(DEADLINE) {
        Ok(output) => Ok(output?),
        Err(_) => {
            kill(pid, Signal::SIGKILL)?;
            anyhow::bail!("{command:?} did not end")
        }
    }
}

/// Runs a command and checks its exit status. Returns stdout and stderr.
pub fn output_with_code(command: &mut Command, code: i32) -> Result<(String, String)> {
    let output = output(command)?;
    let (stdout, stderr) = (
        String::from_utf8(output.stdout)?,
        String::from_utf8(output.stderr)?,
    );
    ensure!(
        output.status.code() == Some(code),
        "{command:?}: {} instead of {code}\n{stdout}{stderr}",
        output.status
    );
    Ok((stdout, stderr))
}

/// Waits for a condition.
pub fn wait_until(goal: &str, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + DEADLINE;
    while !condition()? {
        ensure!(Instant::now() < deadline, "not within {DEADLINE:?}: {goal}");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Reads from a child until it has printed this line.
pub fn wait_for_line(output: &mut impl std::io::Read, line: &str) -> Result<()> {
    let mut seen = Vec::new();
    while !seen.ends_with(format!("{line}\n").as_bytes()) {
        let mut byte = [0];
        output
            .read_exact(&mut byte)
            .with_context(|| format!("no `{line}` in {:?}", String::from_utf8_lossy(&seen)))?;
        seen.extend(byte);
    }
    Ok(())
}

/// Whether child processes can become another user.
pub fn has_other_users() -> Result<bool> {
    let mut map = String::new();
    std::fs::File::open("/proc/self/uid_map")?.read_to_string(&mut map)?;
    let whole = |line: &str| {
        line.split_whitespace()
            .nth(2)
            .and_then(|n| n.parse().ok())
            .is_some_and(|n: u64| n > 65534)
    };
    Ok(map.lines().any(whole))
}

/// Runs the harness with a command that prints the output of `ss -Htan`. Returns the numbers of sockets in CLOSE-WAIT,
/// ESTABLISHED and LISTEN.
pub fn count_states(arguments: &str) -> Result<(usize, usize, usize)> {
    let (stdout, _) = output_with_code(&mut harness_with(arguments), 0)?;
    let count = |state: &str| {
        let of_state = |line: &&str| line.starts_with(state);
        stdout.lines().filter(of_state).count()
    };
    Ok((count("CLOSE-WAIT"), count("ESTAB"), count("LISTEN")))
}
