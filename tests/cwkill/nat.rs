//! Connections in the conntrack table: NAT whose entry has expired, and connections of others. The tests need nft(8).

use std::net::SocketAddr;

use anyhow::{Context, Result};
use netns_harness::{Agent, Dial, Family, Fd, How, Lab, Leak, TcpState};
use serde_json::{Value, json};

use crate::support::{CWKILL, PATIENCE, Ran, all_have, alone, at, count, cwkill, in_state, ran};
use crate::trial::{Need, Test, each_family, once};

pub const TESTS: &[Test] = &[
    each_family!(every_method_reaches_a_proxy_behind_an_expired_entry),
    each_family!(without_a_descriptor_an_rst_does_not_reach_it),
    each_family!(a_fin_alone_does_not_pass_an_expired_entry),
    each_family!(connections_between_other_hosts_are_counted),
    once!(a_table_that_may_not_be_read_is_not_spoken_of).needs(Need::RootOfTheMachine),
    each_family!(conntrack_tells_the_other_end),
    each_family!(without_an_entry_the_last_segment_tells_the_other_end),
    each_family!(a_socket_of_an_earlier_connection_is_not_the_other_end),
    each_family!(the_application_is_the_other_end_of_its_proxy),
];

/// An application whose connections to port 80 of another host are redirected to a proxy on its own host, as a service mesh does.
/// The proxy has finished, and the conntrack entries have expired.
struct Mesh {
    lab: Lab,
    /// The other host, with a connection that is in use.
    bystander: Leak,
    app: Agent,
    proxy: Agent,
    fds: Vec<Fd>,
}

/// Runs `script` on the leaking host.
pub fn sh(lab: &Lab, script: &str) -> Result<()> {
    ran(lab.app_host().command("sh").args(["-ec", script]))?.exits(0);
    Ok(())
}

fn mesh(family: Family) -> Result<Mesh> {
    // The default is a minute.
    mesh_that_forgets_after(family, 1)
}

/// A mesh whose conntrack keeps an entry in CLOSE_WAIT for some seconds.
fn mesh_that_forgets_after(family: Family, seconds: u32) -> Result<Mesh> {
    let (mesh, accepted) = connected_mesh(family, seconds)?;
    mesh.proxy.shutdown(&accepted, How::Write)?;
    let Mesh { lab, app, .. } = &mesh;
    lab.wait_for(PATIENCE, || Ok(in_state(lab, TcpState::FinWait2)? == 3))?;
    let old = format!("-n --pid {} --min-age 3s --min-idle 0s", app.pid());
    lab.wait_for(PATIENCE, || {
        let found = cwkill(lab, &format!("{old} --json"))?;
        Ok(found.code == Some(0) && found.sockets().len() == 3)
    })?;
    Ok(mesh)
}

/// A mesh in which nobody has finished, and the proxy's descriptors.
fn connected_mesh(family: Family, seconds: u32) -> Result<(Mesh, Vec<Fd>)> {
    let lab = Lab::new()?;
    let bystander = lab.start("established", family, count(1))?;
    sh(
        &lab,
        &format!(
            "echo {seconds} > /proc/sys/net/netfilter/nf_conntrack_tcp_timeout_close_wait
             nft -f - <<END
             table inet mesh {{
                 chain out {{
                     type nat hook output priority -100
                     tcp dport 80 redirect to :15001
                 }}
             }}
END"
        ),
    )?;
    let proxy = lab.app_host().agent("proxy")?;
    let listener = proxy.listen("[::]:15001".parse()?, false, 16)?;
    let app = lab.app_host().agent("leaky-app")?;
    let mut server = bystander.conns()[0].peer;
    server.set_port(80);
    let ends = app.connect(server, 3, Dial::default(), PATIENCE)?;
    let accepted = proxy.accept(listener, 3, PATIENCE)?;
    let accepted: Vec<Fd> = accepted.iter().map(|end| end.fd).collect();
    let mesh = Mesh {
        lab,
        bystander,
        app,
        proxy,
        fds: ends.iter().map(|end| end.fd).collect(),
    };
    Ok((mesh, accepted))
}

