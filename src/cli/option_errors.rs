//! Errors about options. clap says what is wrong; these say what to write instead.

use std::ffi::OsString;

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{Arg, Command, CommandFactory};

use super::Cli;

/// A word is a misspelt command at this similarity or more (Jaro-Winkler, 1.0 is equal).
pub(super) const SIMILAR_FROM: f64 = 0.85;

/// A value for each option that has one.
const EXAMPLES: &[(&str, &str)] = &[
    ("port", "8080"),
    ("peer-port", "443"),
    ("local", "192.0.2.1"),
    ("peer", "10.0.0.0/8"),
    ("pid", "4711"),
    ("process", "java"),
    ("unit", "nginx"),
    ("container", "my-leaky-app"),
    ("pod", "'shop/web-*'"),
    ("namespace", "shop"),
    ("compose-service", "web"),
    ("host-root", "/host"),
    ("cgroup", "/system.slice/nginx.service"),
    ("user", "0"),
    ("state", "last-ack"),
    ("min-age", "10m"),
    ("min-idle", "30s"),
    ("cause", "drained"),
    ("netns", "4711"),
    ("method", "destroy"),
    ("grace", "5s"),
    ("max-kills", "100"),
    ("watch-refill", "10s"),
    ("for", "10m"),
    ("log", "stderr"),
    ("log-file", "/var/log/cwkill/acts.jsonl"),
    ("reclaim-age", "5m"),
    ("stop-limit", "50ms"),
    ("sample", "30s"),
    ("color", "never"),
    ("limit", "all"),
    ("bpf", "never"),
    ("warning", "100"),
    ("critical", "500"),
    ("timeout", "10"),
    ("fd", "20 --pid 4711"),
    ("config", "/etc/cwkill/daemon.toml"),
    ("interval", "1m"),
    ("textfile", "/var/lib/prometheus/node-exporter"),
    ("reset", "tomcat-leak"),
    ("src", "10.0.0.0/8"),
    ("dst", "192.0.2.1"),
    ("sport", "1024-65535"),
    ("dport", "443"),
    ("host", "192.0.2.1"),
    ("nat-src", "192.0.2.1"),
    ("nat-dst", "10.9.2.2"),
    ("mark", "0x10/0xf0"),
    ("zone", "7"),
    ("conntrack-state", "close-wait"),
    ("connection", "10.9.1.2:40000,10.9.2.2:443"),
    ("rate", "1000"),
];

/// The option with a value: `--port 8080`.
fn example(argument: &Arg) -> Option<String> {
    let long = argument.get_long()?;
    Some(format!("--{long} {}", example_value(long)?))
}

/// A value for the option with this long name, quoted for a shell.
pub(crate) fn example_value(long: &str) -> Option<&'static str> {
    let (_, value) = EXAMPLES.iter().find(|(option, _)| *option == long)?;
    Some(value)
}

/// A better message for this error about an option, if there is one. `words`: all of the command line.
pub(super) fn message(words: &[OsString], error: &clap::Error) -> Option<String> {
    let mut cli = Cli::command();
    cli.build();
    let words: Vec<String> = words
        .iter()
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    let command = words.get(1).and_then(|name| cli.find_subcommand(name));
    let command = command.unwrap_or(&cli);
    // clap writes an option as `--port <LIST>`.
    let named = |kind: ContextKind| match error.get(kind)? {
        ContextValue::String(text) => text.split([' ', '=']).next().map(str::to_owned),
        ContextValue::Strings(texts) => texts.first()?.split([' ', '=']).next().map(str::to_owned),
        _ => None,
    };
    let argument = || named(ContextKind::InvalidArg);
    match error.kind() {
        ErrorKind::UnknownArgument => Some(unknown(&cli, command, &words, &argument()?)),
        ErrorKind::InvalidValue => {
            let is_missing = matches!(error.get(ContextKind::InvalidValue), Some(ContextValue::String(value)) if value.is_empty());
            let option = argument().filter(|_| is_missing)?;
            let example = example(find(command, &option)?)?;
            Some(format!("{option} needs a value; for example {example}"))
        }
        ErrorKind::TooManyValues => {
            let option = argument()?;
            Some(format!("{option} takes no value: write {option}"))
        }
        ErrorKind::ArgumentConflict => {
            let (one, other) = (argument()?, named(ContextKind::PriorArg)?);
            Some(format!(
                "{one} and {other} exclude each other: give one of them"
            ))
        }
        ErrorKind::MissingRequiredArgument if command.get_name() == "completions" => Some(
            "name the shell, one of bash, elvish, fish, powershell, zsh; for example `cwkill completions bash`"
                .to_owned(),
        ),
        ErrorKind::MissingRequiredArgument => {
            let option = argument()?;
            let example = example(find(command, &option)?)?;
            Some(format!("{option} is missing; for example {example}"))
        }
        _ => None,
    }
}

/// The option of a command with this long or short name.
fn find<'c>(command: &'c Command, option: &str) -> Option<&'c Arg> {
    command.get_arguments().find(|argument| {
        let longs = argument.get_long_and_visible_aliases().unwrap_or_default();
        let short = argument.get_short().map(|short| format!("-{short}"));
        short.as_deref() == Some(option) || longs.iter().any(|long| format!("--{long}") == option)
    })
}

