//! Sockets in other network namespaces.

use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::{Context, Result};
use netns_harness::{Family, Lab, Leak, TcpState};
use nix::sys::resource::{Resource, getrlimit};
use serde_json::Value;

use crate::support::{
    CWKILL, Ran, TAKE_ALL, all_have, alone, at, carries_data, count, cwkill, cwkill_outside,
    in_state, lab,
};
use crate::trial::{Need, Test, each_family, once};

pub const TESTS: &[Test] = &[
    each_family!(two_namespaces_are_cleared_from_outside_and_no_other),
    once!(a_namespace_is_named_by_path_or_process),
    once!(naming_a_namespace_does_not_act),
    once!(an_interface_of_another_namespace_is_not_an_error),
    once!(a_namespace_that_cannot_be_opened_is_named),
    once!(namespaces_that_cannot_be_entered_are_counted),
    once!(a_name_without_a_namespace_hides_nothing).needs(Need::RootOfTheMachine),
    once!(a_namespace_that_is_only_mounted_is_found).needs(Need::RootOfTheMachine),
    once!(a_namespace_that_disappears_is_not_an_error),
    once!(a_process_that_moves_to_another_still_owns_its_sockets),
    each_family!(a_namespace_that_only_sockets_keep_is_found),
    each_family!(a_listener_leads_to_a_nameless_namespace),
    once!(sockets_are_followed_into_other_namespaces_unless_one_is_named),
    once!(a_namespace_that_may_not_be_asked_for_is_reported),
    once!(sockets_beyond_the_bound_are_counted).slow(),
    once!(a_listener_in_a_namespace_that_was_read_is_not_missed),
];

/// Runs cwkill in our own namespace, in which no socket is stuck.
fn outside(arguments: &[&str]) -> Result<Ran> {
    let output = cwkill_outside().args(TAKE_ALL).args(arguments).output()?;
    Ran::of(&arguments.join(" "), output)
}

/// Runs a command of cwkill in our own namespace.
fn command_outside(arguments: &[&str]) -> Result<Ran> {
    let output = cwkill_outside().args(arguments).output()?;
    Ran::of(&arguments.join(" "), output)
}

/// The sockets in the namespace of `lab`. Other tests have namespaces too.
fn of(lab: &Lab, all: &[Value]) -> Result<Vec<Value>> {
    let inode = lab.app_host().netns_inode()?;
    let here = |socket: &&Value| socket["netns"]["inode"].as_u64() == Some(inode);
    Ok(all.iter().filter(here).cloned().collect())
}

fn two_namespaces_are_cleared_from_outside_and_no_other(family: Family) -> Result<()> {
    let port = match family {
        Family::V4 => 18_401,
        Family::V6 => 18_402,
        Family::Mapped => 18_403,
    };
    let on = |port, count| netns_harness::Options {
        port,
        ..crate::support::count(count)
    };
    let (first, second, other) = (Lab::new()?, Lab::new()?, Lab::new()?);
    let _one = first.start("unread", family, on(port, 3))?;
    let bystanders = first.start("established", family, on(port, 2))?;
    let _two = second.start("drained", family, on(port, 4))?;
    let _elsewhere = other.start("drained", family, on(port + 10, 2))?;

    for (method, owners) in [("shutdown", true), ("rst", true), ("destroy", false)] {
        let port = port.to_string();
        let mut arguments = vec!["--all-netns", "--port", &port, "--method", method, "--json"];
        if !owners {
            arguments.push("--no-owners");
        }
        // Namespaces of other tests may come and go; the sockets in ours are all closed.
        let all = outside(&arguments)?.exits(0).sockets();
        let (in_first, in_second) = (of(&first, &all)?, of(&second, &all)?);
        assert_eq!((in_first.len(), in_second.len()), (3, 4));
        assert_eq!(all.len(), 7);
        all_have(&all, "closed", method);
        assert_eq!(in_state(&first, TcpState::CloseWait)?, 0);
        assert_eq!(in_state(&second, TcpState::CloseWait)?, 0);
        assert_eq!(in_state(&other, TcpState::CloseWait)?, 2);
        carries_data(&bystanders)?;
        if method != "destroy" {
            first.start("unread", family, on(port_number(&port)?, 3))?;
            second.start("drained", family, on(port_number(&port)?, 4))?;
        }
    }
    Ok(())
}

fn port_number(text: &str) -> Result<u16> {
    Ok(text.parse()?)
}

