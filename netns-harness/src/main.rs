//! The `netns-harness` program.

use std::process::ExitCode;

fn main() -> ExitCode {
    netns_harness::run_role();
    netns_harness::cli::main()
}
