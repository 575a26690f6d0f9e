//! The `cwkill` program: parses the command line, and runs a command of [`cwkill::commands`].

use std::process::ExitCode;

use clap::Parser;

use cwkill::cli::Cli;
use cwkill::commands;

fn main() -> ExitCode {
    commands::prepare();
    if let Some(code) = commands::serve_trace() {
        return code;
    }
    let cli = Cli::try_parse().unwrap_or_else(|error| commands::refuse(&error));
    commands::run(cli)
}
