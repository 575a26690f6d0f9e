//! cwkill without rights, and without threads.

use anyhow::{Context, Result};
use netns_harness::owners::{Build, Owner};
use netns_harness::{Capability, Lab};

use super::{descriptors, fds_of, number, reason};
use crate::support::{CWKILL, at, cwkill, ran};
use crate::trial::{Need, Test, once};

pub const TESTS: &[Test] = &[
    once!(without_rights_nothing_is_done_and_the_reason_is_reported),
    once!(descriptors_inherited_by_cwkill_are_skipped),
    once!(a_process_of_another_user_is_reported).needs(Need::RootOfTheMachine),
    once!(a_hidden_process_is_reported).needs(Need::RootOfTheMachine),
    once!(no_right_is_needed_within_one_user).needs(Need::RootOfTheMachine),
    once!(without_threads_everything_or_nothing_is_done).needs(Need::RootOfTheMachine),
];

/// A user without any privilege.
const NOBODY: u32 = 65534;

fn without_rights_nothing_is_done_and_the_reason_is_reported() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "idle", 1)?;
    owner.leak(2)?;
    let before = owner.descriptors()?;
    let line = format!(
        "reclaim --pid {} --reclaim-age 0s --stop-limit 5s",
        owner.pid()
    );
    let command = lab.app_host().command(CWKILL).args(line.split_whitespace());
    let ran = ran(command.capabilities(&[]))?.exits(4);
    // The owner has more capabilities than cwkill, so cwkill cannot read its descriptors although the uid is the same.
    ran.complains(&format!("/{} could not be read", owner.pid()))
        .complains("CAP_SYS_PTRACE");
    assert_eq!(owner.descriptors()?, before);
    Ok(())
}

/// A script that leaks a descriptor which cwkill inherits.
fn descriptors_inherited_by_cwkill_are_skipped() -> Result<()> {
    const SCRIPT: &str = "import os, socket, struct, sys\n\
        listener = socket.create_server(('127.0.0.1', 0))\n\
        peer = socket.create_connection(listener.getsockname())\n\
        leaked, _ = listener.accept()\n\
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))\n\
        peer.close()\n\
        leaked.set_inheritable(True)\n\
        os.execv(sys.argv[1], [*sys.argv[1:], '--pid', str(os.getpid())])\n";
    let lab = Lab::new()?;
    for force in ["", "--reclaim-force"] {
        let line = format!("{CWKILL} reclaim --json --reclaim-age 0s --stop-limit 5s {force}");
        let command = lab.app_host().command("python3").args(["-c", SCRIPT]);
        let ran = ran(command.args(line.split_whitespace()))?.exits(4);
        let said = descriptors(&ran);
        assert_eq!(said.len(), 1);
        assert_eq!(at(&said[0], "/outcome"), "skipped");
        let why = reason(&said[0]);
        assert!(why.contains("cwkill itself inherited it"), "{why}");
    }
    Ok(())
}

fn a_process_of_another_user_is_reported() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "idle", 1)?;
    owner.leak(2)?;
    let before = owner.descriptors()?;
    for more in ["", "-n", "--reclaim-force", "--jsonl"] {
        let line = format!(
            "reclaim --pid {} --reclaim-age 0s --stop-limit 5s {more}",
            owner.pid()
        );
        let command = lab.app_host().command(CWKILL).uid(NOBODY);
        let ran = ran(command.args(line.split_whitespace()))?.exits(4);
        ran.complains(&format!("/{} could not be read", owner.pid()))
            .complains("CAP_SYS_PTRACE");
        assert_eq!(owner.descriptors()?, before);
    }
    let line = format!("reclaim --pid {} --json", owner.pid());
    let command = lab.app_host().command(CWKILL).uid(NOBODY);
    let ran = ran(command.args(line.split_whitespace()))?.exits(4);
    assert_eq!(number(&ran.json(), "/unreadable_processes"), 1);
    Ok(())
}

/// With this mount option of /proc, which many hosts use, the process is not even listed.
fn a_hidden_process_is_reported() -> Result<()> {
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "idle", 1)?;
    owner.leak(2)?;
    let script = "mount -t proc -o hidepid=2 none /proc && exec setpriv --reuid 65534 --regid 65534 --clear-groups \
                  --inh-caps=-all --bounding-set=-all \"$@\"";
    for more in ["", "-n"] {
        let line = format!("reclaim --pid {} {more}", owner.pid());
        let command = lab.app_host().command("unshare");
        let command = command.args(["-m", "sh", "-ec", script, "sh", CWKILL]);
        let ran = ran(command.args(line.split_whitespace()))?.exits(4);
        ran.complains("hidepid");
    }
    owner.report()?;
    Ok(())
}

