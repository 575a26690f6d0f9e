//! The message for an expression that cannot be parsed, with a caret below the error.

use std::fmt;
use std::ops::Range;

/// An expression that cannot be parsed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SyntaxError {
    /// The whole expression.
    text: String,
    /// The wrong bytes of it; an empty range at its end if something is missing.
    wrong: Range<usize>,
    message: String,
    example: String,
}

/// The number of characters of a long expression that are shown on each side of the error.
const CONTEXT_CHARACTERS: usize = 40;

impl SyntaxError {
    pub(super) fn new(text: &str, wrong: Range<usize>, message: String, example: String) -> Self {
        SyntaxError {
            text: text.to_owned(),
            wrong,
            message,
            example,
        }
    }

    /// The column of the error, in characters, the first being 1.
    pub fn column(&self) -> usize {
        self.text[..self.wrong.start].chars().count() + 1
    }
}

/// Replaces white space and control characters by a character of one column, so that the caret stands below the error.
fn plain(c: char) -> char {
    match c {
        _ if c.is_whitespace() => ' ',
        _ if c.is_control() => '\u{fffd}',
        _ => c,
    }
}

/// A part of an expression for a message: in quotes, and cut if it is long.
pub(super) fn quoted(text: &str) -> String {
    let mut shown: String = text.chars().map(plain).take(CONTEXT_CHARACTERS).collect();
    if text.chars().nth(CONTEXT_CHARACTERS).is_some() {
        shown.push('…');
    }
    format!("`{shown}`")
}

impl fmt::Display for SyntaxError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |text: &str| -> Vec<char> { text.chars().map(plain).collect() };
        let before = shown(&self.text[..self.wrong.start]);
        let wrong = shown(&self.text[self.wrong.clone()]);
        let after = shown(&self.text[self.wrong.end..]);

        let cut_before = before.len().saturating_sub(CONTEXT_CHARACTERS);
        let cut_wrong = wrong.len().min(CONTEXT_CHARACTERS);
        let cut_after = after.len().min(CONTEXT_CHARACTERS);
        let left: String = before[cut_before..].iter().collect();
        let middle: String = wrong[..cut_wrong].iter().collect();
        let right: String = match cut_wrong == wrong.len() {
            true => after[..cut_after].iter().collect(),
            false => String::new(),
        };
        let start = if cut_before > 0 { "…" } else { "" };
        let end = match cut_wrong < wrong.len() || cut_after < after.len() {
            true => "…",
            false => "",
        };
        writeln!(f, "column {}: {}", self.column(), self.message)?;
        writeln!(f, "    {start}{left}{middle}{right}{end}")?;
        let indent = start.chars().count() + before.len() - cut_before;
        let carets = "^".repeat(cut_wrong.max(1));
        writeln!(f, "    {}{carets}", " ".repeat(indent))?;
        write!(f, "  for example: {}", self.example)
    }
}

impl std::error::Error for SyntaxError {}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(text: &str, wrong: Range<usize>) -> String {
        SyntaxError::new(text, wrong, "bad".into(), "sport = :80".into()).to_string()
    }

    #[test]
    fn the_caret_stands_below_the_error() {
        assert_eq!(
            error("sport = :8O8O and", 8..13),
            "column 9: bad\n    sport = :8O8O and\n            ^^^^^\n  for example: sport = :80"
        );
        assert_eq!(
            error("ä\tsport", 8..8),
            "column 8: bad\n    ä sport\n           ^\n  for example: sport = :80"
        );
    }

    #[test]
    fn a_long_expression_is_shown_around_the_error() {
        let text = format!("{}!!{}", "a".repeat(60_000), "b".repeat(60_000));
        let shown = error(&text, 60_000..60_002);
        let lines: Vec<&str> = shown.lines().collect();
        assert_eq!(lines[0], "column 60001: bad");
        let (a, b) = ("a".repeat(40), "b".repeat(40));
        assert_eq!(lines[1], format!("    …{a}!!{b}…"));
        assert_eq!(lines[2], format!("    {}^^", " ".repeat(41)));
        assert!(error(&text, 0..text.len()).len() < 500);
        assert_eq!(quoted(&text), format!("`{a}…`"));
        assert_eq!(quoted("80\u{7}"), "`80\u{fffd}`");
    }
}
