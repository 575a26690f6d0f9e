//! Each command needs certain capabilities, and holds no others while it runs.

use std::collections::BTreeMap;
use std::process::{Child, Stdio};

use anyhow::{Context, Result};
use netns_harness::{AgentOptions, Capability, Family, Lab, TcpState};

use crate::support::{CWKILL, PATIENCE, Ran, at, count, in_state, lab, leaker, ran};
use crate::trial::{Need, Test, once};

use Capability::{
    CAP_DAC_READ_SEARCH as SEARCH, CAP_NET_ADMIN as ADMIN, CAP_NET_BIND_SERVICE as BIND,
    CAP_NET_RAW as RAW, CAP_SETPCAP as SETPCAP, CAP_SYS_ADMIN as SYS_ADMIN,
    CAP_SYS_PTRACE as PTRACE,
};

pub const TESTS: &[Test] = &[
    once!(each_method_runs_with_its_capabilities_and_not_with_fewer),
    once!(another_namespace_needs_cap_sys_admin),
    once!(a_run_holds_only_the_capabilities_it_needs),
    once!(a_listing_holds_only_the_capabilities_it_needs),
    once!(commands_hold_only_the_capabilities_they_need),
    once!(reclaim_runs_with_its_capabilities_and_not_with_fewer),
    once!(an_owner_with_the_same_capabilities_can_be_reached),
    once!(a_capability_that_does_not_help_is_not_said_to_be_missing),
    once!(capabilities_that_cannot_be_dropped_are_reported),
    once!(descriptors_of_another_user_need_both_capabilities).needs(Need::RootOfTheMachine),
    once!(the_log_is_opened_with_the_rights_of_the_caller).needs(Need::RootOfTheMachine),
    once!(no_path_is_followed_with_file_capabilities).needs(Need::RootOfTheMachine),
    once!(nothing_but_a_namespace_is_opened).needs(Need::RootOfTheMachine),
];

/// A user without any privilege.
const NOBODY: u32 = 65534;

/// Runs cwkill with these capabilities and no others.
fn with(lab: &Lab, uid: Option<u32>, capabilities: &[Capability], arguments: &str) -> Result<Ran> {
    let command = lab.app_host().command(CWKILL).capabilities(capabilities);
    let command = match uid {
        Some(uid) => command.uid(uid),
        None => command,
    };
    ran(command.args(arguments.split_whitespace()))
}

/// A method, a scenario for it, and the capabilities that it needs.
const JOBS: &[(&str, &str, &[Capability])] = &[
    ("shutdown", "unread", &[PTRACE]),
    ("destroy", "not-accepted", &[ADMIN]),
    ("rst", "not-accepted", &[RAW]),
    ("probe", "peer-vanished", &[PTRACE]),
];

