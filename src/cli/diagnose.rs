//! The arguments of `cwkill diagnose`.

use std::time::Duration;

use super::{Selection, values};

#[derive(Debug, clap::Args)]
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
    #[arg(long, help_heading = "Output")]
    pub ok_if_none: bool,
}
