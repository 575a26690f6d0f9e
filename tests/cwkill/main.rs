//! Drives the built `cwkill` in the harness and looks at the kernel from outside, with `ss`.

mod audit;
mod chaos;
mod check;
mod cli;
mod closing;
mod completions;
mod diagnose;
mod doctor;
mod expressions;
mod facts;
mod least_privilege;
mod listing;
mod namespaces;
mod probing;
mod races;
mod reclaim;
mod refill;
mod resetting;
mod runbooks;
mod selecting;
mod states;
mod support;
mod sweeping;
mod whose;

use libtest_mimic::{Arguments, Trial};
use netns_harness::Family;

/// A test of one behaviour, and whether it is run once or once in each family.
enum Case {
    Once(&'static str, fn() -> anyhow::Result<()>),
    EachFamily(&'static str, fn(Family) -> anyhow::Result<()>),
}

/// Set in the environment, it makes this program the harness's own.
const AS_HARNESS: &str = "CWKILL_TESTS_AS_HARNESS";

fn main() -> std::process::ExitCode {
    netns_harness::run_role();
    if std::env::var_os(AS_HARNESS).is_some() {
        return netns_harness::cli::main();
    }
    if let Ok(what) = std::env::var(doctor::WITHOUT) {
        let error = doctor::run_without(&what).expect_err("it has become another program");
        eprintln!("{error:#}");
        return std::process::ExitCode::FAILURE;
    }
    if let Err(error) = netns_harness::init() {
        eprintln!("{error:#}");
        return std::process::ExitCode::FAILURE;
    }
    let groups = [
        ("cli", cli::CASES),
        ("completions", completions::CASES),
        ("listing", listing::CASES),
        ("selecting", selecting::CASES),
        ("expressions", expressions::CASES),
        ("closing", closing::CASES),
        ("sweeping", sweeping::CASES),
        ("resetting", resetting::CASES),
        ("probing", probing::CASES),
        ("races", races::CASES),
        ("states", states::CASES),
        ("namespaces", namespaces::CASES),
        ("facts", facts::CASES),
        ("chaos", chaos::CASES),
        ("runbooks", runbooks::CASES),
        ("diagnose", diagnose::CASES),
        ("check", check::CASES),
        ("refill", refill::CASES),
        ("least_privilege", least_privilege::CASES),
        ("audit", audit::CASES),
        ("doctor", doctor::CASES),
    ];
    let mut groups = groups.to_vec();
    groups.extend(reclaim::CASES.iter().map(|cases| ("reclaim", *cases)));
    if whose::possible() {
        groups.push(("whose", whose::CASES));
        groups.push(("users", least_privilege::USERS_CASES));
        groups.push(("users", doctor::USERS_CASES));
        groups.push(("users", reclaim::USERS_CASES));
    } else {
        // The gate runs as root and fails if it sees this in its first run.
        eprintln!(
            "LEFT OUT: whose, users: only root of the machine can make cgroups, mount /proc and be others"
        );
    }
    let mut trials = Vec::new();
    for (runtime, case) in reclaim::RUNTIMES {
        match runtime.missing_tool() {
            None => groups.push(("reclaim", std::slice::from_ref(case))),
            // The gate installs them, and fails if it sees this.
            Some(tool) => eprintln!("LEFT OUT: reclaim, {runtime}: {tool} is not installed"),
        }
    }
    for (thing, case) in reclaim::SOMEWHERE {
        match thing.is_there() {
            true => groups.push(("reclaim", std::slice::from_ref(case))),
            false => eprintln!(
                "LEFT OUT: reclaim, {thing:?}: this kernel does not have it, or not for us"
            ),
        }
    }
    for (group, cases) in groups {
        for case in cases {
            match *case {
                Case::Once(name, test) => {
                    trials.push(trial(format!("{group}::{name}"), test));
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