fn each_method_runs_with_its_capabilities_and_not_with_fewer() -> Result<()> {
    for (method, scenario, set) in JOBS {
        let (lab, _leak) = lab(scenario, Family::V4, 1)?;
        let arguments = format!("--all --json --method {method}");
        for missing in *set {
            let less: Vec<_> = set.iter().copied().filter(|c| c != missing).collect();
            with(&lab, None, &less, &arguments)?
                .exits(4)
                .complains(&missing.to_string());
            assert!(in_state(&lab, TcpState::CloseWait)? == 1);
        }
        let sockets = with(&lab, None, set, &arguments)?.exits(0).sockets();
        assert_eq!(at(&sockets[0], "/result/method"), *method);
        assert!(in_state(&lab, TcpState::CloseWait)? == 0);
    }
    // A dry run shows the plan for all capabilities of the caller, although it drops them itself.
    let (lab, _leak) = lab("unread", Family::V4, 1)?;
    let all = [PTRACE, SEARCH, ADMIN, RAW];
    let sockets = with(&lab, None, &all, "-n --all --json")?.sockets();
    assert!(at(&sockets[0], "/plan") == r#"["shutdown","destroy","rst"]"#);
    Ok(())
}

fn descriptors_of_another_user_need_both_capabilities() -> Result<()> {
    let (lab, leak) = lab("unread", Family::V4, 1)?;
    let pid = leak.app().pid().to_string();
    let both = [PTRACE, SEARCH];
    let owner = |set: &[Capability], arguments: &str| -> Result<String> {
        let sockets = with(&lab, Some(NOBODY), set, arguments)?.sockets();
        Ok(at(&sockets[0], "/owners/0/pid"))
    };
    for less in [&[][..], &[PTRACE], &[SEARCH]] {
        assert!(owner(less, "--json")? == "(nothing there)", "{less:?}");
        with(&lab, Some(NOBODY), less, "--all --method shutdown")?.exits(4);
    }
    assert!(owner(&both, "--json")? == pid);
    let named = |set: &[Capability]| -> Result<bool> {
        let ran = with(&lab, Some(NOBODY), set, "diagnose --sample 10ms --json")?;
        Ok(ran.stdout.contains(&format!("\"pid\":{pid}")))
    };
    for less in [&[][..], &[PTRACE], &[SEARCH]] {
        assert!(!named(less)?, "{less:?}");
    }
    assert!(named(&both)?);
    // Without the owner the result is unknown.
    let check = format!("check --pid {pid} -w 0 -c 5");
    for less in [&[][..], &[PTRACE], &[SEARCH]] {
        with(&lab, Some(NOBODY), less, &check)?.exits(3);
    }
    with(&lab, Some(NOBODY), &both, &check)?.exits(1);
    // --no-owners needs no access to processes of another user.
    let destroy = "--all --no-owners --method destroy --max-kills 1";
    with(&lab, Some(NOBODY), &both, destroy)?.exits(4);
    with(&lab, Some(NOBODY), &[ADMIN], destroy)?.exits(0);
    assert!(in_state(&lab, TcpState::CloseWait)? == 0);
    lab.start("unread", Family::V4, count(1))?;
    with(&lab, Some(NOBODY), &both, "--all --method shutdown")?.exits(0);
    Ok(())
}

/// With file capabilities, cwkill has more rights than its caller. The caller must not gain them through the log.
fn the_log_is_opened_with_the_rights_of_the_caller() -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let (lab, _leak) = lab("unread", Family::V4, 1)?;
    let dir = tempfile::tempdir()?;
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755))?;
    let secret = dir.path().join("secret");
    std::fs::create_dir(&secret)?;
    let file = secret.join("log");
    std::fs::write(&file, "")?;
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o666))?;
    std::fs::set_permissions(&secret, std::fs::Permissions::from_mode(0o700))?;
    let arguments = format!("--all --method destroy --log-file {}", file.display());
    let ran = with(&lab, Some(NOBODY), &[PTRACE, SEARCH, ADMIN], &arguments)?.exits(3);
    ran.complains("nothing was done")
        .complains("Permission denied");
    assert!(in_state(&lab, TcpState::CloseWait)? == 1);
    // The capabilities are back for the work itself.
    let own = dir.path().join("own");
    std::fs::create_dir(&own)?;
    std::os::unix::fs::chown(&own, Some(NOBODY), None)?;
    let log = own.join("log");
    let arguments = format!("--all --method shutdown --log-file {}", log.display());
    with(&lab, Some(NOBODY), &[PTRACE, SEARCH], &arguments)?.exits(0);
    assert_eq!(std::fs::read_to_string(&log)?.lines().count(), 4);
    Ok(())
}

/// A copy of cwkill with the file capabilities that the manual page recommends, in a directory that everybody can search.
struct Granted {
    dir: tempfile::TempDir,
}

