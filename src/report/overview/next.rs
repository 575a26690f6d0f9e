//! The next command to type.

use super::rows::{Row, Subject};
use crate::config::{Action, Config};
use crate::model::{Outcome, SkipReason};
use crate::proc::ProcessId;
use crate::proc::netns::NetnsScope;
use crate::report::Run;
use crate::report::advice::Advice;
use crate::text::{escape, shell_line};

/// The line with the next command, if there is one. `words`: the command line of this run, without the name of the program.
/// `is_at_limit`: whether a process has almost no free descriptor. For such a one the command frees the descriptors, too.
pub fn line(
    run: &Run,
    config: &Config,
    rows: &[Row<'_>],
    words: &[String],
    is_at_limit: &dyn Fn(ProcessId) -> bool,
) -> Option<String> {
    let planned = || rows.iter().filter(|row| row.counts.planned > 0);
    let reclaim = || "--reclaim".to_owned();
    // The most urgent row, with what frees its descriptors; else the first one.
    let selected = |rows: &mut dyn Iterator<Item = &Row<'_>>| {
        let rows: Vec<&Row<'_>> = rows.collect();
        let full = first_at_limit(&rows, config, is_at_limit);
        let full = full.and_then(|row| Some([selector(row)?, vec![reclaim()]].concat()));
        full.or_else(|| rows.iter().find_map(|row| selector(row)))
    };
    let typed = |more: &[String]| command(&[words, more].concat());
    let without_dry_run = |more: &[String]| command(&[&without_dry_run(words), more].concat());
    let command = match config.action {
        Action::List => match selected(&mut rows.iter()) {
            Some(selected) => typed(&[&selected[..], &["-n".to_owned()]].concat()),
            None if rows.is_empty() && run.scan.coverage.may_be_elsewhere() => {
                typed(&["--all-netns".to_owned()])
            }
            None => None,
        },
        Action::DryRun if config.selects => {
            let planned: Vec<&Row<'_>> = planned().collect();
            let full = first_at_limit(&planned, config, is_at_limit).map(|_| reclaim());
            let first = planned.first();
            first.and_then(|_| without_dry_run(&Vec::from_iter(full)))
        }
        Action::DryRun => selected(&mut planned()).and_then(|selected| without_dry_run(&selected)),
        Action::Act => return after_an_act(run, config, rows, words),
    };
    command.map(|command| format!("next: {command}"))
}

/// Of so many processes cwkill looks whether they are at their limit: those with the most sockets.
const MAX_LOOKED_AT: usize = 64;

/// The first row with a process that has almost no free descriptor; `None` also if descriptors are to be freed anyway.
fn first_at_limit<'a, 'r>(
    rows: &[&'a Row<'r>],
    config: &Config,
    is_at_limit: &dyn Fn(ProcessId) -> bool,
) -> Option<&'a Row<'r>> {
    let processes = rows
        .iter()
        .flat_map(|row| row.processes.iter().map(move |process| (*row, *process)));
    let mut first = processes.take(MAX_LOOKED_AT);
    let full = first.find(|(_, process)| config.reclaim.is_none() && is_at_limit(*process));
    full.map(|(row, _)| row)
}

