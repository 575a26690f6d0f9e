//! The words of an expression, and the faults in them: what the grammar of [`super::parse`] is written in.

use std::ops::Range;

use winnow::combinator::{alt, preceded};
use winnow::error::{ErrMode, ParserError};
use winnow::prelude::*;
use winnow::stream::{LocatingSlice, Location, Stateful, Stream};
use winnow::token::take_while;

use super::Services;
use super::syntax_error::quoted;

pub(super) type Input<'i> = Stateful<LocatingSlice<&'i str>, State<'i>>;
pub(super) type Outcome<T> = ModalResult<T, Fault>;

/// What the parser carries along.
#[derive(Clone, Copy, Debug)]
pub(super) struct State<'i> {
    pub(super) services: &'i Services,
    /// Open parentheses.
    pub(super) depth: usize,
    /// Where an `and` follows an `or` without parentheses.
    pub(super) doubt: Option<usize>,
}

/// What is wrong, and where.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Fault {
    pub(super) at: Range<usize>,
    pub(super) what: String,
    pub(super) example: String,
}

impl ParserError<Input<'_>> for Fault {
    type Inner = Self;

    fn from_input(input: &Input<'_>) -> Self {
        let at = input.current_token_start();
        Fault {
            at: at..at,
            ..Fault::default()
        }
    }

    fn into_inner(self) -> Result<Self, Self> {
        Ok(self)
    }
}

impl Fault {
    pub(super) fn new(
        at: Range<usize>,
        what: impl Into<String>,
        example: impl Into<String>,
    ) -> ErrMode<Self> {
        ErrMode::Cut(Fault {
            at,
            what: what.into(),
            example: example.into(),
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Token<'i> {
    Open,
    Close,
    And,
    Or,
    Not,
    Compare(Comparison),
    Word(&'i str),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Comparison {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
}

/// A token, its text, and where it stands.
#[derive(Clone, Debug)]
pub(super) struct Lexeme<'i> {
    pub(super) token: Token<'i>,
    pub(super) text: &'i str,
    pub(super) at: Range<usize>,
}

fn lexeme<'i>(input: &mut Input<'i>) -> Outcome<Lexeme<'i>> {
    use Comparison::*;
    let comparison = alt((
        alt(("==", "=")).value(Equal),
        "!=".value(NotEqual),
        "<=".value(LessOrEqual),
        "<".value(Less),
        ">=".value(GreaterOrEqual),
        ">".value(Greater),
    ));
    let token = alt((
        "(".value(Token::Open),
        ")".value(Token::Close),
        alt(("&&", "&")).value(Token::And),
        alt(("||", "|")).value(Token::Or),
        comparison.map(Token::Compare),
        "!".value(Token::Not),
        take_while(1.., |c: char| !c.is_whitespace() && !"()&|=!<>".contains(c)).map(word),
    ));
    let ((token, text), at) = token.with_taken().with_span().parse_next(input)?;
    Ok(Lexeme { token, text, at })
}

/// Operators that are spelled out.
fn word(text: &str) -> Token<'_> {
    use Comparison::*;
    match text {
        "and" => Token::And,
        "or" => Token::Or,
        "not" => Token::Not,
        "eq" => Token::Compare(Equal),
        "ne" | "neq" => Token::Compare(NotEqual),
        "lt" => Token::Compare(Less),
        "le" | "leq" => Token::Compare(LessOrEqual),
        "gt" => Token::Compare(Greater),
        "ge" | "geq" => Token::Compare(GreaterOrEqual),
        _ => Token::Word(text),
    }
}

/// Takes the next token; `None` at the end.
pub(super) fn next<'i>(input: &mut Input<'i>) -> Option<Lexeme<'i>> {
    preceded(take_while(0.., char::is_whitespace), lexeme)
        .parse_next(input)
        .ok()
}

/// The next token, which is not taken.
pub(super) fn peek<'i>(input: &mut Input<'i>) -> Option<Lexeme<'i>> {
    let before = input.checkpoint();
    let found = next(input);
    input.reset(&before);
    found
}

/// Takes the next token if it is `wanted`.
pub(super) fn take(input: &mut Input<'_>, wanted: Token<'_>) -> bool {
    let here = peek(input).is_some_and(|lexeme| lexeme.token == wanted);
    if here {
        next(input);
    }
    here
}

/// Where the expression ends.
pub(super) fn end(input: &Input<'_>) -> Range<usize> {
    let rest: &str = input.input.as_ref();
    let at = input.current_token_start() + rest.len();
    at..at
}

/// Takes the value of a condition.
pub(super) fn value<'i>(
    input: &mut Input<'i>,
    what: &str,
    example: &str,
) -> Outcome<(&'i str, Range<usize>)> {
    match peek(input) {
        Some(Lexeme {
            token: Token::Word(text),
            at,
            ..
        }) => {
            next(input);
            Ok((text, at))
        }
        Some(other) => {
            let what = format!("{what} is missing before {}", quoted(other.text));
            Err(Fault::new(other.at, what, example))
        }
        None => {
            let what = format!("{what} is missing at the end");
            Err(Fault::new(end(input), what, example))
        }
    }
}

/// Takes a comparison; without one, `=` is meant.
pub(super) fn comparison(input: &mut Input<'_>) -> (Comparison, Range<usize>) {
    match peek(input) {
        Some(Lexeme {
            token: Token::Compare(comparison),
            at,
            ..
        }) => {
            next(input);
            (comparison, at)
        }
        _ => (Comparison::Equal, end(input)),
    }
}

/// Takes `=` or `!=`, for what has no order; true for `!=`.
pub(super) fn unequal(input: &mut Input<'_>, keyword: &str, example: &str) -> Outcome<bool> {
    match comparison(input) {
        (Comparison::Equal, _) => Ok(false),
        (Comparison::NotEqual, _) => Ok(true),
        (_, at) => {
            let what = format!("`{keyword}` has no order: only = and != compare it");
            Err(Fault::new(at, what, example))
        }
    }
}

/// A port by number or by the name of its service.
pub(super) fn port_number(
    services: &Services,
    text: &str,
    at: Range<usize>,
    example: &str,
) -> Outcome<u16> {
    let fault = |what: String| Err(Fault::new(at.clone(), what, example));
    if text.is_empty() {
        return fault("a port is missing after the colon".into());
    }
    if text.bytes().all(|byte| byte.is_ascii_digit()) {
        return match text.parse() {
            // ss takes a leading zero for octal.
            Ok(port) if port == 0 || !text.starts_with('0') => Ok(port),
            Ok(_) => fault(format!("{} begins with a zero", quoted(text))),
            Err(_) => fault(format!(
                "{} is not a port: the highest is 65535",
                quoted(text)
            )),
        };
    }
    match services.port(text) {
        Some(port) => Ok(port),
        None => fault(format!(
            "{} is neither a port nor a service in /etc/services",
            quoted(text)
        )),
    }
}