impl Granted {
    fn new() -> Result<Self> {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir()?;
        let granted = Granted { dir };
        let everybody = || std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(granted.dir.path(), everybody())?;
        std::fs::copy(CWKILL, granted.program())?;
        std::fs::set_permissions(granted.program(), everybody())?;
        // What setcap(8) writes (include/uapi/linux/capability.h, struct vfs_cap_data): permitted and effective.
        const REVISION_2_EFFECTIVE: u32 = 0x0200_0001;
        let capabilities = [ADMIN, RAW, PTRACE, SEARCH];
        let permitted = capabilities.map(|capability| 1 << capability.index());
        let permitted = permitted.into_iter().fold(0_u32, |all, one| all | one);
        let data = [REVISION_2_EFFECTIVE, permitted, 0, 0, 0];
        let data: Vec<u8> = data.into_iter().flat_map(u32::to_le_bytes).collect();
        let flags = rustix::fs::XattrFlags::empty();
        rustix::fs::setxattr(granted.program(), "security.capability", &data, flags)
            .context("set the capabilities of a file")?;
        Ok(granted)
    }

    fn program(&self) -> std::path::PathBuf {
        self.dir.path().join("cwkill")
    }

    /// Runs it as a user without any right.
    fn run(&self, lab: &Lab, arguments: &str) -> Result<Ran> {
        let command = lab.app_host().command(self.program()).uid(NOBODY);
        ran(command.args(arguments.split_whitespace()))
    }

    /// A directory that only root may search, with a file and a FIFO in it.
    fn secret(&self) -> Result<std::path::PathBuf> {
        use std::os::unix::fs::PermissionsExt;
        let secret = self.dir.path().join("secret");
        std::fs::create_dir(&secret)?;
        std::fs::write(secret.join("here"), "")?;
        nix::unistd::mkfifo(&secret.join("fifo"), nix::sys::stat::Mode::S_IRWXU)?;
        std::fs::set_permissions(&secret, std::fs::Permissions::from_mode(0o700))?;
        Ok(secret)
    }
}

/// With file capabilities, cwkill may search every directory. It must not tell its caller what is in them.
fn no_path_is_followed_with_file_capabilities() -> Result<()> {
    let (lab, leak) = lab("unread", Family::V4, 1)?;
    let granted = Granted::new()?;
    // The capabilities are effective: the caller sees the owner of another user.
    let sockets = granted.run(&lab, "--json")?.exits(0).sockets();
    let pid = leak.app().pid().to_string();
    assert_eq!(at(&sockets[0], "/owners/0/pid"), pid);
    let secret = granted.secret()?;
    let below = |name: &str| secret.join(name).display().to_string();
    for option in [
        "-N",
        "diagnose -N",
        "check -w 1 -c 2 -N",
        "--all --log-file",
        "--host-root",
        "check -w 1 -c 2 --host-root",
        "reclaim --host-root",
    ] {
        let said = |name: &str| -> Result<String> {
            let ran = granted.run(&lab, &format!("{option} {}", below(name)))?;
            assert_eq!(ran.code, Some(3), "{ran:?}");
            let all = ran.stdout + &ran.stderr;
            assert!(all.contains("Permission denied"), "{all}");
            Ok(all.replace(name, "NAME"))
        };
        let there = said("here")?;
        assert_eq!(there, said("fifo")?, "{option}");
        assert_eq!(there, said("none")?, "{option}");
    }
    // Without a slash it is a name or a pid, and nothing is a path.
    for name in [".", "..", "no-such-name"] {
        granted
            .run(&lab, &format!("-N {name}"))?
            .exits(3)
            .complains("/run/netns has no such name");
    }
    // A process is not a path either, and its namespace is found as before.
    for name in [pid.clone(), format!("/proc/{pid}/ns/net")] {
        let sockets = granted
            .run(&lab, &format!("--json -N {name}"))?
            .exits(0)
            .sockets();
        assert_eq!(sockets.len(), 1, "{name}");
    }
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 1);
    Ok(())
}

