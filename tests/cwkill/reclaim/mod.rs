//! Closing descriptors inside their owners. The owners are real programs that look at themselves for damage.
//!
//! Each run names one process, or is confined to a pid namespace: the machine may have others with dead
//! descriptors.

mod act;
mod evidence;
mod kill;
mod runtimes;

use anyhow::{Context, Result, ensure};
use netns_harness::Lab;
use netns_harness::owners::Owner;
use serde_json::Value;

use crate::Case;
use crate::support::{Ran, at, cwkill, same};

pub use runtimes::RUNTIMES;

pub const CASES: &[&[Case]] = &[act::CASES, evidence::CASES, kill::CASES, runtimes::CASES];

/// Runs `cwkill reclaim` on one owner, whatever the age, and with time enough for a busy machine.
fn reclaim(lab: &Lab, pid: u32, more: &str) -> Result<Ran> {
    cwkill(
        lab,
        &format!("reclaim --pid {pid} --reclaim-age 0s --stop-limit 5s {more}"),
    )
}

fn descriptors(ran: &Ran) -> Result<Vec<Value>> {
    let list = ran.json()?["descriptors"].as_array().cloned();
    list.context("no descriptors in the document")
}

fn number(value: &Value, pointer: &str) -> Result<u64> {
    let number = value.pointer(pointer).and_then(Value::as_u64);
    number.with_context(|| format!("no number at {pointer}: {value}"))
}

/// All of them were left, for a reason with this text; the owner was not harmed.
fn left(ran: &Ran, owner: &mut Owner, fds: &[i32], outcome: &str, why: &str) -> Result<()> {
    let said = descriptors(ran)?;
    same(&said.len(), &fds.len())?;
    for one in &said {
        same(&at(one, "/outcome"), &outcome.to_owned())?;
        ensure!(at(one, "/reason").contains(why), "{one}");
    }
    let open = owner.descriptors()?;
    ensure!(
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

/// The states of its threads.
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
