//! Drives the built `cwkill` in the harness and looks at the kernel from outside, with `ss`.

mod cli;
mod closing;
mod expressions;
mod facts;
mod listing;
mod probing;
mod races;
mod resetting;
mod selecting;
mod states;
mod support;
mod whose;

use libtest_mimic::{Arguments, Trial};
use netns_harness::Family;

/// A test of one behaviour, and whether it is run once or once in each family.
enum Case {
    Once(&'static str, fn() -> anyhow::Result<()>),
    EachFamily(&'static str, fn(Family) -> anyhow::Result<()>),
}

fn main() -> std::process::ExitCode {
    if let Err(error) = netns_harness::init() {
        eprintln!("{error:#}");
        return std::process::ExitCode::FAILURE;
    }
    let groups = [
        ("cli", cli::CASES),
        ("listing", listing::CASES),
        ("selecting", selecting::CASES),
        ("expressions", expressions::CASES),
        ("whose", whose::CASES),
        ("closing", closing::CASES),
        ("resetting", resetting::CASES),
        ("probing", probing::CASES),
        ("races", races::CASES),
        ("states", states::CASES),
        ("facts", facts::CASES),
    ];
    let mut trials = Vec::new();
    for (group, cases) in groups {
        let possible = group != "whose" || whose::possible();
        for case in cases {
            match *case {
                Case::Once(name, test) => {
                    let trial = trial(format!("{group}::{name}"), test);
                    trials.push(trial.with_ignored_flag(!possible));
                }
                Case::EachFamily(name, test) => {
                    for family in Family::ALL {
                        let name = format!("{group}::{name}::{}", family.name());
                        trials.push(trial(name, move || test(family)));
                    }
                }
            }
        }
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

fn trial(name: String, test: impl FnOnce() -> anyhow::Result<()> + Send + 'static) -> Trial {
    Trial::test(name, move || {
        test().map_err(|error| format!("{error:#}").into())
    })
}
