//! The harness's own tests: does every scenario keep its word, and is nothing left behind?
//!
//! Not libtest: the processes of a lab are this very executable started again, so `main` must be ours.

mod agents;
mod behaviour;
mod cleanup;
mod input;
mod scenarios;
mod support;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};

fn main() -> ExitCode {
    if let Err(error) = netns_harness::init() {
        eprintln!("{error:#}");
        return ExitCode::FAILURE;
    }
    let tests = [
        scenarios::tests(),
        agents::tests(),
        behaviour::tests(),
        input::tests(),
        cleanup::tests(),
    ];
    libtest_mimic::run(
        &Arguments::from_args(),
        tests.into_iter().flatten().collect(),
    )
    .exit_code()
}

/// A test by the name `module::function`.
fn test(
    name: impl Into<String>,
    body: impl FnOnce() -> anyhow::Result<()> + Send + 'static,
) -> Trial {
    Trial::test(name, || body().map_err(|error| format!("{error:#}").into()))
}

/// Lists functions as tests under the name of their module.
macro_rules! tests {
    ($module:literal: $($function:ident),* $(,)?) => {
        vec![$(crate::test(concat!($module, "::", stringify!($function)), $function)),*]
    };
}
use tests;
