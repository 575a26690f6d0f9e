//! The behaviour of the peer and the application of a scenario, which `ss` does not show.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::Trial;
use netns_harness::{End, Family, Fd, How, Lab, Leak, Options, Recv, TcpState, check};
use nix::net::if_::InterfaceFlags;

use crate::support::{DEADLINE, count_states, wait_until};

pub fn tests() -> Vec<Trial> {
    crate::tests!("behaviour":
        sending_completes_if_nothing_closes_it,
        a_half_closed_conversation_goes_on,
        a_vanished_peer_resets,
        a_silent_peer_says_nothing_on_a_link_that_is_up,
        a_peer_that_is_gone_has_no_carrier,
        a_peer_that_never_answers_does_not_send_its_syn_again,
        a_stopped_application_is_stopped,
        threads_are_threads,
        reused_ports_are_the_same,
        special_applications_beside_ordinary_ones,
    )
}

fn start(lab: &Lab, scenario: &str, family: Family) -> Result<Leak> {
    lab.start(
        scenario,
        family,
        Options {
            count: 2,
            ..Options::default()
        },
    )
}

fn first(leak: &Leak) -> Result<(Fd, Option<Fd>)> {
    Ok((
        leak.conns()[0].app_fd.context("no descriptor")?,
        leak.conns()[0].peer_fd,
    ))
}

fn sending_completes_if_nothing_closes_it() -> Result<()> {
    let lab = Lab::new()?;
    let leak = start(&lab, "sending", Family::V6)?;
    leak.app().shutdown(&leak.app_fds(), How::Write)?;
    for (drained, conn) in leak
        .peer()
        .drain(&leak.peer_fds(), DEADLINE)?
        .iter()
        .zip(leak.conns())
    {
        ensure!(
            drained.bytes == conn.sent && drained.intact && drained.end == End::Eof,
            "{drained:?} {conn:?}"
        );
    }
    ensure!(
        leak.conns().iter().all(|conn| conn.sent > 1 << 20),
        "{:?}",
        leak.conns()
    );
    Ok(())
}

fn a_half_closed_conversation_goes_on() -> Result<()> {
    let lab = Lab::new()?;
    let leak = start(&lab, "half-closed", Family::Mapped)?;
    let (_, peer) = first(&leak)?;
    let peer = peer.context("no peer")?;
    for _ in 0..3 {
        ensure!(matches!(
            leak.peer().recv(peer, 1, DEADLINE)?,
            Recv::Data(_)
        ));
    }
    let sent = leak.app().stop_sending()?;
    leak.app().shutdown(&leak.app_fds(), How::Write)?;
    let rest = leak.peer().drain(&[peer], DEADLINE)?[0];
    ensure!(
        rest.bytes + 3 == sent[0] && rest.end == End::Eof,
        "{rest:?} of {sent:?}"
    );
    Ok(())
}

fn a_vanished_peer_resets() -> Result<()> {
    let lab = Lab::new()?;
    let leak = start(&lab, "peer-vanished", Family::V4)?;
    let (app, _) = first(&leak)?;
    ensure!(
        lab.app_host()
            .sockets()?
            .iter()
            .filter(|socket| socket.state == TcpState::CloseWait)
            .count()
            == 2
    );
    leak.app().send(&[app], b"hello?")?;
    wait_until("the reset arrives", || {
        Ok(lab
            .app_host()
            .sockets()?
            .iter()
            .filter(|socket| socket.state == TcpState::CloseWait)
            .count()
            == 1)
    })?;
    // EPIPE and not ECONNRESET: the peer had finished before (tcp_reset in the kernel).
    ensure!(leak.app().take_error(app)? == libc::EPIPE);
    Ok(())
}

/// Whether the application's end of the link has a carrier.
fn has_carrier(lab: &Lab) -> Result<bool> {
    let flags = lab.app_host().within(|| {
        let mut interfaces = nix::ifaddrs::getifaddrs()?;
        let link = interfaces.find(|interface| interface.interface_name == "veth1");
        Ok(link.context("no link")?.flags)
    })?;
    Ok(flags.contains(InterfaceFlags::IFF_UP | InterfaceFlags::IFF_RUNNING))
}

fn a_silent_peer_says_nothing_on_a_link_that_is_up() -> Result<()> {
    let lab = Lab::new()?;
    let leak = start(&lab, "silent-peer", Family::V4)?;
    let (app, peer) = first(&leak)?;
    ensure!(has_carrier(&lab)?);
    leak.app().send(&[app], b"hello?")?;
    ensure!(
        leak.peer()
            .recv(peer.context("no peer")?, 9, Duration::from_millis(100))?
            == Recv::Nothing
    );
    let sockets = lab.app_host().sockets()?;
    let unacknowledged: Vec<_> = sockets.iter().filter(|socket| socket.send_q == 6).collect();
    ensure!(
        unacknowledged.len() == 1 && unacknowledged[0].state == TcpState::CloseWait,
        "{sockets:?}"
    );
    Ok(())
}

fn a_peer_that_is_gone_has_no_carrier() -> Result<()> {
    let lab = Lab::new()?;
    let leak = start(&lab, "peer-gone", Family::V6)?;
    wait_until("the carrier is lost", || Ok(!has_carrier(&lab)?))?;
    check(&lab, &leak, Family::V6)?;
    leak.pair().set_link(true)?;
    wait_until("the carrier is back", || has_carrier(&lab))
}

fn a_peer_that_never_answers_does_not_send_its_syn_again() -> Result<()> {
    for family in Family::ALL {
        let lab = Lab::new()?;
        let leak = start(&lab, "syn-recv", family)?;
        // A socket in SYN-SENT would send another SYN after a second.
        let sockets = leak.pair().peer_host.sockets()?;
        let listening = |socket: &netns_harness::KernelSocket| socket.state == TcpState::Listen;
        ensure!(
            sockets.len() == 2 && sockets.iter().all(listening),
            "{sockets:?}"
        );
        check(&lab, &leak, family)?;
    }
    Ok(())
}

fn status(pid: u32) -> Result<procfs::process::Status> {
    Ok(procfs::process::Process::new(pid.cast_signed())?.status()?)
}

fn a_stopped_application_is_stopped() -> Result<()> {
    let lab = Lab::new()?;
    let leak = start(&lab, "stopped", Family::V4)?;
    ensure!(status(leak.app().pid())?.state.starts_with('T') && leak.app().is_alive());
    leak.app().signal(netns_harness::Signal::SIGCONT)?;
    let (app, _) = first(&leak)?;
    ensure!(leak.app().recv(app, 1, DEADLINE)? == Recv::Eof);
    Ok(())
}

fn threads_are_threads() -> Result<()> {
    let lab = Lab::new()?;
    let leak = start(&lab, "threads", Family::V4)?;
    ensure!(status(leak.app().pid())?.threads == 51);
    Ok(())
}

fn reused_ports_are_the_same() -> Result<()> {
    let lab = Lab::new()?;
    let leak = start(&lab, "reuse", Family::Mapped)?;
    let ports: Vec<_> = leak.conns().iter().map(|conn| conn.peer.port()).collect();
    ensure!(ports == [40_000, 40_001], "{ports:?}");
    Ok(())
}

fn special_applications_beside_ordinary_ones() -> Result<()> {
    let arguments = "run not-accepted,unread,stopped,peer-gone,established --count 2 --family mapped --check -- ss -Htan";
    let states = count_states(arguments)?;
    ensure!(states == (8, 2, 3), "{states:?}");
    Ok(())
}
