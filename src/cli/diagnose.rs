//! The arguments of `cwkill diagnose`.

use std::time::Duration;

use super::{Selection, values};

const AFTER_SHORT_HELP: &str = "All options and examples: cwkill diagnose --help";

const AFTER_HELP: &str = "\
It scans twice, and never acts.

Examples:
  cwkill diagnose                          every process, the worst first
  cwkill diagnose --port 8080 --sample 30s one port, scans 30 s apart
  cwkill diagnose --pid 4711 --json        one process, for a program

Exit status: 0 there is something to report, 1 there is not (0 with --ok-if-none), 2 wrong usage, \
3 could not run at all, 4 nothing was found, but something could not be looked at.";

#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_SHORT_HELP, after_long_help = AFTER_HELP)]
pub struct DiagnoseArgs {
    #[command(flatten)]
    pub selection: Selection,

    /// Time between the two scans that show the growth [default: 5s]
    #[arg(
        long,
        value_name = "DURATION",
        value_parser = values::positive_duration,
        help_heading = "Output"
    )]
    pub sample: Option<Duration>,

    /// Print one JSON document
    #[arg(long, help_heading = "Output")]
    pub json: bool,

    /// Exit with 0 instead of 1 if there is nothing to report
    #[arg(long, help_heading = "Output", hide_short_help = true)]
    pub ok_if_none: bool,
}
