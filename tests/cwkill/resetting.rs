//! `rst`: exact RSTs, with and without an owner, and sockets that they must not touch.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

use anyhow::{Context, Result, anyhow};
use netns_harness::{Capability, Family, Lab, Recv, TcpState};

use nix::errno::Errno;
use nix::sys::socket::sockopt::{ReuseAddr, TcpRepair};
use nix::sys::socket::{getsockopt, setsockopt};

use cwkill::injector::rst::repair::{self, RepairMode};
use cwkill::packet::raw::{Outgoing, RawSockets};
use cwkill::tcp::{Segment, Seq, TcpFlags};

use crate::support::{
    CWKILL, PATIENCE, all_have, carries_data, connections, count, cwkill, first_error, in_state,
    lab, ran, settled, skip_reason,
};
use crate::trial::{Test, each_family};

pub const TESTS: &[Test] = &[
    each_family!(every_kind_is_closed_and_its_peer_released),
    each_family!(sockets_of_more_than_one_batch_are_closed),
    each_family!(cap_net_raw_is_enough),
    each_family!(the_missing_capability_is_named),
    each_family!(a_socket_is_asked_again_after_the_rate_limit),
    each_family!(the_step_that_failed_is_named),
    each_family!(unsent_bytes_are_protected),
    each_family!(fact_a_listener_keeps_nothing_of_a_bare_ack),
    each_family!(fact_an_rst_beside_rcv_nxt_closes_nothing),
    each_family!(repair_mode_is_left_on_every_path),
    each_family!(an_owner_that_exits_in_repair_mode_still_sends_its_fin),
];

const RST: &str = "--port 8080 --method rst --json";

fn every_kind_is_closed_and_its_peer_released(family: Family) -> Result<()> {
    for kind in ["unread", "drained", "forked", "not-accepted"] {
        let (lab, bystanders) = lab("established", family, 3)?;
        let leak = lab.start(kind, family, count(5))?;
        let sockets = cwkill(&lab, &format!("{RST} --grace 20s"))?
            .exits(0)
            .sockets();
        assert_eq!(sockets.len(), 5);
        all_have(&sockets, "closed", "rst");
        let rows = connections(&lab)?;
        assert_eq!(rows.len(), 3);
        assert!(rows.iter().all(|row| row.state == TcpState::Established));
        assert!(leak.app().is_alive());
        carries_data(&bystanders).context(kind)?;
        // The peer, half-closed until now, has received the RST.
        for fd in leak.peer_fds() {
            let got = leak.peer().recv(fd, 1, PATIENCE)?;
            assert_eq!(got, Recv::Failed(libc::ECONNRESET), "{kind}");
        }
    }
    Ok(())
}

fn sockets_of_more_than_one_batch_are_closed(family: Family) -> Result<()> {
    for kind in ["drained", "not-accepted"] {
        let (lab, leak) = lab(kind, family, 1100)?;
        let sockets = cwkill(&lab, &format!("{RST} --grace 20s"))?
            .exits(0)
            .sockets();
        assert_eq!(sockets.len(), 1100);
        all_have(&sockets, "closed", "rst");
        assert_eq!(connections(&lab)?.len(), 0);
        assert!(leak.app().is_alive());
    }
    Ok(())
}

fn cap_net_raw_is_enough(family: Family) -> Result<()> {
    let (lab, _leak) = lab("drained", family, 3)?;
    let command = lab.app_host().command(CWKILL);
    let command = command.capabilities(&[Capability::CAP_NET_RAW]);
    let sockets = ran(command.args(RST.split(' ')))?.exits(0).sockets();
    all_have(&sockets, "closed", "rst");
    Ok(())
}

fn the_missing_capability_is_named(family: Family) -> Result<()> {
    let (lab, _leak) = lab("drained", family, 2)?;
    let before = lab.app_host().ss(&[])?;
    let command = lab.app_host().command(CWKILL).capabilities(&[]);
    let ran = ran(command.args(RST.split(' ')))?
        .exits(4)
        .complains("CAP_NET_RAW")
        .complains("cwkill doctor");
    let sockets = ran.sockets();
    all_have(&sockets, "skipped", "null");
    assert_eq!(skip_reason(&sockets[0]), "rst: needs CAP_NET_RAW");
    assert_eq!(lab.app_host().ss(&[])?, before);
    Ok(())
}

