//! The commands inside the sentences of the documents: inline code that begins with `cwkill` and has arguments. Each must be a valid
//! command line, and the sentence must not say of a command that closes that it shows, or the other way round.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Parser;
use cwkill::cli::{Cli, Command};
use cwkill::config::{Action, Config, GatewayConfig, ReclaimConfig};

use crate::trial::{Test, once};

pub const TESTS: &[Test] = &[
    once!(commands_inside_sentences_do_what_the_sentences_say),
    once!(a_sentence_that_says_the_wrong_thing_is_found),
    once!(what_to_type_instead_of_other_tools_does_the_same),
];

/// What a sentence says of a command that looks.
const LOOKS: [&str; 12] = [
    "show", "list", "print", "report", "find", "say", "count", "tell", "name", "answer", "check",
    "display",
];
/// What a sentence says of a command that acts.
const ACTS: [&str; 10] = [
    "close", "free", "kill", "drain", "destroy", "reset", "remove", "reclaim", "act", "abort",
];

/// A command inside a sentence.
#[derive(Debug)]
struct Mention {
    line: usize,
    command: String,
    sentence: String,
    /// The sentence behind the command.
    rest: String,
}

fn markdown(directory: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            markdown(&path, found)?;
        } else if path.extension().is_some_and(|extension| extension == "md") {
            found.push(path);
        }
    }
    Ok(())
}

/// The commands inside the sentences of a document. Fenced blocks are no sentences, and neither are tables.
fn mentions(text: &str) -> Vec<Mention> {
    let mut mentions = Vec::new();
    let mut fenced = false;
    // A paragraph with the number of its first line.
    let (mut first, mut paragraph) = (0, String::new());
    for (number, line) in (1..).zip(text.lines().chain([""])) {
        let is_fence = line.trim_start().starts_with("```");
        fenced ^= is_fence;
        let is_text = !is_fence && !fenced && !line.starts_with('|');
        if is_text && !line.trim().is_empty() {
            if paragraph.is_empty() {
                first = number;
            }
            paragraph += line.trim();
            paragraph.push(' ');
            continue;
        }
        let spans: Vec<&str> = paragraph.split('`').collect();
        for (index, span) in spans.iter().enumerate().filter(|(index, _)| index % 2 == 1) {
            if !span.starts_with("cwkill ") {
                continue;
            }
            // A sentence ends at a full stop before a space, outside of code.
            let code = |part: &str| part.replace(". ", ".\u{a0}");
            let part = |(at, part): (usize, &&str)| match at % 2 {
                0 => (*part).to_owned(),
                _ => format!("`{}`", code(part)),
            };
            let before: String = spans[..index].iter().enumerate().map(part).collect();
            let after: String = spans[index + 1..].iter().enumerate().map(part).collect();
            let begin = before.rfind(". ").map_or(0, |at| at + 2);
            let end = after.find(". ").unwrap_or(after.len());
            mentions.push(Mention {
                line: first,
                command: (*span).to_owned(),
                sentence: format!("{}`{span}`{}", &before[begin..], &after[..end]),
                rest: after[..end].to_owned(),
            });
        }
        paragraph.clear();
    }
    mentions
}

/// Whether the command acts.
fn acts(command: &str) -> Result<bool> {
    // `PID` and the like stand for a value.
    let word = |word: &str| match word {
        "PID" | "$pid" | "N" => "4711".to_owned(),
        "SHELL" => "bash".to_owned(),
        _ => word.trim_matches(['\'', '"']).to_owned(),
    };
    let words = command.split_whitespace().map(word);
    let cli = match Cli::try_parse_from(words) {
        Ok(cli) => cli,
        // `cwkill --help` and the like.
        Err(error) if !error.use_stderr() => return Ok(false),
        Err(error) => return Err(error.into()),
    };
    Ok(match cli.command {
        None => Config::from_args(cli.args)?.action == Action::Act,
        Some(Command::Reclaim(args)) => ReclaimConfig::from_args(args)?.action == Action::Act,
        Some(Command::Gateway(args)) => GatewayConfig::from_args(args)?.action == Action::Act,
        Some(_) => false,
    })
}

/// Whether a word is one of these verbs, in any form.
fn is_one_of(word: &str, verbs: &[&str]) -> bool {
    let word = word
        .trim_matches(|c: char| !c.is_alphabetic())
        .to_lowercase();
    verbs.iter().any(|verb| {
        let stem = verb.strip_suffix('e').unwrap_or(verb);
        let endings = ["", "e", "s", "es", "ed", "d", "ing", "ies"];
        endings
            .iter()
            .any(|ending| word == format!("{verb}{ending}") || word == format!("{stem}{ending}"))
    })
}

