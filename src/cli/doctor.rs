//! The arguments of `cwkill doctor`.

use std::path::PathBuf;

use super::values;

#[derive(Debug, clap::Args)]
pub struct DoctorArgs {
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,

    /// Read the names of containers below this directory
    #[arg(long, value_name = "DIR", value_parser = values::host_root, default_value = "/", hide_default_value = true, hide_short_help = true)]
    pub host_root: PathBuf,
}
