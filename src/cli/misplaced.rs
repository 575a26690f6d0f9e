//! A command behind options or an expression, where it reads like the next condition of the expression.

use std::ffi::OsString;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};

use super::Cli;
use crate::filter::{self, Services};

/// A command that does not come first.
#[derive(Debug)]
pub struct Misplaced {
    /// Its name.
    pub command: String,
    /// What to say of it.
    pub error: clap::Error,
}

impl Misplaced {
    /// Why a command line was refused, if it is for this. `words`: all of it, from the name of the program on.
    pub fn find(words: &[OsString]) -> Option<Self> {
        let cli = Cli::command();
        // Behind that, everything is an expression.
        let until = words.iter().take_while(|word| *word != "--");
        let (at, name) = until.enumerate().skip(1).find_map(|(at, word)| {
            let name = word.to_str()?;
            let misplaced =
                cli.find_subcommand(name).is_some() && begins_a_condition(&words[..=at]);
            misplaced.then_some((at, name))
        })?;
        let mut moved = words.to_vec();
        moved[1..=at].rotate_right(1);
        let advice = match is_understood(&moved) {
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

/// Whether the last word is no value of anything, and stands where a condition may begin. No condition begins with the
/// name of a command, so that such a line is never a good one.
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

/// Whether a command can be told from these words, and no more than an option is missing.
fn is_understood(words: &[OsString]) -> bool {
    match Cli::try_parse_from(words) {
        Ok(Cli { command, .. }) => command.is_some(),
        Err(error) => !error.use_stderr() || error.kind() == ErrorKind::MissingRequiredArgument,
    }
}

/// The words as a shell takes them.
fn line(words: &[OsString]) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_@%+=:,./-".contains(c);
    let quoted = |word: &OsString| match word.to_string_lossy() {
        word if !word.is_empty() && word.chars().all(plain) => word.into_owned(),
        word => format!("'{}'", word.replace('\'', r"'\''")),
    };
    words.iter().map(quoted).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(words: &[&str]) -> Option<String> {
        let words: Vec<OsString> = ["cwkill"].iter().chain(words).map(OsString::from).collect();
        Misplaced::find(&words).map(|misplaced| misplaced.error.to_string())
    }

    #[test]
    fn a_command_behind_its_options_is_put_first() {
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
            // They have no such option.
            (&["--port", "1", "reclaim"], "cwkill reclaim --help"),
            (&["-v", "doctor"], "cwkill doctor --help"),
        ] {
            let told = told(words).unwrap();
            assert!(told.contains("is a command"), "{told}");
            assert!(told.contains(&format!("`{good}`")), "{words:?}: {told}");
        }
    }

    #[test]
    fn a_name_or_a_value_is_no_command() {
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
            assert_eq!(told(words), None, "{words:?}");
        }
    }
}