/// After an act: the same command, if nothing but `--max-kills` kept sockets; why sockets leak that could not be closed; or how to free
/// the descriptors of those that were.
fn after_an_act(run: &Run, config: &Config, rows: &[Row<'_>], words: &[String]) -> Option<String> {
    let next = |words: Vec<String>| command(&words).map(|command| format!("next: {command}"));
    if let Some([dead]) = run.dead_descriptors.as_deref() {
        return match dead.closable {
            0 => of_advice(&run.advice),
            _ => Some(format!("next: {}", dead.command)),
        };
    }
    let left = run.scan.targets.iter().filter_map(|target| target.outcome);
    let mut left = left
        .filter(|outcome| matches!(outcome, Outcome::Skipped(_) | Outcome::Failed))
        .peekable();
    let is_over = |outcome| outcome == Outcome::Skipped(SkipReason::OverMaxKills);
    if left.peek().is_some() && left.all(is_over) {
        return next(words.to_vec());
    }
    let mut left = rows
        .iter()
        .filter(|row| row.counts.kept + row.counts.failed > 0);
    if let Some(owner) = left.find_map(owner) {
        let mut words = [vec!["diagnose".to_owned()], owner].concat();
        match &config.netns {
            NetnsScope::Current => {}
            NetnsScope::Named(name) => words.extend(["--netns".to_owned(), name.clone()]),
            NetnsScope::All => words.push("--all-netns".to_owned()),
        }
        return next(words);
    }
    if run.reclaim_requested {
        return of_advice(&run.advice);
    }
    let mut open = rows.iter().filter(|row| row.counts.open > 0);
    let words = [vec!["reclaim".to_owned()], open.find_map(owner)?].concat();
    command(&words).map(|command| format!("next, in a minute: {command}"))
}

/// The first command of the advice about descriptors that were kept. One that ignores the safety checks, and so can lose bytes, is only
/// named if there is no other.
pub(in crate::report) fn of_advice(advice: &[Advice]) -> Option<String> {
    let first = |one: &&Advice| one.commands.first().cloned();
    let with_command = || advice.iter().filter(|one| first(one).is_some());
    let is_safe = |one: &&Advice| first(one).is_some_and(|it| !it.contains("--reclaim-force"));
    let advice = with_command()
        .find(is_safe)
        .or_else(|| with_command().next())?;
    let command = &advice.commands[0];
    Some(match &advice.after {
        Some(time) => format!("next, in {time}: {command}"),
        None => format!("next: {command}"),
    })
}

/// Selects the owners of a row.
fn owner(row: &Row<'_>) -> Option<Vec<String>> {
    let process = row.process()?;
    // A name may have characters that a pattern has.
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_.+:/ ".contains(c);
    Some(
        match row.is_folded() && process.comm.chars().all(is_plain) {
            true => vec!["--process".into(), process.comm.clone()],
            false => vec!["--pid".into(), process.id.pid.to_string()],
        },
    )
}

/// Selects the sockets of a row.
fn selector(row: &Row<'_>) -> Option<Vec<String>> {
    match row.subject {
        Subject::Process(_) => owner(row),
        Subject::Listener(listener) => {
            Some(vec!["--port".into(), listener.local.port().to_string()])
        }
        Subject::Unknown | Subject::Kernel => None,
    }
}

/// A command line to paste; `None` if a word has characters that must not reach a terminal.
pub(in crate::report) fn command(words: &[String]) -> Option<String> {
    let is_safe = |word: &String| escape(word) == *word;
    let words: Vec<String> = ["cwkill".to_owned()]
        .into_iter()
        .chain(words.iter().cloned())
        .collect();
    words.iter().all(is_safe).then(|| shell_line(&words))
}

/// The command line without `--dry-run`.
pub(in crate::report) fn without_dry_run(words: &[String]) -> Vec<String> {
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
    use crate::proc::testdata::process;

    #[test]
    fn what_may_lose_bytes_is_named_last() {
        let advice = |after: Option<&str>, command: &str| Advice {
            process: process(7, "app"),
            kept: 1,
            code: "unread",
            text: String::new(),
            after: after.map(str::to_owned),
            commands: vec![command.to_owned()],
        };
        let forced = advice(None, "cwkill reclaim --pid 7 --reclaim-force");
        let later = advice(Some("1 minute"), "cwkill reclaim --pid 7");
        let next = of_advice(&[forced.clone(), later]);
        assert_eq!(next.unwrap(), "next, in 1 minute: cwkill reclaim --pid 7");
        let next = of_advice(&[forced]);
        assert_eq!(
            next.unwrap(),
            "next: cwkill reclaim --pid 7 --reclaim-force"
        );
    }

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