/// To open a FIFO lets its writer go on, and to open a device can do anything.
fn nothing_but_a_namespace_is_opened() -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let lab = Lab::new()?;
    let granted = Granted::new()?;
    let fifo = granted.dir.path().join("fifo");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU)?;
    std::fs::set_permissions(&fifo, std::fs::Permissions::from_mode(0o666))?;
    let mut writer = std::process::Command::new("sh")
        .args(["-c", "exec 3> $0", &fifo.display().to_string()])
        .spawn()?;
    let waits = || -> Result<bool> {
        let wchan = std::fs::read_to_string(format!("/proc/{}/wchan", writer.id()))?;
        Ok(wchan.contains("fifo") || wchan.contains("partner"))
    };
    let waited = lab.wait_for(PATIENCE, waits);
    let mut said = Vec::new();
    for path in [
        &*fifo.display().to_string(),
        "/dev/null",
        "/dev/tty",
        "/proc/self/ns/mnt",
    ] {
        for command in ["", "diagnose", "check -w 1 -c 2", "--all -n"] {
            let line = format!("{command} -N {path}");
            said.push((
                line.clone(),
                granted.run(&lab, &line)?,
                cwkill_as_root(&lab, &line)?,
            ));
        }
    }
    // Nobody has read from it, so its writer still waits.
    let still = writer.try_wait()?.is_none();
    writer.kill()?;
    writer.wait()?;
    waited?;
    assert!(still, "the FIFO was opened");
    for (line, by_nobody, by_root) in said {
        for ran in [by_nobody, by_root] {
            assert_eq!(ran.code, Some(3), "{line}: {ran:?}");
            let all = format!("{}{}", ran.stdout, ran.stderr);
            assert!(
                all.contains("it is not a network namespace"),
                "{line}: {all}"
            );
        }
    }
    Ok(())
}

fn cwkill_as_root(lab: &Lab, arguments: &str) -> Result<Ran> {
    ran(lab
        .app_host()
        .command(CWKILL)
        .args(arguments.split_whitespace()))
}

fn another_namespace_needs_cap_sys_admin() -> Result<()> {
    let (lab, leak) = lab("unread", Family::V4, 2)?;
    let elsewhere = Lab::new()?;
    for place in [
        "-N".to_owned() + &leak.app().pid().to_string(),
        format!("-N/proc/{}/ns/net", leak.app().pid()),
        "--all-netns".into(),
    ] {
        let arguments = format!("{place} --json --port 8080 -n");
        with(&elsewhere, None, &[PTRACE, SEARCH], &arguments)?.complains("CAP_SYS_ADMIN");
        let sockets = with(&elsewhere, None, &[PTRACE, SEARCH, SYS_ADMIN], &arguments)?
            .exits(0)
            .sockets();
        assert!(!sockets.is_empty());
    }
    drop(lab);
    Ok(())
}

/// The privileges of a thread, from its /proc status.
fn status(text: &str) -> BTreeMap<String, u64> {
    let field = |line: &str| {
        let (name, value) = line.split_once(':')?;
        let radix = if name == "NoNewPrivs" { 10 } else { 16 };
        let wanted = name.starts_with("Cap") || name == "NoNewPrivs";
        let value = wanted.then(|| u64::from_str_radix(value.trim(), radix).ok())??;
        Some((name.to_owned(), value))
    };
    text.lines().filter_map(field).collect()
}

/// The privileges of each thread of `child`.
fn held_by(child: &Child) -> Result<Vec<BTreeMap<String, u64>>> {
    let threads = std::fs::read_dir(format!("/proc/{}/task", child.id()))?;
    threads
        .map(|thread| {
            let text = std::fs::read_to_string(thread?.path().join("status"))?;
            Ok(status(&text))
        })
        .collect()
}

/// Asserts that every thread of `command` held exactly `set`.
#[track_caller]
fn held_exactly(command: &str, held: &[BTreeMap<String, u64>], set: &[Capability]) {
    let mask: u64 = set.iter().map(|capability| capability.bitmask()).sum();
    let wanted = [
        ("CapAmb", 0),
        ("CapBnd", 0),
        ("CapEff", mask),
        ("CapInh", 0),
        ("CapPrm", mask),
        ("NoNewPrivs", 1),
    ];
    let wanted = BTreeMap::from(wanted.map(|(name, value)| (name.to_owned(), value)));
    assert!(!held.is_empty(), "{command}");
    for thread in held {
        assert!(*thread == wanted, "{command}: {thread:x?}, not {wanted:x?}");
    }
}