fn a_socket_is_asked_again_after_the_rate_limit(family: Family) -> Result<()> {
    let (lab, _leak) = lab("not-accepted", family, 3)?;
    // Long enough for a busy machine to run cwkill twice.
    lab.app_host().within(|| {
        std::fs::write("/proc/sys/net/ipv4/tcp_invalid_ratelimit", "4000")?;
        Ok(())
    })?;
    // Elicits an ACK from each, after which each is silent for the rate limit.
    cwkill(&lab, "--all --method probe --grace 20s")?.exits(4);
    let impatient = cwkill(&lab, &format!("{RST} --grace 100ms"))?.exits(4);
    all_have(&impatient.sockets(), "failed", "null");
    let patient = cwkill(&lab, &format!("{RST} --grace 20s"))?;
    let sockets = patient.exits(0).sockets();
    all_have(&sockets, "closed", "rst");
    Ok(())
}

fn the_step_that_failed_is_named(family: Family) -> Result<()> {
    for (kind, step) in [
        ("drained", "RST sent, but the socket is still there"),
        ("not-accepted", "the socket sent no ACK"),
    ] {
        let (lab, leak) = lab(kind, family, 2)?;
        settled(&lab, &leak)?;
        lab.app_host().set_link("lo", false)?;
        let sockets = cwkill(&lab, &format!("{RST} --grace 200ms"))?
            .exits(4)
            .sockets();
        all_have(&sockets, "failed", "null");
        let error = first_error(&sockets[0]);
        assert!(error.contains(step), "{error}");
        assert_eq!(in_state(&lab, TcpState::CloseWait)?, 2);
    }
    Ok(())
}

fn unsent_bytes_are_protected(family: Family) -> Result<()> {
    let (lab, leak) = lab("drained", family, 1)?;
    leak.pair().set_link(false)?;
    leak.app().send(&leak.app_fds(), b"not yet arrived")?;
    cwkill(&lab, "--all --method destroy,rst")?.exits(4);
    assert_eq!(connections(&lab)?[0].send_q, 15);
    let sockets = cwkill(&lab, "--all --method rst --discard-unsent --json")?.sockets();
    all_have(&sockets, "closed", "rst");
    Ok(())
}

/// Sends one segment to the application's listener as a peer that is not connected.
fn to_listener(lab: &Lab, leak: &netns_harness::Leak, flags: u8) -> Result<()> {
    let segment = Segment {
        from: (leak.pair().peer_address, 9).into(),
        to: leak.pair().app_address,
        seq: Seq(1),
        ack: Seq(2),
        flags,
        payload_len: 0,
    };
    lab.app_host().within(|| send(segment))
}

/// Why rst elicits an ACK with a bare ACK and not with a SYN.
fn fact_a_listener_keeps_nothing_of_a_bare_ack(family: Family) -> Result<()> {
    let (lab, leak) = lab("established", family, 1)?;
    for flags in [TcpFlags::ACK, TcpFlags::RST, TcpFlags::RST | TcpFlags::ACK] {
        to_listener(&lab, &leak, flags)?;
        assert_eq!(connections(&lab)?.len(), 1);
    }
    // The SYN-ACK gets no answer.
    leak.pair().set_link(false)?;
    to_listener(&lab, &leak, TcpFlags::SYN)?;
    assert_eq!(in_state(&lab, TcpState::SynRecv)?, 1);
    Ok(())
}

/// A stuck connection of this process to itself: the end in CLOSE-WAIT and its peer.
fn loopback(family: Family) -> Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind(match family {
        Family::V4 => "127.0.0.1:0",
        Family::V6 => "[::1]:0",
        Family::Mapped => "[::ffff:127.0.0.1]:0",
    })?;
    let peer = TcpStream::connect(listener.local_addr()?)?;
    let (local, _) = listener.accept()?;
    peer.shutdown(Shutdown::Write)?;
    Ok((local, peer))
}

