//! The `cwkill` program: parses the command line, and runs a command of [`cwkill::commands`].

use std::process::ExitCode;

use clap::Parser;

use cwkill::cli::Cli;
use cwkill::commands;

fn main() -> ExitCode {
    commands::prepare();
    let cli = Cli::try_parse().unwrap_or_else(|error| commands::refuse(&error));
    commands::run(cli)
}
