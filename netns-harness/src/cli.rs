//! The command line of `netns-harness`.

use std::ffi::OsString;
use std::io::{self, Write as _};
use std::process::ExitCode;

use anyhow::Result;
use clap::error::ErrorKind;
use clap::{CommandFactory as _, Parser, Subcommand, ValueEnum};

use crate::lab::Family;
use crate::owners::runtimes;
use crate::run::{self, HARNESS_FAILED, RunRequest};
use crate::{bench, chaos, privilege, scenario, verify};

const EXAMPLE: &str = "netns-harness run unread --count 3 -- ss -tnp";

/// Reproduces stuck TCP sockets: network namespaces with a leaking application and its peer, removed when it ends.
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
    /// Exits with the command's status (128 + the signal that killed it, 127 if there is no such program), or 125 if the
    /// lab cannot be built. The command finds programs built beside this one, and in its environment HARNESS_APP_PID,
    /// HARNESS_APP_ADDR, HARNESS_PEER_ADDR and HARNESS_PORT.
    Run {
        /// One or more, with a count of their own if wanted: `unread`, `unread:40,established:5`
        #[arg(value_name = "SCENARIO[:COUNT],…", value_parser = parse_wanted)]
        scenarios: Wanted,
        /// Sockets in each scenario that has no count of its own
        #[arg(long, default_value = "1", value_parser = parse_count)]
        count: usize,
        /// How the two sides address each other
        #[arg(long, value_enum, default_value = "v4")]
        family: Family,
        /// The application's port
        #[arg(long, default_value = "8080", value_parser = parse_port)]
        port: u16,
        /// Compare the state with what `ss` shows before the command runs
        #[arg(long)]
        check: bool,
        /// What to run, after `--`
        #[arg(last = true)]
        command: Vec<OsString>,
    },
    /// Measure `cwkill` beside ss, lsof and netstat
    Bench(bench::Bench),
    /// Run `cwkill` among bystander connections on reused addresses, and count what is lost
    ///
    /// Exits with 1 if a bystander connection, a listener or the server was lost, or nothing was acted on.
    Chaos(chaos::Chaos),
    /// Leak servers in C, Go, Java, JavaScript and Python to EMFILE, and recover them with `cwkill --reclaim`
    ///
    /// Fails if a server does not accept again, is gone, or a byte of its other connections is wrong.
    Recover(runtimes::Runtimes),
    /// Build scenarios and compare them with what `ss` shows
    Verify {
        /// Which ones; all that are listed, if none is named
        #[arg(value_parser = parse_scenario)]
        scenarios: Vec<String>,
        /// In one family only
        #[arg(long, value_enum)]
        family: Option<Family>,
        /// Sockets in each
        #[arg(long, default_value = "3", value_parser = parse_count)]
        count: usize,
    },
}

#[derive(Debug, Clone)]
struct Wanted(Vec<(String, Option<usize>)>);

impl ValueEnum for Family {
    fn value_variants<'a>() -> &'a [Self] {
        &Self::ALL
    }

    fn to_possible_value(&self) -> Option<clap::builder::PossibleValue> {
        Some(clap::builder::PossibleValue::new(self.name()))
    }
}

/// Parses the command line and does what it says.
#[must_use]
pub fn main() -> ExitCode {
    let code = match act(Args::parse().action) {
        Ok(code) => code,
        Err(error) if is_broken_pipe(&error) => 0,
        Err(error) => {
            // Where stderr is closed there is nobody to tell.
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

fn act(action: Action) -> Result<i32> {
    match action {
        Action::List => list(),
        Action::Run {
            scenarios: Wanted(wanted),
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
            let scenarios = wanted
                .into_iter()
                .map(|(name, own)| (name, own.unwrap_or(count)))
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
            let verdict = match verify::verify(name, family, count) {
                Ok(()) => "ok".to_owned(),
                Err(error) => {
                    failed = true;
                    format!("FAILED: {error:#}")
                }
            };
            writeln!(io::stdout(), "{name} {}: {verdict}", family.name())?;
        }
    }
    Ok(i32::from(failed))
}

fn parse_scenario(text: &str) -> Result<String> {
    scenario::find(text).map(|scenario| scenario.name.to_owned())
}

fn parse_wanted(text: &str) -> Result<Wanted> {
    let one = |part: &str| match part.split_once(':') {
        Some((name, count)) => Ok((parse_scenario(name)?, Some(parse_count(count)?))),
        None => Ok((parse_scenario(part)?, None)),
    };
    text.split(',').map(one).collect::<Result<_>>().map(Wanted)
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
