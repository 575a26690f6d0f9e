//! Signals whose default action ends a process, and limits of the size of files: a run that has begun to act ends with its report.

use std::io::Write;
use std::process::{Child, Stdio};

use anyhow::{Context, Result};
use netns_harness::{Family, Lab, Leak, TcpState};

use crate::support::{CWKILL, PATIENCE, Ran, at, cwkill, in_state, lab, ran};
use crate::trial::{Test, once};

pub const TESTS: &[Test] = &[
    once!(a_limit_or_a_timer_ends_a_run_with_its_report),
    once!(stray_signals_end_no_run_that_acts),
    once!(a_terminal_does_not_stop_a_run_in_the_background),
    once!(a_full_report_does_not_hide_that_the_work_is_done),
    once!(a_full_log_does_not_hide_that_the_work_is_done),
    once!(a_log_that_is_full_before_the_act_prevents_it),
];

/// A run that has shut its socket down and waits for a silent peer.
fn waiting() -> Result<(Lab, Leak, Child)> {
    let (lab, leak) = lab("silent-peer", Family::V4, 1)?;
    let line = "--all --method shutdown --grace 60s --json";
    let child = lab
        .app_host()
        .command(CWKILL)
        .args(line.split(' '))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    lab.wait_for(PATIENCE, || Ok(in_state(&lab, TcpState::LastAck)? == 1))?;
    Ok((lab, leak, child))
}

fn send(child: &Child, signal: i32) -> Result<()> {
    // nix knows no real-time signals.
    let status = std::process::Command::new("kill")
        .args([&format!("-{signal}"), &child.id().to_string()])
        .status()
        .context("run kill")?;
    assert!(status.success(), "kill -{signal}: {status}");
    Ok(())
}

fn a_limit_or_a_timer_ends_a_run_with_its_report() -> Result<()> {
    for signal in [
        libc::SIGALRM,
        libc::SIGVTALRM,
        libc::SIGPROF,
        libc::SIGXCPU,
        libc::SIGUSR1,
        libc::SIGUSR2,
    ] {
        let (_lab, _leak, child) = waiting()?;
        send(&child, signal)?;
        let ran = Ran::of("cwkill", child.wait_with_output()?)?.exits(4);
        let sockets = ran.sockets();
        assert_eq!(at(&sockets[0], "/result/outcome"), "closing", "{signal}");
    }
    Ok(())
}

fn stray_signals_end_no_run_that_acts() -> Result<()> {
    let (_lab, _leak, mut child) = waiting()?;
    let real_time = [libc::SIGRTMIN(), libc::SIGRTMIN() + 1, libc::SIGRTMAX()];
    for signal in [libc::SIGIO, libc::SIGPWR, libc::SIGSTKFLT, libc::SIGXFSZ]
        .into_iter()
        .chain(real_time)
    {
        send(&child, signal)?;
        assert!(child.try_wait()?.is_none(), "{signal}");
    }
    send(&child, libc::SIGINT)?;
    Ran::of("cwkill", child.wait_with_output()?)?.exits(4);
    Ok(())
}

/// With `stty tostop` a write of a process in the background stops it, unless it ignores SIGTTOU.
fn a_terminal_does_not_stop_a_run_in_the_background() -> Result<()> {
    for (line, status, left) in [
        ("--method destroy", 0, 0),
        ("reclaim --dry-run", 1, 2),
        ("diagnose --sample 1ms", 0, 2),
    ] {
        let (lab, leak) = lab("unread", Family::V4, 2)?;
        let pid = leak.app().pid();
        // The first job shows that the terminal stops others.
        let script = format!(
            "stty tostop; set -m
             sh -c 'echo from the background' & job=$!
             until grep -q ') T' /proc/$job/stat; do :; done
             kill -KILL $job
             {CWKILL} {line} --pid {pid} & wait $!"
        );
        let command = lab.app_host().command("script");
        let output = command
            .args(["-qec", &script, "/dev/null"])
            .output_within(PATIENCE)?;
        Ran::of(line, output)?.exits(status);
        assert_eq!(in_state(&lab, TcpState::CloseWait)?, left, "{line}");
    }
    Ok(())
}

