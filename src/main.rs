//! The `cwkill` program: parse, run, exit. What it runs is in [`cwkill::jobs`].

use std::process::ExitCode;

use clap::Parser;

use cwkill::cli::Cli;
use cwkill::jobs;

fn main() -> ExitCode {
    let cli = Cli::try_parse().unwrap_or_else(|error| jobs::refuse(&error));
    jobs::run(cli)
}
