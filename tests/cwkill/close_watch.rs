//! `cwkill --watch`: sockets are closed as they come.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use netns_harness::{Agent, Dial, Endpoint, Family, Fd, Lab, Recv, TcpState};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::gateway_watch::Watching;
use crate::support::{CWKILL, PATIENCE, alone, at, count, cwkill, in_state, lab};
use crate::trial::{Test, once};

pub const TESTS: &[Test] = &[
    once!(new_connections_to_a_peer_are_closed_and_no_others),
    once!(stuck_sockets_are_closed_as_they_come),
    once!(a_watch_for_sockets_ends_by_itself),
    once!(a_dry_run_of_a_watch_closes_nothing),
];

/// Two servers, by their addresses, and a client on the same host.
struct Scene {
    lab: Lab,
    client: Agent,
    server: Agent,
    listeners: [(Fd, SocketAddr); 2],
}

impl Scene {
    fn start() -> Result<Self> {
        let lab = Lab::new()?;
        let (client, server) = (
            lab.app_host().agent("client")?,
            lab.app_host().agent("server")?,
        );
        let listen = |address: &str| -> Result<(Fd, SocketAddr)> {
            let address = address.parse()?;
            Ok((server.listen(address, false, 64)?, address))
        };
        Ok(Scene {
            listeners: [listen("127.0.0.2:9000")?, listen("127.0.0.3:9000")?],
            lab,
            client,
            server,
        })
    }

    /// A connection to the server with this number: the ends of the client and of the server.
    fn connect(&self, number: usize) -> Result<(Endpoint, Endpoint)> {
        let (listener, address) = self.listeners[number];
        // A watch may close it before connect(2) has returned.
        let dial = Dial {
            detached: true,
            ..Dial::default()
        };
        let opened = self.client.connect(address, 1, dial, PATIENCE)?;
        let accepted = self.server.accept(listener, 1, PATIENCE)?;
        Ok((opened[0], accepted[0]))
    }

    #[track_caller]
    fn carries_data(&self, (client, server): (Endpoint, Endpoint)) -> Result<()> {
        self.client.send(&[client.fd], b"ping")?;
        let got = self.server.recv(server.fd, 100, PATIENCE)?;
        assert_eq!(got, Recv::Data(b"ping".to_vec()));
        Ok(())
    }

    #[track_caller]
    fn is_over(&self, (client, server): (Endpoint, Endpoint)) -> Result<()> {
        let got = self.server.recv(server.fd, 100, PATIENCE)?;
        assert_eq!(got, Recv::Failed(libc::ECONNRESET));
        let got = self.client.recv(client.fd, 100, PATIENCE)?;
        assert_eq!(got, Recv::Failed(libc::ECONNABORTED));
        Ok(())
    }

    fn watch(&self, line: &str) -> Result<Watching> {
        watch(&self.lab, line)
    }
}

fn watch(lab: &Lab, line: &str) -> Result<Watching> {
    let command = lab.app_host().command(CWKILL);
    Watching::run(command.args(line.split_whitespace()))
}

fn new_connections_to_a_peer_are_closed_and_no_others() -> Result<()> {
    const COUNT: usize = 5;
    let scene = Scene::start()?;
    let mut bystanders = vec![scene.connect(1)?];
    let before = scene.connect(0)?;
    scene.carries_data(before)?;
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("acts.jsonl");
    let line = format!(
        "--state established --peer 127.0.0.2 --method destroy --watch --jsonl --log-file {}",
        path.display()
    );
    let mut watching = scene.watch(&line)?;
    scene.is_over(before)?;
    for _ in 1..COUNT {
        let pair = scene.connect(0)?;
        bystanders.push(scene.connect(1)?);
        scene.is_over(pair)?;
    }
    for _ in 0..COUNT {
        let object = watching.object()?;
        let socket = &object;
        assert_eq!(at(socket, "/result/outcome"), "closed", "{object:#}");
        assert_eq!(at(socket, "/peer/address"), "127.0.0.2", "{object:#}");
    }
    let ran = watching.interrupted()?.exits(0);
    assert_eq!(ran.stdout, "", "{ran:?}");
    ran.complains("5 sockets matched: 5 closed; watched for");
    for pair in bystanders {
        scene.carries_data(pair)?;
    }
    let text = std::fs::read_to_string(&path)?;
    let mut events = Vec::new();
    for line in text.lines() {
        let record: Value = serde_json::from_str(line).context("a record")?;
        events.push(at(&record, "/event"));
    }
    assert_eq!(
        (&events[0][..], &events[11][..]),
        ("begin", "end"),
        "{text}"
    );
    let of = |name: &str| events.iter().filter(|event| *event == name).count();
    assert_eq!((of("intent"), of("outcome")), (COUNT, COUNT), "{text}");
    Ok(())
}

fn stuck_sockets_are_closed_as_they_come() -> Result<()> {
    let (lab, _leak) = lab("unread", Family::V4, 2)?;
    let mut watching = watch(&lab, "--all --method destroy --allow-spin --watch")?;
    let header = watching.line()?;
    assert!(header.contains("RESULT"), "{header}");
    let mut closed = |rows: usize| -> Result<()> {
        for _ in 0..rows {
            let row = watching.line()?;
            assert!(row.contains("closed by destroy"), "{row}");
        }
        Ok(())
    };
    closed(2)?;
    let _more = lab.start("unread", Family::V4, count(1))?;
    closed(1)?;
    let _others = lab.start("unread", Family::V4, alone(9000, 3))?;
    closed(3)?;
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 0);
    watching.signal(Signal::SIGTERM)?;
    let ran = watching.ended()?.exits(0);
    let summary = ran.stdout.lines().last().unwrap_or_default();
    assert!(
        summary.starts_with("6 sockets matched: 6 closed"),
        "{ran:?}"
    );
    Ok(())
}

fn a_watch_for_sockets_ends_by_itself() -> Result<()> {
    let scene = Scene::start()?;
    cwkill(&scene.lab, "--port 9 --watch --for 300ms")?.exits(1);
    cwkill(&scene.lab, "--port 9 --watch --for 300ms --ok-if-none")?.exits(0);
    scene.connect(0)?;
    let line =
        "--state established --peer 127.0.0.2 --method destroy --watch --max-kills 2 --jsonl";
    let mut watching = scene.watch(line)?;
    watching.object()?;
    scene.is_over(scene.connect(0)?)?;
    watching.object()?;
    watching.ended()?.exits(0).complains("2 closed");
    let third = scene.connect(0)?;
    scene.carries_data(third)
}

fn a_dry_run_of_a_watch_closes_nothing() -> Result<()> {
    let scene = Scene::start()?;
    let first = scene.connect(0)?;
    let line = "--state established --peer 127.0.0.2 --watch -n --jsonl";
    let mut watching = scene.watch(line)?;
    assert_eq!(at(&watching.object()?, "/result"), "null");
    let second = scene.connect(0)?;
    let object = watching.object()?;
    let port = second.0.local.port().to_string();
    assert_eq!(at(&object, "/local/port"), port, "{object:#}");
    let ran = watching.interrupted()?.exits(0);
    assert_eq!(ran.stdout, "", "each is shown once: {ran:?}");
    ran.complains("2 sockets matched; dry run, nothing was done");
    scene.carries_data(first)?;
    scene.carries_data(second)
}