/// Fewest runs of cwkill while the world changes.
const RUNS: usize = 25;

/// Sets it when dropped, also by a panic, so that the thread that waits for it ends.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Runs `scan` at least [`RUNS`] times while another thread makes one `change` after the other, and until there were more
/// changes than that.
fn while_the_world_changes(
    change: impl Fn() -> Result<()> + Sync,
    scan: impl Fn() -> Result<()>,
) -> Result<()> {
    let over = AtomicBool::new(false);
    let changes = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let changing = scope.spawn(|| -> Result<()> {
            while !over.load(Ordering::Relaxed) {
                change()?;
                changes.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        });
        {
            let _over = SetOnDrop(&over);
            let mut scans = 0;
            while scans < RUNS || changes.load(Ordering::Relaxed) <= RUNS {
                scan()?;
                scans += 1;
                if changing.is_finished() {
                    break;
                }
            }
        }
        changing.join().expect("no panic")
    })
}

/// Namespaces are made and removed while cwkill scans all of them.
fn a_namespace_that_disappears_is_not_an_error() -> Result<()> {
    let (steady, _leak) = lab("unread", Family::V4, 2)?;
    let come_and_go = || Lab::new().map(drop);
    while_the_world_changes(come_and_go, || {
        let sockets = outside(&["--all-netns", "-n", "--json"])?
            .exits(0)
            .sockets();
        assert_eq!(of(&steady, &sockets)?.len(), 2);
        Ok(())
    })
}

/// The owner goes from one namespace to another and back while cwkill scans them. The sockets stay where they are.
fn a_process_that_moves_to_another_still_owns_its_sockets() -> Result<()> {
    let (lab, leak) = lab("drained", Family::V4, 3)?;
    // A process that stays: a namespace without processes cannot be found.
    let _resident = lab.app_host().agent("resident")?;
    let elsewhere = Lab::new()?;
    let owner = leak.app().pid().to_string();
    let go_and_return = || {
        leak.app().enter(elsewhere.app_host())?;
        leak.app().enter(lab.app_host())
    };
    while_the_world_changes(go_and_return, || {
        let sockets = outside(&["--all-netns", "-p", &owner, "-n", "--json"])?
            .exits(0)
            .sockets();
        assert_eq!(of(&lab, &sockets)?.len(), 3);
        Ok(())
    })?;

    leak.app().enter(elsewhere.app_host())?;
    // The pid names the namespace in which the process is now.
    outside(&["-N", &owner, "-n", "--json"])?.exits(1);
    let ran = outside(&["--all-netns", "-p", &owner, "--json"])?.exits(0);
    all_have(&ran.sockets(), "closed", "shutdown");
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 0);
    Ok(())
}

fn a_namespace_is_named_by_path_or_process() -> Result<()> {
    let (lab, leak) = lab("unread", Family::V4, 2)?;
    let path = lab.app_host().netns_path();
    let pid = leak.app().pid().to_string();
    for place in [path.to_str().context("a path")?, &pid] {
        let ran = outside(&["-N", place, "--all", "-n", "--json"])?;
        let found = ran.exits(0).sockets();
        assert_eq!(of(&lab, &found)?.len(), 2);
        assert_eq!(found.len(), 2);
        assert_eq!(at(&found[0], "/owners/0/pid"), pid);
    }
    let ran = outside(&["-N", &pid, "--port", "8080", "--json"])?.exits(0);
    all_have(&ran.sockets(), "closed", "shutdown");
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 0);
    Ok(())
}

fn naming_a_namespace_does_not_act() -> Result<()> {
    let (lab, leak) = lab("unread", Family::V4, 2)?;
    let pid = leak.app().pid().to_string();
    for arguments in [&["-N", pid.as_str()][..], &["--all-netns"]] {
        outside(arguments)?;
        assert_eq!(in_state(&lab, TcpState::CloseWait)?, 2);
    }
    // With several namespaces, the table has a column for them.
    let table = outside(&["--all-netns"])?.stdout;
    assert!(table.starts_with("NETNS"), "{table}");
    let inode = lab.app_host().netns_inode()?.to_string();
    let ours = table.lines().filter(|line| line.starts_with(&inode));
    assert_eq!(ours.count(), 2, "{table}");
    Ok(())
}