/// The owner has no privileges, and its user has another process that cannot be inspected, as on every host.
fn no_right_is_needed_within_one_user() -> Result<()> {
    const ALONE: u32 = 64123;
    let lab = Lab::new()?;
    // The program is executed by its descriptor, because it cannot reach a path of root.
    let script = "exec 9<$1; shift; exec setpriv --reuid 64123 --regid 64123 --clear-groups --inh-caps=-all \
                  --bounding-set=-all /proc/self/fd/9 $@";
    let program = Owner::program(Build::Plain)?;
    let start = || {
        Owner::start_through(
            lab.app_host(),
            &["sh", "-c", script, "sh"],
            &program,
            "idle",
            1,
        )
    };
    let (mut owner, mut sealed) = (start()?, start()?);
    let fds = owner.leak(2)?;
    assert_eq!(sealed.order("seal")?, "0");
    let of = |pid: u32, name: &str| -> Result<String> {
        Ok(std::fs::read_to_string(format!("/proc/{pid}/{name}"))?)
    };
    let size = |pid| -> Result<Option<String>> {
        let status = of(pid, "status")?;
        Ok(status
            .lines()
            .find(|line| line.starts_with("FDSize"))
            .map(str::to_owned))
    };
    // Only its number of descriptors shows that it does not share the table.
    assert_eq!(size(owner.pid())?, size(sealed.pid())?);
    assert_eq!(of(owner.pid(), "cmdline")?, of(sealed.pid(), "cmdline")?);
    let pid = owner.pid();
    let reclaim = |more: &str| {
        let line = format!("reclaim --pid {pid} --reclaim-age 0s --stop-limit 5s {more}");
        let command = lab.app_host().command(CWKILL).uid(ALONE);
        ran(command.args(line.split_whitespace()))
    };
    let ran = reclaim("--json")?.exits(0);
    assert_eq!(number(&ran.json(), "/summary/freed"), 2);
    let open = owner.descriptors()?;
    assert!(!fds.iter().any(|fd| open.contains(fd)), "{open:?}");
    owner.report()?;

    // With the same number it might share the table, and cwkill reports the missing capability.
    owner.leak(1)?;
    sealed.leak(1)?;
    let ran = reclaim("")?.exits(4);
    assert!(
        ran.stdout.contains("shares its descriptor table"),
        "{ran:?}"
    );
    ran.complains("CAP_SYS_PTRACE");
    owner.report()?;
    Ok(())
}

/// Runs as a user of its own with limits from too few threads to enough: everything is done, or nothing, which is reported.
fn without_threads_everything_or_nothing_is_done() -> Result<()> {
    const ALONE: u32 = 64124;
    let rights = [Capability::CAP_SYS_PTRACE, Capability::CAP_DAC_READ_SEARCH];
    let lab = Lab::new()?;
    let mut owner = Owner::start(lab.app_host(), Build::Plain, "idle", 1)?;
    let (mut done, mut refused) = (0, 0);
    for limit in 1..=8 {
        let fds = owner.leak(2)?;
        let line = format!(
            "--nproc={limit} {CWKILL} reclaim --pid {} --reclaim-age 0s --stop-limit 5s --json",
            owner.pid()
        );
        let command = lab
            .app_host()
            .command("prlimit")
            .uid(ALONE)
            .capabilities(&rights);
        let ran = ran(command.args(line.split_whitespace()))?;
        let open = fds_of(owner.pid())?;
        let left = fds.iter().filter(|fd| open.contains(fd)).count();
        assert!(!ran.stderr.contains("panicked"), "{limit}: {ran:?}");
        match left {
            0 => {
                ran.exits(0);
                done += 1;
            }
            _ => {
                assert_eq!(left, 2);
                let ran = ran.exits(4);
                assert!(ran.stdout.contains("starting a thread"), "{limit}: {ran:?}");
                refused += 1;
                cwkill(
                    &lab,
                    &format!(
                        "reclaim --pid {} --reclaim-age 0s --stop-limit 5s -q",
                        owner.pid()
                    ),
                )?
                .exits(0);
            }
        }
        owner
            .report()
            .with_context(|| format!("at most {limit} tasks"))?;
    }
    assert!(done > 0 && refused > 0, "{done} done, {refused} refused");
    Ok(())
}
