//! Drives the built `cwkill` in the harness and looks at the kernel from outside, with `ss`.

mod addresses;
mod ages;
mod asking;
mod at_one_instant;
mod audit;
mod backlogs;
mod cgroups;
mod chaos;
mod check;
mod cli;
mod close_watch;
mod closing;
mod completions;
mod containers;
mod daemon;
mod daemon_policies;
mod diagnose;
mod doctor;
mod expressions;
mod facts;
mod gateway;
mod gateway_cut;
mod gateway_luck;
mod gateway_paths;
mod gateway_watch;
mod iterator;
mod least_privilege;
mod limits;
mod listing;
mod mptcp;
mod namespaces;
mod nat;
mod never_nothing;
mod overview;
mod probing;
mod races;
mod reclaim;
mod resetting;
mod runbooks;
mod selecting;
mod sentences;
mod signals;
mod spinning;
mod states;
mod support;
mod threads;
mod trace;
mod trace_hostile;
mod trace_luck;
mod trial;
mod watch;
mod without_owners;

use libtest_mimic::Arguments;
use trial::Test;

/// Set in the environment, it makes this program the harness's own.
const AS_HARNESS: &str = "CWKILL_TESTS_AS_HARNESS";

/// Lists modules with their names and tests.
macro_rules! modules {
    ($($first:ident $(:: $rest:ident)*),* $(,)?) => {
        &[$((
            concat!(stringify!($first) $(, "::", stringify!($rest))*),
            $first $(:: $rest)* ::TESTS,
        )),*]
    };
}

const MODULES: &[(&str, &[Test])] = modules![
    cli,
    completions,
    listing,
    overview,
    mptcp,
    selecting,
    containers,
    ages,
    asking,
    expressions,
    close_watch,
    closing,
    backlogs,
    spinning,
    without_owners,
    resetting,
    probing,
    addresses,
    nat,
    signals,
    races,
    states,
    namespaces,
    never_nothing,
    threads,
    iterator,
    at_one_instant,
    facts,
    gateway,
    gateway_cut,
    gateway_luck,
    gateway_paths,
    gateway_watch,
    chaos,
    runbooks,
    sentences,
    diagnose,
    diagnose::ends,
    diagnose::verdicts,
    trace,
    trace_hostile,
    trace_luck,
    check,
    watch,
    daemon,
    daemon_policies,
    least_privilege,
    limits,
    audit,
    doctor,
    cgroups,
    reclaim::act,
    reclaim::evidence,
    reclaim::kill,
    reclaim::ports,
    reclaim::programs,
    reclaim::reactions,
    reclaim::rights,
    reclaim::runtimes,
    reclaim::standard,
    reclaim::stop,
];

fn main() -> std::process::ExitCode {
    netns_harness::run_role();
    netns_harness::rewrite_commands(support::take_sockets_in_use);
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
    let mut arguments = Arguments::from_args();
    // The slow tests keep the processors busy.
    if !arguments.ignored && !arguments.include_ignored {
        arguments
            .test_threads
            .get_or_insert_with(two_for_each_processor);
    }
    libtest_mimic::run(&arguments, trial::trials(MODULES)).exit_code()
}

/// The tests mostly wait for states of sockets. With one for each processor it would be idle most of the time.
fn two_for_each_processor() -> usize {
    2 * std::thread::available_parallelism().map_or(1, usize::from)
}