/// What is wrong with the commands in the sentences of a document.
fn wrong(text: &str) -> Vec<String> {
    let mut wrong = Vec::new();
    for Mention {
        line,
        command,
        sentence,
        rest,
    } in mentions(text)
    {
        let verb = rest.split_whitespace().next().unwrap_or_default();
        let why = match acts(&command) {
            Err(error) => format!("is not a command: {error}"),
            Ok(true) if is_one_of(verb, &LOOKS) => {
                "closes, and the sentence says that it looks".to_owned()
            }
            Ok(true)
                if !sentence
                    .split_whitespace()
                    .any(|word| is_one_of(word, &ACTS)) =>
            {
                "closes, and the sentence does not say so".to_owned()
            }
            Ok(false) if is_one_of(verb, &ACTS) => {
                "only looks, and the sentence says that it acts".to_owned()
            }
            Ok(_) => continue,
        };
        wrong.push(format!("line {line}: `{command}` {why}: {sentence}"));
    }
    wrong
}

fn commands_inside_sentences_do_what_the_sentences_say() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut paths = vec![root.join("README.md"), root.join("CONTRIBUTING.md")];
    markdown(&root.join("docs"), &mut paths)?;
    let (mut all, mut seen) = (Vec::new(), 0);
    for path in paths {
        let text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        seen += mentions(&text).len();
        let wrong = wrong(&text);
        all.extend(wrong.iter().map(|why| format!("{}: {why}", path.display())));
    }
    assert!(seen > 3, "the search found {seen} commands");
    assert!(all.is_empty(), "{}", all.join("\n"));
    Ok(())
}

/// The other tools reset a connection that is in use, and so do the commands beside them in the tables.
fn what_to_type_instead_of_other_tools_does_the_same() -> Result<()> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/other-tools.md");
    let text = std::fs::read_to_string(path)?;
    let (_, tables) = text
        .split_once("## What to type instead")
        .context("no such part")?;
    let mut open = 0;
    for line in tables.lines().filter(|line| line.starts_with('|')) {
        for command in line.split('`').skip(1).step_by(2) {
            if !command.starts_with("cwkill ") || command == "cwkill gateway" {
                continue;
            }
            let acts = acts(command).with_context(|| command.to_owned())?;
            assert!(acts, "{command} does not act");
            if command.contains("--state established") {
                open += 1;
                let aborts = "--method destroy --discard-unsent";
                assert!(command.contains(aborts), "{command}");
                let takes_any = ["--active", "--watch"];
                assert!(
                    takes_any.iter().any(|any| command.contains(any)),
                    "{command}"
                );
            }
        }
    }
    assert!(open > 9, "the search found {open} commands");
    Ok(())
}

fn a_sentence_that_says_the_wrong_thing_is_found() -> Result<()> {
    for right in [
        "The sockets are young (`cwkill --min-age 10m` shows few): wait.",
        "Run `cwkill reclaim` and look.",
        "`cwkill --port 8080` closes them.",
        "To close the oldest, run `cwkill --port 8080 --max-kills 1`.",
        "`cwkill --port 8080 -n` shows the plan.",
        "Then `cwkill reclaim --pid PID` frees the descriptors.",
        "```\n`cwkill --no-such-option`\n```",
        "`cwkill` shows them.",
        "`cwkill --help` shows all options.",
    ] {
        assert_eq!(wrong(right), Vec::<String>::new(), "{right}");
    }
    for (bad, why) in [
        ("`cwkill --port 8080` shows them.", "says that it looks"),
        (
            "`cwkill --process java,python3` lists few.",
            "says that it looks",
        ),
        ("See `cwkill --port 8080`. It closes.", "does not say so"),
        (
            "`cwkill --min-age 10m` closes old ones.",
            "says that it acts",
        ),
        ("`cwkill reclaim` frees them.", "says that it acts"),
        ("Or let `cwkill reclaim` close them.", "says that it acts"),
        ("Use `cwkill --no-such-option`.", "is not a command"),
        ("Use `cwkill --port 80x`.", "is not a command"),
        ("Use `cwkill --max-kills 1`.", "is not a command"),
    ] {
        let found = wrong(bad);
        assert!(
            found.len() == 1 && found[0].contains(why),
            "{bad}: {found:?}"
        );
    }
    let text = "One.\nTwo is long, and\n`cwkill --port 8080` shows.\n";
    assert_eq!(mentions(text)[0].line, 1);
    Ok(())
}
