//! A command name after options or an expression, for example `cwkill --port 80 check`. clap takes it for a part of the
//! expression, so its own error would not mention the command.
//!
//! clap cannot do this alone. It can recognise a command after options, but not after an expression. With
//! `subcommand_precedence_over_arg` it would also take the device in `dev check` and the host in `dst check` for commands.

use std::ffi::OsString;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};

use super::Cli;
use crate::filter::{self, Services};
use crate::text::shell_line;

/// A command that is not the first argument.
#[derive(Debug)]
pub struct Misplaced {
    pub command: String,
    /// The message for the operator.
    pub error: clap::Error,
}

impl Misplaced {
    /// Finds a misplaced command in a command line that was refused. `words`: all of it, beginning with the program's name.
    pub fn find(words: &[OsString]) -> Option<Self> {
        let cli = Cli::command();
        // After `--` everything is an expression.
        let before_separator = words.iter().take_while(|word| *word != "--");
        let mut indexed = before_separator.enumerate().skip(1);
        let (index, name) = indexed.find_map(|(index, word)| {
            let name = word.to_str()?;
            let misplaced =
                cli.find_subcommand(name).is_some() && begins_a_condition(&words[..=index]);
            misplaced.then_some((index, name))
        })?;
        let mut moved = words.to_vec();
        moved[1..=index].rotate_right(1);
        let advice = match is_command(&moved) {
            true => format!("write `cwkill {}`", line(&moved[1..])),
            false => format!("see `cwkill {name} --help` for what may follow it"),
        };
        let message = format!("`{name}` is a command, and a command comes first: {advice}");
        Some(Misplaced {
            command: name.to_owned(),
            error: Cli::command().error(ErrorKind::ArgumentConflict, message),
        })
    }
}

/// Whether the last word is not the value of an option or a condition, and is where a condition may begin. No condition begins
/// with the name of a command, so such a command line is never valid.
fn begins_a_condition(words: &[OsString]) -> bool {
    let Ok(Cli {
        args,
        command: None,
    }) = Cli::try_parse_from(words)
    else {
        return false;
    };
    let Some((last, before)) = args.selection.expression.split_last() else {
        return false;
    };
    let is_whole = || filter::parse(&before.join(" "), &Services::of_this_host()).is_ok();
    words.last().is_some_and(|word| word == last.as_str()) && (before.is_empty() || is_whole())
}

/// Whether these words are a valid command, or would be with a required option.
fn is_command(words: &[OsString]) -> bool {
    match Cli::try_parse_from(words) {
        Ok(Cli { command, .. }) => command.is_some(),
        Err(error) => !error.use_stderr() || error.kind() == ErrorKind::MissingRequiredArgument,
    }
}

/// The words as one line, quoted for a shell.
fn line(words: &[OsString]) -> String {
    let words: Vec<_> = words.iter().map(|word| word.to_string_lossy()).collect();
    shell_line(&words)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(words: &[&str]) -> Option<String> {
        let words: Vec<OsString> = ["cwkill"].iter().chain(words).map(OsString::from).collect();
        Misplaced::find(&words).map(|misplaced| misplaced.error.to_string())
    }

    #[test]
    fn a_command_after_its_options_is_moved_to_the_front() {
        for (words, good) in [
            (&["--port", "1", "check"][..], "cwkill check --port 1"),
            (
                &["--port=1", "check", "-w", "1", "-c", "2"],
                "cwkill check --port=1 -w 1 -c 2",
            ),
            (&["--json", "doctor"], "cwkill doctor --json"),
            (
                &["sport = :80", "diagnose", "-N", "it's"],
                r"cwkill diagnose 'sport = :80' -N 'it'\''s'",
            ),
            (
                &["--process", "check", "check"],
                "cwkill check --process check",
            ),
            // These commands do not have this option.
            (&["--peer-port", "1", "reclaim"], "cwkill reclaim --help"),
            (&["-v", "doctor"], "cwkill doctor --help"),
        ] {
            let message = message(words).unwrap();
            assert!(message.contains("is a command"), "{message}");
            assert!(
                message.contains(&format!("`{good}`")),
                "{words:?}: {message}"
            );
        }
    }

    #[test]
    fn a_name_or_a_value_is_not_a_command() {
        for words in [
            &["check", "--port", "80x"][..],
            &["--process", "check"],
            &["--process", "check", "--port", "80x"],
            &["--pid", "check"],
            &["dev", "check"],
            &["dst", "check"],
            &["sport = :80 and", "check"],
            &["--port", "80x", "check"],
            &["--port", "1", "--", "check"],
            &["--port", "1", "chequers"],
        ] {
            assert_eq!(message(words), None, "{words:?}");
        }
    }
}
