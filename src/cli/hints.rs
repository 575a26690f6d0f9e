//! Words that people type for a command or an option of cwkill, and the advice for them.

use std::ffi::OsString;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{CommandFactory, Parser};

use super::option_errors::SIMILAR_FROM;
use super::{Cli, option_errors};

/// A better error for a command line that was refused with `error`, if its meaning can be guessed. `words`: all of the line,
/// beginning with the program's name.
pub fn better_error(words: &[OsString], error: &clap::Error) -> Option<clap::Error> {
    let message = guessed(words, error).or_else(|| option_errors::message(words, error))?;
    let mut cli = Cli::command();
    cli.build();
    let name = words.get(1).and_then(|word| word.to_str());
    let command = name.and_then(|name| cli.find_subcommand_mut(name));
    Some(match command {
        Some(command) => command.error(ErrorKind::InvalidSubcommand, message),
        None => cli.error(ErrorKind::InvalidSubcommand, message),
    })
}

/// The advice for a word of another program.
fn guessed(words: &[OsString], error: &clap::Error) -> Option<String> {
    if let Some(option) = unknown_option(error) {
        return Some(option_advice(&option)?.to_owned());
    }
    let word = match Cli::try_parse_from(words) {
        Ok(cli) if cli.command.is_none() => cli.args.selection.expression.first()?.clone(),
        Ok(_) => return None,
        Err(_) => words.get(1)?.to_str()?.to_owned(),
    };
    if word.starts_with('-') || Cli::command().find_subcommand(&word).is_some() {
        return None;
    }
    Some(format!(
        "`{word}` is not a command: {}",
        command_advice(&word)?
    ))
}

fn unknown_option(error: &clap::Error) -> Option<String> {
    match (error.kind(), error.get(ContextKind::InvalidArg)) {
        (ErrorKind::UnknownArgument, Some(ContextValue::String(option))) => Some(option.clone()),
        _ => None,
    }
}

/// Advice for options of similar programs.
fn option_advice(option: &str) -> Option<&'static str> {
    Some(match option {
        "--force" | "-f" => {
            "there is no --force: to lose unsent bytes use --discard-unsent; \
             to close descriptors against the evidence use --reclaim-force"
        }
        "--kill" | "-K" | "-k" => {
            "there is no --kill: cwkill closes sockets as soon as a selector names them, for example --port 8080"
        }
        "--name" | "--comm" => "for a process by name use --process, for example --process java",
        "--host" | "--ip" | "--address" => {
            "for an address use --local or --peer, for example --peer 192.0.2.1; for connections between other hosts, which this \
             one routes, `cwkill gateway --host 192.0.2.1`"
        }
        "--timeout" => "how long a socket gets to close is --grace, for example --grace 5s",
        "--older-than" | "--age" => "for an age use --min-age, for example --min-age 10m",
        _ => return None,
    })
}

/// Advice for a word in the place of a command.
fn command_advice(word: &str) -> Option<String> {
    Some(match word {
        "list" | "ls" | "show" | "status" => {
            "`cwkill` without a command lists the stuck sockets".to_owned()
        }
        "kill" | "close" | "drop" | "rm" | "reset" | "run" => {
            "cwkill closes sockets as soon as a selector names them, for example `cwkill --port 8080`"
                .to_owned()
        }
        "version" => "write `cwkill --version`".to_owned(),
        "free" | "fds" => "write `cwkill reclaim`".to_owned(),
        "router" | "conntrack" | "forward" | "nat" => "write `cwkill gateway`".to_owned(),
        "explain" | "why" => "write `cwkill diagnose`".to_owned(),
        _ => {
            let cli = Cli::command();
            let similar = |name: &&str| strsim::jaro_winkler(word, name) >= SIMILAR_FROM;
            let names = cli.get_subcommands().map(clap::Command::get_name);
            let name = names.filter(similar).max_by(|a, b| {
                let similarity = |name| strsim::jaro_winkler(word, name);
                similarity(a).total_cmp(&similarity(b))
            })?;
            format!("did you mean `cwkill {name}`?")
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn advice(line: &str) -> Option<String> {
        let words: Vec<OsString> = ["cwkill"]
            .into_iter()
            .chain(line.split_whitespace())
            .map(OsString::from)
            .collect();
        // An expression is parsed later.
        let error = Cli::try_parse_from(&words)
            .err()
            .unwrap_or_else(|| Cli::command().error(ErrorKind::ValueValidation, "bad"));
        better_error(&words, &error).map(|error| error.to_string())
    }

    #[test]
    fn words_for_commands_are_understood() {
        for (line, good) in [
            ("list", "without a command lists"),
            ("kill", "cwkill --port 8080"),
            ("--port 80 kill", "cwkill --port 8080"),
            ("diagnos", "`cwkill diagnose`"),
            ("dignose --port 1", "`cwkill diagnose`"),
            ("reclaime --pid 7", "`cwkill reclaim`"),
            ("docter", "`cwkill doctor`"),
            ("chek", "`cwkill check`"),
            ("--port 1 --force", "--discard-unsent"),
            ("reclaim --force", "--reclaim-force"),
            ("--port 1 -K", "as soon as a selector names them"),
            ("--name java", "--process java"),
        ] {
            let advice = advice(line).unwrap_or_else(|| panic!("no advice for {line}"));
            assert!(advice.contains(good), "{line}: {advice}");
        }
    }

    #[test]
    fn other_errors_are_left_alone() {
        for line in [
            "sport",
            "diagnose --sample 0s",
            "--reclaim",
            "--port 80x",
            "dst",
            "state",
        ] {
            assert_eq!(advice(line), None, "{line}");
        }
    }
}
