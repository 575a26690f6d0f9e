//! The shell completions know every command and option.

use std::process::Command;

use anyhow::{Context, Result};
use clap::CommandFactory;
use clap_complete::Shell;

use crate::cli::options;
use crate::support::CWKILL;
use crate::trial::{Test, once};

pub const TESTS: &[Test] = &[
    once!(bash_completes_every_option_and_command),
    once!(zsh_and_fish_complete_every_option_and_command),
];

/// The completion script that cwkill prints.
fn completion(shell: Shell) -> Result<String> {
    let shell = shell.to_string();
    let output = Command::new(CWKILL)
        .args(["completions", &shell])
        .output()?;
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "{output:?}"
    );
    Ok(String::from_utf8(output.stdout)?)
}

fn built() -> clap::Command {
    let mut command = cwkill::cli::Cli::command();
    command.build();
    command
}

/// For each command: the words before the cursor, and the options that the shell must offer.
fn wanted() -> Vec<(String, Vec<String>)> {
    let root = built();
    let own = ("cwkill".to_owned(), options(&root));
    let named = root.get_subcommands().map(|command| {
        let line = format!("cwkill {}", command.get_name());
        (line, options(command))
    });
    std::iter::once(own).chain(named).collect()
}

fn bash_completes_every_option_and_command() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("cwkill.bash");
    std::fs::write(&file, completion(Shell::Bash)?)?;
    // Calls the completion function as bash does when Tab is pressed behind `line`.
    let offered = |line: &str| -> Result<Vec<String>> {
        let script = format!(
            "source {} && COMP_WORDS=({line}) && COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)) && \
             _cwkill cwkill \"${{COMP_WORDS[COMP_CWORD]}}\" \"${{COMP_WORDS[COMP_CWORD-1]}}\"; \
             printf '%s\\n' \"${{COMPREPLY[@]}}\"",
            file.display()
        );
        let output = Command::new("bash").args(["-c", &script]).output();
        let output = output.context("run bash")?;
        assert!(output.stderr.is_empty(), "{line}: {output:?}");
        let stdout = String::from_utf8(output.stdout)?;
        Ok(stdout.lines().map(str::to_owned).collect())
    };
    for (line, options) in wanted() {
        let offered = offered(&format!("{line} -"))?;
        for option in options {
            assert!(offered.contains(&option), "{line} {option}: {offered:?}");
        }
    }
    assert_eq!(offered("cwkill --por")?, ["--port"]);
    assert_eq!(offered("cwkill --method d")?, ["destroy"]);
    assert_eq!(offered("cwkill --cause u")?, ["unread"]);
    assert_eq!(offered("cwkill diagnose --state last")?, ["last-ack"]);
    let first = offered("cwkill ''")?;
    for command in built().get_subcommands() {
        let name = command.get_name().to_owned();
        assert!(first.contains(&name), "{name}: {first:?}");
    }
    Ok(())
}

fn zsh_and_fish_complete_every_option_and_command() -> Result<()> {
    let root = built();
    let (zsh, fish) = (completion(Shell::Zsh)?, completion(Shell::Fish)?);
    // The process that reads symbols for `cwkill trace` is not for people.
    for script in [&zsh, &fish, &completion(Shell::Bash)?] {
        assert!(!script.contains("symbols"), "{script}");
    }
    for (line, options) in wanted() {
        let name = line.split(' ').nth(1);
        // The part for one command: zsh has a branch for it, fish a condition in each line.
        let zsh = match name {
            None => zsh.split("case $state in").next().unwrap_or_default(),
            Some(name) => {
                let start = format!("({name})\n");
                let (_, part) = zsh.split_once(&start).context(start)?;
                part.split("\n;;").next().unwrap_or_default()
            }
        };
        let fish: Vec<&str> = match name {
            None => fish
                .lines()
                .filter(|l| !l.contains("using_subcommand"))
                .collect(),
            Some(name) => {
                let condition = format!("subcommand {name}\"");
                fish.lines().filter(|l| l.contains(&condition)).collect()
            }
        };
        for option in options {
            let quoted = ["[", "=", "+"].map(|end| format!("{option}{end}"));
            assert!(
                quoted.iter().any(|text| zsh.contains(text)),
                "zsh: {line} {option}"
            );
            let spelled = match option.strip_prefix("--") {
                Some(long) => format!(" -l {long} "),
                None => format!(" -s {} ", &option[1..]),
            };
            assert!(
                fish.iter().any(|l| format!("{l} ").contains(&spelled)),
                "fish: {line} {option}"
            );
        }
    }
    for command in root.get_subcommands() {
        let name = command.get_name();
        assert!(zsh.contains(&format!("'{name}:")), "zsh: {name}");
        assert!(fish.contains(&format!(" -a \"{name}\"")), "fish: {name}");
    }
    Ok(())
}