fn every_method_reaches_a_proxy_behind_an_expired_entry(family: Family) -> Result<()> {
    for method in ["shutdown", "destroy", "rst"] {
        let Mesh { lab, app, .. } = &mesh(family)?;
        // The answer to the probe does not make the sockets too young.
        let line = format!(
            "--pid {} --method {method} --min-age 2s --min-idle 0s --json",
            app.pid()
        );
        let sockets = cwkill(lab, &line)?.exits(0).sockets();
        assert_eq!(sockets.len(), 3);
        all_have(&sockets, "closed", method);
        assert_eq!(in_state(lab, TcpState::CloseWait)?, 0);
        lab.wait_for(PATIENCE, || Ok(in_state(lab, TcpState::FinWait2)? == 0))?;
        assert!(app.is_alive());
    }
    Ok(())
}

fn without_a_descriptor_an_rst_does_not_reach_it(family: Family) -> Result<()> {
    let Mesh { lab, .. } = &mesh(family)?;
    let line = "--no-owners --method destroy --peer-port 80 --min-age 2s --min-idle 0s --json";
    let sockets = cwkill(lab, line)?.exits(0).sockets();
    assert_eq!(sockets.len(), 3);
    assert_eq!(in_state(lab, TcpState::CloseWait)?, 0);
    assert_eq!(in_state(lab, TcpState::FinWait2)?, 3);
    Ok(())
}

/// The fact that the probe before the FIN is for.
fn a_fin_alone_does_not_pass_an_expired_entry(family: Family) -> Result<()> {
    let Mesh { lab, app, fds, .. } = &mesh(family)?;
    app.shutdown(fds, How::Both)?;
    // The other host knows no such connection, and answers with RST.
    lab.wait_for(PATIENCE, || {
        let open = [TcpState::CloseWait, TcpState::LastAck];
        let open: Result<Vec<usize>> = open.into_iter().map(|state| in_state(lab, state)).collect();
        Ok(open?.iter().sum::<usize>() == 0)
    })?;
    assert_eq!(in_state(lab, TcpState::FinWait2)?, 3);
    Ok(())
}

/// The leaking host is the router between two peers, which have three connections through it.
struct Router {
    lab: Lab,
    /// The connection of the router itself with the peer that connects.
    first: Leak,
    /// That with the peer that accepts.
    _second: Leak,
    /// The descriptors of the peer that connects.
    opened: Vec<Fd>,
}

fn router(family: Family) -> Result<Router> {
    let lab = Lab::new()?;
    let [first, second] = [
        lab.start("established", family, alone(8080, 1))?,
        lab.start("established", family, alone(8081, 1))?,
    ];
    sh(
        &lab,
        "echo 1 > /proc/sys/net/ipv4/ip_forward
         echo 1 > /proc/sys/net/ipv6/conf/all/forwarding
         nft -f - <<END
         table inet router {
             chain forward {
                 type filter hook forward priority 0
                 ct state invalid drop
             }
         }
END",
    )?;
    let ends = [&first, &second].map(|leak| {
        let conn = leak.conns()[0];
        (
            conn.local.ip().to_canonical(),
            conn.peer.ip().to_canonical(),
        )
    });
    let [(_, from), (_, to)] = ends;
    for (leak, router, other) in [(&first, ends[0].0, to), (&second, ends[1].0, from)] {
        let route = format!("route add {other} via {router}");
        let ip = leak.pair().peer_host.command("ip");
        let version = if other.is_ipv4() { "-4" } else { "-6" };
        ran(ip.arg(version).args(route.split(' ')))?.exits(0);
    }
    let server = second.peer();
    let listener = server.listen((to, 9000).into(), false, 16)?;
    let opened = first
        .peer()
        .connect((to, 9000).into(), 3, Dial::default(), PATIENCE)?;
    let _accepted = server.accept(listener, 3, PATIENCE)?;
    Ok(Router {
        opened: opened.iter().map(|end| end.fd).collect(),
        lab,
        first,
        _second: second,
    })
}