fn a_namespace_that_cannot_be_opened_is_named() -> Result<()> {
    for place in [
        "no-such-namespace",
        "/nonexistent",
        "999999999",
        "/etc/passwd",
    ] {
        outside(&["-N", place, "--all"])?.exits(3).complains(place);
    }
    outside(&["-N", "blue", "--all-netns"])?
        .exits(2)
        .complains("--all-netns");
    Ok(())
}

fn namespaces_that_cannot_be_entered_are_counted() -> Result<()> {
    let (lab, _leak) = lab("unread", Family::V4, 2)?;
    let other = Lab::new()?;
    let _other = other.start("unread", Family::V4, count(1))?;
    // Without the right to enter others, cwkill still lists its own namespace.
    let command = lab.app_host().command(CWKILL).capabilities(&[]);
    let ran = crate::support::ran(command.args(["--all-netns", "--json"]))?.exits(0);
    assert_eq!(ran.sockets().len(), 2);
    let document = ran.json();
    let count = |field: &str| document[field].as_u64().unwrap_or(0);
    assert!(
        count("unreachable_namespaces") + count("processes_in_unknown_namespace") > 0,
        "{ran:?}"
    );
    assert!(ran.stderr.contains("needs CAP_SYS_"), "{ran:?}");
    // No match is not the same as no stuck socket.
    let command = lab.app_host().command(CWKILL).capabilities(&[]);
    let line = ["--all-netns", "--port", "1", "-n"];
    crate::support::ran(command.args(line))?.exits(4);
    cwkill(&lab, "--all -n")?.exits(0);
    Ok(())
}

/// A name stays as a plain file if its namespace was unmounted by something else than ip-netns(8).
fn a_name_without_a_namespace_hides_nothing() -> Result<()> {
    let (lab, _leak) = lab("unread", Family::V4, 2)?;
    // In a mount namespace of its own, so that no other test sees the names.
    let script = "mount -t tmpfs none /run && mkdir -p /run/netns/dir && touch /run/netns/stale && \
                  ln -s loop /run/netns/loop && exec $@";
    let run = |line: &str| -> Result<Ran> {
        let command = lab.app_host().command("unshare");
        let command = command.args(["--mount", "sh", "-c", script, "sh", CWKILL]);
        crate::support::ran(command.args(line.split_whitespace()))
    };
    let ran = run("--all-netns --json")?.exits(0);
    assert_eq!(of(&lab, &ran.sockets())?.len(), 2);
    assert_eq!(ran.json()["unreachable_namespaces"], 0, "{ran:?}");
    let ran = ran.complains("no network namespace has the name dir and 2 others");
    assert!(!ran.stderr.contains("could not be entered"), "{ran:?}");
    run("-N stale")?.exits(3).complains("stale");
    Ok(())
}

/// A mount that is left over keeps a namespace alive: no process is in it, and it has no name.
fn a_namespace_that_is_only_mounted_is_found() -> Result<()> {
    let (lab, leak) = lab("drained", Family::V4, 3)?;
    let elsewhere = leave(&leak)?;
    // The name has what the kernel escapes in the list of mounts.
    let script = "mount -t tmpfs none /mnt && touch \"/mnt/left over\" && mount --bind $1 \"/mnt/left over\" && \
                  shift && exec \"$@\"";
    let path = lab.app_host().netns_path();
    let run = |arguments: &[&str]| -> Result<Ran> {
        let command = elsewhere.app_host().command("unshare");
        let command = command
            .args(["--mount", "sh", "-c", script, "sh"])
            .arg(&path);
        crate::support::ran(command.arg(CWKILL).args(arguments))
    };
    let line = ["--all-netns", "--no-owners", "--json"];
    assert_eq!(of(&lab, &run(&line)?.exits(0).sockets())?.len(), 3);
    let sockets = run(&["-N", "/mnt/left over", "--all", "--json"])?
        .exits(0)
        .sockets();
    assert_eq!(sockets.len(), 3);
    all_have(&sockets, "closed", "shutdown");
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 0);
    Ok(())
}

fn an_interface_of_another_namespace_is_not_an_error() -> Result<()> {
    let (lab, _leak) = lab("unread", Family::V4, 2)?;
    let name = "only-here";
    lab.app_host().within(|| {
        let add = ["link", "add", name, "type", "veth"];
        assert!(Command::new("ip").args(add).status()?.success());
        Ok(())
    })?;
    let text = &format!("dev {name} or sport = :8080");
    let ran = outside(&["--all-netns", "-n", "--json", text])?.exits(0);
    assert_eq!(of(&lab, &ran.sockets())?.len(), 2);
    // A name that no namespace has is an error: otherwise `not dev` would match everything.
    for (text, named) in [
        ("cgroup /no/such", "/no/such"),
        ("dev no-such-if", "no-such-if"),
        ("not dev no-such-if", "no-such-if"),
    ] {
        outside(&["--all-netns", "-n", text])?
            .exits(3)
            .complains(named);
    }
    Ok(())
}

