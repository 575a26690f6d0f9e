//! `cwkill reclaim` closes dead descriptors inside their owners. The owners are real programs that check themselves for
//! damage.
//!
//! Each run names one process or is confined to a pid namespace, because other processes of the machine may have
//! dead descriptors, too.

pub mod act;
pub mod evidence;
pub mod kill;
pub mod ports;
pub mod programs;
pub mod reactions;
pub mod rights;
pub mod runtimes;
pub mod standard;
pub mod stop;

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context, Result};
use netns_harness::Lab;
use netns_harness::owners::Owner;
use serde_json::Value;

use crate::support::{PATIENCE, Ran, at, cwkill};

/// Runs `cwkill reclaim` on one owner, at any age and with a stop limit that suffices on a busy machine.
fn reclaim(lab: &Lab, pid: u32, more: &str) -> Result<Ran> {
    cwkill(
        lab,
        &format!("reclaim --pid {pid} --reclaim-age 0s --stop-limit 5s {more}"),
    )
}

#[track_caller]
fn descriptors(ran: &Ran) -> Vec<Value> {
    match &ran.json()["descriptors"] {
        Value::Array(descriptors) => descriptors.clone(),
        _ => panic!("no descriptors in the document: {ran:?}"),
    }
}

#[track_caller]
fn number(value: &Value, pointer: &str) -> u64 {
    let number = value.pointer(pointer).and_then(Value::as_u64);
    number.unwrap_or_else(|| panic!("no number at {pointer}: {value}"))
}

/// Why a descriptor was skipped, or may not be closed.
fn reason(descriptor: &Value) -> String {
    at(descriptor, "/reason")
}

/// Asserts that all of `fds` have this outcome for a reason with this text, and that the owner was not harmed.
#[track_caller]
fn left(ran: &Ran, owner: &mut Owner, fds: &[i32], outcome: &str, why: &str) -> Result<()> {
    let reported = descriptors(ran);
    assert_eq!(reported.len(), fds.len(), "{ran:?}");
    for one in &reported {
        assert_eq!(at(one, "/outcome"), outcome, "{one}");
        assert!(reason(one).contains(why), "no {why:?} in {one}");
    }
    let open = owner.descriptors()?;
    assert!(
        fds.iter().all(|fd| open.contains(fd)),
        "{fds:?} of {open:?}"
    );
    owner.report()?;
    Ok(())
}

fn fds_of(pid: u32) -> Result<Vec<i32>> {
    let mut fds = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd"))? {
        fds.push(entry?.file_name().to_string_lossy().parse()?);
    }
    fds.sort_unstable();
    Ok(fds)
}

/// The states of the threads of a process.
fn states(pid: u32) -> Result<Vec<char>> {
    let mut states = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let stat = std::fs::read_to_string(entry?.path().join("stat"))?;
        let state = stat
            .rsplit_once(") ")
            .and_then(|(_, rest)| rest.chars().next());
        states.push(state.context("no state")?);
    }
    Ok(states)
}

fn is_traced(pid: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"));
    status.is_ok_and(|status| !status.contains("TracerPid:\t0\n"))
}

/// The reported outcome and reason of each descriptor.
#[track_caller]
fn outcomes(ran: &Ran) -> BTreeMap<i32, (String, String)> {
    let one = |value: &Value| {
        let fd = number(value, "/fd").try_into().expect("a descriptor");
        (fd, (at(value, "/outcome"), reason(value)))
    };
    descriptors(ran).iter().map(one).collect()
}

/// The files behind the descriptors of a process. During an exec by a thread, the kernel shows none for a moment.
fn links_of(pid: u32) -> Result<BTreeMap<i32, String>> {
    let once = || {
        let mut links = BTreeMap::new();
        for fd in fds_of(pid)? {
            // It may have been closed meanwhile.
            if let Ok(link) = std::fs::read_link(format!("/proc/{pid}/fd/{fd}")) {
                links.insert(fd, link.to_string_lossy().into_owned());
            }
        }
        anyhow::Ok(links)
    };
    let until = Instant::now() + PATIENCE;
    loop {
        let (first, second) = (once()?, once()?);
        if first == second && first.contains_key(&0) {
            return Ok(first);
        }
        assert!(Instant::now() < until, "{first:?}, then {second:?}");
    }
}

/// Asserts that the reported outcomes of `fds` are true, compared with the files that they were `before`.
#[track_caller]
fn reports_the_truth(
    ran: &Ran,
    owner: &Owner,
    before: &BTreeMap<i32, String>,
    fds: &[i32],
) -> Result<()> {
    let reported = outcomes(ran);
    let after = links_of(owner.pid())?;
    for fd in fds {
        let Some((outcome, reason)) = reported.get(fd) else {
            panic!("nothing on {fd}: {ran:?}");
        };
        let kept = before.get(fd) == after.get(fd);
        let wanted = !matches!(outcome.as_str(), "freed" | "gone");
        assert_eq!(kept, wanted, "kept {fd}: {outcome}, {reason}");
    }
    Ok(())
}

/// Not root of a user namespace: PTRACE_SECCOMP_GET_FILTER needs CAP_SYS_ADMIN in the first user namespace.
pub fn is_root_of_the_machine() -> bool {
    std::fs::read_to_string("/proc/self/uid_map").is_ok_and(|map| map.contains("4294967295"))
}
