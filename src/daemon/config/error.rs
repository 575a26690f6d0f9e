//! Errors in the files of the configuration: where, what, and what to write instead.

use std::fmt;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::text::escape;

/// A name is probably meant at this similarity or more (Jaro-Winkler, 1.0 is equal).
const SIMILAR_FROM: f64 = 0.8;

/// Why the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file says something that it must not say.
    #[error("{}:{place}: {message}", file.display())]
    Wrong {
        file: PathBuf,
        place: Place,
        message: String,
    },
    /// A file or directory cannot be read.
    #[error("cannot read {}: {error}", path.display())]
    Unreadable { path: PathBuf, error: io::Error },
}

/// A place in a file, counted from 1. The column counts characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub line: usize,
    pub column: usize,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.line, self.column)
    }
}

/// A file with its text, to turn byte offsets into places.
#[derive(Clone, Copy, Debug)]
pub(super) struct Source<'t> {
    pub path: &'t Path,
    pub text: &'t str,
}

impl Source<'_> {
    /// The place of the first byte of `span`.
    pub fn place(&self, span: &Range<usize>) -> Place {
        let start = span.start.min(self.text.len());
        let before = self.text.get(..start).unwrap_or_default();
        let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
        Place {
            line: before.matches('\n').count() + 1,
            column: before[line_start..].chars().count() + 1,
        }
    }

    /// An error at the start of `span`.
    pub fn error(&self, span: &Range<usize>, message: impl Into<String>) -> ConfigError {
        ConfigError::Wrong {
            file: self.path.to_owned(),
            place: self.place(span),
            message: message.into(),
        }
    }

    /// An error of the parser, with its message made readable.
    pub fn syntax_error(&self, error: &toml::de::Error) -> ConfigError {
        let span = error.span().unwrap_or(0..0);
        let message = unknown_field(error.message())
            .or_else(|| missing_field(error.message()))
            .unwrap_or_else(|| escape(error.message()));
        self.error(&span, message)
    }
}

/// The message for a field that does not exist. `message` is the one of serde, which names the fields that exist.
fn unknown_field(message: &str) -> Option<String> {
    let rest = message.strip_prefix("unknown field `")?;
    let (field, rest) = rest.split_once("`, expected ")?;
    // Each second part is a name: "one of `a`, `b`", "`a` or `b`", "`a`".
    let names: Vec<&str> = rest.split('`').skip(1).step_by(2).collect();
    Some(no_such_field(field, &names))
}

/// The message for a table without a field that it needs.
fn missing_field(message: &str) -> Option<String> {
    let field = message.strip_prefix("missing field `")?.strip_suffix('`')?;
    let example = match field {
        "name" => "name = \"tomcat-leak\"",
        "match" => "match = { port = 8080 }, or for everything match = { all = true }",
        _ => return Some(format!("`{field}` is missing")),
    };
    Some(format!("`{field}` is missing; for example {example}"))
}

/// The message for a `field` that does not exist among `names`.
pub(super) fn no_such_field(field: &str, names: &[&str]) -> String {
    let known = match near(field, names.iter().copied()) {
        Some(near) => format!("did you mean `{near}`?"),
        None => format!("the fields are {}", names.join(", ")),
    };
    format!("there is no field `{}` here; {known}", escape(field))
}

/// The name that is probably meant.
pub(super) fn near<'n>(word: &str, names: impl Iterator<Item = &'n str>) -> Option<&'n str> {
    let word = word.replace('-', "_");
    let similarity = |name: &str| strsim::jaro_winkler(&word, name);
    names
        .filter(|name| similarity(name) >= SIMILAR_FROM)
        .max_by(|a, b| similarity(a).total_cmp(&similarity(b)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_counts_characters() {
        let source = Source {
            path: Path::new("a.toml"),
            text: "a = 1\nü = \"é\" # x\n",
        };
        let place = |start| source.place(&(start..start)).to_string();
        assert_eq!(place(0), "1:1");
        assert_eq!(place(6), "2:1");
        assert_eq!(place(11), "2:5");
        assert_eq!(place(99), "3:1");
        // Inside a character: the line is still known.
        assert_eq!(place(7), "1:1");
    }

    #[test]
    fn an_unknown_field_gets_its_neighbour() {
        let said = |message| unknown_field(message).unwrap();
        assert_eq!(
            said("unknown field `intervall`, expected one of `interval`, `listen`"),
            "there is no field `intervall` here; did you mean `interval`?"
        );
        assert_eq!(
            said("unknown field `min-age`, expected `min_age` or `name`"),
            "there is no field `min-age` here; did you mean `min_age`?"
        );
        assert_eq!(
            said("unknown field `x`, expected `units`"),
            "there is no field `x` here; the fields are units"
        );
        assert_eq!(unknown_field("invalid type"), None);
    }
}