impl Router {
    /// One side of the connections through the router has finished.
    fn half_close(&self) -> Result<()> {
        self.first.peer().shutdown(&self.opened, How::Write)?;
        self.lab.wait_for(PATIENCE, || {
            let ran = cwkill(&self.lab, "--json")?.exits(1);
            Ok(at(&ran.json(), "/conntrack_close_wait/entries") == "3")
        })
    }
}

fn connections_between_other_hosts_are_counted(family: Family) -> Result<()> {
    let router = router(family)?;
    let lab = &router.lab;
    // A connection of this host has an entry in CLOSE_WAIT as well, and is not counted.
    let own = &router.first;
    own.app().shutdown(&own.app_fds(), How::Write)?;
    lab.wait_for(PATIENCE, || Ok(in_state(lab, TcpState::FinWait2)? == 1))?;
    for line in ["--json", "-n --json"] {
        let ran = cwkill(lab, line)?;
        assert_eq!(at(&ran.json(), "/conntrack_close_wait"), "null", "{ran:?}");
        assert!(!ran.stderr.contains("conntrack"), "{ran:?}");
    }
    router.half_close()?;
    let listed = cwkill(lab, "")?.exits(1);
    let note = "has 3 entries in CLOSE_WAIT of connections between other hosts";
    let listed = listed.complains(note);
    assert!(listed.stdout.contains("0 sockets stuck"), "{listed:?}");
    cwkill(lab, "-n")?.exits(1).complains(note);
    cwkill(lab, "diagnose --sample 100ms")?
        .exits(1)
        .complains(note);
    let diagnosis = cwkill(lab, "diagnose --sample 100ms --json")?.exits(1);
    assert_eq!(
        diagnosis.json()["conntrack_close_wait"],
        json!({ "entries": 3, "complete": true })
    );
    Ok(())
}

/// A user who has no right to read the table. What it has is unknown, and nothing is said of it.
fn a_table_that_may_not_be_read_is_not_spoken_of() -> Result<()> {
    const NOBODY: u32 = 65534;
    let router = router(Family::V4)?;
    router.half_close()?;
    let as_nobody = |line: &str| -> Result<Ran> {
        let command = router.lab.app_host().command(CWKILL).uid(NOBODY);
        ran(command.args(line.split_whitespace()))
    };
    let table = router.lab.app_host().command("cat").uid(NOBODY);
    ran(table.arg("/proc/net/nf_conntrack"))?
        .exits(1)
        .complains("Permission denied");
    for line in ["--json", "-n --json", "diagnose --sample 1ms --json"] {
        let ran = as_nobody(line)?.exits(1);
        assert_eq!(at(&ran.json(), "/conntrack_close_wait"), "null", "{ran:?}");
        assert!(!ran.stderr.contains("conntrack"), "{ran:?}");
    }
    for line in ["", "-n", "diagnose --sample 1ms"] {
        let ran = as_nobody(line)?.exits(1);
        let all = format!("{}{}", ran.stdout, ran.stderr);
        assert!(!all.contains("conntrack"), "{ran:?}");
        assert!(!all.contains("CLOSE_WAIT"), "{ran:?}");
    }
    Ok(())
}

/// What `diagnose` says of the other ends of the sockets of the process with this pid.
fn other_ends(lab: &Lab, pid: u32) -> Result<Value> {
    let line = format!("diagnose --pid {pid} --sample 50ms --json");
    let document = cwkill(lab, &line)?.exits(0).json();
    Ok(document["total"]["other_end"].clone())
}

fn end(owner: &Agent, count: usize, known_by: &str) -> Value {
    json!([{ "pid": owner.pid(), "comm": owner.comm(), "fd": null, "orphan": false, "state": "fin-wait-2",
        "known_by": known_by, "count": count }])
}

/// The text of `diagnose` contains `wanted`.
#[track_caller]
fn says(lab: &Lab, pid: u32, wanted: &str) -> Result<()> {
    let line = format!("diagnose --pid {pid} --sample 50ms");
    let text = cwkill(lab, &line)?.exits(0).stdout;
    assert!(text.contains(wanted), "wanted {wanted:?} in\n{text}");
    Ok(())
}

