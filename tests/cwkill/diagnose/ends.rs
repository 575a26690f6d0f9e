//! Who is at the other end of a stuck connection, and which connection of a proxy keeps it.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use netns_harness::{Agent, Dial, Endpoint, Family, Fd, How, Lab, Leak, Recv, SsRow, TcpState};
use serde_json::{Value, json};

use super::{QUICK, block, process};
use crate::support::{PATIENCE, alone, at, cwkill, in_state};
use crate::trial::{Test, each_family, once};

pub const TESTS: &[Test] = &[
    each_family!(the_other_end_in_another_namespace_is_named),
    each_family!(the_other_end_in_the_same_namespace_is_named),
    each_family!(the_leg_that_keeps_a_proxy_is_named),
    each_family!(an_end_of_a_waiting_connection_belongs_to_its_listener),
    each_family!(the_other_end_of_mptcp_is_an_mptcp_socket),
    each_family!(the_other_end_of_a_fallback_is_named),
    once!(a_slow_download_is_not_a_leg),
];

fn ends(owner: &Agent, fd: Option<Fd>, count: u64) -> Value {
    let (pid, comm) = (owner.pid(), owner.comm());
    let fd = fd.map(|fd| fd.0);
    json!([{ "pid": pid, "comm": comm, "fd": fd, "orphan": false, "state": "fin-wait-2",
        "known_by": "addresses", "count": count }])
}

fn the_other_end_in_another_namespace_is_named(family: Family) -> Result<()> {
    let lab = Lab::new()?;
    let leak = lab.start("drained", family, alone(8001, 3))?;
    let (pid, peer) = (leak.app().pid(), leak.peer());
    let diagnose = |netns: &str| -> Result<Value> {
        let line = format!("diagnose {netns} --pid {pid} {QUICK}");
        let document = cwkill(&lab, &line)?.exits(0).json();
        Ok(process(&document, pid)?["other_end"].clone())
    };
    assert_eq!(diagnose("--all-netns")?, ends(peer, None, 3));
    // Without its namespace nothing is known of it.
    assert_eq!(diagnose("")?, json!(null));
    let line = format!("diagnose --all-netns --pid {pid} --sample 50ms");
    let text = cwkill(&lab, &line)?.exits(0).stdout;
    let wanted = format!(
        "\n  other end: {}/{} on this host, FIN-WAIT-2 (3 of 3)\n",
        peer.comm(),
        peer.pid()
    );
    assert!(text.contains(&wanted), "wanted {wanted:?} in\n{text}");

    // The kernel keeps a socket that its process has closed for a minute more.
    let fds = leak.peer_fds();
    let (closed, open) = fds.split_at(2);
    peer.close(closed)?;
    let mut expected = ends(peer, Some(open[0]), 1);
    let orphans = json!({
        "pid": null, "comm": null, "fd": null, "orphan": true, "state": "fin-wait-2", "known_by": "addresses",
        "count": 2
    });
    expected
        .as_array_mut()
        .context("a list")?
        .insert(0, orphans);
    assert_eq!(diagnose("--all-netns")?, expected);
    Ok(())
}

/// The address to listen at, and the one to connect to, over loopback.
fn loopback(family: Family, port: u16) -> Result<(SocketAddr, SocketAddr)> {
    let (listen, connect) = match family {
        Family::V4 => ("127.0.0.1", "127.0.0.1"),
        Family::V6 => ("[::1]", "[::1]"),
        Family::Mapped => ("[::]", "127.0.0.1"),
    };
    Ok((
        format!("{listen}:{port}").parse()?,
        format!("{connect}:{port}").parse()?,
    ))
}

/// Connects `client` to `server`, which listens at `port`: the end of the server, then that of the client.
fn connected(
    (server, listener): (&Agent, Fd),
    client: &Agent,
    to: SocketAddr,
    dial: Dial,
) -> Result<(Endpoint, Endpoint)> {
    let mut from = client.connect(to, 1, dial, PATIENCE)?;
    let mut accepted = server.accept(listener, 1, PATIENCE)?;
    let accepted = accepted.pop().context("nothing accepted")?;
    Ok((accepted, from.pop().context("nothing connected")?))
}