/// These runs wait in their grace for a peer that does not answer.
fn a_run_holds_only_the_capabilities_it_needs() -> Result<()> {
    for (method, set) in [
        ("shutdown", &[PTRACE, SEARCH][..]),
        ("shutdown,destroy", &[PTRACE, SEARCH, ADMIN]),
        ("shutdown,probe", &[PTRACE, SEARCH, RAW]),
        ("auto", &[PTRACE, SEARCH, ADMIN, RAW]),
    ] {
        let (lab, _leak) = lab("silent-peer", Family::V4, 1)?;
        let mut child = lab
            .app_host()
            .command(CWKILL)
            // In all five sets, and more than any method needs.
            .capabilities(&[PTRACE, SEARCH, ADMIN, RAW, SYS_ADMIN, BIND, SETPCAP])
            .args(["--all", "--grace", "60s", "--method", method])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        lab.wait_for(PATIENCE, || Ok(in_state(&lab, TcpState::LastAck)? == 1))?;
        let held = held_by(&child);
        child.kill()?;
        child.wait()?;
        held_exactly(method, &held?, set);
    }
    Ok(())
}

/// The listing waits for a reader.
fn a_listing_holds_only_the_capabilities_it_needs() -> Result<()> {
    let lab = Lab::new()?;
    let leak = lab.start("unread", Family::V4, count(400))?;
    let pid = leak.app().pid().to_string();
    for (place, set) in [
        (&["--json"][..], &[PTRACE, SEARCH][..]),
        (&["--json", "--all", "-n"], &[PTRACE, SEARCH]),
        (&["--json", "-N", &pid], &[PTRACE, SEARCH, SYS_ADMIN]),
    ] {
        let (mut reader, writer) = std::io::pipe()?;
        let mut child = lab
            .app_host()
            .command(CWKILL)
            .args(place)
            .stdout(writer)
            .stderr(Stdio::null())
            .spawn()?;
        // Once it has begun to write, it cannot end: its document does not fit into a pipe.
        std::io::Read::read_exact(&mut reader, &mut [0])?;
        let held = held_by(&child);
        drop(reader);
        child.wait()?;
        held_exactly(&place.join(" "), &held?, set);
    }
    Ok(())
}

/// The commands wait for a reader, because the pipe is full before they begin.
fn commands_hold_only_the_capabilities_they_need() -> Result<()> {
    let lab = Lab::new()?;
    lab.start("unread", Family::V4, count(2))?;
    for (line, set) in [
        ("diagnose --sample 10ms", &[PTRACE, SEARCH][..]),
        (
            "diagnose --sample 10ms --all-netns",
            &[PTRACE, SEARCH, SYS_ADMIN, ADMIN],
        ),
        (
            "diagnose --sample 10ms --process no-such-process",
            &[PTRACE, SEARCH, SYS_ADMIN, ADMIN],
        ),
        ("check -w 0 -c 9", &[PTRACE, SEARCH]),
        ("doctor", &[PTRACE, SEARCH, ADMIN, RAW, SYS_ADMIN]),
        ("reclaim", &[PTRACE, SEARCH]),
        (
            "reclaim --process no-such-process --dry-run --json",
            &[PTRACE, SEARCH],
        ),
        (
            "reclaim --process no-such-process --json",
            &[PTRACE, SEARCH, SYS_ADMIN],
        ),
        ("--no-owners", &[]),
        ("--no-owners --all --method destroy --max-kills 1", &[ADMIN]),
        (
            "--all --method destroy --watch-refill 10ms",
            &[PTRACE, SEARCH, ADMIN],
        ),
    ] {
        let (mut reader, mut writer) = std::io::pipe()?;
        // The capacity of a pipe, pipe(7).
        std::io::Write::write_all(&mut writer, &[b'\n'; 65_536])?;
        let mut child = lab
            .app_host()
            .command(CWKILL)
            .capabilities(&[PTRACE, SEARCH, ADMIN, RAW, SYS_ADMIN, BIND, SETPCAP])
            .args(line.split(' '))
            .stdout(writer)
            .stderr(Stdio::null())
            .spawn()?;
        let waits = lab.wait_for(PATIENCE, || {
            let wchan = std::fs::read_to_string(format!("/proc/{}/wchan", child.id()))?;
            Ok(wchan.contains("pipe_write") || wchan.contains("pipe_wait"))
        });
        let held = held_by(&child);
        let read = std::io::Read::read_to_end(&mut reader, &mut Vec::new());
        child.wait()?;
        waits.with_context(|| line.to_owned())?;
        read?;
        held_exactly(line, &held?, set);
    }
    Ok(())
}

