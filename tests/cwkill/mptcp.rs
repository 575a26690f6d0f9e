//! MPTCP: the socket of IPPROTO_MPTCP is found and closed, and not its subflows.

use anyhow::{Context, Result};
use netns_harness::{Conn, Dial, End, Family, Fd, How, Lab, Leak, Recv, SsRow, TcpState};
use serde_json::Value;

use crate::support::{PATIENCE, all_have, at, connections, cwkill, lab, ran};
use crate::trial::{Test, each_family, once};

pub const TESTS: &[Test] = &[
    each_family!(an_mptcp_leak_is_closed_through_its_descriptor),
    each_family!(a_fallback_is_one_target),
    each_family!(dead_mptcp_descriptors_are_reclaimed),
    each_family!(tcp_at_an_mptcp_listener_is_tcp),
    each_family!(other_methods_leave_mptcp_alone),
    each_family!(shutdown_loses_no_data_of_mptcp),
    each_family!(mptcp_in_a_backlog_has_its_listener),
    once!(a_silent_mptcp_peer_leaves_it_closing),
    once!(check_and_diagnose_count_mptcp),
];

/// A connection of MPTCP to the application of `leak`.
fn connect(leak: &Leak, mptcp: bool) -> Result<Conn> {
    let dial = Dial {
        mptcp,
        ..Dial::default()
    };
    let pair = leak.pair();
    let peer = pair.peer.connect(pair.app_address, 1, dial, PATIENCE)?[0];
    let app = pair.app.accept(pair.listener, 1, PATIENCE)?[0];
    Ok(Conn {
        local: app.local,
        peer: app.peer,
        app_fd: Some(app.fd),
        peer_fd: Some(peer.fd),
        sent: 0,
    })
}

fn fds(conn: &Conn) -> Result<(Fd, Fd)> {
    Ok((
        conn.app_fd.context("no descriptor in the application")?,
        conn.peer_fd.context("no descriptor in the peer")?,
    ))
}

#[track_caller]
fn still_carries_data(leak: &Leak, conn: &Conn) -> Result<()> {
    let (app, peer) = fds(conn)?;
    leak.peer().send(&[peer], b"ping")?;
    let got = leak.app().recv(app, 100, PATIENCE)?;
    assert_eq!(got, Recv::Data(b"ping".to_vec()));
    leak.app().send(&[app], b"pong")?;
    let got = leak.peer().recv(peer, 100, PATIENCE)?;
    assert_eq!(got, Recv::Data(b"pong".to_vec()));
    Ok(())
}

/// The MPTCP sockets that `ss` shows in `state`.
fn mptcp_in(lab: &Lab, state: TcpState) -> Result<Vec<SsRow>> {
    let mut rows = lab.app_host().ss_mptcp(&[])?;
    rows.retain(|row| row.state == state);
    Ok(rows)
}

/// Asserts that the kernel shows each of `sockets` as an MPTCP socket in CLOSE-WAIT.
#[track_caller]
fn agree_with_ss(lab: &Lab, sockets: &[Value]) -> Result<()> {
    let rows = mptcp_in(lab, TcpState::CloseWait)?;
    assert_eq!(rows.len(), sockets.len(), "{rows:#?}");
    for socket in sockets {
        let cookie = u64::from_str_radix(&at(socket, "/cookie"), 16)?;
        let row = rows.iter().find(|row| row.cookie == cookie);
        let row = row.with_context(|| format!("ss -M does not show {socket:#}"))?;
        assert_eq!(at(socket, "/inode"), row.inode.to_string());
        assert_eq!(at(socket, "/peer/port"), row.peer.port().to_string());
        assert_eq!(at(socket, "/protocol"), "mptcp");
        assert_eq!(at(socket, "/state"), "close-wait");
        assert!(at(socket, "/age_ms").parse::<u64>()? < 60_000, "{socket:#}");
    }
    Ok(())
}

