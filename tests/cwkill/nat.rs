//! Connections in the conntrack table: NAT whose entry has expired, and connections of others. The tests need nft(8).

use anyhow::Result;
use netns_harness::{Agent, Dial, Family, Fd, How, Lab, Leak, TcpState};

use crate::support::{PATIENCE, all_have, alone, at, count, cwkill, in_state, ran};
use crate::trial::{Test, each_family};

pub const TESTS: &[Test] = &[
    each_family!(every_method_reaches_a_proxy_behind_an_expired_entry),
    each_family!(without_a_descriptor_an_rst_does_not_reach_it),
    each_family!(a_fin_alone_does_not_pass_an_expired_entry),
    each_family!(connections_between_other_hosts_are_counted),
];

/// An application whose connections to port 80 of another host are redirected to a proxy on its own host, as a service mesh does.
/// The proxy has finished, and the conntrack entries have expired.
struct Mesh {
    lab: Lab,
    /// The other host, with a connection that is in use.
    _bystander: Leak,
    app: Agent,
    _proxy: Agent,
    fds: Vec<Fd>,
}

/// Runs `script` on the leaking host.
fn sh(lab: &Lab, script: &str) -> Result<()> {
    ran(lab.app_host().command("sh").args(["-ec", script]))?.exits(0);
    Ok(())
}

fn mesh(family: Family) -> Result<Mesh> {
    let lab = Lab::new()?;
    let bystander = lab.start("established", family, count(1))?;
    // The default is a minute.
    sh(
        &lab,
        "echo 1 > /proc/sys/net/netfilter/nf_conntrack_tcp_timeout_close_wait
         nft -f - <<END
         table inet mesh {
             chain out {
                 type nat hook output priority -100
                 tcp dport 80 redirect to :15001
             }
         }
END",
    )?;
    let proxy = lab.app_host().agent("proxy")?;
    let listener = proxy.listen("[::]:15001".parse()?, false, 16)?;
    let app = lab.app_host().agent("leaky-app")?;
    let mut server = bystander.conns()[0].peer;
    server.set_port(80);
    let ends = app.connect(server, 3, Dial::default(), PATIENCE)?;
    let accepted = proxy.accept(listener, 3, PATIENCE)?;
    let accepted: Vec<Fd> = accepted.iter().map(|end| end.fd).collect();
    proxy.shutdown(&accepted, How::Write)?;
    lab.wait_for(PATIENCE, || Ok(in_state(&lab, TcpState::FinWait2)? == 3))?;
    let old = format!("-n --pid {} --min-age 3s --min-idle 0s", app.pid());
    lab.wait_for(PATIENCE, || {
        let found = cwkill(&lab, &format!("{old} --json"))?;
        Ok(found.code == Some(0) && found.sockets().len() == 3)
    })?;
    Ok(Mesh {
        lab,
        _bystander: bystander,
        app,
        _proxy: proxy,
        fds: ends.iter().map(|end| end.fd).collect(),
    })
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

/// The leaking host is the router between two peers.
fn connections_between_other_hosts_are_counted(family: Family) -> Result<()> {
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
    // A connection of this host has an entry in CLOSE_WAIT as well, and is not counted.
    first.app().shutdown(&first.app_fds(), How::Write)?;
    lab.wait_for(PATIENCE, || Ok(in_state(&lab, TcpState::FinWait2)? == 1))?;
    for line in ["--json", "-n --json"] {
        let ran = cwkill(&lab, line)?;
        assert_eq!(at(&ran.json(), "/conntrack_close_wait"), "null", "{ran:?}");
        assert!(!ran.stderr.contains("conntrack"), "{ran:?}");
    }
    let fds: Vec<Fd> = opened.iter().map(|end| end.fd).collect();
    first.peer().shutdown(&fds, How::Write)?;
    lab.wait_for(PATIENCE, || {
        let ran = cwkill(&lab, "--json")?.exits(1);
        Ok(at(&ran.json(), "/conntrack_close_wait/entries") == "3")
    })?;
    let listed = cwkill(&lab, "")?.exits(1);
    let note = "has 3 entries in CLOSE_WAIT of connections between other hosts";
    let listed = listed.complains(note);
    assert!(listed.stdout.contains("0 sockets stuck"), "{listed:?}");
    cwkill(&lab, "-n")?.exits(1).complains(note);
    cwkill(&lab, "diagnose --sample 100ms")?
        .exits(1)
        .complains(note);
    Ok(())
}