/// Lets the application of `leak` leave the namespace of `lab`. Then no process is in it, and it has no name. Returns its new place.
fn leave(leak: &Leak) -> Result<Lab> {
    let elsewhere = Lab::new()?;
    leak.app().enter(elsewhere.app_host())?;
    Ok(elsewhere)
}

fn a_namespace_that_only_sockets_keep_is_found(family: Family) -> Result<()> {
    let (lab, leak) = lab("drained", family, 3)?;
    let elsewhere = leave(&leak)?;
    let pid = leak.app().pid().to_string();
    let pid = pid.as_str();
    let here = elsewhere.app_host().netns_path();
    let here = here.to_str().context("a path")?;
    for place in [
        &["--all-netns"][..],
        &["--all-netns", "-p", pid],
        &["-p", pid],
        &["-N", pid, "-p", pid],
        &["-N", here, "--process", "leaky-app"],
    ] {
        let ran = outside(&[place, &["-n", "--json"]].concat())?.exits(0);
        let sockets = of(&lab, &ran.sockets())?;
        assert_eq!(sockets.len(), 3, "{place:?}");
        assert_eq!(at(&sockets[0], "/owners/0/pid"), pid);
    }
    // The owner is not selected, or not searched for.
    for place in [&["-N", here][..], &["--all-netns", "--no-owners"]] {
        let ran = outside(&[place, &["-n", "--json"]].concat())?;
        assert_eq!(of(&lab, &ran.sockets())?.len(), 0, "{place:?}");
    }
    let checked = command_outside(&["check", "-w", "2", "-c", "9", "-p", pid])?.exits(1);
    assert!(checked.stdout.contains("3 sockets stuck"), "{checked:?}");
    let diagnosis =
        command_outside(&["diagnose", "--sample", "10ms", "-p", pid, "--json"])?.exits(0);
    assert_eq!(at(&diagnosis.json(), "/processes/0/stuck"), "3");

    let ran = outside(&["-p", pid, "--json"])?.exits(0);
    all_have(&ran.sockets(), "closed", "shutdown");
    assert_eq!(ran.sockets().len(), 3);
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 0);
    let line = ["reclaim", "-p", pid, "--reclaim-age", "0s", "--json"];
    let reclaimed = command_outside(&line)?.exits(0).json();
    assert_eq!(at(&reclaimed, "/summary/freed"), "3");
    Ok(())
}

/// Its connections have no descriptor.
fn a_listener_leads_to_a_nameless_namespace(family: Family) -> Result<()> {
    let (lab, leak) = lab("not-accepted", family, 2)?;
    let _elsewhere = leave(&leak)?;
    let pid = leak.app().pid().to_string();
    for place in [&["--all-netns"][..], &["-p", &pid]] {
        let ran = outside(&[place, &["-n", "--json"]].concat())?.exits(0);
        let sockets = of(&lab, &ran.sockets())?;
        assert_eq!(sockets.len(), 2, "{place:?}");
        assert_eq!(at(&sockets[0], "/listener/owners/0/pid"), pid);
    }
    let ran = outside(&["-p", &pid, "--json"])?.exits(0);
    all_have(&ran.sockets(), "closed", "destroy");
    assert_eq!(in_state(&lab, TcpState::CloseWait)?, 0);
    Ok(())
}

/// If the operator names a namespace, another one with a process is not in scope.
fn sockets_are_followed_into_other_namespaces_unless_one_is_named() -> Result<()> {
    let (lab, leak) = lab("drained", Family::V4, 2)?;
    let elsewhere = leave(&leak)?;
    let resident = lab.app_host().agent("resident")?;
    let pid = leak.app().pid().to_string();
    let ran = outside(&["-p", &pid, "-n", "--json"])?.exits(0);
    assert_eq!(of(&lab, &ran.sockets())?.len(), 2);
    let here = elsewhere.app_host().netns_path();
    let here = here.to_str().context("a path")?;
    outside(&["-N", here, "-p", &pid, "-n", "--json"])?.exits(1);
    drop(resident);
    outside(&["-N", here, "-p", &pid, "-n", "--json"])?.exits(0);
    Ok(())
}

