//! Sockets whose local address has left the host: what cwkill says, and which method it uses.

use std::net::IpAddr;

use anyhow::{Context, Result};
use cwkill::sock_diag::{DumpRequest, Family as DiagFamily, Protocol, SockDiag};
use cwkill::tcp::StateSet;
use netns_harness::{Family, Lab, Leak, TcpState};
use socket2::{Domain, Socket, Type};

use crate::support::{PATIENCE, all_have, at, connections, cwkill, in_state, lab, ran, settled};
use crate::trial::{Test, each_family, once};

pub const TESTS: &[Test] = &[
    each_family!(a_gone_address_is_reported_and_the_socket_destroyed),
    each_family!(segments_are_not_sent_for_a_gone_address),
    each_family!(without_destroy_shutdown_is_tried),
    each_family!(a_local_route_is_an_address_of_this_host),
    each_family!(the_kernel_cannot_finish_a_shutdown_without_the_address),
    once!(the_kernel_reports_transparent_sockets),
];

/// Runs `ip` on the leaking host.
fn ip(lab: &Lab, arguments: &str) -> Result<()> {
    let command = lab.app_host().command("ip");
    ran(command.args(arguments.split_whitespace()))?.exits(0);
    Ok(())
}

/// Sockets in CLOSE-WAIT, and then their address is removed.
fn moved(kind: &str, family: Family) -> Result<(Lab, Leak)> {
    let (lab, leak) = lab(kind, family, 3)?;
    settled(&lab, &leak)?;
    remove(&lab, &leak)?;
    Ok((lab, leak))
}

fn local(leak: &Leak) -> IpAddr {
    leak.conns()[0].local.ip().to_canonical()
}

fn remove(lab: &Lab, leak: &Leak) -> Result<()> {
    let address = local(leak);
    let length = if address.is_ipv4() { 24 } else { 64 };
    ip(lab, &format!("address del {address}/{length} dev veth1"))
}

fn a_gone_address_is_reported_and_the_socket_destroyed(family: Family) -> Result<()> {
    let (lab, leak) = lab("drained", family, 3)?;
    let found = cwkill(&lab, "--json")?.exits(0).sockets();
    assert_eq!(at(&found[0], "/address_gone"), "false");
    cwkill(&lab, "--all --address-gone --json")?.exits(1);
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 3);
    remove(&lab, &leak)?;
    let note = "is no longer on this host";
    let listed = cwkill(&lab, "")?.exits(0).complains(note);
    assert!(
        listed.stdout.contains("drained, address gone"),
        "{listed:?}"
    );
    for planned in cwkill(&lab, "-n --json --all")?.exits(0).sockets() {
        assert_eq!(at(&planned, "/address_gone"), "true");
        assert_eq!(planned["plan"], serde_json::json!(["destroy"]));
        for excluded in ["/excluded/0", "/excluded/1"] {
            let code = at(&planned, &format!("{excluded}/reason_code"));
            assert_eq!(code, "address-gone", "{planned:#}");
        }
    }
    let closed = cwkill(&lab, "--all --address-gone --json")?.exits(0);
    assert!(!closed.stderr.contains(note), "{closed:?}");
    all_have(&closed.sockets(), "closed", "destroy");
    assert_eq!(connections(&lab)?.len(), 0);
    Ok(())
}

fn segments_are_not_sent_for_a_gone_address(family: Family) -> Result<()> {
    for kind in ["drained", "not-accepted"] {
        let (lab, _leak) = moved(kind, family)?;
        // All IPv4 packets that the host has sent. IPv6 neighbours exchange messages of their own.
        let sent = || -> Result<Option<String>> {
            let counters = ran(lab.app_host().command("cat").arg("/proc/net/snmp"))?.exits(0);
            let mut lines = counters
                .stdout
                .lines()
                .filter(|line| line.starts_with("Ip:"));
            let names = lines.next().context("no counters")?.split(' ');
            let mut values = lines.next().context("no values")?.split(' ');
            let index = names.into_iter().position(|name| name == "OutRequests");
            Ok(index.and_then(|index| values.nth(index)).map(str::to_owned))
        };
        assert!(sent()?.is_some());
        for method in ["rst", "probe", "probe,rst"] {
            let before = sent()?;
            let line = format!("--all --grace 200ms --method {method} --json");
            let sockets = cwkill(&lab, &line)?.exits(4).sockets();
            assert_eq!(sockets.len(), 3);
            all_have(&sockets, "skipped", "null");
            for socket in &sockets {
                assert_eq!(at(socket, "/excluded/0/reason_code"), "address-gone");
            }
            if family != Family::V6 {
                assert_eq!(sent()?, before, "{kind} {method}");
            }
        }
        assert_eq!(in_state(&lab, TcpState::CloseWait)?, 3);
    }
    Ok(())
}

