//! The next command to type.

use super::rows::{Row, Subject};
use crate::config::{Action, Config};
use crate::proc::netns::NetnsScope;
use crate::report::Run;
use crate::text::{escape, shell_line};

/// The line with the next command, if there is one. `words`: the command line of this run, without the name of the program.
pub fn line(run: &Run, config: &Config, rows: &[Row<'_>], words: &[String]) -> Option<String> {
    let typed = |more: &[String]| command(&[words, more].concat());
    let without_dry_run = |more: &[String]| command(&[&without_dry_run(words), more].concat());
    let command = match config.action {
        Action::List => match rows.iter().find_map(selector) {
            Some(selector) => typed(&[&selector[..], &["-n".to_owned()]].concat()),
            None if rows.is_empty() && run.scan.coverage.namespaces_not_looked_into > 0 => {
                typed(&["--all-netns".to_owned()])
            }
            None => None,
        },
        Action::DryRun => {
            let mut planned = rows.iter().filter(|row| row.counts.planned > 0);
            match config.selects {
                true => planned.next().and_then(|_| without_dry_run(&[])),
                false => planned
                    .find_map(selector)
                    .and_then(|selector| without_dry_run(&selector)),
            }
        }
        Action::Act => return after_an_act(run, config, rows),
    };
    command.map(|command| format!("next: {command}"))
}

/// After an act: why sockets leak that could not be closed, or how to free the descriptors of those that were.
fn after_an_act(run: &Run, config: &Config, rows: &[Row<'_>]) -> Option<String> {
    let pid = |row: &Row<'_>| Some(row.process()?.id.pid.to_string());
    if let Some([(process, _)]) = run.dead_descriptors.as_deref() {
        let words = ["reclaim", "--pid", &process.id.pid.to_string()].map(str::to_owned);
        return command(&words).map(|command| format!("next: {command}"));
    }
    let mut left = rows
        .iter()
        .filter(|row| row.counts.kept + row.counts.failed > 0);
    if let Some(pid) = left.find_map(pid) {
        let mut words = ["diagnose", "--pid", &pid].map(str::to_owned).to_vec();
        match &config.netns {
            NetnsScope::Current => {}
            NetnsScope::Named(name) => words.extend(["--netns".to_owned(), name.clone()]),
            NetnsScope::All => words.push("--all-netns".to_owned()),
        }
        return command(&words).map(|command| format!("next: {command}"));
    }
    let mut open = rows.iter().filter(|row| row.counts.open > 0);
    if run.reclaim_requested {
        let advice = run.advice.first()?;
        let command = advice.commands.first()?;
        return Some(match &advice.after {
            Some(time) => format!("next, in {time}: {command}"),
            None => format!("next: {command}"),
        });
    }
    let words = ["reclaim", "--pid", &open.find_map(pid)?].map(str::to_owned);
    command(&words).map(|command| format!("next, in a minute: {command}"))
}

/// Selects the sockets of a row.
fn selector(row: &Row<'_>) -> Option<Vec<String>> {
    match row.subject {
        Subject::Process(process) => Some(vec!["--pid".into(), process.id.pid.to_string()]),
        Subject::Listener(listener) => {
            Some(vec!["--port".into(), listener.local.port().to_string()])
        }
        Subject::Unknown | Subject::Kernel => None,
    }
}

/// A command line to paste; `None` if a word has characters that must not reach a terminal.
fn command(words: &[String]) -> Option<String> {
    let is_safe = |word: &String| escape(word) == *word;
    let words: Vec<String> = ["cwkill".to_owned()]
        .into_iter()
        .chain(words.iter().cloned())
        .collect();
    words.iter().all(is_safe).then(|| shell_line(&words))
}

/// The command line without `--dry-run`.
fn without_dry_run(words: &[String]) -> Vec<String> {
    let mut left = Vec::with_capacity(words.len());
    for word in words {
        if ["-n", "--dry-run", "--dryrun"].contains(&word.as_str()) {
            continue;
        }
        // Short options in one word, as -nv; those with a value are not among them.
        let letters = word.strip_prefix('-').unwrap_or_default();
        let is_cluster = !letters.is_empty() && letters.chars().all(|c| "nqvyH46".contains(c));
        match is_cluster {
            true => left.push(word.replace('n', "")),
            false => left.push(word.clone()),
        }
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dry_run_is_followed_by_the_same_command() {
        let words = |line: &str| -> Vec<String> { line.split(' ').map(str::to_owned).collect() };
        for (typed, expected) in [
            ("--port 80 -n", "--port 80"),
            ("--dry-run --port 80", "--port 80"),
            ("-nv --port 80", "-v --port 80"),
            ("--dryrun -Nname --all", "-Nname --all"),
            ("-n -4 --netns nnn", "-4 --netns nnn"),
        ] {
            assert_eq!(without_dry_run(&words(typed)), words(expected), "{typed}");
        }
    }

    #[test]
    fn a_command_can_be_pasted() {
        let command =
            |words: &[&str]| command(&words.iter().map(|w| (*w).into()).collect::<Vec<_>>());
        assert_eq!(command(&["sport = :80"]).unwrap(), "cwkill 'sport = :80'");
        assert_eq!(command(&["--process", "a\x1bb"]), None);
    }
}