fn a_namespace_that_may_not_be_asked_for_is_reported() -> Result<()> {
    use netns_harness::Capability::{CAP_DAC_READ_SEARCH, CAP_SYS_ADMIN, CAP_SYS_PTRACE};
    let (lab, leak) = lab("drained", Family::V4, 2)?;
    let elsewhere = leave(&leak)?;
    let pid = leak.app().pid().to_string();
    let without = || {
        let command = elsewhere.app_host().command(CWKILL);
        let command = command.capabilities(&[CAP_DAC_READ_SEARCH, CAP_SYS_ADMIN, CAP_SYS_PTRACE]);
        crate::support::ran(command.args(["-p", &pid, "-n", "--json"]))
    };
    let ran = without()?.exits(4).complains("needs CAP_NET_ADMIN");
    // The two sockets, and the listener.
    assert_eq!(at(&ran.json(), "/sockets_in_unknown_namespace"), "3");
    assert_eq!(of(&lab, &ran.sockets())?.len(), 0);
    Ok(())
}

/// cwkill asks for the namespace of at most this many sockets. See NOTES in cwkill(8).
const MOST_ASKED: usize = 65_536;

/// Sockets that are in no table of the kernel, and so may be in a nameless namespace.
fn sockets_beyond_the_bound_are_counted() -> Result<()> {
    const MORE: usize = 3;
    let lab = Lab::new()?;
    let (_, limit) = getrlimit(Resource::RLIMIT_NOFILE)?;
    // An agent has a few descriptors of its own.
    let each = usize::try_from(limit)?.saturating_sub(100).min(MOST_ASKED);
    let mut hoarders = Vec::new();
    let mut left = MOST_ASKED;
    while left > 0 {
        let count = left.min(each);
        hoarders.push(lab.app_host().agent("hoarder")?);
        hoarders[hoarders.len() - 1].open_sockets(count)?;
        left -= count;
    }
    let path = lab.app_host().netns_path();
    let place = path.to_str().context("a path")?;
    let owners = ["-N", place, "--process", "hoarder"];
    let run = |code: i32, not_searched: usize| -> Result<Ran> {
        let ran = outside(&[&owners[..], &["-n", "--json"]].concat())?.exits(code);
        let json = ran.json();
        assert_eq!(
            at(&json, "/descriptors_not_searched"),
            not_searched.to_string()
        );
        assert_eq!(at(&json, "/summary/matched"), "0");
        Ok(ran)
    };
    run(1, 0)?;

    let last = &hoarders[hoarders.len() - 1];
    last.open_sockets(MORE)?;
    run(4, MORE)?.complains("3 descriptors not searched for network namespaces");
    // Nothing was found, and that is not the same as that there is nothing.
    command_outside(&[&["check", "-w", "1", "-c", "2"], &owners[..]].concat())?.exits(3);
    let diagnosis = [&["diagnose", "--sample", "1ms", "--json"], &owners[..]].concat();
    let diagnosed = command_outside(&diagnosis)?.json();
    assert_eq!(
        at(&diagnosed, "/descriptors_not_searched"),
        MORE.to_string()
    );
    Ok(())
}

/// The kernel does not tell where a listener is either, but it is in a table that was read.
fn a_listener_in_a_namespace_that_was_read_is_not_missed() -> Result<()> {
    use netns_harness::Capability::{CAP_DAC_READ_SEARCH, CAP_SYS_ADMIN, CAP_SYS_PTRACE};
    let lab = Lab::new()?;
    let leak = lab.start("established", Family::V4, count(2))?;
    let _other = lab.start("drained", Family::V4, alone(8081, 1))?;
    let pid = leak.app().pid().to_string();
    for selector in [&["-p", &pid][..], &["--port", "8081,8080", "-p", &pid]] {
        let command = lab.app_host().command(CWKILL);
        let command = command.capabilities(&[CAP_DAC_READ_SEARCH, CAP_SYS_ADMIN, CAP_SYS_PTRACE]);
        let ran = crate::support::ran(command.args(selector).args(["-n", "--json"]))?;
        let document = ran.json();
        assert_eq!(at(&document, "/sockets_in_unknown_namespace"), "0");
        assert!(!ran.stderr.contains("unknown network namespace"), "{ran:?}");
    }
    Ok(())
}
