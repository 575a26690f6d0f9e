//! The command line as a person meets it: bad input, help, and the documents that describe it.

use anyhow::{Context, Result, ensure};
use clap::CommandFactory;
use netns_harness::Family;

use crate::Case::{self, Once};
use crate::support::{cwkill, lab, same};

pub const CASES: &[Case] = &[
    Once("bad_values_are_named_and_nothing_is_done", bad_values),
    Once("every_option_is_in_the_man_page", man_page),
    Once("options_named_in_the_readme_exist", readme),
];

/// A bad command line, what the error must name, and what good value it must show.
const BAD: &[(&str, &str, &str)] = &[
    ("--port 80x", "80x", "8080"),
    ("--port 0", "`0`", "8080"),
    ("--port 70000", "70000", "8080"),
    ("--port 9000-8000", "9000-8000", "8000-9000"),
    ("--port ,", "--port", "8080"),
    ("--peer-port http", "http", "8080"),
    ("--local 10.0.0", "10.0.0", "192.0.2.0/24"),
    ("--peer 10.0.0.0/33", "10.0.0.0/33", "192.0.2.0/24"),
    ("--pid java", "java", "4711"),
    ("--pid 0", "'0'", "4711"),
    ("--process [", "[", "php-fpm*"),
    ("--user no-such-user-here", "no-such-user-here", "www-data"),
    ("--state closed-wait", "closed-wait", "close-wait"),
    ("--min-age 90", "90", "90s"),
    ("--min-age soon", "soon", "90s"),
    ("--cause leak", "leak", "drained"),
    ("--all --method kill", "kill", "shutdown"),
    ("--all --grace=-1s", "-1s", "90s"),
    ("--all --max-kills 0", "'0'", "--dry-run"),
    ("--all --max-kills many", "many", "number"),
    ("--method destroy", "--method", "--port 8080"),
    ("--max-kills 3", "--max-kills", "--all"),
    ("--frobnicate", "--frobnicate", "--help"),
    ("--all -4 -6", "--ipv6", "--help"),
    ("--all --json --jsonl", "--jsonl", "--help"),
    ("--color blue", "blue", "never"),
];

fn bad_values() -> Result<()> {
    let (lab, _leak) = lab("unread", Family::V4, 1)?;
    let before = lab.app_host().ss(&[])?;
    for (line, named, good) in BAD {
        let ran = cwkill(&lab, line)?.exits(2)?;
        ensure!(ran.stdout.is_empty(), "{line}: {ran:#?}");
        let has = |text: &str| ran.stderr.contains(text);
        ensure!(
            has(named) && has(good),
            "{line}: wanted {named} and {good}: {ran:#?}"
        );
    }
    same(&lab.app_host().ss(&[])?, &before)
}

fn document(name: &str) -> Result<String> {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join(name);
    std::fs::read_to_string(&path).with_context(|| path.display().to_string())
}

fn options() -> Vec<String> {
    let mut command = cwkill::cli::Args::command();
    command.build();
    let mut options = Vec::new();
    for argument in command.get_arguments() {
        options.extend(argument.get_short().map(|short| format!("-{short}")));
        let longs = argument.get_long_and_visible_aliases().unwrap_or_default();
        options.extend(longs.into_iter().map(|long| format!("--{long}")));
    }
    options
}

fn man_page() -> Result<()> {
    // roff writes a dash as `\-`; a word ends at anything that cannot be part of an option.
    let text = document("man/cwkill.8")?.replace("\\-", "-");
    let words: std::collections::HashSet<&str> = text
        .split(|c: char| !(c.is_ascii_alphanumeric() || c == '-'))
        .collect();
    let options = options();
    ensure!(
        options.len() > 20,
        "the walk over the options found {options:?}"
    );
    for option in options {
        ensure!(
            words.contains(option.as_str()),
            "{option} is not in man/cwkill.8"
        );
    }
    Ok(())
}

fn readme() -> Result<()> {
    let text = document("README.md")?;
    let known = options();
    for line in text
        .lines()
        .filter(|line| line.trim_start().starts_with("cwkill "))
    {
        let code = line.split(" #").next().unwrap_or_default();
        for word in code
            .split_whitespace()
            .filter(|word| word.starts_with("--"))
        {
            let option = word.split('=').next().unwrap_or_default().to_owned();
            ensure!(
                known.contains(&option),
                "README names {option}, which is no option"
            );
        }
    }
    Ok(())
}