fn send(segment: Segment) -> Result<()> {
    let outgoing = Outgoing {
        segment,
        interface: 0,
    };
    let sent = RawSockets::default().send(vec![((), outgoing)]);
    assert_eq!(sent, [((), Ok(()))]);
    Ok(())
}

fn fact_an_rst_beside_rcv_nxt_closes_nothing(family: Family) -> Result<()> {
    Lab::new()?.app_host().within(|| {
        let (local, peer) = loopback(family)?;
        let numbers = repair::numbers(local.as_fd()).map_err(|error| anyhow!("{error}"))?;
        let canonical =
            |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
        let reset = |seq| {
            send(Segment {
                from: canonical(peer.local_addr()?),
                to: canonical(local.local_addr()?),
                seq,
                ack: numbers.snd_nxt,
                flags: TcpFlags::RST | TcpFlags::ACK,
                payload_len: 0,
            })
        };
        for off in [1, 2, 1000] {
            reset(numbers.rcv_nxt.plus(off))?;
        }
        // After a FIN, the kernel also accepts rcv_nxt - 1 (tcp_reset_check).
        for off in [2, 1000] {
            reset(numbers.rcv_nxt.minus(off))?;
        }
        (&local).write_all(b"x")?;
        (&peer).read_exact(&mut [0])?;
        reset(numbers.rcv_nxt)?;
        let error = (&local).write_all(b"x").unwrap_err().raw_os_error();
        assert_eq!(error, Some(libc::EPIPE));
        Ok(())
    })
}

/// SO_REUSEADDR and TCP_REPAIR.
fn options(socket: &TcpStream) -> Result<(bool, u32)> {
    Ok((
        getsockopt(socket, ReuseAddr)?,
        getsockopt(socket, TcpRepair)?,
    ))
}

fn repair_mode_is_left_on_every_path(family: Family) -> Result<()> {
    Lab::new()?.app_host().within(|| {
        let (local, peer) = loopback(family)?;
        for reuse in [false, true] {
            setsockopt(&local, ReuseAddr, &reuse)?;
            let before = repair::numbers(local.as_fd()).map_err(|error| anyhow!("{error}"))?;
            assert_eq!(options(&local)?, (reuse, 0));
            let panicked = catch_unwind(AssertUnwindSafe(|| {
                let _mode = RepairMode::enter(local.as_fd()).unwrap();
                // The guard exists because of this.
                assert_eq!(options(&local).unwrap(), (true, 1));
                let error = repair::numbers(local.as_fd()).unwrap_err();
                assert_eq!(error.errno(), Some(Errno::EBUSY), "somebody else's");
                resume_unwind(Box::new("in repair mode"));
            }));
            let message = panicked.unwrap_err();
            assert_eq!(message.downcast_ref::<&str>(), Some(&"in repair mode"));
            assert_eq!(options(&local)?, (reuse, 0));
            (&local).write_all(b"1234567")?;
            (&peer).read_exact(&mut [0; 7])?;
            let after = repair::numbers(local.as_fd()).map_err(|error| anyhow!("{error}"))?;
            assert_eq!(after.rcv_nxt, before.rcv_nxt);
            assert_eq!(after.snd_nxt, before.snd_nxt.plus(7));
        }
        // Without the guard, leaving the mode turns SO_REUSEADDR off.
        setsockopt(&local, TcpRepair, &1)?;
        setsockopt(&local, TcpRepair, &u32::MAX)?;
        assert_eq!(options(&local)?, (false, 0));
        Ok(())
    })
}

/// The owner closes the socket while our duplicate has it in repair mode, in which a close sends nothing. The peer still
/// gets the FIN, because the mode ends before the duplicate is closed.
fn an_owner_that_exits_in_repair_mode_still_sends_its_fin(family: Family) -> Result<()> {
    Lab::new()?.app_host().within(|| {
        let (local, mut peer) = loopback(family)?;
        peer.shutdown(Shutdown::Write)?;
        let duplicate = local.try_clone()?;
        let mode = RepairMode::enter(duplicate.as_fd())?;
        drop(local);
        drop(mode);
        drop(duplicate);
        peer.set_read_timeout(Some(PATIENCE))?;
        assert_eq!(peer.read(&mut [0; 1])?, 0);
        Ok(())
    })
}
