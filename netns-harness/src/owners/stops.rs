//! Measures how long a process is stopped while its descriptors are closed: the longest gap in its heartbeat of 1 ms.
//! Compares `cwkill reclaim` with gdb, and with no action, which shows the noise of the machine.

use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};

use super::{BuildDir, Owner};
use crate::lab::Lab;
use crate::program::is_found;

/// Descriptors to close per run.
const DESCRIPTORS: usize = 100;
/// Threads of the process.
const THREADS: usize = 50;

/// Measures and prints.
pub(crate) fn run(cwkill: &Path, runs: u32) -> Result<()> {
    let lab = Lab::new()?;
    // In a named file, because gdb reads its symbols.
    let build_dir = BuildDir::new()?;
    let program = build_dir.compile_owner(&[])?;
    let mut owner = Owner::start_through(lab.app_host(), &[], &program, "idle", THREADS)?;
    println!(
        "{DESCRIPTORS} descriptors of a process with {THREADS} threads, longest gap of its heartbeat in ms"
    );
    println!("{:<26} {:>9} {:>9} {:>9}", "", "median", "min", "max");
    let pid = owner.pid().to_string();
    let mut nothing = Vec::new();
    let mut reclaimed = Vec::new();
    let mut scattered = Vec::new();
    let mut by_gdb = Vec::new();
    for run in 0..runs {
        owner.longest_gap()?;
        std::thread::sleep(Duration::from_millis(100));
        nothing.push(owner.longest_gap()?);
        for (gaps, is_scattered) in [(&mut reclaimed, false), (&mut scattered, true)] {
            if is_scattered {
                owner.leak_scattered(DESCRIPTORS)?;
            } else {
                owner.leak(DESCRIPTORS)?;
            }
            owner.longest_gap()?;
            let command = lab.app_host().command(cwkill);
            let command = command.args([
                "reclaim",
                "--pid",
                &pid,
                "--reclaim-age",
                "0s",
                "--stop-limit",
                "5s",
                "-q",
            ]);
            let output = command.output()?;
            gaps.push(owner.longest_gap()?);
            ensure!(
                output.status.success(),
                "cwkill reclaim ended with {}",
                output.status
            );
        }
        // gdb is slow, and its times vary little, so a third of the runs is enough.
        if is_found("gdb") && run < runs.div_ceil(3) {
            let leaked = owner.leak(DESCRIPTORS)?;
            owner.longest_gap()?;
            let mut command = lab
                .app_host()
                .command("gdb")
                .args(["-p", &pid, "-batch", "-nx"]);
            for fd in &leaked {
                command = command.args(["-ex", &format!("call (int)close({fd})")]);
            }
            let output = command.output()?;
            by_gdb.push(owner.longest_gap()?);
            let left = owner
                .descriptors()?
                .into_iter()
                .filter(|fd| leaked.contains(fd))
                .count();
            ensure!(left == 0, "gdb left {left} descriptors ({})", output.status);
        }
    }
    for (name, gaps) in [
        ("no action", nothing),
        ("cwkill reclaim", reclaimed),
        ("the same, not adjacent", scattered),
        ("gdb call close()", by_gdb),
    ] {
        print(name, gaps);
    }
    if !is_found("gdb") {
        println!("gdb is not installed, so not measured");
    }
    owner.report()?;
    Ok(())
}

fn print(name: &str, mut gaps: Vec<Duration>) {
    gaps.sort_unstable();
    let (Some(min), Some(max)) = (gaps.first(), gaps.last()) else {
        return;
    };
    let ms = |gap: Duration| gap.as_secs_f64() * 1000.0;
    let median = gaps[gaps.len() / 2];
    println!(
        "{name:<26} {:>9.1} {:>9.1} {:>9.1}",
        ms(median),
        ms(*min),
        ms(*max)
    );
}