/// The message for a word that is no option of this command.
fn unknown(cli: &Command, command: &Command, words: &[String], word: &str) -> String {
    let called = |command: &Command| match command.get_name() {
        "cwkill" => "`cwkill`".to_owned(),
        name => format!("`cwkill {name}`"),
    };
    let help = format!("`{} --help`", called(command).trim_matches('`'));
    // clap takes a value such as -1 for an option.
    let is_number =
        |word: &str| word.starts_with('-') && word[1..].starts_with(|c: char| c.is_ascii_digit());
    if is_number(word)
        && let Some(at) = words.iter().position(|it| it.starts_with(word))
        && let Some(option) = words.get(at.saturating_sub(1))
        && let Some(example) = find(command, option).and_then(example)
    {
        return format!(
            "`{}` is not a value for {option}; for example {example}",
            words[at]
        );
    }
    if !word.starts_with('-') {
        let is_pid = !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_digit());
        return match find(command, "--pid") {
            Some(_) if is_pid => {
                format!("`{word}` alone can mean many things: for a process use --pid {word}")
            }
            _ => format!("{} takes no `{word}`; see {help}", called(command)),
        };
    }
    let commands = || std::iter::once(cli).chain(cli.get_subcommands());
    let others: Vec<String> = commands()
        .filter(|other| other.get_name() != "help" && find(other, word).is_some())
        .map(called)
        .collect();
    if !others.is_empty() {
        return format!(
            "{word} is an option of {}, not of {}; see {help}",
            others.join(" and "),
            called(command)
        );
    }
    let similarity = |option: &str| strsim::jaro_winkler(word, option);
    let options = command.get_arguments().filter_map(|it| it.get_long());
    let similar = options
        .map(|long| format!("--{long}"))
        .filter(|option| similarity(option) >= SIMILAR_FROM)
        .max_by(|a, b| similarity(a).total_cmp(&similarity(b)));
    match similar {
        Some(similar) => format!("there is no option {word}; did you mean {similar}?"),
        None => format!("there is no option {word}; {help} lists all"),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    fn said(line: &str) -> String {
        let words = ["cwkill"].into_iter().chain(line.split(' '));
        let words: Vec<OsString> = words.map(OsString::from).collect();
        let error = Cli::try_parse_from(&words).expect_err(line);
        message(&words, &error).unwrap_or_else(|| panic!("nothing is said on {line}: {error}"))
    }

    #[test]
    fn every_option_with_a_value_has_a_valid_example() {
        let mut cli = Cli::command();
        cli.build();
        for command in std::iter::once(&cli).chain(cli.get_subcommands()) {
            let takes_value = |argument: &&Arg| argument.get_action().takes_values();
            for argument in command.get_arguments().filter(takes_value) {
                let Some(long) = argument.get_long() else {
                    continue;
                };
                let example =
                    example(argument).unwrap_or_else(|| panic!("--{long} has no example"));
                let name = Some(command.get_name()).filter(|name| *name != "cwkill");
                let words = ["cwkill"].into_iter().chain(name);
                let parsed = Cli::try_parse_from(words.chain(example.split(' ')));
                assert!(parsed.is_ok(), "{example}: {parsed:?}");
            }
        }
    }

    #[test]
    fn an_error_says_what_to_write() {
        for (line, expected) in [
            ("--port", "--port needs a value; for example --port 8080"),
            (
                "--all --log-file",
                "--log-file needs a value; for example --log-file /var/log/cwkill/acts.jsonl",
            ),
            (
                "check -w",
                "--warning needs a value; for example --warning 100",
            ),
            (
                "--pid -1",
                "`-1` is not a value for --pid; for example --pid 4711",
            ),
            (
                "-p -1",
                "`-1` is not a value for -p; for example --pid 4711",
            ),
            (
                "--min-age -10s",
                "`-10s` is not a value for --min-age; for example --min-age 10m",
            ),
            ("--json=yes", "--json takes no value: write --json"),
            (
                "-4 -6",
                "--ipv4 and --ipv6 exclude each other: give one of them",
            ),
            (
                "--all -q -v",
                "--quiet and --verbose exclude each other: give one of them",
            ),
            (
                "--prot 80",
                "there is no option --prot; did you mean --port?",
            ),
            (
                "--frobnicate",
                "there is no option --frobnicate; `cwkill --help` lists all",
            ),
            ("doctor --port 1", "--port is an option of `cwkill`"),
            (
                "diagnose --quiet",
                "--quiet is an option of `cwkill` and `cwkill reclaim` and `cwkill gateway`, not of `cwkill diagnose`",
            ),
            ("reclaim 4711", "for a process use --pid 4711"),
            (
                "doctor x",
                "`cwkill doctor` takes no `x`; see `cwkill doctor --help`",
            ),
            (
                "reclaim --fd 20",
                "--pid is missing; for example --pid 4711",
            ),
            ("completions", "for example `cwkill completions bash`"),
        ] {
            let said = said(line);
            assert!(said.contains(expected), "{line}: {said}");
        }
    }
}
