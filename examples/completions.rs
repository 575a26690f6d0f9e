//! Writes the completions for bash, zsh and fish into a directory: `cargo run --example completions -- DIR`.
//!
//! This is not a build script, because a build script cannot use the library that it belongs to, and the command line
//! is a part of that library.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::CommandFactory;
use clap_complete::{Shell, generate_to};

fn main() -> ExitCode {
    let mut arguments = std::env::args_os().skip(1);
    let (Some(directory), None) = (arguments.next().map(PathBuf::from), arguments.next()) else {
        eprintln!("usage: cargo run --example completions -- DIR");
        return ExitCode::from(2);
    };
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        let mut command = cwkill::cli::Cli::command();
        match generate_to(shell, &mut command, "cwkill", &directory) {
            Ok(path) => println!("{}", path.display()),
            Err(error) => {
                eprintln!("cannot write the completion of {shell}: {error}");
                return ExitCode::FAILURE;
            }
        }
    }
    ExitCode::SUCCESS
}
