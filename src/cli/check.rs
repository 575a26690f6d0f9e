//! The arguments of `cwkill check`.

use std::time::Duration;

use super::{Selection, values};
use crate::check::threshold::Threshold;

const AFTER_SHORT_HELP: &str =
    "Ranges, examples, all options: cwkill check --help, man cwkill-check";

const AFTER_HELP: &str = "\
A RANGE is as in the guidelines for monitoring plugins. It alerts outside itself, with @ inside. \
With % the value is how much of its limit of open files (RLIMIT_NOFILE) the leak takes from the \
process that is nearest to its limit.
  100      more than 100                 10:20    less than 10, or more than 20
  10:      less than 10                  @10:20   from 10 to 20
  '~:5'    more than 5 (with quotes)     80%      more than 80 % of the limit

Examples:
  cwkill check -w 100 -c 500 --min-age 1m  those stuck for a minute or more
  cwkill check -c 0 --process java         CRITICAL if java has one
  cwkill check -w 50% -c 80% --unit tomcat in percent of its limit of files

Exit status: 0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN (also after wrong usage).";

#[derive(Debug, clap::Args)]
#[command(after_help = AFTER_SHORT_HELP, after_long_help = AFTER_HELP)]
pub struct CheckArgs {
    #[command(flatten)]
    pub selection: Selection,

    /// WARNING outside this range: 100 (more than 100), 10:20, 80%
    ///
    /// A percentage is of the owner's limit of open files (RLIMIT_NOFILE).
    #[arg(
        short,
        long,
        value_name = "RANGE",
        value_parser = values::threshold,
        allow_hyphen_values = true,
        help_heading = "Thresholds"
    )]
    pub warning: Option<Threshold>,

    /// CRITICAL outside this range
    #[arg(
        short,
        long,
        value_name = "RANGE",
        value_parser = values::threshold,
        allow_hyphen_values = true,
        help_heading = "Thresholds"
    )]
    pub critical: Option<Threshold>,

    /// Take every threshold as a percentage, as if it were written with %
    #[arg(long, help_heading = "Thresholds")]
    pub percent_of_limit: bool,

    /// UNKNOWN if the check takes longer: 10 (seconds) or 500ms
    #[arg(
        short,
        long,
        value_name = "SECONDS",
        value_parser = values::timeout,
        help_heading = "Thresholds"
    )]
    pub timeout: Option<Duration>,
}
