//! The arguments of `cwkill trace`.

use std::time::Duration;

use super::{Selection, values};

const AFTER_SHORT_HELP: &str = "All options and examples: cwkill trace --help";

const AFTER_HELP: &str = "\
It attaches programs to the kernel, watches, detaches them, and never acts. It needs CAP_BPF and CAP_PERFMON, or \
CAP_SYS_ADMIN, and Linux 5.15. What was stuck before is counted; where that comes from cannot be known.

Examples:
  cwkill trace --port 8080 --for 1m        one port, for a minute
  cwkill trace --pid 4711                  one process, until Ctrl-C
  cwkill trace --for 10m --json            every process, for a program

Exit status: 0 a place was found, 1 nothing became stuck (0 with --ok-if-none), 2 wrong usage, \
3 could not run at all, 4 no place was found, but something could not be looked at.";

#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_SHORT_HELP, after_long_help = AFTER_HELP)]
pub struct TraceArgs {
    #[command(flatten)]
    pub selection: Selection,

    /// How long to watch [default: until Ctrl-C]
    #[arg(
        long = "for",
        value_name = "DURATION",
        value_parser = values::positive_duration,
        help_heading = "Output"
    )]
    pub duration: Option<Duration>,

    /// Show every place, and every function of its stack
    #[arg(short, long, conflicts_with = "json", help_heading = "Output")]
    pub verbose: bool,

    /// Print one JSON document
    #[arg(long, help_heading = "Output")]
    pub json: bool,

    /// Exit with 0 instead of 1 if nothing became stuck
    #[arg(long, help_heading = "Output", hide_short_help = true)]
    pub ok_if_none: bool,
}
