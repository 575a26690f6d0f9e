//! The `cwkill` program: parse, run, exit. What it runs is in [`cwkill::commands`].

use std::process::ExitCode;

use clap::Parser;

use cwkill::cli::Cli;
use cwkill::commands;

fn main() -> ExitCode {
    let cli = Cli::try_parse().unwrap_or_else(|error| commands::refuse(&error));
    commands::run(cli)
}