fn an_mptcp_leak_is_closed_through_its_descriptor(family: Family) -> Result<()> {
    let (lab, leak) = lab("mptcp", family, 3)?;
    let live = connect(&leak, true)?;
    // The table of TCP shows four subflows in ESTABLISHED.
    let subflows = connections(&lab)?;
    assert_eq!(subflows.len(), 4);
    assert!(
        subflows
            .iter()
            .all(|row| row.state == TcpState::Established)
    );

    let listed = cwkill(&lab, "--json")?.exits(0).sockets();
    agree_with_ss(&lab, &listed)?;
    let pid = leak.app().pid().to_string();
    for socket in &listed {
        assert_eq!(at(socket, "/cause"), "drained");
        assert_eq!(at(socket, "/owners/0/pid"), pid);
    }
    let table = cwkill(&lab, "")?.exits(0).stdout;
    assert!(table.contains("PROTO"), "{table}");
    assert_eq!(table.matches(" mptcp ").count(), 3, "{table}");
    let planned = cwkill(&lab, "--all -n --json")?.exits(0).sockets();
    for socket in &planned {
        assert_eq!(socket["plan"], serde_json::json!(["shutdown"]));
        let code = |index| at(socket, &format!("/excluded/{index}/reason_code"));
        assert_eq!([code(0), code(1)], ["mptcp", "mptcp"]);
    }
    assert_eq!(
        mptcp_in(&lab, TcpState::CloseWait)?.len(),
        3,
        "only looked at"
    );

    let sockets = cwkill(&lab, "--port 8080 --json")?.exits(0).sockets();
    assert_eq!(sockets.len(), 3);
    all_have(&sockets, "closed", "shutdown");
    for socket in &sockets {
        assert_eq!(at(socket, "/result/descriptor_open"), "true");
    }
    assert!(mptcp_in(&lab, TcpState::CloseWait)?.is_empty());
    for fd in leak.peer_fds() {
        assert_eq!(leak.peer().recv(fd, 10, PATIENCE)?, Recv::Eof);
    }
    still_carries_data(&leak, &live)?;
    cwkill(&lab, "--port 8080")?.exits(1);
    Ok(())
}

fn a_fallback_is_one_target(family: Family) -> Result<()> {
    let (lab, leak) = lab("mptcp-fallback", family, 2)?;
    // The kernel has moved the bytes from the subflow to the MPTCP socket, and both have the same inode.
    for subflow in connections(&lab)? {
        assert_eq!((subflow.state, subflow.recv_q), (TcpState::CloseWait, 0));
        let rows = mptcp_in(&lab, TcpState::CloseWait)?;
        let row = rows.iter().find(|row| row.inode == subflow.inode);
        let row = row.context("no MPTCP socket with the inode of the subflow")?;
        assert_ne!(row.cookie, subflow.cookie);
        assert!(row.recv_q > 0, "{row:?}");
    }
    let listed = cwkill(&lab, "--json")?.exits(0).sockets();
    agree_with_ss(&lab, &listed)?;
    for socket in &listed {
        // "goodbye" and the FIN.
        assert_eq!(at(socket, "/recv_q"), "8", "{socket:#}");
        assert_eq!(at(socket, "/cause"), "unread");
    }
    assert_eq!(
        cwkill(&lab, "--cause drained -n --json")?
            .exits(1)
            .sockets()
            .len(),
        0
    );

    let sockets = cwkill(&lab, "--peer-port 9090 --json")?.exits(0).sockets();
    assert_eq!(sockets.len(), 2);
    all_have(&sockets, "closed", "shutdown");
    for socket in &sockets {
        assert_eq!(at(socket, "/result/descriptor_open"), "true");
    }
    assert!(mptcp_in(&lab, TcpState::CloseWait)?.is_empty());
    for drained in leak.app().drain(&leak.app_fds(), PATIENCE)? {
        assert_eq!((drained.bytes, drained.end), (7, End::Eof));
    }
    Ok(())
}

