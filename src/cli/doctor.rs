//! The arguments of `cwkill doctor`.

#[derive(Debug, clap::Args)]
pub struct DoctorArgs {
    /// Print one JSON document
    #[arg(long)]
    pub json: bool,
}
