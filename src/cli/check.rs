//! The arguments of `cwkill check`.

use super::{Selection, values};

#[derive(Debug, clap::Args)]
pub struct CheckArgs {
    #[command(flatten)]
    pub selection: Selection,

    /// WARNING at N sockets or more
    #[arg(
        short,
        long,
        value_name = "N",
        value_parser = values::threshold,
        help_heading = "Thresholds"
    )]
    pub warning: u64,

    /// CRITICAL at N sockets or more
    #[arg(
        short,
        long,
        value_name = "N",
        value_parser = values::threshold,
        help_heading = "Thresholds"
    )]
    pub critical: u64,

    /// Thresholds are a percentage of RLIMIT_NOFILE, for the process closest to its limit
    #[arg(long, help_heading = "Thresholds")]
    pub percent_of_limit: bool,
}
