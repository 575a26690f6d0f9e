//! cwkill under limits of its own: address space, threads, a seccomp filter.

use anyhow::Result;
use netns_harness::{Capability, Family, Lab, TcpState};

use crate::doctor::without;
use crate::support::{CWKILL, Ran, cwkill, in_state, lab, ran};
use crate::trial::{Need, Test, once};

pub const TESTS: &[Test] = &[
    once!(without_memory_for_the_report_nothing_is_done),
    once!(without_threads_every_command_works).needs(Need::RootOfTheMachine),
    once!(a_namespace_that_needs_a_thread_is_named_with_the_limit).needs(Need::RootOfTheMachine),
    once!(a_filter_on_cwkill_itself_is_named),
];

/// Ten sockets, closed with limits from too little address space to enough.
fn without_memory_for_the_report_nothing_is_done() -> Result<()> {
    const SOCKETS: usize = 10;
    const MIB: usize = 1 << 20;
    let (lab, _leak) = lab("drained", Family::V4, SOCKETS)?;
    let mut refused = 0;
    for limit in (64..2048).step_by(16) {
        let line = format!("--as={} {CWKILL} --all --json", limit * MIB);
        let command = lab.app_host().command("prlimit");
        let ran = ran(command.args(line.split_whitespace()))?;
        if ran.code == Some(0) {
            assert_eq!(ran.sockets().len(), SOCKETS);
            assert_eq!(in_state(&lab, TcpState::CloseWait)?, 0);
            assert!(refused > 0, "the limits began too high");
            return Ok(());
        }
        // With less it cannot even list: then it may be aborted.
        assert_eq!(in_state(&lab, TcpState::CloseWait)?, SOCKETS, "{ran:?}");
        refused += usize::from(
            ran.code == Some(3)
                && ran
                    .stderr
                    .contains("nothing was done: the report would need"),
        );
    }
    anyhow::bail!("not done with any limit")
}

/// Runs cwkill as a user of its own that may start no thread.
fn without_threads(lab: &Lab, line: &str) -> Result<Ran> {
    const ALONE: u32 = 64125;
    let rights = [
        Capability::CAP_SYS_PTRACE,
        Capability::CAP_DAC_READ_SEARCH,
        Capability::CAP_NET_ADMIN,
        Capability::CAP_NET_RAW,
    ];
    let command = lab
        .app_host()
        .command("prlimit")
        .uid(ALONE)
        .capabilities(&rights);
    let line = format!("--nproc=1 {CWKILL} {line}");
    ran(command.args(line.split_whitespace()))
}

fn without_threads_every_command_works() -> Result<()> {
    let (lab, leak) = lab("drained", Family::V4, 4)?;
    let pid = leak.app().pid();
    for (line, status) in [
        ("--json".to_owned(), 0),
        ("-n --port 8080".into(), 0),
        (format!("diagnose --sample 1ms --pid {pid}"), 0),
        (
            format!("check --warning 1 --critical 2 --timeout 60 --pid {pid}"),
            2,
        ),
        ("--port 8080 --max-kills 1 --method shutdown".into(), 0),
        ("--port 8080 --max-kills 1 --method rst".into(), 0),
        ("--port 8080 --method destroy".into(), 0),
        (format!("reclaim -n --pid {pid}"), 0),
    ] {
        let ran = without_threads(&lab, &line)?.exits(status);
        assert!(!ran.stderr.contains("panicked"), "{ran:?}");
    }
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 0);
    Ok(())
}

fn a_namespace_that_needs_a_thread_is_named_with_the_limit() -> Result<()> {
    let (_lab, leak) = lab("drained", Family::V4, 1)?;
    let other = Lab::new()?;
    let line = format!("-N {}", leak.app().pid());
    without_threads(&other, &line)?
        .exits(3)
        .complains("RLIMIT_NPROC");
    Ok(())
}

/// The capabilities are all there, and the system call fails with the errno of a missing one.
fn a_filter_on_cwkill_itself_is_named() -> Result<()> {
    let (lab, _leak) = lab("drained", Family::V4, 1)?;
    let filtered = |filter: &str, line: &str| -> Result<Ran> {
        let command = without(&lab, filter)?;
        ran(command.args(line.split_whitespace()))
    };
    let hint = "seccomp filter that is on cwkill itself";
    filtered("pidfd_getfd: EPERM", "--all --method shutdown")?
        .exits(4)
        .complains(hint);
    let ran = cwkill(&lab, "--all --method shutdown -n")?.exits(0);
    assert!(!ran.stderr.contains(hint), "{ran:?}");
    // The answers of a container's profile and of systemd's RestrictAddressFamilies=.
    for filter in ["netlink: EPERM", "netlink: EAFNOSUPPORT"] {
        for line in [
            "--all",
            "diagnose",
            "reclaim",
            "check --warning 1 --critical 2",
        ] {
            let ran = filtered(filter, line)?.exits(3);
            let all = format!("{}{}", ran.stdout, ran.stderr);
            assert!(all.contains("seccomp filter"), "{ran:?}");
            assert!(!all.contains("CONFIG_INET_DIAG"), "{ran:?}");
        }
    }
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 1);
    Ok(())
}