/// The number of lines of the conntrack table with `word`.
fn tracked(lab: &Lab, word: &str) -> Result<usize> {
    let table = ran(lab.app_host().command("cat").arg("/proc/net/nf_conntrack"))?.exits(0);
    let lines = table.stdout.lines();
    Ok(lines.filter(|line| line.contains(word)).count())
}

fn conntrack_tells_the_other_end(family: Family) -> Result<()> {
    let mesh = mesh_that_forgets_after(family, 600)?;
    let (lab, pid) = (&mesh.lab, mesh.app.pid());
    assert_eq!(tracked(lab, "CLOSE_WAIT")?, 3);
    assert_eq!(other_ends(lab, pid)?, end(&mesh.proxy, 3, "conntrack"));
    let proxy = mesh.proxy.pid();
    let wanted =
        format!("\n  other end: proxy/{proxy} on this host behind NAT, FIN-WAIT-2 (3 of 3)\n");
    says(lab, pid, &wanted)
}

fn without_an_entry_the_last_segment_tells_the_other_end(family: Family) -> Result<()> {
    let mesh = mesh(family)?;
    let (lab, pid) = (&mesh.lab, mesh.app.pid());
    lab.wait_for(PATIENCE, || Ok(tracked(lab, "dport=80 ")? == 0))?;
    assert_eq!(other_ends(lab, pid)?, end(&mesh.proxy, 3, "last-segment"));
    let proxy = mesh.proxy.pid();
    let wanted = format!(
        "\n  other end: proxy/{proxy} on this host behind NAT (by the time of its last segment), FIN-WAIT-2 (3 of 3)\n"
    );
    says(lab, pid, &wanted)
}

/// The proxy still waits for the FIN of a connection that its client has aborted, and which NAT has lost. Then a new connection with the
/// port of that one goes to another host, and is stuck.
fn a_socket_of_an_earlier_connection_is_not_the_other_end(family: Family) -> Result<()> {
    let mesh = mesh(family)?;
    let (lab, app) = (&mesh.lab, &mesh.app);
    lab.wait_for(PATIENCE, || Ok(tracked(lab, "dport=80 ")? == 0))?;
    let to_server = || lab.app_host().ss(&["dport", "=", ":80"]);
    let from = to_server()?.first().context("no connection")?.local;
    let from = SocketAddr::new(from.ip().to_canonical(), from.port());
    app.close(&mesh.fds)?;
    lab.wait_for(PATIENCE, || Ok(to_server()?.is_empty()))?;
    assert_eq!(in_state(lab, TcpState::FinWait2)?, 3);

    let server = mesh.bystander.peer();
    let address = mesh.bystander.conns()[0].peer.ip().to_canonical();
    let address = SocketAddr::new(address, 7070);
    let listener = server.listen(address, false, 16)?;
    let dial = Dial {
        from: Some(from),
        ..Dial::default()
    };
    app.connect(address, 1, dial, PATIENCE)?;
    let accepted = server.accept(listener, 1, PATIENCE)?;
    server.shutdown(&[accepted[0].fd], How::Write)?;
    lab.wait_for(PATIENCE, || Ok(in_state(lab, TcpState::CloseWait)? == 1))?;
    assert_eq!(other_ends(lab, app.pid())?, json!(null));
    Ok(())
}

/// The other direction: the application has finished, and the proxy leaks.
fn the_application_is_the_other_end_of_its_proxy(family: Family) -> Result<()> {
    for (seconds, known_by) in [(600, "conntrack"), (1, "last-segment")] {
        let (mesh, _) = connected_mesh(family, seconds)?;
        let (lab, app) = (&mesh.lab, &mesh.app);
        app.shutdown(&mesh.fds, How::Write)?;
        lab.wait_for(PATIENCE, || Ok(in_state(lab, TcpState::FinWait2)? == 3))?;
        let is_known = known_by == "conntrack";
        lab.wait_for(
            PATIENCE,
            || Ok((tracked(lab, "dport=80 ")? > 0) == is_known),
        )?;
        let ends = other_ends(lab, mesh.proxy.pid())?;
        assert_eq!(ends, end(app, 3, known_by), "{known_by}");
    }
    Ok(())
}
