//! Tests of the harness: every scenario reaches its state, and nothing is left behind.
//!
//! Not libtest: the processes of a lab are this executable started again, so it needs its own `main`.

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

/// A test with the name `module::function`.
fn test(
    name: impl Into<String>,
    body: impl FnOnce() -> anyhow::Result<()> + Send + 'static,
) -> Trial {
    Trial::test(name, || body().map_err(|error| format!("{error:#}").into()))
}

/// Makes tests from functions, with the name of their module as prefix.
macro_rules! tests {
    ($module:literal: $($function:ident),* $(,)?) => {
        vec![$(crate::test(concat!($module, "::", stringify!($function)), $function)),*]
    };
}
use tests;
