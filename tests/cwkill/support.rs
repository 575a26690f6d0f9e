//! What the tests share: running the program, and reading what it and `ss` say.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use netns_harness::{Agent, AgentOptions, Dial, Family, How, Lab, Leak, Options, SsRow, TcpState};
use serde_json::Value;

/// The program under test.
pub const CWKILL: &str = env!("CARGO_BIN_EXE_cwkill");

/// How long a state may take to come about.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// How a run of the program ended.
#[derive(Debug)]
pub struct Ran {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Ran {
    /// Of a command that has ended.
    pub fn of(output: std::process::Output) -> Result<Self> {
        Ok(Ran {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).context("stdout is no UTF-8")?,
            stderr: String::from_utf8(output.stderr).context("stderr is no UTF-8")?,
        })
    }

    /// Its exit status was `code`.
    pub fn exits(self, code: i32) -> Result<Self> {
        ensure!(
            self.code == Some(code),
            "wanted exit status {code}: {self:#?}"
        );
        Ok(self)
    }

    /// Its one JSON document.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.stdout).with_context(|| format!("no JSON: {self:#?}"))
    }

    /// The sockets of its JSON document.
    pub fn sockets(&self) -> Result<Vec<Value>> {
        let sockets = self.json()?["sockets"].as_array().cloned();
        sockets.context("no sockets in the document")
    }

    /// Its stderr has this text.
    pub fn complains(self, text: &str) -> Result<Self> {
        ensure!(self.stderr.contains(text), "wanted {text:?}: {self:#?}");
        Ok(self)
    }
}

/// Runs the program on the leaking host.
pub fn cwkill(lab: &Lab, arguments: &str) -> Result<Ran> {
    let command = lab.app_host().command(CWKILL);
    ran(command.args(arguments.split_whitespace()))
}

/// Runs a command.
pub fn ran(command: netns_harness::HostCommand<'_>) -> Result<Ran> {
    Ran::of(command.output()?)
}

/// Waits until the first thread of process `pid` is in a pause, or the process has ended.
pub fn until_it_sleeps(lab: &Lab, pid: u32) -> Result<()> {
    lab.wait_for(PATIENCE, || {
        let wchan = std::fs::read_to_string(format!("/proc/{pid}/wchan"))?;
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        Ok(wchan.contains("nanosleep") || stat.contains(") Z "))
    })
}

/// `count` sockets on port 8080.
pub fn count(count: usize) -> Options {
    Options {
        count,
        ..Options::default()
    }
}

/// `count` sockets on `port`, of an application of their own.
pub fn alone(port: u16, sockets: usize) -> Options {
    Options {
        port,
        own: true,
        ..count(sockets)
    }
}

/// A process as `options` say that leaves one socket on 127.0.0.1:7000 in CLOSE-WAIT, and its peer.
pub fn leaker(lab: &Lab, options: &AgentOptions) -> Result<(Agent, Agent)> {
    let app = lab.app_host().agent_as(options)?;
    let address = "127.0.0.1:7000".parse()?;
    let listener = app.listen(address, false, 16)?;
    let peer = lab.app_host().agent("peer")?;
    let ends = peer.connect(address, 1, Dial::default(), PATIENCE)?;
    app.accept(listener, 1, PATIENCE)?;
    peer.shutdown(&[ends[0].fd], How::Write)?;
    // Not by ss, which prints a name as it is and so can break its own lines.
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

/// What `ss` shows of connections (not of listeners), in a fixed order.
pub fn connections(lab: &Lab) -> Result<Vec<SsRow>> {
    let mut rows = lab.app_host().ss(&[])?;
    rows.retain(|row| row.state != TcpState::Listen);
    rows.sort_by_key(|row| row.cookie);
    Ok(rows)
}

/// How many sockets `ss` shows in `state`.
pub fn in_state(lab: &Lab, state: TcpState) -> Result<usize> {
    let rows = lab.app_host().ss(&[])?;
    Ok(rows.iter().filter(|row| row.state == state).count())
}

/// Waits until the peer has its FIN acknowledged: from then on both ends are quiet.
pub fn settled(lab: &Lab, leak: &Leak) -> Result<()> {
    lab.wait_for(PATIENCE, || {
        let rows = leak.pair().peer_host.ss(&[])?;
        let closing = |row: &SsRow| row.state == TcpState::FinWait1;
        Ok(!rows.iter().any(closing))
    })
}

/// Every connection of `leak` still carries bytes from the peer to the application and back.
pub fn carries_data(leak: &Leak) -> Result<()> {
    for conn in leak.conns() {
        let app = conn.app_fd.context("no descriptor in the application")?;
        let peer = conn.peer_fd.context("no descriptor in the peer")?;
        leak.peer().send(&[peer], b"ping")?;
        let got = leak.app().recv(app, 100, PATIENCE)?;
        ensure!(
            got == netns_harness::Recv::Data(b"ping".to_vec()),
            "{got:?}"
        );
        leak.app().send(&[app], b"pong")?;
        let got = leak.peer().recv(peer, 100, PATIENCE)?;
        ensure!(
            got == netns_harness::Recv::Data(b"pong".to_vec()),
            "{got:?}"
        );
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

/// Every socket of a run has this outcome by this method.
pub fn all_have(sockets: &[Value], outcome: &str, method: &str) -> Result<()> {
    for socket in sockets {
        let is = (at(socket, "/result/outcome"), at(socket, "/result/method"));
        ensure!(is == (outcome.into(), method.into()), "{socket:#}");
    }
    Ok(())
}

/// Fails unless both are equal, showing both.
pub fn same<T: PartialEq + std::fmt::Debug>(is: &T, wanted: &T) -> Result<()> {
    ensure!(is == wanted, "\n    is: {is:?}\nwanted: {wanted:?}");
    Ok(())
}

/// A dry run with `selector` shows so many sockets.
pub fn selects(lab: &Lab, selector: &str, expected: usize) -> Result<()> {
    let status = if expected == 0 { 1 } else { 0 };
    let sockets = cwkill(lab, &format!("-n --json {selector}"))?
        .exits(status)
        .and_then(|ran| ran.sockets())
        .with_context(|| selector.to_owned())?;
    same(&sockets.len(), &expected).with_context(|| selector.to_owned())
}
