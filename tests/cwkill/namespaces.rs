//! Network namespaces other than our own.

use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use anyhow::{Context, Result, ensure};
use netns_harness::{Family, Lab, TcpState};
use serde_json::Value;

use crate::support::{CWKILL, all_have, at, carries_data, count, cwkill, in_state, lab, same};
use crate::trial::{Test, each_family, once};

pub const TESTS: &[Test] = &[
    each_family!(two_namespaces_are_cleared_from_outside_and_no_other),
    once!(a_namespace_is_named_by_path_or_process),
    once!(naming_a_namespace_does_not_act),
    once!(an_interface_of_another_namespace_is_not_an_error),
    once!(a_namespace_that_cannot_be_opened_is_named),
    once!(namespaces_that_cannot_be_entered_are_counted),
    once!(a_namespace_that_disappears_is_not_an_error),
    once!(a_process_that_moves_to_another_still_owns_its_sockets),
];

/// Runs the program in our own namespace, in which nothing is stuck.
fn outside(arguments: &[&str]) -> Result<(Option<i32>, Value, String)> {
    let output = Command::new(CWKILL).args(arguments).output()?;
    let json = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    Ok((output.status.code(), json, stderr))
}

fn sockets(json: &Value) -> Result<Vec<Value>> {
    json["sockets"].as_array().cloned().context("no sockets")
}

/// Those of `all` in the namespace of `lab`; other tests have namespaces too.
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
        let (code, json, stderr) = outside(&arguments)?;
        // Other tests' namespaces may come and go; ours are all done.
        ensure!(code == Some(0), "{code:?} {stderr}");
        let all = sockets(&json)?;
        let (in_first, in_second) = (of(&first, &all)?, of(&second, &all)?);
        same(&(in_first.len(), in_second.len()), &(3, 4))?;
        same(&all.len(), &7)?;
        all_have(&all, "closed", method)?;
        same(&in_state(&first, TcpState::CloseWait)?, &0)?;
        same(&in_state(&second, TcpState::CloseWait)?, &0)?;
        same(&in_state(&other, TcpState::CloseWait)?, &2)?;
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

/// Runs of the program while the world changes.
const RUNS: usize = 25;