fn without_destroy_shutdown_is_tried(family: Family) -> Result<()> {
    let (lab, _leak) = moved("drained", family)?;
    let line = "--all --method shutdown --grace 100ms --json";
    let ran = cwkill(&lab, line)?.exits(4);
    all_have(&ran.sockets(), "closing", "shutdown");
    ran.complains("is no longer on this host");
    assert_eq!(in_state(&lab, TcpState::LastAck)?, 3);
    let sockets = cwkill(&lab, "--all --state last-ack --json")?
        .exits(0)
        .sockets();
    all_have(&sockets, "closed", "destroy");
    Ok(())
}

fn a_local_route_is_an_address_of_this_host(family: Family) -> Result<()> {
    let (lab, leak) = moved("drained", family)?;
    let (network, version) = match local(&leak) {
        IpAddr::V4(_) => ("10.78.0.0/16", "-4"),
        IpAddr::V6(_) => ("fd78::/32", "-6"),
    };
    ip(&lab, &format!("{version} route add local {network} dev lo"))?;
    let found = cwkill(&lab, "--json")?.exits(0).sockets();
    assert_eq!(at(&found[0], "/address_gone"), "false");
    ip(&lab, &format!("{version} route del local {network} dev lo"))?;
    let found = cwkill(&lab, "--json")?.exits(0).sockets();
    assert_eq!(at(&found[0], "/address_gone"), "true");
    Ok(())
}

/// Why `shutdown` is not used where `destroy` can be.
fn the_kernel_cannot_finish_a_shutdown_without_the_address(family: Family) -> Result<()> {
    let (lab, leak) = moved("drained", family)?;
    leak.app()
        .shutdown(&leak.app_fds(), netns_harness::How::Both)?;
    // It retransmits the FIN, or waits to send it at all, in vain: both show a timer.
    lab.wait_for(PATIENCE, || {
        let shown = ran(lab.app_host().command("ss").args(["-Htno"]))?.exits(0);
        let waits = |line: &&str| line.starts_with("LAST-ACK") && line.contains("timer:(");
        Ok(shown.stdout.lines().filter(waits).count() == 3)
    })
}

fn the_kernel_reports_transparent_sockets() -> Result<()> {
    let lab = Lab::new()?;
    lab.app_host().within(|| {
        let mut inodes = Vec::new();
        let mut kept = Vec::new();
        for (domain, family) in [
            (Domain::IPV4, DiagFamily::V4),
            (Domain::IPV6, DiagFamily::V6),
        ] {
            for transparent in [false, true] {
                let socket = Socket::new(domain, Type::STREAM, None)?;
                match family {
                    DiagFamily::V4 => socket.set_ip_transparent_v4(transparent)?,
                    DiagFamily::V6 => socket.set_ip_transparent_v6(transparent)?,
                }
                socket.listen(1)?;
                let cookie = socket.cookie()?;
                inodes.push((family, cookie, transparent));
                kept.push(socket);
            }
        }
        let mut diag = SockDiag::open()?;
        for (family, cookie, transparent) in inodes {
            let request = DumpRequest {
                protocol: Protocol::Tcp,
                family,
                states: StateSet::from(cwkill::tcp::TcpState::Listen),
                info: false,
                bytecode: &[],
            };
            let found = diag.dump(&request, |message| {
                (message.id.cookie().0 == cookie).then_some(message.transparent)
            })?;
            assert_eq!(found, [Some(transparent)], "{family:?}");
        }
        Ok(())
    })
}