fn reclaim_runs_with_its_capabilities_and_not_with_fewer() -> Result<()> {
    let (lab, leak) = lab("unread", Family::V4, 1)?;
    let pid = leak.app().pid();
    with(&lab, None, &[ADMIN], "--all --method destroy")?.exits(0);
    let line = format!("reclaim --pid {pid} --reclaim-age 0s --reclaim-force --stop-limit 5s");
    with(&lab, None, &[], &line)?
        .exits(4)
        .complains("CAP_SYS_PTRACE");
    with(&lab, None, &[SYS_ADMIN], &line)?.exits(4);
    with(&lab, None, &[PTRACE], &line)?.exits(0);
    Ok(())
}

/// As in a container: root with few capabilities and without CAP_SYS_PTRACE.
fn an_owner_with_the_same_capabilities_can_be_reached() -> Result<()> {
    let lab = Lab::new()?;
    let (_app, _peer) = leaker(
        &lab,
        &AgentOptions {
            comm: "neighbour".into(),
            uid: None,
            capabilities: Some(vec![BIND]),
        },
    )?;
    with(&lab, None, &[], "--all --method shutdown")?.exits(4);
    with(&lab, None, &[BIND], "--all --method shutdown")?.exits(0);
    Ok(())
}

/// As root of a user namespace cwkill has all capabilities, and they do not count for what is outside: the kernel answers as if a
/// security module refused.
fn a_capability_that_does_not_help_is_not_said_to_be_missing() -> Result<()> {
    let (lab, _leak) = lab("silent-peer", Family::V4, 1)?;
    let inside = |line: &str| {
        let command = lab.app_host().command("unshare");
        let command = command.args(["--user", "--map-root-user", CWKILL]);
        ran(command.args(line.split_whitespace()))
    };
    let misleads = |ran: &Ran| {
        let advice = ["needs CAP_", "need CAP_", "sudo", "may lack"];
        let mut advice = advice.iter();
        advice.any(|words| ran.stderr.contains(words) || ran.stdout.contains(words))
    };
    let said = "although cwkill has CAP_SYS_PTRACE";
    for line in ["--all-netns -n", "--all-netns"] {
        let ran = inside(line)?.complains(said).complains("doctor");
        assert!(!misleads(&ran), "{ran:?}");
        // The answer of the kernel.
        assert!(ran.stderr.contains("Permission denied"), "{ran:?}");
    }
    for line in ["diagnose", "reclaim"] {
        let ran = inside(line)?.complains("cwkill has CAP_SYS_PTRACE, and the kernel refused");
        assert!(!misleads(&ran), "{ran:?}");
    }
    let ran = inside("--all --method destroy --allow-spin --json")?.exits(4);
    assert!(!misleads(&ran), "{ran:?}");
    for socket in ran.sockets() {
        let code = at(&socket, "/result/reason_code");
        assert_eq!(code, "refused-despite-privilege", "{socket}");
    }
    ran.complains("CAP_NET_ADMIN");
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 1);
    Ok(())
}

/// A seccomp filter may forbid to drop capabilities.
fn capabilities_that_cannot_be_dropped_are_reported() -> Result<()> {
    let (lab, _leak) = lab("silent-peer", Family::V4, 1)?;
    let command = crate::doctor::without(&lab, "PR_CAPBSET_DROP")?;
    let ran = ran(command.args(["--all", "--method", "destroy"]))?.exits(0);
    ran.complains("more privileges are held than needed: cannot clear the bounding set");
    assert!(in_state(&lab, TcpState::CloseWait)? == 0);
    Ok(())
}
