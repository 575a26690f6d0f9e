//! The command line of `netns-harness`.

use std::ffi::OsString;
use std::io::{self, Write as _};
use std::process::ExitCode;

use anyhow::Result;
use clap::error::ErrorKind;
use clap::{CommandFactory as _, Parser, Subcommand};

use crate::lab::Family;
use crate::owners::runtimes;
use crate::run::{self, HARNESS_FAILED, RunRequest};
use crate::{bench, chaos, gateway, privilege, scenario, verify};

const EXAMPLE: &str = "netns-harness run unread --count 3 -- ss -tnp";

/// Reproduces stuck TCP sockets in network namespaces with a leaking application and its peer
#[derive(Debug, Parser)]
#[command(name = "netns-harness", version, max_term_width = 100)]
struct Args {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// List the scenarios
    List,
    /// Build scenarios and run a command on the host of the leaking application
    ///
    /// The exit status is that of the command: 128 + N if signal N killed it, 127 if it does not exist. It is 125 if the
    /// lab cannot be built. The directory of this program comes first in the command's PATH. Its environment has
    /// HARNESS_APP_PID, HARNESS_APP_ADDR, HARNESS_PEER_ADDR and HARNESS_PORT. Everything is removed when the command ends.
    Run {
        /// Scenarios, each with an optional count: `unread`, `unread:40,established:5`
        #[arg(value_name = "SCENARIO[:COUNT],…", value_parser = parse_scenarios)]
        scenarios: Scenarios,
        /// Sockets per scenario without a count
        #[arg(long, default_value = "1", value_parser = parse_count)]
        count: usize,
        /// How the two sides address each other
        #[arg(long, value_enum, default_value = "v4")]
        family: Family,
        /// The application's port
        #[arg(long, default_value = "8080", value_parser = parse_port)]
        port: u16,
        /// Compare the state with the output of `ss` before the command runs
        #[arg(long)]
        check: bool,
        /// The command to run, after `--`
        #[arg(last = true)]
        command: Vec<OsString>,
    },
    /// Measure `cwkill`, ss, lsof and netstat
    Bench(bench::Bench),
    /// Run `cwkill` among bystander connections on reused addresses, and count the losses
    ///
    /// Exits with 1 if a bystander connection, a listener or the server was lost, or if a method acted on no socket.
    Chaos(chaos::Chaos),
    /// Measure `cwkill gateway` on a router, also beside tcpkill, cutter and conntrack
    #[command(subcommand)]
    Gateway(gateway::Gateway),
    /// Let servers in C, Go, Java, JavaScript and Python leak until EMFILE, and recover them with `cwkill --reclaim`
    ///
    /// Fails if a server does not accept again, has ended, or a byte of its other connections is wrong.
    Recover(runtimes::Runtimes),
    /// Build scenarios and compare them with the output of `ss`
    Verify {
        /// Scenarios to verify [default: all that `list` shows]
        #[arg(value_parser = parse_scenario)]
        scenarios: Vec<String>,
        /// Verify only this family
        #[arg(long, value_enum)]
        family: Option<Family>,
        /// Sockets per scenario
        #[arg(long, default_value = "3", value_parser = parse_count)]
        count: usize,
    },
}

#[derive(Debug, Clone)]
struct Scenarios(Vec<(String, Option<usize>)>);

/// Parses the command line and runs the subcommand.
#[must_use]
pub fn main() -> ExitCode {
    let code = match run_action(Args::parse().action) {
        Ok(code) => code,
        Err(error) if is_broken_pipe(&error) => 0,
        Err(error) => {
            // Fails only if stderr is closed.
            let _ = writeln!(io::stderr(), "netns-harness: {error:#}");
            HARNESS_FAILED
        }
    };
    ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX))
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<io::Error>()
        .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

fn run_action(action: Action) -> Result<i32> {
    match action {
        Action::List => list(),
        Action::Run {
            scenarios: Scenarios(scenarios),
            count,
            family,
            port,
            check,
            command,
        } => {
            if command.is_empty() {
                let message = format!("no command to run; for example: {EXAMPLE}");
                Args::command()
                    .error(ErrorKind::MissingRequiredArgument, message)
                    .exit();
            }
            let scenarios = scenarios
                .into_iter()
                .map(|(name, own_count)| (name, own_count.unwrap_or(count)))
                .collect();
            run::front(
                RunRequest {
                    scenarios,
                    family,
                    port,
                    check,
                },
                &command,
            )
        }
        Action::Bench(bench) => bench.run().map(|()| 0),
        Action::Gateway(gateway) => gateway.run().map(|()| 0),
        Action::Recover(recover) => recover.run().map(|()| 0),
        Action::Chaos(chaos) => chaos.run(),
        Action::Verify {
            scenarios,
            family,
            count,
        } => {
            privilege::ensure_privileges()?;
            let names = if scenarios.is_empty() {
                scenario::listed()
                    .map(|scenario| scenario.name.to_owned())
                    .collect()
            } else {
                scenarios
            };
            verify_all(&names, family, count)
        }
    }
}

fn list() -> Result<i32> {
    let mut stdout = io::stdout().lock();
    let width = scenario::listed()
        .map(|scenario| scenario.name.len())
        .max()
        .unwrap_or(0);
    for scenario in scenario::listed() {
        writeln!(stdout, "{:width$}  {}", scenario.name, scenario.summary)?;
    }
    Ok(0)
}

fn verify_all(names: &[String], family: Option<Family>, count: usize) -> Result<i32> {
    let families = family
        .as_ref()
        .map_or(&Family::ALL[..], std::slice::from_ref);
    let mut failed = false;
    for name in names {
        for &family in families {
            let result = match verify::verify(name, family, count) {
                Ok(()) => "ok".to_owned(),
                Err(error) => {
                    failed = true;
                    format!("FAILED: {error:#}")
                }
            };
            writeln!(io::stdout(), "{name} {}: {result}", family.name())?;
        }
    }
    Ok(i32::from(failed))
}

fn parse_scenario(text: &str) -> Result<String> {
    scenario::find(text).map(|scenario| scenario.name.to_owned())
}

fn parse_scenarios(text: &str) -> Result<Scenarios> {
    let one = |item: &str| match item.split_once(':') {
        Some((name, count)) => Ok((parse_scenario(name)?, Some(parse_count(count)?))),
        None => Ok((parse_scenario(item)?, None)),
    };
    text.split(',')
        .map(one)
        .collect::<Result<_>>()
        .map(Scenarios)
}

fn parse_count(text: &str) -> Result<usize> {
    match text.parse() {
        Ok(count) if count > 0 => Ok(count),
        _ => anyhow::bail!("`{text}` is not a number of sockets; for example 40"),
    }
}

fn parse_port(text: &str) -> Result<u16> {
    match text.parse() {
        Ok(port) if port > 0 => Ok(port),
        _ => anyhow::bail!("`{text}` is not a port; for example 8080"),
    }
}
