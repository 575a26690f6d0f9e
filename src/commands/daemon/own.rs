//! The resources that the daemon itself uses.

use std::os::fd::AsFd;
use std::time::Duration;

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeVal;
use procfs::process::Process;

use crate::daemon::metrics::OwnUse;
use crate::proc::fds;

/// Those of this process now. What cannot be read is `None`.
pub(super) fn usage() -> OwnUse {
    let usage = getrusage(UsageWho::RUSAGE_SELF).ok();
    let cpu = usage.map(|usage| time(usage.user_time()) + time(usage.system_time()));
    let process = Process::myself().and_then(|process| process.stat()).ok();
    let directory = std::fs::File::open("/proc/self/fd").ok();
    // The count has the descriptor of the directory, too.
    let descriptors = directory.and_then(|directory| fds::count_used(directory.as_fd()).ok());
    OwnUse {
        cpu,
        resident_bytes: process.as_ref().map(|stat| stat.rss * page_size()),
        descriptors: descriptors.map(|count| count.saturating_sub(1) as u64),
        threads: process.and_then(|stat| u64::try_from(stat.num_threads).ok()),
    }
}

fn page_size() -> u64 {
    rustix::param::page_size() as u64
}

fn time(value: TimeVal) -> Duration {
    let seconds = u64::try_from(value.tv_sec()).unwrap_or(0);
    let microseconds = u64::try_from(value.tv_usec()).unwrap_or(0);
    Duration::from_secs(seconds) + Duration::from_micros(microseconds)
}
