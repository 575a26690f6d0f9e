//! `probe`: the kernel closes only connections that the peer has forgotten, and all options are restored.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use netns_harness::{Family, Lab, Leak, Recv, Signal, SocketOption, TcpState};

use crate::support::{
    CWKILL, PATIENCE, Ran, all_have, at, connections, cwkill, first_error, in_state, lab, ran,
    settled, skip_reason,
};
use crate::trial::{Test, each_family, once};

pub const TESTS: &[Test] = &[
    each_family!(a_half_closed_peer_lives_and_gets_its_data),
    each_family!(a_peer_that_has_forgotten_lets_the_kernel_close),
    each_family!(a_silent_peer_is_not_taken_for_gone),
    each_family!(a_silent_peer_is_left_to_the_next_method),
    each_family!(a_live_peer_keeps_later_methods_away),
    each_family!(an_owner_without_privileges_is_enough),
    once!(more_sockets_than_one_capture_holds_are_asked),
    once!(sigkill_leaves_no_option_behind),
    once!(an_idle_socket_is_probed_at_once),
    once!(ctrl_c_puts_the_options_back),
    once!(pressing_ctrl_c_again_changes_nothing),
    once!(a_lost_terminal_puts_the_options_back),
    once!(nohup_is_respected),
    once!(an_option_that_could_not_be_put_back_is_not_set),
];

const PROBE: &str = "--port 8080 --method probe --json";
/// Scenarios with and without a descriptor.
const KINDS: [&str; 2] = ["drained", "not-accepted"];

/// The keepalive timers that `ss` shows on the leaking host.
fn keepalive_timers(lab: &Lab) -> Result<usize> {
    let shown = ran(lab.app_host().command("ss").args(["-Htno"]))?.exits(0);
    Ok(shown.stdout.matches("keepalive").count())
}

/// Without owners, so the kernel's answers are captured, by port.
fn more_sockets_than_one_capture_holds_are_asked() -> Result<()> {
    let (lab, _leak) = lab("not-accepted", Family::V4, 600)?;
    let sockets = cwkill(&lab, &format!("{PROBE} --grace 20s"))?
        .exits(4)
        .sockets();
    assert_eq!(sockets.len(), 600);
    all_have(&sockets, "skipped", "null");
    for socket in &sockets {
        assert_eq!(at(socket, "/result/reason_code"), "peer-alive");
    }
    Ok(())
}

fn a_half_closed_peer_lives_and_gets_its_data(family: Family) -> Result<()> {
    for kind in KINDS {
        let (lab, leak) = lab(kind, family, 3)?;
        let before = connections(&lab)?;
        let sockets = cwkill(&lab, &format!("{PROBE} --grace 20s"))?
            .exits(4)
            .sockets();
        assert_eq!(sockets.len(), 3);
        all_have(&sockets, "skipped", "null");
        for socket in &sockets {
            assert_eq!(skip_reason(socket), "peer is alive");
        }
        assert_eq!(connections(&lab)?, before);
        assert_eq!(keepalive_timers(&lab)?, 0);
        for conn in leak.conns() {
            let Some(app) = conn.app_fd else { continue };
            leak.app().send(&[app], b"late")?;
            let peer = conn.peer_fd.context("no descriptor in the peer")?;
            let got = leak.peer().recv(peer, 10, PATIENCE)?;
            assert_eq!(got, Recv::Data(b"late".to_vec()));
        }
    }
    Ok(())
}

fn a_peer_that_has_forgotten_lets_the_kernel_close(family: Family) -> Result<()> {
    for kind in KINDS {
        let (lab, leak) = lab(kind, family, 3)?;
        leak.peer().forget(&leak.peer_fds())?;
        let sockets = cwkill(&lab, &format!("{PROBE} --grace 20s"))?
            .exits(0)
            .sockets();
        all_have(&sockets, "closed", "probe");
        assert_eq!(connections(&lab)?.len(), 0);
        assert!(leak.app().is_alive());
    }
    Ok(())
}

fn silent_peer(kind: &str, family: Family) -> Result<(Lab, Leak)> {
    let (lab, leak) = lab(kind, family, 3)?;
    // A peer whose FIN is not acknowledged sends it again, and so shows that it is alive.
    settled(&lab, &leak)?;
    leak.peer()
        .set_option(&leak.peer_fds(), SocketOption::DropIncoming(true))?;
    Ok((lab, leak))
}

fn a_silent_peer_is_not_taken_for_gone(family: Family) -> Result<()> {
    for kind in KINDS {
        let (lab, _leak) = silent_peer(kind, family)?;
        let sockets = cwkill(&lab, &format!("{PROBE} --grace 300ms"))?
            .exits(4)
            .sockets();
        all_have(&sockets, "failed", "null");
        let error = first_error(&sockets[0]);
        assert!(error.contains("no answer from the peer"), "{error}");
        assert_eq!(connections(&lab)?.len(), 3);
        assert_eq!(keepalive_timers(&lab)?, 0);
    }
    Ok(())
}