/// Namespaces are made and removed while the program looks into all of them.
fn a_namespace_that_disappears_is_not_an_error() -> Result<()> {
    let (steady, _leak) = lab("unread", Family::V4, 2)?;
    let over = AtomicBool::new(false);
    let churned = AtomicUsize::new(0);
    let look = |failed: &dyn Fn() -> bool| -> Result<()> {
        while churned.load(Ordering::Relaxed) == 0 && !failed() {
            std::thread::yield_now();
        }
        for _ in 0..RUNS {
            let (code, json, stderr) = outside(&["--all-netns", "-n", "--json"])?;
            ensure!(code == Some(0), "{code:?} {stderr}");
            same(&of(&steady, &sockets(&json)?)?.len(), &2)?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let churn = scope.spawn(|| -> Result<()> {
            while !over.load(Ordering::Relaxed) {
                drop(Lab::new()?);
                churned.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        });
        let looked = look(&|| churn.is_finished());
        over.store(true, Ordering::Relaxed);
        churn.join().expect("no panic").and(looked)
    })?;
    ensure!(churned.into_inner() > 1, "nothing came and went");
    Ok(())
}

/// The owner of the sockets goes from one namespace to another and back while the program looks, and the
/// sockets stay.
fn a_process_that_moves_to_another_still_owns_its_sockets() -> Result<()> {
    let (lab, leak) = lab("drained", Family::V4, 3)?;
    // A process that stays: a namespace in which there is none cannot be found.
    let _resident = lab.app_host().agent("resident")?;
    let elsewhere = Lab::new()?;
    let owner = leak.app().pid().to_string();
    let over = AtomicBool::new(false);
    let look = || -> Result<()> {
        for _ in 0..RUNS {
            let (code, json, stderr) = outside(&["--all-netns", "-p", &owner, "-n", "--json"])?;
            ensure!(code == Some(0), "{code:?} {stderr}");
            same(&of(&lab, &sockets(&json)?)?.len(), &3)?;
        }
        Ok(())
    };
    let moves = std::thread::scope(|scope| {
        let walk = scope.spawn(|| -> Result<usize> {
            let mut moves = 0;
            while !over.load(Ordering::Relaxed) {
                leak.app().enter(elsewhere.app_host())?;
                leak.app().enter(lab.app_host())?;
                moves += 2;
            }
            Ok(moves)
        });
        let looked = look();
        over.store(true, Ordering::Relaxed);
        let moves = walk.join().expect("no panic")?;
        looked.map(|()| moves)
    })?;
    ensure!(moves > RUNS, "it moved {moves} times only");

    leak.app().enter(elsewhere.app_host())?;
    // The process names the namespace it is in now.
    let (code, _, stderr) = outside(&["-N", &owner, "-n", "--json"])?;
    ensure!(code == Some(1), "{code:?} {stderr}");
    let arguments = ["--all-netns", "-p", &owner, "--json"];
    let (code, json, stderr) = outside(&arguments)?;
    ensure!(code == Some(0), "{code:?} {stderr}");
    all_have(&sockets(&json)?, "closed", "shutdown")?;
    same(&in_state(&lab, TcpState::CloseWait)?, &0)
}

fn a_namespace_is_named_by_path_or_process() -> Result<()> {
    let (lab, leak) = lab("unread", Family::V4, 2)?;
    let path = lab.app_host().netns_path();
    let pid = leak.app().pid().to_string();
    for place in [path.to_str().context("a path")?, &pid] {
        let (code, json, stderr) = outside(&["-N", place, "--all", "-n", "--json"])?;
        ensure!(code == Some(0), "{place}: {code:?} {stderr}");
        let found = sockets(&json)?;
        same(&of(&lab, &found)?.len(), &2)?;
        same(&found.len(), &2)?;
        same(&at(&found[0], "/owners/0/pid"), &pid)?;
    }
    let (code, json, _) = outside(&["-N", &pid, "--port", "8080", "--json"])?;
    same(&code, &Some(0))?;
    all_have(&sockets(&json)?, "closed", "shutdown")?;
    same(&in_state(&lab, TcpState::CloseWait)?, &0)
}

fn naming_a_namespace_does_not_act() -> Result<()> {
    let (lab, leak) = lab("unread", Family::V4, 2)?;
    let pid = leak.app().pid().to_string();
    for arguments in [&["-N", pid.as_str()][..], &["--all-netns"]] {
        outside(arguments)?;
        same(&in_state(&lab, TcpState::CloseWait)?, &2)?;
    }
    // With more than one, the table says where.
    let output = Command::new(CWKILL).args(["--all-netns"]).output()?;
    let table = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(table.starts_with("NETNS"), "{table}");
    let inode = lab.app_host().netns_inode()?.to_string();
    ensure!(
        table
            .lines()
            .filter(|line| line.starts_with(&inode))
            .count()
            == 2,
        "{table}"
    );
    Ok(())
}

fn a_namespace_that_cannot_be_opened_is_named() -> Result<()> {
    for place in [
        "no-such-namespace",
        "/nonexistent",
        "999999999",
        "/etc/passwd",
    ] {
        let (code, _, stderr) = outside(&["-N", place, "--all"])?;
        ensure!(
            code == Some(3) && stderr.contains(place),
            "{code:?} {stderr}"
        );
    }
    let (code, _, stderr) = outside(&["-N", "blue", "--all-netns"])?;
    ensure!(
        code == Some(2) && stderr.contains("--all-netns"),
        "{code:?} {stderr}"
    );
    Ok(())
}

fn namespaces_that_cannot_be_entered_are_counted() -> Result<()> {
    let (lab, _leak) = lab("unread", Family::V4, 2)?;
    let other = Lab::new()?;
    let _other = other.start("unread", Family::V4, count(1))?;
    // Without the right to enter any other, our own is still listed.
    let command = lab.app_host().command(CWKILL).capabilities(&[]);
    let ran = crate::support::ran(command.args(["--all-netns", "--json"]))?.exits(0)?;
    same(&ran.sockets()?.len(), &2)?;
    let count = |field: &str| Ok::<_, anyhow::Error>(ran.json()?[field].as_u64().unwrap_or(0));
    ensure!(
        count("unreachable_namespaces")? + count("untold_namespaces")? > 0,
        "{ran:#?}"
    );
    ensure!(ran.stderr.contains("needs CAP_SYS_"), "{ran:#?}");
    // And nothing found is no proof that there is nothing.
    let command = lab.app_host().command(CWKILL).capabilities(&[]);
    let line = ["--all-netns", "--port", "1", "-n"];
    crate::support::ran(command.args(line))?.exits(4)?;
    cwkill(&lab, "--all -n")?.exits(0)?;
    Ok(())
}

fn an_interface_of_another_namespace_is_not_an_error() -> Result<()> {
    let (lab, _leak) = lab("unread", Family::V4, 2)?;
    let name = "only-here";
    lab.app_host().within(|| {
        let add = ["link", "add", name, "type", "veth"];
        ensure!(Command::new("ip").args(add).status()?.success());
        Ok(())
    })?;
    let text = &format!("dev {name} or sport = :8080");
    let (code, json, stderr) = outside(&["--all-netns", "-n", "--json", text])?;
    ensure!(code == Some(0), "{code:?} {stderr}");
    same(&of(&lab, &sockets(&json)?)?.len(), &2)?;
    // What means nothing in any of them is an error: without it, `not dev` would match everything.
    for (text, named) in [
        ("cgroup /no/such", "/no/such"),
        ("dev no-such-if", "no-such-if"),
        ("not dev no-such-if", "no-such-if"),
    ] {
        let (code, _, stderr) = outside(&["--all-netns", "-n", text])?;
        ensure!(
            code == Some(3) && stderr.contains(named),
            "{text}: {code:?} {stderr}"
        );
    }
    Ok(())
}