fn dead_mptcp_descriptors_are_reclaimed(family: Family) -> Result<()> {
    let (lab, leak) = lab("mptcp", family, 2)?;
    let pid = leak.app().pid();
    cwkill(&lab, "--port 8080")?.exits(0);
    let dead = |line: &str| -> Result<Vec<Value>> {
        let ran = cwkill(
            &lab,
            &format!("reclaim --pid {pid} --reclaim-age 0s --json {line}"),
        )?
        .exits(0);
        Ok(ran.json()["descriptors"]
            .as_array()
            .context("no descriptors")?
            .clone())
    };
    let found = dead("-n")?;
    assert_eq!(found.len(), 2);
    for descriptor in &found {
        assert_eq!(at(descriptor, "/protocol"), "mptcp");
        assert_eq!(at(descriptor, "/closable"), "true", "{descriptor:#}");
        assert_eq!(at(descriptor, "/unread"), "0");
        assert_eq!(at(descriptor, "/local/port"), "8080");
    }
    let live = connect(&leak, true)?;
    for descriptor in dead("")? {
        assert_eq!(at(&descriptor, "/outcome"), "freed", "{descriptor:#}");
    }
    still_carries_data(&leak, &live)?;
    for fd in leak.app_fds() {
        let link = std::fs::read_link(format!("/proc/{pid}/fd/{fd}"));
        assert!(link.is_err(), "{fd}: {link:?}");
    }
    // In one run.
    let (app, peer) = fds(&live)?;
    leak.peer().shutdown(&[peer], How::Write)?;
    assert_eq!(leak.app().recv(app, 10, PATIENCE)?, Recv::Eof);
    let sockets = cwkill(&lab, "--port 8080 --reclaim --reclaim-age 0s --json")?
        .exits(0)
        .sockets();
    assert_eq!(at(&sockets[0], "/result/descriptors/0/outcome"), "freed");
    assert_eq!(at(&sockets[0], "/result/descriptor_open"), "false");
    Ok(())
}

/// Every listener of a Go program is of MPTCP, and most of its clients only know TCP.
fn tcp_at_an_mptcp_listener_is_tcp(family: Family) -> Result<()> {
    let (lab, leak) = lab("mptcp", family, 1)?;
    cwkill(&lab, "--port 8080")?.exits(0);
    let conn = connect(&leak, false)?;
    let (app, peer) = fds(&conn)?;
    leak.peer().shutdown(&[peer], How::Write)?;
    assert_eq!(leak.app().recv(app, 10, PATIENCE)?, Recv::Eof);
    let sockets = cwkill(&lab, "--port 8080 --method destroy --json")?
        .exits(0)
        .sockets();
    assert_eq!(sockets.len(), 1);
    assert_eq!(at(&sockets[0], "/protocol"), "tcp");
    all_have(&sockets, "closed", "destroy");
    let pid = leak.app().pid();
    let dead = cwkill(&lab, &format!("reclaim --pid {pid} -n --json"))?
        .exits(0)
        .json();
    let mut protocols: Vec<String> = ["/descriptors/0", "/descriptors/1"]
        .map(|descriptor| at(&dead, &format!("{descriptor}/protocol")))
        .into();
    protocols.sort_unstable();
    assert_eq!(protocols, ["mptcp", "tcp"]);
    Ok(())
}

fn other_methods_leave_mptcp_alone(family: Family) -> Result<()> {
    let (lab, leak) = lab("mptcp", family, 2)?;
    let live = connect(&leak, true)?;
    let (subflows, before) = (connections(&lab)?, mptcp_in(&lab, TcpState::CloseWait)?);
    for line in ["--method probe,destroy,rst", "--no-owners --method destroy"] {
        let sockets = cwkill(&lab, &format!("--all --json {line}"))?
            .exits(4)
            .sockets();
        assert_eq!(sockets.len(), 2);
        for socket in &sockets {
            assert_eq!(at(socket, "/result/reason_code"), "no-method");
            assert_eq!(at(socket, "/excluded/0/reason_code"), "mptcp");
        }
    }
    // The subflows are not sockets of their own.
    for states in ["established", "established,close-wait,last-ack"] {
        let line = format!("--state {states} --min-age 0.001s --method destroy,rst -n --json");
        let sockets = cwkill(&lab, &line)?.sockets();
        assert!(!sockets.is_empty());
        let of_mptcp = |socket: &Value| at(socket, "/protocol") == "mptcp";
        assert!(sockets.iter().all(of_mptcp), "{sockets:#?}");
    }
    assert_eq!(connections(&lab)?, subflows);
    assert_eq!(mptcp_in(&lab, TcpState::CloseWait)?.len(), before.len());
    still_carries_data(&leak, &live)
}