fn a_silent_peer_is_left_to_the_next_method(family: Family) -> Result<()> {
    let (lab, _leak) = silent_peer("drained", family)?;
    let line = "--all --method probe,destroy --grace 100ms --json";
    let sockets = cwkill(&lab, line)?.exits(0).sockets();
    all_have(&sockets, "closed", "destroy");
    Ok(())
}

fn a_live_peer_keeps_later_methods_away(family: Family) -> Result<()> {
    let (lab, _leak) = lab("drained", family, 3)?;
    let sockets = cwkill(&lab, "--all --method probe,destroy --json")?
        .exits(4)
        .sockets();
    all_have(&sockets, "skipped", "null");
    assert_eq!(connections(&lab)?.len(), 3);
    Ok(())
}

/// The owner has the same user, and as few privileges.
fn an_owner_without_privileges_is_enough(family: Family) -> Result<()> {
    let lab = Lab::new()?;
    let app = lab.app_host().agent_as(&netns_harness::AgentOptions {
        comm: "no-privilege".into(),
        capabilities: Some(vec![]),
        ..Default::default()
    })?;
    let address = match family {
        Family::V4 => "127.0.0.1:7000",
        Family::V6 => "[::1]:7000",
        Family::Mapped => "[::ffff:127.0.0.1]:7000",
    };
    let address = address.parse()?;
    let listener = app.listen(address, false, 16)?;
    let peer = lab.app_host().agent("peer")?;
    let ends = peer.connect(address, 1, netns_harness::Dial::default(), PATIENCE)?;
    app.accept(listener, 1, PATIENCE)?;
    peer.shutdown(&[ends[0].fd], netns_harness::How::Write)?;
    lab.wait_for(PATIENCE, || Ok(in_state(&lab, TcpState::CloseWait)? == 1))?;
    let command = lab.app_host().command(CWKILL).capabilities(&[]);
    let line = "--port 7000 --method probe --json";
    let sockets = ran(command.args(line.split(' ')))?.exits(4).sockets();
    all_have(&sockets, "skipped", "null");
    assert_eq!(skip_reason(&sockets[0]), "peer is alive");
    Ok(())
}

/// The segments that the sockets of `port` have sent, and the line of each with its timer.
fn sent(lab: &Lab, port: u16) -> Result<(u64, String)> {
    let filter = format!("sport = :{port}");
    let shown = ran(lab.app_host().command("ss").args(["-Htnoi", "-O", &filter]))?.exits(0);
    let words = shown.stdout.split_whitespace();
    let counts = words.filter_map(|word| word.strip_prefix("segs_out:")?.parse::<u64>().ok());
    Ok((counts.sum(), shown.stdout.clone()))
}

/// A run that has asked three silent peers and waits for their answers. Only the first socket has keepalive of its own.
fn waiting() -> Result<(Lab, Leak, std::process::Child)> {
    let (lab, leak) = silent_peer("drained", Family::V4)?;
    leak.app().set_option(
        &leak.app_fds()[..1],
        SocketOption::KeepAlive {
            idle_s: 7000,
            interval_s: 70,
            probes: 7,
        },
    )?;
    assert_eq!(keepalive_timers(&lab)?, 1);
    let (before, _) = sent(&lab, 8080)?;
    let line = "--port 8080 --allow-spin --method probe --grace 60s --json";
    let child = lab
        .app_host()
        .command(CWKILL)
        .args(line.split(' '))
        .stdout(std::process::Stdio::piped())
        .spawn()?;
    lab.wait_for(PATIENCE, || Ok(sent(&lab, 8080)?.0 == before + 3))?;
    Ok((lab, leak, child))
}

/// TCP_KEEPIDLE is set to the time for which the socket has been idle, and the kernel counts from the last segment.
fn an_idle_socket_is_probed_at_once() -> Result<()> {
    const IDLE: Duration = Duration::from_secs(4);
    let (lab, leak) = lab("drained", Family::V4, 1)?;
    settled(&lab, &leak)?;
    let mut took = Vec::new();
    // A busy machine is not slow each time.
    while took.len() < 5 {
        lab.wait_for(PATIENCE, || {
            let (_, shown) = sent(&lab, 8080)?;
            let words = shown.split_whitespace();
            let quiet = words.filter_map(|word| word.strip_prefix("lastack:")?.parse::<u64>().ok());
            let quiet = quiet.filter(|ms| u128::from(*ms) > IDLE.as_millis());
            Ok(quiet.count() == 1)
        })?;
        let began = Instant::now();
        let sockets = cwkill(&lab, &format!("{PROBE} --grace 30s"))?
            .exits(4)
            .sockets();
        took.push(began.elapsed());
        assert_eq!(at(&sockets[0], "/result/reason_code"), "peer-alive");
        if took.last() < Some(&IDLE) {
            return Ok(());
        }
    }
    panic!("{took:?}")
}