fn the_other_end_in_the_same_namespace_is_named(family: Family) -> Result<()> {
    let lab = Lab::new()?;
    let (server, client) = (
        lab.app_host().agent("server")?,
        lab.app_host().agent("client")?,
    );
    let (address, to) = loopback(family, 7000)?;
    let listener = server.listen(address, false, 16)?;
    let (accepted, end) = connected((&server, listener), &client, to, Dial::default())?;
    client.shutdown(&[end.fd], How::Write)?;
    assert_eq!(server.recv(accepted.fd, 1, PATIENCE)?, Recv::Eof);
    lab.wait_for(PATIENCE, || Ok(in_state(&lab, TcpState::FinWait2)? == 1))?;

    let document = cwkill(&lab, &format!("diagnose {QUICK}"))?.exits(0).json();
    let expected = ends(&client, Some(end.fd), 1);
    assert_eq!(process(&document, server.pid())?["other_end"], expected);
    assert_eq!(document["total"]["other_end"], expected);
    // The end itself is not stuck, and a proxy's pair is not to be seen.
    assert!(process(&document, client.pid()).is_err());
    assert_eq!(process(&document, server.pid())?["other_leg"], json!(null));
    let text = cwkill(&lab, "diagnose --sample 50ms")?.exits(0).stdout;
    let wanted = format!(
        "\n  other end: client/{} (fd {}) on this host, FIN-WAIT-2\n",
        client.pid(),
        end.fd
    );
    assert!(text.contains(&wanted), "wanted {wanted:?} in\n{text}");

    // The same pair from the other side.
    let line = format!("diagnose --state fin-wait-2 {QUICK}");
    let document = cwkill(&lab, &line)?.exits(0).json();
    let end = &process(&document, client.pid())?["other_end"][0];
    assert_eq!(
        (&end["pid"], &end["state"]),
        (&json!(server.pid()), &json!("close-wait"))
    );
    Ok(())
}

fn an_end_of_a_waiting_connection_belongs_to_its_listener(family: Family) -> Result<()> {
    let lab = Lab::new()?;
    let leak = lab.start("not-accepted", family, alone(8004, 2))?;
    let pid = leak.app().pid();
    let line = format!("diagnose --all-netns --pid {pid} {QUICK}");
    let document = cwkill(&lab, &line)?.exits(0).json();
    let listener = block(&document, "listeners", "port", 8004)?;
    assert_eq!(listener["other_end"], ends(leak.peer(), None, 2));
    Ok(())
}

/// Its subflow stays in ESTABLISHED.
fn the_other_end_of_mptcp_is_an_mptcp_socket(family: Family) -> Result<()> {
    let lab = Lab::new()?;
    let leak = lab.start("mptcp", family, alone(8005, 2))?;
    let pid = leak.app().pid();
    names_both_peers(&lab, &leak, || leak.pair().peer_host.ss_mptcp(&[]))?;

    // The same pair from the other side: the states of the MPTCP sockets, not those of the subflows.
    let line = format!(
        "diagnose --all-netns --state fin-wait-2 --pid {} {QUICK}",
        leak.peer().pid()
    );
    let document = cwkill(&lab, &line)?.exits(0).json();
    let end = &process(&document, leak.peer().pid())?["other_end"][0];
    assert_eq!(
        (&end["pid"], &end["state"], &end["count"]),
        (&json!(pid), &json!("close-wait"), &json!(2))
    );
    Ok(())
}

fn the_other_end_of_a_fallback_is_named(family: Family) -> Result<()> {
    let lab = Lab::new()?;
    let leak = lab.start("mptcp-fallback", family, alone(8006, 2))?;
    names_both_peers(&lab, &leak, || leak.pair().peer_host.ss(&[]))
}

/// Waits until both peers have finished, which `rows` shows, and asks `diagnose` for the other ends of the application.
fn names_both_peers(lab: &Lab, leak: &Leak, rows: impl Fn() -> Result<Vec<SsRow>>) -> Result<()> {
    lab.wait_for(PATIENCE, || {
        let rows = rows()?;
        let finished = rows.iter().filter(|row| row.state == TcpState::FinWait2);
        Ok(finished.count() == 2)
    })?;
    let pid = leak.app().pid();
    let line = format!("diagnose --all-netns --pid {pid} {QUICK}");
    let document = cwkill(lab, &line)?.exits(0).json();
    let expected = ends(leak.peer(), None, 2);
    assert_eq!(process(&document, pid)?["other_end"], expected);
    Ok(())
}

/// A process that accepts connections of `client` and opens connections to `backend`, all over loopback.
struct Proxy {
    proxy: Agent,
    client: Agent,
    backend: Agent,
    listeners: (Fd, Fd),
    to: (SocketAddr, SocketAddr),
}

impl Proxy {
    fn new(lab: &Lab, family: Family) -> Result<Self> {
        let agent = |name| lab.app_host().agent(name);
        let (proxy, client, backend) = (agent("proxy")?, agent("client")?, agent("backend")?);
        let ((front, to_proxy), (back, to_backend)) =
            (loopback(family, 8080)?, loopback(family, 5432)?);
        let listeners = (
            proxy.listen(front, false, 16)?,
            backend.listen(back, false, 16)?,
        );
        Ok(Proxy {
            proxy,
            client,
            backend,
            listeners,
            to: (to_proxy, to_backend),
        })
    }