fn shutdown_loses_no_data_of_mptcp(family: Family) -> Result<()> {
    let (lab, leak) = lab("mptcp", family, 1)?;
    let (fd, peer) = (leak.app_fds()[0], leak.peer_fds()[0]);
    let sent = leak.app().fill(&[fd], 0, 8 << 20)?[0];
    assert!(sent > 0);
    let listed = cwkill(&lab, "--json")?.exits(0).sockets();
    assert_eq!(at(&listed[0], "/cause"), "sending", "{listed:#?}");
    assert!(at(&listed[0], "/send_q").parse::<u64>()? > 0);
    // Its peer reads only later.
    cwkill(&lab, "--port 8080 --grace 0s")?.exits(4);
    let drained = leak.peer().drain(&[peer], PATIENCE)?[0];
    assert_eq!(
        (drained.bytes, drained.intact, drained.end),
        (sent, true, End::Eof)
    );
    lab.wait_for(PATIENCE, || {
        Ok(mptcp_in(&lab, TcpState::LastAck)?.is_empty())
    })
}

fn mptcp_in_a_backlog_has_its_listener(family: Family) -> Result<()> {
    let (lab, leak) = lab("mptcp", family, 1)?;
    cwkill(&lab, "--port 8080")?.exits(0);
    let dial = Dial {
        mptcp: true,
        ..Dial::default()
    };
    let pair = leak.pair();
    let peer = pair.peer.connect(pair.app_address, 1, dial, PATIENCE)?[0];
    pair.peer.shutdown(&[peer.fd], How::Write)?;
    lab.wait_for(PATIENCE, || {
        Ok(mptcp_in(&lab, TcpState::CloseWait)?.len() == 1)
    })?;
    let sockets = cwkill(&lab, "--all --json")?.exits(4).sockets();
    assert_eq!(sockets.len(), 1);
    assert_eq!(at(&sockets[0], "/protocol"), "mptcp");
    assert_eq!(at(&sockets[0], "/cause"), "not-accepted");
    let pid = leak.app().pid().to_string();
    assert_eq!(at(&sockets[0], "/listener/owners/0/pid"), pid);
    assert_eq!(at(&sockets[0], "/result/reason_code"), "no-method");
    let excluded = sockets[0]["excluded"].as_array().context("a list")?;
    let codes: Vec<String> = excluded.iter().map(|one| at(one, "/reason_code")).collect();
    let never = "mptcp-not-accepted";
    assert_eq!(codes, ["not-accepted", never, never]);
    // The text says what to do.
    let destroy = at(&excluded[1], "/reason");
    assert!(destroy.contains("let its process accept it"), "{destroy}");
    // The kernel destroys its subflow, which cwkill does not do.
    let kill = ["-K", "-tna", "state", "established", "sport", "=", ":8080"];
    ran(lab.app_host().command("ss").args(kill))?.exits(0);
    lab.wait_for(PATIENCE, || {
        Ok(mptcp_in(&lab, TcpState::CloseWait)?.is_empty())
    })
}

fn a_silent_mptcp_peer_leaves_it_closing() -> Result<()> {
    for scenario in ["mptcp", "mptcp-fallback"] {
        let (lab, leak) = lab(scenario, Family::V4, 1)?;
        leak.pair().set_link(false)?;
        let sockets = cwkill(&lab, "--all --grace 0s --json")?.exits(4).sockets();
        all_have(&sockets, "closing", "shutdown");
        assert_eq!(
            at(&sockets[0], "/result/reason"),
            "now in LAST-ACK",
            "{scenario}"
        );
        assert_eq!(at(&sockets[0], "/result/descriptor_open"), "true");
    }
    Ok(())
}

fn check_and_diagnose_count_mptcp() -> Result<()> {
    let (lab, leak) = lab("mptcp", Family::V4, 3)?;
    let line = cwkill(&lab, "check -w 2 -c 10")?.exits(1).stdout;
    assert!(line.contains("3 sockets stuck, 3 in leaky-app"), "{line}");
    let diagnosis = cwkill(&lab, "diagnose --sample 10ms --json")?
        .exits(0)
        .json();
    assert_eq!(
        at(&diagnosis, "/processes/0/pid"),
        leak.app().pid().to_string()
    );
    assert_eq!(at(&diagnosis, "/processes/0/stuck"), "3", "{diagnosis:#}");
    cwkill(&lab, "--port 8080")?.exits(0);
    let diagnosis = cwkill(&lab, "diagnose --sample 10ms --json")?.json();
    assert_eq!(
        at(&diagnosis, "/processes/0/descriptors/dead"),
        "3",
        "{diagnosis:#}"
    );
    Ok(())
}