/// The options are restored as soon as the probes are sent, long before the answers, and no duplicate is left.
fn sigkill_leaves_no_option_behind() -> Result<()> {
    let (lab, leak, mut child) = waiting()?;
    lab.wait_for(PATIENCE, || Ok(keepalive_timers(&lab)? == 1))?;
    let inodes: Vec<String> = connections(&lab)?
        .iter()
        .map(|row| format!("socket:[{}]", row.inode))
        .collect();
    lab.wait_for(PATIENCE, || {
        let mut held = false;
        for entry in std::fs::read_dir(format!("/proc/{}/fd", child.id()))? {
            // It may be closed meanwhile.
            let link = std::fs::read_link(entry?.path()).unwrap_or_default();
            held |= inodes.contains(&link.to_string_lossy().into_owned());
        }
        Ok(!held)
    })?;
    assert!(child.try_wait()?.is_none(), "it still waits");
    child.kill()?;
    child.wait()?;
    let (_, shown) = sent(&lab, 8080)?;
    assert_eq!(
        shown.matches("timer:(keepalive,116min").count(),
        1,
        "{shown}"
    );
    assert_eq!(keepalive_timers(&lab)?, 1, "{shown}");
    assert!(leak.app().is_alive());
    Ok(())
}

fn interrupted(signals: &[Signal]) -> Result<()> {
    let (lab, _leak, child) = waiting()?;
    let before = ran(lab.app_host().command("ss").args(["-Htn"]))?.stdout;
    let pid = nix::unistd::Pid::from_raw(child.id().try_into()?);
    for signal in signals {
        nix::sys::signal::kill(pid, *signal)?;
    }
    let document = Ran::of("cwkill", child.wait_with_output()?)?
        .exits(4)
        .json();
    assert_eq!(at(&document, "/summary/skipped"), "3");
    assert_eq!(skip_reason(&document["sockets"][0]), "interrupted");
    assert_eq!(keepalive_timers(&lab)?, 1);
    assert_eq!(
        ran(lab.app_host().command("ss").args(["-Htn"]))?.stdout,
        before
    );
    Ok(())
}

/// Started with SIGHUP ignored, it stays ignored.
fn nohup_is_respected() -> Result<()> {
    let (lab, _leak) = silent_peer("drained", Family::V4)?;
    let script =
        format!("trap '' HUP; exec {CWKILL} --all --allow-spin --method probe --grace 60s --json");
    let (before, _) = sent(&lab, 8080)?;
    let sh = lab.app_host().command("sh").args(["-c", &script]);
    let child = sh.stdout(std::process::Stdio::piped()).spawn()?;
    lab.wait_for(PATIENCE, || Ok(sent(&lab, 8080)?.0 == before + 3))?;
    let pid = nix::unistd::Pid::from_raw(child.id().try_into()?);
    nix::sys::signal::kill(pid, Signal::SIGHUP)?;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    nix::sys::signal::kill(pid, Signal::SIGINT)?;
    let ran = Ran::of("cwkill", child.wait_with_output()?)?.exits(4);
    assert_eq!(skip_reason(&ran.sockets()[0]), "interrupted");
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = u64::from_str_radix(ignored.context("no SigIgn")?.trim(), 16)?;
    assert!(ignored & 1 << (libc::SIGHUP - 1) != 0, "{status}");
    Ok(())
}

/// A large default of the keepalive time can be read from a socket, but not set on it.
fn an_option_that_could_not_be_put_back_is_not_set() -> Result<()> {
    let (lab, leak) = lab("drained", Family::V4, 1)?;
    lab.app_host().within(|| {
        std::fs::write("/proc/sys/net/ipv4/tcp_keepalive_time", "86400")?;
        Ok(())
    })?;
    let sockets = cwkill(&lab, "--all --method probe --json")?
        .exits(4)
        .sockets();
    all_have(&sockets, "failed", "null");
    let error = first_error(&sockets[0]);
    assert!(error.contains("could not be restored"), "{error}");
    assert_eq!(keepalive_timers(&lab)?, 0);
    assert!(leak.app().is_alive());
    Ok(())
}

fn ctrl_c_puts_the_options_back() -> Result<()> {
    interrupted(&[Signal::SIGINT])
}

fn pressing_ctrl_c_again_changes_nothing() -> Result<()> {
    interrupted(&[Signal::SIGINT, Signal::SIGINT, Signal::SIGTERM])
}

fn a_lost_terminal_puts_the_options_back() -> Result<()> {
    interrupted(&[Signal::SIGHUP])
}