    /// A client that has finished. Returns the end of the proxy, which has read to the end.
    fn finished_client(&self) -> Result<Fd> {
        let server = (&self.proxy, self.listeners.0);
        let (accepted, end) = connected(server, &self.client, self.to.0, Dial::default())?;
        self.client.shutdown(&[end.fd], How::Write)?;
        assert_eq!(self.proxy.recv(accepted.fd, 1, PATIENCE)?, Recv::Eof);
        Ok(accepted.fd)
    }

    /// A connection to the backend, which reads nothing although the proxy sends. Returns the end of the backend.
    fn stalled_backend(&self) -> Result<Fd> {
        let server = (&self.backend, self.listeners.1);
        let (end, leg) = connected(server, &self.proxy, self.to.1, Dial::default())?;
        self.proxy.fill(&[leg.fd], 0, 64 << 20)?;
        Ok(end.fd)
    }

    fn diagnose(&self, lab: &Lab, selectors: &str) -> Result<Value> {
        let line = format!("diagnose {selectors} --sample 300ms --json");
        let document = cwkill(lab, &line)?.exits(0).json();
        Ok(process(&document, self.proxy.pid())?["other_leg"].clone())
    }
}

fn the_leg_that_keeps_a_proxy_is_named(family: Family) -> Result<()> {
    let lab = Lab::new()?;
    let proxy = Proxy::new(&lab, family)?;
    proxy.finished_client()?;
    assert_eq!(proxy.diagnose(&lab, "")?, json!(null));
    let reader = proxy.stalled_backend()?;
    // The kernel may move some bytes more, until the buffer of the backend is full.
    let mut legs = json!(null);
    lab.wait_for(PATIENCE, || {
        legs = proxy.diagnose(&lab, "")?;
        Ok(!legs.is_null())
    })?;
    let to = proxy.to.1;
    let rows = lab.app_host().ss(&["dport", "=", ":5432"])?;
    let [row] = &rows[..] else {
        panic!("{rows:?}");
    };
    assert_eq!(
        legs,
        json!([{
            "address": to.ip().to_string(), "port": 5432, "state": "established", "count": 1, "send_q": row.send_q
        }])
    );
    let text = cwkill(&lab, "diagnose --sample 300ms")?.exits(0).stdout;
    let wanted = format!(
        "\n  its other leg to {to} is likely what keeps it: ESTABLISHED with {} unacknowledged bytes",
        row.send_q
    );
    assert!(text.contains(&wanted), "wanted {wanted:?} in\n{text}");

    // With two of the one and one of the other it is not known which belong together. A selector does not change what there is.
    let second = proxy.finished_client()?;
    assert_eq!(proxy.diagnose(&lab, "")?, json!(null));
    let rows = lab.app_host().ss(&["sport", "=", ":8080"])?;
    let waiting = rows.iter().filter(|row| row.state == TcpState::CloseWait);
    let port = waiting.map(|row| row.peer.port()).next();
    let port = port.context("none in CLOSE-WAIT")?;
    let one = format!("--peer-port {port}");
    assert_eq!(proxy.diagnose(&lab, &one)?, json!(null));
    proxy.proxy.close(&[second])?;
    assert_eq!(at(&proxy.diagnose(&lab, "")?, "/0/count"), "1");
    // The backend reads again.
    proxy.backend.close(&[reader])?;
    assert_eq!(proxy.diagnose(&lab, "")?, json!(null));
    Ok(())
}

/// A client that reads slowly, beside a leaked connection of the same service, is no pair.
fn a_slow_download_is_not_a_leg() -> Result<()> {
    let lab = Lab::new()?;
    let proxy = Proxy::new(&lab, Family::V4)?;
    proxy.finished_client()?;
    let server = (&proxy.proxy, proxy.listeners.0);
    let (slow, _end) = connected(server, &proxy.client, proxy.to.0, Dial::default())?;
    proxy.proxy.fill(&[slow.fd], 0, 64 << 20)?;
    let unsent = || -> Result<Vec<u32>> {
        let rows = lab.app_host().ss(&["sport", "=", ":8080"])?;
        let open = rows.iter().filter(|row| row.state == TcpState::Established);
        Ok(open.map(|row| row.send_q).collect())
    };
    // Until nothing moves: the same number twice.
    let mut before = unsent()?;
    lab.wait_for(PATIENCE, || {
        proxy.diagnose(&lab, "")?;
        let now = unsent()?;
        let is_quiet = now == before;
        before = now;
        Ok(is_quiet)
    })?;
    assert!(before.len() == 1 && before[0] > 0, "{before:?}");
    assert_eq!(proxy.diagnose(&lab, "")?, json!(null));
    Ok(())
}
