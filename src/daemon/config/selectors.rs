//! `match` and `methods`: the options of the command line, read by its own parser, so that they mean the same and are refused for the
//! same reasons.

use clap::Parser;
use toml::{Spanned, Value};

use super::error::{ConfigError, Source, no_such_field};
use super::raw::MatchTable;
use super::reader::{items, shown, text};
use crate::cli::{Args, Cli, Selection, example_value, flat};
use crate::config::methods;
use crate::filter::Scope;
use crate::model::Method;

/// Options of [`Selection`] that are not fields of `match`, and where they belong.
const ELSEWHERE: [(&str, &str); 5] = [
    (
        "min_age",
        "`min_age` is a field of the policy, not of `match`: write it on a line of its own, for example min_age = \"10m\"",
    ),
    (
        "min_idle",
        "`min_idle` is a field of the policy, not of `match`: write it on a line of its own, for example min_idle = \"1m\"",
    ),
    (
        "all_netns",
        "which namespaces are looked into is for all policies: write all_netns = true in [daemon]; for one namespace use `netns`",
    ),
    (
        "host_root",
        "where the names of containers are is for all policies: write host_root = \"/host\" in [daemon]",
    ),
    ("bpf", "`bpf` is not a selector, and the daemon decides it"),
];

/// The expression of ss(8), which the command line takes without an option.
const EXPRESSION: &str = "expression";

/// What a policy selects.
#[derive(Clone, Debug)]
pub(super) struct Matched {
    pub scope: Scope,
    /// Whether it names the sockets. If it only narrows, it does not suffice to act, as on the command line.
    pub names_targets: bool,
    /// The options of the command line with the same meaning.
    pub words: Vec<String>,
}

/// The fields of `match`: the long options of [`Selection`] with `_`, whether they take a value, and the expression.
fn fields() -> Vec<(String, bool)> {
    let command = <Selection as clap::Args>::augment_args(clap::Command::new("match"));
    let options = command.get_arguments().filter_map(|argument| {
        let field = argument.get_long()?.replace('-', "_");
        Some((field, argument.get_action().takes_values()))
    });
    let is_selector =
        |(field, _): &(String, bool)| ELSEWHERE.iter().all(|(other, _)| other != field);
    let expression = (EXPRESSION.to_owned(), true);
    options.filter(is_selector).chain([expression]).collect()
}

/// Reads `match`.
pub(super) fn read(
    source: Source<'_>,
    table: &Spanned<MatchTable>,
) -> Result<Matched, ConfigError> {
    let known = fields();
    let mut options = Vec::new();
    let mut expression = None;
    for (key, value) in table.get_ref() {
        let field = key.get_ref().as_str();
        if let Some((_, why)) = ELSEWHERE.iter().find(|(other, _)| *other == field) {
            return Err(source.error(&key.span(), *why));
        }
        let Some((_, takes_value)) = known.iter().find(|(known, _)| known == field) else {
            let names: Vec<&str> = known.iter().map(|(name, _)| name.as_str()).collect();
            return Err(source.error(&key.span(), no_such_field(field, &names)));
        };
        let wrong = |why: String| source.error(&value.span(), format!("`{field}`: {why}"));
        if field == EXPRESSION {
            let text = text(value.get_ref()).map_err(wrong)?;
            let words = ["--".to_owned(), text];
            let parsed = parse(&words).and_then(|args| scope(args.selection));
            parsed.map_err(wrong)?;
            expression = Some(words);
            continue;
        }
        let words = words(field, *takes_value, value.get_ref()).map_err(wrong)?;
        for word in words {
            parse(std::slice::from_ref(&word)).map_err(wrong)?;
            options.push(word);
        }
    }
    options.extend(expression.into_iter().flatten());
    let together = |why: String| source.error(&table.span(), format!("`match`: {why}"));
    if options.is_empty() {
        return Err(together(
            "is empty; for example match = { port = 8080 }, or for everything match = { all = true }".to_owned(),
        ));
    }
    let selection = parse(&options).map_err(together)?.selection;
    let names_targets = selection.names_targets();
    let scope = scope(selection).map_err(together)?;
    Ok(Matched {
        names_targets: names_targets || scope.selectors.expression.says_more_than_states(),
        scope,
        words: options,
    })
}

/// The words of the command line for a field.
fn words(field: &str, takes_value: bool, value: &Value) -> Result<Vec<String>, String> {
    let option = field.replace('_', "-");
    if !takes_value {
        return match value {
            Value::Boolean(true) => Ok(vec![format!("--{option}")]),
            other => Err(format!(
                "{} is not a value for it: write {field} = true, or leave it out",
                shown(other)
            )),
        };
    }
    let word = |value: &Value| match value {
        Value::String(text) => Ok(format!("--{option}={text}")),
        Value::Integer(number) => Ok(format!("--{option}={number}")),
        other => {
            let example = example_value(&option).unwrap_or("VALUE").trim_matches('\'');
            Err(format!(
                "{} is not a value for it; for example {field} = \"{example}\"",
                shown(other)
            ))
        }
    };
    items(value).iter().map(word).collect()
}

/// Reads `methods`, in order.
pub(super) fn read_methods(value: &Value) -> Result<Vec<Method>, String> {
    let words = words("method", true, value)?;
    for word in &words {
        parse(std::slice::from_ref(word))?;
    }
    let args = parse(&words)?;
    methods(&flat(args.acting.method)).map_err(|error| message(&error))
}

/// The arguments of the command line in these words.
fn parse(words: &[String]) -> Result<Args, String> {
    let line = std::iter::once("cwkill").chain(words.iter().map(String::as_str));
    Cli::try_parse_from(line)
        .map(|cli| cli.args)
        .map_err(|error| message(&error))
}

fn scope(selection: Selection) -> Result<Scope, String> {
    Scope::from_args(selection).map_err(|error| message(&error))
}

/// The reason in an error of the command line, without its usage.
fn message(error: &clap::Error) -> String {
    if let Some(reason) = std::error::Error::source(error) {
        return reason.to_string();
    }
    let text = error.to_string();
    let message = text.split("\n\n").next().unwrap_or_default();
    let message = message.strip_prefix("error: ").unwrap_or(message);
    message
        .split('\n')
        .map(str::trim)
        .collect::<Vec<_>>()
        .join(" ")
}