/// Runs cwkill with this limit of the size of files, in units of 512 bytes as sh(1) takes it.
fn limited(lab: &Lab, blocks: u64, arguments: &str) -> Result<Ran> {
    let script = format!("ulimit -f {blocks}; exec {CWKILL} {arguments}");
    ran(lab.app_host().command("sh").args(["-c", &script]))
}

fn a_full_report_does_not_hide_that_the_work_is_done() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let report = dir.path().join("report");
    for format in ["--json", "--jsonl"] {
        let (lab, _leak) = lab("unread", Family::V4, 4)?;
        let arguments = format!("--all --method destroy {format} > {}", report.display());
        limited(&lab, 1, &arguments)?
            .exits(3)
            .complains("the work is done (4 sockets")
            .complains("File too large");
        assert_eq!(in_state(&lab, TcpState::CloseWait)?, 0);
        // A listing has done nothing, and says only that it is incomplete.
        lab.start("unread", Family::V4, crate::support::alone(9000, 4))?;
        let arguments = format!("{format} > {}", report.display());
        limited(&lab, 1, &arguments)?
            .exits(3)
            .complains("cannot write the listing: File too large");
    }
    Ok(())
}

const BLOCK: u64 = 512;
const BLOCKS: u64 = 64;

/// A log in `dir` with only this much room left before the limit.
fn log_with_room(dir: &tempfile::TempDir, room: u64) -> Result<tempfile::NamedTempFile> {
    let mut log = tempfile::NamedTempFile::new_in(dir.path())?;
    let filled = usize::try_from(BLOCKS * BLOCK - room)?;
    log.write_all(&vec![b' '; filled - 1])?;
    log.write_all(b"\n")?;
    Ok(log)
}

fn a_full_log_does_not_hide_that_the_work_is_done() -> Result<()> {
    // The records of one run: begin, intent, outcome and end.
    let (whole, _leak) = lab("unread", Family::V4, 1)?;
    let dir = tempfile::tempdir()?;
    let log = dir.path().join("whole");
    let arguments = format!("--all --method destroy --log-file {}", log.display());
    cwkill(&whole, &arguments)?.exits(0);
    let text = std::fs::read_to_string(&log)?;
    let lengths: Vec<u64> = text.lines().map(|line| line.len() as u64 + 1).collect();
    assert_eq!(lengths.len(), 4, "{text}");
    // Room for the first two, and for a part of the third.
    let log = log_with_room(&dir, lengths[0] + lengths[1] + lengths[2] / 2)?;
    let (lab, _leak) = lab("unread", Family::V4, 1)?;
    let arguments = format!(
        "--all --method destroy --json --log-file {}",
        log.path().display()
    );
    let ran = limited(&lab, BLOCKS, &arguments)?
        .exits(3)
        .complains("the work is done (1 socket")
        .complains("File too large");
    assert_eq!(at(&ran.sockets()[0], "/result/outcome"), "closed");
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 0);
    let text = std::fs::read_to_string(log.path())?;
    assert!(text.contains("\"event\":\"intent\""), "{text}");
    Ok(())
}

fn a_log_that_is_full_before_the_act_prevents_it() -> Result<()> {
    let (lab, _leak) = lab("unread", Family::V4, 1)?;
    let dir = tempfile::tempdir()?;
    let log = log_with_room(&dir, 100)?;
    let path = log.path().display();
    for arguments in [
        format!("--all --method destroy --log-file {path}"),
        format!("--all --method destroy --reclaim --log-file {path}"),
    ] {
        limited(&lab, BLOCKS, &arguments)?
            .exits(3)
            .complains("nothing was done")
            .complains("File too large");
        assert_eq!(in_state(&lab, TcpState::CloseWait)?, 1);
    }
    Ok(())
}
