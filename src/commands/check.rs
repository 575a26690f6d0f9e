//! `cwkill check`: one line for a monitoring system.

use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use caps::CapsHashSet;

use super::{drop_capabilities_and_start_threads, open_proc, refuse, say_notes};
use crate::bpf::KernelTypes;
use crate::check::{self, CheckConfig, CheckResult, Status};
use crate::cli::CheckArgs;
use crate::history::History;
use crate::privileges::capabilities;
use crate::terminal::{print_usage, say};

pub(super) fn run(args: CheckArgs) -> ExitCode {
    let use_iterator = args.selection.bpf;
    let host_root = args.selection.owners.host_root.clone();
    let check = CheckConfig::from_args(args).unwrap_or_else(|error| refuse(&error));
    say_notes(&check.scope.notes);
    // Before everything that can hang.
    if let Some(timeout) = check.timeout {
        end_after(timeout);
    }
    let proc = open_proc(
        use_iterator,
        false,
        &host_root,
        &check.scope.selectors,
        &KernelTypes::default(),
    );
    drop_capabilities_and_start_threads(
        &capabilities::to_find(
            &check.scope.netns,
            true,
            check.scope.selectors.selects_owners(),
        ),
        proc.as_ref().ok(),
    );
    let mut history = History::open();
    let result = proc
        .and_then(|proc| check::run(&check, &proc, &mut history))
        .unwrap_or_else(|error| check::unknown(&format!("{error:#}")));
    say_notes(history.take_notes());
    answer(&result).into()
}

/// A result has been chosen: that of the check, or that of the time limit.
static ANSWERED: AtomicBool = AtomicBool::new(false);

/// Writes the line. Returns the status. If the time limit has written its line already, waits for the end of the process.
fn answer(result: &CheckResult) -> Status {
    while ANSWERED.swap(true, Ordering::SeqCst) {
        std::thread::park();
    }
    match writeln!(io::stdout(), "{}", result.line) {
        Ok(()) => result.status,
        // The line was not written, so the monitoring system does not know the status.
        Err(_) => Status::Unknown,
    }
}

/// Ends cwkill with UNKNOWN after this time, also if a system call of the check hangs.
fn end_after(timeout: Duration) {
    let end = move || {
        // It is started before the other threads drop theirs. If this fails, the thread only holds what it does not use.
        let _ = capabilities::drop_all_but(&CapsHashSet::new());
        std::thread::sleep(timeout);
        let why = format!("no result within {}", crate::text::age(timeout));
        let status = answer(&check::unknown(&why));
        std::process::exit(status as i32)
    };
    if let Err(error) = std::thread::Builder::new().spawn(end) {
        say(format_args!(
            "note: --timeout has no effect, because its thread cannot be started: {error}"
        ));
    }
}

/// Exits with UNKNOWN after a usage error, and with one line on stdout. A monitoring system would take clap's exit status 2 for
/// CRITICAL.
pub(super) fn unknown_by_usage(error: &clap::Error) -> ! {
    let text = error.to_string();
    let message = text.split("\n\n").next().unwrap_or_default();
    let message = message.strip_prefix("error: ").unwrap_or(message);
    print_usage(error);
    let _ = writeln!(io::stdout(), "{}", check::unknown(message).line);
    std::process::exit(Status::Unknown as i32)
}
